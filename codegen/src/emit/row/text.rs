//! Writes a planned kernel down: every expression once, at the outermost loop where it can be computed.

use super::plan::Planned;
use super::stmt::Stmt;
use crate::emit::expr::{Buf, Ex, Kind};
use crate::emit::func::{Func, Val, transpose, vty};
use crate::emit::index::{Atom, AtomId, ExId, Mask, Poly};
use pleach_ir::{DType, ReduceOp, ValueId};
use std::collections::HashMap;

/// What a scope of the text has defined.
#[derive(Default)]
pub(super) struct Scope {
    pub(super) exprs: HashMap<ExId, Val>,
    pub(super) splats: HashMap<ExId, Val>,
    pub(super) atoms: HashMap<AtomId, Val>,
    pub(super) polys: HashMap<Poly, Val>,
    pub(super) pointers: HashMap<(Buf, Poly), Val>,
    pub(super) masks: HashMap<u32, Val>,
}

/// The writer.
pub(super) struct Text<'p> {
    pub(super) p: &'p mut Planned,
    pub(super) lanes: usize,
    scopes: Vec<Scope>,
    accs: HashMap<u32, Val>,
    /// The expressions that accumulators end as.
    reduced: HashMap<u32, ExId>,
    /// Whether a reduction is below an expression.
    pub(super) waits: Vec<bool>,
}

/// The element type in memory.
pub(super) fn stored(d: DType) -> &'static str {
    match d {
        DType::F32 => "f32",
        DType::I32 => "i32",
        DType::BF16 => "i16",
        DType::F16 => "f16",
        DType::Bool => "i8",
    }
}

/// The bits of stored 16-bit floats.
fn as_i16(f: &mut Func, v: &Val, d: DType, lanes: usize) -> Val {
    match stored(d) {
        "i16" => v.clone(),
        elem => f.op(format!("arith.bitcast {v} : {} to {}", vty(lanes, elem), vty(lanes, "i16"))),
    }
}

/// Two vectors of 16-bit elements, one after the other, as one vector of pairs.
fn row_of_pairs(f: &mut Func, d: DType, parts: [&Val; 2], lanes: usize) -> Val {
    let (n, t16) = (2 * lanes, vty(lanes, "i16"));
    let ids = (0..n).map(|i| i.to_string()).collect::<Vec<_>>().join(", ");
    let [lo, hi] = parts.map(|v| as_i16(f, v, d, lanes));
    let v = f.op(format!("vector.shuffle {lo}, {hi} [{ids}] : {t16}, {t16}"));
    f.op(format!("vector.bitcast {v} : {} to {}", vty(n, "i16"), vty(lanes, "i32")))
}

impl<'p> Text<'p> {
    /// A writer for this plan.
    pub(super) fn new(p: &'p mut Planned) -> Text<'p> {
        let mut reduced = HashMap::new();
        for s in &p.body {
            s.walk(&mut |s| {
                if let Stmt::Finish { accs, into, .. } = s {
                    reduced.extend(accs.iter().map(|a| (*a, *into)));
                }
            });
        }
        let mut waits = vec![false; p.b.exprs.len()];
        for e in 0..p.b.exprs.len() as ExId {
            let ex = &p.b.exprs.info(e).ex;
            waits[e as usize] = matches!(ex, Ex::Reduced(..))
                || ex.inputs().iter().any(|i| waits[*i as usize])
                || ex.index().is_some_and(|q| p.b.exprs.reach(&p.b.space, [], &[q]).iter().any(|i| waits[*i as usize]));
        }
        let lanes = p.lanes;
        Text { p, lanes, scopes: vec![Scope::default()], accs: HashMap::new(), reduced, waits }
    }

    /// Writes the whole body; `bases` are the pointers of buffers.
    pub(super) fn write(&mut self, f: &mut Func, bases: Vec<(Buf, Val)>) {
        for (buf, v) in bases {
            self.scopes[0].pointers.insert((buf, Poly::default()), v);
        }
        // Symbols are read once.
        for i in 0..self.p.b.space.len() as u32 {
            if let Atom::Sym(_) = self.p.b.space.info(AtomId(i)).atom {
                self.atom(f, AtomId(i));
            }
        }
        let body = std::mem::take(&mut self.p.body);
        self.list(f, &body, 0);
    }

    pub(super) fn find<T>(&self, get: impl Fn(&Scope) -> Option<T>) -> Option<T> {
        self.scopes.iter().rev().find_map(get)
    }

    pub(super) fn here(&mut self) -> &mut Scope {
        let n = self.scopes.len() - 1;
        &mut self.scopes[n]
    }

    fn list(&mut self, f: &mut Func, body: &[Stmt], depth: u8) {
        let mut i = 0;
        while i < body.len() {
            match &body[i] {
                Stmt::For { .. } | Stmt::If { .. } => {
                    self.hoist(f, &body[i], depth);
                    self.inner(f, &body[i], depth);
                }
                Stmt::Update { .. } | Stmt::Store { .. } => {
                    let run = body[i..].iter().take_while(|s| matches!(s, Stmt::Update { .. } | Stmt::Store { .. }));
                    let run: Vec<&Stmt> = run.collect();
                    for s in &run {
                        self.prepare(f, s);
                    }
                    for s in &run {
                        self.simple(f, s);
                    }
                    i += run.len();
                    continue;
                }
                s => self.simple(f, s),
            }
            i += 1;
        }
    }

    /// Computes what a store or update needs, so that no store comes between.
    fn prepare(&mut self, f: &mut Func, s: &Stmt) {
        match s {
            Stmt::Update { value, op: ReduceOp::Sum, kind: Kind::Float, .. } => {
                if let Some((a, b)) = self.product(*value) {
                    self.vector(f, a);
                    self.vector(f, b);
                } else {
                    self.vector(f, *value);
                }
            }
            Stmt::Update { value, .. } => {
                self.vector(f, *value);
            }
            Stmt::Store { value, vector, .. } => {
                if *vector {
                    self.vector(f, *value);
                } else {
                    self.scalar(f, *value);
                }
            }
            _ => {}
        }
    }

    fn updated(body: &[Stmt]) -> Vec<u32> {
        let mut v = vec![];
        for s in body {
            s.walk(&mut |s| {
                if let Stmt::Update { acc, .. } = s {
                    v.push(*acc);
                }
            });
        }
        v.sort_unstable();
        v.dedup();
        v
    }

    fn acc_type(&self, body: &[Stmt], acc: u32) -> String {
        let mut t = String::new();
        for s in body {
            s.walk(&mut |s| {
                if let Stmt::Update { acc: a, kind, .. } = s
                    && *a == acc
                {
                    t = vty(self.lanes, kind.name());
                }
            });
        }
        t
    }

    fn inner(&mut self, f: &mut Func, s: &Stmt, depth: u8) {
        let body = s.body();
        let carried: Vec<u32> = Self::updated(body).into_iter().filter(|a| self.accs.contains_key(a)).collect();
        let inits: Vec<(Val, String)> =
            carried.iter().map(|a| (self.accs[a].clone(), self.acc_type(body, *a))).collect();
        let out = match s {
            Stmt::For { var, lo, hi, step, .. } => {
                let (lo, hi) = (self.poly(f, lo), self.poly(f, hi));
                f.for_(&lo, &hi, *step, &inits, |f, iv, args| {
                    self.scopes.push(Scope::default());
                    self.here().atoms.insert(*var, iv.clone());
                    self.carried(f, body, depth, &carried, args)
                })
            }
            Stmt::If { lo, hi, .. } => {
                let (lo, hi) = (self.poly(f, lo), self.poly(f, hi));
                let c = f.cmp("slt", &lo, &hi);
                let types: Vec<String> = inits.iter().map(|i| i.1.clone()).collect();
                let same: Vec<Val> = inits.iter().map(|i| i.0.clone()).collect();
                f.if_else(
                    &c,
                    &types,
                    |f| {
                        self.scopes.push(Scope::default());
                        self.carried(f, body, depth, &carried, &same)
                    },
                    |_| same.clone(),
                )
            }
            _ => vec![],
        };
        for (a, v) in carried.iter().zip(out) {
            self.accs.insert(*a, v);
        }
    }

    fn carried(&mut self, f: &mut Func, body: &[Stmt], depth: u8, accs: &[u32], args: &[Val]) -> Vec<Val> {
        for (a, v) in accs.iter().zip(args) {
            self.accs.insert(*a, v.clone());
        }
        self.list(f, body, depth + 1);
        self.scopes.pop();
        accs.iter().map(|a| self.accs[a].clone()).collect()
    }

    fn simple(&mut self, f: &mut Func, s: &Stmt) {
        match s {
            Stmt::Mask { id, count } => {
                let n = self.poly(f, count);
                let m = f.lane_mask(&n, self.lanes);
                self.here().masks.insert(*id, m);
            }
            Stmt::Init { acc, op, kind } => {
                let v = super::reduce::neutral(f, *op, *kind, self.lanes);
                self.accs.insert(*acc, v);
            }
            Stmt::Update { acc, op, kind, value, mask } => f.of(&self.updates(*acc, *value), |f| {
                let old = self.accs[acc].clone();
                let sum = *op == ReduceOp::Sum && *kind == Kind::Float;
                let t = vty(self.lanes, kind.name());
                let new = match self.product(*value).filter(|_| sum) {
                    Some((a, b)) => {
                        let (a, b) = (self.vector(f, a), self.vector(f, b));
                        f.op(format!("math.fma {a}, {b}, {old} : {t}"))
                    }
                    None => {
                        let v = self.vector(f, *value);
                        super::reduce::combine(f, *op, *kind, self.lanes, &old, &v)
                    }
                };
                let new = match self.mask(f, *mask) {
                    Some(m) => f.op(format!("arith.select {m}, {new}, {old} : {}, {t}", vty(self.lanes, "i1"))),
                    None => new,
                };
                self.accs.insert(*acc, new);
            }),
            Stmt::Finish { accs, op, kind, across, into } => f.of(&[self.node(*into)], |f| {
                let mut v: Vec<Val> = accs.iter().map(|a| self.accs[a].clone()).collect();
                while v.len() > 1 {
                    v = v
                        .chunks(2)
                        .map(|c| match c {
                            [a, b] => super::reduce::combine(f, *op, *kind, self.lanes, a, b),
                            _ => c[0].clone(),
                        })
                        .collect();
                }
                let mut r = v.remove(0);
                if *across {
                    r = super::reduce::across(f, *op, *kind, self.lanes, &r);
                }
                self.here().exprs.insert(*into, r.clone());
                if !*across {
                    self.here().splats.insert(*into, r);
                }
            }),
            Stmt::Store { buf, addr, value, dtype, mask, vector } => {
                f.of(&[self.kept(*buf, *value)], |f| self.store(f, *buf, addr, *value, *dtype, *mask, *vector));
            }
            Stmt::Tile { values, buf, addr, stride, count, dtype } => f.of(&[self.kept(*buf, values[0])], |f| {
                let rows: Vec<Val> = values.iter().map(|v| self.vector(f, *v)).collect();
                let narrow: Vec<Val> = rows.iter().map(|v| super::ops::narrow(f, v, *dtype, self.lanes)).collect();
                let (rows, elem) = if narrow.len() > self.lanes {
                    (narrow.chunks(2).map(|p| row_of_pairs(f, *dtype, [&p[0], &p[1]], self.lanes)).collect(), "i32")
                } else {
                    (narrow, stored(*dtype))
                };
                let columns = transpose(f, rows, elem);
                for (k, c) in columns.iter().take(*count as usize).enumerate() {
                    let p = self.pointer(f, *buf, &addr.plus(k as i64 * stride));
                    f.store(c, &p, &vty(self.lanes, elem));
                }
            }),
            Stmt::Pair { lo, hi, buf, addr, dtype, mask } => f.of(&[self.kept(*buf, *lo)], |f| {
                let lanes = self.lanes;
                let (t16, t32) = (vty(lanes, "i16"), vty(lanes, "i32"));
                let [lo, hi] = [lo, hi].map(|e| {
                    let v = self.vector(f, *e);
                    let v = super::ops::narrow(f, &v, *dtype, lanes);
                    let v = as_i16(f, &v, *dtype, lanes);
                    f.op(format!("arith.extui {v} : {t16} to {t32}"))
                });
                let c = f.i32(16, lanes);
                let hi = f.op(format!("arith.shli {hi}, {c} : {t32}"));
                let v = f.op(format!("arith.ori {lo}, {hi} : {t32}"));
                let base = addr.filter(|m| !m.iter().any(|a| self.p.b.space.info(*a).lane));
                let p = self.pointer(f, *buf, &base);
                match self.mask(f, *mask) {
                    Some(m) => f.masked_store(&v, &p, &m, "i32", lanes),
                    None => f.store(&v, &p, &t32),
                }
            }),
            Stmt::Fence | Stmt::For { .. } | Stmt::If { .. } => {}
        }
    }

    /// The operands of a product of full precision. A sum fuses all of them into it, also those that something else reads or that a loop
    /// around it has computed: the bits of a value do not depend on what else its kernel does.
    pub(super) fn product(&self, e: ExId) -> Option<(ExId, ExId)> {
        let info = self.p.b.exprs.info(e);
        match info.ex {
            Ex::Binary(pleach_ir::BinaryOp::Mul, a, b) if info.kind == Kind::Float => Some((a, b)),
            _ => None,
        }
    }

    /// What is read to compute an expression: its operands, those of a product in place of one that is fused into it.
    pub(super) fn operands(&self, e: ExId) -> Vec<ExId> {
        let Ex::Add(parts) = &self.p.b.exprs.info(e).ex else { return self.p.b.exprs.info(e).ex.inputs() };
        let first = self.first(parts);
        let read = |(i, x): (usize, &ExId)| match self.product(*x) {
            Some((a, b)) if i != first => vec![a, b],
            _ => vec![*x],
        };
        parts.iter().enumerate().flat_map(read).collect()
    }

    /// Where a sum begins: with a part that is no product, if there is one.
    pub(super) fn first(&self, parts: &[ExId]) -> usize {
        parts.iter().position(|x| self.product(*x).is_none()).unwrap_or(0)
    }

    /// The value of the body that an expression was made for.
    fn node(&self, e: ExId) -> ValueId {
        ValueId(self.p.b.exprs.info(e).node)
    }

    /// All of them, with those of products that are fused into it.
    pub(super) fn made_for(&self, e: ExId) -> Vec<ValueId> {
        let exprs = &self.p.b.exprs;
        let mut all = exprs.nodes(e);
        if let Ex::Add(parts) = &exprs.info(e).ex {
            all.extend(parts.iter().filter(|x| self.product(**x).is_some()).flat_map(|x| exprs.nodes(*x)));
        }
        all.into_iter().map(ValueId).collect()
    }

    /// The reduction that an accumulator is for, and a product that is fused into it.
    fn updates(&self, acc: u32, value: ExId) -> Vec<ValueId> {
        let fused = self.product(value).map(|_| self.node(value));
        self.reduced.get(&acc).map(|e| self.node(*e)).into_iter().chain(fused).collect()
    }

    /// What a store keeps: a result, or a value in scratch memory.
    fn kept(&self, buf: Buf, value: ExId) -> ValueId {
        match buf {
            Buf::Result(i) => ValueId(self.p.b.model.results[i as usize] as u32),
            _ => self.node(value),
        }
    }

    /// The mask as a value; `None` when all lanes are on.
    pub(super) fn mask(&mut self, f: &mut Func, mask: Mask) -> Option<Val> {
        match mask {
            Mask::Full => None,
            Mask::First(n) => {
                let bits = (0..self.lanes).map(|i| if i < n as usize { "true" } else { "false" });
                let bits = bits.collect::<Vec<_>>().join(", ");
                Some(f.konst(&format!("dense<[{bits}]> : {}", vty(self.lanes, "i1"))))
            }
            Mask::Dynamic(id) => self.find(|s| s.masks.get(&id).cloned()),
        }
    }

    /// An expression in every lane.
    pub(super) fn vector(&mut self, f: &mut Func, e: ExId) -> Val {
        let info = self.p.b.exprs.info(e);
        let (lane, kind) = (info.lane, info.kind);
        if lane {
            return self.expr(f, e);
        }
        if let Some(v) = self.find(|s| s.splats.get(&e).cloned()) {
            return v;
        }
        let v = match self.p.b.exprs.info(e).ex {
            Ex::Const(k, bits) => super::ops::constant(f, k, bits, self.lanes),
            _ => {
                let x = self.expr(f, e);
                f.splat(&x, kind.name(), self.lanes)
            }
        };
        self.here().splats.insert(e, v.clone());
        v
    }

    /// An expression that is the same in all lanes.
    pub(super) fn scalar(&mut self, f: &mut Func, e: ExId) -> Val {
        self.expr(f, e)
    }

    /// An expression, scalar or vector as it is.
    pub(super) fn expr(&mut self, f: &mut Func, e: ExId) -> Val {
        if let Some(v) = self.find(|s| s.exprs.get(&e).cloned()) {
            return v;
        }
        let v = self.operation(f, e);
        self.here().exprs.insert(e, v.clone());
        v
    }
}
