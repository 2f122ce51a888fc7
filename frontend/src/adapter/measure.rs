//! Where a method says what to measure of a site's input before training: statistics that runs of the entry `calibrate` carry on.

use std::collections::BTreeMap;

use pleach_ir::{DType, Dim, ParamId, Role, Source, TensorType, ValueId};

use super::method::Scope;
use crate::error::Result;

/// The statistics of one site. The operators of [`Scope`] are at hand. One run sees one row of the data.
pub struct Measure<'s, 'b> {
    scope: Scope<'s, 'b>,
    /// Tokens with a label of their own, i32 [L].
    labelled: ValueId,
    assigned: BTreeMap<ParamId, ValueId>,
}

impl<'s, 'b> std::ops::Deref for Measure<'s, 'b> {
    type Target = Scope<'s, 'b>;
    fn deref(&self) -> &Scope<'s, 'b> {
        &self.scope
    }
}

impl<'s, 'b> std::ops::DerefMut for Measure<'s, 'b> {
    fn deref_mut(&mut self) -> &mut Scope<'s, 'b> {
        &mut self.scope
    }
}

impl<'s, 'b> Measure<'s, 'b> {
    pub(crate) fn new(scope: Scope<'s, 'b>, labelled: ValueId) -> Measure<'s, 'b> {
        Measure { scope, labelled, assigned: BTreeMap::new() }
    }

    /// What is assigned when a run ends.
    pub(crate) fn finish(self) -> BTreeMap<ParamId, ValueId> {
        self.assigned
    }

    /// Places of the tokens that have a label of their own, i32 [L].
    pub fn labelled(&self) -> ValueId {
        self.labelled
    }

    fn stat(&self, name: &str, shape: &[u64]) -> (String, TensorType) {
        (self.scope.stat_name(name), TensorType::new(DType::F32, shape.iter().map(|d| Dim::Known(*d))))
    }

    /// A statistic f32 before the run, zeros at first.
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
        self.assigned.insert(id, value);
        Ok(())
    }
}
