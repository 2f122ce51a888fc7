//! The one error type of this crate.
//!
//! Every message names the file, the key or tensor at fault and, where there is one, the way out. Nothing here
//! prints; callers decide how to show it.

use std::path::{Path, PathBuf};

/// What can go wrong while reading models, adapters and tokenizers.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused an operation.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// Verb phrase, such as "read".
        action: &'static str,
        /// The file or folder concerned.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file or folder does not have the format it should have.
    #[error("{}: {what}", path.display())]
    Format {
        /// The file or folder concerned.
        path: PathBuf,
        /// What is wrong and what to do.
        what: String,
    },
    /// A key of a configuration is missing, out of range, or asks for something that is not supported.
    #[error("{}: `{key}` {what}", path.display())]
    Key {
        /// The configuration file.
        path: PathBuf,
        /// The key, dotted when nested.
        key: String,
        /// What is wrong and what to do.
        what: String,
    },
    /// A tensor is missing, unexpected, or has the wrong shape or type.
    #[error("{}: tensor `{tensor}` {what}", path.display())]
    Tensor {
        /// The file or folder that should hold it.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// What is wrong and what to do.
        what: String,
    },
    /// A pattern (`target_modules`, `rank_pattern`, …) cannot be used.
    #[error("pattern `{pattern}`: {what}")]
    Pattern {
        /// The pattern as written.
        pattern: String,
        /// What is wrong and what to do.
        what: String,
    },
    /// Text could not be turned into token ids, or back, or a chat template failed.
    #[error("{0}")]
    Text(String),
    /// A graph could not be built; the inner message names operator and types.
    #[error("building the graph: {0}")]
    Graph(String),
}

impl Error {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.to_owned();
        move |source| Error::Io { action, path, source }
    }

    pub(crate) fn format(path: &Path, what: impl Into<String>) -> Error {
        Error::Format { path: path.to_owned(), what: what.into() }
    }

    pub(crate) fn key(path: &Path, key: impl Into<String>, what: impl Into<String>) -> Error {
        Error::Key { path: path.to_owned(), key: key.into(), what: what.into() }
    }

    pub(crate) fn tensor(path: &Path, tensor: impl Into<String>, what: impl Into<String>) -> Error {
        Error::Tensor { path: path.to_owned(), tensor: tensor.into(), what: what.into() }
    }
}

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
