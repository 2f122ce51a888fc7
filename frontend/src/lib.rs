//! Models, adapters and tokenizers from files: Hugging Face folders, GGUF files and PEFT folders.
//!
//! Reads headers and configurations strictly: every tensor of a checkpoint or adapter is matched exactly once, every
//! expected one must be there, and whatever changes the mathematics without being understood is refused by name.
//! Weight values are touched only where a command asks for them (GGUF import, norms of adapter deltas), never while a
//! graph is built.

pub mod adapter;
pub mod blocks;
pub mod chat;
pub mod checkpoint;
pub mod config;
pub mod coupling;
pub mod error;
pub mod gguf;
mod json;
pub mod lower;
pub mod modules;
pub mod nearest;
pub mod peft;
pub mod safetensors;
pub mod tensors;
#[cfg(test)]
mod testing;
pub mod tokenizer;

pub use chat::{ChatInput, ChatTemplate};
pub use checkpoint::Checkpoint;
pub use config::ModelConfig;
pub use error::{Error, Result};
pub use lower::{Import, import};
pub use modules::{Module, ModuleKind, ModuleTable};
pub use peft::Adapter;
pub use tensors::{Dtype, TensorRef, TensorTable};
pub use tokenizer::{TextStream, TextTokenizer, eos_ids};
