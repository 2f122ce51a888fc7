//! How many registers the threads of a row need: what passes over it keep for each other, and what a step has on its way.
//!
//! Passes over a row that is unrolled remember every value that they computed. One that a later pass takes up again has a
//! register for every element of a thread until then; what a pass reads for the first time is on its way for one step.

use pleach_ir::{Kernel, Op, ValueId};
use std::collections::{BTreeMap, BTreeSet};

/// Registers of a multiprocessor, and of a thread at most.
const REGISTERS: i64 = 65_536;
const MOST: i64 = 255;
/// Registers that positions, conditions and the computation of an element take, roughly, and a few values that are the same for a
/// whole row.
const OTHERS: i64 = 24;
/// How many those are.
const FEW: i64 = 4;

/// What a row takes, in registers.
pub(super) struct Pressure {
    /// Values of an element that one pass computes and a later one takes up.
    kept: i64,
    /// Values of an element that a pass reads for the first time, and that it has at once where it reads all of them again.
    fresh: i64,
    all: i64,
    /// Buffers that lie along the row: an address each.
    buffers: i64,
    /// Operands that are read once for a whole row: a register each.
    uniform: i64,
}

impl Pressure {
    /// Of a kernel whose rows are passed over for these reductions, pass by pass, and then for its results. `axis` of both lies along
    /// the row.
    pub(super) fn of<'a>(k: &Kernel, passes: impl Iterator<Item = &'a Vec<ValueId>>, axis: usize) -> Pressure {
        let body = &k.body;
        let passes: Vec<&[ValueId]> = passes.map(Vec::as_slice).collect();
        let done: BTreeSet<ValueId> = passes.iter().flat_map(|list| list.iter().copied()).collect();
        let mut ways: Vec<Vec<ValueId>> =
            passes.iter().map(|list| list.iter().map(|r| body.node(*r).inputs[0]).collect()).collect();
        ways.push(body.roots.iter().map(|r| r.value).collect());
        let reads = |values: &BTreeMap<ValueId, usize>| values.iter().filter(|(v, a)| leaf(k, **v, **a)).count() as i64;
        let mut known: BTreeSet<ValueId> = BTreeSet::new();
        let mut kept: BTreeSet<ValueId> = BTreeSet::new();
        let (mut fresh, mut all, mut buffers) = (0, 0, 0);
        for from in &ways {
            let mut touched = reach(k, from, axis, &done, &known);
            let again: Vec<ValueId> = touched.keys().copied().filter(|v| known.contains(v)).collect();
            touched.retain(|v, _| !known.contains(v));
            // A position is cheaper to compute.
            kept.extend(again.into_iter().filter(|v| !matches!(body.node(*v).op, Op::Iota { .. })));
            buffers += reads(&touched);
            fresh = fresh.max(reads(&touched));
            all = all.max(reads(&reach(k, from, axis, &done, &BTreeSet::new())));
            known.extend(touched.into_keys());
        }
        let along = |v: ValueId| body.ty(v).rank() > axis;
        let results = body.roots.iter().zip(&k.aliases).filter(|(r, _)| along(r.value));
        buffers += results.clone().filter(|(_, over)| over.is_none()).count() as i64;
        // Results over operands are written after all of them are computed.
        all = all.max(results.filter(|(_, over)| over.is_some()).count() as i64);
        let uniform = body.inputs().iter().filter(|(v, _)| !known.contains(v)).count() as i64;
        Pressure { kept: kept.len() as i64, fresh, all, buffers, uniform }
    }

    /// Registers for elements, where a block has so many threads.
    fn left(&self, threads: i64) -> i64 {
        (REGISTERS / threads).min(MOST) - OTHERS - 2 * self.buffers - (self.uniform - FEW).max(0)
    }

    /// Elements of a row that a thread can keep, of which it takes so many at once.
    pub(super) fn elements(&self, threads: i64, together: i64) -> i64 {
        (self.left(threads) - self.fresh * together).max(0) / self.kept.max(1)
    }

    /// Whether a thread can take so many elements at once where it keeps none.
    pub(super) fn fits(&self, threads: i64, together: i64) -> bool {
        self.all * together <= self.left(threads)
    }
}

/// The values that differ along the row which `from` needs, with the axis that lies along it: up to reductions that are
/// `done`, and to values that are `known`, those included.
fn reach(
    k: &Kernel,
    from: &[ValueId],
    axis: usize,
    done: &BTreeSet<ValueId>,
    known: &BTreeSet<ValueId>,
) -> BTreeMap<ValueId, usize> {
    let mut out = BTreeMap::new();
    let starts = from.iter().filter(|v| k.body.ty(**v).rank() > axis);
    let mut stack: Vec<(ValueId, usize)> = starts.map(|v| (*v, axis)).collect();
    while let Some((v, axis)) = stack.pop() {
        if done.contains(&v) || out.insert(v, axis).is_some() || known.contains(&v) {
            continue;
        }
        stack.extend(inputs(k, v, axis));
    }
    // What is the same for the whole row is kept once.
    let mut differs: BTreeMap<ValueId, bool> = BTreeMap::new();
    for (v, axis) in &out {
        let own = known.contains(v) || leaf(k, *v, *axis) || matches!(k.body.node(*v).op, Op::Iota { .. });
        let below = inputs(k, *v, *axis).iter().any(|(x, _)| differs.get(x).copied().unwrap_or(false));
        differs.insert(*v, own || below);
    }
    out.retain(|v, _| differs[v]);
    out
}

/// Whether an element of a value is read from memory, or by itself from more than one element.
fn leaf(k: &Kernel, v: ValueId, axis: usize) -> bool {
    let n = k.body.node(v);
    let plain = matches!(n.op, Op::Broadcast { .. } | Op::Transpose(_) | Op::Slice { .. } | Op::Const { .. });
    !plain && !n.op.is_elementwise() && !matches!(n.op, Op::Iota { .. }) && n.ty.shape[axis].known() != Some(1)
}

/// The inputs of which a value takes another element for every element along an axis of its own, with their axis.
fn inputs(k: &Kernel, v: ValueId, axis: usize) -> Vec<(ValueId, usize)> {
    let n = k.body.node(v);
    let along = |x: &ValueId, axis: Option<usize>| Some((*x, axis?)).filter(|_| k.body.ty(*x).rank() > 0);
    match &n.op {
        Op::Broadcast { axes, .. } => along(&n.inputs[0], axes.iter().position(|a| usize::from(*a) == axis)),
        Op::Transpose(perm) => along(&n.inputs[0], Some(usize::from(perm[axis]))),
        Op::Slice { .. } => along(&n.inputs[0], Some(axis)),
        op if op.is_elementwise() => return n.inputs.iter().filter_map(|x| along(x, Some(axis))).collect(),
        _ => None,
    }
    .into_iter()
    .collect()
}
