//! The one error type of this crate. Every message says what is wrong and what to do.

use pleach_plan::{ExprError, PlanError};

/// Why something was refused or failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RuntimeError {
    /// The plan cannot be read.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A size has no value.
    #[error("{0}")]
    Size(#[from] ExprError),
    /// The operating system refused.
    #[error("{what}: {source}")]
    Io {
        /// File or request.
        what: String,
        /// Its answer.
        source: std::io::Error,
    },
    /// A file with tensors is damaged, or is not what was said.
    #[error("{file}: {why}")]
    File {
        /// Path as given.
        file: String,
        /// What is wrong and what to do.
        why: String,
    },
    /// The weights do not fit the plan.
    #[error("the weights do not fit the plan: {0}")]
    Weights(String),
    /// An adapter does not fit a slot; what was in the slot is unchanged.
    #[error("slot {slot} keeps its adapter, the new one does not fit: {why}")]
    Misfit {
        /// Slot number.
        slot: u32,
        /// Every fault on its own line.
        why: String,
    },
    /// This machine cannot run the plan.
    #[error("this machine cannot run the plan: {0}")]
    Target(String),
    /// The code of the plan cannot be loaded.
    #[error("the plan's code cannot be loaded: {0}; compile the plan again")]
    Code(String),
    /// More was asked for than the session was opened for.
    #[error("{0}")]
    Capacity(String),
    /// A device refused something, or failed.
    #[error("{0}")]
    Device(String),
    /// Inputs of a run are missing, unknown or wrong.
    #[error("{entry}: {why}")]
    Input {
        /// Entry.
        entry: String,
        /// What is wrong.
        why: String,
    },
    /// Values that must be numbers are not.
    #[error("{0}")]
    Values(String),
}

impl RuntimeError {
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> RuntimeError {
        let what = what.into();
        move |source| RuntimeError::Io { what, source }
    }
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, RuntimeError>;
