//! The weight of a site with its adapter merged in, from the method's own lowering: the layer is run on the rows of the identity,
//! so no method needs a second statement of what it computes.

use std::collections::BTreeMap;

use pleach_ir::interp::{Data, Symbols, Tensor, run_entry_with};
use pleach_ir::{BinaryOp, DType, Entry, Graph, Op, ParamId, ReduceOp, Source, UnaryOp, ValueId};

use super::{Site, SlotData};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::lower::Builder;
use crate::peft::Adapter;

/// W' [out, in] ([rows, width] for an embedding) such that the layer with W' alone computes what the layer with the
/// adapter does, f32, for a weight W of the same shape.
///
/// # Errors
/// Values that cannot be read; [`Error::Graph`] should an operator not fit.
pub fn merged(adapter: &Adapter, site: &Site, base: &Checkpoint, weight: &[f32]) -> Result<Vec<f32>> {
    let mut b = Builder::new(base, &[], None)?;
    b.start(Entry::new("merged"));
    let (value, product) = b.merged_site(&adapter.config.method, site)?;
    b.output("weight", value);
    b.finish();
    let graph = b.into_graph();
    if let Some(why) = graph.entry("merged").filter(|_| !site.embedding).and_then(|e| not_linear(e, product)) {
        return Err(Error::Graph(format!("`{}` has no single weight: {why}", site.module)));
    }
    match evaluate(&graph, "merged", site, base, Some(weight))?.remove("weight") {
        Some((_, x)) => Ok(x),
        None => Err(Error::Graph("the merged weight is not f32".into())),
    }
}

/// The bias b' [out] that goes with W' of [`merged`], for the bias b of the linear layer, where the adapter changes that as well; `None` where it
/// stays.
///
/// # Errors
/// As [`merged`].
pub fn merged_bias(adapter: &Adapter, site: &Site, base: &Checkpoint, bias: &[f32]) -> Result<Option<Vec<f32>>> {
    if site.embedding {
        return Ok(None);
    }
    let mut b = Builder::new(base, &[], None)?;
    b.start(Entry::new("bias"));
    let Some(value) = b.merged_bias(&adapter.config.method, site)? else { return Ok(None) };
    b.output("bias", value);
    b.finish();
    match evaluate(&b.into_graph(), "bias", site, base, Some(bias))?.remove("bias") {
        Some((_, x)) => Ok(Some(x)),
        None => Err(Error::Graph("the merged bias is not f32".into())),
    }
}

/// A shape and its f32 elements.
pub(super) type Floats = (Vec<u64>, Vec<f32>);

/// Runs an entry over the buffers of a site, on the rows of the identity where it has an input; f32 outputs with their shapes.
/// Every other parameter is what is given of the base: the site's weight, or its bias.
///
/// # Errors
/// Values that cannot be read; [`Error::Graph`] for an entry that does not run.
pub(super) fn evaluate(
    graph: &Graph,
    name: &str,
    site: &Site,
    base: &Checkpoint,
    given: Option<&[f32]>,
) -> Result<BTreeMap<String, Floats>> {
    let mut params = vec![];
    for p in &graph.params {
        params.push(match &p.source {
            Source::Adapter { key, .. } => {
                let part = key.rsplit('.').next().unwrap_or_default();
                let value = site.values.get(part).ok_or_else(|| Error::Graph(format!("no value for `{key}`")))?;
                let t = value.read(base)?;
                match t.data {
                    SlotData::F32(x) => Tensor::f32(t.shape, x),
                    SlotData::I32(x) => Tensor::i32(t.shape, x),
                }
            }
            _ => {
                let shape: Vec<u64> = p.ty.shape.iter().map(|d| d.known().unwrap_or(0)).collect();
                Tensor::f32(shape, given.map_or_else(Vec::new, <[f32]>::to_vec))
            }
        });
    }
    let entry = graph.entry(name).ok_or_else(|| Error::Graph("the entry is gone".into()))?;
    let mut inputs = BTreeMap::new();
    if entry.nodes.iter().any(|n| matches!(n.op, Op::Input { .. })) {
        let rows = if site.embedding {
            Tensor::i32([site.input], (0..site.input as i32).collect())
        } else {
            let n = site.input as usize;
            let mut identity = vec![0.0; n * n];
            (0..n).for_each(|i| identity[i * n + i] = 1.0);
            Tensor::f32([site.input, site.input], identity)
        };
        inputs.insert("x".to_owned(), rows);
    }
    let value = |id: ParamId| params.get(id.index());
    let result = run_entry_with(&graph.params, &value, entry, &inputs, &Symbols::new());
    let result = result.map_err(|e| Error::Graph(e.to_string()))?;
    let floats = |(name, t): (String, Tensor)| match t.data {
        Data::F32(x) => Some((name, (t.shape.clone(), x))),
        _ => None,
    };
    Ok(result.outputs.into_iter().filter_map(floats).collect())
}

/// What a method leaves of the weight W of a site, as W' of [`merged`] but without the adapter's branch.
///
/// # Errors
/// As [`merged`].
pub fn edited(adapter: &Adapter, site: &Site, base: &Checkpoint, weight: &[f32]) -> Result<Vec<f32>> {
    let mut b = Builder::new(base, &[], None)?;
    b.start(Entry::new("edited"));
    let value = b.edited_site(&adapter.config.method, site)?;
    b.output("weight", value);
    b.finish();
    match evaluate(&b.into_graph(), "edited", site, base, Some(weight))?.remove("weight") {
        Some((_, x)) => Ok(x),
        None => Err(Error::Graph("the edited weight is not f32".into())),
    }
}

/// Why no single weight can take the place of base and adapter; `None` where one can. Decided by the operators that the method
/// writes for its first linear site.
///
/// # Errors
/// [`Error::Graph`] should an operator not fit.
pub fn obstacle(adapter: &Adapter, base: &Checkpoint) -> Result<Option<String>> {
    let Some(site) = adapter.sites.iter().find(|s| !s.embedding) else { return Ok(None) };
    let mut b = Builder::new(base, &[], None)?;
    b.start(Entry::new("merged"));
    let (value, product) = b.merged_site(&adapter.config.method, site)?;
    b.output("weight", value);
    b.finish();
    Ok(b.into_graph().entry("merged").and_then(|e| not_linear(e, product)))
}

/// The first operator through which the result is no linear function of the input, or a choice that depends on it, which says more;
/// `product` stands for x · Wᵀ.
fn not_linear(entry: &Entry, product: ValueId) -> Option<String> {
    let (mut depends, mut found) = (vec![], None);
    for (at, node) in entry.nodes.iter().enumerate() {
        let on: Vec<bool> = node.inputs.iter().map(|i| depends[i.index()]).collect();
        let any = on.iter().any(|x| *x);
        let linear = match &node.op {
            Op::Input { .. } => true,
            Op::Unary(UnaryOp::Neg) => true,
            Op::Binary(BinaryOp::Sub) | Op::Add | Op::Concat { .. } => on.iter().all(|x| *x),
            Op::Binary(BinaryOp::Mul) | Op::MatMul { .. } => on.iter().filter(|x| **x).count() < 2,
            Op::Binary(BinaryOp::Div) => !on[1],
            Op::Reduce { op: ReduceOp::Sum, .. } => true,
            Op::Reshape(_) | Op::Transpose(_) | Op::Broadcast { .. } | Op::Slice { .. } | Op::Pad { .. } => true,
            Op::Gather { .. } => !on[1],
            Op::Scatter { .. } => on[0] && !on[1] && on[2],
            Op::Cast(_) | Op::After | Op::StopGradient => true,
            _ => false,
        };
        if any && matches!(node.op, Op::TopK { .. }) {
            return Some(format!("every token chooses what is used of it (`{}`)", node.op.name()));
        }
        if any && !linear && found.is_none() {
            found = Some(match node.op {
                Op::Add => "its output has a part that does not depend on its input".into(),
                _ => format!("its output depends on its input by `{}`, which is not linear", node.op.name()),
            });
        }
        depends.push(any || at == product.index() || matches!(node.op, Op::Input { .. }));
    }
    found
}

/// The input of the layer: the identity [in, in], or all indices of a table.
pub(crate) fn all_rows(site: &Site) -> Op {
    let (dtype, shape) = match site.embedding {
        true => (DType::I32, vec![site.input.into()]),
        false => (DType::F32, vec![site.input.into(), site.input.into()]),
    };
    Op::Input { name: "x".into(), dtype, shape }
}
