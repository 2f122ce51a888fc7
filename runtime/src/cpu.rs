//! The host as a device: a thread pool and the plan's shared object, which is loaded from memory.
#![allow(unsafe_code)]

use crate::device::{Address, Device, Make, Work};
use crate::error::{Result, RuntimeError};
use crate::fetch::Window;
use crate::pool::{KernelFn, Launch, Pool};
use crate::region::Region;
use libloading::Library;
use pleach_plan::{ALIGN, BlobKind, Plan, Target};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// The host: a thread pool and the plan's shared object.
#[derive(Debug)]
pub struct Cpu {
    pool: Pool,
    kernels: Vec<KernelFn>,
    regions: Vec<Region>,
    scratch: Address,
    stride: usize,
    /// Reused from launch to launch.
    wave: Vec<Launch>,
    windows: Vec<Window>,
    // After the kernels that point into them; a library before the descriptor it was loaded from.
    _code: Vec<(Library, OwnedFd)>,
}

// SAFETY: the addresses are of regions this value owns; nothing in it belongs to a thread.
unsafe impl Send for Cpu {}

impl Cpu {
    /// Loads the code of a plan and starts the workers; `env` are the values of the symbols at capacity, for scratch.
    ///
    /// # Errors
    /// [`RuntimeError::Target`] when this processor lacks a feature, [`RuntimeError::Code`], and errors of memory.
    pub fn new(plan: &Plan, env: &[u64], threads: usize) -> Result<Cpu> {
        check_target(&plan.target)?;
        let mut code = vec![];
        let mut library = vec![None; plan.blobs.len()];
        for (i, b) in plan.blobs.iter().enumerate() {
            if b.kind == BlobKind::HostObject {
                library[i] = Some(code.len());
                code.push(load(&b.bytes, &b.name)?);
            }
        }
        let mut kernels = Vec::with_capacity(plan.kernels.len());
        let mut stride = 0u64;
        for k in &plan.kernels {
            let lib = library.get(k.blob as usize).copied().flatten();
            let (lib, _) = lib
                .and_then(|l| code.get(l))
                .ok_or_else(|| RuntimeError::Target(format!("kernel {} is not compiled for a CPU", k.symbol)))?;
            // SAFETY: the plan promises that the symbol is a function of this type; its code is trusted.
            let f = unsafe { lib.get::<KernelFn>(k.symbol.as_bytes()) }
                .map_err(|e| RuntimeError::Code(format!("kernel {}: {e}", k.symbol)))?;
            kernels.push(*f);
            stride = stride.max(k.scratch_bytes.eval(env)?);
        }
        let pool = Pool::new(threads)?;
        // Own cache lines and, past a page, own sets: two workers never meet in one.
        let stride = stride.next_multiple_of(128) + if stride > 0 { 128 } else { 0 };
        let region = Region::new(stride.saturating_mul(pool.threads() as u64), "the workers' scratch")?;
        let scratch = region.at(0, 0)?;
        Ok(Cpu {
            pool,
            kernels,
            regions: vec![region],
            scratch,
            stride: stride as usize,
            wave: vec![],
            windows: vec![],
            _code: code,
        })
    }
}

impl Device for Cpu {
    fn allocate(&mut self, bytes: u64, what: &str, _zeroed: bool) -> Result<Address> {
        // Fresh pages are zeros.
        let r = Region::new(bytes, what)?;
        let p = r.at(0, bytes)?;
        debug_assert_eq!(p as u64 % ALIGN, 0);
        self.regions.push(r);
        Ok(p)
    }

    fn lend(&mut self, bytes: u64, what: &str) -> Result<Address> {
        self.allocate(bytes.max(1), what, false)
    }

    unsafe fn give_back(&mut self, at: Address) -> Result<()> {
        self.regions.retain(|r| r.at(0, 0).ok() != Some(at));
        Ok(())
    }

    fn shares_memory(&self) -> bool {
        true
    }

    unsafe fn fill(&mut self, to: Address, bytes: u64, make: Make<'_>) -> Result<()> {
        if bytes > 0 {
            // SAFETY: the caller promises room, and nobody else uses it meanwhile.
            make(0, unsafe { std::slice::from_raw_parts_mut(to, bytes as usize) });
        }
        Ok(())
    }

    unsafe fn read(&self, from: Address, to: &mut [u8]) -> Result<()> {
        // SAFETY: the caller promises the bytes; a slice of the caller's cannot overlap memory of the device.
        unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    unsafe fn zero(&mut self, at: Address, bytes: u64) -> Result<()> {
        // SAFETY: the caller promises room.
        unsafe { std::ptr::write_bytes(at, 0, bytes as usize) };
        Ok(())
    }

    unsafe fn launch(&mut self, wave: &[Work<'_>], dims: &[i64]) -> Result<()> {
        self.wave.clear();
        self.wave.extend(wave.iter().map(|w| Launch {
            kernel: self.kernels[w.kernel as usize],
            buffers: w.buffers.as_ptr(),
            dims: dims.as_ptr(),
            tasks: w.tasks,
            scratch: self.scratch,
            scratch_stride: self.stride,
        }));
        // SAFETY: the caller promises buffers and dims; scratch has a stride for every worker.
        unsafe { self.pool.run(&self.wave, &self.windows) };
        self.windows.clear();
        Ok(())
    }

    fn announce(&mut self, windows: &[Window]) {
        self.windows.clear();
        self.windows.extend_from_slice(windows);
    }

    fn begin(&mut self) {
        self.pool.wake();
    }

    fn threads(&self) -> usize {
        self.pool.threads()
    }

    fn name(&self) -> String {
        format!("{} with {} threads", std::env::consts::ARCH, self.threads())
    }
}

/// Loads a shared object from memory. The descriptor stays open as long as the library: its number is part of the name
/// under which the loader knows the library, and that name must not be used for another one meanwhile.
fn load(bytes: &[u8], name: &str) -> Result<(Library, OwnedFd)> {
    let bad = |why: String| RuntimeError::Code(format!("{name}: {why}"));
    if !bytes.starts_with(b"\x7fELF") {
        return Err(bad("is no shared object of this system".into()));
    }
    // SAFETY: the name is a valid C string; the result is checked.
    let fd = unsafe { libc::memfd_create(c"pleach".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(bad(std::io::Error::last_os_error().to_string()));
    }
    // SAFETY: the descriptor is open and belongs to nobody else.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut file = std::fs::File::from(fd);
    std::io::Write::write_all(&mut file, bytes).map_err(|e| bad(e.to_string()))?;
    let fd = OwnedFd::from(file);
    // SAFETY: the code is the plan's, which is trusted like an executable.
    let lib = unsafe { Library::new(format!("/proc/self/fd/{}", fd.as_raw_fd())) }.map_err(|e| bad(e.to_string()))?;
    Ok((lib, fd))
}

/// Refuses a plan for another machine, naming what is missing.
///
/// # Errors
/// [`RuntimeError::Target`].
pub fn check_target(target: &Target) -> Result<()> {
    if target.arch != std::env::consts::ARCH {
        return Err(RuntimeError::Target(format!(
            "it is compiled for {}, this is {}; compile it for this machine",
            target.arch,
            std::env::consts::ARCH
        )));
    }
    let missing: Vec<&str> = target.features.iter().map(String::as_str).filter(|f| !has_feature(f)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(RuntimeError::Target(format!("this processor lacks {}; compile it for this machine", missing.join(", "))))
}

#[cfg(target_arch = "x86_64")]
fn has_feature(name: &str) -> bool {
    macro_rules! any {
        ($($f:tt),*) => { match name { $($f => std::arch::is_x86_feature_detected!($f),)* _ => false } };
    }
    any!(
        "sse2",
        "sse3",
        "ssse3",
        "sse4.1",
        "sse4.2",
        "avx",
        "avx2",
        "fma",
        "f16c",
        "bmi1",
        "bmi2",
        "lzcnt",
        "movbe",
        "popcnt",
        "avx512f",
        "avx512bw",
        "avx512cd",
        "avx512dq",
        "avx512vl",
        "avx512bf16",
        "avx512vnni",
        "avx512vbmi",
        "avx512vbmi2",
        "avx512fp16",
        "avx512ifma",
        "avx512bitalg",
        "avx512vpopcntdq",
        "avxvnni",
        "gfni",
        "vaes",
        "vpclmulqdq"
    )
}

#[cfg(not(target_arch = "x86_64"))]
fn has_feature(_: &str) -> bool {
    false
}
