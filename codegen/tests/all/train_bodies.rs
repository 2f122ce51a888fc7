//! Bodies of row kernels as training graphs hold them: gradients of norms, activations and rotary embeddings, the loss,
//! sums over columns, and the optimizer.

use super::bodies::{B, k};
use pleach_ir::{BinaryOp, DType, Dim, Kernel, Op, ReduceOp, Sym, UnaryOp, ValueId};

/// Counted rows.
pub(crate) const L: Dim = Dim::Symbol(Sym::L);

impl B {
    /// An operand of type `d`, as f32.
    fn wide(&mut self, d: DType, shape: &[Dim]) -> ValueId {
        let x = self.arg(d, shape);
        self.cast(DType::F32, x)
    }
    fn cast(&mut self, d: DType, x: ValueId) -> ValueId {
        if self.0.ty(x).dtype == d { x } else { self.op(Op::Cast(d), &[x]) }
    }
    fn mul(&mut self, x: ValueId, y: ValueId) -> ValueId {
        self.bin(BinaryOp::Mul, x, y)
    }
    fn scaled(&mut self, x: ValueId, c: f32) -> ValueId {
        let c = self.f32(c);
        self.mul(x, c)
    }
}

/// dx of x·rms(x)⁻¹·w for a cotangent that is the sum of `terms`, added to the residual's cotangent in place.
pub(crate) fn rms_norm_grad(rows: Dim, d: u64, dtype: DType, terms: usize) -> Kernel {
    let mut b = B::new();
    let r = b.arg(DType::F32, &[rows, k(d)]);
    let x = b.wide(dtype, &[rows, k(d)]);
    let w = b.arg(DType::F32, &[k(d)]);
    let parts: Vec<ValueId> = (0..terms).map(|_| b.wide(dtype, &[rows, k(d)])).collect();
    let dy = if terms > 1 { b.op(Op::Add, &parts) } else { parts[0] };
    let q = b.mul(x, x);
    let s = b.reduce(ReduceOp::Sum, 1, q);
    let m = b.scaled(s, 1.0 / d as f32);
    let eps = b.f32(1e-5);
    let m = b.add(m, eps);
    let inv = b.un(UnaryOp::Rsqrt, m);
    let wide = b.spread(w, x, &[1]);
    let dn = b.mul(dy, wide);
    let g = b.mul(dn, x);
    let g = b.reduce(ReduceOp::Sum, 1, g);
    let cube = b.mul(inv, inv);
    let cube = b.mul(cube, inv);
    let g = b.mul(g, cube);
    let g = b.scaled(g, -1.0 / d as f32);
    let (inv, g) = (b.spread(inv, x, &[0]), b.spread(g, x, &[0]));
    let (first, second) = (b.mul(dn, inv), b.mul(x, g));
    let y = b.op(Op::Add, &[r, first, second]);
    let mut kernel = b.kernel("norm_grad", &[y]);
    kernel.aliases[0] = Some(0);
    kernel
}

/// Gradients of silu(g)·u for both, joined; `wide` is the joined input, `[rows, 2·d]`.
pub(crate) fn swiglu_grad(rows: Dim, d: u64, dtype: DType) -> Kernel {
    let mut b = B::new();
    let x = b.wide(dtype, &[rows, k(2 * d)]);
    let dh = b.arg(DType::F32, &[rows, k(d)]);
    let (g, u) = (b.slice(1, 0, d, x), b.slice(1, d, 2 * d, x));
    let s = b.un(UnaryOp::Sigmoid, g);
    let gs = b.mul(g, s);
    let du = b.mul(dh, gs);
    let dsilu = b.mul(dh, u);
    let one = b.f32(1.0);
    let rest = b.bin(BinaryOp::Sub, one, s);
    let rest = b.mul(g, rest);
    let rest = b.add(one, rest);
    let slope = b.mul(s, rest);
    let dg = b.mul(dsilu, slope);
    // As the gradients of the two slices: a sum of paddings.
    let dg = b.op(Op::Pad { axis: 1, lo: 0, hi: d }, &[dg]);
    let du = b.op(Op::Pad { axis: 1, lo: d, hi: 0 }, &[du]);
    let y = b.add(dg, du);
    let y = b.cast(dtype, y);
    b.kernel("swiglu_grad", &[y])
}

/// Gradient of a rotary embedding of `heads` heads of 64: the paddings of two halves and of their products.
pub(crate) fn rope_grad(rows: Dim, heads: u64, dtype: DType) -> Kernel {
    let mut b = B::new();
    let dy = b.wide(dtype, &[rows, k(heads * 64)]);
    let table = [k(128), k(32)];
    let (c, s) = (b.arg(DType::F32, &table), b.arg(DType::F32, &table));
    let p = b.arg(DType::I32, &[rows]);
    let c = b.op(Op::Gather { axis: 0 }, &[c, p]);
    let s = b.op(Op::Gather { axis: 0 }, &[s, p]);
    let dy = b.op(Op::Reshape(vec![rows, k(heads), k(64)]), &[dy]);
    let (lo, hi) = (b.slice(2, 0, 32, dy), b.slice(2, 32, 64, dy));
    let (c, s) = (b.spread(c, lo, &[0, 2]), b.spread(s, lo, &[0, 2]));
    let (a, e) = (b.mul(lo, c), b.mul(hi, s));
    let first = b.add(a, e);
    let (a, e) = (b.mul(hi, c), b.mul(lo, s));
    let second = b.bin(BinaryOp::Sub, a, e);
    let first = b.op(Op::Pad { axis: 2, lo: 0, hi: 32 }, &[first]);
    let second = b.op(Op::Pad { axis: 2, lo: 32, hi: 0 }, &[second]);
    let y = b.add(first, second);
    let y = b.op(Op::Reshape(vec![rows, k(heads * 64)]), &[y]);
    let y = b.cast(dtype, y);
    b.kernel("rope_grad", &[y])
}

/// Loss of every row, and the gradient of scale · (their sum) written over the logits.
pub(crate) fn cross_entropy(rows: Dim, vocab: u64, dtype: DType) -> Kernel {
    let mut b = B::new();
    let x = b.wide(dtype, &[rows, k(vocab)]);
    let labels = b.arg(DType::I32, &[rows]);
    let scale = b.arg(DType::F32, &[]);
    let m = b.reduce(ReduceOp::Max, 1, x);
    let wide = b.spread(m, x, &[0]);
    let z = b.bin(BinaryOp::Sub, x, wide);
    let e = b.un(UnaryOp::Exp, z);
    let s = b.reduce(ReduceOp::Sum, 1, e);
    let log = b.un(UnaryOp::Log, s);
    let lse = b.add(log, m);
    let iota = b.op(Op::Iota { shape: vec![rows, k(vocab)], axis: 1 }, &[]);
    let wide = b.spread(labels, x, &[0]);
    let hit = b.bin(BinaryOp::Eq, iota, wide);
    let zero = b.f32(0.0);
    let picked = b.op(Op::Select, &[hit, x, zero]);
    let picked = b.reduce(ReduceOp::Sum, 1, picked);
    let loss = b.bin(BinaryOp::Sub, lse, picked);
    let loss = b.mul(loss, scale);
    let inv = b.un(UnaryOp::Recip, s);
    let inv = b.mul(inv, scale);
    let inv = b.spread(inv, x, &[0]);
    let p = b.mul(e, inv);
    let less = b.op(Op::Select, &[hit, scale, zero]);
    let dx = b.bin(BinaryOp::Sub, p, less);
    let dx = b.cast(dtype, dx);
    let mut kernel = b.kernel("cross_entropy", &[loss, dx]);
    kernel.aliases[1] = Some(0);
    kernel
}

/// Gradient of a norm's weight: the sum over rows of dy·x·inv, added to an accumulator.
pub(crate) fn weight_grad(rows: Dim, d: u64, dtype: DType) -> Kernel {
    let mut b = B::new();
    let acc = b.arg(DType::F32, &[k(d)]);
    let x = b.wide(dtype, &[rows, k(d)]);
    let dy = b.arg(DType::F32, &[rows, k(d)]);
    let inv = b.arg(DType::F32, &[rows]);
    let inv = b.spread(inv, x, &[0]);
    let g = b.mul(dy, x);
    let g = b.mul(g, inv);
    let g = b.reduce(ReduceOp::Sum, 0, g);
    let y = b.add(acc, g);
    let mut kernel = b.kernel("weight_grad", &[y]);
    kernel.aliases[0] = Some(0);
    kernel
}

/// Sum of squares of each row of a matrix.
pub(crate) fn squares(r: u64, c: u64) -> Kernel {
    let mut b = B::new();
    let g = b.arg(DType::F32, &[k(r), k(c)]);
    let q = b.mul(g, g);
    let s = b.reduce(ReduceOp::Sum, 1, q);
    b.kernel("squares", &[s])
}

/// The optimizer's step for one matrix: parameter, moments and the cleared gradient, all in place.
pub(crate) fn adamw(shape: &[Dim]) -> Kernel {
    let mut b = B::new();
    let [p, g, m, v] = [0; 4].map(|_| b.arg(DType::F32, shape));
    let [lr, beta1, beta2, eps, decay, c1, c2, norm, most] = [0; 9].map(|_| b.arg(DType::F32, &[]));
    let tiny = b.f32(1e-6);
    let norm = b.add(norm, tiny);
    let clip = b.bin(BinaryOp::Div, most, norm);
    let one = b.f32(1.0);
    let clip = b.bin(BinaryOp::Min, clip, one);
    let h = b.mul(g, clip);
    let (r1, r2) = (b.bin(BinaryOp::Sub, one, beta1), b.bin(BinaryOp::Sub, one, beta2));
    let (x, y) = (b.mul(m, beta1), b.mul(h, r1));
    let m = b.add(x, y);
    let q = b.mul(h, h);
    let (x, y) = (b.mul(v, beta2), b.mul(q, r2));
    let v = b.add(x, y);
    let root = b.un(UnaryOp::Sqrt, v);
    let c2 = b.un(UnaryOp::Sqrt, c2);
    let root = b.bin(BinaryOp::Div, root, c2);
    let root = b.add(root, eps);
    let up = b.bin(BinaryOp::Div, m, root);
    let rate = b.bin(BinaryOp::Div, lr, c1);
    let up = b.mul(up, rate);
    let keep = b.mul(lr, decay);
    let keep = b.bin(BinaryOp::Sub, one, keep);
    let p = b.mul(p, keep);
    let p = b.bin(BinaryOp::Sub, p, up);
    let zero = b.f32(0.0);
    let cleared = b.op(Op::Broadcast { shape: shape.to_vec(), axes: vec![] }, &[zero]);
    let mut kernel = b.kernel("adamw", &[p, m, v, cleared]);
    kernel.aliases = vec![Some(0), Some(2), Some(3), Some(1)];
    kernel
}

/// Columns of a matrix picked by indices.
pub(crate) fn columns_of(rows: Dim, d: u64, r: u64, dtype: DType) -> Kernel {
    let mut b = B::new();
    let x = b.arg(dtype, &[rows, k(d)]);
    let i = b.arg(DType::I32, &[k(r)]);
    let y = b.op(Op::Gather { axis: 1 }, &[x, i]);
    b.kernel("columns_of", &[y])
}

/// A residual stream: `terms` f32 products added and rounded, and the next norm of it in bf16.
pub(crate) fn add_norm_bf16(rows: Dim, d: u64) -> Kernel {
    let mut b = B::new();
    let x = b.wide(DType::BF16, &[rows, k(d)]);
    let h = b.arg(DType::F32, &[rows, k(d)]);
    let w = b.arg(DType::F32, &[k(d)]);
    let x = b.add(x, h);
    let rounded = b.cast(DType::BF16, x);
    let x = b.cast(DType::F32, rounded);
    let q = b.mul(x, x);
    let s = b.reduce(ReduceOp::Sum, 1, q);
    let m = b.scaled(s, 1.0 / d as f32);
    let eps = b.f32(1e-5);
    let m = b.add(m, eps);
    let inv = b.un(UnaryOp::Rsqrt, m);
    let (inv, w) = (b.spread(inv, x, &[0]), b.spread(w, x, &[1]));
    let y = b.mul(x, inv);
    let y = b.mul(y, w);
    let y = b.cast(DType::BF16, y);
    b.kernel("add_norm_bf16", &[rounded, y])
}
