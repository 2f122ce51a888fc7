//! Scatter kernels against the reference interpreter.

use crate::kit::{Loaded, targets};
use crate::launch::{Random, bits, run};
use pleach_codegen::HostTarget;
use pleach_codegen::emit::scatter;
use pleach_ir::interp::{Tensor, run_kernel};
use pleach_ir::{Class, DType, Dim, Entry, Kernel, Layout, Op, ScatterMode, Sym};

const SYMBOLS: [Sym; 2] = [Sym::T, Sym::C];
const T: Dim = Dim::Symbol(Sym::T);
const C: Dim = Dim::Symbol(Sym::C);

/// Target, update and slice of the update: axis, first, end.
struct Case {
    target: Vec<Dim>,
    source: Vec<Dim>,
    slice: Option<(u8, u64, u64)>,
    axis: u8,
    mode: ScatterMode,
    dtype: DType,
}

fn kernel(c: &Case) -> Kernel {
    let mut e = Entry::new("kernel");
    let input = |e: &mut Entry, i: usize, dtype, shape: &[Dim]| {
        e.push(&[], Op::Input { name: format!("a{i}"), dtype, shape: shape.to_vec() }, &[]).unwrap()
    };
    let x = input(&mut e, 0, c.dtype, &c.target);
    let count = match c.slice {
        Some((a, start, end)) if a == c.axis => Dim::Known(end - start),
        _ => c.source[c.axis as usize],
    };
    let i = input(&mut e, 1, DType::I32, &[count]);
    let mut u = input(&mut e, 2, c.dtype, &c.source);
    if let Some((axis, start, end)) = c.slice {
        u = e.push(&[], Op::Slice { axis, start, end }, &[u]).unwrap();
    }
    let y = e.push(&[], Op::Scatter { axis: c.axis, mode: c.mode }, &[x, i, u]).unwrap();
    e.output("r0", y);
    Kernel {
        name: "scatter_under_test".into(),
        class: Class::Scatter,
        body: e,
        operands: vec![Layout::RowMajor; 3],
        results: vec![Layout::RowMajor],
        aliases: vec![Some(0)],
    }
}

fn check(c: &Case, rows: u64, slots: u64, repeat: bool) {
    let k = kernel(c);
    let r = &mut Random::new(rows * 31 + slots);
    let shape = |dims: &[Dim]| -> Vec<u64> {
        dims.iter().map(|d| d.eval(&|s| Some(if s == Sym::T { rows } else { slots })).unwrap()).collect()
    };
    let tensor = |r: &mut Random, dims: &[Dim]| {
        let s = shape(dims);
        let values = r.floats(s.iter().product::<u64>() as usize).iter().map(|x| x * 50.0).collect();
        Tensor::from_floats(c.dtype, s, values)
    };
    let x = tensor(r, &c.target);
    let u = tensor(r, &c.source);
    let len = x.shape[c.axis as usize];
    let n = shape(&k.operand_types()[1].shape)[0];
    let index: Vec<i32> = (0..n)
        .map(|i| if repeat { r.next() % len.min(3) } else { (len - 1 - i * (len / n.max(1))) % len } as i32)
        .collect();
    let operands = [x, Tensor::i32([n], index), u];
    let want = &run_kernel(&k, &operands).unwrap()[0];
    for target in targets() {
        let e = scatter::emit(&k, &SYMBOLS, target.isa).unwrap();
        let code = Loaded::new(&e.text, &target);
        for backwards in [false, true] {
            let got = run(&code, &k, &e, &SYMBOLS, &operands, backwards);
            if c.mode == ScatterMode::Set {
                assert_eq!(bits(&got), bits(want), "{:?}", target.isa);
            } else {
                let far = got.floats().iter().zip(want.floats().iter()).any(|(a, b)| (a - b).abs() > 1e-3);
                assert!(!far, "{:?}", target.isa);
            }
        }
    }
}

#[test]
fn keys_and_values_into_a_cache() {
    let base = |slice| Case {
        target: vec![C, 192.into()],
        source: vec![T, 960.into()],
        slice: Some(slice),
        axis: 0,
        mode: ScatterMode::Set,
        dtype: DType::F32,
    };
    for rows in [1, 7, 40] {
        check(&base((1, 576, 768)), rows, 100, false);
        check(&base((1, 768, 960)), rows, 100, true);
    }
    // No tokens: nothing is written.
    check(&base((1, 0, 192)), 0, 5, false);
}

#[test]
fn the_last_of_repeated_indices_wins() {
    let c = Case {
        target: vec![C, 37.into()],
        source: vec![T, 37.into()],
        slice: None,
        axis: 0,
        mode: ScatterMode::Set,
        dtype: DType::I32,
    };
    check(&c, 50, 9, true);
    check(&Case { dtype: DType::BF16, ..c }, 50, 9, true);
}

#[test]
fn sums_count_every_index() {
    let c = Case {
        target: vec![C, 70.into()],
        source: vec![T, 70.into()],
        slice: None,
        axis: 0,
        mode: ScatterMode::Add,
        dtype: DType::F32,
    };
    check(&c, 50, 9, true);
    check(&Case { dtype: DType::I32, ..c }, 50, 9, true);
}

#[test]
fn other_axes() {
    let columns = |slice, mode| Case {
        target: vec![T, 64.into()],
        source: vec![T, 24.into()],
        slice,
        axis: 1,
        mode,
        dtype: DType::F32,
    };
    check(&columns(None, ScatterMode::Set), 33, 0, true);
    check(&Case { dtype: DType::BF16, ..columns(None, ScatterMode::Set) }, 33, 0, true);
    check(&columns(None, ScatterMode::Add), 33, 0, true);
    check(&columns(Some((1, 3, 20)), ScatterMode::Set), 5, 0, false);
    let inner = Case {
        target: vec![3.into(), C, 4.into(), 5.into()],
        source: vec![3.into(), T, 4.into(), 9.into()],
        slice: Some((3, 2, 7)),
        axis: 1,
        mode: ScatterMode::Add,
        dtype: DType::F32,
    };
    check(&inner, 6, 10, true);
}

#[test]
fn refuses_what_is_not_in_place() {
    let mut k = kernel(&Case {
        target: vec![C, 8.into()],
        source: vec![T, 8.into()],
        slice: None,
        axis: 0,
        mode: ScatterMode::Add,
        dtype: DType::BF16,
    });
    let isa = HostTarget::avx2().isa;
    let e = scatter::emit(&k, &SYMBOLS, isa).unwrap_err();
    assert!(e.to_string().contains("f32 or i32, not bf16"), "{e}");
    k.aliases = vec![Some(2)];
    let e = scatter::emit(&k, &SYMBOLS, isa).unwrap_err();
    assert!(e.to_string().contains("written over"), "{e}");
}
