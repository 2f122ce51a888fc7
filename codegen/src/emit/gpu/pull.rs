//! Elements of a kernel's body, computed where they are asked for: a value at an index becomes scalar code.
//!
//! Movement turns into index arithmetic. Reductions and products are not computed here: their values at one index are set
//! by the skeleton. Expressions are remembered per scope, so that a value is computed once where its first use dominates
//! the others. A fault is kept, and code goes on with a meaningless value: the skeleton asks for the fault at the end.

use crate::emit::elementwise;
use crate::emit::func::{Func, Val};
use crate::emit::unsupported;
use crate::error::CodegenError;
use pleach_ir::{Dim, Kernel, Layout, Node, Op, Sym, TensorType, ValueId};
use std::collections::BTreeMap;

type Key = (ValueId, String);

pub(super) struct Pull<'a> {
    k: &'a Kernel,
    symbols: &'a [Sym],
    scopes: Vec<BTreeMap<Key, Val>>,
    set: BTreeMap<ValueId, (String, Val)>,
    fault: Option<CodegenError>,
}

fn key(index: &[Val]) -> String {
    index.iter().map(|v| v.to_string()).collect::<Vec<_>>().join(" ")
}

impl<'a> Pull<'a> {
    pub(super) fn new(k: &'a Kernel, symbols: &'a [Sym]) -> Pull<'a> {
        Pull { k, symbols, scopes: vec![BTreeMap::new()], set: BTreeMap::new(), fault: None }
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

    /// The value of a reduction or product at an index.
    pub(super) fn set(&mut self, v: ValueId, index: &[Val], x: Val) {
        self.set.insert(v, (key(index), x));
    }

    pub(super) fn is_set(&self, v: ValueId) -> bool {
        self.set.contains_key(&v)
    }

    fn fail(&mut self, why: impl Into<String>) -> Val {
        let e = unsupported(self.k, why);
        self.fault.get_or_insert(e);
        Val::named("%nothing")
    }

    /// A dimension as i64.
    pub(super) fn dim(&mut self, f: &mut Func, d: Dim) -> Val {
        match d {
            Dim::Known(n) => f.i64(n as i64),
            Dim::Symbol(s) => match self.symbols.iter().position(|x| *x == s) {
                Some(i) => f.arg(&format!("d{i}")),
                None => self.fail(format!("symbol {s} is not one of the plan's")),
            },
        }
    }

    /// Row-major position of an index.
    fn linear(&mut self, f: &mut Func, shape: &[Dim], index: &[Val]) -> Val {
        let mut at = f.i64(0);
        for (d, i) in shape.iter().zip(index) {
            let d = self.dim(f, *d);
            at = f.mul(&at, &d);
            at = f.add(&at, i);
        }
        at
    }

    /// The index of a row-major position.
    pub(super) fn index(&mut self, f: &mut Func, shape: &[Dim], at: &Val) -> Vec<Val> {
        let mut at = at.clone();
        let mut out = vec![];
        for (i, d) in shape.iter().enumerate().rev() {
            if i == 0 {
                out.push(at.clone());
            } else {
                let d = self.dim(f, *d);
                out.push(f.rem(&at, &d));
                at = f.div(&at, &d);
            }
        }
        out.reverse();
        out
    }

    fn position(&mut self, f: &mut Func, ty: &TensorType, layout: Layout, index: &[Val]) -> Val {
        match (layout, index) {
            (Layout::RowMajor, _) => self.linear(f, &ty.shape, index),
            (Layout::Panels { nr, transposed }, [a, b]) => {
                let (k, n, depth) = if transposed { (b, a, ty.shape[1]) } else { (a, b, ty.shape[0]) };
                let depth = self.dim(f, depth);
                let panel = f.divc(n, nr.into());
                let lane = f.remc(n, nr.into());
                let row = f.mul(&panel, &depth);
                let row = f.add(&row, k);
                let row = f.mulc(&row, nr.into());
                f.add(&row, &lane)
            }
            _ => self.fail("panels hold matrices"),
        }
    }

    /// Element of buffer `i` of the kernel (operands, then results).
    fn address(&mut self, f: &mut Func, i: usize, ty: &TensorType, layout: Layout, index: &[Val]) -> Val {
        let at = self.position(f, ty, layout, index);
        let base = f.arg(&format!("p{i}"));
        f.gep(&base, &at, elementwise::memory_elem(ty.dtype))
    }

    /// Writes result `i` at an index.
    pub(super) fn store(&mut self, f: &mut Func, i: usize, index: &[Val]) {
        let root = self.k.body.roots[i].value;
        let x = self.eval(f, root, index);
        let ty = self.k.body.ty(root).clone();
        let p = self.address(f, self.k.operands.len() + i, &ty, self.k.results[i], index);
        elementwise::store(f, ty.dtype, &x, &p, None, 1);
    }

    /// Value `v` at an index.
    pub(super) fn eval(&mut self, f: &mut Func, v: ValueId, index: &[Val]) -> Val {
        let at = (v, key(index));
        if let Some(x) = self.scopes.iter().rev().find_map(|s| s.get(&at)) {
            return x.clone();
        }
        let x = self.compute(f, v, index);
        if let Some(s) = self.scopes.last_mut() {
            s.insert(at, x.clone());
        }
        x
    }

    fn compute(&mut self, f: &mut Func, v: ValueId, index: &[Val]) -> Val {
        let k = self.k;
        let n: &Node = k.body.node(v);
        match &n.op {
            Op::Input { .. } => {
                let Some(i) = k.body.inputs().iter().position(|(x, _)| *x == v) else {
                    return self.fail("an input is no operand");
                };
                let p = self.address(f, i, &n.ty, k.operands[i], index);
                elementwise::load(f, n.ty.dtype, &p, None, 1)
            }
            Op::Const { dtype, bits, .. } => match bits.first() {
                Some(b) if bits.iter().all(|x| x == b) => elementwise::constant(f, *dtype, *b, 1),
                _ => self.fail("a table of constants must be an operand on the GPU"),
            },
            Op::Iota { axis, .. } => f.op(format!("arith.trunci {} : i64 to i32", index[*axis as usize])),
            Op::Reduce { .. } | Op::MatMul { .. } => match self.set.get(&v) {
                Some((at, x)) if *at == key(index) => x.clone(),
                _ => self.fail(format!("{} is read where it was not computed", n.op.name())),
            },
            op if op.is_elementwise() => {
                let args: Vec<_> = n
                    .inputs
                    .iter()
                    .map(|i| {
                        let ty = k.body.ty(*i);
                        (self.eval(f, *i, if ty.rank() == 0 { &[] } else { index }), ty.dtype)
                    })
                    .collect();
                elementwise::apply(f, op, &args, n.ty.dtype, 1).unwrap_or_else(|why| self.fail(why))
            }
            _ => match self.moved(f, n, index) {
                Some((x, index)) => self.eval(f, x, &index),
                None => self.fail(format!("{} has no GPU code", n.op.name())),
            },
        }
    }

    /// Where an element of a movement comes from.
    fn moved(&mut self, f: &mut Func, n: &Node, index: &[Val]) -> Option<(ValueId, Vec<Val>)> {
        let x = *n.inputs.first()?;
        let mut at = index.to_vec();
        match &n.op {
            Op::Broadcast { axes, .. } => at = axes.iter().map(|a| index[*a as usize].clone()).collect(),
            Op::Slice { axis, start, .. } => {
                let a = *axis as usize;
                at[a] = f.addc(&at[a], *start as i64);
            }
            Op::Transpose(perm) => {
                for (i, p) in perm.iter().enumerate() {
                    at[*p as usize] = index[i].clone();
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
                let a = *axis as usize;
                let i = self.eval(f, n.inputs[1], &at[a..=a]);
                at[a] = f.op(format!("arith.extsi {i} : i32 to i64"));
            }
            _ => return None,
        }
        Some((x, at))
    }
}
