//! LoRA: y += scale · (x · Aᵀ) · Bᵀ, with A [r, in] and B [out, r] (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large
//! Language Models"); scale = alpha / r, or alpha / √r (Kalajdzievski 2023, rsLoRA).

use std::sync::Arc;

use pleach_ir::{Op, ValueId};
use serde_json::{Value, json};

use super::method::{Buffer, Entry, Key, Method, Request, Scope};
use super::prepare::Values;
use super::start::Prepared;
use super::{Given, Init, LowRank, Measure, Site};
use crate::error::{Error, Result};
use crate::json::{Fields, brief};
use crate::peft::Target;

/// `init_lora_weights`.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Start {
    /// A uniform as a linear layer starts, B zero.
    Default,
    /// A normal with standard deviation 1 / r, B zero.
    Gaussian,
    /// Both as linear layers start: not the base model, for tests.
    Random,
    /// Prepared from the weight or from measurements.
    Prepared(Prepared),
    /// Another one, which matters to new adapters only.
    Other(String),
}

/// How LoRA is found.
pub(super) const ENTRY: Entry = Entry { name: "lora", keys: &[("peft_type", Key::Text("LORA"))], read };

/// How rsLoRA is found.
pub(super) const RS_ENTRY: Entry =
    Entry { name: "rslora", keys: &[("peft_type", Key::Text("LORA")), ("use_rslora", Key::On)], read };

/// Reads LoRA's keys.
///
/// # Errors
/// As [`Lora::read`].
pub(super) fn read(f: &mut Fields) -> Result<Arc<dyn Method>> {
    Ok(Arc::new(Lora::read(f)?))
}

/// LoRA and rsLoRA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Lora {
    rslora: bool,
    start: Start,
}

/// Fields that change what is computed, with what is missing.
const UNSUPPORTED: [(&str, &str); 14] = [
    ("lora_bias", "a bias on lora_B is not supported yet"),
    ("target_parameters", "adapters on bare parameters are not supported"),
    ("trainable_token_indices", "trained token embeddings are not supported"),
    ("alora_invocation_tokens", "activated LoRA is not supported"),
    ("use_qalora", "QA-LoRA is not supported"),
    ("velora_config", "VeLoRA is not supported"),
    ("kasa_config", "KaSA is a method of its own, which is not combined with others"),
    ("monteclora_config", "MonteCLoRA is not supported"),
    ("arrow_config", "Arrow routing is not supported"),
    ("use_bdlora", "block-diagonal LoRA is not supported"),
    ("megatron_config", "Megatron layers are not supported"),
    ("modules_to_tie", "tied adapters are not supported"),
    ("target_modules_to_tie", "tied adapters are not supported"),
    ("lora_magnitude_vector", "is no field of a configuration"),
];

/// Fields without influence on a loaded adapter.
const HARMLESS: [&str; 8] = [
    "corda_config",
    "eva_config",
    "lora_dropout",
    "lora_ga_config",
    "loftq_config",
    "megatron_core",
    "qalora_group_size",
    "use_dora",
];

impl Lora {
    /// Reads the method's own fields.
    ///
    /// # Errors
    /// A field that changes the mathematics and is not supported.
    pub(super) fn read(f: &mut Fields) -> Result<Lora> {
        Lora::read_beside(f, "")
    }

    /// The same for a method that knows one more of the fields that change the mathematics.
    ///
    /// # Errors
    /// As [`Lora::read`].
    pub(super) fn read_beside(f: &mut Fields, known: &str) -> Result<Lora> {
        for (key, why) in UNSUPPORTED.into_iter().filter(|u| u.0 != known) {
            f.must_be_off(key, why)?;
        }
        for key in HARMLESS {
            f.raw(key);
        }
        // Whether it is DoRA was asked before; here it must be a truth value.
        f.flag("use_dora")?;
        Ok(Lora { rslora: f.flag("use_rslora")?.unwrap_or(false), start: read_start(f)? })
    }

    /// The prepared start, if it has one.
    pub(super) fn prepared(&self) -> Option<&Prepared> {
        if let Start::Prepared(p) = &self.start { Some(p) } else { None }
    }

    /// Whether both factors start away from zero.
    pub(super) fn starts_away(&self) -> bool {
        self.start == Start::Random
    }

    /// A and B of a site and how they start, as PEFT's `reset_lora_parameters` has it.
    fn factors(&self, site: &Site) -> [(&'static str, [u64; 2], Init); 2] {
        let bound = |width: u64| Init::Uniform { bound: (width as f64).sqrt().recip() as f32 };
        let (a, b) = match (&self.start, site.embedding) {
            (Start::Random, true) => (Init::Normal { std: 1.0 }, Init::Normal { std: 1.0 }),
            (Start::Random, false) => (bound(site.input), bound(site.rank)),
            (_, true) => (Init::Zeros {}, Init::Normal { std: 1.0 }),
            (Start::Gaussian, false) => (Init::Normal { std: (site.rank as f64).recip() as f32 }, Init::Zeros {}),
            (_, false) => (bound(site.input), Init::Zeros {}),
        };
        [("lora_A", [site.rank, site.input], a), ("lora_B", [site.output, site.rank], b)]
    }
}

/// Initialisations that leave the base weights alone need no thought; the others make the saved tensors meaningless
/// without the changed base.
fn read_start(f: &mut Fields) -> Result<Start> {
    const KEY: &str = "init_lora_weights";
    match f.raw(KEY) {
        None | Some(Value::Bool(true)) => Ok(Start::Default),
        Some(Value::Bool(false)) => Ok(Start::Random),
        Some(Value::String(s)) if s.eq_ignore_ascii_case("gaussian") => Ok(Start::Gaussian),
        Some(Value::String(s)) if matches!(s.as_str(), "orthogonal" | "mica") => Ok(Start::Other(s.clone())),
        Some(Value::String(s)) if s == "loftq" => {
            let what = "is \"loftq\": it starts from base weights in 2 to 8 bits, which are not supported; with PEFT, save the adapter's \
                        own base and train on that with true";
            Err(f.fault(KEY, what))
        }
        Some(value) => {
            let name = value.as_str().unwrap_or_default();
            match Prepared::read(name, f)? {
                Some(start) => Ok(Start::Prepared(start)),
                None => Err(f.fault(
                    KEY,
                    format!(
                        "is {}; known are true, false, gaussian, pissa, pissa_niter_N, olora, corda, lora_ga and eva, of adapters that \
                         are made already orthogonal and mica too. If its start changes the base weights, save the adapter with PEFT's \
                         `path_initial_model_for_weight_conversion` to get one for the original base",
                        brief(value)
                    ),
                )),
            }
        }
    }
}

impl Method for Lora {
    fn name(&self) -> &'static str {
        match self.prepared() {
            Some(p) => p.name(),
            None if self.rslora => "rslora",
            None => "lora",
        }
    }

    fn formula(&self) -> &'static str {
        match self.prepared() {
            Some(p) => p.formula(),
            None if self.rslora => "y = x·Wᵀ + alpha/√r · (x·Aᵀ)·Bᵀ",
            None => "y = x·Wᵀ + alpha/r · (x·Aᵀ)·Bᵀ",
        }
    }

    fn peft_type(&self) -> &'static str {
        "LORA"
    }

    fn scale(&self, rank: u64, alpha: f64) -> f64 {
        if self.rslora { alpha / (rank as f64).sqrt() } else { alpha / rank as f64 }
    }

    fn buffers(&self, site: &Site) -> Vec<Buffer> {
        let file = |part: &str| match (part, site.embedding) {
            ("lora_A", false) => "lora_A.weight",
            ("lora_A", true) => "lora_embedding_A",
            (_, false) => "lora_B.weight",
            (_, true) => "lora_embedding_B",
        };
        let factor =
            |(part, shape, init): (&'static str, [u64; 2], Init)| Buffer::trained(part, file(part), &shape, init);
        let list = self.factors(site).into_iter().map(factor).chain([Buffer::constant("scale", site.scale)]).collect();
        match self.prepared() {
            Some(p) => p.buffers(list),
            None => list,
        }
    }

    fn attach(&self, target: &Target) -> std::result::Result<(), String> {
        self.prepared().map_or(Ok(()), |p| p.attach(target))
    }

    fn requests(&self, _site: &Site) -> Vec<Request> {
        self.prepared().map_or(vec![], |p| p.requests())
    }

    fn measure(&self, m: &mut Measure, x: ValueId) -> Result<()> {
        self.prepared().map_or(Ok(()), |p| p.measure(m, x))
    }

    fn prepare(&self, given: &Given) -> Result<Values> {
        let nothing = || Error::Graph(format!("there is nothing to prepare at {}", given.site.module));
        self.prepared().ok_or_else(nothing)?.values(given)
    }

    fn repeatable(&self) -> std::result::Result<(), &'static str> {
        self.prepared().map_or(Ok(()), |p| p.repeatable())
    }

    fn note(&self) -> Option<&'static str> {
        self.prepared().and_then(|p| p.note())
    }

    fn initial_config(&self) -> Vec<(&'static str, Value)> {
        vec![("init_lora_weights", json!(true))]
    }

    fn low_rank(&self, s: &mut Scope) -> Result<Option<LowRank>> {
        self.prepared().map(|p| p.low_rank(s)).transpose()
    }

    fn weight(&self, s: &mut Scope, weight: ValueId) -> Result<ValueId> {
        self.prepared().map_or(Ok(weight), |p| p.weight(s, weight))
    }

    fn output(&self, s: &mut Scope, x: ValueId, _weight: ValueId, mut terms: Vec<ValueId>) -> Result<Vec<ValueId>> {
        terms.push(branch(s, x)?);
        Ok(terms)
    }

    fn check_training(&self) -> std::result::Result<(), (&'static str, String)> {
        match &self.start {
            Start::Prepared(p) => p.check_training(),
            Start::Other(name) => {
                let what = format!(
                    "is \"{name}\": adapters that PEFT started so are read, but a new one starts with true, false, gaussian, pissa, \
                     pissa_niter_N, olora, corda, lora_ga or eva"
                );
                Err(("init_lora_weights", what))
            }
            _ => Ok(()),
        }
    }

    fn config(&self) -> Vec<(&'static str, Value)> {
        let start = match &self.start {
            Start::Default => json!(true),
            Start::Random => json!(false),
            Start::Gaussian => json!("gaussian"),
            Start::Other(name) => json!(name),
            Start::Prepared(_) => Value::Null,
        };
        let own = self.prepared().map_or(vec![("init_lora_weights", start)], |p| p.config());
        let rest = [("lora_dropout", json!(0.0)), ("use_dora", json!(false)), ("use_rslora", json!(self.rslora))];
        own.into_iter().chain(rest).collect()
    }
}

/// The branch of one site, [T, out]. Beside a linear layer x is [T, in]; beside an embedding it is the i32 index [T], and
/// the token's column of A takes the place of x · Aᵀ.
pub(super) fn branch(s: &mut Scope, x: ValueId) -> Result<ValueId> {
    let (down, up, scale) = (s.buffer("lora_A")?, s.buffer("lora_B")?, s.buffer("scale")?);
    let narrow = if s.site().embedding {
        let table = s.push(Op::Transpose(vec![1, 0]), &[down])?;
        s.push(Op::Gather { axis: 0 }, &[table, x])?
    } else {
        s.push(Op::MatMul { ta: false, tb: true }, &[x, down])?
    };
    let wide = s.push(Op::MatMul { ta: false, tb: true }, &[narrow, up])?;
    s.mul(scale, wide)
}

/// What a method that computes what LoRA does takes over from its field `lora`.
macro_rules! like_lora {
    () => {
        like_lora!(except buffers);

        fn buffers(&self, site: &Site) -> Vec<Buffer> {
            self.lora.buffers(site)
        }
    };
    (except buffers) => {
        like_lora!(except buffers output);

        fn output(&self, s: &mut Scope, x: ValueId, weight: ValueId, terms: Vec<ValueId>) -> Result<Vec<ValueId>> {
            self.lora.output(s, x, weight, terms)
        }
    };
    (except buffers output) => {
        like_lora!(except buffers output prepared);

        fn weight(&self, s: &mut Scope, weight: ValueId) -> Result<ValueId> {
            self.lora.weight(s, weight)
        }

        fn requests(&self, site: &Site) -> Vec<$crate::adapter::Request> {
            self.lora.requests(site)
        }

        fn measure(&self, m: &mut $crate::adapter::Measure, x: ValueId) -> Result<()> {
            self.lora.measure(m, x)
        }

        fn prepare(&self, given: &$crate::adapter::Given) -> Result<$crate::adapter::prepare::Values> {
            self.lora.prepare(given)
        }

        fn repeatable(&self) -> std::result::Result<(), &'static str> {
            self.lora.repeatable()
        }

        fn note(&self) -> Option<&'static str> {
            self.lora.note()
        }

        fn initial_config(&self) -> Vec<(&'static str, Value)> {
            self.lora.initial_config()
        }

        fn low_rank(&self, s: &mut Scope) -> Result<Option<$crate::adapter::LowRank>> {
            self.lora.low_rank(s)
        }

        fn config(&self) -> Vec<(&'static str, Value)> {
            self.lora.config()
        }
    };
    (except buffers output prepared) => {
        fn peft_type(&self) -> &'static str {
            self.lora.peft_type()
        }

        fn scale(&self, rank: u64, alpha: f64) -> f64 {
            self.lora.scale(rank, alpha)
        }

        fn check_training(&self) -> std::result::Result<(), (&'static str, String)> {
            self.lora.check_training()
        }
    };
}
pub(super) use like_lora;
