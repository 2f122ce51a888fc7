//! Twenty optimizer steps of every method, against PyTorch and PEFT: by the interpreter on the differentiated graph, after all
//! passes, as kernels, and compiled; and every method merged.

use crate::Trials;
use pleach_passes::fuse_kernels::{self, CutOptions};
use pleach_passes::{Options, Pipeline, manager};
use pleach_tests::methods::{self, options};
use pleach_tests::training::{CHANGE, Interpreted, LOSS, Opened, Program, TrainCase, cases};

pub(crate) fn trials(trials: &mut Trials) {
    for case in trials.listed("tests/fixtures/train", cases()) {
        let mut trial = |kind: &str, run: fn(&TrainCase) -> Result<(), String>| {
            let case = case.clone();
            trials.add(format!("{}/{kind}", case.name), move || run(&case));
        };
        trial("differentiated", |c| interpreted(&c.open()?, &Pipeline::of(&["differentiate"]), false, false));
        trial("passes", |c| interpreted(&c.open()?, &Pipeline::default(), false, false));
        trial("kernels", |c| interpreted(&c.open()?, &Pipeline::default(), true, false));
        trial("merged", merged);
        trial("at once", at_once);
        #[cfg(feature = "llvm")]
        trial("compiled", compiled);
    }
}

fn interpreted(o: &Opened, passes: &Pipeline, kernels: bool, step_at_once: bool) -> Result<(), String> {
    let options = Options { step_at_once, ..options(o) };
    let graph = manager::run(&o.graph()?, passes, &options).map_err(|e| e.to_string())?.graph;
    if graph.entry("step").is_some() != step_at_once {
        return Err("the entry `step` is there when it is asked for, and only then".into());
    }
    let program = match kernels {
        false => Program::Graph(graph),
        true => {
            let cut = CutOptions { supported: &|_| Ok(()), panels: &[], blocks: Default::default(), picks: None };
            Program::Schedule(fuse_kernels::schedule(&graph, &cut).map_err(|e| e.to_string())?)
        }
    };
    let mut machine = Interpreted::new(program, o)?;
    o.train(&mut machine, LOSS, CHANGE)
}

/// Steps of one micro-batch without clipping, as one entry.
fn at_once(case: &TrainCase) -> Result<(), String> {
    if interpreted_at_once(case, true)? {
        #[cfg(feature = "llvm")]
        methods::compiled(case, 1, true)?;
    }
    Ok(())
}

/// The same by the interpreter, whether as it is differentiated or as kernels too; false where steps are not of this kind.
pub(crate) fn interpreted_at_once(case: &TrainCase, kernels: bool) -> Result<bool, String> {
    let o = case.open()?;
    if o.settings.accum > 1 || o.settings.max_grad_norm.is_some() || o.events()?.is_some() {
        return Ok(false);
    }
    interpreted(&o, &Pipeline::of(&["differentiate"]), false, true)?;
    if kernels {
        interpreted(&o, &Pipeline::default(), true, true)?;
    }
    Ok(true)
}

fn merged(case: &TrainCase) -> Result<(), String> {
    methods::folded(&case.open()?)
}

#[cfg(feature = "llvm")]
fn compiled(case: &TrainCase) -> Result<(), String> {
    // Every processor class for one case of each kind of graph; the best one for the others.
    let all_classes = ["llama-lora", "llama-dora", "llama-paca"].contains(&case.name.as_str());
    methods::compiled(case, if all_classes { usize::MAX } else { 1 }, false)
}
