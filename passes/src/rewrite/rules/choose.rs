//! Rules about choosing rows and columns: slices and gathers move towards the operands, never back.

use super::*;

/// Choosing rows or columns of a result is choosing them earlier.
pub(super) fn choose_through(w: &World, out: &mut Found) {
    for (id, n, op) in each(w) {
        let axis = match op {
            Op::Gather { axis } | Op::Slice { axis, .. } => *axis,
            _ => continue,
        };
        // the same choice on axis `ax` of another value
        let pick = |v: Id, ax: u8| {
            let op = match op {
                Op::Slice { start, end, .. } => Op::Slice { axis: ax, start: *start, end: *end },
                _ => Op::Gather { axis: ax },
            };
            let mut ch = vec![class(v)];
            ch.extend(n.ch[1..].iter().map(|&i| class(i)));
            node(op, ch)
        };
        let through = |v: Id| if w.ty(v).rank() == 0 { class(v) } else { pick(v, axis) };
        for y in w.nodes(n.ch[0]) {
            let k = &y.ch;
            let Some(inner) = y.op() else { continue };
            let t = match inner {
                Op::MatMul { ta, tb } if as_product(w, y).is_some() => {
                    if axis == 0 {
                        mm((pick(k[0], u8::from(*ta)), *ta), (class(k[1]), *tb))
                    } else {
                        mm((class(k[0]), *ta), (pick(k[1], u8::from(!*tb)), *tb))
                    }
                }
                Op::Add | Op::Binary(BinaryOp::Mul) => node(inner.clone(), k.iter().map(|&v| through(v)).collect()),
                Op::Broadcast { axes, .. } => {
                    let shape = w.ty(id).shape.clone();
                    let x = match axes.iter().position(|a| *a == axis) {
                        Some(p) => pick(k[0], p as u8),
                        None => class(k[0]),
                    };
                    node(Op::Broadcast { shape, axes: axes.clone() }, vec![x])
                }
                // rounding is element by element
                Op::Cast(_) => node(inner.clone(), vec![pick(k[0], axis)]),
                Op::Pad { axis: a, lo, .. } if *a == axis => {
                    let Op::Slice { start, end, .. } = op else { continue };
                    let Some(n) = w.ty(k[0]).shape.get(axis as usize).and_then(|d| d.known()) else { continue };
                    if start < lo || *end > lo + n {
                        continue; // some of it is zeros
                    }
                    node(Op::Slice { axis, start: start - lo, end: end - lo }, vec![class(k[0])])
                }
                Op::Pad { .. } => node(inner.clone(), vec![pick(k[0], axis)]),
                Op::Slice { axis: a, start: s, .. } if *a == axis => match op {
                    Op::Slice { start, end, .. } => {
                        node(Op::Slice { axis, start: s + start, end: s + end }, vec![class(k[0])])
                    }
                    _ => continue,
                },
                Op::Slice { axis: a, start, end } => {
                    node(Op::Slice { axis: *a, start: *start, end: *end }, vec![pick(k[0], axis)])
                }
                Op::Concat { axis: a } if *a == axis => {
                    let Op::Slice { start, end, .. } = op else { continue };
                    let Some(t) = slice_of_concat(w, k, axis, *start, *end) else { continue };
                    t
                }
                Op::Concat { .. } => node(inner.clone(), k.iter().map(|&v| pick(v, axis)).collect()),
                _ => continue,
            };
            out.push((id, t));
        }
    }
}

/// The operands that `start..end` touches, the first and the last one cut.
fn slice_of_concat(w: &World, members: &[Id], axis: u8, start: u64, end: u64) -> Option<Term> {
    let mut at = 0;
    let mut parts = vec![];
    for &m in members {
        let n = w.ty(m).shape.get(axis as usize)?.known()?;
        let (lo, hi) = (start.max(at), end.min(at + n));
        if lo < hi {
            parts.push(node(Op::Slice { axis, start: lo - at, end: hi - at }, vec![class(m)]));
        }
        at += n;
    }
    Some(node(Op::Concat { axis }, parts))
}

/// [z[a..b] z[b..c] …] = z[a..c].
pub(super) fn concat_cancel(w: &World, out: &mut Found) {
    for (id, n, op) in each(w) {
        let Op::Concat { axis } = op else { continue };
        for y in w.nodes(n.ch[0]) {
            let Some(Op::Slice { axis: a, start, .. }) = y.op() else { continue };
            if a != axis {
                continue;
            }
            let (z, mut at) = (y.ch[0], *start);
            let follows = n.ch.iter().all(|&k| {
                w.nodes(k).iter().any(|s| match s.op() {
                    Some(Op::Slice { axis: a, start, end }) if a == axis && *start == at && s.ch[0] == z => {
                        at = *end;
                        true
                    }
                    _ => false,
                })
            });
            if follows {
                out.push((id, node(Op::Slice { axis: *axis, start: *start, end: at }, vec![class(z)])));
            }
        }
    }
}
