//! Row kernels on the GPU: one block of threads to a row.
//!
//! Covers elementwise operators, movement within a row, and reductions of `[rows, columns]` over the columns. Each
//! reduction is a pass over the row (threads stride, then shuffles, then one shared word per warp, added in order), each
//! shape of results another; between them values per row stay in registers, and what is elementwise is computed again.

use super::pull::Pull;
use super::{GpuEmitted, barrier, check, function, module, shared, shared_at, special};
use crate::emit::elementwise;
use crate::emit::func::{Func, Val};
use crate::emit::{dim_expr, unsupported};
use crate::error::CodegenError;
use pleach_ir::{Class, DType, Dim, Kernel, Op, ReduceOp, Sym, ValueId};
use pleach_plan::Expr;

const THREADS: u32 = 256;
const WARPS: i64 = THREADS as i64 / 32;

/// Emits a row kernel.
///
/// # Errors
/// [`CodegenError::Unsupported`] for a body outside of what the module text says.
pub fn emit(k: &Kernel, symbols: &[Sym]) -> Result<GpuEmitted, CodegenError> {
    check(k)?;
    let body = &k.body;
    let rows = body.roots.first().and_then(|r| body.ty(r.value).shape.first().copied());
    let (Some(rows), Class::Row) = (rows, k.class) else {
        return Err(unsupported(k, "a row kernel on the GPU needs results with rows"));
    };
    if body.roots.iter().any(|r| body.ty(r.value).shape.first() != Some(&rows)) {
        return Err(unsupported(k, "all results of a row kernel must have the same rows"));
    }
    let live = body.live();
    let reductions: Vec<ValueId> =
        body.values().filter(|v| live[v.index()] && matches!(body.node(*v).op, Op::Reduce { .. })).collect();
    for v in &reductions {
        let ty = body.ty(body.node(*v).inputs[0]);
        let fits = matches!(body.node(*v).op, Op::Reduce { axis: 1, .. }) && ty.rank() == 2 && ty.shape[0] == rows;
        if !fits {
            return Err(unsupported(k, "a reduction on the GPU must be over the columns of [rows, columns]"));
        }
    }

    let mut f = function(k, symbols);
    let mut p = Pull::new(k, symbols);
    let row = special(&mut f, "ctaid.x");
    let lane = special(&mut f, "tid.x");
    for (i, v) in reductions.iter().enumerate() {
        per_row(&mut f, &mut p, k, &row);
        let x = reduce(&mut f, &mut p, k, *v, [&row, &lane], i);
        p.set(*v, std::slice::from_ref(&row), x);
    }
    per_row(&mut f, &mut p, k, &row);
    write_results(&mut f, &mut p, k, [&row, &lane]);
    p.finish()?;
    let shared = reductions.len() as u64 * WARPS as u64;
    Ok(GpuEmitted {
        text: module(&f, THREADS, shared),
        grid: [dim_expr(k, rows, symbols)?, Expr::Const(1), Expr::Const(1)],
        threads: THREADS,
        shared_bytes: 4 * shared,
    })
}

/// Computes what is broadcast along rows and already known, before the loops that use it.
fn per_row(f: &mut Func, p: &mut Pull<'_>, k: &Kernel, row: &Val) {
    let body = &k.body;
    let mut ready = vec![false; body.nodes.len()];
    for v in body.values() {
        let n = body.node(v);
        let own = match n.op {
            Op::Reduce { .. } => p.is_set(v),
            _ => n.inputs.iter().all(|i| ready[i.index()]),
        };
        ready[v.index()] = own;
        if let Op::Broadcast { axes, .. } = &n.op
            && axes[..] == [0]
            && own
        {
            p.eval(f, n.inputs[0], std::slice::from_ref(row));
        }
    }
}

/// `index of the thread, + threads, …` below `end`.
fn stride(
    f: &mut Func,
    lane: &Val,
    end: &Val,
    init: &[(Val, String)],
    body: impl FnOnce(&mut Func, &Val, &[Val]) -> Vec<Val>,
) -> Vec<Val> {
    f.for_(lane, end, i64::from(THREADS), init, body)
}

/// A reduction over the columns; every thread of the block has the result.
fn reduce(f: &mut Func, p: &mut Pull<'_>, k: &Kernel, v: ValueId, [row, lane]: [&Val; 2], slot: usize) -> Val {
    let n = k.body.node(v);
    let (Op::Reduce { op, .. }, x) = (&n.op, n.inputs[0]) else { return row.clone() };
    let (float, columns) = (n.ty.dtype == DType::F32, k.body.ty(x).shape[1]);
    let (name, start) = match (op, float) {
        (ReduceOp::Sum, true) => ("addf", 0f32.to_bits()),
        (ReduceOp::Max, true) => ("maximumf", f32::NEG_INFINITY.to_bits()),
        (ReduceOp::Min, true) => ("minimumf", f32::INFINITY.to_bits()),
        (ReduceOp::Sum, false) => ("addi", 0),
        (ReduceOp::Max, false) => ("maxsi", i32::MIN as u32),
        (ReduceOp::Min, false) => ("minsi", i32::MAX as u32),
    };
    let ty = if float { "f32" } else { "i32" };
    let combine = |f: &mut Func, a: &Val, b: &Val| f.op(format!("arith.{name} {a}, {b} : {ty}"));
    let init = elementwise::constant(f, n.ty.dtype, start, 1);
    let end = p.dim(f, columns);
    let mut x = stride(f, lane, &end, &[(init, ty.into())], |f, column, acc| {
        let y = p.scope(|p| p.eval(f, x, &[row.clone(), column.clone()]));
        vec![combine(f, &acc[0], &y)]
    })
    .remove(0);
    let (all, last) = (f.i32(-1, 1), f.i32(31, 1));
    for d in [16, 8, 4, 2, 1] {
        let d = f.i32(d, 1);
        let other = f.op(format!("nvvm.shfl.sync bfly {all}, {x}, {d}, {last} : {ty} -> {ty}"));
        x = combine(f, &x, &other);
    }
    let base = shared(f);
    let first = slot as i64 * WARPS;
    let (warp, in_warp, zero) = (f.divc(lane, 32), f.remc(lane, 32), f.i64(0));
    let leads = f.cmp("eq", &in_warp, &zero);
    f.if_(&leads, |f| {
        let at = f.addc(&warp, first);
        let to = shared_at(f, &base, &at);
        f.stmt(&format!("llvm.store {x}, {to} {{alignment = 4 : i64}} : {ty}, !llvm.ptr<3>"));
    });
    barrier(f);
    let parts: Vec<Val> = (0..WARPS)
        .map(|w| {
            let at = f.i64(first + w);
            let from = shared_at(f, &base, &at);
            f.op(format!("llvm.load {from} {{alignment = 4 : i64}} : !llvm.ptr<3> -> {ty}"))
        })
        .collect();
    let mut total = parts[0].clone();
    for x in &parts[1..] {
        total = combine(f, &total, x);
    }
    total
}

fn write_results(f: &mut Func, p: &mut Pull<'_>, k: &Kernel, [row, lane]: [&Val; 2]) {
    let mut shapes: Vec<Vec<Dim>> = vec![];
    for r in &k.body.roots {
        let s = k.body.ty(r.value).shape[1..].to_vec();
        if !shapes.contains(&s) {
            shapes.push(s);
        }
    }
    for shape in shapes {
        let mut columns = f.i64(1);
        for d in &shape {
            let d = p.dim(f, *d);
            columns = f.mul(&columns, &d);
        }
        stride(f, lane, &columns, &[], |f, at, _| {
            p.scope(|p| {
                let mut index = vec![row.clone()];
                if !shape.is_empty() {
                    index.extend(p.index(f, &shape, at));
                }
                for (i, r) in k.body.roots.iter().enumerate() {
                    if k.body.ty(r.value).shape[1..] == shape[..] {
                        p.store(f, i, &index);
                    }
                }
            });
            vec![]
        });
    }
}
