//! Gradients that read few values: the form of an element-wise gradient that makes the forward half keep the fewest bytes.
//!
//! The gradient of silu can be written with the sigmoid or with what the sigmoid is made of, that of a norm with its result or
//! with its input and one number per row. A product reads its operands from memory and makes the forward half keep them as they
//! are; an element-wise gradient has its operands in registers and can apply a function again. So of all that products (and
//! whatever else is not element-wise) read, every byte is kept anyway, and of the rest a minimum cut says what must be: the
//! fewest bytes from which element-wise functions give all that element-wise gradients read. `differentiate` writes its gradients
//! so; `rewrite` and `recompute`, which weighs time as well, begin from the plain form ([`plain`]).
//!
//! Kept as they are: reductions, products, movement that is no view, what exists window by window only, what no input goes into, and
//! sums of different streams: a residual stream would otherwise be built again from its first layer on.

use super::cut::{self, Cost, NEVER};
use super::{Clones, gradients, saved};
use crate::canonicalize::Builder;
use crate::options::Options;
use pleach_ir::{Entry, IrError, Op, Param, Root, ValueId};

/// The entry with its element-wise gradients in the form that keeps the fewest bytes.
///
/// # Errors
/// [`IrError`] if a clone does not type-check, which would be a fault of this pass.
pub(crate) fn lean(params: &[Param], e: &Entry, opts: &Options) -> Result<Entry, IrError> {
    let gradient = gradients(e);
    let rebuilt = cut::cheapest(e, &gradient, &costs(e, &gradient, opts));
    if !rebuilt.contains(&true) {
        return Ok(e.clone());
    }
    let order: Vec<ValueId> = e.values().filter(|v| gradient[v.index()]).collect();
    let direct: Vec<bool> = saved::of_inputs(e).iter().map(|made| !made).collect();
    Clones { e, gradient: &gradient, rebuilt: &rebuilt, direct: &direct }.apply(params, order)
}

/// The entry without clones of forward values: what [`lean`] cloned is read again where it was first made. `None` where it has none.
///
/// # Errors
/// As [`lean`].
pub(crate) fn plain(params: &[Param], e: &Entry) -> Result<Option<Entry>, IrError> {
    let gradient = gradients(e);
    let clone = |v: ValueId| e.node(v).op == Op::After && gradient[v.index()] && !gradient[e.node(v).inputs[0].index()];
    if !e.values().any(clone) {
        return Ok(None);
    }
    let mut b = Builder::new(params, &e.name);
    let mut map: Vec<ValueId> = Vec::with_capacity(e.nodes.len());
    for v in e.values() {
        let n = e.node(v);
        let inputs: Vec<ValueId> = n.inputs.iter().map(|i| map[i.index()]).collect();
        map.push(if clone(v) { inputs[0] } else { b.make(n.op.clone(), inputs, n.origin.clone())? });
    }
    let roots = e.roots.iter().map(|r| Root { kind: r.kind.clone(), value: map[r.value.index()] });
    b.finish(roots.collect()).map(Some)
}

/// Bytes, where an element-wise function may be applied again, and nothing for what is kept anyway.
fn costs(e: &Entry, gradient: &[bool], opts: &Options) -> Vec<Cost> {
    let tokens = opts.tokens(&e.name);
    let (windowed, made) = (cut::windowed(e, tokens), saved::of_inputs(e));
    let mut paid = vec![false; e.nodes.len()];
    for v in e.values().filter(|v| gradient[v.index()] && !e.node(*v).op.is_elementwise()) {
        for i in &e.node(v).inputs {
            paid[i.index()] = true;
            paid[saved::base(e, *i).index()] = true;
        }
    }
    let again = again(e);
    e.values()
        .map(|v| {
            let base = saved::base(e, v);
            let free = paid[v.index()] || paid[base.index()] || !made[v.index()] || windowed[v.index()];
            let keep = if free { 0 } else { cut::bytes(e.ty(base), tokens) };
            Cost { keep, again: if free || !again[v.index()] { NEVER } else { 0 } }
        })
        .collect()
}

/// Which values an element-wise function (or a view) makes of one stream, or of several without adding them up.
fn again(e: &Entry) -> Vec<bool> {
    // what a value is made of by element-wise functions, as far as it is one: nothing but parameters, or one value
    #[derive(Clone, Copy, PartialEq)]
    enum Of {
        Nothing,
        One(ValueId),
        Many,
    }
    let mut of: Vec<Of> = Vec::with_capacity(e.nodes.len());
    let mut out = vec![false; e.nodes.len()];
    let made = saved::of_inputs(e);
    for v in e.values() {
        let n = e.node(v);
        let view = matches!(n.op, Op::Reshape(_) | Op::Transpose(_) | Op::Broadcast { .. } | Op::Slice { .. });
        let all = n.inputs.iter().map(|i| of[i.index()]).fold(Of::Nothing, |a, b| match (a, b) {
            (Of::Nothing, x) | (x, Of::Nothing) => x,
            (a, b) if a == b => a,
            _ => Of::Many,
        });
        let streams = n.op == Op::Add && all == Of::Many;
        out[v.index()] = (n.op.is_elementwise() || view) && !streams;
        of.push(match () {
            () if !made[v.index()] => Of::Nothing,
            () if out[v.index()] => all,
            () => Of::One(v),
        });
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::same_results;
    use pleach_ir::Graph;
    use pleach_ir::text::{parse, print};

    /// A gated layer and its norm, with the gradients of both; `%7` is the gate's product, `%8` that beside it.
    const LAYER: &str = r#"graph core
param @0 "w" f32[8,16] frozen checkpoint("w")
param @1 "g" f32[8,16] state zeros
entry "accumulate" {
  %0 = input "x" : f32[T,8]
  %1 = input "loss_scale" : f32[]
  %2 = param @0 : f32[8,16]
  %3 = param @1 : f32[8,16]
  %4 = const 1.0 : f32[]
  %5 = neg(%0) : f32[T,8]
  %6 = mul(%5, %5) : f32[T,8]
  %7 = matmul(%6, %2) : f32[T,16]
  %8 = matmul(%5, %2) : f32[T,16]
  %9 = sigmoid(%7) : f32[T,16]
  %10 = mul(%7, %9) : f32[T,16]
  %11 = mul(%8, %10) : f32[T,16]
  %12 = reduce_sum(%11) {axis = 1} : f32[T]
  %13 = reduce_sum(%12) {axis = 0} : f32[]
  %14 = mul(%1, %13) : f32[]
  %15 = broadcast(%1) {axes = []} : f32[T,16]
  %16 = mul(%10, %15) : f32[T,16]
  %17 = mul(%8, %15) : f32[T,16]
  %18 = mul(%9, %17) : f32[T,16]
  %19 = mul(%7, %17) : f32[T,16]
  %20 = sub(%4, %9) : f32[T,16]
  %21 = mul(%9, %20) : f32[T,16]
  %22 = mul(%19, %21) : f32[T,16]
  %23 = add(%18, %22) : f32[T,16]
  %24 = matmul(%6, %23) {ta} : f32[8,16]
  %25 = matmul(%5, %16) {ta} : f32[8,16]
  %26 = add(%3, %24, %25) : f32[8,16]
  output "loss" %14
  assign @1 %26
}
"#;

    fn leaned(text: &str) -> (Graph, Graph) {
        let g = parse(text).unwrap_or_else(|e| panic!("{e}"));
        let mut out = g.clone();
        out.entries[0] = lean(&g.params, &g.entries[0], &Options::default()).unwrap_or_else(|e| panic!("{e}"));
        same_results(&g, &out, 1e-6);
        (g, out)
    }

    fn kept(g: &Graph) -> Vec<String> {
        let list = saved::saved(g, &g.entries[0], &Options::default());
        list.iter()
            .filter(|s| s.ty.rank() == 2)
            .map(|s| format!("{} {}", s.name.rsplit(' ').next().unwrap_or(""), s.ty))
            .collect()
    }

    #[test]
    fn the_gate_is_kept_and_its_function_applied_again() {
        let (g, out) = leaned(LAYER);
        assert_eq!(kept(&g).len(), 7, "{:?}", kept(&g));
        assert_eq!(kept(&out), ["neg f32[T,8]", "mul f32[T,8]", "matmul f32[T,16]", "matmul f32[T,16]"]);
        assert_eq!(print(&out).matches("sigmoid").count(), 2);
    }

    #[test]
    fn what_a_product_reads_is_kept_as_it_is() {
        // the square of a value that is kept as well
        let (_, out) = leaned(LAYER);
        let text = print(&out);
        assert_eq!(text.matches("mul(%4, %4)").count(), 1, "{text}");
    }

    #[test]
    fn the_plain_form_comes_back() {
        let (g, out) = leaned(LAYER);
        let e = plain(&g.params, &out.entries[0]).unwrap_or_else(|e| panic!("{e}")).expect("has clones");
        assert_eq!(plain(&g.params, &e), Ok(None));
        assert!(!print(&Graph { entries: vec![e.clone()], ..g.clone() }).contains("after"));
        let same = Graph { entries: vec![e], ..g.clone() };
        assert_eq!(kept(&same).len(), kept(&g).len());
        same_results(&g, &same, 1e-6);
    }

    #[test]
    fn a_stream_is_not_built_from_its_terms() {
        // the stream %10 is the sum of two values that are kept; its function is applied again, the sum is not
        let text = r#"graph core
param @0 "g" f32[8,8] state zeros
entry "accumulate" {
  %0 = input "x" : f32[T,8]
  %1 = input "loss_scale" : f32[]
  %2 = param @0 : f32[8,8]
  %3 = matmul(%0, %2) : f32[T,8]
  %4 = neg(%0) : f32[T,8]
  %5 = add(%3, %4) : f32[T,8]
  %6 = exp(%5) : f32[T,8]
  %7 = broadcast(%1) {axes = []} : f32[T,8]
  %8 = mul(%6, %7) : f32[T,8]
  %9 = mul(%5, %8) : f32[T,8]
  %10 = matmul(%3, %9) {ta} : f32[8,8]
  %11 = matmul(%4, %9) {ta} : f32[8,8]
  %12 = add(%2, %10, %11) : f32[8,8]
  %13 = reduce_sum(%6) {axis = 1} : f32[T]
  %14 = reduce_sum(%13) {axis = 0} : f32[]
  %15 = mul(%1, %14) : f32[]
  output "loss" %15
  assign @0 %12
}
"#;
        let (_, out) = leaned(text);
        assert_eq!(kept(&out), ["matmul f32[T,8]", "neg f32[T,8]", "add f32[T,8]"]);
        assert_eq!(print(&out).matches("= exp(").count(), 2);
    }
}
