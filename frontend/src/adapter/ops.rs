//! Shorthands for the operators that methods write. Shapes are static but for the tokens T.

use pleach_ir::{BinaryOp, DType, Dim, Op, ValueId};

use super::method::Scope;
use crate::error::Result;

impl Scope<'_, '_> {
    /// a · b, with either transposed in its last two axes.
    pub(super) fn matmul(&mut self, a: ValueId, ta: bool, b: ValueId, tb: bool) -> Result<ValueId> {
        self.push(Op::MatMul { ta, tb }, &[a, b])
    }

    /// x · Bᵀ.
    pub(super) fn times(&mut self, x: ValueId, b: ValueId) -> Result<ValueId> {
        self.matmul(x, false, b, true)
    }

    /// The same elements in another shape.
    pub(super) fn reshape(&mut self, x: ValueId, shape: &[u64]) -> Result<ValueId> {
        self.push(Op::Reshape(shape.iter().map(|d| Dim::Known(*d)).collect()), &[x])
    }

    /// x [n, …] as [n, rest…], where n may be the number of tokens.
    pub(super) fn rows_as(&mut self, x: ValueId, rest: &[u64]) -> Result<ValueId> {
        let first = self.shape(x).first().copied().unwrap_or(Dim::Known(1));
        self.push(Op::Reshape(std::iter::once(first).chain(rest.iter().map(|d| Dim::Known(*d))).collect()), &[x])
    }

    /// Axes in another order.
    pub(super) fn transpose(&mut self, x: ValueId, axes: &[u8]) -> Result<ValueId> {
        self.push(Op::Transpose(axes.to_vec()), &[x])
    }

    /// The first `end` elements of an axis.
    pub(super) fn head(&mut self, x: ValueId, axis: u8, end: u64) -> Result<ValueId> {
        if self.shape(x)[usize::from(axis)] == Dim::Known(end) {
            return Ok(x);
        }
        self.push(Op::Slice { axis, start: 0, end }, &[x])
    }

    /// Zeros behind an axis, up to `end` elements.
    pub(super) fn pad_to(&mut self, x: ValueId, axis: u8, end: u64) -> Result<ValueId> {
        let have = self.shape(x)[usize::from(axis)].known().unwrap_or(end);
        if have == end { Ok(x) } else { self.push(Op::Pad { axis, lo: 0, hi: end - have }, &[x]) }
    }

    /// x along `axes` of a larger shape, repeated along the others.
    pub(super) fn spread(&mut self, x: ValueId, shape: &[u64], axes: &[u8]) -> Result<ValueId> {
        let shape = shape.iter().map(|d| Dim::Known(*d)).collect();
        self.push(Op::Broadcast { shape, axes: axes.to_vec() }, &[x])
    }

    /// The identity [n, n].
    pub(super) fn identity(&mut self, n: u64) -> Result<ValueId> {
        let shape = vec![Dim::Known(n), Dim::Known(n)];
        let row = self.push(Op::Iota { shape: shape.clone(), axis: 0 }, &[])?;
        let column = self.push(Op::Iota { shape, axis: 1 }, &[])?;
        let same = self.push(Op::Binary(BinaryOp::Eq), &[row, column])?;
        self.push(Op::Cast(DType::F32), &[same])
    }
}
