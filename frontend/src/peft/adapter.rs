//! An adapter: read from a folder, where every tensor has been matched exactly once, with the shape that base and rank call
//! for; or new, with recipes in place of values.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::config::{MethodConfig, Targets};
use super::replaced::replaced;
use super::targets::{Target, match_modules, matched};
use crate::adapter::{ABSOLUTE, Buffer, DELTA, INDICES, Init, Replaced, Site, SlotValue};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::modules::{ModuleKind, ModuleTable};
use crate::nearest::nearest_hint;
use crate::tensors::{Dtype, TensorRef, TensorTable};

/// What PEFT puts before the path of a module.
pub(crate) const PREFIX: &str = "base_model.model.";

/// An adapter, ready to be woven in.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// Name it goes by: given by the caller, the folder's, or the method's for a new one.
    pub name: String,
    /// The folder; empty for a new one.
    pub dir: PathBuf,
    /// Its configuration.
    pub config: MethodConfig,
    /// Where it attaches, in module order.
    pub sites: Vec<Site>,
    /// Parameters of the base that it replaces, in module order.
    pub replaced: Vec<Replaced>,
    /// Copies of base weights that the file carries (PEFT adds the embedding and the head when they are targeted), by
    /// the parameter's path. They must equal the base's, see [`Adapter::check_copies`].
    pub copies: Vec<(String, TensorRef)>,
    /// Tensors matched.
    pub tensors: usize,
    /// Remarks for the user.
    pub notes: Vec<String>,
}

impl Adapter {
    /// Opens an adapter folder and matches it against the modules of a base model.
    ///
    /// # Errors
    /// A missing or malformed file; a field of the configuration that is refused (see [`MethodConfig::read`]); a tensor
    /// that is expected but absent, present but not expected, or of another shape: the message names the tensor and
    /// the nearest candidate.
    pub fn open(dir: &Path, name: Option<&str>, modules: &ModuleTable) -> Result<Adapter> {
        let tensors = open_tensors(dir)?;
        let config = MethodConfig::read(dir)?;
        let folder_name = || dir.file_name().map_or("adapter".into(), |n| n.to_string_lossy().into_owned());
        let name = name.map_or_else(folder_name, str::to_owned);
        let (other, origins) = modules.renamed();
        let bound = if count_known(&tensors, &other) > count_known(&tensors, modules) {
            let origin: BTreeMap<&str, &str> =
                other.iter().map(|m| m.path.as_str()).zip(origins.iter().map(String::as_str)).collect();
            let mut bound = bind(dir, &config, &tensors, &other)?;
            for path in bound.sites.iter_mut().map(|s| &mut s.module).chain(bound.copies.iter_mut().map(|c| &mut c.0)) {
                *path = origin[path.as_str()].to_owned();
            }
            for path in bound.replaced.iter_mut().map(|r| &mut r.path) {
                let (module, end) = path.rsplit_once('.').unwrap_or((path, ""));
                *path = format!("{}.{end}", origin[module]);
            }
            bound
        } else {
            bind(dir, &config, &tensors, modules)?
        };
        let copies = bound.copies.into_iter().map(|(module, tensor)| (format!("{module}.weight"), tensor)).collect();
        let notes = config.notes.clone();
        let (sites, replaced) = (bound.sites, bound.replaced);
        let config = config.resolved(modules);
        Ok(Adapter { name, dir: dir.to_owned(), config, sites, replaced, copies, tensors: tensors.len(), notes })
    }

    /// A new adapter: its values are recipes.
    ///
    /// # Errors
    /// A configuration that cannot be trained ([`MethodConfig::check_training`]) or that matches nothing.
    pub fn fresh(config: &MethodConfig, modules: &ModuleTable) -> Result<Adapter> {
        config.check_training()?;
        let mut config = config.clone();
        if config.method.whole() {
            if config.targets == Targets::Default {
                config.targets = Targets::AllLinear;
            }
            let trained = matched(&config, modules)?.into_iter().filter(|m| !m.parameters().is_empty());
            config.modules_to_save = trained.map(|m| m.path.clone()).chain(config.modules_to_save).collect();
            config.targets = Targets::Nothing;
        }
        let targets = match_modules(&config, modules)?;
        let replaced = replaced(&config, modules, &targets)?;
        if targets.is_empty() && replaced.is_empty() {
            return Err(Error::Pattern {
                pattern: "target_modules".into(),
                what: "names no module with parameters, so there is nothing to train".into(),
            });
        }
        let mut sites: Vec<Site> = targets.iter().map(site).collect();
        for s in &mut sites {
            s.values = config.method.buffers(s).into_iter().map(|b| (b.part, SlotValue::New(b.init))).collect();
        }
        let (name, notes) = (config.method.name().to_owned(), config.notes.clone());
        let config = config.resolved(modules);
        Ok(Adapter { name, dir: PathBuf::new(), config, sites, replaced, copies: vec![], tensors: 0, notes })
    }

    /// Compares the copies of base weights that the file carries with the base itself, value by value.
    ///
    /// # Errors
    /// A copy that differs: the adapter was made for another base, or its embedding was trained or resized without being
    /// named in `modules_to_save`.
    pub fn check_copies(&self, base: &Checkpoint) -> Result<()> {
        for (path, copy) in &self.copies {
            let same = match base.param(path) {
                Some(tensor) => tensor.shape == copy.shape && tensor.read_f32()? == copy.read_f32()?,
                None => false,
            };
            if !same {
                let what = format!(
                    "differs from `{path}` of {}: the adapter belongs to another base, or carries a trained or resized table that \
                     `modules_to_save` does not name",
                    base.dir.display()
                );
                return Err(Error::tensor(&self.dir, &copy.name, what));
            }
        }
        Ok(())
    }

    /// Trained values of all sites and replaced parameters.
    pub fn parameters(&self) -> u64 {
        let replaced: u64 = self.replaced.iter().map(|r| r.shape.iter().product::<u64>()).sum();
        self.sites.iter().map(|s| self.site_parameters(s)).sum::<u64>() + replaced
    }

    /// Trained values of one site.
    pub fn site_parameters(&self, site: &Site) -> u64 {
        let trained = |b: &Buffer| b.role == pleach_ir::Role::Train;
        let buffers = self.config.method.buffers(site);
        buffers.iter().filter(|b| trained(b)).map(|b| b.shape.iter().product::<u64>()).sum()
    }

    /// The site of a module.
    pub fn site(&self, module: &str) -> Option<&Site> {
        self.sites.iter().find(|s| s.module == module)
    }
}

/// A site without values.
fn site(t: &Target) -> Site {
    Site {
        module: t.module.clone(),
        embedding: t.embedding,
        rank: t.rank,
        alpha: t.alpha,
        scale: t.scale,
        input: t.input,
        output: t.output,
        values: BTreeMap::new(),
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
    let known = |name: &str| {
        let Some(rest) = name.strip_prefix(PREFIX) else { return false };
        rest.match_indices('.').any(|(at, _)| {
            let path = &rest[..at];
            paths.contains(path) && !modules.get(path).is_some_and(|m| m.kind == ModuleKind::Other)
        })
    };
    tensors.names().filter(|name| known(name)).count()
}

/// A matched file, by the names of the table it was matched against.
struct Bound {
    sites: Vec<Site>,
    replaced: Vec<Replaced>,
    /// Copies of base weights by module.
    copies: Vec<(String, TensorRef)>,
}

fn bind(dir: &Path, config: &MethodConfig, tensors: &TensorTable, modules: &ModuleTable) -> Result<Bound> {
    let targets = match_modules(config, modules)?;
    if config.ensure_weight_tying && targets.iter().any(|t| t.embedding || t.module.ends_with("lm_head")) {
        let path = dir.join("adapter_config.json");
        let what = "is true for a targeted embedding or head, which is not supported";
        return Err(Error::key(&path, "ensure_weight_tying", what));
    }
    let mut sites: Vec<Site> = targets.iter().map(site).collect();
    let mut replaced = replaced(config, modules, &targets)?;
    let name = |module: &str, end: &str| format!("{PREFIX}{module}.{end}");
    for r in &mut replaced {
        // Older files keep the bias of a targeted layer under its own name.
        if tensors.get(&format!("{PREFIX}{}", r.file)).is_none()
            && tensors.get(&format!("{PREFIX}{}", r.path)).is_some()
        {
            r.file.clone_from(&r.path);
        }
    }
    let mut expected: BTreeSet<String> = replaced.iter().map(|r| format!("{PREFIX}{}", r.file)).collect();
    for s in &sites {
        for b in config.method.buffers(s) {
            let Some(end) = b.file else { continue };
            let absolute = end == DELTA && tensors.get(&name(&s.module, ABSOLUTE)).is_some();
            expected.insert(name(&s.module, if absolute { ABSOLUTE } else { end }));
        }
    }
    let copies = find_copies(tensors, modules, &targets, &expected);
    refuse_unexpected(dir, tensors, &expected, &copies)?;
    let file = File { dir, tensors, expected: &expected };
    for s in &mut sites {
        for b in config.method.buffers(s) {
            let value = match b.file {
                None => match b.init {
                    Init::Zeros {} => SlotValue::Filled { shape: b.shape, value: 0.0 },
                    Init::Constant { value } => SlotValue::Filled { shape: b.shape, value },
                    init => SlotValue::New(init),
                },
                Some(end) => file.value(s, &b, &name(&s.module, end), &name(&s.module, ABSOLUTE))?,
            };
            s.values.insert(b.part, value);
        }
    }
    for r in &mut replaced {
        let why = "config.json of the base makes it";
        r.value = SlotValue::Tensor(file.find(&format!("{PREFIX}{}", r.file), &r.shape, why)?);
    }
    Ok(Bound { sites, replaced, copies })
}

/// The file of an adapter and the names that it should hold.
struct File<'a> {
    dir: &'a Path,
    tensors: &'a TensorTable,
    expected: &'a BTreeSet<String>,
}

impl File<'_> {
    /// The value of a buffer of a site, where the file has it under `name`, or under `absolute` in the authors' form.
    fn value(&self, site: &Site, b: &Buffer, name: &str, absolute: &str) -> Result<SlotValue> {
        let why = format!("the base model and rank {} of adapter_config.json make it", site.rank);
        if b.part == INDICES {
            let tensor = self.find(name, &b.shape, &why)?;
            return Ok(SlotValue::Indices { tensor, below: site.input });
        }
        if b.part == DELTA && self.expected.contains(absolute) {
            let indices = site.values.get(INDICES).and_then(SlotValue::tensor);
            let indices = indices.ok_or_else(|| Error::tensor(self.dir, absolute, "has no indices"))?.clone();
            let tensor = self.find(absolute, &b.shape, &why)?;
            let weight = format!("{}.weight", site.module);
            return Ok(SlotValue::Columns { tensor, indices, weight, scale: site.scale });
        }
        Ok(SlotValue::Tensor(self.find(name, &b.shape, &why)?))
    }

    /// A tensor by name, of this shape.
    fn find(&self, name: &str, shape: &[u64], why: &str) -> Result<TensorRef> {
        let Some(tensor) = self.tensors.get(name) else {
            let missing = self.expected.iter().filter(|n| self.tensors.get(n).is_none()).count();
            let hint = nearest_hint(name, self.tensors.names().filter(|n| !self.expected.contains(*n)));
            let what = format!(
                "of shape {shape:?} is missing ({missing} of {} expected tensors are){hint}",
                self.expected.len()
            );
            return Err(Error::tensor(self.dir, name, what));
        };
        if tensor.shape != shape {
            let what = format!("has shape {:?}; {why} {shape:?}", tensor.shape);
            return Err(Error::tensor(self.dir, name, what));
        }
        let indices = name.ends_with(INDICES);
        if indices && !matches!(tensor.dtype, Dtype::I64 | Dtype::I32) {
            return Err(Error::tensor(self.dir, name, format!("is {}; it must be I64 or I32", tensor.dtype)));
        }
        if !indices && !tensor.dtype.is_weight() {
            return Err(Error::tensor(self.dir, name, format!("is {}; it must be F32, F16 or BF16", tensor.dtype)));
        }
        Ok(tensor.clone())
    }
}

/// Tensors of the file that are copies of base weights: of targeted layers under `base_layer`, and of the embedding and
/// the head under their own names.
fn find_copies(
    tensors: &TensorTable,
    modules: &ModuleTable,
    targets: &[Target],
    expected: &BTreeSet<String>,
) -> Vec<(String, TensorRef)> {
    let targeted = targets.iter().map(|t| (t.module.clone(), format!("{PREFIX}{}.base_layer.weight", t.module)));
    let tables = modules
        .iter()
        .filter(|m| m.output_head || matches!(m.kind, ModuleKind::Embedding { .. }))
        .map(|m| (m.path.clone(), format!("{PREFIX}{}.weight", m.path)));
    let found = |(module, name): (String, String)| Some((module, tensors.get(&name)?.clone()));
    targeted.chain(tables).filter(|(_, name)| !expected.contains(name)).filter_map(found).collect()
}

/// Every tensor of the file must be expected.
fn refuse_unexpected(
    dir: &Path,
    tensors: &TensorTable,
    expected: &BTreeSet<String>,
    copies: &[(String, TensorRef)],
) -> Result<()> {
    let known = |name: &&str| expected.contains(*name) || copies.iter().any(|c| c.1.name == **name);
    let unmatched: Vec<&str> = tensors.names().filter(|n| !known(n)).collect();
    let Some(first) = unmatched.first() else { return Ok(()) };
    let reason = if first.contains("lora_magnitude_vector") {
        "is a DoRA magnitude, but `use_dora` of adapter_config.json is not true".to_owned()
    } else if !first.starts_with(PREFIX) {
        format!("does not start with `{PREFIX}`; was the file saved by PEFT's save_pretrained?")
    } else {
        let absent = expected.iter().map(String::as_str).filter(|n| tensors.get(n).is_none());
        let hint = nearest_hint(first, absent);
        let hint = if hint.is_empty() { nearest_hint(first, expected.iter().map(String::as_str)) } else { hint };
        format!("belongs to no module that adapter_config.json targets{hint}")
    };
    let what = format!("{reason} ({} of {} tensors unmatched)", unmatched.len(), tensors.len());
    Err(Error::tensor(dir, *first, what))
}

#[cfg(test)]
mod tests;
