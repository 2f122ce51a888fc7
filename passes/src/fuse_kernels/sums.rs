//! What is put into another form before an entry is cut.
//!
//! A sum with a scatter into zeros is a scatter into the rest of the sum: `a + scatter_add(0, i, u)` becomes
//! `scatter_add(a, i, u)`, which touches only what the indices select. A constant that several parameters are set to is
//! built for each of them, so that each can be written by the kernel that uses the parameter last. A sum of very many terms
//! (the squares of all gradients, for their norm) becomes sums of sums: kernels have a bounded number of buffers.

use pleach_ir::{Entry, IrError, Op, Param, Root, RootKind, ScatterMode, ValueId};
use std::collections::BTreeSet;

/// The entry with such sums replaced; `None` where there is none.
///
/// # Errors
/// [`IrError`] when a node cannot be rebuilt; that would be a fault of the input graph.
pub(super) fn into_scatters(params: &[Param], e: &Entry) -> Result<Option<Entry>, IrError> {
    let users = e.users();
    let live = e.live();
    let zero = |mut v: ValueId| {
        while matches!(e.node(v).op, Op::Broadcast { .. } | Op::Reshape(_)) {
            v = e.node(v).inputs[0];
        }
        matches!(&e.node(v).op, Op::Const { bits, .. } if bits.iter().all(|b| *b == 0))
    };
    let fits = |v: ValueId| {
        let n = e.node(v);
        matches!(n.op, Op::Scatter { mode: ScatterMode::Add, .. })
            && users[v.index()].iter().filter(|u| live[u.index()]).count() == 1
            && e.roots.iter().all(|r| r.value != v)
            && zero(n.inputs[0])
    };
    // Of several such terms one is taken.
    let term = |v: ValueId| {
        let n = e.node(v);
        let one = (n.op == Op::Add && live[v.index()]).then(|| n.inputs.iter().position(|x| fits(*x)))??;
        n.inputs.iter().enumerate().any(|(i, x)| i != one && e.ty(*x).shape == n.ty.shape).then_some(one)
    };
    if !e.values().any(|v| term(v).is_some()) {
        return Ok(None);
    }
    let sum = |out: &mut Entry, v: ValueId, inputs: Vec<ValueId>, map: &[ValueId]| {
        let n = e.node(v);
        let Some(i) = term(v) else { return out.push_from(params, n.op.clone(), &inputs, n.origin.clone()) };
        let s = e.node(n.inputs[i]);
        let rest: Vec<ValueId> = inputs.iter().enumerate().filter(|(j, _)| *j != i).map(|(_, x)| *x).collect();
        let onto = match rest[..] {
            [x] => x,
            _ => out.push_from(params, Op::Add, &rest, n.origin.clone())?,
        };
        let with = [onto, map[s.inputs[1].index()], map[s.inputs[2].index()]];
        out.push_from(params, s.op.clone(), &with, s.origin.clone())
    };
    rebuilt(e, sum).map(Some)
}

/// The entry node by node, each as `node` makes it in the new one: from its number, its inputs there, and where every earlier
/// value went.
///
/// # Errors
/// Those of `node`.
pub(super) fn rebuilt(
    e: &Entry,
    mut node: impl FnMut(&mut Entry, ValueId, Vec<ValueId>, &[ValueId]) -> Result<ValueId, IrError>,
) -> Result<Entry, IrError> {
    let mut out = Entry::new(e.name.clone());
    let mut map: Vec<ValueId> = vec![];
    for v in e.values() {
        let inputs = e.node(v).inputs.iter().map(|i| map[i.index()]).collect();
        let x = node(&mut out, v, inputs, &map)?;
        map.push(x);
    }
    out.roots = e.roots.iter().map(|r| Root { kind: r.kind.clone(), value: map[r.value.index()] }).collect();
    Ok(out)
}

/// Terms of a sum at most.
const TERMS: usize = 256;

/// The entry with sums of at most [`TERMS`] terms; `None` where there are no longer ones.
///
/// # Errors
/// As [`into_scatters`].
pub(super) fn of_many(params: &[Param], e: &Entry) -> Result<Option<Entry>, IrError> {
    let long = |v: ValueId| e.node(v).op == Op::Add && e.node(v).inputs.len() > TERMS;
    if !e.values().any(long) {
        return Ok(None);
    }
    let split = |out: &mut Entry, v: ValueId, mut inputs: Vec<ValueId>, _: &[ValueId]| {
        let n = e.node(v);
        while n.op == Op::Add && inputs.len() > TERMS {
            let sum = |part: &[ValueId]| match part {
                [x] => Ok(*x),
                _ => out.push_from(params, Op::Add, part, n.origin.clone()),
            };
            inputs = inputs.chunks(TERMS).map(sum).collect::<Result<_, _>>()?;
        }
        out.push_from(params, n.op.clone(), &inputs, n.origin.clone())
    };
    rebuilt(e, split).map(Some)
}

/// Gives every parameter that is set to a constant a value of its own.
///
/// # Errors
/// As [`into_scatters`].
pub(super) fn own_fills(params: &[Param], e: &mut Entry) -> Result<(), IrError> {
    let mut taken: BTreeSet<ValueId> = BTreeSet::new();
    for i in 0..e.roots.len() {
        let v = e.roots[i].value;
        if matches!(e.roots[i].kind, RootKind::Assign(_)) && constant(e, v) && !taken.insert(v) {
            e.roots[i].value = again(params, e, v)?;
        }
    }
    Ok(())
}

fn constant(e: &Entry, v: ValueId) -> bool {
    let n = e.node(v);
    matches!(n.op, Op::Const { .. } | Op::Broadcast { .. } | Op::Reshape(_)) && n.inputs.iter().all(|x| constant(e, *x))
}

/// A second `v`.
fn again(params: &[Param], e: &mut Entry, v: ValueId) -> Result<ValueId, IrError> {
    let n = e.node(v).clone();
    let inputs = n.inputs.iter().map(|x| again(params, e, *x)).collect::<Result<Vec<_>, _>>()?;
    e.push_from(params, n.op, &inputs, n.origin)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pleach_ir::{DType, Dim};

    #[test]
    fn long_sums_become_sums_of_sums() {
        let entry = |terms: usize| {
            let mut e = Entry::new("sum");
            let inputs: Vec<ValueId> = (0..terms)
                .map(|i| {
                    let op = Op::Input { name: format!("x{i}"), dtype: DType::F32, shape: vec![Dim::Known(2)] };
                    e.push(&[], op, &[]).unwrap()
                })
                .collect();
            let sum = e.push(&[], Op::Add, &inputs).unwrap();
            e.output("y", sum);
            e
        };
        assert!(of_many(&[], &entry(TERMS)).unwrap().is_none());
        for terms in [TERMS + 1, 3 * TERMS, TERMS * TERMS + 5] {
            let e = of_many(&[], &entry(terms)).unwrap().unwrap();
            let sums: Vec<&[ValueId]> =
                e.values().map(|v| e.node(v)).filter(|n| n.op == Op::Add).map(|n| &n.inputs[..]).collect();
            assert!(sums.iter().all(|s| s.len() <= TERMS), "{terms}");
            // Every input and every sum but the last is a term once.
            let mut all: Vec<ValueId> = sums.concat();
            all.sort_unstable();
            all.dedup();
            assert_eq!(all.len(), terms + sums.len() - 1);
            assert_eq!(sums.concat().len(), all.len());
        }
    }
}
