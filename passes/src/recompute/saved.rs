//! What an entry keeps between its forward and its backward half.

use super::{cut, gradients};
use crate::options::Options;
use pleach_ir::{DType, Dim, Entry, Graph, Op, TensorType, ValueId};
use std::collections::{BTreeMap, BTreeSet};

/// A forward value that the backward half reads.
#[derive(Clone, PartialEq, Debug)]
pub struct Saved {
    /// The value.
    pub value: ValueId,
    /// Where it comes from, and its operator: `model.layers.0.mlp.gate_proj matmul`.
    pub name: String,
    /// Its type.
    pub ty: TensorType,
    /// Bytes at the counts the entry is tuned for.
    pub bytes: u64,
    /// Who reads it, in words.
    pub reason: String,
    /// Every reader is a product that gives the gradient of a trained weight.
    pub trained_only: bool,
    /// What building it again would cost, microseconds; the operands it would be built from are kept or rebuilt too.
    pub rebuild_us: f64,
}

impl Saved {
    /// Bytes per unit of its symbolic count, and that count's name; a value of fixed size has the count `1`.
    pub fn unit(&self) -> (u64, String) {
        let known: u64 = self.ty.shape.iter().filter_map(|d| d.known()).product();
        let symbol = self.ty.shape.iter().find_map(|d| if let Dim::Symbol(s) = d { Some(s.to_string()) } else { None });
        (known * self.ty.dtype.size(), symbol.unwrap_or_else(|| "1".into()))
    }
}

/// What a value is a mere view or widening of.
pub(super) fn base(e: &Entry, mut v: ValueId) -> ValueId {
    loop {
        let n = e.node(v);
        let wider = |to: DType| to.size() > e.ty(n.inputs[0]).dtype.size();
        match n.op {
            Op::Reshape(_) | Op::Transpose(_) | Op::Broadcast { .. } | Op::After | Op::StopGradient => v = n.inputs[0],
            Op::Cast(to) if wider(to) => v = n.inputs[0],
            _ => return v,
        }
    }
}

/// Which values are made of an input that has elements: what only parameters and settings are made of is no activation.
pub(super) fn of_inputs(e: &Entry) -> Vec<bool> {
    let mut out: Vec<bool> = Vec::with_capacity(e.nodes.len());
    for n in &e.nodes {
        let input = matches!(n.op, Op::Input { .. }) && n.ty.rank() > 0;
        out.push(input || n.inputs.iter().any(|i| out[i.index()]));
    }
    out
}

/// The values that an entry keeps for its backward half, in the order they are made, but for those that exist window by window only
/// and those that no input goes into. Empty without a backward half.
pub fn saved(_: &Graph, e: &Entry, opts: &Options) -> Vec<Saved> {
    let seeded = gradients(e);
    // a clone belongs to the backward half as well: its leaves wait for a gradient
    let late = &seeded;
    let mut readers: BTreeMap<ValueId, BTreeSet<ValueId>> = BTreeMap::new();
    for v in e.values().filter(|v| late[v.index()]) {
        for i in &e.node(v).inputs {
            let b = base(e, *i);
            if !late[i.index()] && !e.node(b).op.is_leaf() && !late[b.index()] {
                readers.entry(b).or_default().insert(v);
            }
        }
    }
    let tokens = opts.tokens(&e.name);
    let (windowed, made) = (cut::windowed(e, tokens), of_inputs(e));
    readers
        .into_iter()
        .filter(|(v, _)| !windowed[v.index()] && made[v.index()])
        .map(|(v, by)| {
            let n = e.node(v);
            let product = |r: &ValueId| {
                matches!(e.node(*r).op, Op::MatMul { .. }) && e.node(*r).inputs.iter().any(|i| late[i.index()])
            };
            let mut words: Vec<String> = vec![];
            for r in &by {
                let reader = e.node(*r);
                let at = reader.origin.as_deref().unwrap_or("?");
                let at = at.split(" [").next().unwrap_or(at);
                let word = match reader.op {
                    Op::After => format!("read to rebuild values of {at}"),
                    Op::AttentionGrad { .. } => format!("attention's gradient in {at}"),
                    _ if product(r) => format!("gradient of a trained weight in {at}"),
                    _ => format!("gradient of {} in {at}", reader.op.name()),
                };
                if !words.contains(&word) {
                    words.push(word);
                }
            }
            let more = words.len().saturating_sub(3);
            words.truncate(3);
            if more > 0 {
                words.push(format!("{more} more"));
            }
            Saved {
                value: v,
                name: format!("{} {}", n.origin.as_deref().unwrap_or("?"), n.op.name()),
                ty: n.ty.clone(),
                bytes: cut::bytes(&n.ty, tokens),
                reason: words.join("; "),
                trained_only: by.iter().all(product),
                rebuild_us: cut::time_us(e, v, opts),
            }
        })
        .collect()
}
