//! Products of bf16 with few rows, as in decoding: the weights are read once, and that is all the time there is.
//!
//! A block takes 16 columns; its warps share the sum. Weights and rows of the left operand go from memory to registers 16
//! bytes at a time and straight into `mma.sync`, the weights as its left operand: which of the summed elements meet in
//! one instruction is free, so a lane takes 16 neighbours. The warps' sums are added in shared memory in a fixed order.
//! Short sums whose pieces of 16 bytes are not whole or not aligned, such as those over a rank of 4, are read element by element.

use super::epilogue;
use super::operand::{Matrix, Operand, Picked, axes, line_by_element, matrix, operand, pair, picked, picks};
use super::passes::passes;
use crate::emit::contraction::analyze::{Analysis, Product, Right};
use crate::emit::contraction::view::View;
use crate::emit::func::{Func, Val};
use crate::emit::gpu::at::At;
use crate::emit::gpu::blocks;
use crate::emit::gpu::launch::{Unit, shared_at, shared_load, shared_store};
use crate::emit::gpu::mma;
use crate::emit::gpu::pull::Pull;
use crate::emit::gpu::{barrier, special, wgmma};
use crate::error::CodegenError;
use pleach_ir::{DType, Dim, Kernel, Sym};
use pleach_plan::{Expr, Launch};

/// Rows at most.
pub(super) const ROWS: i64 = 8;
/// Columns of a block.
const COLUMNS: i64 = 16;
const WARPS: i64 = 8;
/// Warps whose sums are added in one turn.
const ADDED: i64 = 4;
/// Summed elements that a warp takes at once, and of those a lane.
const STEP: i64 = 64;
const OWN: i64 = 16;
/// Elements of a sum that may be read one by one, at most.
const SHORT: u64 = 128;
/// Columns that a thread writes, where their number divides those that there are.
const TOGETHER: [i64; 3] = [4, 2, 1];
/// Registers of operands that are on their way at once: two blocks of a multiprocessor leave 128 to a thread.
const LOADED: i64 = 96;
/// Groups of accumulators at most.
const GROUPS: usize = 4;

/// Elements in pieces of 16 bytes.
fn whole(n: u64) -> bool {
    n.is_multiple_of(blocks::PIECE as u64)
}

/// Whether an operand lies along the sum in whole aligned pieces of 16 bytes.
fn in_pieces(x: &Product, view: &View, side: usize) -> bool {
    let (line, step) = axes(view, side);
    let aligned = step.known() == Some(1) && whole(line.factor) && view.offset.iter().all(|(n, s)| whole(n * s.factor));
    aligned && x.k.known().is_some_and(whole)
}

/// Whether the operands can be read along the sum: in pieces, the right one maybe in blocks, or the sum is so short that elements may be read
/// one by one. Of the left one indices may pick lines, or single elements where pieces of indices are whole.
fn fits(x: &Product) -> bool {
    let Some(k) = x.k.known() else { return false };
    let short = k <= SHORT;
    let left = if picks(x, 0) == Some(false) { whole(k) } else { short || in_pieces(x, &x.left, 0) };
    let right = match &x.right {
        Right::Rows(w) | Right::Strided(w) => w.picked.is_none() && (short || in_pieces(x, w, 1)),
        Right::Blocks(b) => b.along && b.laid.is_none(),
        Right::Panels { .. } | Right::Coded { .. } => false,
    };
    x.dtype == DType::BF16 && left && right
}

/// Emits the launch, if the kernel has this form; it is right for up to [`ROWS`] rows.
pub(super) fn emit(k: &Kernel, symbols: &[Sym], a: &Analysis) -> Result<Option<(String, Launch)>, CodegenError> {
    let (Some(n), Dim::Symbol(_)) = (a.n.known(), a.m) else { return Ok(None) };
    let few = a.groups.len() <= GROUPS && a.batch.is_empty();
    let together = TOGETHER.into_iter().find(|t| n as i64 % t == 0).unwrap_or(1);
    if !few || !a.products.iter().all(fits) {
        return Ok(None);
    }
    let groups = a.groups.len() as i64;
    // Of a column of products' 16 lines the first 8 may be all there is.
    let halves = if n as i64 <= COLUMNS / 2 { 1 } else { 2 };
    // Each line of a ragged block has an address of its own.
    let ragged = n as i64 % COLUMNS != 0;
    let mut unit = Unit::new(k, "_few", false);
    let shared = unit.shared((WARPS * groups * ROWS * COLUMNS * 4) as u64);
    let f = &mut unit.f;
    let mut p = Pull::new(f, k, symbols);
    let (tid, block) = (special(f, "tid.x"), special(f, "ctaid.x"));
    let (warp, lane) = (f.divc(&tid, 32), f.remc(&tid, 32));
    let (line, quarter) = (f.divc(&lane, 4), f.remc(&lane, 4));
    let first = f.mulc(&block, COLUMNS);
    let size = [p.dim(f, a.m), p.dim(f, a.n)];
    let inside = f.cmp("slt", &first, &size[1]);
    f.if_(&inside, |f| {
        let none = f.f32(0.0, 1);
        let mut totals: Vec<Option<[Val; 4]>> = vec![None; a.groups.len()];
        let passes = passes(a);
        for pass in &passes {
            let left = &a.products[pass[0].1];
            let alike = passes.iter().filter(|x| a.products[x[0].1].left == left.left).count();
            let depth = left.k.known().unwrap_or(0) as i64;
            // What lies past the ends is computed with something that exists, and not written.
            let row = clamp(f, &line, &size[0]);
            let x = Line::left(f, &mut p, left, [&row, &size[0]]);
            let mut weights = vec![];
            for (g, product, _) in pass {
                let w = right(f, &mut p, &a.products[*product], a.groups[*g].offset);
                let long = p.dim(f, left.k);
                for half in 0..halves {
                    let column = f.addc(&line, 8 * half);
                    let column = f.add(&first, &column);
                    let column = clamp(f, &column, &size[1]);
                    weights.push(Weights::new(f, &w, [&column, &size[1]], &long));
                }
            }
            let begin: Vec<Val> = pass
                .iter()
                .flat_map(|(g, _, s)| match (s, &totals[*g]) {
                    (None, Some(t)) => t.clone(),
                    _ => [0; 4].map(|_| none.clone()),
                })
                .collect();
            let lines = Lines { all: &weights, halves: halves as usize, rolled: ragged || alike > 1 };
            let sums = accumulate(f, &x, &lines, [&warp, &quarter], depth, begin);
            for ((g, _, scale), sum) in pass.iter().zip(sums.chunks(4)) {
                let mut sum = [0, 1, 2, 3].map(|i| sum[i].clone());
                if let Some(s) = scale {
                    let s = p.eval(f, *s, &[]);
                    for (i, x) in sum.iter_mut().enumerate() {
                        *x = match &totals[*g] {
                            Some(t) => f.op(format!("math.fma {x}, {s}, {} : f32", t[i])),
                            None => f.op(format!("arith.mulf {x}, {s} : f32")),
                        };
                    }
                }
                totals[*g] = Some(sum);
            }
        }
        // Sums of a warp: [group][row][column].
        let own = f.mulc(&warp, groups);
        for (g, t) in totals.iter().flatten().enumerate() {
            let base = f.addc(&own, g as i64);
            let base = f.mulc(&base, ROWS * COLUMNS);
            for (i, x) in t.iter().enumerate() {
                let row = f.mulc(&quarter, 2);
                let row = f.addc(&row, i as i64 % 2);
                let at = f.mulc(&row, COLUMNS);
                let at = f.add(&at, &line);
                let at = f.addc(&at, i as i64 / 2 * 8);
                let at = f.add(&base, &at);
                let to = shared_at(f, &shared, &at, "f32");
                shared_store(f, x, &to, "f32", 4);
            }
        }
        barrier(f);
        let (row, column) = (f.divc(&tid, COLUMNS / together), f.remc(&tid, COLUMNS / together));
        let column = f.mulc(&column, together);
        let rows = f.i64(ROWS);
        let within = f.min(&size[0], &rows);
        let column_of_all = f.add(&first, &column);
        let (a1, b1) = (f.cmp("slt", &row, &within), f.cmp("slt", &column_of_all, &size[1]));
        let writes = f.op(format!("arith.andi {a1}, {b1} : i1"));
        f.if_(&writes, |f| {
            let at = f.mulc(&row, COLUMNS);
            let at = f.add(&at, &column);
            let sums = added(f, &shared, &at, groups, together);
            p.together = together;
            let index = [At::of(f, &row, 1), At::of(f, &column_of_all, together)];
            let own: Vec<i64> = (0..together).collect();
            epilogue(f, &mut p, a, &index, &own, &sums);
        });
    });
    p.finish()?;
    let grid = [Expr::Const(n.div_ceil(COLUMNS as u64)), Expr::Const(1), Expr::Const(1)];
    Ok(Some(unit.finish(grid, 32 * WARPS as u32, 0, 2)))
}

/// Neighbouring elements of every group, each the sum over the warps in their order: from `at` of the sums in shared memory on.
fn added(f: &mut Func, shared: &Val, at: &Val, groups: i64, together: i64) -> Vec<Vec<Val>> {
    let none = f.f32(0.0, 1);
    let init = vec![(none, "f32".to_string()); (groups * together) as usize];
    let vector = format!("vector<{together}xf32>");
    // Hidden from LLVM: with all turns written out the assembler starts all loads at once, and has no registers for them.
    let end = f.i64(WARPS);
    let (zero, end) = (f.i64(0), wgmma::settled(f, &[end], "i64", "l").remove(0));
    let all = f.for_(&zero, &end, ADDED, &init, |f, first, sums| {
        let mut sums = sums.to_vec();
        let first = f.mulc(first, groups * ROWS * COLUMNS);
        let first = f.add(at, &first);
        for w in 0..ADDED {
            for (g, sums) in sums.chunks_mut(together as usize).enumerate() {
                let at = f.addc(&first, (w * groups + g as i64) * ROWS * COLUMNS);
                let from = shared_at(f, shared, &at, "f32");
                let x = shared_load(f, &from, &vector, 4 * together as u32);
                for (i, s) in sums.iter_mut().enumerate() {
                    let x = f.op(format!("vector.extract {x}[{i}] : f32 from {vector}"));
                    *s = f.op(format!("arith.addf {s}, {x} : f32"));
                }
            }
        }
        sums
    });
    all.chunks(together as usize).map(<[Val]>::to_vec).collect()
}

/// The index, or the last one there is.
fn clamp(f: &mut Func, at: &Val, size: &Val) -> Val {
    let last = f.addc(size, -1);
    f.min(at, &last)
}

/// Where a line of a matrix begins.
fn start(f: &mut Func, x: &Matrix, line: &Val) -> Val {
    let at = f.mul(line, &x.line);
    f.gep(&x.base, &at, "i16")
}

/// A line of a matrix along the sum.
enum Line {
    /// In whole aligned pieces of 16 bytes, from here on.
    Pieces(Val),
    /// Elements that indices pick of the line that begins here.
    Picked(Val, Picked),
    /// Element by element: the matrix, the line, how many lines there are, and how long they are.
    Each(Picked, [Val; 3]),
}

impl Line {
    fn new(f: &mut Func, x: &Matrix, line: &Val) -> Line {
        Line::Pieces(start(f, x, line))
    }

    /// A line of a product's left operand, of so many.
    fn left(f: &mut Func, p: &mut Pull<'_>, x: &Product, [line, lines]: [&Val; 2]) -> Line {
        let by_element = picks(x, 0) != Some(false) && !in_pieces(x, &x.left, 0);
        if let Some(own) = by_element.then(|| line_by_element(f, p, x, 0, 0)).flatten() {
            let depth = p.dim(f, x.k);
            return Line::Each(own, [line.clone(), lines.clone(), depth]);
        }
        match picked(f, p, x, 0, &[], 0) {
            Some(x) if x.lines => {
                let line = x.place(f, line);
                Line::new(f, &x.matrix, &line)
            }
            Some(x) => Line::Picked(start(f, &x.matrix, line), x),
            None => {
                let x = matrix(f, p, x, 0, &[], 0);
                Line::new(f, &x, line)
            }
        }
    }

    /// Eight elements as four pairs.
    fn pairs(&self, f: &mut Func, at: &Val) -> [Val; 4] {
        match self {
            Line::Pieces(base) => {
                let from = f.gep(base, at, "i16");
                let x = f.op(format!("llvm.load {from} {{alignment = 16 : i64}} : !llvm.ptr -> vector<4xi32>"));
                [0, 1, 2, 3].map(|i| f.op(format!("vector.extract {x}[{i}] : i32 from vector<4xi32>")))
            }
            Line::Picked(base, x) => {
                let elements = x.places(f, at).map(|place| {
                    let at = f.mul(&place, &x.matrix.step);
                    let from = f.gep(base, &at, "i16");
                    let x = f.op(format!("llvm.load {from} {{alignment = 2 : i64}} : !llvm.ptr -> i16"));
                    f.op(format!("arith.extui {x} : i16 to i32"))
                });
                [0, 2, 4, 6].map(|i| pair(f, &elements[i], &elements[i + 1]))
            }
            Line::Each(x, [line, lines, depth]) => x.piece(f, [line, lines], [at, depth]),
        }
    }

    /// Eight elements as four pairs; zeros where `ok` says so.
    fn load(&self, f: &mut Func, at: &Val, ok: Option<&Val>) -> [Val; 4] {
        self.pairs(f, at).map(|x| match ok {
            Some(ok) => {
                let zero = f.i32(0, 1);
                f.op(format!("arith.select {ok}, {x}, {zero} : i32"))
            }
            None => x,
        })
    }
}

/// A line of weights along the sum, as numbers or in blocks.
enum Weights {
    Numbers(Line),
    Codes(blocks::Matrix, Val),
}

/// Two pieces of a line of weights.
enum Loaded<'w> {
    Pairs([[Val; 4]; 2]),
    Coded(&'w blocks::Matrix, blocks::Coded),
}

/// The right operand of a product from a column on.
fn right(f: &mut Func, p: &mut Pull<'_>, x: &Product, column: u64) -> Operand {
    let each = match &x.right {
        Right::Rows(view) | Right::Strided(view) if !in_pieces(x, view, 1) => line_by_element(f, p, x, 1, column),
        _ => None,
    };
    each.map_or_else(|| operand(f, p, x, 1, &[], column), Operand::Picked)
}

impl Weights {
    /// A line of so many.
    fn new(f: &mut Func, x: &Operand, [line, lines]: [&Val; 2], depth: &Val) -> Weights {
        match x {
            Operand::Numbers(x) => Weights::Numbers(Line::new(f, x, line)),
            Operand::Picked(x) => Weights::Numbers(Line::Each(x.clone(), [line, lines, depth].map(Val::clone))),
            Operand::Codes(x) => Weights::Codes(x.blocks.clone(), f.addc(line, x.first)),
        }
    }

    /// Starts to read two pieces, with what says whether they exist: pair `pair` of a block.
    fn load(&self, f: &mut Func, pieces: &[(Val, Option<Val>); 2], pair: &Val) -> Loaded<'_> {
        match self {
            Weights::Numbers(line) => Loaded::Pairs([0, 1].map(|i| line.load(f, &pieces[i].0, pieces[i].1.as_ref()))),
            Weights::Codes(m, row) => {
                let block = f.divc(&pieces[0].0, blocks::VALUES);
                let block = m.block(f, row, &block);
                Loaded::Coded(m, m.load(f, &block, pair, pieces[0].1.as_ref()))
            }
        }
    }
}

impl Loaded<'_> {
    fn pairs(&self, f: &mut Func) -> [[Val; 4]; 2] {
        match self {
            Loaded::Pairs(x) => x.clone(),
            Loaded::Coded(m, x) => m.pairs(f, x),
        }
    }
}

/// The lines of the weights that a lane takes in a pass.
struct Lines<'a> {
    /// Of each product so many (`halves`), 8 apart.
    all: &'a [Weights],
    halves: usize,
    /// Addresses take many registers: lines are at no fixed distance from each other, or another pass goes along the same left operand.
    rolled: bool,
}

/// The warp's sums of some products of one left operand, added to what is there: four for each.
fn accumulate(
    f: &mut Func,
    x: &Line,
    lines: &Lines<'_>,
    [warp, quarter]: [&Val; 2],
    depth: i64,
    begin: Vec<Val>,
) -> Vec<Val> {
    let weights = lines.all;
    // As many steps at once as divide the warps' share, else one at a time with a look at the end.
    let round = STEP * WARPS;
    let most = (LOADED / (2 * 4 * (1 + weights.len() as i64))).max(1);
    let together = (1..=most).rev().find(|u| depth % (round * u) == 0);
    let step = round * together.unwrap_or(1);
    let (zero, end) = (f.i64(0), f.i64(if depth <= round { depth } else { (depth + round - 1) / round * round }));
    // Hidden from LLVM, which would write out a short loop, and have the operands of all turns on their way.
    let end = if depth <= step { end } else { wgmma::settled(f, &[end], "i64", "l").remove(0) };
    // A lane takes two neighbouring pieces; of weights in blocks those that lie in the same bytes.
    let coded = weights.iter().any(|w| matches!(w, Weights::Codes(..)));
    let (block, pair) = (f.divc(quarter, blocks::PAIRS), f.remc(quarter, blocks::PAIRS));
    let (own, apart) = if coded {
        let (a, b) = (f.mulc(&block, blocks::VALUES), f.mulc(&pair, blocks::PIECE));
        (f.add(&a, &b), blocks::APART * blocks::PIECE)
    } else {
        (f.mulc(quarter, OWN), blocks::PIECE)
    };
    let shift = f.mulc(warp, STEP);
    // Of a sum shorter than a round some warps have no part.
    let short = together.is_none() && depth <= round;
    let (begin_at, own) = if short { (shift, own) } else { (zero, f.add(&own, &shift)) };
    let init: Vec<(Val, String)> = begin.into_iter().map(|x| (x, "f32".to_string())).collect();
    if (lines.rolled || most == 1) && depth > step {
        // The assembler would write turns out all the same, and has no registers for that beside the addresses, or for a second turn.
        f.note = super::ROLLED;
    }
    f.for_(&begin_at, &end, step, &init, |f, at, sums| {
        let at = f.add(&own, at);
        let mut loaded = vec![];
        for turn in 0..together.unwrap_or(1) {
            let pieces = [0, apart].map(|first| {
                let at = f.addc(&at, turn * round + first);
                // What is read element by element looks for itself.
                if together.is_some() || !whole(depth as u64) {
                    return (at, None);
                }
                let (end, last) = (f.i64(depth), f.i64(depth - 8));
                let ok = f.cmp("slt", &at, &end);
                (f.min(&at, &last), Some(ok))
            });
            let rows = pieces.each_ref().map(|(at, ok)| x.load(f, at, ok.as_ref()));
            let own: Vec<Loaded<'_>> = weights.iter().map(|w| w.load(f, &pieces, &pair)).collect();
            loaded.push((rows, own));
        }
        let mut sums = sums.to_vec();
        for (rows, own) in &loaded {
            for (pair, c) in own.chunks(lines.halves).zip(sums.chunks_mut(4)) {
                // Decoded where it is needed: registers are few.
                let low = pair[0].pairs(f);
                let high = match pair.get(1) {
                    Some(x) => x.pairs(f),
                    None => [(); 2].map(|()| [(); 4].map(|()| f.i32(0, 1))),
                };
                for (rows, (a, b)) in rows.iter().zip(low.iter().zip(&high)) {
                    for h in [0, 2] {
                        mma::multiply(f, [&a[h], &b[h], &a[h + 1], &b[h + 1]], [&rows[h], &rows[h + 1]], c);
                    }
                }
            }
        }
        sums
    })
}
