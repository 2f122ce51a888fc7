//! A depth-first search for a placement within a given capacity, complete when its budget suffices.
//!
//! Every unplaced buffer has a lowest possible offset: the top of what lies below it in its time. Let `p` be a buffer
//! whose lowest possible end, its *lid*, is the least among its neighbours and their neighbours. In some solution, if
//! there is one at all, either `p` lies at its lowest offset, or a neighbour of `p` does that begins below the lid:
//! whatever begins below the lid has nothing unplaced under it, for nothing unplaced ends there. So a node branches over `p`
//! and those neighbours only, near one place in time, and what was refuted begins at the lid or above in the branches
//! that follow. Buffers that lie apart in time do not interleave. Branches are cut where some time has no room for what
//! begins above any height, states that failed before are known again by a hash, and parts that share no time any more
//! are solved apart.
//!
//! The hash has 128 bits, so that a refutation may be called a proof.

use super::Request;
use std::collections::HashSet;
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

/// Which of the possible pivots a node branches on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Pivot {
    /// The one with the least lid.
    Lowest,
    /// The one with the fewest candidates.
    Fewest,
    /// The one whose best candidate begins lowest, then ranks first.
    First,
}

/// The search, over requests of positive size and length.
#[derive(Clone)]
pub(super) struct Branch {
    size: Vec<u64>,
    span: Vec<Range<usize>>,
    near: Vec<Vec<u32>>,
    /// Requests with equal span and size have equal numbers.
    kind: Vec<u32>,
    /// Place in the order of trial; set before a search.
    pub(super) rank: Vec<u32>,
    capacity: u64,
    pivot: Pivot,
    /// Lowest possible offset of each request; of a placed one, its offset.
    pub(super) offset: Vec<u64>,
    placed: Vec<bool>,
    /// What to undo: request, offset before, whether it was placed.
    log: Vec<(u32, u64, bool)>,
    /// Lists of unplaced requests by start: those of a node and of its ancestors.
    lists: Vec<u32>,
    /// Scratch per section of time and per request.
    sum: Vec<u64>,
    low: Vec<f64>,
    /// Sum of the sizes not placed in each section.
    rest: Vec<f64>,
    least: Vec<u64>,
    failed: HashSet<u128>,
    /// Sections whose room must be looked at again.
    dirty: Range<usize>,
    level: u64,
    nodes: u64,
    work: u64,
    /// Bytes times sections: of what is placed, of the most that was, of all.
    area: u128,
    most: u128,
    all: u128,
}

/// States that failed, remembered at most.
const MEMORY: usize = 1 << 18;

fn mix(i: u32, x: u64) -> u128 {
    let key = x.wrapping_add(u64::from(i).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    let spread = |mut z: u64, by: u64| {
        z = (z ^ (z >> 32)).wrapping_mul(by);
        z = (z ^ (z >> 29)).wrapping_mul(by);
        z ^ (z >> 32)
    };
    let (a, b) = (spread(key, 0xD6E8_FEB8_6659_FD93), spread(key ^ u64::from(i) << 40, 0xBF58_476D_1CE4_E5B9));
    u128::from(a) << 64 | u128::from(b)
}

/// Sections of time: one for each largest set of requests alive at once, in order, as a span of each request.
pub(super) fn sections(requests: &[Request]) -> (Vec<Range<usize>>, usize) {
    let mut events: Vec<(u64, bool)> = requests.iter().flat_map(|r| [(r.first, true), (r.last, false)]).collect();
    events.sort_unstable();
    // A section closes where an end follows a beginning.
    let mut closes = vec![];
    for w in events.windows(2) {
        if w[0].1 && !w[1].1 {
            closes.push(w[1].0);
        }
    }
    closes.dedup();
    let n = closes.len();
    // A request is alive in the sections that close after its beginning and not after its end.
    let span = |r: &Request| closes.partition_point(|c| *c <= r.first)..closes.partition_point(|c| *c <= r.last);
    (requests.iter().map(span).collect(), n)
}

/// For each request those that share a section with it; `by_start` are all, in the order in which they begin.
fn neighbours(span: &[Range<usize>], by_start: &[u32]) -> Vec<Vec<u32>> {
    let mut near = vec![vec![]; span.len()];
    let mut live: Vec<u32> = vec![];
    for &i in by_start {
        live.retain(|j| span[*j as usize].end > span[i as usize].start);
        for &j in &live {
            near[i as usize].push(j);
            near[j as usize].push(i);
        }
        live.push(i);
    }
    near
}

impl Branch {
    pub(super) fn new(requests: &[Request]) -> Branch {
        let (span, sections) = sections(requests);
        let n = requests.len();
        let mut by_start: Vec<u32> = (0..n as u32).collect();
        super::sort::by_key(&mut by_start, &|i| (span[i as usize].start as u128, 0));
        let near = neighbours(&span, &by_start);
        let mut kinds = std::collections::BTreeMap::new();
        let kind = (0..n)
            .map(|i| {
                let next = kinds.len() as u32;
                *kinds.entry((span[i].start, span[i].end, requests[i].size)).or_insert(next)
            })
            .collect();
        Branch {
            size: requests.iter().map(|r| r.size).collect(),
            near,
            kind,
            rank: (0..n as u32).collect(),
            capacity: 0,
            pivot: Pivot::Lowest,
            offset: vec![0; n],
            placed: vec![false; n],
            log: vec![],
            lists: by_start,
            sum: vec![0; sections],
            low: vec![0.0; sections],
            rest: vec![0.0; sections],
            least: vec![0; n],
            failed: HashSet::new(),
            dirty: 0..sections,
            level: 0,
            nodes: 0,
            work: 0,
            area: 0,
            most: 0,
            all: requests.iter().zip(&span).map(|(r, s)| u128::from(r.size) * s.len() as u128).sum(),
            span,
        }
    }

    fn area_of(&self, i: usize) -> u128 {
        u128::from(self.size[i]) * self.span[i].len() as u128
    }

    /// The largest share that the last search had placed.
    pub(super) fn share(&self) -> f64 {
        self.most as f64 / self.all.max(1) as f64
    }

    /// Size of a request.
    pub(super) fn size(&self, i: usize) -> u64 {
        self.size[i]
    }

    /// Searches for a placement within `capacity`, visiting at most `nodes` nodes; adds to `work` what it cost.
    pub(super) fn search(&mut self, capacity: u64, pivot: Pivot, nodes: u64, work: &mut u64) -> Found {
        if self.capacity != capacity {
            // What failed in one capacity may do in another.
            self.failed.clear();
        }
        (self.capacity, self.pivot, self.nodes, self.work) = (capacity, pivot, nodes, 0);
        let n = self.size.len();
        self.lists.truncate(n);
        self.offset.fill(0);
        self.placed.fill(false);
        self.log.clear();
        (self.area, self.most) = (0, 0);
        self.rest.fill(0.0);
        for (r, s) in self.span.iter().zip(&self.size) {
            self.rest[r.clone()].iter_mut().for_each(|x| *x += *s as f64);
        }
        self.dirty = 0..self.sum.len();
        self.level = 0;
        let found = self.parts(0..n);
        *work += self.work;
        found
    }

    /// Solves unplaced requests, split where no two of them share a time.
    fn parts(&mut self, list: Range<usize>) -> Found {
        if list.is_empty() {
            return Found::Yes;
        }
        if !self.roomy(list.clone(), self.level) {
            return Found::No;
        }
        let (mut begin, mut end) = (list.start, 0);
        let mut parts: Vec<Range<usize>> = vec![];
        for k in list.clone() {
            let s = &self.span[self.lists[k] as usize];
            if s.start >= end && k > begin {
                parts.push(begin..k);
                begin = k;
            }
            end = end.max(s.end);
        }
        if parts.is_empty() {
            return self.solve(list);
        }
        parts.push(begin..list.end);
        // Small parts first: they fail sooner.
        parts.sort_by_key(Range::len);
        for p in parts {
            let found = self.solve(p);
            if found != Found::Yes {
                return found;
            }
        }
        Found::Yes
    }

    /// Solves one connected part, of which is known that it has room everywhere.
    fn solve(&mut self, part: Range<usize>) -> Found {
        self.work += 16 + 4 * part.len() as u64;
        if self.nodes == 0 {
            return Found::Unknown;
        }
        self.nodes -= 1;
        let hash = part.clone().fold(0u128, |h, k| {
            let i = self.lists[k];
            h.wrapping_add(mix(i, self.offset[i as usize]))
        });
        if self.failed.contains(&hash) {
            return Found::No;
        }
        let before = self.log.len();
        let (p, mut candidates) = self.choose(part.clone());
        let lid = self.offset[p as usize] + self.size[p as usize];
        candidates.sort_unstable_by_key(|j| (self.offset[*j as usize], self.rank[*j as usize]));
        let mut result = Found::No;
        for k in 0..candidates.len() {
            let j = candidates[k];
            // Its twin was refuted at this very offset.
            let twin = |c: &u32| self.kind[*c as usize] == self.kind[j as usize];
            let refuted = self.offset[j as usize] < lid && j != p && candidates[..k].iter().any(|c| *c != p && twin(c));
            if !refuted {
                let mark = self.log.len();
                self.put(j);
                let top = self.lists.len();
                for x in part.clone() {
                    if self.lists[x] != j {
                        self.lists.push(self.lists[x]);
                    }
                }
                let found = self.parts(top..self.lists.len());
                self.lists.truncate(top);
                match found {
                    Found::Yes => return found,
                    Found::Unknown => {
                        result = found;
                        break;
                    }
                    Found::No => self.take_back(mark),
                }
            }
            let to = if j == p {
                let ends =
                    candidates.iter().filter(|c| **c != p).map(|c| self.offset[*c as usize] + self.size[*c as usize]);
                let Some(to) = ends.min() else { break };
                to
            } else {
                lid
            };
            if k + 1 < candidates.len() {
                self.dirty = self.span[j as usize].clone();
                self.raise(j, to);
                if !self.roomy(part.clone(), to) {
                    break;
                }
            }
        }
        self.take_back(before);
        if result == Found::No && self.failed.len() < MEMORY {
            self.failed.insert(hash);
        }
        result
    }

    /// The request to branch on, and the candidates, itself among them.
    fn choose(&mut self, part: Range<usize>) -> (u32, Vec<u32>) {
        let lid = |b: &Branch, i: u32| b.offset[i as usize] + b.size[i as usize];
        let list = &self.lists[part.clone()];
        if self.pivot == Pivot::Lowest {
            let p = list.iter().copied().min_by_key(|i| (lid(self, *i), *i)).unwrap_or_default();
            let (l, s) = (lid(self, p), &self.span[p as usize]);
            let meets = |j: &&u32| {
                let t = &self.span[**j as usize];
                t.start < s.end && s.start < t.end && self.offset[**j as usize] < l
            };
            return (p, list.iter().filter(meets).copied().collect());
        }
        let (a, b) = hull(&self.span, list);
        self.low[a..b].fill(f64::MAX);
        for &i in list {
            let l = lid(self, i) as f64;
            lower(&mut self.low[self.span[i as usize].clone()], l);
        }
        let mut work = 0;
        for &i in list {
            let span = self.span[i as usize].clone();
            work += span.len() as u64;
            let least = self.low[span].iter().fold(f64::MAX, |a, x| if *x < a { *x } else { a });
            self.least[i as usize] = least as u64;
        }
        self.work += work / 2;
        let mut best = ((u64::MAX, u64::MAX, u64::MAX), 0);
        let mut best_candidates = vec![];
        let mut candidates = vec![];
        for &p in list {
            let l = lid(self, p);
            if self.least[p as usize] < l {
                continue;
            }
            let s = &self.span[p as usize];
            candidates.clear();
            let mut sound = true;
            for &j in list {
                let t = &self.span[j as usize];
                if t.start >= s.end {
                    break;
                }
                if s.start < t.end && self.offset[j as usize] < l {
                    if j != p && self.least[j as usize] < l {
                        sound = false;
                        break;
                    }
                    candidates.push(j);
                }
            }
            self.work += part.len() as u64 / 4;
            if !sound {
                continue;
            }
            let count = candidates.len() as u64;
            let key = if count == 1 {
                (0, 0, l)
            } else if self.pivot == Pivot::Fewest {
                (count, l, 0)
            } else {
                let first = candidates.iter().map(|j| (self.offset[*j as usize], self.rank[*j as usize])).min();
                let (o, r) = first.unwrap_or((0, 0));
                (o + 1, r.into(), count)
            };
            if key < best.0 {
                best = (key, p);
                std::mem::swap(&mut best_candidates, &mut candidates);
            }
        }
        (best.1, best_candidates)
    }

    /// Places a request at its lowest offset, lifts its neighbours over it and notes what must be looked at again.
    fn put(&mut self, i: u32) {
        let n = i as usize;
        self.log.push((i, self.offset[n], true));
        self.placed[n] = true;
        self.area += self.area_of(n);
        let size = self.size[n] as f64;
        self.rest[self.span[n].clone()].iter_mut().for_each(|x| *x -= size);
        self.most = self.most.max(self.area);
        let top = self.offset[n] + self.size[n];
        let mut dirty = Range { start: usize::MAX, end: 0 };
        for k in 0..self.near[n].len() {
            let j = self.near[n][k] as usize;
            if !self.placed[j] && self.offset[j] < top {
                self.log.push((j as u32, self.offset[j], false));
                self.offset[j] = top;
                dirty = dirty.start.min(self.span[j].start)..dirty.end.max(self.span[j].end);
            }
        }
        self.work += self.near[n].len() as u64;
        self.dirty = dirty;
        self.level = top;
    }

    fn raise(&mut self, i: u32, to: u64) {
        let n = i as usize;
        if self.offset[n] < to {
            self.log.push((i, self.offset[n], false));
            self.offset[n] = to;
        }
    }

    /// Whether every dirty section has room for what is left there, and above `level` for what begins there or higher.
    fn roomy(&mut self, list: Range<usize>, level: u64) -> bool {
        let dirty = self.dirty.clone();
        if dirty.is_empty() {
            return true;
        }
        self.low[dirty.clone()].fill(f64::MAX);
        self.sum[dirty.clone()].fill(0);
        let mut work = 0;
        for &i in &self.lists[list] {
            let s = &self.span[i as usize];
            if s.start >= dirty.end {
                break;
            }
            let part = s.start.max(dirty.start)..s.end.min(dirty.end);
            if part.is_empty() {
                continue;
            }
            work += 4 + part.len() / 2;
            let o = self.offset[i as usize];
            lower(&mut self.low[part.clone()], o as f64);
            if o >= level {
                let size = self.size[i as usize];
                self.sum[part].iter_mut().for_each(|x| *x += size);
            }
        }
        self.work += work as u64;
        let room = self.capacity.saturating_sub(level);
        // The sign shows what is too much.
        let above = self.sum[dirty.clone()].iter().fold(0, |a, x| a | room.wrapping_sub(*x));
        if above >> 63 != 0 {
            return false;
        }
        let capacity = self.capacity as f64;
        let mut fits = true;
        for (l, r) in self.low[dirty.clone()].iter().zip(&self.rest[dirty]) {
            fits &= *r == 0.0 || l + r <= capacity;
        }
        fits
    }

    /// Undoes everything after a mark of the log.
    fn take_back(&mut self, mark: usize) {
        while self.log.len() > mark {
            let Some((i, offset, placed)) = self.log.pop() else { return };
            if placed {
                self.placed[i as usize] = false;
                self.area -= self.area_of(i as usize);
                let size = self.size[i as usize] as f64;
                self.rest[self.span[i as usize].clone()].iter_mut().for_each(|x| *x += size);
            }
            self.offset[i as usize] = offset;
        }
    }
}

/// Takes the lesser of each and `x`.
fn lower(list: &mut [f64], x: f64) {
    for l in list {
        *l = if x < *l { x } else { *l };
    }
}

/// First and one past the last section of some requests.
fn hull(span: &[Range<usize>], list: &[u32]) -> (usize, usize) {
    list.iter().fold((usize::MAX, 0), |(a, b), i| (a.min(span[*i as usize].start), b.max(span[*i as usize].end)))
}
