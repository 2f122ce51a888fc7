//! Filling from below in steps of the height: a step that costs is done again (see [`super::fill`]).
//!
//! Filling succeeds or not by chance, and a lift once made is not made good. So a step that makes the total larger than it was is done
//! again, from where it began or from before, with other prices of the sections that became too high and of those near them. The
//! best try counts.
//!
//! Prices come from what is alive, or each step's from the heights that sections have reached, rising steeply toward the highest:
//! then all become full at about the same time. Either does better on some sets.
//!
//! Suits many requests whose lives cross at random, of which stacking makes gaps.

use super::Request;
use super::branch::sections;
use super::fill::{Filled, Given};
use super::greedy::Draw;
use super::stack::Stop;
use std::ops::Range;

/// Steps of the height.
const STEPS: u64 = 25;
/// From how many steps before a step is done again at most.
const BACK: usize = 2;
/// How far from its share of the height a section is crowded: prices are high below it; and where they rise steeply.
const CROWDED: f64 = 0.01;
const STEEP: f64 = 0.02;
/// How far prices of other tries are above the first ones at most, as a part of these, and how far from a section that became too
/// high, in lengths of a life.
const NOISE: f64 = 3.0;
const NEAR: f64 = 0.3;
/// What is over the bound (one in so many) and does no harm.
const SPARE: u64 = 500;
/// Work of a copy of a request.
const COPIED: u64 = 4;
/// Work of all steps that are done again: for each request, and at least.
const AGAIN: u64 = 500;
const LEAST: u64 = 3_000_000;

/// A way to fill.
#[derive(Clone, Copy)]
pub(super) struct Way {
    /// How much room is spared (see [`Given`]).
    pub(super) spared: u64,
    /// Whether prices follow the heights that are reached.
    pub(super) steep: bool,
    /// How often a step is done again.
    pub(super) tries: usize,
}

/// Offsets of requests of positive size and length, of which `bound` is the least total; `None` when that takes more than the work
/// that is left, or when told to stop. When it is late no step is done again.
pub(super) fn fill(list: &[Request], bound: u64, way: Way, work: &mut u64, stop: Stop<'_>) -> Option<Vec<u64>> {
    let (span, count) = sections(list);
    let load = loads(list, &span, count);
    let sum: u128 = list.iter().map(|r| u128::from(r.size)).sum();
    let given = Given {
        size: list.iter().map(|r| r.size).collect(),
        target: bound.saturating_add(bound / SPARE),
        mean: (sum / list.len().max(1) as u128) as u64,
        spared: way.spared,
        span,
    };
    let even = prices(&load, given.target, CROWDED);
    let near = (NEAR * life(&given.span)) as usize;
    let mut draw = Draw::new();
    // States between steps, and up to where they are filled.
    let mut before = vec![(Filled::new(&given, &load), 0)];
    let mut again = LEAST.max(AGAIN * list.len() as u64);
    for step in 1.. {
        let until = if step < STEPS { given.target / STEPS * step } else { u64::MAX };
        let mut best = before.last()?.0.clone();
        let reached = best.peaks.most().max(given.target);
        let price = if way.steep { steep(&best.peaks.all(count), reached) } else { even.clone() };
        if !best.advance(&given, &sums(&price), until, work) {
            return None;
        }
        let mut paid = price.clone();
        for k in 0..way.tries {
            if best.peaks.most() <= reached || stop.late() {
                break;
            }
            if stop.told() {
                return None;
            }
            again = again.saturating_sub(COPIED * list.len() as u64);
            let from = before.len().saturating_sub(1 + k / 2 % (BACK + 1));
            let mut pays = paid.clone();
            for at in high(&best.peaks.all(count), reached, near) {
                for s in at {
                    pays[s] = price[s] * (1.0 + NOISE * draw.unit());
                }
            }
            let sums = sums(&pays);
            let mut other = before[from].0.clone();
            let ends = before[from + 1..].iter().map(|b| b.1).chain([until]);
            if !ends.into_iter().all(|until| other.advance(&given, &sums, until, &mut again)) {
                break;
            }
            if other.peaks.most() < best.peaks.most() {
                (best, paid) = (other, pays);
            }
        }
        if best.left == 0 || until == u64::MAX {
            return Some(best.offsets);
        }
        if before.len() > BACK {
            before.remove(0);
        }
        before.push((best, until));
    }
    None
}

/// The sum of sizes alive in each section.
pub(super) fn loads(list: &[Request], span: &[Range<usize>], count: usize) -> Vec<u64> {
    let mut load = vec![0u64; count + 1];
    let mut ends = vec![0u64; count + 1];
    for (r, s) in list.iter().zip(span) {
        load[s.start] = load[s.start].saturating_add(r.size);
        ends[s.end] = ends[s.end].saturating_add(r.size);
    }
    let mut live = 0u64;
    for (l, e) in load.iter_mut().zip(&ends) {
        live = live.saturating_add(*l).saturating_sub(*e);
        *l = live;
    }
    load.truncate(count);
    load
}

/// What a section costs: the more, the less room is to spare.
pub(super) fn prices(load: &[u64], target: u64, near: f64) -> Vec<f64> {
    load.iter().map(|l| 1.0 / (target.saturating_sub(*l) as f64 / target.max(1) as f64 + near)).collect()
}

/// As [`prices`], of heights, and far more for those nearest to the highest.
fn steep(heights: &[u64], most: u64) -> Vec<f64> {
    let mut list = prices(heights, most, STEEP);
    list.iter_mut().for_each(|p| *p = (*p * *p) * (*p * *p));
    list
}

/// Sums of all before each, and of all.
pub(super) fn sums(list: &[f64]) -> Vec<f64> {
    let mut sum = 0.0;
    let add = |x: &f64| {
        sum += x;
        sum
    };
    [0.0].into_iter().chain(list.iter().map(add)).collect()
}

/// The mean length of the lives that a section is part of.
fn life(span: &[Range<usize>]) -> f64 {
    let sum = |of: &dyn Fn(f64) -> f64| span.iter().map(|s| of(s.len() as f64)).sum::<f64>();
    sum(&|x| x * x) / sum(&|x| x).max(1.0)
}

/// Ranges of sections that are higher than `reached`, with those up to `near` on either side.
fn high(heights: &[u64], reached: u64, near: usize) -> Vec<Range<usize>> {
    let mut out: Vec<Range<usize>> = vec![];
    for (s, _) in heights.iter().enumerate().filter(|x| *x.1 > reached) {
        let (from, to) = (s.saturating_sub(near), (s + near + 1).min(heights.len()));
        match out.last_mut() {
            Some(last) if last.end >= from => last.end = to,
            _ => out.push(from..to),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::{check, lower_bound};
    use super::*;

    const WAY: Way = Way { spared: 32, steep: false, tries: 12 };

    fn random(n: usize, seed: u64) -> Vec<Request> {
        let mut draw = super::super::draws(seed | 1);
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
        for steep in [false, true] {
            let way = Way { steep, ..WAY };
            let offsets = fill(&list, bound, way, &mut 50_000_000, Stop::never()).expect("enough work");
            let total = check(&list, &offsets).expect("no two share a byte");
            assert!(total - bound <= bound / 200, "{total} over {bound}, steep {steep}");
        }
    }

    #[test]
    fn few_requests_and_none() {
        let fill = |list: &[Request]| fill(list, lower_bound(list), WAY, &mut 10_000, Stop::never());
        assert_eq!(fill(&[]), Some(vec![]));
        let r = |first, last, size| Request { first, last, size };
        // Two in turn below one that lives through both.
        let list = [r(0, 2, 5), r(2, 4, 5), r(0, 4, 3)];
        assert_eq!(check(&list, &fill(&list).unwrap_or_default()), Ok(8));
        // Apart in time: nothing is above anything.
        let list = [r(0, 2, 5), r(7, 9, 6)];
        assert_eq!(fill(&list), Some(vec![0, 0]));
    }

    #[test]
    fn what_is_late_is_filled_once() {
        let list = random(3000, 7);
        let bound = lower_bound(&list);
        let late = Stop { at: Some(std::time::Instant::now()), ..Stop::never() };
        let offsets = fill(&list, bound, WAY, &mut 50_000_000, late).expect("enough work");
        let once = fill(&list, bound, Way { tries: 0, ..WAY }, &mut 50_000_000, Stop::never());
        assert!(check(&list, &offsets).is_ok());
        assert_eq!(Some(offsets), once);
    }

    #[test]
    fn work_runs_out() {
        let mut work = 50;
        let list = random(3000, 7);
        assert_eq!(fill(&list, lower_bound(&list), WAY, &mut work, Stop::never()), None);
        assert_eq!(work, 0);
    }

    #[test]
    fn sizes_beyond_the_range_saturate() {
        let r = Request { first: 0, last: 3, size: u64::MAX / 2 + 1 };
        let offsets = fill(&[r, r, r], u64::MAX, WAY, &mut 10_000, Stop::never()).unwrap_or_default();
        assert!(check(&[r, r, r], &offsets).is_err());
    }
}
