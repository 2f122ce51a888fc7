//! All tests of this crate that link LLVM, in one program: linking it takes longer than running it.
#![allow(unsafe_code, reason = "calls compiled kernels")]
#![allow(clippy::print_stderr, reason = "a test that is skipped says so")]

#[path = "all/attention.rs"]
mod attention;
#[path = "all/bodies.rs"]
mod bodies;
#[path = "all/coded.rs"]
mod coded;
#[path = "all/coded_gpu.rs"]
mod coded_gpu;
#[path = "all/contraction.rs"]
mod contraction;
#[path = "all/contraction_types.rs"]
mod contraction_types;
#[path = "all/kit.rs"]
mod kit;
#[path = "all/laid_gpu.rs"]
mod laid_gpu;
#[path = "all/launch.rs"]
mod launch;
#[path = "all/picks.rs"]
mod picks;
#[path = "all/ptx.rs"]
mod ptx;
#[path = "all/ranks.rs"]
mod ranks;
#[path = "all/resources.rs"]
mod resources;
#[path = "all/row.rs"]
mod row;
#[path = "all/row_random.rs"]
mod row_random;
#[path = "all/scatter.rs"]
mod scatter;
#[path = "all/simulated.rs"]
mod simulated;
#[path = "all/toolchain.rs"]
mod toolchain;
#[path = "all/train.rs"]
mod train;
#[path = "all/train_bodies.rs"]
mod train_bodies;
