//! Products of a rank that 8 does not divide: every product of a low-rank branch, forward and backward, goes through matrix instructions on
//! either chip, with many rows and, forward, by the launch for few of them, compared with the interpreter; the assembler spills nothing.

use crate::simulated::{Build, simulate};
use pleach_codegen::emit::gpu::GpuChip;
use pleach_codegen::ptxas;
use pleach_ir::{Class, DType, Dim, Kernel, Op, Sym, ValueId};

const T: Dim = Dim::Symbol(Sym::T);
const RANKS: [u64; 8] = [1, 2, 3, 4, 5, 6, 12, 20];
const WIDTH: Dim = Dim::Known(72);
const OUT: Dim = Dim::Known(136);

const MANY: u64 = 70;
const FEW: u64 = 5;

/// Runs a kernel on both chips. `by_warpgroups`: whether the newer one takes the products of its own.
fn run(b: &mut Build, k: &Kernel, by_warpgroups: bool) {
    for chip in GpuChip::ALL {
        let (ptx, counts) = simulate(k, chip, &b.operands, &b.symbols, 1e-2);
        let few = b.symbols[0].1 == FEW;
        let own = if chip == GpuChip::Sm90a && by_warpgroups && !few { "wgmma.mma_async" } else { "mma.sync" };
        assert!(counts.of(own) > 0, "{} on {}", k.name, chip.name());
        if few {
            let tiles = ["ldmatrix", "cp.async", "wgmma.mma_async"].map(|i| counts.of(i));
            assert!(ptx.contains(&format!("{}_few(", k.name)) && tiles == [0; 3], "{} on {}", k.name, chip.name());
        }
        let Some(program) = crate::kit::ptxas() else {
            eprintln!("skipped: nothing is assembled, there is no ptxas; set PLEACH_PTXAS or run `make setup`");
            continue;
        };
        let all = ptxas::assemble(&program, ptx.as_bytes(), chip.name()).unwrap();
        assert!(all.values().all(|r| r.spills == 0 && r.stack == 0), "{} on {}: {all:?}", k.name, chip.name());
    }
}

fn build(rows: u64) -> Build {
    Build::new(&[(Sym::T, rows)])
}

/// x · Aᵀ.
#[test]
fn down() {
    for (r, rows) in RANKS.into_iter().flat_map(|r| [(r, MANY), (r, FEW)]) {
        let mut b = build(rows);
        let (x, down) = (b.input(DType::BF16, &[T, WIDTH]), b.input(DType::BF16, &[r.into(), WIDTH]));
        let h = b.product(x, down, false, true);
        let h = b.push(Op::Cast(DType::BF16), &[h]);
        let k = b.named(&format!("down{r}"), Class::Contraction, &[h]);
        run(&mut b, &k, r % 4 == 0);
    }
}

/// x · Wᵀ + s · h · Bᵀ, and dY · W + s · dH · A.
#[test]
fn beside_a_weight() {
    for (r, rows) in RANKS.into_iter().flat_map(|r| [(r, MANY), (r, FEW)]) {
        for turned in [false, true] {
            let mut b = build(rows);
            let (x, w) = (b.input(DType::BF16, &[T, WIDTH]), [OUT, WIDTH]);
            let w = b.input(DType::BF16, &if turned { [w[1], w[0]] } else { w });
            let (h, up) = (b.input(DType::BF16, &[T, r.into()]), [OUT, r.into()]);
            let up = b.input(DType::BF16, &if turned { [up[1], up[0]] } else { up });
            let s = b.input(DType::F32, &[]);
            let y = b.product(x, w, false, !turned);
            let branch = b.product(h, up, false, !turned);
            let branch = b.mul(branch, s);
            let y = b.push(Op::Add, &[y, branch]);
            let y = b.push(Op::Cast(DType::BF16), &[y]);
            let k = b.named(&format!("beside{r}{turned}"), Class::Contraction, &[y]);
            run(&mut b, &k, true);
        }
    }
}

/// dY · B.
#[test]
fn back() {
    for r in RANKS {
        let mut b = build(MANY);
        let (y, up) = (b.input(DType::BF16, &[T, OUT]), b.input(DType::BF16, &[OUT, r.into()]));
        let h = b.product(y, up, false, false);
        let h = b.push(Op::Cast(DType::BF16), &[h]);
        let k = b.named(&format!("back{r}"), Class::Contraction, &[h]);
        run(&mut b, &k, r % 4 == 0);
    }
}

/// dYᵀ · h and dHᵀ · x, added in place: sums over all tokens.
#[test]
fn gradients() {
    for r in RANKS {
        for rows in [OUT, r.into()] {
            let columns = if rows == OUT { r.into() } else { OUT };
            let mut b = build(MANY);
            let (x, y) = (b.input(DType::BF16, &[T, rows]), b.input(DType::BF16, &[T, columns]));
            let before = b.input(DType::F32, &[rows, columns]);
            let z = b.product(x, y, true, false);
            let z = b.push(Op::Add, &[before, z]);
            let mut k = b.named(&format!("gradient{r}{}", rows == OUT), Class::Contraction, &[z]);
            k.aliases = vec![Some(2)];
            run(&mut b, &k, false);
        }
    }
}

/// silu-like gates of two branches: groups of accumulators that share a left operand.
#[test]
fn two_groups() {
    for (r, rows) in [3, 4, 12].into_iter().flat_map(|r| [(r, MANY), (r, FEW)]) {
        let mut b = build(rows);
        let x = b.input(DType::BF16, &[T, WIDTH]);
        let parts = [0, 1].map(|_| {
            let w = b.input(DType::BF16, &[96.into(), WIDTH]);
            let (h, up) = (b.input(DType::BF16, &[T, r.into()]), b.input(DType::BF16, &[96.into(), r.into()]));
            let s = b.input(DType::F32, &[]);
            let y = b.product(x, w, false, true);
            let branch = b.product(h, up, false, true);
            let branch = b.mul(branch, s);
            b.push(Op::Add, &[y, branch])
        });
        let y = b.mul(parts[0], parts[1]);
        let y = b.push(Op::Cast(DType::BF16), &[y]);
        let k = b.named(&format!("gates{r}"), Class::Contraction, &[y]);
        run(&mut b, &k, true);
    }
}

/// dHᵀ · x of several branches of one input, added in place: x is read once for all of them, in whole pieces or not.
#[test]
fn gradients_of_one_input() {
    let kernel = |r: u64, parts: u32| {
        let mut b = build(MANY);
        let x = b.input(DType::BF16, &[T, OUT]);
        let mut roots: Vec<ValueId> = vec![];
        for _ in 0..parts {
            let h = b.input(DType::BF16, &[T, r.into()]);
            let (s, before) = (b.input(DType::F32, &[]), b.input(DType::F32, &[r.into(), OUT]));
            let z = b.product(h, x, true, false);
            let z = b.mul(z, s);
            roots.push(b.push(Op::Add, &[before, z]));
        }
        let mut k = b.named(&format!("gradients{r}_{parts}"), Class::Contraction, &roots);
        k.aliases = (0..parts).map(|i| Some(3 + 3 * i)).collect();
        (b, k)
    };
    for (r, parts) in [(1, 2), (4, 3), (6, 2), (16, 3), (16, 4), (32, 2)] {
        let read = |parts: u32| {
            let (b, k) = kernel(r, parts);
            simulate(&k, GpuChip::Sm80, &b.operands, &b.symbols, 1e-2).1.global_read
        };
        let (one, all, x) = (read(1), read(parts), 2 * MANY * 136);
        assert!(all + u64::from(parts - 1) * x <= one * u64::from(parts), "{r}, {parts}: {all} bytes, {one} for one");
        let (mut b, k) = kernel(r, parts);
        run(&mut b, &k, false);
    }
}
