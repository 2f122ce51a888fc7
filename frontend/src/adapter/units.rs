//! Weights of coupled layers by their units: what methods write that train, or keep, some of them.

use pleach_ir::{BinaryOp, DType, Dim, Op, ScatterMode, ValueId};

use super::init::{Scores, UnitWeight};
use super::method::Scope;
use crate::coupling::{Coupling, Member, Side};
use crate::error::{Error, Result};

/// How units are compared by the weights of all members.
pub(super) fn scores(coupling: &Coupling, product: bool) -> Scores {
    let weight = |(path, m): &(String, Member)| UnitWeight {
        tensor: format!("{path}.weight"),
        columns: m.side == Side::Consumes,
        width: m.width,
    };
    Scores { weights: coupling.members.iter().map(weight).collect(), product }
}

impl<'s> Scope<'s, '_> {
    /// The site's part in its coupling.
    ///
    /// # Errors
    /// It has none.
    pub(super) fn member(&self) -> Result<&'s Member> {
        let why = || Error::Graph(format!("`{}` is in no coupling", self.site().module));
        self.site().member.as_ref().ok_or_else(why)
    }

    /// The first `count` units of the coupling's order, as rows or columns of the site's weight: i32 [count · width].
    pub(super) fn first_units(&mut self, order: &str, count: u64) -> Result<ValueId> {
        let width = self.member()?.width;
        let units = self.buffer(order)?;
        let units = self.head(units, 0, count)?;
        self.elements(units, width)
    }

    /// The site's weight with `delta` added to the first `count` units: their rows, or columns, one after another. Where layers hold
    /// their units in this order they lie together; else they are picked.
    pub(super) fn with_units(&mut self, weight: ValueId, order: &str, count: u64, delta: ValueId) -> Result<ValueId> {
        let member = self.member()?;
        let axis = member.axis();
        let chosen = self.first_units(order, count)?;
        let (base, place) = match self.arranged() {
            true => {
                let shape = vec![Dim::Known(count * member.width)];
                (self.base_weight()?, self.push(Op::Iota { shape, axis: 0 }, &[])?)
            }
            false => (weight, chosen),
        };
        let part = self.push(Op::Gather { axis }, &[base, chosen])?;
        let part = self.sum(&[part, delta])?;
        self.push(Op::Scatter { axis, mode: ScatterMode::Set }, &[weight, place, part])
    }

    /// Row i is one at place `index[i]` and zero elsewhere: i32 [n] → f32 [n, width].
    pub(super) fn selector(&mut self, index: ValueId, width: u64) -> Result<ValueId> {
        let n = self.shape(index)[0].known().unwrap_or(0);
        let index = self.spread(index, &[n, width], &[0])?;
        let column = self.push(Op::Iota { shape: vec![Dim::Known(n), Dim::Known(width)], axis: 1 }, &[])?;
        let same = self.push(Op::Binary(BinaryOp::Eq), &[index, column])?;
        self.push(Op::Cast(DType::F32), &[same])
    }

    /// Rows or columns of x at `index` of a matrix of zeros that is `whole` wide along that axis.
    pub(super) fn placed(&mut self, x: ValueId, axis: u8, index: ValueId, whole: u64) -> Result<ValueId> {
        let mut shape = self.shape(x).to_vec();
        shape[usize::from(axis)] = Dim::Known(whole);
        let zero = self.number(0.0)?;
        let zeros = self.push(Op::Broadcast { shape, axes: vec![] }, &[zero])?;
        self.push(Op::Scatter { axis, mode: ScatterMode::Set }, &[zeros, index, x])
    }
}
