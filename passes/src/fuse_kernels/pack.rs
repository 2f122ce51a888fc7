//! Gives parameters that are right operands of products a panel layout.
//!
//! Such a parameter gets a derived twin in panels, filled by the `prepare` entry of its phase, and the products read the
//! twin. The width of a panel suits the number of columns and the slices that are taken of the product.
//!
//! Where the checkpoint has a tensor in blocks of codes too ([`Layout::Blocks`]), and the parameter is made of such tensors
//! alone, the twin keeps the codes ([`Layout::CodedPanels`]): the values are the same, the bytes a fraction. Where nothing is packed
//! the products read the blocks themselves ([`in_blocks`]), those of weights that stand one below the other as one matrix in blocks.

use super::laid;
use super::sums::rebuilt;
use pleach_ir::{
    BlockFormat, Class, DType, Entry, Graph, IrError, Kernel, Layout, Op, Param, ParamId, Role, RootKind, ScatterMode,
    Source, TensorType, ValueId,
};
use std::collections::BTreeMap;

/// The greatest number that divides every place where a slice of `v` along its last axis starts or ends.
fn slice_step(e: &Entry, users: &[Vec<ValueId>], v: ValueId, n: u64) -> u64 {
    let gcd = |mut a: u64, mut b: u64| {
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    let last = e.ty(v).rank() as u8 - 1;
    let mut step = 0;
    for u in &users[v.index()] {
        if let Op::Slice { axis, start, end } = e.node(*u).op
            && axis == last
        {
            step = gcd(step, start);
            if end != n {
                step = gcd(step, end);
            }
        }
    }
    step
}

pub(super) fn is_prepare(e: &Entry) -> bool {
    e.name.starts_with("prepare(")
}

/// Tensors of the checkpoint that it has in blocks too, by name.
pub(super) type Blocks = BTreeMap<String, BlockFormat>;

/// Whether a region can be one kernel; a reason otherwise.
pub(super) type Supported<'a> = dyn Fn(&Kernel) -> Result<(), String> + 'a;

/// The value that a `prepare` entry assigns to a parameter.
fn made(g: &Graph, p: ParamId) -> Option<(usize, ValueId)> {
    let assigned = |e: &Entry| e.roots.iter().find(|r| r.kind == RootKind::Assign(p)).map(|r| r.value);
    g.entries.iter().enumerate().filter(|(_, e)| is_prepare(e)).find_map(|(i, e)| Some((i, assigned(e)?)))
}

/// A parameter in coded panels or in blocks, and the parameters in blocks that it is made of, one below the other.
#[derive(Clone, Debug)]
pub(super) struct Coded {
    pub(super) twin: ParamId,
    pub(super) parts: Vec<ParamId>,
}

/// The checkpoint's tensors that a parameter is made of, one below the other; `None`: it is made in another way.
fn parts(g: &Graph, p: ParamId) -> Option<Vec<ParamId>> {
    fn walk(e: &Entry, v: ValueId, out: &mut Vec<ParamId>) -> Option<()> {
        let n = e.node(v);
        match n.op {
            Op::Param(q) => out.push(q),
            Op::Concat { axis: 0 } | Op::Cast(_) => n.inputs.iter().try_for_each(|x| walk(e, *x, out))?,
            _ => return None,
        }
        Some(())
    }
    let Some((i, v)) = made(g, p) else { return Some(vec![p]) };
    let mut out = vec![];
    walk(&g.entries[i], v, &mut out)?;
    Some(out)
}

/// The format that a matrix `[N, K]` can be kept in: all its parts are there in blocks of that format.
pub(super) fn format_of(g: &Graph, blocks: &Blocks, p: ParamId) -> Option<BlockFormat> {
    let of = |p: &ParamId| {
        let Param { ty, source: Source::Checkpoint(name), .. } = &g.params[p.index()] else { return None };
        let whole = ty.rank() == 2 && ty.shape[1].known()?.is_multiple_of(BlockFormat::VALUES);
        blocks.get(name).copied().filter(|_| whole)
    };
    let parts = parts(g, p)?;
    let first = of(parts.first()?)?;
    parts.iter().all(|q| of(q) == Some(first)).then_some(first)
}

/// The kernel that fills a parameter from its parts in blocks, one below the other, all as they are stored.
///
/// # Errors
/// [`IrError`] for parts that do not fit.
pub(super) fn filling(parts: &[(TensorType, Layout)], to: &(TensorType, Layout)) -> Result<Kernel, IrError> {
    let mut body = Entry::new("kernel");
    let mut all = vec![];
    for (i, (ty, _)) in parts.iter().enumerate() {
        let op = Op::Input { name: format!("a{i}"), dtype: ty.dtype, shape: ty.shape.clone() };
        all.push(body.push(&[], op, &[])?);
    }
    let mut x = match all[..] {
        [x] => x,
        _ => body.push(&[], Op::Concat { axis: 0 }, &all)?,
    };
    if body.ty(x).dtype != to.0.dtype {
        x = body.push(&[], Op::Cast(to.0.dtype), &[x])?;
    }
    body.output("r0", x);
    let operands = parts.iter().map(|p| p.1).collect();
    Ok(Kernel { name: String::new(), class: Class::Row, body, operands, results: vec![to.1], aliases: vec![None] })
}

/// What packing makes of a graph.
pub(super) struct Packed {
    pub(super) graph: Graph,
    /// Of every parameter.
    pub(super) layouts: Vec<Layout>,
    /// To be filled by [`BASE`].
    pub(super) coded: Vec<Coded>,
}

/// The entry that fills what depends on the base alone.
pub(super) const BASE: &str = "prepare(base)";

/// Packed twins in panels of these widths (widest first).
///
/// # Errors
/// [`IrError`] when a node cannot be rebuilt; that would be a fault of the input graph.
pub(super) fn pack(graph: &Graph, widths: &[u64], blocks: &Blocks) -> Result<Packed, IrError> {
    let apart = laid::apart(graph, blocks, false)?;
    let graph = apart.as_ref().unwrap_or(graph);
    let mut g = graph.clone();
    let mut layouts = vec![Layout::RowMajor; g.params.len()];
    let mut twins: BTreeMap<(ParamId, Layout), ParamId> = BTreeMap::new();
    let mut stored: BTreeMap<ParamId, ParamId> = BTreeMap::new();
    let tables = read_as_blocks(&g, blocks, |how| matches!(how, Reads::Right | Reads::Rows), &|_, _| false);
    for i in 0..g.entries.len() {
        if is_prepare(&g.entries[i]) {
            continue;
        }
        let live = g.entries[i].live();
        let users = g.entries[i].users();
        let mut replace: Replace = BTreeMap::new();
        for v in g.entries[i].values() {
            let e = &g.entries[i];
            let format = |p: ParamId| tables.get(p.index()).copied().flatten();
            if let Some((p, at, Reads::Rows)) = reads(e, &users, v, |p| format(p).is_some())
                && let Some(format) = format(p)
                && live[v.index()]
            {
                let twin = *stored.entry(p).or_insert_with(|| stored_as(&mut g, &mut layouts, p, format));
                replace.insert(v, (at, twin));
                continue;
            }
            let Op::MatMul { tb, .. } = e.node(v).op else { continue };
            let right = e.node(v).inputs[1];
            let Op::Param(p) = e.node(right).op else { continue };
            let ty = &g.params[p.index()].ty;
            let known =
                ty.rank() == 2 && ty.static_elements().is_some() && matches!(ty.dtype, DType::F32 | DType::BF16);
            if !live[v.index()] || !known || g.params[p.index()].role == Role::State {
                continue;
            }
            let n = ty.shape[usize::from(!tb)].known().unwrap_or(0);
            let nr = Layout::panel_width(n, &[slice_step(e, &users, v, n)], widths);
            let layout = match format_of(&g, blocks, p).filter(|_| tb) {
                Some(format) => Layout::CodedPanels { nr, format },
                None => Layout::Panels { nr, transposed: tb },
            };
            let next = ParamId(g.params.len() as u32);
            let twin = *twins.entry((p, layout)).or_insert(next);
            if twin == next {
                let q = &g.params[p.index()];
                let how = match layout {
                    Layout::CodedPanels { format, .. } => format!("t.{}", format.name()),
                    _ => if tb { "t" } else { "" }.into(),
                };
                let name = format!("{}.panels{nr}{how}", q.name);
                let param = Param { name, ty: q.ty.clone(), role: Role::Frozen, source: Source::Derived };
                g.params.push(param);
                layouts.push(layout);
            }
            replace.insert(v, (1, twin));
        }
        g.entries[i] = with_twins(&g.params, &g.entries[i], &replace)?;
    }
    let mut coded = vec![];
    for ((p, layout), twin) in &twins {
        let Layout::CodedPanels { format, .. } = layout else {
            fill(&mut g, *p, *twin)?;
            continue;
        };
        let mut of_blocks =
            |q: ParamId| *stored.entry(q).or_insert_with(|| stored_as(&mut g, &mut layouts, q, *format));
        let parts = parts(graph, *p).unwrap_or_default().into_iter().map(&mut of_blocks).collect();
        coded.push(Coded { twin: *twin, parts });
        entry_named(&mut g, BASE);
    }
    drop_unread(&mut g);
    Ok(Packed { graph: g, layouts, coded })
}

/// How a node reads a parameter in a way that the parameter's blocks do for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Reads {
    /// As the right operand of a product.
    Right,
    /// As the left operand: of the product turned round it is the right one.
    Left,
    /// Rows that indices pick.
    Rows,
    /// At another time, or under parts that are set anew, for products alone.
    Under,
}

/// Which values of an entry are live, and of each the live nodes that read it.
pub(super) fn live_users(e: &Entry) -> (Vec<bool>, Vec<Vec<ValueId>>) {
    let (live, mut users) = (e.live(), e.users());
    users.iter_mut().for_each(|u| u.retain(|v| live[v.index()]));
    (live, users)
}

/// Whether a node is its first input at another time, or with parts set.
fn covers(op: &Op) -> bool {
    matches!(op, Op::After | Op::Scatter { mode: ScatterMode::Set, .. })
}

/// The parameter behind such nodes, of which one may set parts.
pub(super) fn covered(e: &Entry, mut v: ValueId) -> Option<ParamId> {
    let mut sets = 0;
    while covers(&e.node(v).op) {
        sets += u32::from(e.node(v).op != Op::After);
        v = e.node(v).inputs[0];
    }
    match e.node(v).op {
        Op::Param(p) if sets <= 1 => Some(p),
        _ => None,
    }
}

/// Whether a value is an input, read at whatever time.
fn given(e: &Entry, mut v: ValueId) -> bool {
    while e.node(v).op == Op::After {
        v = e.node(v).inputs[0];
    }
    matches!(e.node(v).op, Op::Input { .. })
}

/// The parameter of those `wanted` that a node reads so, and at which input.
fn reads(
    e: &Entry,
    users: &[Vec<ValueId>],
    v: ValueId,
    wanted: impl Fn(ParamId) -> bool,
) -> Option<(ParamId, usize, Reads)> {
    let n = e.node(v);
    let operand = |v: ValueId, at: usize| covered(e, e.node(v).inputs[at]).filter(|p| wanted(*p));
    let product = |v: ValueId| {
        let right = operand(v, 1).map(|p| (p, 1, Reads::Right));
        right.or_else(|| operand(v, 0).map(|p| (p, 0, Reads::Left)))
    };
    let is_product = |v: ValueId| matches!(e.node(v).op, Op::MatMul { .. }) && e.ty(v).rank() == 2;
    // All that read a value are products that have it as the operand in question.
    let for_products = |v: ValueId| {
        let mut stack = vec![v];
        while let Some(v) = stack.pop() {
            for u in &users[v.index()] {
                let at = e.node(*u).inputs.iter().filter(|x| **x == v).count();
                if is_product(*u) && at == 1 && product(*u).is_some_and(|(_, at, _)| e.node(*u).inputs[at] == v) {
                    continue;
                }
                if !covers(&e.node(*u).op) || e.node(*u).inputs[0] != v || at > 1 {
                    return false;
                }
                stack.push(*u);
            }
        }
        true
    };
    match n.op {
        Op::MatMul { .. } if is_product(v) => product(v),
        Op::Gather { axis: 0 } if given(e, n.inputs[1]) => match e.node(n.inputs[0]).op {
            Op::Param(p) if wanted(p) => Some((p, 0, Reads::Rows)),
            _ => None,
        },
        ref op if covers(op) => {
            let p = operand(v, 0).filter(|_| for_products(v) && e.roots.iter().all(|r| r.value != v))?;
            Some((p, 0, Reads::Under))
        }
        _ => None,
    }
}

/// Of every parameter that entries read (but for those that prepare) in ways that `wanted` names and in no other: the format that the
/// checkpoint has it in. What is read otherwise too is in memory as numbers anyway. `joined` says of what is made of several such
/// parameters, one below the other, whether it can be in blocks.
pub(super) fn read_as_blocks(
    g: &Graph,
    blocks: &Blocks,
    wanted: impl Fn(Reads) -> bool,
    joined: &dyn Fn(ParamId, BlockFormat) -> bool,
) -> Vec<Option<BlockFormat>> {
    let assigns = |e: &Entry, p: ParamId| e.roots.iter().any(|r| r.kind == RootKind::Assign(p));
    let assigned = |p: ParamId| g.entries.iter().any(|e| assigns(e, p));
    let format = |p: ParamId| {
        let renewed = g.entries.iter().any(|e| !is_prepare(e) && assigns(e, p));
        let frozen = g.params[p.index()].role == Role::Frozen && !renewed;
        let format = frozen.then(|| format_of(g, blocks, p)).flatten()?;
        (!assigned(p) || joined(p, format)).then_some(format)
    };
    let mut formats: Vec<Option<BlockFormat>> = (0..g.params.len()).map(|p| format(ParamId(p as u32))).collect();
    let mut read = vec![false; g.params.len()];
    for e in g.entries.iter().filter(|e| !is_prepare(e)) {
        let (live, users) = live_users(e);
        for v in e.values().filter(|v| live[v.index()]) {
            let found = reads(e, &users, v, |p| formats[p.index()].is_some());
            for (at, x) in e.node(v).inputs.iter().enumerate() {
                let Op::Param(p) = e.node(*x).op else { continue };
                read[p.index()] = true;
                if !found.is_some_and(|(_, here, how)| here == at && wanted(how)) {
                    formats[p.index()] = None;
                }
            }
        }
        for r in &e.roots {
            if let Op::Param(p) = e.node(r.value).op {
                formats[p.index()] = None;
            }
        }
    }
    formats.into_iter().zip(read).map(|(f, read)| f.filter(|_| read)).collect()
}

/// The graph with the blocks of codes that the checkpoint has in place of the same weights as numbers: for entries that read
/// weights both ways round, where panels would be two copies.
///
/// A product that has a weight on the left is turned round: its sums may be made in another order. A weight that preparations put together
/// from several stays together, in blocks, where the target can do that.
///
/// # Errors
/// As [`pack`].
pub(super) fn in_blocks(graph: &Graph, blocks: &Blocks, supported: &Supported<'_>) -> Result<Packed, IrError> {
    let apart = laid::apart(graph, blocks, true)?;
    let graph = apart.as_ref().unwrap_or(graph);
    let laid = laid::lay(graph, blocks, supported)?;
    let graph = laid.as_ref().unwrap_or(graph);
    let mut g = graph.clone();
    let mut layouts = vec![Layout::RowMajor; g.params.len()];
    let joined = |p: ParamId, format: BlockFormat| {
        let stored = |p: &ParamId| (graph.params[p.index()].ty.clone(), Layout::Blocks(format));
        let parts: Vec<_> = parts(graph, p).unwrap_or_default().iter().map(stored).collect();
        filling(&parts, &stored(&p)).is_ok_and(|k| supported(&k).is_ok())
    };
    let formats = read_as_blocks(&g, blocks, |_| true, &joined);
    let entries: Vec<usize> = (0..g.entries.len()).filter(|i| !is_prepare(&g.entries[*i])).collect();
    let mut twins: BTreeMap<ParamId, ParamId> = BTreeMap::new();
    let mut coded = vec![];
    for (p, format) in formats.into_iter().enumerate() {
        let (Some(format), p) = (format, ParamId(p as u32)) else { continue };
        let mut twin_of = |q: ParamId| *twins.entry(q).or_insert_with(|| stored_as(&mut g, &mut layouts, q, format));
        let twin = twin_of(p);
        if made(graph, p).is_some() {
            let parts = parts(graph, p).unwrap_or_default().into_iter().map(twin_of).collect();
            coded.push(Coded { twin, parts });
        }
    }
    for i in entries {
        let e = &g.entries[i];
        let (live, users) = live_users(e);
        g.entries[i] = rebuilt(e, |out, v, mut inputs, _| {
            let n = e.node(v);
            let found = reads(e, &users, v, |p| twins.contains_key(&p)).filter(|_| live[v.index()]);
            let Some((p, at, how)) = found else {
                return out.push_from(&g.params, n.op.clone(), &inputs, n.origin.clone());
            };
            if let (Op::Param(_), Some(twin)) = (&e.node(n.inputs[at]).op, twins.get(&p)) {
                inputs[at] = out.push(&g.params, Op::Param(*twin), &[])?;
            }
            let (Op::MatMul { ta, tb }, Reads::Left) = (&n.op, how) else {
                return out.push_from(&g.params, n.op.clone(), &inputs, n.origin.clone());
            };
            inputs.swap(0, 1);
            let turned = Op::MatMul { ta: !tb, tb: !ta };
            let x = out.push_from(&g.params, turned, &inputs, n.origin.clone())?;
            out.push_from(&g.params, Op::Transpose(vec![1, 0]), &[x], n.origin.clone())
        })?;
    }
    if !coded.is_empty() {
        drop_unread(&mut g);
    }
    Ok(Packed { graph: g, layouts, coded })
}

/// Adds a parameter that is another one's blocks.
fn stored_as(g: &mut Graph, layouts: &mut Vec<Layout>, p: ParamId, format: BlockFormat) -> ParamId {
    let q = g.params[p.index()].clone();
    g.params.push(Param { name: format!("{}.{}", q.name, format.name()), ..q });
    layouts.push(Layout::Blocks(format));
    ParamId(g.params.len() as u32 - 1)
}

/// Of nodes: the input to replace, and by which parameter.
type Replace = BTreeMap<ValueId, (usize, ParamId)>;

/// The entry with operands of these nodes replaced by parameters.
fn with_twins(params: &[Param], e: &Entry, replace: &Replace) -> Result<Entry, IrError> {
    rebuilt(e, |out, v, mut inputs, _| {
        let n = e.node(v);
        if let Some((at, p)) = replace.get(&v) {
            inputs[*at] = out.push(params, Op::Param(*p), &[])?;
        }
        out.push_from(params, n.op.clone(), &inputs, n.origin.clone())
    })
}

/// The entry of this name, made if there is none.
fn entry_named(g: &mut Graph, name: &str) -> usize {
    if let Some(i) = g.entries.iter().position(|e| e.name == name) {
        return i;
    }
    g.entries.push(Entry::new(name));
    g.entries.len() - 1
}

/// Adds the assignment of a twin to the `prepare` entry of its parameter's phase.
fn fill(g: &mut Graph, p: ParamId, twin: ParamId) -> Result<(), IrError> {
    if let Some((i, v)) = made(g, p) {
        g.entries[i].assign(twin, v);
        return Ok(());
    }
    let name = match &g.params[p.index()].source {
        Source::Adapter { slot, .. } => format!("prepare(slot{slot})"),
        _ => BASE.to_string(),
    };
    let i = entry_named(g, &name);
    let e = &mut g.entries[i];
    let v = e.push(&g.params, Op::Param(p), &[])?;
    e.assign(twin, v);
    Ok(())
}

/// Drops assignments of derived parameters that nothing reads any more.
fn drop_unread(g: &mut Graph) {
    let mut read = vec![false; g.params.len()];
    for e in g.entries.iter() {
        let live = e.live();
        for v in e.values().filter(|v| live[v.index()]) {
            if let Op::Param(p) = e.node(v).op {
                read[p.index()] = true;
            }
        }
    }
    let derived: Vec<bool> = g.params.iter().map(|p| p.source == Source::Derived).collect();
    for e in &mut g.entries {
        if is_prepare(e) {
            e.roots.retain(|r| !matches!(r.kind, RootKind::Assign(p) if derived[p.index()] && !read[p.index()]));
        }
    }
}

#[cfg(test)]
mod tests {
    use pleach_ir::Layout;

    #[test]
    fn widths() {
        let panel_width = |n, step| Layout::panel_width(n, &[step], &[48, 32, 16]);
        let narrow = |n, step| Layout::panel_width(n, &[step], &[16]);
        assert_eq!((narrow(576, 0), narrow(3072, 1536)), (16, 16));
        assert_eq!(panel_width(576, 0), 48);
        assert_eq!(panel_width(16, 0), 16);
        assert_eq!(panel_width(128, 0), 32);
        assert_eq!(panel_width(3072, 1536), 48);
        assert_eq!(panel_width(192, 64), 32);
        assert_eq!(panel_width(20, 10), 16);
    }
}
