//! Operands seen through movement that costs nothing: static slices of a row, and reshapes that keep the rows.

use pleach_ir::{Dim, Entry, Kernel, Op, ValueId};

/// Rows of an operand: row `r` is `width` consecutive elements at `r * stride + offset` of buffer `operand`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct RowView {
    /// Position among the kernel's operands.
    pub(crate) operand: usize,
    /// Elements from one row to the next.
    pub(crate) stride: i64,
    /// First element of a row.
    pub(crate) offset: i64,
    /// Elements of a row.
    pub(crate) width: i64,
}

/// The operand that an input node stands for.
pub(crate) fn operand_index(body: &Entry, v: ValueId) -> Option<usize> {
    body.inputs().iter().position(|(x, _)| *x == v)
}

/// Static elements behind axis 0.
fn inner(body: &Entry, v: ValueId, from: usize) -> Option<i64> {
    let n = body.ty(v).shape.get(from..)?.iter().try_fold(1u64, |n, d| n.checked_mul(d.known()?))?;
    i64::try_from(n).ok()
}

/// `v` as rows of an operand, if only slices of axis 1 and row-keeping reshapes are in between.
pub(crate) fn row_view(k: &Kernel, v: ValueId) -> Option<RowView> {
    let body = &k.body;
    let node = body.node(v);
    match &node.op {
        Op::Input { .. } => {
            let width = inner(body, v, 1)?;
            Some(RowView { operand: operand_index(body, v)?, stride: width, offset: 0, width })
        }
        Op::Slice { axis: 1, start, end } => {
            let x = row_view(k, node.inputs[0])?;
            let unit = inner(body, v, 2)?;
            let (start, end) = (i64::try_from(*start).ok()?, i64::try_from(*end).ok()?);
            Some(RowView { offset: x.offset + start * unit, width: (end - start) * unit, ..x })
        }
        Op::Reshape(_) => {
            let rows = |u: ValueId| -> Option<Dim> { body.ty(u).shape.first().copied() };
            let x = row_view(k, node.inputs[0])?;
            (rows(v)? == rows(node.inputs[0])? && inner(body, v, 1)? == x.width).then_some(x)
        }
        _ => None,
    }
}

/// `v` without reshapes.
pub(crate) fn strip_reshape(body: &Entry, mut v: ValueId) -> ValueId {
    while let Op::Reshape(_) = body.node(v).op {
        v = body.node(v).inputs[0];
    }
    v
}
