//! The plan: what a compiled model is, as one file.
//!
//! Holds the types ([`Plan`], [`Entry`], [`Kernel`], [`Param`]), size expressions ([`Expr`]), the encoding
//! ([`Plan::read`], [`Plan::write`]), validation ([`validate`]), the memory planner ([`memory`]) and the generators of random
//! numbers that recipes in plans name ([`random`]). Depends on no other
//! crate of the project, and runs nothing.

mod encode;
mod error;
mod expr;
mod layout;
mod library;
pub mod memory;
mod query;
pub mod random;
mod types;
mod validate;

pub use encode::{FORMAT_VERSION, MAGIC};
pub use error::PlanError;
pub use expr::{Expr, ExprError, MAX_DEPTH};
pub use layout::{BlockFormat, Layout};
pub use library::{ByLibrary, Matrix, Product, Target as ProductTarget};
pub use query::{ALIGN, ArenaLayout, GPU_ALIGN, alignment, arena, arena_within, lifetimes, waves};
pub use types::{
    Blob, BlobKind, Buffer, BufferKind, Check, Choice, DType, Entry, Input, Kernel, Launch, LaunchParam, Loop, Meta,
    Output, Param, Plan, Residency, Role, Source, Step, Symbol, Target, TensorMap, When, Window,
};
pub use validate::validate;
