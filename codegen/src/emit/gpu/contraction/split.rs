//! Sums shared by several blocks: each leaves its part in scratch memory, and a second launch adds the parts in order.
//!
//! For products with few results and long sums, such as gradients of thin matrices over all tokens. Which part a block takes
//! depends on shapes and counts only, so a result is the same bits in every run.

use super::existing;
use super::fragment::{self, TOGETHER};
use crate::emit::contraction::analyze::Analysis;
use crate::emit::dim_expr;
use crate::emit::func::{Func, Val};
use crate::emit::gpu::at::At;
use crate::emit::gpu::chip::Limits;
use crate::emit::gpu::launch::Unit;
use crate::emit::gpu::pull::Pull;
use crate::emit::gpu::special;
use crate::error::CodegenError;
use pleach_ir::{Kernel, Sym};
use pleach_plan::{Expr, Launch};

/// Parts of a sum at most.
pub(super) const MOST: u64 = 16;
/// Shorter sums are not shared.
const LONG: u64 = 1024;
const THREADS: i64 = 128;

/// Parts of the sums of a kernel that has so many tiles; 1 where it is not shared.
pub(super) fn parts(a: &Analysis, tile: [i64; 2], limits: &Limits) -> u64 {
    let (Some(m), Some(n), true) = (a.m.known(), a.n.known(), a.batch.is_empty()) else { return 1 };
    let tiles = m.div_ceil(tile[0] as u64) * n.div_ceil(tile[1] as u64);
    let long = a.products.iter().any(|p| p.k.known().is_none_or(|k| k >= LONG));
    let want = 2 * u64::from(limits.multiprocessors) / tiles.max(1);
    if long && want >= 2 { want.min(MOST) } else { 1 }
}

/// Bytes of all parts.
pub(super) fn scratch(k: &Kernel, symbols: &[Sym], a: &Analysis, parts: u64) -> Result<Expr, CodegenError> {
    let elements = padded(k, symbols, a)?;
    Ok(elements.mul(parts * a.groups.len() as u64 * 4))
}

/// Elements of a part, rows filled up to whole fours.
fn padded(k: &Kernel, symbols: &[Sym], a: &Analysis) -> Result<Expr, CodegenError> {
    let four = TOGETHER as u64;
    Ok(dim_expr(k, a.m, symbols)?.mul(dim_expr(k, a.n, symbols)?.ceil_div(four).mul(four)))
}

/// Address of element (row, column) of a group in a part: rows of all groups lie side by side.
fn address(f: &mut Func, size: &[Val; 2], at: [&Val; 3], row: &Val, column: &Val) -> Val {
    let [part, groups, group] = at;
    let x = f.mul(part, &size[0]);
    let x = f.add(&x, row);
    let x = f.mul(&x, groups);
    let x = f.add(&x, group);
    let x = f.mul(&x, &size[1]);
    let x = f.add(&x, column);
    let base = f.arg("scratch");
    f.gep(&base, &x, "f32")
}

/// Keeps elements of a part: groups of four neighbours, `places` columns from the column.
pub(super) fn keep(
    f: &mut Func,
    size: &[Val; 2],
    part: &Val,
    [row, column]: [&Val; 2],
    places: &[i64],
    sums: &[Vec<Val>],
) {
    let groups = f.i64(sums.len() as i64);
    for (g, sum) in sums.iter().enumerate() {
        let g = f.i64(g as i64);
        let base = address(f, size, [part, &groups, &g], row, column);
        for (four, x) in places.chunks(TOGETHER as usize).zip(sum.chunks(TOGETHER as usize)) {
            let list = x.iter().map(Val::to_string).collect::<Vec<_>>().join(", ");
            let v = f.op(format!("vector.from_elements {list} : vector<4xf32>"));
            let at = f.i64(four[0]);
            let to = f.gep(&base, &at, "f32");
            f.stmt(&format!("llvm.store {v}, {to} {{alignment = 16 : i64}} : vector<4xf32>, !llvm.ptr"));
        }
    }
}

/// The launch that adds the parts and computes the results; the suffix tells its function from others of the kernel.
pub(super) fn finish(
    k: &Kernel,
    symbols: &[Sym],
    a: &Analysis,
    parts: u64,
    suffix: &str,
) -> Result<(String, Launch), CodegenError> {
    let mut unit = Unit::new(k, suffix, true);
    let f = &mut unit.f;
    let mut p = Pull::new(f, k, symbols);
    let (block, tid) = (special(f, "ctaid.x"), special(f, "tid.x"));
    let first = f.mulc(&block, THREADS);
    let thread = f.add(&first, &tid);
    let (rows, columns) = (p.dim(f, a.m), p.dim(f, a.n));
    let size = [rows, fragment::whole(f, &columns)];
    let at = f.mulc(&thread, TOGETHER);
    let (row, column) = (f.div(&at, &size[1]), f.rem(&at, &size[1]));
    let inside = f.cmp("slt", &row, &size[0]);
    f.if_(&inside, |f| {
        let groups = a.groups.len();
        let count = f.i64(groups as i64);
        let none = f.f32(0.0, 1);
        let init = vec![(none, "f32".to_string()); groups * TOGETHER as usize];
        let (zero, end) = (f.i64(0), f.i64(parts as i64));
        let sums = f.for_(&zero, &end, 1, &init, |f, part, sums| {
            let mut out = vec![];
            for (g, sums) in sums.chunks(TOGETHER as usize).enumerate() {
                let g = f.i64(g as i64);
                let from = address(f, &size, [part, &count, &g], &row, &column);
                let x = f.op(format!("llvm.load {from} {{alignment = 16 : i64}} : !llvm.ptr -> vector<4xf32>"));
                for (i, s) in sums.iter().enumerate() {
                    let x = f.op(format!("vector.extract {x}[{i}] : f32 from vector<4xf32>"));
                    out.push(f.op(format!("arith.addf {s}, {x} : f32")));
                }
            }
            out
        });
        let sums: Vec<Vec<Val>> = sums.chunks(TOGETHER as usize).map(<[Val]>::to_vec).collect();
        p.together = TOGETHER;
        let index = [At::of(f, &row, 1), At::of(f, &column, TOGETHER)];
        existing(f, &mut p, a, &index, &[0, 1, 2, 3], &sums);
    });
    p.finish()?;
    let grid = [padded(k, symbols, a)?.ceil_div((THREADS * TOGETHER) as u64), Expr::Const(1), Expr::Const(1)];
    Ok(unit.finish(grid, THREADS as u32, 0, 1))
}
