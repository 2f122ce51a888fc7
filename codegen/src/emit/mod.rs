//! Kernels as MLIR text. No MLIR library is used here; `crate::mlir` lowers the text.
//!
//! One module per class of kernel. Each takes a [`Kernel`] and gives [`Emitted`]: the text of one `func.func` named after
//! the kernel, with the host ABI of a plan (`buffers` holds operands, then results; `dims` the symbols' values in the order
//! of the `symbols` slice), and what the runtime has to know to launch it.

pub mod attention;
pub mod blocks;
pub mod coded;
pub mod contraction;
pub(crate) mod elementwise;
pub(crate) mod expr;
pub mod func;
pub mod gpu;
pub(crate) mod index;
pub mod row;
pub mod scatter;
pub mod vmath;

use crate::error::CodegenError;
use contraction::analyze::Analysis;
use func::{Func, Val};
use pleach_ir::{Class, Dim, Kernel, Op, Sym, TensorType, ValueId};
use pleach_plan::Expr;

/// A kernel as text, with its launch data.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Emitted {
    /// MLIR functions; the main one has the kernel's name.
    pub text: String,
    /// Number of tasks, a function of shapes alone.
    pub tasks: Expr,
    /// Scratch memory of each worker, bytes.
    pub scratch_bytes: Expr,
    /// Floating-point operations, for reports.
    pub flops: Expr,
    /// Bytes moved at least, for reports.
    pub bytes: Expr,
}

/// Vector instruction set of the host.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum HostIsa {
    /// 256-bit vectors with fused multiply-add, 16 registers.
    Avx2,
    /// 512-bit vectors, 32 registers.
    Avx512,
}

impl HostIsa {
    /// f32 lanes of a vector.
    pub fn lanes(self) -> usize {
        match self {
            HostIsa::Avx2 => 8,
            HostIsa::Avx512 => 16,
        }
    }
}

/// The values that a kernel is there for: its products with the sums that are made with them, its attention, its scatter.
pub(crate) fn anchors(k: &Kernel) -> Vec<ValueId> {
    if k.class == Class::Contraction {
        let all = Analysis::with_picks(k).map(|a| a.values).unwrap_or_default();
        return all.into_iter().flat_map(|v| v.product).collect();
    }
    let is = |op: &Op| matches!(op, Op::Scatter { .. }) || op.is_attention();
    k.body.values().filter(|v| is(&k.body.node(*v).op)).collect()
}

/// The refusal of a kernel.
pub(crate) fn unsupported(k: &Kernel, why: impl Into<String>) -> CodegenError {
    CodegenError::Unsupported { kernel: k.name.clone(), why: why.into() }
}

/// A dimension as an expression over the plan's symbols.
pub(crate) fn dim_expr(k: &Kernel, dim: Dim, symbols: &[Sym]) -> Result<Expr, CodegenError> {
    match dim {
        Dim::Known(n) => Ok(Expr::Const(n)),
        Dim::Symbol(s) => match symbols.iter().position(|x| *x == s) {
            Some(i) => Ok(Expr::Sym(i as u32)),
            None => Err(unsupported(k, format!("symbol {s} is not one of the plan's"))),
        },
    }
}

/// Bytes of a row-major tensor.
pub(crate) fn bytes_expr(k: &Kernel, ty: &TensorType, symbols: &[Sym]) -> Result<Expr, CodegenError> {
    let mut e = Expr::Const(ty.dtype.size());
    for d in &ty.shape {
        e = e.mul(dim_expr(k, *d, symbols)?);
    }
    Ok(e)
}

/// A dimension as an i64 value in a host kernel.
pub(crate) fn dim_val(f: &mut Func, k: &Kernel, dim: Dim, symbols: &[Sym]) -> Result<Val, CodegenError> {
    Ok(match dim_expr(k, dim, symbols)? {
        Expr::Sym(i) => f.dim(i as usize),
        e => f.i64(e.known().unwrap_or(0) as i64),
    })
}
