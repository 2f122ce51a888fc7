//! Index arithmetic: integer polynomials over symbols, loop counters and lanes, with exact simplification.
//!
//! An address is kept as a sum of products until it is written out, so that the part that a loop does not change leaves
//! the loop, and so that it is known whether neighbouring lanes read neighbouring elements. Quotients and remainders
//! (of reshapes) vanish where ranges and alignments allow, and are atoms of their own otherwise.
//!
//! Assumes that every index is non-negative and that no static size exceeds 2^48. Writes no text.

use std::collections::HashMap;

/// An expression of [`super::expr`], used as an index.
pub(crate) type ExId = u32;

/// An atom of a [`Space`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) struct AtomId(pub(crate) u32);

/// Which lanes of a vector are in use.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) enum Mask {
    /// All.
    Full,
    /// The first few.
    First(u8),
    /// The first few, as many as known when the kernel runs.
    Dynamic(u32),
}

/// What a polynomial is made of. Atoms are never negative, except indices read from memory before they are clamped.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Atom {
    /// Value of a symbol, by position in the plan's list.
    Sym(u32),
    /// First task.
    First,
    /// One past the last task.
    Last,
    /// Counter of a loop.
    Loop(u32),
    /// Number of the lane.
    Lane(Mask),
    /// Quotient.
    Div(Poly, Poly),
    /// Remainder.
    Rem(Poly, Poly),
    /// The smaller.
    Min(Poly, Poly),
    /// The larger.
    Max(Poly, Poly),
    /// An integer expression.
    Value(ExId),
    /// One lane of an integer expression.
    LaneOf(ExId, u8),
}

/// What is known of an atom.
#[derive(Clone, Debug)]
pub(crate) struct Info {
    pub(crate) atom: Atom,
    /// Smallest value.
    pub(crate) lo: i64,
    /// Largest value, when known.
    pub(crate) hi: Option<i64>,
    /// Every value is a multiple of this.
    pub(crate) align: i64,
    /// Nesting depth of the loop that changes it.
    pub(crate) level: u8,
    /// Differs between lanes.
    pub(crate) lane: bool,
    /// Symbolic exclusive bound of a loop counter.
    pub(crate) bound: Option<Poly>,
    /// The planner may split this loop.
    pub(crate) split: bool,
}

/// A sum of integer multiples of products of atoms; the constant is the empty product. Sorted, without zeros.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub(crate) struct Poly(pub(crate) Vec<(Vec<AtomId>, i64)>);

impl From<i64> for Poly {
    fn from(c: i64) -> Poly {
        Poly(if c == 0 { vec![] } else { vec![(vec![], c)] })
    }
}

impl From<AtomId> for Poly {
    fn from(a: AtomId) -> Poly {
        Poly(vec![(vec![a], 1)])
    }
}

impl Poly {
    fn of(mut terms: Vec<(Vec<AtomId>, i64)>) -> Poly {
        terms.sort_unstable();
        let mut out: Vec<(Vec<AtomId>, i64)> = Vec::with_capacity(terms.len());
        for (m, c) in terms {
            match out.last_mut() {
                Some(l) if l.0 == m => l.1 = l.1.wrapping_add(c),
                _ => out.push((m, c)),
            }
        }
        out.retain(|t| t.1 != 0);
        Poly(out)
    }

    /// The number, if there is nothing else.
    pub(crate) fn known(&self) -> Option<i64> {
        match self.0.as_slice() {
            [] => Some(0),
            [(m, c)] if m.is_empty() => Some(*c),
            _ => None,
        }
    }

    /// The constant term.
    pub(crate) fn constant(&self) -> i64 {
        self.0.first().filter(|t| t.0.is_empty()).map_or(0, |t| t.1)
    }

    /// All but the constant term.
    pub(crate) fn varying(&self) -> Poly {
        Poly(self.0.iter().filter(|t| !t.0.is_empty()).cloned().collect())
    }

    /// Terms for which `keep` holds.
    pub(crate) fn filter(&self, keep: impl Fn(&[AtomId]) -> bool) -> Poly {
        Poly(self.0.iter().filter(|t| keep(&t.0)).cloned().collect())
    }

    pub(crate) fn add(&self, o: &Poly) -> Poly {
        Poly::of(self.0.iter().chain(&o.0).cloned().collect())
    }

    pub(crate) fn plus(&self, c: i64) -> Poly {
        self.add(&c.into())
    }

    pub(crate) fn sub(&self, o: &Poly) -> Poly {
        self.add(&o.scale(-1))
    }

    pub(crate) fn scale(&self, c: i64) -> Poly {
        if c == 0 {
            return Poly::default();
        }
        Poly(self.0.iter().map(|(m, k)| (m.clone(), k.wrapping_mul(c))).collect())
    }

    pub(crate) fn mul(&self, o: &Poly) -> Poly {
        if let Some(c) = o.known() {
            return self.scale(c);
        }
        let mut terms = vec![];
        for (a, x) in &self.0 {
            for (b, y) in &o.0 {
                let mut m = [a.as_slice(), b.as_slice()].concat();
                m.sort_unstable();
                terms.push((m, x.wrapping_mul(*y)));
            }
        }
        Poly::of(terms)
    }
}

fn gcd(a: i64, b: i64) -> i64 {
    if b == 0 { a.abs() } else { gcd(b, a % b) }
}

/// The atoms of one kernel.
#[derive(Clone, Debug, Default)]
pub(crate) struct Space {
    infos: Vec<Info>,
    memo: HashMap<Atom, AtomId>,
}

impl Space {
    /// What is known of an atom.
    pub(crate) fn info(&self, a: AtomId) -> &Info {
        &self.infos[a.0 as usize]
    }

    /// Number of atoms.
    pub(crate) fn len(&self) -> usize {
        self.infos.len()
    }

    /// Notes the largest value of a loop counter.
    pub(crate) fn limit(&mut self, a: AtomId, hi: i64) {
        self.infos[a.0 as usize].hi = Some(hi);
    }

    /// The atom, made with `info` where it is new.
    pub(crate) fn intern(&mut self, info: Info) -> AtomId {
        if let Some(a) = self.memo.get(&info.atom) {
            return *a;
        }
        let id = AtomId(self.infos.len() as u32);
        self.memo.insert(info.atom.clone(), id);
        self.infos.push(info);
        id
    }

    /// An atom that only the function's arguments determine.
    pub(crate) fn outer(&mut self, atom: Atom) -> Poly {
        let info = Info { atom, lo: 0, hi: None, align: 1, level: 0, lane: false, bound: None, split: false };
        self.intern(info).into()
    }

    /// Smallest and largest value, where known.
    pub(crate) fn range(&self, p: &Poly) -> (Option<i64>, Option<i64>) {
        let (mut lo, mut hi) = (Some(0i64), Some(0i64));
        for (m, c) in &p.0 {
            let (mut a, mut b) = (Some(1i64), Some(1i64));
            for x in m {
                let i = self.info(*x);
                a = a.and_then(|v| if i.lo < 0 { None } else { v.checked_mul(i.lo) });
                b = b.and_then(|v| i.hi.and_then(|h| v.checked_mul(h)));
            }
            let (a, b) = (a.and_then(|v| v.checked_mul(*c)), b.and_then(|v| v.checked_mul(*c)));
            let (a, b) = if *c < 0 { (b, a) } else { (a, b) };
            lo = lo.and_then(|v| v.checked_add(a?));
            hi = hi.and_then(|v| v.checked_add(b?));
        }
        (lo, hi)
    }

    /// A number that divides every value.
    pub(crate) fn align(&self, p: &Poly) -> i64 {
        p.0.iter().fold(0, |g, (m, c)| gcd(g, self.term_align(m, *c)))
    }

    fn term_align(&self, m: &[AtomId], c: i64) -> i64 {
        m.iter().fold(c, |g, a| g.wrapping_mul(self.info(*a).align))
    }

    /// Nesting depth of the innermost loop that changes it.
    pub(crate) fn level(&self, p: &Poly) -> u8 {
        p.0.iter().flat_map(|t| &t.0).map(|a| self.info(*a).level).max().unwrap_or(0)
    }

    /// True when it differs between lanes.
    pub(crate) fn lane(&self, p: &Poly) -> bool {
        p.0.iter().flat_map(|t| &t.0).any(|a| self.info(*a).lane)
    }

    /// The factor on the lane number when the rest does not depend on the lane: 0 for none at all.
    pub(crate) fn lane_stride(&self, p: &Poly) -> Option<i64> {
        let mut stride = 0;
        for (m, c) in &p.0 {
            if m.iter().any(|a| self.info(*a).lane) {
                match m.as_slice() {
                    [a] if matches!(self.info(*a).atom, Atom::Lane(_)) => stride += c,
                    _ => return None,
                }
            }
        }
        Some(stride)
    }

    fn derived(&mut self, atom: Atom, parts: [&Poly; 2], lo: i64, hi: Option<i64>, align: i64) -> Poly {
        let level = self.level(parts[0]).max(self.level(parts[1]));
        let lane = self.lane(parts[0]) || self.lane(parts[1]);
        self.intern(Info { atom, lo, hi, align: align.max(1), level, lane, bound: None, split: false }).into()
    }

    /// The smaller of two.
    pub(crate) fn min(&mut self, a: &Poly, b: &Poly) -> Poly {
        let ((alo, ahi), (blo, bhi)) = (self.range(a), self.range(b));
        if a == b || ahi.zip(blo).is_some_and(|(x, y)| x <= y) {
            return a.clone();
        }
        if bhi.zip(alo).is_some_and(|(x, y)| x <= y) {
            return b.clone();
        }
        let lo = alo.unwrap_or(i64::MIN).min(blo.unwrap_or(i64::MIN));
        let hi = match (ahi, bhi) {
            (Some(x), Some(y)) => Some(x.min(y)),
            (x, y) => x.or(y),
        };
        let align = gcd(self.align(a), self.align(b));
        self.derived(Atom::Min(a.clone(), b.clone()), [a, b], lo, hi, align)
    }

    /// The larger of two.
    pub(crate) fn max(&mut self, a: &Poly, b: &Poly) -> Poly {
        let ((alo, ahi), (blo, bhi)) = (self.range(a), self.range(b));
        if a == b || bhi.zip(alo).is_some_and(|(x, y)| x <= y) {
            return a.clone();
        }
        if ahi.zip(blo).is_some_and(|(x, y)| x <= y) {
            return b.clone();
        }
        let lo = alo.unwrap_or(i64::MIN).max(blo.unwrap_or(i64::MIN));
        let align = gcd(self.align(a), self.align(b));
        self.derived(Atom::Max(a.clone(), b.clone()), [a, b], lo, ahi.zip(bhi).map(|(x, y)| x.max(y)), align)
    }

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

    /// The value in one lane: `lane` gives what stands for the lane number.
    pub(crate) fn at_lane(&mut self, p: &Poly, number: u8, lane: &dyn Fn(&mut Space, Mask) -> Poly) -> Poly {
        let mut out = Poly::default();
        for (m, c) in &p.0 {
            let mut t = Poly::from(*c);
            for a in m {
                let f = self.atom_at_lane(*a, number, lane);
                t = t.mul(&f);
            }
            out = out.add(&t);
        }
        out
    }

    fn atom_at_lane(&mut self, a: AtomId, n: u8, lane: &dyn Fn(&mut Space, Mask) -> Poly) -> Poly {
        let info = self.info(a).clone();
        if !info.lane {
            return a.into();
        }
        match &info.atom {
            Atom::Lane(mask) => lane(self, *mask),
            Atom::Value(e) => {
                let atom = Atom::LaneOf(*e, n);
                self.intern(Info { atom, lane: false, ..info }).into()
            }
            Atom::Div(x, d) | Atom::Rem(x, d) | Atom::Min(x, d) | Atom::Max(x, d) => {
                let (x, d) = (self.at_lane(x, n, lane), self.at_lane(d, n, lane));
                match &info.atom {
                    Atom::Div(..) => self.divide(&x, &d).0,
                    Atom::Rem(..) => self.divide(&x, &d).1,
                    Atom::Min(..) => self.min(&x, &d),
                    _ => self.max(&x, &d),
                }
            }
            _ => a.into(),
        }
    }
}

#[cfg(test)]
mod tests {
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
