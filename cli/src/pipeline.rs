//! From a model to a plan: import, passes, schedule, code, with one row of report per stage.
//!
//! Everything here runs in the child process of [`crate::child`] but for the import, which the parent does too: the
//! text of the imported graph is what the compile cache is keyed by. Reads headers only.

use crate::args::{AdapterPath, DType, ModelArgs, Target};
use crate::blocks::Compare;
use crate::cache;
use crate::failure::{Failure, Result};
use crate::model::Model;
use crate::report::{Table, Ui, bytes};
use pleach_codegen::HostTarget;
use pleach_codegen::compile::{self, CompileOptions, CompileTimes, GpuOptions};
use pleach_codegen::emit::contraction::panel_widths;
use pleach_codegen::emit::gpu::GpuChip;
use pleach_frontend::adapter::{AdapterPlan, EventsPlan};
use pleach_frontend::peft::MethodConfig;
use pleach_frontend::{Adapter, Import, ModelConfig, eos_ids};
use pleach_ir::{BlockFormat, Dim, Graph, Role, Schedule};
use pleach_passes::differentiate::{ACCUMULATE, STEP};
use pleach_passes::fuse_kernels::{self, CutOptions};
use pleach_passes::recompute::Saved;
use pleach_passes::{Options, Outcome, PassReport, Pipeline, chunk, join, recompute};
use pleach_plan::{Choice, Meta, Plan};
use pleach_runtime::{ALTERNATIVES, Alternative};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

mod budget;
pub(crate) mod kept;
mod paths;
pub(crate) mod stages;

/// What to compile, and where the plan goes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    /// Model folder.
    #[serde(with = "paths")]
    pub model: PathBuf,
    /// Adapters by name and folder, in slot order.
    #[serde(with = "paths::named")]
    pub adapters: Vec<(Option<String>, PathBuf)>,
    /// Entries.
    pub entries: Vec<String>,
    /// Fold the adapters into the weights.
    pub merge: bool,
    /// Processor class: `native`, `avx2`, `avx512`; or a GPU: `sm_80`, `sm_90a`.
    pub target: String,
    /// Token counts that entries are tuned for.
    pub tokens: Vec<(String, u64)>,
    /// Passes to leave out.
    pub disable: Vec<String>,
    /// Rewrite rules to leave out.
    pub disable_rules: Vec<String>,
    /// Type of weights and activations: `f32` or `bf16`.
    pub dtype: String,
    /// For a plan that trains: what and within which bounds.
    pub train: Option<TrainPart>,
    /// Forms of GPU kernels that were chosen by measuring.
    #[serde(default)]
    pub choices: Vec<Choice>,
    /// Compile every form of every kernel, for measuring: a plan that nothing but `tune` runs.
    #[serde(default)]
    pub alternatives: bool,
    /// Tensors of the checkpoint that are read in blocks, with their formats; see [`crate::blocks`].
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub blocks: BTreeMap<String, String>,
    /// Threads that lower kernels; no influence on the plan.
    pub threads: usize,
    /// The plan file.
    #[serde(with = "paths")]
    pub out: PathBuf,
}

/// What is trained, and the capacities that memory is planned for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct TrainPart {
    /// The method by PEFT's keys; unused when the request names an adapter, which is trained then.
    pub config: serde_json::Map<String, serde_json::Value>,
    /// Tokens of a micro-batch.
    pub tokens: u64,
    /// Rows of a micro-batch.
    pub sequences: u64,
    /// Tokens of a row.
    pub positions: u64,
    /// Bytes that weights, adapter, optimizer and arena may take together. 0: as few as possible.
    pub budget: Option<u64>,
    /// A step has one micro-batch, and nothing looks at its gradients together.
    pub at_once: bool,
    /// Nothing is trained: the modules whose gradients or inputs are looked at, beside the method, before training.
    #[serde(default)]
    pub calibrated: Vec<String>,
}

impl TrainPart {
    /// Options of a session with these capacities.
    pub(crate) fn capacities(&self) -> pleach_runtime::Options {
        let all = [("T", self.tokens), ("L", self.tokens), ("S", self.sequences), ("P", self.positions), ("C", 1)];
        all.into_iter().fold(pleach_runtime::Options::default(), |o, (s, n)| o.capacity(s, n))
    }
}

/// One stage of a compilation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Row {
    /// Name of the pass or stage.
    pub pass: String,
    /// Nodes before, if it had any.
    pub nodes_before: Option<usize>,
    /// Nodes after; kernels for `fuse-kernels`.
    pub nodes_after: Option<usize>,
    /// Whether it changed anything; none for stages that make something new.
    pub changed: Option<bool>,
    /// Wall time, milliseconds.
    pub ms: f64,
    /// What it says about itself.
    pub note: String,
}

impl Row {
    fn stage(pass: &str, ms: f64, note: impl Into<String>) -> Row {
        Row { pass: pass.into(), nodes_before: None, nodes_after: None, changed: None, ms, note: note.into() }
    }

    /// The row of a pass.
    pub(crate) fn pass(r: &PassReport) -> Row {
        Row {
            nodes_before: Some(r.nodes_before),
            nodes_after: Some(r.nodes_after),
            changed: Some(r.changed),
            ..Row::stage(r.name, r.ms, r.note.clone())
        }
    }
}

/// Rows as the table that `compile` prints, with a total.
pub(crate) fn table(rows: &[Row]) -> String {
    let mut t = Table::new(&["pass", "<nodes", "<changed", "ms", "<"]);
    let number = |n: Option<usize>| n.map_or(String::new(), |n| n.to_string());
    for r in rows {
        let nodes = match (r.nodes_before, r.nodes_after) {
            (Some(a), Some(b)) => format!("{a} → {b}"),
            (a, b) => number(a.or(b)),
        };
        let changed = r.changed.map_or("—", |c| if c { "yes" } else { "no" });
        t.row([r.pass.clone(), nodes, changed.into(), format!("{:.1}", r.ms), r.note.clone()]);
    }
    t.row(["total".into(), String::new(), String::new(), format!("{:.1}", total(rows)), String::new()]);
    t.text()
}

/// Milliseconds of all stages.
pub(crate) fn total(rows: &[Row]) -> f64 {
    rows.iter().map(|r| r.ms).sum()
}

impl Request {
    /// What these arguments ask for.
    ///
    /// # Errors
    /// `--target cuda` where there is no GPU that code can be made for.
    pub(crate) fn new(ui: &Ui, args: &ModelArgs, entries: &[&str], tokens: &[(String, u64)]) -> Result<Request> {
        // One order and each once, so that the same wish finds the same plan.
        let mut entries = entries.to_vec();
        entries.sort_unstable_by_key(|e| (*e != "infer", *e));
        entries.dedup();
        Ok(Request {
            model: args.model.clone(),
            adapters: args.adapter.iter().map(|a| (a.name.clone(), a.path.clone())).collect(),
            entries: entries.iter().map(|s| (*s).to_string()).collect(),
            merge: args.merge,
            train: None,
            dtype: match args.dtype {
                DType::F32 => "f32",
                DType::Bf16 => "bf16",
            }
            .into(),
            target: match args.target {
                Target::Cpu => "native",
                Target::Avx2 => "avx2",
                Target::Avx512 => "avx512",
                Target::Cuda => pleach_runtime::cuda::best_target()?,
                Target::Sm80 => "sm_80",
                Target::Sm90a => "sm_90a",
            }
            .into(),
            tokens: tokens.to_vec(),
            disable: args.disable.clone(),
            disable_rules: args.disable_rule.clone(),
            choices: vec![],
            alternatives: false,
            blocks: BTreeMap::new(),
            threads: ui.workers(),
            out: PathBuf::new(),
        })
    }

    /// The model and its adapters.
    ///
    /// # Errors
    /// What the readers refuse.
    pub(crate) fn open(&self) -> Result<Model> {
        let adapters: Vec<AdapterPath> =
            self.adapters.iter().map(|(name, path)| AdapterPath { name: name.clone(), path: path.clone() }).collect();
        let mut model = Model::open(&self.model, &adapters)?;
        if let Some(t) = self.train.as_ref().filter(|_| self.adapters.is_empty()) {
            let config = MethodConfig::from_json(&t.config)?;
            model.adapters.push(Adapter::fresh(&config, &model.checkpoint.modules)?);
        }
        Ok(model)
    }

    /// The same, with the weights read in blocks where that is possible.
    ///
    /// # Errors
    /// Blocks that are damaged or do not fit.
    pub(crate) fn in_blocks(mut self, ui: &Ui, args: &ModelArgs, model: &Model, compare: Compare) -> Result<Request> {
        if !args.no_blocks {
            let usable = crate::blocks::usable(ui, model, !args.no_cache, compare)?;
            self.blocks = usable.into_iter().map(|(tensor, format)| (tensor, format.name().into())).collect();
        }
        Ok(self)
    }

    /// The graph of a model.
    ///
    /// # Errors
    /// An entry that the model does not have.
    pub(crate) fn import(&self, model: &Model) -> Result<Graph> {
        let import = Import::new(&model.checkpoint).adapters(&model.adapters).entries(&self.entries);
        if let Some(t) = self.train.as_ref().filter(|t| !t.calibrated.is_empty()) {
            return Ok(import.calibrated(&t.calibrated).graph()?);
        }
        Ok(if self.train.is_some() { import.train(0).graph()? } else { import.graph()? })
    }

    /// The GPU, if it is for one.
    pub(crate) fn gpu(&self) -> Option<GpuChip> {
        GpuChip::from_name(&self.target)
    }

    /// The processor class.
    ///
    /// # Errors
    /// This machine belongs to none that is supported.
    pub(crate) fn host(&self) -> Result<HostTarget> {
        HostTarget::from_name(&self.target).ok_or_else(|| {
            Failure::new("this processor lacks AVX2 or FMA; code can be compiled for others with --target avx2")
        })
    }

    /// The key of the compile cache.
    ///
    /// # Errors
    /// As [`Request::host`].
    pub(crate) fn key(&self, model: &Model, graph: &Graph) -> Result<String> {
        let machine = match self.gpu() {
            Some(chip) => chip.name().to_string(),
            None => format!("{:?}", self.host()?),
        };
        let options =
            Request { model: PathBuf::new(), adapters: vec![], threads: 0, out: PathBuf::new(), ..self.clone() };
        Ok(cache::key(&[
            "plan",
            &cache::program(),
            &machine,
            &serde_json::to_string(&options)?,
            &serde_json::to_string(&self.meta(model)?)?,
            &pleach_ir::text::print(graph),
        ]))
    }

    /// Options of the passes.
    pub(crate) fn options(&self) -> Options {
        let mut tokens_hint = self.tokens.clone();
        if let Some(t) = &self.train {
            let names = ["train", "accumulate", "step", "evaluate", "measure"];
            tokens_hint.extend(names.iter().map(|n| ((*n).to_string(), t.tokens)));
        }
        Options {
            merge: self.merge,
            tokens_hint,
            length_hint: self.train.as_ref().map_or(Options::default().length_hint, |t| t.positions.max(1)),
            dtype: if self.dtype == "bf16" { pleach_ir::DType::BF16 } else { pleach_ir::DType::F32 },
            disabled_rules: self.disable_rules.clone(),
            step_at_once: self.train.as_ref().is_some_and(|t| t.at_once),
            target: if self.gpu().is_some() { pleach_passes::Target::GPU } else { pleach_passes::Target::CPU },
            ..Options::default()
        }
    }

    /// The same without steps that are made at once, where that cannot be or costs memory: on a GPU, where the method looks at gradients between
    /// the halves of a step, or where something is trained that has a row for every word: its gradient is best added up window by
    /// window with the loss.
    fn steps_made_at_once(&self, model: &Model, graph: &Graph) -> Request {
        let mut out = self.clone();
        let looks = model.adapters.first().is_some_and(|a| EventsPlan::new(a, 0).is_some());
        let words = Dim::Known(model.checkpoint.config.vocab());
        let wide = graph.params.iter().any(|p| p.role == Role::Train && p.ty.shape.contains(&words));
        if let Some(t) = &mut out.train {
            t.at_once &= !looks && !wide && self.gpu().is_none();
        }
        out
    }

    /// Facts for the plan: those of the model, and whether adapters are folded in. Names of adapters stay out: another
    /// adapter of the same shape runs on the same plan.
    fn meta(&self, model: &Model) -> Result<Meta> {
        let eos = eos_ids(model.dir())?.into_iter().filter_map(|i| i32::try_from(i).ok()).collect();
        let c = &model.checkpoint.config;
        let (hidden, layers, max_positions, type_vocab) = match c {
            ModelConfig::Llama(c) => (c.hidden, c.layers, c.max_positions, 0),
            ModelConfig::Bert(c) => (c.hidden, c.layers, c.max_positions, c.type_vocab),
        };
        let kind = if c.is_decoder() { "decoder" } else { "encoder" }.into();
        let mut meta =
            Meta { kind, vocab: c.vocab(), hidden, layers, max_positions, type_vocab, eos, ..Meta::default() };
        if !model.adapters.is_empty() {
            meta.extra.insert("merged".into(), self.merge.into());
        }
        if let (Some(_), Some(adapter)) = (&self.train, model.adapters.first()) {
            meta.extra.insert("dtype".into(), self.dtype.clone().into());
            meta.extra.insert("adapter".into(), AdapterPlan::new(adapter, 0, &model.checkpoint)?.to_json());
        }
        Ok(meta)
    }
}

/// Runs the passes.
///
/// # Errors
/// The error of a pass.
pub(crate) fn passes(graph: &Graph, request: &Request, keep_texts: bool) -> Result<Outcome> {
    let pipeline =
        Pipeline { disable: request.disable.clone(), print_ir_after_change: keep_texts, ..Pipeline::default() };
    Ok(pleach_passes::run(graph, &pipeline, &request.options())?)
}

/// Weights are packed for inference only: a training step reads them both ways round.
fn host_cut(graph: &Graph, request: &Request, host: &HostTarget) -> CutOptions<'static> {
    let trains = graph.entries.iter().any(|e| [ACCUMULATE, STEP, "measure"].contains(&e.name.as_str()));
    CutOptions {
        supported: &compile::supported,
        panels: if trains { &[] } else { panel_widths(host.isa) },
        blocks: blocks_of(request),
        picks: None,
    }
}

/// Tensors that are read in blocks, with what these are.
fn blocks_of(request: &Request) -> BTreeMap<String, BlockFormat> {
    request.blocks.iter().filter_map(|(t, f)| Some((t.clone(), BlockFormat::from_name(f)?))).collect()
}

/// How a request cuts a graph. On a GPU nothing is packed.
fn cut_of(request: &Request, graph: &Graph) -> Result<CutOptions<'static>> {
    Ok(match request.gpu() {
        Some(_) => CutOptions {
            supported: &compile::supported_gpu,
            panels: &[],
            blocks: blocks_of(request),
            picks: Some(request.options()),
        },
        None => host_cut(graph, request, &request.host()?),
    })
}

/// Compiles in this process and writes the plan.
///
/// # Errors
/// Whatever a stage refuses.
pub(crate) fn compile_here(request: &Request) -> Result<Vec<Row>> {
    let clock = Instant::now();
    if is_graph(&request.model) {
        return compile_graph(request);
    }
    let model = request.open()?;
    let graph = request.import(&model)?;
    let request = &request.steps_made_at_once(&model, &graph);
    let mut rows = vec![Row {
        nodes_after: Some(pleach_passes::manager::node_count(&graph)),
        ..Row::stage("import", ms(clock), imported(&model, &request.meta(&model)?))
    }];
    let meta = request.meta(&model)?;
    let (graph, reports) = match &request.train {
        Some(train) => {
            let (graph, reports, _) = budget::passes(&graph, request, train, &meta, &*model.weights()?)?;
            (graph, reports)
        }
        None => {
            let outcome = passes(&graph, request, false)?;
            (outcome.graph, outcome.reports)
        }
    };
    rows.extend(reports.iter().map(Row::pass));
    let (mut plan, more) = lower(&graph, request, meta)?;
    rows.extend(more);
    let kept: Vec<Saved> = kept(&graph, &request.options());
    if !kept.is_empty() {
        plan.meta.extra.insert("saved".into(), kept.iter().map(saved).collect());
    }
    plan.write(&request.out)?;
    Ok(rows)
}

/// Whether a path names the text of a graph in place of a model folder.
pub(crate) fn is_graph(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "ir")
}

/// The text of a graph to a plan; passes run unless the graph says that they have (`graph core`).
fn compile_graph(request: &Request) -> Result<Vec<Row>> {
    let clock = Instant::now();
    let graph = crate::commands::opt::read_graph(&request.model)?;
    let nodes = pleach_passes::manager::node_count(&graph);
    let mut rows = vec![Row { nodes_after: Some(nodes), ..Row::stage("read", ms(clock), "") }];
    let graph = if graph.phase == pleach_ir::Phase::Core {
        graph
    } else {
        let outcome = passes(&graph, request, false)?;
        rows.extend(outcome.reports.iter().map(Row::pass));
        outcome.graph
    };
    let (plan, more) = lower(&graph, request, Meta::default())?;
    rows.extend(more);
    plan.write(&request.out)?;
    Ok(rows)
}

/// What the backward half of a step reads of the forward half, with or without the pass that decides it.
fn kept(graph: &Graph, options: &Options) -> Vec<Saved> {
    let steps = graph.entries.iter().filter(|e| e.name == ACCUMULATE || e.name == STEP);
    steps.flat_map(|e| recompute::saved(graph, e, options)).collect()
}

/// A kept value for the plan's facts; its bytes are `unit_bytes` times the count of `symbol` (`1`: once).
fn saved(s: &Saved) -> serde_json::Value {
    let (unit_bytes, symbol) = s.unit();
    serde_json::json!({
        "name": s.name, "reason": s.reason, "type": s.ty.to_string(), "unit_bytes": unit_bytes, "symbol": symbol,
        "trained_only": s.trained_only, "rebuild_us": (s.rebuild_us * 10.0).round() / 10.0,
    })
}

/// A graph in phase Core to a plan.
///
/// # Errors
/// What the target refuses.
pub(crate) fn lower(graph: &Graph, request: &Request, meta: Meta) -> Result<(Plan, Vec<Row>)> {
    let (s, mut rows) = schedule(graph, request)?;
    let (plan, times) = match request.gpu() {
        Some(chip) => gpu(&s, chip, request, meta)?,
        None => {
            let options = CompileOptions { target: request.host()?, threads: request.threads, meta };
            compile::compile(&s, &options)?
        }
    };
    let code: usize = plan.blobs.iter().map(|b| b.bytes.len()).sum();
    let clock = Instant::now();
    let note = arenas(&plan, &request.options())?;
    rows.push(Row::stage("plan-memory", ms(clock), note));
    rows.push(Row::stage("codegen", times.emit + times.lower, format!("on {} threads", request.threads)));
    rows.push(Row::stage("link", times.link, format!("{} of code", bytes(code as u64))));
    Ok((plan, rows))
}

/// A graph in phase Core as the kernels and launches of a plan, with a row for each stage.
///
/// # Errors
/// What cannot be cut.
pub(crate) fn schedule(graph: &Graph, request: &Request) -> Result<(Schedule, Vec<Row>)> {
    let mut rows = vec![];
    let clock = Instant::now();
    let mut s = fuse_kernels::cut(graph, &cut_of(request, graph)?)?;
    let launches: usize = s.entries.iter().map(|e| e.steps.len()).sum();
    rows.push(Row {
        nodes_before: Some(pleach_passes::manager::node_count(graph)),
        nodes_after: Some(s.kernels.len()),
        ..Row::stage("fuse-kernels", ms(clock), format!("{} kernels, {launches} launches", s.kernels.len()))
    });
    let clock = Instant::now();
    let loops = chunk::run(&mut s, &request.options())?;
    rows.push(Row {
        nodes_after: Some(s.kernels.len()),
        changed: Some(loops > 0),
        ..Row::stage(
            "chunk",
            ms(clock),
            format!("{loops} loops over windows of {} rows", request.options().target.window_rows),
        )
    });
    let clock = Instant::now();
    let ordered = fuse_kernels::order(&mut s)?;
    let note = format!("{ordered} of {} entries reordered", s.entries.len());
    rows.push(Row {
        nodes_after: Some(s.kernels.len()),
        changed: Some(ordered > 0),
        ..Row::stage("order", ms(clock), note)
    });
    let clock = Instant::now();
    let joined = join::run(&mut s, &request.options())?;
    rows.push(Row {
        nodes_after: Some(s.kernels.len()),
        changed: Some(joined > 0),
        ..Row::stage("join", ms(clock), format!("{joined} launches fewer"))
    });
    Ok((s, rows))
}

/// The plan of a GPU, in the forms that the request asks for.
fn gpu(s: &Schedule, chip: GpuChip, request: &Request, meta: Meta) -> Result<(Plan, CompileTimes)> {
    let (choices, alternatives) = (request.choices.clone(), request.alternatives);
    let options = GpuOptions { chip, threads: request.threads, meta, choices, alternatives };
    let (mut plan, times, forms) = compile::compile_gpu_with(s, &options)?;
    if alternatives {
        let of = |a: compile::Alternatives| -> Vec<Alternative> {
            let one = |(kernel, form): (u32, _)| (kernel, format!("{form}"));
            let list = a.forms.into_iter().map(one);
            list.map(|(kernel, form)| Alternative { signature: a.signature.clone(), kernel, form }).collect()
        };
        let all: Vec<Alternative> = forms.into_iter().flat_map(of).collect();
        plan.meta.extra.insert(ALTERNATIVES.into(), serde_json::to_value(all)?);
    }
    Ok((plan, times))
}

fn imported(model: &Model, meta: &Meta) -> String {
    let base = format!("{} layers", meta.layers);
    let adapter = |a: &pleach_frontend::Adapter| format!(", adapter {} ({} sites)", a.name, a.sites.len());
    model.adapters.iter().map(adapter).fold(base, |a, b| a + &b)
}

/// The arena of each entry at the count it is tuned for: every buffer on its own, and as planned.
fn arenas(plan: &Plan, options: &Options) -> Result<String> {
    let mut notes = vec![];
    for e in plan.entries.iter().filter(|e| e.prepares().is_none()) {
        let tokens = options.tokens(&e.name);
        let env = plan.env(&|name| Some(if name == "S" { 1 } else { tokens }))?;
        let layout = pleach_plan::arena(e, &plan.kernels, &env)?;
        let sum: u64 = layout.requests.iter().map(|(_, r)| r.size).sum();
        notes.push(format!("{} {} → {} at T={tokens}", e.name, bytes(sum), bytes(layout.total)));
    }
    Ok(notes.join(", "))
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}
