//! Twenty optimizer steps of every method, against PyTorch and PEFT: by the interpreter on the differentiated graph, after all
//! passes, as kernels, and compiled.

use libtest_mimic::{Arguments, Trial};
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
    for target in targets() {
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
