//! Operands of which indices pick single elements: what the threads of a block read of a tile, a part of a step of the sum at a time.

use super::{PIECE, Place, STEP, Side, THREADS};
use crate::emit::func::{Func, Val};
use crate::emit::gpu::blocks;
use crate::emit::gpu::contraction::operand::Operand;

/// A piece that a thread reads, and its place: row and piece of the tile, and whether there is one.
pub(super) struct Pick {
    pairs: [Val; 4],
    row: Val,
    piece: Val,
    some: Option<Val>,
}

impl Place {
    /// Starts to read what this thread takes of step `k0` of an operand: part `part` of so many.
    pub(super) fn pick(
        &self,
        f: &mut Func,
        side: usize,
        s: &Side,
        [k0, depth]: [&Val; 2],
        [part, parts]: [i64; 2],
    ) -> Vec<Pick> {
        let Operand::Picked(x) = &s.x else { return vec![] };
        let (total, row_pieces) = (s.lines * STEP / PIECE, if s.along { STEP } else { s.lines } / PIECE);
        let turns = (total as u64).div_ceil(THREADS as u64) as i64;
        let mut out = vec![];
        for turn in (0..turns).filter(|i| i % parts == part) {
            let n = f.addc(&self.tid, turn * THREADS);
            let some = ((turn + 1) * THREADS > total).then(|| {
                let end = f.i64(total);
                f.cmp("slt", &n, &end)
            });
            // Threads without a piece read the last one.
            let last = f.i64(total - 1);
            let n = if some.is_some() { f.min(&n, &last) } else { n };
            let (row, piece) = (f.divc(&n, row_pieces), f.remc(&n, row_pieces));
            let within = f.mulc(&piece, PIECE);
            let (line, step) = if s.along { (&row, &within) } else { (&within, &row) };
            let (line, step) = (f.add(&self.block[side], line), f.add(k0, step));
            let pairs = x.piece(f, [&line, &self.size[side]], [&step, depth]);
            out.push(Pick { pairs, row, piece, some });
        }
        out
    }

    /// Writes what was read to a stage.
    pub(super) fn put(&self, f: &mut Func, s: &Side, picks: &[Pick], stage: &Val) {
        for x in picks {
            let write = |f: &mut Func| {
                let at = self.piece(f, s, &x.row, &x.piece);
                let at = f.add(&at, stage);
                let at = f.addc(&at, s.start);
                let to = self.shared(f, &at);
                blocks::store(f, &x.pairs, &to);
            };
            match &x.some {
                Some(some) => f.if_(some, write),
                None => write(f),
            }
        }
    }
}
