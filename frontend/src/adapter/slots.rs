//! Ranks that come and go while a run goes on. A slot has room for the most that there may be; masks say which count.

use pleach_ir::{BinaryOp, UnaryOp, ValueId};

use super::Update;
use super::method::Scope;
use crate::error::Result;

/// Which ranks of which sites have the `count` lowest scores of all, or one as low as the highest of these.
pub(super) fn lowest(scores: &[Vec<f64>], count: usize) -> Vec<Vec<bool>> {
    let all: Vec<f64> = scores.iter().flatten().map(|x| -x).collect();
    let mut chosen = highest(&all, count).into_iter();
    scores.iter().map(|s| chosen.by_ref().take(s.len()).collect()).collect()
}

/// Which of these scores are among the `count` highest, or as high as the lowest of these.
pub(super) fn highest(scores: &[f64], count: usize) -> Vec<bool> {
    let mut all = scores.to_vec();
    all.sort_by(|a, b| b.total_cmp(a));
    let limit = count.checked_sub(1).and_then(|i| all.get(i.min(all.len().saturating_sub(1))).copied());
    scores.iter().map(|x| limit.is_some_and(|l| *x >= l)).collect()
}

/// ‖A·Aᵀ − I‖ + ‖Bᵀ·B − I‖ for A [r, in] and B [out, r], f32 []; of the ranks of a mask [r] only where there is one.
pub(super) fn orthogonality(
    s: &mut Scope,
    down: ValueId,
    up: ValueId,
    rank: u64,
    mask: Option<ValueId>,
) -> Result<ValueId> {
    let (mut down, mut up, mut identity) = (down, up, s.identity(rank)?);
    if let Some(mask) = mask {
        for (x, axis) in [(&mut down, 0), (&mut up, 1), (&mut identity, 0)] {
            let shape: Vec<u64> = s.shape(*x).iter().filter_map(|d| d.known()).collect();
            let mask = s.along(axis, mask, &shape)?;
            *x = s.mul(*x, mask)?;
        }
    }
    let mut terms = vec![];
    for (x, rows) in [(down, true), (up, false)] {
        let gram = s.matmul(x, !rows, x, rows)?;
        let off = s.binary(BinaryOp::Sub, gram, identity)?;
        let square = s.mul(off, off)?;
        let sum = s.sum_over(1, square)?;
        let sum = s.sum_over(0, sum)?;
        terms.push(s.unary(UnaryOp::Sqrt, sum)?);
    }
    s.sum(&terms)
}

/// 1 − βᵃ for ages a, steps since something began, in place of the run's own corrections. What has not begun has the age 0 and must get no
/// gradient.
pub(super) fn corrected_by_age(u: &mut Update, age: ValueId) -> Result<()> {
    for (beta, correction) in [("beta1", "correction1"), ("beta2", "correction2")] {
        let (beta, one) = (u.setting(beta)?, u.number(1.0)?);
        let rate = u.unary(UnaryOp::Log, beta)?;
        let age = u.binary(BinaryOp::Max, age, one)?;
        let rate = u.mul(age, rate)?;
        let left = u.unary(UnaryOp::Exp, rate)?;
        let value = u.binary(BinaryOp::Sub, one, left)?;
        u.give(correction, value);
    }
    Ok(())
}

/// The step of a buffer whose ranks, along an axis, began at different steps: corrections by the ages [r] of `age`, and no decay of what
/// has not begun.
pub(super) fn by_rank(u: &mut Update, age: &str, axis: u8) -> Result<()> {
    let shape = u.shape().to_vec();
    let mut age = u.buffer(age)?;
    if shape.len() > 1 {
        age = u.along(axis, age, &shape)?;
    }
    corrected_by_age(u, age)?;
    let (decay, one) = (u.setting("weight_decay")?, u.number(1.0)?);
    let begun = u.binary(BinaryOp::Min, age, one)?;
    let decay = u.mul(begun, decay)?;
    u.give("weight_decay", decay);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_run_over_all_sites() {
        let scores = [vec![3.0, 1.0], vec![2.0, 1.0, 5.0]];
        assert_eq!(lowest(&scores, 2), [vec![false, true], vec![false, true, false]]);
        assert_eq!(lowest(&scores, 1), lowest(&scores, 2), "a tie counts for both");
        assert_eq!(lowest(&scores, 0), [vec![false; 2], vec![false; 3]]);
        assert_eq!(highest(&[1.0, 4.0, 2.0], 2), [false, true, true]);
        assert_eq!(highest(&[1.0, 4.0], 9), [true, true]);
    }
}
