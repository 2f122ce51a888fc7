//! Random graphs: cut into kernels, they compute what they computed, and every kernel keeps the rules of its class.

use pleach_ir::interp::{Symbols, Tensor, run_entry_with, run_schedule_with};
use pleach_ir::*;
use pleach_passes::fuse_kernels::{CutOptions, schedule};
use std::collections::BTreeMap;

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
    fn unit(&mut self) -> f32 {
        self.below(2001) as f32 / 1000.0 - 1.0
    }
}

const SIZES: [u64; 4] = [1, 4, 6, 20];

fn op(r: &mut Rng, e: &Entry, pick: &[ValueId]) -> Op {
    let t = e.ty(pick[0]);
    let axis = r.below(3) as u8;
    match r.below(16) {
        0 => Op::Unary([UnaryOp::Neg, UnaryOp::Exp, UnaryOp::Sigmoid, UnaryOp::Tanh][r.below(4) as usize]),
        1 | 2 => Op::Binary([BinaryOp::Sub, BinaryOp::Mul, BinaryOp::Max][r.below(3) as usize]),
        3 | 4 => Op::Add,
        5 | 6 => Op::MatMul { ta: r.below(4) == 0, tb: r.below(2) == 0 },
        7 | 8 => Op::Reduce { op: [ReduceOp::Sum, ReduceOp::Max][r.below(2) as usize], axis },
        9 => {
            let mut s = t.shape.clone();
            if s.len() == 2 && s[1] == Dim::Known(20) {
                s = vec![s[0], 4u64.into(), 5u64.into()];
            } else if s.len() == 3 {
                s = vec![s[0], 20u64.into()];
            }
            Op::Reshape(s)
        }
        10 => Op::Transpose(match t.rank() {
            2 => vec![1, 0],
            3 => [vec![0, 2, 1], vec![1, 0, 2]][r.below(2) as usize].clone(),
            _ => vec![0],
        }),
        11 => {
            let n = SIZES[r.below(4) as usize];
            match t.rank() {
                1 if r.below(2) == 0 => Op::Broadcast { shape: vec![t.shape[0], n.into()], axes: vec![0] },
                1 => Op::Broadcast { shape: vec![Dim::Symbol(Sym::T), t.shape[0]], axes: vec![1] },
                _ => Op::Broadcast { shape: t.shape.clone(), axes: (0..t.rank() as u8).collect() },
            }
        }
        12 => Op::Slice { axis, start: r.below(2), end: 2 + r.below(4) },
        13 => Op::Concat { axis },
        14 => Op::Pad { axis, lo: r.below(3), hi: r.below(3) },
        _ => Op::Gather { axis: 0 },
    }
}

fn graph(seed: u64) -> Graph {
    let mut r = Rng(seed);
    let mut g = Graph { phase: Phase::Core, ..Graph::default() };
    for (i, shape) in [[6u64, 20], [20, 20], [20, 4], [4, 20]].iter().enumerate() {
        let ty = TensorType::new(DType::F32, shape.iter().copied());
        let name = format!("w{i}");
        g.add_param(Param { name: name.clone(), ty, role: Role::Frozen, source: Source::Checkpoint(name) });
    }
    let mut e = Entry::new("infer");
    let push = |e: &mut Entry, op, x: &[ValueId]| e.push(&g.params, op, x);
    let x = Op::Input { name: "x".into(), dtype: DType::F32, shape: vec![Sym::T.into(), 20u64.into()] };
    let i = Op::Input { name: "i".into(), dtype: DType::I32, shape: vec![Sym::T.into()] };
    let mut floats = vec![push(&mut e, x, &[]).unwrap()];
    let index = push(&mut e, i, &[]).unwrap();
    for p in 0..4 {
        floats.push(push(&mut e, Op::Param(ParamId(p)), &[]).unwrap());
    }
    floats.push(push(&mut e, Op::f32(0.5), &[]).unwrap());
    let want = 6 + r.below(14) as usize;
    for _ in 0..600 {
        if floats.len() > want + 6 {
            break;
        }
        // Recent values are likelier, so that chains grow.
        let k = floats.len() as u64;
        let pick =
            |r: &mut Rng| floats[(if r.below(2) == 0 { k - 1 - r.below(k.min(4)) } else { r.below(k) }) as usize];
        let a = [pick(&mut r), pick(&mut r)];
        let o = op(&mut r, &e, &a);
        let n = match o {
            Op::Binary(_) | Op::Add | Op::MatMul { .. } | Op::Concat { .. } => 2,
            _ => 1,
        };
        let inputs = if matches!(o, Op::Gather { .. }) { vec![a[0], index] } else { a[..n].to_vec() };
        // A table shorter than the indices is not for gathering.
        if matches!(o, Op::Gather { .. }) && e.ty(a[0]).shape.first() != Some(&Dim::Symbol(Sym::T)) {
            continue;
        }
        if let Ok(v) = push(&mut e, o, &inputs) {
            floats.push(v);
        }
    }
    for (n, v) in floats.iter().rev().take(1 + r.below(3) as usize).enumerate() {
        e.output(format!("y{n}"), *v);
    }
    g.entries.push(e);
    g
}

/// What the text of the schedule module promises about row kernels, written again from the promise: a computed value is
/// read at its own row only, but for a sum across rows of an elementwise function of operands.
fn rows_stay_apart(k: &Kernel) -> Result<(), String> {
    if k.class != Class::Row || k.body.nodes.len() <= k.operands.len() + 1 {
        return Ok(());
    }
    let e = &k.body;
    let rows = e.roots.iter().filter_map(|r| e.ty(r.value).shape.first()).collect::<Vec<_>>();
    if rows.windows(2).any(|w| w[0] != w[1]) {
        return Err("results have different rows".into());
    }
    // `exact[v]`: v is a computed value or a row-keeping view of one; `moved[v]`: rows were mixed on the way from one.
    let (mut exact, mut moved) = (vec![false; e.nodes.len()], vec![false; e.nodes.len()]);
    // `direct[v]`: an operand, a view of one or an elementwise function of such, which may be summed across rows.
    let mut direct = vec![false; e.nodes.len()];
    for v in e.values() {
        let n = e.node(v);
        let view = matches!(n.op, Op::Reshape(_) | Op::Slice { .. } | Op::Transpose(_) | Op::Broadcast { .. });
        direct[v.index()] = n.op.is_leaf()
            || view && !exact[n.inputs[0].index()]
            || n.op.is_elementwise() && n.inputs.iter().all(|x| direct[x.index()]);
        if n.op.is_leaf() {
            continue;
        }
        let from = |i: usize| n.inputs[i].index();
        let any = (0..n.inputs.len()).any(|i| exact[from(i)] || moved[from(i)]);
        let first = |i: usize| e.ty(n.inputs[i]).shape.first().copied();
        let keeps = match &n.op {
            Op::Reshape(s) => s.first().copied() == first(0),
            Op::Transpose(p) => p.first() == Some(&0),
            Op::Broadcast { axes, .. } => axes.first() == Some(&0),
            Op::Slice { axis, .. } | Op::Pad { axis, .. } | Op::Concat { axis } | Op::Reduce { axis, .. } => *axis > 0,
            Op::Gather { .. } => !(exact[from(0)] || moved[from(0)]),
            _ => (0..n.inputs.len()).all(|i| e.ty(n.inputs[i]).rank() == 0 || first(i) == n.ty.shape.first().copied()),
        };
        let across = matches!(n.op, Op::Reduce { axis: 0, .. }) && direct[from(0)];
        if any && !keeps && !across {
            return Err(format!("{} mixes rows of a computed value", n.op.name()));
        }
        exact[v.index()] = !view || any;
        moved[v.index()] = false;
    }
    Ok(())
}

/// A product's left operand is an operand or a view of one, its right operand an operand.
fn products_read_operands(k: &Kernel) -> Result<(), String> {
    let e = &k.body;
    for v in e.values().filter(|v| matches!(e.node(*v).op, Op::MatMul { .. })) {
        let mut left = e.node(v).inputs[0];
        while matches!(e.node(left).op, Op::Slice { .. } | Op::Reshape(_)) {
            left = e.node(left).inputs[0];
        }
        for x in [left, e.node(v).inputs[1]] {
            if !matches!(e.node(x).op, Op::Input { .. }) {
                return Err(format!("a product reads the result of {}", e.node(x).op.name()));
            }
        }
    }
    Ok(())
}

#[test]
fn random_graphs_survive_the_cut() {
    let mut launches = 0;
    let mut nodes = 0;
    for seed in 0..800 {
        let g = graph(seed);
        let mut r = Rng(seed + 77);
        let t = 1 + r.below(5);
        let symbols = Symbols::from([(Sym::T, t)]);
        let values: Vec<Tensor> = g
            .params
            .iter()
            .map(|p| {
                let shape: Vec<u64> = p.ty.shape.iter().filter_map(|d| d.known()).collect();
                let n: u64 = shape.iter().product();
                Tensor::f32(shape, (0..n).map(|_| r.unit()).collect())
            })
            .collect();
        let given = BTreeMap::from([
            ("x".to_string(), Tensor::f32(vec![t, 20], (0..t * 20).map(|_| r.unit()).collect())),
            ("i".to_string(), Tensor::i32(vec![t], (0..t).map(|_| r.below(t) as i32).collect())),
        ]);
        let want = run_entry_with(&g.params, &|p| values.get(p.index()), &g.entries[0], &given, &symbols)
            .unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        for panels in [&[] as &[u64], &[48, 32, 16], &[16]] {
            let s =
                schedule(&g, &CutOptions { supported: &|_| Ok(()), panels, blocks: Default::default(), picks: None })
                    .unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            for k in &s.kernels {
                products_read_operands(k).unwrap_or_else(|e| panic!("seed {seed}: kernel {}: {e}", k.name));
                rows_stay_apart(k).unwrap_or_else(|e| panic!("seed {seed}: kernel {}: {e}\n{:#?}", k.name, k.body));
            }
            let mut now: Vec<Option<Tensor>> = values.iter().cloned().map(Some).collect();
            now.resize(s.params.len(), None);
            let none = BTreeMap::new();
            for e in s.entries.iter().filter(|e| e.name != "infer") {
                let p = run_schedule_with(&s, &e.name, &|p| now[p.index()].as_ref(), &none, &symbols);
                for (p, t) in p.unwrap_or_else(|e| panic!("seed {seed}: {e}")).assigns {
                    now[p.index()] = Some(t);
                }
            }
            let got = run_schedule_with(&s, "infer", &|p| now[p.index()].as_ref(), &given, &symbols)
                .unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            for (name, w) in &want.outputs {
                let d = got.outputs[name].relative_error(w);
                assert!(d < 1e-5 || !d.is_finite(), "seed {seed}: {name} differs by {d}");
            }
            launches += s.entries[0].steps.len();
            nodes += g.entries[0].nodes.len();
        }
    }
    assert!(launches * 2 < nodes, "{launches} launches for {nodes} nodes: nothing is fused");
}
