//! The searches for the lower bound and, where that is not reached, for totals above it, in turn and with growing effort.
//!
//! Where there is little slack, what ends and what begins tells nearly all, so beams along time find a placement (see [`super::sweep`]);
//! else the depth-first search does better (see [`super::portfolio`]). Neither says early that it will fail. So both run beside each
//! other, a little of each, then more, on two threads; where a total is wanted that leaves room to spare two depth-first searches do.
//! Each is bounded by counts, and where both find something the first of the two counts: the result is the same on every machine, and
//! with one thread.

use super::greedy::Search;
use super::portfolio::{Hunt, Portfolio};
use super::{Request, check, sweep};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

/// Work of the first beam, at effort 1.
const FIRST: u64 = 30_000_000;
/// Work of the depth-first search beside it.
const BRIEF: u64 = 15_000_000;
/// Beams that follow, their work (and what is left of those before) and that of the depth-first search beside them, at effort 1.
const ROUNDS: [(Range<usize>, u64, u64); 3] =
    [(1..2, 45_000_000, 60_000_000), (2..7, 150_000_000, 250_000_000), (7..10, 50_000_000, 200_000_000)];
/// In the rounds from here on the depth-first search looks for totals above the bound where no other is wanted, with so much work at
/// each, and so much in the end.
const DESCEND: usize = 2;
const EACH: u64 = 40_000_000;
const LAST: u64 = 80_000_000;
/// Requests up to which the depth-first search is tried, and from which on there are two threads.
const DEEP: usize = 600;
pub(super) const WIDE: usize = 40;
/// A total so much (one in so many) above the bound leaves room to spare.
const ROOMY: u64 = 50;

/// The best placement so far, and the least total that is not refuted.
pub(super) struct Best {
    pub(super) total: u64,
    pub(super) offsets: Vec<u64>,
    pub(super) proven: u64,
}

impl Best {
    /// Takes a placement if it is better.
    fn take(&mut self, requests: &[Request], offsets: Option<Vec<u64>>) {
        if let Some(offsets) = offsets
            && let Ok(total) = check(requests, &offsets)
            && total < self.total
        {
            (self.total, self.offsets) = (total, offsets);
        }
    }
}

/// Runs two searches, the second on a thread of its own, if there can be one, or after the first.
fn both<A, B: Send>(
    threads: bool,
    first: impl FnOnce() -> A,
    second: impl FnOnce() -> Option<B> + Send,
) -> (A, Option<B>) {
    if !threads {
        return (first(), second());
    }
    std::thread::scope(|scope| {
        let other = std::thread::Builder::new().spawn_scoped(scope, second);
        let a = first();
        let b = other.ok().and_then(|o| o.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        (a, b)
    })
}

/// As [`both`]; the second is told to stop as soon as the first has found something, and counts only where it has not.
pub(super) fn beside<A, B: Send>(
    threads: bool,
    first: impl FnOnce() -> Option<A>,
    second: impl FnOnce(&AtomicBool) -> Option<B> + Send,
) -> (Option<A>, Option<B>) {
    let stop = AtomicBool::new(false);
    let found = || {
        let a = first();
        stop.store(a.is_some(), Ordering::Relaxed);
        a
    };
    let (a, b) = both(threads, found, || if stop.load(Ordering::Relaxed) { None } else { second(&stop) });
    // It may have come to an end before it was told.
    if a.is_some() { (a, None) } else { (None, b) }
}

/// Improves a placement of requests that is above the bound. A `goal` is a total that is known to suffice.
pub(super) fn solve(requests: &[Request], goal: Option<u64>, effort: u64, threads: bool, best: &mut Best) {
    let bound = best.proven;
    let mut search = Search::new(requests);
    let (greedy, order) = search.greedy(bound);
    if greedy < best.total {
        let offsets = search.offsets_of(&order);
        best.take(requests, Some(offsets));
    }
    let live: Vec<usize> =
        (0..requests.len()).filter(|i| requests[*i].first < requests[*i].last && requests[*i].size > 0).collect();
    let list: Vec<Request> = live.iter().map(|i| requests[*i]).collect();
    let sweep = |capacity: u64, beams: Range<usize>, directions: &[bool], work: &mut u64, stop: &AtomicBool| {
        let found = sweep::sweep(&list, capacity, beams, directions, work, stop)?;
        let mut offsets = vec![0; requests.len()];
        live.iter().zip(found).for_each(|(i, o)| offsets[*i] = o);
        Some(offsets)
    };
    let never = AtomicBool::new(false);
    if best.total <= bound {
        return;
    }
    let mut portfolio = Portfolio::new(requests, effort).filter(|_| list.len() <= DEEP);
    let beam = |directions: &[bool], stop: &AtomicBool| sweep(bound, 0..1, directions, &mut (FIRST * effort), stop);
    if let Some(p) = &mut portfolio {
        let mut proven = p.grain(bound);
        let second = |stop: &AtomicBool| p.lower(&mut Hunt::new(0), proven, BRIEF, &mut proven, stop);
        let (a, b) = beside(threads, || beam(&[false, true], &never), second);
        best.proven = proven;
        best.take(requests, a.or(b));
    } else {
        let (a, b) = beside(threads, || beam(&[false], &never), |stop| beam(&[true], stop));
        best.take(requests, a.or(b));
    }
    let wanted = goal.map_or(bound, |g| g.max(bound));
    let mut failed = best.proven;
    let (mut hunt, mut other) = (Hunt::new(0), Hunt::new(1));
    let mut twin = portfolio.clone();
    let roomy = wanted > bound.saturating_add(bound / ROOMY);
    let (mut left, mut left_too) = (0, 0);
    for (round, (beams, along, deep)) in ROUNDS.into_iter().enumerate() {
        if best.total <= wanted.max(best.proven) {
            break;
        }
        let refuted = wanted < best.proven;
        let both: &[bool] = if portfolio.is_some() { &[false, true] } else { &[false] };
        left += along * effort;
        left_too += along * effort;
        let first = || match &mut twin {
            _ if refuted => None,
            Some(p) if roomy => p.lower(&mut other, wanted, deep, &mut { bound }, &never),
            _ => sweep(wanted, beams.clone(), both, &mut left, &never),
        };
        let Some(p) = &mut portfolio else {
            let (a, b) = beside(threads, first, |stop| sweep(wanted, beams.clone(), &[true], &mut left_too, stop));
            best.take(requests, a.or(b));
            continue;
        };
        let (mut proven, mut total) = (best.proven, best.total);
        let second = |stop: &AtomicBool| {
            if wanted == bound && (round >= DESCEND || refuted) {
                let found = p.descend(None, (&mut failed, &mut proven), &mut total, (EACH, LAST), stop);
                return Some((found, proven));
            }
            let target = wanted.max(proven);
            if wanted == bound {
                // From the start again it gets further: what failed is remembered.
                hunt = Hunt::new(0);
            }
            Some((p.lower(&mut hunt, target, deep, &mut proven, stop), proven))
        };
        let (a, b) = beside(threads, first, second);
        best.take(requests, a);
        if let Some((offsets, proven)) = b {
            best.proven = best.proven.max(proven);
            best.take(requests, offsets);
        }
    }
    if best.total <= best.proven || goal.is_some_and(|g| best.total <= g) {
        return;
    }
    let found = if let Some(p) = &mut portfolio {
        let twin = twin.as_mut().map(|t| (t, threads));
        p.descend(twin, (&mut failed, &mut best.proven), &mut { best.total }, (EACH, LAST), &never)
    } else {
        let (_, order) = search.improve(greedy, order, bound, effort);
        Some(search.offsets_of(&order))
    };
    best.take(requests, found);
}

#[cfg(test)]
mod tests {
    use super::super::{lower_bound, stack};
    use super::*;

    #[test]
    fn two_threads_find_what_one_does() {
        let mut draw = super::super::draws(9);
        let mut searched = 0;
        for case in 0..12 {
            // A rectangle cut into pieces, with and without some of them.
            let mut list = vec![Request { first: 0, last: 1000, size: 1000 }];
            while list.len() < 60 + 5 * case {
                let some: Vec<usize> = (0..6).map(|_| draw(list.len() as u64) as usize).collect();
                let area = |k: usize| list[k].size * (list[k].last - list[k].first);
                let k = some.into_iter().max_by_key(|k| area(*k)).unwrap_or(0);
                let r = list.swap_remove(k);
                if r.last - r.first < 2 || r.size < 2 {
                    list.push(r);
                } else if draw(2) == 0 {
                    let at = r.first + 1 + draw(r.last - r.first - 1);
                    list.extend([Request { last: at, ..r }, Request { first: at, ..r }]);
                } else {
                    let part = 1 + draw(r.size - 1);
                    list.extend([Request { size: part, ..r }, Request { size: r.size - part, ..r }]);
                }
            }
            list.truncate(list.len() - case % 3);
            let bound = lower_bound(&list);
            let (total, offsets) = stack::stack(&list, bound, None);
            searched += usize::from(total > bound);
            let goal = [None, Some(bound + 3)][case % 2];
            let found = [false, true].map(|threads| {
                let mut best = Best { total, offsets: offsets.clone(), proven: bound };
                solve(&list, goal, 1, threads, &mut best);
                assert_eq!(check(&list, &best.offsets), Ok(best.total));
                (best.total, best.proven, best.offsets)
            });
            assert_eq!(found[0], found[1], "case {case}");
        }
        assert!(searched > 3, "{searched} need a search");
    }

    #[test]
    fn the_second_counts_only_where_the_first_finds_nothing() {
        for threads in [false, true] {
            assert_eq!(beside(threads, || Some(1), |_| Some(2)), (Some(1), None));
            assert_eq!(beside(threads, || None::<i32>, |_| Some(2)), (None, Some(2)));
            assert_eq!(both(threads, || 1, || Some(2)), (1, Some(2)));
        }
    }
}
