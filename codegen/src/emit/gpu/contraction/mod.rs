//! Contraction kernels on the GPU: products of matrices with everything elementwise around them.
//!
//! Sums of products share accumulators ([`Analysis`]); what multiplies a product of a sum by a number is applied before
//! the next one joins. The rest of the body is pulled for every element of a tile from the accumulators. [`plain`] takes any
//! operands; [`tensor`] takes bf16 through the tensor cores.

mod operand;
mod plain;

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
    plain::emit(k, symbols, &a)
}

/// Writes `v` neighbouring elements of all results from the accumulators of each group.
fn epilogue(f: &mut Func, p: &mut Pull<'_>, a: &Analysis, index: &[At], sums: &[Vec<Val>]) {
    p.scope(|p| {
        let mut stores = vec![];
        let width = sums.first().map_or(0, Vec::len);
        for j in 0..width {
            let mut at = index.to_vec();
            let last = at.len() - 1;
            for ((v, offset), s) in &a.sums {
                let mut here = at.clone();
                here[last] = index[last].addc(j as i64 + *offset as i64);
                p.set(*v, &here, sums[s.group][j].clone(), &s.rest);
            }
            at[last] = index[last].addc(j as i64);
            stores.extend((0..p.k.body.roots.len()).map(|r| (r, at.clone())));
        }
        stores.sort_by_key(|s| s.0);
        p.store(f, &stores);
    });
}
