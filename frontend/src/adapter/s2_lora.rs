//! S2-LoRA: one pair of factors for all layers of a shape, of which each layer scales the ranks (Liu et al. 2024, "Sparsely Shared LoRA on
//! Whisper for Child Speech Recognition").
//!
//! y += scale · ((x · Aᵀ) ∘ s) · Bᵀ with A [r, in] and B [out, r] trained by all sites of that shape together and s [r] by one; the loss gains
//! `l1_weight` · Σ |s| over all sites. B starts at zero, s at one.

use std::sync::Arc;

use pleach_ir::{UnaryOp, ValueId};
use serde_json::{Value, json};

use super::low_rank::{Change, DOWN, Middle, UP};
use super::method::{Buffer, Entry, Key, Method, Scope};
use super::{Init, Site};
use crate::error::Result;

/// The part, and the name in files, of s.
const FACTORS: &str = "s2_lora_s";
/// The key that only training knows.
const PENALTY: &str = "l1_weight";

/// How it is found.
pub(super) const ENTRY: Entry = Entry {
    name: "s2-lora",
    keys: &[("peft_type", Key::Text("S2_LORA"))],
    read: |f| Ok(Arc::new(S2Lora { penalty: f.number(PENALTY)?.unwrap_or(1e-4) })),
};

/// S2-LoRA.
#[derive(Debug, Clone, PartialEq)]
struct S2Lora {
    penalty: f64,
}

impl Method for S2Lora {
    fn name(&self) -> &'static str {
        "s2-lora"
    }

    fn formula(&self) -> &'static str {
        "y = x·Wᵀ + alpha/r · ((x·Aᵀ) ∘ s)·Bᵀ, A and B trained by all layers of a shape together, s sparse"
    }

    fn peft_type(&self) -> &'static str {
        "S2_LORA"
    }

    fn own_keys(&self) -> &'static [&'static str] {
        &[PENALTY]
    }

    fn group(&self, site: &Site) -> Option<String> {
        Some(format!("{}x{}", site.output, site.input))
    }

    fn shared(&self, site: &Site) -> Vec<Buffer> {
        vec![
            Buffer::trained(DOWN, "s2_lora_A", &[site.rank, site.input], Init::fan_in(site.input)),
            Buffer::trained(UP, "s2_lora_B", &[site.output, site.rank], Init::Zeros {}),
        ]
    }

    fn buffers(&self, site: &Site) -> Vec<Buffer> {
        let one = Init::Constant { value: 1.0 };
        vec![Buffer::trained(FACTORS, FACTORS, &[site.rank], one), Buffer::constant("scale", site.scale)]
    }

    fn change(&self, s: &mut Scope) -> Result<Option<Change>> {
        let (down, up, factors, scale) = (s.buffer(DOWN)?, s.buffer(UP)?, s.buffer(FACTORS)?, s.buffer("scale")?);
        Ok(Some(Change { down, middle: Middle::Vector(factors), up, scale }))
    }

    fn aux_loss(&self, s: &mut Scope) -> Result<Option<ValueId>> {
        if self.penalty == 0.0 {
            return Ok(None);
        }
        let factors = s.buffer(FACTORS)?;
        let size = s.unary(UnaryOp::Abs, factors)?;
        let (sum, weight) = (s.sum_over(0, size)?, s.number(self.penalty)?);
        s.mul(sum, weight).map(Some)
    }

    fn config(&self) -> Vec<(&'static str, Value)> {
        vec![("bias", json!("none")), ("lora_dropout", json!(0.0))]
    }
}
