//! First values that need more than a recipe: made once from the base's weight, and from what calibration measured, before training
//! or when a folder that holds only their result is opened.
//!
//! A trainer gets them as values ([`Init::Prepared`](super::Init::Prepared)); decompositions stay on this side.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock};

use faer::Mat;
use pleach_plan::random;

use super::decompose::matrix;
use super::{Init, Kind, Site, SlotData, SlotTensor, SlotValue};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::modules::is_computed;
use crate::peft::Adapter;

/// What calibration measured at one site.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Measured {
    /// dL/dW, summed over the batches, in the shape of the weight.
    pub gradient: Option<Vec<f32>>,
    /// The batches that were asked for.
    pub batches: u64,
    /// Statistics of the site's input by name, see [`Method::measure`](super::Method::measure).
    pub stats: BTreeMap<String, Vec<f32>>,
}

/// What a method prepares a site from.
#[derive(Debug)]
pub struct Given<'a> {
    /// The site, without values.
    pub site: &'a Site,
    /// W [out, in] of the base, row-major.
    pub weight: Vec<f32>,
    measured: Option<&'a Measured>,
}

impl Given<'_> {
    /// W [out, in].
    pub(super) fn matrix(&self) -> Mat<f64> {
        matrix(self.site.output, self.site.input, &self.weight)
    }

    fn measured(&self) -> Result<&Measured> {
        self.measured.ok_or_else(|| Error::Graph(format!("nothing was measured at {}", self.site.module)))
    }

    /// Mean over the batches of dL/dW [out, in].
    ///
    /// # Errors
    /// It was not measured.
    pub(super) fn gradient(&self) -> Result<Mat<f64>> {
        let m = self.measured()?;
        let sum = m.gradient.as_ref().filter(|g| g.len() == self.weight.len());
        let sum = sum.ok_or_else(|| Error::Graph(format!("no gradient was measured at {}", self.site.module)))?;
        Ok(matrix(self.site.output, self.site.input, sum) * faer::Scale((m.batches.max(1) as f64).recip()))
    }

    /// A statistic of the input.
    ///
    /// # Errors
    /// It was not measured.
    pub(super) fn stat(&self, name: &str) -> Result<&[f32]> {
        let found = self.measured()?.stats.get(name).map(Vec::as_slice);
        found.ok_or_else(|| Error::Graph(format!("no {name} was measured at {}", self.site.module)))
    }

    /// A normal number for a place, the same at any time: it depends on the module, on what it is for, and on the place.
    pub(super) fn draws(&self, what: &str, n: usize) -> Vec<f64> {
        let key = format!("{}.{what}", self.site.module);
        let unit = |x: f32| f64::from(x) / 2.0 + 0.5;
        let pairs = random::uniform(0, &key, 2 * n, 1.0);
        let normal = |p: &[f32]| {
            let (u, v) = (unit(p[0]).clamp(1e-12, 1.0), unit(p[1]));
            (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
        };
        pairs.chunks_exact(2).map(normal).collect()
    }
}

/// What calibration left behind at these modules, over this many batches: of all parameters by name, those that were measured there.
///
/// # Errors
/// Those of `read`.
pub fn collect<E>(
    modules: &[String],
    base: &Checkpoint,
    batches: u64,
    names: &[String],
    read: impl Fn(&str) -> std::result::Result<Vec<f32>, E>,
) -> std::result::Result<BTreeMap<String, Measured>, E> {
    let mut out = BTreeMap::new();
    for module in modules {
        let mut m = Measured { batches, ..Measured::default() };
        let weight = base.param(&format!("{module}.weight")).map(|t| format!("grad.{}", t.name));
        if let Some(name) = weight.filter(|w| names.contains(w)) {
            m.gradient = Some(read(&name)?);
        }
        let end = format!(".slot0.{module}");
        for name in names {
            if let Some(stat) = name.strip_prefix("stat.").and_then(|n| n.strip_suffix(&end)) {
                m.stats.insert(stat.to_owned(), read(name)?);
            }
        }
        out.insert(module.clone(), m);
    }
    Ok(out)
}

/// Values of a site's buffers, by part.
pub(super) type Values = BTreeMap<&'static str, SlotTensor>;

/// An f32 buffer.
pub(super) fn floats(shape: &[u64], values: Vec<f32>) -> SlotTensor {
    SlotTensor { shape: shape.to_vec(), data: SlotData::F32(values) }
}

fn site_values(method: &Kind, site: &Site, base: &Checkpoint, measured: Option<&Measured>) -> Result<Values> {
    let path = format!("{}.weight", site.module);
    let weight = base.param(&path).ok_or_else(|| Error::tensor(&base.dir, &path, "is missing"))?.read_f32()?;
    let values = method.prepare(&Given { site, weight, measured })?;
    for b in method.buffers(site).iter().filter(|b| matches!(b.init, Init::Prepared { .. })) {
        let fits = values.get(b.part).is_some_and(|t| {
            let n = match &t.data {
                SlotData::F32(x) if x.iter().all(|x| x.is_finite()) => x.len(),
                SlotData::I32(x) => x.len(),
                SlotData::F32(_) => 0,
            };
            t.shape == b.shape && n as u64 == b.shape.iter().product::<u64>()
        });
        if !fits {
            let what = format!("`{}` of {} could not be prepared: its values are no numbers", b.part, site.module);
            return Err(Error::Graph(what));
        }
    }
    Ok(values)
}

/// Prepares every site of a new adapter on this many threads; where something was measured, the sites at which it was. Gives the values by their keys in the slot.
///
/// # Errors
/// A weight that cannot be read or decomposed, a measurement that is missing.
pub fn prepare(
    adapter: &Adapter,
    base: &Checkpoint,
    measured: &BTreeMap<String, Measured>,
    threads: usize,
) -> Result<BTreeMap<String, SlotTensor>> {
    let method = &adapter.config.method;
    let here = |s: &&Site| measured.is_empty() || measured.contains_key(&s.module);
    let sites: Vec<&Site> = adapter.sites.iter().filter(|s| is_computed(&s.module)).filter(here).collect();
    let done: Mutex<BTreeMap<usize, Result<Values>>> = Mutex::default();
    side_by_side(sites.len(), threads, |i| {
        let values = site_values(method, sites[i], base, measured.get(&sites[i].module));
        done.lock().unwrap_or_else(|e| e.into_inner()).insert(i, values);
    });
    let mut out = BTreeMap::new();
    for (i, values) in done.into_inner().unwrap_or_else(|e| e.into_inner()) {
        out.extend(values?.into_iter().map(|(part, t)| (format!("{}.{part}", sites[i].module), t)));
    }
    Ok(out)
}

/// Calls `work` for every number below `count` on this many threads.
pub fn side_by_side(count: usize, threads: usize, work: impl Fn(usize) + Sync) {
    let next = std::sync::atomic::AtomicUsize::new(0);
    let run = || {
        loop {
            let i = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            if i >= count {
                return;
            }
            work(i);
        }
    };
    std::thread::scope(|s| {
        (1..threads.min(count)).for_each(|_| {
            s.spawn(run);
        });
        run();
    });
}

impl Adapter {
    /// Whether a new adapter's first values must be prepared before it can be trained.
    pub fn is_prepared(&self) -> bool {
        let prepared = |s: &Site| self.config.method.buffers(s).iter().any(|b| matches!(b.init, Init::Prepared { .. }));
        self.sites.first().is_some_and(prepared)
    }

    /// Makes what its folder does not hold but the base's weights give, on this many threads, ahead of the first read.
    pub fn recompute(&self, base: &Checkpoint, threads: usize) {
        let lazy: Vec<&Lazy> = self
            .sites
            .iter()
            .filter_map(|s| {
                s.values.values().find_map(|v| if let SlotValue::Prepared(l, _) = v { Some(&**l) } else { None })
            })
            .collect();
        side_by_side(lazy.len(), threads, |i| {
            // What goes wrong is told where the value is read.
            let _ = lazy[i].get(base, "");
        });
    }
}

/// The prepared values of one site of a folder that does not hold them, made at the first read.
pub struct Lazy {
    method: Kind,
    site: Site,
    made: OnceLock<std::result::Result<Values, String>>,
}

impl Lazy {
    /// Of this site.
    pub(crate) fn new(method: &Kind, site: &Site) -> Arc<Lazy> {
        let site = Site { values: BTreeMap::new(), ..site.clone() };
        Arc::new(Lazy { method: method.clone(), site, made: OnceLock::new() })
    }

    /// The value of a part.
    ///
    /// # Errors
    /// A weight that cannot be read or decomposed, a part that is not prepared.
    pub(super) fn get(&self, base: &Checkpoint, part: &str) -> Result<SlotTensor> {
        let made =
            self.made.get_or_init(|| site_values(&self.method, &self.site, base, None).map_err(|e| e.to_string()));
        let values = made.as_ref().map_err(|e| Error::Graph(e.clone()))?;
        values.get(part).cloned().ok_or_else(|| Error::Graph(format!("`{part}` is not prepared")))
    }
}

impl fmt::Debug for Lazy {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "Lazy({:?}, {})", self.method, self.site.module)
    }
}

impl PartialEq for Lazy {
    fn eq(&self, other: &Lazy) -> bool {
        self.site == other.site && format!("{:?}", self.method) == format!("{:?}", other.method)
    }
}
