//! Training graphs as plans for a GPU: every kernel has code, every launch its entry, and `ptxas`, where it is at hand,
//! assembles all of it without spills. Needs LLVM, and no GPU.
#![cfg(feature = "llvm")]
#![allow(clippy::print_stderr, reason = "a test that is skipped says so")]

use pleach_codegen::compile::{compile_gpu, supported_gpu};
use pleach_codegen::emit::gpu::GpuChip;
use pleach_ir::DType;
use pleach_passes::fuse_kernels::{self, CutOptions};
use pleach_passes::{Options, Pipeline, Target, chunk, manager};
use pleach_plan::{LaunchParam, Meta, Plan};
use pleach_tests::training::cases;
use std::path::PathBuf;
use std::process::Command;

/// The plan of a training fixture.
fn plan(name: &str, dtype: DType, chip: GpuChip) -> Plan {
    let case = cases().unwrap().into_iter().find(|c| c.name == name).unwrap();
    let options = Options { target: Target::GPU, dtype, ..Options::default() };
    let graph = manager::run(&case.open().unwrap().graph().unwrap(), &Pipeline::default(), &options).unwrap().graph;
    let cut = CutOptions { supported: &supported_gpu, panels: &[] };
    let mut s = fuse_kernels::cut(&graph, &cut).unwrap();
    chunk::run(&mut s, &options).unwrap();
    fuse_kernels::order(&mut s).unwrap();
    let (plan, _) = compile_gpu(&s, chip, 2, Meta::default()).unwrap();
    let bytes = plan.to_bytes().unwrap();
    assert_eq!(compile_gpu(&s, chip, 1, Meta::default()).unwrap().0.to_bytes().unwrap(), bytes, "threads show");
    Plan::from_bytes(&bytes).unwrap()
}

/// `PLEACH_PTXAS`, or the one of the Python package in `.venv`.
fn ptxas() -> Option<PathBuf> {
    if let Some(p) = std::env::var_os("PLEACH_PTXAS") {
        return Some(p.into());
    }
    let list = |p: PathBuf| -> Vec<PathBuf> {
        let mut v: Vec<PathBuf> = std::fs::read_dir(p).into_iter().flatten().flatten().map(|d| d.path()).collect();
        v.sort();
        v
    };
    let root = pleach_tests::root().join(".venv/lib");
    let nvidia = list(root).into_iter().flat_map(|p| list(p.join("site-packages/nvidia")));
    nvidia.map(|p| p.join("bin/ptxas")).find(|p| p.exists())
}

fn assemble(name: &str, chip: GpuChip, ptx: &[u8]) {
    let Some(ptxas) = ptxas() else {
        eprintln!("skipped: {name} is not assembled, there is no ptxas; set PLEACH_PTXAS or run `make setup`");
        return;
    };
    let dir = std::env::temp_dir().join(format!("pleach-gpu-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("k.ptx"), ptx).unwrap();
    let arch = format!("-arch={}", chip.name());
    let run = Command::new(ptxas).args(["-v", &arch, "k.ptx", "-o", "k.cubin"]).current_dir(&dir).output().unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
    let said = String::from_utf8_lossy(&run.stderr).into_owned() + &String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success(), "{said}");
    let spills = said.lines().filter(|l| l.contains("bytes spill") && !l.contains(" 0 bytes spill stores, 0 bytes"));
    assert_eq!(spills.count(), 0, "{said}");
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
    for (i, b) in plan.blobs.iter().enumerate() {
        assemble(&format!("{name}-{dtype}-{}-{i}", chip.name()), chip, &b.bytes);
        let text = std::str::from_utf8(&b.bytes).unwrap();
        assert!(!text.contains("call") && !text.contains("atom."), "{name}: blob {i}");
    }
    let products = plan.blobs.iter().any(|b| b.bytes.windows(8).any(|w| w == b"mma.sync"));
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
