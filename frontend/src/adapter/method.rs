//! What an adapter method is: one value that says where it attaches, which buffers it owns and what it computes.
//!
//! A method writes plain operators and declares roles; merging, fusing, gradients and what is kept for the backward pass follow
//! from general rules elsewhere. It has no merge, no kernels and no optimizer of its own, and its lowering must be a pure function
//! of IR values: what changes from step to step acts through buffers.

use std::fmt;
use std::sync::Arc;

use pleach_ir::{BinaryOp, DType, Dim, Op, ParamId, Role, Source, TensorType, ValueId};
use serde_json::Value;

use super::low_rank::Change;
use super::prepare::Values;
use super::{Event, Given, Init, Measure, SavedRanks, Site, Update};
use crate::coupling::Coupling;
use crate::error::{Error, Result};
use crate::json::Fields;
use crate::lower::Builder;
use crate::modules::ModuleTable;
use crate::peft::Target;

/// One buffer of a site. Its parameter is called `slot{n}.{module}.{part}`.
#[derive(Debug, Clone, PartialEq)]
pub struct Buffer {
    /// Last part of the name.
    pub part: &'static str,
    /// Element type in the slot: f32, or i32 for indices.
    pub dtype: DType,
    /// Row-major shape.
    pub shape: Vec<u64>,
    /// `Train`: trained when the slot is; `Index`, `Frozen`: never.
    pub role: Role,
    /// Ending of its name in the adapter's file, behind the module's path; `None` where it is not saved.
    pub file: Option<&'static str>,
    /// How it starts.
    pub init: Init,
}

impl Buffer {
    /// A trained f32 buffer.
    pub fn trained(part: &'static str, file: &'static str, shape: &[u64], init: Init) -> Buffer {
        Buffer { part, dtype: DType::F32, shape: shape.to_vec(), role: Role::Train, file: Some(file), init }
    }

    /// A fixed f32 buffer.
    pub fn frozen(part: &'static str, file: Option<&'static str>, shape: &[u64], init: Init) -> Buffer {
        Buffer { part, dtype: DType::F32, shape: shape.to_vec(), role: Role::Frozen, file, init }
    }

    /// i32 indices.
    pub fn indices(part: &'static str, file: &'static str, shape: &[u64], init: Init) -> Buffer {
        Buffer { part, dtype: DType::I32, shape: shape.to_vec(), role: Role::Index, file: Some(file), init }
    }

    /// A buffer that is neither trained nor saved and that changes while a run goes on: masks, thresholds. One value at first.
    pub fn changing(part: &'static str, shape: &[u64], value: f64) -> Buffer {
        let init = Init::Constant { value: value as f32 };
        Buffer { part, dtype: DType::F32, shape: shape.to_vec(), role: Role::Stat, file: None, init }
    }

    /// A number that the configuration gives, f32 [].
    pub fn constant(part: &'static str, value: f64) -> Buffer {
        let init = Init::Constant { value: value as f32 };
        Buffer { part, dtype: DType::F32, shape: vec![], role: Role::Frozen, file: None, init }
    }
}

/// scale · B · A.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LowRank {
    /// A [k, in].
    pub down: ValueId,
    /// B [out, k].
    pub up: ValueId,
    /// The factor.
    pub scale: f64,
}

/// What a method wants to know before training.
#[derive(Debug, Clone, PartialEq)]
pub enum Request {
    /// dL/dW of the site's weight, summed over this many batches.
    Gradient {
        /// Batches.
        batches: u64,
    },
    /// The statistics of the site's input that [`Method::measure`] writes, over this many batches.
    Inputs {
        /// Batches.
        batches: u64,
    },
}

impl Request {
    /// Batches to look at.
    pub fn batches(&self) -> u64 {
        match self {
            Request::Gradient { batches } | Request::Inputs { batches } => *batches,
        }
    }
}

/// An adapter method.
pub trait Method: fmt::Debug + Send + Sync {
    /// The name of the command line.
    fn name(&self) -> &'static str;

    /// What it computes, in one line.
    fn formula(&self) -> &'static str;

    /// `peft_type` in its configuration.
    fn peft_type(&self) -> &'static str;

    /// The configuration's key for alpha; `None` for a method without one.
    fn alpha_key(&self) -> Option<&'static str> {
        Some("lora_alpha")
    }

    /// The configuration's key for the rank; `None` for a method without one.
    fn rank_key(&self) -> Option<&'static str> {
        Some("r")
    }

    /// Its default rank.
    fn default_rank(&self) -> u64 {
        8
    }

    /// Whether its configuration has `rank_pattern` and `alpha_pattern`.
    fn has_patterns(&self) -> bool {
        self.peft_type() == "LORA"
    }

    /// Where it attaches if its configuration does not say.
    fn default_targets(&self, modules: &ModuleTable) -> &'static [&'static str] {
        modules.default_targets()
    }

    /// The factor of the update.
    fn scale(&self, rank: u64, alpha: f64) -> f64 {
        alpha / rank as f64
    }

    /// Alpha where the configuration gives none.
    fn default_alpha(&self, rank: u64) -> f64 {
        let _ = rank;
        8.0
    }

    /// Keys of the configuration that only training knows: they are not saved.
    fn own_keys(&self) -> &'static [&'static str] {
        &[]
    }

    /// Whether it can attach to this module; most methods take linear layers only.
    ///
    /// # Errors
    /// Why not.
    fn attach(&self, target: &Target) -> std::result::Result<(), String> {
        linear_only(target)
    }

    /// The buffers of a site.
    fn buffers(&self, site: &Site) -> Vec<Buffer>;

    /// The group of a site, where not all sites of an adapter share one set of buffers.
    fn group(&self, site: &Site) -> Option<String> {
        let _ = site;
        None
    }

    /// Buffers that all sites of a group have in common, each one parameter `slot{n}.{part}` (`slot{n}.{group}.{part}` where there are
    /// groups). They are the same at every one of them, so without groups their shapes follow from [`Site::widest`]; gradients of all
    /// sites add up.
    fn shared(&self, site: &Site) -> Vec<Buffer> {
        let _ = site;
        vec![]
    }

    /// The units that the layers of a coupling hold while the slot is trained, in order: i32 [n], distinct numbers of units; where n is
    /// smaller than their number, the others are left out. `None`: all of them, as they are. `targeted`: a site is in it.
    fn order(&self, coupling: &Coupling, targeted: bool) -> Option<Buffer> {
        let _ = (coupling, targeted);
        None
    }

    /// The update of a site as LoRA has it: A [k, in], B [out, k] and the factor of their product. `None` where there is no such form.
    ///
    /// # Errors
    /// An operator that does not fit.
    fn low_rank(&self, scope: &mut Scope) -> Result<Option<LowRank>> {
        let change = self.change(scope)?;
        change.map(|c| c.as_lora(scope)).transpose()
    }

    /// What it wants to know of a site before training.
    fn requests(&self, site: &Site) -> Vec<Request> {
        let _ = site;
        vec![]
    }

    /// What it measures of a site's input x [T, in] before training, one row of the data at a time. Called where it requests
    /// [`Request::Inputs`].
    ///
    /// # Errors
    /// An operator that does not fit.
    fn measure(&self, measure: &mut Measure, x: ValueId) -> Result<()> {
        let _ = (measure, x);
        Ok(())
    }

    /// The values of all buffers of a site whose recipe is [`Init::Prepared`], by part.
    ///
    /// # Errors
    /// A weight that cannot be decomposed, a measurement that is missing.
    fn prepare(&self, given: &Given) -> Result<Values> {
        Err(Error::Graph(format!("{} prepares nothing at {}", self.name(), given.site.module)))
    }

    /// Whether the base's weights alone give again what [`Method::prepare`] made and the adapter's folder does not hold.
    ///
    /// # Errors
    /// Why not, and what to do.
    fn repeatable(&self) -> std::result::Result<(), &'static str> {
        Ok(())
    }

    /// A remark on a folder whose prepared values are made again.
    fn note(&self) -> Option<&'static str> {
        None
    }

    /// What its configuration says in the folder of first values.
    fn initial_config(&self) -> Vec<(&'static str, Value)> {
        vec![]
    }

    /// The weight that takes the place of the base's, W [out, in] ([rows, width] for an embedding).
    ///
    /// # Errors
    /// An operator that does not fit.
    fn weight(&self, scope: &mut Scope, weight: ValueId) -> Result<ValueId> {
        let _ = scope;
        Ok(weight)
    }

    /// What takes the place of x [T, in] in x · Wᵀ. Linear layers only.
    ///
    /// # Errors
    /// An operator that does not fit.
    fn input(&self, scope: &mut Scope, x: ValueId) -> Result<ValueId> {
        let _ = scope;
        Ok(x)
    }

    /// What takes the place of the layer's result y [T, out], bias included. Linear layers only; x is what the layer was given.
    ///
    /// # Errors
    /// An operator that does not fit.
    fn result(&self, scope: &mut Scope, x: ValueId, y: ValueId) -> Result<ValueId> {
        let _ = (scope, x);
        Ok(y)
    }

    /// What it adds to the weight of a linear layer, where that is a product of low rank beside the layer: the branch and the form of
    /// LoRA follow from it.
    ///
    /// # Errors
    /// An operator that does not fit.
    fn change(&self, scope: &mut Scope) -> Result<Option<Change>> {
        let _ = scope;
        Ok(None)
    }

    /// The layer's output without bias, as terms of a sum [T, out]. `terms` comes in as x · Wᵀ and what other slots added; x is
    /// [T, in], or the i32 index [T] of an embedding; `weight` is the base's.
    ///
    /// # Errors
    /// An operator that does not fit.
    fn output(&self, scope: &mut Scope, x: ValueId, weight: ValueId, mut terms: Vec<ValueId>) -> Result<Vec<ValueId>> {
        let _ = weight;
        // All of its ranks may have been left out.
        if scope.site().rank == 0 {
            return Ok(terms);
        }
        if let Some(change) = self.change(scope)? {
            terms.push(change.of(scope, x)?);
        }
        Ok(terms)
    }

    /// Which ranks are saved, where not all of them are.
    fn saved_ranks(&self) -> Option<SavedRanks> {
        None
    }

    /// A term of the loss f32 [] that depends on the site's buffers alone, counted once per optimizer step.
    ///
    /// # Errors
    /// An operator that does not fit.
    fn aux_loss(&self, scope: &mut Scope) -> Result<Option<ValueId>> {
        let _ = scope;
        Ok(None)
    }

    /// What a step of the optimizer does with a trained buffer, beside AdamW. Called for every trained buffer of a site, and for every
    /// weight that is trained as a whole, whose part is `weight`.
    ///
    /// # Errors
    /// An operator that does not fit.
    fn update(&self, update: &mut Update) -> Result<()> {
        let _ = update;
        Ok(())
    }

    /// Whether [`Method::on_step`] does anything.
    fn has_events(&self) -> bool {
        false
    }

    /// What changes at a moment of a run. It must be a function of the step and of the buffers alone.
    ///
    /// # Errors
    /// A buffer that is not there.
    fn on_step(&self, event: &mut Event) -> Result<()> {
        let _ = event;
        Ok(())
    }

    /// Whether what it targets is trained as a whole, in place of attaching a branch.
    fn whole(&self) -> bool {
        false
    }

    /// Whether an adapter with this configuration can be trained from the start.
    ///
    /// # Errors
    /// The key at fault and what is wrong with it.
    fn check_training(&self) -> std::result::Result<(), (&'static str, String)> {
        Ok(())
    }

    /// Keys of `adapter_config.json` beside those that all methods share.
    fn config(&self) -> Vec<(&'static str, Value)>;
}

/// How a method is found by its name or by a configuration.
#[derive(Debug)]
pub(crate) struct Entry {
    /// The name of the command line.
    pub name: &'static str,
    /// Keys that a configuration of the method has, `peft_type` first. Where several methods fit, the one with most keys wins.
    pub keys: &'static [(&'static str, Key)],
    /// Reads the method's own keys.
    pub read: fn(&mut Fields) -> Result<Arc<dyn Method>>,
}

/// The value of a key.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Key {
    /// A text.
    Text(&'static str),
    /// `true`.
    On,
    /// An object, whatever it holds.
    Object,
}

impl Key {
    /// As JSON.
    pub(crate) fn json(self) -> Value {
        match self {
            Key::Text(t) => t.into(),
            Key::On => true.into(),
            Key::Object => Value::Object(Default::default()),
        }
    }

    /// Whether a configuration's value is this one.
    pub(crate) fn fits(self, value: Option<&Value>) -> bool {
        match self {
            Key::Object => value.is_some_and(Value::is_object),
            _ => value == Some(&self.json()),
        }
    }
}

impl Entry {
    /// Whether a configuration is one of this method.
    pub(crate) fn fits(&self, f: &mut Fields) -> bool {
        self.keys.iter().all(|(key, value)| value.fits(f.raw(key)))
    }
}

/// Refuses embeddings.
///
/// # Errors
/// Why.
pub(super) fn linear_only(target: &Target) -> std::result::Result<(), String> {
    if target.embedding { Err("is an embedding; this method attaches to linear layers only".into()) } else { Ok(()) }
}

/// Where a method writes the operators of one site.
pub struct Scope<'s, 'b> {
    b: &'s mut Builder<'b>,
    slot: u32,
    site: &'s Site,
    buffers: Vec<Buffer>,
    shared: Vec<Buffer>,
    group: Option<String>,
}

impl<'s, 'b> Scope<'s, 'b> {
    pub(crate) fn new(b: &'s mut Builder<'b>, slot: u32, method: &dyn Method, site: &'s Site) -> Scope<'s, 'b> {
        let (buffers, shared, group) = (method.buffers(site), method.shared(site), method.group(site));
        Scope { b, slot, site, buffers, shared, group }
    }

    /// A site with these buffers.
    pub(crate) fn with(b: &'s mut Builder<'b>, slot: u32, site: &'s Site, buffers: Vec<Buffer>) -> Scope<'s, 'b> {
        Scope { b, slot, site, buffers, shared: vec![], group: None }
    }

    /// All sites of the adapter that an entry computes.
    pub fn all_sites(&self) -> Vec<Site> {
        self.b.sites(self.slot)
    }

    /// The site.
    pub fn site(&self) -> &'s Site {
        self.site
    }

    /// The value of a buffer.
    ///
    /// # Errors
    /// The method has no such buffer.
    pub fn buffer(&mut self, part: &str) -> Result<ValueId> {
        let id = self.buffer_id(part)?;
        self.b.read(id)
    }

    /// The parameter of a buffer. What changes in training stays as it is where the slot is not trained.
    pub(crate) fn buffer_id(&mut self, part: &str) -> Result<ParamId> {
        let buffer = self.find(part)?;
        let role = match buffer.role {
            Role::Train | Role::Gate | Role::Stat if self.b.trained(self.slot) == Role::Frozen => Role::Frozen,
            role => role,
        };
        let ty = TensorType::new(buffer.dtype, buffer.shape.iter().copied());
        let (slot, key) = (self.slot, self.key(part));
        Ok(self.b.declare(format!("slot{slot}.{key}"), ty, role, Source::Adapter { slot, key }))
    }

    fn find(&self, part: &str) -> Result<&Buffer> {
        let buffer = self.buffers.iter().chain(&self.shared).chain(&self.site.order).find(|b| b.part == part);
        buffer.ok_or_else(|| Error::Graph(format!("there is no buffer `{part}`")))
    }

    /// The key of a buffer in its slot: what sites share has no module in it, the order of a coupling that of the consumer.
    fn key(&self, part: &str) -> String {
        let order = self.site.order.as_ref().filter(|b| b.part == part).and(self.site.member.as_ref());
        match (self.shared.iter().any(|b| b.part == part), order) {
            (true, _) => super::shared_key(self.group.as_deref(), part),
            (_, Some(member)) => format!("{}.{part}", member.consumer),
            _ => format!("{}.{part}", self.site.module),
        }
    }

    /// The shape of a buffer.
    pub(crate) fn buffer_shape(&self, part: &str) -> Result<Vec<u64>> {
        self.find(part).map(|b| b.shape.clone())
    }

    /// The name of a buffer's parameter.
    pub(crate) fn param_name(&self, part: &str) -> String {
        format!("slot{}.{}", self.slot, self.key(part))
    }

    /// The name of a statistic of the site's input.
    pub(crate) fn stat_name(&self, name: &str) -> String {
        format!("stat.{name}.slot{}.{}", self.slot, self.site.module)
    }

    /// The value of a parameter, which is declared at its first use.
    pub(crate) fn param(&mut self, name: String, ty: TensorType, role: Role, source: Source) -> Result<ValueId> {
        self.b.param(name, ty, role, source)
    }

    /// Declares a parameter, or finds it again.
    pub(crate) fn declare(&mut self, name: String, ty: TensorType, role: Role, source: Source) -> ParamId {
        self.b.declare(name, ty, role, source)
    }

    /// Whether the layers of the site's coupling hold units in the order of this slot ([`Method::order`]).
    pub fn arranged(&self) -> bool {
        self.site.order.is_some() && self.b.arranges(self.slot)
    }

    /// The base's weight of the site as the checkpoint has it.
    ///
    /// # Errors
    /// A module without one.
    pub(crate) fn base_weight(&mut self) -> Result<ValueId> {
        self.b.weight(&format!("{}.weight", self.site.module))
    }

    /// The rows or columns of units, i32 [n] → i32 [n · width].
    pub(crate) fn elements(&mut self, units: ValueId, width: u64) -> Result<ValueId> {
        self.b.elements(units, width)
    }

    /// Adds `value` f32 to a statistic of a trained buffer in every forward run of training; [`Update::kept`] reads it, and
    /// [`Update::keep`] must say what it starts the next step with. Nothing in other entries.
    ///
    /// # Errors
    /// The method has no such buffer.
    pub fn count(&mut self, part: &str, name: &str, value: ValueId) -> Result<()> {
        let trained = self.find(part)?.role == Role::Train && self.trains();
        if !trained || !self.b.counts() {
            return Ok(());
        }
        let ty = TensorType { dtype: DType::F32, shape: self.shape(value).to_vec() };
        let name = format!("stat.{name}.{}", self.param_name(part));
        let id = self.b.declare(name, ty, Role::Stat, Source::Zeros);
        let old = self.b.read(id)?;
        let new = self.push(Op::Add, &[old, value])?;
        self.b.assign(id, new);
        Ok(())
    }

    /// Whether the slot is trained. A method with two equal forms may write the one that is cheaper to train.
    pub fn trains(&self) -> bool {
        self.b.trained(self.slot) == Role::Train
    }

    /// The type of a value.
    pub fn shape(&self, value: ValueId) -> &[Dim] {
        self.b.shape(value)
    }

    /// Appends an operator.
    ///
    /// # Errors
    /// Operands that do not fit.
    pub fn push(&mut self, op: Op, inputs: &[ValueId]) -> Result<ValueId> {
        self.b.push(op, inputs)
    }

    /// a · b elementwise; a rank-0 operand stands for its value everywhere.
    ///
    /// # Errors
    /// Operands that do not fit.
    pub fn mul(&mut self, a: ValueId, b: ValueId) -> Result<ValueId> {
        self.push(Op::Binary(BinaryOp::Mul), &[a, b])
    }

    /// The sum of terms; one term is itself.
    ///
    /// # Errors
    /// Operands that do not fit.
    pub fn sum(&mut self, terms: &[ValueId]) -> Result<ValueId> {
        if let [only] = terms { Ok(*only) } else { self.push(Op::Add, terms) }
    }

    /// A vector [d] over the rows of x [T, d].
    ///
    /// # Errors
    /// Operands that do not fit.
    pub fn over_rows(&mut self, vector: ValueId, x: ValueId) -> Result<ValueId> {
        self.b.over_rows(vector, x)
    }
}
