//! `pleach merge`: every weight with its adapter in it, one tensor at a time, rounded once to the checkpoint's type.
//!
//! The folder keeps the model's shards and names and loads wherever the model loads. It is written under a temporary
//! name and renamed. Memory: the largest tensor as f32, and what its method needs to change it.

mod fold;
#[cfg(feature = "compiler")]
mod verify;

use crate::args::MergeArgs;
use crate::failure::{Failure, Result};
use crate::files::{self, sync_all};
use crate::model::{Model, temporary_beside};
use crate::report::{self, Table, Ui, bytes};
use fold::{Change, New};
use pleach_frontend::safetensors::Writer;
use pleach_frontend::{Dtype, ModelConfig, TensorRef, TensorTable};
use pleach_runtime::files::sync;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// Endings of files with weights, which are not copied.
const WEIGHTS: [&str; 9] = ["safetensors", "bin", "pt", "pth", "h5", "msgpack", "gguf", "onnx", "ot"];
const INDEX: &str = "model.safetensors.index.json";
/// Files of a run that trained.
const OF_RUNS: [&str; 3] = ["adapter_config.json", "metrics.jsonl", "eval.jsonl"];
const EMBEDDING: &str = "model.embed_tokens";
const HEAD: &str = "lm_head";

/// Merges.
///
/// # Errors
/// Files that are refused, an adapter that does not fit, a folder that holds files already, a check that fails.
pub(crate) fn merge(ui: &Ui, args: &MergeArgs) -> Result<()> {
    let out = &args.out;
    let occupied = out.is_dir() && fs::read_dir(out).map_err(Failure::io("read", out))?.next().is_some();
    if out.is_file() || (occupied && !args.overwrite) {
        let what = if out.is_file() {
            "is a file"
        } else {
            "exists and is not empty; choose another folder or pass --overwrite"
        };
        return Err(Failure::new(format!("{}: {what}", out.display())));
    }
    let model = Model::open(&args.model, std::slice::from_ref(&args.adapter))?;
    if files::same(model.dir(), out) {
        return Err(Failure::usage("--out is the model's own folder; choose another one"));
    }
    if files::same(&args.adapter.path, out) {
        return Err(Failure::usage("--out is the adapter's own folder; choose another one"));
    }
    for a in &model.adapters {
        a.check_copies(&model.checkpoint)?;
        a.recompute(&model.checkpoint, ui.workers());
    }
    let table = TensorTable::open_folder(model.dir())?;
    let largest = table.iter().map(TensorRef::elements).max().unwrap_or(0) * 4;
    ui.note(&format!("merging {} tensors one by one, at most {} at once", table.len(), bytes(largest)));
    let temporary = temporary_beside(out)?;
    fs::create_dir_all(&temporary).map_err(Failure::io("create", &temporary))?;
    let done = write_folder(ui, &model, &table, &temporary).and_then(|changes| {
        publish(&temporary, out, occupied)?;
        Ok(changes)
    });
    let _ = fs::remove_dir_all(&temporary);
    let changes = done?;
    #[cfg(feature = "compiler")]
    let error = args.verify.map(|n| verify::compare(ui, args, n)).transpose()?;
    #[cfg(not(feature = "compiler"))]
    let error: Option<f64> = None;
    if args.json {
        let sites: Vec<Value> = changes.iter().map(|(m, c)| c.json(m)).collect();
        report::json(&json!({"folder": report::path(out), "modules": sites, "verified_relative_error": error}));
    } else if !ui.quiet {
        report::print(&text(&changes));
        report::line(&format!("{}: {} modules merged", out.display(), changes.len()));
        if let Some(e) = error {
            report::line(&format!("merged against unmerged: largest relative difference of the results {e:.2e}"));
        }
    }
    #[cfg(feature = "compiler")]
    if let Some(e) = error {
        verify::judge(e, &table)?;
    }
    Ok(())
}

fn text(changes: &[(String, Change)]) -> String {
    let mut t = Table::new(&["module", "largest change", "relative change", "lost to rounding"]);
    for (module, c) in changes {
        let cells = [format!("{:.3e}", c.largest), format!("{:.3e}", c.relative()), format!("{:.2e}", c.lost())];
        t.row(std::iter::once(module.clone()).chain(cells));
    }
    t.text()
}

/// What happens to one tensor of the checkpoint.
struct Write<'a> {
    name: String,
    tensor: &'a TensorRef,
    new: Option<New<'a>>,
}

fn write_folder(ui: &Ui, model: &Model, table: &TensorTable, out: &Path) -> Result<Vec<(String, Change)>> {
    let Some(adapter) = model.adapters.first() else { return Ok(vec![]) };
    // What changes, by the path of the parameter.
    let sites = adapter.sites.iter().map(|s| (format!("{}.weight", s.module), New::Site(s)));
    let replaced = adapter.replaced.iter().map(|r| (r.path.clone(), New::Replaced(r)));
    let biases = fold::biases(&model.checkpoint, adapter)?;
    let changed = biases.iter().map(|(path, values)| (path.clone(), New::Bias(path, values)));
    let new: BTreeMap<String, New<'_>> = sites.chain(replaced).chain(changed).collect();
    let ends = [format!("{EMBEDDING}.weight"), format!("{HEAD}.weight")];
    let mut files: BTreeMap<&Path, Vec<Write<'_>>> = BTreeMap::new();
    let mut by_tensor: BTreeMap<&str, New<'_>> = BTreeMap::new();
    // A shared embedding and head part as soon as one of them changes.
    let parted = ends.iter().any(|e| new.contains_key(e)) && is_tied(model);
    for (path, n) in new.iter().filter(|(path, _)| !(parted && ends.contains(path))) {
        by_tensor.insert(&parameter(model, path)?.name, *n);
    }
    let mut skip: Vec<String> = vec![];
    let mut shard = None;
    if parted {
        let shared = parameter(model, &ends[1])?;
        let embedding = if shared.name.ends_with("embed_tokens.weight") {
            shared.name.clone()
        } else {
            format!("{EMBEDDING}.weight")
        };
        let head = format!("{HEAD}.weight");
        let list = files.entry(&shared.file).or_default();
        for (name, module) in [(&embedding, EMBEDDING), (&head, HEAD)] {
            let new = new.get(&format!("{module}.weight")).copied();
            list.push(Write { name: name.clone(), tensor: shared, new });
        }
        skip = vec![embedding, head];
        shard = Some(&*shared.file);
    }
    for t in table.iter().filter(|t| !skip.contains(&t.name)) {
        let new = by_tensor.get(t.name.as_str()).copied();
        files.entry(&t.file).or_default().push(Write { name: t.name.clone(), tensor: t, new });
    }
    let bar = ui.progress(files.values().map(Vec::len).sum::<usize>() as u64, "merging");
    let mut changes = BTreeMap::new();
    for (file, list) in &mut files {
        list.sort_by_key(|w| (w.tensor.offset, w.name.clone()));
        let name = file.file_name().ok_or_else(|| Failure::new("a shard has no name"))?;
        let head: Vec<(String, Dtype, Vec<u64>)> =
            list.iter().map(|w| (w.name.clone(), w.tensor.dtype, w.tensor.shape.clone())).collect();
        let mut writer = Writer::create(&out.join(name), &head)?;
        for w in list.iter() {
            match w.new {
                None => writer.write(&w.tensor.read_bytes()?)?,
                Some(new) => {
                    let (bytes, change) = fold::merged(&model.checkpoint, adapter, w.tensor, new)?;
                    writer.write(&bytes)?;
                    changes.insert(new.name().to_owned(), change);
                }
            }
            bar.inc(1);
        }
        writer.finish()?;
    }
    bar.finish_and_clear();
    copy_rest(model.dir(), out, shard)?;
    let sites = adapter.sites.iter().flat_map(|s| [s.module.clone(), format!("{}.bias", s.module)]);
    let order = sites.chain(adapter.replaced.iter().map(|r| r.path.clone()));
    Ok(order.filter_map(|name| changes.remove(&name).map(|c| (name, c))).collect())
}

fn parameter<'a>(model: &'a Model, path: &str) -> Result<&'a TensorRef> {
    model.checkpoint.param(path).ok_or_else(|| Failure::new(format!("the checkpoint holds no `{path}`")))
}

fn is_tied(model: &Model) -> bool {
    matches!(&model.checkpoint.config, ModelConfig::Llama(c) if c.tied_head)
}

/// Configuration, tokenizer and everything else that is no weight. `parted` is the shard whose tied embedding and head
/// became two tensors.
fn copy_rest(from: &Path, to: &Path, parted: Option<&Path>) -> Result<()> {
    for entry in fs::read_dir(from).map_err(Failure::io("read", from))? {
        let path = entry.map_err(Failure::io("read", from))?.path();
        let weights = path.extension().is_some_and(|e| WEIGHTS.iter().any(|w| e == *w));
        let Some(name) = path.file_name().filter(|_| path.is_file() && !weights) else { continue };
        // What a run that trained into the model's folder left there is none of the model's.
        if OF_RUNS.iter().any(|n| name == *n) {
            continue;
        }
        let target = to.join(name);
        match (name.to_str(), parted) {
            (Some("config.json"), Some(_)) => edit(&path, &target, |v| v["tie_word_embeddings"] = false.into())?,
            (Some(INDEX), Some(shard)) => {
                let shard = shard.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
                edit(&path, &target, |v| {
                    for module in [EMBEDDING, HEAD] {
                        v["weight_map"][format!("{module}.weight")] = shard.as_str().into();
                    }
                })?;
            }
            // A copy of the contents, not of a read-only mark.
            _ => {
                let bytes = fs::read(&path).map_err(Failure::io("read", &path))?;
                fs::write(&target, bytes).map_err(Failure::io("write", &target))?;
            }
        }
    }
    Ok(())
}

fn edit(from: &Path, to: &Path, change: impl FnOnce(&mut Value)) -> Result<()> {
    let bytes = fs::read(from).map_err(Failure::io("read", from))?;
    let mut v: Value = serde_json::from_slice(&bytes)?;
    change(&mut v);
    fs::write(to, format!("{v:#}\n")).map_err(Failure::io("write", to))
}

/// Renames the finished folder to its place; into an occupied one file by file, weights of before taken away.
fn publish(temporary: &Path, out: &Path, occupied: bool) -> Result<()> {
    if !occupied {
        return files::put_folder(temporary, out);
    }
    sync_all(temporary)?;
    let names = |dir: &Path| -> Result<BTreeSet<std::ffi::OsString>> {
        let list = fs::read_dir(dir).map_err(Failure::io("read", dir))?;
        Ok(list.flatten().map(|e| e.file_name()).collect())
    };
    let new = names(temporary)?;
    for old in names(out)?.difference(&new) {
        let path = out.join(old);
        if path.extension().is_some_and(|e| e == "safetensors") || old == INDEX {
            fs::remove_file(&path).map_err(Failure::io("replace", &path))?;
        }
    }
    for name in &new {
        fs::rename(temporary.join(name), out.join(name)).map_err(Failure::io("write", out))?;
    }
    Ok(sync(out)?)
}
