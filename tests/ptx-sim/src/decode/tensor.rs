//! Asynchronous copies, mbarriers and matrix products.

use super::{Cx, Res};
use crate::isa::{Addr, Elem, Mbar, Op, PSrc, Src, Ty, WgA};
use crate::parse::Arg;

/// `cp.async…`
pub(super) fn copy(cx: &mut Cx) -> Res<Op> {
    if !cx.take("async") {
        return Err(cx.unknown());
    }
    if cx.take("bulk") {
        return bulk(cx);
    }
    if cx.take("commit_group") {
        cx.count(0)?;
        return Ok(Op::CpCommit);
    }
    if cx.take("wait_group") {
        cx.count(1)?;
        return Ok(Op::CpWait { keep: Some(cx.int(0)? as u32) });
    }
    if cx.take("wait_all") {
        cx.count(0)?;
        return Ok(Op::CpWait { keep: None });
    }
    let (ca, cg) = (cx.take("ca"), cx.take("cg"));
    let shared = cx.take("shared") | cx.take("shared::cta");
    if !shared || !cx.take("global") || ca == cg {
        return Err(cx.unknown());
    }
    cx.ignore(&["L2::64B", "L2::128B", "L2::256B"]);
    cx.counts(3, 4)?;
    let bytes = cx.int(2)? as u32;
    if !(bytes == 16 || (ca && matches!(bytes, 4 | 8))) {
        return Err(cx.err(format!("`{}` cannot copy {bytes} bytes", cx.op)));
    }
    let valid = if cx.args.len() == 4 { Some(cx.src(3)?) } else { None };
    Ok(Op::CpAsync { dst: cx.addr(0)?, src: cx.addr(1)?, bytes, valid })
}

/// Address of a tensor map and coordinates, innermost first.
fn tensor(cx: &Cx, i: usize, rank: usize) -> Res<(Addr, Box<[Src]>)> {
    match cx.arg(i)? {
        Arg::Mem { base, offset, at } if at.len() == rank => {
            let at: Res<Box<[Src]>> = at.iter().map(|a| cx.names.src(a)).collect();
            Ok((Addr { base: cx.names.src(base)?, offset: *offset }, at?))
        }
        _ => Err(cx.err(format!("a tensor map with {rank} coordinates is wanted"))),
    }
}

/// `cp.async.bulk…`
fn bulk(cx: &mut Cx) -> Res<Op> {
    if cx.take("commit_group") {
        cx.count(0)?;
        return Ok(Op::BulkCommit);
    }
    if cx.take("wait_group") {
        // With `.read` the writes of global memory may still be on their way; nothing in the kernel can see that.
        let _ = cx.take("read");
        cx.count(1)?;
        return Ok(Op::BulkWait { keep: cx.int(0)? as u32 });
    }
    let is_tensor = cx.take("tensor");
    let first = cx.parts.iter().position(|p| p.starts_with("shared") || *p == "global");
    let to_shared = first.is_some_and(|i| cx.parts[i].starts_with("shared"));
    cx.ignore(&["global", "shared::cluster", "shared::cta"]);
    let hint = cx.take("L2::cache_hint");
    let reports = cx.take("mbarrier::complete_tx::bytes");
    let grouped = cx.take("bulk_group");
    if reports != to_shared || grouped == to_shared {
        return Err(cx.unknown());
    }
    let extra = usize::from(hint);
    if is_tensor {
        let _ = cx.take("tile");
        let rank = cx.choose(&[("1d", 1), ("2d", 2), ("3d", 3), ("4d", 4), ("5d", 5)]).ok_or_else(|| cx.unknown())?;
        if to_shared {
            cx.count(3 + extra)?;
            let (map, at) = tensor(cx, 1, rank)?;
            return Ok(Op::TmaLoad { dst: cx.addr(0)?, map, at, bar: cx.addr(2)? });
        }
        cx.count(2 + extra)?;
        let (map, at) = tensor(cx, 0, rank)?;
        return Ok(Op::TmaStore { map, at, src: cx.addr(1)? });
    }
    if to_shared {
        cx.count(4 + extra)?;
        return Ok(Op::BulkLoad { dst: cx.addr(0)?, src: cx.addr(1)?, bytes: cx.src(2)?, bar: cx.addr(3)? });
    }
    cx.count(3 + extra)?;
    Ok(Op::BulkStore { dst: cx.addr(0)?, src: cx.addr(1)?, bytes: cx.src(2)? })
}

pub(super) fn mbarrier(cx: &mut Cx) -> Res<Op> {
    let expects = cx.take("expect_tx");
    let (init, inval, arrive) = (cx.take("init"), cx.take("inval"), cx.take("arrive"));
    let (try_wait, test_wait) = (cx.take("try_wait"), cx.take("test_wait"));
    let parity = cx.take("parity");
    cx.ignore(&["shared", "shared::cta", "b64", "release", "acquire", "relaxed", "cta", "cluster"]);
    let f = |f: Mbar, addr: usize, d: Option<u32>, cx: &Cx| Ok(Op::Mbarrier { f, addr: cx.addr(addr)?, d });
    match (init, inval, arrive, try_wait || test_wait, expects) {
        (true, false, false, false, false) => {
            cx.count(2)?;
            f(Mbar::Init(cx.src(1)?), 0, None, cx)
        }
        (false, true, false, false, false) => {
            cx.count(1)?;
            f(Mbar::Inval, 0, None, cx)
        }
        (false, false, false, false, true) => {
            cx.count(2)?;
            f(Mbar::ExpectTx(cx.src(1)?), 0, None, cx)
        }
        (false, false, true, false, expects) => {
            // `state, [addr]{, count}` or `_, [addr], tx`; the state may be left out.
            let named = !matches!(cx.arg(0)?, Arg::Mem { .. });
            let d = if named { cx.dst(cx.arg(0)?)? } else { None };
            let at = usize::from(named);
            let more = if cx.args.len() > at + 1 { Some(cx.src(at + 1)?) } else { None };
            cx.counts(at + 1, at + 2)?;
            if expects && more.is_none() {
                return Err(cx.err("`expect_tx` lacks the number of bytes"));
            }
            let (tx, count) = if expects { (more, None) } else { (None, more) };
            f(Mbar::Arrive { tx, count }, at, d, cx)
        }
        (false, false, false, true, false) => {
            cx.counts(3, 4)?;
            Ok(Op::MbarWait { p: cx.pred(0)?, addr: cx.addr(1)?, state: cx.src(2)?, parity, block: try_wait })
        }
        _ => Err(cx.unknown()),
    }
}

fn elem(ty: Ty) -> Option<Elem> {
    match ty {
        Ty::Bf16 => Some(Elem::Bf16),
        Ty::F16 => Some(Elem::F16),
        Ty::Tf32 => Some(Elem::Tf32),
        _ => None,
    }
}

/// `ldmatrix`, `stmatrix` and `mma.sync`
pub(super) fn warp_matrix(head: &str, cx: &mut Cx) -> Res<Op> {
    if !(cx.take("sync") && cx.take("aligned")) {
        return Err(cx.unknown());
    }
    if head == "mma" {
        return mma(cx);
    }
    let n = cx.choose(&[("x1", 1), ("x2", 2), ("x4", 4)]).ok_or_else(|| cx.unknown())?;
    let trans = cx.take("trans");
    if !(cx.take("m8n8") && (cx.take("shared") | cx.take("shared::cta")) && cx.take("b16")) {
        return Err(cx.unknown());
    }
    cx.count(2)?;
    if head == "ldmatrix" {
        Ok(Op::Ldmatrix { d: cx.regs(0, n)?, trans, addr: cx.addr(1)? })
    } else {
        Ok(Op::Stmatrix { v: cx.srcs_of(1, n)?, trans, addr: cx.addr(0)? })
    }
}

fn mma(cx: &mut Cx) -> Res<Op> {
    let (c, b, a, d) = (cx.ty()?, cx.ty()?, cx.ty()?, cx.ty()?);
    let shape = cx.choose(&[("m16n8k4", 4), ("m16n8k8", 8), ("m16n8k16", 16)]);
    let (row, col) = (cx.take("row"), cx.take("col"));
    let (Some(k), Some(e), true) = (shape, elem(a), a == b && c == Ty::F32 && d == Ty::F32 && row && col) else {
        return Err(cx.unknown());
    };
    let fits = if e == Elem::Tf32 { k <= 8 } else { k >= 8 };
    if !fits {
        return Err(cx.unknown());
    }
    // A holds 16 k elements in 32 lanes, one or two in a register.
    let na = 16 * k / 32 / if e == Elem::Tf32 { 1 } else { 2 };
    cx.count(4)?;
    Ok(Op::Mma {
        elem: e,
        k,
        d: cx.regs(0, 4)?,
        a: cx.srcs_of(1, na)?,
        b: cx.srcs_of(2, na / 2)?,
        c: cx.srcs_of(3, 4)?,
    })
}

/// `wgmma…`
pub(super) fn wgmma(cx: &mut Cx) -> Res<Op> {
    if !(cx.take("sync") && cx.take("aligned")) {
        return Err(cx.unknown());
    }
    if cx.take("fence") {
        cx.count(0)?;
        return Ok(Op::WgFence);
    }
    if cx.take("commit_group") {
        cx.count(0)?;
        return Ok(Op::WgCommit);
    }
    if cx.take("wait_group") {
        cx.count(1)?;
        return Ok(Op::WgWait { keep: cx.int(0)? as u32 });
    }
    let (b, a, d) = (cx.ty()?, cx.ty()?, cx.ty()?);
    let (true, Some(e), true) = (cx.take("mma_async"), elem(a), a == b && d == Ty::F32) else {
        return Err(cx.unknown());
    };
    let shape = cx.parts.first().copied().unwrap_or("");
    let k = if e == Elem::Tf32 { "k8" } else { "k16" };
    let n = shape.strip_prefix("m64n").and_then(|s| s.strip_suffix(k)).and_then(|s| s.parse::<usize>().ok());
    let n = n.filter(|n| n % 8 == 0 && (8..=256).contains(n)).ok_or_else(|| cx.unknown())?;
    cx.parts.remove(0);
    let in_regs = matches!(cx.arg(1)?, Arg::List(_));
    let left = if in_regs {
        let r = cx.srcs_of(1, 4)?;
        WgA::Regs([r[0], r[1], r[2], r[3]])
    } else {
        WgA::Desc(cx.src(1)?)
    };
    // scale-d, then the immediates scale-a and scale-b, then for 16-bit types trans-a (memory form only) and trans-b.
    let turns = if e == Elem::Tf32 { 0 } else { 2 - usize::from(in_regs) };
    cx.count(6 + turns)?;
    let scale_d = match cx.arg(3)? {
        Arg::Int(v) => PSrc::Const(*v != 0),
        _ => cx.psrc(3)?,
    };
    let sign = |i: usize| match cx.int(i)? as i64 {
        1 => Ok(false),
        -1 => Ok(true),
        _ => Err(cx.err("a scale is 1 or -1")),
    };
    let neg = [sign(4)?, sign(5)?];
    let turn = |i: usize| if i < cx.args.len() { Ok(cx.int(i)? != 0) } else { Ok(false) };
    let trans = match turns {
        2 => [turn(6)?, turn(7)?],
        1 => [false, turn(6)?],
        _ => [false, false],
    };
    Ok(Op::WgMma { elem: e, n, d: cx.regs(0, n / 2)?, a: left, b: cx.src(2)?, scale_d, neg, trans })
}
