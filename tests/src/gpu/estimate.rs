//! What kernels execute, counted by the simulator: an estimate, not a measurement.
//!
//! A few blocks of every launch are run and stand for the others. Instructions, products and bytes are exact for those blocks; what
//! a GPU makes of them is not known here: caches, overlap and clocks are left out.

use super::{Compiled, How, Place};
use crate::values;
use pleach_codegen::emit::gpu::GpuChip;
use pleach_ir::interp::Symbols;
use pleach_ir::{Class, Kernel, Node, Op, Sym, ValueId};
use pleach_plan::LaunchParam;
use pleach_ptx_sim::{Counts, Memory, Ptr, Traffic, Unit};
use std::collections::BTreeMap;
use std::fmt::Write;

/// An H200: products of bf16 and bytes in a second, warp instructions in a second (132 multiprocessors, four schedulers each,
/// 1.7 GHz).
const PEAK: [f64; 3] = [989e12, 4.8e12, 132.0 * 4.0 * 1.7e9];

/// Work of one kernel.
#[derive(Clone, Debug)]
pub struct Row {
    /// Its symbol.
    pub name: String,
    /// Its class.
    pub class: Class,
    /// What it executes.
    pub counts: Counts,
    /// Operations that its products need at least; 0 without products.
    pub flops: u64,
    /// Those of its matrix products alone, by their sizes.
    pub products: u64,
    /// Bytes that its launches leave for each other, written and read.
    pub between: u64,
    /// Bytes of operands and results, each once.
    pub bytes: u64,
}

impl Row {
    /// Operations executed by matrix instructions over those needed.
    pub fn excess(&self) -> f64 {
        self.counts.mma_flops as f64 / self.flops.max(1) as f64
    }

    /// Microseconds for products, bytes and instructions, were each at its peak alone.
    pub fn times(&self) -> [f64; 3] {
        let work = [self.flops, self.bytes, self.counts.warp_instructions];
        [0, 1, 2].map(|i| work[i] as f64 / PEAK[i] * 1e6)
    }
}

/// Counts of every kernel at these values of the symbols, `sample` blocks of each launch.
///
/// # Errors
/// What the simulator reports.
pub fn rows(c: &Compiled, symbols: &Symbols, sample: u64) -> Result<Vec<Row>, String> {
    (0..c.plan.kernels.len()).map(|i| row(c, i, symbols, sample)).collect()
}

/// Work of all runs of every kernel in these entries, those of windows at the counts of a window.
///
/// # Errors
/// What the simulator reports.
pub fn entries(c: &Compiled, names: &[&str], symbols: &Symbols, sample: u64) -> Result<Vec<Row>, String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let env = c.plan.env(&|n| Sym::new(n).and_then(|n| symbols.get(&n).copied())).map_err(|e| text(&e))?;
    let mut out: BTreeMap<u32, Row> = BTreeMap::new();
    let mut seen: BTreeMap<(u32, Vec<u64>), Row> = BTreeMap::new();
    for name in names {
        let entry = c.plan.entry(name).map_err(|e| text(&e))?;
        for (step, times, env) in pleach_codegen::estimate::runs(entry, &env) {
            let kernel = entry.steps[step].kernel;
            let one = match seen.get(&(kernel, env.clone())) {
                Some(r) => r.clone(),
                None => {
                    let named = c.plan.symbols.iter().zip(&env);
                    let now: Symbols = named.filter_map(|(s, v)| Some((Sym::new(&s.name)?, *v))).collect();
                    let r = row(c, kernel as usize, &now, sample)?;
                    seen.insert((kernel, env), r.clone());
                    r
                }
            };
            let sum = out.entry(kernel).or_insert_with(|| Row {
                counts: Counts::default(),
                flops: 0,
                products: 0,
                between: 0,
                bytes: 0,
                ..one.clone()
            });
            (0..times).for_each(|_| sum.counts.add(&one.counts));
            (sum.flops, sum.bytes) = (sum.flops + times * one.flops, sum.bytes + times * one.bytes);
            (sum.products, sum.between) = (sum.products + times * one.products, sum.between + times * one.between);
        }
    }
    Ok(out.into_values().collect())
}

/// Work of one run of a kernel.
fn row(c: &Compiled, i: usize, symbols: &Symbols, sample: u64) -> Result<Row, String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let env = c.plan.env(&|n| Sym::new(n).and_then(|n| symbols.get(&n).copied())).map_err(|e| text(&e))?;
    let (p, k) = (&c.plan.kernels[i], &c.schedule.kernels[i]);
    let size = |e: &pleach_plan::Expr| e.eval(&env).map_err(|e| text(&e));
    let mut mem = Memory::new();
    let place = Place::new(&mut mem, c.plan.symbols.len(), size(&p.scratch_bytes)?);
    let mut buffers: Vec<Ptr> = vec![];
    for ((v, name), bytes) in k.body.inputs().into_iter().zip(&p.operands) {
        // Counts hang on indices and lengths, not on other numbers.
        let at = mem.alloc_named(name, size(bytes)? as usize);
        let data = values::indices(&k.body, v, symbols, 1, name).map(|t| t.to_bytes());
        let data = data.unwrap_or_else(|| vec![0; size(bytes).unwrap_or(0) as usize]);
        mem.write(at, &data).map_err(|e| text(&e))?;
        buffers.push(at);
    }
    for (bytes, over) in p.results.iter().zip(&k.aliases) {
        buffers.push(match over {
            Some(o) => buffers[*o as usize],
            None => mem.alloc_named("result", size(bytes)? as usize),
        });
    }
    // Later launches read what the blocks that are left out would have written.
    if let Some((at, n)) = place.scratch {
        mem.write(at, &vec![0; n]).map_err(|e| text(&e))?;
    }
    let counts = c.sampled(&mut mem, i, &buffers, &place, &env, sample)?;
    let products = matches!(k.class, Class::Contraction | Class::Attention);
    let flops = if products { size(&p.flops)? } else { 0 };
    let launches = p.launches.iter().map(|l| l.runs(&env)).filter(|r| matches!(r, Ok(true))).count();
    let between = if launches > 1 { 2 * size(&p.scratch_bytes)? } else { 0 };
    let products = matrix_products(k, symbols);
    Ok(Row { name: p.symbol.clone(), class: k.class, counts, flops, products, between, bytes: size(&p.bytes)? })
}

/// Operations of the matrix products of a kernel's body: a multiply and an add for every step of every element's sum.
fn matrix_products(k: &Kernel, symbols: &Symbols) -> u64 {
    let (body, live) = (&k.body, k.body.live());
    let size = |v: ValueId| values::shape(body.ty(v), symbols);
    let one = |n: &Node| match n.op {
        Op::MatMul { ta, .. } => {
            let left = size(n.inputs[0]);
            2 * values::shape(&n.ty, symbols).iter().product::<u64>() * left[left.len() - if ta { 2 } else { 1 }]
        }
        _ => 0,
    };
    body.nodes.iter().zip(&live).filter(|x| *x.1).map(|x| one(x.0)).sum()
}

/// What is executed of rows that were executed as a whole, beside the formulas, kernel by kernel.
///
/// # Errors
/// The kernels for which both differ.
pub fn agree(c: &Compiled, rows: &[Row]) -> Result<(), String> {
    let mut faults = vec![];
    for r in rows {
        let k = &c.schedule.kernels[kernel(c, r)?];
        let columns = k.body.roots.first().and_then(|v| k.body.ty(v.value).shape.last()?.known()).unwrap_or(1);
        let mma = r.counts.mma_flops;
        // Of fewer columns than a tile has, all of the tile is computed.
        let most = r.products * columns.next_multiple_of(TILE) / columns.max(1);
        if r.class == Class::Contraction && !(r.products..=most).contains(&mma) {
            faults.push(format!("{}: {mma} operations are executed, {} to {most} by the formula", r.name, r.products));
        }
        let (moved, bytes) = (r.counts.sectors_read + r.counts.sectors_written, r.bytes + r.between);
        // The gradients of attention read all operands in each of their launches; numbers alone take a sector each.
        let gradient = k.body.nodes.iter().any(|n| matches!(n.op, Op::AttentionGrad { .. }));
        let most = if gradient { 2.0 } else { 1.0 + SLACK } * bytes as f64;
        // Columns that are picked may share what memory moves at once.
        let least = if k.body.nodes.iter().any(picks) { 0.5 } else { 1.0 - SLACK } * bytes as f64;
        let numbers = 32 * (k.operands.len() + k.results.len() + 1) as u64;
        if moved + numbers < least as u64 || moved > most as u64 + numbers {
            faults.push(format!("{}: {moved} bytes are moved, {bytes} by the formula", r.name));
        }
    }
    if faults.is_empty() { Ok(()) } else { Err(faults.join("\n")) }
}

/// Number of the kernel that a row is of.
fn kernel(c: &Compiled, r: &Row) -> Result<usize, String> {
    let at = c.plan.kernels.iter().position(|k| k.symbol == r.name);
    at.ok_or_else(|| format!("no kernel {}", r.name))
}

/// Columns that an index picks lie anywhere.
fn picks(n: &Node) -> bool {
    match n.op {
        Op::Gather { axis } | Op::Scatter { axis, .. } => axis > 0 && usize::from(axis) + 1 == n.ty.rank(),
        _ => false,
    }
}

/// Columns of the narrowest tile that all products of more columns have whole ones of.
const TILE: u64 = 128;
/// How far the bytes of the different sectors may be from the formula's.
const SLACK: f64 = 0.02;

/// The rows by class, as JSON: operations of matrix instructions and those needed, bytes that blocks ask for and those that have to
/// move, by formula, and of different sectors (0 where not all blocks ran), bytes of shared memory, warp instructions.
pub fn classes(rows: &[Row]) -> serde_json::Value {
    let mut sums: BTreeMap<String, [u64; 11]> = BTreeMap::new();
    for r in rows {
        let sum = sums.entry(format!("{:?}", r.class).to_lowercase()).or_default();
        let own = [
            r.counts.mma_flops,
            r.flops,
            r.counts.global_read,
            r.counts.global_written,
            r.bytes,
            r.counts.warp_instructions,
            r.counts.of("mma.sync") + r.counts.of("wgmma.mma_async"),
            r.counts.sectors_read + r.counts.sectors_written,
            r.counts.shared_read,
            r.counts.shared_written,
            r.bytes + r.between,
        ];
        sum.iter_mut().zip(own).for_each(|(s, n)| *s += n);
    }
    let row = |(class, sums): (&String, &[u64; 11])| {
        let [mma, flops, read, written, bytes, instructions, products, sectors, shared_read, shared_written, formula] =
            sums;
        serde_json::json!({
            "class": class, "mma_flops": mma, "needed_flops": flops, "mma_instructions": products, "bytes_read": read,
            "bytes_written": written, "floor_bytes": bytes, "formula_bytes": formula, "sector_bytes": sectors,
            "shared_bytes_read": shared_read, "shared_bytes_written": shared_written, "warp_instructions": instructions,
            "issue_ms": *instructions as f64 / PEAK[2] * 1e3,
        })
    };
    sums.iter().map(row).collect::<Vec<_>>().into()
}

/// Processors, clocks a second at which the data sheets' products are counted, and bytes of memory in a second: an A100 and an H200.
const BOARDS: [(GpuChip, f64, f64, f64); 2] =
    [(GpuChip::Sm80, 108.0, 1.41e9, 2.039e12), (GpuChip::Sm90a, 132.0, 1.83e9, 4.8e12)];

/// Milliseconds of every unit and of memory, each as if nothing else took time and all processors had the same to do, longest first.
pub fn bounds(r: &Row, chip: GpuChip) -> Vec<(String, f64)> {
    let Some((_, processors, clock, bytes)) = BOARDS.into_iter().find(|b| b.0 == chip) else { return vec![] };
    let unit = |u: Unit| (format!("{u:?}").to_lowercase(), r.counts.cycles(u) / processors / clock * 1e3);
    let memory =
        ("memory".to_string(), r.bytes.max(r.counts.sectors_read + r.counts.sectors_written) as f64 / bytes * 1e3);
    let mut all: Vec<_> = Unit::ALL.into_iter().map(unit).chain([memory]).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1));
    all
}

/// Over the least: wavefronts of shared memory, sectors of global memory.
pub fn ratios(t: &Traffic) -> [f64; 2] {
    let over = |n: u64, least: u64| n as f64 / least.max(1) as f64;
    [over(t.wavefronts, t.least_wavefronts), over(t.sectors, t.least_sectors)]
}

/// How far wavefronts of shared memory may lie over the fewest possible ones.
const CONFLICTS: f64 = 1.02;

/// How far sectors of global memory may lie over the fewest possible ones, by class. Where threads take 8 elements, those of 4 bytes are read and
/// written in two halves of a sector; attention writes heads in pieces of 16 bytes, and its statistics lie a head apart.
fn scattered(class: Class) -> f64 {
    match class {
        Class::Contraction => 1.02,
        _ => 2.0,
    }
}

/// Whether accesses of memory take little more than their bytes need: no conflicts of banks, and whole sectors where no columns are picked.
///
/// # Errors
/// The kernels where they do not, each with its worst instructions.
pub fn held(c: &Compiled, rows: &[Row]) -> Result<(), String> {
    let mut faults = vec![];
    for r in rows {
        let [wavefronts, sectors] = ratios(&r.counts.traffic());
        let i = kernel(c, r)?;
        let anywhere = c.schedule.kernels[i].body.nodes.iter().any(picks);
        // What is stepped over a table lies side by side, and is read and written once.
        let table = |l: &pleach_plan::Launch| l.params.iter().any(|p| matches!(p, LaunchParam::Table(_)));
        let stepped = c.plan.kernels[i].launches.iter().any(table);
        let most = if stepped { 1.1 } else { scattered(r.class) };
        if wavefronts > CONFLICTS || !anywhere && sectors > most {
            let sites = sites(r, 4).join("\n  ");
            faults.push(format!(
                "{}: {wavefronts:.2} of the wavefronts, {sectors:.2} of the sectors needed\n  {sites}",
                r.name
            ));
        }
    }
    if faults.is_empty() { Ok(()) } else { Err(faults.join("\n")) }
}

/// The instructions that cost most beyond the least: `entry:line opcode`, and what they took of how much.
pub fn sites(r: &Row, most: usize) -> Vec<String> {
    let excess = |t: &Traffic| (t.wavefronts - t.least_wavefronts).max((t.sectors - t.least_sectors) / 4);
    let mut all: Vec<_> = r.counts.sites.iter().filter(|s| excess(&s.1.traffic) > 0).collect();
    all.sort_by_key(|s| std::cmp::Reverse(excess(&s.1.traffic)));
    let one = |((entry, line), s): &(&(String, u32), &pleach_ptx_sim::Site)| {
        let t = &s.traffic;
        let (w, g) = ((t.wavefronts, t.least_wavefronts), (t.sectors, t.least_sectors));
        let part =
            |(n, least): (u64, u64), what: &str| if n > 0 { format!(", {n} {what} of {least}") } else { String::new() };
        format!("{entry}:{line} {}{}{}", s.opcode, part(w, "wavefronts"), part(g, "sectors"))
    };
    all.iter().take(most).map(one).collect()
}

/// The rows one by one, as JSON: what bounds them, what is next, and what accesses take beyond the least.
pub fn kernels(rows: &[Row], chip: GpuChip) -> serde_json::Value {
    let row = |r: &Row| {
        let bounds = bounds(r, chip);
        let [wavefronts, sectors] = ratios(&r.counts.traffic());
        serde_json::json!({
            "kernel": r.name, "class": format!("{:?}", r.class).to_lowercase(), "bound": bounds[0].0,
            "second_over_bound": bounds[1].1 / bounds[0].1.max(f64::MIN_POSITIVE), "wavefronts_over_least": wavefronts,
            "sectors_over_least": sectors, "sites": sites(r, 4),
            "ms": bounds.into_iter().map(|(u, t)| (u, t.into())).collect::<serde_json::Map<_, _>>(),
        })
    };
    rows.iter().map(row).collect::<Vec<_>>().into()
}

/// The rows as a table for people.
pub fn table(rows: &[Row]) -> String {
    let mut out = String::from(
        "estimate from simulated blocks, no measurement: µs are products, bytes and instructions each at an H200's peak alone\n\
         kernel                                     mma GFLOP  of needed   read MB  written MB   floor MB  instructions  \
         µs mma  µs bytes  µs issue\n",
    );
    for r in rows {
        let [mma, bytes, issue] = r.times();
        let mega = |n: u64| n as f64 / 1e6;
        let _ = writeln!(
            out,
            "{:42} {:10.3} {:9.2}× {:9.2} {:11.2} {:10.2} {:13} {mma:7.1} {bytes:9.1} {issue:9.1}",
            r.name.chars().take(42).collect::<String>(),
            r.counts.mma_flops as f64 / 1e9,
            r.excess(),
            mega(r.counts.global_read),
            mega(r.counts.global_written),
            mega(r.bytes),
            r.counts.warp_instructions,
        );
    }
    out
}

impl Compiled {
    fn sampled(
        &self,
        mem: &mut Memory,
        kernel: usize,
        buffers: &[Ptr],
        at: &Place,
        env: &[u64],
        sample: u64,
    ) -> Result<Counts, String> {
        // Checks would ask for what other blocks write.
        self.launch_some(mem, kernel, buffers, at, (env, env), How::default(), Some(sample))
    }
}
