//! `pleach extract`: the extractor on e-graphs in the JSON of extraction-gym.
//!
//! `nodes` maps an id to `op`, `cost` (1 without it), `eclass` and `children` (ids of nodes; what is needed is their
//! class); `root_eclasses` lists what must be made. A file may be compressed with gzip. Every result is walked once more,
//! against the file's own ids, before it is reported.

use super::plan_memory::targets;
use crate::args::ExtractArgs;
use crate::failure::{Failure, Result};
use crate::files::{self, Begun};
use crate::report;
use pleach_passes::extraction::{Graph, Node, Solution, cost, solve};
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Extracts from every file, prints one line each.
///
/// # Errors
/// A file that cannot be read or is no e-graph, a root that nothing makes, an output that is there already.
pub(crate) fn extract(args: &ExtractArgs) -> Result<()> {
    let out = args.out.as_deref().map(|d| targets(d, &args.files, args.overwrite)).transpose()?;
    free_by_other_name(out.as_deref().unwrap_or_default(), &args.files, args.overwrite)?;
    let mut rows = vec![];
    if !args.json {
        report::line("file,dag_cost,ms,optimal");
    }
    let begun = args.out.as_deref().map(Begun::new).transpose()?;
    for (k, path) in args.files.iter().enumerate() {
        let here = |e: Failure| e.within(&path.display().to_string());
        let file = EGraph::read(&text(path)?).map_err(here)?;
        let start = Instant::now();
        let solution = solve(&file.graph);
        let ms = start.elapsed().as_secs_f64() * 1e3;
        let solution = solution.ok_or_else(|| here(file.impossible()))?;
        let total = cost(&file.graph, &solution.choice).map_err(|e| here(Failure::new(e)))?;
        if !total.is_finite() {
            return Err(here(Failure::new("the costs add up to more than a 64-bit float holds; scale them down")));
        }
        if let Some(out) = &out {
            let choices = file.choices(&solution);
            files::write(&out[k], &choices)?;
            // Plain text under a name that promises gzip is found by its other name too.
            if plain(&out[k]) != out[k] {
                files::write(&plain(&out[k]), &choices)?;
            }
        }
        if args.json {
            rows.push(json!({
                "file": report::path(path), "dag_cost": total, "ms": ms, "optimal": solution.optimal,
                "nodes": file.graph.nodes.len(), "classes": file.graph.classes,
            }));
        } else {
            let optimal = if solution.optimal { "yes" } else { "no" };
            report::line(&format!("{},{total},{ms:.1},{optimal}", report::cell(&path.display().to_string())));
        }
    }
    drop(begun);
    if args.json {
        report::json(&json!(rows));
    }
    Ok(())
}

/// A name without `.gz`.
fn plain(path: &Path) -> PathBuf {
    if path.extension().is_some_and(|e| e == "gz") { path.with_extension("") } else { path.to_path_buf() }
}

/// Refuses outputs whose plain name is that of a file already there, of an input or of another output.
fn free_by_other_name(out: &[PathBuf], inputs: &[PathBuf], overwrite: bool) -> Result<()> {
    let taken = |p: &PathBuf| out.contains(p) || inputs.iter().any(|f| files::same(p, f)) || p.exists() && !overwrite;
    match out.iter().map(|o| (o, plain(o))).find(|(o, p)| p != *o && taken(p)) {
        Some((o, p)) => Err(Failure::new(format!(
            "{}: is written beside {} and is there already; choose another folder, or pass --overwrite if it is an older result",
            p.display(),
            o.display()
        ))),
        None => Ok(()),
    }
}

/// The text of a file, decompressed where it begins as gzip does.
fn text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(Failure::io("read", path))?;
    if bytes.starts_with(&[0x1f, 0x8b]) {
        let mut text = String::new();
        let mut reader = flate2::read::MultiGzDecoder::new(&bytes[..]);
        reader.read_to_string(&mut text).map_err(Failure::io("decompress", path))?;
        return Ok(text);
    }
    String::from_utf8(bytes).map_err(|_| Failure::new(format!("{}: is no text", path.display())))
}

/// An e-graph and the ids of its file.
#[derive(Debug)]
struct EGraph {
    graph: Graph,
    nodes: Vec<String>,
    classes: Vec<String>,
}

impl EGraph {
    fn read(text: &str) -> Result<EGraph> {
        let value: Value = serde_json::from_str(text).map_err(|e| Failure::new(format!("is no JSON: {e}")))?;
        let wants =
            "expected {\"nodes\": {id: {\"op\", \"cost\", \"eclass\", \"children\"}}, \"root_eclasses\": [class]}";
        let nodes = value.get("nodes").and_then(Value::as_object);
        let nodes = nodes.ok_or_else(|| Failure::new(format!("has no object `nodes`; {wants}")))?;
        let roots = value.get("root_eclasses").and_then(Value::as_array);
        let roots = roots.ok_or_else(|| Failure::new(format!("has no list `root_eclasses`; {wants}")))?;
        let mut file = EGraph { graph: Graph::default(), nodes: vec![], classes: vec![] };
        let mut number: HashMap<&str, usize> = HashMap::new();
        let mut class_of: HashMap<&str, usize> = HashMap::with_capacity(nodes.len());
        for (id, node) in nodes {
            let class = node.get("eclass").and_then(Value::as_str);
            let class = class.ok_or_else(|| Failure::new(format!("node `{id}` has no text `eclass`; {wants}")))?;
            let c = *number.entry(class).or_insert_with(|| {
                file.classes.push(class.to_string());
                file.classes.len() - 1
            });
            class_of.insert(id, c);
        }
        for (id, node) in nodes {
            let cost = match node.get("cost") {
                None => 1.0,
                Some(c) => c
                    .as_f64()
                    .filter(|c| c.is_finite())
                    .ok_or_else(|| Failure::new(format!("node `{id}`: `cost` is {c}; it must be a finite number")))?,
            };
            if cost < 0.0 {
                return Err(Failure::new(format!("node `{id}`: `cost` is {cost}; costs below 0 are not supported")));
            }
            let mut needs = vec![];
            let children = match node.get("children") {
                None | Some(Value::Null) => &[][..],
                Some(Value::Array(list)) => list,
                Some(other) => {
                    return Err(Failure::new(format!("node `{id}`: `children` is {other}; it must be a list of ids")));
                }
            };
            for child in children {
                let c = child.as_str().and_then(|c| class_of.get(c));
                needs.push(*c.ok_or_else(|| Failure::new(format!("node `{id}`: there is no node {child}")))?);
            }
            let class = class_of[id.as_str()];
            file.graph.nodes.push(Node { class, cost, needs });
            file.nodes.push(id.clone());
        }
        for root in roots {
            let c = root.as_str().and_then(|r| number.get(r));
            file.graph
                .roots
                .push(*c.ok_or_else(|| Failure::new(format!("`root_eclasses`: no node is of class {root}")))?);
        }
        file.graph.classes = file.classes.len();
        Ok(file)
    }

    /// Why nothing was found.
    fn impossible(&self) -> Failure {
        let one = |r: &&usize| solve(&Graph { roots: vec![**r], ..self.graph.clone() }).is_none();
        let root = self.graph.roots.iter().find(one).map_or("", |r| self.classes[*r].as_str());
        Failure::new(format!("root class `{root}` cannot be made: each of its nodes needs itself in the end"))
    }

    /// The chosen nodes of all classes that the roots reach.
    fn choices(&self, solution: &Solution) -> String {
        let mut map = Map::new();
        for (c, n) in solution.choice.iter().enumerate() {
            if let Some(n) = n {
                map.insert(self.classes[c].clone(), Value::from(self.nodes[*n].as_str()));
            }
        }
        format!("{}\n", json!({ "choices": map }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> String {
        EGraph::read(text).err().map(|e| e.message).unwrap_or_default()
    }

    #[test]
    fn costs_and_children_have_defaults() {
        let e = EGraph::read(
            r#"{"nodes": {"a": {"op": "f", "eclass": "0", "children": ["b", "b"], "cost": 2},
                "b": {"op": "x", "eclass": "1"}, "c": {"op": "g", "eclass": "0", "children": ["a"], "cost": 0}},
                "root_eclasses": ["0"]}"#,
        )
        .unwrap();
        let s = solve(&e.graph).unwrap();
        assert_eq!((s.cost, s.optimal), (3.0, true));
        assert_eq!(e.choices(&s), "{\"choices\":{\"0\":\"a\",\"1\":\"b\"}}\n");
    }

    #[test]
    fn what_is_wrong_is_said() {
        assert!(refused("[").starts_with("is no JSON"));
        assert!(refused("{}").starts_with("has no object `nodes`"));
        assert!(refused(r#"{"nodes": {}}"#).starts_with("has no list `root_eclasses`"));
        assert!(refused(r#"{"nodes": {}, "root_eclasses": ["3"]}"#).contains("no node is of class \"3\""));
        let node =
            |rest: &str| refused(&format!(r#"{{"nodes": {{"a": {{"eclass": "0", {rest}}}}}, "root_eclasses": []}}"#));
        assert!(node(r#""children": ["z"]"#).contains("node `a`: there is no node \"z\""));
        assert!(node(r#""cost": -1"#).contains("below 0"));
        assert!(node(r#""cost": "x""#).contains("finite number"));
        assert!(node(r#""children": "a""#).contains("must be a list"));
        let e =
            EGraph::read(r#"{"nodes": {"a": {"eclass": "0", "children": ["a"]}}, "root_eclasses": ["0"]}"#).unwrap();
        assert!(solve(&e.graph).is_none() && e.impossible().message.contains("root class `0`"));
    }

    #[test]
    fn results_lose_the_gz() {
        assert_eq!(plain(Path::new("d/x.json.gz")), Path::new("d/x.json"));
        assert_eq!(plain(Path::new("d/x.json")), Path::new("d/x.json"));
    }
}
