//! One pass: outer loops, lanes along the innermost extent, tails.
//!
//! Loops are cut where a concatenation, slice or padding changes what is read, so that each part is straight code.
//! Lanes run in blocks of several vectors, then single vectors, then one partly filled vector; nothing is read or
//! written out of bounds.

use super::blocks::{Copies, copies_for};
use super::nest::{Item, Nest, What};
use super::plan::{Planner, Range};
use super::stmt::Stmt;
use crate::emit::expr::{Buf, Ex};
use crate::emit::index::{AtomId, Mask, Poly};
use std::collections::{BTreeMap, BTreeSet};

/// Which loop a split is for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Loop {
    Outer(usize),
    Lane,
    Seq,
}

impl Planner {
    /// A pass over these ranges; cut as often as `budget` allows.
    pub(super) fn nest(
        &mut self,
        g: &[usize],
        ranges: Vec<Range>,
        mut lanes: Vec<Range>,
        nest: &Nest,
        budget: usize,
    ) -> Result<Vec<Stmt>, String> {
        let writes_nothing = g.iter().all(|i| !matches!(self.items[*i].what, What::Reduce(_)) || nest.seq.is_some());
        if ranges.iter().any(Range::is_empty) || (writes_nothing && lanes.iter().any(Range::is_empty)) {
            return Ok(vec![]);
        }
        let mut seqs: Vec<Range> = nest.seq.iter().map(Range::of).collect();
        let mut cost = 0;
        for _ in 0..MAX_ROUNDS {
            let (splits, work) = self.trial(g, &ranges, &lanes, &seqs)?;
            cost = work;
            let outer = splits.iter().find_map(|(l, at)| if let Loop::Outer(k) = l { Some((*k, *at)) } else { None });
            if let Some((k, at)) = outer
                && budget > 1
            {
                let (mut low, mut high) = (ranges.clone(), ranges);
                low[k].hi = Some(at);
                high[k].lo = at;
                let whole: Vec<Range> = nest.lane.iter().map(Range::of).collect();
                let mut v = self.nest(g, low, whole.clone(), nest, budget / 2)?;
                v.extend(self.nest(g, high, whole, nest, budget / 2)?);
                return Ok(v);
            }
            let before = lanes.len() + seqs.len();
            for (l, at) in &splits {
                match l {
                    Loop::Lane if lanes.len() < budget => cut(&mut lanes, *at),
                    Loop::Seq if seqs.len() < budget => cut(&mut seqs, *at),
                    _ => {}
                }
            }
            if lanes.len() + seqs.len() == before {
                break;
            }
        }
        self.outer_loops(g, nest, &ranges, &lanes, &seqs, &mut vec![], cost, 1)
    }

    /// Pulls every item once for the given ranges: where loops should be cut, and what a vector costs.
    fn trial(
        &mut self,
        g: &[usize],
        ranges: &[Range],
        lanes: &[Range],
        seqs: &[Range],
    ) -> Result<(BTreeSet<(Loop, i64)>, usize), String> {
        let mut of: BTreeMap<AtomId, Loop> = BTreeMap::new();
        let mut outer = vec![];
        for (k, r) in ranges.iter().enumerate() {
            outer.push(self.named(r, Loop::Outer(k), &mut of));
        }
        self.b.straddles.clear();
        self.b.mask = Mask::Full;
        let none = [Range { lo: 0, hi: Some(1), bound: 1.into() }];
        let mut values = vec![];
        for l in if lanes.is_empty() { &none } else { lanes } {
            let lane = self.named(l, Loop::Lane, &mut of);
            for s in if seqs.is_empty() { &none } else { seqs } {
                let seq = self.named(s, Loop::Seq, &mut of);
                if l.is_empty() || s.is_empty() {
                    continue;
                }
                for i in g {
                    let item = self.items[*i].clone();
                    let index = self.index(&item, &outer, &lane, &seq);
                    values.push(self.b.pull(item.node, &index)?);
                }
            }
        }
        let mut splits = BTreeSet::new();
        for (a, at) in std::mem::take(&mut self.b.straddles) {
            if self.row == Some(a) {
                self.row_splits.insert(at);
            } else if let Some(l) = of.get(&a) {
                splits.insert((*l, at));
            }
        }
        let counters: Vec<AtomId> = of.iter().filter(|(_, l)| **l == Loop::Lane).map(|(a, _)| *a).collect();
        Ok((splits, self.cost(&values, &counters) / lanes.len().max(1)))
    }

    fn named(&mut self, r: &Range, l: Loop, of: &mut BTreeMap<AtomId, Loop>) -> Poly {
        let p = self.counter(r, 1, 2, true);
        if let Some(a) = p.0.first().and_then(|t| t.0.first()) {
            of.insert(*a, l);
        }
        p
    }

    /// The outer loops; `level` is the depth of the scope they stand in.
    #[allow(clippy::too_many_arguments, reason = "one recursion over the loops of a nest")]
    fn outer_loops(
        &mut self,
        g: &[usize],
        nest: &Nest,
        ranges: &[Range],
        lanes: &[Range],
        seqs: &[Range],
        outer: &mut Vec<Poly>,
        cost: usize,
        level: u8,
    ) -> Result<Vec<Stmt>, String> {
        let Some(r) = ranges.get(outer.len()) else {
            return self.lane_loops(g, nest, lanes, seqs, outer, cost, level);
        };
        let p = self.counter(r, 1, level + 1, false);
        let var = p.0.first().and_then(|t| t.0.first()).copied();
        outer.push(p);
        let deeper = level + u8::from(var.is_some());
        let body = self.outer_loops(g, nest, ranges, lanes, seqs, outer, cost, deeper)?;
        outer.pop();
        Ok(match var {
            Some(var) => {
                let hi = r.hi.map_or_else(|| r.bound.clone(), Poly::from);
                vec![Stmt::For { var, lo: r.lo.into(), hi, step: 1, body }]
            }
            None => body,
        })
    }

    #[allow(clippy::too_many_arguments, reason = "the innermost step of the recursion")]
    fn lane_loops(
        &mut self,
        g: &[usize],
        nest: &Nest,
        lanes: &[Range],
        seqs: &[Range],
        outer: &[Poly],
        cost: usize,
        level: u8,
    ) -> Result<Vec<Stmt>, String> {
        if nest.lane.is_none() {
            return self.step(g, outer, &Poly::default(), Mask::Full, &BTreeMap::new(), 0, false);
        }
        let copies = copies_for(cost);
        if nest.seq.is_some() {
            let mut out = vec![];
            for l in lanes {
                let (lo, hi) = bounds(l);
                out.extend(self.blocks(&lo, &hi, copies, level, &mut |p, c, lv| p.seq_block(g, outer, c, seqs, lv))?);
            }
            return Ok(out);
        }
        // Lanes along the reduced axis: accumulators live across all segments.
        let mut out = vec![];
        let mut accs: BTreeMap<usize, Vec<u32>> = BTreeMap::new();
        for i in g {
            if let What::Reduce(n) = self.items[*i].what {
                let (op, kind) = self.reduction(n);
                let v: Vec<u32> = (0..copies).map(|_| self.new_acc()).collect();
                out.extend(v.iter().map(|acc| Stmt::Init { acc: *acc, op, kind }));
                accs.insert(*i, v);
            }
        }
        for l in lanes.iter().filter(|l| !l.is_empty()) {
            let (lo, hi) = bounds(l);
            out.extend(self.blocks(&lo, &hi, copies, level, &mut |p, c, _| {
                let mut v = vec![];
                for (u, (lane, mask)) in c.iter().enumerate() {
                    v.extend(p.step(g, outer, lane, *mask, &accs, u, true)?);
                }
                Ok(v)
            })?);
        }
        for (i, v) in accs {
            let What::Reduce(n) = self.items[i].what else { continue };
            let item = self.items[i].clone();
            out.extend(self.finish(&item, n, v, outer, &Poly::default(), Mask::Full, true));
        }
        Ok(out)
    }

    /// Combines accumulators and leaves the reduction where later passes find it.
    #[allow(clippy::too_many_arguments, reason = "names what is finished, where")]
    pub(super) fn finish(
        &mut self,
        item: &Item,
        n: usize,
        accs: Vec<u32>,
        outer: &[Poly],
        lane: &Poly,
        mask: Mask,
        across: bool,
    ) -> Vec<Stmt> {
        let (op, kind) = self.reduction(n);
        let full = self.index(item, outer, lane, &Poly::default());
        let index: Vec<Poly> = self.kept_index(n, full);
        let register = self.b.registers.get(&n).copied().unwrap_or(false);
        let flat = self.b.mode == super::model::Mode::Flat;
        let at = if register && !flat { vec![] } else { index.clone() };
        self.b.exprs.node = n as u32;
        let into = self.b.exprs.intern(&self.b.space, Ex::Reduced(n as u32, at), kind, 1);
        let mut out = vec![Stmt::Finish { accs, op, kind, across, into }];
        if let Some(slot) = self.b.slot_of.get(&n).copied().filter(|_| !register) {
            let shape = self.b.within(&self.b.model.nodes[n].shape).to_vec();
            let index = self.b.within(&index).to_vec();
            let addr = self.b.linear(&shape, &index);
            let dtype = self.b.model.nodes[n].dtype;
            out.push(Stmt::Store { buf: Buf::Scratch(slot), addr, value: into, dtype, mask, vector: !across });
        }
        out.push(Stmt::Fence);
        out
    }

    /// The index of a reduction's result from that of its input.
    fn kept_index(&self, n: usize, mut input: Vec<Poly>) -> Vec<Poly> {
        if let pleach_ir::Op::Reduce { axis, .. } = self.b.model.nodes[n].op {
            input.remove(axis as usize);
        }
        input
    }

    /// One vector (or scalar) of every item of a pass.
    #[allow(clippy::too_many_arguments, reason = "names one step of a pass")]
    pub(super) fn step(
        &mut self,
        g: &[usize],
        outer: &[Poly],
        lane: &Poly,
        mask: Mask,
        accs: &BTreeMap<usize, Vec<u32>>,
        u: usize,
        vector: bool,
    ) -> Result<Vec<Stmt>, String> {
        self.b.mask = mask;
        let (mut out, mut values, mut stores) = (vec![], vec![], vec![]);
        for i in g {
            let item = self.items[*i].clone();
            let index = self.index(&item, outer, lane, &Poly::default());
            let value = self.b.pull(item.node, &index)?;
            values.push(value);
            match item.what {
                What::Store { buf, dtype } => {
                    let shape = self.b.model.nodes[item.node].shape.clone();
                    let addr = match buf {
                        Buf::Scratch(_) => {
                            let (s, x) = (self.b.within(&shape).to_vec(), self.b.within(&index).to_vec());
                            self.b.linear(&s, &x)
                        }
                        _ => self.b.linear(&shape, &index),
                    };
                    if let (Some(o), Buf::Result(r)) = (self.overwrites(&item), buf) {
                        stores.push((r, o, addr.clone()));
                    }
                    out.push(Stmt::Store { buf, addr, value, dtype, mask, vector });
                }
                What::Reduce(n) => {
                    let (op, kind) = self.reduction(n);
                    if let Some(v) = accs.get(i) {
                        out.push(Stmt::Update { acc: v[u % v.len()], op, kind, value, mask });
                    }
                }
            }
        }
        self.trace(&values, &stores);
        out.push(Stmt::Fence);
        Ok(out)
    }

    /// Reductions along a sequential loop, for a block of vectors.
    pub(super) fn seq_block(
        &mut self,
        g: &[usize],
        outer: &[Poly],
        copies: &Copies,
        seqs: &[Range],
        level: u8,
    ) -> Result<Vec<Stmt>, String> {
        let mut out = vec![];
        let mut accs: BTreeMap<(usize, usize), u32> = BTreeMap::new();
        for i in g {
            let What::Reduce(n) = self.items[*i].what else { continue };
            let (op, kind) = self.reduction(n);
            for u in 0..copies.len() {
                let acc = self.new_acc();
                out.push(Stmt::Init { acc, op, kind });
                accs.insert((*i, u), acc);
            }
        }
        for s in seqs.iter().filter(|s| !s.is_empty()) {
            let seq = self.counter(s, 1, level + 1, false);
            let (mut body, mut values) = (vec![], vec![]);
            for (u, (lane, mask)) in copies.iter().enumerate() {
                self.b.mask = *mask;
                for i in g {
                    let What::Reduce(n) = self.items[*i].what else { continue };
                    let item = self.items[*i].clone();
                    let index = self.index(&item, outer, lane, &seq);
                    let value = self.b.pull(item.node, &index)?;
                    values.push(value);
                    let (op, kind) = self.reduction(n);
                    // Lanes that are off may hold anything: they are not stored.
                    body.push(Stmt::Update { acc: accs[&(*i, u)], op, kind, value, mask: Mask::Full });
                }
                body.push(Stmt::Fence);
            }
            self.trace(&values, &[]);
            match seq.0.first().and_then(|t| t.0.first()).copied() {
                Some(var) => {
                    let (lo, hi) = bounds(s);
                    out.push(Stmt::For { var, lo, hi, step: 1, body });
                }
                None => out.extend(body),
            }
        }
        for ((i, u), acc) in accs {
            let What::Reduce(n) = self.items[i].what else { continue };
            let item = self.items[i].clone();
            let (lane, mask) = &copies[u];
            out.extend(self.finish(&item, n, vec![acc], outer, lane, *mask, false));
        }
        Ok(out)
    }
}

/// How often trial and cut are repeated.
const MAX_ROUNDS: usize = 12;

pub(super) fn bounds(r: &Range) -> (Poly, Poly) {
    (r.lo.into(), r.hi.map_or_else(|| r.bound.clone(), Poly::from))
}

fn cut(v: &mut Vec<Range>, at: i64) {
    if let Some(i) = v.iter().position(|r| r.lo < at && r.hi.is_some_and(|h| at < h)) {
        let mut high = v[i].clone();
        high.lo = at;
        v[i].hi = Some(at);
        v.insert(i + 1, high);
    }
}
