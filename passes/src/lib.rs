//! Every rewrite and analysis on the IR.
//!
//! A pass is one file, one name (kebab-case on the command line) and one function from a graph to a graph
//! ([`PassFn`]); [`manager`] runs a list of them in one loop: dump, run, time, verify. Passes match IR patterns and
//! roles, never the name of a method or of a model, and never look at the values of weights.
//!
//! This crate prints nothing: what a pass has to say comes back in its [`PassReport`].

pub mod canonicalize;
pub mod chunk;
pub mod differentiate;
pub mod error;
pub mod expand;
pub mod extraction;
pub mod fold_params;
pub mod fuse_kernels;
pub mod join;
pub mod manager;
pub mod options;
pub mod order;
pub mod precision;
#[cfg(test)]
mod random_tests;
pub mod recompute;
pub mod rewrite;
#[cfg(test)]
mod testing;
pub mod thin_sums;

pub use error::PassError;
pub use manager::{
    Outcome, Pass, PassFn, PassReport, Pipeline, Report, RuleCount, find, names, passes, run, run_watched,
};
pub use options::{Options, Target};
