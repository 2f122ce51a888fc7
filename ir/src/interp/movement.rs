//! Operators that move elements: transpose, broadcast, slice, pad, concat, gather, scatter.
//!
//! An axis splits a tensor into `outer` × axis × `inner`; all but transpose and broadcast copy runs of `inner` elements.

use super::tensor::{Data, Tensor};
use crate::op::ScatterMode;

/// The same expression for every element type.
macro_rules! each {
    ($data:expr, $v:ident => $e:expr) => {
        match $data {
            Data::F32($v) => Data::F32($e),
            Data::BF16($v) => Data::BF16($e),
            Data::F16($v) => Data::F16($e),
            Data::I32($v) => Data::I32($e),
            Data::Bool($v) => Data::Bool($e),
        }
    };
}

/// A tensor seen from one axis.
struct Split {
    outer: usize,
    len: usize,
    inner: usize,
}

fn split(t: &Tensor, axis: usize) -> Result<Split, String> {
    let len = *t.shape.get(axis).ok_or("the axis is out of range")? as usize;
    let product = |d: &[u64]| d.iter().product::<u64>() as usize;
    Ok(Split { outer: product(&t.shape[..axis]), len, inner: product(&t.shape[axis + 1..]) })
}

fn with_axis(t: &Tensor, axis: usize, len: u64) -> Vec<u64> {
    let mut s = t.shape.clone();
    s[axis] = len;
    s
}

fn strides(shape: &[u64]) -> Vec<usize> {
    let mut s = vec![1usize; shape.len()];
    for i in (1..shape.len()).rev() {
        s[i - 1] = s[i] * shape[i] as usize;
    }
    s
}

/// Elements of `src` in the row-major order of `shape`, where a step along axis `i` moves by `strides[i]`.
fn strided<T: Copy>(src: &[T], shape: &[u64], strides: &[usize]) -> Vec<T> {
    let n = shape.iter().product::<u64>() as usize;
    let mut out = Vec::with_capacity(n);
    let (mut index, mut at) = (vec![0u64; shape.len()], 0usize);
    for _ in 0..n {
        out.push(src[at]);
        for i in (0..shape.len()).rev() {
            index[i] += 1;
            at += strides[i];
            if index[i] < shape[i] {
                break;
            }
            at -= strides[i] * shape[i] as usize;
            index[i] = 0;
        }
    }
    out
}

pub(super) fn transpose(perm: &[u8], x: &Tensor) -> Result<Tensor, String> {
    let from = strides(&x.shape);
    let axis = |p: &u8| x.shape.get(*p as usize).copied().ok_or("the permutation is out of range");
    let shape = perm.iter().map(axis).collect::<Result<Vec<u64>, _>>()?;
    let st: Vec<usize> = perm.iter().map(|p| from[*p as usize]).collect();
    let data = each!(&x.data, v => strided(v, &shape, &st));
    Ok(Tensor { shape, data })
}

pub(super) fn broadcast(axes: &[u8], x: &Tensor, shape: &[u64]) -> Result<Tensor, String> {
    let from = strides(&x.shape);
    let mut st = vec![0usize; shape.len()];
    for (i, a) in axes.iter().enumerate() {
        if shape.get(*a as usize) != x.shape.get(i) {
            return Err(format!("{} does not broadcast to {shape:?} along {axes:?}", x.describe()));
        }
        st[*a as usize] = from[i];
    }
    let data = each!(&x.data, v => strided(v, shape, &st));
    Ok(Tensor { shape: shape.to_vec(), data })
}

pub(super) fn slice(axis: usize, start: u64, end: u64, x: &Tensor) -> Result<Tensor, String> {
    let s = split(x, axis)?;
    if start > end || end > s.len as u64 {
        return Err(format!("{start}..{end} is out of range"));
    }
    let (lo, hi) = (start as usize * s.inner, end as usize * s.inner);
    let block = s.len * s.inner;
    let data =
        each!(&x.data, v => (0..s.outer).flat_map(|o| v[o * block + lo..o * block + hi].iter().copied()).collect());
    Ok(Tensor { shape: with_axis(x, axis, end - start), data })
}

pub(super) fn pad(axis: usize, lo: u64, hi: u64, x: &Tensor) -> Result<Tensor, String> {
    let s = split(x, axis)?;
    fn run<T: Copy + Default>(v: &[T], s: &Split, lo: usize, hi: usize) -> Vec<T> {
        let mut out = Vec::with_capacity((s.len + lo + hi) * s.inner * s.outer);
        for o in 0..s.outer {
            out.resize(out.len() + lo * s.inner, T::default());
            out.extend_from_slice(&v[o * s.len * s.inner..(o + 1) * s.len * s.inner]);
            out.resize(out.len() + hi * s.inner, T::default());
        }
        out
    }
    let shape = with_axis(x, axis, s.len as u64 + lo + hi);
    let data = each!(&x.data, v => run(v, &s, lo as usize, hi as usize));
    Ok(Tensor { shape, data })
}

pub(super) fn concat(axis: usize, x: &[&Tensor]) -> Result<Tensor, String> {
    let first = split(x[0], axis)?;
    let parts = x.iter().map(|t| split(t, axis)).collect::<Result<Vec<_>, _>>()?;
    let total: usize = parts.iter().map(|p| p.len).sum();
    if parts.iter().any(|p| p.outer != first.outer || p.inner != first.inner) {
        return Err("operands must agree in all but the concatenated axis".into());
    }
    macro_rules! join {
        ($variant:ident) => {{
            let mut out = Vec::with_capacity(first.outer * total * first.inner);
            for o in 0..first.outer {
                for (t, p) in x.iter().zip(&parts) {
                    let Data::$variant(v) = &t.data else { return Err("operands must have one element type".into()) };
                    out.extend_from_slice(&v[o * p.len * p.inner..(o + 1) * p.len * p.inner]);
                }
            }
            Data::$variant(out)
        }};
    }
    let data = match x[0].data {
        Data::F32(_) => join!(F32),
        Data::BF16(_) => join!(BF16),
        Data::F16(_) => join!(F16),
        Data::I32(_) => join!(I32),
        Data::Bool(_) => join!(Bool),
    };
    Ok(Tensor { shape: with_axis(x[0], axis, total as u64), data })
}

/// The indices as positions on an axis of `len` elements.
fn indices(index: &Tensor, len: usize) -> Result<Vec<usize>, String> {
    let one = |i: &i32| match usize::try_from(*i) {
        Ok(u) if u < len => Ok(u),
        _ => Err(format!("index {i} is out of range for an axis of {len}")),
    };
    index.as_i32().ok_or("the index must be i32")?.iter().map(one).collect()
}

pub(super) fn gather(axis: usize, x: &Tensor, index: &Tensor) -> Result<Tensor, String> {
    let s = split(x, axis)?;
    let at = indices(index, s.len)?;
    fn run<T: Copy>(v: &[T], s: &Split, at: &[usize]) -> Vec<T> {
        let mut out = Vec::with_capacity(s.outer * at.len() * s.inner);
        for o in 0..s.outer {
            for i in at {
                let from = (o * s.len + i) * s.inner;
                out.extend_from_slice(&v[from..from + s.inner]);
            }
        }
        out
    }
    let data = each!(&x.data, v => run(v, &s, &at));
    Ok(Tensor { shape: with_axis(x, axis, at.len() as u64), data })
}

pub(super) fn scatter(
    axis: usize,
    mode: ScatterMode,
    x: &Tensor,
    index: &Tensor,
    u: &Tensor,
) -> Result<Tensor, String> {
    let s = split(x, axis)?;
    let at = indices(index, s.len)?;
    if u.shape != with_axis(x, axis, at.len() as u64) || u.dtype() != x.dtype() {
        return Err(format!("update is {}, target is {}, {} indices", u.describe(), x.describe(), at.len()));
    }
    fn run<T: Copy>(x: &mut [T], u: &[T], s: &Split, at: &[usize], f: impl Fn(&mut T, T)) {
        for o in 0..s.outer {
            for (j, i) in at.iter().enumerate() {
                let (to, from) = ((o * s.len + i) * s.inner, (o * at.len() + j) * s.inner);
                for k in 0..s.inner {
                    f(&mut x[to + k], u[from + k]);
                }
            }
        }
    }
    let mut out = x.clone();
    match (mode, &mut out.data, &u.data) {
        (ScatterMode::Set, Data::F32(x), Data::F32(u)) => run(x, u, &s, &at, |a, b| *a = b),
        (ScatterMode::Set, Data::BF16(x), Data::BF16(u)) => run(x, u, &s, &at, |a, b| *a = b),
        (ScatterMode::Set, Data::F16(x), Data::F16(u)) => run(x, u, &s, &at, |a, b| *a = b),
        (ScatterMode::Set, Data::I32(x), Data::I32(u)) => run(x, u, &s, &at, |a, b| *a = b),
        (ScatterMode::Set, Data::Bool(x), Data::Bool(u)) => run(x, u, &s, &at, |a, b| *a = b),
        (ScatterMode::Add, Data::I32(x), Data::I32(u)) => run(x, u, &s, &at, |a, b| *a = a.wrapping_add(b)),
        (ScatterMode::Add, _, _) if x.dtype().is_float() => {
            let wide = |t: &Tensor| t.floats().iter().map(|v| f64::from(*v)).collect::<Vec<f64>>();
            let (mut sum, u) = (wide(x), wide(u));
            run(&mut sum, &u, &s, &at, |a, b| *a += b);
            return Ok(Tensor::from_floats(x.dtype(), x.shape.clone(), sum.into_iter().map(|v| v as f32).collect()));
        }
        _ => return Err(format!("does not take {}", x.dtype())),
    }
    Ok(out)
}
