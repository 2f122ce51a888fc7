//! Products by cuBLASLt, against a stand-in for it: every kind of product gives what the interpreter gives, in graphs and launch by
//! launch; without the library, or where it takes no product, the kernels' own code runs. Needs LLVM, and no GPU.

use crate::cuda::{bits, did, with_driver};
use pleach_codegen::compile::{GpuOptions, compile_gpu_with, supported_gpu};
use pleach_codegen::emit::gpu::{Form, GpuChip};
use pleach_ir::{DType, Graph, Schedule, Sym};
use pleach_passes::fuse_kernels::{self, CutOptions};
use pleach_passes::{Options, Pipeline, Target, manager};
use pleach_plan::{Choice, Kernel, Meta, Plan};
use pleach_runtime::Session;
use pleach_tests::compare::{Start, run_graph, same};
use pleach_tests::compiled::{run, session};
use pleach_tests::values::symbols;
use std::sync::Arc;

/// A layer with a scaled low-rank branch, two products that meet elementwise, a residual, and a product that is all of its result.
const LAYER: &str = r#"graph core
param @0 "w" f32[64,64] frozen checkpoint("w")
param @1 "gate" f32[96,64] frozen checkpoint("gate")
param @2 "up" f32[96,64] frozen checkpoint("up")
param @3 "down" f32[64,96] frozen checkpoint("down")
param @4 "slot0.a" f32[8,64] frozen adapter(0, "a")
param @5 "slot0.b" f32[64,8] frozen adapter(0, "b")
param @6 "slot0.scale" f32[] frozen adapter(0, "scale")
entry "infer" {
  %0 = input "x" : f32[T,64]
  %1 = param @0 : f32[64,64]
  %2 = param @1 : f32[96,64]
  %3 = param @2 : f32[96,64]
  %4 = param @3 : f32[64,96]
  %5 = param @4 : f32[8,64]
  %6 = param @5 : f32[64,8]
  %7 = param @6 : f32[]
  %8 = matmul(%0, %1) {tb} : f32[T,64]
  %9 = matmul(%0, %5) {tb} : f32[T,8]
  %10 = matmul(%9, %6) {tb} : f32[T,64]
  %11 = mul(%7, %10) : f32[T,64]
  %12 = add(%8, %11) : f32[T,64]
  %13 = matmul(%12, %2) {tb} : f32[T,96]
  %14 = sigmoid(%13) : f32[T,96]
  %15 = matmul(%12, %3) {tb} : f32[T,96]
  %16 = mul(%14, %15) : f32[T,96]
  %17 = matmul(%16, %4) {tb} : f32[T,64]
  %18 = add(%12, %17) : f32[T,64]
  %19 = matmul(%18, %1) : f32[T,64]
  output "y" %18
  output "z" %19
}
"#;

/// The layer as it is compiled, or without rewriting, which moves the scale out of the way.
fn layer(rewritten: bool) -> (Graph, Schedule) {
    cut(LAYER, rewritten)
}

fn cut(text: &str, rewritten: bool) -> (Graph, Schedule) {
    let options = Options { target: Target::GPU, dtype: DType::BF16, ..Options::default() };
    let graph = pleach_ir::text::parse(text).unwrap();
    let disable = if rewritten { vec![] } else { vec!["rewrite".to_string(), "fold-params".to_string()] };
    let passes = Pipeline { disable, ..Pipeline::default() };
    let after = manager::run(&graph, &passes, &options).unwrap().graph;
    let mut s = fuse_kernels::cut(
        &after,
        &CutOptions { supported: &supported_gpu, panels: &[], blocks: Default::default(), picks: None },
    )
    .unwrap();
    fuse_kernels::order(&mut s).unwrap();
    (after, s)
}

/// The plan of the layer in these forms, and the forms there are.
fn compiled(s: &Schedule, choices: Vec<Choice>, alternatives: bool) -> (Plan, Vec<(String, Vec<Form>)>) {
    let meta = Meta { vocab: 3, ..Meta::default() };
    let options = GpuOptions { chip: GpuChip::Sm80, threads: 2, meta, choices, alternatives };
    let (plan, _, all) = compile_gpu_with(s, &options).unwrap();
    let forms = all.into_iter().map(|a| (a.signature, a.forms.iter().map(|f| f.1).collect())).collect();
    (Plan::from_bytes(&plan.to_bytes().unwrap()).unwrap(), forms)
}

/// The plan in which a library computes whatever it can.
fn by_library(s: &Schedule) -> Plan {
    let (_, forms) = compiled(s, vec![], true);
    let wanted = forms.into_iter().filter(|(_, f)| f.contains(&Form::LIBRARY));
    let choices: Vec<Choice> =
        wanted.map(|(signature, _)| Choice { signature, form: Form::LIBRARY.to_string() }).collect();
    let (plan, _) = compiled(s, choices.clone(), false);
    assert_eq!(plan.choices.len(), choices.len());
    plan
}

fn products(plan: &Plan) -> usize {
    plan.kernels.iter().filter_map(|k| k.library.as_ref()).map(|y| y.products.len()).sum()
}

fn start(g: &Graph, tokens: u64) -> Start {
    let mut counts = symbols();
    counts.insert(Sym::T, tokens);
    Start::seeded(g, counts, 11)
}

fn opened(plan: &Plan, g: &Graph) -> Session {
    let options = pleach_runtime::Options::default().capacity("T", 64);
    session(Arc::new(plan.clone()), g, &start(g, 64), &options).unwrap()
}

#[test]
fn every_kind_of_product_is_offered() {
    let plans = [true, false].map(|rewritten| by_library(&layer(rewritten).1));
    let kernels = plans.iter().flat_map(|p| &p.kernels);
    let ways: Vec<(&Kernel, _)> = kernels.filter_map(|k| Some((k, k.library.as_ref()?))).collect();
    assert!(ways.iter().all(|(k, _)| !k.launches.is_empty()), "no kernel of its own");
    let some = |of: &dyn Fn(&pleach_plan::Product) -> bool| ways.iter().flat_map(|(_, y)| &y.products).any(of);
    assert!(some(&|p| p.scale.is_some()) && some(&|p| p.adds) && some(&|p| p.right.across));
    assert!(some(&|p| p.to.offset > 0), "no rows of two groups side by side");
    assert!(some(&|p| p.to.buffer.is_some() && p.to.dtype == pleach_plan::DType::F32));
    assert!(some(&|p| p.to.buffer.is_some() && p.to.dtype == pleach_plan::DType::BF16));
    // What a kernel has for few rows of its own, it has here.
    let few =
        |l: &[pleach_plan::Launch]| l.iter().filter(|l| l.when.as_ref().is_some_and(|w| w.most.is_some())).count();
    assert!(ways.iter().all(|(k, y)| few(&k.launches) == few(&y.launches)));
    assert!(ways.iter().any(|(_, y)| few(&y.launches) > 0));
}

#[test]
fn results_that_are_no_whole_pieces_of_memory_go_through_scratch_memory() {
    let narrow = LAYER.replace("[8,64]", "[4,64]").replace("[64,8]", "[64,4]").replace("[T,8]", "[T,4]");
    let plan = by_library(&cut(&narrow, true).1);
    let all = plan.kernels.iter().filter_map(|k| k.library.as_ref()).flat_map(|y| &y.products);
    let thin: Vec<_> = all.filter(|p| p.columns == 4).collect();
    assert!(!thin.is_empty() && thin.iter().all(|p| p.to.buffer.is_none()), "{thin:?}");
}

#[test]
fn products_that_leave_their_buffers_are_refused() {
    let plan = by_library(&layer(false).1);
    pleach_plan::validate(&plan).unwrap();
    let has = |k: &Kernel| k.library.as_ref().is_some_and(|y| y.products.iter().any(|p| p.scale.is_some()));
    let number = plan.kernels.iter().position(has).unwrap();
    let damaged: [&dyn Fn(&mut pleach_plan::Product); 9] = [
        &|p| p.columns *= 2,
        &|p| p.depth *= 2,
        &|p| p.rows = p.rows.clone().mul(2),
        &|p| p.left.buffer = 99,
        &|p| p.right.stride *= 3,
        &|p| p.left.offset = 8,
        &|p| p.to.offset = 1 << 30,
        // An operand is no place for a result.
        &|p| p.to.buffer = Some(0),
        &|p| p.scale = Some(1000),
    ];
    for (i, damage) in damaged.iter().enumerate() {
        let mut bad = plan.clone();
        damage(&mut bad.kernels[number].library.as_mut().unwrap().products[0]);
        let e = pleach_plan::validate(&bad).unwrap_err().to_string();
        assert!(e.contains("by a library"), "{i}: {e}");
    }
    let mut bad = plan.clone();
    bad.kernels[number].library.as_mut().unwrap().products.clear();
    assert!(pleach_plan::validate(&bad).unwrap_err().to_string().contains("goes with products"));
}

#[test]
fn the_library_gives_what_the_interpreter_gives() {
    let test = "library::the_library_gives_what_the_interpreter_gives";
    with_driver(test, &["sm=8.0", "sm=8.0,order=at-once"], |log| {
        for rewritten in [true, false] {
            let (g, s) = layer(rewritten);
            let plan = by_library(&s);
            let mut session = opened(&plan, &g);
            assert_eq!(session.missing(), None);
            did(log);
            // Ranges of counts as in graphs: rows past the count are computed from whatever is there. Two are few rows.
            for (tokens, graphs) in [(9, 1), (10, 0), (33, 1), (40, 0), (37, 0), (2, 1)] {
                let start = start(&g, tokens);
                let want = run_graph(&g, &start).unwrap();
                session.poison().unwrap();
                let got = run(&mut session, "infer", &start).unwrap();
                same(&got, &want, &|_| 1e-2).unwrap_or_else(|e| panic!("T={tokens}: {e}"));
                // A weight that lies across has no launch for few rows.
                let few = |k: &&Kernel| k.launches.iter().any(|l| l.when.is_some());
                let across = plan.kernels.iter().filter(|k| !few(k)).filter_map(|k| k.library.as_ref());
                let by = if tokens > 8 { products(&plan) } else { across.map(|y| y.products.len()).sum() };
                assert_eq!(did(log), [graphs, 1, 0, graphs * by], "T={tokens}");
                session.set_profile(true);
                let single = run(&mut session, "infer", &start).unwrap();
                session.set_profile(false);
                assert_eq!(bits(&single), bits(&got), "T={tokens}");
                assert_eq!(did(log), [0, 0, 0, by], "T={tokens}");
            }
        }
    });
}

#[test]
fn without_the_library_the_plans_own_kernels_run() {
    with_driver("library::without_the_library_the_plans_own_kernels_run", &["sm=8.0"], |log| {
        let (g, s) = layer(true);
        let start = start(&g, 33);
        let (plain, _) = compiled(&s, vec![], false);
        let want = run(&mut opened(&plain, &g), "infer", &start).unwrap();
        // Named, and not there. The variable is read when the library is first looked for.
        // SAFETY: this process runs this test alone, on one thread.
        #[allow(unsafe_code)]
        unsafe {
            std::env::set_var(pleach_runtime::cuda::CUBLASLT, "/nonexistent/libcublasLt.so");
        }
        did(log);
        let mut session = opened(&by_library(&s), &g);
        assert!(session.missing().is_some_and(|why| why.contains("/nonexistent/libcublasLt.so")));
        let got = run(&mut session, "infer", &start).unwrap();
        assert_eq!(bits(&got), bits(&want));
        assert_eq!(did(log), [1, 1, 0, 0]);
    });
}

#[test]
fn what_the_library_does_not_take_runs_as_before_and_its_failures_are_told() {
    let test = "library::what_the_library_does_not_take_runs_as_before_and_its_failures_are_told";
    // The first product has no algorithm; the third call of the others fails.
    with_driver(test, &["sm=8.0,fail=cublasLtMatmulAlgoGetHeuristic@1:15,fail=cublasLtMatmul@3:13"], |log| {
        let (g, s) = layer(true);
        let plan = by_library(&s);
        let mut session = opened(&plan, &g);
        let start = start(&g, 20);
        let want = run_graph(&g, &start).unwrap();
        did(log);
        let e = run(&mut session, "infer", &start).unwrap_err();
        assert!(e.contains("cuBLASLt failed") && e.contains("20 rows") && e.contains("status 13"), "{e}");
        assert_eq!(did(log)[3], 2);
        // Nothing of the failure stays: not the capture either.
        let got = run(&mut session, "infer", &start).unwrap();
        same(&got, &want, &|_| 1e-2).unwrap();
        let first =
            plan.entries[0].steps.iter().filter_map(|s| plan.kernels[s.kernel as usize].library.as_ref()).next();
        assert_eq!(did(log), [1, 1, 0, products(&plan) - first.unwrap().products.len()]);
    });
}
