//! Full fine-tuning of chosen modules: their parameters are trained as they are.
//!
//! There is no branch; everything goes through what all methods share, modules that are replaced as a whole. The folder is one that
//! PEFT loads: LoRA without a target (`dummy-target-modules` is PEFT's own word for it) and the modules in `modules_to_save`.

use std::sync::Arc;

use serde_json::{Value, json};

use super::Site;
use super::method::{Buffer, Entry, Key, Method};
use crate::peft::Target;

/// `target_modules` of a configuration that targets nothing.
pub(crate) const NO_TARGET: &str = "dummy-target-modules";

/// How it is found.
pub(super) const ENTRY: Entry =
    Entry { name: "full", keys: &[("peft_type", Key::Text("FULL"))], read: |_| Ok(Arc::new(Full)) };

/// Full fine-tuning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Full;

impl Method for Full {
    fn name(&self) -> &'static str {
        "full"
    }

    fn formula(&self) -> &'static str {
        "y = x·Wᵀ, W trained"
    }

    fn peft_type(&self) -> &'static str {
        "LORA"
    }

    fn attach(&self, _target: &Target) -> std::result::Result<(), String> {
        Ok(())
    }

    fn buffers(&self, _site: &Site) -> Vec<Buffer> {
        vec![]
    }

    fn whole(&self) -> bool {
        true
    }

    fn config(&self) -> Vec<(&'static str, Value)> {
        vec![("target_modules", json!(NO_TARGET))]
    }
}
