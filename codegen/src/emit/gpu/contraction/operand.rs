//! Operands of products as addresses: a base, and strides of rows, columns and batches.

use crate::emit::contraction::analyze::{Product, Right};
use crate::emit::contraction::view::{Stride, View};
use crate::emit::elementwise::memory_elem;
use crate::emit::func::{Func, Val};
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
