//! A stand-in for the NVIDIA driver: the functions of `libcuda` that the runtime calls, executed on the CPU by the PTX simulator. The same
//! file is a stand-in for cuBLASLt, where `PLEACH_CUBLASLT_LIBRARY` names it too: its products are plain loops.
//!
//! Test equipment: never shipped, and loaded only where `PLEACH_CUDA_LIBRARY` names it. What it does not know is an error, never a
//! silent success: a function that is missing here is missing for the caller, and unknown flags are refused.
//!
//! Work is done as late as the driver may do it: when the host waits for it. So a buffer that is used again too early, or a
//! result that is read without waiting, gives wrong numbers here. Every access of a kernel is checked, a fault is printed and the
//! context is lost, as with the driver.
//!
//! `PLEACH_FAKE_CUDA` sets properties, comma separated: `sm=9.0`, `memory=BYTES`, `driver=12.4`, `order=at-once`, `checks=off`,
//! `fail=FUNCTION@N:CODE` (the Nth call of a function gives that error), `log=FILE` (a line for every graph and launch),
//! `devices=0`, `time=PART:MICROSECONDS` (events go by a clock on which a launch takes this long if its function's name has that part,
//! and 10 µs if no property names it; a product by the library is called `cublaslt`).
#![allow(unsafe_code)]

#[macro_use]
mod api;
mod cublaslt;
mod graphs;
mod maps;
mod properties;
mod state;

pub use properties::VARIABLE;

/// Where cargo puts the library: beside the test programs of this build.
pub fn library() -> std::path::PathBuf {
    let program = std::env::current_exe().unwrap_or_default();
    let name = "libpleach_fake_cuda.so";
    let folder = program.parent().unwrap_or(std::path::Path::new("."));
    let here = folder.join(name);
    if here.is_file() { here } else { folder.join("deps").join(name) }
}
