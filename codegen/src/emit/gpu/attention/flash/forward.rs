//! The result of attention, and its log-sum-exp, for 64 queries of a head.
//!
//! Key by key tile: scores, their running maximum and sum in base 2, and the weights times the values on top of what was
//! there, scaled down when the maximum grew.

use super::tile::{Lanes, Source, across, arrive, as_left, binary, carried, commit, exp2, fma, log2, multiply, pair};
use super::{Flash, ROWS, THREADS, Thread};
use crate::emit::attention::view::strip_reshape;
use crate::emit::func::{Func, Val};
use crate::emit::gpu::attention::packed::Sequence;
use crate::emit::gpu::launch::Unit;
use crate::emit::gpu::pull::Pull;
use crate::error::CodegenError;
use pleach_ir::{DType, Sym};
use pleach_plan::Launch;
use std::f32::consts::{LN_2, LOG2_E};

/// Below every score, yet finite: differences of it are numbers.
const LOWEST: f32 = -1e30;

/// The widest head whose queries stay in registers.
const KEPT: i64 = 128;

/// Accumulators of a thread for a block of queries.
struct State {
    /// Result, four for every 8 columns; empty when only the log-sum-exp is wanted.
    out: Vec<Val>,
    /// Largest score and sum of the two rows.
    top: [Val; 2],
    sum: [Val; 2],
}

impl State {
    fn list(&self) -> Vec<Val> {
        [&self.out[..], &self.top, &self.sum].concat()
    }

    fn of(list: &[Val]) -> State {
        let n = list.len() - 4;
        let two = |i: usize| [list[n + i].clone(), list[n + i + 1].clone()];
        State { out: list[..n].to_vec(), top: two(0), sum: two(2) }
    }
}

/// The block's tile of queries and what the loop over keys needs.
struct Forward<'a, 'b> {
    x: &'a Flash<'b>,
    t: Thread,
    lanes: Lanes,
    /// Keys of a tile.
    keys: i64,
    k: Source,
    v: Option<Source>,
    kv_head: Val,
    /// Fragments of the queries, where they stay.
    queries: Vec<[Val; 4]>,
    /// Where the queries lie in shared memory, where the stages begin.
    own: Val,
    stages: i64,
    factor: Val,
}

pub(super) fn emit(x: &Flash<'_>, symbols: &[Sym]) -> Result<(String, Launch), CodegenError> {
    let d = x.d;
    let keys = if d > KEPT { 32 } else { 64 };
    let pitch = Source::pitch(d);
    // Queries that stay in registers leave their place to the stages.
    let stages = if d > KEPT { ROWS * pitch } else { 0 };
    let kinds = 1 + i64::from(x.c.out.is_some());
    let bytes = stages + (2 * kinds * keys * pitch).max(ROWS * pitch);
    let mut unit = Unit::new(x.k, "", false);
    let f = &mut unit.f;
    let mut p = Pull::new(f, x.k, symbols);
    let t = Thread::new(f);
    let rows = p.dim(f, x.rows[0]);
    let inside = f.cmp("slt", &t.block, &rows);
    x.guarded(f, &mut p, |f, p| f.if_(&inside, |f| block(x, t, f, p, (keys, stages), &rows)));
    p.finish()?;
    Ok(unit.finish(x.blocks(0, symbols)?, THREADS as u32, bytes as u32, if d > 64 { 1 } else { 2 }))
}

fn block(x: &Flash<'_>, t: Thread, f: &mut Func, p: &mut Pull<'_>, (keys, stages): (i64, i64), rows: &Val) {
    let (Some(q), Some(k)) = (x.source(f, 0), x.source(f, 1)) else {
        p.fail("queries and keys must lie in rows");
        return;
    };
    let v = if x.c.out.is_some() { x.source(f, 2) } else { None };
    let lanes = Lanes::new(f, &t, x.d);
    let zero = f.i64(0);
    q.fill(f, &t, ROWS, &t.head, (&t.block, rows), &zero);
    commit(f);
    arrive(f);
    let warp = t.warp_row(f);
    let own = f.mulc(&warp, Source::pitch(x.d));
    let mut queries = vec![];
    if x.d <= KEPT {
        queries = (0..x.d / 16).map(|i| lanes.left(f, &t, &own, 0, 16 * i)).collect();
    }
    let group = i64::from(x.c.at.heads / x.c.at.kv_heads);
    let kv_head = f.divc(&t.head, group);
    let factor = f.f32(f32::from_bits(x.c.at.scale) * LOG2_E, 1);
    let w = Forward { x, t, lanes, keys, k, v, kv_head, queries, own, stages, factor };
    let (none, lowest) = (f.f32(0.0, 1), f.f32(LOWEST, 1));
    let count = if x.c.out.is_some() { x.d / 2 } else { 0 };
    let start =
        State { out: vec![none.clone(); count as usize], top: [lowest.clone(), lowest], sum: [none.clone(), none] };
    // Every sequence that has a row here.
    let last = f.addc(&w.t.block, ROWS - 1);
    let end = f.addc(rows, -1);
    let last = f.min(&last, &end);
    let (first, last) = (Sequence::find(f, p, x.c, &w.t.block), Sequence::find(f, p, x.c, &last));
    let past = f.addc(&last, 1);
    let done = f.for_(&first, &past, 1, &carried(&start.list()), |f, s, now| {
        let s = Sequence::of(f, p, x.c, s);
        w.sequence(f, &s, State::of(now)).list()
    });
    w.write(f, p, rows, State::of(&done));
}

impl Forward<'_, '_> {
    fn stage(&self, f: &mut Func, tile: &Val) -> Val {
        let n = f.remc(tile, 2);
        let kinds = 1 + i64::from(self.v.is_some());
        let at = f.mulc(&n, kinds * self.keys * Source::pitch(self.x.d));
        f.addc(&at, self.stages)
    }

    fn fill(&self, f: &mut Func, s: &Sequence, first: &Val, to: &Val) {
        let (start, end) = (f.add(&s.k0, first), f.add(&s.k0, &s.keys));
        self.k.fill(f, &self.t, self.keys, &self.kv_head, (&start, &end), to);
        if let Some(v) = &self.v {
            let to = f.addc(to, self.keys * Source::pitch(self.x.d));
            v.fill(f, &self.t, self.keys, &self.kv_head, (&start, &end), &to);
        }
        commit(f);
    }

    /// What a query of the block, by its row within the block, sees of a sequence: nothing if it is not of it.
    fn sees(&self, f: &mut Func, s: &Sequence, row: &Val) -> (Val, Val) {
        let at = f.add(&self.t.block, row);
        let i = f.sub(&at, &s.q0);
        let own = f.cmp("ult", &i, &s.queries);
        let (lo, hi) = s.sees(f, self.x.c, &i);
        let zero = f.i64(0);
        let lo = f.op(format!("arith.select {own}, {lo}, {zero} : i64"));
        (lo, f.op(format!("arith.select {own}, {hi}, {zero} : i64")))
    }

    fn sequence(&self, f: &mut Func, s: &Sequence, state: State) -> State {
        // Queries of the block that are of the sequence, and all keys that they see.
        let (end, zero) = (f.addc(&self.t.block, ROWS), f.i64(0));
        let (low, high) = (f.sub(&self.t.block, &s.q0), f.sub(&end, &s.q0));
        let (low, high) = (f.max(&low, &zero), f.min(&high, &s.queries));
        let (from, _) = s.sees(f, self.x.c, &low);
        let before = f.addc(&high, -1);
        let (_, to) = s.sees(f, self.x.c, &before);
        let some = f.cmp("slt", &low, &high);
        let to = f.op(format!("arith.select {some}, {to}, {zero} : i64"));
        let first = f.divc(&from, self.keys);
        let last = f.ceil_divc(&to, self.keys);
        // What this thread's rows see, and all rows of its warp.
        let warp = self.t.warp_row(f);
        let row = f.add(&warp, &self.t.row);
        let far = f.addc(&row, 8);
        let bounds = [self.sees(f, s, &row), self.sees(f, s, &far)];
        let end = f.addc(&warp, 15);
        let (all_hi, all_lo) = (self.sees(f, s, &warp).1, self.sees(f, s, &end));
        let in_all = f.cmp("slt", &all_lo.0, &all_lo.1);
        let all_lo = all_lo.0;
        let bounds = bounds.map(|(lo, hi)| {
            let span = f.sub(&hi, &lo);
            let span = f.max(&span, &zero);
            (lo, f.op(format!("arith.trunci {span} : i64 to i32")))
        });
        // The last sequence's tiles have been read.
        f.stmt("nvvm.barrier0");
        let any = f.cmp("slt", &first, &last);
        f.if_(&any, |f| {
            let (at, to) = (f.mulc(&first, self.keys), self.stage(f, &first));
            self.fill(f, s, &at, &to);
        });
        let out = f.for_(&first, &last, 1, &carried(&state.list()), |f, tile, now| {
            arrive(f);
            let next = f.addc(tile, 1);
            let more = f.cmp("slt", &next, &last);
            f.if_(&more, |f| {
                let (at, to) = (f.mulc(&next, self.keys), self.stage(f, &next));
                self.fill(f, s, &at, &to);
            });
            let (at, stage) = (f.mulc(tile, self.keys), self.stage(f, tile));
            let scores = self.scores(f, &stage);
            let end = f.addc(&at, self.keys);
            let (a, b) = (f.cmp("sge", &at, &all_lo), f.cmp("sle", &end, &all_hi));
            let whole = f.op(format!("arith.andi {a}, {b} : i1"));
            let whole = f.op(format!("arith.andi {whole}, {in_all} : i1"));
            let types = vec!["f32".to_string(); scores.len()];
            let plain = scores.clone();
            let scores = f.if_else(&whole, &types, |_| plain, |f| self.masked(f, &scores, &at, &bounds));
            self.weigh(f, &stage, scores, State::of(now)).list()
        });
        State::of(&out)
    }

    /// The block's queries times the keys of a tile: 16 rows of the warp, all keys.
    fn scores(&self, f: &mut Func, stage: &Val) -> Vec<Val> {
        let none = f.f32(0.0, 1);
        let mut s = vec![none; (self.keys / 2) as usize];
        for i in 0..self.x.d / 16 {
            let kept = self.queries.get(i as usize).cloned();
            let a = kept.unwrap_or_else(|| self.lanes.left(f, &self.t, &self.own, 0, 16 * i));
            for j in 0..self.keys / 16 {
                let b = self.lanes.by_rows(f, &self.t, stage, 16 * j, 16 * i);
                let at = (8 * j) as usize;
                multiply(f, &a, &b[..2], &mut s[at..at + 4]);
                multiply(f, &a, &b[2..], &mut s[at + 4..at + 8]);
            }
        }
        s
    }

    /// Scores without those of keys that a row does not see. `bounds`: first key and number of keys of both rows.
    fn masked(&self, f: &mut Func, scores: &[Val], at: &Val, bounds: &[(Val, Val); 2]) -> Vec<Val> {
        let least = f.f32(f32::NEG_INFINITY, 1);
        let column = f.add(at, &self.t.pair);
        let from = [0, 1].map(|h: usize| {
            let x = f.sub(&column, &bounds[h].0);
            f.op(format!("arith.trunci {x} : i64 to i32"))
        });
        let mut out = vec![];
        for (i, x) in scores.iter().enumerate() {
            let (h, step) = (i % 4 / 2, f.i32((8 * (i / 4) + i % 2) as i32, 1));
            let key = f.op(format!("arith.addi {}, {step} : i32", from[h]));
            let seen = f.op(format!("arith.cmpi ult, {key}, {} : i32", bounds[h].1));
            out.push(f.op(format!("arith.select {seen}, {x}, {least} : f32")));
        }
        out
    }

    /// Takes the scores of a tile into the state.
    fn weigh(&self, f: &mut Func, stage: &Val, scores: Vec<Val>, mut state: State) -> State {
        let mut top = state.top.clone();
        for (i, x) in scores.iter().enumerate() {
            let t = &mut top[i % 4 / 2];
            *t = f.op(format!("llvm.intr.maxnum({t}, {x}) : (f32, f32) -> f32"));
        }
        let top = top.map(|x| across(f, &x, true));
        // -top in base 2; how much less what was there counts now.
        let zero = f.f32(0.0, 1);
        let base = [0, 1].map(|h| {
            let x = binary(f, "mulf", &top[h], &self.factor);
            binary(f, "subf", &zero, &x)
        });
        let keep = [0, 1].map(|h| {
            let less = binary(f, "subf", &state.top[h], &top[h]);
            let x = binary(f, "mulf", &less, &self.factor);
            exp2(f, &x)
        });
        state.sum = [0, 1].map(|h| binary(f, "mulf", &state.sum[h], &keep[h]));
        let mut weights = vec![];
        for (i, x) in scores.iter().enumerate() {
            let h = i % 4 / 2;
            let x = fma(f, x, &self.factor, &base[h]);
            let x = exp2(f, &x);
            state.sum[h] = binary(f, "addf", &state.sum[h], &x);
            weights.push(x);
        }
        state.top = top;
        if self.v.is_some() {
            for (i, x) in state.out.iter_mut().enumerate() {
                *x = binary(f, "mulf", x, &keep[i % 4 / 2]);
            }
            let values = f.addc(stage, self.keys * Source::pitch(self.x.d));
            for j in 0..self.keys / 16 {
                let a = as_left(f, &weights, (16 * j) as usize);
                for i in 0..self.x.d / 16 {
                    let b = self.lanes.by_columns(f, &self.t, &values, 16 * j, 16 * i);
                    let at = (8 * i) as usize;
                    multiply(f, &a, &b[..2], &mut state.out[at..at + 4]);
                    multiply(f, &a, &b[2..], &mut state.out[at + 4..at + 8]);
                }
            }
        }
        state
    }

    fn write(&self, f: &mut Func, p: &mut Pull<'_>, rows: &Val, state: State) {
        let warp = self.t.warp_row(f);
        let first = f.add(&self.t.block, &warp);
        let first = f.add(&first, &self.t.row);
        for h in 0..2 {
            let sum = across(f, &state.sum[h], false);
            let row = f.addc(&first, 8 * h as i64);
            let inside = f.cmp("slt", &row, rows);
            f.if_(&inside, |f| {
                if let Some(r) = self.x.c.out {
                    let one = f.f32(1.0, 1);
                    let inverse = binary(f, "divf", &one, &sum);
                    let own: Vec<Val> = (0..self.x.d / 8)
                        .flat_map(|i| [0, 1].map(|e| (4 * i) as usize + 2 * h + e))
                        .map(|i| binary(f, "mulf", &state.out[i], &inverse))
                        .collect();
                    store_row(f, p, self.x, r, &self.t, &self.t.head, &row, &own);
                }
                if let Some(r) = self.x.c.lse {
                    let zero = f.i64(0);
                    let leads = f.cmp("eq", &self.t.pair, &zero);
                    f.if_(&leads, |f| {
                        let (two, scaled) = (f.f32(LN_2, 1), binary(f, "mulf", &state.top[h], &self.factor));
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
