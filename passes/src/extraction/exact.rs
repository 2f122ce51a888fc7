//! Depth-first search with bounds: proves a choice best, or finds a better one, where few choices are left open.
//!
//! A class that is needed and has no node yet takes one after another; what is needed costs at least each class' cheapest node. A node
//! that would close a cycle with those chosen is left out. Ends without an answer when it has looked at too many.

use super::Problem;

/// Visits at most: some tens of milliseconds.
const WORK: u64 = 3_000_000;

/// No node.
const NONE: u32 = u32::MAX;

struct Search<'a> {
    p: &'a Problem,
    /// Nodes of each class, cheapest first.
    nodes: Vec<Vec<u32>>,
    /// Cost of each class' cheapest node.
    least: Vec<f64>,
    choice: Vec<u32>,
    /// Needed by something chosen, or a root.
    needed: Vec<bool>,
    /// Needed classes without a node.
    open: Vec<u32>,
    best: f64,
    found: Option<Vec<u32>>,
    /// Classes that a walk has seen, by its number.
    seen: Vec<u64>,
    walks: u64,
    work: u64,
}

/// A choice that costs less than `best`, and whether none costs less than what is known then. Classes that the choice does not need
/// have the node of `fallback`.
pub(super) fn improve(p: &Problem, best: f64, fallback: &[u32]) -> (Option<(f64, Vec<u32>)>, bool) {
    let mut nodes = p.nodes.clone();
    nodes.iter_mut().for_each(|l| l.sort_by(|a, b| p.cost[*a as usize].total_cmp(&p.cost[*b as usize])));
    let least: Vec<f64> = nodes.iter().map(|l| l.first().map_or(0.0, |n| p.cost[*n as usize])).collect();
    let mut needed = vec![false; nodes.len()];
    p.roots.iter().for_each(|r| needed[*r as usize] = true);
    let bound = p.roots.iter().map(|r| least[*r as usize]).sum();
    let choice = vec![NONE; nodes.len()];
    let open = p.roots.clone();
    let seen = vec![0; nodes.len()];
    let mut s = Search { p, nodes, least, choice, needed, open, best, found: None, seen, walks: 0, work: 0 };
    s.go(0.0, bound);
    let proven = s.work < WORK;
    let found =
        s.found.map(|c| (s.best, c.iter().zip(fallback).map(|(n, f)| if *n == NONE { *f } else { *n }).collect()));
    (found, proven)
}

impl Search<'_> {
    /// `cost` of what is chosen; `rest`: what the open classes cost at least.
    fn go(&mut self, cost: f64, rest: f64) {
        self.work += 1 + self.open.len() as u64;
        if self.work >= WORK || cost + rest >= self.best - 1e-10 * self.best.abs() {
            return;
        }
        // The class with the fewest nodes decides least.
        let narrow = (0..self.open.len()).min_by_key(|i| (self.nodes[self.open[*i] as usize].len(), self.open[*i]));
        let Some(at) = narrow else {
            (self.best, self.found) = (cost, Some(self.choice.clone()));
            return;
        };
        let c = self.open.swap_remove(at) as usize;
        let rest = rest - self.least[c];
        for i in 0..self.nodes[c].len() {
            let n = self.nodes[c][i];
            if self.closes_cycle(c as u32, n) {
                continue;
            }
            let mark = self.open.len();
            let new: Vec<u32> = self.p.needs(n).iter().copied().filter(|d| !self.needed[*d as usize]).collect();
            new.iter().for_each(|d| self.needed[*d as usize] = true);
            self.open.extend(&new);
            self.choice[c] = n;
            let more: f64 = new.iter().map(|d| self.least[*d as usize]).sum();
            let open = self.open.clone();
            self.go(cost + self.p.cost[n as usize], rest + more);
            self.open = open;
            self.choice[c] = NONE;
            new.iter().for_each(|d| self.needed[*d as usize] = false);
            self.open.truncate(mark);
        }
        self.open.push(c as u32);
    }

    /// Whether class `c` would need itself through node `n`.
    fn closes_cycle(&mut self, c: u32, n: u32) -> bool {
        let part = self.p.part[c as usize];
        let inside = |d: &u32| self.p.part[*d as usize] == part;
        let mut stack: Vec<u32> = self.p.needs(n).iter().copied().filter(inside).collect();
        self.walks += 1;
        while let Some(d) = stack.pop() {
            self.work += 1;
            if d == c {
                return true;
            }
            let m = self.choice[d as usize];
            if m != NONE && self.seen[d as usize] != self.walks {
                self.seen[d as usize] = self.walks;
                stack.extend(self.p.needs(m).iter().filter(|d| self.p.part[**d as usize] == part));
            }
        }
        false
    }
}
