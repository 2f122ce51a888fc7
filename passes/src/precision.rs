//! `precision`: weights and activations in bf16, where the option `dtype` asks for it.
//!
//! * Frozen checkpoint parameters of rank 2 and more, and caches, are stored in bf16 (whoever fills them casts).
//! * Operands of every product and attention over tokens are bf16; products accumulate in f32, attention gives bf16.
//! * The result of a linear layer with all its terms (bias, low-rank branch, residual) is rounded to bf16 once where it
//!   has other readers than a further sum: that is what is kept of it in memory and for the backward half.
//! * Movement of rounded values moves the 16-bit values.
//!
//! Everything else stays f32: norms, activation functions, softmax, the loss, trained parameters and what is computed
//! from parameters alone. A trained parameter is cast where it is the operand of a product.
//!
//! Assumes entries before `differentiate` (cotangents follow from the casts) and before `fold-params` (casts of
//! parameters are folded). Changes nothing with `dtype` f32. Entries' inputs and outputs keep their types.

#[cfg(test)]
mod tests;

use crate::differentiate::{ACCUMULATE, OPTIMIZER};
use crate::error::PassError;
use crate::manager::Report;
use crate::options::Options;
use pleach_ir::{
    BinaryOp, DType, Dim, Entry, Graph, IrError, Op, Param, ParamId, Role, Root, RootKind, ScatterMode, Source, Sym,
    UnaryOp, ValueId,
};
use std::collections::HashMap;

const NAME: &str = "precision";

/// The pass.
///
/// # Errors
/// [`PassError::Refused`] for another type than f32 or bf16, and for a graph that already has gradients;
/// [`PassError::Build`] would be a fault of this pass.
pub fn run(g: &Graph, opts: &Options, report: &mut Report) -> Result<Graph, PassError> {
    let refused = |why: String| PassError::Refused { pass: NAME.into(), why };
    match opts.dtype {
        DType::F32 => return Ok(g.clone()),
        DType::BF16 => {}
        other => return Err(refused(format!("there is no {other} for weights and activations; use f32 or bf16"))),
    }
    if g.entry(ACCUMULATE).is_some() {
        return Err(refused("the graph has gradients already; run precision before differentiate".into()));
    }
    let mut out = Graph { phase: g.phase, params: g.params.clone(), entries: vec![] };
    let narrow: Vec<bool> = g.params.iter().map(stored_narrow).collect();
    for (p, _) in out.params.iter_mut().zip(&narrow).filter(|(_, n)| **n) {
        p.ty.dtype = DType::BF16;
    }
    let mut rounded = 0;
    for e in &g.entries {
        if e.name == OPTIMIZER {
            // what a step of the optimizer computes stays f32
            out.entries.push(e.clone());
            continue;
        }
        let rounds = rounds(e);
        let mut b = Builder { params: &out.params, e: Entry::new(e.name.clone()), narrowed: HashMap::new() };
        let new = b.entry(e, &rounds, &narrow).map_err(PassError::build(NAME, &e.name))?;
        rounded += rounds.iter().filter(|r| **r).count();
        out.entries.push(new);
    }
    let stored = narrow.iter().filter(|n| **n).count();
    report.note = format!("{stored} parameters stored in bf16, {rounded} results rounded");
    Ok(out)
}

/// Weights that are read only, and caches.
fn stored_narrow(p: &Param) -> bool {
    let weight = p.role == Role::Frozen && matches!(p.source, Source::Checkpoint(_));
    let cache = p.role == Role::State && p.source == Source::Zeros;
    p.ty.dtype == DType::F32 && p.ty.rank() >= 2 && (weight || cache)
}

/// A matrix with one row per token.
fn token_rows(e: &Entry, v: ValueId) -> bool {
    let ty = e.ty(v);
    ty.dtype == DType::F32 && ty.rank() == 2 && ty.shape[0] == Dim::Symbol(Sym::T)
}

/// Which values depend on an input.
fn dependent(e: &Entry) -> Vec<bool> {
    let mut dep = vec![false; e.nodes.len()];
    for v in e.values() {
        let n = e.node(v);
        dep[v.index()] = matches!(n.op, Op::Input { .. }) || n.inputs.iter().any(|i| dep[i.index()]);
    }
    dep
}

/// Which values are rounded: products over tokens and the sums they are terms of, in their last form.
fn rounds(e: &Entry) -> Vec<bool> {
    let (users, dep) = (e.users(), dependent(e));
    let mut is_root = vec![false; e.nodes.len()];
    e.roots.iter().for_each(|r| is_root[r.value.index()] = true);
    // a factor that is no function of the tokens keeps a linear layer linear
    let scaled = |u: ValueId, x: ValueId| {
        let n = e.node(u);
        match n.op {
            Op::Unary(UnaryOp::Neg) => true,
            Op::Binary(BinaryOp::Mul) => {
                n.inputs.iter().all(|i| *i == x || !dep[i.index()]) && n.inputs[0] != n.inputs[1]
            }
            _ => false,
        }
    };
    let mut term = vec![false; e.nodes.len()];
    for v in e.values().rev().filter(|v| token_rows(e, *v) && !is_root[v.index()]) {
        let us = &users[v.index()];
        term[v.index()] = !us.is_empty()
            && us.iter().all(|u| {
                token_rows(e, *u)
                    && (e.node(*u).op == Op::Add || scaled(*u, v) && (term[u.index()] || is_root[u.index()]))
            });
    }
    let (mut linear, mut rounded) = (vec![false; e.nodes.len()], vec![false; e.nodes.len()]);
    for v in e.values().filter(|v| token_rows(e, *v)) {
        let n = e.node(v);
        let open = |x: &ValueId| linear[x.index()] && !rounded[x.index()];
        linear[v.index()] = match n.op {
            Op::MatMul { .. } => true,
            Op::Add => n.inputs.iter().any(open),
            Op::Unary(_) | Op::Binary(_) => n.inputs.iter().any(|x| open(x) && scaled(v, *x)),
            _ => false,
        };
        rounded[v.index()] = linear[v.index()] && !term[v.index()] && !is_root[v.index()];
    }
    rounded
}

struct Builder<'a> {
    params: &'a [Param],
    e: Entry,
    /// The bf16 form of values that have been asked for.
    narrowed: HashMap<ValueId, ValueId>,
}

impl Builder<'_> {
    fn push(&mut self, op: Op, x: &[ValueId], like: ValueId) -> Result<ValueId, IrError> {
        let origin = self.e.nodes.get(like.index()).and_then(|n| n.origin.clone());
        self.e.push_from(self.params, op, x, origin)
    }

    fn entry(&mut self, old: &Entry, rounds: &[bool], stored: &[bool]) -> Result<Entry, IrError> {
        let dep = dependent(old);
        let mut map: Vec<ValueId> = Vec::with_capacity(old.nodes.len());
        for v in old.values() {
            let n = old.node(v);
            let mut x: Vec<ValueId> = n.inputs.iter().map(|i| map[i.index()]).collect();
            let over_tokens = dep[v.index()];
            match &n.op {
                Op::MatMul { .. } if over_tokens => self.narrow_all(&mut x)?,
                Op::Attention(_) if over_tokens => self.narrow_all(&mut x[..3])?,
                op if moves(op) && n.ty.dtype == DType::F32 => {
                    if let Some(narrow) = self.moved(op, &x)? {
                        let up = self.push(Op::Cast(DType::F32), &[narrow], narrow)?;
                        self.narrowed.insert(up, narrow);
                        map.push(up);
                        continue;
                    }
                }
                _ => {}
            }
            let mut new = self.e.push_from(self.params, n.op.clone(), &x, n.origin.clone())?;
            if rounds[v.index()] {
                new = self.narrow(new)?;
            }
            if self.e.ty(new).dtype == DType::BF16 && n.ty.dtype == DType::F32 {
                let up = self.push(Op::Cast(DType::F32), &[new], new)?;
                self.narrowed.insert(up, new);
                new = up;
            }
            map.push(new);
        }
        let mut roots = vec![];
        for r in &old.roots {
            let value = map[r.value.index()];
            let value = match r.kind {
                RootKind::Assign(ParamId(p)) if stored[p as usize] => self.narrow(value)?,
                _ => value,
            };
            roots.push(Root { kind: r.kind.clone(), value });
        }
        let mut e = std::mem::take(&mut self.e);
        e.roots = roots;
        Ok(e)
    }

    fn narrow_all(&mut self, x: &mut [ValueId]) -> Result<(), IrError> {
        for v in x.iter_mut() {
            *v = self.narrow(*v)?;
        }
        Ok(())
    }

    /// The value in bf16. Movement is done on bf16 values, which gives the same.
    fn narrow(&mut self, v: ValueId) -> Result<ValueId, IrError> {
        if self.e.ty(v).dtype != DType::F32 {
            return Ok(v);
        }
        if let Some(n) = self.narrowed.get(&v) {
            return Ok(*n);
        }
        let (op, x) = (self.e.node(v).op.clone(), self.e.node(v).inputs.clone());
        let partly = moves(&op) && x.iter().any(|i| self.narrowed.contains_key(i));
        let new = if partly {
            let mut x = x;
            for i in &mut x {
                *i = self.narrow(*i)?;
            }
            self.push(op, &x, v)?
        } else {
            self.push(Op::Cast(DType::BF16), &[v], v)?
        };
        self.narrowed.insert(v, new);
        Ok(new)
    }

    /// Movement of bf16 values, if all float operands are such.
    fn moved(&mut self, op: &Op, x: &[ValueId]) -> Result<Option<ValueId>, IrError> {
        let is_float = |v: &ValueId| self.e.ty(*v).dtype.is_float();
        if !x.iter().filter(|v| is_float(v)).all(|v| self.narrowed.get(v).is_some_and(|n| self.is_exact(*v, *n))) {
            return Ok(None);
        }
        let y: Vec<ValueId> = x.iter().map(|v| self.narrowed.get(v).copied().unwrap_or(*v)).collect();
        self.push(op.clone(), &y, x[0]).map(Some)
    }

    /// True when `v` is `narrow` cast up.
    fn is_exact(&self, v: ValueId, narrow: ValueId) -> bool {
        let n = self.e.node(v);
        n.op == Op::Cast(DType::F32) && n.inputs == [narrow]
    }
}

/// Operators that move elements of their float operands and do nothing else.
fn moves(op: &Op) -> bool {
    op.is_movement() && !matches!(op, Op::Scatter { mode: ScatterMode::Add, .. })
}
