//! Kernels as MLIR text. No MLIR library is used here; `crate::mlir` lowers the text.

pub mod func;
pub mod vmath;
