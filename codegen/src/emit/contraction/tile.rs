//! The matrix-multiply microkernel: a tile of rows and vectors of columns held in registers over the sum.
//!
//! Per step of the sum: the vectors of the right operand are loaded once, one element of each row of the left operand
//! is broadcast, and every pair is multiplied and added. Tiles too small to hide the latency of that run several steps
//! at a time, each with accumulators of its own.

use super::analyze::Right;
use super::blocking::LANES;
use super::context::{Context, Place};
use crate::emit::func::{Func, Val, vty};

/// Accumulating registers that keep the multipliers busy.
const CHAINS: usize = 12;

fn vector() -> String {
    vty(LANES, "f32")
}

/// Zeros for a tile.
pub(super) fn zeros(f: &mut Func, cx: &Context, rows: u64) -> Vec<Val> {
    let z = f.f32(0.0, LANES);
    vec![z; rows as usize * cx.bl.vectors]
}

/// The right operand at a tile: address of step 0, distance of steps, and whether loads must be masked.
fn right_of(f: &mut Func, cx: &Context, group: usize, product: usize, at: &Place) -> (Val, Val, bool) {
    let (g, p, bl) = (&cx.an.groups[group], &cx.an.products[product], cx.bl);
    match &p.right {
        Right::Panels { arg, nr } => {
            let column = f.addc(&at.column, g.offset as i64);
            let (panel, inside) = (f.divc(&column, *nr as i64), f.remc(&column, *nr as i64));
            let k = cx.dim(f, p.k);
            let size = f.mulc(&k, *nr as i64);
            let start = f.mul(&panel, &size);
            let start = if *nr == bl.width { start } else { f.add(&start, &inside) };
            (f.gep(&cx.buffers[*arg], &start, "f32"), f.i64(*nr as i64), false)
        }
        Right::Rows(v) => {
            let base = cx.base(f, v, &at.batch);
            let column = f.addc(&at.column, g.offset as i64);
            let step = cx.stride(f, &v.strides[v.strides.len() - 2]);
            (f.gep(&base, &column, "f32"), step, true)
        }
        Right::Strided(_) => {
            let start = super::pack::place(f, cx, group, product, &at.slot);
            (f.gep(&cx.scratch, &start, "f32"), f.i64(bl.width as i64), false)
        }
    }
}

/// Adds steps `k0..k1` of a product to the accumulators.
#[allow(clippy::too_many_arguments, reason = "the loop's frame")]
pub(super) fn multiply(
    f: &mut Func,
    cx: &Context,
    group: usize,
    product: usize,
    at: &Place,
    masks: &[Option<Val>],
    rows: u64,
    acc: Vec<Val>,
    (k0, k1): (&Val, &Val),
) -> Vec<Val> {
    let p = &cx.an.products[product];
    let nv = cx.bl.vectors;
    let rank = p.left.strides.len();
    let (down, along) = (cx.stride(f, &p.left.strides[rank - 2]), cx.stride(f, &p.left.strides[rank - 1]));
    let left = cx.base(f, &p.left, &at.batch);
    let start = f.mul(&at.row, &down);
    let left = f.gep(&left, &start, "f32");
    // Rows at a static distance are displacements of one address.
    let lefts: Vec<(Val, i64)> = (0..rows as i64)
        .map(|i| match down.known() {
            Some(d) => (left.clone(), d * i),
            None => {
                let d = f.mulc(&down, i);
                (f.gep(&left, &d, "f32"), 0)
            }
        })
        .collect();
    let (right, step, masked) = right_of(f, cx, group, product, at);
    let tile = rows as usize * nv;
    let steps = (CHAINS / (tile * cx.bl.registers)).clamp(1, 8);
    let steps = 1usize << steps.ilog2();
    let one = |f: &mut Func, k: &Val, acc: &[Val]| -> Vec<Val> {
        let r = f.mul(k, &step);
        let r = f.gep(&right, &r, "f32");
        let b: Vec<Val> = (0..nv)
            .map(|j| {
                let d = f.i64((j * LANES) as i64);
                let q = f.gep(&r, &d, "f32");
                match &masks[j] {
                    Some(m) if masked => f.masked_load(&q, m, "f32", LANES),
                    _ => f.load(&q, &vector()),
                }
            })
            .collect();
        let l = f.mul(k, &along);
        let mut out = Vec::with_capacity(tile);
        let mut last: Option<(Val, Val)> = None;
        for (i, (row, d)) in lefts.iter().enumerate() {
            // One address per distinct base; the rest is displacement.
            let q = match &last {
                Some((base, q)) if base == row => q.clone(),
                _ => f.gep(row, &l, "f32"),
            };
            last = Some((row.clone(), q.clone()));
            let d = f.i64(*d);
            let q = f.gep(&q, &d, "f32");
            let x = f.load(&q, "f32");
            let x = f.splat(&x, "f32", LANES);
            for (j, b) in b.iter().enumerate() {
                out.push(f.op(format!("math.fma {x}, {b}, {} : {}", acc[i * nv + j], vector())));
            }
        }
        out
    };
    let types = |v: Vec<Val>| v.into_iter().map(|x| (x, vector())).collect::<Vec<_>>();
    if steps == 1 {
        return f.for_(k0, k1, 1, &types(acc), |f, k, acc| one(f, k, acc));
    }
    let mut all = acc;
    for _ in 1..steps {
        all.extend(zeros(f, cx, rows));
    }
    let length = f.sub(k1, k0);
    let turns = f.divc(&length, steps as i64);
    let whole = f.mulc(&turns, steps as i64);
    let middle = f.add(k0, &whole);
    let mut all = f.for_(k0, &middle, steps as i64, &types(all), |f, k, acc| {
        let mut out = vec![];
        for u in 0..steps {
            let k = f.addc(k, u as i64);
            out.extend(one(f, &k, &acc[u * tile..(u + 1) * tile]));
        }
        out
    });
    // Pairs, so that the order is a fixed tree.
    let mut n = steps;
    while n > 1 {
        n /= 2;
        for u in 0..n {
            for c in 0..tile {
                let (a, b) = (all[u * tile + c].clone(), all[(u + n) * tile + c].clone());
                all[u * tile + c] = f.op(format!("arith.addf {a}, {b} : {}", vector()));
            }
        }
    }
    all.truncate(tile);
    if middle.known().is_some() && middle.known() == k1.known() {
        return all;
    }
    f.for_(&middle, k1, 1, &types(all), |f, k, acc| one(f, k, acc))
}

/// The sum of a group over all steps, or, where sums run in parts, what of it comes before the last product's parts.
pub(super) fn chain(
    f: &mut Func,
    cx: &Context,
    group: usize,
    at: &Place,
    masks: &[Option<Val>],
    rows: u64,
    products: &[usize],
) -> Result<Vec<Val>, String> {
    let g = &cx.an.groups[group];
    let mut acc = zeros(f, cx, rows);
    for (n, p) in products.iter().enumerate() {
        let (k0, k1) = (f.i64(0), cx.dim(f, cx.an.products[*p].k));
        acc = multiply(f, cx, group, *p, at, masks, rows, acc, (&k0, &k1));
        if n == 0 {
            acc = scaled(f, cx, g.scale, acc)?;
        }
    }
    Ok(acc)
}

/// Accumulators times a rank-0 value.
pub(super) fn scaled(
    f: &mut Func,
    cx: &Context,
    scale: Option<pleach_ir::ValueId>,
    acc: Vec<Val>,
) -> Result<Vec<Val>, String> {
    let Some(s) = scale else { return Ok(acc) };
    let s = super::scalar(f, cx, s)?;
    Ok(acc.into_iter().map(|x| f.op(format!("arith.mulf {x}, {s} : {}", vector()))).collect())
}
