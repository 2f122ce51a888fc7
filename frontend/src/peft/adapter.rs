//! An adapter: read from a folder, where every tensor has been matched exactly once, with the shape that base and rank call
//! for; or new, with recipes in place of values.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pleach_ir::Role;

use super::config::{MethodConfig, Targets};
use super::replaced::replaced;
use super::targets::{Target, match_modules, matched};
use crate::adapter::{
    ABSOLUTE, Buffer, DELTA, INDICES, Init, Kind, Lazy, Ordered, Replaced, Shared, Site, SlotData, SlotTensor,
    SlotValue, shared,
};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::modules::{Module, ModuleKind, ModuleTable};
use crate::nearest::nearest_hint;
use crate::tensors::{Dtype, TensorRef, TensorTable};

/// What PEFT puts before the path of a module.
pub(crate) const PREFIX: &str = "base_model.model.";
/// The folder of first values inside an adapter's folder; also that of the runtime.
pub(crate) const INITIAL: &str = "initial_adapter";
/// What PEFT puts before the name of a tensor that all modules share.
pub(crate) const SHARED: &str = "base_model.";

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
    /// Couplings whose layers hold their units in an order of its own while it is trained.
    pub orders: Vec<Ordered>,
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
            let members = bound.sites.iter_mut().filter_map(|s| s.member.as_mut()).map(|m| &mut m.consumer);
            for path in members.chain(bound.orders.iter_mut().flat_map(|o| o.paths())) {
                *path = origin[path.as_str()].to_owned();
            }
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
        let mut notes = config.notes.clone();
        notes.extend(bound.note);
        let (sites, orders, replaced) = (bound.sites, bound.orders, bound.replaced);
        let config = config.resolved(modules);
        Ok(Adapter {
            name,
            dir: dir.to_owned(),
            config,
            sites,
            orders,
            replaced,
            copies,
            tensors: tensors.len(),
            notes,
        })
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
        refuse_tying(Path::new("the method's options"), &config, modules, &targets, &replaced)?;
        if targets.is_empty() && replaced.is_empty() {
            return Err(Error::Pattern {
                pattern: "target_modules".into(),
                what: "names no module with parameters, so there is nothing to train".into(),
            });
        }
        let mut sites = sites(&targets);
        let orders = ordered(&config, modules, &mut sites);
        for s in &mut sites {
            let buffers = config.method.buffers(s).into_iter().chain(config.method.shared(s)).chain(s.order.clone());
            s.values = buffers.map(|b| (b.part, SlotValue::New(b.init))).collect();
        }
        let (name, notes) = (config.method.name().to_owned(), config.notes.clone());
        let config = config.resolved(modules);
        Ok(Adapter { name, dir: PathBuf::new(), config, sites, orders, replaced, copies: vec![], tensors: 0, notes })
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
        let shared: Vec<Buffer> = self.shared().into_iter().map(|s| s.buffer).collect();
        self.sites.iter().map(|s| self.site_parameters(s)).sum::<u64>() + trained(&shared) + replaced
    }

    /// Trained values of one site.
    pub fn site_parameters(&self, site: &Site) -> u64 {
        trained(&self.config.method.buffers(site))
    }

    /// The buffers that sites have in common, each once.
    pub fn shared(&self) -> Vec<Shared> {
        shared(&*self.config.method, &self.sites)
    }

    /// The key in the slot of a buffer of a site.
    pub fn key(&self, site: &Site, part: &str) -> String {
        let method = &self.config.method;
        let mut shared = shared(&**method, std::slice::from_ref(site)).into_iter();
        let order = site.order.as_ref().filter(|b| b.part == part).and(site.member.as_ref());
        let module = order.map_or(&site.module, |m| &m.consumer);
        shared.find(|s| s.buffer.part == part).map_or_else(|| format!("{module}.{part}"), |s| s.key)
    }

    /// The site of a module.
    pub fn site(&self, module: &str) -> Option<&Site> {
        self.sites.iter().find(|s| s.module == module)
    }
}

fn trained(buffers: &[Buffer]) -> u64 {
    // What is not saved is only there to measure a gradient.
    let trained = buffers.iter().filter(|b| b.role == pleach_ir::Role::Train && b.file.is_some());
    trained.map(|b| b.shape.iter().product::<u64>()).sum()
}

/// Sites without values.
fn sites(targets: &[Target]) -> Vec<Site> {
    let largest = |width: fn(&Target) -> u64| targets.iter().map(width).max().unwrap_or(0);
    let widest = (largest(|t| t.input), largest(|t| t.output));
    targets.iter().map(|t| Site { widest, ..site(t) }).collect()
}

/// The couplings that the method orders, their values still recipes; their sites are told.
fn ordered(config: &MethodConfig, modules: &ModuleTable, sites: &mut [Site]) -> Vec<Ordered> {
    let mut list = vec![];
    for coupling in modules.couplings() {
        let part = |s: &&mut Site| s.member.as_ref().is_some_and(|m| m.consumer == coupling.consumer);
        let mut members: Vec<&mut Site> = sites.iter_mut().filter(part).collect();
        let Some(buffer) = config.method.order(&coupling, !members.is_empty()) else { continue };
        members.iter_mut().for_each(|s| s.order = Some(buffer.clone()));
        let value = SlotValue::New(buffer.init.clone());
        list.push(Ordered { coupling, buffer, value });
    }
    list
}

fn site(t: &Target) -> Site {
    Site {
        module: t.module.clone(),
        embedding: t.embedding,
        rank: t.rank,
        alpha: t.alpha,
        scale: t.scale,
        input: t.input,
        output: t.output,
        widest: (t.input, t.output),
        member: t.member.clone(),
        order: None,
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
    orders: Vec<Ordered>,
    replaced: Vec<Replaced>,
    /// Copies of base weights by module.
    copies: Vec<(String, TensorRef)>,
    /// A remark on values that are made again.
    note: Option<String>,
}

fn bind(dir: &Path, config: &MethodConfig, tensors: &TensorTable, modules: &ModuleTable) -> Result<Bound> {
    let targets = match_modules(config, modules)?;
    let mut sites = sites(&targets);
    let mut orders = ordered(config, modules, &mut sites);
    let mut replaced = replaced(config, modules, &targets)?;
    refuse_tying(&dir.join("adapter_config.json"), config, modules, &targets, &replaced)?;
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
    let common = shared(&*config.method, &sites);
    expected.extend(common.iter().filter_map(|b| b.file.clone()));
    let of_order = |o: &Ordered| Some(name(&o.coupling.consumer, o.buffer.file?));
    expected.extend(orders.iter().filter_map(of_order));
    let copies = find_copies(tensors, modules, &targets, &expected);
    let mut repeated = find_repeated(tensors, &sites, &common)?;
    repeated.extend(find_wrapped(dir, tensors, &replaced)?);
    refuse_unexpected(dir, tensors, &expected, &copies, &repeated)?;
    let file = File { dir, tensors, expected: &expected };
    let mut values = BTreeMap::new();
    for b in common {
        let value = match &b.file {
            None => made(&b.key, &b.buffer),
            Some(name) => file.value(&sites[b.first], &b.buffer, name, "")?,
        };
        values.insert(b.key, value);
    }
    for o in &mut orders {
        o.value = match of_order(o) {
            None => made(&o.key(), &o.buffer),
            Some(file_name) => {
                let why = "the base model and adapter_config.json make it";
                let tensor = file.find_indices(&file_name, &o.buffer.shape, why)?;
                SlotValue::Indices { tensor, below: vec![o.coupling.units] }
            }
        };
    }
    let mut first = FirstValues::of(dir, &config.method)?;
    for s in &mut sites {
        for b in shared(&*config.method, std::slice::from_ref(s)) {
            s.values.insert(b.buffer.part, values[&b.key].clone());
        }
        let order = s.member.as_ref().and_then(|m| orders.iter().find(|o| o.coupling.consumer == m.consumer));
        s.values.extend(order.map(|o| (o.buffer.part, o.value.clone())));
        let mut lazy = None;
        for b in config.method.buffers(s) {
            let value = match b.file {
                None if matches!(b.init, Init::Prepared { .. }) => first.value(s, &b, &mut lazy)?,
                None => made(&format!("{}.{}", s.module, b.part), &b),
                Some(end) => file.value(s, &b, &name(&s.module, end), &name(&s.module, ABSOLUTE))?,
            };
            s.values.insert(b.part, value);
        }
    }
    for r in &mut replaced {
        let why = "config.json of the base makes it";
        r.value = SlotValue::Tensor(file.find(&format!("{PREFIX}{}", r.file), &r.shape, why)?);
    }
    Ok(Bound { sites, orders, replaced, copies, note: first.note })
}

/// Refuses what PEFT makes one of two: an adapter, or a replacement, of a weight that the embedding and the output head share.
fn refuse_tying(
    path: &Path,
    config: &MethodConfig,
    modules: &ModuleTable,
    targets: &[Target],
    replaced: &[Replaced],
) -> Result<()> {
    let changed = |m: &&Module| {
        let weight = format!("{}.weight", m.path);
        targets.iter().any(|t| t.module == m.path) || replaced.iter().any(|r| r.path == weight)
    };
    let shared = modules.iter().filter(|m| config.ensure_weight_tying && modules.is_tied(m)).find(changed);
    shared.map_or(Ok(()), |m| {
        let what = format!(
            "is true and `{}` shares its weight: one change of embedding and output head is not supported; set it to false to change \
             the one that is named alone",
            m.path
        );
        Err(Error::key(path, "ensure_weight_tying", what))
    })
}

/// The value of a buffer that no file holds: from its recipe where that gives the same at any time.
fn made(key: &str, b: &Buffer) -> SlotValue {
    match b.init.seeded(key, b.shape.iter().product::<u64>() as usize) {
        Some(values) => SlotValue::Made(Arc::new(SlotTensor { shape: b.shape.clone(), data: SlotData::F32(values) })),
        None => match b.init {
            Init::Zeros {} => SlotValue::Filled { shape: b.shape.clone(), value: 0.0 },
            Init::Constant { value } => SlotValue::Filled { shape: b.shape.clone(), value },
            _ => SlotValue::New(b.init.clone()),
        },
    }
}

/// Where prepared values come from that the adapter's own file does not hold.
struct FirstValues<'a> {
    dir: PathBuf,
    method: &'a Kind,
    tensors: Option<TensorTable>,
    note: Option<String>,
}

impl FirstValues<'_> {
    fn of<'a>(dir: &Path, method: &'a Kind) -> Result<FirstValues<'a>> {
        let dir = dir.join(INITIAL);
        let path = dir.join("adapter_model.safetensors");
        let tensors = if path.is_file() { Some(TensorTable::open_file(&path)?) } else { None };
        Ok(FirstValues { dir, method, tensors, note: None })
    }

    /// The kept value, or the one that the base's weights give again.
    fn value(&mut self, s: &Site, b: &Buffer, lazy: &mut Option<Arc<Lazy>>) -> Result<SlotValue> {
        if let (Init::Prepared { kept: Some(end) }, Some(tensors)) = (&b.init, &self.tensors) {
            let name = format!("{PREFIX}{}.{end}", s.module);
            let found = tensors.get(&name).filter(|t| t.shape == b.shape && t.dtype.is_weight());
            let missing = || Error::tensor(&self.dir, &name, format!("of shape {:?} is missing", b.shape));
            return Ok(SlotValue::Tensor(found.ok_or_else(missing)?.clone()));
        }
        if let Err(why) = self.method.repeatable() {
            return Err(Error::format(&self.dir, why));
        }
        self.note = self.method.note().map(str::to_owned);
        let lazy = lazy.get_or_insert_with(|| Lazy::new(self.method, s));
        Ok(SlotValue::Prepared(lazy.clone(), b.part))
    }
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
        if b.role == Role::Index {
            let tensor = self.find_indices(name, &b.shape, &why)?;
            return Ok(SlotValue::Indices { tensor, below: b.init.below().unwrap_or(vec![site.input]) });
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

    /// Indices by name, of this shape.
    fn find_indices(&self, name: &str, shape: &[u64], why: &str) -> Result<TensorRef> {
        let tensor = self.lookup(name, shape, why)?;
        match tensor.dtype {
            Dtype::I64 | Dtype::I32 => Ok(tensor),
            other => Err(Error::tensor(self.dir, name, format!("is {other}; it must be I64 or I32"))),
        }
    }

    /// A float tensor by name, of this shape.
    fn find(&self, name: &str, shape: &[u64], why: &str) -> Result<TensorRef> {
        let tensor = self.lookup(name, shape, why)?;
        match tensor.dtype.is_weight() {
            true => Ok(tensor),
            false => Err(Error::tensor(self.dir, name, format!("is {}; it must be F32, F16 or BF16", tensor.dtype))),
        }
    }

    fn lookup(&self, name: &str, shape: &[u64], why: &str) -> Result<TensorRef> {
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

/// What the file holds again at every site although all have it in common.
///
/// # Errors
/// A repetition with other values.
fn find_repeated(tensors: &TensorTable, sites: &[Site], shared: &[Shared]) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for (name, end) in shared.iter().filter_map(|b| Some((b.file.as_deref()?, b.buffer.file?))) {
        let Some(one) = tensors.get(name) else { continue };
        for name in sites.iter().map(|s| format!("{PREFIX}{}.{end}", s.module)) {
            let Some(again) = tensors.get(&name) else { continue };
            if again.shape != one.shape || again.read_bytes()? != one.read_bytes()? {
                return Err(Error::tensor(
                    &one.file,
                    name,
                    format!("differs from `{}`, which it should repeat", one.name),
                ));
            }
            found.insert(name);
        }
    }
    Ok(found)
}

/// What the file holds again, or still, of replaced modules under the names of PEFT's wrapper: it saves all biases beside them.
///
/// # Errors
/// A repetition with other values.
fn find_wrapped(dir: &Path, tensors: &TensorTable, replaced: &[Replaced]) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for (module, end) in replaced.iter().filter(|r| r.file == r.path).filter_map(|r| r.path.rsplit_once('.')) {
        let [one, again, before] =
            ["", "modules_to_save.", "original_module."].map(|part| format!("{PREFIX}{module}.{part}{end}"));
        if let (Some(a), Some(b)) = (tensors.get(&one), tensors.get(&again))
            && (a.shape != b.shape || a.read_bytes()? != b.read_bytes()?)
        {
            return Err(Error::tensor(dir, again, format!("differs from `{one}`, which it should repeat")));
        }
        found.extend([again, before].into_iter().filter(|name| tensors.get(&one).and(tensors.get(name)).is_some()));
    }
    Ok(found)
}

/// Every tensor of the file must be expected.
fn refuse_unexpected(
    dir: &Path,
    tensors: &TensorTable,
    expected: &BTreeSet<String>,
    copies: &[(String, TensorRef)],
    repeated: &BTreeSet<String>,
) -> Result<()> {
    let known =
        |name: &&str| expected.contains(*name) || repeated.contains(*name) || copies.iter().any(|c| c.1.name == **name);
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
