//! Lanes along an extent: blocks of several vectors, single vectors, and a last partly filled one.

use super::plan::{Planner, Range};
use super::stmt::Stmt;
use crate::emit::expr::Ex;
use crate::emit::index::{Atom, AtomId, ExId, Info, Mask, Poly};

/// A block of vectors: where each begins, and its lanes in use.
pub(super) type Copies = [(Poly, Mask)];

/// Plans one block; the last argument is the depth of the scope it stands in.
pub(super) type Step<'a> = &'a mut dyn FnMut(&mut Planner, &Copies, u8) -> Result<Vec<Stmt>, String>;

impl Planner {
    /// The lane number under a mask, changing at this depth.
    fn lane(&mut self, mask: Mask, level: u8) -> Poly {
        let (hi, level) = match mask {
            Mask::First(n) => (i64::from(n) - 1, 0),
            Mask::Full => (self.lanes - 1, 0),
            Mask::Dynamic(_) => (self.lanes - 1, level),
        };
        let atom = Atom::Lane(mask);
        let info = Info { atom, lo: 0, hi: Some(hi), align: 1, level, lane: true, bound: None, split: false };
        self.b.space.intern(info).into()
    }

    /// Runs `step` over blocks of `copies` vectors, single vectors and a last partly filled one.
    pub(super) fn blocks(
        &mut self,
        lo: &Poly,
        hi: &Poly,
        copies: usize,
        level: u8,
        step: Step<'_>,
    ) -> Result<Vec<Stmt>, String> {
        let (w, full) = (self.lanes, self.lane(Mask::Full, level));
        let wide = w * copies as i64;
        let mut out = vec![];
        let (Some(a), Some(b)) = (lo.known(), hi.known()) else {
            return self.dynamic_blocks(lo, hi, copies, level, step);
        };
        let vectors = (b - a) / w;
        let mut at = a;
        if vectors > 4.max(copies as i64) {
            let end = a + vectors / copies as i64 * wide;
            let r = Range { lo: a, hi: Some(end), bound: end.into() };
            let iv = self.stepped(&r, a, wide, level + 1);
            let list: Vec<(Poly, Mask)> = (0..copies as i64).map(|u| (iv.plus(u * w).add(&full), Mask::Full)).collect();
            let body = step(self, &list, level + 1)?;
            out.push(Stmt::For { var: iv.0[0].0[0], lo: a.into(), hi: end.into(), step: wide, body });
            at = end;
        }
        while at + w <= b {
            let n = ((b - at) / w).min(copies as i64);
            let list: Vec<(Poly, Mask)> = (0..n).map(|u| (full.plus(at + u * w), Mask::Full)).collect();
            out.extend(step(self, &list, level)?);
            at += n * w;
        }
        if at < b {
            let mask = Mask::First((b - at) as u8);
            let lane = self.lane(mask, level).plus(at);
            out.extend(step(self, &[(lane, mask)], level)?);
        }
        Ok(out)
    }

    fn stepped(&mut self, r: &Range, start: i64, step: i64, level: u8) -> Poly {
        let p = self.counter(&Range { lo: r.lo, hi: None, bound: r.bound.clone() }, gcd(start, step), level, false);
        if let (Some(hi), Some(a)) = (r.hi, p.0.first().and_then(|t| t.0.first()).copied()) {
            self.b.space.limit(a, hi - step);
        }
        p
    }

    fn dynamic_blocks(
        &mut self,
        lo: &Poly,
        hi: &Poly,
        copies: usize,
        level: u8,
        step: Step<'_>,
    ) -> Result<Vec<Stmt>, String> {
        let w = self.lanes;
        let full = self.lane(Mask::Full, level);
        let start = self.b.space.align(lo);
        let mut out = vec![];
        let span = self.b.space.max(&hi.sub(lo), &Poly::default());
        let mut at = lo.clone();
        let limit = self.b.space.range(hi).1;
        let mut sizes = vec![copies as i64, 1];
        sizes.dedup();
        for n in sizes {
            let (blocks, _) = self.b.space.divide(&span, &Poly::from(n * w));
            let end = lo.add(&blocks.scale(n * w));
            let from = self.b.space.range(&at).0.unwrap_or(0).max(0);
            let r = Range { lo: from, hi: limit, bound: end.clone() };
            let iv = self.stepped(&r, start, n * w, level + 1);
            let list: Vec<(Poly, Mask)> = (0..n).map(|u| (iv.plus(u * w).add(&full), Mask::Full)).collect();
            let body = step(self, &list, level + 1)?;
            out.push(Stmt::For { var: iv.0[0].0[0], lo: at, hi: end.clone(), step: n * w, body });
            at = end;
        }
        let mask = self.new_mask(hi.sub(&at));
        let lane = self.lane(mask, level + 1).add(&at);
        let mut body = vec![];
        if let Mask::Dynamic(id) = mask {
            body.push(Stmt::Mask { id, count: hi.sub(&at) });
        }
        body.extend(step(self, &[(lane, mask)], level + 1)?);
        out.push(Stmt::If { lo: at, hi: hi.clone(), body });
        Ok(out)
    }

    /// Instructions that all of these values take, where lanes run along `counters`.
    pub(super) fn cost(&self, values: &[ExId], counters: &[AtomId]) -> usize {
        let all = self.b.exprs.reach(&self.b.space, values.iter().copied(), &[]);
        // A load whose neighbouring lanes are no neighbours in memory takes one instruction or two per lane.
        let plain = |m: &[AtomId], c: i64| c == 1 && matches!(m, [a] if counters.contains(a));
        let scattered = |ex: &Ex| match ex {
            Ex::Load { addr, .. } => {
                addr.0.iter().any(|(m, c)| m.iter().any(|a| self.depends(*a, counters)) && !plain(m, *c))
            }
            _ => false,
        };
        let lanes = self.lanes as usize;
        all.iter()
            .map(|e| {
                let ex = &self.b.exprs.info(*e).ex;
                if scattered(ex) { 2 * lanes } else { weight(ex) }
            })
            .sum()
    }

    /// Whether an atom is one of these counters or computed from them.
    fn depends(&self, a: AtomId, counters: &[AtomId]) -> bool {
        let below = |p: &Poly| p.0.iter().flat_map(|t| &t.0).any(|a| self.depends(*a, counters));
        match &self.b.space.info(a).atom {
            Atom::Div(x, y) | Atom::Rem(x, y) | Atom::Min(x, y) | Atom::Max(x, y) => below(x) || below(y),
            _ => counters.contains(&a),
        }
    }
}

fn gcd(a: i64, b: i64) -> i64 {
    if b == 0 { a.abs() } else { gcd(b, a % b) }
}

/// Vectors per block: enough chains to hide latency, not so many that registers run out.
pub(super) fn copies_for(cost: usize) -> usize {
    match cost {
        0..=16 => 4,
        17..=64 => 2,
        _ => 1,
    }
}

/// Rough number of instructions.
fn weight(e: &Ex) -> usize {
    use pleach_ir::UnaryOp::{Cos, Erf, Exp, Log, Sigmoid, Sin, Tanh};
    match e {
        Ex::Const(..) => 0,
        Ex::Unary(Exp | Sigmoid, _) => 16,
        Ex::Unary(Log | Tanh | Erf, _) => 28,
        Ex::Unary(Sin | Cos, _) => 100,
        Ex::Add(v) => v.len() - 1,
        _ => 1,
    }
}
