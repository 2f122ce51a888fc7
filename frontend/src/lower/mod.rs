//! Models with adapters → IR.
//!
//! Writes plain operators only: nothing is merged or fused here, and no weight value is looked at. The entries, their
//! inputs and the names of parameters are those of ARCHITECTURE.md, "Entries".

mod bert;
mod builder;
mod llama;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use pleach_ir::{Entry, Graph};

pub(crate) use builder::Builder;

use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::peft::{Adapter, LoraSite};

/// The runnable functions that a model can be lowered to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EntryKind {
    /// All tokens at once: logits of a decoder, hidden states of an encoder.
    Infer,
    /// With a key/value cache: logits of each sequence's last token. Decoders only.
    Generate,
}

/// Sites of all adapters by module: slot and site.
pub(crate) type Branches<'a> = BTreeMap<&'a str, Vec<(u32, &'a LoraSite)>>;

/// Lowers a model with its adapters to the entries of these names: `infer`, `generate`. Adapter `i` takes slot `i`, and
/// the contributions of all slots add up.
///
/// # Errors
/// An unknown entry, `generate` for an encoder, a copy of a base weight that differs ([`Adapter::check_copies`]), and [`Error::Graph`] should an operator not fit (a fault of this
/// crate).
pub fn import(model: &Checkpoint, adapters: &[Adapter], entries: &[&str]) -> Result<Graph> {
    let mut branches = Branches::new();
    for (slot, adapter) in adapters.iter().enumerate() {
        adapter.check_copies(model)?;
        for site in &adapter.sites {
            branches.entry(&site.module).or_default().push((slot as u32, site));
        }
    }
    let mut builder = Builder::new(model, branches);
    for &name in entries {
        let kind = match name {
            "infer" => EntryKind::Infer,
            "generate" => EntryKind::Generate,
            other => return Err(Error::Graph(format!("there is no entry `{other}`; known are infer and generate"))),
        };
        builder.start(Entry::new(name));
        match (&model.config, kind) {
            (ModelConfig::Llama(config), kind) => llama::lower(&mut builder, config, kind)?,
            (ModelConfig::Bert(config), EntryKind::Infer) => bert::lower(&mut builder, config)?,
            (ModelConfig::Bert(_), EntryKind::Generate) => {
                return Err(Error::format(&model.dir, "is an encoder: it has hidden states, but generates no text"));
            }
        }
        builder.finish();
    }
    Ok(builder.into_graph())
}
