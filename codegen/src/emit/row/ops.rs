//! One expression as text: loads, constants, arithmetic and conversions at one or many lanes.

use super::reduce::{extreme, select};
use super::text::{Text, stored};
use crate::emit::expr::{Buf, Ex, Kind};
use crate::emit::func::{Func, Val, vty};
use crate::emit::index::{ExId, Mask, Poly};
use crate::emit::vmath::Math;
use pleach_ir::{BinaryOp, DType, UnaryOp};

/// A constant in every lane.
pub(super) fn constant(f: &mut Func, kind: Kind, bits: u32, lanes: usize) -> Val {
    match kind {
        Kind::Float => f.f32(f32::from_bits(bits), lanes),
        Kind::Int => f.i32(bits as i32, lanes),
        Kind::Bool => {
            let b = bits != 0;
            if lanes == 1 { f.konst(&format!("{b}")) } else { f.konst(&format!("dense<{b}> : {}", vty(lanes, "i1"))) }
        }
    }
}

/// From what memory holds to what registers hold.
fn widen(f: &mut Func, v: Val, d: DType, lanes: usize) -> Val {
    let ty = |e: &str| vty(lanes, e);
    match d {
        DType::F32 | DType::I32 => v,
        DType::BF16 => {
            let x = f.op(format!("arith.extui {v} : {} to {}", ty("i16"), ty("i32")));
            let c = f.i32(16, lanes);
            let x = f.op(format!("arith.shli {x}, {c} : {}", ty("i32")));
            f.op(format!("arith.bitcast {x} : {} to {}", ty("i32"), ty("f32")))
        }
        DType::F16 => f.op(format!("arith.extf {v} : {} to {}", ty("f16"), ty("f32"))),
        DType::Bool => {
            let zero = if lanes == 1 { "0 : i8".to_string() } else { format!("dense<0> : {}", ty("i8")) };
            let z = f.konst(&zero);
            f.op(format!("arith.cmpi ne, {v}, {z} : {}", ty("i8")))
        }
    }
}

/// From what registers hold to what memory holds. 16-bit floats have been rounded before.
pub(super) fn narrow(f: &mut Func, v: &Val, d: DType, lanes: usize) -> Val {
    let ty = |e: &str| vty(lanes, e);
    match d {
        DType::F32 | DType::I32 => v.clone(),
        DType::BF16 => {
            let x = f.op(format!("arith.bitcast {v} : {} to {}", ty("f32"), ty("i32")));
            let c = f.i32(16, lanes);
            let x = f.op(format!("arith.shrui {x}, {c} : {}", ty("i32")));
            f.op(format!("arith.trunci {x} : {} to {}", ty("i32"), ty("i16")))
        }
        DType::F16 => f.op(format!("arith.truncf {v} : {} to {}", ty("f32"), ty("f16"))),
        DType::Bool => f.op(format!("arith.extui {v} : {} to {}", ty("i1"), ty("i8"))),
    }
}

/// Rounds to a 16-bit float, to nearest even, and widens again.
fn round(f: &mut Func, x: &Val, d: DType, lanes: usize) -> Val {
    let ty = |e: &str| vty(lanes, e);
    if d == DType::F16 || f.round_bf16 {
        let half = ty(d.name());
        let h = f.op(format!("arith.truncf {x} : {} to {half}", ty("f32")));
        return f.op(format!("arith.extf {h} : {half} to {}", ty("f32")));
    }
    let b = f.op(format!("arith.bitcast {x} : {} to {}", ty("f32"), ty("i32")));
    let (c16, one, half) = (f.i32(16, lanes), f.i32(1, lanes), f.i32(0x7fff, lanes));
    let lsb = f.op(format!("arith.shrui {b}, {c16} : {}", ty("i32")));
    let lsb = f.op(format!("arith.andi {lsb}, {one} : {}", ty("i32")));
    let s = f.op(format!("arith.addi {b}, {half} : {}", ty("i32")));
    let s = f.op(format!("arith.addi {s}, {lsb} : {}", ty("i32")));
    let m = f.i32(0xffff_0000_u32 as i32, lanes);
    let s = f.op(format!("arith.andi {s}, {m} : {}", ty("i32")));
    let s = f.op(format!("arith.bitcast {s} : {} to {}", ty("i32"), ty("f32")));
    let nan = f.f32(f32::NAN, lanes);
    let c = f.op(format!("arith.cmpf uno, {x}, {x} : {}", ty("f32")));
    select(f, &c, &nan, &s, "f32", lanes)
}

fn convert(f: &mut Func, x: &Val, from: Kind, to: Kind, lanes: usize) -> Val {
    let ty = |e: &str| vty(lanes, e);
    match (from, to) {
        (Kind::Int, Kind::Float) => f.op(format!("arith.sitofp {x} : {} to {}", ty("i32"), ty("f32"))),
        (Kind::Bool, Kind::Float) => f.op(format!("arith.uitofp {x} : {} to {}", ty("i1"), ty("f32"))),
        (Kind::Bool, Kind::Int) => f.op(format!("arith.extui {x} : {} to {}", ty("i1"), ty("i32"))),
        (Kind::Int, Kind::Bool) => {
            let z = f.i32(0, lanes);
            f.op(format!("arith.cmpi ne, {x}, {z} : {}", ty("i32")))
        }
        (Kind::Float, Kind::Bool) => {
            let z = f.f32(0.0, lanes);
            f.op(format!("arith.cmpf une, {x}, {z} : {}", ty("f32")))
        }
        (Kind::Float, Kind::Int) => {
            // Truncates; out of range goes to the nearest integer, NaN to 0.
            let (zero, low, high) = (f.f32(0.0, lanes), f.f32(-2_147_483_648.0, lanes), f.f32(2_147_483_648.0, lanes));
            let nan = f.op(format!("arith.cmpf uno, {x}, {x} : {}", ty("f32")));
            let x = select(f, &nan, &zero, x, "f32", lanes);
            let under = f.op(format!("arith.cmpf olt, {x}, {low} : {}", ty("f32")));
            let x = select(f, &under, &low, &x, "f32", lanes);
            let over = f.op(format!("arith.cmpf oge, {x}, {high} : {}", ty("f32")));
            let x = select(f, &over, &zero, &x, "f32", lanes);
            let i = f.op(format!("arith.fptosi {x} : {} to {}", ty("f32"), ty("i32")));
            let max = f.i32(i32::MAX, lanes);
            select(f, &over, &max, &i, "i32", lanes)
        }
        _ => x.clone(),
    }
}

fn unary(f: &mut Func, u: UnaryOp, x: &Val, kind: Kind, lanes: usize) -> Val {
    let t = vty(lanes, kind.name());
    match (kind, u) {
        (Kind::Bool, _) => {
            let one = constant(f, Kind::Bool, 1, lanes);
            return f.op(format!("arith.xori {x}, {one} : {t}"));
        }
        (Kind::Int, _) => {
            let z = f.i32(0, lanes);
            let n = f.op(format!("arith.subi {z}, {x} : {t}"));
            return if u == UnaryOp::Neg { n } else { f.op(format!("arith.maxsi {x}, {n} : {t}")) };
        }
        _ => {}
    }
    let one = f.f32(1.0, lanes);
    match u {
        UnaryOp::Sqrt => return f.op(format!("math.sqrt {x} : {t}")),
        UnaryOp::Rsqrt => {
            let s = f.op(format!("math.sqrt {x} : {t}"));
            return f.op(format!("arith.divf {one}, {s} : {t}"));
        }
        UnaryOp::Recip => return f.op(format!("arith.divf {one}, {x} : {t}")),
        UnaryOp::Floor => return f.op(format!("math.floor {x} : {t}")),
        UnaryOp::Sin => return f.op(format!("math.sin {x} : {t}")),
        UnaryOp::Cos => return f.op(format!("math.cos {x} : {t}")),
        _ => {}
    }
    let mut m = Math { f, lanes };
    match u {
        UnaryOp::Neg => m.neg(x),
        UnaryOp::Abs => m.abs(x),
        UnaryOp::Exp => m.exp(x),
        UnaryOp::Log => m.log(x),
        UnaryOp::Tanh => m.tanh(x),
        UnaryOp::Erf => m.erf(x),
        UnaryOp::Sigmoid => m.sigmoid(x),
        _ => x.clone(),
    }
}

fn binary(f: &mut Func, b: BinaryOp, x: &Val, y: &Val, kind: Kind, lanes: usize) -> Val {
    let t = vty(lanes, kind.name());
    let op = match (kind, b) {
        (Kind::Float, BinaryOp::Max) => return extreme(f, "ogt", lanes, x, y),
        (Kind::Float, BinaryOp::Min) => return extreme(f, "olt", lanes, x, y),
        (Kind::Int, BinaryOp::Div) => return int_div(f, x, y, lanes),
        (Kind::Float, BinaryOp::Sub) => "subf",
        (Kind::Float, BinaryOp::Mul) => "mulf",
        (Kind::Float, BinaryOp::Div) => "divf",
        (Kind::Float, BinaryOp::Lt) => "cmpf olt,",
        (Kind::Float, BinaryOp::Le) => "cmpf ole,",
        (Kind::Float, _) => "cmpf oeq,",
        (Kind::Int, BinaryOp::Sub) => "subi",
        (Kind::Int, BinaryOp::Mul) => "muli",
        (Kind::Int, BinaryOp::Max) => "maxsi",
        (Kind::Int, BinaryOp::Min) => "minsi",
        (Kind::Int, BinaryOp::Lt) => "cmpi slt,",
        (Kind::Int, BinaryOp::Le) => "cmpi sle,",
        (Kind::Int, _) => "cmpi eq,",
        (Kind::Bool, BinaryOp::And) => "andi",
        (Kind::Bool, _) => "ori",
    };
    f.op(format!("arith.{op} {x}, {y} : {t}"))
}

/// Quotient of integers that never traps: by zero gives x, the smallest by -1 wraps.
fn int_div(f: &mut Func, x: &Val, y: &Val, lanes: usize) -> Val {
    let t = vty(lanes, "i32");
    let (zero, one, minus) = (f.i32(0, lanes), f.i32(1, lanes), f.i32(-1, lanes));
    let a = f.op(format!("arith.cmpi eq, {y}, {zero} : {t}"));
    let m = f.op(format!("arith.cmpi eq, {y}, {minus} : {t}"));
    let safe = select(f, &a, &one, y, "i32", lanes);
    let safe = select(f, &m, &one, &safe, "i32", lanes);
    let q = f.op(format!("arith.divsi {x}, {safe} : {t}"));
    let n = f.op(format!("arith.subi {zero}, {x} : {t}"));
    select(f, &m, &n, &q, "i32", lanes)
}

impl Text<'_> {
    /// The text of one expression; its operands are written where they are missing.
    pub(super) fn operation(&mut self, f: &mut Func, e: ExId) -> Val {
        f.of(&self.made_for(e), |f| self.written(f, e))
    }

    fn written(&mut self, f: &mut Func, e: ExId) -> Val {
        let info = self.p.b.exprs.info(e).clone();
        let lanes = if info.lane { self.lanes } else { 1 };
        let get = |s: &mut Self, f: &mut Func, x: ExId| if info.lane { s.vector(f, x) } else { s.scalar(f, x) };
        let kind_of = |s: &Self, x: ExId| s.p.b.exprs.info(x).kind;
        match info.ex {
            Ex::Load { buf, addr, dtype, mask } => self.load(f, buf, &addr, dtype, mask),
            Ex::Const(kind, bits) => constant(f, kind, bits, lanes),
            Ex::Index(p) => self.index_value(f, &p, lanes),
            Ex::Inside(p, lo, hi) => self.inside(f, &p, lo, hi, lanes),
            // Defined by the statement that finishes the reduction.
            Ex::Reduced(..) => constant(f, info.kind, 0, lanes),
            Ex::Unary(u, x) => {
                let kind = kind_of(self, x);
                let x = get(self, f, x);
                unary(f, u, &x, kind, lanes)
            }
            Ex::Binary(b, x, y) => {
                let kind = kind_of(self, x);
                let (x, y) = (get(self, f, x), get(self, f, y));
                binary(f, b, &x, &y, kind, lanes)
            }
            Ex::Add(v) => self.sum(f, &v, info.kind, lanes),
            Ex::Select(c, x, y) => {
                let (c, x, y) = (get(self, f, c), get(self, f, x), get(self, f, y));
                select(f, &c, &x, &y, info.kind.name(), lanes)
            }
            Ex::Convert(to, x) => {
                let kind = kind_of(self, x);
                let x = get(self, f, x);
                convert(f, &x, kind, to, lanes)
            }
            Ex::Round(d, x) => {
                let x = get(self, f, x);
                round(f, &x, d, lanes)
            }
        }
    }

    /// A sum; products are fused into it.
    fn sum(&mut self, f: &mut Func, parts: &[ExId], kind: Kind, lanes: usize) -> Val {
        let t = vty(lanes, kind.name());
        let get = |s: &mut Self, f: &mut Func, x: ExId| if lanes > 1 { s.vector(f, x) } else { s.scalar(f, x) };
        if kind == Kind::Int {
            let mut v = get(self, f, parts[0]);
            for x in &parts[1..] {
                let x = get(self, f, *x);
                v = f.op(format!("arith.addi {v}, {x} : {t}"));
            }
            return v;
        }
        let first = self.first(parts);
        let mut v = get(self, f, parts[first]);
        for (i, x) in parts.iter().enumerate() {
            if i == first {
                continue;
            }
            v = match self.product(*x) {
                Some((a, b)) => {
                    let (a, b) = (get(self, f, a), get(self, f, b));
                    f.op(format!("math.fma {a}, {b}, {v} : {t}"))
                }
                None => {
                    let x = get(self, f, *x);
                    f.op(format!("arith.addf {v}, {x} : {t}"))
                }
            };
        }
        v
    }

    fn load(&mut self, f: &mut Func, buf: Buf, addr: &Poly, d: DType, mask: Mask) -> Val {
        let (elem, lanes) = (stored(d), self.lanes);
        if !self.p.b.space.lane(addr) {
            let p = self.pointer(f, buf, addr);
            let v = f.load(&p, elem);
            return widen(f, v, d, 1);
        }
        if self.p.b.space.lane_stride(addr) == Some(1) {
            let base = addr.filter(|m| !m.iter().any(|a| self.p.b.space.info(*a).lane));
            let p = self.pointer(f, buf, &base);
            let v = match self.mask(f, mask) {
                Some(m) => f.masked_load(&p, &m, elem, lanes),
                None => f.load(&p, &vty(lanes, elem)),
            };
            return widen(f, v, d, lanes);
        }
        let t = vty(lanes, elem);
        let zero = if elem.starts_with('i') { format!("dense<0> : {t}") } else { format!("dense<0.0> : {t}") };
        let mut v = f.konst(&zero);
        for k in 0..lanes as u8 {
            let Some(at) = self.lane_address(addr, k, mask) else { continue };
            let p = self.pointer(f, buf, &at);
            let x = f.load(&p, elem);
            v = f.op(format!("vector.insert {x}, {v}[{k}] : {elem} into {t}"));
        }
        widen(f, v, d, lanes)
    }

    /// An index as i32.
    fn index_value(&mut self, f: &mut Func, p: &Poly, lanes: usize) -> Val {
        if lanes == 1 {
            let v = self.poly(f, p);
            return f.op(format!("arith.trunci {v} : i64 to i32"));
        }
        let t = vty(lanes, "i32");
        if let Some(stride) = self.p.b.space.lane_stride(p) {
            let base = p.filter(|m| !m.iter().any(|a| self.p.b.space.info(*a).lane));
            let b = self.poly(f, &base);
            let b = f.op(format!("arith.trunci {b} : i64 to i32"));
            let b = f.splat(&b, "i32", lanes);
            let ids =
                (0..lanes as i64).map(|i| (i * stride) as i32).map(|i| i.to_string()).collect::<Vec<_>>().join(", ");
            let c = f.konst(&format!("dense<[{ids}]> : {t}"));
            return f.op(format!("arith.addi {b}, {c} : {t}"));
        }
        let mut v = f.konst(&format!("dense<0> : {t}"));
        for k in 0..lanes as u8 {
            let Some(at) = self.lane_address(p, k, Mask::Full) else { continue };
            let x = self.poly(f, &at);
            let x = f.op(format!("arith.trunci {x} : i64 to i32"));
            v = f.op(format!("vector.insert {x}, {v}[{k}] : i32 into {t}"));
        }
        v
    }

    fn inside(&mut self, f: &mut Func, p: &Poly, lo: i64, hi: i64, lanes: usize) -> Val {
        if lanes == 1 {
            let v = self.poly(f, p);
            let (lo, hi) = (f.i64(lo), f.i64(hi));
            let (a, b) = (f.cmp("sge", &v, &lo), f.cmp("slt", &v, &hi));
            return f.op(format!("arith.andi {a}, {b} : i1"));
        }
        let clamp = |x: i64| x.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as i32;
        let v = self.index_value(f, p, lanes);
        let (lo, hi) = (f.i32(clamp(lo), lanes), f.i32(clamp(hi), lanes));
        let t = vty(lanes, "i32");
        let a = f.op(format!("arith.cmpi sge, {v}, {lo} : {t}"));
        let b = f.op(format!("arith.cmpi slt, {v}, {hi} : {t}"));
        f.op(format!("arith.andi {a}, {b} : {}", vty(lanes, "i1")))
    }
}
