//! `differentiate`: the entry `train` becomes `accumulate` (forward and backward) and `update` (the optimizer).
//!
//! Reverse mode on the graph: every operator has a vector-Jacobian rule ([`rules`]) that writes plain operators. A
//! value gets a cotangent only if it depends on a parameter of role `Train` and the loss depends on it, so nothing is
//! computed below the lowest trained parameter. Cotangents are f32; that of a bf16 matrix over a counted dimension, an activation,
//! is rounded to bf16 once all its contributions are added up, since it is kept and read as those are.
//!
//! `accumulate` has the inputs and roots of `train` and, for every trained parameter `p` that the loss depends on,
//! assigns `grad.p := grad.p + dL/dp`; runs add up until `update` ([`update`]) steps and clears. New parameters:
//! `grad.p`, `adam.m.p`, `adam.v.p`, f32, role `State`, zeros at first. An entry `optimizer` says what a step does beside AdamW
//! ([`program`]); it becomes part of `update`.
//!
//! With the option `step_at_once` both become one entry `step` that adds nothing up and clips nothing: no `grad.p` exists, every
//! gradient is used up where it is made. It has the inputs of both and gives `loss` and `grad_norm`; a loss that is no number changes
//! nothing.
//! An entry `calibrate` becomes `accumulate` alone: its gradients are looked at, and nothing steps. Its parameters are `Frozen` afterwards.
//!
//! Assumes that `train` has one output `loss`, f32 of rank 0, and that the indices of a `scatter_set` whose update is
//! trained are distinct. Leaves alone: every other entry; the whole graph when there is no entry `train` or its loss
//! depends on no trained parameter. It knows roles only: neither methods nor models.

mod program;
mod rules;
mod sum;
mod tape;
#[cfg(test)]
mod tests;
mod update;

use crate::error::PassError;
use crate::manager::Report;
use crate::options::Options;
use crate::recompute;
use pleach_ir::{
    BinaryOp, DType, Entry, Graph, IrError, Op, Param, ParamId, Role, RootKind, Source, TensorType, UnaryOp, ValueId,
};
use std::collections::BTreeMap;
use std::sync::Arc;
use sum::Cotangent;
use tape::Tape;

const NAME: &str = "differentiate";

/// The entry that is differentiated.
pub const TRAIN: &str = "train";
/// The entry that is differentiated without a step.
pub const CALIBRATE: &str = "calibrate";
/// The entry that runs forward and backward and adds to the gradients.
pub const ACCUMULATE: &str = "accumulate";
/// The entry that steps the trained parameters and clears the gradients.
pub const UPDATE: &str = "update";
/// The entry that does both at once.
pub const STEP: &str = "step";
/// Inputs of `update`, and of `step` beside those of `accumulate`: the settings of the optimizer.
pub const SETTINGS: [&str; 8] = update::INPUTS;
/// The entry with what `update` does beside AdamW.
pub const OPTIMIZER: &str = "optimizer";

/// The pass.
///
/// # Errors
/// [`PassError::Refused`] when `train` has no scalar output `loss`, a trained parameter is not f32, or the loss depends
/// on one through an operator without a gradient; [`PassError::Build`] would be a fault of this pass.
pub fn run(g: &Graph, opts: &Options, report: &mut Report) -> Result<Graph, PassError> {
    let at = g.entries.iter().position(|e| [TRAIN, CALIBRATE].contains(&e.name.as_str()));
    let Some(at) = at else { return Ok(g.clone()) };
    let train = &g.entries[at];
    let steps = train.name == TRAIN;
    let loss = loss_of(train).ok_or_else(|| refused("the entry train needs one output \"loss\", f32 of rank 0"))?;
    let active = active(train, &g.params, loss);
    let trained = trained_params(train, &active);
    if trained.is_empty() {
        return Ok(g.clone());
    }
    for p in &trained {
        let p = &g.params[p.index()];
        if p.ty.dtype != DType::F32 {
            return Err(refused(&format!("{} is trained but {}; trained parameters are f32", p.name, p.ty)));
        }
    }
    if let Some(v) = train.values().find(|v| active[v.index()] && !rules::has_gradient(&train.node(*v).op)) {
        let n = train.node(v);
        let place = n.origin.as_deref().unwrap_or(TRAIN);
        return Err(refused(&format!("{} at {place} has no gradient; put a stop_gradient around it", n.op.name())));
    }

    let mut out = g.clone();
    let optimizer = g.entry(OPTIMIZER);
    let moments = |p: ParamId| program::output_type(optimizer?, &format!("grad.{}", g.params[p.index()].name));
    let measured = |p: ParamId| {
        let name = format!("measured.{}", g.params[p.index()].name);
        optimizer.is_some_and(|e| program::output_type(e, &name).is_some())
    };
    if trained.iter().all(|p| measured(*p)) {
        return Err(refused("every gradient is only measured; nothing would be trained"));
    }
    let at_once = opts.step_at_once && steps;
    let places: Vec<Option<Arc<str>>> = trained.iter().map(|p| place(train, *p)).collect();
    let has = |p: ParamId| update::Has { sums: !at_once, moments: steps && !measured(p) };
    let mut declare = |p: &ParamId| update::declare(&mut out, *p, moments(*p), has(*p));
    let states: Vec<update::State> = trained.iter().map(&mut declare).collect();
    let name = if at_once { STEP } else { ACCUMULATE };
    let fault = |e| PassError::build(NAME, name)(e);
    let b = backward(&out.params, train, loss, &active, (&states, &places), name).map_err(fault)?;
    let (first, second) = if at_once {
        let gradients = update::Gradients { values: b.gradients, squares: b.squares, loss: b.loss, roots: b.roots };
        let step = update::go_on(b.tape, &out.params, (&states, &places), optimizer, gradients);
        (step.map_err(fault)?, None)
    } else {
        let mut e = b.tape.finish();
        e.roots = b.roots;
        states.iter().zip(&b.gradients).for_each(|(s, v)| s.grad.into_iter().for_each(|g| e.assign(g, *v)));
        let update =
            || update::entry(&out.params, (&states, &places), optimizer).map_err(PassError::build(NAME, UPDATE));
        (e, if steps { Some(update()?) } else { None })
    };
    let first = recompute::lean(&out.params, &first, opts).map_err(fault)?;
    report.note = format!(
        "{} trained parameters; {} nodes forward, {} in all",
        states.len(),
        train.nodes.len(),
        first.nodes.len()
    );
    out.entries[at] = first;
    if !steps {
        trained.iter().for_each(|p| out.params[p.index()].role = Role::Frozen);
    }
    out.entries.retain(|e| e.name != OPTIMIZER);
    out.entries.extend(second);
    Ok(out)
}

fn refused(why: &str) -> PassError {
    PassError::Refused { pass: NAME.into(), why: why.into() }
}

/// The value of the output `loss`, if it is a scalar.
fn loss_of(e: &Entry) -> Option<ValueId> {
    let root = e.roots.iter().find(|r| r.kind == RootKind::Output("loss".into()))?;
    (*e.ty(root.value) == TensorType::scalar(DType::F32)).then_some(root.value)
}

/// Which values depend on a trained parameter by a way on which a gradient flows, and are needed by the loss on such a
/// way.
fn active(e: &Entry, params: &[Param], loss: ValueId) -> Vec<bool> {
    let mut up = vec![false; e.nodes.len()];
    for v in e.values() {
        let n = e.node(v);
        up[v.index()] = n.ty.dtype.is_float()
            && match &n.op {
                Op::Param(p) => params[p.index()].role == Role::Train,
                op => n.inputs.iter().enumerate().any(|(i, x)| rules::flows(op, i) && up[x.index()]),
            };
    }
    let mut down = vec![false; e.nodes.len()];
    down[loss.index()] = up[loss.index()];
    for v in e.values().rev().filter(|v| up[v.index()]) {
        if down[v.index()] {
            let n = e.node(v);
            for (_, x) in n.inputs.iter().enumerate().filter(|(i, x)| rules::flows(&n.op, *i) && up[x.index()]) {
                down[x.index()] = true;
            }
        }
    }
    down
}

/// Trained parameters with an active read, each once, in the order of parameters.
fn trained_params(e: &Entry, active: &[bool]) -> Vec<ParamId> {
    let read = |v: ValueId| if let Op::Param(p) = e.node(v).op { Some(p) } else { None };
    let mut all: Vec<ParamId> = e.values().filter(|v| active[v.index()]).filter_map(read).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Where a parameter belongs: the origin of what reads it first. Its gradient and its step belong there, too.
fn place(e: &Entry, param: ParamId) -> Option<Arc<str>> {
    let is = |v: &ValueId| e.node(*v).op == Op::Param(param);
    e.nodes.iter().find(|n| n.inputs.iter().any(is)).and_then(|n| n.origin.clone())
}

/// Forward and backward half under construction.
struct Backward<'a> {
    tape: Tape<'a>,
    /// The roots of `train`.
    roots: Vec<pleach_ir::Root>,
    loss: ValueId,
    /// Of each trained parameter; added to what is in its `grad.p`, if it has one.
    gradients: Vec<ValueId>,
    /// The sum of the gradient's squares, where there is no `grad.p`.
    squares: Vec<Option<ValueId>>,
}

fn backward<'a>(
    params: &'a [Param],
    train: &Entry,
    loss: ValueId,
    active: &[bool],
    (states, places): (&[update::State], &[Option<Arc<str>>]),
    name: &str,
) -> Result<Backward<'a>, IrError> {
    let mut tape = Tape::new(params, name);
    // the forward part, in which stop_gradient is done with
    let live = train.live();
    let mut map: Vec<ValueId> = Vec::with_capacity(train.nodes.len());
    for v in train.values() {
        let n = train.node(v);
        let inputs: Vec<ValueId> = n.inputs.iter().map(|i| map[i.index()]).collect();
        map.push(match n.op {
            _ if !live[v.index()] => ValueId(0),
            Op::StopGradient => inputs[0],
            _ => tape.at(n.origin.clone()).push(n.op.clone(), &inputs)?,
        });
    }
    let mut cotangents: Vec<Vec<Cotangent>> = vec![vec![]; train.nodes.len()];
    tape.at(train.node(loss).origin.clone());
    let seed = tape.number(1.0)?;
    cotangents[loss.index()].push(Cotangent::Dense(seed));
    let mut of_param: BTreeMap<ParamId, Vec<Cotangent>> = BTreeMap::new();
    // Reads of each parameter that are still to come.
    let mut reads: BTreeMap<ParamId, usize> = BTreeMap::new();
    for v in train.values().filter(|v| active[v.index()]) {
        if let Op::Param(p) = train.node(v).op {
            *reads.entry(p).or_default() += 1;
        }
    }
    let (mut gradients, mut squares) = (vec![None; states.len()], vec![None; states.len()]);
    for v in train.values().rev().filter(|v| active[v.index()]) {
        let parts = std::mem::take(&mut cotangents[v.index()]);
        let n = train.node(v);
        if let Op::Param(p) = n.op {
            of_param.entry(p).or_default().extend(parts);
            let left = reads.entry(p).or_default();
            *left = left.saturating_sub(1);
            if let Some(i) = states.iter().position(|s| s.param == p && s.grad.is_none()).filter(|_| *left == 0) {
                // Used up as soon as it is whole.
                let parts = of_param.remove(&p).unwrap_or_default();
                tape.at(places[i].clone());
                let g = sum::total(&mut tape, parts, &params[p.index()].ty, None)?;
                let square = tape.mul(g, g)?;
                squares[i] = Some(tape.sum_to(square, &[])?);
                gradients[i] = Some(g);
            }
            continue;
        }
        tape.at(n.origin.clone());
        let mut dy = sum::total(&mut tape, parts, &n.ty, None)?;
        if n.ty.dtype == DType::BF16 && n.ty.rank() >= 2 && n.ty.shape.iter().any(|d| d.known().is_none()) {
            let short = tape.cast(dy, DType::BF16)?;
            dy = tape.cast(short, DType::F32)?;
        }
        let site = rules::Site {
            op: &n.op,
            x: n.inputs.iter().map(|i| map[i.index()]).collect(),
            wanted: n.inputs.iter().enumerate().map(|(i, x)| rules::flows(&n.op, i) && active[x.index()]).collect(),
            y: map[v.index()],
        };
        for (i, c) in rules::vjp(&mut tape, &site, dy)? {
            cotangents[n.inputs[i].index()].push(c);
        }
    }
    let mut all = vec![];
    for ((s, place), g) in states.iter().zip(places).zip(gradients) {
        all.push(match g {
            Some(g) => g,
            None => {
                tape.at(place.clone());
                let parts = of_param.remove(&s.param).unwrap_or_default();
                let old = s.grad.map(|g| tape.push(Op::Param(g), &[])).transpose()?;
                sum::total(&mut tape, parts, &params[s.param.index()].ty, old)?
            }
        });
    }
    tape.at(None);
    let root = |r: &pleach_ir::Root| pleach_ir::Root { kind: r.kind.clone(), value: map[r.value.index()] };
    Ok(Backward {
        roots: train.roots.iter().map(root).collect(),
        loss: map[loss.index()],
        gradients: all,
        squares,
        tape,
    })
}
