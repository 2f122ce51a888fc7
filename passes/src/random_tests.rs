//! Random graphs through the pipeline: they verify after every pass and compute what they computed.

use crate::manager::{Pipeline, run as run_passes};
use crate::options::{Options, Target};
use crate::testing::{results, try_results};
use pleach_ir::*;

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }

    fn of<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize]
    }
}

fn params() -> Vec<Param> {
    let base = |i: usize| Source::Checkpoint(format!("w{i}"));
    let slot = |i: usize| Source::Adapter { slot: (i % 2) as u32, key: format!("w{i}") };
    let list: [(&[u64], Role, Source); 14] = [
        (&[6, 6], Role::Frozen, base(0)),
        (&[6, 6], Role::Frozen, base(1)),
        (&[2, 6], Role::Frozen, base(2)),
        (&[6, 2], Role::Frozen, base(3)),
        (&[6], Role::Frozen, base(4)),
        (&[], Role::Frozen, base(5)),
        (&[6, 6], Role::Frozen, slot(0)),
        (&[2, 6], Role::Frozen, slot(1)),
        (&[2, 6], Role::Frozen, slot(0)),
        (&[6, 2], Role::Frozen, slot(1)),
        (&[6, 2], Role::Frozen, slot(0)),
        (&[6], Role::Frozen, slot(0)),
        (&[], Role::Frozen, slot(1)),
        (&[6, 6], Role::Train, Source::Zeros),
    ];
    let make = |(i, (shape, role, source)): (usize, (&[u64], Role, Source))| Param {
        name: format!("w{i}"),
        ty: TensorType::new(DType::F32, shape.iter().copied()),
        role,
        source,
    };
    list.into_iter().enumerate().map(make).collect()
}

fn op(r: &mut Rng) -> Op {
    let axis = r.below(2) as u8;
    match r.below(24) {
        0..=6 => Op::MatMul { ta: r.below(6) == 0, tb: r.below(2) == 0 },
        7..=11 => Op::Add,
        12..=14 => Op::Binary(BinaryOp::Mul),
        15 | 16 => Op::Slice { axis, start: r.below(3), end: 3 + r.below(4) },
        17 => Op::Concat { axis },
        18 => Op::Gather { axis },
        19 => Op::Unary(r.of(&[UnaryOp::Neg, UnaryOp::Tanh, UnaryOp::Sigmoid])),
        20 => Op::Transpose(vec![1, 0]),
        21 => Op::Broadcast {
            shape: vec![if r.below(2) == 0 { Sym::T.into() } else { 6u64.into() }, 6u64.into()],
            axes: vec![1],
        },
        22 => Op::Scatter { axis, mode: r.of(&[ScatterMode::Set, ScatterMode::Add]) },
        _ if r.below(2) == 0 => Op::Reshape(vec![4u64.into(), 9u64.into()]),
        _ => Op::StopGradient,
    }
}

fn graph(seed: u64) -> Graph {
    let mut r = Rng(seed);
    let mut g = Graph { params: params(), ..Graph::default() };
    for name in ["infer", "generate"] {
        let mut e = Entry::new(name);
        let t: Dim = Sym::T.into();
        let input = |n: &str, dtype, shape: &[Dim]| Op::Input { name: n.into(), dtype, shape: shape.to_vec() };
        let mut v = vec![];
        let mut push = |v: &mut Vec<ValueId>, op: Op, x: &[ValueId]| {
            if let Ok(id) = e.push(&g.params, op, x) {
                v.push(id);
            }
        };
        push(&mut v, input("x", DType::F32, &[t, 6u64.into()]), &[]);
        push(&mut v, input("y", DType::F32, &[t, 2u64.into()]), &[]);
        let mut index = vec![];
        push(&mut index, input("i", DType::I32, &[2u64.into()]), &[]);
        for p in 0..g.params.len() as u32 {
            push(&mut v, Op::Param(ParamId(p)), &[]);
        }
        push(&mut v, Op::f32(0.5), &[]);
        let leaves = v.len();
        let want = 4 + r.below(20) as usize;
        for _ in 0..1500 {
            if v.len() >= leaves + want {
                break;
            }
            let o = op(&mut r);
            // run-time values more often than parameters
            let mut pick = || if r.below(3) == 0 { v[r.below(v.len() as u64) as usize] } else { recent(&v, &mut r) };
            let n = match &o {
                Op::Unary(_)
                | Op::Slice { .. }
                | Op::Transpose(_)
                | Op::Broadcast { .. }
                | Op::StopGradient
                | Op::Reshape(_) => 1,
                Op::Add | Op::Concat { .. } => 2 + seed as usize % 3,
                _ => 2,
            };
            let mut x: Vec<ValueId> = (0..n).map(|_| pick()).collect();
            match o {
                Op::Gather { .. } => x[1] = index[0],
                Op::Scatter { .. } => x.insert(1, index[0]),
                _ => {}
            }
            push(&mut v, o, &x);
        }
        let outs = 1 + r.below(3);
        for k in 0..outs.min((v.len() - leaves) as u64) {
            let id = v[v.len() - 1 - k as usize];
            e.output(format!("o{k}"), id);
        }
        g.entries.push(e);
    }
    g
}

fn recent(v: &[ValueId], r: &mut Rng) -> ValueId {
    let n = v.len() as u64;
    if r.below(2) == 0 { v[(n - 1 - r.below(n.min(6))) as usize] } else { v[r.below(2) as usize] }
}

#[test]
fn random_graphs_compute_what_they_computed() {
    let (mut changed, mut folded) = (0, 0);
    for seed in 0..600u64 {
        let g = graph(seed);
        verify::verify(&g).unwrap();
        // a random index may be out of range
        let Ok(want) = try_results(&g) else { continue };
        let opts = Options {
            merge: seed % 2 == 0,
            target: if seed % 3 == 0 { Target::GPU } else { Target::CPU },
            node_limit: 3000,
            ..Options::default()
        };
        let out = run_passes(&g, &Pipeline::default(), &opts).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        let did = |pass: &str| out.reports.iter().any(|r| r.name == pass && r.changed);
        changed += usize::from(did("rewrite"));
        folded += usize::from(did("fold-params"));
        for (k, t) in &results(&out.graph) {
            if want[k].floats().iter().all(|x| x.is_finite() && x.abs() < 1e12) {
                let e = t.relative_error(&want[k]);
                assert!(e < 1e-3, "seed {seed}: {k} is off by {e}\n{}\n{}", text::print(&g), text::print(&out.graph));
            }
        }
        let again = run_passes(&g, &Pipeline::default(), &opts).unwrap();
        assert_eq!(again.graph, out.graph, "seed {seed}: two runs differ");
    }
    assert!(changed > 300 && folded > 200, "{changed} {folded}");
}
