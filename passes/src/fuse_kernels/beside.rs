//! Element-wise kernels that read nothing but what another kernel reads at the same places, or give what the epilogue of a product alone
//! reads: they are computed there.
//!
//! What is built again for a gradient is made of tensors that the element-wise part of the backward half reads as well. In a kernel of its
//! own it would read them once more, and take a launch. The other kernel may be a row kernel, or the epilogue of a product, whose
//! memory has time while it multiplies. What reads the values waits for that kernel then; nothing waits for itself.

use super::group::{MOST_READ, Partition};
use pleach_ir::{Class, Entry, Op, ValueId};
use std::collections::BTreeSet;

impl Partition {
    /// Moves such kernels.
    pub(super) fn join_beside(&mut self, e: &Entry) {
        self.refresh();
        for g in 0..self.groups.len() {
            if let Some(to) = self.beside(e, g) {
                let (class, row) = (self.groups[to].class, self.groups[to].row);
                let set: BTreeSet<usize> = [g, to].into();
                self.unite(&set, &Default::default());
                let all = &mut self.groups[g.min(to)];
                (all.class, all.row) = (class, row);
            }
        }
    }

    /// The kernel that reads all tensors of an element-wise one, or alone a result of it.
    fn beside(&self, e: &Entry, g: usize) -> Option<usize> {
        let group = &self.groups[g];
        let first = *group.members.first()?;
        let shape = &e.ty(first).shape;
        let plain = |v: &ValueId| {
            let n = e.node(*v);
            n.op.is_elementwise() && n.ty.shape == *shape && !e.roots.iter().any(|r| self.alias_base(e, r.value) == *v)
        };
        if group.class != Class::Row || group.closed || shape.len() < 2 || !group.members.iter().all(plain) {
            return None;
        }
        let sources: BTreeSet<ValueId> = group
            .members
            .iter()
            .flat_map(|m| self.sources(*m))
            .copied()
            .filter(|x| self.group(*x) != Some(g))
            .collect();
        let tensors: Vec<ValueId> = sources.iter().copied().filter(|x| e.ty(*x).rank() >= 2).collect();
        let among = |x: ValueId| -> BTreeSet<usize> {
            let element_wise = self.readers(x).iter().filter(|u| !matches!(e.node(**u).op, Op::MatMul { .. }));
            element_wise.filter_map(|u| self.group(*u)).filter(|h| *h != g).collect()
        };
        let mut found = among(*tensors.first()?);
        for x in &tensors[1..] {
            let own = among(*x);
            found.retain(|h| own.contains(h));
        }
        // The only product in whose epilogue a result is read: it need not be stored then.
        let alone = |m: &ValueId| {
            let mut all = self.readers(*m).iter().filter(|u| self.group(**u) != Some(g));
            let to = self.group(*all.clone().next()?)?;
            let reads = |u: &ValueId| self.group(*u) == Some(to) && e.node(*u).op.is_elementwise();
            (self.groups[to].class == Class::Contraction && all.all(reads)).then_some(to)
        };
        found.extend(group.members.iter().filter_map(alone));
        let fits = |to: &usize| {
            let set: BTreeSet<usize> = [g, *to].into();
            let other = &self.groups[*to];
            let reads: BTreeSet<ValueId> = other.members.iter().flat_map(|m| self.sources(*m)).copied().collect();
            let takes = match other.class {
                Class::Row => other.row == group.row && !tensors.iter().any(|x| other.apart.contains(x)),
                Class::Contraction => {
                    let member = |v: &ValueId| self.fits_epilogue(e, *v, *to) && self.operands_fit(e, *v, &set);
                    group.members.iter().all(member)
                }
                Class::Attention | Class::Scatter => false,
            };
            takes
                && !other.closed
                && reads.union(&sources).count() <= MOST_READ
                && self.separable(&set)
                && !self.reach.cycle(&set, &Default::default())
        };
        let found: Vec<usize> = found.into_iter().filter(fits).collect();
        let product = found.iter().copied().find(|h| self.groups[*h].class == Class::Contraction);
        product.or(found.first().copied())
    }
}
