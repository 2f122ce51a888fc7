//! The next-token loss: cross-entropy of the counted rows, summed and scaled.
//!
//! `rows` [L] says which tokens have a counted target, `labels` [L] which token that is, and `loss_scale` [] what the sum is
//! multiplied by: one over the number of counted targets of the whole optimizer step. Rows that do not count are left out
//! before the final norm, so they cost nothing here.

use pleach_ir::{BinaryOp, DType, Op, ReduceOp, Sym, UnaryOp, ValueId};

use super::Builder;
use crate::error::Result;

/// Ends an entry: the output `loss` f32 [] = loss_scale · Σ over rows of (log Σ exp(logits) − logits[label]), from logits
/// [L, V]. The largest logit of a row is subtracted before the exponentials; it cancels, so no gradient flows through it.
/// In `training`, terms that a method adds to the loss count by the share of the step's targets that this run has.
pub(super) fn lower(b: &mut Builder, logits: ValueId, training: bool) -> Result<()> {
    b.at("loss");
    let labels = b.input("labels", Sym::L)?;
    let loss_scale = b.push(Op::Input { name: "loss_scale".into(), dtype: DType::F32, shape: vec![] }, &[])?;
    let shape = b.shape(logits).to_vec();
    let spread = |b: &mut Builder, x: ValueId| b.push(Op::Broadcast { shape: shape.clone(), axes: vec![0] }, &[x]);
    let over_classes = |op| Op::Reduce { op, axis: 1 };

    let largest = b.push(over_classes(ReduceOp::Max), &[logits])?;
    let largest = b.push(Op::StopGradient, &[largest])?;
    let largest = spread(b, largest)?;
    let shifted = b.sub(logits, largest)?;
    let exponentials = b.unary(UnaryOp::Exp, shifted)?;
    let sum = b.push(over_classes(ReduceOp::Sum), &[exponentials])?;
    let log_sum = b.unary(UnaryOp::Log, sum)?;

    let class = b.push(Op::Iota { shape: shape.clone(), axis: 1 }, &[])?;
    let label = spread(b, labels)?;
    let hit = b.push(Op::Binary(BinaryOp::Eq), &[class, label])?;
    let zero = b.push(Op::f32(0.0), &[])?;
    let picked = b.push(Op::Select, &[hit, shifted, zero])?;
    let picked = b.push(over_classes(ReduceOp::Sum), &[picked])?;

    let row = b.sub(log_sum, picked)?;
    let mut total = b.push(Op::Reduce { op: ReduceOp::Sum, axis: 0 }, &[row])?;
    if training && let Some(terms) = b.aux_losses()? {
        b.at("loss");
        let one = b.push(Op::f32(1.0), &[])?;
        let ones = b.push(Op::Broadcast { shape: vec![Sym::L.into()], axes: vec![] }, &[one])?;
        let count = b.push(Op::Reduce { op: ReduceOp::Sum, axis: 0 }, &[ones])?;
        let terms = b.mul(count, terms)?;
        total = b.add(&[total, terms])?;
    }
    let loss = b.mul(loss_scale, total)?;
    b.output("loss", loss);
    Ok(())
}

/// Ends an entry that measures: the output `count` f32 [], how many tokens it saw.
pub(super) fn count(b: &mut Builder, tokens: Sym) -> Result<()> {
    b.at("count");
    let one = b.push(Op::f32(1.0), &[])?;
    let ones = b.push(Op::Broadcast { shape: vec![tokens.into()], axes: vec![] }, &[one])?;
    let count = b.push(Op::Reduce { op: ReduceOp::Sum, axis: 0 }, &[ones])?;
    b.output("count", count);
    Ok(())
}
