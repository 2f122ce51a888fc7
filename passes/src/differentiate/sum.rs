//! The cotangent of a value from the contributions of its readers.
//!
//! Contributions keep their sparse form until they are added: parts of an axis that do not overlap are laid one after
//! another, and rows picked by an index are added in place to what is already there, so that no contribution is blown
//! up with zeros on its own.

use super::tape::Tape;
use pleach_ir::{IrError, Op, ScatterMode, TensorType, ValueId};

/// What one reader contributes, f32.
#[derive(Clone, Debug)]
pub(super) enum Cotangent {
    /// Of the value's shape.
    Dense(ValueId),
    /// Elements `start..` of an axis; elsewhere zero.
    Part { axis: u8, start: u64, value: ValueId },
    /// Added at these indices of an axis; elsewhere zero.
    At { axis: u8, index: ValueId, value: ValueId },
}

/// The sum of the contributions to a value of this type, and of `base` where there is one.
pub(super) fn total(
    t: &mut Tape,
    contributions: Vec<Cotangent>,
    ty: &TensorType,
    base: Option<ValueId>,
) -> Result<ValueId, IrError> {
    let (mut terms, mut parts, mut at) = (vec![], vec![], vec![]);
    terms.extend(base);
    for c in contributions {
        match c {
            Cotangent::Dense(v) => terms.push(v),
            Cotangent::Part { axis, start, value } => {
                let len = t.ty(value).shape[axis as usize].known().unwrap_or(0);
                parts.push((axis, start, start + len, value));
            }
            Cotangent::At { axis, index, value } => at.push((axis, index, value)),
        }
    }
    parts.sort_unstable();
    while !parts.is_empty() {
        // a run of parts of one axis, each after the end of the last
        let axis = parts[0].0;
        let (mut run, mut rest, mut end) = (vec![], vec![], 0);
        for p in parts {
            if p.0 == axis && p.1 >= end {
                end = p.2;
                run.push(p);
            } else {
                rest.push(p);
            }
        }
        terms.push(lay(t, axis, &run, ty)?);
        parts = rest;
    }
    let mut sum = match terms[..] {
        [] => t.zeros(&ty.shape)?,
        [one] => one,
        _ => t.push(Op::Add, &terms)?,
    };
    for (axis, index, value) in at {
        sum = t.push(Op::Scatter { axis, mode: ScatterMode::Add }, &[sum, index, value])?;
    }
    Ok(sum)
}

/// Parts one after another along an axis, zeros in the gaps.
fn lay(t: &mut Tape, axis: u8, run: &[(u8, u64, u64, ValueId)], ty: &TensorType) -> Result<ValueId, IrError> {
    let len = ty.shape[axis as usize].known().unwrap_or(0);
    let mut pieces = vec![];
    for (i, (_, start, end, value)) in run.iter().enumerate() {
        let lo = if i == 0 { *start } else { 0 };
        let hi = run.get(i + 1).map_or(len, |n| n.1) - end;
        pieces.push(if lo + hi == 0 { *value } else { t.push(Op::Pad { axis, lo, hi }, &[*value])? });
    }
    if let [one] = pieces[..] { Ok(one) } else { t.push(Op::Concat { axis }, &pieces) }
}
