//! What the passes of a row compute (items), and over which loops each one runs.

use super::model::{Mode, product};
use super::plan::Planner;
use crate::emit::expr::{Buf, Ex};
use crate::emit::index::{ExId, Poly};
use pleach_ir::{DType, Op};

/// What an item does with its value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum What {
    /// Writes it.
    Store { buf: Buf, dtype: DType },
    /// Reduces it; the node is the reduction.
    Reduce(usize),
}

/// Where the index along one axis comes from.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Src {
    /// The row at hand.
    Row,
    /// An axis of one element.
    Zero,
    /// Counter of an outer loop.
    Outer(usize),
    /// `lane / div % rem`.
    Lane { div: i64, rem: Option<i64> },
    /// Counter of the innermost, sequential loop.
    Seq,
}

/// The loops of a pass.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Nest {
    /// Sequential loops around the lanes.
    pub(crate) outer: Vec<Poly>,
    /// Extent that lanes run along.
    pub(crate) lane: Option<Poly>,
    /// Extent of a sequential loop for each block of lanes.
    pub(crate) seq: Option<Poly>,
}

/// One value to compute over a nest.
#[derive(Clone, Debug)]
pub(crate) struct Item {
    pub(crate) what: What,
    /// The value that is pulled.
    pub(crate) node: usize,
    /// Reductions before it.
    pub(crate) level: u32,
    pub(crate) nest: Nest,
    /// The pulled index, axis by axis.
    pub(crate) axes: Vec<Src>,
}

impl Planner {
    /// The nest of a value: lanes along the last axes, the others outside.
    pub(super) fn value_nest(&self, n: usize) -> (Nest, Vec<Src>) {
        let shape = &self.b.model.nodes[n].shape;
        let first = usize::from(self.b.mode == Mode::Rows && !shape.is_empty());
        let axes: Vec<usize> = (first..shape.len()).collect();
        let mut src = vec![Src::Zero; shape.len()];
        src[..first].fill(Src::Row);
        let nest = self.spread(shape, &axes, &mut src);
        (nest, src)
    }

    /// Spreads these axes over lanes (the last ones) and outer loops.
    fn spread(&self, shape: &[Poly], axes: &[usize], src: &mut [Src]) -> Nest {
        let axes: Vec<usize> = axes.iter().copied().filter(|a| shape[*a].known() != Some(1)).collect();
        let mut nest = Nest::default();
        let Some((last, rest)) = axes.split_last() else { return nest };
        let mut lane = vec![*last];
        let mut rest = rest.to_vec();
        // Short axes are joined until a vector is filled.
        while let (Some(n), Some(a)) = (product_known(shape, &lane), rest.last().copied())
            && n < self.lanes
            && shape[a].known().is_some()
        {
            lane.insert(0, a);
            rest.pop();
        }
        let mut div = 1;
        for (i, a) in lane.iter().enumerate().rev() {
            let rem = if i == 0 { None } else { shape[*a].known().map(|d| d.max(1)) };
            src[*a] = Src::Lane { div, rem };
            div *= shape[*a].known().unwrap_or(1).max(1);
        }
        for (i, a) in rest.iter().enumerate() {
            src[*a] = Src::Outer(i);
            nest.outer.push(shape[*a].clone());
        }
        nest.lane = Some(product(&lane.iter().map(|a| shape[*a].clone()).collect::<Vec<_>>()));
        nest
    }

    /// The nest of a reduction, over its input.
    pub(super) fn reduction_nest(&mut self, n: usize) -> Result<(Nest, Vec<Src>), String> {
        let Op::Reduce { axis, .. } = self.b.model.nodes[n].op else { return Err("not a reduction".into()) };
        let axis = axis as usize;
        let input = self.b.model.nodes[n].inputs[0];
        let shape = self.b.model.nodes[input].shape.clone();
        let kept: Vec<usize> = (0..shape.len()).filter(|a| *a != axis).collect();
        let row = usize::from(self.b.mode == Mode::Rows);
        let mut src = vec![Src::Zero; shape.len()];
        for a in kept.iter().take(row) {
            src[*a] = Src::Row;
        }
        let kept = &kept[row..];
        let wide: Vec<usize> = kept.iter().copied().filter(|a| shape[*a].known() != Some(1)).collect();
        if !wide.is_empty() && self.lanes_on_kept(n, &shape, axis, &wide, &src)? {
            let mut nest = self.spread(&shape, kept, &mut src);
            src[axis] = Src::Seq;
            nest.seq = Some(shape[axis].clone());
            return Ok((nest, src));
        }
        let mut nest = Nest { lane: Some(shape[axis].clone()), ..Nest::default() };
        src[axis] = Src::Lane { div: 1, rem: None };
        for a in wide {
            src[a] = Src::Outer(nest.outer.len());
            nest.outer.push(shape[a].clone());
        }
        Ok((nest, src))
    }

    /// Whether lanes of a reduction are better spread over an axis that stays than over the one that goes.
    fn lanes_on_kept(
        &mut self,
        n: usize,
        shape: &[Poly],
        axis: usize,
        wide: &[usize],
        src: &[Src],
    ) -> Result<bool, String> {
        let last = wide[wide.len() - 1];
        let extent: Option<i64> = wide.iter().try_fold(1i64, |p, a| p.checked_mul(shape[*a].known()?));
        if shape[axis].known().is_some_and(|k| 2 * k < self.lanes) && extent.is_none_or(|e| e >= self.lanes) {
            return Ok(true);
        }
        let (along, across) = self.contiguous(n, axis, last, src)?;
        Ok(if along == across { axis < last } else { across > along })
    }

    /// How many loads of a reduction's input are contiguous along the reduced axis, and along another one.
    pub(super) fn contiguous(
        &mut self,
        n: usize,
        axis: usize,
        other: usize,
        src: &[Src],
    ) -> Result<(usize, usize), String> {
        let input = self.b.model.nodes[n].inputs[0];
        let shape = self.b.model.nodes[input].shape.clone();
        let mut index = vec![];
        for (a, d) in shape.iter().enumerate() {
            let p = if src[a] == Src::Row { self.b.own[0].clone() } else { self.trial_counter(d) };
            index.push(p);
        }
        let level = std::mem::replace(&mut self.b.level, self.b.model.level[n] - 1);
        let e = self.b.pull(input, &index);
        self.b.level = level;
        let count = |p: &Poly| self.count_contiguous(e.clone(), p);
        Ok((count(&index[axis])?, count(&index[other])?))
    }

    fn count_contiguous(&self, e: Result<ExId, String>, p: &Poly) -> Result<usize, String> {
        let Some(a) = p.0.first().and_then(|t| t.0.first()).copied() else { return Ok(0) };
        let unit = |addr: &Poly| addr.0.iter().filter(|t| t.0.contains(&a)).all(|t| t.0 == [a] && t.1 == 1);
        let reads = |addr: &Poly| addr.0.iter().any(|t| t.0.contains(&a));
        let all = self.b.exprs.reach(&self.b.space, [e?], &[]);
        Ok(all
            .into_iter()
            .filter(|x| matches!(&self.b.exprs.info(*x).ex, Ex::Load { addr, .. } if reads(addr) && unit(addr)))
            .count())
    }

    /// Index of an item for these counters.
    pub(super) fn index(&mut self, item: &Item, outer: &[Poly], lane: &Poly, seq: &Poly) -> Vec<Poly> {
        let mut out = Vec::with_capacity(item.axes.len());
        for s in &item.axes {
            out.push(match s {
                Src::Row => self.b.own[0].clone(),
                Src::Zero => Poly::default(),
                Src::Outer(k) => outer[*k].clone(),
                Src::Seq => seq.clone(),
                Src::Lane { div, rem } => {
                    let (q, _) = self.b.space.divide(lane, &Poly::from(*div));
                    match rem {
                        Some(r) => self.b.space.divide(&q, &Poly::from(*r)).1,
                        None => q,
                    }
                }
            });
        }
        out
    }
}

fn product_known(shape: &[Poly], axes: &[usize]) -> Option<i64> {
    axes.iter().try_fold(1i64, |p, a| p.checked_mul(shape[*a].known()?))
}
