//! `recompute`: which forward values are kept for the backward half of an entry, and which are built again.
//!
//! A value is of the *forward* half when it does not depend on [`SEED`], the factor of the loss that every gradient
//! starts from. At a price per kept byte the cheapest choice of what to keep and what to build again is exactly a
//! minimum cut ([`cut`]). Without a price it is what keeping a byte costs in time, and more as long as that takes next to no
//! time ([`SPARE`]). What is built again is cloned next to its first use; the leaves of a clone are
//! `after(kept, gradient)`, so a clone can neither run early nor be merged with its original; the same of a parameter where
//! a clone has no other leaves.
//!
//! Assumes phase `Core` after `fold-params`; nothing that merges equal values may run later. Leaves alone entries
//! without the seed, and whatever the cut keeps. [`saved`] lists what an entry keeps, why, and what would drop it.
//! Knows operators, sizes and the target's speeds; no model and no method.

mod cut;
mod lean;
mod narrow;
mod saved;
#[cfg(test)]
mod tests;

pub(crate) use lean::{lean, plain};
pub use saved::{Saved, saved};

use crate::canonicalize::compact;
use crate::error::PassError;
use crate::manager::Report;
use crate::options::Options;
use pleach_ir::{Entry, Graph, IrError, Op, Param, ValueId};
use std::collections::{BTreeMap, BTreeSet};

const NAME: &str = "recompute";

/// The input that gradients start from: the factor of the loss.
pub const SEED: &str = "loss_scale";

/// The share of the time of an entry's products that may be spent on keeping fewer bytes where no price is given.
pub const SPARE: f64 = 0.01;

/// The prices tried for that, in multiples of what keeping a byte costs in time.
const RISE: [f64; 4] = [2.0, 4.0, 8.0, 16.0];

/// How much forward work may be spent to keep fewer bytes.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Price {
    /// Microseconds that one kept byte is worth.
    pub byte_us: f64,
    /// The same for values of the first part of the forward half.
    pub early_byte_us: f64,
    /// How large the first part is: a share of the forward half's nodes, 0..=1.
    pub early: f64,
    /// The forward half stops at every so many of its narrow places ([`narrow`]): what crosses a stop is kept, so that
    /// what is built again lives for the part between two stops only. 0: no stops.
    pub every: usize,
}

impl Price {
    /// One price for all values.
    pub fn flat(byte_us: f64) -> Price {
        Price { byte_us, early_byte_us: byte_us, early: 0.0, every: 0 }
    }

    /// What keeping a byte costs in time alone: it is written once and read once.
    pub fn floor(bytes_per_s: f64) -> Price {
        Price::flat(2e6 / bytes_per_s)
    }
}

/// The pass.
///
/// # Errors
/// [`PassError::Build`] if a clone does not type-check, which would be a fault of this pass.
pub fn run(g: &Graph, opts: &Options, report: &mut Report) -> Result<Graph, PassError> {
    let mut out = g.clone();
    for e in out.entries.iter_mut().filter(|e| has_halves(e)) {
        let before = saved(g, e, opts);
        if before.is_empty() {
            continue;
        }
        let choose = |e: &Entry| {
            let plain = plain(&g.params, e)?.unwrap_or_else(|| e.clone());
            let rebuilt = opts.price().map_or_else(|| spared(&plain, opts), |p| cut::rebuilt(&plain, opts, p));
            if rebuilt.contains(&true) { apply(&g.params, &plain, &rebuilt) } else { Ok(plain) }
        };
        *e = choose(e).map_err(PassError::build(NAME, &e.name))?;
        let after = saved(g, e, opts);
        let mib = |s: &[Saved]| s.iter().map(|x| x.bytes).sum::<u64>() as f64 / f64::from(1 << 20);
        report.note =
            format!("kept for backward {:.1} → {:.1} MiB at T={}", mib(&before), mib(&after), opts.tokens(&e.name));
        report.saved = after;
    }
    Ok(out)
}

/// What is built again where no price is given: what costs no more time than keeping it, and then what is cheapest per byte, within
/// [`SPARE`].
fn spared(e: &Entry, opts: &Options) -> Vec<bool> {
    let floor = Price::floor(opts.target.bytes_per_s).byte_us;
    let mut best = cut::rebuilt(e, opts, Price::flat(floor));
    let limit = cut::again_us(e, &best, opts) + SPARE * cut::products_us(e, opts);
    for times in RISE {
        let tried = cut::rebuilt(e, opts, Price::flat(times * floor));
        if cut::again_us(e, &tried, opts) > limit {
            break;
        }
        best = tried;
    }
    best
}

/// Whether an entry has a backward half.
pub fn has_halves(e: &Entry) -> bool {
    e.inputs().iter().any(|(_, name)| *name == SEED)
}

/// Bytes of what a forward result needs and the backward half reads: all of it is there when the one half ends and the other begins.
pub fn kept(g: &Graph, e: &Entry, opts: &Options) -> u64 {
    let forward = cut::forward(e, &gradients(e));
    saved(g, e, opts).iter().filter(|s| forward[s.value.index()]).map(|s| s.bytes).sum()
}

/// Which values depend on the seed.
fn gradients(e: &Entry) -> Vec<bool> {
    let mut out: Vec<bool> = Vec::with_capacity(e.nodes.len());
    for n in &e.nodes {
        let seed = matches!(&n.op, Op::Input { name, .. } if name == SEED);
        out.push(seed || n.inputs.iter().any(|i| out[i.index()]));
    }
    out
}

/// The entry with clones of the values to build again.
fn apply(params: &[Param], e: &Entry, rebuilt: &[bool]) -> Result<Entry, IrError> {
    let gradient = gradients(e);
    let order = early_sums(e, &gradient);
    let direct: Vec<bool> =
        e.nodes.iter().map(|n| matches!(n.op, Op::Param(_) | Op::Const { .. } | Op::Iota { .. })).collect();
    Clones { e, gradient: &gradient, rebuilt, direct: &direct }.apply(params, order)
}

/// What is cloned, and what clones read.
struct Clones<'a> {
    e: &'a Entry,
    gradient: &'a [bool],
    rebuilt: &'a [bool],
    /// What clones read as it is where they have other operands that wait for a gradient.
    direct: &'a [bool],
}

impl Clones<'_> {
    /// The entry with the clones, and the gradients in this order.
    fn apply(&self, params: &[Param], order: Vec<ValueId>) -> Result<Entry, IrError> {
        let Clones { e, gradient, rebuilt, direct } = *self;
        let first = first_uses(e, gradient, rebuilt, &order);
        let mut out = Entry::new(e.name.clone());
        let mut map = vec![ValueId(0); e.nodes.len()];
        let copy = |out: &mut Entry, map: &mut Vec<ValueId>, v: ValueId| -> Result<(), IrError> {
            let n = e.node(v);
            let inputs: Vec<ValueId> = n.inputs.iter().map(|i| map[i.index()]).collect();
            map[v.index()] = out.push_from(params, n.op.clone(), &inputs, n.origin.clone())?;
            Ok(())
        };
        for v in e.values().filter(|v| !gradient[v.index()]) {
            copy(&mut out, &mut map, v)?;
        }
        // clones by the gradient they are first used for
        let mut due: BTreeMap<ValueId, BTreeSet<ValueId>> = BTreeMap::new();
        for v in e.values().filter(|v| rebuilt[v.index()]) {
            if let Some(b) = first[v.index()] {
                due.entry(b).or_default().insert(v);
            }
        }
        let mut clone: BTreeMap<ValueId, ValueId> = BTreeMap::new();
        let mut held: BTreeMap<(ValueId, ValueId), ValueId> = BTreeMap::new();
        let mut place = vec![0usize; e.nodes.len()];
        order.iter().enumerate().for_each(|(i, v)| place[v.index()] = i);
        for b in order {
            if let Some(list) = due.get(&b) {
                let token = e.node(b).inputs.iter().filter(|i| gradient[i.index()]).max_by_key(|i| place[i.index()]);
                let token = token.map(|t| map[t.index()]);
                for &v in list {
                    let n = e.node(v);
                    let mut inputs = vec![];
                    let leaf = |i: &ValueId| direct[i.index()];
                    let held_anyway = n.inputs.iter().any(|i| clone.contains_key(i) || !leaf(i));
                    let parameter = |i: &ValueId| matches!(e.node(*i).op, Op::Param(_));
                    for i in &n.inputs {
                        inputs.push(match (clone.get(i), token) {
                            (Some(c), _) => *c,
                            (None, Some(token)) if !leaf(i) || !held_anyway && parameter(i) => {
                                let kept = map[i.index()];
                                match held.get(&(kept, token)) {
                                    Some(a) => *a,
                                    None => {
                                        let a = out.push_from(params, Op::After, &[kept, token], n.origin.clone())?;
                                        held.insert((kept, token), a);
                                        a
                                    }
                                }
                            }
                            _ => map[i.index()],
                        });
                    }
                    let c = out.push_from(params, n.op.clone(), &inputs, n.origin.clone())?;
                    clone.insert(v, c);
                }
            }
            let n = e.node(b);
            let inputs: Vec<ValueId> =
                n.inputs.iter().map(|i| clone.get(i).copied().unwrap_or(map[i.index()])).collect();
            map[b.index()] = out.push_from(params, n.op.clone(), &inputs, n.origin.clone())?;
        }
        out.roots = e.roots.clone();
        out.roots.iter_mut().for_each(|r| r.value = map[r.value.index()]);
        compact(params, &out)
    }
}

/// The gradients in an order in which sums over the counted dimensions (gradients of parameters), and what only they read,
/// come as soon as their own gradients are there: until then whatever is built again for them would live.
fn early_sums(e: &Entry, gradient: &[bool]) -> Vec<ValueId> {
    let users = e.users();
    let mut early = vec![false; e.nodes.len()];
    for v in e.values().rev().filter(|v| gradient[v.index()]) {
        let us = &users[v.index()];
        let sum = e.ty(v).rank() > 0 && e.ty(v).static_elements().is_some();
        early[v.index()] = sum || !us.is_empty() && us.iter().all(|u| early[u.index()]);
    }
    let mut done = vec![false; e.nodes.len()];
    let mut out = vec![];
    for v in e.values().filter(|v| gradient[v.index()]) {
        let mut stack = vec![v];
        while let Some(v) = stack.pop() {
            let ready = e.node(v).inputs.iter().all(|i| !gradient[i.index()] || done[i.index()]);
            if !ready || std::mem::replace(&mut done[v.index()], true) {
                continue;
            }
            out.push(v);
            stack.extend(users[v.index()].iter().rev().filter(|u| early[u.index()]));
        }
    }
    out
}

/// For every value to build again: the first gradient that needs its clone, directly or through other clones.
fn first_uses(e: &Entry, gradient: &[bool], rebuilt: &[bool], order: &[ValueId]) -> Vec<Option<ValueId>> {
    let mut place = vec![0usize; e.nodes.len()];
    order.iter().enumerate().for_each(|(i, v)| place[v.index()] = i);
    let mut first: Vec<Option<ValueId>> = vec![None; e.nodes.len()];
    for v in e.values().rev() {
        let at = if gradient[v.index()] { Some(v) } else { first[v.index()].filter(|_| rebuilt[v.index()]) };
        let Some(at) = at else { continue };
        for i in e.node(v).inputs.iter().filter(|i| rebuilt[i.index()]) {
            let f = &mut first[i.index()];
            *f = Some(f.filter(|x| place[x.index()] <= place[at.index()]).unwrap_or(at));
        }
    }
    first
}
