//! Loads, stores, atomics and address conversions.

use super::{Cx, Res};
use crate::isa::{AtomOp, Op, Space, Ty};
use crate::parse::Arg;

/// Cache and ordering hints without a meaning here: execution is in order and there is no cache.
const HINTS: [&str; 21] = [
    "weak",
    "volatile",
    "relaxed",
    "acquire",
    "release",
    "acq_rel",
    "cta",
    "gpu",
    "sys",
    "cluster",
    "ca",
    "cg",
    "cs",
    "lu",
    "cv",
    "wb",
    "wt",
    "L1::no_allocate",
    "L1::evict_first",
    "L1::evict_last",
    "L1::evict_normal",
];

pub(super) fn decode(head: &str, cx: &mut Cx) -> Res<Op> {
    match head {
        "cvta" => cvta(cx),
        "prefetch" | "prefetchu" => {
            cx.ignore(&[
                "global",
                "local",
                "param",
                "const",
                "tensormap",
                "L1",
                "L2",
                "L2::evict_last",
                "L2::evict_normal",
            ]);
            cx.count(1)?;
            cx.addr(0)?;
            Ok(Op::Nop)
        }
        "ld" => {
            let constant = cx.take("nc");
            let (space, ty, n) = access(cx)?;
            if constant && space != Space::Global {
                return Err(cx.unknown());
            }
            cx.count(2)?;
            let d = cx.dsts(0)?;
            if d.len() != n {
                return Err(cx.err("the number of registers does not fit the vector"));
            }
            Ok(Op::Ld { space, constant, ty, d, addr: cx.addr(1)? })
        }
        "st" => {
            let (space, ty, n) = access(cx)?;
            cx.count(2)?;
            Ok(Op::St { space, ty, addr: cx.addr(0)?, v: cx.srcs_of(1, n)? })
        }
        _ => atomic(head, cx),
    }
}

fn space(cx: &mut Cx) -> Space {
    let table = [
        ("global", Space::Global),
        ("shared", Space::Shared),
        ("shared::cta", Space::Shared),
        ("local", Space::Local),
        ("param", Space::Param),
        ("param::entry", Space::Param),
    ];
    cx.choose(&table).unwrap_or(Space::Generic)
}

/// Space, element type and vector length of a load or store.
fn access(cx: &mut Cx) -> Res<(Space, Ty, usize)> {
    let ty = cx.ty()?;
    let n = cx.choose(&[("v2", 2), ("v4", 4), ("v8", 8)]).unwrap_or(1);
    let space = space(cx);
    cx.ignore(&HINTS);
    cx.ignore(&["L2::64B", "L2::128B", "L2::256B", "L2::evict_first", "L2::evict_last"]);
    let bits = ty.bits();
    if bits > 64 || n as u32 * bits > 256 || matches!(ty, Ty::Tf32) {
        return Err(cx.unknown());
    }
    Ok((space, ty, n))
}

fn atomic(head: &str, cx: &mut Cx) -> Res<Op> {
    let ty = cx.ty()?;
    let f = cx.choose(&[
        ("add", AtomOp::Add),
        ("min", AtomOp::Min),
        ("max", AtomOp::Max),
        ("and", AtomOp::And),
        ("or", AtomOp::Or),
        ("xor", AtomOp::Xor),
        ("exch", AtomOp::Exch),
        ("cas", AtomOp::Cas),
    ]);
    let f = f.ok_or_else(|| cx.unknown())?;
    let n = cx.choose(&[("v2", 2), ("v4", 4), ("v8", 8)]).unwrap_or(1);
    let space = space(cx);
    cx.ignore(&HINTS);
    cx.ignore(&["noftz"]);
    let float_ok =
        !ty.is_float() || matches!(f, AtomOp::Add) || (matches!(f, AtomOp::Min | AtomOp::Max) && ty.bits() < 32);
    let bitwise = matches!(f, AtomOp::And | AtomOp::Or | AtomOp::Xor | AtomOp::Exch | AtomOp::Cas);
    if !float_ok || matches!(ty, Ty::B(_)) != bitwise || (n > 1 && (head == "atom" || !ty.is_float())) {
        return Err(cx.unknown());
    }
    let (d, at) = if head == "atom" { (cx.dst(cx.arg(0)?)?, 1) } else { (None, 0) };
    let swap = if f == AtomOp::Cas { Some(cx.src(at + 2)?) } else { None };
    cx.count(at + 2 + usize::from(swap.is_some()))?;
    if head == "red" && matches!(f, AtomOp::Exch | AtomOp::Cas) {
        return Err(cx.unknown());
    }
    Ok(Op::Atom { space, f, ty, d, addr: cx.addr(at)?, v: cx.srcs_of(at + 1, n)?, swap })
}

/// Address spaces do not overlap in the simulator, so a conversion is a move.
fn cvta(cx: &mut Cx) -> Res<Op> {
    let bits = cx.ty()?.bits();
    let _ = cx.take("to");
    cx.ignore(&["global", "shared", "shared::cta", "shared::cluster", "local", "param", "param::entry", "const"]);
    cx.count(2)?;
    if matches!(cx.arg(1)?, Arg::List(_)) {
        return Err(cx.unknown());
    }
    Ok(Op::Mov { d: cx.d()?, a: cx.src(1)?, bits })
}
