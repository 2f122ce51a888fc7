//! `expand`: operators that no kernel computes as they are become ones that kernels do.
//!
//! The k largest elements of a row: the place of an element is the number of elements before it (larger ones, and equal ones with a
//! smaller index), so places are a comparison of all pairs of a row and a sum; what has place j comes out by a selection and a sum. n² comparisons
//! for a row of n: meant for rows as short as ranks and experts, and refused for long ones.
//!
//! Assumes a graph that is differentiated. Leaves alone: everything else.

use crate::error::PassError;
use crate::manager::Report;
use crate::options::Options;
use pleach_ir::{BinaryOp, DType, Dim, Entry, Graph, IrError, Op, Param, ReduceOp, ValueId};
use std::sync::Arc;

const NAME: &str = "expand";

/// The longest row whose largest elements are looked for.
pub const LONGEST: u64 = 1024;

/// The pass.
///
/// # Errors
/// [`PassError::Refused`] for rows longer than [`LONGEST`]; [`PassError::Build`] would be a fault of this pass.
pub fn run(g: &Graph, _: &Options, _: &mut Report) -> Result<Graph, PassError> {
    let mut out = g.clone();
    for e in &mut out.entries {
        if !e.nodes.iter().any(|n| matches!(n.op, Op::TopK { .. })) {
            continue;
        }
        for n in e.nodes.iter().filter(|n| matches!(n.op, Op::TopK { .. })) {
            let width = e.ty(n.inputs[0]).shape.last().and_then(|d| d.known()).unwrap_or(u64::MAX);
            if width > LONGEST {
                let place = n.origin.as_deref().unwrap_or(&e.name);
                let why =
                    format!("{} at {place} is over rows of {width}; at most {LONGEST} are supported", n.op.name());
                return Err(PassError::Refused { pass: NAME.into(), why });
            }
        }
        *e = entry(&g.params, e).map_err(PassError::build(NAME, &e.name))?;
    }
    Ok(out)
}

fn entry(params: &[Param], e: &Entry) -> Result<Entry, IrError> {
    let mut b = Build { params, out: Entry::new(e.name.clone()), origin: None };
    let mut map: Vec<ValueId> = vec![];
    // Places of the rows of a value are counted once.
    let mut places: Vec<(ValueId, ValueId)> = vec![];
    for v in e.values() {
        let n = e.node(v);
        let x: Vec<ValueId> = n.inputs.iter().map(|i| map[i.index()]).collect();
        b.origin.clone_from(&n.origin);
        map.push(match n.op {
            Op::TopK { k, indices } => {
                let place = match places.iter().find(|p| p.0 == x[0]) {
                    Some(found) => found.1,
                    None => {
                        let place = b.places(x[0])?;
                        places.push((x[0], place));
                        place
                    }
                };
                b.chosen(x[0], place, k, indices)?
            }
            _ => b.push(n.op.clone(), &x)?,
        });
    }
    b.out.roots.clone_from(&e.roots);
    b.out.roots.iter_mut().for_each(|r| r.value = map[r.value.index()]);
    Ok(b.out)
}

struct Build<'a> {
    params: &'a [Param],
    out: Entry,
    origin: Option<Arc<str>>,
}

impl Build<'_> {
    fn push(&mut self, op: Op, x: &[ValueId]) -> Result<ValueId, IrError> {
        self.out.push_from(self.params, op, x, self.origin.clone())
    }

    fn spread(&mut self, x: ValueId, shape: &[Dim], axes: &[u8]) -> Result<ValueId, IrError> {
        self.push(Op::Broadcast { shape: shape.to_vec(), axes: axes.to_vec() }, &[x])
    }

    fn compare(&mut self, op: BinaryOp, a: ValueId, b: ValueId) -> Result<ValueId, IrError> {
        self.push(Op::Binary(op), &[a, b])
    }

    fn sum(&mut self, x: ValueId, axis: u8) -> Result<ValueId, IrError> {
        self.push(Op::Reduce { op: ReduceOp::Sum, axis }, &[x])
    }

    /// For every element of the rows of x, how many are before it, as f32 of x's shape.
    fn places(&mut self, x: ValueId) -> Result<ValueId, IrError> {
        let mut shape = self.out.ty(x).shape.clone();
        let last = shape.len() as u8 - 1;
        shape.push(shape[usize::from(last)]);
        let own: Vec<u8> = (0..=last).collect();
        let other: Vec<u8> = (0..last).chain([last + 1]).collect();
        let (mine, theirs) = (self.spread(x, &shape, &own)?, self.spread(x, &shape, &other)?);
        let larger = self.compare(BinaryOp::Lt, mine, theirs)?;
        let equal = self.compare(BinaryOp::Eq, mine, theirs)?;
        let here = self.push(Op::Iota { shape: shape.clone(), axis: last }, &[])?;
        let there = self.push(Op::Iota { shape, axis: last + 1 }, &[])?;
        let earlier = self.compare(BinaryOp::Lt, there, here)?;
        let tie = self.compare(BinaryOp::And, equal, earlier)?;
        let before = self.compare(BinaryOp::Or, larger, tie)?;
        let before = self.push(Op::Cast(DType::F32), &[before])?;
        self.sum(before, last + 1)
    }

    /// The elements at the first k places, or their indices.
    fn chosen(&mut self, x: ValueId, place: ValueId, k: u64, indices: bool) -> Result<ValueId, IrError> {
        let mut shape = self.out.ty(x).shape.clone();
        let last = shape.len() as u8 - 1;
        shape.insert(usize::from(last), k.into());
        let row: Vec<u8> = (0..last).chain([last + 1]).collect();
        let place = self.spread(place, &shape, &row)?;
        let wanted = self.push(Op::Iota { shape: shape.clone(), axis: last }, &[])?;
        let wanted = self.push(Op::Cast(DType::F32), &[wanted])?;
        let here = self.compare(BinaryOp::Eq, place, wanted)?;
        let value = match indices {
            false => self.spread(x, &shape, &row)?,
            true => {
                let index = self.push(Op::Iota { shape, axis: last + 1 }, &[])?;
                self.push(Op::Cast(DType::F32), &[index])?
            }
        };
        let zero = self.push(Op::f32(0.0), &[])?;
        let value = self.push(Op::Select, &[here, value, zero])?;
        let value = self.sum(value, last + 1)?;
        if indices { self.push(Op::Cast(DType::I32), &[value]) } else { Ok(value) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manager::{Pipeline, run as run_passes};
    use crate::testing::same_results;
    use pleach_ir::text::parse;

    fn graph(width: u64, k: u64) -> Graph {
        let text = format!(
            "graph core\nentry \"infer\" {{\n  %0 = input \"x\" : f32[T,{width}]\n  %1 = top_k_values(%0) {{k = {k}}} : f32[T,{k}]\n  \
             %2 = top_k_indices(%0) {{k = {k}}} : i32[T,{k}]\n  %3 = cast(%2) : f32[T,{k}]\n  output \"v\" %1\n  output \"i\" %3\n}}\n"
        );
        parse(&text).unwrap()
    }

    #[test]
    fn largest_elements_stay_the_same() {
        for (width, k) in [(1, 1), (6, 2), (6, 6), (16, 3)] {
            let g = graph(width, k);
            let out = run_passes(&g, &Pipeline::of(&[NAME]), &Options::default()).unwrap().graph;
            assert!(!out.entries[0].nodes.iter().any(|n| matches!(n.op, Op::TopK { .. })));
            same_results(&g, &out, 0.0);
        }
    }

    #[test]
    fn long_rows_are_refused() {
        let e = run_passes(&graph(LONGEST + 1, 2), &Pipeline::of(&[NAME]), &Options::default()).unwrap_err();
        assert!(e.to_string().contains("1025") && e.to_string().contains("at most 1024"), "{e}");
    }
}
