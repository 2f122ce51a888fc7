//! Weights in blocks of codes on GPUs, in the simulator: products, rows that indices pick, blocks one below the other. What is decoded is
//! the same bits as ever; products of the same tiles give the same bits as those over numbers.

use crate::coded::{Blocks, either_way, picking};
use crate::contraction::Build;
use crate::kit::noise;
use crate::simulated::{Ran, simulate_stored};
use pleach_codegen::compile::supported_gpu;
use pleach_codegen::emit::gpu::GpuChip;
use pleach_ir::interp::Tensor;
use pleach_ir::{BinaryOp, BlockFormat, Class, DType, Dim, Kernel, Layout, Op, Sym, UnaryOp};

const T: Dim = Dim::Symbol(Sym::T);

/// Runs a product of `t` rows, made for `room` more, over a weight as it is stored.
fn run(k: &Kernel, chip: GpuChip, x: &Tensor, w: (&Tensor, &[u8]), room: u64) -> Ran {
    let (t, stored) = (x.shape[0], [x.to_bytes(), w.1.to_vec()]);
    let tolerance = if x.dtype() == DType::F32 { 1e-5 } else { 1e-2 };
    simulate_stored(k, chip, (&[x.clone(), w.0.clone()], &stored), &[(Sym::T, t)], &[(Sym::T, t + room)], tolerance)
}

#[test]
fn products_read_blocks_whichever_way_round() {
    let shapes = [
        (64, 96, false),
        (50, 32, false),
        (33, 64, false),
        (264, 64, false),
        (48, 1056, false),
        (96, 192, true),
        (64, 128, true),
    ];
    for (i, (n, k, halves)) in shapes.into_iter().enumerate() {
        for (j, dtype) in [DType::F32, DType::BF16].into_iter().enumerate() {
            for turned in [false, true] {
                let format = BlockFormat::ALL[(i + j) % 3];
                let blocks = Blocks::noise(format, n as usize, k as usize, n + k);
                let [plain, coded] =
                    [Layout::RowMajor, Layout::Blocks(format)].map(|l| either_way(dtype, (n, k), l, turned, halves));
                supported_gpu(&coded).unwrap();
                let w = blocks.values(dtype);
                // Few rows go another way than many.
                for (t, room) in [(1, 0), (7, 1), (3, 100), (70, 90)] {
                    let shape = [t, if turned { n } else { k }];
                    let x = Tensor::from_floats(dtype, shape, noise(&shape, 3 + t).floats().into_owned());
                    let got = run(&coded, GpuChip::Sm80, &x, (&w, &blocks.bytes), room);
                    let want = run(&plain, GpuChip::Sm80, &x, (&w, &w.to_bytes()), room);
                    let at = format!("{format:?} {dtype} {n}x{k} turned {turned} T {t}");
                    // Tiles of the same kind sum in the same order; few rows of blocks take other elements together, and so do few rows of
                    // numbers across a short sum, which blocks across it have no launch for.
                    let few = t + room <= 8 && (!turned || n <= 128);
                    let same = want.ptx.contains("mma.sync") == got.ptx.contains("mma.sync");
                    if same && !few {
                        assert!(got.results == want.results, "{at}: not the same bits");
                    }
                    if t == 70 {
                        let ran = run(&coded, GpuChip::Sm90a, &x, (&w, &blocks.bytes), room);
                        let columns = if turned { k } else { n };
                        let columns = if halves { columns / 2 } else { columns };
                        // Rows of the left operand that are no whole pieces of 16 bytes are read by elements.
                        assert_eq!(ran.ptx.contains("wgmma"), dtype == DType::BF16 && columns % 4 == 0, "{at}");
                    }
                }
            }
        }
    }
}

/// silu(gate) · up with a scaled branch each, its matrices as numbers: over the same left operand, or over one of rank 16.
fn gated(name: &str, layout: Layout, k: u64, n: u64, same: bool) -> Kernel {
    let mut b = Build::new();
    let x = b.typed(DType::BF16, &[T, k.into()], Layout::RowMajor);
    let mut parts = vec![];
    for _ in 0..2 {
        let w = b.typed(DType::BF16, &[n.into(), k.into()], layout);
        let depth = Dim::Known(if same { k } else { 16 });
        let h = if same { x } else { b.typed(DType::BF16, &[T, depth], Layout::RowMajor) };
        let up = b.typed(DType::BF16, &[n.into(), depth], Layout::RowMajor);
        let s = b.typed(DType::F32, &[], Layout::RowMajor);
        let part = b.mm_t(x, w);
        let other = b.mm_t(h, up);
        let other = b.op(Op::Binary(BinaryOp::Mul), &[other, s]);
        parts.push(b.op(Op::Add, &[part, other]));
    }
    let gate = b.op(Op::Unary(UnaryOp::Sigmoid), &[parts[0]]);
    let gate = b.op(Op::Binary(BinaryOp::Mul), &[parts[0], gate]);
    let y = b.op(Op::Binary(BinaryOp::Mul), &[gate, parts[1]]);
    b.done(name, &[y])
}

#[test]
fn blocks_and_numbers_share_a_left_operand() {
    for (format, t, room) in [(BlockFormat::Q4_0, 5, 0), (BlockFormat::Q4_1, 67, 9), (BlockFormat::Q8_0, 4, 4)] {
        for chip in GpuChip::ALL {
            let (k, n) = (160, 48);
            let kernel = gated("gated", Layout::Blocks(format), k, n, t != 67);
            let (mut operands, mut stored) = (vec![], vec![]);
            for (i, ty) in kernel.operand_types().iter().enumerate() {
                let shape: Vec<u64> = ty.shape.iter().map(|d| d.known().unwrap_or(t)).collect();
                if kernel.operands[i] == Layout::RowMajor {
                    let x = Tensor::from_floats(ty.dtype, shape.clone(), noise(&shape, i as u64).floats().into_owned());
                    stored.push(x.to_bytes());
                    operands.push(x);
                } else {
                    let blocks = Blocks::noise(format, n as usize, k as usize, i as u64);
                    operands.push(blocks.values(ty.dtype));
                    stored.push(blocks.bytes);
                }
            }
            simulate_stored(&kernel, chip, (&operands, &stored), &[(Sym::T, t)], &[(Sym::T, t + room)], 1e-2);
        }
    }
}

#[test]
fn rows_of_blocks_are_picked() {
    for format in BlockFormat::ALL {
        for dtype in [DType::F32, DType::BF16] {
            let (n, k, t) = (19, 96, 21);
            let blocks = Blocks::noise(format, n, k, 7);
            let kernel = picking(dtype, format, (n as u64, k as u64));
            let index = Tensor::i32([t], (0..t as i32).map(|i| i * 7 % n as i32).collect());
            let stored = [blocks.bytes.clone(), index.to_bytes()];
            let operands = [blocks.values(dtype), index];
            simulate_stored(&kernel, GpuChip::Sm80, (&operands, &stored), &[(Sym::T, t)], &[(Sym::T, t + 9)], 0.0);
        }
    }
}

/// Matrices in blocks one below the other: bytes side by side.
fn stacked(format: BlockFormat, parts: &[u64], k: u64, times: usize) -> Kernel {
    let mut b = Build::new();
    let mut results = vec![];
    for _ in 0..times {
        let all: Vec<_> =
            parts.iter().map(|n| b.typed(DType::BF16, &[(*n).into(), k.into()], Layout::Blocks(format))).collect();
        results.push(if all.len() > 1 { b.op(Op::Concat { axis: 0 }, &all) } else { all[0] });
    }
    let k = b.done("stacked", &results);
    Kernel { class: Class::Row, results: vec![Layout::Blocks(format); times], ..k }
}

#[test]
fn blocks_lie_one_below_the_other() {
    for (format, parts, k, times) in [
        (BlockFormat::Q4_0, vec![3, 1, 9], 32, 1),
        (BlockFormat::Q4_1, vec![64, 32], 96, 1),
        (BlockFormat::Q8_0, vec![40, 16], 64, 3),
    ] {
        let kernel = stacked(format, &parts, k, times);
        supported_gpu(&kernel).unwrap();
        let all: Vec<Blocks> = (0..times)
            .flat_map(|t| parts.iter().map(move |n| (t, *n)))
            .map(|(t, n)| Blocks::noise(format, n as usize, k as usize, n + t as u64))
            .collect();
        let operands: Vec<Tensor> = all.iter().map(|b| b.values(DType::BF16)).collect();
        let stored: Vec<Vec<u8>> = all.iter().map(|b| b.bytes.clone()).collect();
        let ran = simulate_stored(&kernel, GpuChip::Sm80, (&operands, &stored), &[], &[], 0.0);
        let want: Vec<Vec<u8>> = stored.chunks(parts.len()).map(<[Vec<u8>]>::concat).collect();
        assert_eq!(ran.results, want, "{format:?}");
    }
}

#[test]
fn what_reads_no_blocks_is_refused() {
    let refused = |k: &Kernel, why: &str| {
        let e = supported_gpu(k).unwrap_err();
        assert!(e.contains(why), "{e}");
    };
    let format = BlockFormat::Q8_0;
    refused(&either_way(DType::BF16, (32, 48), Layout::Blocks(format), false, false), "whole blocks");
    refused(&picking(DType::F32, format, (4, 48)), "whole blocks");
    let mut b = Build::new();
    let w = b.typed(DType::BF16, &[Dim::Known(32), Dim::Known(32)], Layout::Blocks(format));
    let x = b.typed(DType::BF16, &[Dim::Known(32), Dim::Known(8)], Layout::RowMajor);
    let y = b.mm(w, x);
    refused(&b.done("left", &[y]), "no place here");
    let mut k = stacked(format, &[4, 4], 32, 1);
    k.operands[1] = Layout::Blocks(BlockFormat::Q4_0);
    refused(&k, "one below the other");
}

/// Kernels over blocks of a large model: no spills.
#[test]
fn large_kernels_over_blocks_fit_into_registers() {
    let Some(assembler) = crate::kit::ptxas() else {
        eprintln!("skipped: there is no ptxas; set PLEACH_PTXAS or run `make setup`");
        return;
    };
    let mut kernels = vec![];
    for format in BlockFormat::ALL {
        for (name, n, k, turned) in
            [("forward", 6144, 4096, false), ("down", 4096, 14336, false), ("back", 4096, 14336, true)]
        {
            let kernel = either_way(DType::BF16, (n, k), Layout::Blocks(format), turned, false);
            kernels.push(Kernel { name: format!("{name}_{}", format.name()), ..kernel });
        }
        kernels.push(gated(&format!("gated_{}", format.name()), Layout::Blocks(format), 4096, 14336, false));
        let kernel = either_way(DType::F32, (576, 1536), Layout::Blocks(format), false, false);
        kernels.push(Kernel { name: format!("f32_{}", format.name()), ..kernel });
        let kernel = picking(DType::BF16, format, (49152, 576));
        kernels.push(Kernel { name: format!("rows_{}", format.name()), ..kernel });
    }
    crate::resources::no_spills(&assembler, &kernels);
}
