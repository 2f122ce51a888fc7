//! What a GPU plan takes at least, from counts alone: an estimate, never a measurement.
//!
//! A launch can end no sooner than its products take on the units that its code uses, or its operands and results take to come
//! from memory and go there once. Launches follow each other, so the sum over an entry is a bound below its time. Which
//! units a launch uses is read from its code: `wgmma`, `mma.sync`, or neither. Left out: what a cache has to read more than once,
//! the last round of blocks, and launches that wait for their first bytes; whoever has a GPU measures those.
//!
//! Attention counts the pairs of a query and a key that exist, for sequences of equal length.

use pleach_plan::{BlobKind, Entry, ExprError, Kernel, Plan};
use std::collections::{BTreeMap, btree_map};

/// What a GPU reaches.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Machine {
    /// Name by which it is asked for.
    pub name: &'static str,
    /// Operations on bf16 by warpgroup instructions, in a second; 0 where there are none.
    pub warpgroup: f64,
    /// Operations on bf16 by `mma.sync`, in a second.
    pub warp: f64,
    /// Operations on f32 without tensor cores, in a second.
    pub plain: f64,
    /// Bytes of memory in a second.
    pub bytes: f64,
    /// Seconds from the end of a launch of a graph to the beginning of the next one.
    pub gap: f64,
    /// Where the numbers are from.
    pub source: &'static str,
}

/// The share of a data sheet's peak that large products and long copies reach: 790 of 989 TFLOP/s and 4.3 of 4.8 TB/s on an H200.
const REACHED: [f64; 2] = [0.8, 0.9];
/// Seconds between two launches of a graph.
const GAP: f64 = 1.5e-6;

/// The machines there are numbers for.
pub const MACHINES: [Machine; 3] = [
    Machine {
        name: "a100",
        warpgroup: 0.0,
        warp: 312e12 * REACHED[0],
        plain: 19.5e12 * REACHED[0],
        bytes: 2.039e12 * REACHED[1],
        gap: GAP,
        source: "data sheet of the A100 80 GB SXM (312 TFLOP/s bf16, 19.5 f32, 2.039 TB/s), times the shares that an H200 reaches",
    },
    Machine {
        name: "h100",
        warpgroup: 790e12,
        warp: 989e12 * 0.63,
        plain: 67e12 * REACHED[0],
        bytes: 3.35e12 * REACHED[1],
        gap: GAP,
        source: "as h200, with 3.35 TB/s of the data sheet of the H100 SXM, times 0.9",
    },
    Machine {
        name: "h200",
        warpgroup: 790e12,
        warp: 989e12 * 0.63,
        plain: 67e12 * REACHED[0],
        bytes: 4.3e12,
        gap: GAP,
        source: "measured on an H200 (790 TFLOP/s bf16 by a library, 4.3 TB/s); mma.sync at the 63 % of the peak that published \
                 microbenchmarks of Hopper give; 67 TFLOP/s f32 of the data sheet, times 0.8",
    },
];

/// The machine of that name; for an empty one the usual board of a target.
pub fn machine(name: &str, target: &str) -> Option<&'static Machine> {
    let name = match (name, target) {
        ("", "sm_80") => "a100",
        ("", _) => "h200",
        (n, _) => n,
    };
    MACHINES.iter().find(|m| m.name == name)
}

/// Units that a launch multiplies with.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Units {
    /// None of the below: f32 by threads.
    Plain,
    /// Tensor cores by warps: `mma.sync`.
    Warp,
    /// Tensor cores by warpgroups: `wgmma`.
    Warpgroup,
}

impl Units {
    /// The instruction.
    pub fn name(self) -> &'static str {
        match self {
            Units::Plain => "f32",
            Units::Warp => "mma.sync",
            Units::Warpgroup => "wgmma",
        }
    }
}

/// All runs of one kernel in an entry.
#[derive(Clone, PartialEq, Debug)]
pub struct Row {
    /// Index of the kernel in the plan.
    pub kernel: usize,
    /// Runs, those of every window counted.
    pub runs: u64,
    /// Launches of all runs.
    pub launches: u64,
    /// The strongest units that any of its launches uses.
    pub units: Units,
    /// Operations that the results need, in all.
    pub flops: u64,
    /// Bytes of operands, results, and of what launches leave for each other, each once a run; in all.
    pub bytes: u64,
    /// Seconds for the operations and for the bytes, each at its limit alone.
    pub seconds: [f64; 2],
    /// Seconds: the larger of both, run by run.
    pub bound: f64,
}

impl Row {
    /// Takes other runs in. Those of another kernel may be added up, too: the sum then names the first one.
    pub fn add(&mut self, other: &Row) {
        self.units = self.units.max(other.units);
        self.runs += other.runs;
        self.launches += other.launches;
        self.flops = self.flops.saturating_add(other.flops);
        self.bytes = self.bytes.saturating_add(other.bytes);
        (0..2).for_each(|i| self.seconds[i] += other.seconds[i]);
        self.bound += other.bound;
    }
}

/// What an entry takes.
#[derive(Clone, PartialEq, Debug)]
pub struct EntryRows {
    /// Its name.
    pub name: String,
    /// Its kernels, the longest first.
    pub rows: Vec<Row>,
    /// Seconds between all its launches.
    pub gaps: f64,
}

impl EntryRows {
    /// Seconds of all kernels, without the gaps.
    pub fn bound(&self) -> f64 {
        self.rows.iter().map(|r| r.bound).sum()
    }

    /// Launches of all kernels.
    pub fn launches(&self) -> u64 {
        self.rows.iter().map(|r| r.launches).sum()
    }
}

/// What every entry but the preparations takes at these values of the symbols.
///
/// # Errors
/// A size without a value.
pub fn entries(plan: &Plan, env: &[u64], machine: &Machine) -> Result<Vec<EntryRows>, ExprError> {
    let units = units(plan);
    let sequences = plan.symbol("S").map(|s| s as usize);
    let tokens: Vec<usize> = ["T", "C"].iter().filter_map(|n| plan.symbol(n)).map(|s| s as usize).collect();
    // Sequences see their own keys only.
    let flops = |k: &Kernel, env: &[u64]| -> Result<u64, ExprError> {
        let Some(s) = sequences.filter(|_| k.class == "attention") else { return k.flops.eval(env) };
        let mut one = env.to_vec();
        let n = env[s].max(1);
        tokens.iter().for_each(|t| one[*t] = env[*t].div_ceil(n));
        Ok(k.flops.eval(&one)?.saturating_mul(n))
    };
    let mut out = vec![];
    for e in plan.entries.iter().filter(|e| e.prepares().is_none()) {
        let mut rows: BTreeMap<usize, Row> = BTreeMap::new();
        for (step, times, env) in runs(e, env) {
            let number = e.steps[step].kernel as usize;
            let k = &plan.kernels[number];
            let mut now = vec![];
            for (l, u) in k.launches.iter().zip(&units[number]) {
                if l.runs(&env)? {
                    now.push(*u);
                }
            }
            let strongest = now.iter().copied().max().unwrap_or(Units::Plain);
            let between = if now.len() > 1 { k.scratch_bytes.eval(&env)?.saturating_mul(2) } else { 0 };
            let (flops, bytes) = (flops(k, &env)?, k.bytes.eval(&env)?.saturating_add(between));
            let speed = match strongest {
                Units::Warpgroup => machine.warpgroup,
                Units::Warp => machine.warp,
                Units::Plain => machine.plain,
            };
            let own = [flops as f64 / speed.max(1.0), bytes as f64 / machine.bytes];
            let runs = Row {
                kernel: number,
                runs: times,
                launches: times * now.len() as u64,
                units: strongest,
                flops: flops.saturating_mul(times),
                bytes: bytes.saturating_mul(times),
                seconds: own.map(|s| s * times as f64),
                bound: own[0].max(own[1]) * times as f64,
            };
            match rows.entry(number) {
                btree_map::Entry::Vacant(e) => drop(e.insert(runs)),
                btree_map::Entry::Occupied(e) => e.into_mut().add(&runs),
            }
        }
        let mut rows: Vec<Row> = rows.into_values().collect();
        rows.sort_by(|a, b| b.bound.total_cmp(&a.bound).then(a.kernel.cmp(&b.kernel)));
        let launches: u64 = rows.iter().map(|r| r.launches).sum();
        out.push(EntryRows { name: e.name.clone(), rows, gaps: launches as f64 * machine.gap });
    }
    Ok(out)
}

/// Every step of an entry: its number, how often it runs, and the values of the symbols then.
pub fn runs(e: &Entry, env: &[u64]) -> Vec<(usize, u64, Vec<u64>)> {
    let mut out = vec![];
    for step in 0..e.steps.len() {
        let Some(l) = e.loops.iter().find(|l| (l.first..l.last).contains(&(step as u64))) else {
            out.push((step, 1, env.to_vec()));
            continue;
        };
        let (all, symbol) = (env[l.symbol as usize], l.symbol as usize);
        for (times, rows) in [(all / l.chunk.max(1), l.chunk), (1, all % l.chunk.max(1))] {
            if times > 0 && rows > 0 {
                let mut window = env.to_vec();
                window[symbol] = rows;
                out.push((step, times, window));
            }
        }
    }
    out
}

/// What every launch of every kernel multiplies with, from the code.
fn units(plan: &Plan) -> Vec<Vec<Units>> {
    let mut found: BTreeMap<&str, Units> = BTreeMap::new();
    for b in plan.blobs.iter().filter(|b| b.kind == BlobKind::Ptx) {
        let Ok(text) = std::str::from_utf8(&b.bytes) else { continue };
        for part in text.split(".entry ").skip(1) {
            let name = part.split('(').next().unwrap_or_default().trim();
            let units = match () {
                () if part.contains("wgmma.mma_async") => Units::Warpgroup,
                () if part.contains("mma.sync") => Units::Warp,
                () => Units::Plain,
            };
            found.insert(name, units);
        }
    }
    let of = |l: &pleach_plan::Launch| found.get(l.function.as_str()).copied().unwrap_or(Units::Plain);
    plan.kernels.iter().map(|k| k.launches.iter().map(of).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use pleach_plan::{Blob, Expr, Launch, LaunchParam, Loop, Meta, Step, Symbol, Target};

    fn kernel(name: &str, class: &str, flops: Expr, bytes: Expr) -> Kernel {
        let one = || Expr::Const(1);
        let launch = Launch {
            function: name.into(),
            grid: [one(), one(), one()],
            block: 128,
            shared_bytes: 0,
            params: vec![LaunchParam::Dims],
            when: None,
        };
        Kernel {
            symbol: name.into(),
            blob: 0,
            class: class.into(),
            tasks: one(),
            scratch_bytes: Expr::Const(10),
            operands: vec![],
            results: vec![],
            aliases: vec![],
            flops,
            bytes,
            launches: vec![launch],
            library: None,
        }
    }

    fn step(kernel: u32) -> Step {
        Step { kernel, buffers: vec![], origin: String::new() }
    }

    #[test]
    fn runs_are_counted_window_by_window_and_sequences_see_their_own_keys() {
        let t = || Expr::Sym(0);
        let kernels = vec![
            kernel("a", "contraction", t().mul(1000), t().mul(2)),
            kernel("b", "attention", t().mul(t()), t().mul(8)),
        ];
        let text = ".visible .entry a(\n) { wgmma.mma_async.sync }\n.visible .entry b(\n) { mma.sync.aligned }";
        let entry = Entry {
            name: "accumulate".into(),
            steps: vec![step(0), step(1)],
            loops: vec![Loop { first: 0, last: 1, symbol: 0, chunk: 40, windows: vec![] }],
            ..Entry::default()
        };
        let plan = Plan {
            target: Target { arch: "sm_90a".into(), features: vec![] },
            symbols: Symbol::list(["T", "S"]),
            kernels,
            entries: vec![entry],
            meta: Meta::default(),
            blobs: vec![Blob { name: "k".into(), kind: BlobKind::Ptx, bytes: text.into() }],
            ..Plan::default()
        };
        let m = machine("", "sm_90a").unwrap();
        let all = entries(&plan, &[100, 4], m).unwrap();
        let row = |i: usize| all[0].rows.iter().find(|r| r.kernel == i).unwrap();
        assert_eq!((row(0).runs, row(0).launches, row(0).units), (3, 3, Units::Warpgroup));
        assert_eq!((row(0).flops, row(0).bytes), (100_000, 200));
        assert_eq!((row(1).flops, row(1).units), (4 * 25 * 25, Units::Warp));
        assert!((row(0).bound - row(0).seconds[0].max(row(0).seconds[1])).abs() < 1e-12);
        assert!((all[0].gaps - 4.0 * m.gap).abs() < 1e-12);
        assert_eq!(all[0].launches(), 4);
    }

    #[test]
    fn machines_are_found_by_name_or_target() {
        assert_eq!(machine("", "sm_80").map(|m| m.name), Some("a100"));
        assert_eq!(machine("h100", "sm_80").map(|m| m.name), Some("h100"));
        assert!(machine("b200", "sm_90a").is_none());
    }
}
