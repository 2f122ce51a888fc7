//! What a plan holds: entries, parameters, kernels, memory at capacity.

use crate::args::{Count, InspectArgs};
use crate::failure::{Failure, Result};
use crate::report::{self, Table, Ui, bytes, count};
use pleach_plan::{BlobKind, Plan, Residency, Source};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Tokens, cache slots and sequences that sizes are shown for when none are given.
const CAPACITY: [(&str, u64); 4] = [("T", 512), ("L", 512), ("C", 1024), ("S", 1)];

pub(super) fn inspect(ui: &Ui, args: &InspectArgs) -> Result<()> {
    let path = &args.model.model;
    let plan = Plan::read(path).map_err(|e| match e {
        e @ pleach_plan::PlanError::Io { .. } => Failure::from(e),
        e => Failure::from(e).within(&path.display().to_string()),
    })?;
    #[cfg(feature = "compiler")]
    if let Some(out) = &args.html {
        let subject = super::page::Subject { plan: &plan, env: env(&plan, &args.capacity)?, made: None };
        return super::page::write(ui, args, &subject, out);
    }
    let _ = ui;
    if args.json {
        let mut out = json!({
            "target": plan.target, "meta": plan.meta, "entries": entries_json(&plan),
            "kernels": kernels_json(&plan, &args.capacity)?, "memory": memory_json(&plan, &args.capacity)?,
        });
        if !plan.choices.is_empty() {
            out["choices"] = serde_json::to_value(&plan.choices)?;
        }
        #[cfg(feature = "compiler")]
        if args.estimate.is_some() {
            out["estimate"] = super::estimate::json(&plan, args)?;
        }
        report::json(&out);
        return Ok(());
    }
    // The assembly of a GPU's plan is its PTX.
    let code = args.ptx || args.asm;
    if code {
        let texts = plan.blobs.iter().filter(|b| b.kind == BlobKind::Ptx);
        let all: String = texts.map(|b| format!("// {}\n{}\n", b.name, String::from_utf8_lossy(&b.bytes))).collect();
        if all.is_empty() {
            let why = "this plan is for a processor: it holds machine code, no PTX; give the model folder to see --asm";
            return Err(Failure::usage(why));
        }
        report::print(&all);
    }
    if !args.kernels && !args.memory && !code && !args.wants_estimate() {
        report::print(&summary(&plan));
    }
    if args.kernels {
        report::print(&kernels(&plan, args.kernel.as_deref(), &args.capacity)?);
    }
    #[cfg(feature = "compiler")]
    if args.estimate.is_some() {
        report::print(&super::estimate::text(&plan, args)?);
    }
    if args.memory {
        report::print(&memory(&plan, &args.capacity)?);
    }
    Ok(())
}

/// Values of the symbols: those given, else a nominal capacity.
pub(super) fn env(plan: &Plan, given: &[Count]) -> Result<Vec<u64>> {
    let value = |name: &str| {
        let given = given.iter().find(|c| c.symbol == name).map(|c| c.value);
        let nominal = CAPACITY.iter().find(|c| c.0 == name).map(|c| c.1);
        given.or(nominal).or((name == "P").then_some(plan.meta.max_positions.max(1)))
    };
    Ok(plan.env(&value)?)
}

pub(super) fn shown(plan: &Plan, env: &[u64]) -> String {
    let free = plan.symbols.iter().zip(env).filter(|(s, _)| s.value.is_none());
    free.map(|(s, v)| format!("{}={v}", s.name)).collect::<Vec<_>>().join(" ")
}

fn summary(plan: &Plan) -> String {
    let m = &plan.meta;
    let code: usize = plan.blobs.iter().map(|b| b.bytes.len()).sum();
    let mut out = format!(
        "{} for {} ({}), {} layers, width {}, vocabulary {}; {} kernels, {} of code\n",
        if m.kind.is_empty() { "graph" } else { &m.kind },
        plan.target.arch,
        plan.target.features.join(" "),
        m.layers,
        m.hidden,
        m.vocab,
        plan.kernels.len(),
        bytes(code as u64)
    );
    let slots = plan.slots();
    if !slots.is_empty() {
        out += &format!("adapter slots: {}\n", slots.iter().map(u32::to_string).collect::<Vec<_>>().join(", "));
    }
    if !plan.choices.is_empty() {
        out += &format!("forms of {} kernels were chosen by measuring\n", plan.choices.len());
    }
    let mut t = Table::new(&["entry", "launches", "<inputs", "<outputs"]);
    for e in &plan.entries {
        let dims = |shape: &[pleach_plan::Expr]| {
            shape.iter().map(|d| d.display(&plan.symbols).to_string()).collect::<Vec<_>>().join(", ")
        };
        let inputs: Vec<String> = e.inputs.iter().map(|i| format!("{} [{}]", i.name, dims(&i.shape))).collect();
        let outputs: Vec<String> = e.outputs.iter().map(|o| format!("{} [{}]", o.name, dims(&o.shape))).collect();
        t.row([e.name.clone(), e.steps.len().to_string(), inputs.join(", "), outputs.join(", ")]);
    }
    out + &t.text()
}

fn entries_json(plan: &Plan) -> Value {
    let list = plan.entries.iter().map(|e| {
        let names = |n: Vec<&str>| n.into_iter().map(String::from).collect::<Vec<_>>();
        json!({
            "name": e.name, "launches": e.steps.len(),
            "inputs": names(e.inputs.iter().map(|i| i.name.as_str()).collect()),
            "outputs": names(e.outputs.iter().map(|o| o.name.as_str()).collect()),
        })
    });
    list.collect::<Vec<_>>().into()
}

/// Launches of each kernel over all entries but preparations, and in those.
fn launches(plan: &Plan) -> Vec<(usize, usize)> {
    let mut n = vec![(0, 0); plan.kernels.len()];
    for e in &plan.entries {
        for s in &e.steps {
            let slot = &mut n[s.kernel as usize];
            if e.prepares().is_some() { slot.1 += 1 } else { slot.0 += 1 }
        }
    }
    n
}

pub(super) fn kernels(plan: &Plan, only: Option<&str>, given: &[Count]) -> Result<String> {
    let env = env(plan, given)?;
    let mut t = Table::new(&["kernel", "<class", "launches", "in prepare", "tasks", "operations", "moved"]);
    for (k, (n, p)) in plan.kernels.iter().zip(launches(plan)) {
        if only.is_some_and(|o| !k.symbol.contains(o)) {
            continue;
        }
        t.row([
            k.symbol.clone(),
            if k.library.is_some() { format!("{} (cuBLASLt)", k.class) } else { k.class.clone() },
            n.to_string(),
            p.to_string(),
            k.tasks.eval(&env)?.to_string(),
            count(k.flops.eval(&env)?),
            bytes(k.bytes.eval(&env)?),
        ]);
    }
    Ok(format!("{}per launch at {}\n{}", t.text(), shown(plan, &env), resources(plan, only)?))
}

/// What entries of GPU code take of a multiprocessor: registers of a thread, bytes of static shared memory, bytes spilled.
type Taken = BTreeMap<String, [u32; 3]>;

/// The launches of a GPU plan with what they take, where there is an assembler to ask.
fn resources(plan: &Plan, only: Option<&str>) -> Result<String> {
    let kernels = plan.kernels.iter().filter(|k| only.is_none_or(|o| k.symbol.contains(o)));
    let launches: Vec<&pleach_plan::Launch> = kernels.flat_map(|k| k.all_launches()).collect();
    if launches.is_empty() {
        return Ok(String::new());
    }
    let all = taken(plan)?;
    let mut t = Table::new(&["launch", "threads", "shared", "registers", "spilled"]);
    for l in launches {
        let told = |i: usize| all.get(&l.function).map(|r| r[i]);
        let shown = |n: Option<u32>| n.map_or("?".to_string(), |n| n.to_string());
        let shared = u64::from(l.shared_bytes) + u64::from(told(1).unwrap_or(0));
        t.row([l.function.clone(), l.block.to_string(), bytes(shared), shown(told(0)), shown(told(2))]);
    }
    let unknown = "registers and spills are known where ptxas is: in PATH, or named by PLEACH_PTXAS\n";
    Ok(format!("\n{}{}", t.text(), if all.is_empty() { unknown } else { "" }))
}

/// What the assembler says of the code of a plan; nothing where there is none.
#[cfg(feature = "compiler")]
pub(super) fn taken(plan: &Plan) -> Result<Taken> {
    let Some(ptxas) = pleach_codegen::ptxas::find() else { return Ok(Taken::new()) };
    let mut all = Taken::new();
    for b in plan.blobs.iter().filter(|b| b.kind == pleach_plan::BlobKind::Ptx) {
        let list = pleach_codegen::ptxas::assemble(&ptxas, &b.bytes, &plan.target.arch)?;
        all.extend(list.into_iter().map(|(n, r)| (n, [r.registers, r.shared, r.spills])));
    }
    Ok(all)
}

/// Without a compiler nothing is asked.
#[cfg(not(feature = "compiler"))]
#[allow(clippy::unnecessary_wraps, reason = "as the other one")]
fn taken(_: &Plan) -> Result<Taken> {
    Ok(Taken::new())
}

pub(super) fn kernels_json(plan: &Plan, given: &[Count]) -> Result<Value> {
    let env = env(plan, given)?;
    let all = taken(plan)?;
    let launch = |l: &pleach_plan::Launch| {
        let mut out = json!({"function": l.function, "threads": l.block, "dynamic_shared_bytes": l.shared_bytes});
        if let Some([registers, shared, spilled]) = all.get(&l.function) {
            out["registers"] = (*registers).into();
            out["static_shared_bytes"] = (*shared).into();
            out["spilled_bytes"] = (*spilled).into();
        }
        out
    };
    let row = |(k, (n, p)): (&pleach_plan::Kernel, (usize, usize))| {
        Ok(json!({
            "name": k.symbol, "class": k.class, "launches": n, "prepare_launches": p, "tasks": k.tasks.eval(&env)?,
            "flops": k.flops.eval(&env)?, "bytes": k.bytes.eval(&env)?, "scratch_bytes": k.scratch_bytes.eval(&env)?,
            "gpu": k.all_launches().map(launch).collect::<Vec<_>>(),
            "library_products": k.library.as_ref().map(|y| y.products.len()),
        }))
    };
    let rows: Result<Vec<Value>> = plan.kernels.iter().zip(launches(plan)).map(row).collect();
    Ok(rows?.into())
}

/// Parameters by where they come from and what stays of them: number and bytes.
fn parameters(plan: &Plan, env: &[u64]) -> Result<Vec<(&'static str, &'static str, usize, u64)>> {
    let mut rows: Vec<(&str, &str, usize, u64)> = vec![];
    for p in &plan.params {
        let from = match p.source {
            Source::Checkpoint(_) => "checkpoint",
            Source::Adapter { .. } => "adapter",
            Source::Derived => "derived",
            Source::Zeros => "state",
        };
        let stays = match p.residency {
            Residency::Mapped => "mapped",
            Residency::PrepareOnly => "read by prepare only",
            Residency::Owned => "in memory",
        };
        let size = p.bytes.eval(env)?;
        match rows.iter_mut().find(|r| (r.0, r.1) == (from, stays)) {
            Some(r) => (r.2, r.3) = (r.2 + 1, r.3 + size),
            None => rows.push((from, stays, 1, size)),
        }
    }
    rows.sort_unstable();
    Ok(rows)
}

pub(super) fn memory(plan: &Plan, given: &[Count]) -> Result<String> {
    let env = env(plan, given)?;
    let mut t = Table::new(&["parameters", "<residency", "number", "bytes"]);
    for (from, stays, n, size) in parameters(plan, &env)? {
        t.row([from.to_string(), stays.to_string(), n.to_string(), bytes(size)]);
    }
    let mut a = Table::new(&["arena", "buffers", "each on its own", "planned", "live at most", "<peak at"]);
    for e in &plan.entries {
        let l = pleach_plan::arena(e, &plan.kernels, &env)?;
        let sum: u64 = l.requests.iter().map(|(_, r)| r.size).sum();
        let cells = [e.name.clone(), l.requests.len().to_string(), bytes(sum), bytes(l.total), bytes(l.lower_bound)];
        a.row(cells.into_iter().chain([peak(e, &plan.kernels, &l)]));
    }
    Ok(format!("{}\n{}at {}\n", t.text(), a.text(), shown(plan, &env)))
}

/// The launch at which most bytes are alive.
fn peak(e: &pleach_plan::Entry, kernels: &[pleach_plan::Kernel], l: &pleach_plan::ArenaLayout) -> String {
    let live = |t: u64| l.requests.iter().filter(|(_, r)| r.first <= t && t < r.last).map(|(_, r)| r.size).sum::<u64>();
    let waves = pleach_plan::waves(e, kernels);
    let at = (0..e.steps.len()).max_by_key(|t| (live(u64::from(waves[*t])), usize::MAX - t));
    at.map_or(String::new(), |t| format!("launch {t} {}", e.steps[t].origin).trim_end().to_string())
}

pub(super) fn memory_json(plan: &Plan, given: &[Count]) -> Result<Value> {
    let env = env(plan, given)?;
    let rows: Vec<Value> = parameters(plan, &env)?
        .into_iter()
        .map(|(from, stays, n, size)| json!({"from": from, "residency": stays, "number": n, "bytes": size}))
        .collect();
    let mut arenas = vec![];
    for e in &plan.entries {
        let l = pleach_plan::arena(e, &plan.kernels, &env)?;
        let sum: u64 = l.requests.iter().map(|(_, r)| r.size).sum();
        arenas.push(json!({
            "entry": e.name, "buffers": l.requests.len(), "separate_bytes": sum, "arena_bytes": l.total,
            "live_peak_bytes": l.lower_bound, "peak": peak(e, &plan.kernels, &l),
        }));
    }
    Ok(json!({"capacity": shown(plan, &env), "parameters": rows, "arenas": arenas}))
}
