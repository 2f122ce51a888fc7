//! Where a method says what an optimizer step does with one of its trained buffers, beside AdamW.
//!
//! It writes operators of the entry `optimizer`, which `differentiate` makes part of `update`: other settings, another gradient
//! before AdamW, another value after it, and statistics that outlive the step.

use std::collections::BTreeMap;

use pleach_ir::{BinaryOp, DType, Op, ParamId, ReduceOp, Role, Source, TensorType, UnaryOp, ValueId};

use super::method::Scope;
use crate::error::Result;

/// Outputs of the entry by name.
pub(crate) type Outputs = Vec<(String, ValueId)>;
/// Parameters that the entry assigns.
pub(crate) type Assigned = Vec<(ParamId, ValueId)>;

/// The step of one trained buffer. The operators of [`Scope`] are at hand; reads of buffers mean values before the step.
pub struct Update<'s, 'b> {
    scope: Scope<'s, 'b>,
    part: &'static str,
    shape: Vec<u64>,
    /// What the step gives: names of outputs.
    outputs: Vec<(String, ValueId)>,
    assigned: Vec<(ParamId, ValueId)>,
    inputs: &'s mut BTreeMap<String, ValueId>,
}

impl<'s, 'b> std::ops::Deref for Update<'s, 'b> {
    type Target = Scope<'s, 'b>;
    fn deref(&self) -> &Scope<'s, 'b> {
        &self.scope
    }
}

impl<'s, 'b> std::ops::DerefMut for Update<'s, 'b> {
    fn deref_mut(&mut self) -> &mut Scope<'s, 'b> {
        &mut self.scope
    }
}

impl<'s, 'b> Update<'s, 'b> {
    pub(crate) fn new(
        scope: Scope<'s, 'b>,
        part: &'static str,
        shape: Vec<u64>,
        inputs: &'s mut BTreeMap<String, ValueId>,
    ) -> Update<'s, 'b> {
        Update { scope, part, shape, outputs: vec![], assigned: vec![], inputs }
    }

    /// What was written: outputs, and parameters that are assigned.
    pub(crate) fn finish(self) -> (Outputs, Assigned) {
        (self.outputs, self.assigned)
    }

    /// Which buffer it is.
    pub fn part(&self) -> &'static str {
        self.part
    }

    /// Its shape.
    pub fn shape(&self) -> &[u64] {
        &self.shape
    }

    fn input(&mut self, name: String, shape: &[u64]) -> Result<ValueId> {
        if let Some(v) = self.inputs.get(&name) {
            return Ok(*v);
        }
        let shape = shape.iter().map(|d| (*d).into()).collect();
        let v = self.scope.push(Op::Input { name: name.clone(), dtype: DType::F32, shape }, &[])?;
        self.inputs.insert(name, v);
        Ok(v)
    }

    /// A setting of the step, f32 []: `lr`, `beta1`, `beta2`, `eps`, `weight_decay`, `correction1`, `correction2`.
    ///
    /// # Errors
    /// Operands that do not fit.
    pub fn setting(&mut self, name: &str) -> Result<ValueId> {
        self.input(name.into(), &[])
    }

    fn of(&mut self, what: &str, part: &str) -> Result<ValueId> {
        let (name, shape) = (self.scope.param_name(part), self.scope.buffer_shape(part)?);
        self.input(format!("{what}.{name}"), &shape)
    }

    /// The buffer before the step.
    ///
    /// # Errors
    /// Operands that do not fit.
    pub fn old(&mut self) -> Result<ValueId> {
        self.scope.buffer(self.part)
    }

    /// The clipped gradient of a trained buffer of the site.
    ///
    /// # Errors
    /// The method has no such buffer.
    pub fn gradient_of(&mut self, part: &str) -> Result<ValueId> {
        self.of("grad", part)
    }

    /// The clipped gradient.
    ///
    /// # Errors
    /// Operands that do not fit.
    pub fn gradient(&mut self) -> Result<ValueId> {
        self.gradient_of(self.part)
    }

    /// The value of a trained buffer of the site after AdamW with decay.
    ///
    /// # Errors
    /// The method has no such buffer.
    pub fn stepped_of(&mut self, part: &str) -> Result<ValueId> {
        self.of("stepped", part)
    }

    /// The value after AdamW with decay.
    ///
    /// # Errors
    /// Operands that do not fit.
    pub fn stepped(&mut self) -> Result<ValueId> {
        self.stepped_of(self.part)
    }

    /// What AdamW takes away, in the shape of the gradient that it gets.
    ///
    /// # Errors
    /// Operands that do not fit.
    pub fn change(&mut self, shape: &[u64]) -> Result<ValueId> {
        let name = self.scope.param_name(self.part);
        self.input(format!("change.{name}"), shape)
    }

    /// Gives what AdamW uses in place of a setting f32 [], of the gradient (`grad`, moments take its shape), or what the
    /// buffer becomes in the end (`value`).
    pub fn give(&mut self, what: &str, value: ValueId) {
        let name = self.scope.param_name(self.part);
        self.outputs.push((format!("{what}.{name}"), value));
    }

    /// Says that the buffer takes no step: its gradient, neither clipped nor part of the norm, is there to be looked at.
    ///
    /// # Errors
    /// Operands that do not fit.
    pub fn measure(&mut self) -> Result<()> {
        let one = self.number(1.0)?;
        self.give("measured", one);
        Ok(())
    }

    /// The learning rate times a factor.
    ///
    /// # Errors
    /// Operands that do not fit.
    pub fn scale_lr(&mut self, factor: f64) -> Result<()> {
        let (lr, factor) = (self.setting("lr")?, self.number(factor)?);
        let lr = self.mul(lr, factor)?;
        self.give("lr", lr);
        Ok(())
    }

    /// No weight decay.
    ///
    /// # Errors
    /// Operands that do not fit.
    pub fn no_decay(&mut self) -> Result<()> {
        let zero = self.number(0.0)?;
        self.give("weight_decay", zero);
        Ok(())
    }

    fn stat(&mut self, name: &str, shape: &[u64]) -> (String, TensorType) {
        let name = format!("stat.{name}.{}", self.scope.param_name(self.part));
        (name, TensorType::new(DType::F32, shape.iter().copied()))
    }

    /// A statistic of the buffer f32, zeros at first, before the step. It is part of checkpoints.
    ///
    /// # Errors
    /// Operands that do not fit.
    pub fn kept(&mut self, name: &str, shape: &[u64]) -> Result<ValueId> {
        let (name, ty) = self.stat(name, shape);
        self.scope.param(name, ty, Role::Stat, Source::Zeros)
    }

    /// What a statistic becomes.
    ///
    /// # Errors
    /// Operands that do not fit.
    pub fn keep(&mut self, name: &str, shape: &[u64], value: ValueId) -> Result<()> {
        let (name, ty) = self.stat(name, shape);
        let id = self.scope.declare(name, ty, Role::Stat, Source::Zeros);
        self.assigned.push((id, value));
        Ok(())
    }

    /// Assigns a buffer of the site that is not trained.
    ///
    /// # Errors
    /// The method has no such buffer.
    pub fn assign(&mut self, part: &str, value: ValueId) -> Result<()> {
        let id = self.scope.buffer_id(part)?;
        self.assigned.push((id, value));
        Ok(())
    }
}

/// Short names for what such programs are made of.
impl Scope<'_, '_> {
    /// A value whose size shrinks by a threshold f32 [], no further than to zero: the proximal operator of threshold · |x|.
    ///
    /// # Errors
    /// Operands that do not fit.
    pub fn shrunk(&mut self, x: ValueId, threshold: ValueId) -> Result<ValueId> {
        let zero = self.number(0.0)?;
        let above = self.binary(BinaryOp::Sub, x, threshold)?;
        let above = self.binary(BinaryOp::Max, above, zero)?;
        let below = self.sum(&[x, threshold])?;
        let below = self.binary(BinaryOp::Min, below, zero)?;
        self.sum(&[above, below])
    }

    /// A number f32 [].
    ///
    /// # Errors
    /// Operands that do not fit.
    pub fn number(&mut self, x: f64) -> Result<ValueId> {
        self.push(Op::f32(x as f32), &[])
    }

    /// An elementwise function.
    ///
    /// # Errors
    /// Operands that do not fit.
    pub fn unary(&mut self, op: UnaryOp, x: ValueId) -> Result<ValueId> {
        self.push(Op::Unary(op), &[x])
    }

    /// An elementwise function of two values; a rank-0 operand stands for its value everywhere.
    ///
    /// # Errors
    /// Operands that do not fit.
    pub fn binary(&mut self, op: BinaryOp, a: ValueId, b: ValueId) -> Result<ValueId> {
        self.push(Op::Binary(op), &[a, b])
    }

    /// a · b of matrices, either of them turned round.
    ///
    /// # Errors
    /// Operands that do not fit.
    pub fn product(&mut self, a: ValueId, ta: bool, b: ValueId, tb: bool) -> Result<ValueId> {
        self.push(Op::MatMul { ta, tb }, &[a, b])
    }

    /// Sums over an axis.
    ///
    /// # Errors
    /// Operands that do not fit.
    pub fn sum_over(&mut self, axis: u8, x: ValueId) -> Result<ValueId> {
        self.push(Op::Reduce { op: ReduceOp::Sum, axis }, &[x])
    }

    /// A vector along `axis` of a matrix of this shape.
    ///
    /// # Errors
    /// Operands that do not fit.
    pub fn along(&mut self, axis: u8, vector: ValueId, shape: &[u64]) -> Result<ValueId> {
        let shape = shape.iter().map(|d| (*d).into()).collect();
        self.push(Op::Broadcast { shape, axes: vec![axis] }, &[vector])
    }
}
