//! Kernels: what each computes, how much work it is, and its code at every level.

use super::super::plan::taken;
use crate::failure::Result;
use crate::pipeline::Request;
use crate::pipeline::stages::kernel_text;
use pleach_codegen::emit::gpu;
use pleach_codegen::{compile, mlir};
use pleach_ir::{Kernel, Schedule, Sym, text};
use pleach_plan::Plan;
use serde_json::{Map, Value, json};

/// What the plan says of each kernel at these values of the symbols.
///
/// # Errors
/// A size without a value.
pub(super) fn facts(plan: &Plan, env: &[u64]) -> Result<Vec<Map<String, Value>>> {
    // An assembler that is too old for the code, say, tells nothing; the page has the rest.
    let resources = taken(plan).unwrap_or_default();
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
            let [registers, fixed, spilled] = resources.get(&l.function).map_or([None; 3], |r| r.map(Some));
            launches.push(json!({
                "function": l.function, "grid": grid, "block": l.block, "shared": l.shared_bytes + fixed.unwrap_or(0),
                "registers": registers, "spilled": spilled,
            }));
        }
        m.insert("launches".into(), launches.into());
        Ok(m)
    };
    plan.kernels.iter().map(one).collect()
}

/// Adds types, IR, MLIR and machine code of the kernels of a schedule, which are those of the plan in the same order.
///
/// # Errors
/// What the target refuses.
pub(super) fn code(list: &mut [Map<String, Value>], schedule: &Schedule, request: &Request) -> Result<()> {
    let symbols = compile::kernel_symbols(schedule);
    for (m, k) in list.iter_mut().zip(&schedule.kernels) {
        let shown = |t: Vec<pleach_ir::TensorType>, l: &[pleach_ir::Layout]| -> Vec<String> {
            t.iter().zip(l).map(|(t, l)| format!("{t}{}", layout(*l))).collect()
        };
        m.insert("in".into(), shown(k.operand_types(), &k.operands).into());
        m.insert("out".into(), shown(k.result_types(), &k.results).into());
        m.insert("alias".into(), k.aliases.clone().into());
        m.insert("ir".into(), text::print_kernel(k).into());
        if let Some(list) = request.gpu().and_then(|_| gpu::written_for(k)) {
            m.insert("same".into(), list.into());
        }
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
    let text = kernel_text(k, symbols, request)?;
    let (name, (code, lines)) = match request.gpu() {
        Some(chip) => ("PTX", mlir::ptx_with_lines(&text, chip.name())?),
        None => ("assembly", mlir::assembly_with_lines(&text, &request.host()?)?),
    };
    Ok((text, name, code, lines))
}
