//! Kernels to MLIR to host objects or PTX; assembles the plan.

pub mod emit;
mod error;

pub use error::CodegenError;
