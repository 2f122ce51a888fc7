//! Hydra: one low-rank branch beside a layer and one behind it (Kim et al. 2023, "Hydra: Multi-head Low-rank Adaptation for
//! Parameter Efficient Fine-tuning").
//!
//! With y₀ = x · Wᵀ + bias: y = y₀ + scale · (x · A_pᵀ + a) · B_pᵀ + scale · (y₀ · A_sᵀ) · B_sᵀ; B_p, B_s and a start at zero. The shift a is
//! left out unless `parallel_bias` is on, for it needs a layer with a bias to be merged into. PEFT has no such class.

use std::sync::Arc;

use pleach_ir::ValueId;
use serde_json::{Value, json};

use super::method::{Buffer, Entry, Key, Method, Scope};
use super::{Init, Site};
use crate::error::Result;
use crate::json::Fields;

/// How it is found.
pub(super) const ENTRY: Entry =
    Entry { name: "hydra", keys: &[("peft_type", Key::Text("HYDRA"))], read: |f| Ok(Arc::new(Hydra::read(f)?)) };

/// Hydra.
#[derive(Debug, Clone)]
struct Hydra {
    shift: bool,
}

impl Hydra {
    fn read(f: &mut Fields) -> Result<Hydra> {
        Ok(Hydra { shift: f.flag("parallel_bias")?.unwrap_or(false) })
    }
}

impl Method for Hydra {
    fn name(&self) -> &'static str {
        "hydra"
    }

    fn formula(&self) -> &'static str {
        "y = y₀ + alpha/r · (x·A_pᵀ)·B_pᵀ + alpha/r · (y₀·A_sᵀ)·B_sᵀ, y₀ = x·Wᵀ"
    }

    fn peft_type(&self) -> &'static str {
        "HYDRA"
    }

    fn buffers(&self, site: &Site) -> Vec<Buffer> {
        let (r, input, output) = (site.rank, site.input, site.output);
        let mut list = vec![
            Buffer::trained("parallel_A", "parallel_A", &[r, input], Init::fan_in(input)),
            Buffer::trained("parallel_B", "parallel_B", &[output, r], Init::Zeros {}),
            Buffer::trained("sequential_A", "sequential_A", &[r, output], Init::fan_in(output)),
            Buffer::trained("sequential_B", "sequential_B", &[output, r], Init::Zeros {}),
            Buffer::constant("scale", site.scale),
        ];
        if self.shift {
            list.push(Buffer::trained("parallel_bias", "parallel_bias", &[r], Init::Zeros {}));
        }
        list
    }

    fn result(&self, s: &mut Scope, x: ValueId, y: ValueId) -> Result<ValueId> {
        let scale = s.buffer("scale")?;
        let (a, b) = (s.buffer("parallel_A")?, s.buffer("parallel_B")?);
        let mut narrow = s.times(x, a)?;
        if self.shift {
            let shift = s.buffer("parallel_bias")?;
            let shift = s.over_rows(shift, narrow)?;
            narrow = s.sum(&[narrow, shift])?;
        }
        let beside = s.times(narrow, b)?;
        let beside = s.mul(scale, beside)?;
        let (a, b) = (s.buffer("sequential_A")?, s.buffer("sequential_B")?);
        let narrow = s.times(y, a)?;
        let behind = s.times(narrow, b)?;
        let behind = s.mul(scale, behind)?;
        s.sum(&[y, beside, behind])
    }

    fn config(&self) -> Vec<(&'static str, Value)> {
        vec![("parallel_bias", json!(self.shift))]
    }
}
