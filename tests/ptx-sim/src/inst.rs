//! An instruction with its guard and place, and which lanes it needs.

use crate::isa::{Op, PSrc, Src};

/// One instruction of a kernel.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Inst {
    pub(crate) guard: Option<PSrc>,
    pub(crate) op: Op,
    pub(crate) line: u32,
    /// Number of the opcode in [`crate::Kernel`]'s table.
    pub(crate) name: u32,
    pub(crate) collective: Collective,
}

/// Which lanes have to be there before an instruction starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Collective {
    No,
    /// The lanes that a mask operand names.
    Members(Src),
    /// All lanes of the warp that have not ended.
    Warp,
}

impl Op {
    pub(crate) fn collective(&self) -> Collective {
        match self {
            Op::Shfl { members, .. }
            | Op::Vote { members, .. }
            | Op::Redux { members, .. }
            | Op::Elect { members, .. }
            | Op::MatchAny { members, .. }
            | Op::WarpSync { members } => Collective::Members(*members),
            Op::Ldmatrix { .. }
            | Op::Stmatrix { .. }
            | Op::Mma { .. }
            | Op::Setmaxnreg { .. }
            | Op::Bar { .. }
            | Op::BarRed { .. }
            | Op::WgFence
            | Op::WgMma { .. }
            | Op::WgCommit
            | Op::WgWait { .. } => Collective::Warp,
            _ => Collective::No,
        }
    }
}
