//! Runs entries of a plan on tensors of a file, checks nothing, measures everything: the tool of `benches/gpu`.
//!
//! `measure PLAN --entry A[,B…] [--weights FOLDER|FILE | --shared-weights] [--slot N=FILE]… [--inputs FILE]… [--capacity T=8,S=2…]
//! [--out FILE] [--params PREFIX[,PREFIX…]] [--poison] [--same N] [--warm MS] [--repeat N] [--profile] [--forms]`
//!
//! The entries run in turn on the inputs they take: the first one on those of the first file, and so on, all others on the last one's;
//! what an entry gives that runs again takes the place of what it gave before. A profile has as many runs as `--repeat` says. `--out` gets their outputs as
//! `entry/name`, and every parameter whose name begins with the prefix. With `--repeat` they run once more for warming up and then N
//! times, or for longer, until `--warm` milliseconds have passed. `--same` runs them N times more and says whether all outputs have the
//! same bits. With a profile, runs are timed by the device as a whole too (`replay_ms`), and every launch several times in a row
//! (`in_a_row_ms`): what a run takes more are its gaps. `--forms` times every form of every kernel of a plan that has them all (`pleach tune --forms-only`), in as many rounds; what
//! it prints is what `pleach tune --times` reads. Prints one JSON object.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use pleach_runtime::plan::{DType, Plan};
use pleach_runtime::{
    Files, Forms, InMemory, Options, Result, RuntimeError, Session, TensorSource, Values, measure_forms, open_weights,
    shared_weights,
};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

#[derive(Default)]
struct Args {
    plan: PathBuf,
    entries: Vec<String>,
    weights: Option<PathBuf>,
    shared: bool,
    slots: Vec<(u32, PathBuf)>,
    inputs: Vec<PathBuf>,
    capacities: BTreeMap<String, u64>,
    out: Option<PathBuf>,
    params: Option<String>,
    poison: bool,
    same: usize,
    warm: u64,
    repeat: usize,
    profile: bool,
    forms: bool,
}

fn parse(mut words: impl Iterator<Item = String>) -> std::result::Result<Args, String> {
    let mut a = Args::default();
    while let Some(w) = words.next() {
        let mut value = || words.next().ok_or(format!("{w} needs a value"));
        let number = |s: &str| s.parse::<u64>().map_err(|e| format!("{w}: {s}: {e}"));
        match w.as_str() {
            "--entry" => a.entries = value()?.split(',').map(String::from).collect(),
            "--weights" => a.weights = Some(value()?.into()),
            "--shared-weights" => a.shared = true,
            "--inputs" => a.inputs.push(value()?.into()),
            "--out" => a.out = Some(value()?.into()),
            "--params" => a.params = Some(value()?),
            "--poison" => a.poison = true,
            "--profile" => a.profile = true,
            "--forms" => a.forms = true,
            "--same" => a.same = number(&value()?)? as usize,
            "--warm" => a.warm = number(&value()?)?,
            "--repeat" => a.repeat = number(&value()?)? as usize,
            "--slot" => {
                let v = value()?;
                let (n, file) = v.split_once('=').ok_or("--slot takes N=FILE")?;
                a.slots.push((number(n)? as u32, file.into()));
            }
            "--capacity" => {
                for part in value()?.split(',') {
                    let (name, n) = part.split_once('=').ok_or("--capacity takes SYMBOL=N")?;
                    a.capacities.insert(name.into(), number(n)?);
                }
            }
            _ if w.starts_with('-') => return Err(format!("unknown option {w}")),
            _ => a.plan = w.into(),
        }
    }
    if a.plan.as_os_str().is_empty() || a.entries.is_empty() {
        return Err("usage: measure PLAN --entry NAME[,NAME…] …; the options stand at the head of its source".into());
    }
    Ok(a)
}

type Inputs = BTreeMap<String, Input>;

/// A tensor of the inputs' file.
enum Input {
    I32(Vec<i32>),
    F32(Vec<f32>),
}

fn read_inputs(path: &Path) -> Result<Inputs> {
    let mut out = BTreeMap::new();
    let file = Files::open(path)?;
    for name in file.names() {
        let Some(t) = file.tensor(name) else { continue };
        let words = t.bytes.as_chunks::<4>().0.iter();
        let value = match t.dtype {
            DType::I32 => Input::I32(words.map(|b| i32::from_le_bytes(*b)).collect()),
            DType::F32 => Input::F32(words.map(|b| f32::from_le_bytes(*b)).collect()),
            d => return Err(RuntimeError::Values(format!("{name} is {}; inputs are i32 or f32", d.name()))),
        };
        out.insert(name.to_string(), value);
    }
    Ok(out)
}

type Kept = BTreeMap<String, (Dtype, Vec<u64>, Vec<u8>)>;

fn file_type(d: DType) -> Dtype {
    match d {
        DType::F32 => Dtype::F32,
        DType::BF16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        DType::I32 => Dtype::I32,
        DType::Bool => Dtype::BOOL,
    }
}

/// Runs an entry on those inputs that it takes; what it gives, where that is wanted.
fn run(s: &mut Session, entry: &str, inputs: &Inputs, kept: Option<&mut Kept>) -> Result<()> {
    let takes: Vec<String> = s.plan().entry(entry)?.inputs.iter().map(|x| x.name.clone()).collect();
    let given: Vec<(&str, Values<'_>)> = inputs
        .iter()
        .filter(|(n, _)| takes.contains(n))
        .map(|(n, v)| match v {
            Input::I32(v) => (n.as_str(), Values::I32(v)),
            Input::F32(v) => (n.as_str(), Values::F32(v)),
        })
        .collect();
    let out = s.run(entry, &given)?;
    if let Some(kept) = kept {
        for o in &out.list {
            kept.insert(format!("{entry}/{}", o.name), (file_type(o.dtype), o.shape.clone(), o.bytes.to_vec()));
        }
    }
    Ok(())
}

/// Values of all outputs of the entries that are f32, as one length of a vector for each.
fn norms(kept: &Kept) -> Vec<f64> {
    let floats = kept.values().filter(|k| k.0 == Dtype::F32);
    floats
        .map(|k| k.2.as_chunks::<4>().0.iter().map(|b| f64::from(f32::from_le_bytes(*b)).powi(2)).sum::<f64>().sqrt())
        .collect()
}

/// Runs all entries, each on its inputs.
fn run_all(
    s: &mut Session,
    a: &Args,
    inputs: &[Inputs],
    mut kept: Option<&mut Kept>,
    mut done: impl FnMut(&Session) -> Result<()>,
) -> Result<()> {
    for (i, e) in a.entries.iter().enumerate() {
        run(s, e, &inputs[i.min(inputs.len() - 1)], kept.as_deref_mut())?;
        done(s)?;
    }
    Ok(())
}

/// Times every form of every kernel within runs of everything. A form that gives other results has no time.
fn forms(s: &mut Session, a: &Args, inputs: &[Inputs]) -> Result<Vec<Value>> {
    let mut kernels = Forms::of(s.plan())?;
    if kernels.is_empty() {
        return Err(RuntimeError::Values(
            "the plan has no forms to choose from; `pleach tune --forms-only` makes one that has".into(),
        ));
    }
    let everything = |s: &mut Session| -> Result<Vec<f64>> {
        let mut kept = Kept::new();
        run_all(s, a, inputs, Some(&mut kept), |_| Ok(()))?;
        Ok(norms(&kept))
    };
    measure_forms(s, &mut kernels, a.repeat.max(1), everything, || ())?;
    let mut out = vec![];
    for k in &kernels {
        for f in &k.list {
            let symbol = &s.plan().kernels[f.kernel as usize].symbol;
            let (ms, wrong) = (f.ms.filter(|_| f.wrong.is_none()), f.wrong.is_some());
            out.push(json!({"signature": k.signature, "kernel": symbol, "form": f.form, "ms": ms, "wrong": wrong}));
        }
    }
    Ok(out)
}

/// Launches of a step in a row, of which the mean counts.
const IN_A_ROW: u32 = 5;

fn gpu_memory() -> Option<(u64, u64)> {
    #[cfg(feature = "cuda")]
    return pleach_runtime::cuda::memory().ok();
    #[cfg(not(feature = "cuda"))]
    None
}

fn measure(a: &Args) -> Result<Value> {
    let plan = Arc::new(Plan::read(&a.plan)?);
    let weights = match &a.weights {
        Some(path) => open_weights(path)?,
        None if a.shared => shared_weights(&plan, 0)?,
        None => Arc::new(InMemory::new()),
    };
    let mut inputs = a.inputs.iter().map(|p| read_inputs(p)).collect::<Result<Vec<_>>>()?;
    if inputs.is_empty() {
        inputs.push(Inputs::new());
    }
    let options = Options { capacities: a.capacities.clone(), ..Options::default() };
    let before = gpu_memory().filter(|_| plan.is_gpu());
    let clock = Instant::now();
    let mut s = Session::open(plan, weights, &options)?;
    let open_ms = clock.elapsed().as_secs_f64() * 1e3;
    for (slot, file) in &a.slots {
        s.load_slot(*slot, &Files::open(file)?)?;
    }
    s.prepare_all()?;
    if a.poison {
        s.poison()?;
    }
    let ready_ms = clock.elapsed().as_secs_f64() * 1e3;
    let mut kept = Kept::new();
    run_all(&mut s, a, &inputs, Some(&mut kept), |_| Ok(()))?;
    let first_ms = clock.elapsed().as_secs_f64() * 1e3 - ready_ms;
    if let Some(out) = &a.out {
        let names: Vec<String> = s.plan().params.iter().map(|p| p.name.clone()).collect();
        for n in names.iter().filter(|n| a.params.as_ref().is_some_and(|p| p.split(',').any(|p| n.starts_with(p)))) {
            let v = s.read_param(n)?;
            kept.insert(n.clone(), (file_type(v.dtype), v.shape, v.bytes.into_owned()));
        }
        let bad = |e: &dyn std::fmt::Display| RuntimeError::Values(format!("{}: {e}", out.display()));
        let mut views = vec![];
        for (name, (dtype, shape, bytes)) in &kept {
            let shape = shape.iter().map(|n| *n as usize).collect();
            views.push((name.clone(), TensorView::new(*dtype, shape, bytes).map_err(|e| bad(&e))?));
        }
        safetensors::serialize_to_file(views, None, out).map_err(|e| bad(&e))?;
    }
    let outputs = |kept: &Kept| -> Kept {
        kept.iter().filter(|(n, _)| n.contains('/')).map(|(n, v)| (n.clone(), v.clone())).collect()
    };
    let mut same = None;
    for _ in 0..a.same {
        let mut again = Kept::new();
        run_all(&mut s, a, &inputs, Some(&mut again), |_| Ok(()))?;
        same = Some(same.unwrap_or(true) && outputs(&kept) == again);
    }
    let mut times = vec![];
    let (warm, mut warmed) = (Instant::now(), 0);
    while a.repeat > 0 && times.len() < a.repeat {
        let clock = Instant::now();
        run_all(&mut s, a, &inputs, None, |_| Ok(()))?;
        if warmed > 0 && warm.elapsed().as_millis() as u64 >= a.warm {
            times.push(clock.elapsed().as_secs_f64() * 1e3);
        }
        warmed += 1;
    }
    let used = before.zip(gpu_memory()).map(|(b, now)| b.0.saturating_sub(now.0));
    let (mut profile, mut replay, mut in_a_row) = (vec![], vec![], None);
    if a.profile {
        s.set_timed(true);
        for _ in 0..a.repeat.max(1) {
            let mut ms = 0.0;
            run_all(&mut s, a, &inputs, None, |s| {
                ms += s.run_time()?.map_or(f64::NAN, |t| t.as_secs_f64() * 1e3);
                Ok(())
            })?;
            replay.push(ms);
        }
        s.set_timed(false);
        s.set_profile_in_a_row(IN_A_ROW);
        run_all(&mut s, a, &inputs, None, |_| Ok(()))?;
        in_a_row = Some(s.profile().iter().map(|k| k.ns as f64 * 1e-6).sum::<f64>());
        s.set_profile(true);
        for _ in 0..a.repeat.max(1) {
            run_all(&mut s, a, &inputs, None, |_| Ok(()))?;
        }
        profile = s.profile();
    }
    let forms = if a.forms { Some(forms(&mut s, a, &inputs)?) } else { None };
    let m = s.memory();
    let kernels: Vec<Value> = profile
        .iter()
        .map(|k| {
            json!({"kernel": k.symbol, "class": k.class, "calls": k.calls, "ms": k.ns as f64 * 1e-6, "flops": k.flops,
                   "bytes": k.bytes})
        })
        .collect();
    Ok(json!({
        "device": format!("{s:?}"), "entries": a.entries, "open_ms": open_ms, "ready_ms": ready_ms,
        "first_ms": first_ms, "times_ms": times, "same_bits": same, "replay_ms": replay, "in_a_row_ms": in_a_row, "planned_bytes": m.total(), "arena_bytes": m.arena,
        "weights_bytes": m.weights, "adapter_bytes": m.adapter, "optimizer_bytes": m.optimizer,
        "driver_bytes": used, "missing": s.missing(), "profile": kernels, "profile_runs": a.repeat.max(1), "forms": forms,
    }))
}

fn main() -> ExitCode {
    let args = match parse(std::env::args().skip(1)) {
        Ok(a) => a,
        Err(e) => {
            eprintln!("{e}");
            return ExitCode::from(2);
        }
    };
    match measure(&args) {
        Ok(v) => {
            println!("{v}");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}
