//! The pass that `docs/write-a-pass.md` writes, whole and tested: |x·x| is x·x.

use pleach_ir::interp::{Tensor, run_entry};
use pleach_ir::text::parse;
use pleach_ir::{BinaryOp, Graph, Op, UnaryOp, ValueId, verify};
use pleach_passes::{Options, PassError, Report};
use std::collections::BTreeMap;

/// `abs-of-square`: the absolute value of a square is the square.
///
/// # Errors
/// [`PassError::Build`] if a node does not type-check, which would be a fault of this pass.
pub fn run(g: &Graph, _: &Options, report: &mut Report) -> Result<Graph, PassError> {
    let mut out = Graph { entries: vec![], ..g.clone() };
    let mut found = 0;
    for e in &g.entries {
        let is_square = |v: ValueId| {
            let n = e.node(v);
            n.op == Op::Binary(BinaryOp::Mul) && n.inputs[0] == n.inputs[1]
        };
        let mut next = e.clone();
        let mut same: Vec<ValueId> = e.values().collect();
        for v in e.values() {
            let n = e.node(v);
            if n.op == Op::Unary(UnaryOp::Abs) && is_square(n.inputs[0]) {
                same[v.index()] = n.inputs[0];
                found += 1;
            }
        }
        for i in next.nodes.iter_mut().flat_map(|n| &mut n.inputs).chain(next.roots.iter_mut().map(|r| &mut r.value)) {
            *i = same[i.index()];
        }
        let next = pleach_passes::canonicalize::compact(&out.params, &next);
        out.entries.push(next.map_err(PassError::build("abs-of-square", &e.name))?);
    }
    report.note = format!("{found} absolute values of squares");
    Ok(out)
}

const FIRES: &str = r#"graph core
entry "infer" {
  %0 = input "x" : f32[T,4]
  %1 = mul(%0, %0) : f32[T,4]
  %2 = abs(%1) : f32[T,4]
  %3 = sqrt(%2) : f32[T,4]
  output "y" %3
}
"#;

/// The output by the reference interpreter.
fn y(g: &Graph) -> Tensor {
    let x = Tensor::f32([2, 4], vec![1.5, -2.0, 0.0, -0.0, f32::INFINITY, -3.25, 1e-30, -1e30]);
    let inputs = BTreeMap::from([("x".to_string(), x)]);
    run_entry(&g.params, &|_| None, &g.entries[0], &inputs).unwrap().outputs.remove("y").unwrap()
}

#[test]
fn it_fires_and_means_the_same() {
    let before = parse(FIRES).unwrap();
    let mut report = Report::default();
    let after = run(&before, &Options::default(), &mut report).unwrap();
    verify::verify(&after).unwrap();
    assert_eq!(report.note, "1 absolute values of squares");
    assert_eq!(after.entries[0].nodes.len(), 3);
    assert_eq!(y(&before), y(&after));
}

#[test]
fn it_leaves_other_products_alone() {
    let text = FIRES.replace("  %1 = mul(%0, %0)", "  %1 = exp(%0)");
    let before = parse(&text).unwrap();
    assert_eq!(run(&before, &Options::default(), &mut Report::default()).unwrap(), before);
}
