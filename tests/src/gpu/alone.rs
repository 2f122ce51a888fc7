//! One kernel at a time, on random values, against the interpreter running the kernel's body.
//!
//! Buffers have exactly the bytes that the counts ask for, so that every access beyond is found; grids are evaluated at larger
//! counts. Operands must stay as they are but for those that a result is written over.

use super::{Compiled, How, Place, WAYS, blocks};
use crate::values;
use pleach_ir::interp::{Symbols, Tensor, run_kernel_with};
use pleach_ir::{BlockFormat, DType, Kernel, Layout, Sym};
use pleach_ptx_sim::{Counts, Memory, Ptr};

/// Counts that a kernel is run at: tokens, sequences, counted rows.
pub const COUNTS: [[u64; 3]; 3] = [[1, 2, 1], [5, 2, 3], [33, 3, 20]];

/// Values of all symbols for these counts, and larger ones for the grid.
pub fn symbols([tokens, sequences, rows]: [u64; 3]) -> (Symbols, Symbols) {
    let of = |t: u64, s: u64, l: u64| -> Symbols {
        // The cache has room for twice the tokens of every sequence.
        let cache = 64.max(2 * t + 3 * s);
        [(Sym::T, t), (Sym::S, s), (Sym::S1, s + 1), (Sym::L, l), (Sym::C, cache), (Sym::P, 48)].into_iter().collect()
    };
    (of(tokens, sequences, rows), of(tokens + 71, sequences + 2, rows + 40))
}

/// The largest difference of a result from the interpreter's, over the largest magnitude.
///
/// f32: kernels add in another order than the interpreter, which adds in f64; functions are polynomials of one or two units in
/// the last place. Sums here have at most a few hundred terms, so that 1e-5 is ten times what is seen. A 16-bit result
/// may be rounded to the other side of a tie: 2⁻⁷ is one unit in the last place of the largest. Where a value inside is rounded
/// to 16 bits, one element may differ by as much before it is added to others.
pub fn tolerance(k: &Kernel, result: DType) -> f64 {
    let half = |d: DType| matches!(d, DType::BF16 | DType::F16);
    let inputs: Vec<_> = k.body.inputs().iter().map(|x| x.0).collect();
    let inside = k.body.values().any(|v| half(k.body.ty(v).dtype) && !inputs.contains(&v));
    match result {
        DType::I32 | DType::Bool => 0.0,
        d if half(d) => 0.0079,
        _ if inside => 0.004,
        _ => 1e-5,
    }
}

/// A kernel's operands and what it must compute.
struct Wanted {
    operands: Vec<Tensor>,
    /// The operands' bytes.
    stored: Vec<Vec<u8>>,
    results: Vec<Tensor>,
}

/// Starts of the search for signs of operands, where functions of the body give no numbers.
const STARTS: u64 = 16;

/// Random operands: of both signs, or where a function of the body would give no number, each of one sign or the other. The body may be
/// many kernels side by side, so signs are found operand by operand: a change stays that gives more results numbers.
fn wanted(k: &Kernel, symbols: &Symbols, seed: u64) -> Result<Wanted, String> {
    let by_name = values::inputs(&k.body, symbols, seed);
    let mixed: Vec<Tensor> = k.body.inputs().iter().map(|(_, n)| by_name[*n].clone()).collect();
    let signed = |(t, below): (&Tensor, &bool)| match t.dtype() {
        DType::I32 | DType::Bool => t.clone(),
        d => {
            let sign = if *below { -1.0 } else { 1.0 };
            Tensor::from_floats(d, t.shape.clone(), t.floats().iter().map(|x| sign * (0.55 + 0.45 * x)).collect())
        }
    };
    let bad = |w: &Wanted| w.results.iter().filter(|t| !t.floats().iter().all(|x| x.is_finite())).count();
    let first = computed(k, symbols, mixed.clone())?;
    if bad(&first) == 0 {
        return Ok(first);
    }
    let with = |below: &[bool]| computed(k, symbols, mixed.iter().zip(below).map(signed).collect());
    let mut least = usize::MAX;
    for start in 0..STARTS {
        // The first start has positive ones alone.
        let pattern = start.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut below: Vec<bool> = (0..mixed.len()).map(|i| pattern >> (i % 61) & 1 == 1).collect();
        let mut best = with(&below)?;
        loop {
            let before = bad(&best);
            for i in 0..below.len() {
                if bad(&best) == 0 {
                    return Ok(best);
                }
                below[i] = !below[i];
                let other = with(&below)?;
                match bad(&other) < bad(&best) {
                    true => best = other,
                    false => below[i] = !below[i],
                }
            }
            if bad(&best) == before {
                break;
            }
        }
        least = least.min(bad(&best));
    }
    Err(format!("{}: {least} results have no finite value for any operands tried:\n{:?}", k.name, k.body))
}

/// What a kernel computes of these operands; those that are kept in blocks are rounded to what blocks hold.
fn computed(k: &Kernel, symbols: &Symbols, mut operands: Vec<Tensor>) -> Result<Wanted, String> {
    let mut stored = vec![];
    for (t, layout) in operands.iter_mut().zip(&k.operands) {
        stored.push(match layout {
            Layout::Blocks(format) => {
                *t = blocks::rounded(*format, t);
                blocks::stored(*format, t)?
            }
            _ => t.to_bytes(),
        });
    }
    let results = run_kernel_with(k, &operands, symbols).map_err(|e| e.to_string())?;
    Ok(Wanted { operands, stored, results })
}

/// What one run of a kernel leaves.
struct Ran {
    results: Vec<Vec<u8>>,
    counts: Counts,
}

fn run(c: &Compiled, kernel: usize, w: &Wanted, (counts, grid): (&[u64], &[u64]), how: How) -> Result<Ran, String> {
    let k = &c.schedule.kernels[kernel];
    let p = &c.plan.kernels[kernel];
    let text = |e: &dyn std::fmt::Display| format!("{}: {e}", p.symbol);
    let mut mem = Memory::new();
    let place = Place::new(&mut mem, c.plan.symbols.len(), p.scratch_bytes.eval(grid).map_err(|e| text(&e))?);
    let mut buffers: Vec<Ptr> = vec![];
    for (i, bytes) in w.stored.iter().enumerate() {
        let at = mem.alloc_named(&format!("operand {i}"), bytes.len());
        mem.write(at, bytes).map_err(|e| text(&e))?;
        buffers.push(at);
    }
    for (i, over) in k.aliases.iter().enumerate() {
        let bytes = p.results[i].eval(counts).map_err(|e| text(&e))?;
        buffers.push(match over {
            Some(o) => buffers[*o as usize],
            None => mem.alloc_named(&format!("result {i}"), bytes as usize),
        });
    }
    let done = c.launch(&mut mem, kernel, &buffers, &place, (grid, counts), how)?;
    for (i, (bytes, at)) in w.stored.iter().zip(&buffers).enumerate() {
        if !k.aliases.contains(&Some(i as u32)) && mem.read(*at, bytes.len()).map_err(|e| text(&e))? != bytes {
            return Err(text(&format!("operand {i} was written over")));
        }
    }
    let mut results = vec![];
    for ((r, layout), at) in w.results.iter().zip(&k.results).zip(&buffers[w.operands.len()..]) {
        results.push(match layout {
            // What blocks stand for.
            Layout::Blocks(format) => {
                let bytes = r.floats().len() as u64 / BlockFormat::VALUES * format.bytes();
                let bytes = mem.read(*at, bytes as usize).map_err(|e| text(&e))?;
                Tensor::from_floats(r.dtype(), r.shape.clone(), blocks::expand(*format, bytes)).to_bytes()
            }
            _ => mem.read(*at, r.to_bytes().len()).map_err(|e| text(&e))?.to_vec(),
        });
    }
    Ok(Ran { results, counts: done })
}

/// How far each result of a kernel is from the interpreter's, as a part of what is allowed.
///
/// # Errors
/// Faults, results that are too far off, and bits that depend on the way of running.
pub fn check(c: &Compiled, kernel: usize, at: [u64; 3], seed: u64) -> Result<(f64, Counts), String> {
    let k = &c.schedule.kernels[kernel];
    let (symbols, larger) = symbols(at);
    let w = wanted(k, &symbols, seed)?;
    let env = |s: &Symbols| c.plan.env(&|n| Sym::new(n).and_then(|n| s.get(&n).copied())).map_err(|e| e.to_string());
    let (counts, grid) = (env(&symbols)?, env(&larger)?);
    let first = run(c, kernel, &w, (&counts, &grid), WAYS[0])?;
    let worst = compare(k, at, &first, &w)?;
    // Another launch may be chosen at the counts themselves than at larger ones; it need not give the same bits.
    let chosen = c.plan.kernels[kernel].launches.iter().any(|l| l.when.is_some());
    let again = if chosen { &grid } else { &counts };
    if run(c, kernel, &w, (&counts, again), WAYS[1])?.results != first.results {
        return Err(format!("{} at {at:?}: another order or smaller grid gives other bits", k.name));
    }
    if chosen {
        compare(k, at, &run(c, kernel, &w, (&counts, &counts), WAYS[0])?, &w)?;
    }
    Ok((worst, first.counts))
}

/// The largest error of a run's results, as a part of what is allowed.
fn compare(k: &Kernel, at: [u64; 3], ran: &Ran, w: &Wanted) -> Result<f64, String> {
    let mut worst = 0f64;
    for (i, (bytes, want)) in ran.results.iter().zip(&w.results).enumerate() {
        let got = Tensor::from_bytes(want.dtype(), want.shape.clone(), bytes).map_err(|e| e.to_string())?;
        let (error, allowed) = (got.relative_error(want), tolerance(k, want.dtype()));
        if error.is_nan() || error > allowed {
            return Err(format!(
                "{} at {at:?}: result {i} is {error:.1e} off, allowed {allowed:.1e}: {}",
                k.name,
                difference(&got, want)
            ));
        }
        worst = worst.max(if allowed > 0.0 { error / allowed } else { 0.0 });
    }
    Ok(worst)
}

/// The first elements that differ most.
fn difference(got: &Tensor, want: &Tensor) -> String {
    let (a, b) = (got.floats(), want.floats());
    let mut list: Vec<(usize, f32)> = a
        .iter()
        .zip(b.iter())
        .map(|(x, y)| (x - y).abs())
        .map(|d| if d.is_nan() { f32::MAX } else { d })
        .enumerate()
        .collect();
    list.sort_by(|x, y| y.1.total_cmp(&x.1));
    let shown = list.iter().take(4).map(|(i, _)| format!("[{i}] {} instead of {}", a[*i], b[*i]));
    format!("of {:?}: {}", got.shape, shown.collect::<Vec<_>>().join(", "))
}
