//! Conversions between f32 and the two 16-bit floating-point types, rounding to nearest, ties to even.
//!
//! NaN stays NaN (quiet), values past the largest finite f16 become infinity, small values become f16 subnormals.

/// A bf16 (the upper half of an f32) as f32.
pub fn bf16_to_f32(h: u16) -> f32 {
    f32::from_bits(u32::from(h) << 16)
}

/// The nearest bf16.
pub fn f32_to_bf16(x: f32) -> u16 {
    let b = x.to_bits();
    if x.is_nan() {
        return (b >> 16) as u16 | 0x40;
    }
    let round = 0x7fff + (b >> 16 & 1);
    (b.wrapping_add(round) >> 16) as u16
}

/// An IEEE binary16 as f32; exact.
pub fn f16_to_f32(h: u16) -> f32 {
    let sign = if h & 0x8000 != 0 { -1.0f32 } else { 1.0 };
    let (exp, frac) = (i32::from(h >> 10 & 0x1f), f32::from(h & 0x3ff));
    match exp {
        0 => sign * frac * 2f32.powi(-24),
        31 if frac == 0.0 => sign * f32::INFINITY,
        31 => f32::from_bits(u32::from(h & 0x8000) << 16 | 0x7fc0_0000 | u32::from(h & 0x3ff) << 13),
        _ => sign * (1.0 + frac / 1024.0) * 2f32.powi(exp - 15),
    }
}

/// The nearest IEEE binary16.
pub fn f32_to_f16(x: f32) -> u16 {
    let b = x.to_bits();
    let sign = (b >> 16 & 0x8000) as u16;
    if x.is_nan() {
        return sign | 0x7e00 | (b >> 13 & 0x3ff) as u16;
    }
    let a = x.abs();
    if a >= 65520.0 {
        return sign | 0x7c00;
    }
    if a < 2f32.powi(-14) {
        // Adding 0.5 puts the last bit of an f16 subnormal (2^-24) at the last bit of the sum: the addition rounds.
        return sign | ((a + 0.5).to_bits() - 0.5f32.to_bits()) as u16;
    }
    let m = b & 0x7fff_ffff;
    let m = m + 0xfff + (m >> 13 & 1);
    sign | ((m >> 13) - (112 << 10)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values() {
        for (h, x) in
            [(0x3c00u16, 1.0f32), (0xc000, -2.0), (0x7bff, 65504.0), (1, 5.960_464_5e-8), (0x0400, 6.103_515_6e-5)]
        {
            assert_eq!(f16_to_f32(h), x);
            assert_eq!(f32_to_f16(x), h);
        }
        assert_eq!(f32_to_f16(65520.0), 0x7c00);
        assert_eq!(f32_to_f16(f32::NEG_INFINITY), 0xfc00);
        assert!(f16_to_f32(f32_to_f16(f32::NAN)).is_nan() && bf16_to_f32(f32_to_bf16(f32::NAN)).is_nan());
        // Halfway cases go to the even neighbour.
        assert_eq!(f32_to_f16(1.0 + 2f32.powi(-11)), 0x3c00);
        assert_eq!(f32_to_f16(1.0 + 3.0 * 2f32.powi(-11)), 0x3c02);
        assert_eq!(f32_to_bf16(f32::from_bits(0x3f80_8000)), 0x3f80);
        assert_eq!(f32_to_bf16(f32::from_bits(0x3f81_8000)), 0x3f82);
    }

    #[test]
    fn every_16_bit_value_survives() {
        for h in 0..=u16::MAX {
            let (f, b) = (f16_to_f32(h), bf16_to_f32(h));
            assert!(f.is_nan() || f32_to_f16(f) == h, "{h:#x}");
            assert!(b.is_nan() || f32_to_bf16(b) == h, "{h:#x}");
        }
    }
}
