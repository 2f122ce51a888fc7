//! From flags to an adapter's configuration: PEFT's own keys, as its `adapter_config.json` has them.
//!
//! `--method-config` is the ground, flags go over it. With an adapter folder the folder decides, and a flag that
//! contradicts it is refused. What the keys mean, and which are known, is for the frontend.
#![cfg_attr(
    not(feature = "compiler"),
    allow(dead_code, reason = "without a compiler methods are listed, not asked for")
)]

use crate::args::MethodArgs;
use crate::failure::{Failure, Result};
use pleach_frontend::peft::MethodConfig;
use pleach_runtime::train::checkpoint::unordered;
use serde_json::{Map, Value, json};

/// A method by name with PEFT's keys.
pub(crate) type Keys = (String, Map<String, Value>);

impl MethodArgs {
    /// The configuration of a new adapter.
    ///
    /// # Errors
    /// No method, a file that is no configuration, options that contradict each other.
    pub(crate) fn fresh(&self) -> Result<Keys> {
        let mut keys = match &self.method_config {
            None => Map::new(),
            Some(path) => {
                let text = std::fs::read(path).map_err(Failure::io("read", path))?;
                let v: Value = serde_json::from_slice(&text)
                    .map_err(|e| Failure::new(format!("{}: is no JSON: {e}", path.display())))?;
                match v {
                    Value::Object(m) => m,
                    _ => return Err(Failure::new(format!("{}: is no JSON object", path.display()))),
                }
            }
        };
        // What only says where a file came from would only stand in the way.
        for key in ["base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping"] {
            keys.remove(key);
        }
        let name = match &self.method {
            Some(m) => m.to_lowercase(),
            None if keys.contains_key("peft_type") => MethodConfig::from_json(&keys)?.method.name().to_owned(),
            None => {
                return Err(Failure::usage(
                    "say what to train: --method NAME (`pleach methods` lists them), --method-config FILE, or --adapter DIR",
                ));
            }
        };
        let given = self.given(&name)?;
        keys.extend(given.iter().cloned());
        // Refused here, before anything is compiled.
        let config = MethodConfig::named(&name, &keys)?;
        config.check_training()?;
        // A file may have keys of programs that know more; an option without effect is a mistake.
        if let Some((key, _)) = given.iter().find(|(key, _)| config.unread.contains(key)) {
            let option = match self.set.iter().any(|s| s.split('=').next() == Some(key)) {
                true => format!("--set {key}"),
                false if self.alpha.is_some() && key.ends_with("alpha") => "--alpha".into(),
                false => format!("--{}", key.replace('_', "-")),
            };
            return Err(Failure::usage(format!("{option}: the method `{name}` has no `{key}`; leave it out")));
        }
        Ok((name, keys))
    }

    /// Refuses flags that contradict an adapter folder's configuration.
    ///
    /// # Errors
    /// The flag and what the folder says.
    pub(crate) fn agrees(&self, config: &MethodConfig) -> Result<()> {
        if self.method_config.is_some() {
            return Err(Failure::usage(
                "--method-config and --adapter exclude each other: the folder has a configuration",
            ));
        }
        let have = config.saved();
        if let Some(name) = &self.method {
            let implied = MethodConfig::named(name, &Map::new())?;
            let flag = |key: &str| (implied.raw.get(key).cloned(), have.get(key).cloned());
            for key in ["peft_type", "use_dora", "use_rslora"] {
                if let (Some(want), other) = flag(key)
                    && other.as_ref() != Some(&want)
                {
                    let is = other.unwrap_or(Value::Null);
                    return Err(Failure::usage(format!(
                        "--method {name} contradicts the adapter, where {key} is {is}"
                    )));
                }
            }
        }
        let name = config.method.name();
        for (key, value) in self.given(name)? {
            let is = have.get(&key).cloned().unwrap_or(Value::Null);
            let same = match (value.as_f64(), is.as_f64()) {
                (Some(a), Some(b)) => a == b,
                _ => unordered(&value) == unordered(&is),
            };
            if !same {
                let flag = key.replace('_', "-");
                return Err(Failure::usage(format!("--{flag} {value} contradicts the adapter, where it is {is}")));
            }
        }
        Ok(())
    }

    /// The keys that flags give.
    fn given(&self, method: &str) -> Result<Vec<(String, Value)>> {
        let plain = MethodConfig::named(method, &Map::new());
        let (rank, alpha) = plain.map_or((None, None), |c| (c.method.rank_key(), c.method.alpha_key()));
        let (rank, alpha) = (rank.unwrap_or("r"), alpha.unwrap_or("lora_alpha"));
        let mut out: Vec<(String, Value)> = vec![];
        let mut put = |key: &str, value: Option<Value>| out.extend(value.map(|v| (key.to_owned(), v)));
        put(rank, self.r.map(Value::from));
        put(alpha, self.alpha.map(number));
        put("lora_alpha", self.lora_alpha.map(number));
        put("paca_alpha", self.paca_alpha.map(number));
        put("target_modules", self.target_modules.as_deref().map(names));
        put("exclude_modules", self.exclude_modules.as_deref().map(names));
        let layers = (!self.layers_to_transform.is_empty()).then(|| json!(self.layers_to_transform));
        put("layers_to_transform", layers);
        put("use_rslora", self.use_rslora.then(|| true.into()));
        put("use_dora", self.use_dora.then(|| true.into()));
        put("rank_pattern", self.rank_pattern.as_deref().map(|t| object("--rank-pattern", t)).transpose()?);
        put("alpha_pattern", self.alpha_pattern.as_deref().map(|t| object("--alpha-pattern", t)).transpose()?);
        put("modules_to_save", (!self.modules_to_save.is_empty()).then(|| json!(self.modules_to_save)));
        put("bias", self.bias.clone().map(Value::from));
        let init = self.init_lora_weights.as_deref().map(|n| match n.to_lowercase().as_str() {
            "true" => true.into(),
            "false" => false.into(),
            other => other.into(),
        });
        put("init_lora_weights", init);
        put("lora_dropout", self.lora_dropout.map(number));
        put("selection", self.selection.clone().map(Value::from));
        put("calibration_batches", self.calibration_batches.map(Value::from));
        for pair in &self.set {
            let (key, text) = pair
                .split_once('=')
                .ok_or_else(|| Failure::usage(format!("--set: `{pair}` is not written as KEY=VALUE")))?;
            put(key, Some(serde_json::from_str(text).unwrap_or_else(|_| text.into())));
        }
        Ok(out)
    }
}

/// A whole number stays one.
fn number(x: f64) -> Value {
    if x.fract() == 0.0 && x.abs() < 1e15 { (x as i64).into() } else { x.into() }
}

/// `all-linear` and regular expressions are texts, names are a list.
pub(crate) fn names(spec: &str) -> Value {
    let plain = spec.chars().all(|c| c.is_alphanumeric() || "_.-,".contains(c));
    if !plain || spec.eq_ignore_ascii_case("all-linear") {
        return spec.into();
    }
    spec.split(',').map(str::trim).filter(|s| !s.is_empty()).collect::<Vec<_>>().into()
}

fn object(flag: &str, text: &str) -> Result<Value> {
    let v: Option<Value> = serde_json::from_str(text).ok();
    v.filter(Value::is_object).ok_or_else(|| Failure::usage(format!("{flag}: `{text}` is no JSON object")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_become_pefts_keys() {
        let args = MethodArgs {
            method: Some("LoRA".into()),
            r: Some(16),
            alpha: Some(32.0),
            target_modules: Some("q_proj,v_proj".into()),
            use_rslora: true,
            rank_pattern: Some(r#"{"q_proj": 4}"#.into()),
            init_lora_weights: Some("gaussian".into()),
            ..MethodArgs::default()
        };
        let (name, keys) = args.fresh().unwrap();
        let want = json!({"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"], "use_rslora": true,
                          "rank_pattern": {"q_proj": 4}, "init_lora_weights": "gaussian"});
        assert_eq!((name.as_str(), Value::Object(keys)), ("lora", want));
        assert_eq!(names("all-linear"), "all-linear");
        assert_eq!(names(r".*\.(q|v)_proj"), r".*\.(q|v)_proj");
        assert_eq!(names("self_attn.q_proj"), json!(["self_attn.q_proj"]));
        let paca = MethodArgs { method: Some("paca".into()), alpha: Some(8.0), ..MethodArgs::default() };
        assert_eq!(paca.fresh().unwrap().1.get("paca_alpha"), Some(&json!(8)));
        assert_eq!(MethodArgs::default().fresh().unwrap_err().code, 2);
        let unknown = MethodArgs { method: Some("lorax".into()), ..MethodArgs::default() };
        assert!(unknown.fresh().unwrap_err().message.contains("lorax"));
    }
}
