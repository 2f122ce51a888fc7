//! Twenty optimizer steps of every method, against PyTorch and PEFT: by the interpreter on the differentiated graph, after all
//! passes, as kernels, and compiled; and every method merged.

use libtest_mimic::{Arguments, Trial};
use pleach_ir::interp::Tensor;
use pleach_ir::{Graph, Op};
use pleach_passes::fuse_kernels::{self, CutOptions};
use pleach_passes::{Options, Pipeline, manager};
use pleach_tests::training::{CHANGE, Interpreted, LOSS, Opened, Program, TrainCase, cases};
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut trials = vec![];
    match cases() {
        Err(e) => trials.push(Trial::test("tests/fixtures/train", move || Err(e.into()))),
        Ok(list) => {
            for case in list {
                let mut trial = |kind: &str, run: fn(&TrainCase) -> Result<(), String>| {
                    let case = case.clone();
                    trials.push(Trial::test(format!("{}/{kind}", case.name), move || Ok(run(&case)?)));
                };
                trial("differentiated", |c| interpreted(c, &Pipeline::of(&["differentiate"]), false));
                trial("passes", |c| interpreted(c, &Pipeline::default(), false));
                trial("kernels", |c| interpreted(c, &Pipeline::default(), true));
                trial("merged", merged);
                #[cfg(feature = "llvm")]
                trial("compiled", compiled);
            }
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn options(o: &Opened) -> Options {
    let (tokens, _) = o.capacity();
    let hint = ["train", "accumulate", "evaluate"].map(|e| (e.to_string(), tokens));
    Options { tokens_hint: hint.into_iter().collect(), ..Options::default() }
}

fn interpreted(case: &TrainCase, passes: &Pipeline, kernels: bool) -> Result<(), String> {
    let o = case.open()?;
    let graph = manager::run(&o.graph()?, passes, &options(&o)).map_err(|e| e.to_string())?.graph;
    let program = match kernels {
        false => Program::Graph(graph),
        true => {
            let cut = CutOptions { supported: &|_| Ok(()), pack: false };
            Program::Schedule(fuse_kernels::schedule(&graph, &cut).map_err(|e| e.to_string())?)
        }
    };
    let mut machine = Interpreted::new(program, &o)?;
    o.train(&mut machine, LOSS, CHANGE)
}

/// For inference every method merges: the layers that it changes become one product each, with the same results.
fn merged(case: &TrainCase) -> Result<(), String> {
    let o = case.open()?;
    let (graph, inputs) = o.inference()?;
    let options = Options { merge: true, ..options(&o) };
    let after = manager::run(&graph, &Pipeline::default(), &options).map_err(|e| e.to_string())?.graph;
    let left = |g: &Graph| {
        let infer = g.entry("infer").map(|e| e.nodes.iter()).into_iter().flatten();
        let products = infer.clone().filter(|n| matches!(n.op, Op::MatMul { .. })).count();
        let reads = infer.filter_map(|n| match n.op {
            Op::Param(p) => Some(&g.params[p.index()]),
            _ => None,
        });
        let factors = reads.filter(|p| [".lora_", ".paca_", ".scale"].iter().any(|part| p.name.contains(part))).count();
        (products, factors)
    };
    // An embedding's branch stays: its table is looked up, not multiplied.
    let branches = o.adapters[0].sites.iter().filter(|s| s.embedding).count();
    let layers = 7 * 2 + 1;
    let (products, factors) = left(&after);
    if products > layers + branches || (branches == 0 && factors > 0) {
        return Err(format!("{products} products and {factors} tensors of the adapter are left after merging"));
    }
    let run = |g: &Graph| -> Result<Tensor, String> {
        let mut machine = Interpreted::new(Program::Graph(g.clone()), &o)?;
        machine.entry("infer", &inputs)?.outputs.remove("logits").ok_or_else(|| "no logits".to_string())
    };
    let error = run(&after)?.relative_error(&run(&graph)?);
    if error <= 2e-5 { Ok(()) } else { Err(format!("merged and unmerged differ by {error:.1e}")) }
}

#[cfg(feature = "llvm")]
fn compiled(case: &TrainCase) -> Result<(), String> {
    use pleach_plan::Meta;
    use pleach_tests::compare::Start;
    use pleach_tests::compiled::{plan_with, session, targets};
    let o = case.open()?;
    let graph = o.graph()?;
    let params = o.values(&graph.params)?;
    let start = Start { symbols: Default::default(), params, inputs: Default::default() };
    let (tokens, sequences) = o.capacity();
    let meta = Meta { vocab: o.checkpoint.config.vocab(), max_positions: 64, ..Meta::default() };
    // Every processor class for one case of each kind of graph; the best one for the others.
    let all_classes = ["llama-lora", "llama-dora", "llama-paca"].contains(&case.name.as_str());
    for target in targets().into_iter().take(if all_classes { usize::MAX } else { 1 }) {
        let plan =
            std::sync::Arc::new(plan_with(&graph, &Pipeline::default(), false, &options(&o), &target, meta.clone())?);
        let capacities = [("T", tokens), ("L", tokens), ("S", sequences), ("P", 64), ("C", 1)];
        let all =
            capacities.iter().fold(pleach_runtime::Options::default().threads(2), |all, (s, n)| all.capacity(s, *n));
        let mut session = session(plan, &graph, &start, &all)?;
        o.train(&mut session, LOSS, CHANGE).map_err(|e| format!("{target:?}: {e}"))?;
    }
    Ok(())
}
