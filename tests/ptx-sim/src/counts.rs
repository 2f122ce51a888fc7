//! What a launch executed: a cheap guard against kernels that grow.

use std::collections::BTreeMap;

/// Totals over all blocks of one launch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counts {
    /// Instructions, counted once per warp.
    pub warp_instructions: u64,
    /// Instructions, counted once per thread that executed them.
    pub lane_instructions: u64,
    /// Warp instructions by opcode with its modifiers.
    pub by_opcode: BTreeMap<String, u64>,
    /// Bytes that kernels read from global memory, without any cache.
    pub global_read: u64,
    /// Bytes written to global memory.
    pub global_written: u64,
    /// Bytes of the different sectors (32 bytes) of global memory that a launch reads, and that it writes: what a cache that holds all
    /// of them would move. Not known where not all blocks run.
    pub sectors_read: u64,
    pub sectors_written: u64,
    /// Bytes read from shared memory and written to it, by copies and products too; what the warps of a warpgroup read together counts
    /// for each of them.
    pub shared_read: u64,
    pub shared_written: u64,
    /// Floating-point operations of matrix instructions, a multiply and an add each.
    pub mma_flops: u64,
}

impl Counts {
    /// Warp instructions whose opcode starts with this text, such as `mma.sync` or `bar.`.
    pub fn of(&self, opcode: &str) -> u64 {
        self.by_opcode.iter().filter(|(k, _)| k.starts_with(opcode)).map(|(_, n)| n).sum()
    }

    /// As much as `blocks` do where `run` of them were counted.
    pub(crate) fn scale(&mut self, blocks: u64, run: u64) {
        let scale = |n: &mut u64| *n = (u128::from(*n) * u128::from(blocks) / u128::from(run.max(1))) as u64;
        let sums = [
            &mut self.warp_instructions,
            &mut self.lane_instructions,
            &mut self.global_read,
            &mut self.global_written,
            &mut self.shared_read,
            &mut self.shared_written,
            &mut self.mma_flops,
        ];
        sums.into_iter().chain(self.by_opcode.values_mut()).for_each(scale);
    }

    /// Adds another launch.
    pub fn add(&mut self, other: &Counts) {
        self.warp_instructions += other.warp_instructions;
        self.lane_instructions += other.lane_instructions;
        self.global_read += other.global_read;
        self.global_written += other.global_written;
        self.sectors_read += other.sectors_read;
        self.sectors_written += other.sectors_written;
        self.shared_read += other.shared_read;
        self.shared_written += other.shared_written;
        self.mma_flops += other.mma_flops;
        for (k, n) in &other.by_opcode {
            *self.by_opcode.entry(k.clone()).or_default() += n;
        }
    }
}
