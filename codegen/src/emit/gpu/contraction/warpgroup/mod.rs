//! Products of bf16 by warpgroups (`wgmma`, f32 accumulators) with tiles that the tensor copy engine brings: sm_90a.
//!
//! Blocks stay: each takes tile after tile, in an order whose neighbours share operands in the cache. One warpgroup copies
//! (a single lane of it works), the others multiply 64 rows each. They meet at barriers in shared memory: a ring of
//! stages, each with one that says it is full and one that says it is free, which runs on from pass to pass and from tile to
//! tile, so that the next tile's operands come in while results are written.
//!
//! Groups of accumulators that read the same left operand share its copies ([`form::Pass`]). A scaled product is scaled in
//! registers before the next one joins. What lies past the ends of an operand is zero by its tensor map.
//! A right operand in blocks of codes is decoded by the first warpgroup ([`decode`]), all of which works then; so it does where indices
//! pick rows or columns of an operand ([`picked`]).

mod decode;
mod form;
mod picked;

use super::{fragment, write};
use crate::emit::contraction::analyze::Analysis;
use crate::emit::dim_expr;
use crate::emit::func::{Func, Val};
use crate::emit::gpu::chip::GpuChip;
use crate::emit::gpu::launch::{Unit, shared_store};
use crate::emit::gpu::pull::Pull;
use crate::emit::gpu::ring::{Ring, Roles};
use crate::emit::gpu::wgmma::{self, LINE, Left, Sums};
use crate::emit::gpu::{Parts, special};
use crate::error::CodegenError;
use form::{BLOCK, Cut, Form, Operand, Pass, ROWS, STEP};
pub(super) use form::{forms, place};
use pleach_ir::{Kernel, Sym};
use pleach_plan::Expr;

/// Rows of tiles that are taken column by column before the next ones.
const GROUP: i64 = 16;

/// Emits the kernel, if it has this form.
pub(super) fn emit(
    k: &Kernel,
    symbols: &[Sym],
    a: &Analysis,
    chip: GpuChip,
    wish: Option<&crate::emit::gpu::Form>,
) -> Result<Option<Parts>, CodegenError> {
    let limits = chip.limits();
    let Some(form) = form::form(k, symbols, a, &limits, wish)? else { return Ok(None) };
    let cut = form.cut;
    let mut unit = Unit::with_maps(k, "", false, &form.maps);
    let f = &mut unit.f;
    let mut p = Pull::new(f, k, symbols);
    let size = [p.dim(f, a.m), p.dim(f, a.n)];
    let depths: Vec<Val> = form.passes.iter().map(|x| p.dim(f, x.depth)).collect();
    let decodes = form.decodes();
    let ring = Ring::new(f, cut.stages, (0, cut.stage()), cut.barriers(), 4 * cut.consumers);
    let ring = ring.with_writers(if decodes { Roles::WRITERS } else { 0 });
    let tiles = Tiles::new(f, &cut, &size);
    let roles = Roles::new(f, cut.consumers).decoding(decodes);
    Ring::begin(f, &roles.tid, &[&ring], form.maps.len());
    roles.split(
        f,
        &mut p,
        |f, p, leads| match decodes {
            true => decode::produce(f, p, a, &form, &ring, &tiles, [&roles.tid, leads]),
            false => produce(f, &form, &depths, &ring, &tiles),
        },
        |f, p, own| consume(f, p, a, &form, &depths, &ring, &tiles, [&roles.tid, own]),
    );
    p.finish()?;
    let blocks = dim_expr(k, a.m, symbols)?.ceil_div(cut.rows() as u64);
    let blocks = blocks.mul(dim_expr(k, a.n, symbols)?.ceil_div(cut.columns as u64));
    let grid = blocks.min(u64::from(limits.multiprocessors) * cut.resident() as u64);
    let grid = [grid, Expr::Const(1), Expr::Const(1)];
    let threads = Roles::threads(cut.consumers) as u32;
    let (text, launch) = unit.finish(grid, threads, cut.shared() as u32, cut.resident() as u32);
    Ok(Some((text, vec![launch], Expr::Const(0))))
}

/// Tiles of the results.
struct Tiles {
    down: Val,
    across: Val,
    all: Val,
    size: [Val; 2],
    cut: Cut,
}

impl Tiles {
    fn new(f: &mut Func, cut: &Cut, size: &[Val; 2]) -> Tiles {
        let (down, across) = (f.ceil_divc(&size[0], cut.rows()), f.ceil_divc(&size[1], cut.columns));
        let all = f.mul(&down, &across);
        Tiles { down, across, all, size: size.clone(), cut: *cut }
    }

    /// Calls `body` with first row and column of every tile of this block; it carries values.
    fn each(
        &self,
        f: &mut Func,
        inits: &[(Val, String)],
        body: impl FnOnce(&mut Func, [&Val; 2], &[Val]) -> Vec<Val>,
    ) -> Vec<Val> {
        let (first, step) = (special(f, "ctaid.x"), special(f, "nctaid.x"));
        f.for_by(&first, &self.all, &step, inits, |f, t, carried| {
            let whole = f.mulc(&self.across, GROUP);
            let (g, within) = (f.div(t, &whole), f.rem(t, &whole));
            let top = f.mulc(&g, GROUP);
            let (rest, most) = (f.sub(&self.down, &top), f.i64(GROUP));
            let height = f.min(&rest, &most);
            let (row, column) = (f.rem(&within, &height), f.div(&within, &height));
            let row = f.add(&top, &row);
            let (m, n) = (f.mulc(&row, self.cut.rows()), f.mulc(&column, self.cut.columns));
            body(f, [&m, &n], carried)
        })
    }
}

/// The lane that copies.
fn produce(f: &mut Func, form: &Form, depths: &[Val], ring: &Ring, tiles: &Tiles) {
    let cut = &form.cut;
    let init = Ring::start(f);
    tiles.each(f, &init, |f, [m, n], carried| {
        let mut now = carried.to_vec();
        for (pass, depth) in form.passes.iter().zip(depths) {
            let (zero, turns) = (f.i64(0), f.ceil_divc(depth, STEP));
            // Hidden from LLVM, which would write out a short loop with registers for each turn: there are few for who copies.
            let turns =
                if turns.known() == Some(1) { turns } else { wgmma::settled(f, &[turns], "i64", "l").remove(0) };
            let init: Vec<(Val, String)> = now.iter().map(|x| (x.clone(), "i64".to_string())).collect();
            now = f.for_(&zero, &turns, 1, &init, |f, t, now| {
                let here = [&now[0], &now[1]];
                ring.freed(f, here);
                let step = f.mulc(t, STEP);
                copies(f, cut, pass, ring, here[0], [m, n, &step]);
                ring.advance(f, here).to_vec()
            });
        }
        now
    });
}

/// Starts the copies of a pass into a free stage: of a tile's first row and column, and from a step of the sum on.
fn copies(f: &mut Func, cut: &Cut, pass: &Pass, ring: &Ring, stage: &Val, [m, n, step]: [&Val; 3]) {
    let parts = pass.parts.iter().enumerate();
    let rights = parts.filter_map(|(i, x)| Some((x.right.copied()?, cut.left() + i as i64 * cut.right())));
    let rights: Vec<(&Operand, i64)> = rights.collect();
    let left = pass.left.copied();
    let bytes = left.map_or(0, |_| cut.left()) + rights.len() as i64 * cut.right();
    let full = ring.announce(f, stage, bytes);
    let base = ring.stage(f, stage);
    let copy = |f: &mut Func, x: &Operand, lines: i64, at: i64, line: &Val| {
        let (line, step) = (f.addc(line, x.first[0]), f.addc(step, x.first[1]));
        for i in 0..if x.along { 1 } else { lines / ROWS } {
            let (line, at) = (f.addc(&line, ROWS * i), f.addc(&base, at + BLOCK * i));
            ring.copy(f, x.map, if x.along { [&step, &line] } else { [&line, &step] }, &at, &full);
        }
    };
    if let Some(left) = left {
        copy(f, left, cut.rows(), 0, m);
    }
    for (x, at) in rights {
        copy(f, x, cut.columns, at, n);
    }
}

/// A warpgroup that multiplies; `own` is its number.
#[allow(clippy::too_many_arguments, reason = "what the block of the other role has, and the results")]
fn consume(
    f: &mut Func,
    p: &mut Pull<'_>,
    a: &Analysis,
    form: &Form,
    depths: &[Val],
    ring: &Ring,
    tiles: &Tiles,
    [tid, own]: [&Val; 2],
) {
    let cut = &form.cut;
    let (warp, lane) = (f.divc(tid, 32), f.remc(tid, 32));
    let (warp, zero) = (f.remc(&warp, 4), f.i64(0));
    let leads = f.cmp("eq", &lane, &zero);
    let shared = ring.address(f);
    let sums = Sums::new(cut.columns);
    let none = sums.none(f);
    let scales: Vec<Vec<Option<Val>>> = form
        .passes
        .iter()
        .map(|pass| pass.parts.iter().map(|x| x.scale.map(|s| p.eval(f, s, &[]))).collect())
        .collect();
    let within = f.remc(tid, 128);
    let registers = if cut.consumers > 1 { Roles::registers(form.decodes())[1] } else { 255 / cut.resident() };
    let batch = super::batch(p.k, a, registers, a.groups.len() as i64 * cut.columns / 2);
    let worker = Worker { ring, cut, leads, own: own.clone(), within, shared, sums };
    let init = Ring::start(f);
    tiles.each(f, &init, |f, [m, n], carried| {
        let mut now = [carried[0].clone(), carried[1].clone()];
        let mut totals: Vec<Option<Val>> = vec![None; a.groups.len()];
        for ((pass, scales), depth) in form.passes.iter().zip(&scales).zip(depths) {
            let begin: Vec<Val> = pass
                .parts
                .iter()
                .zip(scales)
                .map(|(x, s)| match (s, &totals[x.group]) {
                    (None, Some(t)) => t.clone(),
                    _ => none.clone(),
                })
                .collect();
            let out = worker.pass(f, pass, depth, &mut now, &begin);
            for ((x, s), sum) in pass.parts.iter().zip(scales).zip(out) {
                let before = totals[x.group].take();
                totals[x.group] = Some(match s {
                    None => sum,
                    Some(s) => worker.scaled(f, &sum, s, before.as_ref()),
                });
            }
        }
        let sums: Vec<Vec<Val>> = totals.iter().flatten().map(|t| worker.sums.elements(f, t)).collect();
        let (row, high) = (f.mulc(own, ROWS), f.mulc(&warp, 16));
        let row = f.add(&row, &high);
        let row = f.add(m, &row);
        let tile = fragment::Tile {
            lane: &lane,
            at: [&row, n],
            size: [&tiles.size[0], &tiles.size[1]],
            columns: cut.columns,
            tile: cut.columns,
            batch,
        };
        write(f, p, a, &[], &tile, &sums);
        now.to_vec()
    });
}

struct Worker<'a> {
    ring: &'a Ring,
    cut: &'a Cut,
    /// Whether the thread speaks for its warp.
    leads: Val,
    /// Number of the warpgroup among those that multiply, and of the thread in it.
    own: Val,
    within: Val,
    /// Address of shared memory, i32.
    shared: Val,
    sums: Sums,
}

impl Worker<'_> {
    /// Accumulators times a number, added to what was there.
    fn scaled(&self, f: &mut Func, x: &Val, s: &Val, before: Option<&Val>) -> Val {
        let old = before.map(|b| self.sums.elements(f, b));
        let xs = self.sums.elements(f, x);
        let scaled = xs.iter().enumerate().map(|(i, x)| match &old {
            Some(b) => f.op(format!("math.fma {x}, {s}, {} : f32", b[i])),
            None => f.op(format!("arith.mulf {x}, {s} : f32")),
        });
        let scaled: Vec<Val> = scaled.collect();
        self.sums.of(f, &scaled)
    }

    /// Adds the products of a pass to accumulators. `now` is the place in the ring.
    fn pass(&self, f: &mut Func, pass: &Pass, depth: &Val, now: &mut [Val; 2], begin: &[Val]) -> Vec<Val> {
        let known = depth.known();
        let (zero, turns) = (f.i64(0), if known.is_some() { f.ceil_divc(depth, STEP) } else { f.divc(depth, STEP) });
        let steps = (known.map_or(STEP, |d| d.min(STEP)) + 15) / 16;
        let mut init: Vec<(Val, String)> = [&now[0], &now[1], &now[0]].map(|x| (x.clone(), "i64".to_string())).to_vec();
        // In place before the fence: a loop of one turn is none.
        let begin: Vec<Val> = begin.iter().map(|x| self.sums.settled(f, x)).collect();
        init.extend(begin.into_iter().map(|x| (x, self.sums.ty.clone())));
        let out = f.for_(&zero, &turns, 1, &init, |f, t, carried| {
            let (here, before) = ([&carried[0], &carried[1]], &carried[2]);
            self.ring.arrived(f, here);
            let sums = self.products(f, pass, here[0], steps, &carried[3..]);
            // One group stays in flight; the one before it has read its stage.
            wgmma::wait(f, 1);
            let none = f.i64(0);
            let later = f.cmp("ne", t, &none);
            let frees = f.op(format!("arith.andi {}, {later} : i1", self.leads));
            self.ring.release(f, &frees, before);
            let [next, turn] = self.ring.advance(f, here);
            [vec![next, turn, here[0].clone()], sums].concat()
        });
        wgmma::wait(f, 0);
        let some = f.cmp("ne", &turns, &zero);
        let frees =
            if known.is_some() { self.leads.clone() } else { f.op(format!("arith.andi {}, {some} : i1", self.leads)) };
        self.ring.release(f, &frees, &out[2]);
        *now = [out[0].clone(), out[1].clone()];
        let mut sums: Vec<Val> = out[3..].iter().map(|x| self.sums.settled(f, x)).collect();
        if known.is_none() {
            sums = self.rest(f, pass, depth, now, sums);
        }
        sums
    }

    /// Starts the products of a stage, as one group.
    fn products(&self, f: &mut Func, pass: &Pass, stage: &Val, steps: i64, sums: &[Val]) -> Vec<Val> {
        let (cut, base) = (self.cut, self.ring.stage(f, stage));
        let descriptor = |f: &mut Func, byte: &Val, along: bool| {
            let x = f.add(&base, byte);
            let x = f.op(format!("arith.trunci {x} : i64 to i32"));
            let x = f.op(format!("arith.addi {}, {x} : i32", self.shared));
            wgmma::descriptor(f, &x, (!along).then_some(BLOCK))
        };
        let left = f.mulc(&self.own, BLOCK);
        let along_left = pass.left.along();
        let left = descriptor(f, &left, along_left);
        wgmma::fence(f);
        let mut out = sums.to_vec();
        for (i, (part, sum)) in pass.parts.iter().zip(&mut out).enumerate() {
            let right = f.i64(cut.left() + i as i64 * cut.right());
            let along = part.right.along();
            let right = descriptor(f, &right, along);
            for s in 0..steps {
                let x = f.addc(&left, s * wgmma::step(along_left));
                let y = f.addc(&right, s * wgmma::step(along));
                *sum = self.sums.multiply(f, &Left::Shared(&x, along_left), (&y, along), Some(sum));
            }
        }
        wgmma::commit(f);
        out
    }

    /// The last step of a sum whose length is no multiple of a stage. Operands lie across it; what lies past its end is whatever
    /// memory holds there, and becomes zero.
    fn rest(&self, f: &mut Func, pass: &Pass, depth: &Val, now: &mut [Val; 2], sums: Vec<Val>) -> Vec<Val> {
        let (rest, zero) = (f.remc(depth, STEP), f.i64(0));
        let one = f.i64(1);
        let turns = f.min(&rest, &one);
        let mut init: Vec<(Val, String)> = now.iter().map(|x| (x.clone(), "i64".to_string())).collect();
        init.extend(sums.into_iter().map(|x| (x, self.sums.ty.clone())));
        let out = f.for_(&zero, &turns, 1, &init, |f, _, carried| {
            let here = [&carried[0], &carried[1]];
            self.ring.arrived(f, here);
            self.clear(f, pass, here[0], &rest);
            let begin: Vec<Val> = carried[2..].iter().map(|x| self.sums.settled(f, x)).collect();
            let sums = self.products(f, pass, here[0], STEP / 16, &begin);
            wgmma::wait(f, 0);
            self.ring.release(f, &self.leads, here[0]);
            let sums = sums.iter().map(|x| self.sums.settled(f, x)).collect();
            [self.ring.advance(f, here).to_vec(), sums].concat()
        });
        *now = [out[0].clone(), out[1].clone()];
        out[2..].to_vec()
    }

    /// Zeros the lines from `rest` on of a stage, by all warpgroups that read it.
    fn clear(&self, f: &mut Func, pass: &Pass, stage: &Val, rest: &Val) {
        let blocks = (self.cut.left() + pass.parts.len() as i64 * self.cut.right()) / BLOCK;
        let base = self.ring.stage(f, stage);
        let threads = 128 * self.cut.consumers;
        let first = f.mulc(&self.own, 128);
        let first = f.add(&first, &self.within);
        let first = f.mulc(&first, 16);
        let past = f.mulc(rest, LINE);
        let (first, end) = (f.add(&past, &first), f.i64(BLOCK));
        let none = f.konst("dense<0> : vector<4xi32>");
        f.for_(&first, &end, 16 * threads, &[], |f, byte, _| {
            let at = f.add(&base, byte);
            for b in 0..blocks {
                let at = f.addc(&at, b * BLOCK);
                let at = self.ring.at(f, &at);
                shared_store(f, &none, &at, "vector<4xi32>", 16);
            }
            vec![]
        });
        // Products read shared memory on another way than stores write it.
        f.stmt("nvvm.fence.proxy {kind = #nvvm.proxy_kind<async.shared>, space = #nvvm.shared_space<cta>}");
        let (id, threads) = (f.i32(1, 1), f.i32(threads as i32, 1));
        f.stmt(&format!("nvvm.barrier id = {id} number_of_threads = {threads}"));
    }
}
