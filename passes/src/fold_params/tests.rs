//! What moves into prepare entries, what stays, and that a second run changes nothing.

use super::*;
use crate::manager::{Outcome, Pipeline, run as run_passes};
use crate::testing::{Decoder, assigned, same_results};
use pleach_ir::text::{parse, print};

fn passes(g: &Graph, names: &[&str], opts: &Options) -> Outcome {
    run_passes(g, &Pipeline::of(names), opts).unwrap_or_else(|e| panic!("{e}"))
}

fn names(g: &Graph) -> Vec<&str> {
    g.entries.iter().map(|e| e.name.as_str()).collect()
}

#[test]
fn tables_move_to_the_base_and_scales_to_the_slot() {
    let g = parse(
        r#"graph core
param @0 "w" f32[4,4] frozen checkpoint("w")
param @1 "slot0.s" f32[] frozen adapter(0, "s")
param @2 "slot0.b" f32[4,4] frozen adapter(0, "b")
entry "infer" {
  %0 = input "x" : f32[T,4]
  %1 = input "positions" : i32[T]
  %2 = iota {axis = 0} : i32[P,4]
  %3 = cast(%2) : f32[P,4]
  %4 = cos(%3) : f32[P,4]
  %5 = gather(%4, %1) {axis = 0} : f32[T,4]
  %6 = param @0 : f32[4,4]
  %7 = matmul(%5, %6) : f32[T,4]
  %8 = param @1 : f32[]
  %9 = param @2 : f32[4,4]
  %10 = mul(%8, %9) : f32[4,4]
  %11 = matmul(%0, %10) : f32[T,4]
  %12 = add(%7, %11) : f32[T,4]
  output "y" %12
}
"#,
    )
    .unwrap();
    let out = passes(&g, &["fold-params"], &Options::default()).graph;
    assert_eq!(names(&out), ["infer", "prepare(base)", "prepare(slot0)"]);
    assert_eq!(out.params[3].name, "derived.0.constant");
    assert_eq!(out.params[4].name, "derived.1.slot0.b");
    assert_eq!(assigned(&out.entries[1]), [ParamId(3)]);
    assert_eq!(assigned(&out.entries[2]), [ParamId(4)]);
    assert!(!print(&out).contains("cos(%3) : f32[P,4]\n  %5 = gather"));
    same_results(&g, &out, 1e-6);
    assert!(!passes(&out, &["fold-params"], &Options::default()).reports[0].changed, "not idempotent");
}

#[test]
fn bare_parameters_and_views_stay() {
    let g = parse(
        r#"graph core
param @0 "w" f32[4,4] frozen checkpoint("w")
param @1 "b" f32[4] frozen checkpoint("b")
param @2 "trained" f32[4] train zeros
entry "infer" {
  %0 = input "x" : f32[T,4]
  %1 = param @0 : f32[4,4]
  %2 = reshape(%1) : f32[2,8]
  %3 = reshape(%2) : f32[4,4]
  %4 = matmul(%0, %3) : f32[T,4]
  %5 = param @1 : f32[4]
  %6 = broadcast(%5) {axes = [1]} : f32[T,4]
  %7 = param @2 : f32[4]
  %8 = exp(%7) : f32[4]
  %9 = broadcast(%8) {axes = [1]} : f32[T,4]
  %10 = add(%4, %6, %9) : f32[T,4]
  output "y" %10
}
"#,
    )
    .unwrap();
    assert!(!passes(&g, &["fold-params"], &Options::default()).reports[0].changed);
}

#[test]
fn a_value_of_two_slots_is_assigned_by_both() {
    let g = parse(
        r#"graph core
param @0 "slot0.a" f32[2,4] frozen adapter(0, "a")
param @1 "slot1.a" f32[3,4] frozen adapter(1, "a")
entry "infer" {
  %0 = input "x" : f32[T,4]
  %1 = param @0 : f32[2,4]
  %2 = param @1 : f32[3,4]
  %3 = concat(%1, %2) {axis = 0} : f32[5,4]
  %4 = matmul(%0, %3) {tb} : f32[T,5]
  output "y" %4
}
"#,
    )
    .unwrap();
    let out = passes(&g, &["fold-params"], &Options::default()).graph;
    assert_eq!(names(&out), ["infer", "prepare(slot0)", "prepare(slot1)"]);
    assert_eq!(assigned(&out.entries[1]), assigned(&out.entries[2]));
    same_results(&g, &out, 1e-6);
}

#[test]
fn a_part_of_a_weight_under_a_product_gets_a_buffer() {
    let g = parse(
        r#"graph core
param @0 "w" f32[4,8] frozen checkpoint("w")
entry "infer" {
  %0 = input "x" : f32[T,4]
  %1 = param @0 : f32[4,8]
  %2 = slice(%1) {axis = 1, start = 2, end = 5} : f32[4,3]
  %3 = matmul(%0, %2) : f32[T,3]
  output "y" %3
}
"#,
    )
    .unwrap();
    let out = passes(&g, &["fold-params"], &Options::default()).graph;
    assert_eq!(out.params[1].ty.to_string(), "f32[4,3]");
    same_results(&g, &out, 1e-6);
}

#[test]
fn entries_share_derived_buffers_and_a_later_run_extends_them() {
    for merge in [false, true] {
        for ranks in [&[2][..], &[2, 3]] {
            let g = Decoder::tiny(2, ranks).build();
            let opts = Options { merge, ..Options::default() };
            let out = passes(&g, &["canonicalize", "rewrite", "fold-params", "canonicalize"], &opts);
            same_results(&g, &out.graph, 1e-4);
            let reads = |n: &str| {
                let ps = out.graph.entry(n).unwrap().nodes.iter().filter_map(|n| match n.op {
                    Op::Param(p) => Some(p),
                    _ => None,
                });
                ps.collect::<BTreeSet<ParamId>>()
            };
            assert_eq!(reads("infer"), reads("generate"));
            let again = passes(&out.graph, &["fold-params", "canonicalize"], &opts);
            assert_eq!(print(&again.graph), print(&out.graph), "not idempotent");
            // another entry over the same values finds their buffers
            let mut wider = out.graph.clone();
            let mut more = passes(&g, &["canonicalize", "rewrite", "canonicalize"], &opts).graph.entries[0].clone();
            more.name = "again".into();
            wider.entries.push(more);
            let wider = passes(&wider, &["fold-params"], &opts).graph;
            assert_eq!(wider.params, out.graph.params);
            assert_eq!(wider.entry("prepare(slot0)"), out.graph.entry("prepare(slot0)"));
        }
    }
}

/// A weight with trained columns and a low-rank branch: the weight is derived once and `update` sets its columns in
/// place; what else depends on trained values is assigned again.
#[test]
fn update_renews_what_is_derived_from_trained_parameters() {
    let g = parse(
        r#"graph core
param @0 "w" f32[4,6] frozen checkpoint("w")
param @1 "slot0.idx" i32[2] index adapter(0, "idx")
param @2 "slot0.delta" f32[4,2] train adapter(0, "delta")
param @3 "grad" f32[4,2] state zeros
entry "accumulate" {
  %0 = input "x" : f32[T,6]
  %1 = param @0 : f32[4,6]
  %2 = param @1 : i32[2]
  %3 = gather(%1, %2) {axis = 1} : f32[4,2]
  %4 = param @2 : f32[4,2]
  %5 = add(%3, %4) : f32[4,2]
  %6 = scatter_set(%1, %2, %5) {axis = 1} : f32[4,6]
  %7 = cast(%6) : bf16[4,6]
  %8 = cast(%0) : bf16[T,6]
  %9 = matmul(%8, %7) {tb} : f32[T,4]
  output "y" %9
}
entry "update" {
  %0 = input "lr" : f32[]
  %1 = param @2 : f32[4,2]
  %2 = param @3 : f32[4,2]
  %3 = mul(%0, %2) : f32[4,2]
  %4 = sub(%1, %3) : f32[4,2]
  assign @2 %4
}
"#,
    )
    .unwrap();
    let out = passes(&g, &["fold-params", "canonicalize"], &Options::default()).graph;
    let text = print(&out);
    assert_eq!(names(&out), ["accumulate", "update", "prepare(slot0)"]);
    let accumulate = text.split("entry").nth(1).unwrap();
    assert!(!accumulate.contains("scatter_set") && !accumulate.contains("gather"), "{text}");
    let update = text.split("entry").nth(2).unwrap();
    assert_eq!(update.matches("scatter_set").count(), 1, "{text}");
    assert!(!update.contains("gather"), "the original columns are derived too:\n{text}");
    // the set is on the derived weight itself, in its own type
    let whole = out.params.iter().position(|p| p.ty.to_string() == "bf16[4,6]").unwrap();
    assert!(update.contains(&format!("assign @{whole}")), "{text}");
    assert!(!passes(&out, &["fold-params"], &Options::default()).reports[0].changed, "not idempotent\n{text}");
    // one step of both graphs gives the same outputs afterwards
    crate::testing::same_after_update(&g, &out, 1e-6);
}
