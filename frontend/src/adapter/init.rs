//! How a buffer of a new adapter starts: recipes, not values, so that a plan can carry them and the trainer can follow them
//! without this crate.
//!
//! Random recipes are drawn from a counter-based generator keyed by (seed, key of the buffer), so a value depends neither on
//! the order of making nor on threads. A recipe names parameters of the base by their path while it is inside this crate and by
//! the checkpoint's tensor in an [`AdapterPlan`](super::AdapterPlan).

use pleach_plan::random::{self, Twister};
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
    /// Ones at the first places, zeros behind them.
    Leading {
        /// How many ones.
        count: u64,
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
    /// Uniform in −bound..bound, by a generator of its own, keyed by this seed and the buffer's key: the same at any time, so it need
    /// not be saved.
    Seeded {
        /// The key.
        seed: u64,
        /// Largest magnitude.
        bound: f32,
    },
    /// The same as PyTorch draws it on the processor after `skip` other numbers, for files that hold the seed alone.
    Twister {
        /// The generator's seed.
        seed: u64,
        /// Numbers before it.
        skip: u64,
        /// Largest magnitude.
        bound: f32,
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
    /// Distinct cells [2, n] of a matrix, row and column, drawn without preference, ascending.
    RandomCells {
        /// Its rows.
        rows: u64,
        /// Its columns.
        columns: u64,
    },
    /// `first` of the numbers below `units`, ascending, and where the buffer holds more, the others behind them, ascending. Drawn without
    /// preference, or those with the largest scores; the smaller number wins a tie.
    Units {
        /// One past the largest number.
        units: u64,
        /// How many are chosen.
        first: u64,
        /// What decides.
        by: Option<Scores>,
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
    /// Made by the method before training, see [`Method::prepare`](super::Method::prepare).
    Prepared {
        /// Name in the file of the first values, where those are saved beside the adapter: the ending behind the module's path in a
        /// method, the whole name in an [`AdapterPlan`](super::AdapterPlan).
        kept: Option<String>,
    },
}

/// How units of coupled layers are compared.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// The weights whose parts count.
    pub weights: Vec<UnitWeight>,
    /// The product of the Euclidean norms of a unit's parts, in place of the norm of all of them.
    pub product: bool,
}

/// Where units lie in a weight [out, in].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UnitWeight {
    /// The weight.
    pub tensor: String,
    /// Whether units are columns rather than rows.
    pub columns: bool,
    /// Rows or columns of one.
    pub width: u64,
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
    /// As a linear layer with this many inputs starts: uniform in ±1/√n.
    pub(crate) fn fan_in(inputs: u64) -> Init {
        Init::Uniform { bound: (inputs as f64).sqrt().recip() as f32 }
    }

    /// The recipe with every name of a parameter of the base replaced.
    pub fn renamed(&self, rename: impl Fn(&str) -> Option<String>) -> Option<Init> {
        let mut init = self.clone();
        match &mut init {
            Init::Base { tensor } | Init::LargestColumns { tensor } | Init::LargestGradientColumns { tensor, .. } => {
                *tensor = rename(tensor)?;
            }
            Init::RowNorms(n) | Init::ColumnNorms(n) => n.weight = rename(&n.weight)?,
            Init::Units { by, .. } => {
                for w in by.iter_mut().flat_map(|s| &mut s.weights) {
                    w.tensor = rename(&w.tensor)?;
                }
            }
            Init::Zeros {}
            | Init::Constant { .. }
            | Init::Leading { .. }
            | Init::Uniform { .. }
            | Init::Normal { .. }
            | Init::Seeded { .. }
            | Init::Twister { .. }
            | Init::RandomCells { .. }
            | Init::Prepared { .. }
            | Init::RandomIndices { .. } => {}
        }
        Some(init)
    }

    /// The values of a recipe that gives the same at any time.
    pub(crate) fn seeded(&self, key: &str, n: usize) -> Option<Vec<f32>> {
        match self {
            Init::Seeded { seed, bound } => Some(random::uniform(*seed, key, n, *bound)),
            Init::Twister { seed, skip, bound } => Some(Twister::new(*seed).uniform(*skip, n, *bound)),
            _ => None,
        }
    }

    /// One past the largest index, per axis, of a recipe for indices that says so.
    pub(crate) fn below(&self) -> Option<Vec<u64>> {
        match self {
            Init::RandomIndices { from } | Init::Units { units: from, .. } => Some(vec![*from]),
            Init::RandomCells { rows, columns } => Some(vec![*rows, *columns]),
            _ => None,
        }
    }
}
