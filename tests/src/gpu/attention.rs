//! Attention by itself: every form of it that a model may ask for, forward and backward, on sequences of uneven lengths.

use super::{Compiled, alone, compile, ptxas};
use pleach_codegen::emit::gpu::GpuChip;
use pleach_codegen::ptxas::Resources;
use pleach_ir::{AttentionAttrs, AttentionWrt, Class, DType, Dim, Entry, Graph, Op, Sym, ValueId};
use pleach_passes::Options;
use pleach_plan::Meta;
use std::collections::BTreeMap;

/// A form of attention.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    /// Width of a head.
    pub head_dim: u32,
    /// Query heads, key/value heads.
    pub heads: (u32, u32),
    /// No key after the query; at most so many keys before it.
    pub causal: bool,
    /// As [`AttentionAttrs`] has it.
    pub window: Option<u32>,
    /// Keys and values lie in a cache.
    pub cached: bool,
    /// Gradients beside the result.
    pub gradient: bool,
}

/// A graph that rounds its inputs to bf16 and attends.
///
/// # Errors
/// What the type rules refuse.
pub fn graph(x: &Form) -> Result<Graph, String> {
    let mut g = Graph::default();
    let mut e = Entry::new("infer");
    let at = AttentionAttrs {
        heads: x.heads.0,
        kv_heads: x.heads.1,
        head_dim: x.head_dim,
        scale: (f64::from(x.head_dim).sqrt().recip() as f32).to_bits(),
        causal: x.causal,
        window: x.window,
    };
    let wide = |heads: u32| Dim::Known(u64::from(heads * x.head_dim));
    let keys = Dim::Symbol(if x.cached { Sym::C } else { Sym::T });
    let mut push = |op: Op, list: &[ValueId]| e.push(&[], op, list).map_err(|e| e.to_string());
    let mut input = |name: &str, dtype, shape: Vec<Dim>| push(Op::Input { name: name.into(), dtype, shape }, &[]);
    let rows = Dim::Symbol(Sym::T);
    let mut floats = vec![];
    for (name, shape) in [
        ("q", vec![rows, wide(x.heads.0)]),
        ("k", vec![keys, wide(x.heads.1)]),
        ("v", vec![keys, wide(x.heads.1)]),
        ("d_out", vec![rows, wide(x.heads.0)]),
    ] {
        if name != "d_out" || x.gradient {
            floats.push(input(name, DType::F32, shape)?);
        }
    }
    let bounds = [
        input("q_segments", DType::I32, vec![Dim::Symbol(Sym::S1)])?,
        input("kv_start", DType::I32, vec![Dim::Symbol(Sym::S)])?,
        input("kv_len", DType::I32, vec![Dim::Symbol(Sym::S)])?,
    ];
    let half: Vec<ValueId> = floats.iter().map(|v| push(Op::Cast(DType::BF16), &[*v])).collect::<Result<_, _>>()?;
    let with = |list: &[ValueId]| [list, &bounds].concat();
    let out = push(Op::Attention(at), &with(&half[..3]))?;
    let mut results = vec![("out", push(Op::Cast(DType::F32), &[out])?)];
    if x.gradient {
        let lse = push(Op::AttentionLse(at), &with(&half[..2]))?;
        let list = with(&[half[0], half[1], half[2], out, lse, half[3]]);
        for (name, wrt) in [("dq", AttentionWrt::Q), ("dk", AttentionWrt::K), ("dv", AttentionWrt::V)] {
            let d = push(Op::AttentionGrad { attrs: at, wrt }, &list)?;
            results.push((name, push(Op::Cast(DType::F32), &[d])?));
        }
    }
    results.into_iter().for_each(|(name, v)| e.output(name, v));
    g.entries.push(e);
    Ok(g)
}

/// Counts: one short sequence; some of them empty; some within one block of rows; longer than blocks and tiles.
const COUNTS: [[u64; 3]; 4] = [[1, 1, 1], [5, 7, 1], [70, 2, 1], [150, 3, 1]];
/// One sequence of several blocks of 128 rows, which warpgroups take: some see tiles that others pass over.
const LONG: [u64; 3] = [290, 1, 1];

/// A form, compiled.
///
/// # Errors
/// Whatever refuses.
pub fn compiled(x: &Form, chip: GpuChip) -> Result<Compiled, String> {
    compile(&graph(x)?, &Options::default(), chip, Meta::default())
}

/// Compiles a form, assembles it where there is an assembler, and runs its attention kernels alone. Gives what its entries take.
///
/// # Errors
/// Whatever refuses, spills of registers, and every difference.
pub fn check(x: &Form, chip: GpuChip) -> Result<BTreeMap<String, Resources>, String> {
    let c = compiled(x, chip)?;
    let kernels: Vec<usize> =
        (0..c.schedule.kernels.len()).filter(|i| c.schedule.kernels[*i].class == Class::Attention).collect();
    if kernels.is_empty() {
        return Err("there is no attention kernel".into());
    }
    let mut products = 0;
    for k in kernels {
        let long = (chip == GpuChip::Sm90a).then_some(LONG);
        for (seed, at) in COUNTS.into_iter().chain(long).enumerate() {
            products += alone::check(&c, k, at, seed as u64)?.1.mma_flops;
        }
    }
    if products == 0 && x.head_dim <= 128 {
        return Err("tensor cores are not used".into());
    }
    let (heads, kv) = x.heads;
    let name = format!("attention-{}-{heads}-{kv}-{}-{:?}-{}", x.head_dim, x.causal, x.window, x.cached);
    let mut all = BTreeMap::new();
    for b in &c.plan.blobs {
        all.extend(ptxas::assemble(&name, chip.name(), &b.bytes)?.unwrap_or_default());
    }
    Ok(all)
}

/// What is checked: `full` takes every width.
pub fn forms(full: bool) -> Vec<Form> {
    let mut out = vec![];
    let widths: &[u32] = if full { &[16, 32, 48, 64, 80, 96, 112, 128, 160, 256] } else { &[16, 64, 80] };
    for &head_dim in widths {
        let plain = Form { head_dim, heads: (4, 2), causal: true, window: None, cached: false, gradient: true };
        out.push(plain);
        out.push(Form { window: Some(40), heads: (2, 1), ..plain });
        out.push(Form { causal: false, heads: (2, 2), ..plain });
        out.push(Form { cached: true, gradient: false, ..plain });
    }
    // The widths of large models, with few heads.
    for head_dim in [112, 128, 256].into_iter().filter(|_| !full) {
        let window = (head_dim == 112).then_some(40);
        let x = Form { head_dim, heads: (1, 1), causal: true, window, cached: false, gradient: true };
        out.push(x);
    }
    out
}
