//! Prints graphs, line by line, so that a fault can be shown under its line.

use crate::graph::{Entry, Graph, Node, Param, ParamId, Phase, Role, Root, RootKind, Source, ValueId};
use crate::interp::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use crate::op::Op;
use crate::types::DType;
use std::fmt;
use std::fmt::Write;

/// What a line of the printed graph shows. Entries, nodes and roots are given by position.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Place {
    /// The first line.
    Graph,
    /// A parameter.
    Param(usize),
    /// The line that opens an entry.
    Entry(usize),
    /// A node of an entry.
    Node(usize, usize),
    /// A root of an entry.
    Root(usize, usize),
    /// The line that closes an entry.
    End(usize),
}

/// The graph as text.
pub fn print(g: &Graph) -> String {
    join(lines(g).into_iter().map(|(_, l)| l))
}

impl fmt::Display for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&print(self))
    }
}

/// One entry as text.
pub fn print_entry(e: &Entry) -> String {
    join(entry_lines(0, e).into_iter().map(|(_, l)| l))
}

pub(super) fn join(lines: impl Iterator<Item = String>) -> String {
    lines.fold(String::new(), |mut s, l| {
        s.push_str(&l);
        s.push('\n');
        s
    })
}

/// The lines of the printed graph, each with what it shows.
pub fn lines(g: &Graph) -> Vec<(Place, String)> {
    let phase = match g.phase {
        Phase::Imported => "imported",
        Phase::Core => "core",
    };
    let mut out = vec![(Place::Graph, format!("graph {phase}"))];
    for (i, p) in g.params.iter().enumerate() {
        out.push((Place::Param(i), print_param(ParamId(i as u32), p)));
    }
    for (i, e) in g.entries.iter().enumerate() {
        out.extend(entry_lines(i, e));
    }
    out
}

fn entry_lines(i: usize, e: &Entry) -> Vec<(Place, String)> {
    let mut out = vec![(Place::Entry(i), format!("entry {} {{", quote(&e.name)))];
    for (n, node) in e.nodes.iter().enumerate() {
        out.push((Place::Node(i, n), format!("  {}", print_node(ValueId(n as u32), node))));
    }
    for (r, root) in e.roots.iter().enumerate() {
        out.push((Place::Root(i, r), format!("  {}", print_root(root))));
    }
    out.push((Place::End(i), "}".into()));
    out
}

/// A parameter's line.
pub fn print_param(id: ParamId, p: &Param) -> String {
    let role = Role::ALL.iter().find(|(r, _)| *r == p.role).map_or("frozen", |x| x.1);
    let source = match &p.source {
        Source::Checkpoint(name) => format!("checkpoint({})", quote(name)),
        Source::Adapter { slot, key } => format!("adapter({slot}, {})", quote(key)),
        Source::Derived => "derived".into(),
        Source::Zeros => "zeros".into(),
    };
    format!("param {id} {} {} {role} {source}", quote(&p.name), p.ty)
}

fn print_root(r: &Root) -> String {
    match &r.kind {
        RootKind::Output(name) => format!("output {} {}", quote(name), r.value),
        RootKind::Assign(p) => format!("assign {p} {}", r.value),
    }
}

/// A node's line, without indentation.
pub fn print_node(v: ValueId, n: &Node) -> String {
    let mut s = format!("{v} = {}", n.op.name());
    if !n.inputs.is_empty() || !n.op.is_leaf() {
        let ids: Vec<String> = n.inputs.iter().map(ValueId::to_string).collect();
        let _ = write!(s, "({})", ids.join(", "));
    }
    s.push_str(&print_attributes(&n.op));
    let _ = write!(s, " : {}", n.ty);
    if let Some(o) = &n.origin {
        let _ = write!(s, " from {}", quote(o));
    }
    s
}

/// What an operator's line holds besides its operands and type, with the space before it; empty where there is nothing.
pub fn print_attributes(op: &Op) -> String {
    match op {
        Op::Input { name, .. } => format!(" {}", quote(name)),
        Op::Param(p) => format!(" {p}"),
        Op::Const { dtype, shape, bits } => {
            let all: Vec<String> = bits.iter().map(|b| number(*dtype, *b)).collect();
            match (shape.is_empty(), all.as_slice()) {
                (true, [one]) => format!(" {one}"),
                _ => format!(" [{}]", all.join(", ")),
            }
        }
        Op::Iota { axis, .. } | Op::Reduce { axis, .. } | Op::Concat { axis } => format!(" {{axis = {axis}}}"),
        Op::TopK { k, .. } => format!(" {{k = {k}}}"),
        Op::Gather { axis } | Op::Scatter { axis, .. } => format!(" {{axis = {axis}}}"),
        Op::MatMul { ta, tb } => match (ta, tb) {
            (false, false) => String::new(),
            (true, false) => " {ta}".into(),
            (false, true) => " {tb}".into(),
            (true, true) => " {ta, tb}".into(),
        },
        Op::Transpose(perm) => format!(" {{perm = {perm:?}}}"),
        Op::Broadcast { axes, .. } => format!(" {{axes = {axes:?}}}"),
        Op::Slice { axis, start, end } => format!(" {{axis = {axis}, start = {start}, end = {end}}}"),
        Op::Pad { axis, lo, hi } => format!(" {{axis = {axis}, lo = {lo}, hi = {hi}}}"),
        Op::Attention(a) | Op::AttentionLse(a) | Op::AttentionGrad { attrs: a, .. } => {
            let causal = if a.causal { ", causal" } else { "" };
            let window = a.window.map_or(String::new(), |w| format!(", window = {w}"));
            let scale = number(DType::F32, a.scale);
            let (h, kv, d) = (a.heads, a.kv_heads, a.head_dim);
            format!(" {{heads = {h}, kv_heads = {kv}, head_dim = {d}, scale = {scale}{causal}{window}}}")
        }
        Op::Unary(_) | Op::Binary(_) | Op::Add | Op::Select | Op::Cast(_) | Op::Reshape(_) => String::new(),
        Op::After | Op::StopGradient => String::new(),
    }
}

/// The value that a decimal number gives as the bits of an element, if it is one.
pub(super) fn decimal(dtype: DType, text: &str) -> Option<u32> {
    let float = || text.parse::<f32>().ok().filter(|x| x.is_finite());
    match dtype {
        DType::F32 => float().map(f32::to_bits),
        DType::BF16 => float().map(|x| u32::from(f32_to_bf16(x))),
        DType::F16 => float().map(|x| u32::from(f32_to_f16(x))),
        DType::I32 => text.parse::<i32>().ok().map(|x| x as u32),
        DType::Bool => text.parse::<u32>().ok().filter(|x| *x < 2),
    }
}

/// One element of a constant: decimal where that is exact, else its bits.
pub(super) fn number(dtype: DType, bits: u32) -> String {
    let text = match dtype {
        DType::F32 => format!("{:?}", f32::from_bits(bits)),
        DType::BF16 => format!("{:?}", bf16_to_f32(bits as u16)),
        DType::F16 => format!("{:?}", f16_to_f32(bits as u16)),
        DType::I32 => (bits as i32).to_string(),
        DType::Bool => bits.to_string(),
    };
    if decimal(dtype, &text) == Some(bits) { text } else { format!("{bits:#x}") }
}

/// A string in quotes, as the reader takes it back.
pub fn quote(s: &str) -> String {
    let mut out = String::with_capacity(s.len() + 2);
    out.push('"');
    for c in s.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            '\n' => out.push_str("\\n"),
            c if c.is_control() => {
                let _ = write!(out, "\\u{{{:x}}}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}
