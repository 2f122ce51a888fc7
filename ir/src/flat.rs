//! Kernels that make every element of a result from the elements of the same place of operands, and from numbers.
//!
//! Where the elements lie does not matter to such a kernel: it may be seen as one over flat memory, and kernels of different sizes
//! may stand side by side.

use crate::graph::ValueId;
use crate::op::Op;
use crate::schedule::Kernel;
use crate::types::Dim;

/// A part of a kernel that has nothing but numbers in common with the others: it writes over no operand that another one reads.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FlatPart {
    /// Its values in order, with the numbers that it reads.
    pub values: Vec<ValueId>,
    /// Its results, as positions among those of the kernel.
    pub roots: Vec<usize>,
    /// Elements of each of its results, at least 1.
    pub elements: u64,
}

/// The parts of a kernel, each of which is element-wise over static shapes that are one; `None` for any other kernel.
pub fn flat_parts(k: &Kernel) -> Option<Vec<FlatPart>> {
    let body = &k.body;
    let live = body.live();
    let mut of: Vec<usize> = (0..body.nodes.len()).collect();
    let mut shapes: Vec<Option<&[Dim]>> = vec![None; body.nodes.len()];
    let number = |v: ValueId| body.ty(v).rank() == 0;
    let given = |v: ValueId| number(v) && matches!(body.node(v).op, Op::Input { .. });
    for v in body.values().filter(|v| live[v.index()]) {
        let n = body.node(v);
        let fits = match &n.op {
            Op::Input { .. } => true,
            Op::Const { bits, .. } => bits.iter().all(|b| *b == bits[0]),
            Op::Broadcast { .. } => number(n.inputs[0]),
            op => op.is_elementwise(),
        };
        if !fits || !n.ty.symbols().is_empty() {
            return None;
        }
        let own = top(&mut of, v.index());
        shapes[own] = Some(n.ty.shape.as_slice()).filter(|s| !s.is_empty());
        for i in n.inputs.iter().filter(|i| !given(**i)) {
            let (a, b) = (top(&mut of, i.index()), top(&mut of, v.index()));
            match (shapes[a], shapes[b]) {
                (Some(x), Some(y)) if x != y => return None,
                (x, y) => shapes[a] = x.or(y),
            }
            of[b] = a;
        }
    }
    // A result over an operand is written where others that read the operand are computed.
    let operands: Vec<ValueId> = body.inputs().iter().map(|x| x.0).collect();
    for (r, over) in body.roots.iter().zip(&k.aliases) {
        let Some(o) = over.and_then(|a| operands.get(a as usize)).filter(|o| live[o.index()]) else { continue };
        let (a, b) = (top(&mut of, o.index()), top(&mut of, r.value.index()));
        match (shapes[a], shapes[b]) {
            (Some(x), Some(y)) if x == y => of[b] = a,
            _ => return None,
        }
    }
    let mut parts: Vec<(usize, FlatPart)> = vec![];
    for (r, root) in body.roots.iter().enumerate() {
        let own = top(&mut of, root.value.index());
        match parts.iter_mut().find(|p| p.0 == own) {
            Some(p) => p.1.roots.push(r),
            None => {
                let mut known = shapes[own]?.iter().map(|d| d.known());
                let elements = known.try_fold(1u64, |n, d| n.checked_mul(d?)).filter(|n| *n > 0)?;
                parts.push((own, FlatPart { values: vec![], roots: vec![r], elements }));
            }
        }
        if number(root.value) {
            return None;
        }
    }
    let mut place = vec![usize::MAX; body.nodes.len()];
    parts.iter().enumerate().for_each(|(i, p)| place[p.0] = i);
    // The numbers that a part reads come before all of it, which keeps operands first.
    for v in body.values().filter(|v| live[v.index()] && !given(*v)) {
        let own = top(&mut of, v.index());
        let part = &mut parts.get_mut(place[own])?.1;
        for i in body.node(v).inputs.iter().filter(|i| given(**i)) {
            if !part.values.contains(i) {
                part.values.push(*i);
            }
        }
        part.values.push(v);
    }
    Some(parts.into_iter().map(|p| p.1).collect())
}

/// The first of those that a value hangs together with.
fn top(of: &mut [usize], mut v: usize) -> usize {
    while of[v] != v {
        of[v] = of[of[v]];
        v = of[v];
    }
    v
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::Entry;
    use crate::schedule::{Class, Layout};
    use crate::types::DType;

    fn kernel(body: &Entry) -> Kernel {
        let (n, r) = (body.inputs().len(), body.roots.len());
        let (operands, results) = (vec![Layout::RowMajor; n], vec![Layout::RowMajor; r]);
        Kernel { name: "k".into(), class: Class::Row, body: body.clone(), operands, results, aliases: vec![None; r] }
    }

    fn input(e: &mut Entry, n: usize, shape: &[u64]) -> ValueId {
        let shape = shape.iter().map(|d| Dim::Known(*d)).collect();
        e.push(&[], Op::Input { name: format!("a{n}"), dtype: DType::F32, shape }, &[]).unwrap()
    }

    #[test]
    fn parts_have_only_numbers_in_common() {
        let mut e = Entry::new("kernel");
        let s = input(&mut e, 0, &[]);
        let (x, y) = (input(&mut e, 1, &[3, 5]), input(&mut e, 2, &[7]));
        let one = e.push(&[], Op::f32(1.0), &[]).unwrap();
        let t = e.push(&[], Op::Add, &[one, s]).unwrap();
        let a = e.push(&[], Op::Binary(crate::BinaryOp::Mul), &[s, x]).unwrap();
        let b = e.push(&[], Op::Binary(crate::BinaryOp::Mul), &[t, y]).unwrap();
        e.output("r0", b);
        e.output("r1", a);
        let parts = flat_parts(&kernel(&e)).unwrap();
        assert_eq!(parts.len(), 2);
        assert_eq!(
            (parts[0].elements, parts[0].roots.clone(), parts[0].values.clone()),
            (7, vec![0], vec![y, one, s, t, b])
        );
        assert_eq!((parts[1].elements, parts[1].values.clone()), (15, vec![x, s, a]));
        // What is computed from numbers is not in common.
        let c = e.push(&[], Op::Binary(crate::BinaryOp::Mul), &[t, x]).unwrap();
        e.output("r2", c);
        assert!(flat_parts(&kernel(&e)).is_none());
    }

    #[test]
    fn what_is_written_over_belongs_to_its_readers() {
        let mut e = Entry::new("kernel");
        let (x, y) = (input(&mut e, 0, &[4]), input(&mut e, 1, &[4]));
        let a = e.push(&[], Op::Binary(crate::BinaryOp::Mul), &[x, y]).unwrap();
        let zero = e.push(&[], Op::f32(0.0), &[]).unwrap();
        let zeros = e.push(&[], Op::Broadcast { shape: vec![Dim::Known(4)], axes: vec![] }, &[zero]).unwrap();
        e.output("r0", a);
        e.output("r1", zeros);
        let mut k = kernel(&e);
        assert_eq!(flat_parts(&k).unwrap().len(), 2);
        k.aliases[1] = Some(1);
        assert_eq!(flat_parts(&k).unwrap().len(), 1);
    }

    #[test]
    fn what_reads_other_places_is_not_flat() {
        let mut e = Entry::new("kernel");
        let x = input(&mut e, 0, &[4, 4]);
        let y = e.push(&[], Op::Transpose(vec![1, 0]), &[x]).unwrap();
        e.output("r0", y);
        assert!(flat_parts(&kernel(&e)).is_none());
        let mut e = Entry::new("kernel");
        let x = input(&mut e, 0, &[4]);
        let y = e.push(&[], Op::Broadcast { shape: vec![Dim::Known(2), Dim::Known(4)], axes: vec![1] }, &[x]).unwrap();
        e.output("r0", y);
        assert!(flat_parts(&kernel(&e)).is_none());
        // A number is no element.
        let mut e = Entry::new("kernel");
        let s = input(&mut e, 0, &[]);
        e.output("r0", s);
        assert!(flat_parts(&kernel(&e)).is_none());
    }
}
