//! Right operands in blocks of codes: what the threads of a block decode of a tile, a part of a step of the sum at a time.

use super::{PIECE, Place, STEP, Side, THREADS};
use crate::emit::func::{Func, Val};
use crate::emit::gpu::contraction::operand::{Codes, Operand};
use crate::emit::gpu::{barrier, blocks, wgmma};

/// What a thread decodes of a tile: its codes, bytes from its first row there, and whether there is so much.
pub(super) struct Share {
    coded: blocks::Coded,
    byte: i64,
    some: Option<Val>,
}

impl Place {
    /// Pairs of pieces in a row of a tile, and what is this thread's: the row of a turn, the block in it, the pair in that.
    fn own(&self, f: &mut Func, s: &Side) -> (i64, [Val; 3]) {
        let pairs = if s.along { STEP } else { s.lines } / blocks::VALUES * blocks::PAIRS;
        let (row, rest) = (f.divc(&self.tid, pairs), f.remc(&self.tid, pairs));
        let (block, pair) = (f.divc(&rest, blocks::PAIRS), f.remc(&rest, blocks::PAIRS));
        (pairs, [row, block, pair])
    }

    /// Starts to read what this thread decodes of step `k0` of an operand in blocks: part `part` of so many.
    pub(super) fn read(&self, f: &mut Func, s: &Side, [k0, depth]: [&Val; 2], [part, parts]: [i64; 2]) -> Vec<Share> {
        let Operand::Codes(x) = &s.x else { return vec![] };
        let rows = if s.along { s.lines } else { STEP };
        let (pairs, [row, block, pair]) = self.own(f, s);
        let within = f.mulc(&block, blocks::VALUES);
        let (line, step) = if s.along { (&row, &within) } else { (&within, &row) };
        let (line, step) = (f.add(&self.block[1], line), f.add(k0, step));
        let from = f.addc(&line, x.first);
        let (of, along) = if s.along { (&from, &step) } else { (&step, &from) };
        let number = f.divc(along, blocks::VALUES);
        let place = x.blocks.block(f, of, &number);
        // Hidden from LLVM, which would keep the places of all operands for all turns.
        let hidden = wgmma::settled(f, &[line, step, place], "i64", "l");
        let mut out = vec![];
        // Rows of a turn: groups of 8, so that pieces of all turns are permuted alike.
        let turn = THREADS / pairs;
        for first in (0..rows).step_by(turn as usize).filter(|r| r / turn % parts == part) {
            let (lines, steps) = if s.along { (first, 0) } else { (0, first) };
            let (line, step) = (f.addc(&hidden[0], lines), f.addc(&hidden[1], steps));
            let (a, b) = (f.cmp("slt", &line, &self.size[1]), f.cmp("slt", &step, depth));
            let ok = f.op(format!("arith.andi {a}, {b} : i1"));
            let place = f.addc(&hidden[2], x.blocks.distance(first, 0));
            let coded = x.blocks.load(f, &place, &pair, Some(&ok));
            let some = (first + turn > rows).then(|| {
                let end = f.i64(rows - first);
                f.cmp("slt", &row, &end)
            });
            out.push(Share { coded, byte: first * if s.along { STEP * 2 } else { s.lines * 2 }, some });
        }
        out
    }

    /// Writes what is laid over an operand in blocks to a stage that holds what its codes stand for.
    pub(super) fn lay(&self, f: &mut Func, s: &Side, [k0, depth]: [&Val; 2], stage: &Val) {
        let Operand::Codes(Codes { over: Some(over), first, .. }) = &s.x else { return };
        let column = f.addc(&self.block[1], *first);
        let (from, span) = if over.lines { (&column, s.lines) } else { (k0, STEP) };
        let others = if over.lines { STEP } else { s.lines };
        debug_assert!(others <= THREADS);
        over.each(f, from, span, |f, place, j| {
            barrier(f);
            let (base, end) = if over.lines { (k0, depth) } else { (&self.block[1], &self.size[1]) };
            let (other, most) = (f.add(base, &self.tid), f.i64(others));
            let (a, b) = (f.cmp("slt", &self.tid, &most), f.cmp("slt", &other, end));
            let ok = f.op(format!("arith.andi {a}, {b} : i1"));
            f.if_(&ok, |f| {
                let other = if over.lines { other } else { f.addc(&other, *first) };
                let (line, step) = if over.lines { (place, &self.tid) } else { (&self.tid, place) };
                let (row, within) = if s.along { (line, step) } else { (step, line) };
                let (piece, element) = (f.divc(within, PIECE), f.remc(within, PIECE));
                let (at, byte) = (self.piece(f, s, row, &piece), f.mulc(&element, 2));
                let at = f.add(&at, &byte);
                let at = f.add(&at, stage);
                let at = f.addc(&at, s.start);
                let to = self.shared(f, &at);
                over.store(f, j, &other, &to);
            });
        });
    }

    /// Writes to a stage what was read stands for.
    pub(super) fn decode(&self, f: &mut Func, s: &Side, shares: &[Share], stage: &Val) {
        let Operand::Codes(x) = &s.x else { return };
        let (_, [row, block, pair]) = self.own(f, s);
        let piece = f.mulc(&block, blocks::VALUES / PIECE);
        let piece = f.add(&piece, &pair);
        let places = [0, blocks::APART].map(|n| {
            let piece = f.addc(&piece, n);
            let at = self.piece(f, s, &row, &piece);
            let at = f.add(&at, stage);
            f.addc(&at, s.start)
        });
        for share in shares {
            let put = |f: &mut Func| {
                for (pairs, place) in x.blocks.pairs(f, &share.coded).iter().zip(&places) {
                    let at = f.addc(place, share.byte);
                    let to = self.shared(f, &at);
                    blocks::store(f, pairs, &to);
                }
            };
            match &share.some {
                Some(some) => f.if_(some, put),
                None => put(f),
            }
        }
    }
}
