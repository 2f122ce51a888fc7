//! The reference interpreter: the one place where the meaning of every operator is written.
//!
//! It is plain and accurate rather than fast: elementwise arithmetic is that of the element type (functions such as
//! `exp` are computed in f64 and rounded once), products, sums and attention accumulate in f64 and round once. The same
//! code runs an entry of a graph ([`run_entry`]), the body of one kernel ([`run_kernel`]) and a whole schedule
//! ([`run_schedule`]), so each stage of the compiler can be compared with the stage before.
//!
//! Symbols take their values from the shapes of the tensors that are given; a symbol with two values is an error.
//! Only values that a root needs are computed. Wrong input never panics.

mod attention;
mod contract;
mod elementwise;
mod half;
mod movement;
mod schedule;
mod tensor;
#[cfg(test)]
mod tests;

pub use half::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
pub use schedule::{run_kernel, run_kernel_with, run_schedule, run_schedule_with};
pub use tensor::{Data, Tensor};

use crate::error::IrError;
use crate::graph::{Entry, Param, ParamId, RootKind, ValueId};
use crate::op::Op;
use crate::types::{DType, Dim, Sym, TensorType};
use std::borrow::Cow;
use std::collections::BTreeMap;

/// Values of symbolic counts.
pub type Symbols = BTreeMap<Sym, u64>;

/// The largest tensor that the interpreter computes, in elements.
pub const MAX_ELEMENTS: u64 = 1 << 30;

/// What a run leaves.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct RunResult {
    /// Outputs by name.
    pub outputs: BTreeMap<String, Tensor>,
    /// New values of parameters, in the order of the entry's roots.
    pub assigns: Vec<(ParamId, Tensor)>,
}

/// Runs an entry. `values` gives the value of each parameter that the entry reads; `inputs` are found by name, and
/// inputs that the entry does not have are left alone.
///
/// # Errors
/// [`IrError::Interpret`] when a value is missing or does not fit its type, a symbol has no value or two, an index or
/// segment is out of range, or an integer is divided by zero.
pub fn run_entry<'a>(
    params: &[Param],
    values: &dyn Fn(ParamId) -> Option<&'a Tensor>,
    entry: &Entry,
    inputs: &'a BTreeMap<String, Tensor>,
) -> Result<RunResult, IrError> {
    run_entry_with(params, values, entry, inputs, &Symbols::new())
}

/// As [`run_entry`], with the values of symbols that no given tensor has in its shape (capacities such as `P`).
///
/// # Errors
/// As [`run_entry`].
pub fn run_entry_with<'a>(
    params: &[Param],
    values: &dyn Fn(ParamId) -> Option<&'a Tensor>,
    entry: &Entry,
    inputs: &'a BTreeMap<String, Tensor>,
    symbols: &Symbols,
) -> Result<RunResult, IrError> {
    let mut env = symbols.clone();
    bind_params(&mut env, params, values)?;
    for (_, op) in entry.values().map(|v| (v, &entry.node(v).op)) {
        if let Op::Input { name, dtype, shape } = op
            && let Some(t) = inputs.get(name)
        {
            let ty = TensorType { dtype: *dtype, shape: shape.clone() };
            bind(&mut env, t, &ty).map_err(|why| fail(format!("input \"{name}\": {why}")))?;
        }
    }
    close(&mut env)?;
    let leaf = |op: &Op| match op {
        Op::Param(p) => values(*p).ok_or_else(|| match params.get(p.index()) {
            Some(q) => format!("parameter {p} \"{}\" has no value", q.name),
            None => format!("there is no parameter {p}"),
        }),
        Op::Input { name, .. } => inputs.get(name).ok_or_else(|| format!("input \"{name}\" is missing")),
        _ => Err("not a leaf".into()),
    };
    let mut result = RunResult::default();
    for (root, t) in entry.roots.iter().zip(evaluate(entry, &env, &leaf)?) {
        match &root.kind {
            RootKind::Output(name) => {
                result.outputs.insert(name.clone(), t);
            }
            RootKind::Assign(p) => result.assigns.push((*p, t)),
        }
    }
    Ok(result)
}

fn fail(why: String) -> IrError {
    IrError::Interpret(why)
}

/// Binds symbols from the parameters that have a value, and checks these values against their types.
fn bind_params<'a>(
    env: &mut Symbols,
    params: &[Param],
    values: &dyn Fn(ParamId) -> Option<&'a Tensor>,
) -> Result<(), IrError> {
    for (i, p) in params.iter().enumerate() {
        let id = ParamId(i as u32);
        if let Some(t) = values(id) {
            bind(env, t, &p.ty).map_err(|why| fail(format!("parameter {id} \"{}\": {why}", p.name)))?;
        }
    }
    Ok(())
}

/// Checks a tensor against a type and notes what its shape says about symbols.
fn bind(env: &mut Symbols, t: &Tensor, ty: &TensorType) -> Result<(), String> {
    t.check()?;
    if t.dtype() != ty.dtype || t.shape.len() != ty.rank() {
        return Err(format!("is {}, expected {ty}", t.describe()));
    }
    for (n, d) in t.shape.iter().zip(&ty.shape) {
        match d {
            Dim::Known(k) if k == n => {}
            Dim::Known(_) => return Err(format!("is {}, expected {ty}", t.describe())),
            Dim::Symbol(s) => {
                let old = *env.entry(*s).or_insert(*n);
                if old != *n {
                    return Err(format!("is {}, expected {ty} with {s} = {old}", t.describe()));
                }
            }
        }
    }
    Ok(())
}

/// `S1` is `S` + 1: one gives the other.
fn close(env: &mut Symbols) -> Result<(), IrError> {
    match (env.get(&Sym::S).copied(), env.get(&Sym::S1).copied()) {
        (Some(s), None) => {
            env.insert(Sym::S1, s.saturating_add(1));
        }
        (None, Some(s1)) if s1 > 0 => {
            env.insert(Sym::S, s1 - 1);
        }
        (Some(s), Some(s1)) if s.checked_add(1) != Some(s1) => {
            return Err(fail(format!("S1 is {s1} and S is {s}; S1 must be S + 1")));
        }
        _ => {}
    }
    Ok(())
}

/// The numbers of a shape.
fn shape_of(shape: &[Dim], env: &Symbols) -> Result<Vec<u64>, String> {
    let get = |d: &Dim| d.eval(&|s| env.get(&s).copied()).ok_or_else(|| format!("symbol {d} has no value"));
    let out = shape.iter().map(get).collect::<Result<Vec<u64>, String>>()?;
    if small(&out) { Ok(out) } else { Err(format!("a tensor of shape {out:?} is too large to interpret")) }
}

/// No product of dimensions is large, not even beside an axis of length 0.
fn small(shape: &[u64]) -> bool {
    shape.iter().try_fold(1u64, |n, d| n.checked_mul((*d).max(1))).is_some_and(|n| n <= MAX_ELEMENTS)
}

/// Computes every root. `leaf` gives inputs and parameters.
fn evaluate<'a>(
    entry: &Entry,
    env: &Symbols,
    leaf: &dyn Fn(&Op) -> Result<&'a Tensor, String>,
) -> Result<Vec<Tensor>, IrError> {
    let live = entry.live();
    let mut last_use = vec![0usize; entry.nodes.len()];
    for v in entry.values().filter(|v| live[v.index()]) {
        for i in &entry.node(v).inputs {
            last_use[i.index()] = v.index();
        }
    }
    for r in &entry.roots {
        last_use[r.value.index()] = usize::MAX;
    }
    let mut values: Vec<Option<Cow<'a, Tensor>>> = vec![None; entry.nodes.len()];
    for v in entry.values().filter(|v| live[v.index()]) {
        let node = entry.node(v);
        let at = |why: String| fail(format!("{v} = {}: {why}", node.op.name()));
        let shape = shape_of(&node.ty.shape, env).map_err(at)?;
        let t = match &node.op {
            Op::Input { .. } | Op::Param(_) => Cow::Borrowed(leaf(&node.op).map_err(at)?),
            op => {
                let x = operands(&values, &node.inputs).map_err(at)?;
                Cow::Owned(apply(op, &x, &shape).map_err(at)?)
            }
        };
        if t.dtype() != node.ty.dtype || t.shape != shape {
            return Err(at(format!("gave {}, but its type is {}", t.describe(), node.ty)));
        }
        values[v.index()] = Some(t);
        for i in &node.inputs {
            if last_use[i.index()] == v.index() {
                values[i.index()] = None;
            }
        }
    }
    let root = |v: ValueId| values[v.index()].as_deref().cloned().ok_or_else(|| fail(format!("{v} has no value")));
    entry.roots.iter().map(|r| root(r.value)).collect()
}

fn operands<'b>(values: &'b [Option<Cow<'_, Tensor>>], ids: &[ValueId]) -> Result<Vec<&'b Tensor>, String> {
    let one = |v: &ValueId| values.get(v.index()).and_then(Option::as_deref).ok_or_else(|| format!("{v} has no value"));
    ids.iter().map(one).collect()
}

/// One operator on tensors. `shape` is the shape of the result.
fn apply(op: &Op, x: &[&Tensor], shape: &[u64]) -> Result<Tensor, String> {
    let arity = match op {
        Op::Input { .. } | Op::Param(_) | Op::Const { .. } | Op::Iota { .. } => Some(0),
        Op::Add | Op::Concat { .. } => None,
        Op::Binary(_) | Op::MatMul { .. } | Op::Gather { .. } | Op::After => Some(2),
        Op::Select | Op::Scatter { .. } => Some(3),
        Op::Attention(_) => Some(6),
        Op::AttentionLse(_) => Some(5),
        Op::AttentionGrad { .. } => Some(9),
        _ => Some(1),
    };
    if x.is_empty() && arity != Some(0) || arity.is_some_and(|n| n != x.len()) {
        return Err(format!("got {} operands", x.len()));
    }
    match op {
        Op::Input { .. } | Op::Param(_) => Err("is given from outside".into()),
        Op::Const { dtype, bits, .. } => Ok(constant(*dtype, shape, bits)),
        Op::Iota { axis, .. } => iota(shape, *axis as usize),
        Op::Unary(u) => elementwise::unary(*u, x[0]),
        Op::Binary(b) => elementwise::binary(*b, x[0], x[1], shape),
        Op::Add => elementwise::add(x, shape),
        Op::Select => elementwise::select(x[0], x[1], x[2], shape),
        Op::Cast(d) => Ok(elementwise::cast(*d, x[0])),
        Op::MatMul { ta, tb } => contract::matmul(*ta, *tb, x[0], x[1]),
        Op::Reduce { op, axis } => contract::reduce(*op, *axis as usize, x[0]),
        Op::TopK { k, indices } => contract::top_k(*k as usize, *indices, x[0]),
        Op::Reshape(_) => Ok(Tensor { shape: shape.to_vec(), data: x[0].data.clone() }),
        Op::Transpose(perm) => movement::transpose(perm, x[0]),
        Op::Broadcast { axes, .. } => movement::broadcast(axes, x[0], shape),
        Op::Slice { axis, start, end } => movement::slice(*axis as usize, *start, *end, x[0]),
        Op::Pad { axis, lo, hi } => movement::pad(*axis as usize, *lo, *hi, x[0]),
        Op::Concat { axis } => movement::concat(*axis as usize, x),
        Op::Gather { axis } => movement::gather(*axis as usize, x[0], x[1]),
        Op::Scatter { axis, mode } => movement::scatter(*axis as usize, *mode, x[0], x[1], x[2]),
        Op::Attention(a) => attention::forward(a, x),
        Op::AttentionLse(a) => attention::lse(a, x),
        Op::AttentionGrad { attrs, wrt } => attention::gradient(attrs, *wrt, x),
        Op::After | Op::StopGradient => Ok(x[0].clone()),
    }
}

fn constant(dtype: DType, shape: &[u64], bits: &[u32]) -> Tensor {
    let half = || bits.iter().map(|b| *b as u16).collect();
    let data = match dtype {
        DType::F32 => Data::F32(bits.iter().map(|b| f32::from_bits(*b)).collect()),
        DType::BF16 => Data::BF16(half()),
        DType::F16 => Data::F16(half()),
        DType::I32 => Data::I32(bits.iter().map(|b| *b as i32).collect()),
        DType::Bool => Data::Bool(bits.iter().map(|b| u8::from(*b != 0)).collect()),
    };
    Tensor { shape: shape.to_vec(), data }
}

fn iota(shape: &[u64], axis: usize) -> Result<Tensor, String> {
    let n = *shape.get(axis).ok_or("the axis is out of range")?;
    let inner: u64 = shape[axis + 1..].iter().product();
    let total: u64 = shape.iter().product();
    let data = (0..total).map(|i| (i / inner % n) as i32).collect();
    Ok(Tensor { shape: shape.to_vec(), data: Data::I32(data) })
}
