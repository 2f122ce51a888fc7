//! The thread pool: the caller is worker 0, the others spin for about a millisecond after the last launch, then park.
//!
//! Launches that do not depend on each other are run together: their tasks stand in one line, of which every worker gets an equal stretch. It claims its
//! own in falling pieces and then helps the others with theirs, so a worker whose core was taken away holds up only what it has claimed, and never a
//! launch it has not joined. Which worker computes which task does not reach the result: kernels fix what a task is.
//!
//! A worker that waits fetches what its next tasks will read ([`crate::fetch`]): memory works on while a launch of one task runs or a launch ends.
#![allow(unsafe_code)]

use crate::error::{Result, RuntimeError};
use crate::fetch::{Ahead, STRETCHES, Window};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering, fence};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

/// A compiled kernel; see [`pleach_plan::Kernel`].
pub type KernelFn = unsafe extern "C" fn(*const *mut u8, *const i64, i64, i64, *mut u8);

/// One launch. All pointers must stay valid until [`Pool::run`] returns.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// Code.
    pub kernel: KernelFn,
    /// Operands, then results.
    pub buffers: *const *mut u8,
    /// Values of the symbols.
    pub dims: *const i64,
    /// Number of tasks.
    pub tasks: u64,
    /// Scratch of worker 0.
    pub scratch: *mut u8,
    /// Distance of the scratch of two workers, bytes.
    pub scratch_stride: usize,
}

/// Low bits of a word count tasks, the others launches.
const INDEX_BITS: u32 = 24;
const INDEX_MASK: u64 = (1 << INDEX_BITS) - 1;
/// The index of a launch that is being written.
const CLOSED: u64 = INDEX_MASK;
/// Tasks of one published launch; longer ones are published in pieces.
const PIECE: u64 = INDEX_MASK - 1;
/// How long a worker without work spins before it parks.
const SPIN: Duration = Duration::from_millis(1);

/// A worker's stretch of the tasks that are being worked on, and what they belong to. All of it is written by worker 0.
#[repr(align(128))]
#[derive(Default)]
struct Desk {
    /// `(launch << INDEX_BITS) | next task`.
    word: AtomicU64,
    /// One past the last task.
    end: AtomicU64,
    /// The launches, in the order of the tasks.
    launches: AtomicPtr<Launch>,
    count: AtomicUsize,
    /// The number of task 0 of this piece.
    base: AtomicU64,
    from: AtomicU64,
    stretches: [(AtomicUsize, AtomicUsize); STRETCHES],
}

impl Desk {
    fn window(&self) -> Window {
        let stretches = std::array::from_fn(|i| {
            let (at, bytes) = &self.stretches[i];
            (at.load(Ordering::Relaxed), bytes.load(Ordering::Relaxed))
        });
        Window { from: self.from.load(Ordering::Relaxed), stretches }
    }
}

/// Tasks that a worker has finished since the pool was made; written by the worker.
#[repr(align(128))]
#[derive(Default)]
struct Done(AtomicU64);

#[derive(Default)]
struct Shared {
    desks: Vec<Desk>,
    done: Vec<Done>,
    stop: AtomicBool,
    asleep: Vec<AtomicBool>,
}

/// Persistent worker threads.
pub struct Pool {
    shared: Arc<Shared>,
    handles: Vec<JoinHandle<()>>,
    threads: Vec<Thread>,
    launch: u64,
    /// Tasks published since the pool was made.
    published: u64,
    ahead: Ahead,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pool({} threads)", self.threads())
    }
}

impl Pool {
    /// A pool of `threads` workers in all, the caller among them; 0 means one per core that this process may use.
    ///
    /// # Errors
    /// [`RuntimeError::Io`] when threads cannot be started.
    pub fn new(threads: usize) -> Result<Pool> {
        let n = match threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            n => n.min(1024),
        };
        let shared = Arc::new(Shared {
            desks: (0..n).map(|_| Desk::default()).collect(),
            done: (0..n).map(|_| Done::default()).collect(),
            asleep: (1..n).map(|_| AtomicBool::new(false)).collect(),
            ..Shared::default()
        });
        let mut pool =
            Pool { shared, handles: vec![], threads: vec![], launch: 0, published: 0, ahead: Ahead::default() };
        for id in 1..n {
            let s = pool.shared.clone();
            let h = std::thread::Builder::new()
                .name(format!("pleach-{id}"))
                .spawn(move || worker(&s, id))
                .map_err(RuntimeError::io("starting a worker thread; ask for fewer threads"))?;
            pool.threads.push(h.thread().clone());
            pool.handles.push(h);
        }
        Ok(pool)
    }

    /// Number of workers, the caller among them.
    pub fn threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Runs all tasks of these launches, in any order, and returns when they are finished. `windows`: for each worker what it
    /// will read in later runs; or nothing.
    ///
    /// # Safety
    /// Everything a launch points at must be valid for what the kernel does with it, on any thread, until this
    /// returns; every worker's scratch too. No launch may write what another one reads or writes.
    pub unsafe fn run(&mut self, launches: &[Launch], windows: &[Window]) {
        let tasks = launches.iter().fold(0u64, |n, l| n.saturating_add(l.tasks));
        if self.threads.is_empty() || tasks <= 1 {
            for l in launches.iter().filter(|l| l.tasks > 0) {
                // SAFETY: promised by the caller.
                unsafe { (l.kernel)(l.buffers, l.dims, 0, l.tasks as i64, l.scratch) };
            }
            return;
        }
        let mut base = 0;
        while base < tasks {
            let piece = (tasks - base).min(PIECE);
            self.publish(launches, windows, base, piece);
            self.wake();
            let s = &*self.shared;
            join(s, 0, self.launch);
            self.ahead.turn(s.desks[0].window());
            let mut turns = 0u32;
            while s.done.iter().fold(0u64, |n, d| n.wrapping_add(d.0.load(Ordering::Acquire))) != self.published {
                turns += 1;
                if !self.ahead.fetch() {
                    // A worker holds tasks but not its core: let it have this one.
                    if turns.is_multiple_of(4096) { std::thread::yield_now() } else { std::hint::spin_loop() }
                }
            }
            base += piece;
        }
    }

    /// Lays tasks `base..base + piece` of the launches on the desks.
    fn publish(&mut self, launches: &[Launch], windows: &[Window], base: u64, piece: u64) {
        self.launch = self.launch.wrapping_add(1 << INDEX_BITS);
        self.published = self.published.wrapping_add(piece);
        let desks = &self.shared.desks;
        let share = |i: usize| piece * i as u64 / desks.len() as u64;
        // Closed first, all of them: a worker that reads a mixture of two launches must fail to claim from either.
        for d in desks {
            d.word.store(self.launch | CLOSED, Ordering::Release);
        }
        fence(Ordering::SeqCst);
        for (i, d) in desks.iter().enumerate() {
            d.launches.store(launches.as_ptr().cast_mut(), Ordering::Release);
            d.count.store(launches.len(), Ordering::Release);
            d.base.store(base, Ordering::Release);
            d.end.store(share(i + 1), Ordering::Release);
            let w = windows.get(i).copied().unwrap_or_default();
            d.from.store(w.from, Ordering::Relaxed);
            for (to, (at, bytes)) in d.stretches.iter().zip(w.stretches) {
                to.0.store(at, Ordering::Relaxed);
                to.1.store(bytes, Ordering::Relaxed);
            }
            d.word.store(self.launch | share(i), Ordering::Release);
        }
    }

    /// Wakes the workers before the first launch of a run, so that they are there for it.
    pub fn wake(&self) {
        fence(Ordering::SeqCst);
        for (a, t) in self.shared.asleep.iter().zip(&self.threads) {
            if a.load(Ordering::Relaxed) && a.swap(false, Ordering::SeqCst) {
                t.unpark();
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for t in &self.threads {
            t.unpark();
        }
        for h in self.handles.drain(..) {
            let _ = h.join();
        }
    }
}

/// Claims and runs tasks of the launch with this number until none is left: first those of the own desk.
fn join(s: &Shared, id: usize, launch: u64) {
    let n = s.desks.len();
    for desk in (0..n).map(|i| &s.desks[(id + i) % n]) {
        loop {
            let t = desk.word.load(Ordering::Acquire);
            if t & !INDEX_MASK != launch {
                return;
            }
            if t & INDEX_MASK == CLOSED {
                break;
            }
            let (launches, count) = (desk.launches.load(Ordering::Acquire), desk.count.load(Ordering::Acquire));
            let (base, end) = (desk.base.load(Ordering::Acquire), desk.end.load(Ordering::Acquire));
            let first = t & INDEX_MASK;
            if first >= end {
                break;
            }
            let share = ((end - first) / 2).max(1);
            // Succeeds only while the launch is still this one; then everything read above belongs to it.
            if desk.word.compare_exchange(t, t + share, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                std::hint::spin_loop();
                continue;
            }
            // SAFETY: the launches are not finished before `done` counts these tasks, and `Pool::run` keeps the list and
            // all it points at valid until then.
            unsafe { run_range(std::slice::from_raw_parts(launches, count), id, base + first, base + first + share) };
            let done = &s.done[id].0;
            done.store(done.load(Ordering::Relaxed).wrapping_add(share), Ordering::Release);
        }
    }
}

/// Runs the tasks `first..last` of launches that stand in one line.
///
/// # Safety
/// As [`Pool::run`].
unsafe fn run_range(launches: &[Launch], id: usize, first: u64, last: u64) {
    let mut start = 0;
    for l in launches {
        let (a, b) = (first.max(start), last.min(start + l.tasks));
        if a < b {
            // SAFETY: promised by the caller; the scratch of worker `id` lies `id` strides on.
            unsafe {
                let scratch = l.scratch.wrapping_add(id * l.scratch_stride);
                (l.kernel)(l.buffers, l.dims, (a - start) as i64, (b - start) as i64, scratch);
            }
        }
        start += l.tasks;
    }
}

fn worker(s: &Shared, id: usize) {
    let (asleep, desk) = (&s.asleep[id - 1], &s.desks[id]);
    let (mut seen, mut ahead) = (0u64, Ahead::default());
    loop {
        let (mut turns, mut since) = (0u32, None);
        loop {
            if s.stop.load(Ordering::Relaxed) {
                return;
            }
            let t = desk.word.load(Ordering::Acquire);
            if t & !INDEX_MASK != seen && t & INDEX_MASK != CLOSED {
                seen = t & !INDEX_MASK;
                break;
            }
            if !ahead.fetch() {
                std::hint::spin_loop();
            }
            turns = turns.wrapping_add(1);
            if turns.is_multiple_of(256) && since.get_or_insert_with(Instant::now).elapsed() > SPIN {
                asleep.store(true, Ordering::SeqCst);
                fence(Ordering::SeqCst);
                // A launch published in between has either been seen here or sees the flag.
                let t = desk.word.load(Ordering::SeqCst);
                if t & !INDEX_MASK == seen && !s.stop.load(Ordering::SeqCst) {
                    std::thread::park();
                }
                asleep.store(false, Ordering::SeqCst);
                since = None;
            }
        }
        join(s, id, seen);
        ahead.turn(desk.window());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Adds 1 to every task's cell, and the worker's mark to its scratch.
    unsafe extern "C" fn count(buffers: *const *mut u8, dims: *const i64, first: i64, last: i64, scratch: *mut u8) {
        // SAFETY: the test gives a vector with a cell for each task, one dimension, and scratch for each worker.
        unsafe {
            let cells = (*buffers).cast::<u64>();
            for i in first..last {
                *cells.add(i as usize) += *dims as u64;
            }
            *scratch.cast::<u64>() += (last - first) as u64;
        }
    }

    #[test]
    fn runs_every_task_once_with_any_number_of_threads() {
        for threads in [1, 2, 3, 8] {
            let mut pool = Pool::new(threads).unwrap();
            assert_eq!(pool.threads(), threads);
            let mut scratch = vec![0u64; threads * 8];
            let mut expected = 0;
            for (round, tasks) in [1u64, 2, 7, 64, 1000, 0, 33].into_iter().cycle().take(3000).enumerate() {
                let mut cells = vec![0u64; tasks as usize];
                let buffers = [cells.as_mut_ptr().cast::<u8>()];
                let dims = [round as i64 + 1];
                let l = Launch {
                    kernel: count,
                    buffers: buffers.as_ptr(),
                    dims: dims.as_ptr(),
                    tasks,
                    scratch: scratch.as_mut_ptr().cast(),
                    scratch_stride: 64,
                };
                // SAFETY: everything lives until the call returns.
                unsafe { pool.run(&[l], &[]) };
                assert!(cells.iter().all(|c| *c == round as u64 + 1), "round {round} of {tasks} tasks");
                expected += tasks;
                if round % 700 == 0 {
                    std::thread::sleep(Duration::from_millis(3));
                }
            }
            assert_eq!(scratch.iter().sum::<u64>(), expected);
        }
    }

    #[test]
    fn runs_launches_together() {
        let mut pool = Pool::new(3).unwrap();
        for round in 0..500u64 {
            let mut cells: Vec<Vec<u64>> = [3, 0, 17, 1 + round % 40].map(|n| vec![0; n as usize]).to_vec();
            let buffers: Vec<*mut u8> = cells.iter_mut().map(|c| c.as_mut_ptr().cast()).collect();
            let mut scratch = [0u64; 24];
            let dims = [1i64];
            let list: Vec<Launch> = cells
                .iter()
                .zip(&buffers)
                .map(|(c, b)| Launch {
                    kernel: count,
                    buffers: b,
                    dims: dims.as_ptr(),
                    tasks: c.len() as u64,
                    scratch: scratch.as_mut_ptr().cast(),
                    scratch_stride: 64,
                })
                .collect();
            // What is fetched beforehand need not be there.
            let window = |i: u64| Window {
                from: 1000 * (round % 7) + i,
                stretches: [(64, 300), (0, 0), (usize::MAX - 100, 1000), (buffers[2] as usize, 17)],
            };
            let windows = [window(0), window(1), window(2)];
            // SAFETY: everything lives until the call returns, and the launches write to vectors of their own.
            unsafe { pool.run(&list, if round % 3 == 0 { &[] } else { &windows }) };
            assert!(cells.iter().flatten().all(|c| *c == 1), "round {round}: {cells:?}");
        }
    }

    #[test]
    fn publishes_very_long_launches_in_pieces() {
        unsafe extern "C" fn sum(buffers: *const *mut u8, _: *const i64, first: i64, last: i64, _: *mut u8) {
            // SAFETY: the test gives one atomic cell.
            let cell = unsafe { &*(*buffers).cast::<AtomicU64>() };
            cell.fetch_add((first..last).map(|i| i as u64 & 1).sum(), Ordering::Relaxed);
        }
        let mut pool = Pool::new(2).unwrap();
        let cell = AtomicU64::new(0);
        let buffers = [(&raw const cell).cast_mut().cast::<u8>()];
        let tasks = 2 * PIECE + 10;
        let l = Launch {
            kernel: sum,
            buffers: buffers.as_ptr(),
            dims: std::ptr::null(),
            tasks,
            scratch: std::ptr::null_mut(),
            scratch_stride: 0,
        };
        // SAFETY: everything lives until the call returns; the kernel uses no dims and no scratch.
        unsafe { pool.run(&[l], &[]) };
        assert_eq!(cell.load(Ordering::Relaxed), tasks / 2);
    }
}
