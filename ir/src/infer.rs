//! Result types of operators: the one place that knows shape rules.
//!
//! Every fault names the operator, the operands' types and the rule. Nothing here looks at values.

use crate::error::IrError;
use crate::graph::Param;
use crate::op::{AttentionAttrs, BinaryOp, Op, UnaryOp};
use crate::types::{DType, Dim, Sym, TensorType};

/// The largest constant, in elements: constants are for tables and scalars, not for weights.
pub const MAX_CONST: u64 = 1 << 16;

/// The result type of `op` on operands of these types.
///
/// # Errors
/// [`IrError::Shape`] with the rule that is broken.
pub fn infer(params: &[Param], op: &Op, inputs: &[&TensorType]) -> Result<TensorType, IrError> {
    rule(params, op, inputs).map_err(|why| IrError::Shape {
        op: op.name().into(),
        types: inputs.iter().map(|t| t.to_string()).collect::<Vec<_>>().join(", "),
        why,
    })
}

fn arity(inputs: &[&TensorType], n: usize) -> Result<(), String> {
    if inputs.len() == n { Ok(()) } else { Err(format!("takes {n} operands, got {}", inputs.len())) }
}

fn need(ok: bool, why: &str) -> Result<(), String> {
    if ok { Ok(()) } else { Err(why.into()) }
}

fn axis_of(t: &TensorType, axis: u8) -> Result<Dim, String> {
    t.shape.get(axis as usize).copied().ok_or_else(|| format!("axis {axis} is out of range for rank {}", t.rank()))
}

fn known_axis(t: &TensorType, axis: u8) -> Result<u64, String> {
    axis_of(t, axis)?.known().ok_or_else(|| format!("axis {axis} is symbolic; this operator needs a static one"))
}

/// Shape of an elementwise result: all operands of one shape, rank-0 operands fit anywhere.
fn join(inputs: &[&TensorType]) -> Result<Vec<Dim>, String> {
    let full = inputs.iter().find(|t| t.rank() > 0).map(|t| t.shape.clone()).unwrap_or_default();
    for t in inputs {
        need(t.rank() == 0 || t.shape == full, "operands must have one shape (or rank 0)")?;
    }
    Ok(full)
}

/// Product of the static dimensions, and the sorted symbols, of a shape.
fn measure(shape: &[Dim]) -> Result<(u64, Vec<Sym>), String> {
    let (mut n, mut syms) = (1u64, vec![]);
    for d in shape {
        match d {
            Dim::Known(k) => n = n.checked_mul(*k).ok_or("the number of elements does not fit 64 bits")?,
            Dim::Symbol(s) => syms.push(*s),
        }
    }
    syms.sort_unstable();
    Ok((n, syms))
}

fn i32_rank1(t: &TensorType, what: &str) -> Result<(), String> {
    need(t.dtype == DType::I32 && t.rank() == 1, &format!("{what} must be i32 of rank 1"))
}

/// What every attention operator asks of q, of k (and v) and of the segment bounds.
fn heads(a: &AttentionAttrs, q: &TensorType, kv: &[&TensorType], bounds: &[&TensorType]) -> Result<(), String> {
    need(a.kv_heads > 0 && a.heads.is_multiple_of(a.kv_heads) && a.head_dim > 0, "kv_heads must divide heads")?;
    let (h, w) = (u64::from(a.heads) * u64::from(a.head_dim), u64::from(a.kv_heads) * u64::from(a.head_dim));
    need(q.dtype.is_float() && kv.iter().all(|t| t.dtype == q.dtype), "q, k, v: floats of one type")?;
    need(q.rank() == 2 && q.shape[1] == Dim::Known(h), "q must be [T, heads*head_dim]")?;
    need(kv[0].rank() == 2 && kv[0].shape[1] == Dim::Known(w), "k must be [N, kv_heads*head_dim]")?;
    need(kv.iter().all(|t| t.shape == kv[0].shape), "v must be like k")?;
    i32_rank1(bounds[0], "q_segments")?;
    i32_rank1(bounds[1], "kv_start")?;
    i32_rank1(bounds[2], "kv_len")?;
    need(bounds[1].shape == bounds[2].shape, "kv_start and kv_len must agree")?;
    if let (Dim::Known(s1), Dim::Known(s)) = (bounds[0].shape[0], bounds[1].shape[0]) {
        need(s1 == s + 1, "q_segments must have one element more than kv_len")?;
    }
    Ok(())
}

fn rule(params: &[Param], op: &Op, x: &[&TensorType]) -> Result<TensorType, String> {
    Ok(match op {
        Op::Input { dtype, shape, .. } => {
            arity(x, 0)?;
            TensorType { dtype: *dtype, shape: shape.clone() }
        }
        Op::Param(p) => {
            arity(x, 0)?;
            params.get(p.index()).map(|p| p.ty.clone()).ok_or_else(|| format!("there is no parameter {p}"))?
        }
        Op::Const { dtype, shape, bits } => {
            arity(x, 0)?;
            let n = shape.iter().try_fold(1u64, |n, d| n.checked_mul(*d)).filter(|n| *n <= MAX_CONST);
            need(n == Some(bits.len() as u64), "the number of elements must be what the shape says, at most 65536")?;
            TensorType::new(*dtype, shape.iter().copied())
        }
        Op::Iota { shape, axis } => {
            arity(x, 0)?;
            let t = TensorType { dtype: DType::I32, shape: shape.clone() };
            axis_of(&t, *axis)?;
            t
        }
        Op::Unary(u) => {
            arity(x, 1)?;
            match u {
                UnaryOp::Not => need(x[0].dtype == DType::Bool, "needs a bool")?,
                UnaryOp::Neg | UnaryOp::Abs => need(x[0].dtype != DType::Bool, "needs a number")?,
                _ => need(x[0].dtype.is_float(), "needs a float")?,
            }
            x[0].clone()
        }
        Op::Binary(b) => {
            arity(x, 2)?;
            need(x[0].dtype == x[1].dtype, "operands must have one element type")?;
            let logic = matches!(b, BinaryOp::And | BinaryOp::Or);
            need(logic == (x[0].dtype == DType::Bool), "logic takes bools, arithmetic and comparison take numbers")?;
            let dtype = if b.is_compare() { DType::Bool } else { x[0].dtype };
            TensorType { dtype, shape: join(x)? }
        }
        Op::Add => {
            need(x.len() >= 2, "takes at least two operands")?;
            need(x.iter().all(|t| t.dtype == x[0].dtype), "operands must have one element type")?;
            need(x[0].dtype != DType::Bool, "needs numbers")?;
            TensorType { dtype: x[0].dtype, shape: join(x)? }
        }
        Op::Select => {
            arity(x, 3)?;
            need(x[0].dtype == DType::Bool, "the first operand must be bool")?;
            need(x[1].dtype == x[2].dtype, "both values must have one element type")?;
            TensorType { dtype: x[1].dtype, shape: join(x)? }
        }
        Op::Cast(d) => {
            arity(x, 1)?;
            TensorType { dtype: *d, shape: x[0].shape.clone() }
        }
        Op::MatMul { ta, tb } => {
            arity(x, 2)?;
            let (a, b) = (x[0], x[1]);
            need(a.dtype.is_float() && a.dtype == b.dtype, "operands must be floats of one type")?;
            need(a.rank() >= 2 && a.rank() == b.rank(), "operands must have one rank, at least 2")?;
            let n = a.rank() - 2;
            need(a.shape[..n] == b.shape[..n], "batch axes must agree")?;
            let pick = |t: &TensorType, flip: bool| {
                let (r, c) = (t.shape[n], t.shape[n + 1]);
                if flip { (c, r) } else { (r, c) }
            };
            let ((m, ka), (kb, c)) = (pick(a, *ta), pick(b, *tb));
            need(ka == kb, "inner dimensions must agree")?;
            let mut shape = a.shape[..n].to_vec();
            shape.extend([m, c]);
            TensorType { dtype: DType::F32, shape }
        }
        Op::Reduce { axis, .. } => {
            arity(x, 1)?;
            axis_of(x[0], *axis)?;
            need(matches!(x[0].dtype, DType::F32 | DType::I32), "needs f32 or i32; cast first")?;
            let mut t = x[0].clone();
            t.shape.remove(*axis as usize);
            t
        }
        Op::TopK { k, indices } => {
            arity(x, 1)?;
            need(x[0].dtype == DType::F32 && x[0].rank() > 0, "needs f32 rows")?;
            let axis = x[0].rank() - 1;
            let n = known_axis(x[0], axis as u8)?;
            need((1..=n).contains(k), &format!("{k} must be from 1 to the {n} elements of a row"))?;
            let mut t = x[0].clone();
            t.shape[axis] = Dim::Known(*k);
            t.dtype = if *indices { DType::I32 } else { DType::F32 };
            t
        }
        Op::Reshape(shape) => {
            arity(x, 1)?;
            need(measure(shape)? == measure(&x[0].shape)?, "both shapes must have the same elements")?;
            TensorType { dtype: x[0].dtype, shape: shape.clone() }
        }
        Op::Transpose(perm) => {
            arity(x, 1)?;
            let mut seen = vec![false; x[0].rank()];
            need(perm.len() == x[0].rank(), "the permutation must name every axis once")?;
            for p in perm {
                let s = seen.get_mut(*p as usize).ok_or("the permutation must name every axis once")?;
                need(!std::mem::replace(s, true), "the permutation must name every axis once")?;
            }
            TensorType { dtype: x[0].dtype, shape: perm.iter().map(|p| x[0].shape[*p as usize]).collect() }
        }
        Op::Broadcast { shape, axes } => {
            arity(x, 1)?;
            need(axes.len() == x[0].rank(), "needs one target axis per operand axis")?;
            need(axes.windows(2).all(|w| w[0] < w[1]), "target axes must ascend")?;
            for (a, d) in axes.iter().zip(&x[0].shape) {
                need(shape.get(*a as usize) == Some(d), "a mapped axis must keep its dimension")?;
            }
            TensorType { dtype: x[0].dtype, shape: shape.clone() }
        }
        Op::Slice { axis, start, end } => {
            arity(x, 1)?;
            let n = known_axis(x[0], *axis)?;
            need(start < end && *end <= n, &format!("{start}..{end} must be a non-empty part of 0..{n}"))?;
            let mut t = x[0].clone();
            t.shape[*axis as usize] = Dim::Known(end - start);
            t
        }
        Op::Pad { axis, lo, hi } => {
            arity(x, 1)?;
            let n = known_axis(x[0], *axis)?;
            let mut t = x[0].clone();
            let sum =
                n.checked_add(*lo).and_then(|n| n.checked_add(*hi)).ok_or("the padded axis does not fit 64 bits")?;
            t.shape[*axis as usize] = Dim::Known(sum);
            t
        }
        Op::Concat { axis } => {
            need(!x.is_empty(), "takes at least one operand")?;
            let mut t = x[0].clone();
            let mut n = 0u64;
            for o in x {
                let k = known_axis(o, *axis)?;
                let mut like = (*o).clone();
                like.shape[*axis as usize] = x[0].shape[*axis as usize];
                need(like == *x[0], "operands must agree in all but the concatenated axis")?;
                n = n.checked_add(k).ok_or("the joined axis does not fit 64 bits")?;
            }
            t.shape[*axis as usize] = Dim::Known(n);
            t
        }
        Op::Gather { axis } => {
            arity(x, 2)?;
            axis_of(x[0], *axis)?;
            i32_rank1(x[1], "the index")?;
            let mut t = x[0].clone();
            t.shape[*axis as usize] = x[1].shape[0];
            t
        }
        Op::Scatter { axis, .. } => {
            arity(x, 3)?;
            axis_of(x[0], *axis)?;
            i32_rank1(x[1], "the index")?;
            let mut like = x[0].clone();
            like.shape[*axis as usize] = x[1].shape[0];
            need(*x[2] == like, "the update must be the target with the indexed axis as long as the index")?;
            x[0].clone()
        }
        Op::Attention(a) => {
            arity(x, 6)?;
            heads(a, x[0], &x[1..3], &x[3..])?;
            x[0].clone()
        }
        Op::AttentionLse(a) => {
            arity(x, 5)?;
            heads(a, x[0], &x[1..2], &x[2..])?;
            TensorType { dtype: DType::F32, shape: vec![x[0].shape[0], u64::from(a.heads).into()] }
        }
        Op::AttentionGrad { attrs: a, wrt } => {
            arity(x, 9)?;
            heads(a, x[0], &x[1..3], &x[6..])?;
            need(x[3] == x[0] && x[5] == x[0], "out and d_out must be like q")?;
            let lse = TensorType { dtype: DType::F32, shape: vec![x[0].shape[0], u64::from(a.heads).into()] };
            need(*x[4] == lse, "lse must be f32 [T, heads]")?;
            x[*wrt as usize].clone()
        }
        Op::After => {
            arity(x, 2)?;
            x[0].clone()
        }
        Op::StopGradient => {
            arity(x, 1)?;
            x[0].clone()
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn t(s: &[u64]) -> TensorType {
        TensorType::new(DType::F32, s.iter().copied())
    }

    #[test]
    fn matmul_flags() {
        let r = infer(&[], &Op::MatMul { ta: false, tb: true }, &[&t(&[3, 4]), &t(&[5, 4])]).unwrap();
        assert_eq!(r, t(&[3, 5]));
        let e = infer(&[], &Op::MatMul { ta: true, tb: true }, &[&t(&[3, 4]), &t(&[5, 4])]).unwrap_err();
        assert!(e.to_string().contains("inner dimensions") && e.to_string().contains("f32[3,4]"), "{e}");
    }

    #[test]
    fn symbolic_reshape_keeps_symbols() {
        let x = TensorType::new(DType::F32, [Dim::Symbol(Sym::T), Dim::Known(576)]);
        let to = |d: &[Dim]| infer(&[], &Op::Reshape(d.to_vec()), &[&x]);
        assert!(to(&[Dim::Symbol(Sym::T), Dim::Known(9), Dim::Known(64)]).is_ok());
        assert!(to(&[Dim::Symbol(Sym::S), Dim::Known(576)]).is_err());
    }
}
