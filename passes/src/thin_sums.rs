//! `thin-sums`: row or column sums of squares of `X + s·L·R` without that matrix, where L·R is thin.
//!
//! With D = Σᵢ sᵢ·Lᵢ·Rᵢ, thin products of parameters, and X a parameter,
//!
//! ```text
//! Σₖ (X + D)ₒₖ² = Σₖ Xₒₖ² + Σᵢ sᵢ · Σⱼ (Lᵢ)ₒⱼ · (2·X·Rᵢᵀ + Σₗ sₗ·Lₗ·(Rₗ·Rᵢᵀ))ₒⱼ
//! ```
//!
//! and the same turned round for sums along the other axis. The left side writes and reads a matrix of X's size, the right side reads X once;
//! the first term does not change where X is not trained. So the norm of a weight with a low-rank change costs one thin product.
//!
//! A parameter that is stored in fewer bits and read through a cast is the operand of its product as it is stored, and Rᵢ is rounded to the same
//! type for it, as the operands of every product with that parameter are (see `precision`); what remains stays f32.
//!
//! Assumes canonical entries, before `rewrite`. Leaves alone: what depends on a run's inputs; products that are not thin; matrices that something
//! else reads, which are built anyway; sums of other types than f32. The sum is never negative, as before: rounding below zero becomes zero.

use crate::canonicalize::Builder;
use crate::error::PassError;
use crate::manager::Report;
use crate::options::Options;
use pleach_ir::{BinaryOp, DType, Entry, Graph, IrError, Op, Param, ReduceOp, Root, ValueId};
use std::sync::Arc;

const NAME: &str = "thin-sums";

/// How many times the inner dimension of a thin product goes into either outer one, at least.
const THIN: u64 = 4;

/// A matrix, turned round or not.
type View = (ValueId, bool);

/// `scale · kept · along`: kept has an index of the sums, along one that is summed over.
struct Product {
    scale: Option<ValueId>,
    kept: View,
    along: View,
}

/// A sum of squares of a parameter and thin products.
struct Squares {
    /// The axis that is summed over.
    axis: u8,
    whole: Option<ValueId>,
    products: Vec<Product>,
}

/// The pass.
///
/// # Errors
/// [`PassError::Build`] would be a fault of this pass.
pub fn run(g: &Graph, _: &Options, report: &mut Report) -> Result<Graph, PassError> {
    let mut out = g.clone();
    let mut count = 0;
    for e in &mut out.entries {
        let found = find(e);
        count += found.iter().flatten().count();
        if found.iter().any(Option::is_some) {
            *e = rebuild(&g.params, e, &found).map_err(PassError::build(NAME, &e.name))?;
        }
    }
    if count > 0 {
        report.note = format!("{count} sums of squares without the matrix");
    }
    Ok(out)
}

/// For every value, what it is a sum of squares of.
fn find(e: &Entry) -> Vec<Option<Squares>> {
    let (users, live) = (e.users(), e.live());
    let mut of_run = vec![false; e.nodes.len()];
    for v in e.values() {
        let n = e.node(v);
        of_run[v.index()] = matches!(n.op, Op::Input { .. }) || n.inputs.iter().any(|i| of_run[i.index()]);
    }
    // Read by this one alone, and not from outside the entry.
    let only = |v: ValueId, reader: ValueId| {
        users[v.index()].iter().all(|u| *u == reader || !live[u.index()]) && e.roots.iter().all(|r| r.value != v)
    };
    let matrix = |v: ValueId| e.ty(v).rank() == 2 && e.ty(v).dtype == DType::F32;
    let product = |v: ValueId, reader: ValueId, axis: u8| {
        let n = e.node(v);
        let (scale, v, reader) = match n.op {
            Op::Binary(BinaryOp::Mul) if e.ty(n.inputs[0]).rank() == 0 => (Some(n.inputs[0]), n.inputs[1], v),
            Op::Binary(BinaryOp::Mul) if e.ty(n.inputs[1]).rank() == 0 => (Some(n.inputs[1]), n.inputs[0], v),
            _ => (None, v, reader),
        };
        let n = e.node(v);
        let Op::MatMul { ta, tb } = n.op else { return None };
        let (l, r) = (n.inputs[0], n.inputs[1]);
        if !only(v, reader) || ![v, l, r].into_iter().all(matrix) {
            return None;
        }
        let inner = e.ty(l).shape[usize::from(!ta)].known()?;
        let thin = e.ty(v).shape.iter().all(|d| d.known().is_some_and(|d| inner * THIN <= d));
        let (kept, along) = if axis == 1 { ((l, ta), (r, tb)) } else { ((r, !tb), (l, !ta)) };
        thin.then_some(Product { scale, kept, along })
    };
    let squares = |v: ValueId| {
        let Op::Reduce { op: ReduceOp::Sum, axis } = e.node(v).op else { return None };
        let square = e.node(v).inputs[0];
        let n = e.node(square);
        if n.op != Op::Binary(BinaryOp::Mul) || n.inputs[0] != n.inputs[1] || !only(square, v) {
            return None;
        }
        let sum = n.inputs[0];
        if of_run[sum.index()] || !matrix(sum) || !only(sum, square) {
            return None;
        }
        let n = e.node(sum);
        let terms = if n.op == Op::Add { &n.inputs[..] } else { std::slice::from_ref(&sum) };
        let reader = if n.op == Op::Add { sum } else { square };
        let mut found = Squares { axis, whole: None, products: vec![] };
        for t in terms {
            match product(*t, reader, axis) {
                Some(p) if n.op != Op::Add || only(*t, sum) => found.products.push(p),
                _ if matrix(*t) && found.whole.is_none() && is_parameter(e, *t) => {
                    found.whole = Some(*t);
                }
                _ => return None,
            }
        }
        (!found.products.is_empty()).then_some(found)
    };
    e.values().map(|v| live[v.index()].then(|| squares(v)).flatten()).collect()
}

/// A parameter, or one that is stored in fewer bits and cast up.
fn is_parameter(e: &Entry, v: ValueId) -> bool {
    let n = e.node(v);
    matches!(n.op, Op::Param(_)) || stored(&n.op, &n.inputs).is_some_and(|x| matches!(e.node(x).op, Op::Param(_)))
}

/// What is cast up to f32.
fn stored(op: &Op, inputs: &[ValueId]) -> Option<ValueId> {
    (*op == Op::Cast(DType::F32)).then(|| inputs[0])
}

fn rebuild(params: &[Param], e: &Entry, found: &[Option<Squares>]) -> Result<Entry, IrError> {
    let mut b = Builder::new(params, &e.name);
    let mut map: Vec<ValueId> = vec![];
    for v in e.values() {
        let n = e.node(v);
        let new = match &found[v.index()] {
            Some(s) => {
                let at = |v: ValueId| map[v.index()];
                let turned = |(v, t): View| (at(v), t);
                let products = s.products.iter().map(|p| Product {
                    scale: p.scale.map(at),
                    kept: turned(p.kept),
                    along: turned(p.along),
                });
                let s = Squares { axis: s.axis, whole: s.whole.map(at), products: products.collect() };
                Sums { b: &mut b, origin: n.origin.clone() }.of_squares(&s)?
            }
            None => {
                let inputs = n.inputs.iter().map(|i| map[i.index()]).collect();
                b.make(n.op.clone(), inputs, n.origin.clone())?
            }
        };
        map.push(new);
    }
    let roots = e.roots.iter().map(|r| Root { kind: r.kind.clone(), value: map[r.value.index()] }).collect();
    b.finish(roots)
}

struct Sums<'a, 'b> {
    b: &'a mut Builder<'b>,
    origin: Option<Arc<str>>,
}

impl Sums<'_, '_> {
    fn make(&mut self, op: Op, inputs: &[ValueId]) -> Result<ValueId, IrError> {
        self.b.make(op, inputs.to_vec(), self.origin.clone())
    }

    /// a·bᵀ, or b·aᵀ where the result is wanted turned round.
    fn product(&mut self, a: View, b: View, turned: bool) -> Result<ValueId, IrError> {
        let (a, b) = if turned { (b, a) } else { (a, b) };
        self.make(Op::MatMul { ta: a.1, tb: !b.1 }, &[a.0, b.0])
    }

    /// The matrix in the type that it is stored in, and its other operand in the same type.
    fn as_stored(&mut self, x: ValueId, (other, turned): View) -> Result<(ValueId, View), IrError> {
        let n = self.b.entry().node(x);
        let Some(narrow) = stored(&n.op, &n.inputs) else { return Ok((x, (other, turned))) };
        let to = self.b.entry().ty(narrow).dtype;
        Ok((narrow, (self.make(Op::Cast(to), &[other])?, turned)))
    }

    fn scaled(&mut self, scale: Option<ValueId>, v: ValueId) -> Result<ValueId, IrError> {
        match scale {
            Some(s) => self.make(Op::Binary(BinaryOp::Mul), &[s, v]),
            None => Ok(v),
        }
    }

    fn sum(&mut self, terms: &[ValueId]) -> Result<ValueId, IrError> {
        if let [one] = terms { Ok(*one) } else { self.make(Op::Add, terms) }
    }

    fn of_squares(&mut self, s: &Squares) -> Result<ValueId, IrError> {
        let add_up = |axis| Op::Reduce { op: ReduceOp::Sum, axis };
        let mut parts = vec![];
        if let Some(x) = s.whole {
            let square = self.make(Op::Binary(BinaryOp::Mul), &[x, x])?;
            parts.push(self.make(add_up(s.axis), &[square])?);
        }
        for p in &s.products {
            // what is multiplied with `kept` element by element lies as that does
            let turned = p.kept.1;
            let mut terms = vec![];
            if let Some(x) = s.whole {
                let (x, along) = self.as_stored(x, p.along)?;
                let product = self.product((x, s.axis == 0), along, turned)?;
                let two = self.make(Op::f32(2.0), &[])?;
                terms.push(self.scaled(Some(two), product)?);
            }
            for q in &s.products {
                let square = self.product(q.along, p.along, turned)?;
                let d = self.product(q.kept, (square, !turned), turned)?;
                terms.push(self.scaled(q.scale, d)?);
            }
            let sum = self.sum(&terms)?;
            let both = self.make(Op::Binary(BinaryOp::Mul), &[p.kept.0, sum])?;
            let sum = self.make(add_up(u8::from(!turned)), &[both])?;
            parts.push(self.scaled(p.scale, sum)?);
        }
        let total = self.sum(&parts)?;
        let zero = self.make(Op::f32(0.0), &[])?;
        self.make(Op::Binary(BinaryOp::Max), &[total, zero])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manager::{Pipeline, run as run_passes};
    use crate::testing::same_results;
    use pleach_ir::text::parse;

    /// Σ (X + s·D)² along an axis, D = L·R with operands that may lie turned round, and a second product.
    fn graph(axis: u8, ta: bool, tb: bool, inner: u64) -> Graph {
        stored_as("f32", axis, ta, tb, inner)
    }

    fn stored_as(dtype: &str, axis: u8, ta: bool, tb: bool, inner: u64) -> Graph {
        let shape = |turned: bool, a: u64, b: u64| if turned { format!("[{b},{a}]") } else { format!("[{a},{b}]") };
        let (l, r) = (shape(ta, 12, inner), shape(tb, inner, 16));
        let flags = [(ta, "ta"), (tb, "tb")].iter().filter(|f| f.0).map(|f| f.1).collect::<Vec<_>>().join(", ");
        let flags = if flags.is_empty() { flags } else { format!(" {{{flags}}}") };
        let out = if axis == 1 { 12 } else { 16 };
        let text = format!(
            r#"graph core
param @0 "w" {dtype}[12,16] frozen checkpoint("w")
param @1 "l" f32{l} frozen adapter(0, "l")
param @2 "r" f32{r} frozen adapter(0, "r")
param @3 "s" f32[] frozen adapter(0, "s")
param @4 "u" f32[12,2] frozen adapter(1, "u")
param @5 "v" f32[2,16] frozen adapter(1, "v")
entry "infer" {{
  %0 = input "x" : f32[{out}]
  %1 = param @0 : {dtype}[12,16]
  %2 = cast(%1) : f32[12,16]
  %3 = param @1 : f32{l}
  %4 = param @2 : f32{r}
  %5 = param @3 : f32[]
  %6 = matmul(%3, %4){flags} : f32[12,16]
  %7 = mul(%5, %6) : f32[12,16]
  %8 = param @4 : f32[12,2]
  %9 = param @5 : f32[2,16]
  %10 = matmul(%8, %9) : f32[12,16]
  %11 = add(%2, %7, %10) : f32[12,16]
  %12 = mul(%11, %11) : f32[12,16]
  %13 = reduce_sum(%12) {{axis = {axis}}} : f32[{out}]
  %14 = mul(%0, %13) : f32[{out}]
  output "y" %14
}}
"#
        );
        parse(&text).unwrap()
    }

    fn squares(g: &Graph) -> usize {
        let e = &g.entries[0];
        let big = |n: &pleach_ir::Node| n.op == Op::Binary(BinaryOp::Mul) && n.inputs[0] == n.inputs[1];
        e.nodes.iter().filter(|n| big(n) && e.node(n.inputs[0]).op == Op::Add).count()
    }

    #[test]
    fn sums_are_the_same_along_both_axes_and_for_turned_operands() {
        for axis in [0, 1] {
            for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
                let g = graph(axis, ta, tb, 3);
                let out = run_passes(&g, &Pipeline::of(&["canonicalize", NAME]), &Options::default()).unwrap().graph;
                assert_eq!((squares(&g), squares(&out)), (1, 0), "axis {axis}, {ta} {tb}");
                same_results(&g, &out, 1e-5);
            }
        }
    }

    #[test]
    fn a_matrix_stored_in_fewer_bits_is_read_as_it_is_stored() {
        for axis in [0, 1] {
            let g = stored_as("bf16", axis, false, false, 3);
            let out = run_passes(&g, &Pipeline::of(&["canonicalize", NAME]), &Options::default()).unwrap().graph;
            assert_eq!((squares(&g), squares(&out)), (1, 0), "axis {axis}");
            // the rounded operand of the thin product
            same_results(&g, &out, 2e-3);
            let e = &out.entries[0];
            let narrow = e.nodes.iter().filter(|n| matches!(n.op, Op::MatMul { .. }));
            let narrow = narrow.filter(|n| n.inputs.iter().all(|i| e.ty(*i).dtype == DType::BF16)).count();
            assert_eq!(narrow, 2, "one thin product of the matrix with each factor");
        }
    }

    #[test]
    fn a_product_that_is_not_thin_stays() {
        let g = graph(1, false, false, 4);
        let out = run_passes(&g, &Pipeline::of(&["canonicalize", NAME]), &Options::default()).unwrap().graph;
        assert_eq!(squares(&out), 1);
    }
}
