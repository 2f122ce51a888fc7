//! Real models with real adapters, in small: what PEFT computes, after each stage of the compiler, by the interpreter.

use crate::Trials;
use pleach_ir::interp::Tensor;
use pleach_ir::verify;
use pleach_passes::fuse_kernels::CutOptions;
use pleach_passes::{Options, Pipeline, fuse_kernels, manager};
use pleach_tests::compare::{Results, run_graph, run_schedule};
use pleach_tests::fixtures::{Fixture, cases};
use pleach_tests::matrix;

pub(crate) fn trials(trials: &mut Trials) {
    let list = trials.listed("cases.json", cases());
    let all = list.clone();
    trials.add("README.md's table", move || matrix::check(&all));
    for c in list {
        for merge in [false, true] {
            let (c, kind) = (c.clone(), if merge { "merged" } else { "apart" });
            trials.add(format!("{}/{kind}", c.name), move || stages(&c, merge));
        }
    }
}

fn close(stage: &str, got: &Results, output: &str, want: &Tensor, tolerance: f64) -> Result<(), String> {
    let got = got.get(&format!("infer/{output}")).ok_or_else(|| format!("{stage}: no output {output}"))?;
    let e = got.relative_error(want);
    if e <= tolerance { Ok(()) } else { Err(format!("{stage}: relative error {e:.2e}, allowed {tolerance:.0e}")) }
}

fn stages(c: &Fixture, merge: bool) -> Result<(), String> {
    let o = c.open()?;
    let want = if merge { &o.merged } else { &o.want };
    let graph = pleach_frontend::import(&o.checkpoint, &o.adapters, &["infer"]).map_err(|e| e.to_string())?;
    verify::verify(&graph).map_err(|e| e.to_string())?;
    let start = o.start(&graph)?;
    let check = |stage: &str, r: Results| close(stage, &r, &o.output, want, c.tolerance);
    check("imported", run_graph(&graph, &start).map_err(|e| e.to_string())?)?;
    let options = Options { merge, ..Options::default() };
    let after = manager::run(&graph, &Pipeline::default(), &options).map_err(|e| e.to_string())?.graph;
    check("after the passes", run_graph(&after, &start).map_err(|e| e.to_string())?)?;
    for panels in [&[] as &[u64], &[48, 32, 16], &[16]] {
        let cut = CutOptions { supported: &|_| Ok(()), panels, blocks: Default::default(), picks: None };
        let s = fuse_kernels::schedule(&after, &cut).map_err(|e| e.to_string())?;
        check("as kernels", run_schedule(&s, &start).map_err(|e| e.to_string())?)?;
    }
    Ok(())
}
