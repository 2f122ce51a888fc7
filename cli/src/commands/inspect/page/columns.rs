//! Compact JSON: strings once, numbers in columns.

use pleach_ir::text::print_attributes;
use pleach_ir::{Entry, Graph, Op, RootKind, Sym, TensorType, ValueId};
use serde_json::{Value, json};
use std::collections::HashMap;

/// Strings by number, each once.
#[derive(Default)]
pub(super) struct Strings {
    list: Vec<String>,
    number: HashMap<String, usize>,
}

impl Strings {
    /// The number of a string.
    pub(super) fn id(&mut self, s: &str) -> usize {
        if let Some(i) = self.number.get(s) {
            return *i;
        }
        self.list.push(s.to_string());
        self.number.insert(s.to_string(), self.list.len() - 1);
        self.list.len() - 1
    }

    /// All strings, in the order of their numbers.
    pub(super) fn into_json(self) -> Value {
        self.list.into()
    }
}

/// Values of the symbols.
pub(super) type Env<'a> = &'a dyn Fn(Sym) -> Option<u64>;

/// An entry of a graph. Inputs are distances back, so that equal layers give equal columns; an operator is its name and,
/// after a tab, its attributes as the text form prints them.
fn entry(e: &Entry, strings: &mut Strings, env: Env<'_>) -> Value {
    let (mut op, mut ty, mut origin, mut arity, mut inputs, mut work) =
        (vec![], vec![], vec![], vec![], vec![], vec![]);
    for v in e.values() {
        let n = e.node(v);
        op.push(strings.id(&format!("{}\t{}", n.op.name(), print_attributes(&n.op).trim_start())));
        ty.push(strings.id(&n.ty.to_string()));
        origin.push(strings.id(n.origin.as_deref().unwrap_or_default()));
        arity.push(n.inputs.len());
        inputs.extend(n.inputs.iter().map(|i| v.0 - i.0));
        work.push(operations(e, v, env));
    }
    let roots: Vec<Value> = e
        .roots
        .iter()
        .map(|r| match &r.kind {
            RootKind::Output(name) => json!([r.value.0, name]),
            RootKind::Assign(p) => json!([r.value.0, p.0]),
        })
        .collect();
    json!({
        "name": e.name, "op": op, "ty": ty, "from": origin, "arity": arity, "in": inputs, "flops": work, "roots": roots,
    })
}

/// The entries of a graph; one that equals an entry of the graph before is named only.
pub(super) fn entries(g: &Graph, before: Option<&Graph>, strings: &mut Strings, env: Env<'_>) -> Value {
    let one = |e: &Entry| match before.and_then(|b| b.entry(&e.name)) {
        Some(old) if old == e => json!({"name": e.name, "same": true}),
        _ => entry(e, strings, env),
    };
    g.entries.iter().map(one).collect::<Vec<_>>().into()
}

/// Floating-point operations of a node: a product's multiplications and additions, attention's products of scores and values
/// (each gradient about one and a half of them), else one for an element computed.
fn operations(e: &Entry, v: ValueId, env: Env<'_>) -> u64 {
    let n = e.node(v);
    let elements = |t: &TensorType| t.elements(env).unwrap_or(0);
    let dim = |t: &TensorType, i: usize| t.shape.get(i).and_then(|d| d.eval(env)).unwrap_or(1);
    match &n.op {
        Op::MatMul { ta, .. } => {
            let a = e.ty(n.inputs[0]);
            let inner = dim(a, if *ta { a.rank() - 2 } else { a.rank() - 1 });
            elements(&n.ty).saturating_mul(2 * inner)
        }
        Op::Attention(a) | Op::AttentionLse(a) | Op::AttentionGrad { attrs: a, .. } => {
            let (q, k) = (e.ty(n.inputs[0]), e.ty(n.inputs[1]));
            let pairs = dim(q, 0).saturating_mul(dim(k, 0)) / if a.causal { 2 } else { 1 };
            let products = match n.op {
                Op::Attention(_) => 4,
                Op::AttentionLse(_) => 2,
                _ => 3,
            };
            pairs.saturating_mul(u64::from(a.heads) * u64::from(a.head_dim) * products)
        }
        Op::Reduce { .. } => elements(e.ty(n.inputs[0])),
        Op::Add => elements(&n.ty).saturating_mul(n.inputs.len().saturating_sub(1) as u64),
        Op::Unary(_) | Op::Binary(_) | Op::Select => elements(&n.ty),
        _ => 0,
    }
}
