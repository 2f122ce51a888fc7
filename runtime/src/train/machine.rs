//! What the training loop needs of whatever computes: run an entry, read and write what is trained.

use super::data::MicroBatch;
use crate::error::Result;
use crate::params::ParamValues;
use crate::run::Values;
use crate::session::Session;
use pleach_plan::{DType, Role, Source};

/// The computing side of training. [`Session`] is one, given a plan with the entries `accumulate` and `update`.
pub trait Machine {
    /// Runs an entry with those of these inputs that it takes, and gives one number of what it computes.
    ///
    /// # Errors
    /// Inputs that the entry refuses, and an output that is no number `[]`.
    fn run(&mut self, entry: &str, inputs: &[(&str, Values<'_>)], output: &str) -> Result<f32>;

    /// Names of everything that a run changes and a checkpoint must hold: trained tensors, moments, statistics.
    fn changing(&self) -> Vec<String>;

    /// Names of everything else that belongs to the adapter being trained: scales, indices.
    fn fixed(&self) -> Vec<String>;

    /// The values of a tensor.
    ///
    /// # Errors
    /// An unknown name.
    fn read(&self, name: &str) -> Result<ParamValues<'_>>;

    /// Overwrites a tensor.
    ///
    /// # Errors
    /// An unknown name, another type or size.
    fn write(&mut self, name: &str, dtype: DType, bytes: &[u8]) -> Result<()>;
}

impl Machine for Session {
    fn run(&mut self, entry: &str, inputs: &[(&str, Values<'_>)], output: &str) -> Result<f32> {
        let e = self.plan().entry(entry)?;
        let takes = |n: &str| e.inputs.iter().any(|x| x.name == n);
        let given: Vec<(&str, Values<'_>)> = inputs.iter().filter(|(n, _)| takes(n)).copied().collect();
        let out = Session::run(self, entry, &given)?;
        let values = out.f32(output)?;
        values.first().copied().ok_or_else(|| {
            crate::error::RuntimeError::Values(format!("output `{output}` of `{entry}` is empty, expected one number"))
        })
    }

    fn changing(&self) -> Vec<String> {
        let kept = |p: &&pleach_plan::Param| {
            // Gradients are zero between steps, and caches are not of training.
            let statistic = p.role == Role::Stat && p.source == Source::Zeros;
            p.role == Role::Train || statistic || (p.role == Role::State && p.name.starts_with("adam."))
        };
        self.plan().params.iter().filter(kept).map(|p| p.name.clone()).collect()
    }

    fn fixed(&self) -> Vec<String> {
        let of_adapter = |p: &&pleach_plan::Param| p.role != Role::Train && matches!(p.source, Source::Adapter { .. });
        self.plan().params.iter().filter(of_adapter).map(|p| p.name.clone()).collect()
    }

    fn read(&self, name: &str) -> Result<ParamValues<'_>> {
        self.read_param(name)
    }

    fn write(&mut self, name: &str, dtype: DType, bytes: &[u8]) -> Result<()> {
        self.write_param(name, dtype, bytes)
    }
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
