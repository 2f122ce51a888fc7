//! What a loop uses but does not change is written before it.

use super::stmt::Stmt;
use super::text::Text;
use crate::emit::expr::{Buf, Ex};
use crate::emit::func::Func;
use crate::emit::index::{ExId, Poly};

impl Text<'_> {
    /// Writes what the loop `s` uses but does not change.
    pub(super) fn hoist(&mut self, f: &mut Func, s: &Stmt, depth: u8) {
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
                for i in self.operands(*e) {
                    let x = self.p.b.exprs.info(i);
                    if x.level <= depth && !x.lane && self.find(|s| s.exprs.get(&i).cloned()).is_some() {
                        self.vector(f, i);
                    }
                }
            }
        }
        let mut stores = vec![];
        s.walk(&mut |s| {
            if let Stmt::Store { buf, addr, .. } | Stmt::Tile { buf, addr, .. } | Stmt::Pair { buf, addr, .. } = s {
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
}
