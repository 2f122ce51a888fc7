//! The body of one kernel: a group's operators as a small entry over operands `a0…`, with results `r0…`.

use super::group::Partition;
use pleach_ir::{Class, Entry, IrError, Kernel, Layout, Op, Param, ParamId, TensorType, ValueId};
use std::collections::BTreeMap;

/// A group as a kernel, and which values of the entry its operands and results are.
pub(super) struct Region {
    pub(super) kernel: Kernel,
    pub(super) operands: Vec<ValueId>,
    pub(super) results: Vec<ValueId>,
    pub(super) origin: Option<String>,
}

/// Everything that makes a kernel what it is, but its name.
#[derive(PartialEq, Eq, Hash, Clone)]
pub(super) struct Signature {
    class: Class,
    layouts: (Vec<Layout>, Vec<Layout>),
    aliases: Vec<Option<u32>>,
    nodes: Vec<(Op, Vec<ValueId>, TensorType)>,
    results: Vec<ValueId>,
}

impl Signature {
    pub(super) fn of(k: &Kernel) -> Signature {
        Signature {
            class: k.class,
            layouts: (k.operands.clone(), k.results.clone()),
            aliases: k.aliases.clone(),
            nodes: k.body.nodes.iter().map(|n| (n.op.clone(), n.inputs.clone(), n.ty.clone())).collect(),
            results: k.body.roots.iter().map(|r| r.value).collect(),
        }
    }
}

struct Lower<'a> {
    e: &'a Entry,
    p: &'a Partition,
    g: usize,
    body: Entry,
    operands: Vec<ValueId>,
    done: BTreeMap<ValueId, ValueId>,
}

impl Lower<'_> {
    fn value(&mut self, v: ValueId) -> Result<ValueId, IrError> {
        if let Some(x) = self.done.get(&v) {
            return Ok(*x);
        }
        let n = self.e.node(v);
        let own = self.p.group(v) == Some(self.g);
        let pulled = self.p.is_inline(v) || (self.p.is_view(v) && !self.shows_buffer(v));
        let x = if (own || pulled) && n.op == Op::After {
            // What it waits for is no matter of the kernel.
            self.value(n.inputs[0])?
        } else if own || pulled {
            let inputs = n.inputs.iter().map(|i| self.value(*i)).collect::<Result<Vec<_>, _>>()?;
            self.body.push(&[], n.op.clone(), &inputs)?
        } else if let Some(same) = self.operand(v) {
            same
        } else {
            let name = format!("a{}", self.operands.len());
            self.operands.push(v);
            self.body.push(&[], Op::Input { name, dtype: n.ty.dtype, shape: n.ty.shape.clone() }, &[])?
        };
        self.done.insert(v, x);
        Ok(x)
    }

    /// The operand that shows the same memory under the same type.
    fn operand(&self, v: ValueId) -> Option<ValueId> {
        let base = self.p.alias_base(self.e, v);
        let same = |o: &ValueId| self.p.alias_base(self.e, *o) == base && self.e.ty(*o) == self.e.ty(v);
        let at = self.operands.iter().find(|o| same(o))?;
        self.done.get(at).copied()
    }

    /// A reshape of something in memory outside the group is that memory under another shape.
    fn shows_buffer(&self, v: ValueId) -> bool {
        let b = self.p.alias_base(self.e, v);
        b != v && !self.p.is_view(b) && !self.p.is_inline(b) && self.p.group(b) != Some(self.g)
    }
}

/// What the kernels of a partition ask of its entry.
pub(super) struct Facts {
    /// Values that a root shows.
    rooted: Vec<bool>,
    /// The node that reads each parameter.
    params: BTreeMap<ParamId, ValueId>,
}

impl Facts {
    pub(super) fn new(e: &Entry, p: &Partition) -> Facts {
        let mut rooted = vec![false; e.nodes.len()];
        e.roots.iter().for_each(|r| rooted[p.alias_base(e, r.value).index()] = true);
        let mut params = BTreeMap::new();
        for v in e.values().filter(|v| !p.is_dead(*v)) {
            if let Op::Param(q) = e.node(v).op {
                params.entry(q).or_insert(v);
            }
        }
        Facts { rooted, params }
    }
}

/// Builds the kernel of group `g`.
///
/// # Errors
/// [`IrError`] when a node cannot be rebuilt; that would be a fault of the input graph.
pub(super) fn region(
    e: &Entry,
    p: &Partition,
    facts: &Facts,
    g: usize,
    params: &[(Param, Layout)],
) -> Result<Region, IrError> {
    let members = p.members(g);
    let class = p.class(g);
    let outside = |v: &ValueId| p.readers(*v).iter().any(|r| p.group(*r) != Some(g)) || facts.rooted[v.index()];
    let mut results: Vec<ValueId> = members.iter().copied().filter(outside).collect();
    if results.is_empty() {
        // Nothing reads it, but something waits for it.
        results.extend(members.last());
    }
    let mut l = Lower { e, p, g, body: Entry::new("kernel"), operands: vec![], done: BTreeMap::new() };
    for (i, v) in results.iter().enumerate() {
        let x = l.value(*v)?;
        l.body.output(format!("r{i}"), x);
    }
    let alias = |v: &ValueId| {
        let at = |base: ValueId| l.operands.iter().position(|o| p.alias_base(e, *o) == base).map(|i| i as u32);
        if let Op::Scatter { .. } = e.node(*v).op {
            return l.operands.iter().position(|o| *o == e.node(*v).inputs[0]).map(|i| i as u32);
        }
        at(*facts.params.get(p.in_place.get(v)?)?)
    };
    let aliases = results.iter().map(alias).collect();
    let layout = |v: &ValueId| match e.node(p.alias_base(e, *v)).op {
        Op::Param(q) => params[q.index()].1,
        _ => Layout::RowMajor,
    };
    let operands: Vec<Layout> = l.operands.iter().map(layout).collect();
    let anchors = members.iter().filter(|m| class != Class::Contraction || matches!(e.node(**m).op, Op::MatMul { .. }));
    let origin = anchors.filter_map(|m| e.node(*m).origin.as_ref()).next().map(|s| s.to_string());
    let kernel = Kernel {
        name: "kernel".into(),
        class,
        results: vec![Layout::RowMajor; results.len()],
        operands,
        aliases,
        body: l.body,
    };
    Ok(Region { kernel, operands: l.operands, results, origin })
}
