//! The result of attention, and its log-sum-exp, for 128 queries of a head.

use super::{Form, Inputs, Kernel, Masks, Worker, keys_of};
use crate::emit::func::{Func, Val};
use crate::emit::gpu::attention::flash::Flash;
use crate::emit::gpu::attention::flash::softmax::Running;
use crate::emit::gpu::attention::flash::tile::{as_left, binary};
use crate::emit::gpu::chip::Limits;
use crate::emit::gpu::pull::Pull;
use crate::emit::gpu::wgmma::{self, Sums};
use crate::error::CodegenError;
use pleach_ir::Sym;
use pleach_plan::Launch;

/// Keys of a tile.
const KEYS: i64 = 128;

/// Emits the kernel, if it has this form.
pub(in super::super) fn emit(
    x: &Flash<'_>,
    symbols: &[Sym],
    limits: &Limits,
) -> Result<Option<(String, Launch)>, CodegenError> {
    let ring: &[usize] = if x.c.out.is_some() { &[1, 2] } else { &[1] };
    let inputs = Inputs { own: &[0], ring, tile: KEYS, extra: 0 };
    let Some(form) = Form::of(x, symbols, limits, &inputs)? else { return Ok(None) };
    let kernel = Kernel { suffix: "", scratch: false, turns: keys_of, work };
    super::emit(x, symbols, &form, &kernel).map(Some)
}

/// State: the place in the ring, accumulators of the result if it is wanted, and of the softmax.
fn work(f: &mut Func, p: &mut Pull<'_>, w: &Worker<'_, '_>) {
    let x = w.b.w.x;
    let sums = Sums::new(x.d);
    let mut init = vec![];
    if x.c.out.is_some() {
        init.push((sums.none(f), sums.ty.clone()));
    }
    init.extend(Running::start(f).list().into_iter().map(|x| (x, "f32".to_string())));
    let done = w.keys(f, p, init, |f, masks, now| tile(f, w, &sums, masks, now));
    let out = if x.c.out.is_some() { sums.elements(f, &done[2]) } else { vec![] };
    w.b.w.write(f, p, &w.b.rows, &out, &Running::of(&done));
}

/// Takes a tile of keys and values into the state.
fn tile(f: &mut Func, w: &Worker<'_, '_>, out: &Sums, masks: Masks<'_>, now: &[Val]) -> Vec<Val> {
    let ring = &w.b.ring;
    let here = [&now[0], &now[1]];
    ring.arrived(f, here);
    let stage = ring.stage(f, here[0]);
    let sums = Sums::new(KEYS);
    wgmma::fence(f);
    let scores = w.product(f, &sums, 0, &stage, 0);
    wgmma::commit(f);
    wgmma::wait(f, 0);
    let scores = sums.settled(f, &scores);
    let mut scores = sums.elements(f, &scores);
    if let Some((at, bounds)) = masks {
        scores = w.b.w.masked(f, &scores, at, bounds);
    }
    let mut run = Running::of(now);
    let (weights, keep) = w.b.w.weigh(f, &scores, &mut run);
    let mut state = vec![];
    if w.b.w.x.c.out.is_some() {
        let before: Vec<Val> = out.elements(f, &now[2]);
        let before: Vec<Val> = before.iter().enumerate().map(|(i, x)| binary(f, "mulf", x, &keep[i % 4 / 2])).collect();
        let pairs: Vec<Val> = (0..KEYS / 16).flat_map(|j| as_left(f, &weights, (16 * j) as usize)).collect();
        let pairs = wgmma::settled(f, &pairs, "i32", "r");
        let before = out.of(f, &before);
        let before = out.settled(f, &before);
        wgmma::fence(f);
        let after = w.weighted(f, out, &pairs, (&stage, 1), &before);
        wgmma::commit(f);
        wgmma::wait(f, 0);
        state.push(out.settled(f, &after));
    }
    ring.release(f, &w.leads, here[0]);
    [ring.advance(f, here).to_vec(), state, run.list()].concat()
}
