//! The training loop on a machine that is a few lines of Rust: kills at every operation on files and at random moments,
//! resuming, schedules against transformers, refusals.

use pleach_plan::DType;
use pleach_runtime::train::checkpoint::{self, State};
use pleach_runtime::train::*;
use pleach_runtime::{ParamValues, Result, RuntimeError, Values};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Trained values of the toy.
const D: usize = 7;

/// Learns one number per class of labels; AdamW as the entry `update` has it.
struct Toy {
    f32s: BTreeMap<&'static str, Vec<f32>>,
    index: Vec<i32>,
    gradient: [f32; D],
    /// Time that a run takes.
    pause: Duration,
}

impl Toy {
    fn new(pause: u64) -> Toy {
        let v = |x: f32| vec![x; D];
        let f32s = BTreeMap::from([
            ("slot0.w", v(0.5)),
            ("slot0.scale", vec![2.0]),
            ("adam.m.slot0.w", v(0.0)),
            ("adam.v.slot0.w", v(0.0)),
        ]);
        Toy { f32s, index: vec![3, 5], gradient: [0.0; D], pause: Duration::from_micros(pause) }
    }

    fn ints<'v>(inputs: &[(&str, Values<'v>)], name: &str) -> &'v [i32] {
        match inputs.iter().find(|i| i.0 == name) {
            Some((_, Values::I32(v))) => v,
            _ => panic!("no {name}"),
        }
    }

    fn number(inputs: &[(&str, Values<'_>)], name: &str) -> f32 {
        match inputs.iter().find(|i| i.0 == name) {
            Some((_, Values::F32(v))) => v[0],
            _ => panic!("no {name}"),
        }
    }
}

fn bytes<T: Copy>(v: &[T], le: impl Fn(T) -> [u8; 4]) -> Cow<'static, [u8]> {
    Cow::Owned(v.iter().flat_map(|x| le(*x)).collect())
}

impl Machine for Toy {
    fn run(&mut self, entry: &str, inputs: &[(&str, Values<'_>)], output: &str) -> Result<f32> {
        std::thread::sleep(self.pause);
        if entry == "update" {
            assert_eq!(output, "grad_norm");
            let x = |n: &str| Toy::number(inputs, n);
            let norm = self.gradient.iter().map(|g| g * g).sum::<f32>().sqrt();
            let clip = (x("max_grad_norm") / (norm + 1e-6)).min(1.0);
            let (mut w, mut m, mut v) = (
                self.f32s["slot0.w"].clone(),
                self.f32s["adam.m.slot0.w"].clone(),
                self.f32s["adam.v.slot0.w"].clone(),
            );
            for i in 0..D {
                let g = self.gradient[i] * clip;
                w[i] -= x("lr") * x("weight_decay") * w[i];
                m[i] = x("beta1") * m[i] + (1.0 - x("beta1")) * g;
                v[i] = x("beta2") * v[i] + (1.0 - x("beta2")) * g * g;
                let d = v[i].sqrt() / x("correction2").sqrt() + x("eps");
                w[i] -= x("lr") / x("correction1") * m[i] / d;
            }
            self.f32s.extend([("slot0.w", w), ("adam.m.slot0.w", m), ("adam.v.slot0.w", v)]);
            self.gradient = [0.0; D];
            return Ok(norm);
        }
        assert_eq!(output, "loss");
        let scale = Toy::number(inputs, "loss_scale");
        let w = &self.f32s["slot0.w"];
        let mut loss = 0.0;
        for label in Toy::ints(inputs, "labels") {
            let i = *label as usize % D;
            let miss = w[i] - i as f32 * 0.25;
            loss += scale * miss * miss;
            if entry == "accumulate" {
                self.gradient[i] += scale * 2.0 * miss;
            }
        }
        Ok(loss)
    }

    fn changing(&self) -> Vec<String> {
        ["slot0.w", "adam.m.slot0.w", "adam.v.slot0.w"].map(String::from).to_vec()
    }

    fn fixed(&self) -> Vec<String> {
        ["slot0.scale", "slot0.idx"].map(String::from).to_vec()
    }

    fn read(&self, name: &str) -> Result<ParamValues<'_>> {
        if name == "slot0.idx" {
            return Ok(ParamValues { dtype: DType::I32, shape: vec![2], bytes: bytes(&self.index, i32::to_le_bytes) });
        }
        let v = self.f32s.get(name).ok_or_else(|| RuntimeError::Values(format!("no {name}")))?;
        let shape = if name.ends_with("scale") { vec![] } else { vec![v.len() as u64] };
        Ok(ParamValues { dtype: DType::F32, shape, bytes: bytes(v, f32::to_le_bytes) })
    }

    fn write(&mut self, name: &str, dtype: DType, bytes: &[u8]) -> Result<()> {
        let words = bytes.as_chunks::<4>().0;
        if dtype == DType::I32 {
            assert_eq!(name, "slot0.idx");
            self.index = words.iter().map(|b| i32::from_le_bytes(*b)).collect();
            return Ok(());
        }
        let slot = self.f32s.iter_mut().find(|(n, _)| **n == name).unwrap().1;
        assert_eq!(slot.len(), words.len());
        *slot = words.iter().map(|b| f32::from_le_bytes(*b)).collect();
        Ok(())
    }
}

fn rows(salt: i32) -> Rows {
    let mut r = Rows::default();
    for i in 0..13 {
        let ids: Vec<i32> = (0..3 + i % 5).map(|j| (i * 7 + j * 3 + salt) % 31).collect();
        r.push(&ids, None, 6);
    }
    r
}

fn adapter() -> AdapterPlan {
    let t = |key: &str, file: Option<&str>, shape: &[u64], dtype: &str, trained: bool| {
        serde_json::json!({"key": key, "file": file, "shape": shape, "dtype": dtype, "trained": trained,
                           "init": {"zeros": {}}})
    };
    let v = serde_json::json!({"slot": 0, "method": "toy", "config": {"r": 1, "peft_type": "TOY"}, "tensors": [
        t("w", Some("base_model.model.w"), &[D as u64], "F32", true),
        t("scale", None, &[], "F32", false),
        t("idx", Some("base_model.model.idx"), &[2], "I64", false),
    ]});
    serde_json::from_value(v).unwrap()
}

fn job<'d>(rows: &'d Rows, eval: &'d Rows, dir: &'d Path, resume: Resume) -> Job<'d> {
    let settings = Settings {
        batch: 2,
        accum: 2,
        steps: 9,
        lr: 0.05,
        max_grad_norm: Some(1.0),
        weight_decay: 0.01,
        schedule: Schedule::Cosine,
        warmup: Warmup::Steps(2),
        seed: 11,
        ..Settings::default()
    };
    Job {
        rows,
        eval: Some(eval),
        settings,
        adapter: adapter(),
        events: None,
        base: Some("toy".into()),
        dir,
        resume,
        save_every: 2,
        keep: Some(2),
        eval_every: Some(3),
        planned_peak_bytes: 1,
    }
}

fn folder(name: &str) -> PathBuf {
    let p = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("train-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&p);
    p
}

/// Everything of a run that must not depend on kills: numbers of the metrics, evaluations, files of the folder.
fn results(dir: &Path) -> BTreeMap<String, String> {
    let mut out = BTreeMap::new();
    let mut walk = vec![dir.to_path_buf()];
    while let Some(d) = walk.pop() {
        for e in std::fs::read_dir(d).unwrap().flatten() {
            let (path, name) = (e.path(), e.path().strip_prefix(dir).unwrap().display().to_string());
            if path.is_dir() {
                out.insert(name, String::new());
                walk.push(path);
                continue;
            }
            let bytes = std::fs::read(&path).unwrap();
            let text = if name == METRICS {
                let line = |l: &str| {
                    let v: serde_json::Value = serde_json::from_str(l).unwrap();
                    ["step", "loss", "lr", "grad_norm", "tokens"].map(|k| v[k].to_string()).join(" ")
                };
                String::from_utf8(bytes).unwrap().lines().map(line).collect::<Vec<_>>().join("\n")
            } else {
                bytes.iter().map(|b| format!("{b:02x}")).collect()
            };
            out.insert(name, text);
        }
    }
    out
}

/// The run without any kill.
fn whole(name: &str) -> BTreeMap<String, String> {
    let dir = folder(name);
    let sum = train(&mut Toy::new(0), &job(&rows(0), &rows(4), &dir, Resume::No), &mut |_| ControlFlow::Continue(()));
    let sum = sum.unwrap();
    assert!(sum.finished && sum.steps == 9);
    let r = results(&dir);
    std::fs::remove_dir_all(&dir).unwrap();
    r
}

/// Not a test of its own: the process that the others start and kill.
#[test]
fn child() {
    let Ok(dir) = std::env::var("PLEACH_TRAIN_DIR") else { return };
    let stop: usize = std::env::var("PLEACH_TRAIN_STOP").unwrap().parse().unwrap();
    let pause = std::env::var("PLEACH_TRAIN_PAUSE").unwrap().parse().unwrap();
    let mut seen = 0;
    train(&mut Toy::new(pause), &job(&rows(0), &rows(4), Path::new(&dir), Resume::Latest), &mut |e| {
        if let Event::Files(_) = e {
            seen += 1;
            if seen == stop {
                std::process::abort();
            }
        }
        ControlFlow::Continue(())
    })
    .unwrap();
}

fn start(dir: &Path, stop: usize, pause: u64) -> std::process::Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture"])
        .env("PLEACH_TRAIN_DIR", dir)
        .env("PLEACH_TRAIN_STOP", stop.to_string())
        .env("PLEACH_TRAIN_PAUSE", pause.to_string())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn a_kill_at_any_operation_on_files_leaves_no_trace() {
    let want = whole("whole-files");
    assert!(
        want.contains_key("checkpoint-9") && want.contains_key("checkpoint-8") && !want.contains_key("checkpoint-2")
    );
    assert!(want["eval.jsonl"].len() > 100 && want[METRICS].lines().count() == 9);
    let mut points = 0;
    for stop in 1.. {
        let dir = folder("files");
        // Killed once here, then again and again a few operations later, until it is through.
        if start(&dir, stop, 0).wait().unwrap().success() {
            break;
        }
        points += 1;
        let mut tries = 0;
        while !start(&dir, 7 + stop % 4, 0).wait().unwrap().success() {
            tries += 1;
            assert!(tries < 40, "no progress after a kill at operation {stop}");
        }
        assert!(results(&dir) == want, "killed at operation {stop}: {:?}", results(&dir).keys());
        std::fs::remove_dir_all(&dir).unwrap();
    }
    assert!(points > 25, "{points}");
}

#[test]
fn kills_at_random_moments_leave_no_trace() {
    let want = whole("whole-random");
    let mut random = 12345u64;
    for _ in 0..3 {
        let dir = folder("random");
        let mut kills = 0;
        loop {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let mut c = start(&dir, usize::MAX, 1500);
            if kills < 12 {
                std::thread::sleep(Duration::from_millis(15 + (random >> 33) % 80));
                let _ = c.kill();
                kills += 1;
            }
            if c.wait().unwrap().success() {
                break;
            }
        }
        assert!(results(&dir) == want, "{:?}", results(&dir).keys());
        std::fs::remove_dir_all(&dir).unwrap();
    }
}

#[test]
fn a_finished_run_and_a_named_checkpoint_resume_to_the_same_bytes() {
    let dir = folder("again");
    let (data, eval) = (rows(0), rows(4));
    let go = |resume: Resume, keep: Option<u64>| {
        let mut notes = vec![];
        let j = Job { keep, ..job(&data, &eval, &dir, resume) };
        let r = train(&mut Toy::new(0), &j, &mut |e| {
            if !matches!(e, Event::Files(_) | Event::Step(_) | Event::Evaluated(..) | Event::Saved(_)) {
                notes.push(format!("{e:?}"));
            }
            ControlFlow::Continue(())
        });
        r.map(|s| (s, notes))
    };
    let (first, notes) = go(Resume::Latest, None).unwrap();
    assert!(notes[0].contains("NothingToResume") && first.steps_now == 9 && first.finished);
    let (before, after) = first.eval.unwrap();
    assert!(after < before, "it learns: {before} to {after}");
    let want = results(&dir);
    let (again, _) = go(Resume::Latest, None).unwrap();
    assert!(again.finished && again.steps_now == 0);
    assert!(results(&dir) == want, "{:?}", results(&dir).keys());
    // From an earlier checkpoint, the later ones are made anew.
    let (named, notes) = go(Resume::At(dir.join("checkpoint-4")), None).unwrap();
    assert_eq!(named.steps_now, 5);
    assert_eq!(notes.iter().filter(|n| n.contains("Discarded")).count(), 3, "{notes:?}");
    assert!(results(&dir) == want, "{:?}", results(&dir).keys());
    let e = go(Resume::At(dir.join("checkpoint-5")), None).unwrap_err().to_string();
    assert!(e.contains("there is no such checkpoint"), "{e}");
    std::fs::write(dir.join("checkpoint-4/optimizer.safetensors"), b"torn").unwrap();
    let e = go(Resume::At(dir.join("checkpoint-4")), None).unwrap_err().to_string();
    assert!(e.contains("optimizer.safetensors") && e.contains("another checkpoint"), "{e}");
    assert!(holds_results(&dir));
    remove_results(&dir).unwrap();
    assert!(!holds_results(&dir) && std::fs::read_dir(&dir).unwrap().next().is_none());
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn one_run_at_a_time_writes_into_a_folder() {
    let (data, dir) = (rows(0), folder("alone"));
    std::fs::create_dir_all(&dir).unwrap();
    let other = std::fs::File::open(&dir).unwrap();
    other.lock().unwrap();
    let run = || train(&mut Toy::new(0), &job(&data, &data, &dir, Resume::No), &mut |_| ControlFlow::Continue(()));
    let e = run().unwrap_err().to_string();
    assert!(e.contains("another run writes into this folder"), "{e}");
    let e = remove_results(&dir).unwrap_err().to_string();
    assert!(e.contains("another run writes into this folder"), "{e}");
    drop(other);
    run().unwrap();
    // Whoever may read the folder's texts may read its tensors.
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = |name: &str| std::fs::metadata(dir.join(name)).unwrap().permissions().mode();
        assert_eq!(mode("adapter_model.safetensors"), mode("adapter_config.json"));
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn another_run_is_refused_by_what_differs() {
    let (data, dir) = (rows(0), folder("other"));
    let j = job(&data, &data, &dir, Resume::No);
    let adapter = |alpha: u64, more: Value| {
        let mut map = json!({"r": 4, "lora_alpha": alpha}).as_object().unwrap().clone();
        map.extend(more.as_object().unwrap().clone());
        map
    };
    let same = adapter(8, json!({}));
    let s = State::new(4, &j.settings, &same, data.len(), data.fingerprint());
    assert!(s.check(&j.settings, &same, data.fingerprint()).is_ok());
    assert!(s.check(&Settings { steps: 100, ..j.settings.clone() }, &same, data.fingerprint()).is_ok());
    // What an older version wrote says less.
    let older = State { adapter: None, ..s.clone() };
    assert!(older.check(&j.settings, &adapter(32, json!({})), data.fingerprint()).is_ok());
    let e = s.check(&j.settings, &adapter(32, json!({"bias": "all"})), data.fingerprint()).unwrap_err().to_string();
    assert!(e.contains("lora_alpha was 8, is 32") && e.contains("bias was not given, is \"all\""), "{e}");
    let bf16 = Settings { dtype: Some("bf16".into()), ..j.settings.clone() };
    let s16 = State::new(4, &bf16, &same, data.len(), data.fingerprint());
    let e = s16.check(&Settings { dtype: Some("f32".into()), ..bf16 }, &same, data.fingerprint());
    assert!(e.unwrap_err().to_string().contains("dtype was \"bf16\", is \"f32\""));
    let other = Settings { seed: 12, batch: 3, steps: 2, ..j.settings.clone() };
    let e = s.check(&other, &same, rows(1).fingerprint()).unwrap_err().to_string();
    for what in ["seed was 11, is 12", "batch was 2, is 3", "rows of --data are others", "4 steps are done, 2"] {
        assert!(e.contains(what), "{e}");
    }
    assert!(checkpoint::list(Path::new("/nonexistent/folder")).unwrap().is_empty());
    for bad in [
        Settings { batch: 0, ..Settings::default() },
        Settings { lr: f64::NAN, ..Settings::default() },
        Settings { max_grad_norm: Some(0.0), ..Settings::default() },
    ] {
        assert!(bad.check().is_err());
    }
}

#[test]
fn a_checkpoint_that_cannot_be_written_leaves_nothing() {
    let (data, dir) = (rows(0), folder("unwritten"));
    let j = job(&data, &data, &dir, Resume::No);
    let state = State::new(4, &j.settings, &adapter().config, data.len(), data.fingerprint());
    let mut toy = Toy::new(0);
    // The adapter's file is written by then.
    toy.f32s.remove("adam.v.slot0.w");
    let mut passed = vec![];
    let e = checkpoint::save(&toy, &adapter(), None, &state, &dir, &mut |what| passed.push(what.to_string()));
    assert!(e.is_err() && passed == ["begin", "adapter", "optimizer"], "{passed:?}");
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn a_loss_that_is_no_number_ends_the_run() {
    let (data, dir) = (rows(0), folder("nan"));
    let mut toy = Toy::new(0);
    toy.f32s.insert("slot0.w", vec![f32::NAN; D]);
    let j = Job { eval: None, ..job(&data, &data, &dir, Resume::No) };
    let e = train(&mut toy, &j, &mut |_| ControlFlow::Continue(())).unwrap_err().to_string();
    assert!(e.contains("the loss of step 1 is NaN"), "{e}");
    assert!(checkpoint::list(&dir).unwrap().is_empty());
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn schedules_are_those_of_transformers() {
    let text = include_str!("fixtures/schedules.json");
    let cases: serde_json::Value = serde_json::from_str(text).unwrap();
    let mut n = 0;
    for c in cases.as_array().unwrap() {
        let s = Settings {
            schedule: serde_json::from_value(c["schedule"].clone()).unwrap(),
            warmup: Warmup::Steps(c["warmup"].as_u64().unwrap()),
            steps: c["steps"].as_u64().unwrap(),
            lr: c["lr"].as_f64().unwrap(),
            ..Settings::default()
        };
        s.check().unwrap();
        for (i, want) in c["rates"].as_array().unwrap().iter().enumerate() {
            let (have, want) = (s.rate(i as u64), want.as_f64().unwrap());
            assert!((have - want).abs() <= 1e-15 * s.lr, "{c}: step {i}: {have} is not {want}");
            n += 1;
        }
    }
    assert!(n > 100, "{n}");
}
