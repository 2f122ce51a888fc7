//! Shuffles, votes and barriers.

use super::memory::combine;
use crate::block::{Block, Next};
use crate::error::Fault;
use crate::isa::{Op, PSrc, Shuffle, Src, Ty, Vote};
use crate::warp::{Warp, lanes};

impl Block<'_> {
    pub(super) fn collective(&mut self, w: &mut Warp, op: &Op, on: u32) -> Result<Next, Fault> {
        if matches!(op, Op::Shfl { .. } | Op::Vote { .. } | Op::Redux { .. } | Op::MatchAny { .. }) && on == w.live {
            self.sh.meet(w.id as usize);
        }
        match op {
            Op::Shfl { f, d, p, a, b, c, members } => {
                self.members(w, *members, on)?;
                let (a, b, c) = (w.get(*a), w.get(*b), w.get(*c));
                let (mut v, mut ok) = ([0; 32], 0u32);
                for l in lanes(on) {
                    let (lane, n) = (l as i64, (b[l] & 31) as i64);
                    let (clamp, seg) = ((c[l] & 31) as i64, (c[l] >> 8 & 31) as i64);
                    let (lo, hi) = (lane & seg, (lane & seg) | (clamp & !seg));
                    let (j, inside) = match f {
                        Shuffle::Up => (lane - n, lane - n >= hi),
                        Shuffle::Down => (lane + n, lane + n <= hi),
                        Shuffle::Bfly => (lane ^ n, lane ^ n <= hi),
                        Shuffle::Idx => (lo | (n & !seg), lo | (n & !seg) <= hi),
                    };
                    let j = if inside { j as usize } else { l };
                    if on >> j & 1 == 0 {
                        return Err(Fault::Misuse(format!("lane {l} reads lane {j}, which does not take part")));
                    }
                    ok |= u32::from(inside) << l;
                    v[l] = a[j] & 0xffff_ffff;
                }
                w.put(*d, on, &v);
                if let Some(p) = p {
                    w.put_pred(*p, on, ok);
                }
            }
            Op::Vote { f, d, p, a, members } => {
                self.members(w, *members, on)?;
                let yes = w.pred(*a) & on;
                if let Some(d) = d {
                    w.put(*d, on, &[yes.into(); 32]);
                }
                if let Some(p) = p {
                    let v = match f {
                        Vote::All => yes == on,
                        Vote::Any => yes != 0,
                        _ => yes == 0 || yes == on,
                    };
                    w.put_pred(*p, on, if v { u32::MAX } else { 0 });
                }
            }
            Op::Redux { f, ty, d, a, members } => {
                self.members(w, *members, on)?;
                let a = w.get(*a);
                let ty = if matches!(ty, Ty::B(_)) { Ty::U(32) } else { *ty };
                let mut ls = lanes(on);
                let first = ls.next().map_or(0, |l| a[l]);
                let v = ls.fold(first, |v, l| combine(*f, ty, v, a[l], None));
                w.put(*d, on, &[v; 32]);
            }
            Op::Elect { d, p, members } => {
                self.members(w, *members, on)?;
                let first = on.trailing_zeros();
                if let Some(d) = d {
                    w.put(*d, on, &[first.into(); 32]);
                }
                w.put_pred(*p, on, 1 << first);
            }
            Op::MatchAny { d, bits, a, members } => {
                self.members(w, *members, on)?;
                let a = w.get(*a).map(|x| super::alu::low(x, *bits));
                let v = std::array::from_fn(|l| lanes(on).filter(|j| a[*j] == a[l]).fold(0, |m, j| m | 1u64 << j));
                w.put(*d, on, &v);
            }
            Op::Activemask { d } => w.put(*d, on, &[on.into(); 32]),
            Op::WarpSync { members } => {
                self.members(w, *members, on)?;
                self.sh.warp_sync[w.id as usize] = self.sh.now;
                self.sh.now += 1;
            }
            Op::FenceProxyAsync => {
                self.sh.fence(w.id as usize, lanes(on));
                self.fence_mbarriers(w, on);
            }
            Op::FenceMbarrierInit => self.fence_mbarriers(w, on),
            Op::Bar { id, threads, wait } => return self.barrier(w, *id, *threads, *wait, None, on),
            Op::BarRed { id, a, .. } => return self.barrier(w, *id, None, true, Some(*a), on),
            _ => unreachable!("dispatched elsewhere"),
        }
        Ok(Next::Step)
    }

    /// Threads make visible to asynchronous copies which mbarriers they have initialised.
    fn fence_mbarriers(&mut self, w: &Warp, on: u32) {
        let now = self.sh.now;
        for b in self.mbars.values_mut().filter(|b| b.made.0 == w.id as usize && on >> b.made.1 & 1 == 1) {
            b.fenced.get_or_insert(now);
        }
        self.sh.now += 1;
    }

    /// `setmaxnreg`: a warp gives registers back to its block, or takes some of those that others gave back.
    pub(super) fn resize(&mut self, w: &mut Warp, n: u32, more: bool, pc: u32) -> Result<Next, Fault> {
        let bad = |what: String| Err(Fault::Misuse(what));
        if !n.is_multiple_of(8) || !(24..=256).contains(&n) {
            return bad(format!("{n} registers are no multiple of 8 from 24 to 256"));
        }
        if self.k.registers().is_none() {
            return bad("setmaxnreg in a kernel whose registers neither .maxnreg nor .maxntid bounds".into());
        }
        if more && n < w.owned || !more && n > w.owned {
            return bad(format!("a thread that owns {} registers asks for {n}", w.owned));
        }
        if more && (n - w.owned) * 32 > self.spare {
            return Ok(Next::Wait);
        }
        self.spare = self.spare + w.owned * 32 - n * 32;
        (w.owned, w.resized) = (n, (w.resized.0 + 1, pc));
        Ok(Next::Step)
    }

    /// The lanes that execute are those that the mask names.
    fn members(&self, w: &Warp, members: Src, on: u32) -> Result<(), Fault> {
        let m = w.get(members);
        for l in lanes(on) {
            if m[l] as u32 != on {
                let (named, lane) = (m[l] as u32, l);
                return Err(Fault::Divergence(format!(
                    "lane {lane} names lanes {named:#010x}, lanes {on:#010x} are here"
                )));
            }
        }
        Ok(())
    }

    fn barrier(
        &mut self,
        w: &mut Warp,
        id: Src,
        threads: Option<Src>,
        wait: bool,
        vote: Option<PSrc>,
        on: u32,
    ) -> Result<Next, Fault> {
        if on != w.live {
            return Err(Fault::Divergence(format!("lanes {on:#010x} of {:#010x} reach a block barrier", w.live)));
        }
        let l = on.trailing_zeros() as usize;
        let id = w.get(id)[l] as usize;
        let expected = threads.map_or(self.threads(), |t| w.get(t)[l] as u32);
        if id > 15 {
            return Err(Fault::Misuse(format!("there is no barrier {id}")));
        }
        if threads.is_some() && (expected == 0 || !expected.is_multiple_of(32)) {
            return Err(Fault::Misuse(format!("a barrier of {expected} threads, not a multiple of 32")));
        }
        let mine = self.sh.publish(w.id as usize);
        let b = &mut self.bars[id];
        if b.expected != 0 && b.expected != expected {
            let text = format!("barrier {id}: {} threads expected by one warp, {expected} by another", b.expected);
            return Err(Fault::Divergence(text));
        }
        // A warp counts with all its lanes; the last warp of a block may be short.
        b.arrived += if threads.is_some() { 32 } else { on.count_ones() };
        b.expected = expected;
        b.warps |= 1 << w.id;
        if b.arrived > expected {
            return Err(Fault::Divergence(format!("barrier {id}: {} threads, {expected} expected", b.arrived)));
        }
        let clock = b.clock.get_or_insert([0; 33]);
        clock.iter_mut().zip(mine).for_each(|(a, b)| *a = (*a).max(b));
        if let Some(p) = vote {
            b.votes[w.id as usize] = w.pred(p) & on;
        }
        Ok(if wait { Next::Block(id as u8) } else { Next::Step })
    }
}
