//! What a launch executed: a cheap guard against kernels that grow.

use crate::Traffic;
use crate::unit::{UNITS, Unit};
use std::collections::BTreeMap;

/// Totals over all blocks of one launch.
#[derive(Debug, Clone, Default, PartialEq)]
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
    /// What accesses of memory cost, by kernel and line of the text.
    pub sites: BTreeMap<(String, u32), Site>,
    /// Cycles that the units of one processor take for all instructions, in the order of [`Unit::ALL`], were all blocks on it.
    pub cycles: [f64; UNITS],
}

/// Accesses of one instruction.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Site {
    pub opcode: String,
    pub traffic: Traffic,
}

impl Counts {
    /// Warp instructions whose opcode starts with this text, such as `mma.sync` or `bar.`.
    pub fn of(&self, opcode: &str) -> u64 {
        self.by_opcode.iter().filter(|(k, _)| k.starts_with(opcode)).map(|(_, n)| n).sum()
    }

    /// What all accesses of memory cost.
    pub fn traffic(&self) -> Traffic {
        let mut all = Traffic::default();
        self.sites.values().for_each(|s| all.add(&s.traffic));
        all
    }

    /// Cycles of a unit.
    pub fn cycles(&self, unit: Unit) -> f64 {
        self.cycles[unit as usize]
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
        let sites = self.sites.values_mut().flat_map(|s| s.traffic.all());
        sums.into_iter().chain(self.by_opcode.values_mut()).chain(sites).for_each(scale);
        self.cycles.iter_mut().for_each(|c| *c *= blocks as f64 / run.max(1) as f64);
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
        self.cycles.iter_mut().zip(other.cycles).for_each(|(a, b)| *a += b);
        for (at, s) in &other.sites {
            let own =
                self.sites.entry(at.clone()).or_insert_with(|| Site { opcode: s.opcode.clone(), ..Site::default() });
            own.traffic.add(&s.traffic);
        }
        for (k, n) in &other.by_opcode {
            *self.by_opcode.entry(k.clone()).or_default() += n;
        }
    }
}
