//! What a contraction kernel computes: sums of products at column offsets, and an elementwise remainder.
//!
//! A [`Group`] is one set of accumulators of a result tile: a sum of products, read at a column offset. Slices of the
//! last axis are pushed through the elementwise operators down to the products, so that a tile of `silu(z[:, :F]) *
//! z[:, F:]` holds two groups of the same product. Decides nothing about tiles.

use super::blocking::{FEW, packs_rows};
use super::view::{Stride, View, view};
use pleach_ir::{BinaryOp, BlockFormat, Class, DType, Dim, Entry, Kernel, Layout, Op, ScatterMode, ValueId};
use std::collections::BTreeMap;

/// The right operand of a product. Panels of bf16 lie in pairs along the sum ([`Layout::Panels`]).
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Right {
    /// Packed panels of `nr` columns.
    Panels { arg: usize, nr: u64 },
    /// Panels of codes: decoded in registers by few rows, into scratch memory for many.
    Coded { arg: usize, nr: u64, format: BlockFormat },
    /// Blocks of codes as a checkpoint has them, along the sum (`along`) or along the columns; decoded into scratch memory.
    Blocks(Blocks),
    /// Strides of `(batch…, k, n)`, unit step along `n`. f32 is read in place, bf16 is packed into pairs.
    Rows(View),
    /// Any other strides; packed while it runs.
    Strided(View),
}

impl Right {
    /// The strides, where there are any.
    pub(crate) fn view(&self) -> Option<&View> {
        match self {
            Right::Rows(v) | Right::Strided(v) => Some(v),
            Right::Panels { .. } | Right::Coded { .. } | Right::Blocks(_) => None,
        }
    }
}

/// A matrix in blocks of codes, and what is laid over it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Blocks {
    pub(crate) arg: usize,
    pub(crate) format: BlockFormat,
    /// Blocks lie along the sum, otherwise along the columns of the product.
    pub(crate) along: bool,
    /// Type of the values that the codes stand for.
    pub(crate) dtype: DType,
    pub(crate) laid: Option<Laid>,
}

/// Rows (`axis` 0) or columns (1) of a matrix, picked by indices, that have values of their own.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Laid {
    pub(crate) axis: u8,
    /// Operands: indices, and the values, of the matrix' type.
    pub(crate) index: usize,
    pub(crate) values: usize,
    /// How many rows or columns.
    pub(crate) count: u64,
}

/// One `matmul`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Product {
    /// Strides of `(batch…, m, k)`.
    pub(crate) left: View,
    pub(crate) right: Right,
    pub(crate) k: Dim,
    pub(crate) n: Dim,
    /// Type of both operands: f32 or bf16.
    pub(crate) dtype: DType,
    /// The left operand is packed into scratch memory: pairs that do not lie side by side.
    pub(crate) packs_left: bool,
    /// The right operand is packed into scratch memory: blocks of codes, pairs that are not in panels, what has no unit
    /// step along the columns, and long sums that many rows read.
    pub(crate) packs_right: bool,
}

impl Product {
    /// bf16: a step of the sum is a pair of elements.
    pub(crate) fn pairs(&self) -> bool {
        self.dtype == DType::BF16
    }
}

/// A product and the rank-0 value that multiplies it.
pub(crate) type Term = (usize, Option<ValueId>);

/// Accumulators of a tile: a sum of scaled products from column `offset` on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Group {
    /// In the order they are summed; the longest last.
    pub(crate) products: Vec<Term>,
    pub(crate) offset: u64,
}

/// The terms of an `Add`: a group and what is added to it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Sum {
    pub(crate) group: usize,
    pub(crate) rest: Vec<ValueId>,
}

/// The values of the body that a product stands for: the products themselves with the sums and scales that are made with
/// them, and the way from an operand of the kernel to the left and the right side.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub(crate) struct Values {
    pub(crate) product: Vec<ValueId>,
    pub(crate) left: Vec<ValueId>,
    pub(crate) right: Vec<ValueId>,
}

/// A kernel taken apart.
#[derive(Clone)]
pub(crate) struct Analysis {
    pub(crate) batch: Vec<Dim>,
    pub(crate) m: Dim,
    /// Columns of the results.
    pub(crate) n: Dim,
    pub(crate) products: Vec<Product>,
    /// Of each product.
    pub(crate) values: Vec<Values>,
    pub(crate) groups: Vec<Group>,
    /// Groups of `matmul` and `Add` nodes, by node and column offset.
    pub(crate) sums: BTreeMap<(ValueId, u64), Sum>,
    /// Which values depend on a product.
    pub(crate) computed: Vec<bool>,
    /// Operand number of each input node.
    pub(crate) args: Vec<Option<usize>>,
    /// Rough cost of the remainder per element.
    pub(crate) cost: u64,
    /// This is the form for few rows ([`Analysis::few`]).
    pub(crate) few_rows: bool,
}

impl Analysis {
    /// Takes a kernel apart.
    ///
    /// # Errors
    /// What this class has no code for.
    pub(crate) fn new(k: &Kernel) -> Result<Analysis, String> {
        let a = Analysis::with_picks(k)?;
        let picks = |p: &Product| [Some(&p.left), p.right.view()].into_iter().flatten().any(|v| v.picked.is_some());
        if a.products.iter().any(picks) {
            return Err("rows or columns are picked by a kernel of their own here".into());
        }
        Ok(a)
    }

    /// [`Analysis::new`] for code that reads rows or columns of operands where indices say.
    ///
    /// # Errors
    /// As [`Analysis::new`].
    pub(crate) fn with_picks(k: &Kernel) -> Result<Analysis, String> {
        if k.class != Class::Contraction {
            return Err("is no contraction".into());
        }
        let body = &k.body;
        let mut args = vec![None; body.nodes.len()];
        for (i, (v, _)) in body.inputs().iter().enumerate() {
            args[v.index()] = Some(i);
        }
        let mut computed = vec![false; body.nodes.len()];
        for v in body.values() {
            let n = body.node(v);
            computed[v.index()] = matches!(n.op, Op::MatMul { .. }) || n.inputs.iter().any(|i| computed[i.index()]);
        }
        let first = body.roots.first().ok_or("has no result")?;
        let shape = body.ty(first.value).shape.clone();
        let [batch @ .., m, n] = shape.as_slice() else { return Err("a result has a rank below 2".into()) };
        let mut a = Analysis {
            batch: batch.to_vec(),
            m: *m,
            n: *n,
            products: vec![],
            values: vec![],
            groups: vec![],
            sums: BTreeMap::new(),
            computed,
            args,
            cost: 0,
            few_rows: false,
        };
        for (i, r) in body.roots.iter().enumerate() {
            if body.ty(r.value).shape != shape {
                return Err(format!("results of different shapes: {} and {}", body.ty(first.value), body.ty(r.value)));
            }
            if k.results.get(i).is_some_and(|l| *l != Layout::RowMajor) {
                return Err("a result is not row-major".into());
            }
        }
        let users = body.users();
        let mut seen = BTreeMap::new();
        for r in &body.roots {
            a.walk(k, &users, r.value, 0, &mut seen)?;
        }
        if a.groups.is_empty() {
            return Err("no result depends on a product".into());
        }
        for over in k.aliases.iter().flatten() {
            let indices = |v: &View| v.picked.is_some_and(|x| x.arg == *over as usize);
            let reads = |p: &Product| {
                let right = match &p.right {
                    Right::Panels { arg, .. } | Right::Coded { arg, .. } => *arg,
                    Right::Blocks(b) => {
                        let laid = b.laid.iter().any(|l| [l.index, l.values].contains(&(*over as usize)));
                        if laid { *over as usize } else { b.arg }
                    }
                    Right::Rows(v) | Right::Strided(v) => v.arg,
                };
                let picks = indices(&p.left) || p.right.view().is_some_and(indices);
                picks || p.left.arg == *over as usize || right == *over as usize
            };
            if a.products.iter().any(reads) {
                return Err("a result lies over an operand of a product".into());
            }
        }
        Ok(a)
    }

    /// The form for few rows, where an unknown number of rows reads codes: they are decoded in registers.
    pub(super) fn few(&self) -> Option<Analysis> {
        let coded = |p: &Product| matches!(p.right, Right::Coded { .. }) && p.packs_right;
        if self.m.known().is_some() || !self.products.iter().any(coded) {
            return None;
        }
        let mut few = Analysis { few_rows: true, ..self.clone() };
        for p in &mut few.products {
            p.packs_right &= !matches!(p.right, Right::Coded { .. });
        }
        Some(few)
    }

    fn walk(
        &mut self,
        k: &Kernel,
        users: &[Vec<ValueId>],
        v: ValueId,
        offset: u64,
        seen: &mut BTreeMap<(ValueId, u64), ()>,
    ) -> Result<(), String> {
        if !self.computed[v.index()] || seen.insert((v, offset), ()).is_some() {
            return Ok(());
        }
        let body = &k.body;
        let node = body.node(v);
        match &node.op {
            Op::MatMul { .. } => {
                let p = self.product(k, v)?;
                self.sum(v, offset, Group { products: vec![(p, None)], offset }, vec![])
            }
            Op::Add => {
                let (mut chain, mut rest) = (vec![], vec![]);
                self.terms(body, users, v, &mut chain, &mut rest);
                if !chain.is_empty() {
                    let mut order = vec![];
                    for (m, scale) in &chain {
                        let p = self.product(k, *m)?;
                        let scaled = scale.and_then(|_| users[m.index()].first().copied());
                        self.values[p].product.extend(scaled.into_iter().chain([v]));
                        order.push((p, *scale));
                    }
                    // The longest sum runs last, over accumulators that hold the others already; scaled ones run first.
                    let long = |p: usize| self.products[p].k.known().unwrap_or(u64::MAX);
                    order.sort_by_key(|(p, s)| (long(*p), *p, *s));
                    let short = order.len() - 1;
                    order[..short].sort_by_key(|(p, s)| (s.is_none(), long(*p), *p));
                    self.sum(v, offset, Group { products: order, offset }, rest.clone())?;
                }
                let terms = if chain.is_empty() { node.inputs.clone() } else { rest };
                self.cost += terms.len() as u64;
                terms.iter().try_for_each(|t| self.walk(k, users, *t, offset, seen))
            }
            Op::Slice { axis, start, .. } if usize::from(*axis) + 1 == node.ty.rank() => {
                self.walk(k, users, node.inputs[0], offset + start, seen)
            }
            op if op.is_elementwise() => {
                self.cost += match op {
                    Op::Unary(u) => match u {
                        pleach_ir::UnaryOp::Neg | pleach_ir::UnaryOp::Abs | pleach_ir::UnaryOp::Not => 1,
                        _ => 20,
                    },
                    _ => 1,
                };
                node.inputs.iter().try_for_each(|t| self.walk(k, users, *t, offset, seen))
            }
            Op::Broadcast { shape, .. } | Op::Reshape(shape) if *shape == body.ty(node.inputs[0]).shape => {
                self.walk(k, users, node.inputs[0], offset, seen)
            }
            op => Err(format!("{} of a product has no place in a contraction; cut the kernel before it", op.name())),
        }
    }

    fn sum(&mut self, v: ValueId, offset: u64, group: Group, rest: Vec<ValueId>) -> Result<(), String> {
        let at = match self.groups.iter().position(|g| *g == group) {
            Some(i) => i,
            None => {
                self.groups.push(group);
                self.groups.len() - 1
            }
        };
        self.sums.insert((v, offset), Sum { group: at, rest });
        Ok(())
    }

    /// Terms of an `Add`: products that only this sum reads, each with its scale, and the rest. Sums that only this sum
    /// reads count as its terms.
    fn terms(
        &self,
        body: &Entry,
        users: &[Vec<ValueId>],
        v: ValueId,
        chain: &mut Vec<(ValueId, Option<ValueId>)>,
        rest: &mut Vec<ValueId>,
    ) {
        let own = |x: ValueId| users[x.index()].len() == 1 && body.roots.iter().all(|r| r.value != x);
        let is_product = |x: ValueId| matches!(body.node(x).op, Op::MatMul { .. }) && own(x);
        for t in &body.node(v).inputs {
            let n = body.node(*t);
            if is_product(*t) {
                chain.push((*t, None));
                continue;
            }
            if n.op == Op::Binary(BinaryOp::Mul) && own(*t) {
                let (a, b) = (n.inputs[0], n.inputs[1]);
                let scalar = |x: ValueId| body.ty(x).rank() == 0 && !self.computed[x.index()];
                let pair = if is_product(a) && scalar(b) {
                    Some((a, b))
                } else if is_product(b) && scalar(a) {
                    Some((b, a))
                } else {
                    None
                };
                if let Some((p, s)) = pair {
                    chain.push((p, Some(s)));
                    continue;
                }
            }
            if n.op == Op::Add && own(*t) && self.computed[t.index()] && n.ty.dtype == DType::F32 {
                self.terms(body, users, *t, chain, rest);
                continue;
            }
            rest.push(*t);
        }
    }

    fn product(&mut self, k: &Kernel, v: ValueId) -> Result<usize, String> {
        let body = &k.body;
        let node = body.node(v);
        let Op::MatMul { ta, tb } = node.op else { return Err("is no product".into()) };
        let [batch @ .., m, n] = node.ty.shape.as_slice() else { return Err("a product has a rank below 2".into()) };
        if batch != self.batch || *m != self.m {
            return Err(format!("a product is {}, which has other rows than the results", node.ty));
        }
        let (l, r) = (node.inputs[0], node.inputs[1]);
        let dtype = body.ty(l).dtype;
        if !matches!(dtype, DType::F32 | DType::BF16) {
            return Err(format!("a product of {dtype}; f32 and bf16 have code here"));
        }
        let rank = node.ty.rank();
        let mut left = view(body, &self.args, l)?;
        if k.operands.get(left.arg).is_some_and(|x| *x != Layout::RowMajor) {
            return Err("a left operand is not row-major".into());
        }
        let (rows, inner) = (rank - 2, rank - 1);
        let dim = body.ty(l).shape[if ta { rows } else { inner }];
        if ta {
            left.swap(rows, inner);
        }
        let right = match (self.args[r.index()], self.args[r.index()].and_then(|i| k.operands.get(i))) {
            (Some(arg), Some(Layout::Panels { nr, transposed })) => {
                if *transposed != tb || rank != 2 {
                    return Err("panels do not fit the product they are read by".into());
                }
                if *nr == 0 || nr % 16 != 0 || n.known().is_none() || dim.known().is_none() {
                    return Err("panels need static dimensions and a width that 16 divides".into());
                }
                Right::Panels { arg, nr: u64::from(*nr) }
            }
            (Some(arg), Some(Layout::CodedPanels { nr, format })) => {
                if !tb || rank != 2 {
                    return Err("coded panels do not fit the product they are read by".into());
                }
                let whole = dim.known().is_some_and(|k| k.is_multiple_of(BlockFormat::VALUES));
                if *nr == 0 || nr % 16 != 0 || n.known().is_none() || !whole {
                    return Err("coded panels need static dimensions, whole blocks and a width that 16 divides".into());
                }
                Right::Coded { arg, nr: u64::from(*nr), format: *format }
            }
            _ if let Some(blocks) = self.blocks(k, r, tb) => {
                let blocked = if tb { dim } else { *n };
                let whole = blocked.known().is_some_and(|x| x.is_multiple_of(BlockFormat::VALUES));
                if rank != 2 || !whole || n.known().is_none() || dim.known().is_none() {
                    return Err("blocks need a static matrix and whole blocks".into());
                }
                Right::Blocks(blocks?)
            }
            _ => {
                let mut w = view(body, &self.args, r)?;
                if k.operands.get(w.arg).is_some_and(|x| *x != Layout::RowMajor) {
                    return Err("packed panels are read through a movement".into());
                }
                if tb {
                    w.swap(rows, inner);
                }
                if w.strides[inner].known() == Some(1) { Right::Rows(w) } else { Right::Strided(w) }
            }
        };
        let pick = |v: &View| v.picked.is_some_and(|p| p.axis < rows);
        if pick(&left) || right.view().is_some_and(pick) {
            return Err("whole matrices are picked before a product".into());
        }
        let pairs = dtype == DType::BF16;
        let step = |s: &Stride| s.known() == Some(1);
        let packs_left = pairs && !step(&left.strides[inner]);
        let packs_right = match right {
            Right::Panels { .. } => false,
            Right::Coded { .. } => m.known().is_none_or(|m| m > FEW),
            Right::Rows(_) => packs_rows(dtype, *m, dim),
            Right::Strided(_) | Right::Blocks(_) => true,
        };
        let p = Product { left, right, k: dim, n: *n, dtype, packs_left, packs_right };
        let at = self.products.iter().position(|q| *q == p).unwrap_or(self.products.len());
        if at == self.products.len() {
            self.products.push(p);
            self.values.push(Values { product: vec![], left: way(body, l), right: way(body, r) });
        }
        self.values[at].product.push(v);
        Ok(at)
    }

    /// The right operand of a product as blocks of codes, in another type or with parts laid over them; `None`: it is none.
    fn blocks(&self, k: &Kernel, right: ValueId, along: bool) -> Option<Result<Blocks, String>> {
        let body = &k.body;
        let operand = |v: ValueId| self.args[v.index()];
        let (mut v, mut over) = (right, None);
        if let Op::Cast(_) = body.node(v).op {
            v = body.node(v).inputs[0];
        }
        if let Op::Scatter { axis, mode: ScatterMode::Set } = body.node(v).op {
            over = Some((axis, body.node(v).inputs[1], body.node(v).inputs[2]));
            v = body.node(v).inputs[0];
        }
        let arg = operand(v)?;
        let Layout::Blocks(format) = *k.operands.get(arg)? else { return None };
        let plain = |v: ValueId| operand(v).filter(|i| k.operands.get(*i).is_none_or(|l| *l == Layout::RowMajor));
        let laid = match over {
            None => None,
            Some((axis, index, values)) => match (plain(index), plain(values), body.ty(index).shape.as_slice()) {
                (Some(index), Some(values), [Dim::Known(count)]) if body.ty(v).rank() == 2 => {
                    Some(Laid { axis, index, values, count: *count })
                }
                _ => return Some(Err("what is laid over blocks is no operand".into())),
            },
        };
        Some(Ok(Blocks { arg, format, along, dtype: body.ty(v).dtype, laid }))
    }
}

/// A value and those that it is a view of, down to the operand of the kernel.
fn way(body: &Entry, v: ValueId) -> Vec<ValueId> {
    let next = |v: &ValueId| body.node(*v).inputs.first().copied();
    std::iter::successors(Some(v), next).collect()
}
