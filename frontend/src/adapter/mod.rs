//! Adapter methods: one file each, saying what a method owns and what it computes.
//!
//! An adapter occupies a *slot*: its tensors are parameters `slot{n}.{key}`, so that another adapter with the same sites and ranks
//! can take its place without a new compilation. To add a method: a file with a value that implements [`Method`], and one line in
//! [`Kind::read`].

mod allora;
mod combine;
mod convert;
mod dora;
mod fold;
mod full;
mod init;
mod lora;
mod lora_fa;
mod lora_plus;
mod method;
mod paca;
mod plan;
mod schedule;
mod svd;
#[cfg(test)]
mod tests;
mod update;
mod value;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

pub use combine::{Combination, combine};
pub use convert::to_lora;
pub(crate) use fold::all_rows;
pub use fold::merged;
pub(crate) use full::NO_TARGET;
pub use init::{Init, Norms};
pub use method::{Buffer, Method, Request, Scope};
pub(crate) use paca::{ABSOLUTE, DELTA, INDICES};
pub use plan::{AdapterPlan, TensorPlan};
pub use schedule::{Buffers, Event, Events, EventsPlan, Moment};
pub use update::Update;
pub use value::{SlotData, SlotTensor, SlotValue};

use crate::error::Result;
use crate::json::Fields;
use crate::modules::is_computed;
use crate::peft::Adapter;

/// The key that says how a LoRA adapter is trained; it is not saved.
pub(crate) const TRAINING: &str = "training";
/// Its values, which are names of methods.
pub(crate) const TRAININGS: [&str; 3] = ["lora-plus", "lora-fa", "allora"];

/// A method with its options, cheap to copy.
#[derive(Clone)]
pub struct Kind(Arc<dyn Method>);

impl Kind {
    /// The method that a configuration asks for.
    ///
    /// # Errors
    /// A `peft_type` that is not known, and what the method refuses.
    pub(crate) fn read(f: &mut Fields) -> Result<Kind> {
        Ok(Kind(match f.text("peft_type")? {
            Some("LORA") if f.raw(TRAINING).is_some() => return Kind::trained(f),
            Some("LORA") if f.flag("use_dora")? == Some(true) => Arc::new(dora::Dora::read(f)?),
            Some("LORA") => Arc::new(lora::Lora::read(f)?),
            Some("PACA") => Arc::new(paca::Paca::read(f)?),
            Some("FULL") => Arc::new(full::Full),
            Some(other) => return Err(f.fault("peft_type", format!("is `{other}`; LORA and PACA are supported"))),
            None => return Err(f.fault("peft_type", "is missing; this is not the configuration of a PEFT adapter")),
        }))
    }

    /// LoRA that is trained in a way of its own.
    fn trained(f: &mut Fields) -> Result<Kind> {
        Ok(Kind(match f.text(TRAINING)? {
            Some("lora-plus") => Arc::new(lora_plus::LoraPlus::read(f)?),
            Some("lora-fa") => Arc::new(lora_fa::LoraFa::read(f)?),
            Some("allora") => Arc::new(allora::Allora::read(f)?),
            other => {
                let known = TRAININGS.join(", ");
                return Err(f.fault(TRAINING, format!("is `{}`; known are {known}", other.unwrap_or_default())));
            }
        }))
    }
}

impl std::ops::Deref for Kind {
    type Target = dyn Method + 'static;
    fn deref(&self) -> &(dyn Method + 'static) {
        &*self.0
    }
}

impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One place where a method attaches: a linear layer, or an embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct Site {
    /// Path of the layer in the base's [`ModuleTable`](crate::ModuleTable), such as `model.layers.0.self_attn.q_proj`.
    pub module: String,
    /// Whether the layer is an embedding.
    pub embedding: bool,
    /// r.
    pub rank: u64,
    /// alpha, after `alpha_pattern`.
    pub alpha: f64,
    /// The factor of the update.
    pub scale: f64,
    /// Width of x; rows of the table for an embedding.
    pub input: u64,
    /// Width of y.
    pub output: u64,
    /// The values of its buffers, by part.
    pub values: BTreeMap<&'static str, SlotValue>,
}

/// A parameter of the base that an adapter replaces as a whole: of a module in `modules_to_save`, or a trained bias.
#[derive(Debug, Clone, PartialEq)]
pub struct Replaced {
    /// Path of the parameter, such as `lm_head.weight`; its key in the slot too.
    pub path: String,
    /// Its shape.
    pub shape: Vec<u64>,
    /// Its name in the adapter's file, behind PEFT's prefix.
    pub file: String,
    /// Its value.
    pub value: SlotValue,
}

/// The values of all parameters of an adapter's slot: key (as in `Source::Adapter`) and value, in module order. What
/// belongs to modules that no entry computes (an encoder's pooler) has no parameters.
pub fn slot_values(adapter: &Adapter) -> Vec<(String, SlotValue)> {
    let sites = adapter.sites.iter().filter(|s| is_computed(&s.module));
    let of_site = |s: &Site| -> Vec<(String, SlotValue)> {
        let key = |b: Buffer| Some((format!("{}.{}", s.module, b.part), s.values.get(b.part)?.clone()));
        adapter.config.method.buffers(s).into_iter().filter_map(key).collect()
    };
    let replaced = adapter.replaced.iter().filter(|r| is_computed(&r.path));
    sites.flat_map(of_site).chain(replaced.map(|r| (r.path.clone(), r.value.clone()))).collect()
}
