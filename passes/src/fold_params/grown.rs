//! Which values over trained parameters are built where they are read instead of being kept in buffers that `update` renews.
//!
//! A weight that an adapter changes in every element is as large as the layer, although what is trained in it is small; kept buffers would
//! double or triple the weights. Building it costs a few operations per element, a product of a run's tokens with it two per token and
//! element. So where the former is small beside the latter, the value is built when a run reads it, forward and backward, and dropped.
//!
//! Assumes that forms are interned operands first. Leaves alone: what training does not change; small values; what `update` renews in place,
//! part by part; what is expensive to build, such as norms of a changed weight.

use super::Forms;
use pleach_ir::{Graph, Op, ScatterMode};

/// Values with fewer elements are kept.
const SMALL: u64 = 1 << 14;
/// How many times the elements of the trained parameters in it a value must have.
const GROWTH: u64 = 4;
/// What building may cost, as a share of a product of all tokens with the value.
const SHARE: f64 = 0.15;
/// Operations that an element of an elementwise operator or a movement counts as.
const ELEMENT: f64 = 6.0;

/// Sets `grown` and `flops` of a form whose operands have them.
pub(super) fn decide(g: &Graph, forms: &mut Forms, f: usize) {
    let form = &forms.list[f];
    let Some(elements) = form.ty.static_elements() else { return };
    let own = match &form.op {
        op if op.is_leaf() => 0.0,
        Op::Reshape(_) | Op::Slice { .. } | Op::Broadcast { .. } => 0.0,
        Op::MatMul { ta, .. } => {
            let a = &forms.list[form.inputs[0]].ty.shape;
            let inner = if *ta { a.iter().rev().nth(1) } else { a.last() };
            2.0 * elements as f64 * inner.and_then(|d| d.known()).unwrap_or(1) as f64
        }
        _ => ELEMENT * elements as f64,
    };
    // What is kept need not be built again; what is not trained is kept.
    let built = |i: &usize| forms.list[*i].trained && !forms.list[*i].op.is_leaf();
    let flops = own + form.inputs.iter().filter(|i| built(i)).map(|i| forms.list[*i].flops).sum::<f64>();
    let product = 2.0 * forms.tokens as f64 * elements as f64;
    let grown = form.trained
        && !form.op.is_leaf()
        && elements >= SMALL
        && elements >= GROWTH * trained_elements(g, forms, f)
        && flops <= SHARE * product
        && !in_place(forms, f);
    let form = &mut forms.list[f];
    (form.flops, form.grown) = (flops, grown);
}

/// Elements of the trained parameters in a form, each counted once.
fn trained_elements(g: &Graph, forms: &Forms, f: usize) -> u64 {
    let (mut seen, mut stack, mut sum) = (vec![], vec![f], 0);
    while let Some(f) = stack.pop() {
        if seen.contains(&f) || !forms.list[f].trained {
            continue;
        }
        seen.push(f);
        if let Op::Param(p) = forms.list[f].op {
            sum += g.params[p.index()].ty.static_elements().unwrap_or(0);
        }
        stack.extend(&forms.list[f].inputs);
    }
    sum
}

/// Whether `update` sets only parts of it, in place.
fn in_place(forms: &Forms, mut f: usize) -> bool {
    loop {
        let form = &forms.list[f];
        f = match &form.op {
            Op::Scatter { mode: ScatterMode::Set, .. } => {
                return form.inputs[..2].iter().all(|i| !forms.list[*i].trained);
            }
            Op::Concat { .. } => return form.inputs.iter().any(|i| !forms.list[*i].trained),
            Op::Cast(_) | Op::Transpose(_) => form.inputs[0],
            _ => return false,
        };
    }
}
