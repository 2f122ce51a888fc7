//! Extraction as a problem of its own: classes, nodes with a cost, several roots.
//!
//! The cost of a choice is the sum over the chosen nodes that the roots reach, each counted once: a DAG cost. Knows
//! nothing of tensors or of e-graphs. [`Problem::solve`] is a local search (see [`super::search`]) from a given choice
//! and from the tree choice; it never returns a cycle and nothing dearer than its start.

use super::search::Search;

/// An alternative of a class.
#[derive(Clone, PartialEq, Debug)]
pub struct Alternative {
    /// The class it belongs to.
    pub class: usize,
    /// Its own cost, not negative.
    pub cost: f64,
    /// The classes it needs, each once.
    pub needs: Vec<usize>,
}

/// Classes, alternatives and roots.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Problem {
    /// Alternatives of all classes.
    pub nodes: Vec<Alternative>,
    /// Alternatives of each class, as positions in `nodes`.
    pub classes: Vec<Vec<usize>>,
    /// Classes that must be there.
    pub roots: Vec<usize>,
}

/// No alternative chosen.
pub const NONE: usize = usize::MAX;

/// The alternative chosen for each class, or [`NONE`].
pub type Choice = Vec<usize>;

impl Problem {
    /// A problem of so many classes.
    pub fn new(classes: usize) -> Problem {
        Problem { nodes: vec![], classes: vec![vec![]; classes], roots: vec![] }
    }

    /// Adds an alternative; `needs` may hold a class twice.
    pub fn add(&mut self, class: usize, cost: f64, mut needs: Vec<usize>) -> usize {
        needs.sort_unstable();
        needs.dedup();
        self.classes[class].push(self.nodes.len());
        self.nodes.push(Alternative { class, cost, needs });
        self.nodes.len() - 1
    }

    /// The classes that the roots reach, operands first; `None` if the choice has a hole or a cycle.
    pub fn walk(&self, choice: &Choice) -> Option<Vec<usize>> {
        let mut state = vec![0u8; self.classes.len()];
        let (mut order, mut stack) = (vec![], vec![]);
        for &r in &self.roots {
            if state[r] != 0 {
                continue;
            }
            state[r] = 1;
            stack.push((r, 0));
            while let Some((c, k)) = stack.pop() {
                let n = self.nodes.get(choice[c])?;
                match n.needs.get(k) {
                    None => {
                        state[c] = 2;
                        order.push(c);
                    }
                    Some(&d) => {
                        stack.push((c, k + 1));
                        match state[d] {
                            0 => {
                                state[d] = 1;
                                stack.push((d, 0));
                            }
                            1 => return None,
                            _ => {}
                        }
                    }
                }
            }
        }
        Some(order)
    }

    /// DAG cost; `None` if the choice has a hole or a cycle.
    pub fn cost(&self, choice: &Choice) -> Option<f64> {
        Some(self.walk(choice)?.iter().map(|&c| self.nodes[choice[c]].cost).sum())
    }

    /// For each class the alternatives that need it.
    pub fn users(&self) -> Vec<Vec<usize>> {
        let mut u = vec![vec![]; self.classes.len()];
        for (i, n) in self.nodes.iter().enumerate() {
            n.needs.iter().for_each(|&c| u[c].push(i));
        }
        u
    }

    /// The choice that is cheapest when every use of a value pays for all of it, with those costs. Acyclic.
    pub fn tree(&self) -> (Choice, Vec<f64>) {
        let users = self.users();
        let (mut best, mut choice) = (vec![f64::INFINITY; self.classes.len()], vec![NONE; self.classes.len()]);
        let mut work: std::collections::VecDeque<usize> =
            (0..self.nodes.len()).filter(|&n| self.nodes[n].needs.is_empty()).collect();
        while let Some(n) = work.pop_front() {
            let a = &self.nodes[n];
            // a small floor keeps free alternatives from forming a cycle
            let t = a.cost.max(1e-9) + a.needs.iter().map(|&c| best[c]).sum::<f64>();
            if t < best[a.class] * (1.0 - 1e-12) {
                best[a.class] = t;
                choice[a.class] = n;
                work.extend(users[a.class].iter().copied());
            }
        }
        (choice, best)
    }

    /// A cheap choice and its cost: the better of searches from `start` (if it is valid) and from the tree choice.
    /// `None` if some root has no finite choice at all.
    pub fn solve(&self, start: Option<&Choice>) -> Option<(Choice, f64)> {
        let (tree, total) = self.tree();
        let mut best: Option<(Choice, f64)> = None;
        let mut search = Search::new(self, &tree, &total);
        let mut starts: Vec<(Choice, bool)> = vec![];
        if let Some(s) = start.filter(|s| self.cost(s).is_some()) {
            starts.push((s.clone(), true));
            starts.push((s.clone(), false));
        }
        if self.cost(&tree).is_some() {
            starts.push((tree.clone(), true));
        }
        for (s, cheap_first) in starts {
            let Some((c, t)) = search.improve(s, cheap_first) else { continue };
            if best.as_ref().is_none_or(|b| t < b.1 - 1e-9) {
                best = Some((c, t));
            }
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two roots may each use a private value at 3 or share one at 4: the tree choice pays 6, the DAG choice 4.
    #[test]
    fn finds_what_pays_only_when_shared() {
        let mut p = Problem::new(5);
        p.add(2, 3.0, vec![]);
        p.add(3, 3.0, vec![]);
        p.add(4, 4.0, vec![]);
        p.add(0, 0.0, vec![2]);
        p.add(0, 0.0, vec![4]);
        p.add(1, 0.0, vec![3]);
        p.add(1, 0.0, vec![4]);
        p.roots = vec![0, 1];
        let (tree, _) = p.tree();
        assert_eq!(p.cost(&tree), Some(6.0));
        let (c, t) = p.solve(None).unwrap();
        assert_eq!((t, p.nodes[c[0]].needs.clone(), p.nodes[c[1]].needs.clone()), (4.0, vec![4], vec![4]));
    }

    #[test]
    fn never_a_cycle_never_dearer() {
        // 0 and 1 are each free given the other
        let mut p = Problem::new(2);
        p.add(0, 0.0, vec![1]);
        p.add(0, 5.0, vec![]);
        p.add(1, 0.0, vec![0]);
        p.add(1, 7.0, vec![]);
        p.roots = vec![0, 1];
        let start = vec![1, 3];
        assert_eq!(p.cost(&vec![0, 2]), None);
        let (c, t) = p.solve(Some(&start)).unwrap();
        assert_eq!((c, t), (vec![1, 2], 5.0));
    }

    #[test]
    fn a_hole_is_no_choice() {
        let mut p = Problem::new(2);
        p.add(0, 1.0, vec![1]);
        p.roots = vec![0];
        assert!(p.solve(None).is_none());
    }
}
