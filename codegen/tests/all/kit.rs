//! Compiling a text, loading it and calling it.

use pleach_codegen::{HostTarget, link, mlir};
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
        let so = link::link_shared(objects).unwrap();
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("pleach-test-{}-{n}.so", std::process::id()));
        std::fs::write(&path, so).unwrap();
        let lib = unsafe { libloading::Library::new(&path).unwrap() };
        std::fs::remove_file(&path).unwrap();
        Loaded { lib }
    }

    /// The kernel of that name.
    pub(crate) fn kernel(&self, name: &str) -> KernelFn {
        *unsafe { self.lib.get::<KernelFn>(name.as_bytes()).unwrap() }
    }

    /// Runs tasks `first..last` of a kernel. Buffers are operands, then results.
    pub(crate) fn run(&self, name: &str, buffers: &[*mut u8], dims: &[i64], tasks: (u64, u64), scratch_bytes: u64) {
        let mut scratch = vec![0u64; scratch_bytes as usize / 8 + 16];
        let at = scratch.as_mut_ptr() as usize;
        let aligned = (at + 63) / 64 * 64;
        let f = self.kernel(name);
        unsafe { f(buffers.as_ptr(), dims.as_ptr(), tasks.0 as i64, tasks.1 as i64, aligned as *mut u8) }
    }
}

/// Targets that this machine can run.
pub(crate) fn targets() -> Vec<HostTarget> {
    match HostTarget::detect() {
        Some(t) if t == HostTarget::avx512() => vec![t, HostTarget::avx2()],
        Some(t) => vec![t],
        None => {
            eprintln!("skipped: this machine has no AVX2");
            vec![]
        }
    }
}
