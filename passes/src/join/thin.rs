//! Thin products of one matrix become one kernel, and so do picks of few of its columns.
//!
//! The low-rank branches of layers that share an input each read all of it, to multiply it by a matrix of a few columns: reading is all the
//! time that takes. Launches of one contraction kernel with few columns that read the same left operand become one, which reads it once; so do
//! launches with few rows that read the same right operand along a counted sum, such as the gradients of these matrices.
//! Layers of which columns are trained keep these columns of their input alone: what a launch picks is so little that the launch is what
//! takes the time.
//! The former are moved to the first of them, so what each waits for must come before that one. The latter are moved to the last, as what they
//! multiply is not there before, so nothing up to that one may wait for them. Loops stay as they are.

use super::{Made, as_one, drop_unused};
use crate::order::dependences;
use pleach_ir::{BufferId, Class, Entry, IrError, Kernel, KernelId, Op, Schedule, Step, ValueId};
use std::collections::{BTreeMap, BTreeSet};

/// Products of one kernel at most, and columns or rows of all of them.
const MOST: usize = 4;
const COLUMNS: u64 = 64;

/// Joins such launches of every entry. Returns by how many there are fewer.
///
/// # Errors
/// [`IrError`] when a body cannot be rebuilt; that would be a fault of the schedule.
pub(super) fn run(s: &mut Schedule) -> Result<usize, IrError> {
    let mut made = Made::new();
    let thin: Vec<Option<Thin>> = s.kernels.iter().map(Thin::of).collect();
    let mut saved = 0;
    for i in 0..s.entries.len() {
        let e = &s.entries[i];
        let before = dependences(e);
        let mut open: BTreeMap<(KernelId, BufferId), Vec<usize>> = BTreeMap::new();
        let mut blocks: Vec<Vec<usize>> = vec![];
        for (n, step) in e.steps.iter().enumerate() {
            let Some(t) = thin.get(step.kernel.0 as usize).and_then(Option::as_ref) else { continue };
            if e.loops.iter().any(|l| (l.first..l.last).contains(&n)) {
                continue;
            }
            let list = open.entry((step.kernel, step.reads[t.shared])).or_default();
            let fits = list.len() < MOST && t.thin * (list.len() as u64 + 1) <= COLUMNS;
            let free = |first: usize| match t.last {
                false => before[n].iter().all(|b| *b < first),
                true => (first..=n).all(|j| list.iter().all(|x| !before[j].contains(x))),
            };
            if !(fits && list.first().is_some_and(|first| free(*first))) {
                blocks.push(std::mem::take(list));
            }
            list.push(n);
        }
        blocks.extend(open.into_values());
        blocks.retain(|b| b.len() > 1);
        let mut gone: BTreeSet<usize> = BTreeSet::new();
        for b in blocks {
            let parts: Vec<Step> = b.iter().map(|n| s.entries[i].steps[*n].clone()).collect();
            let Some(t) = thin[parts[0].kernel.0 as usize].as_ref() else { continue };
            // Operands of one launch after the other; that which is shared is the first one's.
            let n = parts[0].reads.len();
            let same: Vec<Option<usize>> =
                (0..n * parts.len()).map(|i| Some(t.shared).filter(|s| i >= n && i % n == *s)).collect();
            let at = if t.last { b[b.len() - 1] } else { b[0] };
            s.entries[i].steps[at] = as_one(s, &mut made, &parts, &same)?;
            gone.extend(b.iter().filter(|n| **n != at));
        }
        let e = &mut s.entries[i];
        let earlier = |n: usize| n - gone.range(..n).count();
        e.loops.iter_mut().for_each(|l| (l.first, l.last) = (earlier(l.first), earlier(l.last)));
        let mut n = 0;
        e.steps.retain(|_| {
            n += 1;
            !gone.contains(&(n - 1))
        });
        saved += gone.len();
    }
    if saved > 0 {
        drop_unused(s);
    }
    Ok(saved)
}

/// A kernel that is one thin product and what is elementwise around it, or picks few columns.
struct Thin {
    /// The operand that is the product's left or right one, or that columns are picked of.
    shared: usize,
    /// Columns, or rows where the right operand is shared.
    thin: u64,
    /// Such launches are moved to the last of them.
    last: bool,
}

impl Thin {
    fn of(k: &Kernel) -> Option<Thin> {
        let body = &k.body;
        let live = body.live();
        let reads = |op: &Op| match k.class {
            Class::Contraction => matches!(op, Op::MatMul { .. }),
            Class::Row => !op.is_leaf(),
            Class::Attention | Class::Scatter => false,
        };
        let mut found = body.nodes.iter().zip(&live).filter(|(n, l)| **l && reads(&n.op)).map(|(n, _)| n);
        let (Some(p), None) = (found.next(), found.next()) else { return None };
        if !matches!(p.op, Op::MatMul { .. } | Op::Gather { axis: 1 }) || p.ty.rank() != 2 {
            return None;
        }
        let operand = |i: usize| body.inputs().iter().position(|(v, _)| *v == p.inputs[i]);
        let [rows, columns] = [0, 1].map(|i| p.ty.shape[i].known());
        let few = |n: u64| 2 * n <= COLUMNS;
        match (rows, columns) {
            // Rows that are counted are many: the left operand is what takes the time.
            (None, Some(n)) if few(n) && k.aliases.iter().all(Option::is_none) => {
                Some(Thin { shared: operand(0)?, thin: n, last: false })
            }
            // Sums that are counted are long: the right operand is. Results may lie over what they are added to.
            (Some(m), Some(n))
                if few(m) && n > COLUMNS && matches!(p.op, Op::MatMul { .. }) && counted(body, p.inputs[1]) =>
            {
                Some(Thin { shared: operand(1)?, thin: m, last: true })
            }
            _ => None,
        }
    }
}

/// Whether an extent of a value is a count.
fn counted(body: &Entry, v: ValueId) -> bool {
    !body.ty(v).symbols().is_empty()
}
