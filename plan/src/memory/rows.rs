//! Placements in rows from below: lives that follow each other closely and are about equally large lie side by side in time.
//!
//! Where many requests have the same size, rows of one size leave nothing above them, and only the times between two lives are lost;
//! those are filled in turn by rows of what is smaller. Filling the lowest stretch (see [`super::fill`]) mixes sizes, and leaves heights that
//! fit nothing.
//!
//! The largest request that is alive at the fullest section begins a row of its size, so that nothing is lost there. What goes beside
//! it is the best of all chains, where a section counts for the more, the less room there is to spare (a recursion over the sections:
//! weighted independent intervals). When some section becomes too high, the next largest are tried. Late rows have little left to
//! choose from, so what is left above a part of the height is filled.

use super::branch::sections;
use super::stack::Stop;
use super::steps::{self, Way, loads, prices, sums};
use super::{Request, lower_bound};
use std::cmp::Reverse;
use std::ops::Range;

/// The least size in a row, as a part of its height.
const LEAST: f64 = 0.8;
/// How far from its share of the height a section is crowded.
const CROWDED: f64 = 0.02;
/// So many of the largest at the fullest section may begin a row.
const TRIES: usize = 5;
/// Sizes up to which rows suit.
const FEW: usize = 64;
/// Rows up to this part of the height (in tenths).
const UNTIL: u64 = 7;
/// What is over the bound (one in so many) and does no harm.
const SPARE: u64 = 500;
/// Work of a pass over the sections, as a part of their number.
const PASS: u64 = 4;

const NONE: u32 = u32::MAX;

/// A free rectangle: sections, offset and height.
struct Slot {
    within: Range<usize>,
    at: u64,
    height: u64,
}

/// A row with all that is in it, and how high everything becomes with it at least.
struct Row {
    up: u64,
    size: u64,
    /// Requests and their offsets.
    all: Vec<(u32, u64)>,
}

struct Rows {
    size: Vec<u64>,
    span: Vec<Range<usize>>,
    offsets: Vec<u64>,
    placed: Vec<bool>,
    /// Requests that may still be open, by their ends, and for each section the first of those that end after it begins.
    by_end: Vec<u32>,
    after: Vec<u32>,
    /// What is not placed in each section, and what the row changes: at the section where it does and in all that follow.
    load: Vec<u64>,
    change: Vec<u64>,
    /// Sums of the prices of sections.
    price: Vec<f64>,
    /// For each section the gain of the best chain up to it, and the request that ends there in it.
    gain: Vec<f64>,
    last: Vec<u32>,
    /// What the row has placed.
    row: Vec<u32>,
    work: u64,
}

impl Rows {
    fn new(list: &[Request], span: Vec<Range<usize>>, load: Vec<u64>, work: u64) -> Rows {
        let (n, count) = (list.len(), load.len());
        let mut by_end: Vec<u32> = (0..n as u32).collect();
        super::sort::by_key(&mut by_end, &|i| {
            let s = &span[i as usize];
            (s.end as u128, s.start as u128)
        });
        Rows {
            size: list.iter().map(|r| r.size).collect(),
            span,
            offsets: vec![0; n],
            placed: vec![false; n],
            by_end,
            after: vec![0; count + 1],
            load,
            change: vec![0; count + 1],
            price: vec![],
            gain: vec![0.0; count + 1],
            last: vec![NONE; count + 1],
            row: vec![],
            work,
        }
    }

    fn spend(&mut self, work: usize) {
        self.work = self.work.saturating_sub(work as u64);
    }

    /// Forgets what is placed, and takes it from the load.
    fn settle(&mut self) {
        let mut sum = 0u64;
        for (l, c) in self.load.iter_mut().zip(&mut self.change) {
            sum = sum.wrapping_add(*c);
            *l = l.wrapping_add(sum);
            *c = 0;
        }
        self.change.fill(0);
        let placed = &self.placed;
        self.by_end.retain(|i| !placed[*i as usize]);
        let mut k = 0;
        for (t, a) in self.after.iter_mut().enumerate() {
            while self.by_end.get(k).is_some_and(|i| self.span[*i as usize].end <= t) {
                k += 1;
            }
            *a = k as u32;
        }
        self.row.clear();
    }

    /// The fullest section and what is alive there, after what the row changes.
    fn fullest(&self) -> (u64, usize) {
        let (mut sum, mut most) = (0u64, (0, 0));
        for (t, (l, c)) in self.load.iter().zip(&self.change).enumerate() {
            sum = sum.wrapping_add(*c);
            most = most.max((l.wrapping_add(sum), t));
        }
        most
    }

    fn put(&mut self, i: u32, at: u64) {
        let (n, s) = (i as usize, &self.span[i as usize]);
        self.placed[n] = true;
        self.offsets[n] = at;
        self.change[s.start] = self.change[s.start].wrapping_sub(self.size[n]);
        self.change[s.end] = self.change[s.end].wrapping_add(self.size[n]);
        self.row.push(i);
    }

    /// Takes the row out again.
    fn take_back(&mut self) {
        for i in self.row.drain(..) {
            self.placed[i as usize] = false;
        }
        self.change.fill(0);
    }

    /// What is open and lies within some sections.
    fn open(&self, within: &Range<usize>) -> impl Iterator<Item = u32> + '_ {
        let start = within.start;
        let all = &self.by_end[self.after[within.start] as usize..self.after[within.end] as usize];
        all.iter().copied().filter(move |i| self.span[*i as usize].start >= start && !self.placed[*i as usize])
    }

    /// The largest that fits into a slot; where there are some over a section, one of those.
    fn largest(&self, slot: &Slot, section: usize) -> Option<u32> {
        let fits = self.open(&slot.within).filter(|i| self.size[*i as usize] <= slot.height);
        fits.max_by_key(|i| (self.span[*i as usize].contains(&section), self.size[*i as usize], Reverse(*i)))
    }

    /// The best chain within some sections of requests that are about as high as a row.
    fn chain(&mut self, within: Range<usize>, height: u64, out: &mut Vec<u32>) {
        let (from, to) = (self.after[within.start] as usize, self.after[within.end] as usize);
        if from >= to {
            return;
        }
        self.spend(to - from);
        let least = (height as f64 * LEAST) as u64;
        let mut at = within.start;
        (self.gain[at], self.last[at]) = (0.0, NONE);
        for &i in &self.by_end[from..to] {
            let (s, size) = (&self.span[i as usize], self.size[i as usize]);
            if s.start < within.start || self.placed[i as usize] || size > height || size < least {
                continue;
            }
            while at < s.end {
                at += 1;
                (self.gain[at], self.last[at]) = (self.gain[at - 1], NONE);
            }
            // The large ones first: the small ones fit elsewhere.
            let part = size as f64 / height as f64;
            let gain = self.gain[s.start] + part * part * part * (self.price[s.end] - self.price[s.start]);
            if gain > self.gain[at] {
                (self.gain[at], self.last[at]) = (gain, i);
            }
        }
        self.spend((at - within.start) / PASS as usize);
        let first = out.len();
        while at > within.start {
            let i = self.last[at];
            if i == NONE {
                at -= 1;
            } else {
                out.push(i);
                at = self.span[i as usize].start;
            }
        }
        out[first..].reverse();
    }

    /// Lays a row with a request in it into a slot, and adds the slots that are left to a list.
    fn lay(&mut self, slot: &Slot, i: u32, slots: &mut Vec<Slot>) {
        let (height, at) = (self.size[i as usize], slot.at);
        let Range { start, end } = self.span[i as usize].clone();
        self.put(i, at);
        let mut list = vec![];
        self.chain(slot.within.start..start, height, &mut list);
        list.push(i);
        self.chain(end..slot.within.end, height, &mut list);
        list.iter().filter(|j| **j != i).for_each(|j| self.put(*j, at));
        // The last one is next.
        slots.push(Slot { at: at.saturating_add(height), height: slot.height - height, within: slot.within.clone() });
        let mut to = slot.within.end;
        for j in list.into_iter().rev() {
            let (s, size) = (self.span[j as usize].clone(), self.size[j as usize]);
            slots.push(Slot { within: s.end..to, at, height });
            to = s.start;
            slots.push(Slot { within: s, at: at.saturating_add(size), height: height - size });
        }
        slots.push(Slot { within: slot.within.start..to, at, height });
    }

    /// A row that begins with a request, over all sections, and all that fits into what it leaves.
    fn fill(&mut self, i: u32, at: u64) {
        let height = self.size[i as usize];
        let mut slots = vec![];
        self.lay(&Slot { within: 0..self.load.len(), at, height }, i, &mut slots);
        while let Some(slot) = slots.pop() {
            let (from, to) = (self.after[slot.within.start], self.after[slot.within.end]);
            if slot.within.is_empty() || slot.height == 0 || from >= to || self.work == 0 {
                continue;
            }
            self.spend((to - from) as usize + slot.within.len() / PASS as usize);
            let load = &self.load[slot.within.clone()];
            let most = load.iter().max().and_then(|m| load.iter().position(|l| l == m)).unwrap_or(0);
            if let Some(i) = self.largest(&slot, slot.within.start + most) {
                self.lay(&slot, i, &mut slots);
            }
        }
    }
}

/// Whether requests have so few sizes that rows suit them.
pub(super) fn suit(list: &[Request]) -> bool {
    let mut sizes: Vec<u64> = vec![];
    list.iter().all(|r| {
        if let Err(at) = sizes.binary_search(&r.size) {
            sizes.insert(at, r.size);
        }
        sizes.len() <= FEW
    })
}

/// Offsets of requests of positive size and length, of which `bound` is the least total; `None` when told to stop. When it is late, or
/// the work is done, the rest is filled.
pub(super) fn rows(list: &[Request], bound: u64, way: Way, work: (u64, &mut u64), stop: Stop<'_>) -> Option<Vec<u64>> {
    let (span, count) = sections(list);
    let load = loads(list, &span, count);
    let mut r = Rows::new(list, span, load, work.0);
    let target = bound.saturating_add(bound / SPARE);
    let until = bound / 10 * UNTIL;
    let mut height = 0u64;
    while height < until && r.work > 0 && !stop.late() {
        if stop.told() {
            return None;
        }
        r.settle();
        let (most, section) = r.fullest();
        let reached = height.saturating_add(most).max(target);
        r.price = sums(&prices(&r.load, reached - height, CROWDED));
        r.spend(4 * count / PASS as usize);
        let mut first: Vec<u32> = r.open(&(0..count)).filter(|i| r.span[*i as usize].contains(&section)).collect();
        super::sort::by_key(&mut first, &|i| (u128::from(u64::MAX - r.size[i as usize]), 0));
        let mut best: Option<Row> = None;
        for &i in first.iter().take(TRIES) {
            r.take_back();
            r.fill(i, height);
            let size = r.size[i as usize];
            r.spend(count / PASS as usize);
            let up = height.saturating_add(size).saturating_add(r.fullest().0);
            if best.as_ref().is_none_or(|b| up < b.up) {
                let all = r.row.iter().map(|i| (*i, r.offsets[*i as usize])).collect();
                best = Some(Row { up, size, all });
            }
            if up <= reached {
                break;
            }
        }
        r.take_back();
        let Some(Row { size, all, .. }) = best else { break };
        all.into_iter().for_each(|(i, at)| r.put(i, at));
        height = height.saturating_add(size);
    }
    let rest: Vec<usize> = (0..list.len()).filter(|i| !r.placed[*i]).collect();
    let above: Vec<Request> = rest.iter().map(|i| list[*i]).collect();
    let bound = bound.saturating_sub(height).max(lower_bound(&above));
    let offsets = steps::fill(&above, bound, way, work.1, stop)?;
    rest.into_iter().zip(offsets).for_each(|(i, o)| r.offsets[i] = height.saturating_add(o));
    Some(r.offsets)
}

#[cfg(test)]
mod tests {
    use super::super::check;
    use super::*;

    const WAY: Way = Way { spared: 64, steep: false, tries: 6 };

    /// Lives of up to a twentieth, sizes drawn from a list.
    fn random(n: usize, seed: u64, sizes: &[u64]) -> Vec<Request> {
        let mut draw = super::super::draws(seed | 1);
        (0..n)
            .map(|_| {
                let first = draw(100_000);
                Request { first, last: first + 1 + draw(5_000), size: sizes[draw(sizes.len() as u64) as usize] }
            })
            .collect()
    }

    fn total(list: &[Request], work: u64) -> u64 {
        let offsets = rows(list, lower_bound(list), WAY, (work, &mut 60_000_000), Stop::never()).expect("enough work");
        check(list, &offsets).expect("no two share a byte")
    }

    #[test]
    fn equal_sizes_reach_the_bound() {
        // Rows over all that is fullest, as intervals are coloured.
        for seed in [3, 8] {
            let list = random(3000, seed, &[48]);
            assert_eq!(total(&list, 50_000_000), lower_bound(&list));
        }
    }

    #[test]
    fn powers_of_two_come_near_the_bound() {
        let sizes: Vec<u64> = (4..14).map(|k| 1 << k).collect();
        for seed in 1..4 {
            let list = random(6000, seed, &sizes);
            let (total, bound) = (total(&list, 50_000_000), lower_bound(&list));
            assert!((total - bound) * 200 <= bound, "{total} over {bound}");
        }
    }

    #[test]
    fn any_sizes_are_placed_and_with_any_work() {
        let sizes: Vec<u64> = (0..300).map(|k| 1 + k * k).collect();
        let list = random(2000, 5, &sizes);
        for work in [0, 1, 5_000, 100_000, 50_000_000] {
            let total = total(&list, work);
            assert!(total <= lower_bound(&list) * 5 / 4, "{total} with work {work}");
        }
        assert!(suit(&random(2000, 5, &sizes[..64])) && !suit(&random(2000, 5, &sizes[..66])));
    }

    #[test]
    fn few_requests_none_and_too_large_ones() {
        let rows = |list: &[Request]| rows(list, lower_bound(list), WAY, (10_000, &mut 10_000), Stop::never());
        assert_eq!(rows(&[]), Some(vec![]));
        let r = |first, last, size| Request { first, last, size };
        let list = [r(0, 2, 5), r(2, 4, 5), r(0, 4, 3)];
        assert_eq!(check(&list, &rows(&list).unwrap_or_default()), Ok(8));
        let big = r(0, 3, u64::MAX / 2 + 1);
        assert!(check(&[big; 3], &rows(&[big; 3]).unwrap_or_default()).is_err());
    }

    #[test]
    fn it_stops_when_told() {
        let told = std::sync::atomic::AtomicBool::new(true);
        let list = random(2000, 5, &[3, 5]);
        let stop = Stop { told: &told, at: None };
        assert_eq!(rows(&list, lower_bound(&list), WAY, (1_000_000, &mut 1_000_000), stop), None);
        // Late, all is filled.
        let late = Stop { at: Some(std::time::Instant::now()), ..Stop::never() };
        let found = rows(&list, lower_bound(&list), WAY, (1_000_000, &mut 60_000_000), late);
        assert!(check(&list, &found.expect("complete")).is_ok());
    }
}
