//! Plans for a GPU in the simulator: every kernel by itself, and whole entries, beside the interpreter. Needs LLVM.
//!
//! [`Compiled`] is a plan with the schedule it was made from and its PTX read. [`alone`] runs kernels one by one on random
//! values; [`session::Simulated`] runs entries as a session would, in an arena laid out for capacities, and trains;
//! [`reference::Reference`] is the interpreter in its place.
//! [`attention`] takes attention in every form. [`blocks`] are weights as codes. [`mutate`] puts errors into code, which must be
//! seen. [`estimate`] counts what kernels execute. [`cases`] lists what a test run and a full sweep take. [`sweep`] assembles the code of many
//! graphs.
//!
//! Nothing that a kernel computes into holds anything before: bytes that were not written are errors when read, and NaN.

pub mod alone;
pub mod attention;
pub mod blocks;
pub mod cases;
pub mod estimate;
pub mod mutate;
pub mod ptxas;
pub mod reference;
pub mod session;
pub mod sweep;

use pleach_codegen::compile::{compile_gpu, supported_gpu};
use pleach_codegen::emit::gpu::GpuChip;
use pleach_ir::{BlockFormat, Graph, Schedule};
use pleach_passes::fuse_kernels::{self, CutOptions};
use pleach_passes::{Options, Pipeline, Target, chunk, join, manager};
use pleach_plan::{Launch, LaunchParam, Meta, Plan};
use pleach_ptx_sim::{Checks, Counts, Memory, Mode, Module, Order, Param, Ptr};
use std::collections::BTreeMap;

/// A plan for a GPU with what it was made from.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// What a plan file gives back.
    pub plan: Plan,
    /// The kernels' bodies.
    pub schedule: Schedule,
    /// The PTX of every blob.
    pub modules: Vec<Module>,
}

/// How a launch is executed; none of it may change a result.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct How {
    /// When asynchronous work finishes.
    pub mode: Mode,
    /// Which blocks and warps go first.
    pub order: Order,
}

/// Warp instructions of a block, far beyond what any kernel here takes.
const MOST_STEPS: u64 = 1 << 21;

/// The ways that must give the same bits: asynchronous work as late as possible and at once, blocks and warps forward and
/// backward.
pub const WAYS: [How; 2] =
    [How { mode: Mode::Late, order: Order::Forward }, How { mode: Mode::AtOnce, order: Order::Backward }];

/// Compiles a graph as `pleach compile --target` does.
///
/// # Errors
/// Whatever refuses, with its stage.
pub fn compile(graph: &Graph, options: &Options, chip: GpuChip, meta: Meta) -> Result<Compiled, String> {
    compile_with(graph, options, chip, meta, &BTreeMap::new())
}

/// The same where the checkpoint has these tensors in blocks too.
///
/// # Errors
/// As [`compile`].
pub fn compile_with(
    graph: &Graph,
    options: &Options,
    chip: GpuChip,
    meta: Meta,
    blocks: &BTreeMap<String, BlockFormat>,
) -> Result<Compiled, String> {
    let schedule = schedule(graph, options, blocks)?;
    Compiled::new(schedule, chip, meta)
}

/// A graph cut into the kernels of a plan for a GPU, where the checkpoint has these tensors in blocks too.
///
/// # Errors
/// Whatever refuses, with its stage.
pub fn schedule(graph: &Graph, options: &Options, blocks: &BTreeMap<String, BlockFormat>) -> Result<Schedule, String> {
    let options = Options { target: Target::GPU, ..options.clone() };
    let graph = manager::run(graph, &Pipeline::default(), &options).map_err(|e| format!("passes: {e}"))?.graph;
    let cut =
        CutOptions { supported: &supported_gpu, panels: &[], blocks: blocks.clone(), picks: Some(options.clone()) };
    let fail = |e: pleach_passes::PassError| format!("fuse-kernels: {e}");
    let mut schedule = fuse_kernels::cut(&graph, &cut).map_err(fail)?;
    chunk::run(&mut schedule, &options).map_err(fail)?;
    fuse_kernels::order(&mut schedule).map_err(fail)?;
    join::run(&mut schedule, &options).map_err(fail)?;
    Ok(schedule)
}

impl Compiled {
    /// Compiles a schedule.
    ///
    /// # Errors
    /// What codegen refuses, and PTX that the simulator does not know.
    pub fn new(schedule: Schedule, chip: GpuChip, meta: Meta) -> Result<Compiled, String> {
        let (plan, _) = compile_gpu(&schedule, chip, 1, meta).map_err(|e| format!("codegen: {e}"))?;
        let bytes = plan.to_bytes().map_err(|e| e.to_string())?;
        let plan = Plan::from_bytes(&bytes).map_err(|e| e.to_string())?;
        let modules = plan.blobs.iter().map(|b| read(&b.bytes)).collect::<Result<_, _>>()?;
        Ok(Compiled { plan, schedule, modules })
    }

    /// Runs a kernel: all its launches. `buffers`: operands, then results. `grid`: values of the symbols that grids are
    /// evaluated at; `dims` those that the kernel reads.
    ///
    /// # Errors
    /// What the simulator reports.
    pub fn launch(
        &self,
        mem: &mut Memory,
        kernel: usize,
        buffers: &[Ptr],
        at: &Place,
        (grid, dims): (&[u64], &[u64]),
        how: How,
    ) -> Result<Counts, String> {
        self.launch_some(mem, kernel, buffers, at, (grid, dims), how, None)
    }

    /// The same with at most `sample` blocks of every launch, without checks of races and of what was not written.
    #[allow(clippy::too_many_arguments, reason = "what a launch consists of")]
    fn launch_some(
        &self,
        mem: &mut Memory,
        kernel: usize,
        buffers: &[Ptr],
        at: &Place,
        (grid, dims): (&[u64], &[u64]),
        how: How,
        sample: Option<u64>,
    ) -> Result<Counts, String> {
        let k = &self.plan.kernels[kernel];
        let values: Vec<u8> = dims.iter().flat_map(|d| (*d as i64).to_le_bytes()).collect();
        mem.write(at.dims, &values).map_err(|e| e.to_string())?;
        if let Some((scratch, bytes)) = at.scratch.filter(|_| sample.is_none()) {
            mem.forget(scratch, bytes).map_err(|e| e.to_string())?;
        }
        let mut counts = Counts::default();
        for l in &k.launches {
            if !l.runs(grid).map_err(|e| e.to_string())? {
                continue;
            }
            let done = self.one(mem, k.blob as usize, l, buffers, at, (grid, dims), how, sample);
            counts.add(&done.map_err(|e| format!("{}: {e}", k.symbol))?);
        }
        Ok(counts)
    }

    #[allow(clippy::too_many_arguments, reason = "what a launch consists of")]
    fn one(
        &self,
        mem: &mut Memory,
        blob: usize,
        l: &Launch,
        buffers: &[Ptr],
        at: &Place,
        (grid, dims): (&[u64], &[u64]),
        how: How,
        sample: Option<u64>,
    ) -> Result<Counts, String> {
        let text = |e: &dyn std::fmt::Display| e.to_string();
        let mut params = vec![];
        for p in &l.params {
            params.push(match p {
                LaunchParam::Buffer(b) => Param::Ptr(buffers[*b as usize]),
                LaunchParam::Table(list) => {
                    let list: Vec<Ptr> = list.iter().map(|b| buffers[*b as usize]).collect();
                    Param::Ptr(mem.alloc_pointers(&list))
                }
                LaunchParam::Scratch => Param::Ptr(at.scratch.ok_or("no scratch memory was asked for")?.0),
                LaunchParam::Dims => Param::Ptr(at.dims),
                LaunchParam::TensorMap(m) => {
                    let values = |v: &[pleach_plan::Expr]| v.iter().map(|e| e.eval(dims)).collect::<Result<_, _>>();
                    Param::TensorMap(pleach_ptx_sim::TensorMap {
                        base: buffers[m.buffer as usize],
                        element: m.dtype.size() as u32,
                        sizes: values(&m.sizes).map_err(|e| text(&e))?,
                        strides: values(&m.strides).map_err(|e| text(&e))?,
                        boxes: m.boxes.clone(),
                        swizzle: m.swizzle,
                    })
                }
            });
        }
        let mut blocks = [0; 3];
        for (n, e) in blocks.iter_mut().zip(&l.grid) {
            *n = u32::try_from(e.eval(grid).map_err(|e| text(&e))?).map_err(|e| text(&e))?;
        }
        let kernel = self.modules[blob].kernel(&l.function).map_err(|e| text(&e))?;
        let launch = pleach_ptx_sim::Launch {
            grid: blocks,
            block: [l.block, 1, 1],
            dynamic_shared: l.shared_bytes,
            params: &params,
            mode: how.mode,
            order: how.order,
            sample,
            max_steps: if sample.is_some() { MOST_STEPS << 6 } else { MOST_STEPS },
            checks: Checks { races: sample.is_none(), uninitialised: sample.is_none() },
        };
        kernel.launch(mem, launch).map_err(|e| text(&e))
    }
}

/// Memory of launches beside the kernels' buffers.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Values of the symbols.
    pub dims: Ptr,
    /// Scratch memory and its bytes.
    pub scratch: Option<(Ptr, usize)>,
}

impl Place {
    /// Reserves it.
    pub fn new(mem: &mut Memory, symbols: usize, scratch: u64) -> Place {
        let dims = mem.alloc_named("dims", 8 * symbols);
        let scratch = (scratch > 0).then(|| (mem.alloc_named("scratch", scratch as usize), scratch as usize));
        Place { dims, scratch }
    }
}

fn read(ptx: &[u8]) -> Result<Module, String> {
    let text = std::str::from_utf8(ptx).map_err(|e| e.to_string())?;
    Module::parse(text.trim_end_matches('\0')).map_err(|e| format!("PTX: {e}"))
}
