//! Everything the pretended driver knows: memory, modules, and work that is still to be done.

use crate::cublaslt::{Descriptions, Product};
use crate::graphs::{Call, Exec, Graph, Node};
use crate::properties::{Properties, VARIABLE};
use pleach_ptx_sim::{Checks, Kernel, Launch, Memory, Mode, Module, Ptr};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::io::Write;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

/// What a function gives: nothing, or the number of an error.
pub(crate) type Answer = Result<(), u32>;

pub(crate) const INVALID_VALUE: u32 = 1;
pub(crate) const OUT_OF_MEMORY: u32 = 2;
pub(crate) const NOT_INITIALIZED: u32 = 3;
pub(crate) const NO_DEVICE: u32 = 100;
pub(crate) const INVALID_DEVICE: u32 = 101;
pub(crate) const INVALID_CONTEXT: u32 = 201;
pub(crate) const NO_BINARY: u32 = 209;
pub(crate) const INVALID_PTX: u32 = 218;
pub(crate) const UNSUPPORTED_PTX: u32 = 222;
pub(crate) const INVALID_HANDLE: u32 = 400;
pub(crate) const NOT_FOUND: u32 = 500;
pub(crate) const NOT_READY: u32 = 600;
pub(crate) const ILLEGAL_ADDRESS: u32 = 700;
pub(crate) const LAUNCH_FAILED: u32 = 719;
pub(crate) const NOT_SUPPORTED: u32 = 801;
const CAPTURING: u32 = 900;

/// The only context.
pub(crate) const CONTEXT: usize = 0x0c0d_e000;

/// Dynamic shared memory without asking.
const SHARED: u32 = 48 << 10;

/// Microseconds of launches that no property names.
const OTHERS: f64 = 10.0;

/// Seconds since the first call.
fn seconds() -> f64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_secs_f64()
}

thread_local! {
    /// Whether the context is current in this thread.
    pub(crate) static CURRENT: Cell<bool> = const { Cell::new(false) };
}

/// A function of a loaded module.
#[derive(Debug)]
pub(crate) struct Function {
    pub(crate) module: usize,
    pub(crate) kernel: Kernel,
    /// Dynamic shared memory that was asked for.
    pub(crate) shared: u32,
}

/// Something to be done on a stream. Host addresses are numbers: they are followed when it is done.
#[derive(Debug)]
pub(crate) enum Work {
    ToDevice {
        to: u64,
        from: usize,
        bytes: usize,
    },
    /// Bytes that were copied when the call was made, as the driver does with memory that is not pinned.
    Bytes {
        to: u64,
        bytes: Vec<u8>,
    },
    ToHost {
        to: usize,
        from: u64,
        bytes: usize,
    },
    Set {
        at: u64,
        value: u8,
        bytes: usize,
    },
    Run(Box<Node>),
    Record(usize),
}

#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) properties: Properties,
    pub(crate) started: bool,
    calls: BTreeMap<String, u64>,
    pub(crate) memory: Memory,
    /// Allocations on the device, by address: bytes.
    pub(crate) given: BTreeMap<u64, u64>,
    pub(crate) used: u64,
    /// Pinned memory of the host: address and bytes.
    pub(crate) pinned: BTreeMap<usize, Box<[u8]>>,
    pub(crate) modules: BTreeMap<usize, Module>,
    pub(crate) functions: BTreeMap<usize, Function>,
    pub(crate) streams: BTreeMap<usize, ()>,
    /// When an event was reached, in seconds of one clock; none for one that was not.
    pub(crate) events: BTreeMap<usize, Option<f64>>,
    /// Seconds of launches so far, where the properties say how long they take.
    clock: f64,
    pub(crate) graphs: BTreeMap<usize, Graph>,
    pub(crate) execs: BTreeMap<usize, Exec>,
    /// Streams whose work becomes a graph, with its nodes so far.
    pub(crate) captures: BTreeMap<usize, Vec<Node>>,
    /// What cuBLASLt was told.
    pub(crate) told: Descriptions,
    queue: Vec<Work>,
    /// After a fault everything fails.
    lost: Option<u32>,
    next: usize,
}

// SAFETY: addresses of the host are numbers here, and every access happens under the lock of `state`.
unsafe impl Send for State {}

/// The state, locked.
pub(crate) fn state() -> MutexGuard<'static, State> {
    static STATE: OnceLock<Mutex<State>> = OnceLock::new();
    let make = || {
        let text = std::env::var(VARIABLE).unwrap_or_default();
        let properties = Properties::parse(&text).unwrap_or_else(|e| {
            say(&e);
            std::process::abort()
        });
        Mutex::new(State { properties, next: 0x1000, ..State::default() })
    };
    STATE.get_or_init(make).lock().unwrap_or_else(PoisonError::into_inner)
}

#[allow(clippy::print_stderr, reason = "there is no other way to the reader of a test's output")]
pub(crate) fn say(text: &str) {
    eprintln!("fake driver: {text}");
}

impl State {
    /// A number that no other handle has.
    pub(crate) fn handle(&mut self) -> usize {
        self.next += 0x10;
        self.next
    }

    /// Counts a call; fails where the properties say so, and where a context is needed and missing.
    pub(crate) fn enter(&mut self, function: &str, needs_context: bool) -> Answer {
        let n = self.calls.entry(function.into()).or_default();
        *n += 1;
        let n = *n;
        if let Some(f) = self.properties.failures.iter().find(|f| f.function == function && f.call == n) {
            return Err(f.code);
        }
        if !self.started && function != "cuInit" {
            return Err(NOT_INITIALIZED);
        }
        if needs_context {
            if !CURRENT.get() {
                return Err(INVALID_CONTEXT);
            }
            if let Some(e) = self.lost {
                return Err(e);
            }
        }
        Ok(())
    }

    pub(crate) fn log(&self, line: &str) {
        let Some(path) = &self.properties.log else { return };
        let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
        if let Err(e) = file.and_then(|mut f| writeln!(f, "{line}")) {
            say(&format!("{}: {e}", path.display()));
        }
    }

    pub(crate) fn push(&mut self, stream: usize, work: Work) -> Answer {
        if !self.streams.contains_key(&stream) {
            return Err(INVALID_HANDLE);
        }
        if let Some(nodes) = self.captures.get_mut(&stream) {
            let Work::Run(node) = work else { return Err(CAPTURING) };
            nodes.push(*node);
            return Ok(());
        }
        self.queue.push(work);
        if self.properties.at_once { self.flush() } else { Ok(()) }
    }

    /// Does everything that was asked for.
    pub(crate) fn flush(&mut self) -> Answer {
        for w in std::mem::take(&mut self.queue) {
            if let Err(e) = self.lost.map_or(Ok(()), Err).and_then(|()| self.execute(w)) {
                self.lost = Some(e);
                return Err(e);
            }
        }
        self.lost.map_or(Ok(()), Err)
    }

    fn execute(&mut self, w: Work) -> Answer {
        let told = |r: Result<(), pleach_ptx_sim::SimError>| {
            r.map_err(|e| {
                say(&e.to_string());
                ILLEGAL_ADDRESS
            })
        };
        match w {
            Work::ToDevice { to, from, bytes } => {
                // SAFETY: the caller of the driver keeps the memory until the copy is done; it is pinned.
                let from = unsafe { std::slice::from_raw_parts(from as *const u8, bytes) };
                told(self.memory.write(Ptr(to), from))
            }
            Work::Bytes { to, bytes } => told(self.memory.write(Ptr(to), &bytes)),
            Work::ToHost { to, from, bytes } => {
                let data = self.memory.read_raw(Ptr(from), bytes).map_err(|e| {
                    say(&e.to_string());
                    ILLEGAL_ADDRESS
                })?;
                // SAFETY: the caller of the driver keeps the memory until the copy is done.
                unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), to as *mut u8, bytes) };
                Ok(())
            }
            Work::Set { at, value, bytes } => told(self.memory.write(Ptr(at), &vec![value; bytes])),
            Work::Record(event) => {
                let now = if self.properties.times.is_empty() { seconds() } else { self.clock };
                self.events.insert(event, Some(now));
                Ok(())
            }
            Work::Run(node) => self.node_now(&node),
        }
    }

    fn node_now(&mut self, node: &Node) -> Answer {
        match node {
            Node::Launch(call) => self.run(call),
            Node::Product(p) => {
                self.count("cublaslt");
                self.multiply(p).map_err(|e| {
                    say(&e);
                    ILLEGAL_ADDRESS
                })
            }
            Node::Child(nodes) => nodes.iter().try_for_each(|n| self.node_now(n)),
        }
    }

    fn multiply(&mut self, p: &Product) -> Result<(), String> {
        p.run(&mut self.memory).map_err(|e| format!("a product of {p:?}: {e}"))
    }

    /// Sets the clock forward by what a launch of that name takes.
    fn count(&mut self, name: &str) {
        let time = self.properties.times.iter().find(|(part, _)| name.contains(part.as_str()));
        self.clock += time.map_or(OTHERS, |t| t.1) * 1e-6;
    }

    fn run(&mut self, c: &Call) -> Answer {
        let name = self.functions.get(&c.function).ok_or(INVALID_HANDLE)?.kernel.name().to_string();
        self.count(&name);
        let f = self.functions.get(&c.function).ok_or(INVALID_HANDLE)?;
        let on = self.properties.checks;
        let launch = Launch {
            grid: c.grid,
            block: c.block,
            dynamic_shared: c.shared,
            params: &c.params,
            mode: if self.properties.at_once { Mode::AtOnce } else { Mode::Late },
            checks: Checks { races: on, uninitialised: on },
            ..Launch::default()
        };
        f.kernel.launch(&mut self.memory, launch).map(|_| ()).map_err(|e| {
            say(&e.to_string());
            LAUNCH_FAILED
        })
    }

    /// Dynamic shared memory that a launch of a function may have.
    pub(crate) fn shared_limit(f: &Function) -> u32 {
        f.shared.max(SHARED)
    }
}
