//! Row kernels: any mixture of elementwise, reduction and movement operators.
//!
//! There is no list of patterns. Values are pulled from the results down to loads ([`pull`]), each row takes as many
//! passes as reductions depend on each other ([`plan`]), lanes run along the innermost axis ([`lanes`]), and what a loop
//! does not change is computed outside it ([`text`]). Kernels whose results have one axis put lanes along that axis
//! ([`flat`]); packing kernels store panels ([`panels`]).
//!
//! # What a kernel may hold
//! All operators but `matmul`, `attention`, `scatter` and `param`. All results have the same rows (axis 0). Interior
//! values may be read through any movement; a *reduction* may be read only at the row it belongs to. A reduction to a
//! scalar goes together with other scalars and with results of rank 1 only. Any single operator is accepted.
//!
//! # Numbers
//! 16-bit floats are computed in f32 and rounded after each operator. Sums take a fixed order, whatever the number of
//! threads; a product that only a sum reads is fused into it. NaN passes through max and min. Indices out of range read
//! the nearest element; an integer divided by zero is itself.

mod address;
mod blocks;
mod flat;
mod hoist;
mod in_place;
mod items;
mod lanes;
mod model;
mod moved;
mod nest;
mod ops;
mod panels;
mod plan;
mod pull;
mod reduce;
mod reshape;
mod stmt;
mod text;

use super::expr::Buf;
use super::func::{Func, Val};
use super::index::{Atom, Poly, Space};
use super::{Emitted, HostIsa, bytes_expr, unsupported};
use crate::error::CodegenError;
use crate::mlir::HostTarget;
use plan::Planned;
use pleach_ir::{DType, Kernel, Op, Sym};
use pleach_plan::Expr;

/// Whether a kernel of class row can be compiled: exactly what [`emit`] accepts.
///
/// # Errors
/// The reason why not.
pub fn supported(k: &Kernel) -> Result<(), String> {
    let mut symbols: Vec<Sym> = k.body.nodes.iter().flat_map(|n| n.ty.symbols()).collect();
    symbols.sort_unstable();
    symbols.dedup();
    plan::plan(k, &symbols, HostIsa::Avx512.lanes())?;
    plan::plan(k, &symbols, HostIsa::Avx2.lanes()).map(|_| ())
}

/// Text of a row kernel.
///
/// # Errors
/// [`CodegenError::Unsupported`] for what [`supported`] refuses, or a symbol that `symbols` lacks.
pub fn emit(k: &Kernel, symbols: &[Sym], target: &HostTarget) -> Result<Emitted, CodegenError> {
    let mut p = plan::plan(k, symbols, target.isa.lanes()).map_err(|why| unsupported(k, why))?;
    let tasks = match p.block {
        Some(b) => expr(&p.b.space, &p.b.model.rows).ceil_div(b),
        None => Expr::Const(1),
    };
    let mut scratch_bytes = Expr::Const(0);
    for (n, d) in &p.slots {
        scratch_bytes = scratch_bytes.add(expr(&p.b.space, n).mul(d.size()).ceil_div(64).mul(64));
    }
    let mut flops = Expr::Const(0);
    for i in (0..p.b.model.nodes.len()).filter(|i| p.b.model.live[*i]) {
        let n = &p.b.model.nodes[i];
        let over = if let Op::Reduce { .. } = n.op { &p.b.model.nodes[n.inputs[0]].shape } else { &n.shape };
        let float = n.dtype != DType::I32 && n.dtype != DType::Bool;
        if float && p.b.model.weight(i) > 0 && !matches!(n.op, Op::Gather { .. } | Op::Cast(_)) {
            flops = flops.add(expr(&p.b.space, &model::product(over)));
        }
    }
    let bytes = traffic(k, &p, symbols)?;
    let tables = tables(k, &p);
    let mut f = Func::host_kernel(&k.name);
    f.round_bf16 = target.bf16;
    f.is_for(k, &[]);
    let bases = bases(k, &mut f, &mut p);
    text::Text::new(&mut p).write(&mut f, bases);
    Ok(Emitted { text: tables + &f.text(), tasks, scratch_bytes, flops, bytes })
}

/// A size as an expression over the plan's symbols.
fn expr(space: &Space, p: &Poly) -> Expr {
    p.0.iter().fold(Expr::Const(0), |sum, (m, c)| {
        let t = m.iter().fold(Expr::Const((*c).max(0) as u64), |t, a| match space.info(*a).atom {
            Atom::Sym(i) => t.mul(Expr::Sym(i)),
            _ => t,
        });
        sum.add(t)
    })
}

/// Bytes of operands (of a table that is only gathered from: of what is gathered) and results.
fn traffic(k: &Kernel, p: &Planned, symbols: &[Sym]) -> Result<Expr, CodegenError> {
    let mut e = Expr::Const(0);
    for t in k.result_types() {
        e = e.add(bytes_expr(k, &t, symbols)?);
    }
    let users = k.body.users();
    for (v, _) in k.body.inputs() {
        let readers = &users[v.index()];
        let gathered = readers.iter().all(|u| {
            let n = k.body.node(*u);
            matches!(n.op, Op::Gather { .. }) && n.inputs[0] == v && n.inputs[1] != v
        });
        if gathered {
            for u in readers.iter().filter(|u| p.b.model.live[u.index()]) {
                e = e.add(bytes_expr(k, k.body.ty(*u), symbols)?);
            }
        } else {
            e = e.add(bytes_expr(k, k.body.ty(v), symbols)?);
        }
    }
    Ok(e)
}

fn table_name(k: &Kernel, t: usize) -> String {
    format!("{}_table{t}", k.name)
}

/// Constant tensors as globals.
fn tables(k: &Kernel, p: &Planned) -> String {
    let mut s = String::new();
    for (t, n) in p.b.tables.iter().enumerate() {
        let Op::Const { dtype, bits, .. } = &p.b.model.nodes[*n].op else { continue };
        let (ty, list): (&str, Vec<String>) = match dtype {
            DType::F32 | DType::I32 => ("i32", bits.iter().map(|b| (*b as i32).to_string()).collect()),
            DType::BF16 | DType::F16 => ("i16", bits.iter().map(|b| (*b as u16 as i16).to_string()).collect()),
            DType::Bool => ("i8", bits.iter().map(|b| u8::from(*b != 0).to_string()).collect()),
        };
        let n = list.len();
        s += &format!(
            "llvm.mlir.global private constant @{}(dense<[{}]> : tensor<{n}x{ty}>) : !llvm.array<{n} x {ty}>\n",
            table_name(k, t),
            list.join(", ")
        );
    }
    s
}

/// Pointers of all buffers.
fn bases(k: &Kernel, f: &mut Func, p: &mut Planned) -> Vec<(Buf, Val)> {
    let mut v = vec![];
    let n = k.operands.len();
    for i in 0..n {
        v.push((Buf::Operand(i as u32), f.buffer(i)));
    }
    for i in 0..k.results.len() {
        v.push((Buf::Result(i as u32), f.buffer(n + i)));
    }
    for t in 0..p.b.tables.len() {
        let g = f.op(format!("llvm.mlir.addressof @{} : !llvm.ptr", table_name(k, t)));
        v.push((Buf::Table(t as u32), g));
    }
    let mut at = Poly::default();
    for (i, (elements, d)) in p.slots.clone().into_iter().enumerate() {
        let base = f.arg("scratch");
        let at_val = offset(f, &p.b.space, &at);
        v.push((Buf::Scratch(i as u32), f.gep(&base, &at_val, "i8")));
        let bytes = elements.scale(d.size() as i64).plus(63);
        let (q, _) = p.b.space.divide(&bytes, &Poly::from(64));
        at = at.add(&q.scale(64));
    }
    v
}

/// A size of symbols as a value.
fn offset(f: &mut Func, space: &Space, p: &Poly) -> Val {
    let mut sum = f.i64(0);
    for (m, c) in &p.0 {
        let mut t = f.i64(*c);
        for a in m {
            let x = match &space.info(*a).atom {
                Atom::Sym(i) => f.dim(*i as usize),
                Atom::Div(x, d) => {
                    let (x, d) = (offset(f, space, x), offset(f, space, d));
                    f.div(&x, &d)
                }
                _ => f.i64(0),
            };
            t = f.mul(&t, &x);
        }
        sum = f.add(&sum, &t);
    }
    sum
}
