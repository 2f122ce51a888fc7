//! Learning rates by step, as transformers' `get_scheduler` gives them: one value per optimizer step, warm-up linear from
//! zero. All arithmetic is in f64, in the order of that source, so that the values are the same to the bit but for cos.

use crate::error::{Result, RuntimeError};
use serde::{Deserialize, Serialize};

/// How the rate moves after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// Stays (`constant_with_warmup`; without warm-up, `constant`).
    Constant,
    /// Falls to zero at the last step.
    #[default]
    Linear,
    /// Half a period of a cosine, to zero at the last step.
    Cosine,
}

impl Schedule {
    /// The factor of the rate at an optimizer step, the first one being 0, of `total` steps with `warmup`.
    pub fn factor(self, step: u64, warmup: u64, total: u64) -> f64 {
        let (at, warm, all) = (step as f64, warmup as f64, total as f64);
        if step < warmup {
            return at / warm.max(1.0);
        }
        match self {
            Schedule::Constant => 1.0,
            Schedule::Linear => ((all - at) / (all - warm).max(1.0)).max(0.0),
            Schedule::Cosine => {
                let progress = (at - warm) / (all - warm).max(1.0);
                (0.5 * (1.0 + (std::f64::consts::PI * 0.5 * 2.0 * progress).cos())).max(0.0)
            }
        }
    }
}

/// Steps of warm-up: a count, or a share of all steps.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Warmup {
    /// So many.
    Steps(u64),
    /// This share of all steps, rounded up.
    Share(f64),
}

impl Default for Warmup {
    fn default() -> Warmup {
        Warmup::Steps(0)
    }
}

impl Warmup {
    /// Steps of `total`.
    pub fn steps(self, total: u64) -> u64 {
        match self {
            Warmup::Steps(n) => n,
            Warmup::Share(x) => (x * total as f64).ceil() as u64,
        }
    }
}

impl std::str::FromStr for Warmup {
    type Err = RuntimeError;

    /// `100` is a count, `0.03` a share.
    fn from_str(s: &str) -> Result<Warmup> {
        let share = || s.parse::<f64>().ok().filter(|x| (0.0..1.0).contains(x)).map(Warmup::Share);
        s.parse().ok().map(Warmup::Steps).or_else(share).ok_or_else(|| {
            RuntimeError::Values(format!(
                "`{s}` is no warm-up; give a number of steps, or a share below 1 such as 0.03"
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warm_up_is_a_count_or_a_share() {
        assert_eq!("10".parse::<Warmup>().unwrap(), Warmup::Steps(10));
        assert_eq!("0.03".parse::<Warmup>().unwrap().steps(101), 4);
        assert!("1.5".parse::<Warmup>().is_err() && "-1".parse::<Warmup>().is_err() && "x".parse::<Warmup>().is_err());
    }

    #[test]
    fn schedules_begin_and_end_where_they_must() {
        for s in [Schedule::Constant, Schedule::Linear, Schedule::Cosine] {
            assert_eq!(s.factor(0, 4, 10), 0.0);
            assert_eq!(s.factor(2, 4, 10), 0.5);
            assert_eq!(s.factor(4, 4, 10), 1.0);
            assert_eq!(s.factor(0, 0, 10), 1.0);
        }
        assert_eq!(Schedule::Linear.factor(10, 4, 10), 0.0);
        assert!(Schedule::Cosine.factor(10, 4, 10) < 1e-15);
        assert_eq!(Schedule::Constant.factor(99, 4, 10), 1.0);
    }
}
