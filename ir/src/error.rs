//! Errors of this crate.

use thiserror::Error;

/// What can be wrong with a graph or its text.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum IrError {
    /// Operands do not fit the operator. `types` lists the operands' types in order.
    #[error("{op}: {why} (operands: {types})")]
    Shape {
        /// Mnemonic.
        op: String,
        /// The operands' types.
        types: String,
        /// The rule that is broken.
        why: String,
    },
    /// The text form does not parse.
    #[error("line {line}, column {column}: {why}")]
    Parse {
        /// 1-based line.
        line: usize,
        /// 1-based column.
        column: usize,
        /// What was expected.
        why: String,
    },
    /// The verifier found faults; every one is listed under its line.
    #[error("{0}")]
    Verify(String),
    /// The interpreter cannot run this input.
    #[error("interpret: {0}")]
    Interpret(String),
    /// A schedule or kernel breaks a rule.
    #[error("schedule: {0}")]
    Schedule(String),
}
