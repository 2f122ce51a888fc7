//! KaSA: LoRA in the form of a singular value decomposition, beside a base without its r smallest singular parts (Wang et al. 2024, "KaSA:
//! Knowledge-Aware Singular-Value Adaptation of Large Language Models"), as PEFT has it.
//!
//! y = x · (W − D)ᵀ + s · ((x · Aᵀ) ∘ d) · Bᵀ with D the r smallest singular parts of W; the loss gets β · Σd² + γ · (‖Bᵀ·B − I‖ + ‖A·Aᵀ − I‖)
//! per site, which PEFT leaves to its user (`_get_kasa_loss`). D follows from W, so folders hold A, B and d alone.

use std::sync::Arc;

use faer::Mat;
use pleach_ir::{BinaryOp, Op, UnaryOp, ValueId};
use serde_json::{Value, json};

use super::decompose::{smallest, values};
use super::lora::{Lora, like_lora};
use super::method::{Buffer, Entry, Key, Method, Scope};
use super::prepare::{Given, Values, floats};
use super::{Init, LowRank, Site};
use crate::error::{Error, Result};
use crate::json::Fields;
use crate::peft::Target;

/// The part, and the name in files, of d.
const DIAGONAL: &str = "lora_diag";
/// The parts whose product is D: B [out, r] with the singular values, A [r, in].
const DROPPED: [&str; 2] = ["dropped_B", "dropped_A"];

/// How it is found.
pub(super) const ENTRY: Entry = Entry {
    name: "kasa",
    keys: &[("peft_type", Key::Text("LORA")), ("kasa_config", Key::Object)],
    read: |f| Ok(Arc::new(Kasa::read(f)?)),
};

/// KaSA.
#[derive(Debug, Clone, PartialEq)]
struct Kasa {
    lora: Lora,
    /// Weight of Σd².
    beta: f64,
    /// Weight of the distances from orthonormal factors.
    gamma: f64,
}

impl Kasa {
    fn read(f: &mut Fields) -> Result<Kasa> {
        let (mut beta, mut gamma) = (1e-4, 1e-3);
        if let Some(options) = f.object("kasa_config")? {
            let path = f.path().to_owned();
            let mut o = Fields::new(&path, "kasa_config.", options);
            for (key, value) in [("beta", &mut beta), ("gamma", &mut gamma)] {
                *value = o.number(key)?.unwrap_or(*value);
                if *value < 0.0 {
                    return Err(o.fault(key, "is below zero"));
                }
            }
        }
        let lora = Lora::read_beside(f, "kasa_config")?;
        if let Some(start) = lora.prepared() {
            let what = format!("is set with a start by {}: both change the base", start.name());
            return Err(f.fault("kasa_config", what));
        }
        Ok(Kasa { lora, beta, gamma })
    }
}

impl Method for Kasa {
    like_lora!(except buffers output prepared);

    fn name(&self) -> &'static str {
        "kasa"
    }

    fn formula(&self) -> &'static str {
        "y = x·(W − its r smallest singular parts)ᵀ + s·((x·Aᵀ)∘d)·Bᵀ"
    }

    fn attach(&self, target: &Target) -> std::result::Result<(), String> {
        let most = target.input.min(target.output);
        match () {
            () if target.embedding => Err("is an embedding; KaSA attaches to linear layers only".into()),
            () if target.rank >= most => {
                Err(format!("has {most} singular values, and KaSA drops r = {} of them: lower r", target.rank))
            }
            () => Ok(()),
        }
    }

    fn buffers(&self, site: &Site) -> Vec<Buffer> {
        let mut buffers = self.lora.buffers(site);
        buffers.push(Buffer::trained(DIAGONAL, DIAGONAL, &[site.rank], Init::Normal { std: 1.0 }));
        for (part, shape) in DROPPED.into_iter().zip([[site.output, site.rank], [site.rank, site.input]]) {
            buffers.push(Buffer::frozen(part, None, &shape, Init::Prepared { kept: None }));
        }
        buffers
    }

    fn prepare(&self, given: &Given) -> Result<Values> {
        let found = smallest(given.matrix().as_ref(), given.site.rank as usize)?;
        let b = Mat::from_fn(found.u.nrows(), found.s.len(), |i, k| found.u[(i, k)] * found.s[k]);
        let (rank, site) = (found.s.len() as u64, given.site);
        let b = floats(&[site.output, rank], values(b.as_ref()));
        Ok(Values::from([(DROPPED[0], b), (DROPPED[1], floats(&[rank, site.input], values(found.v.transpose())))]))
    }

    fn weight(&self, s: &mut Scope, weight: ValueId) -> Result<ValueId> {
        let (b, a) = (s.buffer(DROPPED[0])?, s.buffer(DROPPED[1])?);
        let lost = s.matmul(b, false, a, false)?;
        s.push(Op::Binary(BinaryOp::Sub), &[weight, lost])
    }

    fn output(&self, s: &mut Scope, x: ValueId, _weight: ValueId, mut terms: Vec<ValueId>) -> Result<Vec<ValueId>> {
        let (a, b, scale) = (s.buffer("lora_A")?, s.buffer("lora_B")?, s.buffer("scale")?);
        let narrow = s.times(x, a)?;
        let diagonal = s.buffer(DIAGONAL)?;
        let diagonal = s.over_rows(diagonal, narrow)?;
        let narrow = s.mul(narrow, diagonal)?;
        let wide = s.times(narrow, b)?;
        terms.push(s.mul(scale, wide)?);
        Ok(terms)
    }

    fn aux_loss(&self, s: &mut Scope) -> Result<Option<ValueId>> {
        let (a, b, d) = (s.buffer("lora_A")?, s.buffer("lora_B")?, s.buffer(DIAGONAL)?);
        let square = s.mul(d, d)?;
        let square = s.sum_over(0, square)?;
        let beta = s.number(self.beta)?;
        let mut terms = vec![s.mul(beta, square)?];
        let rank = s.site().rank;
        for (x, ta) in [(b, true), (a, false)] {
            let gram = s.matmul(x, ta, x, !ta)?;
            let identity = s.identity(rank)?;
            let off = s.push(Op::Binary(BinaryOp::Sub), &[gram, identity])?;
            let square = s.mul(off, off)?;
            let rows = s.sum_over(1, square)?;
            let sum = s.sum_over(0, rows)?;
            let norm = s.unary(UnaryOp::Sqrt, sum)?;
            let gamma = s.number(self.gamma)?;
            terms.push(s.mul(gamma, norm)?);
        }
        Ok(Some(s.sum(&terms)?))
    }

    fn low_rank(&self, s: &mut Scope) -> Result<Option<LowRank>> {
        let (a, b, d) = (s.buffer("lora_A")?, s.buffer("lora_B")?, s.buffer(DIAGONAL)?);
        let (dropped_b, dropped_a, scale) = (s.buffer(DROPPED[0])?, s.buffer(DROPPED[1])?, s.site().scale);
        if scale == 0.0 {
            return Err(Error::Graph("a scale of zero takes nothing from the base".into()));
        }
        let d = s.over_rows(d, b)?;
        let b = s.mul(b, d)?;
        let lost = s.number(-scale.recip())?;
        let lost = s.mul(dropped_b, lost)?;
        let down = s.push(Op::Concat { axis: 0 }, &[a, dropped_a])?;
        let up = s.push(Op::Concat { axis: 1 }, &[b, lost])?;
        Ok(Some(LowRank { down, up, scale }))
    }

    fn config(&self) -> Vec<(&'static str, Value)> {
        let own = ("kasa_config", json!({"beta": self.beta, "gamma": self.gamma}));
        self.lora.config().into_iter().chain([own]).collect()
    }
}
