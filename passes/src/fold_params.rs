//! `fold-params`: what depends on parameters and constants alone moves into prepare entries.
//!
//! Where a run-time node reads arithmetic over base parameters, the value becomes a derived parameter that
//! `prepare(base)` assigns when the model is loaded; arithmetic over an adapter slot is assigned by `prepare(slotN)`,
//! which runs when the slot is filled, and reads what `prepare(base)` has made of base parameters where that is smaller than they are (norms).
//! A value that needs several slots is assigned by each of their entries, so filling
//! any of them leaves it right. Equal values of different entries share one derived parameter, and a second run of the
//! pass changes nothing.
//!
//! Where an `update` entry assigns trained parameters, values over those are derived parameters as well: prepare
//! entries fill them, and `update` assigns them again from the new values ([`renew`]), so nothing over parameters is
//! computed in a forward or backward run. Except what grows: a value much larger than the trained parameters in it that costs little beside
//! a product with it (a weight with a low-rank change in every element) is built where it is read, instead of lying in memory
//! once per layer ([`grown`]).
//!
//! Assumes a verified graph in which prepare entries, if any, stem from this pass. Leaves alone: bare parameters,
//! constants, and views of them (reshape, slice, broadcast), which cost nothing at run time; values whose size depends
//! on a run's counts; state. A derived parameter has the type of the value, the role `Frozen` and is named after the
//! largest parameter it is made of.

use crate::differentiate::{ACCUMULATE, STEP, UPDATE};
use crate::error::PassError;
use crate::manager::Report;
use crate::options::Options;
use crate::rewrite::lang::{Known, foldable};
use pleach_ir::{Entry, Graph, IrError, Node, Op, Param, ParamId, Role, RootKind, Source, TensorType, ValueId};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

const NAME: &str = "fold-params";

/// Whether an entry assigns trained parameters.
fn updates(e: &Entry) -> bool {
    matches!(e.name.as_str(), UPDATE | STEP)
}

/// A value over parameters, by structure.
struct Form {
    op: Op,
    inputs: Vec<usize>,
    ty: TensorType,
    origin: Option<Arc<str>>,
    /// Slots it depends on.
    slots: BTreeSet<u32>,
    /// Depends on some parameter that a prepare entry may read.
    known: Known,
    /// The largest parameter in it.
    largest: Option<ParamId>,
    /// Depends on a trained parameter.
    trained: bool,
    /// Built where it is read, not kept.
    grown: bool,
    /// Operations to build it from parameters and what is kept.
    flops: f64,
}

/// Every value over parameters of all entries, each structure once.
#[derive(Default)]
struct Forms {
    list: Vec<Form>,
    seen: HashMap<(Op, Vec<usize>), usize>,
    /// The derived parameter that holds a form.
    derived: BTreeMap<usize, ParamId>,
    /// The form that a derived parameter holds.
    meaning: BTreeMap<u32, usize>,
    /// Trained parameters count as parameters: an `update` entry renews what is derived from them.
    renewed: bool,
    /// Tokens of a run that trains.
    tokens: u64,
}

/// The pass.
///
/// # Errors
/// [`PassError::Build`] if a moved node does not type-check, which would be a fault of this pass.
pub fn run(g: &Graph, opts: &Options, report: &mut Report) -> Result<Graph, PassError> {
    let mut out = Graph { phase: g.phase, params: g.params.clone(), entries: vec![] };
    let tokens = opts.tokens(if g.entry(STEP).is_some() { STEP } else { ACCUMULATE });
    let mut forms = Forms { renewed: g.entries.iter().any(updates), tokens, ..Forms::default() };
    let (prepare, run): (Vec<&Entry>, Vec<&Entry>) = g.entries.iter().partition(|e| is_prepare(&e.name));
    for e in &prepare {
        let of = forms.intern(g, e);
        for r in &e.roots {
            if let (RootKind::Assign(p), Some(f)) = (&r.kind, of[r.value.index()]) {
                forms.derived.entry(f).or_insert(*p);
                forms.meaning.insert(p.0, f);
            }
        }
    }
    let before = out.params.len();
    let mut done: BTreeMap<&str, Entry> = BTreeMap::new();
    // `update` comes last, when it is known what it has to renew
    for e in run.iter().filter(|e| !updates(e)).chain(run.iter().filter(|e| updates(e))) {
        let renewed = match updates(e) {
            true => Some(renew::renew(&out, e, &forms).map_err(PassError::build(NAME, &e.name))?),
            false => None,
        };
        let source = renewed.as_ref().unwrap_or(e);
        let mut of = forms.intern(&out, source);
        if renewed.is_some() {
            // What only `update` computes from trained values is computed there: nothing would renew a buffer for it.
            for f in
                of.iter_mut().filter(|f| f.is_some_and(|f| forms.list[f].trained && !forms.derived.contains_key(&f)))
            {
                *f = None;
            }
        }
        let new = rewire(&mut out, source, &of, &mut forms).map_err(PassError::build(NAME, &e.name))?;
        done.insert(&e.name, new);
    }
    let made = &out.params[before..];
    if !made.is_empty() {
        let bytes: u64 = made.iter().filter_map(|p| p.ty.bytes(&|_| None)).sum();
        report.note = format!("{} derived buffers, {:.1} MiB", made.len(), bytes as f64 / (1 << 20) as f64);
    }
    let prepared = prepare_entries(&out, &prepare, &forms)?;
    // entries keep their order; new prepare entries come last
    let mut prepared: BTreeMap<String, Entry> = prepared.into_iter().map(|e| (e.name.clone(), e)).collect();
    for e in &g.entries {
        let next = if is_prepare(&e.name) { prepared.remove(&e.name) } else { done.remove(e.name.as_str()) };
        out.entries.push(next.unwrap_or_else(|| e.clone()));
    }
    out.entries.extend(prepared.into_values());
    Ok(out)
}

fn is_prepare(name: &str) -> bool {
    name.starts_with("prepare(")
}

fn slot_entry(slot: Option<u32>) -> String {
    slot.map_or("prepare(base)".into(), |n| format!("prepare(slot{n})"))
}

impl Forms {
    /// The form of every value of an entry that depends on parameters and constants alone.
    fn intern(&mut self, g: &Graph, e: &Entry) -> Vec<Option<usize>> {
        let mut of: Vec<Option<usize>> = vec![];
        for n in &e.nodes {
            let inputs: Option<Vec<usize>> = n.inputs.iter().map(|i| of[i.index()]).collect();
            of.push(inputs.filter(|_| foldable(&n.ty)).and_then(|i| self.form(g, n, i)));
        }
        of
    }

    fn form(&mut self, g: &Graph, n: &Node, inputs: Vec<usize>) -> Option<usize> {
        let (mut known, mut slots, mut largest, mut trained) = (Known::Const, BTreeSet::new(), None, false);
        match &n.op {
            Op::Input { .. } => return None,
            Op::Param(p) => {
                // what a prepare entry assigns stands for its meaning
                if let Some(&f) = self.meaning.get(&p.0) {
                    return Some(f);
                }
                let param = &g.params[p.index()];
                trained = param.role == Role::Train;
                let read = matches!(param.role, Role::Frozen | Role::Index) || trained && self.renewed;
                if !read {
                    return None;
                }
                known = match param.source {
                    Source::Checkpoint(_) => Known::Base,
                    Source::Zeros if trained => Known::Base,
                    Source::Adapter { slot, .. } => {
                        slots.insert(slot);
                        Known::Slot
                    }
                    _ => return None,
                };
                largest = Some(*p);
            }
            _ => {
                let size = |p: &ParamId| g.params[p.index()].ty.static_elements();
                for &i in &inputs {
                    let f = &self.list[i];
                    known = known.max(f.known);
                    slots.extend(&f.slots);
                    trained |= f.trained;
                    if f.largest.is_some_and(|p| largest.is_none_or(|q| size(&p) > size(&q))) {
                        largest = f.largest;
                    }
                }
            }
        }
        let key = (n.op.clone(), inputs);
        if let Some(&f) = self.seen.get(&key) {
            return Some(f);
        }
        let f = self.list.len();
        let form = Form {
            op: key.0.clone(),
            inputs: key.1.clone(),
            ty: n.ty.clone(),
            origin: n.origin.clone(),
            slots,
            known,
            largest,
            trained,
            grown: false,
            flops: 0.0,
        };
        self.list.push(form);
        grown::decide(g, self, f);
        self.seen.insert(key, f);
        Some(f)
    }

    /// True for what a run-time node may as well read from a parameter or constant directly.
    fn trivial(&self, f: usize) -> bool {
        self.list[f].op.is_leaf()
    }

    /// A view costs nothing at run time, so what it is a view of is kept instead.
    fn view(&self, f: usize) -> bool {
        matches!(self.list[f].op, Op::Reshape(_) | Op::Slice { .. } | Op::Broadcast { .. })
    }

    /// A value over base parameters with fewer elements than the largest of them.
    fn reduced(&self, g: &Graph, f: usize) -> bool {
        let form = &self.list[f];
        let elements = |p: ParamId| g.params[p.index()].ty.static_elements();
        form.slots.is_empty() && form.largest.is_some_and(|p| form.ty.static_elements() < elements(p))
    }

    /// A parameter in a wider type: a copy would take more memory than the reader's conversion takes time.
    fn widened(&self, f: usize) -> bool {
        let form = &self.list[f];
        let from = |i: usize| &self.list[i];
        let wider = |i: usize| form.ty.dtype.size() > from(i).ty.dtype.size();
        matches!(form.op, Op::Cast(_)) && form.inputs.iter().all(|i| matches!(from(*i).op, Op::Param(_)) && wider(*i))
    }
}

/// An entry that reads derived parameters in place of what they hold.
fn rewire(g: &mut Graph, e: &Entry, of: &[Option<usize>], forms: &mut Forms) -> Result<Entry, IrError> {
    let live = e.live();
    let mut root = vec![false; e.nodes.len()];
    e.roots.iter().for_each(|r| root[r.value.index()] = true);
    // a part of a weight is no operand of a product as it lies: it gets a buffer of its own
    let mut factor = vec![false; e.nodes.len()];
    for n in e.nodes.iter().zip(of).filter(|(n, f)| f.is_none() && matches!(n.op, Op::MatMul { .. })).map(|x| x.0) {
        n.inputs.iter().for_each(|i| factor[i.index()] = true);
    }
    let stays = |v: ValueId, forms: &Forms| match of[v.index()] {
        None => true,
        Some(f) => {
            let part = matches!(e.node(v).op, Op::Slice { .. }) && factor[v.index()];
            !part && (forms.trivial(f) || forms.view(f) || forms.widened(f) || forms.list[f].grown)
        }
    };
    let mut wanted: Vec<bool> = vec![false; e.nodes.len()];
    for v in e.values().rev() {
        let run = live[v.index()] && of[v.index()].is_none();
        wanted[v.index()] |= run || root[v.index()] || matches!(e.node(v).op, Op::Input { .. });
        if wanted[v.index()] && stays(v, forms) {
            e.node(v).inputs.iter().for_each(|i| wanted[i.index()] = true);
        }
    }
    let mut out = Entry::new(e.name.clone());
    let mut map = vec![ValueId(0); e.nodes.len()];
    for v in e.values().filter(|v| wanted[v.index()]) {
        let n = e.node(v);
        map[v.index()] = match of[v.index()] {
            Some(f) if !stays(v, forms) => {
                let p = derived(g, f, forms);
                out.push_from(&g.params, Op::Param(p), &[], n.origin.clone())?
            }
            _ => {
                let inputs: Vec<ValueId> = n.inputs.iter().map(|i| map[i.index()]).collect();
                out.push_from(&g.params, n.op.clone(), &inputs, n.origin.clone())?
            }
        };
    }
    out.roots = e.roots.clone();
    out.roots.iter_mut().for_each(|r| r.value = map[r.value.index()]);
    Ok(out)
}

/// The derived parameter that holds a form, made on first use.
fn derived(g: &mut Graph, f: usize, forms: &mut Forms) -> ParamId {
    if let Some(&p) = forms.derived.get(&f) {
        return p;
    }
    let form = &forms.list[f];
    let of = form.largest.map_or_else(|| "constant".to_string(), |p| g.params[p.index()].name.clone());
    let mut n = forms.derived.len();
    let mut name = format!("derived.{n}.{of}");
    while g.find_param(&name).is_some() {
        n += 1;
        name = format!("derived.{n}.{of}");
    }
    let p = g.add_param(Param { name, ty: form.ty.clone(), role: Role::Frozen, source: Source::Derived });
    forms.derived.insert(f, p);
    forms.meaning.insert(p.0, f);
    p
}

/// The prepare entries: what was assigned before, then what is new.
fn prepare_entries(g: &Graph, old: &[&Entry], forms: &Forms) -> Result<Vec<Entry>, PassError> {
    let mut assigns: BTreeMap<(Option<u32>, ParamId), usize> = BTreeMap::new();
    for (&f, &p) in &forms.derived {
        let slots = &forms.list[f].slots;
        if slots.is_empty() {
            assigns.insert((None, p), f);
        }
        for &s in slots {
            assigns.insert((Some(s), p), f);
        }
    }
    // two parameters of one meaning: the later ones, which an older pipeline may have made, are assigned as well
    for (&p, &f) in &forms.meaning {
        let slots = &forms.list[f].slots;
        let entries: Vec<Option<u32>> =
            if slots.is_empty() { vec![None] } else { slots.iter().copied().map(Some).collect() };
        for s in entries {
            assigns.insert((s, ParamId(p)), f);
        }
    }
    let mut by: BTreeMap<Option<u32>, Vec<(ParamId, usize)>> = BTreeMap::new();
    for ((s, p), f) in assigns {
        by.entry(s).or_default().push((p, f));
    }
    let mut out = vec![];
    for (s, list) in by {
        let name = slot_entry(s);
        let e = prepare_entry(g, (&name, s), &list, forms).map_err(PassError::build(NAME, &name))?;
        // what was assigned stays assigned, so an entry with as many roots says the same
        let same = |o: &&&Entry| o.name == name && o.roots.len() == e.roots.len();
        out.push(old.iter().find(same).map_or(e, |o| (*o).clone()));
    }
    Ok(out)
}

fn prepare_entry(
    g: &Graph,
    (name, slot): (&str, Option<u32>),
    list: &[(ParamId, usize)],
    forms: &Forms,
) -> Result<Entry, IrError> {
    let mut out = Entry::new(name);
    let mut at: BTreeMap<usize, ValueId> = BTreeMap::new();
    // What `prepare(base)` has made smaller than it was is not made again for a slot.
    let made = |k: usize| forms.derived.get(&k).filter(|_| slot.is_some() && forms.reduced(g, k));
    for &(p, f) in list {
        let mut stack = vec![f];
        while let Some(&k) = stack.last() {
            let form = &forms.list[k];
            let missing: Vec<usize> = form.inputs.iter().copied().filter(|i| !at.contains_key(i)).rev().collect();
            if at.contains_key(&k) {
                stack.pop();
            } else if let Some(p) = made(k) {
                at.insert(k, out.push(&g.params, Op::Param(*p), &[])?);
                stack.pop();
            } else if missing.is_empty() {
                let inputs: Vec<ValueId> = form.inputs.iter().map(|i| at[i]).collect();
                at.insert(k, out.push_from(&g.params, form.op.clone(), &inputs, form.origin.clone())?);
                stack.pop();
            } else {
                stack.extend(missing);
            }
        }
        out.assign(p, at[&f]);
    }
    Ok(out)
}

mod grown;
mod renew;
#[cfg(test)]
mod tests;
