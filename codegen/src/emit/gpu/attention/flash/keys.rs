//! The gradients of keys and values, for 64 keys of a key/value head: all queries that see them, sequence by sequence, head by
//! head, tile by tile, in one order. Scores are computed turned: keys are rows.

use super::queries::of_query;
use super::softmax::{changes, store_row};
use super::tile::{Lanes, Source, arrive, as_left, binary, carried, commit, multiply};
use super::{Flash, ROWS, THREADS, Thread};
use crate::emit::func::{Func, Val};
use crate::emit::gpu::attention::packed::Sequence;
use crate::emit::gpu::launch::{Unit, shared_at, shared_load, shared_store};
use crate::emit::gpu::pull::Pull;
use crate::error::CodegenError;
use pleach_ir::Sym;
use pleach_plan::Launch;
use std::f32::consts::LOG2_E;

/// A block of keys.
struct Keys<'a, 'b> {
    x: &'a Flash<'b>,
    t: Thread,
    lanes: Lanes,
    /// Queries of a tile.
    queries: i64,
    q: Source,
    d_out: Source,
    /// Where values lie in shared memory (keys lie at 0), where stages begin, and where the numbers of queries lie.
    values: i64,
    stages: i64,
    numbers: i64,
    factor: Val,
}

pub(super) fn emit(x: &Flash<'_>, symbols: &[Sym]) -> Result<(String, Launch), CodegenError> {
    let queries = 32;
    let pitch = Source::pitch(x.d);
    let numbers = 2 * ROWS * pitch + 4 * queries * pitch;
    // Two numbers for each query of both stages.
    let bytes = numbers + 2 * queries * 8;
    let mut unit = Unit::new(x.k, "_kv", true);
    let f = &mut unit.f;
    let mut p = Pull::new(f, x.k, symbols);
    let t = Thread::new(f);
    let rows = p.dim(f, x.rows[1]);
    let inside = f.cmp("slt", &t.block, &rows);
    f.if_(&inside, |f| block(x, t, f, &mut p, queries, numbers, &rows));
    p.finish()?;
    Ok(unit.finish(x.blocks(1, symbols)?, THREADS as u32, bytes as u32, 2))
}

fn block(x: &Flash<'_>, t: Thread, f: &mut Func, p: &mut Pull<'_>, queries: i64, numbers: i64, rows: &Val) {
    let sources = [0, 1, 2, 5].map(|i| x.source(f, i));
    let [Some(q), Some(k), Some(v), Some(d_out)] = sources else {
        p.fail("the operands of a gradient must lie in rows");
        return;
    };
    let pitch = Source::pitch(x.d);
    let (values, stages) = (ROWS * pitch, 2 * ROWS * pitch);
    let (zero, to) = (f.i64(0), f.i64(values));
    k.fill(f, &t, ROWS, &t.head, (&t.block, rows), &zero);
    v.fill(f, &t, ROWS, &t.head, (&t.block, rows), &to);
    commit(f);
    let lanes = Lanes::new(f, &t, x.d);
    let factor = f.f32(f32::from_bits(x.c.at.scale) * LOG2_E, 1);
    let w = Keys { x, t, lanes, queries, q, d_out, values, stages, numbers, factor };
    let start = vec![f.f32(0.0, 1); x.d as usize];
    let sequences = p.k.body.ty(x.c.bounds[1]).shape[0];
    let sequences = p.dim(f, sequences);
    let done = f.for_(&zero, &sequences, 1, &carried(&start), |f, s, now| {
        let s = Sequence::of(f, p, x.c, s);
        w.sequence(f, p, &s, now.to_vec())
    });
    write(f, p, x, &w.t, rows, &done);
}

/// Writes the gradients of the keys of a block and of their values: sums of a thread, of keys, then of values.
pub(super) fn write(f: &mut Func, p: &mut Pull<'_>, x: &Flash<'_>, t: &Thread, rows: &Val, sums: &[Val]) {
    let half = (x.d / 2) as usize;
    let warp = t.warp_row(f);
    let first = f.add(&t.block, &warp);
    let first = f.add(&first, &t.row);
    let scale = f.f32(f32::from_bits(x.c.at.scale), 1);
    for h in 0..2 {
        let row = f.addc(&first, 8 * h as i64);
        let inside = f.cmp("slt", &row, rows);
        f.if_(&inside, |f| {
            let of = |from: usize| -> Vec<Val> {
                let list = (0..x.d / 8).flat_map(|i| [0, 1].map(|e| from + (4 * i) as usize + 2 * h + e));
                list.map(|i| sums[i].clone()).collect()
            };
            if let Some(r) = x.c.grads[1] {
                let own: Vec<Val> = of(0).iter().map(|g| binary(f, "mulf", g, &scale)).collect();
                store_row(f, p, x, r, t, &t.head, &row, &own);
            }
            if let Some(r) = x.c.grads[2] {
                store_row(f, p, x, r, t, &t.head, &row, &of(half));
            }
        });
    }
}

impl Keys<'_, '_> {
    fn stage(&self, f: &mut Func, turn: &Val) -> Val {
        let at = f.mulc(turn, 2 * self.queries * Source::pitch(self.x.d));
        f.addc(&at, self.stages)
    }

    /// Brings a tile of queries, their gradients and their numbers; queries from `end` on are zeros.
    fn fill(&self, f: &mut Func, p: &mut Pull<'_>, head: &Val, first: &Val, end: &Val, turn: &Val) {
        let to = self.stage(f, turn);
        self.q.fill(f, &self.t, self.queries, head, (first, end), &to);
        let to = f.addc(&to, self.queries * Source::pitch(self.x.d));
        self.d_out.fill(f, &self.t, self.queries, head, (first, end), &to);
        commit(f);
        let count = f.i64(self.queries);
        let one = f.cmp("slt", &self.t.tid, &count);
        f.if_(&one, |f| {
            let row = f.add(first, &self.t.tid);
            let last = f.addc(end, -1);
            let row = f.min(&row, &last);
            let (lse, sum) = of_query(f, p, self.x, &row, head);
            let base = f.mulc(turn, 2 * self.queries);
            let at = f.addc(&base, self.numbers / 4);
            let at = f.add(&at, &self.t.tid);
            let to = shared_at(f, &self.t.smem, &at, "f32");
            shared_store(f, &lse, &to, "f32", 4);
            let at = f.addc(&at, self.queries);
            let to = shared_at(f, &self.t.smem, &at, "f32");
            shared_store(f, &sum, &to, "f32", 4);
        });
    }

    fn sequence(&self, f: &mut Func, p: &mut Pull<'_>, s: &Sequence, sums: Vec<Val>) -> Vec<Val> {
        let zero = f.i64(0);
        // Keys of the block that are of the sequence, and the queries that see one of them.
        let end = f.addc(&self.t.block, ROWS);
        let (low, high) = (f.sub(&self.t.block, &s.k0), f.sub(&end, &s.k0));
        let (low, high) = (f.max(&low, &zero), f.min(&high, &s.keys));
        let (from, _) = s.seen(f, self.x.c, &low);
        let before = f.addc(&high, -1);
        let (_, to) = s.seen(f, self.x.c, &before);
        let some = f.cmp("slt", &low, &high);
        let to = f.op(format!("arith.select {some}, {to}, {from} : i64"));
        let span = f.sub(&to, &from);
        let span = f.max(&span, &zero);
        let tiles = f.ceil_divc(&span, self.queries);
        // One loop over heads and tiles, so that the next tile is always under way.
        let group = i64::from(self.x.c.at.heads / self.x.c.at.kv_heads);
        let turns = f.mulc(&tiles, group);
        let (one, first_head) = (f.i64(1), f.mulc(&self.t.head, group));
        let count = f.max(&tiles, &one);
        let place = |f: &mut Func, turn: &Val| {
            let (head, tile) = (f.div(turn, &count), f.rem(turn, &count));
            let head = f.add(&first_head, &head);
            let at = f.mulc(&tile, self.queries);
            (head, f.add(&from, &at))
        };
        let end = f.add(&s.q0, &s.queries);
        // Which queries see this thread's keys.
        let warp = self.t.warp_row(f);
        let row = f.add(&self.t.block, &warp);
        let row = f.add(&row, &self.t.row);
        let bounds = [0, 8].map(|h| {
            let row = f.addc(&row, h);
            let j = f.sub(&row, &s.k0);
            let own = f.cmp("ult", &j, &s.keys);
            let (lo, hi) = s.seen(f, self.x.c, &j);
            let span = f.sub(&hi, &lo);
            let span = f.max(&span, &zero);
            let span = f.op(format!("arith.select {own}, {span}, {zero} : i64"));
            (lo, f.op(format!("arith.trunci {span} : i64 to i32")))
        });
        f.stmt("nvvm.barrier0");
        let any = f.cmp("slt", &zero, &turns);
        f.if_(&any, |f| {
            let (head, at) = place(f, &zero);
            let first = f.add(&s.q0, &at);
            self.fill(f, p, &head, &first, &end, &zero);
        });
        f.for_(&zero, &turns, 1, &carried(&sums), |f, turn, now| {
            arrive(f);
            let next = f.addc(turn, 1);
            let more = f.cmp("slt", &next, &turns);
            f.if_(&more, |f| {
                let (head, at) = place(f, &next);
                let (first, slot) = (f.add(&s.q0, &at), f.remc(&next, 2));
                self.fill(f, p, &head, &first, &end, &slot);
            });
            let (_, at) = place(f, turn);
            let slot = f.remc(turn, 2);
            self.tile(f, &slot, &at, &bounds, now.to_vec())
        })
    }

    fn tile(&self, f: &mut Func, slot: &Val, at: &Val, bounds: &[(Val, Val); 2], mut sums: Vec<Val>) -> Vec<Val> {
        let none = f.f32(0.0, 1);
        let pitch = Source::pitch(self.x.d);
        let stage = self.stage(f, slot);
        let d_stage = f.addc(&stage, self.queries * pitch);
        let own = f.mulc(&self.t.warp, 16 * pitch);
        let values = f.addc(&own, self.values);
        let mut scores = vec![none.clone(); (self.queries / 2) as usize];
        let mut products = scores.clone();
        for i in 0..self.x.d / 16 {
            let a = self.lanes.left(f, &self.t, &own, 0, 16 * i);
            let v = self.lanes.left(f, &self.t, &values, 0, 16 * i);
            for j in 0..self.queries / 16 {
                let at = (8 * j) as usize;
                let b = self.lanes.by_rows(f, &self.t, &stage, 16 * j, 16 * i);
                multiply(f, &a, &b[..2], &mut scores[at..at + 4]);
                multiply(f, &a, &b[2..], &mut scores[at + 4..at + 8]);
                let b = self.lanes.by_rows(f, &self.t, &d_stage, 16 * j, 16 * i);
                multiply(f, &v, &b[..2], &mut products[at..at + 4]);
                multiply(f, &v, &b[2..], &mut products[at + 4..at + 8]);
            }
        }
        let base = f.mulc(slot, 2 * self.queries);
        let base = f.addc(&base, self.numbers / 4);
        let base = f.add(&base, &self.t.pair);
        let base = shared_at(f, &self.t.smem, &base, "f32");
        let number = |f: &mut Func, at: i64| {
            let offset = f.i64(at);
            let at = shared_at(f, &base, &offset, "f32");
            shared_load(f, &at, "f32", 4)
        };
        let columns = (0..self.queries / 8).flat_map(|j| [8 * j, 8 * j + 1]);
        let numbers: Vec<(Val, Val)> = columns.map(|c| (number(f, c), number(f, c + self.queries))).collect();
        let numbers = |_: &mut Func, i: usize| numbers[i / 4 * 2 + i % 2].clone();
        let (weights, changes) = changes(f, (&self.t, &self.factor), &scores, &products, Some((at, bounds)), numbers);
        let half = (self.x.d / 2) as usize;
        for j in 0..self.queries / 16 {
            let a = as_left(f, &changes, (16 * j) as usize);
            let w = as_left(f, &weights, (16 * j) as usize);
            for i in 0..self.x.d / 16 {
                let at = (8 * i) as usize;
                let b = self.lanes.by_columns(f, &self.t, &stage, 16 * j, 16 * i);
                multiply(f, &a, &b[..2], &mut sums[at..at + 4]);
                multiply(f, &a, &b[2..], &mut sums[at + 4..at + 8]);
                let b = self.lanes.by_columns(f, &self.t, &d_stage, 16 * j, 16 * i);
                multiply(f, &w, &b[..2], &mut sums[half + at..half + at + 4]);
                multiply(f, &w, &b[2..], &mut sums[half + at + 4..half + at + 8]);
            }
        }
        sums
    }
}
