//! The order in which the products of several groups of accumulators are taken.

use crate::emit::contraction::analyze::Analysis;
use pleach_ir::ValueId;

/// A product as a pass takes it: group, product, scale.
pub(super) type Taken = (usize, usize, Option<ValueId>);

/// Products in passes. Every group sees its products in its own order; products of one left operand that several groups have
/// next are one pass.
pub(super) fn passes(a: &Analysis) -> Vec<Vec<Taken>> {
    let mut next = vec![0; a.groups.len()];
    let mut out = vec![];
    let same = |i: usize, j: usize| a.products[i].left == a.products[j].left && a.products[i].k == a.products[j].k;
    loop {
        let heads: Vec<Taken> =
            (0..next.len()).filter_map(|g| a.groups[g].products.get(next[g]).map(|(p, s)| (g, *p, *s))).collect();
        // What another group needs later waits for it.
        let later = |p: usize| {
            let rest = |g: usize| a.groups[g].products.iter().skip(next[g] + 1);
            (0..next.len()).any(|g| rest(g).any(|(q, _)| same(p, *q)))
        };
        let Some(lead) = heads.iter().find(|h| !later(h.1)).or(heads.first()).map(|h| h.1) else { return out };
        let pass: Vec<Taken> = heads.into_iter().filter(|h| same(h.1, lead)).collect();
        pass.iter().for_each(|h| next[h.0] += 1);
        out.push(pass);
    }
}
