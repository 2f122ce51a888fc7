//! Times attention at the shapes of a small model: `cargo run --release -p pleach-codegen --example attention_bench`.
//!
//! Nine query heads on three key/value heads of 64, causal, f32 and bf16, forward (with the log-sum-exp where there is a
//! backward pass) and backward. Best and median of many runs on one thread and on two
//! that share the tasks; arithmetic counts only keys that are seen. For decoding each run reads another cache, so that
//! keys and values come from memory, and the machine's own rate of reading as many bytes is printed beside it.
#![allow(unsafe_code, clippy::print_stdout, reason = "calls compiled kernels and reports their times")]

use pleach_codegen::emit::attention;
use pleach_codegen::{HostTarget, link, mlir};
use pleach_ir::{AttentionAttrs, AttentionWrt, Class, DType, Dim, Entry, Kernel, Layout, Op, Sym, TensorType, ValueId};
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Instant;

type KernelFn = unsafe extern "C" fn(*const *mut u8, *const i64, i64, i64, *mut u8);

const HEADS: u32 = 9;
const KV_HEADS: u32 = 3;
const HEAD_DIM: u32 = 64;
const SYMBOLS: [Sym; 4] = [Sym::T, Sym::S, Sym::S1, Sym::C];

/// What is timed.
#[derive(Clone, Copy, PartialEq)]
enum Pass {
    /// The result alone.
    Forward,
    /// The result and the log-sum-exp, keys of the same run.
    Saving,
    /// The three gradients.
    Backward,
}

fn kernel(dtype: DType, pass: Pass) -> Kernel {
    let mut e = Entry::new("kernel");
    let (q, kv) = (u64::from(HEADS * HEAD_DIM), u64::from(KV_HEADS * HEAD_DIM));
    let mut shapes: Vec<(DType, Vec<Dim>)> = vec![
        (dtype, vec![Sym::T.into(), q.into()]),
        (dtype, vec![Sym::C.into(), kv.into()]),
        (dtype, vec![Sym::C.into(), kv.into()]),
    ];
    if pass == Pass::Backward {
        shapes.push((dtype, vec![Sym::T.into(), q.into()]));
        shapes.push((DType::F32, vec![Sym::T.into(), u64::from(HEADS).into()]));
        shapes.push((dtype, vec![Sym::T.into(), q.into()]));
    }
    shapes.extend([Sym::S1, Sym::S, Sym::S].map(|s| (DType::I32, vec![s.into()])));
    let mut x = vec![];
    for (i, (dtype, shape)) in shapes.into_iter().enumerate() {
        let op = Op::Input { name: format!("a{i}"), dtype, shape };
        x.push(e.push(&[], op, &[]).expect("an input has any type"));
    }
    let scale = (1.0 / (HEAD_DIM as f32).sqrt()).to_bits();
    let at = AttentionAttrs { heads: HEADS, kv_heads: KV_HEADS, head_dim: HEAD_DIM, scale, causal: true, window: None };
    let short = [x[0], x[1], x[3], x[4], x[5]];
    let ops: Vec<(Op, &[ValueId])> = match pass {
        Pass::Forward => vec![(Op::Attention(at), &x)],
        Pass::Saving => vec![(Op::Attention(at), &x), (Op::AttentionLse(at), &short)],
        Pass::Backward => [AttentionWrt::Q, AttentionWrt::K, AttentionWrt::V]
            .map(|wrt| (Op::AttentionGrad { attrs: at, wrt }, &x[..]))
            .to_vec(),
    };
    let results = ops.len();
    for (i, (op, x)) in ops.into_iter().enumerate() {
        let y = e.push(&[], op, x).expect("the shapes fit");
        e.output(format!("r{i}"), y);
    }
    Kernel {
        name: "attention".into(),
        class: Class::Attention,
        operands: vec![Layout::RowMajor; e.inputs().len()],
        results: vec![Layout::RowMajor; results],
        aliases: vec![None; results],
        body: e,
    }
}

/// One kernel on one set of counts.
struct Launch<'a> {
    f: KernelFn,
    dims: &'a [i64],
    tasks: i64,
    scratch_bytes: u64,
}

impl Launch<'_> {
    fn work(&self, buffers: &[usize], next: &AtomicI64, scratch: usize) {
        loop {
            let t = next.fetch_add(1, Ordering::AcqRel);
            if t >= self.tasks {
                return;
            }
            // SAFETY: buffers and scratch have the sizes that the kernel's shapes and `Emitted` say.
            unsafe { (self.f)(buffers.as_ptr().cast(), self.dims.as_ptr(), t, t + 1, scratch as *mut u8) };
        }
    }

    /// Sorted times of calls with these buffers, on one or two threads, as the runtime makes them: tasks are handed out
    /// one by one, and the second thread spins between calls.
    fn times(&self, calls: &[Vec<usize>], threads: usize) -> Vec<f64> {
        let mut scratch = vec![vec![0u64; self.scratch_bytes as usize / 8 + 16]; threads];
        let at: Vec<usize> = scratch.iter_mut().map(|s| (s.as_mut_ptr() as usize).next_multiple_of(64)).collect();
        let (next, turn, done) = (AtomicI64::new(0), AtomicI64::new(-1), AtomicI64::new(0));
        let mut times = vec![];
        std::thread::scope(|s| {
            for at in &at[1..] {
                let (next, turn, done) = (&next, &turn, &done);
                s.spawn(move || {
                    for (i, buffers) in calls.iter().enumerate() {
                        while turn.load(Ordering::Acquire) < i as i64 {
                            std::hint::spin_loop();
                        }
                        self.work(buffers, next, *at);
                        done.fetch_add(1, Ordering::AcqRel);
                    }
                });
            }
            for (i, buffers) in calls.iter().enumerate() {
                let clock = Instant::now();
                next.store(0, Ordering::Release);
                turn.store(i as i64, Ordering::Release);
                self.work(buffers, &next, at[0]);
                while done.load(Ordering::Acquire) < (i as i64 + 1) * (threads as i64 - 1) {
                    std::hint::spin_loop();
                }
                times.push(clock.elapsed().as_secs_f64());
            }
        });
        times.sort_by(f64::total_cmp);
        times
    }
}

/// GB/s of summing `x`, chunk by chunk, the best of a few.
fn read_rate(x: &[f32]) -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let clock = Instant::now();
        let mut sum = [0f32; 64];
        for c in x.as_chunks::<64>().0 {
            sum.iter_mut().zip(c).for_each(|(s, v)| *s += v);
        }
        std::hint::black_box(sum);
        best = best.min(clock.elapsed().as_secs_f64());
    }
    x.len() as f64 * 4e-9 / best
}

fn main() {
    let Some(target) = HostTarget::detect() else {
        println!("this machine has no AVX2");
        return;
    };
    for target in [target.clone(), HostTarget::avx2()] {
        for dtype in [DType::F32, DType::BF16] {
            for pass in [Pass::Forward, Pass::Saving, Pass::Backward] {
                bench(&target, dtype, pass);
            }
        }
    }
}

fn bench(target: &HostTarget, dtype: DType, pass: Pass) {
    let k = kernel(dtype, pass);
    let e = attention::emit(&k, &SYMBOLS, target).expect("the kernel is supported");
    let clock = Instant::now();
    let object = mlir::compile_object(&e.text, target).expect("the text is well formed");
    let what = match pass {
        Pass::Forward => "forward",
        Pass::Saving => "forward and log-sum-exp",
        Pass::Backward => "backward",
    };
    println!("{:?}, {dtype}, {what}: compiled in {:.0} ms", target.isa, clock.elapsed().as_secs_f64() * 1e3);
    let path = std::env::temp_dir().join(format!("pleach-attention-{}-{:?}.so", std::process::id(), target.isa));
    std::fs::write(&path, link::link(&[object]).expect("one object links")).expect("the folder is writable");
    // SAFETY: the object was compiled above and runs no code when loaded.
    let lib = unsafe { libloading::Library::new(&path).expect("the object loads") };
    // SAFETY: the symbol has the host ABI of kernels.
    let f = *unsafe { lib.get::<KernelFn>(b"attention").expect("the kernel is there") };
    let _ = std::fs::remove_file(&path);

    // Sequences, queries of each, keys of each, caches to go through.
    let training = [(4, 128, 128, 1), (1, 512, 512, 1), (20, 20, 20, 1)];
    let decoding = [(1, 2048, 2048, 1), (1, 1, 600, 90), (8, 1, 600, 12)];
    let cases = training.iter().chain(if pass == Pass::Forward { &decoding[..] } else { &[] });
    for (s, queries, keys, caches) in cases.copied() {
        let dims = [(s * queries) as i64, s as i64, s as i64 + 1, (s * keys) as i64];
        let env: Vec<u64> = dims.iter().map(|d| *d as u64).collect();
        let lookup = |x: Sym| SYMBOLS.iter().position(|y| *y == x).map(|i| env[i]);
        let size = |t: &TensorType| t.bytes(&lookup).expect("every symbol has a value") as usize / 4 + 16;
        let types = k.operand_types();
        // Words of memory for every operand; of keys and values as many as there are caches.
        let mut memory: Vec<Vec<f32>> = vec![];
        for (i, t) in types.iter().enumerate() {
            let copies = if i == 1 || i == 2 { caches } else { 1 };
            let word = |i: usize| {
                let x = (((i * 7919) % 2003) as f32 / 1000.0 - 1.0).to_bits();
                f32::from_bits(if t.dtype == DType::BF16 { x & 0xffff_0000 | x >> 16 } else { x })
            };
            memory.push((0..size(t) * copies).map(word).collect());
        }
        let n = memory.len();
        let bits = |v: Vec<usize>| v.into_iter().map(|x| f32::from_bits(x as u32)).collect::<Vec<f32>>();
        memory[n - 3] = bits((0..=s).map(|i| i * queries).collect());
        memory[n - 2] = bits((0..s).map(|i| i * keys).collect());
        memory[n - 1] = bits(vec![keys; s]);
        let mut results: Vec<Vec<f32>> = k.result_types().iter().map(|t| vec![0.0; size(t)]).collect();
        let results: Vec<usize> = results.iter_mut().map(|r| r.as_mut_ptr() as usize).collect();
        let tasks = e.tasks.eval(&env).expect("every symbol has a value");
        let bytes = e.scratch_bytes.eval(&env).expect("every symbol has a value");
        let seen = (queries * (keys - queries) + queries * (queries + 1) / 2) as f64;
        let products = if pass == Pass::Backward { 10.0 } else { 4.0 };
        let work = products * f64::from(HEADS * HEAD_DIM) * seen * s as f64;
        let moved = 2.0 * types[1].bytes(&lookup).expect("every symbol has a value") as f64;
        let calls: Vec<Vec<usize>> = (0..if caches > 1 { 300 } else { 40 })
            .map(|turn| {
                let of = |(i, m): (usize, &Vec<f32>)| {
                    let at = if i == 1 || i == 2 { turn % caches * size(&types[i]) } else { 0 };
                    m[at..].as_ptr() as usize
                };
                memory.iter().enumerate().map(of).chain(results.iter().copied()).collect()
            })
            .collect();
        let launch = Launch { f, dims: &dims, tasks: tasks as i64, scratch_bytes: bytes };
        print!("  {s} x {queries} queries, {keys} keys:");
        for threads in [1, 2] {
            let times = launch.times(&calls, threads);
            let (best, median) = (times[0], times[times.len() / 2]);
            print!("  {threads} thread{} {:.0}/{:.0} us", if threads > 1 { "s" } else { "" }, best * 1e6, median * 1e6);
            if queries == 1 {
                print!(" ({:.0} GB/s)", moved * 1e-9 / best);
            } else {
                print!(" ({:.0} GFLOP/s)", work * 1e-9 / best);
            }
        }
        if queries == 1 {
            print!("  reading alone, 1 thread: {:.0} GB/s", read_rate(&memory[1]));
        }
        println!();
    }
}
