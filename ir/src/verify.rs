//! The verifier: what every pass may rely on. It reports all faults, each under its line of the printed graph.
//!
//! Rules
//! 1. Names of parameters are unique, so are names of entries, of an entry's inputs and of an entry's outputs.
//! 2. A node's operands are earlier values of its entry; parameters that are read or assigned exist.
//! 3. A node's type is what its operator gives for its operands (this includes: index operands are i32 of rank 1).
//! 4. An element of a constant has no bits outside its type; a bool is 0 or 1.
//! 5. Attention with a window is causal.
//! 6. A root's value exists. An assigned value has the parameter's type; an entry assigns a parameter at most once.
//! 7. A frozen parameter is assigned only when it is derived: a weight that came from a file is never written.
//! 8. `stop_gradient` is legal in phase `imported`, and in an entry `train` as long as it waits for its gradient.

use crate::error::IrError;
use crate::graph::{Entry, Graph, Param, ParamId, Phase, Role, RootKind, Source};
use crate::infer::infer;
use crate::op::Op;
use crate::text::{Place, lines};
use crate::types::{DType, TensorType};
use std::collections::BTreeSet;

/// A broken rule at a place of the graph.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Fault {
    /// Where.
    pub place: Place,
    /// Which rule, in words.
    pub why: String,
}

/// Checks every rule.
///
/// # Errors
/// [`IrError::Verify`]: each faulty line with its faults below.
pub fn verify(g: &Graph) -> Result<(), IrError> {
    let faults = faults(g);
    if faults.is_empty() {
        return Ok(());
    }
    let n = faults.len();
    let mut out = vec![format!("the graph breaks {n} rule{}", if n == 1 { "" } else { "s" })];
    let mut opened = String::new();
    let mut rest = faults.as_slice();
    for (place, line) in lines(g) {
        if matches!(place, Place::Entry(_)) {
            opened.clone_from(&line);
        }
        let here = take(&mut rest, place);
        if here.is_empty() {
            continue;
        }
        if matches!(place, Place::Node(..) | Place::Root(..)) && !opened.is_empty() {
            out.push(std::mem::take(&mut opened));
        }
        out.push(line);
        out.extend(here.iter().map(|f| format!("    error: {}", f.why)));
    }
    Err(IrError::Verify(out.join("\n")))
}

/// The printed graph with `// error: …` lines after each faulty line.
pub fn annotate(g: &Graph) -> String {
    let faults = faults(g);
    let mut rest = faults.as_slice();
    let mut out = String::new();
    for (place, line) in lines(g) {
        out.push_str(&line);
        out.push('\n');
        for f in take(&mut rest, place) {
            out.push_str(&format!("// error: {}\n", f.why));
        }
    }
    out
}

/// The faults of this place, off the front of the ordered rest.
fn take<'a>(rest: &mut &'a [Fault], place: Place) -> &'a [Fault] {
    let n = rest.iter().take_while(|f| f.place == place).count();
    let (here, after) = rest.split_at(n);
    *rest = after;
    here
}

/// Where a place stands in the printed graph.
fn rank(p: Place) -> (usize, usize, usize) {
    match p {
        Place::Graph => (0, 0, 0),
        Place::Param(i) => (1, i, 0),
        Place::Entry(e) => (2 + e, 0, 0),
        Place::Node(e, i) => (2 + e, 1, i),
        Place::Root(e, i) => (2 + e, 2, i),
        Place::End(e) => (2 + e, 3, 0),
    }
}

/// Every fault, in the order of the printed lines.
pub fn faults(g: &Graph) -> Vec<Fault> {
    let mut out = Faults(vec![]);
    let mut names = BTreeSet::new();
    for (i, p) in g.params.iter().enumerate() {
        out.unique(&mut names, &p.name, Place::Param(i), "parameter");
    }
    names.clear();
    for (i, e) in g.entries.iter().enumerate() {
        out.unique(&mut names, &e.name, Place::Entry(i), "entry");
        nodes(g, i, e, &mut out);
        roots(&g.params, i, e, &mut out);
    }
    out.0.sort_by_key(|f| rank(f.place));
    out.0
}

struct Faults(Vec<Fault>);

impl Faults {
    fn add(&mut self, place: Place, why: impl Into<String>) {
        self.0.push(Fault { place, why: why.into() });
    }

    fn unique<'a>(&mut self, seen: &mut BTreeSet<&'a str>, name: &'a str, place: Place, what: &str) {
        if !seen.insert(name) {
            self.add(place, format!("a second {what} is called \"{name}\""));
        }
    }
}

fn nodes(g: &Graph, at: usize, e: &Entry, out: &mut Faults) {
    let mut names = BTreeSet::new();
    for (i, n) in e.nodes.iter().enumerate() {
        let place = Place::Node(at, i);
        let early = n.inputs.iter().filter(|v| v.index() >= i);
        early.clone().for_each(|v| out.add(place, format!("{v} is not defined before this")));
        if early.count() == 0 {
            let types: Vec<&TensorType> = n.inputs.iter().map(|v| e.ty(*v)).collect();
            match infer(&g.params, &n.op, &types) {
                Ok(ty) if ty == n.ty => {}
                Ok(ty) => out.add(place, format!("the operator gives {ty}, the node says {}", n.ty)),
                Err(err) => out.add(place, err.to_string()),
            }
        }
        match &n.op {
            Op::Input { name, .. } => out.unique(&mut names, name, place, "input"),
            Op::Const { dtype, bits, .. } => {
                let room = if *dtype == DType::Bool { 1 } else { 8 * dtype.size() };
                if bits.iter().any(|b| u64::from(*b) >> room != 0) {
                    out.add(place, format!("an element has bits outside {dtype}"));
                }
            }
            Op::Attention(a) | Op::AttentionLse(a) | Op::AttentionGrad { attrs: a, .. }
                if a.window.is_some() && !a.causal =>
            {
                out.add(place, "attention with a window must be causal");
            }
            Op::StopGradient if g.phase == Phase::Core && e.name != "train" => {
                out.add(place, "stop_gradient is not legal in phase core");
            }
            _ => {}
        }
    }
}

fn roots(params: &[Param], at: usize, e: &Entry, out: &mut Faults) {
    let (mut names, mut assigned) = (BTreeSet::new(), BTreeSet::<ParamId>::new());
    for (i, r) in e.roots.iter().enumerate() {
        let place = Place::Root(at, i);
        let node = e.nodes.get(r.value.index());
        if node.is_none() {
            out.add(place, format!("{} does not exist", r.value));
        }
        match &r.kind {
            RootKind::Output(name) => out.unique(&mut names, name, place, "output"),
            RootKind::Assign(p) => {
                if !assigned.insert(*p) {
                    out.add(place, format!("{p} is assigned a second time"));
                }
                let Some(q) = params.get(p.index()) else {
                    out.add(place, format!("there is no parameter {p}"));
                    continue;
                };
                if let Some(n) = node.filter(|n| n.ty != q.ty) {
                    out.add(place, format!("{p} is {}, the value is {}", q.ty, n.ty));
                }
                if q.role == Role::Frozen && q.source != Source::Derived {
                    out.add(place, format!("{p} is frozen and not derived: it is never written"));
                }
            }
        }
    }
}
