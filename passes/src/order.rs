//! Orders the launches of an entry so that less memory is live at once.
//!
//! Two orders are compared at a nominal size: the one given, and a greedy one that always takes the ready launch which
//! leaves the least bytes live. The lower peak wins; a tie keeps the given order. Every dependence through a buffer
//! (write before read, read before overwrite) is kept.

use pleach_ir::{BufferKind, ScheduledEntry, Sym};
use std::collections::BTreeSet;

/// Value of every symbol when sizes are compared.
const NOMINAL: u64 = 256;

fn bytes(e: &ScheduledEntry, b: usize) -> u64 {
    let env = |_: Sym| Some(NOMINAL);
    let x = &e.buffers[b];
    x.layout.elements(&x.ty, &env).unwrap_or(0).saturating_mul(x.ty.dtype.size())
}

fn in_arena(e: &ScheduledEntry, b: usize) -> bool {
    matches!(e.buffers[b].kind, BufferKind::Arena | BufferKind::Output(_))
}

/// Largest sum of live arena bytes over the launches, in this order.
fn peak(e: &ScheduledEntry, order: &[usize]) -> u64 {
    let n = e.buffers.len();
    let (mut first, mut last) = (vec![usize::MAX; n], vec![0; n]);
    for (t, s) in order.iter().enumerate() {
        for b in e.steps[*s].reads.iter().chain(&e.steps[*s].writes) {
            let b = b.0 as usize;
            first[b] = first[b].min(t);
            last[b] = if matches!(e.buffers[b].kind, BufferKind::Output(_)) { order.len() } else { last[b].max(t) };
        }
    }
    let live =
        |t: usize| (0..n).filter(|b| in_arena(e, *b) && first[*b] <= t && t <= last[*b]).map(|b| bytes(e, b)).sum();
    (0..order.len()).map(live).max().unwrap_or(0)
}

/// For every launch, those that must come before it.
fn dependences(e: &ScheduledEntry) -> Vec<BTreeSet<usize>> {
    let n = e.buffers.len();
    let mut writer: Vec<Option<usize>> = vec![None; n];
    let mut readers: Vec<Vec<usize>> = vec![vec![]; n];
    let mut deps = vec![BTreeSet::new(); e.steps.len()];
    for (i, s) in e.steps.iter().enumerate() {
        for b in &s.reads {
            deps[i].extend(writer[b.0 as usize]);
            readers[b.0 as usize].push(i);
        }
        for b in &s.writes {
            let b = b.0 as usize;
            deps[i].extend(writer[b]);
            deps[i].extend(readers[b].drain(..).filter(|r| *r != i));
            writer[b] = Some(i);
        }
    }
    deps
}

/// Reorders the launches of `e`.
pub fn order(e: &mut ScheduledEntry) {
    let given: Vec<usize> = (0..e.steps.len()).collect();
    let deps = dependences(e);
    let mut unlocks = vec![vec![]; e.steps.len()];
    for (i, d) in deps.iter().enumerate() {
        for j in d {
            unlocks[*j].push(i);
        }
    }
    let mut uses = vec![0usize; e.buffers.len()];
    for s in &e.steps {
        for b in s.reads.iter().collect::<BTreeSet<_>>() {
            uses[b.0 as usize] += 1;
        }
    }
    let mut waits: Vec<usize> = deps.iter().map(BTreeSet::len).collect();
    let mut ready: BTreeSet<usize> = given.iter().copied().filter(|i| waits[*i] == 0).collect();
    let mut greedy = vec![];
    let mut made = vec![false; e.buffers.len()];
    while !ready.is_empty() {
        let change = |i: usize| -> i128 {
            let s = &e.steps[i];
            let grow: u64 = s
                .writes
                .iter()
                .filter(|b| in_arena(e, b.0 as usize) && !made[b.0 as usize])
                .map(|b| bytes(e, b.0 as usize))
                .sum();
            let free: u64 = s
                .reads
                .iter()
                .collect::<BTreeSet<_>>()
                .into_iter()
                .filter(|b| in_arena(e, b.0 as usize) && uses[b.0 as usize] == 1)
                .map(|b| bytes(e, b.0 as usize))
                .sum();
            i128::from(grow) - i128::from(free)
        };
        let Some(i) = ready.iter().copied().min_by_key(|i| (change(*i), *i)) else { break };
        ready.remove(&i);
        greedy.push(i);
        for b in e.steps[i].reads.iter().collect::<BTreeSet<_>>() {
            uses[b.0 as usize] -= 1;
        }
        for b in &e.steps[i].writes {
            made[b.0 as usize] = true;
        }
        for j in &unlocks[i] {
            waits[*j] -= 1;
            if waits[*j] == 0 {
                ready.insert(*j);
            }
        }
    }
    if greedy.len() == given.len() && peak(e, &greedy) < peak(e, &given) {
        let steps = greedy.iter().map(|i| e.steps[*i].clone()).collect();
        e.steps = steps;
    }
}
