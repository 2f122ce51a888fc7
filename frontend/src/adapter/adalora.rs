//! AdaLoRA: a change of low rank in the form of a singular value decomposition, whose ranks are given to the sites where they count
//! most (Zhang et al. 2023, "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning"), as PEFT's `AdaLoraModel` computes it.
//!
//! y += alpha / init_r · ((x · Aᵀ) ∘ e) · Bᵀ with e [init_r] starting at zero. The loss gains `orth_reg_weight` times the mean of
//! ‖A·Aᵀ − I‖ and ‖Bᵀ·B − I‖ over all sites. Every step measures |value · gradient| of every element, smoothed (`beta1`), and how much that
//! varies (`beta2`); the product, summed over a rank's e and the means of its row of A and column of B, is its score. After steps that are
//! multiples of `deltaT`, from `tinit` until `tfinal` steps before `total_step` (from 0), e of the ranks with the lowest scores of all
//! sites becomes zero, so many that the number of others falls along a cubic from init_r to `target_r` per site. From then on the zeros
//! stay. They are left out when the adapter is saved, and `rank_pattern` says which.

use std::sync::Arc;

use pleach_ir::{UnaryOp, ValueId};
use serde_json::{Value, json};

use super::lora::Lora;
use super::low_rank::{Change, DOWN, Middle, UP};
use super::method::{Buffer, Entry, Key, Method, Scope};
use super::slots::{lowest, orthogonality, sensitivity};
use super::{Event, Init, Moment, RankPattern, SavedRanks, Site, Update};
use crate::error::Result;
use crate::json::Fields;

/// The part, and the name in PEFT's files, of e.
const VALUES: &str = "lora_E";
/// The part that is one for the ranks that may still have a value.
const HELD: &str = "rank_held";
/// The part, common to all sites, that is one while scores are measured.
const MEASURING: &str = "rank_measuring";

/// How it is found.
pub(super) const ENTRY: Entry =
    Entry { name: "adalora", keys: &[("peft_type", Key::Text("ADALORA"))], read: |f| Ok(Arc::new(AdaLora::read(f)?)) };

/// AdaLoRA.
#[derive(Debug, Clone, PartialEq)]
struct AdaLora {
    first: u64,
    target: u64,
    warmup: u64,
    last: u64,
    every: u64,
    betas: [f64; 2],
    penalty: f64,
    /// Steps of the run where none are given.
    total: Option<u64>,
    /// Whether everything starts at random, which is for tests.
    random: bool,
}

impl AdaLora {
    fn read(f: &mut Fields) -> Result<AdaLora> {
        // Its configuration is one of LoRA with more keys; r is none of its own.
        let random = Lora::read(f)?.starts_away();
        f.raw("r");
        let beta = |f: &mut Fields, key: &str| match f.number(key)?.unwrap_or(0.85) {
            b if b > 0.0 && b < 1.0 => Ok(b),
            b => Err(f.fault(key, format!("is {b}; expected a number between 0 and 1"))),
        };
        let a = AdaLora {
            first: f.count("init_r", 1 << 24)?.unwrap_or(12),
            target: f.count("target_r", 1 << 24)?.unwrap_or(8),
            warmup: f.whole("tinit")?.unwrap_or(0),
            last: f.whole("tfinal")?.unwrap_or(0),
            every: f.count("deltaT", 1 << 40)?.unwrap_or(1),
            betas: [beta(f, "beta1")?, beta(f, "beta2")?],
            penalty: f.number("orth_reg_weight")?.unwrap_or(0.5),
            total: f.count("total_step", 1 << 40)?,
            random,
        };
        if a.penalty < 0.0 {
            return Err(f.fault("orth_reg_weight", format!("is {}; expected at least 0", a.penalty)));
        }
        if let Some(total) = a.total
            && a.warmup + a.last >= total
        {
            let what =
                format!("is {total}; it must be more than tinit and tfinal together ({} steps)", a.warmup + a.last);
            return Err(f.fault("total_step", what));
        }
        let flags = |v: &Value| v.as_object().is_none_or(|m| m.values().all(Value::is_array));
        match f.raw("rank_pattern") {
            Some(v) if !flags(v) => {
                Err(f.fault("rank_pattern", "must say of every rank whether it is kept, as PEFT writes it"))
            }
            _ => Ok(a),
        }
    }

    /// How many ranks a site may keep on average after a step, times the number of sites; `None` where a step changes nothing.
    fn budget(&self, step: u64, steps: u64, slots: u64, sites: u64) -> Option<u64> {
        let (from, to) = (self.warmup, self.total.unwrap_or(steps).saturating_sub(self.last));
        if step <= from || step > to || (step != to && !step.is_multiple_of(self.every)) {
            return None;
        }
        let (most, least) = (slots as f64, (self.target * sites) as f64);
        let way = 1.0 - (step - from) as f64 / (to - from) as f64;
        Some(((most - least) * way.powi(3) + least) as u64)
    }
}

impl Method for AdaLora {
    fn name(&self) -> &'static str {
        "adalora"
    }

    fn formula(&self) -> &'static str {
        "y = x·Wᵀ + alpha/init_r · ((x·Aᵀ) ∘ e)·Bᵀ, A and B drawn to orthogonality; e of the least important ranks set to zero"
    }

    fn peft_type(&self) -> &'static str {
        "ADALORA"
    }

    fn rank_key(&self) -> Option<&'static str> {
        Some("init_r")
    }

    fn default_rank(&self) -> u64 {
        12
    }

    fn scale(&self, _rank: u64, alpha: f64) -> f64 {
        let r = self.first as f64;
        if alpha > 0.0 { alpha / (r + 1e-5) } else { r / (r + 1e-5) }
    }

    fn has_patterns(&self) -> bool {
        true
    }

    fn shared(&self, _site: &Site) -> Vec<Buffer> {
        vec![Buffer::changing(MEASURING, &[], 1.0)]
    }

    fn buffers(&self, site: &Site) -> Vec<Buffer> {
        let (factor, values) = match self.random {
            true => (Init::Normal { std: 1.0 }, Init::Normal { std: 1.0 }),
            false => (Init::Normal { std: 0.02 }, Init::Zeros {}),
        };
        vec![
            Buffer::trained(DOWN, DOWN, &[site.rank, site.input], factor.clone()),
            Buffer::trained(VALUES, VALUES, &[site.rank, 1], values),
            Buffer::trained(UP, UP, &[site.output, site.rank], factor),
            Buffer::changing(HELD, &[site.rank], 1.0),
            Buffer::constant("scale", site.scale),
        ]
    }

    fn change(&self, s: &mut Scope) -> Result<Option<Change>> {
        let (down, up, values, scale) = (s.buffer(DOWN)?, s.buffer(UP)?, s.buffer(VALUES)?, s.buffer("scale")?);
        let rank = s.site().rank;
        let values = s.reshape(values, &[rank])?;
        Ok(Some(Change { down, middle: Middle::Vector(values), up, scale }))
    }

    fn saved_ranks(&self) -> Option<SavedRanks> {
        const ALONG: &[(&str, &[u8])] = &[(DOWN, &[0]), (UP, &[1]), (VALUES, &[0])];
        Some(SavedRanks { by: VALUES, along: ALONG, pattern: RankPattern::Flags })
    }

    fn aux_loss(&self, s: &mut Scope) -> Result<Option<ValueId>> {
        orthogonality(s, [DOWN, UP], self.penalty, None)
    }

    fn update(&self, u: &mut Update) -> Result<()> {
        let (part, rank, shape) = (u.part(), u.site().rank, u.shape().to_vec());
        if ![DOWN, UP, VALUES].contains(&part) {
            return Ok(());
        }
        let (value, gradient, measuring) = (u.stepped()?, u.gradient()?, u.buffer(MEASURING)?);
        if part == VALUES {
            let held = u.buffer(HELD)?;
            let held = u.reshape(held, &[rank, 1])?;
            let value = u.mul(value, held)?;
            u.give("value", value);
        }
        let product = u.mul(value, gradient)?;
        let size = u.unary(UnaryOp::Abs, product)?;
        let score = sensitivity(u, &shape, self.betas, size, Some(measuring))?;
        // The mean over what is not the rank.
        let axis = u8::from(part != UP);
        let score = u.sum_over(axis, score)?;
        let count = u.number(1.0 / shape[usize::from(axis)] as f64)?;
        let score = u.mul(score, count)?;
        u.keep("score", &[rank], score)
    }

    fn has_events(&self) -> bool {
        true
    }

    fn on_step(&self, e: &mut Event) -> Result<()> {
        let to = self.total.unwrap_or(e.steps).saturating_sub(self.last);
        if e.moment == Moment::Before {
            return e.write_param(&e.shared_name(MEASURING), &[f32::from(u8::from(e.step < to))]);
        }
        let sites = e.sites_with(VALUES);
        let slots = sites.iter().map(|s| s.rank).sum();
        let Some(budget) = self.budget(e.step, e.steps, slots, sites.len() as u64) else { return Ok(()) };
        if e.moment != Moment::After || budget >= slots {
            return Ok(());
        }
        let mut scores = vec![];
        for s in &sites {
            let mut sum = vec![0.0; s.rank as usize];
            for part in [VALUES, DOWN, UP] {
                sum.iter_mut().zip(e.stat(s, part, "score")?).for_each(|(a, b)| *a += f64::from(b));
            }
            scores.push(sum);
        }
        let out = lowest(&scores, (slots - budget) as usize);
        for (s, out) in sites.iter().zip(out) {
            let mut values = e.read(s, VALUES)?;
            values.iter_mut().zip(&out).filter(|(_, out)| **out).for_each(|(v, _)| *v = 0.0);
            e.write(s, VALUES, &values)?;
            if e.step == to {
                let held: Vec<f32> = out.iter().map(|out| f32::from(u8::from(!out))).collect();
                e.write(s, HELD, &held)?;
            }
        }
        Ok(())
    }

    fn config(&self) -> Vec<(&'static str, Value)> {
        vec![
            ("beta1", json!(self.betas[0])),
            ("beta2", json!(self.betas[1])),
            ("bias", json!("none")),
            ("deltaT", json!(self.every)),
            ("init_lora_weights", json!(!self.random)),
            ("lora_dropout", json!(0.0)),
            ("orth_reg_weight", json!(self.penalty)),
            ("target_r", json!(self.target)),
            ("tfinal", json!(self.last)),
            ("tinit", json!(self.warmup)),
            // PEFT loads no folder without; the smallest that it takes says nothing.
            ("total_step", json!(self.total.unwrap_or(self.warmup + self.last + 1))),
        ]
    }
}
