//! What a session takes: where every parameter lives, and bytes by purpose, known before anything is reserved.
//!
//! [`plan_memory`] and [`Session::open`](crate::Session::open) share this code, so that what is foretold is what is
//! reserved. Mapped pages count as resident: a run reads them all.

use crate::blocks::stored;
use crate::error::Result;
use crate::session::Options;
use crate::weights::TensorSource;
use pleach_plan::{ArenaLayout, Expr, ExprError, Param, Plan, Residency, Role, Source, alignment, arena, arena_within};

/// Bytes a session holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// The arena, shared by all entries.
    pub arena: u64,
    /// Per entry: name, its arena, and the peak of live bytes, which no arena can be below.
    pub entries: Vec<(String, u64, u64)>,
    /// Owned parameters: the sum of the six kinds below.
    pub owned: u64,
    /// Of these: packed, cast and derived weights.
    pub weights: u64,
    /// Of these: what is trained, and the tensors of adapters.
    pub adapter: u64,
    /// Of these: moments of the optimizer.
    pub optimizer: u64,
    /// Of these: gradients that are summed up over micro-batches.
    pub gradients: u64,
    /// Of these: key/value caches and other state.
    pub state: u64,
    /// Parameters read in place from the mapped files.
    pub mapped: u64,
    /// Parameters that only preparations read; given back after them.
    pub prepare_only: u64,
    /// Scratch of all workers.
    pub scratch: u64,
    /// Inputs of a run, on a device that does not read the host's memory.
    pub inputs: u64,
}

impl Memory {
    /// Everything that is resident in the long run: owned and mapped parameters, the arena, scratch, copies of inputs.
    pub fn total(&self) -> u64 {
        [self.owned, self.mapped, self.arena, self.scratch, self.inputs].iter().fold(0, |a, b| a.saturating_add(*b))
    }
}

/// Where a parameter lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Home {
    /// Nowhere for long: preparations bring it in.
    Passing,
    /// In the mapped file.
    Mapped,
    /// In the session's block of parameters: offset and bytes.
    Owned(u64, u64),
}

/// Where everything will be.
pub(crate) struct Layout {
    /// Per parameter.
    pub(crate) homes: Vec<Home>,
    /// Per entry.
    pub(crate) arenas: Vec<ArenaLayout>,
    /// Per entry, offset of each input in the block of inputs; empty where inputs are read in place.
    pub(crate) inputs: Vec<Vec<u64>>,
    /// Sums.
    pub(crate) memory: Memory,
}

/// What a session would hold, without opening it: `weights` tell which tensors can be read in place.
///
/// # Errors
/// A capacity that is missing or out of range.
pub fn plan_memory(plan: &Plan, weights: &dyn TensorSource, options: &Options) -> Result<Memory> {
    let env = crate::session::capacities(plan, options)?;
    Ok(lay_out(plan, weights, &env, workers(options.threads))?.memory)
}

/// Places everything for these values of the symbols.
pub(crate) fn lay_out(plan: &Plan, weights: &dyn TensorSource, env: &[u64], threads: usize) -> Result<Layout> {
    let mut memory = Memory::default();
    let mut homes = Vec::with_capacity(plan.params.len());
    let mut end = 0u64;
    let align = alignment(&plan.kernels);
    for p in &plan.params {
        let bytes = p.bytes.eval(env)?;
        homes.push(match (&p.source, p.residency) {
            (Source::Checkpoint(_), Residency::PrepareOnly) => {
                memory.prepare_only = memory.prepare_only.saturating_add(bytes);
                Home::Passing
            }
            (Source::Checkpoint(name), Residency::Mapped) if !plan.is_gpu() && in_place(p, weights, name) => {
                memory.mapped = memory.mapped.saturating_add(bytes);
                Home::Mapped
            }
            _ => {
                let at = end;
                let size = bytes.max(1).checked_next_multiple_of(align).ok_or(ExprError::Overflow)?;
                end = end.checked_add(size).ok_or(ExprError::Overflow)?;
                *kind(&mut memory, p) += size;
                Home::Owned(at, bytes)
            }
        });
    }
    memory.owned = end;
    let mut arenas = vec![];
    for e in &plan.entries {
        let l = arena(e, &plan.kernels, env)?;
        memory.arena = memory.arena.max(l.total);
        memory.entries.push((e.name.clone(), l.total, l.lower_bound));
        arenas.push(l);
    }
    memory.scratch = scratch(plan, env, threads)?;
    let mut inputs = vec![];
    for e in plan.entries.iter().filter(|_| plan.is_gpu()) {
        let (mut at, mut end) = (vec![], 0u64);
        for x in &e.inputs {
            at.push(end);
            let bytes = Expr::product(x.shape.iter().cloned()).mul(x.dtype.size()).eval(env)?;
            let size = bytes.max(1).checked_next_multiple_of(align).ok_or(ExprError::Overflow)?;
            end = end.checked_add(size).ok_or(ExprError::Overflow)?;
        }
        memory.inputs = memory.inputs.max(end);
        inputs.push(at);
    }
    Ok(Layout { homes, arenas, inputs, memory })
}

/// Scratch of all workers.
fn scratch(plan: &Plan, env: &[u64], threads: usize) -> Result<u64> {
    let mut scratch = 0u64;
    for k in &plan.kernels {
        scratch = scratch.max(k.scratch_bytes.eval(env)?);
    }
    // Workers' shares begin on cache lines of their own, as the device lays them out.
    let share = scratch.next_multiple_of(128) + if scratch > 0 { 128 } else { 0 };
    Ok(if plan.is_gpu() { scratch } else { share.saturating_mul(threads as u64) })
}

/// What the entries of a plan need of a session's arena, as far as it tells whether that fits into `enough` bytes together with the
/// scratch of the workers, and that scratch.
///
/// # Errors
/// A capacity that is missing or out of range.
pub fn arena_and_scratch(plan: &Plan, options: &Options, enough: u64) -> Result<(u64, u64)> {
    let env = crate::session::capacities(plan, options)?;
    let scratch = scratch(plan, &env, workers(options.threads))?;
    let mut most = 0;
    for e in &plan.entries {
        most = most.max(arena_within(e, &plan.kernels, &env, enough.saturating_sub(scratch))?);
    }
    Ok((most, scratch))
}

/// Workers for a wish: 0 means one per core.
fn workers(wish: usize) -> usize {
    if wish == 0 { std::thread::available_parallelism().map_or(1, usize::from) } else { wish }
}

/// True for a tensor that kernels of the host can read where the file is mapped, and that is large enough to.
pub(crate) fn in_place(p: &Param, weights: &dyn TensorSource, name: &str) -> bool {
    // Blocks are read byte by byte.
    let step = if matches!(p.layout, pleach_plan::Layout::Blocks(_)) { 1 } else { 4 };
    stored(weights, p, name).is_some_and(|t| {
        t.dtype == p.dtype
            && t.bytes.len() >= weights.worth_in_place()
            && (t.bytes.as_ptr() as usize).is_multiple_of(step)
    })
}

/// The sum an owned parameter counts for.
fn kind<'m>(m: &'m mut Memory, p: &Param) -> &'m mut u64 {
    match p.role {
        Role::Stat => &mut m.optimizer,
        Role::State if p.name.starts_with("adam.") => &mut m.optimizer,
        Role::State if p.name.starts_with("grad.") => &mut m.gradients,
        Role::State => &mut m.state,
        Role::Train => &mut m.adapter,
        _ if matches!(p.source, Source::Adapter { .. }) => &mut m.adapter,
        _ => &mut m.weights,
    }
}

/// The largest resident set of this process so far, bytes; 0 when the system does not say.
pub fn peak_rss() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib = status.lines().find_map(|l| l.strip_prefix("VmHWM:")?.trim().strip_suffix("kB")?.trim().parse().ok());
    kib.map_or(0, |k: u64| k * 1024)
}

/// Lets every large block be a mapping of its own, which leaves no hole when it is freed. Otherwise the allocator keeps larger and
/// larger ones in its heap after each that it has seen freed, and what lives on lies scattered between them. For the beginning of a program.
#[allow(unsafe_code)]
pub fn map_large_blocks() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: takes no pointer and may be called at any time.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10);
    }
}

/// Gives memory of this process back to the system that was needed for a while: what was freed (a tokenizer), and pages of
/// files that are only read (code that has run once). They come back when touched again. So they do not count beside a
/// session that is opened afterwards.
#[allow(unsafe_code)]
pub fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: takes no pointer and may be called at any time.
    unsafe {
        libc::malloc_trim(0);
    }
    #[cfg(target_os = "linux")]
    for (start, len) in clean(&std::fs::read_to_string("/proc/self/smaps").unwrap_or_default()) {
        // SAFETY: the mapping is of a file, cannot be written and holds no page of its own, so what is dropped is read
        // from the file again; nothing points into it that would see another value.
        unsafe {
            libc::madvise(start as *mut libc::c_void, len, libc::MADV_DONTNEED);
        }
    }
}

/// Address and length of every mapping of a file that cannot be written and holds no page of its own.
#[cfg(target_os = "linux")]
fn clean(smaps: &str) -> Vec<(usize, usize)> {
    let mut out = vec![];
    let mut candidate = None;
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((a, b)) = first.split_once('-') {
            let range = usize::from_str_radix(a, 16).ok().zip(usize::from_str_radix(b, 16).ok());
            let read_only = words.next().is_some_and(|p| p.starts_with('r') && p.as_bytes().get(1) == Some(&b'-'));
            let of_file = words.nth(3).is_some_and(|name| name.starts_with('/'));
            candidate = range.filter(|_| read_only && of_file);
        } else if first == "Anonymous:" && words.next() == Some("0") {
            out.extend(candidate.take().map(|(a, b)| (a, b - a)));
        }
    }
    out
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn only_clean_pages_of_files_are_given_back() {
        let smaps = "\
1000-3000 r-xp 00000000 08:01 12 /usr/bin/pleach
Rss:                   8 kB
Anonymous:             0 kB
3000-4000 r--p 00002000 08:01 12 /usr/bin/pleach
Anonymous:             4 kB
4000-5000 rw-p 00003000 08:01 12 /usr/bin/pleach
Anonymous:             0 kB
5000-6000 r--p 00000000 00:00 0
Anonymous:             0 kB
7000-8000 r-xp 00000000 00:00 0 [vdso]
Anonymous:             0 kB
";
        assert_eq!(clean(smaps), [(0x1000, 0x2000)]);
        // The process goes on.
        let words: Vec<String> = (0..1000).map(|i| i.to_string()).collect();
        give_back();
        assert_eq!(words.join("").len(), 2890);
        assert!(peak_rss() > 0);
    }
}
