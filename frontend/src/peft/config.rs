//! `adapter_config.json` of a LoRA adapter.
//!
//! Unknown fields are kept (PEFT adds some with every release). Fields that change what the adapter computes and are
//! not supported are refused by name when they are switched on.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::Result;
use crate::json::{Fields, brief, is_off, read_object};

/// A regular expression for whole paths, or a list of names that paths equal or end with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NameSpec {
    /// Full-match regular expression in Python's syntax.
    Pattern(String),
    /// Names; `q_proj` matches `model.layers.0.self_attn.q_proj`.
    Names(Vec<String>),
}

/// `target_modules`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Targets {
    /// Absent: PEFT's default for the architecture.
    Default,
    /// "all-linear": every linear layer but the output head.
    AllLinear,
    /// A pattern or a list.
    Spec(NameSpec),
}

/// A LoRA configuration: what attaches where, at which rank and scale.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// Default rank.
    pub rank: u64,
    /// Default alpha.
    pub alpha: f64,
    /// Whether the scale is alpha / √r rather than alpha / r.
    pub rslora: bool,
    /// Where it attaches.
    pub targets: Targets,
    /// Where it does not.
    pub exclude: Option<NameSpec>,
    /// Layer indices to keep; `None` keeps all.
    pub layers: Option<Vec<u64>>,
    /// Names of the module list that the layer index follows; empty accepts any.
    pub layers_pattern: Vec<String>,
    /// Ranks by pattern, first match wins.
    pub rank_pattern: Vec<(String, u64)>,
    /// Alphas by pattern, first match wins.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Modules that would be replaced as a whole; matched modules under them are left out.
    pub modules_to_save: Vec<String>,
    /// Whether adapters of a tied embedding and head are one.
    pub ensure_weight_tying: bool,
    /// The whole file, unknown fields included.
    pub raw: Map<String, Value>,
    /// Remarks for the user: fields that were kept without being understood.
    pub notes: Vec<String>,
}

/// Fields that change what is computed, with what is missing.
const UNSUPPORTED: [(&str, &str); 17] = [
    ("use_dora", "DoRA adapters are not supported yet"),
    ("lora_bias", "a bias on lora_B is not supported yet"),
    ("modules_to_save", "replacing whole modules is not supported yet"),
    ("target_parameters", "adapters on bare parameters are not supported"),
    ("trainable_token_indices", "trained token embeddings are not supported"),
    ("layer_replication", "replicated layers are not supported"),
    ("alora_invocation_tokens", "activated LoRA is not supported"),
    ("use_qalora", "QA-LoRA is not supported"),
    ("velora_config", "VeLoRA is not supported"),
    ("kasa_config", "KaSA changes the base weights and is not supported"),
    ("monteclora_config", "MonteCLoRA is not supported"),
    ("arrow_config", "Arrow routing is not supported"),
    ("use_bdlora", "block-diagonal LoRA is not supported"),
    ("megatron_config", "Megatron layers are not supported"),
    ("modules_to_tie", "tied adapters are not supported"),
    ("target_modules_to_tie", "tied adapters are not supported"),
    ("lora_magnitude_vector", "DoRA adapters are not supported yet"),
];

/// Fields without influence on a loaded adapter: provenance, initialisation, training.
const HARMLESS: [&str; 18] = [
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    // PEFT itself switches this off for the linear layers of these models.
    "fan_in_fan_out",
    "inference_mode",
    "lora_dropout",
    "lora_ga_config",
    "loftq_config",
    "megatron_core",
    "model_name_or_path",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
    "use_cache",
    "library_name",
];

impl LoraConfig {
    /// Reads `dir/adapter_config.json`.
    ///
    /// # Errors
    /// A missing or malformed file, another `peft_type`, a field that changes the mathematics and is not supported.
    pub fn read(dir: &Path) -> Result<LoraConfig> {
        let path = dir.join("adapter_config.json");
        LoraConfig::parse(&path, read_object(&path)?)
    }

    /// Reads an already parsed configuration; `path` only serves messages.
    pub fn parse(path: &Path, raw: Map<String, Value>) -> Result<LoraConfig> {
        let mut f = Fields::new(path, "", &raw);
        match f.text("peft_type")? {
            Some("LORA") => {}
            Some(other) => return Err(f.fault("peft_type", format!("is `{other}`; LORA is supported"))),
            None => return Err(f.fault("peft_type", "is missing; this is not the configuration of a PEFT adapter")),
        }
        for (key, why) in UNSUPPORTED {
            f.must_be_off(key, why)?;
        }
        match f.text("bias")?.unwrap_or("none") {
            "none" => {}
            other => return Err(f.fault("bias", format!("is `{other}`; trained biases are not supported yet"))),
        }
        read_init(&mut f)?;
        let targets = match f.raw("target_modules") {
            None => Targets::Default,
            Some(Value::String(s)) if s.eq_ignore_ascii_case("all-linear") => Targets::AllLinear,
            Some(Value::String(s)) => Targets::Spec(NameSpec::Pattern(s.clone())),
            Some(_) => Targets::Spec(NameSpec::Names(f.strings("target_modules")?.unwrap_or_default())),
        };
        let exclude = match f.raw("exclude_modules") {
            None => None,
            Some(value) if is_off(value) => None,
            Some(Value::String(s)) => Some(NameSpec::Pattern(s.clone())),
            Some(_) => f.strings("exclude_modules")?.map(NameSpec::Names),
        };
        let layers = read_layers(&mut f)?;
        let layers_pattern = f.strings("layers_pattern")?.unwrap_or_default();
        let by_pattern = matches!(targets, Targets::AllLinear | Targets::Spec(NameSpec::Pattern(_)));
        if by_pattern && layers.is_some() {
            return Err(f.fault("layers_to_transform", "cannot be combined with a string in `target_modules`"));
        }
        if layers.is_none() && layers_pattern.iter().any(|p| !p.is_empty()) {
            return Err(f.fault("layers_pattern", "needs `layers_to_transform`"));
        }
        let config = LoraConfig {
            rank: f.count("r", 1 << 24)?.unwrap_or(8),
            alpha: f.number("lora_alpha")?.unwrap_or(8.0),
            rslora: f.flag("use_rslora")?.unwrap_or(false),
            targets,
            exclude,
            layers: layers.filter(|l| !l.is_empty()),
            layers_pattern: layers_pattern.into_iter().filter(|p| !p.is_empty()).collect(),
            rank_pattern: read_pattern(&mut f, "rank_pattern", |f, key| f.required_count(key, 1 << 24))?,
            alpha_pattern: read_pattern(&mut f, "alpha_pattern", |f, key| {
                f.number(key)?.ok_or_else(|| f.fault(key, "is null; expected a number"))
            })?,
            modules_to_save: f.strings("modules_to_save")?.unwrap_or_default(),
            ensure_weight_tying: f.flag("ensure_weight_tying")?.unwrap_or(false),
            notes: read_unknown(&f)?,
            raw: Map::new(),
        };
        Ok(LoraConfig { raw, ..config })
    }

    /// Alpha over r, or over √r for rsLoRA.
    pub fn scale(&self, rank: u64, alpha: f64) -> f64 {
        if self.rslora { alpha / (rank as f64).sqrt() } else { alpha / rank as f64 }
    }
}

/// Initialisations that leave the base weights alone need no thought; the others make the saved tensors meaningless
/// without the changed base.
fn read_init(f: &mut Fields) -> Result<()> {
    const KEY: &str = "init_lora_weights";
    match f.raw(KEY) {
        None | Some(Value::Bool(_)) => Ok(()),
        Some(Value::String(s)) if matches!(s.as_str(), "gaussian" | "eva" | "orthogonal" | "mica") => Ok(()),
        Some(value) => Err(f.fault(
            KEY,
            format!(
                "is {}: such an adapter belongs to changed base weights; save it with PEFT's \
                 `path_initial_model_for_weight_conversion` to get one for the original base",
                brief(value)
            ),
        )),
    }
}

fn read_layers(f: &mut Fields) -> Result<Option<Vec<u64>>> {
    const KEY: &str = "layers_to_transform";
    let Some(value) = f.raw(KEY) else { return Ok(None) };
    let one = std::slice::from_ref(value);
    let list = value.as_array().map_or(one, Vec::as_slice);
    let layers = list.iter().map(Value::as_u64).collect::<Option<Vec<_>>>();
    layers.map(Some).ok_or_else(|| f.fault(KEY, format!("is {}; expected layer numbers", brief(value))))
}

fn read_pattern<T>(
    f: &mut Fields,
    key: &str,
    read: impl Fn(&mut Fields, &str) -> Result<T>,
) -> Result<Vec<(String, T)>> {
    let path = f.path().to_owned();
    let Some(object) = f.object(key)? else { return Ok(Vec::new()) };
    let mut inner = Fields::new(&path, &format!("{key}."), object);
    object.keys().map(|k| Ok((k.clone(), read(&mut inner, k)?))).collect()
}

/// Keeps unknown fields, unless the name says that a switched-on one is a variant of the method.
fn read_unknown(f: &Fields) -> Result<Vec<String>> {
    let mut notes = Vec::new();
    for (key, value) in f.unread() {
        if HARMLESS.contains(&key.as_str()) || key.starts_with('_') || is_off(value) {
            continue;
        }
        let variant = key.starts_with("use_")
            || key.starts_with("target_")
            || ["_config", "_tokens", "_replication", "_scale", "_scaling"].iter().any(|end| key.ends_with(end));
        if variant {
            return Err(
                f.fault(key, format!("is {}: not known, and it may change what the adapter computes", brief(value)))
            );
        }
        notes.push(format!("`{key}` = {} is not known here and was kept as it is", brief(value)));
    }
    Ok(notes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(extra: Value) -> std::result::Result<LoraConfig, String> {
        let mut base = json!({
            "alora_invocation_tokens": null, "alpha_pattern": {}, "bias": "none", "corda_config": null,
            "ensure_weight_tying": false, "exclude_modules": null, "fan_in_fan_out": false, "inference_mode": true,
            "init_lora_weights": true, "layers_pattern": null, "layers_to_transform": null, "loftq_config": {},
            "lora_alpha": 32, "lora_bias": false, "lora_dropout": 0.05, "megatron_core": "megatron.core",
            "modules_to_save": null, "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 16,
            "rank_pattern": {}, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "use_dora": false,
            "use_rslora": false
        });
        for (key, value) in extra.as_object().unwrap() {
            base[key] = value.clone();
        }
        LoraConfig::parse(Path::new("adapter_config.json"), base.as_object().unwrap().clone())
            .map_err(|e| e.to_string())
    }

    #[test]
    fn a_saved_configuration_is_read() {
        let config = parse(json!({"rank_pattern": {"z": 4, "a": 2}, "layers_to_transform": 3})).unwrap();
        assert_eq!((config.rank, config.alpha, config.scale(16, 32.0)), (16, 32.0, 2.0));
        assert_eq!(config.rank_pattern, [("z".to_owned(), 4), ("a".to_owned(), 2)]);
        assert_eq!(config.layers, Some(vec![3]));
        assert!(config.notes.is_empty());
        assert_eq!(parse(json!({"use_rslora": true})).unwrap().scale(16, 32.0), 8.0);
        assert_eq!(parse(json!({"target_modules": "All-Linear"})).unwrap().targets, Targets::AllLinear);
        let minimal = json!({"peft_type": "LORA"});
        let minimal = LoraConfig::parse(Path::new("c"), minimal.as_object().unwrap().clone()).unwrap();
        assert_eq!((minimal.rank, minimal.alpha, minimal.targets), (8, 8.0, Targets::Default));
    }

    #[test]
    fn unknown_fields_are_kept() {
        let config = parse(json!({"colour": "green"})).unwrap();
        assert_eq!(config.raw["colour"], "green");
        assert!(config.notes[0].contains("colour"));
    }

    #[test]
    fn what_changes_the_mathematics_is_refused_by_name() {
        let cases = [
            ("peft_type", json!("IA3")),
            ("use_dora", json!(true)),
            ("bias", json!("lora_only")),
            ("modules_to_save", json!(["lm_head"])),
            ("init_lora_weights", json!("pissa_niter_16")),
            ("init_lora_weights", json!("olora")),
            ("init_lora_weights", json!("loftq")),
            ("alora_invocation_tokens", json!([5])),
            ("target_parameters", json!(["w"])),
            ("layer_replication", json!([[0, 2]])),
            ("trainable_token_indices", json!([1])),
            ("kasa_config", json!({"beta": 1})),
            ("use_something_new", json!(true)),
            ("new_method_config", json!({"x": 1})),
            ("layers_pattern", json!("layers")),
            ("r", json!(0)),
            ("r", json!(1.5)),
            ("lora_alpha", json!("x")),
            ("target_modules", json!([1])),
        ];
        for (key, value) in cases {
            let message = parse(json!({key: value})).unwrap_err();
            assert!(message.contains(&format!("`{key}`")), "{key}: {message}");
        }
        assert!(parse(json!({"target_modules": "x", "layers_to_transform": [1]})).is_err());
        assert!(parse(json!({"rank_pattern": {"q": "4"}})).unwrap_err().contains("rank_pattern.q"));
    }
}
