//! Kernels: what each computes, how much work it is, and its code at every level.

use crate::failure::Result;
use crate::pipeline::Request;
use pleach_codegen::emit::gpu;
use pleach_codegen::{compile, mlir};
use pleach_ir::{Kernel, Schedule, Sym, text};
use pleach_plan::{BlobKind, Plan};
use serde_json::{Map, Value, json};
use std::process::Command;

/// What the plan says of each kernel at these values of the symbols.
///
/// # Errors
/// A size without a value.
pub(super) fn facts(plan: &Plan, env: &[u64]) -> Result<Vec<Map<String, Value>>> {
    let resources = resources(plan);
    let one = |k: &pleach_plan::Kernel| {
        let mut m = Map::new();
        m.insert("name".into(), k.symbol.clone().into());
        m.insert("class".into(), k.class.clone().into());
        m.insert("tasks".into(), k.tasks.eval(env)?.into());
        m.insert("flops".into(), k.flops.eval(env)?.into());
        m.insert("bytes".into(), k.bytes.eval(env)?.into());
        m.insert("scratch".into(), k.scratch_bytes.eval(env)?.into());
        let sizes =
            |l: &[pleach_plan::Expr]| l.iter().map(|e| e.eval(env)).collect::<std::result::Result<Vec<u64>, _>>();
        m.insert("reads".into(), sizes(&k.operands)?.into());
        m.insert("writes".into(), sizes(&k.results)?.into());
        let mut launches = vec![];
        for l in &k.launches {
            let grid = l.grid.iter().map(|g| g.eval(env)).collect::<std::result::Result<Vec<u64>, _>>()?;
            let used = resources.iter().find(|r| r.0 == l.function);
            launches.push(json!({
                "function": l.function, "grid": grid, "block": l.block, "shared": l.shared_bytes,
                "registers": used.map(|r| r.1), "spilled": used.map(|r| r.2),
            }));
        }
        m.insert("launches".into(), launches.into());
        Ok(m)
    };
    plan.kernels.iter().map(one).collect()
}

/// Registers and spilled bytes of each function, as `ptxas` reports them; nothing without `ptxas`.
fn resources(plan: &Plan) -> Vec<(String, u64, u64)> {
    let mut out = vec![];
    let program = std::env::var("PLEACH_PTXAS").ok().filter(|p| !p.is_empty()).unwrap_or_else(|| "ptxas".into());
    for b in plan.blobs.iter().filter(|b| b.kind == BlobKind::Ptx) {
        let file = std::env::temp_dir().join(format!("pleach-{}-{}.ptx", std::process::id(), b.name));
        if std::fs::write(&file, &b.bytes).is_err() {
            return out;
        }
        let arch = format!("-arch={}", plan.target.arch);
        let said = Command::new(&program).args(["-v", &arch, "-o", "/dev/null"]).arg(&file).output();
        let _ = std::fs::remove_file(&file);
        let Ok(said) = said else { return out };
        let text = String::from_utf8_lossy(&said.stderr).into_owned();
        let (mut name, mut spilled) = (String::new(), 0);
        for line in text.lines() {
            if let Some(rest) = line.split("Compiling entry function '").nth(1) {
                name = rest.split('\'').next().unwrap_or_default().to_string();
            }
            if let Some(n) = line.split(" bytes spill stores").next().filter(|_| line.contains("bytes spill stores")) {
                spilled = n.rsplit([' ', ',']).next().and_then(|n| n.parse().ok()).unwrap_or(0);
            }
            if let Some(n) = line.split("Used ").nth(1).and_then(|r| r.split(' ').next()?.parse().ok()) {
                out.push((std::mem::take(&mut name), n, spilled));
            }
        }
    }
    out
}

/// Adds types, IR, MLIR and machine code of the kernels of a schedule, which are those of the plan in the same order.
///
/// # Errors
/// What the target refuses.
pub(super) fn code(list: &mut [Map<String, Value>], schedule: &Schedule, request: &Request) -> Result<()> {
    let symbols: Vec<Sym> = compile::plan_symbols(schedule).iter().filter_map(|x| Sym::new(&x.name)).collect();
    for (m, k) in list.iter_mut().zip(&schedule.kernels) {
        let shown = |t: Vec<pleach_ir::TensorType>, l: &[pleach_ir::Layout]| -> Vec<String> {
            t.iter().zip(l).map(|(t, l)| format!("{t}{}", layout(*l))).collect()
        };
        m.insert("in".into(), shown(k.operand_types(), &k.operands).into());
        m.insert("out".into(), shown(k.result_types(), &k.results).into());
        m.insert("alias".into(), k.aliases.clone().into());
        m.insert("ir".into(), text::print_kernel(k).into());
        let (mlir, name, code, lines) = lowered(k, &symbols, request)?;
        m.insert("mlir".into(), mlir.into());
        m.insert("language".into(), name.into());
        m.insert("code".into(), code.into());
        m.insert("lines".into(), lines.into());
    }
    Ok(())
}

fn layout(l: pleach_ir::Layout) -> String {
    if l == pleach_ir::Layout::RowMajor { String::new() } else { format!(" {}", text::print_layout(&l)) }
}

/// MLIR, the name of the machine's language, its text, and for every line of it the line of the MLIR it stems from (0: unknown).
fn lowered(k: &Kernel, symbols: &[Sym], request: &Request) -> Result<(String, &'static str, String, Vec<u32>)> {
    if let Some(chip) = request.gpu() {
        let e = gpu::emit(k, symbols, chip)?;
        let module = gpu::module([e.text.as_str()]);
        let (code, lines) = mlir::ptx_with_lines(&module, chip.name())?;
        return Ok((module, "PTX", code, lines));
    }
    let host = request.host()?;
    let e = compile::emit_host(k, symbols, &host)?;
    let (code, lines) = mlir::assembly_with_lines(&e.text, &host)?;
    Ok((e.text, "assembly", code, lines))
}
