//! Arithmetic, logic, comparisons, conversions and moves.

use super::{Cx, Res};
use crate::isa::{BoolOp, Cmp, Float1, Float2, Int1, Int2, Int3, Op, PSrc, Round, Ty};
use crate::parse::Arg;

pub(super) fn decode(head: &str, cx: &mut Cx) -> Res<Op> {
    match head {
        "mov" => return mov(cx),
        "setp" => return setp(cx),
        "selp" => return selp(cx),
        "cvt" => return cvt(cx),
        "and" | "or" | "xor" | "not" if cx.take("pred") => return pred_logic(head, cx),
        "prmt" => {
            cx.ty()?;
            return int3(Int3::Prmt, Ty::B(32), cx);
        }
        "shf" => {
            let (left, right) = (cx.take("l"), cx.take("r"));
            let (wrap, clamp) = (cx.take("wrap"), cx.take("clamp"));
            cx.ty()?;
            let f = match (left, right, wrap, clamp) {
                (true, false, true, false) => Int3::ShfLWrap,
                (false, true, true, false) => Int3::ShfRWrap,
                (true, false, false, true) => Int3::ShfLClamp,
                (false, true, false, true) => Int3::ShfRClamp,
                _ => return Err(cx.unknown()),
            };
            return int3(f, Ty::B(32), cx);
        }
        "lop3" => {
            cx.ty()?;
            cx.count(5)?;
            let lut = cx.int(4)? as u8;
            return Ok(Op::Int3 {
                f: Int3::Lop3(lut),
                ty: Ty::B(32),
                d: cx.d()?,
                a: cx.src(1)?,
                b: cx.src(2)?,
                c: cx.src(3)?,
            });
        }
        "dp4a" => {
            let ty = cx.ty()?;
            let other = cx.ty()?;
            if ty != other {
                return Err(cx.unknown());
            }
            return int3(Int3::Dp4a, ty, cx);
        }
        "bfi" => {
            let bits = cx.ty()?.bits();
            cx.count(5)?;
            let (a, b, pos, len) = (cx.src(1)?, cx.src(2)?, cx.src(3)?, cx.src(4)?);
            return Ok(Op::Bfi { bits, d: cx.d()?, a, b, pos, len });
        }
        _ => {}
    }
    let ty = cx.ty()?;
    if ty.is_float() { float(head, ty, cx) } else { int(head, ty, cx) }
}

fn int3(f: Int3, ty: Ty, cx: &Cx) -> Res<Op> {
    cx.count(4)?;
    Ok(Op::Int3 { f, ty, d: cx.d()?, a: cx.src(1)?, b: cx.src(2)?, c: cx.src(3)? })
}

fn int(head: &str, ty: Ty, cx: &mut Cx) -> Res<Op> {
    let (lo, hi, wide) = (cx.take("lo"), cx.take("hi"), cx.take("wide"));
    let f2 = match head {
        "add" => Some(Int2::Add),
        "sub" => Some(Int2::Sub),
        "mul" if lo => Some(Int2::Mul),
        "mul" if hi => Some(Int2::MulHi),
        "mul" if wide => Some(Int2::MulWide),
        "div" => Some(Int2::Div),
        "rem" => Some(Int2::Rem),
        "min" => Some(Int2::Min),
        "max" => Some(Int2::Max),
        "and" => Some(Int2::And),
        "or" => Some(Int2::Or),
        "xor" => Some(Int2::Xor),
        "shl" => Some(Int2::Shl),
        "shr" => Some(Int2::Shr),
        _ => None,
    };
    if let Some(f) = f2 {
        cx.count(3)?;
        return Ok(Op::Int2 { f, ty, d: cx.d()?, a: cx.src(1)?, b: cx.src(2)? });
    }
    let f1 = match head {
        "neg" => Some(Int1::Neg),
        "abs" => Some(Int1::Abs),
        "not" => Some(Int1::Not),
        "popc" => Some(Int1::Popc),
        "clz" => Some(Int1::Clz),
        "brev" => Some(Int1::Brev),
        "bfind" if cx.take("shiftamt") => Some(Int1::BfindShift),
        "bfind" => Some(Int1::Bfind),
        _ => None,
    };
    if let Some(f) = f1 {
        cx.count(2)?;
        return Ok(Op::Int1 { f, ty, d: cx.d()?, a: cx.src(1)? });
    }
    match head {
        "mad" if lo => int3(Int3::Mad, ty, cx),
        "mad" if hi => int3(Int3::MadHi, ty, cx),
        "mad" if wide => int3(Int3::MadWide, ty, cx),
        "bfe" => int3(Int3::Bfe, ty, cx),
        _ => Err(cx.unknown()),
    }
}

fn float(head: &str, ty: Ty, cx: &mut Cx) -> Res<Op> {
    // Rounding other than to nearest is not known and stays in the list, which is an error.
    let _ = cx.take("rn");
    let (ftz, sat, nan, relu) = (cx.take("ftz"), cx.take("sat"), cx.take("NaN"), cx.take("relu"));
    let approx = cx.take("approx") | cx.take("full");
    let two = |f: Float2| (f, false);
    let f2 = match head {
        "add" => Some(two(Float2::Add)),
        "sub" => Some(two(Float2::Sub)),
        "mul" => Some(two(Float2::Mul)),
        "div" => Some((Float2::Div, true)),
        "min" if nan => Some(two(Float2::MinNan)),
        "max" if nan => Some(two(Float2::MaxNan)),
        "min" => Some(two(Float2::Min)),
        "max" => Some(two(Float2::Max)),
        "copysign" => Some(two(Float2::Copysign)),
        _ => None,
    };
    if let Some((f, may_approx)) = f2 {
        cx.count(3)?;
        if (approx && !may_approx) || relu {
            return Err(cx.unknown());
        }
        let (mut a, mut b) = (cx.src(1)?, cx.src(2)?);
        if f == Float2::Copysign {
            // The sign comes first.
            std::mem::swap(&mut a, &mut b);
        }
        return Ok(Op::Float2 { f, ty, ftz, sat, d: cx.d()?, a, b });
    }
    if matches!(head, "fma" | "mad") {
        cx.count(4)?;
        return Ok(Op::Fma { ty, ftz, sat, relu, d: cx.d()?, a: cx.src(1)?, b: cx.src(2)?, c: cx.src(3)? });
    }
    let f = match head {
        "neg" => Float1::Neg,
        "abs" => Float1::Abs,
        "ex2" => Float1::Ex2,
        "lg2" => Float1::Lg2,
        "rcp" => Float1::Rcp,
        "rsqrt" => Float1::Rsqrt,
        "sqrt" => Float1::Sqrt,
        "tanh" => Float1::Tanh,
        "sin" => Float1::Sin,
        "cos" => Float1::Cos,
        _ => return Err(cx.unknown()),
    };
    let exists_exact = matches!(f, Float1::Neg | Float1::Abs | Float1::Rcp | Float1::Sqrt);
    cx.count(2)?;
    if sat || relu || nan || (!approx && !exists_exact) {
        return Err(cx.unknown());
    }
    Ok(Op::Float1 { f, ty, ftz, d: cx.d()?, a: cx.src(1)? })
}

fn pred_logic(head: &str, cx: &Cx) -> Res<Op> {
    if head == "not" {
        cx.count(2)?;
        return Ok(Op::PredLogic { f: BoolOp::Xor, d: cx.pred(0)?, a: cx.psrc(1)?, b: PSrc::Const(true) });
    }
    cx.count(3)?;
    let f = match head {
        "and" => BoolOp::And,
        "or" => BoolOp::Or,
        _ => BoolOp::Xor,
    };
    Ok(Op::PredLogic { f, d: cx.pred(0)?, a: cx.psrc(1)?, b: cx.psrc(2)? })
}

fn mov(cx: &mut Cx) -> Res<Op> {
    cx.count(2)?;
    if cx.take("pred") {
        return Ok(Op::PredLogic { f: BoolOp::Or, d: cx.pred(0)?, a: cx.psrc(1)?, b: PSrc::Const(false) });
    }
    let bits = cx.ty()?.bits();
    if bits > 64 {
        return Err(cx.unknown());
    }
    if let Some(which) = cx.special(1)? {
        return Ok(Op::Special { d: cx.d()?, which });
    }
    match (cx.arg(0)?, cx.arg(1)?) {
        (Arg::List(d), _) => {
            let part = bits / d.len().max(1) as u32;
            Ok(Op::Unpack { d: cx.dsts(0)?, a: cx.src(1)?, bits: part })
        }
        (_, Arg::List(a)) => {
            let part = bits / a.len().max(1) as u32;
            Ok(Op::Pack { d: cx.d()?, parts: cx.srcs(1)?, bits: part })
        }
        _ => Ok(Op::Mov { d: cx.d()?, a: cx.src(1)?, bits }),
    }
}

fn setp(cx: &mut Cx) -> Res<Op> {
    let ty = cx.ty()?;
    let cmp = cx.choose(&[
        ("eq", Cmp::Eq),
        ("ne", Cmp::Ne),
        ("lt", Cmp::Lt),
        ("le", Cmp::Le),
        ("gt", Cmp::Gt),
        ("ge", Cmp::Ge),
        ("lo", Cmp::Lt),
        ("ls", Cmp::Le),
        ("hi", Cmp::Gt),
        ("hs", Cmp::Ge),
        ("equ", Cmp::Equ),
        ("neu", Cmp::Neu),
        ("ltu", Cmp::Ltu),
        ("leu", Cmp::Leu),
        ("gtu", Cmp::Gtu),
        ("geu", Cmp::Geu),
        ("num", Cmp::Num),
        ("nan", Cmp::Nan),
    ]);
    let cmp = cmp.ok_or_else(|| cx.unknown())?;
    let f = cx.choose(&[("and", BoolOp::And), ("or", BoolOp::Or), ("xor", BoolOp::Xor)]);
    let ftz = cx.take("ftz");
    cx.count(if f.is_some() { 4 } else { 3 })?;
    if matches!(ty, Ty::F16x2 | Ty::Bf16x2) {
        return Err(cx.unknown());
    }
    let one = |n: &str| if n == "_" { Ok(None) } else { cx.names.pred(n).map(Some) };
    let (d, q) = match cx.arg(0)? {
        Arg::Name(n) => (one(n)?, None),
        Arg::Pair(n, m) => (one(n)?, one(m)?),
        _ => return Err(cx.unknown()),
    };
    let with = match f {
        Some(f) => Some((f, cx.psrc(3)?)),
        None => None,
    };
    Ok(Op::Setp { cmp, ty, ftz, d, q, a: cx.src(1)?, b: cx.src(2)?, with })
}

fn selp(cx: &mut Cx) -> Res<Op> {
    let bits = cx.ty()?.bits();
    cx.count(4)?;
    Ok(Op::Selp { bits, d: cx.d()?, a: cx.src(1)?, b: cx.src(2)?, p: cx.psrc(3)? })
}

fn cvt(cx: &mut Cx) -> Res<Op> {
    let from = cx.ty()?;
    let to = cx.ty()?;
    let round = cx.choose(&[
        ("rn", Round::Near),
        ("rz", Round::Zero),
        ("rm", Round::Down),
        ("rp", Round::Up),
        ("rna", Round::NearAway),
        ("rni", Round::NearI),
        ("rzi", Round::ZeroI),
        ("rmi", Round::DownI),
        ("rpi", Round::UpI),
    ]);
    let round = round.unwrap_or(Round::None);
    let (ftz, sat, relu) = (cx.take("ftz"), cx.take("sat"), cx.take("relu"));
    if matches!(to, Ty::Bf16x2 | Ty::F16x2) {
        if from != Ty::F32 || !matches!(round, Round::Near | Round::Zero) || sat {
            return Err(cx.unknown());
        }
        cx.count(3)?;
        return Ok(Op::CvtPack { to, round, relu, d: cx.d()?, hi: cx.src(1)?, lo: cx.src(2)? });
    }
    let packed = matches!(from, Ty::Bf16x2 | Ty::F16x2);
    if packed || from == Ty::Tf32 || (to == Ty::Tf32 && from != Ty::F32) {
        return Err(cx.unknown());
    }
    let needs = match (to.is_float(), from.is_float()) {
        (true, false) => true,
        (false, true) => true,
        (true, true) => to.bits() < from.bits() || to == Ty::Tf32,
        _ => false,
    };
    if needs && round == Round::None {
        return Err(cx.err(format!("`{}` needs a rounding mode", cx.op)));
    }
    cx.count(2)?;
    Ok(Op::Cvt { to, from, round, ftz, sat, relu, d: cx.d()?, a: cx.src(1)? })
}
