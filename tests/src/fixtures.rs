//! The fixtures of `fixtures/`: small models with adapters, and what PEFT computes with them.
//!
//! `fixtures/README.md` describes the files; `cases.json` lists the cases.

use crate::compare::Start;
use pleach_frontend::adapter::{SlotData, SlotValue, slot_values};
use pleach_frontend::{Adapter, Checkpoint, TensorRef, safetensors};
use pleach_ir::interp::{Symbols, Tensor};
use pleach_ir::{Graph, Source, Sym};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// One line of `cases.json`.
#[derive(Clone, Debug)]
pub struct Fixture {
    /// `llama-tiny+lora-r4`.
    pub name: String,
    /// The model's folder.
    pub model: PathBuf,
    /// The adapters' folders, active together.
    pub adapters: Vec<PathBuf>,
    /// Largest difference over largest magnitude.
    pub tolerance: f64,
    expected: PathBuf,
    output: String,
}

/// A model with its adapters, and what is expected of it.
#[derive(Debug)]
pub struct Opened {
    /// The model.
    pub checkpoint: Checkpoint,
    /// Its adapters; slot `i` holds adapter `i`.
    pub adapters: Vec<Adapter>,
    /// Ids of all sequences, one after another.
    pub ids: Vec<i32>,
    /// Where each sequence starts, and the end.
    pub segments: Vec<i32>,
    /// Name of the output of `infer`.
    pub output: String,
    /// What PEFT computes.
    pub want: Tensor,
    /// What PEFT computes after merging; without adapters as `want`.
    pub merged: Tensor,
    /// Greedy continuation of each sequence; empty for encoders.
    pub greedy: Vec<Vec<i32>>,
}

/// Every case.
///
/// # Errors
/// `cases.json` is not as described.
pub fn cases() -> Result<Vec<Fixture>, String> {
    let dir = crate::root().join("tests/fixtures");
    let text = std::fs::read_to_string(dir.join("cases.json")).map_err(|e| e.to_string())?;
    let json: Value = serde_json::from_str(&text).map_err(|e| e.to_string())?;
    let one = |c: &Value| {
        let model = c["model"].as_str()?;
        let adapters: Vec<&str> = c["adapters"].as_array()?.iter().filter_map(Value::as_str).collect();
        let short = adapters.iter().map(|a| a.trim_start_matches("adapters/"));
        Some(Fixture {
            name: [model].into_iter().chain(short).collect::<Vec<_>>().join("+"),
            model: dir.join(model),
            adapters: adapters.iter().map(|a| dir.join(a)).collect(),
            tolerance: c["tolerance"].as_f64()?,
            expected: dir.join(c["expected"].as_str()?),
            output: c["output"].as_str()?.to_string(),
        })
    };
    let list = json["cases"].as_array().ok_or("no cases")?;
    list.iter().map(|c| one(c).ok_or_else(|| format!("case {c}"))).collect()
}

fn whole(t: &TensorRef) -> Result<Vec<i32>, String> {
    let bytes = t.read_bytes().map_err(|e| e.to_string())?;
    Ok(bytes.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b) as i32).collect())
}

fn floats(t: &TensorRef) -> Result<Tensor, String> {
    Ok(Tensor::f32(t.shape.clone(), t.read_f32().map_err(|e| e.to_string())?))
}

impl Fixture {
    /// Opens the model, its adapters and the expected values.
    ///
    /// # Errors
    /// What the readers refuse.
    pub fn open(&self) -> Result<Opened, String> {
        let checkpoint = Checkpoint::open(&self.model).map_err(|e| e.to_string())?;
        let open = |dir: &PathBuf| Adapter::open(dir, None, &checkpoint.modules).map_err(|e| e.to_string());
        let adapters = self.adapters.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        let (tensors, _) = safetensors::read_header(&self.expected).map_err(|e| e.to_string())?;
        let find = |name: &str| tensors.iter().find(|t| t.name == name);
        let need = |name: &str| find(name).ok_or_else(|| format!("{} has no {name}", self.expected.display()));
        let want = floats(need(&self.output)?)?;
        let merged = find(&format!("merged_{}", self.output)).map_or(Ok(want.clone()), floats)?;
        let greedy = match find("greedy_ids") {
            Some(t) => whole(t)?.chunks(t.shape[1] as usize).map(<[i32]>::to_vec).collect(),
            None => vec![],
        };
        let (ids, segments) = (whole(need("input_ids")?)?, whole(need("segments")?)?);
        Ok(Opened { checkpoint, adapters, ids, segments, output: self.output.clone(), want, merged, greedy })
    }
}

impl Opened {
    /// The inputs of `infer`; the graph takes those it has.
    pub fn inputs(&self) -> Vec<(&'static str, Vec<i32>)> {
        let starts = &self.segments[..self.segments.len() - 1];
        let len: Vec<i32> = self.segments.windows(2).map(|w| w[1] - w[0]).collect();
        vec![
            ("input_ids", self.ids.clone()),
            ("positions", len.iter().flat_map(|n| 0..*n).collect()),
            ("q_segments", self.segments.clone()),
            ("kv_start", starts.to_vec()),
            ("kv_len", len),
            ("token_type_ids", vec![0; self.ids.len()]),
        ]
    }

    /// The sequences as prompts.
    pub fn prompts(&self) -> Vec<Vec<i32>> {
        self.segments.windows(2).map(|w| self.ids[w[0] as usize..w[1] as usize].to_vec()).collect()
    }

    /// Values for running a graph of this model: weights, adapters, empty caches, and the inputs for `infer`.
    ///
    /// # Errors
    /// Tensors that cannot be read.
    pub fn start(&self, g: &Graph) -> Result<Start, String> {
        let symbols: Symbols = [(Sym::P, 64), (Sym::C, 64)].into_iter().collect();
        let mut slots: Vec<BTreeMap<String, SlotValue>> = vec![];
        slots.extend(self.adapters.iter().map(|a| slot_values(a).into_iter().collect()));
        let mut params = BTreeMap::new();
        for p in &g.params {
            let value = match &p.source {
                Source::Checkpoint(name) => {
                    let found = self.checkpoint.params().find(|(_, t)| t.name == *name);
                    floats(found.ok_or_else(|| format!("no tensor {name}"))?.1)?
                }
                Source::Adapter { slot, key } => match slots.get(*slot as usize).and_then(|s| s.get(key)) {
                    Some(value) => {
                        let t = value.read(&self.checkpoint).map_err(|e| e.to_string())?;
                        match t.data {
                            SlotData::F32(x) => Tensor::f32(t.shape, x),
                            SlotData::I32(x) => Tensor::i32(t.shape, x),
                        }
                    }
                    None => return Err(format!("slot {slot} has no {key}")),
                },
                Source::Zeros => Tensor::zeros(p.ty.dtype, crate::values::shape(&p.ty, &symbols)),
                Source::Derived => continue,
            };
            params.insert(p.name.clone(), value);
        }
        let tensor = |(name, v): (&str, Vec<i32>)| (name.to_string(), Tensor::i32([v.len() as u64], v));
        let inputs = [("infer".to_string(), self.inputs().into_iter().map(tensor).collect())];
        Ok(Start { symbols, params, inputs: inputs.into_iter().collect(), again: false })
    }
}
