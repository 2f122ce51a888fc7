//! An entry with both halves put together again, node by node.
//!
//! A region that spans the halves cannot stand in one place: what its forward outputs lead to comes back as its inputs.
//! So values are built in the order they had, each with the steps of its region's new form that it needs, on demand; the
//! stages of [`super::halves`] keep circles out. What a forward output leaves for the backward half (chosen columns, thin
//! products) is built right after it.

use super::lang::{Known, Label};
use super::region::Regions;
use super::rules::RULES;
use super::{Maker, Solution, common_module};
use crate::canonicalize::Builder;
use pleach_ir::{Entry, Graph, IrError, Op, Root, ValueId};
use std::collections::BTreeMap;
use std::sync::Arc;

/// What is to be built: a value of the old entry, or a step of a region's new form.
#[derive(Clone, Copy)]
enum Task {
    Value(ValueId),
    Step(usize, usize),
}

struct Weaver<'a> {
    b: Builder<'a>,
    e: &'a Entry,
    regions: &'a Regions,
    /// The new form of each region that has one.
    forms: Vec<Option<&'a Solution>>,
    /// For every output of such a region: region and step.
    outputs: BTreeMap<ValueId, (usize, usize)>,
    /// Module path of each region.
    modules: Vec<String>,
    values: Vec<Option<ValueId>>,
    steps: Vec<Vec<Option<ValueId>>>,
    chosen: &'a mut [usize],
}

/// The entry with its regions in their new forms.
pub(super) fn weave<'a>(
    g: &'a Graph,
    e: &'a Entry,
    regions: &'a Regions,
    known: &[Known],
    form: impl Fn(usize) -> Option<&'a Solution>,
    chosen: &'a mut [usize],
) -> Result<Entry, IrError> {
    let forms: Vec<Option<&Solution>> = (0..regions.list.len()).map(form).collect();
    let mut outputs = BTreeMap::new();
    for (k, (r, s)) in regions.list.iter().zip(&forms).enumerate() {
        for (&o, &step) in s.iter().flat_map(|s| r.body.outputs.iter().zip(&s.outputs)) {
            outputs.insert(r.values[o], (k, step));
        }
    }
    let of = |r: &super::Region| common_module(r.members.iter().filter_map(|&v| e.node(v).origin.as_deref()));
    let mut w = Weaver {
        b: Builder::new(&g.params, &e.name),
        e,
        regions,
        modules: regions.list.iter().map(of).collect(),
        steps: forms.iter().map(|s| vec![None; s.map_or(0, |s| s.nodes.len())]).collect(),
        forms,
        outputs,
        values: vec![None; e.nodes.len()],
        chosen,
    };
    let live = e.live();
    for v in e.values() {
        let input = matches!(e.node(v).op, Op::Input { .. });
        if !(live[v.index()] || input) || known[v.index()] < Known::Run {
            continue;
        }
        let inside = regions.of[v.index()].is_some_and(|k| w.forms[k].is_some());
        match w.outputs.get(&v) {
            Some(&(k, step)) => w.output(k, step)?,
            None if inside => {}
            None => {
                w.build(Task::Value(v))?;
            }
        }
    }
    let mut roots = vec![];
    for r in &e.roots {
        roots.push(Root { kind: r.kind.clone(), value: w.build(Task::Value(r.value))? });
    }
    w.b.finish(roots)
}

impl Weaver<'_> {
    /// An output, and what it leaves for the backward half.
    fn output(&mut self, k: usize, step: usize) -> Result<(), IrError> {
        self.build(Task::Step(k, step))?;
        let Some(s) = self.forms[k] else { return Ok(()) };
        let stage = s.nodes[step].stage;
        if !stage.late {
            for i in (0..s.nodes.len()).filter(|&i| s.nodes[i].stage <= stage) {
                self.build(Task::Step(k, i))?;
            }
        }
        Ok(())
    }

    fn built(&self, t: Task) -> Option<ValueId> {
        match t {
            Task::Value(v) => self.values[v.index()],
            Task::Step(k, i) => self.steps[k][i],
        }
    }

    fn needs(&self, t: Task) -> Vec<Task> {
        match t {
            Task::Value(v) => match self.outputs.get(&v) {
                Some(&(k, i)) => vec![Task::Step(k, i)],
                None => self.e.node(v).inputs.iter().map(|&i| Task::Value(i)).collect(),
            },
            Task::Step(k, i) => match self.forms[k].map(|s| &s.nodes[i]) {
                Some(n) => match n.label {
                    Label::Leaf(l) => vec![Task::Value(self.regions.list[k].leaves[l as usize])],
                    Label::Op(_) => n.ch.iter().map(|&c| Task::Step(k, c)).collect(),
                },
                None => vec![],
            },
        }
    }

    fn build(&mut self, t: Task) -> Result<ValueId, IrError> {
        let mut stack = vec![t];
        while let Some(&t) = stack.last() {
            if self.built(t).is_some() {
                stack.pop();
                continue;
            }
            let needs = self.needs(t);
            let missing: Vec<Task> = needs.iter().rev().copied().filter(|&n| self.built(n).is_none()).collect();
            // a way deeper than everything there is to build would be a circle
            if stack.len() > self.values.len() + self.steps.iter().map(Vec::len).sum::<usize>() {
                return Err(IrError::Verify("the new form of a region reads itself".into()));
            }
            if !missing.is_empty() {
                stack.extend(missing);
                continue;
            }
            stack.pop();
            let inputs: Vec<ValueId> = needs.iter().filter_map(|&n| self.built(n)).collect();
            let new = self.make(t, inputs)?;
            match t {
                Task::Value(v) => self.values[v.index()] = Some(new),
                Task::Step(k, i) => self.steps[k][i] = Some(new),
            }
        }
        self.built(t).ok_or_else(|| IrError::Verify("a value was not built".into()))
    }

    fn make(&mut self, t: Task, inputs: Vec<ValueId>) -> Result<ValueId, IrError> {
        let (op, origin) = match t {
            Task::Value(v) if self.outputs.contains_key(&v) => return Ok(inputs[0]),
            Task::Value(v) => (self.e.node(v).op.clone(), self.e.node(v).origin.clone()),
            Task::Step(k, i) => {
                let Some(n) = self.forms[k].map(|s| &s.nodes[i]) else { return Ok(inputs[0]) };
                let Label::Op(op) = &n.label else { return Ok(inputs[0]) };
                let r = &self.regions.list[k];
                let origin = |of: usize| self.e.node(r.values[of]).origin.as_deref();
                let origin: Option<Arc<str>> = match n.maker {
                    Maker::Source(of) => self.e.node(r.values[of]).origin.clone(),
                    Maker::Rule(rule, of) => {
                        self.chosen[rule] += 1;
                        let module = of.and_then(origin);
                        let module = module.map_or(&self.modules[k][..], |m| m.split(" [").next().unwrap_or(m));
                        Some(Arc::from(format!("{module} [{}]", RULES[rule].name).trim_start()))
                    }
                };
                (op.clone(), origin)
            }
        };
        self.b.make(op, inputs, origin)
    }
}
