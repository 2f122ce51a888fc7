//! What instructions do, for the lanes of one warp at once.

mod alu;
mod async_copy;
mod collective;
mod float;
mod matrix;
mod memory;

use crate::block::{Block, Next};
use crate::error::Fault;
use crate::isa::{Addr, BoolOp, Cmp, Inst, Op, Special};
use crate::warp::{Lanes, Warp, lanes};

/// The addresses of all lanes.
pub(crate) fn addresses(w: &Warp, a: &Addr) -> Lanes {
    w.get(a.base).map(|x| x.wrapping_add_signed(a.offset))
}

/// One address for the whole warp, from its first active lane.
pub(crate) fn address(w: &Warp, a: &Addr, on: u32) -> u64 {
    addresses(w, a)[on.trailing_zeros() as usize]
}

impl Block<'_> {
    /// Executes an instruction for the lanes `on`.
    pub(crate) fn exec(&mut self, w: &mut Warp, inst: &Inst, pc: u32, on: u32) -> Result<Next, Fault> {
        match &inst.op {
            Op::Nop => {}
            Op::Bra { target } => return Ok(Next::Branch(*target)),
            Op::Brx { index, targets } => {
                let i = w.get(*index);
                let t = lanes(on).map(|l| targets.get(i[l] as usize).copied()).collect::<Option<Vec<u32>>>();
                let t = t.ok_or_else(|| Fault::Misuse("the index has no branch target".into()))?;
                let mut all = vec![0; 32];
                lanes(on).zip(t).for_each(|(l, t)| all[l] = t);
                return Ok(Next::Table(all));
            }
            Op::Ret => return Ok(Next::Exit),
            Op::Trap => return Err(Fault::Misuse("trap".into())),
            Op::Setmaxnreg { n, more } => return self.resize(w, *n, *more, pc),
            Op::Special { d, which } => {
                let v = self.special(w, *which);
                w.put(*d, on, &v);
            }
            Op::Ld { .. } | Op::St { .. } | Op::Atom { .. } => self.memory(w, &inst.op, pc, on)?,
            Op::Shfl { .. }
            | Op::Vote { .. }
            | Op::Redux { .. }
            | Op::Elect { .. }
            | Op::MatchAny { .. }
            | Op::Activemask { .. }
            | Op::WarpSync { .. }
            | Op::Bar { .. }
            | Op::BarRed { .. }
            | Op::FenceMbarrierInit
            | Op::FenceProxyAsync => return self.collective(w, &inst.op, on),
            Op::Ldmatrix { .. } | Op::Stmatrix { .. } | Op::Mma { .. } => {
                if on != u32::MAX {
                    return Err(Fault::Divergence("a matrix instruction needs all 32 lanes".into()));
                }
                self.matrix(w, &inst.op, pc)?;
            }
            Op::WgFence | Op::WgMma { .. } | Op::WgCommit | Op::WgWait { .. } => {
                if on != u32::MAX {
                    return Err(Fault::Divergence("a warpgroup instruction needs all 32 lanes".into()));
                }
                self.warpgroup(w, &inst.op, pc)?;
            }
            Op::CpAsync { .. }
            | Op::CpCommit
            | Op::CpWait { .. }
            | Op::Mbarrier { .. }
            | Op::MbarWait { .. }
            | Op::TmaLoad { .. }
            | Op::TmaStore { .. }
            | Op::BulkLoad { .. }
            | Op::BulkStore { .. }
            | Op::BulkCommit
            | Op::BulkWait { .. } => return self.async_copy(w, &inst.op, pc, on),
            Op::Float1 { .. } | Op::Float2 { .. } | Op::Fma { .. } | Op::Cvt { .. } | Op::CvtPack { .. } => {
                float::exec(w, &inst.op, on);
            }
            other => alu::exec(w, other, on),
        }
        Ok(Next::Step)
    }

    fn special(&self, w: &Warp, which: Special) -> Lanes {
        let [bx, by, _] = self.l.block;
        std::array::from_fn(|l| {
            let t = w.id * 32 + l as u32;
            u64::from(match which {
                Special::Tid(0) => t % bx,
                Special::Tid(1) => t / bx % by,
                Special::Tid(_) => t / bx / by,
                Special::Ntid(i) => self.l.block[i],
                Special::Ctaid(i) => self.at[i],
                Special::Nctaid(i) => self.l.grid[i],
                Special::Lane => l as u32,
                Special::Warp => w.id,
                Special::Nwarp => self.threads().div_ceil(32),
                Special::LaneMask(c) => {
                    let bit = 1u64 << l;
                    (match c {
                        Cmp::Eq => bit,
                        Cmp::Lt => bit - 1,
                        Cmp::Le => 2 * bit - 1,
                        Cmp::Gt => !(2 * bit - 1),
                        _ => !(bit - 1),
                    }) as u32
                }
                Special::Clock => self.counts.warp_instructions as u32,
                Special::DynSmemSize => self.l.dynamic_shared,
            })
        })
    }
}

pub(crate) fn logic(f: BoolOp, a: u32, b: u32) -> u32 {
    match f {
        BoolOp::And => a & b,
        BoolOp::Or => a | b,
        BoolOp::Xor => a ^ b,
    }
}
