//! Packing: a matrix stored panel by panel, as right operands of products are read.
//!
//! Panel `p` holds columns `p*nr..` for all `k`, `[K][nr]`, zeros where the matrix ends. A tensor `[K, N]` is copied row
//! by row; `[N, K]` is transposed in registers, one square of as many lanes as a vector has at a time. 16-bit elements
//! lie in pairs along `k`: the same, with pairs for elements.

use super::lanes::bounds;
use super::plan::{Planner, Range};
use super::stmt::Stmt;
use crate::emit::expr::{Buf, Ex, Kind};
use crate::emit::index::{AtomId, ExId, Mask, Poly};
use std::collections::BTreeMap;

/// Elements a task should move at least.
const TASK_ELEMENTS: i64 = 16 * 1024;
/// Cuts of one loop.
const MAX_CUTS: usize = 16;

/// How panels are written.
#[derive(Clone, Copy)]
struct Form {
    /// Columns of a panel.
    nr: i64,
    /// Squares are transposed in registers.
    transposed: bool,
    /// 16-bit elements lie in pairs along `k`.
    pairs: bool,
    /// Contracted extent.
    k: i64,
}

/// The loops of a panel.
#[derive(Clone)]
struct Loops {
    /// Panels.
    rows: Range,
    /// `k` (or pairs of it) for row-major sources, blocks of columns for transposed ones.
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
        let fixed = |lo: i64, n: i64| Range { lo, hi: Some(n), bound: n.into() };
        let form = Form { nr, transposed, pairs: self.b.model.nodes[self.b.model.results[0]].dtype.size() == 2, k };
        // Rows of memory: `k`, or pairs of them.
        let steps = if form.pairs { (k + 1) / 2 } else { k };
        let loops = |outer: Range, lanes: Range| Loops { rows: panels.clone(), outer: vec![outer], lanes: vec![lanes] };
        // The last pair of an odd `k` is half empty.
        let by_column = |lo: i64| {
            let mut l = loops(fixed(lo, steps), fixed(0, nr));
            if form.pairs && k % 2 == 1 {
                l.outer = vec![fixed(lo, steps - 1), fixed(steps - 1, steps)];
            }
            l
        };
        if !transposed {
            return Ok((self.panel_range(by_column(0), form, block, MAX_CUTS)?, Some(block)));
        }
        // Squares of pairs are whole; what remains goes column by column.
        let squares = if form.pairs { k / 2 / self.lanes * self.lanes } else { k };
        let mut body = vec![];
        if squares > 0 {
            body = self.panel_range(loops(fixed(0, nr / self.lanes), fixed(0, squares)), form, block, MAX_CUTS)?;
        }
        if squares < steps {
            let rest = Form { transposed: false, ..form };
            body.extend(self.panel_range(by_column(squares), rest, block, MAX_CUTS)?);
        }
        Ok((body, Some(block)))
    }

    fn panel_range(&mut self, mut l: Loops, form: Form, block: u64, budget: usize) -> Result<Vec<Stmt>, String> {
        for _ in 0..MAX_CUTS {
            let cuts = self.panel_trial(&l, form)?;
            if let Some(at) = cuts.iter().find_map(|(w, at)| (*w == 0).then_some(*at))
                && budget > 1
            {
                let (mut low, mut high) = (l.clone(), l);
                low.rows.hi = Some(at);
                high.rows.lo = at;
                let mut v = self.panel_range(low, form, block, budget / 2)?;
                v.extend(self.panel_range(high, form, block, budget / 2)?);
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
                let copies = if form.transposed || form.pairs { 1 } else { 4 };
                inner.extend(self.blocks(&lo, &hi, copies, level, &mut |s, c, _| {
                    let mut v = vec![];
                    for (lane, mask) in c {
                        v.extend(s.panel_step(&row, &p, lane, *mask, form)?);
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
    fn panel_trial(&mut self, l: &Loops, form: Form) -> Result<Vec<(u8, i64)>, String> {
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
                self.panel_values(&row, &p, &j, form)?;
            }
        }
        let mut cuts: Vec<(u8, i64)> =
            std::mem::take(&mut self.b.straddles).into_iter().filter_map(|(a, at)| Some((*of.get(&a)?, at))).collect();
        cuts.sort_unstable();
        cuts.dedup();
        Ok(cuts)
    }

    /// The element of panel `row` at these `k` and column; zero outside of the matrix.
    fn panel_element(&mut self, row: &Poly, k: &Poly, column: &Poly, form: Form) -> Result<ExId, String> {
        let n = self.b.model.results[0];
        if k.known().is_some_and(|k| k >= form.k) {
            return Ok(self.b.make(Ex::Const(Kind::Float, 0), Kind::Float));
        }
        let column = row.scale(form.nr).add(column);
        let of_tensor = |k: Poly, c: Poly| if self.b.panels_transposed() { [c, k] } else { [k, c] };
        let index = of_tensor(k.clone(), column);
        self.b.padded(n, usize::from(!self.b.panels_transposed()), 0, &index)
    }

    /// The vectors of one step: one, a pair, or a square to transpose.
    fn panel_values(&mut self, row: &Poly, outer: &Poly, lane: &Poly, form: Form) -> Result<Vec<ExId>, String> {
        if !form.transposed {
            if !form.pairs {
                return Ok(vec![self.panel_element(row, outer, lane, form)?]);
            }
            let first = outer.scale(2);
            return [first.clone(), first.plus(1)].iter().map(|k| self.panel_element(row, k, lane, form)).collect();
        }
        let column = outer.scale(self.lanes);
        let mut parts = vec![lane.clone()];
        if form.pairs {
            // A row of pairs takes two vectors.
            let base = lane.filter(|m| !m.iter().any(|a| self.b.space.info(*a).lane));
            let low = lane.add(&base);
            parts = vec![low.clone(), low.plus(self.lanes)];
        }
        let mut v = vec![];
        for i in 0..self.lanes {
            for k in &parts {
                v.push(self.panel_element(row, k, &column.plus(i), form)?);
            }
        }
        Ok(v)
    }

    fn panel_step(
        &mut self,
        row: &Poly,
        outer: &Poly,
        lane: &Poly,
        mask: Mask,
        form: Form,
    ) -> Result<Vec<Stmt>, String> {
        self.b.mask = mask;
        let dtype = self.b.model.nodes[self.b.model.results[0]].dtype;
        let values = self.panel_values(row, outer, lane, form)?;
        let buf = Buf::Result(0);
        // Elements of one step of memory, and of a panel.
        let (step, steps) = if form.pairs { (2 * form.nr, (form.k + 1) / 2) } else { (form.nr, form.k) };
        let panel = row.scale(step * steps);
        if !form.transposed {
            let addr = panel.add(&outer.scale(step));
            let store = match values[..] {
                [lo, hi] => Stmt::Pair { lo, hi, buf, addr: addr.add(&lane.scale(2)), dtype, mask },
                _ => Stmt::Store { buf, addr: addr.add(lane), value: values[0], dtype, mask, vector: true },
            };
            return Ok(vec![store, Stmt::Fence]);
        }
        let base = lane.filter(|m| !m.iter().any(|a| self.b.space.info(*a).lane));
        let column = outer.scale(self.lanes * if form.pairs { 2 } else { 1 });
        let addr = panel.add(&base.scale(step)).add(&column);
        let count = match mask {
            Mask::First(n) => i64::from(n),
            _ => self.lanes,
        };
        Ok(vec![Stmt::Tile { values, buf, addr, stride: step, count, dtype }, Stmt::Fence])
    }
}

fn first_atom(p: &Poly) -> Option<AtomId> {
    p.0.first().and_then(|t| t.0.first()).copied()
}
