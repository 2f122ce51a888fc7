//! Loops over windows of rows: some steps run for a few rows of a symbol at a time, so that what lies between them is
//! small.
//!
//! In a window the symbol stands for the window's rows. A buffer that only the loop's steps use holds one window
//! ([`Seen::Inside`]); a buffer from outside whose axis 0 is the symbol is seen at the window's rows ([`Seen::Window`]);
//! anything else is seen whole ([`Seen::Whole`]). [`on_window`] says which kernels mean the same when they run window by
//! window: row `i` of a result depends on row `i` of what has rows, or the result is a sum over rows, added in place.

use crate::graph::{Entry, ValueId};
use crate::op::{BinaryOp, Op, ReduceOp, ScatterMode, UnaryOp};
use crate::schedule::{BufferId, BufferKind, Kernel, Schedule, ScheduledEntry};
use crate::types::{Dim, Sym, TensorType};
use std::collections::BTreeMap;

/// Steps `first..last` of an entry, run for windows of `chunk` rows of `symbol`, the last window with the rest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Loop {
    /// First step.
    pub first: usize,
    /// One past the last step.
    pub last: usize,
    /// What is cut into windows.
    pub symbol: Sym,
    /// Rows of a window.
    pub chunk: u64,
}

/// How the steps of a loop see a buffer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Seen {
    /// It holds one window and lives inside the loop.
    Inside,
    /// At the rows of the window.
    Window,
    /// Whole.
    Whole,
}

/// How a result of a kernel comes about in windows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    /// Its rows are the window's.
    Rows,
    /// What the window gives is added to this operand.
    Added(usize),
}

impl ScheduledEntry {
    /// How the steps `first..last` see the buffers they use, were they a loop over `symbol`.
    pub fn seen(&self, first: usize, last: usize, symbol: Sym) -> BTreeMap<BufferId, Seen> {
        let mut out = BTreeMap::new();
        let within = self.steps.get(first..last).unwrap_or_default();
        for b in within.iter().flat_map(|s| s.reads.iter().chain(&s.writes)) {
            let rows = self.buffers.get(b.0 as usize).and_then(|x| x.ty.shape.first()) == Some(&Dim::Symbol(symbol));
            let arena = self.buffers.get(b.0 as usize).is_some_and(|x| x.kind == BufferKind::Arena);
            out.insert(*b, if arena { Seen::Inside } else { place(rows) });
        }
        let rows = |b: &BufferId| self.buffers[b.0 as usize].ty.shape.first() == Some(&Dim::Symbol(symbol));
        let beyond = self.steps.iter().enumerate().filter(|(i, _)| *i < first || *i >= last).map(|(_, s)| s);
        let used = beyond.flat_map(|s| s.reads.iter().chain(&s.writes)).chain(self.outputs.iter().map(|o| &o.1));
        for b in used {
            if let Some(seen) = out.get_mut(b) {
                *seen = place(rows(b));
            }
        }
        out
    }
}

fn place(rows: bool) -> Seen {
    if rows { Seen::Window } else { Seen::Whole }
}

/// What a value of a kernel's body is in a window.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Value {
    /// The same in every window.
    Free,
    /// One row for each row of the window.
    Rows,
    /// The window's part of a sum over all rows.
    Part,
    /// An operand plus the window's part.
    Added(usize),
}

fn has(ty: &TensorType, symbol: Sym) -> bool {
    ty.shape.contains(&Dim::Symbol(symbol))
}

fn leads(ty: &TensorType, symbol: Sym) -> bool {
    ty.shape.first() == Some(&Dim::Symbol(symbol)) && !ty.shape[1..].contains(&Dim::Symbol(symbol))
}

/// How the results of a kernel come about when it runs window by window of `symbol`.
///
/// # Errors
/// Why it would mean something else.
pub fn on_window(k: &Kernel, symbol: Sym) -> Result<Vec<Part>, String> {
    let e = &k.body;
    let mut values: Vec<Value> = Vec::with_capacity(e.nodes.len());
    let inputs = e.inputs();
    let readers = e.users();
    for v in e.values() {
        let n = e.node(v);
        let x = value(e, v, symbol, &values, &inputs, &readers)
            .map_err(|why| format!("{}: {v} = {}: {why}", k.name, n.op.name()))?;
        if has(&n.ty, symbol) && (!leads(&n.ty, symbol) || !matches!(x, Value::Rows | Value::Free)) {
            return Err(format!("{}: {v} has {symbol} where no window has it", k.name));
        }
        values.push(if leads(&n.ty, symbol) { Value::Rows } else { x });
    }
    let result = |(i, r): (usize, &crate::graph::Root)| match values[r.value.index()] {
        Value::Rows => Ok(Part::Rows),
        Value::Added(a) if k.aliases.get(i).copied().flatten() == Some(a as u32) => Ok(Part::Added(a)),
        Value::Added(_) | Value::Part => Err(format!("{}: result {i} is a sum over rows that is not in place", k.name)),
        Value::Free => Err(format!("{}: result {i} is the same in every window", k.name)),
    };
    e.roots.iter().enumerate().map(result).collect()
}

fn value(
    e: &Entry,
    v: ValueId,
    symbol: Sym,
    values: &[Value],
    inputs: &[(ValueId, &str)],
    readers: &[Vec<ValueId>],
) -> Result<Value, String> {
    use Value::{Added, Free, Part, Rows};
    let n = e.node(v);
    let of = |i: usize| values[n.inputs[i].index()];
    let all: Vec<Value> = n.inputs.iter().map(|i| values[i.index()]).collect();
    let mixed = || Err("mixes rows".to_string());
    let operand = |v: ValueId| inputs.iter().position(|(x, _)| *x == v);
    // One row of the result from the same row of the operands.
    let rows = all.iter().all(|x| matches!(x, Free | Rows));
    Ok(match &n.op {
        Op::Input { .. } if leads(&n.ty, symbol) => Rows,
        Op::Const { .. } | Op::Input { .. } => Free,
        Op::Iota { axis, .. } if *axis == 0 && has(&n.ty, symbol) => return Err("counts rows".into()),
        Op::Iota { .. } => Free,
        _ if all.iter().all(|x| *x == Free) => Free,
        Op::Add if all.contains(&Part) => {
            let free: Vec<ValueId> =
                n.inputs.iter().copied().zip(&all).filter(|(_, x)| **x == Free).map(|(i, _)| i).collect();
            match (free.as_slice(), all.iter().all(|x| matches!(x, Free | Part))) {
                ([], true) => Part,
                ([x], true) => match operand(*x) {
                    Some(i) if readers[x.index()] == [v] && e.ty(*x).shape == n.ty.shape => Added(i),
                    _ => return Err("adds something once that each window would add".into()),
                },
                _ => return mixed(),
            }
        }
        Op::Binary(BinaryOp::Mul) if all == [Part, Free] || all == [Free, Part] => Part,
        Op::Binary(BinaryOp::Div) if all == [Part, Free] => Part,
        Op::Unary(UnaryOp::Neg) if all == [Part] => Part,
        op if op.is_elementwise() && rows => Rows,
        Op::MatMul { ta, tb } => match (of(0), of(1)) {
            (Rows, Free) if !ta && n.ty.rank() == 2 => Rows,
            (Rows, Rows) if *ta && !tb && n.ty.rank() == 2 => Part,
            (Rows, Rows) if n.ty.rank() > 2 => Rows,
            _ => return mixed(),
        },
        Op::Reduce { op, axis } => match (of(0), axis, op) {
            (Rows, 1.., _) => Rows,
            (Rows, 0, ReduceOp::Sum) | (Part, _, ReduceOp::Sum) => Part,
            _ => return mixed(),
        },
        Op::TopK { .. } if of(0) == Rows && n.ty.rank() > 1 => Rows,
        Op::Reshape(_) if matches!(of(0), Rows | Part | Added(_)) => of(0),
        Op::Transpose(p) if of(0) == Part || of(0) == Rows && p.first() == Some(&0) => of(0),
        Op::Broadcast { axes, .. } if of(0) == Part || of(0) == Rows && axes.first() == Some(&0) => of(0),
        Op::Slice { axis, .. } if of(0) == Part || of(0) == Rows && *axis > 0 => of(0),
        Op::Pad { axis, .. } if of(0) == Part || of(0) == Rows && *axis > 0 => of(0),
        Op::Concat { axis } if rows && *axis > 0 && n.inputs.iter().all(|x| leads(e.ty(*x), symbol)) => Rows,
        Op::Gather { axis } => match (of(0), of(1)) {
            (Free, Rows) if *axis == 0 => Rows,
            (Rows, Free) if *axis > 0 => Rows,
            _ => return mixed(),
        },
        Op::Scatter { axis, mode } => match (of(0), of(1), of(2), mode) {
            (Rows, Free, Rows, _) if *axis > 0 => Rows,
            (Free, Rows, Rows, ScatterMode::Add) if *axis == 0 => match operand(n.inputs[0]) {
                Some(i) if readers[n.inputs[0].index()] == [v] => Added(i),
                _ => return Err("scatters into something that is no operand".into()),
            },
            _ => return mixed(),
        },
        Op::After => of(0),
        _ => return mixed(),
    })
}

/// Checks the loops of an entry.
pub(crate) fn check(s: &Schedule, e: &ScheduledEntry, faults: &mut Vec<String>) {
    let mut end = 0;
    for (i, l) in e.loops.iter().enumerate() {
        let at = format!("{}: loop {i}", e.name);
        if l.first < end || l.first >= l.last || l.last > e.steps.len() || l.chunk == 0 {
            faults.push(format!("{at}: steps {}..{} by {} are no loop of their own", l.first, l.last, l.chunk));
            continue;
        }
        end = l.last;
        let seen = e.seen(l.first, l.last, l.symbol);
        if seen.keys().any(|b| b.0 as usize >= e.buffers.len()) {
            continue;
        }
        for (b, how) in &seen {
            let ty = &e.buffers[b.0 as usize].ty;
            let fits = match how {
                Seen::Window => leads(ty, l.symbol),
                Seen::Inside => leads(ty, l.symbol) || !has(ty, l.symbol),
                Seen::Whole => !has(ty, l.symbol),
            };
            if !fits {
                faults.push(format!("{at}: buffer {} is {ty} and cannot be cut into windows of {}", b.0, l.symbol));
            }
        }
        let mut summed: BTreeMap<BufferId, usize> = BTreeMap::new();
        for (t, step) in e.steps.iter().enumerate().take(l.last).skip(l.first) {
            let Some(k) = s.kernels.get(step.kernel.0 as usize) else { continue };
            let parts = match on_window(k, l.symbol) {
                Ok(p) if p.len() == step.writes.len() => p,
                Ok(_) => continue,
                Err(why) => {
                    faults.push(format!("{at}: step {t}: {why}"));
                    continue;
                }
            };
            for (w, part) in step.writes.iter().zip(&parts) {
                match (part, seen.get(w)) {
                    (Part::Rows, Some(Seen::Whole)) => {
                        faults.push(format!("{at}: step {t}: every window writes all of buffer {}", w.0));
                    }
                    (Part::Added(o), Some(Seen::Whole)) if step.reads.get(*o) == Some(w) => {
                        *summed.entry(*w).or_default() += 2;
                    }
                    (Part::Added(_), _) => {
                        faults.push(format!("{at}: step {t}: buffer {} is no sum from outside the loop", w.0));
                    }
                    _ => {}
                }
            }
        }
        // A sum is not complete before the loop ends, so nothing else in it may use it.
        for (b, n) in summed {
            let uses = e.steps[l.first..l.last].iter().flat_map(|s| s.reads.iter().chain(&s.writes));
            if uses.filter(|x| **x == b).count() != n {
                faults.push(format!("{at}: buffer {} is used while it is summed", b.0));
            }
        }
    }
}
