//! Placements that grow from below without gaps: the lowest stretch of the skyline is filled next, by what begins and
//! ends within it.
//!
//! What counts is not how full a stretch gets but how full the sections get that decide the total. So a tree holds for
//! every section the height that it will have at least: its skyline plus all that is still to be placed there. Placing
//! leaves it as it is, only room given up raises it. Of the requests that fit into the lowest stretch one is taken that
//! covers the section where this height is largest; among those the key decides. Where nothing fits, the stretch is
//! lifted to its lower neighbour.
//!
//! Suits many requests whose lives cross at random, of which stacking makes gaps.

use super::Request;
use super::branch::sections;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

/// What is preferred among the requests that fit and cover the section that counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Key {
    /// A long life, and an edge that meets an edge of the stretch.
    Snug,
    /// A long life.
    Long,
    /// Many bytes.
    Large,
    /// Long and large.
    Area,
}

/// Sums over sections: adds to a range, and finds the largest of a range.
struct Peaks {
    leaves: usize,
    most: Vec<u64>,
    add: Vec<u64>,
    at: Vec<u32>,
}

impl Peaks {
    fn new(load: &[u64]) -> Peaks {
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

    fn raise(&mut self, v: usize, at: Range<usize>, of: &Range<usize>, by: u64) {
        if of.start <= at.start && at.end <= of.end {
            self.most[v] = self.most[v].saturating_add(by);
            self.add[v] = self.add[v].saturating_add(by);
            return;
        }
        let m = at.start.midpoint(at.end);
        if of.start < m {
            self.raise(2 * v, at.start..m, of, by);
        }
        if of.end > m {
            self.raise(2 * v + 1, m..at.end, of, by);
        }
        self.pull(v);
    }

    /// The largest of a range and the first section that has it.
    fn peak(&self, v: usize, at: Range<usize>, of: &Range<usize>) -> (u64, u32) {
        if of.start <= at.start && at.end <= of.end {
            return (self.most[v], self.at[v]);
        }
        let m = at.start.midpoint(at.end);
        let left = if of.start < m { Some(self.peak(2 * v, at.start..m, of)) } else { None };
        let right = if of.end > m { Some(self.peak(2 * v + 1, m..at.end, of)) } else { None };
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
struct Stretch {
    from: usize,
    to: usize,
    height: u64,
    before: usize,
    after: usize,
    alive: bool,
}

const NONE: usize = usize::MAX;

struct Skyline {
    stretches: Vec<Stretch>,
    /// By height, then from the left; entries of stretches that are no more are skipped.
    lowest: BinaryHeap<Reverse<(u64, usize, usize)>>,
}

impl Skyline {
    fn new(count: usize) -> Skyline {
        let all = Stretch { from: 0, to: count, height: 0, before: NONE, after: NONE, alive: true };
        Skyline { stretches: vec![all], lowest: BinaryHeap::from([Reverse((0, 0, 0))]) }
    }

    fn next(&mut self) -> Option<usize> {
        while let Some(Reverse((height, _, k))) = self.lowest.pop() {
            if self.stretches[k].alive && self.stretches[k].height == height {
                return Some(k);
            }
        }
        None
    }

    fn height(&self, k: usize) -> u64 {
        if k == NONE { u64::MAX } else { self.stretches[k].height }
    }

    /// Replaces a stretch by parts from left to right, joined to neighbours of equal height.
    fn replace(&mut self, k: usize, parts: &mut [(usize, usize, u64)]) {
        let Stretch { mut before, mut after, .. } = self.stretches[k];
        self.stretches[k].alive = false;
        let Some(first) = parts.first_mut() else { return };
        if self.height(before) == first.2 && before != NONE {
            first.0 = self.stretches[before].from;
            self.stretches[before].alive = false;
            before = self.stretches[before].before;
        }
        let Some(last) = parts.last_mut() else { return };
        if self.height(after) == last.2 && after != NONE {
            last.1 = self.stretches[after].to;
            self.stretches[after].alive = false;
            after = self.stretches[after].after;
        }
        for &mut (from, to, height) in parts {
            let id = self.stretches.len();
            self.stretches.push(Stretch { from, to, height, before, after: NONE, alive: true });
            if before != NONE {
                self.stretches[before].after = id;
            }
            before = id;
            self.lowest.push(Reverse((height, from, id)));
        }
        self.stretches[before].after = after;
        if after != NONE {
            self.stretches[after].before = before;
        }
    }
}

/// The requests not placed, by their first section; the one that ends last comes first.
struct Waiting {
    starts: Vec<Vec<u32>>,
    /// A tree over the sections: the least end of what begins there.
    least: Vec<u32>,
    leaves: usize,
}

impl Waiting {
    fn new(span: &[Range<usize>], count: usize) -> Waiting {
        let mut starts = vec![vec![]; count];
        for (i, s) in span.iter().enumerate() {
            starts[s.start].push(i as u32);
        }
        for list in &mut starts {
            list.sort_by_key(|i: &u32| (Reverse(span[*i as usize].end), *i));
        }
        let leaves = count.next_power_of_two();
        let mut least = vec![u32::MAX; 2 * leaves];
        for (t, list) in starts.iter().enumerate() {
            least[leaves + t] = list.last().map_or(u32::MAX, |i| span[*i as usize].end as u32);
        }
        for v in (1..leaves).rev() {
            least[v] = least[2 * v].min(least[2 * v + 1]);
        }
        Waiting { starts, least, leaves }
    }

    /// The first section from `t` on, and before `end`, at which one begins that ends at `end` or before.
    fn from(&self, t: usize, end: usize) -> Option<usize> {
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

    fn take(&mut self, span: &[Range<usize>], i: u32) {
        let start = span[i as usize].start;
        let list = &mut self.starts[start];
        list.retain(|x| *x != i);
        let mut v = self.leaves + start;
        self.least[v] = list.last().map_or(u32::MAX, |i| span[*i as usize].end as u32);
        while v > 1 {
            v /= 2;
            self.least[v] = self.least[2 * v].min(self.least[2 * v + 1]);
        }
    }
}

/// Offsets of requests of positive size and length; `None` when that takes more than the looks that are left.
pub(super) fn fill(list: &[Request], key: Key, looks: &mut u64) -> Option<Vec<u64>> {
    let (span, count) = sections(list);
    let mut load = vec![0u64; count + 1];
    let mut ends = vec![0u64; count + 1];
    for (r, s) in list.iter().zip(&span) {
        load[s.start] = load[s.start].saturating_add(r.size);
        ends[s.end] = ends[s.end].saturating_add(r.size);
    }
    let mut live = 0u64;
    for (l, e) in load.iter_mut().zip(&ends) {
        live = live.saturating_add(*l).saturating_sub(*e);
        *l = live;
    }
    load.truncate(count);
    let mut peaks = Peaks::new(&load);
    let mut waiting = Waiting::new(&span, count);
    let mut skyline = Skyline::new(count);
    let mut offsets = vec![0; list.len()];
    let mut left = list.len();
    while left > 0 {
        let Some(k) = skyline.next() else { break };
        let Stretch { from, to, height, before, after, .. } = skyline.stretches[k];
        let (_, section) = peaks.peak(1, 0..peaks.leaves, &(from..to));
        let found = best(list, &span, &waiting, from..to, section as usize, key, looks);
        if *looks == 0 {
            return None;
        }
        if let Some(i) = found {
            let (i, s) = (i as usize, span[i as usize].clone());
            waiting.take(&span, i as u32);
            offsets[i] = height;
            left -= 1;
            let mut parts =
                [(from, s.start, height), (s.start, s.end, height.saturating_add(list[i].size)), (s.end, to, height)];
            let a = usize::from(from == s.start);
            let b = 3 - usize::from(s.end == to);
            skyline.replace(k, &mut parts[a..b]);
        } else {
            let up = skyline.height(before).min(skyline.height(after));
            if up == u64::MAX {
                break;
            }
            let leaves = peaks.leaves;
            peaks.raise(1, 0..leaves, &(from..to), up - height);
            skyline.replace(k, &mut [(from, to, up)]);
        }
    }
    Some(offsets)
}

/// The request to place into a stretch: of those that lie within it one that covers `section`, if any does.
fn best(
    list: &[Request],
    span: &[Range<usize>],
    waiting: &Waiting,
    within: Range<usize>,
    section: usize,
    key: Key,
    looks: &mut u64,
) -> Option<u32> {
    let mut best: (bool, f64, u32) = (false, -1.0, u32::MAX);
    let mut next = waiting.from(within.start, within.end);
    while let Some(s) = next {
        // None that begins after the section covers it.
        if best.2 != u32::MAX && s > section {
            break;
        }
        // None that begins here or later is longer than what is left of the stretch.
        let longest = (within.end - s) as f64;
        if best.0 && matches!(key, Key::Long | Key::Snug) && best.1 >= longest {
            break;
        }
        let here = &waiting.starts[s];
        let first = here.partition_point(|i| span[*i as usize].end > within.end);
        *looks = looks.saturating_sub(1 + (here.len() - first) as u64);
        for &i in &here[first..] {
            let (r, t) = (&list[i as usize], &span[i as usize]);
            let covers = t.start <= section && section < t.end;
            let long = t.len() as f64;
            let score = match key {
                Key::Snug => long / (1 + (t.start - within.start).min(within.end - t.end)) as f64,
                Key::Long => long,
                Key::Large => r.size as f64,
                Key::Area => long * (r.size as f64).sqrt(),
            };
            if best.2 == u32::MAX || (covers, score) > (best.0, best.1) {
                best = (covers, score, i);
            }
            if matches!(key, Key::Long | Key::Snug) && covers {
                // The next ones here end sooner.
                break;
            }
        }
        next = waiting.from(s + 1, within.end);
    }
    (best.2 != u32::MAX).then_some(best.2)
}

#[cfg(test)]
mod tests {
    use super::super::{check, lower_bound};
    use super::*;

    fn random(n: usize, seed: u64) -> Vec<Request> {
        let mut x = seed | 1;
        let mut draw = |below: u64| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x >> 11) % below
        };
        (0..n)
            .map(|_| {
                let (a, b) = (draw(100_000), draw(100_000));
                Request { first: a.min(b), last: a.max(b) + 1, size: 1 + draw(1_000_000) }
            })
            .collect()
    }

    #[test]
    fn crossing_lives_fill_to_the_bound() {
        let list = random(3000, 7);
        let bound = lower_bound(&list);
        for key in [Key::Snug, Key::Long, Key::Large, Key::Area] {
            let total =
                check(&list, &fill(&list, key, &mut 10_000_000).expect("enough looks")).expect("no two share a byte");
            assert!(total - bound <= bound / 50, "{key:?}: {total} over {bound}");
        }
    }

    #[test]
    fn few_requests_and_none() {
        let fill = |list: &[Request], key| fill(list, key, &mut 100);
        assert_eq!(fill(&[], Key::Long), Some(vec![]));
        let r = |first, last, size| Request { first, last, size };
        // Two in turn below one that lives through both.
        let list = [r(0, 2, 5), r(2, 4, 5), r(0, 4, 3)];
        assert_eq!(check(&list, &fill(&list, Key::Long).unwrap_or_default()), Ok(8));
        // Apart in time: nothing is above anything.
        let list = [r(0, 2, 5), r(7, 9, 6)];
        assert_eq!(fill(&list, Key::Snug), Some(vec![0, 0]));
    }

    #[test]
    fn looks_run_out() {
        let mut looks = 50;
        assert_eq!(fill(&random(3000, 7), Key::Area, &mut looks), None);
        assert_eq!(looks, 0);
    }

    #[test]
    fn sizes_beyond_the_range_saturate() {
        let r = Request { first: 0, last: 3, size: u64::MAX / 2 + 1 };
        let offsets = fill(&[r, r, r], Key::Long, &mut 100).unwrap_or_default();
        assert!(check(&[r, r, r], &offsets).is_err());
    }
}
