//! The cut into kernels against the reference interpreter: schedules compute what their graphs compute.

use pleach_ir::interp::{Tensor, run_entry, run_schedule};
use pleach_ir::*;
use pleach_passes::fuse_kernels::{CutOptions, schedule};
use std::collections::BTreeMap;

type V = ValueId;

/// Builds the nodes of one entry.
struct B<'a> {
    g: &'a mut Graph,
    e: Entry,
}

impl B<'_> {
    fn p(&mut self, op: Op, x: &[V]) -> V {
        self.e.push(&self.g.params, op, x).unwrap_or_else(|e| panic!("{e}"))
    }
    fn weight(&mut self, name: &str, shape: &[u64]) -> V {
        let id = self.g.find_param(name).unwrap_or_else(|| {
            let ty = TensorType::new(DType::F32, shape.iter().copied());
            let source = if name.contains("lora") {
                Source::Adapter { slot: 0, key: name.into() }
            } else {
                Source::Checkpoint(name.into())
            };
            self.g.add_param(Param { name: name.into(), ty, role: Role::Frozen, source })
        });
        self.p(Op::Param(id), &[])
    }
    fn input(&mut self, name: &str, sym: Sym) -> V {
        self.p(Op::Input { name: name.into(), dtype: DType::I32, shape: vec![sym.into()] }, &[])
    }
    fn mul(&mut self, a: V, b: V) -> V {
        self.p(Op::Binary(BinaryOp::Mul), &[a, b])
    }
    fn add(&mut self, a: V, b: V) -> V {
        self.p(Op::Add, &[a, b])
    }
    fn matmul(&mut self, x: V, w: V) -> V {
        self.p(Op::MatMul { ta: false, tb: true }, &[x, w])
    }
    fn rows(&mut self, x: V, like: V) -> V {
        let shape = self.e.ty(like).shape.clone();
        self.p(Op::Broadcast { shape, axes: vec![0] }, &[x])
    }
    fn cols(&mut self, w: V, like: V) -> V {
        let shape = self.e.ty(like).shape.clone();
        let axis = shape.len() as u8 - 1;
        self.p(Op::Broadcast { shape, axes: vec![axis] }, &[w])
    }
    fn rmsnorm(&mut self, x: V, name: &str, d: u64) -> V {
        let sq = self.mul(x, x);
        let s = self.p(Op::Reduce { op: ReduceOp::Sum, axis: 1 }, &[sq]);
        let (inv, eps) = (self.p(Op::f32(1.0 / d as f32), &[]), self.p(Op::f32(1e-5), &[]));
        let m = self.mul(s, inv);
        let m = self.add(m, eps);
        let r = self.p(Op::Unary(UnaryOp::Rsqrt), &[m]);
        let r = self.rows(r, x);
        let y = self.mul(x, r);
        let w = self.weight(name, &[d]);
        let w = self.cols(w, x);
        self.mul(y, w)
    }
    fn linear(&mut self, x: V, name: &str, n: u64, k: u64) -> V {
        let w = self.weight(name, &[n, k]);
        let y = self.matmul(x, w);
        let (a, b) = (self.weight(&format!("{name}.lora_A"), &[4, k]), self.weight(&format!("{name}.lora_B"), &[n, 4]));
        let h = self.matmul(x, a);
        let s = self.weight(&format!("{name}.lora_scale"), &[]);
        let h = self.mul(s, h);
        let h = self.matmul(h, b);
        self.add(y, h)
    }
    fn rope(&mut self, x: V, pos: V, heads: u64, hd: u64) -> V {
        let shape = vec![Dim::Symbol(Sym::T), heads.into(), hd.into()];
        let x3 = self.p(Op::Reshape(shape.clone()), &[x]);
        let mut tables = vec![];
        for name in ["rope.cos", "rope.sin"] {
            let t = self.weight(name, &[64, hd / 2]);
            let t = self.p(Op::Gather { axis: 0 }, &[t, pos]);
            let t = self.p(Op::Concat { axis: 1 }, &[t, t]);
            tables.push(self.p(Op::Broadcast { shape: shape.clone(), axes: vec![0, 2] }, &[t]));
        }
        let lo = self.p(Op::Slice { axis: 2, start: 0, end: hd / 2 }, &[x3]);
        let hi = self.p(Op::Slice { axis: 2, start: hd / 2, end: hd }, &[x3]);
        let hi = self.p(Op::Unary(UnaryOp::Neg), &[hi]);
        let rot = self.p(Op::Concat { axis: 2 }, &[hi, lo]);
        let (a, b) = (self.mul(x3, tables[0]), self.mul(rot, tables[1]));
        let y = self.add(a, b);
        self.p(Op::Reshape(vec![Dim::Symbol(Sym::T), (heads * hd).into()]), &[y])
    }
}

const D: u64 = 32;
const VOCAB: u64 = 50;

/// A decoder of two layers with LoRA branches and rotary embeddings; with `cache`, the `generate` form.
fn decoder(g: &mut Graph, cache: bool) {
    let (heads, kv, hd, ff) = (4, 2, 8, 48);
    let name = if cache { "generate" } else { "infer" };
    let mut b = B { g, e: Entry::new(name) };
    let (ids, pos) = (b.input("input_ids", Sym::T), b.input("positions", Sym::T));
    let seg = b.input("q_segments", Sym::S1);
    let (start, len) = (b.input("kv_start", Sym::S), b.input("kv_len", Sym::S));
    let slots = if cache { Some((b.input("slots", Sym::T), b.input("last", Sym::S))) } else { None };
    let table = b.weight("embed", &[VOCAB, D]);
    let mut x = b.p(Op::Gather { axis: 0 }, &[table, ids]);
    for l in 0..2 {
        let n = |s: &str| format!("l{l}.{s}");
        let h = b.rmsnorm(x, &n("norm1"), D);
        let (q, k, v) =
            (b.linear(h, &n("q"), heads * hd, D), b.linear(h, &n("k"), kv * hd, D), b.linear(h, &n("v"), kv * hd, D));
        let (q, mut k) = (b.rope(q, pos, heads, hd), b.rope(k, pos, kv, hd));
        let mut v = v;
        if let Some((slots, _)) = slots {
            for (t, x) in [("k", &mut k), ("v", &mut v)] {
                let ty = TensorType { dtype: DType::F32, shape: vec![Dim::Symbol(Sym::C), (kv * hd).into()] };
                let p = b.g.add_param(Param {
                    name: format!("cache.{l}.{t}"),
                    ty,
                    role: Role::State,
                    source: Source::Zeros,
                });
                let c = b.p(Op::Param(p), &[]);
                *x = b.p(Op::Scatter { axis: 0, mode: ScatterMode::Set }, &[c, slots, *x]);
                b.e.assign(p, *x);
            }
        }
        let at = AttentionAttrs {
            heads: heads as u32,
            kv_heads: kv as u32,
            head_dim: hd as u32,
            scale: 0.35f32.to_bits(),
            causal: true,
            window: None,
        };
        let o = b.p(Op::Attention(at), &[q, k, v, seg, start, len]);
        let o = b.linear(o, &n("o"), D, heads * hd);
        x = b.add(x, o);
        let h = b.rmsnorm(x, &n("norm2"), D);
        let (gate, up) = (b.linear(h, &n("gate"), ff, D), b.linear(h, &n("up"), ff, D));
        let s = b.p(Op::Unary(UnaryOp::Sigmoid), &[gate]);
        let s = b.mul(gate, s);
        let s = b.mul(s, up);
        let d = b.linear(s, &n("down"), D, ff);
        x = b.add(x, d);
    }
    if let Some((_, last)) = slots {
        x = b.p(Op::Gather { axis: 0 }, &[x, last]);
    }
    let h = b.rmsnorm(x, "norm", D);
    let table = b.weight("embed", &[VOCAB, D]);
    let y = b.matmul(h, table);
    b.e.output("logits", y);
    let e = b.e;
    g.entries.push(e);
}

fn accept(_: &Kernel) -> Result<(), String> {
    Ok(())
}

fn values(g: &Graph, c: u64) -> Vec<Tensor> {
    let mut seed = 1u32;
    g.params
        .iter()
        .map(|p| {
            let shape: Vec<u64> = p.ty.shape.iter().map(|d| d.eval(&|_| Some(c)).unwrap_or(0)).collect();
            let n: u64 = shape.iter().product();
            let data = (0..n)
                .map(|_| {
                    seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    if p.source == Source::Zeros { 0.0 } else { (seed >> 8) as f32 / (1 << 24) as f32 - 0.5 }
                })
                .collect();
            Tensor::f32(shape, data)
        })
        .collect()
}

fn inputs(cache: bool) -> BTreeMap<String, Tensor> {
    let t = |v: &[i32]| Tensor::i32(vec![v.len() as u64], v.to_vec());
    let mut m = BTreeMap::from([
        ("input_ids".to_string(), t(&[3, 1, 4, 1, 5, 9, 2])),
        ("positions".to_string(), t(&[0, 1, 2, 3, 0, 1, 2])),
        ("q_segments".to_string(), t(&[0, 4, 7])),
        ("kv_start".to_string(), t(if cache { &[2, 8] } else { &[0, 4] })),
        ("kv_len".to_string(), t(&[4, 3])),
    ]);
    if cache {
        m.insert("slots".into(), t(&[2, 3, 4, 5, 8, 9, 10]));
        m.insert("last".into(), t(&[3, 6]));
    }
    m
}

/// Runs an entry as a graph and as a schedule, `prepare` entries first, and compares everything it leaves.
fn agree(g: &Graph, s: &Schedule, entry: &str, given: &BTreeMap<String, Tensor>, c: u64) {
    let base = values(g, c);
    let want = run_entry(&g.params, &|p| base.get(p.index()), g.entry(entry).unwrap(), given).unwrap();
    // The schedule may have more parameters; `prepare` fills them.
    let mut now: Vec<Option<Tensor>> = base.iter().cloned().map(Some).collect();
    now.resize(s.params.len(), None);
    for e in s.entries.iter().filter(|e| e.name.starts_with("prepare(")) {
        let none = BTreeMap::new();
        let r = run_schedule(s, &e.name, &|p| now[p.index()].as_ref(), &none).unwrap();
        let assigns = r.assigns.clone();
        for (p, t) in assigns {
            now[p.index()] = Some(t);
        }
    }
    let got = run_schedule(s, entry, &|p| now[p.index()].as_ref(), given).unwrap();
    assert_eq!(want.outputs.len(), got.outputs.len());
    for (name, w) in &want.outputs {
        let e = got.outputs[name].relative_error(w);
        assert!(e < 1e-6, "{entry}: {name} differs by {e}");
    }
    for (p, w) in &want.assigns {
        let (_, x) = got.assigns.iter().find(|(q, _)| q == p).expect("an assignment is missing");
        let e = x.relative_error(w);
        assert!(e < 1e-6, "{entry}: {} differs by {e}", g.params[p.index()].name);
    }
}

fn dump(s: &Schedule, entry: &str) -> String {
    let e = s.entries.iter().find(|e| e.name == entry).unwrap();
    e.steps.iter().map(|st| s.kernels[st.kernel.0 as usize].name.clone()).collect::<Vec<_>>().join("\n")
}

#[test]
fn decoder_runs_as_a_schedule() {
    for cache in [false, true] {
        let mut g = Graph::default();
        decoder(&mut g, cache);
        g.phase = Phase::Core;
        for panels in [&[] as &[u64], &[48, 32, 16]] {
            let s = schedule(&g, &CutOptions { supported: &accept, panels, blocks: Default::default(), picks: None })
                .unwrap();
            let name = if cache { "generate" } else { "infer" };
            agree(&g, &s, name, &inputs(cache), 16);
            if !panels.is_empty() {
                // Equal layers share their kernels: two layers launch about twice what one does, from one set.
                let e = s.entries.iter().find(|e| e.name == name).unwrap();
                let used: std::collections::BTreeSet<u32> = e.steps.iter().map(|st| st.kernel.0).collect();
                assert!(used.len() * 3 < e.steps.len() * 2, "{}", dump(&s, name));
            }
        }
    }
}

#[test]
fn silu_of_gate_times_up_is_one_kernel() {
    let mut g = Graph::default();
    decoder(&mut g, false);
    g.phase = Phase::Core;
    let s = schedule(
        &g,
        &CutOptions { supported: &accept, panels: &[48, 32, 16], blocks: Default::default(), picks: None },
    )
    .unwrap();
    let sigmoid: Vec<&Kernel> =
        s.kernels.iter().filter(|k| k.body.nodes.iter().any(|n| n.op == Op::Unary(UnaryOp::Sigmoid))).collect();
    assert_eq!(sigmoid.len(), 1);
    let products = sigmoid[0].body.nodes.iter().filter(|n| matches!(n.op, Op::MatMul { .. })).count();
    assert_eq!(products, 4, "gate, up and both rank-4 terms share a kernel:\n{}", dump(&s, "infer"));
}

#[test]
fn a_refused_region_is_taken_apart() {
    let mut g = Graph::default();
    decoder(&mut g, false);
    g.phase = Phase::Core;
    let single = |k: &Kernel| {
        let n = k.body.nodes.iter().filter(|n| n.op.is_elementwise()).count();
        if n > 1 { Err("too many".to_string()) } else { Ok(()) }
    };
    let s = schedule(
        &g,
        &CutOptions { supported: &single, panels: &[48, 32, 16], blocks: Default::default(), picks: None },
    )
    .unwrap();
    assert!(s.kernels.iter().all(|k| single(k).is_ok()));
    agree(&g, &s, "infer", &inputs(false), 16);
}
