//! Loops over windows of rows: any chain of row-local operators gives the same window by window, in the interpreter and as
//! compiled code.

use pleach_ir::{BinaryOp, DType, Dim, Entry, Graph, Op, Param, Phase, ReduceOp, Role, Schedule, Source, Sym};
use pleach_ir::{TensorType, UnaryOp, ValueId};
use pleach_passes::chunk;
use pleach_passes::fuse_kernels::{CutOptions, cut, order};
use pleach_tests::compare::{Start, run_graph, run_schedule, same};
use pleach_tests::values::{Rng, symbols};

#[cfg(feature = "llvm")]
fn head() -> Graph {
    let text = include_str!("../../golden/passes/chunk/fires-head.ir");
    let (above, _) = text.split_once("\n---\n").unwrap();
    let graph: Vec<&str> = above.lines().filter(|l| !l.starts_with("//")).collect();
    pleach_ir::text::parse(&(graph.join("\n") + "\n")).unwrap()
}

fn chunked(g: &Graph, supported: &dyn Fn(&pleach_ir::Kernel) -> Result<(), String>) -> (Schedule, usize) {
    let mut s = cut(g, &CutOptions { supported, panels: &[], blocks: Default::default(), picks: None }).unwrap();
    let loops = chunk::run_with(&mut s, &|_| 16, 256, 4).unwrap();
    order(&mut s).unwrap();
    (s, loops)
}

/// A wide product, some operators on its rows, and a product or a sum that is narrow again.
fn graph(seed: u64) -> Graph {
    let mut r = Rng::new(seed, "chunk");
    let mut g = Graph { phase: Phase::Core, ..Graph::default() };
    for (name, role, source) in
        [("w", Role::Frozen, Source::Checkpoint("w".into())), ("grad.w", Role::State, Source::Zeros)]
    {
        let ty = TensorType::new(DType::F32, [40u64, 8]);
        g.add_param(Param { name: name.into(), ty, role, source });
    }
    let t = Dim::Symbol(Sym::T);
    let mut e = Entry::new("accumulate");
    let mut push = |op: Op, x: &[ValueId]| e.push(&g.params, op, x).unwrap();
    let x = push(Op::Input { name: "x".into(), dtype: DType::F32, shape: vec![t, 8u64.into()] }, &[]);
    let w = push(Op::Param(pleach_ir::ParamId(0)), &[]);
    let grad = push(Op::Param(pleach_ir::ParamId(1)), &[]);
    let mut wide = vec![push(Op::MatMul { ta: false, tb: true }, &[x, w])];
    for _ in 0..3 + r.below(6) {
        let a = wide[r.below(wide.len() as u64) as usize];
        let b = wide[wide.len() - 1];
        let next = match r.below(6) {
            0 => push(Op::Unary(UnaryOp::Tanh), &[b]),
            1 => push(Op::Binary(BinaryOp::Mul), &[a, b]),
            2 => push(Op::Add, &[a, b]),
            3 => {
                // Rows are told apart by their sums.
                let s = push(Op::Reduce { op: [ReduceOp::Sum, ReduceOp::Max][r.below(2) as usize], axis: 1 }, &[b]);
                let s = push(Op::Broadcast { shape: vec![t, 40u64.into()], axes: vec![0] }, &[s]);
                push(Op::Binary(BinaryOp::Sub), &[a, s])
            }
            4 => {
                // Mixes rows in one of eight: no loop around it.
                let axis = u8::from(r.below(8) > 0);
                let s = push(Op::Reduce { op: ReduceOp::Max, axis }, &[b]);
                let s = push(Op::Broadcast { shape: vec![t, 40u64.into()], axes: vec![1 - axis] }, &[s]);
                push(Op::Add, &[a, s])
            }
            _ => {
                let narrow = push(Op::MatMul { ta: false, tb: false }, &[b, w]);
                push(Op::MatMul { ta: false, tb: true }, &[narrow, w])
            }
        };
        wide.push(next);
    }
    let last = wide[wide.len() - 1];
    let half = push(Op::f32(0.01), &[]);
    let last = push(Op::Binary(BinaryOp::Mul), &[half, last]);
    let last = push(Op::Unary(UnaryOp::Tanh), &[last]);
    let y = push(Op::MatMul { ta: false, tb: false }, &[last, w]);
    let dw = push(Op::MatMul { ta: true, tb: false }, &[last, x]);
    let sum = push(Op::Add, &[grad, dw]);
    e.output("y", y);
    e.assign(pleach_ir::ParamId(1), sum);
    g.entries.push(e);
    g
}

#[test]
fn windows_give_what_all_rows_give() {
    let mut made = 0;
    for seed in 0..300 {
        let g = graph(seed);
        let (s, loops) = chunked(&g, &|_| Ok(()));
        made += loops;
        for tokens in [1, 4, 11] {
            let mut counts = symbols();
            counts.insert(Sym::T, tokens);
            let start = Start::seeded(&g, counts, seed);
            let want = run_graph(&g, &start).unwrap();
            let got = run_schedule(&s, &start).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            same(&got, &want, &|_| 2e-4).unwrap_or_else(|e| panic!("seed {seed}, T={tokens}: {e}"));
        }
    }
    assert!(made > 100, "{made} loops");
}

#[cfg(feature = "llvm")]
#[test]
fn compiled_windows_give_what_all_rows_give() {
    use pleach_codegen::compile::{CompileOptions, compile, supported};
    use pleach_ir::interp::Tensor;
    use pleach_plan::{Meta, Plan};
    use pleach_tests::compiled::{run, session, targets};
    let g = head();
    let (s, loops) = chunked(&g, &supported);
    assert_eq!(loops, 1);
    for target in targets() {
        let options = CompileOptions { target, threads: 2, meta: Meta { vocab: 3, ..Meta::default() } };
        let (plan, _) = compile(&s, &options).unwrap();
        let plan = Plan::from_bytes(&plan.to_bytes().unwrap()).unwrap();
        assert_eq!(plan.entries.iter().map(|e| e.loops.len()).sum::<usize>(), 1);
        let plan = std::sync::Arc::new(plan);
        for tokens in [1u64, 4, 11, 16] {
            let mut counts = symbols();
            counts.insert(Sym::T, tokens);
            let mut start = Start::seeded(&g, counts, 7);
            let zeros = Tensor::zeros(DType::F32, [40u64, 8]);
            start.params.insert("grad.w".into(), zeros);
            let want = run_graph(&g, &start).unwrap();
            for threads in [1, 3] {
                let options = pleach_runtime::Options::default().threads(threads).capacity("T", 16);
                let mut open = session(plan.clone(), &g, &start, &options).unwrap();
                let got = run(&mut open, "accumulate", &start).unwrap();
                let mut outputs = want.clone();
                outputs.retain(|name, _| got.contains_key(name));
                assert_eq!(outputs.len(), 2);
                same(&got, &outputs, &|_| 1e-4).unwrap_or_else(|e| panic!("T={tokens}: {e}"));
                let bytes = open.read_param("grad.w").unwrap().bytes.to_vec();
                let grad = Tensor::from_bytes(DType::F32, [40u64, 8], &bytes).unwrap();
                let summed = want.iter().find(|(name, _)| name.contains("grad.w")).unwrap().1;
                assert!(grad.relative_error(summed) < 1e-4, "T={tokens}");
            }
        }
    }
}
