//! What is kept at which price, and that the entry computes the same.

use super::*;
use crate::manager::{Pipeline, run as run_passes};
use crate::testing::same_results;
use pleach_ir::text::{parse, print};

/// Two products with a gate between them; the backward half reads the gate's operands and its result.
const GATED: &str = r#"graph core
param @0 "w1" f32[64,64] frozen checkpoint("w1")
param @1 "w2" f32[64,64] frozen checkpoint("w2")
param @2 "g1" f32[64,64] state zeros
entry "accumulate" {
  %0 = input "x" : f32[T,64]
  %1 = input "loss_scale" : f32[]
  %2 = param @0 : f32[64,64]
  %3 = param @1 : f32[64,64]
  %4 = param @2 : f32[64,64]
  %5 = matmul(%0, %2) : f32[T,64]
  %6 = sigmoid(%5) : f32[T,64]
  %7 = mul(%5, %6) : f32[T,64]
  %8 = matmul(%7, %3) : f32[T,64]
  %9 = reduce_sum(%8) {axis = 1} : f32[T]
  %10 = reduce_sum(%9) {axis = 0} : f32[]
  %11 = mul(%1, %10) : f32[]
  %12 = broadcast(%1) {axes = []} : f32[T,64]
  %13 = matmul(%7, %12) {ta} : f32[64,64]
  %14 = matmul(%12, %3) {tb} : f32[T,64]
  %15 = mul(%14, %6) : f32[T,64]
  %16 = mul(%15, %5) : f32[T,64]
  %17 = matmul(%0, %16) {ta} : f32[64,64]
  %18 = add(%4, %13, %17) : f32[64,64]
  output "loss" %11
  assign @2 %18
}
"#;

fn at(byte_us: f64) -> (Graph, Vec<Saved>) {
    let g = parse(GATED).unwrap_or_else(|e| panic!("{e}"));
    let opts = Options { recompute: Some(Price::flat(byte_us)), ..Options::default() };
    let out = run_passes(&g, &Pipeline::of(&["recompute"]), &opts).unwrap_or_else(|e| panic!("{e}"));
    same_results(&g, &out.graph, 1e-5);
    (out.graph, out.reports[0].saved.clone())
}

fn kept(saved: &[Saved]) -> Vec<&str> {
    saved.iter().filter(|s| s.bytes > 1000).map(|s| s.name.rsplit(' ').next().unwrap_or("")).collect()
}

#[test]
fn cheap_values_are_built_again_and_products_kept_at_the_price_of_bandwidth() {
    let floor = Price::floor(Options::default().target.bytes_per_s);
    let (g, saved) = at(floor.byte_us);
    assert_eq!(kept(&saved), ["matmul"], "{saved:?}");
    let text = print(&g);
    assert_eq!(text.matches("sigmoid").count(), 2, "{text}");
    assert_eq!(text.matches("= after(").count(), 1, "{text}");
}

#[test]
fn without_a_price_products_are_built_again_where_that_takes_next_to_no_time() {
    let run = |text: &str| {
        let g = parse(text).unwrap_or_else(|e| panic!("{e}"));
        let out = run_passes(&g, &Pipeline::of(&["recompute"]), &Options::default()).unwrap_or_else(|e| panic!("{e}"));
        same_results(&g, &out.graph, 1e-5);
        print(&out.graph).matches("matmul").count()
    };
    // One of five products: a fifth of the time.
    assert_eq!(run(GATED), 5);
    // Beside one that takes 128 times as long.
    let beside = GATED.replace("entry ", "param @3 \"w3\" f32[64,8192] frozen checkpoint(\"w3\")\nentry ").replace(
        "  output ",
        "  %19 = param @3 : f32[64,8192]\n  %20 = matmul(%0, %19) : f32[T,8192]\n  output \"wide\" %20\n  output ",
    );
    assert_eq!(run(&beside), 7);
}

/// What has to be written for a product or for a choice costs that as well: a choice of columns is kept, not made again of a value that no
/// gradient reads whole.
#[test]
fn what_is_chosen_of_a_value_is_kept_and_the_value_not_built_again() {
    let text = r#"graph core
param @0 "w" f32[4096,4096] frozen checkpoint("w")
param @1 "i" i32[16] index zeros
param @2 "g" f32[16,4096] state zeros
entry "accumulate" {
  %0 = input "x" : f32[8192,4096]
  %1 = input "loss_scale" : f32[]
  %2 = param @0 : f32[4096,4096]
  %3 = param @1 : i32[16]
  %4 = param @2 : f32[16,4096]
  %5 = neg(%0) : f32[8192,4096]
  %6 = matmul(%5, %2) : f32[8192,4096]
  %7 = gather(%5, %3) {axis = 1} : f32[8192,16]
  %8 = reduce_sum(%6) {axis = 1} : f32[8192]
  %9 = reduce_sum(%8) {axis = 0} : f32[]
  %10 = mul(%1, %9) : f32[]
  %11 = broadcast(%1) {axes = []} : f32[8192,4096]
  %12 = matmul(%7, %11) {ta} : f32[16,4096]
  %13 = add(%4, %12) : f32[16,4096]
  output "loss" %10
  assign @2 %13
}
"#;
    let g = parse(text).unwrap_or_else(|e| panic!("{e}"));
    let opts = Options { target: crate::Target::GPU, ..Options::default() };
    let out = run_passes(&g, &Pipeline::of(&["recompute"]), &opts).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(kept(&out.reports[0].saved), ["gather"], "{:?}", out.reports[0].saved);
}

#[test]
fn a_high_price_builds_products_again() {
    let (g, saved) = at(1.0);
    assert!(kept(&saved).is_empty(), "{saved:?}");
    assert_eq!(print(&g).matches("matmul").count(), 6);
}

#[test]
fn at_no_price_everything_that_costs_time_is_kept() {
    let (g, saved) = at(0.0);
    assert_eq!(kept(&saved), ["matmul", "sigmoid", "mul"], "{saved:?}");
    assert!(!print(&g).contains("after"));
    let product = saved.iter().find(|s| s.name.ends_with("mul") && s.trained_only).map(|s| &s.reason);
    assert!(product.is_some_and(|r| r.contains("trained weight")), "{saved:?}");
}

#[test]
fn the_early_part_can_have_a_price_of_its_own() {
    let g = parse(GATED).unwrap_or_else(|e| panic!("{e}"));
    let price = Price { byte_us: 0.0, early_byte_us: 1.0, early: 1.0, every: 0 };
    let opts = Options { recompute: Some(price), ..Options::default() };
    let out = run_passes(&g, &Pipeline::of(&["recompute"]), &opts).unwrap_or_else(|e| panic!("{e}"));
    assert!(kept(&out.reports[0].saved).is_empty());
}

#[test]
fn an_entry_without_gradients_stays() {
    let text = GATED.replace("loss_scale", "factor");
    let g = parse(&text).unwrap_or_else(|e| panic!("{e}"));
    let out = run_passes(&g, &Pipeline::of(&["recompute"]), &Options::default()).unwrap_or_else(|e| panic!("{e}"));
    assert!(!out.reports[0].changed);
}
