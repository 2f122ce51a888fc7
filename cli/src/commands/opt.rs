//! `pleach opt`: passes on the textual IR. The result goes to stdout, everything about it to stderr.

use crate::args::OptArgs;
use crate::failure::{Failure, Result};
use crate::inputs::write_tensors;
use crate::report::{self, Table, Ui};
use pleach_ir::interp::{self, Symbols, Tensor};
use pleach_ir::{DType, Graph, IrError, ParamId, Sym, text};
use pleach_passes::{Options, Pipeline};
use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::path::Path;

/// Runs passes, and the result if asked to.
///
/// # Errors
/// A text that does not parse or verify, a pass that does not exist, the error of a pass, inputs that do not fit.
pub(crate) fn opt(ui: &Ui, args: &OptArgs) -> Result<()> {
    let name = args.file.display().to_string();
    let source = match name.as_str() {
        "-" => {
            std::io::read_to_string(std::io::stdin()).map_err(|e| Failure::new(format!("cannot read stdin: {e}")))?
        }
        _ => std::fs::read_to_string(&args.file).map_err(Failure::io("read", &args.file))?,
    };
    let graph = text::parse(&source).map_err(|e| show(&name, &source, &e))?;
    let default = Pipeline::default();
    let pipeline = Pipeline {
        passes: args.passes.clone().unwrap_or(default.passes),
        disable: args.disable.clone(),
        stop_after: args.stop_after,
        print_ir_after_change: args.print_ir_after_change,
    };
    let options = Options { merge: args.merge, disabled_rules: args.disable_rule.clone(), ..Options::default() };
    let out = pleach_passes::run(&graph, &pipeline, &options)?;
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
    match &args.interpret {
        Some(file) => interpret(ui, args, &out.graph, file),
        None => {
            if args.print_ir_after_change {
                report::line("// result");
            }
            report::print(&text::print(&out.graph));
            Ok(())
        }
    }
}

/// A parse error with its line and a mark under its column.
fn show(name: &str, source: &str, e: &IrError) -> Failure {
    let IrError::Parse { line, column, why } = e else { return Failure::from(e.clone()).within(name) };
    let text = source.lines().nth(line.saturating_sub(1)).unwrap_or_default();
    // The mark stands under its character: tabs before it are kept.
    let pad: String = text.chars().take(column.saturating_sub(1)).map(|c| if c == '\t' { '\t' } else { ' ' }).collect();
    Failure::new(format!("{name}:{line}:{column}: {why}\n  {text}\n  {pad}^"))
}

/// Runs one entry in the reference interpreter, after the `prepare` entries that the file leaves open.
fn interpret(ui: &Ui, args: &OptArgs, g: &Graph, file: &Path) -> Result<()> {
    let given = read_tensors(file)?;
    let mut symbols = Symbols::new();
    for c in &args.capacity {
        symbols.extend(Sym::new(&c.symbol).map(|s| (s, c.value)));
    }
    let mut values: BTreeMap<u32, Tensor> = BTreeMap::new();
    for (i, p) in g.params.iter().enumerate() {
        values.extend(given.get(&p.name).map(|t| (i as u32, t.clone())));
    }
    for e in g.entries.iter().filter(|e| e.name.starts_with("prepare(")) {
        let known = values.clone();
        let result = interp::run_entry_with(&g.params, &|p: ParamId| known.get(&p.0), e, &given, &symbols)
            .map_err(|x| Failure::from(x).within(&e.name))?;
        values.extend(result.assigns.into_iter().map(|(p, t)| (p.0, t)));
    }
    let entry = match &args.entry {
        Some(name) => g.entry(name),
        None => g.entries.iter().find(|e| !e.name.starts_with("prepare(")),
    };
    let names = || g.entries.iter().map(|e| e.name.as_str()).collect::<Vec<_>>().join(", ");
    let entry = entry.ok_or_else(|| Failure::usage(format!("no such entry; the graph has: {}", names())))?;
    let result = interp::run_entry_with(&g.params, &|p: ParamId| values.get(&p.0), entry, &given, &symbols)
        .map_err(|x| Failure::from(x).within(&entry.name))?;
    let mut t = Table::new(&["output", "<type", "smallest", "largest", "mean", "<first values"]);
    for (name, x) in &result.outputs {
        let v = x.floats();
        let n = v.len().max(1) as f64;
        let mean = v.iter().map(|x| f64::from(*x)).sum::<f64>() / n;
        let (lo, hi) = v.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(a, b), x| (a.min(*x), b.max(*x)));
        let first: Vec<String> = v.iter().take(6).map(|x| format!("{x:.6}")).collect();
        let ty = format!("{}{:?}", x.dtype().name(), x.shape);
        t.row([name.clone(), ty, format!("{lo:.6}"), format!("{hi:.6}"), format!("{mean:.6}"), first.join(" ")]);
    }
    report::print(&t.text());
    if let Some(path) = &args.out {
        let bytes: Vec<(&str, Vec<u64>, Vec<u8>)> = result
            .outputs
            .iter()
            .map(|(n, x)| (n.as_str(), x.shape.clone(), x.floats().iter().flat_map(|v| v.to_le_bytes()).collect()))
            .collect();
        let views: Vec<(&str, Vec<u64>, &[u8])> = bytes.iter().map(|(n, s, b)| (*n, s.clone(), b.as_slice())).collect();
        write_tensors(path, &views)?;
        ui.note(&format!("{} outputs written to {}", views.len(), path.display()));
    }
    Ok(())
}

/// All tensors of a safetensors file; 64-bit integers become i32.
fn read_tensors(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    use safetensors::Dtype as D;
    let bytes = std::fs::read(path).map_err(Failure::io("read", path))?;
    let bad = |why: String| Failure::new(format!("{}: {why}", path.display()));
    let file = SafeTensors::deserialize(&bytes).map_err(|e| bad(format!("is no usable safetensors file ({e})")))?;
    let mut out = BTreeMap::new();
    for (name, t) in file.tensors() {
        let shape: Vec<u64> = t.shape().iter().map(|d| *d as u64).collect();
        let dtype = match t.dtype() {
            D::F32 => DType::F32,
            D::BF16 => DType::BF16,
            D::F16 => DType::F16,
            D::I32 => DType::I32,
            D::BOOL => DType::Bool,
            D::I64 => {
                let narrow = |c: &[u8]| {
                    let x = i64::from_le_bytes(c.try_into().unwrap_or_default());
                    i32::try_from(x).map_err(|_| bad(format!("tensor `{name}` holds {x}, which no i32 holds")))
                };
                let values = t.data().chunks_exact(8).map(narrow).collect::<Result<Vec<i32>>>()?;
                out.insert(name, Tensor::i32(shape, values));
                continue;
            }
            other => return Err(bad(format!("tensor `{name}` is {other:?}; give f32, f16, bf16, i32, i64 or bool"))),
        };
        out.insert(name, Tensor::from_bytes(dtype, shape, t.data())?);
    }
    Ok(out)
}
