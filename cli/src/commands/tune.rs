//! `pleach tune`: compiles every form of every kernel, measures each on the GPU within whole runs on random rows, and writes a plan with the
//! fastest ones. The plan names its choices, so that `compile --choices` makes the same plan again.

use super::bench::train::random_rows;
use crate::args::TuneArgs;
use crate::blocks::Compare;
use crate::failure::{Failure, Result};
use crate::inputs::{InferInputs, Sequences};
use crate::pipeline::{Request, TrainPart, is_graph};
use crate::ready::{self, Ready};
use crate::report::{self, Table, Ui, bytes};
use crate::training::{self, Training};
use pleach_plan::{Choice, Plan};
use pleach_runtime::train::{Order, Rows, Settings, step};
use pleach_runtime::{Forms, Philox, Session, measure_forms, random_weights};
use serde_json::{Value, json};
use std::sync::Arc;

/// A form must be faster than the usual one by this share to be chosen: less is noise.
const GAIN: f64 = 0.02;
/// Tunes.
///
/// # Errors
/// A target without a choice, whatever compiling and running refuse, forms whose results do not agree.
pub(crate) fn tune(ui: &Ui, args: &TuneArgs) -> Result<()> {
    let model = &args.compile.model;
    if ready::looks_like_a_plan(&model.model) || is_graph(&model.model) {
        return Err(Failure::usage("tune takes a model folder: a compiled plan holds no kernels to make others of"));
    }
    if args.compile.output.is_dir() {
        return Err(Failure::usage(format!("{}: is a folder; -o names a file", args.compile.output.display())));
    }
    if args.compile.choices.is_some() {
        return Err(Failure::usage("tune makes choices; those of a plan are taken by `pleach compile --choices`"));
    }
    let (entries, tokens, train) = super::compile::asked(&args.compile)?;
    let entries: Vec<&str> = entries.iter().map(String::as_str).collect();
    let request = Request { train, alternatives: true, ..Request::new(ui, model, &entries, &tokens)? };
    if request.gpu().is_none() {
        return Err(Failure::usage(
            "code for a processor has one form of every kernel, there is nothing to choose; tune is for --target cuda",
        ));
    }
    // What is measured is of no use later.
    let once = crate::args::ModelArgs { no_cache: true, ..model.clone() };
    let (slot, ready) = ready::compile_as(ui, &once, request.clone(), Compare::All)?;
    drop(slot);
    let mut kernels = Forms::of(&ready.plan)?;
    let plan = ready.plan.clone();
    if args.forms_only {
        plan.write(&args.compile.output)?;
        let size = std::fs::metadata(&args.compile.output).map_or(0, |m| m.len());
        let forms: usize = kernels.iter().map(|k| k.list.len()).sum();
        let out = args.compile.output.display();
        report::line(&format!("{out}: {}, {forms} forms of {} kernels, to be measured", bytes(size), kernels.len()));
        return Ok(());
    }
    ui.note(&format!(
        "{} kernels have several forms, {} in all",
        kernels.len(),
        kernels.iter().map(|k| k.list.len()).sum::<usize>()
    ));
    match &args.times {
        Some(path) => read(path, &mut kernels)?,
        None => measure(ui, args, ready, &request, &mut kernels)?,
    }
    let chosen = |k: &Forms| Choice { signature: k.signature.clone(), form: k.best(GAIN).form.clone() };
    let choices: Vec<Choice> = kernels.iter().map(chosen).collect();
    let request = Request { alternatives: false, choices, out: args.compile.output.clone(), ..request };
    crate::child::compile(&request)?;
    show(args, &plan, &kernels)
}

/// A form's time as `--times` has it.
#[derive(serde::Deserialize)]
struct Time {
    signature: String,
    form: String,
    /// None for a form that was not run, or gave other results.
    ms: Option<f64>,
}

/// Takes times from a file: a list, or an object that holds it as `forms`.
fn read(path: &std::path::Path, kernels: &mut [Forms]) -> Result<()> {
    let bad = |why: String| Failure::new(format!("--times {}: {why}", path.display()));
    let text = std::fs::read(path).map_err(Failure::io("read", path))?;
    let value: Value = serde_json::from_slice(&text).map_err(|e| bad(e.to_string()))?;
    let list = value.get("forms").cloned().unwrap_or(value);
    let times: Vec<Time> =
        serde_json::from_value(list).map_err(|e| bad(format!("is no list of signature, form and ms: {e}")))?;
    let mut found = 0;
    for t in &times {
        let forms = kernels.iter_mut().filter(|k| k.signature == t.signature).flat_map(|k| &mut k.list);
        for f in forms.filter(|f| f.form == t.form) {
            found += 1;
            f.ms = t.ms.filter(|ms| ms.is_finite() && *ms >= 0.0);
        }
    }
    if found == 0 {
        return Err(bad(
            "none of its times is of a kernel of this model; measure a plan of the same command with --forms-only"
                .into(),
        ));
    }
    Ok(())
}

/// Runs everything in every form.
fn measure(ui: &Ui, args: &TuneArgs, ready: Ready, request: &Request, kernels: &mut [Forms]) -> Result<()> {
    let (mut session, work) = Work::open(ui, args, ready, request.train.as_ref())?;
    let most = kernels.iter().map(|k| k.list.len()).max().unwrap_or(0);
    let bar = ui.progress((args.rounds + 1) * most as u64, "measuring");
    measure_forms(&mut session, kernels, args.rounds as usize, |s| work.run(s), || bar.inc(1))?;
    bar.finish_and_clear();
    // All forms of a number run together.
    let Some((number, [a, b])) =
        kernels.iter().flat_map(|k| k.list.iter().enumerate()).find_map(|(i, f)| Some((i, f.wrong?)))
    else {
        return Ok(());
    };
    let forms: Vec<&str> = kernels.iter().filter_map(|k| k.list.get(number)).map(|f| f.form.as_str()).collect();
    Err(Failure::new(format!(
        "other forms give {b} where the usual ones give {a}; this is a fault of pleach, please report it with `pleach doctor`. Forms: {}",
        forms.join(", ")
    )))
}

/// What is run for a measurement.
enum Work {
    /// A step of training at rate 0, which leaves the adapter as it is.
    Train(Box<Settings>, Rows),
    /// A run of `infer`, with as many tokens; and of `generate` one token at a time.
    Infer { infer: Option<u64>, generate: bool, vocab: f64, encoder: bool },
}

/// Tokens in the cache before the one that is decoded.
const CACHED: u64 = 64;

impl Work {
    fn open(ui: &Ui, args: &TuneArgs, ready: Ready, train: Option<&TrainPart>) -> Result<(Session, Work)> {
        let (vocab, encoder) = (ready.plan.meta.vocab as f64, ready.is_encoder());
        let weights = if args.random_weights { random_weights(&ready.plan, 0)? } else { ready.weights()? };
        match train {
            Some(part) => {
                let training = Training {
                    adapter: pleach_runtime::train::AdapterPlan::of(&ready.plan)?,
                    batch: part.sequences,
                    max_length: part.positions,
                    fresh: args.compile.model.adapter.is_empty(),
                    ready,
                };
                let shape = &args.compile.shape_of_training;
                let memory = training.memory(ui, &weights)?;
                training::within_budget(memory.total(), shape.budget, || Ok(memory.total()))?;
                let given = super::measure::stand_in(&training.adapter);
                let session = training.session(ui, weights, 0, &given)?;
                let settings = Settings {
                    batch: part.sequences,
                    max_length: part.positions,
                    shuffle: false,
                    lr: 0.0,
                    ..Settings::default()
                };
                let rows = random_rows(&training, 1);
                Ok((session, Work::Train(Box::new(settings), rows)))
            }
            None => {
                let n = args.tokens;
                let has = |e: &str| ready.plan.entry(e).is_ok();
                let (infer, generate) = (has("infer").then_some(n), has("generate"));
                let needed = [("T", n.max(CACHED)), ("S", 1), ("C", CACHED + 1), ("P", n.max(CACHED + 1))];
                let work = Work::Infer { infer, generate, vocab, encoder };
                Ok((ready.session_with(ui, &[], &needed, weights)?, work))
            }
        }
    }

    /// Runs once: numbers that must not depend on forms.
    fn run(&self, session: &mut Session) -> Result<Vec<f64>> {
        let mut numbers = vec![];
        match self {
            Work::Train(settings, rows) => {
                let mut order = Order::new(rows.len(), None);
                let done = step(session, rows, &mut order, settings, 0)?;
                numbers.extend([done.loss, done.grad_norm]);
            }
            Work::Infer { infer, generate, vocab, encoder } => {
                let random = Philox::new(1);
                let ids = |n: u64| (0..n).map(|i| (random.uniform(0, i) * vocab) as i32).collect::<Vec<i32>>();
                if let Some(n) = infer {
                    let inputs = InferInputs::new(&Sequences::pack(&[ids(*n)])?, *encoder);
                    let out = session.run("infer", &inputs.values())?;
                    numbers.push(norm(&out.list));
                }
                if *generate {
                    // A prompt, so that the decoded token sees keys.
                    for (first, n) in [(0, CACHED), (CACHED, 1)] {
                        let n = n as i32;
                        let (first, last) = (first as i32, [n - 1]);
                        let places: Vec<i32> = (first..first + n).collect();
                        let (segments, start, length) = ([0, n], [0], [first + n]);
                        let ids = ids(n as u64);
                        let out = session.run(
                            "generate",
                            &[
                                ("input_ids", ids.as_slice().into()),
                                ("positions", places.as_slice().into()),
                                ("slots", places.as_slice().into()),
                                ("q_segments", segments.as_slice().into()),
                                ("kv_start", start.as_slice().into()),
                                ("kv_len", length.as_slice().into()),
                                ("last", last.as_slice().into()),
                            ],
                        )?;
                        numbers.push(norm(&out.list));
                    }
                }
            }
        }
        Ok(numbers)
    }
}

/// The length of a result as a vector.
fn norm(list: &[pleach_runtime::Output<'_>]) -> f64 {
    let words = list.iter().flat_map(|o| o.bytes.chunks_exact(4));
    words.map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]])).powi(2)).sum::<f64>().sqrt()
}

fn show(args: &TuneArgs, plan: &Arc<Plan>, kernels: &[Forms]) -> Result<()> {
    let out = &args.compile.output;
    let size = std::fs::metadata(out).map_err(Failure::io("read", out))?.len();
    let name = |k: &Forms| plan.kernels[k.list[0].kernel as usize].symbol.clone();
    let time = |of: &dyn Fn(&Forms) -> Option<f64>| {
        kernels.iter().filter(|k| k.list[0].ms.is_some()).filter_map(of).sum::<f64>()
    };
    let (before, after) = (time(&|k| k.list[0].ms), time(&|k| k.best(GAIN).ms));
    if args.compile.json {
        let row = |k: &Forms| {
            let forms: Vec<Value> = k.list.iter().map(|f| json!({"form": f.form, "ms": f.ms})).collect();
            json!({"kernel": name(k), "signature": k.signature, "chosen": k.best(GAIN).form, "forms": forms})
        };
        report::json(&json!({
            "plan": out, "bytes": size, "target": plan.target.arch, "usual_ms": before, "chosen_ms": after,
            "kernels": kernels.iter().map(row).collect::<Vec<_>>(),
        }));
        return Ok(());
    }
    let mut t = Table::new(&["kernel", "<usual", "ms", "<chosen", "ms", "forms"]);
    let ms = |x: Option<f64>| x.map_or("not run".into(), |x| format!("{x:.3}"));
    for k in kernels {
        let (usual, best) = (&k.list[0], k.best(GAIN));
        t.row([name(k), usual.form.clone(), ms(usual.ms), best.form.clone(), ms(best.ms), k.list.len().to_string()]);
    }
    report::print(&t.text());
    report::line(&format!(
        "{}: {}; these kernels take {before:.3} ms in the usual forms, {after:.3} ms in those chosen",
        out.display(),
        bytes(size)
    ));
    Ok(())
}
