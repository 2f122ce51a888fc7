//! Appends operators to one entry at a time, sharing parameters between entries.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use pleach_ir::{
    BinaryOp, DType, Dim, Entry, Graph, Op, Param, ParamId, ReduceOp, Role, Source, TensorType, UnaryOp, ValueId,
};

use super::arrange::placed;
use crate::adapter::{Buffer, Kind, Measure, Ordered, Scope, Site, Update, all_rows};
use crate::checkpoint::Checkpoint;
use crate::coupling::Member;
use crate::error::{Error, Result};
use crate::modules::is_computed;
use crate::peft::Adapter;

/// The entry whose gradients of base weights are measured.
pub(super) const CALIBRATE: &str = "calibrate";
/// The entry in which inputs of modules are measured.
pub(super) const MEASURE: &str = "measure";

/// What attaches to a module: slot, method and site, in slot order.
pub(super) type Attached<'a> = Vec<(u32, &'a Kind, &'a Site)>;

/// A graph under construction.
pub(crate) struct Builder<'a> {
    model: &'a Checkpoint,
    attached: BTreeMap<&'a str, Attached<'a>>,
    /// Parameters of the base that the adapter of a slot replaces, by path.
    replaced: BTreeMap<&'a str, u32>,
    train: Option<u32>,
    /// The modules that are looked at where the entry is for calibration; the model then is the base alone.
    calibrated: Option<BTreeSet<&'a str>>,
    adapters: &'a [Adapter],
    graph: Graph,
    params: BTreeMap<String, ParamId>,
    entry: Entry,
    /// The input `rows` of the current entry, where something was measured.
    labelled: Option<ValueId>,
    /// Values of parameters in the current entry.
    reads: BTreeMap<ParamId, ValueId>,
    origin: Option<Arc<str>>,
    /// Layers that hold units in the order of the trained slot: the order's buffer and their part.
    pub(super) placed: BTreeMap<&'a str, (&'a Ordered, &'a Member)>,
    /// Whether they do so in the current entry.
    pub(super) arranges: bool,
}

impl<'a> Builder<'a> {
    /// `train` is the slot whose parameters are trained.
    ///
    /// # Errors
    /// Two adapters that replace one parameter.
    pub(crate) fn new(model: &'a Checkpoint, adapters: &'a [Adapter], train: Option<u32>) -> Result<Builder<'a>> {
        let mut attached: BTreeMap<&str, Attached> = BTreeMap::new();
        let mut replaced = BTreeMap::new();
        for (slot, adapter) in adapters.iter().enumerate() {
            for site in &adapter.sites {
                attached.entry(&site.module).or_default().push((slot as u32, &adapter.config.method, site));
            }
            for r in &adapter.replaced {
                if let Some(other) = replaced.insert(r.path.as_str(), slot as u32) {
                    let (one, two) = (&adapters[other as usize].name, &adapter.name);
                    let what = format!("is replaced as a whole by both `{one}` and `{two}`; use one of them at a time");
                    return Err(Error::tensor(&adapter.dir, &r.path, what));
                }
            }
        }
        let placed = placed(adapters, train, &attached)?;
        Ok(Builder {
            model,
            attached,
            replaced,
            train,
            calibrated: None,
            adapters,
            graph: Graph::default(),
            params: BTreeMap::new(),
            entry: Entry::default(),
            labelled: None,
            reads: BTreeMap::new(),
            origin: None,
            placed,
            arranges: false,
        })
    }

    /// Whether entries are for calibration.
    pub(super) fn calibrates(&self) -> bool {
        self.calibrated.is_some()
    }

    /// From here on entries are for calibration: of the base alone, looking at these modules.
    pub(super) fn calibrate(&mut self, modules: &'a [String]) {
        self.calibrated = Some(modules.iter().map(String::as_str).collect());
    }

    pub(crate) fn start(&mut self, entry: Entry) {
        self.entry = entry;
        self.reads.clear();
        self.labelled = None;
        self.origin = None;
        self.arranges = false;
    }

    pub(crate) fn finish(&mut self) {
        self.graph.entries.push(std::mem::take(&mut self.entry));
    }

    pub(crate) fn into_graph(self) -> Graph {
        self.graph
    }

    /// Nodes pushed from here on come from this module.
    pub(super) fn at(&mut self, module: &str) {
        self.origin = Some(Arc::from(module));
    }

    /// Appends a node.
    pub(crate) fn push(&mut self, op: Op, inputs: &[ValueId]) -> Result<ValueId> {
        self.entry.push_from(&self.graph.params, op, inputs, self.origin.clone()).map_err(|e| {
            Error::Graph(format!("{} in `{}`: {e}", self.origin.as_deref().unwrap_or("?"), self.entry.name))
        })
    }

    /// The value of a parameter, which is declared at its first use.
    pub(crate) fn param(&mut self, name: String, ty: TensorType, role: Role, source: Source) -> Result<ValueId> {
        let id = self.declare(name, ty, role, source);
        self.read(id)
    }

    /// The value of a declared parameter.
    pub(crate) fn read(&mut self, id: ParamId) -> Result<ValueId> {
        if let Some(&value) = self.reads.get(&id) {
            return Ok(value);
        }
        let value = self.push(Op::Param(id), &[])?;
        self.reads.insert(id, value);
        Ok(value)
    }

    /// The slot that is trained.
    pub(super) fn train_slot(&self) -> Option<u32> {
        self.train
    }

    /// The sites of a slot that an entry computes.
    pub(crate) fn sites(&self, slot: u32) -> Vec<Site> {
        let sites = self.adapters.get(slot as usize).map(|a| a.sites.as_slice()).unwrap_or_default();
        sites.iter().filter(|s| is_computed(&s.module)).cloned().collect()
    }

    /// The role of a slot's parameter that its method trains.
    pub(crate) fn trained(&self, slot: u32) -> Role {
        if self.train == Some(slot) { Role::Train } else { Role::Frozen }
    }

    /// Declares a parameter, or finds it again.
    pub(crate) fn declare(&mut self, name: String, ty: TensorType, role: Role, source: Source) -> ParamId {
        if let Some(&id) = self.params.get(&name) {
            return id;
        }
        let id = self.graph.add_param(Param { name: name.clone(), ty, role, source });
        self.params.insert(name, id);
        id
    }

    /// The value of a parameter of the base model, by the path of its module ("model.norm.weight"), or of what an adapter
    /// has in its place.
    pub(crate) fn weight(&mut self, path: &str) -> Result<ValueId> {
        let tensor = self.model.param(path).ok_or_else(|| Error::Graph(format!("there is no parameter `{path}`")))?;
        let ty = TensorType::new(DType::F32, tensor.shape.iter().copied());
        if let Some(&slot) = self.replaced.get(path).filter(|_| self.calibrated.is_none()) {
            let source = Source::Adapter { slot, key: path.to_owned() };
            return self.param(format!("slot{slot}.{path}"), ty, self.trained(slot), source);
        }
        let name = tensor.name.clone();
        let module = path.strip_suffix(".weight");
        let looked_at = module.is_some_and(|m| self.calibrated.as_ref().is_some_and(|c| c.contains(m)));
        let role = if looked_at && self.entry.name == CALIBRATE { Role::Train } else { Role::Frozen };
        self.param(name.clone(), ty, role, Source::Checkpoint(name))
    }

    /// An input of the entry, i32.
    pub(super) fn input(&mut self, name: &str, count: impl Into<Dim>) -> Result<ValueId> {
        self.push(Op::Input { name: name.into(), dtype: DType::I32, shape: vec![count.into()] }, &[])
    }

    /// Names a result of the entry.
    pub(crate) fn output(&mut self, name: &str, value: ValueId) {
        self.entry.output(name, value);
    }

    /// Whether the entry is the one that is differentiated, in which statistics of a step are counted.
    pub(crate) fn counts(&self) -> bool {
        self.entry.name == "train"
    }

    /// Writes a parameter when the entry ends.
    pub(crate) fn assign(&mut self, param: ParamId, value: ValueId) {
        self.entry.assign(param, value);
    }

    pub(crate) fn shape(&self, value: ValueId) -> &[Dim] {
        &self.entry.ty(value).shape
    }

    pub(super) fn unary(&mut self, op: UnaryOp, x: ValueId) -> Result<ValueId> {
        self.push(Op::Unary(op), &[x])
    }

    pub(super) fn mul(&mut self, a: ValueId, b: ValueId) -> Result<ValueId> {
        self.push(Op::Binary(BinaryOp::Mul), &[a, b])
    }

    pub(super) fn sub(&mut self, a: ValueId, b: ValueId) -> Result<ValueId> {
        self.push(Op::Binary(BinaryOp::Sub), &[a, b])
    }

    pub(super) fn add(&mut self, terms: &[ValueId]) -> Result<ValueId> {
        self.push(Op::Add, terms)
    }

    /// x · c, elementwise.
    pub(super) fn scale(&mut self, x: ValueId, c: f32) -> Result<ValueId> {
        let c = self.push(Op::f32(c), &[])?;
        self.mul(x, c)
    }

    /// x + c, elementwise.
    pub(super) fn shift(&mut self, x: ValueId, c: f32) -> Result<ValueId> {
        let c = self.push(Op::f32(c), &[])?;
        self.add(&[x, c])
    }

    /// A per-column vector [d] over the rows of x [T, d].
    pub(crate) fn over_rows(&mut self, vector: ValueId, x: ValueId) -> Result<ValueId> {
        let shape = self.shape(x).to_vec();
        self.push(Op::Broadcast { shape, axes: vec![1] }, &[vector])
    }

    /// Rows of a table [n, d] at i32 indices.
    pub(super) fn rows(&mut self, table: ValueId, index: ValueId) -> Result<ValueId> {
        self.push(Op::Gather { axis: 0 }, &[table, index])
    }

    /// Mean of each row of x [T, d], spread over the row again.
    fn row_mean(&mut self, x: ValueId) -> Result<ValueId> {
        let shape = self.shape(x).to_vec();
        let width = shape[1].known().ok_or_else(|| Error::Graph("a row's width must be static".into()))?;
        let sum = self.push(Op::Reduce { op: ReduceOp::Sum, axis: 1 }, &[x])?;
        let width = self.push(Op::f32(width as f32), &[])?;
        let mean = self.push(Op::Binary(BinaryOp::Div), &[sum, width])?;
        self.push(Op::Broadcast { shape, axes: vec![0] }, &[mean])
    }

    /// x / √(mean(x²) + ε), row by row.
    fn normalized(&mut self, x: ValueId, eps: f64) -> Result<ValueId> {
        let square = self.mul(x, x)?;
        let mean = self.row_mean(square)?;
        let shifted = self.shift(mean, eps as f32)?;
        let inverse = self.unary(UnaryOp::Rsqrt, shifted)?;
        self.mul(x, inverse)
    }

    /// RMSNorm of the rows of x [T, d] with the scale of `module` (Zhang & Sennrich 2019).
    pub(super) fn rms_norm(&mut self, module: &str, x: ValueId, eps: f64) -> Result<ValueId> {
        self.at(module);
        let weight = self.weight(&format!("{module}.weight"))?;
        let normalized = self.normalized(x, eps)?;
        let weight = self.over_rows(weight, x)?;
        self.mul(normalized, weight)
    }

    /// LayerNorm of the rows of x [T, d] with scale and shift of `module` (Ba et al. 2016).
    pub(super) fn layer_norm(&mut self, module: &str, x: ValueId, eps: f64) -> Result<ValueId> {
        self.at(module);
        let weight = self.weight(&format!("{module}.weight"))?;
        let bias = self.weight(&format!("{module}.bias"))?;
        let mean = self.row_mean(x)?;
        let centred = self.sub(x, mean)?;
        let normalized = self.normalized(centred, eps)?;
        let weight = self.over_rows(weight, x)?;
        let scaled = self.mul(normalized, weight)?;
        let bias = self.over_rows(bias, x)?;
        self.add(&[scaled, bias])
    }

    /// What computes at a module: nothing but the base in calibration.
    fn attached_to(&self, module: &str) -> Attached<'a> {
        match self.calibrated {
            Some(_) => vec![],
            None => self.attached.get(module).cloned().unwrap_or_default(),
        }
    }

    /// In the entry `measure`, what methods want to know of the input x [T, in] of a module.
    fn measure(&mut self, module: &str, x: ValueId) -> Result<()> {
        let looked_at = self.calibrated.as_ref().is_some_and(|c| c.contains(module));
        if !looked_at || self.entry.name != MEASURE {
            return Ok(());
        }
        for (slot, method, site) in self.attached.get(module).cloned().unwrap_or_default() {
            let labelled = match self.labelled {
                Some(v) => v,
                None => self.input("rows", pleach_ir::Sym::L)?,
            };
            self.labelled = Some(labelled);
            let mut measure = Measure::new(Scope::new(self, slot, &**method, site), labelled);
            method.measure(&mut measure, x)?;
            for (param, value) in measure.finish() {
                self.assign(param, value);
            }
        }
        Ok(())
    }

    /// The linear layer `module` on x [T, in]: x · Wᵀ as the slots change it, and bias if there is one.
    pub(super) fn linear(&mut self, module: &str, x: ValueId) -> Result<ValueId> {
        self.at(module);
        self.measure(module, x)?;
        let weight = self.weight(&format!("{module}.weight"))?;
        let attached = self.attached_to(module);
        let mut given = x;
        for &(slot, method, site) in &attached {
            given = method.input(&mut Scope::new(self, slot, &**method, site), given)?;
        }
        let product = |b: &mut Self, w| b.push(Op::MatMul { ta: false, tb: true }, &[given, w]);
        let mut terms = self.adapted(module, x, weight, product)?;
        let bias = format!("{module}.bias");
        if self.model.param(&bias).is_some() {
            let bias = self.weight(&bias)?;
            let bias = self.arranged(module, bias)?;
            terms.push(self.over_rows(bias, terms[0])?);
        }
        let mut y = self.sum(&terms)?;
        for &(slot, method, site) in &attached {
            y = method.result(&mut Scope::new(self, slot, &**method, site), x, y)?;
        }
        Ok(y)
    }

    /// The embedding `module` at i32 indices [T]: rows of its table as the slots change it.
    pub(super) fn embedding(&mut self, module: &str, index: ValueId) -> Result<ValueId> {
        self.at(module);
        let table = self.weight(&format!("{module}.weight"))?;
        let terms = self.adapted(module, index, table, |b, table| b.rows(table, index))?;
        self.sum(&terms)
    }

    /// The terms of a layer's output: first the slots change the weight, then what the layer makes of it.
    fn adapted(
        &mut self,
        module: &str,
        x: ValueId,
        weight: ValueId,
        layer: impl FnOnce(&mut Self, ValueId) -> Result<ValueId>,
    ) -> Result<Vec<ValueId>> {
        let attached = self.attached_to(module);
        let mut changed = self.arranged(module, weight)?;
        for &(slot, method, site) in &attached {
            changed = method.weight(&mut Scope::new(self, slot, &**method, site), changed)?;
        }
        let mut terms = vec![layer(self, changed)?];
        for &(slot, method, site) in &attached {
            terms = method.output(&mut Scope::new(self, slot, &**method, site), x, weight, terms)?;
        }
        Ok(terms)
    }

    fn sum(&mut self, terms: &[ValueId]) -> Result<ValueId> {
        if let [only] = terms { Ok(*only) } else { self.add(terms) }
    }

    /// What the trained slot's method adds to the loss, f32 [].
    pub(super) fn aux_losses(&mut self) -> Result<Option<ValueId>> {
        let sites: Vec<_> = self.attached.values().flatten().copied().filter(|a| self.train == Some(a.0)).collect();
        let mut terms = vec![];
        for (slot, method, site) in sites {
            self.at(&site.module);
            terms.extend(method.aux_loss(&mut Scope::new(self, slot, &**method, site))?);
        }
        if terms.is_empty() { Ok(None) } else { self.sum(&terms).map(Some) }
    }

    /// The entry `optimizer`: what a step does with what is trained, beside AdamW; left out where there is nothing to say.
    pub(super) fn optimizer(&mut self) -> Result<()> {
        let Some((slot, adapter)) = self.train.and_then(|s| Some((s, self.adapters.get(s as usize)?))) else {
            return Ok(());
        };
        let config = &adapter.config;
        let trained = |b: &Buffer| b.role == Role::Train;
        // Where, which buffer, its key in the slot. What sites share is stepped once, at the first of them.
        let mut places: Vec<(Site, Buffer, String, bool)> = vec![];
        for s in adapter.shared() {
            places.push((adapter.sites[s.first].clone(), s.buffer, s.key, false));
        }
        for s in &adapter.sites {
            let key = |b: &Buffer| format!("{}.{}", s.module, b.part);
            places.extend(config.method.buffers(s).into_iter().map(|b| (s.clone(), b.clone(), key(&b), false)));
        }
        let whole = adapter.replaced.iter().filter_map(|r| Some((r.site(config)?, r.buffer(), r.path.clone(), true)));
        places.extend(whole);
        self.start(Entry::new("optimizer"));
        let (mut outputs, mut assigned, mut inputs) = (vec![], vec![], BTreeMap::new());
        for (site, b, key, whole) in places.iter().filter(|p| trained(&p.1)) {
            // What no entry computes is not trained.
            if !self.params.contains_key(&format!("slot{slot}.{key}")) {
                continue;
            }
            self.at(&site.module);
            let scope = match whole {
                true => Scope::with(self, slot, site, vec![b.clone()]),
                false => Scope::new(self, slot, &*config.method, site),
            };
            let mut update = Update::new(scope, b.part, b.shape.clone(), &mut inputs);
            config.method.update(&mut update)?;
            let (more, values) = update.finish();
            outputs.extend(more);
            assigned.extend(values);
        }
        for (name, value) in &outputs {
            self.output(name, *value);
        }
        for (param, value) in &assigned {
            self.assign(*param, *value);
        }
        if outputs.is_empty() && assigned.is_empty() {
            self.start(Entry::default());
        } else {
            self.finish();
        }
        Ok(())
    }

    /// The weight that a method puts in place of a site's, without its branch. The base's weight is the parameter "weight".
    pub(crate) fn edited_site(&mut self, method: &Kind, site: &Site) -> Result<ValueId> {
        let shape = if site.embedding { [site.input, site.output] } else { [site.output, site.input] };
        let weight = self.param("weight".into(), TensorType::new(DType::F32, shape), Role::Frozen, Source::Zeros)?;
        method.weight(&mut Scope::new(self, 0, &**method, site), weight)
    }

    /// The weight of a site, merged: the layer on the rows of the identity ("x"), turned round again. The base's weight is the
    /// parameter "weight". Also the base's own term of the output.
    pub(crate) fn merged_site(&mut self, method: &Kind, site: &Site) -> Result<(ValueId, ValueId)> {
        let turn =
            |b: &mut Self, w: ValueId| if site.embedding { Ok(w) } else { b.push(Op::Transpose(vec![1, 0]), &[w]) };
        let shape = if site.embedding { [site.input, site.output] } else { [site.output, site.input] };
        let ty = TensorType::new(DType::F32, shape);
        let weight = self.param("weight".into(), ty, Role::Frozen, Source::Zeros)?;
        let x = self.push(all_rows(site), &[])?;
        let changed = method.weight(&mut Scope::new(self, 0, &**method, site), weight)?;
        let given = if site.embedding { x } else { method.input(&mut Scope::new(self, 0, &**method, site), x)? };
        // The rows of the identity pick the weight as it is.
        let product = match given == x {
            true => turn(self, changed)?,
            false => self.push(Op::MatMul { ta: false, tb: true }, &[given, changed])?,
        };
        let terms = method.output(&mut Scope::new(self, 0, &**method, site), x, weight, vec![product])?;
        let mut y = self.sum(&terms)?;
        if !site.embedding {
            y = method.result(&mut Scope::new(self, 0, &**method, site), x, y)?;
        }
        Ok((turn(self, y)?, product))
    }

    /// The bias [1, out] of a linear site, merged: what the layer gives for nothing; `None` where the method leaves it as it is. Where there
    /// is a single weight, everything but the bias vanishes with the input. The base's bias is the parameter "bias".
    pub(crate) fn merged_bias(&mut self, method: &Kind, site: &Site) -> Result<Option<ValueId>> {
        let ty = TensorType::new(DType::F32, [1, site.output]);
        let bias = self.param("bias".into(), ty, Role::Frozen, Source::Zeros)?;
        let nothing = Op::Const { dtype: DType::F32, shape: vec![1, site.input], bits: vec![0; site.input as usize] };
        let nothing = self.push(nothing, &[])?;
        let y = method.result(&mut Scope::new(self, 0, &**method, site), nothing, bias)?;
        Ok((y != bias).then_some(y))
    }
}
