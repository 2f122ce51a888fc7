//! Orders the launches of an entry so that less memory is live at once.
//!
//! The order given is compared, at a nominal size, with greedy ones: from the front, always the ready launch which leaves
//! the least bytes live; and the same from the back. The lowest peak wins; a tie keeps the given order. Every dependence
//! through a buffer (write before read, read before overwrite) and every ordering edge is kept; a loop stays one block.

use pleach_ir::{BufferKind, Dim, Loop, ScheduledEntry, Seen, Sym};
use std::collections::{BTreeMap, BTreeSet};

/// Value of every symbol when sizes are compared.
const NOMINAL: u64 = 256;
/// Entries with less than this in the arena stay as they are.
const LEAST: u64 = 1 << 20;

/// A launch or a loop, and what it touches of the arena.
struct Block {
    steps: std::ops::Range<usize>,
    reads: BTreeSet<usize>,
    writes: BTreeSet<usize>,
    /// Bytes that live only while it runs.
    inside: u64,
}

/// For every launch, those that must come before it: it reads what they write, writes what they read or write, or waits
/// for a buffer of theirs.
pub(crate) fn dependences(e: &ScheduledEntry) -> Vec<BTreeSet<usize>> {
    let n = e.buffers.len();
    let mut writer: Vec<Option<usize>> = vec![None; n];
    let mut readers: Vec<Vec<usize>> = vec![vec![]; n];
    let mut deps = vec![BTreeSet::new(); e.steps.len()];
    for (i, s) in e.steps.iter().enumerate() {
        for b in &s.after {
            deps[i].extend(writer[b.0 as usize]);
        }
        for b in &s.reads {
            deps[i].extend(writer[b.0 as usize]);
            readers[b.0 as usize].push(i);
        }
        for b in &s.writes {
            let b = b.0 as usize;
            deps[i].extend(writer[b].filter(|w| *w != i));
            deps[i].extend(readers[b].drain(..).filter(|r| *r != i));
            writer[b] = Some(i);
        }
    }
    deps
}

struct Blocks {
    blocks: Vec<Block>,
    before: Vec<BTreeSet<usize>>,
    after: Vec<Vec<usize>>,
    bytes: Vec<u64>,
    /// Buffers that stay to the end.
    kept: Vec<bool>,
}

impl Blocks {
    fn new(e: &ScheduledEntry) -> Blocks {
        let mut bytes: Vec<u64> = (0..e.buffers.len()).map(|b| size(e, b)).collect();
        let (mut blocks, mut of): (Vec<Block>, Vec<usize>) = (vec![], vec![]);
        let mut i = 0;
        while i < e.steps.len() {
            let l = e.loops.iter().find(|l| l.first == i && l.last > i);
            let steps = i..l.map_or(i + 1, |l| l.last);
            let seen: BTreeMap<_, _> = l.map(|l| e.seen(l.first, l.last, l.symbol)).unwrap_or_default();
            let outer = |b: &usize| seen.get(&pleach_ir::BufferId(*b as u32)) != Some(&Seen::Inside);
            let arena = |b: &usize| bytes[*b] > 0 && outer(b);
            let uses = |writes: bool| -> BTreeSet<usize> {
                let of = |s: &pleach_ir::Step| if writes { s.writes.clone() } else { s.reads.clone() };
                e.steps[steps.clone()].iter().flat_map(of).map(|b| b.0 as usize).filter(arena).collect()
            };
            let (reads, writes) = (uses(false), uses(true));
            let within = seen.iter().filter(|(_, s)| **s == Seen::Inside).map(|(b, _)| window(e, l, b.0 as usize));
            let inside = within.sum();
            of.extend(steps.clone().map(|_| blocks.len()));
            i = steps.end;
            blocks.push(Block { steps, reads, writes, inside });
        }
        let mut before = vec![BTreeSet::new(); blocks.len()];
        for (s, d) in dependences(e).into_iter().enumerate() {
            before[of[s]].extend(d.into_iter().map(|x| of[x]).filter(|x| *x != of[s]));
        }
        let mut after = vec![vec![]; blocks.len()];
        for (i, d) in before.iter().enumerate() {
            d.iter().for_each(|j| after[*j].push(i));
        }
        let mut kept: Vec<bool> = e.buffers.iter().map(|b| matches!(b.kind, BufferKind::Output(_))).collect();
        e.outputs.iter().for_each(|o| kept[o.1.0 as usize] = true);
        // What only loops use inside is counted there.
        let touched: BTreeSet<usize> = blocks.iter().flat_map(|b| b.reads.iter().chain(&b.writes)).copied().collect();
        (0..bytes.len()).filter(|b| !touched.contains(b)).for_each(|b| bytes[b] = 0);
        Blocks { blocks, before, after, bytes, kept }
    }

    /// Largest sum of live bytes over the blocks, in this order.
    fn peak(&self, order: &[usize]) -> u64 {
        let n = self.bytes.len();
        let mut last = vec![usize::MAX; n];
        for (t, b) in order.iter().enumerate() {
            for x in self.blocks[*b].reads.iter().chain(&self.blocks[*b].writes) {
                last[*x] = if self.kept[*x] { order.len() } else { t };
            }
        }
        let (mut live, mut peak) = (0, 0);
        let mut made = vec![false; n];
        for (t, b) in order.iter().enumerate() {
            let x = &self.blocks[*b];
            let all: BTreeSet<usize> = x.reads.union(&x.writes).copied().collect();
            for u in &all {
                if !std::mem::replace(&mut made[*u], true) {
                    live += self.bytes[*u];
                }
            }
            peak = peak.max(live + x.inside);
            live -= all.iter().filter(|u| last[**u] == t).map(|u| self.bytes[*u]).sum::<u64>();
        }
        peak
    }

    /// Always the ready block that leaves the least bytes live.
    fn forward(&self) -> Vec<usize> {
        let n = self.blocks.len();
        let mut uses = vec![0usize; self.bytes.len()];
        for b in &self.blocks {
            b.reads.union(&b.writes).for_each(|x| uses[*x] += 1);
        }
        let mut made = vec![false; self.bytes.len()];
        let mut waits: Vec<usize> = self.before.iter().map(BTreeSet::len).collect();
        let mut ready: BTreeSet<usize> = (0..n).filter(|i| waits[*i] == 0).collect();
        let mut out = vec![];
        while !ready.is_empty() {
            let change = |i: usize| -> i128 {
                let b = &self.blocks[i];
                let sum = |f: &dyn Fn(usize) -> bool| -> u64 {
                    b.reads.union(&b.writes).filter(|x| f(**x)).map(|x| self.bytes[*x]).sum()
                };
                i128::from(sum(&|x| !made[x])) - i128::from(sum(&|x| uses[x] == 1 && !self.kept[x]))
            };
            let Some(i) = ready.iter().copied().min_by_key(|i| (change(*i), *i)) else { break };
            ready.remove(&i);
            out.push(i);
            for x in self.blocks[i].reads.union(&self.blocks[i].writes) {
                uses[*x] -= 1;
                made[*x] = true;
            }
            for j in &self.after[i] {
                waits[*j] -= 1;
                if waits[*j] == 0 {
                    ready.insert(*j);
                }
            }
        }
        out
    }

    /// From the back: always the block, of those that nothing left waits for, which leaves the least bytes live before it.
    fn backward(&self) -> Vec<usize> {
        let n = self.blocks.len();
        // Uses that come earlier than what has been placed.
        let mut uses = vec![0usize; self.bytes.len()];
        for b in &self.blocks {
            b.reads.union(&b.writes).for_each(|x| uses[*x] += 1);
        }
        let mut live = self.kept.clone();
        let mut waits: Vec<usize> = self.after.iter().map(Vec::len).collect();
        let mut ready: BTreeSet<usize> = (0..n).filter(|i| waits[*i] == 0).collect();
        let mut out = vec![];
        while !ready.is_empty() {
            let change = |i: usize| -> i128 {
                let b = &self.blocks[i];
                let sum = |f: &dyn Fn(usize) -> bool| -> u64 {
                    b.reads.union(&b.writes).filter(|x| f(**x)).map(|x| self.bytes[*x]).sum()
                };
                i128::from(sum(&|x| !live[x] && uses[x] > 1)) - i128::from(sum(&|x| live[x] && uses[x] == 1))
            };
            let Some(i) = ready.iter().copied().min_by_key(|i| (change(*i), std::cmp::Reverse(*i))) else { break };
            ready.remove(&i);
            out.push(i);
            for x in self.blocks[i].reads.union(&self.blocks[i].writes) {
                uses[*x] -= 1;
                live[*x] = uses[*x] > 0;
            }
            for j in &self.before[i] {
                waits[*j] -= 1;
                if waits[*j] == 0 {
                    ready.insert(*j);
                }
            }
        }
        out.reverse();
        out
    }
}

fn size(e: &ScheduledEntry, b: usize) -> u64 {
    let x = &e.buffers[b];
    match x.kind {
        BufferKind::Arena | BufferKind::Output(_) => x.layout.bytes(&x.ty, &|_: Sym| Some(NOMINAL)).unwrap_or(0),
        _ => 0,
    }
}

/// Bytes of a buffer that holds one window.
fn window(e: &ScheduledEntry, l: Option<&Loop>, b: usize) -> u64 {
    match l {
        Some(l) if e.buffers[b].ty.shape.first() == Some(&Dim::Symbol(l.symbol)) => {
            size(e, b) / NOMINAL * l.chunk.min(NOMINAL)
        }
        _ => size(e, b),
    }
}

/// Reorders the launches of `e`.
pub fn order(e: &mut ScheduledEntry) {
    let b = Blocks::new(e);
    if b.bytes.iter().sum::<u64>() < LEAST {
        return;
    }
    let given: Vec<usize> = (0..b.blocks.len()).collect();
    let mut best = (b.peak(&given), given);
    for o in [b.forward(), b.backward()] {
        let p = b.peak(&o);
        if o.len() == b.blocks.len() && p < best.0 {
            best = (p, o);
        }
    }
    let mut steps = vec![];
    let mut loops = vec![];
    for i in best.1 {
        let from = &b.blocks[i].steps;
        let first = steps.len();
        steps.extend(e.steps[from.clone()].iter().cloned());
        if let Some(l) = e.loops.iter().find(|l| l.first == from.start) {
            loops.push(Loop { first, last: steps.len(), ..*l });
        }
    }
    e.steps = steps;
    e.loops = loops;
}
