//! Seeded values for any graph: parameters and inputs of the right type, with indices and segments in range.
//!
//! A value depends on the seed and on its name alone, so a graph before and after a pass gets the same ones. Integers
//! are fitted to what reads them directly: an index of `gather` or `scatter` stays on its axis (distinct where there is
//! room), the segment operands of `attention` cut the tokens into sequences. Other integers are 0 or 1.

use pleach_ir::interp::{Symbols, Tensor};
use pleach_ir::{DType, Dim, Entry, Graph, Op, Source, Sym, TensorType};
use std::collections::BTreeMap;

/// Values of the symbols that tests use unless a test says otherwise: 5 tokens in 2 sequences.
pub fn symbols() -> Symbols {
    [(Sym::T, 5), (Sym::S, 2), (Sym::S1, 3), (Sym::C, 16), (Sym::P, 16), (Sym::L, 3)].into_iter().collect()
}

/// SplitMix64 started from a seed and a name.
pub struct Rng(u64);

impl Rng {
    /// A stream of its own for each seed and name.
    pub fn new(seed: u64, name: &str) -> Rng {
        // FNV-1a over the name.
        let h = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        Rng(h ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.bits() % n.max(1)
    }

    /// From -1 to 1.
    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

/// The numbers of a shape; a symbol without a value counts as 3.
pub fn shape(ty: &TensorType, symbols: &Symbols) -> Vec<u64> {
    ty.shape.iter().map(|d| d.eval(&|s| symbols.get(&s).copied()).unwrap_or(3)).collect()
}

/// A tensor of this type: floats from -1 to 1, integers and bools 0 or 1.
pub fn tensor(ty: &TensorType, symbols: &Symbols, seed: u64, name: &str) -> Tensor {
    let shape = shape(ty, symbols);
    let n = shape.iter().product::<u64>();
    let mut rng = Rng::new(seed, name);
    let values = match ty.dtype {
        DType::I32 | DType::Bool => (0..n).map(|_| rng.below(2) as f32).collect(),
        _ => (0..n).map(|_| rng.unit()).collect(),
    };
    Tensor::from_floats(ty.dtype, shape, values)
}

/// Values by name for every parameter that does not come out of a `prepare` entry of the graph.
pub fn params(g: &Graph, symbols: &Symbols, seed: u64) -> BTreeMap<String, Tensor> {
    let filled = |i: usize| {
        let roots = g.entries.iter().filter(|e| e.name.starts_with("prepare")).flat_map(|e| &e.roots);
        roots.into_iter().any(|r| matches!(r.kind, pleach_ir::RootKind::Assign(p) if p.index() == i))
    };
    let given = g.params.iter().enumerate().filter(|(i, p)| p.source != Source::Derived || !filled(*i));
    given.map(|(i, p)| (p.name.clone(), fitted(g, i, symbols, seed))).collect()
}

/// A parameter's value; integer parameters are fitted to their readers.
fn fitted(g: &Graph, param: usize, symbols: &Symbols, seed: u64) -> Tensor {
    let p = &g.params[param];
    for e in &g.entries {
        for v in e.values() {
            if matches!(&e.node(v).op, Op::Param(q) if q.index() == param)
                && let Some(t) = integers(e, v, &p.ty, symbols, seed, &p.name)
            {
                return t;
            }
        }
    }
    tensor(&p.ty, symbols, seed, &p.name)
}

/// Values by name for the inputs of an entry.
pub fn inputs(e: &Entry, symbols: &Symbols, seed: u64) -> BTreeMap<String, Tensor> {
    let one = |(v, name): (pleach_ir::ValueId, &str)| {
        let ty = e.ty(v);
        let t = integers(e, v, ty, symbols, seed, name).unwrap_or_else(|| tensor(ty, symbols, seed, name));
        (name.to_string(), t)
    };
    e.inputs().into_iter().map(one).collect()
}

/// Integers that suit what reads input `v` of an entry; `None` when nothing particular reads it.
pub fn indices(e: &Entry, v: pleach_ir::ValueId, symbols: &Symbols, seed: u64, name: &str) -> Option<Tensor> {
    integers(e, v, e.ty(v), symbols, seed, name)
}

/// Integers of rank 1 that suit the operators reading `v`; `None` when nothing particular reads it.
fn integers(
    e: &Entry,
    v: pleach_ir::ValueId,
    ty: &TensorType,
    symbols: &Symbols,
    seed: u64,
    name: &str,
) -> Option<Tensor> {
    if ty.dtype != DType::I32 || ty.rank() != 1 {
        return None;
    }
    let n = shape(ty, symbols)[0];
    let size = |d: Dim| d.eval(&|s| symbols.get(&s).copied()).unwrap_or(3);
    let mut limit: Option<u64> = None;
    for node in &e.nodes {
        let at = |i: usize| node.inputs.get(i) == Some(&v);
        match &node.op {
            Op::Gather { axis } | Op::Scatter { axis, .. } if at(1) => {
                let len = size(e.ty(node.inputs[0]).shape[*axis as usize]);
                limit = Some(limit.map_or(len, |l| l.min(len)));
            }
            op if op.is_attention() && node.inputs[node.inputs.len() - 3..].contains(&v) => {
                // The last three operands: where sequences start, where their keys start, how many keys they have.
                let first = node.inputs.len() - 3;
                let at = |i: usize| at(first + i - 3);
                let (q, k) = (e.ty(node.inputs[0]).shape[0], e.ty(node.inputs[1]).shape[0]);
                let sequences = shape(e.ty(node.inputs[first + 1]), symbols)[0].max(1);
                let tokens = size(q);
                let cut = |s: u64| s * tokens / sequences;
                // Keys of this run, or a cache in which every sequence has an equal share.
                let share = size(k) / sequences;
                let value = |s: u64| match (at(3), at(4), q == k) {
                    (true, _, _) => cut(s),
                    (_, true, true) => cut(s),
                    (_, true, false) => s * share,
                    (_, _, true) => cut(s + 1) - cut(s),
                    (_, _, false) => share,
                };
                return Some(Tensor::i32([n], (0..n).map(|s| value(s) as i32).collect()));
            }
            _ => {}
        }
    }
    let len = limit?;
    let mut rng = Rng::new(seed, name);
    let mut all: Vec<u64> = (0..len).collect();
    let pick = |i: u64| {
        if n > len {
            return rng.below(len) as i32;
        }
        let j = i + rng.below(len - i);
        all.swap(i as usize, j as usize);
        all[i as usize] as i32
    };
    Some(Tensor::i32([n], (0..n).map(pick).collect()))
}
