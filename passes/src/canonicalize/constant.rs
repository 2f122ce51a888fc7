//! Folding of tiny constants.
//!
//! Only operators whose result is the same on every machine are folded: arithmetic, comparison, logic, conversion.
//! Functions of a math library (`exp`, `sin`, …) and integer results that do not fit stay as they are.

use pleach_ir::{BinaryOp, DType, Entry, Op, TensorType, UnaryOp, ValueId};

/// Elements of the largest constant that is folded.
pub const MAX_FOLD: u64 = 64;

/// One constant element.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Element {
    /// Element type.
    pub dtype: DType,
    /// Bits, as in [`Op::Const`].
    pub bits: u32,
}

impl Element {
    /// True if the element is a number equal to `k` (zero of either sign is zero).
    pub fn is(self, k: f32) -> bool {
        match self.dtype {
            DType::F32 => f32::from_bits(self.bits) == k,
            DType::I32 => self.bits as i32 as f32 == k,
            DType::BF16 => f32::from_bits(self.bits << 16) == k,
            // only 0 and 1 are asked for
            DType::F16 => (k == 0.0 && self.bits & 0x7fff == 0) || (k == 1.0 && self.bits == 0x3c00),
            DType::Bool => false,
        }
    }
}

/// The one element that `v` repeats, if `v` is a constant of equal elements or a broadcast of one.
pub fn splat(e: &Entry, v: ValueId) -> Option<Element> {
    let n = e.node(v);
    match &n.op {
        Op::Const { dtype, bits, .. } => {
            let first = *bits.first()?;
            bits.iter().all(|b| *b == first).then_some(Element { dtype: *dtype, bits: first })
        }
        Op::Broadcast { .. } => splat(e, n.inputs[0]),
        _ => None,
    }
}

/// The constant equal to `op` on these operands, if they are constants and the result is tiny.
pub fn fold(e: &Entry, ty: &TensorType, op: &Op, x: &[ValueId]) -> Option<Op> {
    let n = ty.static_elements().filter(|n| *n <= MAX_FOLD)?;
    let shape: Vec<u64> = ty.shape.iter().map(|d| d.known()).collect::<Option<_>>()?;
    let consts: Vec<(DType, &[u32])> = x
        .iter()
        .map(|&v| match &e.node(v).op {
            Op::Const { dtype, bits, .. } => Some((*dtype, &bits[..])),
            _ => None,
        })
        .collect::<Option<_>>()?;
    let (dtype, first) = *consts.first()?;
    if let Op::Reshape(_) = op {
        return Some(Op::Const { dtype, shape, bits: first.to_vec() });
    }
    if let Op::Slice { axis: 0, start, end } = op {
        let row: u64 = shape[1..].iter().product();
        let bits = first.get((start * row) as usize..(end * row) as usize)?.to_vec();
        return Some(Op::Const { dtype, shape, bits });
    }
    if !matches!(op, Op::Unary(_) | Op::Binary(_) | Op::Add | Op::Select | Op::Cast(_)) {
        return None;
    }
    // rank 0 has one element and stands for its value everywhere
    let at = |k: usize, i: u64| {
        let b = consts[k].1;
        if b.len() == 1 { b.first().copied() } else { b.get(i as usize).copied() }
    };
    let mut bits = vec![];
    for i in 0..n {
        let v: Vec<u32> = (0..consts.len()).map(|k| at(k, i)).collect::<Option<_>>()?;
        bits.push(match op {
            Op::Unary(u) => unary(*u, dtype, v[0])?,
            Op::Binary(b) => binary(*b, dtype, v[0], v[1])?,
            Op::Add => v[1..].iter().try_fold(v[0], |a, b| plus(dtype, a, *b))?,
            Op::Select => {
                if v[0] != 0 {
                    v[1]
                } else {
                    v[2]
                }
            }
            Op::Cast(to) => cast(dtype, *to, v[0])?,
            _ => return None,
        });
    }
    Some(Op::Const { dtype: ty.dtype, shape, bits })
}

fn plus(t: DType, a: u32, b: u32) -> Option<u32> {
    match t {
        DType::F32 => Some((f32::from_bits(a) + f32::from_bits(b)).to_bits()),
        DType::I32 => (a as i32).checked_add(b as i32).map(|x| x as u32),
        _ => None,
    }
}

fn unary(u: UnaryOp, t: DType, a: u32) -> Option<u32> {
    let f = f32::from_bits(a);
    Some(match (t, u) {
        (DType::F32, UnaryOp::Neg) => (-f).to_bits(),
        (DType::F32, UnaryOp::Abs) => f.abs().to_bits(),
        (DType::F32, UnaryOp::Sqrt) => f.sqrt().to_bits(),
        (DType::F32, UnaryOp::Recip) => (1.0 / f).to_bits(),
        (DType::F32, UnaryOp::Floor) => f.floor().to_bits(),
        (DType::I32, UnaryOp::Neg) => (a as i32).checked_neg()? as u32,
        (DType::I32, UnaryOp::Abs) => (a as i32).checked_abs()? as u32,
        (DType::Bool, UnaryOp::Not) => u32::from(a == 0),
        _ => return None,
    })
}

fn binary(op: BinaryOp, t: DType, a: u32, b: u32) -> Option<u32> {
    match t {
        DType::F32 => {
            let (x, y) = (f32::from_bits(a), f32::from_bits(b));
            Some(match op {
                BinaryOp::Sub => (x - y).to_bits(),
                BinaryOp::Mul => (x * y).to_bits(),
                BinaryOp::Div => (x / y).to_bits(),
                BinaryOp::Max if x > y => a,
                BinaryOp::Max if y > x => b,
                BinaryOp::Min if x < y => a,
                BinaryOp::Min if y < x => b,
                BinaryOp::Lt => u32::from(x < y),
                BinaryOp::Le => u32::from(x <= y),
                BinaryOp::Eq => u32::from(x == y),
                _ => return None,
            })
        }
        DType::I32 => {
            let (x, y) = (a as i32, b as i32);
            Some(match op {
                BinaryOp::Sub => x.checked_sub(y)? as u32,
                BinaryOp::Mul => x.checked_mul(y)? as u32,
                BinaryOp::Max => x.max(y) as u32,
                BinaryOp::Min => x.min(y) as u32,
                BinaryOp::Lt => u32::from(x < y),
                BinaryOp::Le => u32::from(x <= y),
                BinaryOp::Eq => u32::from(x == y),
                _ => return None,
            })
        }
        DType::Bool => match op {
            BinaryOp::And => Some(a & b),
            BinaryOp::Or => Some(a | b),
            _ => None,
        },
        _ => None,
    }
}

fn cast(from: DType, to: DType, a: u32) -> Option<u32> {
    let small = |x: i32| x.unsigned_abs() <= 1 << 24;
    match (from, to) {
        (DType::I32, DType::F32) if small(a as i32) => Some((a as i32 as f32).to_bits()),
        (DType::F32, DType::I32) => {
            let x = f32::from_bits(a).trunc();
            (x.abs() <= (1 << 24) as f32).then_some(x as i32 as u32)
        }
        (DType::Bool, DType::F32) => Some((a as f32).to_bits()),
        (DType::Bool, DType::I32) => Some(a),
        _ => None,
    }
}
