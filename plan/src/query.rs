//! Questions that producers and consumers of a plan both ask, and the conventions of the standard entries.

use crate::error::PlanError;
use crate::expr::{Expr, ExprError};
use crate::memory::{self, Placement, Request};
use crate::types::{BufferKind, Check, Entry, Kernel, Launch, Loop, Plan, Residency, Source, Symbol};
use std::collections::BTreeSet;

/// Alignment of every buffer in the arena and of every owned parameter on a host, bytes: a cache line and an AVX-512
/// register.
pub const ALIGN: u64 = 64;

/// The same on a GPU: what its allocations have, more than vector accesses and tensor maps need.
pub const GPU_ALIGN: u64 = 256;

/// Alignment of the buffers that these kernels are given, bytes: [`ALIGN`], or [`GPU_ALIGN`] for kernels of a GPU.
pub fn alignment(kernels: &[Kernel]) -> u64 {
    if kernels.iter().any(|k| !k.launches.is_empty()) { GPU_ALIGN } else { ALIGN }
}

/// Where the arena buffers of an entry lie.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ArenaLayout {
    /// Offset of each buffer of the entry; `None` for those outside the arena or used by no step.
    pub offsets: Vec<Option<u64>>,
    /// Bytes of the arena.
    pub total: u64,
    /// The largest sum of sizes alive at one step: no placement is smaller.
    pub lower_bound: u64,
    /// The planner's requests, as (buffer, request), for checkers and reports.
    pub requests: Vec<(u32, Request)>,
}

impl Kernel {
    /// The launches of a GPU's kernel: its own, then those beside a library's products.
    pub fn all_launches(&self) -> impl Iterator<Item = &Launch> {
        self.launches.iter().chain(self.library.iter().flat_map(|y| &y.launches))
    }
}

impl Entry {
    /// The buffers that the steps of a loop share with what is outside of it: those seen window by window, and those
    /// that other steps use or that are given or returned.
    pub fn outer_buffers(&self, l: &Loop) -> BTreeSet<u32> {
        let inside = |i: usize| (l.first..l.last).contains(&(i as u64));
        let uses = |wanted: bool| {
            self.steps
                .iter()
                .enumerate()
                .filter(move |(i, _)| inside(*i) == wanted)
                .flat_map(|(_, s)| &s.buffers)
                .copied()
        };
        let beyond: BTreeSet<u32> = uses(false).collect();
        let kept = |b: &u32| self.buffers.get(*b as usize).is_none_or(|x| x.kind != BufferKind::Arena);
        let moved = |b: &u32| l.windows.iter().any(|w| w.buffer == *b);
        uses(true).filter(|b| beyond.contains(b) || kept(b) || moved(b)).collect()
    }
}

impl Plan {
    /// Whether the code is for a GPU (`sm_80`, …); else it is for a host.
    pub fn is_gpu(&self) -> bool {
        self.target.arch.starts_with("sm_")
    }

    /// The entry of that name.
    ///
    /// # Errors
    /// [`PlanError::NoEntry`] with the names there are.
    pub fn entry(&self, name: &str) -> Result<&Entry, PlanError> {
        self.entries.iter().find(|e| e.name == name).ok_or_else(|| PlanError::NoEntry {
            name: name.into(),
            have: self.entries.iter().map(|e| e.name.as_str()).collect::<Vec<_>>().join(", "),
        })
    }

    /// Index of the symbol of that name.
    pub fn symbol(&self, name: &str) -> Option<u32> {
        self.symbols.iter().position(|s| s.name == name).map(|i| i as u32)
    }

    /// The symbol of that name as an expression.
    pub fn sym(&self, name: &str) -> Option<Expr> {
        self.symbol(name).map(Expr::Sym)
    }

    /// Values of all symbols, from values of the free ones by name; what has no value given is 1.
    ///
    /// # Errors
    /// [`ExprError`] when a derived symbol overflows.
    pub fn env(&self, value: &dyn Fn(&str) -> Option<u64>) -> Result<Vec<u64>, ExprError> {
        let mut env: Vec<u64> = Vec::with_capacity(self.symbols.len());
        for Symbol { name, value: v } in &self.symbols {
            let x = match v {
                Some(e) => e.eval(&env)?,
                None => value(name).unwrap_or(1),
            };
            env.push(x);
        }
        Ok(env)
    }

    /// Slot numbers of the adapters, sorted.
    pub fn slots(&self) -> Vec<u32> {
        let mut v: Vec<u32> = self
            .params
            .iter()
            .filter_map(|p| if let Source::Adapter { slot, .. } = p.source { Some(slot) } else { None })
            .collect();
        v.sort_unstable();
        v.dedup();
        v
    }

    /// Sets the residency of every parameter from its use: a checkpoint tensor that only `prepare` entries read is
    /// [`Residency::PrepareOnly`], one that any other entry reads is mapped, one that a step writes is owned.
    pub fn settle_residency(&mut self) {
        let mut run = vec![false; self.params.len()];
        let mut prepare = vec![false; self.params.len()];
        let mut written = vec![false; self.params.len()];
        for e in &self.entries {
            for s in &e.steps {
                let operands = self.kernels.get(s.kernel as usize).map_or(0, |k| k.operands.len());
                for (i, b) in s.buffers.iter().enumerate() {
                    if let Some(BufferKind::Param(p)) = e.buffers.get(*b as usize).map(|b| b.kind) {
                        let set = if e.prepares().is_some() { &mut prepare } else { &mut run };
                        if let Some(x) = set.get_mut(p as usize) {
                            *x = true;
                        }
                        if let Some(x) = written.get_mut(p as usize).filter(|_| i >= operands) {
                            *x = true;
                        }
                    }
                }
            }
        }
        for (i, p) in self.params.iter_mut().enumerate() {
            p.residency = match p.source {
                Source::Checkpoint(_) if !written[i] && prepare[i] && !run[i] => Residency::PrepareOnly,
                Source::Checkpoint(_) if !written[i] => Residency::Mapped,
                _ => Residency::Owned,
            };
        }
    }

    /// The checks of an input of the standard entries (`infer`, `generate`, `accumulate`, `evaluate`), by its name. Indices
    /// are bounded by the vocabulary, the position tables, the tokens of the run and, for `generate`, the slots of the cache.
    pub fn standard_checks(&self, entry: &str, input: &str) -> Vec<Check> {
        let tokens = self.sym("T").unwrap_or(Expr::Const(0));
        let keys = if entry == "generate" { self.sym("C").unwrap_or(Expr::Const(0)) } else { tokens.clone() };
        match input {
            "input_ids" => vec![Check::Range(Expr::Const(self.meta.vocab))],
            "token_type_ids" => vec![Check::Range(Expr::Const(self.meta.type_vocab))],
            "positions" => {
                vec![Check::Range(self.sym("P").unwrap_or(Expr::Const(self.meta.max_positions)))]
            }
            "q_segments" => vec![Check::Segments(tokens)],
            "kv_start" => vec![Check::Range(keys.add(1))],
            "kv_len" => vec![Check::Span { start: "kv_start".into(), total: keys }, Check::Covers("q_segments".into())],
            "slots" => vec![Check::Range(keys), Check::Distinct],
            "rows" => vec![Check::Range(tokens), Check::Distinct],
            "labels" if self.meta.vocab > 0 => vec![Check::Range(Expr::Const(self.meta.vocab))],
            "last" => vec![Check::Range(tokens)],
            _ => vec![],
        }
    }
}

/// Most steps of one wave.
const WAVE: usize = 8;

/// The wave of every step: neighbouring steps that do not depend on each other run together, and their tasks share the
/// workers. A step depends on another through a buffer that one of them writes.
pub fn waves(entry: &Entry, kernels: &[Kernel]) -> Vec<u32> {
    let (mut read, mut written): (Vec<u32>, Vec<u32>) = (vec![], vec![]);
    let (mut wave, mut size) = (0, 0);
    let mut out = vec![];
    let edge: Vec<u64> = entry.loops.iter().flat_map(|l| [l.first, l.last]).collect();
    for (i, s) in entry.steps.iter().enumerate() {
        let operands = kernels.get(s.kernel as usize).map_or(0, |k| k.operands.len()).min(s.buffers.len());
        let (r, w) = s.buffers.split_at(operands);
        // A loop is made of waves of its own.
        let border = i > 0 && edge.contains(&(i as u64));
        let waits = border
            || r.iter().any(|b| written.contains(b))
            || w.iter().any(|b| written.contains(b) || read.contains(b));
        if waits || size == WAVE {
            wave += 1;
            size = 0;
            read.clear();
            written.clear();
        }
        size += 1;
        read.extend(r);
        written.extend(w);
        out.push(wave);
    }
    out
}

/// First and last use of every arena buffer: `(buffer, first wave, one past the last wave)`. Outputs live until the
/// entry ends. A buffer that no step uses does not occur.
pub fn lifetimes(entry: &Entry, kernels: &[Kernel]) -> Vec<(u32, u64, u64)> {
    let waves = waves(entry, kernels);
    let n = waves.last().map_or(0, |w| u64::from(*w) + 1);
    let mut life: Vec<Option<(u64, u64)>> = vec![None; entry.buffers.len()];
    for (s, w) in entry.steps.iter().zip(&waves) {
        for b in &s.buffers {
            if let Some(l) = life.get_mut(*b as usize) {
                let i = u64::from(*w);
                *l = Some(l.map_or((i, i + 1), |(f, _)| (f, i + 1)));
            }
        }
    }
    // What a loop uses from outside, every window uses again.
    for l in &entry.loops {
        let (first, last) = (l.first as usize, (l.last as usize).min(entry.steps.len()));
        if first >= last {
            continue;
        }
        let span = (u64::from(waves[first]), u64::from(waves[last - 1]) + 1);
        for b in entry.outer_buffers(l) {
            if let Some(Some(x)) = life.get_mut(b as usize) {
                *x = (x.0.min(span.0), x.1.max(span.1));
            }
        }
    }
    for o in &entry.outputs {
        if let Some(Some(l)) = life.get_mut(o.buffer as usize) {
            l.1 = n;
        }
    }
    let mut out = vec![];
    for (i, (b, l)) in entry.buffers.iter().zip(life).enumerate() {
        match (b.kind, l) {
            (BufferKind::Arena, Some((f, l))) => out.push((i as u32, f, l)),
            (BufferKind::Output, Some((f, _))) => out.push((i as u32, f, n)),
            _ => {}
        }
    }
    out
}

/// The buffers of an entry's arena as requests to the planner, for these values of the symbols.
fn arena_requests(entry: &Entry, kernels: &[Kernel], env: &[u64]) -> Result<Vec<(u32, Request)>, ExprError> {
    let align = alignment(kernels);
    let mut requests = vec![];
    let mut sum = 0u64;
    for (b, first, last) in lifetimes(entry, kernels) {
        let size = entry.buffers[b as usize].bytes.eval(env)?.max(1);
        let size = size.checked_next_multiple_of(align).ok_or(ExprError::Overflow)?;
        sum = sum.checked_add(size).ok_or(ExprError::Overflow)?;
        requests.push((b, Request { first, last, size }));
    }
    Ok(requests)
}

/// Bytes of an entry's arena, as far as they tell whether it fits into `enough`: no arena is smaller where they are more, and
/// where they are not there is one of this size, which [`arena`] may still make smaller.
///
/// # Errors
/// As [`arena`].
pub fn arena_within(entry: &Entry, kernels: &[Kernel], env: &[u64], enough: u64) -> Result<u64, ExprError> {
    let list: Vec<Request> = arena_requests(entry, kernels, env)?.into_iter().map(|r| r.1).collect();
    Ok(memory::total_within(&list, alignment(kernels), enough))
}

/// Places the arena of an entry for these values of the symbols (the capacities: every size is monotone, so the layout
/// serves any smaller counts).
///
/// # Errors
/// [`ExprError`] when a size has no value.
pub fn arena(entry: &Entry, kernels: &[Kernel], env: &[u64]) -> Result<ArenaLayout, ExprError> {
    let align = alignment(kernels);
    let requests = arena_requests(entry, kernels, env)?;
    let list: Vec<Request> = requests.iter().map(|r| r.1).collect();
    let Placement { offsets, total, lower_bound, .. } = memory::place(&list, align);
    let mut at = vec![None; entry.buffers.len()];
    for ((b, _), o) in requests.iter().zip(&offsets) {
        at[*b as usize] = Some(*o);
    }
    Ok(ArenaLayout { offsets: at, total, lower_bound, requests })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Buffer, Step};

    #[test]
    fn waves_end_where_a_step_waits() {
        let buffer = || Buffer { kind: BufferKind::Arena, bytes: Expr::Const(4), name: String::new() };
        let kernel = Kernel {
            symbol: "k".into(),
            blob: 0,
            class: "row".into(),
            tasks: Expr::Const(1),
            scratch_bytes: Expr::Const(0),
            operands: vec![Expr::Const(4)],
            results: vec![Expr::Const(4)],
            aliases: vec![None],
            flops: Expr::Const(0),
            bytes: Expr::Const(0),
            launches: vec![],
            library: None,
        };
        let step = |r, w| Step { kernel: 0, buffers: vec![r, w], origin: String::new() };
        // Two readers of 0; then a read of what one of them wrote; then an overwrite of what that step reads.
        let steps = vec![step(0, 1), step(0, 2), step(2, 3), step(0, 2)];
        let e = Entry { buffers: (0..4).map(|_| buffer()).collect(), steps, ..Entry::default() };
        assert_eq!(waves(&e, std::slice::from_ref(&kernel)), [0, 0, 1, 2]);
        // A buffer of a wave stays until the whole wave is done.
        assert!(lifetimes(&e, &[kernel]).contains(&(0, 0, 3)));
    }
}
