//! Contraction kernels of the host: products, sums of products, and what is elementwise after them.
//!
//! One function: tasks over batches, row blocks and column blocks (few rows: column blocks alone); inside, blocks of the
//! right operand that stay in the second-level cache, row tiles, column tiles, and the register tile of `tile`.
//! Each element of a result is summed in an order that depends on the shapes alone, so any split of the tasks gives
//! the same bits. f32 and bf16 operands, f32 sums; row-major results; any sizes, 0 and 1 included.
//!
//! * Right operands: panels, panels of codes (`coded`), blocks of codes (`blocks`), f32 row-major in place, or packed into scratch memory by the task that needs them (any
//!   strides, and bf16 that is not in panels). Left operands are read in place; bf16 whose pairs do not lie side by side
//!   is packed.
//! * Sums of products, each with a scale or none, run in one set of accumulators, the longest last.
//! * A cheap remainder (bias, residual) runs on the registers of the tile; others, several groups of columns, or long
//!   sums that run in parts go through scratch memory that stays in the first-level cache.

pub(crate) mod analyze;
mod blocking;
mod blocks;
mod cells;
mod coded;
mod context;
mod pack;
mod tile;
pub(crate) mod view;

use crate::emit::elementwise::apply;
use crate::emit::func::{Func, Val, vty};
use crate::emit::{Emitted, HostIsa, bytes_expr, dim_expr, unsupported};
use crate::error::CodegenError;
use crate::mlir::HostTarget;
use analyze::Analysis;
use blocking::{Blocking, DEPTH_STEP, FEW, LANES};
pub use blocking::{choose_panel, panel_widths};
use cells::Cells;
use context::{Context, Place};
use pleach_ir::{Dim, Kernel, Layout, Op, Sym, ValueId};
use pleach_plan::Expr;

/// A kernel taken apart, and how its loops are cut.
struct Form {
    an: Analysis,
    bl: Blocking,
}

/// What the tasks of a form divide.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Cut {
    /// Columns alone: few rows.
    Columns,
    /// Rows and columns.
    Both,
    /// The one or the other, as the number of rows says.
    ByRows,
}

fn cut(an: &Analysis, bl: &Blocking) -> Cut {
    match an.m {
        _ if an.few_rows => Cut::Columns,
        Dim::Known(x) if x <= bl.task_rows => Cut::Columns,
        Dim::Known(_) => Cut::Both,
        Dim::Symbol(_) => Cut::ByRows,
    }
}

/// How many of what there is.
struct Counts {
    /// Tiles of columns, and blocks of rows.
    tiles: Val,
    row_blocks: Val,
    /// Tasks that columns alone make, and that rows and columns make.
    narrow: Val,
    wide: Val,
}

impl Counts {
    fn new(f: &mut Func, cx: &Context) -> Counts {
        let bl = cx.bl;
        let (m, n) = (cx.dim(f, cx.an.m), cx.dim(f, cx.an.n));
        let tiles = f.ceil_divc(&n, bl.width as i64);
        let one = f.i64(1);
        let row_blocks = f.ceil_divc(&m, bl.task_rows as i64);
        let row_blocks = f.max(&row_blocks, &one);
        let narrow = f.ceil_divc(&tiles, bl.narrow_tiles as i64);
        let wide = f.ceil_divc(&tiles, bl.task_tiles as i64);
        let wide = f.mul(&wide, &row_blocks);
        Counts { tiles, row_blocks, narrow, wide }
    }
}

/// The forms of a kernel: one, or one for few rows and one for more.
fn forms(k: &Kernel, isa: HostIsa, dot: bool) -> Result<Vec<Form>, String> {
    let an = Analysis::new(k)?;
    let mut forms = vec![];
    if let Some(an) = an.few() {
        let bl = Blocking::new(&an, isa, dot)?.for_few();
        forms.push(Form { an, bl });
    }
    let bl = Blocking::new(&an, isa, dot)?;
    forms.push(Form { an, bl });
    Ok(forms)
}

/// Whether a region can be one contraction kernel.
///
/// # Errors
/// The reason why not.
pub fn supported(k: &Kernel) -> Result<(), String> {
    let mut symbols: Vec<Sym> = k.body.nodes.iter().flat_map(|n| n.ty.symbols()).collect();
    symbols.sort_unstable();
    symbols.dedup();
    let mut forms = forms(k, HostIsa::Avx512, true)?;
    // One row stands for all tile sizes.
    forms.iter_mut().for_each(|x| x.bl.rows = vec![1]);
    let mut f = Func::host_kernel(&k.name);
    kernel(&mut f, k, &forms, &symbols)
}

/// Emits a contraction kernel.
///
/// # Errors
/// [`CodegenError::Unsupported`] with what has no code and where to cut instead.
pub fn emit(k: &Kernel, symbols: &[Sym], target: &HostTarget) -> Result<Emitted, CodegenError> {
    let forms = forms(k, target.isa, target.bf16).map_err(|why| unsupported(k, why))?;
    let mut f = Func::host_kernel(&k.name);
    f.round_bf16 = target.bf16;
    kernel(&mut f, k, &forms, symbols).map_err(|why| unsupported(k, why))?;
    let text = f.text();

    let dim = |d: Dim| dim_expr(k, d, symbols);
    let (mut tasks, mut scratch_bytes) = (Expr::Const(0), Expr::Const(0));
    for Form { an, bl } in &forms {
        let (m, n) = (dim(an.m)?, dim(an.n)?);
        let narrow = n.clone().ceil_div(bl.width).ceil_div(bl.narrow_tiles);
        let wide = n.clone().ceil_div(bl.width).ceil_div(bl.task_tiles).mul(m.clone().ceil_div(bl.task_rows));
        tasks = tasks.max(match cut(an, bl) {
            Cut::Columns => narrow,
            Cut::Both => wide,
            Cut::ByRows => narrow.max(wide),
        });
        let mut scratch = Expr::Const(4 * (partial_elements(an, bl) + spare_elements(an, bl)));
        for p in &bl.packs {
            scratch = scratch.add(dim(p.depth)?.add(p.slack).ceil_div(DEPTH_STEP).mul(DEPTH_STEP).mul(p.width_bytes));
        }
        scratch_bytes = scratch_bytes.max(scratch);
    }
    let an = &forms[0].an;
    let batches = an.batch.iter().try_fold(Expr::Const(1), |e, d| Ok::<_, CodegenError>(e.mul(dim(*d)?)))?;
    let (m, n) = (dim(an.m)?, dim(an.n)?);
    let mut flops = Expr::Const(0);
    for (p, _) in an.groups.iter().flat_map(|g| &g.products) {
        flops = flops.add(batches.clone().mul(m.clone()).mul(n.clone()).mul(dim(an.products[*p].k)?).mul(2));
    }
    let mut bytes = Expr::Const(0);
    for (t, l) in k.operand_types().iter().zip(&k.operands).chain(k.result_types().iter().zip(&k.results)) {
        bytes = bytes.add(match l {
            Layout::CodedPanels { .. } | Layout::Blocks(_) => Expr::Const(l.bytes(t, &|_| None).unwrap_or(0)),
            _ => bytes_expr(k, t, symbols)?,
        });
    }
    Ok(Emitted { text, tasks: batches.mul(tasks), scratch_bytes, flops, bytes })
}

/// f32 elements of scratch that hold accumulators.
fn partial_elements(an: &Analysis, bl: &Blocking) -> u64 {
    let groups = an.groups.len() as u64;
    match (bl.direct, bl.part) {
        (true, _) => 0,
        (false, None) => groups * bl.rows[0] * bl.width,
        (false, Some(_)) => groups * bl.task_rows * bl.task_tiles * bl.width,
    }
}

/// f32 elements of scratch that hold the sum of a tile while a scaled product is made.
fn spare_elements(an: &Analysis, bl: &Blocking) -> u64 {
    let scaled = an.groups.iter().any(|g| g.products.len() > 1 && g.products.iter().any(|p| p.1.is_some()));
    if scaled { bl.rows[0] * bl.width } else { 0 }
}

/// A rank-0 value that depends on no product, in every lane.
fn scalar(f: &mut Func, cx: &Context, v: ValueId) -> Result<Val, String> {
    let body = &cx.kernel.body;
    let node = body.node(v);
    if let Some(x) = cx.scalars.get(&v) {
        return Ok(x.clone());
    }
    if let Op::Const { dtype, bits, .. } = &node.op {
        return Ok(crate::emit::elementwise::constant(f, *dtype, bits.first().copied().unwrap_or(0), LANES));
    }
    if !node.op.is_elementwise() {
        return Err(format!("{} has no place beside a product; put it into a kernel of its own", node.op.name()));
    }
    let mut args = vec![];
    for x in &node.inputs {
        args.push((scalar(f, cx, *x)?, body.ty(*x).dtype));
    }
    apply(f, &node.op, &args, node.ty.dtype, LANES)
}

/// Rows and tiles of a task.
struct Span {
    rows: (Val, Val),
    tiles: (Val, Val),
    /// Tiles worked on at a time.
    chunk: Val,
}

/// The function: where there are two forms, the number of rows decides between them.
fn kernel(f: &mut Func, k: &Kernel, forms: &[Form], symbols: &[Sym]) -> Result<(), String> {
    let mut all = vec![];
    for form in forms {
        all.push(Context::new(f, k, &form.an, &form.bl, symbols)?);
    }
    // What the launch counts as a batch's tasks: enough for every form and number of rows.
    let mut total = f.i64(0);
    let mut counts = vec![];
    for cx in &all {
        let c = Counts::new(f, cx);
        let here = match cut(cx.an, cx.bl) {
            Cut::Columns => c.narrow.clone(),
            Cut::Both => c.wide.clone(),
            Cut::ByRows => f.max(&c.narrow, &c.wide),
        };
        total = f.max(&total, &here);
        counts.push(c);
    }
    let [few, _] = &all[..] else { return tasks(f, &all[0], &counts[0], &total) };
    let m = few.dim(f, few.an.m);
    let limit = f.i64(FEW as i64);
    let short = f.cmp("sle", &m, &limit);
    let (mut a, mut b) = (Ok(()), Ok(()));
    let arm = |f: &mut Func, i: usize, out: &mut Result<(), String>| {
        *out = tasks(f, &all[i], &counts[i], &total);
        vec![]
    };
    f.if_else(&short, &[], |f| arm(f, 0, &mut a), |f| arm(f, 1, &mut b));
    a.and(b)
}

/// The part of one form's tasks that `first..last` of the launch's stand for, of `total` a batch. A form may have fewer: they
/// are spread evenly, so that equal stretches of the launch are equal work.
fn tasks(f: &mut Func, cx: &Context, counts: &Counts, total: &Val) -> Result<(), String> {
    let (m, n) = (cx.dim(f, cx.an.m), cx.dim(f, cx.an.n));
    let per_batch = match cut(cx.an, cx.bl) {
        Cut::Columns => counts.narrow.clone(),
        Cut::Both => counts.wide.clone(),
        Cut::ByRows => {
            let limit = f.i64(cx.bl.task_rows as i64);
            let few = f.cmp("sle", &m, &limit);
            f.op(format!("arith.select {few}, {}, {} : i64", counts.narrow, counts.wide))
        }
    };
    let (mut first, mut last) = (f.arg("first"), f.arg("last"));
    if per_batch != *total {
        for x in [&mut first, &mut last] {
            let y = f.mul(x, &per_batch);
            *x = f.div(&y, total);
        }
    }
    let mut fault = Ok(());
    f.loop_(&first, &last, 1, |f, task| {
        let (mut rest, mut inner) = (f.i64(0), task.clone());
        if !cx.an.batch.is_empty() {
            rest = f.div(task, &per_batch);
            inner = f.rem(task, &per_batch);
        }
        let mut batch = vec![rest.clone(); cx.an.batch.len()];
        for (i, d) in cx.an.batch.iter().enumerate().rev() {
            let d = cx.dim(f, *d);
            batch[i] = if i == 0 { rest.clone() } else { f.rem(&rest, &d) };
            rest = f.div(&rest, &d);
        }
        let span = span(f, cx, counts, &m, &inner);
        fault = block(f, cx, &batch, &span, &n);
    });
    fault
}

fn span(f: &mut Func, cx: &Context, counts: &Counts, m: &Val, task: &Val) -> Span {
    let Counts { tiles, row_blocks, .. } = counts;
    let bl = cx.bl;
    let zero = f.i64(0);
    let narrow = |f: &mut Func| {
        let t = f.mulc(task, bl.narrow_tiles as i64);
        (zero.clone(), m.clone(), t, f.i64(bl.narrow_tiles as i64), f.i64(bl.narrow_chunk as i64))
    };
    let wide = |f: &mut Func| {
        // Row blocks count fastest: tasks that follow each other read the same columns.
        let (c, r) = (f.div(task, row_blocks), f.rem(task, row_blocks));
        let low = f.mulc(&r, bl.task_rows as i64);
        let high = f.addc(&low, bl.task_rows as i64);
        let high = f.min(&high, m);
        let t = f.mulc(&c, bl.task_tiles as i64);
        let n = f.i64(bl.task_tiles as i64);
        (low, high, t, n.clone(), n)
    };
    let (low, high, from, count, chunk) = match cut(cx.an, cx.bl) {
        Cut::Columns => narrow(f),
        Cut::Both => wide(f),
        Cut::ByRows => {
            let limit = f.i64(bl.task_rows as i64);
            let few = f.cmp("sle", m, &limit);
            let (a, b) = (narrow(f), wide(f));
            let mut pick = |x: &Val, y: &Val| f.op(format!("arith.select {few}, {x}, {y} : i64"));
            (pick(&a.0, &b.0), pick(&a.1, &b.1), pick(&a.2, &b.2), pick(&a.3, &b.3), pick(&a.4, &b.4))
        }
    };
    let to = f.add(&from, &count);
    let to = f.min(&to, tiles);
    Span { rows: (low, high), tiles: (from, to), chunk }
}

/// All tiles of a task.
fn block(f: &mut Func, cx: &Context, batch: &[Val], span: &Span, n: &Val) -> Result<(), String> {
    let mut fault = Ok(());
    let (zero, one) = (f.i64(0), f.i64(1));
    let count = f.sub(&span.tiles.1, &span.tiles.0);
    let less = f.sub(&span.chunk, &one);
    let up = f.add(&count, &less);
    // A task past the last tile has a count below 1.
    let up = f.max(&up, &zero);
    let chunks = f.div(&up, &span.chunk);
    f.loop_(&zero, &chunks, 1, |f, c| {
        let from = f.mul(c, &span.chunk);
        let from = f.add(&span.tiles.0, &from);
        let to = f.add(&from, &span.chunk);
        let to = f.min(&to, &span.tiles.1);
        let tiles = (&from, &to);
        let pack = |f: &mut Func, group: usize, product: usize, steps: Option<(&Val, &Val)>| {
            let k = cx.dim(f, cx.an.products[product].k);
            let zero = f.i64(0);
            let (k0, k1) = steps.map_or((zero, k.clone()), |(k0, k1)| (f.min(k0, &k), f.min(k1, &k)));
            pack::pack(f, cx, batch, span, tiles, (group, product), (&k0, &k1));
        };
        // Whole sums, all that comes before the parts included.
        for (g, group) in cx.an.groups.iter().enumerate() {
            let n = group.products.len() - usize::from(cx.bl.part.is_some());
            group.products[..n].iter().for_each(|(p, _)| pack(f, g, *p, None));
        }
        fault = match cx.bl.part {
            None => rows(f, cx, batch, span, tiles, n, None),
            Some(part) => {
                let mut longest = f.i64(0);
                for g in &cx.an.groups {
                    let k = g.products.last().map_or(Dim::Known(0), |p| cx.an.products[p.0].k);
                    let k = cx.dim(f, k);
                    longest = f.max(&longest, &k);
                }
                let parts = f.ceil_divc(&longest, part as i64);
                let parts = f.max(&parts, &one);
                let final_ = f.sub(&parts, &one);
                let mut inner = Ok(());
                f.loop_(&zero, &parts, 1, |f, i| {
                    let k0 = f.mulc(i, part as i64);
                    let k1 = f.addc(&k0, part as i64);
                    let head = f.cmp("eq", i, &zero);
                    let tail = f.cmp("eq", i, &final_);
                    for (g, group) in cx.an.groups.iter().enumerate() {
                        group.products.last().iter().for_each(|(p, _)| pack(f, g, *p, Some((&k0, &k1))));
                    }
                    inner = rows(f, cx, batch, span, tiles, n, Some(&Part { k0, k1, head, tail }));
                });
                inner
            }
        };
    });
    fault
}

/// A part of a long sum.
struct Part {
    k0: Val,
    k1: Val,
    /// It is the first.
    head: Val,
    /// It is the last.
    tail: Val,
}

/// Row tiles of falling sizes over the rows of a task; under each, the tiles of a chunk side by side.
fn rows(
    f: &mut Func,
    cx: &Context,
    batch: &[Val],
    span: &Span,
    (from, to): (&Val, &Val),
    n: &Val,
    part: Option<&Part>,
) -> Result<(), String> {
    let mut fault = Ok(());
    let mut left = cx.an.m.known();
    let mut low = span.rows.0.clone();
    for &size in &cx.bl.rows {
        // The rows of a task are a multiple of the largest tile, but for the last task.
        if left.is_some_and(|x| x < size) {
            continue;
        }
        left = left.map(|x| x % size);
        let stop = f.addc(&span.rows.1, 1 - size as i64);
        f.loop_(&low, &stop, size as i64, |f, row| {
            if size == cx.bl.rows[0] {
                tile::prefetch_rows(f, cx, batch, row, size);
            }
            f.loop_(from, to, 1, |f, t| {
                let column = f.mulc(t, cx.bl.width as i64);
                let slot = f.sub(t, from);
                let row0 = span.rows.0.clone();
                let at = Place { batch: batch.to_vec(), row: row.clone(), row0, column, slot };
                if let Err(e) = one_tile(f, cx, &at, size, n, part) {
                    fault = Err(e);
                }
            });
        });
        if size > 1 && left != Some(0) {
            let zero = f.i64(0);
            let height = f.sub(&span.rows.1, &low);
            let height = f.max(&height, &zero);
            let turns = f.divc(&height, size as i64);
            let done = f.mulc(&turns, size as i64);
            low = f.add(&low, &done);
        }
    }
    fault
}

fn one_tile(f: &mut Func, cx: &Context, at: &Place, rows: u64, n: &Val, part: Option<&Part>) -> Result<(), String> {
    let bl = cx.bl;
    let whole = n.known().is_some_and(|n| (n as u64).is_multiple_of(bl.width));
    let masks: Vec<Option<Val>> = if whole {
        vec![None; bl.vectors]
    } else {
        let left = f.sub(n, &at.column);
        (0..bl.vectors)
            .map(|j| {
                let left = f.addc(&left, -((j * LANES) as i64));
                Some(f.lane_mask(&left, LANES))
            })
            .collect()
    };
    if bl.direct {
        if rows > 4 {
            Cells::prefetch(f, cx, at, rows)?;
        }
        let sum = tile::chain(f, cx, 0, at, &masks, rows, None, &cx.an.groups[0].products)?;
        return Cells::new(cx, at, &masks, &[sum]).finish(f, rows);
    }
    // Accumulators in scratch: [group][row][tile][width], one tile only when the sum is whole.
    let (side, down) = if part.is_some() { (bl.task_tiles, bl.task_rows) } else { (1, bl.rows[0]) };
    let pitch = (side * bl.width) as i64;
    let home = match part {
        None => cx.scratch.clone(),
        Some(_) => {
            let r = f.sub(&at.row, &at.row0);
            let r = f.mulc(&r, pitch);
            let c = f.mulc(&at.slot, bl.width as i64);
            let s = f.add(&r, &c);
            f.gep(&cx.scratch, &s, "f32")
        }
    };
    let area = |g: usize| g as i64 * down as i64 * pitch;
    let spot = |g: usize, i: u64, j: usize| area(g) + i as i64 * pitch + (j * LANES) as i64;
    for g in 0..cx.an.groups.len() {
        let products = &cx.an.groups[g].products;
        let sum = match part {
            None => tile::chain(f, cx, g, at, &masks, rows, None, products)?,
            Some(p) => partial(f, cx, g, at, &masks, rows, p, &home, &spot)?,
        };
        for i in 0..rows {
            for j in 0..bl.vectors {
                let d = f.i64(spot(g, i, j));
                f.store_at(&sum[i as usize * bl.vectors + j], &home, &d, "f32", LANES);
            }
        }
    }
    let mut fault = Ok(());
    let mut finish = |f: &mut Func| {
        let (zero, end) = (f.i64(0), f.i64(rows as i64));
        f.loop_(&zero, &end, 1, |f, i| {
            let down = f.mulc(i, pitch);
            let line = f.gep(&home, &down, "f32");
            let sums: Vec<Vec<Val>> = (0..cx.an.groups.len())
                .map(|g| {
                    (0..bl.vectors)
                        .map(|j| {
                            let d = f.i64(spot(g, 0, j));
                            f.load_at(&line, &d, "f32", LANES)
                        })
                        .collect()
                })
                .collect();
            let here = Place { row: f.add(&at.row, i), ..at.clone() };
            fault = Cells::new(cx, &here, &masks, &sums).finish(f, 1);
        });
    };
    match part {
        Some(p) => f.if_(&p.tail, finish),
        None => finish(f),
    }
    fault
}

/// One part of a long sum: earlier parts come from scratch, the first part starts with the thin products.
#[allow(clippy::too_many_arguments, reason = "the tile's frame")]
fn partial(
    f: &mut Func,
    cx: &Context,
    g: usize,
    at: &Place,
    masks: &[Option<Val>],
    rows: u64,
    p: &Part,
    home: &Val,
    spot: &dyn Fn(usize, u64, usize) -> i64,
) -> Result<Vec<Val>, String> {
    let Some(((long, scale), thin)) = cx.an.groups[g].products.split_last() else {
        return Ok(tile::zeros(f, cx, rows));
    };
    let types = vec![vty(LANES, "f32"); rows as usize * cx.bl.vectors];
    let mut fault = Ok(());
    let keep = |f: &mut Func, r: Result<Vec<Val>, String>, fault: &mut Result<(), String>| match r {
        Ok(v) => v,
        Err(e) => {
            *fault = Err(e);
            tile::zeros(f, cx, rows)
        }
    };
    let start = f.if_else(
        &p.head,
        &types,
        |f| match scale {
            // The others are added when the long sum is whole and scaled.
            Some(_) => tile::zeros(f, cx, rows),
            None => {
                let r = tile::chain(f, cx, g, at, masks, rows, None, thin);
                keep(f, r, &mut fault)
            }
        },
        |f| {
            let mut v = vec![];
            for i in 0..rows {
                for j in 0..cx.bl.vectors {
                    let d = f.i64(spot(g, i, j));
                    v.push(f.load_at(home, &d, "f32", LANES));
                }
            }
            v
        },
    );
    fault?;
    let k = cx.dim(f, cx.an.products[*long].k);
    // Another group may have more parts.
    let (k0, k1) = (f.min(&p.k0, &k), f.min(&p.k1, &k));
    let sum = tile::multiply(f, cx, g, *long, at, masks, rows, start, (&k0, &k1));
    let Some(scale) = scale else { return Ok(sum) };
    let mut fault = Ok(());
    let whole = f.if_else(
        &p.tail,
        &types,
        |f| {
            let r = tile::scaled(f, cx, *scale, sum.clone());
            let r = r.and_then(|v| tile::chain(f, cx, g, at, masks, rows, Some(v), thin));
            keep(f, r, &mut fault)
        },
        |_| sum.clone(),
    );
    fault.map(|()| whole)
}
