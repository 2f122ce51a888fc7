//! Runs a graph or a schedule on seeded values and compares results by name.
//!
//! `prepare` entries run first, in order, and what they assign is seen by the others. Every other entry runs on the same
//! parameters, so entries do not see each other's assignments.

use crate::values;
use pleach_ir::interp::{RunResult, Symbols, Tensor, run_entry_with, run_schedule_with};
use pleach_ir::{Graph, IrError, Param, ParamId, Schedule, Source};
use std::collections::BTreeMap;

/// Results by entry and by name: `infer/logits`, `generate/@cache.0.k`.
pub type Results = BTreeMap<String, Tensor>;

/// What a run starts from.
#[derive(Clone, Debug)]
pub struct Start {
    /// Values of symbols.
    pub symbols: Symbols,
    /// Parameters by name.
    pub params: BTreeMap<String, Tensor>,
    /// Inputs by entry and name.
    pub inputs: BTreeMap<String, BTreeMap<String, Tensor>>,
    /// Entries run a second time on what they assigned: `step/again/loss`.
    pub again: bool,
}

impl Start {
    /// Seeded values for a graph.
    pub fn seeded(g: &Graph, symbols: Symbols, seed: u64) -> Start {
        let params = values::params(g, &symbols, seed);
        let of = |e: &pleach_ir::Entry| (e.name.clone(), values::inputs(e, &symbols, seed));
        let inputs = g.entries.iter().map(of).collect();
        Start { symbols, params, inputs, again: false }
    }
}

/// Runs the entry of a name on values of parameters and inputs.
type One<'o> = &'o dyn Fn(&str, &BTreeMap<String, Tensor>, &BTreeMap<String, Tensor>) -> Result<RunResult, IrError>;

fn run<'a>(
    params: &[Param],
    entries: impl Iterator<Item = &'a str> + Clone,
    start: &Start,
    one: One<'_>,
) -> Result<Results, IrError> {
    let none = BTreeMap::new();
    let mut values = start.params.clone();
    let mut out = Results::new();
    let name = |p: ParamId| params[p.index()].name.clone();
    let is_prepare = |n: &&str| n.starts_with("prepare");
    for e in entries.clone().filter(is_prepare) {
        let r = one(e, &values, start.inputs.get(e).unwrap_or(&none))?;
        values.extend(r.assigns.into_iter().map(|(p, t)| (name(p), t)));
    }
    for e in entries.filter(|e| !is_prepare(e)) {
        let inputs = start.inputs.get(e).unwrap_or(&none);
        let r = one(e, &values, inputs)?;
        if start.again {
            let mut values = values.clone();
            values.extend(r.assigns.iter().map(|(p, t)| (name(*p), t.clone())));
            let r = one(e, &values, inputs)?;
            out.extend(r.outputs.into_iter().map(|(n, t)| (format!("{e}/again/{n}"), t)));
        }
        out.extend(r.outputs.into_iter().map(|(n, t)| (format!("{e}/{n}"), t)));
        out.extend(r.assigns.into_iter().map(|(p, t)| (format!("{e}/@{}", name(p)), t)));
    }
    Ok(out)
}

/// Runs every entry of a graph.
///
/// # Errors
/// As the interpreter.
pub fn run_graph(g: &Graph, start: &Start) -> Result<Results, IrError> {
    run(&g.params, g.entries.iter().map(|e| e.name.as_str()), start, &|e, values, inputs| {
        let entry = g.entry(e).ok_or_else(|| IrError::Interpret(format!("no entry {e}")))?;
        run_entry_with(&g.params, &|p| values.get(&g.params[p.index()].name), entry, inputs, &start.symbols)
    })
}

/// Runs every entry of a schedule, after [`Schedule::check`].
///
/// # Errors
/// As the checker and the interpreter.
pub fn run_schedule(s: &Schedule, start: &Start) -> Result<Results, IrError> {
    s.check()?;
    let params: Vec<Param> = s.params.iter().map(|(p, _)| p.clone()).collect();
    // A checkpoint's tensor in blocks has the values of the tensor.
    let read = |p: &Param| {
        let same = |q: &&Param| q.source == p.source && matches!(p.source, Source::Checkpoint(_));
        params.iter().find(same).unwrap_or(p).name.clone()
    };
    let names: Vec<String> = params.iter().map(read).collect();
    run(&params, s.entries.iter().map(|e| e.name.as_str()), start, &|e, values, inputs| {
        run_schedule_with(s, e, &|p| values.get(&names[p.index()]), inputs, &start.symbols)
    })
}

/// Compares results: `tolerance` gives the relative error that a result may have.
///
/// # Errors
/// What differs, in words.
pub fn same(got: &Results, want: &Results, tolerance: &dyn Fn(&str) -> f64) -> Result<(), String> {
    let mut faults = vec![];
    for (name, w) in want {
        match got.get(name) {
            None => faults.push(format!("{name} is missing")),
            Some(g) => {
                let (e, t) = (g.relative_error(w), tolerance(name));
                if e.is_nan() || e > t {
                    faults.push(format!("{name}: relative error {e:.3e}, allowed {t:.1e}"));
                }
            }
        }
    }
    faults.extend(got.keys().filter(|n| !want.contains_key(*n)).map(|n| format!("{n} is new")));
    if faults.is_empty() { Ok(()) } else { Err(faults.join("\n")) }
}
