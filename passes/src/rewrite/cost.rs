//! Prices e-nodes for a target and turns the e-graph into an extraction problem.
//!
//! What the kernels can do is part of the price. A contraction kernel is a *sum of products* with elementwise work at
//! its end: its accumulators start from the thin products, so an adapter's branch costs its arithmetic only; left
//! operands may be slices of wider buffers for nothing. So a sum gets one alternative per way of taking products of its
//! terms into one kernel.
//!
//! A class of parameters read at run time has a second life as a resident buffer, with a price per byte and, if it is
//! no parameter itself, a price for building it. One entry may run with many tokens, another with one: a node's cost is
//! its sum over the entries that contain the region, each entry's time weighted to the same total, so that all of them
//! share one form and one set of buffers.
//!
//! Where a region has two halves, a class of the forward half has a second life too: as the backward half reads it. It is
//! kept, at a price per byte unless something outside keeps it anyway, or computed again from what is kept. So a term is
//! chosen with an eye on the bytes it makes others keep. Values over trained parameters cost what they take, once per
//! step; what is set in a weight is set in place, so the weight as it was need not stay.

use super::extract::{Choice, NONE, Problem};
use super::lang::{ENode, Known, Label, Stage, World};
use super::region::Readers;
use crate::options::Target;
use egg::Id;
use pleach_ir::{BinaryOp, Dim, Op, ScatterMode, Sym};
use std::collections::BTreeMap;

/// A slot's copy of base weights although slots are to stay apart: dearer than any sum of honest nodes.
const FORBIDDEN: f64 = 1e9;
/// Steps of the inner loop that one more product in a kernel is worth.
const TURN: f64 = 4.0;
/// What a byte read from a cache costs of one read from memory.
const CACHED: f64 = 0.2;
/// Ways to take one term of a sum into a kernel that are looked at.
const WAYS: usize = 3;
/// Alternatives of one sum at most.
const VARIANTS: usize = 64;

/// A term of a kernel's sum.
#[derive(Clone, PartialEq, Debug)]
pub enum Part {
    /// A value read as it is.
    Read(usize),
    /// A product in the kernel, maybe times a scalar.
    Product {
        /// The e-node of the product, for its origin.
        node: ENode,
        /// The e-node of the scaling, with the scalar.
        scale: Option<(ENode, usize)>,
        /// Left and right operand.
        operands: [usize; 2],
    },
}

/// What an alternative stands for.
#[derive(Clone, PartialEq, Debug)]
pub enum Kind {
    /// An operator or leaf; operands as classes of the problem.
    Node(ENode, Vec<usize>),
    /// A sum computed by one kernel.
    Sum(ENode, Vec<Part>),
    /// The class, kept: resident, or for the backward half.
    Keep(usize),
}

/// An extraction problem over an e-graph.
pub struct Extraction {
    /// The problem. Class `k` is a class of the e-graph; class `k + n` is the same, resident or as the backward half
    /// reads it.
    pub problem: Problem,
    /// What each alternative stands for.
    pub kinds: Vec<Kind>,
    /// Classes of the e-graph in order.
    pub ids: Vec<Id>,
    /// When each class of run-time values can be computed.
    pub stages: BTreeMap<Id, Stage>,
    index: BTreeMap<Id, usize>,
}

impl Extraction {
    /// The position of a class.
    pub fn at(&self, w: &World, c: Id) -> usize {
        self.index[&w.eg.find(c)]
    }

    /// The stage of a class; parameters are there from the start.
    fn stage(&self, w: &World, c: Id) -> Stage {
        self.stages.get(&w.eg.find(c)).copied().unwrap_or_default()
    }

    /// The class that a run-time node reads: parameters from their resident buffer, and for the backward half what is
    /// left of the forward one.
    fn read(&self, w: &World, c: Id, late: bool) -> usize {
        let k = self.at(w, c);
        if w.is_param(c) || (late && !self.stage(w, c).late) { k + self.ids.len() } else { k }
    }
}

/// Prices at one token count.
struct Meter<'a> {
    w: &'a World,
    t: &'a Target,
    tokens: u64,
}

impl Meter<'_> {
    fn dim(&self, d: Dim) -> f64 {
        match d {
            Dim::Known(n) => n as f64,
            Dim::Symbol(s) if s == Sym::S => 1.0,
            Dim::Symbol(s) if s == Sym::S1 => 2.0,
            Dim::Symbol(_) => self.tokens as f64,
        }
    }

    fn bytes(&self, c: Id) -> f64 {
        let t = self.w.ty(c);
        t.shape.iter().map(|d| self.dim(*d)).product::<f64>() * t.dtype.size() as f64
    }

    /// Bytes that reading a value in a kernel costs: a repeated vector costs nothing.
    fn read(&self, c: Id) -> f64 {
        let free = self.w.nodes(c).iter().any(|n| matches!(n.op(), Some(Op::Broadcast { .. })));
        if free || self.w.is_param(c) { 0.0 } else { self.bytes(c) }
    }

    fn us(&self, bytes: f64) -> f64 {
        bytes / self.t.bytes_per_s * 1e6
    }

    /// Arithmetic and memory time of one product, without its result.
    fn product(&self, left: (Id, bool), right: (Id, bool)) -> (f64, f64) {
        let (a, b) = (&self.w.ty(left.0).shape, &self.w.ty(right.0).shape);
        let r = a.len().max(2) - 2;
        let pick = |s: &[Dim], first: bool| s.get(r + usize::from(!first)).map_or(1.0, |d| self.dim(*d));
        let (m, k, n) = (pick(a, !left.1), pick(a, left.1), pick(b, right.1));
        let batch: f64 = a[..r.min(a.len())].iter().map(|d| self.dim(*d)).product();
        // a narrow product leaves part of a tile empty
        let flops = 2.0 * batch * m * (k + TURN) * (n / self.t.tile).ceil() * self.t.tile;
        // activations come from a cache, weights from memory
        let from = |c: Id| if self.w.is_param(c) { self.bytes(c) } else { CACHED * self.bytes(c) };
        (flops / self.t.flops * 1e6, self.us(from(left.0) + from(right.0)))
    }

    /// One e-node run on its own.
    fn node(&self, n: &ENode, id: Id) -> f64 {
        let Some(op) = n.op() else { return 0.0 };
        let pass = || self.us(n.ch.iter().map(|&c| self.read(c)).sum::<f64>() + self.bytes(id)) + self.t.launch_us;
        match op {
            Op::MatMul { ta, tb } => {
                let (flops, mem) = self.product((n.ch[0], *ta), (n.ch[1], *tb));
                flops.max(mem + self.us(self.bytes(id))) + self.t.launch_us
            }
            Op::Const { .. } | Op::Iota { .. } | Op::Broadcast { .. } | Op::Reshape(_) | Op::Slice { .. } => 0.0,
            // rounding is part of the kernel before
            Op::Cast(_) => 0.1 * pass(),
            Op::Gather { .. } => self.us(2.0 * self.bytes(id)) + self.t.launch_us,
            // a scale of columns ends a kernel
            Op::Binary(BinaryOp::Mul) if n.ch.iter().all(|&c| self.w.ty(c).rank() > 0) => 0.1 * pass(),
            _ => pass(),
        }
    }

    /// One kernel for a sum of products and other terms.
    fn sum(&self, id: Id, parts: &[Taken]) -> f64 {
        let (mut flops, mut mem, mut end) = (0.0, self.us(self.bytes(id)), 0.0);
        for (c, product) in parts {
            match product {
                Some((n, scaled)) => {
                    let Some(Op::MatMul { ta, tb }) = n.op() else { continue };
                    let (f, m) = self.product((n.ch[0], *ta), (n.ch[1], *tb));
                    flops += f;
                    // a factor that no operand takes is one more multiplication per element at the end
                    mem += m;
                    end += if *scaled { 0.05 * self.us(self.bytes(id)) + 0.1 * self.t.launch_us } else { 0.0 };
                }
                None => mem += self.us(self.read(*c)),
            }
        }
        flops.max(mem) + end + self.t.launch_us
    }

    /// Building a value over trained parameters, once per step.
    fn step(&self, n: &ENode, id: Id) -> f64 {
        let Some(op) = n.op() else { return 0.0 };
        let bytes = n.ch.iter().map(|&c| self.bytes(c)).sum::<f64>() + self.bytes(id);
        match op {
            Op::Const { .. } | Op::Iota { .. } | Op::Broadcast { .. } | Op::Reshape(_) | Op::Slice { .. } => 0.0,
            Op::MatMul { ta, tb } => {
                self.product((n.ch[0], *ta), (n.ch[1], *tb)).0.max(self.us(bytes)) + self.t.launch_us
            }
            Op::Gather { .. } => self.us(2.0 * self.bytes(id)) + self.t.launch_us,
            _ => self.us(bytes) + self.t.launch_us,
        }
    }

    /// Building a value at load time: small against everything at run time, but more work costs more.
    fn prepare(&self, n: &ENode, id: Id) -> f64 {
        let flops = match n.op() {
            Some(Op::MatMul { ta, tb }) => self.product((n.ch[0], *ta), (n.ch[1], *tb)).0,
            _ => 0.0,
        };
        1e-6 + 1e-6 * self.us(self.bytes(id)) + 1e-6 * flops
    }
}

/// What the problem is built for.
pub struct Setting<'a> {
    /// The target.
    pub target: &'a Target,
    /// Token counts of the entries that contain the region.
    pub tokens: &'a [u64],
    /// A sum of products is one kernel.
    pub epilogue: bool,
    /// Weights stay as they lie in memory, and a step pays for what is built from trained ones.
    pub training: bool,
    /// Microseconds that a byte is worth which the backward half makes the forward half keep.
    pub saved_byte_us: f64,
}

/// The classes that the source region uses, as (class, e-node): prices the entries against each other.
fn weights(w: &World, s: &Setting, source: &[(Id, ENode)]) -> Vec<f64> {
    let time = |tokens: u64| {
        let m = Meter { w, t: s.target, tokens };
        source.iter().filter(|x| !w.is_param(x.0)).map(|x| m.node(&x.1, x.0)).sum::<f64>().max(1e-6)
    };
    let times: Vec<f64> = s.tokens.iter().map(|&t| time(t)).collect();
    let least = times.iter().copied().fold(f64::INFINITY, f64::min);
    times.iter().map(|t| least / t).collect()
}

/// The extraction problem for these outputs. `source` holds an e-node for each class that the region came with.
pub fn problem(w: &World, roots: &[(Id, Readers)], s: &Setting, source: &[(Id, ENode)]) -> Extraction {
    let mut ids: Vec<Id> = w.eg.classes().map(|c| c.id).collect();
    ids.sort();
    let n = ids.len();
    let index: BTreeMap<Id, usize> = ids.iter().enumerate().map(|(k, &i)| (i, k)).collect();
    let mut x = Extraction { problem: Problem::new(2 * n), kinds: vec![], ids, stages: w.stages(), index };
    let weights = weights(w, s, source);
    let meters: Vec<(Meter, f64)> =
        s.tokens.iter().zip(&weights).map(|(&tokens, &k)| (Meter { w, t: s.target, tokens }, k)).collect();
    let priced = |f: &dyn Fn(&Meter) -> f64| meters.iter().map(|(m, k)| k * f(m)).sum::<f64>();
    let out: BTreeMap<Id, Readers> = roots.iter().map(|&(r, who)| (w.eg.find(r), who)).collect();
    let halves = x.stages.values().any(|s| s.late);
    for k in 0..n {
        let id = x.ids[k];
        if w.is_param(id) {
            parameters(w, &mut x, k, s, &meters[0].0);
            continue;
        }
        let stage = x.stage(w, id);
        let twin = halves && !stage.late;
        if twin {
            let kept = out.get(&id) == Some(&Readers::Both) || w.nodes(id).iter().any(|e| outlives(w, e));
            let cost = if kept { 0.0 } else { priced(&|m| m.bytes(id) * s.saved_byte_us) };
            x.problem.add(k + n, cost, vec![k]);
            x.kinds.push(Kind::Keep(k));
        }
        for e in w.nodes(id).iter().filter(|e| w.stage_of(e, &x.stages).is_some_and(|at| at <= stage)) {
            let view = matches!(e.op(), Some(Op::Slice { .. })) && out.contains_key(&id);
            let cost = priced(&|m| m.node(e, id)) + if view { s.target.view_us } else { 0.0 };
            for again in [false, true] {
                // a class of the forward half a second time, for the backward half
                if again && (!twin || is_leaf(e).is_some()) {
                    continue;
                }
                let (late, k) = if again { (true, k + n) } else { (stage.late, k) };
                let ch: Vec<usize> = e.ch.iter().map(|&c| x.read(w, c, late)).collect();
                x.problem.add(k, cost, ch.clone());
                x.kinds.push(Kind::Node(e.clone(), ch));
                if e.op() == Some(&Op::Add) && w.ty(id).rank() == 2 {
                    for (parts, how) in kernels(w, &x, e, late, stage, s.epilogue) {
                        let cost = priced(&|m| m.sum(id, &how));
                        let needs = parts.iter().flat_map(needs_of).collect();
                        x.problem.add(k, cost, needs);
                        x.kinds.push(Kind::Sum(e.clone(), parts));
                    }
                }
            }
        }
    }
    let root = |&(r, who): &(Id, Readers)| match who {
        Readers::Late => x.read(w, r, true),
        Readers::Near | Readers::Both => x.at(w, r),
    };
    x.problem.roots = roots.iter().map(root).collect();
    x
}

/// A leaf whose bytes outlive the forward half anyway.
fn outlives(w: &World, e: &ENode) -> bool {
    is_leaf(e).is_some_and(|i| w.eg.analysis.leaves[i as usize].kept)
}

fn needs_of(p: &Part) -> Vec<usize> {
    match p {
        Part::Read(c) => vec![*c],
        Part::Product { scale, operands, .. } => operands.iter().copied().chain(scale.as_ref().map(|s| s.1)).collect(),
    }
}

/// Alternatives of a class of parameters: built at load time or once per step, and kept.
fn parameters(w: &World, x: &mut Extraction, k: usize, s: &Setting, m: &Meter) {
    let (id, n) = (x.ids[k], x.ids.len());
    let d = &w.eg[id].data;
    let step = s.training && d.known == Known::Train;
    for e in w.nodes(id) {
        if e.ch.iter().any(|&c| !w.is_param(c)) {
            continue; // cannot be computed as early as the class
        }
        // what is set again needs nothing of what was there; what is added to does
        let in_place = matches!(e.op(), Some(Op::Scatter { mode: ScatterMode::Set, .. }));
        let from = |i: usize| {
            let c = e.ch[i];
            // what is known earlier is read where it stays
            let stays = step && w.known(c) < Known::Train && !(in_place && i == 0);
            x.at(w, c) + if stays { n } else { 0 }
        };
        let ch: Vec<usize> = (0..e.ch.len()).map(from).collect();
        let cost = match () {
            () if step && in_place => m.us(2.0 * e.ch.get(2).map_or(0.0, |&u| m.bytes(u))),
            () if step => m.step(e, id),
            () => m.prepare(e, id),
        };
        x.problem.add(k, cost, ch.clone());
        x.kinds.push(Kind::Node(e.clone(), ch));
    }
    let bytes = m.bytes(id);
    let constant = w.nodes(id).iter().any(|e| matches!(e.op(), Some(Op::Const { .. })));
    let mut cost = match () {
        () if constant => 0.0,
        // what is there already costs nothing, a copy or another form lives as long as the training
        () if s.training && !d.leaf => bytes * s.saved_byte_us,
        () => bytes * s.target.resident_us,
    };
    if !d.leaf && d.known == Known::Base {
        cost += bytes * s.target.prepare_us;
    }
    let elements = d.ty.static_elements().unwrap_or(0);
    if !w.merge && !d.leaf && d.known == Known::Slot && d.base > 0 && d.ty.rank() > 1 && 2 * elements >= d.base {
        cost += FORBIDDEN;
    }
    x.problem.add(k + n, cost, vec![k]);
    x.kinds.push(Kind::Keep(k));
}

/// A term for the price: its class, and the product taken in with whether a scalar is in front.
type Taken = (Id, Option<(ENode, bool)>);
type How = Vec<Taken>;

/// The ways to compute a sum by one kernel: each term read, or one of its products taken in.
fn kernels(w: &World, x: &Extraction, e: &ENode, late: bool, stage: Stage, epilogue: bool) -> Vec<(Vec<Part>, How)> {
    let mut ways: Vec<(Vec<Part>, How, usize)> = vec![(vec![], vec![], 0)];
    for &c in &e.ch {
        let taken = if w.is_param(c) { vec![] } else { products(w, x, c, late, stage) };
        let mut next = vec![];
        for (parts, how, count) in &ways {
            for (p, h) in &taken {
                if *count > 0 && !epilogue {
                    continue;
                }
                next.push((
                    [&parts[..], std::slice::from_ref(p)].concat(),
                    [&how[..], std::slice::from_ref(h)].concat(),
                    count + 1,
                ));
            }
            let p = Part::Read(x.read(w, c, late));
            next.push(([&parts[..], &[p]].concat(), [&how[..], &[(c, None)]].concat(), *count));
        }
        // ways that take in more come first
        next.sort_by_key(|z| std::cmp::Reverse(z.2));
        next.truncate(VARIANTS);
        ways = next;
    }
    ways.into_iter().filter(|z| z.2 > 0).map(|z| (z.0, z.1)).collect()
}

/// Products that a term of a sum is equal to, the cheapest right operands first.
fn products(w: &World, x: &Extraction, c: Id, late: bool, stage: Stage) -> Vec<(Part, Taken)> {
    let product = |e: &ENode| {
        let matrices = matches!(e.op(), Some(Op::MatMul { .. })) && e.ch.iter().all(|&o| w.ty(o).rank() == 2);
        matrices && w.stage_of(e, &x.stages).is_some_and(|at| at <= stage)
    };
    let mut found: Vec<(&ENode, Option<&ENode>)> =
        w.nodes(c).iter().filter(|e| product(e)).map(|e| (e, None)).collect();
    for s in w.nodes(c) {
        let scale = s.op() == Some(&Op::Binary(BinaryOp::Mul)) && w.ty(s.ch[0]).rank() == 0;
        if scale && w.ty(s.ch[1]).rank() == 2 && !w.is_param(s.ch[1]) {
            found.extend(w.nodes(s.ch[1]).iter().filter(|e| product(e)).map(|e| (e, Some(s))));
        }
    }
    let elements = |e: &ENode| e.ch.iter().filter_map(|&o| w.ty(o).static_elements()).sum::<u64>();
    found.sort_by_key(|(e, s)| (elements(e), s.is_some()));
    found.truncate(WAYS);
    found
        .into_iter()
        .map(|(e, s)| {
            let operands = [x.read(w, e.ch[0], late), x.read(w, e.ch[1], late)];
            let scale = s.map(|s| (s.clone(), x.read(w, s.ch[0], late)));
            (Part::Product { node: e.clone(), scale, operands }, (c, Some((e.clone(), s.is_some()))))
        })
        .collect()
}

/// The choice that is the region as it came, where the problem has it.
pub fn source_choice(w: &World, x: &Extraction, source: &[(Id, ENode)]) -> Choice {
    let n = x.ids.len();
    let mut choice = vec![NONE; 2 * n];
    for (id, e) in source {
        let k = x.at(w, *id);
        let own = x.problem.classes[k].iter().find(|&&a| matches!(&x.kinds[a], Kind::Node(m, _) if m == e));
        if choice[k] == NONE
            && let Some(&a) = own
        {
            choice[k] = a;
        }
    }
    for (k, _) in x.ids.iter().enumerate() {
        if choice[k] == NONE && x.problem.classes[k].len() == 1 {
            choice[k] = x.problem.classes[k][0];
        }
        if let Some(&keep) = x.problem.classes[k + n].first() {
            choice[k + n] = keep;
        }
    }
    choice
}

/// True for a leaf.
pub fn is_leaf(e: &ENode) -> Option<u32> {
    match e.label {
        Label::Leaf(i) => Some(i),
        Label::Op(_) => None,
    }
}
