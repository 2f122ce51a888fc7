//! What `update` has to assign beside the trained parameters: every derived parameter that is made of them.
//!
//! The new value is the form of the derived parameter over the new values of the trained ones. Where that form sets
//! parts of something that training does not change, at indices that it does not change, only the parts are set again,
//! in place: with `D = scatter_set(w, i, u)`, `scatter_set(w, i, u') = scatter_set(D, i, u')`. The same holds for trained
//! operands of a concatenation. So a weight with trained columns lives once and is never rebuilt.
//!
//! Assumes forms as `fold-params` interned them. Leaves alone: derived parameters that `update` assigns already.

use super::Forms;
use pleach_ir::{Entry, Graph, IrError, Op, ParamId, RootKind, ScatterMode, ValueId};
use std::collections::{BTreeMap, BTreeSet};

/// `update` with the assignments that it lacks. The nodes it gains over parameters that are not trained are left for
/// the pass to move into prepare entries.
pub(super) fn renew(g: &Graph, update: &Entry, forms: &Forms) -> Result<Entry, IrError> {
    let mut out = update.clone();
    let mut assigned: BTreeMap<ParamId, ValueId> = BTreeMap::new();
    for r in &update.roots {
        if let RootKind::Assign(p) = r.kind {
            assigned.insert(p, r.value);
        }
    }
    let missing: BTreeSet<(ParamId, usize)> = forms
        .derived
        .iter()
        .filter(|(f, p)| forms.list[**f].trained && !assigned.contains_key(p))
        .map(|(f, p)| (*p, *f))
        .collect();
    let mut build = Build { g, forms, assigned, old: BTreeMap::new(), new: BTreeMap::new() };
    for (p, f) in missing {
        let value = build.renewed(&mut out, p, f)?;
        out.assign(p, value);
    }
    Ok(out)
}

/// A movement or cast around a set, from the outside inwards.
enum Around {
    Cast(Op),
    Transpose(Vec<u8>),
}

struct Build<'a> {
    g: &'a Graph,
    forms: &'a Forms,
    /// New values of trained parameters.
    assigned: BTreeMap<ParamId, ValueId>,
    /// Forms over old values, as nodes of the entry.
    old: BTreeMap<usize, ValueId>,
    /// Forms over new values.
    new: BTreeMap<usize, ValueId>,
}

impl Build<'_> {
    /// The new value of the derived parameter `p` of form `f`.
    fn renewed(&mut self, e: &mut Entry, p: ParamId, f: usize) -> Result<ValueId, IrError> {
        let Some((around, at)) = self.set(f) else { return self.over_new(e, f) };
        let form = &self.forms.list[at];
        let mut whole = e.push(&self.g.params, Op::Param(p), &[])?;
        if let Op::Concat { axis } = form.op {
            let mut start = 0;
            for part in &form.inputs {
                let ty = &self.forms.list[*part].ty;
                let len = ty.shape[usize::from(axis)].known().unwrap_or(0);
                if self.forms.list[*part].trained {
                    let mut index = e.push(&self.g.params, Op::Iota { shape: vec![len.into()], axis: 0 }, &[])?;
                    if start > 0 {
                        let first = e.push(&self.g.params, Op::i32(start as i32), &[])?;
                        index = e.push(&self.g.params, Op::Add, &[index, first])?;
                    }
                    let value = self.over_new(e, *part)?;
                    whole = self.set_part(e, &around, whole, (axis, index), value)?;
                }
                start += len;
            }
            return Ok(whole);
        }
        let (index, part) = (form.inputs[1], form.inputs[2]);
        let Op::Scatter { axis, .. } = form.op else { return self.over_new(e, f) };
        let index = self.over_old(e, index)?;
        let value = self.over_new(e, part)?;
        self.set_part(e, &around, whole, (axis, index), value)
    }

    /// `whole` with a part set at an index of an axis of the core, inside what is around it.
    fn set_part(
        &self,
        e: &mut Entry,
        around: &[Around],
        whole: ValueId,
        (mut axis, index): (u8, ValueId),
        mut value: ValueId,
    ) -> Result<ValueId, IrError> {
        for a in around.iter().rev() {
            let op = match a {
                Around::Cast(op) => op.clone(),
                Around::Transpose(perm) => {
                    axis = perm.iter().position(|x| *x == axis).unwrap_or(0) as u8;
                    Op::Transpose(perm.clone())
                }
            };
            value = e.push(&self.g.params, op, &[value])?;
        }
        e.push(&self.g.params, Op::Scatter { axis, mode: ScatterMode::Set }, &[whole, index, value])
    }

    /// The set at the core of a form whose other operands are not trained, or the concatenation with one that is not, and
    /// what is around it.
    fn set(&self, mut f: usize) -> Option<(Vec<Around>, usize)> {
        let mut around = vec![];
        loop {
            let form = &self.forms.list[f];
            match &form.op {
                Op::Scatter { mode: ScatterMode::Set, .. } => {
                    let fixed = form.inputs[..2].iter().all(|i| !self.forms.list[*i].trained);
                    return fixed.then_some((around, f));
                }
                Op::Concat { .. } => {
                    let some = form.inputs.iter().any(|i| !self.forms.list[*i].trained);
                    return some.then_some((around, f));
                }
                Op::Cast(_) => around.push(Around::Cast(form.op.clone())),
                Op::Transpose(perm) => around.push(Around::Transpose(perm.clone())),
                _ => return None,
            }
            f = form.inputs[0];
        }
    }

    /// A form over the new values.
    fn over_new(&mut self, e: &mut Entry, f: usize) -> Result<ValueId, IrError> {
        let form = &self.forms.list[f];
        if !form.trained {
            return self.over_old(e, f);
        }
        if let Some(v) = self.new.get(&f) {
            return Ok(*v);
        }
        let value = match form.op {
            // a trained parameter that is never assigned keeps its value
            Op::Param(p) => match self.assigned.get(&p) {
                Some(v) => *v,
                None => self.over_old(e, f)?,
            },
            _ => {
                let inputs = form.inputs.iter().map(|i| self.over_new(e, *i)).collect::<Result<Vec<_>, _>>()?;
                e.push_from(&self.g.params, form.op.clone(), &inputs, form.origin.clone())?
            }
        };
        self.new.insert(f, value);
        Ok(value)
    }

    /// A form over the values at entry.
    fn over_old(&mut self, e: &mut Entry, f: usize) -> Result<ValueId, IrError> {
        if let Some(v) = self.old.get(&f) {
            return Ok(*v);
        }
        let form = &self.forms.list[f];
        let inputs = form.inputs.iter().map(|i| self.over_old(e, *i)).collect::<Result<Vec<_>, _>>()?;
        let value = e.push_from(&self.g.params, form.op.clone(), &inputs, form.origin.clone())?;
        self.old.insert(f, value);
        Ok(value)
    }
}
