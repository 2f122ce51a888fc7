//! Writes a planned kernel down: every expression once, at the outermost loop where it can be computed.

use super::plan::Planned;
use super::stmt::Stmt;
use crate::emit::expr::{Buf, Ex, Kind};
use crate::emit::func::{Func, Val, vty};
use crate::emit::index::{Atom, AtomId, ExId, Mask, Poly};
use pleach_ir::{DType, ReduceOp};
use std::collections::HashMap;

/// What a scope of the text has defined.
#[derive(Default)]
struct Scope {
    exprs: HashMap<ExId, Val>,
    splats: HashMap<ExId, Val>,
    atoms: HashMap<AtomId, Val>,
    polys: HashMap<Poly, Val>,
    pointers: HashMap<(Buf, Poly), Val>,
    masks: HashMap<u32, Val>,
}

/// The writer.
pub(super) struct Text<'p> {
    pub(super) p: &'p mut Planned,
    pub(super) lanes: usize,
    scopes: Vec<Scope>,
    accs: HashMap<u32, Val>,
    /// How often each expression is read.
    uses: Vec<u32>,
    /// Whether a reduction is below an expression.
    waits: Vec<bool>,
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

impl<'p> Text<'p> {
    /// A writer for this plan.
    pub(super) fn new(p: &'p mut Planned) -> Text<'p> {
        let mut uses = vec![0u32; p.b.exprs.len()];
        let mut roots = vec![];
        for s in &p.body {
            s.walk(&mut |s| roots.extend(s.reads().0));
        }
        let mut reads = vec![];
        for e in p.b.exprs.reach(&p.b.space, roots.iter().copied(), &[]) {
            reads.extend(p.b.exprs.info(e).ex.inputs());
        }
        for e in roots.into_iter().chain(reads) {
            uses[e as usize] += 1;
        }
        let mut waits = vec![false; p.b.exprs.len()];
        for e in 0..p.b.exprs.len() as ExId {
            let ex = &p.b.exprs.info(e).ex;
            waits[e as usize] = matches!(ex, Ex::Reduced(..))
                || ex.inputs().iter().any(|i| waits[*i as usize])
                || ex.index().is_some_and(|q| p.b.exprs.reach(&p.b.space, [], &[q]).iter().any(|i| waits[*i as usize]));
        }
        let lanes = p.lanes;
        Text { p, lanes, scopes: vec![Scope::default()], accs: HashMap::new(), uses, waits }
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

    fn find<T>(&self, get: impl Fn(&Scope) -> Option<T>) -> Option<T> {
        self.scopes.iter().rev().find_map(get)
    }

    fn here(&mut self) -> &mut Scope {
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

    /// Writes what the loop `s` uses but does not change.
    fn hoist(&mut self, f: &mut Func, s: &Stmt, depth: u8) {
        let (mut roots, mut polys) = (vec![], vec![]);
        s.walk(&mut |s| {
            let (e, p) = s.reads();
            roots.extend(e);
            polys.extend(p);
        });
        let all = self.p.b.exprs.reach(&self.p.b.space, roots, &polys);
        for e in &all {
            let info = self.p.b.exprs.info(*e);
            if info.level <= depth {
                if !matches!(info.ex, Ex::Reduced(..))
                    && self.ready(*e)
                    && self.find(|s| s.exprs.get(e).cloned()).is_none()
                {
                    self.expr(f, *e);
                }
                continue;
            }
            if let Ex::Load { buf, addr, .. } = info.ex.clone() {
                self.hoist_pointer(f, buf, &addr, depth);
            }
            if self.p.b.exprs.info(*e).lane {
                for i in self.p.b.exprs.info(*e).ex.inputs() {
                    let x = self.p.b.exprs.info(i);
                    if x.level <= depth && !x.lane && self.find(|s| s.exprs.get(&i).cloned()).is_some() {
                        self.vector(f, i);
                    }
                }
            }
        }
        let mut stores = vec![];
        s.walk(&mut |s| {
            if let Stmt::Store { buf, addr, .. } | Stmt::Tile { buf, addr, .. } = s {
                stores.push((*buf, addr.clone()));
            }
        });
        for (buf, addr) in stores {
            self.hoist_pointer(f, buf, &addr, depth);
        }
    }

    /// Every reduction below an expression has been written.
    fn ready(&self, e: ExId) -> bool {
        !self.waits[e as usize]
            || self.p.b.exprs.reach(&self.p.b.space, [e], &[]).iter().all(|x| {
                !matches!(self.p.b.exprs.info(*x).ex, Ex::Reduced(..))
                    || self.find(|s| s.exprs.get(x).cloned()).is_some()
            })
    }

    fn hoist_pointer(&mut self, f: &mut Func, buf: Buf, addr: &Poly, depth: u8) {
        let space = &self.p.b.space;
        let fixed =
            addr.filter(|m| !m.is_empty() && m.iter().all(|a| space.info(*a).level <= depth && !space.info(*a).lane));
        let ready = {
            let all = self.p.b.exprs.reach(space, [], &[&fixed]);
            all.iter().all(|e| self.ready(*e))
        };
        if ready && !fixed.0.is_empty() {
            self.pointer(f, buf, &fixed);
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
            Stmt::Update { acc, op, kind, value, mask } => {
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
            }
            Stmt::Finish { accs, op, kind, across, into } => {
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
            }
            Stmt::Store { buf, addr, value, dtype, mask, vector } => {
                self.store(f, *buf, addr, *value, *dtype, *mask, *vector)
            }
            Stmt::Tile { values, buf, addr, stride, count, dtype } => {
                let rows: Vec<Val> = values.iter().map(|v| self.vector(f, *v)).collect();
                let narrow: Vec<Val> = rows.iter().map(|v| super::ops::narrow(f, v, *dtype, self.lanes)).collect();
                let columns = super::reduce::transpose(f, narrow, stored(*dtype), self.lanes);
                for (k, c) in columns.iter().take(*count as usize).enumerate() {
                    let p = self.pointer(f, *buf, &addr.plus(k as i64 * stride));
                    f.store(c, &p, &vty(self.lanes, stored(*dtype)));
                }
            }
            Stmt::Fence | Stmt::For { .. } | Stmt::If { .. } => {}
        }
    }

    /// The operands of a product that is read once, not yet computed and of full precision.
    pub(super) fn product(&self, e: ExId) -> Option<(ExId, ExId)> {
        let info = self.p.b.exprs.info(e);
        match info.ex {
            Ex::Binary(pleach_ir::BinaryOp::Mul, a, b)
                if info.kind == Kind::Float
                    && self.uses[e as usize] == 1
                    && self.find(|s| s.exprs.get(&e).cloned()).is_none() =>
            {
                Some((a, b))
            }
            _ => None,
        }
    }

    #[allow(clippy::too_many_arguments, reason = "the parts of a store")]
    fn store(&mut self, f: &mut Func, buf: Buf, addr: &Poly, e: ExId, dtype: DType, mask: Mask, vector: bool) {
        let lanes = if vector { self.lanes } else { 1 };
        let v = if vector { self.vector(f, e) } else { self.scalar(f, e) };
        let v = super::ops::narrow(f, &v, dtype, lanes);
        let elem = stored(dtype);
        if !vector {
            let p = self.pointer(f, buf, addr);
            return f.store(&v, &p, elem);
        }
        if self.p.b.space.lane_stride(addr) == Some(1) {
            let base = addr.filter(|m| !m.iter().any(|a| self.p.b.space.info(*a).lane));
            let p = self.pointer(f, buf, &base);
            match self.mask(f, mask) {
                Some(m) => f.masked_store(&v, &p, &m, elem, lanes),
                None => f.store(&v, &p, &vty(lanes, elem)),
            }
            return;
        }
        // Lanes that are off repeat the last one that is on.
        for k in (0..lanes as u8).rev() {
            let Some(at) = self.lane_address(addr, k, mask) else { continue };
            let p = self.pointer(f, buf, &at);
            let src = match mask {
                Mask::Dynamic(_) => self.dynamic_lane(f, &v, k, mask, elem),
                _ => f.op(format!("vector.extract {v}[{k}] : {elem} from {}", vty(lanes, elem))),
            };
            f.store(&src, &p, elem);
        }
    }

    /// The lane that is stored in place of lane `k`: the last one in use where `k` is off.
    fn dynamic_lane(&mut self, f: &mut Func, v: &Val, k: u8, mask: Mask, elem: &str) -> Val {
        let n = self.last_lane(k, mask);
        let i = self.poly(f, &n);
        let t = vty(self.lanes, elem);
        f.op(format!("llvm.extractelement {v}[{i} : i64] : {t}"))
    }

    fn last_lane(&mut self, k: u8, mask: Mask) -> Poly {
        match mask {
            Mask::Dynamic(id) => {
                let last = self.p.counts[id as usize].plus(-1);
                self.p.b.space.min(&Poly::from(i64::from(k)), &last)
            }
            _ => i64::from(k).into(),
        }
    }

    /// The address in lane `k`; `None` for a lane that is off.
    pub(super) fn lane_address(&mut self, addr: &Poly, k: u8, mask: Mask) -> Option<Poly> {
        if matches!(mask, Mask::First(n) if k >= n) {
            return None;
        }
        let n = self.last_lane(k, mask);
        Some(self.p.b.space.at_lane(addr, k, &|_, _| n.clone()))
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

    // ---- indices ----

    /// A polynomial without lanes, as i64. Parts that change in outer loops are shared.
    pub(super) fn poly(&mut self, f: &mut Func, p: &Poly) -> Val {
        if let Some(c) = p.known() {
            return f.i64(c);
        }
        if let Some(v) = self.find(|s| s.polys.get(p).cloned()) {
            return v;
        }
        let c = p.constant();
        let v = if c != 0 {
            let v = self.poly(f, &p.varying());
            f.addc(&v, c)
        } else {
            let (outer, inner) = self.part(p);
            let mut v = self.poly(f, &outer);
            for (m, k) in inner.0 {
                let mut t: Option<Val> = None;
                for a in m {
                    let x = self.atom(f, a);
                    t = Some(match t {
                        Some(t) => f.mul(&t, &x),
                        None => x,
                    });
                }
                if let Some(t) = t {
                    let t = f.mulc(&t, k);
                    v = f.add(&v, &t);
                }
            }
            v
        };
        self.here().polys.insert(p.clone(), v.clone());
        v
    }

    /// Splits off the terms that change in the innermost loop.
    fn part(&self, p: &Poly) -> (Poly, Poly) {
        let space = &self.p.b.space;
        let level = |m: &[AtomId]| m.iter().map(|a| space.info(*a).level).max().unwrap_or(0);
        let top = p.0.iter().map(|t| level(&t.0)).max().unwrap_or(0);
        (p.filter(|m| level(m) < top), p.filter(|m| level(m) == top))
    }

    /// The address of an element.
    pub(super) fn pointer(&mut self, f: &mut Func, buf: Buf, p: &Poly) -> Val {
        if let Some(v) = self.find(|s| s.pointers.get(&(buf, p.clone())).cloned()) {
            return v;
        }
        let elem = stored(self.element(buf));
        let c = p.constant();
        let v = if c != 0 {
            let base = self.pointer(f, buf, &p.varying());
            let c = f.i64(c);
            f.gep(&base, &c, elem)
        } else {
            let (outer, inner) = self.part(p);
            let base = self.pointer(f, buf, &outer);
            let i = self.poly(f, &inner);
            f.gep(&base, &i, elem)
        };
        self.here().pointers.insert((buf, p.clone()), v.clone());
        v
    }

    /// Element type of a buffer.
    pub(super) fn element(&self, buf: Buf) -> DType {
        let m = &self.p.b.model;
        match buf {
            Buf::Operand(o) => {
                let n = m.operand.iter().position(|x| *x == Some(o)).unwrap_or(0);
                m.nodes[n].dtype
            }
            Buf::Result(r) => m.nodes[m.results[r as usize]].dtype,
            Buf::Scratch(s) => self.p.slots[s as usize].1,
            Buf::Table(t) => m.nodes[self.p.b.tables[t as usize]].dtype,
        }
    }

    pub(super) fn atom(&mut self, f: &mut Func, a: AtomId) -> Val {
        if let Some(v) = self.find(|s| s.atoms.get(&a).cloned()) {
            return v;
        }
        let lanes = self.lanes;
        let v = match self.p.b.space.info(a).atom.clone() {
            Atom::Sym(i) => f.dim(i as usize),
            Atom::First => f.arg("first"),
            Atom::Last => f.arg("last"),
            Atom::Div(x, d) => {
                let (x, d) = (self.poly(f, &x), self.poly(f, &d));
                f.div(&x, &d)
            }
            Atom::Rem(x, d) => {
                let (x, d) = (self.poly(f, &x), self.poly(f, &d));
                f.rem(&x, &d)
            }
            Atom::Min(x, y) => {
                let (x, y) = (self.poly(f, &x), self.poly(f, &y));
                f.min(&x, &y)
            }
            Atom::Max(x, y) => {
                let (x, y) = (self.poly(f, &x), self.poly(f, &y));
                f.max(&x, &y)
            }
            Atom::Value(e) => {
                let v = self.expr(f, e);
                f.op(format!("arith.extsi {v} : i32 to i64"))
            }
            Atom::LaneOf(e, k) => {
                let v = self.expr(f, e);
                let x = f.op(format!("vector.extract {v}[{k}] : i32 from {}", vty(lanes, "i32")));
                f.op(format!("arith.extsi {x} : i32 to i64"))
            }
            // A counter is defined by its loop, the lane number never stands alone.
            Atom::Loop(_) | Atom::Lane(_) => f.i64(0),
        };
        self.here().atoms.insert(a, v.clone());
        v
    }
}
