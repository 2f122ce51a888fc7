//! Movement: the index into the operand, and which operand.
//!
//! Where an index lies in a concatenation or padding is decided from ranges. Where they do not tell, the place to cut a
//! loop is noted, and the element is chosen when the kernel runs, from addresses that are always in bounds.

use super::pull::Build;
use super::reshape::reindex;
use crate::emit::expr::{Ex, Kind};
use crate::emit::index::{AtomId, ExId, Poly};
use pleach_ir::Op;

/// How an index lies to an interval.
enum Side {
    In,
    Out,
    Both,
}

impl Build {
    /// Element `index` of a node that moves elements.
    pub(super) fn moved(&mut self, n: usize, op: &Op, x: &[usize], index: &[Poly]) -> Result<ExId, String> {
        let mut to = index.to_vec();
        match op {
            Op::Reshape(_) => {
                let (from, into) = (self.model.nodes[n].shape.clone(), self.model.nodes[x[0]].shape.clone());
                to = reindex(&mut self.space, &from, &into, index);
            }
            Op::Transpose(perm) => {
                for (i, p) in perm.iter().enumerate() {
                    to[*p as usize] = index[i].clone();
                }
            }
            Op::Broadcast { axes, .. } => to = axes.iter().map(|a| index[*a as usize].clone()).collect(),
            Op::Slice { axis, start, .. } => {
                let a = *axis as usize;
                to[a] = to[a].plus(*start as i64);
            }
            Op::Pad { axis, lo, .. } => return self.padded(x[0], *axis as usize, *lo as i64, index),
            Op::Concat { axis } => return self.joined(x, *axis as usize, index),
            Op::Gather { axis } => {
                let a = *axis as usize;
                let i = self.pull(x[1], &index[a..=a])?;
                let len = self.model.nodes[x[0]].shape[a].clone();
                to[a] = self.value_index(i, &len);
            }
            _ => return Err(format!("a row kernel cannot hold {}", op.name())),
        }
        self.pull(x[0], &to)
    }

    fn known_len(&self, n: usize, axis: usize) -> Result<i64, String> {
        self.model.nodes[n].shape[axis].known().ok_or_else(|| "a joined or padded axis must be static".to_string())
    }

    /// The index into a part that begins at `start`, in bounds whatever the index is.
    fn inside_part(&mut self, p: &Poly, start: i64, len: i64, sure: bool) -> Poly {
        let p = p.plus(-start);
        if sure {
            return p;
        }
        let p = self.space.max(&p, &Poly::default());
        self.space.min(&p, &Poly::from(len - 1))
    }

    pub(crate) fn padded(&mut self, x: usize, axis: usize, lo: i64, index: &[Poly]) -> Result<ExId, String> {
        let len = self.known_len(x, axis)?;
        let kind = Kind::of(self.model.nodes[x].dtype);
        let side = if len == 0 { Side::Out } else { self.side(&index[axis], lo, lo + len) };
        if matches!(side, Side::Out) {
            return Ok(self.make(Ex::Const(kind, 0), kind));
        }
        let mut to = index.to_vec();
        to[axis] = self.inside_part(&index[axis], lo, len, matches!(side, Side::In));
        let v = self.pull(x, &to)?;
        if matches!(side, Side::In) {
            return Ok(v);
        }
        let zero = self.make(Ex::Const(kind, 0), kind);
        let c = self.make(Ex::Inside(index[axis].clone(), lo, lo + len), Kind::Bool);
        Ok(self.make(Ex::Select(c, v, zero), kind))
    }

    fn joined(&mut self, parts: &[usize], axis: usize, index: &[Poly]) -> Result<ExId, String> {
        let mut start = 0;
        let mut found: Option<ExId> = None;
        for x in parts {
            let len = self.known_len(*x, axis)?;
            let side = if len == 0 { Side::Out } else { self.side(&index[axis], start, start + len) };
            if !matches!(side, Side::Out) {
                let sure = matches!(side, Side::In);
                let mut to = index.to_vec();
                to[axis] = self.inside_part(&index[axis], start, len, sure);
                let v = self.pull(*x, &to)?;
                found = Some(match found {
                    Some(before) if !sure => {
                        let kind = self.exprs.info(v).kind;
                        let c = self.make(Ex::Inside(index[axis].clone(), start, start + len), Kind::Bool);
                        self.make(Ex::Select(c, v, before), kind)
                    }
                    _ => v,
                });
            }
            start += len;
        }
        match found {
            Some(v) => Ok(v),
            // Reached only where no element exists.
            None => {
                let kind = Kind::of(self.model.nodes[parts[0]].dtype);
                Ok(self.make(Ex::Const(kind, 0), kind))
            }
        }
    }

    /// Where an index lies; notes where a loop would have to be split to tell.
    fn side(&mut self, p: &Poly, lo: i64, hi: i64) -> Side {
        let (a, b) = self.space.range(p);
        if b.is_some_and(|b| b < lo) || a.is_some_and(|a| a >= hi) {
            return Side::Out;
        }
        if a.is_some_and(|a| a >= lo) && b.is_some_and(|b| b < hi) {
            return Side::In;
        }
        for bound in [lo, hi] {
            if a.is_none_or(|a| a < bound) && b.is_none_or(|b| b >= bound) {
                self.note_split(p, bound);
            }
        }
        Side::Both
    }

    fn note_split(&mut self, p: &Poly, bound: i64) {
        let mut best: Option<(i64, AtomId)> = None;
        for (m, c) in &p.0 {
            if let [a] = m.as_slice()
                && self.space.info(*a).split
                && *c > best.map_or(0, |b| b.0)
            {
                best = Some((*c, *a));
            }
        }
        let Some((c, a)) = best else { return };
        let (rlo, rhi) = self.space.range(&p.filter(|m| m != [a]));
        let (Some(rlo), Some(rhi)) = (rlo, rhi) else { return };
        let i = self.space.info(a);
        let (lo, hi) = (i.lo, i.hi.unwrap_or(i.lo));
        // Below the first point the index is below the bound for sure, from the second on it is not.
        for r in [rhi, rlo] {
            let at = (bound - r + c - 1).div_euclid(c);
            if lo < at && at <= hi {
                self.straddles.push((a, at));
            }
        }
    }
}
