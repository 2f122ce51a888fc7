//! What `train`, `plan` and `bench train` share: a training plan for a model and a method, its memory, its session.

use crate::args::{self, MethodArgs, ModelArgs, ShapeArgs, Size};
use crate::failure::{Failure, Result};
use crate::ready::{self, Ready};
use crate::report::{Ui, bytes};
#[cfg(feature = "compiler")]
use pleach_frontend::ModelConfig;
use pleach_runtime::train::{AdapterPlan, Measured, initial_values};
use pleach_runtime::{Memory, Options, Session, Weights, plan_memory};

/// A training plan with everything around it.
pub(crate) struct Training {
    /// Plan and model.
    pub ready: Ready,
    /// The adapter being trained.
    pub adapter: AdapterPlan,
    /// Rows of a micro-batch at capacity.
    pub batch: u64,
    /// Tokens of a row at capacity.
    pub max_length: u64,
    /// Whether the adapter is new; else it is the model's first one.
    pub fresh: bool,
}

/// Tokens of a row when nothing is said.
const LENGTH: u64 = 512;

/// Entries that a training plan must have, but for those of a step; and those.
const ENTRIES: [&str; 1] = ["evaluate"];
const OF_A_STEP: [&str; 3] = ["accumulate", "update", "step"];

impl Training {
    /// Finds, reads or compiles the plan.
    ///
    /// # Errors
    /// Files and options that are refused, and whatever compiling refuses.
    pub(crate) fn open(ui: &Ui, model: &ModelArgs, method: &MethodArgs, shape: &ShapeArgs) -> Result<Training> {
        let start = args::start(model).map_err(Failure::usage)?;
        if model.merge {
            return Err(Failure::usage("--merge is for running: what is trained cannot be folded into the weights"));
        }
        let ready = if ready::looks_like_a_plan(&model.model) {
            if method.any() {
                return Err(Failure::usage("a compiled plan has its method; leave out --method and its options"));
            }
            let ready = ready::from_plan(ui, model, &ENTRIES, &OF_A_STEP)?;
            let has = |names: &[&str]| names.iter().all(|n| ready.plan.entry(n).is_ok());
            if !(has(&["accumulate", "update"]) || has(&["step"]) && shape.one_run_a_step()) {
                return Err(Failure::usage(if has(&["step"]) {
                    "the plan makes a step of one micro-batch without clipping; train from the model folder for --accum or --max-grad-norm"
                } else {
                    "the plan does not train; give a model folder"
                }));
            }
            ready
        } else {
            ready::no_weights(model)?;
            compile(ui, model, method, shape)?
        };
        let adapter = AdapterPlan::of(&ready.plan)?;
        let limit = ready.plan.meta.max_positions;
        let max_length = length(shape, limit);
        if limit > 0 && max_length > limit {
            return Err(Failure::usage(format!(
                "--max-length {} is more than the {limit} positions the model was made for",
                max_length
            )));
        }
        Ok(Training { ready, adapter, batch: shape.batch, max_length, fresh: start.is_none() })
    }

    /// What a session is opened with.
    pub(crate) fn options(&self, ui: &Ui) -> Options {
        let tokens = self.batch.saturating_mul(self.max_length);
        let o = Options::default().threads(ui.threads);
        o.capacity("T", tokens)
            .capacity("S", self.batch)
            .capacity("L", tokens)
            .capacity("P", self.max_length)
            .capacity("C", 1)
    }

    /// What a session will hold.
    ///
    /// # Errors
    /// Sizes without a value.
    pub(crate) fn memory(&self, ui: &Ui, weights: &Weights) -> Result<Memory> {
        Ok(plan_memory(&self.ready.plan, &**weights, &self.options(ui))?)
    }

    /// Opens the session and gives the adapter its first values.
    ///
    /// # Errors
    /// What the runtime refuses, an adapter that does not fit.
    pub(crate) fn session(&self, ui: &Ui, weights: Weights, seed: u64, measured: &Measured) -> Result<Session> {
        let mut session = Session::open(self.ready.plan.clone(), weights.clone(), &self.options(ui))?;
        crate::ready::note_missing(ui, &session);
        if self.fresh {
            let values = initial_values(&self.adapter, &*weights, seed, measured)?;
            session.load_slot(self.adapter.slot, &values)?;
        } else {
            crate::model::fill_slots(&mut session, &self.ready.model)?;
        }
        Ok(session)
    }
}

impl MethodArgs {
    /// Whether anything was asked for.
    pub(crate) fn any(&self) -> bool {
        format!("{self:?}") != format!("{:?}", MethodArgs::default())
    }
}

/// Tokens of a row: as asked for, else what is usual and the model can take. 0 positions mean any number.
fn length(shape: &ShapeArgs, positions: u64) -> u64 {
    let most = if positions == 0 { u64::MAX } else { positions };
    shape.max_length.unwrap_or(LENGTH.min(most))
}

/// The smallest total of the plans there are for a model, a method and a shape: as it comes, and with as little kept as
/// possible. A compiled plan is what it is.
///
/// # Errors
/// As [`Training::open`].
pub(crate) fn minimum(ui: &Ui, model: &ModelArgs, method: &MethodArgs, shape: &ShapeArgs) -> Result<u64> {
    let quiet = Ui { quiet: true, ..*ui };
    let mut least = u64::MAX;
    for budget in [None, Some(Size(0))] {
        let t = Training::open(&quiet, model, method, &ShapeArgs { budget, ..shape.clone() })?;
        least = least.min(t.memory(ui, &t.ready.weights()?)?.total());
    }
    Ok(least)
}

/// Refuses a plan that does not fit into the budget of `shape`.
///
/// # Errors
/// What is needed at least.
pub(crate) fn within_budget(total: u64, budget: Option<Size>, minimum: impl FnOnce() -> Result<u64>) -> Result<()> {
    match budget {
        Some(Size(b)) if total > b => {
            let minimum = minimum()?.min(total);
            Err(Failure::new(format!(
                "a budget of {} ({b} bytes) is too small: at least {} ({minimum} bytes) are needed; lower --batch, \
                 --max-length or --r, or raise --budget",
                bytes(b),
                bytes(minimum)
            )))
        }
        _ => Ok(()),
    }
}

#[cfg(feature = "compiler")]
fn compile(ui: &Ui, model: &ModelArgs, method: &MethodArgs, shape: &ShapeArgs) -> Result<Ready> {
    let request = request(model, method, shape)?;
    let (_, ready) = ready::compile(ui, model, &["train", "evaluate"], &[], Some(request))?;
    if !ready.origin.cached {
        ui.note(&format!("compiled in {:.0} ms", ready.origin.ms));
    }
    Ok(ready)
}

#[cfg(not(feature = "compiler"))]
fn compile(_: &Ui, model: &ModelArgs, _: &MethodArgs, _: &ShapeArgs) -> Result<Ready> {
    Err(Failure::usage(format!(
        "{}: this build has no compiler and trains from plans only (F.pleach with --weights MODEL)",
        model.model.display()
    )))
}

/// What is to be compiled: a new adapter of the method, or the folder's.
///
/// # Errors
/// A method that is missing, unknown, or contradicts the adapter's folder.
#[cfg(feature = "compiler")]
pub(crate) fn request(model: &ModelArgs, method: &MethodArgs, shape: &ShapeArgs) -> Result<crate::pipeline::TrainPart> {
    let config = match args::start(model).map_err(Failure::usage)? {
        None => {
            let (name, keys) = method.fresh()?;
            pleach_frontend::peft::MethodConfig::named(&name, &keys)?.raw
        }
        Some(start) => {
            let config = pleach_frontend::peft::MethodConfig::read(&start.path)?;
            method.agrees(&config)?;
            config.check_training()?;
            serde_json::Map::new()
        }
    };
    let limit = match pleach_frontend::Checkpoint::open(&model.model)?.config {
        ModelConfig::Llama(c) => c.max_positions,
        ModelConfig::Bert(c) => c.max_positions,
    };
    let positions = length(shape, limit);
    Ok(crate::pipeline::TrainPart {
        config,
        tokens: shape.batch.saturating_mul(positions),
        sequences: shape.batch,
        positions,
        budget: shape.budget.map(|b| b.0),
        at_once: shape.one_run_a_step(),
        calibrated: vec![],
    })
}
