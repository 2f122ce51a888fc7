//! Element types of tensor files, and their conversion to f32.

use pleach_plan::DType;
use safetensors::Dtype;

/// The plan's name of a file's element type; `None` for types no plan reads.
pub(crate) fn from_file(d: Dtype) -> Option<DType> {
    Some(match d {
        Dtype::F32 => DType::F32,
        Dtype::BF16 => DType::BF16,
        Dtype::F16 => DType::F16,
        Dtype::I32 => DType::I32,
        Dtype::BOOL => DType::Bool,
        _ => return None,
    })
}

/// IEEE binary16 to binary32, exact.
pub fn f16_to_f32(h: u16) -> f32 {
    let sign = u32::from(h >> 15) << 31;
    let (exp, frac) = (u32::from(h >> 10) & 31, u32::from(h) & 1023);
    let bits = match (exp, frac) {
        (0, 0) => 0,
        (0, _) => {
            // Subnormal: frac * 2^-24.
            let shift = frac.leading_zeros() - 21;
            ((113 - shift) << 23) | ((frac << (shift + 13)) & 0x7f_ffff)
        }
        (31, _) => 0x7f80_0000 | (frac << 13),
        _ => ((exp + 112) << 23) | (frac << 13),
    };
    f32::from_bits(sign | bits)
}

/// binary32 to bfloat16, to the nearest, ties to even; a NaN stays one.
pub fn f32_to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

/// True when values of type `from` can be given where the plan wants `to`.
pub(crate) fn castable(from: DType, to: DType) -> bool {
    let float = |d| matches!(d, DType::F32 | DType::BF16 | DType::F16);
    from == to || (float(from) && matches!(to, DType::F32 | DType::BF16))
}

/// Converts the bytes of a tensor. `to` has room for all of them; see [`castable`].
pub(crate) fn cast(from: DType, bytes: &[u8], want: DType, to: &mut [u8]) {
    let half = |f: &dyn Fn(u16) -> f32, to: &mut [u8]| {
        for (x, y) in bytes.chunks_exact(2).zip(to.chunks_exact_mut(4)) {
            y.copy_from_slice(&f(u16::from_le_bytes([x[0], x[1]])).to_le_bytes());
        }
    };
    match (from, want) {
        (DType::BF16, DType::F32) => half(&|h| f32::from_bits(u32::from(h) << 16), to),
        (DType::F16, DType::F32) => half(&f16_to_f32, to),
        (DType::F32, DType::BF16) => {
            for (x, y) in bytes.as_chunks().0.iter().zip(to.chunks_exact_mut(2)) {
                y.copy_from_slice(&f32_to_bf16(f32::from_le_bytes(*x)).to_le_bytes());
            }
        }
        (DType::F16, DType::BF16) => {
            for (x, y) in bytes.as_chunks().0.iter().zip(to.chunks_exact_mut(2)) {
                y.copy_from_slice(&f32_to_bf16(f16_to_f32(u16::from_le_bytes(*x))).to_le_bytes());
            }
        }
        _ => {
            let n = bytes.len().min(to.len());
            to[..n].copy_from_slice(&bytes[..n]);
        }
    }
}

/// The same by several threads where there is enough to do.
pub(crate) fn cast_wide(from: DType, bytes: &[u8], want: DType, to: &mut [u8]) {
    const PART: usize = 1 << 20;
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(to.len() / PART);
    if threads < 2 {
        return cast(from, bytes, want, to);
    }
    let (a, b) = (from.size() as usize, want.size() as usize);
    let elements = (to.len() / b).div_ceil(threads);
    std::thread::scope(|s| {
        for (x, y) in bytes.chunks(elements * a).zip(to.chunks_mut(elements * b)) {
            s.spawn(move || cast(from, x, want, y));
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn converts_every_half_exactly() {
        for (h, x) in [
            (0x3c00, 1.0),
            (0xc000, -2.0),
            (0x7bff, 65504.0),
            (0x0001, 5.960_464_5e-8),
            (0x03ff, 6.097_555_e-5),
            (0x0400, 6.103_515_6e-5),
        ] {
            assert_eq!(f16_to_f32(h), x);
        }
        assert_eq!(f16_to_f32(0x8000).to_bits(), (-0.0f32).to_bits());
        assert_eq!(f16_to_f32(0x7c00), f32::INFINITY);
        assert!(f16_to_f32(0x7e00).is_nan());
        // All finite values: value = (-1)^s * frac * 2^(exp - 25), computed in f64.
        for h in 0..=u16::MAX {
            let (e, f) = ((h >> 10) & 31, f64::from(h & 1023));
            if e == 31 {
                continue;
            }
            let m = if e == 0 { f * 2f64.powi(-24) } else { (f + 1024.0) * 2f64.powi(i32::from(e) - 25) };
            assert_eq!(f64::from(f16_to_f32(h)), if h >> 15 == 1 { -m } else { m }, "{h:#x}");
        }
        let mut out = [0u8; 8];
        cast(DType::BF16, &[0x80, 0x3f, 0x00, 0xc0], DType::F32, &mut out);
        let round = |x: u32| f32_to_bf16(f32::from_bits(x));
        let ties = [0x3f80_8000, 0x3f81_8000, 0x3f80_8001, 0x3f80_7fff, 0xff80_0000, 0x7f7f_ffff];
        assert_eq!(ties.map(round), [0x3f80, 0x3f82, 0x3f81, 0x3f80, 0xff80, 0x7f80]);
        assert_eq!(round(0x7f80_0001), 0x7fc0);
        let mut narrow = [0u8; 2];
        cast(DType::F16, &0x3c00u16.to_le_bytes(), DType::BF16, &mut narrow);
        assert_eq!(narrow, 0x3f80u16.to_le_bytes());
        assert_eq!(out, [1.0f32.to_le_bytes(), (-2.0f32).to_le_bytes()].concat()[..]);
    }
}
