//! How a buffer of a new adapter starts: recipes, not values, so that a plan can carry them and the trainer can follow them
//! without this crate.
//!
//! Random recipes are drawn from a counter-based generator keyed by (seed, key of the buffer), so a value depends neither on
//! the order of making nor on threads. A recipe names parameters of the base by their path while it is inside this crate and by
//! the checkpoint's tensor in an [`AdapterPlan`](super::AdapterPlan).

use serde::{Deserialize, Serialize};

/// The initial value of one buffer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Init {
    /// All zero.
    Zeros {},
    /// One value everywhere.
    Constant {
        /// The value.
        value: f32,
    },
    /// Uniform in −bound..bound.
    Uniform {
        /// Largest magnitude.
        bound: f32,
    },
    /// Normal with mean zero.
    Normal {
        /// Standard deviation.
        std: f32,
    },
    /// The base model's own tensor, as f32.
    Base {
        /// The tensor.
        tensor: String,
    },
    /// The Euclidean norm of every row of W + scale · B · A (of W where `a` is absent).
    RowNorms(Norms),
    /// The same of every column of W + scale · (B · A)ᵀ, for tables whose rows are looked up.
    ColumnNorms(Norms),
    /// As many distinct indices below `from` as the buffer holds, drawn without preference, ascending.
    RandomIndices {
        /// One past the largest index.
        from: u64,
    },
    /// The columns of a weight [out, in] with the largest Euclidean norm, ascending; the smaller index wins a tie.
    LargestColumns {
        /// The weight.
        tensor: String,
    },
    /// The same of the weight's gradient, summed over calibration batches.
    LargestGradientColumns {
        /// The weight.
        tensor: String,
        /// Batches to look at.
        batches: u64,
    },
}

/// What [`Init::RowNorms`] and [`Init::ColumnNorms`] measure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Norms {
    /// W.
    pub weight: String,
    /// Key of A [r, in] in the slot; absent where the product starts at zero.
    pub a: Option<String>,
    /// Key of B [out, r] in the slot.
    pub b: Option<String>,
    /// Key of the factor in the slot.
    pub scale: Option<String>,
}

impl Init {
    /// The recipe with every name of a parameter of the base replaced.
    pub fn renamed(&self, rename: impl Fn(&str) -> Option<String>) -> Option<Init> {
        let mut init = self.clone();
        match &mut init {
            Init::Base { tensor } | Init::LargestColumns { tensor } | Init::LargestGradientColumns { tensor, .. } => {
                *tensor = rename(tensor)?;
            }
            Init::RowNorms(n) | Init::ColumnNorms(n) => n.weight = rename(&n.weight)?,
            Init::Zeros {}
            | Init::Constant { .. }
            | Init::Uniform { .. }
            | Init::Normal { .. }
            | Init::RandomIndices { .. } => {}
        }
        Some(init)
    }
}
