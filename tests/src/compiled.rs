//! Compiles graphs for this machine and runs them beside the interpreter. Needs LLVM.

use crate::compare::{Results, Start};
use pleach_codegen::HostTarget;
use pleach_codegen::compile::{CompileOptions, compile, supported};
use pleach_codegen::emit::contraction::panel_widths;
use pleach_ir::interp::{Data, Tensor};
use pleach_ir::{Graph, Source};
use pleach_passes::fuse_kernels::{self, CutOptions};
use pleach_passes::{Options, Pipeline, manager};
use pleach_plan::{DType, Meta, Plan};
use pleach_runtime::{InMemory, Session, Values};
use std::sync::Arc;

/// Targets that this machine can run.
pub fn targets() -> Vec<HostTarget> {
    match HostTarget::detect() {
        Some(t) => t.and_below(),
        None => vec![],
    }
}

/// Passes, cut and code, as `pleach compile` does it.
///
/// # Errors
/// Whatever refuses, with its stage.
pub fn plan_of(graph: &Graph, options: &Options, target: &HostTarget, meta: Meta) -> Result<Plan, String> {
    plan_with(graph, &Pipeline::default(), true, options, target, meta)
}

/// The same with a choice of passes, and of whether weights get a twin in panels.
///
/// # Errors
/// As [`plan_of`].
pub fn plan_with(
    graph: &Graph,
    passes: &Pipeline,
    pack: bool,
    options: &Options,
    target: &HostTarget,
    meta: Meta,
) -> Result<Plan, String> {
    let after = manager::run(graph, passes, options).map_err(|e| format!("passes: {e}"))?.graph;
    let cut = CutOptions {
        supported: &supported,
        panels: if pack { panel_widths(target.isa) } else { &[] },
        blocks: Default::default(),
        picks: None,
    };
    let fail = |e: pleach_passes::PassError| format!("fuse-kernels: {e}");
    let mut s = fuse_kernels::cut(&after, &cut).map_err(fail)?;
    pleach_passes::chunk::run(&mut s, options).map_err(fail)?;
    fuse_kernels::order(&mut s).map_err(fail)?;
    let options = CompileOptions { target: target.clone(), threads: 2, meta };
    let (plan, _) = compile(&s, &options).map_err(|e| format!("codegen: {e}\n{after}"))?;
    // What is run is what a file gives back.
    let bytes = plan.to_bytes().map_err(|e| e.to_string())?;
    Plan::from_bytes(&bytes).map_err(|e| e.to_string())
}

/// A session with the weights and adapters of `start`; state begins as zeros, whatever `start` says.
///
/// # Errors
/// What the runtime refuses.
pub fn session(
    plan: Arc<Plan>,
    graph: &Graph,
    start: &Start,
    options: &pleach_runtime::Options,
) -> Result<Session, String> {
    let mut base = InMemory::new();
    let mut slots: Vec<InMemory> = vec![];
    // What nothing reads is not in the plan.
    let kept = graph.params.iter().filter(|p| plan.params.iter().any(|q| q.name == p.name));
    for p in kept {
        let Some(t) = start.params.get(&p.name) else { continue };
        let to = match &p.source {
            Source::Checkpoint(name) => Some((&mut base, name)),
            Source::Adapter { slot, key } => {
                slots.resize_with(slots.len().max(*slot as usize + 1), InMemory::new);
                Some((&mut slots[*slot as usize], key))
            }
            Source::Derived | Source::Zeros => None,
        };
        if let Some((to, name)) = to {
            let dtype = match t.dtype() {
                pleach_ir::DType::I32 => DType::I32,
                pleach_ir::DType::BF16 => DType::BF16,
                _ => DType::F32,
            };
            to.insert(name.clone(), dtype, &t.shape, t.to_bytes());
        }
    }
    let mut s = Session::open(plan, Arc::new(base), options).map_err(|e| e.to_string())?;
    for slot in s.plan().slots() {
        let tensors = slots.get(slot as usize).ok_or_else(|| format!("no tensors for slot {slot}"))?;
        s.load_slot(slot, tensors).map_err(|e| e.to_string())?;
    }
    Ok(s)
}

/// Runs one entry on the inputs of `start`; results are named as those of [`crate::compare::run_graph`], without
/// assignments, which stay inside the session.
///
/// # Errors
/// What the runtime refuses.
pub fn run(s: &mut Session, entry: &str, start: &Start) -> Result<Results, String> {
    let wanted = s.plan().entry(entry).map_err(|e| e.to_string())?.inputs.clone();
    let mut inputs = vec![];
    for x in &wanted {
        let t = start.inputs.get(entry).and_then(|i| i.get(&x.name)).ok_or_else(|| format!("no input {}", x.name))?;
        let v = match &t.data {
            Data::F32(v) => Values::F32(v),
            Data::I32(v) => Values::I32(v),
            _ => return Err(format!("input {} is neither f32 nor i32", x.name)),
        };
        inputs.push((x.name.as_str(), v));
    }
    let out = s.run(entry, &inputs).map_err(|e| e.to_string())?;
    let mut results = Results::new();
    for o in &out.list {
        let dtype = match o.dtype {
            DType::F32 => pleach_ir::DType::F32,
            DType::I32 => pleach_ir::DType::I32,
            DType::Bool => pleach_ir::DType::Bool,
            DType::BF16 => pleach_ir::DType::BF16,
            DType::F16 => pleach_ir::DType::F16,
        };
        let t = Tensor::from_bytes(dtype, o.shape.clone(), o.bytes).map_err(|e| e.to_string())?;
        results.insert(format!("{entry}/{}", o.name), t);
    }
    Ok(results)
}
