//! Zeroed memory of the session: anonymous pages, 64-byte aligned, huge pages asked for where they pay.
//!
//! A region never moves and never grows, so addresses into it stay for the life of the session.
#![allow(unsafe_code)]

use crate::error::{Result, RuntimeError};
use memmap2::{Advice, MmapMut};
use std::ptr::NonNull;

/// From this size on, huge pages are asked for.
const HUGE_FROM: usize = 2 << 20;

/// A block of zeroed memory.
#[derive(Debug)]
pub struct Region {
    map: Option<MmapMut>,
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: a region owns its pages; the pointer is into them and is not tied to a thread.
unsafe impl Send for Region {}

impl Region {
    /// Reserves `bytes` zeroed bytes. Pages are taken when first touched.
    ///
    /// # Errors
    /// [`RuntimeError::Capacity`] when the system has no such room.
    pub fn new(bytes: u64, what: &str) -> Result<Region> {
        let no = |why: &dyn std::fmt::Display| {
            RuntimeError::Capacity(format!(
                "no memory for {what} ({bytes} bytes): {why}; open the session with lower capacities"
            ))
        };
        let len = usize::try_from(bytes).map_err(|e| no(&e))?;
        if len == 0 {
            // Aligned, never dereferenced.
            return Ok(Region { map: None, base: NonNull::<Aligned>::dangling().cast(), len });
        }
        let mut map = MmapMut::map_anon(len).map_err(|e| no(&e))?;
        if len >= HUGE_FROM {
            // A hint: without it everything works, with more misses of the address cache.
            let _ = map.advise(Advice::HugePage);
        }
        let base = NonNull::new(map.as_mut_ptr()).ok_or_else(|| no(&"null"))?;
        Ok(Region { map: Some(map), base, len })
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True for no bytes at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The address of `offset`, which with `bytes` must lie inside.
    ///
    /// # Errors
    /// [`RuntimeError::Capacity`] when it does not.
    pub fn at(&self, offset: u64, bytes: u64) -> Result<*mut u8> {
        let end = offset.checked_add(bytes);
        if end.is_none_or(|e| e > self.len as u64) {
            return Err(RuntimeError::Capacity(format!(
                "{bytes} bytes at {offset} lie outside a region of {}",
                self.len
            )));
        }
        // SAFETY: `offset` is at most `len`, so the result lies inside the pages or one past them.
        Ok(unsafe { self.base.as_ptr().add(offset as usize) })
    }

    /// Pages that are in memory now, as bytes; 0 when the system does not say.
    pub fn resident(&self) -> u64 {
        let Some(map) = &self.map else { return 0 };
        let page = 4096;
        let mut seen = vec![0u8; map.len().div_ceil(page)];
        // SAFETY: the range is this mapping and the vector has a byte for each of its pages.
        let rc = unsafe { libc::mincore(self.base.as_ptr().cast(), map.len(), seen.as_mut_ptr().cast()) };
        if rc != 0 { 0 } else { seen.iter().filter(|b| **b & 1 == 1).count() as u64 * page as u64 }
    }
}

#[repr(align(64))]
struct Aligned(#[allow(dead_code, reason = "only its alignment counts")] u8);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_zeroed_aligned_and_bounded() {
        let r = Region::new(5 << 20, "a test").unwrap();
        let p = r.at(0, 5 << 20).unwrap();
        assert_eq!(p as usize % 64, 0);
        // SAFETY: inside the region.
        assert_eq!(unsafe { *p.add((5 << 20) - 1) }, 0);
        assert!(r.at(1, 5 << 20).is_err());
        assert!(r.at(u64::MAX, 2).is_err());
        let e = Region::new(0, "nothing").unwrap();
        assert_eq!(e.at(0, 0).unwrap() as usize % 64, 0);
        assert!(e.is_empty() && e.at(0, 1).is_err());
        assert!(Region::new(u64::MAX / 2, "too much").is_err());
    }
}
