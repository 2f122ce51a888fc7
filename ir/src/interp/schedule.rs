//! Runs kernels and schedules through the kernels' bodies, with the buffers' rules: what a kernel overwrites in place is
//! gone.
//!
//! Layouts change where elements lie, not which: a buffer holds the tensor itself here.

use super::tensor::Tensor;
use super::{RunResult, Symbols, bind, bind_params, close, evaluate, fail, shape_of};
use crate::error::IrError;
use crate::graph::{Param, ParamId};
use crate::op::Op;
use crate::schedule::{BufferId, BufferKind, Kernel, Loop, Schedule, ScheduledEntry, Seen};
use std::borrow::Cow;
use std::collections::BTreeMap;

/// Runs a kernel on its operands, in the order of its inputs; gives its results in order. Symbols take their values from
/// the operands' shapes.
///
/// # Errors
/// [`IrError::Interpret`] as for an entry.
pub fn run_kernel(kernel: &Kernel, operands: &[Tensor]) -> Result<Vec<Tensor>, IrError> {
    run_kernel_with(kernel, operands, &Symbols::new())
}

/// As [`run_kernel`], with the values of symbols that no operand has in its shape.
///
/// # Errors
/// As [`run_kernel`].
pub fn run_kernel_with(kernel: &Kernel, operands: &[Tensor], symbols: &Symbols) -> Result<Vec<Tensor>, IrError> {
    let views: Vec<&Tensor> = operands.iter().collect();
    run_body(kernel, &views, symbols)
}

fn run_body(kernel: &Kernel, operands: &[&Tensor], symbols: &Symbols) -> Result<Vec<Tensor>, IrError> {
    let at = |why: String| fail(format!("kernel {}: {why}", kernel.name));
    let inputs = kernel.body.inputs();
    if inputs.len() != operands.len() {
        return Err(at(format!("takes {} operands, got {}", inputs.len(), operands.len())));
    }
    let mut env = symbols.clone();
    let mut by_name = BTreeMap::new();
    for ((v, name), t) in inputs.iter().zip(operands) {
        bind(&mut env, t, kernel.body.ty(*v)).map_err(|why| at(format!("operand {name}: {why}")))?;
        by_name.insert(*name, *t);
    }
    close(&mut env)?;
    let leaf = |op: &Op| match op {
        Op::Input { name, .. } => by_name.get(name.as_str()).copied().ok_or_else(|| format!("no operand {name}")),
        _ => Err("a kernel reads operands only".to_string()),
    };
    evaluate(&kernel.body, &env, &leaf).map_err(|e| match e {
        IrError::Interpret(why) => at(why),
        other => other,
    })
}

/// Runs an entry of a schedule, step by step. `values` gives the parameters' values when the entry starts.
///
/// # Errors
/// [`IrError::Interpret`] as for an entry; also when a step reads a buffer that was never written or was overwritten in
/// place by another one.
pub fn run_schedule<'a>(
    schedule: &Schedule,
    entry: &str,
    values: &dyn Fn(ParamId) -> Option<&'a Tensor>,
    inputs: &'a BTreeMap<String, Tensor>,
) -> Result<RunResult, IrError> {
    run_schedule_with(schedule, entry, values, inputs, &Symbols::new())
}

/// As [`run_schedule`], with the values of symbols that no given tensor has in its shape.
///
/// # Errors
/// As [`run_schedule`].
pub fn run_schedule_with<'a>(
    schedule: &Schedule,
    entry: &str,
    values: &dyn Fn(ParamId) -> Option<&'a Tensor>,
    inputs: &'a BTreeMap<String, Tensor>,
    symbols: &Symbols,
) -> Result<RunResult, IrError> {
    let find = schedule.entries.iter().find(|e| e.name == entry);
    let e = find.ok_or_else(|| fail(format!("the schedule has no entry \"{entry}\"")))?;
    let params: Vec<Param> = schedule.params.iter().map(|(p, _)| p.clone()).collect();
    let mut env = symbols.clone();
    bind_params(&mut env, &params, values)?;
    for b in &e.buffers {
        if let BufferKind::Input(name) = &b.kind
            && let Some(t) = inputs.get(name)
        {
            bind(&mut env, t, &b.ty).map_err(|why| fail(format!("input \"{name}\": {why}")))?;
        }
    }
    close(&mut env)?;
    let mut memory = Memory::open(e, values, inputs);
    let mut i = 0;
    while i < e.steps.len() {
        match e.loops.iter().find(|l| l.first == i && l.last > i) {
            Some(l) => {
                run_loop(schedule, e, l, &env, &mut memory)?;
                i = l.last;
            }
            None => {
                run_step(schedule, e, i, &env, &mut memory, &BTreeMap::new(), 0)?;
                i += 1;
            }
        }
    }
    let mut result = RunResult::default();
    for (name, b, ty) in &e.outputs {
        let at = |why: String| fail(format!("{entry}: output \"{name}\": {why}"));
        let shape = shape_of(&ty.shape, &env).map_err(at)?;
        result.outputs.insert(name.clone(), memory.read(b.0 as usize, shape).map_err(at)?.into_owned());
    }
    result.assigns = memory.assigned(e, &env)?;
    Ok(result)
}

/// Runs the steps of a loop, window by window.
fn run_loop(
    schedule: &Schedule,
    e: &ScheduledEntry,
    l: &Loop,
    env: &Symbols,
    memory: &mut Memory<'_>,
) -> Result<(), IrError> {
    let at = |why: String| fail(format!("{}: loop at step {}: {why}", e.name, l.first));
    let n = env.get(&l.symbol).copied().ok_or_else(|| at(format!("symbol {} has no value", l.symbol)))?;
    if l.last > e.steps.len() || l.chunk == 0 {
        return Err(at("is no loop".into()));
    }
    let seen = e.seen(l.first, l.last, l.symbol);
    let mut whole = BTreeMap::new();
    for b in seen.iter().filter(|(_, s)| **s == Seen::Window).map(|(b, _)| *b) {
        let ty = &e.buffers.get(b.0 as usize).ok_or_else(|| at("a buffer does not exist".into()))?.ty;
        whole.insert(b, Tensor::zeros(ty.dtype, shape_of(&ty.shape, env).map_err(at)?));
    }
    for (b, zeros) in &whole {
        memory.prepare(b.0 as usize, zeros).map_err(at)?;
    }
    let mut start = 0;
    while start < n {
        let mut env = env.clone();
        env.insert(l.symbol, l.chunk.min(n - start));
        for b in seen.iter().filter(|(_, s)| **s == Seen::Inside).map(|(b, _)| b.0 as usize) {
            memory.forget(b);
        }
        for i in l.first..l.last {
            run_step(schedule, e, i, &env, memory, &whole, start)?;
        }
        start += l.chunk;
    }
    Ok(())
}

/// Runs one step. Buffers in `moved` are seen from row `start` on, for as many rows as the kernel's type has.
fn run_step(
    schedule: &Schedule,
    e: &ScheduledEntry,
    i: usize,
    env: &Symbols,
    memory: &mut Memory<'_>,
    moved: &BTreeMap<BufferId, Tensor>,
    start: u64,
) -> Result<(), IrError> {
    let step = &e.steps[i];
    let at = |why: String| fail(format!("{}: step {i}: {why}", e.name));
    let kernel = schedule.kernels.get(step.kernel.0 as usize).ok_or_else(|| at("no such kernel".into()))?;
    let types = kernel.operand_types();
    if types.len() != step.reads.len() || kernel.body.roots.len() != step.writes.len() {
        return Err(at(format!("kernel {} takes other numbers of operands or results", kernel.name)));
    }
    let mut views = vec![];
    for (b, ty) in step.reads.iter().zip(&types) {
        let shape = shape_of(&ty.shape, env).map_err(at)?;
        views.push(if moved.contains_key(b) {
            Cow::Owned(memory.read_rows(b.0 as usize, shape, start).map_err(at)?)
        } else {
            memory.read(b.0 as usize, shape).map_err(at)?
        });
    }
    let operands: Vec<&Tensor> = views.iter().map(|t| &**t).collect();
    let results = run_body(kernel, &operands, env).map_err(|e| at(e.to_string()))?;
    drop(views);
    for (j, t) in results.into_iter().enumerate() {
        let to = step.writes[j];
        let over = kernel.aliases.get(j).copied().flatten().and_then(|a| step.reads.get(a as usize));
        if let Some(b) = over.filter(|b| **b != to && !moved.contains_key(b)) {
            memory.lose(b.0 as usize, to.0 as usize);
        }
        if moved.contains_key(&to) {
            memory.write_rows(to.0 as usize, &t, start).map_err(at)?;
        } else {
            memory.write(to.0 as usize, t).map_err(at)?;
        }
    }
    Ok(())
}

/// One cell per buffer; buffers of one parameter share the first one's.
struct Memory<'a> {
    cells: Vec<Result<Cow<'a, Tensor>, String>>,
    home: Vec<usize>,
    written: Vec<bool>,
}

/// Elements of the rows `start..` of `t` that a tensor of shape `part` takes.
fn rows(t: &Tensor, part: &[u64], start: u64) -> Result<std::ops::Range<usize>, String> {
    let all = t.shape.iter().skip(1).product::<u64>();
    let n = part.iter().product::<u64>();
    let first = all.saturating_mul(start);
    if first + n > t.data.len() as u64 || all > 0 && n != all.saturating_mul(part.first().copied().unwrap_or(1)) {
        return Err(format!("{} has no rows {start}.. of shape {part:?}", t.describe()));
    }
    Ok(first as usize..(first + n) as usize)
}

impl<'a> Memory<'a> {
    fn open(
        e: &ScheduledEntry,
        values: &dyn Fn(ParamId) -> Option<&'a Tensor>,
        inputs: &'a BTreeMap<String, Tensor>,
    ) -> Memory<'a> {
        let mut first: BTreeMap<ParamId, usize> = BTreeMap::new();
        let (mut cells, mut home) = (vec![], vec![]);
        for (i, b) in e.buffers.iter().enumerate() {
            let (cell, at) = match &b.kind {
                BufferKind::Input(name) => (inputs.get(name).ok_or(format!("input \"{name}\" is missing")), i),
                BufferKind::Param(p) => {
                    (values(*p).ok_or(format!("parameter {p} has no value")), *first.entry(*p).or_insert(i))
                }
                _ => (Err(format!("buffer {i} is read before it is written")), i),
            };
            cells.push(cell.map(Cow::Borrowed));
            home.push(at);
        }
        let written = vec![false; cells.len()];
        Memory { cells, home, written }
    }

    fn cell(&self, b: usize) -> Result<usize, String> {
        self.home.get(b).copied().ok_or_else(|| format!("there is no buffer {b}"))
    }

    /// The buffer seen under a shape of as many elements.
    fn read(&self, b: usize, shape: Vec<u64>) -> Result<Cow<'_, Tensor>, String> {
        let t = self.cells[self.cell(b)?].as_ref().map_err(Clone::clone)?;
        if t.shape == shape {
            return Ok(Cow::Borrowed(t));
        }
        if t.shape.iter().product::<u64>() != shape.iter().product::<u64>() {
            return Err(format!("buffer {b} is {}, read as {shape:?}", t.describe()));
        }
        Ok(Cow::Owned(Tensor { shape, data: t.data.clone() }))
    }

    fn write(&mut self, b: usize, t: Tensor) -> Result<(), String> {
        let c = self.cell(b)?;
        self.cells[c] = Ok(Cow::Owned(t));
        self.written[c] = true;
        Ok(())
    }

    /// Before a loop: a buffer that nothing has written yet gets memory of its size.
    fn prepare(&mut self, b: usize, zeros: &Tensor) -> Result<(), String> {
        let c = self.cell(b)?;
        if self.cells[c].is_err() {
            self.cells[c] = Ok(Cow::Owned(zeros.clone()));
        }
        Ok(())
    }

    /// Rows `start..` of the buffer, as many as `shape` says.
    fn read_rows(&self, b: usize, shape: Vec<u64>, start: u64) -> Result<Tensor, String> {
        let t = self.cells[self.cell(b)?].as_ref().map_err(Clone::clone)?;
        let range = rows(t, &shape, start)?;
        let size = t.dtype().size() as usize;
        let bytes = &t.to_bytes()[range.start * size..range.end * size];
        Tensor::from_bytes(t.dtype(), shape, bytes).map_err(|e| e.to_string())
    }

    /// Overwrites rows `start..` of the buffer.
    fn write_rows(&mut self, b: usize, part: &Tensor, start: u64) -> Result<(), String> {
        let c = self.cell(b)?;
        let t = self.cells[c].as_ref().map_err(Clone::clone)?;
        let range = rows(t, &part.shape, start)?;
        let size = t.dtype().size() as usize;
        let mut bytes = t.to_bytes();
        bytes[range.start * size..range.end * size].copy_from_slice(&part.to_bytes());
        let t = Tensor::from_bytes(part.dtype(), t.shape.clone(), &bytes).map_err(|e| e.to_string())?;
        self.cells[c] = Ok(Cow::Owned(t));
        self.written[c] = true;
        Ok(())
    }

    fn forget(&mut self, b: usize) {
        if let Some(c) = self.cells.get_mut(b) {
            *c = Err(format!("buffer {b} is read in a window before it is written"));
        }
    }

    fn lose(&mut self, b: usize, by: usize) {
        if let Ok(c) = self.cell(b) {
            self.cells[c] = Err(format!("buffer {b} is read after buffer {by} took its place"));
        }
    }

    fn assigned(self, e: &ScheduledEntry, env: &Symbols) -> Result<Vec<(ParamId, Tensor)>, IrError> {
        let mut out = vec![];
        for (i, b) in e.buffers.iter().enumerate() {
            if let BufferKind::Param(p) = b.kind
                && self.home[i] == i
                && self.written[i]
            {
                let shape = shape_of(&b.ty.shape, env).map_err(fail)?;
                out.push((p, self.read(i, shape).map_err(fail)?.into_owned()));
            }
        }
        Ok(out)
    }
}
