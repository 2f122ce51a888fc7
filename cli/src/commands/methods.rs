//! `pleach methods`: every adapter method, what it computes, and for a model how much it trains and what a step keeps for its
//! backward half.

use crate::args::MethodsArgs;
use crate::failure::Result;
use crate::method::names;
use crate::report::{self, Table, Ui, bytes, count};
use pleach_frontend::adapter::{method_names, obstacle, side_by_side};
use pleach_frontend::peft::MethodConfig;
use pleach_frontend::{Adapter, Checkpoint};
use serde_json::{Map, Value, json};
use std::sync::OnceLock;

/// Tokens of the step that is looked at, in one sequence.
const TOKENS: u64 = 512;

/// What a method is for one model.
struct Here {
    /// Trained values.
    trained: u64,
    /// Bytes that a training step of [`TOKENS`] keeps for its backward half, where the model can be trained.
    saved: Option<u64>,
    /// Why no single weight can take its place.
    obstacle: Option<String>,
}

/// Lists the methods.
///
/// # Errors
/// A model that cannot be read.
pub(crate) fn methods(ui: &Ui, args: &MethodsArgs) -> Result<()> {
    let base = args.model.as_deref().map(Checkpoint::open).transpose()?;
    // What a method needs to be told has no place here: its own defaults say what it is.
    let plain = method_names().map(|name| Ok((name, MethodConfig::named(name, &Map::new())?)));
    let plain = plain.collect::<Result<Vec<_>>>()?;
    let here: Vec<OnceLock<Result<Here>>> = plain.iter().map(|_| OnceLock::new()).collect();
    if let Some(base) = &base {
        let bar = ui.progress(plain.len() as u64, "methods");
        side_by_side(plain.len(), ui.workers(), |i| {
            let (name, config) = &plain[i];
            let _ = here[i].set(look(name, config, base, args));
            bar.inc(1);
        });
        bar.finish_and_clear();
    }
    let mut rows = vec![];
    let mut table = match base {
        None => Table::new(&["method", "<PEFT", "<formula"]),
        Some(_) => Table::new(&["method", "<PEFT", "trained", "saved/token", "<merges", "<formula"]),
    };
    for ((name, config), here) in plain.iter().zip(&here) {
        let (peft, formula) = (config.method.peft_type(), config.method.formula());
        let mut row = json!({"method": name, "peft_type": peft, "formula": formula});
        match here.get() {
            None => table.row([name, peft, formula]),
            Some(Ok(h)) => {
                row["trained"] = json!(h.trained);
                row["saved_bytes_per_token"] = json!(h.saved.map(|n| n as f64 / TOKENS as f64));
                row["merges"] = json!(h.obstacle.is_none());
                row["obstacle"] = json!(h.obstacle);
                let merges = if h.obstacle.is_none() { "yes" } else { "no" };
                let saved = h.saved.map_or("-".into(), |n| bytes(n / TOKENS));
                table.row([name, peft, &count(h.trained), &saved, merges, formula]);
            }
            Some(Err(e)) => {
                row["refused"] = json!(e.message);
                table.row([name, peft, "-", "-", "-", formula]);
            }
        }
        rows.push(row);
    }
    match args.json {
        true => report::json(&Value::Array(rows)),
        false => report::print(&table.text()),
    }
    Ok(())
}

fn look(name: &str, plain: &MethodConfig, base: &Checkpoint, args: &MethodsArgs) -> Result<Here> {
    let mut keys = Map::new();
    keys.insert("target_modules".into(), names(&args.target_modules));
    if let (Some(r), Some(key)) = (args.r, plain.method.rank_key()) {
        keys.insert(key.into(), r.into());
    }
    let config = MethodConfig::named(name, &keys)?;
    let adapter = Adapter::fresh(&config, &base.modules)?;
    #[cfg(feature = "compiler")]
    let saved = match base.config.is_decoder() {
        true => Some(crate::pipeline::kept::bytes(base, |modules| Ok(Adapter::fresh(&config, modules)?), TOKENS)?),
        false => None,
    };
    #[cfg(not(feature = "compiler"))]
    let saved = None;
    Ok(Here { trained: adapter.parameters(), saved, obstacle: obstacle(&adapter, base)? })
}
