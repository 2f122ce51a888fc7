//! Which threads of a block touched global memory that a kernel reads and writes: what is done in place.
//!
//! Two bytes share a mark. Reads as constant and those of asynchronous copies leave none: what they read nothing writes. Marks are of one
//! block; between blocks [`crate::memory`] looks.

/// Several threads of several warps; of the warp whose number is in the lower bits.
const MANY: u16 = u16::MAX;
const OF_WARP: u16 = 1 << 15;

/// A thread of a block: warp and lane.
pub(crate) type Thread = (usize, u32);

#[derive(Debug, Clone, Copy, Default)]
struct Mark {
    /// The block whose mark this is.
    block: u16,
    /// Who wrote and read last, plus one, and when.
    writer: u16,
    reader: u16,
    written: u32,
    read: u32,
}

/// What orders accesses of one block: whether the thread at hand sees what another one did at a time, any lane of a warp, anyone.
pub(crate) trait Order {
    fn sees(&self, other: Thread, time: u32) -> bool;
    fn sees_warp(&self, warp: usize, time: u32) -> bool;
    fn sees_all(&self, time: u32) -> bool;
}

impl Mark {
    /// The thread that wrote last, if another one does not see that.
    fn unseen_writer(&self, own: u16, order: &dyn Order) -> Option<u16> {
        let seen = self.writer == 0 || self.writer == own || order.sees(thread(self.writer), self.written);
        (!seen).then(|| self.writer - 1)
    }

    /// Whether a thread sees all reads.
    fn read_before(&self, own: u16, order: &dyn Order) -> bool {
        match self.reader {
            0 => true,
            n if n == own => true,
            MANY => order.sees_all(self.read),
            n if n >= OF_WARP => order.sees_warp(usize::from(n - OF_WARP), self.read),
            n => order.sees(thread(n), self.read),
        }
    }

    fn warp(&self) -> Option<u16> {
        match self.reader {
            0 | MANY => None,
            n if n >= OF_WARP => Some(n - OF_WARP),
            n => Some((n - 1) / 32),
        }
    }
}

/// Marks of an allocation.
#[derive(Debug, Clone, Default)]
pub(crate) struct Marks(Vec<Mark>);

impl Marks {
    /// Nobody has touched anything.
    pub(crate) fn clear(&mut self) {
        self.0.fill(Mark::default());
    }

    fn at(&mut self, bytes: usize, r: &std::ops::Range<usize>, block: u16) -> &mut [Mark] {
        if self.0.is_empty() {
            self.0 = vec![Mark::default(); bytes.div_ceil(2)];
        }
        let some = &mut self.0[r.start / 2..r.end.div_ceil(2)];
        for m in some.iter_mut().filter(|m| m.block != block) {
            *m = Mark { block, ..Mark::default() };
        }
        some
    }

    /// A thread reads bytes of an allocation of so many. The thread that wrote them before, if nothing orders the two.
    pub(crate) fn read(
        &mut self,
        bytes: usize,
        r: &std::ops::Range<usize>,
        block: u16,
        (me, now): (Thread, u32),
        order: &dyn Order,
    ) -> Option<u16> {
        let own = number(me);
        for m in self.at(bytes, r, block) {
            if let Some(w) = m.unseen_writer(own, order) {
                return Some(w);
            }
            let warp = me.0 as u16;
            m.reader = match () {
                () if m.read_before(own, order) => own,
                () if m.warp() == Some(warp) => OF_WARP | warp,
                () => MANY,
            };
            m.read = now;
        }
        None
    }

    /// A thread writes bytes. The thread that wrote or read them before, if nothing orders the two.
    pub(crate) fn write(
        &mut self,
        bytes: usize,
        r: &std::ops::Range<usize>,
        block: u16,
        (me, now): (Thread, u32),
        order: &dyn Order,
    ) -> Option<u16> {
        let own = number(me);
        for m in self.at(bytes, r, block) {
            if let Some(w) = m.unseen_writer(own, order) {
                return Some(w);
            }
            if !m.read_before(own, order) {
                return Some(if m.reader >= OF_WARP { 32 * m.warp().unwrap_or(0) } else { m.reader - 1 });
            }
            *m = Mark { block, writer: own, reader: 0, written: now, read: 0 };
        }
        None
    }
}

fn number((warp, lane): Thread) -> u16 {
    (32 * warp) as u16 + lane as u16 + 1
}

fn thread(number: u16) -> Thread {
    (usize::from(number - 1) / 32, u32::from(number - 1) % 32)
}
