//! Ranks that come and go while a run goes on. A slot has room for the most that there may be; masks say which count.

use pleach_ir::{BinaryOp, DType, Op, Role, UnaryOp, ValueId};

use super::method::{Buffer, Scope};
use super::{Event, Init, Site, Update};
use crate::error::Result;

/// The buffer [r] of ones for the ranks in use, the first `count` when training begins; it goes into the file under its name.
pub(super) fn in_use(part: &'static str, site: &Site, count: u64) -> Buffer {
    Buffer {
        part,
        dtype: DType::F32,
        shape: vec![site.rank],
        role: Role::Stat,
        file: Some(part),
        init: Init::Leading { count },
    }
}

/// How many ranks a mask holds.
///
/// # Errors
/// The site has no such buffer.
pub(super) fn count(e: &Event, site: &Site, mask: &str) -> Result<u64> {
    Ok(e.read(site, mask)?.iter().filter(|x| **x != 0.0).count() as u64)
}

/// Writes a mask [r] that holds these ranks.
///
/// # Errors
/// The site has no such buffer.
pub(super) fn hold(e: &mut Event, site: &Site, mask: &str, ranks: std::ops::Range<u64>) -> Result<()> {
    let flags: Vec<f32> = (0..site.rank).map(|i| f32::from(u8::from(ranks.contains(&i)))).collect();
    e.write(site, mask, &flags)
}

/// Counts a step for the first ranks.
///
/// # Errors
/// The site has no such buffer.
pub(super) fn grow_older(e: &mut Event, site: &Site, age: &str, begun: u64) -> Result<()> {
    let mut ages = e.read(site, age)?;
    ages.iter_mut().take(begun as usize).for_each(|a| *a += 1.0);
    e.write(site, age, &ages)
}

/// alpha over the number of ranks in use, f32 [].
///
/// # Errors
/// Operands that do not fit.
pub(super) fn scale_by_count(s: &mut Scope, alpha: ValueId, used: ValueId) -> Result<ValueId> {
    let (count, small) = (s.sum_over(0, used)?, s.number(1e-5)?);
    let count = s.sum(&[count, small])?;
    s.binary(BinaryOp::Div, alpha, count)
}

/// The sensitivity of `size`, as AdaLoRA smooths it: its running mean (`betas[0]`) times the running mean of how far it is from that
/// (`betas[1]`). With `on` f32 [], both are left as they are while that is not above zero.
///
/// # Errors
/// Operands that do not fit.
pub(super) fn sensitivity(
    u: &mut Update,
    shape: &[u64],
    betas: [f64; 2],
    size: ValueId,
    on: Option<ValueId>,
) -> Result<ValueId> {
    let on = match on {
        None => None,
        Some(on) => {
            let zero = u.number(0.0)?;
            let on = u.binary(BinaryOp::Lt, zero, on)?;
            Some(u.spread(on, shape, &[])?)
        }
    };
    let smoothed = |u: &mut Update, name: &str, beta: f64, x: ValueId| {
        let (old, keep, rest) = (u.kept(name, shape)?, u.number(beta)?, u.number(1.0 - beta)?);
        let (a, b) = (u.mul(old, keep)?, u.mul(x, rest)?);
        let mut new = u.sum(&[a, b])?;
        if let Some(on) = on {
            new = u.push(Op::Select, &[on, new, old])?;
        }
        u.keep(name, shape, new)?;
        Ok::<_, crate::error::Error>(new)
    };
    let importance = smoothed(u, "importance", betas[0], size)?;
    let off = u.binary(BinaryOp::Sub, size, importance)?;
    let off = u.unary(UnaryOp::Abs, off)?;
    let uncertainty = smoothed(u, "uncertainty", betas[1], off)?;
    u.mul(importance, uncertainty)
}

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

/// A site's part of the loss `weight` times the mean, over all sites and both factors, of ‖A·Aᵀ − I‖ and ‖Bᵀ·B − I‖ for A [r, in] and B
/// [out, r], f32 []; of the ranks of a mask [r] only where there is one.
///
/// # Errors
/// Operands that do not fit.
pub(super) fn orthogonality(
    s: &mut Scope,
    factors: [&str; 2],
    weight: f64,
    mask: Option<ValueId>,
) -> Result<Option<ValueId>> {
    let (rank, sites) = (s.site().rank, s.all_sites().len());
    if weight == 0.0 || rank == 0 {
        return Ok(None);
    }
    let [mut down, mut up] = [s.buffer(factors[0])?, s.buffer(factors[1])?];
    let mut identity = s.identity(rank)?;
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
    let (sum, factor) = (s.sum(&terms)?, s.number(weight / (2 * sites) as f64)?);
    s.mul(sum, factor).map(Some)
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
