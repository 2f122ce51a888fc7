//! Integers, predicates, moves and comparisons.

use super::logic;
use crate::isa::{Cmp, Int1, Int2, Int3, Op, Ty};
use crate::num::{bf16_to_f32, f16_to_f32, flush};
use crate::warp::{Lanes, Warp, lanes};

/// The low bits.
pub(super) fn low(x: u64, bits: u32) -> u64 {
    if bits >= 64 { x } else { x & ((1 << bits) - 1) }
}

/// Sign or zero extension from a type's width.
pub(super) fn extend(x: u64, ty: Ty) -> i128 {
    let bits = ty.bits();
    let x = low(x, bits);
    if ty.signed() && bits < 64 {
        i128::from(((x << (64 - bits)) as i64) >> (64 - bits))
    } else if ty.signed() {
        i128::from(x as i64)
    } else {
        i128::from(x)
    }
}

pub(super) fn exec(w: &mut Warp, op: &Op, on: u32) {
    match op {
        Op::Mov { d, a, bits } => {
            let v = w.get(*a).map(|x| low(x, *bits));
            w.put(*d, on, &v);
        }
        Op::Pack { d, parts, bits } => {
            let mut v = [0; 32];
            for (i, p) in parts.iter().enumerate() {
                let x = w.get(*p);
                v.iter_mut().zip(x).for_each(|(v, x)| *v |= low(x, *bits) << (i as u32 * bits));
            }
            w.put(*d, on, &v);
        }
        Op::Unpack { d, a, bits } => {
            let x = w.get(*a);
            for (i, d) in d.iter().enumerate() {
                if let Some(d) = d {
                    w.put(*d, on, &x.map(|x| low(x >> (i as u32 * bits), *bits)));
                }
            }
        }
        Op::PredLogic { f, d, a, b } => {
            let v = logic(*f, w.pred(*a), w.pred(*b));
            w.put_pred(*d, on, v);
        }
        Op::Int1 { f, ty, d, a } => {
            let v = w.get(*a).map(|x| int1(*f, *ty, x));
            w.put(*d, on, &v);
        }
        Op::Int2 { f, ty, d, a, b } => {
            let v = int2(*f, *ty, &w.get(*a), &w.get(*b));
            w.put(*d, on, &v);
        }
        Op::Int3 { f, ty, d, a, b, c } => {
            let (a, b, c) = (w.get(*a), w.get(*b), w.get(*c));
            let v = std::array::from_fn(|l| int3(*f, *ty, a[l], b[l], c[l]));
            w.put(*d, on, &v);
        }
        Op::Bfi { bits, d, a, b, pos, len } => {
            let (a, b, p, n) = (w.get(*a), w.get(*b), w.get(*pos), w.get(*len));
            let v = std::array::from_fn(|l| {
                let (p, n) = ((p[l] & 255) as u32, (n[l] & 255) as u32);
                let field = if p >= *bits { 0 } else { low(low(u64::MAX, n) << p, *bits) };
                (low(b[l], *bits) & !field) | (if p >= *bits { 0 } else { a[l] << p } & field)
            });
            w.put(*d, on, &v);
        }
        Op::Setp { cmp, ty, ftz, d, q, a, b, with } => {
            let (a, b) = (w.get(*a), w.get(*b));
            let mut m = 0;
            for l in lanes(on) {
                m |= u32::from(compare(*cmp, *ty, *ftz, a[l], b[l])) << l;
            }
            let other = with.map(|(f, p)| (f, w.pred(p)));
            let join = |m: u32| other.map_or(m, |(f, p)| logic(f, m, p));
            if let Some(d) = d {
                w.put_pred(*d, on, join(m));
            }
            if let Some(q) = q {
                w.put_pred(*q, on, join(!m));
            }
        }
        Op::Selp { bits, d, a, b, p } => {
            let (a, b, p) = (w.get(*a), w.get(*b), w.pred(*p));
            let v = std::array::from_fn(|l| low(if p >> l & 1 == 1 { a[l] } else { b[l] }, *bits));
            w.put(*d, on, &v);
        }
        _ => unreachable!("dispatched elsewhere"),
    }
}

fn int1(f: Int1, ty: Ty, x: u64) -> u64 {
    let bits = ty.bits();
    let u = low(x, bits);
    match f {
        Int1::Neg => low(u.wrapping_neg(), bits),
        Int1::Not => low(!u, bits),
        Int1::Abs => low(extend(x, ty).unsigned_abs() as u64, bits),
        Int1::Popc => u64::from(u.count_ones()),
        Int1::Clz => u64::from(u.leading_zeros() - (64 - bits)),
        Int1::Brev => u.reverse_bits() >> (64 - bits),
        Int1::Bfind | Int1::BfindShift => {
            let v = if ty.signed() && extend(x, ty) < 0 { low(!u, bits) } else { u };
            if v == 0 {
                0xffff_ffff
            } else {
                let at = u64::from(63 - v.leading_zeros());
                if f == Int1::Bfind { at } else { u64::from(bits) - 1 - at }
            }
        }
    }
}

fn int2(f: Int2, ty: Ty, a: &Lanes, b: &Lanes) -> Lanes {
    let bits = ty.bits();
    let map = |g: &dyn Fn(u64, u64) -> u64| std::array::from_fn(|l| g(a[l], b[l]));
    let wide = |g: &dyn Fn(i128, i128) -> i128| std::array::from_fn(|l| g(extend(a[l], ty), extend(b[l], ty)) as u64);
    let v: Lanes = match f {
        Int2::Add => std::array::from_fn(|l| a[l].wrapping_add(b[l])),
        Int2::Sub => std::array::from_fn(|l| a[l].wrapping_sub(b[l])),
        Int2::Mul => std::array::from_fn(|l| a[l].wrapping_mul(b[l])),
        Int2::And => std::array::from_fn(|l| a[l] & b[l]),
        Int2::Or => std::array::from_fn(|l| a[l] | b[l]),
        Int2::Xor => std::array::from_fn(|l| a[l] ^ b[l]),
        Int2::Shl => map(&|x, n| if n as u32 >= bits { 0 } else { x << (n as u32) }),
        Int2::Shr => wide(&|x, n| x >> (n as u32).min(if ty.signed() { bits - 1 } else { 127 })),
        Int2::MulHi => wide(&|x, y| mul_hi(x, y, bits)),
        Int2::MulWide => return wide(&|x, y| x * y).map(|x| low(x, 2 * bits)),
        // A division by zero gives all ones, as on the device; its value is unspecified.
        Int2::Div => wide(&|x, y| if y == 0 { -1 } else { x / y }),
        Int2::Rem => wide(&|x, y| if y == 0 { x } else { x % y }),
        Int2::Min => wide(&|x, y| x.min(y)),
        Int2::Max => wide(&|x, y| x.max(y)),
    };
    v.map(|x| low(x, bits))
}

fn mul_hi(x: i128, y: i128, bits: u32) -> i128 {
    if x >= 0 && y >= 0 { ((x as u128 * y as u128) >> bits) as i128 } else { (x * y) >> bits }
}

fn int3(f: Int3, ty: Ty, a: u64, b: u64, c: u64) -> u64 {
    let bits = ty.bits();
    let (x, y, z) = (a as u32, b as u32, c as u32);
    match f {
        Int3::Mad => low(a.wrapping_mul(b).wrapping_add(c), bits),
        Int3::MadHi => low((mul_hi(extend(a, ty), extend(b, ty), bits) as u64).wrapping_add(c), bits),
        Int3::MadWide => low(((extend(a, ty) * extend(b, ty)) as u64).wrapping_add(c), 2 * bits),
        Int3::Bfe => {
            let (pos, len) = ((b & 255) as u32, (c & 255) as u32);
            if len == 0 {
                return 0;
            }
            // Bits above the number are its sign.
            let v = extend(a, ty) >> pos.min(if ty.signed() { bits - 1 } else { 127 });
            if len >= bits {
                return low(v as u64, bits);
            }
            let field = low(v as u64, len);
            let top = extend(a, ty) >> (pos + len - 1).min(bits - 1) & 1;
            low(if ty.signed() && top == 1 { field | u64::MAX << len } else { field }, bits)
        }
        Int3::Prmt => {
            let pool = low(a, 32) | b << 32;
            (0..4).fold(0, |v, i| {
                let s = (c >> (4 * i)) & 15;
                let byte = (pool >> (8 * (s & 7))) & 255;
                let byte = if s & 8 == 0 {
                    byte
                } else if byte & 128 == 0 {
                    0
                } else {
                    255
                };
                v | byte << (8 * i)
            })
        }
        Int3::ShfLWrap | Int3::ShfLClamp => {
            let n = if f == Int3::ShfLWrap { z & 31 } else { z.min(32) };
            let v = (u64::from(y) << 32 | u64::from(x)) as u128;
            ((v << n) >> 32) as u64 & 0xffff_ffff
        }
        Int3::ShfRWrap | Int3::ShfRClamp => {
            let n = if f == Int3::ShfRWrap { z & 31 } else { z.min(32) };
            (u64::from(y) << 32 | u64::from(x)) >> n & 0xffff_ffff
        }
        Int3::Lop3(lut) => (0..8).filter(|i| lut >> i & 1 == 1).fold(0, |v, i| {
            let pick = |x: u32, on: bool| if on { x } else { !x };
            v | u64::from(pick(x, i & 4 != 0) & pick(y, i & 2 != 0) & pick(z, i & 1 != 0))
        }),
        Int3::Dp4a => {
            let byte = |v: u64, i: u32| extend(v >> (8 * i), if ty.signed() { Ty::S(8) } else { Ty::U(8) });
            let sum: i128 = (0..4).map(|i| byte(a, i) * byte(b, i)).sum();
            low((sum as u64).wrapping_add(c), 32)
        }
    }
}

fn compare(cmp: Cmp, ty: Ty, ftz: bool, a: u64, b: u64) -> bool {
    use std::cmp::Ordering::{Equal, Greater, Less};
    let order = match ty {
        Ty::F32 => {
            let f = |x: u64| if ftz { flush(f32::from_bits(x as u32)) } else { f32::from_bits(x as u32) };
            f(a).partial_cmp(&f(b))
        }
        Ty::F64 => f64::from_bits(a).partial_cmp(&f64::from_bits(b)),
        Ty::Bf16 => bf16_to_f32(a as u16).partial_cmp(&bf16_to_f32(b as u16)),
        Ty::F16 => f16_to_f32(a as u16).partial_cmp(&f16_to_f32(b as u16)),
        _ => Some(extend(a, ty).cmp(&extend(b, ty))),
    };
    let Some(o) = order else {
        // `ne` is an ordered comparison: false for a NaN.
        return matches!(cmp, Cmp::Equ | Cmp::Neu | Cmp::Ltu | Cmp::Leu | Cmp::Gtu | Cmp::Geu | Cmp::Nan);
    };
    match cmp {
        Cmp::Eq | Cmp::Equ => o == Equal,
        Cmp::Ne | Cmp::Neu => o != Equal,
        Cmp::Lt | Cmp::Ltu => o == Less,
        Cmp::Le | Cmp::Leu => o != Greater,
        Cmp::Gt | Cmp::Gtu => o == Greater,
        Cmp::Ge | Cmp::Geu => o != Less,
        Cmp::Num => true,
        Cmp::Nan => false,
    }
}
