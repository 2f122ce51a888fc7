//! Sets of buffers for the memory planner: public ones and generators of others. Numbers are drawn from fixed seeds.
#![allow(dead_code, unreachable_pub, reason = "each program uses a part of it")]

use pleach_plan::memory::Request;
use std::path::Path;

/// Numbers that are the same on every machine.
pub struct Random(pub u64);

/// Draws from a distribution.
pub type Draw<'d> = &'d dyn Fn(&mut Random) -> f64;

impl Random {
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 24) % n.max(1)
    }

    /// From 0 to 1.
    pub fn unit(&mut self) -> f64 {
        self.below(1 << 30) as f64 / f64::from(1 << 30)
    }

    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        for i in (1..list.len()).rev() {
            list.swap(i, self.below(i as u64 + 1) as usize);
        }
    }
}

pub fn read(name: &str) -> Vec<Request> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/memory").join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let number = |x: &str| x.parse().unwrap_or_else(|e| panic!("{x}: {e}"));
    let row = |l: &str| l.split(',').map(number).collect::<Vec<u64>>();
    text.lines().skip(1).map(row).map(|v| Request { first: v[1], last: v[2], size: v[3] }).collect()
}

/// A rectangle cut into `n` pieces, one of the `among` largest at a time: at every time all of it is alive. Cuts are at multiples
/// of the grains of time and size.
pub fn cut(n: usize, time: u64, height: u64, grain: (u64, u64), among: usize, seed: u64) -> Vec<Request> {
    let mut random = Random(seed * 2 + 1);
    let mut pieces = vec![(0, time / grain.0, height / grain.1)];
    for _ in 0..100 * n {
        if pieces.len() >= n {
            break;
        }
        pieces.sort_by_key(|(a, b, h)| (b - a) * h);
        let k = pieces.len() - 1 - (random.below(among as u64) as usize).min(pieces.len() - 1);
        let (a, b, h) = pieces.remove(k);
        let in_time = random.below(2) == 0;
        if b - a >= 2 && (in_time || h < 2) {
            let m = a + 1 + random.below(b - a - 1);
            pieces.extend([(a, m, h), (m, b, h)]);
        } else if h >= 2 {
            let m = 1 + random.below(h - 1);
            pieces.extend([(a, b, m), (a, b, h - m)]);
        } else {
            pieces.push((a, b, h));
        }
    }
    random.shuffle(&mut pieces);
    let request = |(a, b, h): (u64, u64, u64)| Request { first: a * grain.0, last: b * grain.0, size: h * grain.1 };
    pieces.into_iter().map(request).collect()
}

/// `n` pieces that fill `height` from time to time anew: some that lie side by side end, and others take their place. One in so many
/// is left out. Numbers of a grain of 1024.
pub fn woven(n: usize, height: u64, left_out: u64, seed: u64) -> Vec<Request> {
    let mut random = Random(seed * 2 + 1);
    let height = height / 1024;
    // Sizes that sum to one, from small to large.
    let parts = |random: &mut Random, sum: u64, count: u64| -> Vec<u64> {
        let mut cuts: Vec<u64> = (1..count.min(sum)).map(|_| 1 + random.below(sum - 1)).collect();
        cuts.extend([0, sum]);
        cuts.sort_unstable();
        cuts.dedup();
        cuts.windows(2).map(|w| w[1] - w[0]).collect()
    };
    let start = 18 + random.below(n as u64 / 8);
    // Since when each lives, its size.
    let mut live: Vec<(u64, u64)> = parts(&mut random, height, start).into_iter().map(|s| (0, s)).collect();
    let times = (n as u64 * 2 / 5).min(900);
    let mut events: Vec<u64> = (0..times).map(|_| 1 + random.below(1023)).collect();
    events.sort_unstable();
    let mut out = vec![];
    let close = |random: &mut Random, (first, size): (u64, u64), last: u64, list: &mut Vec<Request>| {
        if first < last && random.below(left_out) != 0 {
            list.push(Request { first: first * 1024, last: last * 1024, size: size * 1024 });
        }
    };
    for (k, at) in events.iter().enumerate() {
        // So many are still to be made until the end.
        let due = (n.saturating_sub(out.len() + live.len()) / (events.len() - k)).max(1) as u64;
        let count = if random.below(3) == 0 { 1 + random.below(2 * due + 3) } else { 1 };
        let from = random.below(live.len() as u64) as usize;
        let to = (from + [1, 1, 1, 2, 2, 3, 4, 6][random.below(8) as usize]).min(live.len());
        let run: Vec<(u64, u64)> = live[from..to].to_vec();
        let sum = run.iter().map(|x| x.1).sum();
        run.into_iter().for_each(|x| close(&mut random, x, *at, &mut out));
        let new: Vec<(u64, u64)> = parts(&mut random, sum, count).into_iter().map(|s| (*at, s)).collect();
        live.splice(from..to, new);
    }
    live.into_iter().for_each(|x| close(&mut random, x, 1024, &mut out));
    random.shuffle(&mut out);
    out
}

/// Lives of a length drawn by `length` (of 1,000,000), anywhere; sizes drawn by `size`.
pub fn lives(
    n: usize,
    seed: u64,
    length: &dyn Fn(&mut Random) -> f64,
    size: &dyn Fn(&mut Random) -> f64,
) -> Vec<Request> {
    let mut random = Random(seed * 2 + 1);
    (0..n)
        .map(|_| {
            let long = (length(&mut random) * 1e6).clamp(1.0, 1e6) as u64;
            let first = random.below(1_000_000 - long + 1);
            Request { first, last: first + long, size: (size(&mut random) as u64).max(1) }
        })
        .collect()
}

/// About `n` buffers of a training step: layers of one form, forward and backward. Some are needed at once only, some until the
/// backward half; gradients stay to the end. Few sizes.
pub fn layers(n: usize, seed: u64) -> Vec<Request> {
    let mut random = Random(seed * 2 + 1);
    let kernels = 8 + random.below(20);
    let widths: Vec<u64> = (0..6).map(|_| 512 * (1 + random.below(64))).collect();
    // For each kernel: sizes, after how many kernels it is dead or that it is kept, whether it makes a gradient.
    let form: Vec<(u64, Option<u64>, bool)> = (0..kernels)
        .map(|_| {
            let life = if random.below(3) > 0 { None } else { Some(1 + random.below(4)) };
            (widths[random.below(6) as usize], life, random.below(4) == 0)
        })
        .collect();
    let each = form.iter().map(|f| 2 + u64::from(f.2)).sum::<u64>();
    let count = (n as u64 / each).max(1);
    let end = 2 * count * kernels + 2;
    let mut out = vec![];
    for layer in 0..count {
        for (k, (size, life, gradient)) in form.iter().enumerate() {
            let at = layer * kernels + k as u64;
            let last = life.map_or(end - at, |l| at + l + 1);
            out.push(Request { first: at, last, size: *size });
            out.push(Request { first: end - at, last: end - at + 1 + life.unwrap_or(2), size: *size });
            if *gradient {
                out.push(Request { first: end - at, last: end + 4, size: 2 * size });
            }
        }
    }
    random.shuffle(&mut out);
    out
}

/// As [`lives`], with lengths and starts in steps of a coarser clock of `times`; a start is drawn by `start` (of 1).
pub fn clocked(n: usize, seed: u64, times: u64, (start, length, size): (Draw<'_>, Draw<'_>, Draw<'_>)) -> Vec<Request> {
    let mut random = Random(seed * 2 + 1);
    (0..n)
        .map(|_| {
            let first = ((start(&mut random) * times as f64) as u64).min(times - 1);
            let long = ((length(&mut random) * times as f64) as u64).clamp(1, times);
            Request { first, last: first + long, size: (size(&mut random) as u64).max(1) }
        })
        .collect()
}
