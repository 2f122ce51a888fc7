//! Launching a kernel: the grid, parameters, which checks run, and when asynchronous work finishes.

use crate::block::Block;
use crate::{Counts, Kernel, Memory, Ptr, SimError, Site, Traffic, Unit};

/// Shared memory of a block that needs not be asked for, bytes: static and dynamic together.
const UNASKED: u64 = 48 << 10;

/// When asynchronous work is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// At the wait that the program has for it, so that a missing wait gives wrong numbers.
    #[default]
    Late,
    /// When it is issued.
    AtOnce,
}

/// Which blocks of a grid, and which warps of a block, go first. A kernel whose result depends on it has a race.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Order {
    /// The first ones.
    #[default]
    Forward,
    /// The last ones.
    Backward,
}

/// What is checked besides bounds and alignment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checks {
    /// Accesses of shared memory by different threads, and of global memory by different blocks, that nothing orders.
    pub races: bool,
    /// Reads of bytes that were never written.
    pub uninitialised: bool,
}

impl Default for Checks {
    fn default() -> Self {
        Checks { races: true, uninitialised: true }
    }
}

/// A tensor map as `cuTensorMapEncodeTiled` takes it: no interleaving, element strides 1, zeros out of bounds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorMap {
    /// First element.
    pub base: Ptr,
    /// Bytes of an element.
    pub element: u32,
    /// Elements per dimension, innermost first.
    pub sizes: Vec<u64>,
    /// Bytes from one element to the next of dimension 1, 2, … (the innermost is left out).
    pub strides: Vec<u64>,
    /// Elements of the box, innermost first.
    pub boxes: Vec<u32>,
    /// Swizzle in bytes: 0, 32, 64 or 128.
    pub swizzle: u32,
}

/// A kernel argument.
#[derive(Debug, Clone, PartialEq)]
pub enum Param {
    Ptr(Ptr),
    I32(i32),
    I64(i64),
    F32(f32),
    /// A tensor map by value.
    TensorMap(TensorMap),
}

/// One launch.
#[derive(Debug, Clone)]
pub struct Launch<'a> {
    /// Blocks in x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block in x, y, z.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block, bytes.
    pub dynamic_shared: u32,
    /// Arguments in order.
    pub params: &'a [Param],
    pub mode: Mode,
    pub order: Order,
    pub checks: Checks,
    /// Runs at most so many blocks, evenly spread over the grid; counts are scaled as if the others did the same.
    pub sample: Option<u64>,
    /// Warp instructions of one block before it is given up as endless.
    pub max_steps: u64,
}

impl Default for Launch<'_> {
    fn default() -> Self {
        Launch {
            grid: [1; 3],
            block: [32, 1, 1],
            dynamic_shared: 0,
            params: &[],
            mode: Mode::Late,
            order: Order::Forward,
            checks: Checks::default(),
            sample: None,
            max_steps: 1 << 28,
        }
    }
}

impl Kernel {
    fn refuse(&self, what: String) -> SimError {
        SimError::Launch { kernel: self.name.clone(), what }
    }

    /// Parameter bytes and tensor maps; a map's first bytes hold its number.
    fn arguments(&self, params: &[Param]) -> Result<(Vec<u8>, Vec<TensorMap>), SimError> {
        if params.len() != self.params.len() {
            return Err(self.refuse(format!("{} parameters, {} arguments", self.params.len(), params.len())));
        }
        let (mut bytes, mut maps) = (vec![0; self.param_bytes as usize], vec![]);
        for (i, (d, p)) in self.params.iter().zip(params).enumerate() {
            let raw = match p {
                Param::Ptr(p) => p.0.to_le_bytes().to_vec(),
                Param::I32(x) => x.to_le_bytes().to_vec(),
                Param::I64(x) => x.to_le_bytes().to_vec(),
                Param::F32(x) => x.to_le_bytes().to_vec(),
                Param::TensorMap(m) => {
                    self.check_map(i, m)?;
                    maps.push(m.clone());
                    let mut raw = vec![0; 128];
                    raw[..8].copy_from_slice(&(maps.len() as u64).to_le_bytes());
                    raw
                }
            };
            if raw.len() as u64 != d.bytes {
                return Err(self.refuse(format!("parameter {i} has {} bytes, its argument {}", d.bytes, raw.len())));
            }
            let at = d.offset as usize;
            bytes[at..at + raw.len()].copy_from_slice(&raw);
        }
        Ok((bytes, maps))
    }

    /// The rules of the driver's encoder.
    fn check_map(&self, i: usize, m: &TensorMap) -> Result<(), SimError> {
        let bad = |what: &str| Err(self.refuse(format!("tensor map {i}: {what}")));
        let inner = m.boxes.first().map_or(0, |b| b * m.element);
        if m.sizes.is_empty()
            || m.sizes.len() > 5
            || m.boxes.len() != m.sizes.len()
            || m.strides.len() + 1 != m.sizes.len()
        {
            return bad("sizes, strides and boxes do not fit together");
        }
        if !m.base.0.is_multiple_of(16) || m.strides.iter().any(|s| s % 16 != 0) {
            return bad("base and strides must be multiples of 16 bytes");
        }
        if m.sizes.iter().any(|n| *n == 0 || *n > 1 << 32) || m.strides.iter().any(|s| *s == 0 || *s >= 1 << 40) {
            return bad("a dimension has 1 to 2^32 elements, which are less than 2^40 bytes apart");
        }
        if m.boxes.iter().any(|b| *b == 0 || *b > 256) || !inner.is_multiple_of(16) {
            return bad("a box has 1 to 256 elements a dimension, its rows a multiple of 16 bytes");
        }
        match m.swizzle {
            0 => Ok(()),
            s @ (32 | 64 | 128) if inner == s => Ok(()),
            _ => bad("with a swizzle the rows of the box have as many bytes as it"),
        }
    }

    /// Runs the grid, block after block.
    ///
    /// # Errors
    /// [`SimError::Launch`] when the launch does not fit the kernel, [`SimError::Fault`] and [`SimError::Deadlock`] when
    /// a block fails. The memory then holds what was written until then.
    pub fn launch(&self, mem: &mut Memory, l: Launch) -> Result<Counts, SimError> {
        let threads = l.block.iter().map(|b| u64::from(*b)).product::<u64>();
        if threads == 0 || threads > 1024 || l.grid.contains(&0) {
            return Err(self.refuse(format!("grid {:?}, block {:?}", l.grid, l.block)));
        }
        if let Some(m) = self.max_threads
            && threads > m.iter().map(|x| u64::from(*x)).product()
        {
            return Err(self.refuse(format!("{threads} threads, at most {m:?} declared")));
        }
        if self.required_threads.is_some_and(|r| r != l.block) {
            return Err(self.refuse(format!("block {:?}, {:?} required", l.block, self.required_threads)));
        }
        let shared = self.dynamic_base + u64::from(l.dynamic_shared) - crate::SHARED_BASE;
        let limit = if self.target.starts_with("sm_9") { 232_448 } else { 166_912 };
        if shared > limit {
            return Err(self.refuse(format!("{shared} bytes of shared memory, {} has {limit}", self.target)));
        }
        let fixed = self.shared_top - crate::SHARED_BASE;
        if fixed > UNASKED || u64::from(l.dynamic_shared) <= UNASKED && shared > UNASKED {
            return Err(
                self.refuse(format!("{shared} bytes of shared memory, {UNASKED} are there without being asked for"))
            );
        }
        let [x, y, z] = l.grid;
        if x > i32::MAX as u32 || y.max(z) > 65_535 {
            return Err(self.refuse(format!("a grid of {x} by {y} by {z} blocks")));
        }
        // Since PTX 8.1, which texts for the newer chip are of.
        let most = if self.target.starts_with("sm_9") { 32_764 } else { 4096 };
        if self.param_bytes > most {
            return Err(self.refuse(format!("{} bytes of parameters, at most {most} are allowed", self.param_bytes)));
        }
        let (params, maps) = self.arguments(l.params)?;
        mem.begin(l.checks.races, l.checks.uninitialised);
        let mut counts = Counts::default();
        let mut done = vec![0u64; self.code.len()];
        let mut traffic = vec![Traffic::default(); self.code.len()];
        let [nx, ny, nz] = l.grid.map(u64::from);
        let blocks = nx * ny * nz;
        let step = l.sample.map_or(1, |n| blocks.div_ceil(n.max(1)));
        for i in (0..blocks).step_by(step as usize) {
            let n = if l.order == Order::Forward { i } else { blocks - 1 - i };
            mem.enter(n);
            let at = [n % nx, n / nx % ny, n / nx / ny].map(|x| x as u32);
            Block::new(self, mem, &l, (&params, &maps), at, &mut traffic).run(&mut counts, &mut done)?;
        }
        let newer = self.target.starts_with("sm_9");
        for ((i, n), t) in self.code.iter().zip(done).zip(traffic).filter(|((_, n), _)| *n > 0) {
            Unit::take(&mut counts.cycles, &i.op, newer, n);
            if t != Traffic::default() {
                counts.cycles[Unit::Shared as usize] += t.wavefronts as f64;
                let opcode = self.opcodes[i.name as usize].clone();
                counts.sites.insert((self.name.clone(), i.line), Site { opcode, traffic: t });
            }
            *counts.by_opcode.entry(self.opcodes[i.name as usize].clone()).or_default() += n;
        }
        counts.scale(blocks, blocks.div_ceil(step));
        if step == 1 {
            [counts.sectors_read, counts.sectors_written] = mem.sectors();
        }
        Ok(counts)
    }
}
