//! What this machine can do: multiply-adds in registers, and reading memory. Both are measured by kernels of our own
//! compiler on our own thread pool, over memory of a session (same pages, same threads), in the run that uses them.

use crate::failure::{Failure, Result};
use crate::report::Ui;
use pleach_codegen::emit::HostIsa;
use pleach_codegen::{HostTarget, link, mlir};
use pleach_plan::{
    Blob, BlobKind, Buffer, BufferKind, DType, Entry, Expr, Kernel, Layout, Output, Param, Plan, Role, Source, Step,
    Target,
};
use pleach_runtime::{InMemory, Options, Session};
use std::fmt::Write;
use std::sync::Arc;
use std::time::Instant;

/// Rounds of the multiply-add loop of one task.
const ROUNDS: u64 = 400_000;
/// Bytes that one task reads.
const CHUNK: u64 = 1 << 20;
/// Runs of one measurement.
const REPEATS: usize = 5;

/// One way of measuring the machine, to be repeated beside what is compared with it: the machine is shared, and its best
/// moment counts.
pub(crate) struct Gauge {
    session: Session,
    entry: &'static str,
    work: f64,
    best: f64,
}

impl Gauge {
    /// Independent multiply-adds in registers, all workers: floating-point operations.
    ///
    /// # Errors
    /// The code cannot be compiled or loaded.
    pub(crate) fn flops(ui: &Ui) -> Result<Gauge> {
        let host = host()?;
        let chains = if host.isa == HostIsa::Avx512 { 16 } else { 10 };
        let lanes = host.isa.lanes() as u64;
        let tasks = 4 * ui.workers() as u64;
        let out = tasks * lanes * 4;
        let entry = Entry {
            name: "peak".into(),
            outputs: vec![output(tasks * lanes)],
            buffers: vec![buffer(BufferKind::Output, out)],
            steps: vec![step(0, &[0])],
            ..Entry::default()
        };
        let kernels = vec![kernel("peak", tasks, vec![], vec![out])];
        let plan = plan(&host, &[peak_text(chains, lanes)], kernels, vec![], vec![entry])?;
        let work = (tasks * ROUNDS * chains * lanes * 2) as f64;
        Ok(Gauge { session: open(ui, plan)?, entry: "peak", work, best: 0.0 })
    }

    /// About `bytes` bytes of a session's memory read once, all workers: bytes.
    ///
    /// # Errors
    /// The code cannot be compiled or loaded, or there is no room.
    pub(crate) fn bandwidth(ui: &Ui, bytes: u64) -> Result<Gauge> {
        let host = host()?;
        let lanes = host.isa.lanes() as u64;
        let tasks = bytes.div_ceil(CHUNK).max(1);
        let (size, out) = (tasks * CHUNK, tasks * lanes * 4);
        let kernels = vec![kernel("fill", tasks, vec![], vec![size]), kernel("read", tasks, vec![size], vec![out])];
        let shape = vec![Expr::Const(size / 4)];
        let param = Param::new("data", DType::F32, shape, Layout::RowMajor, Role::State, Source::Zeros);
        let fill = Entry {
            name: "fill".into(),
            buffers: vec![buffer(BufferKind::Param(0), size)],
            steps: vec![step(0, &[0])],
            ..Entry::default()
        };
        let read = Entry {
            name: "read".into(),
            outputs: vec![Output { buffer: 1, ..output(tasks * lanes) }],
            buffers: vec![buffer(BufferKind::Param(0), size), buffer(BufferKind::Output, out)],
            steps: vec![step(1, &[0, 1])],
            ..Entry::default()
        };
        let plan = plan(&host, &[fill_text(lanes), read_text(lanes)], kernels, vec![param], vec![fill, read])?;
        let mut session = open(ui, plan)?;
        session.run("fill", &[])?;
        Ok(Gauge { session, entry: "read", work: size as f64, best: 0.0 })
    }

    /// Measures once more; the best so far, per second.
    ///
    /// # Errors
    /// None but what a run gives.
    pub(crate) fn measure(&mut self) -> Result<f64> {
        for _ in 0..REPEATS {
            let clock = Instant::now();
            self.session.run(self.entry, &[])?;
            self.best = self.best.max(self.work / clock.elapsed().as_secs_f64().max(1e-9));
        }
        Ok(self.best)
    }
}

fn host() -> Result<HostTarget> {
    HostTarget::detect().ok_or_else(|| Failure::new("this processor lacks AVX2 or FMA"))
}

fn kernel(symbol: &str, tasks: u64, operands: Vec<u64>, results: Vec<u64>) -> Kernel {
    Kernel {
        symbol: symbol.into(),
        blob: 0,
        class: "row".into(),
        tasks: Expr::Const(tasks),
        scratch_bytes: Expr::Const(0),
        operands: operands.into_iter().map(Expr::Const).collect(),
        aliases: vec![None; results.len()],
        results: results.into_iter().map(Expr::Const).collect(),
        flops: Expr::Const(0),
        bytes: Expr::Const(0),
        launches: vec![],
        library: None,
    }
}

fn buffer(kind: BufferKind, bytes: u64) -> Buffer {
    Buffer { kind, bytes: Expr::Const(bytes), name: String::new() }
}

fn step(kernel: u32, buffers: &[u32]) -> Step {
    Step { kernel, buffers: buffers.to_vec(), origin: String::new() }
}

fn output(elements: u64) -> Output {
    Output { name: "sums".into(), buffer: 0, dtype: DType::F32, shape: vec![Expr::Const(elements)] }
}

fn plan(
    host: &HostTarget,
    texts: &[String],
    kernels: Vec<Kernel>,
    params: Vec<Param>,
    entries: Vec<Entry>,
) -> Result<Plan> {
    let objects = texts.iter().map(|t| mlir::compile_object(t, host)).collect::<std::result::Result<Vec<_>, _>>()?;
    let blob = Blob { name: "kernels".into(), kind: BlobKind::HostObject, bytes: link::link(&objects)? };
    let features = host.required_features().into_iter().map(String::from).collect();
    let target = Target { arch: "x86_64".into(), features };
    Ok(Plan { target, params, kernels, entries, blobs: vec![blob], ..Plan::default() })
}

fn open(ui: &Ui, plan: Plan) -> Result<Session> {
    Ok(Session::open(Arc::new(plan), Arc::new(InMemory::new()), &Options::default().threads(ui.threads))?)
}

const HEAD: &str = "(%b: !llvm.ptr, %d: !llvm.ptr, %first: i64, %last: i64, %s: !llvm.ptr) {
  %zero = arith.constant 0 : i64
  %one = arith.constant 1 : i64
";

/// Independent chains of multiply-adds in registers; every task stores the sum of its chains.
fn peak_text(chains: u64, lanes: u64) -> String {
    let v = format!("vector<{lanes}xf32>");
    let mut t = format!("func.func @peak{HEAD}  %n = arith.constant {ROUNDS} : i64\n");
    let _ = writeln!(t, "  %lanes = arith.constant {lanes} : i64\n  %x = arith.constant dense<0.999> : {v}");
    let _ = writeln!(t, "  %y = arith.constant dense<0.001> : {v}\n  %out = llvm.load %b : !llvm.ptr -> !llvm.ptr");
    let list = |f: &dyn Fn(u64) -> String| (0..chains).map(f).collect::<Vec<_>>().join(", ");
    for c in 0..chains {
        // Chains that begin alike would be one chain.
        let _ = writeln!(t, "  %i{c} = arith.constant dense<{c}.5> : {v}");
    }
    let _ = writeln!(t, "  scf.for %t = %first to %last step %one : i64 {{");
    let types = list(&|_| v.clone());
    let starts = list(&|c| format!("%a{c} = %i{c}"));
    let _ =
        writeln!(t, "    %r:{chains} = scf.for %k = %zero to %n step %one iter_args({starts}) -> ({types}) : i64 {{");
    for c in 0..chains {
        let _ = writeln!(t, "      %c{c} = math.fma %a{c}, %x, %y : {v}");
    }
    let _ = writeln!(t, "      scf.yield {} : {types}\n    }}", list(&|c| format!("%c{c}")));
    sum(&mut t, chains, &v, "%r#");
    t
}

/// Adds up the chains and stores the sum of task `%t`.
fn sum(t: &mut String, chains: u64, v: &str, of: &str) {
    let _ = writeln!(t, "    %s1 = arith.addf {of}0, {of}1 : {v}");
    for c in 2..chains {
        let _ = writeln!(t, "    %s{c} = arith.addf %s{}, {of}{c} : {v}", c - 1);
    }
    let _ = writeln!(t, "    %o = arith.muli %t, %lanes : i64");
    let _ = writeln!(t, "    %p = llvm.getelementptr %out[%o] : (!llvm.ptr, i64) -> !llvm.ptr, f32");
    let _ =
        writeln!(t, "    llvm.store %s{}, %p {{alignment = 4 : i64}} : {v}, !llvm.ptr\n  }}\n  return\n}}", chains - 1);
}

/// Fills a chunk with ones.
fn fill_text(lanes: u64) -> String {
    let v = format!("vector<{lanes}xf32>");
    let (chunk, step) = (CHUNK / 4, lanes);
    format!(
        "func.func @fill{HEAD}  %n = arith.constant {chunk} : i64
  %step = arith.constant {step} : i64
  %x = arith.constant dense<1.0> : {v}
  %out = llvm.load %b : !llvm.ptr -> !llvm.ptr
  scf.for %t = %first to %last step %one : i64 {{
    %base = arith.muli %t, %n : i64
    scf.for %k = %zero to %n step %step : i64 {{
      %i = arith.addi %base, %k : i64
      %p = llvm.getelementptr %out[%i] : (!llvm.ptr, i64) -> !llvm.ptr, f32
      llvm.store %x, %p {{alignment = 4 : i64}} : {v}, !llvm.ptr
    }}
  }}
  return
}}
"
    )
}

/// Adds up a chunk in eight sums.
fn read_text(lanes: u64) -> String {
    const SUMS: u64 = 8;
    let v = format!("vector<{lanes}xf32>");
    let mut t = format!("func.func @read{HEAD}  %n = arith.constant {} : i64\n", CHUNK / 4);
    let _ = writeln!(t, "  %lanes = arith.constant {lanes} : i64\n  %step = arith.constant {} : i64", lanes * SUMS);
    let _ = writeln!(t, "  %x = arith.constant dense<0.0> : {v}\n  %in = llvm.load %b : !llvm.ptr -> !llvm.ptr");
    let _ = writeln!(t, "  %q = llvm.getelementptr %b[8] : (!llvm.ptr) -> !llvm.ptr, i8");
    let _ = writeln!(t, "  %out = llvm.load %q : !llvm.ptr -> !llvm.ptr");
    let _ = writeln!(t, "  scf.for %t = %first to %last step %one : i64 {{\n    %base = arith.muli %t, %n : i64");
    let list = |f: &dyn Fn(u64) -> String| (0..SUMS).map(f).collect::<Vec<_>>().join(", ");
    let (types, starts) = (list(&|_| v.clone()), list(&|c| format!("%a{c} = %x")));
    let _ =
        writeln!(t, "    %r:{SUMS} = scf.for %k = %zero to %n step %step iter_args({starts}) -> ({types}) : i64 {{");
    let _ = writeln!(t, "      %i = arith.addi %base, %k : i64");
    let _ = writeln!(t, "      %p = llvm.getelementptr %in[%i] : (!llvm.ptr, i64) -> !llvm.ptr, f32");
    for c in 0..SUMS {
        let at = c * lanes * 4;
        let _ = writeln!(t, "      %p{c} = llvm.getelementptr %p[{at}] : (!llvm.ptr) -> !llvm.ptr, i8");
        let _ = writeln!(t, "      %v{c} = llvm.load %p{c} {{alignment = 4 : i64}} : !llvm.ptr -> {v}");
        let _ = writeln!(t, "      %c{c} = arith.addf %a{c}, %v{c} : {v}");
    }
    let _ = writeln!(t, "      scf.yield {} : {types}\n    }}", list(&|c| format!("%c{c}")));
    sum(&mut t, SUMS, &v, "%r#");
    t
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_is_measured() {
        if HostTarget::detect().is_none() {
            Ui { quiet: false, threads: 0 }.note("skipped: this processor lacks AVX2 or FMA");
            return;
        }
        let ui = Ui { quiet: true, threads: 1 };
        let flops = Gauge::flops(&ui).unwrap().measure().unwrap();
        let bytes = Gauge::bandwidth(&ui, 8 << 20).unwrap().measure().unwrap();
        assert!((1e9..1e13).contains(&flops), "{flops:e} operations per second");
        assert!((1e8..1e13).contains(&bytes), "{bytes:e} bytes per second");
    }
}
