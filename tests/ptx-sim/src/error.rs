//! What can go wrong: text that is not understood, launches that do not fit a kernel, and faults of running kernels.
//!
//! A fault says where it happened: kernel, line of the PTX text, block and thread.

use thiserror::Error;

/// Every error of this crate.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum SimError {
    /// The text is not PTX that this crate knows.
    #[error("line {line}: {what}")]
    Parse { line: u32, what: String },
    /// A launch that the kernel's declaration does not allow.
    #[error("kernel {kernel}: {what}")]
    Launch { kernel: String, what: String },
    /// The host asked for memory that was never given out, or whose bytes were never written.
    #[error("host access: {0}")]
    Host(String),
    /// A running kernel did something that is not allowed.
    #[error(
        "kernel {kernel}, line {line} `{text}`, block ({}, {}, {}), thread {thread}: {fault}",
        block[0], block[1], block[2]
    )]
    Fault { kernel: String, line: u32, text: String, block: [u32; 3], thread: u32, fault: Box<Fault> },
    /// No warp can go on.
    #[error("kernel {kernel}, block ({}, {}, {}): deadlock\n{report}", block[0], block[1], block[2])]
    Deadlock { kernel: String, block: [u32; 3], report: String },
}

/// What a thread did wrong.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Fault {
    /// Outside every allocation, or across the end of one.
    #[error("{space} access of {bytes} bytes at {address:#x} is out of bounds{near}")]
    OutOfBounds { space: &'static str, address: u64, bytes: u64, near: String },
    /// Not a multiple of what the access needs.
    #[error("{space} access at {address:#x} is not aligned to {align} bytes")]
    Misaligned { space: &'static str, address: u64, align: u64 },
    /// A read of bytes that nobody wrote.
    #[error("{space} read at {address:#x} of bytes that were never written")]
    Uninitialised { space: &'static str, address: u64 },
    /// Two accesses of shared memory, one of them a write, that no barrier orders.
    #[error("race on shared memory at {address:#x}: {mine} here, {other}, and nothing orders the two")]
    Race { address: u64, mine: &'static str, other: String },
    /// Two blocks touch one byte of global memory, one of them writing.
    #[error("blocks {other} and {mine} both access global memory at {address:#x} in one launch, at least one writes")]
    BlockRace { address: u64, mine: u32, other: u32 },
    /// Two threads of a block touch one byte of global memory, one of them writing, that no barrier orders.
    #[error(
        "threads {other} and {mine} of a block both access global memory at {address:#x}, at least one writes, and nothing orders the two"
    )]
    ThreadRace { address: u64, mine: u32, other: u32 },
    /// What ordinary stores wrote is not ordered before an asynchronous read or write without `fence.proxy.async`.
    #[error(
        "asynchronous {what} of shared memory at {address:#x}, written by thread {writer} without fence.proxy.async between the two"
    )]
    Proxy { address: u64, what: &'static str, writer: u32 },
    /// A read through the cache of constant memory (`ld.global.nc`) of bytes that the same launch writes.
    #[error("global memory at {address:#x} is read by ld.global.nc in a launch that writes it")]
    Constant { address: u64 },
    /// A warpgroup product that `wgmma.fence` does not order behind what was done with its registers.
    #[error("a warpgroup product without wgmma.fence: {0}")]
    Unfenced(&'static str),
    /// An instruction touches registers of a product before it waited for it.
    #[error("a register that a warpgroup product under way has {0} is touched")]
    Early(&'static str),
    /// Somebody uses an mbarrier who need not see that it was initialised.
    #[error(
        "the mbarrier at {address:#x} is used by {who}, which need not see its initialisation by thread {by}: {lacks}"
    )]
    Barrier { address: u64, who: String, by: u32, lacks: &'static str },
    /// Lanes are missing at an instruction that all have to execute.
    #[error("barrier divergence: {0}")]
    Divergence(String),
    /// An instruction used in a way that the instruction set leaves undefined, or the `trap` instruction.
    #[error("{0}")]
    Misuse(String),
    /// More instructions than [`crate::Launch::max_steps`].
    #[error("gave up after {0} warp instructions in one block")]
    Endless(u64),
}

impl SimError {
    /// The fault, when a thread caused the error.
    pub fn fault(&self) -> Option<&Fault> {
        match self {
            SimError::Fault { fault, .. } => Some(fault),
            _ => None,
        }
    }
}
