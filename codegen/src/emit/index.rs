//! Index arithmetic: integer polynomials over symbols, loop counters and lanes, with exact simplification.
//!
//! An address is kept as a sum of products until it is written out, so that the part that a loop does not change leaves
//! the loop, and so that it is known whether neighbouring lanes read neighbouring elements. Quotients and remainders
//! (of reshapes) vanish where ranges and alignments allow, and are atoms of their own otherwise.
//!
//! Assumes that every index is non-negative and that no static size exceeds 2^48. Writes no text.

mod divide;

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
