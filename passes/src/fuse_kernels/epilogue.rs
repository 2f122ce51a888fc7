//! Which elementwise operators join the epilogue of the products they read.

use super::group::{Kind, Partition, behind, keeps_rows};
use super::reach::Bits;
use pleach_ir::{BinaryOp, Class, Dim, Entry, Op, ValueId};
use std::collections::{BTreeMap, BTreeSet};

/// At most this many products whose results meet elementwise in one epilogue.
const MAX_CHAINS: usize = 2;
/// At most this many products in one kernel, summands included.
const MAX_PRODUCTS: usize = 6;

impl Partition {
    /// Joins the epilogue of the products that `v` reads.
    pub(super) fn join_products(&mut self, e: &Entry, v: ValueId, before: &Bits) -> bool {
        if !self.saves_a_pass(e, v, before) {
            return false;
        }
        let mut found: BTreeSet<usize> = BTreeSet::new();
        for s in self.sources(v) {
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
                && !self.reach.cycle(&set, before);
            if !ok {
                set.remove(g);
            }
        }
        if set.is_empty() {
            return false;
        }
        self.merge(v, &set, before);
        true
    }

    /// An epilogue is no place for a value that ends there while the product it is made of is stored as well, unless it
    /// has to be in memory anyway: the row kernel that reads it can compute it from the same loads.
    fn saves_a_pass(&self, e: &Entry, v: ValueId, before: &Bits) -> bool {
        let readers = &self.readers[v.index()];
        let stored = |u: &ValueId| {
            let op = &e.node(*u).op;
            matches!(op, Op::MatMul { .. } | Op::Scatter { .. }) || op.is_attention()
        };
        if readers.is_empty() || readers.iter().any(|u| e.node(*u).op.is_elementwise() || stored(u)) {
            return true;
        }
        let product = |m: &ValueId| {
            self.group_of[m.index()]
                .is_some_and(|g| self.groups[g].class == Class::Contraction && !self.reach.cycle(&[g].into(), before))
        };
        self.sources(v).iter().filter(|m| product(m)).all(|m| self.readers[m.index()].iter().all(|u| *u == v))
    }

    /// Whether `v` has the shape of the group's results, or of equal slices of them that nobody else reads whole.
    pub(super) fn fits_epilogue(&self, e: &Entry, v: ValueId, g: usize) -> bool {
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
        let users = &self.users[m.index()];
        let root = self.rooted[m.index()];
        let slice = |u: ValueId| matches!(e.node(u).op, Op::Slice { start, .. } if start % 16 == 0);
        let sliced = |u: &ValueId| match self.is_view(*u) && e.node(*u).op.is_elementwise() {
            true => self.only_slices(e, *u, width),
            false => self.last_axis_slice(e, *u) && slice(*u) && e.ty(*u).shape.last() == Some(&width),
        };
        !root && users.iter().all(sliced)
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
        // The sum that a product is a term of, as it is or scaled by a number.
        let sum = |m: ValueId| -> Option<ValueId> {
            let only = |x: ValueId| {
                let r = &self.readers[x.index()];
                (r.len() == 1 && e.node(r[0]).inputs.contains(&x) && !self.rooted[x.index()]).then(|| r[0])
            };
            let r = only(m)?;
            let n = e.node(r);
            let scaled = n.op == Op::Binary(BinaryOp::Mul) && n.inputs.iter().any(|i| e.ty(*i).rank() == 0);
            let r = if scaled { only(r)? } else { r };
            (e.node(r).op == Op::Add).then_some(r)
        };
        let same = products.iter().all(|m| e.ty(*m).shape == e.ty(products[0]).shape);
        // Summands of one sum accumulate together; each other product keeps accumulators of its own.
        let mut sums: BTreeSet<ValueId> = BTreeSet::new();
        let mut chains = 0;
        for m in &products {
            chains += usize::from(sum(*m).is_none_or(|s| sums.insert(s)));
        }
        same && products.len() <= MAX_PRODUCTS && chains <= MAX_CHAINS
    }

    /// What `v` reads from outside the groups must be loadable at the place of each result element.
    pub(super) fn operands_fit(&self, e: &Entry, v: ValueId, set: &BTreeSet<usize>) -> bool {
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
                Op::Reshape(_) | Op::After => {
                    let b = self.alias_base(e, x);
                    matches!(self.kind[b.index()], Kind::Leaf | Kind::Compute) && !inside(b)
                }
                op if op.is_elementwise() => n.inputs.iter().all(|i| self.operand_fits(e, *i, rank, set)),
                _ => false,
            },
            Kind::Dead => false,
        }
    }

    /// Moves ends of epilogues into the row kernel that alone reads them, where what they are made of is stored anyway, or narrower:
    /// one tensor fewer goes through memory, or a smaller one. What others wait for stays.
    pub(super) fn sink(&mut self, e: &Entry) {
        let mut waiting: BTreeMap<ValueId, Vec<ValueId>> = BTreeMap::new();
        for v in e.values() {
            self.tokens(v).iter().for_each(|t| waiting.entry(*t).or_default().push(v));
        }
        for v in e.values().rev() {
            let Some(g) = self.group_of[v.index()] else { continue };
            let Some(r) = self.readers[v.index()].first().and_then(|u| self.group_of[u.index()]) else { continue };
            if waiting.get(&v).is_some_and(|all| all.iter().any(|u| self.group_of[u.index()] != Some(r))) {
                continue;
            }
            let inside = |x: &ValueId| self.group_of[x.index()] == Some(g);
            let ends = self.groups[g].class == Class::Contraction
                && e.node(v).op.is_elementwise()
                && self.readers[v.index()].iter().all(|u| self.group_of[u.index()] == Some(r))
                && !self.roots_show(e, v);
            let stored = |x: &ValueId| self.readers[x.index()].iter().any(|u| !inside(u)) || self.roots_show(e, *x);
            // Of the group the end reads one matrix of a narrower type and of its shape: that is stored in its place.
            let narrower = |x: &ValueId| {
                let (t, end) = (e.ty(*x), e.ty(v));
                t.shape == end.shape && t.dtype.size() < end.dtype.size()
            };
            let mut own = self.sources(v).iter().filter(|x| inside(x));
            let short = own.clone().count() == 1 && own.clone().all(narrower);
            let free = short || own.all(stored);
            let to = &self.groups[r];
            let takes = r != g
                && to.class == Class::Row
                && !to.closed
                && to.row == e.ty(v).shape.first().copied()
                && !to.apart.contains(&v)
                && self.sources(v).iter().all(|x| self.group_of[x.index()] != Some(r));
            if !(ends && free && takes) {
                continue;
            }
            let apart: Vec<ValueId> = e.node(v).inputs.iter().filter_map(|i| self.leaves_row(e, *i, v)).collect();
            self.groups[g].members.retain(|m| *m != v);
            self.group_of[v.index()] = Some(r);
            self.groups[r].members.push(v);
            self.groups[r].members.sort_unstable();
            self.groups[r].apart.extend(apart);
        }
    }

    /// Moves elementwise values that sums across rows alone read into the kernels of those sums, where what they are made
    /// of is in memory anyway: such a value is never stored.
    pub(super) fn feed_column_sums(&mut self, e: &Entry) {
        let waited = self.waited(e);
        // What a view moves is read at other rows than its own.
        let mut moved: BTreeSet<ValueId> = BTreeSet::new();
        for v in e.values().rev().filter(|v| self.is_view(*v)) {
            if !e.node(v).op.is_elementwise() || moved.contains(&v) {
                moved.extend(&e.node(v).inputs);
            }
        }
        let mut sums: BTreeSet<usize> = BTreeSet::new();
        for v in e.values().rev() {
            let Some(g) = self.group_of[v.index()] else { continue };
            let n = e.node(v);
            if matches!(n.op, Op::Reduce { axis: 0, .. }) && self.groups[g].members == [v] {
                sums.insert(g);
                continue;
            }
            let to = self.readers[v.index()].first().and_then(|u| self.group_of[u.index()]);
            let Some(to) = to.filter(|to| sums.contains(to)) else { continue };
            let alone = self.readers[v.index()].iter().all(|u| self.group_of[u.index()] == Some(to));
            if !n.op.is_elementwise() || !alone || self.roots_show(e, v) || waited.contains(&v) || moved.contains(&v) {
                continue;
            }
            let stored = |x: &ValueId| {
                self.readers[x.index()].iter().any(|u| self.group_of[u.index()] != Some(g)) || self.roots_show(e, *x)
            };
            let free = self.sources(v).iter().filter(|x| self.group_of[x.index()] == Some(g)).all(stored);
            if free && to != g {
                self.groups[g].members.retain(|m| *m != v);
                self.group_of[v.index()] = Some(to);
                self.groups[to].members.push(v);
                self.groups[to].members.sort_unstable();
            }
        }
    }

    /// Values that something waits for without reading them: moved into a later kernel they might wait for themselves.
    fn waited(&self, e: &Entry) -> BTreeSet<ValueId> {
        e.values().flat_map(|v| self.tokens(v).to_vec()).collect()
    }

    fn roots_show(&self, e: &Entry, v: ValueId) -> bool {
        self.rooted[v.index()] || e.roots.iter().any(|r| self.alias_base(e, r.value) == v)
    }

    /// The value behind an operand of `v`, if it is read at other rows than `v`'s own.
    fn leaves_row(&self, e: &Entry, mut x: ValueId, v: ValueId) -> Option<ValueId> {
        let row = e.ty(v).shape.first();
        let mut aligned = e.ty(x).rank() > 0;
        while self.is_view(x) {
            aligned &= keeps_rows(e, x);
            x = behind(e, x);
        }
        (!aligned || e.ty(x).shape.first() != row).then_some(x)
    }
}
