//! GGUF files (versions 2 and 3): reading, dequantising, and import into a Hugging Face folder.
//!
//! Format: ggml's `docs/gguf.md`. The reader trusts nothing: counts and lengths are checked against the bytes that are
//! left before anything is allocated.

mod import;
mod quants;
mod reader;
mod tokenizer;

pub use import::{ImportOptions, ImportReport, import_gguf};
pub use quants::GgmlType;
pub use reader::{Gguf, GgufTensor, Metadata};
