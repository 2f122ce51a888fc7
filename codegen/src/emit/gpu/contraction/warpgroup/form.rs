//! How a contraction is cut for warpgroup products: tiles, passes over the contracted dimension, tensor maps.

use crate::emit::contraction::analyze::{Analysis, Product, Right};
use crate::emit::contraction::view::{Stride, View};
use crate::emit::dim_expr;
use crate::emit::gpu;
use crate::emit::gpu::chip::Limits;
use crate::emit::gpu::contraction::operand::{axes, near, picks, view};
use crate::emit::gpu::contraction::passes::{Taken, passes};
use crate::emit::gpu::ring::Ring;
use crate::emit::gpu::wgmma;
use crate::error::CodegenError;
use pleach_ir::{BlockFormat, DType, Dim, Kernel, Sym, ValueId};
use pleach_plan::{Expr, TensorMap};

/// Steps of the contracted dimension in a stage: rows of 128 bytes, which one swizzle covers.
pub(super) const STEP: i64 = 64;
/// Rows of a warpgroup.
pub(super) const ROWS: i64 = wgmma::ROWS;
/// Bytes of 64 rows or columns of a stage.
pub(super) const BLOCK: i64 = ROWS * STEP * 2;
/// Rows that a symbol is taken for where a choice depends on it.
const TYPICAL_ROWS: u64 = 4096;
/// Accumulators of a thread at most.
const ACCUMULATORS: i64 = 128;
/// Elements of 16 bytes.
const PIECE: u64 = 8;

/// The tile of a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Cut {
    /// Warpgroups that multiply, 64 rows each.
    pub(super) consumers: i64,
    /// Columns of a set of accumulators.
    pub(super) columns: i64,
    /// Right operands in a stage at most.
    pub(super) parts: i64,
    /// Stages of the ring.
    pub(super) stages: i64,
}

impl Cut {
    /// The form that has this tile.
    fn form(&self) -> gpu::Form {
        gpu::Form { units: gpu::Units::Warpgroup, tile: [self.rows() as u32, self.columns as u32], parts: 1 }
    }

    pub(super) fn rows(&self) -> i64 {
        ROWS * self.consumers
    }

    /// Bytes of the left operand, and of one right operand, in a stage.
    pub(super) fn left(&self) -> i64 {
        BLOCK * self.consumers
    }

    pub(super) fn right(&self) -> i64 {
        self.columns * STEP * 2
    }

    pub(super) fn stage(&self) -> i64 {
        self.left() + self.parts * self.right()
    }

    /// Where the barriers lie: one of each kind for a stage.
    pub(super) fn barriers(&self) -> i64 {
        self.stages * self.stage()
    }

    /// Dynamic shared memory, bytes.
    pub(super) fn shared(&self) -> i64 {
        self.barriers() + Ring::barrier_bytes(self.stages)
    }

    /// Blocks that one multiprocessor holds.
    pub(super) fn resident(&self) -> i64 {
        if self.consumers == 1 { 2 } else { 1 }
    }
}

/// An operand as tensor copies read it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Operand {
    /// Number of the tensor map.
    pub(super) map: usize,
    /// Lies along the sum; else across it.
    pub(super) along: bool,
    /// First row (of the result: row or column) and first step in the map.
    pub(super) first: [i64; 2],
}

/// Where the tiles of an operand come from.
pub(super) enum Source {
    /// Tensor copies bring it.
    Copied(Operand),
    /// In blocks of codes, on the right: decoded by the warpgroup that copies.
    Decoded(Coded),
    /// Indices pick of it, or it has no whole pieces: read by the warpgroup that copies.
    Picked(Picks),
}

/// An operand of which indices pick lines, and which lies along the sum in a stage, or steps, and lies across it; or one read by elements, all of it.
#[derive(Clone, Copy)]
pub(super) struct Picks {
    pub(super) product: usize,
    pub(super) side: usize,
    pub(super) column: u64,
    pub(super) lines: bool,
    /// Read by elements, not by whole pieces of 16 bytes.
    pub(super) elements: bool,
}

/// A right operand in blocks of codes: of this product, from a column on; blocks lie along the sum or across it.
#[derive(Clone, Copy)]
pub(super) struct Coded {
    pub(super) product: usize,
    pub(super) column: u64,
    pub(super) along: bool,
}

impl Source {
    /// What tensor copies bring.
    pub(super) fn copied(&self) -> Option<&Operand> {
        match self {
            Source::Copied(x) => Some(x),
            Source::Decoded(_) | Source::Picked(_) => None,
        }
    }

    /// Lies along the sum; else across it.
    pub(super) fn along(&self) -> bool {
        match self {
            Source::Copied(x) => x.along,
            Source::Decoded(x) => x.along,
            Source::Picked(x) => x.lines,
        }
    }
}

/// A product that a pass adds to a group.
pub(super) struct Part {
    pub(super) group: usize,
    pub(super) right: Source,
    pub(super) scale: Option<ValueId>,
}

/// Products of one left operand, taken together.
pub(super) struct Pass {
    pub(super) left: Source,
    /// Length of the sum.
    pub(super) depth: Dim,
    pub(super) parts: Vec<Part>,
}

/// A contraction ready to be written.
pub(super) struct Form {
    pub(super) cut: Cut,
    pub(super) passes: Vec<Pass>,
    pub(super) maps: Vec<TensorMap>,
}

impl Form {
    /// Some operand is decoded or picked: the warpgroup that copies works as a whole.
    pub(super) fn decodes(&self) -> bool {
        let works = |x: &Source| !matches!(x, Source::Copied(_));
        self.passes.iter().any(|p| works(&p.left) || p.parts.iter().any(|x| works(&x.right)))
    }
}

/// Whether blocks of a right operand lie along the sum; `None` for one of numbers, and where a group begins inside of a block.
fn coded(a: &Analysis, x: &Product) -> Option<bool> {
    let Right::Blocks(b) = &x.right else { return None };
    let whole = a.groups.iter().all(|g| g.offset % BlockFormat::VALUES == 0);
    (b.along || whole).then_some(b.along)
}

/// A matrix of a product: rows of the result by steps of the sum.
pub(in super::super) struct Place<'a> {
    pub(in super::super) view: &'a View,
    pub(in super::super) along: bool,
    pub(in super::super) first: [u64; 2],
    lines: Dim,
}

/// An operand that tensor copies can read; `None` for any other.
pub(in super::super) fn place<'a>(a: &Analysis, x: &'a Product, side: usize) -> Option<Place<'a>> {
    let view = view(x, side).filter(|v| v.picked.is_none())?;
    let (line, step) = axes(view, side);
    let mut first = [0, 0];
    for (n, s) in &view.offset {
        match () {
            () if s == line => first[0] += n,
            () if s == step => first[1] += n,
            () => return None,
        }
    }
    let along = match (line.known(), step.known()) {
        (_, Some(1)) if line.factor % PIECE == 0 && line.factor > 0 => true,
        (Some(1), _) if step.factor % PIECE == 0 && step.factor > 0 => false,
        _ => return None,
    };
    Some(Place { view, along, first, lines: if side == 0 { a.m } else { x.n } })
}

/// An operand that no tensor copy reads, from a column on: indices pick of it, or its lines are no whole pieces of 16 bytes. `None` for any other,
/// and for a sum of unknown length.
fn picked(a: &Analysis, x: &Product, product: usize, side: usize, column: u64) -> Option<Picks> {
    let view = view(x, side)?;
    let lines = match picks(x, side) {
        Some(lines) => lines,
        None if place(a, x, side).is_none() => near(x, side)?,
        None => return None,
    };
    let depth = x.k.known()?;
    let (line, step) = axes(view, side);
    let (close, far) = if lines { (step, line) } else { (line, step) };
    // Pieces along the sum end with it; those across it may go on past the last line, where there is something.
    let ends = lines && depth % PIECE == 0 || !lines && side == 1 && x.n.known().is_some_and(|n| n % PIECE == 0);
    let first = view.offset.iter().all(|(n, s)| (n * s.factor).is_multiple_of(PIECE)) && column.is_multiple_of(PIECE);
    let pieces = ends && first && close.known() == Some(1) && far.factor % PIECE == 0;
    Some(Picks { product, side, column, lines, elements: !pieces })
}

/// The forms there are, the one that seems fastest first.
pub(in super::super) fn forms(
    k: &Kernel,
    symbols: &[Sym],
    a: &Analysis,
    limits: &Limits,
) -> Result<Vec<gpu::Form>, CodegenError> {
    let Some((shape, _)) = shape(a) else { return Ok(vec![]) };
    let mut out = vec![];
    for cut in shape.cuts(limits) {
        if form(k, symbols, a, limits, Some(&cut.form()))?.is_some() {
            out.push(cut.form());
        }
    }
    Ok(out)
}

/// What tiles depend on, and the order of products; `None` where this class of products has no form of the kernel, or gains nothing.
fn shape(a: &Analysis) -> Option<(Shape, Vec<Vec<Taken>>)> {
    let rows = a.m.known();
    let (Some(columns), true) = (a.n.known(), a.batch.is_empty()) else { return None };
    // A sum of unknown length ends within a stage, where what is past its end is cleared: whole lines.
    let fits = |x: &Product| {
        let side = |s: usize| {
            place(a, x, s).is_some_and(|p| x.k.known().is_some() || !p.along) || picked(a, x, 0, s, 0).is_some()
        };
        x.dtype == DType::BF16 && x.k.known() != Some(0) && side(0) && (side(1) || coded(a, x).is_some())
    };
    if columns % 4 != 0 || rows.is_some_and(|m| m < ROWS as u64) || !a.products.iter().all(fits) {
        return None;
    }
    let order = passes(a);
    let scaled = a.groups.iter().any(|g| g.products.iter().filter(|p| p.1.is_some()).count() > 1);
    let sets = a.groups.len() as i64 + i64::from(scaled);
    let parts = order.iter().map(|p| p.len()).max().unwrap_or(1) as i64;
    let lies = |x: &Product| coded(a, x).or(picks(x, 1)).or(place(a, x, 1).map(|p| p.along)).or(near(x, 1));
    let across = a.products.iter().any(|x| lies(x) == Some(false));
    let by_threads = |x: &Product| (0..2).any(|s| picked(a, x, 0, s, 0).is_some());
    let decodes = a.products.iter().any(|x| coded(a, x).is_some() || by_threads(x));
    let length = |p: &Vec<Taken>| a.products[p[0].1].k.known().unwrap_or(TYPICAL_ROWS).div_ceil(STEP as u64);
    let depth: u64 = order.iter().map(length).sum();
    Some((Shape { rows: rows.unwrap_or(TYPICAL_ROWS), columns, sets, parts, depth, across, decodes }, order))
}

/// How the kernel is taken, in the form that is wished; `None` where this class of products has no form of it, or gains nothing.
pub(super) fn form(
    k: &Kernel,
    symbols: &[Sym],
    a: &Analysis,
    limits: &Limits,
    wish: Option<&gpu::Form>,
) -> Result<Option<Form>, CodegenError> {
    let Some((shape, order)) = shape(a) else { return Ok(None) };
    let cut = shape.cuts(limits).into_iter().find(|c| wish.is_none_or(|w| *w == c.form()));
    let Some(cut) = cut else { return Ok(None) };
    // Few tiles of a long sum leave multiprocessors idle, unless they share it. Who wishes the form knows better.
    let few = 4 * shape.tiles(&cut) < 3 * u64::from(limits.multiprocessors);
    if wish.is_none() && few && a.products.iter().any(|x| x.k.known().is_none()) {
        return Ok(None);
    }

    let mut maps: Vec<TensorMap> = vec![];
    let mut passes = vec![];
    for pass in order {
        let mut operand = |i: usize, side: usize, offset: u64| -> Result<Option<Source>, CodegenError> {
            if let Some(x) = picked(a, &a.products[i], i, side, offset) {
                return Ok(Some(Source::Picked(x)));
            }
            let Some(at) = place(a, &a.products[i], side) else { return Ok(None) };
            let box_lines = if side == 0 { cut.rows() } else { cut.columns };
            let map = tensor_map(k, symbols, &at, side, a.products[i].k, box_lines)?;
            let map = maps.iter().position(|m| *m == map).unwrap_or_else(|| {
                maps.push(map);
                maps.len() - 1
            });
            let first = [(at.first[0] + offset) as i64, at.first[1] as i64];
            Ok(Some(Source::Copied(Operand { map, along: at.along, first })))
        };
        let Some(left) = operand(pass[0].1, 0, 0)? else { return Ok(None) };
        let mut parts = vec![];
        for (group, product, scale) in &pass {
            let column = a.groups[*group].offset;
            let right = match coded(a, &a.products[*product]) {
                Some(along) => Source::Decoded(Coded { product: *product, column, along }),
                None => match operand(*product, 1, column)? {
                    Some(x) => x,
                    None => return Ok(None),
                },
            };
            parts.push(Part { group: *group, right, scale: *scale });
        }
        passes.push(Pass { left, depth: a.products[pass[0].1].k, parts });
    }
    Ok(Some(Form { cut, passes, maps }))
}

/// The map of an operand: its extent bounds what is read, zeros lie outside.
fn tensor_map(
    k: &Kernel,
    symbols: &[Sym],
    at: &Place<'_>,
    side: usize,
    depth: Dim,
    box_lines: i64,
) -> Result<TensorMap, CodegenError> {
    let (line, step) = axes(at.view, side);
    let bytes = |s: &Stride| -> Result<Expr, CodegenError> {
        let mut e = Expr::Const(s.factor * 2);
        for sym in &s.syms {
            e = e.mul(dim_expr(k, Dim::Symbol(*sym), symbols)?);
        }
        Ok(e)
    };
    let lines = dim_expr(k, at.lines, symbols)?.add(at.first[0]);
    let steps = dim_expr(k, depth, symbols)?.add(at.first[1]);
    let (sizes, stride, boxes) = match at.along {
        true => (vec![steps, lines], bytes(line)?, vec![STEP as u32, box_lines as u32]),
        false => (vec![lines, steps], bytes(step)?, vec![ROWS as u32, STEP as u32]),
    };
    let buffer = at.view.arg as u32;
    Ok(TensorMap { buffer, dtype: pleach_plan::DType::BF16, sizes, strides: vec![stride], boxes, swizzle: 128 })
}

/// What the choice of a tile depends on.
struct Shape {
    rows: u64,
    columns: u64,
    sets: i64,
    parts: i64,
    /// Stages that a tile takes from the ring.
    depth: u64,
    /// A right operand lies across the sum: it comes in blocks of 64 columns.
    across: bool,
    /// An operand is decoded or picked.
    decodes: bool,
}

impl Shape {
    /// The tiles that fit, the one that seems fastest first.
    fn cuts(&self, limits: &Limits) -> Vec<Cut> {
        let mut all: Vec<(u64, Cut)> = vec![];
        for consumers in [2, 1] {
            for columns in [256, 192, 128, 96, 64, 32] {
                let shared = if consumers == 1 { limits.shared_sm / 2 - 1024 } else { limits.shared_block };
                let mut cut = Cut { consumers, columns, parts: self.parts, stages: 0 };
                cut.stages = (i64::from(shared) / (cut.stage() + 16)).min(8);
                // Where two blocks share a multiprocessor, a thread has half as many registers.
                let most = ACCUMULATORS / cut.resident();
                let fits = self.sets * columns / 2 <= most && cut.stages >= 3;
                if fits && (!self.across || columns % ROWS == 0) {
                    all.push((self.cost(&cut, limits), cut));
                }
            }
        }
        all.sort_by_key(|c| c.0);
        all.into_iter().map(|c| c.1).collect()
    }

    fn tiles(&self, cut: &Cut) -> u64 {
        self.rows.div_ceil(cut.rows() as u64) * self.columns.div_ceil(cut.columns as u64)
    }

    /// Cycles, roughly: tensor cores against the cache's bandwidth, in whole rounds of all multiprocessors.
    fn cost(&self, cut: &Cut, limits: &Limits) -> u64 {
        let tiles = self.tiles(cut);
        let n = (cut.columns * self.parts) as u64;
        let (sms, consumers) = (u64::from(limits.multiprocessors), cut.consumers as u64);
        // A product of 64 by n by 16 takes n / 2 cycles, or as long as shared memory gives its operands.
        let product = (n / 2).max((2048 * self.parts as u64 + 32 * n) / 112);
        let multiply = 4 * consumers * product;
        // Five instructions for a value, by four warps, one of each scheduler.
        let decode = if self.decodes { 5 * STEP as u64 * n / 128 } else { 0 };
        let copy = (cut.stage() as u64 / u64::from(limits.cache_bytes_per_cycle)).max(decode);
        let write = cut.rows() as u64 * cut.columns as u64 * self.sets as u64 / 24 + 1500;
        let tile = self.depth * multiply.max(copy) + write;
        let resident = (cut.resident() as u64).min(tiles.div_ceil(sms));
        tiles.div_ceil(sms * resident) * resident * tile
    }
}
