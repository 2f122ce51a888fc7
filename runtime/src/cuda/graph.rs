//! Whole entries as CUDA graphs, one for each range of counts.
//!
//! A graph is made at the upper end of its range: its grids are as large as any count of the range needs, and blocks past the
//! end leave early. Kernels read the actual counts from a table in memory of the device, a row for the entry and a row for every
//! window of its loops; a window past the end has no rows. Behind it lie tables of pointers, for launches over many buffers, which
//! are written once. So a replay is one copy of the table and one launch. Only tensor
//! maps hold counts themselves: where they depend on them, their nodes are set anew when counts change.

use super::args::{Args, Given, depends_on_counts, grid, table as pointers_of};
use super::code::{Code, launch, way};
use super::cublaslt::{Products, captured};
use super::driver::check;
use crate::device::Address;
use crate::error::Result;
use crate::launch::{Steps, row_bytes};
use cudarc::driver::sys::{self, CUDA_KERNEL_NODE_PARAMS, CUfunction, CUgraph, CUgraphExec, CUgraphNode, CUstream};
use pleach_plan::{ExprError, Launch};

/// Graphs that are kept at most.
const KEPT: usize = 32;

/// An entry at a range of counts.
#[derive(Debug)]
pub(crate) struct Graph {
    /// Index of the entry.
    entry: usize,
    /// Upper end of the range.
    env: Vec<u64>,
    graph: CUgraph,
    exec: CUgraphExec,
    /// The table of counts.
    pub(crate) dims: u64,
    /// What lies behind it: the tables of pointers of all launches that have one.
    pub(crate) pointers: Vec<u64>,
    /// First row of every loop's windows, and their number.
    windows: Vec<(usize, u64)>,
    /// Launches whose arguments depend on counts.
    moving: Vec<Moving>,
    /// Counts for which they are set.
    set_for: Vec<u64>,
    /// When it was last used.
    used: u64,
}

/// What nodes are made with.
pub(crate) struct Means<'a> {
    pub(crate) code: &'a Code,
    pub(crate) scratch: u64,
    pub(crate) stream: CUstream,
    pub(crate) library: Option<&'a mut Products>,
    pub(crate) args: &'a mut Args,
}

#[derive(Debug)]
struct Moving {
    node: CUgraphNode,
    kernel: u32,
    launch: usize,
    buffers: Vec<Address>,
    /// Row of the table.
    row: usize,
    /// Its table of pointers.
    table: u64,
}

/// The graphs of a session.
#[derive(Debug, Default)]
pub(crate) struct Graphs {
    list: Vec<Graph>,
    clock: u64,
}

/// The upper end of the range that a count belongs to: steps of an eighth of the next power of two.
pub(crate) fn upper(n: u64, capacity: u64) -> u64 {
    let step = n.checked_next_power_of_two().map_or(1, |p| (p / 8).max(1));
    n.div_ceil(step).saturating_mul(step).min(capacity).max(n)
}

/// The upper end of the range of a run's counts. The counts themselves where windows would begin elsewhere otherwise.
pub(crate) fn bucket(steps: &Steps<'_>, capacity: &[u64]) -> std::result::Result<Vec<u64>, ExprError> {
    let mut env: Vec<u64> = Vec::with_capacity(steps.env.len());
    for (i, s) in steps.plan.symbols.iter().enumerate() {
        let v = match &s.value {
            Some(e) => e.eval(&env)?,
            None => upper(steps.env[i], capacity[i]),
        };
        env.push(v);
    }
    for l in &steps.entry().loops {
        if row_bytes(l, &env)? != row_bytes(l, steps.env)? {
            return Ok(steps.env.to_vec());
        }
    }
    Ok(env)
}

/// Counts of every row of a graph's table.
fn table(steps: &Steps<'_>, windows: &[(usize, u64)], env: &[u64]) -> Vec<i64> {
    let row = |env: &[u64], out: &mut Vec<i64>| out.extend(env.iter().map(|v| *v as i64));
    let mut out = vec![];
    row(env, &mut out);
    for (l, (_, n)) in steps.entry().loops.iter().zip(windows) {
        let mut inside = env.to_vec();
        for w in 0..*n {
            inside[l.symbol as usize] = env[l.symbol as usize].saturating_sub(w * l.chunk).min(l.chunk);
            row(&inside, &mut out);
        }
    }
    out
}

impl Graphs {
    /// The graph of an entry at the range with this upper end.
    pub(crate) fn find(&mut self, entry: usize, env: &[u64]) -> Option<&mut Graph> {
        self.clock += 1;
        let g = self.list.iter_mut().find(|g| g.entry == entry && g.env == env)?;
        g.used = self.clock;
        Some(g)
    }

    /// Keeps a graph, and gives the one that makes room for it.
    pub(crate) fn keep(&mut self, mut g: Graph) -> Option<Graph> {
        g.used = self.clock;
        let old = if self.list.len() < KEPT {
            None
        } else {
            let oldest = (0..self.list.len()).min_by_key(|i| self.list[*i].used);
            oldest.map(|i| self.list.swap_remove(i))
        };
        self.list.push(g);
        old
    }
}

impl Graph {
    /// Rows of the table at these counts, and where the windows of each loop begin in it.
    pub(crate) fn layout(steps: &Steps<'_>, env: &[u64]) -> (usize, Vec<(usize, u64)>) {
        let (mut rows, mut windows) = (1, vec![]);
        for l in &steps.entry().loops {
            let n = env[l.symbol as usize].div_ceil(l.chunk);
            windows.push((rows, n));
            rows += n as usize;
        }
        (rows, windows)
    }

    /// Pointers in the tables of all launches at most.
    pub(crate) fn pointers_at_most(steps: &Steps<'_>, env: &[u64]) -> Result<usize> {
        let mut n = 0;
        steps.waves(env, &mut |wave| {
            let kernels = wave.works.iter().map(|w| &steps.plan.kernels[w.kernel as usize]);
            let launches = kernels.flat_map(|k| k.all_launches());
            n += launches.map(|l| pointers_of(l).len()).sum::<usize>();
            Ok(())
        })?;
        Ok(n)
    }

    /// Makes the graph of an entry at these counts. `dims` is memory for its table, and for `pointers` behind it, which the caller
    /// writes before the graph runs.
    ///
    /// # Safety
    /// As [`crate::device::Device::run`].
    pub(crate) unsafe fn new(steps: &Steps<'_>, env: Vec<u64>, dims: u64, means: &mut Means<'_>) -> Result<Graph> {
        let (rows, windows) = Graph::layout(steps, &env);
        let behind = dims + (rows * env.len() * size_of::<i64>()) as u64;
        let none = std::ptr::null_mut();
        let mut out = Graph {
            entry: steps.index,
            env,
            graph: none,
            exec: none.cast(),
            dims,
            pointers: vec![],
            windows,
            moving: vec![],
            set_for: vec![],
            used: 0,
        };
        // SAFETY: the pointer is of a handle that lives through the call.
        check(unsafe { sys::cuGraphCreate(&mut out.graph, 0) }, "a graph")?;
        let mut last: CUgraphNode = std::ptr::null_mut();
        let env = out.env.clone();
        steps.waves(&env, &mut |wave| {
            let row = wave.window.map_or(0, |(l, w)| out.windows[l].0 + w as usize);
            for w in wave.works {
                let k = &steps.plan.kernels[w.kernel as usize];
                let at = dims + (row * env.len() * size_of::<i64>()) as u64;
                let mut given = Given { buffers: w.buffers, scratch: means.scratch, dims: at, table: 0, env: wave.env };
                let library = match &mut means.library {
                    Some(l) => l.takes(w.kernel, k, wave.env)?.then_some(&**l),
                    None => None,
                };
                let way = way(k, library.is_some());
                for (i, p) in way.products.iter().enumerate() {
                    let Some(l) = library.filter(|_| p.runs(wave.env).unwrap_or(false)) else { continue };
                    // SAFETY: nothing else is enqueued while the graph is made; the caller promises the buffers.
                    last = unsafe {
                        captured(out.graph, last, means.stream, &mut || {
                            l.multiply(w.kernel, i, p, &given, means.stream)
                        })?
                    };
                }
                for (i, l) in way.launches.iter().enumerate() {
                    if !l.runs(wave.env)? {
                        continue;
                    }
                    let number = way.first + i;
                    given.table = behind + size_of_val(out.pointers.as_slice()) as u64;
                    out.pointers.extend(pointers_of(l).iter().map(|b| w.buffers[*b as usize] as u64));
                    means.args.set(l, &given)?;
                    let params = node(means.code.function(w.kernel, number), l, grid(l, wave.env)?, means.args);
                    let (before, n) = (last, usize::from(!last.is_null()));
                    // SAFETY: the arguments are copied into the node; the caller promises that they are the kernel's.
                    let r = unsafe { sys::cuGraphAddKernelNode_v2(&mut last, out.graph, &before, n, &params) };
                    check(r, "a node of a graph")?;
                    if depends_on_counts(l) {
                        let buffers = w.buffers.to_vec();
                        let table = given.table;
                        out.moving.push(Moving { node: last, kernel: w.kernel, launch: number, buffers, row, table });
                    }
                }
            }
            Ok(())
        })?;
        // SAFETY: the graph is complete.
        check(unsafe { sys::cuGraphInstantiateWithFlags(&mut out.exec, out.graph, 0) }, "a graph's instance")?;
        out.set_for = env;
        Ok(out)
    }

    /// The table for the counts of a run; sets what depends on them. No earlier run may still be under way where that is so.
    ///
    /// # Safety
    /// As [`crate::device::Device::run`].
    pub(crate) unsafe fn set(
        &mut self,
        steps: &Steps<'_>,
        code: &Code,
        scratch: u64,
        args: &mut Args,
    ) -> Result<Vec<i64>> {
        let counts = table(steps, &self.windows, steps.env);
        if self.set_for == steps.env {
            return Ok(counts);
        }
        let symbols = steps.env.len();
        let upper = table(steps, &self.windows, &self.env);
        let values =
            |t: &[i64], row: usize| t[row * symbols..][..symbols].iter().map(|v| *v as u64).collect::<Vec<_>>();
        // Until all are set they are set for no counts.
        self.set_for.clear();
        for m in &self.moving {
            let l = launch(&steps.plan.kernels[m.kernel as usize], m.launch);
            let dims = self.dims + (m.row * symbols * size_of::<i64>()) as u64;
            let env = values(&counts, m.row);
            args.set(l, &Given { buffers: &m.buffers, scratch, dims, table: m.table, env: &env })?;
            let blocks = grid(l, &values(&upper, m.row))?;
            let params = node(code.function(m.kernel, m.launch), l, blocks, args);
            // SAFETY: the node is of this graph; its arguments are copied.
            check(unsafe { sys::cuGraphExecKernelNodeSetParams_v2(self.exec, m.node, &params) }, "a node of a graph")?;
        }
        self.set_for = steps.env.to_vec();
        Ok(counts)
    }

    /// The instance.
    pub(crate) fn exec(&self) -> CUgraphExec {
        self.exec
    }
}

fn node(func: CUfunction, l: &Launch, grid: [u32; 3], args: &mut Args) -> CUDA_KERNEL_NODE_PARAMS {
    CUDA_KERNEL_NODE_PARAMS {
        func,
        gridDimX: grid[0],
        gridDimY: grid[1],
        gridDimZ: grid[2],
        blockDimX: l.block,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: l.shared_bytes,
        kernelParams: args.pointers(),
        extra: std::ptr::null_mut(),
        kern: std::ptr::null_mut(),
        ctx: std::ptr::null_mut(),
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made once, not used after their owner, and the driver keeps an instance until its launches are done.
        unsafe {
            if !self.exec.is_null() {
                let _ = sys::cuGraphExecDestroy(self.exec);
            }
            if !self.graph.is_null() {
                let _ = sys::cuGraphDestroy(self.graph);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_an_eighth_wide_and_within_the_capacity() {
        let at: Vec<u64> = [1, 2, 7, 8, 9, 16, 17, 31, 33, 1000, 1025].iter().map(|n| upper(*n, 4096)).collect();
        assert_eq!(at, [1, 2, 7, 8, 10, 16, 20, 32, 40, 1024, 1280]);
        assert_eq!(upper(1000, 1001), 1001);
        assert_eq!(upper(u64::MAX, u64::MAX), u64::MAX);
        for n in 1..5000 {
            let u = upper(n, u64::MAX);
            assert!(u >= n && u == upper(u, u64::MAX) && (u - n) * 4 <= n.max(4));
        }
    }
}
