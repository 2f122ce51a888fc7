//! The memory planner: where buffers with known lifetimes lie in one arena, so that it is as small as possible.
//!
//! This is dynamic storage allocation, which is NP-hard. The planner stacks what is nested and fills from below what is not (see
//! [`stack`] and [`fill`]). Where that is above the lower bound and there are not too many requests, searches follow in turn and with
//! growing effort (see [`solve`]): greedy orders, beams along time that fill what ends with what begins (see [`sweep`]), and a
//! depth-first search (see [`branch`]) in many orders, at the lower bound and then between what is proven and what is reached. It
//! stops as soon as the two meet. Effort is bounded by counts, so the result is the same on every machine, unless a time limit is
//! asked for (see [`place_within`]). [`check`] is independent of how a placement was found. Nothing here knows what a buffer holds.

mod branch;
mod fill;
mod greedy;
mod order;
mod portfolio;
mod repair;
mod rows;
mod skyline;
mod solve;
mod sort;
mod stack;
mod steps;
mod sweep;
mod ways;

use solve::Best;
use std::time::{Duration, Instant};

/// A buffer: alive at the times `first..last`, `size` bytes long.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Request {
    /// First time it is alive.
    pub first: u64,
    /// One past the last time it is alive.
    pub last: u64,
    /// Bytes.
    pub size: u64,
}

/// Where every buffer lies.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Placement {
    /// Offset of each request, a multiple of the alignment.
    pub offsets: Vec<u64>,
    /// Bytes of the arena: the largest offset plus size (rounded up to the alignment).
    pub total: u64,
    /// No placement is smaller (sizes rounded up to the alignment).
    pub lower_bound: u64,
    /// True when `total` is proven to be the smallest.
    pub optimal: bool,
}

/// The largest sum of sizes alive at one time; saturating.
pub fn lower_bound(requests: &[Request]) -> u64 {
    let mut events: Vec<(u64, bool, u64)> = vec![];
    for r in requests.iter().filter(|r| r.first < r.last) {
        events.push((r.first, true, r.size));
        events.push((r.last, false, r.size));
    }
    // At one time, ends come before beginnings.
    events.sort_unstable();
    let (mut live, mut peak) = (0u128, 0u128);
    for (_, begins, size) in events {
        live = if begins { live + u128::from(size) } else { live - u128::from(size) };
        peak = peak.max(live);
    }
    u64::try_from(peak).unwrap_or(u64::MAX)
}

/// Checks that no two requests which are alive at one time share a byte, and returns the bytes needed.
///
/// # Errors
/// The indices of two requests that collide, or of one (twice) whose end is past `u64`.
pub fn check(requests: &[Request], offsets: &[u64]) -> Result<u64, (usize, usize)> {
    let mut order: Vec<u32> = (0..requests.len() as u32).collect();
    order.retain(|i| requests[*i as usize].first < requests[*i as usize].last);
    sort::by_key(&mut order, &|i| (u128::from(requests[i as usize].first), 0));
    // What is alive: its last time, where it lies, its index. Side by side, as all of them are looked at each time.
    let mut live: Vec<(u64, u64, u64, usize)> = vec![];
    let mut total = 0;
    for i in order.into_iter().map(|i| i as usize) {
        let (r, a) = (requests[i], offsets.get(i).copied().ok_or((i, i))?);
        let end = a.checked_add(r.size).ok_or((i, i))?;
        total = total.max(end);
        live.retain(|l| l.0 > r.first);
        if let Some(l) = live.iter().find(|l| a < l.2 && l.1 < end) {
            return Err((l.3, i));
        }
        live.push((r.last, a, end, i));
    }
    Ok(total)
}

/// As [`place_with`], with an effort that takes about a second at most.
pub fn place(requests: &[Request], align: u64) -> Placement {
    place_with(requests, align, None, 1)
}

/// The size of an arena, as far as it tells whether `enough` bytes suffice: the lower bound where that is more, else the total of
/// a placement, which is not improved once it is within them.
pub fn total_within(requests: &[Request], align: u64, enough: u64) -> u64 {
    let rounded = rounded(requests, align.max(1));
    let bound = lower_bound(&rounded);
    if bound > enough {
        return bound;
    }
    match stack::stack(&rounded, bound, None).0 {
        total if total <= enough => total,
        _ => place(requests, align).total,
    }
}

/// The requests with their sizes rounded up to the alignment.
fn rounded(requests: &[Request], align: u64) -> Vec<Request> {
    let up = |r: &Request| Request { size: r.size.checked_next_multiple_of(align).unwrap_or(u64::MAX), ..*r };
    requests.iter().map(up).collect()
}

/// Places the requests at multiples of `align` (at least 1). Requests of no length or no size lie at 0. A `goal` is a
/// total that is known to suffice: it is tried when the lower bound is not reached. `effort` multiplies the budgets of
/// the searches, which are used up only where the lower bound is not reached.
///
/// Sizes are assumed to sum to less than `u64::MAX`; otherwise offsets saturate and [`check`] finds it.
pub fn place_with(requests: &[Request], align: u64, goal: Option<u64>, effort: u64) -> Placement {
    place_until(requests, align, goal, effort, None)
}

/// As [`place_with`] at effort 1. Where there are thousands of requests, what improves a first placement is given up after some
/// time: only there what is found can depend on the machine and its load.
pub fn place_within(requests: &[Request], align: u64, goal: Option<u64>, time: Duration) -> Placement {
    place_until(requests, align, goal, 1, Instant::now().checked_add(time))
}

/// As [`place_with`]; many requests are not improved any more after a time, if there is one.
fn place_until(requests: &[Request], align: u64, goal: Option<u64>, effort: u64, until: Option<Instant>) -> Placement {
    // The same in whatever order the requests are given.
    let mut sorted: Vec<u32> = (0..requests.len() as u32).collect();
    sort::by_key(&mut sorted, &|i| {
        let r = requests[i as usize];
        (u128::from(r.last.saturating_sub(r.first)), u128::from(r.first) << 64 | u128::from(r.size))
    });
    let list: Vec<Request> = sorted.iter().map(|i| requests[*i as usize]).collect();
    let found = place_sorted(&rounded(&list, align.max(1)), goal, effort, until);
    let mut offsets = vec![0; requests.len()];
    sorted.iter().zip(&found.offsets).for_each(|(i, o)| offsets[*i as usize] = *o);
    Placement { offsets, ..found }
}

/// As [`place_until`], with sizes rounded, and in the order given.
fn place_sorted(rounded: &[Request], goal: Option<u64>, effort: u64, until: Option<Instant>) -> Placement {
    let bound = lower_bound(rounded);
    let (total, offsets) = stack::stack(rounded, bound, until);
    let mut best = Best { total, offsets, proven: bound };
    if total > bound && rounded.len() <= stack::MANY && !greedy::crowded(rounded) {
        solve::solve(rounded, goal, effort, rounded.len() >= solve::WIDE, &mut best);
    }
    let Best { total, offsets, proven } = best;
    Placement { offsets, total, lower_bound: bound, optimal: total <= proven }
}

/// Numbers below a limit, drawn by a xorshift; for tests.
#[cfg(test)]
fn draws(mut x: u64) -> impl FnMut(u64) -> u64 {
    move |below| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 11) % below
    }
}
