//! Speed of contraction kernels against this machine's own peak and bandwidth, measured in the same run.
//!
//! `cargo run --release -p pleach-codegen --example contraction_bench [threads] [avx512-bf16|avx512|avx2] [filter] [f32|bf16] [cold]`
//!
//! `cold`: every launch reads other operands, so that they come from memory as in a step of training. Each line: best time of many, GFLOP/s or GB/s, percent of the peak measured on the same threads. A matrix-vector
//! product is compared with a plain read of as many bytes.
#![allow(
    unsafe_code,
    clippy::print_stdout,
    unreachable_pub,
    clippy::type_complexity,
    reason = "a measuring program; calls compiled kernels"
)]

use pleach_codegen::emit::HostIsa;
use pleach_codegen::emit::contraction::{choose_panel, emit};
use pleach_codegen::emit::func::{Func, vty};
use pleach_codegen::{HostTarget, link, mlir};
use pleach_ir::{BinaryOp, BlockFormat, Class, DType, Dim, Entry, Kernel, Layout, Op, Sym, UnaryOp, ValueId};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

type KernelFn = unsafe extern "C" fn(*const *mut u8, *const i64, i64, i64, *mut u8);

const LINE: usize = 64;

/// Zeroed or filled memory on a cache line.
struct Memory(Vec<f32>, usize);

impl Memory {
    fn new(n: usize, value: f32) -> Memory {
        let v = vec![value; n + 2 * LINE];
        let skip = (LINE - v.as_ptr() as usize % LINE) % LINE / 4;
        Memory(v, skip)
    }
    fn ptr(&self) -> *mut u8 {
        self.0[self.1..].as_ptr().cast_mut().cast()
    }
}

fn load(text: &str, name: &str, target: &HostTarget) -> (libloading::Library, KernelFn, f64) {
    let (mut object, mut ms, mut stages) = (vec![], f64::MAX, mlir::Stages::default());
    for _ in 0..5 {
        let (o, t) = mlir::compile_object_timed(text, target).unwrap_or_else(|e| panic!("{e}"));
        let sum = (t.parse + t.passes + t.translate + t.emit).as_secs_f64() * 1e3;
        if sum < ms {
            (ms, stages) = (sum, t);
        }
        object = o;
    }
    println!("{name}: {} bytes of text, {stages:.1?}", text.len());
    let path = std::env::temp_dir().join(format!("pleach-bench-{}-{name}.so", std::process::id()));
    std::fs::write(&path, link::link(&[object]).unwrap()).unwrap();
    // SAFETY: the object was just made by this compiler and has no initialisers.
    let lib = unsafe { libloading::Library::new(&path).unwrap() };
    std::fs::remove_file(&path).unwrap();
    // SAFETY: every kernel symbol has this signature.
    let f = *unsafe { lib.get::<KernelFn>(name.as_bytes()).unwrap() };
    (lib, f, ms)
}

struct Launch<'a> {
    f: KernelFn,
    /// One set of buffers, or several that take turns.
    buffers: &'a [Vec<*mut u8>],
    dims: &'a [i64],
    tasks: u64,
    scratch: &'a [Memory],
}
// SAFETY: tasks of a launch write disjoint parts of the buffers, and each thread has its own scratch.
unsafe impl Sync for Launch<'_> {}

unsafe extern "C" {
    fn clock_gettime(clock: i32, time: *mut [i64; 2]) -> i32;
}

/// Seconds that this thread has run: what one thread needs on a machine that others use too.
fn thread_time() -> f64 {
    let mut t = [0i64; 2];
    // SAFETY: the structure is two 64-bit numbers; 3 is CLOCK_THREAD_CPUTIME_ID.
    unsafe { clock_gettime(3, &mut t) };
    t[0] as f64 + t[1] as f64 * 1e-9
}

/// Best time of a launch (of one thread: time on the processor): each thread has a stretch of the tasks, the last quarter of which
/// others help with, about as in the runtime.
fn best(l: &Launch, threads: usize, budget_ms: f64) -> f64 {
    let (turn, next, done, stop) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let work = |id: usize, set: usize| {
        let run = |first: u64, last: u64| {
            // SAFETY: the buffers are as large as the kernel's types say, and the scratch as it asked for.
            unsafe { (l.f)(l.buffers[set].as_ptr(), l.dims.as_ptr(), first as i64, last as i64, l.scratch[id].ptr()) };
        };
        // First most of an equal stretch, then what is left, task by task.
        let share = |i: usize| l.tasks * i as u64 / threads as u64;
        let own = (share(id + 1) - share(id)) * 3 / 4;
        run(share(id), share(id) + own);
        loop {
            let mut t = next.fetch_add(1, Ordering::Relaxed);
            let rest = |i: usize| share(i + 1) - share(i) - (share(i + 1) - share(i)) * 3 / 4;
            let Some(of) = (0..threads).find(|i| {
                let here = t < rest(*i);
                t -= if here { 0 } else { rest(*i) };
                here
            }) else {
                break;
            };
            let first = share(of + 1) - rest(of) + t;
            run(first, first + 1);
        }
    };
    let mut low = f64::MAX;
    std::thread::scope(|s| {
        for id in 1..threads {
            let (turn, done, stop, work) = (&turn, &done, &stop, &work);
            s.spawn(move || {
                let mut seen = 0;
                loop {
                    let now = turn.load(Ordering::Acquire);
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    if now != seen {
                        seen = now;
                        work(id, now as usize % l.buffers.len());
                        done.fetch_add(1, Ordering::Release);
                    }
                    std::hint::spin_loop();
                }
            });
        }
        let clock = Instant::now();
        let mut n = 0;
        while n < 20 || clock.elapsed().as_secs_f64() * 1e3 < budget_ms {
            let (start, busy) = (Instant::now(), thread_time());
            next.store(0, Ordering::Relaxed);
            done.store(0, Ordering::Relaxed);
            let now = turn.fetch_add(1, Ordering::Release) + 1;
            work(0, now as usize % l.buffers.len());
            while done.load(Ordering::Acquire) < threads as u64 - 1 {
                std::hint::spin_loop();
            }
            let wall = start.elapsed().as_secs_f64();
            low = low.min(if threads == 1 { thread_time() - busy } else { wall });
            n += 1;
        }
        stop.store(true, Ordering::Relaxed);
    });
    low
}

/// 24 independent chains of multiply-adds, or of dot products of pairs; `dims[0]` turns per task.
fn peak_text(isa: HostIsa, pairs: bool) -> String {
    let mut f = Func::host_kernel("peak");
    let lanes = isa.lanes();
    let chains = if isa == HostIsa::Avx512 { 24 } else { 12 };
    let v = vty(lanes, "f32");
    let (n, out, zero) = (f.dim(0), f.buffer(0), f.i64(0));
    let (first, last) = (f.arg("first"), f.arg("last"));
    f.loop_(&first, &last, 1, |f, task| {
        let inits: Vec<_> = (0..chains).map(|i| (f.f32(i as f32, lanes), v.clone())).collect();
        let (a, b) = (f.f32(0.5, lanes), f.f32(0.25, lanes));
        let r = f.for_(&zero, &n, 1, &inits, |f, _, acc| {
            if pairs {
                let p = f.konst("dense<0.5> : vector<32xbf16>");
                let one = |x: &_| {
                    format!(
                        "llvm.call_intrinsic \"llvm.x86.avx512bf16.dpbf16ps.512\"({x}, {p}, {p}) : \
                         (vector<16xf32>, vector<32xbf16>, vector<32xbf16>) -> vector<16xf32>"
                    )
                };
                return acc.iter().map(|x| f.op(one(x))).collect();
            }
            acc.iter().map(|x| f.op(format!("math.fma {x}, {a}, {b} : {v}"))).collect()
        });
        let mut s = r[0].clone();
        for x in &r[1..] {
            s = f.op(format!("arith.addf {s}, {x} : {v}"));
        }
        let at = f.mulc(task, lanes as i64);
        f.store_at(&s, &out, &at, "f32", lanes);
    });
    f.text()
}

/// Sums `dims[0]` elements per task.
fn read_text() -> String {
    let mut f = Func::host_kernel("read");
    let v = vty(16, "f32");
    let (n, x, out, zero) = (f.dim(0), f.buffer(0), f.buffer(1), f.i64(0));
    let (first, last) = (f.arg("first"), f.arg("last"));
    f.loop_(&first, &last, 1, |f, task| {
        let base = f.mul(task, &n);
        let base = f.gep(&x, &base, "f32");
        let z = f.f32(0.0, 16);
        let r = f.for_(&zero, &n, 128, &vec![(z, v.clone()); 8], |f, i, acc| {
            let p = f.gep(&base, i, "f32");
            (0..8)
                .map(|u| {
                    let d = f.i64(16 * u);
                    let t = f.load_at(&p, &d, "f32", 16);
                    f.op(format!("arith.addf {}, {t} : {v}", acc[u as usize]))
                })
                .collect()
        });
        let mut s = r[0].clone();
        for t in &r[1..] {
            s = f.op(format!("arith.addf {s}, {t} : {v}"));
        }
        let at = f.mulc(task, 16);
        f.store_at(&s, &out, &at, "f32", 16);
    });
    f.text()
}

/// What follows the product.
#[derive(Clone, Copy, PartialEq)]
enum Tail {
    Plain,
    /// The weight stays in codes of 4 bits, with minima.
    Codes4,
    /// The weight stays in codes of 8 bits.
    Codes8,
    /// Bias and residual.
    Add,
    /// Rank-16 branch.
    Lora,
    /// silu(x·Wg) * (x·Wu), two packed weights.
    Siblings,
    /// The same with rank-16 branches in both.
    LoraSiblings,
    /// The same as slices of one packed weight.
    Slices,
    /// The right operand row-major `[K, N]`.
    Rows,
    /// The right operand row-major `[N, K]`.
    RowsT,
    /// Two of those, summed: `x1 W1 + x2 W2`, right operands `[K, N]`.
    TwoRows,
    /// `grad += aᵀ b` over `T` tokens, `[K, N]`; `K` is the rows of the result.
    Grad,
}

fn contraction(n: u64, k: u64, isa: HostIsa, tail: Tail, dtype: DType) -> Kernel {
    let t = Dim::Symbol(Sym::T);
    let (mut body, mut operands) = (Entry::new("k"), vec![]);
    let mut push = |op: Op, x: &[ValueId]| body.push(&[], op, x).unwrap();
    let mut input = |push: &mut dyn FnMut(Op, &[ValueId]) -> ValueId, shape: &[Dim], layout: Layout| {
        operands.push(layout);
        push(Op::Input { name: format!("a{}", operands.len() - 1), dtype, shape: shape.to_vec() }, &[])
    };
    let wide = if tail == Tail::Slices { 2 * n } else { n };
    let nr = choose_panel(n, &[], isa);
    let packed = match tail {
        Tail::Codes4 => Layout::CodedPanels { nr, format: BlockFormat::Q4_1 },
        Tail::Codes8 => Layout::CodedPanels { nr, format: BlockFormat::Q8_0 },
        _ => Layout::Panels { nr, transposed: true },
    };
    let x = input(&mut push, &[t, Dim::Known(k)], Layout::RowMajor);
    let mm = Op::MatMul { ta: false, tb: true };
    let product = |push: &mut dyn FnMut(Op, &[ValueId]) -> ValueId,
                   input: &mut dyn FnMut(&mut dyn FnMut(Op, &[ValueId]) -> ValueId, &[Dim], Layout) -> ValueId,
                   lora: bool| {
        if tail == Tail::Rows {
            let w = input(push, &[Dim::Known(k), Dim::Known(n)], Layout::RowMajor);
            return push(Op::MatMul { ta: false, tb: false }, &[x, w]);
        }
        if tail == Tail::RowsT {
            let w = input(push, &[Dim::Known(n), Dim::Known(k)], Layout::RowMajor);
            return push(mm.clone(), &[x, w]);
        }
        let w = input(push, &[Dim::Known(wide), Dim::Known(k)], packed);
        let y = push(mm.clone(), &[x, w]);
        if !lora {
            return y;
        }
        let h = input(push, &[t, Dim::Known(16)], Layout::RowMajor);
        let b = input(push, &[Dim::Known(wide), Dim::Known(16)], packed);
        let z = push(mm.clone(), &[h, b]);
        push(Op::Add, &[y, z])
    };
    let silu = |push: &mut dyn FnMut(Op, &[ValueId]) -> ValueId, g, u| {
        let s = push(Op::Unary(UnaryOp::Sigmoid), &[g]);
        let s = push(Op::Binary(BinaryOp::Mul), &[g, s]);
        push(Op::Binary(BinaryOp::Mul), &[s, u])
    };
    let y = match tail {
        Tail::TwoRows => {
            let w = input(&mut push, &[Dim::Known(k), Dim::Known(n)], Layout::RowMajor);
            let p = push(Op::MatMul { ta: false, tb: false }, &[x, w]);
            let x = input(&mut push, &[t, Dim::Known(k)], Layout::RowMajor);
            let w = input(&mut push, &[Dim::Known(k), Dim::Known(n)], Layout::RowMajor);
            let q = push(Op::MatMul { ta: false, tb: false }, &[x, w]);
            push(Op::Add, &[p, q])
        }
        Tail::Grad => {
            let dy = input(&mut push, &[t, Dim::Known(n)], Layout::RowMajor);
            let old = push(
                Op::Input { name: "a2".into(), dtype: DType::F32, shape: vec![Dim::Known(k), Dim::Known(n)] },
                &[],
            );
            let g = push(Op::MatMul { ta: true, tb: false }, &[x, dy]);
            push(Op::Add, &[old, g])
        }
        Tail::Plain | Tail::Codes4 | Tail::Codes8 | Tail::Rows | Tail::RowsT => product(&mut push, &mut input, false),
        Tail::Lora => product(&mut push, &mut input, true),
        Tail::Add => {
            let y = product(&mut push, &mut input, false);
            let b = input(&mut push, &[Dim::Known(n)], Layout::RowMajor);
            let b = push(Op::Broadcast { shape: vec![t, Dim::Known(n)], axes: vec![1] }, &[b]);
            let r = input(&mut push, &[t, Dim::Known(n)], Layout::RowMajor);
            push(Op::Add, &[y, b, r])
        }
        Tail::Siblings | Tail::LoraSiblings => {
            let g = product(&mut push, &mut input, tail == Tail::LoraSiblings);
            let u = product(&mut push, &mut input, tail == Tail::LoraSiblings);
            silu(&mut push, g, u)
        }
        Tail::Slices => {
            let z = product(&mut push, &mut input, false);
            let g = push(Op::Slice { axis: 1, start: 0, end: n }, &[z]);
            let u = push(Op::Slice { axis: 1, start: n, end: 2 * n }, &[z]);
            silu(&mut push, g, u)
        }
    };
    let y = if dtype == DType::BF16 && tail != Tail::Grad { push(Op::Cast(dtype), &[y]) } else { y };
    if tail == Tail::Grad {
        operands.push(Layout::RowMajor);
    }
    body.output("r0", y);
    Kernel {
        name: "k".into(),
        class: Class::Contraction,
        body,
        operands,
        results: vec![Layout::RowMajor],
        aliases: vec![(tail == Tail::Grad).then_some(2)],
    }
}

fn main() {
    let mut args = std::env::args().skip(1);
    let threads: usize = args.next().and_then(|s| s.parse().ok()).unwrap_or(2);
    let target =
        HostTarget::from_name(&args.next().unwrap_or("native".into())).expect("a target: avx512, avx2, native");
    let filter = args.next().unwrap_or_default();
    let budget = 120.0;
    const COLD_BYTES: u64 = 128 << 20;
    let dtype = if args.next().as_deref() == Some("bf16") { DType::BF16 } else { DType::F32 };
    let cold = args.next().as_deref() == Some("cold");
    let pairs = dtype == DType::BF16 && target.bf16;
    let (_peak_lib, peak, _) = load(&peak_text(target.isa, pairs), "peak", &target);
    let (_read_lib, read, _) = load(&read_text(), "read", &target);
    let scratch: Vec<Memory> = (0..threads).map(|_| Memory::new(8 << 20, 0.0)).collect();
    let sink = Memory::new(1 << 16, 0.0);
    let peak_rate = || {
        let turns = 20_000i64;
        let l =
            Launch { f: peak, buffers: &[vec![sink.ptr()]], dims: &[turns], tasks: threads as u64, scratch: &scratch };
        let chains = if target.isa == HostIsa::Avx512 { 24 } else { 12 };
        let flop = (chains * target.isa.lanes() * if pairs { 4 } else { 2 }) as f64 * turns as f64 * threads as f64;
        flop / best(&l, threads, 60.0) / 1e9
    };
    let read_rate = |bytes: u64| {
        let tasks = (bytes / (128 << 10)).clamp(threads as u64, 1024);
        let n = bytes / 4 / tasks / 128 * 128;
        let x = Memory::new((n * tasks) as usize, 1.0);
        let l = Launch { f: read, buffers: &[vec![x.ptr(), sink.ptr()]], dims: &[n as i64], tasks, scratch: &scratch };
        (n * tasks * 4) as f64 / best(&l, threads, 150.0) / 1e9
    };
    println!("{threads} threads, {:?}; peak {:.0} GFLOP/s", target.isa, peak_rate());
    let shapes: &[(u64, u64, Tail, &str)] = &[
        (576, 576, Tail::Plain, "o"),
        (192, 576, Tail::Plain, "kv"),
        (1536, 576, Tail::Plain, "gate"),
        (1536, 576, Tail::Siblings, "gate+up"),
        (1536, 576, Tail::Slices, "gate+up slices"),
        (1536, 576, Tail::LoraSiblings, "gate+up lora"),
        (576, 1536, Tail::Plain, "down"),
        (576, 1536, Tail::Add, "down bias+res"),
        (576, 576, Tail::Add, "o bias+res"),
        (576, 576, Tail::Lora, "o lora"),
        (576, 576, Tail::Rows, "dx o rows"),
        (576, 192, Tail::Rows, "dx kv rows"),
        (576, 1536, Tail::TwoRows, "dx gate+up rows"),
        (1536, 576, Tail::Rows, "dx down rows"),
        (576, 49152, Tail::Rows, "dx head rows"),
        (576, 576, Tail::RowsT, "o rows t"),
        (192, 576, Tail::RowsT, "kv rows t"),
        (1536, 576, Tail::RowsT, "gate rows t"),
        (576, 1536, Tail::RowsT, "down rows t"),
        (49152, 576, Tail::RowsT, "head rows t"),
        (16, 576, Tail::RowsT, "lora a rows t"),
        (576, 16, Tail::RowsT, "lora b rows t"),
        (16, 576, Tail::Rows, "dh rows"),
        (576, 16, Tail::Rows, "dx lora rows"),
        (576, 16, Tail::Grad, "dA grad"),
        (1536, 16, Tail::Grad, "dA wide grad"),
        (16, 576, Tail::Grad, "dB grad"),
        (16, 1536, Tail::Grad, "dB wide grad"),
        (576, 576, Tail::Grad, "dW grad"),
        (576, 1536, Tail::Grad, "dW down grad"),
        (16, 576, Tail::Plain, "lora a"),
        (576, 16, Tail::Plain, "lora b"),
        (384, 384, Tail::Plain, "bert"),
        (4096, 4096, Tail::Plain, "4096"),
        (49152, 576, Tail::Plain, "head"),
        (960, 576, Tail::Codes4, "qkv codes"),
        (3072, 576, Tail::Codes4, "gate+up codes"),
        (576, 1536, Tail::Codes4, "down codes"),
        (576, 576, Tail::Codes4, "o codes"),
        (49152, 576, Tail::Codes8, "head codes"),
    ];
    for &(n, k, tail, name) in shapes.iter().filter(|s| s.3.contains(&filter)) {
        let kernel = contraction(n, k, target.isa, tail, dtype);
        let e = emit(&kernel, &[Sym::T], &target).unwrap_or_else(|e| panic!("{e}"));
        let (_lib, f, ms) = load(&e.text, "k", &target);
        let sizes = if tail == Tail::Grad { vec![512, 2048] } else { vec![512u64, 1, 4, 16, 128] };
        for m in sizes {
            if n * k > 1 << 24 && m == 512 && !matches!(tail, Tail::Plain | Tail::Codes8) {
                continue;
            }
            let env = |_: Sym| Some(m);
            let mut sets: Vec<Vec<Memory>> = vec![];
            let mut size = 0;
            while sets.is_empty() || (cold && size < COLD_BYTES) {
                let mut memory = vec![];
                for (ty, l) in kernel.operand_types().iter().zip(&kernel.operands) {
                    memory.push(l.bytes(ty, &env).unwrap());
                }
                memory.push(if tail == Tail::Grad { k } else { m } * n * 4);
                size += memory.iter().sum::<u64>();
                sets.push(memory.iter().map(|n| Memory::new(n.div_ceil(4) as usize, 0.01)).collect());
            }
            let mut buffers: Vec<Vec<*mut u8>> = sets.iter().map(|s| s.iter().map(Memory::ptr).collect()).collect();
            if tail == Tail::Grad {
                buffers.iter_mut().for_each(|b| b[3] = b[2]);
            }
            let tasks = e.tasks.eval(&[m]).unwrap();
            let l = Launch { f, buffers: &buffers, dims: &[m as i64], tasks, scratch: &scratch };
            let s = best(&l, threads, budget);
            let flop = e.flops.eval(&[m]).unwrap() as f64;
            let bytes = e.bytes.eval(&[m]).unwrap();
            let head = format!("{name:>16} M={m:<4} N={n:<6} K={k:<5} tasks {tasks:<5} {:>9.1} us", s * 1e6);
            if m <= 4 {
                let (rate, limit) = (bytes as f64 / s / 1e9, read_rate(bytes));
                println!("{head} {rate:>7.1} GB/s    {:>5.1} % of a read at {limit:.0}", 100.0 * rate / limit);
            } else {
                let (rate, limit) = (flop / s / 1e9, peak_rate());
                println!(
                    "{head} {rate:>7.1} GFLOP/s {:>5.1} % of {limit:.0}   (compiled in {ms:.0} ms)",
                    100.0 * rate / limit
                );
            }
        }
    }
}
