//! Number formats and the roundings of single instructions.

/// bf16 bits to f32.
pub fn bf16_to_f32(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

/// f32 to bf16 bits, to nearest, ties to even; a NaN becomes 0x7fff as on the device.
pub fn f32_to_bf16(x: f32) -> u16 {
    let u = x.to_bits();
    if x.is_nan() {
        return 0x7fff;
    }
    (u.wrapping_add(0x7fff + ((u >> 16) & 1)) >> 16) as u16
}

/// f16 bits to f32.
pub fn f16_to_f32(x: u16) -> f32 {
    let (sign, exp, man) = (u32::from(x >> 15) << 31, u32::from(x >> 10) & 31, u32::from(x) & 1023);
    match (exp, man) {
        (0, _) => f32::from_bits(sign | (man as f32 * 2f32.powi(-24)).to_bits()),
        (31, _) => f32::from_bits(sign | 0x7f80_0000 | man << 13),
        _ => f32::from_bits(sign | (exp + 112) << 23 | man << 13),
    }
}

/// f32 to f16 bits, to nearest, ties to even; a NaN becomes 0x7fff as on the device.
pub fn f32_to_f16(x: f32) -> u16 {
    if x.is_nan() {
        return 0x7fff;
    }
    let sign = ((x.to_bits() >> 16) & 0x8000) as u16;
    let a = x.abs();
    if a >= 65520.0 {
        return sign | 0x7c00;
    }
    // The unit in the last place; multiplying by its inverse is exact.
    let exp = ((a.to_bits() >> 23) as i32 - 127).max(-14);
    let steps = (a * 2f32.powi(10 - exp)).round_ties_even() as u32;
    sign | (((exp + 14) as u32 * 1024) + steps) as u16
}

/// f32 towards zero with only the upper `32 - drop` bits kept.
pub(crate) fn truncate(x: f32, drop: u32) -> u32 {
    if x.is_nan() { 0x7fff_ffff } else { x.to_bits() >> drop << drop }
}

/// f32 to tf32, to nearest, ties away from zero.
pub(crate) fn tf32_rna(x: f32) -> u32 {
    if !x.is_finite() {
        return x.to_bits();
    }
    x.to_bits().wrapping_add(0x1000) & !0x1fff
}

/// f32 to tf32, to nearest, ties to even.
pub(crate) fn tf32_rn(x: f32) -> u32 {
    if !x.is_finite() {
        return x.to_bits();
    }
    let u = x.to_bits();
    u.wrapping_add(0xfff + ((u >> 13) & 1)) & !0x1fff
}

/// `a * b + c` in f64, rounded to odd: a later rounding to at most 25 bits of mantissa is then exact. `a * b` is exact.
fn fma_odd(a: f32, b: f32, c: f32) -> f64 {
    let (p, c) = (f64::from(a) * f64::from(b), f64::from(c));
    let s = p + c;
    if !s.is_finite() {
        return s;
    }
    let t = s - p;
    let e = (p - (s - t)) + (c - t);
    if e == 0.0 || s.to_bits() & 1 == 1 {
        return s;
    }
    let up = (e > 0.0) == (s > 0.0);
    f64::from_bits(if up { s.to_bits() + 1 } else { s.to_bits() - 1 })
}

/// Fused multiply-add, rounded once to nearest.
pub(crate) fn fma(a: f32, b: f32, c: f32) -> f32 {
    fma_odd(a, b, c) as f32
}

/// Fused multiply-add whose f32 result is rounded to odd, for a further rounding to 16 bits.
pub(crate) fn fma_to_odd(a: f32, b: f32, c: f32) -> f32 {
    let s = fma_odd(a, b, c);
    let r = s as f32;
    if f64::from(r) == s || !r.is_finite() {
        return r;
    }
    // Back to the neighbour towards zero, then a sticky last bit.
    let down = f64::from(r).abs() > s.abs();
    let bits = if down { r.to_bits() - 1 } else { r.to_bits() };
    f32::from_bits(bits | 1)
}

/// Subnormal numbers become zero of the same sign.
pub(crate) fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

/// Zero below one.
pub(crate) fn saturate(x: f32) -> f32 {
    if x.is_nan() { 0.0 } else { x.clamp(0.0, 1.0) + 0.0 }
}

const NAN: f32 = f32::from_bits(0x7fff_ffff);

/// The smaller number; a NaN loses unless `nan`; -0 is below +0.
pub(crate) fn min(a: f32, b: f32, nan: bool) -> f32 {
    match (a.is_nan(), b.is_nan()) {
        (true, true) => NAN,
        (true, false) => {
            if nan {
                NAN
            } else {
                b
            }
        }
        (false, true) => {
            if nan {
                NAN
            } else {
                a
            }
        }
        _ if a == b => {
            if a.is_sign_negative() {
                a
            } else {
                b
            }
        }
        _ => {
            if a < b {
                a
            } else {
                b
            }
        }
    }
}

/// The larger number, as [`min`].
pub(crate) fn max(a: f32, b: f32, nan: bool) -> f32 {
    -min(-a, -b, nan)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_survives_a_round_trip() {
        for x in 0..=u16::MAX {
            let (f, b) = (f16_to_f32(x), bf16_to_f32(x));
            assert!(f.is_nan() || f32_to_f16(f) == x, "{x:#x}");
            assert!(b.is_nan() || f32_to_bf16(b) == x, "{x:#x}");
        }
    }

    #[test]
    fn rounding_to_nearest_even() {
        assert_eq!(f32_to_bf16(1.0 + 1.0 / 256.0), 0x3f80, "tie to even");
        assert_eq!(f32_to_bf16(1.0 + 3.0 / 256.0), 0x3f82, "tie to even, up");
        assert_eq!(f32_to_f16(65519.9), 0x7bff);
        assert_eq!(f32_to_f16(65520.0), 0x7c00);
        assert_eq!(f32_to_f16(2f32.powi(-25)), 0, "tie to even below the smallest");
        assert_eq!(f32_to_f16(2f32.powi(-25) * 1.01), 1);
    }

    #[test]
    fn fma_rounds_once() {
        // A deterministic walk over bit patterns, among them subnormals and cancellation.
        let mut s = 0x9e37_79b9_7f4a_7c15u64;
        let mut next = || {
            s = s.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            f32::from_bits((s >> 32) as u32)
        };
        for _ in 0..200_000 {
            let (a, b, mut c) = (next(), next(), next());
            if c.to_bits() & 3 == 0 {
                c = -(a * b);
            }
            let (x, y) = (fma(a, b, c), a.mul_add(b, c));
            assert!(x == y || (x.is_nan() && y.is_nan()), "{a:e} {b:e} {c:e}: {x:e} {y:e}");
        }
    }

    #[test]
    fn minimum_of_zeros_and_nans() {
        assert!(min(0.0, -0.0, false).is_sign_negative() && !max(-0.0, 0.0, false).is_sign_negative());
        assert_eq!(max(f32::NAN, 2.0, false), 2.0);
        assert!(max(f32::NAN, 2.0, true).is_nan());
    }
}
