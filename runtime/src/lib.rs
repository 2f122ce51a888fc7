//! The runtime: loads a plan, finds its weights, runs its entries. This is what programs embed.
//!
//! [`Session`] is the centre: opened once from a [`Plan`](pleach_plan::Plan) and [`Weights`], it runs entries
//! ([`Session::run`]), exchanges adapters ([`Session::load_slot`]) and generates ([`generate`]). Knows nothing of
//! compilers: no IR, no LLVM. `unsafe` is at the borders to memory maps, compiled code and C, each with its reason.

mod ahead;
mod blocks;
pub mod capi;
mod cast;
mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod device;
mod error;
mod fetch;
pub mod files;
mod forms;
mod generate;
mod launch;
mod measure;
mod memory;
mod pack;
mod params;
mod pool;
mod profile;
mod region;
mod run;
mod sample;
mod session;
mod slots;
pub mod train;
mod weights;

pub use blocks::{Blocks, expand, first_difference};
pub use cast::{f16_to_f32, f32_to_bf16};
pub use cpu::{Cpu, check_target};
pub use device::{Address, Device, Make, Work};
pub use error::{Result, RuntimeError};
pub use fetch::{STRETCHES, Window};
pub use forms::{ALTERNATIVES, Alternative, Forms, Timed, measure_forms};
pub use generate::{GenerateParams, Generated, Stats, generate};
pub use launch::{Steps, Wave};
pub use measure::shared_weights;
pub use memory::{Memory, arena_and_scratch, give_back, map_large_blocks, peak_rss, plan_memory};
pub use params::ParamValues;
pub use pleach_plan::random::Philox;
pub use pool::{KernelFn, Launch, Pool};
pub use profile::{KernelTime, Launched, StepTime, TIMELINE};
pub use region::Region;
pub use run::{Output, Outputs, Values};
pub use sample::{Sampling, pick};
pub use session::{Options, Session};
pub use weights::{Files, InMemory, Tensor, TensorSource, Weights, open_weights, random_weights};

pub use pleach_plan as plan;
