//! The NVIDIA driver: looked for at run time, asked about its GPUs, its answers turned into errors.
//!
//! The loader of the bindings panics where the library or one of its functions is missing, so both are looked for first.
//! `PLEACH_CUDA_LIBRARY` names a driver library that is not where the system looks.

use crate::error::{Result, RuntimeError};
use cudarc::driver::sys::{self, CUcontext, CUdevice, CUdevice_attribute, CUresult};
use libloading::Library;
use std::ffi::{OsString, c_void};
use std::sync::OnceLock;

/// Every function of the driver that is called.
const NEEDED: [&str; 42] = [
    "cuInit",
    "cuDriverGetVersion",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetName",
    "cuDeviceGetAttribute",
    "cuDeviceTotalMem_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxSetCurrent",
    "cuMemGetInfo_v2",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemHostAlloc",
    "cuMemFreeHost",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemsetD8Async",
    "cuStreamCreate",
    "cuStreamSynchronize",
    "cuStreamDestroy_v2",
    "cuStreamBeginCapture_v2",
    "cuStreamEndCapture",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuEventElapsedTime",
    "cuEventDestroy_v2",
    "cuModuleLoadDataEx",
    "cuModuleUnload",
    "cuModuleGetFunction",
    "cuFuncSetAttribute",
    "cuLaunchKernel",
    "cuTensorMapEncodeTiled",
    "cuGraphCreate",
    "cuGraphAddKernelNode_v2",
    "cuGraphAddChildGraphNode",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuGraphExecKernelNodeSetParams_v2",
    "cuGraphExecDestroy",
    "cuGraphDestroy",
];

/// The variable that names the driver library.
pub const LIBRARY: &str = "PLEACH_CUDA_LIBRARY";

/// A GPU as the driver describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// Number, as the driver counts.
    pub number: i32,
    /// Name.
    pub name: String,
    /// Compute capability: 9.0 is `(9, 0)`.
    pub capability: (i32, i32),
    /// Bytes of memory.
    pub total: u64,
    /// Bytes that are free now; unknown without a context.
    pub free: Option<u64>,
    /// Multiprocessors.
    pub processors: i32,
    /// Dynamic shared memory that a block may ask for, bytes.
    pub shared: i32,
}

impl Gpu {
    /// The best target of the compiler whose code this GPU runs.
    pub fn target(&self) -> Option<&'static str> {
        match self.capability {
            (9, 0) => Some("sm_90a"),
            (major, _) if major >= 8 => Some("sm_80"),
            _ => None,
        }
    }

    /// Refuses code for another GPU. `sm_80` runs on everything later; `sm_90a`, as every target with a letter, on its own chip only.
    ///
    /// # Errors
    /// [`RuntimeError::Target`].
    pub fn check(&self, arch: &str) -> Result<()> {
        let (major, minor) = self.capability;
        let digits = arch.trim_start_matches("sm_");
        let exact = digits.ends_with('a');
        let wanted: i32 = digits.trim_end_matches('a').parse().unwrap_or(i32::MAX);
        let have = major * 10 + minor;
        if have == wanted || (have > wanted && !exact) {
            return Ok(());
        }
        let help = match self.target() {
            Some(t) => format!("compile it with --target {t}"),
            None => "no target of this compiler runs on it; 8.0 or later is needed".into(),
        };
        Err(RuntimeError::Target(format!(
            "it is compiled for {arch}, the GPU ({}) is of compute capability {major}.{minor}; {help}",
            self.name
        )))
    }
}

/// Finds and initialises the driver, once.
///
/// # Errors
/// [`RuntimeError::Target`]: there is none, or it is too old.
pub(crate) fn open() -> Result<()> {
    static DONE: OnceLock<std::result::Result<(), String>> = OnceLock::new();
    DONE.get_or_init(load).clone().map_err(RuntimeError::Target)
}

fn load() -> std::result::Result<(), String> {
    let named = std::env::var_os(LIBRARY).filter(|v| !v.is_empty());
    let own = named.as_ref().map(named_library).transpose()?;
    // SAFETY: looks for the library by name; a driver may be loaded at any time.
    if !unsafe { sys::is_culib_present() } {
        return Err(format!(
            "it is for a GPU, and there is no NVIDIA driver (libcuda.so.1 is not found); install one, name its library \
             in {LIBRARY}, or use --target cpu"
        ));
    }
    // SAFETY: it is there, so the loader does not panic.
    let lib = unsafe { sys::culib() };
    let address = |l: &Library, name: &str| {
        // SAFETY: the symbol is only looked at.
        unsafe { l.get::<*const c_void>(name.as_bytes()) }.ok().map(|s| *s)
    };
    if own.is_some_and(|own| address(own, "cuInit") != address(lib, "cuInit")) {
        return Err(format!("{LIBRARY} names one NVIDIA driver, and the system has another; unset it"));
    }
    if let Some(name) = NEEDED.iter().find(|n| address(lib, n).is_none()) {
        return Err(format!("the NVIDIA driver is too old, it lacks {name}; install one for CUDA 12.3 or later"));
    }
    // SAFETY: takes no pointer.
    match unsafe { sys::cuInit(0) } {
        CUresult::CUDA_SUCCESS => Ok(()),
        CUresult::CUDA_ERROR_NO_DEVICE => {
            Err("it is for a GPU, and the NVIDIA driver finds none (see CUDA_VISIBLE_DEVICES); use --target cpu".into())
        }
        e => Err(format!("the NVIDIA driver does not start: {e:?} ({})", e as u32)),
    }
}

/// Loads the named library for good: the loader of the bindings then finds it under its own name.
fn named_library(path: &OsString) -> std::result::Result<&'static Library, String> {
    // SAFETY: whoever sets the variable trusts the library.
    let lib = unsafe { Library::new(path) }.map_err(|e| {
        let why = std::error::Error::source(&e).map_or(String::new(), |s| format!(": {s}"));
        format!("{LIBRARY} names {}, which cannot be loaded: {e}{why}", path.display())
    })?;
    Ok(Box::leak(Box::new(lib)))
}

/// Turns an answer of the driver into an error that says what was tried.
pub(crate) fn check(r: CUresult, what: &str) -> Result<()> {
    match r {
        CUresult::CUDA_SUCCESS => Ok(()),
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => Err(RuntimeError::Capacity(format!(
            "the GPU has no memory left: {what}; give the session lower capacities, or free the GPU"
        ))),
        e => Err(RuntimeError::Device(format!("the GPU failed: {what}: {e:?} ({})", e as u32))),
    }
}

/// Version of CUDA that the driver is for: `(12, 4)`.
///
/// # Errors
/// As [`gpus`].
pub fn version() -> Result<(i32, i32)> {
    open()?;
    let mut v = 0;
    // SAFETY: the pointer is of a number that lives through the call.
    check(unsafe { sys::cuDriverGetVersion(&mut v) }, "version of the driver")?;
    Ok((v / 1000, v % 1000 / 10))
}

/// The GPUs there are, in the driver's order.
///
/// # Errors
/// [`RuntimeError::Target`] when there is no driver, [`RuntimeError::Device`] when it does not answer.
pub fn gpus() -> Result<Vec<Gpu>> {
    open()?;
    let mut n = 0;
    // SAFETY: the pointer is of a number that lives through the call.
    check(unsafe { sys::cuDeviceGetCount(&mut n) }, "number of GPUs")?;
    (0..n).map(describe).collect()
}

fn describe(number: i32) -> Result<Gpu> {
    use CUdevice_attribute as A;
    let mut device: CUdevice = 0;
    let (mut name, mut total) = ([0i8; 128], 0usize);
    // SAFETY: the pointers are of values that live through the calls, the length is that of the array.
    unsafe {
        check(sys::cuDeviceGet(&mut device, number), "a GPU")?;
        check(sys::cuDeviceGetName(name.as_mut_ptr().cast(), name.len() as i32, device), "its name")?;
        check(sys::cuDeviceTotalMem_v2(&mut total, device), "its memory")?;
    }
    let ask = |a: CUdevice_attribute| {
        let mut v = 0;
        // SAFETY: the pointer is of a number that lives through the call.
        check(unsafe { sys::cuDeviceGetAttribute(&mut v, a, device) }, "an attribute of the GPU").map(|()| v)
    };
    let name = name.iter().take_while(|c| **c != 0).map(|c| *c as u8).collect::<Vec<u8>>();
    Ok(Gpu {
        number,
        name: String::from_utf8_lossy(&name).into_owned(),
        capability: (
            ask(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            ask(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        total: total as u64,
        free: None,
        processors: ask(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared: ask(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
    })
}

/// A GPU with its primary context.
#[derive(Debug)]
pub(crate) struct Context {
    device: CUdevice,
    context: CUcontext,
}

impl Context {
    /// Takes the context of a GPU.
    pub(crate) fn new(gpu: &Gpu) -> Result<Context> {
        let mut c = Context { device: 0, context: std::ptr::null_mut() };
        // SAFETY: the pointers are of values that live through the calls.
        unsafe {
            check(sys::cuDeviceGet(&mut c.device, gpu.number), "a GPU")?;
            check(sys::cuDevicePrimaryCtxRetain(&mut c.context, c.device), "a context")?;
        }
        c.enter()?;
        Ok(c)
    }

    /// Makes it the context of this thread's calls: a session may move between threads.
    pub(crate) fn enter(&self) -> Result<()> {
        // SAFETY: the context is held as long as this value lives.
        check(unsafe { sys::cuCtxSetCurrent(self.context) }, "entering the context")
    }

    /// Free and total bytes.
    pub(crate) fn memory(&self) -> Result<(u64, u64)> {
        self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the pointers are of numbers that live through the call.
        check(unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) }, "free memory")?;
        Ok((free as u64, total as u64))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: taken once in `new`; nothing of the context is used after its owner.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

// SAFETY: a context belongs to a process, not to a thread; see `enter`.
unsafe impl Send for Context {}
// SAFETY: the driver's calls may come from any thread.
unsafe impl Sync for Context {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_runs_on_its_chip_and_portable_code_on_later_ones() {
        let gpu = |major, minor| Gpu {
            number: 0,
            name: "a GPU".into(),
            capability: (major, minor),
            total: 1,
            free: None,
            processors: 1,
            shared: 1,
        };
        let targets = [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0)].map(|(a, b)| gpu(a, b).target());
        assert_eq!(targets, [None, Some("sm_80"), Some("sm_80"), Some("sm_90a"), Some("sm_80")]);
        assert!(gpu(8, 0).check("sm_80").is_ok() && gpu(12, 0).check("sm_80").is_ok());
        assert!(gpu(9, 0).check("sm_90a").is_ok());
        for (g, arch, help) in
            [(gpu(7, 5), "sm_80", "8.0 or later"), (gpu(8, 0), "sm_90a", "sm_80"), (gpu(10, 0), "sm_90a", "sm_80")]
        {
            let e = g.check(arch).unwrap_err().to_string();
            assert!(e.contains(arch) && e.contains(help), "{e}");
        }
    }
}
