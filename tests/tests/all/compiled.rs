//! Compiled code beside the interpreter: random graphs, every rank, every number of tokens.
//!
//! `PLEACH_CASES` and `PLEACH_SEED` search further than a test run does.

use pleach_ir::interp::Tensor;
use pleach_ir::{BinaryOp, DType, Dim, Entry, Graph, Op, Param, Role, Source, Sym, TensorType};
use pleach_passes::Options;
use pleach_plan::Meta;
use pleach_tests::compare::{Start, run_graph, same};
use pleach_tests::compiled::{plan_of, run, session, targets};
use pleach_tests::random::{Case, recipe};
use proptest::prelude::*;
use proptest::test_runner::{Config, FileFailurePersistence, RngSeed, TestCaseError};
use std::sync::Arc;

/// How often the rounding that a graph explains compiled code may show: sums in f32, functions by polynomials.
const FACTOR: f64 = 16.0;

fn config(cases: u32) -> Config {
    let given = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/regressions/compiled.txt");
    Config {
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(file))),
        max_shrink_iters: 300,
        rng_seed: RngSeed::Fixed(given("PLEACH_SEED").unwrap_or(1)),
        ..Config::with_cases(given("PLEACH_CASES").map_or(cases, |n| n as u32))
    }
}

/// What a session gives for `start`, against the interpreter. State is zeros in both.
fn agree(
    graph: &Graph,
    start: &Start,
    s: &mut pleach_runtime::Session,
    tolerance: impl Fn(&pleach_tests::compare::Results, &str) -> f64,
) -> Result<(), String> {
    let mut want = run_graph(graph, start).map_err(|e| e.to_string())?;
    want.retain(|name, _| !name.contains("/@"));
    let got = run(s, "infer", start)?;
    same(&got, &want, &|name| tolerance(&want, name))
}

/// Seeded values with empty state.
fn start(graph: &Graph, case: &Case, tokens: u64) -> Start {
    let mut symbols = case.symbols.clone();
    symbols.insert(Sym::T, tokens);
    let mut start = Start::seeded(graph, symbols, case.seed);
    for p in graph.params.iter().filter(|p| p.source == Source::Zeros) {
        if let Some(t) = start.params.get_mut(&p.name) {
            *t = Tensor::zeros(t.dtype(), t.shape.clone());
        }
    }
    start
}

fn capacities(start: &Start, tokens: u64, threads: usize) -> pleach_runtime::Options {
    let mut o = pleach_runtime::Options::default().threads(threads).capacity("T", tokens);
    for (s, n) in start.symbols.iter().filter(|(s, _)| ![Sym::T, Sym::S1].contains(s)) {
        o = o.capacity(s.as_str(), *n);
    }
    o
}

fn compiled_equals_interpreted(r: &pleach_tests::random::Recipe, merge: bool) -> Result<(), String> {
    let case = r.build();
    let graph = &case.graph;
    let most = case.symbols[&Sym::T];
    for target in targets() {
        let plan = Arc::new(plan_of(graph, &Options { merge, ..Options::default() }, &target, Meta::default())?);
        // The same plan at the largest and at the smallest count. Bounds hold for fewer tokens, too.
        for tokens in [most, 1] {
            let start = start(graph, &case, tokens);
            let mut s = session(plan.clone(), graph, &start, &capacities(&start, most, 2))?;
            agree(graph, &start, &mut s, |want, name| case.tolerance(want, FACTOR)(name))?;
        }
    }
    Ok(())
}

/// `y = x Wᵀ + scale · (x Aᵀ) Bᵀ + bias`, then a second layer on tanh(y), so that both ends of a product are fused.
fn adapted(rank: u64, input: u64, output: u64) -> Graph {
    let mut g = Graph::default();
    let mut e = Entry::new("infer");
    let x = Op::Input { name: "x".into(), dtype: DType::F32, shape: vec![Dim::Symbol(Sym::T), input.into()] };
    let x = e.push(&[], x, &[]).expect("an input");
    let mut param = |e: &mut Entry, name: &str, slot: bool, shape: &[u64]| {
        let key = name.to_string();
        let source = if slot { Source::Adapter { slot: 0, key } } else { Source::Checkpoint(key) };
        let ty = TensorType::new(DType::F32, shape.iter().copied());
        let p = g.add_param(Param { name: name.into(), ty, role: Role::Frozen, source });
        e.push(&g.params, Op::Param(p), &[]).expect("a parameter")
    };
    let tb = Op::MatMul { ta: false, tb: true };
    let (w, b) = (param(&mut e, "w", false, &[output, input]), param(&mut e, "bias", false, &[output]));
    let (down, up) = (param(&mut e, "A", true, &[rank, input]), param(&mut e, "B", true, &[output, rank]));
    let (scale, v) = (param(&mut e, "scale", true, &[]), param(&mut e, "v", false, &[7, output]));
    let mut push = |op, x: &[pleach_ir::ValueId]| e.push(&g.params, op, x).expect("fits");
    let shape = vec![Dim::Symbol(Sym::T), output.into()];
    let base = push(tb.clone(), &[x, w]);
    let low = push(tb.clone(), &[x, down]);
    let high = push(tb.clone(), &[low, up]);
    let scaled = push(Op::Binary(BinaryOp::Mul), &[scale, high]);
    let bias = push(Op::Broadcast { shape, axes: vec![1] }, &[b]);
    let y = push(Op::Add, &[base, scaled, bias]);
    let t = push(Op::Unary(pleach_ir::UnaryOp::Tanh), &[y]);
    let z = push(tb, &[t, v]);
    e.output("y", y);
    e.output("z", z);
    g.entries.push(e);
    g
}

fn any_rank(rank: u64, tokens: u64, input: u64, output: u64, merge: bool) -> Result<(), String> {
    let graph = adapted(rank, input, output);
    for target in targets() {
        let plan = Arc::new(plan_of(&graph, &Options { merge, ..Options::default() }, &target, Meta::default())?);
        let symbols = [(Sym::T, tokens)].into_iter().collect();
        let start = Start::seeded(&graph, symbols, rank);
        let mut s = session(plan.clone(), &graph, &start, &capacities(&start, tokens, 2))?;
        agree(&graph, &start, &mut s, |_, _| 1e-5)?;
        // One plan, one thread more, the same bits.
        let first = run(&mut s, "infer", &start)?;
        let mut more = session(plan, &graph, &start, &capacities(&start, tokens, 3))?;
        if run(&mut more, "infer", &start)? != first {
            return Err("another number of threads gives other bits".into());
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(config(30))]

    #[test]
    fn random_graphs(r in recipe(16), merge: bool) {
        compiled_equals_interpreted(&r, merge).map_err(|e| TestCaseError::fail(format!("{e}\n{}", r.build().graph)))?;
    }

    #[test]
    fn every_rank_and_count(rank in 1..=300u64, tokens in 1..=70u64, input in 1..=200u64, output in 1..=150u64, merge: bool) {
        any_rank(rank, tokens, input, output, merge).map_err(TestCaseError::fail)?;
    }
}
