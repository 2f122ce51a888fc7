//! Operands of products seen through movement operators: one address formula, no copy.

use pleach_ir::{Dim, Entry, Op, Sym, ValueId};

/// A distance in elements: a number times symbols. 0 repeats.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Stride {
    pub(crate) factor: u64,
    pub(crate) syms: Vec<Sym>,
}

impl Stride {
    pub(crate) const ONE: Stride = Stride { factor: 1, syms: vec![] };

    fn times(&self, d: Dim) -> Option<Stride> {
        let mut s = self.clone();
        match d {
            Dim::Known(n) => s.factor = s.factor.checked_mul(n)?,
            Dim::Symbol(x) => {
                s.syms.push(x);
                s.syms.sort_unstable();
            }
        }
        Some(s)
    }

    /// The number, when no symbol occurs.
    pub(crate) fn known(&self) -> Option<u64> {
        self.syms.is_empty().then_some(self.factor)
    }
}

/// Element `(i0, i1, …)` lies at `offset + Σ i·stride` of operand `arg`; along an axis that is picked, what an index says stands for `i`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct View {
    pub(crate) arg: usize,
    pub(crate) offset: Vec<(u64, Stride)>,
    pub(crate) strides: Vec<Stride>,
    pub(crate) picked: Option<Picked>,
}

/// Rows or columns that the indices of operand `arg` pick of `size`; what lies outside is moved to the nearest end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Picked {
    pub(crate) axis: usize,
    pub(crate) arg: usize,
    pub(crate) size: Dim,
}

impl View {
    /// The view with two axes exchanged.
    pub(crate) fn swap(&mut self, a: usize, b: usize) {
        self.strides.swap(a, b);
        if let Some(p) = &mut self.picked {
            p.axis = match p.axis {
                x if x == a => b,
                x if x == b => a,
                x => x,
            };
        }
    }
}

/// Strides of a dense row-major tensor.
pub(crate) fn dense(shape: &[Dim]) -> Option<Vec<Stride>> {
    let mut out = vec![Stride::ONE; shape.len()];
    for i in (0..shape.len().saturating_sub(1)).rev() {
        out[i] = out[i + 1].times(shape[i + 1])?;
    }
    Some(out)
}

/// The view that a value is of an operand.
///
/// # Errors
/// What stands in the way.
pub(crate) fn view(body: &Entry, args: &[Option<usize>], v: ValueId) -> Result<View, String> {
    let node = body.node(v);
    let of = |i: usize| view(body, args, node.inputs[i]);
    let big = || "an address does not fit 64 bits".to_string();
    // Movement of what is picked, where it leaves the picked axis alone.
    let moved = |x: &View, whole: bool| match x.picked {
        Some(_) if !whole => Err("a movement of picked rows or columns stands before a product".to_string()),
        _ => Ok(()),
    };
    match &node.op {
        Op::Input { .. } => {
            let arg = args[v.index()].ok_or("an operand is missing")?;
            Ok(View { arg, offset: vec![], strides: dense(&node.ty.shape).ok_or_else(big)?, picked: None })
        }
        Op::StopGradient => of(0),
        Op::Transpose(perm) => {
            let x = of(0)?;
            let axis = |p: Picked| perm.iter().position(|a| *a as usize == p.axis).map(|axis| Picked { axis, ..p });
            let strides = perm.iter().map(|p| x.strides[*p as usize].clone()).collect();
            Ok(View { strides, picked: x.picked.and_then(axis), ..x })
        }
        Op::Slice { axis, start, .. } => {
            let mut x = of(0)?;
            moved(&x, x.picked.is_none_or(|p| p.axis != usize::from(*axis)))?;
            if *start > 0 {
                x.offset.push((*start, x.strides[*axis as usize].clone()));
            }
            Ok(x)
        }
        Op::Broadcast { shape, axes } => {
            let x = of(0)?;
            moved(&x, false)?;
            let mut strides = vec![Stride { factor: 0, syms: vec![] }; shape.len()];
            for (a, s) in axes.iter().zip(x.strides) {
                strides[*a as usize] = s;
            }
            Ok(View { strides, ..x })
        }
        Op::Reshape(shape) => {
            let x = of(0)?;
            moved(&x, false)?;
            let strides = reshape(&body.ty(node.inputs[0]).shape, &x.strides, shape)
                .ok_or("a reshape that needs a copy stands before a product; put it into a kernel of its own")?;
            Ok(View { strides, ..x })
        }
        Op::Gather { axis } => {
            let x = of(0)?;
            moved(&x, false)?;
            let axis = usize::from(*axis);
            let size = body.ty(node.inputs[0]).shape[axis];
            let arg = args[node.inputs[1].index()].filter(|_| body.ty(node.inputs[1]).rank() == 1);
            let arg = arg.ok_or("indices before a product are no operand")?;
            Ok(View { picked: Some(Picked { axis, arg, size }), ..x })
        }
        other => {
            Err(format!("an operand of a product is computed by {}; it must be an operand of the kernel", other.name()))
        }
    }
}

/// Strides after a reshape of equal elements. Old and new axes are matched in the smallest groups of equal size; inside a
/// group the old axes must lie densely one in the other.
fn reshape(old: &[Dim], strides: &[Stride], new: &[Dim]) -> Option<Vec<Stride>> {
    let one = Dim::Known(1);
    let old: Vec<(Dim, &Stride)> = old.iter().copied().zip(strides).filter(|(d, _)| *d != one).collect();
    let mut out = vec![Stride::ONE; new.len()];
    let (mut i, mut j) = (0, 0);
    while i < old.len() {
        let (i0, j0) = (i, j);
        let (mut a, mut b) = (Stride::ONE, Stride::ONE);
        loop {
            // The side that is behind takes its next axis; symbols count as longer than any number.
            let size = |s: &Stride| (s.syms.len(), s.factor);
            if i == i0 || (a != b && size(&a) < size(&b)) {
                a = a.times(old.get(i)?.0)?;
                i += 1;
            } else if j == j0 || a != b {
                b = b.times(*new.get(j)?)?;
                j += 1;
            } else {
                break;
            }
        }
        for n in i0..i - 1 {
            if *old[n].1 != old[n + 1].1.times(old[n + 1].0)? {
                return None;
            }
        }
        let mut step = old[i - 1].1.clone();
        for n in (j0..j).rev() {
            out[n] = step.clone();
            step = step.times(new[n])?;
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reshapes_without_a_copy() {
        let k = |n: u64| Dim::Known(n);
        let s = |n: u64| Stride { factor: n, syms: vec![] };
        let t = Dim::Symbol(Sym::T);
        // A slice of 16 of 48 columns, split into heads.
        assert_eq!(reshape(&[t, k(16)], &[s(48), s(1)], &[t, k(2), k(8)]), Some(vec![s(48), s(8), s(1)]));
        // Joining its rows would need a copy.
        assert_eq!(reshape(&[k(4), k(16)], &[s(48), s(1)], &[k(64)]), None);
        assert_eq!(reshape(&[k(4), k(16)], &[s(16), s(1)], &[k(64)]), Some(vec![s(1)]));
        assert_eq!(reshape(&[k(4), k(1), k(6)], &[s(6), s(9), s(1)], &[k(8), k(3)]), Some(vec![s(3), s(1)]));
        assert_eq!(
            reshape(&[k(6)], &[s(5)], &[k(1), k(3), k(2), k(1)]).map(|v| v[1..3].to_vec()),
            Some(vec![s(10), s(5)])
        );
    }
}
