//! `adapter_config.json` of an adapter, and the same keys given in another way.
//!
//! Fields that all methods share are read here, the rest by the method ([`Kind`]). Unknown fields are kept (PEFT adds some
//! with every release). Fields that change what the adapter computes and are not supported are refused by name when
//! they are switched on.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::adapter::{Kind, NO_TARGET, TRAINING, known_names};
use crate::error::{Error, Result};
use crate::json::{Fields, brief, is_off, read_object};
use crate::modules::ModuleTable;

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
    /// Nothing: only modules that are replaced as a whole.
    Nothing,
}

/// `bias`: which biases of the base are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bias {
    /// None.
    None,
    /// Every bias of the model.
    All,
    /// Those of the modules that the method attaches to.
    Targets,
}

/// A configuration: which method, where it attaches, at which rank and scale.
#[derive(Debug, Clone)]
pub struct MethodConfig {
    /// The method with its own options.
    pub method: Kind,
    /// Default rank.
    pub rank: u64,
    /// Default alpha.
    pub alpha: f64,
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
    /// Modules that are replaced as a whole; matched modules under them are left out.
    pub modules_to_save: Vec<String>,
    /// Biases that are replaced.
    pub bias: Bias,
    /// Whether adapters of a tied embedding and head are one.
    pub ensure_weight_tying: bool,
    /// The whole file, unknown fields included.
    pub raw: Map<String, Value>,
    /// Remarks for the user: fields that were kept without being understood.
    pub notes: Vec<String>,
    /// Fields that nothing was read from.
    pub unread: Vec<String>,
}

/// Fields without influence on a loaded adapter: provenance and the like.
const HARMLESS: [&str; 10] = [
    "auto_mapping",
    "base_model_name_or_path",
    // PEFT itself switches this off for the linear layers of these models.
    "fan_in_fan_out",
    "inference_mode",
    "library_name",
    "model_name_or_path",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
];

/// Keys of ours that no PEFT knows: they choose how training starts and are not saved.
const OURS: [&str; 3] = ["selection", "calibration_batches", TRAINING];

impl MethodConfig {
    /// Reads `dir/adapter_config.json`.
    ///
    /// # Errors
    /// A missing or malformed file, another `peft_type`, a field that changes the mathematics and is not supported.
    pub fn read(dir: &Path) -> Result<MethodConfig> {
        let path = dir.join("adapter_config.json");
        MethodConfig::parse(&path, read_object(&path)?)
    }

    /// Reads a configuration that comes from the command line: PEFT's own keys, with `peft_type` LORA, PACA or FULL (chosen
    /// modules trained as they are), and for PaCA `selection` (random, weight_norm, gradient_norm) and `calibration_batches`.
    ///
    /// # Errors
    /// As [`MethodConfig::read`]; an unknown key.
    pub fn from_json(keys: &Map<String, Value>) -> Result<MethodConfig> {
        MethodConfig::parse(Path::new("the method's options"), keys.clone())
    }

    /// The same for a method by its name, one of [`method_names`](crate::adapter::method_names).
    ///
    /// # Errors
    /// A name that is not known, a key that contradicts it, and those of [`MethodConfig::from_json`].
    pub fn named(method: &str, keys: &Map<String, Value>) -> Result<MethodConfig> {
        let path = Path::new("the method's options");
        let name = method.to_ascii_lowercase();
        let Some(implied) = Kind::implied(&name) else {
            return Err(Error::key(path, "method", format!("is `{method}`; known are {}", known_names())));
        };
        let mut keys = keys.clone();
        for (key, value) in implied {
            match keys.get(key) {
                Some(given) if value.is_object() && given.is_object() => None,
                Some(given) if *given != value => {
                    return Err(Error::key(
                        path,
                        key,
                        format!("is {}, which contradicts the method `{name}`", brief(given)),
                    ));
                }
                _ => keys.insert(key.to_owned(), value),
            };
        }
        MethodConfig::parse(path, keys)
    }

    /// Reads an already parsed configuration; `path` only serves messages.
    pub fn parse(path: &Path, raw: Map<String, Value>) -> Result<MethodConfig> {
        let mut f = Fields::new(path, "", &raw);
        let method = Kind::read(&mut f)?;
        f.must_be_off("layer_replication", "replicated layers are not supported")?;
        let only = format!("{}_only", method.peft_type().to_lowercase());
        let bias = match f.text("bias")?.unwrap_or("none") {
            "none" => Bias::None,
            "all" => Bias::All,
            other if other == only => Bias::Targets,
            other => return Err(f.fault("bias", format!("is `{other}`; expected none, all or {only}"))),
        };
        let targets = match f.raw("target_modules") {
            None => Targets::Default,
            Some(Value::String(s)) if s.eq_ignore_ascii_case("all-linear") => Targets::AllLinear,
            Some(Value::String(s)) if s == NO_TARGET => Targets::Nothing,
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
        for key in [method.rank_key(), method.alpha_key()].into_iter().flatten() {
            if raw.get(key) == Some(&Value::Null) {
                return Err(f.fault(key, "is null; expected a number"));
            }
        }
        let rank = method.rank_key().map_or(Ok(None), |key| f.count(key, 1 << 24))?.unwrap_or(method.default_rank());
        let alpha = method.alpha_key().map_or(Ok(None), |key| f.number(key))?;
        let config = MethodConfig {
            rank,
            alpha: alpha.unwrap_or_else(|| method.default_alpha(rank)),
            targets,
            exclude,
            layers: layers.filter(|l| !l.is_empty()),
            layers_pattern: layers_pattern.into_iter().filter(|p| !p.is_empty()).collect(),
            rank_pattern: read_ranks(&mut f, method.saved_ranks().is_some())?,
            alpha_pattern: read_pattern(&mut f, "alpha_pattern", |f, key| {
                f.number(key)?.ok_or_else(|| f.fault(key, "is null; expected a number"))
            })?,
            modules_to_save: f.strings("modules_to_save")?.unwrap_or_default(),
            bias,
            ensure_weight_tying: f.flag("ensure_weight_tying")?.unwrap_or(false),
            notes: read_unknown(&f)?,
            unread: f
                .unread()
                .map(|(key, _)| key.clone())
                .filter(|key| !key.ends_with("dropout") && !HARMLESS.contains(&key.as_str()))
                .collect(),
            method,
            raw: Map::new(),
        };
        Ok(MethodConfig { raw, ..config })
    }

    /// Whether a new adapter of this configuration can be trained.
    ///
    /// # Errors
    /// A key that only a loaded adapter may have, by name.
    pub fn check_training(&self) -> Result<()> {
        let path = Path::new("the method's options");
        let fault = |key: &str, what: String| Err(Error::key(path, key, what));
        if let Err((key, what)) = self.method.check_training() {
            return fault(key, what);
        }
        let dropouts = self.raw.iter().filter(|(key, _)| key.ends_with("dropout"));
        if let Some((key, value)) = dropouts.into_iter().find(|d| d.1.as_f64().is_some_and(|x| x != 0.0)) {
            return fault(key, format!("is {value}: training has no dropout; set it to 0"));
        }
        let patterns = !self.rank_pattern.is_empty() || !self.alpha_pattern.is_empty();
        if patterns && !self.method.has_patterns() {
            let key = if self.rank_pattern.is_empty() { "alpha_pattern" } else { "rank_pattern" };
            return fault(key, "is not a key of this method in PEFT, so the adapter could not be loaded there".into());
        }
        Ok(())
    }

    /// Fills in what PEFT fills in from the model: the targets.
    pub(crate) fn resolved(mut self, modules: &ModuleTable) -> MethodConfig {
        if self.targets == Targets::Default {
            self.raw.insert("target_modules".into(), json!(self.method.default_targets(modules)));
        }
        self
    }

    /// `adapter_config.json` for an adapter of this configuration, keys sorted, without the base model's name.
    pub fn saved(&self) -> Map<String, Value> {
        let mut map = self.raw.clone();
        for key in OURS.iter().chain(self.method.own_keys()).copied().chain(["base_model_name_or_path"]) {
            map.remove(key);
        }
        let mut put = |key: &str, value: Value| map.insert(key.to_owned(), value);
        put("peft_type", json!(self.method.peft_type()));
        if let Some(key) = self.method.rank_key() {
            put(key, json!(self.rank));
        }
        if let Some(key) = self.method.alpha_key() {
            put(key, number(self.alpha));
        }
        put("inference_mode", json!(true));
        let modules = Some(&self.modules_to_save).filter(|m| !m.is_empty());
        put("modules_to_save", json!(modules));
        for (key, value) in self.method.config() {
            put(key, value);
        }
        // PEFT's own defaults for what was not given.
        let lora = self.method.peft_type() == "LORA";
        let defaults = [
            ("auto_mapping", Value::Null, true),
            ("bias", json!("none"), lora),
            ("exclude_modules", Value::Null, true),
            ("fan_in_fan_out", json!(false), lora),
            ("layers_pattern", Value::Null, true),
            ("layers_to_transform", Value::Null, true),
            ("rank_pattern", json!({}), self.method.has_patterns()),
            ("alpha_pattern", json!({}), self.method.has_patterns()),
            ("revision", Value::Null, true),
            ("target_modules", Value::Null, true),
            ("task_type", json!("CAUSAL_LM"), true),
        ];
        for (key, value, applies) in defaults {
            if applies && !map.contains_key(key) {
                map.insert(key.to_owned(), value);
            }
        }
        map.sort_keys();
        map
    }
}

/// A whole number as one: PEFT's fields are integers where the user gave one.
fn number(x: f64) -> Value {
    if x.fract() == 0.0 && x.abs() < 1e15 { json!(x as i64) } else { json!(x) }
}

fn read_layers(f: &mut Fields) -> Result<Option<Vec<u64>>> {
    const KEY: &str = "layers_to_transform";
    let Some(value) = f.raw(KEY) else { return Ok(None) };
    let one = std::slice::from_ref(value);
    let list = value.as_array().map_or(one, Vec::as_slice);
    let layers = list.iter().map(Value::as_u64).collect::<Option<Vec<_>>>();
    layers.map(Some).ok_or_else(|| f.fault(KEY, format!("is {}; expected layer numbers", brief(value))))
}

/// `rank_pattern`: a number per pattern; or, where ranks were left out when the adapter was saved, a truth per rank under the name of a
/// module's tensor. `none`: a module may have no rank left.
fn read_ranks(f: &mut Fields, none: bool) -> Result<Vec<(String, u64)>> {
    let list = read_pattern(f, "rank_pattern", |f, key| match f.raw(key) {
        Some(Value::Array(flags)) => {
            let used = flags.iter().map(Value::as_bool).collect::<Option<Vec<_>>>();
            let used = used.ok_or_else(|| f.fault(key, "is a list; expected a truth per rank, or a number"))?;
            Ok((true, used.into_iter().filter(|u| *u).count() as u64))
        }
        Some(Value::Number(n)) if none && n.as_u64() == Some(0) => Ok((false, 0)),
        _ => Ok((false, f.required_count(key, 1 << 24)?)),
    })?;
    let of_module = |name: String| {
        let module = name.rsplit_once('.').map_or(name.as_str(), |(module, _)| module);
        module.strip_prefix(super::adapter::PREFIX).unwrap_or(module).to_owned()
    };
    Ok(list.into_iter().map(|(name, (flags, n))| (if flags { of_module(name) } else { name }, n)).collect())
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
        let dropout = key.ends_with("dropout");
        if dropout
            || HARMLESS.contains(&key.as_str())
            || OURS.contains(&key.as_str())
            || key.starts_with('_')
            || is_off(value)
        {
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

    fn parse(extra: Value) -> std::result::Result<MethodConfig, String> {
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
        MethodConfig::parse(Path::new("adapter_config.json"), base.as_object().unwrap().clone())
            .map_err(|e| e.to_string())
    }

    #[test]
    fn a_saved_configuration_is_read() {
        let config = parse(json!({"rank_pattern": {"z": 4, "a": 2}, "layers_to_transform": 3})).unwrap();
        assert_eq!((config.rank, config.alpha, config.method.scale(16, 32.0)), (16, 32.0, 2.0));
        assert_eq!(config.rank_pattern, [("z".to_owned(), 4), ("a".to_owned(), 2)]);
        assert_eq!(config.layers, Some(vec![3]));
        assert!(config.notes.is_empty());
        assert_eq!(parse(json!({"use_rslora": true})).unwrap().method.scale(16, 32.0), 8.0);
        assert_eq!(parse(json!({"use_dora": true})).unwrap().method.name(), "dora");
        assert_eq!(parse(json!({"bias": "lora_only"})).unwrap().bias, Bias::Targets);
        assert_eq!(parse(json!({"target_modules": "All-Linear"})).unwrap().targets, Targets::AllLinear);
        let minimal = json!({"peft_type": "LORA"});
        let minimal = MethodConfig::parse(Path::new("c"), minimal.as_object().unwrap().clone()).unwrap();
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
            ("peft_type", json!("BOFT")),
            ("use_dora", json!(1)),
            ("bias", json!("paca_only")),
            ("modules_to_save", json!(3)),
            ("init_lora_weights", json!("pissa_niter_x")),
            ("init_lora_weights", json!("pissa2")),
            ("init_lora_weights", json!("loftq")),
            ("alora_invocation_tokens", json!([5])),
            ("target_parameters", json!(["w"])),
            ("layer_replication", json!([[0, 2]])),
            ("trainable_token_indices", json!([1])),
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
