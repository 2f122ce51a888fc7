//! Joins launches of one kernel that do not depend on each other, where a launch costs more than little work takes.
//!
//! An optimizer's update, the casts of a preparation, or the rows and columns that are set after a step, are hundreds of equal small
//! launches. Row kernels and scatters of static shapes that can run at the same moment become one kernel whose body is theirs side by side, so that a target may run it as one
//! launch. Nothing here knows what the kernels compute; the body of a joined kernel means what its parts mean, one after
//! the other. Entries with loops, and launches with much between them in the arena, stay as they are.
//! Thin products of one matrix, and picks of few of its columns, are joined as well, in every entry ([`thin`]).

mod thin;

use crate::error::PassError;
use crate::options::Options;
use crate::order::dependences;
use pleach_ir::{
    BufferId, BufferKind, Class, Entry, IrError, Kernel, KernelId, Op, Schedule, ScheduledEntry, Step, ValueId,
};
use std::collections::{BTreeMap, BTreeSet};

/// Microseconds of a launch from which launches are joined.
const LEAST_US: f64 = 1.0;
/// Buffers of a joined kernel at most.
const BUFFERS: usize = 480;
/// Bytes of the arena that a launch may touch, and all launches of a joined kernel, whose bytes live at once.
const ARENA: [u64; 2] = [1 << 20, 32 << 20];

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
        for list in equal(s, &s.entries[i], &before).into_values() {
            let first = &s.entries[i].steps[list[0]];
            let k = &s.kernels[first.kernel.0 as usize];
            let fits = (ARENA[1] / arena(&s.entries[i], first).max(1)) as usize;
            let most = (BUFFERS / (k.operands.len() + k.results.len()).max(1)).min(fits);
            blocks.extend(list.chunks(most.max(1)).map(<[usize]>::to_vec));
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
            out.push(as_one(s, &mut made, &parts, None).map_err(fault)?);
        }
        s.entries[i].steps = out;
    }
    if saved > 0 {
        drop_unused(s);
        s.check().map_err(fault)?;
    }
    Ok(saved)
}

/// Launches that may be joined, by how many must run before them at least and by kernel; every other launch alone.
fn equal(s: &Schedule, e: &ScheduledEntry, before: &[BTreeSet<usize>]) -> BTreeMap<(usize, usize, u32), Vec<usize>> {
    let mut level = vec![0usize; e.steps.len()];
    let mut out: BTreeMap<(usize, usize, u32), Vec<usize>> = BTreeMap::new();
    for (i, step) in e.steps.iter().enumerate() {
        level[i] = before[i].iter().map(|b| level[*b] + 1).max().unwrap_or(0);
        let k = &s.kernels[step.kernel.0 as usize];
        let fixed = k.body.nodes.iter().all(|n| n.ty.symbols().is_empty());
        let joins = matches!(k.class, Class::Row | Class::Scatter) && fixed && arena(e, step) <= ARENA[0];
        // A key of its own keeps a launch alone.
        let own = if joins { 0 } else { i + 1 };
        out.entry((level[i], own, step.kernel.0)).or_default().push(i);
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

/// Joined kernels, by what they are made of and how many launches they stand for.
type Made = BTreeMap<(KernelId, usize), KernelId>;

/// One launch for several of one kernel, whose joined kernel is added to the schedule unless it was made before. `shared`: an operand that is
/// the same in all of them, which is read once.
///
/// # Errors
/// [`IrError`] when a body cannot be rebuilt; that would be a fault of the schedule.
fn as_one(s: &mut Schedule, made: &mut Made, parts: &[Step], shared: Option<usize>) -> Result<Step, IrError> {
    let (first, n) = (&parts[0], parts.len());
    let kernel = match made.get(&(first.kernel, n)) {
        Some(k) => *k,
        None => {
            let id = KernelId(s.kernels.len() as u32);
            let mut k = side_by_side(&s.kernels[first.kernel.0 as usize], n, shared)?;
            k.name = format!("{}_{n}x", k.name);
            s.kernels.push(k);
            made.insert((first.kernel, n), id);
            id
        }
    };
    let own = |(c, p): (usize, &Step)| -> Vec<BufferId> {
        let reads = p.reads.iter().enumerate().filter(|(i, _)| c == 0 || Some(*i) != shared);
        reads.map(|(_, b)| *b).collect()
    };
    let after: BTreeSet<BufferId> = parts.iter().flat_map(|p| p.after.clone()).collect();
    Ok(Step {
        kernel,
        reads: parts.iter().enumerate().flat_map(own).collect(),
        writes: parts.iter().flat_map(|p| p.writes.clone()).collect(),
        after: after.into_iter().collect(),
        origin: first.origin.clone(),
    })
}

/// A kernel that does what `n` launches of `k` do: operands and results one launch after the other, the shared operand once.
fn side_by_side(k: &Kernel, n: usize, shared: Option<usize>) -> Result<Kernel, IrError> {
    let inputs: Vec<ValueId> = k.body.inputs().iter().map(|x| x.0).collect();
    let mut body = Entry::new("kernel");
    let (mut roots, mut operands, mut aliases, mut common) = (vec![], vec![], vec![], None);
    // Where a launch's operands are among all.
    let mut place = vec![0; inputs.len()];
    for _ in 0..n {
        let mut at: Vec<ValueId> = vec![];
        for (v, node) in k.body.values().zip(&k.body.nodes) {
            let number = inputs.iter().position(|i| *i == v);
            let new = match (&node.op, number, common) {
                (_, Some(i), Some(x)) if Some(i) == shared => x,
                (Op::Input { dtype, shape, .. }, Some(i), _) => {
                    place[i] = operands.len();
                    operands.push(k.operands[i]);
                    let name = format!("a{}", place[i]);
                    body.push(&[], Op::Input { name, dtype: *dtype, shape: shape.clone() }, &[])?
                }
                (op, ..) => {
                    let inputs: Vec<ValueId> = node.inputs.iter().map(|i| at[i.index()]).collect();
                    body.push(&[], op.clone(), &inputs)?
                }
            };
            at.push(new);
        }
        common = shared.map(|i| at[inputs[i].index()]);
        roots.extend(k.body.roots.iter().map(|r| at[r.value.index()]));
        aliases.extend(k.aliases.iter().map(|a| a.map(|a| place[a as usize] as u32)));
    }
    for (i, r) in roots.into_iter().enumerate() {
        body.output(format!("r{i}"), r);
    }
    Ok(Kernel { name: k.name.clone(), class: k.class, body, operands, results: k.results.repeat(n), aliases })
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
