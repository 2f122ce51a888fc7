//! A sum with a scatter into zeros is a scatter into the rest of the sum: `a + scatter_add(0, i, u)` becomes
//! `scatter_add(a, i, u)`, which touches only what the indices select.

use pleach_ir::{Entry, IrError, Op, Param, Root, ScatterMode, ValueId};

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
    let mut out = Entry::new(e.name.clone());
    let mut map: Vec<ValueId> = vec![];
    for v in e.values() {
        let n = e.node(v);
        let inputs: Vec<ValueId> = n.inputs.iter().map(|i| map[i.index()]).collect();
        let x = match term(v) {
            Some(i) => {
                let s = e.node(n.inputs[i]);
                let rest: Vec<ValueId> = inputs.iter().enumerate().filter(|(j, _)| *j != i).map(|(_, x)| *x).collect();
                let onto = match rest[..] {
                    [x] => x,
                    _ => out.push_from(params, Op::Add, &rest, n.origin.clone())?,
                };
                let with = [onto, map[s.inputs[1].index()], map[s.inputs[2].index()]];
                out.push_from(params, s.op.clone(), &with, s.origin.clone())?
            }
            None => out.push_from(params, n.op.clone(), &inputs, n.origin.clone())?,
        };
        map.push(x);
    }
    out.roots = e.roots.iter().map(|r| Root { kind: r.kind.clone(), value: map[r.value.index()] }).collect();
    Ok(Some(out))
}
