//! A model folder: configuration, modules, and every parameter bound to exactly one tensor.
//!
//! The folder may name its tensors as the bare model or as a class with a head does ("model." or "bert." in front or
//! not), and LayerNorm parameters in the old way (gamma, beta). Tensors that are known not to matter (rotary buffers,
//! position ids, heads that an encoder does not run) are set aside; any other tensor that belongs to nothing is an
//! error.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::modules::ModuleTable;
use crate::nearest::nearest_hint;
use crate::tensors::{TensorRef, TensorTable};

/// An opened model folder whose tensors all have a place.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// The folder.
    pub dir: PathBuf,
    /// Its configuration.
    pub config: ModelConfig,
    /// The modules of the model.
    pub modules: ModuleTable,
    params: BTreeMap<String, TensorRef>,
    ignored: Vec<String>,
}

impl Checkpoint {
    /// Opens a folder: reads `config.json` and the headers of the checkpoint, and binds every parameter.
    ///
    /// # Errors
    /// See [`ModelConfig::read`] and [`TensorTable::open_folder`]; a parameter without tensor, a tensor without
    /// parameter (both with the nearest candidate), a shape or dtype that does not fit the configuration.
    pub fn open(dir: &Path) -> Result<Checkpoint> {
        let config = ModelConfig::read(dir)?;
        let tensors = TensorTable::open_folder(dir)?;
        Checkpoint::bind(dir, config, &tensors)
    }

    /// Binds the tensors of `tensors` to the parameters that `config` calls for.
    pub fn bind(dir: &Path, config: ModelConfig, tensors: &TensorTable) -> Result<Checkpoint> {
        let modules = ModuleTable::new(&config);
        let wrapper = format!("{}.", modules.wrapper());
        let wrapped = tensors.names().any(|name| name.starts_with(&wrapper));
        let mut binder = Binder { dir, tensors, modules: &modules, wrapper, wrapped, used: BTreeSet::new() };
        let mut params = BTreeMap::new();
        let tied = matches!(&config, ModelConfig::Llama(c) if c.tied_head);
        for module in modules.iter() {
            let optional = (module.output_head && tied) || !crate::modules::is_computed(&module.path);
            for parameter in module.parameters() {
                match binder.find(&parameter.path) {
                    Some(tensor) => {
                        check(dir, tensor, &parameter.shape)?;
                        params.insert(parameter.path, tensor.clone());
                    }
                    None if optional => {}
                    None if tied && parameter.path == "model.embed_tokens.weight" => {}
                    None => return Err(binder.missing(&parameter.path, &parameter.shape)),
                }
            }
        }
        let ignored = binder.leftovers()?;
        if tied {
            tie(dir, &mut params)?;
        }
        Ok(Checkpoint { dir: dir.to_owned(), config, modules, params, ignored })
    }

    /// The same model with its first layers alone; the whole one where it has no more.
    pub fn with_layers(&self, layers: u64) -> Checkpoint {
        let mut config = self.config.clone();
        match &mut config {
            ModelConfig::Llama(c) => c.layers = c.layers.min(layers),
            ModelConfig::Bert(c) => c.layers = c.layers.min(layers),
        }
        let modules = ModuleTable::new(&config);
        let paths: BTreeSet<String> = modules.iter().flat_map(|m| m.parameters()).map(|p| p.path).collect();
        let params = self.params.iter().filter(|(path, _)| paths.contains(*path));
        let params = params.map(|(path, tensor)| (path.clone(), tensor.clone())).collect();
        Checkpoint { dir: self.dir.clone(), config, modules, params, ignored: self.ignored.clone() }
    }

    /// The tensor that holds a parameter, by the parameter's path ("model.layers.0.mlp.up_proj.weight"). A tied output
    /// head answers with the embedding's tensor.
    pub fn param(&self, path: &str) -> Option<&TensorRef> {
        self.params.get(path)
    }

    /// All parameters by path.
    pub fn params(&self) -> impl Iterator<Item = (&str, &TensorRef)> {
        self.params.iter().map(|(path, tensor)| (path.as_str(), tensor))
    }

    /// Names of tensors that were set aside because nothing here needs them.
    pub fn ignored(&self) -> &[String] {
        &self.ignored
    }
}

struct Binder<'a> {
    dir: &'a Path,
    tensors: &'a TensorTable,
    modules: &'a ModuleTable,
    wrapper: String,
    wrapped: bool,
    used: BTreeSet<&'a str>,
}

impl<'a> Binder<'a> {
    /// The name that this checkpoint gives to a parameter.
    fn name_of(&self, path: &str) -> String {
        match (self.modules.is_wrapped(), self.wrapped) {
            (true, false) => path.strip_prefix(&self.wrapper).unwrap_or(path).to_owned(),
            (false, true) => format!("{}{path}", self.wrapper),
            _ => path.to_owned(),
        }
    }

    fn find(&mut self, path: &str) -> Option<&'a TensorRef> {
        let name = self.name_of(path);
        let old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta");
        let tensor = self.tensors.get(&name).or_else(|| self.tensors.get(&old))?;
        self.used.insert(&tensor.name);
        Some(tensor)
    }

    fn missing(&self, path: &str, shape: &[u64]) -> Error {
        let name = self.name_of(path);
        let hint = nearest_hint(&name, self.tensors.names().filter(|n| !self.used.contains(n)));
        Error::tensor(self.dir, name, format!("of shape {shape:?} is missing{hint}"))
    }

    /// Names set aside; an error if one of them is not known to be harmless.
    fn leftovers(&self) -> Result<Vec<String>> {
        let mut ignored = Vec::new();
        for name in self.tensors.names().filter(|n| !self.used.contains(n)) {
            let head = ["cls.", "classifier.", "qa_outputs."].iter().any(|p| name.starts_with(p));
            let buffer = name.ends_with(".rotary_emb.inv_freq") || name.ends_with("embeddings.position_ids");
            if !(buffer || (head && !self.modules.is_wrapped())) {
                let expected: Vec<_> =
                    self.modules.iter().flat_map(|m| m.parameters()).map(|p| self.name_of(&p.path)).collect();
                let hint = nearest_hint(name, expected.iter().map(String::as_str));
                return Err(Error::tensor(self.dir, name, format!("belongs to nothing in the configured model{hint}")));
            }
            ignored.push(name.to_owned());
        }
        Ok(ignored)
    }
}

fn check(dir: &Path, tensor: &TensorRef, shape: &[u64]) -> Result<()> {
    if tensor.shape != shape {
        let what = format!("has shape {:?}; config.json makes it {shape:?}", tensor.shape);
        return Err(Error::tensor(dir, &tensor.name, what));
    }
    if !tensor.dtype.is_weight() {
        return Err(Error::tensor(dir, &tensor.name, format!("is {}; weights must be F32, F16 or BF16", tensor.dtype)));
    }
    Ok(())
}

/// A tied head and its embedding become one tensor. A checkpoint may hold both; then they must be equal.
fn tie(dir: &Path, params: &mut BTreeMap<String, TensorRef>) -> Result<()> {
    const EMBEDDING: &str = "model.embed_tokens.weight";
    const HEAD: &str = "lm_head.weight";
    match (params.get(EMBEDDING).cloned(), params.get(HEAD).cloned()) {
        (Some(embedding), Some(head)) if embedding.read_f32()? != head.read_f32()? => Err(Error::tensor(
            dir,
            head.name,
            "differs from the embedding although `tie_word_embeddings` is true; set it to false to use both",
        )),
        (Some(shared), _) | (None, Some(shared)) => {
            params.insert(EMBEDDING.into(), shared.clone());
            params.insert(HEAD.into(), shared);
            Ok(())
        }
        (None, None) => Err(Error::tensor(dir, EMBEDDING, "is missing")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{folder, tiny_bert, tiny_llama, write_tensors};

    fn open(config: &serde_json::Value, edit: impl Fn(&mut Vec<(String, Vec<u64>)>)) -> Result<Checkpoint> {
        let dir = folder("checkpoint");
        std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
        let model = ModelConfig::read(&dir)?;
        let mut list: Vec<_> =
            ModuleTable::new(&model).iter().flat_map(|m| m.parameters()).map(|p| (p.path, p.shape)).collect();
        edit(&mut list);
        write_tensors(&dir.join("model.safetensors"), &list, 0);
        Checkpoint::open(&dir)
    }

    #[test]
    fn a_whole_checkpoint_is_bound() {
        let checkpoint = open(&tiny_llama(), |_| {}).unwrap();
        assert_eq!(checkpoint.params().count(), 2 * 9 + 3);
        assert_eq!(checkpoint.param("lm_head.weight").unwrap().shape, [40, 16]);
    }

    #[test]
    fn names_of_the_other_class_and_old_norm_names_are_understood() {
        let bert = open(&tiny_bert(), |list| {
            for (name, _) in list.iter_mut() {
                *name = format!("bert.{name}").replace("LayerNorm.weight", "LayerNorm.gamma");
            }
            list.push(("cls.predictions.bias".into(), vec![40]));
            list.push(("bert.embeddings.position_ids".into(), vec![1, 32]));
        })
        .unwrap();
        assert_eq!(bert.param("embeddings.LayerNorm.weight").unwrap().name, "bert.embeddings.LayerNorm.gamma");
        assert_eq!(bert.ignored(), ["bert.embeddings.position_ids", "cls.predictions.bias"]);
        let without_pooler = open(&tiny_bert(), |list| list.retain(|(n, _)| !n.starts_with("pooler")));
        assert!(without_pooler.unwrap().param("pooler.dense.weight").is_none());
    }

    #[test]
    fn tied_heads_need_one_tensor_or_two_equal_ones() {
        let mut config = tiny_llama();
        config["tie_word_embeddings"] = true.into();
        let tied = open(&config, |list| list.retain(|(n, _)| n != "lm_head.weight")).unwrap();
        assert_eq!(tied.param("lm_head.weight"), tied.param("model.embed_tokens.weight"));
        assert!(open(&config, |_| {}).unwrap_err().to_string().contains("tie_word_embeddings"));
    }

    #[test]
    fn faults_name_the_tensor_and_the_nearest_candidate() {
        type Edit = fn(&mut Vec<(String, Vec<u64>)>);
        let cases: [(Edit, &str); 4] = [
            (|l| l[3].0 = l[3].0.replace("proj", "porj"), "nearest name is"),
            (|l| l.push(("model.layers.2.mlp.up_proj.weight".into(), vec![32, 16])), "belongs to nothing"),
            (|l| l[0].1 = vec![41, 16], "config.json makes it [40, 16]"),
            (|l| l.truncate(4), "is missing"),
        ];
        for (edit, expected) in cases {
            let message = open(&tiny_llama(), edit).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }
}
