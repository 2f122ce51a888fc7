//! What has to be known of weights and data before training, for methods that choose columns or prepare first values by it.
//!
//! What follows from the weights alone is prepared here. What needs the data is measured and prepared by a child process with the
//! arguments of `pleach train`, so that its memory is gone when training begins. The child writes the values into a file of its own and
//! answers with its name.

#[cfg(feature = "compiler")]
mod calibrate;

use crate::args::{MethodArgs, ModelArgs, ShapeArgs, TrainArgs};
use crate::failure::{Failure, Result};
use crate::report::{self, Ui, bytes};
use crate::rows;
use crate::training::Training;
use pleach_frontend::adapter::{SlotData, SlotTensor, prepare};
use pleach_frontend::{Adapter, peft::MethodConfig};
use pleach_plan::DType;
use pleach_runtime::train::{AdapterPlan, Init, Machine, Measured, Order};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

/// Values by key in the slot.
type Values = BTreeMap<String, Vec<f32>>;

/// What the child answers.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Answer {
    /// Sums of squares of gradients by column.
    squares: BTreeMap<String, Vec<f64>>,
    /// The file with the prepared values.
    values: Option<PathBuf>,
    /// The most memory that the child took.
    peak_rss_bytes: u64,
    /// In how many parts the model was looked at.
    parts: usize,
}

/// The tensors that ask for a measurement: key, number of values, batches to look at.
fn wanted(adapter: &AdapterPlan) -> Vec<(&str, usize, u64)> {
    let one = |t: &'_ pleach_runtime::train::TensorPlan| match &t.init {
        Init::LargestGradientColumns { batches, .. } => Some((t.shape.iter().product::<u64>() as usize, *batches)),
        _ => None,
    };
    adapter.tensors.iter().filter_map(|t| one(t).map(|(n, b)| (t.key.as_str(), n, b))).collect()
}

/// Values for everything that has to be made beforehand, of no meaning: for runs whose values do not matter, or come from elsewhere.
pub(crate) fn stand_in(adapter: &AdapterPlan) -> Measured {
    let size = |t: &pleach_runtime::train::TensorPlan| t.shape.iter().product::<u64>() as usize;
    let prepared = adapter.tensors.iter().filter(|t| matches!(t.init, Init::Prepared { .. }));
    Measured {
        squares: wanted(adapter).into_iter().map(|(key, n, _)| (key.to_owned(), vec![0.0; n])).collect(),
        values: prepared.map(|t| (t.key.clone(), vec![0.01; size(t)])).collect(),
    }
}

/// What the adapter's recipes ask for; nothing when they ask for nothing. A run that goes on from a checkpoint needs the
/// tensors only to be there.
///
/// # Errors
/// A weight that cannot be decomposed, what the child refuses.
pub(crate) fn measured(ui: &Ui, training: &Training, goes_on: bool) -> Result<Measured> {
    let plan = &training.adapter;
    if goes_on || !training.fresh {
        return Ok(stand_in(plan));
    }
    let adapter = new_adapter(training)?;
    let clock = Instant::now();
    if let Some(a) = adapter.as_ref().filter(|a| a.requests().is_empty()) {
        ui.note(&format!("preparing {} modules by {}", a.sites.len(), a.config.method.name()));
        let made = prepare(a, &training.ready.model.checkpoint, &BTreeMap::new(), ui.workers())?;
        ui.note(&format!("prepared in {:.1} s", clock.elapsed().as_secs_f64()));
        return Ok(Measured { values: floats(made), ..Measured::new() });
    }
    if adapter.is_none() && wanted(plan).is_empty() {
        return Ok(Measured::new());
    }
    match &adapter {
        Some(a) => ui.note(&format!("calibrating {} modules for {}", a.sites.len(), a.config.method.name())),
        None => ui.note("measuring gradients to choose columns"),
    }
    let answer = child()?;
    let took = format!("{:.1} s, {} of memory at most", clock.elapsed().as_secs_f64(), bytes(answer.peak_rss_bytes));
    let values = match &answer.values {
        None => Values::new(),
        Some(path) => {
            ui.note(&format!("calibrated and prepared in {took}, the model in {} parts", answer.parts));
            let values = read(path);
            let _ = std::fs::remove_file(path);
            values?
        }
    };
    Ok(Measured { squares: answer.squares, values })
}

/// The adapter of a plan whose first values are prepared, as a new one.
fn new_adapter(training: &Training) -> Result<Option<Adapter>> {
    let Some(config) = &training.adapter.preparation else { return Ok(None) };
    let modules = &training.ready.model.checkpoint.modules;
    Ok(Some(Adapter::fresh(&MethodConfig::from_json(config)?, modules)?))
}

fn floats(made: BTreeMap<String, SlotTensor>) -> Values {
    let one = |(key, t): (String, SlotTensor)| match t.data {
        SlotData::F32(x) => Some((key, x)),
        SlotData::I32(_) => None,
    };
    made.into_iter().filter_map(one).collect()
}

/// Asks the child.
fn child() -> Result<Answer> {
    let program = std::env::current_exe().map_err(|e| Failure::new(format!("cannot find this program: {e}")))?;
    let mut arguments: Vec<_> = std::env::args_os().skip(1).collect();
    if let Some(word) = arguments.iter_mut().find(|a| *a == "train") {
        *word = "measure-here".into();
    }
    if !arguments.iter().any(|a| a == "--quiet") {
        arguments.push("--quiet".into());
    }
    let done = Command::new(&program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .output()
        .map_err(Failure::io("start", &program))?;
    if !done.status.success() {
        let said = String::from_utf8_lossy(&done.stderr).trim().trim_start_matches("error: ").to_string();
        return Err(Failure::new(said).within("calibrating"));
    }
    Ok(serde_json::from_slice(&done.stdout)?)
}

fn read(path: &std::path::Path) -> Result<Values> {
    let bytes = std::fs::read(path).map_err(Failure::io("read", path))?;
    let damaged = |e| Failure::new(format!("{}: cannot be read: {e}", path.display()));
    let file = safetensors::SafeTensors::deserialize(&bytes).map_err(damaged)?;
    let values = |data: &[u8]| data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    Ok(file.iter().map(|(key, t)| (key.to_owned(), values(t.data()))).collect())
}

#[cfg(feature = "compiler")]
fn write(values: &Values) -> Result<PathBuf> {
    use safetensors::tensor::{Dtype, TensorView};
    let path = std::env::temp_dir().join(format!("pleach-prepared-{}.safetensors", std::process::id()));
    let fault = |e: safetensors::SafeTensorError| Failure::new(format!("{}: cannot be written: {e}", path.display()));
    let raw: Vec<(&String, Vec<u8>)> =
        values.iter().map(|(key, x)| (key, x.iter().flat_map(|x| x.to_le_bytes()).collect())).collect();
    let mut views = vec![];
    for (key, bytes) in &raw {
        views.push((key.as_str(), TensorView::new(Dtype::F32, vec![bytes.len() / 4], bytes).map_err(fault)?));
    }
    safetensors::serialize_to_file(views, None, &path).map_err(fault)?;
    Ok(path)
}

/// The child's side.
///
/// # Errors
/// Files and options that are refused, and whatever compiling refuses.
pub(crate) fn serve(ui: &Ui, args: &TrainArgs) -> Result<()> {
    let training = Training::open(ui, &args.model, &args.method, &args.shape)?;
    let mut answer = Answer::default();
    match new_adapter(&training)? {
        None => answer.squares = squares(ui, args, &training.adapter)?,
        #[cfg(feature = "compiler")]
        Some(adapter) => {
            let (values, parts) = calibrate::values(ui, args, &training, &adapter)?;
            (answer.values, answer.parts) = (Some(write(&values)?), parts);
        }
        #[cfg(not(feature = "compiler"))]
        Some(_) => {
            return Err(Failure::new(
                "this build has no compiler, which calibration needs; train with one that has it",
            ));
        }
    }
    answer.peak_rss_bytes = pleach_runtime::peak_rss();
    report::line(&serde_json::to_string(&answer)?);
    Ok(())
}

/// Sums of squares of gradients by column: the weights in question are trained whole for the batches asked for, and never updated.
fn squares(ui: &Ui, args: &TrainArgs, asked: &AdapterPlan) -> Result<BTreeMap<String, Vec<f64>>> {
    let list: Vec<(String, u64)> = wanted(asked).into_iter().map(|(k, _, b)| (k.to_owned(), b)).collect();
    let module = |key: &str| key.rsplit_once('.').map_or(key, |(m, _)| m).to_owned();
    let folder = args.model.folder().to_path_buf();
    let model = ModelArgs { model: folder.clone(), weights: None, adapter: vec![], ..args.model.clone() };
    let modules: Vec<String> = list.iter().map(|(k, _)| module(k)).collect();
    let method =
        MethodArgs { method: Some("full".into()), target_modules: Some(modules.join(",")), ..MethodArgs::default() };
    // Gradients are to be looked at: nothing may use them up.
    let shape = ShapeArgs { accum: args.shape.accum.max(2), ..args.shape.clone() };
    let training = Training::open(ui, &model, &method, &shape)?;
    let data = rows::read(&args.data, &folder, training.ready.plan.meta.vocab, training.max_length)?.rows;
    let mut session = training.session(ui, training.ready.weights()?, args.seed, &Measured::new())?;
    let mut order = Order::new(data.len(), (!args.no_shuffle).then_some(args.seed));
    let mut out = BTreeMap::new();
    let most = list.iter().map(|(_, b)| *b).max().unwrap_or(0);
    let batch = args.shape.batch;
    for i in 0..most {
        let b = data.pack((i * batch..(i + 1) * batch).map(|p| order.at(p)));
        if !b.labels.is_empty() {
            let scale = [1.0 / b.labels.len() as f32];
            Machine::run(&mut session, "accumulate", &b.values(&scale), "loss")?;
        }
        for (key, _) in list.iter().filter(|(_, n)| *n == i + 1) {
            let name = format!("grad.slot0.{}.weight", module(key));
            let g = session.read_param(&name)?;
            let width = g.shape.last().copied().unwrap_or(0) as usize;
            if g.dtype != DType::F32 || width == 0 {
                return Err(Failure::new(format!("`{name}` holds no gradient of a matrix")));
            }
            let mut squares = vec![0.0; width];
            for (j, x) in g.bytes.as_chunks().0.iter().enumerate() {
                let x = f64::from(f32::from_le_bytes(*x));
                squares[j % width] += x * x;
            }
            out.insert(key.clone(), squares);
        }
    }
    Ok(out)
}
