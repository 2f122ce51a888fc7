//! The rules: general algebra of matrix products, sums, scales and of choosing rows and columns.
//!
//! Each is a function from the e-graph to pairs (class, equal term); none knows a method or a model. All hold for
//! transposed operands through the flags of the products. Early rules run to a fixpoint; a late rule fires once on the
//! settled graph. A rule that does not understand a node leaves it alone: products are looked into only when they are
//! matrices of f32 or bf16, sums only where they are f32 and every term has the result's shape.
//!
//! Precision: a rule may choose, join or scale what is rounded to bf16, each of which rounds every element once as before
//! (to a part in 256 of itself). Rules that add, multiply out or reorder work on f32 alone, so no sum is ever rounded to a
//! narrower type than it had, and a small change of a trained value is never lost in a large weight.

mod choose;
mod linear;
mod siblings;
mod sums;

use super::lang::{ENode, Known, Term, View, World};
use egg::Id;
use pleach_ir::{BinaryOp, DType, Dim, Op};

/// What rules found: class, equal term.
pub type Found = Vec<(Id, Term)>;

/// A rule.
#[derive(Clone, Copy)]
pub struct Rule {
    /// Name, kebab-case.
    pub name: &'static str,
    /// Fires once, on the settled graph.
    pub late: bool,
    /// What it says, for people.
    pub about: &'static str,
    /// Reads the e-graph and proposes.
    pub apply: fn(&World, &mut Found),
}

/// Every rule. `rank-epilogue` is no rewrite but a price: a sum of products is one kernel, so the thin product of an
/// adapter costs its arithmetic only.
pub const RULES: &[Rule] = &[
    Rule { name: "mm-assoc", late: false, about: "(p·q)·z = p·(q·z)", apply: linear::assoc },
    Rule { name: "scale-out", late: false, about: "f(s·x) = s·f(x) for linear f", apply: linear::scale_out },
    Rule { name: "scale-in", late: false, about: "s·(x·P) = x·(s·P), s and P parameters", apply: linear::scale_in },
    Rule { name: "factor", late: false, about: "Σ c·(x·W) = x·Σ c·W", apply: sums::factor },
    Rule {
        name: "distribute",
        late: false,
        about: "x·(W + D) = x·W + x·D, base and slot kept apart",
        apply: sums::distribute,
    },
    Rule {
        name: "slices-of-one",
        late: false,
        about: "Σ zᵢ·Wᵢ = z·[W₁;W₂;…], zᵢ the slices of z",
        apply: sums::slices_of_one,
    },
    Rule {
        name: "ranks-concat",
        late: false,
        about: "Σ (x·Aᵢ)·Bᵢ = (x·[A₁ A₂ …])·[B₁;B₂;…]",
        apply: sums::ranks_concat,
    },
    Rule {
        name: "choose-through",
        late: false,
        about: "choosing rows or columns of a result = choosing them earlier",
        apply: choose::choose_through,
    },
    Rule { name: "concat-cancel", late: false, about: "[z[0..a] z[a..b] …] = z[0..b]", apply: choose::concat_cancel },
    Rule { name: "colscale-mm", late: false, about: "(x·W)·diag g = x·(W·diag g)", apply: linear::colscale },
    Rule { name: "rowscale-mm", late: false, about: "(diag g·x)·W = diag g·(x·W)", apply: linear::rowscale },
    Rule {
        name: "scatter-merge",
        late: false,
        about: "x·W + x[:,I]·P = x·(W with P added at I)",
        apply: sums::scatter_merge,
    },
    Rule {
        name: "scatter-unmerge",
        late: false,
        about: "the reverse, base and slot kept apart",
        apply: sums::scatter_unmerge,
    },
    Rule {
        name: "rank-epilogue",
        late: false,
        about: "a sum of products is one kernel (a price, no rewrite)",
        apply: |_, _| {},
    },
    Rule {
        name: "fuse-siblings",
        late: true,
        about: "x·W₁, x·W₂, … = slices of x·[W₁ W₂ …]",
        apply: siblings::fuse_siblings,
    },
];

/// Widest inner dimension of a product that counts as an adapter's rank.
const THIN: u64 = 512;

/// A term of a sum that is a product: coefficient, left view, right view.
type Prod = (Option<Id>, View, View);

fn class(id: Id) -> Term {
    Term::Class(id)
}

fn node(op: Op, ch: Vec<Term>) -> Term {
    Term::Node(op, ch)
}

fn mm(a: (Term, bool), b: (Term, bool)) -> Term {
    node(Op::MatMul { ta: a.1, tb: b.1 }, vec![a.0, b.0])
}

fn mul(a: Term, b: Term) -> Term {
    node(Op::Binary(BinaryOp::Mul), vec![a, b])
}

/// `s·t`, or `t` without a coefficient.
fn with(coef: Option<Id>, t: Term) -> Term {
    match coef {
        Some(s) => mul(class(s), t),
        None => t,
    }
}

/// Every e-node that is an operator, with its class.
fn each(w: &World) -> impl Iterator<Item = (Id, &ENode, &Op)> {
    w.eg.classes().flat_map(|c| c.nodes.iter().filter_map(move |n| Some((c.id, n, n.op()?))))
}

/// A matrix of f32 or bf16.
fn matrix(w: &World, id: Id) -> bool {
    let t = w.ty(id);
    t.rank() == 2 && matches!(t.dtype, DType::F32 | DType::BF16)
}

/// An f32 matrix: what may be added up.
fn wide(w: &World, id: Id) -> bool {
    matrix(w, id) && w.ty(id).dtype == DType::F32
}

/// What the members of a class are roundings of.
fn rounded(w: &World, id: Id) -> impl Iterator<Item = (Id, &Op)> + '_ {
    w.nodes(id).iter().filter_map(|n| n.op().filter(|o| matches!(o, Op::Cast(_))).map(|o| (n.ch[0], o)))
}

/// The product that `n` is, if its operands are matrices.
fn as_product(w: &World, n: &ENode) -> Option<(View, View)> {
    match n.op()? {
        Op::MatMul { ta, tb } if matrix(w, n.ch[0]) && matrix(w, n.ch[1]) => Some(((n.ch[0], *ta), (n.ch[1], *tb))),
        _ => None,
    }
}

/// The products in a class.
fn products(w: &World, id: Id) -> impl Iterator<Item = (View, View)> + '_ {
    w.nodes(id).iter().filter_map(move |n| as_product(w, n))
}

/// `(s, x)` if `n` is a scalar times a tensor, f32.
fn as_scale(w: &World, n: &ENode) -> Option<(Id, Id)> {
    let mul = n.op()? == &Op::Binary(BinaryOp::Mul);
    (mul && w.ty(n.ch[0]).rank() == 0 && w.ty(n.ch[1]).rank() > 0 && w.ty(n.ch[1]).dtype == DType::F32)
        .then(|| (n.ch[0], n.ch[1]))
}

/// `(x, g, axis)` if `n` multiplies axis `axis` of the f32 matrix x by the vector g.
fn as_diag(w: &World, n: &ENode) -> Option<(Id, Id, u8)> {
    if n.op()? != &Op::Binary(BinaryOp::Mul) || !wide(w, n.ch[0]) || !wide(w, n.ch[1]) {
        return None;
    }
    [(0, 1), (1, 0)].into_iter().find_map(|(x, g)| {
        w.nodes(n.ch[g]).iter().find_map(|b| match b.op()? {
            Op::Broadcast { axes, .. } if axes.len() == 1 && w.is_param(b.ch[0]) => Some((n.ch[x], b.ch[0], axes[0])),
            _ => None,
        })
    })
}

/// Axis `axis` of the matrix `x`, of this shape, times the vector g.
fn diag(shape: &[Dim], axis: u8, x: Term, g: Id) -> Term {
    mul(x, node(Op::Broadcast { shape: shape.to_vec(), axes: vec![axis] }, vec![class(g)]))
}

/// Products in a class, with or without a scalar in front.
fn scaled_products(w: &World, id: Id) -> Vec<Prod> {
    let mut v: Vec<Prod> = products(w, id).map(|(a, b)| (None, a, b)).collect();
    for n in w.nodes(id) {
        if let Some((s, x)) = as_scale(w, n) {
            v.extend(products(w, x).map(|(a, b)| (Some(s), a, b)));
        }
    }
    v
}

/// Rows and columns of a view.
fn dims(w: &World, v: View) -> (Dim, Dim) {
    let s = &w.ty(v.0).shape;
    if v.1 { (s[1], s[0]) } else { (s[0], s[1]) }
}

/// A dimension at a nominal count, for guards only.
fn size(d: Dim) -> u64 {
    d.known().unwrap_or(1024)
}

/// An f32 sum whose every term has the result's shape.
fn is_sum(w: &World, id: Id, n: &ENode) -> bool {
    n.op() == Some(&Op::Add) && wide(w, id) && n.ch.iter().all(|&c| w.ty(c).rank() == 2)
}

/// Rewrites the terms of a sum that a group takes; the rest stay. A proper part becomes an inner sum first, so that
/// each group is decided on its own and the variants of the outer sum do not multiply.
fn regroup(id: Id, ch: &[Id], groups: Vec<(Vec<usize>, Term)>, out: &mut Found) {
    if groups.is_empty() {
        return;
    }
    let whole = groups.len() == 1 && groups[0].0.len() == ch.len();
    if whole {
        out.extend(groups.into_iter().map(|g| (id, g.1)));
        return;
    }
    let taken: Vec<usize> = groups.iter().flat_map(|g| g.0.clone()).collect();
    let mut terms: Vec<Term> = (0..ch.len()).filter(|k| !taken.contains(k)).map(|k| class(ch[k])).collect();
    terms.extend(groups.iter().map(|g| node(Op::Add, g.0.iter().map(|&k| class(ch[k])).collect())));
    out.push((id, node(Op::Add, terms)));
}

/// True for what has no name of its own: never put side by side again.
fn is_base_or_slot(k: Known) -> bool {
    matches!(k, Known::Base | Known::Slot)
}
