//! Damaged, hostile or mismatched files: exit code 1 and one clear message that names the file, never a crash.

use crate::kit::{Folder, Pleach, copy, fixture};
use std::fs;
use std::path::{Path, PathBuf};

struct Setup {
    folder: Folder,
    pleach: Pleach,
}

impl Setup {
    fn new(name: &str) -> Setup {
        let folder = Folder::new(name);
        let pleach = Pleach::new(&folder);
        Setup { folder, pleach }
    }

    fn fresh(&self, of: &str, name: &str) -> PathBuf {
        let to = self.folder.join(name);
        let _ = fs::remove_dir_all(&to);
        copy(&fixture(of), &to);
        to
    }

    fn run(&self, model: &Path, more: &[&str]) -> String {
        let model = model.display().to_string();
        let all: Vec<&str> = ["run", &model, "--ids", "1,2"].iter().chain(more).copied().collect();
        self.pleach.fails(1, &all)
    }
}

fn edit(path: &Path, change: impl FnOnce(&mut serde_json::Value)) {
    let mut v = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut v);
    fs::write(path, v.to_string()).unwrap();
}

fn cut(path: &Path, keep: impl Fn(usize) -> usize) {
    let bytes = fs::read(path).unwrap();
    fs::write(path, &bytes[..keep(bytes.len())]).unwrap();
}

#[test]
fn models() {
    let s = Setup::new("damaged-models");
    let m = s.fresh("llama-tiny", "m");
    cut(&m.join("model.safetensors"), |n| n / 2);
    assert!(s.run(&m, &[]).contains("model.safetensors"));
    let m = s.fresh("llama-tiny", "m");
    cut(&m.join("model.safetensors"), |_| 4);
    assert!(s.run(&m, &[]).contains("model.safetensors"));
    let m = s.fresh("llama-tiny", "m");
    let mut bytes = fs::read(m.join("model.safetensors")).unwrap();
    bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    fs::write(m.join("model.safetensors"), bytes).unwrap();
    assert!(s.run(&m, &[]).contains("model.safetensors"));
    let m = s.fresh("llama-tiny", "m");
    edit(&m.join("config.json"), |v| v["hidden_size"] = 128.into());
    assert!(s.run(&m, &[]).contains("shape"));
    let m = s.fresh("llama-tiny", "m");
    edit(&m.join("config.json"), |v| v["hidden_act"] = "relu6".into());
    assert!(s.run(&m, &[]).contains("hidden_act"));
    let m = s.fresh("llama-tiny", "m");
    edit(&m.join("config.json"), |v| v["attention_sinks"] = 4.into());
    assert!(s.run(&m, &[]).contains("attention_sinks"));
    let m = s.fresh("llama-tiny", "m");
    fs::write(m.join("config.json"), "{").unwrap();
    assert!(s.run(&m, &[]).contains("config.json"));
    let m = s.fresh("llama-tiny-v4", "m");
    fs::remove_file(m.join("model-00002-of-00002.safetensors")).unwrap();
    assert!(s.run(&m, &[]).contains("model-00002-of-00002.safetensors"));
    assert!(s.run(&s.folder.join("nowhere"), &[]).contains("does not exist"));
    let m = s.fresh("llama-tiny", "m");
    fs::write(m.join("tokenizer.json"), "[]").unwrap();
    let said = s.pleach.fails(1, &["run", &m.display().to_string(), "--prompt", "a"]);
    assert!(said.contains("tokenizer.json"), "{said}");
}

#[test]
fn adapters() {
    let s = Setup::new("damaged-adapters");
    let m = fixture("llama-tiny");
    let check = |a: &Path| s.run(&m, &["--adapter", &a.display().to_string()]);
    let a = s.fresh("adapters/lora-r4", "a");
    cut(&a.join("adapter_model.safetensors"), |n| n - 100);
    assert!(check(&a).contains("adapter_model.safetensors"));
    let a = s.fresh("adapters/lora-r4", "a");
    edit(&a.join("adapter_config.json"), |v| v["r"] = 8.into());
    assert!(check(&a).contains("rank 8"));
    let a = s.fresh("adapters/lora-r4", "a");
    edit(&a.join("adapter_config.json"), |v| v["use_dora"] = true.into());
    assert!(check(&a).contains("lora_magnitude_vector"));
    let a = s.fresh("adapters/lora-r4", "a");
    edit(&a.join("adapter_config.json"), |v| v["peft_type"] = "BOFT".into());
    let said = check(&a);
    let types: Vec<&str> = said.trim().rsplit("supported are ").next().unwrap().split(", ").collect();
    assert!(said.contains("`peft_type` is `BOFT`") && types.len() > 10, "{said}");
    assert_eq!(types.iter().collect::<std::collections::BTreeSet<_>>().len(), types.len(), "{said}");
    // Another method's tensors.
    let a = s.fresh("adapters/lora-r4", "a");
    edit(&a.join("adapter_config.json"), |v| v["peft_type"] = "IA3".into());
    assert!(check(&a).contains("ia3_l"));
    let a = s.fresh("adapters/lora-r4", "a");
    edit(&a.join("adapter_config.json"), |v| v["target_modules"] = serde_json::json!(["q_porj"]));
    assert!(check(&a).contains("q_porj"));
    let a = s.fresh("adapters/lora-r4", "a");
    fs::remove_file(a.join("adapter_config.json")).unwrap();
    assert!(check(&a).contains("adapter_config.json"));
    assert!(check(&s.folder.join("nowhere")).contains("nowhere"));
}

#[test]
fn plans() {
    let s = Setup::new("damaged-plans");
    let model = fixture("llama-tiny").display().to_string();
    let plan = s.folder.join("m.pleach");
    let file = plan.display().to_string();
    s.pleach.ok(&["compile", &model, "-o", &file, "--quiet"]);
    let whole = fs::read(&plan).unwrap();
    let run = || s.pleach.fails(1, &["run", &file, "--weights", &model, "--ids", "1"]);
    for keep in [0, 7, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&plan, &whole[..keep]).unwrap();
        let said = run();
        assert!(said.contains("m.pleach") && said.contains("compile it again"), "{keep}: {said}");
    }
    for at in [3, 9, 40, 300, whole.len() - 5] {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x20;
        fs::write(&plan, bytes).unwrap();
        assert!(run().contains("compile it again"), "{at}");
    }
    fs::write(&plan, &whole).unwrap();
    let other = fixture("llama-odd").display().to_string();
    assert!(s.pleach.fails(1, &["run", &file, "--weights", &other, "--ids", "1"]).contains("the plan expects"));
    assert!(s.pleach.fails(2, &["run", &file, "--ids", "1"]).contains("--weights"));
    assert!(s.pleach.fails(2, &["run", &file, "--weights", &model, "--merge", "--ids", "1"]).contains("--merge"));
    let said = s.pleach.fails(1, &["generate", &file, "--weights", &model, "--ids", "1"]);
    assert!(said.contains("generate") && said.contains("infer"), "{said}");
    s.pleach.ok(&["run", &file, "--weights", &model, "--ids", "1"]);
}

#[test]
fn inputs() {
    let s = Setup::new("damaged-inputs");
    let model = fixture("llama-tiny").display().to_string();
    let run = |code, more: &[&str]| {
        let all: Vec<&str> = ["run", &model].iter().chain(more).copied().collect();
        s.pleach.fails(code, &all)
    };
    assert!(run(1, &["--ids", "1,100000"]).contains("100000"));
    assert!(run(2, &["--ids", "1,a"]).contains('a'));
    assert!(run(2, &[]).contains("--ids"));
    let file = s.folder.join("in.safetensors");
    let name = file.display().to_string();
    fs::write(&file, b"garbage garbage garbage").unwrap();
    assert!(run(1, &["--input", &name]).contains("in.safetensors"));
    let write = |ids: &[i64], segments: &[i64]| {
        let bytes = |v: &[i64]| v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let (a, b) = (bytes(ids), bytes(segments));
        let view = |n, x| safetensors::tensor::TensorView::new(safetensors::Dtype::I64, vec![n], x).unwrap();
        let list = [("input_ids", view(ids.len(), &a)), ("segments", view(segments.len(), &b))];
        safetensors::serialize_to_file(list, None, &file).unwrap();
    };
    write(&[1, 2, 3], &[0, 2]);
    assert!(run(1, &["--input", &name]).contains("segments"));
    write(&[1, -2, 3], &[0, 3]);
    assert!(run(1, &["--input", &name]).contains("-2"));
    write(&[1, 2, 3], &[0, 1, 3]);
    let folder = s.folder.0.display().to_string();
    assert!(run(2, &["--input", &name, "--out", &folder]).contains("folder"));
    assert!(run(1, &["--input", &name, "--capacity", "T=2"]).contains("capacity"));
}

#[test]
fn a_damaged_cache_is_no_obstacle() {
    let s = Setup::new("damaged-cache");
    let model = fixture("bert-tiny").display().to_string();
    let first = s.pleach.ok(&["run", &model, "--ids", "1,2"]);
    for e in fs::read_dir(s.folder.join("cache")).unwrap().flatten() {
        cut(&e.path(), |n| n / 2);
    }
    assert_eq!(s.pleach.ok(&["run", &model, "--ids", "1,2"]), first);
    let said = s.pleach.call(&["run", &model, "--ids", "1,2"]);
    assert!(said.code == Some(0) && !said.err.contains("compiled"), "{}", said.err);
}

#[test]
fn gguf() {
    let s = Setup::new("damaged-gguf");
    let file = s.folder.join("m.gguf");
    let (name, out) = (file.display().to_string(), s.folder.join("out").display().to_string());
    for bytes in [
        &b""[..],
        b"GGUF",
        b"GGUF\x03\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"nonsense",
    ] {
        fs::write(&file, bytes).unwrap();
        assert!(s.pleach.fails(1, &["import", &name, "--out", &out]).contains("m.gguf"));
        assert!(!s.folder.join("out").exists());
    }
    let folder = fixture("llama-tiny").display().to_string();
    assert!(s.pleach.fails(1, &["import", &folder, "--out", &out]).contains("is a model folder already"));
    let folder = s.folder.0.display().to_string();
    assert!(s.pleach.fails(1, &["import", &folder, "--out", &out]).contains("is a folder; give the GGUF file"));
}
