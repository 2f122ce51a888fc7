//! Placements for many requests: each at the top of what lies in its time, gaps below are not filled.
//!
//! What is alive within another's time is stacked without loss when the longer one goes first, which is what training
//! makes of a model. A tree over the sections of time keeps the heights, so an order costs `n log n`, however many
//! requests are alive at once. Where that does not reach the bound they are filled from below (see [`super::steps`]); many are in
//! two ways on two threads, where those of few sizes are laid in rows in the second (see [`super::rows`]), and what is still not near
//! the bound is repaired (see [`super::repair`]). What comes near it is filled once more without lifts, which suits layers. Where there
//! is a time limit, what would exceed it is left out.

use super::Request;
use super::branch::sections;
use super::greedy::lg;
use super::repair::repair;
use super::rows;
use super::solve::beside;
use super::steps::{Way, fill};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Looks at waiting requests of all skylines at most.
const LOOKS: u64 = 5_000_000;
/// So many requests are not tried further once they are within a thousandth of the bound.
pub(super) const MANY: usize = 5000;
/// Work of filling from below.
const WORK: u64 = 60_000_000;
/// Work of rows before that.
const ROWS: u64 = 100_000_000;
/// Over the bound (one in so many) many requests are near it: they are repaired where they are not.
const NEAR: u64 = 334;
/// Two ways to fill many, what is crowded for the repair after each, and its work.
const WAYS: [(Way, f64, u64); 2] = [
    (Way { spared: 64, steep: true, tries: 6 }, 0.01, 3_000_000),
    (Way { spared: 64, steep: false, tries: 6 }, 0.1, 8_000_000),
];
/// Without lifts at once: for few, and for many that are near the bound.
const FEW: Way = Way { spared: 1, steep: false, tries: 12 };
const FLAT: Way = Way { tries: 6, ..FEW };
/// What is over the bound (one in so many) and need not be filled without lifts too.
const LITTLE: u64 = 4000;

/// When to stop.
#[derive(Clone, Copy)]
pub(super) struct Stop<'a> {
    pub(super) told: &'a AtomicBool,
    /// When it is late.
    pub(super) at: Option<Instant>,
}

impl Stop<'_> {
    /// Not at all.
    pub(super) fn never() -> Stop<'static> {
        static NEVER: AtomicBool = AtomicBool::new(false);
        Stop { told: &NEVER, at: None }
    }

    /// Whether what is found does not count any more.
    pub(super) fn told(&self) -> bool {
        self.told.load(Ordering::Relaxed)
    }

    /// Whether the time is over: what is there should be made complete.
    pub(super) fn late(&self) -> bool {
        self.at.is_some_and(|at| Instant::now() >= at)
    }
}

/// Heights over sections: the largest of a range, and one height for a range.
struct Heights {
    leaves: usize,
    most: Vec<u64>,
    /// The height of all below a node, or `u64::MAX` where they differ.
    all: Vec<u64>,
}

impl Heights {
    fn new(sections: usize) -> Heights {
        let leaves = sections.next_power_of_two();
        Heights { leaves, most: vec![0; 2 * leaves], all: vec![0; 2 * leaves] }
    }

    fn most(&self, v: usize, at: Range<usize>, of: &Range<usize>) -> u64 {
        if of.start <= at.start && at.end <= of.end {
            return self.most[v];
        }
        if self.all[v] != u64::MAX {
            return self.all[v];
        }
        let m = at.start.midpoint(at.end);
        let left = if of.start < m { self.most(2 * v, at.start..m, of) } else { 0 };
        let right = if of.end > m { self.most(2 * v + 1, m..at.end, of) } else { 0 };
        left.max(right)
    }

    fn set(&mut self, v: usize, at: Range<usize>, of: &Range<usize>, height: u64) {
        if of.start <= at.start && at.end <= of.end {
            (self.most[v], self.all[v]) = (height, height);
            return;
        }
        if self.all[v] != u64::MAX {
            for c in [2 * v, 2 * v + 1] {
                (self.most[c], self.all[c]) = (self.all[v], self.all[v]);
            }
            self.all[v] = u64::MAX;
        }
        let m = at.start.midpoint(at.end);
        if of.start < m {
            self.set(2 * v, at.start..m, of, height);
        }
        if of.end > m {
            self.set(2 * v + 1, m..at.end, of, height);
        }
        self.most[v] = self.most[2 * v].max(self.most[2 * v + 1]);
    }
}

/// The best of several stackings and skylines: total and offsets. Stops at `bound`. Many are not improved any more from a time on,
/// if there is one.
pub(super) fn stack(requests: &[Request], bound: u64, until: Option<Instant>) -> (u64, Vec<u64>) {
    let live: Vec<u32> = (0..requests.len() as u32)
        .filter(|i| {
            let r = &requests[*i as usize];
            r.first < r.last && r.size > 0
        })
        .collect();
    let list: Vec<Request> = live.iter().map(|i| requests[*i as usize]).collect();
    let (span, count) = sections(&list);
    if count == 0 {
        return (0, vec![0; requests.len()]);
    }
    let life = |r: &Request| r.last - r.first;
    let area = |r: &Request| u128::from(r.size) * u128::from(life(r));
    type By<'k> = &'k dyn Fn(&Request) -> u128;
    let keys: [By<'_>; 4] = [&|r| u128::from(life(r)), &area, &|r| u128::from(r.size), &|r| {
        ((lg(r.size) + 2.0 * lg(life(r))) * 1e6) as u128
    }];
    let mut best = (u64::MAX, vec![]);
    let mut take = |offsets: Vec<u64>| {
        let total = top(&list, &offsets);
        if total < best.0 {
            best = (total, offsets);
        }
        let near = if list.len() > MANY { bound / 1000 } else { 0 };
        best.0.saturating_sub(bound) <= near
    };
    let order = |key: By<'_>| {
        let mut order: Vec<u32> = (0..list.len() as u32).collect();
        super::sort::by_key(&mut order, &|i| (u128::MAX - key(&list[i as usize]), u128::from(list[i as usize].first)));
        order
    };
    let mut looks = 0;
    let stop = Stop { at: until, ..Stop::never() };
    let _ = take(pile(&list, &span, count, &order(keys[0])))
        // Lives that cross at random leave gaps in every stack.
        || filled(&list, bound, stop).into_iter().flatten().any(&mut take)
        || keys[1..].iter().any(|key| !stop.late() && take(pile(&list, &span, count, &order(key))))
        || list.len() <= MANY
            && keys.iter().any(|key| take(lowest(&list, &span, count, &order(key), &mut looks)));
    let mut offsets = vec![0; requests.len()];
    for (i, o) in live.iter().zip(best.1) {
        offsets[*i as usize] = o;
    }
    (best.0, offsets)
}

/// Offsets filled from below: of few in one way, of many in two unless the first comes near the bound, and once more where one does.
fn filled(list: &[Request], bound: u64, stop: Stop<'_>) -> Vec<Option<Vec<u64>>> {
    let near = bound.saturating_add(bound / NEAR);
    if list.len() <= MANY {
        return vec![fill(list, bound, FEW, &mut { WORK }, Stop { at: None, ..stop })];
    }
    let suit = rows::suit(list);
    let way = |(way, crowded, work): (Way, f64, u64), rows: bool, stop: Stop<'_>| {
        let offsets = match rows {
            true => rows::rows(list, bound, way, (ROWS, &mut { WORK }), stop)?,
            false => fill(list, bound, way, &mut { WORK }, stop)?,
        };
        if top(list, &offsets) <= near {
            return Some(offsets);
        }
        repair(list, &offsets, near, crowded, &mut { work }, stop).or(Some(offsets))
    };
    let mut far = None;
    let first = || {
        let offsets = way(WAYS[0], false, stop)?;
        if top(list, &offsets) > near {
            far = Some(offsets);
            return None;
        }
        Some(offsets)
    };
    let (a, b) = beside(true, first, |told| way(WAYS[1], suit, Stop { told, ..stop }));
    let mut found = vec![a.or(far), b];
    let best = found.iter().flatten().map(|offsets| top(list, offsets)).min();
    if !stop.late() && best.is_some_and(|t| t <= near && t > bound.saturating_add(bound / LITTLE)) {
        found.push(fill(list, bound, FLAT, &mut { WORK }, stop));
    }
    // Many are not tried further as soon as one will do.
    let total = |f: &Option<Vec<u64>>| f.as_ref().map_or(u64::MAX, |offsets| top(list, offsets));
    if let Some(best) = (0..found.len()).min_by_key(|k| total(&found[*k])) {
        found.swap(0, best);
    }
    found
}

/// One past the last byte.
fn top(list: &[Request], offsets: &[u64]) -> u64 {
    offsets.iter().zip(list).map(|(o, r)| o.saturating_add(r.size)).max().unwrap_or(0)
}

/// Each in turn on top of what is there.
fn pile(list: &[Request], span: &[Range<usize>], count: usize, order: &[u32]) -> Vec<u64> {
    let mut heights = Heights::new(count);
    let all = 0..heights.leaves;
    let mut offsets = vec![0; list.len()];
    for &i in order {
        let i = i as usize;
        offsets[i] = heights.most(1, all.clone(), &span[i]);
        heights.set(1, all.clone(), &span[i], offsets[i].saturating_add(list[i].size));
    }
    offsets
}

/// Always the one that can lie lowest; in turn where several can.
fn lowest(list: &[Request], span: &[Range<usize>], count: usize, order: &[u32], looks: &mut u64) -> Vec<u64> {
    let mut heights = Heights::new(count);
    let all = 0..heights.leaves;
    let mut offsets = vec![0; list.len()];
    let mut waiting: BinaryHeap<Reverse<(u64, u32)>> = (0..order.len() as u32).map(|k| Reverse((0, k))).collect();
    while let Some(Reverse((at, k))) = waiting.pop() {
        let i = order[k as usize] as usize;
        let offset = heights.most(1, all.clone(), &span[i]);
        *looks += 1;
        // When too many wait too long, the rest goes where it can at once.
        if offset > at && *looks < LOOKS {
            waiting.push(Reverse((offset, k)));
            continue;
        }
        offsets[i] = offset;
        heights.set(1, all.clone(), &span[i], offset.saturating_add(list[i].size));
    }
    offsets
}
