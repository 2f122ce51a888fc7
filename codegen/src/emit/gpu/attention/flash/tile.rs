//! Tiles in shared memory, fragments of products, and numbers in base 2.
//!
//! A row of a tile has 16 bytes more than a head: then neither copies nor matrix loads collide in banks, for any width that is
//! a multiple of 16.

use super::{THREADS, Thread};
use crate::emit::attention::view::RowView;
use crate::emit::func::{Func, Val};
use crate::emit::gpu::launch::shared_at;
use crate::emit::gpu::mma;

/// Elements of 16 bytes.
const PIECE: i64 = 8;

/// A matrix of rows of heads in global memory.
pub(super) struct Source {
    base: Val,
    stride: i64,
    d: i64,
}

impl Source {
    pub(super) fn new(f: &mut Func, v: &RowView, d: i64) -> Source {
        let base = f.arg(&format!("p{}", v.operand));
        let offset = f.i64(v.offset);
        let base = f.gep(&base, &offset, "i16");
        let base = f.op(format!("llvm.addrspacecast {base} : !llvm.ptr to !llvm.ptr<1>"));
        Source { base, stride: v.stride, d }
    }

    /// Bytes of a row of a tile.
    pub(super) fn pitch(d: i64) -> i64 {
        2 * d + 16
    }

    /// Starts the copies of `rows` rows of a head, from `first` on, to byte `to` of shared memory; zeros from row `end` on.
    ///
    /// A row is shared by a power of two of threads, some of them idle where its pieces are no power of two: then a thread's
    /// places differ by constants, where each would be a division that waits in registers of its own.
    pub(super) fn fill(&self, f: &mut Func, t: &Thread, rows: i64, head: &Val, (first, end): (&Val, &Val), to: &Val) {
        let pieces = self.d / PIECE;
        let lanes = (pieces as u64).next_power_of_two() as i64;
        let at_once = THREADS / lanes;
        let (row, piece) = (f.divc(&t.tid, lanes), f.remc(&t.tid, lanes));
        let copies = |f: &mut Func| {
            let (a, b) = (f.mulc(&row, Source::pitch(self.d)), f.mulc(&piece, 16));
            let place = f.add(&a, &b);
            let place = f.add(&place, to);
            let own = f.add(first, &row);
            let line = f.mulc(&own, self.stride);
            let start = f.mulc(head, self.d);
            let at = f.add(&line, &start);
            let within = f.mulc(&piece, PIECE);
            let at = f.add(&at, &within);
            for i in 0..(rows as u64).div_ceil(at_once as u64) as i64 {
                let copy = |f: &mut Func| {
                    let own = f.addc(&own, i * at_once);
                    let inside = f.cmp("slt", &own, end);
                    let (at, zero) = (f.addc(&at, i * at_once * self.stride), f.i64(0));
                    let at = f.op(format!("arith.select {inside}, {at}, {zero} : i64"));
                    let from = f.op(format!(
                        "llvm.getelementptr {}[{at}] : (!llvm.ptr<1>, i64) -> !llvm.ptr<1>, i16",
                        self.base
                    ));
                    let (all, none) = (f.i32(16, 1), f.i32(0, 1));
                    let bytes = f.op(format!("arith.select {inside}, {all}, {none} : i32"));
                    let place = f.addc(&place, i * at_once * Source::pitch(self.d));
                    let place = shared_at(f, &t.smem, &place, "i8");
                    f.stmt(&format!(
                        "nvvm.cp.async.shared.global {place}, {from}, 16, cache = cg, {bytes} : !llvm.ptr<3>, !llvm.ptr<1>, i32"
                    ));
                };
                if (i + 1) * at_once <= rows {
                    copy(f);
                } else {
                    let last = f.i64(rows - i * at_once);
                    let some = f.cmp("slt", &row, &last);
                    f.if_(&some, copy);
                }
            }
        };
        if lanes == pieces {
            copies(f);
        } else {
            let width = f.i64(pieces);
            let busy = f.cmp("slt", &piece, &width);
            f.if_(&busy, copies);
        }
    }
}

pub(super) fn commit(f: &mut Func) {
    f.stmt("nvvm.cp.async.commit.group");
}

/// Own copies have arrived, and all threads have come here.
pub(super) fn arrive(f: &mut Func) {
    f.stmt("nvvm.cp.async.wait.group 0");
    f.stmt("nvvm.barrier0");
}

/// Shared addresses of a lane for matrix loads from a tile of pitch `pitch`.
pub(super) struct Lanes {
    /// 16 rows by 16 columns as a left operand, or turned as a right one.
    whole: Val,
    /// 16 rows by 16 columns as right operands of two products, rows being columns of the result.
    rows: Val,
    pitch: i64,
}

impl Lanes {
    pub(super) fn new(f: &mut Func, t: &Thread, d: i64) -> Lanes {
        let pitch = Source::pitch(d);
        let (low, half) = (f.remc(&t.lane, 16), f.divc(&t.lane, 16));
        let (a, b) = (f.mulc(&low, pitch), f.mulc(&half, 16));
        let whole = f.add(&a, &b);
        let (eighth, low) = (f.divc(&t.lane, 8), f.remc(&t.lane, 8));
        let odd = f.remc(&eighth, 2);
        let far = f.mulc(&half, 8);
        let row = f.add(&far, &low);
        let (a, b) = (f.mulc(&row, pitch), f.mulc(&odd, 16));
        let rows = f.add(&a, &b);
        Lanes { whole, rows, pitch }
    }

    fn load(&self, f: &mut Func, t: &Thread, lane: &Val, tile: &Val, byte: i64, turned: bool) -> [Val; 4] {
        let at = f.add(lane, tile);
        let at = shared_at(f, &t.smem, &at, "i8");
        let offset = f.i64(byte);
        let at = shared_at(f, &at, &offset, "i8");
        mma::load(f, &at, turned)
    }

    /// A left operand: rows `row..row + 16` of a tile, columns `column..column + 16`.
    pub(super) fn left(&self, f: &mut Func, t: &Thread, tile: &Val, row: i64, column: i64) -> [Val; 4] {
        self.load(f, t, &self.whole, tile, row * self.pitch + 2 * column, false)
    }

    /// Right operands of two products whose columns are the rows `row..row + 16` of a tile, for its columns
    /// `column..column + 16`.
    pub(super) fn by_rows(&self, f: &mut Func, t: &Thread, tile: &Val, row: i64, column: i64) -> [Val; 4] {
        self.load(f, t, &self.rows, tile, row * self.pitch + 2 * column, false)
    }

    /// Right operands of two products whose columns are the columns `column..column + 16` of a tile, for its rows
    /// `row..row + 16`.
    pub(super) fn by_columns(&self, f: &mut Func, t: &Thread, tile: &Val, row: i64, column: i64) -> [Val; 4] {
        self.load(f, t, &self.whole, tile, row * self.pitch + 2 * column, true)
    }
}

/// c + a · b for 16 rows and 8 columns.
pub(super) fn multiply(f: &mut Func, a: &[Val; 4], b: &[Val], c: &mut [Val]) {
    mma::multiply(f, a.each_ref(), [&b[0], &b[1]], c);
}

/// Two f32 as a pair of bf16 in an i32, `low` in the lower half.
pub(super) fn pack(f: &mut Func, low: &Val, high: &Val) -> Val {
    let v = pair(f, low, high);
    f.op(format!("llvm.bitcast {v} : vector<2xbf16> to i32"))
}

/// Two f32 as a pair of bf16.
pub(super) fn pair(f: &mut Func, low: &Val, high: &Val) -> Val {
    f.op(format!("nvvm.convert.f32x2.to.bf16x2 {high}, {low} {{rnd = #nvvm.fp_rnd_mode<rn>}} : vector<2xbf16>"))
}

/// Accumulators of 16 columns as the left operand of a product that sums over them.
pub(super) fn as_left(f: &mut Func, x: &[Val], columns: usize) -> [Val; 4] {
    let at = columns / 8 * 4;
    [0, 2, 4, 6].map(|i| pack(f, &x[at + i], &x[at + i + 1]))
}

/// 2ˣ.
pub(super) fn exp2(f: &mut Func, x: &Val) -> Val {
    f.op(format!("llvm.call_intrinsic \"llvm.nvvm.ex2.approx.ftz.f\"({x}) : (f32) -> f32"))
}

/// log₂ x.
pub(super) fn log2(f: &mut Func, x: &Val) -> Val {
    f.op(format!("llvm.call_intrinsic \"llvm.nvvm.lg2.approx.ftz.f\"({x}) : (f32) -> f32"))
}

pub(super) fn fma(f: &mut Func, a: &Val, b: &Val, c: &Val) -> Val {
    f.op(format!("math.fma {a}, {b}, {c} : f32"))
}

pub(super) fn binary(f: &mut Func, op: &str, a: &Val, b: &Val) -> Val {
    f.op(format!("arith.{op} {a}, {b} : f32"))
}

/// Combines the four lanes of a row.
pub(super) fn across(f: &mut Func, x: &Val, largest: bool) -> Val {
    let (all, last) = (f.i32(-1, 1), f.i32(31, 1));
    let mut x = x.clone();
    for step in [1, 2] {
        let step = f.i32(step, 1);
        let other = f.op(format!("nvvm.shfl.sync bfly {all}, {x}, {step}, {last} : f32 -> f32"));
        x = if largest {
            f.op(format!("llvm.intr.maxnum({x}, {other}) : (f32, f32) -> f32"))
        } else {
            binary(f, "addf", &x, &other)
        };
    }
    x
}

/// Values of type f32 that a loop carries.
pub(super) fn carried(list: &[Val]) -> Vec<(Val, String)> {
    list.iter().map(|x| (x.clone(), "f32".to_string())).collect()
}
