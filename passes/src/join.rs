//! Joins launches that do not depend on each other, where a launch costs more than little work takes.
//!
//! An optimizer's update, the casts of a preparation, or the rows and columns that are set after a step, are hundreds of small
//! launches. Those of static shapes that can run at the same moment become one kernel whose body is theirs side by side, so that a
//! target may run it as one launch: element-wise kernels whatever they compute and however large they are ([`flat_parts`]), kernels of numbers alone,
//! and row kernels and scatters that are equal. Nothing here knows what the kernels compute; the body of a joined kernel means what its parts mean,
//! one after the other. Entries with loops, and launches with much between them in the arena, stay as they are.
//! Thin products of one matrix, and picks of few of its columns, are joined as well, in every entry ([`thin`]).

mod thin;

use crate::error::PassError;
use crate::options::Options;
use crate::order::dependences;
use pleach_ir::{
    BufferId, BufferKind, Class, Entry, IrError, Kernel, KernelId, Layout, Op, Schedule, ScheduledEntry, Step, ValueId,
    flat_parts,
};
use std::collections::{BTreeMap, BTreeSet};

/// Microseconds of a launch from which launches are joined.
const LEAST_US: f64 = 1.0;
/// Launches of a joined kernel at most: as many blocks as a grid has along its second axis.
const LAUNCHES: usize = 65_535;
/// Buffers of a joined kernel of numbers at most.
const BUFFERS: usize = 480;
/// Bytes of the arena that a launch may touch, and all launches of a joined kernel, whose bytes live at once: so many, or a small part of those
/// of the parameters.
const ARENA: [u64; 2] = [1 << 20, 32 << 20];
const OF_PARAMETERS: u64 = 256;

/// Joins launches of every entry. Returns by how many there are fewer.
///
/// # Errors
/// [`PassError`] when the result breaks a rule: a fault of the pass.
pub fn run(s: &mut Schedule, options: &Options) -> Result<usize, PassError> {
    if options.target.launch_us < LEAST_US {
        return Ok(0);
    }
    let fault = |e: IrError| PassError::Refused { pass: "join".into(), why: e.to_string() };
    let mut made = Made::new();
    let mut saved = thin::run(s).map_err(fault)?;
    for i in 0..s.entries.len() {
        if !s.entries[i].loops.is_empty() {
            continue;
        }
        let mut steps: Vec<Option<Step>> = s.entries[i].steps.iter().cloned().map(Some).collect();
        let before = dependences(&s.entries[i]);
        let mut blocks: Vec<Vec<usize>> = vec![];
        for ((_, kind), list) in together(s, &s.entries[i], &before) {
            blocks.extend(within_limits(s, &s.entries[i], &kind, &list));
        }
        let order = in_order(blocks, &before);
        let mut out = vec![];
        for block in order {
            let parts: Vec<Step> = block.iter().filter_map(|x| steps[*x].take()).collect();
            let [first, rest @ ..] = parts.as_slice() else { continue };
            if rest.is_empty() {
                out.push(first.clone());
                continue;
            }
            saved += rest.len();
            let same = in_common(s, &parts);
            out.push(as_one(s, &mut made, &parts, &same).map_err(fault)?);
        }
        s.entries[i].steps = out;
    }
    if saved > 0 {
        drop_unused(s);
        s.check().map_err(fault)?;
    }
    Ok(saved)
}

/// What launches must have in common to be joined.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Kind {
    /// Element-wise kernels.
    Flat,
    /// Kernels that make numbers of numbers.
    Numbers,
    /// One kernel.
    Equal(KernelId),
    /// A launch that stays alone.
    Alone(usize),
}

impl Kind {
    /// Of a kernel, if it may be joined.
    fn of(id: usize, k: &Kernel) -> Option<Kind> {
        let body = &k.body;
        if !matches!(k.class, Class::Row | Class::Scatter) || body.nodes.iter().any(|n| !n.ty.symbols().is_empty()) {
            return None;
        }
        let plain = k.class == Class::Row && k.operands.iter().chain(&k.results).all(|l| *l == Layout::RowMajor);
        let number = |n: &pleach_ir::Node| n.ty.rank() == 0 && (n.op.is_leaf() || n.op.is_elementwise());
        Some(match () {
            () if plain && flat_parts(k).is_some() => Kind::Flat,
            () if plain && body.nodes.iter().all(number) => Kind::Numbers,
            () => Kind::Equal(KernelId(id as u32)),
        })
    }
}

/// Launches that may be joined, by how many must run before them at least and by kind.
fn together(s: &Schedule, e: &ScheduledEntry, before: &[BTreeSet<usize>]) -> BTreeMap<(usize, Kind), Vec<usize>> {
    let mut level = vec![0usize; e.steps.len()];
    let mut kinds: BTreeMap<KernelId, Option<Kind>> = BTreeMap::new();
    let mut out: BTreeMap<(usize, Kind), Vec<usize>> = BTreeMap::new();
    for (i, step) in e.steps.iter().enumerate() {
        level[i] = before[i].iter().map(|b| level[*b] + 1).max().unwrap_or(0);
        let id = step.kernel.0 as usize;
        let kind = *kinds.entry(step.kernel).or_insert_with(|| Kind::of(id, &s.kernels[id]));
        let kind = kind.filter(|_| arena(e, step) <= ARENA[0]).unwrap_or(Kind::Alone(i));
        out.entry((level[i], kind)).or_default().push(i);
    }
    out
}

/// Launches of a kind as lists that are not too long for one kernel.
fn within_limits(s: &Schedule, e: &ScheduledEntry, kind: &Kind, list: &[usize]) -> Vec<Vec<usize>> {
    let sizes = s.params.iter().map(|(p, l)| l.bytes(&p.ty, &|_| None).unwrap_or(0));
    let most = ARENA[1].max(sizes.fold(0, u64::saturating_add) / OF_PARAMETERS);
    let (mut out, mut live, mut buffers): (Vec<Vec<usize>>, u64, usize) = (vec![], 0, 0);
    for i in list {
        let step = &e.steps[*i];
        let k = &s.kernels[step.kernel.0 as usize];
        let (bytes, own) = (arena(e, step), k.operands.len() + k.results.len());
        let many = *kind == Kind::Numbers && buffers + own > BUFFERS;
        match out.last_mut().filter(|l| l.len() < LAUNCHES && live.saturating_add(bytes) <= most && !many) {
            Some(l) => l.push(*i),
            None => {
                out.push(vec![*i]);
                (live, buffers) = (0, 0);
            }
        }
        (live, buffers) = (live.saturating_add(bytes), buffers + own);
    }
    out
}

/// Of every operand of some launches: the one, counted over all of them, that is the same number. Parts of kernels that are
/// equal keep operands of their own.
fn in_common(s: &Schedule, parts: &[Step]) -> Vec<Option<usize>> {
    let equal = parts.iter().all(|p| p.kernel == parts[0].kernel);
    let flat = |k: &Kernel| matches!(Kind::of(0, k), Some(Kind::Flat | Kind::Numbers));
    let mut first: BTreeMap<BufferId, usize> = BTreeMap::new();
    let (mut out, keep) = (vec![], equal && !flat(&s.kernels[parts[0].kernel.0 as usize]));
    for p in parts {
        let k = &s.kernels[p.kernel.0 as usize];
        for ((v, _), b) in k.body.inputs().iter().zip(&p.reads) {
            let at = out.len();
            let number = !keep && k.body.ty(*v).rank() == 0;
            out.push(if number { Some(*first.entry(*b).or_insert(at)).filter(|s| *s != at) } else { None });
        }
    }
    out
}

/// Bytes of the arena that a launch touches.
fn arena(e: &ScheduledEntry, step: &Step) -> u64 {
    let buffers = step.reads.iter().chain(&step.writes).map(|b| &e.buffers[b.0 as usize]);
    let own = buffers.filter(|b| matches!(b.kind, BufferKind::Arena | BufferKind::Output(_)));
    own.map(|b| b.ty.bytes(&|_| None).unwrap_or(u64::MAX)).fold(0, u64::saturating_add)
}

/// Blocks of launches in an order that keeps every dependence, and else that of their first launches.
fn in_order(mut blocks: Vec<Vec<usize>>, before: &[BTreeSet<usize>]) -> Vec<Vec<usize>> {
    blocks.sort_by_key(|b| b[0]);
    let mut of = vec![0; before.len()];
    for (i, b) in blocks.iter().enumerate() {
        b.iter().for_each(|x| of[*x] = i);
    }
    let mut waits: Vec<BTreeSet<usize>> = vec![BTreeSet::new(); blocks.len()];
    let mut then: Vec<Vec<usize>> = vec![vec![]; blocks.len()];
    for (x, list) in before.iter().enumerate() {
        for y in list.iter().map(|y| of[*y]).filter(|y| *y != of[x]) {
            if waits[of[x]].insert(y) {
                then[y].push(of[x]);
            }
        }
    }
    let mut left: Vec<usize> = waits.iter().map(BTreeSet::len).collect();
    let mut ready: BTreeSet<usize> = (0..blocks.len()).filter(|b| left[*b] == 0).collect();
    let mut out = vec![];
    while let Some(b) = ready.pop_first() {
        for t in &then[b] {
            left[*t] -= 1;
            if left[*t] == 0 {
                ready.insert(*t);
            }
        }
        out.push(std::mem::take(&mut blocks[b]));
    }
    out
}

/// Joined kernels, by what they are made of and the operands that are the same.
type Made = BTreeMap<(Vec<KernelId>, Vec<Option<usize>>), KernelId>;

/// One launch for several, whose joined kernel is added to the schedule unless it was made before. `same`: of every operand, counted over all
/// launches, an earlier one that is the same buffer, which is read once.
///
/// # Errors
/// [`IrError`] when a body cannot be rebuilt; that would be a fault of the schedule.
fn as_one(s: &mut Schedule, made: &mut Made, parts: &[Step], same: &[Option<usize>]) -> Result<Step, IrError> {
    let first = &parts[0];
    let key = (parts.iter().map(|p| p.kernel).collect::<Vec<_>>(), same.to_vec());
    let kernel = match made.get(&key) {
        Some(k) => *k,
        None => {
            let id = KernelId(s.kernels.len() as u32);
            let list: Vec<&Kernel> = parts.iter().map(|p| &s.kernels[p.kernel.0 as usize]).collect();
            let mut k = side_by_side(&list, same)?;
            k.name = format!("{}_{}x", list[0].name, parts.len());
            // Others may begin with the same kernel.
            let taken = |name: &str| s.kernels.iter().any(|k| k.name == name);
            let another = (2..).map(|i| format!("{}_{i}", k.name));
            k.name = std::iter::once(k.name.clone()).chain(another).find(|n| !taken(n)).unwrap_or_default();
            s.kernels.push(k);
            made.insert(key, id);
            id
        }
    };
    let after: BTreeSet<BufferId> = parts.iter().flat_map(|p| p.after.clone()).collect();
    let reads = parts.iter().flat_map(|p| &p.reads).zip(same);
    Ok(Step {
        kernel,
        reads: reads.filter(|(_, same)| same.is_none()).map(|(b, _)| *b).collect(),
        writes: parts.iter().flat_map(|p| p.writes.clone()).collect(),
        after: after.into_iter().collect(),
        origin: first.origin.clone(),
    })
}

/// A kernel that does what some kernels do one after the other: their operands and results in order, without operands that are the `same`
/// as an earlier one.
fn side_by_side(parts: &[&Kernel], same: &[Option<usize>]) -> Result<Kernel, IrError> {
    let mut body = Entry::new("kernel");
    let (mut roots, mut operands, mut results, mut aliases) = (vec![], vec![], vec![], vec![]);
    // Of every operand of all parts: its value, and its number among those that are left.
    let mut given: Vec<(ValueId, usize)> = vec![];
    for k in parts {
        let (before, mut at): (usize, Vec<ValueId>) = (given.len(), vec![]);
        for node in &k.body.nodes {
            let new = match &node.op {
                Op::Input { dtype, shape, .. } => {
                    let x = match same[given.len()] {
                        Some(i) => given[i],
                        None => {
                            let n = operands.len();
                            operands.push(k.operands[given.len() - before]);
                            let op = Op::Input { name: format!("a{n}"), dtype: *dtype, shape: shape.clone() };
                            (body.push(&[], op, &[])?, n)
                        }
                    };
                    given.push(x);
                    x.0
                }
                op => {
                    let inputs: Vec<ValueId> = node.inputs.iter().map(|i| at[i.index()]).collect();
                    body.push(&[], op.clone(), &inputs)?
                }
            };
            at.push(new);
        }
        roots.extend(k.body.roots.iter().map(|r| at[r.value.index()]));
        results.extend(k.results.iter().copied());
        aliases.extend(k.aliases.iter().map(|a| a.map(|a| given[before + a as usize].1 as u32)));
    }
    for (i, r) in roots.into_iter().enumerate() {
        body.output(format!("r{i}"), r);
    }
    Ok(Kernel { name: String::new(), class: parts[0].class, body, operands, results, aliases })
}

/// Removes kernels that no launch is left of.
pub(crate) fn drop_unused(s: &mut Schedule) {
    let used: BTreeSet<u32> = s.entries.iter().flat_map(|e| e.steps.iter().map(|x| x.kernel.0)).collect();
    let number: BTreeMap<u32, u32> = used.iter().enumerate().map(|(new, old)| (*old, new as u32)).collect();
    let mut i = 0;
    s.kernels.retain(|_| {
        i += 1;
        used.contains(&(i - 1))
    });
    for step in s.entries.iter_mut().flat_map(|e| &mut e.steps) {
        step.kernel = KernelId(number[&step.kernel.0]);
    }
}
