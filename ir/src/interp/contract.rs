//! Products and reductions. Both accumulate in f64 and round once, to serve as the accurate side of a
//! comparison.

use super::tensor::{Data, Tensor};
use crate::op::ReduceOp;
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
pub(super) fn dot(a: &[f32], b: &[f32]) -> f64 {
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

/// The place of every element of a row is counted, so that ties and NaN come out as [`crate::Op::TopK`] says.
pub(super) fn top_k(k: usize, indices: bool, x: &Tensor) -> Result<Tensor, String> {
    let Data::F32(v) = &x.data else { return Err(format!("does not take {}", x.dtype())) };
    let n = *x.shape.last().ok_or("needs rows")? as usize;
    let mut shape = x.shape.clone();
    let rows = shape[..shape.len() - 1].iter().product::<u64>() as usize;
    *shape.last_mut().ok_or("needs rows")? = k as u64;
    let (mut values, mut places) = (vec![0f32; rows * k], vec![0i32; rows * k]);
    for (r, row) in v.chunks(n.max(1)).enumerate() {
        for (i, x) in row.iter().enumerate() {
            let before = row.iter().enumerate().filter(|(j, y)| *y > x || *y == x && *j < i).count();
            if before < k {
                values[r * k + before] += x;
                places[r * k + before] += i as i32;
            }
        }
    }
    Ok(Tensor { shape, data: if indices { Data::I32(places) } else { Data::F32(values) } })
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
