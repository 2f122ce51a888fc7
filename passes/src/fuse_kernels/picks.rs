//! Which products read rows or columns of their operands where indices say, in place of a copy that a kernel of its own makes.
//!
//! A copy takes a launch, is written once and read by every tile of the product in whole pieces. A product that picks by itself saves that, but
//! its threads fetch what a copy engine would bring, and where columns are picked every element comes with its neighbours, once for
//! every tile of the other operand. What is dearer is estimated; large products mostly take the copy.
//!
//! What is picked of has to be there until the product anyway: it is an operand of the entry, something later reads it, or the product meets
//! another of its readers in a sum. A copy that is kept for later in its place is there to save memory.

use super::pack::live_users;
use crate::options::Options;
use pleach_ir::{Class, Dim, Entry, Kernel, Layout, Op, Param, TensorType, ValueId};
use std::collections::BTreeSet;

/// Bytes that memory moves at once: what an element takes whose neighbours are not wanted.
const SECTOR: f64 = 32.0;
/// How many times what memory gives the second-level cache does.
const CACHE: f64 = 2.0;
/// What fetching by threads adds to the time of the bytes they fetch.
const BY_HAND: f64 = 0.25;

/// Gathers of an entry whose readers are products that pick by themselves; `accepts` says whether a target has such a product.
pub(super) fn by_products(
    e: &Entry,
    params: &[(Param, Layout)],
    options: &Options,
    accepts: &mut dyn FnMut(&Kernel) -> bool,
) -> BTreeSet<ValueId> {
    let (live, users) = live_users(e);
    let mut out = BTreeSet::new();
    for v in e.values().filter(|v| live[v.index()]) {
        let n = e.node(v);
        let Op::Gather { axis } = n.op else { continue };
        let (table, readers) = (n.inputs[0], &users[v.index()]);
        let product = |p: &ValueId| {
            let once = e.node(*p).inputs.iter().filter(|x| **x == v).count() == 1;
            once && matches!(e.node(*p).op, Op::MatMul { .. }) && e.ty(*p).rank() == 2
        };
        let given = |v: ValueId| matches!(e.node(v).op, Op::Input { .. } | Op::Param(_));
        let shown = matches!(e.node(table).op, Op::Const { .. } | Op::Iota { .. } | Op::After)
            || e.node(table).op.is_movement() && !matches!(e.node(table).op, Op::Gather { .. });
        let stays = |p: &ValueId| {
            let meets = |u: &ValueId| sum_of(e, &users, *u).is_some_and(|s| Some(s) == sum_of(e, &users, *p));
            given(table) || users[table.index()].iter().any(|u| *u != v && (u > p || meets(u)))
        };
        let fits = n.ty.rank() == 2
            && given(n.inputs[1])
            && e.ty(n.inputs[1]).rank() == 1
            && !shown
            && !readers.is_empty()
            && readers.iter().all(|p| product(p) && stays(p))
            && e.roots.iter().all(|r| r.value != v);
        if fits
            && pays(e, v, usize::from(axis), readers, options)
            && readers.iter().all(|p| alone(e, params, *p, v).is_some_and(|k| accepts(&k)))
        {
            out.insert(v);
        }
    }
    out
}

/// The only reader of a product, if that is a sum.
fn sum_of(e: &Entry, users: &[Vec<ValueId>], v: ValueId) -> Option<ValueId> {
    match users[v.index()][..] {
        [u] if e.node(u).op == Op::Add && matches!(e.node(v).op, Op::MatMul { .. }) => Some(u),
        _ => None,
    }
}

/// Whether products take less time when they pick by themselves.
fn pays(e: &Entry, v: ValueId, axis: usize, readers: &[ValueId], options: &Options) -> bool {
    let count = |d: Dim| d.known().unwrap_or_else(|| options.tokens(&e.name)) as f64;
    let (ty, target) = (e.ty(v), &options.target);
    let elements: f64 = ty.shape.iter().map(|d| count(*d)).product();
    let copy = elements * ty.dtype.size() as f64;
    let table: f64 = e.ty(e.node(v).inputs[0]).shape.iter().map(|d| count(*d)).product();
    let apart = axis + 1 == ty.rank();
    let picked = if apart { (elements * SECTOR).min(table * ty.dtype.size() as f64) } else { copy };
    // Every tile of the other side reads the operand.
    let tiles = |p: &ValueId| {
        let left = e.node(*p).inputs[0] == v;
        let other = e.ty(*p).shape[usize::from(left)];
        (count(other) / target.tile).ceil().max(1.0)
    };
    let read: f64 = readers.iter().map(tiles).sum();
    let us = 1e6 / target.bytes_per_s;
    let more = read * (picked * (1.0 + BY_HAND) - copy) * us / CACHE;
    more < target.launch_us + copy * us
}

/// A product with an operand that is picked, as a kernel.
fn alone(e: &Entry, params: &[(Param, Layout)], p: ValueId, v: ValueId) -> Option<Kernel> {
    let (mut body, mut operands) = (Entry::new("kernel"), vec![]);
    let mut input = |body: &mut Entry, x: ValueId| {
        let TensorType { dtype, shape } = e.ty(x).clone();
        let layout = match e.node(x).op {
            Op::Param(q) => params[q.index()].1,
            _ => Layout::RowMajor,
        };
        operands.push(layout);
        body.push(&[], Op::Input { name: format!("a{}", operands.len() - 1), dtype, shape }, &[]).ok()
    };
    let mut inputs = vec![];
    for x in &e.node(p).inputs {
        inputs.push(if *x == v {
            let of = [input(&mut body, e.node(v).inputs[0])?, input(&mut body, e.node(v).inputs[1])?];
            body.push(&[], e.node(v).op.clone(), &of).ok()?
        } else {
            input(&mut body, *x)?
        });
    }
    let x = body.push(&[], e.node(p).op.clone(), &inputs).ok()?;
    body.output("r0", x);
    let (results, aliases) = (vec![Layout::RowMajor], vec![None]);
    Some(Kernel { name: String::new(), class: Class::Contraction, body, operands, results, aliases })
}
