//! Every case of `tests/fixtures/cases.json`: results against PEFT's, adapters beside the weights and folded in, greedy
//! ids, a plan run from its file, a merged folder.

use crate::kit::{Folder, Pleach, fixture, relative, tensors};
use serde_json::Value;
use std::path::Path;

struct Case {
    model: String,
    adapters: Vec<String>,
    expected: String,
    output: String,
    tolerance: f64,
}

fn cases() -> Vec<Case> {
    let v: Value = serde_json::from_slice(&std::fs::read(fixture("cases.json")).unwrap()).unwrap();
    let text = |v: &Value| v.as_str().unwrap().to_string();
    let case = |c: &Value| Case {
        model: text(&c["model"]),
        adapters: c["adapters"].as_array().unwrap().iter().map(text).collect(),
        expected: text(&c["expected"]),
        output: text(&c["output"]),
        tolerance: c["tolerance"].as_f64().unwrap(),
    };
    v["cases"].as_array().unwrap().iter().map(case).collect()
}

fn path(p: &Path) -> String {
    p.display().to_string()
}

/// Runs one case; a text of what is wrong, if anything.
fn check(pleach: &Pleach, folder: &Folder, case: &Case, merge: bool) -> Result<(), String> {
    let (model, file) = (path(&fixture(&case.model)), fixture(&case.expected));
    let want = tensors(&file);
    let adapters: Vec<String> = case.adapters.iter().map(|a| path(&fixture(a))).collect();
    let mut arguments = vec![model.as_str()];
    for a in &adapters {
        arguments.extend(["--adapter", a]);
    }
    if merge {
        arguments.push("--merge");
    }
    let name = format!("{}{}", case.expected, if merge { " merged" } else { "" });
    let call = |head: &[&str], tail: &[&str]| {
        let all: Vec<&str> = head.iter().chain(&arguments).chain(tail).copied().collect();
        let said = pleach.call(&all);
        if said.code == Some(0) { Ok(said.out) } else { Err(format!("{name}: {all:?}: {}", said.err)) }
    };
    let out = path(&folder.join(&format!("{}.safetensors", case.expected.replace('/', "-"))));
    // One compilation for both commands, which find it in the cache.
    if want.contains_key("greedy_ids") {
        let plan = path(&folder.join("one.pleach"));
        call(&["compile"], &["--entry", "infer,generate", "-o", &plan, "--quiet"])?;
    }
    call(&["run"], &["--input", &path(&file), "--out", &out, "--quiet", "--threads", "2"])?;
    let got = tensors(Path::new(&out));
    if got.keys().collect::<Vec<_>>() != [&case.output] {
        return Err(format!("{name}: the file holds {:?}", got.keys()));
    }
    let expected = if merge { &want[&format!("merged_{}", case.output)] } else { &want[&case.output] };
    let result = &got[&case.output];
    if result.0 != expected.0 {
        return Err(format!("{name}: shape {:?}, expected {:?}", result.0, expected.0));
    }
    let error = relative(&result.1, &expected.1);
    if error.is_nan() || error > case.tolerance {
        return Err(format!("{name}: relative error {error:.2e}, at most {:.0e}", case.tolerance));
    }
    let Some((shape, greedy)) = want.get("greedy_ids") else { return Ok(()) };
    let (ids, segments) = (&want["input_ids"].1, &want["segments"].1);
    for (i, w) in segments.windows(2).enumerate() {
        let list = |v: &[f64]| v.iter().map(|x| (*x as i64).to_string()).collect::<Vec<_>>().join(",");
        let prompt = list(&ids[w[0] as usize..w[1] as usize]);
        let wanted = list(&greedy[i * shape[1]..(i + 1) * shape[1]]);
        let n = shape[1].to_string();
        let got = call(&["generate"], &["--ids", &prompt, "--max-new-tokens", &n, "--print-ids", "--quiet"])?;
        if got.trim() != wanted {
            return Err(format!("{name}: sequence {i} continues with {}, expected {wanted}", got.trim()));
        }
    }
    Ok(())
}

fn all(merge: bool) {
    let folder = Folder::new("cases");
    let pleach = Pleach::new(&folder);
    let cases = cases();
    assert!(cases.len() >= 19);
    let list = cases.iter().filter(|c| !merge || !c.adapters.is_empty());
    let faults: Vec<String> = list.filter_map(|c| check(&pleach, &folder, c, merge).err()).collect();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn results_and_greedy_ids_agree_with_peft() {
    all(false);
}

#[test]
fn folded_adapters_agree_with_pefts_merged_models() {
    all(true);
}

#[test]
fn a_plan_runs_other_adapters_of_the_same_shape() {
    let folder = Folder::new("plan");
    let pleach = Pleach::new(&folder);
    let (plan, out) = (path(&folder.join("m.pleach")), path(&folder.join("o.safetensors")));
    let model = path(&fixture("llama-tiny"));
    let adapter = path(&fixture("adapters/lora-r4"));
    let compile = ["compile", &model, "--adapter", &adapter, "--entry", "infer,generate", "-o", &plan];
    let table = pleach.ok(&compile);
    for stage in ["import", "rewrite", "fold-params", "fuse-kernels", "plan-memory", "codegen", "link", "total"] {
        assert!(table.lines().any(|l| l.starts_with(stage)), "{stage}: {table}");
    }
    assert!(pleach.ok(&compile).contains("found in the cache"));
    let file = fixture("expected/llama-tiny/lora-r4.safetensors");
    let base = fixture("expected/llama-tiny/base.safetensors");
    let input = path(&file);
    let run = |more: &[&str]| {
        let fixed = ["run", &plan, "--weights", &model, "--input", &input, "--out", &out];
        pleach.ok(&fixed.iter().chain(more).copied().collect::<Vec<_>>());
        tensors(Path::new(&out)).remove("logits").unwrap().1
    };
    assert!(relative(&run(&["--adapter", &adapter]), &tensors(&file)["logits"].1) <= 2e-5);
    // A slot that is left empty is the base model.
    assert_eq!(tensors(&base)["input_ids"], tensors(&file)["input_ids"]);
    assert!(relative(&run(&[]), &tensors(&base)["logits"].1) <= 2e-5);
    let empty = "slot 0 of the plan is empty, so this is the base model";
    for command in ["run", "generate"] {
        let bare = [command, &plan, "--weights", &model, "--ids", "1,2,3"];
        let more = if command == "run" { &[][..] } else { &["--max-new-tokens", "1", "--print-ids"] };
        let said = pleach.call(&[&bare[..], more].concat());
        assert!(said.code == Some(0) && said.err.contains(empty), "{said:?}");
        let said = pleach.call(&[&bare[..], more, &["--adapter", &adapter]].concat());
        assert!(said.code == Some(0) && !said.err.contains("slot"), "{said:?}");
    }
    let other = path(&fixture("adapters/lora-all"));
    let said = pleach.fails(1, &["run", &plan, "--weights", &model, "--adapter", &other, "--input", &input]);
    assert!(said.contains("lora-all") && said.contains("slot 0"), "{said}");
}

#[test]
fn a_merged_folder_computes_what_peft_computes() {
    let folder = Folder::new("merge");
    let pleach = Pleach::new(&folder);
    let model = path(&fixture("llama-tiny"));
    let adapter = path(&fixture("adapters/lora-pattern"));
    let (merged, out) = (path(&folder.join("merged")), path(&folder.join("o.safetensors")));
    let report = pleach.ok(&["merge", &model, &adapter, "--out", &merged, "--verify", "2", "--json"]);
    let report: Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["modules"].as_array().unwrap().len(), 7);
    assert!(report["verified_relative_error"].as_f64().unwrap() <= 2e-5);
    assert!(pleach.fails(1, &["merge", &model, &adapter, "--out", &merged]).contains("--overwrite"));
    pleach.ok(&["merge", &model, &adapter, "--out", &merged, "--overwrite", "--quiet"]);
    let file = fixture("expected/llama-tiny/lora-pattern.safetensors");
    pleach.ok(&["run", &merged, "--input", &path(&file), "--out", &out, "--quiet"]);
    let got = &tensors(Path::new(&out))["logits"].1;
    assert!(relative(got, &tensors(&file)["merged_logits"].1) <= 2e-5);
}

/// IA³ scales what a layer gives, bias included: the merged folder has other biases too.
#[test]
fn a_merged_bias_is_what_peft_computes() {
    let folder = Folder::new("merge-bias");
    let pleach = Pleach::new(&folder);
    let (model, adapter) = (path(&fixture("bert-tiny")), path(&fixture("adapters/bert-ia3")));
    let (merged, out) = (path(&folder.join("merged")), path(&folder.join("o.safetensors")));
    let report = pleach.ok(&["merge", &model, &adapter, "--out", &merged, "--json", "--quiet"]);
    let report: Value = serde_json::from_str(&report).unwrap();
    let modules: Vec<&str> =
        report["modules"].as_array().unwrap().iter().map(|m| m["module"].as_str().unwrap()).collect();
    // Two layers: key and value with their biases, two feedforward modules whose biases stay.
    assert_eq!((modules.len(), modules.iter().filter(|m| m.ends_with(".bias")).count()), (12, 4), "{modules:?}");
    let file = fixture("expected/bert-tiny/bert-ia3.safetensors");
    pleach.ok(&["run", &merged, "--input", &path(&file), "--out", &out, "--quiet"]);
    let got = &tensors(Path::new(&out))["last_hidden_state"].1;
    let error = relative(got, &tensors(&file)["merged_last_hidden_state"].1);
    assert!(error <= 2e-5, "{error:.1e}");
    pleach.ok(&["adapter", "check", &model, &adapter]);
}

#[test]
fn threads_do_not_change_a_bit() {
    let folder = Folder::new("threads");
    let pleach = Pleach::new(&folder);
    let (model, adapter) = (path(&fixture("llama-tiny-v4")), path(&fixture("adapters/lora-all")));
    let input = path(&fixture("expected/llama-tiny-v4/lora-all.safetensors"));
    let run = |n: &str| {
        let out = folder.join(n);
        let arguments =
            ["run", &model, "--adapter", &adapter, "--input", &input, "--out", &path(&out), "--threads", n, "--quiet"];
        pleach.ok(&arguments);
        std::fs::read(&out).unwrap()
    };
    let one = run("1");
    assert!(run("2") == one && run("5") == one);
}
