//! LoRA: y += scale · (x · Aᵀ) · Bᵀ, with A [r, in] and B [out, r] (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large
//! Language Models"); scale = alpha / r, or alpha / √r (Kalajdzievski 2023, rsLoRA).

use pleach_ir::{BinaryOp, DType, Op, Role, Source, TensorType, ValueId};

use super::SlotValue;
use crate::error::Result;
use crate::lower::Builder;
use crate::peft::LoraSite;

/// Keys and values of one site's parameters.
pub(super) fn values(site: &LoraSite) -> [(String, SlotValue); 3] {
    let key = |part: &str| format!("{}.{part}", site.module);
    [
        (key("lora_A"), SlotValue::Tensor(site.a.clone())),
        (key("lora_B"), SlotValue::Tensor(site.b.clone())),
        (key("scale"), SlotValue::Scalar(site.scale as f32)),
    ]
}

/// Appends the branch of one site. Beside a linear layer x is [T, in]; beside an embedding it is the i32 index [T], and
/// the token's column of A takes the place of x · Aᵀ. The result is [T, out].
pub(crate) fn branch(b: &mut Builder, slot: u32, site: &LoraSite, x: ValueId) -> Result<ValueId> {
    let trained = b.trained(slot);
    let mut param = |part: &str, shape: &[u64], role: Role| {
        let key = format!("{}.{part}", site.module);
        let ty = TensorType::new(DType::F32, shape.iter().copied());
        b.param(format!("slot{slot}.{key}"), ty, role, Source::Adapter { slot, key })
    };
    let down = param("lora_A", &[site.rank, site.input], trained)?;
    let up = param("lora_B", &[site.output, site.rank], trained)?;
    let scale = param("scale", &[], Role::Frozen)?;
    let narrow = if site.embedding {
        let table = b.push(Op::Transpose(vec![1, 0]), &[down])?;
        b.push(Op::Gather { axis: 0 }, &[table, x])?
    } else {
        b.push(Op::MatMul { ta: false, tb: true }, &[x, down])?
    };
    let wide = b.push(Op::MatMul { ta: false, tb: true }, &[narrow, up])?;
    b.push(Op::Binary(BinaryOp::Mul), &[scale, wide])
}
