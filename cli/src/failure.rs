//! The one error type of the command line: a message for people and an exit code.
//!
//! Every library error becomes one message; libraries already say what is wrong and what to do. Exit codes: 1 for
//! anything that failed, 2 for a command that asks for the impossible (as the argument parser does).

use std::path::Path;

/// What is printed before the program ends.
#[derive(Debug)]
pub(crate) struct Failure {
    /// One message, possibly several lines.
    pub message: String,
    /// 1 or 2.
    pub code: u8,
}

/// Result of a command.
pub(crate) type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    /// Something failed.
    pub(crate) fn new(message: impl Into<String>) -> Failure {
        Failure { message: message.into(), code: 1 }
    }

    /// The command line contradicts itself or leaves out what is needed.
    pub(crate) fn usage(message: impl Into<String>) -> Failure {
        Failure { message: message.into(), code: 2 }
    }

    /// A file operation that the system refused.
    pub(crate) fn io(action: &str, path: &Path) -> impl FnOnce(std::io::Error) -> Failure {
        let what = format!("cannot {action} {}", path.display());
        move |e| Failure::new(format!("{what}: {e}"))
    }

    /// Puts words before the message.
    pub(crate) fn within(mut self, what: &str) -> Failure {
        self.message = format!("{what}: {}", self.message);
        self
    }
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(e: E) -> Failure {
        Failure::new(e.to_string())
    }
}
