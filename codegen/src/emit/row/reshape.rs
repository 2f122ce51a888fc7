//! Indices through a reshape.

use super::model::product;
use crate::emit::index::{Poly, Space};

/// The index into shape `into` of the element at `index` of shape `from`; both hold the same elements in row-major order.
/// Axes that agree keep their index, the others are joined and divided again.
pub(crate) fn reindex(space: &mut Space, from: &[Poly], into: &[Poly], index: &[Poly]) -> Vec<Poly> {
    let many = |d: &[Poly]| -> Vec<usize> { (0..d.len()).filter(|i| d[*i].known() != Some(1)).collect() };
    let (f, t) = (many(from), many(into));
    let pick = |d: &[Poly], ids: &[usize]| -> Vec<Poly> { ids.iter().map(|i| d[*i].clone()).collect() };
    let (fd, td) = (pick(from, &f), pick(into, &t));
    // Axes of one element have index 0.
    let mut out = vec![Poly::default(); into.len()];
    for (a, b) in groups(&fd, &td) {
        let mut p = Poly::default();
        for i in a {
            p = p.mul(&fd[i]).add(&index[f[i]]);
        }
        let mut p = space.recombine(&p);
        for i in b.clone().rev() {
            if i == b.start {
                out[t[i]] = p.clone();
            } else {
                let (q, r) = space.divide(&p, &td[i]);
                out[t[i]] = r;
                p = q;
            }
        }
    }
    out
}

type Part = std::ops::Range<usize>;

/// The finest groups of neighbouring axes that hold the same elements on both sides.
pub(crate) fn groups(from: &[Poly], into: &[Poly]) -> Vec<(Part, Part)> {
    let (mut out, mut i0, mut j0) = (vec![], 0, 0);
    while i0 < from.len() && j0 < into.len() {
        let mut next = None;
        'find: for i in i0 + 1..=from.len() {
            let a = product(&from[i0..i]);
            for j in j0 + 1..=into.len() {
                if a == product(&into[j0..j]) {
                    next = Some((i, j));
                    break 'find;
                }
            }
        }
        let (i, j) = next.unwrap_or((from.len(), into.len()));
        out.push((i0..i, j0..j));
        (i0, j0) = (i, j);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::emit::index::Atom;

    #[test]
    fn finds_groups_with_symbols_and_ones() {
        let mut s = Space::default();
        let t = s.outer(Atom::Sym(0));
        let p = |n: i64| Poly::from(n);
        let g = groups(&[t.clone(), p(576)], &[t.clone(), p(9), p(64)]);
        assert_eq!(g, vec![(0..1, 0..1), (1..2, 1..3)]);
        let i = Poly::from(3);
        assert_eq!(reindex(&mut s, &[p(7), p(1)], &[p(1), p(7)], &[i.clone(), p(0)]), vec![p(0), i]);
        let g = groups(&[t.clone(), p(4)], &[p(4), t]);
        assert_eq!(g, vec![(0..2, 0..2)]);
    }
}
