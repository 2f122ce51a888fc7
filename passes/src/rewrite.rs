//! `rewrite`: the cheapest equal form of an entry's linear algebra, by equality saturation.
//!
//! Each region ([`region`]) is put into an e-graph over our own operators ([`lang`]), grown by the rules ([`rules`]) to
//! a fixpoint ([`saturate`]), priced ([`cost`]) and read back by a DAG-cost search ([`extract`], [`search`]) that is
//! never dearer than the region as it came. Regions that compute the same are done once, whatever their names, and in
//! one form for every entry, so entries share the buffers that come of it.
//!
//! Where an entry computes gradients, a region spans both halves ([`halves`]), the extraction prices what the backward half
//! makes the forward half keep, and the entry is put together again node by node ([`weave`]).
//!
//! Assumes phase `Core` or `Imported` without gradients to come. Leaves alone: attention, reductions, functions that are
//! not linear. No rule rounds a sum to a narrower type than it had; products of bf16 operands are f32, and only rules
//! that choose, join or scale look through a rounding. Weight values are never looked at: scalars that rules fold are constants of
//! the graph. Which rule made a node is written to the node's origin, in brackets, and counted in the report.

pub mod cost;
pub mod extract;
mod forms;
pub mod halves;
pub mod lang;
pub mod region;
pub mod rules;
pub mod saturate;
pub mod search;
mod weave;

use crate::canonicalize::{self, Builder};
use crate::error::PassError;
use crate::manager::{Report, RuleCount};
use crate::options::Options;
use crate::recompute;
use cost::{Extraction, Kind, Part, Setting};
use egg::{Id, Language};
use extract::Choice;
pub use forms::{Form, Step};
use halves::Halves;
use lang::{ENode, Known, Label, SOURCE, Stage, World};
use pleach_ir::{BinaryOp, Entry, Graph, IrError, Op, Root, ValueId};
use region::{Body, Readers, Region, Regions};
use rules::RULES;
use saturate::{Limits, Saturation, saturate};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::Arc;

const NAME: &str = "rewrite";

/// Names of every rule.
pub fn rule_names() -> Vec<&'static str> {
    RULES.iter().map(|r| r.name).collect()
}

/// Checks names of rules to disable.
///
/// # Errors
/// [`PassError::UnknownRule`] listing the known names.
pub fn check_rule_names(names: &[String]) -> Result<(), PassError> {
    match names.iter().find(|n| !RULES.iter().any(|r| r.name == n.as_str())) {
        Some(n) => Err(PassError::UnknownRule { name: n.clone(), known: rule_names().join(", ") }),
        None => Ok(()),
    }
}

/// Which rule made a step of a solution.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Maker {
    /// The step was in the region already, as this node of the body.
    Source(usize),
    /// A rule of [`RULES`] made it; the node of the body that it equals, if any.
    Rule(usize, Option<usize>),
}

/// One node of a region's new form.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SolvedNode {
    /// What it is; leaves are leaves of the body.
    pub label: Label,
    /// Operands, as earlier steps.
    pub ch: Vec<usize>,
    /// Who made it.
    pub maker: Maker,
    /// When it can be computed.
    pub stage: Stage,
}

/// A region's new form.
#[derive(Clone, PartialEq, Debug)]
pub struct Solution {
    /// Nodes, operands first.
    pub nodes: Vec<SolvedNode>,
    /// The node for each output of the body.
    pub outputs: Vec<usize>,
    /// How the saturation went.
    pub saturation: Saturation,
    /// Model cost of the region as it came and of the new form, in microseconds.
    pub cost: (f64, f64),
}

/// The pass.
///
/// # Errors
/// [`PassError::Build`] if the new form does not type-check, which would be a fault of this pass;
/// [`PassError::UnknownRule`] for a rule to disable that does not exist.
pub fn run(g: &Graph, opts: &Options, report: &mut Report) -> Result<Graph, PassError> {
    check_rule_names(&opts.disabled_rules)?;
    let (plain, lean) = plain(g)?;
    let g = &plain;
    let mut found: Vec<Option<(Regions, Vec<Known>)>> = vec![];
    let mut tokens: BTreeMap<&Body, Vec<u64>> = BTreeMap::new();
    for e in &g.entries {
        if e.name.starts_with("prepare(") {
            found.push(None);
            continue;
        }
        let known = region::known(g, e);
        found.push(Some((region::find(g, e, &known), known)));
    }
    for (e, f) in g.entries.iter().zip(&found) {
        for r in f.iter().flat_map(|f| &f.0.list) {
            let t = tokens.entry(&r.body).or_default();
            t.push(opts.tokens(&e.name));
            t.sort_unstable();
            t.dedup();
        }
    }
    let solved: BTreeMap<&Body, Option<Solution>> = tokens.iter().map(|(b, t)| (*b, solve(b, t, opts))).collect();
    let mut out = Graph { phase: g.phase, params: g.params.clone(), entries: vec![] };
    let mut chosen = vec![0usize; RULES.len()];
    for (e, f) in g.entries.iter().zip(&found) {
        out.entries.push(match f {
            None => e.clone(),
            Some((r, known)) => {
                rebuild(g, e, r, known, &solved, &mut chosen).map_err(PassError::build(NAME, &e.name))?
            }
        });
    }
    fill(report, &found, &solved, &chosen);
    report.forms = forms::forms(g, &found, &solved);
    for (e, _) in out.entries.iter_mut().zip(lean).filter(|x| x.1) {
        *e = recompute::lean(&out.params, e, opts).map_err(PassError::build(NAME, &e.name))?;
    }
    Ok(out)
}

/// The graph with gradients in the form that says what they are made of, and which entries are to be given the form back that
/// reads few values.
fn plain(g: &Graph) -> Result<(Graph, Vec<bool>), PassError> {
    let mut out = g.clone();
    let mut lean = vec![];
    for e in &mut out.entries {
        let plain = recompute::plain(&g.params, e).map_err(PassError::build(NAME, &e.name))?;
        lean.push(plain.is_some());
        if let Some(plain) = plain {
            *e = canonicalize::entry(&g.params, &plain).map_err(PassError::build(NAME, &e.name))?.0;
        }
    }
    Ok((out, lean))
}

fn fill(
    report: &mut Report,
    found: &[Option<(Regions, Vec<Known>)>],
    solved: &BTreeMap<&Body, Option<Solution>>,
    chosen: &[usize],
) {
    let regions: usize = found.iter().flatten().map(|f| f.0.list.len()).sum();
    let skipped: usize = found.iter().flatten().map(|f| f.0.skipped).sum();
    let mut fired = vec![0; RULES.len()];
    let (mut nodes, mut limited, mut won) = (0, 0, 0);
    for s in solved.values().flatten() {
        s.saturation.fired.iter().enumerate().for_each(|(k, n)| fired[k] += n);
        nodes += s.saturation.nodes;
        limited += usize::from(s.saturation.limited);
        won += usize::from(s.cost.1 < s.cost.0);
    }
    report.note = format!("{regions} regions, {} distinct, {won} improved, {nodes} e-nodes", solved.len());
    if limited > 0 {
        report.note += &format!(", {limited} limits hit");
    }
    if skipped > 0 {
        report.note += &format!(", {skipped} too large");
    }
    report.rules = (0..RULES.len())
        .filter(|&k| fired[k] + chosen[k] > 0)
        .map(|k| RuleCount { rule: RULES[k].name, fired: fired[k], chosen: chosen[k] })
        .collect();
}

/// Puts a body into an e-graph: the class of every node, and the e-nodes as they came.
pub fn load(b: &Body, merge: bool) -> Option<(World, Vec<Id>)> {
    let mut w = World::new(b.leaves.clone(), merge);
    let mut at: Vec<Id> = vec![];
    for n in &b.nodes {
        let id = match &n.label {
            Label::Leaf(i) => w.leaf(*i),
            Label::Op(op) => w.make(op.clone(), n.ch.iter().map(|&c| at[c]).collect())?,
        };
        at.push(id);
    }
    w.eg.rebuild();
    Some((w, at))
}

/// A body after saturation, and the problem of choosing from it.
struct Priced {
    w: World,
    /// The class of every node of the body.
    at: Vec<Id>,
    x: Extraction,
    /// The region as it came.
    start: Choice,
    saturation: Saturation,
}

/// Saturates a body and prices what came of it.
fn price(b: &Body, tokens: &[u64], opts: &Options) -> Option<Priced> {
    let (mut w, at) = load(b, opts.merge)?;
    let came: Vec<ENode> = w.made.iter().map(|m| m.0.clone()).collect();
    let limits = Limits { rounds: opts.round_limit, nodes: opts.node_limit, disabled: opts.disabled_rules.clone() };
    let saturation = saturate(&mut w, &limits);
    let roots: Vec<(Id, Readers)> =
        b.outputs.iter().zip(&b.readers).map(|(&o, &who)| (w.eg.find(at[o]), who)).collect();
    let source: Vec<(Id, ENode)> = came
        .into_iter()
        .filter_map(|n| {
            let n = n.map_children(|c| w.eg.find(c));
            Some((w.eg.lookup(n.clone())?, n))
        })
        .collect();
    let epilogue = !opts.disabled_rules.iter().any(|r| r == "rank-epilogue");
    let saved_byte_us = opts.saved_byte_us.unwrap_or(2e6 / opts.target.bytes_per_s);
    let setting = Setting { target: &opts.target, tokens, epilogue, training: b.training, saved_byte_us };
    let x = cost::problem(&w, &roots, &setting, &source);
    let start = cost::source_choice(&w, &x, &source);
    Some(Priced { w, at, x, start, saturation })
}

/// The new form of a body at these token counts; `None` if it has none or stays as it is.
pub fn solve(b: &Body, tokens: &[u64], opts: &Options) -> Option<Solution> {
    let Priced { w, at, x, start, saturation } = price(b, tokens, opts)?;
    let before = x.problem.cost(&start).unwrap_or(f64::INFINITY);
    let (choice, after) = x.problem.solve(Some(&start))?;
    let order = x.problem.walk(&choice)?;
    // nodes of the body by class, for origins
    let mut body_of: BTreeMap<Id, usize> = BTreeMap::new();
    for (k, id) in at.iter().enumerate() {
        body_of.entry(w.eg.find(*id)).or_insert(k);
    }
    let makers = w.makers();
    let epilogue_rule = RULES.iter().position(|r| r.name == "rank-epilogue").unwrap_or(0);
    let maker = |id: Id, e: &ENode| {
        let body = body_of.get(&w.eg.find(id)).copied();
        match (makers.get(e), body) {
            (Some(&SOURCE), Some(k)) => Maker::Source(k),
            (Some(&SOURCE) | None, _) => Maker::Rule(epilogue_rule, body),
            (Some(&r), _) => Maker::Rule(r, body),
        }
    };
    let mut s = Solution { nodes: vec![], outputs: vec![], saturation, cost: (before, after) };
    let mut made: Vec<usize> = vec![usize::MAX; x.problem.classes.len()];
    for c in order {
        let id = x.ids[c % x.ids.len()];
        // what the backward half computes again is not for the forward half
        let again = c >= x.ids.len() && !w.is_param(id);
        let mut stage = x.stages.get(&id).copied().unwrap_or_default();
        stage.late |= again;
        let mut push = |label: Label, ch: Vec<usize>, maker: Maker| {
            s.nodes.push(SolvedNode { label, ch, maker, stage });
            s.nodes.len() - 1
        };
        made[c] = match &x.kinds[choice[c]] {
            Kind::Keep(k) => made[*k],
            Kind::Node(e, ch) => push(e.label.clone(), ch.iter().map(|&k| made[k]).collect(), maker(id, e)),
            Kind::Sum(e, parts) => {
                let mut terms = vec![];
                for p in parts {
                    terms.push(match p {
                        Part::Read(k) => made[*k],
                        Part::Product { node, scale, operands } => {
                            let class = w.eg.lookup(node.clone())?;
                            let ch = operands.iter().map(|&k| made[k]).collect();
                            let v = push(node.label.clone(), ch, maker(class, node));
                            match scale {
                                Some((sn, k)) => {
                                    let class = w.eg.lookup(sn.clone())?;
                                    push(Label::Op(Op::Binary(BinaryOp::Mul)), vec![made[*k], v], maker(class, sn))
                                }
                                None => v,
                            }
                        }
                    });
                }
                push(e.label.clone(), terms, maker(id, e))
            }
        };
    }
    s.outputs = x.problem.roots.iter().map(|&r| made[r]).collect();
    Some(s)
}

/// What is left to put into the new entry, ordered by first value.
struct Plan {
    /// Value or region, by the value that stands for it.
    needs: Vec<usize>,
    /// Who waits for it.
    waiting: Vec<Vec<usize>>,
}

fn rebuild(
    g: &Graph,
    e: &Entry,
    regions: &Regions,
    known: &[Known],
    solved: &BTreeMap<&Body, Option<Solution>>,
    chosen: &mut [usize],
) -> Result<Entry, IrError> {
    if Halves::of(e).both {
        let form = |k: usize| solved.get(&regions.list[k].body).and_then(Option::as_ref);
        return weave::weave(g, e, regions, known, form, chosen);
    }
    let live = e.live();
    let run = |v: ValueId| known[v.index()] == Known::Run;
    let region_of =
        |v: ValueId| regions.of[v.index()].filter(|&k| solved.get(&regions.list[k].body).is_some_and(Option::is_some));
    // the unit of a value: its region's first member, or itself
    let unit = |v: ValueId| region_of(v).map_or(v, |k| regions.list[k].members[0]).index();
    let mut plan = Plan { needs: vec![0; e.nodes.len()], waiting: vec![vec![]; e.nodes.len()] };
    let wanted = |v: ValueId| live[v.index()] || matches!(e.node(v).op, Op::Input { .. });
    for v in e.values().filter(|&v| wanted(v) && run(v)) {
        for &u in e.node(v).inputs.iter().filter(|&&u| run(u)) {
            let (a, b) = (unit(u), unit(v));
            if a != b {
                plan.needs[b] += 1;
                plan.waiting[a].push(b);
            }
        }
    }
    let mut ready: BinaryHeap<Reverse<usize>> = e
        .values()
        .filter(|&v| wanted(v) && run(v) && unit(v) == v.index() && plan.needs[v.index()] == 0)
        .map(|v| Reverse(v.index()))
        .collect();
    let mut b = Builder::new(&g.params, &e.name);
    let mut map: Vec<Option<ValueId>> = vec![None; e.nodes.len()];
    while let Some(Reverse(k)) = ready.pop() {
        let v = ValueId(k as u32);
        match region_of(v) {
            Some(r) => place(&mut b, e, &regions.list[r], solved, &mut map, chosen)?,
            None => {
                copy(&mut b, e, v, &mut map)?;
            }
        }
        for w in std::mem::take(&mut plan.waiting[k]) {
            plan.needs[w] -= 1;
            if plan.needs[w] == 0 {
                ready.push(Reverse(w));
            }
        }
    }
    let mut roots = vec![];
    for r in &e.roots {
        roots.push(Root { kind: r.kind.clone(), value: copy(&mut b, e, r.value, &mut map)? });
    }
    b.finish(roots)
}

/// A value and what it needs, as they are.
fn copy(b: &mut Builder, e: &Entry, v: ValueId, map: &mut [Option<ValueId>]) -> Result<ValueId, IrError> {
    let mut stack = vec![v];
    while let Some(&u) = stack.last() {
        if map[u.index()].is_some() {
            stack.pop();
            continue;
        }
        let n = e.node(u);
        let missing: Vec<ValueId> = n.inputs.iter().copied().filter(|i| map[i.index()].is_none()).rev().collect();
        if missing.is_empty() {
            stack.pop();
            let inputs = n.inputs.iter().filter_map(|i| map[i.index()]).collect();
            map[u.index()] = Some(b.make(n.op.clone(), inputs, n.origin.clone())?);
        } else {
            stack.extend(missing);
        }
    }
    map[v.index()].ok_or_else(|| IrError::Verify(format!("{v} was not built")))
}

/// A region in its new form.
fn place(
    b: &mut Builder,
    e: &Entry,
    r: &Region,
    solved: &BTreeMap<&Body, Option<Solution>>,
    map: &mut [Option<ValueId>],
    chosen: &mut [usize],
) -> Result<(), IrError> {
    let Some(Some(s)) = solved.get(&r.body) else { return Ok(()) };
    let whole = common_module(r.members.iter().filter_map(|&v| e.node(v).origin.as_deref()));
    let mut at: Vec<ValueId> = vec![];
    for n in &s.nodes {
        at.push(match &n.label {
            Label::Leaf(i) => copy(b, e, r.leaves[*i as usize], map)?,
            Label::Op(op) => {
                let origin = match n.maker {
                    Maker::Source(k) => e.node(r.values[k]).origin.clone(),
                    Maker::Rule(rule, of) => {
                        chosen[rule] += 1;
                        let module = of.and_then(|k| e.node(r.values[k]).origin.as_deref());
                        let module = module.map_or(&whole[..], |m| m.split(" [").next().unwrap_or(m));
                        Some(Arc::from(format!("{module} [{}]", RULES[rule].name).trim_start()))
                    }
                };
                b.make(op.clone(), n.ch.iter().map(|&c| at[c]).collect(), origin)?
            }
        });
    }
    for (&o, &k) in r.body.outputs.iter().zip(&s.outputs) {
        map[r.values[o].index()] = Some(at[k]);
    }
    Ok(())
}

/// The longest module path that all of these start with; rules of an earlier run, in brackets, do not count.
fn common_module<'a>(origins: impl Iterator<Item = &'a str>) -> String {
    let mut common: Option<Vec<&str>> = None;
    for o in origins {
        let path: Vec<&str> = o.split(" [").next().unwrap_or("").split('.').collect();
        common = Some(match common {
            None => path,
            Some(c) => c.iter().zip(&path).take_while(|(a, b)| a == b).map(|(a, _)| *a).collect(),
        });
    }
    common.unwrap_or_default().join(".")
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod training_tests;
