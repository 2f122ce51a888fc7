//! The difference of two graphs, node by node.
//!
//! Two nodes are the same line when operator, type and origin agree and their operands do; numbers of values do not count, so
//! a node that moved everything behind it by one is one difference.

use crate::failure::{Failure, Result};
use crate::report;
use pleach_ir::text::{print_node, print_param};
use pleach_ir::{Entry, Graph, ParamId, RootKind, ValueId};
use similar::{Algorithm, ChangeTag, capture_diff_slices};

/// Equal lines shown around a difference.
const CONTEXT: usize = 3;

/// What is compared, and what is shown for it.
#[derive(Clone)]
struct Line {
    key: String,
    text: String,
}

/// Prints the difference, a section per entry.
///
/// # Errors
/// Exit code 1 with the counts if there is one.
pub(super) fn diff(a: &Graph, b: &Graph) -> Result<()> {
    let params = |g: &Graph| -> Vec<Line> {
        let text = |(i, p): (usize, &pleach_ir::Param)| print_param(ParamId(i as u32), p);
        let key = |p: &pleach_ir::Param| format!("{} {:?} {:?} {:?}", p.name, p.ty, p.role, p.source);
        g.params.iter().enumerate().map(|x| Line { key: key(x.1), text: text(x) }).collect()
    };
    let mut counts = [0, 0];
    section("parameters", &params(a), &params(b), &mut counts);
    let mut names: Vec<&str> = a.entries.iter().map(|e| e.name.as_str()).collect();
    names.extend(b.entries.iter().map(|e| e.name.as_str()).filter(|n| a.entry(n).is_none()));
    for name in names {
        let lines = |g: &Graph| g.entry(name).map_or(vec![], |e| lines(g, e));
        section(&format!("entry \"{name}\""), &lines(a), &lines(b), &mut counts);
    }
    match counts {
        [0, 0] => Ok(()),
        [gone, come] => {
            Err(Failure::new(format!("the graphs differ: {gone} lines only in the first, {come} only in the second")))
        }
    }
}

/// Nodes and roots of an entry.
fn lines(g: &Graph, e: &Entry) -> Vec<Line> {
    let own = |v: ValueId| {
        let n = e.node(v);
        let param = match n.op {
            pleach_ir::Op::Param(p) => g.params[p.index()].name.as_str(),
            _ => "",
        };
        let op = if param.is_empty() { format!("{:?}", n.op) } else { "param".into() };
        format!("{op} {param} {:?} {:?}", n.ty, n.origin)
    };
    let mut out: Vec<Line> = e
        .values()
        .map(|v| {
            let operands: Vec<String> = e.node(v).inputs.iter().map(|i| own(*i)).collect();
            Line { key: format!("{} ({})", own(v), operands.join(", ")), text: print_node(v, e.node(v)) }
        })
        .collect();
    out.extend(e.roots.iter().map(|r| {
        let kind = match &r.kind {
            RootKind::Output(name) => format!("output {name:?}"),
            RootKind::Assign(p) => format!("assign {}", g.params[p.index()].name),
        };
        Line { key: format!("{kind} {}", own(r.value)), text: format!("{kind} {}", r.value) }
    }));
    out
}

/// Prints one section if it has a difference.
fn section(title: &str, a: &[Line], b: &[Line], counts: &mut [usize; 2]) {
    let keys = |x: &[Line]| x.iter().map(|l| l.key.clone()).collect::<Vec<_>>();
    let ops = capture_diff_slices(Algorithm::Myers, &keys(a), &keys(b));
    let marks: Vec<(ChangeTag, String)> =
        ops.iter().flat_map(|op| op.iter_changes(a, b).map(|c| (c.tag(), c.value().text))).collect();
    let changed: Vec<usize> = (0..marks.len()).filter(|i| marks[*i].0 != ChangeTag::Equal).collect();
    if changed.is_empty() {
        return;
    }
    report::line(&format!("@@ {title}"));
    let mut last = None;
    for (i, (tag, text)) in marks.iter().enumerate() {
        let near = changed.partition_point(|c| *c + CONTEXT < i);
        if changed.get(near).is_none_or(|c| c.saturating_sub(CONTEXT) > i) {
            continue;
        }
        if last.is_some_and(|l| l + 1 != i) {
            report::line("…");
        }
        last = Some(i);
        let mark = match tag {
            ChangeTag::Delete => '-',
            ChangeTag::Insert => '+',
            ChangeTag::Equal => ' ',
        };
        counts[0] += usize::from(*tag == ChangeTag::Delete);
        counts[1] += usize::from(*tag == ChangeTag::Insert);
        report::line(&format!("{mark} {}", text.trim()));
    }
}
