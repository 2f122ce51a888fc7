//! Times row kernels at the shapes of a small model: `cargo run --release -p pleach-codegen --example row_bench`.
//!
//! Best and median of many runs in microseconds, on one thread and on two that share the tasks.
#![allow(unsafe_code, clippy::print_stdout, reason = "calls compiled kernels and reports their times")]

#[path = "../tests/all/bodies.rs"]
#[allow(dead_code, reason = "shared with the tests")]
mod bodies;
#[path = "../tests/all/train_bodies.rs"]
#[allow(dead_code, reason = "shared with the tests")]
mod train_bodies;

use bodies::{B, T, k, layer_norm, rms_norm, rope, softmax};
use pleach_codegen::emit::row;
use pleach_codegen::{HostTarget, link, mlir};
use pleach_ir::{BinaryOp, DType, Kernel, Layout, Op, Sym, UnaryOp};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

type KernelFn = unsafe extern "C" fn(*const *mut u8, *const i64, i64, i64, *mut u8);

fn swiglu(d: u64) -> Kernel {
    let mut b = B::new();
    let x = b.arg(DType::F32, &[T, k(2 * d)]);
    let (g, u) = (b.slice(1, 0, d, x), b.slice(1, d, 2 * d, x));
    let s = b.un(UnaryOp::Sigmoid, g);
    let y = b.bin(BinaryOp::Mul, g, s);
    let y = b.bin(BinaryOp::Mul, y, u);
    b.kernel("swiglu", &[y])
}

fn gelu(d: u64) -> Kernel {
    let mut b = B::new();
    let x = b.arg(DType::F32, &[T, k(d)]);
    let c = b.f32(std::f32::consts::FRAC_1_SQRT_2);
    let z = b.bin(BinaryOp::Mul, x, c);
    let z = b.un(UnaryOp::Erf, z);
    let (one, half) = (b.f32(1.0), b.f32(0.5));
    let z = b.add(z, one);
    let z = b.bin(BinaryOp::Mul, z, half);
    let y = b.bin(BinaryOp::Mul, x, z);
    b.kernel("gelu", &[y])
}

fn embed(rows: u64, d: u64) -> Kernel {
    let mut b = B::new();
    let w = b.arg(DType::F32, &[k(rows), k(d)]);
    let i = b.arg(DType::I32, &[T]);
    let y = b.op(Op::Gather { axis: 0 }, &[w, i]);
    b.kernel("embed", &[y])
}

fn columns(d: u64) -> Kernel {
    let mut b = B::new();
    let x = b.arg(DType::F32, &[T, k(d)]);
    let y = b.reduce(pleach_ir::ReduceOp::Sum, 0, x);
    b.kernel("columns", &[y])
}

fn pack(r: u64, c: u64, transposed: bool) -> Kernel {
    let mut b = B::new();
    let x = b.arg(DType::F32, &[k(r), k(c)]);
    let mut kernel = b.kernel("pack", &[x]);
    kernel.results[0] = Layout::Panels { nr: 48, transposed };
    kernel
}

fn main() {
    let target = std::env::args().nth(1).and_then(|n| HostTarget::from_name(&n)).or_else(HostTarget::detect);
    let Some(target) = target else {
        println!("this machine has no AVX2");
        return;
    };
    println!(
        "{:<28}{:>9}{:>9}{:>9}{:>9}{:>9}{:>10}{:>9}",
        "", "1 best", "median", "2 best", "median", "GB/s", "compile", "plan us"
    );
    let n = 512;
    let list: Vec<(&str, Kernel, u64)> = vec![
        ("rms_norm 512x576", rms_norm(T, 576, false), n),
        ("add + rms_norm 512x576", rms_norm(T, 576, true), n),
        ("layer_norm 512x384", layer_norm(T, 384), n),
        ("softmax 512x1536", softmax(&[T, k(1536)]), n),
        ("rope 512x9x64", rope(T, 9), n),
        ("swiglu 512x1536", swiglu(1536), n),
        ("gelu 512x1536", gelu(1536), n),
        ("embed 512x576", embed(49152, 576), n),
        ("column sums 512x576", columns(576), n),
        ("rms_norm 1x576", rms_norm(T, 576, false), 1),
        ("rms_norm grad 512x576", train_bodies::rms_norm_grad(T, 576, DType::F32, 1), n),
        ("the same, bf16", train_bodies::rms_norm_grad(T, 576, DType::BF16, 1), n),
        ("add + norm bf16 512x576", train_bodies::add_norm_bf16(T, 576), n),
        ("swiglu grad 512x1536", train_bodies::swiglu_grad(T, 1536, DType::F32), n),
        ("the same, bf16", train_bodies::swiglu_grad(T, 1536, DType::BF16), n),
        ("rope grad 512x9x64", train_bodies::rope_grad(T, 9, DType::F32), n),
        ("the same, bf16", train_bodies::rope_grad(T, 9, DType::BF16), n),
        ("cross-entropy 128x49152", train_bodies::cross_entropy(T, 49152, DType::F32), 128),
        ("the same, bf16", train_bodies::cross_entropy(T, 49152, DType::BF16), 128),
        ("weight grad 512x576", train_bodies::weight_grad(T, 576, DType::F32), n),
        ("squares 1536x576", train_bodies::squares(1536, 576), n),
        ("adamw 4.88 M", train_bodies::adamw(&[k(8472), k(576)]), n),
        ("columns 512x1536, 16", train_bodies::columns_of(T, 1536, 16, DType::BF16), n),
        ("pack 49152x576 (NxK)", pack(49152, 576, true), n),
        ("pack 576x1536 (KxN)", pack(576, 1536, false), n),
        ("pack 576x1536 (NxK)", pack(576, 1536, true), n),
    ];
    for (name, kernel, rows) in list {
        bench(name, &kernel, rows, &target);
    }
}

fn bench(name: &str, kernel: &Kernel, rows: u64, target: &HostTarget) {
    let clock = Instant::now();
    let _ = row::supported(kernel);
    let plan = clock.elapsed().as_secs_f64() * 1e6;
    let clock = Instant::now();
    let e = row::emit(kernel, &[Sym::T], target).expect("the kernel is supported");
    let object = mlir::compile_object(&e.text, target).expect("the text compiles");
    let compile = clock.elapsed().as_secs_f64() * 1e3;
    let so = link::link(&[object]).expect("the object links");
    let path = std::env::temp_dir()
        .join(format!("pleach-row-bench-{}-{name}.so", std::process::id()).replace([' ', '/'], "_"));
    std::fs::write(&path, so).expect("the temporary directory can be written");
    // SAFETY: the library was just made from one kernel and runs no code when it is loaded.
    let lib = unsafe { libloading::Library::new(&path).expect("the object loads") };
    let _ = std::fs::remove_file(&path);
    // SAFETY: the symbol is the kernel, which has this signature; `lib` outlives every call.
    let f: KernelFn = unsafe { *lib.get::<KernelFn>(kernel.name.as_bytes()).expect("the kernel is there") };
    let env = |s: Sym| (s == Sym::T).then_some(rows);
    let mut memory: Vec<Vec<u32>> = vec![];
    for t in kernel.operand_types() {
        let words = t.bytes(&env).expect("a size") as usize / 4 + 16;
        let value = if t.dtype == DType::I32 { 7 } else { 0.5f32.to_bits() };
        memory.push((0..words).map(|i| if t.dtype == DType::I32 { (i as u32 * 37) % 128 } else { value }).collect());
    }
    for (t, l) in kernel.result_types().iter().zip(&kernel.results) {
        memory.push(vec![0; l.bytes(t, &env).expect("a size") as usize / 4 + 16]);
    }
    let buffers: Vec<usize> = memory.iter_mut().map(|m| m.as_mut_ptr() as usize).collect();
    let scratch = e.scratch_bytes.eval(&[rows]).expect("a size") as usize;
    let tasks = e.tasks.eval(&[rows]).expect("a count");
    let bytes = e.bytes.eval(&[rows]).expect("a count");
    let runs = if bytes > 10_000_000 { 30 } else { 2000 };
    let mut spare: Vec<Vec<u64>> = vec![vec![0; scratch / 8 + 16]; 2];
    let spare: Vec<usize> = spare.iter_mut().map(|s| (s.as_mut_ptr() as usize).next_multiple_of(64)).collect();
    let call = |first: u64, last: u64, worker: usize| {
        let b: Vec<*mut u8> = buffers.iter().map(|b| *b as *mut u8).collect();
        // SAFETY: buffers, dimensions and scratch memory have the sizes that the kernel's types and launch data ask for,
        // and each worker has scratch memory of its own.
        unsafe { f(b.as_ptr(), [rows as i64].as_ptr(), first as i64, last as i64, spare[worker] as *mut u8) }
    };
    let one = times(runs, || call(0, tasks, 0));
    // A second thread that spins for rounds.
    let (round, done) = (AtomicU64::new(0), AtomicU64::new(0));
    let half = tasks / 2;
    let two = std::thread::scope(|s| {
        s.spawn(|| {
            let mut seen = 0;
            loop {
                let r = round.load(Ordering::Acquire);
                if r == u64::MAX {
                    return;
                }
                if r > seen {
                    seen = r;
                    call(half, tasks, 1);
                    done.store(r, Ordering::Release);
                }
                std::hint::spin_loop();
            }
        });
        let mut r = 0;
        let t = times(runs, || {
            r += 1;
            round.store(r, Ordering::Release);
            call(0, half, 0);
            while done.load(Ordering::Acquire) < r {
                std::hint::spin_loop();
            }
        });
        round.store(u64::MAX, Ordering::Release);
        t
    });
    let rate = bytes as f64 / two.0 / 1e3;
    println!(
        "{name:<28}{:>9.1}{:>9.1}{:>9.1}{:>9.1}{rate:>9.1}{compile:>8.1}ms{plan:>9.0}",
        one.0, one.1, two.0, two.1
    );
}

/// Best and median in microseconds.
fn times(runs: usize, mut f: impl FnMut()) -> (f64, f64) {
    let mut v: Vec<f64> = (0..runs)
        .map(|_| {
            let clock = Instant::now();
            f();
            clock.elapsed().as_secs_f64() * 1e6
        })
        .collect();
    v.sort_by(f64::total_cmp);
    (v[0], v[v.len() / 2])
}
