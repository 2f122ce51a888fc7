//! The entry `update`: one step of AdamW (Loshchilov & Hutter 2019) on every trained parameter, after clipping all
//! gradients together by their norm.
//!
//! In an entry that steps at once there is no clipping, gradients are values of the entry, and what is assigned stays as it was
//! where the loss is no number.
//!
//! Written in plain operators with the arithmetic of `torch.optim.AdamW` and `clip_grad_norm_`. What changes from step to
//! step comes in as scalars, so schedules need no recompilation.
//!
//! What differs for some parameters stands in the entry `optimizer`, a program that is spliced in here ([`Program`]): it may
//! give other settings, another gradient (of another shape, in which the moments then are kept) and another new value,
//! and it may assign statistics.

use super::program::Program;
use super::tape::Tape;
use super::{BinaryOp, Entry, Graph, IrError, Op, Param, ParamId, Role, Source, TensorType, UPDATE, UnaryOp, ValueId};
use pleach_ir::{Root, RootKind};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The gradient is scaled by max / (norm + this), as in `clip_grad_norm_`.
const CLIP_EPS: f32 = 1e-6;

/// The inputs: learning rate, AdamW's settings, and 1 - beta1^t, 1 - beta2^t, both for the step that is made; then the
/// largest norm (infinity: no clipping).
pub(super) const INPUTS: [&str; 8] =
    ["lr", "beta1", "beta2", "eps", "weight_decay", "correction1", "correction2", "max_grad_norm"];

/// A trained parameter and its state.
#[derive(Clone, Copy, Debug)]
pub(super) struct State {
    pub(super) param: ParamId,
    /// Sum of gradients since the last step; none where steps are made at once.
    pub(super) grad: Option<ParamId>,
    /// Running means of gradients and of their squares; none where nothing steps or the gradient is only measured.
    moments: Option<(ParamId, ParamId)>,
}

/// Trained parameters with their state, and where each belongs: the origin of what is made for it.
pub(super) type States<'a> = (&'a [State], &'a [Option<Arc<str>>]);

/// Which state a trained parameter has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Has {
    /// Gradients are added up.
    pub(super) sums: bool,
    /// The parameter takes steps.
    pub(super) moments: bool,
}

/// Adds the state of a trained parameter to the graph, or finds it again. The moments have the type `moments`.
pub(super) fn declare(g: &mut Graph, param: ParamId, moments: Option<&TensorType>, has: Has) -> State {
    let of = g.params[param.index()].clone();
    let mut state = |prefix: &str, ty: &TensorType| {
        let name = format!("{prefix}.{}", of.name);
        g.find_param(&name)
            .unwrap_or_else(|| g.add_param(Param { name, ty: ty.clone(), role: Role::State, source: Source::Zeros }))
    };
    let ty = moments.unwrap_or(&of.ty);
    let grad = has.sums.then(|| state("grad", &of.ty));
    let moments = has.moments.then(|| (state("adam.m", ty), state("adam.v", ty)));
    State { param, grad, moments }
}

/// The entry. Inputs f32 []: [`INPUTS`]. Output `grad_norm` f32 [], before clipping.
pub(super) fn entry(params: &[Param], states: States<'_>, program: Option<&Entry>) -> Result<Entry, IrError> {
    let mut s = Stepper::new(Tape::new(params, UPDATE), params, states, None)?;
    let assigns = s.steps(program)?;
    let mut e = s.t.finish();
    e.output("grad_norm", s.norm);
    assigns.into_iter().for_each(|(p, v)| e.assign(p, v));
    Ok(e)
}

/// Gradients that the entry itself makes.
pub(super) struct Gradients {
    pub(super) values: Vec<ValueId>,
    /// Sums of their squares, where they are made already.
    pub(super) squares: Vec<Option<ValueId>>,
    pub(super) loss: ValueId,
    /// What the entry gives and assigns on the way. The step sees what was assigned, and has the last word on what it assigns too.
    pub(super) roots: Vec<Root>,
}

/// The same at the end of an entry that makes the gradients. The input `max_grad_norm` is there, but not used.
pub(super) fn go_on<'a>(
    tape: Tape<'a>,
    params: &'a [Param],
    states: States<'a>,
    program: Option<&Entry>,
    gradients: Gradients,
) -> Result<Entry, IrError> {
    let (loss, mut roots) = (gradients.loss, gradients.roots.clone());
    let mut s = Stepper::new(tape, params, states, Some(gradients))?;
    let size = s.t.unary(UnaryOp::Abs, loss)?;
    let infinite = s.t.number(f32::INFINITY)?;
    let sound = s.t.binary(BinaryOp::Lt, size, infinite)?;
    let mut assigns = s.steps(program)?;
    for (p, new) in &mut assigns {
        let place = s.place(*p);
        *new = s.t.within(place, |t| {
            let old = t.push(Op::Param(*p), &[])?;
            t.select(sound, *new, old)
        })?;
    }
    let mut e = s.t.finish();
    roots.retain(|r| !matches!(r.kind, RootKind::Assign(p) if assigns.iter().any(|(q, _)| *q == p)));
    e.roots = roots;
    e.output("grad_norm", s.norm);
    assigns.into_iter().for_each(|(p, v)| e.assign(p, v));
    Ok(e)
}

/// What AdamW makes of one parameter.
#[derive(Clone, Copy)]
struct Adam {
    m: ValueId,
    v: ValueId,
    /// Learning rate over the first correction, times the direction.
    change: ValueId,
}

/// The entry under construction.
pub(super) struct Stepper<'a> {
    pub(super) t: Tape<'a>,
    params: &'a [Param],
    states: &'a [State],
    places: &'a [Option<Arc<str>>],
    inputs: [ValueId; 8],
    /// Clipped, but for those that are only measured.
    gradients: Vec<ValueId>,
    norm: ValueId,
    one: ValueId,
    made: Vec<Option<Adam>>,
    /// Parameters that are being stepped, for programs that go round in circles.
    busy: Vec<bool>,
    /// What was assigned before in the same entry.
    assigned: BTreeMap<ParamId, ValueId>,
    /// Scalars made of settings: what, of which.
    scalars: BTreeMap<(&'static str, ValueId, ValueId), ValueId>,
}

impl<'a> Stepper<'a> {
    /// `made`: the gradients are values of the entry, and stay as they are; else they are in memory, and are clipped.
    fn new(
        mut t: Tape<'a>,
        params: &'a [Param],
        (states, places): States<'a>,
        made: Option<Gradients>,
    ) -> Result<Stepper<'a>, IrError> {
        let mut inputs = [ValueId(0); 8];
        for (v, name) in inputs.iter_mut().zip(INPUTS) {
            *v = t.input(name)?;
        }
        let one = t.number(1.0)?;
        let assigned = |r: &Root| if let RootKind::Assign(p) = r.kind { Some((p, r.value)) } else { None };
        let assigned = made.iter().flat_map(|m| &m.roots).filter_map(assigned).collect();
        let mut s = Stepper {
            t,
            params,
            states,
            places,
            inputs,
            gradients: vec![],
            norm: one,
            one,
            made: vec![None; states.len()],
            busy: vec![false; states.len()],
            assigned,
            scalars: BTreeMap::new(),
        };
        let [lr, beta1, beta2, _, decay, correction1, correction2, most] = inputs;
        s.rest(beta1)?;
        s.rest(beta2)?;
        s.rate(lr, correction1)?;
        s.root(correction2)?;
        s.kept(lr, decay)?;

        let clips = made.is_none();
        let mut squares = vec![];
        for (at, state) in states.iter().enumerate() {
            s.t.at(places[at].clone());
            let g = match (&made, state.grad) {
                (Some(m), _) => m.values[at],
                (None, Some(grad)) => s.t.push(Op::Param(grad), &[])?,
                (None, None) => s.t.zeros(&params[state.param.index()].ty.shape)?,
            };
            if state.moments.is_some() {
                squares.push(match made.as_ref().and_then(|m| m.squares[at]) {
                    Some(sum) => sum,
                    None => {
                        let square = s.t.mul(g, g)?;
                        s.t.sum_to(square, &[])?
                    }
                });
            }
            s.gradients.push(g);
        }
        s.t.at(None);
        let total = if let [only] = squares[..] { only } else { s.t.push(Op::Add, &squares)? };
        s.norm = s.t.unary(UnaryOp::Sqrt, total)?;
        if !clips {
            return Ok(s);
        }
        let small = s.t.number(CLIP_EPS)?;
        let shifted = s.t.add(s.norm, small)?;
        let clip = s.t.div(most, shifted)?;
        let clip = s.t.binary(BinaryOp::Min, one, clip)?;
        for (at, g) in s.gradients.iter_mut().enumerate().filter(|(at, _)| states[*at].moments.is_some()) {
            *g = s.t.within(places[at].clone(), |t| t.mul(*g, clip))?;
        }
        Ok(s)
    }

    /// What every trained parameter and its state become, and what the program assigns.
    fn steps(&mut self, program: Option<&Entry>) -> Result<Vec<(ParamId, ValueId)>, IrError> {
        let mut program = program.map(Program::new);
        let (states, params) = (self.states, self.params);
        let mut assigns = vec![];
        for (at, state) in states.iter().enumerate() {
            if let Some((m, v)) = state.moments {
                let value = self.value(&mut program, at)?;
                let (new_m, new_v) = self.moments(&mut program, at)?;
                assigns.extend([(state.param, value), (m, new_m), (v, new_v)]);
            }
            if let Some(grad) = state.grad {
                let shape = &params[state.param.index()].ty.shape;
                assigns.push((grad, self.t.within(self.places[at].clone(), |t| t.zeros(shape))?));
            }
        }
        if let Some(p) = &mut program {
            assigns.extend(p.assigns(self)?);
        }
        Ok(assigns)
    }

    /// A parameter's value before the step, where the same entry has assigned it.
    pub(super) fn assigned(&self, p: ParamId) -> Option<ValueId> {
        self.assigned.get(&p).copied()
    }

    /// The place of the trained parameter of this name.
    pub(super) fn find(&self, name: &str) -> Option<usize> {
        self.states.iter().position(|s| self.params[s.param.index()].name == name)
    }

    /// Where what a parameter becomes belongs: itself or the parameter that it is a state of.
    fn place(&self, param: ParamId) -> Option<Arc<str>> {
        let is = |s: &State| s.param == param || s.moments.is_some_and(|m| m.0 == param || m.1 == param);
        self.states.iter().position(is).and_then(|at| self.places[at].clone())
    }

    /// An input of the entry.
    pub(super) fn input(&self, name: &str) -> Option<ValueId> {
        INPUTS.iter().position(|n| *n == name).map(|i| self.inputs[i])
    }

    /// The clipped gradient.
    pub(super) fn gradient(&self, at: usize) -> ValueId {
        self.gradients[at]
    }

    /// A setting of a parameter: the program's, else the entry's.
    fn setting(&mut self, program: &mut Option<Program<'_>>, at: usize, name: &str) -> Result<ValueId, IrError> {
        let given = self.given(program, at, name)?;
        Ok(given.or_else(|| self.input(name)).unwrap_or(self.one))
    }

    /// What the program gives for a parameter.
    fn given(&mut self, program: &mut Option<Program<'_>>, at: usize, what: &str) -> Result<Option<ValueId>, IrError> {
        let name = &self.params[self.states[at].param.index()].name;
        match program {
            Some(p) => p.output(self, &format!("{what}.{name}")),
            None => Ok(None),
        }
    }

    fn scalar(
        &mut self,
        key: (&'static str, ValueId, ValueId),
        make: impl FnOnce(&mut Tape<'a>) -> Result<ValueId, IrError>,
    ) -> Result<ValueId, IrError> {
        if let Some(v) = self.scalars.get(&key) {
            return Ok(*v);
        }
        let v = self.t.within(None, make)?;
        self.scalars.insert(key, v);
        Ok(v)
    }

    /// 1 - x.
    fn rest(&mut self, x: ValueId) -> Result<ValueId, IrError> {
        let one = self.one;
        self.scalar(("rest", x, x), |t| t.sub(one, x))
    }

    /// lr / correction1.
    fn rate(&mut self, lr: ValueId, correction: ValueId) -> Result<ValueId, IrError> {
        self.scalar(("rate", lr, correction), |t| t.div(lr, correction))
    }

    /// √correction2.
    fn root(&mut self, correction: ValueId) -> Result<ValueId, IrError> {
        self.scalar(("root", correction, correction), |t| t.unary(UnaryOp::Sqrt, correction))
    }

    /// 1 - lr · decay.
    fn kept(&mut self, lr: ValueId, decay: ValueId) -> Result<ValueId, IrError> {
        let one = self.one;
        self.scalar(("kept", lr, decay), |t| {
            let lost = t.mul(lr, decay)?;
            t.sub(one, lost)
        })
    }

    fn adam(&mut self, program: &mut Option<Program<'_>>, at: usize) -> Result<Adam, IrError> {
        if let Some(a) = self.made[at] {
            return Ok(a);
        }
        let state = self.states[at];
        let Some((m, v)) = state.moments else {
            let name = &self.params[state.param.index()].name;
            return Err(Program::fault(format!("the gradient of {name} is only measured; it takes no step")));
        };
        if std::mem::replace(&mut self.busy[at], true) {
            let name = &self.params[state.param.index()].name;
            return Err(Program::fault(format!("the gradient of {name} depends on its own step")));
        }
        let g = self.given(program, at, "grad")?.unwrap_or(self.gradients[at]);
        let mut setting = |name| self.setting(program, at, name);
        let (lr, beta1, beta2, eps) = (setting("lr")?, setting("beta1")?, setting("beta2")?, setting("eps")?);
        let (correction1, correction2) = (setting("correction1")?, setting("correction2")?);
        let (rest1, rest2) = (self.rest(beta1)?, self.rest(beta2)?);
        let (step, root2) = (self.rate(lr, correction1)?, self.root(correction2)?);
        self.t.at(self.places[at].clone());
        let t = &mut self.t;
        let (m, v) = (t.push(Op::Param(m), &[])?, t.push(Op::Param(v), &[])?);
        let (old, new) = (t.mul(m, beta1)?, t.mul(g, rest1)?);
        let m = t.add(old, new)?;
        let square = t.mul(g, g)?;
        let (old, new) = (t.mul(v, beta2)?, t.mul(square, rest2)?);
        let v = t.add(old, new)?;
        let root = t.unary(UnaryOp::Sqrt, v)?;
        let root = t.div(root, root2)?;
        let denominator = t.add(root, eps)?;
        let direction = t.div(m, denominator)?;
        let change = t.mul(direction, step)?;
        t.at(None);
        let a = Adam { m, v, change };
        self.made[at] = Some(a);
        Ok(a)
    }

    fn moments(&mut self, program: &mut Option<Program<'_>>, at: usize) -> Result<(ValueId, ValueId), IrError> {
        self.adam(program, at).map(|a| (a.m, a.v))
    }

    /// What AdamW takes away from a parameter, in the shape of its gradient.
    pub(super) fn change(&mut self, program: &mut Option<Program<'_>>, at: usize) -> Result<ValueId, IrError> {
        self.adam(program, at).map(|a| a.change)
    }

    /// The parameter after AdamW with decay, before what a program makes of it.
    pub(super) fn stepped(&mut self, program: &mut Option<Program<'_>>, at: usize) -> Result<ValueId, IrError> {
        let change = self.change(program, at)?;
        let (lr, decay) = (self.setting(program, at, "lr")?, self.setting(program, at, "weight_decay")?);
        let kept = self.kept(lr, decay)?;
        let param = Op::Param(self.states[at].param);
        self.t.within(self.places[at].clone(), |t| {
            let p = t.push(param, &[])?;
            let p = t.mul(p, kept)?;
            t.sub(p, change)
        })
    }

    /// The new value of a parameter.
    pub(super) fn value(&mut self, program: &mut Option<Program<'_>>, at: usize) -> Result<ValueId, IrError> {
        match self.given(program, at, "value")? {
            Some(v) => Ok(v),
            None => self.stepped(program, at),
        }
    }
}
