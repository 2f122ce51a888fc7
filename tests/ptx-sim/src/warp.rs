//! State of one warp: registers, lanes that stand at different instructions, asynchronous work under way.

use crate::isa::{PSrc, Reg, Src, WgA};

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
}

impl Warp {
    pub(crate) fn get(&self, s: Src) -> Lanes {
        match s {
            Src::Reg(r) => self.regs[r as usize],
            Src::Imm(v) => [v; 32],
        }
    }

    pub(crate) fn put(&mut self, d: Reg, mask: u32, v: &Lanes) {
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
