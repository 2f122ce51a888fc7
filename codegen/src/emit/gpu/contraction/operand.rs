//! Operands of products as addresses: a base, and strides of rows, columns and batches.

use crate::emit::contraction::analyze::{Product, Right};
use crate::emit::contraction::view::{Stride, View};
use crate::emit::elementwise::memory_elem;
use crate::emit::func::{Func, Val};
use crate::emit::gpu::blocks;
use crate::emit::gpu::pull::Pull;
use pleach_ir::{DType, Dim};

/// A matrix in global memory.
pub(super) struct Matrix {
    pub(super) base: Val,
    /// Elements from one row (of the result) to the next, and along the sum.
    pub(super) line: Val,
    pub(super) step: Val,
    pub(super) dtype: DType,
}

/// A right operand in blocks of codes.
#[derive(Clone)]
pub(super) struct Codes {
    pub(super) blocks: blocks::Matrix,
    /// Blocks lie along the sum; else across it.
    pub(super) along: bool,
    /// Its first column.
    pub(super) first: i64,
    /// Types of the matrix and of the product, that values are rounded to in turn.
    pub(super) dtypes: [DType; 2],
}

impl Codes {
    /// The right operand of a product from a column on, if it is in blocks.
    pub(super) fn of(f: &Func, x: &Product, column: u64) -> Option<Codes> {
        let Right::Blocks(b) = &x.right else { return None };
        let width = if b.along { x.k.known()? } else { x.n.known()? };
        let blocks = blocks::Matrix::new(f, b.arg, b.format, width);
        Some(Codes { blocks, along: b.along, first: column as i64, dtypes: [b.dtype, x.dtype] })
    }
}

/// Where tiles of an operand come from.
pub(super) enum Operand {
    Numbers(Matrix),
    Codes(Codes),
}

/// The left (`side` 0) or right (1) operand of a product in a batch, from a column on.
pub(super) fn operand(f: &mut Func, p: &mut Pull<'_>, x: &Product, side: usize, batch: &[Val], column: u64) -> Operand {
    match Codes::of(f, x, column).filter(|_| side == 1) {
        Some(codes) => Operand::Codes(codes),
        None => Operand::Numbers(matrix(f, p, x, side, batch, column)),
    }
}

fn stride(f: &mut Func, p: &mut Pull<'_>, s: &Stride) -> Val {
    let mut x = f.i64(s.factor as i64);
    for sym in &s.syms {
        let d = p.dim(f, Dim::Symbol(*sym));
        x = f.mul(&x, &d);
    }
    x
}

/// The left (`side` 0) or right (1) operand of a product in a batch.
pub(super) fn matrix(f: &mut Func, p: &mut Pull<'_>, x: &Product, side: usize, batch: &[Val], column: u64) -> Matrix {
    let view = match (side, &x.right) {
        (0, _) => &x.left,
        (_, Right::Rows(v) | Right::Strided(v)) => v,
        (_, Right::Panels { .. } | Right::Coded { .. } | Right::Blocks(_)) => &x.left,
    };
    let (line, step) = axes(view, side);
    let mut at = f.i64(0);
    for (n, s) in &view.offset {
        let s = stride(f, p, s);
        let s = f.mulc(&s, *n as i64);
        at = f.add(&at, &s);
    }
    for (i, s) in batch.iter().zip(&view.strides) {
        let s = stride(f, p, s);
        let s = f.mul(i, &s);
        at = f.add(&at, &s);
    }
    let (line, step) = (stride(f, p, line), stride(f, p, step));
    if side == 1 && column > 0 {
        let s = f.mulc(&line, column as i64);
        at = f.add(&at, &s);
    }
    let base = f.arg(&format!("p{}", view.arg));
    let base = f.gep(&base, &at, memory_elem(x.dtype));
    Matrix { base, line, step, dtype: x.dtype }
}

/// Strides of a view along the result and along the sum: left views are `(…, m, k)`, right ones `(…, k, n)`.
pub(super) fn axes(view: &View, side: usize) -> (&Stride, &Stride) {
    let n = view.strides.len();
    let (a, b) = (&view.strides[n - 2], &view.strides[n - 1]);
    if side == 0 { (a, b) } else { (b, a) }
}
