//! `pleach bench train`: optimizer steps on random rows of the full length.

use super::machine::Gauge;
use super::{flat, measured, median, on_host};
use crate::args::BenchTrainArgs;
use crate::failure::Result;
use crate::pipeline::total;
use crate::report::{self, Table, Ui};
use crate::training::{Training, minimum, within_budget};
use pleach_plan::Plan;
use pleach_runtime::train::{Order, Rows, Settings, step};
use pleach_runtime::{Philox, Session, Weights, peak_rss, random_weights};
use serde_json::{Map, Value, json};
use std::time::Instant;

/// Measures.
///
/// # Errors
/// Everything on the way from files to timings.
pub(super) fn train(ui: &Ui, args: &BenchTrainArgs) -> Result<()> {
    #[cfg(feature = "compiler")]
    if !crate::ready::looks_like_a_plan(&args.model.model) {
        crate::ready::on_this_machine(&args.model)?;
    }
    let training = Training::open(ui, &args.model, &args.method, &args.shape)?;
    let weights =
        if args.random_weights { random_weights(&training.ready.plan, 0)? } else { training.ready.weights()? };
    let memory = training.memory(ui, &weights)?;
    let least = || minimum(ui, &args.model, &args.method, &args.shape);
    within_budget(memory.total(), args.shape.budget, least)?;
    pleach_runtime::give_back();
    let opened = Instant::now();
    let mut session = open(ui, &training, weights)?;
    session.prepare_all()?;
    let open_ms = opened.elapsed().as_secs_f64() * 1e3;
    // What opening took does not count beside the steps.
    pleach_runtime::give_back();
    let rows = random_rows(&training, args.shape.accum);
    let settings = Settings {
        batch: args.shape.batch,
        accum: args.shape.accum,
        steps: args.steps + 1,
        max_grad_norm: args.shape.max_grad_norm,
        max_length: training.max_length,
        shuffle: false,
        ..Settings::default()
    };
    let mut order = Order::new(rows.len(), None);
    let mut losses = vec![];
    let mut run = |session: &mut Session, i: u64| -> Result<f64> {
        let start = Instant::now();
        losses.push(step(session, &rows, &mut order, &settings, i)?.loss);
        Ok(start.elapsed().as_secs_f64() * 1e3)
    };
    let first_ms = run(&mut session, 0)?;
    let mut times = vec![];
    for i in 0..args.steps {
        times.push(run(&mut session, i + 1)?);
    }
    let rss = peak_rss();
    let median_ms = median(&mut times);
    let profile = if args.profile {
        session.set_profile(true);
        run(&mut session, 0)?;
        session.profile()
    } else {
        vec![]
    };
    let mut gauge = on_host(&training.ready.plan).then(|| Gauge::flops(ui)).transpose()?;
    measured(&mut gauge)?;
    let peak = measured(&mut gauge)?;
    let tokens = args.shape.batch * training.max_length * args.shape.accum;
    let flops = flops(&training, args.shape.accum)?;
    let mut out = Map::new();
    let mut put = |k: &str, v: Value| drop(out.insert(k.into(), v));
    put("method", args.method.method.clone().into());
    put("batch", args.shape.batch.into());
    put("max_length", training.max_length.into());
    put("accum", args.shape.accum.into());
    put("threads", session.threads().into());
    put("step_ms", json!({"median": median_ms, "min": times[0]}));
    put("first_step_ms", first_ms.into());
    put("tokens_per_s", (tokens as f64 / (median_ms * 1e-3)).into());
    put("planned_peak_bytes", memory.total().into());
    put("peak_rss_bytes", rss.into());
    put("arena_bytes", memory.arena.into());
    put("open_ms", open_ms.into());
    put("matmul_flops", flops.into());
    put("peak_share", peak.map(|p| flops as f64 / (median_ms * 1e-3) / p).into());
    put("loss", json!({"first": losses.first(), "last": losses.last()}));
    put("compile_ms", compile_ms(ui, args, &training)?);
    if args.profile {
        super::put_profile(&mut out, &profile);
    }
    if args.json {
        report::json(&Value::Object(out));
        return Ok(());
    }
    out.remove("profile");
    let mut t = Table::new(&["what", "value"]);
    for (name, value) in flat("", &Value::Object(out)) {
        t.row([name, value]);
    }
    report::print(&t.text());
    if args.profile {
        report::print(&super::profile_table(&profile));
    }
    Ok(())
}

fn open(ui: &Ui, training: &Training, weights: Weights) -> Result<Session> {
    training.session(ui, weights, 0, &crate::commands::measure::stand_in(&training.adapter))
}

/// Rows of random ids, enough for one step.
pub(crate) fn random_rows(training: &Training, accum: u64) -> Rows {
    let random = Philox::new(1);
    let vocab = training.ready.plan.meta.vocab as f64;
    let mut rows = Rows::default();
    for r in 0..training.batch * accum {
        let ids: Vec<i32> = (0..training.max_length).map(|i| (random.uniform(r, i) * vocab) as i32).collect();
        rows.push(&ids, None, ids.len());
    }
    rows
}

/// Operations of all products of a step.
fn flops(training: &Training, accum: u64) -> Result<u64> {
    let plan: &Plan = &training.ready.plan;
    let (t, s) = (training.batch * training.max_length, training.batch);
    let env = plan.env(&|name| {
        Some(match name {
            "T" => t,
            "S" => s,
            "L" => t - s,
            _ => training.max_length,
        })
    })?;
    let mut sum = 0u64;
    for (name, times) in [("accumulate", accum), ("update", 1), ("step", 1)] {
        for step in plan.entry(name).map_or(&[][..], |e| &e.steps) {
            let k = &plan.kernels[step.kernel as usize];
            if k.class == "contraction" {
                sum += times * k.flops.eval(&env)?;
            }
        }
    }
    Ok(sum)
}

fn compile_ms(ui: &Ui, args: &BenchTrainArgs, training: &Training) -> Result<Value> {
    let quiet = Ui { quiet: true, ..*ui };
    let again = Training::open(&quiet, &args.model, &args.method, &args.shape)?.ready.origin;
    let o = &training.ready.origin;
    let stages: Map<String, Value> =
        o.rows.iter().enumerate().map(|(i, r)| (format!("{i:02}-{}", r.pass), r.ms.into())).collect();
    let cold = if o.cached { total(&o.rows) } else { o.ms };
    Ok(json!({"cold": cold, "cached": again.ms, "per_stage": stages}))
}
