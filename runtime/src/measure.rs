//! What measurements and tests need of a session beyond running it: weights without a model, memory that shows what was not written.
#![allow(unsafe_code)]

use crate::cast::f32_to_bf16;
use crate::device::Address;
use crate::error::Result;
use crate::session::Session;
use crate::weights::{Tensor, TensorSource, Weights};
use pleach_plan::random::Philox;
use pleach_plan::{DType, Plan, Source};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Weights of any size in little memory: every matrix is the beginning of one block of random numbers.
struct Shared {
    /// Uniform, standard deviation 0.02.
    matrices: Vec<u8>,
    /// Near 1.
    vectors: Vec<u8>,
    shapes: BTreeMap<String, Vec<u64>>,
}

impl TensorSource for Shared {
    fn names(&self) -> Vec<&str> {
        self.shapes.keys().map(String::as_str).collect()
    }

    fn tensor(&self, name: &str) -> Option<Tensor<'_>> {
        let shape = self.shapes.get(name)?;
        let n = shape.iter().product::<u64>() as usize * 2;
        let from = if shape.len() < 2 { &self.vectors } else { &self.matrices };
        Some(Tensor { dtype: DType::BF16, shape, bytes: from.get(..n)? })
    }
}

/// Weights for timing a plan without its model, in bf16: all matrices share their numbers, so that a model of any size takes no
/// more memory than its largest matrix. The same seed gives the same bytes.
///
/// # Errors
/// [`RuntimeError::Size`](crate::RuntimeError::Size) when a shape has no value.
pub fn shared_weights(plan: &Plan, seed: u64) -> Result<Weights> {
    let mut shapes = BTreeMap::new();
    let (mut largest, mut longest) = (0u64, 0u64);
    for p in &plan.params {
        let Source::Checkpoint(name) = &p.source else { continue };
        let shape = p.shape.iter().map(|d| d.eval(&[])).collect::<std::result::Result<Vec<u64>, _>>()?;
        let n: u64 = shape.iter().product();
        let most = if shape.len() < 2 { &mut longest } else { &mut largest };
        *most = n.max(*most);
        shapes.insert(name.clone(), shape);
    }
    let random = |n: u64, mean: f32, half: f32| {
        let mut bytes = Vec::with_capacity(n as usize * 2);
        for block in 0..n.div_ceil(8) {
            for w in Philox::new(seed).at([block as u32, (block >> 32) as u32, 0, 0x7368_6172]) {
                for w in [w >> 16, w & 0xffff] {
                    let x = mean + half * (w as f32 / 32_768.0 - 1.0);
                    bytes.extend_from_slice(&f32_to_bf16(x).to_le_bytes());
                }
            }
        }
        bytes
    };
    let half = 0.02 * 3.0f32.sqrt();
    Ok(Arc::new(Shared { matrices: random(largest, 0.0, half), vectors: random(longest, 1.0, 0.1), shapes }))
}

impl Session {
    /// Fills the arena, and what kernels use beside it while they run, with bytes that are no numbers. A kernel that leaves a part of its result unwritten, or reads what nobody
    /// wrote, then gives no number either.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn poison(&mut self) -> Result<()> {
        let (at, bytes): (Address, u64) = self.arena;
        // SAFETY: the arena is the session's, has this size, and holds nothing between runs that is still needed.
        unsafe { self.device.fill(at, bytes, &mut |_, part| part.fill(0xff))? };
        match self.device.scratch() {
            // SAFETY: the device has it for its kernels, and none of them runs.
            Some((at, bytes)) => unsafe { self.device.fill(at, bytes, &mut |_, part| part.fill(0xff)) },
            None => Ok(()),
        }
    }

    /// From now on runs are timed by the device, or no longer.
    pub fn set_timed(&mut self, on: bool) {
        self.device.time_runs(on);
    }

    /// The device's time for the launches of the last run, without copies of inputs and results; none where runs are not timed,
    /// or by a device that has no clock.
    ///
    /// # Errors
    /// What went wrong in that run.
    pub fn run_time(&self) -> Result<Option<Duration>> {
        self.device.run_time()
    }
}
