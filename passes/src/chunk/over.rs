//! Huge results of a loop that take the place of a huge operand.
//!
//! A row kernel whose results come window by window reads of each operand no more than its own rows ([`on_window`]). Where such a
//! kernel is the last to read an operand of a result's type, the result is written over it: one buffer less is alive, which of
//! logits and their gradient is half.

use pleach_ir::window::on_window;
use pleach_ir::{BufferId, Class, Kernel, KernelId, Loop, Schedule, ScheduledEntry, Seen};

/// Lays results over operands in the loops of entry `i`. `huge` tells which buffers are worth it.
/// True when some do; kernels may be left that nothing launches.
pub(super) fn run(s: &mut Schedule, i: usize, huge: &dyn Fn(&ScheduledEntry, BufferId) -> bool) -> bool {
    let mut changed = false;
    for l in s.entries[i].loops.clone() {
        for at in l.first..l.last {
            while let Some((result, operand)) = found(s, &s.entries[i], &l, at, huge) {
                let kernel = s.entries[i].steps[at].kernel;
                let mut k = s.kernels[kernel.0 as usize].clone();
                k.aliases[result] = Some(operand as u32);
                let kernel = intern(s, k);
                let e = &mut s.entries[i];
                e.steps[at].kernel = kernel;
                let (from, to) = (e.steps[at].writes[result], e.steps[at].reads[operand]);
                for step in &mut e.steps[at..] {
                    let all = step.reads.iter_mut().chain(&mut step.writes).chain(&mut step.after);
                    all.filter(|b| **b == from).for_each(|b| *b = to);
                }
                changed = true;
            }
        }
    }
    changed
}

/// A result of step `at` and the operand that it can lie over.
fn found(
    s: &Schedule,
    e: &ScheduledEntry,
    l: &Loop,
    at: usize,
    huge: &dyn Fn(&ScheduledEntry, BufferId) -> bool,
) -> Option<(usize, usize)> {
    let step = &e.steps[at];
    let k = &s.kernels[step.kernel.0 as usize];
    if k.class != Class::Row || on_window(k, l.symbol).is_err() {
        return None;
    }
    let seen = e.seen(l.first, l.last, l.symbol);
    let inside = |b: &BufferId| seen.get(b) == Some(&Seen::Inside) && huge(e, *b);
    let (operands, results) = (k.operand_types(), k.result_types());
    let last = |b: &BufferId| e.steps[at + 1..].iter().all(|x| !x.reads.contains(b) && !x.writes.contains(b));
    for (r, w) in step.writes.iter().enumerate().filter(|(r, w)| k.aliases[*r].is_none() && inside(w)) {
        let fits = |(j, b): &(usize, &BufferId)| {
            let of = |b: &BufferId| (&e.buffers[b.0 as usize].ty, e.buffers[b.0 as usize].layout);
            let own = step.reads.iter().filter(|x| x == b).count() == 1 && !step.writes.contains(b);
            inside(b) && own && last(b) && of(b) == of(w) && operands[*j] == results[r] && operands[*j] == *of(b).0
        };
        if let Some((j, _)) = step.reads.iter().enumerate().find(fits) {
            return Some((r, j));
        }
    }
    None
}

/// The kernel that is equal but for its name, or a new one.
fn intern(s: &mut Schedule, mut k: Kernel) -> KernelId {
    let same = |x: &Kernel| {
        (x.class, &x.operands, &x.results, &x.aliases, &x.body)
            == (k.class, &k.operands, &k.results, &k.aliases, &k.body)
    };
    let at = s.kernels.iter().position(same).unwrap_or(s.kernels.len());
    if at == s.kernels.len() {
        k.name = format!("k{at}{}_over", k.name.trim_start_matches(|c: char| c == 'k' || c.is_ascii_digit()));
        s.kernels.push(k);
    }
    KernelId(at as u32)
}
