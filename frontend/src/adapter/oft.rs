//! OFT: the inputs of a layer are turned, block by block, by learned rotations (Qiu et al. 2023, "Controlling Text-to-Image Diffusion by
//! Orthogonal Finetuning"; Cayley's form by a Neumann series from Qiu et al. 2025, "Orthogonal Finetuning Made Scalable").
//!
//! y = (x · R) · Wᵀ with R block-diagonal, R_k = (I − Q_k) · (I + Q_k)⁻¹ for skew-symmetric Q_k, of which the upper triangle is trained;
//! `use_cayley_neumann` takes I + 2 (Q + Q² + …) + Qⁿ instead, as PEFT has it. The exact form goes through
//! (I + Q)⁻¹ = (I − Q) · (I − Q²)⁻¹ and Newton's iteration, to the last bits while ‖Q‖² stays below a thousand. Q starts at zero.

use std::sync::Arc;

use pleach_ir::{BinaryOp, DType, Dim, Op, ValueId};
use serde_json::{Value, json};

use super::method::{Buffer, Entry, Key, Method, Scope, linear_only};
use super::{Init, Site};
use crate::error::Result;
use crate::json::Fields;
use crate::peft::Target;

/// How it is found.
pub(super) const ENTRY: Entry =
    Entry { name: "oft", keys: &[("peft_type", Key::Text("OFT"))], read: |f| Ok(Arc::new(Oft::read(f)?)) };

/// Largest block: numbers of its values are exact as f32.
const LARGEST: u64 = 4096;
/// Steps of Newton's iteration.
const NEWTON: usize = 12;

/// OFT.
#[derive(Debug, Clone)]
struct Oft {
    /// `r`: blocks per layer; `None` where the block size is given.
    blocks: Option<u64>,
    /// `oft_block_size`.
    size: u64,
    /// Whether all blocks of a layer are one.
    share: bool,
    /// Terms of the series; `None` for the exact form.
    terms: Option<u64>,
    /// Whether Q starts at zero rather than at random, which is for tests.
    zero: bool,
}

impl Oft {
    fn read(f: &mut Fields) -> Result<Oft> {
        f.must_be_off("coft", "the constrained variant is not supported")?;
        // It matters to the constrained variant only.
        f.raw("eps");
        let blocks = f.whole("r")?.unwrap_or(0);
        let size = f.whole("oft_block_size")?.unwrap_or(if blocks == 0 { 32 } else { 0 });
        if (blocks == 0) == (size == 0) {
            let what = format!("is {size} beside r = {blocks}; give one of them and 0 for the other");
            return Err(f.fault("oft_block_size", what));
        }
        let series = f.flag("use_cayley_neumann")?.unwrap_or(true);
        let terms = f.count("num_cayley_neumann_terms", 64)?.unwrap_or(5);
        Ok(Oft {
            blocks: (blocks > 0).then_some(blocks),
            size,
            share: f.flag("block_share")?.unwrap_or(false),
            terms: series.then_some(terms),
            zero: f.flag("init_weights")?.unwrap_or(true),
        })
    }

    /// Number and size of the blocks of a layer with this many inputs: what was asked for where it divides them, else the nearest
    /// divisor, the smaller of two.
    fn blocks(&self, input: u64) -> (u64, u64) {
        let fitting = |wanted: u64| {
            if wanted >= input {
                return input;
            }
            let above = (wanted..=input).find(|d| input.is_multiple_of(*d)).unwrap_or(input);
            let below = (1..=wanted).rev().find(|d| input.is_multiple_of(*d)).unwrap_or(1);
            if wanted - below <= above - wanted { below } else { above }
        };
        match self.blocks {
            Some(r) => (fitting(r), input / fitting(r)),
            None => (input / fitting(self.size), fitting(self.size)),
        }
    }

    /// R [blocks or 1, size, size].
    fn rotation(&self, s: &mut Scope) -> Result<ValueId> {
        let (blocks, size) = self.blocks(s.site().input);
        let count = if self.share { 1 } else { blocks };
        let q = skew(s, count, size)?;
        let identity = s.identity(size)?;
        let identity = s.spread(identity, &[count, size, size], &[1, 2])?;
        let two = s.number(2.0)?;
        let Some(terms) = self.terms else { return cayley(s, q, identity, count, size) };
        let mut sum = vec![identity];
        if terms > 1 {
            sum.push(s.mul(two, q)?);
        }
        if terms > 2 {
            let mut power = s.matmul(q, false, q, false)?;
            sum.push(s.mul(two, power)?);
            for _ in 3..terms.saturating_sub(1) {
                power = s.matmul(power, false, q, false)?;
                sum.push(s.mul(two, power)?);
            }
            sum.push(s.matmul(power, false, q, false)?);
        }
        s.sum(&sum)
    }
}

/// Q [count, size, size] with the trained values above the diagonal and their negatives below: every element picks its value, which
/// for (i, j) above the diagonal is number i · (2 · size − i − 1) / 2 + j − i − 1, and gets its sign.
fn skew(s: &mut Scope, count: u64, size: u64) -> Result<ValueId> {
    let values = s.buffer("oft_R")?;
    if size < 2 {
        let zero = s.number(0.0)?;
        return s.spread(zero, &[count, size, size], &[]);
    }
    let number = |s: &mut Scope, axis: u8| {
        let shape = vec![Dim::Known(size), Dim::Known(size)];
        let n = s.push(Op::Iota { shape, axis }, &[])?;
        // Whole numbers far below 2²⁴.
        s.push(Op::Cast(DType::F32), &[n])
    };
    let (i, j) = (number(s, 0)?, number(s, 1)?);
    let (low, high) = (s.binary(BinaryOp::Min, i, j)?, s.binary(BinaryOp::Max, i, j)?);
    let (zero, one, half) = (s.number(0.0)?, s.number(1.0)?, s.number(0.5)?);
    let all = s.number((2 * size - 1) as f64)?;
    let rest = s.binary(BinaryOp::Sub, all, low)?;
    let before = s.mul(low, rest)?;
    let before = s.mul(half, before)?;
    let within = s.binary(BinaryOp::Sub, high, low)?;
    let place = s.sum(&[before, within])?;
    let place = s.binary(BinaryOp::Sub, place, one)?;
    // The diagonal picks something, which does not count.
    let place = s.binary(BinaryOp::Max, place, zero)?;
    let last = s.number((size * (size - 1) / 2 - 1) as f64)?;
    let place = s.binary(BinaryOp::Min, place, last)?;
    let place = s.push(Op::Cast(DType::I32), &[place])?;
    let place = s.reshape(place, &[size * size])?;
    let picked = s.push(Op::Gather { axis: 1 }, &[values, place])?;
    let picked = s.reshape(picked, &[count, size, size])?;
    let (above, below) = (s.binary(BinaryOp::Lt, i, j)?, s.binary(BinaryOp::Lt, j, i)?);
    let minus = s.number(-1.0)?;
    let sign = s.push(Op::Select, &[below, minus, zero])?;
    let sign = s.push(Op::Select, &[above, one, sign])?;
    let sign = s.spread(sign, &[count, size, size], &[1, 2])?;
    s.mul(picked, sign)
}

/// (I − Q) · (I + Q)⁻¹ = (I − Q)² · M⁻¹ with M = I − Q², whose eigenvalues lie between 1 and c = 1 + ‖Q‖² / 2, for the singular values
/// of a skew-symmetric matrix come in pairs. Newton's X ← X · (2 I − M · X) from 2 / (1 + c) · I squares the error each time.
fn cayley(s: &mut Scope, q: ValueId, identity: ValueId, count: u64, size: u64) -> Result<ValueId> {
    let shape = [count, size, size];
    let (half, two) = (s.number(0.5)?, s.number(2.0)?);
    let squared = s.mul(q, q)?;
    let norm = s.sum_over(2, squared)?;
    let norm = s.sum_over(1, norm)?;
    let norm = s.mul(half, norm)?;
    // 2 / (1 + c) = 2 / (2 + ‖Q‖² / 2).
    let below = s.sum(&[two, norm])?;
    let start = s.push(Op::Binary(BinaryOp::Div), &[two, below])?;
    let start = s.push(Op::StopGradient, &[start])?;
    let start = s.spread(start, &shape, &[0])?;
    let mut inverse = s.mul(start, identity)?;
    let square = s.matmul(q, false, q, false)?;
    let m = s.push(Op::Binary(BinaryOp::Sub), &[identity, square])?;
    let twice = s.mul(two, identity)?;
    for _ in 0..NEWTON {
        let product = s.matmul(m, false, inverse, false)?;
        let rest = s.push(Op::Binary(BinaryOp::Sub), &[twice, product])?;
        inverse = s.matmul(inverse, false, rest, false)?;
    }
    // (I − Q)² = I − 2 Q + Q².
    let doubled = s.mul(two, q)?;
    let top = s.push(Op::Binary(BinaryOp::Sub), &[identity, doubled])?;
    let top = s.sum(&[top, square])?;
    s.matmul(top, false, inverse, false)
}

impl Method for Oft {
    fn name(&self) -> &'static str {
        "oft"
    }

    fn formula(&self) -> &'static str {
        "y = (x·R)·Wᵀ, R block-diagonal, R_k = (I − Q_k)·(I + Q_k)⁻¹"
    }

    fn peft_type(&self) -> &'static str {
        "OFT"
    }

    fn rank_key(&self) -> Option<&'static str> {
        None
    }

    fn alpha_key(&self) -> Option<&'static str> {
        None
    }

    fn attach(&self, target: &Target) -> std::result::Result<(), String> {
        linear_only(target)?;
        match self.blocks(target.input) {
            (_, size) if size > LARGEST => Err(format!("has blocks of {size} inputs; at most {LARGEST} are supported")),
            _ => Ok(()),
        }
    }

    fn buffers(&self, site: &Site) -> Vec<Buffer> {
        let (blocks, size) = self.blocks(site.input);
        let shape = [if self.share { 1 } else { blocks }, size * (size - 1) / 2];
        let init = if self.zero { Init::Zeros {} } else { Init::Normal { std: 0.1 } };
        vec![Buffer::trained("oft_R", "oft_R.weight", &shape, init)]
    }

    fn input(&self, s: &mut Scope, x: ValueId) -> Result<ValueId> {
        if !s.trains() {
            return Ok(x);
        }
        let (blocks, size) = self.blocks(s.site().input);
        let r = self.rotation(s)?;
        let x = s.rows_as(x, &[blocks, size])?;
        let x = s.transpose(x, &[1, 0, 2])?;
        let r = self.for_every_block(s, r, blocks, size)?;
        let turned = s.matmul(x, false, r, false)?;
        let turned = s.transpose(turned, &[1, 0, 2])?;
        s.rows_as(turned, &[blocks * size])
    }

    fn weight(&self, s: &mut Scope, weight: ValueId) -> Result<ValueId> {
        if s.trains() {
            return Ok(weight);
        }
        // One weight: (x · R) · Wᵀ = x · (W · Rᵀ)ᵀ, block by block.
        let (input, output) = (s.site().input, s.site().output);
        let (blocks, size) = self.blocks(input);
        let r = self.rotation(s)?;
        let r = self.for_every_block(s, r, blocks, size)?;
        let w = s.reshape(weight, &[output, blocks, size])?;
        let w = s.transpose(w, &[1, 0, 2])?;
        let turned = s.matmul(w, false, r, true)?;
        let turned = s.transpose(turned, &[1, 0, 2])?;
        s.reshape(turned, &[output, input])
    }

    fn config(&self) -> Vec<(&'static str, Value)> {
        vec![
            ("bias", json!("none")),
            ("block_share", json!(self.share)),
            ("coft", json!(false)),
            ("eps", json!(6e-5)),
            ("fan_in_fan_out", json!(false)),
            ("init_weights", json!(self.zero)),
            ("module_dropout", json!(0.0)),
            ("num_cayley_neumann_terms", json!(self.terms.unwrap_or(5))),
            ("oft_block_size", json!(self.size)),
            ("r", json!(self.blocks.unwrap_or(0))),
            ("use_cayley_neumann", json!(self.terms.is_some())),
        ]
    }
}

impl Oft {
    fn for_every_block(&self, s: &mut Scope, r: ValueId, blocks: u64, size: u64) -> Result<ValueId> {
        if !self.share {
            return Ok(r);
        }
        let r = s.reshape(r, &[size, size])?;
        s.spread(r, &[blocks, size, size], &[1, 2])
    }
}
