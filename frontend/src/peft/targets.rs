//! Which modules an adapter attaches to: PEFT's rules, in PEFT's order.
//!
//! Excluded names first, then everything under `modules_to_save`, then the target itself (a string matches the whole
//! path, a list matches equal or trailing names), then the filter by layer number. A match on something that is
//! neither a linear layer nor an embedding is an error, as in PEFT. Source: `check_target_module_exists` and
//! `get_pattern_key` of PEFT.

use super::config::{MethodConfig, NameSpec, Targets};
use super::pattern::Pattern;
use crate::coupling::Member;
use crate::error::{Error, Result};
use crate::modules::{Module, ModuleKind, ModuleTable};
use crate::nearest::nearest_hint;

/// One module that an adapter attaches to.
#[derive(Debug, Clone, PartialEq)]
pub struct Target {
    /// The module's path.
    pub module: String,
    /// Width of its input (rows of the table for an embedding).
    pub input: u64,
    /// Width of its output.
    pub output: u64,
    /// Whether it is an embedding.
    pub embedding: bool,
    /// Rank, after `rank_pattern`.
    pub rank: u64,
    /// Alpha, after `alpha_pattern`.
    pub alpha: f64,
    /// The factor of the branch.
    pub scale: f64,
    /// Its part in a coupling.
    pub member: Option<Member>,
}

impl Target {
    /// Trainable values of a LoRA branch here: r · (in + out).
    pub fn parameters(&self) -> u64 {
        self.rank * (self.input + self.output)
    }
}

enum Names {
    Pattern(Pattern),
    List(Vec<String>),
}

impl Names {
    fn new(spec: &NameSpec) -> Result<Names> {
        Ok(match spec {
            NameSpec::Pattern(p) => Names::Pattern(Pattern::full(p)?),
            NameSpec::Names(names) => Names::List(names.clone()),
        })
    }

    fn is_match(&self, path: &str) -> Result<bool> {
        match self {
            Names::Pattern(p) => p.is_match(path),
            Names::List(names) => Ok(names.iter().any(|n| equal_or_trailing(path, n))),
        }
    }
}

fn equal_or_trailing(path: &str, name: &str) -> bool {
    path.strip_suffix(name).is_some_and(|head| head.is_empty() || head.ends_with('.'))
}

/// All modules that `config` attaches to, in module order.
///
/// # Errors
/// An invalid pattern, a match on a module that cannot carry a branch, or no match at all.
pub fn match_modules(config: &MethodConfig, modules: &ModuleTable) -> Result<Vec<Target>> {
    if config.targets == Targets::Nothing {
        return Ok(vec![]);
    }
    let ranks = patterns(config.rank_pattern.iter().map(|(key, _)| key))?;
    let alphas = patterns(config.alpha_pattern.iter().map(|(key, _)| key))?;
    let mut targets = Vec::new();
    for module in matched(config, modules)? {
        let path = module.path.as_str();
        let rank = any_match(&ranks, path)?.map_or(config.rank, |i| config.rank_pattern[i].1);
        let alpha = any_match(&alphas, path)?.map_or(config.alpha, |i| config.alpha_pattern[i].1);
        let target = target(module, rank, alpha, config.method.scale(rank, alpha))?;
        let refused = |what: String| Error::Pattern { pattern: path.to_owned(), what };
        config.method.attach(&target).map_err(refused)?;
        targets.push(target);
    }
    Ok(targets)
}

/// The modules that `target_modules` names, whatever they are.
///
/// # Errors
/// An invalid pattern, or no match at all.
pub(super) fn matched<'a>(config: &MethodConfig, modules: &'a ModuleTable) -> Result<Vec<&'a Module>> {
    let exclude = config.exclude.as_ref().map(Names::new).transpose()?;
    let saved: Vec<Pattern> = config
        .modules_to_save
        .iter()
        .map(|m| Pattern::prefix(&format!(r"(?:^|.*\.){m}(?:$|\..*)")))
        .collect::<Result<_>>()?;
    let spec = match &config.targets {
        Targets::AllLinear | Targets::Nothing => None,
        Targets::Default => {
            Some(NameSpec::Names(config.method.default_targets(modules).iter().map(|n| (*n).to_owned()).collect()))
        }
        Targets::Spec(spec) => Some(spec.clone()),
    };
    let names = spec.as_ref().map(Names::new).transpose()?;
    let layers = LayerFilter::new(config)?;
    let mut list = Vec::new();
    for module in modules.iter() {
        let path = module.path.as_str();
        if let Some(exclude) = &exclude
            && exclude.is_match(path)?
        {
            continue;
        }
        if any_match(&saved, path)?.is_some() {
            continue;
        }
        let hit = match &names {
            None => matches!(module.kind, ModuleKind::Linear { .. }) && !module.output_head,
            Some(Names::List(list)) if list.iter().any(|n| n == path) => true,
            Some(list @ Names::List(_)) => list.is_match(path)? && layers.keeps(path)?,
            Some(pattern) => pattern.is_match(path)?,
        };
        if hit {
            list.push(module);
        }
    }
    if list.is_empty() {
        return Err(nothing_matched(spec.as_ref(), modules));
    }
    Ok(list)
}

/// What a value of `target_modules` would attach to: "all-linear", a regular expression for whole paths, or a list of names.
/// Rank 1 and alpha 1 stand in for the values of a configuration.
///
/// # Errors
/// What is no such value, and what matches nothing.
pub fn preview_targets(spec: serde_json::Value, modules: &ModuleTable) -> Result<Vec<Target>> {
    let mut raw = serde_json::Map::new();
    raw.insert("peft_type".into(), "LORA".into());
    raw.insert("target_modules".into(), spec);
    raw.insert("r".into(), 1.into());
    raw.insert("lora_alpha".into(), 1.into());
    match_modules(&MethodConfig::parse(std::path::Path::new("--match"), raw)?, modules)
}

fn target(module: &Module, rank: u64, alpha: f64, scale: f64) -> Result<Target> {
    let (input, output, embedding) = match module.kind {
        ModuleKind::Linear { input, output, .. } => (input, output, false),
        ModuleKind::Embedding { rows, width } => (rows, width, true),
        ModuleKind::Norm { .. } | ModuleKind::Other => {
            return Err(Error::Pattern {
                pattern: module.path.clone(),
                what: "is matched by `target_modules` but is neither a linear layer nor an embedding".into(),
            });
        }
    };
    let member = module.member.clone();
    Ok(Target { module: module.path.clone(), input, output, embedding, rank, alpha, scale, member })
}

fn nothing_matched(spec: Option<&NameSpec>, modules: &ModuleTable) -> Error {
    let last = |m: &Module| m.path.rsplit('.').next().unwrap_or_default().to_owned();
    let mut ends: Vec<String> =
        modules.iter().filter(|m| matches!(m.kind, ModuleKind::Linear { .. })).map(last).collect();
    ends.sort();
    ends.dedup();
    let (pattern, wanted) = match spec {
        Some(NameSpec::Pattern(p)) => (p.clone(), p.clone()),
        Some(NameSpec::Names(names)) => (names.join(", "), names.first().cloned().unwrap_or_default()),
        None => ("all-linear".into(), String::new()),
    };
    let hint = nearest_hint(&wanted, ends.iter().map(String::as_str));
    let what = format!("matches no module of the base model{hint}; its linear layers end in {}", ends.join(", "));
    Error::Pattern { pattern, what }
}

/// Keys of `rank_pattern` and `alpha_pattern`: each is tried behind any number of leading segments.
fn patterns<'a>(keys: impl Iterator<Item = &'a String>) -> Result<Vec<Pattern>> {
    keys.map(|key| Pattern::full(&format!(r"(?:.*\.)?(?:{key})"))).collect()
}

fn any_match(patterns: &[Pattern], path: &str) -> Result<Option<usize>> {
    for (index, pattern) in patterns.iter().enumerate() {
        if pattern.is_match(path)? {
            return Ok(Some(index));
        }
    }
    Ok(None)
}

/// `layers_to_transform` with `layers_pattern`.
struct LayerFilter<'a> {
    layers: Option<&'a [u64]>,
    patterns: Vec<Pattern>,
}

impl<'a> LayerFilter<'a> {
    fn new(config: &'a MethodConfig) -> Result<LayerFilter<'a>> {
        let patterns = if config.layers_pattern.is_empty() {
            vec![Pattern::prefix(r".*?\.[^.]*\.(?P<idx>\d+)\.")?]
        } else {
            let behind = |p: &String| Pattern::prefix(&format!(r"(?:^|.*?\.){p}\.(?P<idx>\d+)\."));
            config.layers_pattern.iter().map(behind).collect::<Result<_>>()?
        };
        Ok(LayerFilter { layers: config.layers.as_deref(), patterns })
    }

    fn keeps(&self, path: &str) -> Result<bool> {
        let Some(layers) = self.layers else { return Ok(true) };
        for pattern in &self.patterns {
            if let Some(index) = pattern.group(path, "idx")? {
                return Ok(index.parse().is_ok_and(|i| layers.contains(&i)));
            }
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ModelConfig;
    use crate::testing::{tiny_bert, tiny_llama};
    use serde_json::{Value, json};
    use std::path::Path;

    fn table(config: Value) -> ModuleTable {
        ModuleTable::new(&ModelConfig::parse(Path::new("c"), config.as_object().unwrap()).unwrap())
    }

    fn matched(modules: &ModuleTable, config: Value) -> std::result::Result<Vec<Target>, String> {
        let mut raw = config.as_object().unwrap().clone();
        raw.insert("peft_type".into(), "LORA".into());
        let config = MethodConfig::parse(Path::new("c"), raw).map_err(|e| e.to_string())?;
        match_modules(&config, modules).map_err(|e| e.to_string())
    }

    fn names(modules: &ModuleTable, config: Value) -> Vec<String> {
        let short =
            |t: Target| t.module.replace("model.layers.", "").replace("self_attn.", "").replace("encoder.layer.", "");
        matched(modules, config).unwrap().into_iter().map(short).collect()
    }

    #[test]
    fn lists_patterns_and_all_linear() {
        let m = table(tiny_llama());
        assert_eq!(names(&m, json!({})), ["0.q_proj", "0.v_proj", "1.q_proj", "1.v_proj"]);
        assert_eq!(names(&m, json!({"target_modules": "all-linear"})).len(), 14);
        assert_eq!(names(&m, json!({"target_modules": r".*\.1\..*[kq]_proj"})), ["1.q_proj", "1.k_proj"]);
        assert_eq!(names(&m, json!({"target_modules": r".*\.(?!v_proj)[qkv]_proj"})).len(), 4);
        assert_eq!(names(&m, json!({"target_modules": ["model.layers.1.mlp.up_proj"]})), ["1.mlp.up_proj"]);
        assert_eq!(names(&m, json!({"target_modules": ["lm_head"]})), ["lm_head"]);
        let excluded = json!({"target_modules": "all-linear", "exclude_modules": r".*mlp.*"});
        assert_eq!(names(&m, excluded).len(), 8);
        let excluded = json!({"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["0.self_attn.q_proj"]});
        assert_eq!(names(&m, excluded), ["0.k_proj", "1.q_proj", "1.k_proj"]);
        let b = table(tiny_bert());
        assert_eq!(names(&b, json!({"target_modules": ["dense"]})).last().unwrap(), "pooler.dense");
    }

    #[test]
    fn layer_filters() {
        let m = table(tiny_llama());
        let by_layer = |extra: Value| {
            let mut config = json!({"target_modules": ["q_proj", "lm_head", "model.layers.0.mlp.up_proj"]});
            for (k, v) in extra.as_object().unwrap() {
                config[k] = v.clone();
            }
            names(&m, config)
        };
        // A path written out in full is not subject to the filter; a name without layer number fails it.
        assert_eq!(by_layer(json!({"layers_to_transform": [1]})), ["0.mlp.up_proj", "1.q_proj", "lm_head"]);
        assert_eq!(by_layer(json!({"layers_to_transform": 0, "layers_pattern": "layers"}))[0], "0.q_proj");
        assert_eq!(
            by_layer(json!({"layers_to_transform": [0], "layers_pattern": ["h", "blocks"]})),
            ["0.mlp.up_proj", "lm_head"]
        );
        assert_eq!(by_layer(json!({"layers_to_transform": []})).len(), 4);
    }

    #[test]
    fn ranks_and_alphas_by_pattern_first_match_wins() {
        let m = table(tiny_llama());
        let config = json!({
            "target_modules": ["q_proj", "v_proj"], "r": 8, "lora_alpha": 16,
            "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 3, "q_proj": 4, "proj": 5}, "alpha_pattern": {r"^model\.layers\.0\..*": 1.5}
        });
        let targets = matched(&m, config).unwrap();
        assert_eq!(targets.iter().map(|t| t.rank).collect::<Vec<_>>(), [4, 8, 3, 8]);
        assert_eq!(targets.iter().map(|t| t.alpha).collect::<Vec<_>>(), [1.5, 1.5, 16.0, 16.0]);
        assert_eq!(targets[0].scale, 1.5 / 4.0);
    }

    #[test]
    fn faults_say_what_was_meant() {
        let m = table(tiny_llama());
        assert!(matched(&m, json!({"target_modules": ["W_pack"]})).unwrap_err().contains("matches no module"));
        assert!(matched(&m, json!({"target_modules": ["q_porj"]})).unwrap_err().contains("nearest name is `q_proj`"));
        assert!(matched(&m, json!({"target_modules": ".*mlp.*"})).unwrap_err().contains("neither a linear layer"));
        assert!(matched(&m, json!({"target_modules": "("})).unwrap_err().contains("not a valid"));
        assert!(preview_targets("all-linear".into(), &m).unwrap().iter().all(|t| t.rank == 1));
    }

    #[test]
    fn the_other_class_has_the_same_modules_under_other_names() {
        let (bare, origins) = table(tiny_llama()).renamed();
        assert!(bare.get("lm_head").is_none() && bare.get("layers.0.self_attn.q_proj").is_some());
        assert_eq!(origins.len(), bare.iter().count());
        let (wrapped, _) = table(tiny_bert()).renamed();
        assert!(wrapped.get("bert.encoder.layer.0.attention.self.query").is_some());
    }
}
