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
//! What is shorter than all that is left over a section cannot be filled there. So stretches are kept wide: one a little below its
//! neighbour is lifted to it at once where room is to spare.

use super::skyline::{Peaks, Skyline, Stretch, Waiting};
use std::ops::Range;

/// A stretch is lifted at once by no more than this part of the mean size.
const LITTLE: u64 = 10;
/// So often one request is taken out again, and so many of them on either side of a stretch.
const OUT: u8 = 8;
const BESIDE: usize = 2;
/// Requests looked at to take the place of what is taken out.
const TRIED: u64 = 1000;
/// Work of a request that is placed, beyond what is looked at and a part of the sections that it covers.
const PLACED: u64 = 60;
const COVERED: usize = 16;

const NONE: u32 = u32::MAX;

/// What does not change.
pub(super) struct Given {
    pub(super) size: Vec<u64>,
    pub(super) span: Vec<Range<usize>>,
    /// A total that is good enough.
    pub(super) target: u64,
    /// The mean size.
    pub(super) mean: u64,
    /// Room (one in so many of what is left of the height) that is spared when a stretch is lifted at once.
    pub(super) spared: u64,
}

/// What is placed so far.
#[derive(Clone)]
pub(super) struct Filled {
    /// For every section the height that it will have at least.
    pub(super) peaks: Peaks,
    waiting: Waiting,
    skyline: Skyline,
    pub(super) offsets: Vec<u64>,
    pub(super) left: usize,
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

impl Filled {
    /// Nothing yet; `load` is what is alive in each section.
    pub(super) fn new(given: &Given, load: &[u64]) -> Filled {
        Filled {
            peaks: Peaks::new(load),
            waiting: Waiting::new(&given.span, load.len()),
            skyline: Skyline::new(load.len()),
            offsets: vec![0; given.size.len()],
            left: given.size.len(),
            top: vec![NONE; load.len()],
            out: vec![0; given.size.len()],
        }
    }

    /// Fills until the lowest stretch is as high as `until`. `false` when that takes more than the work that is left.
    pub(super) fn advance(&mut self, given: &Given, price: &[f64], until: u64, work: &mut u64) -> bool {
        while self.left > 0 {
            let Some(k) = self.skyline.lowest() else { break };
            let Stretch { from, to, height, before, after, .. } = self.skyline.stretch(k);
            if height >= until {
                break;
            }
            let (peak, section) = self.peaks.peak(&(from..to));
            let up = self.skyline.height(before).min(self.skyline.height(after));
            let room = given.target.saturating_sub(given.target.saturating_sub(height) / given.spared);
            if up != u64::MAX && up - height <= given.mean / LITTLE && peak.saturating_add(up - height) < room {
                *work = work.saturating_sub(PLACED);
                self.lift(k, up);
                continue;
            }
            let found = self.best(from..to, section, price, work);
            *work = work.saturating_sub(PLACED);
            if *work == 0 {
                return false;
            }
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
                self.lift(k, up);
            }
        }
        true
    }

    /// Gives up the room of a stretch up to a neighbour's height.
    fn lift(&mut self, k: usize, up: u64) {
        let Stretch { from, to, height, .. } = self.skyline.stretch(k);
        self.top[from..to].fill(NONE);
        self.peaks.raise(&(from..to), up - height);
        self.skyline.replace(k, &mut [(from, to, up)]);
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
