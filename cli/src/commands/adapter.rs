//! `pleach adapter`: what an adapter holds, and where one would attach.

use crate::args::{AdapterCommand, AdapterPath};
use crate::failure::Result;
use crate::model::Model;
use crate::report::{self, Table, Ui, count};
use pleach_frontend::peft::{check_adapter, preview_targets};
use pleach_frontend::{Checkpoint, ModelConfig, ModuleTable};
use serde_json::json;
use std::path::Path;

/// Checks an adapter or previews targets.
///
/// # Errors
/// A tensor without its place, a place without its tensor, by name with the nearest candidate.
pub(crate) fn adapter(ui: &Ui, command: &AdapterCommand) -> Result<()> {
    match command {
        AdapterCommand::Check { model, adapter, json } => check(ui, model, adapter, *json),
        AdapterCommand::Targets { model, spec, r, json } => targets(model, spec, *r, *json),
    }
}

fn check(ui: &Ui, model: &Path, path: &AdapterPath, as_json: bool) -> Result<()> {
    let model = Model::open(model, std::slice::from_ref(path))?;
    let Some(adapter) = model.adapters.first() else { return Ok(()) };
    adapter.check_copies(&model.checkpoint)?;
    let r = check_adapter(adapter, &model.checkpoint)?;
    if as_json {
        let sites: Vec<_> = r
            .sites
            .iter()
            .map(|s| {
                json!({"module": s.module, "rank": s.rank, "scale": s.scale, "parameters": s.parameters,
                       "delta_norm": s.delta_norm})
            })
            .collect();
        report::json(&json!({
            "adapter": adapter.name, "method": adapter.config.method.name(), "tensors": r.tensors, "parameters": r.parameters, "all_zero": r.all_zero,
            "finite": !r.not_finite, "notes": adapter.notes, "sites": sites,
        }));
        return Ok(());
    }
    let mut t = Table::new(&["module", "rank", "scale", "parameters", "norm of the delta"]);
    for s in &r.sites {
        let norm = format!("{:.4e}", s.delta_norm);
        let rank = s.rank.map_or_else(|| "whole".into(), |r| r.to_string());
        t.row([s.module.clone(), rank, format!("{:.4}", s.scale), count(s.parameters), norm]);
    }
    report::print(&t.text());
    report::line(&format!(
        "{} ({}): {} tensors, all matched; {} modules, {} parameters",
        adapter.name,
        adapter.config.method.name(),
        r.tensors,
        r.sites.len(),
        count(r.parameters)
    ));
    for note in &adapter.notes {
        ui.note(&format!("note: {note}"));
    }
    if r.all_zero {
        ui.note("warning: every delta is zero, the adapter changes nothing");
    }
    if r.not_finite {
        ui.note("warning: some values are not finite, the results will not be numbers");
    }
    Ok(())
}

fn targets(model: &Path, spec: &str, rank: u64, as_json: bool) -> Result<()> {
    // Headers of the checkpoint are not needed: the configuration says which modules there are.
    let modules = match Checkpoint::open(model) {
        Ok(c) => c.modules,
        Err(_) => ModuleTable::new(&ModelConfig::read(model)?),
    };
    let list = preview_targets(spec, &modules)?;
    let parameters = |t: &pleach_frontend::peft::Target| rank * (t.input + t.output);
    let total: u64 = list.iter().map(parameters).sum();
    if as_json {
        let rows: Vec<_> = list
            .iter()
            .map(|t| json!({"module": t.module, "in": t.input, "out": t.output, "parameters": parameters(t)}))
            .collect();
        report::json(&json!({"rank": rank, "modules": rows, "parameters": total}));
        return Ok(());
    }
    let mut t = Table::new(&["module", "in", "out", "parameters"]);
    for x in &list {
        t.row([x.module.clone(), x.input.to_string(), x.output.to_string(), count(parameters(x))]);
    }
    report::print(&t.text());
    report::line(&format!("{} modules, {} parameters at rank {rank}", list.len(), count(total)));
    Ok(())
}
