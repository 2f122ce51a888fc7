//! The e-graph: our own [`Op`] as the label, types and knowledge in the analysis, constructors for normal forms.
//!
//! A value from outside a region is a numbered leaf, so equal regions give equal e-graphs. Identities never make an
//! e-node: [`World::make`] answers them with an existing class. A term that does not type-check is no term: a rule that
//! proposes one proposes nothing.

use egg::{Analysis, DidMerge, EGraph, Id, Language};
use pleach_ir::infer::infer;
use pleach_ir::{BinaryOp, DType, Dim, Op, TensorType};
use std::collections::BTreeMap;

/// From when on a value can be known.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Known {
    /// A constant of the graph.
    Const,
    /// Depends on base parameters: known when the model is loaded.
    Base,
    /// Depends on an adapter slot: known when the slot is filled.
    Slot,
    /// Depends on trained parameters: known from one optimizer step to the next.
    Train,
    /// Depends on the run's inputs or on state.
    Run,
}

/// A value from outside the region.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Leaf {
    /// Its type.
    pub ty: TensorType,
    /// From when on it is known.
    pub known: Known,
    /// The slot it belongs to, for [`Known::Slot`].
    pub slot: u32,
    /// When it is there.
    pub at: Stage,
    /// Its bytes outlive the forward half whatever this region does.
    pub kept: bool,
}

/// When a value of a run can be there: a counter that grows along every way through an entry that leaves a region, and
/// whether it is of the backward half. All stages of the backward half come after those of the forward half.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Stage {
    /// Belongs to the backward half.
    pub late: bool,
    /// The counter.
    pub step: u32,
}

/// What an e-node is: an operator, or a leaf of the region by number.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Label {
    /// A leaf.
    Leaf(u32),
    /// An operator; never `Param` or `Input`.
    Op(Op),
}

/// An e-node.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ENode {
    /// What it is.
    pub label: Label,
    /// Operands.
    pub ch: Vec<Id>,
}

impl ENode {
    /// The operator, unless the node is a leaf.
    pub fn op(&self) -> Option<&Op> {
        match &self.label {
            Label::Op(o) => Some(o),
            Label::Leaf(_) => None,
        }
    }
}

impl Language for ENode {
    type Discriminant = (std::mem::Discriminant<Label>, Option<std::mem::Discriminant<Op>>);

    fn discriminant(&self) -> Self::Discriminant {
        (std::mem::discriminant(&self.label), self.op().map(std::mem::discriminant))
    }

    fn matches(&self, other: &Self) -> bool {
        self.label == other.label && self.ch.len() == other.ch.len()
    }

    fn children(&self) -> &[Id] {
        &self.ch
    }

    fn children_mut(&mut self) -> &mut [Id] {
        &mut self.ch
    }
}

/// What is known of a class.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Data {
    /// Type of every member.
    pub ty: TensorType,
    /// The earliest time at which some member can be computed.
    pub known: Known,
    /// Bits of the value, if it is an f32 scalar constant.
    pub cval: Option<u32>,
    /// Some member is a parameter as it lies in memory.
    pub leaf: bool,
    /// Elements of the largest base tensor that every member needs; 0 if some member needs none.
    pub base: u64,
}

/// The analysis: knows the leaves.
#[derive(Default, Clone, Debug)]
pub struct Facts {
    /// Leaves of the region by number.
    pub leaves: Vec<Leaf>,
}

impl Analysis<ENode> for Facts {
    type Data = Data;

    fn make(eg: &mut EGraph<ENode, Facts>, n: &ENode, _: Id) -> Data {
        match &n.label {
            Label::Leaf(i) => {
                let l = &eg.analysis.leaves[*i as usize];
                let base = if l.known == Known::Base { l.ty.static_elements().unwrap_or(0) } else { 0 };
                Data { ty: l.ty.clone(), known: l.known, cval: None, leaf: l.known != Known::Run, base }
            }
            Label::Op(op) => {
                let tys: Vec<&TensorType> = n.ch.iter().map(|&c| &eg[c].data.ty).collect();
                let ty = infer(&[], op, &tys).unwrap_or_else(|_| TensorType::scalar(DType::Bool));
                let known = n.ch.iter().map(|&c| eg[c].data.known).max().unwrap_or(Known::Const);
                let known = if foldable(&ty) { known } else { Known::Run };
                let cval = match op {
                    Op::Const { dtype: DType::F32, shape, bits } if shape.is_empty() => bits.first().copied(),
                    _ => None,
                };
                let base = n.ch.iter().map(|&c| eg[c].data.base).max().unwrap_or(0);
                Data { ty, known, cval, leaf: false, base }
            }
        }
    }

    fn merge(&mut self, a: &mut Data, b: Data) -> DidMerge {
        let old = a.clone();
        a.known = a.known.min(b.known);
        a.cval = a.cval.or(b.cval);
        a.leaf |= b.leaf;
        a.base = a.base.min(b.base);
        DidMerge(*a != old, *a != b)
    }
}

/// True when a value of this type has one size for the life of a session: no count of a run occurs in it.
pub fn foldable(ty: &TensorType) -> bool {
    ty.shape.iter().all(|d| matches!(d, Dim::Known(_)) || *d == Dim::Symbol(pleach_ir::Sym::P))
}

/// The e-graph type.
pub type Graph = EGraph<ENode, Facts>;

/// A class seen as a matrix, maybe transposed.
pub type View = (Id, bool);

/// A term to be built.
#[derive(Clone, Debug)]
pub enum Term {
    /// A class.
    Class(Id),
    /// An operator on terms.
    Node(Op, Vec<Term>),
    /// A product used as operand of a product: it may come out transposed, which the flags of the outer one absorb.
    Product(Box<(Term, bool)>, Box<(Term, bool)>),
}

/// Index of no rule: the node came with the region.
pub const SOURCE: usize = usize::MAX;

/// The e-graph, and what it takes to say later which rule made a node.
pub struct World {
    /// The e-graph.
    pub eg: Graph,
    /// Fold slots into base weights.
    pub merge: bool,
    /// The rule that is building now.
    pub rule: usize,
    /// Every e-node when it was first made, and by which rule.
    pub made: Vec<(ENode, usize)>,
}

impl World {
    /// An empty e-graph over these leaves.
    pub fn new(leaves: Vec<Leaf>, merge: bool) -> World {
        World { eg: Graph::new(Facts { leaves }), merge, rule: SOURCE, made: vec![] }
    }

    /// Type of a class.
    pub fn ty(&self, c: Id) -> &TensorType {
        &self.eg[c].data.ty
    }

    /// From when on a class is known.
    pub fn known(&self, c: Id) -> Known {
        self.eg[c].data.known
    }

    /// True for a class that depends on parameters and constants only.
    pub fn is_param(&self, c: Id) -> bool {
        self.known(c) < Known::Run
    }

    /// The earliest stage of every class of run-time values; parameters are there from the start.
    pub fn stages(&self) -> BTreeMap<Id, Stage> {
        let mut at: BTreeMap<Id, Stage> = BTreeMap::new();
        let mut changed = true;
        while changed {
            changed = false;
            for c in self.eg.classes() {
                let best = c.nodes.iter().filter_map(|n| self.stage_of(n, &at)).min();
                if let Some(s) = best.filter(|s| at.get(&c.id).is_none_or(|old| s < old)) {
                    at.insert(c.id, s);
                    changed = true;
                }
            }
        }
        at
    }

    /// When an e-node can be computed, if all its operands can.
    pub fn stage_of(&self, n: &ENode, at: &BTreeMap<Id, Stage>) -> Option<Stage> {
        match &n.label {
            Label::Leaf(i) => Some(self.eg.analysis.leaves[*i as usize].at),
            Label::Op(_) => n.ch.iter().try_fold(Stage::default(), |s, &c| {
                if self.is_param(c) { Some(s) } else { Some(s.max(*at.get(&self.eg.find(c))?)) }
            }),
        }
    }

    /// True if putting these together would join base weights with a slot although slots stay apart.
    pub fn mixes(&self, a: Id, b: Id) -> bool {
        let k = (self.known(a).min(self.known(b)), self.known(a).max(self.known(b)));
        let slot_has_base = |c: Id| self.known(c) == Known::Slot && self.eg[c].data.base > 0;
        !self.merge && (k == (Known::Base, Known::Slot) || slot_has_base(a) || slot_has_base(b))
    }

    /// Members of a class.
    pub fn nodes(&self, c: Id) -> &[ENode] {
        &self.eg[c].nodes
    }

    /// Adds a leaf.
    pub fn leaf(&mut self, i: u32) -> Id {
        self.add(ENode { label: Label::Leaf(i), ch: vec![] })
    }

    fn add(&mut self, n: ENode) -> Id {
        if let Some(id) = self.eg.lookup(n.clone()) {
            return id;
        }
        self.made.push((n.clone(), self.rule));
        self.eg.add(n)
    }

    /// The class of `op` on these operands, `None` if they do not fit. Trivial forms never become e-nodes.
    pub fn make(&mut self, op: Op, mut ch: Vec<Id>) -> Option<Id> {
        for c in &mut ch {
            *c = self.eg.find(*c);
        }
        if let (Op::Add, [one]) | (Op::Concat { .. }, [one]) = (&op, &ch[..]) {
            return Some(*one);
        }
        let tys: Vec<&TensorType> = ch.iter().map(|&c| self.ty(c)).collect();
        let ty = infer(&[], &op, &tys).ok()?;
        match &op {
            Op::Add => ch.sort_unstable(),
            Op::Binary(BinaryOp::Mul) => {
                ch.sort_unstable_by_key(|&c| (self.ty(c).rank() > 0, c));
                let (a, b) = (self.eg[ch[0]].data.cval, self.eg[ch[1]].data.cval);
                if a == Some(1f32.to_bits()) && *self.ty(ch[1]) == ty {
                    return Some(ch[1]);
                }
                if let (Some(a), Some(b)) = (a, b) {
                    let c = f32::from_bits(a) * f32::from_bits(b);
                    return Some(self.add(ENode { label: Label::Op(Op::f32(c)), ch: vec![] }));
                }
            }
            Op::Slice { axis, start, end } => {
                if *self.ty(ch[0]) == ty {
                    return Some(ch[0]);
                }
                if let Some(member) = self.slice_of_concat(ch[0], *axis, *start, *end) {
                    return Some(member);
                }
            }
            Op::Concat { axis } => ch = self.flat_concat(ch, *axis),
            _ => {}
        }
        Some(self.add(ENode { label: Label::Op(op), ch }))
    }

    /// The operand of a concat in `c` that is exactly this slice.
    fn slice_of_concat(&self, c: Id, axis: u8, start: u64, end: u64) -> Option<Id> {
        for n in self.nodes(c).iter().filter(|n| n.label == Label::Op(Op::Concat { axis })) {
            let mut at = 0;
            for &m in &n.ch {
                let w = self.ty(m).shape[axis as usize].known()?;
                if (at, at + w) == (start, end) {
                    return Some(self.eg.find(m));
                }
                at += w;
            }
        }
        None
    }

    /// Operands of concats among the operands in their place.
    fn flat_concat(&self, ch: Vec<Id>, axis: u8) -> Vec<Id> {
        let inner = |c: Id| self.nodes(c).iter().find(|n| n.label == Label::Op(Op::Concat { axis }));
        ch.into_iter().flat_map(|c| inner(c).map_or(vec![c], |n| n.ch.clone())).collect()
    }

    /// A product as an operand in its canonical orientation, so that A·B and Bᵀ·Aᵀ do not both live.
    fn product(&mut self, a: View, b: View) -> Option<View> {
        let plain = ENode { label: Label::Op(Op::MatMul { ta: a.1, tb: b.1 }), ch: vec![a.0, b.0] };
        let flip = ENode { label: Label::Op(Op::MatMul { ta: !b.1, tb: !a.1 }), ch: vec![b.0, a.0] };
        if let Some(id) = self.eg.lookup(plain) {
            return Some((id, false));
        }
        if let Some(id) = self.eg.lookup(flip) {
            return Some((id, true));
        }
        if a.1 && b.1 {
            Some((self.make(Op::MatMul { ta: false, tb: false }, vec![b.0, a.0])?, true))
        } else {
            Some((self.make(Op::MatMul { ta: a.1, tb: b.1 }, vec![a.0, b.0])?, false))
        }
    }

    /// The class of a term, `None` if some part does not type-check.
    pub fn build(&mut self, t: &Term) -> Option<Id> {
        let v = self.view(t)?;
        (!v.1).then_some(v.0)
    }

    fn view(&mut self, t: &Term) -> Option<View> {
        match t {
            Term::Class(id) => Some((self.eg.find(*id), false)),
            Term::Product(a, b) => {
                let (x, y) = (self.view(&a.0)?, self.view(&b.0)?);
                self.product((x.0, x.1 ^ a.1), (y.0, y.1 ^ b.1))
            }
            Term::Node(op, ch) => {
                let v: Vec<View> = ch.iter().map(|c| self.view(c)).collect::<Option<_>>()?;
                let op = match op {
                    Op::MatMul { ta, tb } => Op::MatMul { ta: ta ^ v[0].1, tb: tb ^ v[1].1 },
                    o if v.iter().all(|x| !x.1) => o.clone(),
                    _ => return None,
                };
                Some((self.make(op, v.iter().map(|x| x.0).collect())?, false))
            }
        }
    }

    /// Which rule made each e-node that is in the e-graph now.
    pub fn makers(&self) -> BTreeMap<ENode, usize> {
        let mut m = BTreeMap::new();
        for (n, rule) in &self.made {
            m.entry(n.clone().map_children(|c| self.eg.find(c))).or_insert(*rule);
        }
        m
    }
}
