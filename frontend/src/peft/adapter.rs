//! An adapter folder whose every tensor has been matched: exactly once, with the shape that base and rank call for.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::config::LoraConfig;
use super::targets::{Target, match_modules};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::modules::{ModuleKind, ModuleTable};
use crate::nearest::nearest_hint;
use crate::tensors::{TensorRef, TensorTable};

const PREFIX: &str = "base_model.model.";

/// One LoRA branch beside a linear layer, y += scale · (x · Aᵀ) · Bᵀ, or beside an embedding, where a token's column of
/// A takes the place of x · Aᵀ.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraSite {
    /// Path of the layer in the base's [`ModuleTable`], such as `model.layers.0.self_attn.q_proj`.
    pub module: String,
    /// Whether the layer is an embedding.
    pub embedding: bool,
    /// r.
    pub rank: u64,
    /// alpha / r, or alpha / √r.
    pub scale: f64,
    /// Width of x; rows of the table for an embedding.
    pub input: u64,
    /// Width of y.
    pub output: u64,
    /// A, [r, in].
    pub a: TensorRef,
    /// B, [out, r].
    pub b: TensorRef,
}

/// A LoRA adapter, ready to be woven in.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    /// Name it goes by: given by the caller, or the folder's.
    pub name: String,
    /// The folder.
    pub dir: PathBuf,
    /// Its configuration.
    pub config: LoraConfig,
    /// Its branches, in module order.
    pub sites: Vec<LoraSite>,
    /// Copies of base weights that the file carries (PEFT adds the embedding and the head when they are targeted), by
    /// the parameter's path. They must equal the base's, see [`Adapter::check_copies`].
    pub copies: Vec<(String, TensorRef)>,
    /// Remarks for the user.
    pub notes: Vec<String>,
}

impl Adapter {
    /// Opens an adapter folder and matches it against the modules of a base model.
    ///
    /// # Errors
    /// A missing or malformed file; a field of the configuration that is refused (see [`LoraConfig::read`]); a tensor
    /// that is expected but absent, present but not expected, or of another shape: the message names the tensor and
    /// the nearest candidate.
    pub fn open(dir: &Path, name: Option<&str>, modules: &ModuleTable) -> Result<Adapter> {
        let tensors = open_tensors(dir)?;
        let config = LoraConfig::read(dir)?;
        let folder_name = || dir.file_name().map_or("adapter".into(), |n| n.to_string_lossy().into_owned());
        let name = name.map_or_else(folder_name, str::to_owned);
        let (renamed, origins) = modules.renamed();
        let (sites, copies) = if count_known(&tensors, &renamed) > count_known(&tensors, modules) {
            let origin: BTreeMap<&str, &str> =
                renamed.iter().map(|m| m.path.as_str()).zip(origins.iter().map(String::as_str)).collect();
            let (mut sites, mut copies) = bind(dir, &config, &tensors, &renamed)?;
            for path in sites.iter_mut().map(|s| &mut s.module).chain(copies.iter_mut().map(|c| &mut c.0)) {
                *path = origin[path.as_str()].to_owned();
            }
            (sites, copies)
        } else {
            bind(dir, &config, &tensors, modules)?
        };
        let copies = copies.into_iter().map(|(module, tensor)| (format!("{module}.weight"), tensor)).collect();
        let notes = config.notes.clone();
        Ok(Adapter { name, dir: dir.to_owned(), config, sites, copies, notes })
    }

    /// Compares the copies of base weights that the file carries with the base itself, value by value.
    ///
    /// # Errors
    /// A copy that differs: the adapter was made for another base, or its embedding was trained or resized, which is
    /// not supported.
    pub fn check_copies(&self, base: &Checkpoint) -> Result<()> {
        for (path, copy) in &self.copies {
            let same = match base.param(path) {
                Some(tensor) => tensor.shape == copy.shape && tensor.read_f32()? == copy.read_f32()?,
                None => false,
            };
            if !same {
                let what = format!(
                    "differs from `{path}` of {}: the adapter belongs to another base, or carries a trained embedding, which is \
                     not supported yet",
                    base.dir.display()
                );
                return Err(Error::tensor(&self.dir, &copy.name, what));
            }
        }
        Ok(())
    }

    /// Trainable values in all branches.
    pub fn parameters(&self) -> u64 {
        self.sites.iter().map(|s| s.a.elements() + s.b.elements()).sum()
    }

    /// The branch beside a module.
    pub fn site(&self, module: &str) -> Option<&LoraSite> {
        self.sites.iter().find(|s| s.module == module)
    }
}

fn open_tensors(dir: &Path) -> Result<TensorTable> {
    if !dir.join("adapter_config.json").is_file() {
        let inner = std::fs::read_dir(dir).map_err(Error::io("open", dir))?.flatten().map(|e| e.path());
        let mut inner: Vec<_> = inner.filter(|p| p.join("adapter_config.json").is_file()).collect();
        inner.sort();
        let hint = inner.first().map(|p| format!("; did you mean {}?", p.display())).unwrap_or_default();
        return Err(Error::format(dir, format!("holds no adapter_config.json{hint}")));
    }
    let path = dir.join("adapter_model.safetensors");
    if path.is_file() {
        return TensorTable::open_file(&path);
    }
    let what = match dir.join("adapter_model.bin").exists() {
        true => "holds a pickled adapter_model.bin, which is never loaded; save the adapter as safetensors first",
        false => "holds no adapter_model.safetensors",
    };
    Err(Error::format(dir, what))
}

/// How many tensors of the file belong to modules of the table: tells which class's names the file uses.
fn count_known(tensors: &TensorTable, modules: &ModuleTable) -> usize {
    let paths: BTreeSet<&str> = modules.iter().map(|m| m.path.as_str()).collect();
    let module_of = |name: &'_ str| -> Option<String> {
        let rest = name.strip_prefix(PREFIX)?;
        Some(rest[..rest.find(".lora_")?].to_owned())
    };
    tensors.names().filter_map(module_of).filter(|path| paths.contains(path.as_str())).count()
}

/// Branches, and copies of base weights by module.
type Bound = (Vec<LoraSite>, Vec<(String, TensorRef)>);

fn bind(dir: &Path, config: &LoraConfig, tensors: &TensorTable, modules: &ModuleTable) -> Result<Bound> {
    let targets = match_modules(config, modules)?;
    if config.ensure_weight_tying && targets.iter().any(|t| t.embedding || t.module.ends_with("lm_head")) {
        let path = dir.join("adapter_config.json");
        let what = "is true for a targeted embedding or head, which is not supported";
        return Err(Error::key(&path, "ensure_weight_tying", what));
    }
    let name = |target: &Target, part: &str| match target.embedding {
        true => format!("{PREFIX}{}.lora_embedding_{part}", target.module),
        false => format!("{PREFIX}{}.lora_{part}.weight", target.module),
    };
    let expected: BTreeMap<String, &Target> =
        targets.iter().flat_map(|t| [(name(t, "A"), t), (name(t, "B"), t)]).collect();
    let copies = find_copies(tensors, modules, &targets);
    refuse_unexpected(dir, tensors, &expected, &copies)?;
    let unmatched = || tensors.names().filter(|n| !expected.contains_key(*n));
    let find = |target: &Target, part: &str, shape: [u64; 2]| {
        let name = name(target, part);
        let Some(tensor) = tensors.get(&name) else {
            let missing = expected.keys().filter(|n| tensors.get(n).is_none()).count();
            let hint = nearest_hint(&name, unmatched());
            let what =
                format!("of shape {shape:?} is missing ({missing} of {} expected tensors are){hint}", expected.len());
            return Err(Error::tensor(dir, name, what));
        };
        if tensor.shape != shape {
            let what = format!(
                "has shape {:?}; the base model and rank {} of adapter_config.json make it {shape:?}",
                tensor.shape, target.rank
            );
            return Err(Error::tensor(dir, name, what));
        }
        if !tensor.dtype.is_weight() {
            return Err(Error::tensor(dir, name, format!("is {}; it must be F32, F16 or BF16", tensor.dtype)));
        }
        Ok(tensor.clone())
    };
    let site = |t: &Target| {
        Ok(LoraSite {
            module: t.module.clone(),
            embedding: t.embedding,
            rank: t.rank,
            scale: t.scale,
            input: t.input,
            output: t.output,
            a: find(t, "A", [t.rank, t.input])?,
            b: find(t, "B", [t.output, t.rank])?,
        })
    };
    Ok((targets.iter().map(site).collect::<Result<_>>()?, copies))
}

/// Tensors of the file that are copies of base weights: of targeted layers under `base_layer`, and of the embedding and
/// the head under their own names.
fn find_copies(tensors: &TensorTable, modules: &ModuleTable, targets: &[Target]) -> Vec<(String, TensorRef)> {
    let targeted = targets.iter().map(|t| (t.module.clone(), format!("{PREFIX}{}.base_layer.weight", t.module)));
    let tables = modules
        .iter()
        .filter(|m| m.output_head || matches!(m.kind, ModuleKind::Embedding { .. }))
        .map(|m| (m.path.clone(), format!("{PREFIX}{}.weight", m.path)));
    let found = |(module, name): (String, String)| Some((module, tensors.get(&name)?.clone()));
    targeted.chain(tables).filter_map(found).collect()
}

/// Every tensor of the file must be expected.
fn refuse_unexpected(
    dir: &Path,
    tensors: &TensorTable,
    expected: &BTreeMap<String, &Target>,
    copies: &[(String, TensorRef)],
) -> Result<()> {
    let known = |name: &&str| expected.contains_key(*name) || copies.iter().any(|c| c.1.name == **name);
    let unmatched: Vec<&str> = tensors.names().filter(|n| !known(n)).collect();
    let Some(first) = unmatched.first() else { return Ok(()) };
    let reason = if first.contains("lora_magnitude_vector") {
        "is a DoRA magnitude, which is not supported yet".to_owned()
    } else if !first.starts_with(PREFIX) {
        format!("does not start with `{PREFIX}`; was the file saved by PEFT's save_pretrained?")
    } else {
        let absent = expected.keys().map(String::as_str).filter(|n| tensors.get(n).is_none());
        let hint = nearest_hint(first, absent);
        let hint = if hint.is_empty() { nearest_hint(first, expected.keys().map(String::as_str)) } else { hint };
        format!("belongs to no module that adapter_config.json targets{hint}")
    };
    let what = format!("{reason} ({} of {} tensors unmatched)", unmatched.len(), tensors.len());
    Err(Error::tensor(dir, *first, what))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ModelConfig;
    use crate::testing::{folder, tiny_llama, write_tensors};
    use serde_json::{Value, json};

    type Tensors = Vec<(String, Vec<u64>)>;

    fn open(config: Value, edit: impl Fn(&mut Tensors)) -> std::result::Result<Adapter, String> {
        let base = ModelConfig::parse(Path::new("c"), tiny_llama().as_object().unwrap()).unwrap();
        let modules = ModuleTable::new(&base);
        let mut list = Tensors::new();
        for layer in 0..2 {
            for (proj, out) in [("q_proj", 16), ("v_proj", 8)] {
                let module = format!("{PREFIX}model.layers.{layer}.self_attn.{proj}");
                list.push((format!("{module}.lora_A.weight"), vec![4, 16]));
                list.push((format!("{module}.lora_B.weight"), vec![out, 4]));
            }
        }
        edit(&mut list);
        let dir = folder("adapter");
        let mut full = json!({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]});
        for (k, v) in config.as_object().unwrap() {
            full[k] = v.clone();
        }
        std::fs::write(dir.join("adapter_config.json"), full.to_string()).unwrap();
        write_tensors(&dir.join("adapter_model.safetensors"), &list, 0);
        Adapter::open(&dir, Some("style"), &modules).map_err(|e| e.to_string())
    }

    #[test]
    fn a_whole_adapter_is_matched() {
        let adapter = open(json!({}), |_| {}).unwrap();
        assert_eq!((adapter.sites.len(), adapter.name.as_str()), (4, "style"));
        assert_eq!(adapter.sites[3].module, "model.layers.1.self_attn.v_proj");
        assert_eq!((adapter.sites[3].scale, adapter.sites[3].b.shape.clone()), (2.0, vec![8, 4]));
        assert_eq!(adapter.parameters(), 2 * (4 * 16 + 16 * 4 + 4 * 16 + 8 * 4));
    }

    #[test]
    fn adapters_of_the_bare_model_fit_too() {
        let adapter =
            open(json!({}), |l| l.iter_mut().for_each(|t| t.0 = t.0.replace("model.model.", "model."))).unwrap();
        assert_eq!(adapter.sites[0].module, "model.layers.0.self_attn.q_proj");
    }

    #[test]
    fn faults_name_the_tensor_and_the_nearest_candidate() {
        type Edit = fn(&mut Tensors);
        let rename: Edit = |l| l[0].0 = l[0].0.replace("q_proj", "q_porj");
        let cases: [(Value, Edit, &str); 8] = [
            (json!({}), rename, "nearest name is `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`"),
            (json!({}), |l| drop(l.remove(0)), "is missing (1 of 8"),
            (json!({}), |l| l[0].1 = vec![5, 16], "rank 4"),
            (json!({"r": 3}), |_| {}, "make it [3, 16]"),
            (json!({"target_modules": ["q_proj"]}), |_| {}, "targets"),
            (json!({"target_modules": ["embed_tokens"]}), |_| {}, "belongs to no module"),
            (json!({}), |l| l.iter_mut().for_each(|t| t.0 = t.0.replace("base_model.", "")), "does not start with"),
            (
                json!({}),
                |l| l.push((format!("{PREFIX}model.layers.0.self_attn.q_proj.lora_magnitude_vector"), vec![16])),
                "DoRA",
            ),
        ];
        for (config, edit, expected) in cases {
            let message = open(config, edit).unwrap_err();
            assert!(message.contains(expected), "{expected}: {message}");
        }
    }

    #[test]
    fn embeddings_and_copies_of_base_weights() {
        let dir = folder("adapter-base");
        std::fs::write(dir.join("config.json"), tiny_llama().to_string()).unwrap();
        let modules = ModuleTable::new(&ModelConfig::read(&dir).unwrap());
        let list: Vec<_> = modules.iter().flat_map(|m| m.parameters()).map(|p| (p.path, p.shape)).collect();
        write_tensors(&dir.join("model.safetensors"), &list, 0);
        let base = Checkpoint::open(&dir).unwrap();
        let config = json!({"peft_type": "LORA", "r": 4, "target_modules": ["embed_tokens"]});
        let name = format!("{PREFIX}model.embed_tokens");
        let write = |first: u32| {
            let list = [
                // The first tensor of the base is the embedding: with the same index it has the same values.
                (format!("{name}.base_layer.weight"), vec![40, 16]),
                (format!("{name}.lora_embedding_A"), vec![4, 40]),
                (format!("{name}.lora_embedding_B"), vec![16, 4]),
            ];
            std::fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
            write_tensors(&dir.join("adapter_model.safetensors"), &list, first);
            Adapter::open(&dir, None, &base.modules).unwrap()
        };
        let adapter = write(0);
        assert!(adapter.sites[0].embedding && adapter.copies[0].0 == "model.embed_tokens.weight");
        adapter.check_copies(&base).unwrap();
        assert!(write(5).check_copies(&base).unwrap_err().to_string().contains("another base"));
    }

    #[test]
    fn rank_patterns_decide_shapes() {
        let adapter = open(json!({"rank_pattern": {"v_proj": 6}}), |l| {
            for (name, shape) in l.iter_mut().filter(|t| t.0.contains("v_proj")) {
                let at = usize::from(name.contains("lora_B"));
                shape[at] = 6;
            }
        });
        assert_eq!(adapter.unwrap().sites[1].rank, 6);
    }
}
