//! The entry `optimizer`: what a step does beside AdamW, as operators that are spliced into `update`.
//!
//! Inputs are those of `update`, and for a trained parameter p: `grad.p`, its clipped gradient; `change.p`, what AdamW takes
//! away from it (of the shape of the gradient that AdamW gets); `stepped.p`, p after AdamW with decay; `value.p`, what p
//! becomes in the end.
//! Outputs replace what they name: `lr.p`, `beta1.p`, `beta2.p`, `eps.p`, `weight_decay.p`, `correction1.p`, `correction2.p`
//! (f32 []), `grad.p` (the gradient that AdamW gets; its moments are kept in this shape), `value.p`. Assignments go over as
//! they are. An output `measured.p`, whatever it is, says that p takes no step: its gradient is neither clipped nor part of the norm, and
//! there for the program alone. Reads of parameters mean values before the step.

use super::update::Stepper;
use super::{Entry, IrError, Op, ParamId, RootKind, TensorType, ValueId};

/// The program while it is spliced in: every value at most once.
pub(super) struct Program<'p> {
    e: &'p Entry,
    map: Vec<Option<ValueId>>,
}

/// The type of the output of this name.
pub(super) fn output_type<'e>(e: &'e Entry, name: &str) -> Option<&'e TensorType> {
    e.roots.iter().find(|r| matches!(&r.kind, RootKind::Output(n) if n == name)).map(|r| e.ty(r.value))
}

impl<'p> Program<'p> {
    pub(super) fn new(e: &'p Entry) -> Program<'p> {
        Program { e, map: vec![None; e.nodes.len()] }
    }

    /// An error of the program.
    pub(super) fn fault(why: String) -> IrError {
        IrError::Shape { op: "optimizer".into(), types: String::new(), why }
    }

    /// The output of this name, if the program has it.
    pub(super) fn output(&mut self, s: &mut Stepper<'_>, name: &str) -> Result<Option<ValueId>, IrError> {
        let root = self.e.roots.iter().find(|r| matches!(&r.kind, RootKind::Output(n) if n == name));
        root.map(|r| r.value).map(|v| self.value(s, v)).transpose()
    }

    /// What the program assigns.
    pub(super) fn assigns(&mut self, s: &mut Stepper<'_>) -> Result<Vec<(ParamId, ValueId)>, IrError> {
        let mut out = vec![];
        for r in &self.e.roots {
            if let RootKind::Assign(p) = r.kind {
                out.push((p, self.value(s, r.value)?));
            }
        }
        Ok(out)
    }

    fn value(&mut self, s: &mut Stepper<'_>, v: ValueId) -> Result<ValueId, IrError> {
        if let Some(done) = self.map[v.index()] {
            return Ok(done);
        }
        let e = self.e;
        let n = e.node(v);
        let assigned = if let Op::Param(p) = n.op { s.assigned(p) } else { None };
        let new = match (&n.op, assigned) {
            (_, Some(v)) => v,
            (Op::Input { name, .. }, _) => self.input(s, name)?,
            (op, _) => {
                let inputs = n.inputs.iter().map(|i| self.value(s, *i)).collect::<Result<Vec<_>, _>>()?;
                s.t.at(n.origin.clone()).push(op.clone(), &inputs)?
            }
        };
        s.t.at(None);
        if *s.t.ty(new) != n.ty {
            return Err(Self::fault(format!("a value is {}, the program takes it for {}", s.t.ty(new), n.ty)));
        }
        self.map[v.index()] = Some(new);
        Ok(new)
    }

    fn input(&mut self, s: &mut Stepper<'_>, name: &str) -> Result<ValueId, IrError> {
        if let Some(v) = s.input(name) {
            return Ok(v);
        }
        let (what, param) = name.split_once('.').unwrap_or((name, ""));
        let at = s.find(param).ok_or_else(|| Self::fault(format!("there is no trained parameter for `{name}`")))?;
        // The stepper asks this same program for what it gives, so it is lent out with all that is known.
        let mut lent = Some(Program { e: self.e, map: std::mem::take(&mut self.map) });
        let made = match what {
            "grad" => Ok(s.gradient(at)),
            "change" => s.change(&mut lent, at),
            "stepped" => s.stepped(&mut lent, at),
            "value" => s.value(&mut lent, at),
            _ => Err(Self::fault(format!("there is no input `{name}`"))),
        };
        self.map = lent.map(|p| p.map).unwrap_or_default();
        made
    }
}
