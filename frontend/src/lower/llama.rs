//! The Llama family: embedding, blocks of (RMSNorm, rotary grouped-query attention, RMSNorm, gated MLP), RMSNorm, head.
//!
//! Source: `modeling_llama.py` of transformers. Rotary tables are functions of constants, written as operators over
//! `P` positions, so that a later pass can build them once.

use pleach_ir::{
    AttentionAttrs, DType, Dim, Op, ParamId, Role, ScatterMode, Source, Sym, TensorType, UnaryOp, ValueId,
};

use super::{Builder, EntryKind, loss};
use crate::config::LlamaConfig;
use crate::error::Result;

/// What all blocks of one entry share.
struct Shared {
    /// Rows of the rotary tables at each token's position, [T, head_dim / 2].
    cos: ValueId,
    sin: ValueId,
    q_segments: ValueId,
    kv_start: ValueId,
    kv_len: ValueId,
    /// Where each token's key and value go in the cache; `None` without a cache.
    slots: Option<ValueId>,
}

pub(super) fn lower(b: &mut Builder, c: &LlamaConfig, kind: EntryKind) -> Result<()> {
    let ids = b.input("input_ids", Sym::T)?;
    let positions = b.input("positions", Sym::T)?;
    let q_segments = b.input("q_segments", Sym::S1)?;
    let kv_start = b.input("kv_start", Sym::S)?;
    let kv_len = b.input("kv_len", Sym::S)?;
    let (slots, counted) = match kind {
        EntryKind::Infer | EntryKind::Measure => (None, None),
        EntryKind::Generate => (Some(b.input("slots", Sym::T)?), Some(b.input("last", Sym::S)?)),
        EntryKind::Train | EntryKind::Evaluate | EntryKind::Calibrate => (None, Some(b.input("rows", Sym::L)?)),
    };
    let (cos, sin) = rotary_rows(b, c, positions)?;
    let shared = Shared { cos, sin, q_segments, kv_start, kv_len, slots };

    let mut x = b.embedding("model.embed_tokens", ids)?;
    for layer in 0..c.layers {
        x = block(b, c, layer, x, &shared)?;
    }
    if kind == EntryKind::Measure {
        // The inputs of the head are looked at as those of all other layers; its output is not.
        let h = b.rms_norm("model.norm", x, c.norm_eps)?;
        b.linear("lm_head", h)?;
        return loss::count(b, Sym::T);
    }
    if let Some(counted) = counted {
        b.at("model.norm");
        x = b.rows(x, counted)?;
    }
    let x = b.rms_norm("model.norm", x, c.norm_eps)?;
    let logits = b.linear("lm_head", x)?;
    match kind {
        EntryKind::Infer | EntryKind::Generate | EntryKind::Measure => b.output("logits", logits),
        EntryKind::Train => loss::lower(b, logits, true)?,
        EntryKind::Evaluate | EntryKind::Calibrate => loss::lower(b, logits, false)?,
    }
    Ok(())
}

/// Cosines and sines at the tokens' positions: f32 inverse frequency × f32 position, as transformers makes them.
fn rotary_rows(b: &mut Builder, c: &LlamaConfig, positions: ValueId) -> Result<(ValueId, ValueId)> {
    b.at("model.rotary_emb");
    let table = vec![Dim::Symbol(Sym::P), Dim::Known(c.head_dim / 2)];
    let position = b.push(Op::Iota { shape: table.clone(), axis: 0 }, &[])?;
    let position = b.push(Op::Cast(DType::F32), &[position])?;
    let frequency = b.push(Op::f32s(&c.rope.inverse_frequencies(c.head_dim)), &[])?;
    let frequency = b.push(Op::Broadcast { shape: table, axes: vec![1] }, &[frequency])?;
    let angle = b.mul(position, frequency)?;
    let cos = b.unary(UnaryOp::Cos, angle)?;
    let sin = b.unary(UnaryOp::Sin, angle)?;
    Ok((b.rows(cos, positions)?, b.rows(sin, positions)?))
}

fn block(b: &mut Builder, c: &LlamaConfig, layer: u64, x: ValueId, shared: &Shared) -> Result<ValueId> {
    let p = format!("model.layers.{layer}");
    let h = b.rms_norm(&format!("{p}.input_layernorm"), x, c.norm_eps)?;
    let attended = attention(b, c, layer, h, shared)?;
    let x = b.add(&[x, attended])?;
    let h = b.rms_norm(&format!("{p}.post_attention_layernorm"), x, c.norm_eps)?;
    let gate = b.linear(&format!("{p}.mlp.gate_proj"), h)?;
    let up = b.linear(&format!("{p}.mlp.up_proj"), h)?;
    b.at(&format!("{p}.mlp"));
    let sigmoid = b.unary(UnaryOp::Sigmoid, gate)?;
    let active = b.mul(gate, sigmoid)?;
    let gated = b.mul(active, up)?;
    let down = b.linear(&format!("{p}.mlp.down_proj"), gated)?;
    b.add(&[x, down])
}

fn attention(b: &mut Builder, c: &LlamaConfig, layer: u64, h: ValueId, shared: &Shared) -> Result<ValueId> {
    let p = format!("model.layers.{layer}.self_attn");
    let q = b.linear(&format!("{p}.q_proj"), h)?;
    let k = b.linear(&format!("{p}.k_proj"), h)?;
    let v = b.linear(&format!("{p}.v_proj"), h)?;
    b.at(&p);
    // A slot may hold fewer heads while it is trained.
    let heads = |b: &Builder, x| b.shape(x)[1].known().unwrap_or(0) / c.head_dim;
    let (heads, kv_heads) = (heads(b, q), heads(b, k));
    let q = rotate(b, q, heads, c.head_dim, shared)?;
    let k = rotate(b, k, kv_heads, c.head_dim, shared)?;
    let (k, v) = match shared.slots {
        None => (k, v),
        Some(slots) => (append(b, c, layer, "k", k, slots)?, append(b, c, layer, "v", v, slots)?),
    };
    let attrs = AttentionAttrs {
        heads: heads as u32,
        kv_heads: kv_heads as u32,
        head_dim: c.head_dim as u32,
        scale: ((c.head_dim as f64).sqrt().recip() as f32).to_bits(),
        causal: true,
        window: c.window.map(|w| w as u32),
    };
    let mixed = b.push(Op::Attention(attrs), &[q, k, v, shared.q_segments, shared.kv_start, shared.kv_len])?;
    b.linear(&format!("{p}.o_proj"), mixed)
}

/// Writes the tokens' keys or values into the cache and gives the cache's new value.
fn append(b: &mut Builder, c: &LlamaConfig, layer: u64, part: &str, new: ValueId, slots: ValueId) -> Result<ValueId> {
    let ty = TensorType::new(DType::F32, [Dim::Symbol(Sym::C), Dim::Known(c.kv_heads * c.head_dim)]);
    let name = format!("cache.{layer}.{part}");
    let param: ParamId = b.declare(name.clone(), ty.clone(), Role::State, Source::Zeros);
    let old = b.param(name, ty, Role::State, Source::Zeros)?;
    let cache = b.push(Op::Scatter { axis: 0, mode: ScatterMode::Set }, &[old, slots, new])?;
    b.assign(param, cache);
    Ok(cache)
}

/// Rotary embedding in the half-split form: (a, b) → (a cos − b sin, b cos + a sin) for the halves a, b of each head.
fn rotate(b: &mut Builder, x: ValueId, heads: u64, head_dim: u64, shared: &Shared) -> Result<ValueId> {
    let tokens = Dim::Symbol(Sym::T);
    let half = head_dim / 2;
    let shape = vec![tokens, Dim::Known(heads), Dim::Known(half)];
    let x = b.push(Op::Reshape(vec![tokens, Dim::Known(heads), Dim::Known(head_dim)]), &[x])?;
    let first = b.push(Op::Slice { axis: 2, start: 0, end: half }, &[x])?;
    let second = b.push(Op::Slice { axis: 2, start: half, end: head_dim }, &[x])?;
    let cos = b.push(Op::Broadcast { shape: shape.clone(), axes: vec![0, 2] }, &[shared.cos])?;
    let sin = b.push(Op::Broadcast { shape, axes: vec![0, 2] }, &[shared.sin])?;
    let (ac, bs) = (b.mul(first, cos)?, b.mul(second, sin)?);
    let (bc, as_) = (b.mul(second, cos)?, b.mul(first, sin)?);
    let low = b.sub(ac, bs)?;
    let high = b.add(&[bc, as_])?;
    let joined = b.push(Op::Concat { axis: 2 }, &[low, high])?;
    b.push(Op::Reshape(vec![tokens, Dim::Known(heads * head_dim)]), &[joined])
}
