//! Products by a library of the machine (cuBLASLt), as one more form of a kernel: `tune` finds out where that is faster.
//!
//! A lone product whose rounding is all that is left goes straight to its result. Anything else leaves its sums in scratch memory as
//! f32, rows of all groups side by side, and a launch computes the rest from there, as for sums that blocks share
//! ([`split`](super::split)). The kernel's own launches stay beside it, for machines without the library; those for few rows run in any case.

use super::split;
use super::warpgroup::place;
use crate::emit::contraction::analyze::Analysis;
use crate::emit::dim_expr;
use crate::emit::gpu::contraction::operand::axes;
use crate::error::CodegenError;
use pleach_ir::{DType, Kernel, Op, Sym};
use pleach_plan::{ByLibrary, DType as Stored, Expr, Launch, Matrix, Product, ProductTarget};

/// Elements of 16 bytes.
const PIECE: u64 = 8;

/// Whether the products of a kernel are such as a library takes: two bf16 matrices of known strides, a sum of known length.
pub(super) fn supported(k: &Kernel, a: &Analysis) -> bool {
    let scales = a.groups.iter().flat_map(|g| &g.products).filter_map(|p| p.1);
    let operand = |i: usize, side: usize| matrix(a, i, side, 0).is_some();
    let offsets = a.groups.iter().all(|g| g.products.iter().all(|p| matrix(a, p.0, 1, g.offset).is_some()));
    a.batch.is_empty()
        && a.n.known().is_some_and(|n| n.is_multiple_of(4))
        && a.products.iter().all(|x| x.dtype == DType::BF16 && x.k.known().is_some_and(|d| d > 0))
        && (0..a.products.len()).all(|i| operand(i, 0))
        && offsets
        && scales.into_iter().all(|s| a.args[s.index()].is_some() && k.body.ty(s).dtype == DType::F32)
}

/// The kernel by a library: more text, the products with their launches, bytes of scratch memory. `own` are the kernel's launches.
pub(super) fn emit(
    k: &Kernel,
    symbols: &[Sym],
    a: &Analysis,
    own: &[Launch],
) -> Result<Option<(String, ByLibrary, Expr)>, CodegenError> {
    let (true, Some(columns)) = (supported(k, a), a.n.known()) else { return Ok(None) };
    let rows = dim_expr(k, a.m, symbols)?;
    // Few rows have a launch of their own, which those for all other counts say.
    let few: Vec<Launch> = own.iter().filter(|l| l.when.as_ref().is_some_and(|w| w.most.is_some())).cloned().collect();
    let when = own.iter().filter_map(|l| l.when.as_ref()).find(|w| w.most.is_none()).cloned();
    let straight = straight(k, a);
    let mut products = vec![];
    for (g, group) in a.groups.iter().enumerate() {
        for (i, (x, scale)) in group.products.iter().enumerate() {
            let operands = matrix(a, *x, 0, 0).zip(matrix(a, *x, 1, group.offset));
            let (Some((left, right)), Some(depth)) = (operands, a.products[*x].k.known()) else { return Ok(None) };
            let to = match straight {
                Some(dtype) => {
                    let buffer = Some(k.operands.len() as u32);
                    ProductTarget { buffer, dtype, offset: 0, stride: columns }
                }
                None => ProductTarget {
                    buffer: None,
                    dtype: Stored::F32,
                    offset: g as u64 * columns * 4,
                    stride: a.groups.len() as u64 * columns,
                },
            };
            let scale = scale.and_then(|s| a.args[s.index()]).map(|n| n as u32);
            let rows = rows.clone();
            products.push(Product { rows, columns, depth, left, right, scale, adds: i > 0, to, when: when.clone() });
        }
    }
    let mut launches = few;
    if straight.is_some() {
        return Ok(Some((String::new(), ByLibrary { products, launches }, Expr::Const(0))));
    }
    let (text, mut rest) = split::finish(k, symbols, a, 1, "_rest")?;
    rest.when = when;
    launches.push(rest);
    Ok(Some((text, ByLibrary { products, launches }, split::scratch(k, symbols, a, 1)?)))
}

/// The type in which the only result is its sum and nothing else, written where nobody else's values lie, in whole pieces of 16 bytes.
fn straight(k: &Kernel, a: &Analysis) -> Option<Stored> {
    let ([root], [None], [group]) = (k.body.roots.as_slice(), k.aliases.as_slice(), a.groups.as_slice()) else {
        return None;
    };
    let node = k.body.node(root.value);
    let (sum, dtype) = match node.op {
        // Sums of several products would be rounded in between.
        Op::Cast(DType::BF16) if group.products.len() == 1 => (node.inputs[0], Stored::BF16),
        _ => (root.value, Stored::F32),
    };
    let pieces = a.n.known().is_some_and(|n| n.is_multiple_of(16 / dtype.size()));
    let found = pieces && a.sums.get(&(sum, 0)).is_some_and(|s| s.rest.is_empty());
    (found && k.body.ty(sum).dtype == DType::F32).then_some(dtype)
}

/// An operand of a product from its line `first` on, if a library can read it.
fn matrix(a: &Analysis, product: usize, side: usize, first: u64) -> Option<Matrix> {
    let at = place(a, &a.products[product], side)?;
    let (line, step) = axes(at.view, side);
    let stride = if at.along { line } else { step }.known()?;
    let [far, near] = if at.along { [at.first[0] + first, at.first[1]] } else { [at.first[1], at.first[0] + first] };
    let offset = (far * stride + near) * 2;
    let whole = offset.is_multiple_of(2 * PIECE) && stride.is_multiple_of(PIECE);
    whole.then_some(Matrix { buffer: at.view.arg as u32, offset, stride, across: !at.along })
}
