//! Training in bf16 beside PEFT in bf16: how far both are from the reference after twenty steps, over all fixtures that PEFT trains
//! with f32 adapters (`fixtures/train/bf16.json`, from `scripts/make_bf16_expectations.py`).
//!
//! PEFT computes the adapter's branch in f32, pleach casts the trained matrices to bf16 as operands of products; it shows where
//! they are as large as the weights (`init_lora_weights = false`), and nowhere else.

use pleach_ir::DType;
use pleach_passes::fuse_kernels::{self, CutOptions};
use pleach_passes::{Options, Pipeline, manager};
use pleach_tests::training::{Interpreted, Program, TrainCase, cases};
use serde_json::Value;

/// The geometric mean over the fixtures of our error beside PEFT's.
const BAR: f64 = 1.25;
/// The same for one fixture: one run is one draw of roundings, and some trajectories are steep.
const WORST: f64 = 5.0;

fn drift(case: &TrainCase) -> Result<(f64, f64), String> {
    let o = case.open()?;
    let (tokens, _) = o.capacity();
    let hint = ["train", "accumulate", "evaluate"].map(|e| (e.to_string(), tokens));
    let options = Options { dtype: DType::BF16, tokens_hint: hint.into_iter().collect(), ..Options::default() };
    let graph = manager::run(&o.graph()?, &Pipeline::default(), &options).map_err(|e| e.to_string())?.graph;
    let cut = CutOptions { supported: &|_| Ok(()), panels: &[] };
    let schedule = fuse_kernels::schedule(&graph, &cut).map_err(|e| e.to_string())?;
    o.drift(&mut Interpreted::new(Program::Schedule(schedule), &o)?)
}

#[test]
fn errors_are_those_of_peft_at_most() {
    let path = pleach_tests::root().join("tests/fixtures/train/bf16.json");
    let theirs: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let (mut logs, mut count, mut largest, mut lines) = ([0.0; 2], 0.0, 0.0f64, String::new());
    for case in cases().unwrap() {
        let Some(t) = theirs.get(&case.name) else { continue };
        let (losses, change) = drift(&case).unwrap_or_else(|e| panic!("{}: {e}", case.name));
        let peft = ["losses", "change"].map(|k| t[k].as_f64().unwrap());
        lines += &format!(
            "{:16} losses {losses:.1e} beside {:.1e}, change {change:.1e} beside {:.1e}\n",
            case.name, peft[0], peft[1]
        );
        for (i, ratio) in [losses / peft[0], change / peft[1]].into_iter().enumerate() {
            assert!(ratio < WORST, "{lines}");
            logs[i] += ratio.ln();
        }
        count += 1.0;
        largest = largest.max(losses);
    }
    assert!(count >= 10.0 && largest > 1e-3, "bf16 must show\n{lines}");
    let means = logs.map(|l: f64| (l / count).exp());
    assert!(means.iter().all(|m| *m <= BAR), "losses {:.2}, change {:.2} of PEFT's error\n{lines}", means[0], means[1]);
}
