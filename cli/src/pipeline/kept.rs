//! What a training step keeps of its forward half, without a plan and without code: for tables of many methods.

use super::kept;
use crate::failure::Result;
use crate::report::layerless;
use pleach_frontend::{Adapter, Checkpoint, Import, ModuleTable};
use pleach_passes::differentiate::ACCUMULATE;
use pleach_passes::{Options, Pipeline, run};
use std::collections::BTreeMap;

/// Bytes that a step on one sequence of `tokens` keeps for its backward half. `adapter` makes a new adapter of the model or of its first
/// layers: where all layers are trained alike, three stand for all.
///
/// # Errors
/// A model that is not trained, an adapter that does not fit, the error of a pass.
pub(crate) fn bytes(base: &Checkpoint, adapter: impl Fn(&ModuleTable) -> Result<Adapter>, tokens: u64) -> Result<u64> {
    let layers = base.config.layers();
    if layers <= 3 || !alike(&adapter(&base.modules)?, layers) {
        return of(base, adapter(&base.modules)?, tokens);
    }
    let [two, three] = [2, 3].map(|n| {
        let part = base.with_layers(n);
        of(&part, adapter(&part.modules)?, tokens)
    });
    // The first layer and the last one differ from those between them.
    let (two, three) = (two?, three?);
    Ok(two + (layers - 2) * three.saturating_sub(two))
}

/// Whether an adapter does the same to every layer.
fn alike(adapter: &Adapter, layers: u64) -> bool {
    let mut counts: BTreeMap<String, u64> = BTreeMap::new();
    let sites = adapter.sites.iter().map(|s| &s.module);
    for path in sites.chain(adapter.replaced.iter().map(|r| &r.path)) {
        *counts.entry(layerless(path)).or_default() += 1;
    }
    counts.iter().all(|(path, n)| !path.contains('*') || *n == layers)
}

fn of(base: &Checkpoint, adapter: Adapter, tokens: u64) -> Result<u64> {
    let graph = Import::new(base).adapters(&[adapter]).entries(&["train"]).train(0).graph()?;
    let hint = ["train", ACCUMULATE].map(|e| (e.to_owned(), tokens));
    let options = Options { tokens_hint: hint.to_vec(), length_hint: tokens, ..Options::default() };
    let graph = run(&graph, &Pipeline::default(), &options)?.graph;
    Ok(kept(&graph, &options).iter().map(|s| s.bytes).sum())
}
