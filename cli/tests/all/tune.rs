//! `tune` and `inspect --estimate`: forms of GPU kernels are measured against the stand-in driver, whose clock is set so that it is known which
//! one is fastest; what a plan takes at least is computed from counts.

use crate::cuda::{CUDA, Gpu, rows};
use serde_json::Value;
use std::path::Path;

const TRAIN: [&str; 14] = [
    "--method",
    "lora",
    "--r",
    "8",
    "--target-modules",
    "all-linear",
    "--entry",
    "train",
    "--batch",
    "2",
    "--max-length",
    "12",
    "--dtype",
    "bf16",
];

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

/// Every kernel's forms and the chosen one, with milliseconds.
fn forms(out: &Value) -> Vec<(Vec<(String, f64)>, String)> {
    let kernels = out["kernels"].as_array().unwrap();
    let list = |k: &Value| -> Vec<(String, f64)> {
        let forms = k["forms"].as_array().unwrap();
        // What the entries measured do not run has no time.
        forms.iter().map(|f| (f["form"].as_str().unwrap().into(), f["ms"].as_f64().unwrap_or(f64::NAN))).collect()
    };
    kernels.iter().map(|k| (list(k), k["chosen"].as_str().unwrap().into())).collect()
}

#[test]
fn the_fastest_forms_are_kept_and_compiled_again() {
    let g = Gpu::new("tune-train");
    let (tuned, slow, again, plain) =
        (g.file("tuned.pleach"), g.file("slow.pleach"), g.file("again.pleach"), g.file("plain.pleach"));
    let tune = |properties: &str, out: &str| {
        let args = [&["tune", &g.model, "--rounds", "1", "--json", "-o", out][..], &TRAIN, &CUDA].concat();
        json(&g.with(properties).ok(&args))
    };
    // A launch takes 10 µs, one of the second form of a kernel 4, one of a third form 3 but by little.
    let out = tune("sm=8.0,checks=off,time=_form1:4,time=_form2:3.99", &tuned);
    let all = forms(&out);
    let mut simple = 0;
    let mut libraries = 0;
    for (forms, chosen) in &all {
        assert!(forms.len() >= 2, "{forms:?}");
        // Without the library nobody waits for it.
        let (library, forms): (Vec<_>, Vec<_>) = forms.iter().cloned().partition(|f| f.0 == "cublaslt");
        assert!(library.iter().all(|f| f.1.is_nan()), "{library:?}");
        libraries += library.len();
        if forms.len() < 2 {
            assert_eq!(*chosen, forms[0].0);
            continue;
        }
        if forms[0].1.is_nan() {
            assert_eq!(*chosen, forms[0].0);
            continue;
        }
        let best = forms.iter().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
        assert!(best.1 < forms[0].1 && *chosen == best.0, "{forms:?}");
        // A form with a shared sum has a launch more.
        if !forms.iter().any(|f| f.0.contains("split")) {
            simple += 1;
            assert!((forms[0].1 / forms[1].1 - 2.5).abs() < 1e-3, "{forms:?}");
            assert_eq!(*chosen, forms[2.min(forms.len() - 1)].0, "{forms:?}");
        }
    }
    assert!(all.len() > 3 && simple > 0 && libraries > 0, "{all:?}");
    assert!(out["chosen_ms"].as_f64() < out["usual_ms"].as_f64());

    // The same plan is made from the choices in it; without them, another one.
    let compile = |out: &str, more: &[&str]| {
        g.cpu.ok(&[&["compile", &g.model, "--target", "sm_80", "-o", out, "--quiet"][..], &TRAIN, more].concat())
    };
    compile(&again, &["--choices", &tuned]);
    compile(&plain, &[]);
    let bytes = |f: &str| std::fs::read(f).unwrap();
    assert_eq!(bytes(&again), bytes(&tuned));
    assert_ne!(bytes(&plain), bytes(&tuned));
    let shown = json(&g.cpu.ok(&["inspect", &tuned, "--json"]));
    assert_eq!(shown["choices"].as_array().unwrap().len(), all.len());

    // Measured elsewhere: a plan with every form goes there, times come back, and the same plan is made of them.
    let (every, times, made) = (g.file("every.pleach"), g.file("times.json"), g.file("made.pleach"));
    let here = |out: &str, more: &[&str]| {
        g.cpu.ok(&[&["tune", &g.model, "--target", "sm_80", "-o", out][..], &TRAIN, more].concat())
    };
    assert!(here(&every, &["--forms-only"]).contains("to be measured"));
    let listed = json(&g.cpu.ok(&["inspect", &every, "--json"]));
    let list = listed["meta"]["extra"]["alternatives"].as_array().unwrap();
    let ms = |a: &Value| {
        let kernel = out["kernels"].as_array().unwrap().iter().find(|k| k["signature"] == a["signature"]).unwrap();
        let form = kernel["forms"].as_array().unwrap().iter().find(|f| f["form"] == a["form"]).unwrap();
        serde_json::json!({"signature": a["signature"], "form": a["form"], "ms": form["ms"]})
    };
    let told: Vec<Value> = list.iter().map(ms).collect();
    std::fs::write(&times, serde_json::json!({ "forms": told }).to_string()).unwrap();
    here(&made, &["--times", &times]);
    assert_eq!(bytes(&made), bytes(&tuned));
    std::fs::write(&times, "[{\"signature\":\"0\",\"form\":\"mma-1x1\",\"ms\":1}]").unwrap();
    let e = g
        .cpu
        .fails(1, &[&["tune", &g.model, "--target", "sm_80", "-o", &made, "--times", &times][..], &TRAIN].concat());
    assert!(e.contains("none of its times"), "{e}");

    // Where the usual forms are the fastest, or hardly slower, they stay.
    for (forms, chosen) in forms(&tune("sm=8.0,checks=off,time=_form1:9.9,time=_form:50", &slow)) {
        assert_eq!(chosen, forms[0].0, "{forms:?}");
    }
    let same = |a: &str, b: &str| {
        let ptx = |f: &str| g.cpu.ok(&["inspect", f, "--ptx"]);
        ptx(a) == ptx(b)
    };
    assert!(same(&slow, &plain) && !same(&tuned, &plain));

    // What is chosen computes the same: sums have another order.
    let data = g.file("rows.jsonl");
    rows(Path::new(&data));
    let losses = |plan: &str| {
        let out = format!("{plan}-out");
        let run = [
            "train",
            plan,
            "--weights",
            &g.model,
            "--data",
            &data,
            "--out",
            &out,
            "--batch",
            "2",
            "--max-length",
            "12",
        ];
        g.with("sm=8.0").ok(&[&run[..], &["--max-steps", "2", "--lr", "1e-2"]].concat());
        crate::cuda::lines(&out, &["loss", "grad_norm"])
    };
    for (a, b) in losses(&tuned).iter().zip(losses(&plain)) {
        assert!((a[0] - b[0]).abs() < 2e-3 * b[0] && (a[1] - b[1]).abs() < 2e-2 * b[1], "{a:?} {b:?}");
    }
}

#[test]
fn products_go_to_a_library_where_it_is_faster() {
    let g = Gpu::new("tune-library");
    let (tuned, plain, data) = (g.file("tuned.pleach"), g.file("plain.pleach"), g.file("rows.jsonl"));
    rows(Path::new(&data));
    // Everything takes 10 µs, but for the library and what is computed from its sums.
    let args = [&["tune", &g.model, "--rounds", "1", "--json", "-o", &tuned][..], &TRAIN, &CUDA].concat();
    let out = json(&g.with_cublaslt("sm=8.0,checks=off,time=cublaslt:0.1,time=_rest:0.1").ok(&args));
    let mut chosen = 0;
    for (forms, form) in forms(&out) {
        let library = forms.iter().any(|f| f.0 == "cublaslt" && f.1.is_finite());
        assert!(!library || form == "cublaslt", "{forms:?} {form}");
        chosen += usize::from(library);
    }
    assert!(chosen > 3 && g.products() > 0, "{out}");
    let shown = g.cpu.ok(&["inspect", &tuned, "--kernels"]);
    assert!(shown.matches("(cuBLASLt)").count() >= chosen && shown.contains("_rest"), "{shown}");
    g.cpu.ok(&[&["compile", &g.model, "--target", "sm_80", "-o", &plain, "--quiet"][..], &TRAIN].concat());

    let train = |pleach: &crate::kit::Pleach, plan: &str, name: &str| {
        let out = g.file(name);
        let run = ["train", plan, "--weights", &g.model, "--data", &data, "--out", &out, "--batch", "2"];
        let said = pleach.call(&[&run[..], &["--max-length", "12", "--max-steps", "3", "--lr", "1e-2"]].concat());
        assert_eq!(said.code, Some(0), "{}", said.err);
        let bytes = std::fs::read(Path::new(&out).join("adapter_model.safetensors")).unwrap();
        (crate::cuda::lines(&out, &["loss", "grad_norm"]), bytes, said.err)
    };
    let (want, bytes, _) = train(&g.with("sm=8.0"), &plain, "plain");
    assert_eq!(g.products(), 0);
    let (got, _, said) = train(&g.with_cublaslt("sm=8.0"), &tuned, "library");
    assert!(g.products() > 0 && !said.contains("cuBLASLt"), "{said}");
    for (a, b) in got.iter().zip(&want) {
        assert!((a[0] - b[0]).abs() < 2e-3 * b[0] && (a[1] - b[1]).abs() < 2e-2 * b[1], "{a:?} {b:?}");
    }
    // Without the library the same plan runs with its own kernels, which are those of the other plan, and says so.
    let (_, own, said) = train(&g.with("sm=8.0"), &tuned, "own");
    assert!(said.contains("cuBLASLt") && said.contains("/nonexistent") && said.contains("own kernels"), "{said}");
    assert!(own == bytes && g.products() == 0);
    let doctor = |p: &crate::kit::Pleach| p.ok(&["doctor"]);
    assert!(doctor(&g.with_cublaslt("sm=8.0")).contains("found; `pleach tune`"));
    assert!(doctor(&g.with("sm=8.0")).contains("nothing needs it"));
}

#[test]
fn inference_is_tuned_by_prompts_and_single_tokens() {
    let g = Gpu::new("tune-infer");
    let plan = g.file("tuned.pleach");
    let args = [
        "tune",
        &g.model,
        "--entry",
        "infer,generate",
        "--dtype",
        "bf16",
        "--tokens",
        "70",
        "--rounds",
        "1",
        "-o",
        &plan,
    ];
    let table = g.with("sm=9.0,checks=off,time=_form1:2").ok(&[&args[..], &CUDA].concat());
    assert!(table.contains("wgmma-") && table.contains("mma-") && table.contains("in those chosen"), "{table}");
    let logits = |plan: &[&str]| g.logits(&g.with("sm=9.0"), "out.safetensors", plan);
    let run = |f: &str| {
        let out = g.file("run.safetensors");
        g.with("sm=9.0").ok(&["run", f, "--weights", &g.model, "--ids", "5,6,7,8", "--out", &out, "--quiet"]);
        crate::kit::tensors(Path::new(&out))["logits"].1.clone()
    };
    let want = logits(&["--ids", "5,6,7,8", "--dtype", "bf16", "--target", "cuda"]);
    let off = crate::kit::relative(&run(&plan), &want);
    assert!(off < 1e-2, "{off}");
}

#[test]
fn what_has_no_choice_is_refused() {
    let g = Gpu::new("tune-refused");
    let plan = g.file("a.pleach");
    let e = g.cpu.fails(2, &["tune", &g.model, "--entry", "infer", "-o", &plan]);
    assert!(e.contains("one form of every kernel") && e.contains("--target cuda"), "{e}");
    let none = g.cpu.with_env(&[("PLEACH_CUDA_LIBRARY", "/nonexistent/libcuda.so.1")]);
    let e = none.fails(1, &["tune", &g.model, "--target", "cuda", "-o", &plan]);
    assert!(e.contains("nonexistent"), "{e}");
    g.cpu.ok(&["compile", &g.model, "--target", "sm_80", "-o", &plan, "--quiet"]);
    let e = g.cpu.fails(2, &["compile", &g.model, "--target", "sm_80", "--choices", &plan, "-o", &plan]);
    assert!(e.contains("pleach tune"), "{e}");
    let e = g.cpu.fails(2, &["tune", &plan, "--target", "sm_80", "-o", &plan]);
    assert!(e.contains("model folder"), "{e}");
}

#[test]
fn an_estimate_says_what_it_is() {
    let g = Gpu::new("estimate");
    let plan = g.file("a.pleach");
    g.cpu.ok(&[&["compile", &g.model, "--target", "sm_90a", "-o", &plan, "--quiet"][..], &TRAIN].concat());
    let at = ["--capacity", "T=24,S=2,L=22,P=12"];
    let text = g.cpu.ok(&[&["inspect", &plan, "--estimate"][..], &at].concat());
    for word in ["not a measurement", "h200", "accumulate: at least", "wgmma", "ms bound", "T=24"] {
        assert!(text.contains(word), "{word}: {text}");
    }
    let out = json(&g.cpu.ok(&[&["inspect", &plan, "--estimate", "h100", "--json"][..], &at].concat()));
    let e = &out["estimate"];
    assert!(e["what"].as_str().unwrap().contains("not a measurement") && e["machine"]["name"] == "h100");
    let number = |v: &Value| v.as_f64().unwrap();
    let accumulate = e["entries"].as_array().unwrap().iter().find(|x| x["name"] == "accumulate").unwrap();
    let sum = |of: &str, key: &str| accumulate[of].as_array().unwrap().iter().map(|k| number(&k[key])).sum::<f64>();
    for key in ["flops", "bytes", "launches"] {
        assert_eq!(sum("kernels", key), sum("classes", key), "{key}");
    }
    assert!((sum("kernels", "bound_ms") - number(&accumulate["bound_ms"])).abs() < 1e-9);
    // Twice the tokens: twice the products, but for attention, whose sequences are twice as long.
    let more = json(&g.cpu.ok(&["inspect", &plan, "--estimate", "h100", "--json", "--capacity", "T=48,S=2,L=44,P=24"]));
    let flops = |out: &Value, class: &str| -> f64 {
        let entries = out["estimate"]["entries"].as_array().unwrap();
        let e = entries.iter().find(|x| x["name"] == "accumulate").unwrap();
        e["classes"].as_array().unwrap().iter().filter(|c| c["name"] == class).map(|c| number(&c["flops"])).sum()
    };
    let ratio = |class: &str| flops(&more, class) / flops(&out, class);
    assert!((ratio("contraction") - 2.0).abs() < 0.02, "{}", ratio("contraction"));
    assert!((ratio("attention") - 4.0).abs() < 0.02, "{}", ratio("attention"));

    let e = g.cpu.fails(2, &["inspect", &plan, "--estimate", "b200"]);
    assert!(e.contains("a100, h100, h200"), "{e}");
    assert!(g.cpu.fails(2, &["inspect", &plan, "--estimate", "a100"]).contains("does not run there"));
    assert!(g.cpu.fails(2, &["inspect", &g.model, "--estimate"]).contains("compiled plan"));
    g.cpu.ok(&["compile", &g.model, "-o", &plan, "--quiet"]);
    assert!(g.cpu.fails(2, &["inspect", &plan, "--estimate"]).contains("sm_80 or sm_90a"));
}

/// What every launch of a plan takes of a multiprocessor, as the assembler says.
#[test]
#[allow(clippy::print_stderr, reason = "a test that is skipped says so")]
fn the_assembler_tells_what_launches_take() {
    let g = Gpu::new("resources");
    let plan = g.file("a.pleach");
    g.cpu.ok(&[&["compile", &g.model, "--target", "sm_90a", "-o", &plan, "--quiet"][..], &TRAIN].concat());
    let launches = |v: &Value| -> Vec<Value> {
        v["kernels"].as_array().unwrap().iter().flat_map(|k| k["gpu"].as_array().unwrap().clone()).collect()
    };
    // Nothing to ask.
    let alone = g.cpu.with_env(&[("PLEACH_PTXAS", ""), ("PATH", "/nonexistent")]);
    let text = alone.ok(&["inspect", &plan, "--kernels"]);
    assert!(text.contains("registers and spills are known where ptxas is"), "{text}");
    let v = json(&alone.ok(&["inspect", &plan, "--json", "--kernels"]));
    assert!(launches(&v).len() > 10 && launches(&v).iter().all(|l| l.get("registers").is_none()), "{v}");
    let Some(program) = pleach_codegen::ptxas::find() else {
        eprintln!("skipped: there is no ptxas; set PLEACH_PTXAS or run `make setup`");
        return;
    };
    let asks = g.cpu.with_env(&[("PLEACH_PTXAS", &program.display().to_string())]);
    let text = asks.ok(&["inspect", &plan, "--kernels"]);
    assert!(text.contains("registers") && !text.contains("known where ptxas is"), "{text}");
    let v = json(&asks.ok(&["inspect", &plan, "--json", "--kernels"]));
    for l in launches(&v) {
        let number = |key: &str| l[key].as_u64().unwrap_or_else(|| panic!("{key}: {l}"));
        // All threads of a block have room in a multiprocessor's registers.
        assert!(number("registers") >= 8 && number("registers") * number("threads") <= 65536, "{l}");
        assert_eq!(number("spilled_bytes"), 0, "{l}");
        assert!(text.contains(l["function"].as_str().unwrap()), "{l}: {text}");
    }
}
