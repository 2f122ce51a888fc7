//! Every stage of a model folder: the graph as imported, after each pass, cut into kernels, and their code.

use super::plan;
use crate::args::InspectArgs;
use crate::failure::{Failure, Result};
use crate::pipeline::{self, Request, table};
use crate::report::{self, Table, Ui};
use pleach_codegen::emit::gpu;
use pleach_codegen::{compile, mlir};
use pleach_ir::{Class, Graph, Schedule, Sym, text};
use pleach_passes::fuse_kernels::{self, CutOptions};
use pleach_passes::{Outcome, PassReport};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// Stages up to the schedule.
struct Stages {
    request: Request,
    imported: Graph,
    outcome: Outcome,
    schedule: Schedule,
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
    let imported = request.import(&model)?;
    if args.ir && args.stage == "imported" {
        report::print(&text::print(&imported));
        return Ok(());
    }
    let outcome = pipeline::passes(&imported, &request, args.ir)?;
    let schedule = pipeline::schedule(&outcome.graph, &request.host()?)?;
    let s = Stages { request, imported, outcome, schedule };
    if args.json {
        return as_json(ui, args, &s, &entries);
    }
    if args.ir {
        report::print(&stage(&s, &args.stage)?);
    }
    if args.dot {
        for e in &s.outcome.graph.entries {
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
        report::print(&rules(&s.outcome.reports));
    }
    if args.kernels || args.memory {
        let (_, ready) = crate::ready::compile(ui, &args.model, &entries, &[], s.request.train.clone())?;
        if args.kernels {
            report::print(&plan::kernels(&ready.plan, args.kernel.as_deref(), &args.capacity)?);
        }
        if args.memory {
            report::print(&plan::memory(&ready.plan, &args.capacity)?);
        }
    }
    if !(args.ir || args.dot || args.mlir || args.asm || args.ptx || args.rules || args.kernels || args.memory) {
        report::print(&summary(&s));
    }
    Ok(())
}

/// The text of a stage, by name, number or as the last one.
fn stage(s: &Stages, name: &str) -> Result<String> {
    match name {
        "final" => return Ok(text::print(&s.outcome.graph)),
        "schedule" => return Ok(text::print_schedule(&s.schedule)),
        _ => {}
    }
    let wanted = |label: &str| {
        let (number, pass) = label.split_once("-after-").unwrap_or(("", label));
        label == name || pass == name || number.parse::<u32>().ok() == name.parse().ok()
    };
    if let Some((_, text)) = s.outcome.dumps.iter().rfind(|(label, _)| wanted(label)) {
        return Ok(text.clone());
    }
    let known = s.outcome.dumps.iter().map(|d| d.0.as_str());
    let list: Vec<&str> = ["imported"].into_iter().chain(known).chain(["final", "schedule"]).collect();
    Err(Failure::usage(format!("no stage `{name}` changed the graph; there are: {}", list.join(", "))))
}

/// The kernels as MLIR or as assembly.
fn code(args: &InspectArgs, s: &Stages) -> Result<()> {
    let host = s.request.host()?;
    let emitted = compile::emit_all(&s.schedule, &host)?;
    let only = args.kernel.as_deref().unwrap_or_default();
    for (k, e) in s.schedule.kernels.iter().zip(&emitted).filter(|(k, _)| k.name.contains(only)) {
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
fn ptx(args: &InspectArgs, s: &Stages) -> Result<()> {
    let chip = s.request.gpu().unwrap_or(gpu::GpuChip::Sm80);
    let cut = CutOptions { supported: &compile::supported_gpu, panels: &[] };
    let schedule = fuse_kernels::schedule(&s.outcome.graph, &cut)?;
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

fn summary(s: &Stages) -> String {
    let (before, after) = (operators(&s.imported), operators(&s.outcome.graph));
    let mut t = Table::new(&["operator", "imported", "final"]);
    let mut names: Vec<&str> = before.keys().chain(after.keys()).copied().collect();
    names.sort_unstable();
    names.dedup();
    for n in names {
        let of = |m: &BTreeMap<&str, usize>| m.get(n).copied().unwrap_or(0).to_string();
        t.row([n.to_string(), of(&before), of(&after)]);
    }
    let rows: Vec<pipeline::Row> = s.outcome.reports.iter().map(pipeline::Row::pass).collect();
    let mut e = Table::new(&["entry", "nodes", "launches"]);
    for (g, c) in s.outcome.graph.entries.iter().zip(&s.schedule.entries) {
        e.row([g.name.clone(), g.nodes.len().to_string(), c.steps.len().to_string()]);
    }
    format!("{}\n{}\n{}{} kernels\n", t.text(), table(&rows), e.text(), s.schedule.kernels.len())
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

fn as_json(ui: &Ui, args: &InspectArgs, s: &Stages, entries: &[&str]) -> Result<()> {
    let stage = |name: &str, g: &Graph| json!({"stage": name, "nodes": pleach_passes::manager::node_count(g), "operators": operators(g)});
    let passes: Vec<Value> = s
        .outcome
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
    let mut out = Map::new();
    out.insert("stages".into(), stages(s, &stage)?.into());
    out.insert("passes".into(), passes.into());
    let (_, ready) = crate::ready::compile(ui, &args.model, entries, &[], s.request.train.clone())?;
    out.insert("kernels".into(), plan::kernels_json(&ready.plan, &args.capacity)?);
    out.insert("memory".into(), plan::memory_json(&ready.plan, &args.capacity)?);
    if let Some(list) = ready.plan.meta.extra.get("saved") {
        out.insert("saved".into(), list.clone());
    }
    if args.ir {
        out.insert("ir".into(), self::stage(s, &args.stage)?.into());
    }
    report::json(&Value::Object(out));
    Ok(())
}

/// Operator counts of every stage: one more pass each time.
fn stages(s: &Stages, stage: &dyn Fn(&str, &Graph) -> Value) -> Result<Vec<Value>> {
    let mut list = vec![stage("imported", &s.imported)];
    let default = pleach_passes::Pipeline::default();
    let mut graph = s.imported.clone();
    let passes: Vec<&String> = default.passes.iter().filter(|p| !s.request.disable.contains(p)).collect();
    for name in passes {
        graph = pleach_passes::run(&graph, &pleach_passes::Pipeline::of(&[name]), &s.request.options())?.graph;
        list.push(stage(name, &graph));
    }
    let mut n: BTreeMap<&str, usize> = BTreeMap::new();
    for k in s.schedule.entries.iter().flat_map(|e| &e.steps).map(|x| &s.schedule.kernels[x.kernel.0 as usize]) {
        let class = match k.class {
            Class::Row => "row",
            Class::Contraction => "contraction",
            Class::Attention => "attention",
            Class::Scatter => "scatter",
        };
        *n.entry(class).or_insert(0) += 1;
    }
    list.push(json!({"stage": "schedule", "kernels": s.schedule.kernels.len(), "launches": n}));
    Ok(list)
}
