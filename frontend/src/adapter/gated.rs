//! LoRA with a gate per rank that shrinks to zero where a rank is not needed: SoRA (Ding et al. 2023, "Sparse Low-rank Adaptation of
//! Pre-trained Language Models") and CoDyRA (Lu et al. 2024, "Adaptive Rank, Reduced Forgetting: Knowledge Retention in Continual Learning
//! Vision-Language Models with Dynamic Rank-Selective LoRA").
//!
//! y += scale · ((x · Aᵀ) ∘ g) · Bᵀ; g [r] starts normal, B at zero. After AdamW's step g becomes what is left of it by a threshold,
//! sign(g) · max(|g| − threshold, 0). Ranks whose gate is zero are left out when the adapter is saved. As in the authors' code SoRA also adds
//! `sparse_lambda` times the mean |g| of all sites to the loss, its threshold is `sparse_lambda_2`, on request rising to `max_lambda` in
//! `lambda_num` equal parts of the run, and its scale alpha / r; CoDyRA has no scale, a threshold of zero for the first `dense_iters` of a
//! run and then one that rises to `max_kappa` in `lambda_num` parts. (Both codes also zero what shrinking left below the threshold.)
//! A finished task is kept by merging.

use std::sync::Arc;

use pleach_ir::{UnaryOp, ValueId};
use serde_json::{Value, json};

use super::low_rank::{Change, DOWN, Middle, UP, down, up};
use super::method::{Buffer, Entry, Key, Method, Scope};
use super::{Event, Init, Moment, RankPattern, SavedRanks, Site, Update};
use crate::error::Result;

/// The part that holds g.
const GATE: &str = "lora_gate";
/// The part that holds the threshold of the step, which all sites share.
const THRESHOLD: &str = "gate_threshold";
/// Keys that only training knows.
const KEYS: [&str; 7] =
    ["sparse_lambda", "sparse_lambda_2", "lambda_schedule", "max_lambda", "lambda_num", "max_kappa", "dense_iters"];

/// How SoRA is found.
pub(super) const SORA: Entry = Entry {
    name: "sora",
    keys: &[("peft_type", Key::Text("SORA"))],
    read: |f| {
        let first = f.number(KEYS[1])?.unwrap_or(3e-4);
        let rises = match f.text(KEYS[2])? {
            None | Some("constant") => false,
            Some("linear") => true,
            Some(other) => return Err(f.fault(KEYS[2], format!("is `{other}`; expected constant or linear"))),
        };
        let last = f.number(KEYS[3])?.unwrap_or(first);
        let parts = if rises { f.count(KEYS[4], 1 << 20)?.unwrap_or(10) } else { 1 };
        let scaled = Some(f.count("r", 1 << 24)?.unwrap_or(8));
        let penalty = f.number(KEYS[0])?.unwrap_or(10.0);
        Ok(Arc::new(Gated { scaled, penalty, dense: 0.0, first, last, parts }))
    },
};

/// How CoDyRA is found.
pub(super) const CODYRA: Entry = Entry {
    name: "codyra",
    keys: &[("peft_type", Key::Text("CODYRA"))],
    read: |f| {
        let (last, dense) = (f.number(KEYS[5])?.unwrap_or(7e-4), f.number(KEYS[6])?.unwrap_or(0.5));
        if !(0.0..=1.0).contains(&dense) {
            return Err(f.fault(KEYS[6], format!("is {dense}; expected a part of the run from 0 to 1")));
        }
        let parts = f.count(KEYS[4], 1 << 20)?.unwrap_or(50);
        Ok(Arc::new(Gated { scaled: None, penalty: 0.0, dense, first: 0.0, last, parts }))
    },
};

/// SoRA and CoDyRA.
#[derive(Debug, Clone, PartialEq)]
struct Gated {
    /// r before ranks were left out, where alpha / r is the scale.
    scaled: Option<u64>,
    /// Times the mean |g|, in the loss.
    penalty: f64,
    /// The part of a run without a threshold.
    dense: f64,
    /// First and last threshold.
    first: f64,
    last: f64,
    /// Steps of the stair between them.
    parts: u64,
}

impl Gated {
    /// The threshold of a step.
    fn threshold(&self, step: u64, steps: u64) -> f64 {
        let dense = (self.dense * steps as f64).ceil() as u64;
        if step < dense {
            return 0.0;
        }
        let part = ((step - dense) * self.parts / (steps - dense).max(1)).min(self.parts - 1);
        let way = if self.parts == 1 { 0.0 } else { part as f64 / (self.parts - 1) as f64 };
        self.first + way * (self.last - self.first)
    }
}

impl Method for Gated {
    fn name(&self) -> &'static str {
        if self.scaled.is_some() { "sora" } else { "codyra" }
    }

    fn formula(&self) -> &'static str {
        match self.scaled {
            Some(_) => {
                "y = x·Wᵀ + alpha/r · ((x·Aᵀ) ∘ g)·Bᵀ, g shrunk by a threshold after every step; ranks with g = 0 left out"
            }
            None => {
                "y = x·Wᵀ + ((x·Aᵀ) ∘ g)·Bᵀ, g shrunk by a rising threshold after every step; ranks with g = 0 left out"
            }
        }
    }

    fn peft_type(&self) -> &'static str {
        if self.scaled.is_some() { "SORA" } else { "CODYRA" }
    }

    fn alpha_key(&self) -> Option<&'static str> {
        self.scaled.map(|_| "lora_alpha")
    }

    fn scale(&self, _rank: u64, alpha: f64) -> f64 {
        self.scaled.map_or(1.0, |r| alpha / r as f64)
    }

    fn has_patterns(&self) -> bool {
        true
    }

    fn own_keys(&self) -> &'static [&'static str] {
        &KEYS
    }

    fn shared(&self, _site: &Site) -> Vec<Buffer> {
        vec![Buffer::changing(THRESHOLD, &[], self.first)]
    }

    fn buffers(&self, site: &Site) -> Vec<Buffer> {
        vec![
            down(site, Init::fan_in(site.input)),
            up(site, Init::Zeros {}),
            Buffer::trained(GATE, GATE, &[site.rank], Init::Normal { std: 1.0 }),
            Buffer::constant("scale", site.scale),
        ]
    }

    fn change(&self, s: &mut Scope) -> Result<Option<Change>> {
        let (down, up, gate, scale) = (s.buffer(DOWN)?, s.buffer(UP)?, s.buffer(GATE)?, s.buffer("scale")?);
        Ok(Some(Change { down, middle: Middle::Vector(gate), up, scale }))
    }

    fn saved_ranks(&self) -> Option<SavedRanks> {
        const ALONG: &[(&str, &[u8])] = &[(DOWN, &[0]), (UP, &[1]), (GATE, &[0])];
        Some(SavedRanks { by: GATE, along: ALONG, pattern: RankPattern::Counts })
    }

    fn aux_loss(&self, s: &mut Scope) -> Result<Option<ValueId>> {
        let all: u64 = s.all_sites().iter().map(|s| s.rank).sum();
        if self.penalty == 0.0 || s.site().rank == 0 {
            return Ok(None);
        }
        let gate = s.buffer(GATE)?;
        let size = s.unary(UnaryOp::Abs, gate)?;
        let sum = s.sum_over(0, size)?;
        let factor = s.number(self.penalty / all as f64)?;
        s.mul(sum, factor).map(Some)
    }

    fn update(&self, u: &mut Update) -> Result<()> {
        if u.part() == GATE {
            u.no_decay()?;
            let (stepped, threshold) = (u.stepped()?, u.buffer(THRESHOLD)?);
            let value = u.shrunk(stepped, threshold)?;
            u.give("value", value);
        }
        Ok(())
    }

    fn has_events(&self) -> bool {
        self.dense > 0.0 || self.parts > 1
    }

    fn on_step(&self, e: &mut Event) -> Result<()> {
        if e.moment == Moment::Before {
            let threshold = self.threshold(e.step, e.steps) as f32;
            e.write_param(&e.shared_name(THRESHOLD), &[threshold])?;
        }
        Ok(())
    }

    fn config(&self) -> Vec<(&'static str, Value)> {
        vec![("bias", json!("none")), ("lora_dropout", json!(0.0))]
    }
}
