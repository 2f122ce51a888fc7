//! Weights of which parts are trained, as blocks of codes with those parts laid over them.
//!
//! Where a `prepare` entry fills a derived parameter with a tensor of the checkpoint in which some rows or columns are set, and an entry
//! that trains sets the same ones again, the parameter would hold all the numbers for the sake of a few. Where the checkpoint has the
//! tensor in blocks of codes, the codes stay as they are, a derived parameter holds the few, and products read the one laid
//! over the other: `matmul(x, scatter_set(w, i, values))`. Where nothing can be laid over codes, a second product adds what the parts differ by.
//!
//! Assumes that values over parameters were moved into `prepare` entries. Leaves alone: parameters that are read by anything but
//! products, and parts that are set at other places than before.

use super::pack::{Blocks, Supported, format_of, is_prepare, read_as_blocks};
use super::sums::rebuilt;
use pleach_ir::{
    BinaryOp, Class, DType, Dim, Entry, Graph, IrError, Kernel, Layout, Op, Param, ParamId, Role, RootKind,
    ScatterMode, Source, Sym, TensorType, ValueId,
};
use std::collections::BTreeMap;

/// A parameter that is a tensor of the checkpoint with parts set.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Whole {
    /// The tensor, and the indices of what is set along an axis of it.
    base: ParamId,
    index: ParamId,
    axis: u8,
    /// Holds what is set.
    part: ParamId,
}

/// The graph with such parameters replaced, where the target has products over them; `None` where there are none.
///
/// # Errors
/// [`IrError`] when a node cannot be rebuilt; that would be a fault of the input graph.
pub(super) fn lay(g: &Graph, blocks: &Blocks, supported: &Supported<'_>) -> Result<Option<Graph>, IrError> {
    let mut found = candidates(g, blocks);
    found.retain(|_, w| product(g, blocks, w).is_some_and(|k| supported(&k).is_ok()));
    while !found.is_empty() {
        let mut out = g.clone();
        for (p, w) in &mut found {
            w.part = part(&mut out, g, *p, w, "set");
        }
        for (i, e) in g.entries.iter().enumerate() {
            out.entries[i] = if is_prepare(e) { prepared(&out, e, &found)? } else { read(&out, e, &found)? };
        }
        let formats = read_as_blocks(&out, blocks, |_| true, &|_, _| false);
        let before = found.len();
        found.retain(|_, w| formats[w.base.index()].is_some());
        if found.len() == before {
            return Ok(Some(out));
        }
    }
    Ok(None)
}

/// The graph with such parameters taken apart where nothing sets them again: for weights as codes over which nothing can be laid; `None`
/// where there are none. `in_blocks`: the tensor is read as it lies in the checkpoint, so all that reads it has to do with blocks; else it is packed
/// for products. With columns `i` set, `x·wᵀ` is the product with the tensor as it was and one with what the columns differ by:
/// `x·wᵀ + x[:, i]·(values − w[:, i])ᵀ`.
///
/// Sums are made in another order, and a difference is rounded, so results need not be the same bits.
///
/// # Errors
/// As [`lay`].
pub(super) fn apart(g: &Graph, blocks: &Blocks, in_blocks: bool) -> Result<Option<Graph>, IrError> {
    let mut found = candidates(g, blocks);
    // More columns would rather be numbers.
    let few = |w: &Whole| {
        let [_, columns] = g.params[w.base.index()].ty.shape[..] else { return false };
        let count = g.params[w.index.index()].ty.shape[0].known();
        w.axis == 1 && count.zip(columns.known()).is_some_and(|(n, all)| 4 * n <= all)
    };
    found.retain(|_, w| few(w));
    for e in g.entries.iter().filter(|e| !is_prepare(e)) {
        let live = e.live();
        for v in e.values().filter(|v| live[v.index()]) {
            let n = e.node(v);
            for (at, p) in n.inputs.iter().enumerate().filter_map(|(at, x)| Some((at, param(e, *x)?))) {
                if (at, &n.op) != (1, &Op::MatMul { ta: false, tb: true }) || n.ty.rank() != 2 {
                    found.remove(&p);
                }
            }
        }
        found.retain(|p, _| !e.roots.iter().any(|r| r.kind == RootKind::Assign(*p) || param(e, r.value) == Some(*p)));
    }
    while !found.is_empty() {
        let mut out = g.clone();
        for (p, w) in &mut found {
            w.part = part(&mut out, g, *p, w, "change");
        }
        for (i, e) in g.entries.iter().enumerate() {
            out.entries[i] = if is_prepare(e) { differences(&out, e, &found)? } else { beside(&out, e, &found)? };
        }
        let before = found.len();
        if in_blocks {
            let formats = read_as_blocks(&out, blocks, |_| true, &|_, _| false);
            found.retain(|_, w| formats[w.base.index()].is_some());
        }
        if found.len() == before {
            return Ok(Some(out));
        }
    }
    Ok(None)
}

/// A product that has one laid over the other as right operand.
fn product(g: &Graph, blocks: &Blocks, w: &Whole) -> Option<Kernel> {
    let format = format_of(g, blocks, w.base)?;
    let (ty, index) = (&g.params[w.base.index()].ty, &g.params[w.index.index()].ty);
    let mut part = ty.clone();
    part.shape[usize::from(w.axis)] = *index.shape.first()?;
    let left = TensorType { shape: vec![Dim::Symbol(Sym::T), ty.shape[1]], ..ty.clone() };
    let mut body = Entry::new("kernel");
    let mut inputs = vec![];
    for (i, ty) in [&left, ty, index, &part].into_iter().enumerate() {
        let op = Op::Input { name: format!("a{i}"), dtype: ty.dtype, shape: ty.shape.clone() };
        inputs.push(body.push(&[], op, &[]).ok()?);
    }
    let over = Op::Scatter { axis: w.axis, mode: ScatterMode::Set };
    let right = body.push(&[], over, &inputs[1..]).ok()?;
    let x = body.push(&[], Op::MatMul { ta: false, tb: true }, &[inputs[0], right]).ok()?;
    body.output("r0", x);
    let row = Layout::RowMajor;
    Some(Kernel {
        name: String::new(),
        class: Class::Contraction,
        body,
        operands: vec![row, Layout::Blocks(format), row, row],
        results: vec![row],
        aliases: vec![None],
    })
}

/// What a value is a cast of, with the casts from the outside inwards.
fn uncast(e: &Entry, mut v: ValueId) -> (ValueId, Vec<Op>) {
    let mut casts = vec![];
    while let Op::Cast(_) = e.node(v).op {
        casts.push(e.node(v).op.clone());
        v = e.node(v).inputs[0];
    }
    (v, casts)
}

fn param(e: &Entry, v: ValueId) -> Option<ParamId> {
    match e.node(v).op {
        Op::Param(p) => Some(p),
        _ => None,
    }
}

/// Axis, base, index and values of a set.
fn set(e: &Entry, v: ValueId) -> Option<(u8, ValueId, ParamId, ValueId)> {
    let n = e.node(v);
    let Op::Scatter { axis, mode: ScatterMode::Set } = n.op else { return None };
    Some((axis, n.inputs[0], param(e, n.inputs[1])?, n.inputs[2]))
}

/// Parameters that may be replaced, as far as what they are filled with goes.
fn candidates(g: &Graph, blocks: &Blocks) -> BTreeMap<ParamId, Whole> {
    let mut found: BTreeMap<ParamId, Option<Whole>> = BTreeMap::new();
    for e in g.entries.iter().filter(|e| is_prepare(e)) {
        for r in &e.roots {
            let RootKind::Assign(p) = r.kind else { continue };
            let Param { ty, source: Source::Derived, .. } = &g.params[p.index()] else { continue };
            let whole = set(e, uncast(e, r.value).0).and_then(|(axis, base, index, _)| {
                let base = param(e, uncast(e, base).0)?;
                let fits = g.params[base.index()].ty == *ty && format_of(g, blocks, base).is_some();
                (fits && g.params[index.index()].role == Role::Index).then_some(Whole { base, index, axis, part: p })
            });
            // Filled by several entries: which of them ran last is not known here.
            found.entry(p).and_modify(|w| *w = None).or_insert(whole);
        }
    }
    for e in g.entries.iter().filter(|e| !is_prepare(e)) {
        for r in &e.roots {
            if let RootKind::Assign(p) = r.kind
                && let Some(w) = found.get_mut(&p)
            {
                let same = |w: &Whole| {
                    set(e, r.value).is_some_and(|(axis, onto, index, _)| {
                        param(e, onto) == Some(p) && (axis, index) == (w.axis, w.index)
                    })
                };
                *w = w.filter(same);
            }
        }
    }
    found.into_iter().filter_map(|(p, w)| Some((p, w?))).collect()
}

/// Adds the parameter that holds `what` of a part.
fn part(out: &mut Graph, g: &Graph, p: ParamId, w: &Whole, what: &str) -> ParamId {
    let q = &g.params[p.index()];
    let mut ty = q.ty.clone();
    ty.shape[usize::from(w.axis)] = g.params[w.index.index()].ty.shape[0];
    out.add_param(Param { name: format!("{}.{what}", q.name), ty, role: Role::Frozen, source: Source::Derived })
}

/// A `prepare` entry that fills the parts.
fn prepared(g: &Graph, e: &Entry, found: &BTreeMap<ParamId, Whole>) -> Result<Entry, IrError> {
    let mut out = e.clone();
    for (i, r) in e.roots.iter().enumerate() {
        let RootKind::Assign(p) = r.kind else { continue };
        let Some(w) = found.get(&p) else { continue };
        let (core, casts) = uncast(e, r.value);
        let mut v = e.node(core).inputs[2];
        for op in casts.into_iter().rev() {
            v = out.push_from(&g.params, op, &[v], e.node(core).origin.clone())?;
        }
        out.roots[i].kind = RootKind::Assign(w.part);
        out.roots[i].value = v;
    }
    Ok(out)
}

/// A `prepare` entry that fills what the parts differ by.
fn differences(g: &Graph, e: &Entry, found: &BTreeMap<ParamId, Whole>) -> Result<Entry, IrError> {
    let mut out = e.clone();
    for (i, r) in e.roots.iter().enumerate() {
        let RootKind::Assign(p) = r.kind else { continue };
        let Some(w) = found.get(&p) else { continue };
        let (core, _) = uncast(e, r.value);
        let n = e.node(core);
        let dtype = g.params[p.index()].ty.dtype;
        let mut push = |op: Op, inputs: &[ValueId]| out.push_from(&g.params, op, inputs, n.origin.clone());
        let old = push(Op::Gather { axis: w.axis }, &[n.inputs[0], n.inputs[1]])?;
        let mut pair = [n.inputs[2], old];
        if e.ty(core).dtype != DType::F32 {
            let [new, old] = pair.map(|v| push(Op::Cast(DType::F32), &[v]));
            pair = [new?, old?];
        }
        let mut change = push(Op::Binary(BinaryOp::Sub), &pair)?;
        if dtype != DType::F32 {
            change = push(Op::Cast(dtype), &[change])?;
        }
        out.roots[i].kind = RootKind::Assign(w.part);
        out.roots[i].value = change;
    }
    Ok(out)
}

/// An entry with two products in place of each.
fn beside(g: &Graph, e: &Entry, found: &BTreeMap<ParamId, Whole>) -> Result<Entry, IrError> {
    rebuilt(e, |out, v, mut inputs, _| {
        let n = e.node(v);
        let mut push = |op: Op, inputs: &[ValueId]| out.push_from(&g.params, op, inputs, n.origin.clone());
        let weight = n.inputs.get(1).and_then(|x| param(e, *x)).and_then(|p| found.get(&p));
        let Some(w) = weight else { return push(n.op.clone(), &inputs) };
        let [base, index, part] = [w.base, w.index, w.part].map(|p| push(Op::Param(p), &[]));
        let x = push(Op::Gather { axis: 1 }, &[inputs[0], index?])?;
        inputs[1] = base?;
        let whole = push(n.op.clone(), &inputs)?;
        let change = push(n.op.clone(), &[x, part?])?;
        push(Op::Add, &[whole, change])
    })
}

/// An entry that reads the parts laid over the tensors, and sets the parts alone.
fn read(g: &Graph, e: &Entry, found: &BTreeMap<ParamId, Whole>) -> Result<Entry, IrError> {
    let mut out = rebuilt(e, |out, v, inputs, _| {
        let n = e.node(v);
        let Some(w) = param(e, v).and_then(|p| found.get(&p)) else {
            return out.push_from(&g.params, n.op.clone(), &inputs, n.origin.clone());
        };
        let mut read = |p: ParamId| out.push_from(&g.params, Op::Param(p), &[], n.origin.clone());
        let inputs = [read(w.base)?, read(w.index)?, read(w.part)?];
        out.push_from(&g.params, Op::Scatter { axis: w.axis, mode: ScatterMode::Set }, &inputs, n.origin.clone())
    })?;
    for i in 0..out.roots.len() {
        if let RootKind::Assign(p) = out.roots[i].kind
            && let Some(w) = found.get(&p)
        {
            out.roots[i].kind = RootKind::Assign(w.part);
            out.roots[i].value = out.node(out.roots[i].value).inputs[2];
        }
    }
    Ok(out)
}
