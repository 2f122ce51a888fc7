//! All tests of this crate that link LLVM, in one program: linking it takes longer than running it.
#![allow(unsafe_code, reason = "calls compiled kernels")]

#[path = "all/kit.rs"]
mod kit;
#[path = "all/toolchain.rs"]
mod toolchain;
