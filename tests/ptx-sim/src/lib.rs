//! Runs PTX kernels on the CPU, functionally and with every access checked.
//!
//! [`Module::parse`] reads PTX text as LLVM writes it; [`Kernel::launch`] executes a grid over a [`Memory`]. Each access
//! of shared and global memory is checked for bounds, alignment and initialisation; shared memory for races between
//! barriers, and global memory that an entry loads and stores for races of the threads of a block; barriers for divergence and
//! deadlock. Asynchronous work (`cp.async`, tensor copies, warpgroup products) can
//! finish as late as the program allows or at once ([`Mode`]): a correct kernel gives the same result both ways.
//!
//! Registers that nothing wrote hold no number. What warpgroup products do with registers on their own is ordered by `wgmma.fence` and
//! `wgmma.wait_group`; an mbarrier is used by those only who see its initialisation, by copies after a fence; `setmaxnreg`
//! moves registers of one pool per block and waits where there are too few. What threads stored is behind a fence between the proxies before a
//! copy or a product of the asynchronous one touches it; what is read as constant is not written in the launch; the warps of a warpgroup take
//! part in the same products; a block does not end before the copies into its shared memory.
//!
//! Results are deterministic: blocks run one after another, warps in a fixed order, which [`Order`] turns around.
//!
//! Not modelled: time ([`Unit`] and [`Traffic`] have what instructions and accesses cost at least); how the assembler gives physical registers to those of the text (so no spills, no check that a warp
//! lives with what `setmaxnreg` leaves it, and products that the assembler puts one behind the other for lack of a safe place); clusters of
//! several blocks and scopes of fences beyond the block; communication between blocks of one launch (reported as a fault); who
//! sees stores to global memory when (`membar`, `fence.acq_rel` and the `.global` part of `fence.proxy.async` do nothing); waits that give
//! up after a time; caches and their other hints; dependent launches (`griddepcontrol` does nothing).
//! `approx` functions are computed in f64 and rounded; matrix products add their terms one by one in f32, tensor cores in an
//! order and width of their own.

mod block;
mod counts;
mod decode;
mod error;
mod exec;
mod inst;
mod isa;
mod launch;
mod lex;
mod memory;
mod num;
mod parse;
mod shared;
mod touch;
mod traffic;
mod unit;
mod warp;

pub use counts::{Counts, Site};
pub use error::{Fault, SimError};
pub use launch::{Checks, Launch, Mode, Order, Param, TensorMap};
pub use memory::{Memory, Ptr};
pub use num::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
pub use traffic::Traffic;
pub use unit::{UNITS, Unit};

/// First address of shared memory; below it a null pointer is caught.
const SHARED_BASE: u64 = 1024;
/// Addresses below this one are shared memory.
const SHARED_END: u64 = 1 << 24;
/// Kernel parameters.
const PARAM_BASE: u64 = 1 << 30;
/// Local memory: every thread has its own at the same addresses.
const LOCAL_BASE: u64 = 1 << 31;
/// Global memory starts here.
const GLOBAL_BASE: u64 = 1 << 36;

/// A PTX text.
#[derive(Debug, Clone)]
pub struct Module {
    target: String,
    kernels: Vec<Kernel>,
}

impl Module {
    /// Reads a PTX text (without the trailing NUL of the driver's API).
    ///
    /// # Errors
    /// [`SimError::Parse`] with the line of the first statement, instruction, modifier or type that is not known.
    pub fn parse(text: &str) -> Result<Module, SimError> {
        parse::parse(text)
    }

    /// The chip of the text, such as `sm_90a`.
    pub fn target(&self) -> &str {
        &self.target
    }

    /// The kernels in the order of the text.
    pub fn kernels(&self) -> &[Kernel] {
        &self.kernels
    }

    /// The kernel of that name.
    ///
    /// # Errors
    /// [`SimError::Launch`] when the text has none.
    pub fn kernel(&self, name: &str) -> Result<&Kernel, SimError> {
        let found = self.kernels.iter().find(|k| k.name == name);
        found.ok_or_else(|| SimError::Launch { kernel: name.into(), what: "the text has no such entry".into() })
    }
}

/// A parameter of a kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
struct ParamDecl {
    name: String,
    offset: u64,
    bytes: u64,
}

/// One entry of a PTX text, ready to run.
#[derive(Debug, Clone, Default)]
pub struct Kernel {
    name: String,
    target: String,
    code: Vec<isa::Inst>,
    opcodes: Vec<String>,
    regs: u32,
    preds: u32,
    params: Vec<ParamDecl>,
    param_bytes: u64,
    /// End of the static shared variables.
    shared_top: u64,
    dynamic_base: u64,
    dynamic_align: u64,
    local_bytes: u64,
    max_threads: Option<[u32; 3]>,
    required_threads: Option<[u32; 3]>,
    /// Registers of a thread, where they are declared, and blocks that must fit into a processor at once (0: not declared).
    max_registers: Option<u32>,
    blocks_at_once: u32,
}

impl Kernel {
    /// The entry's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Registers of a thread at the start of a kernel that changes them: those it declares, or as many as the assembler gives where
    /// threads and blocks are declared, the whole register file of 65536. None where nothing bounds them.
    pub fn registers(&self) -> Option<u32> {
        let threads = self.required_threads.or(self.max_threads).map(|t| t.iter().product::<u32>().max(1));
        let most = |t: u32| (65_536 / (t * self.blocks_at_once.max(1)) / 8 * 8).min(256);
        self.max_registers.map(|n| n.next_multiple_of(8)).or(threads.map(most))
    }

    /// Whether the kernel changes how many registers its threads own.
    pub fn changes_registers(&self) -> bool {
        self.code.iter().any(|i| matches!(i.op, isa::Op::Setmaxnreg { .. }))
    }

    /// Sizes of the parameters in bytes, in order.
    pub fn param_sizes(&self) -> Vec<u64> {
        self.params.iter().map(|p| p.bytes).collect()
    }
}
