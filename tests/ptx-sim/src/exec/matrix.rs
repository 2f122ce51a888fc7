//! Matrix instructions of a warp and of a warpgroup.

use super::addresses;
use super::async_copy::swizzle;
use crate::block::Block;
use crate::error::Fault;
use crate::isa::{Elem, Op, WgA};
use crate::num;
use crate::warp::{Product, Warp};
use crate::{SHARED_BASE, isa::Src};

/// The fields of a matrix descriptor: address, leading and other distance, offset of the pattern, swizzle.
const DESCRIPTOR: u64 = 0x3fff | 0x3fff << 16 | 0x3fff << 32 | 7 << 49 | 3 << 62;

/// Bytes of a descriptor's swizzle.
fn span(desc: u64) -> u32 {
    [0, 128, 64, 32][(desc >> 62) as usize]
}

/// Elements of a 32-bit register as f32, low half first; tf32 ignores the lower 13 bits.
fn elements(e: Elem, x: u64) -> [f32; 2] {
    match e {
        Elem::Bf16 => [num::bf16_to_f32(x as u16), num::bf16_to_f32((x >> 16) as u16)],
        Elem::F16 => [num::f16_to_f32(x as u16), num::f16_to_f32((x >> 16) as u16)],
        Elem::Tf32 => [f32::from_bits(x as u32 & !0x1fff), 0.0],
    }
}

/// Sets the elements of one operand register: `row` by lane, `k` by lane and register.
fn scatter(e: Elem, m: &mut [[f32; 16]], row: usize, t: usize, part: usize, x: u64) {
    let v = elements(e, x);
    if e == Elem::Tf32 {
        m[row][t + 4 * part] = v[0];
    } else {
        m[row][2 * t + 8 * part] = v[0];
        m[row][2 * t + 8 * part + 1] = v[1];
    }
}

/// The lanes with the rows of so many matrices.
fn rows(matrices: usize) -> u32 {
    u32::MAX >> (32 - 8 * matrices)
}

impl Block<'_> {
    pub(super) fn matrix(&mut self, w: &mut Warp, op: &Op, pc: u32) -> Result<(), Fault> {
        match op {
            Op::Ldmatrix { d, trans, addr } => {
                let at = addresses(w, addr);
                self.traffic[pc as usize].shared(&at, rows(d.len()), 16, false);
                for (i, d) in d.iter().enumerate() {
                    let mut m = [[0u16; 8]; 8];
                    for (r, row) in m.iter_mut().enumerate() {
                        let lane = (8 * i + r) as u32;
                        let off = self.sh.check_read(at[8 * i + r], 16, 16, (w.id as usize, lane), (false, false))?;
                        for (c, x) in row.iter_mut().enumerate() {
                            *x = u16::from_le_bytes([self.sh.bytes[off + 2 * c], self.sh.bytes[off + 2 * c + 1]]);
                        }
                    }
                    let v = std::array::from_fn(|l| {
                        let (g, t) = (l / 4, 2 * (l % 4));
                        let [a, b] = if *trans { [m[t][g], m[t + 1][g]] } else { [m[g][t], m[g][t + 1]] };
                        u64::from(a) | u64::from(b) << 16
                    });
                    w.put(*d, u32::MAX, &v);
                }
            }
            Op::Stmatrix { v, trans, addr } => {
                let at = addresses(w, addr);
                self.traffic[pc as usize].shared(&at, rows(v.len()), 16, false);
                for (i, v) in v.iter().enumerate() {
                    let x = w.get(*v);
                    let mut m = [[0u16; 8]; 8];
                    for (l, x) in x.iter().enumerate() {
                        for e in 0..2 {
                            let (r, c) = (l / 4, 2 * (l % 4) + e);
                            let slot = if *trans { &mut m[c][r] } else { &mut m[r][c] };
                            *slot = (x >> (16 * e)) as u16;
                        }
                    }
                    for (r, row) in m.iter().enumerate() {
                        let data: Vec<u8> = row.iter().flat_map(|x| x.to_le_bytes()).collect();
                        let me = (w.id as usize, (8 * i + r) as u32);
                        let off = self.sh.check_write(at[8 * i + r], 16, 16, me, Some(&data))?;
                        self.sh.bytes[off..off + 16].copy_from_slice(&data);
                    }
                }
            }
            Op::Mma { elem, k, d, a, b, c } => {
                let (mut ma, mut mb) = ([[0f32; 16]; 16], [[0f32; 16]; 8]);
                for (i, s) in a.iter().enumerate() {
                    let x = w.get(*s);
                    (0..32).for_each(|l| scatter(*elem, &mut ma, l / 4 + 8 * (i % 2), l % 4, i / 2, x[l]));
                }
                for (i, s) in b.iter().enumerate() {
                    let x = w.get(*s);
                    (0..32).for_each(|l| scatter(*elem, &mut mb, l / 4, l % 4, i, x[l]));
                }
                for (i, (d, c)) in d.iter().zip(c.iter().map(|c| w.get(*c)).collect::<Vec<_>>()).enumerate() {
                    let v = std::array::from_fn(|l| {
                        let (r, n) = (l / 4 + 8 * (i / 2), 2 * (l % 4) + i % 2);
                        let sum: f32 = ma[r].iter().zip(&mb[n]).map(|(x, y)| x * y).sum();
                        (f32::from_bits(c[l] as u32) + sum).to_bits().into()
                    });
                    w.put(*d, u32::MAX, &v);
                }
                self.counts.mma_flops += 2 * 16 * 8 * *k as u64;
            }
            _ => unreachable!("dispatched elsewhere"),
        }
        Ok(())
    }

    pub(super) fn warpgroup(&mut self, w: &mut Warp, op: &Op, pc: u32) -> Result<(), Fault> {
        if !matches!(op, Op::WgMma { .. }) {
            w.multiplies(pc, [0; 3]);
        }
        match op {
            Op::WgFence => w.fence(),
            Op::WgCommit => w.product_group += 1,
            Op::WgMma { n, d, a, b, scale_d, .. } => {
                w.start(*n as u16, d, a)?;
                let a_regs = match a {
                    WgA::Regs(r) => r.map(|s| w.peek(s)),
                    WgA::Desc(_) => [[0; 32]; 4],
                };
                let a_desc = if let WgA::Desc(s) = a { self.descriptor(w, *s)? } else { 0 };
                let b_desc = self.descriptor(w, *b)?;
                let keep = w.pred(*scale_d);
                if keep != 0 && keep != u32::MAX {
                    return Err(Fault::Misuse("the lanes have different scales of what is added to".into()));
                }
                let keep = keep != 0;
                w.multiplies(pc, [a_desc, b_desc, keep.into()]);
                let p = Product { group: w.product_group, pc, a: a.clone(), a_desc, a_regs, b_desc, keep };
                self.operands(w, &p)?;
                if !self.late() {
                    self.multiply(w, &p)?;
                }
                w.products.push(p);
            }
            Op::WgWait { keep } => {
                let limit = w.product_group.saturating_sub(*keep);
                let all = std::mem::take(&mut w.products);
                let (done, open): (Vec<_>, Vec<_>) = all.into_iter().partition(|p| p.group < limit);
                for p in &done {
                    if self.late() {
                        self.multiply(w, p)?;
                    }
                    for (off, n) in self.ranges(w, p) {
                        self.sh.release(off, n, w.id as usize);
                    }
                }
                for p in &open {
                    self.operands(w, p)?;
                }
                let (mut summed, mut read) = (vec![], vec![]);
                for p in &open {
                    let Op::WgMma { d, .. } = &self.k.code[p.pc as usize].op else { continue };
                    summed.extend_from_slice(d);
                    if let WgA::Regs(a) = &p.a {
                        read.extend_from_slice(a);
                    }
                }
                w.settle(&summed, &read);
                w.products = open;
            }
            _ => unreachable!("dispatched elsewhere"),
        }
        Ok(())
    }

    /// A matrix descriptor.
    fn descriptor(&self, w: &Warp, s: Src) -> Result<u64, Fault> {
        let (v, bad) = (w.get(s), |what: &str| Err(Fault::Misuse(what.into())));
        let d = v[0];
        if v.iter().any(|x| *x != d) {
            return bad("the lanes have different matrix descriptors");
        }
        if d & !DESCRIPTOR != 0 {
            return bad("bits of a matrix descriptor that mean nothing are set");
        }
        // Where a pattern of permuted pieces begins elsewhere than at a multiple of its size the descriptor would have to say so.
        let lines = u64::from(span(d) / 16).saturating_sub(1);
        if d >> 49 & 7 != 0 || (d & 0x3fff) << 4 >> 7 & lines != 0 {
            return bad("a matrix does not begin with its pattern of permuted pieces");
        }
        Ok(d)
    }

    /// Shared offsets of the rows of 16 bytes (or of single elements) that a product reads, in the order of
    /// [`operand`].
    fn ranges(&self, w: &Warp, p: &Product) -> Vec<(usize, usize)> {
        let Op::WgMma { elem, n, trans, .. } = &self.k.code[p.pc as usize].op else { return vec![] };
        let at = |a: u64| a.wrapping_sub(SHARED_BASE) as usize;
        let size = if *elem == Elem::Tf32 { 4 } else { 2 };
        let mut out: Vec<_> = operand(p.b_desc, 0..*n, size, trans[1]).map(|a| (at(a), size as usize)).collect();
        if matches!(p.a, WgA::Desc(_)) {
            let r = 16 * (w.id as usize % 4);
            out.extend(operand(p.a_desc, r..r + 16, size, trans[0]).map(|a| (at(a), size as usize)));
        }
        out
    }

    /// Checks the operands in shared memory and marks them as being read.
    fn operands(&mut self, w: &Warp, p: &Product) -> Result<(), Fault> {
        for (off, n) in self.ranges(w, p) {
            let a = (off as u64).wrapping_add(SHARED_BASE);
            self.sh.check_read(a, n as u64, n as u64, (w.id as usize, 32), (true, true))?;
        }
        Ok(())
    }

    /// This warp's 16 rows of a product.
    fn multiply(&mut self, w: &mut Warp, p: &Product) -> Result<(), Fault> {
        let Op::WgMma { elem, n, d, neg, .. } = &self.k.code[p.pc as usize].op else { return Ok(()) };
        let (n, k) = (*n, if *elem == Elem::Tf32 { 8 } else { 16 });
        let bytes = &self.sh.bytes;
        let read = |(off, size): &(usize, usize)| {
            let x = bytes[*off..off + size].iter().rev().fold(0u64, |v, b| v << 8 | u64::from(*b));
            elements(*elem, x)[0]
        };
        let at = self.ranges(w, p);
        // Rows of B by k, so that the inner loop runs over columns.
        let mut mb = vec![0f32; k * n];
        at[..n * k].iter().enumerate().for_each(|(i, o)| mb[i % k * n + i / k] = read(o));
        let mut ma = [[0f32; 16]; 16];
        match p.a {
            WgA::Desc(_) => at[n * k..].iter().enumerate().for_each(|(i, o)| ma[i / k][i % k] = read(o)),
            WgA::Regs(_) => {
                for (i, x) in p.a_regs.iter().enumerate() {
                    (0..32).for_each(|l| scatter(*elem, &mut ma, l / 4 + 8 * (i % 2), l % 4, i / 2, x[l]));
                }
            }
        }
        let sign = if neg[0] != neg[1] { -1.0 } else { 1.0 };
        let mut c = vec![[0f32; 256]; 16];
        for (row, a) in c.iter_mut().zip(&ma) {
            for (x, b) in a.iter().zip(mb.chunks(n)) {
                row.iter_mut().zip(b).for_each(|(c, b)| *c += x * b);
            }
        }
        for (i, d) in d.iter().enumerate() {
            let (j, q) = (i / 4, i % 4);
            let slot = &mut w.regs[*d as usize];
            for (l, x) in slot.iter_mut().enumerate() {
                let old = if p.keep { f32::from_bits(*x as u32) } else { 0.0 };
                let sum = c[l / 4 + 8 * (q / 2)][8 * j + 2 * (l % 4) + q % 2];
                *x = (old + sign * sum).to_bits().into();
            }
        }
        self.counts.mma_flops += 2 * 16 * (n * k) as u64;
        Ok(())
    }
}

/// Addresses of the elements of a matrix in shared memory, row (m or n) by row, along k.
fn operand(desc: u64, rows: std::ops::Range<usize>, size: u64, mn_major: bool) -> impl Iterator<Item = u64> {
    let field = |at: u32| (desc >> at & 0x3fff) << 4;
    let (start, lead, stride) = (field(0), field(16), field(32));
    let span = u64::from(span(desc));
    let k = 32 / size;
    rows.flat_map(move |r| {
        (0..k).map(move |k| {
            let r = r as u64;
            let off = match (mn_major, span) {
                (false, 0) => r / 8 * stride + k * size / 16 * lead + r % 8 * 16 + k * size % 16,
                (false, s) => r / 8 * stride + r % 8 * s + k * size,
                (true, 0) => r * size / 16 * stride + k / 8 * lead + k % 8 * 16 + r * size % 16,
                (true, s) => r * size / s * lead + r * size % s + k / 8 * stride + k % 8 * s,
            };
            swizzle(start + off, span as u32)
        })
    })
}
