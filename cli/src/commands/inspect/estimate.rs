//! `--estimate`: bounds below the time of a GPU plan's kernels, from counts and a machine's limits. Marked as such wherever it is shown.

use super::plan::{env, shown};
use crate::args::InspectArgs;
use crate::failure::{Failure, Result};
use crate::report::{Table, bytes, count};
use pleach_codegen::estimate::{EntryRows, MACHINES, Machine, Row, Units, entries, machine};
use pleach_plan::Plan;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

/// What every shown estimate begins with.
const WHAT: &str = "an estimate from counts, not a measurement: no entry can be faster than its bound on this machine";

fn of(plan: &Plan, args: &InspectArgs) -> Result<(&'static Machine, Vec<u64>, Vec<EntryRows>)> {
    let asked = args.estimate.as_deref().unwrap_or_default();
    if !plan.is_gpu() {
        return Err(Failure::usage("--estimate is for plans of a GPU: compile with --target sm_80 or sm_90a"));
    }
    let m = machine(asked, &plan.target.arch).ok_or_else(|| {
        let known: Vec<&str> = MACHINES.iter().map(|m| m.name).collect();
        Failure::usage(format!("--estimate {asked}: there are numbers for {}", known.join(", ")))
    })?;
    if plan.target.arch == "sm_90a" && m.warpgroup == 0.0 {
        return Err(Failure::usage(format!("--estimate {asked}: code for sm_90a does not run there")));
    }
    let env = env(plan, &args.capacity)?;
    let entries = entries(plan, &env, m)?;
    Ok((m, env, entries))
}

/// Kernels of one class that multiply with the same units, as one row.
fn classes(plan: &Plan, e: &EntryRows) -> BTreeMap<(String, Units), Row> {
    let mut out: BTreeMap<(String, Units), Row> = BTreeMap::new();
    for r in &e.rows {
        let key = (plan.kernels[r.kernel].class.clone(), r.units);
        match out.entry(key) {
            Entry::Vacant(e) => drop(e.insert(r.clone())),
            Entry::Occupied(e) => e.into_mut().add(r),
        }
    }
    out
}

fn cells(r: &Row) -> [String; 6] {
    let ms = |s: f64| format!("{:.3}", s * 1e3);
    [r.launches.to_string(), count(r.flops), bytes(r.bytes), ms(r.seconds[0]), ms(r.seconds[1]), ms(r.bound)]
}

pub(super) fn text(plan: &Plan, args: &InspectArgs) -> Result<String> {
    let (m, env, entries) = of(plan, args)?;
    let mut out = format!("\n{WHAT}\n{}: {}\nat {}\n", m.name, m.source, shown(plan, &env));
    for e in &entries {
        let head = ["launches", "operations", "moved", "ms products", "ms memory", "ms bound"];
        let mut t = Table::new(&[&[e.name.as_str(), "<units"][..], &head[..]].concat());
        for ((class, units), r) in classes(plan, e) {
            t.row([class, units.name().into()].into_iter().chain(cells(&r)));
        }
        out += &format!(
            "\n{}{}: at least {:.3} ms, and {:.3} ms between its {} launches\n",
            t.text(),
            e.name,
            e.bound() * 1e3,
            e.gaps * 1e3,
            e.launches()
        );
        let mut t = Table::new(&[&["kernel", "<units", "runs"][..], &head[..]].concat());
        for r in
            e.rows.iter().filter(|r| args.kernel.as_ref().is_none_or(|k| plan.kernels[r.kernel].symbol.contains(k)))
        {
            let name = plan.kernels[r.kernel].symbol.clone();
            t.row([name, r.units.name().into(), r.runs.to_string()].into_iter().chain(cells(r)));
        }
        out += &t.text();
    }
    Ok(out)
}

pub(super) fn json(plan: &Plan, args: &InspectArgs) -> Result<Value> {
    let (m, env, entries) = of(plan, args)?;
    let row = |r: &Row| {
        json!({
            "units": r.units.name(), "runs": r.runs, "launches": r.launches, "flops": r.flops, "bytes": r.bytes,
            "products_ms": r.seconds[0] * 1e3, "memory_ms": r.seconds[1] * 1e3, "bound_ms": r.bound * 1e3,
        })
    };
    let named = |name: &str, mut v: Value| {
        v["name"] = name.into();
        v
    };
    let entry = |e: &EntryRows| {
        let classes: Vec<Value> = classes(plan, e).iter().map(|((c, _), r)| named(c, row(r))).collect();
        let kernels: Vec<Value> = e.rows.iter().map(|r| named(&plan.kernels[r.kernel].symbol, row(r))).collect();
        json!({
            "name": e.name, "bound_ms": e.bound() * 1e3, "gaps_ms": e.gaps * 1e3, "launches": e.launches(), "classes": classes,
            "kernels": kernels,
        })
    };
    Ok(json!({
        "what": WHAT, "capacity": shown(plan, &env),
        "machine": {
            "name": m.name, "source": m.source, "wgmma_flops_per_s": m.warpgroup, "mma_flops_per_s": m.warp,
            "f32_flops_per_s": m.plain, "bytes_per_s": m.bytes, "gap_us": m.gap * 1e6,
        },
        "entries": entries.iter().map(entry).collect::<Vec<_>>(),
    }))
}
