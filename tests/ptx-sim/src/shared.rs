//! Shared memory of a block and who may touch what when.
//!
//! Time is one counter that moves at every synchronisation. Each pair of bytes remembers its last write (thread, time) and
//! the reads since; each warp knows up to which time it sees every other warp's accesses (a vector clock). Two accesses
//! that neither order covers, one of them a write, are a race. Lanes of one warp are ordered by `bar.warp.sync` and by
//! block barriers only. Work under way marks its bytes: nobody may touch what it writes, nobody may write what it reads.
//!
//! Copies and products of the asynchronous proxy see, and write over, what a thread stored only behind a proxy fence on the way between the
//! two: of that thread after its store, or of all lanes of theirs after the two have met.

use crate::SHARED_BASE;
use crate::error::Fault;
use crate::touch::{Order, Thread};
use std::collections::HashMap;

/// Asynchronous copies as a writer; also its place in clocks.
pub(crate) const ASYNC: usize = 32;
pub(crate) type Clock = [u32; 33];
const UNDER_WAY: u32 = u32::MAX;

#[derive(Debug, Clone, Copy, Default)]
struct Cell {
    time: u32,
    readers: u32,
    /// Thread, or 1024 for asynchronous copies.
    thread: u16,
    init: bool,
    incoming: u8,
}

/// A lane's last proxy fence: what it saw then of other warps and of the other lanes of its own, and when that was.
#[derive(Debug, Clone, Copy)]
struct Fence {
    sees: Clock,
    warp_sync: u32,
    time: u32,
}

pub(crate) struct Shared {
    pub(crate) bytes: Vec<u8>,
    /// Bytes read and written.
    pub(crate) moved: [u64; 2],
    cells: Vec<Cell>,
    /// Sets of readers: (warp, lane or 32 for several, time).
    sets: Vec<Vec<(u8, u8, u32)>>,
    known: HashMap<(u32, u8, u8, u32), u32>,
    pub(crate) now: u32,
    /// What warp `w` sees of the others.
    sees: Vec<Clock>,
    /// Time up to which the lanes of a warp see each other.
    pub(crate) warp_sync: Vec<u32>,
    /// Time up to which lanes of a warp have met, in whatever way: what one has read another one may write.
    pub(crate) met: Vec<u32>,
    /// When all warps that there were last met.
    pub(crate) all: u32,
    /// When each lane fenced its accesses for the asynchronous proxy, and what its last fence covers of others.
    fences: Vec<[Vec<u32>; 32]>,
    covers: Vec<[Option<Fence>; 32]>,
    races: bool,
    uninit: bool,
}

/// A thread among those of its block, for global memory.
pub(crate) struct Among<'a>(pub(crate) &'a Shared, pub(crate) Thread);

impl Order for Among<'_> {
    fn sees(&self, (w, l): Thread, time: u32) -> bool {
        let Among(s, (warp, lane)) = *self;
        s.ordered(warp, lane, (w, l, time)) || w == warp && time <= s.met[warp]
    }

    fn sees_warp(&self, w: usize, time: u32) -> bool {
        let Among(s, (warp, _)) = *self;
        time <= if w == warp { s.warp_sync[warp].max(s.met[warp]) } else { s.sees[warp][w] }
    }

    fn sees_all(&self, time: u32) -> bool {
        time <= self.0.all
    }
}

impl Shared {
    pub(crate) fn new(bytes: usize, warps: usize, races: bool, uninit: bool) -> Shared {
        Shared {
            bytes: vec![0xff; bytes],
            moved: [0; 2],
            cells: vec![Cell::default(); bytes.div_ceil(2)],
            sets: vec![vec![]],
            known: HashMap::new(),
            now: 1,
            sees: vec![[0; 33]; warps],
            warp_sync: vec![0; warps],
            met: vec![0; warps],
            all: 0,
            fences: vec![std::array::from_fn(|_| vec![]); warps],
            covers: vec![[None; 32]; warps],
            races,
            uninit,
        }
    }

    fn locate(&self, address: u64, len: u64, align: u64) -> Result<usize, Fault> {
        if address < SHARED_BASE || address + len > SHARED_BASE + self.bytes.len() as u64 {
            let near = format!(": the block has {} bytes", self.bytes.len());
            let address = address.wrapping_sub(SHARED_BASE);
            return Err(Fault::OutOfBounds { space: "shared", address, bytes: len, near });
        }
        if !address.is_multiple_of(align) {
            return Err(Fault::Misaligned { space: "shared", address: address - SHARED_BASE, align });
        }
        Ok((address - SHARED_BASE) as usize)
    }

    fn ordered(&self, warp: usize, lane: u32, other: (usize, u32, u32)) -> bool {
        let (w, l, time) = other;
        if w == warp { l == lane || time <= self.warp_sync[w] } else { time <= self.sees[warp][w] }
    }

    /// Whether a thread sees what another one did at a time.
    pub(crate) fn sees(&self, (warp, lane): (usize, u32), other: (usize, u32, u32)) -> bool {
        self.ordered(warp, lane, other)
    }

    /// Lanes of a warp meet at an instruction that all of them execute together.
    pub(crate) fn meet(&mut self, warp: usize) {
        self.met[warp] = self.now;
        self.now += 1;
    }

    fn race(at: usize, mine: &'static str, other: String) -> Fault {
        Fault::Race { address: 2 * at as u64, mine, other }
    }

    fn writer(c: &Cell) -> String {
        if c.thread == 1024 {
            "written by an asynchronous copy".into()
        } else {
            format!("written by thread {}", c.thread)
        }
    }

    fn writer_ordered(&self, c: &Cell, warp: usize, lane: u32) -> bool {
        let t = c.thread as usize;
        self.ordered(warp, lane, if t == 1024 { (ASYNC, 99, c.time) } else { (t / 32, t as u32 % 32, c.time) })
    }

    /// Checks a read. `lane` 32: the whole warp reads. `hold`: the read stays under way. `proxy`: an asynchronous reader.
    pub(crate) fn check_read(
        &mut self,
        address: u64,
        len: u64,
        align: u64,
        (warp, lane): (usize, u32),
        (hold, proxy): (bool, bool),
    ) -> Result<usize, Fault> {
        let off = self.locate(address, len, align)?;
        self.moved[0] += len;
        let time = if hold { UNDER_WAY } else { self.now };
        let mut last = (u32::MAX, 0);
        for at in off / 2..(off + len as usize).div_ceil(2) {
            let c = self.cells[at];
            if self.uninit && !c.init {
                return Err(Fault::Uninitialised { space: "shared", address: 2 * at as u64 });
            }
            if !self.races {
                continue;
            }
            if c.incoming > 0 {
                return Err(Self::race(at, "read", "an asynchronous copy into it is under way".into()));
            }
            if c.init && !self.writer_ordered(&c, warp, lane) {
                return Err(Self::race(at, "read", Self::writer(&c)));
            }
            if proxy && !self.fenced(&c, warp, lane) {
                return Err(Fault::Proxy { address: 2 * at as u64, what: "read", writer: c.thread.into() });
            }
            if last.0 != c.readers {
                last = (c.readers, self.join(c.readers, warp as u8, lane as u8, time));
            }
            self.cells[at].readers = last.1;
        }
        Ok(off)
    }

    /// `fence.proxy.async` of some lanes of a warp.
    pub(crate) fn fence(&mut self, warp: usize, lanes: impl Iterator<Item = usize>) {
        let f = Fence { sees: self.sees[warp], warp_sync: self.warp_sync[warp], time: self.now };
        for l in lanes {
            self.fences[warp][l].push(f.time);
            self.covers[warp][l] = Some(f);
        }
    }

    /// Whether a proxy fence lies between what a thread stored and an access by the asynchronous proxy that this lane (32: all of the
    /// warp) starts.
    fn fenced(&self, c: &Cell, warp: usize, lane: u32) -> bool {
        let (w, l) = (c.thread as usize / 32, c.thread as u32 % 32);
        if !c.init || c.thread == 1024 {
            return true;
        }
        let own = &self.fences[w][l as usize];
        let first = own.partition_point(|t| *t < c.time);
        if own.get(first).is_some_and(|t| self.ordered(warp, lane, (w, l, *t))) {
            return true;
        }
        let covers = |n: usize| {
            self.covers[warp][n].is_some_and(|f| match w == warp {
                true => c.time <= if l as usize == n { f.time } else { f.warp_sync },
                false => c.time <= f.sees[w],
            })
        };
        if lane < 32 { covers(lane as usize) } else { (0..32).all(covers) }
    }

    /// The set with one more reader.
    fn join(&mut self, set: u32, warp: u8, lane: u8, time: u32) -> u32 {
        if let Some(id) = self.known.get(&(set, warp, lane, time)) {
            return *id;
        }
        let mut v = self.sets[set as usize].clone();
        match v.iter_mut().find(|r| r.0 == warp) {
            Some(r) => {
                *r = (warp, if r.1 == lane { lane } else { 32 }, time.max(if r.2 == UNDER_WAY { 0 } else { r.2 }))
            }
            None => v.push((warp, lane, time)),
        }
        let id = self.sets.len() as u32;
        self.sets.push(v);
        self.known.insert((set, warp, lane, time), id);
        id
    }

    /// Checks a write by a thread. `data`: what is written, where lanes of one warp may write the same twice; none for a copy that is
    /// under way from now on.
    pub(crate) fn check_write(
        &mut self,
        address: u64,
        len: u64,
        align: u64,
        (warp, lane): (usize, u32),
        data: Option<&[u8]>,
    ) -> Result<usize, Fault> {
        let off = self.locate(address, len, align)?;
        self.moved[1] += len;
        let same = data.is_some_and(|d| self.bytes[off..off + d.len()] == *d);
        let thread = (warp * 32) as u16 + lane.min(31) as u16;
        for at in off / 2..(off + len as usize).div_ceil(2) {
            let c = self.cells[at];
            if self.races && len > 1 {
                if c.incoming > 0 {
                    return Err(Self::race(at, "write", "an asynchronous copy into it is under way".into()));
                }
                let mine = same && c.thread as usize / 32 == warp;
                if c.init && !mine && !self.writer_ordered(&c, warp, lane) {
                    return Err(Self::race(at, "write", Self::writer(&c)));
                }
                if c.readers != 0 {
                    let bad = self.sets[c.readers as usize]
                        .iter()
                        .find(|r| r.2 == UNDER_WAY || !self.ordered(warp, lane, (r.0.into(), r.1.into(), r.2)));
                    if let Some(r) = bad.filter(|_| !same) {
                        let who = if r.2 == UNDER_WAY { "an asynchronous reader of" } else { "a thread of" };
                        return Err(Self::race(at, "write", format!("read by {who} warp {}", r.0)));
                    }
                }
            }
            let slot = &mut self.cells[at];
            if data.is_some() {
                *slot = Cell { time: self.now, readers: 0, thread, init: true, incoming: 0 };
            } else {
                slot.incoming += 1;
            }
        }
        Ok(off)
    }

    /// Checks a write by the asynchronous proxy: [`Shared::check_write`] without data, and a fence behind what threads stored there.
    pub(crate) fn check_copy(
        &mut self,
        address: u64,
        len: u64,
        align: u64,
        (warp, lane): (usize, u32),
    ) -> Result<usize, Fault> {
        let off = self.check_write(address, len, align, (warp, lane), None)?;
        let open = |c: &&Cell| self.races && !self.fenced(c, warp, lane);
        let cells = &self.cells[off / 2..(off + len as usize).div_ceil(2)];
        match cells.iter().find(open) {
            Some(c) => Err(Fault::Proxy { address: off as u64, what: "write", writer: c.thread.into() }),
            None => Ok(off),
        }
    }

    /// An asynchronous copy has arrived; it was announced by [`Shared::check_write`] without data.
    pub(crate) fn arrive(&mut self, off: usize, len: usize, thread: usize) {
        for c in &mut self.cells[off / 2..(off + len).div_ceil(2)] {
            *c = Cell {
                time: self.now,
                readers: 0,
                thread: thread as u16,
                init: true,
                incoming: c.incoming.saturating_sub(1),
            };
        }
    }

    /// A read that was under way is done.
    pub(crate) fn release(&mut self, off: usize, len: usize, warp: usize) {
        for at in off / 2..(off + len).div_ceil(2) {
            let set = self.cells[at].readers;
            if self.sets[set as usize].iter().any(|r| r.0 == warp as u8 && r.2 == UNDER_WAY) {
                self.cells[at].readers = self.join(set, warp as u8, 32, self.now);
            }
        }
    }

    /// What a warp publishes when it arrives somewhere; time moves on.
    pub(crate) fn publish(&mut self, warp: usize) -> Clock {
        let mut c = self.sees[warp];
        c[warp] = self.now;
        self.now += 1;
        c
    }

    /// A warp has waited for these.
    pub(crate) fn acquire(&mut self, warp: usize, clock: &Clock) {
        for (a, b) in self.sees[warp].iter_mut().zip(clock) {
            *a = (*a).max(*b);
        }
    }
}
