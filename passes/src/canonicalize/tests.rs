//! Canonical forms, one family of identities at a time; a second run changes nothing.

use super::*;
use crate::manager::{Pipeline, run as run_passes};
use pleach_ir::text::{parse, print};

fn canon(text: &str) -> String {
    let g = parse(text).unwrap();
    let out = run_passes(&g, &Pipeline::of(&["canonicalize"]), &Options::default()).unwrap();
    let again = run_passes(&out.graph, &Pipeline::of(&["canonicalize"]), &Options::default()).unwrap();
    assert!(!again.reports[0].changed, "not settled:\n{}\n{}", print(&out.graph), print(&again.graph));
    print(&out.graph)
}

fn lines(text: &str) -> Vec<String> {
    canon(text).lines().filter(|l| l.trim_start().starts_with('%')).map(|l| l.trim().to_string()).collect()
}

#[test]
fn identities_vanish() {
    let l = lines(
        r#"graph imported
entry "infer" {
  %0 = input "x" : f32[T,4]
  %1 = const 1.0 : f32[]
  %2 = mul(%0, %1) : f32[T,4]
  %3 = stop_gradient(%2) : f32[T,4]
  %4 = neg(%3) : f32[T,4]
  %5 = neg(%4) : f32[T,4]
  %6 = reshape(%5) : f32[T,4]
  %7 = slice(%6) {axis = 1, start = 0, end = 4} : f32[T,4]
  %8 = const 0.0 : f32[]
  %9 = broadcast(%8) {axes = []} : f32[T,4]
  %10 = add(%7, %9) : f32[T,4]
  %11 = transpose(%10) {perm = [1, 0]} : f32[4,T]
  %12 = transpose(%11) {perm = [1, 0]} : f32[T,4]
  %13 = cast(%12) : f32[T,4]
  %14 = exp(%13) : f32[T,4]
  output "y" %14
}
"#,
    );
    assert_eq!(l.len(), 2, "{l:?}");
    assert_eq!(l[1], "%1 = exp(%0) : f32[T,4]");
}

#[test]
fn what_is_spread_is_computed_before() {
    let l = lines(
        r#"graph imported
entry "infer" {
  %0 = input "mean" : f32[T]
  %1 = input "x" : f32[T,4]
  %2 = const 0.5 : f32[]
  %3 = broadcast(%0) {axes = [0]} : f32[T,4]
  %4 = broadcast(%2) {axes = []} : f32[T,4]
  %5 = add(%3, %4) : f32[T,4]
  %6 = rsqrt(%5) : f32[T,4]
  %7 = mul(%1, %6) : f32[T,4]
  %8 = input "g" : f32[4]
  %9 = broadcast(%8) {axes = [1]} : f32[T,4]
  %10 = mul(%9, %6) : f32[T,4]
  %11 = add(%7, %10) : f32[T,4]
  output "y" %11
}
"#,
    );
    assert_eq!(
        l[3..6],
        ["%3 = add(%0, %2) : f32[T]", "%4 = rsqrt(%3) : f32[T]", "%5 = broadcast(%4) {axes = [0]} : f32[T,4]"]
    );
    // What is spread in two ways is not of one shape before.
    assert!(l.contains(&"%9 = mul(%5, %8) : f32[T,4]".to_string()), "{l:?}");
}

#[test]
fn sums_become_flat_and_sorted_only_under_one_reader() {
    let l = lines(
        r#"graph imported
entry "infer" {
  %0 = input "a" : f32[T,4]
  %1 = input "b" : f32[T,4]
  %2 = input "c" : f32[T,4]
  %3 = add(%2, %1) : f32[T,4]
  %4 = add(%3, %0) : f32[T,4]
  %5 = add(%4, %4) : f32[T,4]
  output "y" %5
}
"#,
    );
    assert_eq!(l[3..], ["%3 = add(%0, %1, %2) : f32[T,4]", "%4 = add(%3, %3) : f32[T,4]"]);
}

#[test]
fn equal_and_dead_nodes_go_inputs_stay() {
    let l = lines(
        r#"graph imported
entry "infer" {
  %0 = input "a" : f32[T,4]
  %1 = input "unused" : f32[T,4]
  %2 = exp(%0) : f32[T,4]
  %3 = exp(%0) : f32[T,4]
  %4 = sin(%1) : f32[T,4]
  %5 = mul(%3, %2) : f32[T,4]
  output "y" %5
}
"#,
    );
    assert_eq!(l.len(), 4, "{l:?}");
    assert_eq!(l[3], "%3 = mul(%2, %2) : f32[T,4]");
}

#[test]
fn transposes_become_flags_and_slices_compose() {
    let l = lines(
        r#"graph imported
param @0 "w" f32[8,4] frozen checkpoint("w")
entry "infer" {
  %0 = input "x" : f32[T,4]
  %1 = param @0 : f32[8,4]
  %2 = transpose(%1) {perm = [1, 0]} : f32[4,8]
  %3 = matmul(%0, %2) : f32[T,8]
  %4 = slice(%3) {axis = 1, start = 2, end = 8} : f32[T,6]
  %5 = slice(%4) {axis = 1, start = 0, end = 3} : f32[T,3]
  %6 = slice(%4) {axis = 1, start = 3, end = 6} : f32[T,3]
  %7 = concat(%5, %6) {axis = 1} : f32[T,6]
  output "y" %7
}
"#,
    );
    assert_eq!(l.len(), 4, "{l:?}");
    assert_eq!(l[2], "%2 = matmul(%0, %1) {tb} : f32[T,8]");
    assert_eq!(l[3], "%3 = slice(%2) {axis = 1, start = 2, end = 8} : f32[T,6]");
}

#[test]
fn tiny_constants_fold_and_library_functions_do_not() {
    let l = lines(
        r#"graph imported
entry "infer" {
  %0 = input "x" : f32[T,4]
  %1 = const 3.0 : f32[]
  %2 = const 4.0 : f32[]
  %3 = mul(%1, %2) : f32[]
  %4 = exp(%1) : f32[]
  %5 = mul(%0, %3) : f32[T,4]
  %6 = mul(%4, %5) : f32[T,4]
  output "y" %6
}
"#,
    );
    assert!(l.iter().any(|l| l.contains("const 12")), "{l:?}");
    assert!(l.iter().any(|l| l.contains("exp(")), "{l:?}");
}

#[test]
fn multiplication_by_zero_is_kept() {
    let l = lines(
        r#"graph imported
entry "infer" {
  %0 = input "x" : f32[T,4]
  %1 = const 0.0 : f32[]
  %2 = mul(%1, %0) : f32[T,4]
  output "y" %2
}
"#,
    );
    assert_eq!(l.len(), 3, "{l:?}");
}
