//! Operands of products as addresses: a base, and strides of rows, columns and batches. Along one axis indices may say what is read.

use super::over::Over;
use crate::emit::contraction::analyze::{Product, Right};
use crate::emit::contraction::view::{Stride, View};
use crate::emit::elementwise::memory_elem;
use crate::emit::func::{Func, Val};
use crate::emit::gpu::blocks;
use crate::emit::gpu::pull::Pull;
use pleach_ir::{DType, Dim};

/// Elements of 16 bytes.
pub(super) const PIECE: i64 = 8;

/// A matrix in global memory.
#[derive(Clone)]
pub(super) struct Matrix {
    pub(super) base: Val,
    /// Elements from one row (of the result) to the next, and along the sum.
    pub(super) line: Val,
    pub(super) step: Val,
    pub(super) dtype: DType,
}

/// A right operand in blocks of codes.
#[derive(Clone)]
pub(super) struct Codes {
    pub(super) blocks: blocks::Matrix,
    /// Blocks lie along the sum; else across it.
    pub(super) along: bool,
    /// Its first column.
    pub(super) first: i64,
    /// Types of the matrix and of the product, that values are rounded to in turn.
    pub(super) dtypes: [DType; 2],
    /// What is laid over them.
    pub(super) over: Option<Over>,
}

impl Codes {
    /// The right operand of a product from a column on, if it is in blocks.
    pub(super) fn of(f: &Func, x: &Product, column: u64) -> Option<Codes> {
        let Right::Blocks(b) = &x.right else { return None };
        let width = if b.along { x.k.known()? } else { x.n.known()? };
        let blocks = blocks::Matrix::new(f, b.arg, b.format, width);
        let dtypes = [b.dtype, x.dtype];
        let over = b.laid.as_ref().map(|laid| Over::new(f, laid, b.along, width as i64, dtypes));
        Some(Codes { blocks, along: b.along, first: column as i64, dtypes, over })
    }
}

/// Rows or columns that indices pick of a matrix in global memory; or all of one whose pieces of 16 bytes are not whole or not aligned.
#[derive(Clone)]
pub(super) struct Picked {
    pub(super) matrix: Matrix,
    /// Lines of the result are picked; else steps of the sum.
    pub(super) lines: bool,
    /// None where all are taken in order.
    indices: Option<Val>,
    /// The first line of the operand.
    first: i64,
    /// How many there are to pick of.
    size: Val,
}

impl Picked {
    /// An operand from a column on, of which lines or steps are taken: by indices, or all; how many there are.
    fn of(
        f: &mut Func,
        p: &mut Pull<'_>,
        (x, side): (&Product, usize),
        batch: &[Val],
        column: u64,
        (lines, indices, size): (bool, Option<Val>, Val),
    ) -> Picked {
        let first = if lines { column } else { 0 };
        let matrix = matrix(f, p, x, side, batch, column - first);
        Picked { matrix, lines, indices, first: first as i64, size }
    }

    /// Where the picked line or step `at` lies in the matrix.
    pub(super) fn place(&self, f: &mut Func, at: &Val) -> Val {
        let at = f.addc(at, self.first);
        let Some(indices) = &self.indices else { return at };
        let at = f.gep(indices, &at, "i32");
        let i = f.op(format!("llvm.load {at} {{alignment = 4 : i64}} : !llvm.ptr -> i32"));
        self.within(f, &i)
    }

    /// An index, i32, as a place in the matrix.
    fn within(&self, f: &mut Func, i: &Val) -> Val {
        let i = f.op(format!("arith.extsi {i} : i32 to i64"));
        let (zero, last) = (f.i64(0), f.addc(&self.size, -1));
        let i = f.max(&i, &zero);
        f.min(&i, &last)
    }

    /// Where eight neighbouring lines or steps from `at` on, a multiple of 8, lie in the matrix.
    pub(super) fn places(&self, f: &mut Func, at: &Val) -> [Val; PIECE as usize] {
        let Some(indices) = &self.indices else { return [0, 1, 2, 3, 4, 5, 6, 7].map(|i| f.addc(at, i)) };
        let from = f.gep(indices, at, "i32");
        let four = |f: &mut Func, i: i64| {
            let at = f.i64(i);
            let at = f.gep(&from, &at, "i32");
            f.op(format!("llvm.load {at} {{alignment = 16 : i64}} : !llvm.ptr -> vector<4xi32>"))
        };
        let read = [four(f, 0), four(f, 4)];
        [0, 1, 2, 3, 4, 5, 6, 7].map(|i| {
            let x = f.op(format!("vector.extract {}[{}] : i32 from vector<4xi32>", read[i / 4], i % 4));
            self.within(f, &x)
        })
    }

    /// A piece of a tile: 8 neighbours along the axis that is not picked, as four pairs of bf16. `line` and `step` are the place of the
    /// first one in the operand. What lies past the end of the sum is zero; lines past the last one are like that one.
    pub(super) fn piece(&self, f: &mut Func, [line, lines]: [&Val; 2], [step, depth]: [&Val; 2]) -> [Val; 4] {
        let (zero, last) = (f.i64(0), f.addc(lines, -1));
        let m = &self.matrix;
        let mut elements = vec![];
        let of_line = |f: &mut Func, n: i64| {
            let line = f.addc(line, n);
            f.min(&line, &last)
        };
        // Within the sum, and a step that exists.
        let of_step = |f: &mut Func, n: i64| {
            let step = f.addc(step, n);
            let ok = f.cmp("slt", &step, depth);
            let step = f.op(format!("arith.select {ok}, {step}, {zero} : i64"));
            (ok, step)
        };
        let mut load = |f: &mut Func, ok: &Val, [a, b]: [&Val; 2]| {
            let at = f.add(a, b);
            let from = f.gep(&m.base, &at, "i16");
            let x = f.op(format!("llvm.load {from} {{alignment = 2 : i64}} : !llvm.ptr -> i16"));
            let none = f.konst("0 : i16");
            let x = f.op(format!("arith.select {ok}, {x}, {none} : i16"));
            elements.push(f.op(format!("arith.extui {x} : i16 to i32")));
        };
        if self.lines {
            let line = of_line(f, 0);
            let line = self.place(f, &line);
            let line = f.mul(&line, &m.line);
            for n in 0..PIECE {
                let (ok, step) = of_step(f, n);
                let step = f.mul(&step, &m.step);
                load(f, &ok, [&line, &step]);
            }
        } else {
            let (ok, step) = of_step(f, 0);
            let step = self.place(f, &step);
            let step = f.mul(&step, &m.step);
            for n in 0..PIECE {
                let line = of_line(f, n);
                let line = f.mul(&line, &m.line);
                load(f, &ok, [&line, &step]);
            }
        }
        let pairs: Vec<Val> = elements.chunks(2).map(|x| pair(f, &x[0], &x[1])).collect();
        [0, 1, 2, 3].map(|i| pairs[i].clone())
    }
}

/// Two elements of 16 bits, each as an i32, as a pair.
pub(super) fn pair(f: &mut Func, low: &Val, high: &Val) -> Val {
    let bits = f.i32(16, 1);
    let high = f.op(format!("arith.shli {high}, {bits} : i32"));
    f.op(format!("arith.ori {low}, {high} : i32"))
}

/// Which axis of an operand indices pick: lines of the result (true) or steps of the sum; `None` where they pick nothing.
pub(super) fn picks(x: &Product, side: usize) -> Option<bool> {
    let view = view(x, side)?;
    let lines = view.strides.len() - 2 + side;
    view.picked.map(|p| p.axis == lines)
}

/// The strides of the left (`side` 0) or right (1) operand of a product.
pub(super) fn view(x: &Product, side: usize) -> Option<&View> {
    if side == 0 { Some(&x.left) } else { x.right.view() }
}

/// Where tiles of an operand come from.
pub(super) enum Operand {
    Numbers(Matrix),
    Codes(Codes),
    Picked(Picked),
}

/// The left (`side` 0) or right (1) operand of a product in a batch, from a column on.
pub(super) fn operand(f: &mut Func, p: &mut Pull<'_>, x: &Product, side: usize, batch: &[Val], column: u64) -> Operand {
    if let Some(codes) = Codes::of(f, x, column).filter(|_| side == 1) {
        return Operand::Codes(codes);
    }
    match picked(f, p, x, side, batch, column) {
        Some(x) => Operand::Picked(x),
        None => Operand::Numbers(matrix(f, p, x, side, batch, column)),
    }
}

/// An operand of a product as [`operand`] that is read element by element; none where it is in blocks of codes.
pub(super) fn by_element(
    f: &mut Func,
    p: &mut Pull<'_>,
    x: &Product,
    side: usize,
    batch: &[Val],
    column: u64,
) -> Option<Picked> {
    if picks(x, side).is_some() {
        return picked(f, p, x, side, batch, column);
    }
    let (lines, size) = (near(x, side)?, p.dim(f, x.k));
    Some(Picked::of(f, p, (x, side), batch, column, (lines, None, size)))
}

/// An operand of a product as [`operand`] whose lines are read element by element; none where it is in blocks of codes, or indices
/// pick steps of the sum.
pub(super) fn line_by_element(f: &mut Func, p: &mut Pull<'_>, x: &Product, side: usize, column: u64) -> Option<Picked> {
    match picks(x, side) {
        Some(lines) => picked(f, p, x, side, &[], column).filter(|_| lines),
        None => {
            view(x, side)?;
            let size = p.dim(f, x.k);
            Some(Picked::of(f, p, (x, side), &[], column, (true, None, size)))
        }
    }
}

/// Whether neighbours in memory lie along the sum (true) or across it, where one must be said: what is as near either way counts as along.
pub(super) fn near(x: &Product, side: usize) -> Option<bool> {
    let (line, step) = axes(view(x, side)?, side);
    Some(step.known() == Some(1) || line.known() != Some(1))
}

/// An operand of a product as [`operand`], if indices pick of it.
pub(super) fn picked(
    f: &mut Func,
    p: &mut Pull<'_>,
    x: &Product,
    side: usize,
    batch: &[Val],
    column: u64,
) -> Option<Picked> {
    let (lines, of) = (picks(x, side)?, view(x, side)?.picked?);
    let (indices, size) = (Some(f.arg(&format!("p{}", of.arg))), p.dim(f, of.size));
    Some(Picked::of(f, p, (x, side), batch, column, (lines, indices, size)))
}

fn stride(f: &mut Func, p: &mut Pull<'_>, s: &Stride) -> Val {
    let mut x = f.i64(s.factor as i64);
    for sym in &s.syms {
        let d = p.dim(f, Dim::Symbol(*sym));
        x = f.mul(&x, &d);
    }
    x
}

/// The left (`side` 0) or right (1) operand of a product in a batch.
pub(super) fn matrix(f: &mut Func, p: &mut Pull<'_>, x: &Product, side: usize, batch: &[Val], column: u64) -> Matrix {
    let view = view(x, side).unwrap_or(&x.left);
    let (line, step) = axes(view, side);
    let mut at = f.i64(0);
    for (n, s) in &view.offset {
        let s = stride(f, p, s);
        let s = f.mulc(&s, *n as i64);
        at = f.add(&at, &s);
    }
    for (i, s) in batch.iter().zip(&view.strides) {
        let s = stride(f, p, s);
        let s = f.mul(i, &s);
        at = f.add(&at, &s);
    }
    let (line, step) = (stride(f, p, line), stride(f, p, step));
    if side == 1 && column > 0 {
        let s = f.mulc(&line, column as i64);
        at = f.add(&at, &s);
    }
    let base = f.arg(&format!("p{}", view.arg));
    let base = f.gep(&base, &at, memory_elem(x.dtype));
    Matrix { base, line, step, dtype: x.dtype }
}

/// Strides of a view along the result and along the sum: left views are `(…, m, k)`, right ones `(…, k, n)`.
pub(super) fn axes(view: &View, side: usize) -> (&Stride, &Stride) {
    let n = view.strides.len();
    let (a, b) = (&view.strides[n - 2], &view.strides[n - 1]);
    if side == 0 { (a, b) } else { (b, a) }
}
