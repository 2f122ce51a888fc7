//! Layers of models of many sizes, of every method and with adapters of few and many rows, for training and inference: every kernel is
//! lowered for both chips and assembled without spills. `PLEACH_GPU_FULL=1` only (`make test-gpu-full`). Needs LLVM, `ptxas`, and no GPU.

use crate::Trials;
use pleach_codegen::emit::gpu::GpuChip;
use pleach_frontend::adapter::method_names;
use pleach_ir::DType;
use pleach_passes::Options;
use pleach_tests::gpu::sweep::Sweep;
use pleach_tests::gpu::{ptxas, schedule};
use pleach_tests::shaped::{LLAMA_3_8B, SMOLLM2, Shape};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Between the smallest and the largest: widths that are no whole tiles, heads of 64 to 128 elements, one key head for one or many of queries.
const SIZES: [Shape; 8] = [
    Shape { name: "smollm2-360m", hidden: 960, inner: 2560, heads: 15, kv_heads: 5, ..SMOLLM2 },
    Shape { name: "smollm2-1.7b", hidden: 2048, inner: 8192, heads: 32, kv_heads: 32, ..SMOLLM2 },
    Shape { name: "qwen2-0.5b", hidden: 896, inner: 4864, heads: 14, kv_heads: 2, vocab: 151_936, tied: true },
    Shape { name: "llama-3.2-1b", hidden: 2048, inner: 8192, heads: 32, kv_heads: 8, vocab: 128_256, tied: true },
    Shape { name: "tinyllama", hidden: 2048, inner: 5632, heads: 32, kv_heads: 4, vocab: 32_000, tied: false },
    Shape { name: "llama-2-7b", inner: 11008, kv_heads: 32, vocab: 32_000, ..LLAMA_3_8B },
    Shape { name: "heads-of-80", hidden: 2560, inner: 6912, heads: 32, kv_heads: 32, vocab: 50_304, tied: false },
    Shape { name: "heads-of-96", hidden: 3072, inner: 8192, heads: 32, kv_heads: 32, vocab: 32_064, tied: false },
];

pub(crate) fn trials(trials: &mut Trials) {
    if std::env::var_os("PLEACH_GPU_FULL").is_none() {
        return;
    }
    let mut cases: Vec<(Shape, &str, u64)> = vec![];
    for shape in [LLAMA_3_8B, SMOLLM2] {
        cases.extend(method_names().map(|m| (shape, m, 16)));
    }
    for shape in [LLAMA_3_8B, SMOLLM2].into_iter().chain(SIZES) {
        cases.extend([4, 8, 64].iter().flat_map(|r| ["lora", "dora", "paca"].map(|m| (shape, m, *r))));
    }
    for shape in SIZES {
        cases.extend(["lora", "dora", "paca", "full"].map(|m| (shape, m, 16)));
    }
    let sweep = Arc::new(Sweep::default());
    for (shape, method, rank) in cases {
        for dtype in [DType::BF16, DType::F32] {
            let sweep = sweep.clone();
            trials.add(format!("{}/{method}-r{rank}/{dtype}", shape.name), move || {
                check(&sweep, shape, method, rank, dtype)
            });
        }
    }
}

#[allow(clippy::print_stderr, reason = "a test that is skipped says so")]
fn check(sweep: &Sweep, shape: Shape, method: &str, rank: u64, dtype: DType) -> Result<(), String> {
    if ptxas::program().is_none() {
        eprintln!("not assembled: there is no ptxas; set PLEACH_PTXAS or run `make setup`");
    }
    let model = shape.open(1)?;
    // Some methods have no rank.
    let trains = model.training(method, rank).or_else(|_| model.training(method, 0))?;
    let entries = ["infer", "generate"];
    let runs = model.inference_with(&entries, Some(method), rank);
    let runs = runs.or_else(|_| model.inference_with(&entries, Some(method), 0))?;
    // As a plan for four rows of 2048 tokens is made: large heads run window by window.
    let hints = ["train", "accumulate", "step", "evaluate"].map(|n| (n.to_string(), 8192)).to_vec();
    let options = Options { dtype, tokens_hint: hints, length_hint: 2048, ..Options::default() };
    let mut faults = vec![];
    for (what, graph) in [("training", &trains), ("inference", &runs)] {
        let s = schedule(graph, &options, &BTreeMap::new())?;
        for chip in GpuChip::ALL {
            let found = sweep.faults(&s, chip).map_err(|e| format!("{what}, {}: {e}", chip.name()))?;
            faults.extend(found.into_iter().map(|x| format!("{what}, {}: {x}", chip.name())));
        }
    }
    if faults.is_empty() { Ok(()) } else { Err(faults.join("\n")) }
}
