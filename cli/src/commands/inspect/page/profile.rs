//! Measured times, joined with a plan by entry and step.

use crate::failure::{Failure, Result};
use pleach_plan::Plan;
use serde_json::{Value, json};
use std::path::Path;

/// Launches of the timeline that go into the page.
const TIMELINE: usize = 20_000;

/// Reads what `--profile` wrote; times by step of each entry, and the first launches.
///
/// # Errors
/// A file that does not read, or that was taken from another plan.
pub(super) fn read(path: &Path, plan: &Plan) -> Result<Value> {
    let bytes = std::fs::read(path).map_err(Failure::io("read", path))?;
    let shown = path.display().to_string();
    let file: Value = serde_json::from_slice(&bytes).map_err(|e| Failure::new(e.to_string()).within(&shown))?;
    let facts = file.get("pleach").filter(|p| p["version"] == 1).ok_or_else(|| {
        Failure::new(format!(
            "{shown}: is no profile; `pleach run`, `generate` and `train` write one with --profile FILE"
        ))
    })?;
    let mut entries = vec![];
    for e in facts["entries"].as_array().into_iter().flatten() {
        let (name, steps) =
            (e["entry"].as_str().unwrap_or_default(), e["steps"].as_array().cloned().unwrap_or_default());
        if steps.is_empty() {
            continue;
        }
        let other = |what: String| {
            Failure::new(format!(
                "{shown}: was measured with another plan ({what}); give inspect the options that the measured command had"
            ))
        };
        let Some(entry) = plan.entries.iter().find(|x| x.name == name) else {
            let have: Vec<&str> = plan.entries.iter().map(|e| e.name.as_str()).collect();
            return Err(other(format!("it has no entry `{name}`, but {}", have.join(", "))));
        };
        let (mut step, mut calls, mut ns, mut least) = (vec![], vec![], vec![], vec![]);
        for s in &steps {
            let n = |key: &str| s[key].as_u64().unwrap_or(0);
            let (kernel, origin) = (s["kernel"].as_str().unwrap_or_default(), s["origin"].as_str().unwrap_or_default());
            let here =
                entry.steps.get(n("step") as usize).map(|x| (&plan.kernels[x.kernel as usize].symbol, &x.origin));
            if here.is_none_or(|(k, o)| label(k) != label(kernel) || o != origin) {
                let is = here.map_or("nothing".into(), |(k, o)| format!("{} of {o}", label(k)));
                return Err(other(format!(
                    "step {} of `{name}` is {is}, not {} of {origin}",
                    n("step"),
                    label(kernel)
                )));
            }
            step.push(n("step"));
            calls.push(n("calls"));
            ns.push(n("ns"));
            least.push(n("least_ns"));
        }
        entries.push(json!({"name": name, "step": step, "calls": calls, "ns": ns, "least": least}));
    }
    if entries.is_empty() {
        return Err(Failure::new(format!("{shown}: holds no times")));
    }
    let m = &facts["machine"];
    Ok(json!({
        "command": facts["command"], "threads": facts["threads"], "machine": [m["flops_per_s"], m["bytes_per_s"]],
        "entries": entries, "timeline": timeline(&file, plan),
    }))
}

/// A kernel's name without its number, which depends on what else the plan holds.
fn label(symbol: &str) -> &str {
    let rest = symbol.strip_prefix('k').unwrap_or(symbol);
    match rest.split_once('_') {
        Some((n, label)) if !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()) => label,
        _ => symbol,
    }
}

/// Launches in columns: entry, step, nanoseconds since the one before began, nanoseconds it took.
fn timeline(file: &Value, plan: &Plan) -> Value {
    let events = file["traceEvents"].as_array().map(Vec::as_slice).unwrap_or_default();
    let names: Vec<(&Value, &Value)> =
        events.iter().filter(|e| e["name"] == "thread_name").map(|e| (&e["tid"], &e["args"]["name"])).collect();
    let ns = |v: &Value| (v.as_f64().unwrap_or(0.0) * 1e3).round() as u64;
    let (mut entry, mut step, mut gap, mut took, mut before) = (vec![], vec![], vec![], vec![], 0);
    for e in events.iter().filter(|e| e["ph"] == "X").take(TIMELINE) {
        let name = names.iter().find(|n| *n.0 == e["tid"]).and_then(|n| n.1.as_str()).unwrap_or_default();
        let start = ns(&e["ts"]);
        entry.push(plan.entries.iter().position(|x| x.name == name));
        step.push(e["args"]["step"].as_u64());
        gap.push(start.saturating_sub(before));
        took.push(ns(&e["dur"]));
        before = start;
    }
    json!({"entry": entry, "step": step, "gap": gap, "ns": took})
}

#[cfg(test)]
mod tests {
    use super::label;

    #[test]
    fn the_number_of_a_kernel_does_not_count() {
        assert_eq!(
            (label("k12_mm_add"), label("k7_row"), label("kernel_a"), label("x")),
            ("mm_add", "row", "kernel_a", "x")
        );
    }
}
