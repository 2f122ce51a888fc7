//! Values by demand: what element of a node is, as an expression over loads.
//!
//! `pull(node, index)` follows the body from a value down to operands, constants and reductions that earlier passes
//! left behind. Movement only changes the index. Where a concatenation or padding cannot be decided from the ranges of
//! the loop counters, the place to split a loop is noted, and meanwhile the element is chosen when the kernel runs, from
//! addresses that are always in bounds.

use super::model::{Mode, Model, product};
use crate::emit::expr::{Buf, Ex, Exprs, Kind};
use crate::emit::index::{Atom, AtomId, ExId, Info, Mask, Poly, Space};
use pleach_ir::{DType, Layout, Op, UnaryOp};
use std::collections::{BTreeMap, HashMap};

/// More expressions than this are no longer one kernel.
const MAX_EXPRESSIONS: usize = 60_000;

/// Where a value stays for later passes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Saved {
    /// Where: scratch memory or a result.
    pub(crate) buf: Buf,
    /// Passes after this level read it there.
    pub(crate) level: u32,
}

/// State while expressions are built.
pub(crate) struct Build {
    pub(crate) model: Model,
    pub(crate) space: Space,
    pub(crate) exprs: Exprs,
    pub(crate) mode: Mode,
    /// Indices that mean the row at hand.
    pub(crate) own: Vec<Poly>,
    /// Level of the pass at hand.
    pub(crate) level: u32,
    /// Lanes in use.
    pub(crate) mask: Mask,
    /// Reductions kept in registers (others lie in scratch memory).
    pub(crate) registers: BTreeMap<usize, bool>,
    /// Scratch slot of a reduction.
    pub(crate) slot_of: BTreeMap<usize, u32>,
    pub(crate) saved: BTreeMap<usize, Saved>,
    /// Operands that a result overwrites.
    pub(crate) overwritten: Vec<bool>,
    /// Constant tensors: node, storage.
    pub(crate) tables: Vec<usize>,
    /// Counters to split, and where.
    pub(crate) straddles: Vec<(AtomId, i64)>,
    memo: HashMap<(usize, Vec<Poly>, u32), ExId>,
}

impl Build {
    /// A builder that has seen nothing yet.
    pub(crate) fn new(model: Model, space: Space, mode: Mode, overwritten: Vec<bool>) -> Build {
        Build {
            model,
            space,
            exprs: Exprs::default(),
            mode,
            own: vec![],
            level: 0,
            mask: Mask::Full,
            registers: BTreeMap::new(),
            slot_of: BTreeMap::new(),
            saved: BTreeMap::new(),
            overwritten,
            tables: vec![],
            straddles: vec![],
            memo: HashMap::new(),
        }
    }

    /// Forgets values: after a change of what is saved where.
    pub(crate) fn forget(&mut self) {
        self.memo.clear();
    }

    pub(crate) fn make(&mut self, ex: Ex, kind: Kind) -> ExId {
        self.exprs.intern(&self.space, ex, kind, 0)
    }

    /// Row-major position of an index.
    pub(crate) fn linear(&mut self, shape: &[Poly], index: &[Poly]) -> Poly {
        let mut p = Poly::default();
        for (d, i) in shape.iter().zip(index) {
            p = p.mul(d).add(i);
        }
        self.space.recombine(&p)
    }

    /// True when an index is at the row at hand.
    fn is_own(&self, index: &[Poly]) -> bool {
        match self.mode {
            Mode::One => true,
            Mode::Rows | Mode::Flat => index.first().is_some_and(|i| self.own.contains(i)),
            Mode::Panels { .. } => false,
        }
    }

    /// A packed result is `[N, K]`.
    pub(crate) fn panels_transposed(&self) -> bool {
        matches!(self.mode, Mode::Panels { transposed: true, .. })
    }

    /// The part of an index or shape that lies within a row.
    pub(crate) fn within<'a>(&self, x: &'a [Poly]) -> &'a [Poly] {
        if self.mode == Mode::Rows && !x.is_empty() { &x[1..] } else { x }
    }

    /// Element `index` of node `n`.
    pub(crate) fn pull(&mut self, n: usize, index: &[Poly]) -> Result<ExId, String> {
        let key = (n, index.to_vec(), self.level);
        if let Some(e) = self.memo.get(&key) {
            return Ok(*e);
        }
        if self.exprs.len() > MAX_EXPRESSIONS {
            return Err("the body is too large for one kernel".into());
        }
        let e = match self.saved.get(&n).copied() {
            Some(s) if self.level > s.level && self.is_own(index) => self.reload(n, s.buf, index),
            _ => {
                let user = std::mem::replace(&mut self.exprs.node, n as u32);
                let e = self.compute(n, index);
                self.exprs.node = user;
                let e = e?;
                self.exprs.stands_for(e, n as u32);
                e
            }
        };
        self.memo.insert(key, e);
        Ok(e)
    }

    fn reload(&mut self, n: usize, buf: Buf, index: &[Poly]) -> ExId {
        let node = &self.model.nodes[n];
        let (shape, dtype) = (node.shape.clone(), node.dtype);
        let addr = match buf {
            Buf::Scratch(_) => {
                let (shape, index) = (self.within(&shape).to_vec(), self.within(index).to_vec());
                self.linear(&shape, &index)
            }
            _ => self.linear(&shape, index),
        };
        // Scratch memory holds 16-bit floats widened and bools as bytes.
        let dtype = if matches!(buf, Buf::Scratch(_)) { scratch_type(dtype) } else { dtype };
        self.load(buf, addr, dtype)
    }

    /// A load; what the kernel itself writes changes with the row.
    pub(crate) fn load(&mut self, buf: Buf, addr: Poly, dtype: DType) -> ExId {
        let mask = if self.space.lane(&addr) { self.mask } else { Mask::Full };
        let floor = u8::from(matches!(buf, Buf::Scratch(_) | Buf::Result(_)));
        self.exprs.intern(&self.space, Ex::Load { buf, addr, dtype, mask }, Kind::of(dtype), floor)
    }

    /// An integer expression as an index into an axis of `len`; indices out of range read the nearest element.
    pub(super) fn value_index(&mut self, e: ExId, len: &Poly) -> Poly {
        let i = self.exprs.info(e);
        let info = Info {
            atom: Atom::Value(e),
            lo: i64::from(i32::MIN),
            hi: Some(i64::from(i32::MAX)),
            align: 1,
            level: i.level,
            lane: i.lane,
            bound: None,
            split: false,
        };
        let p = Poly::from(self.space.intern(info));
        let p = self.space.max(&p, &Poly::default());
        let last = len.plus(-1);
        self.space.min(&p, &last)
    }

    fn compute(&mut self, n: usize, index: &[Poly]) -> Result<ExId, String> {
        let node = self.model.nodes[n].clone();
        let kind = Kind::of(node.dtype);
        let x = &node.inputs;
        let e = match &node.op {
            Op::Input { .. } => self.operand(n, index)?,
            Op::Const { bits, .. } => self.constant(n, node.dtype, bits, &node.shape, index),
            Op::Iota { axis, .. } => {
                let p = index[*axis as usize].clone();
                self.make(Ex::Index(p), Kind::Int)
            }
            Op::Unary(u) => {
                let a = self.element(x[0], index)?;
                self.make(Ex::Unary(*u, a), kind)
            }
            Op::Binary(b) => {
                let (a, c) = (self.element(x[0], index)?, self.element(x[1], index)?);
                self.make(Ex::Binary(*b, a, c), kind)
            }
            Op::Add => {
                let v = x.iter().map(|i| self.element(*i, index)).collect::<Result<Vec<_>, _>>()?;
                self.make(Ex::Add(v), kind)
            }
            Op::Select => {
                let c = self.element(x[0], index)?;
                let (a, b) = (self.element(x[1], index)?, self.element(x[2], index)?);
                self.make(Ex::Select(c, a, b), kind)
            }
            Op::Cast(d) => {
                let a = self.element(x[0], index)?;
                self.cast(a, self.model.nodes[x[0]].dtype, *d)
            }
            Op::StopGradient | Op::After => return self.pull(x[0], index),
            Op::Reduce { .. } => return self.reduced(n, index),
            _ => return self.moved(n, &node.op, x, index),
        };
        let arithmetic = matches!(node.op, Op::Unary(_) | Op::Binary(_) | Op::Add);
        if arithmetic && matches!(node.dtype, DType::BF16 | DType::F16) {
            return Ok(self.make(Ex::Round(node.dtype, e), Kind::Float));
        }
        Ok(e)
    }

    /// An elementwise operand: rank 0 stands for its value everywhere.
    fn element(&mut self, n: usize, index: &[Poly]) -> Result<ExId, String> {
        if self.model.nodes[n].shape.is_empty() { self.pull(n, &[]) } else { self.pull(n, index) }
    }

    fn cast(&mut self, a: ExId, from: DType, to: DType) -> ExId {
        let (k, t) = (Kind::of(from), Kind::of(to));
        let v = if k == t { a } else { self.make(Ex::Convert(t, a), t) };
        let narrow = matches!(to, DType::BF16 | DType::F16) && from != to && from != DType::Bool;
        if narrow { self.make(Ex::Round(to, v), Kind::Float) } else { v }
    }

    fn operand(&mut self, n: usize, index: &[Poly]) -> Result<ExId, String> {
        let Some(o) = self.model.operand[n] else { return Err("an input that is no operand".into()) };
        let (shape, dtype) = (self.model.nodes[n].shape.clone(), self.model.nodes[n].dtype);
        if self.overwritten[o as usize] {
            let near = self.mode == Mode::One || (shape.first() == Some(&self.model.rows) && self.is_own(index));
            if !near {
                return Err("an operand that is overwritten is read at another row".into());
            }
        }
        let addr = match self.model.layouts[o as usize] {
            Layout::RowMajor => self.linear(&shape, index),
            Layout::Panels { nr, transposed } => {
                let (k, c) = if transposed { (1, 0) } else { (0, 1) };
                let nr = Poly::from(i64::from(nr));
                let (p, r) = self.space.divide(&index[c], &nr);
                if dtype.size() == 2 {
                    // Pairs along k.
                    let two = Poly::from(2);
                    let (pairs, _) = self.space.divide(&shape[k].plus(1), &two);
                    let (pair, half) = self.space.divide(&index[k], &two);
                    p.mul(&pairs).add(&pair).mul(&nr).add(&r).scale(2).add(&half)
                } else {
                    p.mul(&shape[k]).add(&index[k]).mul(&nr).add(&r)
                }
            }
            Layout::Blocks(_) | Layout::CodedPanels { .. } => return Err("a row kernel reads no codes".into()),
        };
        Ok(self.load(Buf::Operand(o), addr, dtype))
    }

    fn constant(&mut self, n: usize, dtype: DType, bits: &[u32], shape: &[Poly], index: &[Poly]) -> ExId {
        let first = bits.first().copied().unwrap_or(0);
        if bits.iter().all(|b| *b == first) {
            return self.make(Ex::Const(Kind::of(dtype), register_bits(dtype, first)), Kind::of(dtype));
        }
        let t = match self.tables.iter().position(|x| *x == n) {
            Some(t) => t,
            None => {
                self.tables.push(n);
                self.tables.len() - 1
            }
        };
        let addr = self.linear(shape, index);
        self.load(Buf::Table(t as u32), addr, dtype)
    }

    fn reduced(&mut self, n: usize, index: &[Poly]) -> Result<ExId, String> {
        if !self.is_own(index) {
            return Err("a reduction is read at another row than the one it was computed for".into());
        }
        let dtype = self.model.nodes[n].dtype;
        let kind = Kind::of(dtype);
        if self.registers.get(&n).copied().unwrap_or(false) {
            let at = if self.mode == Mode::Flat { index.to_vec() } else { vec![] };
            return Ok(self.exprs.intern(&self.space, Ex::Reduced(n as u32, at), kind, 1));
        }
        let Some(slot) = self.slot_of.get(&n).copied() else {
            return Err("a reduction is read before it is computed".into());
        };
        let shape = self.within(&self.model.nodes[n].shape).to_vec();
        let index = self.within(index).to_vec();
        let addr = self.linear(&shape, &index);
        Ok(self.load(Buf::Scratch(slot), addr, dtype))
    }

    /// Elements of a row-local tensor of this node.
    pub(crate) fn row_elements(&self, n: usize) -> Poly {
        product(self.within(&self.model.nodes[n].shape))
    }

    /// True for functions worth keeping rather than computing again.
    pub(crate) fn is_heavy(&self, n: usize) -> bool {
        use UnaryOp::{Cos, Erf, Exp, Log, Sigmoid, Sin, Tanh};
        matches!(self.model.nodes[n].op, Op::Unary(Exp | Log | Sigmoid | Tanh | Erf | Sin | Cos))
    }
}

/// How scratch memory stores a type: as registers hold it.
pub(crate) fn scratch_type(d: DType) -> DType {
    match d {
        DType::BF16 | DType::F16 => DType::F32,
        d => d,
    }
}

/// Bits of a constant as a register holds it.
pub(crate) fn register_bits(dtype: DType, bits: u32) -> u32 {
    match dtype {
        DType::F32 | DType::I32 => bits,
        DType::BF16 => bits << 16,
        DType::F16 => pleach_ir::interp::f16_to_f32(bits as u16).to_bits(),
        DType::Bool => u32::from(bits != 0),
    }
}
