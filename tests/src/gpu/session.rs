//! Entries of a plan in the simulator, as a session runs them: parameters at fixed addresses, buffers at the offsets that
//! the planner gives them at capacity, loops window by window, results in place.
//!
//! Grids are evaluated at capacity, kernels read the actual counts. Before a run the arena holds nothing, and before a step so do
//! the buffers that it writes without reading; after it they must be full.

use super::{Compiled, How, Place, blocks};
use pleach_ir::interp::{Symbols, Tensor};
use pleach_ir::{DType, Layout, Sym};
use pleach_plan::{ArenaLayout, BufferKind, Entry, Expr, Loop, Role, Source, arena};
use pleach_ptx_sim::{Counts, Memory, Ptr};
use pleach_runtime::train::Machine;
use pleach_runtime::{ParamValues, RuntimeError, Values};
use std::collections::BTreeMap;

/// Inputs or outputs by name.
pub type Tensors = BTreeMap<String, Tensor>;

/// A plan with its parameters in simulated memory.
#[derive(Debug)]
pub struct Simulated<'c> {
    c: &'c Compiled,
    how: How,
    mem: Memory,
    place: Place,
    params: Vec<Ptr>,
    arena: Ptr,
    arenas: Vec<ArenaLayout>,
    inputs: BTreeMap<(usize, usize), Ptr>,
    capacity: Vec<u64>,
    /// What every kernel executed so far.
    pub counts: Vec<Counts>,
}

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

fn ir_dtype(d: pleach_plan::DType) -> DType {
    match d {
        pleach_plan::DType::F32 => DType::F32,
        pleach_plan::DType::BF16 => DType::BF16,
        pleach_plan::DType::F16 => DType::F16,
        pleach_plan::DType::I32 => DType::I32,
        pleach_plan::DType::Bool => DType::Bool,
    }
}

impl<'c> Simulated<'c> {
    /// Reserves everything for these counts, puts values into the parameters and runs the preparations.
    ///
    /// # Errors
    /// A parameter without a value, and faults of the preparations.
    pub fn open(c: &'c Compiled, values: &Tensors, capacity: &Symbols, how: How) -> Result<Simulated<'c>, String> {
        let plan = &c.plan;
        let capacity = plan.env(&|n| Sym::new(n).and_then(|n| capacity.get(&n).copied())).map_err(text)?;
        let mut mem = Memory::new();
        let mut params = vec![];
        for p in &plan.params {
            let bytes = p.bytes.eval(&capacity).map_err(text)? as usize;
            let at = mem.alloc_named(&p.name, bytes);
            match (&p.source, values.get(&p.name)) {
                (Source::Derived, _) => {}
                (Source::Zeros, _) => mem.write(at, &vec![0; bytes]).map_err(text)?,
                (_, Some(t)) => {
                    let same = Tensor::from_floats(ir_dtype(p.dtype), t.shape.clone(), t.floats().into_owned());
                    let layout = c.schedule.params.iter().find(|(q, _)| q.name == p.name).map(|q| q.1);
                    let raw = match layout {
                        Some(Layout::Blocks(format)) => blocks::stored(format, &same)?,
                        _ if t.dtype() == same.dtype() => t.to_bytes(),
                        _ => same.to_bytes(),
                    };
                    if raw.len() != bytes {
                        return Err(format!("parameter {} has {bytes} bytes, its value {}", p.name, raw.len()));
                    }
                    mem.write(at, &raw).map_err(text)?;
                }
                (_, None) => return Err(format!("parameter {} has no value", p.name)),
            }
            params.push(at);
        }
        let layout = |e: &Entry| arena(e, &plan.kernels, &capacity).map_err(text);
        let arenas = plan.entries.iter().map(layout).collect::<Result<Vec<_>, _>>()?;
        let total = arenas.iter().map(|a| a.total).max().unwrap_or(0);
        let arena = mem.alloc_named("arena", total as usize);
        let mut scratch = 0;
        for k in &plan.kernels {
            scratch = scratch.max(k.scratch_bytes.eval(&capacity).map_err(text)?);
        }
        let place = Place::new(&mut mem, plan.symbols.len(), scratch);
        let counts = vec![Counts::default(); plan.kernels.len()];
        let mut s = Simulated { c, how, mem, place, params, arena, arenas, inputs: BTreeMap::new(), capacity, counts };
        s.prepare()?;
        Ok(s)
    }

    /// Runs the preparations.
    fn prepare(&mut self) -> Result<(), String> {
        for (i, e) in self.c.plan.entries.iter().enumerate().filter(|(_, e)| e.prepares().is_some()) {
            let env = self.capacity.clone();
            self.steps(i, &env, &[]).map_err(|why| format!("{}: {why}", e.name))?;
        }
        Ok(())
    }

    /// Runs an entry with those of the inputs that it takes.
    ///
    /// # Errors
    /// A missing input, and faults of kernels.
    pub fn run(&mut self, entry: &str, inputs: &Tensors) -> Result<Tensors, String> {
        let plan = &self.c.plan;
        let index = plan.entries.iter().position(|e| e.name == entry).ok_or_else(|| format!("no entry {entry}"))?;
        let e = &plan.entries[index];
        let mut given = vec![];
        let mut known: BTreeMap<u32, u64> = BTreeMap::new();
        for (i, x) in e.inputs.iter().enumerate() {
            let t = inputs.get(&x.name).ok_or_else(|| format!("{entry}: input {} is missing", x.name))?;
            for (d, n) in x.shape.iter().zip(&t.shape) {
                if let Expr::Sym(s) = d {
                    known.insert(*s, *n);
                }
            }
            let room = Expr::product(x.shape.iter().cloned()).mul(x.dtype.size()).eval(&self.capacity).map_err(text)?;
            let name = || format!("{entry}/{}", x.name);
            let at = *self.inputs.entry((index, i)).or_insert_with(|| self.mem.alloc_named(&name(), room as usize));
            self.mem.forget(at, room as usize).map_err(text)?;
            self.mem.write(at, &t.to_bytes()).map_err(|e| format!("{}: {e}", name()))?;
            given.push(at);
        }
        // A symbol that is one more than another.
        for (i, s) in plan.symbols.iter().enumerate() {
            if let (Some(Expr::Add(t)), Some(n)) = (&s.value, known.get(&(i as u32)).copied())
                && let [Expr::Sym(j), Expr::Const(c)] = t.as_slice()
            {
                known.insert(*j, n - c);
            }
        }
        let number = |n: &str| plan.symbol(n);
        let value = |n: &str| number(n).map(|i| known.get(&i).copied().unwrap_or(self.capacity[i as usize]));
        let env = plan.env(&value).map_err(text)?;
        self.mem.forget(self.arena, self.arenas[index].total as usize).map_err(text)?;
        self.steps(index, &env, &given).map_err(|why| format!("{entry}: {why}"))?;
        let mut out = Tensors::new();
        for o in &e.outputs {
            let shape = o.shape.iter().map(|d| d.eval(&env)).collect::<Result<Vec<u64>, _>>().map_err(text)?;
            let at = self.address(index, o.buffer, &given)?;
            let bytes = e.buffers[o.buffer as usize].bytes.eval(&env).map_err(text)?;
            let bytes = self.mem.read(at, bytes as usize).map_err(text)?;
            out.insert(o.name.clone(), Tensor::from_bytes(ir_dtype(o.dtype), shape, bytes).map_err(text)?);
        }
        Ok(out)
    }

    fn address(&self, entry: usize, buffer: u32, given: &[Ptr]) -> Result<Ptr, String> {
        match self.c.plan.entries[entry].buffers[buffer as usize].kind {
            BufferKind::Input(i) => Ok(given[i as usize]),
            BufferKind::Param(p) => Ok(self.params[p as usize]),
            BufferKind::Arena | BufferKind::Output => {
                let at = self.arenas[entry].offsets[buffer as usize];
                at.map(|o| self.arena.offset(o)).ok_or_else(|| format!("buffer {buffer} has no place"))
            }
        }
    }

    fn steps(&mut self, entry: usize, env: &[u64], given: &[Ptr]) -> Result<(), String> {
        let e = &self.c.plan.entries[entry];
        let mut i = 0;
        while i < e.steps.len() {
            if let Some(l) = e.loops.iter().find(|l| l.first == i as u64) {
                self.windows(entry, l, env, given)?;
                i = l.last as usize;
            } else {
                let grid = self.capacity.clone();
                self.step(entry, i, (&grid, env), given, &BTreeMap::new())?;
                i += 1;
            }
        }
        Ok(())
    }

    fn windows(&mut self, entry: usize, l: &Loop, env: &[u64], given: &[Ptr]) -> Result<(), String> {
        let (all, symbol) = (env[l.symbol as usize], l.symbol as usize);
        let mut start = 0;
        while start < all {
            let mut window = env.to_vec();
            window[symbol] = l.chunk.min(all - start);
            let mut grid = self.capacity.clone();
            grid[symbol] = l.chunk.min(grid[symbol]);
            let mut seen = BTreeMap::new();
            for w in &l.windows {
                seen.insert(w.buffer, start * w.row_bytes.eval(env).map_err(text)?);
            }
            for i in l.first as usize..l.last as usize {
                self.step(entry, i, (&grid, &window), given, &seen)?;
            }
            start += l.chunk;
        }
        Ok(())
    }

    /// One step. `seen`: how far into a buffer the window begins.
    fn step(
        &mut self,
        entry: usize,
        step: usize,
        (grid, env): (&[u64], &[u64]),
        given: &[Ptr],
        seen: &BTreeMap<u32, u64>,
    ) -> Result<(), String> {
        let plan = &self.c.plan;
        let s = &plan.entries[entry].steps[step];
        let k = &plan.kernels[s.kernel as usize];
        let mut buffers = vec![];
        for b in &s.buffers {
            let at = self.address(entry, *b, given)?;
            buffers.push(at.offset(seen.get(b).copied().unwrap_or(0)));
        }
        let (reads, writes) = s.buffers.split_at(k.operands.len());
        let mut fresh = vec![];
        for ((b, at), size) in writes.iter().zip(&buffers[k.operands.len()..]).zip(&k.results) {
            let bytes = size.eval(env).map_err(text)? as usize;
            if !reads.contains(b) {
                self.mem.forget(*at, bytes).map_err(text)?;
            }
            fresh.push((*at, bytes));
        }
        let done = self.c.launch(&mut self.mem, s.kernel as usize, &buffers, &self.place, (grid, env), self.how);
        let done = done.map_err(|e| format!("step {step}: {e}"))?;
        self.counts[s.kernel as usize].add(&done);
        for (at, bytes) in fresh {
            self.mem.read(at, bytes).map_err(|e| format!("step {step}: {}: a result has holes: {e}", k.symbol))?;
        }
        Ok(())
    }

    /// The value of a parameter now.
    ///
    /// # Errors
    /// An unknown name, and bytes that nothing wrote.
    pub fn value(&self, name: &str) -> Result<Tensor, String> {
        let v = self.read(name).map_err(text)?;
        Tensor::from_bytes(ir_dtype(v.dtype), v.shape.clone(), &v.bytes).map_err(text)
    }

    fn param(&self, name: &str) -> Result<usize, RuntimeError> {
        let found = self.c.plan.params.iter().position(|p| p.name == name);
        found.ok_or_else(|| RuntimeError::Values(format!("the plan has no parameter `{name}`")))
    }
}

impl Machine for Simulated<'_> {
    fn run(&mut self, entry: &str, inputs: &[(&str, Values<'_>)], output: &str) -> pleach_runtime::Result<f32> {
        let bad = RuntimeError::Values;
        let e = self.c.plan.entry(entry)?;
        let mut given = Tensors::new();
        for (name, v) in inputs {
            let Some(x) = e.inputs.iter().find(|x| x.name == *name) else { continue };
            let shape = |n: usize| if x.shape.is_empty() { vec![] } else { vec![n as u64] };
            let t = match v {
                Values::F32(v) => Tensor::f32(shape(v.len()), v.to_vec()),
                Values::I32(v) => Tensor::i32(shape(v.len()), v.to_vec()),
            };
            given.insert((*name).to_string(), t);
        }
        let out = Simulated::run(self, entry, &given).map_err(bad)?;
        match out.get(output).and_then(|t| t.as_f32()) {
            Some([x]) => Ok(*x),
            _ => Err(bad(format!("{entry} has no number {output}"))),
        }
    }

    fn changing(&self) -> Vec<String> {
        let kept = |p: &&pleach_plan::Param| match p.role {
            Role::Train => true,
            Role::Stat => p.source == Source::Zeros,
            Role::State => p.name.starts_with("adam."),
            _ => false,
        };
        self.c.plan.params.iter().filter(kept).map(|p| p.name.clone()).collect()
    }

    fn fixed(&self) -> Vec<String> {
        let of_adapter = |p: &&pleach_plan::Param| p.role != Role::Train && matches!(p.source, Source::Adapter { .. });
        self.c.plan.params.iter().filter(of_adapter).map(|p| p.name.clone()).collect()
    }

    fn read(&self, name: &str) -> pleach_runtime::Result<ParamValues<'_>> {
        let i = self.param(name)?;
        let p = &self.c.plan.params[i];
        let bytes = self.mem.read(self.params[i], p.bytes.eval(&self.capacity)? as usize);
        let bytes = bytes.map_err(|e| RuntimeError::Values(format!("`{name}`: {e}")))?;
        let shape = p.shape.iter().map(|d| d.eval(&self.capacity)).collect::<Result<_, _>>()?;
        Ok(ParamValues { dtype: p.dtype, shape, bytes: bytes.into() })
    }

    fn write(&mut self, name: &str, dtype: pleach_plan::DType, bytes: &[u8]) -> pleach_runtime::Result<()> {
        let i = self.param(name)?;
        let p = &self.c.plan.params[i];
        if p.dtype != dtype || p.bytes.eval(&self.capacity)? != bytes.len() as u64 {
            return Err(RuntimeError::Values(format!("`{name}` takes another type or size")));
        }
        self.mem.write(self.params[i], bytes).map_err(|e| RuntimeError::Values(text(e)))?;
        // What is derived from it is made again.
        self.prepare().map_err(RuntimeError::Values)
    }
}
