//! The matrix-multiply microkernel: a tile of rows and vectors of columns held in registers over the sum.
//!
//! Per step of the sum: the vectors of the right operand are loaded once, one element of each row of the left operand
//! is broadcast, and every pair is multiplied and added. Tiles too small to hide the latency of that run several steps
//! at a time, each with accumulators of its own.
//!
//! A step of bf16 is a pair of elements. Targets with dot products of pairs use them; elsewhere both halves are widened
//! in integer registers and multiplied as f32, so that no 16-bit vector occurs.

use super::analyze::{Product, Right, Term, Values};
use super::blocking::LANES;
use super::coded::{self, CodedAt};
use super::context::{Context, Place};
use super::pack;
use super::view::View;
use crate::emit::elementwise::memory_elem;
use crate::emit::func::{Func, Val, vty};
use pleach_ir::ValueId;

/// Bytes of a cache line.
const LINE: u64 = 64;

/// Accumulating registers that keep the multipliers busy.
const CHAINS: usize = 12;

pub(super) fn vector() -> String {
    vty(LANES, "f32")
}

/// Zeros for a tile.
pub(super) fn zeros(f: &mut Func, cx: &Context, rows: u64) -> Vec<Val> {
    let z = f.f32(0.0, LANES);
    vec![z; rows as usize * cx.bl.vectors]
}

/// Where the tile's columns of a right operand lie.
struct RightAt {
    /// Step 0.
    base: Val,
    /// Elements between steps.
    step: Val,
    /// Columns past the end do not exist in memory.
    masked: bool,
}

/// The tile's rows of a left operand.
struct LeftAt {
    /// Per row: address of step 0, and a displacement in elements.
    rows: Vec<(Val, i64)>,
    /// Elements between steps.
    step: Val,
    /// Odd sums end with half a pair, in place.
    in_place: bool,
}

/// `from`: the first element of the sum that is packed.
fn right_of(f: &mut Func, cx: &Context, group: usize, product: usize, at: &Place, from: &Val) -> RightAt {
    let (g, p, bl) = (&cx.an.groups[group], &cx.an.products[product], cx.bl);
    let elem = memory_elem(p.dtype);
    let pair = if p.pairs() { 2 } else { 1 };
    match &p.right {
        Right::Panels { arg, nr } => {
            let column = f.addc(&at.column, g.offset as i64);
            let (panel, inside) = (f.divc(&column, *nr as i64), f.remc(&column, *nr as i64));
            let k = cx.dim(f, p.k);
            let k = f.ceil_divc(&k, pair);
            let size = f.mulc(&k, pair * *nr as i64);
            let start = f.mul(&panel, &size);
            let inside = f.mulc(&inside, pair);
            let start = if *nr == bl.width { start } else { f.add(&start, &inside) };
            let base = f.gep(&cx.buffers[*arg], &start, elem);
            RightAt { base, step: f.i64(pair * *nr as i64), masked: false }
        }
        Right::Rows(v) if !p.packs_right => {
            let base = cx.base(f, v, p.dtype, &at.batch);
            let column = f.addc(&at.column, g.offset as i64);
            let step = cx.stride(f, &v.strides[v.strides.len() - 2]);
            RightAt { base: f.gep(&base, &column, elem), step, masked: true }
        }
        _ => {
            let base = pack::panel(f, cx, group, product, &at.slot);
            let back = f.mulc(from, -(bl.width as i64));
            let base = f.gep(&base, &back, elem);
            RightAt { base, step: f.i64(pair * bl.width as i64), masked: false }
        }
    }
}

fn left_of(f: &mut Func, cx: &Context, group: usize, product: usize, at: &Place, rows: u64, from: &Val) -> LeftAt {
    let p = &cx.an.products[product];
    let elem = memory_elem(p.dtype);
    if p.packs_left {
        let block = cx.bl.left_block as i64;
        let pair = if p.pairs() { 2 } else { 1 };
        let (base, next) = pack::left(f, cx, group, product);
        let back = f.mulc(from, -block);
        let row = f.sub(&at.row, &at.row0);
        let (b, inside) = (f.divc(&row, block), f.remc(&row, block));
        let b = f.mul(&b, &next);
        let inside = f.mulc(&inside, pair);
        let start = f.add(&back, &b);
        let start = f.add(&start, &inside);
        let base = f.gep(&base, &start, elem);
        let rows = (0..rows as i64).map(|i| (base.clone(), pair * i)).collect();
        return LeftAt { rows, step: f.i64(pair * block), in_place: false };
    }
    let rank = p.left.strides.len();
    let (down, along) = (cx.stride(f, &p.left.strides[rank - 2]), cx.stride(f, &p.left.strides[rank - 1]));
    let left = cx.base(f, &p.left, p.dtype, &at.batch);
    let start = f.mul(&at.row, &down);
    let left = f.gep(&left, &start, elem);
    // Rows at a static distance are displacements of one address.
    let rows = (0..rows as i64)
        .map(|i| match down.known() {
            Some(d) => (left.clone(), d * i),
            None => {
                let d = f.mulc(&down, i);
                (f.gep(&left, &d, elem), 0)
            }
        })
        .collect();
    let step = if p.pairs() { f.i64(2) } else { along };
    LeftAt { rows, step, in_place: true }
}

/// Columns up to which a row of the left operand is used too briefly to come in time: two tiles.
const BRIEF: u64 = 2;

/// Fetches the rows of the left operands that the next tile of rows reads, where there are hardly any columns: each row is then
/// used once, for so short a time that its lines would be waited for.
pub(super) fn prefetch_rows(f: &mut Func, cx: &Context, batch: &[Val], row: &Val, rows: u64) {
    if cx.an.n.known().is_none_or(|n| n > BRIEF * cx.bl.width) {
        return;
    }
    let mut seen: Vec<&View> = vec![];
    for (product, _) in cx.an.groups.iter().flat_map(|g| &g.products) {
        let p = &cx.an.products[*product];
        let rank = p.left.strides.len();
        let (down, along) = (p.left.strides[rank - 2].known(), p.left.strides[rank - 1].known());
        let (Some(down), Some(1), Some(k), false) = (down, along, p.k.known(), p.packs_left) else { continue };
        if seen.contains(&&p.left) {
            continue;
        }
        seen.push(&p.left);
        let elem = memory_elem(p.dtype);
        let base = cx.base(f, &p.left, p.dtype, batch);
        let next = f.addc(row, rows as i64);
        let start = f.mulc(&next, down as i64);
        let base = f.gep(&base, &start, elem);
        let line = (LINE / p.dtype.size()) as i64;
        let (zero, end) = (f.i64(0), f.i64(k as i64));
        f.loop_(&zero, &end, line, |f, at| {
            let q = f.gep(&base, at, elem);
            for i in 0..rows as i64 {
                let d = f.i64(i * down as i64);
                let q = f.gep(&q, &d, elem);
                f.prefetch(&q);
            }
        });
    }
}

/// The vectors of the right operand at a step: for split pairs, the first halves, then the second ones.
fn right_vectors(f: &mut Func, cx: &Context, p: &Product, right: &RightAt, masks: &[Option<Val>], s: &Val) -> Vec<Val> {
    let elem = memory_elem(p.dtype);
    let at = f.mul(s, &right.step);
    let r = f.gep(&right.base, &at, elem);
    let pair = if p.pairs() { 2 } else { 1 };
    let loaded: Vec<Val> = (0..cx.bl.vectors)
        .map(|j| {
            let d = f.i64((pair * j * LANES) as i64);
            let q = f.gep(&r, &d, elem);
            match (&masks[j], p.pairs(), cx.dot) {
                (_, true, true) => f.load(&q, "vector<32xbf16>"),
                (_, true, false) => f.load(&q, "vector<16xi32>"),
                (Some(m), ..) if right.masked => f.masked_load(&q, m, "f32", LANES),
                _ => f.load(&q, &vector()),
            }
        })
        .collect();
    if !p.pairs() || cx.dot {
        return loaded;
    }
    let first: Vec<Val> = loaded.iter().map(|x| first_half(f, x)).collect();
    let second = loaded.iter().map(|x| second_half(f, x));
    first.into_iter().chain(second.collect::<Vec<_>>()).collect()
}

/// The first bf16 of each pair as f32.
fn first_half(f: &mut Func, x: &Val) -> Val {
    let c = f.i32(16, LANES);
    let y = f.op(format!("arith.shli {x}, {c} : vector<16xi32>"));
    f.op(format!("arith.bitcast {y} : vector<16xi32> to {}", vector()))
}

/// The second bf16 of each pair as f32.
fn second_half(f: &mut Func, x: &Val) -> Val {
    let c = f.i32(-65536, LANES);
    let y = f.op(format!("arith.andi {x}, {c} : vector<16xi32>"));
    f.op(format!("arith.bitcast {y} : vector<16xi32> to {}", vector()))
}

/// A step of a tile: `half`, only the first element of the left pair exists.
#[allow(clippy::too_many_arguments, reason = "the step's frame")]
fn step(
    f: &mut Func,
    cx: &Context,
    (p, v): (&Product, &Values),
    left: &LeftAt,
    right: &RightAt,
    masks: &[Option<Val>],
    s: &Val,
    acc: &[Val],
    half: bool,
) -> Vec<Val> {
    let nv = cx.bl.vectors;
    let b = f.of(&v.right, |f| right_vectors(f, cx, p, right, masks, s));
    let x = f.of(&v.left, |f| left_values(f, p, left, s, half));
    let mut out = Vec::with_capacity(acc.len());
    for (x, acc) in x.iter().zip(acc.chunks(nv)) {
        if !p.pairs() {
            out.extend(fma(f, x, &b, acc));
        } else if cx.dot {
            out.extend(dot(f, x, &b, acc));
        } else {
            let now = {
                let x = first_half(f, x);
                fma(f, &x, &b[..nv], acc)
            };
            let x = second_half(f, x);
            out.extend(fma(f, &x, &b[nv..], &now));
        }
    }
    out
}

/// The elements of a step of the left operand in every lane, row by row: f32, or pairs as i32.
fn left_values(f: &mut Func, p: &Product, left: &LeftAt, s: &Val, half: bool) -> Vec<Val> {
    let elem = memory_elem(p.dtype);
    let l = f.mul(s, &left.step);
    let mut last: Option<(Val, Val)> = None;
    let mut out = vec![];
    for (row, d) in &left.rows {
        // One address per distinct base; the rest is displacement.
        let q = match &last {
            Some((base, q)) if base == row => q.clone(),
            _ => f.gep(row, &l, elem),
        };
        last = Some((row.clone(), q.clone()));
        let d = f.i64(*d);
        let q = f.gep(&q, &d, elem);
        let (x, elem) = if !p.pairs() {
            (f.load(&q, "f32"), "f32")
        } else if half {
            let x = f.load(&q, "i16");
            (f.op(format!("arith.extui {x} : i16 to i32")), "i32")
        } else {
            (f.op(format!("llvm.load {q} {{alignment = 2 : i64}} : !llvm.ptr -> i32")), "i32")
        };
        out.push(f.splat(&x, elem, LANES));
    }
    out
}

/// Accumulators plus a row's element times the vectors of the right operand.
fn fma(f: &mut Func, x: &Val, b: &[Val], acc: &[Val]) -> Vec<Val> {
    acc.iter().zip(b).map(|(a, b)| f.op(format!("math.fma {x}, {b}, {a} : {}", vector()))).collect()
}

/// The same for pairs of bf16.
fn dot(f: &mut Func, x: &Val, b: &[Val], acc: &[Val]) -> Vec<Val> {
    let x = f.op(format!("llvm.bitcast {x} : vector<16xi32> to vector<32xbf16>"));
    let product = |(a, b): (&Val, &Val)| {
        f.op(format!(
            "llvm.call_intrinsic \"llvm.x86.avx512bf16.dpbf16ps.512\"({a}, {x}, {b}) : (vector<16xf32>, \
             vector<32xbf16>, vector<32xbf16>) -> vector<16xf32>"
        ))
    };
    acc.iter().zip(b).map(product).collect()
}

/// Adds elements `k0..k1` of a product's sum to the accumulators; `k0` is even. What is packed begins at `k0`.
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
    let (p, v) = (&cx.an.products[product], &cx.an.values[product]);
    let left = f.of(&v.left, |f| left_of(f, cx, group, product, at, rows, k0));
    if !p.packs_right {
        let column = coded::column(f, cx, group, at);
        if let Some(right) = f.of(&v.right, |f| CodedAt::new(f, cx, p, &column)) {
            return f.of(&v.product, |f| coded_sum(f, cx, (p, v), (&left, &right), rows, acc, (k0, k1)));
        }
    }
    let right = f.of(&v.right, |f| right_of(f, cx, group, product, at, k0));
    f.of(&v.product, |f| sum(f, cx, (p, v), (&left, &right), masks, rows, acc, (k0, k1)))
}

/// The loops over a product's sum.
#[allow(clippy::too_many_arguments, reason = "the loop's frame")]
fn sum(
    f: &mut Func,
    cx: &Context,
    p: (&Product, &Values),
    (left, right): (&LeftAt, &RightAt),
    masks: &[Option<Val>],
    rows: u64,
    acc: Vec<Val>,
    (k0, k1): (&Val, &Val),
) -> Vec<Val> {
    let tile = rows as usize * cx.bl.vectors;
    let steps = steps_at_once(cx, tile);
    let types = |v: Vec<Val>| v.into_iter().map(|x| (x, vector())).collect::<Vec<_>>();
    // From elements to steps. Half a pair at the end is whole where the left operand was packed.
    let (low, high) = match (p.0.pairs(), left.in_place) {
        (false, _) => (k0.clone(), k1.clone()),
        (true, true) => (f.divc(k0, 2), f.divc(k1, 2)),
        (true, false) => (f.divc(k0, 2), f.ceil_divc(k1, 2)),
    };
    let mut all = acc;
    let mut middle = low.clone();
    if steps > 1 {
        for _ in 1..steps {
            all.extend(zeros(f, cx, rows));
        }
        let length = f.sub(&high, &low);
        let turns = f.divc(&length, steps as i64);
        let whole = f.mulc(&turns, steps as i64);
        middle = f.add(&low, &whole);
        all = f.for_(&low, &middle, steps as i64, &types(all), |f, s, acc| {
            let mut out = vec![];
            for u in 0..steps {
                let s = f.addc(s, u as i64);
                out.extend(step(f, cx, p, left, right, masks, &s, &acc[u * tile..(u + 1) * tile], false));
            }
            out
        });
        joined(f, &mut all, tile);
    }
    if middle.known().is_none() || middle.known() != high.known() {
        all = f.for_(&middle, &high, 1, &types(all), |f, s, acc| step(f, cx, p, left, right, masks, s, acc, false));
    }
    let even = p.0.k.known().is_some_and(|k| k % 2 == 0);
    if !p.0.pairs() || !left.in_place || even {
        return all;
    }
    let up = f.ceil_divc(k1, 2);
    f.for_(&high, &up, 1, &types(all), |f, s, acc| step(f, cx, p, left, right, masks, s, acc, true))
}

/// Steps that a tile of so many vectors takes at a time, each with accumulators of its own.
fn steps_at_once(cx: &Context, tile: usize) -> usize {
    let steps = (CHAINS / (tile * cx.bl.registers)).clamp(1, 8);
    1usize << steps.ilog2()
}

/// Adds up accumulators of a tile, in pairs, so that the order is a fixed tree.
fn joined(f: &mut Func, all: &mut Vec<Val>, tile: usize) {
    let mut n = all.len() / tile;
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
}

/// The loops over a product's sum whose right operand is decoded in registers; sums are made in the order of [`sum`].
fn coded_sum(
    f: &mut Func,
    cx: &Context,
    (p, v): (&Product, &Values),
    (left, right): (&LeftAt, &CodedAt),
    rows: u64,
    acc: Vec<Val>,
    (k0, k1): (&Val, &Val),
) -> Vec<Val> {
    let nv = cx.bl.vectors;
    let tile = rows as usize * nv;
    let steps = steps_at_once(cx, tile);
    let mut all = acc;
    for _ in 1..steps {
        all.extend(zeros(f, cx, rows));
    }
    // A pair of bf16 is one step.
    let turn = if p.pairs() { steps } else { (steps / 2).max(1) };
    let inits: Vec<_> = all.into_iter().map(|x| (x, vector())).collect();
    let mut all = right.walk(f, (k0, k1), turn, &inits, &mut |f, pair, found, carried| {
        let mut all = carried.to_vec();
        for (u, columns) in found.iter().enumerate() {
            let pair = f.addc(pair, u as i64);
            for half in 0..if p.pairs() { 1 } else { 2 } {
                let (s, set) = if p.pairs() {
                    (pair.clone(), u)
                } else {
                    let s = f.mulc(&pair, 2);
                    (f.addc(&s, half as i64), (2 * u + half) % steps)
                };
                let x = f.of(&v.left, |f| left_values(f, p, left, &s, false));
                for (i, x) in x.iter().enumerate() {
                    for (j, w) in columns.iter().enumerate() {
                        let at = set * tile + i * nv + j;
                        let a = all[at].clone();
                        all[at] = match w {
                            coded::Step::Plain(w) => fma(f, x, &w[half..=half], &[a]),
                            coded::Step::Pair(w) => dot(f, x, std::slice::from_ref(w), &[a]),
                            coded::Step::Halves(w) => {
                                let (low, high) = (first_half(f, x), second_half(f, x));
                                let a = fma(f, &low, &w[..1], &[a]);
                                fma(f, &high, &w[1..], &a)
                            }
                        }
                        .remove(0);
                    }
                }
            }
        }
        all
    });
    joined(f, &mut all, tile);
    all
}

/// Adds whole products to the accumulators (`None`: zeros).
#[allow(clippy::too_many_arguments, reason = "the tile's frame")]
pub(super) fn chain(
    f: &mut Func,
    cx: &Context,
    group: usize,
    at: &Place,
    masks: &[Option<Val>],
    rows: u64,
    acc: Option<Vec<Val>>,
    products: &[Term],
) -> Result<Vec<Val>, String> {
    let mut sum = acc;
    for (p, scale) in products {
        let (k0, k1) = (f.i64(0), cx.dim(f, cx.an.products[*p].k));
        let start = match (&sum, scale) {
            (Some(a), None) => a.clone(),
            _ => zeros(f, cx, rows),
        };
        // Two tiles do not fit the registers: the sum waits in memory, not among the values of the loop.
        let spare = f.i64(super::partial_elements(cx.an, cx.bl) as i64);
        let spare = f.gep(&cx.scratch, &spare, "f32");
        let spot = |f: &mut Func, i: usize| f.i64((i * LANES) as i64);
        if let (Some(a), Some(_)) = (&sum, scale) {
            for (i, x) in a.iter().enumerate() {
                let d = spot(f, i);
                f.store_at(x, &spare, &d, "f32", LANES);
            }
        }
        let x = multiply(f, cx, group, *p, at, masks, rows, start, (&k0, &k1));
        sum = Some(match (sum, scale) {
            (_, None) => x,
            (None, Some(s)) => f.of(&cx.an.values[*p].product, |f| scaled(f, cx, *s, x))?,
            (Some(_), Some(s)) => {
                let s = super::scalar(f, cx, *s)?;
                let mut out = vec![];
                for (i, x) in x.iter().enumerate() {
                    let d = spot(f, i);
                    let a = f.load_at(&spare, &d, "f32", LANES);
                    let fma = format!("math.fma {x}, {s}, {a} : {}", vector());
                    out.push(f.of(&cx.an.values[*p].product, |f| f.op(fma)));
                }
                out
            }
        });
    }
    Ok(sum.unwrap_or_else(|| zeros(f, cx, rows)))
}

/// Accumulators times a rank-0 value.
pub(super) fn scaled(f: &mut Func, cx: &Context, scale: ValueId, acc: Vec<Val>) -> Result<Vec<Val>, String> {
    let s = super::scalar(f, cx, scale)?;
    Ok(acc.into_iter().map(|x| f.op(format!("arith.mulf {x}, {s} : {}", vector()))).collect())
}
