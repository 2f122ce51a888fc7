//! One block: its warps, barriers and mbarriers, and the scheduler.
//!
//! A warp runs until it cannot go on, the lanes at the lowest position first; a collective instruction waits until all
//! its lanes are there. When no warp can go on, one piece of asynchronous work that somebody waits for is completed;
//! when there is none, the block is deadlocked.

use crate::error::Fault;
use crate::isa::{Collective, Inst, Op};
use crate::launch::{Launch, Mode, Order, TensorMap};
use crate::shared::{Clock, Shared};
use crate::warp::{Group, Warp};
use crate::{Counts, Kernel, Memory, SHARED_BASE, SimError, Traffic};
use std::collections::BTreeMap;

/// A named barrier that some warps have reached.
#[derive(Debug, Clone, Default)]
pub(crate) struct Barrier {
    pub(crate) arrived: u32,
    pub(crate) expected: u32,
    pub(crate) warps: u32,
    pub(crate) clock: Option<Clock>,
    pub(crate) votes: [u32; 32],
}

/// An mbarrier object.
#[derive(Debug, Clone)]
pub(crate) struct Mbarrier {
    pub(crate) count: u32,
    pub(crate) pending: u32,
    pub(crate) tx: i64,
    pub(crate) phase: u64,
    pub(crate) clock: Clock,
    pub(crate) done: Clock,
    /// Warp, lane and time of its initialisation, and when this thread made that visible to copies.
    pub(crate) made: (usize, u32, u32),
    pub(crate) fenced: Option<u32>,
}

/// Bytes on their way into shared memory.
#[derive(Debug, Clone)]
pub(crate) struct Arrival {
    pub(crate) bar: u64,
    /// Who sent for them, and where.
    pub(crate) thread: u32,
    pub(crate) pc: u32,
    /// Shared offset and bytes.
    pub(crate) rows: Vec<(usize, Vec<u8>)>,
}

pub(crate) struct Block<'a> {
    pub(crate) k: &'a Kernel,
    pub(crate) mem: &'a mut Memory,
    pub(crate) l: &'a Launch<'a>,
    pub(crate) params: &'a [u8],
    pub(crate) maps: &'a [TensorMap],
    pub(crate) at: [u32; 3],
    pub(crate) sh: Shared,
    pub(crate) bars: Vec<Barrier>,
    pub(crate) mbars: BTreeMap<u64, Mbarrier>,
    pub(crate) arrivals: Vec<Arrival>,
    pub(crate) counts: Counts,
    /// What the accesses of each instruction came to.
    pub(crate) traffic: &'a mut [Traffic],
    /// Registers that warps have given back.
    pub(crate) spare: u32,
    warps: Vec<Warp>,
    steps: u64,
}

/// What an instruction did to its lanes.
pub(crate) enum Next {
    Step,
    Branch(u32),
    Table(Vec<u32>),
    Exit,
    /// Try again later.
    Wait,
    Block(u8),
}

impl<'a> Block<'a> {
    pub(crate) fn new(
        k: &'a Kernel,
        mem: &'a mut Memory,
        l: &'a Launch<'a>,
        (params, maps): (&'a [u8], &'a [TensorMap]),
        at: [u32; 3],
        traffic: &'a mut [Traffic],
    ) -> Self {
        let threads = l.block.iter().product::<u32>();
        let n = threads.div_ceil(32);
        let bytes = (k.dynamic_base + u64::from(l.dynamic_shared) - SHARED_BASE) as usize;
        let warp = |id: u32| {
            let here = (threads - id * 32).min(32);
            let live = if here == 32 { u32::MAX } else { (1 << here) - 1 };
            Warp::new(id, live, (k.regs, k.preds, k.local_bytes), k.registers().unwrap_or(0))
        };
        Block {
            k,
            l,
            params,
            maps,
            at,
            sh: Shared::new(bytes, n as usize, l.checks.races, l.checks.uninitialised),
            bars: vec![Barrier::default(); 16],
            mbars: BTreeMap::new(),
            arrivals: vec![],
            counts: Counts::default(),
            traffic,
            spare: 0,
            warps: (0..n).map(warp).collect(),
            steps: 0,
            mem,
        }
    }

    pub(crate) fn threads(&self) -> u32 {
        self.l.block.iter().product()
    }

    pub(crate) fn late(&self) -> bool {
        self.l.mode == Mode::Late
    }

    pub(crate) fn run(mut self, counts: &mut Counts, done: &mut [u64]) -> Result<(), SimError> {
        loop {
            let (mut progress, mut alive) = (false, false);
            for n in 0..self.warps.len() {
                let i = if self.l.order == Order::Forward { n } else { self.warps.len() - 1 - n };
                let mut w = std::mem::take(&mut self.warps[i]);
                let r = self.run_warp(&mut w, done);
                alive |= w.live != 0;
                self.warps[i] = w;
                progress |= r?;
                self.release_barriers();
            }
            if !alive {
                break;
            }
            if !progress && !self.complete_one() {
                return Err(self.deadlock());
            }
        }
        self.agree("execute setmaxnreg", |w| w.resized)?;
        self.agree("take part in its products, or in others", |w| w.multiplied)?;
        if let Some(a) = self.arrivals.first() {
            let what = "the block ends while copies into its shared memory are under way";
            return Err(self.at_end(a.pc, a.thread, Fault::Misuse(what.into())));
        }
        [self.counts.shared_read, self.counts.shared_written] = self.sh.moved;
        counts.add(&self.counts);
        Ok(())
    }

    /// Runs a warp until all its lanes wait. True when anything was executed.
    fn run_warp(&mut self, w: &mut Warp, done: &mut [u64]) -> Result<bool, SimError> {
        let mut progress = false;
        'next: loop {
            for g in 0..w.groups.len() {
                let Group { pc, mask, barrier } = w.groups[g];
                if barrier.is_some() {
                    continue;
                }
                let (k, id) = (self.k, w.id);
                let inst = &k.code[pc as usize];
                if !self.complete(w, inst, mask) {
                    continue;
                }
                let fault = |fault: Fault, b: &Self| SimError::Fault {
                    kernel: b.k.name.clone(),
                    line: inst.line,
                    text: b.k.opcodes[inst.name as usize].clone(),
                    block: b.at,
                    thread: id * 32 + mask.trailing_zeros(),
                    fault: Box::new(fault),
                };
                self.steps += 1;
                if self.steps > self.l.max_steps {
                    return Err(fault(Fault::Endless(self.l.max_steps), self));
                }
                let on = inst.guard.map_or(mask, |p| w.pred(p) & mask);
                let next = if on == 0 { Ok(Next::Step) } else { self.exec(w, inst, pc, on) };
                let next = next.and_then(|n| w.early().map(|()| n));
                let next = match next {
                    Ok(Next::Wait) => continue,
                    Ok(n) => n,
                    Err(f) => return Err(fault(f, self)),
                };
                progress = true;
                done[pc as usize] += 1;
                self.counts.warp_instructions += 1;
                self.counts.lane_instructions += u64::from(on.count_ones());
                match next {
                    Next::Step if w.groups.get(g + 1).is_none_or(|n| n.pc > pc + 1) => w.groups[g].pc += 1,
                    Next::Block(id) => w.groups[g].barrier = Some(id),
                    n => {
                        w.groups.remove(g);
                        match n {
                            Next::Branch(t) => w.go(t, on),
                            Next::Table(t) => t.iter().enumerate().for_each(|(l, t)| w.go(*t, on & 1 << l)),
                            Next::Exit => {
                                w.live &= !on;
                                if let Err(f) = self.leave(w, on) {
                                    return Err(fault(f, self));
                                }
                            }
                            _ => w.go(pc + 1, on),
                        }
                        w.go(pc + 1, mask & !on);
                    }
                }
                continue 'next;
            }
            return Ok(progress);
        }
    }

    /// Whether all lanes of a collective instruction are there.
    fn complete(&self, w: &Warp, inst: &Inst, mask: u32) -> bool {
        match inst.collective {
            Collective::No => true,
            Collective::Warp => mask == w.live,
            Collective::Members(m) => {
                let all = w.get(m)[mask.trailing_zeros() as usize] as u32 & w.live;
                all & !mask == 0
            }
        }
    }

    /// Checks of lanes that end.
    fn leave(&self, w: &Warp, lanes: u32) -> Result<(), Fault> {
        let open = w.copies.iter().map(|c| c.lane).chain(w.stores.iter().map(|s| s.lane)).any(|l| lanes >> l & 1 == 1);
        if open || !w.products.is_empty() {
            return Err(Fault::Misuse("the thread ends while asynchronous work of its own is under way".into()));
        }
        Ok(())
    }

    /// Lets the warps of full barriers go on.
    fn release_barriers(&mut self) {
        for id in 0..16 {
            let b = &mut self.bars[id];
            if b.expected == 0 || b.arrived < b.expected {
                continue;
            }
            let b = std::mem::take(b);
            let clock = b.clock.unwrap_or([0; 33]);
            let now = self.sh.now;
            self.sh.now += 1;
            if self.warps.iter().all(|w| w.live == 0 || b.warps >> w.id & 1 == 1) {
                self.sh.all = now;
            }
            for w in &mut self.warps {
                let Some(g) = w.groups.iter_mut().find(|g| g.barrier == Some(id as u8)) else { continue };
                g.barrier = None;
                let pc = g.pc;
                if let Op::BarRed { f, d, p, .. } = &self.k.code[pc as usize].op {
                    let n: u32 = b.votes.iter().map(|v| v.count_ones()).sum();
                    if let Some(d) = d {
                        w.put(*d, w.live, &[n.into(); 32]);
                    }
                    if let Some(p) = p {
                        let yes = if *f == crate::isa::Vote::All { n == b.expected } else { n > 0 };
                        w.put_pred(*p, w.live, if yes { u32::MAX } else { 0 });
                    }
                }
                let g = w.groups.iter_mut().find(|g| g.pc == pc).map(|g| g.mask);
                w.groups.retain(|g| g.pc != pc);
                w.go(pc + 1, g.unwrap_or(0));
                self.sh.acquire(w.id as usize, &clock);
                self.sh.warp_sync[w.id as usize] = now;
            }
        }
    }

    /// Completes the copies into one mbarrier: the first that a waiting lane looks at, else the first of all.
    fn complete_one(&mut self) -> bool {
        let mut wanted = None;
        for w in &self.warps {
            for g in w.groups.iter().filter(|g| g.barrier.is_none()) {
                if let Op::MbarWait { addr, .. } = &self.k.code[g.pc as usize].op {
                    let a = w.get(addr.base)[g.mask.trailing_zeros() as usize].wrapping_add_signed(addr.offset);
                    if self.arrivals.iter().any(|x| x.bar == a) && wanted.is_none() {
                        wanted = Some(a);
                    }
                }
            }
        }
        let Some(bar) = wanted.or(self.arrivals.first().map(|a| a.bar)) else { return false };
        let i = self.arrivals.iter().position(|a| a.bar == bar).unwrap_or(0);
        let job = self.arrivals.remove(i);
        self.land(job);
        true
    }

    /// All warps of a warpgroup have done the same: what each did as a number (0: nothing), and last where.
    fn agree(&self, what: &str, did: fn(&Warp) -> (u64, u32)) -> Result<(), SimError> {
        for group in self.warps.chunks(4) {
            let whole = group.len() == 4 && group.iter().all(|w| did(w) == did(&group[0]));
            let Some(w) = group.iter().find(|w| did(w).0 != 0).filter(|_| !whole) else { continue };
            let what = format!("some warps of a warpgroup {what}, others do not");
            return Err(self.at_end(did(w).1, w.id * 32, Fault::Divergence(what)));
        }
        Ok(())
    }

    /// A fault that shows when the block has ended.
    fn at_end(&self, pc: u32, thread: u32, fault: Fault) -> SimError {
        let inst = &self.k.code[pc as usize];
        SimError::Fault {
            kernel: self.k.name.clone(),
            line: inst.line,
            text: self.k.opcodes[inst.name as usize].clone(),
            block: self.at,
            thread,
            fault: Box::new(fault),
        }
    }

    fn deadlock(&self) -> SimError {
        let mut report = String::new();
        for w in &self.warps {
            for g in &w.groups {
                let i = &self.k.code[g.pc as usize];
                let name = &self.k.opcodes[i.name as usize];
                let why = g.barrier.map_or(String::new(), |b| format!(", in barrier {b}"));
                report += &format!("  warp {}, lanes {:#010x}: line {} `{name}`{why}\n", w.id, g.mask, i.line);
            }
            if w.live != 0 && w.groups.iter().map(|g| g.mask).fold(0, |a, b| a | b) != w.live {
                report += &format!("  warp {}: lanes lost\n", w.id);
            }
        }
        for (i, b) in self.bars.iter().enumerate().filter(|(_, b)| b.arrived > 0) {
            report += &format!("  barrier {i}: {} of {} threads\n", b.arrived, b.expected);
        }
        if self.k.changes_registers() {
            let owned: Vec<String> = self.warps.iter().map(|w| w.owned.to_string()).collect();
            report += &format!("  {} registers to give away; threads own {} by warp\n", self.spare, owned.join(" "));
        }
        for (a, b) in &self.mbars {
            let at = a - SHARED_BASE;
            let (p, n) = (b.pending, b.count);
            report +=
                &format!("  mbarrier at {at:#x}: phase {}, {p} of {n} arrivals open, {} bytes open\n", b.phase, b.tx);
        }
        SimError::Deadlock { kernel: self.k.name.clone(), block: self.at, report }
    }
}
