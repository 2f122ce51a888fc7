//! Which operators share a kernel.
//!
//! Nodes are visited operands first; each computed node joins groups of its operands where that is legal and makes no
//! cycle, or starts a group. Views (reshape, slice, transpose, broadcast) and constants are not grouped: every reader
//! pulls them in. Only structure is looked at: operators, shapes and who reads what.

use pleach_ir::{Class, Dim, Entry, Op, ValueId};
use std::collections::{BTreeMap, BTreeSet};

/// At most this many products whose results meet elementwise in one epilogue.
const MAX_CHAINS: usize = 2;
/// At most this many products in one kernel, summands included.
const MAX_PRODUCTS: usize = 6;

/// What becomes of a node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    /// Input or parameter: a buffer.
    Leaf,
    /// Constant or iota: built wherever it is read.
    Inline,
    /// A view: pulled in by its readers.
    View,
    /// Computed by a kernel.
    Compute,
    /// Nothing needs it.
    Dead,
}

#[derive(Clone, Debug)]
struct Group {
    class: Class,
    members: Vec<ValueId>,
    /// Axis 0 of a row group's values.
    row: Option<Dim>,
    /// No further member may join.
    closed: bool,
    /// Values that a member reads from memory: they may not be computed in the same kernel.
    apart: BTreeSet<ValueId>,
}

/// A partition of an entry's computed values.
pub(super) struct Partition {
    kind: Vec<Kind>,
    /// For each value, the computed values that read it, directly or through views.
    readers: Vec<Vec<ValueId>>,
    group_of: Vec<Option<usize>>,
    groups: Vec<Group>,
}

/// True when a view keeps every element in its row (axis 0).
fn keeps_rows(e: &Entry, v: ValueId) -> bool {
    let n = e.node(v);
    let x = e.ty(n.inputs[0]);
    match &n.op {
        Op::Slice { axis, .. } => *axis > 0,
        Op::Transpose(p) => p.first() == Some(&0),
        Op::Broadcast { shape, axes } => axes.first() == Some(&0) && shape.first() == x.shape.first(),
        Op::Reshape(s) => {
            let (a, b) = (x.shape.first(), s.first());
            a.is_some() && a == b
        }
        _ => false,
    }
}

impl Partition {
    pub(super) fn new(e: &Entry) -> Partition {
        let live = e.live();
        let kind = e
            .values()
            .map(|v| match &e.node(v).op {
                _ if !live[v.index()] => Kind::Dead,
                Op::Input { .. } | Op::Param(_) => Kind::Leaf,
                Op::Const { .. } | Op::Iota { .. } => Kind::Inline,
                Op::Reshape(_) | Op::Slice { .. } | Op::Transpose(_) | Op::Broadcast { .. } => Kind::View,
                _ => Kind::Compute,
            })
            .collect();
        let mut p = Partition { kind, readers: vec![], group_of: vec![None; e.nodes.len()], groups: vec![] };
        p.materialise(e);
        p.find_readers(e);
        for v in e.values() {
            if p.kind[v.index()] == Kind::Compute {
                p.place(e, v);
            }
        }
        p
    }

    /// Views that a reader cannot pull in become computed values.
    fn materialise(&mut self, e: &Entry) {
        let mark = |kind: &mut Vec<Kind>, v: ValueId| {
            if matches!(kind[v.index()], Kind::View | Kind::Inline) {
                kind[v.index()] = Kind::Compute;
            }
        };
        for v in e.values().rev() {
            if self.kind[v.index()] == Kind::Dead {
                continue;
            }
            let n = e.node(v);
            for (i, x) in n.inputs.iter().enumerate() {
                let slice_ok = match n.op {
                    Op::MatMul { .. } => i == 0,
                    Op::Attention(_) => i < 3,
                    Op::Scatter { .. } => i == 2,
                    _ => continue,
                };
                let mut x = *x;
                while slice_ok && self.last_axis_slice(e, x) {
                    x = e.node(x).inputs[0];
                }
                let base = self.alias_base(e, x);
                mark(&mut self.kind, base);
            }
            // A gather reads its table from memory.
            if matches!(n.op, Op::Gather { .. }) {
                let base = self.alias_base(e, n.inputs[0]);
                if self.kind[base.index()] == Kind::Inline {
                    mark(&mut self.kind, base);
                }
            }
        }
        for r in &e.roots {
            let base = self.alias_base(e, r.value);
            mark(&mut self.kind, base);
        }
    }

    fn last_axis_slice(&self, e: &Entry, v: ValueId) -> bool {
        let t = e.ty(v);
        self.kind[v.index()] == Kind::View
            && matches!(e.node(v).op, Op::Slice { axis, .. } if usize::from(axis) + 1 == t.rank() && t.rank() >= 2)
    }

    fn find_readers(&mut self, e: &Entry) {
        self.readers = vec![vec![]; e.nodes.len()];
        for v in e.values() {
            if self.kind[v.index()] != Kind::Compute {
                continue;
            }
            for b in self.sources(e, v) {
                self.readers[b.index()].push(v);
            }
        }
    }

    /// The materialised values a computed node reads, through views; each once, in order.
    fn sources(&self, e: &Entry, v: ValueId) -> Vec<ValueId> {
        let mut out = vec![];
        let mut stack: Vec<ValueId> = e.node(v).inputs.iter().rev().copied().collect();
        while let Some(x) = stack.pop() {
            match self.kind[x.index()] {
                Kind::View => stack.push(e.node(x).inputs[0]),
                Kind::Leaf | Kind::Compute if !out.contains(&x) => out.push(x),
                _ => {}
            }
        }
        out
    }

    /// Follows reshapes that are views down to the value whose bytes they show.
    pub(super) fn alias_base(&self, e: &Entry, mut v: ValueId) -> ValueId {
        while self.kind[v.index()] == Kind::View && matches!(e.node(v).op, Op::Reshape(_)) {
            v = e.node(v).inputs[0];
        }
        v
    }

    pub(super) fn is_computed(&self, v: ValueId) -> bool {
        self.kind[v.index()] == Kind::Compute
    }

    pub(super) fn is_inline(&self, v: ValueId) -> bool {
        self.kind[v.index()] == Kind::Inline
    }

    pub(super) fn is_view(&self, v: ValueId) -> bool {
        self.kind[v.index()] == Kind::View
    }

    /// Computed values that read `v`, directly or through views.
    pub(super) fn readers(&self, v: ValueId) -> Vec<ValueId> {
        self.readers[v.index()].clone()
    }

    pub(super) fn group(&self, v: ValueId) -> Option<usize> {
        self.group_of[v.index()]
    }

    pub(super) fn class(&self, g: usize) -> Class {
        self.groups[g].class
    }

    pub(super) fn members(&self, g: usize) -> &[ValueId] {
        &self.groups[g].members
    }

    fn start(&mut self, v: ValueId, class: Class, row: Option<Dim>, closed: bool) {
        self.group_of[v.index()] = Some(self.groups.len());
        self.groups.push(Group { class, members: vec![v], row, closed, apart: BTreeSet::new() });
    }

    /// Whether groups may become one as far as the values go that must be in memory.
    fn separable(&self, set: &BTreeSet<usize>) -> bool {
        set.iter()
            .all(|g| self.groups[*g].apart.iter().all(|v| self.group_of[v.index()].is_none_or(|h| !set.contains(&h))))
    }

    fn place(&mut self, e: &Entry, v: ValueId) {
        let n = e.node(v);
        let row = n.ty.shape.first().copied();
        let sources = self.sources(e, v);
        match &n.op {
            Op::MatMul { .. } => {
                self.start(v, Class::Contraction, None, false);
                if let Some(g) = self.groups.last_mut() {
                    g.apart = sources.into_iter().collect();
                }
                return;
            }
            Op::Attention(_) => return self.start(v, Class::Attention, None, true),
            Op::Scatter { .. } => return self.start(v, Class::Scatter, None, true),
            Op::Reduce { axis: 0, .. } => return self.start(v, Class::Row, row, true),
            // Views that had to be materialised, and movement across rows, stand alone.
            Op::Const { .. } | Op::Iota { .. } => return self.start(v, Class::Row, row, true),
            Op::Concat { axis: 0 } | Op::Pad { axis: 0, .. } => return self.start(v, Class::Row, row, true),
            _ => {}
        }
        if n.op.is_elementwise() && self.join_products(e, v) {
            return;
        }
        self.join_rows(e, v, row);
    }

    /// Joins the epilogue of the products that `v` reads.
    fn join_products(&mut self, e: &Entry, v: ValueId) -> bool {
        if !self.saves_a_pass(e, v) {
            return false;
        }
        let mut found: BTreeSet<usize> = BTreeSet::new();
        for s in self.sources(e, v) {
            if let Some(g) = self.group_of[s.index()]
                && self.groups[g].class == Class::Contraction
                && self.fits_epilogue(e, v, g)
            {
                found.insert(g);
            }
        }
        // As many as go together, the latest first.
        let mut set: BTreeSet<usize> = BTreeSet::new();
        for g in found.iter().rev() {
            set.insert(*g);
            let ok = self.products_agree(e, &set)
                && self.separable(&set)
                && self.operands_fit(e, v, &set)
                && !self.cycle(&set, v);
            if !ok {
                set.remove(g);
            }
        }
        if set.is_empty() {
            return false;
        }
        self.merge(v, &set);
        true
    }

    /// An epilogue is no place for a value that ends there while what it is made of is stored as well: the kernel that
    /// reads it can compute it from the same loads.
    fn saves_a_pass(&self, e: &Entry, v: ValueId) -> bool {
        let goes_on = |u: &ValueId| e.node(*u).op.is_elementwise();
        let ends = !self.readers[v.index()].iter().any(goes_on) && !self.readers[v.index()].is_empty();
        !ends
            || self
                .sources(e, v)
                .iter()
                .all(|m| !self.is_computed(*m) || self.readers[m.index()].iter().all(|u| *u == v))
    }

    /// Whether `v` has the shape of the group's results, or of equal slices of them that nobody else reads whole.
    fn fits_epilogue(&self, e: &Entry, v: ValueId, g: usize) -> bool {
        let (t, lead) = (e.ty(v), e.ty(self.groups[g].members[0]));
        let k = t.rank();
        if k < 2 || k != lead.rank() || t.shape[..k - 1] != lead.shape[..k - 1] {
            return false;
        }
        self.groups[g].members.iter().all(|m| {
            let mt = e.ty(*m);
            mt.shape == t.shape || self.only_slices(e, *m, t.shape[k - 1])
        })
    }

    /// True when every reader takes `m` through slices of this width along the last axis, starting at multiples of 16.
    fn only_slices(&self, e: &Entry, m: ValueId, width: Dim) -> bool {
        let users: Vec<ValueId> =
            e.values().filter(|u| e.node(*u).inputs.contains(&m) && self.kind[u.index()] != Kind::Dead).collect();
        let root = e.roots.iter().any(|r| r.value == m);
        let slice = |u: ValueId| matches!(e.node(u).op, Op::Slice { start, .. } if start % 16 == 0);
        !root && users.iter().all(|u| self.last_axis_slice(e, *u) && slice(*u) && e.ty(*u).shape.last() == Some(&width))
            || users
                .iter()
                .all(|u| self.group_of[u.index()].is_some_and(|g| self.groups[g].members.contains(&m)) && !root)
    }

    /// Products of one kernel have the same M and N and not too many results that stay apart.
    fn products_agree(&self, e: &Entry, set: &BTreeSet<usize>) -> bool {
        let products: Vec<ValueId> = set
            .iter()
            .flat_map(|g| self.groups[*g].members.iter().copied())
            .filter(|m| matches!(e.node(*m).op, Op::MatMul { .. }))
            .collect();
        let summed = |m: &ValueId| {
            let r = &self.readers[m.index()];
            r.len() == 1 && e.node(r[0]).op == Op::Add && e.node(r[0]).inputs.contains(m)
        };
        let same = products.iter().all(|m| e.ty(*m).shape == e.ty(products[0]).shape);
        // Summands of one sum accumulate together; each other product keeps accumulators of its own.
        let mut sums: BTreeSet<ValueId> = BTreeSet::new();
        let mut chains = 0;
        for m in &products {
            let first = !summed(m) || sums.insert(self.readers[m.index()][0]);
            chains += usize::from(first);
        }
        same && products.len() <= MAX_PRODUCTS && chains <= MAX_CHAINS
    }

    /// What `v` reads from outside the groups must be loadable at the place of each result element.
    fn operands_fit(&self, e: &Entry, v: ValueId, set: &BTreeSet<usize>) -> bool {
        e.node(v).inputs.iter().all(|x| self.operand_fits(e, *x, e.ty(v).rank(), set))
    }

    fn operand_fits(&self, e: &Entry, x: ValueId, rank: usize, set: &BTreeSet<usize>) -> bool {
        let inside = |v: ValueId| self.group_of[v.index()].is_some_and(|g| set.contains(&g));
        let n = e.node(x);
        match self.kind[x.index()] {
            Kind::Compute | Kind::Leaf => true,
            Kind::Inline => n.ty.rank() == 0,
            Kind::View => match &n.op {
                Op::Slice { start, .. } if inside(n.inputs[0]) => self.last_axis_slice(e, x) && start % 16 == 0,
                // A row or column vector, or a scalar, spread over the result.
                Op::Broadcast { axes, .. } => {
                    let b = self.alias_base(e, n.inputs[0]);
                    let plain = matches!(self.kind[b.index()], Kind::Leaf | Kind::Compute) && !inside(b)
                        || n.inputs[0] == b && e.ty(b).rank() == 0;
                    plain && axes.len() <= 1 && axes.iter().all(|a| usize::from(*a) + 2 >= rank) && rank == 2
                }
                Op::Reshape(_) => {
                    let b = self.alias_base(e, x);
                    matches!(self.kind[b.index()], Kind::Leaf | Kind::Compute) && !inside(b)
                }
                _ => false,
            },
            Kind::Dead => false,
        }
    }

    /// Joins row groups that `v` reads at its own row, or starts a group.
    fn join_rows(&mut self, e: &Entry, v: ValueId, row: Option<Dim>) {
        let n = e.node(v);
        let mut found: BTreeMap<usize, bool> = BTreeMap::new();
        let mut apart: BTreeSet<ValueId> = BTreeSet::new();
        for (i, x) in n.inputs.iter().enumerate() {
            // The table of a gather and anything reached by a view that leaves the row must be in memory.
            let mut aligned = match &n.op {
                Op::Gather { axis } => i == 1 && *axis == 0,
                Op::Transpose(_) | Op::Slice { .. } | Op::Broadcast { .. } | Op::Reshape(_) => keeps_rows(e, v),
                _ => e.ty(*x).rank() > 0 || row.is_none(),
            };
            let mut x = *x;
            while self.kind[x.index()] == Kind::View {
                aligned &= keeps_rows(e, x);
                x = e.node(x).inputs[0];
            }
            aligned &= e.ty(x).shape.first().copied() == row;
            if !aligned {
                apart.insert(x);
            }
            if let Some(g) = self.group_of[x.index()] {
                let ok = aligned
                    && self.groups[g].class == Class::Row
                    && !self.groups[g].closed
                    && self.groups[g].row == row;
                *found.entry(g).or_insert(true) &= ok;
            }
        }
        let mut set: BTreeSet<usize> = BTreeSet::new();
        for (g, ok) in found.iter().rev() {
            if *ok {
                set.insert(*g);
                let near = |x: &ValueId| self.group_of[x.index()].is_some_and(|h| set.contains(&h));
                if apart.iter().any(near) || !self.separable(&set) || self.cycle(&set, v) {
                    set.remove(g);
                }
            }
        }
        if set.is_empty() {
            self.start(v, Class::Row, row, false)
        } else {
            self.merge(v, &set)
        }
        if let Some(g) = self.group_of[v.index()] {
            self.groups[g].apart.extend(apart);
        }
    }

    /// Whether one kernel of these groups and `v` would have to wait for a kernel that waits for it.
    fn cycle(&self, set: &BTreeSet<usize>, v: ValueId) -> bool {
        let inside = |x: ValueId| x == v || self.group_of[x.index()].is_some_and(|g| set.contains(&g));
        let mut stack: Vec<usize> = vec![];
        let mut seen: BTreeSet<usize> = BTreeSet::new();
        let mut leave = |from: ValueId, stack: &mut Vec<usize>| {
            for u in &self.readers[from.index()] {
                if let Some(g) = self.group_of[u.index()]
                    && !set.contains(&g)
                    && seen.insert(g)
                {
                    stack.push(g);
                }
            }
        };
        for g in set {
            for m in &self.groups[*g].members {
                leave(*m, &mut stack);
            }
        }
        while let Some(g) = stack.pop() {
            for m in &self.groups[g].members {
                if self.readers[m.index()].iter().any(|u| inside(*u)) {
                    return true;
                }
                leave(*m, &mut stack);
            }
        }
        false
    }

    fn merge(&mut self, v: ValueId, set: &BTreeSet<usize>) {
        let Some(first) = set.first().copied() else { return };
        for g in set.iter().skip(1) {
            let moved = std::mem::take(&mut self.groups[*g].members);
            for m in &moved {
                self.group_of[m.index()] = Some(first);
            }
            self.groups[first].members.extend(moved);
            let apart = std::mem::take(&mut self.groups[*g].apart);
            self.groups[first].apart.extend(apart);
        }
        self.group_of[v.index()] = Some(first);
        self.groups[first].members.push(v);
        self.groups[first].members.sort_unstable();
    }

    /// Takes a group apart: every member gets a group of its own.
    pub(super) fn dissolve(&mut self, e: &Entry, g: usize) {
        let members = std::mem::take(&mut self.groups[g].members);
        for v in members {
            let class =
                if matches!(e.node(v).op, Op::MatMul { .. }) { Class::Contraction } else { self.groups[g].class };
            let class = if class == Class::Contraction && !matches!(e.node(v).op, Op::MatMul { .. }) {
                Class::Row
            } else {
                class
            };
            self.start(v, class, e.ty(v).shape.first().copied(), true);
        }
    }

    /// The non-empty groups, each after those it reads; of the ready ones the earliest in the text first.
    pub(super) fn order(&self, e: &Entry) -> Vec<usize> {
        let n = self.groups.len();
        let mut waits = vec![BTreeSet::new(); n];
        for (g, group) in self.groups.iter().enumerate() {
            for m in &group.members {
                for s in self.sources(e, *m) {
                    if let Some(h) = self.group_of[s.index()]
                        && h != g
                    {
                        waits[g].insert(h);
                    }
                }
            }
        }
        let mut unlocks = vec![vec![]; n];
        for (g, w) in waits.iter().enumerate() {
            for h in w {
                unlocks[*h].push(g);
            }
        }
        let key = |g: usize| (self.groups[g].members.last().copied(), g);
        let mut left: Vec<usize> = waits.iter().map(BTreeSet::len).collect();
        let mut ready: BTreeSet<(Option<ValueId>, usize)> =
            (0..n).filter(|g| left[*g] == 0 && !self.groups[*g].members.is_empty()).map(key).collect();
        let mut out = vec![];
        while let Some((_, g)) = ready.pop_first() {
            out.push(g);
            for h in &unlocks[g] {
                left[*h] -= 1;
                if left[*h] == 0 {
                    ready.insert(key(*h));
                }
            }
        }
        out
    }
}
