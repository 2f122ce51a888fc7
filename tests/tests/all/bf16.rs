//! Training in bf16 beside PEFT in bf16: how far both are from the reference after twenty steps, over all fixtures that PEFT trains
//! with f32 adapters (`fixtures/train/bf16.json`, from `scripts/make_bf16_expectations.py`).
//!
//! PEFT computes the adapter's branch in f32, pleach casts the trained matrices to bf16 as operands of products; it shows where
//! they are as large as the weights (`init_lora_weights = false`), and nowhere else. One run is one draw of roundings (AdamW's first step moves
//! an element with a gradient of nearly 0 by the whole rate, up or down): a fixture is trained from several starts a part in 10,000
//! apart, and the geometric mean of its ratios counts. The gradients of the first step depend on no draw.

use pleach_ir::{DType, Schedule};
use pleach_passes::fuse_kernels::{self, CutOptions};
use pleach_passes::{Options, Pipeline, manager};
use pleach_tests::training::{Interpreted, Opened, Program, TrainCase, cases};
use serde_json::Value;

/// The geometric mean over the fixtures of our error beside PEFT's.
const BAR: f64 = 1.25;
/// The same for one fixture, over its starts.
const WORST: f64 = 1.5;

fn schedule(o: &Opened, dtype: DType) -> Result<Schedule, String> {
    let (tokens, _) = o.capacity();
    let hint = ["train", "accumulate", "evaluate"].map(|e| (e.to_string(), tokens));
    let options = Options { dtype, tokens_hint: hint.into_iter().collect(), ..Options::default() };
    let graph = manager::run(&o.graph()?, &Pipeline::default(), &options).map_err(|e| e.to_string())?.graph;
    let cut = CutOptions { supported: &|_| Ok(()), panels: &[], blocks: Default::default(), picks: None };
    fuse_kernels::schedule(&graph, &cut).map_err(|e| e.to_string())
}

/// Our distance from the reference, from start number `k`.
fn drift(case: &TrainCase, k: u32) -> Result<[f64; 2], String> {
    let mut o = case.open()?;
    if k > 0 {
        o.start_near(k)?;
        let mut exact = Interpreted::new(Program::Schedule(schedule(&o, DType::F32)?), &o)?;
        o.refer_to(&mut exact)?;
    }
    let (losses, change) = o.drift(&mut Interpreted::new(Program::Schedule(schedule(&o, DType::BF16)?), &o)?)?;
    Ok([losses, change])
}

fn expectations() -> Value {
    let path = pleach_tests::root().join("tests/fixtures/train/bf16.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// Both distances of PEFT's run.
fn distances(theirs: &Value) -> [f64; 2] {
    ["losses", "change"].map(|k| theirs[k].as_f64().unwrap())
}

/// How far the gradients of the first step are from those in f32, as a part of their norm.
fn gradients_off(case: &TrainCase) -> Result<f64, String> {
    let o = case.open()?;
    let gradients = |dtype| o.first_gradients(&mut Interpreted::new(Program::Schedule(schedule(&o, dtype)?), &o)?);
    let (want, got) = (gradients(DType::F32)?, gradients(DType::BF16)?);
    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    Ok(norm(&mut got.iter().zip(&want).map(|(a, b)| a - b)) / norm(&mut want.iter().copied()))
}

#[test]
fn first_gradients_are_as_near_as_those_of_peft() {
    let theirs = expectations();
    let (mut log, mut worst, mut count, mut lines) = (0.0, 0.0f64, 0.0, String::new());
    for case in cases().unwrap() {
        let Some(peft) = theirs.get(&case.name).and_then(|t| t["gradients"].as_f64()) else { continue };
        let ours = gradients_off(&case).unwrap_or_else(|e| panic!("{}: {e}", case.name));
        lines += &format!("{:16} gradients {ours:.2e} beside {peft:.2e}: {:.2}\n", case.name, ours / peft);
        log += (ours / peft).ln();
        worst = worst.max(ours / peft);
        count += 1.0;
        assert!(ours > 1e-3, "bf16 must show\n{lines}");
    }
    let mean = (log / count).exp();
    assert!(count >= 10.0 && mean <= 1.0 && worst <= BAR, "{mean:.2} of PEFT's error, {worst:.2} at most\n{lines}");
}

#[test]
fn errors_are_those_of_peft_at_most() {
    let theirs = expectations();
    let (mut logs, mut count, mut largest, mut lines) = ([0.0; 2], 0.0, 0.0f64, String::new());
    for case in cases().unwrap() {
        let Some(t) = theirs.get(&case.name) else { continue };
        let starts: Vec<&Value> = std::iter::once(t).chain(t["starts"].as_array().into_iter().flatten()).collect();
        let mut own = [0.0; 2];
        for (k, theirs) in starts.iter().enumerate() {
            let peft = distances(theirs);
            let ours = drift(&case, k as u32).unwrap_or_else(|e| panic!("{}: {e}", case.name));
            lines += &format!(
                "{:16} losses {:.1e} beside {:.1e}, change {:.1e} beside {:.1e}\n",
                case.name, ours[0], peft[0], ours[1], peft[1]
            );
            largest = largest.max(ours[0]);
            (0..2).for_each(|i| own[i] += (ours[i] / peft[i]).ln() / starts.len() as f64);
        }
        for (log, own) in logs.iter_mut().zip(own) {
            assert!(own.exp() < WORST, "{:.2} of PEFT's error\n{lines}", own.exp());
            *log += own;
        }
        count += 1.0;
    }
    assert!(count >= 10.0 && largest > 1e-3, "bf16 must show\n{lines}");
    let means = logs.map(|l: f64| (l / count).exp());
    assert!(means.iter().all(|m| *m <= BAR), "losses {:.2}, change {:.2} of PEFT's error\n{lines}", means[0], means[1]);
}
