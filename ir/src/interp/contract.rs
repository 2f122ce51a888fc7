//! Products, reductions and attention. All accumulate in f64 and round once, to serve as the accurate side of a
//! comparison.

use super::tensor::{Data, Tensor};
use crate::op::{AttentionAttrs, ReduceOp};
use std::borrow::Cow;

/// The matrices of the last two axes as rows to contract: `[r, c]`, or `[c, r]` copied over when `flip`.
fn rows<'a>(m: &'a [f32], r: usize, c: usize, flip: bool) -> Cow<'a, [f32]> {
    if !flip {
        return Cow::Borrowed(m);
    }
    let mut out = Vec::with_capacity(m.len());
    for j in 0..c {
        out.extend((0..r).map(|i| m[i * c + j]));
    }
    Cow::Owned(out)
}

/// Sum of products in f64, in a fixed order: eight partial sums, then their sum.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    let mut s = [0f64; 8];
    let ((a8, ar), (b8, br)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    for (x, y) in a8.iter().zip(b8) {
        for i in 0..8 {
            s[i] += f64::from(x[i]) * f64::from(y[i]);
        }
    }
    for (i, (x, y)) in ar.iter().zip(br).enumerate() {
        s[i] += f64::from(*x) * f64::from(*y);
    }
    s.iter().sum()
}

pub(super) fn matmul(ta: bool, tb: bool, a: &Tensor, b: &Tensor) -> Result<Tensor, String> {
    let fault = || format!("operands are {} and {}", a.describe(), b.describe());
    if a.shape.len() < 2 || a.shape.len() != b.shape.len() || !a.dtype().is_float() || !b.dtype().is_float() {
        return Err(fault());
    }
    let n = a.shape.len() - 2;
    let (ar, ac, br, bc) = (a.shape[n], a.shape[n + 1], b.shape[n], b.shape[n + 1]);
    let ((m, ka), (cols, kb)) = (if ta { (ac, ar) } else { (ar, ac) }, if tb { (br, bc) } else { (bc, br) });
    if ka != kb || a.shape[..n] != b.shape[..n] {
        return Err(fault());
    }
    let batch = a.shape[..n].iter().product::<u64>() as usize;
    let [k, m, cols, ar, ac, br, bc] = [ka, m, cols, ar, ac, br, bc].map(|x| x as usize);
    let (fa, fb) = (a.floats(), b.floats());
    let mut out = Vec::with_capacity(batch * m * cols);
    for i in 0..batch {
        let x = rows(&fa[i * ar * ac..(i + 1) * ar * ac], ar, ac, ta);
        let y = rows(&fb[i * br * bc..(i + 1) * br * bc], br, bc, !tb);
        for r in 0..m {
            out.extend((0..cols).map(|c| dot(&x[r * k..(r + 1) * k], &y[c * k..(c + 1) * k]) as f32));
        }
    }
    let mut shape = a.shape[..n].to_vec();
    shape.extend([m as u64, cols as u64]);
    Ok(Tensor::f32(shape, out))
}

pub(super) fn reduce(op: ReduceOp, axis: usize, x: &Tensor) -> Result<Tensor, String> {
    let len = *x.shape.get(axis).ok_or("the axis is out of range")? as usize;
    let outer = x.shape[..axis].iter().product::<u64>() as usize;
    let inner = x.shape[axis + 1..].iter().product::<u64>() as usize;
    let mut shape = x.shape.clone();
    shape.remove(axis);
    fn run<T: Copy, A: Copy, R>(
        v: &[T],
        [outer, len, inner]: [usize; 3],
        start: A,
        step: impl Fn(A, T) -> A,
        end: impl Fn(A) -> R,
    ) -> Vec<R> {
        let mut out = Vec::with_capacity(outer * inner);
        for o in 0..outer {
            let mut acc = vec![start; inner];
            for l in 0..len {
                let row = &v[(o * len + l) * inner..(o * len + l + 1) * inner];
                acc.iter_mut().zip(row).for_each(|(a, x)| *a = step(*a, *x));
            }
            out.extend(acc.into_iter().map(&end));
        }
        out
    }
    let dims = [outer, len, inner];
    let nan = |a: f32, x: f32, better: bool| if x.is_nan() || better && !a.is_nan() { x } else { a };
    let data = match (&x.data, op) {
        (Data::F32(v), ReduceOp::Sum) => Data::F32(run(v, dims, 0f64, |a, x| a + f64::from(x), |a| a as f32)),
        (Data::F32(v), ReduceOp::Max) => Data::F32(run(v, dims, f32::NEG_INFINITY, |a, x| nan(a, x, x > a), |a| a)),
        (Data::F32(v), ReduceOp::Min) => Data::F32(run(v, dims, f32::INFINITY, |a, x| nan(a, x, x < a), |a| a)),
        (Data::I32(v), ReduceOp::Sum) => Data::I32(run(v, dims, 0i32, i32::wrapping_add, |a| a)),
        (Data::I32(v), ReduceOp::Max) => Data::I32(run(v, dims, i32::MIN, i32::max, |a| a)),
        (Data::I32(v), ReduceOp::Min) => Data::I32(run(v, dims, i32::MAX, i32::min, |a| a)),
        _ => return Err(format!("does not take {}", x.dtype())),
    };
    Ok(Tensor { shape, data })
}

fn bounds<'a>(t: &'a Tensor, what: &str) -> Result<&'a [i32], String> {
    let v = t.as_i32().ok_or_else(|| format!("{what} must be i32"))?;
    match v.iter().find(|x| **x < 0) {
        Some(x) => Err(format!("{what} has a negative element {x}")),
        None => Ok(v),
    }
}

pub(super) fn attention(at: &AttentionAttrs, x: &[&Tensor]) -> Result<Tensor, String> {
    let (heads, kv_heads, hd) = (at.heads as usize, at.kv_heads as usize, at.head_dim as usize);
    if kv_heads == 0 || heads % kv_heads != 0 {
        return Err("kv_heads must divide heads".into());
    }
    if at.window.is_some() && !at.causal {
        return Err("a window needs causal attention".into());
    }
    let (q, k, v) = (x[0].floats(), x[1].floats(), x[2].floats());
    let (segments, start, len) = (bounds(x[3], "q_segments")?, bounds(x[4], "kv_start")?, bounds(x[5], "kv_len")?);
    let (qw, kw) = (heads * hd, kv_heads * hd);
    let (tokens, keys) = (x[0].shape[0] as usize, x[1].shape[0] as usize);
    let ends_meet = segments.first() == Some(&0) && segments.last().map(|e| *e as usize) == Some(tokens);
    if segments.len() != len.len() + 1 || start.len() != len.len() {
        return Err(format!("{} segment bounds for {} sequences", segments.len(), len.len()));
    }
    if !ends_meet || segments.windows(2).any(|w| w[0] > w[1]) {
        return Err(format!("q_segments must ascend from 0 to the number of tokens {tokens}"));
    }
    let scale = f64::from(f32::from_bits(at.scale));
    let mut out = vec![0f32; tokens * qw];
    for s in 0..len.len() {
        let (q0, q1) = (segments[s] as usize, segments[s + 1] as usize);
        let (k0, kn, qn) = (start[s] as usize, len[s] as usize, q1 - q0);
        if k0 + kn > keys {
            return Err(format!("sequence {s} reads keys {k0}..{} of {keys}", k0 + kn));
        }
        if qn > 0 && (kn == 0 || at.causal && kn < qn) {
            return Err(format!("sequence {s} has {qn} queries but {kn} keys"));
        }
        for i in 0..qn {
            // The last query stands at the last key.
            let (lo, hi) = match (at.causal, at.window) {
                (false, _) => (0, kn),
                (true, None) => (0, kn - qn + i + 1),
                (true, Some(w)) => ((kn - qn + i + 1).saturating_sub(w as usize), kn - qn + i + 1),
            };
            if lo == hi {
                return Err("a window of no keys".into());
            }
            for h in 0..heads {
                let g = h / (heads / kv_heads);
                let qrow = &q[(q0 + i) * qw + h * hd..][..hd];
                let part = |m: usize| (k0 + m) * kw + g * hd;
                let scores: Vec<f64> = (lo..hi).map(|j| dot(qrow, &k[part(j)..][..hd]) * scale).collect();
                let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
                let total: f64 = weights.iter().sum();
                let mut acc = vec![0f64; hd];
                for (j, w) in (lo..hi).zip(&weights) {
                    acc.iter_mut().zip(&v[part(j)..][..hd]).for_each(|(a, y)| *a += w * f64::from(*y));
                }
                let to = &mut out[(q0 + i) * qw + h * hd..][..hd];
                to.iter_mut().zip(acc).for_each(|(o, a)| *o = (a / total) as f32);
            }
        }
    }
    Ok(Tensor::from_floats(x[0].dtype(), x[0].shape.clone(), out))
}
