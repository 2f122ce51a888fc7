//! The gradient of queries, and the sums that all gradients need.

use super::softmax::{changes, store_row};
use super::tile::{Lanes, Source, arrive, as_left, binary, carried, commit, fma, multiply};
use super::{Flash, ROWS, THREADS, Thread, WARPS};
use crate::emit::dim_expr;
use crate::emit::func::{Func, Val};
use crate::emit::gpu::at::At;
use crate::emit::gpu::attention::packed::Sequence;
use crate::emit::gpu::launch::Unit;
use crate::emit::gpu::pull::Pull;
use crate::emit::gpu::{reduce, special};
use crate::error::CodegenError;
use pleach_ir::{DType, ReduceOp, Sym};
use pleach_plan::{Expr, Launch};
use std::f32::consts::LOG2_E;

/// rowsum(d_out · out) of every query and head, to scratch memory: a warp for each.
pub(super) fn sums(x: &Flash<'_>, symbols: &[Sym]) -> Result<(String, Launch), CodegenError> {
    let mut unit = Unit::new(x.k, "_sums", true);
    let f = &mut unit.f;
    let mut p = Pull::new(f, x.k, symbols);
    let (tid, block, head) = (special(f, "tid.x"), special(f, "ctaid.x"), special(f, "ctaid.y"));
    let (warp, lane) = (f.divc(&tid, 32), f.remc(&tid, 32));
    let first = f.mulc(&block, WARPS);
    let row = f.add(&first, &warp);
    let end = p.dim(f, x.rows[0]);
    let inside = f.cmp("slt", &row, &end);
    f.if_(&inside, |f| {
        let start = f.mulc(&head, x.d);
        let two = f.mulc(&lane, 2);
        let mut sum = f.f32(0.0, 1);
        p.together = 2;
        for i in 0..(x.d as u64).div_ceil(64) as i64 {
            // Two neighbours for each lane; past the end they are read again and do not count.
            let (at, end) = (f.addc(&two, 64 * i), f.i64(x.d));
            let last = f.addc(&end, -2);
            let (some, at) = (f.cmp("slt", &at, &end), f.min(&at, &last));
            let at = f.add(&start, &at);
            let mut part = sum.clone();
            for e in 0..2 {
                let index = [At::of(f, &row, 1), At::of(f, &at, 2).addc(e)];
                let (a, b) = p.scope(|p| (p.eval(f, x.c.inputs[5], &index), p.eval(f, x.c.inputs[3], &index)));
                part = fma(f, &a, &b, &part);
            }
            sum = f.op(format!("arith.select {some}, {part}, {sum} : f32"));
        }
        let sum = reduce::warp(f, ReduceOp::Sum, DType::F32, &sum);
        let none = f.i64(0);
        let leads = f.cmp("eq", &lane, &none);
        f.if_(&leads, |f| {
            let line = f.mulc(&row, i64::from(x.c.at.heads));
            let (at, to) = (f.add(&line, &head), f.arg("scratch"));
            f.store_at(&sum, &to, &at, "f32", 1);
        });
    });
    p.finish()?;
    let rows = dim_expr(x.k, x.rows[0], symbols)?.ceil_div(WARPS as u64);
    let grid = [rows, Expr::Const(u64::from(x.c.at.heads)), Expr::Const(1)];
    Ok(unit.finish(grid, THREADS as u32, 0, 1))
}

/// A block of queries.
struct Queries<'a, 'b> {
    x: &'a Flash<'b>,
    t: Thread,
    lanes: Lanes,
    /// Keys of a tile.
    keys: i64,
    k: Source,
    v: Source,
    kv_head: Val,
    /// Where the gradients of the result lie in shared memory; the queries lie at 0. Where the stages begin.
    d_out: i64,
    stages: i64,
    factor: Val,
    /// -log-sum-exp in base 2, and the sum, of both rows.
    lse: [Val; 2],
    sums: [Val; 2],
}

pub(super) fn emit(x: &Flash<'_>, symbols: &[Sym]) -> Result<(String, Launch), CodegenError> {
    let keys = if x.d > 64 { 32 } else { 64 };
    let pitch = Source::pitch(x.d);
    let bytes = 2 * ROWS * pitch + 4 * keys * pitch;
    let mut unit = Unit::new(x.k, "_q", true);
    let f = &mut unit.f;
    let mut p = Pull::new(f, x.k, symbols);
    let t = Thread::new(f);
    let rows = p.dim(f, x.rows[0]);
    let inside = f.cmp("slt", &t.block, &rows);
    f.if_(&inside, |f| block(x, t, f, &mut p, keys, &rows));
    p.finish()?;
    Ok(unit.finish(x.blocks(0, symbols)?, THREADS as u32, bytes as u32, 2))
}

fn block(x: &Flash<'_>, t: Thread, f: &mut Func, p: &mut Pull<'_>, keys: i64, rows: &Val) {
    let sources = [0, 1, 2, 5].map(|i| x.source(f, i));
    let [Some(q), Some(k), Some(v), Some(d)] = sources else {
        p.fail("the operands of a gradient must lie in rows");
        return;
    };
    let pitch = Source::pitch(x.d);
    let (d_out, stages) = (ROWS * pitch, 2 * ROWS * pitch);
    let (zero, to) = (f.i64(0), f.i64(d_out));
    q.fill(f, &t, ROWS, &t.head, (&t.block, rows), &zero);
    d.fill(f, &t, ROWS, &t.head, (&t.block, rows), &to);
    commit(f);
    let lanes = Lanes::new(f, &t, x.d);
    let kv_head = f.divc(&t.head, i64::from(x.c.at.heads / x.c.at.kv_heads));
    let factor = f.f32(f32::from_bits(x.c.at.scale) * LOG2_E, 1);
    let warp = t.warp_row(f);
    let first = f.add(&t.block, &warp);
    let first = f.add(&first, &t.row);
    let (mut lse, mut sums) = (vec![], vec![]);
    for h in 0..2 {
        let row = f.addc(&first, 8 * h);
        let last = f.addc(rows, -1);
        let row = f.min(&row, &last);
        let (a, b) = of_query(f, p, x, &row, &t.head);
        lse.push(a);
        sums.push(b);
    }
    let two = |v: Vec<Val>| [v[0].clone(), v[1].clone()];
    let w = Queries { x, t, lanes, keys, k, v, kv_head, d_out, stages, factor, lse: two(lse), sums: two(sums) };
    let start = vec![f.f32(0.0, 1); (x.d / 2) as usize];
    let (from, past) = Sequence::of_rows(f, p, x.c, (&w.t.block, ROWS), rows);
    let done = f.for_(&from, &past, 1, &carried(&start), |f, s, now| {
        let s = Sequence::of(f, p, x.c, s);
        w.sequence(f, &s, now.to_vec())
    });
    write(f, p, x, &w.t, rows, &done);
}

/// Writes the gradient of the queries of a block: sums of a thread, four for every 8 columns.
pub(super) fn write(f: &mut Func, p: &mut Pull<'_>, x: &Flash<'_>, t: &Thread, rows: &Val, sums: &[Val]) {
    let warp = t.warp_row(f);
    let first = f.add(&t.block, &warp);
    let first = f.add(&first, &t.row);
    let scale = f.f32(f32::from_bits(x.c.at.scale), 1);
    for h in 0..2 {
        let row = f.addc(&first, 8 * h as i64);
        let inside = f.cmp("slt", &row, rows);
        f.if_(&inside, |f| {
            let own: Vec<Val> = (0..x.d / 8)
                .flat_map(|i| [0, 1].map(|e| (4 * i) as usize + 2 * h + e))
                .map(|i| binary(f, "mulf", &sums[i], &scale))
                .collect();
            if let Some(r) = x.c.grads[0] {
                store_row(f, p, x, r, t, &t.head, &row, &own);
            }
        });
    }
}

/// -log-sum-exp in base 2, and rowsum(d_out · out), of a query.
pub(super) fn of_query(f: &mut Func, p: &mut Pull<'_>, x: &Flash<'_>, row: &Val, head: &Val) -> (Val, Val) {
    let at = [At::of(f, row, 1), At::of(f, head, 1)];
    let lse = p.scope(|p| p.eval(f, x.c.inputs[4], &at));
    let factor = f.f32(-LOG2_E, 1);
    let lse = binary(f, "mulf", &lse, &factor);
    let line = f.mulc(row, i64::from(x.c.at.heads));
    let (at, from) = (f.add(&line, head), f.arg("scratch"));
    (lse, f.load_at(&from, &at, "f32", 1))
}

impl Queries<'_, '_> {
    fn stage(&self, f: &mut Func, tile: &Val) -> Val {
        let n = f.remc(tile, 2);
        let at = f.mulc(&n, 2 * self.keys * Source::pitch(self.x.d));
        f.addc(&at, self.stages)
    }

    fn fill(&self, f: &mut Func, s: &Sequence, first: &Val, to: &Val) {
        let (start, end) = (f.add(&s.k0, first), f.add(&s.k0, &s.keys));
        self.k.fill(f, &self.t, self.keys, &self.kv_head, (&start, &end), to);
        let to = f.addc(to, self.keys * Source::pitch(self.x.d));
        self.v.fill(f, &self.t, self.keys, &self.kv_head, (&start, &end), &to);
        commit(f);
    }

    fn sequence(&self, f: &mut Func, s: &Sequence, sums: Vec<Val>) -> Vec<Val> {
        let (end, zero) = (f.addc(&self.t.block, ROWS), f.i64(0));
        let (low, high) = (f.sub(&self.t.block, &s.q0), f.sub(&end, &s.q0));
        let (low, high) = (f.max(&low, &zero), f.min(&high, &s.queries));
        let (from, _) = s.sees(f, self.x.c, &low);
        let before = f.addc(&high, -1);
        let (_, to) = s.sees(f, self.x.c, &before);
        let some = f.cmp("slt", &low, &high);
        let to = f.op(format!("arith.select {some}, {to}, {zero} : i64"));
        let (first, last) = (f.divc(&from, self.keys), f.ceil_divc(&to, self.keys));
        let warp = self.t.warp_row(f);
        let row = f.add(&warp, &self.t.row);
        let bounds = [0, 8].map(|h| {
            let row = f.addc(&row, h);
            let at = f.add(&self.t.block, &row);
            let i = f.sub(&at, &s.q0);
            let own = f.cmp("ult", &i, &s.queries);
            let (lo, hi) = s.sees(f, self.x.c, &i);
            let span = f.sub(&hi, &lo);
            let span = f.op(format!("arith.select {own}, {span}, {zero} : i64"));
            (lo, f.op(format!("arith.trunci {span} : i64 to i32")))
        });
        f.stmt("nvvm.barrier0");
        let any = f.cmp("slt", &first, &last);
        f.if_(&any, |f| {
            let (at, to) = (f.mulc(&first, self.keys), self.stage(f, &first));
            self.fill(f, s, &at, &to);
        });
        f.for_(&first, &last, 1, &carried(&sums), |f, tile, now| {
            arrive(f);
            let next = f.addc(tile, 1);
            let more = f.cmp("slt", &next, &last);
            f.if_(&more, |f| {
                let (at, to) = (f.mulc(&next, self.keys), self.stage(f, &next));
                self.fill(f, s, &at, &to);
            });
            let (at, stage) = (f.mulc(tile, self.keys), self.stage(f, tile));
            self.tile(f, &stage, &at, &bounds, now.to_vec())
        })
    }

    fn tile(&self, f: &mut Func, stage: &Val, at: &Val, bounds: &[(Val, Val); 2], mut sums: Vec<Val>) -> Vec<Val> {
        let none = f.f32(0.0, 1);
        let own = f.mulc(&self.t.warp, 16 * Source::pitch(self.x.d));
        let d_own = f.addc(&own, self.d_out);
        let values = f.addc(stage, self.keys * Source::pitch(self.x.d));
        let mut scores = vec![none.clone(); (self.keys / 2) as usize];
        let mut products = scores.clone();
        for i in 0..self.x.d / 16 {
            let a = self.lanes.left(f, &self.t, &own, 0, 16 * i);
            let g = self.lanes.left(f, &self.t, &d_own, 0, 16 * i);
            for j in 0..self.keys / 16 {
                let at = (8 * j) as usize;
                let b = self.lanes.by_rows(f, &self.t, stage, 16 * j, 16 * i);
                multiply(f, &a, &b[..2], &mut scores[at..at + 4]);
                multiply(f, &a, &b[2..], &mut scores[at + 4..at + 8]);
                let b = self.lanes.by_rows(f, &self.t, &values, 16 * j, 16 * i);
                multiply(f, &g, &b[..2], &mut products[at..at + 4]);
                multiply(f, &g, &b[2..], &mut products[at + 4..at + 8]);
            }
        }
        let numbers = |_: &mut Func, i: usize| (self.lse[i % 4 / 2].clone(), self.sums[i % 4 / 2].clone());
        let (_, changes) = changes(f, (&self.t, &self.factor), &scores, &products, Some((at, bounds)), numbers);
        for j in 0..self.keys / 16 {
            let a = as_left(f, &changes, (16 * j) as usize);
            for i in 0..self.x.d / 16 {
                let b = self.lanes.by_columns(f, &self.t, stage, 16 * j, 16 * i);
                let at = (8 * i) as usize;
                multiply(f, &a, &b[..2], &mut sums[at..at + 4]);
                multiply(f, &a, &b[2..], &mut sums[at + 4..at + 8]);
            }
        }
        sums
    }
}
