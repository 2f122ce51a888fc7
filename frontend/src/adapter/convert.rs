//! Adapters whose update has the form of LoRA, written as LoRA: what [`Method::low_rank`](super::Method::low_rank) says, evaluated; and the
//! first ranks of a LoRA adapter.

use std::path::Path;

use pleach_ir::Entry;
use serde_json::{Map, Value, json};

use super::fold::{Floats, evaluate};
use super::low_rank::{DOWN, UP};
use super::{Scope, Site, SlotData};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::lower::Builder;
use crate::peft::{Adapter, PREFIX};
use crate::safetensors::Writer;
use crate::tensors::Dtype;

/// A site as LoRA has it.
struct Factors {
    /// A [k, in].
    down: Floats,
    /// B [out, k].
    up: Floats,
    /// The factor of B · A.
    scale: f64,
}

/// Writes an equivalent LoRA adapter, `adapter_config.json` and `adapter_model.safetensors`, into the folder `out`, which must exist.
/// Modules that the adapter replaces as a whole stay. `rank`: only the first ranks of a LoRA adapter, with the same alpha.
///
/// # Errors
/// A method without such a form, values that cannot be read, files that cannot be written.
pub fn to_lora(adapter: &Adapter, base: &Checkpoint, rank: Option<u64>, out: &Path) -> Result<()> {
    let config = &adapter.config;
    let method = &config.method;
    let refused = |key: &str, what: String| Err(Error::key(&adapter.dir.join("adapter_config.json"), key, what));
    if let Some(n) = rank
        && !(has_leading(adapter) && (1..=config.rank).contains(&n))
    {
        let what = format!(
            "is {}; the first {n} ranks can be had of a LoRA adapter that has as many at every linear layer",
            config.rank
        );
        return refused("r", what);
    }
    let mut tensors: Vec<(String, Vec<u64>, Vec<f32>)> = vec![];
    // Module, rank and scale.
    let mut sites: Vec<(&str, u64, f64)> = vec![];
    for site in adapter.sites.iter().filter(|s| s.rank > 0) {
        let found = match rank {
            Some(n) => Some(leading(site, base, n)?),
            None => factors(adapter, site, base)?,
        };
        let Some(found) = found else {
            let what = match method.peft_type() {
                "LORA" if two_factors(adapter, site) => {
                    format!("is {} already; there is nothing to convert", method.name())
                }
                "LORA" => format!(
                    "is {}, whose change of the weight is of full rank, so no LoRA adapter is equivalent; `pleach merge` writes \
                     it into the model's weights",
                    method.name()
                ),
                _ => format!("is {}, whose update has no form as LoRA", method.name()),
            };
            return refused("peft_type", what);
        };
        sites.push((&site.module, found.down.0.first().copied().unwrap_or(1), found.scale));
        for (part, (shape, x)) in [(DOWN, found.down), (UP, found.up)] {
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
    for key in
        own.chain(method.alpha_key()).chain(method.rank_key()).chain(["random_seed", "gradient_accumulation_steps"])
    {
        map.remove(key);
    }
    let only = format!("{}_only", method.peft_type().to_lowercase());
    let bias = match map.get("bias").and_then(Value::as_str) {
        Some(b) if b == only => "lora_only",
        Some(b) => b,
        None => "none",
    };
    let bias = json!(bias);
    if sites.len() < adapter.sites.len() {
        // A site that lost all of its ranks is none any more.
        map.insert("target_modules".into(), sites.iter().map(|s| json!(s.0)).collect());
    }
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

/// The update of a site, as its method says it.
fn factors(adapter: &Adapter, site: &Site, base: &Checkpoint) -> Result<Option<Factors>> {
    let method = &adapter.config.method;
    let mut b = Builder::new(base, &[], None)?;
    b.start(Entry::new("low rank"));
    let Some(found) = method.low_rank(&mut Scope::new(&mut b, 0, &**method, site))? else { return Ok(None) };
    b.output(DOWN, found.down);
    b.output(UP, found.up);
    b.finish();
    let mut values = evaluate(&b.into_graph(), "low rank", site, base, None)?;
    let mut value = |part: &str| values.remove(part).ok_or_else(|| Error::Graph(format!("{part} is not f32")));
    Ok(Some(Factors { down: value(DOWN)?, up: value(UP)?, scale: found.scale }))
}

/// Whether the first ranks of an adapter are an adapter: LoRA on the base as it is, with as many ranks at every linear layer.
fn has_leading(adapter: &Adapter) -> bool {
    let config = &adapter.config;
    let plain = config.method.peft_type() == "LORA" && !adapter.is_prepared();
    plain && config.rank_pattern.is_empty() && adapter.sites.iter().all(|s| two_factors(adapter, s) && !s.embedding)
}

/// Whether the file holds A and B of a site and nothing else.
fn two_factors(adapter: &Adapter, site: &Site) -> bool {
    let buffers = adapter.config.method.buffers(site);
    buffers.into_iter().filter(|b| b.file.is_some()).all(|b| [DOWN, UP].contains(&b.part))
}

/// Of LoRA: the first ranks.
fn leading(site: &Site, base: &Checkpoint, rank: u64) -> Result<Factors> {
    let read = |part: &str| {
        let value = site.values.get(part).ok_or_else(|| Error::Graph(format!("no value for `{part}`")))?;
        match value.read(base)?.data {
            SlotData::F32(x) => Ok(x),
            SlotData::I32(_) => Err(Error::Graph("factors are f32".into())),
        }
    };
    let (mut down, up) = (read(DOWN)?, read(UP)?);
    down.truncate((rank * site.input) as usize);
    let up = up.chunks(site.rank as usize).flat_map(|row| row[..rank as usize].to_vec()).collect();
    let (down, up) = ((vec![rank, site.input], down), (vec![site.output, rank], up));
    Ok(Factors { down, up, scale: site.alpha / rank as f64 })
}
