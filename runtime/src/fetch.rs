//! Fetching into a worker's cache what its next tasks will read, while it waits.
#![allow(unsafe_code)]

/// Bytes of a cache line.
const LINE: usize = 64;

/// Stretches of memory in a [`Window`].
pub const STRETCHES: usize = 4;

/// What a worker will read after a wave: a hint, never read here, so the addresses need not be valid.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Window {
    /// Bytes that the worker reads before these, counted from the start of the run.
    pub from: u64,
    /// Address and bytes, in the order of use.
    pub stretches: [(usize, usize); STRETCHES],
}

/// How far a worker has fetched what it will read.
pub(crate) struct Ahead {
    /// Bytes fetched since the start of the run.
    done: u64,
    window: Window,
    /// The stretch at work, and how much of it is fetched.
    at: usize,
    within: usize,
}

impl Default for Ahead {
    fn default() -> Ahead {
        Ahead { done: 0, window: Window::default(), at: STRETCHES, within: 0 }
    }
}

impl Ahead {
    /// Takes the next window, and skips what the last one had of it.
    pub(crate) fn turn(&mut self, window: Window) {
        self.window = window;
        let w = &self.window;
        let all: u64 = w.stretches.iter().map(|s| s.1 as u64).sum();
        let skip = self.done.checked_sub(w.from).filter(|n| *n <= all).unwrap_or(0);
        self.done = w.from + skip;
        (self.at, self.within) = (0, skip as usize);
        while self.at < STRETCHES && self.within >= w.stretches[self.at].1 {
            self.within -= w.stretches[self.at].1;
            self.at += 1;
        }
    }

    /// Fetches a line. False when there is nothing left.
    pub(crate) fn fetch(&mut self) -> bool {
        let Some((start, bytes)) = self.window.stretches.get(self.at) else { return false };
        prefetch(start.wrapping_add(self.within));
        self.within += LINE;
        self.done += LINE as u64;
        if self.within >= *bytes {
            self.done -= (self.within - bytes) as u64;
            self.within = 0;
            self.at += 1;
            while self.window.stretches.get(self.at).is_some_and(|s| s.1 == 0) {
                self.at += 1;
            }
        }
        true
    }
}

#[cfg(target_arch = "x86_64")]
fn prefetch(address: usize) {
    // SAFETY: a prefetch is a hint: it has no effect but on caches, whatever the address.
    unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(address as *const i8) };
}

#[cfg(not(target_arch = "x86_64"))]
fn prefetch(_: usize) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fetches_every_line_of_a_window_once() {
        let mut ahead = Ahead::default();
        let lines = |ahead: &mut Ahead| (0..).take_while(|_| ahead.fetch()).count();
        assert_eq!(lines(&mut ahead), 0);
        ahead.turn(Window { from: 0, stretches: [(0, 640), (0, 0), (4096, 64), (0, 0)] });
        assert!(ahead.fetch() && ahead.fetch());
        // The next window begins one line later: nothing of it is left out, nothing fetched twice.
        ahead.turn(Window { from: 64, stretches: [(64, 576), (4096, 64), (8192, 100), (0, 0)] });
        assert_eq!(lines(&mut ahead), 8 + 1 + 2);
        assert_eq!(ahead.done, 64 + 576 + 64 + 100);
        ahead.turn(Window { from: 640, stretches: [(4096, 64), (8192, 100), (0, 0), (0, 0)] });
        assert_eq!(lines(&mut ahead), 0);
        // A new run begins at the front.
        ahead.turn(Window { from: 0, stretches: [(0, 64), (0, 0), (0, 0), (0, 0)] });
        assert_eq!(lines(&mut ahead), 1);
    }
}
