//! The steps of a recipe: operators and small compositions, with the bounds of what they give.

use super::{Bound, Builder, Picks, UNIT};
use pleach_ir::{
    AttentionAttrs, BinaryOp, DType, Dim, Op, Param, ReduceOp, Role, ScatterMode, Source, Sym, TensorType, UnaryOp,
    ValueId,
};

/// Rounds: adds one unit of the size.
fn rounded(size: f64, error: f64) -> Bound {
    Bound { size, error: error + 2.0 * UNIT * size }
}

/// How many kinds of steps there are.
pub(super) const KINDS: u8 = 32;

/// A step. `None` where nothing fits.
pub(super) fn step(b: &mut Builder, kind: u8, p: &mut Picks) -> Option<ValueId> {
    match kind % KINDS {
        0..=2 => smooth(b, p),
        3..=4 => tamed(b, p),
        5..=8 => binary(b, p),
        9..=10 => sum(b, p),
        11..=13 => linear(b, p),
        14 => product(b, p),
        15 => transposed_product(b, p),
        16..=17 => reduce(b, p),
        18 => reshape(b, p),
        19 => transpose(b, p),
        20 => slice(b, p),
        21 => pad(b, p),
        22 => concat(b, p),
        23 => gather(b, p),
        24 => scatter(b, p),
        25 => select(b, p),
        26 => low_rank(b, p),
        27 => softmax(b, p),
        28 => norm(b, p),
        29 => attention(b, p),
        30 => table(b, p),
        _ => bias(b, p),
    }
}

fn any(b: &Builder, p: &mut Picks) -> Option<ValueId> {
    // The newest twelve, so that graphs grow deep as well as wide.
    let all: Vec<ValueId> = b.floats(|_, _| true).into_iter().take(12).collect();
    p.of(&all)
}

fn rank(b: &Builder, p: &mut Picks, n: std::ops::RangeInclusive<usize>) -> Option<ValueId> {
    let all: Vec<ValueId> = b.floats(|b, v| n.contains(&b.ty(v).rank())).into_iter().take(12).collect();
    p.of(&all)
}

fn unary(b: &mut Builder, u: UnaryOp, x: ValueId, bound: Bound) -> Option<ValueId> {
    b.push(Op::Unary(u), &[x], bound)
}

/// Functions with a slope of at most 1 everywhere.
fn smooth(b: &mut Builder, p: &mut Picks) -> Option<ValueId> {
    let x = any(b, p)?;
    let Bound { size, error } = b.bound(x);
    let exact = [UnaryOp::Neg, UnaryOp::Abs];
    let all = [UnaryOp::Tanh, UnaryOp::Sigmoid, UnaryOp::Sin, UnaryOp::Cos, UnaryOp::Erf, UnaryOp::Neg, UnaryOp::Abs];
    let u = p.of(&all)?;
    // The slope of erf is at most 1.13.
    let bound = if exact.contains(&u) { Bound { size, error } } else { rounded(1.0, error * 1.2) };
    unary(b, u, x, bound)
}

/// Functions with poles or growth, on operands kept away from them.
fn tamed(b: &mut Builder, p: &mut Picks) -> Option<ValueId> {
    let x = any(b, p)?;
    let Bound { size, error } = b.bound(x);
    let a = unary(b, UnaryOp::Abs, x, Bound { size, error })?;
    let choice = p.below(6);
    if choice == 0 {
        let n = unary(b, UnaryOp::Neg, a, Bound { size, error })?;
        return unary(b, UnaryOp::Exp, n, rounded(1.0, error));
    }
    let one = b.scalar(1.0)?;
    let up = rounded(size + 1.0, error);
    let s = b.push(Op::Add, &[a, one], up)?;
    match choice {
        1 => unary(b, UnaryOp::Log, s, rounded((size + 1.0).ln(), up.error)),
        2 => unary(b, UnaryOp::Sqrt, s, rounded((size + 1.0).sqrt(), up.error)),
        3 => unary(b, UnaryOp::Rsqrt, s, rounded(1.0, up.error)),
        4 => unary(b, UnaryOp::Recip, s, rounded(1.0, up.error)),
        _ => b.push(Op::Binary(BinaryOp::Div), &[x, s], rounded(1.0, 2.0 * up.error)),
    }
}

fn mate(b: &mut Builder, p: &mut Picks, x: ValueId) -> Option<ValueId> {
    let shape = b.ty(x).shape.clone();
    if p.below(5) == 0 {
        let c = p.of(&[0.5f32, -1.25, 2.0, 1.0, 0.0, 0.3])?;
        return b.scalar(c);
    }
    let all = b.floats(|b, v| b.ty(v).shape == shape || b.ty(v).rank() == 0);
    p.of(&all)
}

fn binary(b: &mut Builder, p: &mut Picks) -> Option<ValueId> {
    let x = any(b, p)?;
    let y = mate(b, p, x)?;
    let (m, n) = (b.bound(x), b.bound(y));
    let (op, bound) = match p.below(4) {
        0 => (BinaryOp::Sub, rounded(m.size + n.size, m.error + n.error)),
        1 => (BinaryOp::Max, Bound { size: m.size.max(n.size), error: m.error.max(n.error) }),
        2 => (BinaryOp::Min, Bound { size: m.size.max(n.size), error: m.error.max(n.error) }),
        _ => (BinaryOp::Mul, times(m, n)),
    };
    b.push(Op::Binary(op), &[x, y], bound)
}

fn times(m: Bound, n: Bound) -> Bound {
    rounded(m.size * n.size, m.size * n.error + n.size * m.error + m.error * n.error)
}

/// A sum of `k` terms of this bound.
fn series(term: Bound, k: f64) -> Bound {
    Bound { size: term.size * k, error: term.error * k + UNIT * term.size * k * (4.0 + k.sqrt()) }
}

fn sum(b: &mut Builder, p: &mut Picks) -> Option<ValueId> {
    let x = any(b, p)?;
    let mut all = vec![x];
    for _ in 0..1 + p.below(2) {
        all.push(mate(b, p, x)?);
    }
    let size: f64 = all.iter().map(|v| b.bound(*v).size).sum();
    let error: f64 = all.iter().map(|v| b.bound(*v).error).sum();
    b.push(Op::Add, &all, rounded(size, error + UNIT * size))
}

fn matmul(b: &mut Builder, x: ValueId, y: ValueId, ta: bool, tb: bool) -> Option<ValueId> {
    let (t, n) = (b.ty(x), b.ty(x).rank());
    let k = b.size(*t.shape.get(if ta { n.checked_sub(2)? } else { n.checked_sub(1)? })?) as f64;
    let bound = series(times(b.bound(x), b.bound(y)), k);
    b.push(Op::MatMul { ta, tb }, &[x, y], bound)
}

fn linear(b: &mut Builder, p: &mut Picks) -> Option<ValueId> {
    let x = rank(b, p, 2..=2)?;
    let k = b.ty(x).shape[1].known()?;
    let n = 1 + p.below(24);
    let tb = p.below(3) > 0;
    let w = b.param("w", None, &if tb { [n, k] } else { [k, n] })?;
    matmul(b, x, w, false, tb)
}

/// A linear layer with a low-rank branch and its scale.
fn low_rank(b: &mut Builder, p: &mut Picks) -> Option<ValueId> {
    let x = rank(b, p, 2..=2)?;
    let k = b.ty(x).shape[1].known()?;
    let (n, r) = (1 + p.below(20), 1 + p.below(5));
    let w = b.param("w", None, &[n, k])?;
    let a = b.param("lora_A", Some(0), &[r, k])?;
    let up = b.param("lora_B", Some(0), &[n, r])?;
    let s = b.param("scale", Some(0), &[])?;
    let base = matmul(b, x, w, false, true)?;
    let down = matmul(b, x, a, false, true)?;
    let branch = matmul(b, down, up, false, true)?;
    let bound = times(b.bound(branch), b.bound(s));
    let scaled = b.push(Op::Binary(BinaryOp::Mul), &[branch, s], bound)?;
    let (m, n) = (b.bound(base), b.bound(scaled));
    b.push(Op::Add, &[base, scaled], rounded(m.size + n.size, m.error + n.error))
}

/// The product of two values that fit, batched where both are of rank 3.
fn product(b: &mut Builder, p: &mut Picks) -> Option<ValueId> {
    let x = rank(b, p, 2..=3)?;
    let t = b.ty(x).clone();
    let n = t.rank();
    let fits = |b: &Builder, v: ValueId| {
        let u = b.ty(v);
        u.rank() == n && u.shape[..n - 2] == t.shape[..n - 2] && u.shape[n - 1] == t.shape[n - 1]
    };
    let y = p.of(&b.floats(fits))?;
    matmul(b, x, y, false, true)
}

fn transposed_product(b: &mut Builder, p: &mut Picks) -> Option<ValueId> {
    let x = rank(b, p, 2..=2)?;
    let rows = b.ty(x).shape[0];
    let y = p.of(&b.floats(|b, v| b.ty(v).rank() == 2 && b.ty(v).shape[0] == rows))?;
    matmul(b, x, y, true, false)
}

/// A reduction, put back over the axis half of the time.
fn reduce(b: &mut Builder, p: &mut Picks) -> Option<ValueId> {
    let x = rank(b, p, 1..=3)?;
    let t = b.ty(x).clone();
    let axis = p.below(t.rank() as u64) as u8;
    let op = p.of(&[ReduceOp::Sum, ReduceOp::Max, ReduceOp::Min, ReduceOp::Sum])?;
    let k = b.size(t.shape[axis as usize]) as f64;
    let bound = if op == ReduceOp::Sum { series(b.bound(x), k) } else { b.bound(x) };
    let r = b.push(Op::Reduce { op, axis }, &[x], bound)?;
    if p.below(2) == 0 { Some(r) } else { over(b, r, &t, axis) }
}

/// A value without an axis repeated along it.
fn over(b: &mut Builder, x: ValueId, t: &TensorType, axis: u8) -> Option<ValueId> {
    let axes = (0..t.rank() as u8).filter(|a| *a != axis).collect();
    let bound = b.bound(x);
    b.push(Op::Broadcast { shape: t.shape.clone(), axes }, &[x], bound)
}

/// Splits the last axis, or joins the last two.
fn reshape(b: &mut Builder, p: &mut Picks) -> Option<ValueId> {
    let x = rank(b, p, 1..=4)?;
    let mut shape = b.ty(x).shape.clone();
    let last = shape.pop()?.known()?;
    if p.below(2) == 0 && !shape.is_empty() {
        match shape.pop()? {
            Dim::Known(n) => shape.push(Dim::Known(n.checked_mul(last)?)),
            s => shape.extend([s, Dim::Known(1), Dim::Known(last)]),
        }
    } else {
        let parts: Vec<u64> = (1..=last).filter(|d| last % d == 0).collect();
        let k = p.of(&parts)?;
        shape.extend([Dim::Known(last / k), Dim::Known(k)]);
    }
    let bound = b.bound(x);
    b.push(Op::Reshape(shape), &[x], bound)
}

fn transpose(b: &mut Builder, p: &mut Picks) -> Option<ValueId> {
    let x = rank(b, p, 2..=3)?;
    let perms: &[&[u8]] =
        if b.ty(x).rank() == 2 { &[&[1, 0]] } else { &[&[1, 0, 2], &[0, 2, 1], &[2, 0, 1], &[2, 1, 0], &[1, 2, 0]] };
    let (perm, bound) = (p.of(perms)?, b.bound(x));
    b.push(Op::Transpose(perm.to_vec()), &[x], bound)
}

/// A value and one of its static axes.
fn static_axis(b: &Builder, p: &mut Picks) -> Option<(ValueId, u8, u64)> {
    let x = rank(b, p, 1..=3)?;
    let shape = &b.ty(x).shape;
    let all: Vec<(u8, u64)> = (0..shape.len()).filter_map(|i| Some((i as u8, shape[i].known()?))).collect();
    let (axis, n) = p.of(&all)?;
    Some((x, axis, n))
}

fn slice(b: &mut Builder, p: &mut Picks) -> Option<ValueId> {
    let (x, axis, n) = static_axis(b, p)?;
    let start = p.below(n);
    let end = start + 1 + p.below(n - start);
    let bound = b.bound(x);
    b.push(Op::Slice { axis, start, end }, &[x], bound)
}

fn pad(b: &mut Builder, p: &mut Picks) -> Option<ValueId> {
    let (x, axis, _) = static_axis(b, p)?;
    let (lo, hi) = (p.below(3), p.below(4));
    let bound = b.bound(x);
    b.push(Op::Pad { axis, lo, hi }, &[x], bound)
}

fn concat(b: &mut Builder, p: &mut Picks) -> Option<ValueId> {
    let (x, axis, _) = static_axis(b, p)?;
    let t = b.ty(x).clone();
    let like = |b: &Builder, v: ValueId| {
        let mut u = b.ty(v).clone();
        let Some(d) = u.shape.get(axis as usize).copied().filter(|d| d.known().is_some()) else { return false };
        u.shape[axis as usize] = t.shape[axis as usize];
        u == t && d.known().is_some()
    };
    let y = p.of(&b.floats(like))?;
    let (m, n) = (b.bound(x), b.bound(y));
    b.push(Op::Concat { axis }, &[x, y], Bound { size: m.size.max(n.size), error: m.error.max(n.error) })
}

/// Rows by an input, of the tokens or of a table.
fn gather(b: &mut Builder, p: &mut Picks) -> Option<ValueId> {
    let (x, axis, _) = static_axis(b, p)?;
    let i = b.input(&format!("index{}", p.below(2)), DType::I32, vec![Dim::Symbol(Sym::T)])?;
    let bound = b.bound(x);
    b.push(Op::Gather { axis }, &[x, i], bound)
}

/// Rows of the tokens written into a cache, or added to one.
fn scatter(b: &mut Builder, p: &mut Picks) -> Option<ValueId> {
    let u = p.of(&b.floats(|b, v| b.ty(v).rank() == 2 && b.ty(v).shape[0] == Dim::Symbol(Sym::T)))?;
    let width = b.ty(u).shape[1].known()?;
    let ty = TensorType { dtype: DType::F32, shape: vec![Dim::Symbol(Sym::C), width.into()] };
    let name = format!("cache.{}", b.graph.params.len());
    let c = b.graph.add_param(Param { name, ty, role: Role::State, source: Source::Zeros });
    let old = b.leaf(Op::Param(c), 1.0)?;
    let i = b.input("at", DType::I32, vec![Dim::Symbol(Sym::T)])?;
    let n = b.bound(u);
    let (mode, bound) = match p.below(2) {
        0 => (ScatterMode::Set, Bound { size: n.size.max(1.0), error: n.error }),
        _ => (ScatterMode::Add, rounded(n.size + 1.0, n.error)),
    };
    let v = b.push(Op::Scatter { axis: 0, mode }, &[old, i, u], bound)?;
    b.assigns.push((c, v));
    Some(v)
}

/// A choice by comparing values that carry no error.
fn select(b: &mut Builder, p: &mut Picks) -> Option<ValueId> {
    let x = any(b, p)?;
    let shape = b.ty(x).shape.clone();
    let y = mate(b, p, x)?;
    let key = p.of(&b.floats(|b, v| b.ty(v).shape == shape && b.bound(v).error == 0.0))?;
    let than = b.scalar(0.25)?;
    let op = p.of(&[BinaryOp::Lt, BinaryOp::Le, BinaryOp::Eq])?;
    let c = b.push(Op::Binary(op), &[key, than], Bound { size: 1.0, error: 0.0 })?;
    let (m, n) = (b.bound(x), b.bound(y));
    b.push(Op::Select, &[c, x, y], Bound { size: m.size.max(n.size), error: m.error.max(n.error) })
}

fn softmax(b: &mut Builder, p: &mut Picks) -> Option<ValueId> {
    let x = rank(b, p, 1..=3)?;
    let t = b.ty(x).clone();
    let axis = t.rank() as u8 - 1;
    let bound = b.bound(x);
    let k = b.size(t.shape[axis as usize]) as f64;
    let top = b.push(Op::Reduce { op: ReduceOp::Max, axis }, &[x], bound)?;
    let top = over(b, top, &t, axis)?;
    let low = b.push(Op::Binary(BinaryOp::Sub), &[x, top], rounded(2.0 * bound.size, 2.0 * bound.error))?;
    let e = rounded(1.0, b.bound(low).error);
    let exp = unary(b, UnaryOp::Exp, low, e)?;
    let total = b.push(Op::Reduce { op: ReduceOp::Sum, axis }, &[exp], series(e, k))?;
    let total = over(b, total, &t, axis)?;
    // Both parts of the quotient are relative to a total of at least 1.
    let error = e.error + b.bound(total).error;
    b.push(Op::Binary(BinaryOp::Div), &[exp, total], rounded(1.0, error))
}

/// x · rsqrt(mean(x²) + 1) · w over the last axis.
fn norm(b: &mut Builder, p: &mut Picks) -> Option<ValueId> {
    let x = rank(b, p, 2..=3)?;
    let t = b.ty(x).clone();
    let axis = t.rank() as u8 - 1;
    let n = t.shape[axis as usize].known()?;
    let m = b.bound(x);
    let square = times(m, m);
    let xx = b.push(Op::Binary(BinaryOp::Mul), &[x, x], square)?;
    let total = b.push(Op::Reduce { op: ReduceOp::Sum, axis }, &[xx], series(square, n as f64))?;
    let by = b.scalar(1.0 / n as f32)?;
    let mean = times(b.bound(total), b.bound(by));
    let mean = b.push(Op::Binary(BinaryOp::Mul), &[total, by], mean)?;
    let one = b.scalar(1.0)?;
    let up = rounded(b.bound(mean).size + 1.0, b.bound(mean).error);
    let up = b.push(Op::Add, &[mean, one], up)?;
    let r = rounded(1.0, b.bound(up).error);
    let r = unary(b, UnaryOp::Rsqrt, up, r)?;
    let r = over(b, r, &t, axis)?;
    let y = times(m, b.bound(r));
    let y = b.push(Op::Binary(BinaryOp::Mul), &[x, r], y)?;
    let w = b.param("norm", None, &[n])?;
    let w =
        b.push(Op::Broadcast { shape: t.shape.clone(), axes: vec![axis] }, &[w], Bound { size: 1.0, error: 0.0 })?;
    let bound = times(b.bound(y), Bound { size: 1.0, error: 0.0 });
    b.push(Op::Binary(BinaryOp::Mul), &[y, w], bound)
}

/// Attention of a token-wise value with projections of itself.
fn attention(b: &mut Builder, p: &mut Picks) -> Option<ValueId> {
    let x = p.of(&b.floats(|b, v| b.ty(v).rank() == 2 && b.ty(v).shape[0] == Dim::Symbol(Sym::T)))?;
    let k = b.ty(x).shape[1].known()?;
    let (kv_heads, group, head_dim) = (1 + p.below(2), 1 + p.below(3), 2 * (1 + p.below(4)));
    let heads = kv_heads * group;
    let mut project = |width: u64| {
        let w = b.param("qkv", None, &[width, k])?;
        matmul(b, x, w, false, true)
    };
    let (q, key, v) = (project(heads * head_dim)?, project(kv_heads * head_dim)?, project(kv_heads * head_dim)?);
    let segments = b.input("segments", DType::I32, vec![Dim::Symbol(Sym::S1)])?;
    let start = b.input("starts", DType::I32, vec![Dim::Symbol(Sym::S)])?;
    let len = b.input("lengths", DType::I32, vec![Dim::Symbol(Sym::S)])?;
    let scale = 0.05f32;
    let causal = p.below(2) == 0;
    let window = if causal && p.below(3) == 0 { Some(2) } else { None };
    let score = series(times(b.bound(q), b.bound(key)), head_dim as f64);
    // A weight moves by at most the error of the scores, relative to itself.
    let out = b.bound(v);
    let error = out.error + 2.0 * out.size * f64::from(scale) * score.error + 4.0 * UNIT * out.size;
    let attrs = AttentionAttrs {
        heads: heads as u32,
        kv_heads: kv_heads as u32,
        head_dim: head_dim as u32,
        scale: scale.to_bits(),
        causal,
        window,
    };
    b.push(Op::Attention(attrs), &[q, key, v, segments, start, len], rounded(out.size, error))
}

/// Positions as floats, as tables of sines are made.
fn table(b: &mut Builder, p: &mut Picks) -> Option<ValueId> {
    let x = rank(b, p, 1..=2)?;
    let shape = b.ty(x).shape.clone();
    let axis = p.below(shape.len() as u64) as u8;
    let i = b.leaf(Op::Iota { shape, axis }, 30.0)?;
    b.push(Op::Cast(DType::F32), &[i], Bound { size: 30.0, error: 0.0 })
}

/// A vector along the last axis.
fn bias(b: &mut Builder, p: &mut Picks) -> Option<ValueId> {
    let x = rank(b, p, 2..=3)?;
    let t = b.ty(x).clone();
    let axis = t.rank() as u8 - 1;
    let v = b.param("bias", None, &[t.shape[axis as usize].known()?])?;
    let v = b.push(Op::Broadcast { shape: t.shape, axes: vec![axis] }, &[v], Bound { size: 1.0, error: 0.0 })?;
    let m = b.bound(x);
    b.push(Op::Add, &[x, v], rounded(m.size + 1.0, m.error))
}
