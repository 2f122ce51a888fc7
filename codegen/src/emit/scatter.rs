//! Scatter on the host: writes rows (or columns) of a buffer in place, only where indices point.
//!
//! The target is the aliased operand; nothing else of it is read or written. Indices go one after another inside a task,
//! and tasks divide what an index selects, never the indices: where an index repeats, the last one wins (set), or all count
//! in their order (add). The update may be a static slice of a wider operand. Index values are trusted.

use super::attention::view::{operand_index, strip_reshape};
use super::func::{Func, Val, vty};
use super::{Emitted, HostIsa, anchors, bytes_expr, dim_expr, dim_val, unsupported};
use crate::error::CodegenError;
use pleach_ir::{Class, DType, Dim, Kernel, Op, ScatterMode, Sym, ValueId};
use pleach_plan::Expr;

/// Elements that one index selects, per task, where rows are scattered.
const ROW_CHUNK: i64 = 64;
/// The same where there are outer axes to divide, and how many of their elements a task takes.
const WIDE_CHUNK: i64 = 1024;
const OUTER_CHUNK: i64 = 16;

/// The update as `[outer][index][middle][width]` of an operand: dimensions that the strides are products of, and the
/// element where it starts.
struct Update {
    operand: usize,
    shape: Vec<Dim>,
    /// Slices: axis, first element.
    starts: Vec<(usize, u64)>,
    /// The sliced axis behind the indexed one, or the one after the indexed.
    split: usize,
}

/// Emits a kernel of class scatter. `symbols` are the plan's, in the order of `dims`.
///
/// # Errors
/// [`CodegenError::Unsupported`] when the body is not one scatter into an aliased operand.
pub fn emit(k: &Kernel, symbols: &[Sym], isa: HostIsa) -> Result<Emitted, CodegenError> {
    let body = &k.body;
    let [root] = &body.roots[..] else {
        return Err(unsupported(k, "a scatter kernel has one result"));
    };
    let node = body.node(strip_reshape(body, root.value));
    let (Op::Scatter { axis, mode }, Class::Scatter) = (&node.op, k.class) else {
        return Err(unsupported(k, "the result of a scatter kernel must be the scatter itself"));
    };
    let axis = usize::from(*axis);
    let target = operand_index(body, strip_reshape(body, node.inputs[0]));
    if target.is_none() || k.aliases.first().copied().flatten().map(|a| a as usize) != target {
        return Err(unsupported(k, "the target of a scatter must be the operand that the result is written over"));
    }
    let index = operand_index(body, strip_reshape(body, node.inputs[1]))
        .ok_or_else(|| unsupported(k, "the index of a scatter must be an operand"))?;
    let update = update(k, node.inputs[2], axis)?;
    if *mode == ScatterMode::Add && !matches!(node.ty.dtype, DType::F32 | DType::I32) {
        return Err(unsupported(k, format!("scatter_add on the host takes f32 or i32, not {}", node.ty.dtype)));
    }

    let (shape, update_ty) = (node.ty.shape.clone(), body.ty(node.inputs[2]).clone());
    let mut f = Func::host_kernel(&k.name);
    f.is_for(k, &anchors(k));
    let product = |f: &mut Func, dims: &[Dim]| -> Result<Val, CodegenError> {
        let mut p = f.i64(1);
        for d in dims {
            let x = dim_val(f, k, *d, symbols)?;
            p = f.mul(&p, &x);
        }
        Ok(p)
    };
    let split = update.split;
    let last = &update_ty.shape;
    let sizes = Sizes {
        outer: product(&mut f, &shape[..axis])?,
        axis: product(&mut f, &shape[axis..=axis])?,
        count: product(&mut f, &last[axis..=axis])?,
        middle: product(&mut f, &last[(axis + 1).min(split)..split])?,
        width: product(&mut f, &last[split..])?,
        outer_step: product(&mut f, &update.shape[axis..])?,
        count_step: product(&mut f, &update.shape[axis + 1..])?,
        middle_step: product(&mut f, &update.shape[split..])?,
        start: {
            let mut s = f.i64(0);
            for (a, n) in &update.starts {
                let unit = product(&mut f, &update.shape[a + 1..])?;
                let x = f.mulc(&unit, *n as i64);
                s = f.add(&s, &x);
            }
            s
        },
        chunk: if axis == 0 { ROW_CHUNK } else { WIDE_CHUNK },
    };
    let target = f.buffer(target.unwrap_or(0));
    let index = f.buffer(index);
    let source = f.buffer(update.operand);
    let source = f.gep(&source, &sizes.start, elem(node.ty.dtype));
    write(&mut f, &sizes, [&target, &index, &source], node.ty.dtype, *mode, isa.lanes());

    let expr = |dims: &[Dim]| -> Result<Expr, CodegenError> {
        dims.iter().try_fold(Expr::Const(1), |e, d| Ok(e.mul(dim_expr(k, *d, symbols)?)))
    };
    let tasks =
        expr(&shape[..axis])?.ceil_div(OUTER_CHUNK as u64).mul(expr(&last[split..])?.ceil_div(sizes.chunk as u64));
    let moved = bytes_expr(k, &update_ty, symbols)?;
    Ok(Emitted {
        text: f.text(),
        tasks,
        scratch_bytes: Expr::Const(0),
        flops: if *mode == ScatterMode::Add { expr(last)? } else { Expr::Const(0) },
        bytes: moved.mul(if *mode == ScatterMode::Add { 3 } else { 2 }),
    })
}

/// Extents and steps in elements.
struct Sizes {
    outer: Val,
    axis: Val,
    count: Val,
    middle: Val,
    width: Val,
    outer_step: Val,
    count_step: Val,
    middle_step: Val,
    start: Val,
    chunk: i64,
}

/// The update as slices of an operand, if it is that.
fn update(k: &Kernel, mut v: ValueId, axis: usize) -> Result<Update, CodegenError> {
    let body = &k.body;
    let mut starts: Vec<(usize, u64)> = vec![];
    while let Op::Slice { axis: a, start, .. } = body.node(v).op {
        starts.push((usize::from(a), start));
        v = body.node(v).inputs[0];
    }
    let operand = operand_index(body, strip_reshape(body, v));
    let mut behind: Vec<usize> = starts.iter().map(|s| s.0).filter(|a| *a > axis).collect();
    behind.dedup();
    let before = starts.iter().any(|s| s.0 < axis);
    let (Some(operand), false, true) = (operand, before, behind.len() <= 1) else {
        let why =
            "the update of a scatter must be an operand, or a slice of one along the indexed axis or one after it";
        return Err(unsupported(k, why));
    };
    let split = behind.first().copied().unwrap_or(axis + 1);
    Ok(Update { operand, shape: body.ty(v).shape.clone(), starts, split })
}

fn elem(d: DType) -> &'static str {
    match d {
        DType::F32 => "f32",
        DType::I32 => "i32",
        DType::BF16 | DType::F16 => "i16",
        DType::Bool => "i8",
    }
}

fn write(f: &mut Func, s: &Sizes, [target, index, source]: [&Val; 3], dtype: DType, mode: ScatterMode, lanes: usize) {
    let elem = elem(dtype);
    let chunks = f.ceil_divc(&s.width, s.chunk);
    let selected = f.mul(&s.middle, &s.width);
    let (first, last, zero) = (f.arg("first"), f.arg("last"), f.i64(0));
    f.loop_(&first, &last, 1, |f, t| {
        let block = f.div(t, &chunks);
        let chunk = f.rem(t, &chunks);
        let o0 = f.mulc(&block, OUTER_CHUNK);
        let o1 = f.addc(&o0, OUTER_CHUNK);
        let o1 = f.min(&o1, &s.outer);
        let w0 = f.mulc(&chunk, s.chunk);
        let w1 = f.addc(&w0, s.chunk);
        let w1 = f.min(&w1, &s.width);
        let n = f.sub(&w1, &w0);
        let whole = f.divc(&n, lanes as i64);
        let whole = f.mulc(&whole, lanes as i64);
        let whole = f.add(&w0, &whole);
        f.loop_(&o0, &o1, 1, |f, o| {
            let to_outer = f.mul(o, &s.axis);
            let from_outer = f.mul(o, &s.outer_step);
            f.loop_(&zero, &s.count, 1, |f, j| {
                let i = f.load_at(index, j, "i32", 1);
                let i = f.op(format!("arith.extsi {i} : i32 to i64"));
                let to = f.add(&to_outer, &i);
                let to = f.mul(&to, &selected);
                let from = f.mul(j, &s.count_step);
                let from = f.add(&from_outer, &from);
                f.loop_(&zero, &s.middle, 1, |f, m| {
                    let x = f.mul(m, &s.width);
                    let to = f.add(&to, &x);
                    let x = f.mul(m, &s.middle_step);
                    let from = f.add(&from, &x);
                    let (to, from) = (f.gep(target, &to, elem), f.gep(source, &from, elem));
                    for (lo, hi, lanes) in [(&w0, &whole, lanes), (&whole, &w1, 1)] {
                        f.loop_(lo, hi, lanes as i64, |f, e| {
                            let x = f.load_at(&from, e, elem, lanes);
                            let p = f.gep(&to, e, elem);
                            let x = match mode {
                                ScatterMode::Set => x,
                                ScatterMode::Add => {
                                    let op = if dtype == DType::I32 { "addi" } else { "addf" };
                                    let ty = vty(lanes, elem);
                                    let old = f.load(&p, &ty);
                                    f.op(format!("arith.{op} {old}, {x} : {ty}"))
                                }
                            };
                            f.store(&x, &p, &vty(lanes, elem));
                        });
                    }
                });
            });
        });
    });
}
