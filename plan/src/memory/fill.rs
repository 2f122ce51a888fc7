//! Placements that grow from below without gaps: the lowest stretch of the skyline is filled next, by what begins and
//! ends within it.
//!
//! What counts is not how full a stretch gets but how full the sections get that decide the total. So a tree holds for
//! every section the height that it will have at least: its skyline plus all that is still to be placed there. Placing
//! leaves it as it is, only room given up raises it. Of the requests that fit into the lowest stretch one is taken that
//! covers the section where this height is largest; among those the one that covers most, crowded sections counting for
//! more. Where nothing fits, the stretch is lifted to its lower neighbour.
//!
//! Few sections are so crowded that a lift there costs: mostly one of them lies at the edge of a narrow stretch, while all
//! that covers it is longer. Then what lies beside the stretch, with nothing above it, is taken out again, and something
//! takes its place that covers the section.
//!
//! That succeeds or not by chance, and a lift once made is not made good. So the height is gone through in steps, and one
//! that costs is done again, with other prices of crowded sections, from where it began or from before.
//!
//! Suits many requests whose lives cross at random, of which stacking makes gaps.

use super::Request;
use super::branch::sections;
use super::skyline::{Peaks, Skyline, Stretch, Waiting};
use std::ops::Range;

/// Steps of the height.
const STEPS: u64 = 25;
/// How far from its share of the height a section is crowded: prices are high below it. The first is for all steps, the others for
/// steps done again.
const CROWDED: [f64; 7] = [0.01, 0.003, 0.03, 0.02, 0.006, 0.05, 0.015];
/// How many steps before one that costs the tries with the other prices begin.
const BACK: [usize; 6] = [0, 0, 1, 1, 2, 2];
/// What is over the bound (one in so many) and does no harm.
const SPARE: u64 = 500;
/// So often one request is taken out again, and so many of them on either side of a stretch.
const OUT: u8 = 8;
const BESIDE: usize = 2;
/// Requests looked at to take the place of what is taken out.
const TRIED: u64 = 1000;
/// Work of a request that is placed, beyond what is looked at and a part of the sections that it covers; of a copy of a request.
const PLACED: u64 = 60;
const COVERED: usize = 16;
const COPIED: u64 = 4;
/// Work of all steps that are done again: for each request, and at least.
const AGAIN: u64 = 500;
const LEAST: u64 = 3_000_000;

const NONE: u32 = u32::MAX;

/// What does not change.
struct Given {
    size: Vec<u64>,
    span: Vec<Range<usize>>,
    target: u64,
}

/// What is placed so far.
#[derive(Clone)]
struct Filled {
    peaks: Peaks,
    waiting: Waiting,
    skyline: Skyline,
    offsets: Vec<u64>,
    left: usize,
    /// For every section what lies topmost, if nothing was given up above it.
    top: Vec<u32>,
    /// How often each was taken out.
    out: Vec<u8>,
}

/// A request that takes the place of some beside a stretch.
#[derive(Clone, Copy)]
struct Instead {
    /// The height that it makes sections have at least.
    cost: u64,
    gain: f64,
    request: u32,
    left: usize,
    right: usize,
}

/// Offsets of requests of positive size and length, of which `bound` is the least total; `None` when that takes more than the work
/// that is left.
pub(super) fn fill(list: &[Request], bound: u64, work: &mut u64) -> Option<Vec<u64>> {
    let (span, count) = sections(list);
    let load = loads(list, &span, count);
    let given =
        Given { size: list.iter().map(|r| r.size).collect(), span, target: bound.saturating_add(bound / SPARE) };
    let prices = CROWDED.map(|near| prices(&load, given.target, near));
    let mut before = vec![Filled {
        peaks: Peaks::new(&load),
        waiting: Waiting::new(&given.span, count),
        skyline: Skyline::new(count),
        offsets: vec![0; list.len()],
        left: list.len(),
        top: vec![NONE; count],
        out: vec![0; list.len()],
    }];
    let mut again = LEAST.max(AGAIN * list.len() as u64);
    for step in 1.. {
        let until = if step < STEPS { given.target / STEPS * step } else { u64::MAX };
        let from = |back: usize| before[before.len().saturating_sub(1 + back)].clone();
        let mut best = from(0);
        let reached = best.peaks.most().max(given.target);
        if !best.advance(&given, &prices[0], until, work) {
            return None;
        }
        for (price, back) in prices[1..].iter().zip(BACK) {
            if best.peaks.most() <= reached {
                break;
            }
            again = again.saturating_sub(COPIED * list.len() as u64);
            let mut other = from(back);
            if !other.advance(&given, price, until, &mut again) {
                break;
            }
            if other.peaks.most() < best.peaks.most() {
                best = other;
            }
        }
        if best.left == 0 || until == u64::MAX {
            return Some(best.offsets);
        }
        if before.len() > BACK[BACK.len() - 1] {
            before.remove(0);
        }
        before.push(best);
    }
    None
}

/// The sum of sizes alive in each section.
fn loads(list: &[Request], span: &[Range<usize>], count: usize) -> Vec<u64> {
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

/// Sums of the prices of all sections before each: the more, the less room is to spare.
fn prices(load: &[u64], target: u64, near: f64) -> Vec<f64> {
    let mut sums = vec![0.0];
    let mut sum = 0.0;
    for l in load {
        sum += 1.0 / (target.saturating_sub(*l) as f64 / target.max(1) as f64 + near);
        sums.push(sum);
    }
    sums
}

impl Filled {
    /// Fills until the lowest stretch is as high as `until`. `false` when that takes more than the work that is left.
    fn advance(&mut self, given: &Given, price: &[f64], until: u64, work: &mut u64) -> bool {
        while self.left > 0 {
            let Some(k) = self.skyline.lowest() else { break };
            let Stretch { from, to, height, before, after, .. } = self.skyline.stretch(k);
            if height >= until {
                break;
            }
            let (peak, section) = self.peaks.peak(&(from..to));
            let found = self.best(from..to, section, price, work);
            *work = work.saturating_sub(PLACED);
            if *work == 0 {
                return false;
            }
            let up = self.skyline.height(before).min(self.skyline.height(after));
            let covers = found.is_some_and(|i| given.span[i as usize].contains(&section));
            // The stretch is lifted in the end when nothing covers the section.
            let lifted = if up == u64::MAX { 0 } else { peak.saturating_add(up - height) };
            if !covers
                && lifted > self.peaks.most().max(given.target)
                && self.exchange(given, k, section, lifted, price, work)
            {
                continue;
            }
            if let Some(i) = found {
                *work = work.saturating_sub((given.span[i as usize].len() / COVERED) as u64);
                self.put(given, k, i, (from, height), (to, height));
            } else {
                if up == u64::MAX {
                    break;
                }
                self.top[from..to].fill(NONE);
                self.peaks.raise(&(from..to), up - height);
                self.skyline.replace(k, &mut [(from, to, up)]);
            }
        }
        true
    }

    /// Places a request in a stretch, which begins and ends at sections of so much height.
    fn put(&mut self, given: &Given, k: usize, i: u32, left: (usize, u64), right: (usize, u64)) {
        let height = self.skyline.stretch(k).height;
        let s = given.span[i as usize].clone();
        self.waiting.take(&given.span, i);
        self.offsets[i as usize] = height;
        self.top[s.clone()].fill(i);
        self.left -= 1;
        let above = height.saturating_add(given.size[i as usize]);
        let mut parts = [(left.0, s.start, left.1), (s.start, s.end, above), (s.end, right.0, right.1)];
        let a = usize::from(left.0 == s.start);
        let b = 3 - usize::from(s.end == right.0);
        self.skyline.replace(k, &mut parts[a..b]);
    }

    /// The request to place into a stretch: of those that lie within it one that covers `section`, if any does.
    fn best(&self, within: Range<usize>, section: usize, price: &[f64], work: &mut u64) -> Option<u32> {
        let mut best: (bool, f64, u32) = (false, -1.0, NONE);
        let mut next = self.waiting.from(within.start, within.end);
        let mut looks = 0;
        while let Some(s) = next {
            // None that begins after the section covers it.
            if best.2 != NONE && s > section {
                break;
            }
            // None that begins here or later covers more than what is left of the stretch.
            if best.0 && best.1 >= price[within.end] - price[s] {
                break;
            }
            looks += 1;
            if let Some(&(end, i)) = self.waiting.within(s, within.end).first() {
                let end = end as usize;
                let covers = s <= section && section < end;
                let score = price[end] - price[s];
                if best.2 == NONE || (covers, score) > (best.0, best.1) {
                    best = (covers, score, i);
                }
            }
            next = self.waiting.from(s + 1, within.end);
        }
        *work = work.saturating_sub(looks);
        (best.2 != NONE).then_some(best.2)
    }

    /// Of what lies beside a stretch, from it outwards, what can be taken out: nothing is above it, and it begins no higher.
    fn beside(&self, given: &Given, height: u64, mut at: usize, forward: bool) -> Vec<u32> {
        let mut list = vec![];
        while list.len() < BESIDE && (if forward { at < self.top.len() } else { at > 0 }) {
            let i = self.top[if forward { at } else { at - 1 }];
            if i == NONE || self.out[i as usize] >= OUT || self.offsets[i as usize] > height {
                break;
            }
            let s = given.span[i as usize].clone();
            if self.top[s.clone()].iter().any(|x| *x != i) {
                break;
            }
            list.push(i);
            at = if forward { s.end } else { s.start };
        }
        list
    }

    /// Takes out some that lie beside a stretch for one that covers a section of it, where that costs less than to lift the stretch.
    fn exchange(
        &mut self,
        given: &Given,
        k: usize,
        section: usize,
        lifted: u64,
        price: &[f64],
        work: &mut u64,
    ) -> bool {
        let Stretch { from, to, height, .. } = self.skyline.stretch(k);
        let (left, right) = (self.beside(given, height, from, false), self.beside(given, height, to, true));
        let Some(choice) = self.instead(given, (from..to, height), section, lifted, (&left, &right), price, work)
        else {
            return false;
        };
        let t = given.span[choice.request as usize].clone();
        let (mut begin, mut end) = ((from, height), (to, height));
        let out = |list: &[u32], n: usize| list[..n].to_vec();
        for (forward, list) in [(false, out(&left, choice.left)), (true, out(&right, choice.right))] {
            for w in list {
                let s = given.span[w as usize].clone();
                let offset = self.offsets[w as usize];
                if forward {
                    end = (s.end, offset);
                } else {
                    begin = (s.start, offset);
                }
                let Stretch { before, after, .. } = self.skyline.stretch(k);
                self.skyline.cut(if forward { after } else { before }, &s);
                self.top[s.clone()].fill(NONE);
                self.waiting.put_back(&given.span, w);
                self.left += 1;
                self.out[w as usize] += 1;
                self.peaks.raise(&(s.start.max(t.start)..s.end.min(t.end)), height - offset);
            }
        }
        self.put(given, k, choice.request, begin, end);
        true
    }

    /// The request that costs least in place of some beside a stretch.
    #[allow(clippy::too_many_arguments, reason = "a step of `exchange`")]
    fn instead(
        &self,
        given: &Given,
        (within, height): (Range<usize>, u64),
        section: usize,
        lifted: u64,
        (left, right): (&[u32], &[u32]),
        price: &[f64],
        work: &mut u64,
    ) -> Option<Instead> {
        let span = |i: u32| &given.span[i as usize];
        let a = left.last().map_or(within.start, |i| span(*i).start);
        let b = right.last().map_or(within.end, |i| span(*i).end);
        let least = self.peaks.most().max(given.target);
        let mut choice: Option<Instead> = None;
        let mut next = self.waiting.from(a, b);
        let mut tried = 0;
        while let Some(s) = next.filter(|s| *s <= section && tried <= TRIED) {
            for &(end, request) in self.waiting.within(s, b).iter().take_while(|x| x.0 as usize > section) {
                tried += 1;
                let t = s..end as usize;
                let mut other =
                    Instead { cost: least, gain: price[t.end] - price[t.start], request, left: 0, right: 0 };
                for (list, count) in [(left, &mut other.left), (right, &mut other.right)] {
                    for &w in list {
                        let s = span(w);
                        let both = s.start.max(t.start)..s.end.min(t.end);
                        if both.is_empty() {
                            break;
                        }
                        *count += 1;
                        other.gain -= price[s.end] - price[s.start];
                        let up = height - self.offsets[w as usize];
                        if up > 0 {
                            other.cost = other.cost.max(self.peaks.peak(&both).0.saturating_add(up));
                        }
                    }
                }
                let better = |c: Instead| other.cost < c.cost || other.cost == c.cost && other.gain > c.gain;
                if other.cost < lifted && choice.is_none_or(better) {
                    choice = Some(other);
                }
            }
            next = self.waiting.from(s + 1, b);
        }
        *work = work.saturating_sub(5 * tried);
        choice
    }
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
        let offsets = fill(&list, bound, &mut 50_000_000).expect("enough work");
        let total = check(&list, &offsets).expect("no two share a byte");
        assert!(total - bound <= bound / 200, "{total} over {bound}");
    }

    #[test]
    fn few_requests_and_none() {
        let fill = |list: &[Request]| fill(list, lower_bound(list), &mut 10_000);
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
    fn work_runs_out() {
        let mut work = 50;
        let list = random(3000, 7);
        assert_eq!(fill(&list, lower_bound(&list), &mut work), None);
        assert_eq!(work, 0);
    }

    #[test]
    fn sizes_beyond_the_range_saturate() {
        let r = Request { first: 0, last: 3, size: u64::MAX / 2 + 1 };
        let offsets = fill(&[r, r, r], u64::MAX, &mut 10_000).unwrap_or_default();
        assert!(check(&[r, r, r], &offsets).is_err());
    }
}
