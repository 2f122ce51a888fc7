//! Rows and columns of their own laid over weights in blocks, on GPUs: in the simulator, and assembled for a large model.

use crate::coded::{Blocks, laid_over};
use crate::kit::noise;
use crate::simulated::simulate_stored;
use pleach_codegen::compile::supported_gpu;
use pleach_codegen::emit::gpu::GpuChip;
use pleach_ir::interp::Tensor;
use pleach_ir::{BlockFormat, DType, Kernel, Sym};

#[test]
fn products_read_blocks_with_parts_laid_over_them() {
    let (f32, bf16) = (DType::F32, DType::BF16);
    for (i, (n, k)) in [(64u64, 96u64), (160, 128), (40, 64), (288, 32)].into_iter().enumerate() {
        for (j, [stored, dtype]) in [[bf16, bf16], [f32, f32], [f32, bf16]].into_iter().enumerate() {
            for (turned, axis) in [(false, 0), (false, 1), (true, 0), (true, 1)] {
                let format = BlockFormat::ALL[(i + j) % 3];
                let blocks = Blocks::noise(format, n as usize, k as usize, n + k);
                let length = if axis == 0 { n } else { k };
                // Of the repeated one the last counts.
                let picked = [length - 1, 0, length / 2, 17 % length, length / 2];
                let count = picked.len() as u64;
                let kernel = laid_over([stored, dtype], (n, k), turned, Some((format, axis, count)));
                supported_gpu(&kernel).unwrap();
                let shape = if axis == 0 { [count, k] } else { [n, count] };
                let values = noise(&shape, 11).floats().iter().map(|x| 8.0 + x).collect();
                let values = Tensor::from_floats(stored, shape, values);
                let index = Tensor::i32([count], picked.iter().map(|x| *x as i32).collect());
                for t in [3, 70, 150] {
                    let shape = [t, if turned { n } else { k }];
                    let x = Tensor::from_floats(dtype, shape, noise(&shape, 3 + t).floats().into_owned());
                    let given = [x, blocks.values(stored), index.clone(), values.clone()];
                    let mut bytes: Vec<Vec<u8>> = given.iter().map(Tensor::to_bytes).collect();
                    bytes[1] = blocks.bytes.clone();
                    for chip in GpuChip::ALL {
                        let symbols = [(Sym::T, t)];
                        let tolerance = if dtype == f32 { 1e-5 } else { 1e-2 };
                        let ran = simulate_stored(&kernel, chip, (&given, &bytes), &symbols, &symbols, tolerance);
                        let units = if chip == GpuChip::Sm80 { "mma.sync" } else { "wgmma.mma_async" };
                        let at = format!("{n}x{k} {stored} {dtype} turned {turned} axis {axis} T {t} {}", chip.name());
                        assert_eq!(ran.ptx.contains(units), dtype == bf16, "{at}");
                    }
                }
            }
        }
    }
}

#[test]
fn large_kernels_with_parts_laid_over_fit_into_registers() {
    let Some(assembler) = crate::kit::ptxas() else {
        eprintln!("skipped: there is no ptxas; set PLEACH_PTXAS or run `make setup`");
        return;
    };
    let mut kernels = vec![];
    for format in BlockFormat::ALL {
        for (name, n, k, turned) in [("forward", 4096, 4096, false), ("back", 4096, 14336, true)] {
            let kernel = laid_over([DType::BF16; 2], (n, k), turned, Some((format, 1, 16)));
            kernels.push(Kernel { name: format!("{name}_{}", format.name()), ..kernel });
        }
    }
    crate::resources::no_spills(&assembler, &kernels);
}
