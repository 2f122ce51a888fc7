//! One optimizer step: micro-batches, loss over all their counted targets, AdamW.
//!
//! The loss of a step is the mean over all counted targets of all its micro-batches; their number is known beforehand,
//! so each micro-batch is scaled by its inverse. Sums over micro-batches are made here, in order, in f64. A machine with an
//! entry `step` makes a step of one micro-batch, without clipping and events, in one run.

use super::data::{MicroBatch, Order, Rows};
use super::events::{Events, Moment};
use super::machine::Machine;
use super::schedule::{Schedule, Warmup};
use crate::error::{Result, RuntimeError};
use crate::run::Values;
use serde::{Deserialize, Serialize};

/// Everything that decides the numbers of a run, beside plan, weights and rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Rows of a micro-batch.
    pub batch: u64,
    /// Micro-batches of an optimizer step.
    pub accum: u64,
    /// Optimizer steps.
    pub steps: u64,
    /// Tokens at which rows were cut.
    pub max_length: u64,
    /// Keys every random number.
    pub seed: u64,
    /// A new order for every epoch; else the order of the file.
    pub shuffle: bool,
    /// Peak rate.
    pub lr: f64,
    /// How the rate moves.
    pub schedule: Schedule,
    /// Steps until the peak.
    pub warmup: Warmup,
    /// Decoupled, on all trained tensors.
    pub weight_decay: f64,
    /// Largest norm of the gradient of all trained tensors; off without.
    pub max_grad_norm: Option<f64>,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Type of the computation, where it is known; it decides numbers, so it must not change between checkpoints.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<String>,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            batch: 4,
            accum: 1,
            steps: 1,
            max_length: 512,
            seed: 0,
            shuffle: true,
            lr: 2e-4,
            schedule: Schedule::Linear,
            warmup: Warmup::default(),
            weight_decay: 0.0,
            max_grad_norm: None,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            dtype: None,
        }
    }
}

impl Settings {
    /// The rate of a step, the first one being 0.
    pub fn rate(&self, step: u64) -> f64 {
        self.lr * self.schedule.factor(step, self.warmup.steps(self.steps), self.steps)
    }

    /// Steps that take `epochs` passes over `rows` rows.
    pub fn steps_of(epochs: f64, rows: usize, batch: u64, accum: u64) -> u64 {
        let per_step = (batch.max(1) * accum.max(1)) as f64;
        (epochs * rows as f64 / per_step).ceil().max(1.0) as u64
    }

    /// What must be in range.
    ///
    /// # Errors
    /// [`RuntimeError::Values`] with the option and what it may be.
    pub fn check(&self) -> Result<()> {
        let no = |what: &str| Err(RuntimeError::Values(what.into()));
        match self {
            s if s.batch == 0 || s.accum == 0 || s.steps == 0 => no("batch, accum and steps must be at least 1"),
            s if s.max_length < 2 => no("the largest length must be at least 2: one token predicts the next"),
            s if !(s.lr.is_finite() && s.lr >= 0.0) => no("the learning rate must be a number of at least 0"),
            s if !(s.weight_decay.is_finite() && s.weight_decay >= 0.0) => no("weight decay must be at least 0"),
            s if s.max_grad_norm.is_some_and(|n| n.is_nan() || n <= 0.0) => {
                no("the largest gradient norm must be above 0")
            }
            _ => Ok(()),
        }
    }
}

/// What a step gave.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stepped {
    /// Number of the step, from 1.
    pub step: u64,
    /// Mean over all counted targets.
    pub loss: f64,
    /// Rate that was used.
    pub lr: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Tokens that were run through the model.
    pub tokens: u64,
    /// Counted targets among them.
    pub targets: u64,
}

/// Runs optimizer step `step` (from 0) and gives its numbers. `order` gives the rows.
///
/// # Errors
/// What the machine refuses, and a loss or norm that is no number: nothing is updated by a loss that is none.
pub fn step(
    machine: &mut dyn Machine,
    rows: &Rows,
    order: &mut Order,
    settings: &Settings,
    step: u64,
) -> Result<Stepped> {
    step_with(machine, rows, order, settings, step, None)
}

/// The same with events at its moments.
///
/// # Errors
/// As [`step`], and those of the events.
pub fn step_with(
    machine: &mut dyn Machine,
    rows: &Rows,
    order: &mut Order,
    settings: &Settings,
    step: u64,
    events: Option<&dyn Events>,
) -> Result<Stepped> {
    let at = |moment, machine: &mut dyn Machine| match events {
        Some(e) => e.at(moment, step, settings.steps, settings.seed, machine),
        None => Ok(()),
    };
    let mut batches = Vec::with_capacity(settings.accum as usize);
    for i in 0..settings.accum {
        let first = (step * settings.accum + i) * settings.batch;
        batches.push(rows.pack((first..first + settings.batch).map(|p| order.at(p))));
    }
    let targets: u64 = batches.iter().map(|b| b.labels.len() as u64).sum();
    let tokens = batches.iter().map(|b| b.input_ids.len() as u64).sum();
    let scale = [1.0 / targets.max(1) as f32];
    let lr = settings.rate(step);
    let number = step + 1;
    let correction = |beta: f64| 1.0 - beta.powf(number as f64);
    let values: [(&str, f64); 8] = [
        ("lr", lr),
        ("beta1", settings.beta1),
        ("beta2", settings.beta2),
        ("eps", settings.eps),
        ("weight_decay", settings.weight_decay),
        ("correction1", correction(settings.beta1)),
        ("correction2", correction(settings.beta2)),
        ("max_grad_norm", settings.max_grad_norm.unwrap_or(f64::INFINITY)),
    ];
    let values = values.map(|(n, x)| (n, [x as f32]));
    let inputs: Vec<(&str, Values<'_>)> = values.iter().map(|(n, x)| (*n, Values::F32(x))).collect();
    let fail = |what: &str, x: f64| {
        let why = "lower the learning rate or clip the gradient (--max-grad-norm), and check the data, the weights and the \
                   adapter that training starts from";
        Err(RuntimeError::Values(format!("the {what} of step {number} is {x}; {why}")))
    };
    if let ([b], None, None) = (&batches[..], settings.max_grad_norm, events) {
        // Without a target there is neither loss nor gradient: one of no weight stands for it.
        let stands = b.labels.is_empty().then(|| MicroBatch { rows: vec![0], labels: vec![0], ..b.clone() });
        let scale = if stands.is_some() { [0.0] } else { scale };
        let b = stands.as_ref().unwrap_or(b);
        let all: Vec<(&str, Values<'_>)> = b.values(&scale).into_iter().chain(inputs.iter().copied()).collect();
        if let Some(made) = machine.step(&all) {
            let [loss, grad_norm] = made?.map(f64::from);
            if !loss.is_finite() {
                return fail("loss", loss);
            }
            if !grad_norm.is_finite() {
                return fail("gradient's norm", grad_norm);
            }
            return Ok(Stepped { step: number, loss, lr, grad_norm, tokens, targets });
        }
    }
    at(Moment::Before, machine)?;
    let mut loss = 0.0;
    for b in &batches {
        // Without a target there is neither loss nor gradient.
        if !b.labels.is_empty() {
            loss += f64::from(machine.run("accumulate", &b.values(&scale), "loss")?);
        }
    }
    if !loss.is_finite() {
        return fail("loss", loss);
    }
    at(Moment::Gradients, machine)?;
    let grad_norm = f64::from(machine.run("update", &inputs, "grad_norm")?);
    if !grad_norm.is_finite() {
        return fail("gradient's norm", grad_norm);
    }
    at(Moment::After, machine)?;
    Ok(Stepped { step: number, loss, lr, grad_norm, tokens, targets })
}

/// The mean loss over all counted targets of all rows, in micro-batches of `batch` rows in the order of the file.
///
/// # Errors
/// What the machine refuses; rows without any counted target.
pub fn evaluate(machine: &mut dyn Machine, rows: &Rows, batch: u64) -> Result<f64> {
    let targets = rows.report().targets;
    if targets == 0 {
        return Err(RuntimeError::Values("no row to evaluate on has a counted target".into()));
    }
    let mut sum = 0.0;
    let scale = [1.0];
    for first in (0..rows.len()).step_by(batch.max(1) as usize) {
        let b = rows.pack(first..rows.len().min(first + batch as usize));
        if !b.labels.is_empty() {
            sum += f64::from(machine.run("evaluate", &b.values(&scale), "loss")?);
        }
    }
    Ok(sum / targets as f64)
}
