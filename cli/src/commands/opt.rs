//! `pleach opt`: passes on the textual IR. The result goes to stdout, everything about it to stderr.
//!
//! A pass that fails, or panics, leaves a reproducer: the graph it was given and the command that repeats the failure.

mod diff;
mod interpret;

use crate::args::{DType, OptArgs, Target};
use crate::failure::{Failure, Result};
use crate::report::{self, Table, Ui};
use clap::ValueEnum;
use pleach_ir::{Graph, IrError, text};
use pleach_passes::differentiate::{ACCUMULATE, STEP};
use pleach_passes::{Options, Outcome, Pipeline, run_watched};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// Runs passes, and the result if asked to.
///
/// # Errors
/// A text that does not parse or verify, a pass that does not exist, the error of a pass, inputs that do not fit.
pub(crate) fn opt(ui: &Ui, args: &OptArgs) -> Result<()> {
    if let Some([a, b]) = args.diff.as_deref() {
        return diff::diff(&read_graph(a)?, &read_graph(b)?);
    }
    let file = args.file.as_deref().ok_or_else(|| Failure::usage("name the text of a graph"))?;
    let graph = read_graph(file)?;
    let default = Pipeline::default();
    let pipeline = Pipeline {
        passes: args.passes.clone().unwrap_or(default.passes),
        disable: args.disable.clone(),
        stop_after: args.stop_after,
        print_ir_after_change: args.print_ir_after_change,
        verify_each: args.verify_each,
    };
    let options = options(args, &graph);
    let (stages, out) = run(args, &graph, &pipeline, &options)?;
    if args.timing {
        let mut t = Table::new(&["pass", "<nodes", "<changed", "ms", "<"]);
        for r in &out.reports {
            let changed = if r.changed { "yes" } else { "no" };
            let nodes = format!("{} → {}", r.nodes_before, r.nodes_after);
            t.row([r.name.to_string(), nodes, changed.into(), format!("{:.1}", r.ms), r.note.clone()]);
        }
        ui.note(t.text().trim_end());
    }
    for (stage, ir) in &out.dumps {
        report::print(&format!("// {stage}\n{}\n", ir.trim_end()));
    }
    if args.check_each {
        return interpret::check_each(ui, args, &stages);
    }
    if args.interpret.is_some() {
        return interpret::interpret(ui, args, &out.graph);
    }
    if args.print_ir_after_change {
        report::line("// result");
    }
    report::print(&text::print(&out.graph));
    Ok(())
}

/// Options of the passes.
fn options(args: &OptArgs, graph: &Graph) -> Options {
    let mut tokens_hint: Vec<(String, u64)> = vec![];
    for t in &args.tokens {
        tokens_hint.extend(t.entry.clone().map(|e| (e, t.count)));
    }
    if let Some(all) = args.tokens.iter().find(|t| t.entry.is_none()) {
        // Those that a pass will make, too.
        let names = graph.entries.iter().map(|e| e.name.as_str()).chain([ACCUMULATE, STEP]);
        tokens_hint.extend(names.map(|n| (n.to_string(), all.count)));
    }
    let gpu = matches!(args.target, Target::Cuda | Target::Sm80 | Target::Sm90a);
    Options {
        merge: args.merge,
        disabled_rules: args.disable_rule.clone(),
        tokens_hint,
        dtype: if args.dtype == DType::Bf16 { pleach_ir::DType::BF16 } else { pleach_ir::DType::F32 },
        target: if gpu { pleach_passes::Target::GPU } else { pleach_passes::Target::CPU },
        step_at_once: args.at_once,
        ..Options::default()
    }
}

/// A value as it is given on the command line.
fn name(v: impl ValueEnum) -> String {
    v.to_possible_value().map_or_else(String::new, |v| v.get_name().to_string())
}

/// The flags that these options were given by.
fn flags(args: &OptArgs) -> String {
    let mut out = String::new();
    args.disable_rule.iter().for_each(|r| out += &format!(" --disable-rule {r}"));
    for (flag, on) in [("merge", args.merge), ("at-once", args.at_once)] {
        if on {
            out += &format!(" --{flag}");
        }
    }
    if args.dtype != DType::F32 {
        out += &format!(" --dtype {}", name(args.dtype));
    }
    if args.target != Target::Cpu {
        out += &format!(" --target {}", name(args.target));
    }
    for t in &args.tokens {
        let entry = t.entry.as_ref().map_or(String::new(), |e| format!("{e}="));
        out += &format!(" --tokens {entry}{}", t.count);
    }
    out
}

/// Runs the passes; gives every graph on the way, `(name of the pass that made it, graph)`, where they are wanted.
fn run(
    args: &OptArgs,
    graph: &Graph,
    pipeline: &Pipeline,
    options: &Options,
) -> Result<(Vec<(String, Graph)>, Outcome)> {
    let keep = args.dump_dir.is_some() || args.check_each;
    let mut stages: Vec<(String, Graph)> = vec![];
    let mut made_by = "input".to_string();
    let mut given: Option<(String, Graph)> = None;
    let result = catch_unwind(AssertUnwindSafe(|| {
        run_watched(graph, pipeline, options, &mut |pass, g| {
            if keep {
                stages.push((std::mem::replace(&mut made_by, pass.to_string()), g.clone()));
            }
            given = Some((pass.to_string(), g.clone()));
        })
    }));
    let failed = match result {
        Ok(Ok(out)) => {
            if keep {
                stages.push((made_by, out.graph.clone()));
                if let Some(dir) = &args.dump_dir {
                    dump(dir, &stages)?;
                }
            }
            return Ok((stages, out));
        }
        Ok(Err(e)) => Failure::from(e),
        Err(_) => Failure::new("a pass panicked; this is a defect of pleach, the message is above"),
    };
    if let Some(dir) = &args.dump_dir {
        dump(dir, &stages)?;
    }
    let Some((pass, g)) = given else { return Err(failed) };
    let command = format!("pleach opt {} --passes {pass}{}", args.reproducer.display(), flags(args));
    crate::files::write(&args.reproducer, &format!("// {command}\n{}", text::print(&g)))?;
    Err(Failure::new(format!("pass {pass}: {}\nto repeat only this: {command}", failed.message)))
}

/// Writes every stage as `NN-<pass>.ir`.
fn dump(dir: &Path, stages: &[(String, Graph)]) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(Failure::io("create", dir))?;
    for (i, (name, g)) in stages.iter().enumerate() {
        let path = dir.join(format!("{i:02}-{name}.ir"));
        crate::files::write(&path, &text::print(g))?;
    }
    Ok(())
}

/// The graph of a file, or of stdin for `-`.
///
/// # Errors
/// A file that cannot be read, a text that does not parse.
pub(crate) fn read_graph(file: &Path) -> Result<Graph> {
    let name = file.display().to_string();
    let source = match name.as_str() {
        "-" => {
            std::io::read_to_string(std::io::stdin()).map_err(|e| Failure::new(format!("cannot read stdin: {e}")))?
        }
        _ => std::fs::read_to_string(file).map_err(Failure::io("read", file))?,
    };
    text::parse(&source).map_err(|e| show(&name, &source, &e))
}

/// A parse error with its line and a mark under its column.
fn show(name: &str, source: &str, e: &IrError) -> Failure {
    let IrError::Parse { line, column, why } = e else { return Failure::from(e.clone()).within(name) };
    let text = source.lines().nth(line.saturating_sub(1)).unwrap_or_default();
    // The mark stands under its character: tabs before it are kept.
    let pad: String = text.chars().take(column.saturating_sub(1)).map(|c| if c == '\t' { '\t' } else { ' ' }).collect();
    Failure::new(format!("{name}:{line}:{column}: {why}\n  {text}\n  {pad}^"))
}
