//! Combining values, lanes of a vector, and rows of a register square.

use crate::emit::expr::Kind;
use crate::emit::func::{Func, Val, vty};
use pleach_ir::ReduceOp;

/// The neutral element in every lane.
pub(super) fn neutral(f: &mut Func, op: ReduceOp, kind: Kind, lanes: usize) -> Val {
    match (kind, op) {
        (Kind::Float, ReduceOp::Sum) => f.f32(0.0, lanes),
        (Kind::Float, ReduceOp::Max) => f.f32(f32::NEG_INFINITY, lanes),
        (Kind::Float, ReduceOp::Min) => f.f32(f32::INFINITY, lanes),
        (_, ReduceOp::Sum) => f.i32(0, lanes),
        (_, ReduceOp::Max) => f.i32(i32::MIN, lanes),
        (_, ReduceOp::Min) => f.i32(i32::MAX, lanes),
    }
}

/// Two values into one.
pub(super) fn combine(f: &mut Func, op: ReduceOp, kind: Kind, lanes: usize, a: &Val, b: &Val) -> Val {
    let t = vty(lanes, kind.name());
    match (kind, op) {
        (Kind::Float, ReduceOp::Sum) => f.op(format!("arith.addf {a}, {b} : {t}")),
        (Kind::Float, ReduceOp::Max) => extreme(f, "ogt", lanes, a, b),
        (Kind::Float, ReduceOp::Min) => extreme(f, "olt", lanes, a, b),
        (_, ReduceOp::Sum) => f.op(format!("arith.addi {a}, {b} : {t}")),
        (_, ReduceOp::Max) => f.op(format!("arith.maxsi {a}, {b} : {t}")),
        (_, ReduceOp::Min) => f.op(format!("arith.minsi {a}, {b} : {t}")),
    }
}

/// The larger (`ogt`) or smaller (`olt`) of two floats; NaN when one is NaN.
pub(super) fn extreme(f: &mut Func, pred: &str, lanes: usize, a: &Val, b: &Val) -> Val {
    let t = vty(lanes, "f32");
    let c = f.op(format!("arith.cmpf {pred}, {a}, {b} : {t}"));
    let x = select(f, &c, a, b, "f32", lanes);
    // Where one is NaN the comparison fails and `b` was taken: right unless `a` is the NaN.
    let n = f.op(format!("arith.cmpf uno, {a}, {a} : {t}"));
    select(f, &n, a, &x, "f32", lanes)
}

/// `c ? a : b` lane by lane.
pub(super) fn select(f: &mut Func, c: &Val, a: &Val, b: &Val, elem: &str, lanes: usize) -> Val {
    let t = vty(lanes, elem);
    if lanes == 1 {
        return f.op(format!("arith.select {c}, {a}, {b} : {t}"));
    }
    f.op(format!("arith.select {c}, {a}, {b} : {}, {t}", vty(lanes, "i1")))
}

/// All lanes into one scalar, by halves: the order is fixed.
pub(super) fn across(f: &mut Func, op: ReduceOp, kind: Kind, lanes: usize, v: &Val) -> Val {
    let (mut v, mut n) = (v.clone(), lanes);
    let elem = kind.name();
    while n > 1 {
        let h = n / 2;
        let t = vty(n, elem);
        let list = |from: usize| (from..from + h).map(|i| i.to_string()).collect::<Vec<_>>().join(", ");
        let a = f.op(format!("vector.shuffle {v}, {v} [{}] : {t}, {t}", list(0)));
        let b = f.op(format!("vector.shuffle {v}, {v} [{}] : {t}, {t}", list(h)));
        if h == 1 {
            let one = format!("vector<1x{elem}>");
            let a = f.op(format!("vector.extract {a}[0] : {elem} from {one}"));
            let b = f.op(format!("vector.extract {b}[0] : {elem} from {one}"));
            return combine(f, op, kind, 1, &a, &b);
        }
        v = combine(f, op, kind, h, &a, &b);
        n = h;
    }
    v
}
