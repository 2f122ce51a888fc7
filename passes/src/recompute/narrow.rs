//! Narrow places of the forward half: where little crosses from what was computed to what is still to come.
//!
//! Building values again saves memory only if the backward half can do it piece by piece. A minimum cut does not see that:
//! where every value is dear to keep it builds all of them again from the inputs, and then all of them live at once.
//! So the forward half is cut into parts at *stops*; what crosses a stop is kept, and each part is built again from that.
//!
//! A narrow place is a valley of the live bytes: on either side they reach twice as many before they fall below. In a chain
//! of layers those are the places where one tensor carries everything, the residual stream. Nothing here knows layers.

use super::{cut, saved};
use crate::options::Options;
use pleach_ir::{Entry, RootKind, ValueId};

/// Live bytes on either side of a narrow place are at least this many times those at it.
const RISE: u64 = 2;

/// The forward half in the order of a chain: what a result needs, operands first and depth first.
pub(super) struct Forward {
    /// Per value: its place, and the last place where it is read.
    span: Vec<Option<(usize, usize)>>,
    /// Bytes live after each place.
    live: Vec<u64>,
}

impl Forward {
    /// `forward` tells which values belong to the forward half and are needed by a result of it.
    pub(super) fn new(e: &Entry, forward: &[bool], opts: &Options) -> Forward {
        let order = depth_first(e, forward);
        let tokens = opts.tokens(&e.name);
        let mut span: Vec<Option<(usize, usize)>> = vec![None; e.nodes.len()];
        for (at, v) in order.iter().enumerate() {
            if saved::base(e, *v) == *v && !e.node(*v).op.is_leaf() {
                span[v.index()] = Some((at, at));
            }
            for i in &e.node(*v).inputs {
                if let Some(s) = &mut span[saved::base(e, *i).index()] {
                    s.1 = at;
                }
            }
        }
        let mut change = vec![0i128; order.len() + 1];
        for (v, s) in span.iter().enumerate() {
            if let Some((first, last)) = s {
                let bytes = i128::from(cut::bytes(e.ty(ValueId(v as u32)), tokens));
                change[*first] += bytes;
                change[*last] -= bytes;
            }
        }
        let mut sum = 0i128;
        let live = change[..order.len()]
            .iter()
            .map(|c| {
                sum += c;
                sum as u64
            })
            .collect();
        Forward { span, live }
    }

    /// The narrow places in order.
    fn valleys(&self) -> Vec<usize> {
        let mut out = vec![];
        let (mut high, mut low): (u64, Option<(u64, usize)>) = (0, None);
        for (at, bytes) in self.live.iter().copied().enumerate() {
            match low {
                None if bytes.saturating_mul(RISE) <= high => low = Some((bytes, at)),
                None => high = high.max(bytes),
                Some((least, _)) if bytes <= least => low = Some((bytes, at)),
                Some((least, place)) if bytes >= least.saturating_mul(RISE) => {
                    out.push(place);
                    (high, low) = (bytes, None);
                }
                Some(_) => {}
            }
        }
        out
    }

    /// Which values cross a stop, when every `every`-th narrow place is one, counted from the last. `every` 0: none.
    pub(super) fn crossing(&self, every: usize) -> Vec<bool> {
        let mut out = vec![false; self.span.len()];
        if every == 0 {
            return out;
        }
        let stops: Vec<usize> = self.valleys().into_iter().rev().step_by(every).collect();
        for (v, s) in self.span.iter().enumerate() {
            out[v] = s.is_some_and(|(first, last)| stops.iter().any(|at| first <= *at && *at < last));
        }
        out
    }
}

/// The values marked that an output is made of, operands before their readers: those of the first operand first.
fn depth_first(e: &Entry, marked: &[bool]) -> Vec<ValueId> {
    let mut seen = vec![false; e.nodes.len()];
    let mut out = vec![];
    for root in e.roots.iter().filter(|r| matches!(r.kind, RootKind::Output(_))) {
        let mut stack = vec![(root.value, false)];
        while let Some((v, done)) = stack.pop() {
            if done {
                out.extend(marked[v.index()].then_some(v));
            } else if !std::mem::replace(&mut seen[v.index()], true) {
                stack.push((v, true));
                stack.extend(e.node(v).inputs.iter().rev().map(|i| (*i, false)));
            }
        }
    }
    out
}
