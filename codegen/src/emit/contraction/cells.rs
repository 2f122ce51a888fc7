//! The elementwise remainder of a tile: values at a row and a vector of columns.

use super::analyze::Analysis;
use super::blocking::LANES;
use super::context::{Context, Place};
use super::view::dense;
use crate::emit::elementwise::{apply, constant, load, memory_elem, splat, store};
use crate::emit::func::{Func, Val};
use pleach_ir::{DType, Op, ValueId};
use std::collections::BTreeMap;

/// What counts along an axis of a value.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Axis {
    Batch(usize),
    Row,
    Column,
    /// Always 0.
    Fixed,
}

/// The element of a value that an element of the result reads: per axis, what counts and from where.
type Coordinates = Vec<(Axis, u64)>;

/// The accumulators and already computed values of a tile.
pub(super) struct Cells<'a> {
    cx: &'a Context<'a>,
    place: &'a Place,
    /// One per vector; `None`: all lanes are columns of the result.
    masks: &'a [Option<Val>],
    /// Per group, `rows × vectors`.
    sums: &'a [Vec<Val>],
    seen: BTreeMap<(ValueId, Coordinates, Option<u64>, Option<usize>), Val>,
    bases: BTreeMap<(ValueId, Coordinates), Val>,
}

impl<'a> Cells<'a> {
    pub(super) fn new(
        cx: &'a Context<'a>,
        place: &'a Place,
        masks: &'a [Option<Val>],
        sums: &'a [Vec<Val>],
    ) -> Cells<'a> {
        Cells { cx, place, masks, sums, seen: BTreeMap::new(), bases: BTreeMap::new() }
    }

    /// Computes every result for `rows` rows from the place on, then stores all of them: a result may lie over an
    /// operand.
    pub(super) fn finish(mut self, f: &mut Func, rows: u64) -> Result<(), String> {
        let body = &self.cx.kernel.body;
        let rank = self.cx.an.batch.len();
        let mut at: Coordinates = (0..rank).map(|i| (Axis::Batch(i), 0)).collect();
        at.extend([(Axis::Row, 0), (Axis::Column, 0)]);
        let mut out = vec![];
        for i in 0..rows {
            for j in 0..self.cx.bl.vectors {
                for r in &body.roots {
                    out.push(self.value(f, r.value, &at, i, j)?);
                }
            }
        }
        let mut out = out.into_iter();
        let shape = &body.ty(body.roots[0].value).shape;
        let strides = dense(shape).ok_or("an address does not fit 64 bits")?;
        let step = self.cx.stride(f, &strides[rank]);
        let start = self.cx.offset(f, &strides, &self.place.batch);
        let start = {
            let r = f.mul(&self.place.row, &step);
            let s = f.add(&start, &r);
            f.add(&s, &self.place.column)
        };
        let operands = self.cx.kernel.operands.len();
        let dtypes: Vec<DType> = body.roots.iter().map(|r| body.ty(r.value).dtype).collect();
        let bases: Vec<Val> = dtypes
            .iter()
            .enumerate()
            .map(|(n, d)| f.gep(&self.cx.buffers[operands + n], &start, memory_elem(*d)))
            .collect();
        for i in 0..rows {
            let down = f.mulc(&step, i as i64);
            for j in 0..self.cx.bl.vectors {
                let at = f.addc(&down, (j * LANES) as i64);
                for ((d, base), r) in dtypes.iter().zip(&bases).zip(&body.roots) {
                    let Some(v) = out.next() else { continue };
                    f.of(&[r.value], |f| {
                        let p = f.gep(base, &at, memory_elem(*d));
                        store(f, *d, &v, &p, self.masks[j].as_ref(), LANES);
                    });
                }
            }
        }
        Ok(())
    }

    /// Fetches what the remainder of a tile reads of operands as large as the results, so that it is there when the sum
    /// is done.
    pub(super) fn prefetch(f: &mut Func, cx: &Context, place: &Place, rows: u64) -> Result<(), String> {
        let body = &cx.kernel.body;
        let rank = cx.an.batch.len();
        let shape = &body.ty(body.roots[0].value).shape;
        let users = body.users();
        for v in body.values() {
            let node = body.node(v);
            let read = users[v.index()].iter().any(|u| body.node(*u).op.is_elementwise());
            let (Op::Input { .. }, Some(arg)) = (&node.op, cx.an.args[v.index()]) else { continue };
            if node.ty.shape != *shape || !read {
                continue;
            }
            let strides = dense(shape).ok_or("an address does not fit 64 bits")?;
            let step = cx.stride(f, &strides[rank]);
            let start = cx.offset(f, &strides, &place.batch);
            let row = f.mul(&place.row, &step);
            let start = f.add(&start, &row);
            let start = f.add(&start, &place.column);
            let elem = memory_elem(node.ty.dtype);
            let base = f.gep(&cx.buffers[arg], &start, elem);
            for i in 0..rows {
                let down = f.mulc(&step, i as i64);
                for j in 0..cx.bl.vectors {
                    let at = f.addc(&down, (j * LANES) as i64);
                    let p = f.gep(&base, &at, elem);
                    f.prefetch(&p);
                }
            }
        }
        Ok(())
    }

    fn value(&mut self, f: &mut Func, v: ValueId, at: &[(Axis, u64)], i: u64, j: usize) -> Result<Val, String> {
        let row = at.iter().any(|c| c.0 == Axis::Row);
        let column = at.iter().any(|c| c.0 == Axis::Column);
        let key = (v, at.to_vec(), row.then_some(i), column.then_some(j));
        if let Some(x) = self.seen.get(&key) {
            return Ok(x.clone());
        }
        let x = f.of(&[v], |f| self.compute(f, v, at, i, j))?;
        self.seen.insert(key, x.clone());
        Ok(x)
    }

    fn compute(&mut self, f: &mut Func, v: ValueId, at: &[(Axis, u64)], i: u64, j: usize) -> Result<Val, String> {
        let an: &Analysis = self.cx.an;
        let body = &self.cx.kernel.body;
        let node = body.node(v);
        let computed = an.computed[v.index()];
        if computed && let Some(sum) = at.last().and_then(|c| an.sums.get(&(v, c.1))) {
            let acc = self.sums[sum.group][i as usize * self.cx.bl.vectors + j].clone();
            let mut terms = vec![(acc, DType::F32)];
            for t in &sum.rest {
                terms.push((self.operand(f, *t, at, i, j)?, DType::F32));
            }
            return apply(f, &Op::Add, &terms, DType::F32, LANES);
        }
        let through = |f: &mut Func, s: &mut Self, at: &[(Axis, u64)]| s.value(f, node.inputs[0], at, i, j);
        match &node.op {
            op if op.is_elementwise() => {
                let mut args = vec![];
                for x in &node.inputs {
                    args.push((self.operand(f, *x, at, i, j)?, body.ty(*x).dtype));
                }
                apply(f, op, &args, node.ty.dtype, LANES)
            }
            Op::Slice { axis, start, .. } => {
                let mut to = at.to_vec();
                to[*axis as usize].1 += start;
                through(f, self, &to)
            }
            Op::Transpose(perm) => {
                let mut to = at.to_vec();
                for (n, p) in perm.iter().enumerate() {
                    to[*p as usize] = at[n];
                }
                through(f, self, &to)
            }
            Op::Broadcast { axes, .. } => {
                let to: Coordinates = axes.iter().map(|a| at[*a as usize]).collect();
                through(f, self, &to)
            }
            Op::Reshape(shape) => {
                let old = &body.ty(node.inputs[0]).shape;
                let unit = |d: &pleach_ir::Dim| d.known() == Some(1);
                let mut kept = shape.iter().zip(at).filter(|(d, _)| !unit(d));
                let mut to = vec![];
                for d in old {
                    to.push(match unit(d) {
                        true => (Axis::Fixed, 0),
                        false => match kept.next() {
                            Some((e, c)) if e == d => *c,
                            _ => return Err("a reshape beside a product must keep its axes; cut it off".into()),
                        },
                    });
                }
                through(f, self, &to)
            }
            Op::Const { dtype, bits, .. } if bits.iter().all(|b| *b == bits[0]) => {
                Ok(constant(f, *dtype, bits.first().copied().unwrap_or(0), LANES))
            }
            Op::Iota { axis, .. } => self.count(f, at[*axis as usize], i, j),
            Op::Input { .. } => self.read(f, v, at, i, j),
            op => Err(format!("{} has no place beside a product; put it into a kernel of its own", op.name())),
        }
    }

    /// An operand of an elementwise operator: a rank-0 one stands for its value everywhere.
    fn operand(&mut self, f: &mut Func, v: ValueId, at: &[(Axis, u64)], i: u64, j: usize) -> Result<Val, String> {
        let at = if self.cx.kernel.body.ty(v).rank() == 0 { &[] } else { at };
        self.value(f, v, at, i, j)
    }

    fn count(&mut self, f: &mut Func, (axis, from): (Axis, u64), i: u64, j: usize) -> Result<Val, String> {
        let n = match axis {
            Axis::Batch(b) => self.place.batch[b].clone(),
            Axis::Row => f.addc(&self.place.row, i as i64),
            Axis::Column => f.addc(&self.place.column, (j * LANES) as i64),
            Axis::Fixed => f.i64(0),
        };
        let n = f.addc(&n, from as i64);
        let n = f.op(format!("arith.trunci {n} : i64 to i32"));
        let n = f.splat(&n, "i32", LANES);
        if axis != Axis::Column {
            return Ok(n);
        }
        let ids = (0..LANES).map(|i| i.to_string()).collect::<Vec<_>>().join(", ");
        let iota = f.konst(&format!("dense<[{ids}]> : vector<{LANES}xi32>"));
        Ok(f.op(format!("arith.addi {n}, {iota} : vector<{LANES}xi32>")))
    }

    /// Loads from an operand of the kernel.
    fn read(&mut self, f: &mut Func, v: ValueId, at: &[(Axis, u64)], i: u64, j: usize) -> Result<Val, String> {
        let cx = self.cx;
        if at.is_empty() {
            return cx.scalars.get(&v).cloned().ok_or_else(|| "an operand is missing".to_string());
        }
        let arg = cx.an.args[v.index()].ok_or("an operand is missing")?;
        if cx.kernel.operands[arg] != pleach_ir::Layout::RowMajor {
            return Err("packed panels are read elementwise".into());
        }
        let ty = cx.kernel.body.ty(v);
        let strides = dense(&ty.shape).ok_or("an address does not fit 64 bits")?;
        let elem = memory_elem(ty.dtype);
        let columns = at.iter().filter(|c| c.0 == Axis::Column).count();
        let vector = columns == 1 && at.last().is_some_and(|c| c.0 == Axis::Column);
        if columns > 0 && !vector {
            return Err("an operand beside a product is read across its rows; transpose it before".into());
        }
        let base = match self.bases.get(&(v, at.to_vec())) {
            Some(b) => b.clone(),
            None => {
                let mut sum = f.i64(0);
                for ((axis, from), s) in at.iter().zip(&strides) {
                    let n = match axis {
                        Axis::Batch(b) => self.place.batch[*b].clone(),
                        Axis::Row => self.place.row.clone(),
                        Axis::Column => self.place.column.clone(),
                        Axis::Fixed => f.i64(0),
                    };
                    let n = f.addc(&n, *from as i64);
                    let s = cx.stride(f, s);
                    let t = f.mul(&n, &s);
                    sum = f.add(&sum, &t);
                }
                let b = f.gep(&cx.buffers[arg], &sum, elem);
                self.bases.insert((v, at.to_vec()), b.clone());
                b
            }
        };
        let mut step = f.i64(0);
        for (c, s) in at.iter().zip(&strides) {
            if c.0 == Axis::Row {
                let s = cx.stride(f, s);
                step = f.add(&step, &s);
            }
        }
        let mut shift = f.mulc(&step, i as i64);
        if vector {
            shift = f.addc(&shift, (j * LANES) as i64);
        }
        let p = f.gep(&base, &shift, elem);
        if vector {
            return Ok(load(f, ty.dtype, &p, self.masks[j].as_ref(), LANES));
        }
        let x = load(f, ty.dtype, &p, None, 1);
        Ok(splat(f, ty.dtype, &x, LANES))
    }
}
