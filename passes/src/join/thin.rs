//! Thin products of one matrix become one kernel.
//!
//! The low-rank branches of layers that share an input each read all of it, to multiply it by a matrix of a few columns: reading is all the
//! time that takes. Launches of one contraction kernel with few columns that read the same left operand become one, which reads it once.
//! They are moved to the first of them, so what each waits for must come before that one; loops stay as they are.

use super::drop_unused;
use crate::order::dependences;
use pleach_ir::{BufferId, Class, Entry, IrError, Kernel, KernelId, Op, Schedule, Step, ValueId};
use std::collections::{BTreeMap, BTreeSet};

/// Products of one kernel at most, and columns of all of them.
const MOST: usize = 4;
const COLUMNS: u64 = 64;

/// Joins such launches of every entry. Returns by how many there are fewer.
///
/// # Errors
/// [`IrError`] when a body cannot be rebuilt; that would be a fault of the schedule.
pub(super) fn run(s: &mut Schedule) -> Result<usize, IrError> {
    let mut made: BTreeMap<(KernelId, usize), KernelId> = BTreeMap::new();
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
            let fits = list.len() < MOST && t.columns * (list.len() as u64 + 1) <= COLUMNS;
            let free = list.first().is_some_and(|first| before[n].iter().all(|b| b < first));
            if !(fits && free) {
                blocks.push(std::mem::take(list));
            }
            list.push(n);
        }
        blocks.extend(open.into_values());
        blocks.retain(|b| b.len() > 1);
        let mut gone: BTreeSet<usize> = BTreeSet::new();
        for b in blocks {
            let parts: Vec<Step> = b.iter().map(|n| s.entries[i].steps[*n].clone()).collect();
            let first = &parts[0];
            let Some(shared) = thin[first.kernel.0 as usize].as_ref().map(|t| t.shared) else { continue };
            let key = (first.kernel, parts.len());
            let kernel = match made.get(&key) {
                Some(k) => *k,
                None => {
                    let id = KernelId(s.kernels.len() as u32);
                    let mut k = side_by_side(&s.kernels[first.kernel.0 as usize], parts.len(), shared)?;
                    k.name = format!("{}_{}x", k.name, parts.len());
                    s.kernels.push(k);
                    made.insert(key, id);
                    id
                }
            };
            let own = |(c, p): (usize, &Step)| -> Vec<BufferId> {
                let reads = p.reads.iter().enumerate().filter(|(r, _)| c == 0 || *r != shared);
                reads.map(|(_, b)| *b).collect()
            };
            let reads = parts.iter().enumerate().flat_map(own).collect();
            let writes = parts.iter().flat_map(|p| p.writes.clone()).collect();
            let after: BTreeSet<BufferId> = parts.iter().flat_map(|p| p.after.clone()).collect();
            let origin = first.origin.clone();
            s.entries[i].steps[b[0]] = Step { kernel, reads, writes, after: after.into_iter().collect(), origin };
            gone.extend(&b[1..]);
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

/// A kernel that is one thin product and what is elementwise behind it.
struct Thin {
    /// The operand that is the product's left one.
    shared: usize,
    columns: u64,
}

impl Thin {
    fn of(k: &Kernel) -> Option<Thin> {
        let body = &k.body;
        let live = body.live();
        let mut products =
            body.nodes.iter().zip(&live).filter(|(n, l)| **l && matches!(n.op, Op::MatMul { .. })).map(|(n, _)| n);
        let (Some(p), None) = (products.next(), products.next()) else { return None };
        let columns = p.ty.shape.last()?.known()?;
        let rows = p.ty.shape.first()?;
        let shared = body.inputs().iter().position(|(v, _)| *v == p.inputs[0])?;
        let alone = k.class == Class::Contraction && k.aliases.iter().all(Option::is_none);
        // Rows that are counted are many: the left operand is what takes the time.
        (alone && p.ty.rank() == 2 && rows.known().is_none() && 2 * columns <= COLUMNS)
            .then_some(Thin { shared, columns })
    }
}

/// A kernel that does what `n` launches of `k` do, which have one operand in common: operands and results one launch after the other, that
/// operand once.
fn side_by_side(k: &Kernel, n: usize, shared: usize) -> Result<Kernel, IrError> {
    let inputs: Vec<ValueId> = k.body.inputs().iter().map(|x| x.0).collect();
    let mut body = Entry::new("kernel");
    let (mut roots, mut operands, mut common) = (vec![], vec![], None);
    for _ in 0..n {
        let mut at: Vec<ValueId> = vec![];
        for (v, node) in k.body.values().zip(&k.body.nodes) {
            let number = inputs.iter().position(|i| *i == v);
            let new = match (&node.op, number, common) {
                (_, Some(i), Some(x)) if i == shared => x,
                (Op::Input { dtype, shape, .. }, Some(i), _) => {
                    let name = format!("a{}", operands.len());
                    operands.push(k.operands[i]);
                    body.push(&[], Op::Input { name, dtype: *dtype, shape: shape.clone() }, &[])?
                }
                (op, ..) => {
                    let inputs: Vec<ValueId> = node.inputs.iter().map(|i| at[i.index()]).collect();
                    body.push(&[], op.clone(), &inputs)?
                }
            };
            at.push(new);
        }
        common = inputs.get(shared).map(|i| at[i.index()]);
        roots.extend(k.body.roots.iter().map(|r| at[r.value.index()]));
    }
    for (i, r) in roots.into_iter().enumerate() {
        body.output(format!("r{i}"), r);
    }
    let results = k.results.repeat(n);
    let aliases = vec![None; results.len()];
    Ok(Kernel { name: k.name.clone(), class: k.class, body, operands, results, aliases })
}
