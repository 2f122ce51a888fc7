//! The intermediate representation: what a model with adapters computes, and how it is cut into kernels.
//!
//! One graph type for every stage. A [`Graph`] owns parameters and [`Entry`]s; an entry is a runnable function: a list
//! of nodes, each one operator with one result, and its roots. [`Entry::push`] infers the result type and is the only
//! way to make a node. The meaning of every operator is written once, in [`interp`]; every other implementation is
//! compared with it. A [`Schedule`] holds the kernels an entry was cut into; a kernel's body is an entry again, so the
//! same interpreter runs it.
//!
//! This crate depends on no other crate of the project.
#![deny(missing_docs)]

pub mod error;
pub mod flat;
pub mod graph;
pub mod infer;
pub mod interp;
pub mod op;
pub mod schedule;
pub mod text;
pub mod types;
pub mod verify;
pub mod view;
pub mod window;

pub use error::IrError;
pub use flat::{FlatPart, flat_parts};
pub use graph::{Entry, Graph, Node, Param, ParamId, Phase, Role, Root, RootKind, Source, ValueId};
pub use op::{AttentionAttrs, AttentionWrt, BinaryOp, Op, ReduceOp, ScatterMode, UnaryOp};
pub use schedule::{
    Arg, BlockFormat, Buffer, BufferId, BufferKind, Class, Kernel, KernelId, Layout, Loop, Schedule, ScheduledEntry,
    Seen, Step,
};
pub use types::{DType, Dim, Sym, TensorType};
