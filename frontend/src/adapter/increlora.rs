//! IncreLoRA: a change of low rank in the form of a singular value decomposition that starts with few ranks and gets more where they count
//! most (Zhang et al. 2023, "IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning"), after the authors' code.
//!
//! ΔW = alpha / n · B · diag(e) · A with n ranks in use of the r that there is room for, `init_rank` at first, e starting at zero. Every step
//! measures Σ |ΔW ∘ G| / √(in · out) of a site, G the gradient of its whole weight, smoothed (`beta1`), and how much that varies (`beta2`); the
//! product is its score. After steps that are multiples of `incre_interval`, past `init_warmup`, while fewer than `target_rank` ranks
//! per site are in use, the `top_h` sites with the highest scores get `incre_rank_num` more. These were learned in advance: behind the ranks
//! in use as many stand by, A and B trained with e fixed at 10⁻⁵, until all ranks are given. The loss gains `orth_reg_weight` times the
//! mean of ‖A·Aᵀ − I‖ and ‖Bᵀ·B − I‖ (of all ranks together; the code takes them block by block). G takes as much memory as the weight, and
//! a product more, as it does there.

use std::sync::Arc;

use pleach_ir::{UnaryOp, ValueId};
use serde_json::{Value, json};

use super::low_rank::{Change, DOWN, Middle, UP, down, up};
use super::method::{Buffer, Entry, Key, LowRank, Method, Scope};
use super::slots::{by_rank, count, grow_older, highest, hold, in_use, orthogonality, scale_by_count, sensitivity};
use super::{Event, Init, Moment, RankPattern, SavedRanks, Site, Update};
use crate::error::Result;
use crate::json::Fields;

/// The part, and the name in files, of e [r].
const VALUES: &str = "lora_E";
/// The part, and the name in files, that is one for ranks in use.
const USED: &str = "rank_used";
/// The part that is one for ranks that stand by.
const READY: &str = "rank_ready";
/// The parts that count the steps since e, and since A and B of a rank began.
const AGE: &str = "rank_age";
const FACTOR_AGE: &str = "factor_age";
/// The part whose gradient is that of the whole weight [out, in]; always zero.
const PROBE: &str = "probe";
/// e of ranks that stand by.
const SMALL: f64 = 1e-5;
/// Keys that only training knows.
const KEYS: [&str; 9] = [
    "target_rank",
    "init_warmup",
    "incre_interval",
    "top_h",
    "beta1",
    "beta2",
    "orth_reg_weight",
    "incre_rank_num",
    "init_rank",
];

/// How it is found.
pub(super) const ENTRY: Entry = Entry {
    name: "increlora",
    keys: &[("peft_type", Key::Text("INCRELORA"))],
    read: |f| Ok(Arc::new(IncreLora::read(f)?)),
};

/// IncreLoRA.
#[derive(Debug, Clone, PartialEq)]
struct IncreLora {
    first: u64,
    target: u64,
    warmup: u64,
    every: u64,
    sites: u64,
    more: u64,
    betas: [f64; 2],
    penalty: f64,
}

impl IncreLora {
    fn read(f: &mut Fields) -> Result<IncreLora> {
        let target = f.count(KEYS[0], 1 << 20)?.unwrap_or(8);
        let first = f.count(KEYS[8], 1 << 20)?.unwrap_or(1);
        if let Some(r) = f.count("r", 1 << 20)?
            && first > r
        {
            return Err(f.fault(KEYS[8], format!("is {first}, more than there is room for: r = {r}")));
        }
        Ok(IncreLora {
            first,
            target,
            warmup: f.whole(KEYS[1])?.unwrap_or(0),
            every: f.count(KEYS[2], 1 << 40)?.unwrap_or(1),
            sites: f.count(KEYS[3], 1 << 20)?.unwrap_or(1),
            more: f.count(KEYS[7], 1 << 20)?.unwrap_or((target / 2).max(1)),
            betas: [f.number(KEYS[4])?.unwrap_or(0.85), f.number(KEYS[5])?.unwrap_or(0.85)],
            penalty: f.number(KEYS[6])?.unwrap_or(0.1),
        })
    }
}

impl Method for IncreLora {
    fn name(&self) -> &'static str {
        "increlora"
    }

    fn formula(&self) -> &'static str {
        "y = x·Wᵀ + alpha/n · ((x·Aᵀ) ∘ e)·Bᵀ, n ranks growing at the sites where |ΔW ∘ dL/dW| is largest"
    }

    fn peft_type(&self) -> &'static str {
        "INCRELORA"
    }

    fn default_rank(&self) -> u64 {
        self.first + self.more * self.target.div_ceil(self.more) * 2
    }

    fn has_patterns(&self) -> bool {
        true
    }

    fn own_keys(&self) -> &'static [&'static str] {
        &KEYS
    }

    fn buffers(&self, site: &Site) -> Vec<Buffer> {
        let (r, normal) = (site.rank, Init::Normal { std: 0.02 });
        vec![
            down(site, normal.clone()),
            Buffer::trained(VALUES, VALUES, &[r], Init::Zeros {}),
            up(site, normal),
            in_use(USED, site, self.first),
            Buffer::changing(READY, &[r], 0.0),
            Buffer::changing(AGE, &[r], 0.0),
            Buffer::changing(FACTOR_AGE, &[r], 0.0),
            Buffer { file: None, ..Buffer::trained(PROBE, PROBE, &[site.output, site.input], Init::Zeros {}) },
            Buffer::constant("alpha", site.alpha),
        ]
    }

    fn change(&self, s: &mut Scope) -> Result<Option<Change>> {
        let (down, up, alpha) = (s.buffer(DOWN)?, s.buffer(UP)?, s.buffer("alpha")?);
        let (values, used, ready) = (s.buffer(VALUES)?, s.buffer(USED)?, s.buffer(READY)?);
        let small = s.number(SMALL)?;
        let (values, ready) = (s.mul(values, used)?, s.mul(ready, small)?);
        let values = s.sum(&[values, ready])?;
        let scale = scale_by_count(s, alpha, used)?;
        Ok(Some(Change { down, middle: Middle::Vector(values), up, scale }))
    }

    fn output(&self, s: &mut Scope, x: ValueId, _weight: ValueId, mut terms: Vec<ValueId>) -> Result<Vec<ValueId>> {
        if s.site().rank > 0
            && let Some(change) = self.change(s)?
        {
            terms.push(change.of(s, x)?);
        }
        if s.trains() {
            let probe = s.buffer(PROBE)?;
            terms.push(s.times(x, probe)?);
        }
        Ok(terms)
    }

    fn saved_ranks(&self) -> Option<SavedRanks> {
        const ALONG: &[(&str, &[u8])] = &[(DOWN, &[0]), (UP, &[1]), (VALUES, &[0]), (USED, &[0])];
        Some(SavedRanks { by: USED, along: ALONG, pattern: RankPattern::Counts })
    }

    fn aux_loss(&self, s: &mut Scope) -> Result<Option<ValueId>> {
        let (used, ready) = (s.buffer(USED)?, s.buffer(READY)?);
        let mask = s.sum(&[used, ready])?;
        orthogonality(s, [DOWN, UP], self.penalty, Some(mask))
    }

    fn update(&self, u: &mut Update) -> Result<()> {
        match u.part() {
            DOWN => by_rank(u, FACTOR_AGE, 0),
            UP => by_rank(u, FACTOR_AGE, 1),
            PROBE => u.measure(),
            VALUES => {
                by_rank(u, AGE, 0)?;
                let gradient = u.gradient_of(PROBE)?;
                let (input, output) = (u.site().input, u.site().output);
                let Some(change) = self.change(u)? else { return Ok(()) };
                let LowRank { down, up, .. } = change.as_lora(u)?;
                let change = u.product(up, false, down, false)?;
                let product = u.mul(change, gradient)?;
                let size = u.unary(UnaryOp::Abs, product)?;
                let sum = u.sum_over(1, size)?;
                let sum = u.sum_over(0, sum)?;
                let factor = u.number(((input * output) as f64).sqrt().recip())?;
                let score = u.mul(sum, factor)?;
                let score = sensitivity(u, &[], self.betas, score, None)?;
                u.keep("score", &[], score)
            }
            _ => Ok(()),
        }
    }

    fn has_events(&self) -> bool {
        true
    }

    fn on_step(&self, e: &mut Event) -> Result<()> {
        let sites = e.sites_with(USED);
        let mut used = vec![];
        for s in &sites {
            used.push(count(e, s, USED)?);
        }
        if e.moment == Moment::Before {
            for (s, used) in sites.iter().zip(&used) {
                let begun = used + count(e, s, READY)?;
                grow_older(e, s, AGE, *used)?;
                grow_older(e, s, FACTOR_AGE, begun)?;
            }
            return Ok(());
        }
        let wanted = self.target * sites.len() as u64;
        let total: u64 = used.iter().sum();
        let grows = total < wanted && e.step > self.warmup && e.step.is_multiple_of(self.every);
        if e.moment != Moment::After || !(grows || e.step == 0) {
            return Ok(());
        }
        let mut growing = vec![false; sites.len()];
        if grows {
            let mut scores = vec![];
            for s in &sites {
                scores.extend(e.stat(s, VALUES, "score")?.first().map(|x| f64::from(*x)));
            }
            growing = highest(&scores, self.sites.min(wanted - total) as usize);
        }
        for ((s, used), grows) in sites.iter().zip(&mut used).zip(&growing) {
            let more = (*used + self.more).min(s.rank);
            if *grows && more > *used {
                let mut values = e.read(s, VALUES)?;
                values[*used as usize..more as usize].fill(SMALL as f32);
                e.write(s, VALUES, &values)?;
                hold(e, s, USED, 0..more)?;
                *used = more;
            }
        }
        let done = used.iter().sum::<u64>() >= wanted;
        for (s, used) in sites.iter().zip(&used) {
            let to = if done { *used } else { (used + self.more).min(s.rank) };
            hold(e, s, READY, *used..to)?;
        }
        Ok(())
    }

    fn config(&self) -> Vec<(&'static str, Value)> {
        vec![("bias", json!("none")), ("lora_dropout", json!(0.0))]
    }
}
