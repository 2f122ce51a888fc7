//! A search along time for placements that leave no gap, or few.
//!
//! Everything alive at one time, and the gaps between, stand in some order from the bottom to the top, and a tree (see
//! [`super::order`]) holds all orders that are possible. What ends leaves a gap of its size in its place; what begins takes
//! the place of gaps that stand side by side, and of what is left of them a smaller gap remains (see [`super::ways`]). Where ends
//! and beginnings balance, as they do when there is little slack, nearly nothing is left to choose, however many requests there are.
//!
//! A beam of states goes along time. A state is good when likely ways led to it, when its tree still has many orders and few
//! gaps, and when what ends together later, to make room for one, can stand side by side: a *wish*, which is looked at as soon
//! as all that it is about are alive. No weights of these suit everywhere, so there are several beams, in both directions, narrow
//! ones first. The offsets follow from the last order by going back in time.

use super::Request;
use super::greedy::{Draw, lg};
use super::order::{Run, Tree};
use super::ways::{Gaps, Way, ways, wishes};
use std::collections::HashSet;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Requests up to which the search is tried, and items that stand side by side.
const UP_TO: usize = 4000;
const ABREAST: u64 = 400_000;

/// What happens at one time: requests that end and that begin, largest first, and wishes about requests of which the last begin here.
#[derive(Default)]
struct Event {
    ends: Vec<u32>,
    begins: Vec<u32>,
    wishes: Vec<(Vec<u32>, f64)>,
}

/// What was done, to go back.
enum Done {
    /// A request left a gap.
    Ended { request: u32, gap: u32 },
    /// Items took the place of a run of gaps.
    Placed { run: Run, new: Vec<u32> },
}

/// A list of what was done that shares its beginning with others.
type Trail = Option<Rc<Link>>;

struct Link {
    done: Done,
    before: Trail,
}

fn with(done: Done, before: Trail) -> Trail {
    Some(Rc::new(Link { done, before }))
}

/// Where the search stands: requests to begin, gaps made at this time and before.
#[derive(Clone)]
struct State {
    tree: Tree,
    begins: Vec<u32>,
    gaps: Gaps,
    cost: f64,
    trail: Trail,
}

/// How a beam chooses.
#[derive(Clone, Copy)]
struct Beam {
    width: usize,
    /// Gain for orders that are possible, costs of a gap and of a wish that is not met, and noise.
    orders: f64,
    gap: f64,
    wish: f64,
    noise: f64,
}

const BEAMS: [Beam; 10] = [
    Beam { width: 2, orders: 0.2, gap: 0.3, wish: 10.0, noise: 0.0 },
    Beam { width: 8, orders: 0.2, gap: 1.0, wish: 3.0, noise: 0.0 },
    Beam { width: 8, orders: 0.2, gap: 0.3, wish: 10.0, noise: 0.5 },
    Beam { width: 8, orders: 0.07, gap: 1.0, wish: 10.0, noise: 0.5 },
    Beam { width: 8, orders: 0.7, gap: 1.0, wish: 3.0, noise: 0.5 },
    Beam { width: 8, orders: 0.07, gap: 0.0, wish: 3.0, noise: 0.0 },
    Beam { width: 8, orders: 0.7, gap: 0.0, wish: 3.0, noise: 0.5 },
    Beam { width: 32, orders: 0.2, gap: 0.3, wish: 10.0, noise: 0.5 },
    Beam { width: 32, orders: 0.7, gap: 0.3, wish: 3.0, noise: 0.0 },
    Beam { width: 128, orders: 0.07, gap: 1.0, wish: 10.0, noise: 0.5 },
];

/// Offsets with which all lies within `capacity`, if some of the beams find them, along time or against it; takes what they cost
/// from `work`, and gives up when told to. Requests have a size and a length.
pub(super) fn sweep(
    requests: &[Request],
    capacity: u64,
    beams: std::ops::Range<usize>,
    directions: &[bool],
    work: &mut u64,
    stop: &AtomicBool,
) -> Option<Vec<u64>> {
    let mut times: Vec<u64> = requests.iter().flat_map(|r| [r.first, r.last]).collect();
    times.sort_unstable();
    times.dedup();
    requests.iter().try_fold(capacity, |a, r| a.checked_add(r.size))?;
    let area: u64 = requests.len() as u64 * requests.len() as u64;
    if requests.len() > UP_TO || area / times.len().max(1) as u64 > ABREAST {
        return None;
    }
    let all: Vec<Vec<Event>> = directions.iter().map(|mirrored| events(requests, &times, *mirrored)).collect();
    for beam in &BEAMS[beams] {
        for events in &all {
            let size = requests.iter().map(|r| r.size).collect();
            let (count, draw) = (requests.len(), Draw::new());
            let mut search = Sweep { events, count, size, alive: 0, set: vec![], beam: *beam, draw };
            if let Some(last) = search.run(capacity, work, stop) {
                return search.offsets(&last);
            }
            if *work == 0 {
                return None;
            }
        }
    }
    None
}

fn events(requests: &[Request], times: &[u64], mirrored: bool) -> Vec<Event> {
    let mut events: Vec<Event> = times.iter().map(|_| Event::default()).collect();
    let mut born = vec![0; requests.len()];
    for (i, r) in requests.iter().enumerate() {
        let at = |t: u64| times.binary_search(&t).unwrap_or(0);
        let (mut first, mut last) = (at(r.first), at(r.last));
        if mirrored {
            (first, last) = (times.len() - 1 - last, times.len() - 1 - first);
        }
        events[first].begins.push(i as u32);
        events[last].ends.push(i as u32);
        born[i] = first;
    }
    let size = |i: u32| requests[i as usize].size;
    for e in &mut events {
        super::sort::by_key(&mut e.begins, &|i| (u128::MAX - u128::from(size(i)), 0));
    }
    for k in 0..events.len() {
        for (list, weight) in wishes(&events[k].ends, &events[k].begins, &size) {
            let at = list.iter().map(|i| born[*i as usize]).max().unwrap_or(0);
            events[at].wishes.push((list, weight));
        }
    }
    events
}

struct Sweep<'a> {
    events: &'a [Event],
    /// Requests; numbers from here on are gaps.
    count: usize,
    /// Sizes of requests, then of gaps.
    size: Vec<u64>,
    /// Requests that are alive.
    alive: usize,
    set: Vec<bool>,
    beam: Beam,
    draw: Draw,
}

impl Sweep<'_> {
    fn gap(&mut self, size: u64) -> u32 {
        self.size.push(size);
        self.size.len() as u32 - 1
    }

    /// A state in which all is placed.
    fn run(&mut self, capacity: u64, work: &mut u64, stop: &AtomicBool) -> Option<State> {
        let events = self.events;
        let gap = self.gap(capacity);
        let gaps = Gaps { fresh: vec![], old: vec![gap] };
        let mut states = vec![State { tree: Tree::Leaf(gap), begins: vec![], gaps, cost: 0.0, trail: None }];
        for e in events {
            if stop.load(Ordering::Relaxed) {
                *work = 0;
                return None;
            }
            self.alive += e.begins.len();
            self.alive -= e.ends.len();
            for s in &mut states {
                self.end(s, e);
            }
            if e.begins.is_empty() {
                continue;
            }
            let (mut pending, mut done) = (states, vec![]);
            while !pending.is_empty() {
                let mut next = vec![];
                for s in &pending {
                    self.place(s, &mut next, &mut done, work);
                    if *work == 0 {
                        return None;
                    }
                }
                self.best(&mut next, 2 * self.beam.width);
                pending = next;
            }
            for wish in &e.wishes {
                self.grant(&mut done, wish);
            }
            self.best(&mut done, self.beam.width);
            states = done;
            if states.is_empty() {
                return None;
            }
        }
        states.into_iter().next()
    }

    /// What ends leaves gaps.
    fn end(&mut self, s: &mut State, e: &Event) {
        let gaps = &mut s.gaps;
        gaps.old.append(&mut gaps.fresh);
        for &request in &e.ends {
            let gap = self.gap(self.size[request as usize]);
            s.tree.rename(request, gap);
            gaps.fresh.push(gap);
            s.trail = with(Done::Ended { request, gap }, s.trail.take());
        }
        s.begins.clone_from(&e.begins);
    }

    /// All states in which the largest request that begins has a place.
    fn place(&mut self, s: &State, next: &mut Vec<State>, done: &mut Vec<State>, work: &mut u64) {
        let (ways, looks) = ways(&s.begins, &s.gaps, &self.size);
        *work = work.saturating_sub(looks);
        for (rank, Way { gaps, takes }) in ways.into_iter().enumerate() {
            *work = work.saturating_sub(120 + 5 * self.alive as u64);
            let sum = |list: &[u32]| list.iter().map(|i| self.size[*i as usize]).sum::<u64>();
            let left = sum(&gaps) - sum(&takes);
            let mut new = takes.clone();
            if left > 0 {
                new.push(self.gap(left));
            }
            let leaves = Tree::free(new.iter().copied().map(Tree::Leaf).collect());
            let Some((tree, run)) = self.replaced(&s.tree, &gaps, leaves) else { continue };
            *work = work.saturating_sub(200 + 15 * self.alive as u64);
            let mut begins = s.begins.clone();
            begins.retain(|i| !takes.contains(i));
            let mut rest = s.gaps.without(&gaps);
            if left > 0 {
                let list = if gaps.iter().any(|g| s.gaps.fresh.contains(g)) { &mut rest.fresh } else { &mut rest.old };
                list.extend(new.last());
            }
            let cost = s.cost + rank as f64 + self.beam.noise * self.draw.unit();
            let trail = with(Done::Placed { run, new }, s.trail.clone());
            let to = if begins.is_empty() { &mut *done } else { &mut *next };
            to.push(State { tree, begins, gaps: rest, cost, trail });
        }
    }

    /// The tree with `new` in the place of a run of items.
    fn replaced(&mut self, tree: &Tree, items: &[u32], new: Tree) -> Option<(Tree, Run)> {
        self.set.resize(self.size.len(), false);
        items.iter().for_each(|i| self.set[*i as usize] = true);
        let out = tree.clone().replace(&self.set, items.len(), new);
        items.iter().for_each(|i| self.set[*i as usize] = false);
        out
    }

    /// Where a wish can be met a state in which it is goes beside each; the others cost more.
    fn grant(&mut self, states: &mut Vec<State>, (items, weight): &(Vec<u32>, f64)) {
        let mark = self.gap(0);
        let mut met = vec![];
        for s in states.iter_mut() {
            if let Some((mut tree, run)) = self.replaced(&s.tree, items, Tree::Leaf(mark)) {
                run.restore(&mut tree, mark);
                if tree == s.tree {
                    continue;
                }
                met.push(State { tree, ..s.clone() });
            }
            s.cost += self.beam.wish * weight;
        }
        states.extend(met);
        self.best(states, 4 * self.beam.width);
    }

    /// Keeps the best `most`, equal ones once.
    fn best(&self, states: &mut Vec<State>, most: usize) {
        let mut keyed: Vec<(f64, u64, State)> = std::mem::take(states)
            .into_iter()
            .map(|s| {
                let mut orders = 0.0;
                let hash = self.look(&s.tree, &mut orders);
                let gaps = (s.gaps.old.len() + s.gaps.fresh.len()) as f64;
                let hash = s.begins.iter().fold(hash, |h, i| mix(h ^ u64::from(*i)));
                (s.cost - self.beam.orders * orders + self.beam.gap * gaps, hash, s)
            })
            .collect();
        keyed.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut seen = HashSet::new();
        keyed.retain(|x| seen.insert(x.1));
        keyed.truncate(most);
        states.extend(keyed.into_iter().map(|x| x.2));
    }

    /// A hash that is the same for trees with the same orders; gaps of equal size are equal. Adds the logarithm of their number.
    fn look(&self, tree: &Tree, orders: &mut f64) -> u64 {
        match tree {
            Tree::Leaf(i) if (*i as usize) < self.count => mix(u64::from(*i) + 1),
            Tree::Leaf(i) => mix(self.size[*i as usize] ^ 1 << 60),
            Tree::Node(false, kids) => {
                let mut sum = 7u64;
                for (k, kid) in kids.iter().enumerate() {
                    sum = sum.wrapping_add(self.look(kid, orders));
                    *orders += lg(k as u64 + 1);
                }
                mix(sum)
            }
            Tree::Node(true, kids) => {
                *orders += 1.0;
                let all: Vec<u64> = kids.iter().map(|k| self.look(k, orders)).collect();
                let chain = |h: u64, x: &u64| mix(h ^ x).wrapping_add(*x);
                let (there, back) = (all.iter().fold(3, chain), all.iter().rev().fold(3, chain));
                mix(there.min(back) ^ 1 << 61)
            }
        }
    }

    /// The offsets, from the last order back to the first.
    fn offsets(&self, last: &State) -> Option<Vec<u64>> {
        let mut order = vec![];
        last.tree.items(&mut order);
        let mut offsets = vec![0; self.count];
        let mut trail = &last.trail;
        while let Some(link) = trail {
            match &link.done {
                Done::Ended { request, gap } => *order.iter_mut().find(|i| *i == gap)? = *request,
                Done::Placed { run, new } => {
                    let mut at = 0;
                    for i in &order {
                        if (*i as usize) < self.count && new.contains(i) {
                            offsets[*i as usize] = at;
                        }
                        at += self.size[*i as usize];
                    }
                    run.put_back(&mut order, new);
                }
            }
            trail = &link.before;
        }
        Some(offsets)
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 32)).wrapping_mul(0xD6E8_FEB8_6659_FD93);
    z = (z ^ (z >> 29)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z ^ (z >> 32)
}
