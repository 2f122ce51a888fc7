//! Attention by warpgroups: sm_90a.
//!
//! A block takes 128 rows of a head, two warpgroups 64 each: queries for the result and their gradient, keys for the gradients
//! of keys and values. The lane that copies brings these rows once, and tiles of the other side in turn to the stages of a ring.
//! Products of two tiles over the width of a head read both in shared memory; weights and their gradients go from the registers
//! they are computed in into the product with a tile whose lines lie across the sum.
//!
//! Tiles end where the last row ends that the block needs, so that no row after it is read, whatever memory holds there; the
//! first tile may begin before the sequence, with rows of another one, whose weights are zero. A warpgroup passes over tiles that
//! none of its rows needs, and masks those that not all of them see whole.

mod forward;
mod keys;
mod queries;

use super::softmax::Softmax;
use super::{Flash, Thread};
use crate::emit::dim_expr;
use crate::emit::func::{Func, Val};
use crate::emit::gpu::attention::packed::Sequence;
use crate::emit::gpu::chip::Limits;
use crate::emit::gpu::launch::Unit;
use crate::emit::gpu::pull::Pull;
use crate::emit::gpu::ring::{Ring, Roles};
use crate::emit::gpu::special;
use crate::emit::gpu::wgmma::{self, LINE, Left, ROWS, Sums};
use crate::error::CodegenError;
pub(super) use forward::emit as forward;
pub(super) use keys::emit as keys;
use pleach_ir::Sym;
use pleach_plan::{Expr, Launch, TensorMap};
pub(super) use queries::emit as queries;

/// Warpgroups that multiply.
const CONSUMERS: i64 = 2;
/// Rows of a block.
const BLOCK: i64 = ROWS * CONSUMERS;
/// Narrowest and widest head: narrower ones waste most of a line, wider ones have no registers left.
const WIDTHS: [i64; 2] = [64, 128];
/// Elements of a line.
const ELEMENTS: i64 = LINE / 2;
/// Stages at most.
const STAGES: i64 = 6;

/// What a kernel reads, and how it lies in shared memory.
struct Form {
    /// Rows of the block are of queries (0) or keys (1).
    side: usize,
    /// Matrices whose rows stay; the other ones come in tiles.
    own: i64,
    /// Rows of a tile.
    tile: i64,
    /// Lines that a row of a head takes.
    lines: i64,
    stages: i64,
    /// A map for each matrix, and the first column of head 0 in it.
    maps: Vec<TensorMap>,
    offsets: Vec<i64>,
    /// Bytes behind everything else, for each stage.
    extra: i64,
}

/// Inputs that a kernel reads: those whose rows stay, and those that come in tiles of so many rows.
struct Inputs<'a> {
    own: &'a [usize],
    ring: &'a [usize],
    tile: i64,
    extra: i64,
}

impl Form {
    /// `None` where heads are too narrow or too wide, or the chip has no such products.
    fn of(x: &Flash<'_>, symbols: &[Sym], limits: &Limits, inputs: &Inputs<'_>) -> Result<Option<Form>, CodegenError> {
        if !limits.warpgroups || !(WIDTHS[0]..=WIDTHS[1]).contains(&x.d) {
            return Ok(None);
        }
        // Rows of q and d_out are queries, those of k and v keys.
        let side = |i: usize| usize::from(i == 1 || i == 2);
        let (mut maps, mut offsets) = (vec![], vec![]);
        for (n, i) in inputs.own.iter().chain(inputs.ring).enumerate() {
            let Some(v) = x.views[*i] else { return Ok(None) };
            let box_rows = if n < inputs.own.len() { BLOCK } else { inputs.tile };
            maps.push(TensorMap {
                buffer: v.operand as u32,
                dtype: pleach_plan::DType::BF16,
                sizes: vec![Expr::Const(v.stride as u64), dim_expr(x.k, x.rows[side(*i)], symbols)?],
                strides: vec![Expr::Const(2 * v.stride as u64)],
                boxes: vec![ELEMENTS as u32, box_rows as u32],
                swizzle: LINE as u32,
            });
            offsets.push(v.offset);
        }
        let lines = (x.d + ELEMENTS - 1) / ELEMENTS;
        let (own, side) = (inputs.own.len() as i64, side(inputs.own[0]));
        let mut form = Form { side, own, tile: inputs.tile, lines, stages: 0, maps, offsets, extra: inputs.extra };
        let room = i64::from(limits.shared_block) - form.own() - Ring::barrier_bytes(1);
        form.stages = (room / (form.stage() + Ring::barrier_bytes(1) + form.extra)).min(STAGES);
        Ok((form.stages >= 2).then_some(form))
    }

    /// Bytes of the rows that stay, and of a stage.
    fn own(&self) -> i64 {
        self.own * self.lines * BLOCK * LINE
    }

    fn stage(&self) -> i64 {
        (self.maps.len() as i64 - self.own) * self.lines * self.tile * LINE
    }

    /// Where the barriers lie, and what is behind them.
    fn barriers(&self) -> i64 {
        self.own() + self.stages * self.stage()
    }

    fn behind(&self) -> i64 {
        self.barriers() + Ring::barrier_bytes(1 + self.stages)
    }

    fn shared(&self) -> i64 {
        self.behind() + self.stages * self.extra
    }
}

/// Tiles of a sequence for a block, for `heads` heads from `head` on, one after the other.
struct Turns {
    /// First row of the sequence, and of the first tile from there on.
    start: Val,
    base: Val,
    tiles: Val,
    head: Val,
    heads: i64,
    /// Rows of a tile.
    rows: i64,
}

impl Turns {
    /// Tiles that end at row `to` and begin at row `from` or before it.
    fn of(f: &mut Func, start: &Val, (from, to): (&Val, &Val), (head, heads): (Val, i64), rows: i64) -> Turns {
        let (span, zero) = (f.sub(to, from), f.i64(0));
        let span = f.max(&span, &zero);
        let tiles = f.ceil_divc(&span, rows);
        let all = f.mulc(&tiles, rows);
        Turns { start: start.clone(), base: f.sub(to, &all), tiles, head, heads, rows }
    }

    /// First row of a tile in its sequence.
    fn at(&self, f: &mut Func, tile: &Val) -> Val {
        let at = f.mulc(tile, self.rows);
        f.add(&self.base, &at)
    }

    /// The first tile that has row `row` or ends at it (`up`), if the row is not before all of them.
    fn tile(&self, f: &mut Func, row: &Val, up: bool) -> Val {
        let (x, zero) = (f.sub(row, &self.base), f.i64(0));
        let x = f.max(&x, &zero);
        if up { f.ceil_divc(&x, self.rows) } else { f.divc(&x, self.rows) }
    }
}

/// A block.
struct Block<'a, 'b> {
    w: Softmax<'a, 'b>,
    form: &'a Form,
    /// Rows that stay, and tiles.
    own: Ring,
    ring: Ring,
    /// First row of the block; all rows of its side.
    first: Val,
    rows: Val,
    /// Numbers of the sequences that matter here.
    sequences: (Val, Val),
}

/// What differs: the tiles of a sequence, and what a warpgroup (by its number) makes of them.
struct Kernel {
    suffix: &'static str,
    scratch: bool,
    turns: fn(&mut Func, &Block<'_, '_>, &Sequence) -> Turns,
    work: fn(&mut Func, &mut Pull<'_>, &Worker<'_, '_>),
}

fn emit(x: &Flash<'_>, symbols: &[Sym], form: &Form, kernel: &Kernel) -> Result<(String, Launch), CodegenError> {
    let mut unit = Unit::with_maps(x.k, kernel.suffix, kernel.scratch, &form.maps);
    let f = &mut unit.f;
    let mut p = Pull::new(f, x.k, symbols);
    let rows = p.dim(f, x.rows[form.side]);
    let first = special(f, "ctaid.x");
    let first = f.mulc(&first, BLOCK);
    let inside = f.cmp("slt", &first, &rows);
    x.guarded(f, &mut p, |f, p| f.if_(&inside, |f| block(x, form, kernel, f, p, (&first, &rows))));
    p.finish()?;
    let [_, heads, one] = x.blocks(form.side, symbols)?;
    let blocks = dim_expr(x.k, x.rows[form.side], symbols)?.ceil_div(BLOCK as u64);
    Ok(unit.finish([blocks, heads, one], Roles::threads(CONSUMERS) as u32, form.shared() as u32, 1))
}

fn block(x: &Flash<'_>, form: &Form, kernel: &Kernel, f: &mut Func, p: &mut Pull<'_>, (first, rows): (&Val, &Val)) {
    let roles = Roles::new(f, CONSUMERS);
    let readers = 4 * CONSUMERS;
    let own = Ring::new(f, 1, (0, form.own()), form.barriers(), readers);
    let after = form.barriers() + Ring::barrier_bytes(1);
    let ring = Ring::new(f, form.stages, (form.own(), form.stage()), after, readers);
    Ring::begin(f, &roles.tid, &[&own, &ring], form.maps.len());
    let sequences = match form.side {
        0 => Sequence::of_rows(f, p, x.c, (first, BLOCK), rows),
        _ => {
            let count = p.k.body.ty(x.c.bounds[1]).shape[0];
            (f.i64(0), p.dim(f, count))
        }
    };
    let t = Thread::new(f);
    let w = Softmax::new(f, x, t);
    let mut b = Block { w, form, own, ring, first: first.clone(), rows: rows.clone(), sequences };
    let mut both = (&mut b, p);
    roles.split(
        f,
        &mut both,
        |f, (b, p), _| b.produce(f, p, kernel.turns),
        |f, (b, p), own| {
            // Rows of this warpgroup, 16 for each of its warps.
            let offset = f.mulc(own, ROWS);
            b.w.t.block = f.add(&b.first, &offset);
            b.w.t.warp = f.remc(&b.w.t.warp, 4);
            let zero = f.i64(0);
            let leads = f.cmp("eq", &b.w.t.lane, &zero);
            let worker = Worker { b, own: own.clone(), leads, turns: kernel.turns };
            b.own.arrived(f, [&zero, &zero]);
            (kernel.work)(f, p, &worker);
        },
    );
}

/// The tiles of keys that a block of queries needs.
fn keys_of(f: &mut Func, b: &Block<'_, '_>, s: &Sequence) -> Turns {
    let (from, to) = b.w.span(f, s, &b.first, BLOCK);
    let at = &b.w.x.c.at;
    let head = f.divc(&b.w.t.head, i64::from(at.heads / at.kv_heads));
    Turns::of(f, &s.k0, (&from, &to), (head, 1), b.form.tile)
}

impl Block<'_, '_> {
    /// Copies rows of a head from `line` on: a box for each line of a row.
    fn copy(&self, f: &mut Func, ring: &Ring, map: usize, (head, line, rows): (&Val, &Val, i64), at: &Val, full: &Val) {
        let column = f.mulc(head, self.w.x.d);
        let column = f.addc(&column, self.form.offsets[map]);
        for i in 0..self.form.lines {
            let (column, at) = (f.addc(&column, ELEMENTS * i), f.addc(at, rows * LINE * i));
            ring.copy(f, map, [&column, line], &at, full);
        }
    }

    /// The lane that copies.
    fn produce(&self, f: &mut Func, p: &mut Pull<'_>, turns: fn(&mut Func, &Block<'_, '_>, &Sequence) -> Turns) {
        let (form, zero) = (self.form, f.i64(0));
        let full = self.own.refill(f, [&zero, &zero], form.own());
        for map in 0..form.own {
            let at = f.i64(map * form.lines * BLOCK * LINE);
            self.copy(f, &self.own, map as usize, (&self.w.t.head, &self.first, BLOCK), &at, &full);
        }
        let carry = |now: &[Val]| now.iter().map(|x| (x.clone(), "i64".to_string())).collect::<Vec<_>>();
        let init = Ring::start(f);
        f.for_(&self.sequences.0, &self.sequences.1, 1, &init, |f, s, now| {
            let s = Sequence::of(f, p, self.w.x.c, s);
            let t = turns(f, self, &s);
            let heads = f.i64(t.heads);
            f.for_(&zero, &heads, 1, &carry(now), |f, h, now| {
                let head = f.add(&t.head, h);
                f.for_(&zero, &t.tiles, 1, &carry(now), |f, tile, now| {
                    let line = t.at(f, tile);
                    let line = f.add(&t.start, &line);
                    let here = [&now[0], &now[1]];
                    let full = self.ring.refill(f, here, form.stage());
                    let at = self.ring.stage(f, here[0]);
                    for map in form.own..form.maps.len() as i64 {
                        let at = f.addc(&at, (map - form.own) * form.lines * form.tile * LINE);
                        self.copy(f, &self.ring, map as usize, (&head, &line, form.tile), &at, &full);
                    }
                    self.ring.advance(f, here).to_vec()
                })
            })
        });
    }
}

/// A warpgroup that multiplies.
struct Worker<'a, 'b> {
    b: &'a Block<'a, 'b>,
    /// Its number among those that multiply; whether the thread speaks for its warp.
    own: Val,
    leads: Val,
    turns: fn(&mut Func, &Block<'_, '_>, &Sequence) -> Turns,
}

/// What a tile's rows are masked by: the first row of the tile, and what the thread's two rows see.
type Masks<'a> = Option<(&'a Val, &'a [(Val, Val); 2])>;

/// The values of a list that a loop carries, with their types.
fn carry(now: &[Val], types: &[String]) -> Vec<(Val, String)> {
    now.iter().cloned().zip(types.iter().cloned()).collect()
}

impl Worker<'_, '_> {
    /// Goes through all sequences and their tiles of keys, for a block of queries. State: the place in the ring, accumulators of
    /// these types, then numbers; `tile` gives the next one.
    fn keys(
        &self,
        f: &mut Func,
        p: &mut Pull<'_>,
        init: Vec<(Val, String)>,
        tile: impl Fn(&mut Func, Masks<'_>, &[Val]) -> Vec<Val>,
    ) -> Vec<Val> {
        let init = [Ring::start(f), init].concat();
        let types: Vec<String> = init.iter().map(|x| x.1.clone()).collect();
        let (w, b) = (&self.b.w, self.b);
        f.for_(&b.sequences.0, &b.sequences.1, 1, &init, |f, s, now| {
            let (s, zero) = (Sequence::of(f, p, w.x.c, s), f.i64(0));
            let t = (self.turns)(f, b, &s);
            let bounds = w.bounds(f, &s);
            // Tiles that a row of the warpgroup sees; those that all rows see whole.
            let (from, to) = w.span(f, &s, &w.t.block, ROWS);
            let some = f.cmp("slt", &from, &to);
            let (first, last) = (t.tile(f, &from, false), t.tile(f, &to, true));
            let first = f.op(format!("arith.select {some}, {first}, {zero} : i64"));
            let last = f.op(format!("arith.select {some}, {last}, {zero} : i64"));
            let end = f.i64(ROWS - 1);
            let (hi, (lo, after)) = (w.sees(f, &s, &zero).1, w.sees(f, &s, &end));
            let in_all = f.cmp("slt", &lo, &after);
            let hi = f.op(format!("arith.select {in_all}, {hi}, {zero} : i64"));
            let (begin, end) = (t.tile(f, &lo, true), t.tile(f, &hi, false));
            let begin = f.max(&begin, &first);
            let begin = f.min(&begin, &last);
            let end = f.max(&end, &begin);
            let end = f.min(&end, &last);
            let mut now = self.skip(f, &zero, &first, now);
            for (from, to, whole) in [(&first, &begin, false), (&begin, &end, true), (&end, &last, false)] {
                now = f.for_(from, to, 1, &carry(&now, &types), |f, i, now| {
                    let at = t.at(f, i);
                    tile(f, (!whole).then_some((&at, &bounds)), now)
                });
            }
            self.skip(f, &last, &t.tiles, &now)
        })
    }

    /// Passes over tiles that no row needs.
    fn skip(&self, f: &mut Func, from: &Val, to: &Val, now: &[Val]) -> Vec<Val> {
        let ring = &self.b.ring;
        let init: Vec<(Val, String)> = now[..2].iter().map(|x| (x.clone(), "i64".to_string())).collect();
        let place = f.for_(from, to, 1, &init, |f, _, now| {
            let here = [&now[0], &now[1]];
            ring.arrived(f, here);
            ring.release(f, &self.leads, here[0]);
            ring.advance(f, here).to_vec()
        });
        [&place[..], &now[2..]].concat()
    }

    /// The descriptor of a matrix at a byte of shared memory.
    fn descriptor(&self, f: &mut Func, byte: &Val, across: Option<i64>) -> Val {
        let base = self.b.ring.address(f);
        let x = f.op(format!("arith.trunci {byte} : i64 to i32"));
        let x = f.op(format!("arith.addi {base}, {x} : i32"));
        wgmma::descriptor(f, &x, across)
    }

    /// Rows of the warpgroup in matrix `own` of those that stay, times the rows of matrix `other` of a stage, over a head.
    fn product(&self, f: &mut Func, sums: &Sums, own: i64, stage: &Val, other: i64) -> Val {
        let form = self.b.form;
        let rows = f.mulc(&self.own, ROWS * LINE);
        let rows = f.addc(&rows, own * form.lines * BLOCK * LINE);
        // Made anew for each tile: kept from tile to tile, the descriptors of all steps would take two registers each.
        let rows = wgmma::settled(f, &[rows], "i64", "l");
        let left = self.descriptor(f, &rows[0], None);
        let right = f.addc(stage, other * form.lines * form.tile * LINE);
        let right = self.descriptor(f, &right, None);
        let mut out = None;
        for i in 0..self.b.w.x.d / 16 {
            // A line has four times 16 elements of a row; the next ones are behind all rows.
            let (line, within) = (i / 4, i % 4 * wgmma::step(true));
            let a = f.addc(&left, line * BLOCK * LINE / 16 + within);
            let b = f.addc(&right, line * form.tile * LINE / 16 + within);
            out = Some(sums.multiply(f, &Left::Shared(&a, true), (&b, true), out.as_ref()));
        }
        out.unwrap_or_else(|| sums.none(f))
    }

    /// Adds pairs in registers, 64 rows of the warpgroup by the rows of a tile, times matrix `other` of a stage.
    fn weighted(&self, f: &mut Func, sums: &Sums, pairs: &[Val], (stage, other): (&Val, i64), sum: &Val) -> Val {
        let form = self.b.form;
        let right = f.addc(stage, other * form.lines * form.tile * LINE);
        let right = self.descriptor(f, &right, Some(form.tile * LINE));
        let mut sum = sum.clone();
        for (j, a) in pairs.chunks(4).enumerate() {
            let a = [0, 1, 2, 3].map(|i| a[i].clone());
            let b = f.addc(&right, j as i64 * wgmma::step(false));
            sum = sums.multiply(f, &Left::Registers(&a), (&b, false), Some(&sum));
        }
        sum
    }
}
