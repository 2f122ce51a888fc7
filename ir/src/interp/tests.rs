//! Values computed by hand, one small entry per operator family.

use super::*;
use crate::graph::{Graph, Role, Source};
use crate::op::{AttentionAttrs, AttentionWrt, BinaryOp, ReduceOp, ScatterMode, UnaryOp};
use crate::schedule::{Buffer, BufferId, BufferKind, Class, Kernel, KernelId, Layout, Schedule, ScheduledEntry, Step};

fn input(e: &mut Entry, name: &str, dtype: DType, shape: &[Dim]) -> ValueId {
    e.push(&[], Op::Input { name: name.into(), dtype, shape: shape.to_vec() }, &[]).unwrap()
}

fn dims(s: &[u64]) -> Vec<Dim> {
    s.iter().map(|d| Dim::Known(*d)).collect()
}

/// Runs one operator on tensors of static shape.
fn one(op: Op, x: &[Tensor]) -> Result<Tensor, IrError> {
    let mut e = Entry::new("e");
    let mut inputs = BTreeMap::new();
    let mut ids = vec![];
    for (i, t) in x.iter().enumerate() {
        ids.push(input(&mut e, &format!("x{i}"), t.dtype(), &dims(&t.shape)));
        inputs.insert(format!("x{i}"), t.clone());
    }
    let v = e.push(&[], op, &ids)?;
    e.output("y", v);
    Ok(run_entry(&[], &|_| None, &e, &inputs)?.outputs["y"].clone())
}

fn f(shape: &[u64], v: &[f32]) -> Tensor {
    Tensor::f32(shape, v.to_vec())
}

fn i(v: &[i32]) -> Tensor {
    Tensor::i32([v.len() as u64], v.to_vec())
}

#[test]
fn elementwise_values() {
    let x = f(&[3], &[-1.0, 0.0, 2.0]);
    let un = |u| one(Op::Unary(u), std::slice::from_ref(&x)).unwrap();
    assert_eq!(un(UnaryOp::Abs), f(&[3], &[1.0, 0.0, 2.0]));
    assert_eq!(un(UnaryOp::Exp), f(&[3], &[0.367_879_44, 1.0, 7.389_056]));
    assert_eq!(un(UnaryOp::Sigmoid), f(&[3], &[0.268_941_43, 0.5, 0.880_797_1]));
    assert_eq!(un(UnaryOp::Tanh), f(&[3], &[-0.761_594_2, 0.0, 0.964_027_6]));
    assert_eq!(un(UnaryOp::Erf), f(&[3], &[-0.842_700_8, 0.0, 0.995_322_3]));
    let two = f(&[], &[2.0]);
    let bin = |b| one(Op::Binary(b), &[x.clone(), two.clone()]).unwrap();
    assert_eq!(bin(BinaryOp::Sub), f(&[3], &[-3.0, -2.0, 0.0]));
    assert_eq!(bin(BinaryOp::Div), f(&[3], &[-0.5, 0.0, 1.0]));
    assert_eq!(bin(BinaryOp::Lt), Tensor::bool([3], &[true, true, false]));
    assert_eq!(one(Op::Add, &[x.clone(), two.clone(), x.clone()]).unwrap(), f(&[3], &[0.0, 2.0, 6.0]));
    let c = Tensor::bool([3], &[true, false, true]);
    assert_eq!(one(Op::Select, &[c, x.clone(), two]).unwrap(), f(&[3], &[-1.0, 2.0, 2.0]));
    assert_eq!(one(Op::Cast(DType::I32), &[f(&[3], &[-1.9, 1.9, 3e9])]).unwrap(), i(&[-1, 1, i32::MAX]));
    let e = one(Op::Binary(BinaryOp::Div), &[i(&[1]), i(&[0])]).unwrap_err();
    assert!(e.to_string().contains("divided by zero"), "{e}");
}

#[test]
fn half_precision_rounds_once() {
    let x = Tensor::from_floats(DType::BF16, [2], vec![1.0, 256.0]);
    let one_more = Tensor::from_floats(DType::BF16, [2], vec![0.003, 1.0]);
    let y = one(Op::Add, &[x, one_more]).unwrap();
    assert_eq!(y.floats().as_ref(), [1.0, 256.0]);
    assert_eq!(y.dtype(), DType::BF16);
}

#[test]
fn products() {
    let a = f(&[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let b = f(&[2, 3], &[1.0, 0.0, -1.0, 2.0, 1.0, 0.0]);
    let nt = one(Op::MatMul { ta: false, tb: true }, &[a.clone(), b.clone()]).unwrap();
    assert_eq!(nt, f(&[2, 2], &[-2.0, 4.0, -2.0, 13.0]));
    let tn = one(Op::MatMul { ta: true, tb: false }, &[a.clone(), b.clone()]).unwrap();
    assert_eq!(tn, f(&[3, 3], &[9.0, 4.0, -1.0, 12.0, 5.0, -2.0, 15.0, 6.0, -3.0]));
    // Two batches of 1x2 by 2x1.
    let p = f(&[2, 1, 2], &[1.0, 2.0, 3.0, 4.0]);
    let q = f(&[2, 2, 1], &[5.0, 6.0, 7.0, 8.0]);
    assert_eq!(one(Op::MatMul { ta: false, tb: false }, &[p, q]).unwrap(), f(&[2, 1, 1], &[17.0, 53.0]));
    let r = |op, axis| one(Op::Reduce { op, axis }, std::slice::from_ref(&a)).unwrap();
    assert_eq!(r(ReduceOp::Sum, 0), f(&[3], &[5.0, 7.0, 9.0]));
    assert_eq!(r(ReduceOp::Sum, 1), f(&[2], &[6.0, 15.0]));
    assert_eq!(r(ReduceOp::Max, 1), f(&[2], &[3.0, 6.0]));
    assert_eq!(r(ReduceOp::Min, 0), f(&[3], &[1.0, 2.0, 3.0]));
    // Of equals the smaller index comes first.
    let t = f(&[2, 4], &[1.0, 3.0, 3.0, 2.0, 0.0, -1.0, 5.0, 5.0]);
    let top = |indices| one(Op::TopK { k: 3, indices }, std::slice::from_ref(&t)).unwrap();
    assert_eq!(top(false), f(&[2, 3], &[3.0, 3.0, 2.0, 5.0, 5.0, 0.0]));
    assert_eq!(top(true).data, Data::I32(vec![1, 2, 3, 2, 3, 0]));
}

#[test]
fn movement_values() {
    let a = f(&[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let run = |op| one(op, std::slice::from_ref(&a)).unwrap();
    assert_eq!(run(Op::Transpose(vec![1, 0])), f(&[3, 2], &[1.0, 4.0, 2.0, 5.0, 3.0, 6.0]));
    assert_eq!(run(Op::Reshape(dims(&[3, 2]))), f(&[3, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
    assert_eq!(run(Op::Slice { axis: 1, start: 1, end: 3 }), f(&[2, 2], &[2.0, 3.0, 5.0, 6.0]));
    assert_eq!(run(Op::Pad { axis: 1, lo: 1, hi: 0 }), f(&[2, 4], &[0.0, 1.0, 2.0, 3.0, 0.0, 4.0, 5.0, 6.0]));
    let rows = Op::Broadcast { shape: dims(&[2, 2]), axes: vec![1] };
    assert_eq!(one(rows, &[f(&[2], &[7.0, 8.0])]).unwrap(), f(&[2, 2], &[7.0, 8.0, 7.0, 8.0]));
    let cols = Op::Broadcast { shape: dims(&[2, 2]), axes: vec![0] };
    assert_eq!(one(cols, &[f(&[2], &[7.0, 8.0])]).unwrap(), f(&[2, 2], &[7.0, 7.0, 8.0, 8.0]));
    let both = one(Op::Concat { axis: 1 }, &[a.clone(), f(&[2, 1], &[9.0, 9.5])]).unwrap();
    assert_eq!(both, f(&[2, 4], &[1.0, 2.0, 3.0, 9.0, 4.0, 5.0, 6.0, 9.5]));
    assert_eq!(
        one(Op::Gather { axis: 1 }, &[a.clone(), i(&[2, 0, 2])]).unwrap(),
        f(&[2, 3], &[3.0, 1.0, 3.0, 6.0, 4.0, 6.0])
    );
    assert!(
        one(Op::Gather { axis: 0 }, &[a.clone(), i(&[2])]).unwrap_err().to_string().contains("index 2 is out of range")
    );
    assert!(one(Op::Gather { axis: 0 }, &[a, i(&[-1])]).is_err());
    let z = f(&[3], &[1.0, 1.0, 1.0]);
    let put =
        |mode| one(Op::Scatter { axis: 0, mode }, &[z.clone(), i(&[2, 0, 2]), f(&[3], &[5.0, 6.0, 7.0])]).unwrap();
    assert_eq!(put(ScatterMode::Set), f(&[3], &[6.0, 1.0, 7.0]));
    assert_eq!(put(ScatterMode::Add), f(&[3], &[7.0, 1.0, 13.0]));
    assert_eq!(
        one(Op::Iota { shape: dims(&[2, 3]), axis: 1 }, &[]).unwrap(),
        Tensor::i32([2, 3], vec![0, 1, 2, 0, 1, 2])
    );
}

fn attention(
    causal: bool,
    window: Option<u32>,
    q: &[f32],
    segments: &[i32],
    start: &[i32],
    len: &[i32],
) -> Result<Tensor, IrError> {
    // Two query heads of width 1 share one key/value head. With scale ln 2 a key of 1 weighs twice a key of 0.
    let at =
        AttentionAttrs { heads: 2, kv_heads: 1, head_dim: 1, scale: std::f32::consts::LN_2.to_bits(), causal, window };
    let (k, v) = (f(&[4, 1], &[0.0, 1.0, 0.0, 1.0]), f(&[4, 1], &[0.0, 3.0, 6.0, 9.0]));
    one(Op::Attention(at), &[f(&[q.len() as u64 / 2, 2], q), k, v, i(segments), i(start), i(len)])
}

#[test]
fn attention_by_hand() {
    // A query of 1 weighs keys (1, 2, 1, 2); a query of 0 weighs all alike.
    let all = attention(false, None, &[1.0, 0.0], &[0, 1], &[0], &[4]).unwrap();
    assert!(all.relative_error(&f(&[1, 2], &[5.0, 4.5])) < 1e-6, "{all:?}");
    // Two sequences: the first has keys 0..2, the second keys 2..4; causal.
    let two = attention(true, None, &[1.0, 0.0, 1.0, 0.0, 1.0, 0.0], &[0, 2, 3], &[0, 2], &[2, 2]).unwrap();
    assert!(two.relative_error(&f(&[3, 2], &[0.0, 0.0, 2.0, 1.5, 8.0, 7.5])) < 1e-6, "{two:?}");
    // One new query at the end of a cache of four keys sees its own and one before.
    let w = attention(true, Some(2), &[1.0, 0.0], &[0, 1], &[0], &[4]).unwrap();
    assert!(w.relative_error(&f(&[1, 2], &[8.0, 7.5])) < 1e-6, "{w:?}");
}

#[test]
fn attention_refuses_bad_segments() {
    let q = [1.0, 0.0, 1.0, 0.0];
    for (segments, start, len, why) in [
        ([0, 2], [1], [4], "reads keys 1..5 of 4"),
        ([0, 1], [0], [4], "ascend from 0"),
        ([0, 2], [-1], [4], "negative"),
        ([0, 2], [0], [1], "2 queries but 1 keys"),
    ] {
        let e = attention(true, None, &q, &segments, &start, &len).unwrap_err().to_string();
        assert!(e.contains(why), "{e}");
    }
    assert!(attention(false, Some(2), &q, &[0, 2], &[0], &[4]).is_err());
}

/// `w` frozen `[2,2]`, cache `[C,2]`; infer: y = x·wᵀ, cache row written at `slot`.
fn small_graph() -> Graph {
    let mut g = Graph::default();
    let cache = TensorType { dtype: DType::F32, shape: vec![Dim::Symbol(Sym::C), Dim::Known(2)] };
    let frozen = |name: &str, ty, role, source| Param { name: name.into(), ty, role, source };
    let w =
        g.add_param(frozen("w", TensorType::new(DType::F32, [2u64, 2]), Role::Frozen, Source::Checkpoint("w".into())));
    let c = g.add_param(frozen("cache", cache, Role::State, Source::Zeros));
    let mut e = Entry::new("infer");
    let x = input(&mut e, "x", DType::F32, &[Dim::Symbol(Sym::T), Dim::Known(2)]);
    let slot = input(&mut e, "slot", DType::I32, &[Dim::Symbol(Sym::T)]);
    let w = e.push(&g.params, Op::Param(w), &[]).unwrap();
    let old = e.push(&g.params, Op::Param(c), &[]).unwrap();
    let y = e.push(&g.params, Op::MatMul { ta: false, tb: true }, &[x, w]).unwrap();
    let new = e.push(&g.params, Op::Scatter { axis: 0, mode: ScatterMode::Set }, &[old, slot, y]).unwrap();
    e.output("y", y);
    e.assign(c, new);
    g.entries.push(e);
    g
}

fn given() -> (Vec<Tensor>, BTreeMap<String, Tensor>) {
    let params = vec![f(&[2, 2], &[1.0, 1.0, 0.0, 2.0]), Tensor::zeros(DType::F32, [3, 2])];
    let inputs = BTreeMap::from([("x".into(), f(&[1, 2], &[3.0, 4.0])), ("slot".into(), i(&[1]))]);
    (params, inputs)
}

#[test]
fn entry_with_params_and_symbols() {
    let g = small_graph();
    let (params, inputs) = given();
    let run =
        |inputs: &BTreeMap<String, Tensor>| run_entry(&g.params, &|p| params.get(p.index()), &g.entries[0], inputs);
    let r = run(&inputs).unwrap();
    assert_eq!(r.outputs["y"], f(&[1, 2], &[7.0, 8.0]));
    assert_eq!(r.assigns, vec![(ParamId(1), f(&[3, 2], &[0.0, 0.0, 7.0, 8.0, 0.0, 0.0]))]);
    let mut wrong = inputs.clone();
    wrong.insert("slot".into(), i(&[1, 2]));
    assert!(run(&wrong).unwrap_err().to_string().contains("with T = "), "{:?}", run(&wrong));
    wrong.remove("slot");
    assert!(run(&wrong).unwrap_err().to_string().contains("\"slot\" is missing"));
    wrong.insert("slot".into(), Tensor::i32([1], vec![]));
    assert!(run(&wrong).unwrap_err().to_string().contains("0 elements"));
}

#[test]
fn free_symbols_are_named_or_given() {
    let mut e = Entry::new("e");
    let v = e.push(&[], Op::Iota { shape: vec![Dim::Symbol(Sym::P)], axis: 0 }, &[]).unwrap();
    e.output("y", v);
    let none = BTreeMap::new();
    assert!(run_entry(&[], &|_| None, &e, &none).unwrap_err().to_string().contains("symbol P has no value"));
    let r = run_entry_with(&[], &|_| None, &e, &none, &Symbols::from([(Sym::P, 3)])).unwrap();
    assert_eq!(r.outputs["y"], i(&[0, 1, 2]));
    let huge = run_entry_with(&[], &|_| None, &e, &none, &Symbols::from([(Sym::P, u64::MAX)]));
    assert!(huge.unwrap_err().to_string().contains("too large"));
}

/// The schedule of [`small_graph`]: one contraction, one scatter in place.
fn small_schedule() -> Schedule {
    let g = small_graph();
    let tt = |d: &[Dim]| TensorType { dtype: DType::F32, shape: d.to_vec() };
    let (t2, c2, t) = ([Dim::Symbol(Sym::T), 2.into()], [Dim::Symbol(Sym::C), 2.into()], [Dim::Symbol(Sym::T)]);
    let mut mm = Entry::new("mm");
    let (a, b) = (input(&mut mm, "a0", DType::F32, &t2), input(&mut mm, "a1", DType::F32, &dims(&[2, 2])));
    let r = mm.push(&[], Op::MatMul { ta: false, tb: true }, &[a, b]).unwrap();
    mm.output("r0", r);
    let mut sc = Entry::new("sc");
    let x = [
        input(&mut sc, "a0", DType::F32, &c2),
        input(&mut sc, "a1", DType::I32, &t),
        input(&mut sc, "a2", DType::F32, &t2),
    ];
    let r = sc.push(&[], Op::Scatter { axis: 0, mode: ScatterMode::Set }, &x).unwrap();
    sc.output("r0", r);
    let row = Layout::RowMajor;
    let panels = Layout::Panels { nr: 16, transposed: true };
    let kernel = |name: &str, class, body, operands, aliases| Kernel {
        name: name.into(),
        class,
        body,
        operands,
        results: vec![row],
        aliases,
    };
    let buffer = |kind, ty, layout| Buffer { kind, ty, layout, name: String::new() };
    let i32s = TensorType { dtype: DType::I32, shape: t.to_vec() };
    let step = |k, reads: &[u32], write| Step {
        kernel: KernelId(k),
        reads: reads.iter().map(|b| BufferId(*b)).collect(),
        writes: vec![BufferId(write)],
        after: vec![],
        origin: None,
    };
    Schedule {
        params: vec![(g.params[0].clone(), panels), (g.params[1].clone(), row)],
        kernels: vec![
            kernel("mm", Class::Contraction, mm, vec![row, panels], vec![None]),
            kernel("sc", Class::Scatter, sc, vec![row; 3], vec![Some(0)]),
        ],
        entries: vec![ScheduledEntry {
            name: "infer".into(),
            buffers: vec![
                buffer(BufferKind::Input("x".into()), tt(&t2), row),
                buffer(BufferKind::Input("slot".into()), i32s, row),
                buffer(BufferKind::Param(ParamId(0)), tt(&[2.into(), 2.into()]), panels),
                buffer(BufferKind::Param(ParamId(1)), tt(&c2), row),
                buffer(BufferKind::Output("y".into()), tt(&t2), row),
            ],
            steps: vec![step(0, &[0, 2], 4), step(1, &[3, 1, 4], 3)],
            loops: vec![],
            outputs: vec![("y".into(), BufferId(4), tt(&t2))],
        }],
    }
}

#[test]
fn schedule_gives_what_the_graph_gives() {
    let (g, s) = (small_graph(), small_schedule());
    s.check().unwrap();
    let (params, inputs) = given();
    let want = run_entry(&g.params, &|p| params.get(p.index()), &g.entries[0], &inputs).unwrap();
    let got = run_schedule(&s, "infer", &|p| params.get(p.index()), &inputs).unwrap();
    assert_eq!(got, want);
    let y = run_kernel(&s.kernels[0], &[inputs["x"].clone(), params[0].clone()]).unwrap();
    assert_eq!(y, vec![want.outputs["y"].clone()]);
}

#[test]
fn schedule_notices_what_is_overwritten() {
    let (params, inputs) = given();
    let run = |s: &Schedule| run_schedule(s, "infer", &|p| params.get(p.index()), &inputs).unwrap_err().to_string();
    let mut late = small_schedule();
    late.entries[0].steps.swap(0, 1);
    assert!(run(&late).contains("read before it is written"), "{}", run(&late));
    // The scatter's result takes the place of the product, which is an output.
    let mut over = small_schedule();
    over.kernels[1].aliases = vec![Some(2)];
    assert!(run(&over).contains("took its place"), "{}", run(&over));
    assert!(run_schedule(&over, "nothing", &|_| None, &inputs).is_err());
}

#[test]
fn bytes_round_trip() {
    for t in [
        f(&[2], &[1.5, -0.0]),
        i(&[-7, 9]),
        Tensor::bool([2], &[true, false]),
        Tensor::from_floats(DType::F16, [1], vec![0.1]),
    ] {
        assert_eq!(Tensor::from_bytes(t.dtype(), t.shape.clone(), &t.to_bytes()).unwrap(), t);
    }
    assert!(Tensor::from_bytes(DType::F32, [2], &[0; 7]).is_err());
    assert!(Tensor::from_bytes(DType::F32, [u64::MAX, 2], &[0; 8]).is_err());
}

#[test]
fn relative_error_of_tensors() {
    let a = f(&[2], &[1.0, 4.0]);
    assert_eq!(a.relative_error(&a), 0.0);
    assert!((f(&[2], &[1.0, 3.0]).relative_error(&a) - 0.25).abs() < 1e-12);
    assert!(f(&[2], &[1.0, f32::NAN]).relative_error(&a).is_infinite());
    assert!(f(&[2, 1], &[1.0, 4.0]).relative_error(&a).is_infinite());
}

/// The gradients of attention against central differences of `sum(weights * attention)`, and the log-sum-exp against
/// the softmax it normalizes.
#[test]
fn attention_gradients_are_differences() {
    let fill = |n: usize, salt: usize| -> Vec<f32> {
        (0..n).map(|i| (((i + 3 * salt) * 2_654_435_761 % 1009) as f32 / 504.5) - 1.0).collect()
    };
    for (causal, window) in [(false, None), (true, None), (true, Some(2))] {
        let at = AttentionAttrs { heads: 4, kv_heads: 2, head_dim: 3, scale: 0.7f32.to_bits(), causal, window };
        // Two sequences of 2 and 3 queries; the second has one more key than queries; one key is never seen.
        let x = [f(&[5, 12], &fill(60, 1)), f(&[7, 6], &fill(42, 2)), f(&[7, 6], &fill(42, 3))];
        let b = [i(&[0, 2, 5]), i(&[0, 2]), i(&[2, 4])];
        let forward = |x: &[Tensor]| one(Op::Attention(at), &[x, &b].concat()).unwrap();
        let (out, dy) = (forward(&x), f(&[5, 12], &fill(60, 4)));
        let lse = one(Op::AttentionLse(at), &[&x[..2], &b].concat()).unwrap();
        for (k, (wrt, name)) in AttentionWrt::ALL.into_iter().enumerate() {
            let operands = [&x[..], &[out.clone(), lse.clone(), dy.clone()], &b].concat();
            let got = one(Op::AttentionGrad { attrs: at, wrt }, &operands).unwrap();
            assert_eq!(got.shape, x[k].shape);
            for n in 0..x[k].data.len() {
                let loss = |step: f32| -> f64 {
                    let mut y = x.clone();
                    if let Data::F32(v) = &mut y[k].data {
                        v[n] += step;
                    }
                    let (o, w) = (forward(&y), dy.floats().into_owned());
                    o.floats().iter().zip(w).map(|(a, w)| f64::from(*a) * f64::from(w)).sum()
                };
                let h = 1.0 / 64.0;
                let want = (loss(h) - loss(-h)) / f64::from(2.0 * h);
                let have = f64::from(got.floats()[n]);
                assert!((want - have).abs() < 2e-4 * (1.0 + want.abs()), "{name} {causal} {n}: {want} {have}");
            }
        }
        // exp(score - lse) sums to one: with equal values everywhere, attention gives that value.
        let flat = forward(&[x[0].clone(), x[1].clone(), f(&[7, 6], &[1.0; 42])]);
        assert!(flat.floats().iter().all(|y| (y - 1.0).abs() < 1e-6));
        let total = |r: usize, h: usize| lse.floats()[r * 4 + h];
        if causal {
            // The first query of the first sequence sees one key.
            let s: f32 = (0..3).map(|c| x[0].floats()[3 + c] * x[1].floats()[c]).sum::<f32>() * 0.7;
            assert!((total(0, 1) - s).abs() < 1e-6);
        }
    }
}

#[test]
fn after_is_its_first_operand() {
    let x = f(&[2], &[1.0, 2.0]);
    assert_eq!(one(Op::After, &[x.clone(), i(&[7, 8, 9])]).unwrap(), x);
}
