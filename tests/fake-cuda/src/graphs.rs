//! Launches with their arguments, and graphs of them.

use crate::cublaslt::Product;
use crate::maps::unpack;
use crate::state::{Answer, INVALID_VALUE, NOT_SUPPORTED, State};
use pleach_ptx_sim::{Param, Ptr};
use std::ffi::c_void;

/// A launch, its arguments copied.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) function: usize,
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    pub(crate) shared: u32,
    pub(crate) params: Vec<Param>,
}

/// What a node does.
#[derive(Clone, Debug)]
pub(crate) enum Node {
    Launch(Call),
    Product(Box<Product>),
    /// Another graph as it was.
    Child(Vec<Node>),
}

/// A graph that is being built: nodes in their order. A node's number is its place, from 1.
#[derive(Clone, Debug, Default)]
pub(crate) struct Graph {
    pub(crate) nodes: Vec<Node>,
}

/// An instance, with the graph it is of.
#[derive(Clone, Debug)]
pub(crate) struct Exec {
    pub(crate) graph: usize,
    pub(crate) nodes: Vec<Node>,
}

/// The driver's `CUDA_KERNEL_NODE_PARAMS_v2`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct KernelNode {
    pub(crate) func: usize,
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    pub(crate) shared: u32,
    pub(crate) params: *mut *mut c_void,
    pub(crate) extra: *mut *mut c_void,
    kern: usize,
    ctx: usize,
}

impl State {
    /// A launch with its arguments read, held against what the function declares.
    ///
    /// # Safety
    /// `params` must point to as many pointers as the function has parameters, each to its bytes.
    pub(crate) unsafe fn call(
        &self,
        function: usize,
        grid: [u32; 3],
        block: [u32; 3],
        shared: u32,
        params: *mut *mut c_void,
    ) -> Result<Call, u32> {
        let f = self.functions.get(&function).ok_or(crate::state::INVALID_HANDLE)?;
        let threads: u64 = block.iter().map(|b| u64::from(*b)).product();
        if grid.contains(&0) || threads == 0 || threads > 1024 || grid[1] > 65_535 || grid[2] > 65_535 {
            return Err(INVALID_VALUE);
        }
        if shared > State::shared_limit(f) {
            crate::state::say(&format!("{}: {shared} bytes of shared memory were not asked for", f.kernel.name()));
            return Err(INVALID_VALUE);
        }
        let mut out = vec![];
        for (i, bytes) in f.kernel.param_sizes().into_iter().enumerate() {
            // SAFETY: promised by the caller.
            let at = unsafe { *params.add(i) };
            // SAFETY: as above; the sizes are those of the declaration.
            out.push(unsafe {
                match bytes {
                    8 => Param::Ptr(Ptr(at.cast::<u64>().read_unaligned())),
                    4 => Param::I32(at.cast::<i32>().read_unaligned()),
                    128 if (at as usize).is_multiple_of(64) && unpack(&at.cast::<[u64; 16]>().read()).is_some() => {
                        Param::TensorMap(unpack(&at.cast::<[u64; 16]>().read()).ok_or(INVALID_VALUE)?)
                    }
                    _ => return Err(NOT_SUPPORTED),
                }
            });
        }
        Ok(Call { function, grid, block, shared, params: out })
    }

    /// The launch of a node.
    ///
    /// # Safety
    /// As [`State::call`], for the node's parameters.
    pub(crate) unsafe fn node(&self, n: &KernelNode) -> Result<Call, u32> {
        if !n.extra.is_null() || n.kern != 0 || (n.ctx != 0 && n.ctx != crate::state::CONTEXT) {
            return Err(NOT_SUPPORTED);
        }
        // SAFETY: promised by the caller.
        unsafe { self.call(n.func, n.grid, n.block, n.shared, n.params) }
    }

    /// Adds a node behind others of the same graph; its number.
    pub(crate) fn add_node(&mut self, graph: usize, after: &[usize], node: Node) -> Result<usize, u32> {
        let g = self.graphs.get_mut(&graph).ok_or(crate::state::INVALID_HANDLE)?;
        if after.iter().any(|n| *n == 0 || *n > g.nodes.len()) {
            return Err(INVALID_VALUE);
        }
        // Nodes run one after another here; what is not ordered by edges must not matter, and is not looked for.
        if after.is_empty() && !g.nodes.is_empty() {
            return Err(NOT_SUPPORTED);
        }
        g.nodes.push(node);
        Ok(g.nodes.len())
    }

    /// Sets the launch of a node of an instance: the same function, other arguments.
    pub(crate) fn set_node(&mut self, exec: usize, node: usize, call: Call) -> Answer {
        let e = self.execs.get_mut(&exec).ok_or(crate::state::INVALID_HANDLE)?;
        let Some(Node::Launch(old)) = node.checked_sub(1).and_then(|i| e.nodes.get_mut(i)) else {
            return Err(INVALID_VALUE);
        };
        if old.function != call.function {
            return Err(INVALID_VALUE);
        }
        *old = call;
        Ok(())
    }
}
