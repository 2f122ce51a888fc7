//! A ring of stages in shared memory that the tensor copy engine fills, or warps that decode, and warps of products empty.
//!
//! Every stage has two barriers: one says that it is full (one arrival of the lane that copies and one of every warp that decodes, and the
//! bytes), the other that
//! it is free (one arrival of every warp that reads it). Both sides go through the stages in one order, with the parity of
//! their turn.

use super::barrier;
use super::launch::shared_at;
use crate::emit::func::{Func, Val};
use std::cell::RefCell;

/// Stages with their barriers.
pub(super) struct Ring {
    base: Val,
    stages: i64,
    /// Where the stages begin, and bytes of each.
    start: i64,
    bytes: i64,
    /// Where the barriers lie.
    barriers: i64,
    /// Warps that read a stage, and that write to it beside the copies.
    readers: i64,
    writers: i64,
}

impl Ring {
    /// A ring at byte `start` of dynamic shared memory, its barriers at byte `barriers`: [`Ring::barrier_bytes`] of them.
    pub(super) fn new(f: &mut Func, stages: i64, (start, bytes): (i64, i64), barriers: i64, readers: i64) -> Ring {
        let base = f.op("llvm.mlir.addressof @smem : !llvm.ptr<3>");
        Ring { base, stages, start, bytes, barriers, readers, writers: 0 }
    }

    /// The same with so many warps that write to every stage beside the copies.
    pub(super) fn with_writers(self, writers: i64) -> Ring {
        Ring { writers, ..self }
    }

    /// Bytes of the barriers of so many stages.
    pub(super) fn barrier_bytes(stages: i64) -> i64 {
        16 * stages
    }

    /// The address of a byte of shared memory.
    pub(super) fn at(&self, f: &mut Func, byte: &Val) -> Val {
        shared_at(f, &self.base, byte, "i8")
    }

    /// The address of shared memory as an i32.
    pub(super) fn address(&self, f: &mut Func) -> Val {
        f.op(format!("llvm.ptrtoint {} : !llvm.ptr<3> to i32", self.base))
    }

    /// Byte at which a stage begins.
    pub(super) fn stage(&self, f: &mut Func, stage: &Val) -> Val {
        let at = f.mulc(stage, self.bytes);
        f.addc(&at, self.start)
    }

    fn full(&self, f: &mut Func, stage: &Val) -> Val {
        let at = f.mulc(stage, 8);
        let at = f.addc(&at, self.barriers);
        self.at(f, &at)
    }

    fn free(&self, f: &mut Func, stage: &Val) -> Val {
        let at = f.mulc(stage, 8);
        let at = f.addc(&at, self.barriers + 8 * self.stages);
        self.at(f, &at)
    }

    /// Sets up the barriers of some rings, by one thread of the block; all wait for it.
    pub(super) fn begin(f: &mut Func, tid: &Val, rings: &[&Ring], maps: usize) {
        let zero = f.i64(0);
        let one = f.cmp("eq", tid, &zero);
        f.if_(&one, |f| {
            for r in rings {
                let (full, free) = (f.i32(1 + r.writers as i32, 1), f.i32(r.readers as i32, 1));
                for s in 0..r.stages {
                    let s = f.i64(s);
                    let (a, b) = (r.full(f, &s), r.free(f, &s));
                    f.stmt(&format!("nvvm.mbarrier.init {a}, {full} : !llvm.ptr<3>, i32"));
                    f.stmt(&format!("nvvm.mbarrier.init {b}, {free} : !llvm.ptr<3>, i32"));
                }
            }
            f.stmt("nvvm.fence.mbarrier.init");
            for i in 0..maps {
                f.stmt(&format!("nvvm.prefetch tensormap, %map{i} : !llvm.ptr"));
            }
        });
        barrier(f);
    }

    fn wait(&self, f: &mut Func, barrier: &Val, parity: &Val) {
        let parity = f.op(format!("arith.trunci {parity} : i64 to i32"));
        let ticks = f.i32(10_000_000, 1);
        f.stmt(&format!("nvvm.mbarrier.try_wait.parity {barrier}, {parity}, {ticks} : !llvm.ptr<3>, i32, i32"));
    }

    /// What a loop along the ring carries first: stage and turn.
    pub(super) fn start(f: &mut Func) -> Vec<(Val, String)> {
        vec![(f.i64(0), "i64".into()), (f.i64(0), "i64".into())]
    }

    /// The next stage, and the parity of its turn.
    pub(super) fn advance(&self, f: &mut Func, [stage, turn]: [&Val; 2]) -> [Val; 2] {
        let next = f.addc(stage, 1);
        let (end, zero, one) = (f.i64(self.stages), f.i64(0), f.i64(1));
        let over = f.cmp("eq", &next, &end);
        let flipped = f.op(format!("arith.xori {turn}, {one} : i64"));
        [
            f.op(format!("arith.select {over}, {zero}, {next} : i64")),
            f.op(format!("arith.select {over}, {flipped}, {turn} : i64")),
        ]
    }

    /// Who writes: waits until a stage is free.
    pub(super) fn freed(&self, f: &mut Func, [stage, turn]: [&Val; 2]) {
        let one = f.i64(1);
        // A new barrier counts as passed: the first round does not wait.
        let before = f.op(format!("arith.xori {turn}, {one} : i64"));
        let free = self.free(f, stage);
        self.wait(f, &free, &before);
    }

    /// The lane that copies: waits until a stage is free, and announces `bytes`; copies report to the barrier that it gives.
    pub(super) fn refill(&self, f: &mut Func, here: [&Val; 2], bytes: i64) -> Val {
        self.freed(f, here);
        self.announce(f, here[0], bytes)
    }

    /// The lane that copies: announces `bytes` of a free stage; copies report to the barrier that it gives.
    pub(super) fn announce(&self, f: &mut Func, stage: &Val, bytes: i64) -> Val {
        let full = self.full(f, stage);
        let bytes = f.i32(bytes as i32, 1);
        f.stmt(&format!("nvvm.mbarrier.arrive.expect_tx {full}, {bytes} : !llvm.ptr<3>, i32"));
        full
    }

    /// Starts the copy of a box of tensor map `map` at these coordinates (innermost first, i64) to a byte of shared memory.
    pub(super) fn copy(&self, f: &mut Func, map: usize, at: [&Val; 2], to: &Val, full: &Val) {
        let to = self.at(f, to);
        let to = f.op(format!("llvm.addrspacecast {to} : !llvm.ptr<3> to !llvm.ptr<7>"));
        let [x0, x1] = at.map(|x| f.op(format!("arith.trunci {x} : i64 to i32")));
        f.stmt(&format!(
            "nvvm.cp.async.bulk.tensor.shared.cluster.global {to}, %map{map}, {full}, box[{x0}, {x1}] : !llvm.ptr<7>, !llvm.ptr"
        ));
    }

    /// A warp that writes to a stage, where `leads` names one lane: all lanes have written their part, for products to read.
    pub(super) fn written(&self, f: &mut Func, leads: &Val, stage: &Val) {
        // Products read shared memory on another way than stores write it.
        f.stmt("nvvm.fence.proxy {kind = #nvvm.proxy_kind<async.shared>, space = #nvvm.shared_space<cta>}");
        let all = f.i32(-1, 1);
        f.stmt(&format!("nvvm.bar.warp.sync {all} : i32"));
        f.if_(leads, |f| {
            let full = self.full(f, stage);
            f.stmt(&format!("nvvm.mbarrier.arrive {full} : !llvm.ptr<3>"));
        });
    }

    /// A warp that reads: waits until a stage is full.
    pub(super) fn arrived(&self, f: &mut Func, [stage, turn]: [&Val; 2]) {
        let full = self.full(f, stage);
        self.wait(f, &full, turn);
    }

    /// One thread of a warp that reads, where `cond` says so: the warp needs a stage no longer.
    pub(super) fn release(&self, f: &mut Func, cond: &Val, stage: &Val) {
        f.if_(cond, |f| {
            let free = self.free(f, stage);
            f.stmt(&format!("nvvm.mbarrier.arrive {free} : !llvm.ptr<3>"));
        });
    }
}

/// The roles of a block of warpgroups: the first one copies, in a single lane, the others multiply.
pub(super) struct Roles {
    /// Number of the thread in its block.
    pub(super) tid: Val,
    /// Number of the warpgroup, i32, the same for the warp.
    group: Val,
    /// Warpgroups that multiply.
    consumers: i64,
    /// The first warpgroup decodes, too: all of it.
    decodes: bool,
}

impl Roles {
    /// Warps of the warpgroup that copies.
    pub(super) const WRITERS: i64 = 4;

    /// Registers of a thread that copies, maybe decodes, and of one that multiplies, where there are two warpgroups of those.
    pub(super) fn registers(decodes: bool) -> [i64; 2] {
        if decodes { [104, 200] } else { [40, 232] }
    }

    /// The first warpgroup works as a whole: it decodes.
    pub(super) fn decoding(self, decodes: bool) -> Roles {
        Roles { decodes, ..self }
    }

    pub(super) fn new(f: &mut Func, consumers: i64) -> Roles {
        let tid = super::special(f, "tid.x");
        // Taken from lane 0, so that the assembler sees one value for the warp.
        let group = f.divc(&tid, 128);
        let group = f.op(format!("arith.trunci {group} : i64 to i32"));
        let (all, zero, last) = (f.i32(-1, 1), f.i32(0, 1), f.i32(31, 1));
        let group = f.op(format!("nvvm.shfl.sync idx {all}, {group}, {zero}, {last} : i32 -> i32"));
        Roles { tid, group, consumers, decodes: false }
    }

    /// Threads of a block.
    pub(super) fn threads(consumers: i64) -> i64 {
        128 * (consumers + 1)
    }

    /// Runs `copies` in one lane, or in all of the warpgroup where it decodes, and `multiplies` in the other warpgroups with the number of
    /// each among them. `x` is what both work with; `copies` gets what says whether a thread is that one lane.
    pub(super) fn split<T>(
        &self,
        f: &mut Func,
        x: &mut T,
        copies: impl FnOnce(&mut Func, &mut T, &Val),
        multiplies: impl FnOnce(&mut Func, &mut T, &Val),
    ) {
        let zero = f.i32(0, 1);
        let first = f.op(format!("arith.cmpi eq, {}, {zero} : i32", self.group));
        let shifts = self.consumers > 1;
        let x = RefCell::new(x);
        f.if_else(
            &first,
            &[],
            |f| {
                if shifts {
                    f.stmt(&format!("nvvm.setmaxregister decrease {}", Roles::registers(self.decodes)[0]));
                }
                let (leader, end) = (f.op("nvvm.elect.sync -> i1"), f.i64(32));
                let warp = f.cmp("slt", &self.tid, &end);
                let one = f.op(format!("arith.andi {warp}, {leader} : i1"));
                if self.decodes {
                    copies(f, &mut x.borrow_mut(), &one);
                } else {
                    f.if_(&one, |f| copies(f, &mut x.borrow_mut(), &one));
                }
                vec![]
            },
            |f| {
                if shifts {
                    f.stmt(&format!("nvvm.setmaxregister increase {}", Roles::registers(self.decodes)[1]));
                }
                let own = f.op(format!("arith.extui {} : i32 to i64", self.group));
                let own = f.addc(&own, -1);
                multiplies(f, &mut x.borrow_mut(), &own);
                vec![]
            },
        );
    }
}
