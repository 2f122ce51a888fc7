//! Right operands that stay coded in memory: panels of codes with scales ([`pleach_ir::Layout::CodedPanels`]).
//!
//! Few rows decode in registers, step by step of the sum, and memory is read once, as codes. Where many rows read a
//! weight, each task decodes its columns into scratch memory first and multiplies from there. Both give the values that
//! the same weights in plain panels have, and sum them in the same order: the results are the same bits.

use super::analyze::{Product, Right};
use super::blocking::LANES;
use super::context::{Context, Place};
use super::tile::vector;
use crate::emit::blocks::value;
use crate::emit::coded::Piece;
use crate::emit::elementwise::round_to;
use crate::emit::func::{Func, Val};
use pleach_ir::{BlockFormat, DType};

/// Steps of the sum that share a scale.
pub(super) const STEPS: i64 = BlockFormat::VALUES as i64;

/// Bytes by which codes are fetched ahead of their use: they come from memory, and are few for the time they take. (4, 8
/// and 16 KB were tried; without, products of one row take a fifth longer.)
const AHEAD: i64 = 8 << 10;

/// Columns of a coded operand.
pub(super) struct CodedAt {
    /// The first piece of the panel.
    panel: Val,
    /// First column of the tile in the panel.
    inside: Val,
    piece: Piece,
    /// Vectors of the tile.
    vectors: usize,
    /// The product takes bf16, and the target multiplies pairs of them.
    pairs: bool,
    dot: bool,
}

/// What is done with some pairs of steps: the number of the first, the vectors of the tile for each, and what is carried.
type Body<'a> = dyn FnMut(&mut Func, &Val, Vec<Vec<Step>>, &[Val]) -> Vec<Val> + 'a;

/// Scales and minima of a tile's columns.
pub(super) struct Scales(Vec<(Val, Option<Val>)>);

impl CodedAt {
    /// The columns of a tile; `None`: the operand is not coded.
    pub(super) fn new(f: &mut Func, cx: &Context, p: &Product, column: &Val) -> Option<CodedAt> {
        let Right::Coded { arg, nr, format } = p.right else { return None };
        let piece = Piece { nr: nr as i64, format };
        let (panel, inside) = (f.divc(column, nr as i64), f.remc(column, nr as i64));
        let inside = if nr == cx.bl.width { f.i64(0) } else { inside };
        let k = cx.dim(f, p.k);
        let pieces = f.divc(&k, STEPS);
        let size = f.mulc(&pieces, piece.bytes());
        let at = f.mul(&panel, &size);
        let panel = f.gep(&cx.buffers[arg], &at, "i8");
        Some(CodedAt { panel, inside, piece, vectors: cx.bl.vectors, pairs: p.pairs(), dot: cx.dot })
    }

    /// The piece of block `b`, from the tile's columns on: where its scales, its codes begin.
    fn piece(&self, f: &mut Func, b: &Val) -> (Val, Val) {
        let at = f.mulc(b, self.piece.bytes());
        let piece = f.gep(&self.panel, &at, "i8");
        let heads = f.gep(&piece, &self.inside, "i16");
        let codes = f.i64(self.piece.codes());
        let codes = f.gep(&piece, &codes, "i8");
        let group = f.divc(&self.inside, LANES as i64);
        let group = f.mulc(&group, self.piece.unit());
        (heads, f.gep(&codes, &group, "i8"))
    }

    fn scales(&self, f: &mut Func, heads: &Val) -> Scales {
        let half = |f: &mut Func, start: i64, j: usize| {
            let at = f.i64(start + 2 * (j * LANES) as i64);
            let p = f.gep(heads, &at, "i8");
            let x = f.load(&p, "vector<16xf16>");
            f.op(format!("arith.extf {x} : vector<16xf16> to {}", vector()))
        };
        let all = (0..self.vectors).map(|j| {
            let scale = half(f, 0, j);
            let stored = |f: &mut Func| half(f, self.piece.minima(), j);
            let minimum = minimum(f, self.piece.format, &scale, stored);
            (scale, minimum)
        });
        Scales(all.collect())
    }

    /// Steps `2·pair` and `2·pair + 1` of 16 columns as f32.
    fn decode(&self, f: &mut Func, scales: &Scales, codes: &Val, pair: &Val, j: usize) -> [Val; 2] {
        let at = f.mulc(pair, self.piece.pair());
        let at = f.addc(&at, j as i64 * self.piece.unit());
        let unit = f.gep(codes, &at, "i8");
        let (scale, minimum) = &scales.0[j];
        let ints: [Val; 2] = if self.piece.format.code_bits() == 4 {
            let x = f.load(&unit, "vector<16xi8>");
            let x = f.op(format!("arith.extui {x} : vector<16xi8> to vector<16xi32>"));
            let (low, four) = (f.i32(15, LANES), f.i32(4, LANES));
            [
                f.op(format!("arith.andi {x}, {low} : vector<16xi32>")),
                f.op(format!("arith.shrui {x}, {four} : vector<16xi32>")),
            ]
        } else {
            [0, LANES as i64].map(|at| {
                let at = f.i64(at);
                let x = f.load_at(&unit, &at, "i8", LANES);
                f.op(format!("arith.extsi {x} : vector<16xi8> to vector<16xi32>"))
            })
        };
        ints.map(|x| value(f, &x, scale, minimum.as_ref()))
    }
}

/// What is added to code · scale; `stored` gives the minimum where the format has one.
fn minimum(f: &mut Func, format: BlockFormat, scale: &Val, stored: impl FnOnce(&mut Func) -> Val) -> Option<Val> {
    match format {
        BlockFormat::Q4_1 => Some(stored(f)),
        // (code - 8) · scale, exactly: the product has 15 bits. A zero may have the other sign, which no sum shows.
        BlockFormat::Q4_0 => {
            let eight = f.f32(-8.0, LANES);
            Some(f.op(format!("arith.mulf {scale}, {eight} : {}", vector())))
        }
        BlockFormat::Q8_0 => None,
    }
}

/// Two steps as pairs of bf16, 32 elements.
fn pairs(f: &mut Func, w: &[Val; 2]) -> Val {
    let intrinsic = "llvm.x86.avx512bf16.cvtne2ps2bf16.512";
    let types = "(vector<16xf32>, vector<16xf32>) -> vector<32xbf16>";
    let x = f.op(format!("llvm.call_intrinsic \"{intrinsic}\"({}, {}) : {types}", w[1], w[0]));
    let x = f.op(format!("llvm.bitcast {x} : vector<32xbf16> to vector<32xi16>"));
    let order = (0..LANES).map(|i| format!("{i}, {}", i + LANES)).collect::<Vec<_>>().join(", ");
    f.op(format!("vector.shuffle {x}, {x} [{order}] : vector<32xi16>, vector<32xi16>"))
}

/// What a step of the microkernel multiplies by: 16 columns of steps `(k, k + 1)`.
pub(super) enum Step {
    /// f32: each step.
    Plain([Val; 2]),
    /// bf16: the pair, as the target's dot products take it.
    Pair(Val),
    /// bf16 without dot products: both rounded, as f32.
    Halves([Val; 2]),
}

impl Step {
    /// Two steps as f32, as a target takes them for which bf16 comes in `pairs` and has `dot` products or has none.
    pub(super) fn new(f: &mut Func, w: [Val; 2], pairs: bool, dot: bool) -> Step {
        match (pairs, dot) {
            (false, _) => Step::Plain(w),
            (true, true) => {
                let x = self::pairs(f, &w);
                Step::Pair(f.op(format!("llvm.bitcast {x} : vector<32xi16> to vector<32xbf16>")))
            }
            (true, false) => Step::Halves(w.map(|x| round_to(f, DType::BF16, &x, LANES))),
        }
    }

    /// Stores it in panels of `width` columns as [`super::pack`] lays them out: pair of steps `pair`, columns from
    /// `column` on.
    pub(super) fn put(&self, f: &mut Func, to: &Val, width: i64, pair: &Val, column: &Val) {
        let at = f.mulc(pair, 2 * width);
        match self {
            Step::Plain(w) => {
                let at = f.add(&at, column);
                for (i, x) in w.iter().enumerate() {
                    let at = f.addc(&at, i as i64 * width);
                    f.store_at(x, to, &at, "f32", LANES);
                }
            }
            Step::Pair(x) => {
                let column = f.mulc(column, 2);
                let at = f.add(&at, &column);
                let q = f.gep(to, &at, "i16");
                f.store(x, &q, "vector<32xbf16>");
            }
            Step::Halves([a, b]) => {
                let bits = |f: &mut Func, x: &Val| f.op(format!("arith.bitcast {x} : {} to vector<16xi32>", vector()));
                let (a, b) = (bits(f, a), bits(f, b));
                let sixteen = f.i32(16, LANES);
                let a = f.op(format!("arith.shrui {a}, {sixteen} : vector<16xi32>"));
                let x = f.op(format!("arith.ori {a}, {b} : vector<16xi32>"));
                let column = f.mulc(column, 2);
                let at = f.add(&at, &column);
                let q = f.gep(to, &at, "i16");
                f.store(&x, &q, "vector<16xi32>");
            }
        }
    }
}

impl CodedAt {
    /// The pieces `k0..k1` of a sum, `turn` pairs of steps at a time.
    pub(super) fn walk(
        &self,
        f: &mut Func,
        (k0, k1): (&Val, &Val),
        turn: usize,
        inits: &[(Val, String)],
        body: &mut Body,
    ) -> Vec<Val> {
        let (low, high) = (f.divc(k0, STEPS), f.divc(k1, STEPS));
        f.for_(&low, &high, 1, inits, |f, b, carried| {
            let (heads, codes) = self.piece(f, b);
            let ahead = AHEAD / self.piece.bytes() * self.piece.bytes();
            for line in (0..self.piece.bytes()).step_by(64) {
                let d = f.i64(ahead + line);
                let p = f.gep(&heads, &d, "i8");
                f.prefetch_into(&p, 2);
            }
            let scales = self.scales(f, &heads);
            let (zero, end) = (f.i64(0), f.i64(STEPS / 2));
            let first = f.mulc(b, STEPS / 2);
            let again: Vec<_> = carried.iter().cloned().zip(inits.iter().map(|x| x.1.clone())).collect();
            f.for_(&zero, &end, turn as i64, &again, |f, s, carried| {
                let mut steps = vec![];
                for u in 0..turn {
                    let s = f.addc(s, u as i64);
                    let mut columns = vec![];
                    for j in 0..self.vectors {
                        let w = self.decode(f, &scales, &codes, &s, j);
                        columns.push(Step::new(f, w, self.pairs, self.dot));
                    }
                    steps.push(columns);
                }
                let pair = f.add(&first, s);
                body(f, &pair, steps, carried)
            })
        })
    }
}

/// Decodes steps `k0..k1` of a tile's columns into scratch memory, as [`super::pack`] lays panels out.
pub(super) fn unpack(f: &mut Func, cx: &Context, p: &Product, column: &Val, to: &Val, (k0, k1): (&Val, &Val)) {
    let Some(right) = CodedAt::new(f, cx, p, column) else { return };
    let start = f.divc(k0, 2);
    right.walk(f, (k0, k1), 1, &[], &mut |f, pair, steps, _| {
        let pair = f.sub(pair, &start);
        for (j, x) in steps[0].iter().enumerate() {
            let column = f.i64((j * LANES) as i64);
            x.put(f, to, cx.bl.width as i64, &pair, &column);
        }
        vec![]
    });
}

/// Column of a tile in its group's right operand.
pub(super) fn column(f: &mut Func, cx: &Context, group: usize, at: &Place) -> Val {
    f.addc(&at.column, cx.an.groups[group].offset as i64)
}
