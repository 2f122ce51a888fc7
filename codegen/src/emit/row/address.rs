//! Addresses, indices and stores as text. Parts that change in outer loops are computed there.

use super::ops::narrow;
use super::text::{Text, stored};
use crate::emit::expr::Buf;
use crate::emit::func::{Func, Val, vty};
use crate::emit::index::{Atom, AtomId, ExId, Mask, Poly};
use pleach_ir::DType;

impl Text<'_> {
    #[allow(clippy::too_many_arguments, reason = "the parts of a store")]
    pub(super) fn store(
        &mut self,
        f: &mut Func,
        buf: Buf,
        addr: &Poly,
        e: ExId,
        dtype: DType,
        mask: Mask,
        vector: bool,
    ) {
        let lanes = if vector { self.lanes } else { 1 };
        let v = if vector { self.vector(f, e) } else { self.scalar(f, e) };
        let v = narrow(f, &v, dtype, lanes);
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
