//! Cuts entries into kernels.
//!
//! A general partition, not a list of patterns: products, attention and scatters anchor a kernel each; elementwise
//! operators join the epilogue of the products they read where shapes allow, and otherwise form row kernels with
//! reductions and movement over the same rows. Movement that is only a view is pulled into the kernels that read it.
//! Kernels of one signature are stored once, so equal layers share their code.
//!
//! Assumes a verified graph in phase Core whose parameter-only parts were moved into `prepare` entries. Leaves the
//! order of launches to `order` and addresses to `plan-memory`.

mod beside;
mod body;
mod epilogue;
mod group;
mod in_place;
mod laid;
mod pack;
mod picks;
mod reach;
mod sums;

use crate::PassError;
use crate::options::Options;
use body::{Region, Signature};
use pack::{Coded, Packed};
use pleach_ir::schedule::same_elements;
use pleach_ir::{
    BlockFormat, Buffer, BufferId, BufferKind, Class, Entry, Graph, IrError, Kernel, KernelId, Layout, Op, ParamId,
    RootKind, Schedule, ScheduledEntry, Step, ValueId,
};
use std::collections::{BTreeMap, HashMap};

/// What the cut has to know about the target.
pub struct CutOptions<'a> {
    /// Whether a region can be one kernel; a reason otherwise. Every single operator must be accepted.
    pub supported: &'a dyn Fn(&Kernel) -> Result<(), String>,
    /// Widths of the panels in which right operands of products that are parameters are stored, widest first, as the
    /// target's registers suggest; none: they stay as they are.
    pub panels: &'a [u64],
    /// Tensors of the checkpoint, by name, that it has in blocks of codes too: where panels are made of these alone, they
    /// keep the codes; where nothing is packed, products read the blocks.
    pub blocks: BTreeMap<String, BlockFormat>,
    /// What the choice depends on whether a product reads picked rows or columns itself; none: a kernel of its own picks them.
    pub picks: Option<Options>,
}

fn fault(e: IrError) -> PassError {
    PassError::Refused { pass: "fuse-kernels".into(), why: e.to_string() }
}

/// Cuts every entry of `graph` into kernels and orders the launches.
///
/// # Errors
/// As [`cut`].
pub fn schedule(graph: &Graph, options: &CutOptions<'_>) -> Result<Schedule, PassError> {
    let mut out = cut(graph, options)?;
    order(&mut out)?;
    Ok(out)
}

/// Orders the launches of every entry. Returns how many entries changed.
///
/// # Errors
/// [`PassError`] when the result breaks a rule: a fault of the pass.
pub fn order(s: &mut Schedule) -> Result<usize, PassError> {
    let mut changed = 0;
    for e in &mut s.entries {
        let given = e.steps.clone();
        crate::order::order(e);
        changed += usize::from(e.steps != given);
    }
    s.check().map_err(fault)?;
    Ok(changed)
}

/// Cuts every entry of `graph` into kernels, launched in the order of the graph.
///
/// # Errors
/// [`PassError`] when the graph breaks a rule of the IR; a region that the target refuses is split, never an error,
/// unless a single operator is refused.
pub fn cut(graph: &Graph, options: &CutOptions<'_>) -> Result<Schedule, PassError> {
    let Packed { mut graph, layouts, coded } = match options.panels {
        [] => pack::in_blocks(graph, &options.blocks, options.supported),
        widths => pack::pack(graph, widths, &options.blocks),
    }
    .map_err(fault)?;
    for e in &mut graph.entries {
        if let Some(new) = sums::into_scatters(&graph.params, e).map_err(fault)? {
            *e = new;
        }
        if let Some(new) = sums::of_many(&graph.params, e).map_err(fault)? {
            *e = new;
        }
        sums::own_fills(&graph.params, e).map_err(fault)?;
    }
    let mut out =
        Schedule { params: graph.params.iter().cloned().zip(layouts).collect(), kernels: vec![], entries: vec![] };
    let mut table = Kernels::default();
    let mut verdicts: HashMap<Signature, bool> = HashMap::new();
    let mut accepts = |k: &Kernel| *verdicts.entry(Signature::of(k)).or_insert_with(|| (options.supported)(k).is_ok());
    for e in &graph.entries {
        let cut = EntryCut::new(e, &out.params, options.picks.as_ref(), &mut accepts)?;
        let coded = if e.name == pack::BASE { &coded[..] } else { &[] };
        out.entries.push(cut.emit(&mut table, coded)?);
    }
    out.kernels = table.kernels;
    out.check().map_err(fault)?;
    Ok(out)
}

/// Kernels by signature.
#[derive(Default)]
struct Kernels {
    kernels: Vec<Kernel>,
    by_signature: HashMap<Signature, KernelId>,
}

impl Kernels {
    fn intern(&mut self, mut k: Kernel) -> KernelId {
        let key = Signature::of(&k);
        if let Some(id) = self.by_signature.get(&key) {
            return *id;
        }
        let id = KernelId(self.kernels.len() as u32);
        k.name = format!("k{}_{}", id.0, label(&k));
        self.kernels.push(k);
        self.by_signature.insert(key, id);
        id
    }
}

/// A short name from what a kernel holds.
fn label(k: &Kernel) -> String {
    let base = match k.class {
        Class::Row => "row",
        Class::Contraction => "mm",
        Class::Attention if k.body.nodes.iter().any(|n| matches!(n.op, Op::AttentionGrad { .. })) => {
            return "attention_grad".into();
        }
        Class::Attention => return "attention".into(),
        Class::Scatter => return "scatter".into(),
    };
    if k.results.iter().any(|l| matches!(l, Layout::Panels { .. } | Layout::CodedPanels { .. })) {
        return "pack".into();
    }
    if k.results.iter().any(|l| matches!(l, Layout::Blocks(_))) {
        return "blocks".into();
    }
    let mut names: Vec<&str> = vec![];
    for n in &k.body.nodes {
        let s = n.op.name();
        if !n.op.is_leaf() && !n.op.is_movement() && s != "matmul" && names.last() != Some(&s) {
            names.push(s);
        }
    }
    names.dedup();
    names.truncate(4);
    let mm = k.body.nodes.iter().filter(|n| matches!(n.op, Op::MatMul { .. })).count();
    let count = if mm > 1 { mm.to_string() } else { String::new() };
    std::iter::once(format!("{base}{count}")).chain(names.iter().map(|s| s.to_string())).collect::<Vec<_>>().join("_")
}

/// One entry on its way to launches.
struct EntryCut<'a> {
    entry: &'a Entry,
    params: &'a [(pleach_ir::Param, Layout)],
    groups: group::Partition,
    regions: BTreeMap<usize, Region>,
    order: Vec<usize>,
}

impl<'a> EntryCut<'a> {
    fn new(
        entry: &'a Entry,
        params: &'a [(pleach_ir::Param, Layout)],
        picks: Option<&Options>,
        accepts: &mut dyn FnMut(&Kernel) -> bool,
    ) -> Result<EntryCut<'a>, PassError> {
        let picked = picks.map(|o| picks::by_products(entry, params, o, accepts)).unwrap_or_default();
        let mut groups = group::Partition::new(entry, &|p| matches!(params[p.index()].1, Layout::Blocks(_)), picked);
        groups.choose_in_place(entry, params);
        let mut regions: BTreeMap<usize, Region> = BTreeMap::new();
        let mut order = groups.order();
        // A region the target refuses is first built without results in place, then taken apart into single operators.
        for round in 0..3 {
            let mut refused = vec![];
            let facts = body::Facts::new(entry, &groups);
            for g in &order {
                let r = body::region(entry, &groups, &facts, *g, params).map_err(fault)?;
                let in_place = r.results.iter().any(|v| groups.in_place.contains_key(v));
                let clash = groups.clashes(entry, &r);
                let asked = groups.members(*g).len() > 1 || in_place;
                if clash || (asked && round < 2 && !accepts(&r.kernel)) {
                    refused.push((*g, in_place));
                }
                regions.insert(*g, r);
            }
            if refused.is_empty() {
                break;
            }
            for (g, in_place) in refused {
                let r = &regions[&g];
                let mut plain = r.kernel.clone();
                plain.aliases = vec![None; plain.aliases.len()];
                if in_place && plain.class != Class::Scatter && accepts(&plain) {
                    groups.kept_out.extend(r.results.iter().copied());
                } else if groups.members(g).len() > 1 {
                    groups.dissolve(entry, g);
                }
            }
            groups.choose_in_place(entry, params);
            order = groups.order();
            regions.clear();
        }
        Ok(EntryCut { entry, params, groups, regions, order })
    }

    fn emit(mut self, table: &mut Kernels, coded: &[Coded]) -> Result<ScheduledEntry, PassError> {
        let mut regions = std::mem::take(&mut self.regions);
        let mut b = Builder {
            cut: &self,
            table,
            out: ScheduledEntry {
                name: self.entry.name.clone(),
                buffers: vec![],
                steps: vec![],
                loops: vec![],
                outputs: vec![],
            },
            of_value: BTreeMap::new(),
            of_param: BTreeMap::new(),
            homes: BTreeMap::new(),
        };
        b.choose_homes();
        for g in &b.cut.order {
            if let Some(r) = regions.remove(g) {
                b.launch(*g, r)?;
            }
        }
        b.finish()?;
        for c in coded {
            b.fill_coded(c)?;
        }
        Ok(b.out)
    }
}

/// Builds the launches of one entry.
struct Builder<'a, 'b> {
    cut: &'b EntryCut<'a>,
    table: &'b mut Kernels,
    out: ScheduledEntry,
    of_value: BTreeMap<ValueId, BufferId>,
    of_param: BTreeMap<ParamId, BufferId>,
    /// Values that are computed right where they have to end up: an output or a parameter.
    homes: BTreeMap<ValueId, BufferKind>,
}

impl Builder<'_, '_> {
    fn buffer(&mut self, kind: BufferKind, ty: pleach_ir::TensorType, layout: Layout) -> BufferId {
        self.out.buffers.push(Buffer { kind, ty, layout, name: String::new() });
        BufferId(self.out.buffers.len() as u32 - 1)
    }

    fn param_buffer(&mut self, p: ParamId) -> BufferId {
        if let Some(b) = self.of_param.get(&p) {
            return *b;
        }
        let (q, l) = &self.cut.params[p.index()];
        let (ty, l) = (q.ty.clone(), *l);
        let b = self.buffer(BufferKind::Param(p), ty, l);
        self.of_param.insert(p, b);
        b
    }

    /// The buffer that holds a materialised value (reshapes share their operand's).
    fn buffer_of(&mut self, v: ValueId) -> Result<BufferId, PassError> {
        let v = self.cut.groups.alias_base(self.cut.entry, v);
        if let Some(b) = self.of_value.get(&v) {
            return Ok(*b);
        }
        let n = self.cut.entry.node(v);
        let b = match &n.op {
            Op::Input { name, .. } => self.buffer(BufferKind::Input(name.clone()), n.ty.clone(), Layout::RowMajor),
            Op::Param(p) => return Ok(self.param_buffer(*p)),
            _ => {
                let why = format!("{}: value {v} is read before it is computed", self.cut.entry.name);
                return Err(fault(IrError::Schedule(why)));
            }
        };
        self.of_value.insert(v, b);
        Ok(b)
    }

    /// Decides which computed values are written straight to an output or a parameter.
    fn choose_homes(&mut self) {
        let (e, groups) = (self.cut.entry, &self.cut.groups);
        for (v, p) in &groups.in_place {
            self.homes.insert(*v, BufferKind::Param(*p));
        }
        for r in &e.roots {
            let v = groups.alias_base(e, r.value);
            if !groups.is_computed(v) || self.homes.contains_key(&v) {
                continue;
            }
            let scatter = matches!(e.node(v).op, Op::Scatter { .. });
            match &r.kind {
                RootKind::Output(name) if !scatter => {
                    self.homes.insert(v, BufferKind::Output(name.clone()));
                }
                RootKind::Output(_) | RootKind::Assign(_) => {}
            }
        }
    }

    fn launch(&mut self, g: usize, r: Region) -> Result<(), PassError> {
        let e = self.cut.entry;
        let after = self.after(g);
        let mut reads = r.operands.iter().map(|v| self.buffer_of(*v)).collect::<Result<Vec<_>, _>>()?;
        let mut writes = vec![];
        for (i, v) in r.results.iter().enumerate() {
            let ty = e.ty(*v).clone();
            let scatter = matches!(e.node(*v).op, Op::Scatter { .. });
            let b = if let Some(target) = r.kernel.aliases[i].filter(|_| scatter) {
                // A scatter: in place where nothing else needs the old contents, else on a copy.
                let old = r.operands[target as usize];
                let b = reads[target as usize];
                let base = self.cut.groups.alias_base(e, old);
                let home = self.homes.get(v).cloned();
                let own = match &self.out.buffers[b.0 as usize].kind {
                    BufferKind::Param(p) => home == Some(BufferKind::Param(*p)),
                    BufferKind::Arena => {
                        self.cut.groups.readers(base) == [*v] && !e.roots.iter().any(|x| x.value == old)
                    }
                    _ => false,
                };
                if own {
                    b
                } else {
                    let c = self.buffer(BufferKind::Arena, ty, Layout::RowMajor);
                    self.copy(b, c)?;
                    reads[target as usize] = c;
                    c
                }
            } else {
                match self.homes.get(v).cloned() {
                    Some(BufferKind::Param(p)) => self.param_buffer(p),
                    Some(kind) => self.buffer(kind, ty, Layout::RowMajor),
                    None => self.buffer(BufferKind::Arena, ty, Layout::RowMajor),
                }
            };
            let held = e.node(self.cut.groups.alias_base(e, *v));
            if self.out.buffers[b.0 as usize].kind == BufferKind::Arena {
                let place = held.origin.as_deref().or(r.origin.as_deref()).unwrap_or("?");
                self.out.buffers[b.0 as usize].name = format!("{place} {}", held.op.name());
            }
            self.of_value.insert(*v, b);
            writes.push(b);
        }
        let kernel = self.table.intern(r.kernel);
        self.out.steps.push(Step { kernel, reads, writes, after, origin: r.origin });
        Ok(())
    }

    /// Buffers that must be written before a group runs although it does not read them.
    fn after(&self, g: usize) -> Vec<BufferId> {
        let groups = &self.cut.groups;
        let mut out: Vec<BufferId> = vec![];
        for t in groups.members(g).iter().flat_map(|m| groups.tokens(*m)) {
            let Some(h) = groups.group(*t).filter(|h| *h != g) else { continue };
            out.extend(groups.members(h).iter().find_map(|m| self.of_value.get(m)));
        }
        out.sort_unstable();
        out.dedup();
        out
    }

    /// A launch that copies one buffer into another, changing the layout if theirs differ.
    fn copy(&mut self, from: BufferId, to: BufferId) -> Result<(), PassError> {
        let (a, b) = (&self.out.buffers[from.0 as usize], &self.out.buffers[to.0 as usize]);
        debug_assert!(same_elements(&a.ty.shape, &b.ty.shape));
        let mut body = Entry::new("kernel");
        let op = Op::Input { name: "a0".into(), dtype: b.ty.dtype, shape: b.ty.shape.clone() };
        let x = body.push(&[], op, &[]).map_err(fault)?;
        body.output("r0", x);
        let k = Kernel {
            name: String::new(),
            class: Class::Row,
            body,
            operands: vec![a.layout],
            results: vec![b.layout],
            aliases: vec![None],
        };
        let kernel = self.table.intern(k);
        self.out.steps.push(Step { kernel, reads: vec![from], writes: vec![to], after: vec![], origin: None });
        Ok(())
    }

    /// A launch that fills coded panels, or blocks, from blocks: the parts below each other.
    fn fill_coded(&mut self, c: &Coded) -> Result<(), PassError> {
        let reads: Vec<BufferId> = c.parts.iter().map(|p| self.param_buffer(*p)).collect();
        let to = self.param_buffer(c.twin);
        let stored = |b: &BufferId| {
            let Buffer { ty, layout, .. } = &self.out.buffers[b.0 as usize];
            (ty.clone(), *layout)
        };
        let parts: Vec<_> = reads.iter().map(stored).collect();
        let k = pack::filling(&parts, &stored(&to)).map_err(fault)?;
        let kernel = self.table.intern(k);
        self.out.steps.push(Step { kernel, reads, writes: vec![to], after: vec![], origin: None });
        Ok(())
    }

    /// Outputs and assignments that were not computed in place.
    fn finish(&mut self) -> Result<(), PassError> {
        let e = self.cut.entry;
        // An input is part of the signature even where nothing reads it: its shape may be what says how much is computed.
        for (v, _) in e.inputs() {
            self.buffer_of(v)?;
        }
        let mut late = vec![];
        for r in &e.roots {
            let base = self.cut.groups.alias_base(e, r.value);
            let b = self.buffer_of(base)?;
            let kind = self.out.buffers[b.0 as usize].kind.clone();
            let ty = e.ty(r.value).clone();
            match &r.kind {
                RootKind::Output(name) => {
                    let out = if kind == BufferKind::Output(name.clone()) {
                        b
                    } else {
                        let o = self.buffer(BufferKind::Output(name.clone()), ty.clone(), Layout::RowMajor);
                        self.copy(b, o)?;
                        o
                    };
                    self.out.outputs.push((name.clone(), out, ty));
                }
                RootKind::Assign(p) if kind != BufferKind::Param(*p) => late.push((b, *p)),
                RootKind::Assign(_) => {}
            }
        }
        // Values that are themselves parameters about to change are staged first: every read means the value at entry.
        let mut staged = vec![];
        for (b, p) in late {
            let changes = matches!(self.out.buffers[b.0 as usize].kind, BufferKind::Param(q)
                if e.roots.iter().any(|r| r.kind == RootKind::Assign(q)));
            let from = if changes {
                let ty = self.out.buffers[b.0 as usize].ty.clone();
                let layout = self.out.buffers[b.0 as usize].layout;
                let c = self.buffer(BufferKind::Arena, ty, layout);
                self.copy(b, c)?;
                c
            } else {
                b
            };
            staged.push((from, p));
        }
        for (from, p) in staged {
            let to = self.param_buffer(p);
            self.copy(from, to)?;
        }
        Ok(())
    }
}
