//! The memory planner on other files of the kind that it is held to: public sets in another order, turned round and thinned out,
//! rectangles cut without a gap, and many lives of several lengths. Seeds are fixed, so two runs differ in time only.
//!
//! `cargo run --release -p pleach-plan --example memory_bench [FILTER [each] [unlimited]]` prints for each family how many meet their
//! target, the worst and the mean distance from it, and the longest and the mean time; each case too, and without a time limit.
#![allow(clippy::print_stdout, reason = "reports how far each family is from its target")]

#[path = "../tests/sets/mod.rs"]
mod sets;

use pleach_plan::memory::{Request, check, lower_bound, place_with, place_within};
use sets::{Draw, Random, clocked, cut, layers, lives, read, woven};
use std::time::{Duration, Instant};

struct Case {
    family: String,
    name: String,
    list: Vec<Request>,
    goal: Option<u64>,
    /// May be missed by so much of it.
    within: f64,
    ms: f64,
}

fn cases() -> Vec<Case> {
    let mut out = vec![];
    let mut add = |family: &str, name: String, list: Vec<Request>, goal: Option<u64>| {
        let many = list.len() >= 20_000;
        let (within, ms) = if many { (0.003, 250.0) } else { (0.0, 1000.0) };
        out.push(Case { family: family.into(), name, list, goal, within, ms });
    };
    const CAPACITY: u64 = 1 << 20;
    for name in ["A", "B", "C", "D", "E", "F"] {
        let list = read(&format!("{name}.1048576.csv"));
        add("public", name.into(), list.clone(), Some(CAPACITY));
        add("public, no capacity", name.into(), list.clone(), None);
        let end = list.iter().map(|r| r.last).max().unwrap_or(0);
        for seed in 1..=4 {
            let mut random = Random(seed * 77 + 1);
            let mut other = list.clone();
            random.shuffle(&mut other);
            add("public, shuffled", format!("{name} {seed}"), other.clone(), Some(CAPACITY));
            add("public, shuffled, no capacity", format!("{name} {seed}"), other.clone(), None);
            if seed <= 2 {
                for r in &mut other {
                    (r.first, r.last) = (end - r.last, end - r.first);
                }
                add("public, turned", format!("{name} {seed}"), other.clone(), Some(CAPACITY));
            }
            // Without a few: some slack.
            other.truncate(list.len() - list.len() / 20);
            add("public, thinned", format!("{name} {seed}"), other, None);
        }
    }
    for name in ["resnet50", "G_1"] {
        let list = read(&format!("{name}.csv"));
        add("public, large", name.into(), list.clone(), None);
        for seed in 1..=2 {
            let mut other = list.clone();
            Random(seed * 77 + 1).shuffle(&mut other);
            add("public, large", format!("{name} {seed}"), other, None);
        }
    }
    for n in [150, 220, 300, 500, 1000] {
        for seed in 0..5 {
            for (kind, grain, among) in [
                ("fine", (1, 1), 4),
                ("grained", (1024, 512), 4),
                ("mixed", (1024, 512), 40),
                ("even", (4096, 4096), 12),
            ] {
                let list = cut(n, 1 << 20, CAPACITY, grain, among, seed);
                add(&format!("cut, {kind}, {n}"), format!("{seed}"), list, Some(CAPACITY));
            }
        }
    }
    for (n, left_out) in [(160, 50), (210, 9), (220, 30), (300, 9), (300, 40), (400, 12), (450, 100), (450, 20)] {
        for seed in 0..8 {
            add(
                &format!("woven, {n}, without 1/{left_out}"),
                format!("{seed}"),
                woven(n, CAPACITY, left_out, seed),
                Some(CAPACITY),
            );
        }
    }
    // Nothing is tuned on these.
    for seed in 50..55 {
        for (n, kind, grain, among) in [
            (180, "fine", (1, 1), 4),
            (450, "fine", (1, 1), 9),
            (350, "grained", (2048, 1024), 4),
            (800, "grained", (1024, 512), 4),
            (400, "mixed", (512, 512), 25),
            (250, "even", (4096, 4096), 12),
        ] {
            let list = cut(n, 1 << 20, CAPACITY, grain, among, seed);
            add(&format!("held out, cut, {kind}, {n}"), format!("{seed}"), list, None);
        }
        for (n, left_out) in [(170, 30), (200, 20), (260, 60), (350, 25)] {
            let list = woven(n, CAPACITY, left_out, seed);
            add(&format!("held out, woven, {n}, without 1/{left_out}"), format!("{seed}"), list, Some(CAPACITY));
        }
    }
    many(&mut add);
    held_out(&mut add);
    out
}

/// Kinds of which the planner was not tuned on any.
fn held_out(add: Add<'_>) {
    const N: usize = 20_000;
    let anywhere: Draw<'_> = &Random::unit;
    let normal = |r: &mut Random| (0..12).map(|_| r.unit()).sum::<f64>() - 6.0;
    let any = |r: &mut Random| 1.0 + r.unit() * 1e6;
    for seed in 200..203 {
        let mut other = |name: &str, times: u64, draws: (Draw<'_>, Draw<'_>, Draw<'_>)| {
            add(&format!("untuned, 20,000, {name}"), format!("{seed}"), clocked(N, seed, times, draws), None);
        };
        other(
            "log lives, log sizes",
            300_000,
            (anywhere, &|r| (-5.5 + normal(r)).exp(), &|r| (r.unit() * 12.0).exp2() * 256.0),
        );
        other(
            "exponential 1/100, of 64",
            80_000,
            (anywhere, &exponential(0.01), &|r| 64.0 * (1.0 + r.below(512) as f64)),
        );
        other("exponential 1/40, any size", 1_000_000, (anywhere, &exponential(0.025), &any));
        other(
            "to a thirtieth, powers of two",
            200_000,
            (anywhere, &|r| r.unit() / 30.0, &|r| f64::from(256u32 << r.below(10))),
        );
        other(
            "to a hundredth, 12 classes",
            5_000,
            (anywhere, &|r| r.unit() * 0.01, &|r| f64::from(3u32 << r.below(12)) * 512.0),
        );
        other(
            "squares of lives, of 4096",
            1_000_000,
            (anywhere, &|r| 0.05 * r.unit().powi(2), &|r| 4096.0 * (1.0 + (8.0 * r.unit().powi(3) * 32.0).floor())),
        );
        // Calls within calls: a life lies within that of its caller.
        let mut random = Random(seed);
        let mut list = vec![];
        let mut calls = vec![(0u64, 1u64 << 40)];
        while list.len() < N {
            let k = random.below(calls.len() as u64) as usize;
            let (first, last) = calls[k];
            let (a, b) = (first + random.below(last - first), first + random.below(last - first));
            let (first, last) = (a.min(b), a.max(b) + 1);
            list.push(Request { first, last, size: 64 * (1 + random.below(2000)) });
            calls.push((first, last));
        }
        add("untuned, 20,000, calls", format!("{seed}"), list, None);
        // Layers whose lives and sizes vary.
        let mut list = layers(N + 300, seed);
        for r in &mut list {
            r.last += random.below(6);
            r.size += 64 * random.below(1 + r.size / 640);
        }
        add("untuned, 20,000, layers that vary", format!("{seed}"), list, None);
    }
}

/// The length of a life drawn from an exponential distribution.
fn exponential(mean: f64) -> impl Fn(&mut Random) -> f64 {
    move |r| -mean * (1.0 - r.unit()).ln()
}

type Add<'a> = &'a mut dyn FnMut(&str, String, Vec<Request>, Option<u64>);

/// About as many as there are in the plan of a large model: of random lives, and of layers.
fn many(add: Add<'_>) {
    const N: usize = 20_000;
    let small = |r: &mut Random| 1.0 + r.unit() * 1e6;
    let log = |r: &mut Random| (r.unit() * 16.0).exp2() * 64.0;
    for seed in 0..2 {
        let mut both = |name: &str, length: Draw<'_>| {
            add(&format!("20,000, {name}"), format!("{seed}"), lives(N, seed, length, &small), None);
            add(&format!("20,000, {name}, log sizes"), format!("{seed}"), lives(N, seed, length, &log), None);
        };
        both("to a tenth", &|r| r.unit() * 0.1);
        both("to a thousandth", &|r| r.unit() * 1e-3);
        both("to a half", &|r| r.unit() * 0.5);
        both("anything", &|r| r.unit());
        both("log", &|r| (-r.unit() * 16.0).exp2());
        both("exponential", &exponential(0.01));
        both("few long", &|r| if r.below(20) == 0 { r.unit() } else { r.unit() * 1e-3 });
        both("equal", &|_| 0.01);
    }
    let sizes: [(&str, Draw<'_>); 5] = [
        ("heavy-tailed", &|r| 4096.0 * (1.0 - r.unit()).powf(-0.8).min(1e4)),
        ("of 512", &|r| 512.0 * (1.0 + (r.unit() * 256.0).floor())),
        ("powers of two", &|r| f64::from(1u32 << (8 + r.below(13)))),
        ("of 8 classes", &|r| [64., 1024., 2304., 9216., 12288., 36864., 49152., 196608.][r.below(8) as usize]),
        ("equal", &|_| 4096.0),
    ];
    let lengths: [(&str, Draw<'_>); 4] = [
        ("exponential 1/1000", &exponential(0.001)),
        ("exponential 1/20", &exponential(0.05)),
        ("heavy-tailed", &|r| 2e-4 * (1.0 - r.unit()).powf(-0.9)),
        ("to a fiftieth", &|r| r.unit() * 0.02),
    ];
    for (s, size) in sizes {
        for (l, length) in lengths {
            for seed in 0..2 {
                let list = clocked(N, seed, 100_000, (&Random::unit, length, size));
                add(&format!("20,000, {l}, sizes {s}"), format!("{seed}"), list, None);
            }
        }
    }
    for seed in 0..6 {
        add("20,000, layers", format!("{seed}"), layers(N + 400, seed), None);
    }
    // Nothing is tuned on these.
    for seed in 90..93 {
        let mut other = |name: &str, n: usize, times: u64, draws: (Draw<'_>, Draw<'_>, Draw<'_>)| {
            add(&format!("held out, 20,000, {name}"), format!("{seed}"), clocked(n, seed, times, draws), None);
        };
        let anywhere: Draw<'_> = &Random::unit;
        let normal = |r: &mut Random| (0..12).map(|_| r.unit()).sum::<f64>() - 6.0;
        other("normal lives", N, 1_000_000, (anywhere, &|r| (0.01 + 0.003 * normal(r)).max(1e-5), &small));
        other("lognormal sizes", N, 50_000, (anywhere, &exponential(0.004), &|r| (12.0 + 1.5 * normal(r)).exp()));
        other("to 100 of 20,000 times", N, 20_000, (anywhere, &|r| r.unit() * 0.005, &|r| r.unit() * 65536.0));
        other(
            "to 300 of 10,000 times, of 64",
            24_000,
            10_000,
            (anywhere, &|r| r.unit() * 0.03, &|r| 64.0 * (1.0 + r.below(4096) as f64)),
        );
        let bursts = |r: &mut Random| (r.below(12) as f64 + r.unit() * r.unit()) / 12.0;
        other("in bursts", N, 1_000_000, (&bursts, &exponential(0.008), &log));
        other(
            "in the middle",
            N,
            1_000_000,
            (&|r| (0.5 + 0.12 * normal(r)).clamp(0.0, 1.0), &exponential(0.003), &small),
        );
        let two = |r: &mut Random| if r.below(10) == 0 { 0.1 + 0.2 * r.unit() } else { 0.002 * r.unit() };
        other("short and long, powers of two", N, 1_000_000, (anywhere, &two, &|r| f64::from(1u32 << r.below(20))));
        other(
            "to 50 of 1000 times",
            N,
            1000,
            (anywhere, &|r| r.unit() * 0.05, &|r| 256.0 * (1.0 + r.below(999) as f64)),
        );
        add("held out, 20,000, layers", format!("{seed}"), layers(N + 600, seed), None);
    }
}

/// What is said of the cases of a family.
#[derive(Default)]
struct Family {
    name: String,
    count: usize,
    met: usize,
    in_time: usize,
    worst: f64,
    over: f64,
    longest: f64,
    ms: f64,
}

fn main() {
    let filter = std::env::args().nth(1).unwrap_or_default();
    let more: Vec<String> = std::env::args().skip(2).collect();
    let (verbose, unlimited) = (more.iter().any(|a| a == "each"), more.iter().any(|a| a == "unlimited"));
    let mut families: Vec<Family> = vec![];
    for c in cases().into_iter().filter(|c| c.family.contains(&filter)) {
        let start = Instant::now();
        // As the command does it, or whatever time it takes.
        let p = if unlimited {
            place_with(&c.list, 1, c.goal, 1)
        } else {
            place_within(&c.list, 1, c.goal, Duration::from_millis(160))
        };
        let ms = start.elapsed().as_secs_f64() * 1e3;
        let total = check(&c.list, &p.offsets).unwrap_or_else(|x| panic!("{} {}: {x:?} collide", c.family, c.name));
        assert_eq!(total, p.total);
        let target = c.goal.unwrap_or(0).max(lower_bound(&c.list)) as f64;
        let over = (total as f64 / target - 1.0).max(0.0);
        if verbose {
            println!("{:40} {:8} {:6} {:9.4} % {ms:8.1} ms", c.family, c.name, c.list.len(), over * 100.0);
        }
        let at = families.iter().position(|f| f.name == c.family).unwrap_or_else(|| {
            families.push(Family { name: c.family.clone(), ..Family::default() });
            families.len() - 1
        });
        let f = &mut families[at];
        f.count += 1;
        f.met += usize::from(over <= c.within);
        f.in_time += usize::from(ms <= c.ms);
        (f.worst, f.over, f.longest, f.ms) = (f.worst.max(over), f.over + over, f.longest.max(ms), f.ms + ms);
    }
    println!("{:40} met   in time    worst     mean  longest ms   mean", "family");
    for f in families {
        let (n, mean) = (f.count, |x: f64| x / f.count as f64);
        println!(
            "{:40} {:2}/{n:2}   {:2}/{n:2} {:8.3} % {:7.3} % {:9.1} {:8.1}",
            f.name,
            f.met,
            f.in_time,
            f.worst * 100.0,
            mean(f.over) * 100.0,
            f.longest,
            mean(f.ms)
        );
    }
}
