//! The entry `update`: one step of AdamW (Loshchilov & Hutter 2019) on every trained parameter, after clipping all
//! gradients together by their norm.
//!
//! Written in plain operators with the arithmetic of `torch.optim.AdamW` and `clip_grad_norm_`. What changes from step to
//! step comes in as scalars, so schedules need no recompilation.

use super::tape::Tape;
use super::{BinaryOp, Entry, Graph, IrError, Op, Param, ParamId, Role, Source, UPDATE, UnaryOp};

/// The gradient is scaled by max / (norm + this), as in `clip_grad_norm_`.
const CLIP_EPS: f32 = 1e-6;

/// A trained parameter and its state.
#[derive(Clone, Copy, Debug)]
pub(super) struct State {
    pub(super) param: ParamId,
    /// Sum of gradients since the last step.
    pub(super) grad: ParamId,
    /// Running mean of gradients.
    m: ParamId,
    /// Running mean of squared gradients.
    v: ParamId,
}

/// Adds the state of a trained parameter to the graph, or finds it again.
pub(super) fn declare(g: &mut Graph, param: ParamId) -> State {
    let of = g.params[param.index()].clone();
    let mut state = |prefix: &str| {
        let name = format!("{prefix}.{}", of.name);
        g.find_param(&name)
            .unwrap_or_else(|| g.add_param(Param { name, ty: of.ty.clone(), role: Role::State, source: Source::Zeros }))
    };
    State { param, grad: state("grad"), m: state("adam.m"), v: state("adam.v") }
}

/// The entry. Inputs f32 []: `lr`, `beta1`, `beta2`, `eps`, `weight_decay`, `correction1` = 1 - beta1^t, `correction2` =
/// 1 - beta2^t, `max_grad_norm` (infinity: no clipping). Output `grad_norm` f32 [], before clipping.
pub(super) fn entry(params: &[Param], states: &[State]) -> Result<Entry, IrError> {
    let mut t = Tape::new(params, UPDATE);
    let (lr, beta1, beta2) = (t.input("lr")?, t.input("beta1")?, t.input("beta2")?);
    let (eps, decay) = (t.input("eps")?, t.input("weight_decay")?);
    let (correction1, correction2) = (t.input("correction1")?, t.input("correction2")?);
    let most = t.input("max_grad_norm")?;
    let one = t.number(1.0)?;
    let (rest1, rest2) = (t.sub(one, beta1)?, t.sub(one, beta2)?);
    let step = t.div(lr, correction1)?;
    let root2 = t.unary(UnaryOp::Sqrt, correction2)?;
    let lost = t.mul(lr, decay)?;
    let kept = t.sub(one, lost)?;

    let mut squares = vec![];
    let mut gradients = vec![];
    for s in states {
        let g = t.push(Op::Param(s.grad), &[])?;
        let square = t.mul(g, g)?;
        squares.push(t.sum_to(square, &[])?);
        gradients.push(g);
    }
    let total = if let [only] = squares[..] { only } else { t.push(Op::Add, &squares)? };
    let norm = t.unary(UnaryOp::Sqrt, total)?;
    let small = t.number(CLIP_EPS)?;
    let shifted = t.add(norm, small)?;
    let clip = t.div(most, shifted)?;
    let clip = t.binary(BinaryOp::Min, one, clip)?;

    let mut assigns = vec![];
    for (s, g) in states.iter().zip(gradients) {
        let (p, m, v) = (t.push(Op::Param(s.param), &[])?, t.push(Op::Param(s.m), &[])?, t.push(Op::Param(s.v), &[])?);
        let g = t.mul(g, clip)?;
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
        let p = t.mul(p, kept)?;
        let p = t.sub(p, change)?;
        let shape = params[s.param.index()].ty.shape.clone();
        let clear = t.zeros(&shape)?;
        assigns.extend([(s.param, p), (s.m, m), (s.v, v), (s.grad, clear)]);
    }
    let mut e = t.finish();
    e.output("grad_norm", norm);
    assigns.into_iter().for_each(|(p, v)| e.assign(p, v));
    Ok(e)
}
