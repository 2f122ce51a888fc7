//! GGUF → Hugging Face folder: configuration, f32 weights, the same weights as blocks of codes, tokenizer.
//!
//! Weights are expanded and written block of rows by block of rows, so memory stays at a few megabytes. Matrices in blocks
//! are kept as such, too, beside the expanded ones (see [`crate::blocks`]): whole rows move, so their blocks stay what
//! they are. The folder is written under a temporary name, synced and renamed; a folder that already holds files is refused, or, when asked to
//! overwrite, only the files of the same names are replaced. Source of names and of the row order of q and k:
//! llama.cpp's `convert_hf_to_gguf.py`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use pleach_ir::BlockFormat;
use serde_json::{Map, Value, json};

use super::reader::{Gguf, GgufTensor, Metadata};
use super::tokenizer::{self, TokenizerFiles};
use crate::blocks;
use crate::config::{Llama3Scaling, ModelConfig, Rope};
use crate::error::{Error, Result};
use crate::modules::ModuleTable;
use crate::nearest::nearest_hint;
use crate::safetensors::Writer;
use crate::tensors::Dtype;

/// How to import.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImportOptions {
    /// Into a folder that holds files already: those of the same names are replaced, and blocks of other weights removed.
    pub overwrite: bool,
    /// Keep matrices in blocks as such, beside their expansion.
    pub blocks: bool,
}

impl Default for ImportOptions {
    fn default() -> ImportOptions {
        ImportOptions { overwrite: false, blocks: true }
    }
}

/// What an import did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportReport {
    /// The folder written.
    pub dir: PathBuf,
    /// Files in it, sorted.
    pub files: Vec<String>,
    /// Tensors written.
    pub tensors: usize,
    /// Values written.
    pub parameters: u64,
    /// Storage types of the source with the number of tensors of each.
    pub types: Vec<(String, usize)>,
    /// Matrices that are kept in blocks, too.
    pub blocks: usize,
    /// Bytes of these.
    pub block_bytes: u64,
    /// Tokens in the vocabulary.
    pub tokens: usize,
}

/// One tensor to write.
struct Plan<'a> {
    name: String,
    shape: Vec<u64>,
    source: &'a GgufTensor,
    /// Rows of one head, where the rows of heads are stored interleaved.
    interleaved: Option<u64>,
}

impl Plan<'_> {
    /// The format in which it is kept besides: a matrix whose rows are whole blocks.
    fn block_format(&self) -> Option<BlockFormat> {
        self.source.kind.block_format().filter(|_| self.shape.len() == 2)
    }
}

/// Imports the GGUF file at `path` into the folder `out`.
///
/// # Errors
/// A malformed file; an architecture, tokenizer, tensor type or key that is not supported, by name; a tensor that is
/// missing, unexpected or of the wrong shape; a folder that already holds files without `overwrite`.
pub fn import_gguf(path: &Path, out: &Path, options: &ImportOptions) -> Result<ImportReport> {
    let occupied =
        out.exists() && (!out.is_dir() || fs::read_dir(out).map_err(Error::io("read", out))?.next().is_some());
    if occupied && !options.overwrite {
        return Err(Error::format(out, "exists and is not empty; choose another folder or pass --overwrite"));
    }
    let gguf = Gguf::open(path)?;
    let config = read_config(&gguf)?;
    let context = config["max_position_embeddings"].as_u64().unwrap_or_default();
    let tokenizer = tokenizer::rebuild(&gguf, context)?;
    let config = with_ids(config, &tokenizer);
    let model = ModelConfig::parse(path, &config)?;
    let plans = plan(&gguf, &model)?;

    let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
    let name = out.file_name().ok_or_else(|| Error::format(out, "is not the name of a folder"))?;
    let temporary = parent.join(format!(".{}.partial-{}", name.to_string_lossy(), std::process::id()));
    fs::create_dir_all(&temporary).map_err(Error::io("create", &temporary))?;
    let written = write_folder(&temporary, &gguf, &config, &tokenizer, (&plans, options.blocks)).and_then(|files| {
        publish(&temporary, out, occupied, &files)?;
        Ok(files)
    });
    if written.is_err() {
        // The first error is the one worth reporting.
        let _ = fs::remove_dir_all(&temporary);
    }
    let mut types: Vec<(String, usize)> = Vec::new();
    for plan in &plans {
        let kind = format!("{:?}", plan.source.kind).to_uppercase();
        match types.iter_mut().find(|entry| entry.0 == kind) {
            Some(entry) => entry.1 += 1,
            None => types.push((kind, 1)),
        }
    }
    types.sort();
    let kept = || plans.iter().filter(|p| options.blocks && p.block_format().is_some());
    Ok(ImportReport {
        dir: out.to_owned(),
        files: written?,
        tensors: plans.len(),
        parameters: plans.iter().map(|p| p.shape.iter().product::<u64>()).sum(),
        types,
        blocks: kept().count(),
        block_bytes: kept().map(|p| p.source.bytes).sum(),
        tokens: tokenizer.tokens,
    })
}

/// `config.json` from the metadata; keys of the architecture that are not understood are refused.
fn read_config(gguf: &Gguf) -> Result<Map<String, Value>> {
    let fault = |what: String| Error::format(&gguf.path, what);
    match gguf.metadata.get("general.architecture").and_then(Metadata::as_str) {
        Some("llama") => {}
        Some(other) => return Err(fault(format!("is of the architecture `{other}`; supported is llama"))),
        None => return Err(fault("has no string `general.architecture`".into())),
    }
    let mut used = Vec::new();
    let mut get = |key: &str| {
        used.push(format!("llama.{key}"));
        gguf.metadata.get(&format!("llama.{key}"))
    };
    let count = |key: &str, value: Option<&Metadata>| {
        value.and_then(Metadata::as_u64).ok_or_else(|| fault(format!("has no count `llama.{key}`")))
    };
    let float = |key: &str, value: Option<&Metadata>| match value {
        // The shortest decimal of the f32 is the number that was meant: 1e-5, not 9.99999974737875e-6.
        Some(Metadata::Float(x)) => Ok((*x as f32).to_string().parse::<f64>().unwrap_or(*x)),
        _ => Err(fault(format!("has no number `llama.{key}`"))),
    };
    let mut need = |key: &'static str| count(key, get(key));
    let (layers, context) = (need("block_count")?, need("context_length")?);
    let (hidden, intermediate) = (need("embedding_length")?, need("feed_forward_length")?);
    let heads = need("attention.head_count")?;
    if heads == 0 {
        return Err(fault("has no attention heads".into()));
    }
    let kv_heads = get("attention.head_count_kv").map_or(Ok(heads), |v| count("attention.head_count_kv", Some(v)))?;
    let head_dim =
        get("attention.key_length").map_or(Ok(hidden / heads), |v| count("attention.key_length", Some(v)))?;
    for key in ["attention.value_length", "rope.dimension_count"] {
        if let Some(value) = get(key)
            && value.as_u64() != Some(head_dim)
        {
            return Err(fault(format!("has `llama.{key}` {value:?}, not the head's width {head_dim}; not supported")));
        }
    }
    let eps = float("attention.layer_norm_rms_epsilon", get("attention.layer_norm_rms_epsilon"))?;
    let theta = float("rope.freq_base", get("rope.freq_base"))?;
    get("vocab_size");
    if let Some(kind) = get("rope.scaling.type").and_then(Metadata::as_str)
        && kind != "none"
    {
        return Err(fault(format!("has `llama.rope.scaling.type` `{kind}`, which is not supported")));
    }
    let off = |value: &Metadata| matches!(value, Metadata::Bool(false) | Metadata::Unsigned(0) | Metadata::Signed(0));
    let unknown = |key: &&String| key.starts_with("llama.") && !used.contains(key) && !off(&gguf.metadata[*key]);
    if let Some(key) = gguf.metadata.keys().find(unknown) {
        return Err(fault(format!("has the key `{key}`, which may change the results and is not supported")));
    }
    let rope = Rope { theta, scaling: None };
    let scaling = gguf.tensor("rope_freqs.weight").map(|t| recognise_scaling(gguf, t, &rope, head_dim)).transpose()?;
    let rows = gguf.tensor("token_embd.weight").and_then(|t| t.shape.first().copied());
    let vocab = rows.ok_or_else(|| fault("has no tensor `token_embd.weight`".into()))?;
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": gguf.tensor("blk.0.attn_q.bias").is_some(),
        "attention_dropout": 0.0,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "max_position_embeddings": context,
        "mlp_bias": gguf.tensor("blk.0.ffn_up.bias").is_some(),
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": eps,
        "rope_scaling": scaling,
        "rope_theta": theta,
        "tie_word_embeddings": gguf.tensor("output.weight").is_none(),
        "torch_dtype": "float32",
        "use_cache": true,
        "vocab_size": vocab
    });
    Ok(config.as_object().cloned().unwrap_or_default())
}

/// GGUF stores llama3's rope scaling as divisors of the frequencies. Finds the published parameters behind them.
fn recognise_scaling(gguf: &Gguf, tensor: &GgufTensor, plain: &Rope, head_dim: u64) -> Result<Value> {
    let mut bytes = vec![0; tensor.bytes as usize];
    gguf.read(tensor, 0, &mut bytes)?;
    let mut divisors = Vec::new();
    tensor.kind.dequantize(&bytes, &mut divisors);
    let base = plain.inverse_frequencies(head_dim);
    for factor in [8.0, 32.0, 4.0, 16.0] {
        let scaling = Llama3Scaling { factor, low: 1.0, high: 4.0, original: 8192.0 };
        let scaled = Rope { scaling: Some(scaling), ..plain.clone() }.inverse_frequencies(head_dim);
        let same = |((&b, &s), &d): ((&f32, &f32), &f32)| (b / s - d).abs() <= 1e-4 * d.abs();
        if divisors.len() == base.len() && base.iter().zip(&scaled).zip(&divisors).all(same) {
            return Ok(json!({
                "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192
            }));
        }
    }
    Err(Error::tensor(
        &gguf.path,
        &tensor.name,
        "holds frequency factors that are not one of Llama 3's published forms",
    ))
}

fn with_ids(mut config: Map<String, Value>, tokenizer: &TokenizerFiles) -> Map<String, Value> {
    config.insert("bos_token_id".into(), json!(tokenizer.bos));
    config.insert("eos_token_id".into(), eos_value(&tokenizer.eos));
    config.insert("pad_token_id".into(), json!(tokenizer.pad));
    config.sort_keys();
    config
}

fn eos_value(ids: &[u64]) -> Value {
    match ids {
        [] => Value::Null,
        [one] => json!(one),
        several => json!(several),
    }
}

/// The GGUF name of a parameter of the llama family.
fn gguf_name(path: &str) -> Option<String> {
    const TOP: [(&str, &str); 3] =
        [("model.embed_tokens.", "token_embd."), ("model.norm.", "output_norm."), ("lm_head.", "output.")];
    const BLOCK: [(&str, &str); 9] = [
        ("self_attn.q_proj.", "attn_q."),
        ("self_attn.k_proj.", "attn_k."),
        ("self_attn.v_proj.", "attn_v."),
        ("self_attn.o_proj.", "attn_output."),
        ("mlp.gate_proj.", "ffn_gate."),
        ("mlp.up_proj.", "ffn_up."),
        ("mlp.down_proj.", "ffn_down."),
        ("input_layernorm.", "attn_norm."),
        ("post_attention_layernorm.", "ffn_norm."),
    ];
    let swap = |table: &[(&str, &str)], path: &str| {
        table.iter().find_map(|(from, to)| path.strip_prefix(from).map(|rest| format!("{to}{rest}")))
    };
    if let Some(rest) = path.strip_prefix("model.layers.") {
        let (layer, inner) = rest.split_once('.')?;
        return Some(format!("blk.{layer}.{}", swap(&BLOCK, inner)?));
    }
    swap(&TOP, path)
}

/// Every parameter of the model with its source; every tensor of the file used once.
fn plan<'a>(gguf: &'a Gguf, model: &ModelConfig) -> Result<Vec<Plan<'a>>> {
    let ModelConfig::Llama(config) = model else { return Err(Error::format(&gguf.path, "is not a llama")) };
    let mut plans = Vec::new();
    for module in ModuleTable::new(model).iter().filter(|m| !(m.output_head && config.tied_head)) {
        for parameter in module.parameters() {
            let name = gguf_name(&parameter.path).unwrap_or_default();
            let Some(source) = gguf.tensor(&name) else {
                let hint = nearest_hint(&name, gguf.tensors.iter().map(|t| t.name.as_str()));
                return Err(Error::tensor(&gguf.path, name, format!("is missing{hint}")));
            };
            if source.shape != parameter.shape {
                let what = format!("has shape {:?}; the metadata make it {:?}", source.shape, parameter.shape);
                return Err(Error::tensor(&gguf.path, name, what));
            }
            let rotated = [".q_proj.", ".k_proj."].iter().any(|p| parameter.path.contains(p));
            let interleaved = rotated.then_some(config.head_dim);
            plans.push(Plan { name: parameter.path, shape: parameter.shape, source, interleaved });
        }
    }
    let used = |t: &&GgufTensor| t.name == "rope_freqs.weight" || plans.iter().any(|p| p.source.name == t.name);
    if let Some(extra) = gguf.tensors.iter().find(|t| !used(t)) {
        return Err(Error::tensor(&gguf.path, &extra.name, "belongs to nothing in a llama model"));
    }
    plans.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(plans)
}

fn write_folder(
    dir: &Path,
    gguf: &Gguf,
    config: &Map<String, Value>,
    tokenizer: &TokenizerFiles,
    (plans, keep): (&[Plan], bool),
) -> Result<Vec<String>> {
    let generation = json!({
        "bos_token_id": tokenizer.bos, "eos_token_id": eos_value(&tokenizer.eos), "pad_token_id": tokenizer.pad
    });
    let jsons = [
        ("config.json", &Value::Object(config.clone())),
        ("generation_config.json", &generation),
        ("special_tokens_map.json", &tokenizer.special_tokens_map),
        ("tokenizer.json", &tokenizer.tokenizer),
        ("tokenizer_config.json", &tokenizer.tokenizer_config),
    ];
    let mut files = vec!["model.safetensors".to_owned()];
    for (name, value) in jsons {
        let path = dir.join(name);
        let text = format!("{value:#}\n");
        fs::write(&path, text).map_err(Error::io("write", &path))?;
        sync(&path)?;
        files.push(name.into());
    }
    let declared: Vec<_> = plans.iter().map(|p| (p.name.clone(), Dtype::F32, p.shape.clone())).collect();
    let mut writer = Writer::create(&dir.join("model.safetensors"), &declared)?;
    let kept: Vec<_> = plans.iter().filter(|_| keep).filter_map(|p| Some((p, p.block_format()?))).collect();
    let mut codes = None;
    if !kept.is_empty() {
        let file = blocks::file(dir);
        let folder = dir.join(blocks::FOLDER);
        fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
        let list: Vec<_> = kept.iter().map(|(p, f)| (p.name.as_str(), p.shape[0], p.shape[1], *f)).collect();
        codes = Some(blocks::writer(&file, &list)?);
        files.push(format!("{}/{}", blocks::FOLDER, blocks::FILE));
    }
    for plan in plans {
        write_tensor(&mut writer, codes.as_mut().filter(|_| plan.block_format().is_some()), gguf, plan)?;
    }
    writer.finish()?;
    if let Some(codes) = codes {
        codes.finish()?;
        sync(&dir.join(blocks::FOLDER))?;
    }
    sync(dir)?;
    files.sort();
    Ok(files)
}

/// Expands one tensor, a group of rows at a time, and copies its blocks where they are kept.
///
/// GGUF stores the rows of a rotated head as pairs (0, half), (1, half + 1), …; Hugging Face has first halves first:
/// row `j + half · s` of a head is stored as row `2 j + s`.
fn write_tensor(writer: &mut Writer, mut codes: Option<&mut Writer>, gguf: &Gguf, plan: &Plan) -> Result<()> {
    let kind = plan.source.kind;
    let width = plan.shape.get(1).copied().unwrap_or(1);
    let rows = plan.shape[0];
    let (group, per_row) = match plan.interleaved {
        Some(head_dim) => (head_dim, width),
        // Without a permutation rows need not be kept apart; one-dimensional tensors count as one row.
        None if plan.shape.len() == 1 => (1, rows),
        None => (((1u64 << 18) / width).max(1), width),
    };
    let total = if plan.shape.len() == 1 && plan.interleaved.is_none() { 1 } else { rows };
    let row_bytes = per_row / kind.block_elements() * kind.block_bytes();
    let (mut bytes, mut values) = (Vec::new(), Vec::new());
    for first in (0..total).step_by(group as usize) {
        let count = group.min(total - first);
        bytes.resize((count * row_bytes) as usize, 0);
        gguf.read(plan.source, first * row_bytes, &mut bytes)?;
        values.clear();
        kind.dequantize(&bytes, &mut values);
        match plan.interleaved {
            None => {
                writer.write_f32(&values)?;
                codes.as_mut().map_or(Ok(()), |w| w.write(&bytes))?;
            }
            Some(head_dim) => {
                let half = head_dim / 2;
                for row in 0..head_dim {
                    let stored = 2 * (row % half) + row / half;
                    writer.write_f32(&values[(stored * per_row) as usize..][..per_row as usize])?;
                    let blocks = &bytes[(stored * row_bytes) as usize..][..row_bytes as usize];
                    codes.as_mut().map_or(Ok(()), |w| w.write(blocks))?;
                }
            }
        }
    }
    Ok(())
}

/// Moves the finished folder into place.
fn publish(temporary: &Path, out: &Path, occupied: bool, files: &[String]) -> Result<()> {
    if occupied {
        // The configuration goes last: a folder without it is never taken for a finished one.
        let config = files.iter().filter(|f| *f == "config.json");
        let _ = fs::remove_file(out.join("config.json"));
        // Blocks belong to their weights: none of others are left beside these.
        let _ = fs::remove_file(blocks::file(out));
        for file in files.iter().filter(|f| *f != "config.json").chain(config) {
            let to = out.join(file);
            let folder = to.parent().unwrap_or(out);
            fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
            fs::rename(temporary.join(file), &to).map_err(Error::io("replace", &to))?;
        }
        fs::remove_dir_all(temporary).map_err(Error::io("remove", temporary))?;
        return sync(out);
    }
    if out.is_dir() {
        fs::remove_dir(out).map_err(Error::io("replace", out))?;
    }
    fs::rename(temporary, out).map_err(Error::io("create", out))?;
    out.parent().filter(|p| !p.as_os_str().is_empty()).map_or(Ok(()), sync)
}

fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|f| f.sync_all()).map_err(Error::io("sync", path))
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
