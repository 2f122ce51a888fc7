//! Products of f32 by plain multiply-adds, through tiles in shared memory. Takes any strides, batches and types, and
//! right operands in blocks of codes.
//!
//! A block of 256 threads computes 64 by 64 elements, a thread 4 by 4. Sums run over the contracted dimension in order.

use super::epilogue;
use super::operand::{Codes, Matrix, Operand, operand};
use crate::emit::contraction::analyze::Analysis;
use crate::emit::dim_expr;
use crate::emit::elementwise;
use crate::emit::func::{Func, Val};
use crate::emit::gpu::at::At;
use crate::emit::gpu::launch::{Unit, shared_at, shared_load, shared_store};
use crate::emit::gpu::pull::Pull;
use crate::emit::gpu::{Parts, barrier, special};
use crate::error::CodegenError;
use pleach_ir::{Dim, Kernel, Sym};
use pleach_plan::Expr;

const THREADS: i64 = 256;
/// Rows and columns of a block's tile, and steps of the contracted dimension per filling.
const TILE: i64 = 64;
const STEP: i64 = 8;
/// Rows and columns of a thread.
const OWN: i64 = 4;
/// Floats from one step of a tile to the next: padded, and a multiple of 4.
const PITCH: i64 = TILE + 4;

/// Where a thread stands.
struct Place {
    tid: Val,
    /// First row and column of the block, and of the thread in the block.
    block: [Val; 2],
    own: [Val; 2],
    /// Rows and columns of the results.
    size: [Val; 2],
    tiles: Val,
}

/// Emits the kernel.
pub(super) fn emit(k: &Kernel, symbols: &[Sym], a: &Analysis) -> Result<Parts, CodegenError> {
    let mut unit = Unit::new(k, "", false);
    let tiles = unit.shared((2 * STEP * PITCH * 4) as u64);
    let f = &mut unit.f;
    let mut p = Pull::new(f, k, symbols);
    let tid = special(f, "tid.x");
    let at = |f: &mut Func, reg: &str| {
        let x = special(f, reg);
        f.mulc(&x, TILE)
    };
    let block = [at(f, "ctaid.y"), at(f, "ctaid.x")];
    let (own_row, own_column) = (f.divc(&tid, TILE / OWN), f.remc(&tid, TILE / OWN));
    let own = [f.mulc(&own_row, OWN), f.mulc(&own_column, OWN)];
    let size = [p.dim(f, a.m), p.dim(f, a.n)];
    let z = special(f, "ctaid.z");
    let z = At::of(f, &z, 1);
    let batch = p.index(f, &a.batch, &z);
    let batch_values: Vec<Val> = batch.iter().map(|b| b.val(f)).collect();
    let place = Place { tid, block, own, size, tiles };
    let outer = f.cmp("slt", &place.block[0], &place.size[0]);
    f.if_(&outer, |f| {
        let mut sums = vec![];
        for g in &a.groups {
            let mut total: Option<Vec<Val>> = None;
            for (x, scale) in &g.products {
                let x = &a.products[*x];
                let sides = [0, 1].map(|s| operand(f, &mut p, x, s, &batch_values, g.offset));
                let none = f.f32(0.0, 1);
                let zeros = vec![none; (OWN * OWN) as usize];
                let depth = p.dim(f, x.k);
                total = Some(match (scale, total) {
                    (None, before) => accumulate(f, &place, &sides, &depth, before.unwrap_or(zeros)),
                    (Some(s), before) => {
                        let s = p.eval(f, *s, &[]);
                        let own = accumulate(f, &place, &sides, &depth, zeros);
                        let scaled = own.iter().enumerate().map(|(i, x)| match &before {
                            Some(b) => f.op(format!("math.fma {x}, {s}, {} : f32", b[i])),
                            None => f.op(format!("arith.mulf {x}, {s} : f32")),
                        });
                        scaled.collect()
                    }
                });
            }
            sums.push(total.unwrap_or_default());
        }
        write(f, &mut p, a, &place, &batch, &sums);
    });
    p.finish()?;
    let blocks = |d: Dim| -> Result<Expr, CodegenError> { Ok(dim_expr(k, d, symbols)?.ceil_div(TILE as u64)) };
    let batches =
        a.batch.iter().try_fold(Expr::Const(1), |e, d| Ok::<_, CodegenError>(e.mul(dim_expr(k, *d, symbols)?)))?;
    let (text, launch) = unit.finish([blocks(a.n)?, blocks(a.m)?, batches], THREADS as u32, 0, 1);
    Ok((text, vec![launch], Expr::Const(0)))
}

fn write(f: &mut Func, p: &mut Pull<'_>, a: &Analysis, at: &Place, batch: &[At], sums: &[Vec<Val>]) {
    // Four columns go together where a row is a multiple of four.
    let v = if a.n.known().is_some_and(|n| n as i64 % OWN == 0) { OWN } else { 1 };
    p.together = v;
    for i in 0..OWN {
        let m = f.add(&at.block[0], &at.own[0]);
        let m = f.addc(&m, i);
        for j in (0..OWN).step_by(v as usize) {
            let n = f.add(&at.block[1], &at.own[1]);
            let n = f.addc(&n, j);
            let inside = inside(f, [&m, &n], [&at.size[0], &at.size[1]]);
            let own: Vec<Vec<Val>> = sums.iter().map(|s| s[(i * OWN + j) as usize..][..v as usize].to_vec()).collect();
            f.if_(&inside, |f| {
                let mut index = batch.to_vec();
                index.push(At::of(f, &m, 1));
                index.push(At::of(f, &n, v));
                epilogue(f, p, a, &index, &(0..v).collect::<Vec<_>>(), &own);
            });
        }
    }
}

/// Both indices below their ends.
fn inside(f: &mut Func, index: [&Val; 2], end: [&Val; 2]) -> Val {
    let a = f.cmp("slt", index[0], end[0]);
    let b = f.cmp("slt", index[1], end[1]);
    f.op(format!("arith.andi {a}, {b} : i1"))
}

/// Writes what is laid over a right operand in blocks into its tile.
fn lay(f: &mut Func, at: &Place, [k0, depth]: [&Val; 2], x: &Operand) {
    let Operand::Codes(Codes { over: Some(over), first, .. }) = x else { return };
    let column = f.addc(&at.block[1], *first);
    let (from, span) = if over.lines { (&column, TILE) } else { (k0, STEP) };
    over.each(f, from, span, |f, place, j| {
        barrier(f);
        let others = f.i64(if over.lines { STEP } else { TILE });
        let (base, end) = if over.lines { (k0, depth) } else { (&at.block[1], &at.size[1]) };
        let other = f.add(base, &at.tid);
        let ok = inside(f, [&at.tid, &other], [&others, end]);
        f.if_(&ok, |f| {
            let other = if over.lines { other } else { f.addc(&other, *first) };
            let value = over.value(f, j, &other);
            let (step, line) = if over.lines { (&at.tid, place) } else { (place, &at.tid) };
            let to = f.mulc(step, PITCH);
            let to = f.add(&to, line);
            let to = f.addc(&to, STEP * PITCH);
            let to = shared_at(f, &at.tiles, &to, "f32");
            shared_store(f, &value, &to, "f32", 4);
        });
    });
}

/// An element of an operand.
fn element(f: &mut Func, x: &Matrix, [line, step]: [&Val; 2]) -> Val {
    let (a, b) = (f.mul(line, &x.line), f.mul(step, &x.step));
    let from = f.add(&a, &b);
    let from = f.gep(&x.base, &from, elementwise::memory_elem(x.dtype));
    elementwise::load_aligned(f, x.dtype, &from, x.dtype.size() as i64)
}

/// The thread's sums of one product, row by row, added to what is there.
fn accumulate(f: &mut Func, at: &Place, sides: &[Operand; 2], depth: &Val, init: Vec<Val>) -> Vec<Val> {
    let zero = f.i64(0);
    let init: Vec<(Val, String)> = init.into_iter().map(|x| (x, "f32".to_string())).collect();
    f.for_(&zero, depth, STEP, &init, |f, k0, acc| {
        for (side, m) in sides.iter().enumerate() {
            fill(f, at, [k0, depth], side, m);
        }
        lay(f, at, [k0, depth], &sides[1]);
        barrier(f);
        let (zero, steps) = (f.i64(0), f.i64(STEP));
        let init: Vec<(Val, String)> = acc.iter().map(|a| (a.clone(), "f32".to_string())).collect();
        let out = f.for_(&zero, &steps, 1, &init, |f, s, acc| {
            let row = f.mulc(s, PITCH);
            let four = |f: &mut Func, side: usize| {
                let x = f.add(&row, &at.own[side]);
                let x = f.addc(&x, side as i64 * STEP * PITCH);
                let x = shared_at(f, &at.tiles, &x, "f32");
                shared_load(f, &x, "vector<4xf32>", 16)
            };
            let (a, b) = (four(f, 0), four(f, 1));
            let one = |f: &mut Func, x: &Val, i: i64| f.op(format!("vector.extract {x}[{i}] : f32 from vector<4xf32>"));
            let bs: Vec<Val> = (0..OWN).map(|j| one(f, &b, j)).collect();
            let mut out = vec![];
            for i in 0..OWN {
                let a = one(f, &a, i);
                for (j, b) in bs.iter().enumerate() {
                    out.push(f.op(format!("math.fma {a}, {b}, {} : f32", acc[i as usize * OWN as usize + j])));
                }
            }
            out
        });
        barrier(f);
        out
    })
}

/// Fills the tile of the left (`side` 0) or right (1) operand: `[step][row or column]`, zeros outside.
fn fill(f: &mut Func, at: &Place, [k0, depth]: [&Val; 2], side: usize, x: &Operand) {
    // Neighbouring threads take neighbouring elements of an operand that lies along the contracted dimension.
    let along = match x {
        Operand::Numbers(x) => x.step.known() == Some(1),
        Operand::Codes(x) => x.along,
        Operand::Picked(x) => x.matrix.step.known() == Some(1),
    };
    for i in 0..STEP * TILE / THREADS {
        let (step, line) = if along {
            let line = f.divc(&at.tid, STEP);
            (f.remc(&at.tid, STEP), f.addc(&line, i * (THREADS / STEP)))
        } else {
            let step = f.divc(&at.tid, TILE);
            (f.addc(&step, i * (THREADS / TILE)), f.remc(&at.tid, TILE))
        };
        let k = f.add(k0, &step);
        let l = f.add(&at.block[side], &line);
        let ok = inside(f, [&k, &l], [depth, &at.size[side]]);
        let value = f.if_else(
            &ok,
            &["f32".to_string()],
            |f| match x {
                Operand::Numbers(x) => vec![element(f, x, [&l, &k])],
                Operand::Picked(x) => {
                    let (l, k) = if x.lines { (x.place(f, &l), k) } else { (l, x.place(f, &k)) };
                    vec![element(f, &x.matrix, [&l, &k])]
                }
                Operand::Codes(x) => {
                    let l = f.addc(&l, x.first);
                    let (row, column) = if x.along { (&l, &k) } else { (&k, &l) };
                    let column = At::of(f, column, 1);
                    let value = x.blocks.element(f, row, &column);
                    vec![x.dtypes.iter().fold(value, |v, d| elementwise::round_to(f, *d, &v, 1))]
                }
            },
            |f| vec![f.f32(0.0, 1)],
        );
        let to = f.mulc(&step, PITCH);
        let to = f.add(&to, &line);
        let to = f.addc(&to, side as i64 * STEP * PITCH);
        let to = shared_at(f, &at.tiles, &to, "f32");
        shared_store(f, &value[0], &to, "f32", 4);
    }
}
