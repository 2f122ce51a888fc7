//! Adapter slots: buffers at fixed addresses whose values can be exchanged without compiling anything.
#![allow(unsafe_code)]

use crate::error::{Result, RuntimeError};
use crate::session::{Session, misfit, upload};
use crate::weights::{TensorSource, nearest};
use pleach_plan::{Plan, Source};
use std::collections::{BTreeMap, BTreeSet};

impl Session {
    /// Puts an adapter into a slot: copies its tensors and runs the preparations that depend on them. The tensors are
    /// named by the keys of the plan ([`Session::slot_keys`]); f16 and bf16 are cast.
    ///
    /// # Errors
    /// [`RuntimeError::Misfit`] with every missing, unknown or wrongly shaped tensor by name; the slot is unchanged.
    pub fn load_slot(&mut self, slot: u32, tensors: &dyn TensorSource) -> Result<()> {
        let plan = self.plan.clone();
        let keys = keys_of(&plan, slot)?;
        let mut faults = vec![];
        for (key, i) in &keys {
            match tensors.tensor(key) {
                None => faults.push(format!("tensor `{key}` is missing")),
                Some(t) => {
                    if let Some(why) = misfit(&plan.params[*i], t.dtype, t.shape, t.bytes.len()) {
                        faults.push(format!("tensor `{key}` {why}"));
                    }
                }
            }
        }
        for name in tensors.names() {
            if !keys.contains_key(name) {
                let near =
                    nearest(keys.keys().copied(), name).map(|n| format!(" (nearest: `{n}`)")).unwrap_or_default();
                faults.push(format!("tensor `{name}` is not one of this slot{near}"));
            }
        }
        if !faults.is_empty() {
            let n = faults.len();
            faults.truncate(16);
            if n > 16 {
                faults.push(format!("and {} more", n - 16));
            }
            return Err(RuntimeError::Misfit { slot, why: faults.join("\n") });
        }
        // From here on nothing is refused.
        for (key, i) in &keys {
            let (p, Some(t)) = (&plan.params[*i], tensors.tensor(key)) else { continue };
            let bytes = p.bytes.eval(&self.capacity)?;
            // SAFETY: the parameter is owned and has exactly this size.
            unsafe { upload(&mut *self.device, self.params[*i], bytes, t, p)? };
        }
        self.slot_changed(slot)
    }

    /// Empties a slot: zeros, which is the model without that adapter.
    ///
    /// # Errors
    /// [`RuntimeError::Misfit`] for a slot the plan does not have.
    pub fn clear_slot(&mut self, slot: u32) -> Result<()> {
        let plan = self.plan.clone();
        for i in keys_of(&plan, slot)?.into_values() {
            let bytes = plan.params[i].bytes.eval(&self.capacity)?;
            // SAFETY: the parameter is owned and has this size.
            unsafe { self.device.zero(self.params[i], bytes)? };
        }
        self.slot_changed(slot)
    }

    /// The tensors a slot takes: key and shape, in order of the key.
    pub fn slot_keys(&self, slot: u32) -> Vec<(String, Vec<u64>)> {
        let keys = keys_of(&self.plan, slot).unwrap_or_default();
        keys.into_iter()
            .map(|(k, i)| {
                let shape = self.plan.params[i].shape.iter().map(|d| d.eval(&[]).unwrap_or(0)).collect();
                (k.to_string(), shape)
            })
            .collect()
    }

    /// Runs every preparation that reads the slot, or what such a preparation wrote.
    fn slot_changed(&mut self, slot: u32) -> Result<()> {
        let plan = self.plan.clone();
        let mut changed: BTreeSet<u32> = BTreeSet::new();
        for (i, p) in plan.params.iter().enumerate() {
            if matches!(p.source, Source::Adapter { slot: s, .. } if s == slot) {
                changed.insert(i as u32);
            }
        }
        self.make_due(changed, Some(slot));
        self.prepare_all()
    }
}

/// Keys of a slot and the parameters they fill.
fn keys_of(plan: &Plan, slot: u32) -> Result<BTreeMap<&str, usize>> {
    let mut out = BTreeMap::new();
    for (i, p) in plan.params.iter().enumerate() {
        match &p.source {
            Source::Adapter { slot: s, key } if *s == slot => {
                out.insert(key.as_str(), i);
            }
            _ => {}
        }
    }
    if out.is_empty() {
        let why = format!("the plan has no such slot; it has {:?}", plan.slots());
        return Err(RuntimeError::Misfit { slot, why });
    }
    Ok(out)
}
