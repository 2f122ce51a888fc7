//! Contraction kernels on the GPU: products of matrices with everything elementwise around them.
//!
//! Sums of products share accumulators ([`Analysis`]); what multiplies a product of a sum by a number is applied before
//! the next one joins. The rest of the body is pulled for every element of a tile from the accumulators. [`tensor`] takes bf16
//! through tensor cores where operands consist of whole 16-byte pieces; [`plain`] takes anything.

mod operand;
mod plain;
mod tensor;

use super::at::At;
use super::pull::Pull;
use super::{GpuChip, Parts};
use crate::emit::contraction::analyze::Analysis;
use crate::emit::func::{Func, Val};
use crate::emit::unsupported;
use crate::error::CodegenError;
use pleach_ir::{Kernel, Sym};

/// Emits a contraction kernel.
pub(super) fn emit(k: &Kernel, symbols: &[Sym], _chip: GpuChip) -> Result<Parts, CodegenError> {
    let a = Analysis::new(k).map_err(|why| unsupported(k, why))?;
    match tensor::emit(k, symbols, &a)? {
        Some(parts) => Ok(parts),
        None => plain::emit(k, symbols, &a),
    }
}

/// Writes `v` neighbouring elements of all results from the accumulators of each group.
fn epilogue(f: &mut Func, p: &mut Pull<'_>, a: &Analysis, index: &[At], sums: &[Vec<Val>]) {
    let width = sums.first().map_or(0, Vec::len);
    let last = index.len() - 1;
    let moved = |n: i64| {
        let mut at = index.to_vec();
        at[last] = index[last].addc(n);
        at
    };
    p.scope(|p| {
        let mut stores = vec![];
        (0..width).for_each(|j| {
            for ((v, offset), s) in &a.sums {
                p.set(*v, &moved(j as i64 + *offset as i64), sums[s.group][j].clone(), &s.rest);
            }
            stores.extend((0..p.k.body.roots.len()).map(|r| (r, moved(j as i64))));
        });
        stores.sort_by_key(|s| s.0);
        p.store(f, &stores);
    });
}
