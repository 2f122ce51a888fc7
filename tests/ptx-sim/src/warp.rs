//! State of one warp: registers, lanes that stand at different instructions, asynchronous work under way.

use crate::error::Fault;
use crate::isa::{PSrc, Reg, Src, WgA};
use std::cell::Cell;

pub(crate) type Lanes = [u64; 32];

/// Lanes at one instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Group {
    pub(crate) pc: u32,
    pub(crate) mask: u32,
    /// Waiting in this barrier.
    pub(crate) barrier: Option<u8>,
}

/// A `cp.async` under way.
#[derive(Debug, Clone)]
pub(crate) struct Copy {
    pub(crate) lane: u32,
    pub(crate) group: u32,
    pub(crate) dst: u64,
    pub(crate) data: Vec<u8>,
}

/// Reads of shared memory under way for a bulk store: what is written where.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    pub(crate) lane: u32,
    pub(crate) group: u32,
    /// Shared address, global address, bytes.
    pub(crate) rows: Vec<(u64, u64, u64)>,
}

/// A warpgroup product under way: this warp's 16 rows.
#[derive(Debug, Clone)]
pub(crate) struct Product {
    pub(crate) group: u32,
    pub(crate) pc: u32,
    pub(crate) a: WgA,
    pub(crate) a_desc: u64,
    pub(crate) a_regs: [Lanes; 4],
    pub(crate) b_desc: u64,
    pub(crate) keep: bool,
}

/// What a register has to do with warpgroup products, which read and write registers on their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Access {
    /// An instruction of the warp touched it since the last `wgmma.fence`.
    pub(crate) touched: bool,
    /// Columns of the last product that summed into it since then.
    pub(crate) shape: u16,
    /// A product under way reads it, or sums into it.
    pub(crate) read: bool,
    pub(crate) summed: bool,
}

/// Before the first fence nothing is ordered.
const UNFENCED: Access = Access { touched: true, shape: 0, read: false, summed: false };
/// What registers hold that nothing wrote: no number as a float, far outside as an address.
const NOTHING: u64 = 0xffff_dead;

#[derive(Debug, Clone, Default)]
pub(crate) struct Warp {
    pub(crate) id: u32,
    /// Sorted by position.
    pub(crate) groups: Vec<Group>,
    pub(crate) live: u32,
    pub(crate) regs: Vec<Lanes>,
    pub(crate) preds: Vec<u32>,
    pub(crate) local: Vec<u8>,
    pub(crate) copies: Vec<Copy>,
    pub(crate) copy_group: [u32; 32],
    pub(crate) stores: Vec<Store>,
    pub(crate) store_group: [u32; 32],
    pub(crate) products: Vec<Product>,
    pub(crate) product_group: u32,
    /// A wait at an mbarrier has returned once before the phase ended.
    pub(crate) waited: bool,
    /// Registers that a thread owns at most, and how often `setmaxnreg` changed it, last where.
    pub(crate) owned: u32,
    pub(crate) resized: (u64, u32),
    /// A number for all instructions of products so far with what has to be the same for the warpgroup, and last where.
    pub(crate) multiplied: (u64, u32),
    access: Vec<Cell<Access>>,
    early: Cell<Option<&'static str>>,
}

impl Warp {
    pub(crate) fn new(id: u32, live: u32, (regs, preds, local): (u32, u32, u64), owned: u32) -> Warp {
        Warp {
            id,
            groups: vec![Group { pc: 0, mask: live, barrier: None }],
            live,
            regs: vec![[NOTHING; 32]; regs as usize],
            preds: vec![0; preds as usize],
            local: vec![0xff; 32 * local as usize],
            access: vec![Cell::new(UNFENCED); regs as usize],
            owned,
            ..Warp::default()
        }
    }

    fn touch(&self, r: Reg, write: bool) {
        let cell = &self.access[r as usize];
        let a = cell.get();
        if a.summed || a.read && write {
            self.early.set(Some(if a.summed { "summed into" } else { "read" }));
        }
        cell.set(Access { touched: true, ..a });
    }

    /// Whether an instruction touched registers of a product under way.
    pub(crate) fn early(&self) -> Result<(), Fault> {
        self.early.take().map_or(Ok(()), |what| Err(Fault::Early(what)))
    }

    /// `wgmma.fence`: what was done with registers before is ordered before products from here on.
    pub(crate) fn fence(&mut self) {
        for a in &mut self.access {
            *a = Cell::new(Access { touched: false, shape: 0, ..a.get() });
        }
    }

    /// A product with `n` columns starts: sums in `d`, rows of the left operand in `a`.
    pub(crate) fn start(&mut self, n: u16, d: &[Reg], a: &WgA) -> Result<(), Fault> {
        let left = if let WgA::Regs(a) = a { &a[..] } else { &[] };
        for s in left {
            let Src::Reg(r) = s else { continue };
            let cell = &self.access[*r as usize];
            let x = cell.get();
            if x.touched || x.shape > 0 {
                return Err(Fault::Unfenced("a register of its left operand was touched before"));
            }
            cell.set(Access { read: true, ..x });
        }
        for r in d {
            let cell = &self.access[*r as usize];
            let x = cell.get();
            if x.touched {
                return Err(Fault::Unfenced("a register of its sums was touched before"));
            }
            if ![0, n].contains(&x.shape) {
                return Err(Fault::Unfenced("a product of another shape sums into its registers"));
            }
            cell.set(Access { shape: n, summed: true, ..x });
        }
        Ok(())
    }

    /// Products are done: `summed` and `read` are the registers of those that are still under way.
    pub(crate) fn settle(&mut self, summed: &[Reg], read: &[Src]) {
        for a in &mut self.access {
            *a = Cell::new(Access { read: false, summed: false, ..a.get() });
        }
        for r in summed {
            let a = &mut self.access[*r as usize];
            *a = Cell::new(Access { summed: true, ..a.get() });
        }
        for s in read {
            let Src::Reg(r) = s else { continue };
            let a = &mut self.access[*r as usize];
            *a = Cell::new(Access { read: true, ..a.get() });
        }
    }

    /// An instruction of products at `pc`; `with` has to be the same for all warps of the warpgroup.
    pub(crate) fn multiplies(&mut self, pc: u32, with: [u64; 3]) {
        // FNV-1a.
        let step = |h: u64, x: u64| (h ^ x).wrapping_mul(0x100_0000_01b3);
        let start = if self.multiplied.0 == 0 { 0xcbf2_9ce4_8422_2325 } else { self.multiplied.0 };
        self.multiplied = (with.into_iter().fold(step(start, pc.into()), step), pc);
    }

    /// One lane of a register.
    pub(crate) fn set(&mut self, d: Reg, lane: usize, v: u64) {
        self.touch(d, true);
        self.regs[d as usize][lane] = v;
    }

    /// A value that no instruction of the warp reads.
    pub(crate) fn peek(&self, s: Src) -> Lanes {
        match s {
            Src::Reg(r) => self.regs[r as usize],
            Src::Imm(v) => [v; 32],
        }
    }

    pub(crate) fn get(&self, s: Src) -> Lanes {
        match s {
            Src::Reg(r) => {
                self.touch(r, false);
                self.regs[r as usize]
            }
            Src::Imm(v) => [v; 32],
        }
    }

    pub(crate) fn put(&mut self, d: Reg, mask: u32, v: &Lanes) {
        self.touch(d, true);
        let slot = &mut self.regs[d as usize];
        if mask == u32::MAX {
            *slot = *v;
        } else {
            for l in lanes(mask) {
                slot[l] = v[l];
            }
        }
    }

    pub(crate) fn pred(&self, p: PSrc) -> u32 {
        match p {
            PSrc::Is(p) => self.preds[p as usize],
            PSrc::Not(p) => !self.preds[p as usize],
            PSrc::Const(c) => {
                if c {
                    u32::MAX
                } else {
                    0
                }
            }
        }
    }

    pub(crate) fn put_pred(&mut self, d: u32, mask: u32, v: u32) {
        let slot = &mut self.preds[d as usize];
        *slot = (*slot & !mask) | (v & mask);
    }

    /// Moves lanes to a position, joining those that are there.
    pub(crate) fn go(&mut self, pc: u32, mask: u32) {
        if mask == 0 {
            return;
        }
        match self.groups.binary_search_by_key(&pc, |g| g.pc) {
            Ok(i) => self.groups[i].mask |= mask,
            Err(i) => self.groups.insert(i, Group { pc, mask, barrier: None }),
        }
    }
}

/// The set lanes of a mask, ascending.
pub(crate) fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    let mut m = mask;
    std::iter::from_fn(move || {
        (m != 0).then(|| {
            let l = m.trailing_zeros() as usize;
            m &= m - 1;
            l
        })
    })
}
