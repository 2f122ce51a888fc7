//! Commands beside run and generate, and the manners of all: help, exit codes, JSON, quiet.

use crate::kit::{Folder, Pleach, copy, fixture, relative, tensors};
use serde_json::Value;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

fn setup(name: &str) -> (Folder, Pleach, String) {
    let folder = Folder::new(name);
    let pleach = Pleach::new(&folder);
    (folder, pleach, fixture("llama-tiny").display().to_string())
}

#[test]
fn every_command_has_help_with_an_example() {
    let (_folder, pleach, _) = setup("help");
    let list = "run,generate,compile,inspect,opt,merge,adapter check,adapter targets,adapter convert,import,bench run,bench generate,bench \
                kernels,doctor,methods";
    for command in list.split(',') {
        let words: Vec<&str> = command.split(' ').chain(["--help"]).collect();
        let help = pleach.ok(&words);
        assert!(
            help.contains("Example:") && help.contains("--quiet") && help.contains("--threads"),
            "{command}: {help}"
        );
    }
    assert!(!pleach.ok(&["--help"]).contains("compile-here"));
    assert_eq!(pleach.call(&["run"]).code, Some(2));
    assert_eq!(pleach.call(&["unknown"]).code, Some(2));
    assert_eq!(pleach.call(&["run", "x", "--ids", "1", "--dtype", "f64"]).code, Some(2));
}

#[test]
fn output_that_cannot_be_written_is_an_error_unless_nobody_reads() {
    let (_folder, pleach, model) = setup("stdout");
    let plan = ["plan", &model, "--method", "lora", "--r", "2", "--batch", "1", "--max-length", "8", "--json"];
    let commands: [&[&str]; 7] = [
        &plan,
        &["run", &model, "--ids", "1,2"],
        &["generate", &model, "--ids", "1,2", "--max-new-tokens", "2", "--print-ids"],
        &["inspect", &model, "--ir"],
        &["methods"],
        &["doctor"],
        &["--help"],
    ];
    for command in commands {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let said = pleach.call_with_stdout(full, command);
        assert!(said.code == Some(1) && said.err.contains("error: cannot write to stdout"), "{command:?}: {said:?}");
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let said = pleach.call_with_stdout(writer, command);
        assert!(said.code == Some(0) && !said.err.contains("error"), "{command:?}: {said:?}");
    }
}

/// Folders may have names that are no text.
#[cfg(target_os = "linux")]
#[test]
fn results_go_where_their_name_leads() {
    use std::os::unix::fs::FileTypeExt;
    let (folder, pleach, model) = setup("leads");
    let (file, link, pipe) = (folder.join("file"), folder.join("link"), folder.join("pipe"));
    std::fs::write(&file, "before").unwrap();
    std::os::unix::fs::symlink("file", &link).unwrap();
    let out = |path: &std::path::Path| pleach.ok(&["run", &model, "--ids", "1,2,3", "--out", path.to_str().unwrap()]);
    out(&link);
    assert!(link.is_symlink());
    let want = std::fs::read(&file).unwrap();
    assert_eq!(tensors(&file)["logits"].0[0], 3);
    // A device or a pipe is not replaced by a file.
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let reader = std::thread::spawn({
        let pipe = pipe.clone();
        move || std::fs::read(pipe).unwrap()
    });
    out(&pipe);
    assert!(pipe.metadata().unwrap().file_type().is_fifo());
    assert_eq!(reader.join().unwrap(), want);
    let left = std::fs::read_dir(&folder.0).unwrap().flatten().filter(|e| e.path().extension().is_some()).count();
    assert_eq!(left, 0);
}

#[test]
fn a_path_is_any_bytes() {
    use std::os::unix::ffi::OsStrExt;
    let (folder, pleach, text) = setup("bytes");
    let odd = folder.0.join(std::ffi::OsStr::from_bytes(b"x\xff"));
    let (model, adapter, out, cache) = (odd.join("m"), odd.join("a"), odd.join("o"), odd.join("cache"));
    copy(&fixture("llama-tiny"), &model);
    copy(&fixture("adapters/lora-r4"), &adapter);
    let rows = odd.join("rows.jsonl");
    std::fs::write(&rows, "{\"input_ids\":[1,2,3,4]}\n").unwrap();
    let (first, places) = (out.join("checkpoint-1"), ["MODEL", "ADAPTER", "ROWS", "OUT", "FIRST"]);
    let paths = [&model, &adapter, &rows, &out, &first];
    let call = |words: &str| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_pleach"));
        for w in words.split(' ') {
            match places.iter().position(|p| *p == w) {
                Some(i) => command.arg(paths[i]),
                None => command.arg(w),
            };
        }
        let done = command.arg("--quiet").env("PLEACH_CACHE_DIR", &cache).output().unwrap();
        assert!(done.status.success(), "{words}: {}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8(done.stdout).unwrap()
    };
    let plain = fixture("adapters/lora-r4").display().to_string();
    let want = pleach.ok(&["run", &text, "--adapter", &plain, "--ids", "1,2,3"]);
    assert_eq!(call("run MODEL --adapter ADAPTER --ids 1,2,3"), want);
    let train =
        "train MODEL --adapter ADAPTER --data ROWS --out OUT --max-length 8 --batch 1 --save-every 1 --max-steps";
    call(&format!("{train} 1"));
    call(&format!("{train} 2 --resume FIRST"));
    assert!(out.join("checkpoint-2").is_dir());
}

#[test]
fn results_come_as_text_or_json() {
    let (_folder, pleach, model) = setup("results");
    let v = json(&pleach.ok(&["run", &model, "--prompt", "hello", "--prompt", "hi", "--json", "--quiet"]));
    let list = v["sequences"].as_array().unwrap();
    assert_eq!(list.len(), 2);
    assert_eq!(list[0]["next"].as_array().unwrap().len(), 5);
    assert!(pleach.ok(&["run", &model, "--prompt", "hello"]).lines().count() == 6);
    let bert = fixture("bert-tiny").display().to_string();
    let v =
        json(&pleach.ok(&["run", &bert, "--similarity", "--ids", "1,2,3", "--ids", "1,2,3", "--ids", "9,8", "--json"]));
    let m: Vec<Vec<f64>> = serde_json::from_value(v["cosine"].clone()).unwrap();
    assert!((m[0][1] - 1.0).abs() < 1e-6 && (m[0][2] - m[2][0]).abs() < 1e-12 && m[0][2] < 0.999);
    assert!(pleach.fails(2, &["run", &model, "--similarity", "--ids", "1"]).contains("encoder"));
}

#[test]
fn generation_streams_and_is_reproducible() {
    let (folder, pleach, model) = setup("generate");
    let base = ["generate", &model, "--prompt", "ab", "--max-new-tokens", "12"];
    let said = pleach.call(&base);
    assert!(said.code == Some(0) && said.err.contains("tokens/s") && said.out.ends_with('\n'), "{said:?}");
    let with = |more: &[&str]| pleach.ok(&base.iter().chain(more).copied().collect::<Vec<_>>());
    let sampled = with(&["--temperature", "1.5", "--top-p", "0.9", "--seed", "7", "--print-ids", "--quiet"]);
    assert_eq!(sampled, with(&["--temperature", "1.5", "--top-p", "0.9", "--seed", "7", "--print-ids", "--quiet"]));
    assert_ne!(sampled, with(&["--temperature", "1.5", "--top-p", "0.9", "--seed", "8", "--print-ids", "--quiet"]));
    let ids: Vec<u32> = sampled.trim().split(',').map(|x| x.parse().unwrap()).collect();
    assert!(!ids.is_empty() && ids.len() <= 12);
    let chat = folder.join("chat.json");
    std::fs::write(&chat, r#"[{"role": "user", "content": "hi"}]"#).unwrap();
    pleach.ok(&["generate", &model, "--chat", &chat.display().to_string(), "--max-new-tokens", "3"]);
    std::fs::write(&chat, r#"{"role": "user"}"#).unwrap();
    let said = pleach.fails(1, &["generate", &model, "--chat", &chat.display().to_string()]);
    assert!(said.contains("list of messages"), "{said}");
    assert!(pleach.fails(2, &[&base[..], &["--temperature", "-1"]].concat()).contains("temperature"));
    let bert = fixture("bert-tiny").display().to_string();
    assert!(pleach.fails(1, &["generate", &bert, "--ids", "1"]).contains("encoder"));
}

#[test]
fn every_stage_can_be_shown() {
    let (folder, pleach, model) = setup("inspect");
    let adapter = fixture("adapters/lora-r4").display().to_string();
    let with = |more: &[&str]| {
        let all: Vec<&str> = ["inspect", &model, "--adapter", &adapter].iter().chain(more).copied().collect();
        pleach.ok(&all)
    };
    assert!(with(&[]).contains("matmul"));
    let rules = with(&["--rules"]);
    let site = rules.lines().skip_while(|l| !l.starts_with("site")).nth(1).unwrap_or_default();
    assert!(rules.starts_with("rule") && site.contains("model.layers.*"), "{rules}");
    assert!(with(&["--mlir", "--kernel", "attention"]).contains("func.func"));
    assert!(with(&["--asm", "--kernel", "attention"]).contains(".text"));
    assert!(with(&["--ptx", "--kernel", "row"]).contains(".visible .entry"));
    assert!(with(&["--dot"]).starts_with("digraph"));
    assert!(with(&["--ir", "--stage", "schedule"]).contains("kernel"));
    let v = json(&with(&["--json"]));
    assert!(v["stages"].as_array().unwrap().len() >= 5 && !v["kernels"].as_array().unwrap().is_empty());
    assert!(v["stages"][0]["operators"]["matmul"].as_u64().unwrap() > 20);
    let sites = v["passes"].as_array().unwrap().iter().flat_map(|p| p["sites"].as_array().unwrap());
    let named = |s: &Value| s["site"].is_string() && s["rules"].as_array().is_some_and(|r| !r.is_empty());
    assert!(sites.clone().count() >= 2 && sites.clone().all(named), "{v}");
    let plan = folder.join("m.pleach").display().to_string();
    pleach.ok(&["compile", &model, "--adapter", &adapter, "-o", &plan, "--quiet"]);
    let text = pleach.ok(&["inspect", &plan, "--kernels", "--memory"]);
    assert!(text.contains("contraction") && text.contains("adapter") && text.contains("live at most"), "{text}");
    assert!(pleach.ok(&["inspect", &plan]).contains("adapter slots: 0"));
    assert!(pleach.fails(2, &["inspect", &plan, "--ir"]).contains("model folder"));
}

#[test]
fn opt_runs_passes_on_text() {
    let (folder, pleach, model) = setup("opt");
    let imported = pleach.ok(&["inspect", &model, "--ir", "--stage", "imported"]);
    let file = folder.join("g.ir");
    std::fs::write(&file, &imported).unwrap();
    let file = file.display().to_string();
    let said = pleach.call(&["opt", &file, "--passes", "canonicalize", "--timing"]);
    assert!(said.out.starts_with("graph core") && said.err.contains("canonicalize"), "{}", said.err);
    // The whole pipeline on text gives what the compiler sees.
    assert_eq!(pleach.ok(&["opt", &file]), pleach.ok(&["inspect", &model, "--ir"]));
    assert!(pleach.ok(&["opt", &file, "--print-ir-after-change", "--stop-after", "1"]).starts_with("// 01-after-"));
    assert!(pleach.fails(1, &["opt", &file, "--passes", "nonsense"]).contains("canonicalize"));
    let small = folder.join("s.ir");
    std::fs::write(&small, "graph imported\nentry \"f\" {\n  %0 = input \"x\" : f32[T,2]\n  %1 = exp(%0) : f32[T,2]\n  output \"y\" %1\n}\n").unwrap();
    let x = folder.join("x.safetensors");
    let values: Vec<u8> = [0.0f32, 1.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![1, 2], &values).unwrap();
    safetensors::serialize_to_file([("x", view)], None, &x).unwrap();
    let table = pleach.ok(&["opt", &small.display().to_string(), "--interpret", &x.display().to_string()]);
    assert!(table.contains("1.000000 2.718282"), "{table}");
    std::fs::write(&small, "graph imported\nentry \"f\" {\n  %0 = inptu \"x\" : f32[T,2]\n}\n").unwrap();
    let said = pleach.fails(1, &["opt", &small.display().to_string()]);
    assert!(said.contains("s.ir:3:") && said.contains('^'), "{said}");
}

#[test]
fn adapters_are_described() {
    let (_folder, pleach, model) = setup("adapter");
    let adapter = fixture("adapters/lora-pattern").display().to_string();
    let v = json(&pleach.ok(&["adapter", "check", &model, &adapter, "--json"]));
    assert_eq!((v["tensors"].as_u64(), v["all_zero"].as_bool()), (Some(14), Some(false)));
    let v = json(&pleach.ok(&["adapter", "targets", &model, "--match", r".*\.(q|v)_proj", "--json"]));
    assert_eq!(v["modules"].as_array().unwrap().len(), 4);
    assert_eq!(json(&pleach.ok(&["adapter", "targets", &model, "--match", "q_proj,v_proj", "--json"])), v);
    let odd = fixture("adapters/lora-odd").display().to_string();
    assert!(pleach.fails(1, &["adapter", "check", &model, &odd]).contains("tensor"));
}

#[test]
fn methods_are_listed_with_what_they_train() {
    let (_folder, pleach, model) = setup("methods");
    let of = |list: &Value, name: &str| list.as_array().unwrap().iter().find(|r| r["method"] == name).cloned().unwrap();
    let plain = json(&pleach.ok(&["methods", "--json"]));
    assert_eq!(of(&plain, "dora")["peft_type"], "LORA");
    assert!(of(&plain, "paca")["formula"].as_str().is_some_and(|f| f.contains("W'")) && plain[0]["trained"].is_null());
    let (spec, r) = (r".*\.(q|v)_proj", "2");
    let list = json(&pleach.ok(&["methods", &model, "--r", r, "--target-modules", spec, "--json"]));
    let targets = pleach.ok(&["adapter", "targets", &model, "--match", spec, "--r", r, "--json"]);
    assert_eq!(of(&list, "lora")["trained"], json(&targets)["parameters"]);
    assert!(of(&list, "paca")["trained"].as_u64() < of(&list, "lora")["trained"].as_u64());
    assert_eq!(of(&list, "dora")["merges"], true);
    // What a step keeps is what `plan` foretells.
    let planned = |name: &str| {
        let shape = ["--accum", "2", "--batch", "8", "--max-length", "64", "--json", "--quiet"];
        let what = ["plan", &model, "--method", name, "--r", r, "--target-modules", spec];
        json(&pleach.ok(&[&what[..], &shape].concat()))["saved_bytes"].as_f64().unwrap() / 512.0
    };
    let saved = ["lora", "paca", "vera"].map(|name| {
        let (saved, planned) = (of(&list, name)["saved_bytes_per_token"].as_f64().unwrap(), planned(name));
        assert!((saved / planned - 1.0).abs() < 0.01, "{name}: {saved}, {planned}");
        saved
    });
    assert!(saved[0] != saved[1] && saved[1] != saved[2], "{saved:?}");
    let encoder = fixture("bert-tiny").display().to_string();
    let list = json(&pleach.ok(&["methods", &encoder, "--json"]));
    assert!(of(&list, "lora")["trained"].as_u64() > Some(0) && of(&list, "lora")["saved_bytes_per_token"].is_null());
}

#[test]
fn benchmarks_report_one_object() {
    let (_folder, pleach, model) = setup("bench");
    let v = json(&pleach.ok(&["bench", "run", &model, "--tokens", "16", "--json", "--quiet", "--threads", "1"]));
    for key in ["tokens_per_s", "planned_peak_bytes", "peak_rss_bytes", "arena_bytes", "live_peak_bytes", "peak_share"]
    {
        assert!(v[key].as_f64().is_some_and(|x| x > 0.0), "{key}: {v}");
    }
    assert!(v["step_ms"]["median"].as_f64() >= v["step_ms"]["min"].as_f64());
    assert!(v["compile_ms"]["cached"].as_f64() < v["compile_ms"]["cold"].as_f64());
    assert!(v["compile_ms"]["per_stage"].as_object().unwrap().len() >= 8);
    let v = json(&pleach.ok(&["bench", "generate", &model, "--tokens", "8", "--random-weights", "--json", "--quiet"]));
    assert!(v["bandwidth_share"].as_f64().is_some_and(|x| x > 0.0), "{v}");
    let v = json(&pleach.ok(&["bench", "kernels", &model, "--tokens", "5", "--json", "--quiet"]));
    assert!(v.as_array().unwrap().iter().all(|r| r["ms"].as_f64().unwrap() > 0.0 && r["shape"][0] == 5));
    let encoder = fixture("bert-tiny").display().to_string();
    for call in [&["bench", "run", &encoder, "--tokens", "999"][..], &["run", &encoder, "--ids", &["5"; 999].join(",")]]
    {
        assert!(pleach.fails(2, call).contains("a sequence has 999 tokens; the model takes at most "));
    }
}

#[test]
fn doctor_fills_a_page() {
    let (_folder, pleach, _) = setup("doctor");
    let v = json(&pleach.ok(&["doctor", "--json"]));
    for key in ["pleach", "processor", "memory", "LLVM and MLIR", "compile cache", "ptxas"] {
        assert!(v[key].is_string(), "{key}: {v}");
    }
}

#[test]
fn one_tied_tensor_parts_when_only_the_head_changes() {
    let (folder, pleach, model) = setup("tied");
    let adapter = folder.join("head");
    std::fs::create_dir(&adapter).unwrap();
    let config =
        r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["lm_head"], "task_type": "CAUSAL_LM"}"#;
    std::fs::write(adapter.join("adapter_config.json"), config).unwrap();
    let shape = crate::kit::tensors(&fixture("llama-tiny/model.safetensors"))["model.embed_tokens.weight"].0.clone();
    let fill = |n: usize| (0..n).flat_map(|i| ((i % 7) as f32 * 0.05 - 0.1).to_le_bytes()).collect::<Vec<u8>>();
    let (a, b) = (fill(2 * shape[1]), fill(2 * shape[0]));
    let view = |s: Vec<usize>, x| safetensors::tensor::TensorView::new(safetensors::Dtype::F32, s, x).unwrap();
    let list = [
        ("base_model.model.lm_head.lora_A.weight", view(vec![2, shape[1]], &a)),
        ("base_model.model.lm_head.lora_B.weight", view(vec![shape[0], 2], &b)),
    ];
    safetensors::serialize_to_file(list, None, &adapter.join("adapter_model.safetensors")).unwrap();
    let (adapter, merged) = (adapter.display().to_string(), folder.join("merged"));
    let out = merged.display().to_string();
    let report = json(&pleach.ok(&["merge", &model, &adapter, "--out", &out, "--verify", "2", "--json", "--quiet"]));
    assert!(report["verified_relative_error"].as_f64().unwrap() <= 2e-5, "{report}");
    let config = json(&std::fs::read_to_string(merged.join("config.json")).unwrap());
    assert_eq!(config["tie_word_embeddings"], false);
    // Nothing is written over what is read.
    let e = pleach.fails(2, &["merge", &model, &adapter, "--out", &adapter, "--overwrite"]);
    assert!(e.contains("the adapter's own folder"), "{e}");
    let weights = merged.join("model.safetensors").display().to_string();
    let e = pleach.fails(2, &["run", &out, "--ids", "1", "--out", &weights]);
    assert!(e.contains("lies among what is read"), "{e}");
    // What a run that trained into the model's folder left there is not the model's.
    let trained = folder.join("trained");
    copy(&merged, &trained);
    std::fs::write(trained.join("adapter_config.json"), "{}").unwrap();
    let again = folder.join("again");
    pleach.ok(&["merge", trained.to_str().unwrap(), &adapter, "--out", again.to_str().unwrap(), "--quiet"]);
    assert!(again.join("config.json").is_file() && !again.join("adapter_config.json").exists());
    copy(&merged, &folder.join("copy"));
}

#[test]
fn paca_becomes_an_equal_lora() {
    let (folder, pleach, model) = setup("convert");
    let paca = fixture("adapters/paca").display().to_string();
    let lora = folder.join("lora").display().to_string();
    let said = pleach.fails(1, &["adapter", "convert", &paca, "--to", "lora", "--out", &lora]);
    assert!(said.contains("--model"), "{said}");
    let convert = ["adapter", "convert", &paca, "--to", "lora", "--out", &lora, "--model", &model];
    pleach.ok(&convert);
    assert!(pleach.fails(1, &convert).contains("--overwrite"));
    pleach.ok(&[&convert[..], &["--overwrite"]].concat());
    let logits = |adapter: &str, more: &[&str]| {
        let out = folder.join("o.safetensors");
        let to = out.display().to_string();
        let run = ["run", &model, "--ids", "5,9,33,40", "--adapter", adapter, "--out", &to, "--quiet"];
        pleach.ok(&[&run[..], more].concat());
        tensors(&out)["logits"].1.clone()
    };
    let want = logits(&paca, &[]);
    assert!(relative(&logits(&lora, &[]), &want) < 1e-5);
    assert!(relative(&logits(&lora, &["--merge"]), &want) < 1e-5);
    let r = json(&pleach.ok(&["adapter", "check", &model, &paca, "--json"]));
    assert_eq!((r["method"].as_str(), r["sites"].as_array().map(Vec::len)), (Some("paca"), Some(14)));
    assert!(pleach.fails(2, &["adapter", "convert", &paca, "--to", "dora", "--out", &lora]).contains("lora"));
    let (dora, base) = (fixture("adapters/dora").display().to_string(), fixture("llama-tiny-v4").display().to_string());
    let refused = folder.join("refused").display().to_string();
    let e = pleach.fails(1, &["adapter", "convert", &dora, "--model", &base, "--to", "lora", "--out", &refused]);
    assert!(e.contains("no LoRA adapter is equivalent; `pleach merge`") && !folder.join("refused").exists(), "{e}");
}

#[test]
fn inspect_shows_code_for_a_gpu() {
    let (_folder, pleach, model) = setup("inspect-gpu");
    let train = ["--method", "lora", "--r", "4", "--target-modules", "q_proj", "--batch", "1", "--max-length", "16"];
    for target in ["sm_80", "sm_90a"] {
        let shown = |form: &[&str], more: &[&str]| {
            pleach.ok(&[&["inspect", &model, "--target", target], form, more, &["--quiet"]].concat())
        };
        let mlir = shown(&["--mlir"], &train);
        assert!(mlir.contains("gpu.module @kernels") && mlir.contains("nvvm.kernel"), "{mlir}");
        for form in ["--ptx", "--asm"] {
            let ptx = shown(&[form, "--kernel", "mm"], &train);
            assert!(ptx.contains(&format!(".target {target}")) && ptx.contains(".entry k"), "{ptx}");
        }
        let names = shown(&["--kernels"], &train);
        let one =
            names.lines().find_map(|l| l.split_whitespace().next().filter(|k| k.starts_with('k') && k.contains("_mm")));
        // the kernels whose code is shown are those of the plan
        let one = one.unwrap();
        assert!(mlir.contains(&format!("llvm.func @{one}(")), "{one}");
        assert!(shown(&["--memory", "--rules", "--ir"], &train).contains("entry \"accumulate\""));
        let all = json(&shown(&["--json", "--mlir", "--ptx", "--kernel", one, "--dot", "--ir"], &[]));
        assert!(all["code"][0]["ptx"].as_str().unwrap_or_default().contains(target) || all["code"].is_null(), "{all}");
    }
    // a processor's target, and PTX beside it: of a graph that was made for a GPU
    let ptx = pleach.ok(&["inspect", &model, "--ptx", "--kernel", "mm"]);
    assert!(ptx.contains(".target sm_80"), "{ptx}");
    let both = json(&pleach.ok(&["inspect", &model, "--json", "--mlir", "--asm", "--kernel", "k1_"]));
    let code = both["code"].as_array().unwrap();
    assert_eq!(code.len(), 1, "{both}");
    assert!(
        code[0]["mlir"].as_str().unwrap().contains("func.func @k1_")
            && code[0]["asm"].as_str().unwrap().contains("k1_")
    );
}

#[test]
fn opt_finds_what_a_pass_changes() {
    let (folder, pleach, model) = setup("opt-diff");
    let at = |name: &str| folder.join(name).display().to_string();
    std::fs::write(at("g.ir"), pleach.ok(&["inspect", &model, "--ir", "--stage", "imported"])).unwrap();
    let dump = at("dump");
    std::fs::write(at("a.ir"), pleach.ok(&["opt", &at("g.ir"), "--dump-dir", &dump])).unwrap();
    let mut stages: Vec<String> =
        std::fs::read_dir(&dump).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap()).collect();
    stages.sort();
    assert_eq!(stages[..2], ["00-input.ir", "01-canonicalize.ir"]);
    let last = folder.join("dump").join(stages.last().unwrap()).display().to_string();
    assert_eq!(pleach.ok(&["opt", "--diff", &at("a.ir"), &last]), "");
    // One more node moves the numbers of all behind it, and is one line.
    let head = "graph imported\nentry \"f\" {\n  %0 = input \"x\" : f32[T,2]\n";
    std::fs::write(at("b.ir"), format!("{head}  %1 = exp(%0) : f32[T,2]\n  output \"y\" %1\n}}\n")).unwrap();
    std::fs::write(
        at("c.ir"),
        format!("{head}  %1 = neg(%0) : f32[T,2]\n  %2 = exp(%0) : f32[T,2]\n  output \"y\" %2\n}}\n"),
    )
    .unwrap();
    let said = pleach.call(&["opt", "--diff", &at("b.ir"), &at("c.ir")]);
    let changed: Vec<&str> = said.out.lines().filter(|l| l.starts_with(['+', '-'])).collect();
    assert_eq!(changed, ["+ %1 = neg(%0) : f32[T,2]"], "{}", said.out);
    assert!(said.err.contains("0 lines only in the first, 1 only in the second"), "{}", said.err);
    // Every stage in the interpreter.
    let values: Vec<u8> = [0.0f32, 1.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![1, 2], &values).unwrap();
    safetensors::serialize_to_file([("x", view)], None, &folder.join("x.safetensors")).unwrap();
    let said = pleach.ok(&["opt", &at("c.ir"), "--interpret", &at("x.safetensors"), "--check-each"]);
    assert!(said.contains("stages give the same outputs"), "{said}");
}

/// The text of a training graph goes the way that `train` compiles it.
#[test]
fn opt_does_what_a_compile_does() {
    let (folder, pleach, model) = setup("opt-train");
    let at = |name: &str| folder.join(name).display().to_string();
    let method = ["--method", "lora", "--r", "4", "--batch", "2", "--max-length", "32", "--dtype", "bf16"];
    let stage = |name: &str| pleach.ok(&[&["inspect", &model, "--ir", "--stage", name], &method[..]].concat());
    std::fs::write(at("g.ir"), stage("imported")).unwrap();
    let options = ["--dtype", "bf16", "--tokens", "64", "--at-once"];
    let made = pleach.ok(&[&["opt", &at("g.ir")], &options[..]].concat());
    assert!(made.contains("entry \"step\"") && !made.contains("entry \"update\""));
    assert_eq!(made, stage("final"));
    let two = pleach.ok(&["opt", &at("g.ir"), "--dtype", "bf16", "--passes", "canonicalize,precision,differentiate"]);
    assert!(two.contains("entry \"accumulate\"") && two.contains("entry \"update\""));
}

#[test]
fn opt_leaves_a_reproducer() {
    let (folder, pleach, _) = setup("opt-reproducer");
    let at = |name: &str| folder.join(name).display().to_string();
    // An entry to be trained needs one output called loss.
    let text = "graph core\nparam @0 \"w\" f32[2,2] train checkpoint(\"w\")\nentry \"train\" {\n  %0 = input \"x\" : f32[T,2]\n  %1 = param @0 : f32[2,2]\n  %2 = matmul(%0, %1) : f32[T,2]\n  output \"y\" %2\n}\n";
    std::fs::write(at("g.ir"), text).unwrap();
    let said = pleach.fails(1, &["opt", &at("g.ir"), "--reproducer", &at("r.ir")]);
    assert!(said.contains("pass differentiate") && said.contains("--passes differentiate"), "{said}");
    let again = pleach.fails(1, &["opt", &at("r.ir"), "--passes", "differentiate", "--reproducer", &at("s.ir")]);
    assert_eq!(said.lines().next(), again.lines().next());
    // every option goes into the command that repeats it
    let options = ["--dtype", "bf16", "--target", "sm_80", "--tokens", "64", "--tokens", "train=7", "--at-once"];
    let said = pleach.fails(1, &[&["opt", &at("g.ir"), "--reproducer", &at("r.ir")], &options[..]].concat());
    let command = "--passes differentiate --at-once --dtype bf16 --target sm_80 --tokens 64 --tokens train=7";
    assert!(said.contains(command), "{said}");
}

#[test]
fn completions_and_manual_pages_name_the_commands() {
    let (folder, pleach, _) = setup("shell");
    for shell in ["bash", "zsh", "fish"] {
        let text = pleach.ok(&["completions", shell]);
        assert!(text.contains("plan-memory") && text.contains("target-modules"), "{shell}");
    }
    let pages = folder.join("man").display().to_string();
    pleach.ok(&["man", "--out", &pages, "--quiet"]);
    let page = std::fs::read_to_string(folder.join("man/pleach-train.1")).unwrap();
    assert!(page.contains("max\\-steps"), "{page}");
}
