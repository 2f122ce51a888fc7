//! Keep or build again, as a minimum cut.
//!
//! Two nodes per forward value: *needed* (some gradient or some clone reads it) and *rebuilt* (it is computed again).
//! Edges: source → needed of what gradients read (∞), needed → rebuilt (bytes × price: cut = kept), rebuilt → sink (time:
//! cut = paid; infinite for what crosses a stop), rebuilt → needed of each operand (∞). Leaves (inputs, parameters, constants)
//! are always there. Costs are integers, so the cut is the same everywhere.

use super::{Price, gradients, narrow, saved};
use crate::chunk;
use crate::options::Options;
use petgraph::algo::maximum_flow::dinics;
use petgraph::graph::{DiGraph, NodeIndex};
use petgraph::visit::EdgeRef;
use pleach_ir::{Dim, Entry, Op, Sym, TensorType, UnaryOp, ValueId};

/// No finite sum of costs reaches this.
pub(super) const NEVER: u64 = 1 << 52;
/// Cost units of a microsecond.
const UNIT: f64 = 1e4;

/// Keys that a query costs at least, however short sequences are.
const LENGTH: u64 = 128;

/// Value of a symbol when an entry tuned for this many tokens is priced: a batch of sequences of 128 tokens.
pub(super) fn counts(tokens: u64) -> impl Fn(Sym) -> Option<u64> {
    move |s: Sym| {
        Some(match s {
            Sym::S => tokens.div_ceil(128),
            Sym::S1 => tokens.div_ceil(128) + 1,
            _ => tokens,
        })
    }
}

/// Bytes of a type at these counts.
pub(super) fn bytes(ty: &TensorType, tokens: u64) -> u64 {
    ty.bytes(&counts(tokens)).unwrap_or(0)
}

/// Which values exist for a few rows at a time only: huge ones over a symbol that no attention ties together, which `chunk` runs
/// window by window, forward and backward half of a window one after the other. Keeping them costs nothing that building them
/// again would save.
pub(super) fn windowed(e: &Entry, tokens: u64) -> Vec<bool> {
    let rows = |v: ValueId| match e.ty(v).shape.first() {
        Some(Dim::Symbol(s)) => Some(*s),
        _ => None,
    };
    let tied: Vec<Option<Sym>> = e.values().filter(|v| e.node(*v).op.is_attention()).map(rows).collect();
    let free = |s: Option<Sym>| s.is_some() && s != Some(Sym::S) && s != Some(Sym::S1) && !tied.contains(&s);
    e.values().map(|v| free(rows(v)) && bytes(e.ty(v), tokens) > chunk::LEAST).collect()
}

/// Values that the backward half must have in memory: what its products, attention and scatters read, and what a choice is made of.
fn stored(e: &Entry, gradient: &[bool]) -> Vec<bool> {
    let mut out = vec![false; e.nodes.len()];
    for v in e.values() {
        let n = e.node(v);
        let read = match &n.op {
            Op::Gather { .. } => &n.inputs[..1],
            Op::MatMul { .. } | Op::Scatter { .. } if gradient[v.index()] => &n.inputs[..],
            op if op.is_attention() && gradient[v.index()] => &n.inputs[..],
            _ => continue,
        };
        read.iter().for_each(|i| out[saved::base(e, *i).index()] = true);
    }
    out
}

/// Microseconds to compute a value again, as a member of a fused kernel.
pub(super) fn time_us(e: &Entry, v: ValueId, opts: &Options) -> f64 {
    let tokens = opts.tokens(&e.name);
    let env = counts(tokens);
    let elements = |v: ValueId| e.ty(v).elements(&env).unwrap_or(0) as f64;
    let n = e.node(v);
    let flops = |f: f64| f / opts.target.flops * 1e6;
    // arithmetic on values in registers, several of them per cycle and core
    let pass = |k: f64| k * elements(v) * 6.0 / opts.target.flops * 1e6;
    match &n.op {
        Op::Input { .. } | Op::Param(_) | Op::Const { .. } | Op::Iota { .. } => 0.0,
        Op::Reshape(_) | Op::Transpose(_) | Op::Broadcast { .. } | Op::Slice { .. } | Op::After | Op::StopGradient => {
            0.0
        }
        Op::MatMul { ta, .. } => {
            let a = e.ty(n.inputs[0]);
            let k = if *ta { a.shape.iter().rev().nth(1) } else { a.shape.last() };
            let k = k.and_then(|d| d.eval(&env)).unwrap_or(1) as f64;
            flops(2.0 * elements(v) * k)
        }
        Op::Attention(a) | Op::AttentionLse(a) => {
            let width = f64::from(a.heads) * f64::from(a.head_dim);
            // half of the scores count, at two thirds of the rate of a product
            flops(3.0 * tokens as f64 * opts.length_hint.max(LENGTH) as f64 * width)
        }
        Op::AttentionGrad { .. } => NEVER as f64,
        Op::Unary(UnaryOp::Neg | UnaryOp::Abs | UnaryOp::Not | UnaryOp::Floor) => pass(1.0),
        Op::Unary(_) => pass(4.0),
        Op::Reduce { .. } => elements(n.inputs[0]) * 6.0 / opts.target.flops * 1e6,
        Op::Gather { .. } | Op::Scatter { .. } => 2e6 * bytes(e.ty(v), tokens) as f64 / opts.target.bytes_per_s,
        _ => pass(1.0),
    }
}

/// What a forward value costs in units of the cut.
#[derive(Clone, Copy)]
pub(super) struct Cost {
    /// Kept for the backward half.
    pub(super) keep: u64,
    /// Computed again from its operands, which are then needed as well.
    pub(super) again: u64,
}

/// Cost of so many microseconds.
fn units(us: f64) -> u64 {
    ((us * UNIT).round() as u64).min(NEVER)
}

/// Microseconds to compute all these values again, and to write those that must be in memory.
pub(super) fn again_us(e: &Entry, rebuilt: &[bool], opts: &Options) -> f64 {
    let stored = stored(e, &gradients(e));
    let all = e.values().filter(|v| rebuilt[v.index()]);
    all.map(|v| time_us(e, v, opts) + if stored[v.index()] { write_us(e, v, opts) } else { 0.0 }).sum()
}

/// Microseconds to write a value.
fn write_us(e: &Entry, v: ValueId, opts: &Options) -> f64 {
    let writes = !matches!(e.node(v).op, Op::Gather { .. } | Op::Scatter { .. }) && !e.node(v).op.is_leaf();
    if writes { 1e6 * bytes(e.ty(v), opts.tokens(&e.name)) as f64 / opts.target.bytes_per_s } else { 0.0 }
}

/// Microseconds that the products of an entry take.
pub(super) fn products_us(e: &Entry, opts: &Options) -> f64 {
    e.values().filter(|v| matches!(e.node(*v).op, Op::MatMul { .. })).map(|v| time_us(e, v, opts)).sum()
}

/// Which forward values are built again for the backward half, at a price.
pub(super) fn rebuilt(e: &Entry, opts: &Options, price: Price) -> Vec<bool> {
    let gradient = gradients(e);
    let tokens = opts.tokens(&e.name);
    let forward_result = forward(e, &gradient);
    let windowed = windowed(e, tokens);
    let stored = stored(e, &gradient);
    let crossing = narrow::Forward::new(e, &forward_result, opts).crossing(price.every);
    let count = gradient.iter().filter(|x| !**x).count().max(1) as f64;
    let mut position = 0.0;
    let costs: Vec<Cost> = e
        .values()
        .map(|v| {
            position += if gradient[v.index()] { 0.0 } else { 1.0 };
            let byte_us = if position / count <= price.early { price.early_byte_us } else { price.byte_us };
            let kept = if windowed[v.index()] { 0.0 } else { bytes(e.ty(v), tokens) as f64 * byte_us };
            // what no forward result needs is computed once either way
            let once = !forward_result[v.index()] && !matches!(e.node(v).op, Op::AttentionLse(_));
            let write = if stored[v.index()] { write_us(e, v, opts) } else { 0.0 };
            let time = if once { 0.0 } else { time_us(e, v, opts) + write };
            let stays = crossing[v.index()] || windowed[v.index()];
            Cost { keep: units(kept).max(1), again: if stays { NEVER } else { units(time) } }
        })
        .collect();
    cheapest(e, &gradient, &costs)
}

/// The cheapest choice of what is built again, when every gradient must get what it reads: one cost per value.
pub(super) fn cheapest(e: &Entry, gradient: &[bool], costs: &[Cost]) -> Vec<bool> {
    let mut g: DiGraph<(), u64> = DiGraph::new();
    let (source, sink) = (g.add_node(()), g.add_node(()));
    let mut at: Vec<Option<(NodeIndex, NodeIndex)>> = vec![None; e.nodes.len()];
    // what a gradient may want: everything that its forward operands are made of
    let mut wanted = vec![false; e.nodes.len()];
    for v in e.values().rev() {
        if gradient[v.index()] || wanted[v.index()] {
            e.node(v).inputs.iter().filter(|i| !gradient[i.index()]).for_each(|i| wanted[i.index()] = true);
        }
    }
    for v in e.values().filter(|v| !gradient[v.index()] && wanted[v.index()] && !e.node(*v).op.is_leaf()) {
        let (needed, again) = (g.add_node(()), g.add_node(()));
        at[v.index()] = Some((needed, again));
        let cost = costs[v.index()];
        g.add_edge(needed, again, cost.keep);
        g.add_edge(again, sink, cost.again);
        for i in &e.node(v).inputs {
            if let Some((needed, _)) = at[i.index()] {
                g.add_edge(again, needed, NEVER);
            }
        }
    }
    let mut read = vec![false; e.nodes.len()];
    for v in e.values().filter(|v| gradient[v.index()]) {
        e.node(v).inputs.iter().for_each(|i| read[i.index()] = true);
    }
    for v in e.values().filter(|v| read[v.index()]) {
        if let Some((needed, _)) = at[v.index()] {
            g.add_edge(source, needed, NEVER);
        }
    }
    let (_, flow) = dinics(&g, source, sink);
    // the source's side of the cut: what residual capacity reaches
    let mut reached = vec![false; g.node_count()];
    reached[source.index()] = true;
    let mut stack = vec![source];
    while let Some(x) = stack.pop() {
        let forth = g.edges(x).filter(|e| flow[e.id().index()] < *e.weight()).map(|e| e.target());
        let back =
            g.edges_directed(x, petgraph::Direction::Incoming).filter(|e| flow[e.id().index()] > 0).map(|e| e.source());
        let next: Vec<NodeIndex> = forth.chain(back).filter(|y| !reached[y.index()]).collect();
        for y in next {
            if !std::mem::replace(&mut reached[y.index()], true) {
                stack.push(y);
            }
        }
    }
    at.iter().map(|x| x.is_some_and(|(_, again)| reached[again.index()])).collect()
}

/// Which values the loss needs. A result that is made of gradients, such as their norm, needs none of the forward half by itself.
pub(super) fn forward(e: &Entry, gradient: &[bool]) -> Vec<bool> {
    let mut out = vec![false; e.nodes.len()];
    for r in &e.roots {
        if matches!(r.kind, pleach_ir::RootKind::Output(_)) {
            out[r.value.index()] = true;
        }
    }
    let result = out.clone();
    for v in e.values().rev() {
        // The loss is scaled as its gradient is.
        if out[v.index()] && (result[v.index()] || !gradient[v.index()]) {
            e.node(v).inputs.iter().for_each(|i| out[i.index()] = true);
        }
    }
    out.iter().zip(gradient).map(|(o, g)| *o && !g).collect()
}
