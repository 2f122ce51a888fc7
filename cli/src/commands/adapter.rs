//! `pleach adapter`: what an adapter holds, where one would attach, and one method's form from another's.

use crate::args::{AdapterCommand, AdapterPath};
use crate::failure::{Failure, Result};
use crate::files::{put_folder, sync_all};
use crate::model::{Model, temporary_beside};
use crate::report::{self, Table, Ui, count};
use pleach_frontend::adapter::{Combination, combine, to_lora};
use pleach_frontend::peft::{MethodConfig, check_adapter, preview_targets};
use pleach_frontend::{Adapter, Checkpoint, ModelConfig, ModuleTable};
use pleach_runtime::files::sync;
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};

/// Checks an adapter, previews targets or converts.
///
/// # Errors
/// A tensor without its place, a place without its tensor, by name with the nearest candidate.
pub(crate) fn adapter(ui: &Ui, command: &AdapterCommand) -> Result<()> {
    match command {
        AdapterCommand::Check { model, adapter, json } => check(ui, model, adapter, *json),
        AdapterCommand::Targets { model, spec, r, json } => targets(model, spec, *r, *json),
        AdapterCommand::Convert { adapter, to: _, r, out, model, overwrite } => {
            convert(ui, adapter, *r, out, model.as_deref(), *overwrite)
        }
        AdapterCommand::Merge { adapters, weights, combination, density, rank, seed, out, model, overwrite } => {
            let weights = if weights.is_empty() { vec![1.0; adapters.len()] } else { weights.clone() };
            let how = Combination { kind: combination.clone(), weights, density: *density, rank: *rank, seed: *seed };
            merge(ui, adapters, &how, out, model.as_deref(), *overwrite)
        }
    }
}

fn check(ui: &Ui, model: &Path, path: &AdapterPath, as_json: bool) -> Result<()> {
    let model = Model::open(model, std::slice::from_ref(path))?;
    let Some(adapter) = model.adapters.first() else { return Ok(()) };
    adapter.check_copies(&model.checkpoint)?;
    adapter.recompute(&model.checkpoint, ui.workers());
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
        let norm = s.delta_norm.map_or_else(|| "no single weight".into(), |n| format!("{n:.4e}"));
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
    let list = preview_targets(crate::method::names(spec), &modules)?;
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

/// To LoRA.
fn convert(ui: &Ui, from: &Path, rank: Option<u64>, out: &Path, model: Option<&Path>, overwrite: bool) -> Result<()> {
    may_write(&[from], out, overwrite)?;
    let base = model.map_or_else(|| base_of(from), |dir| Ok(dir.to_owned()))?;
    let checkpoint = Checkpoint::open(&base)?;
    let adapter = Adapter::open(from, None, &checkpoint.modules)?;
    adapter.check_copies(&checkpoint)?;
    adapter.recompute(&checkpoint, ui.workers());
    write_folder(out, |dir| Ok(to_lora(&adapter, &checkpoint, rank, dir)?))?;
    for note in &adapter.notes {
        ui.note(&format!("note: {note}"));
    }
    if !ui.quiet {
        let (sites, parameters) = (adapter.sites.len(), adapter.parameters());
        let of = adapter.config.method.name();
        report::line(&format!("{}: LoRA, {sites} modules, {} parameters of {of}", out.display(), count(parameters)));
    }
    Ok(())
}

/// Several LoRA adapters to one.
fn merge(
    ui: &Ui,
    from: &[PathBuf],
    how: &Combination,
    out: &Path,
    model: Option<&Path>,
    overwrite: bool,
) -> Result<()> {
    let sources: Vec<&Path> = from.iter().map(PathBuf::as_path).collect();
    may_write(&sources, out, overwrite)?;
    let base = model.map_or_else(|| base_of(&from[0]), |dir| Ok(dir.to_owned()))?;
    let checkpoint = Checkpoint::open(&base)?;
    let open = |dir: &PathBuf| Adapter::open(dir, None, &checkpoint.modules);
    let adapters = from.iter().map(open).collect::<std::result::Result<Vec<_>, _>>()?;
    let mut done = (0, 0);
    write_folder(out, |dir| {
        done = combine(&adapters, how, &checkpoint, dir)?;
        Ok(())
    })?;
    if !ui.quiet {
        let ((rank, modules), n) = (done, from.len());
        report::line(&format!("{}: {} of {n} adapters, {modules} modules of rank {rank}", out.display(), how.kind));
    }
    Ok(())
}

fn occupied(out: &Path) -> Result<bool> {
    Ok(out.is_dir() && fs::read_dir(out).map_err(Failure::io("read", out))?.next().is_some())
}

/// Refuses a folder that holds something, or what is read.
fn may_write(from: &[&Path], out: &Path, overwrite: bool) -> Result<()> {
    if out.is_file() || (occupied(out)? && !overwrite) {
        let what = "exists and is not empty; choose another folder or pass --overwrite";
        return Err(Failure::new(format!("{}: {what}", out.display())));
    }
    if from.iter().any(|from| crate::files::same(from, out)) {
        return Err(Failure::usage("--out is the adapter's own folder; choose another one"));
    }
    Ok(())
}

/// Writes an adapter's folder under a temporary name and renames it.
fn write_folder(out: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let occupied = occupied(out)?;
    let temporary = temporary_beside(out)?;
    fs::create_dir_all(&temporary).map_err(Failure::io("create", &temporary))?;
    let done = write(&temporary).and_then(|()| {
        if !occupied {
            return put_folder(&temporary, out);
        }
        sync_all(&temporary)?;
        for file in ["adapter_model.safetensors", "adapter_config.json"] {
            fs::rename(temporary.join(file), out.join(file)).map_err(Failure::io("write", out))?;
        }
        Ok(sync(out)?)
    });
    let _ = fs::remove_dir_all(&temporary);
    done
}

/// The base model that an adapter's configuration names, as a folder: as it stands, or beside the adapter.
fn base_of(adapter: &Path) -> Result<PathBuf> {
    let config = MethodConfig::read(adapter)?;
    let name = config.raw.get("base_model_name_or_path").and_then(|v| v.as_str()).unwrap_or_default();
    let places = [PathBuf::from(name), adapter.join(name)];
    places.into_iter().find(|p| !name.is_empty() && p.join("config.json").is_file()).ok_or_else(|| {
        let what = if name.is_empty() {
            "names no base model".into()
        } else {
            format!("names `{name}`, which is no folder here")
        };
        Failure::new(format!("{}: adapter_config.json {what}; give the model with --model", adapter.display()))
    })
}
