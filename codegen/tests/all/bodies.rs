//! Bodies of row kernels as models hold them: norms, softmax, rotary embeddings.

use pleach_ir::{BinaryOp, Class, DType, Dim, Entry, Kernel, Layout, Op, ReduceOp, Sym, UnaryOp, ValueId};

/// Builds bodies.
pub(crate) struct B(pub(crate) Entry);

impl B {
    pub(crate) fn new() -> B {
        B(Entry::new("kernel"))
    }
    pub(crate) fn arg(&mut self, dtype: DType, shape: &[Dim]) -> ValueId {
        let name = format!("a{}", self.0.inputs().len());
        self.op(Op::Input { name, dtype, shape: shape.to_vec() }, &[])
    }
    pub(crate) fn op(&mut self, op: Op, x: &[ValueId]) -> ValueId {
        self.0.push(&[], op, x).unwrap()
    }
    pub(crate) fn un(&mut self, u: UnaryOp, x: ValueId) -> ValueId {
        self.op(Op::Unary(u), &[x])
    }
    pub(crate) fn bin(&mut self, b: BinaryOp, x: ValueId, y: ValueId) -> ValueId {
        self.op(Op::Binary(b), &[x, y])
    }
    pub(crate) fn add(&mut self, x: ValueId, y: ValueId) -> ValueId {
        self.op(Op::Add, &[x, y])
    }
    pub(crate) fn f32(&mut self, x: f32) -> ValueId {
        self.op(Op::f32(x), &[])
    }
    pub(crate) fn reduce(&mut self, op: ReduceOp, axis: u8, x: ValueId) -> ValueId {
        self.op(Op::Reduce { op, axis }, &[x])
    }
    /// `x` along the other axes of `like`.
    pub(crate) fn spread(&mut self, x: ValueId, like: ValueId, axes: &[u8]) -> ValueId {
        let shape = self.0.ty(like).shape.clone();
        self.op(Op::Broadcast { shape, axes: axes.to_vec() }, &[x])
    }
    pub(crate) fn slice(&mut self, axis: u8, start: u64, end: u64, x: ValueId) -> ValueId {
        self.op(Op::Slice { axis, start, end }, &[x])
    }
    pub(crate) fn kernel(mut self, name: &str, results: &[ValueId]) -> Kernel {
        for (i, r) in results.iter().enumerate() {
            self.0.output(format!("r{i}"), *r);
        }
        Kernel {
            name: name.into(),
            class: Class::Row,
            operands: vec![Layout::RowMajor; self.0.inputs().len()],
            results: vec![Layout::RowMajor; results.len()],
            aliases: vec![None; results.len()],
            body: self.0,
        }
    }
}

pub(crate) const T: Dim = Dim::Symbol(Sym::T);

pub(crate) fn k(n: u64) -> Dim {
    Dim::Known(n)
}

/// x / rms(x) * w, with an optional second operand added first.
pub(crate) fn rms_norm(rows: Dim, d: u64, residual: bool) -> Kernel {
    let mut b = B::new();
    let mut x = b.arg(DType::F32, &[rows, k(d)]);
    let w = b.arg(DType::F32, &[k(d)]);
    if residual {
        let h = b.arg(DType::F32, &[rows, k(d)]);
        x = b.add(x, h);
    }
    let q = b.bin(BinaryOp::Mul, x, x);
    let s = b.reduce(ReduceOp::Sum, 1, q);
    let (n, eps) = (b.f32(1.0 / d as f32), b.f32(1e-5));
    let m = b.bin(BinaryOp::Mul, s, n);
    let m = b.add(m, eps);
    let r = b.un(UnaryOp::Rsqrt, m);
    let r = b.spread(r, x, &[0]);
    let w = b.spread(w, x, &[1]);
    let y = b.bin(BinaryOp::Mul, x, r);
    let y = b.bin(BinaryOp::Mul, y, w);
    if residual { b.kernel("add_norm", &[x, y]) } else { b.kernel("norm", &[y]) }
}

pub(crate) fn softmax(shape: &[Dim]) -> Kernel {
    let mut b = B::new();
    let x = b.arg(DType::F32, shape);
    let last = shape.len() as u8 - 1;
    let axes: Vec<u8> = (0..last).collect();
    let m = b.reduce(ReduceOp::Max, last, x);
    let m = b.spread(m, x, &axes);
    let d = b.bin(BinaryOp::Sub, x, m);
    let e = b.un(UnaryOp::Exp, d);
    let s = b.reduce(ReduceOp::Sum, last, e);
    let s = b.spread(s, x, &axes);
    let y = b.bin(BinaryOp::Div, e, s);
    b.kernel("softmax", &[y])
}

pub(crate) fn layer_norm(rows: Dim, d: u64) -> Kernel {
    let mut b = B::new();
    let x = b.arg(DType::F32, &[rows, k(d)]);
    let w = b.arg(DType::F32, &[k(d)]);
    let c = b.arg(DType::F32, &[k(d)]);
    let (n, eps) = (b.f32(1.0 / d as f32), b.f32(1e-12));
    let s = b.reduce(ReduceOp::Sum, 1, x);
    let mean = b.bin(BinaryOp::Mul, s, n);
    let mean = b.spread(mean, x, &[0]);
    let z = b.bin(BinaryOp::Sub, x, mean);
    let q = b.bin(BinaryOp::Mul, z, z);
    let v = b.reduce(ReduceOp::Sum, 1, q);
    let v = b.bin(BinaryOp::Mul, v, n);
    let v = b.add(v, eps);
    let r = b.un(UnaryOp::Rsqrt, v);
    let r = b.spread(r, x, &[0]);
    let w = b.spread(w, x, &[1]);
    let c = b.spread(c, x, &[1]);
    let y = b.bin(BinaryOp::Mul, z, r);
    let y = b.bin(BinaryOp::Mul, y, w);
    let y = b.add(y, c);
    b.kernel("layer_norm", &[y])
}

/// Rotary embedding of `heads` heads of 64, tables gathered by position; flat rows in and out.
pub(crate) fn rope(rows: Dim, heads: u64) -> Kernel {
    let mut b = B::new();
    let x = b.arg(DType::F32, &[rows, k(heads * 64)]);
    let table = [k(128), k(64)];
    let (c, s) = (b.arg(DType::F32, &table), b.arg(DType::F32, &table));
    let p = b.arg(DType::I32, &[rows]);
    let c = b.op(Op::Gather { axis: 0 }, &[c, p]);
    let s = b.op(Op::Gather { axis: 0 }, &[s, p]);
    let y = b.op(Op::Reshape(vec![rows, k(heads), k(64)]), &[x]);
    let (c, s) = (b.spread(c, y, &[0, 2]), b.spread(s, y, &[0, 2]));
    let (lo, hi) = (b.slice(2, 0, 32, y), b.slice(2, 32, 64, y));
    let hi = b.un(UnaryOp::Neg, hi);
    let rot = b.op(Op::Concat { axis: 2 }, &[hi, lo]);
    let y = b.bin(BinaryOp::Mul, y, c);
    let z = b.bin(BinaryOp::Mul, rot, s);
    let y = b.add(y, z);
    let y = b.op(Op::Reshape(vec![rows, k(heads * 64)]), &[y]);
    b.kernel("rope", &[y])
}
