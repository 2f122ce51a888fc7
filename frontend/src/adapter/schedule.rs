//! What changes from step to step: buffers that a method writes while a run goes on. Shapes and the graph stay.
//!
//! An event is a function of the step, the seed and the buffers alone; everything that it must remember is a buffer or a statistic, which
//! checkpoints hold. So a run that was stopped goes on as if it had not been.

use pleach_ir::{DType, Role};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Kind, Site};
use crate::error::{Error, Result};
use crate::modules::is_computed;
use crate::peft::{Adapter, MethodConfig};

/// When an event is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// Before the first forward run of a step.
    Before,
    /// When the gradients of a step are complete, unclipped, and nothing is updated yet.
    Gradients,
    /// After the update.
    After,
}

/// The buffers of a run, by the names of their parameters.
pub trait Buffers {
    /// The values of an f32 buffer.
    ///
    /// # Errors
    /// A name that is not known.
    fn read(&self, name: &str) -> std::result::Result<Vec<f32>, String>;

    /// Overwrites an f32 buffer.
    ///
    /// # Errors
    /// A name that is not known, another number of values.
    fn write(&mut self, name: &str, values: &[f32]) -> std::result::Result<(), String>;
}

/// A moment of a run, with what a method may look at and change.
pub struct Event<'e> {
    /// When in the step.
    pub moment: Moment,
    /// The step, the first one being 0.
    pub step: u64,
    /// Steps of the run.
    pub steps: u64,
    /// Keys every random number.
    pub seed: u64,
    /// Where the method attaches, and what it trains as a whole.
    pub sites: &'e [Site],
    slot: u32,
    buffers: &'e mut dyn Buffers,
}

impl Event<'_> {
    /// The name of a buffer's parameter.
    pub fn name(&self, site: &Site, part: &str) -> String {
        format!("slot{}.{}.{part}", self.slot, site.module)
    }

    /// Reads a parameter.
    ///
    /// # Errors
    /// A name that is not known.
    pub fn read_param(&self, name: &str) -> Result<Vec<f32>> {
        self.buffers.read(name).map_err(Error::Graph)
    }

    /// Writes a parameter.
    ///
    /// # Errors
    /// A name that is not known, another number of values.
    pub fn write_param(&mut self, name: &str, values: &[f32]) -> Result<()> {
        self.buffers.write(name, values).map_err(Error::Graph)
    }

    /// Reads a buffer.
    ///
    /// # Errors
    /// As [`Event::read_param`].
    pub fn read(&self, site: &Site, part: &str) -> Result<Vec<f32>> {
        self.read_param(&self.name(site, part))
    }

    /// Writes a buffer.
    ///
    /// # Errors
    /// As [`Event::write_param`].
    pub fn write(&mut self, site: &Site, part: &str, values: &[f32]) -> Result<()> {
        self.write_param(&self.name(site, part), values)
    }

    /// The name of the parameter of a buffer that all sites share.
    pub fn shared_name(&self, part: &str) -> String {
        format!("slot{}.{part}", self.slot)
    }

    /// Sites that have a buffer: what is trained as a whole has none of a branch's.
    pub fn sites_with(&self, part: &str) -> Vec<Site> {
        self.sites.iter().filter(|s| self.buffers.read(&self.name(s, part)).is_ok()).cloned().collect()
    }

    /// Reads a statistic of a trained buffer.
    ///
    /// # Errors
    /// As [`Event::read_param`].
    pub fn stat(&self, site: &Site, part: &str, name: &str) -> Result<Vec<f32>> {
        self.read_param(&format!("stat.{name}.{}", self.name(site, part)))
    }

    /// Writes a statistic of a trained buffer.
    ///
    /// # Errors
    /// As [`Event::write_param`].
    pub fn set_stat(&mut self, site: &Site, part: &str, name: &str, values: &[f32]) -> Result<()> {
        self.write_param(&format!("stat.{name}.{}", self.name(site, part)), values)
    }

    /// A number in `[0, 1)` that depends on the seed, a name and the step alone.
    pub fn draw(&self, name: &str) -> f64 {
        draw(name, self.seed, self.step)
    }
}

/// A number in `[0, 1)` that depends on these alone.
pub(super) fn draw(name: &str, seed: u64, at: u64) -> f64 {
    let mut x = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    for word in [seed, at] {
        // The finalizer of splitmix64 (Steele et al. 2014).
        x = (x ^ word).wrapping_add(0x9e37_79b9_7f4a_7c15);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^= x >> 31;
    }
    (x >> 11) as f64 / (1u64 << 53) as f64
}

/// The events of an adapter's run. A plan carries it as data.
#[derive(Debug, Clone)]
pub struct Events {
    method: Kind,
    slot: u32,
    sites: Vec<Site>,
}

/// [`Events`] as data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EventsPlan {
    /// The method's configuration, with the keys that are not saved.
    pub config: Map<String, Value>,
    /// The slot.
    pub slot: u32,
    /// Module, rank, alpha, scale, input, output of every site.
    pub sites: Vec<(String, u64, f64, f64, u64, u64)>,
}

impl EventsPlan {
    /// What an adapter's method does from step to step, where it does anything.
    pub fn new(adapter: &Adapter, slot: u32) -> Option<EventsPlan> {
        let config = &adapter.config;
        if !config.method.has_events() {
            return None;
        }
        let sites = adapter.sites.iter().filter(|s| is_computed(&s.module)).cloned();
        let whole = adapter.replaced.iter().filter(|r| is_computed(&r.path)).filter_map(|r| r.site(config));
        let plain = |s: Site| (s.module, s.rank, s.alpha, s.scale, s.input, s.output);
        Some(EventsPlan { config: config.raw.clone(), slot, sites: sites.chain(whole).map(plain).collect() })
    }
}

impl Events {
    /// From a plan's data.
    ///
    /// # Errors
    /// Data that another version wrote.
    pub fn from_plan(plan: &EventsPlan) -> Result<Events> {
        let site = |(module, rank, alpha, scale, input, output): &(String, u64, f64, f64, u64, u64)| Site {
            module: module.clone(),
            embedding: false,
            rank: *rank,
            alpha: *alpha,
            scale: *scale,
            input: *input,
            output: *output,
            widest: (*input, *output),
            member: None,
            order: None,
            values: Default::default(),
        };
        let method = MethodConfig::from_json(&plan.config)?.method;
        Ok(Events { method, slot: plan.slot, sites: plan.sites.iter().map(site).collect() })
    }

    /// Lets the method look at a moment of a run.
    ///
    /// # Errors
    /// A buffer that is not there, and what the method refuses.
    pub fn at(
        &self,
        moment: Moment,
        step: u64,
        steps: u64,
        seed: u64,
        buffers: &mut dyn Buffers,
    ) -> std::result::Result<(), String> {
        let mut event = Event { moment, step, steps, seed, sites: &self.sites, slot: self.slot, buffers };
        self.method.on_step(&mut event).map_err(|e| e.to_string())
    }
}

impl super::Replaced {
    /// A parameter that is trained as a whole, as a site whose buffer is `weight` or `bias`. A vector has one column.
    pub(crate) fn site(&self, config: &MethodConfig) -> Option<Site> {
        let (module, _) = self.path.rsplit_once('.')?;
        let (output, input) = (*self.shape.first()?, self.shape.get(1).copied().unwrap_or(1));
        Some(Site {
            module: module.to_owned(),
            embedding: false,
            rank: config.rank.min(output).min(input),
            alpha: config.alpha,
            scale: config.method.scale(config.rank, config.alpha),
            input,
            output,
            widest: (input, output),
            member: None,
            order: None,
            values: Default::default(),
        })
    }

    /// That buffer.
    pub(crate) fn buffer(&self) -> super::Buffer {
        super::Buffer {
            part: if self.path.ends_with(".bias") { "bias" } else { "weight" },
            dtype: DType::F32,
            shape: self.shape.clone(),
            role: Role::Train,
            file: None,
            init: super::Init::Base { tensor: self.path.clone() },
        }
    }
}
