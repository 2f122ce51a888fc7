//! Exhaustive search on small e-graphs as the oracle, and large ones made here.

use super::{Graph, Node, cost, solve};

/// Numbers that are the same on every machine.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % n.max(1)
    }
}

/// Needs go anywhere, so there are cycles, classes that nothing reaches and classes that cannot be made.
fn random(classes: usize, nodes: usize, r: &mut Random) -> Graph {
    let mut graph = Graph { classes, nodes: vec![], roots: vec![0] };
    if r.below(2) == 0 {
        graph.roots.push(r.below(classes));
    }
    for k in 0..nodes {
        let class = if k < classes { k } else { r.below(classes) };
        let needs = (0..r.below(4)).map(|_| r.below(classes)).collect();
        // Many nodes are free.
        let cost = if r.below(3) == 0 { 0.0 } else { r.below(20) as f64 };
        graph.nodes.push(Node { class, cost, needs });
    }
    graph
}

/// The least cost of all choices.
fn exhaustive(graph: &Graph) -> Option<f64> {
    fn go(graph: &Graph, choice: &mut Vec<Option<usize>>, open: &mut Vec<usize>, best: &mut Option<f64>) {
        let Some(c) = open.pop() else {
            if let Ok(t) = cost(graph, choice) {
                *best = Some(best.map_or(t, |b| b.min(t)));
            }
            return;
        };
        if choice[c].is_some() {
            go(graph, choice, open, best);
        } else {
            for (i, n) in graph.nodes.iter().enumerate().filter(|(_, n)| n.class == c) {
                choice[c] = Some(i);
                let mut more = open.clone();
                more.extend(&n.needs);
                go(graph, choice, &mut more, best);
            }
            choice[c] = None;
        }
        open.push(c);
    }
    let mut best = None;
    go(graph, &mut vec![None; graph.classes], &mut graph.roots.clone(), &mut best);
    best
}

#[test]
fn small_graphs_are_solved_as_well_as_any_choice_can() {
    let mut r = Random(7);
    let (mut solved, mut impossible) = (0, 0);
    for _ in 0..400 {
        let graph = random(7, 14, &mut r);
        let (found, best) = (solve(&graph), exhaustive(&graph));
        match (&found, best) {
            (None, None) => impossible += 1,
            (Some(s), Some(b)) => {
                assert_eq!(cost(&graph, &s.choice), Ok(s.cost));
                assert_eq!(s.cost, b, "{graph:?}");
                assert!(s.optimal, "{graph:?}");
                solved += 1;
            }
            _ => panic!("{found:?} and {best:?} for {graph:?}"),
        }
    }
    assert!(solved > 200 && impossible > 20, "{solved} {impossible}");
}

#[test]
fn only_what_the_roots_reach_is_chosen() {
    let node = |class, cost, needs: &[usize]| Node { class, cost, needs: needs.to_vec() };
    let graph = Graph {
        classes: 4,
        nodes: vec![
            node(0, 1.0, &[1, 1]),
            node(1, 2.0, &[0]),
            node(1, 2.0, &[]),
            node(2, 9.0, &[]),
            node(3, 0.0, &[3]),
        ],
        roots: vec![0, 0],
    };
    let s = solve(&graph).unwrap();
    assert_eq!((s.choice.clone(), s.cost, s.optimal), (vec![Some(0), Some(2), None, None], 3.0, true));
    assert_eq!(cost(&graph, &[Some(0), Some(1), None, None]), Err("class 0 needs itself".to_string()));
    assert_eq!(cost(&graph, &[Some(0), None, None, None]), Err("class 1 is needed and has no node".to_string()));
    assert!(cost(&graph, &[Some(2), None, None, None]).is_err());
    assert!(solve(&Graph { roots: vec![3], ..graph }).is_none());
}

/// Pairs of products over one value: each alone, or both as slices of one wide product. Pairs overlap, so they compete.
#[test]
fn wide_products_are_shared_in_every_layer() {
    let mut graph = Graph::default();
    let class = |g: &mut Graph| {
        g.classes += 1;
        g.classes - 1
    };
    let mut x = class(&mut graph);
    graph.nodes.push(Node { class: x, cost: 0.0, needs: vec![] });
    let layers = 40;
    for _ in 0..layers {
        let part: Vec<usize> = (0..4).map(|_| class(&mut graph)).collect();
        for &p in &part {
            graph.nodes.push(Node { class: p, cost: 10.0, needs: vec![x] });
        }
        // The pairs 0-1 and 2-3 together gain more than 1-2 alone, which gains most of one pair.
        for (a, b, wide) in [(0, 1, 15.0), (1, 2, 14.0), (2, 3, 15.0)] {
            let w = class(&mut graph);
            graph.nodes.push(Node { class: w, cost: wide, needs: vec![x] });
            for c in [part[a], part[b]] {
                graph.nodes.push(Node { class: c, cost: 0.5, needs: vec![w] });
            }
        }
        let next = class(&mut graph);
        graph.nodes.push(Node { class: next, cost: 1.0, needs: part });
        x = next;
    }
    graph.roots = vec![x];
    let s = solve(&graph).unwrap();
    assert_eq!(cost(&graph, &s.choice), Ok(s.cost));
    assert_eq!(s.cost, f64::from(layers) * (2.0 * 16.0 + 1.0));
}

#[test]
fn the_same_graph_gives_the_same_choice() {
    let graph = random(300, 1200, &mut Random(3));
    assert_eq!(solve(&graph), solve(&graph));
}

#[test]
fn a_deep_chain_that_doubles_does_not_overflow() {
    let mut graph = Graph { classes: 4000, nodes: vec![], roots: vec![3999] };
    for c in 0..4000usize {
        let needs = if c == 0 { vec![] } else { vec![c - 1, c.saturating_sub(2)] };
        graph.nodes.push(Node { class: c, cost: 1.0, needs });
    }
    let s = solve(&graph).unwrap();
    assert_eq!((s.cost, s.optimal), (4000.0, true));
}
