//! Packing: a matrix stored panel by panel, as right operands of products are read.
//!
//! Panel `p` holds columns `p*nr..` for all `k`, `[K][nr]`, zeros where the matrix ends. A tensor `[K, N]` is copied row
//! by row; `[N, K]` is transposed in registers, one square of as many lanes as a vector has at a time.

use super::lanes::bounds;
use super::plan::{Planner, Range};
use super::stmt::Stmt;
use crate::emit::expr::Buf;
use crate::emit::index::{AtomId, ExId, Mask, Poly};
use std::collections::BTreeMap;

/// Elements a task should move at least.
const TASK_ELEMENTS: i64 = 16 * 1024;
/// Cuts of one loop.
const MAX_CUTS: usize = 16;

/// The loops of a panel.
#[derive(Clone)]
struct Loops {
    /// Panels.
    rows: Range,
    /// `k` for row-major sources, blocks of columns for transposed ones.
    outer: Vec<Range>,
    /// Columns of the panel for row-major sources, `k` for transposed ones.
    lanes: Vec<Range>,
}

impl Planner {
    /// Plans a kernel that stores its result as panels.
    pub(super) fn plan_panels(&mut self, nr: i64, transposed: bool) -> Result<(Vec<Stmt>, Option<u64>), String> {
        let shape = self.b.model.nodes[self.b.model.results[0]].shape.clone();
        let k = shape[usize::from(transposed)].known().unwrap_or(0);
        let block = (TASK_ELEMENTS / (k * nr).max(1)).clamp(1, 1024) as u64;
        let panels = Range::of(&self.b.model.rows.clone());
        if panels.is_empty() || k == 0 {
            return Ok((vec![], Some(block)));
        }
        let fixed = |n: i64| Range { lo: 0, hi: Some(n), bound: n.into() };
        let (outer, lanes) = if transposed { (nr / self.lanes, k) } else { (k, nr) };
        let loops = Loops { rows: panels, outer: vec![fixed(outer)], lanes: vec![fixed(lanes)] };
        Ok((self.panel_range(loops, nr, transposed, block, MAX_CUTS)?, Some(block)))
    }

    fn panel_range(
        &mut self,
        mut l: Loops,
        nr: i64,
        transposed: bool,
        block: u64,
        budget: usize,
    ) -> Result<Vec<Stmt>, String> {
        for _ in 0..MAX_CUTS {
            let cuts = self.panel_trial(&l, nr, transposed)?;
            if let Some(at) = cuts.iter().find_map(|(w, at)| (*w == 0).then_some(*at))
                && budget > 1
            {
                let (mut low, mut high) = (l.clone(), l);
                low.rows.hi = Some(at);
                high.rows.lo = at;
                let mut v = self.panel_range(low, nr, transposed, block, budget / 2)?;
                v.extend(self.panel_range(high, nr, transposed, block, budget / 2)?);
                return Ok(v);
            }
            let mut changed = false;
            for (w, at) in cuts {
                let list = if w == 1 { &mut l.outer } else { &mut l.lanes };
                let hit = list.iter().position(|r| r.lo < at && r.hi.is_some_and(|h| at < h));
                if let Some(i) = hit.filter(|_| w > 0 && list.len() < MAX_CUTS) {
                    let mut high = list[i].clone();
                    high.lo = at;
                    list[i].hi = Some(at);
                    list.insert(i + 1, high);
                    changed = true;
                }
            }
            if !changed {
                break;
            }
        }
        let row = self.counter(&l.rows, 1, 1, false);
        let mut body = vec![];
        for o in &l.outer {
            let p = self.counter(o, 1, 2, false);
            let var = first_atom(&p);
            let level = if var.is_some() { 2 } else { 1 };
            let mut inner = vec![];
            for lane in &l.lanes {
                let (lo, hi) = bounds(lane);
                let copies = if transposed { 1 } else { 4 };
                inner.extend(self.blocks(&lo, &hi, copies, level, &mut |s, c, _| {
                    let mut v = vec![];
                    for (lane, mask) in c {
                        v.extend(s.panel_step(&row, &p, lane, *mask, nr, transposed)?);
                    }
                    Ok(v)
                })?);
            }
            match var {
                Some(var) => {
                    let (lo, hi) = bounds(o);
                    body.push(Stmt::For { var, lo, hi, step: 1, body: inner });
                }
                None => body.extend(inner),
            }
        }
        let (lo, hi) = self.task_bounds(&l.rows, Some(block));
        Ok(vec![match first_atom(&row) {
            Some(var) => Stmt::For { var, lo, hi, step: 1, body },
            None => Stmt::If { lo, hi, body },
        }])
    }

    /// Cuts: loop (0 panels, 1 outer, 2 lanes), where.
    fn panel_trial(&mut self, l: &Loops, nr: i64, transposed: bool) -> Result<Vec<(u8, i64)>, String> {
        let mut of: BTreeMap<AtomId, u8> = BTreeMap::new();
        self.b.straddles.clear();
        self.b.mask = Mask::Full;
        let row = self.counter(&l.rows, 1, 1, true);
        of.extend(first_atom(&row).map(|a| (a, 0)));
        for o in &l.outer {
            let p = self.counter(o, 1, 2, true);
            of.extend(first_atom(&p).map(|a| (a, 1)));
            for lane in &l.lanes {
                let j = self.counter(lane, 1, 3, true);
                of.extend(first_atom(&j).map(|a| (a, 2)));
                self.panel_values(&row, &p, &j, nr, transposed)?;
            }
        }
        let mut cuts: Vec<(u8, i64)> =
            std::mem::take(&mut self.b.straddles).into_iter().filter_map(|(a, at)| Some((*of.get(&a)?, at))).collect();
        cuts.sort_unstable();
        cuts.dedup();
        Ok(cuts)
    }

    /// The vectors of one step: one, or a square to transpose.
    fn panel_values(
        &mut self,
        row: &Poly,
        outer: &Poly,
        lane: &Poly,
        nr: i64,
        transposed: bool,
    ) -> Result<Vec<ExId>, String> {
        let n = self.b.model.results[0];
        if !transposed {
            let index = [outer.clone(), row.scale(nr).add(lane)];
            return Ok(vec![self.b.padded(n, 1, 0, &index)?]);
        }
        let first = row.scale(nr).add(&outer.scale(self.lanes));
        (0..self.lanes).map(|i| self.b.padded(n, 0, 0, &[first.plus(i), lane.clone()])).collect()
    }

    fn panel_step(
        &mut self,
        row: &Poly,
        outer: &Poly,
        lane: &Poly,
        mask: Mask,
        nr: i64,
        transposed: bool,
    ) -> Result<Vec<Stmt>, String> {
        self.b.mask = mask;
        let node = &self.b.model.nodes[self.b.model.results[0]];
        let (dtype, k) = (node.dtype, node.shape[usize::from(transposed)].clone());
        let values = self.panel_values(row, outer, lane, nr, transposed)?;
        let buf = Buf::Result(0);
        let panel = row.mul(&k).scale(nr);
        if !transposed {
            let addr = panel.add(&outer.scale(nr)).add(lane);
            return Ok(vec![Stmt::Store { buf, addr, value: values[0], dtype, mask, vector: true }, Stmt::Fence]);
        }
        let base = lane.filter(|m| !m.iter().any(|a| self.b.space.info(*a).lane));
        let addr = panel.add(&base.scale(nr)).add(&outer.scale(self.lanes));
        let count = match mask {
            Mask::First(n) => i64::from(n),
            _ => self.lanes,
        };
        Ok(vec![Stmt::Tile { values, buf, addr, stride: nr, count, dtype }, Stmt::Fence])
    }
}

fn first_atom(p: &Poly) -> Option<AtomId> {
    p.0.first().and_then(|t| t.0.first()).copied()
}
