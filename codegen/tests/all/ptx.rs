//! Kernels of the host, unchanged, as PTX: emitted for sm_80, and assembled by `ptxas` where it is at hand.

use pleach_codegen::emit::gpu::{self, GpuChip, GpuEmitted};
use pleach_codegen::{HostTarget, emit, mlir, ptxas};
use pleach_ir::{Class, DType, Dim, Entry, Kernel, Layout, Op, ReduceOp, Sym, UnaryOp, ValueId};
use std::path::PathBuf;

const SYMBOLS: [Sym; 1] = [Sym::T];

fn input(e: &mut Entry, shape: &[Dim]) -> ValueId {
    let name = format!("a{}", e.inputs().len());
    e.push(&[], Op::Input { name, dtype: DType::F32, shape: shape.to_vec() }, &[]).unwrap()
}

fn push(e: &mut Entry, op: Op, x: &[ValueId]) -> ValueId {
    e.push(&[], op, x).unwrap()
}

fn kernel(name: &str, class: Class, body: Entry) -> Kernel {
    let (n, r) = (body.inputs().len(), body.roots.len());
    let (operands, results) = (vec![Layout::RowMajor; n], vec![Layout::RowMajor; r]);
    Kernel { name: name.into(), class, body, operands, results, aliases: vec![None; r] }
}

/// y = x * rsqrt(mean(x * x) + eps) * w
fn rms_norm(columns: u64) -> Kernel {
    let mut e = Entry::new("kernel");
    let full = vec![Dim::Symbol(Sym::T), Dim::Known(columns)];
    let x = input(&mut e, &full);
    let w = input(&mut e, &full[1..]);
    let square = push(&mut e, Op::Binary(pleach_ir::BinaryOp::Mul), &[x, x]);
    let sum = push(&mut e, Op::Reduce { op: ReduceOp::Sum, axis: 1 }, &[square]);
    let n = push(&mut e, Op::f32(1.0 / columns as f32), &[]);
    let mean = push(&mut e, Op::Binary(pleach_ir::BinaryOp::Mul), &[sum, n]);
    let eps = push(&mut e, Op::f32(1e-5), &[]);
    let shifted = push(&mut e, Op::Add, &[mean, eps]);
    let r = push(&mut e, Op::Unary(UnaryOp::Rsqrt), &[shifted]);
    let r = push(&mut e, Op::Broadcast { shape: full.clone(), axes: vec![0] }, &[r]);
    let w = push(&mut e, Op::Broadcast { shape: full, axes: vec![1] }, &[w]);
    let y = push(&mut e, Op::Binary(pleach_ir::BinaryOp::Mul), &[x, r]);
    let y = push(&mut e, Op::Binary(pleach_ir::BinaryOp::Mul), &[y, w]);
    e.output("r0", y);
    kernel("rms_norm", Class::Row, e)
}

/// y = silu(x · Wᵀ + s * h · Bᵀ + bias) + residual, with W row by row.
fn linear(depth: u64, columns: u64, rank: u64) -> Kernel {
    let mut e = Entry::new("kernel");
    let t = Dim::Symbol(Sym::T);
    let full = vec![t, Dim::Known(columns)];
    let x = input(&mut e, &[t, depth.into()]);
    let w = input(&mut e, &[columns.into(), depth.into()]);
    let h = input(&mut e, &[t, rank.into()]);
    let b = input(&mut e, &[columns.into(), rank.into()]);
    let s = input(&mut e, &[]);
    let bias = input(&mut e, &[columns.into()]);
    let residual = input(&mut e, &full);
    let base = push(&mut e, Op::MatMul { ta: false, tb: true }, &[x, w]);
    let branch = push(&mut e, Op::MatMul { ta: false, tb: true }, &[h, b]);
    let branch = push(&mut e, Op::Binary(pleach_ir::BinaryOp::Mul), &[branch, s]);
    let bias = push(&mut e, Op::Broadcast { shape: full, axes: vec![1] }, &[bias]);
    let sum = push(&mut e, Op::Add, &[base, branch, bias]);
    let gate = push(&mut e, Op::Unary(UnaryOp::Sigmoid), &[sum]);
    let y = push(&mut e, Op::Binary(pleach_ir::BinaryOp::Mul), &[sum, gate]);
    let y = push(&mut e, Op::Add, &[y, residual]);
    e.output("r0", y);
    kernel("linear", Class::Contraction, e)
}

/// Assembles for sm_80, and fails on any spill.
fn assemble(name: &str, ptx: &str) {
    let Some(ptxas) = crate::kit::ptxas() else {
        eprintln!("skipped: {name} is not assembled, there is no ptxas; set PLEACH_PTXAS or run `make setup`");
        return;
    };
    let all = ptxas::assemble(&ptxas, ptx.as_bytes(), "sm_80").unwrap();
    assert!(!all.is_empty() && all.values().all(|r| r.spills == 0 && r.stack == 0 && r.registers > 0), "{all:?}");
}

fn on_gpu(k: &Kernel, symbols: &[Sym]) -> GpuEmitted {
    gpu::emit(k, symbols, GpuChip::Sm80).unwrap()
}

/// The PTX of a kernel, assembled where that can be done.
fn ptx(k: &Kernel) -> String {
    let e = on_gpu(k, &SYMBOLS);
    let ptx = mlir::compile_ptx(&gpu::module([e.text.as_str()]), "sm_80").unwrap();
    if let Some(dir) = std::env::var_os("PLEACH_PTX_DIR") {
        std::fs::write(PathBuf::from(dir).join(format!("{}.ptx", k.name)), &ptx).unwrap();
    }
    for l in &e.launches {
        assert!(ptx.contains(&format!(".visible .entry {}(", l.function)), "{ptx}");
        assert!(ptx.contains(&format!(".maxntid {}, 1, 1", l.block)), "{ptx}");
    }
    assert!(ptx.contains(".target sm_80") && !ptx.contains("call"), "{ptx}");
    assemble(&k.name, &ptx);
    ptx
}

/// The same kernel for the host and for the GPU.
fn both(k: &Kernel, host: impl Fn(&Kernel) -> String) -> String {
    mlir::compile_object(&host(k), &HostTarget::avx2()).unwrap();
    ptx(k)
}

#[test]
fn a_contraction_kernel() {
    let k = linear(576, 960, 16);
    let text = both(&k, |k| emit::contraction::emit(k, &SYMBOLS, &HostTarget::avx2()).unwrap().text);
    assert!(text.contains("fma.rn.f32") && text.contains("ld.shared.v4.b32"), "{text}");
    assert!(text.contains("st.global.v4.b32") && text.contains("ld.global.nc.v4.b32"), "{text}");
    let e = on_gpu(&k, &SYMBOLS);
    assert_eq!(e.launches[0].grid.clone().map(|x| x.eval(&[130]).unwrap()), [15, 3, 1]);
}

#[test]
fn a_row_kernel() {
    let k = rms_norm(576);
    let text = both(&k, |k| emit::row::emit(k, &SYMBOLS, &HostTarget::avx2()).unwrap().text);
    // A warp to a row: nothing is shared by a block. Neighbours go together, 16 bytes each.
    assert!(text.contains("shfl.sync.bfly") && !text.contains("bar.sync"), "{text}");
    assert!(text.contains("ld.global.nc.v4.b32") && text.contains("st.global.v4.b32"), "{text}");
    let e = on_gpu(&k, &SYMBOLS);
    assert_eq!(e.launches[0].grid.clone().map(|x| x.eval(&[130]).unwrap()), [17, 1, 1]);
    let long = ptx(&rms_norm(4096));
    assert_eq!(long.matches("bar.sync").count(), 1);
}

#[test]
fn two_reductions_and_movement_in_a_row() {
    // softmax of the first half of each row, and the row's maximum.
    let mut e = Entry::new("kernel");
    let (t, n) = (Dim::Symbol(Sym::T), Dim::Known(100));
    let x = input(&mut e, &[t, 200.into()]);
    let x = push(&mut e, Op::Slice { axis: 1, start: 0, end: 100 }, &[x]);
    let top = push(&mut e, Op::Reduce { op: ReduceOp::Max, axis: 1 }, &[x]);
    let wide = |e: &mut Entry, x| push(e, Op::Broadcast { shape: vec![t, n], axes: vec![0] }, &[x]);
    let m = wide(&mut e, top);
    let d = push(&mut e, Op::Binary(pleach_ir::BinaryOp::Sub), &[x, m]);
    let p = push(&mut e, Op::Unary(UnaryOp::Exp), &[d]);
    let sum = push(&mut e, Op::Reduce { op: ReduceOp::Sum, axis: 1 }, &[p]);
    let sum = wide(&mut e, sum);
    let y = push(&mut e, Op::Binary(pleach_ir::BinaryOp::Div), &[p, sum]);
    let y = push(&mut e, Op::Reshape(vec![t, 10.into(), 10.into()]), &[y]);
    e.output("r0", y);
    e.output("r1", top);
    let text = ptx(&kernel("softmax", Class::Row, e));
    assert!(text.contains("ex2.approx.ftz.f32"), "{text}");
}

#[test]
fn sine_needs_no_library() {
    let mut e = Entry::new("kernel");
    let x = input(&mut e, &[Dim::Symbol(Sym::T), 8.into()]);
    let y = push(&mut e, Op::Unary(UnaryOp::Sin), &[x]);
    e.output("r0", y);
    ptx(&kernel("table", Class::Row, e));
}

#[test]
fn refuses_what_would_abort() {
    let refused = |k: &Kernel, symbols: &[Sym]| gpu::emit(k, symbols, GpuChip::Sm80).unwrap_err().to_string();
    let why = refused(&rms_norm(8), &[]);
    assert!(why.contains("symbol T"), "{why}");
    let mut k = rms_norm(8);
    k.class = Class::Contraction;
    refused(&k, &SYMBOLS);
    let mut k = rms_norm(8);
    k.operands[0] = Layout::Panels { nr: 16, transposed: false };
    let why = refused(&k, &SYMBOLS);
    assert!(why.contains("panels"), "{why}");
}

/// y = x · Wᵀ of bf16, rounded; `a` and `b` say how the operands lie.
fn half_product(a: [Dim; 2], b: [Dim; 2], ta: bool, tb: bool) -> Kernel {
    let mut e = Entry::new("kernel");
    let x = |e: &mut Entry, i: usize, shape: [Dim; 2]| {
        let op = Op::Input { name: format!("a{i}"), dtype: DType::BF16, shape: shape.to_vec() };
        e.push(&[], op, &[]).unwrap()
    };
    let (x, w) = (x(&mut e, 0, a), x(&mut e, 1, b));
    let y = push(&mut e, Op::MatMul { ta, tb }, &[x, w]);
    let y = push(&mut e, Op::Cast(DType::BF16), &[y]);
    e.output("r0", y);
    kernel("half", Class::Contraction, e)
}

#[test]
fn products_of_halves_take_tensor_cores() {
    let (t, n, k, r) = (Dim::Symbol(Sym::T), Dim::Known(4096), Dim::Known(14336), Dim::Known(16));
    let forms = [
        half_product([t, k], [n, k], false, true),
        half_product([t, n], [n, k], false, false),
        half_product([t, n], [t, k], true, false),
        half_product([t, n], [r, n], false, true),
        half_product([t, r], [t, n], true, false),
    ];
    for k in forms {
        let text = ptx(&k);
        assert!(text.contains("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"), "{text}");
        assert!(text.contains("cp.async.cg.shared.global") && text.contains("ldmatrix.sync.aligned.m8n8.x4"), "{text}");
        assert!(!text.contains(".local"), "{text}");
    }
    // Rows of 7 halves are no whole pieces: nothing is copied 16 bytes at a time.
    let odd = ptx(&half_product([t, 7.into()], [n, 7.into()], false, true));
    assert!(odd.contains("mma.sync") && !odd.contains("cp.async.cg.shared.global"), "{odd}");
}
