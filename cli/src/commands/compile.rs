//! `pleach compile`: a model with its adapters as one file, and a table of what happened on the way.

use crate::args::CompileArgs;
use crate::failure::{Failure, Result};
use crate::pipeline::{Request, is_graph, table, total};
use crate::ready;
use crate::report::{self, Ui, bytes};
use serde_json::json;

/// Compiles.
///
/// # Errors
/// Files that are refused, whatever compiling refuses, an output that cannot be written.
pub(crate) fn compile(ui: &Ui, args: &CompileArgs) -> Result<()> {
    if args.model.weights.is_some() {
        return Err(Failure::usage("--weights is for running a plan; compile takes a model folder"));
    }
    if args.output.is_dir() {
        return Err(Failure::usage(format!("{}: is a folder; -o names a file", args.output.display())));
    }
    if is_graph(&args.model.model) {
        return graph(ui, args);
    }
    let mut tokens = vec![];
    for c in &args.shape {
        if c.symbol != "T" {
            return Err(Failure::usage(format!("--shape {}: only T can be chosen", c.symbol)));
        }
        tokens.push(("infer".to_string(), c.value));
    }
    let mut entries: Vec<&str> = args.entry.iter().map(String::as_str).collect();
    if entries.contains(&"train") {
        // A run evaluates by the same plan.
        entries.push("evaluate");
    }
    let train = if entries.contains(&"train") {
        let part = crate::training::request(&args.model, &args.method, &args.shape_of_training)?;
        // Whoever trains by the file says how many micro-batches a step has.
        Some(crate::pipeline::TrainPart { at_once: false, ..part })
    } else {
        None
    };
    let (slot, ready) = ready::compile(ui, &args.model, &entries, &tokens, train)?;
    let size = copy(&slot.plan, &args.output)?;
    let origin = &ready.origin;
    if args.json {
        report::json(&json!({
            "plan": args.output, "bytes": size, "cached": origin.cached, "ms": origin.ms,
            "stages": origin.rows, "compile_ms": total(&origin.rows),
        }));
    } else if !ui.quiet {
        report::print(&table(&origin.rows));
        let how = if origin.cached { "found in the cache" } else { "compiled" };
        report::line(&format!("{}: {}, {how} in {:.0} ms", args.output.display(), bytes(size), origin.ms));
    }
    Ok(())
}

/// Compiles the text of a graph.
fn graph(ui: &Ui, args: &CompileArgs) -> Result<()> {
    if !args.model.adapter.is_empty() || args.method.any() || args.entry.iter().any(|e| e == "train") {
        return Err(Failure::usage(
            "the text of a graph is compiled as it is: leave out adapters, methods and --entry",
        ));
    }
    let clock = std::time::Instant::now();
    let request = Request { out: args.output.clone(), ..Request::new(ui, &args.model, &[], &[])? };
    let rows = crate::child::compile(&request)?;
    let size = std::fs::metadata(&args.output).map_err(Failure::io("read", &args.output))?.len();
    let ms = clock.elapsed().as_secs_f64() * 1e3;
    if args.json {
        report::json(&json!({
            "plan": args.output, "bytes": size, "cached": false, "ms": ms, "stages": rows, "compile_ms": total(&rows),
        }));
    } else if !ui.quiet {
        report::print(&table(&rows));
        report::line(&format!("{}: {}, compiled in {ms:.0} ms", args.output.display(), bytes(size)));
    }
    Ok(())
}

/// Copies a plan under a temporary name that is renamed.
fn copy(from: &std::path::Path, to: &std::path::Path) -> Result<u64> {
    let mut temporary = to.as_os_str().to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    let temporary = std::path::Path::new(&temporary);
    let done = std::fs::copy(from, temporary).and_then(|n| std::fs::rename(temporary, to).map(|()| n));
    if done.is_err() {
        let _ = std::fs::remove_file(temporary);
    }
    done.map_err(Failure::io("write", to))
}
