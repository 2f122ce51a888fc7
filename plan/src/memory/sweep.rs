//! A search along time for placements that leave no gap, or few.
//!
//! Everything alive at one time, and the gaps between, stand in some order from the bottom to the top, and a tree (see
//! [`super::order`]) holds all orders that are possible. What ends leaves a gap of its size in its place; what begins takes
//! the place of gaps that stand side by side, and of what is left of them a smaller gap remains. Where ends and beginnings
//! balance, as they do when there is little slack, nearly nothing is left to choose, however many requests there are.
//! Choices are ordered, exact ones first, and searched by limited discrepancy. The offsets follow from the last order by
//! going back in time.

use super::Request;
use super::order::{Run, Tree};

/// Nodes of one search at most.
const NODES: u64 = 4_000;
/// Ways that one request may take its place.
const WAYS: usize = 8;
/// Requests up to which the search is tried, and items that stand side by side.
const UP_TO: usize = 4000;
const ABREAST: u64 = 400_000;

/// What happens at one time: requests that end and that begin, largest first.
#[derive(Default)]
struct Event {
    ends: Vec<u32>,
    begins: Vec<u32>,
}

/// What was done, to go back.
enum Done {
    /// A request left a gap.
    Ended { request: u32, gap: u32 },
    /// Items took the place of a run of gaps.
    Placed { run: Run, new: Vec<u32> },
}

struct Sweep<'a> {
    events: &'a [Event],
    /// Sizes of requests, then of gaps.
    size: Vec<u64>,
    done: Vec<Done>,
    set: Vec<bool>,
    nodes: u64,
    work: u64,
}

/// Where the search stands: event, requests to begin there, gaps made there and before.
#[derive(Clone)]
struct State {
    tree: Tree,
    event: usize,
    begins: Vec<u32>,
    fresh: Vec<u32>,
    old: Vec<u32>,
}

/// Gaps that give their place to requests.
#[derive(PartialEq, Eq, Clone)]
struct Way {
    gaps: Vec<u32>,
    takes: Vec<u32>,
}

/// Offsets with which all lies within `capacity`, if the search finds them. Requests have a size and a length.
pub(super) fn sweep(requests: &[Request], capacity: u64, work: u64) -> Option<Vec<u64>> {
    let mut times: Vec<u64> = requests.iter().flat_map(|r| [r.first, r.last]).collect();
    times.sort_unstable();
    times.dedup();
    let area: u64 = requests.len() as u64 * requests.len() as u64;
    if requests.len() > UP_TO || area / times.len().max(1) as u64 > ABREAST {
        return None;
    }
    for mirrored in [false, true] {
        let mut events: Vec<Event> = times.iter().map(|_| Event::default()).collect();
        for (i, r) in requests.iter().enumerate() {
            let at = |t: u64| times.binary_search(&t).unwrap_or(0);
            let (mut first, mut last) = (at(r.first), at(r.last));
            if mirrored {
                (first, last) = (times.len() - 1 - last, times.len() - 1 - first);
            }
            events[first].begins.push(i as u32);
            events[last].ends.push(i as u32);
        }
        for e in &mut events {
            e.begins.sort_by_key(|i| (std::cmp::Reverse(requests[*i as usize].size), *i));
        }
        let mut spent = 0;
        for discrepancy in [0, 1, 2, 3, 5, 8, 12] {
            let mut search = Sweep {
                events: &events,
                size: requests.iter().map(|r| r.size).collect(),
                done: vec![],
                set: vec![],
                nodes: NODES,
                work: (work / 2).saturating_sub(spent),
            };
            let before = search.work;
            let gap = search.gap(capacity);
            let start = State { tree: Tree::Leaf(gap), event: 0, begins: vec![], fresh: vec![], old: vec![gap] };
            if let Some(tree) = search.enter(start, discrepancy) {
                return search.offsets(&tree, requests.len());
            }
            spent += before - search.work;
            if search.work == 0 {
                break;
            }
        }
    }
    None
}

impl Sweep<'_> {
    fn gap(&mut self, size: u64) -> u32 {
        self.size.push(size);
        self.size.len() as u32 - 1
    }

    /// Goes to the next time at which something begins, with what ends until then.
    fn enter(&mut self, mut s: State, discrepancy: u32) -> Option<Tree> {
        let events = self.events;
        let (marks, gaps) = (self.done.len(), self.size.len());
        s.old.append(&mut s.fresh);
        while s.begins.is_empty() {
            let Some(e) = events.get(s.event) else { return Some(s.tree) };
            s.old.append(&mut s.fresh);
            for &request in &e.ends {
                let gap = self.gap(self.size[request as usize]);
                s.tree.rename(request, gap);
                s.fresh.push(gap);
                self.done.push(Done::Ended { request, gap });
            }
            s.begins.clone_from(&e.begins);
            s.event += 1;
        }
        let found = self.go(s, discrepancy);
        if found.is_none() {
            self.done.truncate(marks);
            self.size.truncate(gaps);
        }
        found
    }

    /// Finds a place for the largest request that begins.
    fn go(&mut self, s: State, discrepancy: u32) -> Option<Tree> {
        let (ways, looks) = self.ways(&s);
        self.work = self.work.saturating_sub(looks);
        let mut cost = 0;
        for way in ways {
            let effort = 20 + 4 * (s.old.len() + s.begins.len() + s.fresh.len()) as u64;
            if self.nodes == 0 || self.work < effort || cost > discrepancy {
                return None;
            }
            self.nodes -= 1;
            self.work -= effort;
            let (marks, gaps) = (self.done.len(), self.size.len());
            self.set.clear();
            self.set.resize(self.size.len(), false);
            way.gaps.iter().for_each(|g| self.set[*g as usize] = true);
            let sum = |list: &[u32], sizes: &[u64]| list.iter().map(|i| sizes[*i as usize]).sum::<u64>();
            let left = sum(&way.gaps, &self.size) - sum(&way.takes, &self.size);
            let mut new = way.takes.clone();
            if left > 0 {
                new.push(self.gap(left));
            }
            let leaves = Tree::free(new.iter().copied().map(Tree::Leaf).collect());
            let Some((tree, run)) = s.tree.clone().replace(&self.set, leaves) else {
                self.size.truncate(gaps);
                continue;
            };
            let mut next = s.clone();
            next.tree = tree;
            next.begins.retain(|i| !way.takes.contains(i));
            let fresh = way.gaps.iter().any(|g| s.fresh.contains(g));
            next.fresh.retain(|g| !way.gaps.contains(g));
            next.old.retain(|g| !way.gaps.contains(g));
            if left > 0 {
                let gap = new[new.len() - 1];
                if fresh { next.fresh.push(gap) } else { next.old.push(gap) }
            }
            self.done.push(Done::Placed { run, new });
            let left = discrepancy - cost;
            let found = if next.begins.is_empty() { self.enter(next, left) } else { self.go(next, left) };
            if found.is_some() {
                return found;
            }
            self.done.truncate(marks);
            self.size.truncate(gaps);
            // A way that does not even fit costs nothing.
            cost += 1;
        }
        None
    }

    /// Ways for the largest request that begins, the likely ones first.
    fn ways(&self, s: &State) -> (Vec<Way>, u64) {
        let mut out: Vec<Way> = vec![];
        let mut looks = 20;
        let size = |i: u32| self.size[i as usize];
        let Some((&first, others)) = s.begins.split_first() else { return (out, looks) };
        let want = size(first);
        let mut add = |gaps: &[u32], takes: &[u32]| {
            let way = Way { gaps: gaps.to_vec(), takes: takes.to_vec() };
            if !out.contains(&way) {
                out.push(way);
            }
        };
        let total = |list: &[u32]| list.iter().map(|i| size(*i)).sum::<u64>();
        // Exactly, with what has just ended.
        let mut groups: Vec<(Vec<u32>, Vec<u32>)> = vec![];
        for few in 1..=4.min(s.fresh.len()) {
            subsets(&s.fresh, few, 60, &mut |x| groups.push((x.to_vec(), vec![])));
        }
        for (gaps, _) in groups.iter().filter(|g| total(&g.0) == want) {
            add(gaps, &[first]);
        }
        for (gaps, _) in groups.iter().filter(|g| g.0.len() <= 2 && total(&g.0) > want) {
            let rest = total(gaps) - want;
            for few in 1..=3.min(others.len()) {
                subsets(others, few, 60, &mut |x| {
                    looks += 2;
                    if total(x) == rest {
                        add(gaps, &[&[first], x].concat());
                    }
                });
            }
        }
        let (fresh, begins) = (total(&s.fresh), total(&s.begins));
        if fresh == begins && !s.fresh.is_empty() {
            add(&s.fresh, &s.begins);
        }
        // Exactly, with older gaps.
        if fresh < begins {
            for few in 1..=2 {
                subsets(&s.old, few, 400, &mut |x| {
                    looks += 2 + s.fresh.len() as u64;
                    if fresh + total(x) == begins {
                        add(&[&s.fresh, x].concat(), &s.begins);
                    }
                    if total(x) == want {
                        add(x, &[first]);
                    }
                    for g in &s.fresh {
                        if size(*g) + total(x) == want {
                            add(&[&[*g], x].concat(), &[first]);
                        }
                    }
                });
            }
            for o in &s.old {
                if fresh + size(*o) > begins {
                    add(&[&s.fresh[..], &[*o]].concat(), &s.begins);
                }
            }
        }
        // With something left over, as little as possible, fresh gaps first.
        for (gaps, _) in groups.iter().filter(|g| g.0.len() == 1 && total(&g.0) > begins) {
            add(gaps, &s.begins);
        }
        if fresh > begins {
            add(&s.fresh, &s.begins);
        }
        let mut loose: Vec<(bool, u64, Vec<u32>)> = vec![];
        for (gaps, _) in groups.iter().filter(|g| total(&g.0) > want && g.0.len() <= 2) {
            loose.push((false, total(gaps), gaps.clone()));
        }
        for few in 1..=2 {
            subsets(&s.old, few, 200, &mut |x| {
                looks += 4;
                if total(x) >= want {
                    loose.push((true, total(x), x.to_vec()));
                }
            });
        }
        for g in &s.fresh {
            for o in s.old.iter().filter(|o| size(**o) + size(*g) >= want) {
                loose.push((true, size(*o) + size(*g), vec![*g, *o]));
            }
        }
        loose.sort();
        for (_, _, gaps) in loose.iter().take(WAYS) {
            add(gaps, &[first]);
        }
        out.truncate(2 * WAYS);
        (out, looks + 4 * groups.len() as u64 + 4 * loose.len() as u64)
    }

    /// The offsets, from the last order back to the first.
    fn offsets(&self, tree: &Tree, requests: usize) -> Option<Vec<u64>> {
        let mut order = vec![];
        tree.items(&mut order);
        let mut offsets = vec![0; requests];
        for done in self.done.iter().rev() {
            match done {
                Done::Ended { request, gap } => *order.iter_mut().find(|i| *i == gap)? = *request,
                Done::Placed { run, new } => {
                    let mut at = 0;
                    for i in &order {
                        if (*i as usize) < requests && new.contains(i) {
                            offsets[*i as usize] = at;
                        }
                        at += self.size[*i as usize];
                    }
                    run.put_back(&mut order, new);
                }
            }
        }
        Some(offsets)
    }
}

/// Calls with subsets of `few` items, so many at most.
fn subsets(list: &[u32], few: usize, most: usize, call: &mut dyn FnMut(&[u32])) {
    fn go(list: &[u32], few: usize, part: &mut Vec<u32>, left: &mut usize, call: &mut dyn FnMut(&[u32])) {
        if few == 0 {
            *left = left.saturating_sub(1);
            call(part);
            return;
        }
        for k in 0..list.len() {
            if *left == 0 {
                return;
            }
            part.push(list[k]);
            go(&list[k + 1..], few - 1, part, left, call);
            part.pop();
        }
    }
    go(list, few, &mut vec![], &mut { most }, call);
}
