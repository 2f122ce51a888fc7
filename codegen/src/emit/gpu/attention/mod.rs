//! Attention kernels on the GPU: forward with log-sum-exp, and the gradients of queries, keys and values.
//!
//! [`flash`] takes bf16 through tensor cores; [`plain`] takes any head width and any types with a warp to a row, and few
//! queries for a sequence.

mod flash;
mod packed;
mod plain;

use super::{GpuChip, Parts};
use crate::emit::unsupported;
use crate::error::CodegenError;
use pleach_ir::{AttentionAttrs, AttentionWrt, Class, Kernel, Op, Sym, ValueId};

/// What a kernel computes, as results of the body.
struct Config {
    at: AttentionAttrs,
    /// q, k, v (the log-sum-exp alone has no v), then out, lse, d_out for gradients.
    inputs: Vec<ValueId>,
    /// `q_segments`, `kv_start`, `kv_len`.
    bounds: [ValueId; 3],
    out: Option<usize>,
    lse: Option<usize>,
    /// Gradients of q, k, v.
    grads: [Option<usize>; 3],
}

impl Config {
    fn new(k: &Kernel) -> Result<Config, CodegenError> {
        let body = &k.body;
        let mut c: Option<Config> = None;
        for (i, r) in body.roots.iter().enumerate() {
            // A result under another shape holds the same elements.
            let v = crate::emit::attention::view::strip_reshape(body, r.value);
            let n = body.node(v);
            let (at, inputs) = match n.op {
                Op::Attention(a) | Op::AttentionLse(a) => (a, n.inputs[..n.inputs.len() - 3].to_vec()),
                Op::AttentionGrad { attrs, .. } => (attrs, n.inputs[..6].to_vec()),
                _ => return Err(unsupported(k, format!("{} is no attention", n.op.name()))),
            };
            let b = &n.inputs[n.inputs.len() - 3..];
            let c = c.get_or_insert(Config {
                at,
                inputs: inputs.clone(),
                bounds: [b[0], b[1], b[2]],
                out: None,
                lse: None,
                grads: [None; 3],
            });
            if inputs.len() > c.inputs.len() {
                c.inputs = inputs;
            }
            match n.op {
                Op::Attention(_) => c.out = Some(i),
                Op::AttentionLse(_) => c.lse = Some(i),
                Op::AttentionGrad { wrt: AttentionWrt::Q, .. } => c.grads[0] = Some(i),
                Op::AttentionGrad { wrt: AttentionWrt::K, .. } => c.grads[1] = Some(i),
                _ => c.grads[2] = Some(i),
            }
        }
        let c = c.ok_or_else(|| unsupported(k, "an attention kernel needs a result"))?;
        if k.class != Class::Attention || k.aliases.iter().any(Option::is_some) {
            return Err(unsupported(k, "is no attention kernel, or writes over an operand"));
        }
        Ok(c)
    }
}

/// Emits an attention kernel.
pub(super) fn emit(k: &Kernel, symbols: &[Sym], chip: GpuChip) -> Result<Parts, CodegenError> {
    let c = Config::new(k)?;
    match flash::emit(k, symbols, &c, chip)? {
        Some(parts) => Ok(parts),
        None => plain::emit(k, symbols, &c, false),
    }
}
