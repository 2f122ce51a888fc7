//! Checkpoints: one folder per kept step, whole or not there.
//!
//! A folder is written under a temporary name, every file synced, then the folder, then it is renamed and the folder
//! above synced. A kill at any moment leaves the checkpoints that were there, and at most one temporary folder, which
//! the next one replaces. What is thrown away is renamed first, so that no half folder ever has a checkpoint's name.
//!
//! In it: the adapter as PEFT reads it, `optimizer.safetensors` (moments, and whatever of the slot the adapter's file
//! does not hold), `trainer_state.json`.

use super::adapter::{AdapterPlan, damaged, with_tensors};
use super::machine::Machine;
use super::step::Settings;
use crate::error::{Result, RuntimeError};
use crate::files::{sync, write_synced, write_tensors};
use pleach_plan::DType;
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::fs;
use std::path::{Path, PathBuf};

/// File of the moments.
const OPTIMIZER: &str = "optimizer.safetensors";
/// File of the counts.
const STATE: &str = "trainer_state.json";
/// Version of the folder's form.
const VERSION: u64 = 1;

/// Where a run stands; with the tensors, everything that decides how it goes on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Version of the form.
    pub version: u64,
    /// Optimizer steps done.
    pub global_step: u64,
    /// Passes over the rows.
    pub epoch: f64,
    /// Places of the order that were used.
    pub position: u64,
    /// Settings of the run.
    pub settings: Settings,
    /// `adapter_config.json` of the run, without the base model's name; `None`: written by a version that did not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<Map<String, Value>>,
    /// Fingerprint of the rows, as hexadecimal digits.
    pub data: String,
}

/// Called before every operation on files with its name; for tests, which end the process here.
pub type Watch<'w> = &'w mut dyn FnMut(&str);

impl State {
    /// After `step` steps of these settings, for an adapter of this configuration, over rows with this fingerprint.
    pub fn new(step: u64, settings: &Settings, adapter: &Map<String, Value>, rows: usize, fingerprint: u64) -> State {
        let position = step * settings.accum * settings.batch;
        State {
            version: VERSION,
            global_step: step,
            epoch: position as f64 / rows.max(1) as f64,
            position,
            settings: settings.clone(),
            adapter: Some(adapter.clone()),
            data: format!("{fingerprint:016x}"),
        }
    }

    /// Whether a run with other settings goes on from here as if it had never stopped. More steps are welcome.
    ///
    /// # Errors
    /// Everything that differs, by name.
    pub fn check(&self, settings: &Settings, adapter: &Map<String, Value>, fingerprint: u64) -> Result<()> {
        let as_map = |s: &Settings| serde_json::to_value(s).unwrap_or_default();
        let (old, new) = (as_map(&self.settings), as_map(settings));
        let mut differ = vec![];
        let mut compare = |name: &str, was: Option<&Value>, is: Option<&Value>| {
            if was.map(unordered) != is.map(unordered) {
                let text = |v: Option<&Value>| v.map_or("not given".into(), Value::to_string);
                differ.push(format!("{name} was {}, is {}", text(was), text(is)));
            }
        };
        for (name, value) in old.as_object().into_iter().flatten().filter(|(n, _)| *n != "steps") {
            compare(name, Some(value), new.get(name));
        }
        if let Some(old) = &self.adapter {
            old.iter().for_each(|(name, value)| compare(name, Some(value), adapter.get(name)));
            let more = adapter.iter().filter(|(name, _)| !old.contains_key(*name));
            more.for_each(|(name, value)| compare(name, None, Some(value)));
        }
        if self.data != format!("{fingerprint:016x}") {
            differ.push("the rows of --data are others".into());
        }
        if settings.steps < self.global_step {
            differ.push(format!("{} steps are done, {} are asked for", self.global_step, settings.steps));
        }
        if differ.is_empty() {
            return Ok(());
        }
        let list = differ.join("\n  ");
        Err(RuntimeError::Values(format!(
            "the checkpoint belongs to another run; give the same options, or start anew with --overwrite:\n  {list}"
        )))
    }
}

/// A value of an adapter's configuration in one form: lists are of names and have no order.
pub fn unordered(v: &Value) -> Value {
    let Value::Array(list) = v else { return v.clone() };
    let mut texts: Vec<String> = list.iter().map(Value::to_string).collect();
    texts.sort_unstable();
    texts.into()
}

/// The checkpoints of a folder: step and path, by step.
///
/// # Errors
/// A folder that cannot be listed; none at all is no error.
pub fn list(dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut out = vec![];
    let entries = match fs::read_dir(dir) {
        Ok(e) => e,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(out),
        Err(e) => return Err(RuntimeError::io(dir.display().to_string())(e)),
    };
    for e in entries.flatten() {
        let step = e.file_name().to_str().and_then(|n| n.strip_prefix("checkpoint-")?.parse().ok());
        out.extend(step.filter(|_| e.path().is_dir()).map(|s| (s, e.path())));
    }
    out.sort_unstable();
    Ok(out)
}

/// Writes `dir/checkpoint-N`.
///
/// # Errors
/// What the system refuses.
pub fn save(
    machine: &dyn Machine,
    adapter: &AdapterPlan,
    base: Option<&str>,
    state: &State,
    dir: &Path,
    watch: Watch<'_>,
) -> Result<PathBuf> {
    let name = format!("checkpoint-{}", state.global_step);
    let (temporary, path) = (dir.join(format!(".{name}.partial")), dir.join(&name));
    watch("begin");
    remove(&temporary)?;
    let done = fill(machine, adapter, base, state, &temporary, &mut *watch).and_then(|()| {
        watch("rename");
        if path.exists() {
            discard(dir, &path)?;
        }
        fs::rename(&temporary, &path).map_err(RuntimeError::io(path.display().to_string()))
    });
    if done.is_err() {
        // On a full disk the part that was written only stands in the way; what went wrong is said by the error.
        let _ = remove(&temporary);
    }
    done?;
    watch("renamed");
    sync(dir)?;
    Ok(path)
}

/// Writes the files of a checkpoint into a folder, which is made, and syncs them.
fn fill(
    machine: &dyn Machine,
    adapter: &AdapterPlan,
    base: Option<&str>,
    state: &State,
    folder: &Path,
    watch: Watch<'_>,
) -> Result<()> {
    fs::create_dir_all(folder).map_err(RuntimeError::io(folder.display().to_string()))?;
    watch("adapter");
    adapter.write(machine, base, folder)?;
    watch("optimizer");
    let in_adapter: Vec<String> =
        adapter.tensors.iter().filter(|t| t.file.is_some() && t.kept.is_none()).map(|t| adapter.param(t)).collect();
    let mut tensors = vec![];
    for name in machine.changing().into_iter().chain(machine.fixed()).filter(|n| !in_adapter.contains(n)) {
        let v = machine.read(&name)?;
        let dtype = match v.dtype {
            DType::F32 => Dtype::F32,
            DType::BF16 => Dtype::BF16,
            DType::F16 => Dtype::F16,
            DType::I32 => Dtype::I32,
            DType::Bool => Dtype::BOOL,
        };
        tensors.push((name, dtype, v.shape, v.bytes));
    }
    write_tensors(&folder.join(OPTIMIZER), &tensors)?;
    watch("state");
    let mut text = serde_json::to_vec_pretty(state).unwrap_or_default();
    text.push(b'\n');
    write_synced(&folder.join(STATE), &text)?;
    sync(folder)
}

/// What a checkpoint says of itself.
///
/// # Errors
/// A folder that is no checkpoint.
pub fn state(path: &Path) -> Result<State> {
    let file = path.join(STATE);
    let text = fs::read(&file).map_err(|e| match path.is_dir() {
        true => damaged(&file, &format!("cannot be read ({e})")),
        false => RuntimeError::Values(format!("{}: there is no such checkpoint", path.display())),
    })?;
    let s: State = serde_json::from_slice(&text).map_err(|e| damaged(&file, &format!("cannot be read ({e})")))?;
    if s.version == VERSION { Ok(s) } else { Err(damaged(&file, "was written by another version")) }
}

/// Brings the tensors of a checkpoint back.
///
/// # Errors
/// Files that are missing, damaged, or of another adapter.
pub fn restore(machine: &mut dyn Machine, adapter: &AdapterPlan, path: &Path) -> Result<()> {
    let done = adapter.restore(machine, path)?;
    let file = path.join(OPTIMIZER);
    let rest: Vec<String> =
        machine.changing().into_iter().chain(machine.fixed()).filter(|n| !done.contains(n)).collect();
    with_tensors(&file, |t| {
        for name in &rest {
            let v = t.tensor(name).map_err(|_| damaged(&file, &format!("has no tensor `{name}`")))?;
            let dtype = crate::cast::from_file(v.dtype()).ok_or_else(|| damaged(&file, "holds a strange type"))?;
            machine.write(name, dtype, v.data())?;
        }
        Ok(())
    })
}

/// Throws away all but the newest `keep` checkpoints.
///
/// # Errors
/// What the system refuses.
pub fn prune(dir: &Path, keep: u64) -> Result<()> {
    let all = list(dir)?;
    let old = all.len().saturating_sub(keep.max(1) as usize);
    all[..old].iter().try_for_each(|(_, p)| discard(dir, p))
}

/// Throws away a checkpoint.
///
/// # Errors
/// What the system refuses.
pub(crate) fn discard(dir: &Path, path: &Path) -> Result<()> {
    let name = path.file_name().map_or(String::new(), |n| n.to_string_lossy().into_owned());
    let gone = dir.join(format!(".{name}.removed"));
    remove(&gone)?;
    fs::rename(path, &gone).map_err(RuntimeError::io(path.display().to_string()))?;
    remove(&gone)
}

/// Removes what a killed run left behind.
///
/// # Errors
/// What the system refuses.
pub fn sweep(dir: &Path) -> Result<()> {
    for e in fs::read_dir(dir).map_err(RuntimeError::io(dir.display().to_string()))?.flatten() {
        let name = e.file_name().to_string_lossy().into_owned();
        if name.starts_with(".checkpoint-") && (name.ends_with(".partial") || name.ends_with(".removed")) {
            remove(&e.path())?;
        }
    }
    Ok(())
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(RuntimeError::io(path.display().to_string())(e)),
        _ => Ok(()),
    }
}
