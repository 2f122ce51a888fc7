//! The same kernels for NVIDIA GPUs: `llvm.func`s marked `nvvm.kernel` in a `gpu.module`, ready for `mlir::compile_ptx`.
//!
//! A kernel's parameters are plain pointers (operands, then results) and one i64 per symbol, in the order of `symbols`.
//! Scalar expressions are emitted by the code that the host uses, with one lane to a thread. Memory is global memory;
//! shared memory is static and below 48 KB. Needs sm_80. Leaves alone: launching, and tuning for a chip.

pub mod contraction;
mod pull;
pub mod row;

use super::func::{Func, Val};
use super::unsupported;
use crate::error::CodegenError;
use pleach_ir::{Kernel, Op, Sym, UnaryOp};
use pleach_plan::Expr;

/// A GPU kernel as text, with its launch data.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GpuEmitted {
    /// A module with one `gpu.module`; the kernel has the name of the [`Kernel`].
    pub text: String,
    /// Blocks in x, y, z.
    pub grid: [Expr; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Static shared memory of a block, bytes.
    pub shared_bytes: u64,
}

/// Refuses what would abort in the code generator or has no code.
fn check(k: &Kernel) -> Result<(), CodegenError> {
    let live = k.body.live();
    for (n, _) in k.body.nodes.iter().zip(&live).filter(|x| *x.1) {
        if matches!(n.op, Op::Unary(UnaryOp::Sin | UnaryOp::Cos)) {
            return Err(unsupported(k, format!("{} has no GPU code; compute tables on the host", n.op.name())));
        }
    }
    Ok(())
}

/// The function of a kernel: pointers `p0…`, symbols `d0…`.
fn function(k: &Kernel, symbols: &[Sym]) -> Func {
    let mut args = vec![];
    let pointers = k.operands.len() + k.results.len();
    for i in 0..pointers {
        let aliased =
            k.aliases.iter().enumerate().any(|(r, a)| a.is_some_and(|a| a as usize == i || r + k.operands.len() == i));
        let ty = match (aliased, i < k.operands.len()) {
            (true, _) => "!llvm.ptr",
            (false, true) => "!llvm.ptr {llvm.noalias, llvm.readonly}",
            (false, false) => "!llvm.ptr {llvm.noalias}",
        };
        args.push((format!("p{i}"), ty));
    }
    args.extend((0..symbols.len()).map(|i| (format!("d{i}"), "i64")));
    let args: Vec<(&str, &str)> = args.iter().map(|(n, t)| (n.as_str(), *t)).collect();
    Func::new(&k.name, &args)
}

/// The module around a finished function, with shared memory `@{name}_shared` of so many floats.
fn module(f: &Func, threads: u32, shared: u64) -> String {
    let text = f.text().replacen("func.func @", "llvm.func @", 1);
    let attrs = format!("attributes {{nvvm.kernel, nvvm.maxntid = array<i32: {threads}, 1, 1>}}");
    let text = text.replacen(") {\n", &format!(") {attrs} {{\n"), 1);
    let body = text.strip_suffix("  return\n}\n").unwrap_or(&text);
    let global = if shared == 0 {
        String::new()
    } else {
        format!(
            "llvm.mlir.global internal @{}_shared() {{addr_space = 3 : i32, alignment = 16 : i64}} : !llvm.array<{shared} x f32>\n",
            f.name
        )
    };
    format!(
        "module attributes {{gpu.container_module}} {{\ngpu.module @kernels {{\n{global}{body}  llvm.return\n}}\n}}\n}}\n"
    )
}

/// A special register, as i64.
fn special(f: &mut Func, name: &str) -> Val {
    let x = f.op(format!("nvvm.read.ptx.sreg.{name} : i32"));
    f.op(format!("arith.extui {x} : i32 to i64"))
}

/// The base of the shared memory.
fn shared(f: &mut Func) -> Val {
    let name = f.name.clone();
    f.op(format!("llvm.mlir.addressof @{name}_shared : !llvm.ptr<3>"))
}

/// Address of float `index` of shared memory.
fn shared_at(f: &mut Func, base: &Val, index: &Val) -> Val {
    f.op(format!("llvm.getelementptr {base}[{index}] : (!llvm.ptr<3>, i64) -> !llvm.ptr<3>, f32"))
}

fn barrier(f: &mut Func) {
    f.stmt("nvvm.barrier0");
}
