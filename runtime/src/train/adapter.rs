//! An adapter as its plan describes it, and its folder as PEFT reads it.
//!
//! The description is data under `adapter` in the plan's facts; the frontend writes it. Indices are i32 in the slot and
//! I64 in the file.

use super::machine::Machine;
use super::ranks::{Kept, SiteRanks, places, select};
use crate::error::{Result, RuntimeError};
use crate::files::{sync, write_synced, write_tensors};
use pleach_plan::{DType, Plan};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::borrow::Cow;
use std::fs;
use std::path::Path;

/// File of an adapter's tensors.
pub(super) const TENSORS: &str = "adapter_model.safetensors";
/// File of an adapter's configuration.
pub(super) const CONFIG: &str = "adapter_config.json";
/// Folder of first values inside an adapter's folder: what changed the base, as an adapter of its own.
pub(super) const INITIAL: &str = "initial_adapter";

/// What the plan says of the adapter that it trains.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct AdapterPlan {
    /// Its slot.
    pub slot: u32,
    /// `adapter_config.json` without the base model's name.
    pub config: Map<String, Value>,
    /// The tensors of the slot.
    pub tensors: Vec<TensorPlan>,
    /// What the method changes from step to step, for whoever knows methods.
    #[serde(default)]
    pub events: Option<Value>,
    /// `adapter_config.json` of the folder of first values, where some are kept.
    #[serde(default)]
    pub initial: Option<Map<String, Value>>,
    /// What first values are prepared by, for whoever knows methods.
    #[serde(default)]
    pub preparation: Option<Map<String, Value>>,
    /// Sites of which only ranks in use are saved.
    #[serde(default)]
    pub ranks: Vec<SiteRanks>,
}

/// One tensor of the slot.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct TensorPlan {
    /// Key in the slot; the parameter is called `slot{n}.{key}`.
    pub key: String,
    /// Name in the file; `None` where it is not saved.
    pub file: Option<String>,
    /// Dimensions.
    pub shape: Vec<u64>,
    /// Type in the file: `F32`, or `I64` for indices.
    pub dtype: String,
    /// Whether the optimizer changes it.
    pub trained: bool,
    /// How it starts.
    pub init: Init,
    /// What of it is saved, where not all of it is.
    #[serde(default)]
    pub kept: Option<Kept>,
}

/// How a tensor starts; see the frontend's type of that name for the meaning of each.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs, reason = "the frontend's type has the meanings")]
pub enum Init {
    Zeros {},
    Constant { value: f32 },
    Leading { count: u64 },
    Uniform { bound: f32 },
    Normal { std: f32 },
    Seeded { seed: u64, bound: f32 },
    Twister { seed: u64, skip: u64, bound: f32 },
    RandomCells { rows: u64, columns: u64 },
    Base { tensor: String },
    RowNorms(Norms),
    ColumnNorms(Norms),
    RandomIndices { from: u64 },
    Units { units: u64, first: u64, by: Option<Scores> },
    LargestColumns { tensor: String },
    LargestGradientColumns { tensor: String, batches: u64 },
    Prepared { kept: Option<String> },
}

/// How units of coupled layers are compared.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct Scores {
    /// The weights whose parts count.
    pub weights: Vec<UnitWeight>,
    /// The product of the norms of a unit's parts, in place of the norm of all.
    pub product: bool,
}

/// Where units lie in a weight [out, in].
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct UnitWeight {
    /// Tensor of the base.
    pub tensor: String,
    /// Whether units are columns rather than rows.
    pub columns: bool,
    /// Rows or columns of one.
    pub width: u64,
}

/// Lengths of the rows (or columns) of W + scale · B · A.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct Norms {
    /// Tensor of the base.
    pub weight: String,
    /// Key of A [r, in].
    pub a: Option<String>,
    /// Key of B [out, r].
    pub b: Option<String>,
    /// Key of the factor.
    pub scale: Option<String>,
}

impl AdapterPlan {
    /// The adapter a plan trains.
    ///
    /// # Errors
    /// [`RuntimeError::Values`] for a plan that trains none, or one made by another version.
    pub fn of(plan: &Plan) -> Result<AdapterPlan> {
        let value = plan.meta.extra.get("adapter").cloned().ok_or_else(|| {
            RuntimeError::Values("the plan trains no adapter; compile it with --method and --entry train".into())
        })?;
        serde_json::from_value(value)
            .map_err(|e| RuntimeError::Values(format!("the plan's adapter is not understood ({e}); compile it again")))
    }

    /// Number of trained values.
    pub fn trained(&self) -> u64 {
        // What is not saved is only there to measure a gradient.
        self.tensors.iter().filter(|t| t.trained && t.file.is_some()).map(|t| t.shape.iter().product::<u64>()).sum()
    }

    /// Name of a tensor's parameter.
    pub fn param(&self, t: &TensorPlan) -> String {
        format!("slot{}.{}", self.slot, t.key)
    }

    /// Writes the folder's two files into a folder that exists, and the first values that are kept beside them; syncs them.
    ///
    /// # Errors
    /// What the system refuses, and a tensor that the machine does not have.
    pub fn write(&self, machine: &dyn Machine, base: Option<&str>, dir: &Path) -> Result<()> {
        self.write_files(machine, base, dir, &self.config, |t| t.file.as_deref())?;
        let Some(config) = &self.initial else { return Ok(()) };
        let dir = dir.join(INITIAL);
        fs::create_dir_all(&dir).map_err(RuntimeError::io(dir.display().to_string()))?;
        self.write_files(machine, base, &dir, config, |t| match &t.init {
            Init::Prepared { kept } => kept.as_deref(),
            _ => None,
        })?;
        sync(&dir)
    }

    fn write_files(
        &self,
        machine: &dyn Machine,
        base: Option<&str>,
        dir: &Path,
        config: &Map<String, Value>,
        name: impl Fn(&TensorPlan) -> Option<&str>,
    ) -> Result<()> {
        let mut config = config.clone();
        self.put_ranks(machine, &mut config)?;
        config.insert("base_model_name_or_path".into(), base.map_or(Value::Null, Value::from));
        // PEFT writes its keys in order of their names.
        let mut keys: Vec<(String, Value)> = config.into_iter().collect();
        keys.sort_by(|a, b| a.0.cmp(&b.0));
        let mut text = serde_json::to_vec_pretty(&Map::from_iter(keys)).unwrap_or_default();
        text.push(b'\n');
        write_synced(&dir.join(CONFIG), &text)?;
        let mut tensors = vec![];
        for t in &self.tensors {
            let Some(file) = name(t) else { continue };
            if t.shape.contains(&0) {
                let dtype = if t.dtype == "I64" { Dtype::I64 } else { Dtype::F32 };
                tensors.push((file.to_owned(), dtype, t.shape.clone(), Cow::Owned(vec![])));
                continue;
            }
            let v = machine.read(&self.param(t))?;
            if v.dtype == DType::F32 && t.dtype == "I64" {
                // A mask is saved as the places that it holds.
                let (shape, bytes) = places(&t.shape, &self.in_use(machine, &t.key)?);
                tensors.push((file.to_owned(), Dtype::I64, shape, Cow::Owned(bytes)));
                continue;
            }
            let (dtype, bytes) = match (v.dtype, t.dtype.as_str()) {
                (DType::F32, "F32") => (Dtype::F32, v.bytes),
                (DType::I32, "I64") => {
                    let wide =
                        v.bytes.as_chunks().0.iter().flat_map(|b| i64::from(i32::from_le_bytes(*b)).to_le_bytes());
                    (Dtype::I64, Cow::Owned(wide.collect()))
                }
                (have, want) => {
                    let why = format!("`{}` is {} and cannot be saved as {want}", t.key, have.name());
                    return Err(RuntimeError::Values(why));
                }
            };
            let (shape, bytes) = match &t.kept {
                None => (t.shape.clone(), bytes),
                Some(kept) => {
                    let used = self.in_use(machine, &kept.by)?;
                    let element = if dtype == Dtype::I64 { 8 } else { 4 };
                    select(&t.shape, &bytes, element, &kept.axes, &used)
                }
            };
            tensors.push((file.to_owned(), dtype, shape, bytes));
        }
        write_tensors(&dir.join(TENSORS), &tensors)
    }

    /// Brings the tensors of a folder back that are saved whole, and gives the names of their parameters.
    ///
    /// # Errors
    /// A file that cannot be read, and tensors that are missing or do not fit.
    pub fn restore(&self, machine: &mut dyn Machine, dir: &Path) -> Result<Vec<String>> {
        let path = dir.join(TENSORS);
        let saved = self
            .tensors
            .iter()
            .filter(|t| t.kept.is_none() && !t.shape.contains(&0))
            .filter_map(|t| Some((t, t.file.as_deref()?)));
        let mut done = vec![];
        with_tensors(&path, |file| {
            for (t, name) in saved {
                let v = file.tensor(name).map_err(|_| damaged(&path, &format!("has no tensor `{name}`")))?;
                let param = self.param(t);
                match (v.dtype(), t.dtype.as_str()) {
                    (Dtype::F32, "F32") => machine.write(&param, DType::F32, v.data())?,
                    (Dtype::I64, "I64") => {
                        let narrow = v.data().as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as i32);
                        let bytes: Vec<u8> = narrow.flat_map(i32::to_le_bytes).collect();
                        machine.write(&param, DType::I32, &bytes)?;
                    }
                    (have, want) => {
                        return Err(damaged(&path, &format!("holds `{name}` as {have:?}, expected {want}")));
                    }
                }
                done.push(param);
            }
            Ok(())
        })?;
        Ok(done)
    }
}

/// A file that is not what it must be.
pub(crate) fn damaged(path: &Path, why: &str) -> RuntimeError {
    RuntimeError::File { file: path.display().to_string(), why: format!("{why}; resume from another checkpoint") }
}

/// Opens a safetensors file for a while.
pub(crate) fn with_tensors<T>(path: &Path, f: impl FnOnce(&SafeTensors<'_>) -> Result<T>) -> Result<T> {
    let bytes = fs::read(path).map_err(|e| damaged(path, &format!("cannot be read ({e})")))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| damaged(path, &format!("cannot be read ({e})")))?;
    f(&file)
}
