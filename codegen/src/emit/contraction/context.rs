//! What all parts of a kernel under construction share: pointers, counts and scalars loaded at its head.

use super::analyze::Analysis;
use super::blocking::{Blocking, LANES};
use super::view::{Stride, View};
use crate::emit::elementwise::{load, memory_elem, splat};
use crate::emit::func::{Func, Val};
use pleach_ir::{DType, Dim, Kernel, Op, Sym, ValueId};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

/// Values defined at the head of the function.
pub(super) struct Context<'a> {
    pub(super) kernel: &'a Kernel,
    pub(super) an: &'a Analysis,
    pub(super) bl: &'a Blocking,
    /// Operands, then results.
    pub(super) buffers: Vec<Val>,
    pub(super) scratch: Val,
    /// The target multiplies pairs of bf16 ([`HostTarget::bf16`]).
    ///
    /// [`HostTarget::bf16`]: crate::HostTarget::bf16
    pub(super) dot: bool,
    /// Rank-0 operands, in every lane.
    pub(super) scalars: BTreeMap<ValueId, Val>,
    counts: BTreeMap<Sym, Val>,
}

/// Where a tile lies.
#[derive(Clone)]
pub(super) struct Place {
    pub(super) batch: Vec<Val>,
    pub(super) row: Val,
    /// First row of the task.
    pub(super) row0: Val,
    /// First column.
    pub(super) column: Val,
    /// Number of the tile in the block of columns that is at work.
    pub(super) slot: Val,
}

impl<'a> Context<'a> {
    pub(super) fn new(
        f: &mut Func,
        kernel: &'a Kernel,
        an: &'a Analysis,
        bl: &'a Blocking,
        symbols: &[Sym],
    ) -> Result<Context<'a>, String> {
        let body = &kernel.body;
        f.is_for(kernel, &[]);
        let buffers = (0..kernel.operands.len() + kernel.results.len()).map(|i| f.buffer(i)).collect::<Vec<_>>();
        let mut counts = BTreeMap::new();
        for s in body.nodes.iter().flat_map(|n| n.ty.symbols()) {
            if let Entry::Vacant(slot) = counts.entry(s) {
                let i = symbols.iter().position(|x| *x == s).ok_or(format!("symbol {s} is not one of the plan's"))?;
                slot.insert(f.dim(i));
            }
        }
        let mut scalars = BTreeMap::new();
        for v in body.values() {
            let n = body.node(v);
            if let (Op::Input { .. }, 0, Some(arg)) = (&n.op, n.ty.rank(), an.args[v.index()]) {
                f.of(&[v], |f| {
                    let x = load(f, n.ty.dtype, &buffers[arg], None, 1);
                    scalars.insert(v, splat(f, n.ty.dtype, &x, LANES));
                });
            }
        }
        Ok(Context { kernel, an, bl, buffers, scratch: f.arg("scratch"), dot: f.round_bf16, scalars, counts })
    }

    pub(super) fn dim(&self, f: &mut Func, d: Dim) -> Val {
        match d {
            Dim::Known(n) => f.i64(n as i64),
            Dim::Symbol(s) => self.counts[&s].clone(),
        }
    }

    pub(super) fn stride(&self, f: &mut Func, s: &Stride) -> Val {
        let mut v = f.i64(s.factor as i64);
        for x in &s.syms {
            let c = self.counts[x].clone();
            v = f.mul(&v, &c);
        }
        v
    }

    /// Σ batch index · stride.
    pub(super) fn offset(&self, f: &mut Func, strides: &[Stride], batch: &[Val]) -> Val {
        let mut sum = f.i64(0);
        for (b, s) in batch.iter().zip(strides) {
            let s = self.stride(f, s);
            let t = f.mul(b, &s);
            sum = f.add(&sum, &t);
        }
        sum
    }

    /// Address of element `(batch, 0, 0)` of a view of elements of a type.
    pub(super) fn base(&self, f: &mut Func, v: &View, d: DType, batch: &[Val]) -> Val {
        let mut sum = self.offset(f, &v.strides, batch);
        for (n, s) in &v.offset {
            let s = self.stride(f, s);
            let t = f.mulc(&s, *n as i64);
            sum = f.add(&sum, &t);
        }
        f.gep(&self.buffers[v.arg], &sum, memory_elem(d))
    }
}
