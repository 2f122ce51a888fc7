//! Rules about sums of products.

use super::*;
use pleach_ir::ScatterMode;
use std::collections::BTreeMap;

/// Σ cᵢ·(x·Wᵢ) = x·Σ cᵢ·Wᵢ for parameters Wᵢ, and the same for a common right factor. All terms of a group at once.
pub(super) fn factor(w: &World, out: &mut Found) {
    for (id, n, _) in each(w) {
        if !is_sum(w, id, n) {
            continue;
        }
        let terms: Vec<Vec<Prod>> = n.ch.iter().map(|&c| scaled_products(w, c)).collect();
        for left in [true, false] {
            let mut by: BTreeMap<(Id, bool, bool), Vec<(usize, Prod)>> = BTreeMap::new();
            for (k, ps) in terms.iter().enumerate() {
                for p in ps {
                    let (key, other) = if left { (p.1, p.2) } else { (p.2, p.1) };
                    if !wide(w, other.0) {
                        continue; // a sum is not rounded
                    }
                    if left && (!w.is_param(other.0) || p.0.is_some_and(|s| !w.is_param(s))) {
                        continue;
                    }
                    let group = by.entry((key.0, key.1, other.1)).or_default();
                    let apart = |q: &(usize, Prod)| {
                        let o = if left { q.1.2.0 } else { q.1.1.0 };
                        w.is_param(o) && w.is_param(other.0) && w.mixes(o, other.0)
                    };
                    if group.last().is_none_or(|z| z.0 != k) && !group.iter().any(apart) {
                        group.push((k, *p));
                    }
                }
            }
            let mut groups: Vec<_> = by.into_iter().filter(|g| g.1.len() > 1).collect();
            groups.sort_by_key(|g| std::cmp::Reverse(g.1.len()));
            let mut used = vec![false; n.ch.len()];
            let mut found = vec![];
            for ((key, flag, other), m) in groups {
                if m.iter().any(|e| used[e.0]) {
                    continue;
                }
                m.iter().for_each(|e| used[e.0] = true);
                let pick = |e: &(usize, Prod)| with(e.1.0, class(if left { e.1.2.0 } else { e.1.1.0 }));
                let sum = node(Op::Add, m.iter().map(pick).collect());
                let t = if left { mm((class(key), flag), (sum, other)) } else { mm((sum, other), (class(key), flag)) };
                found.push((m.iter().map(|e| e.0).collect(), t));
            }
            regroup(id, &n.ch, found, out);
        }
    }
}

/// x·(W + D) = x·W + x·D where the bracket joins base weights and a slot that are to stay apart.
pub(super) fn distribute(w: &World, out: &mut Found) {
    if w.merge {
        return;
    }
    for (id, n, _) in each(w) {
        let Some((a, b)) = as_product(w, n) else { continue };
        if w.known(b.0) != Known::Slot || w.eg[b.0].data.base == 0 {
            continue;
        }
        for s in w.nodes(b.0).iter().filter(|s| is_sum(w, b.0, s)) {
            let terms = s.ch.iter().map(|&c| mm((class(a.0), a.1), (class(c), b.1))).collect();
            out.push((id, node(Op::Add, terms)));
        }
    }
}

/// A product with a slice as left operand: first and last column, term of the sum, product.
type Piece = (u64, u64, usize, Prod);

/// Σ zᵢ·Wᵢ = z·[W₁;W₂;…] when the zᵢ are slices that tile z, each term of the sum used once.
pub(super) fn slices_of_one(w: &World, out: &mut Found) {
    for (id, n, _) in each(w) {
        if !is_sum(w, id, n) {
            continue;
        }
        let mut by: BTreeMap<(Id, bool), Vec<Piece>> = BTreeMap::new();
        for (k, &c) in n.ch.iter().enumerate() {
            for p in scaled_products(w, c) {
                if p.1.1 || !w.is_param(p.2.0) || p.0.is_some_and(|s| !w.is_param(s)) {
                    continue;
                }
                for y in w.nodes(p.1.0) {
                    if let Some(Op::Slice { axis: 1, start, end }) = y.op() {
                        by.entry((y.ch[0], p.2.1)).or_default().push((*start, *end, k, p));
                    }
                }
            }
        }
        let mut used = vec![false; n.ch.len()];
        let mut found = vec![];
        for ((z, tb), mut m) in by {
            // weights as they lie in memory first; then one term per slice
            m.sort_by_key(|e| (e.0, !w.eg[e.3.2.0].data.leaf, e.2));
            m.dedup_by_key(|e| e.0);
            let mut ks: Vec<usize> = m.iter().map(|e| e.2).collect();
            ks.sort_unstable();
            ks.dedup();
            let tiles = m[0].0 == 0
                && m.windows(2).all(|p| p[0].1 == p[1].0)
                && w.ty(z).shape.get(1) == Some(&Dim::Known(m[m.len() - 1].1));
            let apart = m.iter().any(|e| w.mixes(e.3.2.0, m[0].3.2.0));
            if !tiles || apart || m.len() < 2 || ks.len() < m.len() || ks.iter().any(|&k| used[k]) {
                continue;
            }
            ks.iter().for_each(|&k| used[k] = true);
            let members = m.iter().map(|e| with(e.3.0, class(e.3.2.0))).collect();
            let cat = node(Op::Concat { axis: u8::from(tb) }, members);
            found.push((ks, mm((class(z), false), (cat, tb))));
        }
        regroup(id, &n.ch, found, out);
    }
}

/// What branches share: x with its flag, the flag of A, the flag of B.
type Shared = (Id, bool, bool, bool);

/// Σ (x·Aᵢ)·Bᵢ = (x·[A₁ A₂ …])·[B₁;B₂;…] for thin x·Aᵢ that share x: several adapters become one of the summed rank.
pub(super) fn ranks_concat(w: &World, out: &mut Found) {
    for (id, n, _) in each(w) {
        if !is_sum(w, id, n) {
            continue;
        }
        let mut by: BTreeMap<Shared, Vec<(usize, Prod, Id)>> = BTreeMap::new();
        for (k, &c) in n.ch.iter().enumerate() {
            for p in scaled_products(w, c) {
                let Some(rank) = dims(w, p.1).1.known() else { continue };
                let thin = rank <= THIN && rank * 2 <= size(dims(w, p.2).1);
                let built = w.nodes(p.1.0).iter().any(|y| matches!(y.op(), Some(Op::Concat { .. })));
                let known = w.is_param(p.2.0) && p.0.is_none_or(|s| w.is_param(s));
                if p.1.1 || !thin || built || !known || w.known(p.2.0) == Known::Const {
                    continue;
                }
                let inner = rounded(w, p.1.0).flat_map(|y| products(w, y.0)).chain(products(w, p.1.0));
                for (x, a) in inner.filter(|q| w.is_param(q.1.0)) {
                    let group = by.entry((x.0, x.1, a.1, p.2.1)).or_default();
                    let apart = |q: &(usize, Prod, Id)| {
                        w.ty(q.1.1.0).dtype != w.ty(p.1.0).dtype || w.mixes(q.2, a.0) || w.mixes(q.1.2.0, p.2.0)
                    };
                    if group.last().is_none_or(|z| z.0 != k) && !group.iter().any(apart) {
                        group.push((k, p, a.0));
                    }
                }
            }
        }
        let mut used = vec![false; n.ch.len()];
        let mut found = vec![];
        for ((x, tx, ta, tb), mut m) in by.into_iter().filter(|g| g.1.len() > 1) {
            if m.iter().any(|e| used[e.0]) {
                continue;
            }
            m.iter().for_each(|e| used[e.0] = true);
            m.sort_by_key(|e| e.2);
            let a = node(Op::Concat { axis: u8::from(!ta) }, m.iter().map(|e| class(e.2)).collect());
            let b = node(Op::Concat { axis: u8::from(tb) }, m.iter().map(|e| with(e.1.0, class(e.1.2.0))).collect());
            let mut left = mm((class(x), tx), (a, ta));
            if !wide(w, m[0].1.1.0) {
                left = node(Op::Cast(w.ty(m[0].1.1.0).dtype), vec![left]);
            }
            found.push((m.iter().map(|e| e.0).collect(), mm((left, false), (b, tb))));
        }
        regroup(id, &n.ch, found, out);
    }
}

/// x·W + s·(x[:,I]·P) = x·(W with s·P added at I).
pub(super) fn scatter_merge(w: &World, out: &mut Found) {
    for (id, n, op) in each(w) {
        if *op == (Op::Scatter { axis: 1, mode: ScatterMode::Add }) && wide(w, id) && w.is_param(n.ch[1]) {
            scattered_columns(w, id, n, out);
        }
        if !is_sum(w, id, n) || n.ch.len() != 2 {
            continue;
        }
        for (i, j) in [(0, 1), (1, 0)] {
            for (s, a, b) in scaled_products(w, n.ch[j]) {
                for y in w.nodes(a.0) {
                    if y.op() != Some(&Op::Gather { axis: 1 })
                        || !wide(w, b.0)
                        || a.1
                        || !w.is_param(b.0)
                        || !w.is_param(y.ch[1])
                    {
                        continue;
                    }
                    for (x, v) in products(w, n.ch[i]) {
                        if x != (y.ch[0], false) || v.1 != b.1 || !w.is_param(v.0) || w.mixes(v.0, b.0) {
                            continue;
                        }
                        let op = Op::Scatter { axis: u8::from(v.1), mode: ScatterMode::Add };
                        let t = node(op, vec![class(v.0), class(y.ch[1]), with(s, class(b.0))]);
                        out.push((id, mm((class(x.0), false), (t, v.1))));
                    }
                }
            }
        }
    }
}

/// y·V with s·(y·P) added at columns I = y·(V with s·P added at columns I).
fn scattered_columns(w: &World, id: Id, n: &ENode, out: &mut Found) {
    for (s, x, b) in scaled_products(w, n.ch[2]) {
        for (y, v) in products(w, n.ch[0]) {
            let params = w.is_param(v.0) && w.is_param(b.0) && s.is_none_or(|s| w.is_param(s));
            if x != y || v.1 != b.1 || !params || !wide(w, b.0) || w.mixes(v.0, b.0) {
                continue;
            }
            let op = Op::Scatter { axis: u8::from(!v.1), mode: ScatterMode::Add };
            let t = node(op, vec![class(v.0), class(n.ch[1]), with(s, class(b.0))]);
            out.push((id, mm((class(y.0), y.1), (t, v.1))));
        }
    }
}

/// x·(W with P added at I) = x·W + x[:,I]·P where W is base, P a slot, and the two are to stay apart.
pub(super) fn scatter_unmerge(w: &World, out: &mut Found) {
    for (id, n, _) in each(w) {
        let Some((a, b)) = as_product(w, n) else { continue };
        if w.merge || a.1 || !wide(w, b.0) || w.known(b.0) != Known::Slot || w.eg[b.0].data.base == 0 {
            continue;
        }
        for y in w.nodes(b.0) {
            if y.op() == Some(&Op::Scatter { axis: u8::from(b.1), mode: ScatterMode::Add }) {
                let g = node(Op::Gather { axis: 1 }, vec![class(a.0), class(y.ch[1])]);
                let base = mm((class(a.0), false), (class(y.ch[0]), b.1));
                out.push((id, node(Op::Add, vec![base, mm((g, false), (class(y.ch[2]), b.1))])));
            }
        }
    }
}
