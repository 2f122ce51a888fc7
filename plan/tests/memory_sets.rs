//! The memory planner on the public hard sets, on hard sets made here, and on what training makes of a decoder.

mod sets;

use pleach_plan::memory::{Placement, Request, check, lower_bound, place, place_with, place_within};
use sets::{Draw, Random, read};

fn checked(list: &[Request], goal: Option<u64>) -> Placement {
    let p = place_with(list, 1, goal, 1);
    let total = check(list, &p.offsets).unwrap_or_else(|(a, b)| panic!("{:?} and {:?} share bytes", list[a], list[b]));
    assert_eq!((total, p.lower_bound), (p.total, lower_bound(list)));
    assert!(!p.optimal || p.total >= p.lower_bound);
    p
}

/// A rectangle of `height` bytes cut into `n` pieces: alive at every time are exactly `height` bytes.
fn cut(n: usize, time: u64, height: u64, seed: u64) -> Vec<Request> {
    sets::cut(n, time, height, (1, 1), 4, seed)
}

#[test]
fn hard_sets_meet_their_capacity() {
    for name in ["A", "B", "C", "D", "E", "F"] {
        let list = read(&format!("{name}.1048576.csv"));
        let p = checked(&list, Some(1_048_576));
        assert!(p.total <= 1_048_576, "{name}: {} bytes", p.total);
    }
}

#[test]
fn large_cut_rectangles_are_put_together_along_time() {
    for seed in 0..3 {
        for n in [400, 1000] {
            let list = cut(n, 100_000, 1 << 20, seed);
            let p = checked(&list, None);
            assert_eq!((p.total, p.optimal), (1 << 20, true), "{n} pieces, seed {seed}");
            // The same from the other end.
            let turned: Vec<Request> =
                list.iter().map(|r| Request { first: 100_000 - r.last, last: 100_000 - r.first, ..*r }).collect();
            let p = checked(&turned, None);
            assert_eq!((p.total, p.optimal), (1 << 20, true), "{n} pieces from the other end, seed {seed}");
        }
    }
}

#[test]
fn the_order_of_rows_changes_nothing() {
    let mut random = Random(155);
    for name in ["C", "E", "F"] {
        let mut list = read(&format!("{name}.1048576.csv"));
        let p = checked(&list, Some(1_048_576));
        random.shuffle(&mut list);
        let other = checked(&list, Some(1_048_576));
        assert_eq!((other.total, other.optimal), (p.total, p.optimal), "{name}");
    }
}

#[test]
fn cuts_at_few_times_are_put_together() {
    // Many end and begin at one time, and many sums of sizes are equal.
    for seed in 0..4 {
        let p = checked(&cut(300, 1024, 2048, seed), None);
        assert_eq!((p.total, p.optimal), (2048, true), "seed {seed}");
    }
}

#[test]
fn sets_without_a_capacity_reach_the_bound() {
    for name in ["resnet50.csv", "G_1.csv"] {
        let p = checked(&read(name), None);
        assert!(p.optimal && p.total == p.lower_bound, "{name}: {} over {}", p.total, p.lower_bound);
    }
}

#[test]
fn cut_rectangles_are_put_together_again() {
    for seed in 0..6 {
        for n in [20, 60, 120] {
            let list = cut(n, 400, 1 << 20, seed);
            let p = checked(&list, None);
            assert_eq!((p.total, p.optimal), (1 << 20, true), "{n} pieces, seed {seed}");
        }
    }
}

/// Forward, then backward: values are kept until their gradient is made.
fn training(layers: u64, tokens: u64) -> Vec<Request> {
    let (d, f) = (576, 1536);
    let steps = 10;
    let end = 2 * layers * steps + 2;
    let mut list = vec![];
    for l in 0..layers {
        for (k, (width, kept)) in
            [(d, true), (960, true), (d, false), (d, true), (d, true), (d, false), (2 * f, true), (f, false), (f, true)]
                .into_iter()
                .enumerate()
        {
            let at = l * steps + k as u64;
            let last = if kept { end - at } else { at + 2 };
            list.push(Request { first: at, last, size: tokens * width * 4 });
            list.push(Request { first: end - at, last: end - at + 2, size: tokens * width * 4 });
        }
        list.push(Request { first: end - l * steps, last: end + 4, size: 16 * (d + f) * 4 });
    }
    list
}

#[test]
fn training_graphs_are_planned_optimally() {
    for (layers, tokens) in [(4, 512), (30, 512), (30, 100), (48, 2048)] {
        let list = training(layers, tokens);
        let p = place(&list, 64);
        assert!(check(&list, &p.offsets).is_ok());
        assert!(p.optimal, "{layers} layers: {} over {}", p.total, p.lower_bound);
    }
}

/// Within three thousandths of the bound.
fn near_the_bound(list: &[Request], what: &str) {
    let p = checked(list, None);
    let over = p.total - p.lower_bound;
    assert!(over * 1000 <= p.lower_bound * 3, "{what}: {over} bytes over {}", p.lower_bound);
}

#[test]
fn twenty_thousand_lives_that_cross_at_random_lie_near_the_bound() {
    let mut random = Random(27);
    let list: Vec<Request> = (0..20_000)
        .map(|_| {
            let (a, b) = (random.below(1_000_000), random.below(1_000_000));
            Request { first: a.min(b), last: a.max(b) + 1, size: 1 + random.below(1_000_000) }
        })
        .collect();
    near_the_bound(&list, "anything");
}

#[test]
fn twenty_thousand_short_lives_lie_near_the_bound() {
    let any = |r: &mut Random| 1.0 + r.unit() * 1e6;
    let power = |r: &mut Random| f64::from(1u32 << r.below(16));
    for seed in 0..2 {
        let list =
            |length: Draw<'_>, size: Draw<'_>| sets::clocked(20_000, seed, 50_000, (&Random::unit, length, size));
        near_the_bound(&list(&|r| r.unit() * 1e-3, &power), "to a thousandth, powers of two");
        near_the_bound(&list(&|r| r.unit() * 1e-3, &any), "to a thousandth");
        near_the_bound(&list(&|_| 0.01, &any), "of one length");
        // Nested lives need no lifts.
        let list = sets::layers(20_000, seed);
        let p = checked(&list, None);
        assert!((p.total - p.lower_bound) * 10_000 <= p.lower_bound, "layers: {} over {}", p.total, p.lower_bound);
    }
}

#[test]
fn without_time_many_requests_are_placed_all_the_same() {
    let length = |r: &mut Random| -0.025 * (1.0 - r.unit()).ln();
    let list = sets::clocked(20_000, 200, 1_000_000, (&Random::unit, &length, &|r| 1.0 + r.unit() * 1e6));
    let p = place_within(&list, 1, None, std::time::Duration::ZERO);
    assert_eq!(check(&list, &p.offsets), Ok(p.total));
    assert!((p.total - p.lower_bound) * 20 <= p.lower_bound, "{} over {}", p.total, p.lower_bound);
    // With time it is better, and the same each time.
    let [a, b] = [checked(&list, None), checked(&list, None)];
    assert!(a.total <= p.total && a == b);
}

#[test]
fn twenty_thousand_powers_of_two_take_each_others_place() {
    // Filling alone is three hundredths above: what sticks out fits the gaps of others exactly.
    let length = |r: &mut Random| if r.below(10) == 0 { 0.1 + 0.2 * r.unit() } else { 0.002 * r.unit() };
    let power = |r: &mut Random| f64::from(1u32 << r.below(20));
    for seed in 90..93 {
        let list = sets::clocked(20_000, seed, 1_000_000, (&Random::unit, &length, &power));
        near_the_bound(&list, "short and long");
    }
    // A thousand alive under a broad peak, in rows of one size.
    let length = |r: &mut Random| -0.05 * (1.0 - r.unit()).ln();
    let power = |r: &mut Random| f64::from(1u32 << (8 + r.below(13)));
    let list = sets::clocked(20_000, 1, 100_000, (&Random::unit, &length, &power));
    near_the_bound(&list, "exponential");
}

#[test]
fn half_a_thousand_lives_lie_near_the_bound() {
    for seed in 0..4 {
        let any = |r: &mut Random| 1.0 + r.unit() * 1e6;
        near_the_bound(&sets::lives(500, seed, &|r| r.unit() * 0.1, &any), "to a tenth");
    }
}
