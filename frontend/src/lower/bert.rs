//! BERT encoders: summed embeddings, then post-norm blocks of attention and a feed-forward part.
//!
//! Source: `modeling_bert.py` of transformers. The pooler and heads are not computed: the output is the last hidden
//! state.

use pleach_ir::{AttentionAttrs, Op, Sym, UnaryOp, ValueId};

use super::Builder;
use crate::config::{Activation, BertConfig};
use crate::error::Result;

pub(super) fn lower(b: &mut Builder, c: &BertConfig) -> Result<()> {
    let ids = b.input("input_ids", Sym::T)?;
    let positions = b.input("positions", Sym::T)?;
    let q_segments = b.input("q_segments", Sym::S1)?;
    let kv_start = b.input("kv_start", Sym::S)?;
    let kv_len = b.input("kv_len", Sym::S)?;
    let kinds = b.input("token_type_ids", Sym::T)?;

    let mut terms = Vec::new();
    for (table, index) in [("word", ids), ("token_type", kinds), ("position", positions)] {
        terms.push(b.embedding(&format!("embeddings.{table}_embeddings"), index)?);
    }
    b.at("embeddings");
    let summed = b.add(&terms)?;
    let mut x = b.layer_norm("embeddings.LayerNorm", summed, c.norm_eps)?;
    for layer in 0..c.layers {
        x = block(b, c, layer, x, [q_segments, kv_start, kv_len])?;
    }
    b.output("last_hidden_state", x);
    Ok(())
}

fn block(b: &mut Builder, c: &BertConfig, layer: u64, x: ValueId, segments: [ValueId; 3]) -> Result<ValueId> {
    let p = format!("encoder.layer.{layer}");
    let q = b.linear(&format!("{p}.attention.self.query"), x)?;
    let k = b.linear(&format!("{p}.attention.self.key"), x)?;
    let v = b.linear(&format!("{p}.attention.self.value"), x)?;
    b.at(&format!("{p}.attention.self"));
    let attrs = AttentionAttrs {
        heads: c.heads as u32,
        kv_heads: c.heads as u32,
        head_dim: c.head_dim() as u32,
        scale: ((c.head_dim() as f64).sqrt().recip() as f32).to_bits(),
        causal: false,
        window: None,
    };
    let mixed = b.push(Op::Attention(attrs), &[q, k, v, segments[0], segments[1], segments[2]])?;
    let out = b.linear(&format!("{p}.attention.output.dense"), mixed)?;
    let x = residual(b, &format!("{p}.attention.output.LayerNorm"), out, x, c.norm_eps)?;
    let wide = b.linear(&format!("{p}.intermediate.dense"), x)?;
    b.at(&format!("{p}.intermediate"));
    let active = activate(b, c.activation, wide)?;
    let out = b.linear(&format!("{p}.output.dense"), active)?;
    residual(b, &format!("{p}.output.LayerNorm"), out, x, c.norm_eps)
}

fn residual(b: &mut Builder, norm: &str, out: ValueId, x: ValueId, eps: f64) -> Result<ValueId> {
    b.at(norm);
    let sum = b.add(&[out, x])?;
    b.layer_norm(norm, sum, eps)
}

fn activate(b: &mut Builder, activation: Activation, x: ValueId) -> Result<ValueId> {
    match activation {
        Activation::Relu => {
            let zero = b.push(Op::f32(0.0), &[])?;
            b.push(Op::Binary(pleach_ir::BinaryOp::Max), &[x, zero])
        }
        Activation::Silu => {
            let sigmoid = b.unary(UnaryOp::Sigmoid, x)?;
            b.mul(x, sigmoid)
        }
        Activation::Gelu => {
            let inner = b.scale(x, std::f32::consts::FRAC_1_SQRT_2)?;
            half_of_one_plus(b, UnaryOp::Erf, inner, x)
        }
        Activation::GeluTanh => {
            let square = b.mul(x, x)?;
            let cube = b.mul(square, x)?;
            let bent = b.scale(cube, 0.044715)?;
            let sum = b.add(&[x, bent])?;
            let inner = b.scale(sum, (2.0 / std::f64::consts::PI).sqrt() as f32)?;
            half_of_one_plus(b, UnaryOp::Tanh, inner, x)
        }
    }
}

/// x / 2 · (1 + f(inner)).
fn half_of_one_plus(b: &mut Builder, f: UnaryOp, inner: ValueId, x: ValueId) -> Result<ValueId> {
    let value = b.unary(f, inner)?;
    let one_plus = b.shift(value, 1.0)?;
    let half = b.scale(x, 0.5)?;
    b.mul(half, one_plus)
}
