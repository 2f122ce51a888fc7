//! Coupled layers that hold their units in another order, or some of them only, while a slot is trained.
//!
//! Producers and consumer of a coupling choose rows and columns of their weights by one index buffer, so with all units the model
//! computes what it did. The base's own weights are not touched: what is chosen depends on parameters alone and is made once.

use std::collections::BTreeMap;

use pleach_ir::{BinaryOp, DType, Dim, Op, Role, Source, TensorType, ValueId};

use super::builder::{Attached, Builder};
use crate::adapter::Ordered;
use crate::coupling::{Member, Side};
use crate::error::{Error, Result};
use crate::peft::Adapter;

/// The layers that the trained slot orders.
///
/// # Errors
/// One of them has another adapter, which knows the original order only.
pub(super) fn placed<'a>(
    adapters: &'a [Adapter],
    train: Option<u32>,
    attached: &BTreeMap<&str, Attached>,
) -> Result<BTreeMap<&'a str, (&'a Ordered, &'a Member)>> {
    let mut placed = BTreeMap::new();
    let Some((slot, adapter)) = train.and_then(|s| Some((s, adapters.get(s as usize)?))) else { return Ok(placed) };
    for o in &adapter.orders {
        for (path, member) in &o.coupling.members {
            if attached.get(path.as_str()).is_some_and(|list| list.iter().any(|a| a.0 != slot)) {
                let what = format!(
                    "has another adapter too, beside which `{}` cannot be trained: it puts the layer in an order of its own; \
                     merge the other one first",
                    adapter.config.method.name()
                );
                return Err(Error::Pattern { pattern: path.clone(), what });
            }
            placed.insert(path.as_str(), (o, member));
        }
    }
    Ok(placed)
}

impl Builder<'_> {
    /// Whether layers hold units in the order of this slot.
    pub(crate) fn arranges(&self, slot: u32) -> bool {
        self.arranges && self.trained(slot) == Role::Train
    }

    /// A layer's weight [out, in], or its bias [out], with the units that it holds in this entry.
    pub(super) fn arranged(&mut self, module: &str, value: ValueId) -> Result<ValueId> {
        let Some(&(ordered, member)) = self.placed.get(module).filter(|_| self.arranges) else { return Ok(value) };
        let vector = self.shape(value).len() == 1;
        if vector && member.side == Side::Consumes {
            return Ok(value);
        }
        let order = self.order(ordered)?;
        let index = self.elements(order, member.width)?;
        self.push(Op::Gather { axis: member.axis() }, &[value, index])
    }

    fn order(&mut self, ordered: &Ordered) -> Result<ValueId> {
        let slot = self.train_slot().unwrap_or(0);
        let ty = TensorType::new(DType::I32, ordered.buffer.shape.iter().copied());
        let key = ordered.key();
        self.param(format!("slot{slot}.{key}"), ty, Role::Index, Source::Adapter { slot, key })
    }

    /// The rows or columns of units: i32 [n] → i32 [n · width].
    pub(crate) fn elements(&mut self, units: ValueId, width: u64) -> Result<ValueId> {
        if width == 1 {
            return Ok(units);
        }
        let n = self.shape(units)[0].known().unwrap_or(0);
        let shape = vec![Dim::Known(n), Dim::Known(width)];
        let first = self.push(Op::i32(width as i32), &[])?;
        let first = self.push(Op::Binary(BinaryOp::Mul), &[units, first])?;
        let first = self.push(Op::Broadcast { shape: shape.clone(), axes: vec![0] }, &[first])?;
        let within = self.push(Op::Iota { shape, axis: 1 }, &[])?;
        let all = self.push(Op::Add, &[first, within])?;
        self.push(Op::Reshape(vec![Dim::Known(n * width)]), &[all])
    }
}
