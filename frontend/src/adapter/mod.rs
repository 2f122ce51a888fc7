//! Adapter methods: one file each, saying what a method owns and what it computes.
//!
//! An adapter occupies a *slot*: its tensors are parameters `slot{n}.{key}`, so that another adapter with the same sites and ranks
//! can take its place without a new compilation. To add a method: a file with a value that implements [`Method`], and one line in
//! `METHODS`.

mod adalora;
mod allora;
mod cluster;
mod combine;
mod convert;
mod corda;
mod decompose;
mod dora;
mod dylora;
mod eva;
mod fold;
mod full;
mod gated;
mod hydra;
mod ia3;
mod increlora;
mod init;
mod kasa;
mod loha;
mod lokr;
mod loldu;
mod lora;
mod lora_fa;
mod lora_ga;
mod lora_plus;
mod lora_sb;
mod loram;
mod low_rank;
mod lt_sft;
mod measure;
mod method;
mod miss;
mod nola;
mod oft;
mod olora;
mod ops;
mod paca;
mod pissa;
mod plan;
mod prepare;
mod projected;
mod randlora;
mod s2_lora;
mod s2ft;
mod saved;
mod schedule;
mod shira;
mod slots;
mod smora;
mod start;
mod svd;
#[cfg(test)]
mod tests;
mod triadapt;
mod units;
mod update;
mod value;
mod vera;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use serde_json::Value;

pub use combine::{Combination, combine};
pub use convert::to_lora;
pub(crate) use fold::all_rows;
pub use fold::{edited, merged, merged_bias, obstacle};
pub(crate) use full::NO_TARGET;
pub use init::{Init, Norms, Scores, UnitWeight};
pub use low_rank::{Change, Middle};
pub use measure::Measure;
use method::Entry;
pub use method::{Buffer, LowRank, Method, Request, Scope};
pub(crate) use paca::{ABSOLUTE, DELTA, INDICES};
pub use plan::{AdapterPlan, TensorPlan};
pub(crate) use prepare::Lazy;
pub use prepare::{Given, Measured, collect, prepare, side_by_side};
pub use saved::{Kept, RankPattern, SavedRanks, SiteRanks};
pub use schedule::{Buffers, Event, Events, EventsPlan, Moment};
pub use update::Update;
pub use value::{SlotData, SlotTensor, SlotValue};

use crate::checkpoint::Checkpoint;
use crate::coupling::{Coupling, Member};
use crate::error::{Error, Result};
use crate::json::Fields;
use crate::modules::is_computed;
use crate::peft::{Adapter, SHARED};

/// The key that says how a LoRA adapter is trained; it is not saved.
pub(crate) const TRAINING: &str = "training";
/// A method with its options, cheap to copy.
#[derive(Clone)]
pub struct Kind(Arc<dyn Method>);

/// Every method, in the order of lists.
const METHODS: &[&Entry] = &[
    &lora::ENTRY,
    &dora::ENTRY,
    &lora::RS_ENTRY,
    &lora_plus::ENTRY,
    &lora_fa::ENTRY,
    &allora::ENTRY,
    &kasa::ENTRY,
    &pissa::ENTRY,
    &olora::ENTRY,
    &eva::ENTRY,
    &corda::ENTRY,
    &lora_ga::ENTRY,
    &loldu::ENTRY,
    &lora_sb::ENTRY,
    &paca::ENTRY,
    &ia3::ENTRY,
    &vera::ENTRY,
    &loha::ENTRY,
    &lokr::ENTRY,
    &miss::ENTRY,
    &oft::ENTRY,
    &randlora::ENTRY,
    &shira::ENTRY,
    &hydra::ENTRY,
    &nola::ENTRY,
    &s2ft::ENTRY,
    &smora::ENTRY,
    &loram::ENTRY,
    &adalora::ENTRY,
    &dylora::ENTRY,
    &s2_lora::ENTRY,
    &gated::SORA,
    &gated::CODYRA,
    &increlora::ENTRY,
    &triadapt::ENTRY,
    &lt_sft::ENTRY,
    &full::ENTRY,
    &projected::GALORE,
    &projected::FIRA,
];

/// The names of all methods.
pub fn method_names() -> impl Iterator<Item = &'static str> {
    METHODS.iter().map(|m| m.name)
}

/// All names, as a sentence has them.
pub(crate) fn known_names() -> String {
    let mut names: Vec<&str> = method_names().collect();
    let last = names.pop().unwrap_or_default();
    format!("{} and {last}", names.join(", "))
}

impl Kind {
    /// The keys that a method's name stands for.
    pub(crate) fn implied(name: &str) -> Option<Vec<(&'static str, Value)>> {
        let entry = METHODS.iter().find(|m| m.name == name)?;
        Some(entry.keys.iter().map(|(key, value)| (*key, value.json())).collect())
    }

    /// The method that a configuration asks for.
    ///
    /// # Errors
    /// A `peft_type` that is not known, and what the method refuses.
    pub(crate) fn read(f: &mut Fields) -> Result<Kind> {
        let Some(asked) = f.text("peft_type")? else {
            return Err(f.fault("peft_type", "is missing; this is not the configuration of a PEFT adapter"));
        };
        let training = f.text(TRAINING)?;
        let fitting: Vec<_> = METHODS.iter().filter(|m| m.fits(f)).collect();
        // The first of those with most keys.
        let Some(entry) = fitting.iter().rev().max_by_key(|m| m.keys.len()) else {
            let types: Vec<Value> = METHODS.iter().map(|m| m.keys[0].1.json()).collect();
            let mut seen = BTreeSet::from(["FULL"]);
            let types: Vec<&str> = types.iter().filter_map(Value::as_str).filter(|t| seen.insert(*t)).collect();
            return Err(f.fault("peft_type", format!("is `{asked}`; supported are {}", types.join(", "))));
        };
        if let Some(unknown) = training.filter(|t| !entry.keys.iter().any(|(k, v)| *k == TRAINING && v.json() == **t)) {
            return Err(f.fault(TRAINING, format!("is `{unknown}`, which is no way to train {}", entry.name)));
        }
        Ok(Kind((entry.read)(f)?))
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
    /// Largest input and largest output of all sites of the adapter.
    pub widest: (u64, u64),
    /// Its part in a coupling.
    pub member: Option<Member>,
    /// The buffer that says which units of the coupling its layers hold ([`Method::order`]), its parameter named after the consumer.
    pub order: Option<Buffer>,
    /// The values of its buffers, by part.
    pub values: BTreeMap<&'static str, SlotValue>,
}

/// A coupling whose layers hold their units in an order of the adapter's while it is trained.
#[derive(Debug, Clone, PartialEq)]
pub struct Ordered {
    /// The coupling.
    pub coupling: Coupling,
    /// The units, i32 [n].
    pub buffer: Buffer,
    /// Their numbers.
    pub value: SlotValue,
}

impl Ordered {
    /// Key in the slot.
    pub fn key(&self) -> String {
        format!("{}.{}", self.coupling.consumer, self.buffer.part)
    }

    /// Every path of a module in it.
    pub(crate) fn paths(&mut self) -> impl Iterator<Item = &mut String> {
        let members = self.coupling.members.iter_mut().flat_map(|(path, m)| [path, &mut m.consumer]);
        std::iter::once(&mut self.coupling.consumer).chain(members)
    }
}

impl Site {
    /// The values of an f32 buffer.
    ///
    /// # Errors
    /// A buffer that is not there, or that cannot be read.
    pub(crate) fn floats(&self, part: &str, base: &Checkpoint) -> Result<Vec<f32>> {
        let value = self.values.get(part).ok_or_else(|| Error::Graph(format!("no value for `{part}`")))?;
        match value.read(base)?.data {
            SlotData::F32(x) => Ok(x),
            SlotData::I32(_) => Err(Error::Graph(format!("`{part}` holds indices"))),
        }
    }
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

/// A buffer that several sites have in common.
#[derive(Debug, Clone, PartialEq)]
pub struct Shared {
    /// Its key in the slot.
    pub key: String,
    /// Its name in the adapter's file; `None` where it is not saved.
    pub file: Option<String>,
    /// The buffer.
    pub buffer: Buffer,
    /// The first site that has it.
    pub first: usize,
}

/// The key of a shared buffer.
fn shared_key(group: Option<&str>, part: &str) -> String {
    group.map_or_else(|| part.to_owned(), |g| format!("{g}.{part}"))
}

/// All shared buffers of sites, each once.
pub(crate) fn shared(method: &dyn Method, sites: &[Site]) -> Vec<Shared> {
    let (mut seen, mut list) = (BTreeSet::new(), vec![]);
    for (first, site) in sites.iter().enumerate() {
        let group = method.group(site);
        for buffer in method.shared(site) {
            let key = shared_key(group.as_deref(), buffer.part);
            if seen.insert(key.clone()) {
                let file = buffer.file.map(|end| format!("{SHARED}{}", shared_key(group.as_deref(), end)));
                list.push(Shared { key, file, buffer, first });
            }
        }
    }
    list
}

/// The values of all parameters of an adapter's slot: key (as in `Source::Adapter`) and value, in module order. What
/// belongs to modules that no entry computes (an encoder's pooler) has no parameters.
pub fn slot_values(adapter: &Adapter) -> Vec<(String, SlotValue)> {
    let sites = adapter.sites.iter().filter(|s| is_computed(&s.module));
    let of_site = |s: &Site| -> Vec<(String, SlotValue)> {
        let key = |b: Buffer| Some((format!("{}.{}", s.module, b.part), s.values.get(b.part)?.clone()));
        adapter.config.method.buffers(s).into_iter().filter_map(key).collect()
    };
    let shared = adapter
        .shared()
        .into_iter()
        .filter_map(|b| Some((b.key, adapter.sites.get(b.first)?.values.get(b.buffer.part)?.clone())));
    let orders = adapter.orders.iter().map(|o| (o.key(), o.value.clone()));
    let replaced = adapter.replaced.iter().filter(|r| is_computed(&r.path));
    shared
        .chain(orders)
        .chain(sites.flat_map(of_site))
        .chain(replaced.map(|r| (r.path.clone(), r.value.clone())))
        .collect()
}
