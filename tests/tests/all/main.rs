//! The tests of functions, in one program, so that LLVM is linked once: what needs it is left out without the feature `llvm`.

mod bf16;
mod chunk;
#[cfg(feature = "llvm")]
mod compiled;
#[cfg(feature = "llvm")]
mod cuda;
#[cfg(feature = "llvm")]
mod gpu;
#[cfg(feature = "llvm")]
mod library;
#[cfg(feature = "llvm")]
mod panels;
mod properties;
mod tidy;
