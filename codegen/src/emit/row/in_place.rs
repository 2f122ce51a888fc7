//! Results that overwrite operands: what may be written when.

use super::nest::{Item, What};
use super::plan::Planner;
use crate::emit::expr::{Buf, Ex};
use crate::emit::index::{ExId, Poly};

impl Planner {
    /// A write over an operand waits for passes of its level over other nests.
    pub(super) fn must_wait(&self, rest: &[(u32, bool, usize)], o: &(u32, bool, usize), level: u32) -> bool {
        o.1 && rest.iter().any(|x| x.0 == level && self.items[x.2].nest != self.items[o.2].nest)
    }

    /// The operand that an item writes over.
    pub(super) fn overwrites(&self, x: &Item) -> Option<u32> {
        match x.what {
            What::Store { buf: Buf::Result(r), .. } => self.aliases.iter().find(|a| a.0 == r).map(|a| a.1),
            _ => None,
        }
    }

    /// Notes which overwritten operands these values read, and whether at an address that the same step writes.
    pub(super) fn trace(&mut self, values: &[ExId], stores: &[(u32, u32, Poly)]) {
        if self.aliases.is_empty() {
            return;
        }
        for (r, _, _) in stores {
            self.writes.insert((*r, self.pass));
        }
        for e in self.b.exprs.reach(&self.b.space, values.iter().copied(), &[]) {
            if let Ex::Load { buf: Buf::Operand(o), addr, .. } = &self.b.exprs.info(e).ex
                && self.b.overwritten[*o as usize]
            {
                let same = stores.iter().any(|s| s.1 == *o && s.2 == *addr);
                self.reads.insert((*o, self.pass, same));
            }
        }
    }

    /// A result that overwrites what is read later or elsewhere.
    pub(super) fn find_hazard(&self) -> Option<u32> {
        let bad = |r: u32, o: u32| {
            self.writes
                .iter()
                .filter(|w| w.0 == r)
                .any(|(_, w)| self.reads.iter().any(|(x, pass, same)| *x == o && (pass > w || (pass == w && !same))))
        };
        self.aliases.iter().find(|(r, o)| bad(*r, *o)).map(|a| a.0)
    }
}
