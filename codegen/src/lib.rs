//! Kernels to MLIR to host objects or PTX; assembles the plan.

pub mod compile;
pub mod emit;
mod error;
pub mod estimate;
pub mod link;
pub mod mlir;
pub mod ptxas;

pub use error::CodegenError;
pub use mlir::HostTarget;
