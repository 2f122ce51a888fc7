//! Tensor maps: what they say, written openly into the 128 bytes that the driver keeps to itself.

use pleach_ptx_sim::{Ptr, TensorMap};

/// First word of a map of this library.
const MARK: u64 = 0x706c_6561_6368_746d;

/// A map as 128 bytes.
pub(crate) fn pack(m: &TensorMap) -> [u64; 16] {
    let mut out = [0u64; 16];
    out[0] = MARK;
    out[1] = m.base.0;
    out[2] = u64::from(m.element) | (m.sizes.len() as u64) << 16 | u64::from(m.swizzle) << 32;
    for (i, s) in m.sizes.iter().enumerate() {
        out[3 + i] = *s;
    }
    for (i, s) in m.strides.iter().enumerate() {
        out[8 + i] = *s;
    }
    for (i, b) in m.boxes.iter().enumerate() {
        // At most 256 each.
        out[12 + i / 4] |= u64::from(*b) << (16 * (i % 4));
    }
    out
}

/// The map that 128 bytes hold, if they are one.
pub(crate) fn unpack(words: &[u64; 16]) -> Option<TensorMap> {
    let rank = (words[2] >> 16 & 0xffff) as usize;
    if words[0] != MARK || rank == 0 || rank > 5 {
        return None;
    }
    Some(TensorMap {
        base: Ptr(words[1]),
        element: (words[2] & 0xffff) as u32,
        sizes: words[3..3 + rank].to_vec(),
        strides: words[8..8 + rank - 1].to_vec(),
        boxes: (0..rank).map(|i| (words[12 + i / 4] >> (16 * (i % 4)) & 0xffff) as u32).collect(),
        swizzle: (words[2] >> 32) as u32,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_comes_back() {
        let m = TensorMap {
            base: Ptr(1 << 40),
            element: 2,
            sizes: vec![64, 1 << 40, 3, 4, 5],
            strides: vec![128, 256, 512, 1024],
            boxes: vec![64, 256, 1, 2, 3],
            swizzle: 128,
        };
        assert_eq!(unpack(&pack(&m)), Some(m));
        assert_eq!(unpack(&[0; 16]), None);
    }
}
