//! NVIDIA GPUs: a plan's PTX, memory of the device, one stream, and entries as graphs.
//!
//! The driver is opened at run time: a program with this module starts on machines without one. All work of a session is on
//! one stream, in the order it is asked for. `PLEACH_CUDA_GRAPHS=0` launches kernel by kernel instead of by graphs.
#![allow(unsafe_code)]

mod args;
mod code;
mod cublaslt;
mod driver;
mod graph;
mod stage;

pub use cublaslt::{CUBLASLT, find_cublaslt};
pub use driver::{Gpu, LIBRARY, gpus, version};

use crate::device::{Address, Device, Make, Work};
use crate::error::{Result, RuntimeError};
use crate::launch::Steps;
use crate::memory::Memory;
use args::{Args, Given, grid, table};
use code::{Code, way};
use cublaslt::{Products, WORKSPACE};
use cudarc::driver::sys::{self, CUevent, CUstream, CUstream_flags};
use driver::{Context, check};
use graph::{Graph, Graphs, Means, bucket};
use pleach_plan::{Kernel, Plan};
use stage::Stage;
use std::time::Duration;

/// A GPU with the code of one plan.
#[derive(Debug)]
pub struct Cuda {
    // Dropped in this order: what belongs to a context before the context.
    graphs: Graphs,
    library: Option<Products>,
    /// Why the plan's products by a library are not computed by it.
    missing: Option<String>,
    stage: Stage,
    code: Code,
    stream: Stream,
    context: Context,
    gpu: Gpu,
    kernels: Vec<Kernel>,
    /// Values of the symbols at capacity.
    capacity: Vec<u64>,
    scratch: u64,
    scratch_bytes: u64,
    /// Runs are timed.
    timed: bool,
    /// Counts that single launches read, and what is there.
    dims: u64,
    dims_now: Vec<i64>,
    /// The table of pointers that single launches read, and what is there.
    table: u64,
    table_now: Vec<u64>,
    args: Args,
    use_graphs: bool,
}

// SAFETY: handles of the driver belong to a context, not to a thread, and every call makes the context current first; the
// addresses of arguments are of memory that moves with the value and are made anew for every launch.
unsafe impl Send for Cuda {}

/// A stream and two events for times; memory given out, freed at the end.
#[derive(Debug, Default)]
struct Stream {
    at: usize,
    events: [usize; 2],
    memory: Vec<u64>,
}

impl Stream {
    fn raw(&self) -> CUstream {
        self.at as CUstream
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: everything was made once by this session, and nothing uses it after the session.
        unsafe {
            for m in &self.memory {
                let _ = sys::cuMemFree_v2(*m);
            }
            for e in self.events.iter().filter(|e| **e != 0) {
                let _ = sys::cuEventDestroy_v2(*e as CUevent);
            }
            if self.at != 0 {
                let _ = sys::cuStreamDestroy_v2(self.raw());
            }
        }
    }
}

/// The target whose plans this machine's GPU runs best: `sm_80` or `sm_90a`.
///
/// # Errors
/// [`RuntimeError::Target`] when there is no driver, no GPU, or none that is supported.
pub fn best_target() -> Result<&'static str> {
    let gpu = first()?;
    gpu.target().ok_or_else(|| {
        let (major, minor) = gpu.capability;
        RuntimeError::Target(format!("{} is of compute capability {major}.{minor}, 8.0 or later is needed", gpu.name))
    })
}

/// Refuses a target whose code the GPU that is used does not run.
///
/// # Errors
/// [`RuntimeError::Target`] when there is no driver, no GPU, or another than the code is for.
pub fn runs(target: &str) -> Result<()> {
    first()?.check(target)
}

/// The GPU that is used: the driver's first, which `CUDA_VISIBLE_DEVICES` chooses.
fn first() -> Result<Gpu> {
    let none = || RuntimeError::Target("the NVIDIA driver finds no GPU (see CUDA_VISIBLE_DEVICES)".into());
    gpus()?.into_iter().next().ok_or_else(none)
}

/// Free and total bytes of the GPU that is used, as the driver counts them now.
///
/// # Errors
/// As [`best_target`].
pub fn memory() -> Result<(u64, u64)> {
    Context::new(&first()?)?.memory()
}

impl Cuda {
    /// Takes the first GPU and loads the code of a plan; `env` are the values of the symbols at capacity.
    ///
    /// # Errors
    /// [`RuntimeError::Target`] when there is no driver, it is too old, or the GPU is another one than the plan's;
    /// [`RuntimeError::Code`]; errors of memory.
    pub fn new(plan: &Plan, env: &[u64]) -> Result<Cuda> {
        let gpu = first()?;
        gpu.check(&plan.target.arch)?;
        let context = Context::new(&gpu)?;
        let code = Code::load(plan, &gpu, &context)?;
        let mut stream = Stream::default();
        let mut raw = std::ptr::null_mut();
        let flags = CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the pointer is of a handle that lives through the call.
        check(unsafe { sys::cuStreamCreate(&mut raw, flags) }, "a stream")?;
        stream.at = raw as usize;
        for e in &mut stream.events {
            let mut raw = std::ptr::null_mut();
            // SAFETY: as above.
            check(unsafe { sys::cuEventCreate(&mut raw, 0) }, "an event")?;
            *e = raw as usize;
        }
        let mut scratch = 0u64;
        for k in &plan.kernels {
            scratch = scratch.max(k.scratch_bytes.eval(env)?);
        }
        let mut out = Cuda {
            graphs: Graphs::default(),
            library: None,
            missing: None,
            stage: Stage::new()?,
            code,
            stream,
            context,
            gpu,
            kernels: plan.kernels.clone(),
            capacity: env.to_vec(),
            scratch: 0,
            scratch_bytes: scratch,
            timed: false,
            dims: 0,
            dims_now: vec![],
            table: 0,
            table_now: vec![],
            args: Args::default(),
            use_graphs: std::env::var_os("PLEACH_CUDA_GRAPHS").is_none_or(|v| v != "0"),
        };
        out.scratch = out.allocate(scratch, "scratch", false)? as u64;
        out.dims = out.allocate(size_of_val(env) as u64, "counts", false)? as u64;
        let launches = plan.kernels.iter().flat_map(|k| k.all_launches());
        let pointers = launches.map(|l| table(l).len()).max().unwrap_or(0);
        out.table = out.allocate((pointers * size_of::<u64>()) as u64, "addresses", false)? as u64;
        if plan.kernels.iter().any(|k| k.library.is_some()) {
            out.open_library()?;
        }
        Ok(out)
    }

    /// Opens the library that the plan has products for; without it, its own kernels run.
    fn open_library(&mut self) -> Result<()> {
        let opened = match find_cublaslt() {
            Err(why) => Err(why),
            Ok(()) => {
                let workspace = self.allocate(WORKSPACE as u64, "cuBLASLt", false)? as u64;
                let factors = [0f32, 1.0];
                let at = self.allocate(size_of_val(&factors) as u64, "cuBLASLt", false)?;
                let bytes: Vec<u8> = factors.iter().flat_map(|x| x.to_le_bytes()).collect();
                // SAFETY: just reserved, with this size.
                unsafe { self.write(at, &bytes)? };
                Products::open(workspace, at as u64)
            }
        };
        match opened {
            Ok(p) => self.library = Some(p),
            Err(why) => self.missing = Some(format!("cuBLASLt: {why}")),
        }
        Ok(())
    }

    fn reserve(&self, bytes: u64, what: &str) -> Result<u64> {
        self.context.enter()?;
        let (mut at, bytes) = (0, bytes.max(1));
        // SAFETY: the pointer is of a number that lives through the call.
        check(unsafe { sys::cuMemAlloc_v2(&mut at, bytes as usize) }, &format!("{bytes} bytes for {what}"))?;
        Ok(at)
    }

    /// Launches the kernels of a wave one after another; the context is current.
    unsafe fn enqueue(&mut self, wave: &[Work<'_>], dims: &[i64]) -> Result<()> {
        if self.dims_now != dims {
            // SAFETY: there is room for the value of every symbol.
            unsafe { self.copy_counts(self.dims, dims)? };
            self.dims_now = dims.to_vec();
        }
        let env: Vec<u64> = dims.iter().map(|v| *v as u64).collect();
        let stream = self.stream.raw();
        for w in wave {
            let k = &self.kernels[w.kernel as usize];
            let given =
                Given { buffers: w.buffers, scratch: self.scratch, dims: self.dims, table: self.table, env: &env };
            let library = match &mut self.library {
                Some(l) => l.takes(w.kernel, k, &env)?.then_some(&*l),
                None => None,
            };
            let way = way(k, library.is_some());
            for (i, p) in way.products.iter().enumerate() {
                if let Some(l) = library.filter(|_| p.runs(&env).unwrap_or(false)) {
                    // SAFETY: promised by the caller.
                    unsafe { l.multiply(w.kernel, i, p, &given, stream)? };
                }
            }
            for (i, l) in way.launches.iter().enumerate() {
                if !l.runs(&env)? {
                    continue;
                }
                let pointers: Vec<u64> = table(l).iter().map(|b| w.buffers[*b as usize] as u64).collect();
                if !pointers.is_empty() && self.table_now != pointers {
                    // SAFETY: there is room for the longest table; launches before this one have read theirs.
                    unsafe { copy(&mut self.stage, stream, self.table, pointers.iter().map(|p| p.to_le_bytes()))? };
                    self.table_now = pointers;
                }
                self.args.set(l, &given)?;
                let [x, y, z] = grid(l, &env)?;
                let f = self.code.function(w.kernel, way.first + i);
                // SAFETY: the arguments are as many as the function has, and are read before the call returns; the caller
                // promises what they point to.
                let r = unsafe {
                    sys::cuLaunchKernel(
                        f,
                        x,
                        y,
                        z,
                        l.block,
                        1,
                        1,
                        l.shared_bytes,
                        stream,
                        self.args.pointers(),
                        std::ptr::null_mut(),
                    )
                };
                check(r, &format!("launching {}", l.function))?;
            }
        }
        Ok(())
    }

    /// Marks the start (0) or the end (1) of something that is timed.
    fn record(&self, which: usize) -> Result<()> {
        self.context.enter()?;
        let event = self.stream.events[which] as CUevent;
        // SAFETY: event and stream are of this context.
        check(unsafe { sys::cuEventRecord(event, self.stream.raw()) }, "an event")
    }

    /// The same where runs are timed.
    fn mark(&self, which: usize) -> Result<()> {
        if self.timed { self.record(which) } else { Ok(()) }
    }

    /// The time between the two marks, once the second one is reached.
    fn between(&self) -> Result<Duration> {
        self.context.enter()?;
        let [start, end] = self.stream.events.map(|e| e as CUevent);
        let mut ms = 0f32;
        // SAFETY: the events are of this context, the number lives through the call.
        unsafe {
            check(sys::cuEventSynchronize(end), "running a kernel")?;
            check(sys::cuEventElapsedTime(&mut ms, start, end), "the time of a kernel")?;
        }
        Ok(Duration::from_secs_f64(f64::from(ms.max(0.0)) / 1e3))
    }

    /// # Safety
    /// There must be room for the counts.
    unsafe fn copy_counts(&mut self, to: u64, counts: &[i64]) -> Result<()> {
        // SAFETY: promised by the caller.
        unsafe { copy(&mut self.stage, self.stream.raw(), to, counts.iter().map(|v| v.to_le_bytes())) }
    }

    /// Frees memory once everything that was asked for is done.
    fn free(&mut self, at: u64) -> Result<()> {
        self.finish()?;
        self.stream.memory.retain(|m| *m != at);
        // SAFETY: reserved once, and nothing that is asked for later uses it.
        check(unsafe { sys::cuMemFree_v2(at) }, "giving memory back")
    }
}

/// Writes words to the device, in the order of the stream.
///
/// # Safety
/// There must be room for them.
unsafe fn copy(stage: &mut Stage, stream: CUstream, to: u64, words: impl Iterator<Item = [u8; 8]>) -> Result<()> {
    let bytes: Vec<u8> = words.flatten().collect();
    let mut make = |at: u64, part: &mut [u8]| part.copy_from_slice(&bytes[at as usize..][..part.len()]);
    // SAFETY: promised by the caller.
    unsafe { stage.write(stream, to, bytes.len() as u64, &mut make) }
}

impl Device for Cuda {
    fn hold(&self, m: &Memory) -> Result<()> {
        let (free, total) = self.context.memory()?;
        if m.total() <= free.saturating_add(m.scratch) {
            return Ok(());
        }
        let parts = [
            ("weights", m.weights),
            ("adapter", m.adapter),
            ("optimizer", m.optimizer),
            ("gradients", m.gradients),
            ("caches", m.state),
            ("activations", m.arena),
            ("scratch", m.scratch),
            ("inputs", m.inputs),
        ];
        let parts: Vec<String> = parts.iter().filter(|p| p.1 > 0).map(|(n, b)| format!("{n} {b}")).collect();
        Err(RuntimeError::Capacity(format!(
            "the session takes {} bytes ({}), the GPU ({}) has {free} bytes free of {total}; lower the capacities (fewer tokens, \
             a smaller batch, shorter rows), or free the GPU",
            m.total(),
            parts.join(", "),
            self.gpu.name
        )))
    }

    fn allocate(&mut self, bytes: u64, what: &str, zeroed: bool) -> Result<Address> {
        let at = self.reserve(bytes, what)?;
        self.stream.memory.push(at);
        if zeroed {
            // SAFETY: just reserved, with this size.
            unsafe { self.zero(at as Address, bytes)? };
        }
        Ok(at as Address)
    }

    fn lend(&mut self, bytes: u64, what: &str) -> Result<Address> {
        self.allocate(bytes, what, false)
    }

    unsafe fn give_back(&mut self, at: Address) -> Result<()> {
        self.free(at as u64)
    }

    fn shares_memory(&self) -> bool {
        false
    }

    unsafe fn fill(&mut self, to: Address, bytes: u64, make: Make<'_>) -> Result<()> {
        self.context.enter()?;
        // SAFETY: promised by the caller.
        unsafe { self.stage.write(self.stream.raw(), to as u64, bytes, make) }
    }

    unsafe fn read(&self, from: Address, to: &mut [u8]) -> Result<()> {
        self.context.enter()?;
        if to.is_empty() {
            return Ok(());
        }
        let stream = self.stream.raw();
        // SAFETY: the caller promises the bytes, and the call below waits until they are here.
        let r = unsafe { sys::cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from as u64, to.len(), stream) };
        // Waits in any case: a copy that was begun must not outlive the slice.
        let done = self.finish();
        check(r, "copying from the GPU")?;
        done
    }

    unsafe fn zero(&mut self, at: Address, bytes: u64) -> Result<()> {
        self.context.enter()?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: promised by the caller.
        check(unsafe { sys::cuMemsetD8Async(at as u64, 0, bytes as usize, self.stream.raw()) }, "zeroing memory")
    }

    unsafe fn launch(&mut self, wave: &[Work<'_>], dims: &[i64]) -> Result<()> {
        self.context.enter()?;
        // SAFETY: promised by the caller.
        unsafe { self.enqueue(wave, dims) }
    }

    unsafe fn run(&mut self, steps: &Steps<'_>) -> Result<()> {
        self.context.enter()?;
        steps.check(steps.env)?;
        if !self.use_graphs {
            self.mark(0)?;
            // SAFETY: promised by the caller.
            steps.waves(steps.env, &mut |w| unsafe { self.enqueue(w.works, w.dims) })?;
            return self.mark(1);
        }
        let env = bucket(steps, &self.capacity)?;
        if self.graphs.find(steps.index, &env).is_none() {
            let (rows, _) = Graph::layout(steps, &env);
            let counts = rows * env.len() * size_of::<i64>();
            let pointers = Graph::pointers_at_most(steps, &env)? * size_of::<u64>();
            let dims = self.allocate((counts + pointers) as u64, "counts", false)? as u64;
            let (code, scratch, stream) = (&self.code, self.scratch, self.stream.raw());
            let mut means = Means { code, scratch, stream, library: self.library.as_mut(), args: &mut self.args };
            // SAFETY: promised by the caller.
            let made = unsafe { Graph::new(steps, env.clone(), dims, &mut means)? };
            // SAFETY: there is room for both.
            unsafe {
                copy(&mut self.stage, stream, dims + counts as u64, made.pointers.iter().map(|p| p.to_le_bytes()))?
            };
            if let Some(old) = self.graphs.keep(made) {
                self.free(old.dims)?;
            }
        }
        let lost = || RuntimeError::Device("a graph that was just made is not there".into());
        let g = self.graphs.find(steps.index, &env).ok_or_else(lost)?;
        // SAFETY: promised by the caller.
        let counts = unsafe { g.set(steps, &self.code, self.scratch, &mut self.args)? };
        let (dims, exec) = (g.dims, g.exec());
        // SAFETY: the table was reserved with room for all rows; the graph's addresses are those of the session.
        unsafe {
            self.copy_counts(dims, &counts)?;
            self.mark(0)?;
            check(sys::cuGraphLaunch(exec, self.stream.raw()), "launching a graph")?;
        }
        self.mark(1)
    }

    unsafe fn time(&mut self, wave: &[Work<'_>], dims: &[i64], times: u32) -> Result<Duration> {
        self.context.enter()?;
        if times > 1 {
            // While it runs, the others are asked for.
            // SAFETY: promised by the caller.
            unsafe { self.enqueue(wave, dims)? };
        }
        self.record(0)?;
        for _ in 0..times.max(1) {
            // SAFETY: promised by the caller.
            unsafe { self.enqueue(wave, dims)? };
        }
        self.record(1)?;
        Ok(self.between()? / times.max(1))
    }

    fn time_runs(&mut self, on: bool) {
        self.timed = on;
    }

    fn run_time(&self) -> Result<Option<Duration>> {
        if self.timed { self.between().map(Some) } else { Ok(None) }
    }

    fn scratch(&self) -> Option<(Address, u64)> {
        Some((self.scratch as Address, self.scratch_bytes))
    }

    fn missing(&self) -> Option<&str> {
        self.missing.as_deref()
    }

    fn changed(&mut self) {
        self.graphs = Graphs::default();
    }

    fn finish(&self) -> Result<()> {
        self.context.enter()?;
        // SAFETY: the stream lives as long as this value.
        check(unsafe { sys::cuStreamSynchronize(self.stream.raw()) }, "running kernels")
    }

    fn threads(&self) -> usize {
        1
    }

    fn name(&self) -> String {
        format!("{} (compute capability {}.{})", self.gpu.name, self.gpu.capability.0, self.gpu.capability.1)
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // Nothing is freed while the GPU may use it.
        let _ = self.finish();
    }
}
