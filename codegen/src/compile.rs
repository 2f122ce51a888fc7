//! A schedule as a plan: every kernel emitted, lowered in parallel and linked into one shared object.
//!
//! Assumes a checked schedule. Same schedule, target and options give the same plan bytes: kernels are emitted in the
//! order of the schedule, and nothing here looks at a clock but the report.

use crate::emit::gpu::{Form, GpuChip, GpuEmitted};
use crate::emit::{self, Emitted};
use crate::error::CodegenError;
use crate::mlir::{self, HostTarget};
use pleach_ir::{
    BlockFormat, BufferKind, Class, Dim, Kernel, Layout, Loop, Role, Schedule, ScheduledEntry, Seen, Source, Sym,
    TensorType,
};
use pleach_plan::{self as plan, Expr, Plan};
use std::collections::BTreeMap;
use std::time::Instant;

/// What to compile for.
#[derive(Clone, Debug)]
pub struct CompileOptions {
    /// Processor and features.
    pub target: HostTarget,
    /// Contexts that lower kernels at the same time. Does not influence the result.
    pub threads: usize,
    /// Facts about the model that go into the plan.
    pub meta: plan::Meta,
}

/// How long each stage took, in milliseconds.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct CompileTimes {
    /// Kernels to text.
    pub emit: f64,
    /// Text to objects.
    pub lower: f64,
    /// Objects to a shared object.
    pub link: f64,
}

/// Kernel as host text, by class.
///
/// # Errors
/// [`CodegenError::Unsupported`] naming the kernel and the reason.
pub fn emit_host(k: &Kernel, symbols: &[Sym], target: &HostTarget) -> Result<Emitted, CodegenError> {
    match k.class {
        Class::Row if emit::blocks::picks_rows(k) => emit::blocks::emit(k, symbols, target),
        Class::Row if emit::coded::is_coded(k) => emit::coded::emit(k),
        Class::Row => emit::row::emit(k, symbols, target),
        Class::Contraction => emit::contraction::emit(k, symbols, target),
        Class::Attention => emit::attention::emit(k, symbols, target),
        Class::Scatter => emit::scatter::emit(k, symbols, target.isa),
    }
}

/// Whether a region can be one kernel on the host.
///
/// # Errors
/// The reason why not.
pub fn supported(k: &Kernel) -> Result<(), String> {
    match k.class {
        Class::Row if emit::blocks::picks_rows(k) => emit::blocks::supported(k),
        Class::Row if emit::coded::is_coded(k) => emit::coded::supported(k),
        Class::Row => emit::row::supported(k),
        Class::Contraction => emit::contraction::supported(k),
        Class::Attention => emit::attention::supported(k),
        Class::Scatter => Ok(()),
    }
}

/// Whether a region can be one kernel on a GPU.
///
/// # Errors
/// The reason why not.
pub fn supported_gpu(k: &Kernel) -> Result<(), String> {
    let mut symbols: Vec<Sym> = k.body.nodes.iter().flat_map(|n| n.ty.symbols()).collect();
    symbols.sort_unstable();
    symbols.dedup();
    emit::gpu::emit(k, &symbols, GpuChip::Sm80).map(|_| ()).map_err(|e| e.to_string())
}

/// The symbols of a schedule in the order of the plan.
pub fn plan_symbols(s: &Schedule) -> Vec<plan::Symbol> {
    let types =
        s.params.iter().map(|(p, _)| &p.ty).chain(s.entries.iter().flat_map(|e| e.buffers.iter().map(|b| &b.ty)));
    let mut names: Vec<Sym> = types.flat_map(TensorType::symbols).collect();
    names.sort_unstable();
    names.dedup();
    plan::Symbol::list(names.iter().map(Sym::as_str))
}

fn syms(list: &[plan::Symbol]) -> Vec<Sym> {
    list.iter().filter_map(|s| Sym::new(&s.name)).collect()
}

/// The symbols that kernels of a schedule are emitted with, in the order of the plan.
pub fn kernel_symbols(s: &Schedule) -> Vec<Sym> {
    syms(&plan_symbols(s))
}

/// Every kernel of a schedule as text.
///
/// # Errors
/// As [`emit_host`].
pub fn emit_all(s: &Schedule, target: &HostTarget) -> Result<Vec<Emitted>, CodegenError> {
    let symbols = kernel_symbols(s);
    s.kernels.iter().map(|k| emit_host(k, &symbols, target)).collect()
}

/// Compiles a schedule.
///
/// # Errors
/// [`CodegenError`] when a kernel is refused or the toolchain fails.
pub fn compile(s: &Schedule, options: &CompileOptions) -> Result<(Plan, CompileTimes), CodegenError> {
    let mut times = CompileTimes::default();
    let start = Instant::now();
    let emitted = emit_all(s, &options.target)?;
    times.emit = start.elapsed().as_secs_f64() * 1e3;

    let start = Instant::now();
    let texts: Vec<(String, String)> =
        s.kernels.iter().zip(&emitted).map(|(k, e)| (k.name.clone(), e.text.clone())).collect();
    let objects =
        mlir::compile_parallel(&texts, &options.target, options.threads).into_iter().collect::<Result<Vec<_>, _>>()?;
    times.lower = start.elapsed().as_secs_f64() * 1e3;

    let start = Instant::now();
    let object = crate::link::link(&objects)?;
    times.link = start.elapsed().as_secs_f64() * 1e3;

    let mut plan = assemble(s, host_code(&emitted), host_target(options), options.meta.clone());
    plan.blobs.push(plan::Blob { name: "kernels".into(), kind: plan::BlobKind::HostObject, bytes: object });
    plan::validate(&plan).map_err(|e| CodegenError::Plan(e.to_string()))?;
    Ok((plan, times))
}

/// What to compile for on a GPU.
#[derive(Clone, Debug)]
pub struct GpuOptions {
    /// The chip.
    pub chip: GpuChip,
    /// Contexts that lower kernels at the same time. Does not influence the result.
    pub threads: usize,
    /// Facts about the model that go into the plan.
    pub meta: plan::Meta,
    /// Forms that were chosen for kernels by their signatures. What is for no kernel of the schedule is left alone.
    pub choices: Vec<plan::Choice>,
    /// Also compile every other form of every kernel, as kernels that no step runs.
    pub alternatives: bool,
}

/// The kernels of a plan that compute the same in several forms: index and form, first the one that steps run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Alternatives {
    /// What they compute.
    pub signature: String,
    /// The kernels.
    pub forms: Vec<(u32, Form)>,
}

/// Compiles a schedule for a GPU: one PTX text per group of kernels.
///
/// # Errors
/// [`CodegenError`] when a kernel is refused or the toolchain fails.
pub fn compile_gpu(
    s: &Schedule,
    chip: GpuChip,
    threads: usize,
    meta: plan::Meta,
) -> Result<(Plan, CompileTimes), CodegenError> {
    let (plan, times, _) =
        compile_gpu_with(s, &GpuOptions { chip, threads, meta, choices: vec![], alternatives: false })?;
    Ok((plan, times))
}

/// [`compile_gpu`] with a choice of forms; the last value is empty unless alternatives are asked for.
///
/// # Errors
/// As [`compile_gpu`].
pub fn compile_gpu_with(s: &Schedule, o: &GpuOptions) -> Result<(Plan, CompileTimes, Vec<Alternatives>), CodegenError> {
    let mut times = CompileTimes::default();
    let start = Instant::now();
    let symbols = syms(&plan_symbols(s));
    let (mut emitted, mut more) = (vec![], vec![]);
    let (mut choices, mut alternatives) = (vec![], vec![]);
    for (i, k) in s.kernels.iter().enumerate() {
        // Most plans are compiled without a choice, and then nothing is looked for.
        let asked = o.alternatives || !o.choices.is_empty();
        let forms = if asked { emit::gpu::forms(k, &symbols, o.chip)? } else { vec![] };
        let signature = if forms.is_empty() { String::new() } else { k.signature() };
        let chosen = o.choices.iter().find(|c| c.signature == signature);
        let chosen = chosen.and_then(|c| forms.iter().find(|f| f.to_string() == c.form));
        emitted.push(emit::gpu::emit_as(k, &symbols, o.chip, chosen)?);
        if let Some(form) = chosen {
            choices.push(plan::Choice { signature: signature.clone(), form: form.to_string() });
        }
        let Some(own) = chosen.or(forms.first()).filter(|_| o.alternatives) else { continue };
        let mut list = vec![(i as u32, *own)];
        for f in forms.iter().filter(|f| *f != own) {
            let other = Kernel { name: format!("{}_form{}", k.name, list.len()), ..k.clone() };
            list.push(((s.kernels.len() + more.len()) as u32, *f));
            let code = emit::gpu::emit_as(&other, &symbols, o.chip, Some(f))?;
            more.push((other, code));
        }
        alternatives.push(Alternatives { signature, forms: list });
    }
    let mut all = s.clone();
    for (k, code) in more {
        all.kernels.push(k);
        emitted.push(code);
    }
    times.emit = start.elapsed().as_secs_f64() * 1e3;

    let start = Instant::now();
    let groups: Vec<&[GpuEmitted]> = emitted.chunks(PTX_GROUP).collect();
    let texts: Vec<String> = groups.iter().map(|g| emit::gpu::module(g.iter().map(|e| e.text.as_str()))).collect();
    let ptx = mlir::compile_ptx_parallel(&texts, o.chip.name(), o.threads);
    let ptx = ptx.into_iter().collect::<Result<Vec<_>, _>>()?;
    times.lower = start.elapsed().as_secs_f64() * 1e3;

    let mut plan = assemble(&all, gpu_code(&emitted), gpu_target(o.chip), o.meta.clone());
    for (i, text) in ptx.into_iter().enumerate() {
        let bytes = text.into_bytes();
        plan.blobs.push(plan::Blob { name: format!("kernels{i}"), kind: plan::BlobKind::Ptx, bytes });
    }
    plan.choices = choices;
    plan::validate(&plan).map_err(|e| CodegenError::Plan(e.to_string()))?;
    Ok((plan, times, alternatives))
}

/// The plan of [`compile_gpu`] without its code.
///
/// # Errors
/// [`CodegenError`] when a kernel is refused.
pub fn without_code_gpu(s: &Schedule, chip: GpuChip, meta: plan::Meta) -> Result<Plan, CodegenError> {
    let symbols = syms(&plan_symbols(s));
    let emitted = s.kernels.iter().map(|k| emit::gpu::emit(k, &symbols, chip)).collect::<Result<Vec<_>, _>>()?;
    Ok(assemble(s, gpu_code(&emitted), gpu_target(chip), meta))
}

fn gpu_target(chip: GpuChip) -> plan::Target {
    plan::Target { arch: chip.name().into(), features: vec![] }
}

/// Code of kernels for a GPU, in blobs of [`PTX_GROUP`].
fn gpu_code(emitted: &[GpuEmitted]) -> Vec<Code> {
    let code = |(i, e): (usize, &GpuEmitted)| {
        let blocks = e.launches.iter().map(|l| Expr::product(l.grid.iter().cloned()));
        let tasks = blocks.fold(Expr::Const(0), |a, b| a.add(b));
        let (scratch_bytes, flops, bytes) = (e.scratch_bytes.clone(), e.flops.clone(), e.bytes.clone());
        let (launches, library) = (e.launches.clone(), e.library.clone());
        Code { blob: (i / PTX_GROUP) as u32, tasks, scratch_bytes, flops, bytes, launches, library }
    };
    emitted.iter().enumerate().map(code).collect()
}

/// Kernels of one PTX text.
const PTX_GROUP: usize = 8;

/// What a plan says of a kernel's code.
struct Code {
    blob: u32,
    tasks: Expr,
    scratch_bytes: Expr,
    flops: Expr,
    bytes: Expr,
    launches: Vec<plan::Launch>,
    library: Option<plan::ByLibrary>,
}

/// Host code of all kernels, in one blob.
fn host_code(emitted: &[Emitted]) -> Vec<Code> {
    let code = |e: &Emitted| Code {
        blob: 0,
        tasks: e.tasks.clone(),
        scratch_bytes: e.scratch_bytes.clone(),
        flops: e.flops.clone(),
        bytes: e.bytes.clone(),
        launches: vec![],
        library: None,
    };
    emitted.iter().map(code).collect()
}

fn host_target(options: &CompileOptions) -> plan::Target {
    let features = options.target.required_features().iter().map(|f| f.to_string()).collect();
    plan::Target { arch: "x86_64".into(), features }
}

/// The plan of a schedule without its code: everything that sizes depend on.
///
/// # Errors
/// [`CodegenError`] when a kernel is refused.
pub fn without_code(s: &Schedule, options: &CompileOptions) -> Result<Plan, CodegenError> {
    let code = host_code(&emit_all(s, &options.target)?);
    Ok(assemble(s, code, host_target(options), options.meta.clone()))
}

fn dtype(d: pleach_ir::DType) -> plan::DType {
    match d {
        pleach_ir::DType::F32 => plan::DType::F32,
        pleach_ir::DType::BF16 => plan::DType::BF16,
        pleach_ir::DType::F16 => plan::DType::F16,
        pleach_ir::DType::I32 => plan::DType::I32,
        pleach_ir::DType::Bool => plan::DType::Bool,
    }
}

fn role(r: Role) -> plan::Role {
    match r {
        Role::Frozen => plan::Role::Frozen,
        Role::Train => plan::Role::Train,
        Role::Index => plan::Role::Index,
        Role::Gate => plan::Role::Gate,
        Role::Stat => plan::Role::Stat,
        Role::State => plan::Role::State,
        Role::Teacher => plan::Role::Teacher,
    }
}

fn format(f: BlockFormat) -> plan::BlockFormat {
    match f {
        BlockFormat::Q4_0 => plan::BlockFormat::Q4_0,
        BlockFormat::Q4_1 => plan::BlockFormat::Q4_1,
        BlockFormat::Q8_0 => plan::BlockFormat::Q8_0,
    }
}

fn layout(l: Layout) -> plan::Layout {
    match l {
        Layout::RowMajor => plan::Layout::RowMajor,
        Layout::Panels { nr, transposed } => plan::Layout::Panels { nr, transposed },
        Layout::Blocks(x) => plan::Layout::Blocks(format(x)),
        Layout::CodedPanels { nr, format: x } => plan::Layout::CodedPanels { nr, format: format(x) },
    }
}

fn shape(dims: &[Dim], symbols: &[Sym]) -> Vec<Expr> {
    dims.iter()
        .map(|d| match d {
            Dim::Known(n) => Expr::Const(*n),
            Dim::Symbol(s) => Expr::Sym(symbols.iter().position(|x| x == s).unwrap_or(0) as u32),
        })
        .collect()
}

fn bytes(ty: &TensorType, l: Layout, symbols: &[Sym]) -> Expr {
    layout(l).bytes(dtype(ty.dtype), &shape(&ty.shape, symbols)).unwrap_or(Expr::Const(0))
}

/// A loop of the plan; what lies inside it shrinks to one window.
fn windows(e: &ScheduledEntry, l: &Loop, buffers: &mut [plan::Buffer], symbols: &[Sym]) -> plan::Loop {
    let symbol = symbols.iter().position(|s| *s == l.symbol).unwrap_or(0) as u32;
    let mut windows = vec![];
    for (b, seen) in e.seen(l.first, l.last, l.symbol) {
        let ty = &e.buffers[b.0 as usize].ty;
        let size = |rows: Expr| {
            let rest = shape(&ty.shape[1..], symbols);
            Expr::product(std::iter::once(rows).chain(rest)).mul(dtype(ty.dtype).size())
        };
        match seen {
            Seen::Inside if ty.shape.first() == Some(&Dim::Symbol(l.symbol)) => {
                buffers[b.0 as usize].bytes = size(Expr::Sym(symbol).min(l.chunk));
            }
            Seen::Window => windows.push(plan::Window { buffer: b.0, row_bytes: size(Expr::Const(1)) }),
            Seen::Inside | Seen::Whole => {}
        }
    }
    plan::Loop { first: l.first as u64, last: l.last as u64, symbol, chunk: l.chunk, windows }
}

/// The plan without its code.
fn assemble(s: &Schedule, code: Vec<Code>, target: plan::Target, meta: plan::Meta) -> Plan {
    let symbols_list = plan_symbols(s);
    let symbols = syms(&symbols_list);
    // Parameters that no launch touches take no memory.
    let mut number: BTreeMap<usize, u32> = BTreeMap::new();
    for e in &s.entries {
        for b in &e.buffers {
            if let BufferKind::Param(p) = b.kind {
                number.insert(p.index(), 0);
            }
        }
    }
    for (i, n) in number.values_mut().enumerate() {
        *n = i as u32;
    }
    let params = number
        .keys()
        .map(|i| {
            let (p, l) = &s.params[*i];
            let source = match &p.source {
                Source::Checkpoint(t) => plan::Source::Checkpoint(t.clone()),
                Source::Adapter { slot, key } => plan::Source::Adapter { slot: *slot, key: key.clone() },
                Source::Derived => plan::Source::Derived,
                Source::Zeros => plan::Source::Zeros,
            };
            plan::Param::new(
                p.name.clone(),
                dtype(p.ty.dtype),
                shape(&p.ty.shape, &symbols),
                layout(*l),
                role(p.role),
                source,
            )
        })
        .collect();
    let kernels = s
        .kernels
        .iter()
        .zip(code)
        .map(|(k, c)| plan::Kernel {
            symbol: k.name.clone(),
            blob: c.blob,
            class: format!("{:?}", k.class).to_lowercase(),
            tasks: c.tasks,
            scratch_bytes: c.scratch_bytes,
            operands: k.operand_types().iter().zip(&k.operands).map(|(t, l)| bytes(t, *l, &symbols)).collect(),
            results: k.result_types().iter().zip(&k.results).map(|(t, l)| bytes(t, *l, &symbols)).collect(),
            aliases: k.aliases.clone(),
            flops: c.flops,
            bytes: c.bytes,
            launches: c.launches,
            library: c.library,
        })
        .collect();
    let mut plan = Plan { target, symbols: symbols_list, params, kernels, meta, ..Plan::default() };
    for e in &s.entries {
        let mut inputs: Vec<plan::Input> = vec![];
        let mut outputs = vec![];
        let mut buffers: Vec<plan::Buffer> = vec![];
        for b in &e.buffers {
            let (kind, name) = match &b.kind {
                BufferKind::Input(name) => {
                    inputs.push(plan::Input {
                        name: name.clone(),
                        dtype: dtype(b.ty.dtype),
                        shape: shape(&b.ty.shape, &symbols),
                        checks: plan.standard_checks(&e.name, name),
                    });
                    (plan::BufferKind::Input(inputs.len() as u32 - 1), name.clone())
                }
                BufferKind::Param(p) => {
                    (plan::BufferKind::Param(number[&p.index()]), s.params[p.index()].0.name.clone())
                }
                BufferKind::Arena => (plan::BufferKind::Arena, b.name.clone()),
                BufferKind::Output(name) => (plan::BufferKind::Output, name.clone()),
            };
            buffers.push(plan::Buffer { kind, bytes: bytes(&b.ty, b.layout, &symbols), name });
        }
        for st in &e.steps {
            for w in &st.writes {
                let b = &mut buffers[w.0 as usize];
                if b.name.is_empty() {
                    b.name = st.origin.clone().unwrap_or_default();
                }
            }
        }
        for (name, b, ty) in &e.outputs {
            outputs.push(plan::Output {
                name: name.clone(),
                buffer: b.0,
                dtype: dtype(ty.dtype),
                shape: shape(&ty.shape, &symbols),
            });
        }
        let steps = e
            .steps
            .iter()
            .map(|st| plan::Step {
                kernel: st.kernel.0,
                buffers: st.reads.iter().chain(&st.writes).map(|b| b.0).collect(),
                origin: st.origin.clone().unwrap_or_default(),
            })
            .collect();
        let loops = e.loops.iter().map(|l| windows(e, l, &mut buffers, &symbols)).collect();
        plan.entries.push(plan::Entry { name: e.name.clone(), inputs, outputs, buffers, steps, loops });
    }
    plan.settle_residency();
    plan
}
