//! An entry seen as a petgraph graph: order, dominators, pictures. The entry itself stays a list of nodes.

use crate::graph::{Entry, ValueId};
use crate::text::print_node;
use petgraph::algo::dominators;
use petgraph::graph::{DiGraph, NodeIndex};
use petgraph::visit::Reversed;
use std::fmt::Write;

/// The entry as a directed graph, operand → user. Node `i` is value `%i`; an edge carries the operand's position.
pub fn digraph(e: &Entry) -> DiGraph<ValueId, usize> {
    let mut g = DiGraph::with_capacity(e.nodes.len(), e.nodes.len() * 2);
    for v in e.values() {
        g.add_node(v);
    }
    for v in e.values() {
        for (i, from) in e.node(v).inputs.iter().enumerate() {
            g.add_edge(NodeIndex::new(from.index()), NodeIndex::new(v.index()), i);
        }
    }
    g
}

/// The values that roots need, operands first, each right after the operands that only it needs where that is
/// possible: a depth-first walk from the roots in order. (The entry's own order is topological as well.)
pub fn topological(e: &Entry) -> Vec<ValueId> {
    let mut done = vec![false; e.nodes.len()];
    let mut out = vec![];
    for r in &e.roots {
        let mut stack = vec![(r.value, false)];
        while let Some((v, operands_done)) = stack.pop() {
            if operands_done {
                out.push(v);
            } else if !std::mem::replace(&mut done[v.index()], true) {
                stack.push((v, true));
                stack.extend(e.node(v).inputs.iter().rev().filter(|i| !done[i.index()]).map(|i| (*i, false)));
            }
        }
    }
    out
}

/// For every value the nearest later value that lies on all its ways to a root; `None` where there is no such value or
/// the value is dead. A root's own ways end at once.
pub fn immediate_post_dominators(e: &Entry) -> Vec<Option<ValueId>> {
    let mut g = digraph(e).map(|_, v| Some(*v), |_, _| ());
    let exit = g.add_node(None);
    for r in &e.roots {
        g.add_edge(NodeIndex::new(r.value.index()), exit, ());
    }
    let dom = dominators::simple_fast(Reversed(&g), exit);
    e.values().map(|v| dom.immediate_dominator(NodeIndex::new(v.index())).and_then(|n| g[n])).collect()
}

/// A picture for graphviz.
pub fn to_dot(e: &Entry) -> String {
    let mut s = format!("digraph {:?} {{\n  node [shape=box, fontname=monospace]\n", e.name);
    for v in e.values() {
        let mut bare = e.node(v).clone();
        bare.origin = None;
        let _ = writeln!(s, "  n{} [label={:?}]", v.0, print_node(v, &bare));
    }
    for v in e.values() {
        for i in &e.node(v).inputs {
            let _ = writeln!(s, "  n{} -> n{}", i.0, v.0);
        }
    }
    for (i, r) in e.roots.iter().enumerate() {
        let label = match &r.kind {
            crate::graph::RootKind::Output(name) => format!("output {name}"),
            crate::graph::RootKind::Assign(p) => format!("assign {p}"),
        };
        let _ = writeln!(s, "  r{i} [label={label:?}, shape=ellipse]\n  n{} -> r{i}", r.value.0);
    }
    s.push_str("}\n");
    s
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::{Op, UnaryOp};
    use crate::types::DType;

    /// x → exp, x → neg, add(exp, neg) → abs; a dead sqrt.
    fn diamond() -> Entry {
        let mut e = Entry::new("e");
        let mut push = |op, x: &[u32]| e.push(&[], op, &x.iter().map(|i| ValueId(*i)).collect::<Vec<_>>()).unwrap();
        push(Op::Input { name: "x".into(), dtype: DType::F32, shape: vec![4.into()] }, &[]);
        push(Op::Unary(UnaryOp::Exp), &[0]);
        push(Op::Unary(UnaryOp::Neg), &[0]);
        push(Op::Unary(UnaryOp::Sqrt), &[0]);
        push(Op::Add, &[1, 2]);
        let y = push(Op::Unary(UnaryOp::Abs), &[4]);
        e.output("y", y);
        e
    }

    #[test]
    fn order_and_dominators() {
        let e = diamond();
        assert_eq!(topological(&e), [0, 1, 2, 4, 5].map(ValueId));
        let d = immediate_post_dominators(&e);
        assert_eq!(d, [Some(4), Some(4), Some(4), None, Some(5), None].map(|v| v.map(ValueId)));
        assert_eq!(digraph(&e).edge_count(), 6);
        assert!(!petgraph::algo::is_cyclic_directed(&digraph(&e)));
    }

    #[test]
    fn picture_names_every_value() {
        let dot = to_dot(&diamond());
        assert!(dot.contains("n4 [label=\"%4 = add(%1, %2) : f32[4]\"]") && dot.contains("n5 -> r0"), "{dot}");
    }
}
