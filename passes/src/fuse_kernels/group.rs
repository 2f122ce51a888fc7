//! Which operators share a kernel.
//!
//! Nodes are visited operands first; each computed node joins groups of its operands where that is legal and makes no
//! cycle, or starts a group. Views (reshape, slice, transpose, broadcast, after) and constants are not grouped: every
//! reader pulls them in. So are f32 functions of the elements of one 16-bit tensor ([`widened`]): the tensor is half as large as what
//! would be stored of them. Only structure is looked at: operators, shapes and who reads what.

use super::pack::{covered, live_users};
use super::reach::{Bits, Reach};
use pleach_ir::{Class, DType, Dim, Entry, Op, ParamId, RootKind, ScatterMode, ValueId};
use std::collections::{BTreeMap, BTreeSet};

/// What becomes of a node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// Input or parameter: a buffer.
    Leaf,
    /// Constant or iota: built wherever it is read.
    Inline,
    /// A view, or a function of the elements of a narrower tensor: pulled in by its readers.
    View,
    /// Computed by a kernel.
    Compute,
    /// Nothing needs it.
    Dead,
}

#[derive(Clone, Debug)]
pub(super) struct Group {
    pub(super) class: Class,
    pub(super) members: Vec<ValueId>,
    /// Axis 0 of a row group's values.
    pub(super) row: Option<Dim>,
    /// No further member may join.
    pub(super) closed: bool,
    /// Values that a member reads from memory: they may not be computed in the same kernel.
    pub(super) apart: BTreeSet<ValueId>,
}

/// Tensors that a kernel reads at most because values that could be apart share it: each has an address and is on its way to
/// registers, and a long chain of sums, such as a residual stream that is built again, would have one kernel for all of it.
pub(super) const MOST_READ: usize = 24;

/// A partition of an entry's computed values.
pub(super) struct Partition {
    pub(super) kind: Vec<Kind>,
    /// For each value, the nodes that read it and are live.
    pub(super) users: Vec<Vec<ValueId>>,
    /// Values that a root names.
    pub(super) rooted: Vec<bool>,
    /// For each computed value, the materialised values it reads, through views.
    sources: Vec<Vec<ValueId>>,
    /// For each computed value, the computed values that must exist before it although it does not read them.
    tokens: Vec<Vec<ValueId>>,
    /// For each value, the computed values that read it, directly or through views.
    pub(super) readers: Vec<Vec<ValueId>>,
    pub(super) group_of: Vec<Option<usize>>,
    pub(super) groups: Vec<Group>,
    pub(super) reach: Reach,
    /// Groups that must run before others because these overwrite what they read: (first, then).
    pub(super) overwrites: Vec<(usize, usize)>,
    /// Values that are written over the buffer of a parameter.
    pub(super) in_place: BTreeMap<ValueId, ParamId>,
    /// Values that the target refuses to write in place.
    pub(super) kept_out: BTreeSet<ValueId>,
    /// Parameters that lie in memory as codes with parts set: products decode them so.
    decoded: BTreeSet<ValueId>,
    /// Rows or columns that products pick themselves.
    picked: BTreeSet<ValueId>,
}

/// Turns elementwise f32 matrices that depend on one 16-bit tensor of their shape, and on numbers beside it, into what readers pull in.
fn widened(e: &Entry, kind: &mut [Kind]) {
    let mut of: Vec<Option<ValueId>> = vec![None; e.nodes.len()];
    for v in e.values() {
        let n = e.node(v);
        if kind[v.index()] != Kind::Compute || !n.op.is_elementwise() || n.ty.dtype != DType::F32 || n.ty.rank() < 2 {
            continue;
        }
        let mut tensors =
            n.inputs.iter().filter(|x| e.ty(**x).rank() > 0 || kind[x.index()] != Kind::Inline).map(|x| {
                let t = e.ty(*x);
                let narrow = t.dtype.is_float() && t.dtype.size() == 2 && t.shape == n.ty.shape;
                of[x.index()].or_else(|| (narrow && kind[x.index()] != Kind::Inline).then_some(*x))
            });
        let first = tensors.next().flatten();
        if first.is_some() && tensors.all(|t| t == first) {
            of[v.index()] = first;
            kind[v.index()] = Kind::View;
        }
    }
}

/// What a view is of.
pub(super) fn behind(e: &Entry, v: ValueId) -> ValueId {
    let n = e.node(v);
    let tensor = n.inputs.iter().copied().find(|x| n.op.is_elementwise() && e.ty(*x).rank() > 0);
    tensor.unwrap_or(n.inputs[0])
}

/// True when a view keeps every element in its row (axis 0).
pub(super) fn keeps_rows(e: &Entry, v: ValueId) -> bool {
    let n = e.node(v);
    let Some(x) = n.inputs.first().map(|x| e.ty(*x)) else { return false };
    match &n.op {
        Op::Slice { axis, .. } => *axis > 0,
        Op::Transpose(p) => p.first() == Some(&0),
        Op::Broadcast { shape, axes } => axes.first() == Some(&0) && shape.first() == x.shape.first(),
        Op::Reshape(s) => {
            let (a, b) = (x.shape.first(), s.first());
            a.is_some() && a == b
        }
        Op::After => true,
        op => op.is_elementwise(),
    }
}

impl Partition {
    /// `coded` says which parameters lie in memory as codes; `picked` are gathers that products read by themselves.
    pub(super) fn new(e: &Entry, coded: &dyn Fn(ParamId) -> bool, picked: BTreeSet<ValueId>) -> Partition {
        let (live, users) = live_users(e);
        let mut kind: Vec<Kind> = e
            .values()
            .map(|v| match &e.node(v).op {
                _ if !live[v.index()] => Kind::Dead,
                Op::Input { .. } | Op::Param(_) => Kind::Leaf,
                Op::Const { .. } | Op::Iota { .. } => Kind::Inline,
                Op::Reshape(_) | Op::Slice { .. } | Op::Transpose(_) | Op::Broadcast { .. } | Op::After => Kind::View,
                _ => Kind::Compute,
            })
            .collect();
        widened(e, &mut kind);
        let sets = |v: &ValueId| matches!(e.node(*v).op, Op::Scatter { mode: ScatterMode::Set, .. });
        let decoded: BTreeSet<ValueId> =
            e.values().filter(|v| live[v.index()] && sets(v) && covered(e, *v).is_some_and(coded)).collect();
        decoded.iter().chain(&picked).for_each(|v| kind[v.index()] = Kind::View);
        let n = e.nodes.len();
        let mut rooted = vec![false; n];
        e.roots.iter().for_each(|r| rooted[r.value.index()] = true);
        let mut p = Partition {
            kind,
            users,
            rooted,
            sources: vec![vec![]; n],
            tokens: vec![vec![]; n],
            readers: vec![vec![]; n],
            group_of: vec![None; n],
            groups: vec![],
            reach: Reach::default(),
            overwrites: vec![],
            in_place: BTreeMap::new(),
            kept_out: BTreeSet::new(),
            decoded,
            picked,
        };
        p.materialise(e);
        p.find_readers(e);
        for v in e.values() {
            if p.kind[v.index()] == Kind::Compute {
                p.place(e, v, coded);
            }
        }
        p.sink(e);
        p.feed_column_sums(e);
        p.join_beside(e);
        p.join_fills(e);
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
                    Op::Attention(_) | Op::AttentionGrad { .. } => i < 3,
                    Op::AttentionLse(_) => i < 2,
                    Op::Scatter { .. } => i == 2,
                    _ => continue,
                };
                let mut x = self.behind_after(e, *x);
                while slice_ok && self.last_axis_slice(e, x) {
                    x = self.behind_after(e, e.node(x).inputs[0]);
                }
                let base = self.alias_base(e, x);
                if !self.decoded.contains(&base) && !self.picked.contains(&base) {
                    mark(&mut self.kind, base);
                }
            }
            // A gather reads its table from memory.
            if matches!(n.op, Op::Gather { .. }) {
                let base = self.alias_base(e, n.inputs[0]);
                if self.kind[base.index()] == Kind::Inline || e.node(base).op.is_elementwise() {
                    mark(&mut self.kind, base);
                }
            }
        }
        for r in &e.roots {
            let base = self.alias_base(e, r.value);
            mark(&mut self.kind, base);
        }
    }

    fn behind_after(&self, e: &Entry, mut v: ValueId) -> ValueId {
        while e.node(v).op == Op::After && self.kind[v.index()] == Kind::View {
            v = e.node(v).inputs[0];
        }
        v
    }

    pub(super) fn last_axis_slice(&self, e: &Entry, v: ValueId) -> bool {
        let t = e.ty(v);
        self.kind[v.index()] == Kind::View
            && matches!(e.node(v).op, Op::Slice { axis, .. } if usize::from(axis) + 1 == t.rank() && t.rank() >= 2)
    }

    fn find_readers(&mut self, e: &Entry) {
        for v in e.values() {
            if self.kind[v.index()] != Kind::Compute {
                continue;
            }
            let (mut sources, mut tokens) = (vec![], vec![]);
            let n = e.node(v);
            let mut stack: Vec<(ValueId, bool)> = n.inputs.iter().rev().map(|x| (*x, true)).collect();
            if n.op == Op::After {
                // Materialised: the token is still not read.
                stack = vec![(n.inputs[1], false), (n.inputs[0], true)];
            }
            while let Some((x, read)) = stack.pop() {
                let list = if read { &mut sources } else { &mut tokens };
                match self.kind[x.index()] {
                    Kind::View => {
                        let m = e.node(x);
                        if m.op == Op::After {
                            stack.push((m.inputs[1], false));
                        }
                        if let Op::Scatter { .. } | Op::Gather { .. } = m.op {
                            stack.extend(m.inputs[1..].iter().map(|x| (*x, read)));
                        }
                        stack.push((behind(e, x), read));
                    }
                    Kind::Compute if !list.contains(&x) => list.push(x),
                    Kind::Leaf if read && !list.contains(&x) => list.push(x),
                    _ => {}
                }
            }
            for s in &sources {
                self.readers[s.index()].push(v);
            }
            self.sources[v.index()] = sources;
            self.tokens[v.index()] = tokens;
        }
    }

    /// The materialised values a computed node reads, through views; each once, in order.
    pub(super) fn sources(&self, v: ValueId) -> &[ValueId] {
        &self.sources[v.index()]
    }

    /// The computed values that must exist before `v` although it does not read them.
    pub(super) fn tokens(&self, v: ValueId) -> &[ValueId] {
        &self.tokens[v.index()]
    }

    /// Groups that `v` waits for.
    fn waits(&self, v: ValueId) -> impl Iterator<Item = usize> + '_ {
        let all = self.sources[v.index()].iter().chain(&self.tokens[v.index()]);
        all.filter_map(|s| self.group_of[s.index()])
    }

    /// Follows reshapes that are views down to the value whose bytes they show.
    pub(super) fn alias_base(&self, e: &Entry, mut v: ValueId) -> ValueId {
        while self.kind[v.index()] == Kind::View && matches!(e.node(v).op, Op::Reshape(_) | Op::After) {
            v = e.node(v).inputs[0];
        }
        v
    }

    pub(super) fn is_computed(&self, v: ValueId) -> bool {
        self.kind[v.index()] == Kind::Compute
    }

    pub(super) fn is_dead(&self, v: ValueId) -> bool {
        self.kind[v.index()] == Kind::Dead
    }

    pub(super) fn is_inline(&self, v: ValueId) -> bool {
        self.kind[v.index()] == Kind::Inline
    }

    pub(super) fn is_view(&self, v: ValueId) -> bool {
        self.kind[v.index()] == Kind::View
    }

    /// Computed values that read `v`, directly or through views.
    pub(super) fn readers(&self, v: ValueId) -> &[ValueId] {
        &self.readers[v.index()]
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
        let before = self.reach.closure(self.waits(v));
        self.reach.start(before);
    }

    /// Whether groups may become one as far as the values go that must be in memory.
    pub(super) fn separable(&self, set: &BTreeSet<usize>) -> bool {
        set.iter()
            .all(|g| self.groups[*g].apart.iter().all(|v| self.group_of[v.index()].is_none_or(|h| !set.contains(&h))))
    }

    fn place(&mut self, e: &Entry, v: ValueId, coded: &dyn Fn(ParamId) -> bool) {
        let n = e.node(v);
        let row = n.ty.shape.first().copied();
        match &n.op {
            Op::MatMul { .. } => {
                self.start(v, Class::Contraction, None, false);
                let sources = self.sources[v.index()].iter().copied().collect();
                if let Some(g) = self.groups.last_mut() {
                    g.apart = sources;
                }
                return;
            }
            op if op.is_attention() => return self.join_attention(e, v),
            Op::Scatter { .. } => return self.start(v, Class::Scatter, None, true),
            Op::Reduce { axis: 0, .. } => return self.start(v, Class::Row, row, true),
            // Views that had to be materialised, and movement across rows, stand alone.
            Op::Const { .. } | Op::Iota { .. } => return self.start(v, Class::Row, row, true),
            Op::Concat { axis: 0 } | Op::Pad { axis: 0, .. } => return self.start(v, Class::Row, row, true),
            // So do rows that are decoded.
            Op::Gather { .. } if matches!(e.node(n.inputs[0]).op, Op::Param(p) if coded(p)) => {
                return self.start(v, Class::Row, row, true);
            }
            _ => {}
        }
        let before = self.reach.closure(self.waits(v));
        if n.op.is_elementwise() && self.join_products(e, v, &before) {
            return;
        }
        self.join_rows(e, v, row, &before);
    }

    /// Attention and its log-sum-exp are one kernel, and so are the gradients of one attention.
    fn join_attention(&mut self, e: &Entry, v: ValueId) {
        let key = |v: ValueId| {
            let n = e.node(v);
            match n.op {
                Op::Attention(a) => Some((false, a, n.inputs[..2].to_vec(), n.inputs[3..].to_vec())),
                Op::AttentionLse(a) => Some((false, a, n.inputs[..2].to_vec(), n.inputs[2..].to_vec())),
                Op::AttentionGrad { attrs, .. } => Some((true, attrs, n.inputs.clone(), vec![])),
                _ => None,
            }
        };
        let before = self.reach.closure(self.waits(v));
        let found = self.users[e.node(v).inputs[0].index()].iter().find_map(|u| {
            let g = self.group_of[u.index()].filter(|_| *u != v && key(*u) == key(v))?;
            let new = self.groups[g].members.iter().all(|m| e.node(*m).op != e.node(v).op);
            (new && !self.reach.cycle(&[g].into(), &before)).then_some(g)
        });
        match found {
            Some(g) => self.merge(v, &[g].into(), &before),
            None => self.start(v, Class::Attention, None, true),
        }
    }

    /// Joins row groups that `v` reads at its own row, or starts a group.
    fn join_rows(&mut self, e: &Entry, v: ValueId, row: Option<Dim>, before: &Bits) {
        let n = e.node(v);
        let mut found: BTreeMap<usize, bool> = BTreeMap::new();
        let mut apart: BTreeSet<ValueId> = BTreeSet::new();
        let inputs = if n.op == Op::After { &n.inputs[..1] } else { &n.inputs[..] };
        for (i, x) in inputs.iter().enumerate() {
            // The table of a gather and anything reached by a view that leaves the row must be in memory.
            let mut aligned = match &n.op {
                Op::Gather { axis } => i == 1 && *axis == 0,
                Op::Transpose(_) | Op::Slice { .. } | Op::Broadcast { .. } | Op::Reshape(_) => keeps_rows(e, v),
                _ => e.ty(*x).rank() > 0 || row.is_none(),
            };
            let mut x = *x;
            while self.kind[x.index()] == Kind::View {
                aligned &= keeps_rows(e, x);
                x = behind(e, x);
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
                let apart = apart.iter().any(near) || !self.separable(&set);
                if apart || self.reach.cycle(&set, before) || self.read_by(e, v, &set) > MOST_READ {
                    set.remove(g);
                }
            }
        }
        if set.is_empty() {
            self.start(v, Class::Row, row, false)
        } else {
            self.merge(v, &set, before)
        }
        if let Some(g) = self.group_of[v.index()] {
            self.groups[g].apart.extend(apart);
        }
    }

    /// Tensors that some groups and `v` would read from memory as one kernel.
    fn read_by(&self, e: &Entry, v: ValueId, set: &BTreeSet<usize>) -> usize {
        let outside =
            |x: &&ValueId| !self.group_of[x.index()].is_some_and(|h| set.contains(&h)) && e.ty(**x).rank() > 0;
        let members = set.iter().flat_map(|g| &self.groups[*g].members).chain([&v]);
        members.flat_map(|m| self.sources(*m)).filter(outside).collect::<BTreeSet<_>>().len()
    }

    pub(super) fn merge(&mut self, v: ValueId, set: &BTreeSet<usize>, before: &Bits) {
        let Some(first) = set.first().copied() else { return };
        self.unite(set, before);
        self.group_of[v.index()] = Some(first);
        self.groups[first].members.push(v);
        self.groups[first].members.sort_unstable();
    }

    /// Makes several groups one: the first of them.
    pub(super) fn unite(&mut self, set: &BTreeSet<usize>, before: &Bits) {
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
        self.reach.merge(set, first, before);
        self.groups[first].members.sort_unstable();
    }

    /// A parameter that is set to something which reads nothing (zeros after an optimizer's step) is set by the row
    /// kernel that reads it last.
    fn join_fills(&mut self, e: &Entry) {
        for r in &e.roots {
            let RootKind::Assign(p) = r.kind else { continue };
            let v = self.alias_base(e, r.value);
            let Some(fill) = self.group_of[v.index()] else { continue };
            let alone = self.groups[fill].members == [v] && self.sources(v).is_empty() && self.readers(v).is_empty();
            if !alone || self.groups[fill].class != Class::Row {
                continue;
            }
            let reads: Vec<ValueId> = e.values().filter(|x| e.node(*x).op == Op::Param(p)).collect();
            let all: BTreeSet<usize> =
                reads.iter().flat_map(|x| self.readers(*x)).filter_map(|m| self.group_of[m.index()]).collect();
            let last = all.iter().copied().find(|g| all.iter().all(|h| h == g || self.reach.is_before(*h, *g)));
            let Some(g) = last else { continue };
            let fits = self.groups[g].class == Class::Row
                && !self.groups[g].closed
                && self.groups[g].row == e.ty(v).shape.first().copied()
                && reads.iter().all(|x| !self.groups[g].apart.contains(x));
            if fits {
                self.groups[fill].closed = false;
                self.unite(&[g, fill].into(), &Bits::default());
            }
        }
    }

    /// Takes a group apart: every member gets a group of its own.
    pub(super) fn dissolve(&mut self, e: &Entry, g: usize) {
        let members = std::mem::take(&mut self.groups[g].members);
        for v in members {
            let class = match e.node(v).op {
                Op::MatMul { .. } => Class::Contraction,
                _ if self.groups[g].class == Class::Contraction => Class::Row,
                _ => self.groups[g].class,
            };
            self.start(v, class, e.ty(v).shape.first().copied(), true);
        }
    }

    /// The non-empty groups, each after those it reads. Of the ready ones first those that only update parameters, then
    /// the earliest in the text.
    pub(super) fn order(&self) -> Vec<usize> {
        let n = self.groups.len();
        let mut waits = vec![BTreeSet::new(); n];
        for (g, group) in self.groups.iter().enumerate() {
            waits[g].extend(group.members.iter().flat_map(|m| self.waits(*m)).filter(|h| *h != g));
        }
        for (h, g) in &self.overwrites {
            waits[*g].insert(*h);
        }
        let mut unlocks = vec![vec![]; n];
        for (g, w) in waits.iter().enumerate() {
            for h in w {
                unlocks[*h].push(g);
            }
        }
        let key = |g: usize| {
            let m = &self.groups[g].members;
            let stays = |v: &ValueId| self.readers(*v).iter().all(|r| self.group_of[r.index()] == Some(g));
            let updates = m.iter().any(|v| self.in_place.contains_key(v)) && m.iter().all(stays);
            (!updates, m.last().copied(), g)
        };
        let mut left: Vec<usize> = waits.iter().map(BTreeSet::len).collect();
        let mut ready: BTreeSet<(bool, Option<ValueId>, usize)> =
            (0..n).filter(|g| left[*g] == 0 && !self.groups[*g].members.is_empty()).map(key).collect();
        let mut out = vec![];
        while let Some((_, _, g)) = ready.pop_first() {
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

    /// Finds anew which group comes before which, from the groups as they are now.
    pub(super) fn refresh(&mut self) {
        let mut reach = Reach::default();
        self.groups.iter().for_each(|_| reach.start(Bits::default()));
        for g in self.order() {
            let all: BTreeSet<usize> =
                self.groups[g].members.iter().flat_map(|m| self.waits(*m)).filter(|h| *h != g).collect();
            let before = reach.closure(all.into_iter());
            reach.merge(&[g].into(), g, &before);
        }
        self.reach = reach;
    }
}
