//! From arguments to a plan that can be run: read from a file, found in the cache, or compiled.

#[cfg(feature = "compiler")]
use crate::args::Target;
use crate::args::{Count, ModelArgs};
#[cfg(feature = "compiler")]
use crate::blocks::Compare;
use crate::failure::{Failure, Result};
#[cfg(feature = "models")]
use crate::model::{self, Model};
use crate::report::Ui;
use pleach_plan::Plan;
#[cfg(not(feature = "models"))]
use pleach_runtime::open_weights;
use pleach_runtime::{Options, Session, Weights};
use std::path::Path;
#[cfg(not(feature = "models"))]
use std::path::PathBuf;
use std::sync::Arc;
#[cfg(feature = "compiler")]
use std::time::Instant;

/// A plan with where its weights, adapters and texts come from.
pub(crate) struct Ready {
    /// The plan.
    pub plan: Arc<Plan>,
    /// Where the weights are.
    #[cfg(not(feature = "models"))]
    pub folder: PathBuf,
    /// The opened folder.
    #[cfg(feature = "models")]
    pub model: Model,
    /// The blocks of the weights that the plan reads have been compared with the weights.
    pub blocks_compared: bool,
    /// How the plan was come by.
    #[cfg(feature = "compiler")]
    pub origin: Origin,
}

/// How a plan was come by.
#[cfg(feature = "compiler")]
#[derive(Clone, Debug, Default)]
pub(crate) struct Origin {
    /// Found in the cache.
    pub cached: bool,
    /// Time until the plan was there, milliseconds.
    pub ms: f64,
    /// Report of the compilation.
    pub rows: Vec<crate::pipeline::Row>,
}

/// Makes a plan with these entries ready. `tokens` are the counts that entries are tuned for.
///
/// # Errors
/// Files that are refused, a plan without an entry, and whatever compiling refuses.
pub(crate) fn ready(ui: &Ui, args: &ModelArgs, entries: &[&str], tokens: &[(String, u64)]) -> Result<Ready> {
    if looks_like_a_plan(&args.model) {
        return from_plan(ui, args, entries, &[]);
    }
    no_weights(args)?;
    from_model(ui, args, entries, tokens)
}

/// Refuses `--weights` beside a model folder.
pub(crate) fn no_weights(args: &ModelArgs) -> Result<()> {
    if args.weights.is_some() {
        return Err(Failure::usage("--weights goes with a compiled plan (F.pleach); a model folder has its own"));
    }
    Ok(())
}

/// True for a file that is to be taken for a compiled plan.
pub(crate) fn looks_like_a_plan(path: &Path) -> bool {
    let mut head = [0; 8];
    let mut read = || std::fs::File::open(path).and_then(|mut f| std::io::Read::read_exact(&mut f, &mut head));
    path.extension().is_some_and(|e| e == "pleach") || (path.is_file() && read().is_ok() && &head == pleach_plan::MAGIC)
}

/// Reads a plan that has these entries. It is left with them, with those of `more` that it has, and with its preparations: what a command
/// does not run takes no memory.
pub(crate) fn from_plan(ui: &Ui, args: &ModelArgs, entries: &[&str], more: &[&str]) -> Result<Ready> {
    #[cfg(feature = "compiler")]
    let clock = Instant::now();
    let within = |e: pleach_plan::PlanError| Failure::from(e).within(&args.model.display().to_string());
    let mut plan = match Plan::read(&args.model) {
        Err(e @ pleach_plan::PlanError::Io { .. }) => return Err(e.into()),
        other => other.map_err(within)?,
    };
    for e in entries {
        plan.entry(e).map_err(|e| Failure::from(e).within("compile it with --entry"))?;
    }
    let runs = |name: &str| entries.contains(&name) || more.contains(&name);
    plan.entries.retain(|e| e.prepares().is_some() || runs(&e.name));
    let folder = args.weights.clone().ok_or_else(|| {
        Failure::usage("a compiled plan holds no weights: give the model folder with --weights MODEL")
    })?;
    let merged = plan.meta.extra.get("merged").and_then(serde_json::Value::as_bool).unwrap_or(false);
    if args.merge && !merged {
        return Err(Failure::usage("--merge is decided when a plan is compiled; compile it with --merge"));
    }
    if args.no_blocks && plan.params.iter().any(|p| matches!(p.layout, pleach_plan::Layout::Blocks(_))) {
        return Err(Failure::usage("--no-blocks is decided when a plan is compiled; compile it with --no-blocks"));
    }
    #[cfg(feature = "models")]
    let model = Model::open(&folder, &args.adapter)?;
    #[cfg(not(feature = "models"))]
    if !args.adapter.is_empty() {
        return Err(Failure::usage("this build reads no adapters; build it with the feature `models`"));
    }
    #[cfg(feature = "compiler")]
    let blocks_compared = crate::blocks::compared(ui, &model, &plan, !args.no_cache)?;
    #[cfg(not(feature = "compiler"))]
    let (blocks_compared, _) = (false, ui);
    Ok(Ready {
        plan: Arc::new(plan),
        blocks_compared,
        #[cfg(not(feature = "models"))]
        folder,
        #[cfg(feature = "models")]
        model,
        #[cfg(feature = "compiler")]
        origin: Origin { ms: clock.elapsed().as_secs_f64() * 1e3, ..Origin::default() },
    })
}

#[cfg(not(feature = "compiler"))]
fn from_model(_: &Ui, args: &ModelArgs, _: &[&str], _: &[(String, u64)]) -> Result<Ready> {
    Err(Failure::usage(format!(
        "{}: this build has no compiler and runs plans only (F.pleach with --weights MODEL)",
        args.model.display()
    )))
}

#[cfg(feature = "compiler")]
fn from_model(ui: &Ui, args: &ModelArgs, entries: &[&str], tokens: &[(String, u64)]) -> Result<Ready> {
    on_this_machine(args)?;
    let (_, ready) = compile(ui, args, entries, tokens, None)?;
    if !ready.origin.cached {
        ui.note(&format!("compiled in {:.0} ms", ready.origin.ms));
    }
    Ok(ready)
}

/// Refuses to compile for a GPU what is to run here, before any work, where this machine has no GPU that runs it.
///
/// # Errors
/// No driver, no GPU, or another.
#[cfg(feature = "compiler")]
pub(crate) fn on_this_machine(args: &ModelArgs) -> Result<()> {
    match args.target {
        Target::Sm80 => Ok(pleach_runtime::cuda::runs("sm_80")?),
        Target::Sm90a => Ok(pleach_runtime::cuda::runs("sm_90a")?),
        // Asked for when the request is made, or no GPU's.
        Target::Cuda | Target::Cpu | Target::Avx2 | Target::Avx512 => Ok(()),
    }
}

/// Finds or compiles the plan of a model folder, for training if so asked. The slot holds the plan's file as long as it lives.
///
/// # Errors
/// Files that are refused, and whatever compiling refuses.
#[cfg(feature = "compiler")]
pub(crate) fn compile(
    ui: &Ui,
    args: &ModelArgs,
    entries: &[&str],
    tokens: &[(String, u64)],
    train: Option<crate::pipeline::TrainPart>,
) -> Result<(crate::cache::Slot, Ready)> {
    let request = crate::pipeline::Request { train, ..crate::pipeline::Request::new(ui, args, entries, tokens)? };
    compile_as(ui, args, request, Compare::All)
}

/// [`compile`] of a request as it is.
///
/// # Errors
/// As [`compile`].
#[cfg(feature = "compiler")]
pub(crate) fn compile_as(
    ui: &Ui,
    args: &ModelArgs,
    request: crate::pipeline::Request,
    compare: Compare,
) -> Result<(crate::cache::Slot, Ready)> {
    use crate::cache::Slot;
    use crate::pipeline::Request;
    let clock = Instant::now();
    let model = request.open()?;
    let mut request = request.in_blocks(ui, args, &model, compare)?;
    let place = |r: &Request| -> Result<Slot> { Slot::new(&r.key(&model, &r.import(&model)?)?, !args.no_cache) };
    let mut slot = place(&request)?;
    let mut found = if args.no_cache { None } else { slot.find() };
    let both = ["infer", "generate"];
    if found.is_none() && !args.no_cache && model.checkpoint.config.is_decoder() && request.entries.len() == 1 {
        // A plan with more entries does as well.
        let other = place(&Request { entries: both.map(String::from).to_vec(), ..request.clone() })?;
        found = other.find();
        if found.is_some() {
            slot = other;
        }
    }
    let cached = found.is_some();
    let (plan, rows) = match found {
        Some(x) => x,
        None => {
            slot = slot.writable()?;
            request.out.clone_from(&slot.plan);
            let rows = crate::child::compile(&request).map_err(|e| slot.explain(e))?;
            slot.keep_rows(&rows);
            (Plan::read(&slot.plan)?, rows)
        }
    };
    let origin = Origin { cached, ms: clock.elapsed().as_secs_f64() * 1e3, rows };
    let blocks_compared = compare == Compare::All && !request.blocks.is_empty();
    Ok((slot, Ready { plan: Arc::new(plan), model, blocks_compared, origin }))
}

impl Ready {
    /// The weights, mapped.
    ///
    /// # Errors
    /// Files that cannot be opened.
    pub(crate) fn weights(&self) -> Result<Weights> {
        #[cfg(feature = "models")]
        return self.model.weights();
        #[cfg(not(feature = "models"))]
        Ok(open_weights(&self.folder)?)
    }

    /// Opens a session with these capacities, where `given` goes before `needed`, and fills the slots.
    ///
    /// # Errors
    /// What the runtime refuses, and adapters that do not fit.
    pub(crate) fn session(&self, ui: &Ui, given: &[Count], needed: &[(&str, u64)]) -> Result<Session> {
        self.session_with(ui, given, needed, self.weights()?)
    }

    /// As [`Ready::session`], with other weights.
    ///
    /// # Errors
    /// As [`Ready::session`].
    pub(crate) fn session_with(
        &self,
        ui: &Ui,
        given: &[Count],
        needed: &[(&str, u64)],
        weights: Weights,
    ) -> Result<Session> {
        let mut options = Options::default().threads(ui.threads);
        options.blocks_compared = self.blocks_compared;
        for (symbol, value) in needed {
            options = options.capacity(symbol, (*value).max(1));
        }
        for c in given {
            options = options.capacity(&c.symbol, c.value);
        }
        #[allow(unused_mut, reason = "slots are filled only where adapters can be read")]
        let mut session = Session::open(self.plan.clone(), weights, &options)?;
        note_missing(ui, &session);
        #[cfg(feature = "models")]
        model::fill_slots(&mut session, &self.model)?;
        #[cfg(feature = "models")]
        let filled = self.model.adapters.len();
        #[cfg(not(feature = "models"))]
        let filled = 0;
        note_empty(ui, &self.plan.slots(), filled);
        Ok(session)
    }

    /// Refuses sequences that are longer than an encoder's table of positions.
    ///
    /// # Errors
    /// How long they are, and may be.
    pub(crate) fn takes(&self, longest: u64) -> Result<()> {
        let limit = self.plan.meta.max_positions;
        match self.is_encoder() && longest > limit {
            true => Err(Failure::usage(format!("a sequence has {longest} tokens; the model takes at most {limit}"))),
            false => Ok(()),
        }
    }

    /// Whether the model is an encoder.
    pub(crate) fn is_encoder(&self) -> bool {
        self.plan.meta.kind == "encoder"
    }
}

/// Says which slots of a plan have no adapter: those were compiled for one, and compute the base model without.
fn note_empty(ui: &Ui, slots: &[u32], filled: usize) {
    let empty: Vec<String> = slots.iter().skip(filled).map(u32::to_string).collect();
    let (names, give) = (empty.join(", "), "give the adapter with --adapter");
    match (empty.len(), filled) {
        (0, _) => {}
        (1, 0) => ui.note(&format!("note: slot {names} of the plan is empty, so this is the base model; {give}")),
        (1, _) => ui.note(&format!("note: slot {names} of the plan is empty; {give}")),
        (_, 0) => ui.note(&format!("note: slots {names} of the plan are empty, so this is the base model; {give}")),
        _ => ui.note(&format!("note: slots {names} of the plan are empty; {give}")),
    }
}

/// Says what the plan would make use of and the machine lacks.
pub(crate) fn note_missing(ui: &Ui, session: &Session) {
    if let Some(why) = session.missing() {
        ui.note(&format!("{why}. The plan's own kernels run instead of its products"));
    }
}
