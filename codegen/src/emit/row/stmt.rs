//! A planned kernel: loops, reductions and stores over the expressions of [`crate::emit::expr`].
//!
//! Accumulators are registers that loops carry. Nothing here is text yet, so that what a loop does not change can be
//! found before the loop is written.

use crate::emit::expr::{Buf, Kind};
use crate::emit::index::{AtomId, ExId, Mask, Poly};
use pleach_ir::{DType, ReduceOp};

/// A statement.
#[derive(Clone, Debug)]
pub(crate) enum Stmt {
    /// A counted loop.
    For { var: AtomId, lo: Poly, hi: Poly, step: i64, body: Vec<Stmt> },
    /// `body` where `lo < hi`.
    If { lo: Poly, hi: Poly, body: Vec<Stmt> },
    /// Defines the lanes of a dynamic mask.
    Mask { id: u32, count: Poly },
    /// Sets an accumulator, a vector, to the neutral element.
    Init { acc: u32, op: ReduceOp, kind: Kind },
    /// Combines a value into an accumulator.
    Update { acc: u32, op: ReduceOp, kind: Kind, value: ExId, mask: Mask },
    /// Combines accumulators, and their lanes where `across` holds, into the expression `into`.
    Finish { accs: Vec<u32>, op: ReduceOp, kind: Kind, across: bool, into: ExId },
    /// Writes a value. Values of neighbouring stores are computed before the first of them writes.
    Store { buf: Buf, addr: Poly, value: ExId, dtype: DType, mask: Mask, vector: bool },
    /// Writes the transposed of the matrix whose rows are `values`: lane `k` of all goes to `addr + k*stride`. With
    /// twice as many values as lanes, two neighbouring values are a row of pairs of 16-bit elements.
    Tile { values: Vec<ExId>, buf: Buf, addr: Poly, stride: i64, count: i64, dtype: DType },
    /// Writes neighbouring 16-bit elements, lane by lane: `lo`, then `hi`.
    Pair { lo: ExId, hi: ExId, buf: Buf, addr: Poly, dtype: DType, mask: Mask },
    /// Later values are not computed before this point.
    Fence,
}

impl Stmt {
    /// Expressions and indices read directly (not those of inner statements).
    pub(crate) fn reads(&self) -> (Vec<ExId>, Vec<&Poly>) {
        match self {
            Stmt::For { lo, hi, .. } | Stmt::If { lo, hi, .. } => (vec![], vec![lo, hi]),
            Stmt::Mask { count, .. } => (vec![], vec![count]),
            Stmt::Update { value, .. } => (vec![*value], vec![]),
            Stmt::Store { value, addr, .. } => (vec![*value], vec![addr]),
            Stmt::Tile { values, addr, .. } => (values.clone(), vec![addr]),
            Stmt::Pair { lo, hi, addr, .. } => (vec![*lo, *hi], vec![addr]),
            Stmt::Init { .. } | Stmt::Finish { .. } | Stmt::Fence => (vec![], vec![]),
        }
    }

    /// Inner statements.
    pub(crate) fn body(&self) -> &[Stmt] {
        match self {
            Stmt::For { body, .. } | Stmt::If { body, .. } => body,
            _ => &[],
        }
    }

    /// Visits this statement and all inner ones.
    pub(crate) fn walk<'a>(&'a self, f: &mut impl FnMut(&'a Stmt)) {
        f(self);
        for s in self.body() {
            s.walk(f);
        }
    }
}
