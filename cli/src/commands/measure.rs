//! Gradients of base weights before training, for methods that choose columns by them: in a child process, because the
//! gradients of whole weights take more memory than the training that follows.
//!
//! The child gets the arguments of `pleach train`, trains the weights in question whole for the batches asked for without
//! ever updating them, and answers with the sums of squares by column.

use crate::args::{MethodArgs, ModelArgs, ShapeArgs, TrainArgs};
use crate::failure::{Failure, Result};
use crate::report::{self, Ui};
use crate::rows;
use crate::training::Training;
use pleach_plan::DType;
use pleach_runtime::train::{AdapterPlan, Init, Machine, Measured, Order};
use std::process::{Command, Stdio};

/// The tensors that ask for a measurement: key, number of values, batches to look at.
fn wanted(adapter: &AdapterPlan) -> Vec<(&str, usize, u64)> {
    let one = |t: &'_ pleach_runtime::train::TensorPlan| match &t.init {
        Init::LargestGradientColumns { batches, .. } => Some((t.shape.iter().product::<u64>() as usize, *batches)),
        _ => None,
    };
    adapter.tensors.iter().filter_map(|t| one(t).map(|(n, b)| (t.key.as_str(), n, b))).collect()
}

/// What the adapter's recipes ask for; nothing when they ask for nothing. A run that goes on from a checkpoint needs the
/// tensors only to be there.
///
/// # Errors
/// What the child refuses.
pub(crate) fn measured(ui: &Ui, adapter: &AdapterPlan, goes_on: bool) -> Result<Measured> {
    let list = wanted(adapter);
    if list.is_empty() || goes_on {
        return Ok(list.into_iter().map(|(key, n, _)| (key.to_owned(), vec![0.0; n])).collect());
    }
    ui.note("measuring gradients to choose columns");
    let program = std::env::current_exe().map_err(|e| Failure::new(format!("cannot find this program: {e}")))?;
    let mut arguments: Vec<_> = std::env::args_os().skip(1).collect();
    if let Some(word) = arguments.iter_mut().find(|a| *a == "train") {
        *word = "measure-here".into();
    }
    let done = Command::new(&program)
        .args(arguments)
        .arg("--quiet")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .output()
        .map_err(Failure::io("start", &program))?;
    if !done.status.success() {
        let said = String::from_utf8_lossy(&done.stderr).trim().trim_start_matches("error: ").to_string();
        return Err(Failure::new(said).within("measuring gradients"));
    }
    Ok(serde_json::from_slice(&done.stdout)?)
}

/// The child's side.
///
/// # Errors
/// Files and options that are refused, and whatever compiling refuses.
pub(crate) fn serve(ui: &Ui, args: &TrainArgs) -> Result<()> {
    let asked = Training::open(ui, &args.model, &args.method, &args.shape)?.adapter;
    let list: Vec<(String, u64)> = wanted(&asked).into_iter().map(|(k, _, b)| (k.to_owned(), b)).collect();
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
    let mut out = Measured::new();
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
    report::line(&serde_json::to_string(&out)?);
    Ok(())
}
