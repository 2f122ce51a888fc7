//! The child's work for methods that ask for gradients or statistics of inputs: plans that look at some layers, runs, preparation.
//!
//! The fewest parts are taken in which a session, and all prepared values beside it, take no more than training itself will. What was
//! measured is copied and decomposed layer by layer, so the whole stays within about a layer of that. Rows are run one at a time.

use super::{Values, floats};
use crate::args::{DType, ModelArgs, TrainArgs};
use crate::failure::{Failure, Result};
use crate::pipeline::TrainPart;
use crate::ready::{self, Ready};
use crate::report::Ui;
use crate::rows;
use crate::training::Training;
use pleach_frontend::Adapter;
use pleach_frontend::adapter::{Request, collect, prepare};
use pleach_runtime::train::{Init, Look, Order, calibrate};
use pleach_runtime::{Session, plan_memory};

/// The prepared values, and in how many parts the model was looked at.
///
/// # Errors
/// Files and options that are refused, whatever compiling refuses, and weights that cannot be decomposed.
pub(super) fn values(ui: &Ui, args: &TrainArgs, training: &Training, adapter: &Adapter) -> Result<(Values, usize)> {
    let base = &training.ready.model.checkpoint;
    let folder = args.model.folder().to_path_buf();
    let data = rows::read(&args.data, &folder, training.ready.plan.meta.vocab, training.max_length)?.rows;
    let requests = adapter.requests();
    let batches = requests.iter().map(|(_, r)| r.batches()).max().unwrap_or(0);
    let (entry, look) = match requests.first() {
        Some((_, Request::Gradient { .. })) => ("calibrate", Look::Gradients),
        Some((_, Request::Inputs { .. })) => ("measure", Look::Inputs),
        None => return Err(Failure::new("the method asks for no measurement")),
    };
    let modules: Vec<&str> = requests.iter().map(|(m, _)| m.as_str()).collect();
    let layers = layers(&modules);
    let weights = training.ready.weights()?;
    let made = training.adapter.tensors.iter().filter(|t| matches!(t.init, Init::Prepared { .. }));
    let made: u64 = made.map(|t| 4 * t.shape.iter().product::<u64>()).sum();
    let most = training.memory(ui, &weights)?.total().saturating_sub(made);
    let length = data.report().longest;
    let model = ModelArgs { model: folder, weights: None, adapter: vec![], dtype: DType::F32, ..args.model.clone() };
    let part = |modules: &[String]| TrainPart {
        config: adapter.config.raw.clone(),
        tokens: length,
        sequences: 1,
        positions: length,
        budget: None,
        at_once: false,
        calibrated: modules.to_vec(),
    };
    let compile = |layers: &[Vec<String>]| -> Result<(Ready, TrainPart)> {
        let part = part(&layers.concat());
        Ok((ready::compile(ui, &model, &[entry], &[], Some(part.clone()))?.1, part))
    };
    let options = |part: &TrainPart| part.capacities().threads(ui.threads);
    let mut each = layers.len().max(1);
    let first = loop {
        let (ready, part) = compile(&layers[..each.min(layers.len())])?;
        let total = plan_memory(&ready.plan, &*weights, &options(&part))?.total();
        if total <= most || each == 1 {
            break ready;
        }
        each = each.div_ceil(2);
    };
    let (mut out, mut first) = (Values::new(), Some(first));
    for chunk in layers.chunks(each) {
        let modules = chunk.concat();
        let ready = match first.take() {
            Some(ready) => ready,
            None => compile(chunk)?.0,
        };
        let mut session = Session::open(ready.plan.clone(), weights.clone(), &options(&part(&modules)))?;
        let mut order = Order::new(data.len(), (!args.no_shuffle).then_some(args.seed));
        calibrate(&mut session, look, &data, &mut order, args.shape.batch, batches)?;
        let names: Vec<String> = ready.plan.params.iter().map(|p| p.name.clone()).collect();
        for layer in chunk {
            let measured = collect(layer, base, batches, &names, |name| -> Result<Vec<f32>> {
                let v = session.read_param(name)?;
                Ok(v.bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
            })?;
            out.extend(floats(prepare(adapter, base, &measured, ui.workers())?));
        }
        drop(session);
        pleach_runtime::give_back();
    }
    Ok((out, layers.len().div_ceil(each)))
}

/// Modules by the layer that their path names, in order.
fn layers(modules: &[&str]) -> Vec<Vec<String>> {
    let mut out: Vec<(String, Vec<String>)> = vec![];
    for module in modules {
        let end = module.split('.').position(|p| p.parse::<u64>().is_ok());
        let layer: Vec<&str> = module.split('.').take(end.map_or(usize::MAX, |n| n + 1)).collect();
        let layer = layer.join(".");
        match out.last_mut() {
            Some((last, list)) if *last == layer => list.push((*module).to_owned()),
            _ => out.push((layer, vec![(*module).to_owned()])),
        }
    }
    out.into_iter().map(|l| l.1).collect()
}
