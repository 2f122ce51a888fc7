//! Running an emitted kernel on tensors of the interpreter.

use crate::kit::Loaded;
use pleach_codegen::emit::Emitted;
use pleach_ir::interp::{Data, Tensor};
use pleach_ir::{Dim, Kernel, Sym};

/// Numbers for tests: the same sequence everywhere.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32
    }

    /// Uniform in -1.7 .. 1.7, so of variance 1.
    pub(crate) fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| (self.next() as f64 / (1u64 << 31) as f64 - 1.0) as f32 * 1.7).collect()
    }
}

/// Values of the symbols, from the shapes of the operands.
pub(crate) fn dims(k: &Kernel, symbols: &[Sym], x: &[Tensor]) -> Vec<u64> {
    let types = k.operand_types();
    let find = |s: Sym| {
        types.iter().zip(x).find_map(|(ty, t)| ty.shape.iter().position(|d| *d == Dim::Symbol(s)).map(|i| t.shape[i]))
    };
    symbols.iter().map(|s| find(*s).unwrap_or(0)).collect()
}

/// Runs a kernel with one result, which starts as its aliased operand, or as NaN. With `backwards`, one task at a time,
/// the last first.
pub(crate) fn run(code: &Loaded, k: &Kernel, e: &Emitted, symbols: &[Sym], x: &[Tensor], backwards: bool) -> Tensor {
    let env = dims(k, symbols, x);
    let lookup = |s: Sym| symbols.iter().position(|y| *y == s).map(|i| env[i]);
    let mut bytes: Vec<Vec<u8>> = x.iter().map(Tensor::to_bytes).collect();
    let ty = &k.result_types()[0];
    let shape: Vec<u64> = ty.shape.iter().map(|d| d.eval(&lookup).unwrap()).collect();
    let mut buffers: Vec<*mut u8> = bytes.iter_mut().map(|b| b.as_mut_ptr()).collect();
    let mut fresh = vec![0xffu8; ty.bytes(&lookup).unwrap() as usize];
    match k.aliases[0] {
        Some(a) => buffers.push(buffers[a as usize]),
        None => buffers.push(fresh.as_mut_ptr()),
    }
    let tasks = e.tasks.eval(&env).unwrap();
    let scratch = e.scratch_bytes.eval(&env).unwrap();
    let dims: Vec<i64> = env.iter().map(|d| *d as i64).collect();
    if backwards {
        for t in (0..tasks).rev() {
            code.run(&k.name, &buffers, &dims, (t, t + 1), scratch);
        }
    } else {
        code.run(&k.name, &buffers, &dims, (0, tasks), scratch);
    }
    let out = k.aliases[0].map_or(&fresh, |a| &bytes[a as usize]);
    Tensor::from_bytes(ty.dtype, shape, out).unwrap()
}

/// The bits of a tensor's elements, for exact comparison.
pub(crate) fn bits(t: &Tensor) -> Vec<u32> {
    match &t.data {
        Data::F32(v) => v.iter().map(|x| x.to_bits()).collect(),
        Data::I32(v) => v.iter().map(|x| *x as u32).collect(),
        Data::BF16(v) | Data::F16(v) => v.iter().map(|x| u32::from(*x)).collect(),
        Data::Bool(v) => v.iter().map(|x| u32::from(*x)).collect(),
    }
}
