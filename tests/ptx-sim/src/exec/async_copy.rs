//! `cp.async`, mbarriers, bulk and tensor copies.

use super::{address, addresses};
use crate::block::{Arrival, Block, Mbarrier, Next};
use crate::error::Fault;
use crate::isa::{Mbar, Op};
use crate::launch::TensorMap;
use crate::shared::ASYNC;
use crate::warp::{Copy, Store, Warp, lanes};
use crate::{PARAM_BASE, SHARED_BASE};

/// The hardware's swizzle: address bits from 4 on, exclusive or with those three further up.
pub(super) fn swizzle(a: u64, bytes: u32) -> u64 {
    let mask = u64::from(bytes / 16).saturating_sub(1);
    a ^ ((a >> 7 & mask) << 4)
}

/// Arrivals of an mbarrier, and bytes that it waits for, at most.
const MOST: u32 = (1 << 20) - 1;

impl Block<'_> {
    pub(super) fn async_copy(&mut self, w: &mut Warp, op: &Op, pc: u32, on: u32) -> Result<Next, Fault> {
        match op {
            Op::CpAsync { dst, src, bytes, valid } => {
                let (d, s) = (addresses(w, dst), addresses(w, src));
                let n = valid.map_or([u64::from(*bytes); 32], |v| w.get(v).map(|x| x & 0xffff_ffff));
                let t = &mut self.traffic[pc as usize];
                t.shared(&d, on, (*bytes).into(), false);
                t.global(&s, on, &n);
                for l in lanes(on) {
                    let len = u64::from(*bytes);
                    if n[l] > len {
                        return Err(Fault::Misuse(format!("a source size of {} of {bytes} bytes", n[l])));
                    }
                    let mut data = vec![0; *bytes as usize];
                    if n[l] > 0 {
                        if s[l] % len != 0 {
                            return Err(Fault::Misaligned { space: "global", address: s[l], align: len });
                        }
                        data[..n[l] as usize].copy_from_slice(self.mem.load(s[l], n[l], 1)?);
                        self.counts.global_read += n[l];
                    }
                    let off = self.sh.check_write(d[l], len, len, (w.id as usize, l as u32), None)?;
                    if !self.late() {
                        self.sh.bytes[off..off + data.len()].copy_from_slice(&data);
                    }
                    w.copies.push(Copy { lane: l as u32, group: w.copy_group[l], dst: off as u64, data });
                }
            }
            Op::CpCommit => lanes(on).for_each(|l| w.copy_group[l] += 1),
            Op::CpWait { keep } => {
                let limit = w.copy_group.map(|g| keep.map_or(u32::MAX, |k| g.saturating_sub(k)));
                let (done, open) = std::mem::take(&mut w.copies)
                    .into_iter()
                    .partition::<Vec<_>, _>(|c| on >> c.lane & 1 == 1 && c.group < limit[c.lane as usize]);
                w.copies = open;
                for c in done {
                    let off = c.dst as usize;
                    if self.late() {
                        self.sh.bytes[off..off + c.data.len()].copy_from_slice(&c.data);
                    }
                    self.sh.arrive(off, c.data.len(), (w.id * 32 + c.lane) as usize);
                }
            }
            Op::Mbarrier { f, addr, d } => self.mbarrier(w, *f, &addresses(w, addr), *d, on)?,
            Op::MbarWait { p, addr, state, parity, block } => {
                let (a, s) = (addresses(w, addr), w.get(*state));
                let mut ok = 0;
                let mut clock = [0; 33];
                for l in lanes(on) {
                    self.initialised(a[l], (w.id as usize, l as u32))?;
                    let b = self.mbar(a[l])?;
                    let phase = if *parity { s[l] & 1 } else { s[l] >> 32 };
                    let done = if *parity { b.phase & 1 != phase } else { b.phase != phase };
                    if done {
                        clock.iter_mut().zip(b.done).for_each(|(c, d)| *c = (*c).max(d));
                        ok |= 1 << l;
                    }
                }
                if *block && ok != on {
                    // `try_wait` may return before the phase ends, as it does here at first; who does not ask again goes
                    // on too early.
                    if self.late() && !std::mem::replace(&mut w.waited, true) {
                        w.put_pred(*p, on, 0);
                        return Ok(Next::Step);
                    }
                    return Ok(Next::Wait);
                }
                w.waited &= !*block;
                if ok != 0 {
                    self.sh.acquire(w.id as usize, &clock);
                }
                w.put_pred(*p, on, ok);
            }
            Op::TmaLoad { dst, map, at, bar } => {
                let (l, m) = self.one(w, on, address(w, map, on))?;
                let at: Vec<i64> = at.iter().map(|s| i64::from(w.get(*s)[l] as i32)).collect();
                let (dst, bar) = (addresses(w, dst)[l], addresses(w, bar)[l]);
                let mut rows = vec![];
                for (to, from, len) in self.boxes(&m, dst, &at)? {
                    let data = match from {
                        Some(a) => self.mem.load(a, len, u64::from(m.element))?.to_vec(),
                        None => vec![0; len as usize],
                    };
                    self.counts.global_read += if from.is_some() { len } else { 0 };
                    rows.push((self.sh.check_copy(to, len, 1, (w.id as usize, l as u32))?, data));
                }
                self.depart(Arrival { bar, thread: w.id * 32 + l as u32, pc, rows }, (w.id as usize, l as u32))?;
            }
            Op::BulkLoad { dst, src, bytes, bar } => {
                let l = self.single(on)?;
                let (d, s, n) = (addresses(w, dst)[l], addresses(w, src)[l], w.get(*bytes)[l] & 0xffff_ffff);
                if n % 16 != 0 {
                    return Err(Fault::Misuse(format!("a bulk copy of {n} bytes")));
                }
                let data = self.mem.load(s, n, 16)?.to_vec();
                self.counts.global_read += n;
                let off = self.sh.check_copy(d, n, 16, (w.id as usize, l as u32))?;
                let (bar, thread, rows) = (addresses(w, bar)[l], w.id * 32 + l as u32, vec![(off, data)]);
                self.depart(Arrival { bar, thread, pc, rows }, (w.id as usize, l as u32))?;
            }
            Op::TmaStore { map, at, src, .. } => {
                let (l, m) = self.one(w, on, address(w, map, on))?;
                let at: Vec<i64> = at.iter().map(|s| i64::from(w.get(*s)[l] as i32)).collect();
                let rows = self.boxes(&m, addresses(w, src)[l], &at)?;
                let rows: Vec<_> = rows.into_iter().filter_map(|(s, g, n)| g.map(|g| (s, g, n))).collect();
                self.traffic[pc as usize].rows(rows.iter().map(|(_, _, n)| n).sum());
                self.store_later(w, l, rows)?;
            }
            Op::BulkStore { dst, src, bytes } => {
                let l = self.single(on)?;
                let n = w.get(*bytes)[l] & 0xffff_ffff;
                let (from, to) = (addresses(w, src)[l], addresses(w, dst)[l]);
                if !(n | from | to).is_multiple_of(16) {
                    return Err(Fault::Misuse(format!("a bulk copy of {n} bytes from {from:#x} to {to:#x}")));
                }
                self.traffic[pc as usize].rows(n);
                self.store_later(w, l, vec![(addresses(w, src)[l], addresses(w, dst)[l], n)])?;
            }
            Op::BulkCommit => lanes(on).for_each(|l| w.store_group[l] += 1),
            Op::BulkWait { keep } => {
                let limit = w.store_group.map(|g| g.saturating_sub(*keep));
                let (done, open) = std::mem::take(&mut w.stores)
                    .into_iter()
                    .partition::<Vec<_>, _>(|s| on >> s.lane & 1 == 1 && s.group < limit[s.lane as usize]);
                w.stores = open;
                for s in done {
                    self.write_out(&s.rows)?;
                    for (a, _, n) in &s.rows {
                        self.sh.release((a - SHARED_BASE) as usize, *n as usize, w.id as usize);
                    }
                }
            }
            _ => unreachable!("dispatched elsewhere"),
        }
        Ok(Next::Step)
    }

    fn single(&self, on: u32) -> Result<usize, Fault> {
        if on.count_ones() == 1 {
            return Ok(on.trailing_zeros() as usize);
        }
        Err(Fault::Misuse(format!("{} lanes issue one bulk copy each", on.count_ones())))
    }

    /// The only lane and the tensor map at an address.
    fn one(&self, w: &Warp, on: u32, map: u64) -> Result<(usize, TensorMap), Fault> {
        let l = self.single(on)?;
        let off = map.wrapping_sub(PARAM_BASE) as usize;
        let b = self.params.get(off..off.saturating_add(8)).filter(|_| map.is_multiple_of(64));
        let n = b.map_or(0, |b| u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]));
        let found = (n as usize).checked_sub(1).and_then(|i| self.maps.get(i));
        let found = found.ok_or_else(|| Fault::Misuse(format!("no tensor map at {map:#x} (warp {})", w.id)))?;
        Ok((l, found.clone()))
    }

    /// The pieces of a box: shared address, global address (none: out of bounds), bytes. A piece is at most 16 bytes, so
    /// that swizzling moves it as a whole.
    fn boxes(&self, m: &TensorMap, shared: u64, at: &[i64]) -> Result<Vec<(u64, Option<u64>, u64)>, Fault> {
        let need = if m.swizzle > 0 { 8 * u64::from(m.swizzle) } else { 128 };
        if !shared.is_multiple_of(128) {
            return Err(Fault::Misaligned { space: "shared", address: shared - SHARED_BASE, align: need });
        }
        let (e, inner) = (u64::from(m.element), u64::from(m.boxes[0]));
        let rows: u64 = m.boxes[1..].iter().map(|b| u64::from(*b)).product();
        let mut out = vec![];
        for r in 0..rows {
            let (mut rest, mut base, mut inside) = (r, m.base.0, true);
            for (d, b) in m.boxes[1..].iter().enumerate() {
                let c = at[d + 1] + (rest % u64::from(*b)) as i64;
                rest /= u64::from(*b);
                inside &= c >= 0 && (c as u64) < m.sizes[d + 1];
                base = base.wrapping_add_signed(c.wrapping_mul(m.strides[d] as i64));
            }
            let step = 16 / e;
            for c in (0..inner).step_by(step as usize) {
                let to = swizzle(shared + (r * inner + c) * e, m.swizzle);
                let col = |i: u64| at[0] + (c + i) as i64;
                let ok = |i: u64| inside && col(i) >= 0 && (col(i) as u64) < m.sizes[0];
                let from = |i: u64| base.wrapping_add_signed(col(i) * e as i64);
                if (0..step).all(ok) {
                    out.push((to, Some(from(0)), 16));
                } else if !(0..step).any(ok) {
                    out.push((to, None, 16));
                } else {
                    out.extend((0..step).map(|i| (to + i * e, ok(i).then(|| from(i)), e)));
                }
            }
        }
        Ok(out)
    }

    fn store_later(&mut self, w: &mut Warp, l: usize, rows: Vec<(u64, u64, u64)>) -> Result<(), Fault> {
        for (s, _, n) in &rows {
            self.sh.check_read(*s, *n, 1, (w.id as usize, l as u32), (true, true))?;
        }
        if !self.late() {
            self.write_out(&rows)?;
        }
        w.stores.push(Store { lane: l as u32, group: w.store_group[l], rows });
        Ok(())
    }

    fn write_out(&mut self, rows: &[(u64, u64, u64)]) -> Result<(), Fault> {
        for (s, g, n) in rows {
            let off = (s - SHARED_BASE) as usize;
            let data = &self.sh.bytes[off..off + *n as usize];
            self.counts.global_written += n;
            self.mem.store(*g, data, 1, false)?;
        }
        Ok(())
    }

    fn depart(&mut self, job: Arrival, me: (usize, u32)) -> Result<(), Fault> {
        self.initialised(job.bar, me)?;
        let b = self.mbar(job.bar)?.clone();
        // Copies report in the asynchronous proxy, which a barrier of the block alone does not order.
        let seen = b.fenced.is_some_and(|t| self.sh.sees(me, (b.made.0, b.made.1, t)));
        if self.l.checks.races && !seen {
            let lacks =
                "fence.mbarrier_init (or fence.proxy.async) of the thread that initialised it, before the two meet";
            return Err(unseen(job.bar, "an asynchronous copy".into(), &b, lacks));
        }
        if self.late() {
            self.arrivals.push(job)
        } else {
            self.land(job)
        }
        Ok(())
    }

    /// Bytes arrive in shared memory and at their mbarrier.
    pub(crate) fn land(&mut self, job: Arrival) {
        let mut n = 0;
        let bytes = job.rows.iter().map(|r| r.1.len() as u64).sum();
        self.traffic[job.pc as usize].rows(bytes);
        for (off, data) in &job.rows {
            self.sh.bytes[*off..off + data.len()].copy_from_slice(data);
            self.sh.arrive(*off, data.len(), 1024);
            n += data.len() as i64;
        }
        let now = self.sh.now;
        self.sh.now += 1;
        if let Some(b) = self.mbars.get_mut(&job.bar) {
            b.tx -= n;
            b.clock[ASYNC] = now;
            b.turn();
        }
    }

    fn mbar(&mut self, a: u64) -> Result<&mut Mbarrier, Fault> {
        let text = || Fault::Misuse(format!("no mbarrier was initialised at {:#x}", a.wrapping_sub(SHARED_BASE)));
        self.mbars.get_mut(&a).ok_or_else(text)
    }

    /// Whether a thread sees that an mbarrier was initialised.
    fn initialised(&mut self, a: u64, me: (usize, u32)) -> Result<(), Fault> {
        let b = self.mbar(a)?.clone();
        if self.l.checks.races && !self.sh.sees(me, b.made) {
            let who = format!("thread {}", me.0 as u32 * 32 + me.1);
            return Err(unseen(a, who, &b, "nothing orders the two"));
        }
        Ok(())
    }

    fn mbarrier(&mut self, w: &mut Warp, f: Mbar, at: &[u64; 32], d: Option<u32>, on: u32) -> Result<(), Fault> {
        for l in lanes(on) {
            let me = (w.id as usize, l as u32);
            let a = at[l];
            match f {
                Mbar::Init(n) => {
                    let n = w.get(n)[l] as u32;
                    if !(1..=MOST).contains(&n) {
                        return Err(Fault::Misuse(format!("an mbarrier of {n} arrivals, 1 to {MOST} are allowed")));
                    }
                    let off = self.sh.check_write(a, 8, 8, me, Some(&[0; 8]))?;
                    self.sh.bytes[off..off + 8].fill(0);
                    let made = (w.id as usize, l as u32, self.sh.now);
                    let b = Mbarrier {
                        count: n,
                        pending: n,
                        tx: 0,
                        phase: 0,
                        clock: [0; 33],
                        done: [0; 33],
                        made,
                        fenced: None,
                    };
                    self.mbars.insert(a, b);
                    continue;
                }
                Mbar::Inval => {
                    self.mbar(a)?;
                    self.mbars.remove(&a);
                    continue;
                }
                _ => {}
            }
            self.initialised(a, me)?;
            let mine = self.sh.publish(w.id as usize);
            let n = match f {
                Mbar::ExpectTx(n) => {
                    let n = w.get(n)[l] as u32;
                    self.mbar(a)?.expect(n)?;
                    continue;
                }
                Mbar::Arrive { tx, count } => {
                    let tx = tx.map_or(0, |t| w.get(t)[l] as u32);
                    let n = count.map_or(1, |c| w.get(c)[l] as u32);
                    let b = self.mbar(a)?;
                    b.expect(tx)?;
                    if let Some(d) = d {
                        w.set(d, l, b.phase << 32);
                    }
                    n
                }
                _ => continue,
            };
            let b = self.mbar(a)?;
            if n > b.pending {
                return Err(Fault::Misuse(format!("more arrivals than the {} of the mbarrier", b.count)));
            }
            b.pending -= n;
            b.clock.iter_mut().zip(mine).for_each(|(c, m)| *c = (*c).max(m));
            b.turn();
        }
        Ok(())
    }
}

fn unseen(a: u64, who: String, b: &Mbarrier, lacks: &'static str) -> Fault {
    Fault::Barrier { address: a.wrapping_sub(SHARED_BASE), who, by: b.made.0 as u32 * 32 + b.made.1, lacks }
}

impl Mbarrier {
    /// So many more bytes are announced.
    fn expect(&mut self, bytes: u32) -> Result<(), Fault> {
        self.tx += i64::from(bytes);
        if self.tx > i64::from(MOST) {
            return Err(Fault::Misuse(format!("an mbarrier waits for {} bytes, at most {MOST} are allowed", self.tx)));
        }
        Ok(())
    }

    /// The phase ends when all have arrived and all announced bytes too.
    fn turn(&mut self) {
        if self.pending == 0 && self.tx == 0 {
            self.phase += 1;
            self.pending = self.count;
            self.done = self.clock;
        }
    }
}
