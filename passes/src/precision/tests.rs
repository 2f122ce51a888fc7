//! A decoder with adapters in bf16 beside f32, forwards and backwards; what is cast and what is not.

use super::*;
use crate::differentiate;
use crate::manager::{Pipeline, run as run_pipeline};
use crate::testing::{Decoder, results};
use pleach_ir::verify::verify;
use pleach_ir::{ReduceOp, TensorType};

fn bf16() -> Options {
    Options { dtype: DType::BF16, ..Options::default() }
}

fn apply(g: &Graph) -> Graph {
    let out = run_pipeline(g, &Pipeline::of(&["canonicalize", "precision", "canonicalize"]), &bf16()).unwrap().graph;
    verify(&out).unwrap();
    out
}

#[test]
fn a_decoder_is_close_and_not_equal() {
    let g = Decoder::tiny(2, &[2, 3]).build();
    let out = apply(&g);
    let (want, got) = (results(&g), results(&out));
    for (name, w) in &want {
        let e = got[name].relative_error(w);
        assert!(e > 1e-5 && e < 3e-2, "{name}: {e}");
    }
    let e = out.entry("infer").unwrap();
    for n in &e.nodes {
        let narrow = |x: ValueId| e.ty(x).dtype == DType::BF16;
        match n.op {
            Op::MatMul { .. } => assert!(n.inputs.iter().all(|x| narrow(*x))),
            Op::Attention(_) => assert!(n.inputs[..3].iter().all(|x| narrow(*x))),
            Op::Unary(_) | Op::Reduce { .. } | Op::Add => assert!(!n.inputs.iter().any(|x| narrow(*x))),
            _ => {}
        }
    }
    let weights = out.params.iter().filter(|p| matches!(p.source, Source::Checkpoint(_)));
    assert!(weights.clone().all(|p| (p.ty.dtype == DType::BF16) == (p.ty.rank() == 2)));
    assert!(out.params.iter().filter(|p| matches!(p.source, Source::Adapter { .. })).all(|p| p.ty.dtype == DType::F32));
    assert_eq!(apply(&out), out, "a second run changes nothing");
}

/// The decoder's entry `infer` as `train`: the loss is the sum of squares of its output.
fn training() -> Graph {
    let mut g = Decoder::tiny(2, &[2]).build();
    g.params.iter_mut().filter(|p| p.name.starts_with("slot0") && p.ty.rank() == 2).for_each(|p| p.role = Role::Train);
    g.entries.truncate(1);
    let e = &mut g.entries[0];
    e.name = differentiate::TRAIN.into();
    let y = e.roots.pop().unwrap().value;
    let mut loss = e.push(&g.params, Op::Binary(BinaryOp::Mul), &[y, y]).unwrap();
    for axis in [1, 0] {
        loss = e.push(&g.params, Op::Reduce { op: ReduceOp::Sum, axis }, &[loss]).unwrap();
    }
    e.output("loss", loss);
    g
}

#[test]
fn gradients_follow_and_stay_f32() {
    let g = training();
    let grads = |passes: &[&str]| {
        let mut out = run_pipeline(&g, &Pipeline::of(passes), &bf16()).unwrap().graph;
        out.entries.retain(|e| e.name == differentiate::ACCUMULATE);
        let e = &mut out.entries[0];
        // gradients as outputs, so that they can be compared by name
        e.roots.iter_mut().for_each(|r| {
            if let RootKind::Assign(p) = r.kind {
                r.kind = RootKind::Output(out.params[p.index()].name.clone());
            }
        });
        (results(&out), out)
    };
    let (want, _) = grads(&["canonicalize", "differentiate", "canonicalize"]);
    let (got, out) = grads(&["canonicalize", "precision", "differentiate", "canonicalize"]);
    assert!(want.len() > 10);
    for (name, w) in &want {
        let e = got[name].relative_error(w);
        assert!(e > 1e-6 && e < 6e-2, "{name}: {e}");
    }
    let e = &out.entries[0];
    let products = e.nodes.iter().filter(|n| matches!(n.op, Op::MatMul { .. }));
    assert!(products.clone().all(|n| n.inputs.iter().all(|x| e.ty(*x).dtype == DType::BF16)));
    assert!(e.nodes.iter().filter(|n| n.op == Op::Add).all(|n| n.ty.dtype == DType::F32));
}

#[test]
fn f32_changes_nothing_and_other_types_are_refused() {
    let g = training();
    assert_eq!(run(&g, &Options::default(), &mut Report::default()).unwrap(), g);
    let half = Options { dtype: DType::F16, ..Options::default() };
    assert!(run(&g, &half, &mut Report::default()).unwrap_err().to_string().contains("use f32 or bf16"));
    let late = differentiate::run(&g, &bf16(), &mut Report::default()).unwrap();
    assert!(run(&late, &bf16(), &mut Report::default()).unwrap_err().to_string().contains("before differentiate"));
}

#[test]
fn a_sum_is_rounded_once() {
    let mut g = Graph::default();
    let mut param = |name: &str, shape: &[u64], role| {
        let ty = TensorType::new(DType::F32, shape.iter().copied());
        g.add_param(Param { name: name.into(), ty, role, source: Source::Checkpoint(name.into()) })
    };
    let ids = [
        param("w", &[4, 4], Role::Frozen),
        param("a", &[2, 4], Role::Train),
        param("b", &[4, 2], Role::Train),
        param("s", &[], Role::Frozen),
    ];
    let mut e = Entry::new("train");
    let shape = vec![Dim::Symbol(Sym::T), 4u64.into()];
    let mut p = |op, x: &[ValueId]| e.push(&g.params, op, x).unwrap();
    let x = p(Op::Input { name: "x".into(), dtype: DType::F32, shape }, &[]);
    let [w, a, b, s] = ids.map(|i| p(Op::Param(i), &[]));
    let product = Op::MatMul { ta: false, tb: true };
    let base = p(product.clone(), &[x, w]);
    let low = p(product.clone(), &[x, a]);
    let high = p(product, &[low, b]);
    let scaled = p(Op::Binary(BinaryOp::Mul), &[s, high]);
    let sum = p(Op::Add, &[base, scaled]);
    let residual = p(Op::Add, &[x, sum]);
    let squares = p(Op::Binary(BinaryOp::Mul), &[residual, residual]);
    e.output("y", squares);
    let r = rounds(&e);
    let rounded: Vec<ValueId> = e.values().filter(|v| r[v.index()]).collect();
    assert_eq!(rounded, [low, residual]);
}
