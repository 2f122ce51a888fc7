//! Contraction kernels on the GPU: f32 products through tiles in shared memory, with everything elementwise around them.
//!
//! A block of 256 threads computes 64 by 64 elements, a thread 4 by 4. Operands of the products are pulled element by
//! element while tiles are filled, so layouts, slices and casts of operands need no code of their own; bf16 and f16
//! operands are widened there. The epilogue is pulled for every element of the tile from the accumulators. Sums run over
//! the contracted dimension in order.

use super::pull::Pull;
use super::{GpuEmitted, barrier, check, function, module, shared, shared_at, special};
use crate::emit::func::{Func, Val};
use crate::emit::{dim_expr, unsupported};
use crate::error::CodegenError;
use pleach_ir::{Class, Dim, Kernel, Op, Sym, ValueId};
use pleach_plan::Expr;

const THREADS: u32 = 256;
/// Rows and columns of a block's tile, and steps of the contracted dimension per filling.
const TILE: i64 = 64;
const STEP: i64 = 16;
/// Rows and columns of a thread.
const OWN: i64 = 4;
/// Floats from one step of a tile to the next: padded, and a multiple of 4.
const PITCH: i64 = TILE + 4;

struct Product {
    value: ValueId,
    left: ValueId,
    right: ValueId,
    ta: bool,
    tb: bool,
    depth: Dim,
}

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

/// Emits a contraction kernel.
///
/// # Errors
/// [`CodegenError::Unsupported`] when products or results are not matrices of one shape.
pub fn emit(k: &Kernel, symbols: &[Sym]) -> Result<GpuEmitted, CodegenError> {
    check(k)?;
    let products = products(k)?;
    let shape = k.body.ty(products[0].value).shape.clone();
    let mut f = function(k, symbols);
    let mut p = Pull::new(k, symbols);
    let tid = special(&mut f, "tid.x");
    let at = |f: &mut Func, reg: &str| {
        let x = special(f, reg);
        f.mulc(&x, TILE)
    };
    let block = [at(&mut f, "ctaid.y"), at(&mut f, "ctaid.x")];
    let own_row = f.divc(&tid, TILE / OWN);
    let own = [f.mulc(&own_row, OWN), f.remc(&tid, TILE / OWN)];
    let size = [p.dim(&mut f, shape[0]), p.dim(&mut f, shape[1])];
    let tiles = shared(&mut f);
    let place = Place { tid, block, own, size, tiles };
    let sums: Vec<Vec<Val>> = products.iter().map(|x| accumulate(&mut f, &mut p, x, &place)).collect();
    for i in 0..OWN {
        for j in 0..OWN {
            let m = f.add(&place.block[0], &place.own[0]);
            let m = f.addc(&m, i);
            let n = f.add(&place.block[1], &place.own[1]);
            let n = f.addc(&n, j * (TILE / OWN));
            let inside = inside(&mut f, [&m, &n], [&place.size[0], &place.size[1]]);
            let index = [m, n];
            for (x, s) in products.iter().zip(&sums) {
                p.set(x.value, &index, s[(i * OWN + j) as usize].clone());
            }
            f.if_(&inside, |f| {
                p.scope(|p| (0..k.body.roots.len()).for_each(|r| p.store(f, r, &index)));
            });
        }
    }
    p.finish()?;
    let shared = 2 * (STEP * PITCH) as u64;
    let blocks = |d: Dim| -> Result<Expr, CodegenError> { Ok(dim_expr(k, d, symbols)?.ceil_div(TILE as u64)) };
    Ok(GpuEmitted {
        text: module(&f, THREADS, shared),
        grid: [blocks(shape[1])?, blocks(shape[0])?, Expr::Const(1)],
        threads: THREADS,
        shared_bytes: 4 * shared,
    })
}

fn products(k: &Kernel) -> Result<Vec<Product>, CodegenError> {
    let body = &k.body;
    let live = body.live();
    let mut out = vec![];
    for v in body.values().filter(|v| live[v.index()]) {
        let n = body.node(v);
        let Op::MatMul { ta, tb } = n.op else { continue };
        let (left, right) = (n.inputs[0], n.inputs[1]);
        let depth = body.ty(left).shape.get(usize::from(!ta)).copied().unwrap_or(Dim::Known(0));
        out.push(Product { value: v, left, right, ta, tb, depth });
    }
    let shape = out.first().map(|p: &Product| body.ty(p.value).shape.clone()).unwrap_or_default();
    let fits = |v: ValueId| body.ty(v).shape == shape;
    if k.class != Class::Contraction || shape.len() != 2 {
        return Err(unsupported(k, "a contraction on the GPU needs products of matrices"));
    }
    if !out.iter().all(|p| fits(p.value)) || !body.roots.iter().all(|r| fits(r.value)) {
        return Err(unsupported(k, "products and results of a contraction on the GPU must have one shape"));
    }
    Ok(out)
}

/// Both indices below their ends.
fn inside(f: &mut Func, index: [&Val; 2], end: [&Val; 2]) -> Val {
    let a = f.cmp("slt", index[0], end[0]);
    let b = f.cmp("slt", index[1], end[1]);
    f.op(format!("arith.andi {a}, {b} : i1"))
}

/// The thread's sums of one product, row by row.
fn accumulate(f: &mut Func, p: &mut Pull<'_>, x: &Product, at: &Place) -> Vec<Val> {
    let (zero, none) = (f.i64(0), f.f32(0.0, 1));
    let depth = p.dim(f, x.depth);
    let init = vec![(none, "f32".to_string()); (OWN * OWN) as usize];
    f.for_(&zero, &depth, STEP, &init, |f, k0, acc| {
        // Neighbouring threads take neighbouring elements of an operand that lies along the contracted dimension.
        fill(f, p, at, [k0, &depth], 0, x.left, !x.ta);
        fill(f, p, at, [k0, &depth], 1, x.right, x.tb);
        barrier(f);
        let (zero, steps) = (f.i64(0), f.i64(STEP));
        let init: Vec<(Val, String)> = acc.iter().map(|a| (a.clone(), "f32".to_string())).collect();
        let out = f.for_(&zero, &steps, 1, &init, |f, s, acc| {
            let row = f.mulc(s, PITCH);
            let a = f.add(&row, &at.own[0]);
            let a = shared_at(f, &at.tiles, &a);
            let a = f.op(format!("llvm.load {a} {{alignment = 16 : i64}} : !llvm.ptr<3> -> vector<4xf32>"));
            let b = f.add(&row, &at.own[1]);
            let b = f.addc(&b, STEP * PITCH);
            let bs: Vec<Val> = (0..OWN)
                .map(|j| {
                    let b = f.addc(&b, j * (TILE / OWN));
                    let b = shared_at(f, &at.tiles, &b);
                    f.op(format!("llvm.load {b} {{alignment = 4 : i64}} : !llvm.ptr<3> -> f32"))
                })
                .collect();
            let mut out = vec![];
            for i in 0..OWN as usize {
                let a = f.op(format!("vector.extract {a}[{i}] : f32 from vector<4xf32>"));
                for (j, b) in bs.iter().enumerate() {
                    out.push(f.op(format!("math.fma {a}, {b}, {} : f32", acc[i * OWN as usize + j])));
                }
            }
            out
        });
        barrier(f);
        out
    })
}

/// Fills the tile of the left (`side` 0) or right (1) operand: `[step][row or column]`, zeros outside. `along`: the
/// operand's last axis is the contracted one.
fn fill(f: &mut Func, p: &mut Pull<'_>, at: &Place, [k0, depth]: [&Val; 2], side: usize, v: ValueId, along: bool) {
    let threads = i64::from(THREADS);
    for i in 0..STEP * TILE / threads {
        let (step, line) = if along {
            let line = f.divc(&at.tid, STEP);
            (f.remc(&at.tid, STEP), f.addc(&line, i * (threads / STEP)))
        } else {
            let step = f.divc(&at.tid, TILE);
            (f.addc(&step, i * (threads / TILE)), f.remc(&at.tid, TILE))
        };
        let k = f.add(k0, &step);
        let l = f.add(&at.block[side], &line);
        let ok = inside(f, [&k, &l], [depth, &at.size[side]]);
        let x = f.if_else(
            &ok,
            &["f32".to_string()],
            |f| {
                let index = if along { [l.clone(), k.clone()] } else { [k.clone(), l.clone()] };
                vec![p.scope(|p| p.eval(f, v, &index))]
            },
            |f| vec![f.f32(0.0, 1)],
        );
        let to = f.mulc(&step, PITCH);
        let to = f.add(&to, &line);
        let to = f.addc(&to, side as i64 * STEP * PITCH);
        let to = shared_at(f, &at.tiles, &to);
        f.stmt(&format!("llvm.store {}, {to} {{alignment = 4 : i64}} : f32, !llvm.ptr<3>", x[0]));
    }
}
