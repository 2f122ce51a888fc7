//! The one error type of this crate.

/// What can be wrong with a plan or a question asked of it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The file cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// Path as given.
        path: String,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// The bytes are no plan, or a damaged one.
    #[error("not a usable plan: {0}; compile it again")]
    Damaged(String),
    /// The plan was written by another format version.
    #[error(
        "the plan has format version {found}, this program reads {expected}; compile it again with this program's version"
    )]
    Version {
        /// In the file.
        found: u32,
        /// What this crate reads.
        expected: u32,
    },
    /// The manifest contradicts itself; every fault on its own line.
    #[error("the plan contradicts itself, compile it again:\n{0}")]
    Invalid(String),
    /// An expression has no value.
    #[error("{0}")]
    Expr(#[from] crate::expr::ExprError),
    /// An entry that the plan does not have.
    #[error("the plan has no entry `{name}`; it has: {have}")]
    NoEntry {
        /// Asked for.
        name: String,
        /// What there is.
        have: String,
    },
}
