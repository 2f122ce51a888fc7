//! `--target cuda` from end to end: the real binary against the stand-in driver, whose launches run in the PTX simulator.
//! Results against the processor's; graphs replayed at other counts, adapters exchanged, runs killed and resumed, and every way
//! in which a driver or a GPU can be the wrong one.

use crate::kit::{Folder, Pleach, fixture, relative, tensors};
use serde_json::Value;
use std::path::Path;

/// Largest difference to the processor, relative to the largest value: both compute in f32, in another order.
const F32: f64 = 2e-5;

pub(crate) struct Gpu {
    folder: Folder,
    pub(crate) cpu: Pleach,
    pub(crate) model: String,
}

impl Gpu {
    pub(crate) fn new(name: &str) -> Gpu {
        let folder = Folder::new(name);
        let cpu = Pleach::new(&folder);
        Gpu { cpu, model: fixture("llama-tiny").display().to_string(), folder }
    }

    /// The binary with the stand-in driver, which has these properties, and without cuBLASLt.
    pub(crate) fn with(&self, properties: &str) -> Pleach {
        self.with_library(properties, "/nonexistent/libcublasLt.so")
    }

    /// The same with a stand-in for cuBLASLt.
    pub(crate) fn with_cublaslt(&self, properties: &str) -> Pleach {
        self.with_library(properties, &pleach_fake_cuda::library().display().to_string())
    }

    fn with_library(&self, properties: &str, cublaslt: &str) -> Pleach {
        let library = pleach_fake_cuda::library();
        assert!(library.is_file(), "{} is missing; build the whole workspace", library.display());
        let log = format!("{properties},log={}", self.log().display());
        self.cpu.with_env(&[
            ("PLEACH_CUDA_LIBRARY", &library.display().to_string()),
            ("PLEACH_CUBLASLT_LIBRARY", cublaslt),
            (pleach_fake_cuda::VARIABLE, &log),
        ])
    }

    fn log(&self) -> std::path::PathBuf {
        self.folder.join("driver.log")
    }

    /// What the driver did since the last call, by kind: graphs made, replays, arguments set, single launches.
    fn did(&self) -> [usize; 4] {
        let text = std::fs::read_to_string(self.log()).unwrap_or_default();
        let _ = std::fs::remove_file(self.log());
        ["graph", "replay", "set", "launch"].map(|k| text.lines().filter(|l| l.starts_with(k)).count())
    }

    /// How many products cuBLASLt was given since the last call.
    pub(crate) fn products(&self) -> usize {
        let text = std::fs::read_to_string(self.log()).unwrap_or_default();
        let _ = std::fs::remove_file(self.log());
        text.lines().filter(|l| l.starts_with("product")).count()
    }

    pub(crate) fn file(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }

    pub(crate) fn logits(&self, pleach: &Pleach, name: &str, more: &[&str]) -> Vec<f64> {
        let out = self.file(name);
        pleach.ok(&[&["run", &self.model, "--out", &out, "--quiet"], more].concat());
        tensors(Path::new(&out))["logits"].1.clone()
    }
}

const IDS: [&str; 4] = ["--ids", "5,6,7,8,9,10,11", "--ids", "3,4"];
pub(crate) const CUDA: [&str; 2] = ["--target", "cuda"];

#[test]
fn a_run_gives_what_the_processor_gives() {
    let g = Gpu::new("cuda-run");
    let adapter = fixture("adapters/lora-r4").display().to_string();
    for more in [&[][..], &["--adapter", &adapter], &["--adapter", &adapter, "--merge"]] {
        let args = [&IDS[..], more].concat();
        let want = g.logits(&g.cpu, "cpu.safetensors", &args);
        for properties in ["sm=8.0", "sm=9.0,order=at-once"] {
            let got = g.logits(&g.with(properties), "gpu.safetensors", &[&args[..], &CUDA].concat());
            let off = relative(&got, &want);
            assert!(off < F32, "{more:?} {properties}: {off}");
        }
    }
    let [graphs, replays, _, launches] = g.did();
    assert!(graphs == 6 && replays == 6 && launches > 0, "{graphs} {replays} {launches}");
    // Weights and activations in bf16: as far from f32 as on the processor.
    let args = [&IDS[..], &["--adapter", &adapter]].concat();
    let exact = g.logits(&g.cpu, "cpu.safetensors", &args);
    let half =
        |p: &Pleach, more: &[&str]| g.logits(p, "half.safetensors", &[&args[..], &["--dtype", "bf16"], more].concat());
    let off = relative(&half(&g.cpu, &[]), &exact);
    let got = half(&g.with("sm=9.0"), &CUDA);
    assert!(off > 1e-4 && relative(&got, &exact) < 1.5 * off, "{off} {}", relative(&got, &exact));
    assert_eq!(half(&g.with("sm=9.0,order=at-once"), &CUDA), got, "not the same bits again");
}

#[test]
fn generation_replays_one_graph_for_many_lengths() {
    let g = Gpu::new("cuda-generate");
    let args = ["generate", &g.model, "--ids", "5,6,7,8,9", "--max-new-tokens", "12", "--print-ids", "--quiet"];
    let want = g.cpu.ok(&args);
    assert_eq!(want.trim().split(',').count(), 12, "{want}");
    let gpu = g.with("sm=8.0");
    assert_eq!(gpu.ok(&[&args[..], &CUDA].concat()), want);
    // One graph for the prompt, one for all single tokens after it.
    let [graphs, replays, _, _] = g.did();
    assert_eq!((graphs, replays), (2, 12));
}

pub(crate) fn rows(path: &Path) {
    let mut text = String::new();
    for i in 0..6u64 {
        let ids: Vec<String> = (0..4 + i).map(|j| ((i * 31 + j * 17 + 5) % 128).to_string()).collect();
        text += &format!("{{\"input_ids\":[{}]}}\n", ids.join(","));
    }
    std::fs::write(path, text).unwrap();
}

pub(crate) fn lines(out: &str, keys: &[&str]) -> Vec<Vec<f64>> {
    let text = std::fs::read_to_string(Path::new(out).join("metrics.jsonl")).unwrap();
    let number = |l: &str, k: &str| serde_json::from_str::<Value>(l).unwrap()[k].as_f64().unwrap();
    text.lines().map(|l| keys.iter().map(|k| number(l, k)).collect()).collect()
}

/// Arguments of a run of five steps of two rows each.
fn training<'a>(g: &'a Gpu, data: &'a str, out: &'a str, method: &'a str) -> Vec<&'a str> {
    let base = ["train", &g.model, "--data", data, "--out", out, "--method", method, "--r", "4"];
    let more = ["--target-modules", "all-linear", "--batch", "2", "--max-length", "12", "--max-steps", "5"];
    [&base[..], &more, &["--save-every", "2", "--lr", "1e-2", "--max-grad-norm", "0.5"]].concat()
}

#[test]
fn training_gives_what_the_processor_gives_and_survives_a_kill() {
    let g = Gpu::new("cuda-train");
    let data = g.file("rows.jsonl");
    rows(Path::new(&data));
    for (method, properties) in [("lora", "sm=8.0"), ("paca", "sm=9.0")] {
        let [cpu, gpu, killed] = ["cpu", "gpu", "killed"].map(|n| g.file(&format!("{method}-{n}")));
        g.cpu.ok(&training(&g, &data, &cpu, method));
        let driver = g.with(properties);
        driver.ok(&[&training(&g, &data, &gpu, method)[..], &CUDA].concat());
        let keys = ["loss", "grad_norm", "lr", "tokens"];
        for (a, b) in lines(&gpu, &keys).iter().zip(lines(&cpu, &keys)) {
            assert!((a[0] - b[0]).abs() < 1e-4 * b[0] && (a[1] - b[1]).abs() < 1e-3 * b[1], "{method} {a:?} {b:?}");
            assert_eq!(a[2..], b[2..]);
        }
        let adapter = |out: &str| tensors(&Path::new(out).join("adapter_model.safetensors"));
        let (want, got) = (adapter(&cpu), adapter(&gpu));
        assert!(!want.is_empty() && want.keys().eq(got.keys()));
        for (name, (shape, values)) in &want {
            assert_eq!(shape, &got[name].0);
            // Steps of AdamW have the size of the rate even where a gradient is all but zero, so single values differ.
            let squares = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>();
            let off = squares(&mut got[name].1.iter().zip(values).map(|(a, b)| a - b));
            let off = (off / squares(&mut values.iter().copied())).sqrt();
            assert!(off < 2e-2, "{method} {name}: {off}");
        }
        // The driver dies in the middle; what was saved is gone on from, to the same bytes.
        let dying = g.with(&format!("{properties},fail=cuGraphLaunch@7:719"));
        let e = dying.fails(1, &[&training(&g, &data, &killed, method)[..], &CUDA].concat());
        assert!(e.contains("CUDA_ERROR_LAUNCH_FAILED (719)"), "{e}");
        let resume = [&training(&g, &data, &killed, method)[..], &CUDA, &["--resume", "latest"]].concat();
        driver.ok(&resume);
        let bytes = |out: &str| std::fs::read(Path::new(out).join("adapter_model.safetensors")).unwrap();
        assert_eq!(bytes(&killed), bytes(&gpu), "{method}: other bytes after a resumption");
        assert_eq!(lines(&killed, &keys), lines(&gpu, &keys));
    }
}

#[test]
fn plans_for_another_gpu_old_drivers_and_little_memory_are_refused() {
    let g = Gpu::new("cuda-refused");
    let plan = |target: &str| {
        let file = g.file(&format!("{target}.pleach"));
        g.cpu.ok(&["compile", &g.model, "--entry", "infer", "--target", target, "-o", &file, "--quiet"]);
        file
    };
    let (portable, hopper) = (plan("sm_80"), plan("sm_90a"));
    let run = |file: &str| ["run", file, "--weights", &g.model, "--ids", "5,6,7"].map(String::from).to_vec();
    let fails = |properties: &str, file: &str, words: &[&str]| {
        let args = run(file);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let e = g.with(properties).fails(1, &args);
        assert!(words.iter().all(|w| e.contains(w)), "{properties}: {e}");
    };
    fails("sm=8.0", &hopper, &["sm_90a", "compute capability 8.0", "--target sm_80"]);
    fails("sm=10.0", &hopper, &["sm_90a", "--target sm_80"]);
    fails("sm=7.5", &portable, &["8.0 or later"]);
    fails("sm=9.0,driver=11.7", &portable, &["CUDA 11.7", "11.8 or later"]);
    fails("sm=9.0,driver=12.2", &hopper, &["PTX 8.3", "12.3 or later"]);
    fails("memory=100000", &portable, &["bytes free", "weights", "activations"]);
    fails("devices=0", &portable, &["CUDA_VISIBLE_DEVICES"]);
    fails("fail=cuModuleLoadDataEx@1:222", &portable, &["too old"]);
    fails("fail=cuModuleLoadDataEx@1:218", &portable, &["CUDA_ERROR_INVALID_PTX", "compile the plan again"]);
    fails("fail=cuMemAlloc_v2@3:2", &portable, &["no memory left", "bytes for"]);
    fails("fail=cuStreamSynchronize@1:700", &portable, &["CUDA_ERROR_ILLEGAL_ADDRESS (700)"]);
    fails("fail=cuInit@1:999", &portable, &["does not start", "999"]);
    // A portable plan runs on a later GPU.
    let args = run(&portable);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    g.with("sm=12.0").ok(&args);
    // Without a driver the same program starts, runs on the processor, and says what is missing.
    let none = g.cpu.with_env(&[("PLEACH_CUDA_LIBRARY", "/nonexistent/libcuda.so.1")]);
    none.ok(&["run", &g.model, "--ids", "5,6,7", "--quiet"]);
    let e = none.fails(1, &args);
    assert!(e.contains("PLEACH_CUDA_LIBRARY") && e.contains("nonexistent"), "{e}");
    let e = none.fails(1, &["run", &g.model, "--ids", "5,6,7", "--target", "cuda"]);
    assert!(e.contains("nonexistent"), "{e}");
    // What cannot run here is not compiled first.
    let cache = g.file("nothing-compiled");
    let asked = [("PLEACH_CUDA_LIBRARY", "/nonexistent/libcuda.so.1"), ("PLEACH_CACHE_DIR", cache.as_str())];
    let asked = g.cpu.with_env(&asked);
    for target in ["cuda", "sm_80", "sm_90a"] {
        let e = asked.fails(1, &["run", &g.model, "--ids", "5,6,7", "--target", target]);
        assert!(e.contains("nonexistent") && !std::path::Path::new(&cache).exists(), "{target}: {e}");
    }
    // The assembly of a plan for a GPU is its PTX.
    assert_eq!(g.cpu.ok(&["inspect", &portable, "--asm"]), g.cpu.ok(&["inspect", &portable, "--ptx"]));
    assert!(none.ok(&["doctor"]).contains("NVIDIA driver"));
    let page = g.with("sm=9.0,driver=12.4,memory=1073741824").ok(&["doctor"]);
    for word in ["CUDA 12.4", "Simulated GPU", "compute capability 9.0 (target sm_90a)", "1.0 GiB"] {
        assert!(page.contains(word), "{word}: {page}");
    }
}

#[test]
fn a_graph_as_text_is_compiled() {
    let g = Gpu::new("cuda-text");
    let text = "graph core\nparam @0 \"w\" bf16[48,64] frozen checkpoint(\"w\")\nentry \"main\" {\n  %0 = input \"x\" : f32[T,64]\n  \
                %1 = cast(%0) : bf16[T,64]\n  %2 = param @0 : bf16[48,64]\n  %3 = matmul(%1, %2) {tb} : f32[T,48]\n  output \"y\" %3\n}\n";
    let (file, plan) = (g.file("one.ir"), g.file("one.pleach"));
    std::fs::write(&file, text).unwrap();
    for target in ["cpu", "sm_80", "sm_90a"] {
        let table = g.cpu.ok(&["compile", &file, "--target", target, "-o", &plan]);
        assert!(table.contains("fuse-kernels") && table.contains("codegen"), "{table}");
        assert!(g.cpu.ok(&["inspect", &plan]).contains("main"));
    }
    std::fs::write(&file, text.replace("{tb} : f32[T,48]", "{tb} : f32[T,47]")).unwrap();
    let e = g.cpu.fails(1, &["compile", &file, "-o", &plan]);
    assert!(e.contains("one.ir") && e.contains("matmul"), "{e}");
    let e = g.cpu.fails(2, &["compile", &file, "--method", "lora", "-o", &plan]);
    assert!(e.contains("leave out"), "{e}");
}
