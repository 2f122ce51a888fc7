//! Looking at a model before training: sums of gradients, or statistics of inputs, over the first batches of a run's order.
//!
//! Rows are run one at a time, so that no more than one row's activations are alive; a batch is what the sum of its rows makes it.

use super::data::{Order, Rows};
use super::machine::Machine;
use crate::error::{Result, RuntimeError};

/// What is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// Gradients of the mean loss of every batch, added up by the entry `accumulate`.
    Gradients,
    /// Whatever the entry `measure` keeps of the inputs, row by row.
    Inputs,
}

/// Runs `batches` batches of `batch` rows.
///
/// # Errors
/// What the machine refuses; a loss that is no number.
pub fn calibrate(
    machine: &mut dyn Machine,
    look: Look,
    rows: &Rows,
    order: &mut Order,
    batch: u64,
    batches: u64,
) -> Result<()> {
    for i in 0..batches {
        let chosen: Vec<usize> = (i * batch..(i + 1) * batch).map(|p| order.at(p)).collect();
        let targets: usize = chosen.iter().map(|r| rows.pack([*r]).labels.len()).sum();
        let scale = [1.0 / targets.max(1) as f32];
        for row in chosen {
            let b = match look {
                Look::Gradients => rows.pack([row]),
                Look::Inputs => rows.pack_labelled([row]),
            };
            if b.labels.is_empty() {
                continue;
            }
            let (entry, output) = match look {
                Look::Gradients => ("accumulate", "loss"),
                Look::Inputs => ("measure", "count"),
            };
            let value = machine.run(entry, &b.values(&scale), output)?;
            if !value.is_finite() {
                return Err(RuntimeError::Values(format!("the loss of row {row} is {value}; check the data")));
            }
        }
    }
    Ok(())
}
