//! Operands of which indices pick rows or columns, and those without whole pieces of 16 bytes: the first warpgroup reads them into the stages that
//! copies fill with all else.
//!
//! A stage holds what tensor copies would have left there: lines of 128 bytes whose pieces are permuted. Pieces of 16 bytes lie along the axis
//! that is not picked: where its elements are neighbours in memory they are read as they are, else element by element.

use super::form::{BLOCK, Cut, Pass, Picks, ROWS, STEP, Source};
use crate::emit::contraction::analyze::Analysis;
use crate::emit::func::{Func, Val};
use crate::emit::gpu::blocks;
use crate::emit::gpu::contraction::operand::{PIECE, Picked, by_element};
use crate::emit::gpu::launch::shared_at;
use crate::emit::gpu::pull::Pull;
use crate::emit::gpu::ring::Ring;
use crate::emit::gpu::wgmma::{self, LINE};

/// Threads of a warpgroup, and lines of a stage that they fill in a turn.
const THREADS: i64 = 128;
const TURN: i64 = THREADS / (STEP / PIECE);
/// Pieces of 16 bytes, and pieces of single elements, that are on their way to a thread at once.
const TOGETHER: [usize; 2] = [4, 2];

/// A picked operand of a pass.
pub(super) struct Picker {
    x: Picked,
    picks: Picks,
    /// Byte of a stage at which it begins, and its lines there.
    start: i64,
    lines: i64,
    /// Steps of a stage that are read.
    steps: i64,
}

impl Picker {
    /// Those of a pass.
    pub(super) fn all(f: &mut Func, p: &mut Pull<'_>, a: &Analysis, cut: &Cut, pass: &Pass) -> Vec<Picker> {
        let rights = pass.parts.iter().enumerate();
        let rights = rights.map(|(i, x)| (&x.right, cut.left() + i as i64 * cut.right(), cut.columns));
        let all = std::iter::once((&pass.left, 0, cut.rows())).chain(rights);
        let mut out = vec![];
        for (source, start, lines) in all {
            let Source::Picked(picks) = *source else { continue };
            let product = &a.products[picks.product];
            let steps = product.k.known().map_or(STEP, |k| (k as i64).min(STEP));
            if let Some(x) = by_element(f, p, product, picks.side, &[], picks.column) {
                out.push(Picker { x, picks, start, lines, steps });
            }
        }
        out
    }

    /// Reads a thread's part of a stage that begins at byte `base`: of the tile from a row and a column on, and of the sum from a step on.
    #[allow(clippy::too_many_arguments, reason = "where a tile lies, and a thread")]
    pub(super) fn fill(
        &self,
        f: &mut Func,
        ring: &Ring,
        base: &Val,
        tile: [&Val; 2],
        size: &[Val; 2],
        [step, depth]: [&Val; 2],
        tid: &Val,
    ) {
        let (side, along) = (self.picks.side, self.picks.lines);
        // Of a short sum no product reads the pieces behind its end: threads take more lines in a turn.
        let needed = ((self.steps as u64).div_ceil(16) * 2).next_power_of_two() as i64;
        let fits = |n: &i64| *n >= needed && self.lines % (THREADS / n) == 0;
        let pieces = [2, 4].into_iter().find(fits).filter(|_| along).unwrap_or(STEP / PIECE);
        let turn = THREADS / pieces;
        let (row, piece) = (f.divc(tid, pieces), f.remc(tid, pieces));
        let (turned, bytes) = (f.remc(&row, 8), f.mulc(&row, LINE));
        let turned = f.op(format!("arith.xori {piece}, {turned} : i64"));
        let (at, within) = (f.mulc(&turned, 16), f.mulc(&piece, PIECE));
        let at = f.add(&at, &bytes);
        let at = f.add(&at, base);
        let at = f.addc(&at, self.start);
        let to = ring.at(f, &at);
        // A thread's first piece; those of later turns are lines further down, of steps or of lines of the operand.
        let (line, first) = if along {
            (f.add(tile[side], &row), f.add(step, &within))
        } else {
            (f.add(tile[side], &within), f.add(step, &row))
        };
        // Hidden from LLVM, which would keep the places of all pieces for all turns.
        let hidden = wgmma::settled(f, &[line, first], "i64", "l");
        let all: Vec<[i64; 3]> = if along {
            (0..self.lines / turn).map(|i| [turn * i, 0, turn * i * LINE]).collect()
        } else {
            // Blocks of 64 lines; steps that no product reads are left out.
            let steps = (self.steps as u64).div_ceil(TURN as u64) as i64;
            let block = |b: i64| (0..steps).map(move |i| [ROWS * b, TURN * i, BLOCK * b + TURN * i * LINE]);
            (0..self.lines / ROWS).flat_map(block).collect()
        };
        for some in all.chunks(TOGETHER[usize::from(self.picks.elements)]) {
            let mut pieces = vec![];
            for [lines, steps, _] in some {
                let (line, step) = (f.addc(&hidden[0], *lines), f.addc(&hidden[1], *steps));
                pieces.push(match self.picks.elements {
                    true => self.x.piece(f, [&line, &size[side]], [&step, depth]),
                    false => self.whole(f, [&line, &size[side]], [&step, depth]),
                });
            }
            for (pairs, [_, _, byte]) in pieces.iter().zip(some) {
                let byte = f.i64(*byte);
                let to = shared_at(f, &to, &byte, "i8");
                blocks::store(f, pairs, &to);
            }
        }
    }

    /// A piece that lies in memory as it is; zeros past the ends.
    fn whole(&self, f: &mut Func, [line, lines]: [&Val; 2], [step, depth]: [&Val; 2]) -> [Val; 4] {
        let (a, b) = (f.cmp("slt", line, lines), f.cmp("slt", step, depth));
        let (ok, zero) = (f.op(format!("arith.andi {a}, {b} : i1")), f.i64(0));
        let picked = if self.x.lines { line } else { step };
        let picked = f.op(format!("arith.select {ok}, {picked}, {zero} : i64"));
        let place = self.x.place(f, &picked);
        let (line, step) = if self.x.lines { (&place, step) } else { (line, &place) };
        let (a, b) = (f.mul(line, &self.x.matrix.line), f.mul(step, &self.x.matrix.step));
        let at = f.add(&a, &b);
        let at = f.op(format!("arith.select {ok}, {at}, {zero} : i64"));
        let from = f.gep(&self.x.matrix.base, &at, "i16");
        let x = f.op(format!("llvm.load {from} {{alignment = 16 : i64}} : !llvm.ptr -> vector<4xi32>"));
        [0, 1, 2, 3].map(|i| {
            let x = f.op(format!("vector.extract {x}[{i}] : i32 from vector<4xi32>"));
            let none = f.i32(0, 1);
            f.op(format!("arith.select {ok}, {x}, {none} : i32"))
        })
    }
}
