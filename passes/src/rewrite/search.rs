//! Local search over choices, judged by the true DAG cost: never a cycle, never dearer than the start.
//!
//! Moves, from cheap to dear. *Flip*: another alternative for one class, all else as it is. *Force*: every live class
//! that has an alternative over class `s` takes it. *Repair*: drop what only class `c` needs and choose for `c` again,
//! what is needed elsewhere being free. *Share*: pretend class `s` is paid for, repair everything up to two levels above
//! it, keep that if the true cost fell; this finds a fused product, which pays only once all its slices agree.

use super::extract::{Choice, NONE, Problem};

/// Rounds of all moves at most.
const ROUNDS: usize = 6;
/// Levels that a repair looks down.
const DEPTH: usize = 8;
/// Classes that one search may visit in all: a bound on its time that does not depend on a clock. A model's region needs
/// less than a hundredth.
const WORK: u64 = 50_000_000;
/// Gains smaller than this are noise.
const EPS: f64 = 1e-9;

/// A search over one problem.
pub struct Search<'a> {
    p: &'a Problem,
    tree: &'a Choice,
    total: &'a [f64],
    users: Vec<Vec<usize>>,
    /// Classes that use a class, each once.
    above: Vec<Vec<usize>>,
    plan: Vec<Option<(f64, usize)>>,
    planned: Vec<usize>,
    busy: Vec<bool>,
    work: std::cell::Cell<u64>,
}

impl<'a> Search<'a> {
    /// A search; `tree` and `total` are what [`Problem::tree`] gives.
    pub fn new(p: &'a Problem, tree: &'a Choice, total: &'a [f64]) -> Search<'a> {
        let users = p.users();
        let above = users
            .iter()
            .map(|u| {
                let mut v: Vec<usize> = u.iter().map(|&n| p.nodes[n].class).collect();
                v.sort_unstable();
                v.dedup();
                v
            })
            .collect();
        let n = p.classes.len();
        Search {
            p,
            tree,
            total,
            users,
            above,
            plan: vec![None; n],
            planned: vec![],
            busy: vec![false; n],
            work: std::cell::Cell::new(0),
        }
    }

    fn cost(&self, choice: &Choice) -> Option<f64> {
        self.work.set(self.work.get() + self.p.classes.len() as u64);
        self.p.cost(choice)
    }

    fn tired(&self) -> bool {
        self.work.get() > WORK
    }

    /// Improves a choice until no move helps; `None` if the start is not valid.
    pub fn improve(&mut self, start: Choice, cheap_first: bool) -> Option<(Choice, f64)> {
        let mut cur = start;
        let mut best = self.cost(&cur)?;
        // each start has its own share
        self.work.set(0);
        for round in 0..ROUNDS {
            let before = best;
            while (cheap_first || round > 0) && self.flip_and_force(&mut cur, &mut best)? {}
            for c in self.p.walk(&cur)?.into_iter().rev() {
                if self.tired() {
                    return Some((cur, best));
                }
                if let Some((next, t)) = self.repair(&cur, c, None).filter(|r| r.1 < best - EPS) {
                    (cur, best) = (next, t);
                }
            }
            self.share_all(&mut cur, &mut best);
            if round > 0 && before - best <= before.abs() * 1e-7 {
                break;
            }
        }
        Some((cur, best))
    }

    fn flip_and_force(&self, cur: &mut Choice, best: &mut f64) -> Option<bool> {
        let before = *best;
        for c in self.p.walk(cur)? {
            if self.tired() {
                return Some(false);
            }
            for &n in &self.p.classes[c] {
                if cur[c] == n || self.p.nodes[n].needs.iter().any(|&k| cur[k] == NONE) {
                    continue;
                }
                let old = std::mem::replace(&mut cur[c], n);
                match self.cost(cur) {
                    Some(t) if t < *best - EPS => *best = t,
                    _ => cur[c] = old,
                }
            }
        }
        let live = self.live(cur, NONE);
        for s in (0..self.p.classes.len()).filter(|&s| self.users[s].len() > 1) {
            if cur[s] == NONE || self.tired() {
                continue;
            }
            let mut undo: Vec<(usize, usize)> = vec![];
            for &n in &self.users[s] {
                let c = self.p.nodes[n].class;
                let usable = self.p.nodes[n].needs.iter().all(|&k| cur[k] != NONE);
                if live[c] && cur[c] != n && usable && !undo.iter().any(|u| u.0 == c) {
                    undo.push((c, cur[c]));
                    cur[c] = n;
                }
            }
            if undo.is_empty() {
                continue;
            }
            match self.cost(cur) {
                Some(t) if t < *best - EPS => *best = t,
                _ => undo.into_iter().rev().for_each(|(c, old)| cur[c] = old),
            }
        }
        Some(before - *best > before.abs() * 1e-7)
    }

    fn share_all(&mut self, cur: &mut Choice, best: &mut f64) {
        let mut live = self.live(cur, NONE);
        for s in 0..self.p.classes.len() {
            if self.tired() || live[s] || self.above[s].len() < 2 || !self.total[s].is_finite() {
                continue;
            }
            let mut near = self.above[s].clone();
            for &u in &self.above[s] {
                near.extend(&self.above[u]);
            }
            near.sort_unstable();
            near.dedup();
            near.retain(|&c| live[c]);
            if near.len() < 2 {
                continue;
            }
            let Some((mut next, _)) = self.repair(cur, s, None) else { continue };
            for &c in &near {
                if let Some((n, _)) = self.repair(&next, c, Some(s)) {
                    next = n;
                }
            }
            if let Some(t) = self.cost(&next).filter(|t| *t < *best - EPS) {
                (*cur, *best) = (next, t);
                live = self.live(cur, NONE);
            }
        }
    }

    /// What the roots reach when class `without` is not followed.
    fn live(&self, choice: &Choice, without: usize) -> Vec<bool> {
        let mut on = vec![false; self.p.classes.len()];
        self.mark(choice, self.p.roots.clone(), without, &mut on);
        on
    }

    fn mark(&self, choice: &Choice, mut stack: Vec<usize>, without: usize, on: &mut [bool]) {
        while let Some(c) = stack.pop() {
            if c != without && choice[c] != NONE && !std::mem::replace(&mut on[c], true) {
                stack.extend(&self.p.nodes[choice[c]].needs);
            }
        }
    }

    /// Chooses for `c` again; class `gift`, and what it needs, counts as paid although nothing may reach it yet.
    fn repair(&mut self, cur: &Choice, c: usize, gift: Option<usize>) -> Option<(Choice, f64)> {
        let mut paid = self.live(cur, c);
        if let Some(g) = gift {
            self.mark(cur, vec![g], c, &mut paid);
        }
        paid[c] = false;
        for k in self.planned.drain(..) {
            self.plan[k] = None;
        }
        if !self.choose(c, &paid, DEPTH).0.is_finite() {
            return None;
        }
        let mut next = cur.clone();
        let mut seen = vec![false; self.p.classes.len()];
        seen[c] = true;
        let mut stack = vec![c];
        while let Some(k) = stack.pop() {
            let n = self.plan[k].map_or(self.tree[k], |m| m.1);
            next[k] = n;
            for &d in &self.p.nodes.get(n)?.needs {
                if !paid[d] && !std::mem::replace(&mut seen[d], true) {
                    stack.push(d);
                }
            }
        }
        let t = self.cost(&next)?;
        Some((next, t))
    }

    fn choose(&mut self, c: usize, paid: &[bool], depth: usize) -> (f64, usize) {
        if paid[c] {
            return (0.0, NONE);
        }
        if let Some(m) = self.plan[c] {
            return m;
        }
        if self.busy[c] {
            return (f64::INFINITY, NONE);
        }
        if depth == 0 {
            return (self.total[c], self.tree[c]);
        }
        self.busy[c] = true;
        let p = self.p;
        let mut best = (f64::INFINITY, NONE);
        for &n in &p.classes[c] {
            let mut t = p.nodes[n].cost + EPS;
            for &d in &p.nodes[n].needs {
                t += self.choose(d, paid, depth - 1).0;
                if t >= best.0 {
                    break;
                }
            }
            if t < best.0 {
                best = (t, n);
            }
        }
        self.busy[c] = false;
        self.plan[c] = Some(best);
        self.planned.push(c);
        best
    }
}
