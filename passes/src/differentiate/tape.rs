//! An entry under construction, with short names for the operators that gradients are made of.

use pleach_ir::{BinaryOp, DType, Dim, Entry, IrError, Op, Param, ReduceOp, TensorType, UnaryOp, ValueId};
use std::sync::Arc;

/// Appends nodes to one entry; every node gets the origin set last.
pub(super) struct Tape<'a> {
    params: &'a [Param],
    entry: Entry,
    origin: Option<Arc<str>>,
}

impl<'a> Tape<'a> {
    pub(super) fn new(params: &'a [Param], name: &str) -> Tape<'a> {
        Tape { params, entry: Entry::new(name), origin: None }
    }

    pub(super) fn finish(self) -> Entry {
        self.entry
    }

    /// Nodes pushed from here on have this origin.
    pub(super) fn at(&mut self, origin: Option<Arc<str>>) -> &mut Tape<'a> {
        self.origin = origin;
        self
    }

    /// What `make` pushes has this origin; afterwards it is as before.
    pub(super) fn within<T>(&mut self, origin: Option<Arc<str>>, make: impl FnOnce(&mut Tape<'a>) -> T) -> T {
        let before = std::mem::replace(&mut self.origin, origin);
        let out = make(self);
        self.origin = before;
        out
    }

    pub(super) fn push(&mut self, op: Op, x: &[ValueId]) -> Result<ValueId, IrError> {
        self.entry.push_from(self.params, op, x, self.origin.clone())
    }

    pub(super) fn ty(&self, v: ValueId) -> &TensorType {
        self.entry.ty(v)
    }

    /// A scalar f32 constant.
    pub(super) fn number(&mut self, x: f32) -> Result<ValueId, IrError> {
        self.push(Op::f32(x), &[])
    }

    /// A scalar f32 input.
    pub(super) fn input(&mut self, name: &str) -> Result<ValueId, IrError> {
        self.push(Op::Input { name: name.into(), dtype: DType::F32, shape: vec![] }, &[])
    }

    /// f32 zeros.
    pub(super) fn zeros(&mut self, shape: &[Dim]) -> Result<ValueId, IrError> {
        let zero = self.number(0.0)?;
        if shape.is_empty() {
            Ok(zero)
        } else {
            self.push(Op::Broadcast { shape: shape.to_vec(), axes: vec![] }, &[zero])
        }
    }

    pub(super) fn unary(&mut self, op: UnaryOp, x: ValueId) -> Result<ValueId, IrError> {
        self.push(Op::Unary(op), &[x])
    }

    pub(super) fn binary(&mut self, op: BinaryOp, a: ValueId, b: ValueId) -> Result<ValueId, IrError> {
        self.push(Op::Binary(op), &[a, b])
    }

    pub(super) fn mul(&mut self, a: ValueId, b: ValueId) -> Result<ValueId, IrError> {
        self.binary(BinaryOp::Mul, a, b)
    }

    pub(super) fn div(&mut self, a: ValueId, b: ValueId) -> Result<ValueId, IrError> {
        self.binary(BinaryOp::Div, a, b)
    }

    pub(super) fn sub(&mut self, a: ValueId, b: ValueId) -> Result<ValueId, IrError> {
        self.binary(BinaryOp::Sub, a, b)
    }

    pub(super) fn add(&mut self, a: ValueId, b: ValueId) -> Result<ValueId, IrError> {
        self.push(Op::Add, &[a, b])
    }

    pub(super) fn neg(&mut self, x: ValueId) -> Result<ValueId, IrError> {
        self.unary(UnaryOp::Neg, x)
    }

    /// x · c.
    pub(super) fn scale(&mut self, x: ValueId, c: f32) -> Result<ValueId, IrError> {
        let c = self.number(c)?;
        self.mul(x, c)
    }

    pub(super) fn select(&mut self, c: ValueId, a: ValueId, b: ValueId) -> Result<ValueId, IrError> {
        self.push(Op::Select, &[c, a, b])
    }

    /// x in this type; x itself where it has it.
    pub(super) fn cast(&mut self, x: ValueId, dtype: DType) -> Result<ValueId, IrError> {
        if self.ty(x).dtype == dtype { Ok(x) } else { self.push(Op::Cast(dtype), &[x]) }
    }

    pub(super) fn reduce_sum(&mut self, x: ValueId, axis: usize) -> Result<ValueId, IrError> {
        self.push(Op::Reduce { op: ReduceOp::Sum, axis: axis as u8 }, &[x])
    }

    /// Sums over every axis that `keep` does not list, the last one first.
    pub(super) fn sum_to(&mut self, mut x: ValueId, keep: &[u8]) -> Result<ValueId, IrError> {
        for axis in (0..self.ty(x).rank()).rev().filter(|a| !keep.contains(&(*a as u8))) {
            x = self.reduce_sum(x, axis)?;
        }
        Ok(x)
    }
}
