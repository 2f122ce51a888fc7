//! What accesses of memory cost beyond the bytes they move: wavefronts of shared memory and sectors of global memory, per instruction.
//!
//! Shared memory has 32 banks of 4 bytes and serves one word of every bank a cycle, to all lanes that ask for it; accesses of 8 and 16
//! bytes are served for half and quarter warps one behind the other, a matrix of `ldmatrix` and `stmatrix` for the 8 lanes with its rows
//! (CUDA programming guide, "Shared Memory"; that equal words of two quarters may be served together is left out). Global memory moves
//! sectors of 32 bytes. What warpgroup products read of shared memory is part of them and not counted here.

use crate::warp::{Lanes, lanes};

/// Banks of shared memory, 4 bytes wide.
const BANKS: usize = 32;
/// Bytes of shared memory that one wavefront serves.
pub(crate) const WAVEFRONT: u64 = 4 * BANKS as u64;
/// Bytes that global memory moves at once.
const SECTOR: u64 = 32;

/// What the accesses of one instruction came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Wavefronts of shared memory, and the fewest that could serve the words that were asked for.
    pub wavefronts: u64,
    pub least_wavefronts: u64,
    /// Sectors of global memory that the warps' requests touched, and the fewest that could hold the bytes that were asked for.
    pub sectors: u64,
    pub least_sectors: u64,
}

impl Traffic {
    /// Adds what another one came to.
    pub fn add(&mut self, other: &Traffic) {
        self.wavefronts += other.wavefronts;
        self.least_wavefronts += other.least_wavefronts;
        self.sectors += other.sectors;
        self.least_sectors += other.least_sectors;
    }

    pub(crate) fn all(&mut self) -> [&mut u64; 4] {
        [&mut self.wavefronts, &mut self.least_wavefronts, &mut self.sectors, &mut self.least_sectors]
    }

    /// Lanes of a warp access so many bytes each of shared memory. `atomic`: equal words are served one behind the other.
    pub(crate) fn shared(&mut self, at: &Lanes, on: u32, bytes: u64, atomic: bool) {
        let together = if bytes <= 4 { 32 } else { (WAVEFRONT / bytes).max(1) as usize };
        for first in (0..32).step_by(together) {
            let mask = if together == 32 { u32::MAX } else { ((1 << together) - 1) << first };
            if on & mask == 0 {
                continue;
            }
            // Words by bank: those of a phase are few.
            let (mut words, mut n) = ([0u64; 64], 0);
            for l in lanes(on & mask) {
                for w in at[l] / 4..at[l].saturating_add(bytes).div_ceil(4) {
                    if atomic || !words[..n].contains(&w) {
                        words[n] = w;
                        n += 1;
                    }
                }
            }
            let mut banks = [0u64; BANKS];
            words[..n].iter().for_each(|w| banks[*w as usize % BANKS] += 1);
            self.wavefronts += banks.iter().max().copied().unwrap_or(0);
            self.least_wavefronts += n.div_ceil(BANKS) as u64;
        }
    }

    /// A copy of whole rows into shared memory or out of it.
    pub(crate) fn rows(&mut self, bytes: u64) {
        self.wavefronts += bytes.div_ceil(WAVEFRONT);
        self.least_wavefronts += bytes.div_ceil(WAVEFRONT);
    }

    /// Lanes of a warp access bytes of global memory: addresses, and how many each.
    pub(crate) fn global(&mut self, at: &Lanes, on: u32, bytes: &[u64; 32]) {
        let (mut ranges, mut n) = ([(0u64, 0u64); 32], 0);
        for l in lanes(on).filter(|l| bytes[*l] > 0) {
            ranges[n] = (at[l], at[l].saturating_add(bytes[l]));
            n += 1;
        }
        ranges[..n].sort_unstable();
        // Ends of what was seen so far: bytes, and sectors.
        let (mut end, mut next, mut distinct) = (0, 0, 0);
        for (a, b) in &ranges[..n] {
            distinct += b.saturating_sub(end.max(*a));
            end = end.max(*b);
            let (first, last) = (a / SECTOR, b.div_ceil(SECTOR));
            self.sectors += last.saturating_sub(next.max(first));
            next = next.max(last);
        }
        self.least_sectors += distinct.div_ceil(SECTOR);
    }
}
