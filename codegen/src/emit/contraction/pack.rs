//! Operands that cannot be read in place, copied into scratch memory by the task that needs them.
//!
//! A right operand becomes panels, `[tile][steps][width]`; a left one blocks of rows, `[block][steps][rows]`. A step is
//! one element of f32 or a pair of bf16, `(k, k + 1)` side by side; a missing second half is zero. Lanes past the last
//! column or row are undefined, and so are the results they lead to, which nobody stores.
//!
//! Three ways: rows along the lanes are copied or interleaved; rows along the sum are transposed in registers, 16 by 16
//! steps; anything else goes element by element.

use super::analyze::Right;
use super::blocking::{DEPTH_STEP, LANES, Pack, Side};
use super::blocks;
use super::coded;
use super::context::Context;
use super::{Span, partial_elements, spare_elements};
use crate::emit::elementwise::memory_elem;
use crate::emit::func::{Func, Val, transpose, vty};
use pleach_ir::DType;

/// Bytes of a pack: its depth, rounded up, times its width.
fn bytes(f: &mut Func, cx: &Context, p: &Pack) -> Val {
    let d = depth(f, cx, p);
    f.mulc(&d, p.width_bytes as i64)
}

/// Elements along the sum that a pack has room for.
fn depth(f: &mut Func, cx: &Context, p: &Pack) -> Val {
    let d = cx.dim(f, p.depth);
    let d = f.addc(&d, p.slack as i64);
    let d = f.ceil_divc(&d, DEPTH_STEP as i64);
    f.mulc(&d, DEPTH_STEP as i64)
}

/// Address of the packed operand of a product of a group.
fn place(f: &mut Func, cx: &Context, side: Side, product: usize) -> (Val, Val) {
    let mut sum = f.i64(4 * (partial_elements(cx.an, cx.bl) + spare_elements(cx.an, cx.bl)) as i64);
    for p in &cx.bl.packs {
        if p.side == side && p.product == product {
            let d = depth(f, cx, p);
            return (f.gep(&cx.scratch, &sum, "i8"), d);
        }
        let n = bytes(f, cx, p);
        sum = f.add(&sum, &n);
    }
    unreachable!("every operand that is read from scratch memory was given a place there")
}

/// Address of the packed panel of a tile.
pub(super) fn panel(f: &mut Func, cx: &Context, group: usize, product: usize, slot: &Val) -> Val {
    let (base, depth) = place(f, cx, Side::Right(group), product);
    let size = f.mulc(&depth, cx.bl.width as i64);
    let at = f.mul(slot, &size);
    f.gep(&base, &at, memory_elem(cx.an.products[product].dtype))
}

/// Address of the packed left operand of a task, and elements between its blocks.
pub(super) fn left(f: &mut Func, cx: &Context, group: usize, product: usize) -> (Val, Val) {
    let (base, depth) = place(f, cx, Side::Left(group), product);
    (base, f.mulc(&depth, cx.bl.left_block as i64))
}

/// What is copied: elements `(k, c)` at `base + k·along + c·across`.
struct Block<'a> {
    dtype: DType,
    base: Val,
    along: Val,
    across: Val,
    /// Elements along the sum.
    depth: &'a Val,
    /// Columns (or rows) that exist.
    real: Val,
    to: Val,
    /// Columns of a line, up to 16.
    columns: i64,
    /// Elements between lines in scratch memory.
    line: Val,
    /// Elements between steps in scratch memory.
    step: i64,
    /// Lines, where that many always exist in full.
    full: Option<i64>,
    /// Steps by which memory is fetched ahead.
    ahead: i64,
}

/// Packs steps `k0..k1` of a product of a group, for the tiles `first..last` and the rows of a task.
pub(super) fn pack(
    f: &mut Func,
    cx: &Context,
    batch: &[Val],
    span: &Span,
    (first, last): (&Val, &Val),
    (group, product): (usize, usize),
    (k0, k1): (&Val, &Val),
) {
    let (p, values) = (&cx.an.products[product], &cx.an.values[product]);
    let elem = memory_elem(p.dtype);
    let depth = f.sub(k1, k0);
    if p.packs_left {
        let rank = p.left.strides.len();
        let (across, along) = (cx.stride(f, &p.left.strides[rank - 2]), cx.stride(f, &p.left.strides[rank - 1]));
        let base = cx.base(f, &p.left, p.dtype, batch);
        let low = f.mul(&span.rows.0, &across);
        let skip = f.mul(k0, &along);
        let at = f.add(&low, &skip);
        let base = f.gep(&base, &at, elem);
        let real = f.sub(&span.rows.1, &span.rows.0);
        let (to, line) = left(f, cx, group, product);
        let columns = cx.bl.left_block as i64;
        let step = columns * if p.pairs() { 2 } else { 1 };
        let whole = cx.an.m.known().is_some_and(|m| m % columns as u64 == 0);
        let full = cx.an.m.known().filter(|m| whole && *m <= cx.bl.task_rows).map(|m| m as i64 / columns);
        let full = full.filter(|n| *n <= 4);
        let b =
            Block { dtype: p.dtype, base, along, across, depth: &depth, real, to, columns, line, step, full, ahead: 8 };
        f.of(&values.left, |f| copy(f, cx, &b, whole));
    }
    if !p.packs_right {
        return;
    }
    if let Right::Coded { .. } | Right::Blocks(_) = p.right {
        return f.of(&values.right, |f| {
            f.loop_(first, last, 1, |f, tile| {
                let slot = f.sub(tile, first);
                let to = panel(f, cx, group, product, &slot);
                let column = f.mulc(tile, cx.bl.width as i64);
                let column = f.addc(&column, cx.an.groups[group].offset as i64);
                match p.right {
                    Right::Coded { .. } => coded::unpack(f, cx, p, &column, &to, (k0, k1)),
                    _ => blocks::unpack(f, cx, p, &column, &to, (k0, k1)),
                }
            });
        });
    }
    let (Right::Rows(v) | Right::Strided(v)) = &p.right else { return };
    let rank = v.strides.len();
    let (along, across) = (cx.stride(f, &v.strides[rank - 2]), cx.stride(f, &v.strides[rank - 1]));
    let base = cx.base(f, v, p.dtype, batch);
    let skip = f.mul(k0, &along);
    let base = f.gep(&base, &skip, elem);
    let n = cx.dim(f, cx.an.n);
    let offset = cx.an.groups[group].offset as i64;
    let width = cx.bl.width as i64;
    let (lanes, pair) = (LANES as i64, if p.pairs() { 2 } else { 1 });
    let whole = cx.an.n.known().is_some_and(|n| n.is_multiple_of(LANES as u64));
    let full = cx.an.n.known().filter(|n| n.is_multiple_of(width as u64)).map(|_| width / lanes);
    let line = f.i64(lanes * pair);
    f.loop_(first, last, 1, |f, tile| {
        let slot = f.sub(tile, first);
        let to = panel(f, cx, group, product, &slot);
        let column = f.mulc(tile, width);
        let left = f.sub(&n, &column);
        let wide = f.i64(width);
        let real = f.min(&left, &wide);
        let at = f.addc(&column, offset);
        let at = f.mul(&at, &across);
        let base = f.gep(&base, &at, elem);
        let (along, across, line) = (along.clone(), across.clone(), line.clone());
        let (depth, step) = (&depth, width * pair);
        let b =
            Block { dtype: p.dtype, base, along, across, depth, real, to, columns: lanes, line, step, full, ahead: 32 };
        f.of(&values.right, |f| copy(f, cx, &b, whole));
    });
}

/// `whole`: lines are never partly filled.
fn copy(f: &mut Func, cx: &Context, b: &Block, whole: bool) {
    // Masked loads of 16-bit elements are slow where vectors have no masks of their own.
    let masks = cx.bl.registers == 1 || b.dtype == DType::F32;
    let deep = b.depth.known().is_some_and(|d| d % (16 * per_step(b)) == 0);
    let transposed = b.along.known() == Some(1) && (masks || (whole && deep));
    let (zero, lanes) = (f.i64(0), LANES as i64);
    if b.across.known() == Some(1) && (masks || whole) {
        interleave(f, cx, b, whole);
    } else if transposed {
        let end = if whole {
            b.real.clone()
        } else {
            let n = f.divc(&b.real, lanes);
            f.mulc(&n, lanes)
        };
        f.loop_(&zero, &end, lanes, |f, c| square(f, b, c, None));
        if !whole {
            let rest = f.sub(&b.real, &end);
            let some = f.cmp("sgt", &rest, &zero);
            f.if_(&some, |f| square(f, b, &end, Some(&rest)));
        }
    } else {
        elements(f, b);
    }
}

/// Elements of a step.
fn per_step(b: &Block) -> i64 {
    if b.dtype == DType::BF16 { 2 } else { 1 }
}

/// Where element `(k, c)` lies, in elements.
fn spot(f: &mut Func, b: &Block, k: &Val, c: &Val) -> Val {
    let n = per_step(b);
    let (q, r) = (f.divc(k, n), f.remc(k, n));
    let q = f.mulc(&q, b.step);
    let (line, c) = (f.divc(c, b.columns), f.remc(c, b.columns));
    let line = f.mul(&line, &b.line);
    let c = f.mulc(&c, n);
    let at = f.add(&q, &line);
    let at = f.add(&at, &c);
    f.add(&at, &r)
}

/// Element by element.
fn elements(f: &mut Func, b: &Block) {
    let elem = memory_elem(b.dtype);
    let zero = f.i64(0);
    f.loop_(&zero, &b.real, 1, |f, c| {
        let at = f.mul(c, &b.across);
        let from = f.gep(&b.base, &at, elem);
        f.loop_(&zero, b.depth, 1, |f, k| {
            let at = f.mul(k, &b.along);
            let x = f.load_at(&from, &at, elem, 1);
            let d = spot(f, b, k, c);
            f.store_at(&x, &b.to, &d, elem, 1);
        });
        if b.dtype == DType::BF16 {
            let odd = f.remc(b.depth, 2);
            f.loop_(&zero, &odd, 1, |f, _| {
                let x = f.konst("0 : i16");
                let d = spot(f, b, b.depth, c);
                f.store_at(&x, &b.to, &d, elem, 1);
            });
        }
    });
}

/// All columns step by step; neighbouring columns lie side by side in memory. `whole`: lines are.
fn interleave(f: &mut Func, cx: &Context, b: &Block, whole: bool) {
    let zero = f.i64(0);
    let lines = f.divc(&b.real, b.columns);
    let done = f.mulc(&lines, b.columns);
    let rest = f.sub(&b.real, &done);
    // A line of fewer than 16 columns is stored whole; the next step, or the slack, lies under its end.
    let part = f.i64(b.columns);
    let short = (b.columns < LANES as i64).then(|| f.lane_mask(&part, LANES));
    let mask = (!whole).then(|| f.lane_mask(&rest, LANES));
    let pair = per_step(b);
    let each = |f: &mut Func, s: &Val, half: bool| {
        f.loop_(&zero, &lines, 1, |f, l| one_line(f, cx, b, (s, half), l, short.as_ref()));
        if let Some(mask) = &mask {
            let some = f.cmp("sgt", &rest, &zero);
            f.if_(&some, |f| one_line(f, cx, b, (s, half), &lines, Some(mask)));
        }
    };
    let steps = f.divc(b.depth, pair);
    f.loop_(&zero, &steps, 1, |f, s| match b.full {
        Some(n) => {
            for l in 0..n {
                let l = f.i64(l);
                one_line(f, cx, b, (s, false), &l, short.as_ref());
            }
        }
        None => each(f, s, false),
    });
    if pair == 2 && b.depth.known().is_none_or(|d| d % 2 == 1) {
        // The last element of an odd depth has zero for its partner.
        let up = f.ceil_divc(b.depth, 2);
        f.loop_(&steps, &up, 1, |f, s| each(f, s, true));
    }
}

/// A line of a step; `half`: the second element of the pair does not exist.
fn one_line(f: &mut Func, cx: &Context, b: &Block, (s, half): (&Val, bool), l: &Val, mask: Option<&Val>) {
    let elem = memory_elem(b.dtype);
    let pair = per_step(b);
    let c = f.mulc(l, b.columns);
    let load = |f: &mut Func, k: &Val| {
        let at = f.mul(k, &b.along);
        let p = f.gep(&b.base, &at, elem);
        let p = f.gep(&p, &c, elem);
        match mask {
            None => f.load(&p, &vty(LANES, elem)),
            Some(m) => f.masked_load(&p, m, elem, LANES),
        }
    };
    let k = f.mulc(s, pair);
    for i in 0..pair {
        let next = f.addc(&k, b.ahead * pair + i);
        let at = f.mul(&next, &b.along);
        let p = f.gep(&b.base, &at, elem);
        let p = f.gep(&p, &c, elem);
        f.prefetch(&p);
    }
    let x = load(f, &k);
    let row = f.mulc(s, b.step);
    let to = f.gep(&b.to, &row, elem);
    let line = f.mul(l, &b.line);
    let to = f.gep(&to, &line, elem);
    if pair == 1 {
        return f.store(&x, &to, &vty(LANES, elem));
    }
    if half {
        let x = widen(f, &x);
        return f.store(&x, &to, "vector<16xi32>");
    }
    let next = f.addc(&k, 1);
    let y = load(f, &next);
    let z = if cx.bl.registers == 1 {
        let order = (0..LANES).map(|i| format!("{i}, {}", i + LANES)).collect::<Vec<_>>().join(", ");
        f.op(format!("vector.shuffle {x}, {y} [{order}] : vector<16xi16>, vector<16xi16>"))
    } else {
        let (x, y) = (widen(f, &x), widen(f, &y));
        let sixteen = f.i32(16, LANES);
        let y = f.op(format!("arith.shli {y}, {sixteen} : vector<16xi32>"));
        let z = f.op(format!("arith.ori {x}, {y} : vector<16xi32>"));
        f.op(format!("llvm.bitcast {z} : vector<16xi32> to vector<32xi16>"))
    };
    f.store(&z, &to, &vty(2 * LANES, elem));
}

fn widen(f: &mut Func, x: &Val) -> Val {
    f.op(format!("arith.extui {x} : vector<16xi16> to vector<16xi32>"))
}

/// 16 columns of all steps; neighbouring steps lie side by side in memory. `rest`: fewer columns exist.
fn square(f: &mut Func, b: &Block, c: &Val, rest: Option<&Val>) {
    let elem = memory_elem(b.dtype);
    let deep = 16 * per_step(b);
    let at = f.mul(c, &b.across);
    let from = f.gep(&b.base, &at, elem);
    let c2 = f.mulc(c, per_step(b));
    let to = f.gep(&b.to, &c2, elem);
    // `left`: elements along the sum that exist, where not all do.
    let turn = |f: &mut Func, k: &Val, left: Option<&Val>| {
        let from = f.gep(&from, k, elem);
        let zero = f.i64(0);
        let mut rows = vec![];
        for i in 0..LANES as i64 {
            // The same steps of the next 16 columns are needed soon.
            let d = f.mulc(&b.across, i + LANES as i64);
            let p = f.gep(&from, &d, elem);
            f.prefetch(&p);
            let d = f.mulc(&b.across, i);
            let p = f.gep(&from, &d, elem);
            let x = if rest.is_none() && left.is_none() {
                f.load(&p, &vty(deep as usize, elem))
            } else {
                let mut n = left.cloned().unwrap_or_else(|| f.i64(deep));
                if let Some(rest) = rest {
                    let i = f.i64(i);
                    let here = f.cmp("slt", &i, rest);
                    n = f.op(format!("arith.select {here}, {n}, {zero} : i64"));
                }
                let mask = f.lane_mask(&n, deep as usize);
                f.masked_load(&p, &mask, elem, deep as usize)
            };
            rows.push(f.op(format!("llvm.bitcast {x} : {} to vector<16xi32>", vty(deep as usize, elem))));
        }
        let rows = transpose(f, rows, "i32");
        let d = f.mulc(k, b.step / per_step(b));
        let to = f.gep(&to, &d, elem);
        for (i, x) in rows.iter().enumerate() {
            let d = f.i64(i as i64 * b.step);
            let p = f.gep(&to, &d, elem);
            f.store(x, &p, "vector<16xi32>");
        }
    };
    let zero = f.i64(0);
    let n = f.divc(b.depth, deep);
    let end = f.mulc(&n, deep);
    f.loop_(&zero, &end, deep, |f, k| turn(f, k, None));
    if end.known().is_some() && end.known() == b.depth.known() {
        return;
    }
    let left = f.sub(b.depth, &end);
    let some = f.cmp("sgt", &left, &zero);
    f.if_(&some, |f| turn(f, &end, Some(&left)));
}
