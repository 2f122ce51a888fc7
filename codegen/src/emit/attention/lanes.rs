//! Between rows of the operands and lanes of the scratch memory, where every lane is a padded row.

use super::view::RowView;
use super::{Config, Task};
use crate::emit::elementwise::{load, round_to, store};
use crate::emit::func::{Func, Val, vty};
use crate::emit::vmath::Math;

/// For every row and head of the block: row, head, lane.
pub(super) fn each_lane(f: &mut Func, rows: &Val, heads: &Val, body: impl Fn(&mut Func, &Val, &Val, &Val)) {
    let zero = f.i64(0);
    f.loop_(&zero, rows, 1, |f, r| {
        let base = f.mul(r, heads);
        f.loop_(&zero, heads, 1, |f, h| {
            let lane = f.add(&base, h);
            body(f, r, h, &lane);
        });
    });
}

/// Element of a row of q or of the result where a head starts.
pub(super) fn head_at(f: &mut Func, c: &Config, [r0, h0]: [&Val; 2], [r, h]: [&Val; 2], stride: i64) -> Val {
    let row = f.add(r0, r);
    let row = f.mulc(&row, stride);
    let head = f.add(h0, h);
    let head = f.mulc(&head, c.d);
    f.add(&row, &head)
}

/// Runs `body` for each vector of a head: first element, and the mask of a partial last vector.
pub(super) fn each_vector(f: &mut Func, c: &Config, mut body: impl FnMut(&mut Func, &Val, Option<&Val>)) {
    let (zero, w) = (f.i64(0), c.w as i64);
    let whole = f.i64(c.d / w * w);
    f.loop_(&zero, &whole, w, |f, e| body(f, e, None));
    if c.d % w != 0 {
        let mask = tail_mask(f, c);
        body(f, &whole, Some(&mask));
    }
}

/// The lanes of the last, partial vector of a head.
pub(super) fn tail_mask(f: &mut Func, c: &Config) -> Val {
    let bits = (0..c.w as i64).map(|i| (i < c.d % c.w as i64).to_string()).collect::<Vec<_>>().join(", ");
    f.konst(&format!("dense<[{bits}]> : {}", vty(c.w, "i1")))
}

/// Copies `n` rows of a head to an area of padded rows, as f32.
pub(super) fn widen_rows(f: &mut Func, c: &Config, (from, stride): (&Val, i64), area: &Val, n: &Val) {
    let zero = f.i64(0);
    f.loop_(&zero, n, 1, |f, r| {
        let at = f.mulc(r, stride);
        let row = f.gep(from, &at, c.elem());
        each_vector(f, c, |f, e, mask| {
            let p = f.gep(&row, e, c.elem());
            let x = load(f, c.dtype, &p, mask, c.w);
            let to = lane_at(f, c, area, r, e);
            f.store(&x, &to, &c.vf());
        });
    });
}

/// `lane * dp + e` of an area by lane.
pub(super) fn lane_at(f: &mut Func, c: &Config, area: &Val, lane: &Val, e: &Val) -> Val {
    let at = f.mulc(lane, c.dp);
    let at = f.add(&at, e);
    f.gep(area, &at, "f32")
}

/// Copies rows of a head to an area of `[pair of rows][dp]`, bf16: the first row in the low halves, zero for a second one that is
/// past the end.
pub(super) fn pair_rows(f: &mut Func, c: &Config, (from, stride): (&Val, i64), area: &Val, n: &Val) {
    let zero = f.i64(0);
    let whole = f.divc(n, 2);
    let all = f.ceil_divc(n, 2);
    for (low, high, both) in [(&zero, &whole, true), (&whole, &all, false)] {
        f.loop_(low, high, 1, |f, r| {
            let at = f.mulc(r, 2 * stride);
            let row = f.gep(from, &at, c.elem());
            each_vector(f, c, |f, e, mask| {
                let p = f.gep(&row, e, c.elem());
                let x = load(f, c.dtype, &p, mask, c.w);
                let y = if both {
                    let next = f.i64(stride);
                    let p = f.gep(&p, &next, c.elem());
                    load(f, c.dtype, &p, mask, c.w)
                } else {
                    f.f32(0.0, c.w)
                };
                let pair = pair(f, c, &x, &y);
                let to = lane_at(f, c, area, r, e);
                f.store(&pair, &to, &c.vi());
            });
        });
    }
}

/// Two vectors of f32 that are bf16 values, as pairs: `x` in the low halves.
pub(super) fn pair(f: &mut Func, c: &Config, x: &Val, y: &Val) -> Val {
    let (vf, vi, c16) = (c.vf(), c.vi(), f.i32(16, c.w));
    let x = f.op(format!("arith.bitcast {x} : {vf} to {vi}"));
    let y = f.op(format!("arith.bitcast {y} : {vf} to {vi}"));
    let x = f.op(format!("arith.shrui {x}, {c16} : {vi}"));
    f.op(format!("arith.ori {x}, {y} : {vi}"))
}

/// Multiplies the queries of all lanes by the factor on the scores.
pub(super) fn scale_lanes(f: &mut Func, c: &Config, t: &Task) {
    let (zero, vf) = (f.i64(0), c.vf());
    let scale = f.f32(f32::from_bits(c.at.scale), c.w);
    let end = f.mulc(&t.lanes, c.dp);
    f.loop_(&zero, &end, c.w as i64, |f, i| {
        let x = f.load_at(&t.by_lane, i, "f32", c.w);
        let x = f.op(format!("arith.mulf {x}, {scale} : {vf}"));
        f.store_at(&x, &t.by_lane, i, "f32", c.w);
    });
}

/// Copies one query to its lane, times `scale`, and notes the keys it sees. `first`: row, head, position of the block's first.
pub(super) fn gather_query(
    f: &mut Func,
    c: &Config,
    t: &Task,
    [r0, h0, pos]: [&Val; 3],
    [r, h, lane]: [&Val; 3],
    scale: f32,
) {
    copy_row(f, c, &c.q, [r0, h0], [r, h, lane], &t.by_lane, scale);
    note_keys(f, c, [&t.lo, &t.hi], pos, [r, lane]);
}

/// Copies the part of one row and head to its lane, times `scale`.
pub(super) fn copy_row(
    f: &mut Func,
    c: &Config,
    x: &RowView,
    [r0, h0]: [&Val; 2],
    [r, h, lane]: [&Val; 3],
    area: &Val,
    scale: f32,
) {
    let base = f.buffer(x.operand);
    let at = head_at(f, c, [r0, h0], [r, h], x.stride);
    let at = f.addc(&at, x.offset);
    let from = f.gep(&base, &at, c.elem());
    let vf = c.vf();
    each_vector(f, c, |f, e, mask| {
        let p = f.gep(&from, e, c.elem());
        let mut x = load(f, c.dtype, &p, mask, c.w);
        if scale != 1.0 {
            let scale = f.f32(scale, c.w);
            x = f.op(format!("arith.mulf {x}, {scale} : {vf}"));
        }
        let to = lane_at(f, c, area, lane, e);
        f.store(&x, &to, &vf);
    });
}

/// Notes the first key that a lane sees and the one after the last.
pub(super) fn note_keys(f: &mut Func, c: &Config, [lo, hi]: [&Val; 2], pos: &Val, [r, lane]: [&Val; 2]) {
    if !c.at.causal {
        return;
    }
    let end = f.add(pos, r);
    let end = f.addc(&end, 1);
    let put = |f: &mut Func, x: &Val, to: &Val| {
        let x = f.op(format!("arith.trunci {x} : i64 to i32"));
        f.store_at(&x, to, lane, "i32", 1);
    };
    put(f, &end, hi);
    if let Some(w) = c.at.window {
        let first = f.addc(&end, -i64::from(w));
        put(f, &first, lo);
    }
}

/// Lanes beyond those in use: zero queries that see what they like.
pub(super) fn pad_lanes(f: &mut Func, c: &Config, t: &Task) {
    let (zero, end) = (f.i64(0), f.i64(c.lanes));
    let (none, z) = (f.i32(0, 1), f.f32(0.0, c.w));
    let vf = c.vf();
    f.loop_(&t.lanes, &end, 1, |f, lane| {
        let dp = f.i64(c.dp);
        f.loop_(&zero, &dp, c.w as i64, |f, e| {
            let to = lane_at(f, c, &t.by_lane, lane, e);
            f.store(&z, &to, &vf);
        });
        f.store_at(&none, &t.lo, lane, "i32", 1);
        f.store_at(&none, &t.hi, lane, "i32", 1);
    });
}

/// Divides a lane's result by its sum and writes it where it belongs; the logarithm of the sum of exponentials too.
pub(super) fn put_result(f: &mut Func, c: &Config, t: &Task, [r0, h0]: [&Val; 2], [r, h, lane]: [&Val; 3]) {
    if let Some(lse) = c.lse {
        let (row, head) = (f.add(r0, r), f.add(h0, h));
        let at = f.mulc(&row, i64::from(c.at.heads));
        let at = f.add(&at, &head);
        let (top, sum) = (f.load_at(&t.top, lane, "f32", 1), f.load_at(&t.sum, lane, "f32", 1));
        let mut m = Math { f, lanes: 1 };
        let log = m.log(&sum);
        let x = m.bin("addf", &top, &log);
        let lse = f.buffer(lse);
        f.store_at(&x, &lse, &at, "f32", 1);
    }
    let Some(out) = c.out else { return };
    let out = f.buffer(out);
    let at = head_at(f, c, [r0, h0], [r, h], i64::from(c.at.heads) * c.d);
    let to = f.gep(&out, &at, c.elem());
    let sum = f.load_at(&t.sum, lane, "f32", 1);
    let one = f.f32(1.0, 1);
    let inv = f.op(format!("arith.divf {one}, {sum} : f32"));
    let inv = f.splat(&inv, "f32", c.w);
    let vf = c.vf();
    each_vector(f, c, |f, e, mask| {
        let p = lane_at(f, c, &t.by_lane, lane, e);
        let x = f.load(&p, &vf);
        let x = f.op(format!("arith.mulf {x}, {inv} : {vf}"));
        let p = f.gep(&to, e, c.elem());
        let x = round_to(f, c.dtype, &x, c.w);
        store(f, c.dtype, &x, &p, mask, c.w);
    });
}
