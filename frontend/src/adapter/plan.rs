//! What a trainer must know of an adapter, as data: which parameters its slot has, how they start, and under which names and with
//! which configuration they are saved. A plan file carries it, so a run needs neither this crate nor a configuration.
//!
//! No path is in it: the base model's name is for whoever writes the folder.

use pleach_ir::{DType, Role};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::method::Buffer;
use super::{EventsPlan, Init, Kept, Request, SiteRanks, saved};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::modules::is_computed;
use crate::peft::{Adapter, PREFIX};

/// An adapter as a trainer sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AdapterPlan {
    /// Name of the method.
    pub method: String,
    /// Its slot.
    pub slot: u32,
    /// `adapter_config.json`, without `base_model_name_or_path`.
    pub config: Map<String, Value>,
    /// The parameters of the slot, in module order.
    pub tensors: Vec<TensorPlan>,
    /// What the method changes from step to step.
    pub events: Option<EventsPlan>,
    /// `adapter_config.json` of the folder of first values, where some are kept.
    pub initial: Option<Map<String, Value>>,
    /// The configuration with the keys that are not saved, where first values must be prepared before training.
    pub preparation: Option<Map<String, Value>>,
    /// Sites of which only ranks in use are saved.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ranks: Vec<SiteRanks>,
}

/// One parameter of the slot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TensorPlan {
    /// Key in the slot; the parameter is called `slot{n}.{key}`.
    pub key: String,
    /// Name in `adapter_model.safetensors`; absent where it is not saved.
    pub file: Option<String>,
    /// Row-major shape.
    pub shape: Vec<u64>,
    /// Type in the file, as safetensors spells it: `F32`, or `I64` for indices, which are i32 in the slot.
    pub dtype: String,
    /// Whether the optimizer changes it.
    pub trained: bool,
    /// How it starts; tensors of the base by their names in the checkpoint.
    pub init: Init,
    /// What of it is saved, where not all of it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<Kept>,
}

impl AdapterPlan {
    /// The plan of an adapter in a slot.
    ///
    /// # Errors
    /// A parameter of the base that the checkpoint does not hold.
    pub fn new(adapter: &Adapter, slot: u32, base: &Checkpoint) -> Result<AdapterPlan> {
        let method = &adapter.config.method;
        let mut tensors = vec![];
        for b in adapter.shared() {
            tensors.push(tensor(b.key, b.file, &b.buffer, base)?);
        }
        for o in &adapter.orders {
            let file = o.buffer.file.map(|end| format!("{PREFIX}{}.{end}", o.coupling.consumer));
            tensors.push(tensor(o.key(), file, &o.buffer, base)?);
        }
        for site in adapter.sites.iter().filter(|s| is_computed(&s.module)) {
            for mut b in method.buffers(site) {
                let file = b.file.map(|end| format!("{PREFIX}{}.{end}", site.module));
                if let Init::Prepared { kept: Some(end) } = &mut b.init {
                    *end = format!("{PREFIX}{}.{end}", site.module);
                }
                let kept = method.saved_ranks().and_then(|r| r.kept(site, b.part));
                // A mask is saved as the places that it holds.
                let mask = b.role == Role::Stat && kept.as_ref().is_some_and(|k| k.axes.is_empty());
                let dtype = if mask || b.dtype == DType::I32 { "I64" } else { "F32" }.into();
                tensors.push(TensorPlan {
                    kept,
                    dtype,
                    ..tensor(format!("{}.{}", site.module, b.part), file, &b, base)?
                });
            }
        }
        for r in adapter.replaced.iter().filter(|r| is_computed(&r.path)) {
            let file = Some(format!("{PREFIX}{}", r.file));
            tensors.push(tensor(r.path.clone(), file, &r.buffer(), base)?);
        }
        let has = |f: fn(&Init) -> bool| tensors.iter().any(|t: &TensorPlan| f(&t.init));
        let initial = has(|i| matches!(i, Init::Prepared { kept: Some(_) })).then(|| {
            let mut config = adapter.config.saved();
            config.extend(method.initial_config().into_iter().map(|(k, v)| (k.to_owned(), v)));
            config
        });
        let preparation = has(|i| matches!(i, Init::Prepared { .. })).then(|| adapter.config.raw.clone());
        Ok(AdapterPlan {
            method: method.name().into(),
            slot,
            config: adapter.config.saved(),
            events: EventsPlan::new(adapter, slot),
            initial,
            preparation,
            ranks: saved::entries(&**method, adapter.sites.iter().filter(|s| is_computed(&s.module))),
            tensors,
        })
    }

    /// As JSON.
    pub fn to_json(&self) -> Value {
        // Strings, numbers and lists only: nothing here can fail.
        serde_json::to_value(self).unwrap_or_default()
    }
}

impl Adapter {
    /// What the method wants to know before training: module and request.
    pub fn requests(&self) -> Vec<(String, Request)> {
        let of = |s: &super::Site| {
            self.config.method.requests(s).into_iter().map(|r| (s.module.clone(), r)).collect::<Vec<_>>()
        };
        self.sites.iter().flat_map(of).collect()
    }
}

fn tensor(key: String, file: Option<String>, b: &Buffer, base: &Checkpoint) -> Result<TensorPlan> {
    let rename = |path: &str| base.param(path).map(|t| t.name.clone());
    let init = b.init.renamed(rename).ok_or_else(|| Error::tensor(&base.dir, &key, "is not in the checkpoint"))?;
    Ok(TensorPlan {
        key,
        file,
        shape: b.shape.clone(),
        dtype: if b.dtype == DType::I32 { "I64" } else { "F32" }.into(),
        trained: b.role == Role::Train,
        init,
        kept: None,
    })
}
