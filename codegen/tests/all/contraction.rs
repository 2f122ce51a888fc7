//! Contraction kernels against the reference interpreter: shapes, layouts, remainders, both vector sets.

use crate::kit::{check_cases, noise};
use pleach_codegen::emit::HostIsa;
use pleach_codegen::emit::contraction::{choose_panel, emit, supported};
use pleach_ir::interp::Tensor;
use pleach_ir::{BinaryOp, Class, DType, Dim, Entry, Kernel, Layout, Op, Sym, UnaryOp, ValueId};

const T: Dim = Dim::Symbol(Sym::T);

/// A kernel under construction.
pub(crate) struct Build {
    pub(crate) body: Entry,
    operands: Vec<Layout>,
}

impl Build {
    pub(crate) fn new() -> Build {
        Build { body: Entry::new("k"), operands: vec![] }
    }
    pub(crate) fn typed(&mut self, dtype: DType, shape: &[Dim], layout: Layout) -> ValueId {
        let name = format!("a{}", self.operands.len());
        self.operands.push(layout);
        self.op(Op::Input { name, dtype, shape: shape.to_vec() }, &[])
    }
    pub(crate) fn input(&mut self, shape: &[Dim]) -> ValueId {
        self.typed(DType::F32, shape, Layout::RowMajor)
    }
    /// A packed weight `[K, N]`, or `[N, K]` when transposed.
    pub(crate) fn panels(&mut self, k: u64, n: u64, nr: u32, transposed: bool) -> ValueId {
        let shape = if transposed { [n, k] } else { [k, n] };
        self.typed(DType::F32, &shape.map(Dim::Known), Layout::Panels { nr, transposed })
    }
    pub(crate) fn op(&mut self, op: Op, inputs: &[ValueId]) -> ValueId {
        self.body.push(&[], op, inputs).unwrap()
    }
    pub(crate) fn mm(&mut self, a: ValueId, b: ValueId) -> ValueId {
        self.op(Op::MatMul { ta: false, tb: false }, &[a, b])
    }
    pub(crate) fn mm_t(&mut self, a: ValueId, b: ValueId) -> ValueId {
        self.op(Op::MatMul { ta: false, tb: true }, &[a, b])
    }
    pub(crate) fn done(mut self, name: &str, results: &[ValueId]) -> Kernel {
        for (i, r) in results.iter().enumerate() {
            self.body.output(format!("r{i}"), *r);
        }
        Kernel {
            name: name.into(),
            class: Class::Contraction,
            results: vec![Layout::RowMajor; results.len()],
            aliases: vec![None; results.len()],
            operands: self.operands,
            body: self.body,
        }
    }
}

/// Runs a kernel on noise with these values of `T` (and `S`).
fn run(k: &Kernel, counts: &[(u64, u64)]) {
    run_within(k, counts, 3e-6);
}

/// As [`run`], with a bound on the relative error.
pub(crate) fn run_within(k: &Kernel, counts: &[(u64, u64)], tolerance: f64) {
    supported(k).unwrap();
    let mut cases = vec![];
    for (t, s) in counts {
        let symbols = vec![(Sym::S, *s), (Sym::T, *t)];
        let env = |x: Sym| symbols.iter().find(|y| y.0 == x).map(|y| y.1);
        let operands: Vec<Tensor> = k
            .operand_types()
            .iter()
            .enumerate()
            .map(|(i, ty)| {
                let shape: Vec<u64> = ty.shape.iter().map(|d| d.eval(&env).unwrap()).collect();
                let x = noise(&shape, 7 + i as u64 + t * 31);
                Tensor::from_floats(ty.dtype, shape, x.floats().into_owned())
            })
            .collect();
        cases.push((operands, symbols));
    }
    check_cases(emit, k, &cases, tolerance);
}

const COUNTS: [(u64, u64); 9] = [(0, 1), (1, 1), (2, 1), (3, 1), (5, 1), (15, 1), (64, 1), (67, 1), (150, 1)];

#[test]
fn packed_weights_of_any_width() {
    for (i, (k, n)) in [(48, 96), (7, 64), (1, 16), (33, 50), (40, 1), (64, 100), (19, 48)].iter().enumerate() {
        for isa in [HostIsa::Avx512, HostIsa::Avx2] {
            let nr = choose_panel(*n, &[], isa);
            let mut b = Build::new();
            let x = b.input(&[T, Dim::Known(*k)]);
            let transposed = i % 2 == 0;
            let w = b.panels(*k, *n, nr, transposed);
            let y = b.op(Op::MatMul { ta: false, tb: transposed }, &[x, w]);
            let counts = if isa == HostIsa::Avx512 { &COUNTS[..] } else { &COUNTS[6..8] };
            run(&b.done("packed", &[y]), counts);
        }
    }
}

#[test]
fn panels_are_the_least_padding_then_the_widest() {
    let p = |n| choose_panel(n, &[], HostIsa::Avx512);
    assert_eq!([p(576), p(192), p(1536), p(49152), p(16), p(64), p(384), p(1)], [48, 48, 48, 48, 16, 32, 48, 16]);
    assert_eq!(choose_panel(576, &[], HostIsa::Avx2), 16);
    assert_eq!(choose_panel(192, &[64, 128, 192], HostIsa::Avx512), 32);
}

#[test]
fn row_major_right_operands() {
    for (m, k, n) in [(T, 17, 33), (T, 64, 96), (Dim::Known(5), 3, 130), (Dim::Known(100), 8, 1)] {
        let mut b = Build::new();
        let (x, w) = (b.input(&[m, Dim::Known(k)]), b.input(&[Dim::Known(k), Dim::Known(n)]));
        let y = b.mm(x, w);
        run(&b.done("rows", &[y]), &[(1, 1), (13, 1), (70, 1)]);
        let mut b = Build::new();
        let (x, w) = (b.input(&[m, Dim::Known(k)]), b.input(&[Dim::Known(n), Dim::Known(k)]));
        let y = b.mm_t(x, w);
        run(&b.done("strided", &[y]), &[(1, 1), (13, 1), (70, 1)]);
    }
}

#[test]
fn symbolic_inner_and_outer_dimensions() {
    let s = Dim::Symbol(Sym::S);
    // A weight gradient: the sum runs over tokens, the left operand is read transposed.
    let mut b = Build::new();
    let (x, dy) = (b.input(&[T, Dim::Known(20)]), b.input(&[T, Dim::Known(50)]));
    let y = b.op(Op::MatMul { ta: true, tb: false }, &[x, dy]);
    run(&b.done("gradient", &[y]), &[(0, 1), (1, 1), (6, 1), (1023, 1), (1024, 1), (2100, 1)]);
    // Both outer dimensions are counts.
    let mut b = Build::new();
    let (x, w) = (b.input(&[T, Dim::Known(12)]), b.input(&[Dim::Known(12), s]));
    let y = b.mm(x, w);
    run(&b.done("outer", &[y]), &[(0, 3), (3, 0), (5, 1), (70, 33), (9, 100)]);
    let mut b = Build::new();
    let (x, w) = (b.input(&[Dim::Known(12), T]), b.input(&[s, T]));
    let y = b.mm_t(x, w);
    run(&b.done("inner", &[y]), &[(0, 3), (5, 1), (70, 33), (1500, 18)]);
}

#[test]
fn an_adapter_starts_the_sum() {
    for scaled in [false, true] {
        let mut b = Build::new();
        let (x, h) = (b.input(&[T, Dim::Known(64)]), b.input(&[T, Dim::Known(5)]));
        let (w, u) = (b.panels(64, 96, 48, true), b.panels(5, 96, 48, false));
        let s = b.input(&[]);
        let (p, q) = (b.mm_t(x, w), b.mm(h, u));
        let q = if scaled { b.op(Op::Binary(BinaryOp::Mul), &[q, s]) } else { q };
        let res = b.input(&[T, Dim::Known(96)]);
        let y = b.op(Op::Add, &[p, q, res]);
        let mut k = b.done("adapter", &[y]);
        k.aliases = vec![Some(5)];
        run(&k, &COUNTS);
    }
}

#[test]
fn bias_residual_and_activation() {
    let mut b = Build::new();
    let (x, w) = (b.input(&[T, Dim::Known(31)]), b.panels(31, 70, 16, true));
    let (bias, row) = (b.input(&[Dim::Known(70)]), b.input(&[T]));
    let y = b.mm_t(x, w);
    let shape = vec![T, Dim::Known(70)];
    let c = b.op(Op::Broadcast { shape: shape.clone(), axes: vec![1] }, &[bias]);
    let r = b.op(Op::Broadcast { shape, axes: vec![0] }, &[row]);
    let z = b.op(Op::Add, &[y, c]);
    let g = b.op(Op::Unary(UnaryOp::Tanh), &[z]);
    let half = b.op(Op::f32(0.5), &[]);
    let g = b.op(Op::Binary(BinaryOp::Mul), &[g, half]);
    let out = b.op(Op::Binary(BinaryOp::Mul), &[g, r]);
    let zero = b.op(Op::f32(0.0), &[]);
    let positive = b.op(Op::Binary(BinaryOp::Lt), &[zero, z]);
    let relu = b.op(Op::Select, &[positive, z, zero]);
    run(&b.done("activation", &[out, relu, positive]), &COUNTS);
}

#[test]
fn gate_and_up_as_slices_and_as_siblings() {
    let silu_mul = |b: &mut Build, g: ValueId, u: ValueId| {
        let s = b.op(Op::Unary(UnaryOp::Sigmoid), &[g]);
        let g = b.op(Op::Binary(BinaryOp::Mul), &[g, s]);
        b.op(Op::Binary(BinaryOp::Mul), &[g, u])
    };
    let mut b = Build::new();
    let (x, w) = (b.input(&[T, Dim::Known(40)]), b.panels(40, 192, 48, true));
    let z = b.mm_t(x, w);
    let g = b.op(Op::Slice { axis: 1, start: 0, end: 96 }, &[z]);
    let u = b.op(Op::Slice { axis: 1, start: 96, end: 192 }, &[z]);
    let y = silu_mul(&mut b, g, u);
    run(&b.done("slices", &[y]), &COUNTS);

    let mut b = Build::new();
    let (x, w, v) = (b.input(&[T, Dim::Known(40)]), b.panels(40, 100, 32, true), b.panels(40, 100, 32, true));
    let h = b.input(&[T, Dim::Known(4)]);
    let (wb, vb) = (b.panels(4, 100, 32, true), b.panels(4, 100, 32, true));
    let (g, gb, u, ub) = (b.mm_t(x, w), b.mm_t(h, wb), b.mm_t(x, v), b.mm_t(h, vb));
    let (g, u) = (b.op(Op::Add, &[g, gb]), b.op(Op::Add, &[u, ub]));
    let y = silu_mul(&mut b, g, u);
    run(&b.done("siblings", &[y, g]), &COUNTS);
}

#[test]
fn long_sums_run_in_parts() {
    for k in [2049u64, 3000, 4096] {
        let mut b = Build::new();
        let (x, w) = (b.input(&[T, Dim::Known(k)]), b.panels(k, 100, 32, true));
        let (h, u) = (b.input(&[T, Dim::Known(9)]), b.panels(9, 100, 32, true));
        let s = b.input(&[]);
        let (p, q) = (b.mm_t(x, w), b.mm_t(h, u));
        let q = b.op(Op::Binary(BinaryOp::Mul), &[q, s]);
        let bias = b.input(&[Dim::Known(100)]);
        let bias = b.op(Op::Broadcast { shape: vec![T, Dim::Known(100)], axes: vec![1] }, &[bias]);
        let y = b.op(Op::Add, &[p, q, bias]);
        run(&b.done("parts", &[y]), &[(1, 1), (3, 1), (66, 1), (140, 1)]);
        let mut b = Build::new();
        let (x, w, s) = (b.input(&[T, Dim::Known(k)]), b.panels(k, 64, 32, true), b.input(&[]));
        let p = b.mm_t(x, w);
        let p = b.op(Op::Binary(BinaryOp::Mul), &[p, s]);
        let r = b.input(&[T, Dim::Known(64)]);
        let y = b.op(Op::Add, &[p, r]);
        run(&b.done("scaled_parts", &[y]), &[(1, 1), (66, 1)]);
    }
}

#[test]
fn batches_and_views() {
    let d = Dim::Known;
    let mut b = Build::new();
    let (x, w) = (b.input(&[d(3), d(2), d(9), d(20)]), b.input(&[d(3), d(2), d(20), d(35)]));
    let y = b.mm(x, w);
    let bias = b.input(&[d(2), d(35)]);
    let bias = b.op(Op::Broadcast { shape: vec![d(3), d(2), d(9), d(35)], axes: vec![1, 3] }, &[bias]);
    let y = b.op(Op::Add, &[y, bias]);
    run(&b.done("batch", &[y]), &[(1, 1)]);

    // Heads of a packed [T, 3*2*8] as batches, without a copy.
    let mut b = Build::new();
    let qkv = b.input(&[T, d(48)]);
    let part = |b: &mut Build, i: u64| {
        let s = b.op(Op::Slice { axis: 1, start: 16 * i, end: 16 * (i + 1) }, &[qkv]);
        let r = b.op(Op::Reshape(vec![T, d(2), d(8)]), &[s]);
        b.op(Op::Transpose(vec![1, 0, 2]), &[r])
    };
    let (q, k) = (part(&mut b, 0), part(&mut b, 1));
    let y = b.mm_t(q, k);
    let scale = b.op(Op::f32(0.25), &[]);
    let y = b.op(Op::Binary(BinaryOp::Mul), &[y, scale]);
    let k2 = b.done("heads", &[y]);
    run(&k2, &[(1, 1), (5, 1), (37, 1)]);
}

#[test]
fn integers_and_narrow_floats_beside_a_product() {
    let mut b = Build::new();
    let (x, w) = (b.input(&[T, Dim::Known(16)]), b.panels(16, 40, 16, true));
    let (i, h) =
        (b.typed(DType::I32, &[T], Layout::RowMajor), b.typed(DType::BF16, &[T, Dim::Known(40)], Layout::RowMajor));
    let y = b.mm_t(x, w);
    let shape = vec![T, Dim::Known(40)];
    let i = b.op(Op::Broadcast { shape: shape.clone(), axes: vec![0] }, &[i]);
    let column = b.op(Op::Iota { shape, axis: 1 }, &[]);
    let seen = b.op(Op::Binary(BinaryOp::Le), &[column, i]);
    let h = b.op(Op::Cast(DType::F32), &[h]);
    let z = b.op(Op::Select, &[seen, y, h]);
    let n = b.op(Op::Cast(DType::BF16), &[z]);
    let f = b.op(Op::Cast(DType::F16), &[z]);
    let k = b.done("mixed", &[z, seen]);
    run(&k, &COUNTS);
    let _ = (n, f);
}

#[test]
fn refusals_say_where_to_cut() {
    let mut b = Build::new();
    let (x, w) = (b.input(&[T, Dim::Known(16)]), b.panels(16, 40, 16, true));
    let y = b.mm_t(x, w);
    let s = b.op(Op::Reduce { op: pleach_ir::ReduceOp::Sum, axis: 1 }, &[y]);
    let s = b.op(Op::Broadcast { shape: vec![T, Dim::Known(40)], axes: vec![0] }, &[s]);
    let z = b.op(Op::Add, &[y, s]);
    let why = supported(&b.done("reduces", &[z])).unwrap_err();
    assert!(why.contains("broadcast") && why.contains("cut"), "{why}");
    let mut b = Build::new();
    let (x, w) = (b.input(&[T, Dim::Known(16)]), b.panels(16, 40, 16, true));
    let x = b.op(Op::Unary(UnaryOp::Exp), &[x]);
    let y = b.mm_t(x, w);
    let why = supported(&b.done("prologue", &[y])).unwrap_err();
    assert!(why.contains("exp"), "{why}");
}
