//! Runs chains of launches window by window where what lies between them is huge.
//!
//! The classic case is a loss over a large vocabulary: logits, their softmax and their gradient are many times larger than
//! the hidden states that go in and the gradient that comes out. Nothing here knows a loss: a buffer of the arena is huge
//! when it takes more than [`LEAST`] bytes at the counts an entry is tuned for. The launches that touch huge buffers, and
//! those between them, become a loop when each of them means the same window by window ([`on_window`]) and what they hold
//! inside is at least [`GAIN`] times what goes in and out. In a loop a huge result lies over a huge operand where that can be ([`over`]).
//! Leaves everything else in its order.

mod over;

use crate::error::PassError;
use crate::join::drop_unused;
use crate::options::Options;
use crate::order::dependences;
use pleach_ir::window::on_window;
use pleach_ir::{BufferId, BufferKind, Dim, Loop, Schedule, ScheduledEntry, Seen, Sym};
use std::collections::BTreeSet;

/// Bytes from which a buffer is huge.
pub const LEAST: u64 = 8 << 20;
/// What lies inside a loop is at least this many times what goes in and out.
pub const GAIN: u64 = 4;

/// Makes loops in every entry. Returns how many.
///
/// # Errors
/// [`PassError`] when the result breaks a rule: a fault of the pass.
pub fn run(s: &mut Schedule, options: &Options) -> Result<usize, PassError> {
    run_with(s, &|entry| options.tokens(entry), LEAST, options.target.window_rows)
}

/// As [`run`], with the counts of an entry, and other sizes.
///
/// # Errors
/// As [`run`].
pub fn run_with(s: &mut Schedule, count: &dyn Fn(&str) -> u64, least: u64, rows: u64) -> Result<usize, PassError> {
    // A symbol that a parameter has in its size has one value while a session lives.
    let fixed: BTreeSet<Sym> = s.params.iter().flat_map(|(p, _)| p.ty.symbols()).collect();
    let (mut made, mut over) = (0, false);
    for i in 0..s.entries.len() {
        let e = &s.entries[i];
        if e.name.starts_with("prepare(") || !e.loops.is_empty() {
            continue;
        }
        let symbols: BTreeSet<Sym> = e.buffers.iter().filter_map(|b| leading(&b.ty.shape)).collect();
        let n = count(&e.name);
        for symbol in symbols.into_iter().filter(|x| !fixed.contains(x) && *x != Sym::S && *x != Sym::S1) {
            let bytes = |b: usize| {
                let x = &s.entries[i].buffers[b];
                x.layout.bytes(&x.ty, &|_| Some(n)).unwrap_or(0)
            };
            if let Some(e) = with_loop(s, &s.entries[i], symbol, least, rows, &bytes) {
                s.entries[i] = e;
                made += 1;
            }
        }
        over |= over::run(s, i, &|e, b| {
            let x = &e.buffers[b.0 as usize];
            x.ty.bytes(&|_| Some(n)).is_some_and(|bytes| bytes > least)
        });
    }
    if over {
        drop_unused(s);
    }
    s.check().map_err(|e| PassError::Refused { pass: "chunk".into(), why: e.to_string() })?;
    Ok(made)
}

fn leading(shape: &[Dim]) -> Option<Sym> {
    if let Some(Dim::Symbol(s)) = shape.first() { Some(*s) } else { None }
}

/// The entry with a loop over `symbol`; `None` where none pays or none is right.
fn with_loop(
    s: &Schedule,
    e: &ScheduledEntry,
    symbol: Sym,
    least: u64,
    rows: u64,
    bytes: &dyn Fn(usize) -> u64,
) -> Option<ScheduledEntry> {
    let mut huge: BTreeSet<usize> = (0..e.buffers.len())
        .filter(|b| e.buffers[*b].kind == BufferKind::Arena && leading(&e.buffers[*b].ty.shape) == Some(symbol))
        .filter(|b| bytes(*b) > least)
        .collect();
    let before = dependences(e);
    let cuttable: Vec<bool> =
        e.steps.iter().map(|t| on_window(&s.kernels[t.kernel.0 as usize], symbol).is_ok()).collect();
    let free = |i: usize| e.loops.iter().all(|l| i < l.first || i >= l.last);
    loop {
        let touches = |i: &usize| {
            let t = &e.steps[*i];
            t.reads.iter().chain(&t.writes).any(|b| huge.contains(&(b.0 as usize)))
        };
        let core: BTreeSet<usize> = (0..e.steps.len()).filter(touches).collect();
        if core.is_empty() {
            return None;
        }
        let chain = between(&before, &core);
        let bad: Vec<usize> = chain.iter().copied().filter(|i| !cuttable[*i] || !free(*i)).collect();
        if !bad.is_empty() {
            // What touches a launch that stays whole stays whole.
            let near = |b: &usize| {
                let id = BufferId(*b as u32);
                bad.iter().any(|i| e.steps[*i].reads.contains(&id) || e.steps[*i].writes.contains(&id))
            };
            let drop: BTreeSet<usize> = huge.iter().copied().filter(near).collect();
            // A launch in between that touches none of them: give up.
            if drop.is_empty() {
                return None;
            }
            huge.retain(|b| !drop.contains(b));
            continue;
        }
        let out = moved_together(e, &before, &chain, symbol, rows);
        let l = out.loops.iter().find(|l| l.symbol == symbol)?;
        let seen = out.seen(l.first, l.last, symbol);
        let sum =
            |how: Seen| -> u64 { seen.iter().filter(|(_, x)| **x == how).map(|(b, _)| bytes(b.0 as usize)).sum() };
        if sum(Seen::Inside) < GAIN * sum(Seen::Window) {
            return None;
        }
        let trial = Schedule { entries: vec![out], params: s.params.clone(), kernels: s.kernels.clone() };
        return trial.check().is_ok().then(|| trial.entries.into_iter().next())?;
    }
}

/// The launches of `core` and all that lie on a way from one of them to another.
fn between(before: &[BTreeSet<usize>], core: &BTreeSet<usize>) -> BTreeSet<usize> {
    let n = before.len();
    let (mut follows, mut leads) = (vec![false; n], vec![false; n]);
    for i in 0..n {
        follows[i] = core.contains(&i) || before[i].iter().any(|j| follows[*j]);
    }
    for i in (0..n).rev() {
        leads[i] |= core.contains(&i);
        if leads[i] {
            before[i].iter().for_each(|j| leads[*j] = true);
        }
    }
    (0..n).filter(|i| follows[*i] && leads[*i]).collect()
}

/// The launches of `chain` one after another as a loop: after all they wait for, before all that waits for them.
fn moved_together(
    e: &ScheduledEntry,
    before: &[BTreeSet<usize>],
    chain: &BTreeSet<usize>,
    symbol: Sym,
    rows: u64,
) -> ScheduledEntry {
    let n = e.steps.len();
    let first = chain.first().copied().unwrap_or(0);
    let mut needed = vec![false; n];
    for i in (0..n).rev() {
        if needed[i] || chain.contains(&i) {
            before[i].iter().for_each(|j| needed[*j] = true);
        }
    }
    let early = |i: &usize| !chain.contains(i) && (*i < first || needed[*i]);
    let mut order: Vec<usize> = (0..n).filter(early).collect();
    let start = order.len();
    order.extend(chain);
    let end = order.len();
    order.extend((0..n).filter(|i| !chain.contains(i) && !early(i)));
    let mut loops: Vec<Loop> = vec![];
    let place = |i: usize| order.iter().position(|x| *x == i).unwrap_or(0);
    for l in &e.loops {
        let first = place(l.first);
        loops.push(Loop { first, last: first + (l.last - l.first), ..*l });
    }
    loops.push(Loop { first: start, last: end, symbol, chunk: rows });
    loops.sort_by_key(|l| l.first);
    ScheduledEntry { steps: order.iter().map(|i| e.steps[*i].clone()).collect(), loops, ..e.clone() }
}
