//! Weights in panels, of both float types, beside the interpreter.

use pleach_ir::Sym;
use pleach_ir::interp::{Symbols, Tensor};
use pleach_ir::text::parse;
use pleach_passes::{Options, Pipeline};
use pleach_plan::Meta;
use pleach_tests::compare::{Start, run_graph, same};
use pleach_tests::compiled::{plan_with, run, session, targets};
use std::sync::Arc;

#[test]
fn products_read_panels_of_both_types() {
    for (dtype, k, n) in [("f32", 20, 35), ("bf16", 20, 35), ("bf16", 7, 48), ("bf16", 64, 100)] {
        for (tb, shape) in [(" {tb}", format!("{n},{k}")), ("", format!("{k},{n}"))] {
            let text = format!(
                "graph core\nparam @0 \"w\" {dtype}[{shape}] frozen checkpoint(\"w\")\nentry \"infer\" {{\n  %0 = input \"x\" : f32[T,{k}]\n  \
                 %1 = cast(%0) : {dtype}[T,{k}]\n  %2 = param @0 : {dtype}[{shape}]\n  %3 = matmul(%1, %2){tb} : f32[T,{n}]\n  output \"y\" %3\n}}\n"
            );
            let text = if dtype == "f32" { text.replace("%1 = cast(%0)", "%1 = neg(%0)") } else { text };
            let g = parse(&text).unwrap();
            for target in targets() {
                let plan =
                    plan_with(&g, &Pipeline::of(&[]), true, &Options::default(), &target, Meta::default()).unwrap();
                let packed = |p: &pleach_plan::Param| matches!(p.layout, pleach_plan::Layout::Panels { .. });
                assert!(plan.params.iter().any(packed), "{dtype}");
                let plan = Arc::new(plan);
                for tokens in [1u64, 5, 33] {
                    let start = Start::seeded(&g, Symbols::from([(Sym::T, tokens)]), 3);
                    let options = pleach_runtime::Options::default().threads(2).capacity("T", 33);
                    // A checkpoint's f32 values are rounded at load.
                    let mut wide = start.clone();
                    wide.params
                        .iter_mut()
                        .for_each(|(_, t)| *t = Tensor::f32(t.shape.clone(), t.floats().into_owned()));
                    let mut s = session(plan.clone(), &g, &wide, &options).unwrap();
                    let got = run(&mut s, "infer", &start).unwrap();
                    let want = run_graph(&g, &start).unwrap();
                    same(&got, &want, &|_| 2e-5).unwrap_or_else(|e| panic!("{dtype} k={k} n={n}{tb} T={tokens}: {e}"));
                }
            }
        }
    }
}
