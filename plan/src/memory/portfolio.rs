//! The depth-first search in many orders, and the capacities it is tried at.
//!
//! One order seldom suits: a search either succeeds after little more than one descent or not in any time. So there are
//! many short ones, each with an order and a way to choose pivots of its own; those that come far are tried again, with
//! noise from a fixed sequence.

use super::Request;
use super::branch::{Branch, Found, Pivot, sections};
use super::greedy::{Draw, lg};
use super::solve::beside;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};

/// Requests up to which the search is tried: its depth is their number.
const UP_TO: usize = 2500;
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

/// Where searches at one capacity stand.
pub(super) struct Hunt {
    draw: Draw,
    fresh: std::vec::IntoIter<Arm>,
    tried: Vec<Arm>,
    turn: usize,
    round: usize,
    /// Equal orders only once.
    seen: BTreeSet<(Vec<u32>, u8)>,
}

impl Hunt {
    /// With a sequence of numbers of its own.
    pub(super) fn new(number: u64) -> Hunt {
        let fresh = arms().into_iter();
        Hunt { draw: Draw::number(number), fresh, tried: vec![], turn: 0, round: 0, seen: BTreeSet::new() }
    }
}

/// Searches over the requests that are alive at some time.
#[derive(Clone)]
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
    /// Number of all requests.
    count: usize,
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
            count: requests.len(),
        })
    }

    /// The least total that is at least `bound`: every offset is a sum of sizes.
    pub(super) fn grain(&self, bound: u64) -> u64 {
        bound.next_multiple_of(self.grain)
    }

    /// Tries to reach `target` with so much work, going on with a hunt, and gives up when told to. When it is refuted, `proven` rises
    /// above it.
    pub(super) fn lower(
        &mut self,
        hunt: &mut Hunt,
        target: u64,
        limit: u64,
        proven: &mut u64,
        stop: &AtomicBool,
    ) -> Option<Vec<u64>> {
        let capacity = target.checked_sub(self.height)?;
        let n = self.at.len() as u64;
        let (mut work, limit) = (0, limit.saturating_mul(self.effort));
        while work < limit && !stop.load(Ordering::Relaxed) {
            // In turn a way not tried yet, without noise, and one of those that came far, with noise.
            let round = hunt.round;
            hunt.round += 1;
            let new = if round < BEST || round.is_multiple_of(2) { hunt.fresh.next() } else { None };
            let found = if let Some(mut arm) = new {
                self.order(&arm, 0.0, &mut hunt.draw);
                if !hunt.seen.insert((self.branch.rank.clone(), arm.pivot as u8)) {
                    continue;
                }
                let found = self.branch.search(capacity, arm.pivot, n + FIRST, &mut work);
                (arm.share, arm.tries) = (self.branch.share(), 1.0);
                hunt.tried.push(arm);
                found
            } else {
                if hunt.turn == 0 {
                    let mut shares: Vec<(f64, u32)> =
                        hunt.tried.iter().zip(0..).map(|(a, i)| (a.share / a.tries, i)).collect();
                    super::sort::falling(&mut shares);
                    hunt.tried = shares.iter().map(|(_, i)| hunt.tried[*i as usize]).collect();
                }
                let arm = hunt.tried.get(hunt.turn).copied()?;
                self.order(&arm, [0.03, 0.1, 0.3, 0.6][hunt.draw.below(4)], &mut hunt.draw);
                let found = self.branch.search(capacity, arm.pivot, n + LATER, &mut work);
                hunt.tried[hunt.turn].share += self.branch.share();
                hunt.tried[hunt.turn].tries += 1.0;
                hunt.turn = (hunt.turn + 1) % BEST.min(hunt.tried.len());
                found
            };
            match found {
                Found::Unknown => {}
                Found::No => {
                    *proven = (*proven).max(target + self.grain);
                    return None;
                }
                Found::Yes => return Some(self.offsets()),
            }
        }
        None
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
        super::sort::falling(&mut keys);
        for (rank, (_, i)) in keys.iter().enumerate() {
            self.branch.rank[*i as usize] = rank as u32;
        }
    }

    /// The offsets that the last search found.
    fn offsets(&self) -> Vec<u64> {
        let mut offsets = vec![0; self.count];
        for (i, o) in &self.base {
            offsets[*i] = *o;
        }
        for (k, i) in self.at.iter().enumerate() {
            offsets[*i] = self.height + self.branch.offset[k];
        }
        offsets
    }

    /// The total that the last search found.
    fn top(&self) -> u64 {
        let tops = (0..self.at.len()).map(|k| self.height + self.branch.offset[k] + self.branch.size(k));
        tops.max().unwrap_or(self.height)
    }

    /// Tries capacities between one that failed and what is reached, by halves, with so much work at each and in all. What is reached
    /// falls, what failed and what is proven rise. A twin searches beside it, on another
    /// thread if there may be one.
    pub(super) fn descend(
        &mut self,
        mut twin: Option<(&mut Portfolio, bool)>,
        (failed, proven): (&mut u64, &mut u64),
        total: &mut u64,
        (each, all): (u64, u64),
        stop: &AtomicBool,
    ) -> Option<Vec<u64>> {
        let mut best = None;
        for _ in 0..all / each.max(1) {
            *failed = (*failed).max(*proven);
            if *total <= *proven || *total - *failed <= self.grain {
                break;
            }
            let target = *failed + (*total - *failed) / 2 / self.grain * self.grain;
            if target <= *failed || *total - *failed < *total / 1000 {
                break;
            }
            let search = |p: &mut Portfolio, number: u64, stop: &AtomicBool| {
                let mut least = target;
                let found = p.lower(&mut Hunt::new(number), target, each, &mut least, stop);
                // What is refuted is so for both.
                (found.is_some() || least > target).then(|| found.map(|offsets| (p.top(), offsets)))
            };
            let (a, b) = match &mut twin {
                Some((twin, threads)) => beside(*threads, || search(self, 0, stop), |stop| search(twin, 1, stop)),
                None => (search(self, 0, stop), None),
            };
            let found = match a.or(b) {
                Some(None) => {
                    *proven = (*proven).max(target + self.grain);
                    None
                }
                found => found.flatten(),
            };
            match found {
                Some((top, offsets)) => {
                    *total = top.max(*proven).min(target);
                    best = Some(offsets);
                }
                None => *failed = target,
            }
        }
        best
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
