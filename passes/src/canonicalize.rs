//! `canonicalize`: one form for what is trivially equal.
//!
//! Dead nodes go (inputs stay: they are the entry's signature), equal nodes become one, identities vanish (see
//! [`simplify`]), tiny constants are folded (see [`constant`]), a sum whose only reader is a sum becomes part of it, the
//! operands of sums and products are sorted, `stop_gradient` is dropped, and the graph enters phase `Core`.
//!
//! Assumes a verified graph, differentiated already if it is going to be. Leaves alone: parameters, roots and their
//! order, everything that is not an identity for every value (`x*0` is not: x may be infinite).

pub mod constant;
pub mod simplify;

use crate::error::PassError;
use crate::manager::Report;
use crate::options::Options;
use pleach_ir::{Entry, Graph, IrError, Op, Param, Phase, Root, ValueId};
use simplify::Simpler;
use std::collections::HashMap;
use std::sync::Arc;

const NAME: &str = "canonicalize";

/// Sweeps over an entry at most; real graphs settle in two or three.
const SWEEPS: usize = 16;

/// The pass.
///
/// # Errors
/// [`PassError::Build`] if a simplified node does not type-check, which would be a fault of this pass.
pub fn run(g: &Graph, _: &Options, report: &mut Report) -> Result<Graph, PassError> {
    let mut out = Graph { phase: Phase::Core, params: g.params.clone(), entries: vec![] };
    let mut unsettled = 0;
    for e in &g.entries {
        let (e, settled) = entry(&g.params, e).map_err(PassError::build(NAME, &e.name))?;
        unsettled += usize::from(!settled);
        out.entries.push(e);
    }
    if unsettled > 0 {
        report.note = format!("{unsettled} entries not settled after {SWEEPS} sweeps");
    }
    Ok(out)
}

/// One entry in canonical form, and whether it settled within the limit of sweeps.
///
/// # Errors
/// As [`run`].
pub fn entry(params: &[Param], e: &Entry) -> Result<(Entry, bool), IrError> {
    let mut cur = e.clone();
    for _ in 0..SWEEPS {
        let next = flatten(params, &sweep(params, &cur)?)?;
        if next == cur && same_origins(&next, &cur) {
            return Ok((next, true));
        }
        cur = next;
    }
    Ok((cur, false))
}

fn same_origins(a: &Entry, b: &Entry) -> bool {
    a.nodes.iter().zip(&b.nodes).all(|(x, y)| x.origin == y.origin)
}

/// Simplifies and shares every live node, operands first.
fn sweep(params: &[Param], e: &Entry) -> Result<Entry, IrError> {
    let live = e.live();
    let mut b = Builder::new(params, &e.name);
    let mut map = vec![None; e.nodes.len()];
    for v in e.values() {
        let n = e.node(v);
        if !live[v.index()] && !matches!(n.op, Op::Input { .. }) {
            continue;
        }
        let inputs: Vec<ValueId> = n.inputs.iter().filter_map(|i| map[i.index()]).collect();
        map[v.index()] = Some(b.make(n.op.clone(), inputs, n.origin.clone())?);
    }
    let roots =
        e.roots.iter().filter_map(|r| Some(Root { kind: r.kind.clone(), value: map[r.value.index()]? })).collect();
    b.finish(roots)
}

/// Sums whose only reader is a sum become part of it.
fn flatten(params: &[Param], e: &Entry) -> Result<Entry, IrError> {
    let mut readers = vec![0usize; e.nodes.len()];
    for i in e.nodes.iter().flat_map(|n| &n.inputs).chain(e.roots.iter().map(|r| &r.value)) {
        readers[i.index()] += 1;
    }
    let inner = |v: ValueId| e.node(v).op == Op::Add && readers[v.index()] == 1;
    if !e.nodes.iter().any(|n| n.op == Op::Add && n.inputs.iter().any(|&i| inner(i))) {
        return Ok(e.clone());
    }
    let mut out = e.clone();
    for v in e.values().filter(|&v| e.node(v).op == Op::Add) {
        // operands come first, so an inner sum is flat already
        let mut terms = vec![];
        for &i in &e.node(v).inputs {
            if inner(i) {
                terms.extend(out.node(i).inputs.clone());
            } else {
                terms.push(i);
            }
        }
        terms.sort_unstable();
        let from = e.node(v).inputs.iter().filter(|&&i| inner(i)).find_map(|&i| out.node(i).origin.clone());
        let n = &mut out.nodes[v.index()];
        n.inputs = terms;
        n.origin = n.origin.take().or(from);
    }
    compact(params, &out)
}

/// Drops dead nodes but inputs; keeps the order of the rest.
///
/// # Errors
/// [`IrError::Shape`] if a node of `e` does not type-check.
pub fn compact(params: &[Param], e: &Entry) -> Result<Entry, IrError> {
    let live = e.live();
    let mut out = Entry::new(e.name.clone());
    let mut map = vec![ValueId(0); e.nodes.len()];
    for v in e.values() {
        let n = e.node(v);
        if live[v.index()] || matches!(n.op, Op::Input { .. }) {
            let inputs: Vec<ValueId> = n.inputs.iter().map(|i| map[i.index()]).collect();
            map[v.index()] = out.push_from(params, n.op.clone(), &inputs, n.origin.clone())?;
        }
    }
    out.roots = e.roots.iter().map(|r| Root { kind: r.kind.clone(), value: map[r.value.index()] }).collect();
    Ok(out)
}

/// Builds an entry of nodes that are each as simple as [`simplify`] makes them and occur once.
pub struct Builder<'a> {
    params: &'a [Param],
    entry: Entry,
    seen: HashMap<(Op, Vec<ValueId>), ValueId>,
}

impl<'a> Builder<'a> {
    /// An empty entry over these parameters.
    pub fn new(params: &'a [Param], name: &str) -> Builder<'a> {
        Builder { params, entry: Entry::new(name), seen: HashMap::new() }
    }

    /// The entry so far.
    pub fn entry(&self) -> &Entry {
        &self.entry
    }

    /// A value equal to `op` on these operands, of the same type.
    ///
    /// # Errors
    /// [`IrError::Shape`] when the operands do not fit.
    pub fn make(&mut self, mut op: Op, mut inputs: Vec<ValueId>, origin: Option<Arc<str>>) -> Result<ValueId, IrError> {
        let types = |e: &Entry, inputs: &[ValueId], op: &Op| {
            let t: Vec<_> = inputs.iter().map(|&i| e.ty(i)).collect();
            pleach_ir::infer::infer(self.params, op, &t)
        };
        let ty = types(&self.entry, &inputs, &op)?;
        if let Some((axes, few)) = simplify::before_spread(&self.entry, &ty, &op, &inputs) {
            let x = self.make(op, few, origin.clone())?;
            return self.make(Op::Broadcast { shape: ty.shape, axes }, vec![x], origin);
        }
        // every step shortens the chain under the node or removes an operand; the bound is a guard, never a limit
        for _ in 0..64 {
            match simplify::simplify(&self.entry, &ty, &op, &inputs) {
                Simpler::No => break,
                Simpler::Value(v) if *self.entry.ty(v) == ty => return Ok(v),
                Simpler::Node(o, i) if types(&self.entry, &i, &o).is_ok_and(|t| t == ty) => (op, inputs) = (o, i),
                _ => break,
            }
        }
        simplify::sort_operands(&self.entry, &op, &mut inputs);
        let key = (op, inputs);
        if let Some(v) = self.seen.get(&key) {
            return Ok(*v);
        }
        let v = self.entry.push_from(self.params, key.0.clone(), &key.1, origin)?;
        self.seen.insert(key, v);
        Ok(v)
    }

    /// The entry with these roots, without the nodes they do not need.
    ///
    /// # Errors
    /// As [`compact`].
    pub fn finish(mut self, roots: Vec<Root>) -> Result<Entry, IrError> {
        self.entry.roots = roots;
        compact(self.params, &self.entry)
    }
}

#[cfg(test)]
mod tests;
