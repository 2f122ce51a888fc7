//! Times attention at the shapes of a small model: `cargo run --release -p pleach-codegen --example attention_bench`.
//!
//! Nine query heads on three key/value heads of 64, causal, f32. Best and median of many runs on one thread and on two
//! that share the tasks; arithmetic counts only keys that are seen. For decoding each run reads another cache, so that
//! keys and values come from memory, and the machine's own rate of reading as many bytes is printed beside it.
#![allow(unsafe_code, clippy::print_stdout, reason = "calls compiled kernels and reports their times")]

use pleach_codegen::emit::attention;
use pleach_codegen::{HostTarget, link, mlir};
use pleach_ir::{AttentionAttrs, Class, DType, Dim, Entry, Kernel, Layout, Op, Sym};
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Instant;

type KernelFn = unsafe extern "C" fn(*const *mut u8, *const i64, i64, i64, *mut u8);

const HEADS: u32 = 9;
const KV_HEADS: u32 = 3;
const HEAD_DIM: u32 = 64;
const SYMBOLS: [Sym; 4] = [Sym::T, Sym::S, Sym::S1, Sym::C];

fn kernel() -> Kernel {
    let mut e = Entry::new("kernel");
    let (q, kv) = (u64::from(HEADS * HEAD_DIM), u64::from(KV_HEADS * HEAD_DIM));
    let shapes: [(DType, Vec<Dim>); 6] = [
        (DType::F32, vec![Sym::T.into(), q.into()]),
        (DType::F32, vec![Sym::C.into(), kv.into()]),
        (DType::F32, vec![Sym::C.into(), kv.into()]),
        (DType::I32, vec![Sym::S1.into()]),
        (DType::I32, vec![Sym::S.into()]),
        (DType::I32, vec![Sym::S.into()]),
    ];
    let mut x = vec![];
    for (i, (dtype, shape)) in shapes.into_iter().enumerate() {
        let op = Op::Input { name: format!("a{i}"), dtype, shape };
        x.push(e.push(&[], op, &[]).expect("an input has any type"));
    }
    let scale = (1.0 / (HEAD_DIM as f32).sqrt()).to_bits();
    let at = AttentionAttrs { heads: HEADS, kv_heads: KV_HEADS, head_dim: HEAD_DIM, scale, causal: true, window: None };
    let y = e.push(&[], Op::Attention(at), &x).expect("the shapes fit");
    e.output("r0", y);
    Kernel {
        name: "attention".into(),
        class: Class::Attention,
        body: e,
        operands: vec![Layout::RowMajor; 6],
        results: vec![Layout::RowMajor],
        aliases: vec![None],
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
    fn times(&self, calls: &[[usize; 7]], threads: usize) -> Vec<f64> {
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
        bench(&target);
    }
}

fn bench(target: &HostTarget) {
    let k = kernel();
    let e = attention::emit(&k, &SYMBOLS, target).expect("the kernel is supported");
    let clock = Instant::now();
    let object = mlir::compile_object(&e.text, target).expect("the text is well formed");
    println!("{:?}: compiled in {:.0} ms", target.isa, clock.elapsed().as_secs_f64() * 1e3);
    let path = std::env::temp_dir().join(format!("pleach-attention-{}-{:?}.so", std::process::id(), target.isa));
    std::fs::write(&path, link::link(&[object]).expect("one object links")).expect("the folder is writable");
    // SAFETY: the object was compiled above and runs no code when loaded.
    let lib = unsafe { libloading::Library::new(&path).expect("the object loads") };
    // SAFETY: the symbol has the host ABI of kernels.
    let f = *unsafe { lib.get::<KernelFn>(b"attention").expect("the kernel is there") };
    let _ = std::fs::remove_file(&path);

    // Sequences, queries of each, keys of each, caches to go through.
    let cases =
        [(4, 128, 128, 1), (1, 512, 512, 1), (1, 2048, 2048, 1), (20, 20, 20, 1), (1, 1, 600, 90), (8, 1, 600, 12)];
    for (s, queries, keys, caches) in cases {
        let (qw, kw) = ((HEADS * HEAD_DIM) as usize, (KV_HEADS * HEAD_DIM) as usize);
        let (t, c) = (s * queries, s * keys);
        let value = |i: usize| ((i * 7919) % 2003) as f32 / 1000.0 - 1.0;
        let q: Vec<f32> = (0..t * qw).map(value).collect();
        let kv: Vec<f32> = (0..2 * c * kw * caches).map(value).collect();
        let segments: Vec<i32> = (0..=s).map(|i| (i * queries) as i32).collect();
        let start: Vec<i32> = (0..s).map(|i| (i * keys) as i32).collect();
        let len = vec![keys as i32; s];
        let mut out = vec![0f32; t * qw];
        let dims = [t as i64, s as i64, s as i64 + 1, c as i64];
        let env: Vec<u64> = dims.iter().map(|d| *d as u64).collect();
        let tasks = e.tasks.eval(&env).expect("every symbol has a value");
        let bytes = e.scratch_bytes.eval(&env).expect("every symbol has a value");
        let seen = (queries * (keys - queries) + queries * (queries + 1) / 2) as f64;
        let work = 4.0 * f64::from(HEADS * HEAD_DIM) * seen * s as f64;
        let moved = (2 * c * kw * 4) as f64;
        let calls: Vec<[usize; 7]> = (0..if caches > 1 { 300 } else { 40 })
            .map(|i| {
                let key = &kv[2 * c * kw * (i % caches)..];
                [
                    q.as_ptr() as usize,
                    key.as_ptr() as usize,
                    key[c * kw..].as_ptr() as usize,
                    segments.as_ptr() as usize,
                    start.as_ptr() as usize,
                    len.as_ptr() as usize,
                    out.as_mut_ptr() as usize,
                ]
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
            print!("  reading alone, 1 thread: {:.0} GB/s", read_rate(&kv));
        }
        println!();
    }
}
