//! What the rewriting makes of adapters in a slot, merged, stacked and hostile, and that every rule is true on numbers.

use super::*;
use crate::manager::{Pipeline, run as run_passes};
use crate::options::Target;
use crate::testing::{Build, Decoder, noise, same_results, tensor};
use pleach_ir::interp::{Symbols, Tensor, run_entry_with};
use pleach_ir::text::{parse, print};
use pleach_ir::{DType, Dim, Sym};

fn rewritten(g: &Graph, opts: &Options) -> (Graph, Vec<RuleCount>) {
    let out = run_passes(g, &Pipeline::of(&["canonicalize", "rewrite", "canonicalize"]), opts);
    let out = out.unwrap_or_else(|e| panic!("{e}"));
    (out.graph, out.reports[1].rules.clone())
}

fn merged() -> Options {
    Options { merge: true, ..Options::default() }
}

/// Operands of a value, by type.
fn shapes(g: &Graph, entry: &str, op: &str) -> Vec<String> {
    let e = g.entry(entry).unwrap();
    let mut v: Vec<String> = e
        .nodes
        .iter()
        .filter(|n| n.op.name() == op)
        .map(|n| n.inputs.iter().map(|&i| e.ty(i).to_string()).collect::<Vec<_>>().join(" "))
        .collect();
    v.sort();
    v
}

#[test]
fn branches_stay_in_their_slot_and_cost_one_thin_product_per_input() {
    let (g, rules) = rewritten(&Decoder::default().build(), &Options::default());
    let mm = shapes(&g, "infer", "matmul");
    // thin sides: q,k,v as one, gate,up as one, o, down; each base product and each B on its own
    assert_eq!(mm.len(), 4 + 7 + 7, "{mm:#?}");
    assert!(mm.contains(&"f32[T,576] f32[48,576]".into()) && mm.contains(&"f32[T,576] f32[32,576]".into()), "{mm:#?}");
    // the scale is part of B
    assert_eq!(shapes(&g, "infer", "mul").iter().filter(|s| s.starts_with("f32[] f32[T,")).count(), 0);
    assert!(rules.iter().any(|r| r.rule == "scale-in" && r.chosen == 28), "{rules:?}");
    // nothing of a base weight's size is made of a slot
    assert!(!shapes(&g, "infer", "add").iter().any(|s| s.contains("576,576")), "{}", print(&g));
    assert_eq!(mm, shapes(&g, "generate", "matmul"));
    let text = print(&g);
    assert!(text.contains("from \"layers.0 [fuse-siblings]\""), "{text}");
}

#[test]
fn two_adapters_become_one_of_the_summed_rank() {
    let d = Decoder { ranks: vec![8, 24], ..Decoder::default() };
    let (g, rules) = rewritten(&d.build(), &Options::default());
    let mm = shapes(&g, "infer", "matmul");
    assert_eq!(mm.len(), 4 + 7 + 7, "{mm:#?}\n{}", print(&g));
    assert!(mm.contains(&"f32[T,576] f32[96,576]".into()), "{mm:#?}");
    assert!(mm.contains(&"f32[T,32] f32[1536,32]".into()), "{mm:#?}");
    assert!(rules.iter().any(|r| r.rule == "ranks-concat" && r.chosen > 0), "{rules:?}");
}

#[test]
fn merging_leaves_one_product_per_layer_and_its_weight_is_known_at_load() {
    for ranks in [vec![1], vec![16], vec![8, 24]] {
        let d = Decoder { ranks, ..Decoder::default() };
        let (g, _) = rewritten(&d.build(), &merged());
        let e = g.entry("infer").unwrap();
        let known = region::known(&g, e);
        let run: Vec<_> = e
            .values()
            .filter(|v| matches!(e.node(*v).op, Op::MatMul { .. }) && known[v.index()] == Known::Run)
            .collect();
        assert_eq!(run.len(), 7, "{}", print(&g));
        assert!(run.iter().all(|v| e.ty(*v).shape[1] > Dim::Known(32)));
    }
}

#[test]
fn launches_that_cost_much_put_siblings_side_by_side() {
    let d = Decoder { ranks: vec![], ..Decoder::default() };
    let (cpu, _) = rewritten(&d.build(), &Options::default());
    assert_eq!(shapes(&cpu, "infer", "matmul").len(), 7);
    for merge in [false, true] {
        let d = Decoder { ranks: if merge { vec![16] } else { vec![] }, ..Decoder::default() };
        let (gpu, rules) = rewritten(&d.build(), &Options { target: Target::GPU, merge, ..Options::default() });
        let mm = shapes(&gpu, "infer", "matmul");
        assert!(mm.contains(&"f32[T,576] f32[960,576]".into()), "{mm:?}");
        assert!(mm.contains(&"f32[T,576] f32[3072,576]".into()), "{mm:?}");
        assert!(rules.iter().any(|r| r.rule == "fuse-siblings"));
    }
}

#[test]
fn a_branch_with_a_function_in_it_is_not_merged() {
    let g = parse(
        r#"graph core
param @0 "w" f32[64,64] frozen checkpoint("w")
param @1 "slot0.a" f32[64,4] frozen adapter(0, "a")
param @2 "slot0.b" f32[4,64] frozen adapter(0, "b")
entry "infer" {
  %0 = input "x" : f32[T,64]
  %1 = param @0 : f32[64,64]
  %2 = matmul(%0, %1) : f32[T,64]
  %3 = param @1 : f32[64,4]
  %4 = matmul(%0, %3) : f32[T,4]
  %5 = tanh(%4) : f32[T,4]
  %6 = param @2 : f32[4,64]
  %7 = matmul(%5, %6) : f32[T,64]
  %8 = add(%2, %7) : f32[T,64]
  output "y" %8
}
"#,
    )
    .unwrap();
    let (out, _) = rewritten(&g, &merged());
    assert_eq!(shapes(&out, "infer", "matmul").len(), 3);
    same_results(&g, &out, 1e-5);
}

#[test]
fn what_arrives_merged_comes_apart_for_a_slot() {
    let text = r#"graph core
param @0 "w" f32[64,64] frozen checkpoint("w")
param @1 "slot0.a" f32[4,64] frozen adapter(0, "a")
param @2 "slot0.b" f32[64,4] frozen adapter(0, "b")
param @3 "slot0.s" f32[] frozen adapter(0, "s")
entry "infer" {
  %0 = input "x" : f32[T,64]
  %1 = param @0 : f32[64,64]
  %2 = param @1 : f32[4,64]
  %3 = param @2 : f32[64,4]
  %4 = matmul(%3, %2) : f32[64,64]
  %5 = param @3 : f32[]
  %6 = mul(%5, %4) : f32[64,64]
  %7 = add(%1, %6) : f32[64,64]
  %8 = matmul(%0, %7) {tb} : f32[T,64]
  output "y" %8
}
"#;
    let g = parse(text).unwrap();
    let (apart, _) = rewritten(&g, &Options::default());
    let mm = shapes(&apart, "infer", "matmul");
    assert_eq!(mm, ["f32[T,4] f32[64,4]", "f32[T,64] f32[4,64]", "f32[T,64] f32[64,64]"], "{}", print(&apart));
    same_results(&g, &apart, 1e-5);
    let (kept, _) = rewritten(&g, &merged());
    assert_eq!(shapes(&kept, "infer", "matmul").len(), 2);
}

#[test]
fn chosen_rows_are_chosen_before_the_product() {
    let g = parse(
        r#"graph core
param @0 "w" f32[64,64] frozen checkpoint("w")
param @1 "v" f32[64,64] frozen checkpoint("v")
entry "infer" {
  %0 = input "x" : f32[T,64]
  %1 = input "last" : i32[S]
  %2 = param @0 : f32[64,64]
  %3 = matmul(%0, %2) {tb} : f32[T,64]
  %4 = param @1 : f32[64,64]
  %5 = matmul(%3, %4) {tb} : f32[T,64]
  %6 = gather(%5, %1) {axis = 0} : f32[S,64]
  output "y" %6
}
"#,
    )
    .unwrap();
    let (out, _) = rewritten(&g, &Options { disabled_rules: vec!["mm-assoc".into()], ..Options::default() });
    assert!(shapes(&out, "infer", "matmul").iter().all(|s| s.starts_with("f32[S,64]")), "{}", print(&out));
    same_results(&g, &out, 1e-5);
}

#[test]
fn disabled_rules_do_not_fire_and_unknown_ones_are_refused() {
    let d = Decoder::default().build();
    let all: Vec<String> = rule_names().iter().map(|s| s.to_string()).collect();
    let (g, rules) = rewritten(&d, &Options { disabled_rules: all, ..Options::default() });
    assert!(rules.iter().all(|r| r.fired == 0), "{rules:?}");
    assert_eq!(shapes(&g, "infer", "matmul").len(), 21);
    let e = check_rule_names(&["fold-everything".into()]).unwrap_err();
    assert!(e.to_string().contains("known rules: mm-assoc, scale-out"), "{e}");
}

#[test]
fn results_stay_and_two_runs_agree() {
    for ranks in [&[][..], &[2], &[2, 3]] {
        for merge in [false, true] {
            for target in [Target::CPU, Target::GPU] {
                let g = Decoder::tiny(2, ranks).build();
                let opts = Options { merge, target, ..Options::default() };
                let (a, _) = rewritten(&g, &opts);
                same_results(&g, &a, 1e-4);
                assert_eq!(print(&a), print(&rewritten(&g, &opts).0));
                let twice = rewritten(&a, &opts).0;
                same_results(&g, &twice, 1e-4);
            }
        }
    }
}

#[test]
fn equal_layers_are_done_once() {
    let d = Decoder { layers: 30, ..Decoder::default() };
    let out = run_passes(&d.build(), &Pipeline::of(&["canonicalize", "rewrite"]), &Options::default()).unwrap();
    assert!(out.reports[1].note.starts_with("240 regions, 4 distinct, 4 improved"), "{}", out.reports[1].note);
}

/// Every e-node of every class, on small random tensors, equals its class: a rule that is wrong cannot hide.
#[test]
fn every_e_node_equals_its_class() {
    let mut fired = vec![0; RULES.len()];
    let mut seen = 0;
    for (name, g) in samples() {
        for merge in [false, true] {
            let g = run_passes(&g, &Pipeline::of(&["canonicalize"]), &Options::default()).unwrap().graph;
            let e = &g.entries[0];
            let regions = region::find(&g, e, &region::known(&g, e));
            for r in &regions.list {
                let (mut w, _) = load(&r.body, merge).unwrap();
                let s = saturate(&mut w, &Limits { rounds: 30, nodes: 4000, disabled: vec![] });
                assert!(!s.limited, "{name}: {} e-nodes after {} rounds", s.nodes, s.rounds);
                s.fired.iter().enumerate().for_each(|(k, n)| fired[k] += n);
                seen += check_classes(&name, &w);
            }
        }
    }
    let silent: Vec<&str> = (0..RULES.len()).filter(|&k| fired[k] == 0).map(|k| RULES[k].name).collect();
    // rank-epilogue is a price; the others need gradients
    assert_eq!(silent, ["rowscale-mm", "rank-epilogue"], "rules that never fired");
    assert!(seen > 500, "{seen}");
}

/// Evaluates the e-graph bottom up, one e-node at a time. Returns the number of e-nodes compared.
pub(super) fn check_classes(name: &str, w: &World) -> usize {
    let narrow = w.eg.classes().any(|c| c.data.ty.dtype == DType::BF16);
    let tolerance = if narrow { 2e-2 } else { 1e-3 };
    let mut value: BTreeMap<Id, Tensor> = BTreeMap::new();
    let mut waiting: Vec<(Id, &ENode)> = w.eg.classes().flat_map(|c| c.nodes.iter().map(move |n| (c.id, n))).collect();
    let mut compared = 0;
    let makers = w.makers();
    while !waiting.is_empty() {
        let before = waiting.len();
        waiting.retain(|(id, n)| {
            let Some(t) = evaluate(w, n, &value) else { return true };
            match value.get(id) {
                None => {
                    value.insert(*id, t);
                }
                Some(first) => {
                    let e = t.relative_error(first);
                    let rule = makers.get(n).and_then(|&r| RULES.get(r)).map_or("source", |r| r.name);
                    assert!(e < tolerance, "{name}: {n:?} made by {rule} is off by {e}");
                    compared += 1;
                }
            }
            false
        });
        assert!(waiting.len() < before, "{name}: a cycle without a value");
    }
    compared
}

fn evaluate(w: &World, n: &ENode, value: &BTreeMap<Id, Tensor>) -> Option<Tensor> {
    let op = match &n.label {
        Label::Leaf(i) => {
            let ty = &w.eg.analysis.leaves[*i as usize].ty;
            return Some(tensor(ty, 1000 + u64::from(*i)));
        }
        Label::Op(op) => op,
    };
    let mut e = Entry::new("one");
    let mut inputs = BTreeMap::new();
    let mut ids = vec![];
    for (k, c) in n.ch.iter().enumerate() {
        let t = value.get(&w.eg.find(*c))?;
        let ty = w.ty(*c);
        let shape = ty.shape.clone();
        ids.push(e.push(&[], Op::Input { name: format!("{k}"), dtype: ty.dtype, shape }, &[]).unwrap());
        inputs.insert(format!("{k}"), t.clone());
    }
    let v = e.push(&[], op.clone(), &ids).unwrap();
    e.output("y", v);
    let symbols: Symbols = [(Sym::T, 5), (Sym::L, 5), (Sym::S, 2), (Sym::P, 7)].into_iter().collect();
    let r = run_entry_with(&[], &|_| None, &e, &inputs, &symbols).unwrap_or_else(|x| panic!("{op:?}: {x}"));
    r.outputs.into_values().next()
}

/// Graphs that make every rule fire: decoders, and one per form of adapter.
fn samples() -> Vec<(String, Graph)> {
    let mut out: Vec<(String, Graph)> = vec![];
    for ranks in [&[][..], &[2], &[1, 3], &[2, 2, 2]] {
        out.push((format!("decoder {ranks:?}"), Decoder::tiny(1, ranks).build()));
    }
    let forms = [
        (
            "hydra",
            "%2 = matmul(%0, %1) : f32[T,8]\n%6 = matmul(%2, %3) : f32[T,2]\n%7 = matmul(%6, %4) : f32[T,8]\n%9 = add(%2, %7) : f32[T,8]",
        ),
        (
            "diagonal",
            "%2 = matmul(%0, %1) : f32[T,8]\n%6 = broadcast(%5) {axes = [1]} : f32[T,8]\n%7 = mul(%2, %6) : f32[T,8]\n%9 = matmul(%7, %1) : f32[T,8]",
        ),
        (
            "diagonal weight",
            "%6 = broadcast(%5) {axes = [1]} : f32[8,8]\n%7 = mul(%1, %6) : f32[8,8]\n%9 = matmul(%0, %7) : f32[T,8]",
        ),
        (
            "diagonal rows",
            "%6 = broadcast(%5) {axes = [0]} : f32[8,8]\n%7 = mul(%1, %6) : f32[8,8]\n%9 = matmul(%0, %7) : f32[T,8]",
        ),
        (
            "vera",
            "%6 = matmul(%0, %1) : f32[T,8]\n%7 = broadcast(%5) {axes = [1]} : f32[T,8]\n%2 = mul(%6, %7) : f32[T,8]\n%10 = matmul(%2, %1) {tb} : f32[T,8]\n%9 = add(%6, %10) : f32[T,8]",
        ),
        (
            "rows of a weight",
            "%2 = matmul(%0, %1) : f32[T,8]\n%6 = gather(%0, %8) {axis = 1} : f32[T,2]\n%7 = matmul(%6, %4) : f32[T,8]\n%9 = add(%2, %7) : f32[T,8]",
        ),
        ("rows added", "%6 = scatter_add(%1, %8, %4) {axis = 0} : f32[8,8]\n%9 = matmul(%0, %6) : f32[T,8]"),
        (
            "columns chosen",
            "%2 = matmul(%0, %1) : f32[T,8]\n%6 = matmul(%2, %1) {tb} : f32[T,8]\n%7 = add(%2, %6) : f32[T,8]\n%9 = gather(%7, %8) {axis = 1} : f32[T,2]",
        ),
        (
            "slices of one",
            "%2 = slice(%0) {axis = 1, start = 0, end = 3} : f32[T,3]\n%6 = slice(%0) {axis = 1, start = 3, end = 8} : f32[T,5]\n%7 = slice(%1) {axis = 0, start = 0, end = 3} : f32[3,8]\n%10 = slice(%1) {axis = 0, start = 3, end = 8} : f32[5,8]\n%11 = matmul(%2, %7) : f32[T,8]\n%12 = matmul(%6, %10) : f32[T,8]\n%9 = add(%11, %12) : f32[T,8]",
        ),
        (
            "scales",
            "%2 = const 0.5 : f32[]\n%6 = matmul(%0, %1) : f32[T,8]\n%7 = mul(%2, %6) : f32[T,8]\n%10 = mul(%2, %1) : f32[8,8]\n%11 = matmul(%0, %10) {tb} : f32[T,8]\n%12 = mul(%2, %11) : f32[T,8]\n%9 = add(%7, %12) : f32[T,8]",
        ),
        (
            "added weights",
            "%2 = matmul(%3, %4) : f32[8,8]\n%6 = add(%1, %2) : f32[8,8]\n%9 = matmul(%0, %6) : f32[T,8]",
        ),
        (
            "left sums",
            "%2 = matmul(%0, %3) : f32[T,2]\n%6 = slice(%0) {axis = 1, start = 0, end = 2} : f32[T,2]\n%7 = matmul(%2, %4) : f32[T,8]\n%10 = matmul(%6, %4) : f32[T,8]\n%9 = add(%7, %10) : f32[T,8]",
        ),
        (
            "concat of parts",
            "%2 = matmul(%0, %1) : f32[T,8]\n%6 = slice(%2) {axis = 1, start = 0, end = 3} : f32[T,3]\n%7 = slice(%2) {axis = 1, start = 5, end = 8} : f32[T,3]\n%10 = concat(%6, %7) {axis = 1} : f32[T,6]\n%9 = slice(%10) {axis = 1, start = 2, end = 5} : f32[T,3]",
        ),
    ];
    for (name, body) in forms {
        out.push((name.into(), parse(&form(body)).unwrap_or_else(|e| panic!("{name}: {e}\n{}", form(body)))));
    }
    out
}

/// A graph over x, W, A, B, a vector and an index from lines that may use them out of order.
fn form(body: &str) -> String {
    let head = [
        "%0 = input \"x\" : f32[T,8]",
        "%1 = param @0 : f32[8,8]",
        "%3 = param @1 : f32[8,2]",
        "%4 = param @2 : f32[2,8]",
        "%5 = param @3 : f32[8]",
        "%8 = param @4 : i32[2]",
    ];
    let lines: Vec<&str> = head.into_iter().chain(body.lines()).collect();
    // values are numbered by position
    let mut names: BTreeMap<&str, usize> = BTreeMap::new();
    for (k, l) in lines.iter().enumerate() {
        names.insert(l.split(" = ").next().unwrap(), k);
    }
    let number = |l: &str| {
        let mut out = String::new();
        let mut rest = l;
        while let Some(p) = rest.find('%') {
            out.push_str(&rest[..p]);
            let end = rest[p + 1..].find(|c: char| !c.is_ascii_digit()).map_or(rest.len(), |e| p + 1 + e);
            out.push_str(&format!("%{}", names[&rest[p..end]]));
            rest = &rest[end..];
        }
        out + rest
    };
    let text: Vec<String> = lines.iter().map(|l| format!("  {}\n", number(l))).collect();
    format!(
        "graph core\nparam @0 \"w\" f32[8,8] frozen checkpoint(\"w\")\nparam @1 \"slot0.a\" f32[8,2] frozen adapter(0, \"a\")\n\
         param @2 \"slot0.b\" f32[2,8] frozen adapter(0, \"b\")\nparam @3 \"slot0.g\" f32[8] frozen adapter(0, \"g\")\n\
         param @4 \"i\" i32[2] index checkpoint(\"i\")\nentry \"infer\" {{\n{}  output \"y\" %{}\n}}\n",
        text.concat(),
        names["%9"]
    )
}

#[test]
fn noise_is_noise() {
    let n = noise(3, 100);
    assert!(n.iter().any(|x| *x > 0.2) && n.iter().any(|x| *x < -0.2) && n.iter().all(|x| x.abs() <= 1.0));
    assert_eq!(tensor(&pleach_ir::TensorType::new(DType::F32, [Dim::Symbol(Sym::T)]), 1).shape, [5]);
}

/// Graphs that no model has must not take long either: effort is bounded by counts.
#[test]
fn hostile_graphs_stay_bounded() {
    for (name, g) in [("chain", chain(80)), ("long chain", chain(240)), ("slots", wide(40)), ("siblings", siblings(60))]
    {
        for opts in [Options::default(), merged()] {
            let (out, _) = rewritten(&g, &opts);
            // two hundred products in a row round differently in another order
            same_results(&g, &out, if name == "long chain" { 1e-2 } else { 1e-3 });
        }
    }
}

fn chain(n: usize) -> Graph {
    let mut b = Build { g: Graph::default(), e: Entry::new("infer") };
    let mut x = b.push(tokens(), &[]);
    for k in 0..n {
        let w = if k % 3 == 0 { b.slot(0, &format!("w{k}"), &[8, 8]) } else { b.base(&format!("w{k}"), &[8, 8]) };
        x = b.push(Op::MatMul { ta: false, tb: k % 2 == 0 }, &[x, w]);
        let s = b.push(Op::f32(0.3), &[]);
        x = b.push(Op::Binary(BinaryOp::Mul), &[s, x]);
    }
    b.e.output("y", x);
    b.g.entries.push(b.e);
    b.g
}

fn wide(n: usize) -> Graph {
    let mut b = Build { g: Graph::default(), e: Entry::new("infer") };
    let x = b.push(tokens(), &[]);
    let w = b.base("w", &[8, 8]);
    let mut terms = vec![b.push(Op::MatMul { ta: false, tb: true }, &[x, w])];
    for k in 0..n {
        let (p, q) = (b.slot(k as u32, "a", &[2, 8]), b.slot(k as u32, "b", &[8, 2]));
        let s = b.slot(k as u32, "s", &[]);
        let t = b.push(Op::MatMul { ta: false, tb: true }, &[x, p]);
        let t = b.push(Op::MatMul { ta: false, tb: true }, &[t, q]);
        terms.push(b.push(Op::Binary(BinaryOp::Mul), &[s, t]));
    }
    let y = b.push(Op::Add, &terms);
    b.e.output("y", y);
    b.g.entries.push(b.e);
    b.g
}

fn siblings(n: usize) -> Graph {
    let mut b = Build { g: Graph::default(), e: Entry::new("infer") };
    let mut x = b.push(tokens(), &[]);
    for k in 0..n {
        let w: Vec<ValueId> = (0..3).map(|i| b.base(&format!("w{k}.{i}"), &[8, 8])).collect();
        let t: Vec<ValueId> = w.iter().map(|&w| b.push(Op::MatMul { ta: false, tb: false }, &[x, w])).collect();
        x = b.push(Op::Add, &t);
    }
    b.e.output("y", x);
    b.g.entries.push(b.e);
    b.g
}

fn tokens() -> Op {
    Op::Input { name: "x".into(), dtype: DType::F32, shape: vec![Dim::Symbol(Sym::T), Dim::Known(8)] }
}
