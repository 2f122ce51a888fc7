//! The two models that `scripts/fetch_models.py` fetches, against what PyTorch and PEFT computed. Skipped, visibly,
//! where they have not been fetched.

use crate::kit::{Folder, Pleach, fixture, relative, tensors};
use std::path::{Path, PathBuf};

const TOLERANCE: f64 = 2e-4;

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

fn text(p: &Path) -> String {
    p.display().to_string()
}

fn run(pleach: &Pleach, folder: &Folder, model: &str, input: &Path, more: &[&str]) -> (Vec<usize>, Vec<f64>) {
    let out = text(&folder.join("out.safetensors"));
    let head = ["run", model, "--input", &text(input), "--out", &out, "--quiet"];
    pleach.ok(&[&head[..], more].concat());
    tensors(Path::new(&out)).into_values().next().unwrap()
}

#[test]
fn smollm2_with_and_without_the_adapter() {
    let gguf = root("models/smollm2.gguf");
    if !gguf.is_file() {
        println!("skipped: models/smollm2.gguf is not there, run `make models`");
        return;
    }
    let folder = Folder::new("smollm2");
    let pleach = Pleach::new(&folder);
    let model = text(&folder.join("smollm2"));
    pleach.ok(&["import", &text(&gguf), "--out", &model, "--quiet"]);
    let adapter = text(&root("demo/adapter"));
    for (name, more) in [
        ("smollm2-base", &[][..]),
        ("smollm2-adapter", &["--adapter", &adapter][..]),
        ("smollm2-adapter", &["--adapter", &adapter, "--merge"][..]),
    ] {
        let file = fixture(&format!("models/{name}.safetensors"));
        let want = tensors(&file);
        let plan = text(&folder.join("m.pleach"));
        let head = ["compile", &model, "--entry", "infer,generate", "-o", &plan, "--quiet"];
        pleach.ok(&[&head[..], more].concat());
        let (shape, logits) = run(&pleach, &folder, &model, &file, more);
        let columns = &want["columns"].1;
        let chosen: Vec<f64> = logits.chunks(shape[1]).flat_map(|r| columns.iter().map(|c| r[*c as usize])).collect();
        let (expected, peak) = (&want["logits"].1, want["logits_peak"].1[0]);
        let error = chosen.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) / peak;
        assert!(error <= TOLERANCE && logits.iter().all(|x| x.is_finite()), "{name} {more:?}: {error:.2e}");
        let best = |r: &[f64]| r.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0 as f64;
        let argmax: Vec<f64> = logits.chunks(shape[1]).map(best).collect();
        assert_eq!(argmax, want["argmax"].1, "{name} {more:?}");
        let (ids, segments) = (&want["input_ids"].1, &want["segments"].1);
        for i in 0..2 {
            let list = |v: &[f64]| v.iter().map(|x| (*x as i64).to_string()).collect::<Vec<_>>().join(",");
            let prompt = list(&ids[segments[i] as usize..segments[i + 1] as usize]);
            let head = ["generate", &model, "--ids", &prompt, "--max-new-tokens", "64", "--print-ids", "--quiet"];
            let got = pleach.ok(&[&head[..], more].concat());
            assert_eq!(got.trim(), list(&want[&format!("greedy_ids.{i}")].1), "{name} {more:?}");
        }
    }
}

#[test]
fn minilm() {
    let model = root("models/minilm");
    if !model.join("config.json").is_file() {
        println!("skipped: models/minilm is not there, run `make models`");
        return;
    }
    let folder = Folder::new("minilm");
    let pleach = Pleach::new(&folder);
    let file = fixture("models/minilm.safetensors");
    let want = tensors(&file);
    let (shape, hidden) = run(&pleach, &folder, &text(&model), &file, &[]);
    assert_eq!(shape, want["last_hidden_state"].0);
    assert!(relative(&hidden, &want["last_hidden_state"].1) <= TOLERANCE);
    let said = pleach.ok(&["run", &text(&model), "--input", &text(&file), "--similarity", "--json", "--quiet"]);
    let v: serde_json::Value = serde_json::from_str(&said).unwrap();
    let cosine: Vec<Vec<f64>> = serde_json::from_value(v["cosine"].clone()).unwrap();
    let flat: Vec<f64> = cosine.into_iter().flatten().collect();
    assert!(relative(&flat, &want["cosine"].1) <= TOLERANCE, "{flat:?}");
}

/// What PaCA keeps for the backward half beside LoRA of the same rank, before anything is built again: next to nothing only because a
/// weight is trained, and less in all. What both keep is what attention and the functions between the layers are made of.
#[test]
fn trained_columns_keep_less_in_smollm2() {
    let gguf = root("models/smollm2.gguf");
    if !gguf.is_file() {
        println!("skipped: models/smollm2.gguf is not there, run `make models`");
        return;
    }
    let folder = Folder::new("smollm2-kept");
    let pleach = Pleach::new(&folder);
    let model = text(&folder.join("smollm2"));
    pleach.ok(&["import", &text(&gguf), "--out", &model, "--quiet"]);
    for (dtype, most) in [("f32", 0.69), ("bf16", 0.69)] {
        let kept = |method: &str, more: &[&str]| -> (f64, f64) {
            let head =
                ["plan", &model, "--method", method, "--r", "16", "--target-modules", "all-linear", "--dtype", dtype];
            let tail = ["--batch", "4", "--max-length", "128", "--disable", "recompute", "--json", "--quiet"];
            let v: serde_json::Value = serde_json::from_str(&pleach.ok(&[&head[..], &tail, more].concat())).unwrap();
            let list = v["saved"].as_array().unwrap();
            let sum = |only: bool| {
                let counted = list.iter().filter(|s| !only || s["trained_only"] == true);
                counted.map(|s| s["bytes"].as_f64().unwrap()).sum::<f64>()
            };
            (sum(false), sum(true))
        };
        let (columns, low_rank) = (kept("paca", &[]), kept("lora", &[]));
        let without_rules = kept("paca", &["--disable", "rewrite"]);
        println!(
            "{dtype}: {:.3} of LoRA's bytes, {:.3} of those for trained weights",
            columns.0 / low_rank.0,
            columns.1 / low_rank.1
        );
        assert!(columns.1 <= 0.05 * low_rank.1, "{dtype}: {columns:?} beside {low_rank:?}");
        assert!(columns.0 <= most * low_rank.0, "{dtype}: {columns:?} beside {low_rank:?}");
        // The saving is the rules': without them whole inputs are kept.
        println!("{dtype}: {:.3} of the bytes without rewriting", columns.0 / without_rules.0);
        assert!(columns.0 <= 0.75 * without_rules.0, "{dtype}: {columns:?}, {without_rules:?} without rewriting");
    }
}

/// What training takes is what was planned, but for the program itself and what it keeps beside the session: 20 MB and a hundredth.
#[cfg(target_os = "linux")]
#[test]
fn planned_memory_is_what_training_smollm2_takes() {
    let gguf = root("models/smollm2.gguf");
    if !gguf.is_file() {
        println!("skipped: models/smollm2.gguf is not there, run `make models`");
        return;
    }
    let folder = Folder::new("smollm2-memory");
    let pleach = Pleach::new(&folder);
    let model = text(&folder.join("smollm2"));
    pleach.ok(&["import", &text(&gguf), "--out", &model, "--quiet"]);
    // Files that were just written lie in the page cache in large pieces, of which one read maps all; read anew they do not.
    for file in ["model.safetensors", "blocks/model.safetensors"] {
        let file = format!("{model}/{file}");
        std::fs::File::open(&file).unwrap().sync_all().unwrap();
        let dropped =
            std::process::Command::new("dd").args([&format!("if={file}"), "iflag=nocache", "count=0"]).output();
        assert!(dropped.unwrap().status.success());
    }
    for (method, dtype) in [("lora", "bf16"), ("dora", "bf16"), ("paca", "f32")] {
        let head = ["bench", "train", &model, "--method", method, "--dtype", dtype, "--r", "16", "--steps", "1"];
        let tail = ["--target-modules", "all-linear", "--batch", "4", "--max-length", "128", "--json", "--quiet"];
        let said = pleach.ok(&[&head[..], &tail].concat());
        let v: serde_json::Value = serde_json::from_str(&said).unwrap();
        let bytes = |k: &str| v[k].as_f64().unwrap();
        let (planned, peak) = (bytes("planned_peak_bytes"), bytes("peak_rss_bytes"));
        println!("{method} {dtype}: {:.1} MB over {:.1} MB planned", (peak - planned) / 1e6, planned / 1e6);
        assert!(peak >= 0.9 * planned && peak - planned <= 20e6 + 0.01 * planned, "{method} {dtype}: {peak} {planned}");
    }
}
