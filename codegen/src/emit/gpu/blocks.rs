//! Matrices in blocks of codes as a checkpoint stores them ([`Layout::Blocks`]), decoded in registers.
//!
//! Where many values are wanted a thread takes two pieces at a time: 8 values, and the 8 that lie 16 behind them. In formats
//! of 4 bits these are the low and the high halves of the same 8 bytes, so that nothing is read twice. A code becomes the
//! last byte of a float whose exponent makes it count in ones; taking 2²³ (and what codes are counted from) away is exact. Values
//! are those of every other reader of blocks, bit by bit.
//!
//! Blocks have 18, 20 or 34 bytes, so they are read in halves of words where the format allows no more.

use super::at::At;
use super::launch::{Unit, shared_store};
use super::repeat::repeated;
use super::{Parts, special};
use crate::emit::func::{Func, Val};
use crate::emit::unsupported;
use crate::error::CodegenError;
use pleach_ir::{BlockFormat, Class, DType, Dim, Entry, Kernel, Layout, Op, ValueId};
use pleach_plan::Expr;

/// Values of a block.
pub(super) const VALUES: i64 = BlockFormat::VALUES as i64;
/// Values of a piece: 16 bytes of bf16.
pub(super) const PIECE: i64 = 8;
/// Pieces from the first to the second one of a pair.
pub(super) const APART: i64 = 2;
/// Pairs of pieces in a block.
pub(super) const PAIRS: i64 = VALUES / (2 * PIECE);
/// Threads of a block that copies.
const THREADS: i64 = 256;

/// A matrix in blocks, in global memory.
#[derive(Clone)]
pub(super) struct Matrix {
    base: Val,
    format: BlockFormat,
    /// Bytes of a row.
    pitch: i64,
}

/// Two pieces as they are in memory.
pub(super) struct Coded {
    /// Codes, four bytes each.
    words: Vec<Val>,
    /// Scale, and minimum where there is one, side by side: i16 or i32.
    head: Val,
}

/// Stores a piece, as pairs of bf16, at a place in shared memory.
pub(super) fn store(f: &mut Func, pairs: &[Val; 4], to: &Val) {
    let [a, b, c, d] = pairs;
    let x = f.op(format!("vector.from_elements {a}, {b}, {c}, {d} : vector<4xi32>"));
    shared_store(f, &x, to, "vector<4xi32>", 16);
}

impl Matrix {
    /// Operand `arg`, whose rows have `width` values.
    pub(super) fn new(f: &Func, arg: usize, format: BlockFormat, width: u64) -> Matrix {
        let pitch = (width / BlockFormat::VALUES * format.bytes()) as i64;
        Matrix { base: f.arg(&format!("p{arg}")), format, pitch }
    }

    /// Byte at which a block of a row begins.
    pub(super) fn block(&self, f: &mut Func, row: &Val, block: &Val) -> Val {
        let (a, b) = (f.mulc(row, self.pitch), f.mulc(block, self.format.bytes() as i64));
        f.add(&a, &b)
    }

    /// Bytes from a block to one so many rows and blocks further on.
    pub(super) fn distance(&self, rows: i64, blocks: i64) -> i64 {
        rows * self.pitch + blocks * self.format.bytes() as i64
    }

    /// Scale (0) or minimum (1) of the block at an address.
    fn number(f: &mut Func, block: &Val, i: i64) -> Val {
        let at = f.i64(2 * i);
        let p = f.gep(block, &at, "i8");
        let x = f.op(format!("llvm.load {p} {{alignment = 2 : i64}} : !llvm.ptr -> f16"));
        f.op(format!("arith.extf {x} : f16 to f32"))
    }

    /// Starts to read pair `pair` of the block at a byte; where there may be none `ok` says whether there is, and all is zeros if not.
    pub(super) fn load(&self, f: &mut Func, block: &Val, pair: &Val, ok: Option<&Val>) -> Coded {
        let (zero, mut at) = (f.i64(0), block.clone());
        if let Some(ok) = ok {
            at = f.op(format!("arith.select {ok}, {at}, {zero} : i64"));
        }
        let start = f.gep(&self.base, &at, "i8");
        let head = self.format.head() as i64;
        let ty = format!("i{}", 8 * head);
        let mut numbers = f.op(format!("llvm.load {start} {{alignment = {head} : i64}} : !llvm.ptr -> {ty}"));
        if let Some(ok) = ok {
            let none = f.konst(&format!("0 : {ty}"));
            numbers = f.op(format!("arith.select {ok}, {numbers}, {none} : {ty}"));
        }
        let at = f.mulc(pair, PIECE);
        let codes = f.gep(&start, &at, "i8");
        let firsts: &[i64] = if self.format.code_bits() == 4 { &[0] } else { &[0, APART * PIECE] };
        // Words of a format whose blocks and heads are whole words.
        let whole = [self.format.bytes(), self.format.head()].iter().all(|n| n.is_multiple_of(4));
        let mut words = vec![];
        for first in firsts {
            for word in 0..PIECE / 4 {
                let part = |f: &mut Func, byte: i64, bits: i64| {
                    let at = f.i64(head + first + 4 * word + byte);
                    let p = f.gep(&codes, &at, "i8");
                    f.op(format!("llvm.load {p} {{alignment = {} : i64}} : !llvm.ptr -> i{bits}", bits / 8))
                };
                words.push(if whole {
                    part(f, 0, 32)
                } else {
                    let [low, high] =
                        [part(f, 0, 16), part(f, 2, 16)].map(|x| f.op(format!("arith.extui {x} : i16 to i32")));
                    let bits = f.i32(16, 1);
                    let high = f.op(format!("arith.shli {high}, {bits} : i32"));
                    f.op(format!("arith.ori {low}, {high} : i32"))
                });
            }
        }
        Coded { words, head: numbers }
    }

    /// Scale and minimum of what was read.
    fn numbers(&self, f: &mut Func, c: &Coded) -> (Val, Option<Val>) {
        let float = |f: &mut Func, x: &Val| {
            let x = f.op(format!("arith.bitcast {x} : i16 to f16"));
            f.op(format!("arith.extf {x} : f16 to f32"))
        };
        if !self.format.has_minimum() {
            return (float(f, &c.head), None);
        }
        let bits = f.i32(16, 1);
        let low = f.op(format!("arith.trunci {} : i32 to i16", c.head));
        let high = f.op(format!("arith.shrui {}, {bits} : i32", c.head));
        let high = f.op(format!("arith.trunci {high} : i32 to i16"));
        (float(f, &low), Some(float(f, &high)))
    }

    /// The values of both pieces.
    fn values(&self, f: &mut Func, c: &Coded) -> [Vec<Val>; 2] {
        let bits = |f: &mut Func, op: &str, x: &Val, n: u32| {
            let n = f.i32(n as i32, 1);
            f.op(format!("arith.{op} {x}, {n} : i32"))
        };
        // Codes as bytes without a sign, and what they are counted from.
        let (first, second, from) = match self.format {
            BlockFormat::Q4_0 | BlockFormat::Q4_1 => {
                let low = c.words.iter().map(|w| bits(f, "andi", w, 0x0f0f_0f0f)).collect::<Vec<_>>();
                let high = c.words.iter().map(|w| {
                    let w = bits(f, "shrui", w, 4);
                    bits(f, "andi", &w, 0x0f0f_0f0f)
                });
                let high = high.collect::<Vec<_>>();
                (low, high, if self.format == BlockFormat::Q4_0 { 8.0 } else { 0.0 })
            }
            BlockFormat::Q8_0 => {
                let mut all: Vec<Val> = c.words.iter().map(|w| bits(f, "xori", w, 0x8080_8080)).collect();
                let second = all.split_off(all.len() / 2);
                (all, second, 128.0)
            }
        };
        let (scale, minimum) = self.numbers(f, c);
        [first, second].map(|words| {
            let mut out = vec![];
            for w in &words {
                for byte in 0..4 {
                    // The byte, and 0x4b0000: 2²³ and so many ones.
                    let (above, pick) = (f.i32(0x4b00_0000, 1), f.i32(0x7540 | byte, 1));
                    let x = f.op(format!(
                        "llvm.call_intrinsic \"llvm.nvvm.prmt\"({w}, {above}, {pick}) : (i32, i32, i32) -> i32"
                    ));
                    let x = f.op(format!("arith.bitcast {x} : i32 to f32"));
                    let ones = f.f32((1 << 23) as f32 + from, 1);
                    let x = f.op(format!("arith.subf {x}, {ones} : f32"));
                    out.push(value(f, &x, &scale, minimum.as_ref()));
                }
            }
            out
        })
    }

    /// Both pieces as pairs of bf16.
    pub(super) fn pairs(&self, f: &mut Func, c: &Coded) -> [[Val; 4]; 2] {
        self.values(f, c).map(|x| {
            [0, 2, 4, 6].map(|i| {
                let v = f.op(format!(
                    "nvvm.convert.f32x2.to.bf16x2 {}, {} {{rnd = #nvvm.fp_rnd_mode<rn>}} : vector<2xbf16>",
                    x[i + 1],
                    x[i]
                ));
                f.op(format!("llvm.bitcast {v} : vector<2xbf16> to i32"))
            })
        })
    }

    /// One value.
    pub(super) fn element(&self, f: &mut Func, row: &Val, column: &At) -> Val {
        let size = f.i64(VALUES);
        let (block, inside) = column.div_rem(f, &size);
        let block = block.val(f);
        let at = self.block(f, row, &block);
        let block = f.gep(&self.base, &at, "i8");
        let scale = Matrix::number(f, &block, 0);
        let minimum = self.format.has_minimum().then(|| Matrix::number(f, &block, 1));
        let four = self.format.code_bits() == 4;
        let half = f.i64(VALUES / 2);
        let (high, byte) = if four { inside.div_rem(f, &half) } else { (At::known(f, 0), inside) };
        let codes = f.gep(&block, &byte.base, "i8");
        let at = f.i64(byte.off + self.format.head() as i64);
        let codes = f.gep(&codes, &at, "i8");
        let x = f.op(format!("llvm.load {codes} {{alignment = 1 : i64}} : !llvm.ptr -> i8"));
        let code = if four {
            let x = f.op(format!("arith.extui {x} : i8 to i32"));
            let shift = high.val(f);
            let shift = f.mulc(&shift, 4);
            let shift = f.op(format!("arith.trunci {shift} : i64 to i32"));
            let x = f.op(format!("arith.shrui {x}, {shift} : i32"));
            let low = f.i32(15, 1);
            let x = f.op(format!("arith.andi {x}, {low} : i32"));
            if self.format == BlockFormat::Q4_0 {
                // Before it is multiplied: a zero keeps its sign.
                let eight = f.i32(8, 1);
                f.op(format!("arith.subi {x}, {eight} : i32"))
            } else {
                x
            }
        } else {
            f.op(format!("arith.extsi {x} : i8 to i32"))
        };
        let x = f.op(format!("arith.sitofp {code} : i32 to f32"));
        value(f, &x, &scale, minimum.as_ref())
    }
}

/// What a code stands for.
fn value(f: &mut Func, code: &Val, scale: &Val, minimum: Option<&Val>) -> Val {
    match minimum {
        Some(m) => f.op(format!("math.fma {code}, {scale}, {m} : f32")),
        None => f.op(format!("arith.mulf {code}, {scale} : f32")),
    }
}

/// Where operands in blocks may stand: as static matrices of whole blocks, as right operands of products or anywhere in a row
/// kernel.
///
/// # Errors
/// What this kernel does else.
pub(super) fn check(k: &Kernel) -> Result<(), CodegenError> {
    for ((v, _), layout) in k.body.inputs().into_iter().zip(&k.operands) {
        if !matches!(layout, Layout::Blocks(_)) {
            continue;
        }
        let ty = k.body.ty(v);
        let whole = matches!(ty.shape[..], [Dim::Known(_), Dim::Known(n)] if n.is_multiple_of(BlockFormat::VALUES));
        if !whole || !matches!(ty.dtype, DType::F32 | DType::BF16) {
            return Err(unsupported(k, "blocks need a static matrix and whole blocks"));
        }
        // The analysis of products knows what else may stand between.
        let fits = match k.class {
            Class::Row => true,
            Class::Contraction => is_right_operand(&k.body, v),
            _ => false,
        };
        if !fits {
            return Err(unsupported(k, "blocks have no place here on a GPU"));
        }
    }
    if k.results.iter().any(|l| matches!(l, Layout::Blocks(_))) && joined(k).is_none() {
        return Err(unsupported(k, "blocks are results of blocks that lie one below the other alone"));
    }
    Ok(())
}

/// Whether all that reads a value are products that have it on the right, maybe in another type or with parts set.
fn is_right_operand(body: &Entry, v: ValueId) -> bool {
    let (live, users) = (body.live(), body.users());
    users[v.index()].iter().filter(|u| live[u.index()]).all(|u| {
        let n = body.node(*u);
        match n.op {
            Op::MatMul { .. } => n.inputs[0] != v,
            Op::Cast(_) | Op::Scatter { .. } if n.inputs[0] == v => is_right_operand(body, *u),
            _ => false,
        }
    })
}

/// Bytes of the matrices in blocks that a kernel writes one below the other into its one result, which keeps their blocks; `None` for any
/// other kernel.
pub(super) fn joined(k: &Kernel) -> Option<Vec<i64>> {
    let one = repeated(k).map_or_else(|| k.clone(), |(one, _)| one);
    let ([root], [Layout::Blocks(format)], Class::Row) = (&one.body.roots[..], &one.results[..], k.class) else {
        return None;
    };
    let (body, inputs) = (&one.body, one.body.inputs());
    let top = body.node(root.value);
    let parts = if let Op::Concat { axis: 0 } = top.op { top.inputs.clone() } else { vec![root.value] };
    let operands: Vec<_> = inputs.iter().map(|x| x.0).collect();
    let same = one.operands.iter().all(|l| *l == Layout::Blocks(*format));
    if parts != operands || !same {
        return None;
    }
    let bytes = |v| one.operands[0].bytes(body.ty(v), &|_| None).and_then(|n| i64::try_from(n).ok());
    parts.into_iter().map(bytes).collect()
}

/// A kernel that copies blocks: see [`joined`].
pub(super) fn copies(k: &Kernel, parts: &[i64]) -> Result<Parts, CodegenError> {
    let (one, times) = repeated(k).unwrap_or_else(|| (k.clone(), 1));
    let mut unit = if times > 1 { Unit::repeated(&one, times, "", None) } else { Unit::new(k, "", false) };
    let f = &mut unit.f;
    // The widest words that all parts consist of.
    let step = [16, 8, 4].into_iter().find(|s| parts.iter().all(|n| n % s == 0)).unwrap_or(2);
    let (block, lane) = (special(f, "ctaid.x"), special(f, "tid.x"));
    let at = f.mulc(&block, THREADS);
    let thread = f.add(&at, &lane);
    let at = f.mulc(&thread, step);
    let to = f.arg(&format!("p{}", one.operands.len()));
    let mut first = 0;
    for (i, bytes) in parts.iter().enumerate() {
        let (low, high) = (f.i64(first), f.i64(first + bytes));
        let (a, b) = (f.cmp("sge", &at, &low), f.cmp("slt", &at, &high));
        let here = f.op(format!("arith.andi {a}, {b} : i1"));
        let from = f.arg(&format!("p{i}"));
        f.if_(&here, |f| {
            let inside = f.addc(&at, -first);
            let (from, to) = (f.gep(&from, &inside, "i8"), f.gep(&to, &at, "i8"));
            let ty = if step == 16 { "vector<4xi32>".to_string() } else { format!("i{}", 8 * step) };
            let x = f.op(format!("llvm.load {from} {{alignment = {step} : i64}} : !llvm.ptr -> {ty}"));
            f.stmt(&format!("llvm.store {x}, {to} {{alignment = {step} : i64}} : {ty}, !llvm.ptr"));
        });
        first += bytes;
    }
    let grid =
        [Expr::Const((first as u64).div_ceil((step * THREADS) as u64)), Expr::Const(times as u64), Expr::Const(1)];
    let (text, launch) = unit.finish(grid, THREADS as u32, 0, 1);
    Ok((text, vec![launch], Expr::Const(0)))
}
