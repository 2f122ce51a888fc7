//! A change of low rank, as a method describes it: ΔW = scale · B · M · A with A [r, in], B [out, r] and whatever stands between.
//!
//! From it follow the branch beside a linear layer and the form of LoRA.

use pleach_ir::ValueId;

use super::method::{Buffer, LowRank, Scope};
use super::{Init, Site};
use crate::error::Result;

/// The part, and the beginning of the name in files, of A.
pub(super) const DOWN: &str = "lora_A";
/// The same of B.
pub(super) const UP: &str = "lora_B";

/// M.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Middle {
    /// The identity.
    Nothing,
    /// A diagonal matrix, given as a vector [r].
    Vector(ValueId),
    /// A matrix [r, r].
    Matrix(ValueId),
}

/// ΔW of a site.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    /// A [r, in].
    pub down: ValueId,
    /// M.
    pub middle: Middle,
    /// B [out, r].
    pub up: ValueId,
    /// The scale, f32 [].
    pub scale: ValueId,
}

impl Change {
    /// x · ΔWᵀ for x [T, in].
    pub(super) fn of(&self, s: &mut Scope, x: ValueId) -> Result<ValueId> {
        let narrow = s.times(x, self.down)?;
        let narrow = match self.middle {
            Middle::Nothing => narrow,
            Middle::Vector(m) => {
                let m = s.over_rows(m, narrow)?;
                s.mul(narrow, m)?
            }
            Middle::Matrix(m) => s.times(narrow, m)?,
        };
        let wide = s.times(narrow, self.up)?;
        s.mul(self.scale, wide)
    }

    /// As LoRA: A, and scale · B · M [out, r].
    pub(super) fn as_lora(&self, s: &mut Scope) -> Result<LowRank> {
        let up = match self.middle {
            Middle::Nothing => self.up,
            Middle::Vector(m) => {
                let m = s.over_rows(m, self.up)?;
                s.mul(self.up, m)?
            }
            Middle::Matrix(m) => s.matmul(self.up, false, m, false)?,
        };
        Ok(LowRank { down: self.down, up: s.mul(self.scale, up)?, scale: 1.0 })
    }
}

/// A of a linear layer, as PEFT names it.
pub(super) fn down(site: &Site, init: Init) -> Buffer {
    Buffer::trained(DOWN, "lora_A.weight", &[site.rank, site.input], init)
}

/// B of a linear layer, as PEFT names it.
pub(super) fn up(site: &Site, init: Init) -> Buffer {
    Buffer::trained(UP, "lora_B.weight", &[site.output, site.rank], init)
}
