//! `pleach train` and `pleach plan` on the tiny model: the same numbers for any number of threads, after kills and from a
//! plan file; rows of every form; what is refused.

use crate::kit::{Folder, Pleach, fixture, relative, tensors};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// Rows of ids that are the same everywhere.
fn write_rows(path: &Path) {
    let mut text = String::new();
    let mut x = 7u64;
    for i in 0..11 {
        let ids: Vec<String> = (0..4 + i % 9)
            .map(|_| {
                x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                ((x >> 33) % 128).to_string()
            })
            .collect();
        text += &format!("{{\"input_ids\":[{}]}}\n", ids.join(","));
    }
    std::fs::write(path, text).unwrap();
}

struct Case {
    folder: Folder,
    pleach: Pleach,
    model: String,
    data: String,
}

impl Case {
    fn new(name: &str) -> Case {
        let folder = Folder::new(name);
        let data = folder.join("rows.jsonl");
        write_rows(&data);
        let pleach = Pleach::new(&folder);
        let model = fixture("llama-tiny").display().to_string();
        Case { pleach, model, data: data.display().to_string(), folder }
    }

    fn out(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }

    /// Arguments of a short run into a folder.
    fn args<'a>(&'a self, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
        let base = ["train", &self.model, "--data", &self.data, "--out", out, "--batch", "2", "--max-length", "16"];
        [&base[..], &["--max-steps", "8", "--save-every", "3"], more].concat()
    }

    fn train(&self, out: &str, more: &[&str]) -> String {
        self.pleach.ok(&self.args(out, more))
    }

    /// Resumes a run and kills it so many milliseconds later.
    fn kill(&self, out: &str, more: &[&str], ms: u64) {
        let mut child = Command::new(env!("CARGO_BIN_EXE_pleach"))
            .args(self.args(out, &[more, &["--resume", "latest"]].concat()))
            .env("PLEACH_CACHE_DIR", self.folder.join("cache"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(ms));
        let _ = child.kill();
        child.wait().unwrap();
    }
}

const LORA: [&str; 8] = ["--method", "lora", "--r", "4", "--target-modules", "all-linear", "--quiet", "--json"];

/// Loss, rate, norm and tokens of every step, and the adapter's bytes.
fn results(out: &str) -> (Vec<String>, Vec<u8>) {
    let text = std::fs::read_to_string(Path::new(out).join("metrics.jsonl")).unwrap();
    let line = |l: &str| {
        let v: Value = serde_json::from_str(l).unwrap();
        ["step", "loss", "lr", "grad_norm", "tokens"].map(|k| v[k].to_string()).join(" ")
    };
    (text.lines().map(line).collect(), std::fs::read(Path::new(out).join("adapter_model.safetensors")).unwrap())
}

#[test]
fn threads_kills_and_plan_files_change_no_bit() {
    let c = Case::new("train-bits");
    let options =
        [&LORA[..], &["--accum", "2", "--max-grad-norm", "0.5", "--schedule", "cosine", "--warmup", "2"]].concat();
    let one = c.out("one");
    let said: Value = serde_json::from_str(&c.train(&one, &[&options[..], &["--threads", "1"]].concat())).unwrap();
    assert_eq!((said["steps"].as_u64(), said["steps_now"].as_u64()), (Some(8), Some(8)));
    let want = results(&one);
    assert_eq!(want.0.len(), 8);
    let metrics = std::fs::read_to_string(Path::new(&one).join("metrics.jsonl")).unwrap();
    let first: Value = serde_json::from_str(metrics.lines().next().unwrap()).unwrap();
    for key in ["step_ms", "tokens_per_s", "planned_peak_bytes", "peak_rss_bytes"] {
        assert!(first[key].as_f64().unwrap() > 0.0, "{key}: {first}");
    }
    for n in [3, 6, 8] {
        assert!(Path::new(&one).join(format!("checkpoint-{n}/optimizer.safetensors")).is_file());
    }
    let three = c.out("three");
    c.train(&three, &[&options[..], &["--threads", "3"]].concat());
    assert_eq!(results(&three), want);
    // Killed at several moments, each time resumed with another number of threads.
    let killed = c.out("killed");
    for (i, ms) in [30, 60, 90, 130, 180].into_iter().enumerate() {
        let threads = (i % 3 + 1).to_string();
        c.kill(&killed, &[&options[..], &["--threads", &threads]].concat(), ms);
    }
    let resume = [&options[..], &["--resume", "latest"]].concat();
    c.train(&killed, &resume);
    assert_eq!(results(&killed), want);
    let before = std::fs::read(Path::new(&killed).join("metrics.jsonl")).unwrap();
    let said: Value = serde_json::from_str(&c.train(&killed, &resume)).unwrap();
    assert_eq!(said["steps_now"], 0);
    assert_eq!(std::fs::read(Path::new(&killed).join("metrics.jsonl")).unwrap(), before);
    assert_eq!(results(&killed), want);
    // A compiled plan.
    let plan = c.out("t.pleach");
    let shape = ["--entry", "train", "--batch", "2", "--max-length", "16", "-o", &plan];
    c.pleach.ok(&[&["compile", &c.model], &LORA[..6], &shape[..]].concat());
    let from_plan = c.out("from-plan");
    let mut args = c.args(&from_plan, &options[6..]);
    args[1] = &plan;
    args.extend(["--weights", &c.model]);
    c.pleach.ok(&args);
    assert_eq!(results(&from_plan), want);
    // What was trained loads, and changes the model.
    c.pleach.ok(&["adapter", "check", &c.model, &one]);
    let logits = |adapter: &[&str], name: &str| {
        let file = c.out(name);
        c.pleach.ok(&[&["run", &c.model, "--ids", "5,6,7,8", "--out", &file, "--quiet"], adapter].concat());
        tensors(Path::new(&file))["logits"].1.clone()
    };
    let change = relative(&logits(&["--adapter", &one], "a.safetensors"), &logits(&[], "b.safetensors"));
    assert!(change > 1e-5, "{change}");
}

#[test]
fn a_plan_of_everything_does_each_thing() {
    let c = Case::new("train-all");
    let plan = |entries: &str, name: &str| {
        let out = c.out(name);
        let shape = ["--entry", entries, "--batch", "2", "--max-length", "16", "-o", &out];
        c.pleach.ok(&[&["compile", &c.model], &LORA[..6], &shape[..]].concat());
        out
    };
    let (all, train) = (plan("infer,generate,train", "all.pleach"), plan("train", "train.pleach"));
    let trained = |plan: &str, out: &str| {
        let mut args = c.args(out, &["--no-shuffle"]);
        args[1] = plan;
        args.extend(["--weights", &c.model]);
        c.pleach.ok(&args);
        let metrics = std::fs::read_to_string(Path::new(out).join("metrics.jsonl")).unwrap();
        let first: Value = serde_json::from_str(metrics.lines().next().unwrap()).unwrap();
        (results(out), first["planned_peak_bytes"].as_u64().unwrap())
    };
    let (of_all, of_train) = (c.out("of-all"), c.out("of-train"));
    let ((bits, bytes), (same, fewer)) = (trained(&all, &of_all), trained(&train, &of_train));
    assert_eq!(bits, same);
    // One slot of a cache, and what a new adapter is made for entries that do not run.
    assert!(bytes < fewer + fewer / 2, "{bytes} bytes where {fewer} are enough");
    let said = |from: &[&str], name: &str| {
        let (file, ids) = (c.out(name), ["--ids", "5,6,7,8", "--adapter", &of_all]);
        c.pleach.ok(&[&["run"], from, &ids, &["--out", &file]].concat());
        let new = c.pleach.ok(&[&["generate"], from, &ids, &["--print-ids", "--max-new-tokens", "5"]].concat());
        (tensors(Path::new(&file))["logits"].1.clone(), new)
    };
    let (x, new) = said(&[&all, "--weights", &c.model], "x.safetensors");
    let (y, same) = said(&[&c.model], "y.safetensors");
    assert!(relative(&x, &y) <= 2e-5 && new == same);
}

#[test]
fn kills_change_no_bit_of_other_methods() {
    let c = Case::new("train-kills");
    for (method, more) in [("dora", &[][..]), ("paca", &[]), ("rslora", &["--modules-to-save", "lm_head"])] {
        let base = ["--method", method, "--r", "4", "--target-modules", "all-linear", "--quiet", "--json"];
        let options = [&base[..], &["--max-grad-norm", "0.5"], more].concat();
        let whole = c.out(&format!("{method}-whole"));
        c.train(&whole, &options);
        let want = results(&whole);
        assert_eq!(want.0.len(), 8);
        let killed = c.out(&format!("{method}-killed"));
        for ms in [45, 75, 110] {
            c.kill(&killed, &[&options[..], &["--threads", "1"]].concat(), ms);
        }
        c.train(&killed, &[&options[..], &["--resume", "latest"]].concat());
        assert_eq!(results(&killed), want, "{method}");
    }
}

#[test]
fn every_checkpoint_goes_on_with_the_same_bits() {
    let c = Case::new("train-every-checkpoint");
    // Methods whose forward half reads products of what is trained, made by a step or by a preparation.
    for (method, targets) in
        [("dora", "all-linear"), ("lokr", "q_proj"), ("lokr", "all-linear"), ("oft", "q_proj,down_proj")]
    {
        let whole = c.out(&format!("{method}-{targets}"));
        let options = ["--method", method, "--target-modules", targets, "--lr", "5e-3", "--quiet", "--json"];
        let mut args = c.args(&whole, &options);
        let every = args.iter().position(|a| *a == "--save-every").unwrap() + 1;
        args[every] = "1";
        c.pleach.ok(&args);
        let want = results(&whole);
        for n in (1..8).rev() {
            let from = Path::new(&whole).join(format!("checkpoint-{n}")).display().to_string();
            c.pleach.ok(&[&args[..], &["--resume", &from]].concat());
            assert_eq!(results(&whole), want, "{method} of {targets} from step {n}");
        }
    }
}

#[test]
fn a_step_without_a_counted_target_moves_by_its_moments_alone() {
    let c = Case::new("train-no-target");
    let data = c.out("some.jsonl");
    let rows = [
        r#"{"input_ids":[1,2,3]}"#,
        r#"{"input_ids":[4,5,6],"labels":[-100,-100,-100]}"#,
        r#"{"input_ids":[7,8,9,10]}"#,
    ];
    std::fs::write(&data, rows.join("\n")).unwrap();
    for method in ["lora", "paca"] {
        // At once, and in halves.
        let [at_once, halves] = [&[][..], &["--max-grad-norm", "1e9"]].map(|more| {
            let out = c.out(&format!("{method}-{}", more.len()));
            let base =
                ["train", &c.model, "--data", &data, "--out", &out, "--batch", "1", "--max-steps", "3", "--no-shuffle"];
            let said = c.pleach.ok(&[
                &base[..],
                &["--method", method, "--r", "4", "--target-modules", "q_proj", "--json"],
                more,
            ]
            .concat());
            assert_eq!(serde_json::from_str::<Value>(&said).unwrap()["steps"], 3);
            results(&out)
        });
        assert!(at_once.0[1].starts_with("2 0.0 ") && at_once.0[1].contains(" 0.0 3"), "{:?}", at_once.0);
        let numbers = |r: &(Vec<String>, Vec<u8>)| -> Vec<f64> {
            r.0.iter().flat_map(|l| l.split(' ').map(|x| x.parse().unwrap()).collect::<Vec<f64>>()).collect()
        };
        for (a, b) in numbers(&at_once).iter().zip(numbers(&halves)) {
            assert!((a - b).abs() <= 1e-5 * b.abs(), "{:?} {:?}", at_once.0, halves.0);
        }
    }
}

/// Methods that change buffers from step to step, keep statistics or step otherwise than AdamW, with options that let something happen
/// within eight steps.
const DYNAMIC: [(&str, &[&str]); 14] = [
    ("lora-plus", &["--r", "4"]),
    ("lora-fa", &["--r", "4"]),
    ("allora", &["--r", "4"]),
    ("galore", &["--r", "4", "--set", "update_proj_gap=4"]),
    ("fira", &["--r", "4", "--set", "update_proj_gap=4"]),
    ("sora", &["--r", "4", "--set", "lambda_schedule=linear", "--set", "max_lambda=0.2", "--set", "lambda_num=4"]),
    ("codyra", &["--r", "4", "--set", "max_kappa=0.2", "--set", "lambda_num=2"]),
    ("dylora", &["--r", "4"]),
    ("dylora", &["--r", "4", "--set", "dylora_frozen=true"]),
    ("adalora", &["--r", "4", "--set", "target_r=2", "--set", "tinit=1", "--set", "tfinal=2", "--set", "total_step=8"]),
    ("s2-lora", &["--r", "4"]),
    (
        "triadaptlora",
        &[
            "--r",
            "6",
            "--set",
            "init_rank=2",
            "--set",
            "incre_rank_num=2",
            "--set",
            "reference_rank=4",
            "--set",
            "incre_interval=2",
        ],
    ),
    (
        "increlora",
        &[
            "--r",
            "6",
            "--set",
            "init_rank=2",
            "--set",
            "incre_rank_num=1",
            "--set",
            "target_rank=3",
            "--set",
            "incre_interval=2",
        ],
    ),
    ("lt-sft", &["--set", "full_ft_steps=5", "--set", "ft_params_proportion=0.05"]),
];

#[test]
fn methods_with_events_go_on_as_if_they_had_not_stopped() {
    let c = Case::new("train-events");
    let logits = |name: &str, adapter: &[&str]| {
        let file = c.out(name);
        c.pleach.ok(&[&["run", &c.model, "--ids", "5,6,7,8", "--out", &file, "--quiet"], adapter].concat());
        tensors(Path::new(&file))["logits"].1.clone()
    };
    let plain = logits("plain.safetensors", &[]);
    for (i, (method, more)) in DYNAMIC.into_iter().enumerate() {
        let targets = ["--method", method, "--target-modules", "q_proj,v_proj,down_proj"];
        let options = [&targets[..], more, &["--lr", "5e-3", "--max-grad-norm", "0.5", "--quiet", "--json"]].concat();
        let losses: Vec<Vec<f64>> = ["f32", "bf16"]
            .into_iter()
            .map(|dtype| {
                let options = [&options[..], &["--dtype", dtype]].concat();
                let whole = c.out(&format!("{i}-{dtype}"));
                c.train(&whole, &options);
                let want = results(&whole);
                assert_eq!(want.0.len(), 8);
                // From a checkpoint amid everything, with another number of threads.
                for n in if dtype == "f32" { &[3, 6][..] } else { &[6] } {
                    let from = Path::new(&whole).join(format!("checkpoint-{n}")).display().to_string();
                    c.train(&whole, &[&options[..], &["--resume", &from, "--threads", "1"]].concat());
                    assert_eq!(results(&whole), want, "{method} in {dtype} from step {n}");
                }
                if dtype == "f32" {
                    let killed = c.out(&format!("{i}-killed"));
                    c.kill(&killed, &options, 60);
                    c.train(&killed, &[&options[..], &["--resume", "latest"]].concat());
                    assert_eq!(results(&killed), want, "{method} killed");
                    c.pleach.ok(&["adapter", "check", &c.model, &whole]);
                    let beside = logits("a.safetensors", &["--adapter", &whole]);
                    let merged = logits("b.safetensors", &["--adapter", &whole, "--merge"]);
                    assert!(relative(&merged, &beside) < 1e-5, "{method} merged");
                    assert!(relative(&beside, &plain) > 1e-4, "{method} changes nothing");
                }
                let metrics = std::fs::read_to_string(Path::new(&whole).join("metrics.jsonl")).unwrap();
                let loss = |l: &str| serde_json::from_str::<Value>(l).unwrap()["loss"].as_f64().unwrap();
                metrics.lines().map(loss).collect()
            })
            .collect();
        for (a, b) in losses[0].iter().zip(&losses[1]) {
            assert!((a - b).abs() <= 0.02 * a.abs(), "{method} in bf16: {losses:?}");
        }
    }
}

#[test]
fn first_values_are_prepared_from_data_by_a_process_of_its_own() {
    let c = Case::new("train-prepared");
    let sites = ["--target-modules", "q_proj,down_proj", "--r", "2", "--calibration-batches", "1"];
    for method in ["corda", "lora-ga", "eva"] {
        let out = c.out(method);
        c.train(&out, &[&["--method", method, "--quiet"], &sites[..]].concat());
        let (steps, bytes) = results(&out);
        assert!(steps.len() == 8 && !bytes.is_empty(), "{method}");
    }
    // By a file with PEFT's name of the method, which is another word than ours.
    let (file, out) = (c.out("method.json"), c.out("lora-sb"));
    std::fs::write(
        &file,
        r#"{"peft_type": "LORA_SB", "r": 2, "target_modules": ["q_proj"], "calibration_batches": 1}"#,
    )
    .unwrap();
    let said = c.pleach.call(&c.args(&out, &["--method-config", &file]));
    assert!(said.code == Some(0) && said.err.contains("calibrated and prepared in"), "{}", said.err);
}

#[test]
fn refusals_say_what_to_do() {
    let c = Case::new("train-refused");
    let out = c.out("run");
    c.train(&out, &[&LORA[..], &["--log", "jsonl,tensorboard", "--eval", &c.data]].concat());
    let events = std::fs::read_dir(Path::new(&out).join("tensorboard")).unwrap().flatten().count();
    assert_eq!(events, 1);
    let evals = std::fs::read_to_string(Path::new(&out).join("eval.jsonl")).unwrap();
    assert_eq!(evals.lines().count(), 2);
    let fails = |code: i32, more: &[&str], why: &str| {
        let e = c.pleach.fails(code, &c.args(&out, &[&LORA[..6], more].concat()));
        assert!(e.contains(why), "{more:?}: {e}");
    };
    fails(1, &[], "--overwrite");
    fails(1, &["--resume", "checkpoint-77"], "there is no such checkpoint");
    fails(1, &["--resume", "latest", "--seed", "9"], "seed was 0, is 9");
    fails(1, &["--resume", "latest", "--alpha", "32"], "lora_alpha was 8, is 32");
    fails(1, &["--resume", "latest", "--use-rslora"], "use_rslora was");
    fails(1, &["--resume", "latest", "--dtype", "bf16"], "dtype was \"f32\", is \"bf16\"");
    // A run that is done leaves everything as it is.
    c.train(&out, &[&LORA[..], &["--log", "jsonl,tensorboard", "--eval", &c.data, "--resume", "latest"]].concat());
    assert_eq!(std::fs::read_dir(Path::new(&out).join("tensorboard")).unwrap().flatten().count(), 1);
    fails(1, &["--overwrite", "--budget", "1000B"], "are needed");
    for start in [out.clone(), format!("{out}/checkpoint-3")] {
        let e = c.pleach.fails(2, &c.args(&out, &["--adapter", &start, "--overwrite"]));
        assert!(e.contains("is where training starts, and --overwrite would remove it"), "{e}");
    }
    let nothing = ["train", &c.model, "--data", "/nonexistent.jsonl", "--out", &c.out("none")];
    let e = c.pleach.fails(1, &[&nothing[..], &LORA[..6]].concat());
    assert!(e.contains("nonexistent"), "{e}");
    let other = c.out("other");
    let fails = |code: i32, args: &[&str], why: &str| {
        let base = ["train", &c.model, "--data", &c.data, "--out", &other, "--batch", "2", "--max-length", "16"];
        let e = c.pleach.fails(code, &[&base[..], &["--max-steps", "1"], args].concat());
        assert!(e.contains(why), "{args:?}: {e}");
    };
    fails(2, &[], "--method");
    fails(1, &["--method", "lorax"], "known are");
    fails(1, &["--method", "lora", "--lora-dropout", "0.1"], "dropout");
    fails(1, &["--method", "lora", "--target-modules", "no_such"], "no_such");
    fails(2, &["--adapter", &out, "--r", "7"], "contradicts");
    fails(2, &["--method", "paca", "--lora-alpha", "3"], "--lora-alpha: the method `paca` has no `lora_alpha`");
    fails(2, &["--method", "lora", "--set", "foo=true"], "--set foo: the method `lora` has no `foo`");
    fails(2, &["--method", "lora", "--alpha", "nan"], "must be finite");
    fails(2, &["--method", "lora", "--threads", "5000"], "at most 1024");
    fails(2, &["--method", "lora", "--r", "-1"], "invalid value '-1' for '--r");
    fails(2, &["--method", "lora", "--lr", "-1"], "the learning rate must be a number of at least 0");
    let state = Path::new(&out).join("checkpoint-8/trainer_state.json");
    std::fs::remove_file(&state).unwrap();
    let e = c.pleach.fails(1, &c.args(&out, &[&LORA[..6], &["--resume", "latest"]].concat()));
    assert!(e.contains("resume from another checkpoint"), "{e}");
    fails(2, &["--method", "lora", "--warmup", "x"], "no warm-up");
}

#[test]
fn overwriting_leaves_what_no_run_has_written() {
    let c = Case::new("train-overwrite");
    let out = c.out("run");
    let logged = [&LORA[..], &["--log", "jsonl,tensorboard"]].concat();
    c.train(&out, &logged);
    let folder = Path::new(&out).join("tensorboard");
    let files = || -> Vec<String> {
        let names = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned());
        let mut all: Vec<String> = names.collect();
        all.sort();
        all
    };
    let first = files();
    for other in ["events.out.tfevents.1.elsewhere.0", "notes.txt"] {
        std::fs::write(folder.join(other), "kept").unwrap();
    }
    c.train(&out, &[&logged[..], &["--overwrite"]].concat());
    let now = files();
    assert!(now.len() == 3 && !now.contains(&first[0]) && now.contains(&"notes.txt".to_string()), "{first:?} {now:?}");
    c.train(&out, &[&LORA[..], &["--overwrite"]].concat());
    assert_eq!(files(), ["events.out.tfevents.1.elsewhere.0", "notes.txt"]);
}

#[test]
fn a_warm_up_may_be_longer_than_the_run() {
    let c = Case::new("train-warmup");
    let out = c.out("run");
    c.train(&out, &[&LORA[..], &["--warmup", "25"]].concat());
    let text = std::fs::read_to_string(Path::new(&out).join("metrics.jsonl")).unwrap();
    let rate = |l: &str| serde_json::from_str::<Value>(l).unwrap()["lr"].as_f64().unwrap();
    let rates: Vec<f64> = text.lines().map(rate).collect();
    assert_eq!(rates.len(), 8);
    assert!(rates.iter().enumerate().all(|(i, r)| (r - 2e-4 * i as f64 / 25.0).abs() <= 1e-18), "{rates:?}");
}

#[test]
fn a_cache_that_cannot_be_written_stops_nothing() {
    let c = Case::new("train-no-cache");
    // Below a file no folder can be made.
    let lost = format!("{}/cache", c.data);
    let pleach = c.pleach.with_env(&[("PLEACH_CACHE_DIR", &lost)]);
    pleach.ok(&["run", &c.model, "--ids", "1,2,3", "--quiet"]);
    pleach.ok(&["generate", &c.model, "--ids", "1,2,3", "--max-new-tokens", "2", "--quiet"]);
    pleach.ok(&c.args(&c.out("run"), &LORA));
}

#[test]
fn an_adapter_trains_on_and_rows_of_every_form_are_read() {
    let c = Case::new("train-forms");
    let rows = c.out("forms.jsonl");
    let text = r#"{"text":"a hedge is a fence"}
{"prompt":"what is a hedge?","completion":" a fence"}
{"messages":[{"role":"user","content":"one"},{"role":"assistant","content":"two"}]}
{"input_ids":[1,2,3,4],"labels":[-100,-100,3,4]}
{"input_ids":[1,2],"labels":[-100,-100]}
"#;
    std::fs::write(&rows, text).unwrap();
    let first = c.out("first");
    let run = |out: &str, more: &[&str]| {
        let base = ["train", &c.model, "--data", &rows, "--out", out, "--batch", "2", "--max-length", "64"];
        let said =
            c.pleach.call(&[&base[..], &["--max-steps", "4", "--lr", "1e-2", "--schedule", "constant"], more].concat());
        assert_eq!(said.code, Some(0), "{}", said.err);
        said.err
    };
    let said = run(&first, &["--method", "lora", "--r", "4", "--target-modules", "q_proj,v_proj"]);
    assert!(said.contains("5 rows") && said.contains("1 rows have no counted target"), "{said}");
    let second = c.out("second");
    run(&second, &["--adapter", &first]);
    let loss = |out: &str, i: usize| {
        let text = std::fs::read_to_string(Path::new(out).join("metrics.jsonl")).unwrap();
        serde_json::from_str::<Value>(text.lines().nth(i).unwrap()).unwrap()["loss"].as_f64().unwrap()
    };
    // The second run begins where the first one ended, not where it began.
    assert!(loss(&second, 0) < loss(&first, 0));
    let config = std::fs::read_to_string(Path::new(&second).join("adapter_config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    assert_eq!((config["r"].as_u64(), config["peft_type"].as_str()), (Some(4), Some("LORA")));
    assert_eq!(config["base_model_name_or_path"].as_str(), Some(c.model.as_str()));
}

#[test]
fn the_memory_foretold_is_the_memory_planned() {
    let c = Case::new("train-plan");
    let shape = ["--batch", "2", "--max-length", "16"];
    let ask = |more: &[&str]| -> Value {
        let text = c.pleach.ok(&[&["plan", &c.model], &LORA[..6], &shape[..], &["--json"], more].concat());
        serde_json::from_str(&text).unwrap()
    };
    let plan = ask(&[]);
    let n = |v: &Value, k: &str| v[k].as_u64().unwrap_or_else(|| panic!("{k}: {v}"));
    let (total, least) = (n(&plan, "total_bytes"), n(&plan, "minimum_bytes"));
    assert!(n(&plan, "arena_bytes") < total && least <= total && least > 0);
    let saved = plan["saved"].as_array().unwrap();
    assert!(!saved.is_empty());
    for s in saved {
        assert!(s["name"].is_string() && s["reason"].is_string() && s["bytes"].as_u64().is_some(), "{s}");
    }
    let out = c.out("run");
    c.train(&out, &LORA);
    let text = std::fs::read_to_string(Path::new(&out).join("metrics.jsonl")).unwrap();
    let first: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    assert_eq!(n(&first, "planned_peak_bytes"), total);
    // At the budget of the smallest plan it fits, a byte below it does not, and the message says what is needed.
    let tight = format!("{least}B");
    assert!(n(&ask(&["--budget", &tight]), "total_bytes") <= least);
    let low = format!("{}B", least - 1);
    let e = c.pleach.fails(1, &[&["plan", &c.model], &LORA[..6], &shape[..], &["--budget", &low]].concat());
    assert!(e.contains(&least.to_string()), "{e}");
    // So does a measurement, and training there gives what it gives without a budget.
    let bench = ["bench", "train", &c.model, "--steps", "1", "--json", "--budget", &low];
    let e = c.pleach.fails(1, &[&bench[..], &LORA[..6], &shape[..]].concat());
    assert!(e.contains(&least.to_string()), "{e}");
    assert!(least < total, "{least} {total}");
    let within = c.out("within");
    c.train(&within, &[&LORA[..], &["--budget", &tight]].concat());
    let loss = |out: &str| -> Vec<f64> {
        let text = std::fs::read_to_string(Path::new(out).join("metrics.jsonl")).unwrap();
        text.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()["loss"].as_f64().unwrap()).collect()
    };
    for (a, b) in loss(&out).into_iter().zip(loss(&within)) {
        assert!((a - b).abs() <= 1e-6 * a.abs(), "{a} {b}");
    }
}
