//! The memory planner: where buffers with known lifetimes lie in one arena, so that it is as small as possible.
//!
//! This is dynamic storage allocation, which is NP-hard. The planner tries several greedy orders, then a local search
//! near the best one, then a depth-first search that is complete when its budget suffices, and stops as soon as the lower
//! bound is reached. Effort is bounded by counts, so the result is the same on every machine. [`check`] is independent
//! of how a placement was found. Nothing here knows what a buffer holds.

mod exact;
mod greedy;

use exact::{Exact, Found};
use greedy::Search;

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
    let mut order: Vec<usize> = (0..requests.len()).filter(|i| requests[*i].first < requests[*i].last).collect();
    order.sort_by_key(|i| requests[*i].first);
    let mut live: Vec<usize> = vec![];
    let mut total = 0;
    for i in order {
        let (r, a) = (requests[i], offsets.get(i).copied().ok_or((i, i))?);
        let end = a.checked_add(r.size).ok_or((i, i))?;
        total = total.max(end);
        live.retain(|j| requests[*j].last > r.first);
        for &j in &live {
            if a < offsets[j] + requests[j].size && offsets[j] < end {
                return Err((j, i));
            }
        }
        live.push(i);
    }
    Ok(total)
}

/// As [`place_with`], with an effort that takes about a quarter of a second at most.
pub fn place(requests: &[Request], align: u64) -> Placement {
    place_with(requests, align, 1)
}

/// Places the requests at multiples of `align` (at least 1). Requests of no length or no size lie at 0. `effort`
/// multiplies the budgets of the searches, which are used up only where the lower bound is not reached.
///
/// Sizes are assumed to sum to less than `u64::MAX`; otherwise offsets saturate and [`check`] finds it.
pub fn place_with(requests: &[Request], align: u64, effort: u64) -> Placement {
    let align = align.max(1);
    let rounded: Vec<Request> = requests
        .iter()
        .map(|r| Request { size: r.size.checked_next_multiple_of(align).unwrap_or(u64::MAX), ..*r })
        .collect();
    let bound = lower_bound(&rounded);
    let mut search = Search::new(&rounded);
    let mut best: Option<(u64, Vec<u32>)> = None;
    for order in search.orders() {
        let total = search.fit(&order, best.as_ref().map_or(u64::MAX, |b| b.0));
        if best.as_ref().is_none_or(|b| total < b.0) {
            best = Some((total, order));
        }
        if best.as_ref().is_some_and(|b| b.0 <= bound) {
            break;
        }
    }
    let (mut total, mut order) = best.unwrap_or((0, vec![]));
    if total > bound {
        (total, order) = search.improve(total, order, bound, effort);
    }
    search.fit(&order, u64::MAX);
    let mut offsets = search.offsets;
    let mut proven = bound;
    if total > bound {
        (total, proven) = squeeze(&rounded, &mut offsets, total, bound, effort);
    }
    Placement { offsets, total, lower_bound: bound, optimal: total <= proven }
}

/// Requests up to which the complete search is tried: its depth is their number.
const EXACT_UP_TO: usize = 1500;
/// Visits of one complete search, at effort 1.
const EXACT_BUDGET: u64 = 1_500_000;

/// Lowers the total by complete searches at smaller capacities. Returns it with the highest proven bound.
fn squeeze(requests: &[Request], offsets: &mut [u64], mut total: u64, bound: u64, effort: u64) -> (u64, u64) {
    let live = |i: &usize| requests[*i].first < requests[*i].last && requests[*i].size > 0;
    let all: Vec<usize> = (0..requests.len()).filter(live).collect();
    let sum = all.iter().try_fold(0u64, |a, i| a.checked_add(requests[*i].size));
    if all.len() > EXACT_UP_TO || sum.is_none_or(|s| s > u64::MAX / 4) {
        return (total, bound);
    }
    // Every offset is a sum of sizes, so totals are multiples of their common divisor.
    let grain = all.iter().fold(0, |g, i| gcd(g, requests[*i].size)).max(1);
    let mut proven = bound.next_multiple_of(grain);
    let life = |i: usize| u128::from(requests[i].last - requests[i].first);
    let area = |i: usize| u128::from(requests[i].size) * life(i);
    let crowd = crowds(requests, &all);
    let ranks: [&dyn Fn(usize) -> (u128, u128, u128); 3] =
        [&|i| (life(i), area(i), crowd[i].into()), &|i| (crowd[i].into(), area(i), life(i)), &|i| {
            (crowd[i].into(), life(i), area(i))
        }];
    let mut searches: Vec<(Exact, Vec<usize>)> = vec![];
    for rank in ranks {
        let mut order = all.clone();
        order.sort_by(|a, b| rank(*b).cmp(&rank(*a)).then(a.cmp(b)));
        let list: Vec<Request> = order.iter().map(|i| requests[*i]).collect();
        searches.push((Exact::new(&list), order));
    }
    // The bound itself first, then by halves between what failed and what is known to do.
    let mut target = proven;
    let mut failed = proven;
    for _ in 0..12 {
        let mut found = Found::Unknown;
        for (exact, order) in &mut searches {
            let mut budget = EXACT_BUDGET.saturating_mul(effort);
            found = exact.search(target, &mut budget);
            if found == Found::Yes {
                for (k, i) in order.iter().enumerate() {
                    offsets[*i] = exact.offset[k];
                }
                total = order.iter().map(|i| offsets[*i] + requests[*i].size).max().unwrap_or(0);
            }
            if found != Found::Unknown {
                break;
            }
        }
        if found == Found::No {
            proven = proven.max(target + grain);
        }
        if found != Found::Yes {
            failed = failed.max(target);
        }
        if total <= proven || total - failed <= grain {
            break;
        }
        target = failed + (total - failed) / 2 / grain * grain;
        if target <= failed || total - failed < total / 2000 {
            break;
        }
    }
    (total, proven)
}

/// For each request, the largest sum of sizes alive at one of its times.
fn crowds(requests: &[Request], live: &[usize]) -> Vec<u64> {
    let mut times: Vec<u64> = live.iter().flat_map(|i| [requests[*i].first, requests[*i].last]).collect();
    times.sort_unstable();
    times.dedup();
    let at = |t: u64| times.partition_point(|x| *x < t);
    let mut load = vec![0u64; times.len()];
    for i in live {
        let r = &requests[*i];
        load[at(r.first)..at(r.last)].iter_mut().for_each(|x| *x = x.saturating_add(r.size));
    }
    let mut out = vec![0; requests.len()];
    for i in live {
        out[*i] = load[at(requests[*i].first)..at(requests[*i].last)].iter().copied().max().unwrap_or(0);
    }
    out
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}
