//! Plans a row kernel: which passes a row takes, in which order, and what stays between them.
//!
//! A pass runs over one nest of loops and computes everything that needs the same nest and the same number of earlier
//! reductions. Reductions whose result is one number for the row stay in registers; larger ones, and values that cost
//! much and are read again by a later pass, go to scratch memory. Results are read back rather than computed again.
//! A result that overwrites an operand still needed goes to scratch memory first and is copied at the end.

use super::model::{Mode, Model};
use super::nest::{Item, Nest, Src};
use super::pull::{Build, scratch_type};
use super::stmt::Stmt;
use crate::emit::expr::Kind;
use crate::emit::index::{Atom, AtomId, Info, Mask, Poly, Space};
use pleach_ir::{DType, Kernel, Op, ReduceOp, Sym};
use std::collections::BTreeSet;

/// Segments that a nest of loops may be cut into.
const MAX_SEGMENTS: usize = 24;
/// Segments that the rows may be cut into.
const MAX_ROW_SEGMENTS: usize = 12;
/// Simple operations a task should take at least.
const TASK_WORK: u64 = 16 * 1024;
/// What a symbol is taken for where costs are estimated.
const TYPICAL: u64 = 256;

/// A planned kernel.
pub(crate) struct Planned {
    pub(crate) b: Build,
    pub(crate) body: Vec<Stmt>,
    /// Elements and type of each part of the scratch memory.
    pub(crate) slots: Vec<(Poly, DType)>,
    /// Lanes of each dynamic mask.
    pub(crate) counts: Vec<Poly>,
    /// Rows (or elements, or panels) of a task; `None` for a single task.
    pub(crate) block: Option<u64>,
    pub(crate) lanes: usize,
}

/// The static or symbolic range of a loop.
#[derive(Clone, Debug)]
pub(crate) struct Range {
    pub(crate) lo: i64,
    pub(crate) hi: Option<i64>,
    pub(crate) bound: Poly,
}

impl Range {
    pub(crate) fn of(extent: &Poly) -> Range {
        Range { lo: 0, hi: extent.known(), bound: extent.clone() }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.hi.is_some_and(|h| h <= self.lo)
    }
}

/// State of planning.
pub(crate) struct Planner {
    pub(crate) b: Build,
    pub(crate) lanes: i64,
    pub(super) items: Vec<Item>,
    pub(super) counts: Vec<Poly>,
    pub(super) slots: Vec<(Poly, DType)>,
    counters: u32,
    accs: u32,
    /// Results, as far as they overwrite operands: result, operand.
    pub(super) aliases: Vec<(u32, u32)>,
    /// Results that go through scratch memory.
    pub(super) deferred: BTreeSet<u32>,
    /// Number of the pass at hand.
    pub(super) pass: u32,
    /// Reads of overwritten operands: operand, pass, at the address that the same step writes.
    pub(super) reads: BTreeSet<(u32, u32, bool)>,
    /// Writes over operands: result, pass.
    pub(super) writes: BTreeSet<(u32, u32)>,
    /// A result that has to be deferred.
    hazard: Option<u32>,
    /// The row counter, while it can be split.
    pub(super) row: Option<AtomId>,
    pub(super) row_splits: BTreeSet<i64>,
}

/// Plans a kernel for vectors of `lanes`.
pub(crate) fn plan(k: &Kernel, symbols: &[Sym], lanes: usize) -> Result<Planned, String> {
    let mut space = Space::default();
    let mut model = Model::new(k, symbols, &mut space)?;
    let mode = model.mode(k)?;
    let mut overwritten = vec![false; k.operands.len()];
    let mut aliases = vec![];
    for (i, a) in k.aliases.iter().enumerate() {
        if let Some(a) = *a {
            let seen = overwritten.get_mut(a as usize).ok_or("an alias names no operand")?;
            if std::mem::replace(seen, true) {
                return Err("two results overwrite one operand".into());
            }
            aliases.push((i as u32, a));
        }
    }
    let mut p = Planner {
        b: Build::new(model, space, mode, overwritten),
        lanes: lanes as i64,
        items: vec![],
        counts: vec![],
        slots: vec![],
        counters: 0,
        accs: 0,
        aliases,
        deferred: BTreeSet::new(),
        pass: 0,
        reads: BTreeSet::new(),
        writes: BTreeSet::new(),
        hazard: None,
        row: None,
        row_splits: BTreeSet::new(),
    };
    if mode == Mode::Flat && p.prefers_rows()? {
        p.b.mode = Mode::Rows;
    }
    let (body, block) = match p.b.mode {
        Mode::Rows | Mode::One => p.plan_rows()?,
        Mode::Flat => p.plan_flat()?,
        Mode::Panels { nr, transposed } => p.plan_panels(nr, transposed)?,
    };
    Ok(Planned { b: p.b, body, slots: p.slots, counts: p.counts, block, lanes })
}

impl Planner {
    pub(super) fn counter(&mut self, r: &Range, align: i64, level: u8, split: bool) -> Poly {
        if let Some(h) = r.hi
            && h - r.lo == 1
        {
            return r.lo.into();
        }
        self.variable(r, align, level, split)
    }

    /// A counter that is a variable even where it has one value.
    pub(super) fn variable(&mut self, r: &Range, align: i64, level: u8, split: bool) -> Poly {
        self.counters += 1;
        let info = Info {
            atom: Atom::Loop(self.counters),
            lo: r.lo,
            hi: r.hi.map(|h| h - 1),
            align,
            level,
            lane: false,
            bound: if r.lo == 0 { Some(r.bound.clone()) } else { None },
            split: split && r.hi.is_some(),
        };
        self.b.space.intern(info).into()
    }

    /// A counter for looking at addresses only.
    pub(super) fn trial_counter(&mut self, extent: &Poly) -> Poly {
        self.counter(&Range::of(extent), 1, 1, false)
    }

    pub(super) fn new_acc(&mut self) -> u32 {
        self.accs += 1;
        self.accs
    }

    pub(super) fn new_mask(&mut self, count: Poly) -> Mask {
        self.counts.push(count);
        Mask::Dynamic(self.counts.len() as u32 - 1)
    }

    pub(super) fn slot(&mut self, elements: Poly, dtype: DType) -> u32 {
        self.slots.push((elements, scratch_type(dtype)));
        self.slots.len() as u32 - 1
    }

    /// Estimated operations per row (or per element, in flat kernels).
    pub(super) fn work(&self) -> u64 {
        let size = |p: &Poly| -> u64 {
            p.0.iter().fold(0u64, |s, (m, c)| {
                s.saturating_add(TYPICAL.saturating_pow(m.len() as u32).saturating_mul(*c as u64))
            })
        };
        let m = &self.b.model;
        let all = |i: usize| size(&super::model::product(&m.nodes[i].shape));
        let mut total = 0u64;
        for i in (0..m.nodes.len()).filter(|i| m.live[*i]) {
            let over = match m.nodes[i].op {
                Op::Reduce { .. } => all(m.nodes[i].inputs[0]),
                _ => all(i),
            };
            total = total.saturating_add(over.saturating_mul(m.weight(i)));
        }
        for r in &m.results {
            total = total.saturating_add(all(*r));
        }
        (total / size(&m.rows).max(1)).max(1)
    }

    fn plan_rows(&mut self) -> Result<(Vec<Stmt>, Option<u64>), String> {
        let one = self.b.mode == Mode::One;
        let block = if one { None } else { Some((TASK_WORK / self.work()).clamp(1, 4096)) };
        let rows = Range::of(&self.b.model.rows.clone());
        if rows.is_empty() && !one {
            return Ok((vec![], block));
        }
        // Results that overwrite an operand too early are deferred, then everything is planned again.
        for _ in 0..=self.aliases.len() {
            self.reset();
            let body = self.row_range(&rows, MAX_ROW_SEGMENTS, block)?;
            let Some(r) = self.hazard.take() else { return Ok((body, block)) };
            if !self.deferred.insert(r) {
                break;
            }
        }
        Err("a result overwrites an operand that is still needed".into())
    }

    fn reset(&mut self) {
        self.items.clear();
        self.slots.clear();
        self.counts.clear();
        self.reads.clear();
        self.writes.clear();
        self.b.saved.clear();
        self.b.registers.clear();
        self.b.slot_of.clear();
        self.b.forget();
        self.hazard = None;
    }

    /// Code for a range of rows; split where that decides a choice.
    fn row_range(&mut self, r: &Range, budget: usize, block: Option<u64>) -> Result<Vec<Stmt>, String> {
        let row = self.counter(r, 1, 1, self.b.mode == Mode::Rows && budget > 1);
        let atom = row.0.first().and_then(|t| t.0.first()).copied();
        self.row = atom;
        self.row_splits.clear();
        // What counts as the row at hand is another matter now.
        self.b.own = vec![row];
        self.b.forget();
        let masks = self.counts.len();
        let body = self.row_body()?;
        if let (Some(at), Some(hi)) = (self.row_splits.first().copied(), r.hi)
            && budget > 1
        {
            self.counts.truncate(masks);
            let mut v = self.row_range(&Range { lo: r.lo, hi: Some(at), bound: r.bound.clone() }, budget / 2, block)?;
            v.extend(self.row_range(&Range { lo: at, hi: Some(hi), bound: r.bound.clone() }, budget / 2, block)?);
            return Ok(v);
        }
        self.hazard = self.hazard.or_else(|| self.find_hazard());
        let (lo, hi) = self.task_bounds(r, block);
        match atom {
            Some(var) => Ok(vec![Stmt::For { var, lo, hi, step: 1, body }]),
            // A single row.
            None => Ok(vec![Stmt::If { lo, hi, body }]),
        }
    }

    /// First and last row of the tasks at hand within a range.
    pub(super) fn task_bounds(&mut self, r: &Range, block: Option<u64>) -> (Poly, Poly) {
        let (first, last) = (self.b.space.outer(Atom::First), self.b.space.outer(Atom::Last));
        let b = block.unwrap_or(1) as i64;
        let mut lo = first.scale(b);
        let end = match r.hi {
            Some(h) => Poly::from(h),
            None => r.bound.clone(),
        };
        let hi = self.b.space.min(&last.scale(b), &end);
        if r.lo > 0 {
            lo = self.b.space.max(&lo, &r.lo.into());
        }
        (lo, hi)
    }

    fn row_body(&mut self) -> Result<Vec<Stmt>, String> {
        if self.items.is_empty() {
            self.find_items()?;
        }
        (self.pass, self.reads, self.writes) = (0, BTreeSet::new(), BTreeSet::new());
        let mut order: Vec<(u32, bool, usize)> = vec![];
        for (i, x) in self.items.iter().enumerate() {
            order.push((x.level, self.overwrites(x).is_some(), i));
        }
        order.sort_unstable();
        let mut body = vec![];
        let mut done = vec![false; self.items.len()];
        for n in 0..order.len() {
            let (level, late, i) = order[n];
            if done[i] {
                continue;
            }
            // Everything of this level over this nest shares a pass; writes over operands come last.
            let nest = self.items[i].nest.clone();
            let group: Vec<usize> = order[n..]
                .iter()
                .filter(|o| {
                    o.0 == level && self.items[o.2].nest == nest && (late || !self.must_wait(&order[n..], o, level))
                })
                .map(|o| o.2)
                .collect();
            for g in &group {
                done[*g] = true;
            }
            self.b.level = level;
            body.extend(self.group(&group, &nest)?);
            self.pass += 1;
        }
        Ok(body)
    }

    /// Whether a rank-1 kernel is better computed row by row, lanes along what is reduced.
    fn prefers_rows(&mut self) -> Result<bool, String> {
        let rows = self.b.model.rows.clone();
        for r in self.b.model.reductions.clone() {
            let Op::Reduce { axis, .. } = self.b.model.nodes[r].op else { continue };
            let axis = axis as usize;
            let shape = self.b.model.nodes[self.b.model.nodes[r].inputs[0]].shape.clone();
            if shape.len() != 2 || shape[axis].known().is_some_and(|n| n < 8) {
                continue;
            }
            let own = self.trial_counter(&rows);
            self.b.own = vec![own];
            let mut src = vec![Src::Row; 2];
            src[axis] = Src::Zero;
            self.b.registers = self.b.model.reductions.iter().map(|r| (*r, true)).collect();
            let (along, across) = self.contiguous(r, axis, 1 - axis, &src)?;
            self.b.forget();
            if along > across {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Code of one pass.
    fn group(&mut self, g: &[usize], nest: &Nest) -> Result<Vec<Stmt>, String> {
        let ranges: Vec<Range> = nest.outer.iter().map(Range::of).collect();
        let lanes = nest.lane.as_ref().map(Range::of);
        self.nest(g, ranges, lanes.into_iter().collect(), nest, MAX_SEGMENTS)
    }

    /// The operator of a reduction and the registers it needs.
    pub(super) fn reduction(&self, n: usize) -> (ReduceOp, Kind) {
        match self.b.model.nodes[n].op {
            Op::Reduce { op, .. } => (op, Kind::of(self.b.model.nodes[n].dtype)),
            _ => (ReduceOp::Sum, Kind::Float),
        }
    }
}
