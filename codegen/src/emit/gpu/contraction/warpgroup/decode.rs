//! Right operands in blocks of codes: the first warpgroup decodes them into the stages that copies fill with all else.
//!
//! Codes of a stage are read before the stage is free, so that they are there when it is; what they stand for is written as tensor
//! copies would have left it: lines of 128 bytes whose pieces are permuted. One lane of the warpgroup starts the copies, too, and all of it reads
//! what indices pick ([`super::picked`]).

use super::form::{BLOCK, Coded, Form, Pass, ROWS, STEP, Source};
use super::picked::Picker;
use super::{Tiles, copies};
use crate::emit::contraction::analyze::Analysis;
use crate::emit::func::{Func, Val};
use crate::emit::gpu::blocks;
use crate::emit::gpu::contraction::operand::Codes;
use crate::emit::gpu::launch::shared_at;
use crate::emit::gpu::pull::Pull;
use crate::emit::gpu::ring::Ring;
use crate::emit::gpu::wgmma::{self, LINE};

/// Threads of a warpgroup.
const THREADS: i64 = 128;
/// Pairs of pieces in a line of a stage.
const PAIRS: i64 = STEP / blocks::VALUES * blocks::PAIRS;

/// A pair of pieces that a thread decodes.
struct Share<'a> {
    codes: &'a Codes,
    coded: blocks::Coded,
    /// Bytes from the thread's first line in a stage to its line.
    byte: i64,
}

/// What a thread of the warpgroup decodes. Its lines are whole groups of 8 apart, so that their pieces are permuted alike.
struct Decoder<'a> {
    form: &'a Form,
    /// Rows and columns of the results.
    size: &'a [Val; 2],
    /// First line of a thread, its block there and pair in that.
    line: Val,
    block: Val,
    pair: Val,
    /// Byte of either piece from the beginning of a stage's operand on, in the first line.
    pieces: [Val; 2],
}

/// The warpgroup that copies, decodes and picks; `leads` says which thread copies.
pub(super) fn produce(
    f: &mut Func,
    p: &mut Pull<'_>,
    a: &Analysis,
    form: &Form,
    ring: &Ring,
    tiles: &Tiles,
    [tid, leads]: [&Val; 2],
) {
    let (lane, zero) = (f.remc(tid, 32), f.i64(0));
    let speaks = f.cmp("eq", &lane, &zero);
    let (line, rest) = (f.divc(tid, PAIRS), f.remc(tid, PAIRS));
    let (block, pair) = (f.divc(&rest, blocks::PAIRS), f.remc(&rest, blocks::PAIRS));
    let (piece, turn) = (f.mulc(&block, blocks::VALUES / blocks::PIECE), f.remc(&line, 8));
    let (piece, bytes) = (f.add(&piece, &pair), f.mulc(&line, LINE));
    let pieces = [0, blocks::APART].map(|n| {
        let piece = f.addc(&piece, n);
        let turned = f.op(format!("arith.xori {piece}, {turn} : i64"));
        let at = f.mulc(&turned, 16);
        f.add(&bytes, &at)
    });
    let d = Decoder { form, size: &tiles.size, line, block, pair, pieces };
    let sources: Vec<Vec<Option<Codes>>> =
        form.passes.iter().map(|pass| pass.parts.iter().map(|x| source(f, a, &x.right)).collect()).collect();
    let picks: Vec<Vec<Picker>> = form.passes.iter().map(|pass| Picker::all(f, p, a, &form.cut, pass)).collect();
    let lengths: Vec<Val> = form.passes.iter().map(|pass| p.dim(f, pass.depth)).collect();
    let init = Ring::start(f);
    tiles.each(f, &init, |f, [m, n], carried| {
        let mut now = carried.to_vec();
        for (((pass, codes), picks), depth) in form.passes.iter().zip(&sources).zip(&picks).zip(&lengths) {
            let (zero, turns) = (f.i64(0), f.ceil_divc(depth, STEP));
            // Hidden from LLVM, which would write out a short loop with registers for each turn.
            let turns =
                if turns.known() == Some(1) { turns } else { wgmma::settled(f, &[turns], "i64", "l").remove(0) };
            let init: Vec<(Val, String)> = now.iter().map(|x| (x.clone(), "i64".to_string())).collect();
            now = f.for_(&zero, &turns, 1, &init, |f, t, now| {
                let here = [&now[0], &now[1]];
                let step = f.mulc(t, STEP);
                let shares = d.read(f, pass, codes, [n, &step], depth);
                ring.freed(f, here);
                f.if_(leads, |f| copies(f, &form.cut, pass, ring, here[0], [m, n, &step]));
                let base = ring.stage(f, here[0]);
                picks.iter().for_each(|x| x.fill(f, ring, &base, [m, n], d.size, [&step, depth], tid));
                let pieces = d.pieces.each_ref().map(|p| {
                    let at = f.add(&base, p);
                    ring.at(f, &at)
                });
                shares.iter().for_each(|s| s.write(f, &pieces));
                for (i, codes) in codes.iter().enumerate() {
                    let start = f.addc(&base, form.cut.left() + i as i64 * form.cut.right());
                    codes.iter().for_each(|x| d.lay(f, ring, x, &start, [n, tid], [&step, depth]));
                }
                ring.written(f, &speaks, here[0]);
                ring.advance(f, here).to_vec()
            });
        }
        now
    });
}

fn source(f: &Func, a: &Analysis, x: &Source) -> Option<Codes> {
    let Source::Decoded(Coded { product, column, .. }) = x else { return None };
    Codes::of(f, &a.products[*product], *column)
}

impl Decoder<'_> {
    /// Starts to read what a thread decodes of a stage: the tile's columns from `n` on, steps from `step` on.
    fn read<'c>(
        &self,
        f: &mut Func,
        pass: &Pass,
        codes: &'c [Option<Codes>],
        [n, step]: [&Val; 2],
        depth: &Val,
    ) -> Vec<Share<'c>> {
        let (cut, mut out) = (&self.form.cut, vec![]);
        let rights =
            codes.iter().enumerate().filter_map(|(i, c)| Some((cut.left() + i as i64 * cut.right(), c.as_ref()?)));
        let (end, within) = (depth.clone(), f.mulc(&self.block, blocks::VALUES));
        debug_assert_eq!(codes.len(), pass.parts.len());
        for (start, codes) in rights {
            // Lines of 64 steps of a column each; or, in blocks of 64 columns, of these columns of a step each.
            let (column, at) = if codes.along {
                (f.add(n, &self.line), f.add(step, &within))
            } else {
                (f.add(n, &within), f.add(step, &self.line))
            };
            let from = f.addc(&column, codes.first);
            let (row, along) = if codes.along { (&from, &at) } else { (&at, &from) };
            let block = f.divc(along, blocks::VALUES);
            let place = codes.blocks.block(f, row, &block);
            // Hidden from LLVM, which would keep the place of every share for all turns.
            let [column, at, place] = <[Val; 3]>::try_from(wgmma::settled(f, &[column, at, place], "i64", "l"))
                .unwrap_or_else(|_| [0; 3].map(|_| Val::named("%nothing")));
            for turn in 0..cut.columns * PAIRS / THREADS {
                let first = turn * (THREADS / PAIRS);
                let (columns, steps, byte) = if codes.along {
                    (first, 0, start + first * LINE)
                } else {
                    (first / STEP * ROWS, first % STEP, start + first / STEP * BLOCK + first % STEP * LINE)
                };
                let (column, at) = (f.addc(&column, columns), f.addc(&at, steps));
                let (a, b) = (f.cmp("slt", &column, &self.size[1]), f.cmp("slt", &at, &end));
                let ok = f.op(format!("arith.andi {a}, {b} : i1"));
                let away = match codes.along {
                    true => codes.blocks.distance(columns, 0),
                    false => codes.blocks.distance(steps, columns / blocks::VALUES),
                };
                let place = f.addc(&place, away);
                let coded = codes.blocks.load(f, &place, &self.pair, Some(&ok));
                out.push(Share { codes, coded, byte });
            }
        }
        out
    }
}

impl Decoder<'_> {
    /// Writes what is laid over an operand in blocks into a stage, from byte `start` on, that holds what its codes stand for.
    fn lay(&self, f: &mut Func, ring: &Ring, x: &Codes, start: &Val, [n, tid]: [&Val; 2], [step, depth]: [&Val; 2]) {
        let Some(over) = &x.over else { return };
        let columns = self.form.cut.columns;
        let column = f.addc(n, x.first);
        let (from, span) = if over.lines { (&column, columns) } else { (step, STEP) };
        let others = if over.lines { STEP } else { columns };
        over.each(f, from, span, |f, place, j| {
            let (id, threads) = (f.i32(2, 1), f.i32(THREADS as i32, 1));
            f.stmt(&format!("nvvm.barrier id = {id} number_of_threads = {threads}"));
            for turn in 0..(others as u64).div_ceil(THREADS as u64) as i64 {
                let (own, most) = (f.addc(tid, turn * THREADS), f.i64(others));
                let (base, end) = if over.lines { (step, depth) } else { (n, &self.size[1]) };
                let other = f.add(base, &own);
                let (a, b) = (f.cmp("slt", &own, &most), f.cmp("slt", &other, end));
                let ok = f.op(format!("arith.andi {a}, {b} : i1"));
                f.if_(&ok, |f| {
                    let other = if over.lines { other } else { f.addc(&other, x.first) };
                    let (line, step) = if over.lines { (place, &own) } else { (&own, place) };
                    let (row, within) = if x.along { (line, step) } else { (step, line) };
                    // Across the sum lines lie in blocks of 64, of which each has all steps.
                    let (block, within) = (f.divc(within, STEP), f.remc(within, STEP));
                    let (piece, element) = (f.divc(&within, blocks::PIECE), f.remc(&within, blocks::PIECE));
                    let turned = f.remc(row, 8);
                    let turned = f.op(format!("arith.xori {piece}, {turned} : i64"));
                    let parts = [f.mulc(&block, BLOCK), f.mulc(row, LINE), f.mulc(&turned, 16), f.mulc(&element, 2)];
                    let at = parts.iter().fold(start.clone(), |at, x| f.add(&at, x));
                    let to = ring.at(f, &at);
                    over.store(f, j, &other, &to);
                });
            }
        });
    }
}

impl Share<'_> {
    /// Writes what was read stands for to a stage: both pieces of the first line lie at these addresses.
    fn write(&self, f: &mut Func, to: &[Val; 2]) {
        let byte = f.i64(self.byte);
        for (pairs, to) in self.codes.blocks.pairs(f, &self.coded).iter().zip(to) {
            let to = shared_at(f, to, &byte, "i8");
            blocks::store(f, pairs, &to);
        }
    }
}
