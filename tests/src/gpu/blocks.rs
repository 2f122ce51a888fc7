//! Weights in blocks of codes for graphs whose weights are numbers: every matrix is rounded to what blocks can hold.
//!
//! Scales are powers of two and minima eight of them, so that blocks made again of what they stand for stand for the same, and bf16 holds
//! all of it.

use super::session::Tensors;
use pleach_ir::interp::Tensor;
use pleach_ir::{BlockFormat, Graph, Param, Source};
use pleach_ptx_sim::f32_to_f16;
use std::collections::BTreeMap;

const VALUES: usize = BlockFormat::VALUES as usize;

/// Blocks that stand for values near these.
pub fn encode(format: BlockFormat, values: &[f32]) -> Vec<u8> {
    let mut out = vec![];
    for block in values.chunks(VALUES) {
        let most = block.iter().fold(0f32, |m, x| m.max(x.abs()));
        let codes = if format.code_bits() == 4 { 7.0 } else { 127.0 };
        let mut scale = 2f32.powi(-14);
        while scale * codes < most {
            scale *= 2.0;
        }
        let half = |x: f32| f32_to_f16(x).to_le_bytes();
        let code = |x: &f32| (x / scale).round() as i32;
        out.extend(half(scale));
        if format.has_minimum() {
            out.extend(half(-8.0 * scale));
        }
        match format {
            BlockFormat::Q8_0 => out.extend(block.iter().map(|x| code(x) as i8 as u8)),
            BlockFormat::Q4_0 | BlockFormat::Q4_1 => {
                let (low, high) = block.split_at(VALUES / 2);
                let one = |x: &f32| (code(x) + 8) as u8;
                out.extend(low.iter().zip(high).map(|(a, b)| one(a) | one(b) << 4));
            }
        }
    }
    out
}

/// What blocks stand for.
pub fn expand(format: BlockFormat, bytes: &[u8]) -> Vec<f32> {
    let mut out = vec![];
    let mut values = [0.0; VALUES];
    let stored = match format {
        BlockFormat::Q4_0 => pleach_plan::BlockFormat::Q4_0,
        BlockFormat::Q4_1 => pleach_plan::BlockFormat::Q4_1,
        BlockFormat::Q8_0 => pleach_plan::BlockFormat::Q8_0,
    };
    for block in bytes.chunks_exact(format.bytes() as usize) {
        pleach_runtime::expand(stored, block, &mut values);
        out.extend(values);
    }
    out
}

/// A tensor rounded to what blocks hold.
pub fn rounded(format: BlockFormat, t: &Tensor) -> Tensor {
    Tensor::from_floats(t.dtype(), t.shape.clone(), expand(format, &encode(format, &t.floats())))
}

/// The bytes of a tensor in blocks.
///
/// # Errors
/// A tensor that is not [`rounded`].
pub fn stored(format: BlockFormat, t: &Tensor) -> Result<Vec<u8>, String> {
    let bytes = encode(format, &t.floats());
    if rounded(format, t) == *t { Ok(bytes) } else { Err(format!("{} cannot hold this tensor", format.name())) }
}

/// A format for every matrix of a graph's checkpoint that consists of whole blocks. Neighbours have the same one three by three, so that
/// some can be put together and others not.
pub fn formats(g: &Graph) -> BTreeMap<String, BlockFormat> {
    let name = |p: &Param| match (&p.source, &p.ty.shape[..]) {
        (Source::Checkpoint(name), [_, k]) if k.known().is_some_and(|k| k.is_multiple_of(BlockFormat::VALUES)) => {
            Some(name.clone())
        }
        _ => None,
    };
    let names = g.params.iter().filter_map(name).enumerate();
    names.map(|(i, name)| (name, BlockFormat::ALL[i / 3 % 3])).collect()
}

/// Rounds the values of these tensors of the checkpoint, whatever parameters they are read as.
pub fn round(params: &[Param], formats: &BTreeMap<String, BlockFormat>, values: &mut Tensors) {
    for p in params {
        if let Source::Checkpoint(name) = &p.source
            && let (Some(format), Some(t)) = (formats.get(name), values.get_mut(&p.name))
        {
            *t = rounded(*format, t);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pleach_ir::DType;

    #[test]
    fn what_is_rounded_is_stored_as_it_is() {
        let mut rng = crate::values::Rng::new(3, "blocks");
        for format in BlockFormat::ALL {
            let values: Vec<f32> = (0..256).map(|i| rng.unit() / (1 << (i / 32)) as f32).collect();
            let t = Tensor::f32([2, 128], values.clone());
            assert!(stored(format, &t).is_err());
            let near = rounded(format, &t);
            assert_eq!(expand(format, &stored(format, &near).unwrap()), near.floats().to_vec());
            let half = Tensor::from_floats(DType::BF16, [2, 128], near.floats().to_vec());
            assert_eq!(half.floats(), near.floats(), "bf16 holds it");
            let most = if format.code_bits() == 4 { 0.15 } else { 0.01 };
            assert!(near.relative_error(&t) < most);
        }
    }
}
