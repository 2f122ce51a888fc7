//! Gives parameters that are right operands of products a panel layout.
//!
//! Such a parameter gets a derived twin in panels, filled by the `prepare` entry of its phase, and the products read the
//! twin. The width of a panel suits the number of columns and the slices that are taken of the product.

use pleach_ir::{DType, Entry, Graph, IrError, Layout, Op, Param, ParamId, Role, RootKind, Source, ValueId};
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

fn is_prepare(e: &Entry) -> bool {
    e.name.starts_with("prepare(")
}

/// The graph with packed twins in panels of these widths (widest first), and the layout of every parameter.
///
/// # Errors
/// [`IrError`] when a node cannot be rebuilt; that would be a fault of the input graph.
pub(super) fn pack(graph: &Graph, widths: &[u64]) -> Result<(Graph, Vec<Layout>), IrError> {
    let mut g = graph.clone();
    let mut layouts = vec![Layout::RowMajor; g.params.len()];
    let mut twins: BTreeMap<(ParamId, Layout), ParamId> = BTreeMap::new();
    for i in 0..g.entries.len() {
        if is_prepare(&g.entries[i]) {
            continue;
        }
        let live = g.entries[i].live();
        let users = g.entries[i].users();
        let mut replace: BTreeMap<ValueId, ParamId> = BTreeMap::new();
        for v in g.entries[i].values() {
            let e = &g.entries[i];
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
            let layout = Layout::Panels { nr, transposed: tb };
            let next = ParamId(g.params.len() as u32);
            let twin = *twins.entry((p, layout)).or_insert(next);
            if twin == next {
                let q = &g.params[p.index()];
                let name = format!("{}.panels{nr}{}", q.name, if tb { "t" } else { "" });
                let param = Param { name, ty: q.ty.clone(), role: Role::Frozen, source: Source::Derived };
                g.params.push(param);
                layouts.push(layout);
            }
            replace.insert(v, twin);
        }
        g.entries[i] = with_twins(&g.params, &g.entries[i], &replace)?;
    }
    for ((p, _), twin) in &twins {
        fill(&mut g, *p, *twin)?;
    }
    drop_unread(&mut g);
    Ok((g, layouts))
}

/// The entry with the right operands of these products replaced by parameters.
fn with_twins(params: &[Param], e: &Entry, replace: &BTreeMap<ValueId, ParamId>) -> Result<Entry, IrError> {
    let mut out = Entry::new(e.name.clone());
    let mut map: Vec<ValueId> = vec![];
    for v in e.values() {
        let n = e.node(v);
        let mut inputs: Vec<ValueId> = n.inputs.iter().map(|i| map[i.index()]).collect();
        if let Some(p) = replace.get(&v) {
            inputs[1] = out.push(params, Op::Param(*p), &[])?;
        }
        map.push(out.push_from(params, n.op.clone(), &inputs, n.origin.clone())?);
    }
    for r in &e.roots {
        out.roots.push(pleach_ir::Root { kind: r.kind.clone(), value: map[r.value.index()] });
    }
    Ok(out)
}

/// Adds the assignment of a twin to the `prepare` entry of its parameter's phase.
fn fill(g: &mut Graph, p: ParamId, twin: ParamId) -> Result<(), IrError> {
    let made = g.entries.iter().position(|e| e.roots.iter().any(|r| r.kind == RootKind::Assign(p) && is_prepare(e)));
    if let Some(i) = made {
        let e = &mut g.entries[i];
        let value = e.roots.iter().find(|r| r.kind == RootKind::Assign(p)).map(|r| r.value);
        if let Some(v) = value {
            e.assign(twin, v);
        }
        return Ok(());
    }
    let name = match &g.params[p.index()].source {
        Source::Adapter { slot, .. } => format!("prepare(slot{slot})"),
        _ => "prepare(base)".to_string(),
    };
    if !g.entries.iter().any(|e| e.name == name) {
        g.entries.push(Entry::new(name.clone()));
    }
    let params = std::mem::take(&mut g.params);
    for e in g.entries.iter_mut().filter(|e| e.name == name) {
        let v = e.push(&params, Op::Param(p), &[])?;
        e.assign(twin, v);
    }
    g.params = params;
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
