//! Elementwise operators: unary functions, arithmetic, comparison, n-ary sums, selection, casts.
//!
//! Arithmetic of 16-bit floats is done in f32 and rounded once. Integers wrap. A NaN is never lost: `max` and `min` give
//! NaN when an operand is NaN.

use super::tensor::{Data, Tensor};
use crate::op::{BinaryOp, UnaryOp};
use crate::types::DType;

/// The error function, relative error below 1e-14: a series of positive terms (Abramowitz and Stegun 7.1.6).
fn erf(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return x.signum();
    }
    let (mut term, mut sum, mut n) = (x, x, 0.0);
    while term.abs() > sum.abs() * 1e-17 {
        n += 1.0;
        term *= 2.0 * x * x / (2.0 * n + 1.0);
        sum += term;
    }
    sum * std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp()
}

fn float_unary(op: UnaryOp, x: f32) -> f32 {
    let w = f64::from(x);
    match op {
        UnaryOp::Neg => -x,
        UnaryOp::Abs => x.abs(),
        UnaryOp::Exp => w.exp() as f32,
        UnaryOp::Log => w.ln() as f32,
        UnaryOp::Sqrt => x.sqrt(),
        UnaryOp::Rsqrt => (1.0 / w.sqrt()) as f32,
        UnaryOp::Recip => 1.0 / x,
        UnaryOp::Sin => w.sin() as f32,
        UnaryOp::Cos => w.cos() as f32,
        UnaryOp::Tanh => w.tanh() as f32,
        UnaryOp::Erf => erf(w) as f32,
        UnaryOp::Sigmoid => (1.0 / (1.0 + (-w).exp())) as f32,
        UnaryOp::Floor => x.floor(),
        UnaryOp::Not => f32::from(u8::from(x == 0.0)),
    }
}

pub(super) fn unary(op: UnaryOp, x: &Tensor) -> Result<Tensor, String> {
    let data = match (&x.data, op) {
        (Data::I32(v), UnaryOp::Neg) => Data::I32(v.iter().map(|a| a.wrapping_neg()).collect()),
        (Data::I32(v), UnaryOp::Abs) => Data::I32(v.iter().map(|a| a.wrapping_abs()).collect()),
        (Data::Bool(v), UnaryOp::Not) => Data::Bool(v.iter().map(|a| 1 - a).collect()),
        (Data::I32(_) | Data::Bool(_), _) | (_, UnaryOp::Not) => return Err(format!("does not take {}", x.dtype())),
        _ => {
            let v = x.floats().iter().map(|a| float_unary(op, *a)).collect();
            return Ok(Tensor::from_floats(x.dtype(), x.shape.clone(), v));
        }
    };
    Ok(Tensor { shape: x.shape.clone(), data })
}

/// Reads an operand that may be of rank 0.
fn at<T: Copy>(v: &[T], scalar: bool) -> impl Fn(usize) -> T + '_ {
    move |i| if scalar { v[0] } else { v[i] }
}

fn zip<A: Copy, B: Copy, C>(a: (&[A], bool), b: (&[B], bool), n: usize, f: impl Fn(A, B) -> C) -> Vec<C> {
    let (x, y) = (at(a.0, a.1), at(b.0, b.1));
    (0..n).map(|i| f(x(i), y(i))).collect()
}

fn count(shape: &[u64]) -> usize {
    shape.iter().product::<u64>() as usize
}

/// Every operand has the result's shape or rank 0.
fn fits(x: &[&Tensor], shape: &[u64]) -> Result<(), String> {
    if x.iter().all(|t| t.shape.is_empty() || t.shape == shape) {
        return Ok(());
    }
    Err(format!("operands are {}", x.iter().map(|t| t.describe()).collect::<Vec<_>>().join(", ")))
}

fn pick<T: PartialOrd + Copy>(op: BinaryOp, a: T, b: T) -> T {
    // A NaN differs from itself and wins.
    #[allow(clippy::eq_op, reason = "the test for NaN that integers pass too")]
    let take_a = if op == BinaryOp::Max { a > b } else { a < b } || a != a;
    if take_a { a } else { b }
}

fn compare<T: PartialOrd>(op: BinaryOp, a: T, b: T) -> u8 {
    u8::from(match op {
        BinaryOp::Lt => a < b,
        BinaryOp::Le => a <= b,
        _ => a == b,
    })
}

pub(super) fn binary(op: BinaryOp, a: &Tensor, b: &Tensor, shape: &[u64]) -> Result<Tensor, String> {
    fits(&[a, b], shape)?;
    let n = count(shape);
    let (sa, sb) = (a.shape.is_empty(), b.shape.is_empty());
    let wrong = || Err(format!("does not take {} and {}", a.dtype(), b.dtype()));
    let data = match (&a.data, &b.data) {
        (Data::Bool(x), Data::Bool(y)) => Data::Bool(match op {
            BinaryOp::And => zip((x, sa), (y, sb), n, |a, b| a & b),
            BinaryOp::Or => zip((x, sa), (y, sb), n, |a, b| a | b),
            _ => return wrong(),
        }),
        (Data::I32(x), Data::I32(y)) => {
            let (x, y) = ((x.as_slice(), sa), (y.as_slice(), sb));
            match op {
                BinaryOp::Sub => Data::I32(zip(x, y, n, i32::wrapping_sub)),
                BinaryOp::Mul => Data::I32(zip(x, y, n, i32::wrapping_mul)),
                BinaryOp::Div if n > 0 && y.0.contains(&0) => return Err("an integer is divided by zero".into()),
                BinaryOp::Div => Data::I32(zip(x, y, n, i32::wrapping_div)),
                BinaryOp::Max | BinaryOp::Min => Data::I32(zip(x, y, n, |a, b| pick(op, a, b))),
                BinaryOp::Lt | BinaryOp::Le | BinaryOp::Eq => Data::Bool(zip(x, y, n, |a, b| compare(op, a, b))),
                BinaryOp::And | BinaryOp::Or => return wrong(),
            }
        }
        _ if a.dtype() == b.dtype() && a.dtype().is_float() => {
            let (fa, fb) = (a.floats(), b.floats());
            let (x, y) = ((fa.as_ref(), sa), (fb.as_ref(), sb));
            let v = match op {
                BinaryOp::Sub => zip(x, y, n, |a, b| a - b),
                BinaryOp::Mul => zip(x, y, n, |a, b| a * b),
                BinaryOp::Div => zip(x, y, n, |a, b| a / b),
                BinaryOp::Max | BinaryOp::Min => zip(x, y, n, |a, b| pick(op, a, b)),
                BinaryOp::And | BinaryOp::Or => return wrong(),
                BinaryOp::Lt | BinaryOp::Le | BinaryOp::Eq => {
                    let v = zip(x, y, n, |a, b| compare(op, a, b));
                    return Ok(Tensor { shape: shape.to_vec(), data: Data::Bool(v) });
                }
            };
            return Ok(Tensor::from_floats(a.dtype(), shape, v));
        }
        _ => return wrong(),
    };
    Ok(Tensor { shape: shape.to_vec(), data })
}

pub(super) fn add(x: &[&Tensor], shape: &[u64]) -> Result<Tensor, String> {
    fits(x, shape)?;
    let n = count(shape);
    let dtype = x[0].dtype();
    if x.iter().any(|t| t.dtype() != dtype) || dtype == DType::Bool {
        return Err("operands must be numbers of one type".into());
    }
    if dtype == DType::I32 {
        let mut sum = vec![0i32; n];
        for t in x {
            let v = at(t.as_i32().unwrap_or(&[]), t.shape.is_empty());
            sum.iter_mut().enumerate().for_each(|(i, s)| *s = s.wrapping_add(v(i)));
        }
        return Ok(Tensor::i32(shape, sum));
    }
    // In f64 the sum of two f32 values, rounded, is their f32 sum; more operands round once.
    let mut sum = vec![-0f64; n];
    for t in x {
        let f = t.floats();
        let v = at(&f, t.shape.is_empty());
        sum.iter_mut().enumerate().for_each(|(i, s)| *s += f64::from(v(i)));
    }
    Ok(Tensor::from_floats(dtype, shape, sum.into_iter().map(|s| s as f32).collect()))
}

pub(super) fn select(c: &Tensor, a: &Tensor, b: &Tensor, shape: &[u64]) -> Result<Tensor, String> {
    fits(&[c, a, b], shape)?;
    let Data::Bool(cond) = &c.data else { return Err("the condition must be bool".into()) };
    let cond = at(cond, c.shape.is_empty());
    let n = count(shape);
    fn choose<T: Copy>(n: usize, c: impl Fn(usize) -> u8, a: impl Fn(usize) -> T, b: impl Fn(usize) -> T) -> Vec<T> {
        (0..n).map(|i| if c(i) != 0 { a(i) } else { b(i) }).collect()
    }
    let (sa, sb) = (a.shape.is_empty(), b.shape.is_empty());
    let data = match (&a.data, &b.data) {
        (Data::F32(x), Data::F32(y)) => Data::F32(choose(n, cond, at(x, sa), at(y, sb))),
        (Data::BF16(x), Data::BF16(y)) => Data::BF16(choose(n, cond, at(x, sa), at(y, sb))),
        (Data::F16(x), Data::F16(y)) => Data::F16(choose(n, cond, at(x, sa), at(y, sb))),
        (Data::I32(x), Data::I32(y)) => Data::I32(choose(n, cond, at(x, sa), at(y, sb))),
        (Data::Bool(x), Data::Bool(y)) => Data::Bool(choose(n, cond, at(x, sa), at(y, sb))),
        _ => return Err("both values must have one element type".into()),
    };
    Ok(Tensor { shape: shape.to_vec(), data })
}

pub(super) fn cast(to: DType, x: &Tensor) -> Tensor {
    let shape = x.shape.clone();
    let data = match (&x.data, to) {
        _ if x.dtype() == to => x.data.clone(),
        (Data::I32(v), DType::Bool) => Data::Bool(v.iter().map(|a| u8::from(*a != 0)).collect()),
        (Data::Bool(v), DType::I32) => Data::I32(v.iter().map(|a| i32::from(*a)).collect()),
        _ => return Tensor::from_floats(to, shape, x.floats().into_owned()),
    };
    Tensor { shape, data }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn erf_agrees_with_tables() {
        // Abramowitz and Stegun, table 7.1.
        for (x, y) in [
            (0.0, 0.0),
            (0.5, 0.520_499_877_8),
            (1.0, 0.842_700_792_9),
            (2.0, 0.995_322_265_0),
            (-3.0, -0.999_977_909_5),
        ] {
            assert!((erf(x) - y).abs() < 1e-10, "erf({x})");
        }
        assert_eq!(erf(7.0), 1.0);
        assert!(erf(f64::NAN).is_nan());
    }

    #[test]
    fn max_keeps_nan() {
        assert!(pick(BinaryOp::Max, f32::NAN, 1.0).is_nan());
        assert!(pick(BinaryOp::Max, 1.0, f32::NAN).is_nan());
        assert_eq!(pick(BinaryOp::Min, 3, 2), 2);
    }
}
