//! Products of bf16 by warpgroups (`wgmma`, f32 accumulators) with tiles that the tensor copy engine brings: sm_90a.
//!
//! Blocks stay: each takes tile after tile, in an order whose neighbours share operands in the cache. One warpgroup copies
//! (a single lane of it works), the others multiply 64 rows each. They meet at barriers in shared memory: a ring of
//! stages, each with one that says it is full and one that says it is free, which runs on from pass to pass and from tile to
//! tile, so that the next tile's operands come in while results are written.
//!
//! Groups of accumulators that read the same left operand share its copies ([`form::Pass`]). A scaled product is scaled in
//! registers before the next one joins. What lies past the ends of an operand is zero by its tensor map.

mod form;

use super::{fragment, write};
use crate::emit::contraction::analyze::Analysis;
use crate::emit::dim_expr;
use crate::emit::func::{Func, Val};
use crate::emit::gpu::chip::GpuChip;
use crate::emit::gpu::launch::{Unit, shared_at};
use crate::emit::gpu::pull::Pull;
use crate::emit::gpu::{Parts, barrier, special};
use crate::error::CodegenError;
pub(super) use form::forms;
use form::{BLOCK, Cut, Form, Operand, Pass, ROWS, STEP};
use pleach_ir::{Kernel, Sym};
use pleach_plan::Expr;

/// Rows of tiles that are taken column by column before the next ones.
const GROUP: i64 = 16;
/// Registers of a thread that copies, and of one that multiplies, where they differ.
const REGISTERS: [u32; 2] = [40, 232];
/// A matrix descriptor's mode (128-byte swizzle) and distance of groups of 8 rows (1024 bytes).
const DESCRIPTOR: i64 = 1 << 62 | (1024 >> 4) << 32;

/// Emits the kernel, if it has this form.
pub(super) fn emit(
    k: &Kernel,
    symbols: &[Sym],
    a: &Analysis,
    chip: GpuChip,
    wish: Option<&crate::emit::gpu::Form>,
) -> Result<Option<Parts>, CodegenError> {
    let limits = chip.limits();
    let Some(form) = form::form(k, symbols, a, &limits, wish)? else { return Ok(None) };
    let cut = form.cut;
    let mut unit = Unit::with_maps(k, "", false, &form.maps);
    let f = &mut unit.f;
    let mut p = Pull::new(f, k, symbols);
    let size = [p.dim(f, a.m), p.dim(f, a.n)];
    let depths: Vec<Val> = form.passes.iter().map(|x| p.dim(f, x.depth)).collect();
    let ring = Ring::new(f, cut);
    let tiles = Tiles::new(f, &cut, &size);
    let tid = special(f, "tid.x");
    // Taken from lane 0, so that the assembler sees one value for the warp.
    let group = f.divc(&tid, 128);
    let group = f.op(format!("arith.trunci {group} : i64 to i32"));
    let (all, zero, last) = (f.i32(-1, 1), f.i32(0, 1), f.i32(31, 1));
    let group = f.op(format!("nvvm.shfl.sync idx {all}, {group}, {zero}, {last} : i32 -> i32"));
    ring.begin(f, &tid, form.maps.len());
    let copies = f.op(format!("arith.cmpi eq, {group}, {zero} : i32"));
    let shifts = cut.consumers > 1;
    f.if_else(
        &copies,
        &[],
        |f| {
            if shifts {
                f.stmt(&format!("nvvm.setmaxregister decrease {}", REGISTERS[0]));
            }
            produce(f, &form, &depths, &ring, &tiles, &tid);
            vec![]
        },
        |f| {
            if shifts {
                f.stmt(&format!("nvvm.setmaxregister increase {}", REGISTERS[1]));
            }
            let own = f.op(format!("arith.extui {group} : i32 to i64"));
            let own = f.addc(&own, -1);
            consume(f, &mut p, a, &form, &depths, &ring, &tiles, [&tid, &own]);
            vec![]
        },
    );
    p.finish()?;
    let blocks = dim_expr(k, a.m, symbols)?.ceil_div(cut.rows() as u64);
    let blocks = blocks.mul(dim_expr(k, a.n, symbols)?.ceil_div(cut.columns as u64));
    let grid = blocks.min(u64::from(limits.multiprocessors) * cut.resident() as u64);
    let grid = [grid, Expr::Const(1), Expr::Const(1)];
    let (text, launch) = unit.finish(grid, cut.threads() as u32, cut.shared() as u32, cut.resident() as u32);
    Ok(Some((text, vec![launch], Expr::Const(0))))
}

/// Tiles of the results.
struct Tiles {
    down: Val,
    across: Val,
    all: Val,
    size: [Val; 2],
    cut: Cut,
}

impl Tiles {
    fn new(f: &mut Func, cut: &Cut, size: &[Val; 2]) -> Tiles {
        let (down, across) = (f.ceil_divc(&size[0], cut.rows()), f.ceil_divc(&size[1], cut.columns));
        let all = f.mul(&down, &across);
        Tiles { down, across, all, size: size.clone(), cut: *cut }
    }

    /// Calls `body` with first row and column of every tile of this block; it carries values.
    fn each(
        &self,
        f: &mut Func,
        inits: &[(Val, String)],
        body: impl FnOnce(&mut Func, [&Val; 2], &[Val]) -> Vec<Val>,
    ) -> Vec<Val> {
        let (first, step) = (special(f, "ctaid.x"), special(f, "nctaid.x"));
        f.for_by(&first, &self.all, &step, inits, |f, t, carried| {
            let whole = f.mulc(&self.across, GROUP);
            let (g, within) = (f.div(t, &whole), f.rem(t, &whole));
            let top = f.mulc(&g, GROUP);
            let (rest, most) = (f.sub(&self.down, &top), f.i64(GROUP));
            let height = f.min(&rest, &most);
            let (row, column) = (f.rem(&within, &height), f.div(&within, &height));
            let row = f.add(&top, &row);
            let (m, n) = (f.mulc(&row, self.cut.rows()), f.mulc(&column, self.cut.columns));
            body(f, [&m, &n], carried)
        })
    }
}

/// Stages in shared memory with their barriers.
struct Ring {
    base: Val,
    cut: Cut,
}

impl Ring {
    fn new(f: &mut Func, cut: Cut) -> Ring {
        Ring { base: f.op("llvm.mlir.addressof @smem : !llvm.ptr<3>"), cut }
    }

    fn at(&self, f: &mut Func, byte: &Val) -> Val {
        shared_at(f, &self.base, byte, "i8")
    }

    /// The barrier that says a stage is full.
    fn full(&self, f: &mut Func, stage: &Val) -> Val {
        let at = f.mulc(stage, 8);
        let at = f.addc(&at, self.cut.barriers());
        self.at(f, &at)
    }

    /// The barrier that says a stage is free.
    fn free(&self, f: &mut Func, stage: &Val) -> Val {
        let at = f.mulc(stage, 8);
        let at = f.addc(&at, self.cut.barriers() + 8 * self.cut.stages);
        self.at(f, &at)
    }

    /// Sets the barriers up.
    fn begin(&self, f: &mut Func, tid: &Val, maps: usize) {
        let zero = f.i64(0);
        let one = f.cmp("eq", tid, &zero);
        f.if_(&one, |f| {
            // Full: the arrival of the lane that copies, and the bytes; free: one arrival of each warp that multiplies.
            let (full, free) = (f.i32(1, 1), f.i32(4 * self.cut.consumers as i32, 1));
            for s in 0..self.cut.stages {
                let s = f.i64(s);
                let (a, b) = (self.full(f, &s), self.free(f, &s));
                f.stmt(&format!("nvvm.mbarrier.init {a}, {full} : !llvm.ptr<3>, i32"));
                f.stmt(&format!("nvvm.mbarrier.init {b}, {free} : !llvm.ptr<3>, i32"));
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

    /// The next stage, and the parity of its turn.
    fn advance(&self, f: &mut Func, stage: &Val, turn: &Val) -> [Val; 2] {
        let next = f.addc(stage, 1);
        let (end, zero, one) = (f.i64(self.cut.stages), f.i64(0), f.i64(1));
        let over = f.cmp("eq", &next, &end);
        let flipped = f.op(format!("arith.xori {turn}, {one} : i64"));
        [
            f.op(format!("arith.select {over}, {zero}, {next} : i64")),
            f.op(format!("arith.select {over}, {flipped}, {turn} : i64")),
        ]
    }
}

/// What a loop along the ring carries first: stage and turn.
fn start(f: &mut Func) -> Vec<(Val, String)> {
    vec![(f.i64(0), "i64".into()), (f.i64(0), "i64".into())]
}

/// The lane that copies.
fn produce(f: &mut Func, form: &Form, depths: &[Val], ring: &Ring, tiles: &Tiles, tid: &Val) {
    let cut = &form.cut;
    let (leader, end) = (f.op("nvvm.elect.sync -> i1"), f.i64(32));
    let warp = f.cmp("slt", tid, &end);
    let one = f.op(format!("arith.andi {warp}, {leader} : i1"));
    f.if_(&one, |f| {
        let init = start(f);
        tiles.each(f, &init, |f, [m, n], carried| {
            let mut now = carried.to_vec();
            for (pass, depth) in form.passes.iter().zip(depths) {
                let (zero, turns) = (f.i64(0), f.ceil_divc(depth, STEP));
                let init: Vec<(Val, String)> = now.iter().map(|x| (x.clone(), "i64".to_string())).collect();
                now = f.for_(&zero, &turns, 1, &init, |f, t, now| {
                    let (stage, turn) = (&now[0], &now[1]);
                    let one = f.i64(1);
                    // A new barrier counts as passed: the first round does not wait.
                    let before = f.op(format!("arith.xori {turn}, {one} : i64"));
                    let free = ring.free(f, stage);
                    ring.wait(f, &free, &before);
                    let full = ring.full(f, stage);
                    let bytes = f.i32((cut.left() + pass.parts.len() as i64 * cut.right()) as i32, 1);
                    f.stmt(&format!("nvvm.mbarrier.arrive.expect_tx {full}, {bytes} : !llvm.ptr<3>, i32"));
                    let (base, step) = (f.mulc(stage, cut.stage()), f.mulc(t, STEP));
                    let copy = |f: &mut Func, x: &Operand, lines: i64, at: i64, line: &Val| {
                        let (line, step) = (f.addc(line, x.first[0]), f.addc(&step, x.first[1]));
                        let step = f.op(format!("arith.trunci {step} : i64 to i32"));
                        for i in 0..if x.along { 1 } else { lines / ROWS } {
                            let line = f.addc(&line, ROWS * i);
                            let line = f.op(format!("arith.trunci {line} : i64 to i32"));
                            let at = f.addc(&base, at + BLOCK * i);
                            let to = ring.at(f, &at);
                            let to = f.op(format!("llvm.addrspacecast {to} : !llvm.ptr<3> to !llvm.ptr<7>"));
                            let [x0, x1] = if x.along { [&step, &line] } else { [&line, &step] };
                            f.stmt(&format!(
                                "nvvm.cp.async.bulk.tensor.shared.cluster.global {to}, %map{}, {full}, box[{x0}, {x1}] : \
                                 !llvm.ptr<7>, !llvm.ptr",
                                x.map
                            ));
                        }
                    };
                    copy(f, &pass.left, cut.rows(), 0, m);
                    for (i, part) in pass.parts.iter().enumerate() {
                        copy(f, &part.right, cut.columns, cut.left() + i as i64 * cut.right(), n);
                    }
                    ring.advance(f, stage, turn).to_vec()
                });
            }
            now
        });
    });
}

/// The type of a thread's accumulators.
fn accumulators(cut: &Cut) -> String {
    format!("!llvm.struct<({})>", vec!["f32"; cut.columns as usize / 2].join(", "))
}

/// A warpgroup that multiplies; `own` is its number.
#[allow(clippy::too_many_arguments, reason = "what the block of the other role has, and the results")]
fn consume(
    f: &mut Func,
    p: &mut Pull<'_>,
    a: &Analysis,
    form: &Form,
    depths: &[Val],
    ring: &Ring,
    tiles: &Tiles,
    [tid, own]: [&Val; 2],
) {
    let cut = &form.cut;
    let (warp, lane) = (f.divc(tid, 32), f.remc(tid, 32));
    let (warp, zero) = (f.remc(&warp, 4), f.i64(0));
    let leads = f.cmp("eq", &lane, &zero);
    let shared = f.op(format!("llvm.ptrtoint {} : !llvm.ptr<3> to i32", ring.base));
    let ty = accumulators(cut);
    let none = f.op(format!("llvm.mlir.zero : {ty}"));
    let scales: Vec<Vec<Option<Val>>> = form
        .passes
        .iter()
        .map(|pass| pass.parts.iter().map(|x| x.scale.map(|s| p.eval(f, s, &[]))).collect())
        .collect();
    let worker = Worker { ring, cut, leads, own: own.clone(), shared, ty };
    let init = start(f);
    tiles.each(f, &init, |f, [m, n], carried| {
        let mut now = [carried[0].clone(), carried[1].clone()];
        let mut totals: Vec<Option<Val>> = vec![None; a.groups.len()];
        for ((pass, scales), depth) in form.passes.iter().zip(&scales).zip(depths) {
            let begin: Vec<Val> = pass
                .parts
                .iter()
                .zip(scales)
                .map(|(x, s)| match (s, &totals[x.group]) {
                    (None, Some(t)) => t.clone(),
                    _ => none.clone(),
                })
                .collect();
            let out = worker.pass(f, pass, depth, &mut now, &begin);
            for ((x, s), sum) in pass.parts.iter().zip(scales).zip(out) {
                let before = totals[x.group].take();
                totals[x.group] = Some(match s {
                    None => sum,
                    Some(s) => worker.scaled(f, &sum, s, before.as_ref()),
                });
            }
        }
        let sums: Vec<Vec<Val>> = totals.iter().flatten().map(|t| worker.elements(f, t)).collect();
        let (row, high) = (f.mulc(own, ROWS), f.mulc(&warp, 16));
        let row = f.add(&row, &high);
        let row = f.add(m, &row);
        let tile = fragment::Tile {
            lane: &lane,
            at: [&row, n],
            size: [&tiles.size[0], &tiles.size[1]],
            columns: cut.columns,
            tile: cut.columns,
        };
        write(f, p, a, &[], &tile, &sums);
        now.to_vec()
    });
}

struct Worker<'a> {
    ring: &'a Ring,
    cut: &'a Cut,
    /// Whether the thread speaks for its warp.
    leads: Val,
    /// Number of the warpgroup among those that multiply.
    own: Val,
    /// Address of shared memory, i32.
    shared: Val,
    ty: String,
}

impl Worker<'_> {
    fn elements(&self, f: &mut Func, x: &Val) -> Vec<Val> {
        (0..self.cut.columns / 2).map(|i| f.op(format!("llvm.extractvalue {x}[{i}] : {}", self.ty))).collect()
    }

    /// Accumulators times a number, added to what was there.
    fn scaled(&self, f: &mut Func, x: &Val, s: &Val, before: Option<&Val>) -> Val {
        let xs = self.elements(f, x);
        let old = before.map(|b| self.elements(f, b));
        let mut out = f.op(format!("llvm.mlir.undef : {}", self.ty));
        for (i, x) in xs.iter().enumerate() {
            let y = match &old {
                Some(b) => f.op(format!("math.fma {x}, {s}, {} : f32", b[i])),
                None => f.op(format!("arith.mulf {x}, {s} : f32")),
            };
            out = f.op(format!("llvm.insertvalue {y}, {out}[{i}] : {}", self.ty));
        }
        out
    }

    /// The descriptor of a matrix at an address of shared memory, and what it grows by for 16 steps of the sum.
    fn descriptor(&self, f: &mut Func, at: &Val, along: bool) -> (Val, i64) {
        let (four, mask) = (f.i32(4, 1), f.i32(0x3fff, 1));
        let low = f.op(format!("arith.shrui {at}, {four} : i32"));
        let low = f.op(format!("arith.andi {low}, {mask} : i32"));
        let low = f.op(format!("arith.extui {low} : i32 to i64"));
        // Across: blocks of 64 rows or columns follow each other; along, that field is not used.
        let lead = if along { 1 } else { BLOCK >> 4 };
        let high = f.i64(DESCRIPTOR | lead << 16);
        let step = if along { 32 } else { 16 * 128 };
        (f.op(format!("arith.ori {low}, {high} : i64")), step >> 4)
    }

    /// Adds the products of a pass to accumulators. `now` is the place in the ring.
    fn pass(&self, f: &mut Func, pass: &Pass, depth: &Val, now: &mut [Val; 2], begin: &[Val]) -> Vec<Val> {
        let cut = self.cut;
        let (zero, turns) = (f.i64(0), f.ceil_divc(depth, STEP));
        let steps = (depth.known().map_or(STEP, |d| d.min(STEP)) + 15) / 16;
        let mut init: Vec<(Val, String)> = [&now[0], &now[1], &now[0]].map(|x| (x.clone(), "i64".to_string())).to_vec();
        init.extend(begin.iter().map(|x| (x.clone(), self.ty.clone())));
        let out = f.for_(&zero, &turns, 1, &init, |f, t, carried| {
            let (stage, turn, before) = (&carried[0], &carried[1], &carried[2]);
            let mut sums = carried[3..].to_vec();
            let full = self.ring.full(f, stage);
            self.ring.wait(f, &full, turn);
            let base = f.mulc(stage, cut.stage());
            let at = |f: &mut Func, byte: &Val| {
                let x = f.add(&base, byte);
                let x = f.op(format!("arith.trunci {x} : i64 to i32"));
                f.op(format!("arith.addi {}, {x} : i32", self.shared))
            };
            let left = f.mulc(&self.own, BLOCK);
            let left = at(f, &left);
            let (left, left_step) = self.descriptor(f, &left, pass.left.along);
            f.stmt("nvvm.wgmma.fence.aligned");
            for (i, (part, sum)) in pass.parts.iter().zip(&mut sums).enumerate() {
                let right = f.i64(cut.left() + i as i64 * cut.right());
                let right = at(f, &right);
                let (right, right_step) = self.descriptor(f, &right, part.right.along);
                let layout = |along: bool, yes: &'static str, no: &'static str| if along { yes } else { no };
                let (la, lb) = (layout(pass.left.along, "row", "col"), layout(part.right.along, "col", "row"));
                for s in 0..steps {
                    let (x, y) = (f.addc(&left, s * left_step), f.addc(&right, s * right_step));
                    *sum = f.op(format!(
                        "nvvm.wgmma.mma_async {x}, {y}, {sum}, #nvvm.shape<m = 64, n = {}, k = 16>, D [<f32>, \
                         #nvvm.wgmma_scale_out<one>], A [<bf16>, #nvvm.wgmma_scale_in<one>, <{la}>], B [<bf16>, \
                         #nvvm.wgmma_scale_in<one>, <{lb}>] : {ty} -> {ty}",
                        cut.columns,
                        ty = self.ty
                    ));
                }
            }
            f.stmt("nvvm.wgmma.commit.group.sync.aligned");
            // One group stays in flight; the one before it has read its stage.
            f.stmt("nvvm.wgmma.wait.group.sync.aligned 1");
            let none = f.i64(0);
            let later = f.cmp("ne", t, &none);
            let frees = f.op(format!("arith.andi {}, {later} : i1", self.leads));
            self.release(f, &frees, before);
            let [next, turn] = self.ring.advance(f, stage, turn);
            let mut out = vec![next, turn, stage.clone()];
            out.extend(sums);
            out
        });
        f.stmt("nvvm.wgmma.wait.group.sync.aligned 0");
        self.release(f, &self.leads, &out[2]);
        *now = [out[0].clone(), out[1].clone()];
        out[3..].iter().map(|x| self.settled(f, x)).collect()
    }

    /// Accumulators after a wait: nothing that reads them may move before it, which only a use there can say.
    fn settled(&self, f: &mut Func, x: &Val) -> Val {
        let n = self.cut.columns as usize / 2;
        let list = |part: &dyn Fn(usize) -> String| (0..n).map(part).collect::<Vec<_>>();
        let names = self.elements(f, x).iter().map(Val::to_string).collect::<Vec<_>>().join(", ");
        let tied = [list(&|_| "=f".into()), list(&|i| i.to_string())].concat().join(",");
        let types = list(&|_| "f32".into()).join(", ");
        f.op(format!(
            "llvm.inline_asm has_side_effects asm_dialect = att \"\", \"{tied}\" {names} : ({types}) -> {}",
            self.ty
        ))
    }

    fn release(&self, f: &mut Func, cond: &Val, stage: &Val) {
        f.if_(cond, |f| {
            let free = self.ring.free(f, stage);
            f.stmt(&format!("nvvm.mbarrier.arrive {free} : !llvm.ptr<3>"));
        });
    }
}
