//! Checks everything a consumer of a plan relies on: indices, ranges, sizes, access.
//!
//! What passes can be opened and launched without reading or writing outside a buffer, as far as the manifest decides:
//! the code in the blobs is trusted to keep to the sizes its kernel declares. All faults are reported together (the
//! first hundred). Sizes are compared by value at several assignments of the symbols.

use crate::error::PlanError;
use crate::expr::Expr;
use crate::layout::{BlockFormat, Layout};
use crate::types::{BlobKind, BufferKind, Check, DType, Entry, Kernel, LaunchParam, Loop, Plan, Residency, Source};
use std::collections::BTreeSet;

/// Symbols a plan may have.
const MAX_SYMBOLS: usize = 16;
/// Ranks a tensor may have.
const MAX_RANK: usize = 8;
/// Bytes of the parameters of a launch that every GPU and driver takes.
const PARAM_BYTES: usize = 4096;
/// Faults listed before the rest is left out.
const MAX_FAULTS: usize = 100;

struct Faults(Vec<String>);

impl Faults {
    fn add(&mut self, s: impl FnOnce() -> String) {
        if self.0.len() < MAX_FAULTS {
            self.0.push(s());
        }
    }

    fn check(&mut self, ok: bool, s: impl FnOnce() -> String) {
        if !ok {
            self.add(s);
        }
    }
}

/// Checks a plan.
///
/// # Errors
/// [`PlanError::Invalid`] with every fault on a line.
pub fn validate(plan: &Plan) -> Result<(), PlanError> {
    let mut f = Faults(vec![]);
    let envs = symbols(plan, &mut f);
    if f.0.is_empty() {
        params(plan, &envs, &mut f);
        kernels(plan, &envs, &mut f);
        let mut names = BTreeSet::new();
        for e in &plan.entries {
            f.check(!e.name.is_empty() && names.insert(&e.name), || {
                format!("entry `{}` occurs twice or has no name", e.name)
            });
            entry(plan, e, &envs, &mut f);
        }
    }
    if f.0.is_empty() { Ok(()) } else { Err(PlanError::Invalid(f.0.join("\n"))) }
}

/// Checks the symbols and returns the assignments sizes are compared at.
fn symbols(plan: &Plan, f: &mut Faults) -> Vec<Vec<u64>> {
    f.check(plan.symbols.len() <= MAX_SYMBOLS, || format!("{} symbols; at most {MAX_SYMBOLS}", plan.symbols.len()));
    let mut names = BTreeSet::new();
    for (i, s) in plan.symbols.iter().enumerate() {
        f.check(!s.name.is_empty() && names.insert(&s.name), || format!("symbol {i} has no name of its own"));
        if let Some(e) = &s.value {
            let ok = matches!(e, Expr::Add(v) if matches!(v.as_slice(),
                [Expr::Sym(j), Expr::Const(c)] if (*j as usize) < i && plan.symbols[*j as usize].value.is_none() && *c < 1 << 20));
            f.check(ok, || format!("symbol {} is not an earlier free symbol plus a number", s.name));
        }
    }
    if !f.0.is_empty() {
        return vec![];
    }
    let primes = [[1u64; 4], [7, 11, 13, 17], [512, 33, 97, 1021], [1009, 64, 48, 5]];
    primes
        .iter()
        .map(|p| {
            let mut env: Vec<u64> = vec![];
            for (i, s) in plan.symbols.iter().enumerate() {
                let v = s.value.as_ref().and_then(|e| e.eval(&env).ok());
                env.push(v.unwrap_or(p[i % 4] + (i / 4) as u64));
            }
            env
        })
        .collect()
}

fn values(e: &Expr, envs: &[Vec<u64>]) -> Option<Vec<u64>> {
    envs.iter().map(|env| e.eval(env).ok()).collect()
}

fn dense(dtype: DType, shape: &[Expr]) -> Expr {
    Layout::RowMajor.bytes(dtype, shape).unwrap_or(Expr::Const(0))
}

fn params(plan: &Plan, envs: &[Vec<u64>], f: &mut Faults) {
    let (mut names, mut keys) = (BTreeSet::new(), BTreeSet::new());
    for p in &plan.params {
        let name = &p.name;
        f.check(!name.is_empty() && names.insert(name), || format!("parameter `{name}` occurs twice or has no name"));
        f.check(p.shape.len() <= MAX_RANK, || format!("parameter `{name}` has rank {}", p.shape.len()));
        if let Layout::Panels { nr, .. } | Layout::CodedPanels { nr, .. } = p.layout {
            f.check(p.shape.len() == 2 && nr > 0 && nr <= 4096, || {
                format!("parameter `{name}` cannot lie in panels of {nr}")
            });
        }
        if let Layout::Blocks(_) | Layout::CodedPanels { .. } = p.layout {
            let whole = |k: &Expr| k.known().is_some_and(|k| k % BlockFormat::VALUES == 0);
            f.check(p.shape.len() == 2 && whole(&p.shape[1]), || {
                format!("parameter `{name}` cannot lie in blocks of {} values", BlockFormat::VALUES)
            });
        }
        let size = p.layout.bytes(p.dtype, &p.shape).and_then(|e| values(&e, envs));
        f.check(size.is_some() && size == values(&p.bytes, envs), || {
            format!("parameter `{name}` does not have the size of its shape")
        });
        let outside = matches!(p.source, Source::Checkpoint(_) | Source::Adapter { .. });
        if outside {
            let blocks = matches!((p.layout, &p.source), (Layout::Blocks(_), Source::Checkpoint(_)));
            let stored = blocks || p.layout == Layout::RowMajor;
            f.check(stored && p.shape.iter().all(|d| d.symbols().is_empty()), || {
                format!("parameter `{name}` comes from a file and must be row-major (or in blocks, of the base) and of known shape")
            });
        }
        f.check(p.residency == Residency::Owned || matches!(p.source, Source::Checkpoint(_)), || {
            format!("parameter `{name}` comes from no file and must be owned")
        });
        match &p.source {
            Source::Checkpoint(n) => f.check(!n.is_empty(), || format!("parameter `{name}` names no tensor")),
            Source::Adapter { slot, key } => {
                f.check(*slot < 1024 && !key.is_empty() && keys.insert((slot, key)), || {
                    format!("parameter `{name}` shares slot {slot} and key `{key}` with another, or has none")
                });
            }
            Source::Derived | Source::Zeros => {}
        }
    }
}

fn kernels(plan: &Plan, envs: &[Vec<u64>], f: &mut Faults) {
    for k in &plan.kernels {
        let s = &k.symbol;
        let ok = !s.is_empty()
            && s.len() <= 255
            && s.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'_' | b'.' | b'$'));
        f.check(ok, || format!("`{s}` is no name of a kernel"));
        match plan.blobs.get(k.blob as usize) {
            Some(b) if b.kind != BlobKind::Other => {}
            _ => f.add(|| format!("kernel {s} names blob {}, which is no code", k.blob)),
        }
        let all = [&k.tasks, &k.scratch_bytes, &k.flops, &k.bytes].into_iter().chain(&k.operands).chain(&k.results);
        for e in all {
            f.check(values(e, envs).is_some(), || format!("kernel {s}: an expression has no value"));
        }
        launches(plan, k, envs, f);
        f.check(k.aliases.len() == k.results.len(), || format!("kernel {s} does not say which results are in place"));
        for (i, a) in k.aliases.iter().enumerate() {
            if let Some(a) = a {
                let ok = k
                    .operands
                    .get(*a as usize)
                    .zip(k.results.get(i))
                    .is_some_and(|(o, r)| values(o, envs) == values(r, envs));
                f.check(ok, || format!("kernel {s}: result {i} cannot be in place of operand {a}"));
            }
        }
    }
}

/// PTX needs launches, host code has none.
fn launches(plan: &Plan, k: &Kernel, envs: &[Vec<u64>], f: &mut Faults) {
    let s = &k.symbol;
    let ptx = plan.blobs.get(k.blob as usize).is_some_and(|b| b.kind == BlobKind::Ptx);
    f.check(ptx != k.launches.is_empty(), || format!("kernel {s}: launches go with PTX, and PTX with launches"));
    let buffers = (k.operands.len() + k.results.len()) as u32;
    by_library(k, envs, f);
    for l in k.all_launches() {
        let ok = !l.function.is_empty() && l.block > 0 && l.block <= 1024 && l.block % 32 == 0;
        f.check(ok, || format!("kernel {s}: a launch of {} threads of `{}`", l.block, l.function));
        let positive = |e: &Expr| values(e, envs).is_some_and(|v| v.iter().all(|n| *n > 0));
        f.check(l.grid.iter().all(positive), || format!("kernel {s}: a launch without blocks"));
        let counted =
            l.when.as_ref().is_none_or(|w| values(&w.count, envs).is_some() && w.most.is_none_or(|m| m > w.above));
        f.check(counted, || format!("kernel {s}: `{}` runs for no count", l.function));
        // A pointer takes 8 bytes, a tensor map 128 at a multiple of 64.
        let bytes = |p: &LaunchParam| match p {
            LaunchParam::TensorMap(_) => 192,
            _ => 8,
        };
        let bytes: usize = l.params.iter().map(bytes).sum();
        f.check(bytes <= PARAM_BYTES, || format!("kernel {s}: {} parameters take {bytes} bytes", l.params.len()));
        for p in &l.params {
            let ok = match p {
                LaunchParam::Buffer(b) => *b < buffers,
                LaunchParam::Table(list) => !list.is_empty() && list.iter().all(|b| *b < buffers),
                LaunchParam::Scratch | LaunchParam::Dims => true,
                LaunchParam::TensorMap(m) => {
                    let rank = m.sizes.len();
                    m.buffer < buffers
                        && (1..=5).contains(&rank)
                        && m.strides.len() + 1 == rank
                        && m.boxes.len() == rank
                        && m.boxes.iter().all(|b| (1..=256).contains(b))
                        && [0, 32, 64, 128].contains(&m.swizzle)
                        && m.sizes.iter().chain(&m.strides).all(positive)
                }
            };
            f.check(ok, || format!("kernel {s}: a parameter of `{}` makes no sense", l.function));
        }
    }
}

/// Products by a library stay within the kernel's buffers and its scratch memory, and write none that the kernel reads.
fn by_library(k: &Kernel, envs: &[Vec<u64>], f: &mut Faults) {
    let (s, Some(library)) = (&k.symbol, &k.library) else { return };
    f.check(!k.launches.is_empty() && !library.products.is_empty(), || {
        format!("kernel {s}: a library goes with products, and beside launches")
    });
    let sizes: Vec<&Expr> = k.operands.iter().chain(&k.results).collect();
    for (i, p) in library.products.iter().enumerate() {
        let inside = |env: &Vec<u64>| -> Option<bool> {
            let runs = p.runs(env).ok()?;
            let rows = p.rows.eval(env).ok().filter(|n| *n > 0)?;
            let [left, right, to] = p.touches(rows)?;
            let size = |b: u32| sizes.get(b as usize)?.eval(env).ok();
            let target = match p.to.buffer {
                Some(b) => size(b).filter(|_| b as usize >= k.operands.len())?,
                None => k.scratch_bytes.eval(env).ok()?,
            };
            let scale = p.scale.map_or(Some(4), size)?;
            let fits = left <= size(p.left.buffer)? && right <= size(p.right.buffer)? && to <= target && scale >= 4;
            Some(fits || !runs)
        };
        let ok = p.is_aligned() && envs.iter().all(|env| inside(env) == Some(true));
        f.check(ok, || format!("kernel {s}: product {i} by a library leaves its buffers, or makes no sense"));
    }
}

fn entry(plan: &Plan, e: &Entry, envs: &[Vec<u64>], f: &mut Faults) {
    let at = &e.name;
    inputs(e, envs, f);
    loops(plan, e, envs, f);
    if let Some(slot) = e.prepares() {
        f.check(e.inputs.is_empty(), || format!("{at}: a preparation takes no inputs"));
        f.check(slot.is_none_or(|s| plan.slots().contains(&s)), || format!("{at}: no parameter belongs to that slot"));
    }
    let mut ready = vec![];
    // One buffer for one memory: whether steps may run side by side is seen from the numbers of their buffers.
    let mut named = BTreeSet::new();
    for (i, b) in e.buffers.iter().enumerate() {
        let outside = matches!(b.kind, BufferKind::Input(_) | BufferKind::Param(_));
        f.check(!outside || named.insert(b.kind), || {
            format!("{at}: buffer {i} ({}) names the same as another", b.name)
        });
        let size = values(&b.bytes, envs);
        let (same, is_ready) = match b.kind {
            BufferKind::Input(j) => (e.inputs.get(j as usize).map(|x| values(&dense(x.dtype, &x.shape), envs)), true),
            BufferKind::Param(j) => (plan.params.get(j as usize).map(|p| values(&p.bytes, envs)), true),
            BufferKind::Arena | BufferKind::Output => (Some(size.clone()), false),
        };
        f.check(size.is_some() && same == Some(size), || {
            format!("{at}: buffer {i} ({}) does not have the size of what it names", b.name)
        });
        ready.push(is_ready);
    }
    if e.prepares().is_none() {
        for b in &e.buffers {
            if let BufferKind::Param(p) = b.kind {
                let here = plan.params.get(p as usize).is_none_or(|p| p.residency != Residency::PrepareOnly);
                f.check(here, || format!("{at}: buffer of parameter {p} ({}), which only preparations have", b.name));
            }
        }
    }
    for (i, s) in e.steps.iter().enumerate() {
        let Some(k) = plan.kernels.get(s.kernel as usize) else {
            f.add(|| format!("{at}: step {i} names kernel {}, which does not exist", s.kernel));
            continue;
        };
        let n = k.operands.len();
        if s.buffers.len() != n + k.results.len() {
            f.add(|| {
                format!(
                    "{at}: step {i} gives {} buffers to {}, which takes {}",
                    s.buffers.len(),
                    k.symbol,
                    n + k.results.len()
                )
            });
            continue;
        }
        for (j, b) in s.buffers.iter().enumerate() {
            let Some(buffer) = e.buffers.get(*b as usize) else {
                f.add(|| format!("{at}: step {i} names buffer {b}, which does not exist"));
                continue;
            };
            let need = if j < n { &k.operands[j] } else { &k.results[j - n] };
            let inside = e.loops.iter().find(|l| (l.first..l.last).contains(&(i as u64)));
            let fits = match inside {
                Some(l) => fits_window(l, *b, need, &buffer.bytes, envs),
                None => values(need, envs)
                    .zip(values(&buffer.bytes, envs))
                    .is_some_and(|(x, y)| x.iter().zip(&y).all(|(x, y)| x <= y)),
            };
            f.check(fits, || {
                format!("{at}: step {i}: buffer {b} ({}) is smaller than {} needs", buffer.name, k.symbol)
            });
            if j < n {
                f.check(ready[*b as usize], || {
                    format!("{at}: step {i} reads buffer {b} ({}) before it is written", buffer.name)
                });
                continue;
            }
            let writable = match buffer.kind {
                BufferKind::Input(_) => false,
                BufferKind::Param(p) => plan.params.get(p as usize).is_some_and(|p| p.residency == Residency::Owned),
                _ => true,
            };
            f.check(writable, || format!("{at}: step {i} writes buffer {b} ({}), which is read-only", buffer.name));
            let shared = s.buffers[..n]
                .iter()
                .enumerate()
                .any(|(o, x)| x == b && k.aliases.get(j - n).copied().flatten() != Some(o as u32))
                || s.buffers[n..j].contains(b);
            f.check(!shared, || format!("{at}: step {i} overwrites buffer {b} ({}) while it is in use", buffer.name));
            ready[*b as usize] = true;
        }
    }
    let mut names = BTreeSet::new();
    for o in &e.outputs {
        f.check(!o.name.is_empty() && names.insert(&o.name), || {
            format!("{at}: output `{}` occurs twice or has no name", o.name)
        });
        f.check(o.shape.len() <= MAX_RANK, || format!("{at}: output `{}` has rank {}", o.name, o.shape.len()));
        let size = values(&dense(o.dtype, &o.shape), envs);
        let ok = e.buffers.get(o.buffer as usize).is_some_and(|b| {
            ready[o.buffer as usize]
                && size.is_some()
                && size == values(&b.bytes, envs)
                && matches!(b.kind, BufferKind::Output | BufferKind::Param(_))
        });
        f.check(ok, || format!("{at}: output `{}` is no buffer that is written and kept, of its size", o.name));
    }
}

/// The rows of windows at which sizes are compared.
fn rows_of(l: &Loop, all: u64) -> impl Iterator<Item = u64> {
    let most = l.chunk.min(all);
    [1, 2, 3, 5, 17, most / 2, most.saturating_sub(1), most].into_iter().filter(move |n| *n >= 1 && *n <= most)
}

/// Whether what a kernel needs in a window lies within the buffer (or, for one that moves, within the window's rows).
fn fits_window(l: &Loop, b: u32, need: &Expr, bytes: &Expr, envs: &[Vec<u64>]) -> bool {
    let moved = l.windows.iter().find(|w| w.buffer == b);
    envs.iter().all(|env| {
        let all = env.get(l.symbol as usize).copied().unwrap_or(0);
        rows_of(l, all).all(|n| {
            let mut window = env.clone();
            if let Some(x) = window.get_mut(l.symbol as usize) {
                *x = n;
            }
            let have = match moved {
                Some(w) => w.row_bytes.eval(env).ok().and_then(|r| r.checked_mul(n)),
                None => bytes.eval(env).ok(),
            };
            need.eval(&window).ok().zip(have).is_some_and(|(need, have)| need <= have)
        })
    })
}

fn loops(plan: &Plan, e: &Entry, envs: &[Vec<u64>], f: &mut Faults) {
    let at = &e.name;
    f.check(e.loops.is_empty() || e.prepares().is_none(), || format!("{at}: a preparation has no loops"));
    let mut end = 0;
    for (i, l) in e.loops.iter().enumerate() {
        f.check(l.first >= end && l.first < l.last && l.last <= e.steps.len() as u64 && l.chunk > 0, || {
            format!("{at}: loop {i} over steps {}..{} by {} is none", l.first, l.last, l.chunk)
        });
        end = end.max(l.last);
        let free = plan.symbols.get(l.symbol as usize).is_some_and(|s| s.value.is_none());
        let alone = plan.symbols.iter().all(|s| s.value.as_ref().is_none_or(|v| !v.symbols().contains(&l.symbol)));
        f.check(free && alone, || format!("{at}: loop {i} cuts a symbol that others depend on"));
        let sized = plan.params.iter().any(|p| p.bytes.symbols().contains(&l.symbol));
        f.check(!sized, || format!("{at}: loop {i} cuts a symbol that a parameter has as its size"));
        let mut seen = BTreeSet::new();
        for w in &l.windows {
            let rows = Expr::Sym(l.symbol).mul(w.row_bytes.clone());
            let ok = seen.insert(w.buffer)
                && !w.row_bytes.symbols().contains(&l.symbol)
                && e.buffers.get(w.buffer as usize).is_some_and(|b| {
                    let whole = values(&b.bytes, envs);
                    whole.is_some() && whole == values(&rows, envs)
                });
            f.check(ok, || format!("{at}: loop {i} cannot move through buffer {}", w.buffer));
        }
    }
}

fn inputs(e: &Entry, envs: &[Vec<u64>], f: &mut Faults) {
    let at = &e.name;
    let mut names = BTreeSet::new();
    let by_name = |n: &str| e.inputs.iter().find(|x| x.name == n);
    for x in &e.inputs {
        let name = &x.name;
        f.check(!name.is_empty() && names.insert(name), || format!("{at}: input `{name}` occurs twice or has no name"));
        f.check(x.shape.len() <= MAX_RANK, || format!("{at}: input `{name}` has rank {}", x.shape.len()));
        f.check(x.shape.iter().all(|d| values(d, envs).is_some()), || {
            format!("{at}: input `{name}` has a dimension without value")
        });
        let vector = |x: &crate::types::Input| x.dtype == DType::I32 && x.shape.len() == 1;
        f.check(x.checks.is_empty() || x.dtype == DType::I32, || {
            format!("{at}: input `{name}` is not i32 and cannot be checked")
        });
        for c in &x.checks {
            let ok = match c {
                Check::Range(e) => values(e, envs).is_some(),
                Check::Distinct => x.checks.iter().any(|c| matches!(c, Check::Range(_))),
                Check::Segments(e) => vector(x) && values(e, envs).is_some(),
                Check::Span { start, total } => {
                    vector(x)
                        && values(total, envs).is_some()
                        && by_name(start)
                            .is_some_and(|s| vector(s) && values(&s.shape[0], envs) == values(&x.shape[0], envs))
                }
                Check::Covers(segments) => {
                    vector(x)
                        && by_name(segments).is_some_and(|s| {
                            vector(s) && values(&s.shape[0], envs) == values(&x.shape[0].clone().add(1), envs)
                        })
                }
            };
            f.check(ok, || format!("{at}: a check of input `{name}` makes no sense"));
        }
    }
}
