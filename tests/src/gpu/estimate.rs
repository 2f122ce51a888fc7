//! What kernels execute, counted by the simulator: an estimate, not a measurement.
//!
//! A few blocks of every launch are run and stand for the others. Instructions, products and bytes are exact for those blocks; what
//! a GPU makes of them is not known here: caches, overlap and clocks are left out.

use super::{Compiled, How, Place};
use crate::values;
use pleach_ir::interp::Symbols;
use pleach_ir::{Class, Sym};
use pleach_ptx_sim::{Counts, Memory, Ptr};
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
                bytes: 0,
                ..one.clone()
            });
            (0..times).for_each(|_| sum.counts.add(&one.counts));
            (sum.flops, sum.bytes) = (sum.flops + times * one.flops, sum.bytes + times * one.bytes);
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
    Ok(Row { name: p.symbol.clone(), class: k.class, counts, flops, bytes: size(&p.bytes)? })
}

/// The rows by class, as JSON: operations of matrix instructions and those needed, bytes that blocks ask for and those that have to
/// move, warp instructions.
pub fn classes(rows: &[Row]) -> serde_json::Value {
    let mut sums: BTreeMap<String, [u64; 7]> = BTreeMap::new();
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
        ];
        sum.iter_mut().zip(own).for_each(|(s, n)| *s += n);
    }
    let row = |(class, [mma, flops, read, written, bytes, instructions, products]): (&String, &[u64; 7])| {
        serde_json::json!({
            "class": class, "mma_flops": mma, "needed_flops": flops, "mma_instructions": products, "bytes_read": read,
            "bytes_written": written, "floor_bytes": bytes, "warp_instructions": instructions,
            "issue_ms": *instructions as f64 / PEAK[2] * 1e3,
        })
    };
    sums.iter().map(row).collect::<Vec<_>>().into()
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
