//! A depth-first search for a placement within a given capacity, complete when its budget suffices.
//!
//! Buffers are placed from low to high addresses, each at the lowest place above those that lie below it in its time.
//! Every packing can be brought into this form by letting buffers fall, so nothing is lost. Branches are cut where some
//! time already needs more than the capacity, and where a buffer would fit below the chosen one without touching
//! anything. Parts that share no time any more are solved apart. The idea of canonical, address-ordered search is that
//! of M. Moffitt, "MiniMalloc" (ASPLOS 2023).

use super::Request;
use std::ops::Range;

/// How a search ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Found {
    /// Offsets are in place.
    Yes,
    /// There is no placement of this capacity.
    No,
    /// The budget ran out.
    Unknown,
}

/// A change and what was there before.
enum Undo {
    Placed(u32),
    Offset(u32, u64),
    Floor { section: u32, floor: u64, size: u64 },
}

/// The search, over requests of positive size and length, already ranked: a lower index is tried first.
pub(super) struct Exact {
    size: Vec<u64>,
    span: Vec<Range<usize>>,
    near: Vec<Vec<u32>>,
    capacity: u64,
    /// Per section of time: height of what is placed, and sum of what is not.
    floor: Vec<u64>,
    rest: Vec<u64>,
    /// Lowest possible offset of each request; of a placed one, its offset.
    pub(super) offset: Vec<u64>,
    placed: Vec<bool>,
    /// Number of neighbours of each request that are not placed.
    open: Vec<u32>,
    /// Per section: the lowest offset something unplaced can have there; scratch.
    low: Vec<u64>,
    log: Vec<Undo>,
    budget: u64,
}

impl Exact {
    pub(super) fn new(requests: &[Request]) -> Exact {
        let mut times: Vec<u64> = requests.iter().flat_map(|r| [r.first, r.last]).collect();
        times.sort_unstable();
        times.dedup();
        let at = |t: u64| times.partition_point(|x| *x < t);
        let span: Vec<Range<usize>> = requests.iter().map(|r| at(r.first)..at(r.last)).collect();
        let n = requests.len();
        let near = (0..n)
            .map(|i| {
                let meets = |j: &usize| *j != i && span[*j].start < span[i].end && span[i].start < span[*j].end;
                (0..n).filter(meets).map(|j| j as u32).collect()
            })
            .collect();
        Exact {
            size: requests.iter().map(|r| r.size).collect(),
            near,
            capacity: 0,
            floor: vec![0; times.len()],
            rest: vec![0; times.len()],
            offset: vec![0; n],
            placed: vec![false; n],
            open: vec![0; n],
            low: vec![0; times.len()],
            log: vec![],
            budget: 0,
            span,
        }
    }

    /// Searches for a placement within `capacity`; takes from `budget` what it visits.
    pub(super) fn search(&mut self, capacity: u64, budget: &mut u64) -> Found {
        (self.capacity, self.budget) = (capacity, *budget);
        self.floor.fill(0);
        self.rest.fill(0);
        self.offset.fill(0);
        self.placed.fill(false);
        self.log.clear();
        self.open = self.near.iter().map(|v| v.len() as u32).collect();
        for (r, s) in self.span.iter().zip(&self.size) {
            self.rest[r.clone()].iter_mut().for_each(|x| *x += s);
        }
        let all: Vec<u32> = (0..self.size.len() as u32).collect();
        let found = self.parts(all, 0, None);
        *budget = self.budget;
        found
    }

    /// Solves requests that are not placed, split where no two of them share a time.
    fn parts(&mut self, mut list: Vec<u32>, level: u64, after: Option<u32>) -> Found {
        list.sort_unstable_by_key(|i| (self.span[*i as usize].start, *i));
        let (mut part, mut end): (Vec<u32>, usize) = (vec![], 0);
        let mut parts = vec![];
        for i in list {
            let s = &self.span[i as usize];
            if s.start >= end && !part.is_empty() {
                parts.push(std::mem::take(&mut part));
            }
            end = end.max(s.end);
            part.push(i);
        }
        if !part.is_empty() {
            parts.push(part);
        }
        // Small parts first: they fail sooner.
        parts.sort_by_key(Vec::len);
        for mut p in parts {
            p.sort_unstable();
            match self.solve(&p, level, after) {
                Found::Yes => {}
                other => return other,
            }
        }
        Found::Yes
    }

    /// Solves one connected part, at offsets of at least `level`; at `level` itself only ranks above `after`.
    fn solve(&mut self, part: &[u32], level: u64, after: Option<u32>) -> Found {
        if part.is_empty() {
            return Found::Yes;
        }
        self.budget = self.budget.saturating_sub(part.len() as u64 + 8);
        if self.budget == 0 {
            return Found::Unknown;
        }
        // A hole that something fits into must be filled first.
        let mut lid = u64::MAX;
        for &i in part {
            lid = lid.min(self.offset[i as usize] + self.size[i as usize]);
        }
        if lid <= level || !self.roomy(part, level) {
            return Found::No;
        }
        let mut choice: Vec<(u64, u32)> = vec![];
        for &i in part {
            let o = self.offset[i as usize];
            if o >= level && o < lid && (o > level || after.is_none_or(|a| i > a)) {
                choice.push((o, i));
            }
        }
        choice.sort_unstable();
        let mut unknown = false;
        for (o, i) in choice {
            let mark = self.log.len();
            if self.put(i, o) {
                let left: Vec<u32> = part.iter().copied().filter(|j| *j != i).collect();
                let found =
                    if self.splits(&left) { self.parts(left, o, Some(i)) } else { self.solve(&left, o, Some(i)) };
                match found {
                    Found::Yes => return Found::Yes,
                    Found::Unknown => unknown = true,
                    Found::No => {}
                }
            }
            self.take_back(mark);
            // Nothing is left that could lie above it: it is there in every placement, if there is one.
            if self.open[i as usize] == 0 {
                break;
            }
            if self.budget == 0 {
                return Found::Unknown;
            }
        }
        if unknown { Found::Unknown } else { Found::No }
    }

    /// True when the requests fall into parts that share no time.
    fn splits(&self, list: &[u32]) -> bool {
        let (a, b) = list.iter().fold((usize::MAX, 0), |(a, b), i| {
            let s = &self.span[*i as usize];
            (a.min(s.start), b.max(s.end))
        });
        a < b && self.rest[a..b].contains(&0)
    }

    /// Places a request and says whether it ends within the capacity.
    fn put(&mut self, i: u32, at: u64) -> bool {
        let (n, size) = (i as usize, self.size[i as usize]);
        self.log.push(Undo::Placed(i));
        self.log.push(Undo::Offset(i, self.offset[n]));
        self.placed[n] = true;
        self.offset[n] = at;
        let top = at + size;
        for s in self.span[n].clone() {
            self.log.push(Undo::Floor { section: s as u32, floor: self.floor[s], size });
            self.floor[s] = top;
            self.rest[s] -= size;
        }
        for &j in &self.near[n] {
            self.open[j as usize] -= 1;
            if !self.placed[j as usize] && self.offset[j as usize] < top {
                self.log.push(Undo::Offset(j, self.offset[j as usize]));
                self.offset[j as usize] = top;
            }
        }
        self.budget = self.budget.saturating_sub((self.near[n].len() + self.span[n].len()) as u64);
        top <= self.capacity
    }

    /// Whether every time still has room for what is left of a part, all of it at `level` or above.
    fn roomy(&mut self, part: &[u32], level: u64) -> bool {
        let (mut a, mut b) = (usize::MAX, 0);
        for &i in part {
            let s = &self.span[i as usize];
            (a, b) = (a.min(s.start), b.max(s.end));
        }
        self.low[a..b].fill(u64::MAX);
        for &i in part {
            let n = i as usize;
            let mut o = self.offset[n];
            if o < level {
                // It waits for a neighbour to be put below it, at this level or above.
                if self.open[n] == 0 {
                    return false;
                }
                o = level;
            }
            let span = self.span[n].clone();
            self.budget = self.budget.saturating_sub(span.len() as u64 / 8);
            for x in &mut self.low[span] {
                *x = o.min(*x);
            }
        }
        self.low[a..b].iter().zip(&self.rest[a..b]).all(|(l, r)| *r == 0 || l.saturating_add(*r) <= self.capacity)
    }

    /// Undoes everything after a mark of the log.
    fn take_back(&mut self, mark: usize) {
        for u in self.log.drain(mark..).rev() {
            match u {
                Undo::Placed(i) => {
                    self.placed[i as usize] = false;
                    self.near[i as usize].iter().for_each(|j| self.open[*j as usize] += 1);
                }
                Undo::Offset(i, o) => self.offset[i as usize] = o,
                Undo::Floor { section, floor, size } => {
                    self.floor[section as usize] = floor;
                    self.rest[section as usize] += size;
                }
            }
        }
    }
}
