//! Elements of a kernel's body, computed where they are asked for: a value at an index becomes scalar code.
//!
//! Movement turns into index arithmetic. What a skeleton computes together (products, reductions of a row) it sets at an
//! index; any other reduction is a loop right where it is read. Expressions are remembered per scope, so that a value is
//! computed once where its first use dominates the others, and under the axes it depends on only. A fault is kept, and
//! code goes on with a meaningless value: the skeleton asks for the fault at the end.
//!
//! # In place
//! A result over an operand is right as long as threads read that operand only where they write, and before they do.
//! [`Pull::store`] checks what was read against what is written; [`Pull::begin_writes`] says that all threads of a row have
//! read it, [`Pull::apart`] that other elements follow.

use super::at::{At, gcd};
use super::blocks;
use crate::emit::elementwise;
use crate::emit::func::{Func, Val};
use crate::emit::unsupported;
use crate::error::CodegenError;
use pleach_ir::{BinaryOp, DType, Dim, Kernel, Layout, Node, Op, ReduceOp, Sym, TensorType, ValueId};
use std::collections::{BTreeMap, BTreeSet};

type Key = (ValueId, String);

/// Elements of a constant that is looked up by comparing.
const MAX_TABLE: usize = 256;
/// Terms of a sum that are computed before they are added: of hundreds, a thread would have no registers for all.
const TERMS: usize = 16;

pub(super) struct Pull<'a> {
    pub(super) k: &'a Kernel,
    symbols: &'a [Sym],
    dims: BTreeMap<usize, Val>,
    scopes: Vec<BTreeMap<Key, Val>>,
    /// What the skeleton computed, and what is still to be added to it.
    set: BTreeMap<Key, (Val, Vec<ValueId>)>,
    /// Which axes of its index a value depends on.
    depends: Vec<Vec<bool>>,
    operand_of: BTreeMap<ValueId, usize>,
    /// Neighbouring elements that a thread takes side by side.
    pub(super) together: i64,
    /// Reads of operands that are written over: operand, position, row.
    reads: Vec<(usize, String, Option<String>)>,
    /// Operands that were written over.
    written: BTreeSet<usize>,
    fault: Option<CodegenError>,
}

fn key(index: &[At]) -> String {
    index.iter().map(At::key).collect::<Vec<_>>().join(" ")
}

/// Which axes of its index each value depends on.
fn depends(k: &Kernel) -> Vec<Vec<bool>> {
    let body = &k.body;
    let mut out: Vec<Vec<bool>> = vec![];
    for v in body.values() {
        let n = body.node(v);
        let rank = n.ty.rank();
        let mut d = vec![false; rank];
        match &n.op {
            Op::Input { .. } => d = n.ty.shape.iter().map(|s| *s != Dim::Known(1)).collect(),
            Op::Const { bits, .. } => d = vec![bits.iter().any(|b| *b != bits[0]); rank],
            Op::Iota { axis, .. } => d[usize::from(*axis)] = true,
            Op::Broadcast { axes, .. } => {
                for (a, x) in axes.iter().zip(&out[n.inputs[0].index()]) {
                    d[usize::from(*a)] = *x;
                }
            }
            op if op.is_elementwise() => {
                for i in &n.inputs {
                    for (d, x) in d.iter_mut().zip(&out[i.index()]) {
                        *d |= *x;
                    }
                }
            }
            _ => d = vec![true; rank],
        }
        out.push(d);
    }
    out
}

impl<'a> Pull<'a> {
    pub(super) fn new(f: &mut Func, k: &'a Kernel, symbols: &'a [Sym]) -> Pull<'a> {
        let operand_of = k.body.inputs().iter().enumerate().map(|(i, (v, _))| (*v, i)).collect();
        let mut p = Pull {
            k,
            symbols,
            dims: BTreeMap::new(),
            scopes: vec![BTreeMap::new()],
            set: BTreeMap::new(),
            depends: depends(k),
            operand_of,
            together: 1,
            reads: vec![],
            written: BTreeSet::new(),
            fault: None,
        };
        let mut used: Vec<Sym> = k.body.nodes.iter().flat_map(|n| n.ty.symbols()).collect();
        used.sort_unstable();
        used.dedup();
        for s in used {
            match symbols.iter().position(|x| *x == s) {
                Some(i) => {
                    let base = f.arg("dims");
                    let at = f.i64(i as i64);
                    let x = f.load_at(&base, &at, "i64", 1);
                    p.dims.insert(i, x);
                }
                None => {
                    p.fail(format!("symbol {s} is not one of the plan's"));
                }
            }
        }
        p
    }

    /// What went wrong.
    pub(super) fn finish(self) -> Result<(), CodegenError> {
        self.fault.map_or(Ok(()), Err)
    }

    /// Runs `body`; what it computes is forgotten after it.
    pub(super) fn scope<T>(&mut self, body: impl FnOnce(&mut Pull<'a>) -> T) -> T {
        self.scopes.push(BTreeMap::new());
        let out = body(self);
        self.scopes.pop();
        out
    }

    /// The value of a reduction or product at an index; terms of a sum that are still to be added.
    pub(super) fn set(&mut self, v: ValueId, index: &[At], x: Val, rest: &[ValueId]) {
        self.set.insert((v, key(index)), (x, rest.to_vec()));
    }

    pub(super) fn fail(&mut self, why: impl Into<String>) -> Val {
        let e = unsupported(self.k, why);
        self.fault.get_or_insert(e);
        Val::named("%nothing")
    }

    /// A dimension as i64.
    pub(super) fn dim(&mut self, f: &mut Func, d: Dim) -> Val {
        match d {
            Dim::Known(n) => f.i64(n as i64),
            Dim::Symbol(s) => {
                let i = self.symbols.iter().position(|x| *x == s);
                match i.and_then(|i| self.dims.get(&i)) {
                    Some(v) => v.clone(),
                    None => self.fail(format!("symbol {s} is not one of the plan's")),
                }
            }
        }
    }

    /// Product of dimensions.
    pub(super) fn product(&mut self, f: &mut Func, dims: &[Dim]) -> Val {
        let mut out = f.i64(1);
        for d in dims {
            let d = self.dim(f, *d);
            out = f.mul(&out, &d);
        }
        out
    }

    /// Row-major position of an index.
    pub(super) fn linear(&mut self, f: &mut Func, shape: &[Dim], index: &[At]) -> At {
        let mut at = At::known(f, 0);
        for (d, i) in shape.iter().zip(index) {
            let d = self.dim(f, *d);
            at = at.mul(f, &d);
            at = at.add(f, i);
        }
        at
    }

    /// The index of a row-major position.
    pub(super) fn index(&mut self, f: &mut Func, shape: &[Dim], at: &At) -> Vec<At> {
        let mut at = at.clone();
        let mut out = vec![];
        for (i, d) in shape.iter().enumerate().rev() {
            if i == 0 {
                out.push(at.clone());
            } else {
                let d = self.dim(f, *d);
                let (q, r) = at.div_rem(f, &d);
                out.push(r);
                at = q;
            }
        }
        out.reverse();
        out
    }

    /// Address of an element of buffer `i` of the kernel (operands, then results), and how it is aligned, bytes.
    pub(super) fn address(&mut self, f: &mut Func, i: usize, ty: &TensorType, index: &[At]) -> (Val, i64) {
        let at = self.linear(f, &ty.shape, index);
        let elem = elementwise::memory_elem(ty.dtype);
        let base = f.arg(&format!("p{i}"));
        let base = f.gep(&base, &at.base, elem);
        let off = f.i64(at.off);
        let align = match gcd(at.mult, at.off) {
            0 => 16,
            g => (1 << g.trailing_zeros().min(4)) * ty.dtype.size() as i64,
        };
        (f.gep(&base, &off, elem), align.min(16))
    }

    /// Every thread of a row has read what it needs of it: other rows must not have been looked at.
    pub(super) fn begin_writes(&mut self, row: &[At]) {
        let own = row.first().map(At::key);
        if self.reads.iter().any(|r| r.2 != own) {
            self.fail("a result overwrites an operand that is still needed");
        }
        self.reads.clear();
    }

    /// What is written next are other elements than those so far, and threads read what they write over only there.
    pub(super) fn apart(&mut self) {
        self.reads.clear();
        self.written.clear();
    }

    /// Writes results at indices. A result in memory of its own is written as soon as it is computed, so that the registers of many
    /// are never needed together; those over operands are written after all are computed. `list` has the places of a result side by side.
    pub(super) fn store(&mut self, f: &mut Func, list: &[(usize, Vec<At>)]) {
        let (over, own): (Vec<_>, Vec<_>) = list.iter().cloned().partition(|(i, _)| self.k.aliases[*i].is_some());
        for result in own.chunk_by(|a, b| a.0 == b.0) {
            self.store_together(f, result);
        }
        self.store_together(f, &over);
    }

    fn store_together(&mut self, f: &mut Func, list: &[(usize, Vec<At>)]) {
        let mut values = vec![];
        for (i, index) in list {
            let root = self.k.body.roots[*i].value;
            values.push(self.eval(f, root, index));
        }
        let own: BTreeSet<(usize, String)> = list
            .iter()
            .filter_map(|(i, index)| {
                let operand = self.k.aliases[*i]? as usize;
                let ty = self.k.body.ty(self.k.body.roots[*i].value).clone();
                Some((operand, self.linear(f, &ty.shape, index).key()))
            })
            .collect();
        let over: BTreeSet<usize> = own.iter().map(|x| x.0).collect();
        if self.reads.iter().any(|r| over.contains(&r.0) && !own.contains(&(r.0, r.1.clone()))) {
            self.fail("a result overwrites an operand that is still needed");
        }
        for ((i, index), x) in list.iter().zip(values) {
            let root = self.k.body.roots[*i].value;
            let ty = self.k.body.ty(root).clone();
            f.of(&[root], |f| {
                let (p, align) = self.address(f, self.k.operands.len() + i, &ty, index);
                elementwise::store_aligned(f, ty.dtype, &x, &p, align);
            });
        }
        self.written.extend(over);
    }

    /// Value `v` at an index.
    pub(super) fn eval(&mut self, f: &mut Func, v: ValueId, index: &[At]) -> Val {
        let near: Vec<String> =
            index.iter().zip(&self.depends[v.index()]).map(|(i, d)| if *d { i.key() } else { "_".into() }).collect();
        let at = (v, near.join(" "));
        if let Some(x) = self.scopes.iter().rev().find_map(|s| s.get(&at)) {
            return x.clone();
        }
        let x = f.of(&[v], |f| self.compute(f, v, index));
        if let Some(s) = self.scopes.last_mut() {
            s.insert(at, x.clone());
        }
        x
    }

    fn compute(&mut self, f: &mut Func, v: ValueId, index: &[At]) -> Val {
        let k = self.k;
        let n: &Node = k.body.node(v);
        if let Some((x, rest)) = self.set.get(&(v, key(index))).cloned() {
            let mut x = x;
            for r in rest {
                let y = self.eval(f, r, if k.body.ty(r).rank() == 0 { &[] } else { index });
                x = f.op(format!("arith.addf {x}, {y} : f32"));
            }
            return x;
        }
        match &n.op {
            Op::Input { .. } => {
                let Some(i) = self.operand_of.get(&v).copied() else {
                    return self.fail("an input is no operand");
                };
                if k.aliases.contains(&Some(i as u32)) {
                    let at = self.linear(f, &n.ty.shape, index).key();
                    self.reads.push((i, at, index.first().map(At::key)));
                    if self.written.contains(&i) {
                        return self.fail("a result overwrites an operand that is still needed");
                    }
                }
                if let (Some(Layout::Blocks(format)), [row, column]) = (k.operands.get(i), index) {
                    let width = n.ty.shape[1].known().unwrap_or(0);
                    let row = row.val(f);
                    let x = blocks::Matrix::new(f, i, *format, width).element(f, &row, column);
                    return elementwise::round_to(f, n.ty.dtype, &x, 1);
                }
                let (p, align) = self.address(f, i, &n.ty, index);
                elementwise::load_aligned(f, n.ty.dtype, &p, align)
            }
            Op::Const { dtype, bits, shape } => match bits.first() {
                Some(b) if bits.iter().all(|x| x == b) => elementwise::constant(f, *dtype, *b, 1),
                Some(_) if bits.len() <= MAX_TABLE => {
                    let dims: Vec<Dim> = shape.iter().map(|n| Dim::Known(*n)).collect();
                    let at = self.linear(f, &dims, index).val(f);
                    let ty = elementwise::register_type(*dtype, 1);
                    let mut x = elementwise::constant(f, *dtype, bits[0], 1);
                    for (i, b) in bits.iter().enumerate().skip(1) {
                        let (i, b) = (f.i64(i as i64), elementwise::constant(f, *dtype, *b, 1));
                        let here = f.cmp("eq", &at, &i);
                        x = f.op(format!("arith.select {here}, {b}, {x} : {ty}"));
                    }
                    x
                }
                _ => self.fail(format!("a constant on the GPU has at most {MAX_TABLE} elements")),
            },
            Op::Iota { axis, .. } => {
                let x = index[usize::from(*axis)].val(f);
                f.op(format!("arith.trunci {x} : i64 to i32"))
            }
            Op::Reduce { .. } => self.reduce_here(f, n, index),
            Op::Add if n.inputs.len() > TERMS => {
                let d = if n.ty.dtype == DType::I32 { DType::I32 } else { DType::F32 };
                let mut sum = vec![];
                for some in n.inputs.chunks(TERMS) {
                    sum.extend(self.args(f, some, index));
                    let x = elementwise::apply(f, &n.op, &sum, d, 1).unwrap_or_else(|why| self.fail(why));
                    sum = vec![(x, d)];
                }
                elementwise::round_to(f, n.ty.dtype, &sum[0].0, 1)
            }
            op if op.is_elementwise() => {
                let args = self.args(f, &n.inputs, index);
                if *op == Op::Binary(BinaryOp::Div) && n.ty.dtype == DType::I32 {
                    return divide(f, &args[0].0, &args[1].0);
                }
                elementwise::apply(f, op, &args, n.ty.dtype, 1).unwrap_or_else(|why| self.fail(why))
            }
            Op::After => self.eval(f, n.inputs[0], index),
            Op::Concat { axis } => self.concat(f, n, usize::from(*axis), index),
            Op::Pad { axis, lo, .. } => {
                let a = usize::from(*axis);
                let size = self.k.body.ty(n.inputs[0]).shape[a];
                let size = self.dim(f, size);
                let at = index[a].addc(-(*lo as i64));
                let inside = self.inside(f, &at, &size);
                let mut index = index.to_vec();
                index[a] = at.clamp(f, &size, self.together);
                let x = self.eval(f, n.inputs[0], &index);
                let zero = elementwise::constant(f, n.ty.dtype, 0, 1);
                let ty = elementwise::register_type(n.ty.dtype, 1);
                f.op(format!("arith.select {inside}, {x}, {zero} : {ty}"))
            }
            _ => match self.moved(f, n, index) {
                Some((x, index)) => self.eval(f, x, &index),
                None => self.fail(format!("{} has no place here on the GPU", n.op.name())),
            },
        }
    }

    /// Operands of an elementwise operator at an index.
    fn args(&mut self, f: &mut Func, inputs: &[ValueId], index: &[At]) -> Vec<(Val, DType)> {
        let one = |i: &ValueId| {
            let (rank, dtype) = (self.k.body.ty(*i).rank(), self.k.body.ty(*i).dtype);
            (self.eval(f, *i, if rank == 0 { &[] } else { index }), dtype)
        };
        inputs.iter().map(one).collect()
    }

    /// `0 <= at < n`, decided once for neighbours that go together.
    fn inside(&mut self, f: &mut Func, at: &At, n: &Val) -> Val {
        let x = at.val(f);
        f.cmp("ult", &x, n)
    }

    fn concat(&mut self, f: &mut Func, n: &Node, a: usize, index: &[At]) -> Val {
        let ty = elementwise::register_type(n.ty.dtype, 1);
        let mut start = 0;
        let mut out: Option<Val> = None;
        for i in &n.inputs {
            let size = self.k.body.ty(*i).shape[a].known().unwrap_or(0) as i64;
            if size == 0 {
                continue;
            }
            let at = index[a].addc(-start);
            let whole = f.i64(size);
            let mut index = index.to_vec();
            index[a] = at.clamp(f, &whole, self.together);
            let x = self.eval(f, *i, &index);
            out = Some(match out {
                None => x,
                Some(before) => {
                    let (p, first) = (at.val(f), f.i64(0));
                    let later = f.cmp("sge", &p, &first);
                    f.op(format!("arith.select {later}, {x}, {before} : {ty}"))
                }
            });
            start += size;
        }
        out.unwrap_or_else(|| self.fail("a concatenation of nothing"))
    }

    /// A reduction as a loop, in order.
    fn reduce_here(&mut self, f: &mut Func, n: &Node, index: &[At]) -> Val {
        let Op::Reduce { op, axis } = n.op else { return self.fail("is no reduction") };
        let (a, x) = (usize::from(axis), n.inputs[0]);
        let end = self.k.body.ty(x).shape[a];
        let end = self.dim(f, end);
        let zero = f.i64(0);
        let init = start(f, op, n.ty.dtype);
        let ty = elementwise::register_type(n.ty.dtype, 1);
        f.for_(&zero, &end, 1, &[(init, ty)], |f, i, acc| {
            self.scope(|p| {
                let mut index = index.to_vec();
                let i = At::of(f, i, 1);
                index.insert(a, i);
                let y = p.eval(f, x, &index);
                vec![combine(f, op, n.ty.dtype, &acc[0], &y)]
            })
        })
        .remove(0)
    }

    /// Where an element of a movement comes from.
    fn moved(&mut self, f: &mut Func, n: &Node, index: &[At]) -> Option<(ValueId, Vec<At>)> {
        let x = *n.inputs.first()?;
        let mut at = index.to_vec();
        match &n.op {
            Op::Broadcast { axes, .. } => at = axes.iter().map(|a| index[usize::from(*a)].clone()).collect(),
            Op::Slice { axis, start, .. } => {
                let a = usize::from(*axis);
                at[a] = at[a].addc(*start as i64);
            }
            Op::Transpose(perm) => {
                for (i, p) in perm.iter().enumerate() {
                    at[usize::from(*p)] = index[i].clone();
                }
            }
            Op::Reshape(to) => {
                let from = self.k.body.ty(x).shape.clone();
                let same = to.iter().zip(&from).take_while(|(a, b)| a == b).count().min(index.len());
                let rest = self.linear(f, &to[same..], &index[same..]);
                at.truncate(same);
                let tail = if same < from.len() { self.index(f, &from[same..], &rest) } else { vec![] };
                at.extend(tail);
            }
            Op::Gather { axis } => {
                let a = usize::from(*axis);
                let i = self.eval(f, n.inputs[1], &at[a..=a]);
                let i = f.op(format!("arith.extsi {i} : i32 to i64"));
                let size = self.k.body.ty(x).shape[a];
                let size = self.dim(f, size);
                let i = At::of(f, &i, 1);
                at[a] = i.clamp(f, &size, 1);
            }
            _ => return None,
        }
        Some((x, at))
    }
}

/// a / b; an integer divided by zero is itself.
fn divide(f: &mut Func, a: &Val, b: &Val) -> Val {
    let (zero, one) = (f.i32(0, 1), f.i32(1, 1));
    let bad = f.op(format!("arith.cmpi eq, {b}, {zero} : i32"));
    let b = f.op(format!("arith.select {bad}, {one}, {b} : i32"));
    f.op(format!("arith.divsi {a}, {b} : i32"))
}

/// What a reduction starts from.
pub(super) fn start(f: &mut Func, op: ReduceOp, d: DType) -> Val {
    let bits = match (op, d == DType::I32) {
        (ReduceOp::Sum, _) => 0,
        (ReduceOp::Max, false) => f32::NEG_INFINITY.to_bits(),
        (ReduceOp::Min, false) => f32::INFINITY.to_bits(),
        (ReduceOp::Max, true) => i32::MIN as u32,
        (ReduceOp::Min, true) => i32::MAX as u32,
    };
    elementwise::constant(f, if d == DType::I32 { DType::I32 } else { DType::F32 }, bits, 1)
}

/// One step of a reduction.
pub(super) fn combine(f: &mut Func, op: ReduceOp, d: DType, a: &Val, b: &Val) -> Val {
    let (name, ty) = match (op, d == DType::I32) {
        (ReduceOp::Sum, false) => ("addf", "f32"),
        (ReduceOp::Max, false) => ("maximumf", "f32"),
        (ReduceOp::Min, false) => ("minimumf", "f32"),
        (ReduceOp::Sum, true) => ("addi", "i32"),
        (ReduceOp::Max, true) => ("maxsi", "i32"),
        (ReduceOp::Min, true) => ("minsi", "i32"),
    };
    f.op(format!("arith.{name} {a}, {b} : {ty}"))
}
