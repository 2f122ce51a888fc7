//! From scores to weights, for the rows of a warp: what a row sees, running maximum and sum in base 2, and the results.
//!
//! Accumulators of scores have the layout of all products: a thread has two rows, `row` and 8 further on, and of every 8 keys
//! a pair. All forms of attention go through here.

use super::tile::{across, binary, exp2, fma, log2, pair};
use super::{Flash, Thread};
use crate::emit::attention::view::strip_reshape;
use crate::emit::func::{Func, Val};
use crate::emit::gpu::attention::packed::Sequence;
use crate::emit::gpu::pull::Pull;
use crate::emit::gpu::wgmma::settled;
use pleach_ir::DType;
use std::f32::consts::{LN_2, LOG2_E};

/// Below every score, yet finite: differences of it are numbers.
const LOWEST: f32 = -1e30;

/// Largest score and sum of weights of a thread's two rows so far.
#[derive(Clone)]
pub(super) struct Running {
    pub(super) top: [Val; 2],
    pub(super) sum: [Val; 2],
}

impl Running {
    pub(super) fn start(f: &mut Func) -> Running {
        let (none, lowest) = (f.f32(0.0, 1), f.f32(LOWEST, 1));
        Running { top: [lowest.clone(), lowest], sum: [none.clone(), none] }
    }

    pub(super) fn list(&self) -> Vec<Val> {
        [&self.top[..], &self.sum].concat()
    }

    /// The last four values of a list.
    pub(super) fn of(list: &[Val]) -> Running {
        let n = list.len() - 4;
        let two = |i: usize| [list[n + i].clone(), list[n + i + 1].clone()];
        Running { top: two(0), sum: two(2) }
    }
}

/// Rows of queries, 16 for each warp from the thread's block on.
pub(super) struct Softmax<'a, 'b> {
    pub(super) x: &'a Flash<'b>,
    pub(super) t: Thread,
    /// Scale of scores in base 2.
    pub(super) factor: Val,
}

impl<'a, 'b> Softmax<'a, 'b> {
    pub(super) fn new(f: &mut Func, x: &'a Flash<'b>, t: Thread) -> Softmax<'a, 'b> {
        let factor = f.f32(f32::from_bits(x.c.at.scale) * LOG2_E, 1);
        Softmax { x, t, factor }
    }

    /// First and one past the last key that `rows` rows of queries, from `block` on, see of a sequence; both 0 if none of them
    /// is of it.
    pub(super) fn span(&self, f: &mut Func, s: &Sequence, block: &Val, rows: i64) -> (Val, Val) {
        let (end, zero) = (f.addc(block, rows), f.i64(0));
        let (low, high) = (f.sub(block, &s.q0), f.sub(&end, &s.q0));
        let (low, high) = (f.max(&low, &zero), f.min(&high, &s.queries));
        let (from, _) = s.sees(f, self.x.c, &low);
        let before = f.addc(&high, -1);
        let (_, to) = s.sees(f, self.x.c, &before);
        let some = f.cmp("slt", &low, &high);
        let from = f.op(format!("arith.select {some}, {from}, {zero} : i64"));
        (from, f.op(format!("arith.select {some}, {to}, {zero} : i64")))
    }

    /// What a query of the block, by its row within the block, sees of a sequence: nothing if it is not of it.
    pub(super) fn sees(&self, f: &mut Func, s: &Sequence, row: &Val) -> (Val, Val) {
        let at = f.add(&self.t.block, row);
        let i = f.sub(&at, &s.q0);
        let own = f.cmp("ult", &i, &s.queries);
        let (lo, hi) = s.sees(f, self.x.c, &i);
        let zero = f.i64(0);
        let lo = f.op(format!("arith.select {own}, {lo}, {zero} : i64"));
        (lo, f.op(format!("arith.select {own}, {hi}, {zero} : i64")))
    }

    /// First key and number of keys that the thread's two rows see.
    pub(super) fn bounds(&self, f: &mut Func, s: &Sequence) -> [(Val, Val); 2] {
        let warp = self.t.warp_row(f);
        let row = f.add(&warp, &self.t.row);
        let far = f.addc(&row, 8);
        let zero = f.i64(0);
        [row, far].map(|row| {
            let (lo, hi) = self.sees(f, s, &row);
            let span = f.sub(&hi, &lo);
            let span = f.max(&span, &zero);
            (lo, f.op(format!("arith.trunci {span} : i64 to i32")))
        })
    }

    /// Scores without those of keys that a row does not see. `at`: the
    /// tile's first key.
    pub(super) fn masked(&self, f: &mut Func, scores: &[Val], at: &Val, bounds: &[(Val, Val); 2]) -> Vec<Val> {
        let least = f.f32(f32::NEG_INFINITY, 1);
        let from = from(f, &self.t, at, bounds);
        let mut out = vec![];
        for (i, x) in scores.iter().enumerate() {
            let seen = seen(f, &from, bounds, i);
            out.push(f.op(format!("arith.select {seen}, {x}, {least} : f32")));
        }
        out
    }

    /// The weights of a tile's scores, and how much what was there counts now, by row.
    pub(super) fn weigh(&self, f: &mut Func, scores: &[Val], run: &mut Running) -> (Vec<Val>, [Val; 2]) {
        let mut top = run.top.clone();
        for (i, x) in scores.iter().enumerate() {
            let t = &mut top[i % 4 / 2];
            *t = f.op(format!("llvm.intr.maxnum({t}, {x}) : (f32, f32) -> f32"));
        }
        let top = top.map(|x| across(f, &x, true));
        // -top in base 2.
        let zero = f.f32(0.0, 1);
        let base = [0, 1].map(|h| {
            let x = binary(f, "mulf", &top[h], &self.factor);
            binary(f, "subf", &zero, &x)
        });
        let keep = [0, 1].map(|h| {
            let less = binary(f, "subf", &run.top[h], &top[h]);
            let x = binary(f, "mulf", &less, &self.factor);
            exp2(f, &x)
        });
        run.sum = [0, 1].map(|h| binary(f, "mulf", &run.sum[h], &keep[h]));
        let mut weights = vec![];
        for (i, x) in scores.iter().enumerate() {
            let h = i % 4 / 2;
            let x = fma(f, x, &self.factor, &base[h]);
            let x = exp2(f, &x);
            run.sum[h] = binary(f, "addf", &run.sum[h], &x);
            weights.push(x);
        }
        run.top = top;
        (weights, keep)
    }

    /// Writes the results: `out` has four accumulators for every 8 columns of a head.
    pub(super) fn write(&self, f: &mut Func, p: &mut Pull<'_>, rows: &Val, out: &[Val], run: &Running) {
        let warp = self.t.warp_row(f);
        let first = f.add(&self.t.block, &warp);
        let first = f.add(&first, &self.t.row);
        for h in 0..2 {
            let sum = across(f, &run.sum[h], false);
            let row = f.addc(&first, 8 * h as i64);
            let inside = f.cmp("slt", &row, rows);
            f.if_(&inside, |f| {
                if let Some(r) = self.x.c.out {
                    let one = f.f32(1.0, 1);
                    let inverse = binary(f, "divf", &one, &sum);
                    let own: Vec<Val> = (0..self.x.d / 8)
                        .flat_map(|i| [0, 1].map(|e| (4 * i) as usize + 2 * h + e))
                        .map(|i| binary(f, "mulf", &out[i], &inverse))
                        .collect();
                    store_row(f, p, self.x, r, &self.t, &self.t.head, &row, &own);
                }
                if let Some(r) = self.x.c.lse {
                    let zero = f.i64(0);
                    let leads = f.cmp("eq", &self.t.pair, &zero);
                    f.if_(&leads, |f| {
                        let (two, scaled) = (f.f32(LN_2, 1), binary(f, "mulf", &run.top[h], &self.factor));
                        let log = log2(f, &sum);
                        let x = binary(f, "addf", &scaled, &log);
                        let x = binary(f, "mulf", &x, &two);
                        let line = f.mulc(&row, i64::from(self.x.c.at.heads));
                        let at = f.add(&line, &self.t.head);
                        let base = f.arg(&format!("p{}", p.k.operands.len() + r));
                        f.store_at(&x, &base, &at, "f32", 1);
                    });
                }
            });
        }
    }
}

/// First column of a thread in a tile whose first column is `at`, counted from the first one that each of its two rows sees.
fn from(f: &mut Func, t: &Thread, at: &Val, bounds: &[(Val, Val); 2]) -> [Val; 2] {
    let column = f.add(at, &t.pair);
    let from = [0, 1].map(|h: usize| {
        let x = f.sub(&column, &bounds[h].0);
        f.op(format!("arith.trunci {x} : i64 to i32"))
    });
    // Hidden from LLVM, which would carry the column of every accumulator from tile to tile, in two registers each.
    let from = settled(f, &from, "i32", "r");
    [from[0].clone(), from[1].clone()]
}

/// Whether the row of accumulator `i` of a tile sees its column.
fn seen(f: &mut Func, from: &[Val; 2], bounds: &[(Val, Val); 2], i: usize) -> Val {
    let (h, step) = (i % 4 / 2, f.i32((8 * (i / 4) + i % 2) as i32, 1));
    let column = f.op(format!("arith.addi {}, {step} : i32", from[h]));
    f.op(format!("arith.cmpi ult, {column}, {} : i32", bounds[h].1))
}

/// Weights of a tile, and gradients of its scores, from scores and gradients of weights. `numbers`: -log-sum-exp in base 2, and
/// rowsum(d_out · out), of the query that an accumulator belongs to. `masks`: the first column of the tile, and what rows see.
pub(super) fn changes(
    f: &mut Func,
    (t, factor): (&Thread, &Val),
    scores: &[Val],
    products: &[Val],
    masks: Option<(&Val, &[(Val, Val); 2])>,
    mut numbers: impl FnMut(&mut Func, usize) -> (Val, Val),
) -> (Vec<Val>, Vec<Val>) {
    let none = f.f32(0.0, 1);
    let masks = masks.map(|(at, bounds)| (from(f, t, at, bounds), bounds));
    let (mut weights, mut changes) = (vec![], vec![]);
    for (i, (s, g)) in scores.iter().zip(products).enumerate() {
        let (lse, sum) = numbers(f, i);
        let x = fma(f, s, factor, &lse);
        let mut w = exp2(f, &x);
        if let Some((from, bounds)) = &masks {
            let seen = seen(f, from, bounds, i);
            w = f.op(format!("arith.select {seen}, {w}, {none} : f32"));
        }
        let g = binary(f, "subf", g, &sum);
        changes.push(binary(f, "mulf", &w, &g));
        weights.push(w);
    }
    (weights, changes)
}

/// Writes a thread's pairs of columns of one row of a head to result `r`.
#[allow(clippy::too_many_arguments, reason = "a place and what goes there")]
pub(super) fn store_row(
    f: &mut Func,
    p: &mut Pull<'_>,
    x: &Flash<'_>,
    r: usize,
    t: &Thread,
    head: &Val,
    row: &Val,
    own: &[Val],
) {
    let v = strip_reshape(&p.k.body, p.k.body.roots[r].value);
    let ty = p.k.body.ty(v).clone();
    let width = ty.shape.get(1).and_then(|d| d.known()).unwrap_or(0) as i64;
    let line = f.mulc(row, width);
    let start = f.mulc(head, x.d);
    let at = f.add(&line, &start);
    let at = f.add(&at, &t.pair);
    let base = f.arg(&format!("p{}", p.k.operands.len() + r));
    for (i, x) in own.chunks(2).enumerate() {
        let at = f.addc(&at, 8 * i as i64);
        match ty.dtype {
            DType::BF16 => {
                let x = pair(f, &x[0], &x[1]);
                let to = f.gep(&base, &at, "i16");
                f.stmt(&format!("llvm.store {x}, {to} {{alignment = 4 : i64}} : vector<2xbf16>, !llvm.ptr"));
            }
            DType::F32 => {
                for (e, x) in x.iter().enumerate() {
                    let at = f.addc(&at, e as i64);
                    f.store_at(x, &base, &at, "f32", 1);
                }
            }
            other => {
                p.fail(format!("attention gives {other} nowhere"));
            }
        }
    }
}
