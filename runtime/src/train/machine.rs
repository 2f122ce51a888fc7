//! What the training loop needs of whatever computes: run an entry, read and write what is trained.

use super::data::MicroBatch;
use crate::error::Result;
use crate::params::ParamValues;
use crate::run::Values;
use crate::session::Session;
use pleach_plan::{DType, Role, Source};

/// The computing side of training. [`Session`] is one, given a plan with the entries `accumulate` and `update`, or
/// `step`.
pub trait Machine {
    /// Runs an entry with those of these inputs that it takes, and gives one number of what it computes.
    ///
    /// # Errors
    /// Inputs that the entry refuses, and an output that is no number `[]`.
    fn run(&mut self, entry: &str, inputs: &[(&str, Values<'_>)], output: &str) -> Result<f32>;

    /// Runs the entry `step`, which makes a whole optimizer step of one micro-batch, and gives its loss and the gradient's norm;
    /// `None` where there is no such entry.
    ///
    /// # Errors
    /// As [`Machine::run`].
    fn step(&mut self, _: &[(&str, Values<'_>)]) -> Option<Result<[f32; 2]>> {
        None
    }

    /// Names of everything that a run changes and a checkpoint must hold: trained tensors, moments, statistics.
    fn changing(&self) -> Vec<String>;

    /// Names of everything else that belongs to the adapter being trained: scales, indices.
    fn fixed(&self) -> Vec<String>;

    /// The values of a tensor.
    ///
    /// # Errors
    /// An unknown name.
    fn read(&self, name: &str) -> Result<ParamValues<'_>>;

    /// Derives everything anew that is made of what a run changes, before the next run: as if those tensors had just been written.
    fn derive_anew(&mut self) {}

    /// Overwrites a tensor.
    ///
    /// # Errors
    /// An unknown name, another type or size.
    fn write(&mut self, name: &str, dtype: DType, bytes: &[u8]) -> Result<()>;
}

impl Machine for Session {
    fn run(&mut self, entry: &str, inputs: &[(&str, Values<'_>)], output: &str) -> Result<f32> {
        numbers(self, entry, inputs, [output]).map(|[x]| x)
    }

    fn step(&mut self, inputs: &[(&str, Values<'_>)]) -> Option<Result<[f32; 2]>> {
        let there = self.plan().entry("step").is_ok();
        there.then(|| numbers(self, "step", inputs, ["loss", "grad_norm"]))
    }

    fn changing(&self) -> Vec<String> {
        self.plan().params.iter().filter(|p| changes(p)).map(|p| p.name.clone()).collect()
    }

    fn fixed(&self) -> Vec<String> {
        let of_adapter = |p: &&pleach_plan::Param| p.role != Role::Train && matches!(p.source, Source::Adapter { .. });
        self.plan().params.iter().filter(of_adapter).map(|p| p.name.clone()).collect()
    }

    fn derive_anew(&mut self) {
        let list = self.plan().params.iter().enumerate().filter(|(_, p)| changes(p)).map(|(i, _)| i as u32).collect();
        self.make_due(list, None);
    }

    fn read(&self, name: &str) -> Result<ParamValues<'_>> {
        self.read_param(name)
    }

    fn write(&mut self, name: &str, dtype: DType, bytes: &[u8]) -> Result<()> {
        self.write_param(name, dtype, bytes)
    }
}

/// Whether a run changes a parameter that a checkpoint must hold.
fn changes(p: &pleach_plan::Param) -> bool {
    // Gradients are zero between steps, and caches are not of training.
    let statistic = p.role == Role::Stat && p.source == Source::Zeros;
    p.role == Role::Train || statistic || (p.role == Role::State && p.name.starts_with("adam."))
}

/// Runs an entry with those of these inputs that it takes, and gives outputs that are single numbers.
fn numbers<const N: usize>(
    session: &mut Session,
    entry: &str,
    inputs: &[(&str, Values<'_>)],
    outputs: [&str; N],
) -> Result<[f32; N]> {
    let e = session.plan().entry(entry)?;
    let takes = |n: &str| e.inputs.iter().any(|x| x.name == n);
    let given: Vec<(&str, Values<'_>)> = inputs.iter().filter(|(n, _)| takes(n)).copied().collect();
    let out = Session::run(session, entry, &given)?;
    let mut found = [0.0; N];
    for (to, output) in found.iter_mut().zip(outputs) {
        *to = out.f32(output)?.first().copied().ok_or_else(|| {
            crate::error::RuntimeError::Values(format!("output `{output}` of `{entry}` is empty, expected one number"))
        })?;
    }
    Ok(found)
}

impl MicroBatch {
    /// The inputs of a run under their names.
    pub fn values<'v>(&'v self, loss_scale: &'v [f32; 1]) -> [(&'static str, Values<'v>); 8] {
        [
            ("input_ids", Values::I32(&self.input_ids)),
            ("positions", Values::I32(&self.positions)),
            ("q_segments", Values::I32(&self.q_segments)),
            ("kv_start", Values::I32(&self.kv_start)),
            ("kv_len", Values::I32(&self.kv_len)),
            ("rows", Values::I32(&self.rows)),
            ("labels", Values::I32(&self.labels)),
            ("loss_scale", Values::F32(loss_scale)),
        ]
    }
}
