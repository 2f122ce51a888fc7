//! What kernels execute, counted by the simulator: an estimate, not a measurement.
//!
//! A few blocks of every launch are run and stand for the others. Instructions, products and bytes are exact for those blocks; what
//! a GPU makes of them is not known here: caches, overlap and clocks are left out.

use super::{Compiled, How, Place};
use crate::values;
use pleach_ir::interp::Symbols;
use pleach_ir::{Class, Sym};
use pleach_ptx_sim::{Counts, Memory, Ptr};
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
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let env = c.plan.env(&|n| Sym::new(n).and_then(|n| symbols.get(&n).copied())).map_err(|e| text(&e))?;
    let mut out = vec![];
    for (i, (p, k)) in c.plan.kernels.iter().zip(&c.schedule.kernels).enumerate() {
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
        out.push(Row { name: p.symbol.clone(), class: k.class, counts, flops, bytes: size(&p.bytes)? });
    }
    Ok(out)
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
