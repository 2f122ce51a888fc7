//! LoRA+: LoRA whose B learns faster than A by a fixed ratio (Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large
//! Models"), with the groups of PEFT's `create_loraplus_optimizer`: biases and norms trained along learn at B's rate, biases without
//! decay. What is saved is a LoRA adapter.

use std::sync::Arc;

use super::lora::{Lora, like_lora};
use super::method::{Buffer, Entry, Key, Method, Scope};
use super::{Site, TRAINING, Update};
use crate::error::Result;
use crate::json::Fields;
use crate::peft::Target;
use pleach_ir::ValueId;
use serde_json::Value;

/// The key of the ratio.
const RATIO: &str = "loraplus_lr_ratio";

/// How it is found.
pub(super) const ENTRY: Entry = Entry {
    name: "lora-plus",
    keys: &[("peft_type", Key::Text("LORA")), (TRAINING, Key::Text("lora-plus"))],
    read: |f| Ok(Arc::new(LoraPlus::read(f)?)),
};

/// LoRA+.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct LoraPlus {
    lora: Lora,
    /// B's rate over A's.
    ratio: f64,
}

impl LoraPlus {
    /// Reads the method's own fields.
    ///
    /// # Errors
    /// As LoRA's, and a ratio that is not above zero.
    pub(super) fn read(f: &mut Fields) -> Result<LoraPlus> {
        Ok(LoraPlus { ratio: f.positive(RATIO)?.unwrap_or(16.0), lora: Lora::read(f)? })
    }
}

impl Method for LoraPlus {
    like_lora!();

    fn name(&self) -> &'static str {
        "lora-plus"
    }

    fn formula(&self) -> &'static str {
        "LoRA; the rate of B is 16 times (loraplus_lr_ratio) that of A"
    }

    fn own_keys(&self) -> &'static [&'static str] {
        &[RATIO]
    }

    fn attach(&self, target: &Target) -> std::result::Result<(), String> {
        match target.embedding {
            true => Err("is an embedding, to which PEFT's LoRA+ gives a rate of its own; leave it out".into()),
            false => Ok(()),
        }
    }

    fn update(&self, u: &mut Update) -> Result<()> {
        let vector = u.shape().len() == 1;
        if u.part() == "lora_B" || vector {
            u.scale_lr(self.ratio)?;
        }
        if u.part() == "bias" { u.no_decay() } else { Ok(()) }
    }
}
