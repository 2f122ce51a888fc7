//! Elementwise operators on registers: scalars (1 lane) or vectors of any lane count.
//!
//! Register form of an element type: f32 and i32 as they are, bool as i1, bf16 and f16 as f32 that holds a value of the
//! narrow type (arithmetic on them is done in f32 and rounded once). In memory a bool is a byte, 0 or 1. Assumes types
//! that inference accepted. Knows nothing of shapes or addresses.

use super::func::{Func, Val, vty};
use super::vmath::Math;
use pleach_ir::{BinaryOp, DType, Op, UnaryOp};

/// The register type of an element type.
pub(crate) fn register_type(d: DType, lanes: usize) -> String {
    let elem = match d {
        DType::F32 | DType::BF16 | DType::F16 => "f32",
        DType::I32 => "i32",
        DType::Bool => "i1",
    };
    vty(lanes, elem)
}

/// The type of an element in memory, for address arithmetic, loads and stores.
pub(crate) fn memory_elem(d: DType) -> &'static str {
    match d {
        DType::F32 => "f32",
        DType::I32 => "i32",
        DType::BF16 | DType::F16 => "i16",
        DType::Bool => "i8",
    }
}

/// Loads `lanes` consecutive elements, only those of the mask if there is one.
pub(crate) fn load(f: &mut Func, d: DType, ptr: &Val, mask: Option<&Val>, lanes: usize) -> Val {
    let elem = memory_elem(d);
    let x = match mask {
        Some(m) => f.masked_load(ptr, m, elem, lanes),
        None => f.load(ptr, &vty(lanes, elem)),
    };
    widen(f, d, x, lanes)
}

/// Loads one element from an address that is a multiple of `align` bytes.
pub(crate) fn load_aligned(f: &mut Func, d: DType, ptr: &Val, align: i64) -> Val {
    let x = f.op(format!("llvm.load {ptr} {{alignment = {align} : i64}} : !llvm.ptr -> {}", memory_elem(d)));
    widen(f, d, x, 1)
}

/// Stores one element to an address that is a multiple of `align` bytes.
pub(crate) fn store_aligned(f: &mut Func, d: DType, x: &Val, ptr: &Val, align: i64) {
    let (x, ty) = match f.rounded(x) {
        // Two neighbours round into one register by one instruction.
        Some(half) if d == DType::BF16 => (half, "bf16"),
        _ => (narrow(f, d, x, 1), memory_elem(d)),
    };
    f.stmt(&format!("llvm.store {x}, {ptr} {{alignment = {align} : i64}} : {ty}, !llvm.ptr"));
}

/// The register form of what was loaded.
pub(crate) fn widen(f: &mut Func, d: DType, x: Val, lanes: usize) -> Val {
    let (t8, t16, t32, tf) = (vty(lanes, "i8"), vty(lanes, "i16"), vty(lanes, "i32"), vty(lanes, "f32"));
    match d {
        DType::F32 | DType::I32 => x,
        DType::Bool => {
            let zero = if lanes == 1 { f.konst("0 : i8") } else { f.konst(&format!("dense<0> : {t8}")) };
            f.op(format!("arith.cmpi ne, {x}, {zero} : {t8}"))
        }
        DType::BF16 => {
            let w = f.op(format!("arith.extui {x} : {t16} to {t32}"));
            let c = f.i32(16, lanes);
            let w = f.op(format!("arith.shli {w}, {c} : {t32}"));
            f.op(format!("arith.bitcast {w} : {t32} to {tf}"))
        }
        DType::F16 => {
            let th = vty(lanes, "f16");
            let h = f.op(format!("arith.bitcast {x} : {t16} to {th}"));
            f.op(format!("arith.extf {h} : {th} to {tf}"))
        }
    }
}

/// Stores `lanes` consecutive elements, only those of the mask if there is one.
pub(crate) fn store(f: &mut Func, d: DType, x: &Val, ptr: &Val, mask: Option<&Val>, lanes: usize) {
    let x = narrow(f, d, x, lanes);
    match mask {
        Some(m) => f.masked_store(&x, ptr, m, memory_elem(d), lanes),
        None => f.store(&x, ptr, &vty(lanes, memory_elem(d))),
    }
}

/// The memory form of a register.
pub(crate) fn narrow(f: &mut Func, d: DType, x: &Val, lanes: usize) -> Val {
    let (t16, t32, tf) = (vty(lanes, "i16"), vty(lanes, "i32"), vty(lanes, "f32"));
    match d {
        DType::F32 | DType::I32 => x.clone(),
        DType::Bool => f.op(format!("arith.extui {x} : {} to {}", vty(lanes, "i1"), vty(lanes, "i8"))),
        DType::BF16 => {
            // The value fits already: the lower half is zero.
            let u = f.op(format!("arith.bitcast {x} : {tf} to {t32}"));
            let c = f.i32(16, lanes);
            let u = f.op(format!("arith.shrui {u}, {c} : {t32}"));
            f.op(format!("arith.trunci {u} : {t32} to {t16}"))
        }
        DType::F16 => {
            let th = vty(lanes, "f16");
            let h = f.op(format!("arith.truncf {x} : {tf} to {th}"));
            f.op(format!("arith.bitcast {h} : {th} to {t16}"))
        }
    }
}

/// A constant element, from the bits the IR holds, in every lane.
pub(crate) fn constant(f: &mut Func, d: DType, bits: u32, lanes: usize) -> Val {
    match d {
        DType::F32 => f.f32(f32::from_bits(bits), lanes),
        DType::BF16 => f.f32(f32::from_bits(bits << 16), lanes),
        DType::F16 => f.f32(f16_value(bits as u16), lanes),
        DType::I32 => f.i32(bits as i32, lanes),
        DType::Bool if lanes == 1 => f.konst(if bits != 0 { "true" } else { "false" }),
        DType::Bool => f.konst(&format!("dense<{}> : {}", bits != 0, vty(lanes, "i1"))),
    }
}

fn f16_value(h: u16) -> f32 {
    let (sign, e, m) = (if h >> 15 == 1 { -1.0f32 } else { 1.0 }, (h >> 10) & 31, f32::from(h & 1023));
    sign * match e {
        0 => m * 2f32.powi(-24),
        31 if m == 0.0 => f32::INFINITY,
        31 => f32::NAN,
        _ => (1024.0 + m) * 2f32.powi(i32::from(e) - 25),
    }
}

/// A scalar register value in every lane.
pub(crate) fn splat(f: &mut Func, d: DType, x: &Val, lanes: usize) -> Val {
    f.splat(x, &register_type(d, 1), lanes)
}

/// Rounds an f32 register to a narrower float; f32 itself passes.
pub(crate) fn round_to(f: &mut Func, d: DType, x: &Val, lanes: usize) -> Val {
    let (t32, tf) = (vty(lanes, "i32"), vty(lanes, "f32"));
    match d {
        DType::BF16 if f.round_bf16 => {
            let tb = vty(lanes, "bf16");
            let h = f.op(format!("arith.truncf {x} : {tf} to {tb}"));
            let y = f.op(format!("arith.extf {h} : {tb} to {tf}"));
            if f.gpu {
                f.set_rounded(&y, h);
            }
            y
        }
        DType::BF16 => {
            // To nearest even by integers: add 0x7fff and the bit that will be the last. A NaN stays a quiet NaN.
            let u = f.op(format!("arith.bitcast {x} : {tf} to {t32}"));
            let (c16, c1, half) = (f.i32(16, lanes), f.i32(1, lanes), f.i32(0x7fff, lanes));
            let low = f.op(format!("arith.shrui {u}, {c16} : {t32}"));
            let low = f.op(format!("arith.andi {low}, {c1} : {t32}"));
            let r = f.op(format!("arith.addi {u}, {half} : {t32}"));
            let r = f.op(format!("arith.addi {r}, {low} : {t32}"));
            let quiet = f.i32(0x0040_0000, lanes);
            let q = f.op(format!("arith.ori {u}, {quiet} : {t32}"));
            let nan = f.op(format!("arith.cmpf uno, {x}, {x} : {tf}"));
            let r = select(f, &nan, &q, &r, &t32, lanes);
            let keep = f.i32(-65536, lanes);
            let r = f.op(format!("arith.andi {r}, {keep} : {t32}"));
            f.op(format!("arith.bitcast {r} : {t32} to {tf}"))
        }
        DType::F16 => {
            let th = vty(lanes, "f16");
            let h = f.op(format!("arith.truncf {x} : {tf} to {th}"));
            f.op(format!("arith.extf {h} : {th} to {tf}"))
        }
        _ => x.clone(),
    }
}

fn select(f: &mut Func, c: &Val, a: &Val, b: &Val, ty: &str, lanes: usize) -> Val {
    if lanes == 1 {
        f.op(format!("arith.select {c}, {a}, {b} : {ty}"))
    } else {
        f.op(format!("arith.select {c}, {a}, {b} : {}, {ty}", vty(lanes, "i1")))
    }
}

/// Applies an elementwise operator. `args` are registers of `lanes` lanes with their element types; `out` is the type of
/// the result.
///
/// # Errors
/// The name of an operator that is not elementwise.
pub(crate) fn apply(f: &mut Func, op: &Op, args: &[(Val, DType)], out: DType, lanes: usize) -> Result<Val, String> {
    let arg = |i: usize| args.get(i).ok_or_else(|| format!("{} lacks operand {i}", op.name()));
    Ok(match op {
        Op::Unary(u) => {
            let (x, d) = arg(0)?;
            let y = unary(f, *u, x, *d, lanes);
            round_to(f, out, &y, lanes)
        }
        Op::Binary(b) => {
            let ((x, d), (y, _)) = (arg(0)?, arg(1)?);
            let z = binary(f, *b, x, y, *d, lanes);
            round_to(f, out, &z, lanes)
        }
        Op::Add => {
            let mut s = arg(0)?.0.clone();
            let (name, ty) = if out == DType::I32 { ("addi", "i32") } else { ("addf", "f32") };
            for (x, _) in &args[1..] {
                s = f.op(format!("arith.{name} {s}, {x} : {}", vty(lanes, ty)));
            }
            round_to(f, out, &s, lanes)
        }
        Op::Select => {
            let (c, a, b) = (&arg(0)?.0, &arg(1)?.0, &arg(2)?.0);
            select(f, c, a, b, &register_type(out, lanes), lanes)
        }
        Op::Cast(to) => {
            let (x, d) = arg(0)?;
            cast(f, x, *d, *to, lanes)
        }
        Op::StopGradient => arg(0)?.0.clone(),
        _ => return Err(format!("{} is not elementwise", op.name())),
    })
}

fn unary(f: &mut Func, u: UnaryOp, x: &Val, d: DType, lanes: usize) -> Val {
    let (t32, t1) = (vty(lanes, "i32"), vty(lanes, "i1"));
    if d == DType::I32 {
        let zero = f.i32(0, lanes);
        let n = f.op(format!("arith.subi {zero}, {x} : {t32}"));
        if u == UnaryOp::Abs {
            return f.op(format!("arith.maxsi {x}, {n} : {t32}"));
        }
        return n;
    }
    let mut m = Math { f, lanes };
    let t = vty(lanes, "f32");
    match u {
        UnaryOp::Neg => m.neg(x),
        UnaryOp::Abs => m.abs(x),
        UnaryOp::Exp => m.exp(x),
        UnaryOp::Log => m.log(x),
        UnaryOp::Sqrt => m.f.op(format!("math.sqrt {x} : {t}")),
        UnaryOp::Rsqrt => {
            let s = m.f.op(format!("math.sqrt {x} : {t}"));
            let one = m.k(1.0);
            m.bin("divf", &one, &s)
        }
        UnaryOp::Recip => {
            let one = m.k(1.0);
            m.bin("divf", &one, x)
        }
        UnaryOp::Sin if m.f.gpu => m.sin_cos(x, 0),
        UnaryOp::Cos if m.f.gpu => m.sin_cos(x, 1),
        UnaryOp::Sin => m.f.op(format!("math.sin {x} : {t}")),
        UnaryOp::Cos => m.f.op(format!("math.cos {x} : {t}")),
        UnaryOp::Tanh => m.tanh(x),
        UnaryOp::Erf => m.erf(x),
        UnaryOp::Sigmoid => m.sigmoid(x),
        UnaryOp::Floor => m.f.op(format!("math.floor {x} : {t}")),
        UnaryOp::Not => {
            let one = constant(m.f, DType::Bool, 1, lanes);
            m.f.op(format!("arith.xori {x}, {one} : {t1}"))
        }
    }
}

fn binary(f: &mut Func, b: BinaryOp, x: &Val, y: &Val, d: DType, lanes: usize) -> Val {
    let (int, t) = match d {
        DType::I32 => (true, vty(lanes, "i32")),
        DType::Bool => (true, vty(lanes, "i1")),
        _ => (false, vty(lanes, "f32")),
    };
    let name = match (b, int) {
        (BinaryOp::Sub, false) => "subf",
        (BinaryOp::Sub, true) => "subi",
        (BinaryOp::Mul, false) => "mulf",
        (BinaryOp::Mul, true) => "muli",
        (BinaryOp::Div, false) => "divf",
        (BinaryOp::Div, true) => "divsi",
        (BinaryOp::Max, false) => "maximumf",
        (BinaryOp::Max, true) => "maxsi",
        (BinaryOp::Min, false) => "minimumf",
        (BinaryOp::Min, true) => "minsi",
        (BinaryOp::Lt, false) => "cmpf olt,",
        (BinaryOp::Lt, true) => "cmpi slt,",
        (BinaryOp::Le, false) => "cmpf ole,",
        (BinaryOp::Le, true) => "cmpi sle,",
        (BinaryOp::Eq, false) => "cmpf oeq,",
        (BinaryOp::Eq, true) => "cmpi eq,",
        (BinaryOp::And, _) => "andi",
        (BinaryOp::Or, _) => "ori",
    };
    f.op(format!("arith.{name} {x}, {y} : {t}"))
}

fn cast(f: &mut Func, x: &Val, from: DType, to: DType, lanes: usize) -> Val {
    let (t1, t32, tf) = (vty(lanes, "i1"), vty(lanes, "i32"), vty(lanes, "f32"));
    if from == to {
        return x.clone();
    }
    match (from, to) {
        (DType::I32, DType::Bool) => {
            let zero = f.i32(0, lanes);
            f.op(format!("arith.cmpi ne, {x}, {zero} : {t32}"))
        }
        (DType::Bool, DType::I32) => f.op(format!("arith.extui {x} : {t1} to {t32}")),
        (_, DType::Bool) => {
            let zero = f.f32(0.0, lanes);
            f.op(format!("arith.cmpf une, {x}, {zero} : {tf}"))
        }
        (_, DType::I32) => f.op(format!("arith.fptosi {x} : {tf} to {t32}")),
        (DType::I32, _) => {
            let y = f.op(format!("arith.sitofp {x} : {t32} to {tf}"));
            round_to(f, to, &y, lanes)
        }
        (DType::Bool, _) => f.op(format!("arith.uitofp {x} : {t1} to {tf}")),
        _ => round_to(f, to, x, lanes),
    }
}
