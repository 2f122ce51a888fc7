//! What a rewrite did, for people: each distinct region that changed, before and after, with the places it stands at.
//!
//! A report only: nothing here decides anything.

use super::lang::{Known, Label};
use super::region::{Body, Regions};
use super::rules::RULES;
use super::{Maker, Solution, common_module};
use pleach_ir::infer::infer;
use pleach_ir::text::print_attributes;
use pleach_ir::{Graph, TensorType};
use std::collections::BTreeMap;

/// A node of a region.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Step {
    /// Operator with its attributes; for what comes from outside, when it is known: `run`, `train`, `slot`, `base`, `const`.
    pub text: String,
    /// Operands, as earlier steps; none for what comes from outside.
    pub inputs: Vec<usize>,
    /// Comes from outside of the region.
    pub leaf: bool,
    /// Type of the result.
    pub ty: String,
    /// The rule that made it, by its number in the list of rules; none for what was there before.
    pub rule: Option<usize>,
}

/// A region before and after, and where it occurs.
#[derive(Clone, PartialEq, Debug)]
pub struct Form {
    /// `(entry, module path)` of each occurrence.
    pub sites: Vec<(String, String)>,
    /// The region as it came, operands first.
    pub before: Vec<Step>,
    /// Its new form.
    pub after: Vec<Step>,
    /// Results of the region in both, in the same order.
    pub outputs: Vec<(usize, usize)>,
    /// The cost model's microseconds before and after.
    pub cost: (f64, f64),
    /// Equalities that each rule found, by its number.
    pub fired: Vec<(usize, usize)>,
}

/// Every region whose new form holds a node that a rule made.
pub(super) fn forms(
    g: &Graph,
    found: &[Option<(Regions, Vec<Known>)>],
    solved: &BTreeMap<&Body, Option<Solution>>,
) -> Vec<Form> {
    let mut sites: BTreeMap<&Body, Vec<(String, String)>> = BTreeMap::new();
    let mut order: Vec<&Body> = vec![];
    for (e, f) in g.entries.iter().zip(found) {
        for r in f.iter().flat_map(|f| &f.0.list) {
            let module = common_module(r.members.iter().filter_map(|&v| e.node(v).origin.as_deref()));
            let list = sites.entry(&r.body).or_insert_with(|| {
                order.push(&r.body);
                vec![]
            });
            list.push((e.name.clone(), module));
        }
    }
    let mut out = vec![];
    for b in order {
        let Some(Some(s)) = solved.get(b) else { continue };
        if !s.nodes.iter().any(|n| matches!((&n.label, n.maker), (Label::Op(_), Maker::Rule(..)))) {
            continue;
        }
        let (mut before, mut after) = (Sketch::default(), Sketch::default());
        b.nodes.iter().for_each(|n| before.push(b, &n.label, &n.ch, None));
        for n in &s.nodes {
            let rule = if let Maker::Rule(k, _) = n.maker { Some(k) } else { None };
            after.push(b, &n.label, &n.ch, rule);
        }
        out.push(Form {
            sites: sites.remove(b).unwrap_or_default(),
            before: before.steps,
            after: after.steps,
            outputs: b.outputs.iter().copied().zip(s.outputs.iter().copied()).collect(),
            cost: s.cost,
            fired: s.saturation.fired.iter().copied().enumerate().filter(|f| f.1 > 0 && f.0 < RULES.len()).collect(),
        });
    }
    out
}

/// Steps with their types as far as they are known.
#[derive(Default)]
struct Sketch {
    steps: Vec<Step>,
    types: Vec<Option<TensorType>>,
}

impl Sketch {
    fn push(&mut self, b: &Body, label: &Label, ch: &[usize], rule: Option<usize>) {
        let (text, ty) = match label {
            Label::Leaf(i) => {
                let leaf = &b.leaves[*i as usize];
                (format!("{:?} {i}", leaf.known).to_lowercase(), Some(leaf.ty.clone()))
            }
            Label::Op(op) => {
                let types: Option<Vec<&TensorType>> = ch.iter().map(|&c| self.types[c].as_ref()).collect();
                let ty = types.and_then(|t| infer(&[], op, &t).ok());
                (format!("{}{}", op.name(), print_attributes(op)), ty)
            }
        };
        let leaf = matches!(label, Label::Leaf(_));
        let shown = ty.as_ref().map_or(String::new(), ToString::to_string);
        self.steps.push(Step { text, inputs: ch.to_vec(), leaf, ty: shown, rule: rule.filter(|_| !leaf) });
        self.types.push(ty);
    }
}
