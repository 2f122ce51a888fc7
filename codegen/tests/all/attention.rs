//! Attention kernels against the reference interpreter.

use crate::kit::{Loaded, run_host, targets};
use crate::launch::{Random, bits, dims, run};
use pleach_codegen::HostTarget;
use pleach_codegen::emit::{Emitted, attention};
use pleach_ir::interp::{Tensor, run_kernel};
use pleach_ir::{AttentionAttrs, AttentionWrt, Class, DType, Dim, Entry, Kernel, Layout, Op, Sym, ValueId};

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
    typed_kernel(at, fused, DType::F32, false)
}

/// With `lse`, the log-sum-exp is a second result.
fn typed_kernel(at: AttentionAttrs, fused: bool, dtype: DType, lse: bool) -> Kernel {
    let mut e = Entry::new("kernel");
    let (qw, kw) = (at.heads * at.head_dim, at.kv_heads * at.head_dim);
    let rows = |s: Sym, w: u32| vec![Dim::Symbol(s), Dim::Known(w.into())];
    let (q, k, v) = if fused {
        let x = input(&mut e, dtype, rows(Sym::T, qw + 2 * kw));
        (slice(&mut e, x, 0, qw), slice(&mut e, x, qw, qw + kw), slice(&mut e, x, qw + kw, qw + 2 * kw))
    } else {
        let q = input(&mut e, dtype, rows(Sym::T, qw));
        let k = input(&mut e, dtype, rows(Sym::C, kw));
        (q, k, input(&mut e, dtype, rows(Sym::C, kw)))
    };
    let bounds = [Sym::S1, Sym::S, Sym::S].map(|s| input(&mut e, DType::I32, vec![s.into()]));
    let y = e.push(&[], Op::Attention(at), &[q, k, v, bounds[0], bounds[1], bounds[2]]).unwrap();
    let mut results = vec![y];
    if lse {
        results.insert(0, e.push(&[], Op::AttentionLse(at), &[q, k, bounds[0], bounds[1], bounds[2]]).unwrap());
    }
    finish(e, &results)
}

fn finish(mut e: Entry, results: &[ValueId]) -> Kernel {
    for (i, r) in results.iter().enumerate() {
        e.output(format!("r{i}"), *r);
    }
    Kernel {
        name: "attention_under_test".into(),
        class: Class::Attention,
        operands: vec![Layout::RowMajor; e.inputs().len()],
        results: vec![Layout::RowMajor; results.len()],
        aliases: vec![None; results.len()],
        body: e,
    }
}

/// Gradients with respect to these operands; q, k and v are slices of one buffer with `fused`.
fn grad_kernel(at: AttentionAttrs, fused: bool, dtype: DType, wrt: &[AttentionWrt]) -> Kernel {
    let mut e = Entry::new("kernel");
    let (qw, kw) = (at.heads * at.head_dim, at.kv_heads * at.head_dim);
    let rows = |s: Sym, w: u32| vec![Dim::Symbol(s), Dim::Known(w.into())];
    let mut x = if fused {
        let x = input(&mut e, dtype, rows(Sym::T, qw + 2 * kw));
        vec![slice(&mut e, x, 0, qw), slice(&mut e, x, qw, qw + kw), slice(&mut e, x, qw + kw, qw + 2 * kw)]
    } else {
        vec![
            input(&mut e, dtype, rows(Sym::T, qw)),
            input(&mut e, dtype, rows(Sym::C, kw)),
            input(&mut e, dtype, rows(Sym::C, kw)),
        ]
    };
    x.push(input(&mut e, dtype, rows(Sym::T, qw)));
    x.push(input(&mut e, DType::F32, rows(Sym::T, at.heads)));
    x.push(input(&mut e, dtype, rows(Sym::T, qw)));
    x.extend([Sym::S1, Sym::S, Sym::S].map(|s| input(&mut e, DType::I32, vec![s.into()])));
    let results: Vec<ValueId> =
        wrt.iter().map(|w| e.push(&[], Op::AttentionGrad { attrs: at, wrt: *w }, &x).unwrap()).collect();
    finish(e, &results)
}

fn narrowed(x: &Tensor, dtype: DType) -> Tensor {
    Tensor::from_floats(dtype, x.shape.clone(), x.floats().to_vec())
}

/// Both results, for both element types.
fn check_lse(at: AttentionAttrs, fused: bool, dtype: DType, batches: &[Batch]) {
    let k = typed_kernel(at, fused, dtype, true);
    assert_eq!(attention::supported(&k), Ok(()));
    for target in targets() {
        let e = attention::emit(&k, &SYMBOLS, &target).unwrap();
        let code = Loaded::new(&e.text, &target);
        for (i, batch) in batches.iter().enumerate() {
            let mut x = operands(at, fused, batch, &mut Random::new(17 + i as u64));
            let floats = x.len() - 3;
            x[..floats].iter_mut().for_each(|t| *t = narrowed(t, dtype));
            compare(&code, &k, &e, &x, 4e-6, &format!("{at:?} {batch:?} {:?}", target));
        }
    }
}

fn compare(code: &Loaded, k: &Kernel, e: &Emitted, x: &[Tensor], tolerance: f32, what: &str) {
    let symbols: Vec<(Sym, u64)> = SYMBOLS.iter().copied().zip(dims(k, &SYMBOLS, x)).collect();
    let want = run_kernel(k, x).unwrap();
    let got = run_host(code, k, e, x, &symbols, u64::MAX >> 1);
    let other = run_host(code, k, e, x, &symbols, 1);
    for (r, ((got, other), want)) in got.iter().zip(&other).zip(&want).enumerate() {
        assert_eq!(bits(got), bits(other), "{what}: result {r} depends on the split of tasks");
        // One place of a bf16 beside what arithmetic leaves; weights, which add up to one, may be rounded to bf16 as well.
        let narrow = got.dtype() == DType::BF16;
        let place = if narrow { 1.0 / 128.0 } else { 0.0 };
        let largest = x.iter().filter(|t| t.dtype() == DType::BF16).flat_map(|t| t.floats().to_vec());
        let rounded = if narrow { largest.fold(0.0f32, |m, x| m.max(x.abs())) / 512.0 } else { 0.0 };
        for (j, (a, b)) in got.floats().iter().zip(want.floats().iter()).enumerate() {
            let limit = tolerance * (1.0 + b.abs()) + place * b.abs() + rounded;
            assert!((a - b).abs() <= limit, "{what}: element {j} of result {r} is {a}, not {b}");
        }
    }
}

fn check_grad(at: AttentionAttrs, fused: bool, dtype: DType, wrt: &[AttentionWrt], batches: &[Batch]) {
    let forward = typed_kernel(at, fused, dtype, true);
    let k = grad_kernel(at, fused, dtype, wrt);
    assert_eq!(attention::supported(&k), Ok(()));
    for target in targets() {
        let e = attention::emit(&k, &SYMBOLS, &target).unwrap();
        let code = Loaded::new(&e.text, &target);
        for (i, batch) in batches.iter().enumerate() {
            let r = &mut Random::new(27 + i as u64);
            let mut x = operands(at, fused, batch, r);
            let floats = x.len() - 3;
            // Keys lie one sequence after another, without gaps.
            if !fused {
                let mut next = 0;
                let len = x[5].as_i32().unwrap().to_vec();
                let start: Vec<i32> = len
                    .iter()
                    .map(|n| {
                        next += n;
                        next - n
                    })
                    .collect();
                x[4] = Tensor::i32([start.len() as u64], start);
                let kw = u64::from(at.kv_heads * at.head_dim);
                for t in &mut x[1..3] {
                    *t = Tensor::f32([next as u64, kw], r.floats(next as usize * kw as usize));
                }
            }
            x[..floats].iter_mut().for_each(|t| *t = narrowed(t, dtype));
            let results = run_kernel(&forward, &x).unwrap();
            let shape = results[1].shape.clone();
            let d_out = Tensor::f32(shape.clone(), r.floats((shape[0] * shape[1]) as usize));
            let tail = x.split_off(floats);
            x.extend([results[1].clone(), results[0].clone(), narrowed(&d_out, dtype)]);
            x.extend(tail);
            compare(&code, &k, &e, &x, 4e-5, &format!("{at:?} {batch:?} {:?}", target));
        }
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

const ALL: [AttentionWrt; 3] = [AttentionWrt::Q, AttentionWrt::K, AttentionWrt::V];

#[test]
fn log_sum_exp_and_bf16() {
    check_lse(attrs(9, 3, 64, true, None), true, DType::F32, RAGGED);
    check_lse(attrs(9, 3, 64, true, None), false, DType::BF16, CACHED);
    check_lse(attrs(9, 3, 64, true, None), true, DType::BF16, RAGGED);
    check_lse(attrs(4, 2, 7, true, Some(9)), false, DType::BF16, CACHED);
    check_lse(attrs(2, 2, 80, false, None), true, DType::BF16, RAGGED);
}

#[test]
fn gradients() {
    let open: &[Batch] = &[&[(5, 300), (1, 7), (40, 21), (2, 110)], &[(1, 0), (1, 65)]];
    check_grad(attrs(9, 3, 64, true, None), true, DType::F32, &ALL, RAGGED);
    check_grad(attrs(8, 1, 32, true, None), false, DType::F32, &ALL, open);
    check_grad(attrs(6, 2, 16, true, Some(9)), true, DType::F32, &ALL, RAGGED);
    check_grad(attrs(4, 4, 32, false, None), true, DType::F32, &ALL, RAGGED);
}

#[test]
fn gradients_of_odd_heads_of_bf16_and_of_some_operands() {
    check_grad(attrs(5, 5, 20, true, None), true, DType::F32, &ALL, RAGGED);
    check_grad(attrs(71, 1, 8, true, None), true, DType::F32, &ALL, &[&[(1, 0), (30, 0)]]);
    check_grad(attrs(2, 1, 80, true, None), true, DType::F32, &ALL[1..], RAGGED);
    check_grad(attrs(9, 3, 64, true, None), true, DType::BF16, &ALL, RAGGED);
    check_grad(attrs(4, 2, 7, true, Some(5)), true, DType::BF16, &[ALL[2], ALL[0]], RAGGED);
    check_grad(attrs(2, 2, 128, false, None), true, DType::BF16, &ALL[..1], RAGGED);
}

#[test]
fn refuses_what_it_has_no_code_for() {
    let mut k = kernel(attrs(2, 1, 16, true, None), false);
    let isa = HostTarget::avx2();
    let e = attention::emit(&k, &[Sym::T, Sym::S, Sym::S1], &isa).unwrap_err();
    assert!(e.to_string().contains("symbol C"), "{e}");
    k.body.roots.clear();
    let e = attention::emit(&k, &SYMBOLS, &isa).unwrap_err();
    assert!(e.to_string().contains("attention_under_test") && e.to_string().contains("must be one attention"), "{e}");
}
