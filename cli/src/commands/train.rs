//! `pleach train`: rows in; an adapter, checkpoints and metrics out.

use crate::args::{LogKind, ScheduleName, TrainArgs};
use crate::failure::{Failure, Result};
use crate::profile;
use crate::report::{self, Ui, bytes, count};
use crate::rows;
use crate::tensorboard::{self, Events};
use crate::training::{Training, minimum, within_budget};
use indicatif::{ProgressBar, ProgressStyle};
use pleach_runtime::train::{self, Event, Job, Metrics, Resume, Rows, Schedule, Settings, Summary, checkpoint};
use pleach_runtime::{Session, give_back};
use serde_json::json;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

/// Trains.
///
/// # Errors
/// Files and options that are refused, rows that are none, and whatever the run refuses.
pub(crate) fn train(ui: &Ui, args: &TrainArgs) -> Result<()> {
    let resume = prepare_folder(args)?;
    #[cfg(feature = "compiler")]
    if !crate::ready::looks_like_a_plan(&args.model.model) {
        crate::ready::on_this_machine(&args.model)?;
    }
    let training = Training::open(ui, &args.model, &args.method, &args.shape)?;
    let vocab = training.ready.plan.meta.vocab;
    let folder = args.model.folder();
    let data = rows::read(&args.data, folder, vocab, training.max_length)?;
    data.notes().iter().for_each(|n| ui.note(n));
    let eval = args.eval.as_ref().map(|p| rows::read(p, folder, vocab, training.max_length)).transpose()?;
    if let Some(e) = &eval {
        e.notes().iter().for_each(|n| ui.note(&format!("evaluation: {n}")));
    }
    // Tokenizers are gone; what they took must not count beside the session.
    give_back();
    let dtype = training.ready.plan.meta.extra.get("dtype").and_then(serde_json::Value::as_str);
    let settings = settings(args, &data.rows, training.max_length, dtype)?;
    let weights = training.ready.weights()?;
    let memory = training.memory(ui, &weights)?;
    let least = || minimum(ui, &args.model, &args.method, &args.shape);
    within_budget(memory.total(), args.shape.budget, least)?;
    let goes_on = match &resume {
        Resume::No => false,
        Resume::Latest => !checkpoint::list(&args.out)?.is_empty(),
        Resume::At(_) => true,
    };
    let measured = super::measure::measured(ui, &training, goes_on)?;
    let mut session = training.session(ui, weights, args.seed, &measured)?;
    // Nothing old goes before everything that can be refused was looked at, nor before the adapter was read.
    if args.overwrite {
        train::remove_results(&args.out)?;
        tensorboard::remove(&args.out)?;
    }
    ui.note(&format!(
        "{} trained values; planned {} for weights, adapter, optimizer and activations",
        count(training.adapter.trained()),
        bytes(memory.total())
    ));
    #[cfg(feature = "compiler")]
    let events = crate::events::MethodEvents::of(&training.adapter)?;
    let job = Job {
        rows: &data.rows,
        eval: eval.as_ref().map(|e| &e.rows),
        settings,
        adapter: training.adapter.clone(),
        #[cfg(feature = "compiler")]
        events: events.as_ref().map(|e| e as &dyn train::Events),
        #[cfg(not(feature = "compiler"))]
        events: None,
        base: Some(folder.to_string_lossy().into_owned()),
        dir: &args.out,
        resume,
        save_every: args.save_every,
        keep: args.keep,
        eval_every: args.eval_every,
        planned_peak_bytes: memory.total(),
    };
    session.set_profile(args.profile.is_some());
    // What opening took does not count beside the steps.
    give_back();
    let clock = Instant::now();
    let sum = run(ui, args, &mut session, &job)?;
    let seconds = clock.elapsed().as_secs_f64();
    if let Some(file) = &args.profile {
        profile::write(ui, &session, "pleach train", file)?;
    }
    done(ui, args, &sum, seconds, memory.total());
    Ok(())
}

/// Where the run begins. A folder with results is refused unless they are to go or to be gone on from.
fn prepare_folder(args: &TrainArgs) -> Result<Resume> {
    let out = &args.out;
    if out.exists() && !out.is_dir() {
        return Err(Failure::usage(format!("{}: is a file; --out names a folder", out.display())));
    }
    if let Some(a) = args.model.adapter.iter().find(|a| args.overwrite && is_result(&a.path, out)) {
        let why = "is where training starts, and --overwrite would remove it; --out names another folder";
        return Err(Failure::usage(format!("{}: {why}", a.path.display())));
    }
    let resume = match args.resume.as_deref() {
        None => Resume::No,
        Some(latest) if latest == "latest" => Resume::Latest,
        Some(dir) => {
            let path = Path::new(dir);
            // A step's folder by its name alone lies in --out.
            let inside = out.join(path);
            let path = if !path.is_dir() && inside.is_dir() { inside } else { path.to_owned() };
            // Said before anything is compiled.
            checkpoint::state(&path)?;
            Resume::At(path)
        }
    };
    if resume == Resume::No && !args.overwrite && train::holds_results(out) {
        return Err(Failure::new(format!(
            "{}: holds results of a run; go on with --resume, replace them with --overwrite, or name another folder",
            out.display()
        )));
    }
    Ok(resume)
}

/// Whether a folder is that of a run, or one of its checkpoints.
fn is_result(path: &Path, out: &Path) -> bool {
    let (Ok(path), Ok(out)) = (path.canonicalize(), out.canonicalize()) else { return false };
    let inside = path.strip_prefix(&out).ok().map(|rest| rest.to_string_lossy().into_owned());
    inside.is_some_and(|rest| rest.is_empty() || rest.starts_with("checkpoint-"))
}

/// What decides the numbers.
fn settings(args: &TrainArgs, rows: &Rows, max_length: u64, dtype: Option<&str>) -> Result<Settings> {
    let (batch, accum) = (args.shape.batch, args.shape.accum);
    let epochs = args.epochs.unwrap_or(1.0);
    if !(epochs.is_finite() && epochs > 0.0) {
        return Err(Failure::usage("--epochs must be above 0"));
    }
    let s = Settings {
        batch,
        accum,
        steps: args.max_steps.unwrap_or_else(|| Settings::steps_of(epochs, rows.len(), batch, accum)),
        max_length,
        seed: args.seed,
        shuffle: !args.no_shuffle,
        lr: args.lr,
        schedule: match args.schedule {
            ScheduleName::Constant => Schedule::Constant,
            ScheduleName::Linear => Schedule::Linear,
            ScheduleName::Cosine => Schedule::Cosine,
        },
        warmup: args
            .warmup
            .parse()
            .map_err(|e: pleach_runtime::RuntimeError| Failure::usage(format!("--warmup: {e}")))?,
        weight_decay: args.weight_decay,
        max_grad_norm: args.shape.max_grad_norm,
        dtype: dtype.map(str::to_owned),
        ..Settings::default()
    };
    s.check().map_err(|e| Failure::usage(e.to_string()))?;
    Ok(s)
}

/// Runs the job and shows what happens.
fn run(ui: &Ui, args: &TrainArgs, session: &mut Session, job: &Job<'_>) -> Result<Summary> {
    let mut show = Show {
        ui: *ui,
        bar: ui.progress(job.settings.steps, ""),
        events: None,
        log: args.log.contains(&LogKind::Tensorboard).then_some(job.dir),
        per_epoch: job.rows.len() as f64 / (job.settings.batch * job.settings.accum) as f64,
        every: (job.settings.steps / 20).max(1),
        steps: job.settings.steps,
        fault: None,
    };
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} [{elapsed}<{eta}]") {
        show.bar.set_style(style);
    }
    let done = train::train(session, job, &mut |e| show.event(&e));
    show.bar.finish_and_clear();
    match (done, show.fault) {
        (Err(e), _) => Err(e.into()),
        (_, Some(e)) => Err(e),
        (Ok(sum), None) => Ok(sum),
    }
}

/// Progress and events.
struct Show<'d> {
    ui: Ui,
    bar: ProgressBar,
    events: Option<Events>,
    /// Folder of the event files, when they are wanted.
    log: Option<&'d Path>,
    /// Steps of an epoch.
    per_epoch: f64,
    /// Steps between lines where no bar is shown.
    every: u64,
    steps: u64,
    fault: Option<Failure>,
}

impl Show<'_> {
    fn event(&mut self, e: &Event<'_>) -> ControlFlow<()> {
        match e {
            Event::Resumed(step, path) => {
                self.say(&format!("going on from step {step} ({})", path.display()));
                self.bar.set_position(*step);
                Ok(())
            }
            Event::NothingToResume => {
                self.say("there is no checkpoint to resume from: starting anew");
                Ok(())
            }
            Event::Discarded(path) => {
                self.say(&format!("{}: thrown away, it is later than the step resumed from", path.display()));
                Ok(())
            }
            Event::Step(m) => self.step(m),
            Event::Evaluated(step, loss) => {
                self.say(&format!("evaluation after {step} steps: loss {loss:.4}"));
                self.begin(*step).and_then(|()| self.write(*step, &[("eval/loss", *loss)]))
            }
            Event::Saved(_) | Event::Files(_) => Ok(()),
        }
        .map_or_else(
            |e| {
                self.fault = Some(e);
                ControlFlow::Break(())
            },
            ControlFlow::Continue,
        )
    }

    fn step(&mut self, m: &Metrics) -> Result<()> {
        let s = &m.stepped;
        let text = format!(
            "loss {:.4}  lr {:.2e}  {:.0} tokens/s  {}",
            s.loss,
            s.lr,
            m.tokens_per_s(),
            bytes(m.peak_rss_bytes)
        );
        self.bar.set_position(s.step);
        self.bar.set_message(text.clone());
        if self.bar.is_hidden() && (s.step.is_multiple_of(self.every) || s.step == 1 || s.step == self.steps) {
            self.ui.note(&format!("step {}/{}: {text}", s.step, self.steps));
        }
        self.begin(s.step - 1)?;
        self.write(
            s.step,
            &[
                ("train/loss", s.loss),
                ("train/learning_rate", s.lr),
                ("train/grad_norm", s.grad_norm),
                ("train/epoch", s.step as f64 / self.per_epoch),
                ("train/tokens_per_second", m.tokens_per_s()),
                ("memory/peak_rss_bytes", m.peak_rss_bytes as f64),
            ],
        )
    }

    /// Opens the event file when the first thing is to be written.
    fn begin(&mut self, done: u64) -> Result<()> {
        if let (Some(dir), None) = (self.log, &self.events) {
            self.events = Some(Events::new(dir, done)?);
        }
        Ok(())
    }

    fn write(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        self.events.as_mut().map_or(Ok(()), |e| e.scalars(step, values))
    }

    fn say(&self, text: &str) {
        self.bar.suspend(|| self.ui.note(text));
    }
}

fn done(ui: &Ui, args: &TrainArgs, sum: &Summary, seconds: f64, planned: u64) {
    if args.json {
        report::json(&json!({
            "out": report::path(&args.out), "steps": sum.steps, "steps_now": sum.steps_now, "loss": sum.loss,
            "eval_loss": sum.eval.map(|e| json!({"first": e.0, "last": e.1})), "seconds": seconds,
            "planned_peak_bytes": planned, "peak_rss_bytes": pleach_runtime::peak_rss(),
        }));
        return;
    }
    if sum.steps_now == 0 {
        ui.note(&format!("{}: all {} steps are done", args.out.display(), sum.steps));
        return;
    }
    let loss = sum.loss.map_or(String::new(), |l| format!(", loss {l:.4}"));
    ui.note(&format!("{}: {} steps in {seconds:.1} s{loss}", args.out.display(), sum.steps_now));
}
