//! Adapter methods: one file each, saying what a method's branch computes.
//!
//! A loaded adapter occupies a *slot*: its tensors are parameters `slot{n}.{key}`, so that another adapter with the
//! same sites and ranks can take its place without a new compilation.

pub mod lora;

use crate::modules::is_computed;
use crate::peft::Adapter;
use crate::tensors::TensorRef;

/// Where the value of one slot parameter comes from.
#[derive(Debug, Clone, PartialEq)]
pub enum SlotValue {
    /// A tensor of the adapter's file.
    Tensor(TensorRef),
    /// A number from its configuration, f32 [].
    Scalar(f32),
}

/// The values of all parameters of an adapter's slot: key (as in `Source::Adapter`) and value, in module order. Sites of
/// modules that no entry computes (an encoder's pooler) have no parameters.
pub fn slot_values(adapter: &Adapter) -> Vec<(String, SlotValue)> {
    adapter.sites.iter().filter(|s| is_computed(&s.module)).flat_map(lora::values).collect()
}
