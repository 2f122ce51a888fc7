//! From logits to the next id: greedy, or sampled with temperature and nucleus.

use crate::error::{Result, RuntimeError};
use pleach_plan::random::Philox;

/// How the next id is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 means greedy.
    pub temperature: f32,
    /// Only the likeliest ids whose probabilities first add up to this are kept; 1 keeps all.
    pub top_p: f32,
    /// Key of the random numbers.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Sampling {
        Sampling { temperature: 0.0, top_p: 1.0, seed: 0 }
    }
}

impl Sampling {
    /// Refuses values that have no meaning.
    ///
    /// # Errors
    /// [`RuntimeError::Values`].
    pub fn check(&self) -> Result<()> {
        if !self.temperature.is_finite() || self.temperature < 0.0 {
            return Err(RuntimeError::Values(format!("temperature is {}; give 0 (greedy) or more", self.temperature)));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(RuntimeError::Values(format!("top_p is {}; give more than 0, at most 1", self.top_p)));
        }
        Ok(())
    }
}

/// Logits looked at together.
const BLOCK: usize = 64;

/// The largest logit, lane by lane: one after another each comparison would wait for the last.
fn largest(logits: &[f32]) -> f32 {
    let more = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; BLOCK];
    for block in logits.chunks(BLOCK) {
        lanes.iter_mut().zip(block).for_each(|(m, x)| *m = more(*m, *x));
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, more)
}

/// Chooses an id from logits. Greedy takes the lowest id among the largest logits. The random number is a function of
/// (seed, stream, step): the same whatever else runs.
///
/// # Errors
/// [`RuntimeError::Values`] when a logit is not a number, or there is none.
pub fn pick(logits: &[f32], sampling: &Sampling, stream: u64, step: u64) -> Result<i32> {
    let nan = logits.iter().fold(false, |nan, x| nan | x.is_nan());
    let max = largest(logits);
    if nan || logits.is_empty() || max == f32::INFINITY {
        return Err(RuntimeError::Values(
            "the logits are not finite numbers; check the weights and the adapter".into(),
        ));
    }
    // Block by block: a block is looked at without a branch for each logit.
    let holds = |b: &[f32]| b.iter().fold(false, |any, x| any | (*x == max));
    let block = logits.chunks(BLOCK).position(holds).unwrap_or(0) * BLOCK;
    let best = (block + logits[block..].iter().position(|x| *x == max).unwrap_or(0)) as i32;
    if sampling.temperature == 0.0 || max == f32::NEG_INFINITY {
        return Ok(best);
    }
    let weight = |x: f32| (f64::from(x - max) / f64::from(sampling.temperature)).exp();
    let u = Philox::new(sampling.seed).uniform(stream, step);
    if sampling.top_p >= 1.0 {
        let total: f64 = logits.iter().map(|x| weight(*x)).sum();
        return Ok(
            walk(logits.iter().enumerate().map(|(i, x)| (i, weight(*x))), u * total).unwrap_or(best as usize) as i32
        );
    }
    let mut order: Vec<(usize, f64)> = logits.iter().map(|x| weight(*x)).enumerate().collect();
    order.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let total: f64 = order.iter().map(|x| x.1).sum();
    let (mut kept, mut n) = (0.0, 0);
    while n < order.len() && (n == 0 || kept < f64::from(sampling.top_p) * total) {
        kept += order[n].1;
        n += 1;
    }
    Ok(walk(order[..n].iter().copied(), u * kept).unwrap_or(best as usize) as i32)
}

/// The first whose running sum exceeds `target`; the last with any weight when rounding leaves none.
fn walk(weights: impl Iterator<Item = (usize, f64)>, target: f64) -> Option<usize> {
    let (mut sum, mut last) = (0.0, None);
    for (i, w) in weights {
        sum += w;
        if w > 0.0 {
            last = Some(i);
            if sum > target {
                return last;
            }
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greedy_takes_the_lowest_of_the_largest() {
        let s = Sampling::default();
        assert_eq!(pick(&[0.5, 2.0, 2.0, -1.0], &s, 0, 0).unwrap(), 1);
        assert_eq!(pick(&[f32::NEG_INFINITY, -3.0], &s, 0, 0).unwrap(), 1);
        assert!(pick(&[0.0, f32::NAN], &s, 0, 0).is_err());
        // In any lane of any block, and the first of equals in a later block.
        for at in [0, 63, 64, 130, 199] {
            let mut long = vec![-1.0; 200];
            (long[at], long[199]) = (3.0, 3.0);
            assert_eq!(pick(&long, &s, 0, 0).unwrap(), at as i32);
        }
        assert!(pick(&[0.0, f32::INFINITY], &s, 0, 0).is_err());
        assert!(pick(&[], &s, 0, 0).is_err());
    }

    #[test]
    fn samples_the_distribution() {
        let logits = [1.0f32.ln(), 2.0f32.ln(), 5.0f32.ln(), f32::NEG_INFINITY];
        let s = Sampling { temperature: 1.0, top_p: 1.0, seed: 5 };
        let mut count = [0u32; 4];
        for step in 0..8000 {
            count[pick(&logits, &s, 2, step).unwrap() as usize] += 1;
        }
        for (c, e) in count.iter().zip([1000.0, 2000.0, 5000.0, 0.0]) {
            assert!((f64::from(*c) - e).abs() < 150.0, "{count:?}");
        }
        // A nucleus of 0.85 keeps the two likeliest, in their proportion.
        let s = Sampling { top_p: 0.85, ..s };
        let mut count = [0u32; 4];
        for step in 0..7000 {
            count[pick(&logits, &s, 2, step).unwrap() as usize] += 1;
        }
        assert_eq!((count[0], count[3]), (0, 0));
        assert!((f64::from(count[1]) - 2000.0).abs() < 150.0, "{count:?}");
        // A tiny nucleus or temperature is greedy.
        let s = Sampling { top_p: 1e-6, ..s };
        assert!((0..100).all(|i| pick(&logits, &s, i, 0).unwrap() == 2));
        let s = Sampling { top_p: 1.0, temperature: 1e-3, ..s };
        assert!((0..100).all(|i| pick(&logits, &s, i, 0).unwrap() == 2));
    }

    #[test]
    fn known_draws_stay() {
        let logits: Vec<f32> = (0..50).map(|i| ((i * 37 % 50) as f32) / 10.0).collect();
        let s = Sampling { temperature: 0.8, top_p: 0.9, seed: 42 };
        let ids: Vec<i32> = (0..8).map(|step| pick(&logits, &s, 0, step).unwrap()).collect();
        let again: Vec<i32> = (0..8).rev().map(|step| pick(&logits, &s, 0, step).unwrap()).collect();
        assert_eq!(ids, again.into_iter().rev().collect::<Vec<_>>());
        assert_eq!(ids, KNOWN);
    }

    const KNOWN: [i32; 8] = [39, 13, 24, 43, 31, 31, 4, 8];

    #[test]
    fn refuses_what_has_no_meaning() {
        for (temperature, top_p) in [(-1.0, 1.0), (f32::NAN, 1.0), (1.0, 0.0), (1.0, 1.5), (1.0, f32::NAN)] {
            assert!(Sampling { temperature, top_p, seed: 0 }.check().is_err());
        }
        assert!(Sampling::default().check().is_ok());
    }
}
