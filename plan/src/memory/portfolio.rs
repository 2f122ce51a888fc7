//! The depth-first search in many orders, and the capacities it is tried at.
//!
//! One order seldom suits: a search either succeeds after little more than one descent or not in any time. So there are
//! many short ones, each with an order and a way to choose pivots of its own; those that come far are tried again, with
//! noise from a fixed sequence.

use super::Request;
use super::branch::{Branch, Found, Pivot, sections};
use super::greedy::{Draw, lg};
use std::collections::BTreeSet;

/// Requests up to which the search is tried: its depth is their number.
const UP_TO: usize = 2500;
/// Work of the searches at one capacity, at effort 1.
const WORK: u64 = 500_000_000;
/// Nodes of a first search in each order, and of a later one, beyond those of one descent.
const FIRST: u64 = 300;
const LATER: u64 = 1200;
/// Orders that later searches draw from.
const BEST: usize = 14;

/// A way to search: weights of crowd, life and size in the order, and the pivot.
#[derive(Clone, Copy, Debug)]
struct Arm {
    weights: [f64; 3],
    pivot: Pivot,
    /// Sum of the shares placed at best, and number of searches.
    share: f64,
    tries: f64,
}

/// Searches over the requests that are alive at some time.
pub(super) struct Portfolio {
    /// Position of each request among all of them.
    at: Vec<usize>,
    /// Requests alive all the time lie below everything: their offsets, and the height of them all.
    base: Vec<(usize, u64)>,
    height: u64,
    branch: Branch,
    crowd: Vec<f64>,
    life: Vec<f64>,
    size: Vec<f64>,
    grain: u64,
    effort: u64,
}

impl Portfolio {
    /// `None` when there are too many requests, or sizes too large to add up.
    pub(super) fn new(requests: &[Request], effort: u64) -> Option<Portfolio> {
        let live = |i: &usize| requests[*i].first < requests[*i].last && requests[*i].size > 0;
        let all: Vec<usize> = (0..requests.len()).filter(live).collect();
        let sum = all.iter().try_fold(0u64, |a, i| a.checked_add(requests[*i].size))?;
        if all.len() > UP_TO || sum > 1 << 52 {
            return None;
        }
        let list: Vec<Request> = all.iter().map(|i| requests[*i]).collect();
        let (spans, count) = sections(&list);
        let (mut at, mut base, mut height) = (vec![], vec![], 0);
        for (i, s) in all.iter().zip(&spans) {
            if s.len() == count {
                base.push((*i, height));
                height += requests[*i].size;
            } else {
                at.push(*i);
            }
        }
        let rest: Vec<Request> = at.iter().map(|i| requests[*i]).collect();
        let (spans, count) = sections(&rest);
        let mut load = vec![0u64; count];
        for (r, s) in rest.iter().zip(&spans) {
            load[s.clone()].iter_mut().for_each(|x| *x += r.size);
        }
        let crowd = |s: &std::ops::Range<usize>| lg(load[s.clone()].iter().copied().max().unwrap_or(0));
        Some(Portfolio {
            crowd: spans.iter().map(crowd).collect(),
            life: rest.iter().map(|r| lg(r.last - r.first)).collect(),
            size: rest.iter().map(|r| lg(r.size)).collect(),
            branch: Branch::new(&rest),
            grain: all.iter().fold(0, |g, i| gcd(g, requests[*i].size)).max(1),
            at,
            base,
            height,
            effort,
        })
    }

    /// The least total that is at least `bound`: every offset is a sum of sizes.
    pub(super) fn grain(&self, bound: u64) -> u64 {
        bound.next_multiple_of(self.grain)
    }

    /// Tries to reach `target` with so much work; on success the total falls to it or below, on refutation `proven` rises
    /// above it.
    fn lower(&mut self, target: u64, limit: u64, total: &mut u64, proven: &mut u64, offsets: &mut [u64]) -> Found {
        let Some(capacity) = target.checked_sub(self.height) else { return Found::No };
        let mut draw = Draw::new();
        let n = self.at.len() as u64;
        let (mut work, limit) = (0, limit.saturating_mul(self.effort));
        let mut fresh = arms().into_iter();
        let (mut tried, mut turn): (Vec<Arm>, usize) = (vec![], 0);
        // Equal orders only once.
        let mut seen = BTreeSet::new();
        for round in 0.. {
            if work >= limit {
                break;
            }
            // In turn a way not tried yet, without noise, and one of those that came far, with noise.
            let new = if round < BEST || round % 2 == 0 { fresh.next() } else { None };
            let found = if let Some(mut arm) = new {
                self.order(&arm, 0.0, &mut draw);
                if !seen.insert((self.branch.rank.clone(), arm.pivot as u8)) {
                    continue;
                }
                let found = self.branch.search(capacity, arm.pivot, n + FIRST, &mut work);
                (arm.share, arm.tries) = (self.branch.share(), 1.0);
                tried.push(arm);
                found
            } else {
                if turn == 0 {
                    tried.sort_by(|a, b| (b.share / b.tries).total_cmp(&(a.share / a.tries)));
                }
                let Some(arm) = tried.get(turn).copied() else { break };
                self.order(&arm, [0.03, 0.1, 0.3, 0.6][draw.below(4)], &mut draw);
                let found = self.branch.search(capacity, arm.pivot, n + LATER, &mut work);
                tried[turn].share += self.branch.share();
                tried[turn].tries += 1.0;
                turn = (turn + 1) % BEST.min(tried.len());
                found
            };
            if found != Found::Unknown {
                return self.settle(found, target, total, proven, offsets);
            }
        }
        Found::Unknown
    }

    /// Ranks the requests for the next search.
    fn order(&mut self, arm: &Arm, noise: f64, draw: &mut Draw) {
        let [crowd, life, size] = arm.weights;
        let mut keys: Vec<(f64, u32)> = (0..self.at.len())
            .map(|i| {
                let score = crowd * self.crowd[i] + life * self.life[i] + size * self.size[i];
                (score + noise * draw.unit(), i as u32)
            })
            .collect();
        keys.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        for (rank, (_, i)) in keys.iter().enumerate() {
            self.branch.rank[*i as usize] = rank as u32;
        }
    }

    /// Notes what a search found.
    fn settle(&self, found: Found, target: u64, total: &mut u64, proven: &mut u64, offsets: &mut [u64]) -> Found {
        if found == Found::No {
            *proven = (*proven).max(target + self.grain);
            return found;
        }
        offsets.fill(0);
        for (i, o) in &self.base {
            offsets[*i] = *o;
        }
        *total = self.height;
        for (k, i) in self.at.iter().enumerate() {
            offsets[*i] = self.height + self.branch.offset[k];
            *total = (*total).max(offsets[*i] + self.branch.size(k));
        }
        found
    }

    /// Tries the lower bound and, if there is one, the goal, with a part of the work.
    pub(super) fn begin(
        &mut self,
        goal: Option<u64>,
        part: u64,
        total: &mut u64,
        proven: &mut u64,
        offsets: &mut [u64],
    ) {
        let bound = *proven;
        let between = |g: &u64| *g > bound && *g < *total;
        match goal.map(|g| g / self.grain * self.grain).filter(between) {
            Some(g) => {
                self.lower(g, WORK / part, total, proven, offsets);
                self.lower(bound, WORK / 8 / part, total, proven, offsets);
            }
            None => {
                self.lower(bound, WORK / part, total, proven, offsets);
            }
        }
    }

    /// Tries capacities between what is proven and what is reached, by halves.
    pub(super) fn squeeze(&mut self, total: &mut u64, proven: &mut u64, offsets: &mut [u64]) {
        let mut failed = *proven;
        for _ in 0..3 {
            failed = failed.max(*proven);
            if *total <= *proven || *total - failed <= self.grain {
                break;
            }
            let target = failed + (*total - failed) / 2 / self.grain * self.grain;
            if target <= failed || *total - failed < *total / 1000 {
                break;
            }
            if self.lower(target, WORK / 16, total, proven, offsets) != Found::Yes {
                failed = target;
            }
        }
    }
}

/// All ways to search, those that did best on graphs of models first.
fn arms() -> Vec<Arm> {
    let mut list = vec![];
    for pivot in [Pivot::First, Pivot::Fewest, Pivot::Lowest] {
        for crowd in [100.0, 1.0, 0.0] {
            for life in [2.0, 1.0, 0.5] {
                for size in [0.25, 1.0, 0.5, 0.0] {
                    list.push(Arm { weights: [crowd, life, size], pivot, share: 0.0, tries: 0.0 });
                }
            }
        }
    }
    list
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}
