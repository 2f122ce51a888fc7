//! Attention kernels against the reference interpreter.

use crate::kit::{Loaded, targets};
use crate::launch::{Random, bits, run};
use pleach_codegen::HostTarget;
use pleach_codegen::emit::attention;
use pleach_ir::interp::{Tensor, run_kernel};
use pleach_ir::{AttentionAttrs, Class, DType, Dim, Entry, Kernel, Layout, Op, Sym, ValueId};

const SYMBOLS: [Sym; 4] = [Sym::T, Sym::S, Sym::S1, Sym::C];

fn attrs(heads: u32, kv_heads: u32, head_dim: u32, causal: bool, window: Option<u32>) -> AttentionAttrs {
    AttentionAttrs { heads, kv_heads, head_dim, scale: (1.0 / (head_dim as f32).sqrt()).to_bits(), causal, window }
}

fn input(e: &mut Entry, dtype: DType, shape: Vec<Dim>) -> ValueId {
    let name = format!("a{}", e.inputs().len());
    e.push(&[], Op::Input { name, dtype, shape }, &[]).unwrap()
}

fn slice(e: &mut Entry, x: ValueId, start: u32, end: u32) -> ValueId {
    e.push(&[], Op::Slice { axis: 1, start: start.into(), end: end.into() }, &[x]).unwrap()
}

/// With `fused`, q, k and v are slices of one buffer.
fn kernel(at: AttentionAttrs, fused: bool) -> Kernel {
    let mut e = Entry::new("kernel");
    let (qw, kw) = (at.heads * at.head_dim, at.kv_heads * at.head_dim);
    let rows = |s: Sym, w: u32| vec![Dim::Symbol(s), Dim::Known(w.into())];
    let (q, k, v) = if fused {
        let x = input(&mut e, DType::F32, rows(Sym::T, qw + 2 * kw));
        (slice(&mut e, x, 0, qw), slice(&mut e, x, qw, qw + kw), slice(&mut e, x, qw + kw, qw + 2 * kw))
    } else {
        let q = input(&mut e, DType::F32, rows(Sym::T, qw));
        let k = input(&mut e, DType::F32, rows(Sym::C, kw));
        (q, k, input(&mut e, DType::F32, rows(Sym::C, kw)))
    };
    let bounds = [Sym::S1, Sym::S, Sym::S].map(|s| input(&mut e, DType::I32, vec![s.into()]));
    let y = e.push(&[], Op::Attention(at), &[q, k, v, bounds[0], bounds[1], bounds[2]]).unwrap();
    e.output("r0", y);
    let n = e.inputs().len();
    Kernel {
        name: "attention_under_test".into(),
        class: Class::Attention,
        body: e,
        operands: vec![Layout::RowMajor; n],
        results: vec![Layout::RowMajor],
        aliases: vec![None],
    }
}

/// Queries and cached keys of each sequence.
type Batch<'a> = &'a [(usize, usize)];

/// Operands of a batch. Keys of different sequences have gaps of NaN between them.
fn operands(at: AttentionAttrs, fused: bool, batch: Batch, r: &mut Random) -> Vec<Tensor> {
    let (qw, kw) = ((at.heads * at.head_dim) as usize, (at.kv_heads * at.head_dim) as usize);
    let (mut segments, mut start, mut len) = (vec![0i32], vec![], vec![]);
    let mut rows = 3usize;
    for (n, cached) in batch {
        let at = *segments.last().unwrap();
        segments.push(at + *n as i32);
        start.push(if fused { at } else { rows as i32 });
        len.push((n + cached) as i32);
        rows += n + cached + 2;
    }
    let (t, s) = (*segments.last().unwrap() as usize, batch.len() as u64);
    let mut out = vec![];
    if fused {
        out.push(Tensor::f32([t as u64, (qw + 2 * kw) as u64], r.floats(t * (qw + 2 * kw))));
    } else {
        out.push(Tensor::f32([t as u64, qw as u64], r.floats(t * qw)));
        for _ in 0..2 {
            let mut x = vec![f32::NAN; rows * kw];
            for (s, n) in start.iter().zip(&len) {
                let (a, b) = (*s as usize * kw, (s + n) as usize * kw);
                x[a..b].copy_from_slice(&r.floats(b - a));
            }
            out.push(Tensor::f32([rows as u64, kw as u64], x));
        }
    }
    out.extend([Tensor::i32([s + 1], segments), Tensor::i32([s], start), Tensor::i32([s], len)]);
    out
}

fn check(at: AttentionAttrs, fused: bool, batches: &[Batch]) {
    let k = kernel(at, fused);
    for target in targets() {
        let e = attention::emit(&k, &SYMBOLS, &target).unwrap();
        let code = Loaded::new(&e.text, &target);
        for (i, batch) in batches.iter().enumerate() {
            let x = operands(at, fused, batch, &mut Random::new(7 + i as u64));
            let want = run_kernel(&k, &x).unwrap();
            let want = want[0].floats();
            let got = run(&code, &k, &e, &SYMBOLS, &x, false);
            let other = run(&code, &k, &e, &SYMBOLS, &x, true);
            assert_eq!(bits(&got), bits(&other), "the order of tasks changes the result");
            assert_eq!(got.floats().len(), want.len());
            for (j, (a, b)) in got.floats().iter().zip(want.iter()).enumerate() {
                assert!((a - b).abs() <= 4e-6, "{at:?} {batch:?} {:?}: element {j} is {a}, not {b}", target.isa);
            }
        }
    }
}

const RAGGED: &[Batch] = &[
    &[(1, 0)],
    &[(128, 0), (128, 0)],
    &[(1, 0), (0, 0), (2, 0), (17, 0), (0, 0), (70, 0), (3, 0)],
    &[(0, 0), (33, 0), (150, 0), (0, 0)],
];
const CACHED: &[Batch] = &[
    &[(1, 599)],
    &[(1, 0), (1, 1), (1, 63), (1, 64), (1, 65), (1, 400), (0, 9)],
    &[(5, 300), (1, 7), (40, 21), (2, 1100)],
];

#[test]
fn grouped_heads_with_and_without_a_cache() {
    check(attrs(9, 3, 64, true, None), false, CACHED);
    check(attrs(9, 3, 64, true, None), true, RAGGED);
    check(attrs(8, 1, 32, true, None), false, CACHED);
}

#[test]
fn every_head_with_its_own_keys() {
    check(attrs(4, 4, 32, false, None), true, RAGGED);
    check(attrs(2, 2, 128, false, None), false, CACHED);
}

#[test]
fn windows() {
    check(attrs(6, 2, 16, true, Some(1)), false, CACHED);
    check(attrs(6, 2, 16, true, Some(9)), true, RAGGED);
    check(attrs(6, 2, 16, true, Some(100)), false, CACHED);
}

#[test]
fn odd_head_sizes_and_many_query_heads() {
    check(attrs(5, 5, 20, true, None), true, RAGGED);
    check(attrs(4, 2, 7, true, None), false, CACHED);
    check(attrs(71, 1, 8, true, None), true, &[&[(1, 0), (30, 0)]]);
    check(attrs(2, 1, 80, true, None), false, CACHED);
    check(attrs(1, 1, 1, false, None), true, RAGGED);
}

#[test]
fn long_key_ranges_need_no_more_scratch() {
    let at = attrs(2, 1, 16, true, None);
    check(at, false, &[&[(1, 20_000), (20, 9000)]]);
    let e = attention::emit(&kernel(at, false), &SYMBOLS, &HostTarget::avx512()).unwrap();
    assert!(e.scratch_bytes.known().unwrap() < 64 << 10);
}

#[test]
fn large_scores_do_not_overflow() {
    let k = kernel(attrs(3, 1, 16, true, None), true);
    for target in targets() {
        let e = attention::emit(&k, &SYMBOLS, &target).unwrap();
        let code = Loaded::new(&e.text, &target);
        for n in [1, 3, 60] {
            let mut x = operands(attrs(3, 1, 16, true, None), true, &[(n, 0)], &mut Random::new(1));
            let big = x[0].floats().iter().enumerate().map(|(i, v)| if i % 80 < 64 { v * 100.0 } else { *v }).collect();
            x[0] = Tensor::f32(x[0].shape.clone(), big);
            let want = run_kernel(&k, &x).unwrap();
            for (a, b) in run(&code, &k, &e, &SYMBOLS, &x, false).floats().iter().zip(want[0].floats().iter()) {
                assert!((a - b).abs() <= 2e-3, "{a} is not {b}");
            }
        }
    }
}

#[test]
fn refuses_what_it_has_no_code_for() {
    let mut k = kernel(attrs(2, 1, 16, true, None), false);
    let isa = HostTarget::avx2();
    let e = attention::emit(&k, &[Sym::T, Sym::S, Sym::S1], &isa).unwrap_err();
    assert!(e.to_string().contains("symbol C"), "{e}");
    k.body.roots.clear();
    let e = attention::emit(&k, &SYMBOLS, &isa).unwrap_err();
    assert!(e.to_string().contains("attention_under_test") && e.to_string().contains("one result"), "{e}");
}
