//! Which form of a kernel is the fastest: every form of every kernel is timed within whole runs.
//!
//! A plan with all forms names them among its facts; those that no step runs take the place of the others round by round, so that
//! what changes with time changes all of them. What is run, and which numbers must not depend on forms, is the caller's.

use crate::error::{Result, RuntimeError};
use crate::session::Session;
use pleach_plan::Plan;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Name of the list of [`Alternative`]s among a plan's facts.
pub const ALTERNATIVES: &str = "alternatives";

/// How far results of two forms may be apart, relative to the larger one: sums have another order.
const APART: f64 = 2e-2;

/// A kernel of a plan with all forms: which it is, in which form, and what it computes. Those of one signature stand together, the
/// one that steps run first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alternative {
    /// What it computes.
    pub signature: String,
    /// Index in the plan.
    pub kernel: u32,
    /// Its form.
    pub form: String,
}

/// A form of a kernel.
#[derive(Clone, Debug, PartialEq)]
pub struct Timed {
    /// Index of the kernel in the plan.
    pub kernel: u32,
    /// Its form.
    pub form: String,
    /// Milliseconds in a run of everything, the smallest of all rounds; none for one that was not run.
    pub ms: Option<f64>,
    /// A number of the usual forms, and what a run with this one gave for it, where they are too far apart.
    pub wrong: Option<[f64; 2]>,
}

/// The forms of a kernel, the usual one first.
#[derive(Clone, Debug, PartialEq)]
pub struct Forms {
    /// What it computes.
    pub signature: String,
    /// At least one.
    pub list: Vec<Timed>,
}

impl Forms {
    /// The forms in a plan that has them all; none in any other.
    ///
    /// # Errors
    /// [`RuntimeError::Values`]: the list makes no sense.
    pub fn of(plan: &Plan) -> Result<Vec<Forms>> {
        let list = plan.meta.extra.get(ALTERNATIVES).cloned().unwrap_or_else(|| serde_json::Value::Array(vec![]));
        let bad = |why: String| RuntimeError::Values(format!("the plan's list of forms makes no sense: {why}"));
        let list: Vec<Alternative> = serde_json::from_value(list).map_err(|e| bad(e.to_string()))?;
        let mut out: Vec<Forms> = vec![];
        for a in list {
            if a.kernel as usize >= plan.kernels.len() {
                return Err(bad(format!("there is no kernel {}", a.kernel)));
            }
            let timed = Timed { kernel: a.kernel, form: a.form, ms: None, wrong: None };
            match out.last_mut().filter(|k| k.signature == a.signature) {
                Some(k) => k.list.push(timed),
                None => out.push(Forms { signature: a.signature, list: vec![timed] }),
            }
        }
        Ok(out)
    }

    /// The form to take: the fastest one with right results, or the usual one where that is not slower by more than the share `gain`.
    pub fn best(&self, gain: f64) -> &Timed {
        let time = |t: &Timed| t.ms.filter(|_| t.wrong.is_none()).unwrap_or(f64::INFINITY);
        let usual = &self.list[0];
        let fastest = self.list.iter().min_by(|a, b| time(a).total_cmp(&time(b))).unwrap_or(usual);
        if time(fastest) < time(usual) * (1.0 - gain) { fastest } else { usual }
    }
}

/// Times every form in `rounds` rounds after one for warming up. `run` runs everything once and gives numbers that must not depend on
/// forms; `done` is called after each run: there are `rounds + 1` times as many as the longest list of forms. Forms by a library that
/// the machine lacks are not run.
///
/// # Errors
/// Those of `run`, and [`RuntimeError::Values`] for forms that do not belong to the session's plan.
pub fn measure_forms<E: From<RuntimeError>>(
    s: &mut Session,
    forms: &mut [Forms],
    rounds: usize,
    mut run: impl FnMut(&mut Session) -> std::result::Result<Vec<f64>, E>,
    mut done: impl FnMut(),
) -> std::result::Result<(), E> {
    let lacks = s.missing().is_some();
    let kernel = |s: &Session, n: u32| s.plan().kernels.get(n as usize).is_some_and(|k| k.library.is_none() || !lacks);
    let usable: Vec<Vec<bool>> = forms.iter().map(|k| k.list.iter().map(|f| kernel(s, f.kernel)).collect()).collect();
    let mut running: Vec<u32> = forms.iter().map(|k| k.list[0].kernel).collect();
    let most = forms.iter().map(|k| k.list.len()).max().unwrap_or(0);
    let mut usual: Option<Vec<f64>> = None;
    for round in 0..=rounds {
        for number in 0..most {
            // Those with fewer forms run the usual one.
            let now = |k: usize| usable[k].get(number) == Some(&true);
            for (k, running) in running.iter_mut().enumerate() {
                let next = forms[k].list[if now(k) { number } else { 0 }].kernel;
                s.substitute(*running, next)?;
                *running = next;
            }
            s.set_profile(true);
            let got = run(s)?;
            let want = usual.get_or_insert_with(|| got.clone());
            // What is no number is near nothing.
            let near = |a: f64, b: f64| (a - b).abs() <= APART * a.abs().max(b.abs()).max(1e-6);
            let wrong = want.iter().zip(&got).map(|(a, b)| [*a, *b]).find(|[a, b]| !near(*a, *b));
            let mut times: BTreeMap<u32, f64> = BTreeMap::new();
            for t in s.step_times() {
                let kernel = s.plan().entries[t.entry as usize].steps[t.step as usize].kernel;
                *times.entry(kernel).or_default() += t.ns as f64 * 1e-6;
            }
            s.set_profile(false);
            for k in (0..forms.len()).filter(|k| now(*k)) {
                let f = &mut forms[k].list[number];
                f.wrong = f.wrong.or(wrong);
                // The first round loads code and warms up.
                if let Some(ms) = times.get(&f.kernel).filter(|_| round > 0) {
                    f.ms = Some(f.ms.map_or(*ms, |before| before.min(*ms)));
                }
            }
            done();
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forms(list: &[(Option<f64>, bool)]) -> Forms {
        let timed = |(i, (ms, wrong)): (usize, &(Option<f64>, bool))| Timed {
            kernel: i as u32,
            form: i.to_string(),
            ms: *ms,
            wrong: wrong.then_some([1.0, 2.0]),
        };
        Forms { signature: "s".into(), list: list.iter().enumerate().map(timed).collect() }
    }

    #[test]
    fn the_fastest_right_form_is_taken_where_it_gains_enough() {
        let best = |list: &[(Option<f64>, bool)]| forms(list).best(0.02).kernel;
        assert_eq!(best(&[(Some(10.0), false), (Some(9.0), false), (Some(8.0), false)]), 2);
        assert_eq!(best(&[(Some(10.0), false), (Some(9.9), false)]), 0);
        assert_eq!(best(&[(Some(10.0), false), (Some(5.0), true), (None, false)]), 0);
        assert_eq!(best(&[(None, false), (None, false)]), 0);
    }

    #[test]
    fn lists_are_read_by_signature_and_held_against_the_plan() {
        let mut plan = Plan::default();
        assert_eq!(Forms::of(&plan).unwrap(), []);
        let one = serde_json::json!([{"signature": "a", "kernel": 0, "form": "mma-1x1"}]);
        plan.meta.extra.insert(ALTERNATIVES.into(), one);
        assert!(Forms::of(&plan).unwrap_err().to_string().contains("no kernel 0"));
        plan.meta.extra.insert(ALTERNATIVES.into(), "many".into());
        assert!(Forms::of(&plan).unwrap_err().to_string().contains("makes no sense"));
    }
}
