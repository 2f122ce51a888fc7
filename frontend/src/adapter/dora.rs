//! DoRA: LoRA whose weight is split into magnitude and direction (Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank
//! Adaptation"), as PEFT computes it.
//!
//! y = g ∘ (x · Wᵀ + scale · (x · Aᵀ) · Bᵀ) + bias with g = m / ‖W + scale · B · A‖, one norm per output. The norm carries no gradient
//! (section 4.3 of the paper). The magnitude m starts as that norm, so a new adapter changes nothing.

use std::sync::Arc;

use pleach_ir::{BinaryOp, Op, ReduceOp, UnaryOp, ValueId};
use serde_json::{Value, json};

use super::init::Norms;
use super::lora::{self, Lora};
use super::method::{Buffer, Entry, Key, Method, Scope};
use super::{Init, Site};
use crate::error::Result;
use crate::json::Fields;
use crate::peft::Target;

/// How it is found.
pub(super) const ENTRY: Entry = Entry {
    name: "dora",
    keys: &[("peft_type", Key::Text("LORA")), ("use_dora", Key::On)],
    read: |f| Ok(Arc::new(Dora::read(f)?)),
};

/// DoRA, over LoRA or rsLoRA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Dora {
    lora: Lora,
}

impl Dora {
    /// Reads the method's own fields.
    ///
    /// # Errors
    /// As LoRA's.
    pub(super) fn read(f: &mut Fields) -> Result<Dora> {
        let lora = Lora::read(f)?;
        if let Some(start) = lora.prepared() {
            let what = format!("is set with a start by {}, which DoRA is not combined with", start.name());
            return Err(f.fault("use_dora", what));
        }
        Ok(Dora { lora })
    }
}

impl Method for Dora {
    fn name(&self) -> &'static str {
        "dora"
    }

    fn formula(&self) -> &'static str {
        "y = m/‖W + s·B·A‖ ∘ (x·Wᵀ + s·(x·Aᵀ)·Bᵀ)"
    }

    fn peft_type(&self) -> &'static str {
        self.lora.peft_type()
    }

    fn scale(&self, rank: u64, alpha: f64) -> f64 {
        self.lora.scale(rank, alpha)
    }

    fn attach(&self, _target: &Target) -> std::result::Result<(), String> {
        Ok(())
    }

    fn buffers(&self, site: &Site) -> Vec<Buffer> {
        let key = |part: &str| self.lora.starts_away().then(|| format!("{}.{part}", site.module));
        let norms = Norms {
            weight: format!("{}.weight", site.module),
            a: key("lora_A"),
            b: key("lora_B"),
            scale: key("scale"),
        };
        let init = if site.embedding { Init::ColumnNorms(norms) } else { Init::RowNorms(norms) };
        let mut buffers = self.lora.buffers(site);
        buffers.push(Buffer::trained("lora_magnitude_vector", "lora_magnitude_vector", &[site.output], init));
        buffers
    }

    fn output(&self, s: &mut Scope, x: ValueId, weight: ValueId, mut terms: Vec<ValueId>) -> Result<Vec<ValueId>> {
        terms.push(lora::branch(s, x)?);
        let sum = s.sum(&terms)?;
        let gain = gain(s, weight)?;
        let gain = s.over_rows(gain, sum)?;
        Ok(vec![s.mul(gain, sum)?])
    }

    fn check_training(&self) -> std::result::Result<(), (&'static str, String)> {
        self.lora.check_training()
    }

    fn config(&self) -> Vec<(&'static str, Value)> {
        let dora = |(key, value)| if key == "use_dora" { (key, json!(true)) } else { (key, value) };
        self.lora.config().into_iter().map(dora).collect()
    }
}

/// m / ‖W + scale · B · A‖, one number per output [out].
fn gain(s: &mut Scope, weight: ValueId) -> Result<ValueId> {
    let (a, b, scale) = (s.buffer("lora_A")?, s.buffer("lora_B")?, s.buffer("scale")?);
    // A table [rows, width] takes the product turned round, and its outputs are columns.
    let embedding = s.site().embedding;
    let delta = match embedding {
        true => s.push(Op::MatMul { ta: true, tb: true }, &[a, b])?,
        false => s.push(Op::MatMul { ta: false, tb: false }, &[b, a])?,
    };
    let delta = s.mul(scale, delta)?;
    let whole = s.sum(&[weight, delta])?;
    let square = s.mul(whole, whole)?;
    let square = s.push(Op::Reduce { op: ReduceOp::Sum, axis: u8::from(!embedding) }, &[square])?;
    let norm = s.push(Op::Unary(UnaryOp::Sqrt), &[square])?;
    let norm = s.push(Op::StopGradient, &[norm])?;
    let magnitude = s.buffer("lora_magnitude_vector")?;
    s.push(Op::Binary(BinaryOp::Div), &[magnitude, norm])
}
