//! Global memory: separate allocations with bounds, the bytes that were written, and who touched them in a launch.

use crate::error::Fault;
use crate::touch::{Marks, Order, Thread};
use crate::{GLOBAL_BASE, SimError, num};

/// Address bits of one allocation; a pointer that leaves its allocation never reaches another one.
const SHIFT: u32 = 36;
const MASK: u64 = (1 << SHIFT) - 1;
/// Several blocks have read the byte in this launch.
const MANY: u16 = u16::MAX;
/// Bytes that memory moves at once.
const SECTOR: usize = 32;

/// A device address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ptr(pub u64);

impl Ptr {
    /// The address some bytes further on.
    #[must_use]
    pub fn offset(self, bytes: u64) -> Ptr {
        Ptr(self.0 + bytes)
    }
}

#[derive(Debug, Clone, Default)]
struct Alloc {
    name: String,
    bytes: Vec<u8>,
    /// Per byte: was it ever written.
    init: Vec<bool>,
    /// Per byte: block (+ 1, modulo) that wrote and read it in this launch. Empty until touched.
    writer: Vec<u16>,
    reader: Vec<u16>,
    /// Per byte: was it read as constant, or written, in this launch. Empty until touched.
    constant: Vec<bool>,
    written: Vec<bool>,
    /// Threads of the running block that touched it as memory that is written.
    marks: Marks,
    /// Per sector: was it read (1) or written (2) in this launch. Empty until touched.
    sectors: Vec<u8>,
}

impl Alloc {
    /// Some bytes are read (1) or written (2).
    fn touch(&mut self, bytes: std::ops::Range<usize>, how: u8) {
        if self.sectors.is_empty() {
            self.sectors = vec![0; self.bytes.len().div_ceil(SECTOR)];
        }
        for s in &mut self.sectors[bytes.start / SECTOR..bytes.end.div_ceil(SECTOR)] {
            *s |= how;
        }
    }
}

/// The device's global memory.
#[derive(Debug, Clone, Default)]
pub struct Memory {
    allocs: Vec<Alloc>,
    /// Tag of the running block, 0 outside a launch.
    block: u16,
    races: bool,
    uninit: bool,
}

impl Memory {
    /// No memory at all.
    pub fn new() -> Memory {
        Memory::default()
    }

    /// Gives out bytes that hold nothing yet: reading them in a kernel is a fault.
    pub fn alloc(&mut self, bytes: usize) -> Ptr {
        let name = format!("allocation {}", self.allocs.len());
        self.alloc_named(&name, bytes)
    }

    /// As [`Memory::alloc`], with a name for error texts.
    pub fn alloc_named(&mut self, name: &str, bytes: usize) -> Ptr {
        let a = Alloc { name: name.into(), bytes: vec![0xff; bytes], init: vec![false; bytes], ..Alloc::default() };
        self.allocs.push(a);
        Ptr(GLOBAL_BASE + ((self.allocs.len() as u64 - 1) << SHIFT))
    }

    /// Gives out memory with these bytes.
    pub fn alloc_from(&mut self, bytes: &[u8]) -> Ptr {
        let p = self.alloc(bytes.len());
        let i = self.allocs.len() - 1;
        self.allocs[i].bytes.copy_from_slice(bytes);
        self.allocs[i].init.fill(true);
        p
    }

    /// Memory with these numbers, little endian as on the device.
    pub fn alloc_f32(&mut self, v: &[f32]) -> Ptr {
        self.alloc_from(&v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())
    }

    /// Memory with these numbers rounded to bf16.
    pub fn alloc_bf16(&mut self, v: &[f32]) -> Ptr {
        self.alloc_from(&v.iter().flat_map(|x| num::f32_to_bf16(*x).to_le_bytes()).collect::<Vec<u8>>())
    }

    /// Memory with these integers.
    pub fn alloc_i32(&mut self, v: &[i32]) -> Ptr {
        self.alloc_from(&v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())
    }

    /// Memory with these integers.
    pub fn alloc_i64(&mut self, v: &[i64]) -> Ptr {
        self.alloc_from(&v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())
    }

    /// Memory with these pointers.
    pub fn alloc_pointers(&mut self, v: &[Ptr]) -> Ptr {
        self.alloc_from(&v.iter().flat_map(|p| p.0.to_le_bytes()).collect::<Vec<u8>>())
    }

    fn find(&self, p: u64) -> Option<(usize, usize)> {
        let i = (p.checked_sub(GLOBAL_BASE)? >> SHIFT) as usize;
        let off = (p & MASK) as usize;
        (i < self.allocs.len()).then_some((i, off))
    }

    fn range(&self, p: Ptr, len: usize) -> Result<(usize, usize), SimError> {
        let found = self.find(p.0).filter(|(i, off)| off + len <= self.allocs[*i].bytes.len());
        found.ok_or_else(|| SimError::Host(format!("{len} bytes at {:#x} are not allocated", p.0)))
    }

    /// Bytes from an address to the end of its allocation.
    ///
    /// # Errors
    /// [`SimError::Host`] when nothing is allocated there.
    pub fn len_from(&self, p: Ptr) -> Result<usize, SimError> {
        let (i, off) = self.range(p, 0)?;
        Ok(self.allocs[i].bytes.len() - off)
    }

    /// Writes bytes from the host.
    ///
    /// # Errors
    /// [`SimError::Host`] when they do not fit.
    pub fn write(&mut self, p: Ptr, bytes: &[u8]) -> Result<(), SimError> {
        let (i, off) = self.range(p, bytes.len())?;
        let a = &mut self.allocs[i];
        a.bytes[off..off + bytes.len()].copy_from_slice(bytes);
        a.init[off..off + bytes.len()].fill(true);
        Ok(())
    }

    /// Makes bytes unwritten again: kernels that read them before writing fail.
    ///
    /// # Errors
    /// [`SimError::Host`] when they are not allocated.
    pub fn forget(&mut self, p: Ptr, len: usize) -> Result<(), SimError> {
        let (i, off) = self.range(p, len)?;
        let a = &mut self.allocs[i];
        a.bytes[off..off + len].fill(0xff);
        a.init[off..off + len].fill(false);
        Ok(())
    }

    /// Reads bytes, whether they were written or not (0xff where not).
    ///
    /// # Errors
    /// [`SimError::Host`] when they are not allocated.
    pub fn read_raw(&self, p: Ptr, len: usize) -> Result<&[u8], SimError> {
        let (i, off) = self.range(p, len)?;
        Ok(&self.allocs[i].bytes[off..off + len])
    }

    /// Reads bytes.
    ///
    /// # Errors
    /// [`SimError::Host`] when they are not allocated or not all written.
    pub fn read(&self, p: Ptr, len: usize) -> Result<&[u8], SimError> {
        let (i, off) = self.range(p, len)?;
        let a = &self.allocs[i];
        match a.init[off..off + len].iter().position(|x| !x) {
            None => Ok(&a.bytes[off..off + len]),
            Some(n) => Err(SimError::Host(format!(
                "byte {} of {} ({} bytes) was never written",
                off + n,
                a.name,
                a.bytes.len()
            ))),
        }
    }

    fn all(&self, p: Ptr) -> Result<&[u8], SimError> {
        self.read(p, self.len_from(p)?)
    }

    /// Reads from an address to the end of its allocation.
    ///
    /// # Errors
    /// As [`Memory::read`].
    pub fn read_f32(&self, p: Ptr) -> Result<Vec<f32>, SimError> {
        Ok(self.all(p)?.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
    }

    /// As [`Memory::read_f32`], of bf16 numbers.
    ///
    /// # Errors
    /// As [`Memory::read`].
    pub fn read_bf16(&self, p: Ptr) -> Result<Vec<f32>, SimError> {
        Ok(self.all(p)?.chunks_exact(2).map(|b| num::bf16_to_f32(u16::from_le_bytes([b[0], b[1]]))).collect())
    }

    /// As [`Memory::read_f32`], of integers.
    ///
    /// # Errors
    /// As [`Memory::read`].
    pub fn read_i32(&self, p: Ptr) -> Result<Vec<i32>, SimError> {
        Ok(self.all(p)?.chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
    }

    /// Begins a launch: nobody has touched anything.
    pub(crate) fn begin(&mut self, races: bool, uninit: bool) {
        (self.races, self.uninit) = (races, uninit);
        for a in &mut self.allocs {
            a.writer.fill(0);
            a.reader.fill(0);
            a.sectors.fill(0);
            a.constant.fill(false);
            a.written.fill(false);
            a.marks.clear();
        }
    }

    /// Bytes of the sectors that were read, and written, since the launch began.
    pub(crate) fn sectors(&self) -> [u64; 2] {
        let count = |how: u8| self.allocs.iter().flat_map(|a| &a.sectors).filter(|s| **s & how > 0).count();
        [1, 2].map(|how| (count(how) * SECTOR) as u64)
    }

    /// The block whose accesses follow.
    pub(crate) fn enter(&mut self, block: u64) {
        self.block = (block % u64::from(MANY - 1)) as u16 + 1;
    }

    /// Checks bounds and alignment; offset of the bytes in their allocation.
    fn locate(&self, address: u64, len: u64, align: u64) -> Result<(usize, usize), Fault> {
        let found = self.find(address);
        match found.filter(|(i, off)| *off as u64 + len <= self.allocs[*i].bytes.len() as u64) {
            Some(_) if !address.is_multiple_of(align) => Err(Fault::Misaligned { space: "global", address, align }),
            Some(at) => Ok(at),
            None => {
                let near = match found {
                    Some((i, off)) => {
                        let a = &self.allocs[i];
                        format!(": byte {off} of {}, which has {} bytes", a.name, a.bytes.len())
                    }
                    None => String::new(),
                };
                Err(Fault::OutOfBounds { space: "global", address, bytes: len, near })
            }
        }
    }

    /// A kernel's read.
    pub(crate) fn load(&mut self, address: u64, len: u64, align: u64) -> Result<&[u8], Fault> {
        let (i, off) = self.locate(address, len, align)?;
        let (races, uninit, block) = (self.races, self.uninit, self.block);
        let a = &mut self.allocs[i];
        let r = off..off + len as usize;
        a.touch(r.clone(), 1);
        if uninit && let Some(n) = a.init[r.clone()].iter().position(|x| !x) {
            return Err(Fault::Uninitialised { space: "global", address: address + n as u64 });
        }
        if races {
            if a.reader.is_empty() {
                a.reader = vec![0; a.bytes.len()];
            }
            if !a.writer.is_empty() {
                for (n, w) in a.writer[r.clone()].iter().enumerate() {
                    if *w != 0 && *w != block {
                        return Err(race(address + n as u64, block, *w));
                    }
                }
            }
            for x in &mut a.reader[r.clone()] {
                *x = if *x == 0 || *x == block { block } else { MANY };
            }
        }
        Ok(&a.bytes[r])
    }

    /// A kernel's read of memory that no thread of the launch may write.
    pub(crate) fn load_constant(&mut self, address: u64, len: u64) -> Result<&[u8], Fault> {
        let (i, off) = self.locate(address, len, len)?;
        let a = &mut self.allocs[i];
        let r = off..off + len as usize;
        if let Some(n) = a.written.get(r.clone()).and_then(|w| w.iter().position(|x| *x)) {
            return Err(Fault::Constant { address: address + n as u64 });
        }
        if a.constant.is_empty() {
            a.constant = vec![false; a.bytes.len()];
        }
        a.constant[r].fill(true);
        self.load(address, len, len)
    }

    /// An access of a thread, by an ordinary load or store that is within bounds, beside those of the other threads of its block.
    pub(crate) fn touch(
        &mut self,
        address: u64,
        len: u64,
        (me, now): (Thread, u32),
        writes: bool,
        order: &dyn Order,
    ) -> Result<(), Fault> {
        let (i, off) = self.locate(address, len, 1)?;
        let (block, r) = (self.block, off..off + len as usize);
        let a = &mut self.allocs[i];
        let n = a.bytes.len();
        let other = match writes {
            true => a.marks.write(n, &r, block, (me, now), order),
            false => a.marks.read(n, &r, block, (me, now), order),
        };
        let mine = (32 * me.0) as u32 + me.1;
        other.map_or(Ok(()), |other| Err(Fault::ThreadRace { address, mine, other: other.into() }))
    }

    /// A kernel's write. `atomic`: other blocks may write the same bytes atomically.
    pub(crate) fn store(&mut self, address: u64, data: &[u8], align: u64, atomic: bool) -> Result<(), Fault> {
        let (i, off) = self.locate(address, data.len() as u64, align)?;
        let (races, block) = (self.races, self.block);
        let a = &mut self.allocs[i];
        let r = off..off + data.len();
        a.touch(r.clone(), 2);
        if let Some(n) = a.constant.get(r.clone()).and_then(|c| c.iter().position(|x| *x)) {
            return Err(Fault::Constant { address: address + n as u64 });
        }
        if a.written.is_empty() {
            a.written = vec![false; a.bytes.len()];
        }
        a.written[r.clone()].fill(true);
        if races && !atomic {
            if a.writer.is_empty() {
                a.writer = vec![0; a.bytes.len()];
            }
            for n in r.clone() {
                let (w, rd) = (a.writer[n], a.reader.get(n).copied().unwrap_or(0));
                for other in [w, rd] {
                    if other != 0 && other != block {
                        return Err(race(address + (n - off) as u64, block, other));
                    }
                }
                a.writer[n] = block;
            }
        }
        a.bytes[r.clone()].copy_from_slice(data);
        a.init[r].fill(true);
        Ok(())
    }

    /// The old value of an atomic update, which does not count as an ordinary read.
    pub(crate) fn peek(&self, address: u64, len: u64) -> Result<&[u8], Fault> {
        let (i, off) = self.locate(address, len, len)?;
        let a = &self.allocs[i];
        let r = off..off + len as usize;
        if self.uninit && a.init[r.clone()].contains(&false) {
            return Err(Fault::Uninitialised { space: "global", address });
        }
        Ok(&a.bytes[r])
    }
}

fn race(address: u64, mine: u16, other: u16) -> Fault {
    Fault::BlockRace { address, mine: u32::from(mine) - 1, other: if other == MANY { 0 } else { u32::from(other) - 1 } }
}
