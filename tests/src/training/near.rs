//! A training fixture from starts near its own, so that what one run draws of roundings is not taken for the method's error.
//!
//! Every element of every trained tensor moves by a part in 10,000, up or down as a hash of its place and the number of the start says:
//! `scripts/make_bf16_expectations.py` does the same. The reference of such a start is a run in f32, which other tests hold against PyTorch.

use super::{Opened, SlotData, SlotTensor, SlotValue};
use pleach_runtime::train::{Machine, Order, Settings, step};
use serde_json::json;
use std::sync::Arc;

/// How far an element moves, as a part of itself.
const NEAR: f64 = 1e-4;

impl Opened {
    /// Moves the adapter to start number `k`; 0 leaves it.
    ///
    /// # Errors
    /// Tensors that cannot be read.
    pub fn start_near(&mut self, k: u32) -> Result<(), String> {
        if k == 0 {
            return Ok(());
        }
        let [adapter] = &mut self.adapters;
        let named = adapter.clone();
        for (site, same) in adapter.sites.iter_mut().zip(&named.sites) {
            for (part, value) in &mut site.values {
                let Some(moved) = self.moves.get_mut(&format!("slot0.{}", named.key(same, part))) else { continue };
                let t = value.read(&self.checkpoint).map_err(|e| e.to_string())?;
                let SlotData::F32(mut x) = t.data else { continue };
                for (i, x) in x.iter_mut().enumerate() {
                    *x = (f64::from(*x) * (1.0 + if up(i as u32, k) { NEAR } else { -NEAR })) as f32;
                }
                moved.0.clone_from(&x);
                *value = SlotValue::Made(Arc::new(SlotTensor { shape: t.shape, data: SlotData::F32(x) }));
            }
        }
        Ok(())
    }

    /// The gradients of the first step before clipping, up to a factor: what the first moments are after it.
    ///
    /// # Errors
    /// What the machine refuses.
    pub fn first_gradients(&self, machine: &mut dyn Machine) -> Result<Vec<f32>, String> {
        let mut order = Order::new(self.rows.len(), None);
        let settings = Settings { max_grad_norm: None, ..self.settings.clone() };
        step(machine, &self.rows, &mut order, &settings, 0).map_err(|e| e.to_string())?;
        let mut all = vec![];
        for name in self.moves.keys() {
            let moment = machine.read(&format!("adam.m.{name}")).map_err(|e| e.to_string())?;
            all.extend(moment.bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)));
        }
        Ok(all)
    }

    /// Trains, and takes the losses and the adapter at the end for the reference.
    ///
    /// # Errors
    /// What the machine refuses.
    pub fn refer_to(&mut self, machine: &mut dyn Machine) -> Result<(), String> {
        let mut order = Order::new(self.rows.len(), None);
        let mut losses = vec![];
        for i in 0..self.settings.steps {
            losses.push(step(machine, &self.rows, &mut order, &self.settings, i).map_err(|e| e.to_string())?.loss);
        }
        self.expected["losses"] = json!(losses);
        for (name, (_, after)) in &mut self.moves {
            let end = machine.read(name).map_err(|e| e.to_string())?;
            *after = end.bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        }
        Ok(())
    }
}

/// Whether element `i` of a tensor is moved up.
fn up(i: u32, k: u32) -> bool {
    let x = i.wrapping_mul(2_654_435_761).wrapping_add(k.wrapping_mul(2_246_822_519));
    let x = (x ^ (x >> 15)).wrapping_mul(3_266_489_917);
    (x ^ (x >> 13)) & 1 == 1
}
