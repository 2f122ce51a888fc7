//! Launching the steps of an entry: waves in order, loops window by window.
#![allow(unsafe_code)]

use crate::device::{Address, Device, Work};
use crate::error::{Result, RuntimeError};
use crate::profile::Profile;
use crate::session::Bound;
use pleach_plan::{Entry, Loop, Plan};
use std::collections::BTreeMap;
use std::time::Instant;

/// Some steps with everything their launches need.
struct Part<'a> {
    plan: &'a Plan,
    entry: &'a Entry,
    bound: &'a Bound,
    /// First step and one past the last.
    steps: (usize, usize),
    /// Addresses of the steps' buffers, one step after another.
    pointers: &'a [Address],
    /// Tasks of the steps.
    tasks: &'a [u64],
    /// Values of the symbols.
    env: &'a [u64],
}

impl Part<'_> {
    /// # Safety
    /// Addresses and counts must be what the plan says; see [`Device::launch`].
    unsafe fn run(&self, device: &mut dyn Device, profile: &mut Option<Profile>) {
        let (first, last) = self.steps;
        let dims: Vec<i64> = self.env.iter().map(|v| *v as i64).collect();
        let at = self.bound.starts[first];
        let work = |i: usize| Work {
            kernel: self.entry.steps[i].kernel,
            buffers: &self.pointers[self.bound.starts[i] - at..self.bound.starts[i + 1] - at],
            tasks: self.tasks[i - first],
        };
        if let Some(p) = profile {
            for i in first..last {
                let kernel = self.entry.steps[i].kernel;
                let start = Instant::now();
                // SAFETY: promised by the caller.
                unsafe { device.launch(&[work(i)], &dims) };
                p.add(kernel, start.elapsed(), &self.plan.kernels[kernel as usize], self.env);
            }
            return;
        }
        let waves = &self.bound.waves;
        let mut wave = vec![];
        for i in first..last {
            wave.push(work(i));
            if i + 1 == last || waves[i + 1] != waves[i] {
                // SAFETY: promised by the caller; the steps of a wave touch nothing that another one of them writes.
                unsafe { device.launch(&wave, &dims) };
                wave.clear();
            }
        }
    }
}

/// Runs all steps of an entry.
///
/// # Errors
/// [`RuntimeError::Size`] when a count has no value, [`RuntimeError::Capacity`] when a window does not fit its buffers.
///
/// # Safety
/// The plan must be validated, `env` lie within the capacities that the arena was laid out for, `bound` hold live
/// addresses for every buffer, and index inputs be checked.
pub(crate) unsafe fn run_steps(
    device: &mut dyn Device,
    profile: &mut Option<Profile>,
    plan: &Plan,
    index: usize,
    bound: &Bound,
    env: &[u64],
) -> Result<()> {
    let entry = &plan.entries[index];
    let n = entry.steps.len();
    let mut i = 0;
    while i < n {
        if let Some(l) = entry.loops.iter().find(|l| l.first == i as u64) {
            // SAFETY: promised by the caller.
            unsafe { run_loop(device, profile, plan, entry, bound, env, l)? };
            i = l.last as usize;
            continue;
        }
        let next = entry.loops.iter().map(|l| l.first as usize).find(|f| *f > i).unwrap_or(n);
        let part = Part {
            plan,
            entry,
            bound,
            steps: (i, next),
            pointers: &bound.pointers[bound.starts[i]..bound.starts[next]],
            tasks: &bound.tasks[i..next],
            env,
        };
        // SAFETY: promised by the caller.
        unsafe { part.run(device, profile) };
        i = next;
    }
    Ok(())
}

/// # Safety
/// As [`run_steps`].
unsafe fn run_loop(
    device: &mut dyn Device,
    profile: &mut Option<Profile>,
    plan: &Plan,
    entry: &Entry,
    bound: &Bound,
    env: &[u64],
    l: &Loop,
) -> Result<()> {
    let (first, last) = (l.first as usize, l.last as usize);
    let all = env[l.symbol as usize];
    let row_bytes: BTreeMap<u32, u64> = l
        .windows
        .iter()
        .map(|w| Ok((w.buffer, w.row_bytes.eval(env)?)))
        .collect::<std::result::Result<_, pleach_plan::ExprError>>()?;
    let base = &bound.pointers[bound.starts[first]..bound.starts[last]];
    let numbers: Vec<u32> = entry.steps[first..last].iter().flat_map(|s| s.buffers.iter().copied()).collect();
    let mut start = 0;
    let mut window = env.to_vec();
    let mut tasks: Vec<u64> = vec![];
    let mut pointers = base.to_vec();
    while start < all {
        let rows = l.chunk.min(all - start);
        if window[l.symbol as usize] != rows || tasks.is_empty() {
            window[l.symbol as usize] = rows;
            tasks.clear();
            for s in &entry.steps[first..last] {
                tasks.push(plan.kernels[s.kernel as usize].tasks.eval(&window)?);
            }
            hold(plan, entry, l, env, &window, &row_bytes)?;
        }
        for ((p, from), b) in pointers.iter_mut().zip(base).zip(&numbers) {
            if let Some(bytes) = row_bytes.get(b) {
                *p = from.wrapping_add((start * bytes) as usize);
            }
        }
        let part = Part { plan, entry, bound, steps: (first, last), pointers: &pointers, tasks: &tasks, env: &window };
        // SAFETY: every window was held against its buffers; the rest is promised by the caller.
        unsafe { part.run(device, profile) };
        start += rows;
    }
    Ok(())
}

/// Holds the sizes that kernels need in a window against what they are given: exactly, for these counts.
fn hold(
    plan: &Plan,
    entry: &Entry,
    l: &Loop,
    env: &[u64],
    window: &[u64],
    row_bytes: &BTreeMap<u32, u64>,
) -> Result<()> {
    let rows = window[l.symbol as usize];
    for s in &entry.steps[l.first as usize..l.last as usize] {
        let k = &plan.kernels[s.kernel as usize];
        for (need, b) in k.operands.iter().chain(&k.results).zip(&s.buffers) {
            let have = match row_bytes.get(b) {
                Some(bytes) => bytes.saturating_mul(rows),
                None => entry.buffers[*b as usize].bytes.eval(env)?,
            };
            if need.eval(window)? > have {
                return Err(RuntimeError::Capacity(format!(
                    "{}: {} needs more than buffer {b} holds in a window of {rows} rows; the plan is damaged",
                    entry.name, k.symbol
                )));
            }
        }
    }
    Ok(())
}
