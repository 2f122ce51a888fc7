//! Gradients against central differences, operator by operator and on random graphs; which values get one; the optimizer
//! against its formula.

use super::*;
use crate::manager::{Pipeline, run as run_pipeline};
use pleach_ir::interp::{Data, Symbols, Tensor, run_entry_with};
use pleach_ir::text::parse;
use pleach_ir::verify::verify;
use pleach_ir::{AttentionAttrs, Dim, ReduceOp, ScatterMode, Sym};

/// Values of a test: `steps` apart from each other, so that no choice between two of them changes under a small step.
fn spaced(n: u64, salt: u64, offset: f32) -> Vec<f32> {
    let at = |i: u64| ((i * 7 + salt * 5) % 17) as f32 * 0.125 - 1.0 + offset;
    (0..n).map(at).collect()
}

/// A graph with the entry `train` over trained parameters `x` and `z`.
struct Case {
    g: Graph,
    e: Entry,
    values: Vec<Tensor>,
    inputs: BTreeMap<String, Tensor>,
    symbols: Symbols,
}

impl Case {
    fn new() -> Case {
        let symbols = Symbols::from([(Sym::T, 4)]);
        Case { g: Graph::default(), e: Entry::new(TRAIN), values: vec![], inputs: BTreeMap::new(), symbols }
    }

    fn param(&mut self, name: &str, role: Role, shape: &[u64], values: Vec<f32>) -> ValueId {
        let ty = TensorType::new(DType::F32, shape.iter().copied());
        let p = self.g.add_param(Param { name: name.into(), ty, role, source: Source::Checkpoint(name.into()) });
        self.values.push(Tensor::f32(shape, values));
        self.p(Op::Param(p), &[])
    }

    fn trained(&mut self, shape: &[u64], offset: f32) -> ValueId {
        let (n, k) = (shape.iter().product(), self.values.len() as u64);
        self.param(&format!("p{k}"), Role::Train, shape, spaced(n, k, offset + 0.0625 * (k % 2) as f32))
    }

    fn index(&mut self, name: &str, values: &[i32]) -> ValueId {
        self.inputs.insert(name.into(), Tensor::i32([values.len() as u64], values.to_vec()));
        let shape = vec![Dim::Known(values.len() as u64)];
        self.p(Op::Input { name: name.into(), dtype: DType::I32, shape }, &[])
    }

    fn p(&mut self, op: Op, x: &[ValueId]) -> ValueId {
        self.e.push(&self.g.params, op, x).unwrap()
    }

    /// The loss is a weighted sum of `y`, so that every element has a cotangent of its own.
    fn loss(&mut self, y: ValueId) -> Graph {
        let ty = self.e.ty(y).clone();
        let shape: Vec<u64> = ty.shape.iter().map(|d| d.eval(&|s| self.symbols.get(&s).copied()).unwrap()).collect();
        let n: u64 = shape.iter().product();
        self.inputs.insert("weights".into(), Tensor::f32(shape, spaced(n, 3, 0.3)));
        let w = self.p(Op::Input { name: "weights".into(), dtype: DType::F32, shape: ty.shape.clone() }, &[]);
        let y = if ty.dtype == DType::F32 { y } else { self.p(Op::Cast(DType::F32), &[y]) };
        let mut loss = self.p(Op::Binary(BinaryOp::Mul), &[y, w]);
        for axis in (0..ty.rank()).rev() {
            loss = self.p(Op::Reduce { op: ReduceOp::Sum, axis: axis as u8 }, &[loss]);
        }
        self.e.output("loss", loss);
        let mut g = self.g.clone();
        g.entries.push(self.e.clone());
        verify(&g).unwrap();
        g
    }

    fn loss_at(&self, g: &Graph, entry: &str, values: &[Tensor]) -> pleach_ir::interp::RunResult {
        let zeros: Vec<Tensor> = g
            .params
            .iter()
            .map(|p| Tensor::zeros(p.ty.dtype, p.ty.shape.iter().map(|d| d.known().unwrap()).collect::<Vec<_>>()))
            .collect();
        let get = |p: ParamId| values.get(p.index()).or(zeros.get(p.index()));
        run_entry_with(&g.params, &get, g.entry(entry).unwrap(), &self.inputs, &self.symbols).unwrap()
    }

    /// The gradients of every trained parameter against differences of fourth order.
    fn check(&self, g: &Graph, name: &str) {
        let out = run(g, &Options::default(), &mut Report::default()).unwrap();
        verify(&out).unwrap_or_else(|e| panic!("{name}: {e}"));
        let after = run_pipeline(&out, &Pipeline::of(&["canonicalize"]), &Options::default()).unwrap().graph;
        let have = self.loss_at(&out, ACCUMULATE, &self.values);
        let simple = self.loss_at(&after, ACCUMULATE, &self.values);
        assert_eq!(have.outputs, self.loss_at(g, TRAIN, &self.values).outputs, "{name}");
        assert_eq!(
            have.assigns.len(),
            self.values.iter().zip(&g.params).filter(|(_, p)| p.role == Role::Train).count()
        );
        for ((grad, t), (_, s)) in have.assigns.iter().zip(&simple.assigns) {
            let of = out.params[grad.index()].name.strip_prefix("grad.").unwrap();
            let p = g.find_param(of).unwrap();
            assert!(s.relative_error(t) < 1e-5, "{name}: {of} after canonicalize");
            for i in 0..t.data.len() {
                let loss = |h: f32| {
                    let mut v = self.values.clone();
                    if let Data::F32(x) = &mut v[p.index()].data {
                        x[i] += h;
                    }
                    f64::from(self.loss_at(g, TRAIN, &v).outputs["loss"].floats()[0])
                };
                let slope = |h: f32| (loss(h) - loss(-h)) / f64::from(2.0 * h);
                let want = (4.0 * slope(1.0 / 64.0) - slope(1.0 / 32.0)) / 3.0;
                let got = f64::from(t.floats()[i]);
                assert!((got - want).abs() < 4e-4 * (1.0 + want.abs()), "{name}: {of}[{i}] is {got}, not {want}");
            }
        }
    }
}

fn known(s: &[u64]) -> Vec<Dim> {
    s.iter().map(|d| Dim::Known(*d)).collect()
}

#[test]
fn functions_of_one_operand() {
    for (u, name) in UnaryOp::ALL {
        if matches!(u, UnaryOp::Floor | UnaryOp::Not) {
            continue;
        }
        let mut c = Case::new();
        let positive = matches!(u, UnaryOp::Log | UnaryOp::Sqrt | UnaryOp::Rsqrt | UnaryOp::Recip);
        let x = c.trained(&[3, 4], if positive { 2.0 } else { 0.06 });
        let y = c.p(Op::Unary(u), &[x]);
        let g = c.loss(y);
        c.check(&g, name);
    }
}

#[test]
fn functions_of_two_operands() {
    for (b, name) in BinaryOp::ALL.into_iter().filter(|(b, _)| rules::flows(&Op::Binary(*b), 0)) {
        for shapes in [[&[3u64, 4][..], &[3, 4]], [&[3, 4], &[]], [&[], &[3, 4]]] {
            let mut c = Case::new();
            let x = c.trained(shapes[0], 0.0);
            let z = c.trained(shapes[1], if b == BinaryOp::Div { 2.0 } else { 0.0 });
            let y = c.p(Op::Binary(b), &[x, z]);
            let g = c.loss(y);
            c.check(&g, name);
        }
    }
    let mut c = Case::new();
    let (x, z, s) = (c.trained(&[3, 4], 0.0), c.trained(&[3, 4], 0.0), c.trained(&[], 0.0));
    let less = c.p(Op::Binary(BinaryOp::Lt), &[x, z]);
    let picked = c.p(Op::Select, &[less, x, s]);
    let again = c.p(Op::Select, &[less, z, picked]);
    let sum = c.p(Op::Add, &[x, picked, s, again, x]);
    let g = c.loss(sum);
    c.check(&g, "select and add");
}

#[test]
fn products_with_every_flag() {
    for (ta, tb, batch) in [(false, false, false), (true, false, true), (false, true, true), (true, true, false)] {
        let mut c = Case::new();
        let shape = |r: u64, k: u64, flip: bool| {
            let m = if flip { [k, r] } else { [r, k] };
            if batch { [&[2][..], &m].concat() } else { m.to_vec() }
        };
        let (x, z) = (c.trained(&shape(3, 4, ta), 0.0), c.trained(&shape(4, 2, tb), 0.0));
        let y = c.p(Op::MatMul { ta, tb }, &[x, z]);
        let g = c.loss(y);
        c.check(&g, &format!("matmul {ta} {tb}"));
        let out = run(&g, &Options::default(), &mut Report::default()).unwrap();
        assert!(!out.entry(ACCUMULATE).unwrap().nodes.iter().any(|n| matches!(n.op, Op::Transpose(_))));
    }
}

#[test]
fn reductions_and_movement() {
    type Make = fn(&mut Case, ValueId, ValueId) -> ValueId;
    let cases: [(&str, Make); 14] = [
        ("reduce_sum", |c, x, _| c.p(Op::Reduce { op: ReduceOp::Sum, axis: 0 }, &[x])),
        ("reduce_max", |c, x, _| c.p(Op::Reduce { op: ReduceOp::Max, axis: 1 }, &[x])),
        ("reduce_min", |c, x, _| c.p(Op::Reduce { op: ReduceOp::Min, axis: 0 }, &[x])),
        ("top_k_values", |c, x, _| {
            let i = c.index("i", &[2, 0, 1, 3]);
            let x = c.p(Op::Gather { axis: 1 }, &[x, i]);
            c.p(Op::TopK { k: 2, indices: false }, &[x])
        }),
        ("reshape", |c, x, _| c.p(Op::Reshape(known(&[2, 6])), &[x])),
        ("transpose", |c, x, _| c.p(Op::Transpose(vec![1, 0]), &[x])),
        ("broadcast", |c, x, _| c.p(Op::Broadcast { shape: known(&[2, 3, 5, 4]), axes: vec![1, 3] }, &[x])),
        ("overlapping slices", |c, x, _| {
            let cut = |c: &mut Case, start, end| c.p(Op::Slice { axis: 1, start, end }, &[x]);
            let (a, b, d) = (cut(c, 0, 2), cut(c, 1, 3), cut(c, 2, 4));
            let d = c.p(Op::Unary(UnaryOp::Exp), &[d]);
            c.p(Op::Concat { axis: 1 }, &[a, b, d])
        }),
        ("pad", |c, x, _| c.p(Op::Pad { axis: 0, lo: 1, hi: 2 }, &[x])),
        ("gather", |c, x, _| {
            let (i, j) = (c.index("i", &[2, 0, 2]), c.index("j", &[1]));
            let (a, b) = (c.p(Op::Gather { axis: 1 }, &[x, i]), c.p(Op::Gather { axis: 1 }, &[x, j]));
            c.p(Op::Concat { axis: 1 }, &[a, b])
        }),
        ("scatter_set", |c, x, z| {
            let i = c.index("i", &[2, 0]);
            let u = c.p(Op::Slice { axis: 0, start: 0, end: 2 }, &[z]);
            c.p(Op::Scatter { axis: 0, mode: ScatterMode::Set }, &[x, i, u])
        }),
        ("scatter_add", |c, x, z| {
            let i = c.index("i", &[2, 0, 2]);
            c.p(Op::Scatter { axis: 0, mode: ScatterMode::Add }, &[x, i, z])
        }),
        ("symbolic rows", |c, x, z| {
            let t = c.index("i", &[0, 2, 1, 1]);
            let wide = c.p(Op::Gather { axis: 0 }, &[x, t]);
            c.p(Op::MatMul { ta: false, tb: true }, &[wide, z])
        }),
        ("stop_gradient keeps the value", |c, x, z| {
            let s = c.p(Op::StopGradient, &[z]);
            let after = c.p(Op::After, &[x, s]);
            let one = c.p(Op::Binary(BinaryOp::Mul), &[after, z]);
            c.p(Op::Add, &[one, x])
        }),
    ];
    for (name, make) in cases {
        let mut c = Case::new();
        let (x, z) = (c.trained(&[3, 4], 0.0), c.trained(&[3, 4], 0.0));
        let y = make(&mut c, x, z);
        // z takes part in every case
        let wide = c.p(Op::Reduce { op: ReduceOp::Sum, axis: 1 }, &[z]);
        let wide = c.p(Op::Reduce { op: ReduceOp::Sum, axis: 0 }, &[wide]);
        let y = c.p(Op::Binary(BinaryOp::Mul), &[y, wide]);
        let g = c.loss(y);
        c.check(&g, name);
    }
}

#[test]
fn attention_with_shared_keys() {
    for window in [None, Some(2)] {
        let at = AttentionAttrs { heads: 4, kv_heads: 2, head_dim: 2, scale: 0.7f32.to_bits(), causal: true, window };
        let mut c = Case::new();
        let (q, k, v) = (c.trained(&[5, 8], 0.0), c.trained(&[5, 4], 0.0), c.trained(&[5, 4], 0.0));
        let bounds = [c.index("segments", &[0, 2, 5]), c.index("start", &[0, 2]), c.index("len", &[2, 3])];
        let y = c.p(Op::Attention(at), &[q, k, v, bounds[0], bounds[1], bounds[2]]);
        let g = c.loss(y);
        c.check(&g, "attention");
    }
}

/// Random compositions of smooth operators over two trained matrices.
#[test]
fn random_graphs() {
    for seed in 0..60u64 {
        let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut below = |n: u64| {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            (s >> 33) % n
        };
        let mut c = Case::new();
        let i = c.index("i", &[2, 0, 1]);
        let mut pool = vec![c.trained(&[3, 3], 0.0), c.trained(&[3, 3], 0.0)];
        for _ in 0..7 {
            let (a, b) = (pool[below(pool.len() as u64) as usize], pool[below(pool.len() as u64) as usize]);
            let (ta, tb) = (below(2) == 0, below(2) == 0);
            let y = match below(10) {
                0 => c.p(Op::Unary(UnaryOp::Sigmoid), &[a]),
                1 => c.p(Op::Unary(UnaryOp::Tanh), &[a]),
                2 => c.p(Op::Binary(BinaryOp::Mul), &[a, b]),
                3 => c.p(Op::Add, &[a, b, a]),
                4 => c.p(Op::Gather { axis: (below(2)) as u8 }, &[a, i]),
                5 => c.p(Op::Scatter { axis: 0, mode: ScatterMode::Add }, &[a, i, b]),
                6 => {
                    let r = c.p(Op::Reduce { op: ReduceOp::Sum, axis: 1 }, &[a]);
                    let r = c.p(Op::Broadcast { shape: known(&[3, 3]), axes: vec![(below(2)) as u8] }, &[r]);
                    c.p(Op::Binary(BinaryOp::Sub), &[b, r])
                }
                7 => {
                    let low = c.p(Op::Slice { axis: 1, start: 0, end: 1 }, &[a]);
                    let high = c.p(Op::Slice { axis: 1, start: 1, end: 3 }, &[b]);
                    c.p(Op::Concat { axis: 1 }, &[high, low])
                }
                _ => c.p(Op::MatMul { ta, tb }, &[a, b]),
            };
            pool.push(c.p(Op::Unary(UnaryOp::Sin), &[y]));
        }
        let mut all = pool.clone();
        all.dedup();
        let y = c.p(Op::Add, &all);
        let g = c.loss(y);
        c.check(&g, &format!("random graph {seed}"));
    }
}

#[test]
fn nothing_is_computed_below_what_is_trained() {
    let mut c = Case::new();
    let x = c.param("x", Role::Frozen, &[4, 4], spaced(16, 1, 0.0));
    let w = c.param("w", Role::Frozen, &[4, 4], spaced(16, 2, 0.0));
    let h = c.p(Op::MatMul { ta: false, tb: true }, &[x, w]);
    let h = c.p(Op::Unary(UnaryOp::Sigmoid), &[h]);
    let a = c.trained(&[2, 4], 0.0);
    let y = c.p(Op::MatMul { ta: false, tb: true }, &[h, a]);
    let g = c.loss(y);
    c.check(&g, "one adapter");
    let out = run(&g, &Options::default(), &mut Report::default()).unwrap();
    let products = |e: &Entry| e.nodes.iter().filter(|n| matches!(n.op, Op::MatMul { .. })).count();
    // x·wᵀ, h·aᵀ and the gradient of a
    assert_eq!(products(out.entry(ACCUMULATE).unwrap()), 3);
    assert_eq!(out.entries.len(), 2);
    assert!(out.entry(TRAIN).is_none());
}

#[test]
fn refuses_what_has_no_gradient() {
    let with = |body: &str, root: &str| {
        format!(
            "graph imported\nparam @0 \"w\" f32[4] train checkpoint(\"w\")\nentry \"train\" {{\n  %0 = param @0 : f32[4]\n{body}  output \"{root}\" %1\n}}\n"
        )
    };
    let run = |text: &str| run(&parse(text).unwrap(), &Options::default(), &mut Report::default());
    let e = run(&with("  %1 = reduce_sum(%0) {axis = 0} : f32[]\n", "y")).unwrap_err().to_string();
    assert!(e.contains("one output \"loss\""), "{e}");
    let e = run(&with("  %1 = exp(%0) : f32[4]\n", "loss")).unwrap_err().to_string();
    assert!(e.contains("f32 of rank 0"), "{e}");
    let half = with("  %1 = reduce_sum(%0) {axis = 0} : f32[]\n", "loss");
    let half =
        half.replace("%0 = param @0 : f32[4]", "%0 = param @0 : bf16[4]").replace("\"w\" f32[4]", "\"w\" bf16[4]");
    let half = half
        .replace("reduce_sum(%0) {axis = 0} : f32[]", "cast(%0) : f32[4]\n  %2 = reduce_sum(%1) {axis = 0} : f32[]");
    let e = run(&half.replace("\"loss\" %1", "\"loss\" %2")).unwrap_err().to_string();
    assert!(e.contains("trained parameters are f32"), "{e}");
}

/// Two steps on two parameters, beside the formula in f64.
#[test]
fn optimizer_steps_as_written() {
    let mut c = Case::new();
    let (x, z) = (c.trained(&[3, 4], 0.0), c.trained(&[5], 0.0));
    let r = c.p(Op::Reduce { op: ReduceOp::Sum, axis: 0 }, &[z]);
    let y = c.p(Op::Binary(BinaryOp::Mul), &[x, r]);
    let g = c.loss(y);
    let g = run(&g, &Options::default(), &mut Report::default()).unwrap();
    let names: Vec<&str> = g.params.iter().map(|p| p.name.as_str()).collect();
    assert_eq!(names, ["p0", "p1", "grad.p0", "adam.m.p0", "adam.v.p0", "grad.p1", "adam.m.p1", "adam.v.p1"]);
    let mut values: Vec<Tensor> = c.values.clone();
    for p in &g.params[2..] {
        let shape: Vec<u64> = p.ty.shape.iter().map(|d| d.known().unwrap()).collect();
        values.push(Tensor::zeros(DType::F32, shape));
    }
    let mut want: Vec<Vec<f64>> =
        values[..2].iter().map(|t| t.floats().iter().map(|x| f64::from(*x)).collect()).collect();
    let mut state = [vec![(0.0, 0.0); 12], vec![(0.0, 0.0); 5]];
    let (lr, beta1, beta2, eps, decay, most) = (0.05f64, 0.9f64, 0.99f64, 1e-6f64, 0.1f64, 0.5f64);
    for step in 1..=2 {
        let set = |values: &mut Vec<Tensor>, r: Vec<(ParamId, Tensor)>| {
            r.into_iter().for_each(|(p, t)| values[p.index()] = t);
        };
        // gradients of two runs add up
        for _ in 0..2 {
            let r = c.loss_at(&g, ACCUMULATE, &values);
            set(&mut values, r.assigns);
        }
        let grads: Vec<Vec<f64>> =
            [2, 5].iter().map(|i| values[*i].floats().iter().map(|x| f64::from(*x)).collect()).collect();
        let norm = grads.iter().flatten().map(|g| g * g).sum::<f64>().sqrt();
        assert!(norm > 1.0, "clipping must do something");
        let inputs = [
            ("lr", lr),
            ("beta1", beta1),
            ("beta2", beta2),
            ("eps", eps),
            ("weight_decay", decay),
            ("correction1", 1.0 - beta1.powi(step)),
            ("correction2", 1.0 - beta2.powi(step)),
            ("max_grad_norm", if step == 1 { most } else { f64::INFINITY }),
        ];
        c.inputs.extend(inputs.map(|(n, x)| (n.to_string(), Tensor::f32([], vec![x as f32]))));
        let r = c.loss_at(&g, UPDATE, &values);
        assert!((f64::from(r.outputs["grad_norm"].floats()[0]) / norm - 1.0).abs() < 1e-6);
        set(&mut values, r.assigns);
        let clip = if step == 1 { most / (norm + 1e-6) } else { 1.0 };
        for p in 0..2 {
            for (i, w) in want[p].iter_mut().enumerate() {
                let g = grads[p][i] * clip;
                let (m, v) = &mut state[p][i];
                *m = beta1 * *m + (1.0 - beta1) * g;
                *v = beta2 * *v + (1.0 - beta2) * g * g;
                *w -= lr * decay * *w;
                let root = (*v / (1.0 - beta2.powi(step))).sqrt();
                *w -= lr / (1.0 - beta1.powi(step)) * *m / (root + eps);
                let got = f64::from(values[p].floats()[i]);
                assert!((got - *w).abs() < 2e-6, "step {step}, parameter {p}[{i}]: {got}, not {w}");
            }
        }
        assert!(values[2].floats().iter().all(|g| *g == 0.0), "gradients are cleared");
    }
}

/// The entry `step` does what `accumulate` and `update` do without clipping, and nothing where the loss is no number.
#[test]
fn a_step_at_once() {
    let mut c = Case::new();
    let (x, z) = (c.trained(&[3, 4], 0.0), c.trained(&[5], 0.0));
    let r = c.p(Op::Reduce { op: ReduceOp::Sum, axis: 0 }, &[z]);
    let y = c.p(Op::Binary(BinaryOp::Mul), &[x, r]);
    // read twice: its gradient is whole after the second
    let y = c.p(Op::Binary(BinaryOp::Mul), &[y, x]);
    let g = c.loss(y);
    let two = run(&g, &Options::default(), &mut Report::default()).unwrap();
    let opts = Options { step_at_once: true, ..Options::default() };
    let one = run(&g, &opts, &mut Report::default()).unwrap();
    verify(&one).unwrap();
    let names = |g: &Graph| g.entries.iter().map(|e| e.name.clone()).collect::<Vec<_>>();
    assert_eq!((names(&two), names(&one)), (vec![ACCUMULATE.into(), UPDATE.into()], vec![STEP.to_string()]));
    assert!(one.params.iter().all(|p| !p.name.starts_with("grad.")));
    let inputs = [("lr", 0.05), ("beta1", 0.9), ("beta2", 0.99), ("eps", 1e-6), ("weight_decay", 0.1)];
    let more = [("correction1", 0.1), ("correction2", 0.01), ("max_grad_norm", f32::INFINITY)];
    c.inputs.extend(inputs.into_iter().chain(more).map(|(n, x)| (n.to_string(), Tensor::f32([], vec![x]))));
    let fill = |g: &Graph| -> Vec<Tensor> {
        let shape = |p: &Param| p.ty.shape.iter().map(|d| d.known().unwrap()).collect::<Vec<_>>();
        let state = g.params[c.values.len()..].iter().map(|p| {
            let n: u64 = shape(p).iter().product();
            Tensor::f32(shape(p), vec![if p.name.starts_with("adam") { 0.25 } else { 0.0 }; n as usize])
        });
        c.values.iter().cloned().chain(state).collect()
    };
    let mut values = fill(&two);
    let loss = c.loss_at(&two, ACCUMULATE, &values);
    loss.assigns.into_iter().for_each(|(p, t)| values[p.index()] = t);
    let want = c.loss_at(&two, UPDATE, &values);
    let got = c.loss_at(&one, STEP, &fill(&one));
    assert_eq!(got.outputs["loss"], loss.outputs["loss"]);
    assert!(got.outputs["grad_norm"].relative_error(&want.outputs["grad_norm"]) < 1e-6);
    assert_eq!(got.assigns.len(), 6);
    let start = fill(&one);
    for (p, t) in &got.assigns {
        let name = &one.params[p.index()].name;
        let (_, w) = want.assigns.iter().find(|(q, _)| two.params[q.index()].name == *name).unwrap();
        assert!(t.relative_error(w) < 1e-6 && *t != start[p.index()], "{name}");
    }
    let mut broken = fill(&one);
    if let Data::F32(x) = &mut broken[0].data {
        x[0] = f32::NAN;
    }
    let none = c.loss_at(&one, STEP, &broken);
    assert!(none.outputs["loss"].floats()[0].is_nan());
    for (p, t) in &none.assigns {
        let bits = |t: &Tensor| t.floats().iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(t), bits(&broken[p.index()]), "{}", one.params[p.index()].name);
    }
}

/// Where the forward half counts something and the step clears it, the step sees the count and has the last word.
#[test]
fn a_step_at_once_sees_what_was_counted() {
    let text = "graph imported\nparam @0 \"w\" f32[4] train checkpoint(\"w\")\nparam @1 \"count\" f32[] stat zeros\nparam @2 \"seen\" f32[] stat zeros\n\
                entry \"train\" {\n  %0 = param @0 : f32[4]\n  %1 = param @1 : f32[]\n  %2 = reduce_sum(%0) {axis = 0} : f32[]\n  %3 = add(%1, %2) : f32[]\n  \
                output \"loss\" %2\n  assign @1 %3\n}\n\
                entry \"optimizer\" {\n  %0 = param @1 : f32[]\n  %1 = const 0.0 : f32[]\n  assign @2 %0\n  assign @1 %1\n}\n";
    let opts = Options { step_at_once: true, ..Options::default() };
    let g = run(&parse(text).unwrap(), &opts, &mut Report::default()).unwrap();
    verify(&g).unwrap();
    let mut c = Case::new();
    let inputs = [("lr", 0.05), ("beta1", 0.9), ("beta2", 0.99), ("eps", 1e-6), ("weight_decay", 0.1)];
    let more = [("correction1", 0.1), ("correction2", 0.01), ("max_grad_norm", f32::INFINITY)];
    c.inputs.extend(inputs.into_iter().chain(more).map(|(n, x)| (n.to_string(), Tensor::f32([], vec![x]))));
    let got = c.loss_at(&g, STEP, &[Tensor::f32([4], vec![0.5, 1.0, 2.0, 3.0]), Tensor::f32([], vec![10.0])]);
    let of = |name: &str| {
        let all: Vec<_> = got.assigns.iter().filter(|(p, _)| g.params[p.index()].name == name).collect();
        assert_eq!(all.len(), 1, "{name}");
        all[0].1.floats()[0]
    };
    assert_eq!((of("seen"), of("count")), (16.5, 0.0));
}

/// Gradients that are only looked at: the same as in training, without moments, an update or parameters that change.
#[test]
fn calibration_has_gradients_and_no_step() {
    let mut c = Case::new();
    let x = c.trained(&[3, 4], 0.0);
    let z = c.trained(&[4, 2], 0.3);
    let y = c.p(Op::MatMul { ta: false, tb: false }, &[x, z]);
    let g = c.loss(y);
    let trained = run(&g, &Options::default(), &mut Report::default()).unwrap();
    let mut looked_at = g.clone();
    looked_at.entries[0].name = CALIBRATE.into();
    let out = run(&looked_at, &Options::default(), &mut Report::default()).unwrap();
    verify(&out).unwrap();
    let names: Vec<&str> = out.entries.iter().map(|e| e.name.as_str()).collect();
    assert_eq!(names, [ACCUMULATE]);
    let params: Vec<(&str, Role)> = out.params.iter().map(|p| (p.name.as_str(), p.role)).collect();
    let state = |n| (n, Role::State);
    assert_eq!(params, [("p0", Role::Frozen), ("p1", Role::Frozen), state("grad.p0"), state("grad.p1")]);
    let gradients = |g: &Graph| -> BTreeMap<String, Tensor> {
        let assigned = c.loss_at(g, ACCUMULATE, &c.values).assigns;
        assigned.into_iter().map(|(p, t)| (g.params[p.index()].name.clone(), t)).collect()
    };
    assert_eq!(gradients(&out), gradients(&trained));
    assert!(gradients(&out)["grad.p0"].floats().iter().any(|x| *x != 0.0));
}
