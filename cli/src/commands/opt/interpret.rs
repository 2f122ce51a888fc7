//! Executing the text of a graph with the reference interpreter: one entry on given tensors, or every stage of a pipeline to find the
//! pass that changes a result.

use crate::args::OptArgs;
use crate::failure::{Failure, Result};
use crate::inputs::write_tensors;
use crate::report::{self, Table, Ui};
use pleach_ir::interp::{self, RunResult, Symbols, Tensor};
use pleach_ir::{DType, Graph, ParamId, Sym};
use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::path::Path;

/// Runs one entry, after the `prepare` entries that the file leaves open, and shows its outputs.
pub(super) fn interpret(ui: &Ui, args: &OptArgs, g: &Graph) -> Result<()> {
    let result = execute(args, g, &given(args)?)?;
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

/// Runs the entry at every stage and stops at the first whose outputs are not those of the stage before.
///
/// # Errors
/// The pass and the output that moved.
pub(super) fn check_each(ui: &Ui, args: &OptArgs, stages: &[(String, Graph)]) -> Result<()> {
    let given = given(args)?;
    let mut before: Option<RunResult> = None;
    for (pass, g) in stages {
        let now = execute(args, g, &given).map_err(|e| e.within(&format!("after {pass}")))?;
        if let Some(before) = &before {
            let mut worst = 0.0f64;
            for (name, a) in &before.outputs {
                let b = now.outputs.get(name);
                let b = b.ok_or_else(|| Failure::new(format!("pass {pass} loses output `{name}`")))?;
                let error =
                    distance(a, b).ok_or_else(|| Failure::new(format!("pass {pass} changes the shape of `{name}`")))?;
                if error.is_nan() || error > args.tolerance {
                    return Err(Failure::new(format!(
                        "pass {pass} moves output `{name}` by {error:.1e} of its largest value (tolerance {:.1e})",
                        args.tolerance
                    )));
                }
                worst = worst.max(error);
            }
            ui.note(&format!("{pass}: outputs move by {worst:.1e} at most"));
        }
        before = Some(now);
    }
    report::line(&format!("{} stages give the same outputs", stages.len()));
    Ok(())
}

/// The largest difference beside the largest value of `a`; none if the shapes differ.
fn distance(a: &Tensor, b: &Tensor) -> Option<f64> {
    if a.shape != b.shape {
        return None;
    }
    let (a, b) = (a.floats(), b.floats());
    let top = a.iter().map(|x| f64::from(x.abs())).fold(0.0, f64::max).max(1e-30);
    let bad = |x: &f32, y: &f32| x.is_nan() != y.is_nan();
    if a.iter().zip(b.iter()).any(|(x, y)| bad(x, y)) {
        return Some(f64::NAN);
    }
    Some(
        a.iter().zip(b.iter()).filter(|(x, y)| x != y).map(|(x, y)| f64::from((x - y).abs())).fold(0.0, f64::max) / top,
    )
}

/// The tensors that `--interpret` names.
fn given(args: &OptArgs) -> Result<BTreeMap<String, Tensor>> {
    let file = args.interpret.as_deref().ok_or_else(|| Failure::usage("--interpret names the file of inputs"))?;
    read_tensors(file)
}

/// The results of the entry that is asked for.
fn execute(args: &OptArgs, g: &Graph, given: &BTreeMap<String, Tensor>) -> Result<RunResult> {
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
        let result = interp::run_entry_with(&g.params, &|p: ParamId| known.get(&p.0), e, given, &symbols)
            .map_err(|x| Failure::from(x).within(&e.name))?;
        values.extend(result.assigns.into_iter().map(|(p, t)| (p.0, t)));
    }
    let entry = match &args.entry {
        Some(name) => g.entry(name),
        None => g.entries.iter().find(|e| !e.name.starts_with("prepare(")),
    };
    let names = || g.entries.iter().map(|e| e.name.as_str()).collect::<Vec<_>>().join(", ");
    let entry = entry.ok_or_else(|| Failure::usage(format!("no such entry; the graph has: {}", names())))?;
    interp::run_entry_with(&g.params, &|p: ParamId| values.get(&p.0), entry, given, &symbols)
        .map_err(|x| Failure::from(x).within(&entry.name))
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
