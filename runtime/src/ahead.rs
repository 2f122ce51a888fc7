//! What each worker will read in the waves to come: parameters that products read, in the order of their tasks.
//!
//! A worker is expected to run the stretch of a wave's tasks that [`crate::pool`] lays out for it, and bytes of an operand to be spread evenly over the
//! tasks of its launch. Only what no step of the entry writes counts. The result is a hint: it changes times, never values.

use crate::device::Address;
use crate::fetch::{STRETCHES, Window};
use pleach_plan::{BufferKind, Entry, ExprError, Plan};

/// Bytes that a worker fetches beforehand: they stay in its second-level cache beside what a small kernel needs.
const DEPTH: u64 = 256 << 10;

/// Operations for each byte of a parameter below which a run waits for memory rather than for arithmetic.
const BOUND: u64 = 64;

/// For every wave and worker (worker fastest): what it will read after that wave. Nothing where arithmetic takes longer than reading
/// parameters.
///
/// # Errors
/// A size that has no value.
pub(crate) fn windows(
    plan: &Plan,
    entry: &Entry,
    (waves, tasks): (&[u32], &[u64]),
    buffers: &[Address],
    (threads, env): (usize, &[u64]),
) -> Result<Vec<Window>, ExprError> {
    let mut written = vec![false; entry.buffers.len()];
    for s in &entry.steps {
        let operands = plan.kernels[s.kernel as usize].operands.len();
        s.buffers[operands..].iter().for_each(|b| written[*b as usize] = true);
    }
    let (mut flops, mut read) = (0u64, 0u64);
    for s in &entry.steps {
        let k = &plan.kernels[s.kernel as usize];
        if k.class == "contraction" {
            flops = flops.saturating_add(k.flops.eval(env)?);
            for (bytes, b) in k.operands.iter().zip(&s.buffers) {
                if matches!(entry.buffers[*b as usize].kind, BufferKind::Param(_)) {
                    read = read.saturating_add(bytes.eval(env)?);
                }
            }
        }
    }
    if flops > read.saturating_mul(BOUND) {
        return Ok(vec![]);
    }
    let count = waves.last().map_or(0, |w| *w as usize + 1);
    // Per worker: address and bytes of each stretch, and where the stretches of each wave begin.
    let mut streams: Vec<Vec<(usize, usize)>> = vec![vec![]; threads];
    let mut starts: Vec<Vec<usize>> = vec![vec![]; threads];
    let mut i = 0;
    for w in 0..count {
        let end = i + waves[i..].iter().take_while(|x| **x as usize == w).count();
        for (stream, start) in streams.iter().zip(&mut starts) {
            start.push(stream.len());
        }
        let total: u64 = tasks[i..end].iter().sum();
        let mut first = 0;
        for (s, n) in entry.steps[i..end].iter().zip(&tasks[i..end]) {
            let k = &plan.kernels[s.kernel as usize];
            let (low, high) = (first, first + n);
            first = high;
            if k.class != "contraction" || *n == 0 {
                continue;
            }
            for (bytes, b) in k.operands.iter().zip(&s.buffers) {
                let param = matches!(entry.buffers[*b as usize].kind, BufferKind::Param(_));
                let at = buffers[*b as usize] as usize;
                if !param || written[*b as usize] || at == 0 {
                    continue;
                }
                let bytes = bytes.eval(env)?;
                for (id, stream) in streams.iter_mut().enumerate() {
                    // One task is run by the caller alone.
                    let share =
                        |i: usize| if total > 1 { total * i as u64 / threads as u64 } else { total * i.min(1) as u64 };
                    let (a, b) = (share(id).max(low), share(id + 1).min(high));
                    if a < b {
                        let part = |t: u64| (u128::from(bytes) * u128::from(t - low) / u128::from(*n)) as usize;
                        stream.push((at + part(a), part(b) - part(a)));
                    }
                }
            }
        }
        i = end;
    }
    let mut out = vec![Window::default(); count * threads];
    for (id, stream) in streams.iter().enumerate() {
        let mut from = 0;
        for w in 0..count {
            let next = starts[id].get(w + 1).copied().unwrap_or(stream.len());
            from += stream[starts[id][w]..next].iter().map(|s| s.1 as u64).sum::<u64>();
            // What comes after the end is most likely the same again.
            let (start, next) = if next < stream.len() { (from, next) } else { (0, 0) };
            let window = &mut out[w * threads + id];
            window.from = start;
            let mut left = DEPTH;
            for (to, s) in window.stretches.iter_mut().zip(stream[next..].iter().take(STRETCHES)) {
                let bytes = left.min(s.1 as u64);
                *to = (s.0, bytes as usize);
                left -= bytes;
            }
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pleach_plan::{Buffer, Expr, Kernel, Step};

    fn kernel(class: &str, operands: &[u64]) -> Kernel {
        Kernel {
            symbol: "k".into(),
            blob: 0,
            class: class.into(),
            tasks: Expr::Const(1),
            scratch_bytes: Expr::Const(0),
            operands: operands.iter().map(|n| Expr::Const(*n)).collect(),
            results: vec![Expr::Const(4)],
            aliases: vec![None],
            flops: Expr::Const(0),
            bytes: Expr::Const(0),
            launches: vec![],
            library: None,
        }
    }

    /// Buffer 0 is of the arena, buffer `i` shows parameter `i` at `1000 · i`.
    fn entry(params: u32, steps: &[(u32, &[u32])]) -> (Entry, Vec<Address>) {
        let kind = |i: u32| if i == 0 { BufferKind::Arena } else { BufferKind::Param(i) };
        let buffers = (0..=params).map(|i| Buffer { kind: kind(i), bytes: Expr::Const(4), name: String::new() });
        let step = |(k, b): &(u32, &[u32])| Step { kernel: *k, buffers: b.to_vec(), origin: String::new() };
        let e = Entry { buffers: buffers.collect(), steps: steps.iter().map(step).collect(), ..Entry::default() };
        (e, (0..=params as usize).map(|i| std::ptr::without_provenance_mut(1000 * i)).collect())
    }

    fn stretches(w: &Window) -> Vec<(usize, usize)> {
        w.stretches.iter().copied().filter(|s| s.1 > 0).collect()
    }

    #[test]
    fn every_worker_gets_its_own_stretch_of_what_comes() {
        let kernels = vec![kernel("contraction", &[400]), kernel("contraction", &[100]), kernel("contraction", &[300])];
        let plan = Plan { kernels, ..Plan::default() };
        // 400 bytes by 4 tasks; 100 bytes by one; 300 bytes by 3 and 100 bytes by one together.
        let (e, at) = entry(4, &[(0, &[1, 0]), (1, &[2, 0]), (2, &[3, 0]), (1, &[4, 0])]);
        let w = windows(&plan, &e, (&[0, 1, 2, 2], &[4, 1, 3, 1]), &at, (2, &[])).unwrap();
        assert_eq!(w.len(), 6);
        // The wave of one task is the caller's; of the last wave the second worker has a task of each launch.
        assert_eq!((w[0].from, stretches(&w[0])), (200, vec![(2000, 100), (3000, 200)]));
        assert_eq!((w[1].from, stretches(&w[1])), (200, vec![(3200, 100), (4000, 100)]));
        assert_eq!((w[2].from, stretches(&w[2])), (300, vec![(3000, 200)]));
        assert_eq!((w[3].from, stretches(&w[3])), (200, vec![(3200, 100), (4000, 100)]));
        // After the last wave it begins again.
        assert_eq!((w[4].from, stretches(&w[4])), (0, vec![(1000, 200), (2000, 100), (3000, 200)]));
        assert_eq!((w[5].from, stretches(&w[5])), (0, vec![(1200, 200), (3200, 100), (4000, 100)]));
    }

    #[test]
    fn only_what_products_read_and_nothing_writes_is_fetched_and_not_too_much() {
        let big = 4 * DEPTH;
        let kernels = vec![kernel("row", &[64]), kernel("contraction", &[64, 64]), kernel("contraction", &[big, 4])];
        let plan = Plan { kernels, ..Plan::default() };
        // A row kernel's table stays; parameter 2 is written by the entry; buffer 0 is no parameter.
        let (e, at) = entry(3, &[(0, &[1, 0]), (0, &[1, 2]), (1, &[2, 0, 0]), (2, &[3, 0, 0])]);
        let w = windows(&plan, &e, (&[0, 1, 2, 3], &[1, 1, 1, 2]), &at, (1, &[])).unwrap();
        assert_eq!(stretches(&w[0]), [(3000, DEPTH as usize)]);
        assert_eq!((w[3].from, stretches(&w[3])), (0, vec![(3000, DEPTH as usize)]));
        let mut busy = plan;
        busy.kernels[2].flops = Expr::Const(BOUND * (big + 1000));
        assert_eq!(windows(&busy, &e, (&[0, 1, 2, 3], &[1, 1, 1, 2]), &at, (1, &[])), Ok(vec![]));
    }
}
