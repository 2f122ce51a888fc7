//! LoRA-SB: between two fixed factors only an r × r matrix is trained, and all three start as the best approximation of the first step of
//! full training (Ponkshe et al. 2024, "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank
//! Fine-Tuning"), as the authors' code has it.
//!
//! y = x · Wᵀ + s · ((x · Aᵀ) · Rᵀ) · Bᵀ. AdamW's first step is about −η · sign(G), G the sum of dL/dW over batches; with U · Σ · Vᵀ its r leading
//! singular parts, B = U, A = Vᵀ, R = Σ / s. The base stays as it is, so a new adapter has already made that step.

use std::sync::Arc;

use faer::Mat;
use pleach_ir::ValueId;
use serde_json::Value;

use super::decompose::{leading, values};
use super::method::{Buffer, Entry, Key, Method, Request, Scope, linear_only};
use super::prepare::{Given, Values, floats};
use super::start::Batches;
use super::{Init, LowRank, Site};
use crate::error::Result;
use crate::json::Fields;
use crate::peft::Target;

/// The key of η.
const STEP: &str = "initial_step";
/// The part, and the name in files, of R.
const CORE: &str = "lora_R";

/// How it is found.
pub(super) const ENTRY: Entry = Entry { name: "lora-sb", keys: &[("peft_type", Key::Text("LORA_SB"))], read };

fn read(f: &mut Fields) -> Result<Arc<dyn Method>> {
    Ok(Arc::new(LoraSb { step: f.positive(STEP)?.unwrap_or(2e-4), batches: Batches::read(f, 2)? }))
}

/// LoRA-SB.
#[derive(Debug, Clone)]
struct LoraSb {
    /// η.
    step: f64,
    batches: Batches,
}

impl Method for LoraSb {
    fn name(&self) -> &'static str {
        "lora-sb"
    }

    fn formula(&self) -> &'static str {
        "y = x·Wᵀ + s·((x·Aᵀ)·Rᵀ)·Bᵀ, only R trained; s·B·R·A starts as −η·sign(dL/dW) cut to rank r"
    }

    fn peft_type(&self) -> &'static str {
        "LORA_SB"
    }

    fn attach(&self, target: &Target) -> std::result::Result<(), String> {
        linear_only(target)?;
        let most = target.input.min(target.output);
        if target.rank > most {
            return Err(format!("has {most} singular values, fewer than r = {}", target.rank));
        }
        Ok(())
    }

    fn buffers(&self, site: &Site) -> Vec<Buffer> {
        let (r, prepared) = (site.rank, || Init::Prepared { kept: None });
        vec![
            Buffer::frozen("lora_A", Some("lora_A.weight"), &[r, site.input], prepared()),
            Buffer::trained(CORE, CORE, &[r, r], prepared()),
            Buffer::frozen("lora_B", Some("lora_B.weight"), &[site.output, r], prepared()),
            Buffer::constant("scale", site.scale),
        ]
    }

    fn requests(&self, _site: &Site) -> Vec<Request> {
        vec![Request::Gradient { batches: self.batches.0 }]
    }

    fn prepare(&self, given: &Given) -> Result<Values> {
        let (g, site) = (given.gradient()?, given.site);
        let step = Mat::from_fn(g.nrows(), g.ncols(), |i, j| match g[(i, j)] {
            0.0 => 0.0,
            x => -self.step * x.signum(),
        });
        let found = leading(step.as_ref(), site.rank as usize)?;
        let r = site.rank as usize;
        let core = Mat::from_fn(r, r, |i, j| if i == j { found.s[i] / site.scale } else { 0.0 });
        Ok(Values::from([
            ("lora_A", floats(&[site.rank, site.input], values(found.v.transpose()))),
            (CORE, floats(&[site.rank, site.rank], values(core.as_ref()))),
            ("lora_B", floats(&[site.output, site.rank], values(found.u.as_ref()))),
        ]))
    }

    fn output(&self, s: &mut Scope, x: ValueId, _weight: ValueId, mut terms: Vec<ValueId>) -> Result<Vec<ValueId>> {
        let (a, core, b) = (s.buffer("lora_A")?, s.buffer(CORE)?, s.buffer("lora_B")?);
        let narrow = s.times(x, a)?;
        let mixed = s.times(narrow, core)?;
        let wide = s.times(mixed, b)?;
        let scale = s.buffer("scale")?;
        terms.push(s.mul(scale, wide)?);
        Ok(terms)
    }

    fn low_rank(&self, s: &mut Scope) -> Result<Option<LowRank>> {
        let (down, core, b) = (s.buffer("lora_A")?, s.buffer(CORE)?, s.buffer("lora_B")?);
        Ok(Some(LowRank { down, up: s.matmul(b, false, core, false)?, scale: s.site().scale }))
    }

    fn own_keys(&self) -> &'static [&'static str] {
        &[STEP]
    }

    fn config(&self) -> Vec<(&'static str, Value)> {
        vec![]
    }
}
