//! Which groups come before which, kept up to date while groups grow and merge.
//!
//! One bit per pair of groups: an entry of ten thousand nodes has some three thousand groups, a megabyte of bits.

use std::collections::BTreeSet;

/// A set of groups.
#[derive(Clone, Debug, Default)]
pub(super) struct Bits(Vec<u64>);

impl Bits {
    pub(super) fn insert(&mut self, i: usize) {
        let w = i / 64;
        if self.0.len() <= w {
            self.0.resize(w + 1, 0);
        }
        self.0[w] |= 1 << (i % 64);
    }

    pub(super) fn remove(&mut self, i: usize) {
        if let Some(w) = self.0.get_mut(i / 64) {
            *w &= !(1 << (i % 64));
        }
    }

    pub(super) fn contains(&self, i: usize) -> bool {
        self.0.get(i / 64).is_some_and(|w| w & (1 << (i % 64)) != 0)
    }

    pub(super) fn union(&mut self, other: &Bits) {
        if self.0.len() < other.0.len() {
            self.0.resize(other.0.len(), 0);
        }
        for (a, b) in self.0.iter_mut().zip(&other.0) {
            *a |= b;
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.0.iter().enumerate().flat_map(|(i, w)| {
            let mut w = *w;
            std::iter::from_fn(move || {
                if w == 0 {
                    return None;
                }
                let b = w.trailing_zeros() as usize;
                w &= w - 1;
                Some(i * 64 + b)
            })
        })
    }
}

/// For every group, the groups it waits for, directly or not.
#[derive(Clone, Debug, Default)]
pub(super) struct Reach {
    before: Vec<Bits>,
}

impl Reach {
    /// Everything before something that waits for these groups.
    pub(super) fn closure(&self, groups: impl Iterator<Item = usize>) -> Bits {
        let mut b = Bits::default();
        for g in groups {
            b.insert(g);
            b.union(&self.before[g]);
        }
        b
    }

    /// A new group that waits for these.
    pub(super) fn start(&mut self, before: Bits) {
        self.before.push(before);
    }

    /// Whether `a` comes before `b`.
    pub(super) fn is_before(&self, a: usize, b: usize) -> bool {
        self.before[b].contains(a)
    }

    /// Whether one group made of `set`, and of something that waits for `before`, would wait for itself.
    pub(super) fn cycle(&self, set: &BTreeSet<usize>, before: &Bits) -> bool {
        let waits = |h: usize| set.iter().any(|s| self.before[h].contains(*s));
        let closes = |b: &Bits| b.iter().any(|h| !set.contains(&h) && waits(h));
        closes(before) || set.len() > 1 && set.iter().any(|s| closes(&self.before[*s]))
    }

    /// Makes `set` and something that waits for `before` one group, `into`, which is one of the set.
    pub(super) fn merge(&mut self, set: &BTreeSet<usize>, into: usize, before: &Bits) {
        let mut all = before.clone();
        for s in set {
            all.union(&self.before[*s]);
        }
        for s in set {
            all.remove(*s);
        }
        let grew = set.len() > 1 || all.iter().any(|h| !self.before[into].contains(h));
        self.before[into] = all.clone();
        if !grew {
            return;
        }
        all.insert(into);
        for h in 0..self.before.len() {
            if !set.contains(&h) && set.iter().any(|s| self.before[h].contains(*s)) {
                for s in set {
                    self.before[h].remove(*s);
                }
                self.before[h].union(&all);
            }
        }
    }

    /// `b` now waits for `a`, which does not wait for `b`.
    pub(super) fn wait(&mut self, a: usize, b: usize) {
        if self.before[b].contains(a) {
            return;
        }
        let all = self.closure(std::iter::once(a));
        for h in 0..self.before.len() {
            if h == b || self.before[h].contains(b) {
                self.before[h].union(&all);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_cycles_that_a_merge_would_make() {
        // 0 -> 1 -> 2, and 3 alone.
        let mut r = Reach::default();
        r.start(Bits::default());
        r.start(r.closure([0].into_iter()));
        r.start(r.closure([1].into_iter()));
        r.start(Bits::default());
        let none = Bits::default();
        assert!(r.cycle(&[0, 2].into(), &none));
        assert!(!r.cycle(&[1, 2].into(), &none));
        assert!(!r.cycle(&[0, 3].into(), &none));
        assert!(r.cycle(&[0].into(), &r.closure([1].into_iter())));
        r.merge(&[1, 3].into(), 1, &none);
        assert!(r.is_before(0, 2) && r.is_before(1, 2) && !r.is_before(3, 2));
        r.wait(2, 3);
        assert!(r.is_before(0, 3));
    }
}
