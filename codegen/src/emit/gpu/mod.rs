//! The same kernels for NVIDIA GPUs: `llvm.func`s marked `nvvm.kernel`, ready for `mlir::compile_ptx`.
//!
//! Parameters of an entry are plain pointers to the kernel's buffers (operands, then results), a pointer to scratch memory
//! where an entry needs it, and a pointer to the values of the plan's symbols. Counts are read from memory, so a grid may
//! be larger than they ask for: blocks past the end leave early. Scalar expressions are emitted by the code that the host
//! uses, with one lane to a thread; there is no mathematics library. Every sum has one order: no float atomics.
//!
//! What a chip lacks makes LLVM abort, not fail: [`check`] refuses before.

mod at;
mod attention;
mod chip;
mod contraction;
mod launch;
mod pull;
mod reduce;
mod repeat;
mod row;
mod scatter;

use super::func::{Func, Val};
use super::{bytes_expr, dim_expr, unsupported};
use crate::error::CodegenError;
pub use chip::GpuChip;
use pleach_ir::{Class, Dim, Kernel, Layout, Op, Sym};
use pleach_plan::{Expr, Launch};

/// Buffers that a kernel may have: parameters of an entry take at most 4096 bytes.
const MAX_BUFFERS: usize = 500;

/// A GPU kernel as text, with its launch data.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GpuEmitted {
    /// Globals and functions of a `gpu.module`.
    pub text: String,
    /// The launches that are one run.
    pub launches: Vec<Launch>,
    /// Scratch memory of a run, bytes.
    pub scratch_bytes: Expr,
    /// Floating-point operations, for reports.
    pub flops: Expr,
    /// Bytes moved at least, for reports.
    pub bytes: Expr,
}

/// A kernel for a GPU. `symbols` are the plan's, in the order of the values that `dims` points to.
///
/// # Errors
/// [`CodegenError::Unsupported`] naming the kernel and the reason.
pub fn emit(k: &Kernel, symbols: &[Sym], chip: GpuChip) -> Result<GpuEmitted, CodegenError> {
    check(k)?;
    let (text, launches, scratch_bytes) = match k.class {
        Class::Row => row::emit(k, symbols)?,
        Class::Contraction => contraction::emit(k, symbols, chip)?,
        Class::Attention => attention::emit(k, symbols, chip)?,
        Class::Scatter => scatter::emit(k, symbols)?,
    };
    if let Some(op) = chip::lacking(&text, chip) {
        return Err(unsupported(k, format!("{op} does not exist on {}", chip.name())));
    }
    Ok(GpuEmitted { text, launches, scratch_bytes, flops: flops(k, symbols)?, bytes: bytes(k, symbols)? })
}

/// Functions, launches, scratch bytes.
type Parts = (String, Vec<Launch>, Expr);

/// A module of kernels for `mlir::compile_ptx`.
pub fn module<'a>(texts: impl IntoIterator<Item = &'a str>) -> String {
    let body: String = texts.into_iter().collect();
    // Dynamic shared memory is one variable for all kernels.
    let dynamic = if body.contains("@smem") {
        "llvm.mlir.global external @smem() {addr_space = 3 : i32, alignment = 1024 : i64} : !llvm.array<0 x i8>\n"
    } else {
        ""
    };
    format!("module attributes {{gpu.container_module}} {{\ngpu.module @kernels {{\n{dynamic}{body}}}\n}}\n")
}

/// Refuses what has no code on any chip.
fn check(k: &Kernel) -> Result<(), CodegenError> {
    if k.operands.iter().chain(&k.results).any(|l| *l != Layout::RowMajor) {
        return Err(unsupported(k, "panels have no place on a GPU"));
    }
    if k.operands.len() + k.results.len() > MAX_BUFFERS {
        return Err(unsupported(k, format!("more than {MAX_BUFFERS} buffers")));
    }
    if k.operands.len() != k.body.inputs().len() || k.results.len() != k.body.roots.len() {
        return Err(unsupported(k, "layouts do not match operands and results"));
    }
    Ok(())
}

/// Operations that a run takes: those of products and attention, else one for every element computed.
fn flops(k: &Kernel, symbols: &[Sym]) -> Result<Expr, CodegenError> {
    let body = &k.body;
    let live = body.live();
    let elements = |dims: &[Dim]| -> Result<Expr, CodegenError> {
        dims.iter().try_fold(Expr::Const(1), |e, d| Ok(e.mul(dim_expr(k, *d, symbols)?)))
    };
    let mut sum = Expr::Const(0);
    for (n, _) in body.nodes.iter().zip(&live).filter(|x| *x.1) {
        let more = match &n.op {
            Op::MatMul { ta, .. } => {
                let left = &body.ty(n.inputs[0]).shape;
                let depth = left[left.len() - if *ta { 2 } else { 1 }];
                elements(&n.ty.shape)?.mul(dim_expr(k, depth, symbols)?).mul(2)
            }
            Op::Attention(a) | Op::AttentionGrad { attrs: a, .. } => {
                let keys = dim_expr(k, body.ty(n.inputs[1]).shape[0], symbols)?;
                let queries = dim_expr(k, body.ty(n.inputs[0]).shape[0], symbols)?;
                queries.mul(keys).mul(u64::from(a.heads) * u64::from(a.head_dim) * 4)
            }
            Op::Reduce { .. } => elements(&body.ty(n.inputs[0]).shape)?,
            op if op.is_elementwise() && k.class != Class::Attention => elements(&n.ty.shape)?,
            _ => Expr::Const(0),
        };
        sum = sum.add(more);
    }
    Ok(sum)
}

/// Bytes of operands and results, each once.
fn bytes(k: &Kernel, symbols: &[Sym]) -> Result<Expr, CodegenError> {
    let all = k.operand_types().into_iter().chain(k.result_types());
    all.into_iter().try_fold(Expr::Const(0), |e, ty| Ok(e.add(bytes_expr(k, &ty, symbols)?)))
}

/// A special register, as i64.
fn special(f: &mut Func, name: &str) -> Val {
    let x = f.op(format!("nvvm.read.ptx.sreg.{name} : i32"));
    f.op(format!("arith.extui {x} : i32 to i64"))
}

fn barrier(f: &mut Func) {
    f.stmt("nvvm.barrier0");
}
