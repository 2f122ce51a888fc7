//! `pleach bench`: our own timings as one JSON object. Every number comes from this run, peak and bandwidth of the
//! machine included.

mod kernels;
mod machine;
pub(super) mod train;

use crate::args::{BenchArgs, BenchCommand};
use crate::failure::{Failure, Result};
use crate::inputs::{InferInputs, Sequences};
use crate::pipeline::total;
use crate::ready::{Ready, ready};
use crate::report::{self, Table, Ui};
pub(crate) use machine::Gauge;
use pleach_plan::{BufferKind, Plan};
use pleach_runtime::{GenerateParams, KernelTime, Philox, Sampling, Session, random_weights};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::time::Instant;

/// Tokens before the first generated one.
const PROMPT: u64 = 8;

/// Measures.
///
/// # Errors
/// Everything on the way from files to timings.
pub(crate) fn bench(ui: &Ui, command: &BenchCommand) -> Result<()> {
    match command {
        BenchCommand::Kernels { model, tokens, json } => kernels::kernels(ui, model.as_deref(), tokens, *json),
        BenchCommand::Run(args) => run(ui, args),
        BenchCommand::Generate(args) => generate(ui, args),
        BenchCommand::Train(args) => train::train(ui, args),
    }
}

/// The middle of the values, which are sorted on the way.
fn median(values: &mut [f64]) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => (values[n / 2 - 1] + values[n / 2]) / 2.0,
    }
}

fn open(ui: &Ui, args: &BenchArgs, ready: &Ready, needed: &[(&str, u64)]) -> Result<Session> {
    let weights = if args.random_weights { random_weights(&ready.plan, 0)? } else { ready.weights()? };
    ready.session_with(ui, &[], needed, weights)
}

fn random_ids(ready: &Ready, n: u64) -> Vec<i32> {
    let random = Philox::new(1);
    (0..n).map(|i| (random.uniform(0, i) * ready.plan.meta.vocab as f64) as i32).collect()
}

fn run(ui: &Ui, args: &BenchArgs) -> Result<()> {
    check(args)?;
    let ready = ready(ui, &args.model, &["infer"], &[])?;
    ready.takes(args.tokens)?;
    let opened = Instant::now();
    let n = args.tokens;
    let mut session = open(ui, args, &ready, &[("T", n), ("S", 1), ("C", 1), ("P", n)])?;
    let open_ms = opened.elapsed().as_secs_f64() * 1e3;
    let inputs = InferInputs::new(&Sequences::pack(&[random_ids(&ready, n)])?, ready.is_encoder());
    let values = inputs.values();
    for _ in 0..2 {
        session.run("infer", &values)?;
    }
    let rss = report::peak_rss();
    let mut gauge = on_host(&ready.plan).then(|| Gauge::flops(ui)).transpose()?;
    measured(&mut gauge)?;
    let mut times = vec![];
    let clock = Instant::now();
    while times.len() < 5 || (clock.elapsed().as_secs_f64() < 4.0 && times.len() < 100) {
        let start = Instant::now();
        session.run("infer", &values)?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    let step = median(&mut times);
    let profile = if args.profile {
        session.set_profile(true);
        session.run("infer", &values)?;
        session.profile()
    } else {
        vec![]
    };
    let mut out = head(ui, args, &ready, &session, "infer", (open_ms, rss))?;
    out.insert("step_ms".into(), json!({"median": step, "min": times[0]}));
    out.insert("tokens_per_s".into(), (n as f64 / (step * 1e-3)).into());
    let flops = contraction_flops(&ready.plan, "infer", n)?;
    out.insert("matmul_flops".into(), flops.into());
    let peak = measured(&mut gauge)?;
    out.insert("peak_share".into(), peak.map(|p| flops as f64 / (step * 1e-3) / p).into());
    show(args, out, &profile);
    Ok(())
}

fn generate(ui: &Ui, args: &BenchArgs) -> Result<()> {
    check(args)?;
    let ready = ready(ui, &args.model, &["generate"], &[])?;
    let opened = Instant::now();
    // The first new id comes with the prompt; as many decoding steps as were asked for follow.
    let length = PROMPT + args.tokens + 1;
    let mut session = open(ui, args, &ready, &[("T", PROMPT), ("S", 1), ("C", length), ("P", length)])?;
    let open_ms = opened.elapsed().as_secs_f64() * 1e3;
    let prompt = [random_ids(&ready, PROMPT)];
    let new = usize::try_from(args.tokens + 1).map_err(|_| Failure::usage("--tokens is too large"))?;
    let params = |n| GenerateParams { max_new_tokens: n, sampling: Sampling::default(), eos: vec![] };
    pleach_runtime::generate(&mut session, &prompt, &params(new.min(4)), &mut |_, _| ControlFlow::Continue(()))?;
    let rss = report::peak_rss();
    let bytes = weight_bytes(&ready.plan, "generate")?;
    let mut gauge = on_host(&ready.plan).then(|| Gauge::bandwidth(ui, bytes)).transpose()?;
    let mut bandwidth = measured(&mut gauge)?;
    let (mut steps, mut rates, mut prompts) = (vec![], vec![], vec![]);
    for _ in 0..3 {
        let mut last = None;
        let done = pleach_runtime::generate(&mut session, &prompt, &params(new), &mut |_, _| {
            let now = Instant::now();
            steps.extend(last.replace(now).map(|t: Instant| (now - t).as_secs_f64() * 1e3));
            ControlFlow::Continue(())
        })?;
        rates.push(done.stats.decode_tokens as f64 / done.stats.decode_time.as_secs_f64().max(1e-9));
        prompts.push(done.stats.prompt_time.as_secs_f64() * 1e3);
        bandwidth = measured(&mut gauge)?;
    }
    let profile = if args.profile {
        session.set_profile(true);
        pleach_runtime::generate(&mut session, &prompt, &params(new), &mut |_, _| ControlFlow::Continue(()))?;
        session.profile()
    } else {
        vec![]
    };
    let rate = median(&mut rates);
    let mut out = head(ui, args, &ready, &session, "generate", (open_ms, rss))?;
    out.insert("step_ms".into(), json!({"median": median(&mut steps), "min": steps[0]}));
    out.insert("tokens_per_s".into(), rate.into());
    out.insert("prompt_ms".into(), median(&mut prompts).into());
    out.insert("weight_bytes_per_token".into(), bytes.into());
    out.insert("read_bytes_per_s".into(), bandwidth.into());
    out.insert("bandwidth_share".into(), bandwidth.map(|b| bytes as f64 * rate / b).into());
    show(args, out, &profile);
    Ok(())
}

/// Whether the machine's own peak is what a plan's numbers are compared with: that of a GPU is not measured.
fn on_host(plan: &Plan) -> bool {
    !plan.is_gpu()
}

/// The machine's peak, measured once more.
fn measured(gauge: &mut Option<Gauge>) -> Result<Option<f64>> {
    gauge.as_mut().map(Gauge::measure).transpose()
}

fn check(args: &BenchArgs) -> Result<()> {
    if args.tokens == 0 { Err(Failure::usage("--tokens must be at least 1")) } else { Ok(()) }
}

/// What both report: memory and compile times. Last argument: time to open the session, and the peak of this process before
/// the machine was measured too.
fn head(
    ui: &Ui,
    args: &BenchArgs,
    ready: &Ready,
    session: &Session,
    entry: &str,
    (open_ms, rss): (f64, u64),
) -> Result<Map<String, Value>> {
    let m = session.memory();
    let (arena, live) = m.entries.iter().find(|e| e.0 == entry).map_or((0, 0), |e| (e.1, e.2));
    let mut out = Map::new();
    out.insert("tokens".into(), args.tokens.into());
    out.insert("threads".into(), session.threads().into());
    out.insert("planned_peak_bytes".into(), m.total().into());
    out.insert("peak_rss_bytes".into(), rss.into());
    out.insert("arena_bytes".into(), arena.into());
    out.insert("live_peak_bytes".into(), live.into());
    out.insert("open_ms".into(), open_ms.into());
    let again = crate::ready::ready(ui, &args.model, &[entry], &[])?.origin;
    let o = &ready.origin;
    let stages: Map<String, Value> =
        o.rows.iter().enumerate().map(|(i, r)| (format!("{i:02}-{}", r.pass), r.ms.into())).collect();
    let cold = if o.cached { total(&o.rows) } else { o.ms };
    out.insert("compile_ms".into(), json!({"cold": cold, "cached": again.ms, "per_stage": stages}));
    Ok(out)
}

/// Operations of all products and attentions of one run over `tokens` tokens of one sequence.
fn contraction_flops(plan: &Plan, entry: &str, tokens: u64) -> Result<u64> {
    let env = plan.env(&|name| Some(if name == "S" { 1 } else { tokens }))?;
    let mut sum = 0u64;
    for s in &plan.entry(entry)?.steps {
        let k = &plan.kernels[s.kernel as usize];
        if k.class == "contraction" {
            sum += k.flops.eval(&env)?;
        }
    }
    Ok(sum)
}

/// Bytes of the parameters that products read in one run: what a decoding step has to bring in at least.
fn weight_bytes(plan: &Plan, entry: &str) -> Result<u64> {
    let e = plan.entry(entry)?;
    let mut seen = BTreeSet::new();
    for s in &e.steps {
        let k = &plan.kernels[s.kernel as usize];
        if k.class != "contraction" {
            continue;
        }
        for b in &s.buffers[..k.operands.len()] {
            if let BufferKind::Param(p) = e.buffers[*b as usize].kind {
                seen.insert(p);
            }
        }
    }
    let env = plan.env(&|_| Some(1))?;
    let mut sum = 0;
    for p in seen {
        sum += plan.params[p as usize].bytes.eval(&env)?;
    }
    Ok(sum)
}

fn show(args: &BenchArgs, mut out: Map<String, Value>, profile: &[KernelTime]) {
    if args.json {
        if args.profile {
            put_profile(&mut out, profile);
        }
        report::json(&Value::Object(out));
        return;
    }
    let mut t = Table::new(&["what", "value"]);
    for (name, value) in flat("", &Value::Object(out)) {
        t.row([name, value]);
    }
    report::print(&t.text());
    if args.profile {
        report::print(&profile_table(profile));
    }
}

/// The times of the kernels as JSON.
fn put_profile(out: &mut Map<String, Value>, profile: &[KernelTime]) {
    let row = |k: &KernelTime| {
        json!({"kernel": k.symbol, "class": k.class, "calls": k.calls, "ms": k.ns as f64 * 1e-6, "flops": k.flops,
               "bytes": k.bytes})
    };
    out.insert("profile".into(), profile.iter().map(row).collect::<Vec<Value>>().into());
}

/// The times of the kernels as a table.
fn profile_table(profile: &[KernelTime]) -> String {
    let mut t = Table::new(&["kernel", "<class", "calls", "ms", "Gflop/s", "GB/s"]);
    for k in profile {
        let per = |n: u64| format!("{:.1}", n as f64 / k.ns.max(1) as f64);
        let ms = format!("{:.3}", k.ns as f64 * 1e-6);
        t.row([k.symbol.clone(), k.class.clone(), k.calls.to_string(), ms, per(k.flops), per(k.bytes)]);
    }
    format!("\n{}", t.text())
}

/// Names with dots for what is nested, numbers short.
fn flat(prefix: &str, value: &Value) -> Vec<(String, String)> {
    match value {
        Value::Object(map) => {
            let join = |k: &str| if prefix.is_empty() { k.to_string() } else { format!("{prefix}.{k}") };
            map.iter().flat_map(|(k, v)| flat(&join(k), v)).collect()
        }
        Value::Number(n) if n.is_f64() => vec![(prefix.into(), format!("{:.3}", n.as_f64().unwrap_or(0.0)))],
        other => vec![(prefix.into(), other.to_string())],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&mut [4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(
            flat("", &json!({"a": {"b": 1.5}, "c": 2})),
            [("a.b".into(), "1.500".into()), ("c".into(), "2".into())]
        );
    }
}
