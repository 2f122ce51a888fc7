//! Training in bf16 beside PEFT in bf16: how far both are from the reference after twenty steps, over all fixtures that PEFT trains
//! with f32 adapters (`fixtures/train/bf16.json`, from `scripts/make_bf16_expectations.py`). One run is one draw of roundings, and on
//! a steep trajectory one draw in eight ends three times as far away as the others, so each case is trained from several starts that
//! differ by less than roundings do, and the middle counts.
//!
//! PEFT computes the adapter's branch in f32, pleach casts the trained matrices to bf16 as operands of products; it shows where
//! they are as large as the weights (`init_lora_weights = false`), and nowhere else.

use pleach_ir::DType;
use pleach_passes::fuse_kernels::{self, CutOptions};
use pleach_passes::{Options, Pipeline, manager};
use pleach_runtime::Philox;
use pleach_runtime::train::Machine;
use pleach_tests::training::{Interpreted, Program, TrainCase, cases};
use serde_json::Value;

/// The geometric mean over the fixtures of our error beside PEFT's.
const BAR: f64 = 1.25;
/// The same for one fixture; PEFT's error is one draw.
const WORST: f64 = 2.5;
/// Starts of each fixture.
const DRAWS: u32 = 5;
/// The starts are apart by half of this part of each value: less than a bf16 tells apart.
const APART: f32 = 1e-4;

/// Errors of losses and of the adapter's change, each in the middle of the draws.
fn drift(case: &TrainCase) -> Result<(f64, f64), String> {
    let o = case.open()?;
    let (tokens, _) = o.capacity();
    let hint = ["train", "accumulate", "evaluate"].map(|e| (e.to_string(), tokens));
    let options = Options { dtype: DType::BF16, tokens_hint: hint.into_iter().collect(), ..Options::default() };
    let graph = manager::run(&o.graph()?, &Pipeline::default(), &options).map_err(|e| e.to_string())?.graph;
    let cut = CutOptions { supported: &|_| Ok(()), panels: &[] };
    let schedule = fuse_kernels::schedule(&graph, &cut).map_err(|e| e.to_string())?;
    let (mut losses, mut changes) = (vec![], vec![]);
    for draw in 0..DRAWS {
        let mut machine = Interpreted::new(Program::Schedule(schedule.clone()), &o)?;
        move_apart(&mut machine, draw)?;
        let (loss, change) = o.drift(&mut machine)?;
        losses.push(loss);
        changes.push(change);
    }
    let middle = |v: &mut Vec<f64>| {
        v.sort_unstable_by(f64::total_cmp);
        v[v.len() / 2]
    };
    Ok((middle(&mut losses), middle(&mut changes)))
}

/// Changes what is trained a little; draw 0 leaves it as it is.
fn move_apart(machine: &mut Interpreted, draw: u32) -> Result<(), String> {
    let random = Philox::new(u64::from(draw));
    for (stream, name) in machine.changing().into_iter().enumerate().filter(|_| draw > 0) {
        let now = machine.read(&name).map_err(|e| e.to_string())?;
        if now.dtype != pleach_plan::DType::F32 {
            continue;
        }
        let values = now.bytes.as_chunks::<4>().0.iter().enumerate();
        let moved = values.map(|(i, b)| {
            let u = random.uniform(stream as u64, i as u64) as f32 - 0.5;
            f32::from_le_bytes(*b) * (1.0 + APART * u)
        });
        let bytes: Vec<u8> = moved.flat_map(f32::to_le_bytes).collect();
        machine.write(&name, pleach_plan::DType::F32, &bytes).map_err(|e| e.to_string())?;
    }
    Ok(())
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
