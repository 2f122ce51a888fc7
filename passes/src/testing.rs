//! Graphs and comparisons for the tests of this crate.

use pleach_ir::interp::{Symbols, Tensor, run_entry_with};
use pleach_ir::{
    AttentionAttrs, BinaryOp, DType, Dim, Entry, Graph, Op, Param, ParamId, ReduceOp, Role, RootKind, Source, Sym,
    TensorType, UnaryOp, ValueId,
};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A decoder of the usual shape, with low-rank adapters on every linear layer.
#[derive(Clone, Debug)]
pub(crate) struct Decoder {
    pub(crate) layers: usize,
    pub(crate) width: u64,
    pub(crate) kv: u64,
    pub(crate) ff: u64,
    /// Rank of the adapter in each slot.
    pub(crate) ranks: Vec<u64>,
    pub(crate) bias: bool,
}

impl Default for Decoder {
    fn default() -> Decoder {
        Decoder { layers: 1, width: 576, kv: 192, ff: 1536, ranks: vec![16], bias: false }
    }
}

impl Decoder {
    pub(crate) fn tiny(layers: usize, ranks: &[u64]) -> Decoder {
        Decoder { layers, width: 8, kv: 4, ff: 12, ranks: ranks.to_vec(), bias: true }
    }

    pub(crate) fn build(&self) -> Graph {
        let mut b = Build { g: Graph::default(), e: Entry::new("infer") };
        let x = b.push(input("x", DType::F32, &[Dim::Symbol(Sym::T), Dim::Known(self.width)]), &[]);
        let segments = ["q_segments", "kv_start", "kv_len"].map(|n| {
            let s = if n == "q_segments" { Sym::S1 } else { Sym::S };
            b.push(input(n, DType::I32, &[Dim::Symbol(s)]), &[])
        });
        let mut h = x;
        for l in 0..self.layers {
            h = self.layer(&mut b, l, h, segments);
        }
        b.e.output("y", h);
        b.g.entries.push(b.e);
        let mut again = b.g.entries[0].clone();
        again.name = "generate".into();
        b.g.entries.push(again);
        b.g
    }

    fn layer(&self, b: &mut Build, l: usize, h: ValueId, segments: [ValueId; 3]) -> ValueId {
        let name = |s: &str| format!("layers.{l}.{s}");
        let n = b.norm(&name("input_norm"), h, self.width);
        let q = self.linear(b, &name("q_proj"), n, self.width, self.width);
        let k = self.linear(b, &name("k_proj"), n, self.width, self.kv);
        let v = self.linear(b, &name("v_proj"), n, self.width, self.kv);
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
        let o = self.linear(b, &name("o_proj"), a, self.width, self.width);
        let h = b.push(Op::Add, &[h, o]);
        let n = b.norm(&name("post_norm"), h, self.width);
        let g = self.linear(b, &name("gate_proj"), n, self.width, self.ff);
        let u = self.linear(b, &name("up_proj"), n, self.width, self.ff);
        let s = b.push(Op::Unary(UnaryOp::Sigmoid), &[g]);
        let s = b.push(Op::Binary(BinaryOp::Mul), &[s, g]);
        let m = b.push(Op::Binary(BinaryOp::Mul), &[s, u]);
        let d = self.linear(b, &name("down_proj"), m, self.ff, self.width);
        b.push(Op::Add, &[h, d])
    }

    fn linear(&self, b: &mut Build, name: &str, x: ValueId, k: u64, n: u64) -> ValueId {
        let tb = Op::MatMul { ta: false, tb: true };
        let w = b.base(&format!("{name}.weight"), &[n, k]);
        let from = Some(name);
        let mut y = b.push_from(tb.clone(), &[x, w], from);
        if self.bias {
            let c = b.base(&format!("{name}.bias"), &[n]);
            let c = b.push(Op::Broadcast { shape: vec![Dim::Symbol(Sym::T), Dim::Known(n)], axes: vec![1] }, &[c]);
            y = b.push_from(Op::Add, &[y, c], from);
        }
        for (slot, &r) in self.ranks.iter().enumerate() {
            let slot = slot as u32;
            let lora_a = b.slot(slot, &format!("{name}.lora_A"), &[r, k]);
            let lora_b = b.slot(slot, &format!("{name}.lora_B"), &[n, r]);
            let s = b.slot(slot, &format!("{name}.scale"), &[]);
            let t = b.push_from(tb.clone(), &[x, lora_a], from);
            let t = b.push_from(tb.clone(), &[t, lora_b], from);
            let t = b.push_from(Op::Binary(BinaryOp::Mul), &[s, t], from);
            y = b.push_from(Op::Add, &[y, t], from);
        }
        y
    }
}

fn input(name: &str, dtype: DType, shape: &[Dim]) -> Op {
    Op::Input { name: name.into(), dtype, shape: shape.to_vec() }
}

/// A graph of one entry under construction.
pub(crate) struct Build {
    pub(crate) g: Graph,
    pub(crate) e: Entry,
}

impl Build {
    pub(crate) fn push(&mut self, op: Op, inputs: &[ValueId]) -> ValueId {
        self.e.push(&self.g.params, op, inputs).unwrap()
    }

    fn push_from(&mut self, op: Op, inputs: &[ValueId], origin: Option<&str>) -> ValueId {
        self.e.push_from(&self.g.params, op, inputs, origin.map(Arc::from)).unwrap()
    }

    fn param(&mut self, name: &str, shape: &[u64], source: Source) -> ValueId {
        let ty = TensorType::new(DType::F32, shape.iter().copied());
        let p = self.g.add_param(Param { name: name.into(), ty, role: Role::Frozen, source });
        self.push(Op::Param(p), &[])
    }

    pub(crate) fn base(&mut self, name: &str, shape: &[u64]) -> ValueId {
        self.param(name, shape, Source::Checkpoint(name.into()))
    }

    pub(crate) fn slot(&mut self, slot: u32, name: &str, shape: &[u64]) -> ValueId {
        self.param(&format!("slot{slot}.{name}"), shape, Source::Adapter { slot, key: name.into() })
    }

    fn norm(&mut self, name: &str, x: ValueId, d: u64) -> ValueId {
        let t = Dim::Symbol(Sym::T);
        let rows = |axes: Vec<u8>| Op::Broadcast { shape: vec![t, Dim::Known(d)], axes };
        let sq = self.push(Op::Binary(BinaryOp::Mul), &[x, x]);
        let sum = self.push(Op::Reduce { op: ReduceOp::Sum, axis: 1 }, &[sq]);
        let k = self.push(Op::f32(1.0 / d as f32), &[]);
        let mean = self.push(Op::Binary(BinaryOp::Mul), &[sum, k]);
        let eps = self.push(Op::f32(1e-5), &[]);
        let mean = self.push(Op::Add, &[mean, eps]);
        let r = self.push(Op::Unary(UnaryOp::Rsqrt), &[mean]);
        let r = self.push(rows(vec![0]), &[r]);
        let n = self.push(Op::Binary(BinaryOp::Mul), &[x, r]);
        let w = self.base(&format!("{name}.weight"), &[d]);
        let w = self.push(rows(vec![1]), &[w]);
        self.push(Op::Binary(BinaryOp::Mul), &[n, w])
    }
}

/// Numbers in -1..1 from a seed.
pub(crate) fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        (s >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

const SYMBOLS: [(Sym, u64); 5] = [(Sym::T, 5), (Sym::S, 2), (Sym::S1, 3), (Sym::C, 9), (Sym::P, 7)];

/// A tensor of this type at the tests' counts; indices small, floats noise.
pub(crate) fn tensor(ty: &TensorType, seed: u64) -> Tensor {
    let shape: Vec<u64> =
        ty.shape.iter().map(|d| d.eval(&|s| SYMBOLS.iter().find(|x| x.0 == s).map(|x| x.1)).unwrap_or(2)).collect();
    let n = shape.iter().product::<u64>() as usize;
    match ty.dtype {
        DType::I32 => Tensor::i32(shape, (0..n as i32).map(|i| i % 3).collect()),
        DType::Bool => Tensor::bool(shape, &(0..n).map(|i| i % 2 == 0).collect::<Vec<_>>()),
        t => Tensor::from_floats(t, shape, noise(seed, n)),
    }
}

fn symbols() -> Symbols {
    SYMBOLS.into_iter().collect()
}

/// Runs the prepare entries and every other entry of `g` on seeded values; parameters are found by name, so that graphs
/// with different parameter lists see the same values. Results by entry and output.
pub(crate) fn results(g: &Graph) -> BTreeMap<String, Tensor> {
    try_results(g).unwrap_or_else(|x| panic!("{x}"))
}

/// Values of the parameters that are not derived, and of all inputs.
fn seeded(g: &Graph) -> (Vec<Option<Tensor>>, BTreeMap<String, Tensor>) {
    let hash = |s: &str| s.bytes().fold(7u64, |h, c| h.wrapping_mul(31).wrapping_add(u64::from(c)));
    let values: Vec<Option<Tensor>> =
        g.params.iter().map(|p| (p.source != Source::Derived).then(|| tensor(&p.ty, hash(&p.name)))).collect();
    let mut inputs: BTreeMap<String, Tensor> = BTreeMap::new();
    for e in &g.entries {
        for (v, name) in e.inputs() {
            let t = match name {
                "q_segments" => Tensor::i32([3], vec![0, 2, 5]),
                "kv_start" => Tensor::i32([2], vec![0, 2]),
                "kv_len" => Tensor::i32([2], vec![2, 3]),
                _ => tensor(e.ty(v), hash(name)),
            };
            inputs.insert(name.into(), t);
        }
    }
    (values, inputs)
}

/// Panics unless both graphs compute the same after `update` was run: the prepare entries, then `accumulate`, `update`,
/// `accumulate`, each on the parameters as the one before left them.
pub(crate) fn same_after_update(a: &Graph, b: &Graph, tolerance: f64) {
    let after = |g: &Graph| -> BTreeMap<String, Tensor> {
        let (mut values, inputs) = seeded(g);
        let prepare = g.entries.iter().filter(|e| e.name.starts_with("prepare("));
        let run = ["accumulate", "update", "accumulate"].iter().filter_map(|n| g.entry(n));
        let mut out = BTreeMap::new();
        for e in prepare.chain(run) {
            let r = run_entry_with(&g.params, &|p: ParamId| values[p.index()].as_ref(), e, &inputs, &symbols());
            let r = r.unwrap_or_else(|x| panic!("{x}"));
            r.assigns.into_iter().for_each(|(p, t)| values[p.index()] = Some(t));
            out.extend(r.outputs);
        }
        let kept = g.params.iter().zip(values).filter(|(p, _)| p.source != Source::Derived);
        out.extend(kept.filter_map(|(p, v)| Some((p.name.clone(), v?))));
        out
    };
    let (x, y) = (after(a), after(b));
    assert_eq!(x.keys().collect::<Vec<_>>(), y.keys().collect::<Vec<_>>());
    for (k, t) in &x {
        let e = y[k].relative_error(t);
        assert!(e <= tolerance, "{k}: {e}\n{}", pleach_ir::text::print(b));
    }
}

/// As [`results`]; an error when the values do not suit the graph.
pub(crate) fn try_results(g: &Graph) -> Result<BTreeMap<String, Tensor>, pleach_ir::IrError> {
    let (mut values, inputs) = seeded(g);
    let mut out = BTreeMap::new();
    let (prepare, run): (Vec<&Entry>, Vec<&Entry>) = g.entries.iter().partition(|e| e.name.starts_with("prepare("));
    for e in prepare.into_iter().chain(run) {
        let r = run_entry_with(&g.params, &|p: ParamId| values[p.index()].as_ref(), e, &inputs, &symbols());
        let r = r?;
        let derived = |p: ParamId| g.params[p.index()].source == Source::Derived;
        for (p, t) in r.assigns {
            if derived(p) {
                values[p.index()] = Some(t);
            } else {
                out.insert(format!("{}/{}", e.name, g.params[p.index()].name), t);
            }
        }
        out.extend(r.outputs.into_iter().map(|(k, t)| (format!("{}/{k}", e.name), t)));
    }
    Ok(out)
}

/// Panics unless both graphs compute the same outputs and states.
pub(crate) fn same_results(a: &Graph, b: &Graph, tolerance: f64) {
    let (x, y) = (results(a), results(b));
    assert_eq!(x.keys().collect::<Vec<_>>(), y.keys().collect::<Vec<_>>());
    for (k, t) in &x {
        let e = y[k].relative_error(t);
        assert!(e <= tolerance, "{k}: {e}\n{}", pleach_ir::text::print(b));
    }
}

/// Parameters that an entry assigns.
pub(crate) fn assigned(e: &Entry) -> Vec<ParamId> {
    e.roots.iter().filter_map(|r| if let RootKind::Assign(p) = r.kind { Some(p) } else { None }).collect()
}
