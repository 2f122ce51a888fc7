//! Contraction kernels against the interpreter: element types, operands packed while the kernel runs, sums of products,
//! accumulation in place.

use crate::contraction::{Build, run_within};
use pleach_codegen::emit::contraction::supported;
use pleach_ir::{BinaryOp, DType, Dim, Kernel, Layout, Op, Sym, UnaryOp, ValueId};

const T: Dim = Dim::Symbol(Sym::T);
const S: Dim = Dim::Symbol(Sym::S);
const TYPES: [DType; 2] = [DType::F32, DType::BF16];

fn d(n: u64) -> Dim {
    Dim::Known(n)
}

fn run(k: &Kernel, counts: &[u64]) {
    run_within(k, &counts.iter().map(|t| (*t, 3)).collect::<Vec<_>>(), 3e-6);
}

impl Build {
    fn rows(&mut self, t: DType, shape: [Dim; 2]) -> ValueId {
        self.typed(t, &shape, Layout::RowMajor)
    }
    /// A product `[m, k] x [k, n]` of operands stored as the flags say.
    fn flagged(&mut self, t: DType, [m, k, n]: [Dim; 3], ta: bool, tb: bool) -> ValueId {
        let a = self.rows(t, if ta { [k, m] } else { [m, k] });
        let b = self.rows(t, if tb { [n, k] } else { [k, n] });
        self.op(Op::MatMul { ta, tb }, &[a, b])
    }
    fn times(&mut self, a: ValueId, b: ValueId) -> ValueId {
        self.op(Op::Binary(BinaryOp::Mul), &[a, b])
    }
}

#[test]
fn panels_of_pairs() {
    for (i, (k, n)) in [(48, 96), (7, 64), (1, 16), (33, 50), (40, 1), (2050, 48)].iter().enumerate() {
        for nr in [48, 32, 16] {
            let mut b = Build::new();
            let x = b.rows(DType::BF16, [T, d(*k)]);
            let (transposed, shape) = (i % 2 == 0, if i % 2 == 0 { [d(*n), d(*k)] } else { [d(*k), d(*n)] });
            let w = b.typed(DType::BF16, &shape, Layout::Panels { nr, transposed });
            let y = b.op(Op::MatMul { ta: false, tb: transposed }, &[x, w]);
            run(&b.done("pairs", &[y]), &[0, 1, 3, 15, 67]);
        }
    }
}

#[test]
fn every_flag_and_type() {
    for t in TYPES {
        for (i, (ta, tb)) in [(false, false), (false, true), (true, false), (true, true)].into_iter().enumerate() {
            let known = [(37, 48, 96), (16, 33, 50), (5, 64, 8), (70, 31, 17), (1, 2, 130)];
            let (m, k, n) = known[(i + t as usize) % known.len()];
            let mut b = Build::new();
            let y = b.flagged(t, [d(m), d(k), d(n)], ta, tb);
            run(&b.done("known", &[y]), &[1]);
            let mut b = Build::new();
            let y = b.flagged(t, [T, d(40), d(72)], ta, tb);
            run(&b.done("rows", &[y]), &[0, 1, 9, 66, 600]);
            let mut b = Build::new();
            let y = b.flagged(t, [d(20), T, d(50)], ta, tb);
            run(&b.done("sum", &[y]), &[0, 1, 6, 31, 512, 1025, 2100]);
            let mut b = Build::new();
            let y = b.flagged(t, [T, S, T], ta, tb);
            run(&b.done("all", &[y]), &[0, 1, 50]);
        }
    }
}

#[test]
fn gradients_add_to_what_is_there() {
    for t in TYPES {
        for scaled in [false, true] {
            for (m, n) in [(16, 96), (100, 16), (8, 30)] {
                let mut b = Build::new();
                let y = b.flagged(t, [d(m), T, d(n)], true, false);
                let old = b.input(&[d(m), d(n)]);
                let y = if scaled {
                    let s = b.input(&[]);
                    b.times(s, y)
                } else {
                    y
                };
                let sum = b.op(Op::Add, &[old, y]);
                let mut k = b.done("accumulate", &[sum]);
                k.aliases = vec![Some(2)];
                run(&k, &[0, 1, 7, 130, 1500]);
            }
        }
    }
}

#[test]
fn sums_of_scaled_products() {
    for t in TYPES {
        // The gradient of x under q, k, v and their adapters: weights row-major, adapters thin.
        for (scaled, wide) in [(false, 64), (true, 64), (true, 2500)] {
            let mut b = Build::new();
            let mut terms = vec![];
            for n in [wide, 24, 24] {
                terms.push(b.flagged(t, [T, d(n), d(80)], false, false));
                let thin = b.flagged(t, [T, d(4), d(80)], false, false);
                terms.push(if scaled {
                    let s = b.input(&[]);
                    b.times(thin, s)
                } else {
                    thin
                });
            }
            let r = b.input(&[T, d(80)]);
            let last = b.op(Op::Add, &[terms[5], r]);
            let sum = b.op(Op::Add, &[terms[0], terms[1], terms[2], terms[3], terms[4], last]);
            run(&b.done("dx", &[sum]), &[1, 5, 70]);
        }
        // The longest product is the scaled one, and runs in parts.
        let mut b = Build::new();
        let s = b.input(&[]);
        let (long, thin) =
            (b.flagged(t, [T, d(3000), d(50)], false, true), b.flagged(t, [T, d(5), d(50)], false, true));
        let long = b.times(s, long);
        let sum = b.op(Op::Add, &[thin, long]);
        run(&b.done("scaled_long", &[sum]), &[1, 66]);
    }
}

#[test]
fn types_meet_in_one_sum() {
    let mut b = Build::new();
    let (p, q) =
        (b.flagged(DType::BF16, [T, d(33), d(64)], false, true), b.flagged(DType::F32, [T, d(8), d(64)], false, true));
    let sum = b.op(Op::Add, &[p, q]);
    run(&b.done("mixed", &[sum]), &[1, 40]);
}

#[test]
fn rounded_results_and_epilogues() {
    let mut b = Build::new();
    let x = b.rows(DType::BF16, [T, d(40)]);
    let w = b.typed(DType::BF16, &[d(192), d(40)], Layout::Panels { nr: 48, transposed: true });
    let z = b.mm_t(x, w);
    let g = b.op(Op::Slice { axis: 1, start: 0, end: 96 }, &[z]);
    let u = b.op(Op::Slice { axis: 1, start: 96, end: 192 }, &[z]);
    let s = b.op(Op::Unary(UnaryOp::Sigmoid), &[g]);
    let g = b.times(g, s);
    let y = b.times(g, u);
    let y = b.op(Op::Cast(DType::BF16), &[y]);
    run_within(&b.done("gate", &[y]), &[(1, 1), (9, 1), (67, 1)], 2e-3);

    let mut b = Build::new();
    let y = b.flagged(DType::BF16, [T, d(64), d(48)], false, true);
    let r = b.rows(DType::BF16, [T, d(48)]);
    let r = b.op(Op::Cast(DType::F32), &[r]);
    let sum = b.op(Op::Add, &[y, r]);
    let low = b.op(Op::Cast(DType::BF16), &[sum]);
    run_within(&b.done("residual", &[low, sum]), &[(1, 1), (9, 1), (67, 1)], 2e-3);
}

#[test]
fn heads_of_pairs_as_views() {
    for tb in [false, true] {
        let mut b = Build::new();
        let qkv = b.rows(DType::BF16, [T, d(48)]);
        let part = |b: &mut Build, i: u64, flip: bool| {
            let s = b.op(Op::Slice { axis: 1, start: 16 * i, end: 16 * (i + 1) }, &[qkv]);
            let r = b.op(Op::Reshape(vec![T, d(2), d(8)]), &[s]);
            b.op(Op::Transpose(if flip { vec![1, 2, 0] } else { vec![1, 0, 2] }), &[r])
        };
        let (q, k) = (part(&mut b, 0, false), part(&mut b, 1, !tb));
        let y = b.op(Op::MatMul { ta: false, tb }, &[q, k]);
        run(&b.done("heads", &[y]), &[1, 5, 37]);
    }
}

#[test]
fn a_result_never_lies_over_a_factor() {
    let mut b = Build::new();
    let y = b.flagged(DType::F32, [d(8), d(8), d(8)], false, false);
    let mut k = b.done("over", &[y]);
    k.aliases = vec![Some(0)];
    assert!(supported(&k).unwrap_err().contains("lies over"));
}
