//! `pleach compile`: a model with its adapters as one file, and a table of what happened on the way.

use crate::args::CompileArgs;
use crate::blocks::Compare;
use crate::failure::{Failure, Result};
use crate::pipeline::{Request, TrainPart, is_graph, table, total};
use crate::ready;
use crate::report::{self, Ui, bytes};
use pleach_plan::{Choice, Plan};
use serde_json::json;

/// Compiles.
///
/// # Errors
/// Files that are refused, whatever compiling refuses, an output that cannot be written.
pub(crate) fn compile(ui: &Ui, args: &CompileArgs) -> Result<()> {
    if args.output.is_dir() {
        return Err(Failure::usage(format!("{}: is a folder; -o names a file", args.output.display())));
    }
    if is_graph(&args.model.model) {
        return graph(ui, args);
    }
    let (entries, tokens, train) = asked(args)?;
    let entries: Vec<&str> = entries.iter().map(String::as_str).collect();
    let request = Request { train, ..Request::new(ui, &args.model, &entries, &tokens)? };
    let request = Request { choices: choices(args, &request.target)?, ..request };
    let wanted = request.choices.len();
    let (slot, ready) = ready::compile_as(ui, &args.model, request, Compare::Sample)?;
    if wanted > 0 {
        ui.note(&format!("{} of {wanted} choices are of kernels of this plan", ready.plan.choices.len()));
    }
    let size = crate::files::put(&args.output, |temporary| {
        std::fs::copy(&slot.plan, temporary).map_err(Failure::io("write", &args.output))
    })?;
    let origin = &ready.origin;
    if args.json {
        report::json(&json!({
            "plan": report::path(&args.output), "bytes": size, "cached": origin.cached, "ms": origin.ms,
            "stages": origin.rows, "compile_ms": total(&origin.rows),
        }));
    } else if !ui.quiet {
        report::print(&table(&origin.rows));
        let how = if origin.cached { "found in the cache" } else { "compiled" };
        report::line(&format!("{}: {}, {how} in {:.0} ms", args.output.display(), bytes(size), origin.ms));
    }
    Ok(())
}

/// What is to be compiled: entries, counts they are tuned for, and what is trained.
type Asked = (Vec<String>, Vec<(String, u64)>, Option<TrainPart>);

/// What the arguments ask for.
///
/// # Errors
/// A count that cannot be chosen, a method that is refused.
pub(super) fn asked(args: &CompileArgs) -> Result<Asked> {
    no_plan_flags(args)?;
    let mut tokens = vec![];
    for c in &args.shape {
        if c.symbol != "T" {
            return Err(Failure::usage(format!("--shape {}: only T can be chosen", c.symbol)));
        }
        tokens.push(("infer".to_string(), c.value));
    }
    let mut entries = args.entry.clone();
    let train = if entries.iter().any(|e| e == "train") {
        // A run evaluates by the same plan.
        entries.push("evaluate".into());
        let part = crate::training::request(&args.model, &args.method, &args.shape_of_training)?;
        // Whoever trains by the file says how many micro-batches a step has.
        Some(TrainPart { at_once: false, ..part })
    } else {
        None
    };
    Ok((entries, tokens, train))
}

fn no_plan_flags(args: &CompileArgs) -> Result<()> {
    if args.model.weights.is_some() {
        return Err(Failure::usage("--weights is for running a plan; compile takes a model folder"));
    }
    Ok(())
}

/// The choices of the plan that is named, for code of this target.
fn choices(args: &CompileArgs, target: &str) -> Result<Vec<Choice>> {
    let Some(path) = &args.choices else { return Ok(vec![]) };
    let plan = Plan::read(path).map_err(|e| Failure::from(e).within(&path.display().to_string()))?;
    let no = |why: String| Err(Failure::usage(format!("--choices {}: {why}", path.display())));
    if plan.choices.is_empty() {
        return no("the plan has none; `pleach tune` writes one".into());
    }
    if plan.target.arch != target {
        return no(format!("they were measured for {}, not for {target}", plan.target.arch));
    }
    Ok(plan.choices)
}

/// Compiles the text of a graph.
fn graph(ui: &Ui, args: &CompileArgs) -> Result<()> {
    no_plan_flags(args)?;
    if !args.model.adapter.is_empty()
        || args.method.any()
        || args.entry.iter().any(|e| e == "train")
        || args.choices.is_some()
    {
        return Err(Failure::usage(
            "the text of a graph is compiled as it is: leave out adapters, methods, choices and --entry",
        ));
    }
    let clock = std::time::Instant::now();
    let request = Request { out: args.output.clone(), ..Request::new(ui, &args.model, &[], &[])? };
    let rows = crate::child::compile(&request)?;
    let size = std::fs::metadata(&args.output).map_err(Failure::io("read", &args.output))?.len();
    let ms = clock.elapsed().as_secs_f64() * 1e3;
    if args.json {
        report::json(&json!({
            "plan": report::path(&args.output), "bytes": size, "cached": false, "ms": ms, "stages": rows, "compile_ms": total(&rows),
        }));
    } else if !ui.quiet {
        report::print(&table(&rows));
        report::line(&format!("{}: {}, compiled in {ms:.0} ms", args.output.display(), bytes(size)));
    }
    Ok(())
}
