//! Contraction kernels on the GPU: products of matrices with everything elementwise around them.
//!
//! Sums of products share accumulators ([`Analysis`]); what multiplies a product of a sum by a number is applied before
//! the next one joins. The rest of the body is pulled for every element of a tile from the accumulators. [`warpgroup`] takes large
//! products of bf16 on chips with warpgroup products, [`tensor`] those of which operands consist of whole 16-byte pieces;
//! [`plain`] takes anything.

mod fragment;
mod operand;
mod passes;
mod plain;
mod split;
mod tensor;
mod vector;
mod warpgroup;

use super::at::At;
use super::pull::Pull;
use super::{GpuChip, Parts};
use crate::emit::contraction::analyze::Analysis;
use crate::emit::func::{Func, Val};
use crate::emit::{dim_expr, unsupported};
use crate::error::CodegenError;
use pleach_ir::{Kernel, Sym};
use pleach_plan::When;

/// Emits a contraction kernel.
pub(super) fn emit(k: &Kernel, symbols: &[Sym], chip: GpuChip) -> Result<Parts, CodegenError> {
    let a = Analysis::new(k).map_err(|why| unsupported(k, why))?;
    let Some((text, mut launches, scratch)) = tensors(k, symbols, &a, chip)? else {
        return plain::emit(k, symbols, &a);
    };
    // Few rows take another way through the same weights.
    let Some((more, mut few)) = vector::emit(k, symbols, &a)? else { return Ok((text, launches, scratch)) };
    let rows = dim_expr(k, a.m, symbols)?;
    let when = |above, most| Some(When { count: rows.clone(), above, most });
    few.when = when(0, Some(vector::ROWS as u64));
    launches.iter_mut().for_each(|l| l.when = when(vector::ROWS as u64, None));
    launches.insert(0, few);
    Ok((text + &more, launches, scratch))
}

/// The kernel by matrix instructions, if they have a form of it.
fn tensors(k: &Kernel, symbols: &[Sym], a: &Analysis, chip: GpuChip) -> Result<Option<Parts>, CodegenError> {
    if chip.limits().warpgroups
        && let Some(parts) = warpgroup::emit(k, symbols, a, chip)?
    {
        return Ok(Some(parts));
    }
    tensor::emit(k, symbols, a, &chip.limits())
}

/// Writes 16 rows of all results from fragments of matrix instructions.
fn write(f: &mut Func, p: &mut Pull<'_>, a: &Analysis, batch: &[At], tile: &fragment::Tile<'_>, sums: &[Vec<Val>]) {
    p.together = fragment::TOGETHER;
    fragment::each(f, tile, sums, |f, [m, n], places, sums| {
        let mut index = batch.to_vec();
        index.push(At::of(f, m, 1));
        index.push(At::of(f, n, fragment::TOGETHER));
        epilogue(f, p, a, &index, places, sums);
    });
}

/// Writes elements of all results from the accumulators of each group: those at `places` columns from the index.
fn epilogue(f: &mut Func, p: &mut Pull<'_>, a: &Analysis, index: &[At], places: &[i64], sums: &[Vec<Val>]) {
    let last = index.len() - 1;
    let moved = |n: i64| {
        let mut at = index.to_vec();
        at[last] = index[last].addc(n);
        at
    };
    p.scope(|p| {
        let mut stores = vec![];
        for (i, place) in places.iter().enumerate() {
            for ((v, offset), s) in &a.sums {
                p.set(*v, &moved(place + *offset as i64), sums[s.group][i].clone(), &s.rest);
            }
            stores.extend((0..p.k.body.roots.len()).map(|r| (r, moved(*place))));
        }
        stores.sort_by_key(|s| s.0);
        p.store(f, &stores);
        p.apart();
    });
}
