//! The loop: early rules to a fixpoint, each late rule once, then the early ones again.
//!
//! A round reads everything, then applies, then rebuilds. Only counts limit it, never time, so two runs on one input do
//! the same.

use super::lang::{Term, World};
use super::rules::{Found, RULES};
use egg::Id;

/// What happened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Saturation {
    /// Rounds.
    pub rounds: usize,
    /// E-nodes at the end.
    pub nodes: usize,
    /// Classes at the end.
    pub classes: usize,
    /// A limit ended it before it settled.
    pub limited: bool,
    /// Equalities found by each rule of [`RULES`].
    pub fired: Vec<usize>,
}

/// Limits and switches.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Rounds at most.
    pub rounds: usize,
    /// E-nodes at most.
    pub nodes: usize,
    /// Rules that may not fire.
    pub disabled: Vec<String>,
}

/// Saturates.
pub fn saturate(w: &mut World, limits: &Limits) -> Saturation {
    let mut out = Saturation { rounds: 0, nodes: 0, classes: 0, limited: false, fired: vec![0; RULES.len()] };
    let on = |k: usize| !limits.disabled.iter().any(|d| d == RULES[k].name);
    let early: Vec<usize> = (0..RULES.len()).filter(|&k| !RULES[k].late && on(k)).collect();
    let late: Vec<usize> = (0..RULES.len()).filter(|&k| RULES[k].late && on(k)).collect();
    w.eg.rebuild();
    for stage in 0..=late.len() {
        loop {
            if out.rounds >= limits.rounds || w.eg.total_size() > limits.nodes {
                out.limited = true;
                break;
            }
            out.rounds += 1;
            if !round(w, &early, limits, &mut out.fired) {
                break;
            }
        }
        if out.limited {
            break;
        }
        if let Some(&k) = late.get(stage) {
            round(w, &[k], limits, &mut out.fired);
        }
    }
    (out.nodes, out.classes) = (w.eg.total_size(), w.eg.number_of_classes());
    out
}

fn round(w: &mut World, rules: &[usize], limits: &Limits, fired: &mut [usize]) -> bool {
    let found: Vec<(usize, Found)> = rules
        .iter()
        .map(|&k| {
            let mut f = vec![];
            (RULES[k].apply)(w, &mut f);
            (k, f)
        })
        .collect();
    let mut changed = false;
    for (k, f) in found {
        w.rule = k;
        for (id, t) in f {
            // a little over the limit is fine: every rule of the round gets its share
            if w.eg.total_size() > limits.nodes + limits.nodes / 4 {
                break;
            }
            if unite(w, id, &t, RULES[k].name) {
                fired[k] += 1;
                changed = true;
            }
        }
    }
    w.eg.rebuild();
    changed
}

/// Makes the term equal to the class, if it type-checks and has the class's type.
fn unite(w: &mut World, id: Id, t: &Term, rule: &'static str) -> bool {
    match w.build(t) {
        Some(new) if w.ty(new) == w.ty(id) => w.eg.union_trusted(id, new, rule),
        _ => false,
    }
}
