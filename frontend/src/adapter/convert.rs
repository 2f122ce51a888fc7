//! PaCA to LoRA without loss: D becomes B bit for bit, and row k of A picks input column I[k].

use std::path::Path;

use serde_json::{Value, json};

use super::{DELTA, INDICES, SlotData, SlotTensor};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::peft::{Adapter, PREFIX};
use crate::safetensors::Writer;
use crate::tensors::Dtype;

/// Writes an equivalent LoRA adapter, `adapter_config.json` and `adapter_model.safetensors`, into the folder `out`, which must exist. Ranks
/// and scales stay, and so do modules that the adapter replaces as a whole.
///
/// # Errors
/// An adapter that is not PaCA, values that cannot be read, files that cannot be written.
pub fn to_lora(adapter: &Adapter, base: &Checkpoint, out: &Path) -> Result<()> {
    let config = &adapter.config;
    if config.method.peft_type() != "PACA" {
        let what = format!("is {}; only PaCA adapters are converted to LoRA", config.method.name());
        return Err(Error::key(&adapter.dir.join("adapter_config.json"), "peft_type", what));
    }
    let mut tensors: Vec<(String, Vec<u64>, Vec<f32>)> = vec![];
    for site in &adapter.sites {
        let value = |part: &str| -> Result<SlotTensor> {
            let value = site.values.get(part).ok_or_else(|| Error::Graph(format!("no value for `{part}`")))?;
            value.read(base)
        };
        let (SlotData::I32(indices), SlotData::F32(delta)) = (value(INDICES)?.data, value(DELTA)?.data) else {
            return Err(Error::Graph("indices are i32, differences f32".into()));
        };
        let width = site.input as usize;
        let mut selector = vec![0.0; indices.len() * width];
        for (row, index) in selector.chunks_mut(width).zip(&indices) {
            row[*index as usize] = 1.0;
        }
        let name = |part: &str| format!("{PREFIX}{}.{part}.weight", site.module);
        tensors.push((name("lora_A"), vec![site.rank, site.input], selector));
        tensors.push((name("lora_B"), vec![site.output, site.rank], delta));
    }
    for r in &adapter.replaced {
        let t = r.value.read(base)?;
        let SlotData::F32(values) = t.data else { return Err(Error::Graph("replaced weights are f32".into())) };
        tensors.push((format!("{PREFIX}{}", r.file), t.shape, values));
    }
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    let declared: Vec<_> = tensors.iter().map(|(n, s, _)| (n.clone(), Dtype::F32, s.clone())).collect();
    let mut writer = Writer::create(&out.join("adapter_model.safetensors"), &declared)?;
    for (_, _, values) in &tensors {
        writer.write_f32(values)?;
    }
    writer.finish()?;

    let mut map = config.saved();
    for key in ["paca_alpha", "init_weights", "random_seed", "gradient_accumulation_steps"] {
        map.remove(key);
    }
    let bias = if map.get("bias").and_then(Value::as_str) == Some("paca_only") {
        json!("lora_only")
    } else {
        json!(map.get("bias"))
    };
    let more = [
        ("base_model_name_or_path", json!(config.raw.get("base_model_name_or_path"))),
        ("bias", if bias.is_null() { json!("none") } else { bias }),
        ("init_lora_weights", json!(true)),
        ("lora_alpha", json!(config.alpha)),
        ("lora_dropout", json!(0.0)),
        ("peft_type", json!("LORA")),
        ("use_dora", json!(false)),
        ("use_rslora", json!(false)),
    ];
    map.extend(more.map(|(key, value)| (key.to_owned(), value)));
    map.sort_keys();
    let path = out.join("adapter_config.json");
    std::fs::write(&path, format!("{:#}\n", Value::Object(map))).map_err(Error::io("write", &path))
}
