//! Passes as the page shows them: the graph after each, what they say, which rules fired, and where.

use super::columns::{Env, Strings, entries};
use crate::pipeline::Row;
use crate::pipeline::stages::Stages;
use pleach_ir::text::print_param;
use pleach_ir::{Entry, Graph};
use pleach_passes::PassReport;
use pleach_passes::recompute::Saved;
use pleach_passes::rewrite::{Form, Step, rules::RULES};
use serde_json::{Value, json};

/// Every graph on the way. Parameters are those of the graph; one that was there before keeps its number.
pub(super) fn graphs(s: &Stages, strings: &mut Strings, env: Env<'_>) -> Value {
    let mut list = vec![];
    let mut before: Option<&Graph> = None;
    for (i, (label, g)) in s.graphs.iter().enumerate() {
        let same = before.is_some_and(|b| b.params == g.params);
        list.push(json!({
            "label": label, "pass": i.checked_sub(1), "entries": entries(g, before, strings, env),
            "params": if same { Value::Null } else { params(g, strings, env) },
        }));
        before = Some(g);
    }
    list.into()
}

fn params(g: &Graph, strings: &mut Strings, env: Env<'_>) -> Value {
    let (mut name, mut ty, mut role, mut bytes, mut text) = (vec![], vec![], vec![], vec![], vec![]);
    for (i, p) in g.params.iter().enumerate() {
        name.push(strings.id(&p.name));
        ty.push(strings.id(&p.ty.to_string()));
        role.push(strings.id(&format!("{:?}", p.role).to_lowercase()));
        bytes.push(p.ty.bytes(env).unwrap_or(0));
        let line = print_param(pleach_ir::ParamId(i as u32), p);
        let role = format!(" {} ", format!("{:?}", p.role).to_lowercase());
        text.push(strings.id(line.rsplit_once(&role).map_or("", |x| x.1)));
    }
    json!({"name": name, "ty": ty, "role": role, "bytes": bytes, "source": text})
}

/// One row per pass, then the stages after them, whose times come from the report of the compilation.
pub(super) fn passes(reports: &[PassReport], rows: &[Row]) -> Value {
    let mut list: Vec<Value> = reports.iter().map(pass).collect();
    let later = rows.iter().skip_while(|r| r.pass != "fuse-kernels");
    list.extend(later.map(|r| {
        json!({
            "name": r.pass, "before": r.nodes_before, "after": r.nodes_after, "changed": r.changed, "ms": r.ms,
            "note": r.note, "lowering": true,
        })
    }));
    list.into()
}

fn pass(r: &PassReport) -> Value {
    let rules: Vec<Value> = r.rules.iter().map(|c| json!([number(c.rule), c.fired, c.chosen])).collect();
    json!({
        "name": r.name, "before": r.nodes_before, "after": r.nodes_after, "changed": r.changed, "ms": r.ms,
        "note": r.note, "rules": rules, "forms": r.forms.iter().map(form).collect::<Vec<_>>(),
    })
}

fn number(rule: &str) -> Option<usize> {
    RULES.iter().position(|r| r.name == rule)
}

fn form(f: &Form) -> Value {
    let step = |s: &Step| json!([s.text, s.inputs, u8::from(s.leaf), s.ty, s.rule]);
    json!({
        "sites": f.sites, "before": f.before.iter().map(step).collect::<Vec<_>>(),
        "after": f.after.iter().map(step).collect::<Vec<_>>(), "outputs": f.outputs, "cost": [f.cost.0, f.cost.1],
        "fired": f.fired,
    })
}

/// Every rule: name, what it says.
pub(super) fn rules() -> Value {
    RULES.iter().map(|r| json!([r.name, r.about])).collect::<Vec<_>>().into()
}

/// What is kept for the backward half: the entry, the number of the graph, and the values with their reasons.
pub(super) fn saved(s: &Stages) -> Value {
    let Some((i, r)) = s.reports.iter().enumerate().rev().find(|(_, r)| !r.saved.is_empty()) else {
        return Value::Null;
    };
    let g = &s.graphs[i + 1].1;
    // of the entries with a backward half, the one that these values are of
    let is = |e: &Entry, x: &Saved| {
        let n = e.nodes.get(x.value.index());
        n.is_some_and(|n| x.name == format!("{} {}", n.origin.as_deref().unwrap_or("?"), n.op.name()))
    };
    let entry = g.entries.iter().find(|e| r.saved.iter().all(|x| is(e, x))).map(|e| e.name.clone());
    let one = |s: &Saved| json!([s.value.0, s.name, s.bytes, s.reason, u8::from(s.trained_only), s.rebuild_us]);
    json!({"entry": entry, "graph": i + 1, "values": r.saved.iter().map(one).collect::<Vec<_>>()})
}
