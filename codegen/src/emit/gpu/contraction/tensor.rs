//! Products of bf16 through tensor cores (`mma.sync` m16n8k16, f32 accumulators): sm_80 and later.
//!
//! A block of 8 warps computes a tile; tiles of the operands go through four stages of shared memory by asynchronous copies
//! of 16 bytes, with zeros past the ends. An operand may lie along the sum or across it: `ldmatrix` transposes what lies
//! across. 16-byte pieces are permuted within rows of a tile, so that neither copies nor matrix loads collide in banks.
//! A right operand in blocks of codes is decoded on its way: threads read codes of a later stage before they multiply, and write
//! what they stand for after it. So is an operand of which indices pick single elements, and one whose rows are no whole pieces, such as matrices of
//! a rank that 8 does not divide; whole pieces that indices pick are copied.
//! Products of one sum follow each other on the same accumulators; what is scaled comes first. Groups of accumulators that
//! read the same left operand share its tiles, and so do groups of one product each that read the same right operand. Long sums with few results are shared by blocks ([`split`]). [`fragment`]
//! takes the accumulators to the results.

mod decode;
mod picked;

use super::operand::{Operand, axes, by_element, near, operand, picks, view};
use super::passes::{Taken, passes};
use super::{fragment, split, write};
use crate::emit::contraction::analyze::{Analysis, Group, Product, Right};
use crate::emit::dim_expr;
use crate::emit::func::{Func, Val};
use crate::emit::gpu::at::At;
use crate::emit::gpu::blocks;
use crate::emit::gpu::chip::Limits;
use crate::emit::gpu::launch::Unit;
use crate::emit::gpu::mma;
use crate::emit::gpu::pull::Pull;
use crate::emit::gpu::{Form, Parts, Units, barrier, special, wgmma};
use crate::error::CodegenError;
use decode::Share;
use picked::Pick;
use pleach_ir::{DType, Dim, Kernel, Sym};
use pleach_plan::Expr;

const THREADS: i64 = 256;
/// Steps of the sum in a stage, and stages.
const STEP: i64 = 32;
const STAGES: i64 = 4;
/// Elements of 16 bytes.
const PIECE: i64 = 8;
/// Columns of results up to which they need not be a multiple of four.
const RAGGED: u64 = 64;

/// How the work is cut: rows, and columns of a set of accumulators, of a block and of its warps.
#[derive(Clone, Copy)]
struct Cut {
    size: [i64; 2],
    warps: [i64; 2],
    /// Left and right operands in a stage at most.
    parts: [i64; 2],
}

impl Cut {
    /// The form that has this tile.
    fn form(&self, parts: u64) -> Form {
        Form { units: Units::Warp, tile: self.size.map(|n| n as u32), parts: parts as u32 }
    }

    /// 16-row and 8-column products of a warp.
    fn own(&self) -> [i64; 2] {
        [self.size[0] / self.warps[0] / 16, self.size[1] / self.warps[1] / 8]
    }

    /// Bytes of a stage.
    fn stage(&self) -> i64 {
        (self.parts[0] * self.size[0] + self.parts[1] * self.size[1]) * STEP * 2
    }
}

/// Tiles with one set of accumulators, and how their warps stand.
const TILES: [([i64; 2], [i64; 2]); 6] = [
    ([128, 256], [2, 4]),
    ([128, 128], [2, 4]),
    ([64, 128], [2, 4]),
    ([128, 64], [4, 2]),
    ([128, 32], [4, 2]),
    ([32, 128], [2, 4]),
];

/// Products in [`passes`], but all at once where each group is one product of the same right operand.
fn in_passes(a: &Analysis) -> Vec<Vec<Taken>> {
    let alone = passes(a);
    let first = alone[0][0];
    let same = |x: &Taken| {
        let [p, q] = [first, *x].map(|x| &a.products[x.1]);
        p.right == q.right && p.k == q.k && a.groups[first.0].offset == a.groups[x.0].offset
    };
    let shared = alone.len() == a.groups.len() && alone.iter().all(|pass| pass.len() == 1 && same(&pass[0]));
    if shared && alone.len() > 1 { vec![alone.concat()] } else { alone }
}

/// How many left and right operands a pass has.
fn operands(a: &Analysis, pass: &[Taken]) -> [usize; 2] {
    let left = |x: &Taken| &a.products[x.1].left;
    if pass.iter().all(|x| left(x) == left(&pass[0])) { [1, pass.len()] } else { [pass.len(), 1] }
}

/// Ways to cut a kernel, the usual one first; none where tensor cores have no form of it.
fn cuts(a: &Analysis, passes: &[Vec<Taken>]) -> Vec<Cut> {
    let Some(usual) = cut(a, passes) else { return vec![] };
    let mut out = vec![usual];
    // Accumulators of a thread: as many as those of the largest tile.
    let fits = |[m, n]: [i64; 2]| {
        let some = a.n.known().is_none_or(|all| all as i64 > n / 2) && a.m.known().is_none_or(|all| all as i64 > m / 2);
        some && m * n * sets(a) as i64 / THREADS <= if decodes(a) { 64 } else { 128 }
    };
    let more = TILES.iter().filter(|(size, _)| *size != usual.size && fits(*size));
    out.extend(more.map(|(size, warps)| Cut { size: *size, warps: *warps, parts: usual.parts }));
    out
}

/// The forms there are, the usual one first.
pub(super) fn forms(a: &Analysis, limits: &Limits) -> Vec<Form> {
    let mut out = vec![];
    for cut in cuts(a, &in_passes(a)) {
        let parts = split::parts(a, cut.size, limits);
        out.push(cut.form(parts));
        // Sums that are shared at all may be so by fewer or more blocks.
        let more = [parts / 2, 2 * parts].into_iter().filter(|n| parts > 1 && (1..=split::MOST).contains(n));
        out.extend(more.map(|n| cut.form(n)));
    }
    out
}

/// How a kernel is cut; `None` where tensor cores have no form of it.
fn cut(a: &Analysis, passes: &[Vec<Taken>]) -> Option<Cut> {
    let fits = |x: &Product| x.dtype == DType::BF16 && (0..2).all(|side| along(a, x, side).is_some());
    let offsets = a.groups.iter().all(|g| (g.offset as i64) % PIECE == 0);
    let columns = a.n.known().is_some_and(|n| n as i64 % fragment::TOGETHER == 0 || n <= RAGGED);
    if !a.products.iter().all(fits) || !offsets || !columns {
        return None;
    }
    let short = |d: Dim, n: u64| d.known().is_some_and(|d| d <= n);
    let large = a.m.known().is_none_or(|m| m >= 1024) && a.n.known().is_some_and(|n| n >= 1024 && n % 256 == 0);
    // Codes take registers beside accumulators.
    let large = large && !decodes(a);
    let most = |side: usize| passes.iter().map(|x| operands(a, x)[side]).max().unwrap_or(1) as i64;
    let parts = [most(0), most(1)];
    let (size, warps) = match sets(a) {
        1 if short(a.n, 32) => ([128, 32], [4, 2]),
        1 if short(a.m, 32) => ([32, 128], [2, 4]),
        1 if large => ([128, 256], [2, 4]),
        1 => ([128, 128], [2, 4]),
        2..=4 if short(a.m, 32) => ([32, 128], [2, 4]),
        2..=3 => ([128, 64], [4, 2]),
        _ => return None,
    };
    Some(Cut { size, warps, parts })
}

/// Some operand is in blocks of codes, picked, or read by elements.
fn decodes(a: &Analysis) -> bool {
    let picked = |x: &Product| (0..2).any(|side| picks(x, side).is_some() || elements(a, x, side));
    a.products.iter().any(|x| matches!(x.right, Right::Blocks(_)) || picked(x))
}

/// Sets of accumulators that live at once: one for every sum, and one more for a scaled product that is not the first.
fn sets(a: &Analysis) -> usize {
    let scaled = |g: &Group| g.products.iter().filter(|p| p.1.is_some()).count() > 1;
    a.groups.len() + usize::from(a.groups.iter().any(scaled))
}

/// Whether an operand lies along the sum (true) or across it. What indices pick goes into a tile along the other axis, what is read by elements
/// as it lies.
fn along(a: &Analysis, x: &Product, side: usize) -> Option<bool> {
    if let (1, Right::Blocks(b)) = (side, &x.right) {
        // Whole blocks across the sum, from the first column of every group on.
        let whole = a.groups.iter().all(|g| (g.offset as i64) % blocks::VALUES == 0);
        return (b.along || whole).then_some(b.along);
    }
    picks(x, side).or_else(|| whole_pieces(a, x, side)).or_else(|| near(x, side))
}

/// Whether an operand is read element by element.
fn elements(a: &Analysis, x: &Product, side: usize) -> bool {
    view(x, side).is_some() && whole_pieces(a, x, side).is_none()
}

/// Whether the pieces of 16 bytes of an operand lie along the sum or across it; `None` where they are not whole or not aligned, or indices
/// pick elements of them.
fn whole_pieces(a: &Analysis, x: &Product, side: usize) -> Option<bool> {
    let (view, picked) = (view(x, side)?, picks(x, side));
    let piece = PIECE as u64;
    let (line, step) = axes(view, side);
    let batch = &view.strides[..view.strides.len() - 2];
    let aligned =
        batch.iter().all(|s| s.factor % piece == 0) && view.offset.iter().all(|(n, s)| n * s.factor % piece == 0);
    let whole = |d: Dim| d.known().is_some_and(|n| n % piece == 0);
    let lines = if side == 0 { a.m } else { a.n };
    match () {
        () if !aligned => None,
        () if step.known() == Some(1) && line.factor % piece == 0 && whole(x.k) && picked != Some(false) => Some(true),
        () if line.known() == Some(1) && step.factor % piece == 0 && whole(lines) && picked != Some(true) => {
            Some(false)
        }
        () => None,
    }
}

/// Where a thread stands.
struct Place {
    cut: Cut,
    tid: Val,
    lane: Val,
    /// First row and column of the block; of the warp in the block.
    block: [Val; 2],
    warp: [Val; 2],
    /// Rows and columns of the results.
    size: [Val; 2],
    smem: Val,
    /// Loops over a sum stay loops.
    rolled: bool,
}

/// An operand of a product with its place in a stage.
struct Side {
    x: Operand,
    along: bool,
    /// Read by elements, not by whole pieces.
    elements: bool,
    /// Lines of the tile, and where it starts in a stage, bytes.
    lines: i64,
    start: i64,
}

/// Emits the kernel, if it has this form.
pub(super) fn emit(
    k: &Kernel,
    symbols: &[Sym],
    a: &Analysis,
    limits: &Limits,
    wish: Option<&Form>,
) -> Result<Option<Parts>, CodegenError> {
    let passes = in_passes(a);
    let fits = |c: &Cut| wish.is_none_or(|w| c.form(u64::from(w.parts)) == *w);
    let Some(cut) = cuts(a, &passes).into_iter().find(fits) else { return Ok(None) };
    let parts = wish.map_or_else(|| split::parts(a, cut.size, limits), |w| u64::from(w.parts));
    if parts > 1 && split::parts(a, cut.size, limits) == 1 {
        return Ok(None);
    }
    let mut unit = Unit::new(k, "", parts > 1);
    let f = &mut unit.f;
    let mut p = Pull::new(f, k, symbols);
    let smem = f.op("llvm.mlir.addressof @smem : !llvm.ptr<3>");
    let tid = special(f, "tid.x");
    let block = [("ctaid.y", 0), ("ctaid.x", 1)].map(|(reg, i)| {
        let x = special(f, reg);
        f.mulc(&x, cut.size[i])
    });
    let size = [p.dim(f, a.m), p.dim(f, a.n)];
    let z = special(f, "ctaid.z");
    let at = if parts > 1 { At::known(f, 0) } else { At::of(f, &z, 1) };
    let batch = p.index(f, &a.batch, &at);
    let batch_values: Vec<Val> = batch.iter().map(|b| b.val(f)).collect();
    let place = Place::new(f, cut, tid, block, size, smem);
    let (rows, columns) =
        (f.cmp("slt", &place.block[0], &place.size[0]), f.cmp("slt", &place.block[1], &place.size[1]));
    let some = f.op(format!("arith.andi {rows}, {columns} : i1"));
    let small = cut.size[0] * cut.size[1] <= 128 * 128;
    let simple = sets(a) == 1 && k.body.roots.len() == 1 && passes.len() <= 2 && small && !decodes(a);
    let resident = if simple { 2 } else { 1 };
    let sums = (a.groups.len() * place.elements()) as i64;
    let at_once = super::batch(k, a, 256 / resident - 1, sums);
    f.if_(&some, |f| {
        let mut totals: Vec<Option<Vec<Val>>> = vec![None; a.groups.len()];
        let mut place = place;
        let deep = |pass: &[Taken]| a.products[pass[0].1].k;
        for (n, pass) in passes.iter().enumerate() {
            // Passes over sums of one length have the same addresses, and two blocks leave no registers for them.
            if resident > 1 && passes[..n].iter().any(|x| deep(x) == deep(pass)) {
                place = place.anew(f);
            }
            // Nor do two sets of accumulators for turns of their loops that the assembler writes out.
            let others = passes.iter().filter(|x| deep(x) == deep(pass)).count() > 1;
            let long = deep(pass).known().is_none_or(|n| n as i64 > STAGES * STEP);
            place.rolled = sets(a) > 1 && others && long;
            let side = |f: &mut Func, p: &mut Pull<'_>, i: usize, s: usize, offset: u64, start: i64| {
                let x = &a.products[i];
                let along = along(a, x, s) == Some(true);
                let elements = elements(a, x, s);
                let single = if elements { by_element(f, p, x, s, &batch_values, offset) } else { None };
                let x = single.map_or_else(|| operand(f, p, x, s, &batch_values, offset), Operand::Picked);
                Side { x, along, elements, lines: cut.size[s], start }
            };
            let (mut sides, mut start) = ([vec![], vec![]], 0);
            for (s, n) in operands(a, pass).into_iter().enumerate() {
                for (g, product, _) in &pass[..n] {
                    let offset = if s == 0 { 0 } else { a.groups[*g].offset };
                    sides[s].push(side(f, &mut p, *product, s, offset, start));
                    start += cut.size[s] * STEP * 2;
                }
            }
            let [lefts, rights] = sides;
            let none = f.f32(0.0, 1);
            let begin: Vec<Val> = pass
                .iter()
                .flat_map(|(g, _, s)| match (s, &totals[*g]) {
                    (None, Some(t)) => t.clone(),
                    _ => vec![none.clone(); place.elements()],
                })
                .collect();
            let depth = p.dim(f, a.products[pass[0].1].k);
            let range = share(f, &depth, &z, parts);
            let sums = place.accumulate(f, &lefts, &rights, &range, begin);
            for ((g, _, scale), sum) in pass.iter().zip(sums.chunks(place.elements())) {
                let before = totals[*g].take();
                totals[*g] = Some(match scale {
                    None => sum.to_vec(),
                    Some(s) => {
                        let s = p.eval(f, *s, &[]);
                        let scaled = sum.iter().enumerate().map(|(i, x)| match &before {
                            Some(b) => f.op(format!("math.fma {x}, {s}, {} : f32", b[i])),
                            None => f.op(format!("arith.mulf {x}, {s} : f32")),
                        });
                        scaled.collect()
                    }
                });
            }
        }
        let sums: Vec<Vec<Val>> = totals.into_iter().flatten().collect();
        place.each(f, at_once, &sums, |f, tile, sums| match parts {
            1 => write(f, &mut p, a, &batch, tile, sums),
            _ => {
                let size = [place.size[0].clone(), tile.size[1].clone()];
                fragment::each(f, tile, sums, |f, at, places, x| split::keep(f, &size, &z, at, places, x));
            }
        });
    });
    p.finish()?;
    let blocks = |d: Dim, n: i64| -> Result<Expr, CodegenError> { Ok(dim_expr(k, d, symbols)?.ceil_div(n as u64)) };
    let mut batches = Expr::Const(parts);
    for d in &a.batch {
        batches = batches.mul(dim_expr(k, *d, symbols)?);
    }
    let grid = [blocks(a.n, cut.size[1])?, blocks(a.m, cut.size[0])?, batches];
    let (mut text, launch) = unit.finish(grid, THREADS as u32, (STAGES * cut.stage()) as u32, resident as u32);
    if parts == 1 {
        return Ok(Some((text, vec![launch], Expr::Const(0))));
    }
    let (more, second) = split::finish(k, symbols, a, parts, "_sum")?;
    text += &more;
    Ok(Some((text, vec![launch, second], split::scratch(k, symbols, a, parts)?)))
}

/// What block `z` of `parts` takes of a sum: first step and end.
fn share(f: &mut Func, depth: &Val, z: &Val, parts: u64) -> [Val; 2] {
    if parts == 1 {
        return [f.i64(0), depth.clone()];
    }
    let steps = f.ceil_divc(depth, STEP);
    let own = f.ceil_divc(&steps, parts as i64);
    let own = f.mulc(&own, STEP);
    let first = f.mul(z, &own);
    let end = f.add(&first, &own);
    [first, f.min(&end, depth)]
}

impl Place {
    /// The place of thread `tid` of the block whose first row and column these are.
    fn new(f: &mut Func, cut: Cut, tid: Val, block: [Val; 2], size: [Val; 2], smem: Val) -> Place {
        let (warp, lane) = (f.divc(&tid, 32), f.remc(&tid, 32));
        let (row, column) = (f.divc(&warp, cut.warps[1]), f.remc(&warp, cut.warps[1]));
        let warp = [f.mulc(&row, cut.size[0] / cut.warps[0]), f.mulc(&column, cut.size[1] / cut.warps[1])];
        Place { cut, tid, lane, block, warp, size, smem, rolled: false }
    }

    /// The same place, computed anew: addresses of a pass that are found equal to those of the one before are kept through all of
    /// its loop.
    fn anew(&self, f: &mut Func) -> Place {
        let [row, column] = &self.block;
        let hidden = wgmma::settled(f, &[self.tid.clone(), row.clone(), column.clone()], "i64", "l");
        let [tid, row, column] = [0, 1, 2].map(|i| hidden[i].clone());
        Place::new(f, self.cut, tid, [row, column], self.size.clone(), self.smem.clone())
    }

    /// Address of byte `at` of shared memory.
    fn shared(&self, f: &mut Func, at: &Val) -> Val {
        crate::emit::gpu::launch::shared_at(f, &self.smem, at, "i8")
    }

    /// Byte of a piece in a tile: row of the tile as it lies, number of the piece in it.
    fn piece(&self, f: &mut Func, s: &Side, row: &Val, piece: &Val) -> Val {
        let bytes = if s.along { STEP * 2 } else { s.lines * 2 };
        // Rows of 64 bytes share a set of banks two by two.
        let turn = if bytes < 128 {
            let half = f.divc(row, 2);
            f.remc(&half, 4)
        } else {
            f.remc(row, 8)
        };
        let turned = f.op(format!("arith.xori {piece}, {turn} : i64"));
        let (a, b) = (f.mulc(row, bytes), f.mulc(&turned, 16));
        f.add(&a, &b)
    }

    /// Accumulators of a thread for one product.
    fn elements(&self) -> usize {
        (self.cut.own()[0] * self.cut.own()[1] * 4) as usize
    }

    /// Starts the copies of step `k0` of an operand into a stage.
    fn fill(&self, f: &mut Func, side: usize, s: &Side, stage: &Val, k0: &Val, depth: &Val) {
        let x = match &s.x {
            Operand::Numbers(x) => x,
            Operand::Picked(x) if !s.elements => &x.matrix,
            Operand::Picked(_) | Operand::Codes(_) => return,
        };
        let row_pieces = if s.along { STEP / PIECE } else { s.lines / PIECE };
        let total = s.lines * STEP / PIECE;
        let base = f.op(format!("llvm.addrspacecast {} : !llvm.ptr to !llvm.ptr<1>", x.base));
        for i in 0..(total as u64).div_ceil(THREADS as u64) as i64 {
            let n = f.addc(&self.tid, i * THREADS);
            let copy = |f: &mut Func| {
                let (row, piece) = (f.divc(&n, row_pieces), f.remc(&n, row_pieces));
                let within = f.mulc(&piece, PIECE);
                let (line, step) = if s.along { (&row, &within) } else { (&within, &row) };
                let (line, step) = (f.add(&self.block[side], line), f.add(k0, step));
                let (a, b) = (f.cmp("slt", &line, &self.size[side]), f.cmp("slt", &step, depth));
                let inside = f.op(format!("arith.andi {a}, {b} : i1"));
                let (zero, mut line, mut step) = (f.i64(0), line, step);
                if let Operand::Picked(x) = &s.x {
                    let at = if x.lines { &mut line } else { &mut step };
                    *at = f.op(format!("arith.select {inside}, {at}, {zero} : i64"));
                    *at = x.place(f, at);
                }
                let (a, b) = (f.mul(&line, &x.line), f.mul(&step, &x.step));
                let at = f.add(&a, &b);
                let at = f.op(format!("arith.select {inside}, {at}, {zero} : i64"));
                let from = f.op(format!("llvm.getelementptr {base}[{at}] : (!llvm.ptr<1>, i64) -> !llvm.ptr<1>, i16"));
                let (all, none) = (f.i32(16, 1), f.i32(0, 1));
                let bytes = f.op(format!("arith.select {inside}, {all}, {none} : i32"));
                let to = self.piece(f, s, &row, &piece);
                let to = f.add(&to, stage);
                let to = f.addc(&to, s.start);
                let to = self.shared(f, &to);
                f.stmt(&format!(
                    "nvvm.cp.async.shared.global {to}, {from}, 16, cache = cg, {bytes} : !llvm.ptr<3>, !llvm.ptr<1>, i32"
                ));
            };
            if (i + 1) * THREADS <= total {
                copy(f);
            } else {
                let end = f.i64(total);
                let some = f.cmp("slt", &n, &end);
                f.if_(&some, copy);
            }
        }
    }

    /// Four 8 by 8 matrices of an operand: 16 lines from `line` on, 16 steps from `step` on. For the left operand in the order
    /// of its registers; for the right one two columns of products, each with both halves of the steps.
    fn matrices(&self, f: &mut Func, side: usize, s: &Side, stage: &Val, line: i64, step: i64) -> [Val; 4] {
        let low = f.remc(&self.lane, 8);
        let (eighth, half) = (f.divc(&self.lane, 8), f.divc(&self.lane, 16));
        let odd = f.remc(&eighth, 2);
        // Matrix i of the left operand: lines i % 2, steps i / 2; of the right one the other way round.
        let (lines, steps) = if side == 0 { (&odd, &half) } else { (&half, &odd) };
        let (row, piece) = if s.along {
            let l = f.mulc(lines, 8);
            let l = f.add(&l, &low);
            let l = f.addc(&l, line);
            (f.add(&self.warp[side], &l), f.addc(steps, step / PIECE))
        } else {
            let k = f.mulc(steps, 8);
            let k = f.add(&k, &low);
            let first = f.divc(&self.warp[side], PIECE);
            let first = f.addc(&first, line / PIECE);
            (f.addc(&k, step), f.add(&first, lines))
        };
        let at = self.piece(f, s, &row, &piece);
        let at = f.add(&at, stage);
        let at = f.addc(&at, s.start);
        let at = self.shared(f, &at);
        mma::load(f, &at, !s.along)
    }

    /// The thread's sums of products of one left operand, or of one right operand, over a range of steps, added to what is there: four for
    /// every 16 by 8 product of a warp.
    fn accumulate(&self, f: &mut Func, lefts: &[Side], rights: &[Side], range: &[Val; 2], init: Vec<Val>) -> Vec<Val> {
        let stage = self.cut.stage();
        let [first, end] = range;
        let fill = |f: &mut Func, at: &Val, step: &Val| {
            lefts.iter().for_each(|s| self.fill(f, 0, s, at, step, end));
            rights.iter().for_each(|s| self.fill(f, 1, s, at, step, end));
            f.stmt("nvvm.cp.async.commit.group");
        };
        let coded: Vec<&Side> = rights.iter().filter(|s| matches!(s.x, Operand::Codes(_))).collect();
        let sides = lefts.iter().map(|s| (0, s)).chain(rights.iter().map(|s| (1, s)));
        let picked: Vec<(usize, &Side)> = sides.filter(|(_, s)| s.elements).collect();
        for i in 0..STAGES - 1 {
            let (at, k0) = (f.i64(i * stage), f.addc(first, i * STEP));
            fill(f, &at, &k0);
            for s in &coded {
                let own = self.read(f, s, [&k0, end], [0, 1]);
                self.decode(f, s, &own, &at);
                self.lay(f, s, [&k0, end], &at);
            }
            for (side, s) in &picked {
                let own = self.pick(f, *side, s, [&k0, end], [0, 1]);
                self.put(f, s, &own, &at);
            }
        }
        let (zero, length) = (f.i64(0), f.sub(end, first));
        let length = f.max(&length, &zero);
        let steps = f.ceil_divc(&length, STEP);
        let init: Vec<(Val, String)> = init.into_iter().map(|x| (x, "f32".to_string())).collect();
        if self.rolled {
            f.note = super::ROLLED;
        }
        let out = f.for_(&zero, &steps, 1, &init, |f, t, acc| {
            f.stmt(&format!("nvvm.cp.async.wait.group {}", STAGES - 2));
            barrier(f);
            let next = f.addc(t, STAGES - 1);
            let slot = f.remc(&next, STAGES);
            let (slot, k0) = (f.mulc(&slot, stage), f.mulc(&next, STEP));
            let k0 = f.add(first, &k0);
            fill(f, &slot, &k0);
            let now = f.remc(t, STAGES);
            let now = f.mulc(&now, stage);
            let mut acc = acc.to_vec();
            for step in (0..STEP).step_by(16) {
                // Part of the codes at a time: registers are few.
                let part = [step / 16, STEP / 16];
                let read: Vec<Vec<Share>> = coded.iter().map(|s| self.read(f, s, [&k0, end], part)).collect();
                let picks: Vec<Vec<Pick>> =
                    picked.iter().map(|(side, s)| self.pick(f, *side, s, [&k0, end], part)).collect();
                self.multiply(f, lefts, rights, &now, step, &mut acc);
                picked.iter().zip(&picks).for_each(|((_, s), own)| self.put(f, s, own, &slot));
                coded.iter().zip(&read).for_each(|(s, own)| self.decode(f, s, own, &slot));
            }
            coded.iter().for_each(|s| self.lay(f, s, [&k0, end], &slot));
            acc
        });
        // Shared memory is free for the next product.
        f.stmt("nvvm.cp.async.wait.group 0");
        barrier(f);
        out
    }

    fn multiply(&self, f: &mut Func, lefts: &[Side], rights: &[Side], stage: &Val, step: i64, acc: &mut [Val]) {
        let [rows, columns] = self.cut.own();
        let lines = |f: &mut Func, side: usize, s: &Side, n: i64| -> Vec<[Val; 4]> {
            (0..n).map(|i| self.matrices(f, side, s, stage, 16 * i, step)).collect()
        };
        let (mut a, mut b) = (vec![], vec![]);
        for (n, acc) in acc.chunks_mut(self.elements()).enumerate() {
            // What is shared is there since the first product.
            if let Some(left) = lefts.get(n) {
                a = lines(f, 0, left, rows);
            }
            if let Some(right) = rights.get(n) {
                b = lines(f, 1, right, columns / 2);
            }
            for (i, a) in a.iter().enumerate() {
                for j in 0..columns as usize {
                    let b = &b[j / 2][2 * (j % 2)..];
                    let c = &mut acc[4 * (i * columns as usize + j)..][..4];
                    mma::multiply(f, a.each_ref(), [&b[0], &b[1]], c);
                }
            }
        }
    }

    /// Calls `put` with every 16 rows of the warp and the accumulators of each group in them.
    fn each(
        &self,
        f: &mut Func,
        batch: i64,
        sums: &[Vec<Val>],
        mut put: impl FnMut(&mut Func, &fragment::Tile<'_>, &[Vec<Val>]),
    ) {
        let [rows, columns] = self.cut.own();
        let (m0, n0) = (f.add(&self.block[0], &self.warp[0]), f.add(&self.block[1], &self.warp[1]));
        let columns_of_four = fragment::whole(f, &self.size[1]);
        for i in 0..rows {
            let m = f.addc(&m0, 16 * i);
            let tile = fragment::Tile {
                lane: &self.lane,
                at: [&m, &n0],
                size: [&self.size[0], &columns_of_four],
                columns: 8 * columns,
                tile: self.cut.size[1],
                batch,
            };
            let own: Vec<Vec<Val>> =
                sums.iter().map(|s| s[(4 * i * columns) as usize..][..4 * columns as usize].to_vec()).collect();
            put(f, &tile, &own);
        }
    }
}
