//! Training graphs as plans for a GPU: every kernel has code, every launch its entry, and `ptxas`, where it is at hand,
//! assembles all of it without spills. Needs LLVM, and no GPU.
#![allow(clippy::print_stderr, reason = "a test that is skipped says so")]

use pleach_codegen::compile::{GpuOptions, compile_gpu, compile_gpu_with};
use pleach_codegen::emit::gpu::GpuChip;
use pleach_ir::{BlockFormat, DType, Graph, Layout, Schedule};
use pleach_passes::Options;
use pleach_plan::{LaunchParam, Meta, Plan};
use pleach_tests::gpu::{self, blocks, ptxas};
use pleach_tests::shaped::{self, Shape};
use pleach_tests::training::cases;
use std::collections::BTreeMap;

/// A graph cut into kernels.
fn schedule(graph: &Graph, dtype: DType) -> Schedule {
    schedule_with(graph, dtype, &BTreeMap::new())
}

/// The same where the checkpoint has these tensors in blocks too.
fn schedule_with(graph: &Graph, dtype: DType, blocks: &BTreeMap<String, BlockFormat>) -> Schedule {
    // As a plan for four rows of 2048 tokens is made: large heads run window by window.
    let hints = ["train", "accumulate", "step", "evaluate"].map(|n| (n.to_string(), 8192)).to_vec();
    let options = Options { dtype, tokens_hint: hints, length_hint: 2048, ..Options::default() };
    let clock = std::time::Instant::now();
    let s = gpu::schedule(graph, &options, blocks).unwrap();
    eprintln!("passes and kernels {:.1?}", clock.elapsed());
    s
}

/// The plan of a training fixture.
fn plan(name: &str, dtype: DType, chip: GpuChip) -> Plan {
    let case = cases().unwrap().into_iter().find(|c| c.name == name).unwrap();
    let s = schedule(&case.open().unwrap().graph().unwrap(), dtype);
    let (plan, _) = compile_gpu(&s, chip, 2, Meta::default()).unwrap();
    let bytes = plan.to_bytes().unwrap();
    assert_eq!(compile_gpu(&s, chip, 1, Meta::default()).unwrap().0.to_bytes().unwrap(), bytes, "threads show");
    Plan::from_bytes(&bytes).unwrap()
}

/// Assembles the code of a plan: no spills, no stack.
fn assemble(name: &str, plan: &Plan) {
    let faults = spilling(name, plan);
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// Assembles the code of a plan: the launches that spill or use the stack, in words.
fn spilling(name: &str, plan: &Plan) -> Vec<String> {
    let Some(program) = ptxas::program() else {
        eprintln!("skipped: {name} is not assembled, there is no ptxas; set PLEACH_PTXAS or run `make setup`");
        return vec![];
    };
    let mut all = BTreeMap::new();
    for b in &plan.blobs {
        let own = pleach_codegen::ptxas::assemble(&program, &b.bytes, &plan.target.arch);
        all.extend(own.unwrap_or_else(|e| panic!("{name}: {e}")));
    }
    let table = std::env::var_os("PLEACH_RESOURCES").is_some();
    let mut faults = vec![];
    for l in plan.kernels.iter().flat_map(|k| &k.launches) {
        let r = all[&l.function];
        if table {
            eprintln!("{name} {:60} {:4} threads {:6} shared {r:?}", l.function, l.block, l.shared_bytes);
        }
        if r.spills > 0 || r.stack > 0 {
            faults.push(format!("{name}: {} has {r:?}", l.function));
        }
    }
    faults
}

fn check(name: &str, dtype: DType, chip: GpuChip) {
    let plan = plan(name, dtype, chip);
    assert_eq!(plan.target.arch, chip.name());
    for k in &plan.kernels {
        let text = std::str::from_utf8(&plan.blobs[k.blob as usize].bytes).unwrap();
        for l in &k.launches {
            let entry = text.split(&format!(".visible .entry {}(", l.function)).nth(1);
            let head = entry.and_then(|e| e.split(')').next()).unwrap_or_else(|| panic!("no entry {}", l.function));
            assert_eq!(head.matches(".param").count(), l.params.len(), "{head}");
            assert!(l.params.contains(&LaunchParam::Dims));
        }
    }
    assemble(&format!("{name} {dtype}"), &plan);
    for (i, b) in plan.blobs.iter().enumerate() {
        let text = std::str::from_utf8(&b.bytes).unwrap();
        assert!(!text.contains("call") && !text.contains("atom."), "{name}: blob {i}");
    }
    let products = plan.blobs.iter().any(|b| b.bytes.windows(8).any(|w| w == b"mma.sync" || w == b"wgmma.mm"));
    assert_eq!(products, dtype == DType::BF16);
}

#[test]
fn lora_in_f32() {
    check("llama-lora", DType::F32, GpuChip::Sm80);
}

#[test]
fn paca_in_bf16() {
    check("llama-paca", DType::BF16, GpuChip::Sm80);
    check("llama-paca", DType::BF16, GpuChip::Sm90a);
}

#[test]
fn other_models_and_methods() {
    check("qwen2-dora", DType::F32, GpuChip::Sm80);
    check("mistral-lora", DType::BF16, GpuChip::Sm80);
    check("llama-full", DType::BF16, GpuChip::Sm80);
}

/// Compiles a graph for a chip and assembles it.
fn shaped_plan(name: &str, graph: &Graph, dtype: DType, chip: GpuChip) -> Plan {
    let s = schedule(graph, dtype);
    let (plan, times) = compile_gpu(&s, chip, 2, Meta::default()).unwrap();
    let launches: usize = plan.entries.iter().map(|e| e.steps.len()).sum();
    eprintln!("{name} {}: {} kernels, {launches} launches, {times:?}", chip.name(), plan.kernels.len());
    assemble(&format!("{name} {}", chip.name()), &plan);
    plan
}

#[test]
fn a_layer_of_a_large_model_trains() {
    let model = shaped::LLAMA_3_8B.open(1).unwrap();
    for (method, chip) in [("lora", GpuChip::Sm80), ("lora", GpuChip::Sm90a), ("paca", GpuChip::Sm90a)] {
        let graph = model.training(method, 16).unwrap();
        shaped_plan(&format!("llama-3-8b {method}"), &graph, DType::BF16, chip);
    }
}

#[test]
fn small_models_run() {
    let graph = shaped::SMOLLM2.open(2).unwrap().inference(&["infer", "generate"], 8).unwrap();
    shaped_plan("smollm2", &graph, DType::BF16, GpuChip::Sm90a);
    let graph = shaped::minilm().unwrap().inference(&["infer"], 0).unwrap();
    shaped_plan("minilm", &graph, DType::F32, GpuChip::Sm80);
    shaped_plan("minilm", &graph, DType::BF16, GpuChip::Sm90a);
}

/// All matrices of a model in one format.
fn in_format(graph: &Graph, format: BlockFormat) -> BTreeMap<String, BlockFormat> {
    blocks::formats(graph).into_keys().map(|name| (name, format)).collect()
}

/// Matrices in blocks: no product reads a weight as numbers, none of the code spills, and less is read.
#[test]
fn weights_in_blocks() {
    let model = shaped::LLAMA_3_8B.open(1).unwrap();
    let small = shaped::SMOLLM2.open(2).unwrap().inference(&["infer", "generate"], 8).unwrap();
    let trains = model.training("lora", 16).unwrap();
    for (name, graph, chip, format) in [
        ("train", &trains, GpuChip::Sm90a, BlockFormat::Q4_0),
        ("train", &trains, GpuChip::Sm80, BlockFormat::Q8_0),
        ("infer", &small, GpuChip::Sm90a, BlockFormat::Q4_1),
    ] {
        let formats = in_format(graph, format);
        let s = schedule_with(graph, DType::BF16, &formats);
        let read = |l: &Layout| s.params.iter().filter(|(_, x)| x == l).count();
        assert!(
            read(&Layout::Blocks(format)) >= formats.len(),
            "{name}: {} of {}",
            read(&Layout::Blocks(format)),
            formats.len()
        );
        let (plan, _) = compile_gpu(&s, chip, 2, Meta::default()).unwrap();
        let stored = |b: &u32, e: &pleach_plan::Entry| match e.buffers[*b as usize].kind {
            pleach_plan::BufferKind::Param(p) => Some(&plan.params[p as usize]),
            _ => None,
        };
        for e in plan.entries.iter().filter(|e| e.prepares().is_none()) {
            for step in e.steps.iter().filter(|s| plan.kernels[s.kernel as usize].class == "contraction") {
                for p in step.buffers.iter().filter_map(|b| stored(b, e)) {
                    let numbers = p.layout == pleach_plan::Layout::RowMajor && formats.contains_key(&p.name);
                    assert!(!numbers, "{name}: {} reads {}", plan.kernels[step.kernel as usize].symbol, p.name);
                }
            }
        }
        assemble(&format!("{name} in {}", format.name()), &plan);
    }
}

/// Lines of an entry's values, and what becomes of them.
#[derive(Default)]
struct Text {
    lines: Vec<String>,
    outputs: Vec<usize>,
}

impl Text {
    fn value(&mut self, line: &str) -> usize {
        self.lines.push(line.to_string());
        self.lines.len() - 1
    }

    fn input(&mut self, name: &str, ty: &str) -> usize {
        self.value(&format!("input \"{name}\" : {ty}"))
    }

    fn graph(&self) -> Graph {
        let lines = self.lines.iter().enumerate().map(|(i, l)| format!("%{i} = {l}\n"));
        let outputs = self.outputs.iter().map(|v| format!("output \"r{v}\" %{v}\n"));
        let text = format!("graph core\nentry \"infer\" {{\n{}}}\n", lines.chain(outputs).collect::<String>());
        pleach_ir::text::parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}"))
    }
}

/// Kernels that have more on their way than a thread has registers, if all of it is on its way at once.
#[test]
fn what_reads_much_keeps_little() {
    // A stream to which one thing after the other is added, every state of it a result.
    let mut t = Text::default();
    let wide = "f32[T,4096]";
    let mut stream = t.input("x", "bf16[T,4096]");
    for i in 0..48 {
        let (x, m) = (t.input(&format!("x{i}"), wide), t.input(&format!("m{i}"), "f32[4096]"));
        let m = t.value(&format!("broadcast(%{m}) {{axes = [1]}} : {wide}"));
        let x = t.value(&format!("mul(%{x}, %{m}) : {wide}"));
        let old = t.value(&format!("cast(%{stream}) : {wide}"));
        let sum = t.value(&format!("add(%{old}, %{x}) : {wide}"));
        stream = t.value(&format!("cast(%{sum}) : bf16[T,4096]"));
        t.outputs.push(stream);
    }
    let stream = t.graph();
    // A product whose elements meet many others; its sum is over few steps.
    let mut t = Text::default();
    let (wide, half) = ("f32[T,4096]", "bf16[T,4096]");
    let (x, w) = (t.input("x", "bf16[T,576]"), t.input("w", "bf16[576,4096]"));
    let y = t.value(&format!("matmul(%{x}, %{w}) : {wide}"));
    for i in 0..2 {
        let [a, b, c] = [0, 1, 2].map(|n| t.input(&format!("{i}{n}"), wide));
        let [a, b] = [a, b].map(|a| t.value(&format!("mul(%{y}, %{a}) : {wide}")));
        let b = t.value(&format!("mul(%{b}, %{c}) : {wide}"));
        let sum = t.value(&format!("add(%{a}, %{b}) : {wide}"));
        let short = t.value(&format!("cast(%{sum}) : {half}"));
        t.outputs.extend([sum, short]);
    }
    let product = t.graph();
    // Three results of one thin product.
    let mut t = Text::default();
    let (x, w) = (t.input("x", "bf16[T,4096]"), t.input("w", "bf16[48,4096]"));
    let y = t.value(&format!("matmul(%{x}, %{w}) {{tb}} : f32[T,48]"));
    for i in 0..3 {
        let part = t.value(&format!("slice(%{y}) {{axis = 1, start = {}, end = {}}} : f32[T,16]", 16 * i, 16 * i + 16));
        let part = t.value(&format!("cast(%{part}) : bf16[T,16]"));
        t.outputs.push(part);
    }
    let thin = t.graph();
    // Hundreds of terms of one sum.
    let mut t = Text::default();
    let terms: Vec<String> = (0..420)
        .map(|i| {
            let x = t.input(&format!("x{i}"), "f32[]");
            format!("%{}", t.value(&format!("sqrt(%{x}) : f32[]")))
        })
        .collect();
    let sum = t.value(&format!("add({}) : f32[]", terms.join(", ")));
    t.outputs.push(sum);
    let sum = t.graph();
    for chip in GpuChip::ALL {
        for (name, graph, kernels) in
            [("stream", &stream, 2), ("product", &product, 1), ("thin", &thin, 1), ("sum", &sum, 1)]
        {
            let plan = shaped_plan(name, graph, DType::F32, chip);
            assert_eq!(plan.kernels.len(), kernels, "{name}");
        }
    }
}

/// Layers of a few sizes each, whose kernels leave a thread few registers: products of a width that is no whole tile, that meet in one
/// gradient; rows of which a thread keeps many elements, or several values of each; adapters of fewer rows than a tile has.
#[test]
fn sizes_that_need_registers() {
    let tiny = Shape { name: "tiny", hidden: 256, inner: 512, heads: 4, kv_heads: 2, vocab: 512, tied: false };
    let ragged = Shape { name: "ragged", vocab: 512, ..shaped::SMOLLM2 };
    let vocabulary = Shape { name: "vocabulary", vocab: 32_000, ..tiny };
    let wide = Shape { name: "wide", inner: 14336, ..tiny };
    let deep = Shape { name: "deep", hidden: 4096, heads: 32, ..tiny };
    for (shape, method, rank, chip) in [
        (&ragged, "paca", 16, GpuChip::Sm80),
        (&vocabulary, "lora", 8, GpuChip::Sm80),
        (&wide, "adalora", 16, GpuChip::Sm90a),
        (&deep, "lora", 8, GpuChip::Sm90a),
    ] {
        let graph = shape.open(1).unwrap().training(method, rank).unwrap();
        shaped_plan(&format!("{} {method}", shape.name), &graph, DType::BF16, chip);
    }
}

/// Every form that a kernel of a layer's training step can have.
#[test]
#[ignore = "takes minutes: `make test-gpu-full`"]
fn every_form_of_a_layer() {
    for chip in GpuChip::ALL {
        let graph = shaped::LLAMA_3_8B.open(1).unwrap().training("lora", 16).unwrap();
        let s = schedule(&graph, DType::BF16);
        let options = GpuOptions { chip, threads: 2, meta: Meta::default(), choices: vec![], alternatives: true };
        let (plan, _, all) = compile_gpu_with(&s, &options).unwrap();
        let forms: usize = all.iter().map(|a| a.forms.len()).sum();
        assert!(all.len() > 10 && plan.kernels.len() == s.kernels.len() + forms - all.len(), "{} {forms}", all.len());
        assemble(&format!("forms {}", chip.name()), &plan);
    }
}

/// Everything that the numbers of the project are about, whole: training with several methods, and inference.
#[test]
#[ignore = "takes minutes: `make test-gpu-full`"]
fn whole_models() {
    let (mut faults, mut in_blocks) = (vec![], vec![]);
    let mut check = |name: &str, graph: &Graph, dtype: DType, chip: GpuChip| {
        let s = schedule(graph, dtype);
        let (plan, times) = compile_gpu(&s, chip, 2, Meta::default()).unwrap();
        let launches: usize = plan.entries.iter().map(|e| e.steps.len()).sum();
        eprintln!("{name} {} {dtype}: {} kernels, {launches} launches, {times:?}", chip.name(), plan.kernels.len());
        faults.extend(spilling(&format!("{name} {} {dtype}", chip.name()), &plan));
    };
    for chip in GpuChip::ALL {
        let large = shaped::LLAMA_3_8B.open(32).unwrap();
        for method in ["lora", "paca", "dora"] {
            let graph = large.training(method, 16).unwrap();
            check(&format!("llama-3-8b {method}"), &graph, DType::BF16, chip);
        }
        let graph = large.inference(&["infer", "generate"], 16).unwrap();
        check("llama-3-8b infer, generate", &graph, DType::BF16, chip);
        // Layers are equal.
        let one = shaped::LLAMA_3_8B.open(1).unwrap();
        for format in BlockFormat::ALL {
            for (name, graph) in [
                ("infer, generate", one.inference(&["infer", "generate"], 16).unwrap()),
                ("lora", one.training("lora", 16).unwrap()),
                ("paca", one.training("paca", 16).unwrap()),
                ("dora", one.training("dora", 16).unwrap()),
            ] {
                let s = schedule_with(&graph, DType::BF16, &in_format(&graph, format));
                let (plan, _) = compile_gpu(&s, chip, 2, Meta::default()).unwrap();
                let name = format!("llama-3-8b {name} in {} {}", format.name(), chip.name());
                in_blocks.extend(spilling(&name, &plan));
            }
        }
        let small = shaped::SMOLLM2.open(30).unwrap();
        for dtype in [DType::BF16, DType::F32] {
            check("smollm2 lora", &small.training("lora", 8).unwrap(), dtype, chip);
            let graph = small.inference(&["infer", "generate"], 8).unwrap();
            check("smollm2 infer, generate", &graph, dtype, chip);
            let graph = shaped::minilm().unwrap().inference(&["infer"], 0).unwrap();
            check("minilm", &graph, dtype, chip);
        }
    }
    faults.extend(in_blocks);
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}
