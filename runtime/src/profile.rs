//! Where the time of runs goes, by kernel and by launch. Off by default: a clock is read around every launch.

use crate::session::Session;
use pleach_plan::Plan;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Time of one kernel over all its launches.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KernelTime {
    /// Symbol of the kernel.
    pub symbol: String,
    /// Its class.
    pub class: String,
    /// Launches.
    pub calls: u64,
    /// Nanoseconds in all.
    pub ns: u64,
    /// Floating-point operations in all.
    pub flops: u64,
    /// Bytes moved at least, in all.
    pub bytes: u64,
}

/// Time of one step of an entry over all its launches; a step inside a loop is launched once a window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepTime {
    /// Number of the entry in the plan.
    pub entry: u32,
    /// Number of the step in the entry.
    pub step: u32,
    /// Launches.
    pub calls: u64,
    /// Nanoseconds in all.
    pub ns: u64,
    /// Nanoseconds of the shortest launch.
    pub least_ns: u64,
    /// Floating-point operations in all.
    pub flops: u64,
    /// Bytes moved at least, in all.
    pub bytes: u64,
}

/// One launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launched {
    /// Number of the entry in the plan.
    pub entry: u32,
    /// Number of the step in the entry.
    pub step: u32,
    /// Nanoseconds from the start of the measurement.
    pub start_ns: u64,
    /// Nanoseconds it took.
    pub ns: u64,
}

/// Launches of a timeline at most: later ones are counted, not kept.
pub const TIMELINE: usize = 1 << 17;

#[derive(Debug)]
pub(crate) struct Profile {
    began: Instant,
    /// Launches in a row of every step.
    pub(crate) times: u32,
    steps: BTreeMap<(u32, u32), StepTime>,
    timeline: Vec<Launched>,
}

impl Default for Profile {
    fn default() -> Profile {
        Profile { began: Instant::now(), times: 1, steps: BTreeMap::new(), timeline: vec![] }
    }
}

impl Profile {
    /// A launch that took `time` and has just ended, of a step: number of its entry, and its number there.
    pub(crate) fn add(&mut self, plan: &Plan, step: (usize, usize), time: Duration, env: &[u64]) {
        let ns = time.as_nanos() as u64;
        let k = &plan.kernels[plan.entries[step.0].steps[step.1].kernel as usize];
        let (number, step) = (step.0 as u32, step.1 as u32);
        let first = StepTime { entry: number, step, least_ns: u64::MAX, ..StepTime::default() };
        let t = self.steps.entry((number, step)).or_insert(first);
        t.calls += 1;
        t.ns += ns;
        t.least_ns = t.least_ns.min(ns);
        t.flops = t.flops.saturating_add(k.flops.eval(env).unwrap_or(0));
        t.bytes = t.bytes.saturating_add(k.bytes.eval(env).unwrap_or(0));
        if self.timeline.len() < TIMELINE {
            let start_ns = (self.began.elapsed().as_nanos() as u64).saturating_sub(ns);
            self.timeline.push(Launched { entry: number, step, start_ns, ns });
        }
    }
}

impl Session {
    /// Starts measuring anew, or stops.
    pub fn set_profile(&mut self, on: bool) {
        self.profile = on.then(Profile::default);
    }

    /// The same with every step launched so many times in a row, of which the mean counts. Steps that change what they read
    /// change it as often: for timing alone.
    pub fn set_profile_in_a_row(&mut self, times: u32) {
        self.profile = Some(Profile { times, ..Profile::default() });
    }

    /// What was measured since, by kernel, the longest first.
    pub fn profile(&self) -> Vec<KernelTime> {
        let plan = self.plan();
        let mut by_kernel: BTreeMap<u32, KernelTime> = BTreeMap::new();
        for t in self.step_times() {
            let number = plan.entries[t.entry as usize].steps[t.step as usize].kernel;
            let k = &plan.kernels[number as usize];
            let sum = by_kernel.entry(number).or_default();
            if sum.calls == 0 {
                (sum.symbol, sum.class) = (k.symbol.clone(), k.class.clone());
            }
            sum.calls += t.calls;
            sum.ns += t.ns;
            sum.flops = sum.flops.saturating_add(t.flops);
            sum.bytes = sum.bytes.saturating_add(t.bytes);
        }
        let mut v: Vec<KernelTime> = by_kernel.into_values().collect();
        v.sort_by(|a, b| b.ns.cmp(&a.ns).then_with(|| a.symbol.cmp(&b.symbol)));
        v
    }

    /// What was measured since, by step, in the plan's order.
    pub fn step_times(&self) -> Vec<StepTime> {
        self.profile.iter().flat_map(|p| p.steps.values().copied()).collect()
    }

    /// The launches since, in order: the first [`TIMELINE`] of them.
    pub fn timeline(&self) -> &[Launched] {
        self.profile.as_ref().map_or(&[], |p| &p.timeline)
    }
}
