//! A graph as JSON for Model Explorer (ai-edge-model-explorer): its `GraphCollection`, one graph per entry.
//!
//! A node has an `id`, a `label`, a `namespace` of module names joined by `/`, `attrs` (pairs of key and value), the
//! `incomingEdges` with source and operand position, and `outputsMetadata` with the shape.

use pleach_ir::text::print_attributes;
use pleach_ir::{Entry, Graph, Op, RootKind};
use serde_json::{Value, json};
use std::path::Path;

/// All entries of a graph.
pub(super) fn collection(model: &Path, g: &Graph) -> Value {
    let label = model.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
    json!({"label": label, "graphs": g.entries.iter().map(|e| graph(g, e)).collect::<Vec<_>>()})
}

fn pair(key: &str, value: impl Into<String>) -> Value {
    json!({"key": key, "value": value.into()})
}

/// The module path of an origin, as levels of boxes; a number belongs to the name before it, a rule in brackets to none.
fn namespace(origin: &str) -> String {
    let module = origin.split(" [").next().unwrap_or(origin);
    let mut levels: Vec<String> = vec![];
    for p in module.split('.').filter(|p| !p.is_empty()) {
        let digits = p.bytes().all(|b| b.is_ascii_digit());
        match levels.last_mut().filter(|_| digits) {
            Some(last) => *last = format!("{last}.{p}"),
            None => levels.push(p.to_string()),
        }
    }
    levels.join("/")
}

fn graph(g: &Graph, e: &Entry) -> Value {
    let mut nodes = vec![];
    for v in e.values() {
        let n = e.node(v);
        let edges = n.inputs.iter().enumerate().map(|(i, from)| {
            json!({"sourceNodeId": from.0.to_string(), "sourceNodeOutputId": "0", "targetNodeInputId": i.to_string()})
        });
        let mut attrs = vec![pair("type", n.ty.to_string())];
        let more = print_attributes(&n.op);
        if !more.trim().is_empty() {
            attrs.push(pair("attributes", more.trim()));
        }
        let origin = n.origin.as_deref().unwrap_or_default();
        if let Some((_, rule)) = origin.split_once(" [") {
            attrs.push(pair("made by rule", rule.trim_end_matches(']')));
        }
        let mut label = n.op.name().to_string();
        if let Op::Param(p) = n.op {
            let p = &g.params[p.index()];
            attrs.extend([pair("parameter", &p.name), pair("role", format!("{:?}", p.role).to_lowercase())]);
            label = p.name.clone();
        }
        let shape = [pair("__tensor_tag", v.to_string()), pair("tensor_shape", n.ty.to_string())];
        nodes.push(json!({
            "id": v.0.to_string(), "label": label, "namespace": namespace(origin), "attrs": attrs,
            "incomingEdges": edges.collect::<Vec<_>>(), "outputsMetadata": [{"id": "0", "attrs": shape}],
        }));
    }
    for (i, r) in e.roots.iter().enumerate() {
        let label = match &r.kind {
            RootKind::Output(name) => format!("output {name}"),
            RootKind::Assign(p) => format!("assign {}", g.params[p.index()].name),
        };
        let edge = json!({"sourceNodeId": r.value.0.to_string(), "sourceNodeOutputId": "0", "targetNodeInputId": "0"});
        nodes.push(json!({"id": format!("root{i}"), "label": label, "namespace": "", "incomingEdges": [edge]}));
    }
    json!({"id": e.name, "nodes": nodes})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stay_with_their_name() {
        assert_eq!(namespace("model.layers.3.mlp.up_proj [factor]"), "model/layers.3/mlp/up_proj");
        assert_eq!((namespace(""), namespace("lm_head")), (String::new(), "lm_head".into()));
    }
}
