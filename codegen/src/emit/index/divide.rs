//! Quotients and remainders of index polynomials.

use super::{Atom, AtomId, Poly, Space, gcd};

impl Space {
    /// Quotient and remainder of non-negative `p` by positive `d`.
    pub(crate) fn divide(&mut self, p: &Poly, d: &Poly) -> (Poly, Poly) {
        match d.known() {
            Some(1) => (p.clone(), Poly::default()),
            Some(c) if c > 1 => self.divide_known(p, c),
            _ => self.divide_symbolic(p, d),
        }
    }

    fn divide_known(&mut self, p: &Poly, c: i64) -> (Poly, Poly) {
        let (mut q, mut rest) = (vec![], vec![]);
        for (m, k) in &p.0 {
            let (a, b) = if m.is_empty() { (k.div_euclid(c), k.rem_euclid(c)) } else { (k / c, k % c) };
            q.push((m.clone(), a));
            rest.push((m.clone(), b));
        }
        let (q, rest) = (Poly::of(q), Poly::of(rest));
        let (lo, hi) = self.range(&rest);
        if lo.is_none_or(|l| l < 0) {
            return self.opaque(p, c);
        }
        if hi.is_some_and(|h| h < c) {
            return (q, rest);
        }
        let (coarse, fine) = self.part(&rest, c);
        let (dq, dr) = self.opaque(&coarse, c);
        (q.add(&dq), dr.add(&fine))
    }

    /// Splits `rest` into a part of multiples of some divisor of `c`, and one smaller than that divisor.
    fn part(&self, rest: &Poly, c: i64) -> (Poly, Poly) {
        let mut terms: Vec<(i64, (Vec<AtomId>, i64))> =
            rest.varying().0.into_iter().map(|t| (gcd(self.term_align(&t.0, t.1), c), t)).collect();
        terms.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
        let k = rest.constant();
        for n in (1..terms.len()).rev().chain([terms.len()]) {
            let g = terms[..n].iter().fold(c, |g, t| gcd(g, t.0));
            let fine = Poly::of(terms[n..].iter().map(|t| t.1.clone()).chain([(vec![], k % g)]).collect());
            if let (Some(lo), Some(hi)) = self.range(&fine)
                && lo >= 0
                && hi < g
            {
                let coarse = Poly::of(terms[..n].iter().map(|t| t.1.clone()).chain([(vec![], k - k % g)]).collect());
                return (coarse, fine);
            }
        }
        (rest.clone(), Poly::default())
    }

    fn opaque(&mut self, p: &Poly, c: i64) -> (Poly, Poly) {
        if p.0.is_empty() {
            return (Poly::default(), Poly::default());
        }
        let h = p.0.iter().fold(c, |g, t| gcd(g, t.1));
        let x = Poly(p.0.iter().map(|(m, k)| (m.clone(), k / h)).collect());
        let c = c / h;
        if c == 1 {
            return (x, Poly::default());
        }
        let (lo, hi) = self.range(&x);
        let g = gcd(self.align(&x), c);
        let cp = Poly::from(c);
        let dlo = lo.map_or(0, |l| l.max(0) / c);
        let q = self.derived(Atom::Div(x.clone(), cp.clone()), [&x, &cp], dlo, hi.map(|v| v / c), 1);
        let r = self.derived(Atom::Rem(x.clone(), cp.clone()), [&x, &cp], 0, Some((c - g).min(hi.unwrap_or(c))), g);
        (q, r.scale(h))
    }

    fn divide_symbolic(&mut self, p: &Poly, d: &Poly) -> (Poly, Poly) {
        if let [(dm, dc)] = d.0.as_slice() {
            // Terms that hold every factor of the divisor leave at once.
            let (mut q, mut rest) = (vec![], vec![]);
            for (m, k) in &p.0 {
                let mut left = m.clone();
                let all = dm.iter().all(|a| left.iter().position(|x| x == a).map(|i| left.remove(i)).is_some());
                if all && k % dc == 0 { q.push((left, k / dc)) } else { rest.push((m.clone(), *k)) }
            }
            let rest = Poly::of(rest);
            let below = match rest.0.as_slice() {
                [] => true,
                [(m, 1)] if m.len() == 1 => self.info(m[0]).bound.as_ref() == Some(d),
                _ => false,
            };
            if below {
                return (Poly::of(q), rest);
            }
        }
        let hi = self.range(p).1;
        let q = self.derived(Atom::Div(p.clone(), d.clone()), [p, d], 0, hi, 1);
        let r = self.derived(Atom::Rem(p.clone(), d.clone()), [p, d], 0, hi, 1);
        (q, r)
    }

    /// Puts `c * (x / c) + x % c` together again.
    pub(crate) fn recombine(&self, p: &Poly) -> Poly {
        let mut p = p.clone();
        while let Some(q) = self.recombine_once(&p) {
            p = q;
        }
        p
    }

    fn recombine_once(&self, p: &Poly) -> Option<Poly> {
        for (m, k) in &p.0 {
            for (i, a) in m.iter().enumerate() {
                let Atom::Div(x, d) = &self.info(*a).atom else { continue };
                let Some(rem) = self.memo.get(&Atom::Rem(x.clone(), d.clone())) else { continue };
                let mut others = m.clone();
                others.remove(i);
                let mut with_rem = others.clone();
                with_rem.push(*rem);
                with_rem.sort_unstable();
                let Some(r) = p.0.iter().find(|t| t.0 == with_rem) else { continue };
                let others = Poly(vec![(others, r.1)]);
                if d.mul(&others) == Poly::of(vec![(others.0[0].0.clone(), *k)]) {
                    let left = p.filter(|t| t != m.as_slice() && t != with_rem.as_slice());
                    return Some(left.add(&others.mul(x)));
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Info, Mask};
    use super::*;

    fn counter(s: &mut Space, n: u32, lo: i64, hi: i64, align: i64, lane: bool) -> Poly {
        let atom = if lane { Atom::Lane(Mask::First(n as u8)) } else { Atom::Loop(n) };
        let info = Info { atom, lo, hi: Some(hi), align, level: 1, lane, bound: None, split: false };
        s.intern(info).into()
    }

    #[test]
    fn reshapes_of_aligned_vectors_stay_contiguous() {
        let mut s = Space::default();
        let (iv, l) = (counter(&mut s, 0, 0, 560, 16, false), counter(&mut s, 1, 0, 15, 1, true));
        let j = iv.add(&l);
        let (q, r) = s.divide(&j, &64.into());
        assert!(!s.lane(&q));
        assert_eq!(s.lane_stride(&r), Some(1));
        assert_eq!(s.recombine(&q.scale(64).add(&r)), j);
        // The other direction vanishes entirely.
        let (h, d) = (counter(&mut s, 2, 0, 8, 1, false), counter(&mut s, 3, 0, 63, 1, false));
        assert_eq!(s.divide(&h.scale(64).add(&d), &64.into()), (h, d));
    }

    #[test]
    fn misaligned_vectors_are_taken_lane_by_lane() {
        let mut s = Space::default();
        let (iv, l) = (counter(&mut s, 0, 0, 560, 16, false), counter(&mut s, 1, 0, 15, 1, true));
        let j = iv.add(&l).plus(8);
        let (q, r) = s.divide(&j, &9.into());
        assert!(s.lane(&q) && s.lane_stride(&r).is_none());
        let q3 = s.at_lane(&q, 3, &|_, _| 3.into());
        assert!(!s.lane(&q3));
        assert_eq!(s.recombine(&q.scale(9).add(&r)), j);
    }

    #[test]
    fn symbolic_divisors() {
        let mut s = Space::default();
        let n = s.outer(Atom::Sym(0));
        let info = Info {
            atom: Atom::Loop(7),
            lo: 0,
            hi: None,
            align: 1,
            level: 1,
            lane: false,
            bound: Some(n.clone()),
            split: false,
        };
        let i = Poly::from(s.intern(info));
        let k = counter(&mut s, 1, 0, 4, 1, false);
        assert_eq!(s.divide(&k.mul(&n).add(&i), &n), (k, i));
    }
}
