//! Random row kernels against the interpreter.
//!
//! Bodies mix elementwise, reduction and movement operators over static and symbolic rows and ragged sizes. What the
//! emitter refuses is skipped, and counted: most must be accepted. `PLEACH_CASES` sets how many bodies are tried.

use crate::bodies::{B, T, k};
use crate::kit::{check, noise};
use crate::row::emit;
use pleach_codegen::emit::row;
use pleach_ir::interp::Tensor;
use pleach_ir::{BinaryOp, DType, Dim, Kernel, Op, ReduceOp, Sym, UnaryOp, ValueId};

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 33) as usize % n
    }
    fn pick<X: Clone>(&mut self, v: &[X]) -> X {
        v[self.below(v.len())].clone()
    }
}

/// A body under construction: its float values, and how its operands are filled.
struct Gen {
    r: Rng,
    b: B,
    floats: Vec<ValueId>,
    fill: Vec<Option<i32>>,
    rows: Dim,
    /// Vectors and scalars only: a single task.
    whole: bool,
}

const SIZES: [u64; 9] = [1, 2, 5, 15, 16, 17, 31, 40, 64];

impl Gen {
    fn shape(&self, v: ValueId) -> Vec<Dim> {
        self.b.0.ty(v).shape.clone()
    }

    fn arg(&mut self, shape: &[Dim]) -> ValueId {
        self.fill.push(None);
        let half = self.r.below(4) == 0;
        let mut v = self.b.arg(if half { DType::BF16 } else { DType::F32 }, shape);
        if half {
            v = self.b.op(Op::Cast(DType::F32), &[v]);
        }
        self.floats.push(v);
        v
    }

    fn indices(&mut self, len: Dim, below: u64) -> ValueId {
        self.fill.push(Some(below as i32));
        self.b.arg(DType::I32, &[len])
    }

    fn like(&mut self, v: ValueId) -> ValueId {
        let s = self.shape(v);
        let same: Vec<ValueId> = self.floats.iter().copied().filter(|x| self.shape(*x) == s).collect();
        self.r.pick(&same)
    }

    /// An axis of static size, if there is one.
    fn fixed_axis(&mut self, v: ValueId) -> Option<(u8, u64)> {
        let s = self.shape(v);
        let all: Vec<(u8, u64)> =
            s.iter().enumerate().filter_map(|(i, d)| d.known().filter(|n| *n > 0).map(|n| (i as u8, n))).collect();
        if all.is_empty() { None } else { Some(self.r.pick(&all)) }
    }

    fn step(&mut self) {
        let v = self.r.pick(&self.floats.clone());
        let shape = self.shape(v);
        let new = match self.r.below(16) {
            0 => {
                let u = self.r.pick(&[UnaryOp::Tanh, UnaryOp::Sigmoid, UnaryOp::Neg, UnaryOp::Abs, UnaryOp::Erf]);
                self.b.un(u, v)
            }
            1 => {
                let t = self.b.un(UnaryOp::Tanh, v);
                self.b.un(UnaryOp::Exp, t)
            }
            2 | 3 => {
                let w = self.like(v);
                let o = self.r.pick(&[BinaryOp::Sub, BinaryOp::Mul, BinaryOp::Max, BinaryOp::Min]);
                self.b.bin(o, v, w)
            }
            4 => {
                let (w, s) = (self.like(v), self.b.f32(0.5));
                self.b.op(Op::Add, &[v, w, s])
            }
            5 => {
                let w = self.like(v);
                let c = self.b.bin(BinaryOp::Lt, v, w);
                self.b.op(Op::Select, &[c, v, w])
            }
            6 | 7 if self.whole && shape.len() == 1 => {
                let x = self.b.reduce(ReduceOp::Sum, 0, v);
                self.b.un(UnaryOp::Tanh, x)
            }
            6 | 7 if shape.len() > 1 => {
                let axis = if self.r.below(12) == 0 { 0 } else { 1 + self.r.below(shape.len() - 1) };
                let o = self.r.pick(&[ReduceOp::Sum, ReduceOp::Max, ReduceOp::Min]);
                let x = self.b.reduce(o, axis as u8, v);
                self.b.un(UnaryOp::Tanh, x)
            }
            8 => {
                // Back to the shape of another value, where axes fit.
                let target = self.r.pick(&self.floats.clone());
                let to = self.shape(target);
                let mut axes = vec![];
                let mut from = 0;
                for d in &shape {
                    match (from..to.len()).find(|i| to[*i] == *d) {
                        Some(i) => {
                            axes.push(i as u8);
                            from = i + 1;
                        }
                        None => return,
                    }
                }
                self.b.op(Op::Broadcast { shape: to, axes }, &[v])
            }
            9 => {
                let Some((axis, n)) = self.fixed_axis(v) else { return };
                let start = self.r.below(n as usize) as u64;
                let end = start + 1 + self.r.below((n - start) as usize) as u64;
                self.b.slice(axis, start, end, v)
            }
            10 => {
                let Some((axis, n)) = self.fixed_axis(v) else { return };
                if n > 200 {
                    return;
                }
                if self.r.below(2) == 0 {
                    let (lo, hi) = (self.r.below(20) as u64, self.r.below(20) as u64);
                    self.b.op(Op::Pad { axis, lo, hi }, &[v])
                } else {
                    let w = self.like(v);
                    let half = self.b.slice(axis, n / 2, n, w);
                    let half = self.b.un(UnaryOp::Neg, half);
                    self.b.op(Op::Concat { axis }, &[half, v])
                }
            }
            11 if shape.len() > 1 => {
                let mut perm: Vec<u8> = (0..shape.len() as u8).collect();
                let (i, j) = (self.r.below(perm.len()), self.r.below(perm.len()));
                if self.r.below(4) > 0 && (i == 0 || j == 0) {
                    return;
                }
                perm.swap(i, j);
                self.b.op(Op::Transpose(perm), &[v])
            }
            12 if !shape.is_empty() => {
                // Join or divide axes.
                let mut to = shape.clone();
                let i = self.r.below(to.len());
                if self.r.below(2) == 0 && i + 1 < to.len() {
                    let (Some(a), Some(b)) = (to[i].known(), to[i + 1].known()) else { return };
                    to[i] = k(a * b);
                    to.remove(i + 1);
                } else {
                    let Some(n) = to[i].known() else { return };
                    let Some(d) = [2u64, 3, 4, 5, 8, 31].into_iter().find(|d| n % d == 0 && n > *d) else { return };
                    to[i] = k(n / d);
                    to.insert(i + 1, k(d));
                }
                self.b.op(Op::Reshape(to), &[v])
            }
            13 => {
                let Some((axis, n)) = self.fixed_axis(v) else { return };
                let len = if axis == 0 { self.rows } else { k(self.r.pick(&SIZES)) };
                let i = self.indices(len, n);
                self.b.op(Op::Gather { axis }, &[v, i])
            }
            14 => {
                // Through integers and bools; halves are multiples of 1/4, which rounding leaves alone.
                let eight = self.b.f32(8.0);
                let t = self.b.un(UnaryOp::Tanh, v);
                let t = self.b.bin(BinaryOp::Mul, t, eight);
                let i = self.b.op(Op::Cast(DType::I32), &[t]);
                let one = self.b.op(Op::i32(1), &[]);
                let q = self.b.bin(BinaryOp::Div, i, one);
                let c = self.b.bin(BinaryOp::Le, q, one);
                let n = self.b.un(UnaryOp::Not, c);
                let i = self.b.op(Op::Select, &[n, i, q]);
                let h = self.b.op(Op::Cast(self.r.pick(&[DType::BF16, DType::F16])), &[i]);
                let h = self.b.add(h, h);
                let f = self.b.op(Op::Cast(DType::F32), &[h]);
                self.b.un(UnaryOp::Sigmoid, f)
            }
            15 if !shape.is_empty() => {
                let axis = self.r.below(shape.len()) as u8;
                let i = self.b.op(Op::Iota { shape, axis }, &[]);
                let f = self.b.op(Op::Cast(DType::F32), &[i]);
                let s = self.b.f32(0.01);
                let f = self.b.bin(BinaryOp::Mul, f, s);
                self.b.add(f, v)
            }
            _ => return,
        };
        let small = self.b.0.ty(new).shape.iter().filter_map(|d| d.known()).product::<u64>() <= 1 << 14;
        if small {
            self.floats.push(new);
        }
    }

    fn finish(mut self, name: &str) -> (Kernel, Vec<Option<i32>>) {
        let rows = self.rows;
        let fits = |s: &[Dim]| if self.whole { s.len() < 2 } else { s.first() == Some(&rows) };
        let good: Vec<ValueId> = self.floats.iter().copied().filter(|v| fits(&self.shape(*v))).collect();
        let newest = &good[good.len().saturating_sub(4)..];
        let n = 1 + self.r.below(3);
        let mut results: Vec<ValueId> = (0..n).map(|_| self.r.pick(newest)).collect();
        for r in &mut results {
            if self.r.below(4) == 0 {
                *r = self.b.op(Op::Cast(DType::BF16), &[*r]);
            }
        }
        let mut kernel = self.b.kernel(name, &results);
        if self.r.below(3) == 0 {
            // Results take the place of operands.
            let (operands, types) = (kernel.operand_types(), kernel.result_types());
            let mut free: Vec<usize> = (0..operands.len()).collect();
            for (i, t) in types.iter().enumerate() {
                if let Some(at) = free.iter().position(|o| operands[*o] == *t) {
                    kernel.aliases[i] = Some(free.remove(at) as u32);
                }
            }
        }
        (kernel, self.fill)
    }
}

fn body(seed: u64) -> (Kernel, Vec<Option<i32>>, [(Sym, u64); 2]) {
    let mut r = Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    for _ in 0..8 {
        r.below(2);
    }
    let count = r.pick(&[0u64, 1, 2, 3, 16, 33]);
    let rows = if r.below(2) == 0 { T } else { k(count.max(1)) };
    let count = rows.known().unwrap_or(count);
    let (d, e) = (r.pick(&SIZES), r.pick(&SIZES));
    let rank = r.below(6);
    let (c, width) = (Dim::Symbol(Sym::C), r.pick(&[0u64, 1, 7, 16, 50, 70]));
    let mut g = Gen { r, b: B::new(), floats: vec![], fill: vec![], rows, whole: rank == 4 };
    match rank {
        0 => {
            g.arg(&[rows, k(d)]);
            g.arg(&[k(d)]);
        }
        1 => {
            g.arg(&[rows, k(d), k(e)]);
            g.arg(&[rows, k(e)]);
            g.arg(&[k(d), k(e)]);
        }
        2 => {
            // A second symbol within the row.
            g.arg(&[rows, c]);
            g.arg(&[c]);
            g.arg(&[rows, k(d.min(5)), c]);
        }
        3 => {
            g.arg(&[rows, c, k(d)]);
            g.arg(&[c, k(d)]);
            g.arg(&[rows, k(d)]);
        }
        4 => {
            g.arg(&[rows]);
            g.arg(&[c]);
            g.arg(&[]);
        }
        _ => {
            g.arg(&[rows]);
            g.arg(&[rows, k(d)]);
            g.arg(&[k(40), k(d)]);
        }
    }
    let steps = 2 + g.r.below(14);
    for _ in 0..steps {
        g.step();
    }
    let (kernel, fill) = g.finish(&format!("random_{seed}"));
    (kernel, fill, [(Sym::C, width), (Sym::T, count)])
}

#[test]
fn random_bodies_agree_with_the_interpreter() {
    let cases: u64 = std::env::var("PLEACH_CASES").ok().and_then(|s| s.parse().ok()).unwrap_or(80);
    let first: u64 = std::env::var("PLEACH_FIRST").ok().and_then(|s| s.parse().ok()).unwrap_or(0);
    let (mut accepted, mut refused) = (0u64, std::collections::BTreeMap::new());
    for seed in first..first + cases {
        let (kernel, fill, symbols) = body(seed);
        if let Err(why) = row::supported(&kernel) {
            *refused.entry(why).or_insert(0) += 1;
            continue;
        }
        accepted += 1;
        let env = |s: Sym| symbols.iter().find(|x| x.0 == s).map(|x| x.1);
        let operands: Vec<Tensor> = kernel
            .operand_types()
            .iter()
            .zip(&fill)
            .enumerate()
            .map(|(i, (t, fill))| {
                let shape: Vec<u64> = t.shape.iter().map(|d| d.eval(&env).unwrap()).collect();
                let x = noise(&shape, seed * 31 + i as u64 + 1);
                match fill {
                    Some(n) => {
                        let v = x.as_f32().unwrap().iter().map(|x| ((x + 1.0) * 0.5 * *n as f32) as i32 % n);
                        Tensor::i32(shape, v.collect::<Vec<_>>())
                    }
                    None => Tensor::from_floats(t.dtype, shape, x.floats().to_vec()),
                }
            })
            .collect();
        // A place of a bf16 where one is rounded.
        let rounded = kernel.result_types().iter().any(|t| t.dtype == DType::BF16);
        check(emit, &kernel, &operands, &symbols, if rounded { 1.0 / 128.0 } else { 2e-4 });
    }
    assert!(accepted * 2 > cases, "{accepted} of {cases} bodies accepted; refused: {refused:#?}");
}
