//! Pinned memory between the host and a GPU: what is written to the device is made here part by part, while the parts before
//! are still being copied.

use super::driver::check;
use crate::device::Make;
use crate::error::Result;
use cudarc::driver::sys::{self, CUevent, CUevent_flags, CUstream};
use std::ffi::c_void;

/// Bytes of a buffer.
const BYTES: usize = 8 << 20;

#[derive(Debug)]
struct Buffer {
    at: *mut u8,
    used: usize,
    /// Recorded behind the last copy out of it.
    copied: CUevent,
}

/// Two buffers that take turns.
#[derive(Debug)]
pub(crate) struct Stage {
    buffers: [Buffer; 2],
    now: usize,
}

impl Stage {
    /// The context must be current.
    pub(crate) fn new() -> Result<Stage> {
        let none = || Buffer { at: std::ptr::null_mut(), used: 0, copied: std::ptr::null_mut() };
        let mut out = Stage { buffers: [none(), none()], now: 0 };
        for b in &mut out.buffers {
            let mut at: *mut c_void = std::ptr::null_mut();
            // SAFETY: the pointers are of values that live through the calls.
            unsafe {
                check(sys::cuMemHostAlloc(&mut at, BYTES, 0), "memory for copies")?;
                b.at = at.cast();
                let plain = CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
                check(sys::cuEventCreate(&mut b.copied, plain), "an event")?;
            }
        }
        Ok(out)
    }

    /// Writes `bytes` bytes to the device in the order of the stream; `make` fills one part after another.
    ///
    /// # Safety
    /// `to` must have room for them.
    pub(crate) unsafe fn write(&mut self, stream: CUstream, to: u64, bytes: u64, make: Make<'_>) -> Result<()> {
        let mut done = 0;
        while done < bytes {
            if BYTES - self.buffers[self.now].used < 16 {
                self.turn(stream)?;
            }
            let b = &mut self.buffers[self.now];
            let n = (BYTES - b.used).min((bytes - done) as usize);
            // SAFETY: the part lies in the buffer, and no copy that is under way reads it.
            let part = unsafe { std::slice::from_raw_parts_mut(b.at.add(b.used), n) };
            make(done, part);
            // SAFETY: the part stays as it is until the event of its buffer, and the caller promises room.
            let r = unsafe { sys::cuMemcpyHtoDAsync_v2(to + done, part.as_ptr().cast(), n, stream) };
            check(r, "copying to the GPU")?;
            b.used += n.next_multiple_of(16);
            done += n as u64;
        }
        Ok(())
    }

    /// Goes to the other buffer, once everything is copied out of it.
    fn turn(&mut self, stream: CUstream) -> Result<()> {
        // SAFETY: the event and the stream are of the same context.
        check(unsafe { sys::cuEventRecord(self.buffers[self.now].copied, stream) }, "an event")?;
        self.now = 1 - self.now;
        let b = &mut self.buffers[self.now];
        if b.used > 0 {
            // SAFETY: recorded when the buffer was left.
            check(unsafe { sys::cuEventSynchronize(b.copied) }, "copying to the GPU")?;
            b.used = 0;
        }
        Ok(())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        for b in &self.buffers {
            // SAFETY: the stream is done when its owner drops this; null is left alone.
            unsafe {
                if !b.at.is_null() {
                    let _ = sys::cuMemFreeHost(b.at.cast());
                }
                if !b.copied.is_null() {
                    let _ = sys::cuEventDestroy_v2(b.copied);
                }
            }
        }
    }
}
