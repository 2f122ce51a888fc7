//! What `--profile` writes: one JSON file that is a chrome trace (perfetto and chrome://tracing read it), and under
//! `pleach` the times of every step, which `pleach inspect --profile` joins with the plan.

use crate::failure::Result;
use crate::report::Ui;
use pleach_plan::Plan;
use pleach_runtime::{Session, TIMELINE};
use serde_json::{Map, Value, json};
use std::path::Path;

/// Writes what the session measured. `command` is what was run.
///
/// # Errors
/// The file cannot be written.
pub(crate) fn write(ui: &Ui, session: &Session, command: &str, path: &Path) -> Result<()> {
    let machine = machine(ui, session.plan());
    let text = trace(session, command, machine).to_string();
    crate::files::write(path, &text)?;
    let calls: u64 = session.step_times().iter().map(|t| t.calls).sum();
    let kept = session.timeline().len() as u64;
    let part = if kept < calls { format!(", the first {TIMELINE} of them in the timeline") } else { String::new() };
    ui.note(&format!("times of {calls} launches written to {}{part}", path.display()));
    Ok(())
}

/// What the machine can do, measured now; what cannot be measured is left out.
fn machine(ui: &Ui, plan: &Plan) -> Map<String, Value> {
    #[allow(unused_mut, reason = "measured only where there is a compiler")]
    let mut out = Map::new();
    #[cfg(feature = "compiler")]
    if plan.target.arch == "x86_64" {
        use crate::commands::bench::Gauge;
        let peak = |g: Result<Gauge>| g.and_then(|mut g| g.measure());
        if let (Ok(flops), Ok(bytes)) = (peak(Gauge::flops(ui)), peak(Gauge::bandwidth(ui, 256 << 20))) {
            out.insert("flops_per_s".into(), flops.round().into());
            out.insert("bytes_per_s".into(), bytes.round().into());
        }
    }
    let _ = (ui, plan);
    out
}

/// The file: events in microseconds, one row for each entry, and the sums by step.
fn trace(session: &Session, command: &str, machine: Map<String, Value>) -> Value {
    let plan = session.plan();
    let mut events = vec![json!({"ph": "M", "pid": 1, "name": "process_name", "args": {"name": command}})];
    for (i, e) in plan.entries.iter().enumerate() {
        events.push(json!({"ph": "M", "pid": 1, "tid": i + 1, "name": "thread_name", "args": {"name": e.name}}));
    }
    let us = |ns: u64| ns as f64 / 1e3;
    for l in session.timeline() {
        let s = &plan.entries[l.entry as usize].steps[l.step as usize];
        let k = &plan.kernels[s.kernel as usize];
        events.push(json!({
            "ph": "X", "pid": 1, "tid": l.entry + 1, "ts": us(l.start_ns), "dur": us(l.ns), "name": k.symbol,
            "cat": k.class, "args": {"step": l.step, "origin": s.origin},
        }));
    }
    let times = session.step_times();
    let entries: Vec<Value> = plan
        .entries
        .iter()
        .enumerate()
        .map(|(i, e)| {
            let steps = times.iter().filter(|t| t.entry as usize == i).map(|t| {
                let s = &e.steps[t.step as usize];
                json!({
                    "step": t.step, "kernel": plan.kernels[s.kernel as usize].symbol, "origin": s.origin,
                    "calls": t.calls, "ns": t.ns, "least_ns": t.least_ns, "flops": t.flops, "bytes": t.bytes,
                })
            });
            json!({"entry": e.name, "steps": steps.collect::<Vec<_>>()})
        })
        .collect();
    json!({
        "displayTimeUnit": "ms",
        "traceEvents": events,
        "pleach": {
            "version": 1, "command": command, "threads": session.threads(), "target": plan.target.arch,
            "machine": machine, "entries": entries,
        },
    })
}
