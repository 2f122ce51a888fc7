//! Products that read rows or columns of their operands where indices say, in the simulator: of either operand, whichever way round it
//! lies, in whole pieces and element by element, on either chip and with few rows.

use crate::contraction::Build;
use crate::kit::noise;
use crate::simulated::{simulate, simulate_stored};
use pleach_codegen::compile::{supported, supported_gpu};
use pleach_codegen::emit::gpu::GpuChip;
use pleach_codegen::ptxas;
use pleach_ir::interp::Tensor;
use pleach_ir::{BlockFormat, DType, Dim, Kernel, Layout, Op, Sym, ValueId};

const T: Dim = Dim::Symbol(Sym::T);
const ROW: Layout = Layout::RowMajor;

fn pick(b: &mut Build, x: ValueId, index: ValueId, axis: u8) -> ValueId {
    b.op(Op::Gather { axis }, &[x, index])
}

/// Operands of a kernel: floats are noise, indices are below `size`, some of them equal.
fn operands(k: &Kernel, symbols: &[(Sym, u64)], size: u64) -> Vec<Tensor> {
    let env = |x: Sym| symbols.iter().find(|y| y.0 == x).map(|y| y.1);
    let one = |(i, ty): (usize, &pleach_ir::TensorType)| {
        let shape: Vec<u64> = ty.shape.iter().map(|d| d.eval(&env).unwrap()).collect();
        match ty.dtype {
            DType::I32 => {
                let all = (0..shape[0]).map(|j| ((j * 37 + 11) % size) as f32).collect();
                Tensor::from_floats(DType::I32, shape, all)
            }
            dtype => Tensor::from_floats(dtype, shape.clone(), noise(&shape, 5 + i as u64).floats().into_owned()),
        }
    };
    k.operand_types().iter().enumerate().map(one).collect()
}

/// Assembles a kernel, which spills nothing.
fn assemble(chip: GpuChip, ptx: &str) {
    let Some(program) = crate::kit::ptxas() else {
        eprintln!("skipped: nothing is assembled, there is no ptxas; set PLEACH_PTXAS or run `make setup`");
        return;
    };
    let all = ptxas::assemble(&program, ptx.as_bytes(), chip.name()).unwrap();
    assert!(all.values().all(|r| r.spills == 0 && r.stack == 0), "{all:?}");
}

/// Runs a kernel on both chips; says on which it takes matrix instructions of the chip.
fn run(k: &Kernel, dtype: DType, size: u64, counts: &[[u64; 2]]) -> [bool; 2] {
    supported_gpu(k).unwrap();
    assert!(supported(k).is_err(), "the host has no such product");
    let tolerance = if dtype == DType::F32 { 1e-5 } else { 1e-2 };
    let mut out = [false; 2];
    for (n, [t, l]) in counts.iter().enumerate() {
        let symbols = [(Sym::L, *l), (Sym::T, *t)];
        let given = operands(k, &symbols, size);
        for (i, chip) in GpuChip::ALL.into_iter().enumerate() {
            let (ptx, _) = simulate(k, chip, &given, &symbols, tolerance);
            if n == 0 {
                assemble(chip, &ptx);
            }
            out[i] |= ptx.contains(if chip == GpuChip::Sm80 { "mma.sync" } else { "wgmma.mma_async" });
        }
    }
    out
}

const COUNTS: [[u64; 2]; 3] = [[5, 3], [70, 70], [150, 131]];

#[test]
fn rows_of_the_left_operand_are_picked() {
    for dtype in [DType::F32, DType::BF16] {
        let mut b = Build::new();
        let x = b.typed(dtype, &[T, 72.into()], ROW);
        let i = b.typed(DType::I32, &[Dim::Symbol(Sym::L)], ROW);
        let w = b.typed(dtype, &[160.into(), 72.into()], ROW);
        let x = pick(&mut b, x, i, 0);
        let y = b.mm_t(x, w);
        let k = b.done("rows", &[y]);
        assert_eq!(run(&k, dtype, 5, &COUNTS), [dtype == DType::BF16; 2], "{dtype}");
    }
}

#[test]
fn columns_of_the_left_operand_are_picked() {
    for (count, n) in [(16, 128), (80, 72), (24, 36)] {
        let mut b = Build::new();
        let x = b.typed(DType::BF16, &[T, 200.into()], ROW);
        let i = b.typed(DType::I32, &[count.into()], ROW);
        let w = b.typed(DType::BF16, &[n.into(), count.into()], ROW);
        let x = pick(&mut b, x, i, 1);
        let y = b.mm_t(x, w);
        let k = b.done("columns", &[y]);
        assert_eq!(run(&k, DType::BF16, 200, &COUNTS), [true; 2], "{count} of 200, {n} columns");
    }
}

#[test]
fn a_product_of_picked_columns_joins_another_one() {
    for blocks in [None, Some(BlockFormat::Q8_0), Some(BlockFormat::Q4_1)] {
        for (n, depth, count) in [(96, 160, 16), (64, 64, 48)] {
            let mut b = Build::new();
            let x = b.typed(DType::BF16, &[T, depth.into()], ROW);
            let w = b.typed(DType::BF16, &[n.into(), depth.into()], blocks.map_or(ROW, Layout::Blocks));
            let i = b.typed(DType::I32, &[count.into()], ROW);
            let c = b.typed(DType::BF16, &[n.into(), count.into()], ROW);
            let picked = pick(&mut b, x, i, 1);
            let (whole, change) = (b.mm_t(x, w), b.mm_t(picked, c));
            let y = b.op(Op::Add, &[whole, change]);
            let k = b.done("sum", &[y]);
            supported_gpu(&k).unwrap();
            for t in [3, 70, 150] {
                let symbols = [(Sym::T, t)];
                let mut given = operands(&k, &symbols, depth);
                let mut stored: Vec<Vec<u8>> = given.iter().map(Tensor::to_bytes).collect();
                if let Some(format) = blocks {
                    let all = crate::coded::Blocks::noise(format, n as usize, depth as usize, n + depth);
                    (given[1], stored[1]) = (all.values(DType::BF16), all.bytes.clone());
                }
                for chip in GpuChip::ALL {
                    let ran = simulate_stored(&k, chip, (&given, &stored), &symbols, &symbols, 1e-2);
                    let units = if chip == GpuChip::Sm80 || t < 9 { "mma.sync" } else { "wgmma.mma_async" };
                    if t == 3 {
                        assemble(chip, &ran.ptx);
                    }
                    assert!(ran.ptx.contains(units), "{n} by {depth}, {count} picked, T {t} {}", chip.name());
                }
            }
        }
    }
}

#[test]
fn the_right_operand_is_picked_whichever_way_round() {
    // Rows and columns of the stored matrix, along the sum and across it.
    for (axis, tb, wgmma) in [(0, true, true), (0, false, true), (1, true, true), (1, false, true)] {
        let (depth, n) = (96u64, 64u64);
        let mut b = Build::new();
        let x = b.typed(DType::BF16, &[T, depth.into()], ROW);
        let (rows, columns) = if tb { (n, depth) } else { (depth, n) };
        let (count, stored) = if axis == 0 { (rows, [120, columns]) } else { (columns, [rows, 120]) };
        let w = b.typed(DType::BF16, &stored.map(Dim::Known), ROW);
        let i = b.typed(DType::I32, &[count.into()], ROW);
        let w = pick(&mut b, w, i, axis);
        let y = b.op(Op::MatMul { ta: false, tb }, &[x, w]);
        let k = b.done("right", &[y]);
        assert_eq!(run(&k, DType::BF16, 120, &COUNTS), [true, wgmma], "axis {axis}, {tb}");
    }
}

#[test]
fn gradients_pick_columns_of_long_sums() {
    for left in [false, true] {
        for dtype in [DType::F32, DType::BF16] {
            let mut b = Build::new();
            let dy = b.typed(dtype, &[T, 96.into()], ROW);
            let x = b.typed(dtype, &[T, 72.into()], ROW);
            let i = b.typed(DType::I32, &[16.into()], ROW);
            let (a, c) = if left { (pick(&mut b, dy, i, 1), x) } else { (dy, pick(&mut b, x, i, 1)) };
            let y = b.op(Op::MatMul { ta: true, tb: false }, &[a, c]);
            let k = b.done("gradient", &[y]);
            let [warps, _] = run(&k, dtype, if left { 96 } else { 72 }, &[[5, 1], [70, 1], [150, 1]]);
            assert_eq!(warps, dtype == DType::BF16, "left {left} {dtype}");
        }
    }
}
