//! The result of attention, and its log-sum-exp, for 64 queries of a head.
//!
//! Key by key tile: scores, their running maximum and sum in base 2, and the weights times the values on top of what was
//! there, scaled down when the maximum grew.

use super::softmax::{Running, Softmax};
use super::tile::{Lanes, Source, arrive, as_left, binary, carried, commit, multiply};
use super::{Flash, ROWS, THREADS, Thread};
use crate::emit::func::{Func, Val};
use crate::emit::gpu::attention::packed::Sequence;
use crate::emit::gpu::launch::Unit;
use crate::emit::gpu::pull::Pull;
use crate::error::CodegenError;
use pleach_ir::Sym;
use pleach_plan::Launch;

/// The widest head whose queries stay in registers.
const KEPT: i64 = 128;

/// The block's tile of queries and what the loop over keys needs.
struct Forward<'a, 'b> {
    w: Softmax<'a, 'b>,
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
    let w = Forward { w: Softmax::new(f, x, t), lanes, keys, k, v, kv_head, queries, own, stages };
    // Accumulators of the result, four for every 8 columns; none when only the log-sum-exp is wanted.
    let count = if x.c.out.is_some() { x.d / 2 } else { 0 };
    let start = [vec![f.f32(0.0, 1); count as usize], Running::start(f).list()].concat();
    // Every sequence that has a row here.
    let (first, past) = Sequence::of_rows(f, p, x.c, (&w.w.t.block, ROWS), rows);
    let done = f.for_(&first, &past, 1, &carried(&start), |f, s, now| {
        let s = Sequence::of(f, p, x.c, s);
        w.sequence(f, &s, now)
    });
    w.w.write(f, p, rows, &done, &Running::of(&done));
}

impl Forward<'_, '_> {
    fn stage(&self, f: &mut Func, tile: &Val) -> Val {
        let n = f.remc(tile, 2);
        let kinds = 1 + i64::from(self.v.is_some());
        let at = f.mulc(&n, kinds * self.keys * Source::pitch(self.w.x.d));
        f.addc(&at, self.stages)
    }

    fn fill(&self, f: &mut Func, s: &Sequence, first: &Val, to: &Val) {
        let (start, end) = (f.add(&s.k0, first), f.add(&s.k0, &s.keys));
        self.k.fill(f, &self.w.t, self.keys, &self.kv_head, (&start, &end), to);
        if let Some(v) = &self.v {
            let to = f.addc(to, self.keys * Source::pitch(self.w.x.d));
            v.fill(f, &self.w.t, self.keys, &self.kv_head, (&start, &end), &to);
        }
        commit(f);
    }

    fn sequence(&self, f: &mut Func, s: &Sequence, state: &[Val]) -> Vec<Val> {
        // All keys that the block's queries see.
        let (from, to) = self.w.span(f, s, &self.w.t.block, ROWS);
        let first = f.divc(&from, self.keys);
        let last = f.ceil_divc(&to, self.keys);
        // What this thread's rows see, and all rows of its warp.
        let bounds = self.w.bounds(f, s);
        let warp = self.w.t.warp_row(f);
        let end = f.addc(&warp, 15);
        let (all_hi, all_lo) = (self.w.sees(f, s, &warp).1, self.w.sees(f, s, &end));
        let in_all = f.cmp("slt", &all_lo.0, &all_lo.1);
        let all_lo = all_lo.0;
        // The last sequence's tiles have been read.
        f.stmt("nvvm.barrier0");
        let any = f.cmp("slt", &first, &last);
        f.if_(&any, |f| {
            let (at, to) = (f.mulc(&first, self.keys), self.stage(f, &first));
            self.fill(f, s, &at, &to);
        });
        f.for_(&first, &last, 1, &carried(state), |f, tile, now| {
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
            let scores = f.if_else(&whole, &types, |_| plain, |f| self.w.masked(f, &scores, &at, &bounds));
            self.weigh(f, &stage, &scores, now)
        })
    }

    /// The block's queries times the keys of a tile: 16 rows of the warp, all keys.
    fn scores(&self, f: &mut Func, stage: &Val) -> Vec<Val> {
        let none = f.f32(0.0, 1);
        let mut s = vec![none; (self.keys / 2) as usize];
        for i in 0..self.w.x.d / 16 {
            let kept = self.queries.get(i as usize).cloned();
            let a = kept.unwrap_or_else(|| self.lanes.left(f, &self.w.t, &self.own, 0, 16 * i));
            for j in 0..self.keys / 16 {
                let b = self.lanes.by_rows(f, &self.w.t, stage, 16 * j, 16 * i);
                let at = (8 * j) as usize;
                multiply(f, &a, &b[..2], &mut s[at..at + 4]);
                multiply(f, &a, &b[2..], &mut s[at + 4..at + 8]);
            }
        }
        s
    }

    /// Takes the scores of a tile into the state.
    fn weigh(&self, f: &mut Func, stage: &Val, scores: &[Val], now: &[Val]) -> Vec<Val> {
        let mut run = Running::of(now);
        let mut out = now[..now.len() - 4].to_vec();
        let (weights, keep) = self.w.weigh(f, scores, &mut run);
        if self.v.is_some() {
            for (i, x) in out.iter_mut().enumerate() {
                *x = binary(f, "mulf", x, &keep[i % 4 / 2]);
            }
            let values = f.addc(stage, self.keys * Source::pitch(self.w.x.d));
            for j in 0..self.keys / 16 {
                let a = as_left(f, &weights, (16 * j) as usize);
                for i in 0..self.w.x.d / 16 {
                    let b = self.lanes.by_columns(f, &self.w.t, &values, 16 * j, 16 * i);
                    let at = (8 * i) as usize;
                    multiply(f, &a, &b[..2], &mut out[at..at + 4]);
                    multiply(f, &a, &b[2..], &mut out[at + 4..at + 8]);
                }
            }
        }
        [out, run.list()].concat()
    }
}
