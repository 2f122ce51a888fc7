//! Errors of the code generator.

/// Why a kernel could not be compiled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodegenError {
    /// The kernel holds something that this target or class has no code for.
    #[error("kernel {kernel}: {why}")]
    Unsupported {
        /// Symbol of the kernel.
        kernel: String,
        /// What, and what would be accepted.
        why: String,
    },
    /// MLIR or LLVM refused a text. `why` holds its diagnostics, with line and column of the text.
    #[error("{stage} failed: {why}")]
    Lowering {
        /// `parse`, `lowering`, `translation`, `target`, `emission`.
        stage: &'static str,
        /// The diagnostics.
        why: String,
    },
    /// The linker is missing or refused the objects.
    #[error("linking failed: {why}")]
    Link {
        /// What the linker said.
        why: String,
    },
    /// The assembled plan breaks a rule of its own format.
    #[error("the assembled plan is invalid: {0}")]
    Plan(String),
}
