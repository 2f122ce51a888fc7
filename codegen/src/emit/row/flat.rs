//! Kernels whose results have one axis: tasks and lanes share it, reductions run down the other axis in registers.

use super::blocks::{Copies, copies_for};
use super::nest::{Item, Nest, Src, What};
use super::plan::{Planner, Range};
use super::stmt::Stmt;
use crate::emit::expr::Buf;
use crate::emit::index::{AtomId, Mask, Poly};
use pleach_ir::Op;
use std::collections::{BTreeMap, BTreeSet};

/// Simple operations a task should take at least.
const TASK_WORK: u64 = 16 * 1024;
/// Cuts of the axis or of a reduction.
const MAX_CUTS: usize = 12;

impl Planner {
    /// Plans a kernel whose results have one axis.
    pub(super) fn plan_flat(&mut self) -> Result<(Vec<Stmt>, Option<u64>), String> {
        let block = (TASK_WORK / self.work()).div_ceil(64).clamp(1, 1024) * 64;
        self.flat_items();
        let mut lanes = vec![Range::of(&self.b.model.rows.clone())];
        let mut seqs: BTreeMap<usize, Vec<Range>> = BTreeMap::new();
        for (i, x) in self.items.iter().enumerate() {
            if let Some(s) = &x.nest.seq {
                seqs.insert(i, vec![Range::of(s)]);
            }
        }
        let mut cost = 0;
        for _ in 0..MAX_CUTS {
            let (cuts, work) = self.flat_trial(&lanes, &seqs)?;
            cost = work;
            let mut changed = false;
            for (which, at) in cuts {
                let list = match which {
                    None => Some(&mut lanes),
                    Some(i) => seqs.get_mut(&i),
                };
                let Some(list) = list.filter(|l| l.len() < MAX_CUTS) else { continue };
                if let Some(n) = list.iter().position(|r| r.lo < at && r.hi.is_some_and(|h| at < h)) {
                    let mut high = list[n].clone();
                    high.lo = at;
                    list[n].hi = Some(at);
                    list.insert(n + 1, high);
                    changed = true;
                }
            }
            if !changed {
                break;
            }
        }
        let mut body = vec![];
        for r in lanes.iter().filter(|r| !r.is_empty()) {
            let (lo, hi) = self.task_bounds(r, Some(block));
            let hi = if r.lo > 0 { self.b.space.max(&hi, &lo) } else { hi };
            body.extend(
                self.blocks(&lo, &hi, copies_for(cost), 0, &mut |p, copies, level| p.flat_block(copies, &seqs, level))?,
            );
        }
        if self.find_hazard().is_some() {
            return Err("a result overwrites an operand that is read at other elements".into());
        }
        Ok((body, Some(block)))
    }

    fn flat_items(&mut self) {
        let rows = self.b.model.rows.clone();
        let lane = Src::Lane { div: 1, rem: None };
        for r in self.b.model.reductions.clone() {
            self.b.registers.insert(r, true);
            let Op::Reduce { axis, .. } = self.b.model.nodes[r].op else { continue };
            let node = self.b.model.nodes[r].inputs[0];
            let shape = &self.b.model.nodes[node].shape;
            let mut axes = vec![lane; shape.len()];
            axes[axis as usize] = Src::Seq;
            let nest = Nest { outer: vec![], lane: Some(rows.clone()), seq: Some(shape[axis as usize].clone()) };
            let level = self.b.model.level[r] - 1;
            self.items.push(Item { what: What::Reduce(r), node, level, nest, axes });
        }
        for (i, r) in self.b.model.results.clone().into_iter().enumerate() {
            let nest = Nest { outer: vec![], lane: Some(rows.clone()), seq: None };
            let (dtype, level) = (self.b.model.nodes[r].dtype, self.b.model.level[r]);
            let what = What::Store { buf: Buf::Result(i as u32), dtype };
            self.items.push(Item { what, node: r, level, nest, axes: vec![lane] });
        }
    }

    /// Where to cut the axis (`None`) or the loop of a reduction, and the cost of one vector.
    #[allow(clippy::type_complexity, reason = "a set of named cuts")]
    fn flat_trial(
        &mut self,
        lanes: &[Range],
        seqs: &BTreeMap<usize, Vec<Range>>,
    ) -> Result<(BTreeSet<(Option<usize>, i64)>, usize), String> {
        let mut of: BTreeMap<AtomId, Option<usize>> = BTreeMap::new();
        let atom = |p: &Poly| p.0.first().and_then(|t| t.0.first()).copied();
        self.b.straddles.clear();
        self.b.mask = Mask::Full;
        let mut values = vec![];
        for l in lanes.iter().filter(|l| !l.is_empty()) {
            let lane = self.variable(l, 1, 1, true);
            of.extend(atom(&lane).map(|a| (a, None)));
            self.b.own = vec![lane.clone()];
            for i in 0..self.items.len() {
                let item = self.items[i].clone();
                let one = vec![Range { lo: 0, hi: Some(1), bound: 1.into() }];
                for s in seqs.get(&i).unwrap_or(&one).iter().filter(|s| !s.is_empty()) {
                    let seq = self.counter(s, 1, 2, true);
                    of.extend(atom(&seq).map(|a| (a, Some(i))));
                    let index = self.index(&item, &[], &lane, &seq);
                    self.b.level = item.level;
                    values.push(self.b.pull(item.node, &index)?);
                }
            }
        }
        let mut cuts = BTreeSet::new();
        for (a, at) in std::mem::take(&mut self.b.straddles) {
            if let Some(w) = of.get(&a) {
                cuts.insert((*w, at));
            }
        }
        let counters: Vec<AtomId> = of.iter().filter(|(_, w)| w.is_none()).map(|(a, _)| *a).collect();
        Ok((cuts, self.cost(&values, &counters) / lanes.len().max(1)))
    }

    /// Everything for one block of vectors: reductions level by level, then the results.
    fn flat_block(
        &mut self,
        copies: &Copies,
        seqs: &BTreeMap<usize, Vec<Range>>,
        level: u8,
    ) -> Result<Vec<Stmt>, String> {
        self.b.own = copies.iter().map(|c| c.0.clone()).collect();
        let mut out = vec![];
        let reductions: Vec<usize> =
            (0..self.items.len()).filter(|i| matches!(self.items[*i].what, What::Reduce(_))).collect();
        let top = reductions.iter().map(|i| self.items[*i].level + 1).max().unwrap_or(0);
        for pass in 0..top {
            self.b.level = pass;
            // Reductions over equal loops share one.
            let mut left: Vec<usize> = reductions.iter().copied().filter(|i| self.items[*i].level == pass).collect();
            while let Some(first) = left.first().copied() {
                let key = |i: usize| (self.items[i].nest.seq.clone(), format!("{:?}", seqs.get(&i)));
                let (now, later): (Vec<usize>, Vec<usize>) = left.iter().partition(|i| key(**i) == key(first));
                let none = vec![];
                out.extend(self.seq_block(&now, &[], copies, seqs.get(&first).unwrap_or(&none), level)?);
                left = later;
            }
        }
        let stores: Vec<usize> = (0..self.items.len()).filter(|i| !reductions.contains(i)).collect();
        self.b.level = top;
        for (u, (lane, mask)) in copies.iter().enumerate() {
            out.extend(self.step(&stores, &[], lane, *mask, &BTreeMap::new(), u, true)?);
        }
        Ok(out)
    }
}
