//! Running an entry: inputs to symbol values, checks of every index, launches, outputs.
#![allow(unsafe_code)]

use crate::ahead;
use crate::error::{Result, RuntimeError};
use crate::launch::Steps;
use crate::region::Region;
use crate::session::Session;
use pleach_plan::{ALIGN, BufferKind, Check, DType, Entry, Expr, Input};

/// A tensor given to a run, row-major; its shape follows from its length and the plan.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "each name is the element type")]
pub enum Values<'a> {
    I32(&'a [i32]),
    F32(&'a [f32]),
}

impl Values<'_> {
    fn len(&self) -> usize {
        match self {
            Values::I32(v) => v.len(),
            Values::F32(v) => v.len(),
        }
    }

    fn dtype(&self) -> DType {
        match self {
            Values::I32(_) => DType::I32,
            Values::F32(_) => DType::F32,
        }
    }

    fn bytes(&self) -> &[u8] {
        let (at, len): (*const u8, usize) = match self {
            Values::I32(v) => (v.as_ptr().cast(), size_of_val(*v)),
            Values::F32(v) => (v.as_ptr().cast(), size_of_val(*v)),
        };
        // SAFETY: the elements are plain numbers without padding, and the bytes are borrowed as long as they are.
        unsafe { std::slice::from_raw_parts(at, len) }
    }
}

impl<'a> From<&'a [i32]> for Values<'a> {
    fn from(v: &'a [i32]) -> Values<'a> {
        Values::I32(v)
    }
}

impl<'a> From<&'a [f32]> for Values<'a> {
    fn from(v: &'a [f32]) -> Values<'a> {
        Values::F32(v)
    }
}

/// A tensor a run gave, in memory of the session.
#[derive(Clone, Debug)]
pub struct Output<'s> {
    /// Name.
    pub name: &'s str,
    /// Element type.
    pub dtype: DType,
    /// Dimensions.
    pub shape: Vec<u64>,
    /// Elements, row-major, little endian.
    pub bytes: &'s [u8],
}

/// What a run gave; valid until the next one.
#[derive(Clone, Debug)]
pub struct Outputs<'s> {
    /// In the plan's order.
    pub list: Vec<Output<'s>>,
}

impl<'s> Outputs<'s> {
    /// The output of that name.
    ///
    /// # Errors
    /// [`RuntimeError::Values`] when there is none.
    pub fn get(&self, name: &str) -> Result<&Output<'s>> {
        self.list.iter().find(|o| o.name == name).ok_or_else(|| {
            let have: Vec<&str> = self.list.iter().map(|o| o.name).collect();
            RuntimeError::Values(format!("no output `{name}`; there is {}", have.join(", ")))
        })
    }

    /// The elements of an f32 output.
    ///
    /// # Errors
    /// [`RuntimeError::Values`] when there is none of that name and type.
    pub fn f32(&self, name: &str) -> Result<&'s [f32]> {
        let o = self.get(name)?;
        if o.dtype != DType::F32 {
            return Err(RuntimeError::Values(format!("output `{name}` is {}, not f32", o.dtype.name())));
        }
        // SAFETY: buffers are 64-byte aligned, the length is a multiple of 4, and every bit pattern is an f32.
        let (head, mid, _) = unsafe { o.bytes.align_to::<f32>() };
        if head.is_empty() { Ok(mid) } else { Err(RuntimeError::Values(format!("output `{name}` is not aligned"))) }
    }
}

impl Session {
    /// Runs an entry. Counts follow from the lengths of the inputs and are held against the capacities; every integer
    /// input is checked against what it indexes, so no input can make a kernel leave its buffers.
    ///
    /// # Errors
    /// [`RuntimeError::Input`] and [`RuntimeError::Capacity`]; nothing has run then.
    pub fn run(&mut self, entry: &str, inputs: &[(&str, Values<'_>)]) -> Result<Outputs<'_>> {
        let plan = self.plan.clone();
        let e = plan.entry(entry)?;
        let bad = |why: String| RuntimeError::Input { entry: entry.into(), why };
        if e.prepares().is_some() {
            return Err(bad("is run by the session itself, when weights or adapters are loaded".into()));
        }
        let index = plan.entries.iter().position(|x| std::ptr::eq(x, e)).unwrap_or(0);
        let given = sort_inputs(e, inputs).map_err(bad)?;
        let env = self.counts(e, &given)?;
        for (x, v) in e.inputs.iter().zip(&given) {
            check_values(e, x, *v, &given, &env, &mut self.seen)
                .map_err(|why| bad(format!("input `{}`: {why}", x.name)))?;
        }
        self.prepare_all()?;
        self.launch_all(index, &given, &env)?;
        self.outputs(index, &env)
    }

    /// Values of all symbols for these inputs.
    fn counts(&self, e: &Entry, given: &[Values<'_>]) -> Result<Vec<u64>> {
        let plan = &self.plan;
        let bad = |why: String| RuntimeError::Input { entry: e.name.clone(), why };
        let mut value: Vec<Option<u64>> =
            (0..plan.symbols.len()).map(|i| self.fixed[i].then_some(self.capacity[i])).collect();
        for (x, v) in e.inputs.iter().zip(given) {
            let mut unknown = vec![];
            let mut known = 1u64;
            for d in &x.shape {
                match d {
                    Expr::Sym(s) if value[*s as usize].is_none() => unknown.push(*s as usize),
                    d => {
                        let env: Vec<u64> = value.iter().map(|v| v.unwrap_or(0)).collect();
                        known = known.checked_mul(d.eval(&env)?).ok_or(pleach_plan::ExprError::Overflow)?;
                    }
                }
            }
            let len = v.len() as u64;
            let [s] = unknown[..] else { continue };
            if known == 0 || !len.is_multiple_of(known) {
                return Err(bad(format!("input `{}` has {len} values, which is no multiple of {known}", x.name)));
            }
            let n = len / known;
            value[s] = Some(n);
            // A symbol defined as another plus a number gives that one as well.
            let Some(Expr::Add(t)) = &plan.symbols[s].value else { continue };
            let [Expr::Sym(j), Expr::Const(c)] = t.as_slice() else { continue };
            let (other, name) = (&mut value[*j as usize], &plan.symbols[*j as usize].name);
            let m =
                n.checked_sub(*c).ok_or_else(|| bad(format!("input `{}` must have at least {c} values", x.name)))?;
            if let Some(v) = other.filter(|v| *v != m) {
                return Err(bad(format!("input `{}` has {n} values where {name} = {v}", x.name)));
            }
            *other = Some(m);
        }
        let mut env: Vec<u64> = vec![];
        for (i, s) in plan.symbols.iter().enumerate() {
            let v = match &s.value {
                Some(x) => x.eval(&env)?,
                None => value[i].unwrap_or(self.capacity[i]),
            };
            if value[i].is_some_and(|x| x != v) {
                return Err(bad(format!("{} is {} by one input and {v} by another", s.name, value[i].unwrap_or(0))));
            }
            if v == 0 {
                return Err(bad(format!("{} is 0; give at least one", s.name)));
            }
            if v > self.capacity[i] {
                return Err(RuntimeError::Capacity(format!(
                    "{}: {} is {v}, the session was opened for {}; open it with a larger capacity or give less at a time",
                    e.name, s.name, self.capacity[i]
                )));
            }
            env.push(v);
        }
        for (x, v) in e.inputs.iter().zip(given) {
            let n = Expr::product(x.shape.iter().cloned()).eval(&env)?;
            if n != v.len() as u64 {
                let shape: Vec<String> = x.shape.iter().map(|d| d.display(&plan.symbols).to_string()).collect();
                return Err(bad(format!(
                    "input `{}` [{}] has {} values, needs {n}",
                    x.name,
                    shape.join(", "),
                    v.len()
                )));
            }
        }
        Ok(env)
    }

    fn launch_all(&mut self, index: usize, given: &[Values<'_>], env: &[u64]) -> Result<()> {
        let plan = self.plan.clone();
        let steps = &plan.entries[index].steps;
        let b = &mut self.entries[index];
        if b.env != env || b.tasks.len() != steps.len() {
            let tasks = plan.kernels.iter().map(|k| k.tasks.eval(env)).collect::<std::result::Result<Vec<u64>, _>>()?;
            b.tasks = steps.iter().map(|s| tasks[s.kernel as usize]).collect();
            b.env = env.to_vec();
            b.workers = self.device.threads();
            b.ahead = match self.device.shares_memory() {
                true => {
                    let e = &plan.entries[index];
                    ahead::windows(&plan, e, (&b.waves, &b.tasks), &b.buffers, (b.workers, env))?
                }
                false => vec![],
            };
        }
        self.device.begin();
        if self.device.shares_memory() {
            for (place, input) in &b.inputs {
                b.pointers[*place] = given[*input as usize].bytes().as_ptr().cast_mut();
            }
        } else {
            let mut done = vec![false; given.len()];
            for (place, input) in &b.inputs {
                if !std::mem::replace(&mut done[*input as usize], true) {
                    // SAFETY: the buffer has room for the input at capacity, and counts are within it.
                    unsafe { self.device.write(b.pointers[*place], given[*input as usize].bytes())? };
                }
            }
        }
        let all = Steps { plan: &plan, index, bound: &self.entries[index], env };
        let Some(profile) = &mut self.profile else {
            // SAFETY: the plan is validated, so each buffer has the size the kernel declares for counts up to capacity;
            // counts and the values of index inputs have been checked; the inputs live through this call, and the
            // session is borrowed mutably.
            return unsafe { self.device.run(&all) };
        };
        let times = profile.times;
        all.waves(env, &mut |wave| {
            for (i, w) in wave.works.iter().enumerate() {
                // SAFETY: as above.
                let time = unsafe { self.device.time(std::slice::from_ref(w), wave.dims, times)? };
                profile.add(&plan, (index, wave.first + i), time, wave.env);
            }
            Ok(())
        })
    }

    fn outputs(&mut self, index: usize, env: &[u64]) -> Result<Outputs<'_>> {
        let e = &self.plan.entries[index];
        let mut places = vec![];
        for o in &e.outputs {
            let b = &e.buffers[o.buffer as usize];
            let at = self.entries[index].buffers[o.buffer as usize];
            let kept = matches!(b.kind, BufferKind::Output | BufferKind::Param(_));
            if at.is_null() || !kept {
                return Err(RuntimeError::Values(format!("output `{}` has no memory", o.name)));
            }
            places.push((at, b.bytes.eval(env)?));
        }
        if !self.device.shares_memory() {
            let size = |bytes: u64| bytes.next_multiple_of(ALIGN);
            let total = places.iter().map(|p| size(p.1)).sum();
            let host = match &mut self.host {
                Some(r) if r.len() as u64 >= total => r,
                old => {
                    *old = None;
                    old.insert(Region::new(total, "outputs")?)
                }
            };
            let mut end = 0;
            for (at, bytes) in &mut places {
                let to = host.at(end, *bytes)?;
                // SAFETY: the part lies in the region, which nobody else uses; the buffer has this many bytes.
                unsafe { self.device.read(*at, std::slice::from_raw_parts_mut(to, *bytes as usize))? };
                (*at, end) = (to, end + size(*bytes));
            }
        }
        let e = &self.plan.entries[index];
        let mut list = vec![];
        for (o, (at, bytes)) in e.outputs.iter().zip(places) {
            let shape = o.shape.iter().map(|d| d.eval(env)).collect::<std::result::Result<Vec<u64>, _>>()?;
            // SAFETY: the buffer lies in the arena, in a parameter or in memory for outputs, holds this many bytes, and
            // stays untouched while the session is borrowed.
            let bytes = unsafe { std::slice::from_raw_parts(at, bytes as usize) };
            list.push(Output { name: &o.name, dtype: o.dtype, shape, bytes });
        }
        Ok(Outputs { list })
    }
}

/// The inputs in the plan's order.
fn sort_inputs<'v>(e: &Entry, inputs: &[(&str, Values<'v>)]) -> std::result::Result<Vec<Values<'v>>, String> {
    let names = || e.inputs.iter().map(|x| x.name.as_str()).collect::<Vec<_>>().join(", ");
    for (i, (n, _)) in inputs.iter().enumerate() {
        if !e.inputs.iter().any(|x| x.name == *n) {
            return Err(format!("takes no input `{n}`; it takes {}", names()));
        }
        if inputs[..i].iter().any(|(m, _)| m == n) {
            return Err(format!("input `{n}` is given twice"));
        }
    }
    let mut out = vec![];
    for x in &e.inputs {
        let Some((_, v)) = inputs.iter().find(|(n, _)| *n == x.name) else {
            return Err(format!("input `{}` is missing; it takes {}", x.name, names()));
        };
        if v.dtype() != x.dtype {
            return Err(format!("input `{}` is {}, give {}", x.name, v.dtype().name(), x.dtype.name()));
        }
        out.push(*v);
    }
    Ok(out)
}

/// Holds the values of an input against the plan's checks.
fn check_values(
    e: &Entry,
    x: &Input,
    v: Values<'_>,
    given: &[Values<'_>],
    env: &[u64],
    seen: &mut Vec<u64>,
) -> std::result::Result<(), String> {
    let Values::I32(v) = v else { return Ok(()) };
    let other = |name: &str| match e.inputs.iter().zip(given).find(|(y, _)| y.name == name) {
        Some((_, Values::I32(w))) => Ok(*w),
        _ => Err(format!("there is no `{name}` to hold it against")),
    };
    let value = |x: &Expr| x.eval(env).map_err(|e| e.to_string());
    let mut upper = 0;
    for c in &x.checks {
        match c {
            Check::Range(bound) => {
                upper = value(bound)?;
                if let Some(i) = v.iter().position(|i| u64::try_from(*i).is_ok_and(|i| i < upper).eq(&false)) {
                    return Err(format!("value {i} is {}, it must be at least 0 and below {upper}", v[i]));
                }
            }
            Check::Distinct => {
                seen.clear();
                seen.resize((upper as usize).div_ceil(64).min(1 << 26), 0);
                for i in v {
                    let (word, bit) = (*i as usize / 64, 1u64 << (*i as usize % 64));
                    match seen.get_mut(word) {
                        Some(w) if *w & bit == 0 => *w |= bit,
                        _ => return Err(format!("{i} occurs twice")),
                    }
                }
            }
            Check::Segments(total) => {
                let total = value(total)?;
                let ok = v.first() == Some(&0)
                    && v.last().is_some_and(|l| u64::try_from(*l) == Ok(total))
                    && v.windows(2).all(|w| w[0] <= w[1]);
                if !ok {
                    return Err(format!("must start at 0, never fall and end at {total}"));
                }
            }
            Check::Span { start, total } => {
                let total = value(total)?;
                for (i, (a, n)) in other(start)?.iter().zip(v).enumerate() {
                    let end = u64::try_from(*a).ok().zip(u64::try_from(*n).ok()).map(|(a, n)| a + n);
                    if end.is_none_or(|e| e > total) {
                        return Err(format!("span {i} starts at {a} and has length {n}, it must lie within {total}"));
                    }
                }
            }
            Check::Covers(segments) => {
                for (i, (w, n)) in other(segments)?.windows(2).zip(v).enumerate() {
                    if i64::from(*n) < i64::from(w[1]) - i64::from(w[0]) {
                        return Err(format!(
                            "length {i} is {n}, shorter than the {} tokens of its sequence",
                            w[1] - w[0]
                        ));
                    }
                }
            }
        }
    }
    Ok(())
}
