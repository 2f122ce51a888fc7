//! The gradient of 128 queries of a head: all keys that they see, tile by tile.

use super::{Form, Inputs, Kernel, Masks, Worker, keys_of};
use crate::emit::func::{Func, Val};
use crate::emit::gpu::attention::flash::Flash;
use crate::emit::gpu::attention::flash::queries::{of_query, write};
use crate::emit::gpu::attention::flash::softmax::changes;
use crate::emit::gpu::attention::flash::tile::as_left;
use crate::emit::gpu::chip::Limits;
use crate::emit::gpu::pull::Pull;
use crate::emit::gpu::wgmma::{self, Sums};
use crate::error::CodegenError;
use pleach_ir::Sym;
use pleach_plan::Launch;

/// Emits the kernel, if it has this form.
pub(in super::super) fn emit(
    x: &Flash<'_>,
    symbols: &[Sym],
    limits: &Limits,
) -> Result<Option<(String, Launch)>, CodegenError> {
    let inputs = Inputs { own: &[0, 5], ring: &[1, 2], tile: 64, extra: 0 };
    let Some(form) = Form::of(x, symbols, limits, &inputs)? else { return Ok(None) };
    let kernel = Kernel { suffix: "_q", scratch: true, turns: keys_of, work };
    super::emit(x, symbols, &form, &kernel).map(Some)
}

fn work(f: &mut Func, p: &mut Pull<'_>, w: &Worker<'_, '_>) {
    let (t, x) = (&w.b.w.t, w.b.w.x);
    let warp = t.warp_row(f);
    let first = f.add(&t.block, &warp);
    let first = f.add(&first, &t.row);
    let last = f.addc(&w.b.rows, -1);
    // -log-sum-exp and rowsum(d_out · out) of both rows.
    let numbers = [0, 8].map(|h| {
        let row = f.addc(&first, h);
        let row = f.min(&row, &last);
        of_query(f, p, x, &row, &t.head)
    });
    let sums = Sums::new(x.d);
    let init = vec![(sums.none(f), sums.ty.clone())];
    let done = w.keys(f, p, init, |f, masks, now| tile(f, w, &sums, &numbers, masks, now));
    let done = sums.elements(f, &done[2]);
    write(f, p, x, t, &w.b.rows, &done);
}

/// Adds what a tile of keys and values contributes.
fn tile(
    f: &mut Func,
    w: &Worker<'_, '_>,
    sums: &Sums,
    numbers: &[(Val, Val); 2],
    masks: Masks<'_>,
    now: &[Val],
) -> Vec<Val> {
    let ring = &w.b.ring;
    let here = [&now[0], &now[1]];
    ring.arrived(f, here);
    let stage = ring.stage(f, here[0]);
    let inner = Sums::new(w.b.form.tile);
    wgmma::fence(f);
    let scores = w.product(f, &inner, 0, &stage, 0);
    let products = w.product(f, &inner, 1, &stage, 1);
    wgmma::commit(f);
    wgmma::wait(f, 0);
    let [scores, products] = [scores, products].map(|x| {
        let x = inner.settled(f, &x);
        inner.elements(f, &x)
    });
    let (_, changes) =
        changes(f, (&w.b.w.t, &w.b.w.factor), &scores, &products, masks, |_, i| numbers[i % 4 / 2].clone());
    let pairs: Vec<Val> = (0..w.b.form.tile / 16).flat_map(|j| as_left(f, &changes, (16 * j) as usize)).collect();
    let pairs = wgmma::settled(f, &pairs, "i32", "r");
    let before = sums.settled(f, &now[2]);
    wgmma::fence(f);
    let after = w.weighted(f, sums, &pairs, (&stage, 0), &before);
    wgmma::commit(f);
    wgmma::wait(f, 0);
    let after = sums.settled(f, &after);
    ring.release(f, &w.leads, here[0]);
    [ring.advance(f, here).to_vec(), vec![after]].concat()
}
