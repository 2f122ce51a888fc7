//! Every stage of a model folder: the graph as imported, after each pass, cut into kernels, and their code.

use super::page::{self, Made, Subject};
use super::{model_explorer, plan};
use crate::args::{Count, InspectArgs};
use crate::failure::{Failure, Result};
use crate::model::Model;
use crate::pipeline::stages::{self, Stages};
use crate::pipeline::{self, Request, table};
use crate::ready::Ready;
use crate::report::{self, Table, Ui, layerless};
use pleach_codegen::emit::gpu::GpuChip;
use pleach_codegen::{compile, mlir};
use pleach_ir::{Class, Graph, Kernel, Schedule, text};
use pleach_passes::PassReport;
use pleach_passes::rewrite::{Form, rules::RULES};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// A compilation with everything on its way.
struct Seen {
    request: Request,
    stages: Stages,
}

impl Seen {
    fn last(&self) -> &Graph {
        self.stages.last()
    }

    fn schedule(&self) -> &Schedule {
        &self.stages.schedule
    }
}

pub(super) fn inspect(ui: &Ui, args: &InspectArgs) -> Result<()> {
    let chosen = args.entry.iter().map(String::as_str).collect::<Vec<_>>();
    let trains = chosen.contains(&"train") || (chosen.is_empty() && args.method.any());
    let train = match trains {
        true => Some(crate::training::request(&args.model, &args.method, &args.shape_of_training)?),
        false => None,
    };
    let mut request = Request { train, ..Request::new(ui, &args.model, &[], &[])? };
    let model = request.open()?;
    let all = match model.checkpoint.config.is_decoder() {
        _ if trains => &["train", "evaluate"][..],
        true => &["infer", "generate"],
        false => &["infer"],
    };
    let entries = if chosen.is_empty() { all.to_vec() } else { chosen };
    request = Request { train: request.train, ..Request::new(ui, &args.model, &entries, &[])? };
    request = request.in_blocks(ui, &args.model, &model, crate::blocks::Compare::Sample)?;
    let imported = request.import(&model)?;
    let s = Seen { stages: stages::stages(imported, &request, &model)?, request };
    let ready =
        || -> Result<Ready> { Ok(crate::ready::compile(ui, &args.model, &entries, &[], s.request.train.clone())?.1) };
    if let Some(out) = &args.html {
        let ready = ready()?;
        let env = plan::env(&ready.plan, &capacity(args, &s.request))?;
        let made = Some(Made { stages: &s.stages, request: &s.request, rows: &ready.origin.rows });
        page::write(ui, args, &Subject { plan: &ready.plan, env, made }, out)?;
    }
    if let Some(out) = &args.model_explorer {
        let graph = graph(&s, &args.stage)?;
        let text = model_explorer::collection(&args.model.model, graph).to_string();
        crate::files::write(out, &text)?;
        ui.note(&format!("{} written", out.display()));
    }
    if args.json {
        return as_json(args, &s, &model, &ready()?);
    }
    if args.ir {
        report::print(&stage(&s, &args.stage)?);
    }
    if args.dot {
        for e in &graph(&s, &args.stage)?.entries {
            report::print(&pleach_ir::view::to_dot(e));
        }
    }
    print_code(&all_code(args, &s, &model)?);
    if args.rules {
        report::print(&rules(&s.stages.reports));
    }
    if args.kernels || args.memory {
        let ready = ready()?;
        let capacity = capacity(args, &s.request);
        if args.kernels {
            report::print(&plan::kernels(&ready.plan, args.kernel.as_deref(), &capacity)?);
        }
        if args.memory {
            report::print(&plan::memory(&ready.plan, &capacity)?);
        }
    }
    let shown = [args.ir, args.dot, args.mlir, args.asm, args.ptx, args.rules, args.kernels, args.memory];
    if !shown.contains(&true) && args.html.is_none() && args.model_explorer.is_none() {
        report::print(&summary(&s));
    }
    Ok(())
}

/// Counts that sizes are shown for: those given, then those that training was asked for.
fn capacity(args: &InspectArgs, request: &Request) -> Vec<Count> {
    let mut out = args.capacity.clone();
    if let Some(t) = &request.train {
        for (symbol, value) in t.capacities().capacities {
            if !out.iter().any(|c| c.symbol == symbol) {
                out.push(Count { symbol, value });
            }
        }
    }
    out
}

/// The graph of a stage, by its label, the name or number of a pass (the last of that name), `imported` or `final`.
fn graph<'s>(s: &'s Seen, name: &str) -> Result<&'s Graph> {
    if name == "final" {
        return Ok(s.last());
    }
    let wanted = |label: &str| {
        let (number, pass) = label.split_once('-').unwrap_or(("", label));
        let number_is = number.parse::<u32>().is_ok_and(|n| name.parse() == Ok(n));
        label == name || label == name.replacen("-after-", "-", 1) || pass == name || number_is
    };
    let graphs = &s.stages.graphs;
    if let Some((_, g)) = graphs.iter().rfind(|(label, _)| wanted(label)) {
        return Ok(g);
    }
    let known: Vec<&str> = graphs.iter().map(|g| g.0.as_str()).chain(["final", "schedule"]).collect();
    Err(Failure::usage(format!("there is no stage `{name}`; there are: {}", known.join(", "))))
}

/// The text of a stage.
fn stage(s: &Seen, name: &str) -> Result<String> {
    match name {
        "schedule" => Ok(text::print_schedule(s.schedule())),
        name => Ok(text::print(graph(s, name)?)),
    }
}

/// Which texts of which kernels are wanted.
#[derive(Clone, Copy)]
struct Wanted<'a> {
    mlir: bool,
    machine: bool,
    kernel: &'a str,
}

/// A kernel's texts.
struct Code {
    kernel: String,
    mlir: Option<String>,
    /// The language, and the text.
    machine: Option<(&'static str, String)>,
}

/// The kernels as MLIR, and in the machine's language: assembly, or PTX for a GPU.
fn code(s: &Seen, wanted: Wanted<'_>) -> Result<Vec<Code>> {
    let symbols = compile::kernel_symbols(s.schedule());
    let kernels = s.schedule().kernels.iter().filter(|k| k.name.contains(wanted.kernel));
    let one = |k: &Kernel| {
        let text = stages::kernel_text(k, &symbols, &s.request)?;
        let machine = match (wanted.machine, s.request.gpu()) {
            (false, _) => None,
            (true, Some(chip)) => Some(("ptx", mlir::compile_ptx(&text, chip.name())?)),
            (true, None) => Some(("asm", mlir::assembly(&text, &s.request.host()?)?)),
        };
        Ok(Code { kernel: k.name.clone(), mlir: wanted.mlir.then_some(text), machine })
    };
    kernels.map(one).collect()
}

/// Every text that was asked for. `--ptx` beside a processor's target asks for a GPU's as well.
fn all_code(args: &InspectArgs, s: &Seen, model: &Model) -> Result<Vec<Code>> {
    let kernel = args.kernel.as_deref().unwrap_or_default();
    let gpu = s.request.gpu().is_some();
    let machine = args.asm || (args.ptx && gpu);
    let mut all = if args.mlir || machine { code(s, Wanted { mlir: args.mlir, machine, kernel })? } else { vec![] };
    if args.ptx && !gpu {
        // The passes know what they compile for: a GPU's kernels are those of a graph that was made for one.
        let request = Request { target: GpuChip::Sm80.name().into(), blocks: BTreeMap::new(), ..s.request.clone() };
        let stages = stages::stages(request.import(model)?, &request, model)?;
        all.extend(code(&Seen { request, stages }, Wanted { mlir: false, machine: true, kernel })?);
    }
    Ok(all)
}

fn print_code(list: &[Code]) {
    for c in list {
        if let Some(text) = &c.mlir {
            report::print(&format!("// {}\n{}\n", c.kernel, text.trim_end()));
        }
        if let Some((language, text)) = &c.machine {
            let sign = if *language == "ptx" { "//" } else { "#" };
            report::print(&format!("{sign} {}\n{}\n", c.kernel, text.trim_end()));
        }
    }
}

fn code_json(list: &[Code]) -> Value {
    let one = |c: &Code| {
        let mut m = Map::new();
        m.insert("kernel".into(), c.kernel.clone().into());
        m.extend(c.mlir.iter().map(|t| ("mlir".to_string(), t.clone().into())));
        m.extend(c.machine.iter().map(|(language, t)| ((*language).to_string(), t.clone().into())));
        Value::Object(m)
    };
    list.iter().map(one).collect::<Vec<_>>().into()
}

/// How often each operator occurs.
fn operators(g: &Graph) -> BTreeMap<&'static str, usize> {
    let mut n = BTreeMap::new();
    for node in g.entries.iter().flat_map(|e| &e.nodes) {
        *n.entry(node.op.name()).or_insert(0) += 1;
    }
    n
}

fn summary(s: &Seen) -> String {
    let (before, after) = (operators(&s.stages.graphs[0].1), operators(s.last()));
    let mut t = Table::new(&["operator", "imported", "final"]);
    let mut names: Vec<&str> = before.keys().chain(after.keys()).copied().collect();
    names.sort_unstable();
    names.dedup();
    for n in names {
        let of = |m: &BTreeMap<&str, usize>| m.get(n).copied().unwrap_or(0).to_string();
        t.row([n.to_string(), of(&before), of(&after)]);
    }
    let rows: Vec<pipeline::Row> = s.stages.reports.iter().map(pipeline::Row::pass).collect();
    let mut e = Table::new(&["entry", "nodes", "launches"]);
    for (g, c) in s.last().entries.iter().zip(&s.schedule().entries) {
        e.row([g.name.clone(), g.nodes.len().to_string(), c.steps.len().to_string()]);
    }
    format!("{}\n{}\n{}{} kernels\n", t.text(), table(&rows), e.text(), s.schedule().kernels.len())
}

fn rules(reports: &[PassReport]) -> String {
    let mut t = Table::new(&["rule", "fired", "nodes chosen", "<pass"]);
    for r in reports {
        for c in &r.rules {
            t.row([c.rule.to_string(), c.fired.to_string(), c.chosen.to_string(), r.name.to_string()]);
        }
    }
    let mut sites = Table::new(&["site", "<entry", "count", "<rules that shaped it", "µs before", "after"]);
    for r in reports {
        let mut rows: BTreeMap<[String; 3], (usize, f64, f64)> = BTreeMap::new();
        for (form, (entry, module)) in sites_of(r) {
            let row = rows.entry([layerless(module), entry.clone(), shaped_by(form).join(", ")]).or_default();
            *row = (row.0 + 1, row.1 + form.cost.0, row.2 + form.cost.1);
        }
        for ([site, entry, rules], (count, before, after)) in rows {
            sites.row([site, entry, count.to_string(), rules, format!("{before:.0}"), format!("{after:.0}")]);
        }
    }
    format!("{}\n{}", t.text(), sites.text())
}

/// Regions that a pass changed, with the entry and the module of each.
fn sites_of(r: &PassReport) -> impl Iterator<Item = (&Form, &(String, String))> {
    r.forms.iter().flat_map(|f| f.sites.iter().map(move |s| (f, s)))
}

/// The rules whose nodes are in the form that was chosen, by name.
fn shaped_by(form: &Form) -> Vec<&'static str> {
    let numbers: BTreeSet<usize> = form.after.iter().filter_map(|s| s.rule).collect();
    numbers.into_iter().filter_map(|n| RULES.get(n)).map(|r| r.name).collect()
}

fn as_json(args: &InspectArgs, s: &Seen, model: &Model, ready: &Ready) -> Result<()> {
    let passes: Vec<Value> = s
        .stages
        .reports
        .iter()
        .map(|r| {
            let rules: Vec<Value> =
                r.rules.iter().map(|c| json!({"rule": c.rule, "fired": c.fired, "chosen": c.chosen})).collect();
            let sites = sites_of(r).map(|(f, (entry, module))| {
                json!({
                    "entry": entry, "site": module, "rules": shaped_by(f), "before_us": f.cost.0, "after_us": f.cost.1,
                })
            });
            json!({
                "pass": r.name, "nodes_before": r.nodes_before, "nodes_after": r.nodes_after, "changed": r.changed,
                "ms": r.ms, "note": r.note, "rules": rules, "sites": sites.collect::<Vec<_>>(),
            })
        })
        .collect();
    let capacity = capacity(args, &s.request);
    let mut out = Map::new();
    out.insert("stages".into(), stages_json(s).into());
    out.insert("passes".into(), passes.into());
    out.insert("kernels".into(), plan::kernels_json(&ready.plan, &capacity)?);
    out.insert("memory".into(), plan::memory_json(&ready.plan, &capacity)?);
    if let Some(list) = ready.plan.meta.extra.get("saved") {
        out.insert("saved".into(), list.clone());
    }
    if args.ir {
        out.insert("ir".into(), stage(s, &args.stage)?.into());
    }
    if args.dot {
        let list = graph(s, &args.stage)?.entries.iter().map(pleach_ir::view::to_dot);
        out.insert("dot".into(), list.collect::<Vec<_>>().into());
    }
    let code = all_code(args, s, model)?;
    if !code.is_empty() {
        out.insert("code".into(), code_json(&code));
    }
    report::json(&Value::Object(out));
    Ok(())
}

/// Operator counts of every stage.
fn stages_json(s: &Seen) -> Vec<Value> {
    let stage = |(label, g): &(String, Graph)| {
        let name = label.split_once('-').map_or(&label[..], |l| l.1);
        json!({"stage": name, "nodes": pleach_passes::manager::node_count(g), "operators": operators(g)})
    };
    let mut list: Vec<Value> = s.stages.graphs.iter().map(stage).collect();
    let mut n: BTreeMap<&str, usize> = BTreeMap::new();
    let schedule = s.schedule();
    for k in schedule.entries.iter().flat_map(|e| &e.steps).map(|x| &schedule.kernels[x.kernel.0 as usize]) {
        let class = match k.class {
            Class::Row => "row",
            Class::Contraction => "contraction",
            Class::Attention => "attention",
            Class::Scatter => "scatter",
        };
        *n.entry(class).or_insert(0) += 1;
    }
    list.push(json!({"stage": "schedule", "kernels": schedule.kernels.len(), "launches": n}));
    list
}
