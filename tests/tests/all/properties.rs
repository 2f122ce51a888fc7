//! Random graphs: the text form is a round trip, the verifier is content, and neither a pass nor the cut into kernels
//! changes what a graph computes.

use pleach_ir::{Graph, text, verify};
use pleach_passes::fuse_kernels::CutOptions;
use pleach_passes::{Options, Pipeline, Report, fuse_kernels, manager, passes};
use pleach_tests::compare::{run_graph, run_schedule, same};
use pleach_tests::random::{Case, recipe};
use proptest::prelude::*;
use proptest::test_runner::{Config, FileFailurePersistence, RngSeed, TestCaseError};

/// How often the rounding that a graph explains a changed graph may show.
const FACTOR: f64 = 4.0;

/// The same graphs on every run; `PLEACH_CASES` and `PLEACH_SEED` search further.
fn config(cases: u32) -> Config {
    let given = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/regressions/properties.txt");
    Config {
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(file))),
        max_shrink_iters: 20_000,
        rng_seed: RngSeed::Fixed(given("PLEACH_SEED").unwrap_or(1)),
        ..Config::with_cases(given("PLEACH_CASES").map_or(cases, |n| n as u32))
    }
}

fn fail(what: &str, why: impl std::fmt::Display, g: &Graph) -> TestCaseError {
    TestCaseError::fail(format!("{what}: {why}\n{g}"))
}

fn equal(what: &str, case: &Case, after: &Graph) -> Result<(), TestCaseError> {
    verify::verify(after).map_err(|e| fail(what, e, after))?;
    let start = case.start();
    let want = run_graph(&case.graph, &start).map_err(|e| fail("before", e, &case.graph))?;
    let got = run_graph(after, &start).map_err(|e| fail(what, e, after))?;
    same(&got, &want, &case.tolerance(&want, FACTOR)).map_err(|e| fail(what, format!("{e}\n{}", case.graph), after))
}

proptest! {
    #![proptest_config(config(2000))]

    #[test]
    fn text_is_a_round_trip(r in recipe(30)) {
        let g = r.build().graph;
        verify::verify(&g).map_err(|e| fail("verify", e, &g))?;
        let printed = text::print(&g);
        let again = text::parse(&printed).map_err(|e| fail("parse", e, &g))?;
        prop_assert_eq!(&again, &g);
        prop_assert_eq!(text::print(&again), printed);
    }

    #[test]
    fn graphs_run_and_stay_in_bounds(r in recipe(30)) {
        let case = r.build();
        let results = run_graph(&case.graph, &case.start()).map_err(|e| fail("run", e, &case.graph))?;
        prop_assert!(!results.is_empty());
        for (name, t) in results {
            prop_assert!(t.floats().iter().all(|x| x.abs() <= 1.1e3), "{}\n{}", name, case.graph);
        }
    }
}

proptest! {
    #![proptest_config(config(1000))]

    #[test]
    fn every_pass_keeps_the_meaning(r in recipe(24), merge: bool) {
        let case = r.build();
        let options = Options { merge, ..Options::default() };
        let core = (passes()[0].run)(&case.graph, &options, &mut Report::default()).map_err(|e| fail("canonicalize", e, &case.graph))?;
        for p in passes() {
            let after = (p.run)(&core, &options, &mut Report::default()).map_err(|e| fail(p.name, e, &core))?;
            equal(p.name, &case, &after)?;
        }
    }

    #[test]
    fn the_pipeline_keeps_the_meaning(r in recipe(24), merge: bool) {
        let case = r.build();
        let options = Options { merge, ..Options::default() };
        let run = || manager::run(&case.graph, &Pipeline::default(), &options).map_err(|e| fail("pipeline", e, &case.graph));
        let after = run()?.graph;
        equal("pipeline", &case, &after)?;
        prop_assert_eq!(run()?.graph, after);
    }

    #[test]
    fn kernels_keep_the_meaning(r in recipe(24), pack: bool, rewrite: bool) {
        let case = r.build();
        let pipeline = if rewrite { Pipeline::default() } else { Pipeline::of(&["canonicalize"]) };
        let graph = manager::run(&case.graph, &pipeline, &Options::default()).map_err(|e| fail("pipeline", e, &case.graph))?.graph;
        let options = CutOptions { supported: &|_| Ok(()), panels: if pack { &[48, 32, 16] } else { &[] }, blocks: Default::default(), picks: None };
        let s = fuse_kernels::schedule(&graph, &options).map_err(|e| fail("fuse-kernels", e, &graph))?;
        let start = case.start();
        let want = run_graph(&case.graph, &start).map_err(|e| fail("before", e, &case.graph))?;
        let got = run_schedule(&s, &start).map_err(|e| fail("schedule", format!("{e}\n{}", text::print_schedule(&s)), &graph))?;
        same(&got, &want, &case.tolerance(&want, FACTOR))
            .map_err(|e| fail("schedule", format!("{e}\n{}", text::print_schedule(&s)), &graph))?;
    }
}

/// The generator is worth its trust only if its graphs hold every operator and most steps fit.
#[test]
fn recipes_reach_every_operator() {
    use proptest::strategy::ValueTree;
    let mut runner = proptest::test_runner::TestRunner::new(config(1));
    let (mut seen, mut nodes, mut results) = (std::collections::BTreeSet::new(), 0, 0);
    for _ in 0..300 {
        let case = recipe(30).new_tree(&mut runner).expect("recipes need no filter").current().build();
        for n in &case.graph.entries[0].nodes {
            seen.insert(n.op.name());
        }
        nodes += case.graph.entries[0].nodes.len();
        results += run_graph(&case.graph, &case.start()).expect("runs").len();
    }
    let unary = pleach_ir::UnaryOp::ALL.iter().map(|x| x.1).filter(|n| !["not", "floor"].contains(n));
    let binary = pleach_ir::BinaryOp::ALL.iter().map(|x| x.1).filter(|n| !["and", "or"].contains(n));
    let others = "input param const iota add select cast matmul reduce_sum reduce_max reduce_min reshape transpose \
                  broadcast slice pad concat gather scatter_set scatter_add attention";
    let missing: Vec<&str> =
        unary.chain(binary).chain(others.split_whitespace()).filter(|n| !seen.contains(n)).collect();
    assert!(missing.is_empty(), "never made: {missing:?}");
    assert!(nodes > 300 * 20 && results > 300 * 3, "{nodes} nodes, {results} results");
}
