//! Code of a plan on a GPU: PTX texts become modules, launches become functions.
//!
//! The driver assembles PTX when it is loaded (and keeps what it made in a cache of its own); texts are loaded by several threads.

use super::driver::{Context, Gpu, check, version};
use crate::error::{Result, RuntimeError};
use cudarc::driver::sys::{self, CUfunction, CUfunction_attribute, CUjit_option, CUmodule, CUresult};
use pleach_plan::{BlobKind, Kernel, Launch, Plan, Product};
use std::ffi::{CString, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Bytes of a message of the driver's assembler.
const LOG: usize = 8 << 10;

/// Loaded modules, and the function of every launch.
#[derive(Debug, Default)]
pub(crate) struct Code {
    modules: Vec<CUmodule>,
    /// Per kernel of the plan, per launch of the kernel: its own, then those beside a library's products.
    functions: Vec<Vec<CUfunction>>,
}

impl Code {
    /// Loads every text of the plan. The context must be current.
    pub(crate) fn load(plan: &Plan, gpu: &Gpu, context: &Context) -> Result<Code> {
        let mut out = Code { modules: vec![std::ptr::null_mut(); plan.blobs.len()], functions: vec![] };
        let texts: Vec<usize> = (0..plan.blobs.len()).filter(|i| plan.blobs[*i].kind == BlobKind::Ptx).collect();
        for i in &texts {
            not_too_new(&plan.blobs[*i].bytes)?;
        }
        let (next, done) = (AtomicUsize::new(0), Mutex::new(vec![]));
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(texts.len());
        std::thread::scope(|s| {
            for _ in 0..threads {
                s.spawn(|| {
                    while let Some(i) = texts.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let m = context.enter().and_then(|()| module(&plan.blobs[*i].bytes, &plan.blobs[*i].name));
                        done.lock().unwrap_or_else(PoisonError::into_inner).push((*i, m.map(|m| m as usize)));
                    }
                });
            }
        });
        // The fault of the first text, whichever thread was done first.
        let mut fault: Option<(usize, RuntimeError)> = None;
        for (i, m) in done.into_inner().unwrap_or_else(PoisonError::into_inner) {
            match m {
                Ok(m) => out.modules[i] = m as CUmodule,
                Err(e) if fault.as_ref().is_none_or(|f| i < f.0) => fault = Some((i, e)),
                Err(_) => {}
            }
        }
        if let Some((_, e)) = fault {
            return Err(e);
        }
        for k in &plan.kernels {
            if k.launches.is_empty() {
                return Err(RuntimeError::Target(format!("kernel {} is not compiled for a GPU", k.symbol)));
            }
            let mut list = vec![];
            for l in k.all_launches() {
                if l.shared_bytes as i64 > i64::from(gpu.shared) {
                    return Err(RuntimeError::Target(format!(
                        "kernel {} needs {} bytes of shared memory, the GPU ({}) has {} for a block; compile it for \
                         this GPU",
                        k.symbol, l.shared_bytes, gpu.name, gpu.shared
                    )));
                }
                list.push(function(out.modules[k.blob as usize], &l.function, l.shared_bytes)?);
            }
            out.functions.push(list);
        }
        Ok(out)
    }

    /// The function of a launch, as [`Way`] counts them.
    pub(crate) fn function(&self, kernel: u32, launch: usize) -> CUfunction {
        self.functions[kernel as usize][launch]
    }
}

/// What a run of a kernel is: products by a library, then launches.
pub(crate) struct Way<'a> {
    pub(crate) products: &'a [Product],
    pub(crate) launches: &'a [Launch],
    /// Number of the first launch among all of the kernel.
    pub(crate) first: usize,
}

/// The way a kernel runs.
pub(crate) fn way(k: &Kernel, by_library: bool) -> Way<'_> {
    match k.library.as_ref().filter(|_| by_library) {
        Some(y) => Way { products: &y.products, launches: &y.launches, first: k.launches.len() },
        None => Way { products: &[], launches: &k.launches, first: 0 },
    }
}

/// A launch by its number among all of a kernel.
pub(crate) fn launch(k: &Kernel, number: usize) -> &Launch {
    let more = k.library.as_ref().map_or(&[][..], |y| &y.launches);
    k.launches.get(number).unwrap_or_else(|| &more[number - k.launches.len()])
}

impl Drop for Code {
    fn drop(&mut self) {
        for m in self.modules.iter().filter(|m| !m.is_null()) {
            // SAFETY: loaded once and not used after its owner.
            let _ = unsafe { sys::cuModuleUnload(*m) };
        }
    }
}

/// Refuses a text that is newer than the driver's assembler: PTX n.m comes with a version of CUDA.
fn not_too_new(ptx: &[u8]) -> Result<()> {
    let text = String::from_utf8_lossy(&ptx[..ptx.len().min(4096)]).into_owned();
    let Some(v) = text.lines().find_map(|l| l.trim().strip_prefix(".version ")).map(str::trim) else { return Ok(()) };
    let mut numbers = v.split('.').filter_map(|n| n.parse::<i32>().ok());
    let (Some(major), Some(minor)) = (numbers.next(), numbers.next()) else { return Ok(()) };
    // 7.0 is of CUDA 11.0, 8.0 of 12.0, 9.0 of 13.0; within one they count alike, but that 8.6 came with 12.7.
    let (needs, has) = ((major + 4, if major == 8 && minor > 5 { minor + 1 } else { minor }), version()?);
    if has < needs {
        return Err(RuntimeError::Target(format!(
            "its code is PTX {v}, the NVIDIA driver is of CUDA {}.{}; install one of CUDA {}.{} or later",
            has.0, has.1, needs.0, needs.1
        )));
    }
    Ok(())
}

fn module(ptx: &[u8], name: &str) -> Result<CUmodule> {
    let text = CString::new(ptx).map_err(|_| RuntimeError::Code(format!("{name}: holds a zero byte")))?;
    let mut log = vec![0u8; LOG];
    let mut options = [CUjit_option::CU_JIT_ERROR_LOG_BUFFER, CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    let mut values = [log.as_mut_ptr().cast::<c_void>(), std::ptr::without_provenance_mut(LOG)];
    let mut m = std::ptr::null_mut();
    // SAFETY: the text ends with a zero byte; the options name a buffer of that size, which lives through the call.
    let r =
        unsafe { sys::cuModuleLoadDataEx(&mut m, text.as_ptr().cast(), 2, options.as_mut_ptr(), values.as_mut_ptr()) };
    let said: Vec<u8> = log.into_iter().take_while(|b| *b != 0).collect();
    let said = String::from_utf8_lossy(&said).trim().to_string();
    match r {
        CUresult::CUDA_SUCCESS => Ok(m),
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => check(r, "loading code").map(|()| m),
        CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => {
            Err(RuntimeError::Target("the NVIDIA driver is too old for its code; install a newer one".into()))
        }
        e => Err(RuntimeError::Code(format!("{name}: the NVIDIA driver says {e:?} ({}) {said}", e as u32))),
    }
}

fn function(m: CUmodule, name: &str, shared: u32) -> Result<CUfunction> {
    let c = CString::new(name).map_err(|_| RuntimeError::Code(format!("{name:?} is no name")))?;
    let mut f = std::ptr::null_mut();
    // SAFETY: the module is loaded, the name ends with a zero byte.
    let r = unsafe { sys::cuModuleGetFunction(&mut f, m, c.as_ptr()) };
    match r {
        CUresult::CUDA_SUCCESS => {}
        CUresult::CUDA_ERROR_NOT_FOUND => return Err(RuntimeError::Code(format!("there is no function `{name}`"))),
        e => return Err(RuntimeError::Code(format!("function `{name}`: the NVIDIA driver says {e:?} ({})", e as u32))),
    }
    // A function may use 48 KiB without being asked for, less what it declares itself.
    if shared > 0 {
        let a = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function is of a loaded module.
        check(unsafe { sys::cuFuncSetAttribute(f, a, shared as i32) }, "shared memory of a kernel")?;
    }
    Ok(f)
}
