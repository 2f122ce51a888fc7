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
}
