//! Row kernels of training against the reference interpreter.

use crate::bodies::{T, k};
use crate::kit::{check, noise};
use crate::train_bodies::*;
use pleach_codegen::emit::row;
use pleach_ir::interp::Tensor;
use pleach_ir::{DType, Kernel, Sym};

/// Operands of noise; i32 operands are indices below `most`; scalars are positive.
fn operands(kernel: &Kernel, symbols: &[(Sym, u64)], most: i32) -> Vec<Tensor> {
    let env = |s: Sym| symbols.iter().find(|x| x.0 == s).map(|x| x.1);
    let fill = |(i, t): (usize, &pleach_ir::TensorType)| {
        let shape: Vec<u64> = t.shape.iter().map(|d| d.eval(&env).unwrap()).collect();
        let x = noise(&shape, 77 + i as u64);
        let v = x.floats().to_vec();
        match t.dtype {
            DType::I32 => {
                Tensor::i32(shape, v.iter().map(|x| ((x + 1.0) * 0.5 * most as f32) as i32 % most).collect::<Vec<_>>())
            }
            _ if shape.is_empty() => Tensor::f32(shape, vec![0.25 + v[0].abs() / 2.0]),
            // Second moments are not negative.
            d if kernel.name == "adamw" && i == 3 => Tensor::from_floats(d, shape, v.iter().map(|x| x.abs()).collect()),
            d => Tensor::from_floats(d, shape, v),
        }
    };
    kernel.operand_types().iter().enumerate().map(fill).collect()
}

fn agree(kernel: &Kernel, counts: &[u64], most: i32, tolerance: f64) {
    assert_eq!(row::supported(kernel), Ok(()), "{}", kernel.name);
    for n in counts {
        let symbols = [(Sym::L, *n), (Sym::T, *n)];
        check(row::emit, kernel, &operands(kernel, &symbols, most), &symbols, tolerance);
    }
}

const ROUNDED: f64 = 1.0 / 128.0;

#[test]
fn gradients_of_norms() {
    agree(&rms_norm_grad(T, 576, DType::F32, 2), &[1, 5], 1, 1e-5);
    agree(&rms_norm_grad(T, 70, DType::BF16, 3), &[3], 1, 1e-5);
    agree(&weight_grad(T, 70, DType::F32), &[0, 1, 33], 1, 1e-5);
    agree(&weight_grad(T, 576, DType::BF16), &[33], 1, 1e-5);
    agree(&add_norm_bf16(T, 70), &[3], 1, ROUNDED);
}

#[test]
fn gradients_of_activations_and_rotary_embeddings() {
    agree(&swiglu_grad(T, 96, DType::F32), &[3], 1, 1e-5);
    agree(&swiglu_grad(T, 50, DType::BF16), &[3], 1, ROUNDED);
    agree(&rope_grad(T, 3, DType::F32), &[3], 128, 1e-5);
    agree(&rope_grad(T, 3, DType::BF16), &[3], 128, ROUNDED);
}

#[test]
fn losses() {
    agree(&cross_entropy(L, 1000, DType::F32), &[1, 3], 1000, 1e-5);
    agree(&cross_entropy(L, 77, DType::BF16), &[3], 77, ROUNDED);
}

#[test]
fn sums_and_the_optimizer() {
    agree(&squares(33, 70), &[0], 1, 1e-5);
    agree(&adamw(&[k(33), k(70)]), &[0], 1, 1e-5);
    agree(&adamw(&[k(7)]), &[0], 1, 1e-5);
}

/// A last vector of one lane, in two bytes: nothing beside it is written.
#[test]
fn single_lanes_of_16_bits() {
    for d in [1, 17] {
        let mut b = crate::bodies::B::new();
        let x = b.arg(DType::BF16, &[T, k(64)]);
        let y = b.slice(1, 0, d, x);
        agree(&b.kernel("narrow", &[y]), &[1, 3], 1, 0.0);
    }
}

#[test]
fn columns_are_picked() {
    agree(&columns_of(T, 70, 16, DType::F32), &[1, 5], 70, 0.0);
    agree(&columns_of(T, 70, 16, DType::BF16), &[5], 70, 0.0);
    agree(&columns_of(k(40), 70, 5, DType::BF16), &[5], 70, 0.0);
}
