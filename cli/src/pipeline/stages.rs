//! Every graph on the way of a compilation, for looking at: as imported, after each pass, the schedule, and the text of a kernel.
//!
//! The same passes with the same options as [`super::compile_here`]: the last graph is the one that the plan was made of.

use super::{Request, budget};
use crate::failure::Result;
use crate::model::Model;
use pleach_codegen::compile;
use pleach_codegen::emit::gpu;
use pleach_ir::{Graph, Kernel, Schedule, Sym};
use pleach_passes::{PassReport, Pipeline, run_watched};

/// What a compilation makes on its way.
pub(crate) struct Stages {
    /// `imported`, then the graph after each pass that ran, under its label `NN-pass`.
    pub graphs: Vec<(String, Graph)>,
    /// One report per pass.
    pub reports: Vec<PassReport>,
    /// The last graph cut into kernels, in launch order.
    pub schedule: Schedule,
}

impl Stages {
    /// The graph that was cut into kernels.
    pub(crate) fn last(&self) -> &Graph {
        &self.graphs[self.graphs.len() - 1].1
    }
}

/// Runs all passes and keeps everything.
///
/// # Errors
/// The error of a pass.
pub(crate) fn stages(imported: Graph, request: &Request, model: &Model) -> Result<Stages> {
    let request = &request.steps_made_at_once(model, &imported);
    let mut options = request.options();
    if let Some(train) = request.train.as_ref().filter(|t| t.budget.is_some()) {
        let meta = request.meta(model)?;
        options.recompute = budget::passes(&imported, request, train, &meta, &*model.weights()?)?.2;
    }
    let pipeline = Pipeline { disable: request.disable.clone(), ..Pipeline::default() };
    let mut before: Vec<Graph> = vec![];
    let out = run_watched(&imported, &pipeline, &options, &mut |_, g| before.push(g.clone()))?;
    let mut graphs = vec![("imported".to_string(), imported)];
    let after = before.into_iter().skip(1).chain([out.graph]);
    for (i, (r, g)) in out.reports.iter().zip(after).enumerate() {
        graphs.push((format!("{:02}-{}", i + 1, r.name), g));
    }
    let last = &graphs[graphs.len() - 1].1;
    let (schedule, _) = super::schedule(last, request)?;
    Ok(Stages { graphs, reports: out.reports, schedule })
}

/// A kernel in MLIR, ready to become assembly, or PTX where the request is for a GPU.
///
/// # Errors
/// What the target refuses.
pub(crate) fn kernel_text(k: &Kernel, symbols: &[Sym], request: &Request) -> Result<String> {
    Ok(match request.gpu() {
        Some(chip) => gpu::module([gpu::emit(k, symbols, chip)?.text.as_str()]),
        None => compile::emit_host(k, symbols, &request.host()?)?.text,
    })
}
