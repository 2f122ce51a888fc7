//! The gradients of keys and values, for 128 keys of a key/value head: all queries that see them, sequence by sequence, head by
//! head, tile by tile, in one order. Scores are computed turned: keys are rows.

use super::{BLOCK, Block, CONSUMERS, Form, Inputs, Kernel, Turns, Worker, carry};
use crate::emit::func::{Func, Val};
use crate::emit::gpu::attention::flash::Flash;
use crate::emit::gpu::attention::flash::keys::write;
use crate::emit::gpu::attention::flash::queries::of_query;
use crate::emit::gpu::attention::flash::softmax::changes;
use crate::emit::gpu::attention::flash::tile::as_left;
use crate::emit::gpu::attention::packed::Sequence;
use crate::emit::gpu::chip::Limits;
use crate::emit::gpu::launch::{shared_load, shared_store};
use crate::emit::gpu::pull::Pull;
use crate::emit::gpu::ring::Ring;
use crate::emit::gpu::wgmma::{self, ROWS, Sums};
use crate::error::CodegenError;
use pleach_ir::Sym;
use pleach_plan::Launch;

/// Queries of a tile: as many as two numbers of each make a warpgroup's threads.
const QUERIES: i64 = 64;
/// Bytes of the numbers of a tile for one warpgroup.
const NUMBERS: i64 = 2 * QUERIES * 4;

/// Emits the kernel, if it has this form.
pub(in super::super) fn emit(
    x: &Flash<'_>,
    symbols: &[Sym],
    limits: &Limits,
) -> Result<Option<(String, Launch)>, CodegenError> {
    let inputs = Inputs { own: &[1, 2], ring: &[0, 5], tile: QUERIES, extra: CONSUMERS * NUMBERS };
    let Some(form) = Form::of(x, symbols, limits, &inputs)? else { return Ok(None) };
    let kernel = Kernel { suffix: "_kv", scratch: true, turns, work };
    super::emit(x, symbols, &form, &kernel).map(Some)
}

/// Queries of a sequence that see one of `rows` keys from `block` on.
fn span(f: &mut Func, b: &Block<'_, '_>, s: &Sequence, block: &Val, rows: i64) -> (Val, Val) {
    let (end, zero) = (f.addc(block, rows), f.i64(0));
    let (low, high) = (f.sub(block, &s.k0), f.sub(&end, &s.k0));
    let (low, high) = (f.max(&low, &zero), f.min(&high, &s.keys));
    let c = b.w.x.c;
    let (from, _) = s.seen(f, c, &low);
    let before = f.addc(&high, -1);
    let (_, to) = s.seen(f, c, &before);
    let some = f.cmp("slt", &low, &high);
    let from = f.op(format!("arith.select {some}, {from}, {zero} : i64"));
    let to = f.op(format!("arith.select {some}, {to}, {zero} : i64"));
    (from, to)
}

fn turns(f: &mut Func, b: &Block<'_, '_>, s: &Sequence) -> Turns {
    let (from, to) = span(f, b, s, &b.first, BLOCK);
    let at = &b.w.x.c.at;
    let group = i64::from(at.heads / at.kv_heads);
    let head = f.mulc(&b.w.t.head, group);
    Turns::of(f, &s.q0, (&from, &to), (head, group), b.form.tile)
}

/// State: the place in the ring, accumulators of the gradients of keys and of values.
fn work(f: &mut Func, p: &mut Pull<'_>, w: &Worker<'_, '_>) {
    let (t, x) = (&w.b.w.t, w.b.w.x);
    let sums = Sums::new(x.d);
    let none = sums.none(f);
    let init = [Ring::start(f), vec![(none.clone(), sums.ty.clone()), (none, sums.ty.clone())]].concat();
    let types: Vec<String> = init.iter().map(|x| x.1.clone()).collect();
    let warp = t.warp_row(f);
    let row = f.add(&t.block, &warp);
    let row = f.add(&row, &t.row);
    let b = w.b;
    let done = f.for_(&b.sequences.0, &b.sequences.1, 1, &init, |f, s, now| {
        let (s, zero) = (Sequence::of(f, p, x.c, s), f.i64(0));
        let t = turns(f, b, &s);
        // Which queries see this thread's keys.
        let bounds = [0, 8].map(|h| {
            let row = f.addc(&row, h);
            let j = f.sub(&row, &s.k0);
            let own = f.cmp("ult", &j, &s.keys);
            let (lo, hi) = s.seen(f, x.c, &j);
            let span = f.sub(&hi, &lo);
            let span = f.max(&span, &zero);
            let span = f.op(format!("arith.select {own}, {span}, {zero} : i64"));
            (lo, f.op(format!("arith.trunci {span} : i64 to i32")))
        });
        let (from, to) = span(f, b, &s, &b.w.t.block, ROWS);
        let some = f.cmp("slt", &from, &to);
        let (first, last) = (t.tile(f, &from, false), t.tile(f, &to, true));
        let first = f.op(format!("arith.select {some}, {first}, {zero} : i64"));
        let last = f.op(format!("arith.select {some}, {last}, {zero} : i64"));
        let heads = f.i64(t.heads);
        f.for_(&zero, &heads, 1, &carry(now, &types), |f, h, now| {
            let head = f.add(&t.head, h);
            let now = w.skip(f, &zero, &first, now);
            let now = f.for_(&first, &last, 1, &carry(&now, &types), |f, i, now| {
                let at = t.at(f, i);
                let query = f.add(&t.start, &at);
                tile(f, p, w, &sums, (&head, &query), (&at, &bounds), now)
            });
            w.skip(f, &last, &t.tiles, &now)
        })
    });
    let done = [sums.elements(f, &done[2]), sums.elements(f, &done[3])].concat();
    write(f, p, x, t, &w.b.rows, &done);
}

/// Adds what a tile of queries contributes.
fn tile(
    f: &mut Func,
    p: &mut Pull<'_>,
    w: &Worker<'_, '_>,
    sums: &Sums,
    (head, query): (&Val, &Val),
    masks: (&Val, &[(Val, Val); 2]),
    now: &[Val],
) -> Vec<Val> {
    let ring = &w.b.ring;
    let here = [&now[0], &now[1]];
    ring.arrived(f, here);
    let stage = ring.stage(f, here[0]);
    let inner = Sums::new(QUERIES);
    wgmma::fence(f);
    let scores = w.product(f, &inner, 0, &stage, 0);
    let products = w.product(f, &inner, 1, &stage, 1);
    wgmma::commit(f);
    // Meanwhile the numbers of the tile's queries: a thread brings one, all read what their columns need.
    let within = f.remc(&w.b.w.t.tid, 128);
    let (kind, column) = (f.divc(&within, QUERIES), f.remc(&within, QUERIES));
    let (row, zero) = (f.add(query, &column), f.i64(0));
    let row = f.max(&row, &zero);
    let (lse, sum) = of_query(f, p, w.b.w.x, &row, head);
    let first = f.cmp("eq", &kind, &zero);
    let number = f.op(format!("arith.select {first}, {lse}, {sum} : f32"));
    let (a, b) = (f.mulc(here[0], CONSUMERS * NUMBERS), f.mulc(&w.own, NUMBERS));
    let base = f.add(&a, &b);
    let base = f.addc(&base, w.b.form.behind());
    let at = f.mulc(&within, 4);
    let at = f.add(&base, &at);
    let at = ring.at(f, &at);
    shared_store(f, &number, &at, "f32", 4);
    let (id, threads) = (f.addc(&w.own, 1), f.i32(128, 1));
    let id = f.op(format!("arith.trunci {id} : i64 to i32"));
    f.stmt(&format!("nvvm.barrier id = {id} number_of_threads = {threads}"));
    let pair = f.mulc(&w.b.w.t.pair, 4);
    let base = f.add(&base, &pair);
    let two = |f: &mut Func, byte: i64| {
        let at = f.addc(&base, byte);
        let at = ring.at(f, &at);
        let x = shared_load(f, &at, "vector<2xf32>", 8);
        [0, 1].map(|e| f.op(format!("vector.extract {x}[{e}] : f32 from vector<2xf32>")))
    };
    wgmma::wait(f, 0);
    let [scores, products] = [scores, products].map(|x| {
        let x = inner.settled(f, &x);
        inner.elements(f, &x)
    });
    // Read where they are needed: together they would take as many registers as the scores.
    let mut near: Option<(i64, [[Val; 2]; 2])> = None;
    let number = |f: &mut Func, i: usize| {
        let j = i as i64 / 4;
        let [lse, sum] = match &near {
            Some((at, list)) if *at == j => list.clone(),
            _ => [two(f, 32 * j), two(f, 4 * QUERIES + 32 * j)],
        };
        near = Some((j, [lse.clone(), sum.clone()]));
        (lse[i % 2].clone(), sum[i % 2].clone())
    };
    let (weights, changes) = changes(f, (&w.b.w.t, &w.b.w.factor), &scores, &products, Some(masks), number);
    let mut left = |list: &[Val]| -> Vec<Val> {
        let pairs: Vec<Val> = (0..QUERIES / 16).flat_map(|j| as_left(f, list, (16 * j) as usize)).collect();
        wgmma::settled(f, &pairs, "i32", "r")
    };
    let (weights, changes) = (left(&weights), left(&changes));
    let before = [sums.settled(f, &now[2]), sums.settled(f, &now[3])];
    wgmma::fence(f);
    let keys = w.weighted(f, sums, &changes, (&stage, 0), &before[0]);
    let values = w.weighted(f, sums, &weights, (&stage, 1), &before[1]);
    wgmma::commit(f);
    wgmma::wait(f, 0);
    let after = vec![sums.settled(f, &keys), sums.settled(f, &values)];
    ring.release(f, &w.leads, here[0]);
    [ring.advance(f, here).to_vec(), after].concat()
}
