//! Where the time of runs goes, by kernel. Off by default: a clock is read around every launch.

use crate::session::Session;
use pleach_plan::Kernel;
use std::time::Duration;

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

#[derive(Debug, Default)]
pub(crate) struct Profile(Vec<KernelTime>);

impl Profile {
    pub(crate) fn add(&mut self, kernel: u32, time: Duration, k: &Kernel, env: &[u64]) {
        let i = kernel as usize;
        if self.0.len() <= i {
            self.0.resize(i + 1, KernelTime::default());
        }
        let t = &mut self.0[i];
        if t.calls == 0 {
            (t.symbol, t.class) = (k.symbol.clone(), k.class.clone());
        }
        t.calls += 1;
        t.ns += time.as_nanos() as u64;
        t.flops = t.flops.saturating_add(k.flops.eval(env).unwrap_or(0));
        t.bytes = t.bytes.saturating_add(k.bytes.eval(env).unwrap_or(0));
    }
}

impl Session {
    /// Starts measuring anew, or stops.
    pub fn set_profile(&mut self, on: bool) {
        self.profile = on.then(Profile::default);
    }

    /// What was measured since, the longest first.
    pub fn profile(&self) -> Vec<KernelTime> {
        let mut v: Vec<KernelTime> =
            self.profile.iter().flat_map(|p| p.0.iter().filter(|t| t.calls > 0)).cloned().collect();
        v.sort_by(|a, b| b.ns.cmp(&a.ns).then_with(|| a.symbol.cmp(&b.symbol)));
        v
    }
}
