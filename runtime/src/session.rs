//! A session: a plan with its weights, memory at fixed addresses, and the entries ready to run.
//!
//! Opened once with capacities; serves any smaller counts. Parameters are mapped, owned or derived as the plan says.
//! `prepare` entries run when they are due: before the first run (or at [`Session::prepare_all`]), and those of a slot at
//! every swap.
#![allow(unsafe_code)]

use crate::blocks::{self, stored};
use crate::cast::{cast_wide, castable};
use crate::cpu::Cpu;
use crate::device::{Address, Device, Work};
use crate::error::{Result, RuntimeError};
use crate::fetch::Window;
use crate::memory::{Home, Layout, Memory, in_place, lay_out};
use crate::profile::Profile;
use crate::region::Region;
use crate::weights::{Tensor, TensorSource, Weights, nearest};
use pleach_plan::{ArenaLayout, BufferKind, Kernel, Param, Plan, Source};
use std::collections::btree_map::Entry as Slot;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// What a session is opened with.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Workers, the caller among them; 0 means one per core.
    pub threads: usize,
    /// Largest values of the plan's symbols: `T` tokens of a run, `S` sequences of a run, `C` slots of the cache, `P`
    /// positions, `L` counted targets. `P` defaults to what the model was made for, `L` to `T`: there are no more.
    pub capacities: BTreeMap<String, u64>,
    /// The blocks of the weights have been compared with the weights (see [`first_difference`](crate::first_difference)) by
    /// whoever opens the session, and stand for them. Otherwise opening does that, where a plan reads blocks.
    pub blocks_compared: bool,
}

impl Options {
    /// The same options with this capacity.
    pub fn capacity(mut self, symbol: &str, value: u64) -> Options {
        self.capacities.insert(symbol.into(), value);
        self
    }

    /// The same options with this number of workers.
    pub fn threads(mut self, threads: usize) -> Options {
        self.threads = threads;
        self
    }
}

/// An entry bound to addresses.
#[derive(Debug)]
pub(crate) struct Bound {
    /// Addresses of all steps' buffers, one step after another; null where a prepare-only parameter goes, or an input that
    /// is read in place.
    pub(crate) pointers: Vec<Address>,
    /// Where each step begins in `pointers`, and the end.
    pub(crate) starts: Vec<usize>,
    /// The wave of every step.
    pub(crate) waves: Vec<u32>,
    /// Places in `pointers` that an input fills: (place, input).
    pub(crate) inputs: Vec<(usize, u32)>,
    /// Address of each buffer that has one.
    pub(crate) buffers: Vec<Address>,
    /// Values of the symbols the task counts below are for.
    pub(crate) env: Vec<u64>,
    /// Tasks of each step.
    pub(crate) tasks: Vec<u64>,
    /// For every wave, what each worker will read after it.
    pub(crate) ahead: Vec<Window>,
    /// Workers that the above is for.
    pub(crate) workers: usize,
}

/// A plan ready to run.
pub struct Session {
    pub(crate) device: Box<dyn Device>,
    pub(crate) plan: Arc<Plan>,
    pub(crate) weights: Weights,
    /// Values of the symbols at capacity.
    pub(crate) capacity: Vec<u64>,
    /// Symbols whose value is the capacity in every run, because a parameter has their size.
    pub(crate) fixed: Vec<bool>,
    /// Address of each parameter; null for prepare-only ones.
    pub(crate) params: Vec<Address>,
    /// Whether it lies in memory of the session.
    pub(crate) owned: Vec<bool>,
    pub(crate) entries: Vec<Bound>,
    /// Preparations that must run before the next run.
    pub(crate) stale: BTreeSet<usize>,
    pub(crate) profile: Option<Profile>,
    pub(crate) seen: Vec<u64>,
    /// Outputs of the last run, where the device has memory of its own.
    pub(crate) host: Option<Region>,
    /// Where the arena is, and its bytes.
    pub(crate) arena: (Address, u64),
    memory: Memory,
}

// SAFETY: the addresses are of memory that the device and the weights own, which move with the session; nothing in it
// belongs to a thread.
unsafe impl Send for Session {}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Session({}, {} entries)", self.device.name(), self.entries.len())
    }
}

impl Session {
    /// Opens a session on the device the plan is compiled for: loads the code, reserves memory, maps or uploads weights. Adapter slots start as zeros, which is
    /// the base model. Nothing has run yet: see [`Session::prepare_all`].
    ///
    /// # Errors
    /// [`RuntimeError::Target`], [`RuntimeError::Weights`], [`RuntimeError::Capacity`] and what loading code gives.
    pub fn open(plan: Arc<Plan>, weights: Weights, options: &Options) -> Result<Session> {
        pleach_plan::validate(&plan)?;
        let capacity = capacities(&plan, options)?;
        let device = open_device(&plan, &capacity, options)?;
        let session = Session::on(device, plan, weights, capacity)?;
        if !options.blocks_compared {
            blocks::stand(&*session.weights, &session.plan.params, session.threads())?;
        }
        Ok(session)
    }

    fn on(mut device: Box<dyn Device>, plan: Arc<Plan>, weights: Weights, capacity: Vec<u64>) -> Result<Session> {
        let mut fixed = vec![false; plan.symbols.len()];
        for p in &plan.params {
            for s in p.shape.iter().chain([&p.bytes]).flat_map(|e| e.symbols()) {
                fixed[s as usize] = true;
            }
        }
        let names = weights.names();
        let mut faults: Vec<String> = plan.params.iter().filter_map(|p| fits(&*weights, p, &names).err()).collect();
        if !faults.is_empty() {
            // A file that is not there is one fault.
            faults.dedup();
            faults.truncate(8);
            return Err(RuntimeError::Weights(faults.join("\n")));
        }
        drop(names);
        let Layout { homes, arenas, inputs, memory } = lay_out(&plan, &*weights, &capacity, device.threads())?;
        device.hold(&memory)?;
        let params = place_params(&plan, &*weights, &mut *device, &homes, memory.owned)?;
        let owned = homes.iter().map(|h| matches!(h, Home::Owned(..))).collect();
        let base = device.allocate(memory.arena, "activations", false)?;
        let given = if inputs.is_empty() { None } else { Some(device.allocate(memory.inputs, "inputs", false)?) };
        let mut entries = vec![];
        for (i, (e, l)) in plan.entries.iter().zip(&arenas).enumerate() {
            let place = |n: u32| given.and_then(|b| Some(b.wrapping_add(*inputs.get(i)?.get(n as usize)? as usize)));
            entries.push(bind(e, &plan.kernels, l, base, &params, &place));
        }
        let mut stale = BTreeSet::new();
        for (i, e) in plan.entries.iter().enumerate() {
            if e.prepares().is_some() {
                stale.insert(i);
            }
        }
        Ok(Session {
            device,
            plan,
            weights,
            capacity,
            fixed,
            params,
            owned,
            entries,
            stale,
            profile: None,
            seen: vec![],
            host: None,
            arena: (base, memory.arena),
            memory,
        })
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// From now on kernel `by` runs wherever `of` did: for whoever measures which of two forms of a kernel is faster.
    ///
    /// # Errors
    /// [`RuntimeError::Values`] when they do not read and write the same.
    pub fn substitute(&mut self, of: u32, by: u32) -> Result<()> {
        let kernel = |i: u32| self.plan.kernels.get(i as usize);
        let same =
            |a: &Kernel, b: &Kernel| (&a.operands, &a.results, &a.aliases) == (&b.operands, &b.results, &b.aliases);
        if !kernel(of).zip(kernel(by)).is_some_and(|(a, b)| same(a, b)) {
            return Err(RuntimeError::Values(format!("kernel {by} does not take the place of kernel {of}")));
        }
        self.device.finish()?;
        self.device.changed();
        let steps = Arc::make_mut(&mut self.plan).entries.iter_mut().flat_map(|e| &mut e.steps);
        steps.filter(|s| s.kernel == of).for_each(|s| s.kernel = by);
        // Numbers of tasks are counted anew.
        self.entries.iter_mut().for_each(|e| e.tasks.clear());
        Ok(())
    }

    /// What the plan would make use of and this machine lacks, with the reason; everything runs without it.
    pub fn missing(&self) -> Option<&str> {
        self.device.missing()
    }

    /// The capacity of a symbol, or its only value for one that nothing else decides.
    pub fn capacity(&self, symbol: &str) -> Option<u64> {
        self.plan.symbol(symbol).and_then(|i| self.capacity.get(i as usize).copied())
    }

    /// Bytes the session holds.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Number of workers.
    pub fn threads(&self) -> usize {
        self.device.threads()
    }

    /// The address of a parameter's buffer, for those that stay: it never changes while the session lives.
    pub fn address_of(&self, param: &str) -> Option<usize> {
        let i = self.plan.params.iter().position(|p| p.name == param)?;
        let a = self.params[i] as usize;
        (a != 0).then_some(a)
    }

    /// Runs every preparation that is due: packing, folding and merging of parameters. The next run would do it, too.
    ///
    /// # Errors
    /// [`RuntimeError::Weights`] when a tensor is gone, [`RuntimeError::Capacity`] when there is no memory.
    pub fn prepare_all(&mut self) -> Result<()> {
        while let Some(i) = self.stale.first().copied() {
            self.prepare(i)?;
        }
        Ok(())
    }

    /// Runs a preparation. Prepare-only parameters are brought in at the first step that reads them and given back after
    /// the last one, so that at no time more than a few source tensors are in memory.
    pub(crate) fn prepare(&mut self, index: usize) -> Result<()> {
        let plan = self.plan.clone();
        let entry = &plan.entries[index];
        let env = self.capacity.clone();
        let dims: Vec<i64> = env.iter().map(|v| *v as i64).collect();
        let mut last = BTreeMap::new();
        let passing = |b: u32| match entry.buffers[b as usize].kind {
            BufferKind::Param(p) if self.params[p as usize].is_null() => Some(p),
            _ => None,
        };
        for (i, s) in entry.steps.iter().enumerate() {
            last.extend(s.buffers.iter().filter_map(|b| passing(*b)).map(|p| (p, i)));
        }
        // Kept for the time of the steps that read it: address, and whether it is a copy.
        let mut here: BTreeMap<u32, (Address, bool)> = BTreeMap::new();
        self.device.begin();
        for (i, s) in entry.steps.iter().enumerate() {
            let kernel = &plan.kernels[s.kernel as usize];
            let at = self.entries[index].starts[i];
            let mut buffers = self.entries[index].pointers[at..at + s.buffers.len()].to_vec();
            for (slot, b) in buffers.iter_mut().zip(&s.buffers) {
                let BufferKind::Param(p) = entry.buffers[*b as usize].kind else { continue };
                if !self.params[p as usize].is_null() {
                    continue;
                }
                *slot = match here.entry(p) {
                    Slot::Occupied(o) => o.get().0,
                    Slot::Vacant(v) => v.insert(bring(&plan.params[p as usize], &*self.weights, &mut *self.device)?).0,
                };
            }
            let tasks = kernel.tasks.eval(&env)?;
            let work = [Work { kernel: s.kernel, buffers: &buffers, tasks }];
            // SAFETY: the plan is validated, so each buffer has the size the kernel declares; addresses are of the
            // arena at capacity, of parameters, or of what `here` holds; the session is borrowed mutably.
            match &mut self.profile {
                None => unsafe { self.device.launch(&work, &dims)? },
                Some(p) => p.add(&plan, (index, i), unsafe { self.device.time(&work, &dims, 1)? }, &env),
            }
            let done: Vec<u32> = here.keys().copied().filter(|p| last.get(p) == Some(&i)).collect();
            for p in done {
                if let Some((at, true)) = here.remove(&p) {
                    // SAFETY: no later step reads it.
                    unsafe { self.device.give_back(at)? };
                }
                let p = &plan.params[p as usize];
                if let Source::Checkpoint(name) = &p.source {
                    blocks::release(&*self.weights, p, name);
                }
            }
        }
        self.stale.remove(&index);
        Ok(())
    }
}

/// Values of all symbols at capacity.
pub(crate) fn capacities(plan: &Plan, options: &Options) -> Result<Vec<u64>> {
    let free = || plan.symbols.iter().filter(|s| s.value.is_none());
    for (name, v) in &options.capacities {
        if !free().any(|s| s.name == *name) {
            // A plan specialised to a count has no such symbol: nothing to reserve.
            continue;
        }
        if *v == 0 || *v > i32::MAX as u64 {
            return Err(RuntimeError::Capacity(format!("the capacity of {name} is {v}; give 1 to {}", i32::MAX)));
        }
    }
    let given = |name: &str| options.capacities.get(name).copied();
    let value = |name: &str| {
        given(name).or_else(|| match name {
            "P" => Some(plan.meta.max_positions).filter(|n| *n > 0),
            "L" => given("T"),
            _ => None,
        })
    };
    let missing: Vec<&str> = free().filter(|s| value(&s.name).is_none()).map(|s| s.name.as_str()).collect();
    if !missing.is_empty() {
        return Err(RuntimeError::Capacity(format!("give the session a capacity for {}", missing.join(", "))));
    }
    Ok(plan.env(&value)?)
}

/// Checks that a source has what a checkpoint parameter needs.
fn fits(weights: &dyn TensorSource, p: &Param, names: &[&str]) -> std::result::Result<(), String> {
    let Source::Checkpoint(name) = &p.source else { return Ok(()) };
    if let pleach_plan::Layout::Blocks(_) = p.layout {
        return blocks::fits(weights, p, name);
    }
    let Some(t) = weights.tensor(name) else {
        return Err(match nearest(names.iter().copied(), name) {
            Some(n) if n == name => format!("tensor `{name}` has an element type that is not read; convert it to f32"),
            Some(n) => format!("no tensor `{name}` (nearest: `{n}`); give the model the plan was compiled for"),
            None => format!("no tensor `{name}`; give the model the plan was compiled for"),
        });
    };
    misfit(p, t.dtype, t.shape, t.bytes.len()).map_or(Ok(()), |why| Err(format!("tensor `{name}` {why}")))
}

/// Why a tensor cannot be given for a parameter.
pub(crate) fn misfit(p: &Param, dtype: pleach_plan::DType, shape: &[u64], bytes: usize) -> Option<String> {
    let want: Option<Vec<u64>> = p.shape.iter().map(|d| d.eval(&[]).ok()).collect();
    if want.as_deref() != Some(shape) {
        return Some(format!("is {shape:?}, the plan expects {:?}", want.unwrap_or_default()));
    }
    if !castable(dtype, p.dtype) {
        return Some(format!("is {}, the plan expects {}", dtype.name(), p.dtype.name()));
    }
    let size = shape.iter().try_fold(dtype.size(), |a, b| a.checked_mul(*b));
    (size != Some(bytes as u64)).then(|| format!("has {bytes} bytes, which is not its shape"))
}

/// The device that a plan is for.
fn open_device(plan: &Plan, env: &[u64], options: &Options) -> Result<Box<dyn Device>> {
    if !plan.is_gpu() {
        return Ok(Box::new(Cpu::new(plan, env, options.threads)?));
    }
    #[cfg(feature = "cuda")]
    return Ok(Box::new(crate::cuda::Cuda::new(plan, env)?));
    #[cfg(not(feature = "cuda"))]
    Err(RuntimeError::Target(format!(
        "it is compiled for {}, this build runs on processors only; build it with the feature `cuda`",
        plan.target.arch
    )))
}

/// Gives every parameter its address. The owned ones share one block, so that huge pages cover it. Tensors are cast
/// part by part into their place, and the pages of their file given back.
fn place_params(
    plan: &Plan,
    weights: &dyn TensorSource,
    device: &mut dyn Device,
    homes: &[Home],
    total: u64,
) -> Result<Vec<Address>> {
    let base = device.allocate(total, "parameters", true)?;
    let mut out = vec![std::ptr::null_mut(); plan.params.len()];
    for ((p, home), to) in plan.params.iter().zip(homes).zip(&mut out) {
        match (home, &p.source) {
            (Home::Mapped, Source::Checkpoint(name)) => {
                // The session keeps the weights as long as the device.
                let t = stored(weights, p, name).filter(|_| device.shares_memory());
                *to = t.map(|t| t.bytes.as_ptr().cast_mut()).ok_or_else(|| {
                    RuntimeError::Weights(format!("tensor `{name}` cannot be read in place on this device"))
                })?;
            }
            (Home::Owned(offset, bytes), source) => {
                *to = base.wrapping_add(*offset as usize);
                let Source::Checkpoint(name) = source else { continue };
                if let Some(t) = stored(weights, p, name) {
                    // SAFETY: offset and size lie inside the block just reserved.
                    unsafe { upload(device, *to, *bytes, t, p)? };
                }
                blocks::release(weights, p, name);
            }
            _ => {}
        }
    }
    Ok(out)
}

/// Casts a tensor into its place on the device, without a second copy of it in memory.
///
/// # Safety
/// `bytes` bytes at `to` must belong to the parameter.
pub(crate) unsafe fn upload(device: &mut dyn Device, to: Address, bytes: u64, t: Tensor<'_>, p: &Param) -> Result<()> {
    let (from, into) = (t.dtype.size() as usize, p.dtype.size() as usize);
    let mut make = |at: u64, part: &mut [u8]| {
        if p.layout != pleach_plan::Layout::RowMajor {
            return part.copy_from_slice(&t.bytes[at as usize..][..part.len()]);
        }
        let n = part.len() / into * from;
        cast_wide(t.dtype, &t.bytes[at as usize / into * from..][..n], p.dtype, part);
    };
    // SAFETY: promised by the caller.
    unsafe { device.fill(to, bytes, &mut make) }
}

/// A prepare-only parameter for a while: in place, or as a copy, which is to be given back.
fn bring(p: &Param, weights: &dyn TensorSource, device: &mut dyn Device) -> Result<(Address, bool)> {
    let gone = || RuntimeError::Weights(format!("the tensor of parameter `{}` is no longer there", p.name));
    let Source::Checkpoint(name) = &p.source else { return Err(gone()) };
    let elements = p.layout == pleach_plan::Layout::RowMajor;
    let fits = |t: &Tensor<'_>| !elements || misfit(p, t.dtype, t.shape, t.bytes.len()).is_none();
    let t = stored(weights, p, name).filter(fits).ok_or_else(gone)?;
    if device.shares_memory() && in_place(p, weights, name) {
        // The session holds the weights, and the address is used during this preparation only.
        return Ok((t.bytes.as_ptr().cast_mut(), false));
    }
    let bytes = p.bytes.eval(&[])?;
    let to = device.lend(bytes, &p.name)?;
    // SAFETY: just lent, with this size.
    unsafe { upload(device, to, bytes, t, p)? };
    Ok((to, true))
}

fn bind(
    e: &pleach_plan::Entry,
    kernels: &[pleach_plan::Kernel],
    layout: &ArenaLayout,
    arena: Address,
    params: &[Address],
    input: &dyn Fn(u32) -> Option<Address>,
) -> Bound {
    let waves = pleach_plan::waves(e, kernels);
    let buffers: Vec<Address> = e
        .buffers
        .iter()
        .zip(&layout.offsets)
        .map(|(b, o)| match (b.kind, o) {
            (BufferKind::Param(p), _) => params[p as usize],
            // The offset lies inside the arena, whose size is the largest of all entries.
            (BufferKind::Arena | BufferKind::Output, Some(o)) => arena.wrapping_add(*o as usize),
            (BufferKind::Input(i), _) => input(i).unwrap_or(std::ptr::null_mut()),
            _ => std::ptr::null_mut(),
        })
        .collect();
    let (mut pointers, mut starts, mut inputs) = (vec![], vec![], vec![]);
    for s in &e.steps {
        starts.push(pointers.len());
        for b in &s.buffers {
            if let BufferKind::Input(i) = e.buffers[*b as usize].kind {
                inputs.push((pointers.len(), i));
            }
            pointers.push(buffers[*b as usize]);
        }
    }
    starts.push(pointers.len());
    Bound { pointers, starts, waves, inputs, buffers, env: vec![], tasks: vec![], ahead: vec![], workers: 0 }
}
