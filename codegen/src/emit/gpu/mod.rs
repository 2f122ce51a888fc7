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
mod blocks;
mod chip;
mod contraction;
mod form;
mod launch;
mod many;
mod mma;
mod pressure;
mod pull;
mod reduce;
mod repeat;
mod ring;
mod row;
mod scatter;
mod wgmma;

use super::func::{Func, Val};
use super::{bytes_expr, dim_expr, unsupported};
use crate::error::CodegenError;
pub use chip::GpuChip;
pub use form::{Form, NoForm, Units};
use pleach_ir::{AttentionAttrs, BlockFormat, Class, Dim, Kernel, Layout, Op, ScatterMode, Sym, ValueId};
use pleach_plan::{ByLibrary, Expr, Launch};

/// Buffers that a kernel may have: parameters of an entry take at most 4096 bytes.
const MAX_BUFFERS: usize = 500;

/// A GPU kernel as text, with its launch data.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GpuEmitted {
    /// Globals and functions of a `gpu.module`.
    pub text: String,
    /// The launches that are one run.
    pub launches: Vec<Launch>,
    /// Another way to run it, by a library of the machine.
    pub library: Option<ByLibrary>,
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
    emit_as(k, symbols, chip, None)
}

/// The forms there are of a kernel, the one that [`emit`] takes first; none where there is no choice.
///
/// # Errors
/// As [`emit`].
pub fn forms(k: &Kernel, symbols: &[Sym], chip: GpuChip) -> Result<Vec<Form>, CodegenError> {
    check(k)?;
    let all = if k.class == Class::Contraction { contraction::forms(k, symbols, chip)? } else { vec![] };
    Ok(if all.len() > 1 { all } else { vec![] })
}

/// [`emit`] in a form of [`forms`].
///
/// # Errors
/// As [`emit`], and a form that the kernel does not have.
pub fn emit_as(k: &Kernel, symbols: &[Sym], chip: GpuChip, form: Option<&Form>) -> Result<GpuEmitted, CodegenError> {
    check(k)?;
    if let Some(f) = form.filter(|_| k.class != Class::Contraction) {
        return Err(unsupported(k, format!("it has no form {f}")));
    }
    let own = form.filter(|f| f.units != Units::Library);
    let (mut text, launches, mut scratch_bytes) = match k.class {
        Class::Row => row::emit(k, symbols)?,
        Class::Contraction => contraction::emit(k, symbols, chip, own)?,
        Class::Attention => attention::emit(k, symbols, chip)?,
        Class::Scatter => scatter::emit(k, symbols)?,
    };
    let mut library = None;
    if form != own {
        let found = contraction::by_library(k, symbols, &launches)?;
        let (more, ways, scratch) = found.ok_or_else(|| unsupported(k, "a library takes no product of it"))?;
        text += &more;
        scratch_bytes = scratch_bytes.max(scratch);
        library = Some(ways);
    }
    if let Some(op) = chip::lacking(&text, chip) {
        return Err(unsupported(k, format!("{op} does not exist on {}", chip.name())));
    }
    Ok(GpuEmitted { text, launches, library, scratch_bytes, flops: flops(k, symbols)?, bytes: bytes(k, symbols)? })
}

/// Of every value of a kernel's body, the one that its code is written for, where parts of it compute the same and the code is there once.
pub fn written_for(k: &Kernel) -> Option<Vec<u32>> {
    if !matches!(k.class, Class::Row | Class::Scatter) {
        return None;
    }
    many::written(k).or_else(|| {
        let (one, _) = repeat::repeated(k)?;
        Some((0..k.body.nodes.len()).map(|v| (v % one.body.nodes.len()) as u32).collect())
    })
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
    if k.operands.iter().chain(&k.results).any(|l| !matches!(l, Layout::RowMajor | Layout::Blocks(_))) {
        return Err(unsupported(k, "panels have no place on a GPU"));
    }
    // The addresses of parts that compute the same are in a table.
    if k.operands.len() + k.results.len() > MAX_BUFFERS && written_for(k).is_none() {
        return Err(unsupported(k, format!("more than {MAX_BUFFERS} buffers")));
    }
    if k.operands.len() != k.body.inputs().len() || k.results.len() != k.body.roots.len() {
        return Err(unsupported(k, "layouts do not match operands and results"));
    }
    blocks::check(k)
}

/// Operations that a run takes: those of products and attention, else one for every element computed.
fn flops(k: &Kernel, symbols: &[Sym]) -> Result<Expr, CodegenError> {
    let body = &k.body;
    let live = body.live();
    let elements = |dims: &[Dim]| -> Result<Expr, CodegenError> {
        dims.iter().try_fold(Expr::Const(1), |e, d| Ok(e.mul(dim_expr(k, *d, symbols)?)))
    };
    // Scores are computed once for all that needs them.
    let some = |is: fn(&Op) -> bool| body.nodes.iter().zip(&live).any(|(n, l)| *l && is(&n.op));
    let scored = some(|op| matches!(op, Op::Attention(_) | Op::AttentionGrad { .. }));
    let forward = some(|op| matches!(op, Op::Attention(_)));
    let (mut sum, mut shares) = (Expr::Const(0), false);
    for (n, _) in body.nodes.iter().zip(&live).filter(|x| *x.1) {
        let more = match &n.op {
            Op::MatMul { ta, .. } => {
                let left = &body.ty(n.inputs[0]).shape;
                let depth = left[left.len() - if *ta { 2 } else { 1 }];
                elements(&n.ty.shape)?.mul(dim_expr(k, depth, symbols)?).mul(2)
            }
            Op::Attention(a) => pairs(k, symbols, a, &n.inputs)?.mul(4),
            Op::AttentionLse(a) => pairs(k, symbols, a, &n.inputs)?.mul(if scored { 0 } else { 2 }),
            // Each has a product of its own; all share the scores and their gradient.
            Op::AttentionGrad { attrs: a, .. } => {
                let first = if forward { 2 } else { 4 };
                let shared = if std::mem::replace(&mut shares, true) { 0 } else { first };
                pairs(k, symbols, a, &n.inputs)?.mul(2 + shared)
            }
            Op::Reduce { .. } => elements(&body.ty(n.inputs[0]).shape)?,
            op if op.is_elementwise() && k.class != Class::Attention => elements(&n.ty.shape)?,
            _ => Expr::Const(0),
        };
        sum = sum.add(more);
    }
    Ok(sum)
}

/// Pairs of a query and a key, times the width of all heads: one sequence as long as all of them. Half of them where every query has
/// a key of its own and sees none behind it.
fn pairs(k: &Kernel, symbols: &[Sym], a: &AttentionAttrs, inputs: &[ValueId]) -> Result<Expr, CodegenError> {
    let [queries, keys] = [0, 1].map(|i| k.body.ty(inputs[i]).shape[0]);
    let width = u64::from(a.heads) * u64::from(a.head_dim);
    let half = a.causal && queries == keys;
    let seen = dim_expr(k, keys, symbols)?;
    let seen = if half { seen.ceil_div(2) } else { seen };
    let seen = a.window.map_or(seen.clone(), |w| seen.min(u64::from(w)));
    Ok(dim_expr(k, queries, symbols)?.mul(seen).mul(width))
}

/// Bytes that memory moves at once.
const SECTOR: u64 = 32;

/// Bytes of operands and results, each once. Of an operand that only parts are taken of, those; of a result that lies over an operand
/// and has parts set, what is set. Columns lie apart: an element of theirs takes what memory moves at once.
fn bytes(k: &Kernel, symbols: &[Sym]) -> Result<Expr, CodegenError> {
    let body = &k.body;
    // What lies in blocks takes as many bytes as these, and a part of it the same share of its own.
    let size = |v: ValueId, layout: Layout| -> Result<Expr, CodegenError> {
        let bytes = bytes_expr(k, body.ty(v), symbols)?;
        Ok(match layout {
            Layout::Blocks(format) => bytes.mul(format.bytes()).ceil_div(BlockFormat::VALUES * body.ty(v).dtype.size()),
            _ => bytes,
        })
    };
    // A part of a value that a node picks or sets along an axis of it.
    let picked = |node: ValueId, of: ValueId, part: ValueId, layout: Layout| -> Result<Expr, CodegenError> {
        let (own, rank) = (size(part, layout)?, body.ty(of).rank());
        let axis = match body.node(node).op {
            Op::Gather { axis } | Op::Scatter { axis, .. } => usize::from(axis),
            _ => return Ok(own),
        };
        if rank < 2 || axis + 1 < rank || layout != Layout::RowMajor {
            return Ok(own);
        }
        Ok(own.mul(SECTOR).ceil_div(body.ty(of).dtype.size()).min(size(of, layout)?))
    };
    let (live, all) = (body.live(), body.users());
    let set = |v: ValueId| match &body.node(v).op {
        Op::Scatter { .. } => body.node(v).inputs.get(2).copied(),
        _ => None,
    };
    let mut sum = Expr::Const(0);
    for (i, (v, _)) in body.inputs().into_iter().enumerate() {
        let users: Vec<ValueId> = all[v.0 as usize].iter().copied().filter(|u| live[u.0 as usize]).collect();
        let taken = |u: &ValueId| matches!(body.node(*u).op, Op::Gather { .. }) && body.node(*u).inputs[0] == v;
        let over = k.aliases.contains(&Some(i as u32));
        let written = |u: &ValueId| over && set(*u).is_some() && body.node(*u).inputs[0] == v;
        // What is added to has to be read.
        let adds = |u: &&ValueId| matches!(body.node(**u).op, Op::Scatter { mode: ScatterMode::Add, .. });
        let added: Vec<ValueId> = users.iter().filter(adds).copied().collect();
        let layout = k.operands[i];
        let part = |list: &[ValueId]| {
            let one = |e: Expr, u: &ValueId| Ok(e.add(picked(*u, v, set(*u).unwrap_or(*u), layout)?));
            list.iter().try_fold(Expr::Const(0), one)
        };
        let own = match () {
            () if !users.is_empty() && users.iter().all(taken) => size(v, layout)?.min(part(&users)?),
            () if !users.is_empty() && users.iter().all(written) => part(&added)?.min(size(v, layout)?),
            () => size(v, layout)?,
        };
        sum = sum.add(own);
    }
    for ((r, over), layout) in body.roots.iter().zip(&k.aliases).zip(&k.results) {
        sum = sum.add(match set(r.value).filter(|_| over.is_some()) {
            Some(part) => picked(r.value, r.value, part, *layout)?,
            None => size(r.value, *layout)?,
        });
    }
    Ok(sum)
}

/// A special register, as i64.
fn special(f: &mut Func, name: &str) -> Val {
    let x = f.op(format!("nvvm.read.ptx.sreg.{name} : i32"));
    f.op(format!("arith.extui {x} : i32 to i64"))
}

fn barrier(f: &mut Func) {
    f.stmt("nvvm.barrier0");
}
