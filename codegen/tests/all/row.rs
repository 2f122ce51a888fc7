//! Row kernels against the interpreter.

use crate::bodies::{B, T, k, layer_norm, rms_norm, rope, softmax};
use crate::kit::{Loaded, check, noise, run_host, targets};
use pleach_codegen::emit::{Emitted, row};
use pleach_codegen::{CodegenError, HostTarget};
use pleach_ir::interp::{Tensor, run_kernel};
use pleach_ir::{BinaryOp, DType, Dim, Kernel, Layout, Op, ReduceOp, Sym, UnaryOp};

pub(crate) fn emit(k: &Kernel, s: &[Sym], t: &HostTarget) -> Result<Emitted, CodegenError> {
    row::emit(k, s, t)
}

fn ints(n: u64, below: i32, seed: u64) -> Tensor {
    let v = noise(&[n], seed);
    Tensor::i32(
        [n],
        v.as_f32().unwrap().iter().map(|x| ((x + 1.0) * 0.5 * below as f32) as i32 % below).collect::<Vec<_>>(),
    )
}

fn t(n: u64) -> Vec<(Sym, u64)> {
    vec![(Sym::T, n)]
}

#[test]
fn norms_of_any_width() {
    for d in [1u64, 15, 16, 17, 31, 64, 100, 576] {
        let kernel = rms_norm(T, d, false);
        row::supported(&kernel).unwrap();
        for n in [0u64, 1, 5, 33] {
            check(emit, &kernel, &[noise(&[n, d], 1), noise(&[d], 2)], &t(n), 2e-6);
        }
    }
    check(emit, &layer_norm(T, 384), &[noise(&[7, 384], 1), noise(&[384], 2), noise(&[384], 3)], &t(7), 5e-6);
    check(emit, &layer_norm(k(3), 37), &[noise(&[3, 37], 1), noise(&[37], 2), noise(&[37], 3)], &[], 5e-6);
    let x = [noise(&[9, 576], 1), noise(&[576], 2), noise(&[9, 576], 3)];
    check(emit, &rms_norm(T, 576, true), &x, &t(9), 2e-6);
}

#[test]
fn softmax_along_static_and_symbolic_axes() {
    check(emit, &softmax(&[T, k(1000)]), &[noise(&[3, 1000], 1)], &t(3), 2e-6);
    check(emit, &softmax(&[T, k(9), k(31)]), &[noise(&[3, 9, 31], 1)], &t(3), 2e-6);
    let s = Dim::Symbol(Sym::C);
    for n in [1u64, 15, 16, 77, 200] {
        let sym = [(Sym::C, n), (Sym::T, 4)];
        check(emit, &softmax(&[T, s]), &[noise(&[4, n], 1)], &sym, 2e-6);
        check(emit, &softmax(&[s]), &[noise(&[n], 1)], &sym[..1], 2e-6);
    }
}

#[test]
fn rotary_embeddings() {
    for (heads, n) in [(9u64, 6u64), (3, 1)] {
        let x = [noise(&[n, heads * 64], 1), noise(&[128, 64], 2), noise(&[128, 64], 3), ints(n, 128, 4)];
        check(emit, &rope(T, heads), &x, &t(n), 1e-6);
    }
}

#[test]
fn in_place_results_see_the_old_operand() {
    // Element by element, the residual stream, and a rotation that reads elsewhere in its row.
    let mut kernel = rms_norm(T, 70, true);
    kernel.aliases[0] = Some(0);
    let x = [noise(&[5, 70], 1), noise(&[70], 2), noise(&[5, 70], 3)];
    row::supported(&kernel).unwrap();
    check(emit, &kernel, &x, &t(5), 2e-6);
    kernel.aliases = vec![Some(2), Some(0)];
    check(emit, &kernel, &x, &t(5), 2e-6);
    kernel.aliases = vec![None, Some(0)];
    check(emit, &kernel, &x, &t(5), 2e-6);
    let mut kernel = rope(T, 3);
    kernel.aliases[0] = Some(0);
    let x = [noise(&[4, 192], 1), noise(&[128, 64], 2), noise(&[128, 64], 3), ints(4, 128, 4)];
    check(emit, &kernel, &x, &t(4), 1e-6);
    // Another row is out of the question.
    let mut b = B::new();
    let x = b.arg(DType::F32, &[k(8), k(4)]);
    let lo = b.slice(0, 0, 4, x);
    let hi = b.slice(0, 4, 8, x);
    let y = b.op(Op::Concat { axis: 0 }, &[hi, lo]);
    let mut kernel = b.kernel("swap", &[y]);
    check(emit, &kernel, &[noise(&[8, 4], 1)], &[], 0.0);
    kernel.aliases[0] = Some(0);
    assert!(row::supported(&kernel).unwrap_err().contains("another row"));
}

/// Every operator alone.
#[test]
fn single_operators() {
    let x3 = noise(&[6, 5, 18], 1);
    let shape = [T, k(5), k(18)];
    let one = |name: &str, op: Op, tol: f64| {
        let mut b = B::new();
        let x = b.arg(DType::F32, &shape);
        let y = b.op(op, &[x]);
        let kernel = b.kernel(name, &[y]);
        row::supported(&kernel).unwrap_or_else(|e| panic!("{name}: {e}"));
        check(emit, &kernel, std::slice::from_ref(&x3), &t(6), tol);
    };
    use UnaryOp::*;
    for u in [Neg, Abs, Exp, Sin, Cos, Tanh, Erf, Sigmoid, Floor, Recip] {
        one("unary", Op::Unary(u), 3e-6);
    }
    for perm in [[0u8, 2, 1], [1, 0, 2], [2, 1, 0], [1, 2, 0]] {
        one("transpose", Op::Transpose(perm.to_vec()), 0.0);
    }
    for axis in 0..3 {
        for op in [ReduceOp::Sum, ReduceOp::Max, ReduceOp::Min] {
            one("reduce", Op::Reduce { op, axis }, 1e-6);
        }
    }
    for axis in 1..3u8 {
        one("slice", Op::Slice { axis, start: 1, end: 4 }, 0.0);
        one("pad", Op::Pad { axis, lo: 3, hi: 20 }, 0.0);
    }
    one("reshape", Op::Reshape(vec![T, k(90)]), 0.0);
    one("reshape", Op::Reshape(vec![T, k(6), k(15)]), 0.0);
    one("reshape", Op::Reshape(vec![k(90), T]), 0.0);
    one("broadcast", Op::Broadcast { shape: vec![k(2), T, k(5), k(3), k(18)], axes: vec![1, 2, 4] }, 0.0);
    one("cast", Op::Cast(DType::BF16), 0.0);
    one("cast", Op::Cast(DType::F16), 0.0);
    one("cast", Op::Cast(DType::I32), 0.0);
    one("cast", Op::Cast(DType::Bool), 0.0);
    let scalar = |name: &str, n: u64, axis: u8| {
        let mut b = B::new();
        let x = b.arg(DType::F32, &[T]);
        let y = b.reduce(ReduceOp::Sum, axis, x);
        check(emit, &b.kernel(name, &[y]), &[noise(&[n], 1)], &t(n), 1e-6);
    };
    for n in [0u64, 1, 17, 1000] {
        scalar("sum", n, 0);
    }
    let mut b = B::new();
    let y = b.op(Op::Iota { shape: vec![T, k(3), k(20)], axis: 2 }, &[]);
    let z = b.op(Op::Iota { shape: vec![T, k(3), k(20)], axis: 0 }, &[]);
    let anchor = b.arg(DType::F32, &[T]);
    let kernel = b.kernel("iota", &[y, z, anchor]);
    check(emit, &kernel, &[noise(&[4], 1)], &t(4), 0.0);
    let mut b = B::new();
    let y = b.op(Op::f32s(&(0..23).map(|i| i as f32).collect::<Vec<_>>()), &[]);
    check(emit, &b.kernel("table", &[y]), &[], &[], 0.0);
}

#[test]
fn joins_pads_and_gathers() {
    for axis in 0..3u8 {
        let mut b = B::new();
        let mut shape = [k(4), k(6), k(21)];
        let x = b.arg(DType::F32, &shape);
        shape[axis as usize] = k(7);
        let y = b.arg(DType::F32, &shape);
        let s: Vec<u64> = shape.iter().map(|d| d.known().unwrap()).collect();
        let z = b.op(Op::Concat { axis }, &[x, y, x]);
        let z = b.op(Op::Pad { axis, lo: 2, hi: 5 }, &[z]);
        check(emit, &b.kernel("join", &[z]), &[noise(&[4, 6, 21], 1), noise(&s, 2)], &[], 0.0);
    }
    // Rank 1, long enough for blocks, cut anywhere.
    let mut b = B::new();
    let x = b.arg(DType::F32, &[k(333)]);
    let y = b.slice(0, 7, 300, x);
    let y = b.op(Op::Pad { axis: 0, lo: 41, hi: 3 }, &[y]);
    let y = b.op(Op::Concat { axis: 0 }, &[y, x]);
    check(emit, &b.kernel("join1", &[y]), &[noise(&[333], 1)], &[], 0.0);
    for axis in 0..2u8 {
        let mut b = B::new();
        let x = b.arg(DType::F32, &[k(40), k(33)]);
        let i = b.arg(DType::I32, &[T]);
        let y = b.op(Op::Gather { axis }, &[x, i]);
        let s = b.f32(3.0);
        let y = b.bin(BinaryOp::Mul, y, s);
        check(emit, &b.kernel("gather", &[y]), &[noise(&[40, 33], 1), ints(19, 33, 5)], &t(19), 1e-7);
    }
    // A choice that no cut decides: padding seen through a reshape.
    let mut b = B::new();
    let x = b.arg(DType::F32, &[T, k(5)]);
    let y = b.op(Op::Pad { axis: 1, lo: 1, hi: 1 }, &[x]);
    let z = b.op(Op::Reshape(vec![k(7), T]), &[y]);
    check(emit, &b.kernel("pad_view", &[z]), &[noise(&[9, 5], 1)], &t(9), 0.0);
}

#[test]
fn columns_are_reduced_in_flat_kernels() {
    // Sum over tokens, then arithmetic on the columns.
    for d in [1u64, 16, 100, 576] {
        for n in [0u64, 1, 40] {
            let mut b = B::new();
            let x = b.arg(DType::F32, &[T, k(d)]);
            let q = b.bin(BinaryOp::Mul, x, x);
            let s = b.reduce(ReduceOp::Sum, 0, q);
            let m = b.reduce(ReduceOp::Max, 0, x);
            let c = b.f32(0.25);
            let y = b.bin(BinaryOp::Mul, s, c);
            let y = b.un(UnaryOp::Sqrt, y);
            check(emit, &b.kernel("columns", &[y, m]), &[noise(&[n, d], 1)], &t(n), 2e-6);
        }
    }
    // Row norms of a matrix: lanes along the row.
    let mut b = B::new();
    let x = b.arg(DType::F32, &[k(70), k(50)]);
    let q = b.bin(BinaryOp::Mul, x, x);
    let s = b.reduce(ReduceOp::Sum, 1, q);
    let y = b.un(UnaryOp::Sqrt, s);
    check(emit, &b.kernel("row_norms", &[y]), &[noise(&[70, 50], 1)], &[], 2e-6);
}

#[test]
fn integers_bools_and_halves() {
    let mut b = B::new();
    let x = b.arg(DType::I32, &[T, k(19)]);
    let y = b.arg(DType::I32, &[T, k(19)]);
    let z = b.op(Op::i32(3), &[]);
    let q = b.bin(BinaryOp::Div, x, z);
    let m = b.bin(BinaryOp::Max, q, y);
    let lt = b.bin(BinaryOp::Lt, x, y);
    let eq = b.bin(BinaryOp::Eq, q, y);
    let or = b.bin(BinaryOp::Or, lt, eq);
    let no = b.un(UnaryOp::Not, or);
    let s = b.op(Op::Select, &[no, m, q]);
    let f = b.op(Op::Cast(DType::F32), &[s]);
    let sum = b.reduce(ReduceOp::Sum, 1, s);
    let kernel = b.kernel("ints", &[no, s, f, sum]);
    let v = |seed| {
        let x = ints(5 * 19, 100, seed);
        Tensor::i32([5, 19], x.as_i32().unwrap().iter().map(|x| x - 50).collect::<Vec<_>>())
    };
    check(emit, &kernel, &[v(1), v(2)], &t(5), 0.0);
    for d in [DType::BF16, DType::F16] {
        let mut b = B::new();
        let x = b.arg(d, &[T, k(37)]);
        let y = b.arg(d, &[T, k(37)]);
        let z = b.bin(BinaryOp::Mul, x, y);
        let z = b.op(Op::Add, &[z, x, y]);
        let w = b.op(Op::Cast(DType::F32), &[z]);
        let s = b.reduce(ReduceOp::Max, 1, w);
        let s = b.spread(s, w, &[0]);
        let w = b.bin(BinaryOp::Sub, w, s);
        let w = b.op(Op::Cast(d), &[w]);
        let kernel = b.kernel("halves", &[z, w]);
        let x = |seed| Tensor::from_floats(d, [5, 37], noise(&[5, 37], seed).as_f32().unwrap().to_vec());
        // Two roundings of one sum may differ in the last bit.
        check(emit, &kernel, &[x(1), x(2)], &t(5), if d == DType::BF16 { 8e-3 } else { 1e-3 });
    }
}

#[test]
fn nan_passes_through_extremes() {
    let mut kernel = softmax(&[k(2), k(40)]);
    kernel.body.roots.clear();
    let m = kernel.body.values().find(|v| matches!(kernel.body.node(*v).op, Op::Reduce { .. })).unwrap();
    kernel.body.output("r0", m);
    let mut x = noise(&[2, 40], 1).as_f32().unwrap().to_vec();
    x[33] = f32::NAN;
    for target in targets() {
        let e = emit(&kernel, &[], &target).unwrap();
        let lib = Loaded::new(&e.text, &target);
        let r = crate::kit::run_host(&lib, &kernel, &e, &[Tensor::f32([2, 40], x.clone())], &[], 9);
        let r = r[0].as_f32().unwrap();
        assert!(r[0].is_nan() && !r[1].is_nan(), "{r:?}");
    }
}

fn packed(x: &Tensor, nr: usize, transposed: bool) -> Vec<f32> {
    let v = x.as_f32().unwrap();
    let (r, c) = (x.shape[0] as usize, x.shape[1] as usize);
    let (kk, n) = if transposed { (c, r) } else { (r, c) };
    let mut out = vec![];
    for p in 0..n.div_ceil(nr) {
        for i in 0..kk {
            for j in p * nr..(p + 1) * nr {
                out.push(if j >= n {
                    0.0
                } else if transposed {
                    v[j * c + i]
                } else {
                    v[i * c + j]
                });
            }
        }
    }
    out
}

#[test]
fn panels_are_packed() {
    for (r, c) in [(96u64, 48u64), (40, 33), (1, 1), (100, 70), (33, 130)] {
        for transposed in [false, true] {
            for nr in [16u32, 32, 48] {
                let mut b = B::new();
                let x = b.arg(DType::F32, &[k(r), k(c)]);
                let y = b.arg(DType::F32, &[k(20), k(c)]);
                let two = b.f32(2.0);
                let z = b.bin(BinaryOp::Mul, x, two);
                let z = b.op(Op::Concat { axis: 0 }, &[z, y]);
                let mut kernel = b.kernel("pack", &[z]);
                let operands = [noise(&[r, c], 1), noise(&[20, c], 2)];
                let want = packed(&run_kernel(&kernel, &operands).unwrap()[0], nr as usize, transposed);
                kernel.results[0] = Layout::Panels { nr, transposed };
                row::supported(&kernel).unwrap();
                for target in targets() {
                    let e = emit(&kernel, &[], &target).unwrap();
                    let lib = Loaded::new(&e.text, &target);
                    let tasks = e.tasks.eval(&[]).unwrap();
                    let mut got = vec![f32::NAN; want.len() + 64];
                    let mut bytes: Vec<Vec<u8>> = operands.iter().map(Tensor::to_bytes).collect();
                    let buffers = [bytes[0].as_mut_ptr(), bytes[1].as_mut_ptr(), got.as_mut_ptr().cast()];
                    for task in 0..tasks {
                        lib.run("pack", &buffers, &[], (task, task + 1), 0);
                    }
                    assert!(got[..want.len()] == want[..], "{r}x{c} nr {nr} transposed {transposed}");
                    assert!(got[want.len()..].iter().all(|x| x.is_nan()));
                }
            }
        }
    }
}

#[test]
fn refusals_name_the_reason() {
    // A reduction read at another row.
    let mut b = B::new();
    let x = b.arg(DType::F32, &[k(8), k(8)]);
    let s = b.reduce(ReduceOp::Sum, 1, x);
    let s = b.op(Op::Broadcast { shape: vec![k(8), k(8)], axes: vec![1] }, &[s]);
    let y = b.add(x, s);
    let e = row::supported(&b.kernel("k", &[y])).unwrap_err();
    assert!(e.contains("another row"), "{e}");
    let mut b = B::new();
    let x = b.arg(DType::F32, &[k(8), k(8)]);
    let y = b.op(Op::MatMul { ta: false, tb: false }, &[x, x]);
    let kernel = b.kernel("k", &[y]);
    assert!(row::supported(&kernel).unwrap_err().contains("matmul"));
    assert!(emit(&kernel, &[], &HostTarget::avx2()).unwrap_err().to_string().contains("kernel k"));
}

/// 16-bit elements lie in pairs along the contracted dimension.
#[test]
fn panels_of_bf16_are_packed_in_pairs() {
    for (r, c) in [(96u64, 64u64), (40, 33), (1, 1), (100, 70), (33, 131)] {
        for (transposed, nr) in [(false, 16u32), (false, 48), (true, 32), (true, 48)] {
            let mut b = B::new();
            let x = b.arg(DType::BF16, &[k(r), k(c)]);
            let z = b.un(UnaryOp::Neg, x);
            let mut kernel = b.kernel("pack", &[z]);
            let x = Tensor::from_floats(DType::BF16, vec![r, c], noise(&[r, c], 1).floats().to_vec());
            let y = run_kernel(&kernel, std::slice::from_ref(&x)).unwrap()[0].floats().to_vec();
            let (kk, n, nr_) = (if transposed { c } else { r }, if transposed { r } else { c }, u64::from(nr));
            let mut want = vec![0f32; (n.div_ceil(nr_) * kk.div_ceil(2) * 2 * nr_) as usize];
            for i in 0..kk {
                for j in 0..n {
                    let at = ((j / nr_) * kk.div_ceil(2) + i / 2) * 2 * nr_ + (j % nr_) * 2 + i % 2;
                    want[at as usize] = y[if transposed { j * c + i } else { i * c + j } as usize];
                }
            }
            kernel.results[0] = Layout::Panels { nr, transposed };
            assert_eq!(row::supported(&kernel), Ok(()));
            for target in targets() {
                let e = emit(&kernel, &[], &target).unwrap();
                let lib = Loaded::new(&e.text, &target);
                let tasks = e.tasks.eval(&[]).unwrap();
                let mut got = vec![0xffffu16; want.len() + 64];
                let mut bytes = x.to_bytes();
                for task in 0..tasks {
                    lib.run("pack", &[bytes.as_mut_ptr(), got.as_mut_ptr().cast()], &[], (task, task + 1), 0);
                }
                let floats: Vec<f32> = got.iter().map(|h| f32::from_bits(u32::from(*h) << 16)).collect();
                assert!(floats[..want.len()] == want[..], "{r}x{c} nr {nr} transposed {transposed}");
                assert!(got[want.len()..].iter().all(|x| *x == 0xffff));
            }
        }
    }
}

/// What is stored and what goes on in the same kernel, row by row or beside vectors, alone or with a product of its sum stored as well.
#[test]
fn a_value_has_the_same_bits_wherever_it_is_used() {
    let (r, c, d) = (5u64, 23u64, 70u64);
    let build = |stored: bool| {
        let mut b = B::new();
        let (old, new) = (b.arg(DType::F32, &[k(r), k(c)]), b.arg(DType::F32, &[k(r), k(c)]));
        let wide = b.arg(DType::F32, &[k(r), k(c), k(d)]);
        let (keep, take) = (b.arg(DType::F32, &[]), b.arg(DType::F32, &[]));
        let (keep, take) = (b.spread(keep, old, &[]), b.spread(take, old, &[]));
        let (first, second) = (b.bin(BinaryOp::Mul, keep, old), b.bin(BinaryOp::Mul, take, new));
        let sum = b.add(first, second);
        let spread = b.spread(sum, wide, &[0, 1]);
        let out = b.bin(BinaryOp::Mul, spread, wide);
        b.kernel("average", &[sum, out, second][..if stored { 3 } else { 2 }])
    };
    let ones = Tensor::from_floats(DType::F32, vec![r, c, d], vec![1.0; (r * c * d) as usize]);
    let scalar = |x: f32| Tensor::from_floats(DType::F32, vec![], vec![x]);
    let x = [noise(&[r, c], 1), noise(&[r, c], 2), ones, scalar(0.9), scalar(0.1)];
    for target in targets() {
        let run = |stored: bool| {
            let kernel = build(stored);
            let e = emit(&kernel, &[], &target).unwrap();
            run_host(&Loaded::new(&e.text, &target), &kernel, &e, &x, &[], u64::MAX >> 1)
        };
        let (alone, beside) = (run(false), run(true));
        let sum = alone[0].floats();
        assert_eq!(sum, beside[0].floats());
        for all in [&alone[1], &beside[1]] {
            for (row, s) in all.floats().chunks(d as usize).zip(sum.iter()) {
                assert!(row.iter().all(|v| v.to_bits() == s.to_bits()), "{} stored, {} used", s, row[0]);
            }
        }
    }
}
