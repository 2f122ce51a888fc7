//! A whole run: steps, evaluation, metrics, checkpoints, the final adapter; from the start or from a checkpoint.
//!
//! Everything that decides a number is in the settings, the rows, the plan and the checkpoint; clocks, threads and the
//! moment of a kill are not. At a step the order is: line of metrics, evaluation, checkpoint.

use super::adapter::{AdapterPlan, CONFIG, INITIAL, TENSORS};
use super::checkpoint::{self, State};
use super::data::{Order, Rows};
use super::events::Events;
use super::machine::Machine;
use super::metrics::{Lines, Metrics};
use super::step::{Settings, evaluate, step_with};
use crate::error::{Result, RuntimeError};
use crate::files::sync;
use crate::memory::peak_rss;
use serde_json::json;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// File of the metrics.
pub const METRICS: &str = "metrics.jsonl";
/// File of the evaluations.
pub const EVALS: &str = "eval.jsonl";

/// Where a run begins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Resume {
    /// At the start.
    #[default]
    No,
    /// At the newest checkpoint of the folder; at the start when there is none.
    Latest,
    /// At this checkpoint.
    At(PathBuf),
}

/// What is to be done.
#[derive(Clone, Debug)]
pub struct Job<'d> {
    /// Rows to train on.
    pub rows: &'d Rows,
    /// Rows to evaluate on.
    pub eval: Option<&'d Rows>,
    /// What decides the numbers.
    pub settings: Settings,
    /// The adapter.
    pub adapter: AdapterPlan,
    /// What the adapter's method changes from step to step; needed where the plan says that it does.
    pub events: Option<&'d dyn Events>,
    /// Name of the base model for the adapter's configuration.
    pub base: Option<String>,
    /// The folder for everything that is written.
    pub dir: &'d Path,
    /// Where to begin.
    pub resume: Resume,
    /// Steps between checkpoints; the last step always has one.
    pub save_every: u64,
    /// Checkpoints to keep; all without.
    pub keep: Option<u64>,
    /// Steps between evaluations; before the first step and after the last one there always is one.
    pub eval_every: Option<u64>,
    /// Bytes planned, for the metrics.
    pub planned_peak_bytes: u64,
}

/// What happens, as it happens.
#[derive(Clone, Debug)]
pub enum Event<'e> {
    /// The run goes on from this step of this checkpoint.
    Resumed(u64, &'e Path),
    /// There was no checkpoint to go on from.
    NothingToResume,
    /// A later checkpoint than the one resumed from was thrown away.
    Discarded(&'e Path),
    /// A step is done.
    Step(&'e Metrics),
    /// Mean loss over all counted targets of the evaluation rows, after this many steps.
    Evaluated(u64, f64),
    /// A checkpoint is written.
    Saved(&'e Path),
    /// Files are about to be touched; see [`checkpoint::Watch`].
    Files(&'e str),
}

/// What a run gave.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Summary {
    /// Steps that are done, those of earlier runs included.
    pub steps: u64,
    /// Steps of this run.
    pub steps_now: u64,
    /// Loss of the last step of this run.
    pub loss: Option<f64>,
    /// First and last evaluation of this run.
    pub eval: Option<(f64, f64)>,
    /// False when the watcher ended the run early.
    pub finished: bool,
}

/// Trains. `watch` hears of everything and may end the run after a step by [`ControlFlow::Break`]; a checkpoint is
/// written then.
///
/// # Errors
/// Settings that make no sense, rows without a counted target, a checkpoint of another run, what the machine refuses,
/// and what the system refuses. What was written before stays and can be resumed from.
pub fn train(
    machine: &mut dyn Machine,
    job: &Job<'_>,
    watch: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
) -> Result<Summary> {
    let s = &job.settings;
    s.check()?;
    if job.rows.report().targets == 0 {
        return Err(RuntimeError::Values("no row has a counted target; there is nothing to learn from".into()));
    }
    if job.adapter.events.is_some() && job.events.is_none() {
        let why = "the plan's method changes buffers from step to step, which this build cannot; train with one that has the compiler";
        return Err(RuntimeError::Values(why.into()));
    }
    fs::create_dir_all(job.dir).map_err(RuntimeError::io(job.dir.display().to_string()))?;
    let _alone = alone(job.dir)?;
    if job.resume == Resume::No && holds_results(job.dir) {
        let why = "holds results of another run by now; name another folder";
        return Err(RuntimeError::Values(format!("{}: {why}", job.dir.display())));
    }
    checkpoint::sweep(job.dir)?;
    let print = job.rows.fingerprint();
    let (start, fresh) = begin(machine, job, print, watch)?;
    let at = (!fresh).then_some(start);
    let mut metrics = Lines::open(&job.dir.join(METRICS), at)?;
    let mut evals = job.eval.map(|_| Lines::open(&job.dir.join(EVALS), at)).transpose()?;
    let mut order = Order::new(job.rows.len(), s.shuffle.then_some(s.seed));
    let mut sum = Summary { steps: start, ..Summary::default() };
    let mut look =
        |machine: &mut dyn Machine, sum: &mut Summary, watch: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>| {
            let (Some(rows), Some(lines)) = (job.eval, &mut evals) else { return Ok(()) };
            let loss = evaluate(machine, rows, s.batch)?;
            lines.add(&json!({"step": sum.steps, "eval_loss": loss, "targets": rows.report().targets}))?;
            lines.sync()?;
            sum.eval = Some((sum.eval.map_or(loss, |e| e.0), loss));
            let _ = watch(Event::Evaluated(sum.steps, loss));
            Ok::<(), RuntimeError>(())
        };
    if fresh {
        look(machine, &mut sum, watch)?;
    }
    let mut flow = ControlFlow::Continue(());
    while sum.steps < s.steps && flow.is_continue() {
        let clock = Instant::now();
        let stepped = step_with(machine, job.rows, &mut order, s, sum.steps, job.events)?;
        let m = Metrics {
            stepped,
            step_ms: clock.elapsed().as_secs_f64() * 1e3,
            planned_peak_bytes: job.planned_peak_bytes,
            peak_rss_bytes: peak_rss(),
        };
        metrics.add(&m.json())?;
        (sum.steps, sum.steps_now, sum.loss) = (stepped.step, sum.steps_now + 1, Some(stepped.loss));
        flow = watch(Event::Step(&m));
        let last = sum.steps == s.steps || flow.is_break();
        let done = sum.steps;
        let due = |every: u64| every > 0 && done.is_multiple_of(every);
        if last || job.eval_every.is_some_and(due) {
            look(machine, &mut sum, watch)?;
        }
        if last || due(job.save_every) {
            metrics.sync()?;
            let state = State::new(sum.steps, s, &job.adapter.config, job.rows.len(), print);
            let mut files = |what: &str| {
                let _ = watch(Event::Files(what));
            };
            let path = checkpoint::save(machine, &job.adapter, job.base.as_deref(), &state, job.dir, &mut files)?;
            // Whoever goes on from this checkpoint prepares what this run has stepped: so does this run.
            machine.derive_anew();
            let _ = watch(Event::Saved(&path));
            if let Some(n) = job.keep {
                let _ = watch(Event::Files("prune"));
                checkpoint::prune(job.dir, n)?;
            }
        }
    }
    if sum.steps >= s.steps {
        let _ = watch(Event::Files("final"));
        write_final(machine, job)?;
        let _ = watch(Event::Files("end"));
        sum.finished = true;
    }
    Ok(sum)
}

/// Brings back what a checkpoint holds. Gives the steps that are done, and whether the run is new.
fn begin(
    machine: &mut dyn Machine,
    job: &Job<'_>,
    print: u64,
    watch: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
) -> Result<(u64, bool)> {
    let path = match &job.resume {
        Resume::No => return Ok((0, true)),
        Resume::Latest => match checkpoint::list(job.dir)?.pop() {
            Some((_, path)) => path,
            None => {
                let _ = watch(Event::NothingToResume);
                return Ok((0, true));
            }
        },
        Resume::At(path) => path.clone(),
    };
    let state = checkpoint::state(&path)?;
    state.check(&job.settings, &job.adapter.config, print)?;
    checkpoint::restore(machine, &job.adapter, &path)?;
    for (step, later) in checkpoint::list(job.dir)? {
        if step > state.global_step {
            checkpoint::discard(job.dir, &later)?;
            let _ = watch(Event::Discarded(&later));
        }
    }
    // A run that was killed just before it did so left one too many.
    if let Some(n) = job.keep {
        checkpoint::prune(job.dir, n)?;
    }
    let _ = watch(Event::Resumed(state.global_step, &path));
    Ok((state.global_step, false))
}

/// Puts the adapter into the folder itself, tensors before configuration: a folder with a configuration is whole.
fn write_final(machine: &dyn Machine, job: &Job<'_>) -> Result<()> {
    let temporary = job.dir.join(".checkpoint-final.partial");
    fs::create_dir_all(&temporary).map_err(RuntimeError::io(temporary.display().to_string()))?;
    job.adapter.write(machine, job.base.as_deref(), &temporary)?;
    if job.adapter.initial.is_some() {
        let to = job.dir.join(INITIAL);
        remove_folder(&to)?;
        fs::rename(temporary.join(INITIAL), &to).map_err(RuntimeError::io(to.display().to_string()))?;
    }
    for file in [TENSORS, CONFIG] {
        let to = job.dir.join(file);
        fs::rename(temporary.join(file), &to).map_err(RuntimeError::io(to.display().to_string()))?;
    }
    fs::remove_dir(&temporary).map_err(RuntimeError::io(temporary.display().to_string()))?;
    sync(job.dir)
}

/// Whether a folder holds results of a run: what would be lost if another run wrote there.
pub fn holds_results(dir: &Path) -> bool {
    let names = [TENSORS, CONFIG, METRICS, EVALS];
    names.iter().any(|n| dir.join(n).exists()) || checkpoint::list(dir).is_ok_and(|l| !l.is_empty())
}

/// Removes the results of a run from a folder, and nothing else.
///
/// # Errors
/// What the system refuses.
pub fn remove_results(dir: &Path) -> Result<()> {
    if !dir.is_dir() {
        return Ok(());
    }
    let _alone = alone(dir)?;
    for (_, path) in checkpoint::list(dir)? {
        checkpoint::discard(dir, &path)?;
    }
    remove_folder(&dir.join(INITIAL))?;
    for name in [CONFIG, TENSORS, METRICS, EVALS] {
        match fs::remove_file(dir.join(name)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(RuntimeError::io(dir.join(name).display().to_string())(e));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Keeps other runs out of a folder while the result lives.
///
/// # Errors
/// Another run writes there.
fn alone(dir: &Path) -> Result<fs::File> {
    let folder = fs::File::open(dir).map_err(RuntimeError::io(dir.display().to_string()))?;
    match folder.try_lock() {
        Err(std::fs::TryLockError::WouldBlock) => {
            let why = "another run writes into this folder; wait for its end, or name another one";
            Err(RuntimeError::Values(format!("{}: {why}", dir.display())))
        }
        // A file system without locks has none.
        _ => Ok(folder),
    }
}

/// Removes a folder that may not be there.
fn remove_folder(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(RuntimeError::io(dir.display().to_string())(e)),
        _ => Ok(()),
    }
}
