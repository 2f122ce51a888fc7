//! Row kernels on the GPU: any mixture of elementwise, reduction and movement operators.
//!
//! Without reductions over long rows, every thread computes neighbouring elements of the results, 16 bytes of the widest
//! type where shapes allow. Otherwise a warp (short rows) or a block takes a row: reductions that wait for the same number
//! of earlier ones share a pass over the row, results are the last pass. Rows of known length that fit into registers
//! ([`Pressure`]) are unrolled, so what a pass loads or computes stays there for the next; longer ones are read again.
//! Any other reduction is a loop of the thread that reads it.

use super::at::At;
use super::blocks;
use super::launch::Unit;
use super::pressure::Pressure;
use super::pull::{Pull, combine, start};
use super::repeat::repeated;
use super::{Parts, many, reduce, special};
use crate::emit::elementwise::register_type;
use crate::emit::func::{Func, Val};
use crate::emit::{dim_expr, unsupported};
use crate::error::CodegenError;
use pleach_ir::{BinaryOp, Class, DType, Dim, Kernel, Op, ReduceOp, Sym, ValueId};
use pleach_plan::Expr;
use std::collections::BTreeMap;

/// Threads of a block that computes elements, or one row per warp.
const THREADS: i64 = 256;
/// Shorter reductions are loops.
const SHORT: u64 = 32;
/// Rows up to here are taken by a warp each.
const WARP_ROW: i64 = 1024;
/// Threads that take a row together.
const OF_ROW: [i64; 2] = [128, 1024];
/// Elements of a row that a thread keeps in registers at most.
const KEPT: i64 = 32;
/// What a row of unknown length is taken for.
const TYPICAL: i64 = 4096;

/// Emits a row kernel.
pub(super) fn emit(k: &Kernel, symbols: &[Sym]) -> Result<Parts, CodegenError> {
    if let Some(parts) = blocks::joined(k) {
        return blocks::copies(k, &parts);
    }
    let body = &k.body;
    let live = body.live();
    let fits = |n: &Op| {
        let foreign = matches!(n, Op::Param(_) | Op::MatMul { .. } | Op::Scatter { .. }) || n.is_attention();
        !foreign
    };
    if k.class != Class::Row || body.roots.is_empty() {
        return Err(unsupported(k, "is no row kernel"));
    }
    if let Some((n, _)) = body.nodes.iter().zip(&live).find(|(n, l)| **l && !fits(&n.op)) {
        return Err(unsupported(k, format!("a row kernel cannot hold {}", n.op.name())));
    }
    if let Some(parts) = many::emit(k, symbols)? {
        return Ok(parts);
    }
    let (one, copies) = repeated(k).unwrap_or_else(|| (k.clone(), 1));
    let live = one.body.live();
    let rows = Rows::of(&one, &live);
    if rows.reductions.is_empty() { flat(&one, copies, symbols) } else { rows.emit(&one, copies, symbols) }
}

/// The entry of a kernel, or of many launches of it.
fn unit(k: &Kernel, copies: usize) -> Unit {
    if copies > 1 { Unit::repeated(k, copies, "", None) } else { Unit::new(k, "", false) }
}

/// Results by shape.
fn groups(k: &Kernel, skip: usize) -> Vec<(Vec<Dim>, Vec<usize>)> {
    let mut out: Vec<(Vec<Dim>, Vec<usize>)> = vec![];
    for (i, r) in k.body.roots.iter().enumerate() {
        let shape = &k.body.ty(r.value).shape;
        let shape = shape[skip.min(shape.len())..].to_vec();
        match out.iter_mut().find(|g| g.0 == shape) {
            Some(g) => g.1.push(i),
            None => out.push((shape, vec![i])),
        }
    }
    out
}

/// Neighbouring elements for a thread: 16 bytes of the narrowest float that is read or written, as far as the innermost
/// dimension allows.
fn width(k: &Kernel, last: Option<&Dim>) -> i64 {
    let narrow = k.operand_types().iter().chain(&k.result_types()).any(|t| t.dtype.size() == 2);
    let Some(Dim::Known(n)) = last else { return 1 };
    let all: &[i64] = if narrow { &[8, 4, 2] } else { &[4, 2] };
    all.iter().copied().find(|v| *n as i64 % v == 0 && *n > 0).unwrap_or(1)
}

/// Every element by itself.
fn flat(k: &Kernel, copies: usize, symbols: &[Sym]) -> Result<Parts, CodegenError> {
    let mut unit = unit(k, copies);
    let f = &mut unit.f;
    let mut p = Pull::new(f, k, symbols);
    let (block, lane) = (special(f, "ctaid.x"), special(f, "tid.x"));
    let at = f.mulc(&block, THREADS);
    let thread = f.add(&at, &lane);
    let mut grid = Expr::Const(1);
    for (shape, list) in groups(k, 0) {
        let v = width(k, shape.last());
        let total = p.product(f, &shape);
        let first = f.mulc(&thread, v);
        let inside = f.cmp("slt", &first, &total);
        p.together = v;
        f.if_(&inside, |f| {
            p.scope(|p| {
                let mut stores = vec![];
                for j in 0..v {
                    let at = At::of(f, &first, v).addc(j);
                    let index = p.index(f, &shape, &at);
                    stores.extend(list.iter().map(|i| (*i, index.clone())));
                }
                stores.sort_by_key(|s| s.0);
                p.store(f, &stores);
            });
        });
        let elements =
            shape.iter().try_fold(Expr::Const(1), |e, d| Ok::<_, CodegenError>(e.mul(dim_expr(k, *d, symbols)?)))?;
        grid = grid.max(elements.ceil_div((THREADS * v) as u64));
    }
    p.finish()?;
    // With all registers to itself the assembler starts the loads of every result at once, and runs out of them.
    let (text, launch) = unit.finish([grid, Expr::Const(copies as u64), Expr::Const(1)], THREADS as u32, 0, 2);
    Ok((text, vec![launch], Expr::Const(0)))
}

/// One row at a time.
struct Rows {
    /// Rows; none for a kernel of scalars.
    rows: Option<Dim>,
    /// Reductions that the threads of a row compute together, by the number of earlier ones they wait for.
    reductions: BTreeMap<(usize, Dim), Vec<ValueId>>,
}

impl Rows {
    fn of(k: &Kernel, live: &[bool]) -> Rows {
        let body = &k.body;
        let shapes: Vec<&[Dim]> = body.roots.iter().map(|r| body.ty(r.value).shape.as_slice()).collect();
        let rows = shapes[0].first().copied();
        let mut out = Rows { rows, reductions: BTreeMap::new() };
        if shapes.iter().any(|s| s.first().copied() != rows) {
            return out;
        }
        let mut level = vec![0usize; body.nodes.len()];
        for v in body.values() {
            let n = body.node(v);
            let mut own = n.inputs.iter().map(|i| level[i.index()]).max().unwrap_or(0);
            if let Op::Reduce { axis, .. } = n.op
                && live[v.index()]
            {
                let shape = &body.ty(n.inputs[0]).shape;
                let last = usize::from(axis) + 1 == shape.len();
                let of_row = last && n.ty.shape.as_slice() == rows.as_slice();
                let long = shape[usize::from(axis)].known().is_none_or(|n| n >= SHORT);
                if of_row && long {
                    out.reductions.entry((own, shape[usize::from(axis)])).or_default().push(v);
                    own += 1;
                }
            }
            level[v.index()] = own;
        }
        out
    }

    fn emit(&self, k: &Kernel, copies: usize, symbols: &[Sym]) -> Result<Parts, CodegenError> {
        let sizes = self.reductions.keys().map(|x| x.1).map(|d| d.known().map_or(TYPICAL, |n| n as i64));
        let longest = sizes.max().unwrap_or(TYPICAL);
        let by_warp = longest <= WARP_ROW && self.rows.is_some();
        let pressure = Pressure::of(k, self.reductions.values(), usize::from(self.rows.is_some()));
        let together = width(k, Some(&Dim::Known(longest as u64)));
        let kept = |threads: i64| pressure.elements(threads, together).min(KEPT);
        let threads = match by_warp {
            true => THREADS,
            false => {
                let usual = ((longest / 16) as u64).next_power_of_two() as i64;
                let usual = usual.clamp(OF_ROW[0], OF_ROW[1]);
                // Fewer threads have more registers each: half as many where those are enough to keep a row, or as few as a step needs.
                let whole = |n: &i64| Walk::rounds(longest, *n, together) * together <= kept(*n);
                let fewer = || std::iter::successors(Some(usual), |n| Some(n / 2)).take_while(|n| *n >= OF_ROW[0]);
                let found = fewer().find(whole).or_else(|| fewer().find(|n| pressure.fits(*n, together)));
                found.unwrap_or(OF_ROW[0])
            }
        };
        let mut unit = unit(k, copies);
        let count: usize = self.reductions.values().map(Vec::len).sum();
        let shared = if by_warp { None } else { Some(unit.shared((count as i64 * threads / 32 * 4) as u64)) };
        let f = &mut unit.f;
        let mut p = Pull::new(f, k, symbols);
        let (block, tid) = (special(f, "ctaid.x"), special(f, "tid.x"));
        let (row, lane) = if by_warp {
            let (warp, lane) = (f.divc(&tid, 32), f.remc(&tid, 32));
            let first = f.mulc(&block, THREADS / 32);
            (f.add(&first, &warp), lane)
        } else {
            (block, tid)
        };
        let rows = match self.rows {
            Some(d) => p.dim(f, d),
            None => f.i64(1),
        };
        let inside = f.cmp("slt", &row, &rows);
        let own: Vec<At> = self.rows.iter().map(|_| At::of(f, &row, 1)).collect();
        let mut walk = Walk {
            k,
            own,
            lane,
            lanes: if by_warp { 32 } else { threads },
            kept: kept(threads),
            places: BTreeMap::new(),
        };
        f.if_(&inside, |f| {
            let mut first = 0;
            for ((_, columns), list) in &self.reductions {
                let parts = walk.fold(f, &mut p, *columns, list);
                let totals = f.of(list, |f| match &shared {
                    None => parts.iter().map(|(op, d, x)| reduce::warp(f, *op, *d, x)).collect(),
                    Some(base) => reduce::block(f, &parts, &walk.lane, threads / 32, base, first),
                });
                first += list.len() as i64 * threads / 32;
                for (v, x) in list.iter().zip(totals) {
                    p.set(*v, &walk.own, x, &[]);
                }
            }
            p.begin_writes(&walk.own);
            for (shape, list) in groups(k, 1) {
                walk.write(f, &mut p, &shape, &list);
            }
        });
        p.finish()?;
        let all = match self.rows {
            Some(d) => dim_expr(k, d, symbols)?,
            None => Expr::Const(1),
        };
        let grid = if by_warp { all.ceil_div((THREADS / 32) as u64) } else { all };
        let (text, launch) = unit.finish([grid, Expr::Const(copies as u64), Expr::Const(1)], threads as u32, 0, 1);
        Ok((text, vec![launch], Expr::Const(0)))
    }
}

/// The threads of a row on their way along it.
struct Walk<'a> {
    k: &'a Kernel,
    /// The index of the row.
    own: Vec<At>,
    /// Number of the thread among those of the row.
    lane: Val,
    lanes: i64,
    /// Elements that a thread keeps at most.
    kept: i64,
    /// Where an unrolled step stands: position, whether it is inside (`None`: always).
    places: BTreeMap<(i64, i64, i64), (Val, Option<Val>)>,
}

impl Walk<'_> {
    /// Steps of an unrolled walk along `n` elements, `v` at a time; `None` for what is too long or unknown.
    fn steps(&self, n: Option<i64>, v: i64) -> Option<i64> {
        let steps = Walk::rounds(n?, self.lanes, v);
        (steps * v <= self.kept).then_some(steps)
    }

    /// Steps of so many lanes along `n` elements, `v` at a time.
    fn rounds(n: i64, lanes: i64, v: i64) -> i64 {
        (n as u64).div_ceil((lanes * v) as u64) as i64
    }

    fn place(&mut self, f: &mut Func, n: i64, v: i64, step: i64) -> (Val, Option<Val>) {
        if let Some(x) = self.places.get(&(n, v, step)) {
            return x.clone();
        }
        let at = f.mulc(&self.lane, v);
        let at = f.addc(&at, step * self.lanes * v);
        let x = if (step + 1) * self.lanes * v <= n {
            (at, None)
        } else {
            // The last neighbours are read again by threads past the end.
            let end = f.i64(n);
            let inside = f.cmp("slt", &at, &end);
            let last = f.i64(n - v);
            (f.min(&at, &last), Some(inside))
        };
        self.places.insert((n, v, step), x.clone());
        x
    }

    /// Each thread's part of some reductions over the same columns.
    fn fold(&mut self, f: &mut Func, p: &mut Pull<'_>, columns: Dim, list: &[ValueId]) -> Vec<(ReduceOp, DType, Val)> {
        let v = width(self.k, Some(&columns));
        p.together = v;
        let mut accs: Vec<(ReduceOp, DType, Val)> = vec![];
        for r in list {
            let n = self.k.body.node(*r);
            if let Op::Reduce { op, .. } = n.op {
                let x = start(f, op, n.ty.dtype);
                accs.push((op, n.ty.dtype, x));
            }
        }
        let known = columns.known().map(|n| n as i64);
        if let (Some(steps), Some(n)) = (self.steps(known, v), known) {
            for s in 0..steps {
                let (at, inside) = self.place(f, n, v, s);
                for j in 0..v {
                    let at = At::of(f, &at, v).addc(j);
                    self.add(f, p, list, &mut accs, &at, inside.as_ref());
                }
            }
            return accs;
        }
        let (from, end) = (f.mulc(&self.lane, v), p.dim(f, columns));
        let inits: Vec<(Val, String)> = accs.iter().map(|(_, d, x)| (x.clone(), register_type(*d, 1))).collect();
        let out = f.for_(&from, &end, self.lanes * v, &inits, |f, at, now| {
            p.scope(|p| {
                let mut accs: Vec<_> = accs.iter().zip(now).map(|((op, d, _), x)| (*op, *d, x.clone())).collect();
                for j in 0..v {
                    let at = At::of(f, at, v).addc(j);
                    self.add(f, p, list, &mut accs, &at, None);
                }
                accs.into_iter().map(|x| x.2).collect()
            })
        });
        accs.into_iter().zip(out).map(|((op, d, _), x)| (op, d, x)).collect()
    }

    /// Takes one column into the sums. A product that is summed is fused.
    fn add(
        &self,
        f: &mut Func,
        p: &mut Pull<'_>,
        list: &[ValueId],
        accs: &mut [(ReduceOp, DType, Val)],
        at: &At,
        inside: Option<&Val>,
    ) {
        let body = &self.k.body;
        let mut index = self.own.clone();
        index.push(at.clone());
        for (r, (op, d, acc)) in list.iter().zip(accs) {
            let x = body.node(*r).inputs[0];
            let n = body.node(x);
            if *op == ReduceOp::Sum && n.op == Op::Binary(BinaryOp::Mul) && *d == DType::F32 {
                let part = |p: &mut Pull<'_>, f: &mut Func, v: ValueId| {
                    let scalar = body.ty(v).rank() == 0;
                    p.eval(f, v, if scalar { &[] } else { &index })
                };
                let (mut a, b) = (part(p, f, n.inputs[0]), part(p, f, n.inputs[1]));
                a = f.of(&[*r, x], |f| {
                    let next = f.op(format!("math.fma {a}, {b}, {acc} : f32"));
                    match inside {
                        Some(c) => f.op(format!("arith.select {c}, {next}, {acc} : f32")),
                        None => next,
                    }
                });
                *acc = a;
                continue;
            }
            let y = p.eval(f, x, &index);
            *acc = f.of(&[*r], |f| {
                let next = combine(f, *op, *d, acc, &y);
                match inside {
                    Some(c) => f.op(format!("arith.select {c}, {next}, {acc} : {}", register_type(*d, 1))),
                    None => next,
                }
            });
        }
    }

    /// Writes the results whose rows have this shape.
    fn write(&mut self, f: &mut Func, p: &mut Pull<'_>, shape: &[Dim], list: &[usize]) {
        if shape.is_empty() {
            let zero = f.i64(0);
            let leads = f.cmp("eq", &self.lane, &zero);
            let stores: Vec<_> = list.iter().map(|i| (*i, self.own.clone())).collect();
            f.if_(&leads, |f| p.scope(|p| p.store(f, &stores)));
            return;
        }
        let v = width(self.k, shape.last());
        p.together = v;
        let own = self.own.clone();
        let stores = |f: &mut Func, p: &mut Pull<'_>, at: &Val| {
            let mut out = vec![];
            for j in 0..v {
                let at = At::of(f, at, v).addc(j);
                let mut index = own.clone();
                index.extend(p.index(f, shape, &at));
                out.extend(list.iter().map(|i| (*i, index.clone())));
            }
            out.sort_by_key(|s: &(usize, Vec<At>)| s.0);
            p.store(f, &out);
        };
        let known = shape.iter().try_fold(1u64, |n, d| n.checked_mul(d.known()?)).map(|n| n as i64);
        if let (Some(steps), Some(n)) = (self.steps(known, v), known) {
            for s in 0..steps {
                if s > 0 {
                    // Every thread reads what it writes over only where it writes.
                    p.apart();
                }
                let (at, inside) = self.place(f, n, v, s);
                match inside {
                    Some(c) => f.if_(&c, |f| p.scope(|p| stores(f, p, &at))),
                    None => stores(f, p, &at),
                }
            }
            return;
        }
        let (from, end) = (f.mulc(&self.lane, v), p.product(f, shape));
        f.loop_(&from, &end, self.lanes * v, |f, at| p.scope(|p| stores(f, p, at)));
    }
}
