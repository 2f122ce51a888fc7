//! The vector-Jacobian rule of every operator: from the cotangent of a result to those of its operands.
//!
//! Rules write plain operators in the form that later passes handle best: products choose flags instead of transposing,
//! parts and picked rows stay sparse ([`super::sum`]), results of the forward run are used again (exp, rsqrt, sigmoid).
//! Where a function has a kink the cotangent goes to the operand that was chosen; ties of `max` and `min` go to the
//! second operand, ties within a reduction share it.

use super::sum::Cotangent;
use super::tape::Tape;
use pleach_ir::{AttentionAttrs, AttentionWrt, BinaryOp, DType, IrError, Op, ReduceOp, ScatterMode, UnaryOp, ValueId};

/// An operator of the forward run, as values of the new entry.
pub(super) struct Site<'a> {
    pub(super) op: &'a Op,
    pub(super) x: Vec<ValueId>,
    /// Which operands need a cotangent.
    pub(super) wanted: Vec<bool>,
    pub(super) y: ValueId,
}

/// True when the result changes smoothly with operand `i`.
pub(super) fn flows(op: &Op, i: usize) -> bool {
    match op {
        Op::Input { .. } | Op::Param(_) | Op::Const { .. } | Op::Iota { .. } | Op::StopGradient => false,
        Op::Unary(UnaryOp::Floor | UnaryOp::Not) => false,
        Op::TopK { indices, .. } => !indices,
        Op::Binary(b) => !b.is_compare() && !matches!(b, BinaryOp::And | BinaryOp::Or),
        Op::Select => i > 0,
        Op::Gather { .. } | Op::After => i == 0,
        Op::Scatter { .. } => i != 1,
        Op::Attention(_) => i < 3,
        Op::AttentionLse(_) => i < 2,
        Op::AttentionGrad { .. } => i < 6,
        Op::Unary(_)
        | Op::Add
        | Op::Cast(_)
        | Op::MatMul { .. }
        | Op::Reduce { .. }
        | Op::Reshape(_)
        | Op::Transpose(_)
        | Op::Broadcast { .. }
        | Op::Slice { .. }
        | Op::Pad { .. }
        | Op::Concat { .. } => true,
    }
}

/// False for operators that only stand in a backward run.
pub(super) fn has_gradient(op: &Op) -> bool {
    !matches!(op, Op::AttentionLse(_) | Op::AttentionGrad { .. })
}

/// The contributions to the wanted operands, by position.
pub(super) fn vjp(t: &mut Tape, s: &Site, dy: ValueId) -> Result<Vec<(usize, Cotangent)>, IrError> {
    let mut out = vec![];
    let wanted: Vec<usize> = (0..s.x.len()).filter(|i| s.wanted[*i]).collect();
    if let Op::Attention(a) = s.op {
        return attention(t, s, a, dy, &wanted);
    }
    for i in wanted {
        let c = match s.op {
            Op::Unary(u) => dense(unary(t, s, *u, dy)?),
            Op::Binary(b) => {
                let d = binary(t, s, *b, i, dy)?;
                dense(fit(t, d, s.x[i])?)
            }
            Op::Add => dense(fit(t, dy, s.x[i])?),
            Op::Select => {
                let zero = t.number(0.0)?;
                let d = if i == 1 { t.select(s.x[0], dy, zero)? } else { t.select(s.x[0], zero, dy)? };
                dense(fit(t, d, s.x[i])?)
            }
            Op::Cast(_) | Op::After | Op::StopGradient => dense(dy),
            Op::MatMul { ta, tb } => dense(matmul(t, s, *ta, *tb, i, dy)?),
            Op::Reduce { op, axis } => dense(reduce(t, s, *op, *axis, dy)?),
            Op::TopK { k, .. } => dense(top_k(t, s, *k, dy)?),
            Op::Reshape(_) => {
                let shape = t.ty(s.x[0]).shape.clone();
                dense(t.push(Op::Reshape(shape), &[dy])?)
            }
            Op::Transpose(perm) => {
                let mut back = vec![0u8; perm.len()];
                perm.iter().enumerate().for_each(|(to, from)| back[*from as usize] = to as u8);
                dense(t.push(Op::Transpose(back), &[dy])?)
            }
            Op::Broadcast { axes, .. } => dense(t.sum_to(dy, axes)?),
            Op::Slice { axis, start, .. } => Cotangent::Part { axis: *axis, start: *start, value: dy },
            Op::Pad { axis, lo, .. } => dense(part(t, dy, *axis, *lo, s.x[0])?),
            Op::Concat { axis } => {
                let before = s.x[..i].iter().map(|x| t.ty(*x).shape[*axis as usize].known().unwrap_or(0)).sum();
                dense(part(t, dy, *axis, before, s.x[i])?)
            }
            Op::Gather { axis } => Cotangent::At { axis: *axis, index: s.x[1], value: dy },
            Op::Scatter { axis, mode } => dense(match (i, mode) {
                (2, _) => t.push(Op::Gather { axis: *axis }, &[dy, s.x[1]])?,
                (_, ScatterMode::Add) => dy,
                (_, ScatterMode::Set) => {
                    let shape = t.ty(s.x[2]).shape.clone();
                    let zeros = t.zeros(&shape)?;
                    t.push(Op::Scatter { axis: *axis, mode: ScatterMode::Set }, &[dy, s.x[1], zeros])?
                }
            }),
            Op::Input { .. } | Op::Param(_) | Op::Const { .. } | Op::Iota { .. } => continue,
            Op::Attention(_) | Op::AttentionLse(_) | Op::AttentionGrad { .. } => continue,
        };
        out.push((i, c));
    }
    Ok(out)
}

fn dense(v: ValueId) -> Cotangent {
    Cotangent::Dense(v)
}

/// A cotangent of an elementwise result for an operand: summed up for one of rank 0 that stood for its value everywhere.
fn fit(t: &mut Tape, d: ValueId, x: ValueId) -> Result<ValueId, IrError> {
    if t.ty(x).rank() == 0 { t.sum_to(d, &[]) } else { Ok(d) }
}

/// The elements of `dy` that came from operand `x` at `start` of an axis.
fn part(t: &mut Tape, dy: ValueId, axis: u8, start: u64, x: ValueId) -> Result<ValueId, IrError> {
    let (whole, len) = (t.ty(dy).shape[axis as usize], t.ty(x).shape[axis as usize]);
    let len = len.known().unwrap_or(0);
    if whole.known() == Some(len) { Ok(dy) } else { t.push(Op::Slice { axis, start, end: start + len }, &[dy]) }
}

fn unary(t: &mut Tape, s: &Site, u: UnaryOp, dy: ValueId) -> Result<ValueId, IrError> {
    let x = t.cast(s.x[0], DType::F32)?;
    let y = t.cast(s.y, DType::F32)?;
    match u {
        UnaryOp::Neg => t.neg(dy),
        UnaryOp::Abs => {
            let zero = t.number(0.0)?;
            let minus = t.neg(dy)?;
            let (above, below) = (t.binary(BinaryOp::Lt, zero, x)?, t.binary(BinaryOp::Lt, x, zero)?);
            let rest = t.select(below, minus, zero)?;
            t.select(above, dy, rest)
        }
        UnaryOp::Exp => t.mul(dy, y),
        UnaryOp::Log => t.div(dy, x),
        UnaryOp::Sqrt => {
            let half = t.scale(dy, 0.5)?;
            t.div(half, y)
        }
        UnaryOp::Rsqrt => {
            let square = t.mul(y, y)?;
            let cube = t.mul(square, y)?;
            let slope = t.scale(cube, -0.5)?;
            t.mul(dy, slope)
        }
        UnaryOp::Recip => {
            let square = t.mul(y, y)?;
            let d = t.mul(dy, square)?;
            t.neg(d)
        }
        UnaryOp::Sin => {
            let c = t.unary(UnaryOp::Cos, x)?;
            t.mul(dy, c)
        }
        UnaryOp::Cos => {
            let c = t.unary(UnaryOp::Sin, x)?;
            let d = t.mul(dy, c)?;
            t.neg(d)
        }
        UnaryOp::Tanh => {
            let one = t.number(1.0)?;
            let square = t.mul(y, y)?;
            let slope = t.sub(one, square)?;
            t.mul(dy, slope)
        }
        UnaryOp::Erf => {
            let square = t.mul(x, x)?;
            let minus = t.neg(square)?;
            let bell = t.unary(UnaryOp::Exp, minus)?;
            let slope = t.scale(bell, std::f32::consts::FRAC_2_SQRT_PI)?;
            t.mul(dy, slope)
        }
        UnaryOp::Sigmoid => {
            let one = t.number(1.0)?;
            let rest = t.sub(one, y)?;
            let slope = t.mul(y, rest)?;
            t.mul(dy, slope)
        }
        UnaryOp::Floor | UnaryOp::Not => {
            let zero = t.number(0.0)?;
            t.mul(dy, zero)
        }
    }
}

fn binary(t: &mut Tape, s: &Site, b: BinaryOp, i: usize, dy: ValueId) -> Result<ValueId, IrError> {
    let (p, q) = (t.cast(s.x[0], DType::F32)?, t.cast(s.x[1], DType::F32)?);
    match (b, i) {
        (BinaryOp::Sub, 0) => Ok(dy),
        (BinaryOp::Sub, _) => t.neg(dy),
        (BinaryOp::Mul, 0) => t.mul(dy, q),
        (BinaryOp::Mul, _) => t.mul(dy, p),
        (BinaryOp::Div, 0) => t.div(dy, q),
        (BinaryOp::Div, _) => {
            let y = t.cast(s.y, DType::F32)?;
            let d = t.mul(dy, y)?;
            let d = t.div(d, q)?;
            t.neg(d)
        }
        (BinaryOp::Max | BinaryOp::Min, _) => {
            let zero = t.number(0.0)?;
            let (low, high) = if b == BinaryOp::Max { (q, p) } else { (p, q) };
            let first = t.binary(BinaryOp::Lt, low, high)?;
            if i == 0 { t.select(first, dy, zero) } else { t.select(first, zero, dy) }
        }
        _ => {
            let zero = t.number(0.0)?;
            t.mul(dy, zero)
        }
    }
}

/// For y = A·B with A = a or aᵀ, B = b or bᵀ: dA = dy·Bᵀ and dB = Aᵀ·dy, transposed back by the choice of flags.
fn matmul(t: &mut Tape, s: &Site, ta: bool, tb: bool, i: usize, dy: ValueId) -> Result<ValueId, IrError> {
    let (a, b) = (s.x[0], s.x[1]);
    let dtype = t.ty(a).dtype;
    let dy = t.cast(dy, dtype)?;
    let (op, x) = match (i, ta, tb) {
        (0, false, _) => ((false, !tb), [dy, b]),
        (0, true, _) => ((tb, true), [b, dy]),
        (_, _, false) => ((!ta, false), [a, dy]),
        (_, _, true) => ((true, ta), [dy, a]),
    };
    t.push(Op::MatMul { ta: op.0, tb: op.1 }, &x)
}

fn reduce(t: &mut Tape, s: &Site, op: ReduceOp, axis: u8, dy: ValueId) -> Result<ValueId, IrError> {
    let shape = t.ty(s.x[0]).shape.clone();
    let axes: Vec<u8> = (0..shape.len() as u8).filter(|a| *a != axis).collect();
    let spread = |t: &mut Tape, v| t.push(Op::Broadcast { shape: shape.clone(), axes: axes.clone() }, &[v]);
    if op == ReduceOp::Sum {
        return spread(t, dy);
    }
    let (zero, one) = (t.number(0.0)?, t.number(1.0)?);
    let best = spread(t, s.y)?;
    let chosen = t.binary(BinaryOp::Eq, s.x[0], best)?;
    let ones = t.select(chosen, one, zero)?;
    let count = t.reduce_sum(ones, axis as usize)?;
    let share = t.div(dy, count)?;
    let share = spread(t, share)?;
    t.select(chosen, share, zero)
}

/// Each chosen element's cotangent goes where the element came from.
fn top_k(t: &mut Tape, s: &Site, k: u64, dy: ValueId) -> Result<ValueId, IrError> {
    let mut shape = t.ty(s.x[0]).shape.clone();
    let last = shape.len() - 1;
    shape.insert(last, k.into());
    let axes: Vec<u8> = (0..=last as u8).collect();
    let places = t.push(Op::TopK { k, indices: true }, &[s.x[0]])?;
    let spread = |t: &mut Tape, v| t.push(Op::Broadcast { shape: shape.clone(), axes: axes.clone() }, &[v]);
    let (places, dy) = (spread(t, places)?, spread(t, dy)?);
    let column = t.push(Op::Iota { shape: shape.clone(), axis: last as u8 + 1 }, &[])?;
    let here = t.binary(BinaryOp::Eq, places, column)?;
    let zero = t.number(0.0)?;
    let part = t.select(here, dy, zero)?;
    t.reduce_sum(part, last)
}

/// The gradients of one attention have equal operands, so that they can be one kernel.
fn attention(
    t: &mut Tape,
    s: &Site,
    attrs: &AttentionAttrs,
    dy: ValueId,
    wanted: &[usize],
) -> Result<Vec<(usize, Cotangent)>, IrError> {
    let [q, k, v, segments, start, len] = s.x[..] else { return Ok(vec![]) };
    let dtype = t.ty(q).dtype;
    let lse = t.push(Op::AttentionLse(*attrs), &[q, k, segments, start, len])?;
    let dy = t.cast(dy, dtype)?;
    let x = [q, k, v, s.y, lse, dy, segments, start, len];
    let mut out = vec![];
    for (i, (wrt, _)) in AttentionWrt::ALL.into_iter().enumerate().filter(|(i, _)| wanted.contains(i)) {
        let d = t.push(Op::AttentionGrad { attrs: *attrs, wrt }, &x)?;
        out.push((i, dense(t.cast(d, DType::F32)?)));
    }
    Ok(out)
}
