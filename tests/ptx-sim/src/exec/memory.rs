//! Loads, stores and atomics.

use super::addresses;
use super::alu::{extend, low};
use crate::block::Block;
use crate::error::Fault;
use crate::isa::{AtomOp, Op, Space, Ty};
use crate::num;
use crate::shared::Among;
use crate::warp::{Lanes, Warp, lanes};
use crate::{GLOBAL_BASE, LOCAL_BASE, PARAM_BASE, SHARED_BASE, SHARED_END};

fn little(b: &[u8]) -> u64 {
    b.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b))
}

impl Block<'_> {
    fn space(&self, space: Space, a: u64) -> Result<Space, Fault> {
        let found = match a {
            _ if a < SHARED_END => Space::Shared,
            _ if (PARAM_BASE..LOCAL_BASE).contains(&a) => Space::Param,
            _ if (LOCAL_BASE..1 << 32).contains(&a) => Space::Local,
            _ if a >= GLOBAL_BASE => Space::Global,
            _ => space,
        };
        if space == Space::Generic || space == found {
            return Ok(found);
        }
        let name = match space {
            Space::Global => "global",
            Space::Shared => "shared",
            Space::Local => "local",
            _ => "param",
        };
        Err(Fault::OutOfBounds { space: name, address: a, bytes: 0, near: ": the address is of another space".into() })
    }

    /// Reads bytes for one lane; a value that is narrower than 8 bytes is zero-extended.
    fn fetch(
        &mut self,
        w: &Warp,
        lane: usize,
        (space, constant): (Space, bool),
        a: u64,
        out: &mut [u64],
        size: usize,
    ) -> Result<(), Fault> {
        let len = (size * out.len()) as u64;
        let outside = |space| Fault::OutOfBounds { space, address: a, bytes: len, near: String::new() };
        let bytes: &[u8] = match self.space(space, a)? {
            Space::Shared => {
                let off = self.sh.check_read(a, len, len, (w.id as usize, lane as u32), (false, false))?;
                &self.sh.bytes[off..off + len as usize]
            }
            Space::Param => {
                let off = (a - PARAM_BASE) as usize;
                self.params.get(off..off + len as usize).ok_or_else(|| outside("param"))?
            }
            Space::Local => {
                let (off, per) = ((a - LOCAL_BASE) as usize, w.local.len() / 32);
                if off + len as usize > per {
                    return Err(outside("local"));
                }
                &w.local[lane * per + off..lane * per + off + len as usize]
            }
            _ => {
                self.counts.global_read += len;
                if !constant {
                    self.beside(w, lane, a, len, false)?;
                }
                if constant { self.mem.load_constant(a, len)? } else { self.mem.load(a, len, len)? }
            }
        };
        for (o, b) in out.iter_mut().zip(bytes.chunks(size)) {
            *o = little(b);
        }
        Ok(())
    }

    fn put(&mut self, w: &mut Warp, lane: usize, space: Space, a: u64, data: &[u8]) -> Result<(), Fault> {
        let len = data.len() as u64;
        let outside = |space| Fault::OutOfBounds { space, address: a, bytes: len, near: String::new() };
        match self.space(space, a)? {
            Space::Shared => {
                let off = self.sh.check_write(a, len, len, (w.id as usize, lane as u32), Some(data))?;
                if self.mbars.range(a.saturating_sub(7)..a + len).next().is_some() {
                    return Err(Fault::Misuse(format!("a store over the mbarrier at {:#x}", a - SHARED_BASE)));
                }
                self.sh.bytes[off..off + data.len()].copy_from_slice(data);
            }
            Space::Param => return Err(outside("param")),
            Space::Local => {
                let (off, per) = ((a - LOCAL_BASE) as usize, w.local.len() / 32);
                if off + data.len() > per {
                    return Err(outside("local"));
                }
                w.local[lane * per + off..lane * per + off + data.len()].copy_from_slice(data);
            }
            _ => {
                self.counts.global_written += len;
                self.beside(w, lane, a, len, true)?;
                self.mem.store(a, data, len, false)?;
            }
        }
        Ok(())
    }

    /// Checks an access of global memory beside those of the other threads of the block.
    fn beside(&mut self, w: &Warp, lane: usize, a: u64, len: u64, writes: bool) -> Result<(), Fault> {
        if !self.l.checks.races {
            return Ok(());
        }
        let me = (w.id as usize, lane as u32);
        self.mem.touch(a, len, (me, self.sh.now), writes, &Among(&self.sh, me))
    }

    /// Counts what lanes ask of shared or global memory, so many bytes each.
    fn asks(&mut self, pc: u32, (space, on): (Space, u32), at: &Lanes, bytes: u64, atomic: bool) -> Result<(), Fault> {
        let space = self.space(space, at[on.trailing_zeros() as usize])?;
        let t = &mut self.traffic[pc as usize];
        match space {
            Space::Shared => t.shared(at, on, bytes, atomic),
            Space::Global => t.global(at, on, &[bytes; 32]),
            _ => {}
        }
        Ok(())
    }

    pub(super) fn memory(&mut self, w: &mut Warp, op: &Op, pc: u32, on: u32) -> Result<(), Fault> {
        match op {
            Op::Ld { space, constant, ty, d, addr } => {
                let (at, size, n) = (addresses(w, addr), ty.bits() as usize / 8, d.len());
                self.asks(pc, (*space, on), &at, (size * n) as u64, false)?;
                let mut got = [[0u64; 8]; 32];
                for l in lanes(on) {
                    self.fetch(w, l, (*space, *constant), at[l], &mut got[l][..n], size)?;
                }
                for (i, d) in d.iter().enumerate() {
                    if let Some(d) = d {
                        let v =
                            std::array::from_fn(
                                |l| if ty.signed() { extend(got[l][i], *ty) as u64 } else { got[l][i] },
                            );
                        w.put(*d, on, &v);
                    }
                }
            }
            Op::St { space, ty, addr, v } => {
                let (at, size) = (addresses(w, addr), ty.bits() as usize / 8);
                self.asks(pc, (*space, on), &at, (size * v.len()) as u64, false)?;
                let vals: Vec<_> = v.iter().map(|v| w.get(*v)).collect();
                for l in lanes(on) {
                    let mut buf = [0u8; 32];
                    for (i, v) in vals.iter().enumerate() {
                        buf[i * size..(i + 1) * size].copy_from_slice(&v[l].to_le_bytes()[..size]);
                    }
                    self.put(w, l, *space, at[l], &buf[..size * v.len()])?;
                }
            }
            Op::Atom { space, f, ty, d, addr, v, swap } => {
                let (at, size) = (addresses(w, addr), u64::from(ty.bits() / 8));
                let vals: Vec<_> = v.iter().map(|v| w.get(*v)).collect();
                let swap = swap.map(|s| w.get(s));
                self.asks(pc, (*space, on), &at, size * v.len() as u64, true)?;
                for l in lanes(on) {
                    for (i, v) in vals.iter().enumerate() {
                        let a = at[l] + i as u64 * size;
                        let shared = self.space(*space, a)? == Space::Shared;
                        let old = if shared {
                            let off = (a.wrapping_sub(SHARED_BASE)) as usize;
                            let b = self.sh.bytes.get(off..off + size as usize);
                            little(b.ok_or_else(|| Fault::OutOfBounds {
                                space: "shared",
                                address: off as u64,
                                bytes: size,
                                near: String::new(),
                            })?)
                        } else {
                            little(self.mem.peek(a, size)?)
                        };
                        let new = combine(*f, *ty, old, v[l], swap.map(|s| s[l]));
                        let data = new.to_le_bytes();
                        if shared {
                            let off = (a - SHARED_BASE) as usize;
                            self.sh.bytes[off..off + size as usize].copy_from_slice(&data[..size as usize]);
                        } else {
                            self.counts.global_written += size;
                            self.mem.store(a, &data[..size as usize], size, true)?;
                        }
                        if let Some(d) = d {
                            w.set(*d, l, old);
                        }
                    }
                }
            }
            _ => unreachable!("dispatched elsewhere"),
        }
        Ok(())
    }
}

/// The new value of an atomic update; also one step of `redux`.
pub(super) fn combine(f: AtomOp, ty: Ty, old: u64, v: u64, swap: Option<u64>) -> u64 {
    let bits = ty.bits();
    let halves = |g: fn(f32, f32) -> f32, wide: fn(u16) -> f32, small: fn(f32) -> u16| {
        let part = |s: u32| u64::from(small(g(wide((old >> s) as u16), wide((v >> s) as u16))));
        if bits == 16 { part(0) } else { part(0) | part(16) << 16 }
    };
    let g: fn(f32, f32) -> f32 = match f {
        AtomOp::Min => |a, b| num::min(a, b, false),
        AtomOp::Max => |a, b| num::max(a, b, false),
        _ => |a, b| a + b,
    };
    match ty {
        Ty::F32 => (f32::from_bits(old as u32) + f32::from_bits(v as u32)).to_bits().into(),
        Ty::F64 => (f64::from_bits(old) + f64::from_bits(v)).to_bits(),
        Ty::Bf16 | Ty::Bf16x2 => halves(g, num::bf16_to_f32, num::f32_to_bf16),
        Ty::F16 | Ty::F16x2 => halves(g, num::f16_to_f32, num::f32_to_f16),
        _ => {
            let (a, b) = (extend(old, ty), extend(v, ty));
            let r = match f {
                AtomOp::Add => old.wrapping_add(v),
                AtomOp::Min => a.min(b) as u64,
                AtomOp::Max => a.max(b) as u64,
                AtomOp::And => old & v,
                AtomOp::Or => old | v,
                AtomOp::Xor => old ^ v,
                AtomOp::Exch => v,
                AtomOp::Cas => {
                    if low(old, bits) == low(v, bits) {
                        swap.unwrap_or(v)
                    } else {
                        old
                    }
                }
            };
            low(r, bits)
        }
    }
}
