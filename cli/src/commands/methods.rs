//! `pleach methods`: every adapter method, what it computes, and how much it trains in a model.

use crate::args::MethodsArgs;
use crate::failure::Result;
use crate::method::names;
use crate::report::{self, Table, count};
use pleach_frontend::adapter::{method_names, obstacle};
use pleach_frontend::peft::MethodConfig;
use pleach_frontend::{Adapter, Checkpoint};
use serde_json::{Map, Value, json};

/// What a method is for one model.
struct Here {
    /// Trained values.
    trained: u64,
    /// Why no single weight can take its place.
    obstacle: Option<String>,
}

/// Lists the methods.
///
/// # Errors
/// A model that cannot be read.
pub(crate) fn methods(args: &MethodsArgs) -> Result<()> {
    let base = args.model.as_deref().map(Checkpoint::open).transpose()?;
    let mut rows = vec![];
    let mut table = match base {
        None => Table::new(&["method", "<PEFT", "<formula"]),
        Some(_) => Table::new(&["method", "<PEFT", "trained", "<merges", "<formula"]),
    };
    for name in method_names() {
        // What a method needs to be told has no place here: its own defaults say what it is.
        let config = MethodConfig::named(name, &Map::new())?;
        let (peft, formula) = (config.method.peft_type(), config.method.formula());
        let here = base.as_ref().map(|base| look(name, &config, base, args));
        let mut row = json!({"method": name, "peft_type": peft, "formula": formula});
        match &here {
            None => table.row([name, peft, formula]),
            Some(Ok(h)) => {
                row["trained"] = json!(h.trained);
                row["merges"] = json!(h.obstacle.is_none());
                row["obstacle"] = json!(h.obstacle);
                let merges = if h.obstacle.is_none() { "yes" } else { "no" };
                table.row([name, peft, &count(h.trained), merges, formula]);
            }
            Some(Err(e)) => {
                row["refused"] = json!(e.message);
                table.row([name, peft, "-", "-", formula]);
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
    let adapter = Adapter::fresh(&MethodConfig::named(name, &keys)?, &base.modules)?;
    Ok(Here { trained: adapter.parameters(), obstacle: obstacle(&adapter, base)? })
}
