//! ALLoRA: LoRA without dropout whose gradients shrink with the norm of what they change (Huang & Balestriero 2024, "ALLoRA:
//! Adaptive Learning Rate Mitigates LoRA Fatal Flaws").
//!
//! The gradient of a row w of A or B, as they are stored, is multiplied by 1 / √(‖w‖ + 1/η²). There is no factor of the update unless
//! alpha is given. What is saved is a LoRA adapter.

use std::sync::Arc;

use super::lora::{Lora, like_lora};
use super::method::{Buffer, Entry, Key, Method, Scope};
use super::{Site, TRAINING, Update};
use crate::error::Result;
use crate::json::Fields;
use crate::peft::Target;
use pleach_ir::{UnaryOp, ValueId};
use serde_json::Value;

/// The key of η.
const ETA: &str = "allora_eta";

/// How it is found.
pub(super) const ENTRY: Entry = Entry {
    name: "allora",
    keys: &[("peft_type", Key::Text("LORA")), (TRAINING, Key::Text("allora"))],
    read: |f| Ok(Arc::new(Allora::read(f)?)),
};

/// ALLoRA.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Allora {
    lora: Lora,
    eta: f64,
}

impl Allora {
    /// Reads the method's own fields.
    ///
    /// # Errors
    /// As LoRA's, and an η that is not above zero.
    pub(super) fn read(f: &mut Fields) -> Result<Allora> {
        Ok(Allora { eta: f.positive(ETA)?.unwrap_or(2.0), lora: Lora::read(f)? })
    }
}

impl Method for Allora {
    like_lora!();

    fn name(&self) -> &'static str {
        "allora"
    }

    fn formula(&self) -> &'static str {
        "LoRA with alpha = r; gradients of rows w of A and B times 1/√(‖w‖ + 1/η²)"
    }

    fn attach(&self, _target: &Target) -> std::result::Result<(), String> {
        Ok(())
    }

    fn own_keys(&self) -> &'static [&'static str] {
        &[ETA]
    }

    fn default_alpha(&self, rank: u64) -> f64 {
        rank as f64
    }

    fn update(&self, u: &mut Update) -> Result<()> {
        if !u.part().starts_with("lora_") {
            return Ok(());
        }
        let (w, g, shape) = (u.old()?, u.gradient()?, u.shape().to_vec());
        let square = u.mul(w, w)?;
        let square = u.sum_over(1, square)?;
        let norm = u.unary(UnaryOp::Sqrt, square)?;
        let least = u.number(self.eta.powi(-2))?;
        let sum = u.sum(&[norm, least])?;
        let factor = u.unary(UnaryOp::Rsqrt, sum)?;
        let factor = u.along(0, factor, &shape)?;
        let g = u.mul(g, factor)?;
        u.give("grad", g);
        Ok(())
    }
}
