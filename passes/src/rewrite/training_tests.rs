//! Rewriting an entry that computes gradients: what each way to train a linear layer reads and keeps, that every rule is
//! true on numbers there as well, and what the search misses of the best choice.

use super::tests::check_classes;
use super::*;
use crate::manager::{Pipeline, run as run_passes};
use crate::recompute::{Saved, saved};
use crate::testing::{Build, same_results};
use pleach_ir::text::print;
use pleach_ir::{
    AttentionAttrs, DType, Dim, Param, ReduceOp, Role, RootKind, ScatterMode, Source, Sym, TensorType, UnaryOp,
};

/// How a linear layer is trained, as the frontends write it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Way {
    /// y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ.
    LowRank,
    /// y = x·(W + s·B·A)ᵀ.
    LowRankMerged,
    /// y = g ∘ (x·Wᵀ + s·(x·Aᵀ)·Bᵀ), g = m / ‖W + s·B·A‖.
    Scaled,
    /// y = x·W'ᵀ, W' = W with columns I replaced by W[:, I] + s·D.
    Columns,
    /// y = x·Wᵀ + s·x[:, I]·Dᵀ.
    ColumnsBranch,
    /// y = x·[S W]ᵀ, S the trained first columns.
    FirstColumns,
    /// y = x·[S; W]ᵀ, S the trained first rows.
    FirstRows,
    /// y = x·Wᵀ, W trained.
    Whole,
}

const WAYS: [Way; 8] = [
    Way::LowRank,
    Way::LowRankMerged,
    Way::Scaled,
    Way::Columns,
    Way::ColumnsBranch,
    Way::FirstColumns,
    Way::FirstRows,
    Way::Whole,
];

/// A decoder whose every linear layer is trained in one way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Trainer {
    pub(super) layers: usize,
    pub(super) width: u64,
    pub(super) kv: u64,
    pub(super) ff: u64,
    pub(super) rank: u64,
    pub(super) way: Way,
}

const REAL: Trainer = Trainer { layers: 2, width: 576, kv: 192, ff: 1536, rank: 16, way: Way::Columns };
const TINY: Trainer = Trainer { layers: 1, width: 8, kv: 4, ff: 12, rank: 2, way: Way::Columns };

const MUL: Op = Op::Binary(BinaryOp::Mul);
const TB: Op = Op::MatMul { ta: false, tb: true };

impl Trainer {
    /// Entry `train`: hidden states in, sum of squares times `loss_scale` out.
    pub(super) fn build(&self) -> Graph {
        let mut b = Build { g: Graph::default(), e: Entry::new("train") };
        let t = Dim::Symbol(Sym::T);
        let input = |name: &str, dtype, shape: &[Dim]| Op::Input { name: name.into(), dtype, shape: shape.to_vec() };
        let mut h = b.push(input("x", DType::F32, &[t, self.width.into()]), &[]);
        let segments = [("q_segments", Sym::S1), ("kv_start", Sym::S), ("kv_len", Sym::S)]
            .map(|(n, s)| b.push(input(n, DType::I32, &[Dim::Symbol(s)]), &[]));
        for l in 0..self.layers {
            h = self.layer(&mut b, l, h, segments);
        }
        let scale = b.push(input("loss_scale", DType::F32, &[]), &[]);
        let mut loss = b.push(MUL, &[h, h]);
        for axis in [1, 0] {
            loss = b.push(Op::Reduce { op: ReduceOp::Sum, axis }, &[loss]);
        }
        loss = b.push(MUL, &[scale, loss]);
        b.e.output("loss", loss);
        b.g.entries.push(b.e);
        b.g
    }

    fn layer(&self, b: &mut Build, l: usize, h: ValueId, segments: [ValueId; 3]) -> ValueId {
        let name = |s: &str| format!("layers.{l}.{s}");
        let n = self.norm(b, h);
        let q = self.linear(b, &name("q"), n, self.width, self.width);
        let k = self.linear(b, &name("k"), n, self.width, self.kv);
        let v = self.linear(b, &name("v"), n, self.width, self.kv);
        let head = self.kv / 2;
        let attrs = AttentionAttrs {
            heads: (self.width / head) as u32,
            kv_heads: 2,
            head_dim: head as u32,
            scale: 0.5f32.to_bits(),
            causal: true,
            window: None,
        };
        let a = b.push(Op::Attention(attrs), &[q, k, v, segments[0], segments[1], segments[2]]);
        let o = self.linear(b, &name("o"), a, self.width, self.width);
        let h = b.push(Op::Add, &[h, o]);
        let n = self.norm(b, h);
        let g = self.linear(b, &name("gate"), n, self.width, self.ff);
        let u = self.linear(b, &name("up"), n, self.width, self.ff);
        let s = b.push(Op::Unary(UnaryOp::Sigmoid), &[g]);
        let m = b.push(MUL, &[s, u]);
        let d = self.linear(b, &name("down"), m, self.ff, self.width);
        b.push(Op::Add, &[h, d])
    }

    fn norm(&self, b: &mut Build, x: ValueId) -> ValueId {
        let sq = b.push(MUL, &[x, x]);
        let sum = b.push(Op::Reduce { op: ReduceOp::Sum, axis: 1 }, &[sq]);
        let eps = b.push(Op::f32(0.5), &[]);
        let sum = b.push(Op::Add, &[sum, eps]);
        let r = b.push(Op::Unary(UnaryOp::Rsqrt), &[sum]);
        let shape = vec![Dim::Symbol(Sym::T), self.width.into()];
        let r = b.push(Op::Broadcast { shape, axes: vec![0] }, &[r]);
        b.push(MUL, &[x, r])
    }

    fn param(&self, b: &mut Build, name: &str, ty: TensorType, role: Role) -> ValueId {
        let source = match role {
            Role::Frozen if ty.rank() > 0 => Source::Checkpoint(name.into()),
            _ => Source::Adapter { slot: 0, key: name.into() },
        };
        let p = b.g.add_param(Param { name: name.into(), ty, role, source });
        b.push(Op::Param(p), &[])
    }

    fn linear(&self, b: &mut Build, name: &str, x: ValueId, k: u64, n: u64) -> ValueId {
        let f32s = |shape: &[u64]| TensorType::new(DType::F32, shape.iter().copied());
        let r = self.rank;
        let trained = |b: &mut Build, part: &str, shape: &[u64]| {
            self.param(b, &format!("slot0.{name}.{part}"), f32s(shape), Role::Train)
        };
        let base = |b: &mut Build, shape: &[u64]| self.param(b, &format!("{name}.weight"), f32s(shape), Role::Frozen);
        let scale = |b: &mut Build| self.param(b, &format!("slot0.{name}.scale"), f32s(&[]), Role::Frozen);
        match self.way {
            Way::LowRank | Way::LowRankMerged | Way::Scaled => {
                let w = base(b, &[n, k]);
                let (down, up) = (trained(b, "A", &[r, k]), trained(b, "B", &[n, r]));
                let s = scale(b);
                let delta = |b: &mut Build| {
                    let d = b.push(Op::MatMul { ta: false, tb: false }, &[up, down]);
                    let d = b.push(MUL, &[s, d]);
                    b.push(Op::Add, &[w, d])
                };
                if self.way == Way::LowRankMerged {
                    let w = delta(b);
                    return b.push(TB, &[x, w]);
                }
                let y = b.push(TB, &[x, w]);
                let t = b.push(TB, &[x, down]);
                let t = b.push(TB, &[t, up]);
                let t = b.push(MUL, &[s, t]);
                let y = b.push(Op::Add, &[y, t]);
                if self.way == Way::LowRank {
                    return y;
                }
                let whole = delta(b);
                let sq = b.push(MUL, &[whole, whole]);
                let norm = b.push(Op::Reduce { op: ReduceOp::Sum, axis: 1 }, &[sq]);
                let norm = b.push(Op::Unary(UnaryOp::Sqrt), &[norm]);
                let norm = b.push(Op::StopGradient, &[norm]);
                let m = trained(b, "m", &[n]);
                let g = b.push(Op::Binary(BinaryOp::Div), &[m, norm]);
                let g = b.push(Op::Broadcast { shape: vec![Dim::Symbol(Sym::T), n.into()], axes: vec![1] }, &[g]);
                b.push(MUL, &[g, y])
            }
            Way::Columns | Way::ColumnsBranch => {
                let w = base(b, &[n, k]);
                let i = TensorType::new(DType::I32, [r]);
                let i = self.param(b, &format!("slot0.{name}.I"), i, Role::Index);
                let (d, s) = (trained(b, "D", &[n, r]), scale(b));
                if self.way == Way::ColumnsBranch {
                    let y = b.push(TB, &[x, w]);
                    let part = b.push(Op::Gather { axis: 1 }, &[x, i]);
                    let t = b.push(TB, &[part, d]);
                    let t = b.push(MUL, &[s, t]);
                    return b.push(Op::Add, &[y, t]);
                }
                let d = b.push(MUL, &[s, d]);
                let old = b.push(Op::Gather { axis: 1 }, &[w, i]);
                let new = b.push(Op::Add, &[old, d]);
                let w = b.push(Op::Scatter { axis: 1, mode: ScatterMode::Set }, &[w, i, new]);
                b.push(TB, &[x, w])
            }
            Way::FirstColumns | Way::FirstRows => {
                let columns = self.way == Way::FirstColumns;
                let (first, rest) = if columns { ([n, r], [n, k - r]) } else { ([r, k], [n - r, k]) };
                let (s, w) = (trained(b, "S", &first), base(b, &rest));
                let w = b.push(Op::Concat { axis: u8::from(columns) }, &[s, w]);
                b.push(TB, &[x, w])
            }
            Way::Whole => {
                let w = trained(b, "weight", &[n, k]);
                b.push(TB, &[x, w])
            }
        }
    }
}

const BEFORE: [&str; 4] = ["canonicalize", "precision", "differentiate", "canonicalize"];

/// The entry `accumulate` after these passes, beside the prepare entries; gradients as outputs.
fn accumulate(t: &Trainer, passes: &[&str], opts: &Options) -> (Graph, Vec<RuleCount>) {
    let p = Pipeline::of(&[&BEFORE[..], passes, &["fold-params", "canonicalize"]].concat());
    let out = run_passes(&t.build(), &p, opts).unwrap_or_else(|e| panic!("{t:?}: {e}"));
    let mut g = out.graph;
    g.entries.retain(|e| e.name == "accumulate" || e.name.starts_with("prepare("));
    for r in g.entries.iter_mut().filter(|e| e.name == "accumulate").flat_map(|e| &mut e.roots) {
        if let RootKind::Assign(p) = r.kind {
            r.kind = RootKind::Output(g.params[p.index()].name.clone());
        }
    }
    let rules = out.reports.iter().find(|r| r.name == "rewrite").map(|r| r.rules.clone());
    (g, rules.unwrap_or_default())
}

/// The same without and with rewriting.
fn both(t: &Trainer, opts: &Options) -> (Graph, Graph, Vec<RuleCount>) {
    let (new, rules) = accumulate(t, &["rewrite", "canonicalize"], opts);
    (accumulate(t, &[], opts).0, new, rules)
}

fn bf16() -> Options {
    Options { dtype: DType::BF16, ..Options::default() }
}

/// Run-time products: operand and result types.
fn products(g: &Graph) -> Vec<String> {
    let e = g.entry("accumulate").unwrap();
    let known = region::known(g, e);
    let product = |v: &ValueId| matches!(e.node(*v).op, Op::MatMul { .. }) && known[v.index()] == Known::Run;
    let text = |v: ValueId| {
        let n = e.node(v);
        format!("{} {} -> {}", e.ty(n.inputs[0]), e.ty(n.inputs[1]), n.ty)
    };
    let mut all: Vec<String> = e.values().filter(product).map(text).collect();
    all.sort();
    all
}

fn bytes(s: &[Saved]) -> u64 {
    s.iter().map(|s| s.bytes).sum()
}

/// What the backward half keeps before recompute.
fn kept(g: &Graph, opts: &Options) -> Vec<Saved> {
    saved(g, g.entry("accumulate").unwrap(), opts)
}

#[test]
fn results_stay_whatever_is_trained() {
    for way in WAYS {
        for dtype in [DType::F32, DType::BF16] {
            let opts = Options { dtype, ..Options::default() };
            let (plain, new, _) = both(&Trainer { way, layers: 2, ..TINY }, &opts);
            same_results(&plain, &new, if dtype == DType::F32 { 1e-4 } else { 5e-2 });
        }
    }
}

/// Bytes that only a trained weight's gradient reads.
fn trained_only(s: &[Saved]) -> u64 {
    s.iter().filter(|s| s.trained_only).map(|s| s.bytes).sum()
}

/// Products of two run-time values, which is what gradients of weights are.
fn gradients(g: &Graph) -> Vec<String> {
    products(g).into_iter().filter(|p| p.split(' ').nth(1).is_some_and(|t| t.contains("[T,"))).collect()
}

/// Where columns are trained the backward half reads those columns of the inputs and nothing else of them: the saving is
/// made by rewriting, and lost without it.
#[test]
fn trained_columns_keep_columns() {
    for (opts, ty) in [(Options::default(), "f32"), (bf16(), "bf16")] {
        let low_rank = accumulate(&Trainer { way: Way::LowRank, ..REAL }, &["rewrite", "canonicalize"], &opts).0;
        for way in [Way::Columns, Way::FirstColumns, Way::ColumnsBranch] {
            let (plain, new, rules) = both(&Trainer { way, ..REAL }, &opts);
            assert_eq!(gradients(&new).len(), 14, "{:#?}", products(&new));
            assert!(gradients(&new).iter().all(|p| p.contains(&format!(" {ty}[T,16] -> "))), "{:#?}", products(&new));
            let (few, all) = (kept(&new, &opts), kept(&low_rank, &opts));
            assert!(trained_only(&few) * 20 <= trained_only(&all), "{way:?}: {few:#?}");
            assert!(bytes(&few) * 100 <= bytes(&all) * 81, "{way:?}: {} of {}", bytes(&few), bytes(&all));
            if way != Way::ColumnsBranch {
                assert!(rules.iter().any(|r| r.rule == "choose-through" && r.chosen > 0), "{rules:?}");
                assert!(trained_only(&kept(&plain, &opts)) > 10 * trained_only(&few));
                assert!(gradients(&plain).iter().any(|p| p.ends_with("-> f32[1536,576]")), "{:#?}", products(&plain));
            }
        }
    }
}

/// Trained rows need the whole input, but the columns of the result's gradient only.
#[test]
fn trained_rows_need_the_whole_input() {
    let (_, new, _) = both(&Trainer { way: Way::FirstRows, ..REAL }, &Options::default());
    assert!(gradients(&new).iter().all(|p| p.starts_with("f32[T,16] ")), "{:#?}", products(&new));
}

/// However a low-rank change is written, no gradient of the size of a weight is ever there.
#[test]
fn low_rank_gradients_stay_low_rank() {
    for way in [Way::LowRank, Way::LowRankMerged, Way::Scaled] {
        let (_, new, _) = both(&Trainer { way, ..REAL }, &Options::default());
        assert_eq!(gradients(&new).len(), 28, "{way:?}: {:#?}", products(&new));
        assert!(gradients(&new).iter().all(|p| p.contains("[T,16]")), "{way:?}: {:#?}", products(&new));
    }
    // the same in bf16 where the branch stands beside the weight
    for way in [Way::LowRank, Way::Scaled] {
        let (_, new, _) = both(&Trainer { way, ..REAL }, &bf16());
        assert!(gradients(&new).iter().all(|p| p.contains("[T,16]")), "{way:?}: {:#?}", products(&new));
    }
}

/// A change joins its weight when there are many tokens, in f32, and never in bf16, where it would be rounded away.
#[test]
fn a_change_joins_its_weight_by_price_and_type() {
    let t = Trainer { way: Way::LowRank, layers: 1, ..REAL };
    let thin = |g: &Graph| products(g).iter().filter(|p| p.starts_with("f32[T,16] f32[")).count();
    let tokens = |n: u64| vec![("accumulate".to_string(), n)];
    let few = both(&t, &Options { tokens_hint: tokens(512), ..Options::default() }).1;
    let many = both(&t, &Options { tokens_hint: tokens(1 << 16), ..Options::default() }).1;
    let dear = Options { tokens_hint: tokens(1 << 16), saved_byte_us: Some(1.0), ..Options::default() };
    assert!(thin(&few) > thin(&many), "{:#?}", products(&many));
    assert_eq!(thin(&few), thin(&both(&t, &dear).1));
    let (plain, narrow, rules) = both(&t, &Options { tokens_hint: tokens(1 << 16), ..bf16() });
    assert_eq!(products(&plain).len(), products(&narrow).len());
    assert!(rules.iter().all(|r| !["factor", "mm-assoc"].contains(&r.rule)), "{rules:?}");
    assert!(!print(&narrow).lines().any(|l| l.contains("= add(") && l.contains(": bf16")));
}

/// Base weights are read where they lie: nothing of their size is made of them alone.
#[test]
fn no_copies_of_weights() {
    for way in [Way::LowRank, Way::Scaled, Way::ColumnsBranch] {
        for opts in [Options::default(), bf16()] {
            let (_, new, _) = both(&Trainer { way, layers: 1, ..REAL }, &opts);
            let e = new.entry("accumulate").unwrap();
            let read = |v: ValueId| match e.node(v).op {
                Op::Param(p) => Some(&new.params[p.index()]),
                _ => None,
            };
            let derived = e.values().filter_map(read).filter(|p| p.source == Source::Derived);
            let large: Vec<&str> =
                derived.filter(|p| p.ty.static_elements() > Some(192 * 500)).map(|p| p.name.as_str()).collect();
            assert!(large.is_empty(), "{way:?} {:?}: {large:?}", opts.dtype);
        }
    }
}

#[test]
fn two_runs_agree_and_equal_layers_are_done_once() {
    for way in WAYS {
        let t = Trainer { way, layers: 4, ..REAL };
        let p = Pipeline::of(&[&BEFORE[..], &["rewrite"]].concat());
        let run = || run_passes(&t.build(), &p, &Options::default()).unwrap();
        let (a, b) = (run(), run());
        assert_eq!(a.graph, b.graph);
        let note = &a.reports.last().unwrap().note;
        // four groups a layer; nothing is below the first, and the last one's result goes elsewhere
        let distinct: usize = note.split(", ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
        assert!(distinct <= 7, "{way:?}: {note}");
    }
}

#[test]
fn every_e_node_of_both_halves_equals_its_class() {
    let mut fired = vec![0; RULES.len()];
    for way in WAYS {
        for opts in [Options::default(), bf16()] {
            let g = run_passes(&Trainer { way, ..TINY }.build(), &Pipeline::of(&BEFORE), &opts).unwrap().graph;
            let e = g.entry("accumulate").unwrap();
            for r in &region::find(&g, e, &region::known(&g, e)).list {
                let (mut w, _) = load(&r.body, false).unwrap();
                let s = saturate(&mut w, &Limits { rounds: 30, nodes: 6000, disabled: vec![] });
                assert!(!s.limited, "{way:?}: {} e-nodes after {} rounds", s.nodes, s.rounds);
                s.fired.iter().enumerate().for_each(|(k, n)| fired[k] += n);
                check_classes(&format!("{way:?} {:?}", opts.dtype), &w);
            }
        }
    }
    for rule in ["choose-through", "rowscale-mm", "scatter-merge", "mm-assoc", "factor", "scale-out", "scale-in"] {
        let k = RULES.iter().position(|r| r.name == rule).unwrap();
        assert!(fired[k] > 0, "{rule} never fired");
    }
}

/// The best choice there is, by an integer program: each class that is needed is chosen, and levels keep circles out.
fn optimum(p: &extract::Problem) -> f64 {
    use good_lp::{Expression, ProblemVariables, Solution, SolverModel, constraint, microlp, variable};
    let mut g = petgraph::graph::DiGraph::<(), ()>::new();
    let vertex: Vec<_> = p.classes.iter().map(|_| g.add_node(())).collect();
    for n in &p.nodes {
        n.needs.iter().for_each(|&c| {
            g.update_edge(vertex[n.class], vertex[c], ());
        });
    }
    let mut part = vec![0; p.classes.len()];
    let mut size = vec![];
    for (k, c) in petgraph::algo::tarjan_scc(&g).into_iter().enumerate() {
        size.push(c.len() as f64);
        c.iter().for_each(|v| part[v.index()] = k);
    }
    let mut vars = ProblemVariables::new();
    let on: Vec<_> = p.nodes.iter().map(|_| vars.add(variable().binary())).collect();
    let level: Vec<_> = p.classes.iter().map(|_| vars.add(variable().min(0.0).max(1000.0))).collect();
    let cost: Expression = p.nodes.iter().zip(&on).map(|(n, &x)| n.cost * x).sum();
    let mut model = vars.minimise(cost).using(microlp);
    let any = |c: usize| p.classes[c].iter().map(|&n| Expression::from(on[n])).sum::<Expression>();
    for &r in &p.roots {
        model = model.with(constraint!(any(r) >= 1.0));
    }
    for (i, n) in p.nodes.iter().enumerate() {
        for &c in &n.needs {
            model = model.with(constraint!(any(c) - on[i] >= 0.0));
            if part[c] == part[n.class] {
                let m = size[part[c]] + 1.0;
                model = model.with(constraint!(level[n.class] - level[c] - m * on[i] >= 1.0 - m));
            }
        }
    }
    let s = model.solve().unwrap();
    p.nodes.iter().zip(&on).map(|(n, &x)| n.cost * s.value(x).round()).sum()
}

/// The search is within half a percent of the best choice, at two prices of a kept byte.
#[test]
fn the_search_is_near_the_optimum() {
    let mut seen = 0;
    for way in WAYS {
        for byte_us in [1e-6, 1.7e-4] {
            let opts = Options { saved_byte_us: Some(byte_us), ..Options::default() };
            let t = Trainer { way, layers: 1, ..REAL };
            let g = run_passes(&t.build(), &Pipeline::of(&BEFORE), &opts).unwrap().graph;
            let e = g.entry("accumulate").unwrap();
            for r in &region::find(&g, e, &region::known(&g, e)).list {
                let Priced { x, start, .. } = price(&r.body, &[512], &opts).unwrap();
                let p = x.problem;
                if p.nodes.len() > 310 {
                    continue;
                }
                let (_, ours) = p.solve(Some(&start)).unwrap();
                let best = optimum(&p);
                assert!(ours <= best * 1.005 + 1e-6, "{way:?}: {ours}, not {best}");
                seen += 1;
            }
        }
    }
    assert!(seen >= 60, "{seen}");
}
