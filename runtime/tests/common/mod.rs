//! A toy decoder as a plan, its kernels compiled by the C compiler, and what it must compute.
//!
//! `h = emb[ids] * table[positions]`, `m[t]` = mean of `h` over the tokens of the sequence up to `t`, `logits = m @ W`,
//! where `W = head^T + scale * A^T B^T` is made by `prepare(base)` and `prepare(slot0)`.
#![allow(dead_code, unreachable_pub, reason = "each test uses a part")]

use pleach_plan::*;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, OnceLock};

pub const D: usize = 8;
pub const R: usize = 2;
pub const V: usize = 37;
pub const MAX_POSITIONS: u64 = 64;

/// A folder of this test run, removed by nobody: it lies under the build folder.
pub fn folder(name: &str) -> PathBuf {
    let p = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
    std::fs::create_dir_all(&p).unwrap();
    p
}

/// The kernels as a shared object.
pub fn object() -> Vec<u8> {
    static O: OnceLock<Vec<u8>> = OnceLock::new();
    O.get_or_init(|| {
        let out = folder("toy").join("toy.so");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/toy.c");
        let done = Command::new("cc").args(["-O1", "-shared", "-fPIC", "-o"]).arg(&out).arg(source).status();
        assert!(done.expect("the tests need a C compiler called cc").success());
        std::fs::read(out).unwrap()
    })
    .clone()
}

struct Builder {
    plan: Plan,
}

impl Builder {
    fn sym(&self, name: &str) -> Expr {
        self.plan.sym(name).unwrap()
    }

    fn kernel(
        &mut self,
        symbol: &str,
        class: &str,
        tasks: Expr,
        operands: Vec<Expr>,
        results: Vec<Expr>,
        alias: bool,
    ) -> u32 {
        let aliases = results.iter().map(|_| alias.then_some(0)).collect();
        let scratch = if symbol.starts_with("logits") { V as u64 * 4 } else { 0 };
        self.plan.kernels.push(Kernel {
            symbol: symbol.into(),
            blob: 0,
            class: class.into(),
            flops: tasks.clone().mul(D as u64),
            bytes: results.iter().fold(Expr::Const(0), |a, b| a.add(b.clone())),
            tasks,
            scratch_bytes: scratch.into(),
            operands,
            results,
            aliases,
            launches: vec![],
            library: None,
        });
        self.plan.kernels.len() as u32 - 1
    }

    fn param(&mut self, name: &str, shape: Vec<Expr>, role: Role, source: Source) -> u32 {
        self.plan.params.push(Param::new(name, DType::F32, shape, Layout::RowMajor, role, source));
        self.plan.params.len() as u32 - 1
    }
}

/// Inputs of an entry become its first buffers.
fn entry(plan: &Plan, name: &str, inputs: &[&str]) -> Entry {
    let s = |n: &str| plan.sym(n).unwrap();
    let mut e = Entry { name: name.into(), ..Entry::default() };
    for (i, n) in inputs.iter().enumerate() {
        let dim = match *n {
            "q_segments" => s("S1"),
            "kv_start" | "kv_len" | "last" => s("S"),
            _ => s("T"),
        };
        e.buffers.push(Buffer { kind: BufferKind::Input(i as u32), bytes: dim.clone().mul(4), name: n.to_string() });
        let checks = plan.standard_checks(name, n);
        assert!(!checks.is_empty());
        e.inputs.push(Input { name: n.to_string(), dtype: DType::I32, shape: vec![dim], checks });
    }
    e
}

fn buffer(e: &mut Entry, kind: BufferKind, bytes: Expr, name: &str) -> u32 {
    e.buffers.push(Buffer { kind, bytes, name: name.into() });
    e.buffers.len() as u32 - 1
}

fn step(e: &mut Entry, kernel: u32, buffers: &[u32]) {
    e.steps.push(Step { kernel, buffers: buffers.to_vec(), origin: String::new() });
}

/// The toy as a plan.
pub fn plan() -> Plan {
    let mut b = Builder { plan: Plan { symbols: Symbol::list(["T", "S", "S1", "C", "P"]), ..Plan::default() } };
    b.plan.target = Target { arch: std::env::consts::ARCH.into(), features: vec![] };
    b.plan.meta = Meta {
        kind: "decoder".into(),
        vocab: V as u64,
        hidden: D as u64,
        layers: 1,
        max_positions: MAX_POSITIONS,
        eos: vec![V as i32 - 1],
        ..Meta::default()
    };
    b.plan.blobs.push(Blob { name: "toy".into(), kind: BlobKind::HostObject, bytes: object() });
    let k = |n: usize| Expr::Const(n as u64);
    let checkpoint = |n: &str| Source::Checkpoint(n.into());
    let slot = |key: &str| Source::Adapter { slot: 0, key: key.into() };
    let emb = b.param("emb", vec![k(V), k(D)], Role::Frozen, checkpoint("emb"));
    let head = b.param("head", vec![k(V), k(D)], Role::Frozen, checkpoint("head"));
    let packed = b.param("head.packed", vec![k(D), k(V)], Role::Frozen, Source::Derived);
    let p = b.sym("P");
    let table = b.param("table", vec![p.clone()], Role::Frozen, Source::Derived);
    let lora_a = b.param("slot0.head.lora_A", vec![k(R), k(D)], Role::Frozen, slot("head.lora_A"));
    let lora_b = b.param("slot0.head.lora_B", vec![k(V), k(R)], Role::Frozen, slot("head.lora_B"));
    let scale = b.param("slot0.head.scale", vec![], Role::Frozen, slot("head.scale"));
    let merged = b.param("slot0.merged", vec![k(D), k(V)], Role::Frozen, Source::Derived);
    let c = b.sym("C");
    let cache = b.param("cache.0.k", vec![c.clone(), k(D)], Role::State, Source::Zeros);

    let (t, s, s1) = (b.sym("T"), b.sym("S"), b.sym("S1"));
    let w = Expr::Const((D * V * 4) as u64);
    let (td, sd, cd) = (t.clone().mul(D as u64 * 4), s.clone().mul(D as u64 * 4), c.clone().mul(D as u64 * 4));
    let (tv, sv) = (t.clone().mul(V as u64 * 4), s.clone().mul(V as u64 * 4));
    let i32s = |e: &Expr| e.clone().mul(4);
    let ab = [k(R * D * 4), k(V * R * 4), k(4)];
    let k_transpose = b.kernel("transpose", "row", k(D), vec![w.clone()], vec![w.clone()], false);
    let k_table = b.kernel("table", "row", p.clone(), vec![], vec![i32s(&p)], false);
    let k_merge = b.kernel("merge", "row", k(D), [vec![w.clone()], ab.to_vec()].concat(), vec![w.clone()], false);
    let k_embed =
        b.kernel("embed", "row", t.clone(), vec![w.clone(), i32s(&t), i32s(&t), i32s(&p)], vec![td.clone()], false);
    let span = [i32s(&s1), i32s(&s), i32s(&s)];
    let k_mean_t =
        b.kernel("mean", "attention", t.clone(), [vec![td.clone()], span.to_vec()].concat(), vec![td.clone()], false);
    let k_mean_c =
        b.kernel("mean", "attention", t.clone(), [vec![cd.clone()], span.to_vec()].concat(), vec![td.clone()], false);
    let k_append =
        b.kernel("append", "scatter", t.clone(), vec![cd.clone(), td.clone(), i32s(&t)], vec![cd.clone()], true);
    let k_rows = b.kernel("rows", "row", s.clone(), vec![td.clone(), i32s(&s)], vec![sd.clone()], false);
    let k_logits_t =
        b.kernel("logits_t", "contraction", t.clone(), vec![td.clone(), w.clone()], vec![tv.clone()], false);
    let k_logits_s =
        b.kernel("logits_s", "contraction", s.clone(), vec![sd.clone(), w.clone()], vec![sv.clone()], false);

    let mut plan = b.plan;
    let mut e = entry(&plan, "prepare(base)", &[]);
    let (x, y) = (
        buffer(&mut e, BufferKind::Param(head), w.clone(), "head"),
        buffer(&mut e, BufferKind::Param(packed), w.clone(), "packed"),
    );
    let z = buffer(&mut e, BufferKind::Param(table), i32s(&p), "table");
    step(&mut e, k_transpose, &[x, y]);
    step(&mut e, k_table, &[z]);
    plan.entries.push(e);

    let mut e = entry(&plan, "prepare(slot0)", &[]);
    let mut at = vec![buffer(&mut e, BufferKind::Param(packed), w.clone(), "packed")];
    for (p, bytes) in [lora_a, lora_b, scale].into_iter().zip(ab) {
        at.push(buffer(&mut e, BufferKind::Param(p), bytes, "adapter"));
    }
    at.push(buffer(&mut e, BufferKind::Param(merged), w.clone(), "merged"));
    step(&mut e, k_merge, &at);
    plan.entries.push(e);

    // Inputs: 0 ids, 1 positions, 2 q_segments, 3 kv_start, 4 kv_len, then slots and last.
    let mut e = entry(&plan, "infer", &["input_ids", "positions", "q_segments", "kv_start", "kv_len"]);
    let pe = buffer(&mut e, BufferKind::Param(emb), w.clone(), "emb");
    let pt = buffer(&mut e, BufferKind::Param(table), i32s(&p), "table");
    let pw = buffer(&mut e, BufferKind::Param(merged), w.clone(), "merged");
    let h = buffer(&mut e, BufferKind::Arena, td.clone(), "h");
    let m = buffer(&mut e, BufferKind::Arena, td.clone(), "m");
    let y = buffer(&mut e, BufferKind::Output, tv, "logits");
    step(&mut e, k_embed, &[pe, 0, 1, pt, h]);
    step(&mut e, k_mean_t, &[h, 2, 3, 4, m]);
    step(&mut e, k_logits_t, &[m, pw, y]);
    e.outputs.push(Output { name: "logits".into(), buffer: y, dtype: DType::F32, shape: vec![t.clone(), k(V)] });
    plan.entries.push(e);

    let mut e =
        entry(&plan, "generate", &["input_ids", "positions", "q_segments", "kv_start", "kv_len", "slots", "last"]);
    let pe = buffer(&mut e, BufferKind::Param(emb), w.clone(), "emb");
    let pt = buffer(&mut e, BufferKind::Param(table), i32s(&p), "table");
    let pw = buffer(&mut e, BufferKind::Param(merged), w.clone(), "merged");
    let pc = buffer(&mut e, BufferKind::Param(cache), cd, "cache");
    let h = buffer(&mut e, BufferKind::Arena, td.clone(), "h");
    let m = buffer(&mut e, BufferKind::Arena, td, "m");
    let l = buffer(&mut e, BufferKind::Arena, sd, "last rows");
    let y = buffer(&mut e, BufferKind::Output, sv, "logits");
    step(&mut e, k_embed, &[pe, 0, 1, pt, h]);
    step(&mut e, k_append, &[pc, h, 5, pc]);
    step(&mut e, k_mean_c, &[pc, 2, 3, 4, m]);
    step(&mut e, k_rows, &[m, 6, l]);
    step(&mut e, k_logits_s, &[l, pw, y]);
    e.outputs.push(Output { name: "logits".into(), buffer: y, dtype: DType::F32, shape: vec![s, k(V)] });
    plan.entries.push(e);
    plan.settle_residency();
    plan
}

/// Values that look random and are the same everywhere.
pub fn noise(n: usize, salt: u32) -> Vec<f32> {
    let hash = |i: u32| {
        let x = (i ^ salt.wrapping_mul(0x9E37_79B9)).wrapping_mul(0x85EB_CA6B);
        (x ^ (x >> 13)).wrapping_mul(0xC2B2_AE35) >> 8
    };
    (0..n as u32).map(|i| hash(i + 1) as f32 / (1 << 23) as f32 - 1.0).collect()
}

pub fn weights() -> pleach_runtime::InMemory {
    pleach_runtime::InMemory::new().f32("emb", &[V as u64, D as u64], &noise(V * D, 1)).f32(
        "head",
        &[V as u64, D as u64],
        &noise(V * D, 2),
    )
}

pub fn adapter(salt: u32) -> pleach_runtime::InMemory {
    pleach_runtime::InMemory::new()
        .f32("head.lora_A", &[R as u64, D as u64], &noise(R * D, salt))
        .f32("head.lora_B", &[V as u64, R as u64], &noise(V * R, salt + 1))
        .f32("head.scale", &[], &[0.75])
}

pub fn session(threads: usize) -> pleach_runtime::Session {
    let o = pleach_runtime::Options::default().threads(threads).capacity("T", 24).capacity("S", 4).capacity("C", 40);
    pleach_runtime::Session::open(Arc::new(plan()), Arc::new(weights()), &o).unwrap()
}

/// What the toy must give for one sequence: `[len, V]`. `adapter` is the salt of the one in the slot.
pub fn expected(ids: &[i32], adapter: Option<u32>) -> Vec<f32> {
    let (emb, head) = (noise(V * D, 1), noise(V * D, 2));
    let (a, b) = adapter.map_or((vec![0.0; R * D], vec![0.0; V * R]), |s| (noise(R * D, s), noise(V * R, s + 1)));
    let scale = if adapter.is_some() { 0.75 } else { 0.0 };
    let mut sum = [0.0f32; D];
    let mut out = vec![];
    for (t, id) in ids.iter().enumerate() {
        for k in 0..D {
            sum[k] += emb[*id as usize * D + k] * (1.0 + t as f32 / 16.0);
        }
        for j in 0..V {
            let mut x = 0.0;
            for k in 0..D {
                let ba: f32 = (0..R).map(|r| a[r * D + k] * b[j * R + r]).sum();
                x += sum[k] / (t + 1) as f32 * (head[j * D + k] + scale * ba);
            }
            out.push(x);
        }
    }
    out
}

pub fn close(a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len());
    for (i, (x, y)) in a.iter().zip(b).enumerate() {
        assert!((x - y).abs() <= 1e-5 * (1.0 + y.abs()), "{i}: {x} is not {y}");
    }
}

/// Greedy continuation by the reference.
pub fn greedy(prompt: &[i32], n: usize, adapter: Option<u32>) -> Vec<i32> {
    let mut ids = prompt.to_vec();
    for _ in 0..n {
        let all = expected(&ids, adapter);
        let row = &all[all.len() - V..];
        let best = (0..V).fold(0, |b, j| if row[j] > row[b] { j } else { b });
        ids.push(best as i32);
        if best == V - 1 {
            break;
        }
    }
    ids[prompt.len()..].to_vec()
}
