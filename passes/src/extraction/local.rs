//! Local search over choices, with reference counts: what a move costs follows from what it touches.
//!
//! Moves, each kept only if the DAG cost falls. *Flip*: another node for one class. *Force*: all live users of a class
//! that can, take nodes over it. *Repair*: let go of what only one class needs and choose for it again, what is alive
//! being free. *Share*: hold a dead class alive, repair what lies up to two levels above it, let go. *Kick*: force a
//! random node, repair around it; after a while go back to the best. A class that is not alive keeps its last node, and
//! the choice as a whole, dead classes included, never has a cycle: a change that would close one is refused, which is
//! looked for inside one strongly connected part only.

use super::Problem;

/// Visits of one search at most.
const WORK: u64 = 16_000_000;
/// Levels that a repair looks down.
const DEPTH: u32 = 8;
/// Kicks without a gain before the search ends, if it has gone on for long enough.
const KICKS: u32 = 400;
/// Visits before a search ends that has not reached the lower bound: some tens of milliseconds.
const LEAST: u64 = 4_000_000;

/// No node.
const NONE: u32 = u32::MAX;

/// Orders of classes for the cheap moves.
const ORDERS: u32 = 24;

/// A fixed sequence of numbers.
struct Draw(u64);

impl Draw {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % n.max(1)
    }

    fn shuffle(&mut self, list: &mut [u32]) {
        for i in (1..list.len()).rev() {
            list.swap(i, self.below(i + 1));
        }
    }
}

/// A change: class and the node it had.
type Change = (u32, u32);

/// A search over one problem.
pub(super) struct Local<'a> {
    p: &'a Problem,
    /// Costs of the tree choice, for what lies too deep.
    lowest: &'a [f64],
    /// No choice costs less.
    bound: f64,
    /// The order in which flips and forces go through the classes.
    order: Vec<u32>,
    choice: Vec<u32>,
    /// Live users of each class, the roots' own among them.
    refs: Vec<u32>,
    total: f64,
    log: Vec<Change>,
    /// Scratch: stamps of a walk, of a plan, and the plan.
    seen: Vec<u32>,
    stamp: u32,
    planned: Vec<u32>,
    plan: Vec<(f64, u32)>,
    busy: Vec<bool>,
    turn: u32,
    stack: Vec<u32>,
    work: u64,
}

impl<'a> Local<'a> {
    pub(super) fn new(p: &'a Problem, lowest: &'a [f64], bound: f64) -> Local<'a> {
        let n = p.nodes.len();
        Local {
            p,
            lowest,
            bound,
            order: (0..n as u32).collect(),
            choice: vec![],
            refs: vec![0; n],
            total: 0.0,
            log: vec![],
            seen: vec![0; n],
            stamp: 0,
            planned: vec![0; n],
            plan: vec![(0.0, 0); n],
            busy: vec![false; n],
            turn: 0,
            stack: vec![],
            work: 0,
        }
    }

    /// Improves a choice without a cycle; gives the cost and the choice.
    pub(super) fn run(mut self, start: &[u32]) -> (f64, Vec<u32>) {
        self.choice = start.to_vec();
        for i in 0..self.p.roots.len() {
            self.hold(self.p.roots[i]);
        }
        // The cheap moves in several orders of classes: which local minimum they reach is a matter of luck.
        let mut draw = Draw(0x9E37_79B9_7F4A_7C15);
        let (mut best, mut best_choice) = (self.total, self.choice.clone());
        for turn in 0..ORDERS {
            match turn {
                0 => self.order.sort_by_key(|c| self.p.original[*c as usize]),
                1 => self.order.reverse(),
                2 => self.order.sort_unstable(),
                3 => self.order.reverse(),
                _ => draw.shuffle(&mut self.order),
            }
            if self.work > WORK / 3 {
                break;
            }
            while self.flips() | self.forces() {}
            if turn == 0 {
                (best, best_choice) = (self.total, self.choice.clone());
            } else {
                // What differs falls into parts that can be taken over one by one.
                let (other, alive) = (self.choice.clone(), self.refs.iter().map(|r| *r > 0).collect::<Vec<bool>>());
                let total = self.total;
                self.take(&best_choice);
                self.cross(&other, &alive);
                if total < self.total {
                    self.take(&other);
                }
                if self.total < best - self.eps() {
                    (best, best_choice) = (self.total, self.choice.clone());
                }
            }
            self.take(start);
        }
        self.take(&best_choice);
        for _ in 0..6 {
            let before = self.total;
            self.repairs();
            self.shares();
            while self.flips() | self.forces() {}
            self.log.clear();
            if before - self.total <= 1e-9 * before.abs() {
                break;
            }
        }
        self.kicks(&mut draw);
        self.measure();
        (self.total, self.choice)
    }

    /// Takes over from another choice, with what is alive in it, each connected part of the differences that gains.
    fn cross(&mut self, other: &[u32], alive: &[bool]) {
        let n = other.len();
        let differs: Vec<bool> = (0..n)
            .map(|c| {
                let here = self.refs[c] > 0;
                here != alive[c] || here && self.choice[c] != other[c]
            })
            .collect();
        // Connected through needs, in either choice.
        let mut near: Vec<Vec<u32>> = vec![vec![]; n];
        for c in (0..n).filter(|c| differs[*c]) {
            let both = [(self.refs[c] > 0, self.choice[c]), (alive[c], other[c])];
            for m in both.into_iter().filter(|b| b.0).map(|b| b.1) {
                for &d in self.p.needs(m).iter().filter(|d| differs[**d as usize]) {
                    near[c].push(d);
                    near[d as usize].push(c as u32);
                }
            }
        }
        self.work += n as u64 / 4;
        let mut done = vec![false; n];
        for c in 0..n {
            if !differs[c] || std::mem::replace(&mut done[c], true) {
                continue;
            }
            let (mut part, mut k) = (vec![c as u32], 0);
            while k < part.len() {
                for &d in &near[part[k] as usize] {
                    if !std::mem::replace(&mut done[d as usize], true) {
                        part.push(d);
                    }
                }
                k += 1;
            }
            let (before, mark) = (self.total, self.log.len());
            let taken = |d: &&u32| alive[**d as usize] && self.choice[**d as usize] != other[**d as usize];
            let changes: Vec<Change> = part.iter().filter(taken).map(|d| (*d, other[*d as usize])).collect();
            if !changes.is_empty() && self.set_all(&changes) && self.total >= before - self.eps() {
                self.back(mark);
                self.total = before;
            }
        }
        self.log.clear();
    }

    /// Takes another choice without a cycle.
    fn take(&mut self, choice: &[u32]) {
        let changes: Vec<Change> = (0..choice.len() as u32)
            .map(|c| (c, choice[c as usize]))
            .filter(|(c, n)| self.choice[*c as usize] != *n)
            .collect();
        self.assign(&changes);
        self.log.clear();
        self.measure();
    }

    fn tired(&self) -> bool {
        self.work > WORK
    }

    /// What counts as a gain.
    fn eps(&self) -> f64 {
        1e-10 * self.total.abs().max(1e-9)
    }

    /// The total anew, without what rounding left over.
    fn measure(&mut self) {
        let live = (0..self.refs.len()).filter(|c| self.refs[*c] > 0);
        self.total = live.map(|c| self.p.cost[self.choice[c] as usize]).sum();
    }

    fn live(&self) -> Vec<u32> {
        (0..self.refs.len() as u32).filter(|c| self.refs[*c as usize] > 0).collect()
    }

    /// One more user of a class; it and what it needs come alive.
    fn hold(&mut self, c: u32) {
        let base = self.stack.len();
        self.stack.push(c);
        while self.stack.len() > base {
            let Some(d) = self.stack.pop() else { break };
            self.refs[d as usize] += 1;
            self.work += 1;
            if self.refs[d as usize] == 1 {
                let n = self.choice[d as usize];
                if n != NONE {
                    self.total += self.p.cost[n as usize];
                    self.stack.extend(self.p.needs(n));
                }
            }
        }
    }

    /// One user of a class less.
    fn drop(&mut self, c: u32) {
        let base = self.stack.len();
        self.stack.push(c);
        while self.stack.len() > base {
            let Some(d) = self.stack.pop() else { break };
            self.refs[d as usize] -= 1;
            self.work += 1;
            if self.refs[d as usize] == 0 {
                let n = self.choice[d as usize];
                if n != NONE {
                    self.total -= self.p.cost[n as usize];
                    self.stack.extend(self.p.needs(n));
                }
            }
        }
    }

    /// Whether a class would reach itself through a node.
    fn cycle(&mut self, c: u32, n: u32) -> bool {
        let part = self.p.part[c as usize];
        self.stamp += 1;
        let base = self.stack.len();
        self.stack.extend(self.p.needs(n));
        let mut found = false;
        while self.stack.len() > base {
            let Some(d) = self.stack.pop() else { break };
            if d == c {
                found = true;
                break;
            }
            if self.p.part[d as usize] == part && self.seen[d as usize] != self.stamp {
                self.seen[d as usize] = self.stamp;
                self.work += 1;
                let m = self.choice[d as usize];
                self.stack.extend(self.p.needs(m));
            }
        }
        self.stack.truncate(base);
        found
    }

    /// Gives a class a node, unless that closes a cycle.
    fn set(&mut self, c: u32, n: u32) -> bool {
        if self.choice[c as usize] == n {
            return true;
        }
        if self.cycle(c, n) {
            return false;
        }
        self.log.push((c, self.choice[c as usize]));
        self.assign(&[(c, n)]);
        true
    }

    /// Gives several classes, each once, nodes at once, unless that closes a cycle.
    fn set_all(&mut self, changes: &[Change]) -> bool {
        let mut old = vec![];
        for &(c, n) in changes {
            old.push((c, std::mem::replace(&mut self.choice[c as usize], n)));
        }
        let sound = changes.iter().all(|(c, n)| !self.cycle(*c, *n));
        for &(c, n) in &old {
            self.choice[c as usize] = n;
        }
        if sound {
            self.log.extend(old);
            self.assign(changes);
        }
        sound
    }

    /// Lets go of what the classes have, then gives them what they get.
    fn assign(&mut self, changes: &[Change]) {
        for &(c, _) in changes {
            let old = std::mem::replace(&mut self.choice[c as usize], NONE);
            if self.refs[c as usize] > 0 && old != NONE {
                self.total -= self.p.cost[old as usize];
                for k in 0..self.p.needs(old).len() {
                    self.drop(self.p.needs(old)[k]);
                }
            }
        }
        for &(c, n) in changes {
            self.choice[c as usize] = n;
            if self.refs[c as usize] > 0 {
                self.total += self.p.cost[n as usize];
                for k in 0..self.p.needs(n).len() {
                    self.hold(self.p.needs(n)[k]);
                }
            }
        }
    }

    /// Undoes the changes after a mark.
    fn back(&mut self, mark: usize) {
        let mut changes: Vec<Change> = self.log.drain(mark..).collect();
        // Of several changes of a class the first one tells what it had.
        changes.sort_by_key(|c| c.0);
        changes.dedup_by_key(|c| c.0);
        self.assign(&changes);
    }

    fn flips(&mut self) -> bool {
        let before = self.total;
        for k in 0..self.order.len() {
            let c = self.order[k];
            self.flip(c);
        }
        before - self.total > self.eps()
    }

    fn flip(&mut self, c: u32) {
        for k in 0..self.p.nodes[c as usize].len() {
            let n = self.p.nodes[c as usize][k];
            if self.refs[c as usize] == 0 || self.tired() {
                return;
            }
            let (before, mark) = (self.total, self.log.len());
            if n != self.choice[c as usize] && self.set(c, n) && self.total >= before - self.eps() {
                self.back(mark);
                self.total = before;
            }
        }
    }

    fn forces(&mut self) -> bool {
        let start = self.total;
        for k in 0..self.order.len() {
            let s = self.order[k];
            if self.p.users[s as usize].len() < 2 || self.tired() {
                continue;
            }
            let (before, mark) = (self.total, self.log.len());
            let changes = self.over(s);
            if changes.is_empty() || !self.set_all(&changes) {
                continue;
            }
            if self.log.len() > mark && self.total >= before - self.eps() {
                self.back(mark);
                self.total = before;
            }
        }
        start - self.total > self.eps()
    }

    /// Nodes over a class for all live classes that have one.
    fn over(&self, s: u32) -> Vec<Change> {
        let mut changes: Vec<Change> = vec![];
        for &n in &self.p.users[s as usize] {
            let c = self.p.class[n as usize];
            // Nodes of one class stand together; the first one is taken.
            if self.refs[c as usize] > 0 && self.choice[c as usize] != n && changes.last().is_none_or(|l| l.0 != c) {
                changes.push((c, n));
            }
        }
        changes
    }

    fn repairs(&mut self) {
        for c in self.live().into_iter().rev() {
            if self.tired() {
                break;
            }
            self.repair(c);
        }
        self.log.clear();
    }

    /// Chooses anew for a live class, as if what only it needs were not there; keeps that if it gains.
    fn repair(&mut self, c: u32) {
        if self.refs[c as usize] == 0
            || self.p.nodes[c as usize].len() < 2 && self.p.needs(self.choice[c as usize]).is_empty()
        {
            return;
        }
        let (before, mark) = (self.total, self.log.len());
        let old = self.choice[c as usize];
        for k in 0..self.p.needs(old).len() {
            self.drop(self.p.needs(old)[k]);
        }
        self.turn += 1;
        self.busy[c as usize] = true;
        let mut best = (f64::INFINITY, NONE);
        for k in 0..self.p.nodes[c as usize].len() {
            let n = self.p.nodes[c as usize][k];
            let t = self.price(n, best.0, DEPTH);
            if t < best.0 {
                best = (t, n);
            }
        }
        self.busy[c as usize] = false;
        for k in 0..self.p.needs(old).len() {
            self.hold(self.p.needs(old)[k]);
        }
        self.total = before;
        if best.1 == NONE {
            return;
        }
        let mut changes = vec![(c, best.1)];
        self.adopt(best.1, &mut changes);
        changes.retain(|(c, n)| self.choice[*c as usize] != *n);
        if !changes.is_empty() && !self.set_all(&changes) {
            return;
        }
        if self.total >= before - self.eps() {
            self.back(mark);
            self.total = before;
        }
    }

    /// The planned nodes below a node.
    fn adopt(&mut self, n: u32, changes: &mut Vec<Change>) {
        for k in 0..self.p.needs(n).len() {
            let d = self.p.needs(n)[k];
            if self.planned[d as usize] == self.turn {
                // Each once.
                self.planned[d as usize] = 0;
                let m = self.plan[d as usize].1;
                if m != NONE {
                    changes.push((d, m));
                    self.adopt(m, changes);
                }
            }
        }
    }

    /// What a node adds, at most `limit` (or more).
    fn price(&mut self, n: u32, limit: f64, depth: u32) -> f64 {
        let mut t = self.p.cost[n as usize];
        for k in 0..self.p.needs(n).len() {
            if t >= limit {
                break;
            }
            t += self.choose(self.p.needs(n)[k], depth);
        }
        t
    }

    fn choose(&mut self, c: u32, depth: u32) -> f64 {
        let i = c as usize;
        if self.busy[i] {
            return f64::INFINITY;
        }
        if self.refs[i] > 0 {
            return 0.0;
        }
        if self.planned[i] == self.turn {
            return self.plan[i].0;
        }
        self.work += 1;
        if depth == 0 {
            return self.lowest[i];
        }
        self.busy[i] = true;
        let mut best = (f64::INFINITY, NONE);
        for k in 0..self.p.nodes[i].len() {
            let n = self.p.nodes[i][k];
            let t = self.price(n, best.0, depth - 1);
            if t < best.0 {
                best = (t, n);
            }
        }
        self.busy[i] = false;
        self.planned[i] = self.turn;
        self.plan[i] = best;
        best.0
    }

    fn shares(&mut self) {
        let mut near: Vec<u32> = vec![];
        for s in 0..self.refs.len() as u32 {
            if self.tired() {
                break;
            }
            if self.refs[s as usize] > 0 || self.p.users[s as usize].len() < 2 {
                continue;
            }
            near.clear();
            for &u in &self.p.users[s as usize] {
                let c = self.p.class[u as usize];
                near.push(c);
                if self.p.users[s as usize].len() < 64 {
                    near.extend(self.p.users[c as usize].iter().take(64).map(|v| self.p.class[*v as usize]));
                }
            }
            near.sort_unstable();
            near.dedup();
            near.retain(|c| self.refs[*c as usize] > 0);
            if near.len() < 2 {
                continue;
            }
            let (before, mark) = (self.total, self.log.len());
            self.hold(s);
            // What it is made of is chosen again: much may be alive.
            self.repair(s);
            for c in &near {
                self.repair(*c);
            }
            self.drop(s);
            if self.total >= before - self.eps() {
                self.back(mark);
                self.total = before;
            }
        }
        self.log.clear();
    }

    fn kicks(&mut self, draw: &mut Draw) {
        let mut stale = 0;
        while (stale < KICKS || self.work < LEAST) && self.total > self.bound + self.eps() && !self.tired() {
            let live: Vec<u32> = self.live().into_iter().filter(|c| self.p.nodes[*c as usize].len() > 1).collect();
            self.work += self.refs.len() as u64 / 8;
            if live.is_empty() {
                break;
            }
            stale += 1;
            let (before, mark) = (self.total, self.log.len());
            if draw.below(2) == 0 {
                let s = draw.below(self.refs.len()) as u32;
                let changes = self.over(s);
                if changes.len() < 2 || !self.set_all(&changes) {
                    stale -= 1;
                    self.work += 20;
                    continue;
                }
            } else {
                for _ in 0..1 + draw.below(3) {
                    let c = live[draw.below(live.len())];
                    let list = &self.p.nodes[c as usize];
                    let n = list[draw.below(list.len())];
                    if self.refs[c as usize] > 0 {
                        self.set(c, n);
                    }
                }
            }
            for _ in 0..4 {
                if !(self.flips() | self.forces()) {
                    break;
                }
            }
            if self.total < before - self.eps() {
                stale = 0;
                self.log.clear();
                self.measure();
            } else if self.total > before + self.eps() {
                self.back(mark);
                self.total = before;
            }
        }
    }
}
