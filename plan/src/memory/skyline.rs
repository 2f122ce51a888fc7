//! What [`super::fill`] keeps: sums over sections of time with their largest, the skyline, and the requests not placed yet.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

/// Sums over sections: adds to a range, and finds the largest of a range.
#[derive(Clone)]
pub(super) struct Peaks {
    leaves: usize,
    most: Vec<u64>,
    add: Vec<u64>,
    at: Vec<u32>,
}

impl Peaks {
    pub(super) fn new(load: &[u64]) -> Peaks {
        let leaves = load.len().next_power_of_two();
        let mut t = Peaks { leaves, most: vec![0; 2 * leaves], add: vec![0; 2 * leaves], at: vec![0; 2 * leaves] };
        for i in 0..leaves {
            t.at[leaves + i] = i as u32;
            t.most[leaves + i] = load.get(i).copied().unwrap_or(0);
        }
        for v in (1..leaves).rev() {
            t.pull(v);
        }
        t
    }

    fn pull(&mut self, v: usize) {
        let c = if self.most[2 * v] >= self.most[2 * v + 1] { 2 * v } else { 2 * v + 1 };
        self.most[v] = self.most[c].saturating_add(self.add[v]);
        self.at[v] = self.at[c];
    }

    /// The largest of all.
    pub(super) fn most(&self) -> u64 {
        self.most[1]
    }

    /// The sum of each section.
    pub(super) fn all(&self, count: usize) -> Vec<u64> {
        let mut add = vec![0u64; 2 * self.leaves];
        for v in 2..2 * self.leaves {
            add[v] = add[v / 2].saturating_add(self.add[v / 2]);
        }
        (self.leaves..self.leaves + count).map(|v| add[v].saturating_add(self.most[v])).collect()
    }

    /// Adds to all of a range.
    pub(super) fn raise(&mut self, of: &Range<usize>, by: u64) {
        self.raise_below(1, 0..self.leaves, of, by);
    }

    fn raise_below(&mut self, v: usize, at: Range<usize>, of: &Range<usize>, by: u64) {
        if of.start <= at.start && at.end <= of.end {
            self.most[v] = self.most[v].saturating_add(by);
            self.add[v] = self.add[v].saturating_add(by);
            return;
        }
        let m = at.start.midpoint(at.end);
        if of.start < m {
            self.raise_below(2 * v, at.start..m, of, by);
        }
        if of.end > m {
            self.raise_below(2 * v + 1, m..at.end, of, by);
        }
        self.pull(v);
    }

    /// The largest of a range and the first section that has it.
    pub(super) fn peak(&self, of: &Range<usize>) -> (u64, usize) {
        let (most, section) = self.peak_below(1, 0..self.leaves, of);
        (most, section as usize)
    }

    fn peak_below(&self, v: usize, at: Range<usize>, of: &Range<usize>) -> (u64, u32) {
        if of.start <= at.start && at.end <= of.end {
            return (self.most[v], self.at[v]);
        }
        let m = at.start.midpoint(at.end);
        let left = if of.start < m { Some(self.peak_below(2 * v, at.start..m, of)) } else { None };
        let right = if of.end > m { Some(self.peak_below(2 * v + 1, m..at.end, of)) } else { None };
        let (most, section) = match (left, right) {
            (Some(l), Some(r)) => {
                if r.0 > l.0 {
                    r
                } else {
                    l
                }
            }
            (Some(x), None) | (None, Some(x)) => x,
            (None, None) => (0, of.start as u32),
        };
        (most.saturating_add(self.add[v]), section)
    }
}

/// A stretch of the skyline, linked to its neighbours.
#[derive(Clone, Copy)]
pub(super) struct Stretch {
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) height: u64,
    pub(super) before: usize,
    pub(super) after: usize,
    alive: bool,
}

const NONE: usize = usize::MAX;

#[derive(Clone)]
pub(super) struct Skyline {
    stretches: Vec<Stretch>,
    /// By height, then from the left; entries of stretches that are no more are skipped.
    lowest: BinaryHeap<Reverse<(u64, usize, usize)>>,
    /// Numbers of stretches that are no more.
    free: Vec<usize>,
}

impl Skyline {
    pub(super) fn new(count: usize) -> Skyline {
        let all = Stretch { from: 0, to: count, height: 0, before: NONE, after: NONE, alive: true };
        Skyline { stretches: vec![all], lowest: BinaryHeap::from([Reverse((0, 0, 0))]), free: vec![] }
    }

    /// The lowest stretch, which stays.
    pub(super) fn lowest(&mut self) -> Option<usize> {
        while let Some(Reverse((height, from, k))) = self.lowest.peek().copied() {
            let s = &self.stretches[k];
            if s.alive && (s.height, s.from) == (height, from) {
                return Some(k);
            }
            self.lowest.pop();
        }
        None
    }

    pub(super) fn stretch(&self, k: usize) -> Stretch {
        self.stretches[k]
    }

    /// Height of a neighbour; beyond the ends there is no room at all.
    pub(super) fn height(&self, k: usize) -> u64 {
        if k == NONE { u64::MAX } else { self.stretches[k].height }
    }

    fn push(&mut self, from: usize, to: usize, height: u64, before: usize) -> usize {
        let stretch = Stretch { from, to, height, before, after: NONE, alive: true };
        let id = self.free.pop().unwrap_or(self.stretches.len());
        if id < self.stretches.len() {
            self.stretches[id] = stretch;
        } else {
            self.stretches.push(stretch);
        }
        if before != NONE {
            self.stretches[before].after = id;
        }
        self.lowest.push(Reverse((height, from, id)));
        id
    }

    fn remove(&mut self, k: usize) {
        self.stretches[k].alive = false;
        self.free.push(k);
    }

    /// Replaces a stretch by parts from left to right, joined to neighbours of equal height.
    pub(super) fn replace(&mut self, k: usize, parts: &mut [(usize, usize, u64)]) {
        let Stretch { mut before, mut after, .. } = self.stretches[k];
        self.remove(k);
        let Some(first) = parts.first_mut() else { return };
        if self.height(before) == first.2 && before != NONE {
            first.0 = self.stretches[before].from;
            self.remove(before);
            before = self.stretches[before].before;
        }
        let Some(last) = parts.last_mut() else { return };
        if self.height(after) == last.2 && after != NONE {
            last.1 = self.stretches[after].to;
            self.remove(after);
            after = self.stretches[after].after;
        }
        for &mut (from, to, height) in parts {
            before = self.push(from, to, height, before);
        }
        self.stretches[before].after = after;
        if after != NONE {
            self.stretches[after].before = before;
        }
    }

    /// A stretch loses sections at one of its ends to the neighbour there; what is left of it.
    pub(super) fn cut(&mut self, k: usize, s: &Range<usize>) {
        let Stretch { from, to, height, before, after, .. } = self.stretches[k];
        self.remove(k);
        let (left, right) = if s.start <= from && to <= s.end {
            (before, after)
        } else {
            let (from, to) = if s.start <= from { (s.end, to) } else { (from, s.start) };
            let id = self.push(from, to, height, before);
            self.stretches[id].after = after;
            if after != NONE {
                self.stretches[after].before = id;
            }
            return;
        };
        if left != NONE {
            self.stretches[left].after = right;
        }
        if right != NONE {
            self.stretches[right].before = left;
        }
    }
}

/// The requests not placed, by their first section; the one that ends last comes first.
#[derive(Clone)]
pub(super) struct Waiting {
    /// Where the list of each section begins, and how many it has.
    base: Vec<u32>,
    count: Vec<u32>,
    /// End and number of each.
    items: Vec<(u32, u32)>,
    /// A tree over the sections: the least end of what begins there.
    least: Vec<u32>,
    leaves: usize,
}

impl Waiting {
    pub(super) fn new(span: &[Range<usize>], sections: usize) -> Waiting {
        let mut order: Vec<u32> = (0..span.len() as u32).collect();
        super::sort::by_key(&mut order, &|i| {
            let s = &span[i as usize];
            (s.start as u128, u128::MAX - s.end as u128)
        });
        let items: Vec<(u32, u32)> = order.into_iter().map(|i| (span[i as usize].end as u32, i)).collect();
        let mut count = vec![0u32; sections];
        span.iter().for_each(|s| count[s.start] += 1);
        let mut sum = 0;
        let base = count
            .iter()
            .map(|c| {
                sum += c;
                sum - c
            })
            .collect();
        let leaves = sections.next_power_of_two();
        let mut w = Waiting { base, count, items, least: vec![u32::MAX; 2 * leaves], leaves };
        for t in 0..sections {
            w.least[leaves + t] = w.end(t);
        }
        for v in (1..leaves).rev() {
            w.least[v] = w.least[2 * v].min(w.least[2 * v + 1]);
        }
        w
    }

    /// The least end of what begins at a section.
    fn end(&self, t: usize) -> u32 {
        self.at(t).last().map_or(u32::MAX, |x| x.0)
    }

    /// What begins at a section: end and number of each.
    fn at(&self, t: usize) -> &[(u32, u32)] {
        let base = self.base[t] as usize;
        &self.items[base..base + self.count[t] as usize]
    }

    /// What begins at a section and ends at `end` or before.
    pub(super) fn within(&self, t: usize, end: usize) -> &[(u32, u32)] {
        let all = self.at(t);
        &all[all.partition_point(|x| x.0 as usize > end)..]
    }

    /// The first section from `t` on, and before `end`, at which one begins that ends at `end` or before.
    pub(super) fn from(&self, t: usize, end: usize) -> Option<usize> {
        let fits = |v: usize| self.least[v] as usize <= end;
        let mut v = self.leaves + t;
        if t >= end {
            return None;
        }
        // Up to the first subtree to the right that has one, then down to its leftmost.
        while !fits(v) {
            while v % 2 == 1 {
                v /= 2;
                if v <= 1 {
                    return None;
                }
            }
            v += 1;
        }
        while v < self.leaves {
            v *= 2;
            if !fits(v) {
                v += 1;
            }
        }
        Some(v - self.leaves)
    }

    /// One is placed.
    pub(super) fn take(&mut self, span: &[Range<usize>], i: u32) {
        let t = span[i as usize].start;
        if let Some(at) = self.at(t).iter().position(|x| x.1 == i) {
            let (base, end) = (self.base[t] as usize + at, (self.base[t] + self.count[t]) as usize);
            self.items.copy_within(base + 1..end, base);
            self.count[t] -= 1;
            self.update(t);
        }
    }

    /// One waits again.
    pub(super) fn put_back(&mut self, span: &[Range<usize>], i: u32) {
        let t = span[i as usize].start;
        let item = (span[i as usize].end as u32, i);
        let at = self.base[t] as usize + self.at(t).partition_point(|x| (Reverse(x.0), x.1) < (Reverse(item.0), i));
        let end = (self.base[t] + self.count[t]) as usize;
        self.items.copy_within(at..end, at + 1);
        self.items[at] = item;
        self.count[t] += 1;
        self.update(t);
    }

    fn update(&mut self, t: usize) {
        let mut v = self.leaves + t;
        self.least[v] = self.end(t);
        while v > 1 {
            v /= 2;
            self.least[v] = self.least[2 * v].min(self.least[2 * v + 1]);
        }
    }
}
