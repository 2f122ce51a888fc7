//! Text of one MLIR function: SSA names, hoisted constants, structured loops.
//!
//! Kernels are written in func + scf + arith + math + vector, with memory accessed through the llvm dialect
//! (`!llvm.ptr`, `llvm.getelementptr`, `llvm.load`, `llvm.store`): no memrefs, no descriptors, no index type. All integers are
//! i64. Constants are folded while they are built, so addresses with static strides end up as immediates.
//! Each line says in a comment which values of the kernel's body it is written for ([`Func::of`]), by the numbers that the
//! kernel's own text gives them: `… // %4 %7`. What serves all of them, such as constants and loops, says nothing.
//! Leaves alone: what the kernels mean, and how the text is lowered.

#[cfg(test)]
mod tests;
mod transpose;
mod types;
mod values;

use pleach_ir::ValueId;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::rc::Rc;
pub(crate) use transpose::transpose;
use types::align_of;
pub use types::vty;
pub use values::values_of;

/// An SSA value, with its number when it is an i64 constant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Val {
    name: Rc<str>,
    konst: Option<i64>,
}

impl Val {
    /// A value that the text already defines, such as a function argument.
    pub fn named(name: &str) -> Val {
        Val { name: name.into(), konst: None }
    }

    /// The number of an i64 constant.
    pub fn known(&self) -> Option<i64> {
        self.konst
    }
}

impl std::fmt::Display for Val {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name)
    }
}

/// A function under construction.
pub struct Func {
    /// Symbol.
    pub name: String,
    /// The target rounds f32 to bf16 in one instruction.
    pub round_bf16: bool,
    /// A thread of a GPU: one lane, with the approximations of its instruction set.
    pub gpu: bool,
    args: Vec<(String, String)>,
    body: String,
    consts: BTreeMap<String, Val>,
    order: Vec<String>,
    named: Vec<String>,
    next: u32,
    depth: usize,
    /// The values that lines are written for, and how lines end that say so.
    values: Rc<[ValueId]>,
    end: Rc<str>,
    place_of: Rc<[ValueId]>,
    /// Of each buffer of the kernel: the operand, or the result and what it lies over.
    buffers: Vec<Vec<ValueId>>,
    /// The buffer of each tensor map (GPU).
    pub maps: Vec<u32>,
    /// For a GPU: address arithmetic that is there already, for each region that encloses the current position. Equal
    /// expressions are one value, so that the same position has the same name.
    known: Vec<BTreeMap<String, Val>>,
    /// Values that were rounded to 16 bits and widened again, with what they were in between.
    rounded: BTreeMap<Rc<str>, Val>,
    /// Attributes of the next loop.
    pub note: &'static str,
}

impl Func {
    /// An empty function with these arguments (name without `%`, type).
    pub fn new(name: &str, args: &[(&str, &str)]) -> Func {
        Func {
            name: name.to_string(),
            round_bf16: false,
            gpu: false,
            args: args.iter().map(|(n, t)| (n.to_string(), t.to_string())).collect(),
            body: String::new(),
            consts: BTreeMap::new(),
            order: vec![],
            named: vec![],
            next: 0,
            depth: 1,
            values: [].into(),
            end: "".into(),
            place_of: [].into(),
            buffers: vec![],
            maps: vec![],
            known: vec![BTreeMap::new()],
            rounded: BTreeMap::new(),
            note: "",
        }
    }

    /// A host kernel: `fn(buffers, dims, first, last, scratch)`.
    pub fn host_kernel(name: &str) -> Func {
        Func::new(
            name,
            &[
                ("buffers", "!llvm.ptr"),
                ("dims", "!llvm.ptr"),
                ("first", "i64"),
                ("last", "i64"),
                ("scratch", "!llvm.ptr"),
            ],
        )
    }

    /// The argument of that name.
    pub fn arg(&self, name: &str) -> Val {
        debug_assert!(
            self.args.iter().any(|a| a.0 == name) || self.named.iter().any(|n| n == name),
            "no argument {name}"
        );
        Val::named(&format!("%{name}"))
    }

    /// A value that stands for an argument of that name from here on.
    pub fn name(&mut self, name: &str, text: &str) {
        self.stmt(&format!("%{name} = {text}"));
        self.named.push(name.to_string());
    }

    fn fresh(&mut self) -> Val {
        self.next += 1;
        Val::named(&format!("%v{}", self.next))
    }

    /// A statement without result.
    pub fn stmt(&mut self, text: &str) {
        let end = if self.gpu { self.end_of(text).into() } else { self.end.clone() };
        let _ = writeln!(self.body, "{:w$}{text}{end}", "", w = 2 * self.depth);
    }

    /// A statement with one result.
    pub fn op(&mut self, text: impl AsRef<str>) -> Val {
        let v = self.fresh();
        self.stmt(&format!("{v} = {}", text.as_ref()));
        v
    }

    /// Says that `wide` is `half` widened.
    pub fn set_rounded(&mut self, wide: &Val, half: Val) {
        self.rounded.insert(wide.name.clone(), half);
    }

    /// What a value was when it was rounded to 16 bits.
    pub fn rounded(&self, wide: &Val) -> Option<Val> {
        self.rounded.get(&wide.name).cloned()
    }

    /// An operator without effects: on a GPU, an equal one that is there already.
    fn pure(&mut self, text: String) -> Val {
        if !self.gpu {
            return self.op(text);
        }
        if let Some(v) = self.known.iter().rev().find_map(|k| k.get(&text)) {
            return v.clone();
        }
        let v = self.op(&text);
        if let Some(k) = self.known.last_mut() {
            k.insert(text, v.clone());
        }
        v
    }

    fn enter(&mut self) {
        self.depth += 1;
        self.known.push(BTreeMap::new());
    }

    fn leave(&mut self) {
        self.depth -= 1;
        self.known.pop();
    }

    /// A constant by its text, such as `dense<0.0> : vector<16xf32>`; defined once, at the head of the function.
    pub fn konst(&mut self, text: &str) -> Val {
        if let Some(v) = self.consts.get(text) {
            return v.clone();
        }
        let v = Val::named(&format!("%c{}", self.order.len()));
        self.order.push(text.to_string());
        self.consts.insert(text.to_string(), v.clone());
        v
    }

    /// An i64 constant.
    pub fn i64(&mut self, x: i64) -> Val {
        Val { konst: Some(x), ..self.konst(&format!("{x} : i64")) }
    }

    /// An f32 constant, exact, as a scalar (`lanes` 1) or a splat.
    pub fn f32(&mut self, x: f32, lanes: usize) -> Val {
        let bits = format!("0x{:08X}", x.to_bits());
        if lanes == 1 {
            self.konst(&format!("{bits} : f32"))
        } else {
            self.konst(&format!("dense<{bits}> : {}", vty(lanes, "f32")))
        }
    }

    /// An i32 constant as a scalar or a splat.
    pub fn i32(&mut self, x: i32, lanes: usize) -> Val {
        if lanes == 1 {
            self.konst(&format!("{x} : i32"))
        } else {
            self.konst(&format!("dense<{x}> : {}", vty(lanes, "i32")))
        }
    }

    // ---- i64 arithmetic, folded ----

    fn int2(&mut self, op: &str, a: &Val, b: &Val) -> Val {
        self.pure(format!("arith.{op} {a}, {b} : i64"))
    }

    /// a + b.
    pub fn add(&mut self, a: &Val, b: &Val) -> Val {
        match (a.konst, b.konst) {
            (Some(x), Some(y)) => self.i64(x + y),
            (Some(0), _) => b.clone(),
            (_, Some(0)) => a.clone(),
            _ => self.int2("addi", a, b),
        }
    }

    /// a + c.
    pub fn addc(&mut self, a: &Val, c: i64) -> Val {
        let c = self.i64(c);
        self.add(a, &c)
    }

    /// a - b.
    pub fn sub(&mut self, a: &Val, b: &Val) -> Val {
        match (a.konst, b.konst) {
            (Some(x), Some(y)) => self.i64(x - y),
            (_, Some(0)) => a.clone(),
            _ => self.int2("subi", a, b),
        }
    }

    /// a * b.
    pub fn mul(&mut self, a: &Val, b: &Val) -> Val {
        match (a.konst, b.konst) {
            (Some(x), Some(y)) => self.i64(x * y),
            (Some(0), _) | (_, Some(0)) => self.i64(0),
            (Some(1), _) => b.clone(),
            (_, Some(1)) => a.clone(),
            _ => self.int2("muli", a, b),
        }
    }

    /// a * c.
    pub fn mulc(&mut self, a: &Val, c: i64) -> Val {
        let c = self.i64(c);
        self.mul(a, &c)
    }

    /// a / c for non-negative a and positive c.
    pub fn divc(&mut self, a: &Val, c: i64) -> Val {
        let c = self.i64(c);
        self.div(a, &c)
    }

    /// a / b for non-negative a and positive b.
    pub fn div(&mut self, a: &Val, b: &Val) -> Val {
        match (a.konst, b.konst) {
            (Some(x), Some(y)) => self.i64(x / y),
            (_, Some(1)) => a.clone(),
            _ => self.int2("divui", a, b),
        }
    }

    /// a mod c for non-negative a and positive c.
    pub fn remc(&mut self, a: &Val, c: i64) -> Val {
        let c = self.i64(c);
        self.rem(a, &c)
    }

    /// a mod b for non-negative a and positive b.
    pub fn rem(&mut self, a: &Val, b: &Val) -> Val {
        match (a.konst, b.konst) {
            (Some(x), Some(y)) => self.i64(x % y),
            (_, Some(1)) => self.i64(0),
            _ => self.int2("remui", a, b),
        }
    }

    /// min(a, b), signed.
    pub fn min(&mut self, a: &Val, b: &Val) -> Val {
        match (a.konst, b.konst) {
            (Some(x), Some(y)) => self.i64(x.min(y)),
            _ => self.int2("minsi", a, b),
        }
    }

    /// max(a, b), signed.
    pub fn max(&mut self, a: &Val, b: &Val) -> Val {
        match (a.konst, b.konst) {
            (Some(x), Some(y)) => self.i64(x.max(y)),
            _ => self.int2("maxsi", a, b),
        }
    }

    /// ceil(a / c).
    pub fn ceil_divc(&mut self, a: &Val, c: i64) -> Val {
        let t = self.addc(a, c - 1);
        self.divc(&t, c)
    }

    /// An i1: `pred` is MLIR's, such as `slt`, `uge`, `eq`.
    pub fn cmp(&mut self, pred: &str, a: &Val, b: &Val) -> Val {
        self.pure(format!("arith.cmpi {pred}, {a}, {b} : i64"))
    }

    // ---- memory ----

    /// Address of element `index` of an array of `elem` at `base`.
    pub fn gep(&mut self, base: &Val, index: &Val, elem: &str) -> Val {
        if index.konst == Some(0) {
            return base.clone();
        }
        match index.konst {
            Some(c) if i32::try_from(c).is_ok() => {
                self.pure(format!("llvm.getelementptr {base}[{c}] : (!llvm.ptr) -> !llvm.ptr, {elem}"))
            }
            _ => self.pure(format!("llvm.getelementptr {base}[{index}] : (!llvm.ptr, i64) -> !llvm.ptr, {elem}")),
        }
    }

    /// Loads a scalar or vector of type `ty`; only the alignment of one `elem` is assumed.
    pub fn load(&mut self, ptr: &Val, ty: &str) -> Val {
        self.op(format!("llvm.load {ptr} {{alignment = {} : i64}} : !llvm.ptr -> {ty}", align_of(ty)))
    }

    /// Stores a scalar or vector of type `ty`.
    pub fn store(&mut self, x: &Val, ptr: &Val, ty: &str) {
        self.stmt(&format!("llvm.store {x}, {ptr} {{alignment = {} : i64}} : {ty}, !llvm.ptr", align_of(ty)));
    }

    /// Loads `base[index]`, `lanes` elements.
    pub fn load_at(&mut self, base: &Val, index: &Val, elem: &str, lanes: usize) -> Val {
        let p = self.gep(base, index, elem);
        self.load(&p, &vty(lanes, elem))
    }

    /// Stores `lanes` elements at `base[index]`.
    pub fn store_at(&mut self, x: &Val, base: &Val, index: &Val, elem: &str, lanes: usize) {
        let p = self.gep(base, index, elem);
        self.store(x, &p, &vty(lanes, elem));
    }

    /// Brings the cache line of an address near. The address need not be valid.
    pub fn prefetch(&mut self, ptr: &Val) {
        self.prefetch_into(ptr, 3);
    }

    /// The same with how near: 3 is the first-level cache, 2 the second.
    pub fn prefetch_into(&mut self, ptr: &Val, level: u32) {
        let how = format!("cache = 1 : i32, hint = {level} : i32, rw = 0 : i32");
        self.stmt(&format!("\"llvm.intr.prefetch\"({ptr}) <{{{how}}}> : (!llvm.ptr) -> ()"));
    }

    /// Loads the lanes where `mask` (vector of i1) is set; the others are zero and not touched in memory.
    pub fn masked_load(&mut self, ptr: &Val, mask: &Val, elem: &str, lanes: usize) -> Val {
        let ty = vty(lanes, elem);
        let zero = if elem.starts_with('i') { format!("dense<0> : {ty}") } else { format!("dense<0.0> : {ty}") };
        let z = self.konst(&zero);
        self.op(format!(
            "llvm.intr.masked.load {ptr}, {mask}, {z} {{alignment = {} : i32}} : (!llvm.ptr, vector<{lanes}xi1>, {ty}) -> {ty}",
            align_of(elem)
        ))
    }

    /// Stores the lanes where `mask` is set.
    pub fn masked_store(&mut self, x: &Val, ptr: &Val, mask: &Val, elem: &str, lanes: usize) {
        let ty = vty(lanes, elem);
        // LLVM 22 makes a single 16-bit lane a store of 32 bits.
        if let Some(lane) = self.single_lane(mask) {
            let x = self.op(format!("vector.extract {x}[{lane}] : {elem} from {ty}"));
            let lane = self.i64(lane as i64);
            return self.store_at(&x, ptr, &lane, elem, 1);
        }
        self.stmt(&format!(
            "llvm.intr.masked.store {x}, {ptr}, {mask} {{alignment = {} : i32}} : {ty}, vector<{lanes}xi1> into !llvm.ptr",
            align_of(elem)
        ));
    }

    /// The lane that is on in a constant mask, if it is the only one.
    fn single_lane(&self, mask: &Val) -> Option<usize> {
        let text = self.order.get(mask.name.strip_prefix("%c")?.parse::<usize>().ok()?)?;
        let list = text.strip_prefix("dense<[")?.split(']').next()?;
        let mut on = list.split(", ").enumerate().filter(|x| x.1 == "true");
        on.next().filter(|_| on.next().is_none()).map(|x| x.0)
    }

    /// Mask of the first `n` lanes (i64, may be out of range) of `lanes`.
    pub fn lane_mask(&mut self, n: &Val, lanes: usize) -> Val {
        let ids = (0..lanes).map(|i| i.to_string()).collect::<Vec<_>>().join(", ");
        let iota = self.konst(&format!("dense<[{ids}]> : vector<{lanes}xi32>"));
        let zero = self.i64(0);
        let cap = self.i64(lanes as i64);
        let n = self.max(n, &zero);
        let n = self.min(&n, &cap);
        let n = self.op(format!("arith.trunci {n} : i64 to i32"));
        let n = self.op(format!("vector.broadcast {n} : i32 to vector<{lanes}xi32>"));
        self.op(format!("arith.cmpi slt, {iota}, {n} : vector<{lanes}xi32>"))
    }

    /// A scalar into every lane.
    pub fn splat(&mut self, x: &Val, elem: &str, lanes: usize) -> Val {
        if lanes == 1 {
            return x.clone();
        }
        self.op(format!("vector.broadcast {x} : {elem} to {}", vty(lanes, elem)))
    }

    /// The pointer of kernel buffer `i` (host kernels).
    pub fn buffer(&mut self, i: usize) -> Val {
        let values = self.buffers.get(i).cloned().unwrap_or_default();
        self.of(&values, |f| {
            let b = f.arg("buffers");
            let i = f.i64(i as i64);
            let p = f.gep(&b, &i, "!llvm.ptr");
            f.op(format!("llvm.load {p} : !llvm.ptr -> !llvm.ptr"))
        })
    }

    /// The value of symbol `i` of the plan (host kernels).
    pub fn dim(&mut self, i: usize) -> Val {
        let b = self.arg("dims");
        let i = self.i64(i as i64);
        let p = self.gep(&b, &i, "i64");
        self.op(format!("llvm.load {p} : !llvm.ptr -> i64"))
    }

    // ---- structure ----

    /// `for iv in (lo..hi).step_by(step)` carrying values. `body` returns the values of the next turn.
    pub fn for_(
        &mut self,
        lo: &Val,
        hi: &Val,
        step: i64,
        inits: &[(Val, String)],
        body: impl FnOnce(&mut Func, &Val, &[Val]) -> Vec<Val>,
    ) -> Vec<Val> {
        let step = self.i64(step);
        self.for_by(lo, hi, &step, inits, body)
    }

    /// [`Func::for_`] with a step that is known when it runs.
    pub fn for_by(
        &mut self,
        lo: &Val,
        hi: &Val,
        step: &Val,
        inits: &[(Val, String)],
        body: impl FnOnce(&mut Func, &Val, &[Val]) -> Vec<Val>,
    ) -> Vec<Val> {
        let iv = self.fresh();
        let args: Vec<Val> = inits.iter().map(|_| self.fresh()).collect();
        let mut head = format!("scf.for {iv} = {lo} to {hi} step {step}");
        let types = inits.iter().map(|x| x.1.as_str()).collect::<Vec<_>>().join(", ");
        let res = self.fresh();
        let note = std::mem::take(&mut self.note);
        if !inits.is_empty() {
            let list = args.iter().zip(inits).map(|(a, (v, _))| format!("{a} = {v}")).collect::<Vec<_>>().join(", ");
            let n = inits.len();
            head = format!("{res}:{n} = {head} iter_args({list}) -> ({types})");
        }
        self.stmt(&format!("{head} : i64 {{"));
        self.enter();
        let out = body(self, &iv, &args);
        debug_assert_eq!(out.len(), inits.len());
        if !inits.is_empty() {
            let list = out.iter().map(|v| v.to_string()).collect::<Vec<_>>().join(", ");
            self.stmt(&format!("scf.yield {list} : {types}"));
        }
        self.leave();
        self.stmt(&format!("}}{note}"));
        (0..inits.len()).map(|i| Val::named(&format!("{res}#{i}"))).collect()
    }

    /// `while cond(values) { values = body(values) }`.
    pub fn while_(
        &mut self,
        inits: &[(Val, String)],
        cond: impl FnOnce(&mut Func, &[Val]) -> Val,
        body: impl FnOnce(&mut Func, &[Val]) -> Vec<Val>,
    ) -> Vec<Val> {
        let types = inits.iter().map(|x| x.1.as_str()).collect::<Vec<_>>().join(", ");
        let (before, after): (Vec<Val>, Vec<Val>) = inits.iter().map(|_| (self.fresh(), self.fresh())).unzip();
        let list = before.iter().zip(inits).map(|(a, (v, _))| format!("{a} = {v}")).collect::<Vec<_>>().join(", ");
        let (res, n) = (self.fresh(), inits.len());
        self.stmt(&format!("{res}:{n} = scf.while ({list}) : ({types}) -> ({types}) {{"));
        self.enter();
        let go = cond(self, &before);
        let names = |v: &[Val]| v.iter().map(|v| v.to_string()).collect::<Vec<_>>().join(", ");
        self.stmt(&format!("scf.condition({go}) {} : {types}", names(&before)));
        self.leave();
        self.stmt("} do {");
        let args = after.iter().zip(inits).map(|(a, (_, t))| format!("{a}: {t}")).collect::<Vec<_>>().join(", ");
        self.stmt(&format!("^bb0({args}):"));
        self.enter();
        let out = body(self, &after);
        self.stmt(&format!("scf.yield {} : {types}", names(&out)));
        self.leave();
        self.stmt("}");
        (0..n).map(|i| Val::named(&format!("{res}#{i}"))).collect()
    }

    /// A loop that carries nothing.
    pub fn loop_(&mut self, lo: &Val, hi: &Val, step: i64, body: impl FnOnce(&mut Func, &Val)) {
        self.for_(lo, hi, step, &[], |f, iv, _| {
            body(f, iv);
            vec![]
        });
    }

    /// `if cond { body }`.
    pub fn if_(&mut self, cond: &Val, body: impl FnOnce(&mut Func)) {
        self.stmt(&format!("scf.if {cond} {{"));
        self.enter();
        body(self);
        self.leave();
        self.stmt("}");
    }

    /// `if cond { a } else { b }` with values of the given types.
    pub fn if_else(
        &mut self,
        cond: &Val,
        types: &[String],
        a: impl FnOnce(&mut Func) -> Vec<Val>,
        b: impl FnOnce(&mut Func) -> Vec<Val>,
    ) -> Vec<Val> {
        let res = self.fresh();
        let list = types.join(", ");
        let n = types.len();
        if n == 0 {
            self.stmt(&format!("scf.if {cond} {{"));
        } else {
            self.stmt(&format!("{res}:{n} = scf.if {cond} -> ({list}) {{"));
        }
        let arm = |f: &mut Func, out: Vec<Val>| {
            if n > 0 {
                let v = out.iter().map(|v| v.to_string()).collect::<Vec<_>>().join(", ");
                f.stmt(&format!("scf.yield {v} : {list}"));
            }
            f.leave();
        };
        self.enter();
        let out = a(self);
        arm(self, out);
        self.stmt("} else {");
        self.enter();
        let out = b(self);
        arm(self, out);
        self.stmt("}");
        (0..n).map(|i| Val::named(&format!("{res}#{i}"))).collect()
    }

    /// The finished text of a `func.func`.
    pub fn text(&self) -> String {
        let args = self.args.iter().map(|(n, t)| format!("%{n}: {t}")).collect::<Vec<_>>().join(", ");
        let mut s = format!("func.func @{}({args}) {{\n", self.name);
        for k in &self.order {
            let _ = writeln!(s, "  {} = arith.constant {k}", self.consts[k]);
        }
        s.push_str(&self.body);
        s.push_str("  return\n}\n");
        s
    }
}
