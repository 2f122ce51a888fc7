//! Floating-point arithmetic and conversions.

use super::alu::{extend, low};
use crate::isa::{Float1, Float2, Op, Round, Ty};
use crate::num;
use crate::warp::Warp;

/// A 16-bit pair works on its halves, everything else on the whole.
fn halves(ty: Ty) -> Option<Ty> {
    match ty {
        Ty::Bf16x2 => Some(Ty::Bf16),
        Ty::F16x2 => Some(Ty::F16),
        _ => None,
    }
}

fn widen(ty: Ty, x: u64) -> f32 {
    match ty {
        Ty::Bf16 => num::bf16_to_f32(x as u16),
        Ty::F16 => num::f16_to_f32(x as u16),
        _ => f32::from_bits(x as u32),
    }
}

fn narrow(ty: Ty, x: f32) -> u64 {
    match ty {
        Ty::Bf16 => num::f32_to_bf16(x).into(),
        Ty::F16 => num::f32_to_f16(x).into(),
        _ => x.to_bits().into(),
    }
}

/// Applies a function of up to three f32 to a register of the type.
fn apply(ty: Ty, x: [u64; 3], f: &dyn Fn([f32; 3]) -> f32) -> u64 {
    match halves(ty) {
        Some(h) => {
            let part = |s: u32| narrow(h, f(x.map(|x| widen(h, x >> s & 0xffff))));
            part(0) | part(16) << 16
        }
        None => narrow(ty, f(x.map(|x| widen(ty, x)))),
    }
}

pub(super) fn exec(w: &mut Warp, op: &Op, on: u32) {
    let (d, v) = match op {
        Op::Float1 { f, ty, ftz, d, a } => {
            let v = w.get(*a).map(|x| match (ty, f) {
                (Ty::F64, Float1::Neg) => x ^ 1 << 63,
                (Ty::F64, Float1::Abs) => x & !(1 << 63),
                (Ty::F64, _) => approx(*f, f64::from_bits(x)).to_bits(),
                _ => apply(*ty, [x, 0, 0], &|x| float1(*f, x[0], *ftz)),
            });
            (*d, v)
        }
        Op::Float2 { f, ty, ftz, sat, d, a, b } => {
            let (a, b) = (w.get(*a), w.get(*b));
            let v = std::array::from_fn(|l| match ty {
                Ty::F64 => double(*f, f64::from_bits(a[l]), f64::from_bits(b[l])).to_bits(),
                _ => apply(*ty, [a[l], b[l], 0], &|x| float2(*f, x[0], x[1], *ftz, *sat)),
            });
            (*d, v)
        }
        Op::Fma { ty, ftz, sat, relu, d, a, b, c } => {
            let (a, b, c) = (w.get(*a), w.get(*b), w.get(*c));
            let flush = |x: f32| if *ftz { num::flush(x) } else { x };
            let small = !matches!(ty, Ty::F32);
            let v = std::array::from_fn(|l| match ty {
                Ty::F64 => f64::from_bits(a[l]).mul_add(f64::from_bits(b[l]), f64::from_bits(c[l])).to_bits(),
                _ => apply(*ty, [a[l], b[l], c[l]], &|x| {
                    let [x, y, z] = x.map(flush);
                    let r = flush(if small { num::fma_to_odd(x, y, z) } else { num::fma(x, y, z) });
                    let r = if *relu { num::max(r, 0.0, true) } else { r };
                    if *sat { num::saturate(r) } else { r }
                }),
            });
            (*d, v)
        }
        Op::CvtPack { to, round, relu, d, hi, lo } => {
            let (hi, lo) = (w.get(*hi), w.get(*lo));
            let h = halves(*to).unwrap_or(Ty::Bf16);
            let one = |x: u64| {
                let x = f32::from_bits(x as u32);
                to_float(if *relu { num::max(x, 0.0, true) } else { x }, h, *round)
            };
            (*d, std::array::from_fn(|l| one(hi[l]) << 16 | one(lo[l])))
        }
        Op::Cvt { to, from, round, ftz, sat, relu, d, a } => {
            let v = w.get(*a).map(|x| cvt(x, *to, *from, *round, (*ftz, *sat, *relu)));
            (*d, v)
        }
        _ => unreachable!("dispatched elsewhere"),
    };
    w.put(d, on, &v);
}

fn approx(f: Float1, x: f64) -> f64 {
    match f {
        Float1::Neg => -x,
        Float1::Abs => x.abs(),
        Float1::Ex2 => x.exp2(),
        Float1::Lg2 => x.log2(),
        Float1::Rcp => 1.0 / x,
        Float1::Rsqrt => 1.0 / x.sqrt(),
        Float1::Sqrt => x.sqrt(),
        Float1::Tanh => x.tanh(),
        Float1::Sin => x.sin(),
        Float1::Cos => x.cos(),
    }
}

fn float1(f: Float1, x: f32, ftz: bool) -> f32 {
    let flush = |x: f32| if ftz { num::flush(x) } else { x };
    match f {
        Float1::Neg => flush(-x),
        Float1::Abs => flush(x.abs()),
        Float1::Sqrt => flush(flush(x).sqrt()),
        _ => flush(approx(f, flush(x).into()) as f32),
    }
}

fn float2(f: Float2, a: f32, b: f32, ftz: bool, sat: bool) -> f32 {
    let flush = |x: f32| if ftz { num::flush(x) } else { x };
    let (a, b) = (flush(a), flush(b));
    let r = flush(match f {
        Float2::Add => a + b,
        Float2::Sub => a - b,
        Float2::Mul => a * b,
        Float2::Div => a / b,
        Float2::Min => num::min(a, b, false),
        Float2::Max => num::max(a, b, false),
        Float2::MinNan => num::min(a, b, true),
        Float2::MaxNan => num::max(a, b, true),
        Float2::Copysign => a.copysign(b),
    });
    if sat { num::saturate(r) } else { r }
}

fn double(f: Float2, a: f64, b: f64) -> f64 {
    match f {
        Float2::Add => a + b,
        Float2::Sub => a - b,
        Float2::Mul => a * b,
        Float2::Div => a / b,
        Float2::Min => a.min(b),
        Float2::Max => a.max(b),
        Float2::MinNan | Float2::MaxNan if a.is_nan() || b.is_nan() => f64::NAN,
        Float2::MinNan => a.min(b),
        Float2::MaxNan => a.max(b),
        Float2::Copysign => a.copysign(b),
    }
}

/// An f32 as bits of another float type.
fn to_float(x: f32, to: Ty, round: Round) -> u64 {
    match (to, round) {
        (Ty::Bf16, Round::Zero) => (num::truncate(x, 16) >> 16).into(),
        (Ty::F16, Round::Zero) => {
            let n = num::f32_to_f16(x);
            let over = num::f16_to_f32(n).abs() > x.abs();
            (if over { n - 1 } else { n }).into()
        }
        (Ty::Tf32, Round::NearAway) => num::tf32_rna(x).into(),
        (Ty::Tf32, Round::Zero) => num::truncate(x, 13).into(),
        (Ty::Tf32, _) => num::tf32_rn(x).into(),
        (Ty::F64, _) => f64::from(x).to_bits(),
        _ => narrow(to, x),
    }
}

fn integral(x: f64, round: Round) -> f64 {
    match round {
        Round::Near | Round::NearI => x.round_ties_even(),
        Round::Zero | Round::ZeroI => x.trunc(),
        Round::Down | Round::DownI => x.floor(),
        Round::Up | Round::UpI => x.ceil(),
        Round::NearAway => x.round(),
        Round::None => x,
    }
}

fn cvt(x: u64, to: Ty, from: Ty, round: Round, (ftz, sat, relu): (bool, bool, bool)) -> u64 {
    if !from.is_float() {
        let i = extend(x, from);
        return match to {
            Ty::F64 => (i as f64).to_bits(),
            Ty::F32 => (i as f32).to_bits().into(),
            t if t.is_float() => narrow(t, i as f32),
            t if sat => clamp(i, t),
            t => low(i as u64, t.bits()),
        };
    }
    let wide = if from == Ty::F64 { f64::from_bits(x) } else { widen(from, x).into() };
    let wide = if ftz && from == Ty::F32 { f64::from(num::flush(wide as f32)) } else { wide };
    if !to.is_float() {
        let v = integral(wide, round);
        return if v.is_nan() { if to.bits() == 64 { 1 << 63 } else { 0 } } else { clamp(v as i128, to) };
    }
    let kind = matches!(round, Round::NearI | Round::ZeroI | Round::DownI | Round::UpI);
    let v = if kind { integral(wide, round) } else { wide };
    if to == Ty::F64 {
        return v.to_bits();
    }
    let v = v as f32;
    let v = if ftz && to == Ty::F32 { num::flush(v) } else { v };
    let v = if relu { num::max(v, 0.0, true) } else { v };
    to_float(if sat { num::saturate(v) } else { v }, to, round)
}

fn clamp(i: i128, to: Ty) -> u64 {
    let bits = to.bits();
    let (lo, hi) =
        if to.signed() { (-(1i128 << (bits - 1)), (1i128 << (bits - 1)) - 1) } else { (0, (1i128 << bits) - 1) };
    low(i.clamp(lo, hi) as u64, bits)
}
