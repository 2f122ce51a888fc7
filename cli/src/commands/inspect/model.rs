//! Every stage of a model folder: the graph as imported, after each pass, cut into kernels, and their code.

use super::page::{self, Made, Subject};
use super::{model_explorer, plan};
use crate::args::{Count, InspectArgs};
use crate::failure::{Failure, Result};
use crate::pipeline::stages::{self, Stages};
use crate::pipeline::{self, Request, TrainPart, table};
use crate::ready::Ready;
use crate::report::{self, Table, Ui};
use pleach_codegen::emit::gpu;
use pleach_codegen::{compile, mlir};
use pleach_ir::{Class, Graph, Schedule, Sym, text};
use pleach_passes::PassReport;
use pleach_passes::fuse_kernels::{self, CutOptions};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

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
        // The form that serves any number of micro-batches: its two entries show more than a step made at once. Times are of the
        // plan that training used.
        true => {
            let train = crate::training::request(&args.model, &args.method, &args.shape_of_training)?;
            Some(TrainPart { at_once: train.at_once && args.profile.is_some(), ..train })
        }
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
        std::fs::write(out, text).map_err(Failure::io("write", out))?;
        ui.note(&format!("{} written", out.display()));
    }
    if args.json {
        return as_json(args, &s, &ready()?);
    }
    if args.ir {
        report::print(&stage(&s, &args.stage)?);
    }
    if args.dot {
        for e in &graph(&s, &args.stage)?.entries {
            report::print(&pleach_ir::view::to_dot(e));
        }
    }
    if args.mlir || args.asm {
        code(args, &s)?;
    }
    if args.ptx {
        ptx(args, &s)?;
    }
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

/// The kernels as MLIR or as assembly.
fn code(args: &InspectArgs, s: &Seen) -> Result<()> {
    let host = s.request.host()?;
    let emitted = compile::emit_all(s.schedule(), &host)?;
    let only = args.kernel.as_deref().unwrap_or_default();
    for (k, e) in s.schedule().kernels.iter().zip(&emitted).filter(|(k, _)| k.name.contains(only)) {
        if args.mlir {
            report::print(&format!("// {}\n{}\n", k.name, e.text.trim_end()));
        }
        if args.asm {
            report::print(&format!("# {}\n{}\n", k.name, mlir::assembly(&e.text, &host)?.trim_end()));
        }
    }
    Ok(())
}

/// The kernels as PTX; weights are row-major there.
fn ptx(args: &InspectArgs, s: &Seen) -> Result<()> {
    let chip = s.request.gpu().unwrap_or(gpu::GpuChip::Sm80);
    let cut = CutOptions { supported: &compile::supported_gpu, panels: &[] };
    let schedule = fuse_kernels::schedule(s.last(), &cut)?;
    let symbols: Vec<Sym> = compile::plan_symbols(&schedule).iter().filter_map(|x| Sym::new(&x.name)).collect();
    let only = args.kernel.as_deref().unwrap_or_default();
    for k in schedule.kernels.iter().filter(|k| k.name.contains(only)) {
        let e = gpu::emit(k, &symbols, chip)?;
        let text = mlir::compile_ptx(&gpu::module([e.text.as_str()]), chip.name())?;
        report::print(&format!("// {}\n{}\n", k.name, text.trim_end()));
    }
    Ok(())
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
    t.text()
}

fn as_json(args: &InspectArgs, s: &Seen, ready: &Ready) -> Result<()> {
    let passes: Vec<Value> = s
        .stages
        .reports
        .iter()
        .map(|r| {
            let rules: Vec<Value> =
                r.rules.iter().map(|c| json!({"rule": c.rule, "fired": c.fired, "chosen": c.chosen})).collect();
            json!({
                "pass": r.name, "nodes_before": r.nodes_before, "nodes_after": r.nodes_after, "changed": r.changed,
                "ms": r.ms, "note": r.note, "rules": rules,
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
