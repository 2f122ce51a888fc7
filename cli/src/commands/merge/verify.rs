//! Merged against unmerged: both run on the same random prompts.

use crate::args::{DType, MergeArgs, ModelArgs, Target};
use crate::failure::{Failure, Result};
use crate::inputs::{InferInputs, Sequences};
use crate::ready::ready;
use crate::report::Ui;
use pleach_frontend::{Dtype, TensorTable};
use pleach_runtime::Philox;

/// Tokens of a prompt.
const LENGTH: u64 = 32;

/// The largest difference over the largest magnitude of the results, over `prompts` prompts.
///
/// # Errors
/// Whatever compiling or running refuses.
pub(super) fn compare(ui: &Ui, args: &MergeArgs, prompts: u64) -> Result<f64> {
    let model = |dir: &std::path::Path, adapters| ModelArgs {
        model: dir.to_owned(),
        weights: None,
        adapter: adapters,
        merge: false,
        dtype: DType::F32,
        target: Target::Cpu,
        no_cache: false,
        no_blocks: true,
        disable: vec![],
        disable_rule: vec![],
    };
    let unmerged = run(ui, &model(&args.model, vec![args.adapter.clone()]), prompts)?;
    let merged = run(ui, &model(&args.out, vec![]), prompts)?;
    let pairs = || unmerged.iter().zip(&merged).map(|(a, b)| (f64::from(*a), f64::from(*b)));
    let peak = pairs().map(|(a, _)| a.abs()).fold(f64::MIN_POSITIVE, f64::max);
    Ok(pairs().map(|(a, b)| (a - b).abs()).fold(0.0, |m, x| if x > m || x.is_nan() { x } else { m }) / peak)
}

fn run(ui: &Ui, args: &ModelArgs, prompts: u64) -> Result<Vec<f32>> {
    let ready = ready(ui, args, &["infer"], &[])?;
    let m = &ready.plan.meta;
    let length = LENGTH.min(m.max_positions.max(1));
    let random = Philox::new(0);
    let list: Vec<Vec<i32>> = (0..prompts.max(1))
        .map(|p| (0..length).map(|t| (random.uniform(p, t) * m.vocab as f64) as i32).collect())
        .collect();
    let s = Sequences::pack(&list)?;
    let needed = [("T", s.ids.len() as u64), ("S", s.len() as u64), ("C", 1), ("P", s.longest())];
    let mut session = ready.session(ui, &[], &needed)?;
    let name = if ready.is_encoder() { "last_hidden_state" } else { "logits" };
    let inputs = InferInputs::new(&s, ready.is_encoder());
    Ok(session.run("infer", &inputs.values())?.f32(name)?.to_vec())
}

/// Fails past what the rounding of the checkpoint's type explains.
///
/// # Errors
/// The difference is larger.
pub(super) fn judge(error: f64, table: &TensorTable) -> Result<()> {
    let has = |d: Dtype| table.iter().any(|t| t.dtype == d);
    let (name, bound) = match (has(Dtype::Bf16), has(Dtype::F16)) {
        (true, _) => ("BF16", 5e-2),
        (_, true) => ("F16", 1e-2),
        _ => ("F32", 2e-4),
    };
    if error <= bound {
        return Ok(());
    }
    Err(Failure::new(format!(
        "the merged model differs from the unmerged one by {error:.2e}, more than the {bound:.0e} that rounding to {name} \
         explains; do not use it, and run `pleach adapter check`"
    )))
}
