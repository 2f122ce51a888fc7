//! SMoRA: every rank of a LoRA is an expert, and every token uses k of them (Zhao et al. 2025, "Each Rank Could be an Expert: Single-Ranked
//! Mixture of Experts LoRA for Multi-task Learning").
//!
//! y += scale · ((x · Aᵀ) ∘ g) · Bᵀ with g = p on the k ranks of largest p + b, zero elsewhere; p = softmax(x · Rᵀ), R [r, in] the router. b [r],
//! zero at first, has no gradient: after every step it moves by `bias_update_rate` · sign(mean load − load), so that ranks are used alike; a rank's
//! load is the number of tokens of the step that used it. The paper's text beyond its summary was not opened: that gates are p rather
//! than p + b, as in the balancing without a loss that it builds on, is recalled. PEFT has no such class.

use std::sync::Arc;

use pleach_ir::{BinaryOp, DType, Dim, Op, ReduceOp, Role, UnaryOp, ValueId};
use serde_json::{Value, json};

use super::method::{Buffer, Entry, Key, Method, Scope, linear_only};
use super::{Init, Site, Update};
use crate::error::Result;
use crate::json::Fields;
use crate::peft::Target;

/// The part, and the name in files, of R.
const ROUTER: &str = "smora_router";
/// The part, and the name in files, of b.
const BIAS: &str = "smora_bias";
/// The statistic of R that holds loads.
const LOAD: &str = "load";

/// How it is found.
pub(super) const ENTRY: Entry =
    Entry { name: "smora", keys: &[("peft_type", Key::Text("SMORA"))], read: |f| Ok(Arc::new(Smora::read(f)?)) };

/// SMoRA.
#[derive(Debug, Clone)]
struct Smora {
    /// Ranks that a token uses.
    used: u64,
    rate: f64,
}

impl Smora {
    fn read(f: &mut Fields) -> Result<Smora> {
        let used = f.count("top_k", 1 << 20)?.unwrap_or(4);
        Ok(Smora { used, rate: f.number("bias_update_rate")?.unwrap_or(1e-3) })
    }
}

impl Method for Smora {
    fn name(&self) -> &'static str {
        "smora"
    }

    fn formula(&self) -> &'static str {
        "y = x·Wᵀ + alpha/r · ((x·Aᵀ) ∘ g)·Bᵀ, g = softmax(x·Rᵀ) on the k ranks where it is largest with b added"
    }

    fn peft_type(&self) -> &'static str {
        "SMORA"
    }

    fn attach(&self, target: &Target) -> std::result::Result<(), String> {
        linear_only(target)?;
        match self.used > target.rank {
            true => Err(format!("has r = {}, fewer ranks than top_k = {}", target.rank, self.used)),
            false => Ok(()),
        }
    }

    fn buffers(&self, site: &Site) -> Vec<Buffer> {
        let (r, input) = (site.rank, site.input);
        vec![
            Buffer::trained("lora_A", "lora_A.weight", &[r, input], Init::fan_in(input)),
            Buffer::trained("lora_B", "lora_B.weight", &[site.output, r], Init::Zeros {}),
            Buffer::trained(ROUTER, ROUTER, &[r, input], Init::fan_in(input)),
            Buffer {
                part: BIAS,
                dtype: DType::F32,
                shape: vec![r],
                role: Role::Stat,
                file: Some(BIAS),
                init: Init::Zeros {},
            },
            Buffer::constant("scale", site.scale),
        ]
    }

    fn output(&self, s: &mut Scope, x: ValueId, _weight: ValueId, mut terms: Vec<ValueId>) -> Result<Vec<ValueId>> {
        let (down, up, router) = (s.buffer("lora_A")?, s.buffer("lora_B")?, s.buffer(ROUTER)?);
        let scores = s.times(x, router)?;
        let share = softmax(s, scores)?;
        let bias = s.buffer(BIAS)?;
        let bias = s.over_rows(bias, share)?;
        let favour = s.sum(&[share, bias])?;
        let favour = s.push(Op::StopGradient, &[favour])?;
        let used = self.mask(s, favour)?;
        let load = s.push(Op::Reduce { op: ReduceOp::Sum, axis: 0 }, &[used])?;
        s.count(ROUTER, LOAD, load)?;
        let gate = s.mul(share, used)?;
        let narrow = s.times(x, down)?;
        let narrow = s.mul(narrow, gate)?;
        let wide = s.times(narrow, up)?;
        let scale = s.buffer("scale")?;
        terms.push(s.mul(scale, wide)?);
        Ok(terms)
    }

    fn update(&self, u: &mut Update) -> Result<()> {
        if u.part() != ROUTER {
            return Ok(());
        }
        let r = u.site().rank;
        let load = u.kept(LOAD, &[r])?;
        let (all, ranks, zero) = (u.sum_over(0, load)?, u.number(r as f64)?, u.number(0.0)?);
        let mean = u.binary(BinaryOp::Div, all, ranks)?;
        let missing = u.binary(BinaryOp::Sub, mean, load)?;
        let (more, fewer) = (u.binary(BinaryOp::Lt, zero, missing)?, u.binary(BinaryOp::Lt, missing, zero)?);
        let (up, down) = (u.number(self.rate)?, u.number(-self.rate)?);
        let step = u.push(Op::Select, &[fewer, down, zero])?;
        let step = u.push(Op::Select, &[more, up, step])?;
        let bias = u.buffer(BIAS)?;
        let bias = u.sum(&[bias, step])?;
        u.assign(BIAS, bias)?;
        let none = u.spread(zero, &[r], &[])?;
        u.keep(LOAD, &[r], none)
    }

    fn config(&self) -> Vec<(&'static str, Value)> {
        vec![("top_k", json!(self.used)), ("bias_update_rate", json!(self.rate)), ("lora_dropout", json!(0.0))]
    }
}

impl Smora {
    /// One where a rank is among the `used` largest of its row, zero elsewhere: [T, r].
    fn mask(&self, s: &mut Scope, favour: ValueId) -> Result<ValueId> {
        let (r, k) = (s.site().rank, self.used);
        let index = s.push(Op::TopK { k, indices: true }, &[favour])?;
        let rows = s.shape(index)[0];
        let shape = vec![rows, Dim::Known(k), Dim::Known(r)];
        let index = s.push(Op::Broadcast { shape: shape.clone(), axes: vec![0, 1] }, &[index])?;
        let rank = s.push(Op::Iota { shape, axis: 2 }, &[])?;
        let here = s.binary(BinaryOp::Eq, index, rank)?;
        let here = s.push(Op::Cast(DType::F32), &[here])?;
        s.sum_over(1, here)
    }
}

/// softmax of the rows of x [T, r].
fn softmax(s: &mut Scope, x: ValueId) -> Result<ValueId> {
    let shape = s.shape(x).to_vec();
    let over = |s: &mut Scope, v| s.push(Op::Broadcast { shape: shape.clone(), axes: vec![0] }, &[v]);
    let largest = s.push(Op::Reduce { op: ReduceOp::Max, axis: 1 }, &[x])?;
    let largest = s.push(Op::StopGradient, &[largest])?;
    let largest = over(s, largest)?;
    let x = s.binary(BinaryOp::Sub, x, largest)?;
    let x = s.unary(UnaryOp::Exp, x)?;
    let all = s.sum_over(1, x)?;
    let all = over(s, all)?;
    s.binary(BinaryOp::Div, x, all)
}
