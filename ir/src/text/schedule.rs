//! Prints kernels and schedules, for people and golden files.

use super::print::{join, print_entry, print_param, quote};
use crate::graph::ParamId;
use crate::schedule::{BufferId, BufferKind, Class, Kernel, Layout, Schedule, ScheduledEntry};

/// A layout in words.
pub fn print_layout(l: &Layout) -> String {
    match l {
        Layout::RowMajor => "row".into(),
        Layout::Panels { nr, transposed: false } => format!("panels({nr})"),
        Layout::Panels { nr, transposed: true } => format!("panels({nr}, t)"),
        Layout::Blocks(format) => format!("blocks({})", format.name()),
        Layout::CodedPanels { nr, format } => format!("panels({nr}, t, {})", format.name()),
    }
}

fn class_name(c: Class) -> &'static str {
    match c {
        Class::Row => "row",
        Class::Contraction => "contraction",
        Class::Attention => "attention",
        Class::Scatter => "scatter",
    }
}

fn layouts(of: &str, l: &[Layout]) -> Option<String> {
    // Row-major everywhere is the rule and goes without saying.
    let all: Vec<String> = l.iter().map(print_layout).collect();
    l.iter().any(|l| *l != Layout::RowMajor).then(|| format!("  {of} {}", all.join(", ")))
}

/// A kernel: class, layouts that are not row-major, results in place, and the body.
pub fn print_kernel(k: &Kernel) -> String {
    let body = print_entry(&k.body);
    let inside = body.lines().skip(1).map(str::to_string);
    let mut head = vec![format!("kernel {} {} {{", k.name, class_name(k.class))];
    head.extend(layouts("operands", &k.operands));
    head.extend(layouts("results", &k.results));
    let in_place = k.aliases.iter().enumerate().filter_map(|(i, a)| Some(format!("  in place r{i} over a{}", (*a)?)));
    head.extend(in_place);
    join(head.into_iter().chain(inside))
}

/// A schedule: parameters with layouts, kernels, and the launches of each entry over its buffers.
pub fn print_schedule(s: &Schedule) -> String {
    let mut out = vec!["schedule".to_string()];
    for (i, (p, l)) in s.params.iter().enumerate() {
        out.push(format!("{} {}", print_param(ParamId(i as u32), p), print_layout(l)));
    }
    let mut text = join(out.into_iter());
    for k in &s.kernels {
        text.push_str(&print_kernel(k));
    }
    for e in &s.entries {
        text.push_str(&join(entry(s, e).into_iter()));
    }
    text
}

fn entry(s: &Schedule, e: &ScheduledEntry) -> Vec<String> {
    let mut out = vec![format!("entry {} {{", quote(&e.name))];
    for (i, b) in e.buffers.iter().enumerate() {
        let kind = match &b.kind {
            BufferKind::Input(n) => format!("input {}", quote(n)),
            BufferKind::Param(p) => format!("param {p}"),
            BufferKind::Arena => "arena".into(),
            BufferKind::Output(n) => format!("output {}", quote(n)),
        };
        let layout = if b.layout == Layout::RowMajor { String::new() } else { format!(" {}", print_layout(&b.layout)) };
        out.push(format!("  #{i} {kind} : {}{layout}", b.ty));
    }
    let ids = |v: &[BufferId]| v.iter().map(|b| format!("#{}", b.0)).collect::<Vec<_>>().join(", ");
    for (i, st) in e.steps.iter().enumerate() {
        for l in e.loops.iter().filter(|l| l.last == i) {
            out.push(format!("  end {}", l.symbol));
        }
        for l in e.loops.iter().filter(|l| l.first == i) {
            out.push(format!("  for {} rows of {}", l.chunk, l.symbol));
        }
        let name = s.kernels.get(st.kernel.0 as usize).map_or("?", |k| &k.name);
        let origin = st.origin.as_ref().map_or(String::new(), |o| format!(" from {}", quote(o)));
        let after = if st.after.is_empty() { String::new() } else { format!(" after {}", ids(&st.after)) };
        out.push(format!("  {} = {name}({}){after}{origin}", ids(&st.writes), ids(&st.reads)));
    }
    for l in e.loops.iter().filter(|l| l.last == e.steps.len()) {
        out.push(format!("  end {}", l.symbol));
    }
    for (name, b, ty) in &e.outputs {
        out.push(format!("  output {} #{} : {ty}", quote(name), b.0));
    }
    out.push("}".into());
    out
}
