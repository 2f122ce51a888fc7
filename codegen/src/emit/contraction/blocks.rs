//! Right operands in blocks of codes as a checkpoint stores them ([`pleach_ir::Layout::Blocks`]): a task decodes its columns into
//! scratch memory, whichever way round the product reads the matrix. So one copy of a weight serves both halves of
//! training, and what is in memory are the codes.
//!
//! Blocks along the columns are decoded 16 columns at a time. Blocks along the sum are decoded row by row of the matrix, that
//! is column by column of the product, and transposed in registers, 16 by 16. Values and the order of the sums are those of
//! the same product over the matrix as numbers: the results are the same bits.
//!
//! Rows or columns that have values of their own (what is trained of a weight) are laid over the decoded panel.

use super::analyze::{Blocks, Laid, Product, Right};
use super::blocking::LANES;
use super::coded::Step;
use super::context::Context;
use crate::emit::blocks::Matrix;
use crate::emit::elementwise::{load, memory_elem, round_to, store};
use crate::emit::func::{Func, Val, transpose};

/// Decodes steps `k0..k1` of the columns of a tile, from `column` on, into a panel at `to`. `k0` is a multiple of 32. Columns past the
/// last are those before them.
pub(super) fn unpack(f: &mut Func, cx: &Context, p: &Product, column: &Val, to: &Val, (k0, k1): (&Val, &Val)) {
    let Right::Blocks(blocks) = &p.right else { return };
    let along = blocks.along;
    let (Some(k), Some(n)) = (p.k.known(), p.n.known()) else { return };
    let (rows, width) = if along { (n, k) } else { (k, n) };
    let m = Matrix::new(cx.buffers[blocks.arg].clone(), blocks.format, [rows, width]);
    let put = |f: &mut Func, w: [Val; 2], k: &Val, column: &Val| {
        let step = f.sub(k, k0);
        let w = if p.pairs() { w } else { w.map(|x| round_to(f, blocks.dtype, &x, LANES)) };
        let pair = f.divc(&step, 2);
        Step::new(f, w, p.pairs(), cx.dot).put(f, to, cx.bl.width as i64, &pair, column);
    };
    if along {
        columns(f, cx, &m, column, (k0, k1), &put)
    } else {
        steps(f, cx, &m, column, (k0, k1), &put)
    }
    if let Some(laid) = &blocks.laid {
        lay(f, cx, p, (blocks, laid, &m), (column, to), (k0, k1));
    }
}

/// Lays values over a decoded panel, index by index: where one repeats, the last wins.
fn lay(
    f: &mut Func,
    cx: &Context,
    p: &Product,
    (blocks, laid, m): (&Blocks, &Laid, &Matrix),
    (column, to): (&Val, &Val),
    (k0, k1): (&Val, &Val),
) {
    let (elem, size) = (memory_elem(blocks.dtype), cx.bl.width as i64);
    let (zero, width) = (f.i64(0), f.i64(size));
    let (count, columns) = (f.i64(laid.count as i64), if blocks.along { m.rows } else { m.width });
    let last = f.i64(columns - 1);
    // Indices count steps of the sum, or columns of the product.
    let of_sum = (laid.axis == 1) == blocks.along;
    let end = f.add(column, &width);
    let (low, high) = if of_sum { (k0, k1) } else { (column, &end) };
    // The value of step `k` and column `n` of index `j` in the panel at step `k` and column `c`.
    let put = |f: &mut Func, j: &Val, k: &Val, n: &Val, c: &Val| {
        let (row, along) = if blocks.along { (n, k) } else { (k, n) };
        let at = if laid.axis == 1 {
            let at = f.mulc(row, laid.count as i64);
            f.add(&at, j)
        } else {
            let at = f.mulc(j, m.width);
            f.add(&at, along)
        };
        let from = f.gep(&cx.buffers[laid.values], &at, elem);
        let x = load(f, blocks.dtype, &from, None, 1);
        let x = round_to(f, p.dtype, &x, 1);
        let step = f.sub(k, k0);
        let at = if p.pairs() {
            let (pair, half) = (f.divc(&step, 2), f.remc(&step, 2));
            let at = f.mulc(&pair, size);
            let at = f.add(&at, c);
            let at = f.mulc(&at, 2);
            f.add(&at, &half)
        } else {
            let at = f.mulc(&step, size);
            f.add(&at, c)
        };
        let to = f.gep(to, &at, memory_elem(p.dtype));
        store(f, p.dtype, &x, &to, None, 1);
    };
    f.loop_(&zero, &count, 1, |f, j| {
        let i = f.load_at(&cx.buffers[laid.index], j, "i32", 1);
        let i = f.op(format!("arith.extsi {i} : i32 to i64"));
        let (a, b) = (f.cmp("sge", &i, low), f.cmp("slt", &i, high));
        let inside = f.op(format!("arith.andi {a}, {b} : i1"));
        f.if_(&inside, |f| {
            if of_sum {
                f.loop_(&zero, &width, 1, |f, c| {
                    let n = f.add(column, c);
                    let n = f.min(&n, &last);
                    put(f, j, &i, &n, c);
                });
            } else {
                let c = f.sub(&i, column);
                let (k0, k1) = (k0.clone(), k1.clone());
                f.loop_(&k0, &k1, 1, |f, k| put(f, j, k, &i, &c));
            }
        });
    });
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
