//! Right operands in blocks of codes as a checkpoint stores them ([`pleach_ir::Layout::Blocks`]): a task decodes its columns into
//! scratch memory, whichever way round the product reads the matrix. So one copy of a weight serves both halves of
//! training, and what is in memory are the codes.
//!
//! Blocks along the columns are decoded 16 columns at a time. Blocks along the sum are decoded row by row of the matrix, that
//! is column by column of the product, and transposed in registers, 16 by 16. Values and the order of the sums are those of
//! the same product over the matrix as numbers: the results are the same bits.

use super::analyze::{Product, Right};
use super::blocking::LANES;
use super::coded::Step;
use super::context::Context;
use crate::emit::blocks::Matrix;
use crate::emit::func::{Func, Val, transpose};

/// Decodes steps `k0..k1` of the columns of a tile, from `column` on, into a panel at `to`. `k0` is a multiple of 32. Columns past the
/// last are those before them.
pub(super) fn unpack(f: &mut Func, cx: &Context, p: &Product, column: &Val, to: &Val, (k0, k1): (&Val, &Val)) {
    let Right::Blocks { arg, format, along } = p.right else { return };
    let (Some(k), Some(n)) = (p.k.known(), p.n.known()) else { return };
    let (rows, width) = if along { (n, k) } else { (k, n) };
    let m = Matrix::new(cx.buffers[arg].clone(), format, [rows, width]);
    let put = |f: &mut Func, w: [Val; 2], k: &Val, column: &Val| {
        let step = f.sub(k, k0);
        let pair = f.divc(&step, 2);
        Step::new(f, w, p.pairs(), cx.dot).put(f, to, cx.bl.width as i64, &pair, column);
    };
    if along { columns(f, cx, &m, column, (k0, k1), &put) } else { steps(f, cx, &m, column, (k0, k1), &put) }
}

/// Stores two steps, of a number and the next, of 16 columns of the tile.
type Put<'a> = dyn Fn(&mut Func, [Val; 2], &Val, &Val) + 'a;

/// Blocks along the sum.
fn columns(f: &mut Func, cx: &Context, m: &Matrix, column: &Val, (k0, k1): (&Val, &Val), put: &Put) {
    let lanes = LANES as i64;
    let (zero, width) = (f.i64(0), f.i64(cx.bl.width as i64));
    f.loop_(&zero, &width, lanes, |f, c| {
        let first = f.add(column, c);
        let each: Vec<Val> = if m.rows % lanes == 0 {
            // Rows at a static distance are displacements of one address.
            let last = f.i64(m.rows - lanes);
            let first = f.min(&first, &last);
            let first = m.row(f, &first);
            (0..lanes)
                .map(|i| {
                    let d = f.i64(i * m.pitch);
                    f.gep(&first, &d, "i8")
                })
                .collect()
        } else {
            let last = f.i64(m.rows - 1);
            (0..lanes)
                .map(|i| {
                    let r = f.addc(&first, i);
                    let r = f.min(&r, &last);
                    m.row(f, &r)
                })
                .collect()
        };
        f.loop_(k0, k1, lanes, |f, k| {
            let x = each.iter().map(|row| m.half(f, row, k)).collect();
            let x = transpose(f, x, "f32");
            for (i, w) in x.chunks_exact(2).enumerate() {
                let k = f.addc(k, 2 * i as i64);
                put(f, [w[0].clone(), w[1].clone()], &k, c);
            }
        });
    });
}

/// Blocks along the columns.
fn steps(f: &mut Func, cx: &Context, m: &Matrix, column: &Val, (k0, k1): (&Val, &Val), put: &Put) {
    let lanes = LANES as i64;
    let last = f.i64(m.width - lanes);
    let groups: Vec<(Val, Val)> = (0..cx.bl.vectors as i64)
        .map(|j| {
            let c = f.addc(column, j * lanes);
            (f.min(&c, &last), f.i64(j * lanes))
        })
        .collect();
    let depth = f.sub(k1, k0);
    let whole = f.divc(&depth, 2);
    let whole = f.mulc(&whole, 2);
    let middle = f.add(k0, &whole);
    // The last of an odd number of steps has none beside it.
    for (low, high, both) in [(k0, &middle, true), (&middle, k1, false)] {
        f.loop_(low, high, 2, |f, k| {
            let next = f.addc(k, 1);
            let (a, b) = (m.row(f, k), m.row(f, &next));
            for (n, c) in &groups {
                let x = m.half(f, &a, n);
                let y = if both { m.half(f, &b, n) } else { f.f32(0.0, LANES) };
                put(f, [x, y], k, c);
            }
        });
    }
}
