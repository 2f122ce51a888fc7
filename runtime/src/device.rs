//! What a session needs of a device: memory and launches. There are the host ([`Cpu`](crate::Cpu)) and NVIDIA GPUs.
//!
//! Code comes from the plan's blobs and is trusted like an executable.
#![allow(unsafe_code)]

use crate::error::Result;
use crate::fetch::Window;
use crate::launch::Steps;
use crate::memory::Memory;
use std::time::{Duration, Instant};

/// An address on a device, as kernels see it. The host can follow it where [`Device::shares_memory`].
pub type Address = *mut u8;

/// Makes a part of a tensor: from this byte on, as many as there is room for.
pub type Make<'f> = &'f mut dyn FnMut(u64, &mut [u8]);

/// One kernel of a wave.
#[derive(Clone, Copy, Debug)]
pub struct Work<'a> {
    /// Index of the kernel in the plan.
    pub kernel: u32,
    /// Operands, then results.
    pub buffers: &'a [Address],
    /// Number of tasks.
    pub tasks: u64,
}

/// A device that runs the kernels of one plan. What it is asked for is done in the order of the calls; it need not be done when
/// a call returns, but for [`Device::read`], [`Device::finish`] and [`Device::time`].
pub trait Device: Send {
    /// Refuses a session that takes more than the device has.
    ///
    /// # Errors
    /// [`RuntimeError::Capacity`](crate::RuntimeError::Capacity) with both numbers.
    fn hold(&self, _memory: &Memory) -> Result<()> {
        Ok(())
    }

    /// Memory aligned to [`pleach_plan::alignment`], which lives as long as the device. What it holds is unknown unless it is to be
    /// zeroed.
    ///
    /// # Errors
    /// [`RuntimeError::Capacity`](crate::RuntimeError::Capacity).
    fn allocate(&mut self, bytes: u64, what: &str, zeroed: bool) -> Result<Address>;

    /// The same for a while: until [`Device::give_back`].
    ///
    /// # Errors
    /// As [`Device::allocate`].
    fn lend(&mut self, bytes: u64, what: &str) -> Result<Address>;

    /// Takes back what was lent.
    ///
    /// # Safety
    /// No later launch may be given the address.
    unsafe fn give_back(&mut self, at: Address) -> Result<()>;

    /// Whether kernels read memory of the host, and the host reads memory of the device, in place.
    fn shares_memory(&self) -> bool;

    /// Writes `bytes` bytes that are made part by part, each part a multiple of 16 bytes but for the last one.
    ///
    /// # Errors
    /// What the device refuses.
    ///
    /// # Safety
    /// `to` must have room for them in memory of this device.
    unsafe fn fill(&mut self, to: Address, bytes: u64, make: Make<'_>) -> Result<()>;

    /// Writes bytes to the device.
    ///
    /// # Errors
    /// What the device refuses.
    ///
    /// # Safety
    /// As [`Device::fill`].
    unsafe fn write(&mut self, to: Address, bytes: &[u8]) -> Result<()> {
        // SAFETY: promised by the caller.
        unsafe {
            self.fill(to, bytes.len() as u64, &mut |at, part| {
                part.copy_from_slice(&bytes[at as usize..][..part.len()]);
            })
        }
    }

    /// Reads bytes of the device, after everything that was asked for before.
    ///
    /// # Errors
    /// What the device refuses, and what went wrong before.
    ///
    /// # Safety
    /// The bytes from `from` on must be of this device's memory.
    unsafe fn read(&self, from: Address, to: &mut [u8]) -> Result<()>;

    /// Sets bytes to zero.
    ///
    /// # Errors
    /// What the device refuses.
    ///
    /// # Safety
    /// As [`Device::fill`].
    unsafe fn zero(&mut self, at: Address, bytes: u64) -> Result<()>;

    /// Runs a wave: kernels that do not depend on each other. Later waves see their results.
    ///
    /// # Errors
    /// What the device refuses.
    ///
    /// # Safety
    /// The buffers must be what the kernels expect, `dims` hold all symbols, no kernel may write what another one of
    /// the wave reads or writes, and nobody else may use the bytes meanwhile.
    unsafe fn launch(&mut self, wave: &[Work<'_>], dims: &[i64]) -> Result<()>;

    /// Runs all steps of an entry.
    ///
    /// # Errors
    /// Those of [`Steps::waves`], and what the device refuses.
    ///
    /// # Safety
    /// The plan must be validated, the counts lie within the capacities that the arena was laid out for, every buffer have a live
    /// address, and index inputs be checked.
    unsafe fn run(&mut self, steps: &Steps<'_>) -> Result<()> {
        // SAFETY: promised by the caller; the steps of a wave touch nothing that another one of them writes.
        steps.waves(steps.env, &mut |w| unsafe {
            self.announce(w.ahead);
            self.launch(w.works, w.dims)
        })
    }

    /// Runs a wave and waits for it; gives the time it took. More than once: one launch after another, the first one not timed;
    /// gives the time of one.
    ///
    /// # Errors
    /// What the device refuses.
    ///
    /// # Safety
    /// As [`Device::launch`].
    unsafe fn time(&mut self, wave: &[Work<'_>], dims: &[i64], times: u32) -> Result<Duration> {
        if times > 1 {
            // SAFETY: promised by the caller.
            unsafe { self.launch(wave, dims)? };
        }
        let start = Instant::now();
        for _ in 0..times.max(1) {
            // SAFETY: promised by the caller.
            unsafe { self.launch(wave, dims)? };
        }
        Ok(start.elapsed() / times.max(1))
    }

    /// From now on runs of entries are timed by the device, or no longer.
    fn time_runs(&mut self, _: bool) {}

    /// Waits for the last run of an entry; gives the device's time for its launches, if those are timed.
    ///
    /// # Errors
    /// What went wrong since.
    fn run_time(&self) -> Result<Option<Duration>> {
        Ok(None)
    }

    /// Memory that kernels use while they run, and its bytes.
    fn scratch(&self) -> Option<(Address, u64)> {
        None
    }

    /// Waits until everything is done.
    ///
    /// # Errors
    /// What went wrong since.
    fn finish(&self) -> Result<()> {
        Ok(())
    }

    /// Says what each worker will read after the next wave, for a device that can make use of it.
    fn announce(&mut self, _: &[Window]) {}

    /// Called before the launches of a run.
    fn begin(&mut self) {}

    /// What the plan would make use of and the machine lacks, with the reason; everything runs without it.
    fn missing(&self) -> Option<&str> {
        None
    }

    /// Called when steps of the plan run other kernels than before; everything asked for before is done.
    fn changed(&mut self) {}

    /// Number of workers.
    fn threads(&self) -> usize;

    /// The device in words.
    fn name(&self) -> String;
}
