//! Identities of single operators, each true for every value of the operands.
//!
//! A step looks at one operator and the operators right under it and answers with an existing value or one simpler
//! node; [`super::Builder::make`] repeats it and checks that the type stays. Nothing here adds arithmetic.

use super::constant;
use pleach_ir::{BinaryOp, DType, Dim, Entry, Op, TensorType, UnaryOp, ValueId};

/// The answer of one step.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Simpler {
    /// Nothing to do.
    No,
    /// An existing value is equal.
    Value(ValueId),
    /// One node over existing values is equal and simpler.
    Node(Op, Vec<ValueId>),
}

use Simpler::{No, Node, Value};

/// Sorts the operands of commutative operators: rank 0 first, then by id; in sums by id alone.
pub fn sort_operands(e: &Entry, op: &Op, inputs: &mut [ValueId]) {
    match op {
        Op::Add => inputs.sort_unstable(),
        Op::Binary(BinaryOp::Mul | BinaryOp::Eq | BinaryOp::And | BinaryOp::Or) => {
            inputs.sort_unstable_by_key(|&v| (e.ty(v).rank() > 0, v));
        }
        _ => {}
    }
}

/// One step towards a simpler form of `op` on these operands, whose type is `ty`.
pub fn simplify(e: &Entry, ty: &TensorType, op: &Op, x: &[ValueId]) -> Simpler {
    if let Some(c) = constant::fold(e, ty, op, x) {
        return Node(c, vec![]);
    }
    match op {
        // An entry `train` keeps it until its gradient is made.
        Op::StopGradient if e.name != "train" => Value(x[0]),
        Op::Unary(u) => unary(e, *u, x[0]),
        Op::Binary(b) => binary(e, ty, *b, x),
        Op::Add => add(e, ty, x),
        Op::Select => select(e, ty, x),
        Op::Cast(d) if e.ty(x[0]).dtype == *d => Value(x[0]),
        Op::Cast(d) if widened(e, x[0]) == Some(*d) => Value(e.node(x[0]).inputs[0]),
        Op::MatMul { ta, tb } => matmul(e, *ta, *tb, x),
        Op::Reshape(shape) => match &e.node(x[0]).op {
            _ if e.ty(x[0]).shape == *shape => Value(x[0]),
            Op::Reshape(_) => Node(op.clone(), e.node(x[0]).inputs.clone()),
            _ => No,
        },
        Op::Transpose(perm) => match &e.node(x[0]).op {
            _ if perm.iter().enumerate().all(|(i, p)| i == *p as usize) => Value(x[0]),
            Op::Transpose(first) => {
                let both = perm.iter().map(|p| first[*p as usize]).collect();
                Node(Op::Transpose(both), e.node(x[0]).inputs.clone())
            }
            _ => No,
        },
        Op::Broadcast { shape, axes } => match &e.node(x[0]).op {
            _ if e.ty(x[0]).shape == *shape => Value(x[0]),
            Op::Broadcast { axes: first, .. } => {
                let both = first.iter().map(|a| axes[*a as usize]).collect();
                Node(Op::Broadcast { shape: shape.clone(), axes: both }, e.node(x[0]).inputs.clone())
            }
            _ => No,
        },
        Op::Slice { axis, start, end } => slice(e, *axis, *start, *end, x[0]),
        Op::Pad { lo: 0, hi: 0, .. } => Value(x[0]),
        Op::Gather { axis } => gather(e, *axis, x),
        Op::Concat { axis } => concat(e, *axis, x),
        _ => No,
    }
}

/// The float type that `v` was before it was cast up to f32: casting it back gives every value unchanged.
fn widened(e: &Entry, v: ValueId) -> Option<DType> {
    let n = e.node(v);
    let from = e.ty(*n.inputs.first()?).dtype;
    (n.op == Op::Cast(DType::F32) && from.is_float()).then_some(from)
}

fn unary(e: &Entry, u: UnaryOp, x: ValueId) -> Simpler {
    let n = e.node(x);
    match (u, &n.op) {
        (UnaryOp::Neg, Op::Unary(UnaryOp::Neg)) | (UnaryOp::Not, Op::Unary(UnaryOp::Not)) => Value(n.inputs[0]),
        (UnaryOp::Abs, Op::Unary(UnaryOp::Abs)) => Value(x),
        (UnaryOp::Abs, Op::Unary(UnaryOp::Neg)) => Node(Op::Unary(UnaryOp::Abs), n.inputs.clone()),
        _ => No,
    }
}

/// A rank-0 value that `v` repeats everywhere, if it is a broadcast of one.
fn repeated(e: &Entry, v: ValueId) -> Option<ValueId> {
    let n = e.node(v);
    (matches!(n.op, Op::Broadcast { .. }) && e.ty(n.inputs[0]).rank() == 0).then(|| n.inputs[0])
}

/// The operands of an element-wise operator before they are spread over more axes, all in the same way, and that way: what becomes of
/// them is computed once and spread then.
pub fn before_spread(e: &Entry, ty: &TensorType, op: &Op, x: &[ValueId]) -> Option<(Vec<u8>, Vec<ValueId>)> {
    if !op.is_elementwise() || ty.rank() == 0 {
        return None;
    }
    let mut spread: Option<(&[u8], &[Dim])> = None;
    let mut few = vec![];
    for &v in x {
        let n = e.node(v);
        let from = if e.ty(v).rank() == 0 { Some(v) } else { repeated(e, v) };
        few.push(match (&n.op, from) {
            (_, Some(scalar)) => scalar,
            (Op::Broadcast { axes, .. }, None) => {
                let shape = &e.ty(n.inputs[0]).shape[..];
                if *spread.get_or_insert((axes, shape)) != (axes, shape) {
                    return None;
                }
                n.inputs[0]
            }
            _ => return None,
        });
    }
    Some((spread.map_or(vec![], |s| s.0.to_vec()), few))
}

/// Rank-0 values in place of their broadcasts, as long as another operand still has the full shape.
fn unbroadcast(e: &Entry, ty: &TensorType, op: &Op, x: &[ValueId]) -> Option<Simpler> {
    let full = |v: ValueId| e.ty(v).shape == ty.shape && repeated(e, v).is_none();
    if ty.rank() == 0 || !x.iter().any(|&v| full(v)) || !x.iter().any(|&v| repeated(e, v).is_some()) {
        return None;
    }
    Some(Node(op.clone(), x.iter().map(|&v| repeated(e, v).unwrap_or(v)).collect()))
}

fn binary(e: &Entry, ty: &TensorType, b: BinaryOp, x: &[ValueId]) -> Simpler {
    if let Some(s) = unbroadcast(e, ty, &Op::Binary(b), x) {
        return s;
    }
    let is = |v: ValueId, k: f32| constant::splat(e, v).is_some_and(|c| c.is(k));
    let like = |v: ValueId| e.ty(v) == ty;
    match b {
        BinaryOp::Mul if is(x[0], 1.0) && like(x[1]) => Value(x[1]),
        BinaryOp::Mul | BinaryOp::Div if is(x[1], 1.0) && like(x[0]) => Value(x[0]),
        BinaryOp::Sub if is(x[1], 0.0) && like(x[0]) => Value(x[0]),
        BinaryOp::Max | BinaryOp::Min | BinaryOp::And | BinaryOp::Or if x[0] == x[1] => Value(x[0]),
        _ => No,
    }
}

fn add(e: &Entry, ty: &TensorType, x: &[ValueId]) -> Simpler {
    if let Some(s) = unbroadcast(e, ty, &Op::Add, x) {
        return s;
    }
    let zero = |v: ValueId| constant::splat(e, v).is_some_and(|c| c.is(0.0));
    if let Some(k) = x.iter().position(|&v| zero(v)) {
        let mut rest = x.to_vec();
        rest.remove(k);
        return if let [one] = rest[..] { Value(one) } else { Node(Op::Add, rest) };
    }
    No
}

fn select(e: &Entry, ty: &TensorType, x: &[ValueId]) -> Simpler {
    if x[1] == x[2] {
        return Value(x[1]);
    }
    match constant::splat(e, x[0]).map(|c| c.bits != 0) {
        Some(true) => Value(x[1]),
        Some(false) => Value(x[2]),
        None => unbroadcast(e, ty, &Op::Select, x).unwrap_or(No),
    }
}

/// A transpose of the last two axes under a product is a flag of the product.
fn matmul(e: &Entry, ta: bool, tb: bool, x: &[ValueId]) -> Simpler {
    let under = |v: ValueId| {
        let n = e.node(v);
        let Op::Transpose(p) = &n.op else { return None };
        let r = p.len();
        let swaps = r >= 2
            && p[..r - 2].iter().enumerate().all(|(i, a)| i == *a as usize)
            && (p[r - 2] as usize, p[r - 1] as usize) == (r - 1, r - 2);
        swaps.then(|| n.inputs[0])
    };
    match (under(x[0]), under(x[1])) {
        (Some(a), _) => Node(Op::MatMul { ta: !ta, tb }, vec![a, x[1]]),
        (_, Some(b)) => Node(Op::MatMul { ta, tb: !tb }, vec![x[0], b]),
        _ => No,
    }
}

fn width(e: &Entry, v: ValueId, axis: u8) -> Option<u64> {
    e.ty(v).shape.get(axis as usize).copied().and_then(Dim::known)
}

fn slice(e: &Entry, axis: u8, start: u64, end: u64, x: ValueId) -> Simpler {
    if start == 0 && width(e, x, axis) == Some(end) {
        return Value(x);
    }
    let n = e.node(x);
    match &n.op {
        Op::Slice { axis: a, start: s, .. } if *a == axis => {
            Node(Op::Slice { axis, start: s + start, end: s + end }, n.inputs.clone())
        }
        Op::Concat { axis: a } if *a == axis => {
            let mut at = 0;
            for &m in &n.inputs {
                let Some(w) = width(e, m, axis) else { return No };
                if start >= at && end <= at + w {
                    return Node(Op::Slice { axis, start: start - at, end: end - at }, vec![m]);
                }
                at += w;
            }
            No
        }
        _ => No,
    }
}

/// The first elements of an axis, picked one by one.
fn gather(e: &Entry, axis: u8, x: &[ValueId]) -> Simpler {
    let (index, whole) = (e.node(x[1]), width(e, x[0], axis));
    match (&index.op, index.ty.shape.first().and_then(|d| d.known()), whole) {
        (Op::Iota { axis: 0, .. }, Some(n), Some(whole)) if (1..=whole).contains(&n) => {
            Node(Op::Slice { axis, start: 0, end: n }, vec![x[0]])
        }
        _ => No,
    }
}

fn concat(e: &Entry, axis: u8, x: &[ValueId]) -> Simpler {
    if let [one] = x {
        return Value(*one);
    }
    let nested = |v: ValueId| e.node(v).op == Op::Concat { axis };
    if x.iter().any(|&v| nested(v)) {
        let flat = x.iter().flat_map(|&v| if nested(v) { e.node(v).inputs.clone() } else { vec![v] }).collect();
        return Node(Op::Concat { axis }, flat);
    }
    // neighbouring parts of one value are one part
    let part = |v: ValueId| match e.node(v).op {
        Op::Slice { axis: a, start, end } if a == axis => Some((e.node(v).inputs[0], start, end)),
        _ => None,
    };
    let parts: Option<Vec<_>> = x.iter().map(|&v| part(v)).collect();
    match parts {
        Some(p) if p.windows(2).all(|w| w[0].0 == w[1].0 && w[0].2 == w[1].1) => {
            Node(Op::Slice { axis, start: p[0].1, end: p[p.len() - 1].2 }, vec![p[0].0])
        }
        _ => No,
    }
}
