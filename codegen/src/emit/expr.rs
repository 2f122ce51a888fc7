//! Scalar expressions of a kernel as a hash-consed DAG.
//!
//! An expression is what one element (or one vector of neighbouring elements) of a value is: loads at polynomial
//! addresses, constants and arithmetic. Equal expressions are one, operands have smaller numbers than their users, and
//! each knows at which loop depth it can be computed. [`super::row::text`] writes them down.

use super::index::{AtomId, ExId, Mask, Poly, Space};
use pleach_ir::{BinaryOp, DType, UnaryOp};
use std::collections::HashMap;

/// What a register holds. Bools are `i1`; 16-bit floats are widened.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) enum Kind {
    /// f32.
    Float,
    /// i32.
    Int,
    /// i1.
    Bool,
}

impl Kind {
    /// How elements of a tensor are held in registers.
    pub(crate) fn of(d: DType) -> Kind {
        match d {
            DType::F32 | DType::BF16 | DType::F16 => Kind::Float,
            DType::I32 => Kind::Int,
            DType::Bool => Kind::Bool,
        }
    }

    /// The element type of the text.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Float => "f32",
            Kind::Int => "i32",
            Kind::Bool => "i1",
        }
    }
}

/// Where a load or store goes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) enum Buf {
    /// Operand of the kernel.
    Operand(u32),
    /// Result of the kernel.
    Result(u32),
    /// Part of the worker's scratch memory.
    Scratch(u32),
    /// Constant tensor.
    Table(u32),
}

/// An expression.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Ex {
    /// Element at an address (in elements); a vector where the address differs between lanes.
    Load { buf: Buf, addr: Poly, dtype: DType, mask: Mask },
    /// Bits of an f32, i32 or bool.
    Const(Kind, u32),
    /// An index as i32.
    Index(Poly),
    /// `lo <= index < hi`.
    Inside(Poly, i64, i64),
    /// A reduction held in a register: the node, and at which index.
    Reduced(u32, Vec<Poly>),
    /// Function of one.
    Unary(UnaryOp, ExId),
    /// Function of two.
    Binary(BinaryOp, ExId, ExId),
    /// Sum.
    Add(Vec<ExId>),
    /// Condition, value where it holds, value elsewhere.
    Select(ExId, ExId, ExId),
    /// Another kind of register.
    Convert(Kind, ExId),
    /// A float rounded to a 16-bit type.
    Round(DType, ExId),
}

impl Ex {
    /// Operands.
    pub(crate) fn inputs(&self) -> Vec<ExId> {
        match self {
            Ex::Load { .. } | Ex::Const(..) | Ex::Index(_) | Ex::Inside(..) | Ex::Reduced(..) => vec![],
            Ex::Unary(_, a) | Ex::Convert(_, a) | Ex::Round(_, a) => vec![*a],
            Ex::Binary(_, a, b) => vec![*a, *b],
            Ex::Add(v) => v.clone(),
            Ex::Select(c, a, b) => vec![*c, *a, *b],
        }
    }

    /// The index it holds.
    pub(crate) fn index(&self) -> Option<&Poly> {
        match self {
            Ex::Load { addr: p, .. } | Ex::Index(p) | Ex::Inside(p, ..) => Some(p),
            _ => None,
        }
    }
}

/// An expression and what is known of it.
#[derive(Clone, Debug)]
pub(crate) struct ExInfo {
    pub(crate) ex: Ex,
    pub(crate) kind: Kind,
    /// Depth of the innermost loop that changes it.
    pub(crate) level: u8,
    /// A vector: differs between lanes.
    pub(crate) lane: bool,
    /// The node of the kernel's body that it was first made for.
    pub(crate) node: u32,
}

/// The expressions of one kernel.
#[derive(Clone, Debug, Default)]
pub(crate) struct Exprs {
    infos: Vec<ExInfo>,
    /// The node whose expressions are being made.
    pub(crate) node: u32,
    /// Nodes that an expression is a view of something for.
    views: HashMap<ExId, Vec<u32>>,
    memo: HashMap<Ex, ExId>,
}

impl Exprs {
    /// An expression by number.
    pub(crate) fn info(&self, e: ExId) -> &ExInfo {
        &self.infos[e as usize]
    }

    /// The nodes that an expression was made for: the first one, and views.
    pub(crate) fn nodes(&self, e: ExId) -> Vec<u32> {
        let views = self.views.get(&e).into_iter().flatten();
        std::iter::once(self.info(e).node).chain(views.copied()).collect()
    }

    /// Says that a node has this expression for its value.
    pub(crate) fn stands_for(&mut self, e: ExId, node: u32) {
        if !self.nodes(e).contains(&node) {
            self.views.entry(e).or_default().push(node);
        }
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.infos.len()
    }

    /// The number of an expression, new or not. `floor` is the least level: 1 for what changes with the row though its
    /// address does not, such as scratch memory.
    pub(crate) fn intern(&mut self, space: &Space, ex: Ex, kind: Kind, floor: u8) -> ExId {
        if let Some(e) = self.memo.get(&ex) {
            return *e;
        }
        let (mut level, mut lane) = (floor, false);
        let polys: &[Poly] = match &ex {
            Ex::Load { addr: p, .. } | Ex::Index(p) | Ex::Inside(p, ..) => std::slice::from_ref(p),
            Ex::Reduced(_, at) => at,
            _ => &[],
        };
        for p in polys {
            level = level.max(space.level(p));
            lane |= space.lane(p);
        }
        for i in ex.inputs() {
            level = level.max(self.info(i).level);
            lane |= self.info(i).lane;
        }
        let id = self.infos.len() as ExId;
        self.memo.insert(ex.clone(), id);
        self.infos.push(ExInfo { ex, kind, level, lane, node: self.node });
        id
    }

    /// Every expression below these roots, the roots included, operands first. Indices read from memory count.
    pub(crate) fn reach(&self, space: &Space, roots: impl IntoIterator<Item = ExId>, polys: &[&Poly]) -> Vec<ExId> {
        let mut seen = std::collections::BTreeSet::new();
        let mut stack: Vec<ExId> = roots.into_iter().collect();
        for p in polys {
            values_in(space, p, &mut stack);
        }
        while let Some(e) = stack.pop() {
            if seen.insert(e) {
                stack.extend(self.info(e).ex.inputs());
                if let Some(p) = self.info(e).ex.index() {
                    values_in(space, p, &mut stack);
                }
            }
        }
        seen.into_iter().collect()
    }
}

/// The expressions that an index reads.
fn values_in(space: &Space, p: &Poly, out: &mut Vec<ExId>) {
    use super::index::Atom;
    let atoms: Vec<AtomId> = p.0.iter().flat_map(|t| t.0.clone()).collect();
    for a in atoms {
        match &space.info(a).atom {
            Atom::Value(e) | Atom::LaneOf(e, _) => out.push(*e),
            Atom::Div(x, y) | Atom::Rem(x, y) | Atom::Min(x, y) | Atom::Max(x, y) => {
                values_in(space, x, out);
                values_in(space, y, out);
            }
            _ => {}
        }
    }
}
