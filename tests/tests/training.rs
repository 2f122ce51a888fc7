//! Twenty optimizer steps of every method, against PyTorch and PEFT: by the interpreter on the differentiated graph, after all
//! passes, as kernels, and compiled; and every method merged.

use libtest_mimic::{Arguments, Trial};
use pleach_passes::fuse_kernels::{self, CutOptions};
use pleach_passes::{Pipeline, manager};
use pleach_tests::methods::{self, options};
use pleach_tests::training::{CHANGE, Interpreted, LOSS, Program, TrainCase, cases};
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

fn interpreted(case: &TrainCase, passes: &Pipeline, kernels: bool) -> Result<(), String> {
    let o = case.open()?;
    let graph = manager::run(&o.graph()?, passes, &options(&o)).map_err(|e| e.to_string())?.graph;
    let program = match kernels {
        false => Program::Graph(graph),
        true => {
            let cut = CutOptions { supported: &|_| Ok(()), panels: &[] };
            Program::Schedule(fuse_kernels::schedule(&graph, &cut).map_err(|e| e.to_string())?)
        }
    };
    let mut machine = Interpreted::new(program, &o)?;
    o.train(&mut machine, LOSS, CHANGE)
}

fn merged(case: &TrainCase) -> Result<(), String> {
    methods::folded(&case.open()?)
}

#[cfg(feature = "llvm")]
fn compiled(case: &TrainCase) -> Result<(), String> {
    // Every processor class for one case of each kind of graph; the best one for the others.
    let all_classes = ["llama-lora", "llama-dora", "llama-paca"].contains(&case.name.as_str());
    methods::compiled(case, if all_classes { usize::MAX } else { 1 })
}
