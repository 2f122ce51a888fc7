//! Repair of a placement that is above a capacity: what sticks out is placed again within it, in the place of others that are easier
//! to place, which are placed again in turn.
//!
//! How hard a request is to place depends on its size and on how crowded its time is; each time that one loses its place it costs
//! more to take it again. The hardest goes first, to where what loses its place costs least.
//!
//! Does what filling cannot where sizes are of few classes or powers of two, as gaps then fit exactly.

use super::Request;
use super::branch::sections;
use super::greedy::Draw;
use super::stack::Stop;
use super::steps::{loads, prices, sums};
use std::collections::BinaryHeap;
use std::ops::Range;

/// Sections between two lists of what is alive, at least, and about how long all of these are at most.
const EACH: usize = 64;
const LISTED: usize = 2_000_000;
/// Work of a step beyond the requests looked at, and so many of these cost as much again as one each: the caches are small.
const STEP: u64 = 300;
const CACHED: usize = 4096;
/// How hard each is beyond what its size and its time make it, as a part of the mean; how much harder one is that lost its place.
const EVEN: f64 = 0.05;
const HARDER: f64 = 0.3;
/// The mean in whole numbers.
const UNIT: f64 = 65536.0;

/// Requests by the sections in which they are alive.
struct Alive {
    /// Each with its end.
    by_start: Vec<(u32, u32)>,
    /// Number of requests that begin before each section.
    before: Vec<u32>,
    /// What is alive in some sections, so far apart, and where the list of each begins.
    each: usize,
    lists: Vec<(u32, u32)>,
    at: Vec<usize>,
}

impl Alive {
    fn new(span: &[Range<usize>], count: usize) -> Alive {
        let mut by_start: Vec<u32> = (0..span.len() as u32).collect();
        super::sort::by_key(&mut by_start, &|i| (span[i as usize].start as u128, 0));
        let by_start: Vec<(u32, u32)> = by_start.into_iter().map(|i| (i, span[i as usize].end as u32)).collect();
        let mut before = vec![0u32; count + 1];
        span.iter().for_each(|s| before[s.start + 1] += 1);
        (0..count).for_each(|t| before[t + 1] += before[t]);
        let each = EACH.max(span.iter().map(Range::len).sum::<usize>() / LISTED);
        let (mut lists, mut at) = (vec![], vec![0]);
        let mut live: Vec<(u32, u32)> = vec![];
        for t in (0..count).step_by(each) {
            live.retain(|x| x.1 as usize > t);
            lists.extend(&live);
            at.push(lists.len());
            live.extend(&by_start[before[t] as usize..before[count.min(t + each)] as usize]);
        }
        Alive { by_start, before, each, lists, at }
    }

    /// About as many as are alive at one time.
    fn abreast(&self) -> u64 {
        (self.lists.len() / (self.at.len() - 1).max(1)) as u64
    }

    /// What shares a section with some.
    fn near(&self, s: &Range<usize>, out: &mut Vec<u32>) {
        let block = s.start / self.each;
        let until = self.before[s.start] as usize;
        let lives = |x: &&(u32, u32)| x.1 as usize > s.start;
        out.clear();
        out.extend(self.lists[self.at[block]..self.at[block + 1]].iter().filter(lives).map(|x| x.0));
        let later = &self.by_start[self.before[block * self.each] as usize..until];
        out.extend(later.iter().filter(lives).map(|x| x.0));
        out.extend(self.by_start[until..self.before[s.end] as usize].iter().map(|x| x.0));
    }
}

/// Where a request lies, and what it costs to take its place; nothing where it has none.
#[derive(Clone, Copy)]
struct Placed {
    from: u64,
    to: u64,
    cost: i64,
}

/// Sorts few offsets by bins.
struct Bins {
    shift: u32,
    ends: Vec<u32>,
    sorted: Vec<(u64, i64)>,
}

impl Bins {
    /// For offsets within a capacity, with so many requests side by side.
    fn new(capacity: u64, abreast: u64) -> Bins {
        let shift = (capacity / (4 * abreast).clamp(256, 1 << 14)).max(1).ilog2();
        Bins { shift, ends: vec![0; (capacity >> shift) as usize + 1], sorted: vec![] }
    }

    /// Sorts changes of a cost by their offsets.
    fn sort(&mut self, list: &[(u64, i64)]) -> &[(u64, i64)] {
        self.ends.fill(0);
        let (last, shift) = (self.ends.len() - 1, self.shift);
        let bin = |x: u64| ((x >> shift) as usize).min(last);
        list.iter().for_each(|x| self.ends[bin(x.0)] += 1);
        let mut sum = 0;
        for e in &mut self.ends {
            sum += *e;
            *e = sum;
        }
        self.sorted.resize(list.len(), (0, 0));
        for x in list {
            let e = &mut self.ends[bin(x.0)];
            *e -= 1;
            self.sorted[*e as usize] = *x;
        }
        // Only within bins anything is out of order.
        for k in 1..self.sorted.len() {
            let x = self.sorted[k];
            let mut at = k;
            while at > 0 && self.sorted[at - 1].0 > x.0 {
                self.sorted[at] = self.sorted[at - 1];
                at -= 1;
            }
            self.sorted[at] = x;
        }
        &self.sorted
    }
}

/// Offsets with which all lies within `capacity`, found by changing others; `None` when that takes more than the work that is left, or
/// when told to stop or late. A section is crowded where so much of its share is left.
pub(super) fn repair(
    list: &[Request],
    offsets: &[u64],
    capacity: u64,
    crowded: f64,
    work: &mut u64,
    stop: Stop<'_>,
) -> Option<Vec<u64>> {
    let (span, count) = sections(list);
    let alive = Alive::new(&span, count);
    let price = sums(&prices(&loads(list, &span, count), capacity, crowded));
    let hard: Vec<f64> = list.iter().zip(&span).map(|(r, s)| r.size as f64 * (price[s.end] - price[s.start])).collect();
    let mean = hard.iter().sum::<f64>() / hard.len().max(1) as f64;
    let hard: Vec<i64> = hard.iter().map(|h| ((h / mean + EVEN) * UNIT) as i64).collect();
    let mut cost = hard.clone();
    let mut placed = vec![];
    let mut waiting = BinaryHeap::new();
    for (i, (r, from)) in list.iter().zip(offsets).enumerate() {
        let to = from.saturating_add(r.size);
        let fits = to <= capacity;
        placed.push(Placed { from: *from, to, cost: if fits { hard[i] } else { 0 } });
        if r.size > capacity {
            return None;
        }
        if !fits {
            waiting.push((hard[i], i as u32));
        }
    }
    let mut bins = Bins::new(capacity, alive.abreast());
    let (mut near, mut changes) = (vec![], vec![]);
    let mut draw = Draw::new();
    while let Some((_, i)) = waiting.pop() {
        let (i, size) = (i as usize, list[i as usize].size);
        alive.near(&span[i], &mut near);
        let looks = near.len() + near.len() * near.len() / CACHED;
        *work = work.saturating_sub(STEP + looks as u64);
        if *work == 0 || stop.told() || stop.late() {
            return None;
        }
        changes.clear();
        for p in near.iter().map(|j| placed[*j as usize]).filter(|p| p.cost > 0) {
            changes.extend([((p.from + 1).saturating_sub(size), p.cost), (p.to, -p.cost)]);
        }
        let from = cheapest(bins.sort(&changes), capacity - size, &mut draw);
        let to = from + size;
        for &j in &near {
            let p = &mut placed[j as usize];
            if p.cost > 0 && p.from < to && from < p.to {
                p.cost = 0;
                cost[j as usize] += (hard[j as usize] as f64 * HARDER) as i64;
                waiting.push((hard[j as usize], j));
            }
        }
        placed[i] = Placed { from, to, cost: cost[i] };
    }
    Some(placed.iter().map(|p| p.from).collect())
}

/// The offset up to `last` at which changes of the cost sum to the least; one of those where some are equal. Lies at an end of
/// something placed, or right below a beginning.
fn cheapest(changes: &[(u64, i64)], last: u64, draw: &mut Draw) -> u64 {
    let (mut best, mut ties, mut found) = (i64::MAX, 0, 0);
    let mut take = |sum: i64, y: u64| {
        if y > last || sum > best {
            return;
        }
        ties = if sum < best { 1 } else { ties + 1 };
        if ties == 1 || draw.below(ties) == 0 {
            (best, found) = (sum, y);
        }
    };
    // From where on the sum holds, and whether something ends there.
    let (mut sum, mut at, mut ends) = (0, 0, true);
    for &(y, change) in changes {
        if y > at {
            if ends {
                take(sum, at);
            } else if change > 0 {
                take(sum, y - 1);
            }
            (at, ends) = (y, false);
        }
        ends |= change < 0;
        sum += change;
    }
    take(sum, at);
    found
}

#[cfg(test)]
mod tests {
    use super::super::{check, lower_bound};
    use super::*;

    #[test]
    fn the_cheapest_place_is_found() {
        let mut draw = Draw::new();
        // Something of size 2 beside [1, 4) and [6, 9) of a height of 10.
        let changes = |costs: [i64; 2]| [(0, costs[0]), (4, -costs[0]), (5, costs[1]), (9, -costs[1])];
        assert_eq!(cheapest(&changes([3, 3]), 8, &mut draw), 4);
        assert_eq!(cheapest(&[(0, 3), (5, -3), (5, 2), (9, -2)], 8, &mut draw), 5);
        assert_eq!(cheapest(&[], 8, &mut draw), 0);
    }

    #[test]
    fn what_sticks_out_takes_the_place_of_others() {
        let r = |first, last, size| Request { first, last, size };
        // The largest lies on top of a gap that is too small for it.
        let list = [r(0, 4, 2), r(0, 2, 3), r(2, 4, 3), r(0, 4, 5)];
        let bound = lower_bound(&list);
        let found = repair(&list, &[0, 5, 2, 8], bound, 0.01, &mut 100_000, Stop::never()).expect("enough work");
        assert_eq!(check(&list, &found), Ok(bound));
        assert_eq!(repair(&list, &[0, 5, 2, 8], 4, 0.01, &mut 100_000, Stop::never()), None, "larger than all");
        assert_eq!(repair(&list, &[0, 5, 2, 8], bound - 1, 0.01, &mut 100_000, Stop::never()), None, "no room");
    }
}
