//! Which values are written over the parameter they are assigned to.
//!
//! A parameter read means its value at entry, so whatever else reads it must run first; where that would make a group wait
//! for itself, the value gets a buffer of its own and is copied at the end. A kernel that reads the parameter and writes it
//! must read each element only where it writes it: at its own row in a row kernel, elementwise in an epilogue, as the target
//! of a scatter.

use super::body::Region;
use super::group::{Partition, behind};
use pleach_ir::{Class, Entry, Layout, Op, Param, ParamId, RootKind, ValueId};
use std::collections::{BTreeMap, BTreeSet};

impl Partition {
    /// Decides anew, for the groups as they are now.
    pub(super) fn choose_in_place(&mut self, e: &Entry, params: &[(Param, Layout)]) {
        self.in_place.clear();
        self.overwrites.clear();
        self.refresh();
        let mut taken: BTreeSet<ParamId> = BTreeSet::new();
        let mut nodes: BTreeMap<ParamId, Vec<ValueId>> = BTreeMap::new();
        for v in e.values().filter(|v| !self.is_dead(*v)) {
            if let Op::Param(p) = e.node(v).op {
                nodes.entry(p).or_default().push(v);
            }
        }
        let none = vec![];
        for r in &e.roots {
            let RootKind::Assign(p) = r.kind else { continue };
            let mut chain = vec![self.alias_base(e, r.value)];
            // What a scatter updates in place lies where its result does.
            while let Some(v) = chain.last().copied()
                && let Op::Scatter { .. } = e.node(v).op
                && let t = self.alias_base(e, e.node(v).inputs[0])
                && self.is_computed(t)
                && self.readers(t) == [v]
                && !self.is_root(e, t)
            {
                chain.push(t);
            }
            let fresh = chain.iter().all(|v| self.is_computed(*v) && !self.in_place.contains_key(v));
            if fresh
                && taken.insert(p)
                && self.may_overwrite(e, &params[p.index()], nodes.get(&p).unwrap_or(&none), &chain)
            {
                for v in chain {
                    self.in_place.insert(v, p);
                }
            }
        }
    }

    /// Whether a kernel would read the parameter that it writes as more than the operand written over.
    pub(super) fn clashes(&self, e: &Entry, r: &Region) -> bool {
        r.results.iter().zip(&r.kernel.aliases).any(|(v, alias)| {
            let Some(p) = self.in_place.get(v) else { return false };
            let shows = |o: &ValueId| e.node(self.alias_base(e, *o)).op == Op::Param(*p);
            r.operands.iter().filter(|o| shows(o)).count() > usize::from(alias.is_some())
        })
    }

    fn is_root(&self, e: &Entry, v: ValueId) -> bool {
        e.roots.iter().any(|r| self.alias_base(e, r.value) == v)
    }

    /// Whether the values of `chain` (the assigned one first, then what it updates) can lie in the buffer of a parameter, which
    /// `nodes` stand for; if so, the groups that read it are put before the one that writes it first.
    fn may_overwrite(
        &mut self,
        e: &Entry,
        (param, layout): &(Param, Layout),
        nodes: &[ValueId],
        chain: &[ValueId],
    ) -> bool {
        if *layout != Layout::RowMajor || chain.iter().any(|v| self.kept_out.contains(v)) {
            return false;
        }
        if nodes.iter().any(|x| self.is_root(e, *x)) {
            return false;
        }
        let Some(v) = chain.last().copied() else { return false };
        let Some(g) = self.group(v) else { return false };
        let readers: BTreeSet<ValueId> = nodes.iter().flat_map(|x| self.readers(*x)).copied().collect();
        let own: Vec<ValueId> = readers.iter().copied().filter(|m| self.group(*m) == Some(g)).collect();
        // One buffer must not be two operands of the kernel that writes it.
        if !own.is_empty() && (nodes.len() > 1 || !self.reads_where_it_writes(e, &param.ty.shape, nodes[0], v, g, &own))
        {
            return false;
        }
        let others: BTreeSet<usize> = readers.iter().filter_map(|m| self.group(*m)).filter(|h| *h != g).collect();
        if others.iter().any(|h| self.reach.is_before(g, *h)) {
            return false;
        }
        for h in others {
            self.reach.wait(h, g);
            self.overwrites.push((h, g));
        }
        true
    }

    /// Whether group `g` reads parameter node `x` only at the elements that it writes as `v`.
    fn reads_where_it_writes(
        &self,
        e: &Entry,
        shape: &[pleach_ir::Dim],
        x: ValueId,
        v: ValueId,
        g: usize,
        own: &[ValueId],
    ) -> bool {
        // Seen under another shape it would be an operand of its own.
        let plain =
            |m: &ValueId| e.node(*m).inputs.iter().all(|i| self.alias_base(e, *i) != x || self.shape_is(e, *i, shape));
        if e.ty(v).shape != shape || !own.iter().all(plain) {
            return false;
        }
        match self.class(g) {
            Class::Row => !self.groups[g].apart.contains(&x),
            Class::Contraction => own.iter().all(|m| {
                let n = e.node(*m);
                let direct = |i: &ValueId| self.alias_base(e, *i) == x;
                n.op.is_elementwise() && n.ty.shape == shape && self.sources(*m).iter().filter(|s| **s == x).count() == 1
                    && n.inputs.iter().any(direct)
                    // No slice or broadcast of it beside.
                    && n.inputs.iter().all(|i| direct(i) || !self.shows(e, *i, x))
            }),
            Class::Scatter => own == [v] && self.alias_base(e, e.node(v).inputs[0]) == x && {
                let n = e.node(v);
                n.inputs[1..].iter().all(|i| !self.shows(e, *i, x))
            },
            Class::Attention => false,
        }
    }

    fn shape_is(&self, e: &Entry, v: ValueId, shape: &[pleach_ir::Dim]) -> bool {
        e.ty(v).shape == shape
    }

    /// Whether `v` is a view of `x`.
    fn shows(&self, e: &Entry, mut v: ValueId, x: ValueId) -> bool {
        while self.is_view(v) {
            v = behind(e, v);
        }
        v == x
    }
}
