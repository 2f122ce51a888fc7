//! Models with adapters → IR.
//!
//! Writes plain operators only: nothing is merged or fused here, and no weight value is looked at. The entries, their
//! inputs and the names of parameters are those of ARCHITECTURE.md, "Entries".

mod arrange;
mod bert;
mod builder;
mod llama;
mod loss;
#[cfg(test)]
mod tests;

use pleach_ir::{Entry, Graph};

pub(crate) use builder::Builder;

use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::peft::Adapter;

/// The runnable functions that a model can be lowered to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EntryKind {
    /// All tokens at once: logits of a decoder, hidden states of an encoder.
    Infer,
    /// With a key/value cache: logits of each sequence's last token. Decoders only.
    Generate,
    /// The loss of counted rows, to be differentiated. Decoders only.
    Train,
    /// The same loss, to be looked at. Decoders only.
    Evaluate,
    /// The loss of the base alone, to be differentiated by weights of modules that are looked at. Decoders only.
    Calibrate,
    /// Statistics of the inputs of modules, and the number of tokens. Decoders only.
    Measure,
}

impl EntryKind {
    const ALL: [(EntryKind, &'static str); 6] = [
        (EntryKind::Infer, "infer"),
        (EntryKind::Generate, "generate"),
        (EntryKind::Train, "train"),
        (EntryKind::Evaluate, "evaluate"),
        (EntryKind::Calibrate, builder::CALIBRATE),
        (EntryKind::Measure, builder::MEASURE),
    ];

    fn from_name(name: &str) -> Result<EntryKind> {
        EntryKind::ALL.iter().find(|e| e.1 == name).map(|e| e.0).ok_or_else(|| {
            let known: Vec<&str> = EntryKind::ALL.iter().map(|e| e.1).collect();
            Error::Graph(format!("there is no entry `{name}`; known are {}", known.join(", ")))
        })
    }
}

/// What to lower: a model, its adapters, the entries, and which slot is trained.
#[derive(Debug, Clone)]
pub struct Import<'a> {
    model: &'a Checkpoint,
    adapters: &'a [Adapter],
    entries: Vec<String>,
    train: Option<u32>,
    calibrated: &'a [String],
}

impl<'a> Import<'a> {
    /// The bare model without an entry.
    pub fn new(model: &'a Checkpoint) -> Import<'a> {
        Import { model, adapters: &[], entries: vec![], train: None, calibrated: &[] }
    }

    /// Adapter `i` takes slot `i`; the contributions of all slots add up.
    pub fn adapters(mut self, adapters: &'a [Adapter]) -> Import<'a> {
        self.adapters = adapters;
        self
    }

    /// The entries by name: `infer`, `generate`, `train`, `evaluate`, `calibrate`, `measure`.
    pub fn entries<S: AsRef<str>>(mut self, entries: &[S]) -> Import<'a> {
        self.entries = entries.iter().map(|e| e.as_ref().to_owned()).collect();
        self
    }

    /// The slot whose parameters are trained: what its method trains gets role `Train`.
    pub fn train(mut self, slot: u32) -> Import<'a> {
        self.train = Some(slot);
        self
    }

    /// The modules that the entries `calibrate` and `measure` look at. They see the base alone; adapters say what is measured.
    pub fn calibrated(mut self, modules: &'a [String]) -> Import<'a> {
        self.calibrated = modules;
        self
    }

    /// The graph.
    ///
    /// # Errors
    /// An unknown entry, `train` without a slot to train, an entry that an encoder does not have, two adapters that replace one
    /// parameter, a copy of a base weight that differs ([`Adapter::check_copies`]), and [`Error::Graph`] should an operator not fit (a fault of this crate).
    pub fn graph(&self) -> Result<Graph> {
        for adapter in self.adapters {
            adapter.check_copies(self.model)?;
        }
        let mut builder = Builder::new(self.model, self.adapters, self.train)?;
        for name in &self.entries {
            let kind = EntryKind::from_name(name)?;
            if kind == EntryKind::Train && self.train.is_none_or(|slot| slot as usize >= self.adapters.len()) {
                return Err(Error::Graph("the entry `train` needs an adapter that is trained".into()));
            }
            let calibrates = matches!(kind, EntryKind::Calibrate | EntryKind::Measure);
            if calibrates != builder.calibrates() {
                if !calibrates {
                    return Err(Error::Graph(format!("`{name}` is not combined with an entry for calibration")));
                }
                builder.calibrate(self.calibrated);
            }
            builder.start(Entry::new(name));
            builder.arranges = matches!(kind, EntryKind::Train | EntryKind::Evaluate);
            match (&self.model.config, kind) {
                (ModelConfig::Llama(config), kind) => llama::lower(&mut builder, config, kind)?,
                (ModelConfig::Bert(config), EntryKind::Infer) => bert::lower(&mut builder, config)?,
                (ModelConfig::Bert(_), EntryKind::Generate) => {
                    let what = "is an encoder: it has hidden states, but generates no text";
                    return Err(Error::format(&self.model.dir, what));
                }
                (ModelConfig::Bert(_), _) => {
                    let what = "is an encoder: training and evaluation are supported for decoders only";
                    return Err(Error::format(&self.model.dir, what));
                }
            }
            builder.finish();
            if kind == EntryKind::Train {
                builder.optimizer()?;
            }
        }
        Ok(builder.into_graph())
    }
}

/// Lowers a model with adapters that stay as they are: [`Import`] without a slot to train.
///
/// # Errors
/// As [`Import::graph`].
pub fn import(model: &Checkpoint, adapters: &[Adapter], entries: &[&str]) -> Result<Graph> {
    Import::new(model).adapters(adapters).entries(entries).graph()
}
