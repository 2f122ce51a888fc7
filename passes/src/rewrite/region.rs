//! Regions: the parts of an entry that are rewritten as one.
//!
//! A region is a set of run-time nodes of linear algebra: products with parameters that share an input or feed each
//! other, and the sums, scales, slices, gathers and concats next to them, with the parameter arithmetic they read.
//! Attention, reductions and non-linear functions stay outside, those of parameters too: what they give is an input. Regions that would depend on each other in a circle are
//! one region, so an entry can always be put together again whatever a region is rewritten to. Equal regions have equal
//! [`Body`]s.
//!
//! In an entry that computes gradients a region holds the products of both halves that share an operand: a linear layer,
//! its gradients and its adapters'. What lies between the halves stays outside, and [`super::halves`] says which input is
//! there for which output. Rounding to bf16 belongs to a region where it stands next to a product.

use super::halves::Halves;
use super::lang::{Known, Label, Leaf, Stage, foldable};
use pleach_ir::{BinaryOp, DType, Entry, Graph, Op, Param, Role, ScatterMode, Source, ValueId};
use std::collections::{BTreeMap, BTreeSet};

/// Nodes of the largest region that is looked at.
pub const LARGEST: usize = 500;

/// From when on each value of an entry is known.
pub fn known(g: &Graph, e: &Entry) -> Vec<Known> {
    let derived = derived_slots(g);
    let mut out: Vec<Known> = vec![];
    for n in &e.nodes {
        let k = match &n.op {
            Op::Input { .. } => Known::Run,
            Op::Param(p) => param_known(&g.params[p.index()], derived.get(&p.0)),
            _ => n.inputs.iter().map(|i| out[i.index()]).max().unwrap_or(Known::Const),
        };
        out.push(if foldable(&n.ty) || matches!(n.op, Op::Param(_)) { k } else { Known::Run });
    }
    out
}

/// The slots that each derived parameter depends on, by the prepare entries that assign it.
pub fn derived_slots(g: &Graph) -> BTreeMap<u32, BTreeSet<u32>> {
    let mut out: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
    for e in &g.entries {
        let slot: Option<u32> =
            e.name.strip_prefix("prepare(slot").and_then(|s| s.strip_suffix(')')).and_then(|s| s.parse().ok());
        if slot.is_none() && e.name != "prepare(base)" {
            continue;
        }
        for r in &e.roots {
            if let pleach_ir::RootKind::Assign(p) = r.kind {
                out.entry(p.0).or_default().extend(slot);
            }
        }
    }
    out
}

fn param_known(p: &Param, slots: Option<&BTreeSet<u32>>) -> Known {
    if p.role == Role::Train {
        return Known::Train;
    }
    if !matches!(p.role, Role::Frozen | Role::Index) {
        return Known::Run;
    }
    match (&p.source, slots) {
        (Source::Adapter { .. }, _) => Known::Slot,
        (Source::Checkpoint(_), _) => Known::Base,
        (Source::Derived, Some(s)) if s.is_empty() => Known::Base,
        (Source::Derived, Some(_)) => Known::Slot,
        _ => Known::Run,
    }
}

/// A node of a region: label and operands, as positions in [`Body::nodes`].
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct BodyNode {
    /// What it is.
    pub label: Label,
    /// Operands, all earlier.
    pub ch: Vec<usize>,
}

/// What a region computes, free of names: the key under which it is rewritten once.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Body {
    /// Nodes, operands first.
    pub nodes: Vec<BodyNode>,
    /// Leaves, numbered by first use.
    pub leaves: Vec<Leaf>,
    /// Nodes that something outside reads.
    pub outputs: Vec<usize>,
    /// Who reads each output.
    pub readers: Vec<Readers>,
    /// Something in the graph is trained: weights stay as they lie.
    pub training: bool,
}

/// Which half reads an output from outside.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Readers {
    /// The half that the value is of, or the forward half.
    Near,
    /// The backward half alone, a value of the forward half.
    Late,
    /// Both halves, a value of the forward half: its bytes are kept whatever happens.
    Both,
}

/// A region of an entry.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Region {
    /// Run-time nodes it replaces, ascending.
    pub members: Vec<ValueId>,
    /// What it computes.
    pub body: Body,
    /// The value of the entry behind each node of the body.
    pub values: Vec<ValueId>,
    /// The value of the entry behind each leaf.
    pub leaves: Vec<ValueId>,
}

/// Regions of an entry, and for every value the region that replaces it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Regions {
    /// Regions.
    pub list: Vec<Region>,
    /// Position in `list` of the region a value belongs to.
    pub of: Vec<Option<usize>>,
    /// Groups left alone because they were too large.
    pub skipped: usize,
}

/// Finds the regions of an entry.
pub fn find(g: &Graph, e: &Entry, known: &[Known]) -> Regions {
    let live = e.live();
    let halves = Halves::of(e);
    let training = g.params.iter().any(|p| p.role == Role::Train) || g.entries.iter().any(|e| Halves::of(e).both);
    let mut readers = vec![0usize; e.nodes.len()];
    for v in e.values().filter(|v| live[v.index()]) {
        e.node(v).inputs.iter().for_each(|i| readers[i.index()] += 1);
    }
    e.roots.iter().for_each(|r| readers[r.value.index()] += 1);
    let linear = linear_nodes(e, known, &live, halves.both);
    let mut sets = Sets::new(e.nodes.len());
    link(e, known, &linear, &readers, halves.both, &mut sets);
    let mut skipped = 0;
    let of = settle(e, known, &live, &linear, halves.both, sets, &mut skipped);
    let counters = if halves.both { halves.counters(e, known, &of) } else { vec![0; e.nodes.len()] };
    let mut groups: BTreeMap<usize, Vec<ValueId>> = BTreeMap::new();
    for v in e.values() {
        if let Some(k) = of[v.index()] {
            groups.entry(k).or_default().push(v);
        }
    }
    let mut out = Regions { list: vec![], of: vec![None; e.nodes.len()], skipped };
    let (users, derived) = (e.users(), derived_slots(g));
    let mut root = vec![false; e.nodes.len()];
    e.roots.iter().for_each(|r| root[r.value.index()] = true);
    let mut inside = vec![false; e.nodes.len()];
    for members in groups.into_values() {
        members.iter().for_each(|v| inside[v.index()] = true);
        let found = body(g, e, known, &derived, &members, &inside).map(|mut r| {
            let read = |v: ValueId| {
                inside[v.index()]
                    && (root[v.index()] || users[v.index()].iter().any(|u| live[u.index()] && !inside[u.index()]))
            };
            r.body.outputs = (0..r.values.len()).filter(|&k| read(r.values[k])).collect();
            r.body.training = training;
            // what outside the region reads it in the backward half, and elsewhere
            let late = |v: ValueId| {
                halves.both
                    && !halves.late[v.index()]
                    && users[v.index()].iter().any(|u| live[u.index()] && !inside[u.index()] && halves.late[u.index()])
            };
            let near = |v: ValueId| {
                let users = users[v.index()].iter();
                root[v.index()]
                    || users.clone().any(|u| live[u.index()] && !inside[u.index()] && !halves.late[u.index()])
            };
            let who = |v: ValueId| match (near(v), late(v)) {
                (true, true) => Readers::Both,
                (false, true) => Readers::Late,
                _ => Readers::Near,
            };
            r.body.readers = r.body.outputs.iter().map(|&k| who(r.values[k])).collect();
            if halves.both {
                let run: Vec<usize> =
                    (0..r.leaves.len()).filter(|&k| known[r.leaves[k].index()] == Known::Run).collect();
                let values: Vec<ValueId> = run.iter().map(|&k| r.leaves[k]).collect();
                for (k, at) in run.into_iter().zip(halves.stages(&counters, &values)) {
                    let v = r.leaves[k];
                    r.body.leaves[k].at = at;
                    r.body.leaves[k].kept = late(v) || matches!(e.node(v).op, Op::Param(_) | Op::Input { .. });
                }
            }
            r
        });
        members.iter().for_each(|v| inside[v.index()] = false);
        match found {
            Some(r) if worth(&r.body) => {
                members.iter().for_each(|v| out.of[v.index()] = Some(out.list.len()));
                out.list.push(r);
            }
            Some(_) => {}
            None => out.skipped += 1,
        }
    }
    out
}

fn float_matrix(e: &Entry, v: ValueId) -> bool {
    matches!(e.ty(v).dtype, DType::F32 | DType::BF16) && e.ty(v).rank() == 2
}

/// Which run-time nodes the rules can say something about.
fn linear_nodes(e: &Entry, known: &[Known], live: &[bool], both: bool) -> Vec<bool> {
    let mut lin = vec![false; e.nodes.len()];
    let param = |v: ValueId| known[v.index()] < Known::Run;
    // a scalar or vector of parameters, maybe repeated over the tokens
    let factor = |v: ValueId| {
        let n = e.node(v);
        param(v) || (matches!(n.op, Op::Broadcast { .. }) && param(n.inputs[0]))
    };
    for v in e.values().filter(|v| live[v.index()] && !param(*v)) {
        let n = e.node(v);
        let x = &n.inputs;
        let l = |i: usize| lin[x[i].index()];
        lin[v.index()] = match &n.op {
            Op::MatMul { .. } => x.iter().all(|&i| float_matrix(e, i)) && (both || param(x[0]) != param(x[1])),
            Op::Cast(_) => l(0) && float_matrix(e, v),
            Op::Gather { .. } | Op::Slice { .. } if float_matrix(e, v) => l(0),
            _ if n.ty.dtype != DType::F32 => false,
            Op::Add => x.iter().any(|i| lin[i.index()]),
            Op::Binary(BinaryOp::Mul) => (l(0) && factor(x[1])) || (l(1) && factor(x[0])),
            Op::Slice { .. } | Op::Gather { .. } => l(0),
            Op::Concat { .. } => x.iter().all(|i| lin[i.index()]),
            Op::Scatter { mode: ScatterMode::Add, .. } => both && l(0) && l(2) && param(x[1]),
            _ => false,
        };
    }
    // columns chosen from the input of a product; for gradients also what is scaled by a trained or a single number
    for v in e.values().rev().filter(|v| live[v.index()]) {
        let n = e.node(v);
        let from: &[ValueId] = match &n.op {
            _ if !lin[v.index()] => &[],
            Op::MatMul { .. } if both => &n.inputs,
            Op::MatMul { .. } => &n.inputs[..1],
            Op::Cast(_) | Op::Gather { .. } | Op::Slice { .. } if both => &n.inputs[..1],
            _ => &[],
        };
        for &u in from.iter().filter(|&&u| !param(u) && float_matrix(e, u)) {
            let n = e.node(u);
            let small = |v: ValueId| factor(v) && (e.ty(v).rank() == 0 || trained(e, known, v));
            lin[u.index()] |= match n.op {
                Op::Slice { axis, .. } => axis == 1 || both,
                Op::Gather { axis } => (axis == 1 || both) && param(n.inputs[1]),
                Op::Cast(_) => both && scaled(e, n.inputs[0]),
                Op::Binary(BinaryOp::Mul) => both && n.inputs.iter().any(|&i| small(i)),
                _ => false,
            };
        }
    }
    lin
}

/// True for a trained vector, maybe repeated over the tokens.
fn trained(e: &Entry, known: &[Known], v: ValueId) -> bool {
    let n = e.node(v);
    let source = if matches!(n.op, Op::Broadcast { .. }) { n.inputs[0] } else { v };
    known[source.index()] == Known::Train
}

/// True for a product of two f32 matrices' elements, one of which may stand for all.
fn scaled(e: &Entry, v: ValueId) -> bool {
    matches!(e.node(v).op, Op::Binary(BinaryOp::Mul)) && e.ty(v).dtype == DType::F32
}

/// True for a sum, or what is left of it after rounding.
fn is_sum(e: &Entry, v: ValueId) -> bool {
    match e.node(v).op {
        Op::Add => true,
        Op::Cast(_) => is_sum(e, e.node(v).inputs[0]),
        _ => false,
    }
}

/// Joins what belongs together.
fn link(e: &Entry, known: &[Known], linear: &[bool], readers: &[usize], both: bool, sets: &mut Sets) {
    let mut sharing: BTreeMap<ValueId, ValueId> = BTreeMap::new();
    for v in e.values().filter(|v| linear[v.index()]) {
        let n = e.node(v);
        for &u in &n.inputs {
            let run = known[u.index()] == Known::Run;
            let product = matches!(n.op, Op::MatMul { .. });
            let choice = matches!(n.op, Op::Slice { .. } | Op::Gather { .. });
            if run && (product || choice) {
                // siblings read one value
                let first = *sharing.entry(u).or_insert(v);
                sets.join(first, v);
            }
            // the residual stream runs through sums with several readers: each reader is another region
            let scale = both && n.op == Op::Binary(BinaryOp::Mul);
            let stream = is_sum(e, u) && readers[u.index()] > 1 && !choice && !scale;
            if linear[u.index()] && !stream {
                sets.join(u, v);
            }
        }
    }
}

/// Drops regions that are too large, and joins those that depend on each other in a circle where no stages keep the
/// circles out.
fn settle(
    e: &Entry,
    known: &[Known],
    live: &[bool],
    linear: &[bool],
    both: bool,
    mut sets: Sets,
    skipped: &mut usize,
) -> Vec<Option<usize>> {
    let n = e.nodes.len();
    let mut of: Vec<Option<usize>> = (0..n).map(|i| linear[i].then(|| sets.find(i))).collect();
    drop_large(&mut of, skipped);
    if both {
        return of;
    }
    // one vertex per region, one per other run-time node
    let mut g = petgraph::graph::DiGraph::<(), ()>::new();
    (0..n).for_each(|_| {
        g.add_node(());
    });
    let vertex = |of: &[Option<usize>], v: usize| petgraph::graph::NodeIndex::new(of[v].unwrap_or(v));
    for v in e.values().filter(|v| live[v.index()] && known[v.index()] == Known::Run) {
        for u in e.node(v).inputs.iter().filter(|u| known[u.index()] == Known::Run) {
            let (a, b) = (vertex(&of, u.index()), vertex(&of, v.index()));
            if a != b {
                g.update_edge(a, b, ());
            }
        }
    }
    let mut circle: BTreeMap<usize, usize> = BTreeMap::new();
    for part in petgraph::algo::tarjan_scc(&g).into_iter().filter(|p| p.len() > 1) {
        let name = part.iter().map(|v| v.index()).min().unwrap_or(0);
        circle.extend(part.iter().map(|v| (v.index(), name)));
    }
    for (v, slot) in of.iter_mut().enumerate() {
        let own = slot.unwrap_or(v);
        if let Some(c) = circle.get(&own)
            && live[v]
            && known[v] == Known::Run
        {
            *slot = Some(*c);
        }
    }
    drop_large(&mut of, skipped);
    of
}

fn drop_large(of: &mut [Option<usize>], skipped: &mut usize) {
    let mut size: BTreeMap<usize, usize> = BTreeMap::new();
    of.iter().flatten().for_each(|k| *size.entry(*k).or_default() += 1);
    size.retain(|_, n| *n > LARGEST);
    *skipped += size.len();
    of.iter_mut().filter(|k| k.is_some_and(|k| size.contains_key(&k))).for_each(|k| *k = None);
}

/// Builds the body: leaves numbered by first use, operands first. `None` if it is too large.
fn body(
    g: &Graph,
    e: &Entry,
    known: &[Known],
    derived: &BTreeMap<u32, BTreeSet<u32>>,
    members: &[ValueId],
    inside: &[bool],
) -> Option<Region> {
    let mut r = Region { members: members.to_vec(), body: Body::default(), values: vec![], leaves: vec![] };
    let mut at: BTreeMap<ValueId, usize> = BTreeMap::new();
    let is_leaf = |v: ValueId| {
        let run = known[v.index()] == Known::Run;
        // a parameter repeated over the tokens is looked into
        let repeated = matches!(e.node(v).op, Op::Broadcast { .. }) && known[e.node(v).inputs[0].index()] < Known::Run;
        let outside = if run { !repeated && !inside[v.index()] } else { function(e, v) };
        matches!(e.node(v).op, Op::Param(_) | Op::Input { .. }) || outside
    };
    let mut stack: Vec<ValueId> = members.iter().rev().copied().collect();
    while let Some(&v) = stack.last() {
        if at.contains_key(&v) {
            stack.pop();
            continue;
        }
        let leaf = is_leaf(v);
        let missing: Vec<ValueId> = match leaf {
            true => vec![],
            false => e.node(v).inputs.iter().filter(|i| !at.contains_key(i)).rev().copied().collect(),
        };
        if !missing.is_empty() {
            stack.extend(missing);
            continue;
        }
        stack.pop();
        let label = if leaf {
            let slot = if known[v.index()] == Known::Run { 0 } else { slot(g, e, derived, v) };
            let at = Stage::default();
            r.body.leaves.push(Leaf { ty: e.ty(v).clone(), known: known[v.index()], slot, at, kept: false });
            r.leaves.push(v);
            Label::Leaf(r.leaves.len() as u32 - 1)
        } else {
            Label::Op(e.node(v).op.clone())
        };
        let ch = if leaf { vec![] } else { e.node(v).inputs.iter().map(|i| at[i]).collect() };
        at.insert(v, r.values.len());
        r.body.nodes.push(BodyNode { label, ch });
        r.values.push(v);
        if r.values.len() > 2 * LARGEST {
            return None;
        }
    }
    Some(r)
}

/// A vector or a number that is no linear function of parameters: no rule looks into it, and whoever else reads it reads the same.
fn function(e: &Entry, v: ValueId) -> bool {
    let small = e.ty(v).rank() <= 1;
    small
        && matches!(&e.node(v).op, Op::Reduce { .. } | Op::Unary(_) | Op::Select | Op::Binary(_))
        && e.node(v).op != Op::Binary(BinaryOp::Mul)
}

/// The last slot that a value of parameters depends on.
fn slot(g: &Graph, e: &Entry, derived: &BTreeMap<u32, BTreeSet<u32>>, v: ValueId) -> u32 {
    let (mut seen, mut stack, mut last) = (BTreeSet::new(), vec![v], 0);
    while let Some(v) = stack.pop() {
        if !seen.insert(v) {
            continue;
        }
        if let Op::Param(p) = &e.node(v).op {
            last = last.max(match &g.params[p.index()].source {
                Source::Adapter { slot, .. } => *slot,
                _ => derived.get(&p.0).and_then(|s| s.last().copied()).unwrap_or(0),
            });
        }
        stack.extend(&e.node(v).inputs);
    }
    last
}

/// A lone product with a bare weight has no other form.
fn worth(b: &Body) -> bool {
    let products = b.nodes.iter().filter(|n| matches!(n.label, Label::Op(Op::MatMul { .. }))).count();
    products > 1
        || b.nodes.iter().any(|n| match &n.label {
            Label::Op(Op::MatMul { .. }) => n.ch.iter().any(|&c| {
                let k = &b.nodes[c];
                matches!(k.label, Label::Op(_)) && !k.ch.is_empty()
            }),
            _ => false,
        })
}

/// Disjoint sets; the smallest member names a set.
struct Sets(Vec<usize>);

impl Sets {
    fn new(n: usize) -> Sets {
        Sets((0..n).collect())
    }

    fn find(&mut self, mut v: usize) -> usize {
        while self.0[v] != v {
            self.0[v] = self.0[self.0[v]];
            v = self.0[v];
        }
        v
    }

    fn join(&mut self, a: ValueId, b: ValueId) {
        let (a, b) = (self.find(a.index()), self.find(b.index()));
        self.0[a.max(b)] = a.min(b);
    }
}
