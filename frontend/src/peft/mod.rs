//! PEFT folders: `adapter_config.json` + `adapter_model.safetensors`.
//!
//! [`MethodConfig`] is the configuration, [`match_modules`] decides which modules it attaches to exactly as PEFT does,
//! [`Adapter`] is a folder whose every tensor has been matched, [`check_adapter`] reads the values and reports norms.

mod adapter;
mod check;
mod config;
mod pattern;
mod replaced;
mod targets;

pub use adapter::Adapter;
pub(crate) use adapter::{PREFIX, SHARED};
pub use check::{AdapterReport, SiteReport, check_adapter};
pub use config::{Bias, MethodConfig, NameSpec, Targets};
pub use pattern::Pattern;
pub use targets::{Target, match_modules, preview_targets};
