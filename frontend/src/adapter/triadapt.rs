//! TriAdaptLoRA: a middle matrix of two triangles between the factors of LoRA, and ranks that grow where it grows (Liang et al. 2025,
//! "TriAdaptLoRA: Brain-Inspired Triangular Adaptive Low-Rank Adaptation for Parameter-Efficient Fine-Tuning"), after the authors' code.
//!
//! ΔW = alpha / n · B · (L + U) · A with n ranks in use of the r that there is room for; L is lower and U upper triangular in blocks: the
//! first `init_rank` ranks, then every `incre_rank_num` that come together. After steps that are multiples of `incre_interval`, past
//! `init_warmup`, while fewer than `target_total_rank` ranks are in use (`reference_rank` per site): the score of a site is how much
//! ‖L + U‖ over the number of its blocks has grown since the last time, and the sites with the highest scores get a block each, as many
//! as the part of the run that is over makes of the ranks that are missing (`rank_growth_model` linear; non-linear: its exponential). The
//! loss gains `orth_reg_weight` times the mean of ‖A·Aᵀ − I‖ and ‖Bᵀ·B − I‖. New ranks change nothing: their columns of B and U are zero;
//! rows of A and L start normal (0.02). (The authors' code starts all but A at zero, which gives no gradient at all.)

use std::sync::Arc;

use pleach_ir::{BinaryOp, DType, Dim, Op, UnaryOp, ValueId};
use serde_json::{Value, json};

use super::low_rank::{Change, DOWN, Middle, UP, down, up};
use super::method::{Buffer, Entry, Key, Method, Scope};
use super::slots::{by_rank, count, grow_older, highest, hold, in_use, orthogonality, scale_by_count};
use super::{Event, Init, Moment, RankPattern, SavedRanks, Site, Update};
use crate::error::Result;
use crate::json::Fields;

/// The parts, and the names in files, of L and U [r, r].
const LOWER: &str = "lora_C_row";
const UPPER: &str = "lora_C_col";
/// The part, and the name in files, that is one for ranks in use.
const USED: &str = "rank_used";
/// The part that counts the steps since a rank came into use.
const AGE: &str = "rank_age";
/// The part that holds the last ‖L + U‖ over the number of blocks.
const BEFORE: &str = "norm_before";
/// Keys that only training knows.
const KEYS: [&str; 7] = [
    "reference_rank",
    "init_warmup",
    "incre_interval",
    "orth_reg_weight",
    "rank_growth_model",
    "total_step",
    "target_total_rank",
];

/// How it is found.
pub(super) const ENTRY: Entry = Entry {
    name: "triadaptlora",
    keys: &[("peft_type", Key::Text("TRIADAPTLORA"))],
    read: |f| Ok(Arc::new(TriAdapt::read(f)?)),
};

/// TriAdaptLoRA.
#[derive(Debug, Clone, PartialEq)]
struct TriAdapt {
    first: u64,
    block: u64,
    reference: u64,
    warmup: u64,
    every: u64,
    penalty: f64,
    linear: bool,
    steps: Option<u64>,
    target: Option<u64>,
}

impl TriAdapt {
    fn read(f: &mut Fields) -> Result<TriAdapt> {
        let reference = f.count(KEYS[0], 1 << 20)?.unwrap_or(8);
        let first = f.count("init_rank", 1 << 20)?.unwrap_or(1);
        if let Some(r) = f.count("r", 1 << 20)?
            && first > r
        {
            return Err(f.fault("init_rank", format!("is {first}, more than there is room for: r = {r}")));
        }
        let linear = match f.text(KEYS[4])? {
            None | Some("linear") => true,
            Some("non-linear") => false,
            Some(other) => return Err(f.fault(KEYS[4], format!("is `{other}`; expected linear or non-linear"))),
        };
        Ok(TriAdapt {
            first,
            block: f.count("incre_rank_num", 1 << 20)?.unwrap_or((reference / 2).max(1)),
            reference,
            warmup: f.whole(KEYS[1])?.unwrap_or(0),
            every: f.count(KEYS[2], 1 << 40)?.unwrap_or(1),
            penalty: f.number(KEYS[3])?.unwrap_or(0.5),
            linear,
            steps: f.count(KEYS[5], 1 << 40)?,
            target: f.count(KEYS[6], 1 << 40)?,
        })
    }

    /// L + U of the ranks in use, [r, r].
    fn middle(&self, s: &mut Scope, lower: ValueId, upper: ValueId) -> Result<ValueId> {
        let rank = s.site().rank;
        let shape = vec![Dim::Known(rank), Dim::Known(rank)];
        let (first, block, one, zero) =
            (s.number(self.first as f64)?, s.number(self.block as f64)?, s.number(1.0)?, s.number(0.0)?);
        let mut blocks = [one; 2];
        for (axis, to) in blocks.iter_mut().enumerate() {
            let place = s.push(Op::Iota { shape: shape.clone(), axis: axis as u8 }, &[])?;
            let place = s.push(Op::Cast(DType::F32), &[place])?;
            let behind = s.binary(BinaryOp::Sub, place, first)?;
            let behind = s.binary(BinaryOp::Div, behind, block)?;
            let behind = s.unary(UnaryOp::Floor, behind)?;
            let behind = s.sum(&[behind, one])?;
            *to = s.binary(BinaryOp::Max, behind, zero)?;
        }
        let [row, column] = blocks;
        let used = s.buffer(USED)?;
        let (rows, columns) = (s.along(0, used, &[rank, rank])?, s.along(1, used, &[rank, rank])?);
        let both = s.mul(rows, columns)?;
        let mut terms = vec![];
        for (x, least, most) in [(lower, column, row), (upper, row, column)] {
            let inside = s.binary(BinaryOp::Le, least, most)?;
            let x = s.push(Op::Select, &[inside, x, zero])?;
            terms.push(s.mul(x, both)?);
        }
        s.sum(&terms)
    }

    /// ‖L + U‖ over the number of blocks, f32 [].
    fn norm(&self, s: &mut Scope, middle: ValueId) -> Result<ValueId> {
        let square = s.mul(middle, middle)?;
        let sum = s.sum_over(1, square)?;
        let sum = s.sum_over(0, sum)?;
        let norm = s.unary(UnaryOp::Sqrt, sum)?;
        let used = s.buffer(USED)?;
        let (count, one) = (s.sum_over(0, used)?, s.number(1.0)?);
        let (first, block) = (s.number(self.first as f64)?, s.number(self.block as f64)?);
        // One more than what is behind the first, rounded up.
        let behind = s.binary(BinaryOp::Sub, first, count)?;
        let behind = s.binary(BinaryOp::Div, behind, block)?;
        let behind = s.unary(UnaryOp::Floor, behind)?;
        let blocks = s.binary(BinaryOp::Sub, one, behind)?;
        s.binary(BinaryOp::Div, norm, blocks)
    }

    /// How many sites grow after a step, by ranks in use and wanted.
    fn growing(&self, step: u64, steps: u64, used: u64, wanted: u64) -> Option<usize> {
        if used >= wanted || step <= self.warmup || !step.is_multiple_of(self.every) {
            return None;
        }
        let (missing, total) = ((wanted - used) as f64, self.steps.unwrap_or(steps));
        let way = (step - self.warmup) as f64 / total.saturating_sub(self.warmup).max(1) as f64;
        let count = if self.linear { missing * way } else { (way * missing.ln()).exp() };
        Some((count as usize).max(1))
    }
}

impl Method for TriAdapt {
    fn name(&self) -> &'static str {
        "triadaptlora"
    }

    fn formula(&self) -> &'static str {
        "y = x·Wᵀ + alpha/n · x·(B·(L + U)·A)ᵀ, L lower and U upper triangular, n ranks growing where ‖L + U‖ grows"
    }

    fn peft_type(&self) -> &'static str {
        "TRIADAPTLORA"
    }

    fn default_rank(&self) -> u64 {
        self.first + self.block * self.reference.div_ceil(self.block) * 2
    }

    fn has_patterns(&self) -> bool {
        true
    }

    fn own_keys(&self) -> &'static [&'static str] {
        &KEYS
    }

    fn buffers(&self, site: &Site) -> Vec<Buffer> {
        let (r, start) = (site.rank, Init::Normal { std: 0.02 });
        vec![
            down(site, start.clone()),
            up(site, Init::Zeros {}),
            Buffer::trained(LOWER, LOWER, &[r, r], start),
            Buffer::trained(UPPER, UPPER, &[r, r], Init::Zeros {}),
            in_use(USED, site, self.first),
            Buffer::changing(AGE, &[r], 0.0),
            Buffer::changing(BEFORE, &[], 0.0),
            Buffer::constant("alpha", site.alpha),
        ]
    }

    fn change(&self, s: &mut Scope) -> Result<Option<Change>> {
        let (down, up, alpha, used) = (s.buffer(DOWN)?, s.buffer(UP)?, s.buffer("alpha")?, s.buffer(USED)?);
        let scale = scale_by_count(s, alpha, used)?;
        let (lower, upper) = (s.buffer(LOWER)?, s.buffer(UPPER)?);
        Ok(Some(Change { down, middle: Middle::Matrix(self.middle(s, lower, upper)?), up, scale }))
    }

    fn saved_ranks(&self) -> Option<SavedRanks> {
        const ALONG: &[(&str, &[u8])] = &[(DOWN, &[0]), (UP, &[1]), (LOWER, &[0, 1]), (UPPER, &[0, 1]), (USED, &[0])];
        Some(SavedRanks { by: USED, along: ALONG, pattern: RankPattern::Counts })
    }

    fn aux_loss(&self, s: &mut Scope) -> Result<Option<ValueId>> {
        let used = s.buffer(USED)?;
        orthogonality(s, [DOWN, UP], self.penalty, Some(used))
    }

    fn update(&self, u: &mut Update) -> Result<()> {
        match u.part() {
            DOWN => by_rank(u, AGE, 0),
            LOWER => {
                by_rank(u, AGE, 0)?;
                let (lower, upper, before) = (u.stepped()?, u.stepped_of(UPPER)?, u.buffer(BEFORE)?);
                let middle = self.middle(u, lower, upper)?;
                let norm = self.norm(u, middle)?;
                let score = u.binary(BinaryOp::Sub, norm, before)?;
                u.keep("score", &[], score)
            }
            UP | UPPER => by_rank(u, AGE, 1),
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
                grow_older(e, s, AGE, *used)?;
            }
            return Ok(());
        }
        let wanted = self.target.unwrap_or(self.reference * sites.len() as u64);
        let growing = self.growing(e.step, e.steps, used.iter().sum(), wanted);
        let Some(places) = growing.filter(|_| e.moment == Moment::After) else { return Ok(()) };
        let mut scores = vec![];
        for s in &sites {
            let number = |values: Vec<f32>| values.first().copied().unwrap_or(0.0);
            let (score, before) = (number(e.stat(s, LOWER, "score")?), number(e.read(s, BEFORE)?));
            scores.push(f64::from(score));
            e.write(s, BEFORE, &[before + score])?;
        }
        for ((s, used), grows) in sites.iter().zip(&used).zip(highest(&scores, places)) {
            let more = (used + self.block).min(s.rank);
            if grows && more > *used {
                hold(e, s, USED, 0..more)?;
            }
        }
        Ok(())
    }

    fn config(&self) -> Vec<(&'static str, Value)> {
        vec![
            ("bias", json!("none")),
            ("incre_rank_num", json!(self.block)),
            ("init_rank", json!(self.first)),
            ("lora_dropout", json!(0.0)),
        ]
    }
}
