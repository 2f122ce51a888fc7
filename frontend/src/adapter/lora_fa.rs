//! LoRA-FA: LoRA with A frozen as it starts, and the gradient of B corrected for that (Zhang et al. 2023, "LoRA-FA: Memory-efficient
//! Low-rank Adaptation for Large Language Models Fine-tuning"), as PEFT's `LoraFAOptimizer` computes it.
//!
//! B gets g · (A·Aᵀ + 10⁻⁸·I)⁻¹ / s², AdamW has ε = 10⁻⁶ added before the second correction, and decay comes after the step. What is
//! saved is a LoRA adapter.

use std::sync::Arc;

use super::lora::{Lora, like_lora};
use super::method::{Buffer, Entry, Key, Method, Scope};
use super::{Event, Init, Moment, Site, TRAINING, Update};
use crate::error::{Error, Result};
use crate::json::Fields;
use crate::peft::Target;
use pleach_ir::{BinaryOp, DType, Role, UnaryOp, ValueId};
use serde_json::Value;

/// The part that holds (A·Aᵀ + 10⁻⁸·I)⁻¹ [r, r].
const INVERSE: &str = "gram_inverse";

/// How it is found.
pub(super) const ENTRY: Entry = Entry {
    name: "lora-fa",
    keys: &[("peft_type", Key::Text("LORA")), (TRAINING, Key::Text("lora-fa"))],
    read: |f| Ok(Arc::new(LoraFa::read(f)?)),
};

/// LoRA-FA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LoraFa {
    lora: Lora,
}

impl LoraFa {
    /// Reads the method's own fields.
    ///
    /// # Errors
    /// As LoRA's.
    pub(super) fn read(f: &mut Fields) -> Result<LoraFa> {
        Ok(LoraFa { lora: Lora::read(f)? })
    }
}

impl Method for LoraFa {
    like_lora!(except buffers);

    fn name(&self) -> &'static str {
        "lora-fa"
    }

    fn formula(&self) -> &'static str {
        "LoRA with A frozen; B's gradient times (A·Aᵀ)⁻¹ / s²"
    }

    fn attach(&self, target: &Target) -> std::result::Result<(), String> {
        match target.embedding {
            true => Err("is an embedding, whose A starts at zero; LoRA-FA keeps A as it starts".into()),
            false => Ok(()),
        }
    }

    fn buffers(&self, site: &Site) -> Vec<Buffer> {
        let mut buffers = self.lora.buffers(site);
        for b in buffers.iter_mut().filter(|b| b.part == "lora_A") {
            b.role = Role::Frozen;
        }
        let shape = vec![site.rank, site.rank];
        buffers.push(Buffer {
            part: INVERSE,
            dtype: DType::F32,
            shape,
            role: Role::Stat,
            file: None,
            init: Init::Zeros {},
        });
        buffers
    }

    fn update(&self, u: &mut Update) -> Result<()> {
        if u.part() == "lora_B" {
            let (g, inverse) = (u.gradient()?, u.buffer(INVERSE)?);
            let g = u.product(g, false, inverse, false)?;
            let factor = u.site().scale.powi(-2);
            let scale = u.number(factor)?;
            let g = u.mul(g, scale)?;
            u.give("grad", g);
        }
        late_decay(u, 1e-6)
    }

    fn has_events(&self) -> bool {
        true
    }

    fn on_step(&self, e: &mut Event) -> Result<()> {
        if e.moment != Moment::Before || e.step != 0 {
            return Ok(());
        }
        for site in e.sites.iter().filter(|s| s.rank > 0) {
            // Weights that are trained whole have no A.
            let Ok(a) = e.read(site, "lora_A") else { continue };
            let inverse = gram_inverse(&a, site.rank as usize)
                .ok_or_else(|| Error::Graph(format!("A of {} has rows without a norm", site.module)))?;
            e.write(site, INVERSE, &inverse)?;
        }
        Ok(())
    }
}

/// AdamW as older releases of transformers have it: ε before the second correction, decay after the step.
pub(super) fn late_decay(u: &mut Update, eps: f64) -> Result<()> {
    let (eps, correction) = (u.number(eps)?, u.setting("correction2")?);
    let root = u.unary(UnaryOp::Sqrt, correction)?;
    let eps = u.binary(BinaryOp::Div, eps, root)?;
    u.give("eps", eps);
    let shape = u.shape().to_vec();
    let change = u.change(&shape)?;
    let old = u.old()?;
    let new = u.binary(BinaryOp::Sub, old, change)?;
    let new = decayed(u, new)?;
    u.give("value", new);
    Ok(())
}

/// x · (1 − lr · decay).
pub(super) fn decayed(u: &mut Update, x: ValueId) -> Result<ValueId> {
    let (lr, decay, one) = (u.setting("lr")?, u.setting("weight_decay")?, u.number(1.0)?);
    let lost = u.mul(lr, decay)?;
    let kept = u.binary(BinaryOp::Sub, one, lost)?;
    u.mul(x, kept)
}

/// (A·Aᵀ + 10⁻⁸·I)⁻¹ for A [r, n], by the Cholesky factor, in f64.
fn gram_inverse(a: &[f32], r: usize) -> Option<Vec<f32>> {
    let n = a.len() / r.max(1);
    let row = |i: usize| &a[i * n..(i + 1) * n];
    let dot = |i: usize, j: usize| row(i).iter().zip(row(j)).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
    let mut l = vec![0.0f64; r * r];
    for i in 0..r {
        for j in 0..=i {
            let known: f64 = (0..j).map(|k| l[i * r + k] * l[j * r + k]).sum();
            let rest = dot(i, j) + if i == j { 1e-8 } else { 0.0 } - known;
            l[i * r + j] = if i == j { rest.sqrt() } else { rest / l[j * r + j] };
        }
        if l[i * r + i].is_nan() || l[i * r + i] <= 0.0 {
            return None;
        }
    }
    let mut out = vec![0.0f32; r * r];
    let mut x = vec![0.0f64; r];
    for column in 0..r {
        for i in 0..r {
            let known: f64 = (0..i).map(|k| l[i * r + k] * x[k]).sum();
            x[i] = (f64::from(u8::from(i == column)) - known) / l[i * r + i];
        }
        for i in (0..r).rev() {
            let known: f64 = (i + 1..r).map(|k| l[k * r + i] * x[k]).sum();
            x[i] = (x[i] - known) / l[i * r + i];
        }
        (0..r).for_each(|i| out[i * r + column] = x[i] as f32);
    }
    Some(out)
}
