//! Errors of this crate.

use pleach_ir::IrError;
use thiserror::Error;

/// Why a pass did not run or did not finish.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum PassError {
    /// A pass name on the command line that no pass has.
    #[error("there is no pass `{name}`; known passes: {known}")]
    UnknownPass {
        /// The name asked for.
        name: String,
        /// Every known name, comma-separated.
        known: String,
    },
    /// A rewrite rule to disable that does not exist.
    #[error("there is no rewrite rule `{name}`; known rules: {known}")]
    UnknownRule {
        /// The name asked for.
        name: String,
        /// Every known name, comma-separated.
        known: String,
    },
    /// A pass built a node that does not type-check: a fault of the pass.
    #[error("pass {pass}: entry {entry}: {source}")]
    Build {
        /// Name of the pass.
        pass: String,
        /// Entry it worked on.
        entry: String,
        /// The shape fault.
        source: IrError,
    },
    /// The graph after a pass does not verify: a fault of the pass.
    #[error("the graph is not valid after pass {pass}; this is a fault of the pass\n{source}")]
    Verify {
        /// Name of the pass.
        pass: String,
        /// What the verifier said.
        source: IrError,
    },
    /// The graph given to the manager does not verify.
    #[error("the graph is not valid\n{0}")]
    Input(IrError),
    /// Anything else a pass refuses.
    #[error("pass {pass}: {why}")]
    Refused {
        /// Name of the pass.
        pass: String,
        /// What it cannot do and what would help.
        why: String,
    },
}

impl PassError {
    /// A [`PassError::Build`] for `map_err`.
    pub fn build(pass: &str, entry: &str) -> impl FnOnce(IrError) -> PassError {
        let (pass, entry) = (pass.to_string(), entry.to_string());
        move |source| PassError::Build { pass, entry, source }
    }
}
