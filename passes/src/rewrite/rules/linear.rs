//! Rules about one product: association, scalars, diagonal factors.

use super::*;

/// (p·q)·z = p·(q·z), both ways. The new operand is made of parameters, or no bigger than what is there already: the
/// result, the smaller operand, or the gradient of a whole weight that it replaces.
pub(super) fn assoc(w: &World, out: &mut Found) {
    let area = |v: View| size(dims(w, v).0).saturating_mul(size(dims(w, v).1));
    let flip = |v: (View, View), t: bool| if t { ((v.1.0, !v.1.1), (v.0.0, !v.0.1)) } else { v };
    for (id, n, _) in each(w) {
        let Some((l, r)) = as_product(w, n) else { continue };
        // `old`: size of a product of two run-time values that the new operand replaces, a weight's whole gradient
        let ok = |a: View, b: View, old: u64| {
            let new = size(dims(w, a).0).saturating_mul(size(dims(w, b).1));
            if w.is_param(a.0) && w.is_param(b.0) {
                // where slots stay apart, a slot's factors are not multiplied out
                if !w.merge && w.known(a.0).min(w.known(b.0)) == Known::Slot && new > area(a).max(area(b)) {
                    return false;
                }
                // a small product of base weights and a slot is not a slot's copy of the base weights
                return !w.mixes(a.0, b.0) || new.saturating_mul(2) < area(a).max(area(b));
            }
            new <= area((id, false)).max(area(l).min(area(r))).max(old)
        };
        let gradient = |p: View, q: View, old: View| if w.is_param(p.0) || w.is_param(q.0) { 0 } else { area(old) };
        let product = |a: View, b: View| Term::Product(Box::new((class(a.0), a.1)), Box::new((class(b.0), b.1)));
        for v in products(w, l.0) {
            let (p, q) = flip(v, l.1);
            if ok(q, r, gradient(p, q, l)) {
                out.push((id, mm((class(p.0), p.1), (product(q, r), false))));
            }
        }
        for v in products(w, r.0) {
            let (p, q) = flip(v, r.1);
            if ok(l, p, gradient(p, q, r)) {
                out.push((id, mm((product(l, p), false), (class(q.0), q.1))));
            }
        }
    }
}

/// Scalars leave every linear operator towards the root.
pub(super) fn scale_out(w: &World, out: &mut Found) {
    for (id, n, op) in each(w) {
        let linear: &[usize] = match op {
            Op::MatMul { .. } if as_product(w, n).is_some() => &[0, 1],
            Op::Gather { .. } | Op::Slice { .. } | Op::Transpose(_) => &[0],
            Op::Binary(BinaryOp::Mul) if as_scale(w, n).is_some() => &[1],
            Op::Binary(BinaryOp::Mul) if as_diag(w, n).is_some() => &[0, 1],
            _ => &[],
        };
        for &k in linear {
            for (s, x) in w.nodes(n.ch[k]).iter().filter_map(|y| as_scale(w, y)) {
                if as_scale(w, n).is_some() {
                    // s·(t·x) = (s·t)·x, so that one scalar is left
                    if w.is_param(s) && w.is_param(n.ch[0]) {
                        out.push((id, mul(mul(class(n.ch[0]), class(s)), class(x))));
                    }
                    continue;
                }
                let mut ch: Vec<Term> = n.ch.iter().map(|&i| class(i)).collect();
                ch[k] = class(x);
                out.push((id, mul(class(s), node(op.clone(), ch))));
            }
            if !matches!(op, Op::MatMul { .. }) {
                continue;
            }
            for (y, cast) in rounded(w, n.ch[k]) {
                for (s, x) in w.nodes(y).iter().filter_map(|y| as_scale(w, y)) {
                    let mut ch: Vec<Term> = n.ch.iter().map(|&i| class(i)).collect();
                    ch[k] = node(cast.clone(), vec![class(x)]);
                    out.push((id, mul(class(s), node(op.clone(), ch))));
                }
            }
        }
        if matches!(op, Op::Add | Op::Concat { .. }) && w.ty(id).rank() > 0 {
            // every operand scaled by one scalar
            let of = |c: Id| w.nodes(c).iter().find_map(|y| as_scale(w, y));
            let all: Option<Vec<(Id, Id)>> = n.ch.iter().map(|&c| of(c)).collect();
            if let Some(all) = all.filter(|v| v.iter().all(|e| e.0 == v[0].0)) {
                let ch = all.iter().map(|e| class(e.1)).collect();
                out.push((id, mul(class(all[0].0), node(op.clone(), ch))));
            }
        }
    }
}

/// s·(x·P) = x·(s·P): the scalar becomes part of a parameter that is built once.
pub(super) fn scale_in(w: &World, out: &mut Found) {
    for (id, n, _) in each(w) {
        let Some((s, y)) = as_scale(w, n) else { continue };
        if !w.is_param(s) || w.is_param(y) {
            continue;
        }
        for (a, b) in products(w, y) {
            if w.is_param(b.0) && !w.mixes(s, b.0) {
                out.push((id, mm((class(a.0), a.1), (mul(class(s), class(b.0)), b.1))));
                for (p, cast) in rounded(w, b.0).filter(|p| w.is_param(p.0)) {
                    let t = node(cast.clone(), vec![mul(class(s), class(p))]);
                    out.push((id, mm((class(a.0), a.1), (t, b.1))));
                }
            }
        }
    }
}

/// (diag g·x)·W = diag g·(x·W), both ways.
pub(super) fn rowscale(w: &World, out: &mut Found) {
    for (id, n, _) in each(w) {
        if let Some((y, g, 0)) = as_diag(w, n) {
            for (a, b) in products(w, y).filter(|p| wide(w, p.0.0) && !w.mixes(p.0.0, g)) {
                let x = diag(&w.ty(a.0).shape, u8::from(a.1), class(a.0), g);
                out.push((id, mm((x, a.1), (class(b.0), b.1))));
            }
        }
        let Some((a, b)) = as_product(w, n) else { continue };
        for (x, g, axis) in w.nodes(a.0).iter().filter_map(|y| as_diag(w, y)) {
            if axis == u8::from(a.1) {
                out.push((id, diag(&w.ty(id).shape, 0, mm((class(x), a.1), (class(b.0), b.1)), g)));
            }
        }
        // the same where the scaled operand is rounded
        for (y, cast) in rounded(w, a.0) {
            for (x, g, axis) in w.nodes(y).iter().filter_map(|y| as_diag(w, y)) {
                if axis == u8::from(a.1) {
                    let x = node(cast.clone(), vec![class(x)]);
                    out.push((id, diag(&w.ty(id).shape, 0, mm((x, a.1), (class(b.0), b.1)), g)));
                }
            }
        }
    }
}

/// (x·W)·diag g = x·(W·diag g) for parameters W and g, and back; the same for the inner dimension.
pub(super) fn colscale(w: &World, out: &mut Found) {
    let scaled = |v: View, side: u8, g: Id| {
        // axis `side` of the view is the other axis of the tensor when it is transposed
        let axis = if v.1 { 1 - side } else { side };
        diag(&w.ty(v.0).shape, axis, class(v.0), g)
    };
    for (id, n, _) in each(w) {
        if let Some((y, g, 1)) = as_diag(w, n) {
            for (a, b) in products(w, y).filter(|p| w.is_param(p.1.0) && !w.mixes(p.1.0, g)) {
                out.push((id, mm((class(a.0), a.1), (scaled(b, 1, g), b.1))));
            }
        }
        let Some((a, b)) = as_product(w, n) else { continue };
        for (x, g, axis) in w.nodes(a.0).iter().filter_map(|y| as_diag(w, y)) {
            // columns of the left operand scaled = rows of the right operand scaled
            let inner = axis == u8::from(!a.1);
            if inner && w.is_param(b.0) && !w.mixes(b.0, g) {
                out.push((id, mm((class(x), a.1), (scaled(b, 0, g), b.1))));
            }
        }
        for (x, g, axis) in w.nodes(b.0).iter().filter_map(|y| as_diag(w, y)) {
            let outer = axis == u8::from(!b.1);
            let t = if outer {
                diag(&w.ty(id).shape, 1, mm((class(a.0), a.1), (class(x), b.1)), g)
            } else {
                mm((scaled(a, 1, g), a.1), (class(x), b.1))
            };
            out.push((id, t));
        }
    }
}
