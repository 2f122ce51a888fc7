//! What large kernels take of a GPU, by its assembler: no spills, and as many blocks side by side as their tiles were chosen for.

use crate::simulated::Build;
use pleach_codegen::emit::gpu::{self, GpuChip};
use pleach_codegen::{mlir, ptxas};
use pleach_ir::{Class, DType, Dim, Kernel, Op, Sym, UnaryOp};
use std::path::Path;

const T: Dim = Dim::Symbol(Sym::T);

/// x · Wᵀ + s · h · Bᵀ (+ residual), or the same with W the other way round.
fn linear(name: &str, k: u64, n: u64, turned: bool, residual: bool) -> Kernel {
    let mut b = Build::shapes(&[(Sym::T, 8)]);
    let x = b.input(DType::BF16, &[T, k.into()]);
    let w = b.input(DType::BF16, &if turned { [Dim::from(k), n.into()] } else { [n.into(), k.into()] });
    let (h, up) = (b.input(DType::BF16, &[T, 16.into()]), b.input(DType::BF16, &[n.into(), 16.into()]));
    let s = b.input(DType::F32, &[]);
    let y = b.product(x, w, false, !turned);
    let branch = b.product(h, up, false, true);
    let branch = b.mul(branch, s);
    let mut terms = vec![y, branch];
    if residual {
        terms.push(b.input(DType::F32, &[T, n.into()]));
    }
    let y = b.push(Op::Add, &terms);
    let y = if residual { y } else { b.push(Op::Cast(DType::BF16), &[y]) };
    b.named(name, Class::Contraction, &[y])
}

/// silu(gate) * up with a branch each, or without.
fn gated(name: &str, k: u64, n: u64, branches: bool) -> Kernel {
    let mut b = Build::shapes(&[(Sym::T, 8)]);
    let x = b.input(DType::BF16, &[T, k.into()]);
    let mut parts = vec![];
    for _ in 0..2 {
        let w = b.input(DType::BF16, &[n.into(), k.into()]);
        let part = b.product(x, w, false, true);
        if !branches {
            parts.push(part);
            continue;
        }
        let (h, up) = (b.input(DType::BF16, &[T, 16.into()]), b.input(DType::BF16, &[n.into(), 16.into()]));
        let s = b.input(DType::F32, &[]);
        let branch = b.product(h, up, false, true);
        let branch = b.mul(branch, s);
        parts.push(b.push(Op::Add, &[part, branch]));
    }
    let gate = b.push(Op::Unary(UnaryOp::Sigmoid), &[parts[0]]);
    let gate = b.mul(parts[0], gate);
    let y = b.mul(gate, parts[1]);
    let y = b.push(Op::Cast(DType::BF16), &[y]);
    b.named(name, Class::Contraction, &[y])
}

/// xᵀ · y over all tokens.
fn gradient(name: &str, m: u64, n: u64) -> Kernel {
    let mut b = Build::shapes(&[(Sym::T, 8)]);
    let (x, y) = (b.input(DType::BF16, &[T, m.into()]), b.input(DType::BF16, &[T, n.into()]));
    let before = b.input(DType::F32, &[m.into(), n.into()]);
    let z = b.product(x, y, true, false);
    let z = b.push(Op::Add, &[before, z]);
    b.named(name, Class::Contraction, &[z])
}

/// x · Aᵀ of rank 16.
fn thin(k: u64) -> Kernel {
    let mut b = Build::shapes(&[(Sym::T, 8)]);
    let (x, w) = (b.input(DType::BF16, &[T, k.into()]), b.input(DType::BF16, &[16.into(), k.into()]));
    let y = b.product(x, w, false, true);
    let y = b.push(Op::Cast(DType::BF16), &[y]);
    b.named("thin", Class::Contraction, &[y])
}

#[test]
fn products_of_a_large_model() {
    let Some(assembler) = crate::kit::ptxas() else {
        eprintln!("skipped: there is no ptxas; set PLEACH_PTXAS or run `make setup`");
        return;
    };
    let kernels = [
        linear("forward", 4096, 6144, false, false),
        linear("residual", 14336, 4096, false, true),
        linear("backward", 4096, 4096, true, false),
        gated("gated", 4096, 14336, true),
        // All of the sum is one stage: the products of both follow each other without a loop.
        gated("gated_once", 64, 14336, false),
        thin(4096),
        gradient("gradient_down", 4096, 16),
        gradient("gradient_up", 16, 4096),
        gradient("gradient_full", 4096, 4096),
    ];
    no_spills(&assembler, &kernels);
}

/// Assembles kernels for every chip; none may keep registers in memory.
pub(crate) fn no_spills(assembler: &Path, kernels: &[Kernel]) {
    let mut faults = vec![];
    for chip in GpuChip::ALL {
        let emitted: Vec<_> = kernels.iter().map(|k| gpu::emit(k, &[Sym::T], chip).unwrap()).collect();
        let ptx = mlir::compile_ptx(&gpu::module(emitted.iter().map(|e| e.text.as_str())), chip.name()).unwrap();
        let all = ptxas::assemble(assembler, ptx.as_bytes(), chip.name()).unwrap();
        for l in emitted.iter().flat_map(|e| &e.launches) {
            let r = all[&l.function];
            let (shared, own) = (l.shared_bytes, r.shared);
            let at = format!("{} {}: {} threads, {shared} + {own} shared, {r:?}", chip.name(), l.function, l.block);
            eprintln!("{at}");
            if r.spills > 0 || r.stack > 0 {
                faults.push(at);
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}
