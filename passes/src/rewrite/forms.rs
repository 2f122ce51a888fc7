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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manager::Report;
    use crate::options::Options;
    use pleach_ir::text::parse;

    /// y = x·Wᵀ + (x·Aᵀ)·Bᵀ twice, with a function between that is not linear.
    const TWO: &str = r#"graph core
param @0 "l.0.w" f32[8,8] frozen checkpoint("l.0.w")
param @1 "l.0.a" f32[2,8] frozen adapter(0, "l.0.a")
param @2 "l.0.b" f32[8,2] frozen adapter(0, "l.0.b")
param @3 "l.1.w" f32[8,8] frozen checkpoint("l.1.w")
param @4 "l.1.a" f32[2,8] frozen adapter(0, "l.1.a")
param @5 "l.1.b" f32[8,2] frozen adapter(0, "l.1.b")
entry "infer" {
  %0 = input "x" : f32[T,8]
  %1 = param @0 : f32[8,8]
  %2 = param @1 : f32[2,8]
  %3 = param @2 : f32[8,2]
  %4 = matmul(%0, %1) {tb} : f32[T,8] from "l.0"
  %5 = matmul(%0, %2) {tb} : f32[T,2] from "l.0"
  %6 = matmul(%5, %3) {tb} : f32[T,8] from "l.0"
  %7 = add(%4, %6) : f32[T,8] from "l.0"
  %8 = exp(%7) : f32[T,8]
  %9 = param @3 : f32[8,8]
  %10 = param @4 : f32[2,8]
  %11 = param @5 : f32[8,2]
  %12 = matmul(%8, %9) {tb} : f32[T,8] from "l.1"
  %13 = matmul(%8, %10) {tb} : f32[T,2] from "l.1"
  %14 = matmul(%13, %11) {tb} : f32[T,8] from "l.1"
  %15 = add(%12, %14) : f32[T,8] from "l.1"
  output "y" %15
}
"#;

    #[test]
    fn a_form_has_its_places_and_the_rules_that_made_it() {
        let g = parse(TWO).unwrap();
        let mut report = Report::default();
        super::super::run(&g, &Options { merge: true, ..Options::default() }, &mut report).unwrap();
        let [f] = report.forms.as_slice() else { panic!("{:?}", report.forms) };
        let at = |m: &str| ("infer".to_string(), m.to_string());
        assert_eq!(f.sites, [at("l.0"), at("l.1")]);
        let factor = RULES.iter().position(|r| r.name == "factor");
        assert!(f.after.iter().any(|s| s.rule == factor && !s.leaf), "{:?}", f.after);
        assert!(f.before.iter().all(|s| s.rule.is_none()));
        // one product with an input of the run is left of the three
        let run = |list: &[Step]| list.iter().filter(|s| s.text.starts_with("matmul") && s.ty.contains('T')).count();
        assert_eq!((run(&f.before), run(&f.after)), (3, 1));
        assert!(f.cost.1 < f.cost.0 && f.outputs.len() == 1);
        let operands = |list: &[Step]| list.iter().enumerate().all(|(i, s)| s.inputs.iter().all(|&u| u < i));
        assert!(operands(&f.before) && operands(&f.after), "operands come first");
    }
}
