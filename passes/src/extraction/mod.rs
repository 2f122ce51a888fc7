//! The cheapest choice of nodes in an e-graph, each counted once.
//!
//! A [`Graph`] has classes, nodes that belong to a class, cost something and need classes, and roots. A [`Solution`] gives
//! one node to each class that the roots reach, without a cycle; its cost is the sum over those classes (a DAG cost).
//! [`solve`] prunes what cannot help, starts from the tree choice and from a greedy DAG choice and improves both by a local
//! search that keeps reference counts. Effort is bounded by counts. [`cost`] is an independent walk. Nothing here knows of
//! operators or tensors; the engine for regions of a model is `rewrite::extract`.

mod exact;
mod local;
mod start;
#[cfg(test)]
mod tests;

use local::Local;

/// A node: a way to make a class.
#[derive(Clone, PartialEq, Debug)]
pub struct Node {
    /// The class that it makes.
    pub class: usize,
    /// Its own cost: finite, not negative.
    pub cost: f64,
    /// The classes that it needs.
    pub needs: Vec<usize>,
}

/// Classes `0..classes`, nodes and roots.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Graph {
    /// Number of classes.
    pub classes: usize,
    /// All nodes.
    pub nodes: Vec<Node>,
    /// Classes that must be made.
    pub roots: Vec<usize>,
}

/// A choice.
#[derive(Clone, PartialEq, Debug)]
pub struct Solution {
    /// The chosen node of each class that the roots reach, `None` for others.
    pub choice: Vec<Option<usize>>,
    /// Sum of the costs of the chosen nodes.
    pub cost: f64,
    /// True when nothing cheaper exists, proven.
    pub optimal: bool,
}

/// The cost of a choice, found by a walk from the roots.
///
/// # Errors
/// What is wrong: a class that is reached without a node, a node of another class, a cycle.
pub fn cost(graph: &Graph, choice: &[Option<usize>]) -> Result<f64, String> {
    let mut state = vec![0u8; graph.classes];
    let mut sum = 0.0;
    for &root in &graph.roots {
        let mut stack = vec![(root, 0usize)];
        while let Some((c, k)) = stack.pop() {
            if k == 0 && state[c] == 2 {
                continue;
            }
            let n = choice.get(c).copied().flatten().ok_or_else(|| format!("class {c} is needed and has no node"))?;
            let node = graph.nodes.get(n).filter(|n| n.class == c);
            let node = node.ok_or_else(|| format!("the node chosen for class {c} belongs to another"))?;
            if k == 0 {
                state[c] = 1;
                sum += node.cost;
            }
            match node.needs.get(k) {
                None => state[c] = 2,
                Some(&d) => {
                    stack.push((c, k + 1));
                    match state[d] {
                        0 => stack.push((d, 0)),
                        1 => return Err(format!("class {d} needs itself")),
                        _ => {}
                    }
                }
            }
        }
    }
    Ok(sum)
}

/// Classes of a problem that is searched through.
const SMALL: usize = 400;

/// Chooses. `None` if some root cannot be made at all.
pub fn solve(graph: &Graph) -> Option<Solution> {
    let problem = Problem::new(graph)?;
    let (tree, lowest) = start::tree(&problem);
    let bound = start::bound(&problem);
    let small = problem.nodes.len() <= SMALL;
    if small && let (Some((_, choice)), true) = exact::improve(&problem, f64::INFINITY, &tree) {
        let choice = problem.lift(graph.classes, &choice);
        return Some(Solution { cost: cost(graph, &choice).ok()?, choice, optimal: true });
    }
    let mut best = Local::new(&problem, &lowest, bound).run(&tree);
    if let Some(greedy) = start::greedy(&problem).filter(|g| *g != tree) {
        let other = Local::new(&problem, &lowest, bound).run(&greedy);
        if other.0 < best.0 {
            best = other;
        }
    }
    let mut proven = best.0 <= bound + 1e-12 * bound.abs();
    if !proven && small {
        let (better, none_better) = exact::improve(&problem, best.0, &best.1);
        best = better.unwrap_or(best);
        proven = none_better;
    }
    let choice = problem.lift(graph.classes, &best.1);
    let cost = cost(graph, &choice).ok()?;
    Some(Solution { choice, cost, optimal: proven || cost <= bound + 1e-12 * bound.abs() })
}

/// What is left after pruning, with dense numbers and flat lists.
pub(crate) struct Problem {
    /// Class of each node, as in this problem, its cost, and its number in the graph.
    class: Vec<u32>,
    cost: Vec<f64>,
    origin: Vec<usize>,
    /// Where the needs of each node begin in `needs`; each class once.
    first: Vec<u32>,
    needs: Vec<u32>,
    /// Nodes of each class, and nodes that need it.
    nodes: Vec<Vec<u32>>,
    users: Vec<Vec<u32>>,
    roots: Vec<u32>,
    /// The class in the graph.
    original: Vec<usize>,
    /// Strongly connected part of each class: a cycle stays in one.
    part: Vec<u32>,
}

impl Problem {
    fn needs(&self, n: u32) -> &[u32] {
        &self.needs[self.first[n as usize] as usize..self.first[n as usize + 1] as usize]
    }

    /// Keeps the classes that the roots reach and nodes that can be made, do not need their own class and are not
    /// dominated. `None` if some root cannot be made.
    fn new(graph: &Graph) -> Option<Problem> {
        let mut needs: Vec<Vec<usize>> = graph.nodes.iter().map(|n| n.needs.clone()).collect();
        for n in &mut needs {
            n.sort_unstable();
            n.dedup();
        }
        let mut makes = vec![false; graph.classes];
        let mut missing: Vec<usize> = needs.iter().map(Vec::len).collect();
        let mut users = vec![vec![]; graph.classes];
        for (i, n) in needs.iter().enumerate() {
            n.iter().for_each(|c| users[*c].push(i));
        }
        let usable = |i: &usize| graph.nodes[*i].cost.is_finite() && graph.nodes[*i].cost >= 0.0;
        let mut ready: Vec<usize> = (0..needs.len()).filter(|i| missing[*i] == 0).filter(usable).collect();
        while let Some(i) = ready.pop() {
            if !std::mem::replace(&mut makes[graph.nodes[i].class], true) {
                for &u in &users[graph.nodes[i].class] {
                    missing[u] -= 1;
                    if missing[u] == 0 && usable(&u) {
                        ready.push(u);
                    }
                }
            }
        }
        if graph.roots.iter().any(|r| !makes[*r]) {
            return None;
        }
        let mut of: Vec<Vec<usize>> = vec![vec![]; graph.classes];
        for (i, node) in graph.nodes.iter().enumerate() {
            if missing[i] == 0 && usable(&i) && needs[i].binary_search(&node.class).is_err() {
                of[node.class].push(i);
            }
        }
        for list in &mut of {
            prune(list, &needs, graph);
        }
        let mut number = vec![u32::MAX; graph.classes];
        let mut original = vec![];
        let mut stack: Vec<usize> = graph.roots.clone();
        while let Some(c) = stack.pop() {
            if number[c] == u32::MAX {
                number[c] = original.len() as u32;
                original.push(c);
                stack.extend(of[c].iter().flat_map(|i| needs[*i].iter().copied()));
            }
        }
        let mut p = Problem {
            class: vec![],
            cost: vec![],
            origin: vec![],
            first: vec![0],
            needs: vec![],
            nodes: vec![vec![]; original.len()],
            users: vec![vec![]; original.len()],
            roots: graph.roots.iter().map(|r| number[*r]).collect(),
            part: vec![],
            original,
        };
        p.roots.sort_unstable();
        p.roots.dedup();
        for c in 0..p.original.len() {
            for &i in &of[p.original[c]] {
                let n = p.class.len() as u32;
                p.class.push(c as u32);
                p.cost.push(graph.nodes[i].cost);
                p.origin.push(i);
                for d in &needs[i] {
                    p.needs.push(number[*d]);
                    p.users[number[*d] as usize].push(n);
                }
                p.first.push(p.needs.len() as u32);
                p.nodes[c].push(n);
            }
        }
        p.part = start::parts(&p);
        Some(p)
    }

    /// The choice in terms of the graph, for the classes that the roots reach.
    fn lift(&self, classes: usize, choice: &[u32]) -> Vec<Option<usize>> {
        let mut out = vec![None; classes];
        let mut stack = self.roots.clone();
        while let Some(c) = stack.pop() {
            let n = choice[c as usize];
            let at = &mut out[self.original[c as usize]];
            if at.is_none() {
                *at = Some(self.origin[n as usize]);
                stack.extend(self.needs(n));
            }
        }
        out
    }
}

/// Drops nodes for which another of the class costs no more and needs no more.
fn prune(list: &mut Vec<usize>, needs: &[Vec<usize>], graph: &Graph) {
    // Cheapest and shortest first; whoever dominates a node comes before it.
    list.sort_by(|a, b| {
        let key = |i: usize| (graph.nodes[i].cost, needs[i].len());
        key(*a).0.total_cmp(&key(*b).0).then(key(*a).1.cmp(&key(*b).1)).then(a.cmp(b))
    });
    let mut kept: Vec<usize> = vec![];
    for &i in list.iter() {
        let within = |k: &usize| needs[*k].iter().all(|c| needs[i].binary_search(c).is_ok());
        // Many nodes in one class: only the first ones are compared.
        if !kept.iter().take(200).any(within) {
            kept.push(i);
        }
    }
    kept.sort_unstable();
    *list = kept;
}
