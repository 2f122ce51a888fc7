//! Control flow, warp collectives, barriers and fences.

use super::{Cx, Res};
use crate::isa::{AtomOp, Op, PSrc, Shuffle, Src, Ty, Vote};
use crate::parse::Arg;

pub(super) fn decode(head: &str, cx: &mut Cx) -> Res<Op> {
    match head {
        "bra" => {
            let _ = cx.take("uni");
            cx.count(1)?;
            match cx.arg(0)? {
                Arg::Name(n) => Ok(Op::Bra { target: cx.names.label(n)? }),
                _ => Err(cx.unknown()),
            }
        }
        "brx" => {
            let _ = cx.take("idx") | cx.take("uni");
            cx.count(2)?;
            match cx.arg(1)? {
                Arg::Name(n) => Ok(Op::Brx { index: cx.src(0)?, targets: cx.names.table(n)? }),
                _ => Err(cx.unknown()),
            }
        }
        "ret" | "exit" => {
            let _ = cx.take("uni");
            cx.count(0)?;
            Ok(Op::Ret)
        }
        "trap" => Ok(Op::Trap),
        "nanosleep" => {
            cx.ignore(&["u32"]);
            Ok(Op::Nop)
        }
        "griddepcontrol" => {
            if cx.take("wait") || cx.take("launch_dependents") {
                Ok(Op::Nop)
            } else {
                Err(cx.unknown())
            }
        }
        "membar" => {
            cx.ignore(&["cta", "gl", "gpu", "sys", "level"]);
            Ok(Op::Nop)
        }
        "fence" => fence(cx),
        "setmaxnreg" => {
            let more = cx.take("inc");
            if more == cx.take("dec") {
                return Err(cx.unknown());
            }
            cx.ignore(&["sync", "aligned", "u32"]);
            cx.count(1)?;
            Ok(Op::Setmaxnreg { n: cx.int(0)? as u32, more })
        }
        "shfl" => {
            let bits = cx.ty()?;
            let f = cx.choose(&[
                ("up", Shuffle::Up),
                ("down", Shuffle::Down),
                ("bfly", Shuffle::Bfly),
                ("idx", Shuffle::Idx),
            ]);
            cx.count(5)?;
            match (f, cx.take("sync"), bits, cx.pair(0)?) {
                (Some(f), true, Ty::B(32), (Some(d), p)) => {
                    Ok(Op::Shfl { f, d, p, a: cx.src(1)?, b: cx.src(2)?, c: cx.src(3)?, members: cx.src(4)? })
                }
                _ => Err(cx.unknown()),
            }
        }
        "vote" => {
            if !cx.take("sync") {
                return Err(cx.unknown());
            }
            cx.count(3)?;
            let (a, members) = (cx.psrc(1)?, cx.src(2)?);
            if cx.take("ballot") {
                cx.ignore(&["b32"]);
                return Ok(Op::Vote { f: Vote::Ballot, d: Some(cx.d()?), p: None, a, members });
            }
            let f = cx.choose(&[("all", Vote::All), ("any", Vote::Any), ("uni", Vote::Uni)]);
            cx.ignore(&["pred"]);
            Ok(Op::Vote { f: f.ok_or_else(|| cx.unknown())?, d: None, p: Some(cx.pred(0)?), a, members })
        }
        "redux" => {
            let ty = cx.ty()?;
            let f = cx.choose(&[
                ("add", AtomOp::Add),
                ("min", AtomOp::Min),
                ("max", AtomOp::Max),
                ("and", AtomOp::And),
                ("or", AtomOp::Or),
                ("xor", AtomOp::Xor),
            ]);
            cx.count(3)?;
            match (f, cx.take("sync"), ty) {
                (Some(f), true, Ty::B(32) | Ty::U(32) | Ty::S(32)) => {
                    Ok(Op::Redux { f, ty, d: cx.d()?, a: cx.src(1)?, members: cx.src(2)? })
                }
                _ => Err(cx.unknown()),
            }
        }
        "elect" => {
            cx.count(2)?;
            match (cx.take("sync"), cx.pair(0)?) {
                (true, (d, Some(p))) => Ok(Op::Elect { d, p, members: cx.src(1)? }),
                _ => Err(cx.unknown()),
            }
        }
        "match" => {
            let bits = cx.ty()?.bits();
            cx.count(3)?;
            if !(cx.take("any") && cx.take("sync")) {
                return Err(cx.unknown());
            }
            Ok(Op::MatchAny { d: cx.d()?, bits, a: cx.src(1)?, members: cx.src(2)? })
        }
        "activemask" => {
            cx.ignore(&["b32"]);
            Ok(Op::Activemask { d: cx.d()? })
        }
        "bar" | "barrier" => barrier(cx),
        _ => Err(cx.unknown()),
    }
}

fn barrier(cx: &mut Cx) -> Res<Op> {
    cx.ignore(&["cta", "aligned"]);
    if cx.take("warp") {
        if !cx.take("sync") {
            return Err(cx.unknown());
        }
        cx.count(1)?;
        return Ok(Op::WarpSync { members: cx.src(0)? });
    }
    let _ = cx.take("all");
    if cx.take("red") {
        return reduce(cx);
    }
    let wait = cx.take("sync");
    if !wait && !cx.take("arrive") {
        return Err(cx.unknown());
    }
    cx.counts(1, 2)?;
    let threads = if cx.args.len() == 2 { Some(cx.src(1)?) } else { None };
    if !wait && threads.is_none() {
        return Err(cx.err("`bar.arrive` needs a number of threads"));
    }
    if let Src::Imm(n @ 16..) = cx.src(0)? {
        return Err(cx.err(format!("there is no barrier {n}")));
    }
    Ok(Op::Bar { id: cx.src(0)?, threads, wait })
}

/// `bar.red.popc.u32 d, id, p` and `bar.red.{and,or}.pred p, id, q`, over the whole block.
fn reduce(cx: &mut Cx) -> Res<Op> {
    cx.count(3)?;
    let (id, a): (Src, PSrc) = (cx.src(1)?, cx.psrc(2)?);
    if cx.take("popc") {
        cx.ignore(&["u32"]);
        return Ok(Op::BarRed { f: Vote::Ballot, d: Some(cx.d()?), p: None, id, a });
    }
    let f = cx.choose(&[("and", Vote::All), ("or", Vote::Any)]).ok_or_else(|| cx.unknown())?;
    cx.ignore(&["pred"]);
    Ok(Op::BarRed { f, d: None, p: Some(cx.pred(0)?), id, a })
}

fn fence(cx: &mut Cx) -> Res<Op> {
    if cx.take("proxy") {
        if !cx.parts.first().is_some_and(|p| p.starts_with("async")) {
            return Err(cx.unknown());
        }
        cx.ignore(&["async", "async::generic"]);
        // Of global memory alone it says nothing of shared memory.
        let shared = cx.take("shared::cta") | cx.take("shared::cluster");
        return Ok(if cx.take("global") && !shared { Op::Nop } else { Op::FenceProxyAsync });
    }
    if cx.take("mbarrier_init") {
        cx.ignore(&["release", "cluster"]);
        return Ok(Op::FenceMbarrierInit);
    }
    cx.ignore(&["sc", "acq_rel", "acquire", "release", "cta", "cluster", "gpu", "sys"]);
    Ok(Op::Nop)
}
