//! PaCA: r input columns of a weight are trained in place (Woo et al. 2025, "PaCA: Partial Connection Adaptation for
//! Efficient Fine-Tuning").
//!
//! W' = W with its columns I replaced by W[:, I] + scale · D, and y = x · W'ᵀ; D [out, r] starts at zero, scale = alpha / r. This is
//! the form of PEFT 0.22 (`paca_delta`). The authors' files hold the columns themselves, divided by the scale (`paca_w`); they are read
//! as D = paca_w − W[:, I] / scale.

use std::sync::Arc;

use pleach_ir::{DType, Op, Role, ScatterMode, ValueId};
use serde_json::{Value, json};

use super::method::{Buffer, Entry, Key, LowRank, Method, Request, Scope};
use super::{Init, Site};
use crate::error::Result;
use crate::json::Fields;
use crate::peft::Target;

/// Name of the columns' own values in the authors' files, [out, r].
pub(crate) const ABSOLUTE: &str = "paca_w";
/// The part, and the name in PEFT's files, of D.
pub(crate) const DELTA: &str = "paca_delta";
/// The part, and the name in files, of I.
pub(crate) const INDICES: &str = "paca_indices";

/// How the columns of a new adapter are chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Selection {
    Random,
    WeightNorm,
    GradientNorm { batches: u64 },
}

/// How it is found.
pub(super) const ENTRY: Entry =
    Entry { name: "paca", keys: &[("peft_type", Key::Text("PACA"))], read: |f| Ok(Arc::new(Paca::read(f)?)) };

/// PaCA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Paca {
    selection: Selection,
    /// Whether D starts at zero rather than at random, which is for tests.
    zero: bool,
}

impl Paca {
    /// Reads the method's own fields.
    ///
    /// # Errors
    /// A selection that is not known.
    pub(super) fn read(f: &mut Fields) -> Result<Paca> {
        // Ours are stored, and the authors' loop counts its steps itself.
        for key in ["random_seed", "gradient_accumulation_steps", "paca_dropout"] {
            f.raw(key);
        }
        let batches = f.count("calibration_batches", 1 << 20)?.unwrap_or(8);
        let selection = match f.text("selection")?.map(|s| s.replace('-', "_")).as_deref() {
            None | Some("random") => Selection::Random,
            Some("weight_norm") => Selection::WeightNorm,
            Some("gradient_norm") => Selection::GradientNorm { batches },
            Some(other) => {
                let what = format!("is `{other}`; known are random, weight_norm and gradient_norm");
                return Err(f.fault("selection", what));
            }
        };
        Ok(Paca { selection, zero: f.flag("init_weights")?.unwrap_or(true) })
    }
}

impl Method for Paca {
    fn name(&self) -> &'static str {
        "paca"
    }

    fn formula(&self) -> &'static str {
        "y = x·W'ᵀ, W' = W with columns W[:, I] + alpha/r · D"
    }

    fn peft_type(&self) -> &'static str {
        "PACA"
    }

    fn alpha_key(&self) -> Option<&'static str> {
        Some("paca_alpha")
    }

    fn attach(&self, target: &Target) -> std::result::Result<(), String> {
        if target.embedding {
            return Err("is an embedding; PaCA trains columns of linear layers only".into());
        }
        if target.rank > target.input {
            return Err(format!("has {} input columns, fewer than r = {}", target.input, target.rank));
        }
        Ok(())
    }

    fn buffers(&self, site: &Site) -> Vec<Buffer> {
        let tensor = format!("{}.weight", site.module);
        let indices = match self.selection {
            Selection::Random => Init::RandomIndices { from: site.input },
            Selection::WeightNorm => Init::LargestColumns { tensor },
            Selection::GradientNorm { batches } => Init::LargestGradientColumns { tensor, batches },
        };
        let delta = if self.zero { Init::Zeros {} } else { Init::Normal { std: 0.1 } };
        vec![
            Buffer {
                part: INDICES,
                dtype: DType::I32,
                shape: vec![site.rank],
                role: Role::Index,
                file: Some(INDICES),
                init: indices,
            },
            Buffer::trained(DELTA, DELTA, &[site.output, site.rank], delta),
            Buffer::constant("scale", site.scale),
        ]
    }

    fn requests(&self, _site: &Site) -> Vec<Request> {
        match self.selection {
            Selection::GradientNorm { batches } => vec![Request::Gradient { batches }],
            Selection::Random | Selection::WeightNorm => vec![],
        }
    }

    fn weight(&self, s: &mut Scope, weight: ValueId) -> Result<ValueId> {
        let (indices, delta, scale) = (s.buffer(INDICES)?, s.buffer(DELTA)?, s.buffer("scale")?);
        let columns = s.push(Op::Gather { axis: 1 }, &[weight, indices])?;
        let step = s.mul(scale, delta)?;
        let columns = s.sum(&[columns, step])?;
        s.push(Op::Scatter { axis: 1, mode: ScatterMode::Set }, &[weight, indices, columns])
    }

    /// D is B bit for bit, and row k of A picks input column I[k].
    fn low_rank(&self, s: &mut Scope) -> Result<Option<LowRank>> {
        let (indices, up, input) = (s.buffer(INDICES)?, s.buffer(DELTA)?, s.site().input);
        Ok(Some(LowRank { down: s.selector(indices, input)?, up, scale: s.site().scale }))
    }

    fn config(&self) -> Vec<(&'static str, Value)> {
        vec![("init_weights", json!(self.zero)), ("random_seed", Value::Null)]
    }
}
