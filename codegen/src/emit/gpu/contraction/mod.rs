//! Contraction kernels on the GPU: products of matrices with everything elementwise around them.
//!
//! Sums of products share accumulators ([`Analysis`]); what multiplies a product of a sum by a number is applied before
//! the next one joins. The rest of the body is pulled for every element of a tile from the accumulators. Rows or columns of an operand that
//! indices pick are read where they lie ([`operand::Picked`]). [`warpgroup`] takes large
//! products of bf16 on chips with warpgroup products, [`tensor`] those of which operands consist of whole 16-byte pieces;
//! [`plain`] takes anything.

mod fragment;
mod library;
mod operand;
mod over;
mod passes;
mod plain;
mod split;
mod tensor;
mod vector;
mod warpgroup;

use super::at::At;
use super::pull::Pull;
use super::{Form, GpuChip, Parts, Units};
use crate::emit::contraction::analyze::Analysis;
use crate::emit::func::{Func, Val};
use crate::emit::{dim_expr, unsupported};
use crate::error::CodegenError;
use pleach_ir::{Kernel, Op, Sym, ValueId};
use pleach_plan::{ByLibrary, Expr, Launch, When};

/// Emits a contraction kernel, in this form if one is wished.
pub(super) fn emit(k: &Kernel, symbols: &[Sym], chip: GpuChip, wish: Option<&Form>) -> Result<Parts, CodegenError> {
    let a = Analysis::with_picks(k).map_err(|why| unsupported(k, why))?;
    let Some((text, mut launches, scratch)) = tensors(k, symbols, &a, chip, wish)? else {
        return match wish {
            None => plain::emit(k, symbols, &a),
            Some(f) => Err(unsupported(k, format!("it has no form {f}"))),
        };
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

/// The kernel by a library of the machine beside its own launches: more text, and scratch memory that it needs.
pub(super) fn by_library(
    k: &Kernel,
    symbols: &[Sym],
    own: &[Launch],
) -> Result<Option<(String, ByLibrary, Expr)>, CodegenError> {
    let a = Analysis::with_picks(k).map_err(|why| unsupported(k, why))?;
    library::emit(k, symbols, &a, own)
}

/// Forms by warpgroups, and by warps where those are the choice, that are offered at most.
const OFFERED: [usize; 2] = [4, 2];

/// The forms of a contraction by matrix instructions, the best guess first; then a library's.
pub(super) fn forms(k: &Kernel, symbols: &[Sym], chip: GpuChip) -> Result<Vec<Form>, CodegenError> {
    let a = Analysis::with_picks(k).map_err(|why| unsupported(k, why))?;
    let limits = chip.limits();
    let mut out = if limits.warpgroups { warpgroup::forms(k, symbols, &a, &limits)? } else { vec![] };
    out.truncate(OFFERED[0]);
    let rest = tensor::forms(&a, &limits);
    let most = if out.is_empty() { rest.len() } else { OFFERED[1] };
    out.extend(rest.into_iter().take(most));
    if !out.is_empty() && library::supported(k, &a) {
        out.push(Form::LIBRARY);
    }
    Ok(out)
}

/// The kernel by matrix instructions, if they have a form of it.
fn tensors(
    k: &Kernel,
    symbols: &[Sym],
    a: &Analysis,
    chip: GpuChip,
    wish: Option<&Form>,
) -> Result<Option<Parts>, CodegenError> {
    let warps = wish.is_some_and(|f| f.units == Units::Warp);
    if chip.limits().warpgroups
        && !warps
        && let Some(parts) = warpgroup::emit(k, symbols, a, chip, wish)?
    {
        return Ok(Some(parts));
    }
    if wish.is_some() && !warps {
        return Ok(None);
    }
    tensor::emit(k, symbols, a, &chip.limits(), wish)
}

/// An attribute of a loop whose turns neither LLVM nor the assembler writes out.
const ROLLED: &str = " {loop_annotation = #llvm.loop_annotation<unroll = <disable = true>>}";

/// Registers that addresses of tiles, places in them and loops take, roughly.
const OTHERS: i64 = 24;

/// Columns of a batch of the epilogue, as many as there are registers for: of those of a thread, `sums` are accumulators, every buffer
/// has an address, and an element takes what is read for it and one of each group of accumulators.
fn batch(k: &Kernel, a: &Analysis, registers: i64, sums: i64) -> i64 {
    let body = &k.body;
    let mut seen = vec![false; body.nodes.len()];
    let mut stack: Vec<ValueId> = body.roots.iter().map(|r| r.value).collect();
    let mut bytes = 0;
    while let Some(v) = stack.pop() {
        let n = body.node(v);
        if std::mem::replace(&mut seen[v.index()], true) || matches!(n.op, Op::MatMul { .. }) {
            continue;
        }
        let by_column = n.ty.rank() >= 2 || n.ty.shape.first() == Some(&a.n);
        if matches!(n.op, Op::Input { .. }) && by_column {
            bytes += n.ty.dtype.size() as i64;
        }
        stack.extend(&n.inputs);
    }
    let left = registers - sums - 2 * (k.operands.len() + k.results.len()) as i64 - OTHERS;
    // A thread has a quarter of the columns of a batch.
    let columns = 4 * left * 4 / (bytes + 4 * a.groups.len() as i64);
    let all = fragment::BATCHES;
    all.into_iter().find(|w| *w <= columns).unwrap_or(all[all.len() - 1])
}

/// Writes 16 rows of all results from fragments of matrix instructions.
fn write(f: &mut Func, p: &mut Pull<'_>, a: &Analysis, batch: &[At], tile: &fragment::Tile<'_>, sums: &[Vec<Val>]) {
    p.together = fragment::TOGETHER;
    fragment::each(f, tile, sums, |f, [m, n], places, sums| {
        let mut index = batch.to_vec();
        index.push(At::of(f, m, 1));
        index.push(At::of(f, n, fragment::TOGETHER));
        existing(f, p, a, &index, places, sums);
    });
}

/// [`epilogue`] of those columns that the results have: they may end within four neighbours.
fn existing(f: &mut Func, p: &mut Pull<'_>, a: &Analysis, index: &[At], places: &[i64], sums: &[Vec<Val>]) {
    if a.n.known().is_none_or(|n| n.is_multiple_of(fragment::TOGETHER as u64)) {
        return epilogue(f, p, a, index, places, sums);
    }
    let (end, first) = (p.dim(f, a.n), index[index.len() - 1].val(f));
    p.together = 1;
    for (i, place) in places.iter().enumerate() {
        let at = f.addc(&first, *place);
        let ok = f.cmp("slt", &at, &end);
        let own: Vec<Vec<Val>> = sums.iter().map(|s| vec![s[i].clone()]).collect();
        f.if_(&ok, |f| epilogue(f, p, a, index, &[*place], &own));
    }
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
