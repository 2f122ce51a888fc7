//! Moments of a run at which something outside of the plan may change buffers: masks, projections, statistics.

use super::machine::Machine;
use crate::error::Result;
use std::fmt::Debug;

/// When in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Before the first forward run.
    Before,
    /// When the gradients are complete, before the update.
    Gradients,
    /// After the update.
    After,
}

/// What happens at the moments of a run. It must be a function of the step, the seed and the machine's buffers alone, so that a
/// run that goes on from a checkpoint does what it would have done.
pub trait Events: Debug {
    /// A moment of step `step` (from 0) of `steps`.
    ///
    /// # Errors
    /// Whatever ends the run.
    fn at(&self, moment: Moment, step: u64, steps: u64, seed: u64, machine: &mut dyn Machine) -> Result<()>;
}
