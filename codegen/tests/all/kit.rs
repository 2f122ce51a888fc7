//! Compiling a text, loading it and calling it.

use pleach_codegen::emit::Emitted;
use pleach_codegen::{CodegenError, HostTarget, link, mlir};
use pleach_ir::interp::Tensor;
use pleach_ir::{Kernel, Layout, Sym, TensorType};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

/// The host ABI of kernels.
pub(crate) type KernelFn = unsafe extern "C" fn(*const *mut u8, *const i64, i64, i64, *mut u8);

/// A loaded shared object.
pub(crate) struct Loaded {
    lib: libloading::Library,
}

impl Loaded {
    /// Compiles, links and loads a text.
    pub(crate) fn new(text: &str, target: &HostTarget) -> Loaded {
        let object = mlir::compile_object(text, target).unwrap_or_else(|e| panic!("{e}\n{text}"));
        Loaded::from_objects(&[object])
    }

    /// Links and loads objects.
    pub(crate) fn from_objects(objects: &[Vec<u8>]) -> Loaded {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let so = link::link(objects).unwrap();
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("pleach-test-{}-{n}.so", std::process::id()));
        std::fs::write(&path, so).unwrap();
        // SAFETY: the object was just made by this compiler and has no initialisers.
        let lib = unsafe { libloading::Library::new(&path).unwrap() };
        std::fs::remove_file(&path).unwrap();
        Loaded { lib }
    }

    /// The kernel of that name.
    pub(crate) fn kernel(&self, name: &str) -> KernelFn {
        // SAFETY: every kernel symbol has this signature.
        *unsafe { self.lib.get::<KernelFn>(name.as_bytes()).unwrap() }
    }

    /// Runs tasks `first..last` of a kernel. Buffers are operands, then results.
    pub(crate) fn run(&self, name: &str, buffers: &[*mut u8], dims: &[i64], tasks: (u64, u64), scratch_bytes: u64) {
        let mut scratch = vec![0u64; scratch_bytes as usize / 8 + 16];
        let at = scratch.as_mut_ptr() as usize;
        let aligned = at.next_multiple_of(64);
        let f = self.kernel(name);
        // SAFETY: the caller's buffers are as large as the kernel's types say, and the scratch as it asked for.
        unsafe { f(buffers.as_ptr(), dims.as_ptr(), tasks.0 as i64, tasks.1 as i64, aligned as *mut u8) }
    }
}

/// Targets that this machine can run.
pub(crate) fn targets() -> Vec<HostTarget> {
    match HostTarget::detect() {
        Some(t) => t.and_below(),
        None => {
            eprintln!("skipped: this machine has no AVX2");
            vec![]
        }
    }
}

/// The assembler: `PLEACH_PTXAS`, one in `PATH`, or that of the Python package in `.venv`.
pub(crate) fn ptxas() -> Option<PathBuf> {
    let list = |p: PathBuf| -> Vec<PathBuf> {
        let mut v: Vec<PathBuf> = std::fs::read_dir(p).into_iter().flatten().flatten().map(|d| d.path()).collect();
        v.sort();
        v
    };
    pleach_codegen::ptxas::find().or_else(|| {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../.venv/lib");
        let nvidia = list(root).into_iter().flat_map(|p| list(p.join("site-packages/nvidia")));
        nvidia.map(|p| p.join("bin/ptxas")).find(|p| p.exists())
    })
}

/// The emitter of a class of kernels.
pub(crate) type Emitter = fn(&Kernel, &[Sym], &HostTarget) -> Result<Emitted, CodegenError>;

/// A tensor in a layout, as bytes.
pub(crate) fn laid_out(t: &Tensor, layout: &Layout) -> Vec<u8> {
    let Layout::Panels { nr, transposed } = layout else { return t.to_bytes() };
    let (r, c) = (t.shape[0] as usize, t.shape[1] as usize);
    let (k, n) = if *transposed { (c, r) } else { (r, c) };
    let (nr, size) = (*nr as usize, t.dtype().size() as usize);
    // 16-bit elements lie in pairs along k.
    let pair = if size == 2 { 2 } else { 1 };
    let bytes = t.to_bytes();
    let mut out = vec![];
    for p in 0..n.div_ceil(nr) {
        for q in 0..k.div_ceil(pair) {
            for j in p * nr..(p + 1) * nr {
                for i in q * pair..(q + 1) * pair {
                    let at = size * if *transposed { j * k + i } else { i * n + j };
                    match j < n && i < k {
                        true => out.extend(&bytes[at..at + size]),
                        false => out.extend(&[0u8; 4][..size]),
                    }
                }
            }
        }
    }
    out
}

/// What a kernel gives: its results for one split of the tasks.
pub(crate) fn run_host(
    lib: &Loaded,
    k: &Kernel,
    e: &Emitted,
    operands: &[Tensor],
    symbols: &[(Sym, u64)],
    tasks_per_call: u64,
) -> Vec<Tensor> {
    let env = |s: Sym| symbols.iter().find(|x| x.0 == s).map(|x| x.1);
    let memory = operands.iter().zip(&k.operands).map(|(t, l)| laid_out(t, l)).collect();
    let results = run_bytes(lib, k, e, memory, symbols, tasks_per_call);
    let typed = |(ty, bytes): (&TensorType, &Vec<u8>)| {
        let shape: Vec<u64> = ty.shape.iter().map(|d| d.eval(&env).unwrap()).collect();
        Tensor::from_bytes(ty.dtype, shape, &bytes[..ty.bytes(&env).unwrap() as usize]).unwrap()
    };
    k.result_types().iter().zip(&results).map(typed).collect()
}

/// The same with operands and results as they lie in memory.
pub(crate) fn run_bytes(
    lib: &Loaded,
    k: &Kernel,
    e: &Emitted,
    mut memory: Vec<Vec<u8>>,
    symbols: &[(Sym, u64)],
    tasks_per_call: u64,
) -> Vec<Vec<u8>> {
    let env = |s: Sym| symbols.iter().find(|x| x.0 == s).map(|x| x.1);
    let values: Vec<u64> = symbols.iter().map(|s| s.1).collect();
    // A guard after every buffer shows writes past the end.
    const GUARD: usize = 256;
    let operands = memory.len();
    let mut place: Vec<usize> = (0..operands).collect();
    for ((ty, layout), alias) in k.result_types().iter().zip(&k.results).zip(&k.aliases) {
        match alias {
            Some(a) => place.push(*a as usize),
            None => {
                place.push(memory.len());
                memory.push(vec![0xcd; layout.bytes(ty, &env).unwrap() as usize]);
            }
        }
    }
    let sizes: Vec<usize> = memory.iter().map(Vec::len).collect();
    memory.iter_mut().for_each(|m| m.resize(m.len() + GUARD, 0xee));
    let pointers: Vec<*mut u8> = memory.iter_mut().map(|m| m.as_mut_ptr()).collect();
    let buffers: Vec<*mut u8> = place.iter().map(|i| pointers[*i]).collect();
    let dims: Vec<i64> = values.iter().map(|v| *v as i64).collect();
    let (tasks, scratch) = (e.tasks.eval(&values).unwrap(), e.scratch_bytes.eval(&values).unwrap());
    let mut t = 0;
    while t < tasks {
        lib.run(&k.name, &buffers, &dims, (t, tasks.min(t + tasks_per_call)), scratch);
        t += tasks_per_call;
    }
    for (m, n) in memory.iter().zip(&sizes) {
        assert!(m[*n..].iter().all(|b| *b == 0xee), "{} writes past a buffer", k.name);
    }
    place[operands..].iter().map(|i| memory[*i][..sizes[*i]].to_vec()).collect()
}

/// Operands, and the symbols' values.
pub(crate) type Case = (Vec<Tensor>, Vec<(Sym, u64)>);

/// Compiles a kernel for every target at hand, runs it whole and task by task, and compares with the interpreter.
pub(crate) fn check(emit: Emitter, k: &Kernel, operands: &[Tensor], symbols: &[(Sym, u64)], tolerance: f64) {
    check_cases(emit, k, &[(operands.to_vec(), symbols.to_vec())], tolerance);
}

/// As [`check`], compiling once for several cases of the same symbols.
pub(crate) fn check_cases(emit: Emitter, k: &Kernel, cases: &[Case], tolerance: f64) {
    let Some((_, symbols)) = cases.first() else { return };
    let names: Vec<Sym> = symbols.iter().map(|s| s.0).collect();
    let wants: Vec<Vec<Tensor>> = cases.iter().map(|c| pleach_ir::interp::run_kernel(k, &c.0).unwrap()).collect();
    for target in targets() {
        let e = emit(k, &names, &target).unwrap_or_else(|e| panic!("{e}"));
        let lib = Loaded::new(&e.text, &target);
        for ((operands, symbols), want) in cases.iter().zip(&wants) {
            let whole = run_host(&lib, k, &e, operands, symbols, u64::MAX >> 1);
            let single = run_host(&lib, k, &e, operands, symbols, 1);
            let at = format!("{} ({:?}, bf16 {}, {symbols:?})", k.name, target.isa, target.bf16);
            for (i, ((a, b), w)) in whole.iter().zip(&single).zip(want).enumerate() {
                assert_eq!(a, b, "{at}: result {i} depends on the split of tasks");
                assert_eq!(a.shape, w.shape);
                let err = a.relative_error(w);
                assert!(err <= tolerance, "{at}: result {i} is off by {err:e}");
            }
        }
    }
}

/// Reproducible values in -1 … 1.
pub(crate) fn noise(shape: &[u64], seed: u64) -> Tensor {
    let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let n = shape.iter().product::<u64>();
    let v = (0..n)
        .map(|_| {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            (s >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect();
    Tensor::f32(shape, v)
}
