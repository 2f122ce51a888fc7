//! ggml's storage types and their exact expansion to f32.
//!
//! The arithmetic is ggml's (`dequantize_row_*` in ggml-quants.c), operation by operation in f32, so that the results
//! are the same bits.

use half::{bf16, f16};
use pleach_ir::BlockFormat;

/// A storage type that can be expanded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(non_camel_case_types, reason = "ggml's own names")]
pub enum GgmlType {
    F32,
    F16,
    Bf16,
    /// 32 values: f16 scale, 4-bit values minus 8.
    Q4_0,
    /// 32 values: f16 scale, f16 minimum, 4-bit values.
    Q4_1,
    /// 32 values: f16 scale, 8-bit values.
    Q8_0,
    /// 256 values: 6-bit values minus 32, sixteen 8-bit scales, f16 super-scale.
    Q6_K,
}

/// Names of ggml's type codes, for messages about those that are not supported.
const NAMES: [&str; 31] = [
    "F32", "F16", "Q4_0", "Q4_1", "4", "5", "Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "Q8_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS", "I8", "I16", "I32", "I64",
    "F64", "IQ1_M", "BF16",
];

impl GgmlType {
    /// The type with ggml's code, if it is supported.
    pub fn from_code(code: u32) -> Option<GgmlType> {
        Some(match code {
            0 => GgmlType::F32,
            1 => GgmlType::F16,
            2 => GgmlType::Q4_0,
            3 => GgmlType::Q4_1,
            8 => GgmlType::Q8_0,
            14 => GgmlType::Q6_K,
            30 => GgmlType::Bf16,
            _ => return None,
        })
    }

    /// ggml's name of a type code.
    pub fn name_of(code: u32) -> String {
        NAMES.get(code as usize).map_or_else(|| code.to_string(), |name| (*name).to_owned())
    }

    /// Values in one block.
    pub fn block_elements(self) -> u64 {
        match self {
            GgmlType::F32 | GgmlType::F16 | GgmlType::Bf16 => 1,
            GgmlType::Q4_0 | GgmlType::Q4_1 | GgmlType::Q8_0 => 32,
            GgmlType::Q6_K => 256,
        }
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> u64 {
        match self {
            GgmlType::F32 => 4,
            GgmlType::F16 | GgmlType::Bf16 => 2,
            GgmlType::Q4_0 => 18,
            GgmlType::Q4_1 => 20,
            GgmlType::Q8_0 => 34,
            GgmlType::Q6_K => 210,
        }
    }

    /// The format of blocks that a matrix of this type can be kept in, besides its expansion.
    pub fn block_format(self) -> Option<BlockFormat> {
        match self {
            GgmlType::Q4_0 => Some(BlockFormat::Q4_0),
            GgmlType::Q4_1 => Some(BlockFormat::Q4_1),
            GgmlType::Q8_0 => Some(BlockFormat::Q8_0),
            GgmlType::F32 | GgmlType::F16 | GgmlType::Bf16 | GgmlType::Q6_K => None,
        }
    }

    /// Appends the values of whole blocks to `out`; bytes after the last whole block are left alone.
    pub fn dequantize(self, bytes: &[u8], out: &mut Vec<f32>) {
        let blocks = bytes.chunks_exact(self.block_bytes() as usize);
        match self {
            GgmlType::F32 => out.extend(bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b))),
            GgmlType::F16 => out.extend(bytes.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).to_f32())),
            GgmlType::Bf16 => out.extend(bytes.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32())),
            GgmlType::Q4_0 => blocks.for_each(|b| {
                let d = half_at(b, 0);
                nibbles(&b[2..], |q| (f32::from(q) - 8.0) * d, out);
            }),
            GgmlType::Q4_1 => blocks.for_each(|b| {
                let (d, m) = (half_at(b, 0), half_at(b, 2));
                nibbles(&b[4..], |q| f32::from(q) * d + m, out);
            }),
            GgmlType::Q8_0 => blocks.for_each(|b| {
                let d = half_at(b, 0);
                out.extend(b[2..].iter().map(|&q| f32::from(q as i8) * d));
            }),
            GgmlType::Q6_K => blocks.for_each(|b| q6_k(b, out)),
        }
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Low nibbles are the first half of the block, high nibbles the second.
fn nibbles(bytes: &[u8], value: impl Fn(u8) -> f32, out: &mut Vec<f32>) {
    out.extend(bytes.iter().map(|b| value(b & 15)));
    out.extend(bytes.iter().map(|b| value(b >> 4)));
}

/// `ql` 128 bytes of low nibbles, `qh` 64 bytes of two-bit tops, 16 scales, the super-scale; two halves of 128 values.
fn q6_k(block: &[u8], out: &mut Vec<f32>) {
    let (ql, qh, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half_at(block, 208);
    for half in 0..2 {
        for quarter in 0..4 {
            for l in 0..32 {
                let low = ql[half * 64 + (quarter % 2) * 32 + l] >> (4 * (quarter / 2)) & 15;
                let high = qh[half * 32 + l] >> (2 * quarter) & 3;
                let q = i16::from(low | high << 4) - 32;
                let scale = scales[half * 8 + quarter * 2 + l / 16] as i8;
                out.push(d * f32::from(scale) * f32::from(q));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expand(kind: GgmlType, bytes: &[u8]) -> Vec<f32> {
        let mut out = Vec::new();
        kind.dequantize(bytes, &mut out);
        out
    }

    /// The byte stream of the golden values: a linear congruential sequence with sane f16 scales put in.
    fn stream(kind: GgmlType, halves: &[usize]) -> Vec<u8> {
        let mut state = 12345u32;
        let mut bytes: Vec<u8> = (0..2 * kind.block_bytes())
            .map(|_| {
                state = state.wrapping_mul(1664525).wrapping_add(1013904223);
                (state >> 24) as u8
            })
            .collect();
        for block in bytes.chunks_exact_mut(kind.block_bytes() as usize) {
            for (i, &at) in halves.iter().enumerate() {
                block[at..at + 2].copy_from_slice(&f16::from_f32(0.0173 - 0.03 * i as f32).to_le_bytes());
            }
        }
        bytes
    }

    /// Order-sensitive digest of the bits of all values.
    fn digest(values: &[f32]) -> u64 {
        values.iter().fold(0xcbf29ce484222325, |h, v| (h ^ u64::from(v.to_bits())).wrapping_mul(0x100000001b3))
    }

    #[test]
    fn bits_equal_those_of_the_reference() {
        // Digests of the arrays that `gguf.quants.dequantize` of the Python package gguf 0.19 returns.
        let cases: [(GgmlType, &[usize], u64); 4] = [
            (GgmlType::Q4_0, &[0], GOLDEN[0]),
            (GgmlType::Q4_1, &[0, 2], GOLDEN[1]),
            (GgmlType::Q8_0, &[0], GOLDEN[2]),
            (GgmlType::Q6_K, &[208], GOLDEN[3]),
        ];
        for (kind, halves, expected) in cases {
            let values = expand(kind, &stream(kind, halves));
            assert_eq!(values.len() as u64, 2 * kind.block_elements());
            assert_eq!(digest(&values), expected, "{kind:?} {:?}", &values[..4]);
        }
    }

    const GOLDEN: [u64; 4] = [0x8c4ac3dec6300825, 0x5957c5bd89736625, 0xdfd1bb3a93796625, 0x5f9b164831e6c1b1];

    #[test]
    fn formats_of_blocks_have_the_size_of_their_type() {
        let kinds = (0..32).filter_map(GgmlType::from_code);
        let kept: Vec<_> = kinds.filter_map(|k| Some((k, k.block_format()?))).collect();
        assert_eq!(kept.len(), BlockFormat::ALL.len());
        for (kind, format) in kept {
            assert_eq!((kind.block_elements(), kind.block_bytes()), (BlockFormat::VALUES, format.bytes()), "{kind:?}");
            assert_eq!(format!("{kind:?}").to_lowercase(), format.name());
        }
    }

    #[test]
    fn plain_types_are_widened() {
        assert_eq!(expand(GgmlType::F16, &[0x00, 0x3c, 0x00, 0xc0]), [1.0, -2.0]);
        assert_eq!(expand(GgmlType::Bf16, &[0x80, 0x3f, 0xff]), [1.0]);
        assert_eq!(expand(GgmlType::F32, &1.5f32.to_le_bytes()), [1.5]);
    }
}
