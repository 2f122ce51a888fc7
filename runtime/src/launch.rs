//! The steps of an entry as waves of launches: waves in order, loops window by window.

use crate::device::{Address, Work};
use crate::error::{Result, RuntimeError};
use crate::fetch::Window;
use crate::session::Bound;
use pleach_plan::{Entry, Expr, ExprError, Loop, Plan};
use std::collections::BTreeMap;

/// All steps of an entry, bound to addresses, for one run.
#[derive(Clone, Copy, Debug)]
pub struct Steps<'a> {
    pub(crate) plan: &'a Plan,
    /// Index of the entry.
    pub(crate) index: usize,
    pub(crate) bound: &'a Bound,
    /// Values of the symbols in this run.
    pub(crate) env: &'a [u64],
}

/// Kernels that do not depend on each other, and the counts they run at.
#[derive(Clone, Copy, Debug)]
pub struct Wave<'a> {
    /// The kernels.
    pub works: &'a [Work<'a>],
    /// Values of all symbols, as kernels read them.
    pub dims: &'a [i64],
    /// The same, for expressions.
    pub env: &'a [u64],
    /// Number of the first kernel's step in the entry; the others follow it.
    pub first: usize,
    /// What each worker will read afterwards, as far as it is known.
    pub ahead: &'a [Window],
    /// In a loop: number of the loop in its entry, and of the window.
    pub window: Option<(usize, u64)>,
}

/// What is called for every wave.
type Each<'f> = &'f mut dyn FnMut(&Wave<'_>) -> Result<()>;

/// Neighbouring steps with what their launches need.
struct Part<'a> {
    /// First step and one past the last.
    steps: (usize, usize),
    /// Addresses of the steps' buffers, one step after another.
    pointers: &'a [Address],
    /// Tasks of the steps.
    tasks: &'a [u64],
    /// Values of the symbols.
    env: &'a [u64],
    window: Option<(usize, u64)>,
}

impl<'a> Steps<'a> {
    /// The entry.
    pub fn entry(&self) -> &'a Entry {
        &self.plan.entries[self.index]
    }

    /// Gives every wave in order as it is at these values of the symbols: those of the run, or larger ones.
    ///
    /// # Errors
    /// [`RuntimeError::Size`] when a count has no value, [`RuntimeError::Capacity`] when a window does not fit its
    /// buffers, and those of `each`.
    pub fn waves(&self, env: &[u64], each: Each<'_>) -> Result<()> {
        let entry = self.entry();
        let all = if env == self.bound.env && self.bound.tasks.len() == entry.steps.len() {
            &self.bound.tasks
        } else {
            &self.tasks(0, entry.steps.len(), env)?
        };
        let n = entry.steps.len();
        let mut i = 0;
        while i < n {
            if let Some(number) = entry.loops.iter().position(|l| l.first == i as u64) {
                self.windows(number, env, each)?;
                i = entry.loops[number].last as usize;
                continue;
            }
            let next = entry.loops.iter().map(|l| l.first as usize).find(|f| *f > i).unwrap_or(n);
            let pointers = &self.bound.pointers[self.bound.starts[i]..self.bound.starts[next]];
            self.part(&Part { steps: (i, next), pointers, tasks: &all[i..next], env, window: None }, each)?;
            i = next;
        }
        Ok(())
    }

    /// Tasks of the steps from `first` to `last`.
    pub(crate) fn tasks(&self, first: usize, last: usize, env: &[u64]) -> std::result::Result<Vec<u64>, ExprError> {
        let steps = &self.entry().steps[first..last];
        steps.iter().map(|s| self.plan.kernels[s.kernel as usize].tasks.eval(env)).collect()
    }

    fn part(&self, p: &Part<'_>, each: Each<'_>) -> Result<()> {
        let (first, last) = p.steps;
        let dims: Vec<i64> = p.env.iter().map(|v| *v as i64).collect();
        let at = self.bound.starts[first];
        let waves = &self.bound.waves;
        let mut works = vec![];
        for i in first..last {
            works.push(Work {
                kernel: self.entry().steps[i].kernel,
                buffers: &p.pointers[self.bound.starts[i] - at..self.bound.starts[i + 1] - at],
                tasks: p.tasks[i - first],
            });
            if i + 1 == last || waves[i + 1] != waves[i] {
                let from = waves[i] as usize * self.bound.workers;
                let ahead = self.bound.ahead.get(from..from + self.bound.workers).filter(|_| p.window.is_none());
                let ahead = ahead.unwrap_or_default();
                let first = i + 1 - works.len();
                each(&Wave { works: &works, dims: &dims, env: p.env, first, ahead, window: p.window })?;
                works.clear();
            }
        }
        Ok(())
    }

    fn windows(&self, number: usize, env: &[u64], each: Each<'_>) -> Result<()> {
        let (entry, l) = (self.entry(), &self.entry().loops[number]);
        let (first, last) = (l.first as usize, l.last as usize);
        let all = env[l.symbol as usize];
        let row_bytes = row_bytes(l, env)?;
        let base = &self.bound.pointers[self.bound.starts[first]..self.bound.starts[last]];
        let numbers: Vec<u32> = entry.steps[first..last].iter().flat_map(|s| s.buffers.iter().copied()).collect();
        let mut start = 0;
        let mut window = env.to_vec();
        let mut tasks: Vec<u64> = vec![];
        let mut pointers = base.to_vec();
        while start < all {
            let rows = l.chunk.min(all - start);
            if window[l.symbol as usize] != rows || tasks.is_empty() {
                window[l.symbol as usize] = rows;
                tasks = self.tasks(first, last, &window)?;
                self.hold(l, env, &window, &row_bytes)?;
            }
            for ((p, from), b) in pointers.iter_mut().zip(base).zip(&numbers) {
                if let Some(bytes) = row_bytes.get(b) {
                    *p = from.wrapping_add((start * bytes) as usize);
                }
            }
            let place = Some((number, start / l.chunk));
            let p = Part { steps: (first, last), pointers: &pointers, tasks: &tasks, env: &window, window: place };
            self.part(&p, each)?;
            start += rows;
        }
        Ok(())
    }

    /// Holds every window of a run at these counts against its buffers, as [`Steps::waves`] does.
    ///
    /// # Errors
    /// As [`Steps::waves`].
    #[cfg(feature = "cuda")]
    pub(crate) fn check(&self, env: &[u64]) -> Result<()> {
        for l in &self.entry().loops {
            let (all, row_bytes) = (env[l.symbol as usize], row_bytes(l, env)?);
            let rest = all % l.chunk;
            for rows in [l.chunk.min(all), if rest == 0 { l.chunk.min(all) } else { rest }] {
                let mut window = env.to_vec();
                window[l.symbol as usize] = rows;
                self.hold(l, env, &window, &row_bytes)?;
            }
        }
        Ok(())
    }

    /// Holds the sizes that kernels need in a window against what they are given: exactly, for these counts.
    fn hold(&self, l: &Loop, env: &[u64], window: &[u64], row_bytes: &BTreeMap<u32, u64>) -> Result<()> {
        let (entry, rows) = (self.entry(), window[l.symbol as usize]);
        for s in &entry.steps[l.first as usize..l.last as usize] {
            let k = &self.plan.kernels[s.kernel as usize];
            for (need, b) in k.operands.iter().chain(&k.results).zip(&s.buffers) {
                let have = match row_bytes.get(b) {
                    Some(bytes) => bytes.saturating_mul(rows),
                    None => entry.buffers[*b as usize].bytes.eval(env)?,
                };
                if need.eval(window)? > have {
                    return Err(RuntimeError::Capacity(format!(
                        "{}: {} needs more than buffer {b} holds in a window of {rows} rows; the plan is damaged",
                        entry.name, k.symbol
                    )));
                }
            }
        }
        Ok(())
    }
}

/// Bytes of a row of every buffer that a loop moves through.
pub(crate) fn row_bytes(l: &Loop, env: &[u64]) -> std::result::Result<BTreeMap<u32, u64>, ExprError> {
    let bytes = |e: &Expr| e.eval(env);
    l.windows.iter().map(|w| Ok((w.buffer, bytes(&w.row_bytes)?))).collect()
}
