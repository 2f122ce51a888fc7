//! Adapters whose update has the form of LoRA, written as LoRA: what [`Method::low_rank`](super::Method::low_rank) says, evaluated.

use std::path::Path;

use pleach_ir::Entry;
use serde_json::{Map, Value, json};

use super::fold::evaluate;
use super::{Scope, SlotData};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::lower::Builder;
use crate::peft::{Adapter, PREFIX};
use crate::safetensors::Writer;
use crate::tensors::Dtype;

/// Writes an equivalent LoRA adapter, `adapter_config.json` and `adapter_model.safetensors`, into the folder `out`, which must exist.
/// Modules that the adapter replaces as a whole stay.
///
/// # Errors
/// A method without such a form, values that cannot be read, files that cannot be written.
pub fn to_lora(adapter: &Adapter, base: &Checkpoint, out: &Path) -> Result<()> {
    let config = &adapter.config;
    let method = &config.method;
    let refused = |what: String| Err(Error::key(&adapter.dir.join("adapter_config.json"), "peft_type", what));
    let mut tensors: Vec<(String, Vec<u64>, Vec<f32>)> = vec![];
    // Module, rank and scale.
    let mut sites: Vec<(&str, u64, f64)> = vec![];
    for site in &adapter.sites {
        let mut b = Builder::new(base, &[], None)?;
        b.start(Entry::new("low rank"));
        let Some(found) = method.low_rank(&mut Scope::new(&mut b, 0, &**method, site))? else {
            return refused(match method.peft_type() {
                "LORA" => format!("is {} already; there is nothing to convert", method.name()),
                _ => format!("is {}, whose update has no form as LoRA", method.name()),
            });
        };
        b.output("lora_A", found.down);
        b.output("lora_B", found.up);
        b.finish();
        let mut values = evaluate(&b.into_graph(), "low rank", site, base, None)?;
        for part in ["lora_A", "lora_B"] {
            let (shape, x) = values.remove(part).ok_or_else(|| Error::Graph(format!("{part} is not f32")))?;
            if part == "lora_A" {
                sites.push((&site.module, shape.first().copied().unwrap_or(1), found.scale));
            }
            tensors.push((format!("{PREFIX}{}.{part}.weight", site.module), shape, x));
        }
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

    let path = out.join("adapter_config.json");
    std::fs::write(&path, format!("{:#}\n", Value::Object(lora_config(adapter, &sites))))
        .map_err(Error::io("write", &path))
}

/// The configuration, with the ranks and scales of the sites.
fn lora_config(adapter: &Adapter, sites: &[(&str, u64, f64)]) -> Map<String, Value> {
    let (config, method) = (&adapter.config, &adapter.config.method);
    let mut map = config.saved();
    let own = method.config().into_iter().map(|(key, _)| key);
    for key in own.chain(method.alpha_key()).chain(["random_seed", "gradient_accumulation_steps"]) {
        map.remove(key);
    }
    let only = format!("{}_only", method.peft_type().to_lowercase());
    let bias = match map.get("bias").and_then(Value::as_str) {
        Some(b) if b == only => "lora_only",
        Some(b) => b,
        None => "none",
    };
    let bias = json!(bias);
    let (rank, scale) = sites.first().map_or((config.rank, 1.0), |s| (s.1, s.2));
    let number = |x: f64| if x.fract() == 0.0 { json!(x as i64) } else { json!(x) };
    let (mut ranks, mut alphas) = (Map::new(), Map::new());
    for (module, r, s) in sites {
        if *r != rank {
            ranks.insert((*module).to_owned(), json!(r));
        }
        if s * *r as f64 != scale * rank as f64 {
            alphas.insert((*module).to_owned(), number(s * *r as f64));
        }
    }
    let more = [
        ("alpha_pattern", Value::Object(alphas)),
        ("base_model_name_or_path", json!(config.raw.get("base_model_name_or_path"))),
        ("bias", bias),
        ("init_lora_weights", json!(true)),
        ("lora_alpha", number(scale * rank as f64)),
        ("lora_dropout", json!(0.0)),
        ("peft_type", json!("LORA")),
        ("r", json!(rank)),
        ("rank_pattern", Value::Object(ranks)),
        ("use_dora", json!(false)),
        ("use_rslora", json!(false)),
    ];
    map.extend(more.map(|(key, value)| (key.to_owned(), value)));
    map.sort_keys();
    map
}
