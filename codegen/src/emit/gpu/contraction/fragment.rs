//! From the accumulators of matrix instructions to results.
//!
//! `mma.sync` and `wgmma` leave 16 rows of a product in one layout: of every 8 columns, a lane has two neighbours in row
//! `lane / 4` and the same two 8 rows further down. Neighbouring lanes exchange half of theirs, so that each has four
//! neighbours; loads and stores of the epilogue then fill whole 32-byte sectors. Elements are handed on in batches: all that
//! a batch reads can be read before its first result is written.

use crate::emit::func::{Func, Val};

/// Elements that a thread computes side by side.
pub(super) const TOGETHER: i64 = 4;
/// Columns of one batch of a warp, the widest first.
pub(super) const BATCHES: [i64; 3] = [64, 32, 16];

/// Columns of results with those that fill up the last four, which are computed and not written.
pub(super) fn whole(f: &mut Func, columns: &Val) -> Val {
    match columns.known() {
        Some(n) => f.i64((n as u64).next_multiple_of(TOGETHER as u64) as i64),
        None => columns.clone(),
    }
}

/// A part of the results: 16 rows.
pub(super) struct Tile<'a> {
    /// Number of the thread in its warp.
    pub(super) lane: &'a Val,
    /// First row and column.
    pub(super) at: [&'a Val; 2],
    /// Rows and columns of the results, columns as [`whole`] fours.
    pub(super) size: [&'a Val; 2],
    /// Columns of this part, which its first column is a multiple of.
    pub(super) columns: i64,
    /// Columns of a tile, which all tiles together may exceed those of the results by.
    pub(super) tile: i64,
    /// Columns of one batch at most.
    pub(super) batch: i64,
}

/// Exchanges pairs of two neighbouring blocks of 8 columns: an even lane gets four columns of the first, an odd one of the
/// second.
fn exchange(f: &mut Func, odd: &Val, first: [&Val; 2], second: [&Val; 2]) -> [Val; 4] {
    let (all, one, last) = (f.i32(-1, 1), f.i32(1, 1), f.i32(31, 1));
    let pick = |f: &mut Func, a: &Val, b: &Val| f.op(format!("arith.select {odd}, {a}, {b} : f32"));
    let (mut own, mut got) = (vec![], vec![]);
    for e in 0..2 {
        let give = pick(f, first[e], second[e]);
        own.push(pick(f, second[e], first[e]));
        got.push(f.op(format!("nvvm.shfl.sync bfly {all}, {give}, {one}, {last} : f32 -> f32")));
    }
    [pick(f, &got[0], &own[0]), pick(f, &got[1], &own[1]), pick(f, &own[0], &got[0]), pick(f, &own[1], &got[1])]
}

/// Hands on 16 rows of each group of accumulators, four values for every 8 columns: `put` gets row and first column (a multiple of
/// four), how many columns after it the elements lie, and the elements of each group. All lanes of the warp take part.
pub(super) fn each(
    f: &mut Func,
    t: &Tile<'_>,
    sums: &[Vec<Val>],
    mut put: impl FnMut(&mut Func, [&Val; 2], &[i64], &[Vec<Val>]),
) {
    let bit = f.remc(t.lane, 2);
    let one = f.i64(1);
    let odd = f.cmp("eq", &bit, &one);
    let (row, pair) = (f.divc(t.lane, 4), f.remc(t.lane, 4));
    let high = f.divc(&pair, 2);
    let (bit, high) = (f.mulc(&bit, 8), f.mulc(&high, TOGETHER));
    let (row, column) = (f.add(t.at[0], &row), f.add(t.at[1], &bit));
    let column = f.add(&column, &high);
    let known = t.size[1].known();
    let whole = known.is_some_and(|n| n % t.tile == 0);
    // Columns at which all of a batch are inside or none is.
    let divides = |w: &i64| whole || known.is_some_and(|n| n % w == 0);
    let fits = |w: &i64| *w <= t.batch && t.columns % w == 0 && divides(w);
    let step = BATCHES.into_iter().find(fits).unwrap_or(16);
    let by_piece = !divides(&step);
    for half in 0..2 {
        let m = f.addc(&row, 8 * half);
        let in_rows = f.cmp("slt", &m, t.size[0]);
        for first in (0..t.columns).step_by(step as usize) {
            let blocks = first / 8..(first + step).min(t.columns) / 8;
            let (mut places, mut own) = (vec![], vec![vec![]; sums.len()]);
            for block in blocks.step_by(2) {
                let at = |b: i64| (4 * b + 2 * half) as usize;
                let (i, j) = (at(block), at(block + 1));
                for (s, own) in sums.iter().zip(&mut own) {
                    own.extend(exchange(f, &odd, [&s[i], &s[i + 1]], [&s[j], &s[j + 1]]));
                }
                places.extend((0..TOGETHER).map(|e| 8 * block + e));
            }
            f.if_(&in_rows, |f| {
                let mut some = |f: &mut Func, from: usize, to: usize| {
                    let part: Vec<Vec<Val>> = own.iter().map(|o| o[from..to].to_vec()).collect();
                    put(f, [&m, &column], &places[from..to], &part);
                };
                let inside = |f: &mut Func, place: i64| {
                    let n = f.addc(&column, place);
                    f.cmp("slt", &n, t.size[1])
                };
                if whole {
                    some(f, 0, places.len());
                } else if by_piece {
                    for i in (0..places.len()).step_by(TOGETHER as usize) {
                        let ok = inside(f, places[i]);
                        f.if_(&ok, |f| some(f, i, i + TOGETHER as usize));
                    }
                } else {
                    let ok = inside(f, places[0]);
                    f.if_(&ok, |f| some(f, 0, places.len()));
                }
            });
        }
    }
}
