//! `pleach bench kernels`: the matmul kernels alone, x [M, K] times W [N, K] transposed, weights packed at load.

use super::machine::Gauge;
use super::median;
use crate::args::{DType, ModelArgs, Target};
use crate::failure::{Failure, Result};
use crate::pipeline::{self, Request};
use crate::report::{self, Table, Ui};
use pleach_frontend::{Checkpoint, ModuleKind};
use pleach_ir::{Dim, Entry, Graph, Op, Param, Role, Source, TensorType};
use pleach_runtime::{Options, Session, Values, random_weights};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// (N, K) of SmolLM2-135M's linears and of its head.
const SHAPES: [(u64, u64); 5] = [(576, 576), (192, 576), (1536, 576), (576, 1536), (49152, 576)];
/// Seconds spent on one shape.
const SPEND: f64 = 0.4;

struct Row {
    shape: [u64; 3],
    ms: f64,
    min_ms: f64,
}

/// Measures.
///
/// # Errors
/// A model that is refused, or whatever compiling and running refuses.
pub(super) fn kernels(ui: &Ui, model: Option<&Path>, tokens: &[u64], as_json: bool) -> Result<()> {
    let shapes = match model {
        None => SHAPES.to_vec(),
        Some(dir) => shapes(dir)?,
    };
    if tokens.is_empty() || tokens.contains(&0) {
        return Err(Failure::usage("--tokens needs numbers of at least 1"));
    }
    let graph = graph(&shapes)?;
    let args = ModelArgs {
        model: Path::new(".").into(),
        weights: None,
        adapter: vec![],
        merge: false,
        dtype: DType::F32,
        target: Target::Cpu,
        no_cache: true,
        no_blocks: true,
        disable: vec![],
        disable_rule: vec![],
    };
    let request = Request::new(ui, &args, &[], &[])?;
    let outcome = pipeline::passes(&graph, &request, false)?;
    let (plan, _) = pipeline::lower(&outcome.graph, &request, pleach_plan::Meta::default())?;
    let plan = Arc::new(plan);
    let weights = random_weights(&plan, 0)?;
    let most = tokens.iter().copied().max().unwrap_or(1);
    let mut session = Session::open(plan, weights, &Options::default().threads(ui.threads).capacity("T", most))?;
    let mut gauge = Gauge::flops(ui)?;
    let mut peak = 0.0;
    let mut rows = vec![];
    let bar = ui.progress((tokens.len() * shapes.len()) as u64, "measuring");
    for m in tokens {
        for (i, (n, k)) in shapes.iter().enumerate() {
            let x: Vec<f32> = (0..m * k).map(|i| (i % 13) as f32 / 13.0 - 0.5).collect();
            let (ms, min_ms) = measure(&mut session, &format!("mm{i}"), &x)?;
            rows.push(Row { shape: [*m, *n, *k], ms, min_ms });
            peak = gauge.measure()?;
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    show(&rows, peak, as_json);
    Ok(())
}

fn show(rows: &[Row], peak: f64, as_json: bool) {
    let rate = |r: &Row, ms: f64| 2.0 * r.shape.iter().product::<u64>() as f64 / (ms * 1e-3);
    // The peak is a best of many, so the best of a shape is held against it.
    let share = |r: &Row| rate(r, r.min_ms) / peak;
    if as_json {
        let list: Vec<Value> = rows
            .iter()
            .map(|r| {
                json!({"shape": r.shape, "ms": r.ms, "min_ms": r.min_ms, "gflops": rate(r, r.ms) * 1e-9,
                       "peak_share": share(r)})
            })
            .collect();
        return report::json(&list.into());
    }
    let mut t = Table::new(&["M x N x K", "ms", "best ms", "Gflop/s", "of peak"]);
    for r in rows {
        let [m, n, k] = r.shape;
        let cells = [format!("{:.4}", r.ms), format!("{:.4}", r.min_ms), format!("{:.1}", rate(r, r.ms) * 1e-9)];
        t.row(std::iter::once(format!("{m} x {n} x {k}")).chain(cells).chain([format!("{:.1} %", 100.0 * share(r))]));
    }
    report::print(&t.text());
    report::line(&format!("peak of this machine with these threads: {:.1} Gflop/s", peak * 1e-9));
}

fn measure(session: &mut Session, entry: &str, x: &[f32]) -> Result<(f64, f64)> {
    let mut times = vec![];
    let clock = Instant::now();
    session.run(entry, &[("x", Values::F32(x))])?;
    while times.len() < 5 || clock.elapsed().as_secs_f64() < SPEND {
        let start = Instant::now();
        session.run(entry, &[("x", Values::F32(x))])?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    Ok((median(&mut times), times[0]))
}

/// The distinct shapes of a model's linear layers, in order of appearance.
fn shapes(dir: &Path) -> Result<Vec<(u64, u64)>> {
    let mut out = vec![];
    for m in Checkpoint::open(dir)?.modules.iter() {
        if let ModuleKind::Linear { input, output, .. } = m.kind
            && !out.contains(&(output, input))
        {
            out.push((output, input));
        }
    }
    Ok(out)
}

/// One entry per shape.
fn graph(shapes: &[(u64, u64)]) -> Result<Graph> {
    let mut g = Graph::default();
    let dtype = pleach_ir::DType::F32;
    for (i, (n, k)) in shapes.iter().enumerate() {
        let name = format!("w{i}");
        let ty = TensorType::new(dtype, [*n, *k]);
        let w = g.add_param(Param { name: name.clone(), ty, role: Role::Frozen, source: Source::Checkpoint(name) });
        let mut e = Entry::new(format!("mm{i}"));
        let shape = vec![Dim::Symbol(pleach_ir::Sym::T), Dim::Known(*k)];
        let x = e.push(&g.params, Op::Input { name: "x".into(), dtype, shape }, &[])?;
        let w = e.push(&g.params, Op::Param(w), &[])?;
        let y = e.push(&g.params, Op::MatMul { ta: false, tb: true }, &[x, w])?;
        e.output("y", y);
        g.entries.push(e);
    }
    Ok(g)
}
