//! The pass manager: one loop of dump, run, time, verify.
//!
//! Texts and times are returned, never printed. A graph that does not verify after a pass is a fault of that pass and
//! says so. Whether a pass changed a graph is decided here by comparison, not by what the pass claims.

use crate::error::PassError;
use crate::options::Options;
use crate::{canonicalize, differentiate, expand, fold_params, precision, recompute, rewrite, thin_sums};
use pleach_ir::Graph;
use pleach_ir::text::print;
use pleach_ir::verify::verify;
use std::time::Instant;

/// What a pass computes: a new graph, and what it has to say in the report.
pub type PassFn = fn(&Graph, &Options, &mut Report) -> Result<Graph, PassError>;

/// A pass.
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    /// Name, kebab-case.
    pub name: &'static str,
    /// What it does, one line.
    pub about: &'static str,
    /// The function.
    pub run: PassFn,
}

/// Every pass from graph to graph, in the order of the default pipeline.
const PASSES: &[Pass] = &[
    Pass {
        name: "canonicalize",
        about: "one form for what is trivially equal; dead nodes removed",
        run: canonicalize::run,
    },
    Pass { name: "precision", about: "weights and activations in bf16, where that is asked for", run: precision::run },
    Pass {
        name: "differentiate",
        about: "the entry train becomes accumulate (forward and backward) and update (the optimizer)",
        run: differentiate::run,
    },
    Pass { name: "expand", about: "operators that no kernel computes become ones that kernels do", run: expand::run },
    Pass {
        name: "thin-sums",
        about: "sums of squares of a weight with a thin change, without the changed weight",
        run: thin_sums::run,
    },
    Pass {
        name: "rewrite",
        about: "the cheapest equal form of the linear algebra, by equality saturation",
        run: rewrite::run,
    },
    Pass {
        name: "fold-params",
        about: "what depends on parameters alone moves into prepare entries",
        run: fold_params::run,
    },
    Pass {
        name: "recompute",
        about: "which forward values are kept for the backward half and which are built again",
        run: recompute::run,
    },
];

/// Every pass, in the order of the default pipeline.
pub fn passes() -> &'static [Pass] {
    PASSES
}

/// Names of every pass, in the order of the default pipeline.
pub fn names() -> Vec<&'static str> {
    PASSES.iter().map(|p| p.name).collect()
}

/// The pass of that name.
///
/// # Errors
/// [`PassError::UnknownPass`] listing the known names.
pub fn find(name: &str) -> Result<Pass, PassError> {
    PASSES
        .iter()
        .find(|p| p.name == name)
        .copied()
        .ok_or_else(|| PassError::UnknownPass { name: name.into(), known: names().join(", ") })
}

/// How often a rewrite rule did something.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RuleCount {
    /// Name of the rule.
    pub rule: &'static str,
    /// Equalities it found, over all regions saturated.
    pub fired: usize,
    /// Nodes of the result that it made, over all regions applied.
    pub chosen: usize,
}

/// Filled by a pass while it runs.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Report {
    /// One short line for people; empty when there is nothing to say.
    pub note: String,
    /// Rewrite rules that did something.
    pub rules: Vec<RuleCount>,
    /// What was rewritten into what, each distinct form once.
    pub forms: Vec<rewrite::Form>,
    /// What is kept for the backward half, where the pass decides it.
    pub saved: Vec<recompute::Saved>,
}

/// What happened in one pass.
#[derive(Clone, PartialEq, Debug)]
pub struct PassReport {
    /// Name of the pass.
    pub name: &'static str,
    /// Nodes of all entries before.
    pub nodes_before: usize,
    /// Nodes of all entries after.
    pub nodes_after: usize,
    /// The graph after differs from the graph before.
    pub changed: bool,
    /// Wall time in milliseconds.
    pub ms: f64,
    /// What the pass says about itself.
    pub note: String,
    /// Rewrite rules that did something.
    pub rules: Vec<RuleCount>,
    /// What was rewritten into what, each distinct form once.
    pub forms: Vec<rewrite::Form>,
    /// What is kept for the backward half, where the pass decides it.
    pub saved: Vec<recompute::Saved>,
}

/// Which passes run, and what is kept on the way.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pipeline {
    /// Names of the passes in order.
    pub passes: Vec<String>,
    /// Names of passes to leave out.
    pub disable: Vec<String>,
    /// Stop after this many passes have run.
    pub stop_after: Option<usize>,
    /// Keep the text of the graph after every pass that changed it.
    pub print_ir_after_change: bool,
    /// Verify the graph after every pass; without it only the last one.
    pub verify_each: bool,
}

impl Default for Pipeline {
    fn default() -> Pipeline {
        Pipeline {
            passes: [
                "canonicalize",
                "precision",
                "differentiate",
                "expand",
                "canonicalize",
                "thin-sums",
                "rewrite",
                "fold-params",
                "canonicalize",
                "recompute",
            ]
            .map(String::from)
            .to_vec(),
            disable: vec![],
            stop_after: None,
            print_ir_after_change: false,
            verify_each: true,
        }
    }
}

impl Pipeline {
    /// A pipeline of these passes.
    pub fn of(passes: &[&str]) -> Pipeline {
        Pipeline { passes: passes.iter().map(|s| s.to_string()).collect(), ..Pipeline::default() }
    }
}

/// The result of a pipeline.
#[derive(Clone, PartialEq, Debug)]
pub struct Outcome {
    /// The graph after the last pass.
    pub graph: Graph,
    /// One report per pass that ran.
    pub reports: Vec<PassReport>,
    /// `(NN-after-<pass>, text)` of every pass that changed the graph, if asked for.
    pub dumps: Vec<(String, String)>,
}

/// Nodes of all entries.
pub fn node_count(g: &Graph) -> usize {
    g.entries.iter().map(|e| e.nodes.len()).sum()
}

/// Runs the pipeline.
///
/// # Errors
/// [`PassError::UnknownPass`] before anything runs; [`PassError::Input`] when `g` itself does not verify; else the
/// error of the pass that failed, or [`PassError::Verify`] naming the pass whose result does not verify.
pub fn run(g: &Graph, pipeline: &Pipeline, opts: &Options) -> Result<Outcome, PassError> {
    run_watched(g, pipeline, opts, &mut |_, _| {})
}

/// Runs the pipeline; `before` sees the name of each pass and the graph that it is about to get.
///
/// # Errors
/// As [`run`].
pub fn run_watched(
    g: &Graph,
    pipeline: &Pipeline,
    opts: &Options,
    before: &mut dyn FnMut(&str, &Graph),
) -> Result<Outcome, PassError> {
    for name in pipeline.disable.iter().chain(&pipeline.passes) {
        find(name)?;
    }
    rewrite::check_rule_names(&opts.disabled_rules)?;
    verify(g).map_err(PassError::Input)?;
    let mut out = Outcome { graph: g.clone(), reports: vec![], dumps: vec![] };
    let mut passes: Vec<&String> = pipeline.passes.iter().filter(|n| !pipeline.disable.contains(n)).collect();
    passes.truncate(pipeline.stop_after.unwrap_or(passes.len()));
    for (i, name) in passes.iter().enumerate() {
        let pass = find(name)?;
        before(pass.name, &out.graph);
        let mut report = Report::default();
        let start = Instant::now();
        let next = (pass.run)(&out.graph, opts, &mut report)?;
        let ms = start.elapsed().as_secs_f64() * 1e3;
        if pipeline.verify_each || i + 1 == passes.len() {
            verify(&next).map_err(|source| PassError::Verify { pass: pass.name.into(), source })?;
        }
        let changed = next != out.graph;
        out.reports.push(PassReport {
            name: pass.name,
            nodes_before: node_count(&out.graph),
            nodes_after: node_count(&next),
            changed,
            ms,
            note: report.note,
            rules: report.rules,
            forms: report.forms,
            saved: report.saved,
        });
        if changed && pipeline.print_ir_after_change {
            out.dumps.push((format!("{:02}-after-{}", out.reports.len(), pass.name), print(&next)));
        }
        out.graph = next;
    }
    Ok(out)
}
