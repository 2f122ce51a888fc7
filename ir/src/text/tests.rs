//! Round trip, exact constants, and errors that say where and what.

use super::*;
use crate::error::IrError;
use crate::graph::{Entry, Graph, Node};
use crate::op::Op;
use crate::types::{DType, TensorType};
use crate::verify;

/// Every operator and every form of a parameter.
const ALL: &str = r#"graph imported
param @0 "w" f32[8,8] frozen checkpoint("model.\"w\"")
param @1 "slot0.w.lora_A" f32[4,8] train adapter(0, "w.lora_A")
param @2 "cache" f32[C,8] state zeros
param @3 "merged \u{7}\n" bf16[8] index derived
entry "infer" {
  %0 = input "x" : f32[T,8]
  %1 = param @0 : f32[8,8]
  %2 = const 1e-5 : f32[]
  %3 = const [1, 0, 1] : bool[3]
  %4 = iota {axis = 0} : i32[T]
  %5 = matmul(%0, %1) {tb} : f32[T,8] from "model.layers.0"
  %6 = rsqrt(%5) : f32[T,8]
  %7 = sub(%5, %2) : f32[T,8]
  %8 = add(%5, %6, %7) : f32[T,8]
  %9 = lt(%5, %6) : bool[T,8]
  %10 = select(%9, %8, %2) : f32[T,8]
  %11 = cast(%10) : bf16[T,8]
  %12 = reduce_max(%10) {axis = 1} : f32[T]
  %13 = reshape(%10) : f32[T,2,4]
  %14 = transpose(%13) {perm = [1, 0, 2]} : f32[2,T,4]
  %15 = broadcast(%12) {axes = [0]} : f32[T,8]
  %16 = slice(%15) {axis = 1, start = 2, end = 6} : f32[T,4]
  %17 = pad(%16) {axis = 1, lo = 1, hi = 3} : f32[T,8]
  %18 = concat(%17, %17) {axis = 1} : f32[T,16]
  %19 = gather(%17, %4) {axis = 0} : f32[T,8]
  %20 = param @2 : f32[C,8]
  %21 = scatter_set(%20, %4, %19) {axis = 0} : f32[C,8]
  %22 = scatter_add(%20, %4, %19) {axis = 0} : f32[C,8]
  %23 = input "s" : i32[S1]
  %24 = input "k" : i32[S]
  %25 = attention(%19, %21, %22, %23, %24, %24) {heads = 4, kv_heads = 4, head_dim = 2, scale = 0.125, causal, window = 4} : f32[T,8]
  %26 = stop_gradient(%25) : f32[T,8]
  %27 = matmul(%1, %1) {ta, tb} : f32[8,8]
  %28 = after(%0, %27) : f32[T,8]
  %29 = attention_lse(%0, %0, %23, %24, %24) {heads = 4, kv_heads = 4, head_dim = 2, scale = 0.125, causal} : f32[T,4]
  %30 = attention_grad_q(%0, %0, %0, %25, %29, %28, %23, %24, %24) {heads = 4, kv_heads = 4, head_dim = 2, scale = 0.125, causal} : f32[T,8]
  %31 = attention_grad_k(%0, %21, %21, %25, %29, %28, %23, %24, %24) {heads = 4, kv_heads = 4, head_dim = 2, scale = 0.125} : f32[C,8]
  %32 = attention_grad_v(%0, %21, %21, %25, %29, %28, %23, %24, %24) {heads = 4, kv_heads = 4, head_dim = 2, scale = 0.125} : f32[C,8]
  output "y \\" %26
  assign @2 %21
}
entry "empty" {
}
"#;

#[test]
fn every_operator_round_trips() {
    let g = parse(ALL).unwrap();
    assert_eq!(print(&g), ALL);
    assert_eq!(parse(&print(&g)).unwrap(), g);
    verify::verify(&g).unwrap();
}

#[test]
fn constants_are_exact() {
    let values = [
        0u32,
        0x8000_0000,
        1,
        0x3f80_0000,
        0x3eaa_aaab,
        0x7f7f_ffff,
        0x7f80_0000,
        0x7fc0_0001,
        0xffff_ffff,
        0x0080_0000,
    ];
    let mut g = Graph::default();
    let mut e = Entry::new("e");
    for (dtype, mask) in
        [(DType::F32, u32::MAX), (DType::I32, u32::MAX), (DType::BF16, 0xffff), (DType::F16, 0xffff), (DType::Bool, 1)]
    {
        let bits: Vec<u32> = values.iter().map(|v| v & mask).chain([0x3c01 & mask, 0x7c01 & mask]).collect();
        e.push(&[], Op::Const { dtype, shape: vec![bits.len() as u64], bits }, &[]).unwrap();
    }
    g.entries.push(e);
    assert_eq!(parse(&print(&g)).unwrap(), g);
}

fn fault(text: &str) -> (usize, usize, String) {
    match parse(text) {
        Err(IrError::Parse { line, column, why }) => (line, column, why),
        other => panic!("{other:?}"),
    }
}

#[test]
fn errors_say_where_and_what() {
    let head = "graph core\nentry \"e\" {\n  %0 = input \"x\" : f32[T,8]\n";
    for (tail, line, column, why) in [
        ("  %2 = exp(%0) : f32[T,8]\n}", 4, 3, "expected %1"),
        ("  %1 = exp(%1) : f32[T,8]\n}", 4, 12, "%1 is not defined"),
        ("  %1 = exq(%0) : f32[T,8]\n}", 4, 8, "no operator 'exq'"),
        ("  %1 = exp(%0) : f32[T,9]\n}", 4, 8, "exp gives f32[T,8], but f32[T,9] is written"),
        ("  %1 = exp(%0, %0) : f32[T,8]\n}", 4, 8, "takes 1 operands"),
        ("  %1 = exp(%0) {axis = 1} : f32[T,8]\n}", 4, 8, "no attribute axis"),
        ("  %1 = reduce_sum(%0) : f32[T]\n}", 4, 8, "expected the attribute axis"),
        ("  %1 = exp(%0) : f64[T,8]\n}", 4, 18, "element type"),
        ("  %1 = exp(%0) : f32[T,99999999999999999999]\n}", 4, 24, "dimension"),
        ("  %1 = const 1e99 : f32[]\n}", 4, 8, "1e99 is no f32"),
        ("  %1 = const 0x1ffffffff : f32[]\n}", 4, 8, "is no f32"),
        ("  %99999999999 = exp(%0)", 4, 3, "number after '%'"),
        ("  output \"y\" %1\n}", 4, 14, "%1 is not defined"),
        ("  output \"y %0\n}", 4, 10, "no closing quote"),
        ("  assign @0 %0\n}", 4, 10, "no parameter @0"),
        ("  %1 = param @7 : f32[2]\n}", 4, 8, "no parameter @7"),
        ("", 4, 1, "found the end of the text"),
        ("}\nfoo", 5, 1, "expected 'param' or 'entry', found 'foo'"),
    ] {
        let got = fault(&format!("{head}{tail}"));
        assert_eq!((got.0, got.1), (line, column), "{tail}: {got:?}");
        assert!(got.2.contains(why), "{tail}: {}", got.2);
    }
    assert!(fault("").2.contains("expected 'graph'"));
    assert!(fault("graph core param @1").2.contains("expected @0"));
}

#[test]
fn large_numbers_in_shapes_cost_nothing() {
    let big = format!("graph core entry \"e\" {{ %0 = input \"x\" : f32[{0},{0},T] }}", u64::MAX);
    let g = parse(&big).unwrap();
    assert_eq!(parse(&print(&g)).unwrap(), g);
    let big = "graph core entry \"e\" { %0 = input \"x\" : f32[9999999999,9999999999] %1 = reshape(%0) : f32[7] }";
    assert!(fault(big).2.contains("64 bits"));
    assert!(fault("graph core entry \"e\" { %0 = const [1] : f32[999999999999] }").2.contains("number of elements"));
    let many = format!("graph core entry \"e\" {{ %0 = const [{}0] : f32[1] }}", "0,".repeat(70000));
    assert!(fault(&many).2.contains("at most 65536"));
}

#[test]
fn no_cut_of_a_text_panics() {
    for i in (0..ALL.len()).filter(|i| ALL.is_char_boundary(*i)) {
        let _ = parse(&ALL[..i]);
        let _ = parse(&ALL[i..]);
        let _ = parse(&format!("graph core\n{}", &ALL[i..]));
    }
}

#[test]
fn verifier_reports_all_faults_under_their_lines() {
    let mut g = parse(ALL).unwrap();
    let ty = TensorType::new(DType::F32, [1u64]);
    let e = &mut g.entries[0];
    e.nodes[6].ty = ty.clone();
    e.nodes[3] =
        Node { op: Op::Const { dtype: DType::Bool, shape: vec![3], bits: vec![0, 1, 2] }, ..e.nodes[3].clone() };
    e.nodes[5].inputs[0] = crate::ValueId(9);
    e.assign(crate::ParamId(2), crate::ValueId(0));
    e.assign(crate::ParamId(0), crate::ValueId(27));
    e.output("y \\", crate::ValueId(99));
    g.params[1].name = "w".into();
    g.entries[1].name = "infer".into();
    g.phase = crate::Phase::Core;
    let IrError::Verify(text) = verify::verify(&g).unwrap_err() else { panic!() };
    for want in [
        "the graph breaks 13 rules\n",
        "param @1 \"w\" f32[4,8] train adapter(0, \"w.lora_A\")\n    error: a second parameter is called \"w\"\n",
        "entry \"infer\" {\n  %3 = const [0, 1, 0x2] : bool[3]\n    error: an element has bits outside bool\n",
        "entry \"infer\" {\n    error: a second entry is called \"infer\"",
    ] {
        assert!(text.contains(want), "{want}\n in {text}");
    }
    for why in [
        "%9 is not defined before this",
        "the operator gives f32[T,8], the node says f32[1]",
        "@2 is assigned a second time",
        "@2 is f32[C,8], the value is f32[T,8]",
        "@0 is frozen and not derived",
        "a second output is called \"y \\\"",
        "%99 does not exist",
        "stop_gradient is not legal in phase core",
    ] {
        assert!(text.contains(why), "{why}\n in {text}");
    }
    assert_eq!(verify::annotate(&g).matches("// error: ").count(), verify::faults(&g).len());
}
