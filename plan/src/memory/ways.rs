//! Ways in which a request that begins takes the place of gaps, for [`super::sweep`], and what should stand side by side for that.

/// Ways that one request may take its place, of each sort.
const WAYS: usize = 8;

/// Gaps made at this time, and before.
#[derive(Clone)]
pub(super) struct Gaps {
    pub(super) fresh: Vec<u32>,
    pub(super) old: Vec<u32>,
}

impl Gaps {
    /// Those that are not in a list.
    pub(super) fn without(&self, list: &[u32]) -> Gaps {
        let rest = |all: &[u32]| all.iter().copied().filter(|g| !list.contains(g)).collect();
        Gaps { fresh: rest(&self.fresh), old: rest(&self.old) }
    }
}

/// Gaps that give their place to requests.
#[derive(PartialEq, Eq, Clone)]
pub(super) struct Way {
    pub(super) gaps: Vec<u32>,
    pub(super) takes: Vec<u32>,
}

/// Ways for the largest request that begins, the likely ones first, and how much was looked at. `size` has requests and gaps.
pub(super) fn ways(begins: &[u32], s: &Gaps, size: &[u64]) -> (Vec<Way>, u64) {
    let mut out: Vec<Way> = vec![];
    let mut looks = 20;
    let size = |i: u32| size[i as usize];
    let Some((&first, others)) = begins.split_first() else { return (out, looks) };
    let want = size(first);
    let mut add = |gaps: &[u32], takes: &[u32]| {
        let way = Way { gaps: gaps.to_vec(), takes: takes.to_vec() };
        if !out.contains(&way) {
            out.push(way);
        }
    };
    let total = |list: &[u32]| list.iter().map(|i| size(*i)).sum::<u64>();
    // Exactly, with what has just ended.
    let mut groups: Vec<Vec<u32>> = vec![];
    for few in 1..=4.min(s.fresh.len()) {
        subsets(&s.fresh, few, 60, &mut |x| groups.push(x.to_vec()));
    }
    for gaps in groups.iter().filter(|g| total(g) == want) {
        add(gaps, &[first]);
    }
    for gaps in groups.iter().filter(|g| g.len() <= 2 && total(g) > want) {
        let rest = total(gaps) - want;
        for few in 1..=3.min(others.len()) {
            subsets(others, few, 60, &mut |x| {
                looks += 2;
                if total(x) == rest {
                    add(gaps, &[&[first], x].concat());
                }
            });
        }
    }
    let (fresh, beginning) = (total(&s.fresh), total(begins));
    if fresh == beginning && !s.fresh.is_empty() {
        add(&s.fresh, begins);
    }
    // Exactly, with older gaps.
    if fresh < beginning {
        for few in 1..=2 {
            subsets(&s.old, few, 400, &mut |x| {
                looks += 2 + s.fresh.len() as u64;
                if fresh + total(x) == beginning {
                    add(&[&s.fresh, x].concat(), begins);
                }
                if total(x) == want {
                    add(x, &[first]);
                }
                for g in &s.fresh {
                    if size(*g) + total(x) == want {
                        add(&[&[*g], x].concat(), &[first]);
                    }
                }
            });
        }
        for o in &s.old {
            if fresh + size(*o) > beginning {
                add(&[&s.fresh[..], &[*o]].concat(), begins);
            }
        }
    }
    // With something left over, as little as possible, fresh gaps first.
    for gaps in groups.iter().filter(|g| g.len() == 1 && total(g) > beginning) {
        add(gaps, begins);
    }
    if fresh > beginning {
        add(&s.fresh, begins);
    }
    // One or two gaps, one added to each number, and nothing for a second.
    let mut loose: Vec<(bool, u64, [u32; 2])> = vec![];
    let pair = |x: &[u32]| [x[0] + 1, x.get(1).map_or(0, |g| g + 1)];
    for gaps in groups.iter().filter(|g| g.len() <= 2 && total(g) > want) {
        loose.push((false, total(gaps), pair(gaps)));
    }
    for few in 1..=2 {
        subsets(&s.old, few, 200, &mut |x| {
            looks += 4;
            if total(x) >= want {
                loose.push((true, total(x), pair(x)));
            }
        });
    }
    for g in &s.fresh {
        for o in s.old.iter().filter(|o| size(**o) + size(*g) >= want) {
            loose.push((true, size(*o) + size(*g), pair(&[*g, *o])));
        }
    }
    if loose.len() > WAYS {
        loose.select_nth_unstable(WAYS);
        loose[..WAYS].sort_unstable();
    } else {
        loose.sort_unstable();
    }
    for (_, _, gaps) in loose.iter().take(WAYS) {
        let gaps = gaps.map(|g| g.wrapping_sub(1));
        add(&gaps[..1 + usize::from(gaps[1] != u32::MAX)], &[first]);
    }
    looks += 4 * groups.len() as u64 + 4 * loose.len() as u64;
    out.truncate(2 * WAYS);
    let mut many = vec![];
    looks += many_gaps(s, want, &size, &mut many);
    for gaps in many {
        let way = Way { gaps, takes: vec![first] };
        if !out.contains(&way) {
            out.push(way);
        }
    }
    (out, looks)
}

/// Three gaps, or all but a few, with as little left over as possible.
fn many_gaps(s: &Gaps, want: u64, size: &dyn Fn(u32) -> u64, out: &mut Vec<Vec<u32>>) -> u64 {
    let all: Vec<u32> = [&s.fresh[..], &s.old[..]].concat();
    let total = |list: &[u32]| list.iter().map(|i| size(*i)).sum::<u64>();
    let Some(spare) = total(&all).checked_sub(want) else { return 2 };
    // What is left over, and the gaps that are taken, or all but these.
    let mut some: Vec<(u64, bool, usize, [u32; 3])> = vec![];
    let mut looks = 0;
    let three = |x: &[u32]| [0, 1, 2].map(|k| x.get(k).copied().unwrap_or_default());
    for few in 0..=3.min(all.len().saturating_sub(3)) {
        subsets(&all, few, 300, &mut |x| {
            looks += 2;
            if let Some(left) = spare.checked_sub(total(x)) {
                some.push((left, true, few, three(x)));
            }
        });
    }
    subsets(&all, 3, 600, &mut |x| {
        looks += 2;
        if let Some(left) = total(x).checked_sub(want) {
            some.push((left, false, 3, three(x)));
        }
    });
    looks += 4 * some.len() as u64;
    // None is there more than twice.
    let most = match some.len() {
        n if n > 2 * WAYS => some.select_nth_unstable_by_key(2 * WAYS, |x| x.0).1.0,
        _ => u64::MAX,
    };
    let gaps = |x: &(u64, bool, usize, [u32; 3])| {
        let listed = &x.3[..x.2];
        let taken = |g: &u32| listed.contains(g) != x.1;
        (x.0, if x.1 { all.iter().copied().filter(taken).collect() } else { listed.to_vec() })
    };
    let mut found: Vec<(u64, Vec<u32>)> = some.iter().filter(|x| x.0 <= most).map(gaps).collect();
    found.sort_by(|a, b| (a.0, a.1.len(), &a.1).cmp(&(b.0, b.1.len(), &b.1)));
    found.dedup();
    out.extend(found.into_iter().take(WAYS).map(|x| x.1));
    looks
}

/// Ends, and beginnings, up to which groups are looked for.
const TOGETHER: usize = 8;
/// Weight of a wish that no beginnings fit exactly.
const ROUGH: f64 = 0.3;

/// What ends at a time and should stand side by side until then, with a weight: the smallest groups that beginnings take the place of
/// exactly, or all of it.
pub(super) fn wishes(ends: &[u32], begins: &[u32], size: &dyn Fn(u32) -> u64) -> Vec<(Vec<u32>, f64)> {
    let (mut ends, mut begins) = (ends.to_vec(), begins.to_vec());
    let mut out = vec![];
    while ends.len() >= 2 && !begins.is_empty() {
        let total = |list: &[u32]| list.iter().map(|i| size(*i)).sum::<u64>();
        if ends.len() > TOGETHER || begins.len() > TOGETHER {
            let weight = if total(&ends) == total(&begins) { 1.0 } else { ROUGH };
            out.push((ends, weight));
            return out;
        }
        let sums = |list: &[u32]| -> Vec<(u64, u32)> {
            let sum = |m: u32| (0..list.len()).filter(|k| m >> k & 1 == 1).map(|k| size(list[k])).sum();
            let mut all: Vec<(u64, u32)> = (1..1u32 << list.len()).map(|m| (sum(m), m)).collect();
            all.sort_by_key(|x| (x.0, x.1.count_ones(), x.1));
            all.dedup_by_key(|x| x.0);
            all
        };
        let with = sums(&begins);
        let pairs = sums(&ends).into_iter().filter_map(|(sum, a)| {
            let at = with.binary_search_by_key(&sum, |x| x.0).ok()?;
            Some((a.count_ones() + with[at].1.count_ones(), a, with[at].1))
        });
        let Some((_, a, b)) = pairs.min() else {
            out.push((ends, ROUGH));
            return out;
        };
        let part = |list: &[u32], m: u32, of: u32| -> Vec<u32> {
            (0..list.len()).filter(|k| m >> k & 1 == of).map(|k| list[k]).collect()
        };
        if a.count_ones() >= 2 {
            out.push((part(&ends, a, 1), 1.0));
        }
        (ends, begins) = (part(&ends, a, 0), part(&begins, b, 0));
    }
    out
}

/// Calls with subsets of `few` items, so many at most.
fn subsets(list: &[u32], few: usize, most: usize, call: &mut dyn FnMut(&[u32])) {
    fn go(list: &[u32], few: usize, part: &mut Vec<u32>, left: &mut usize, call: &mut dyn FnMut(&[u32])) {
        if few == 0 {
            *left = left.saturating_sub(1);
            call(part);
            return;
        }
        for k in 0..list.len() {
            if *left == 0 {
                return;
            }
            part.push(list[k]);
            go(&list[k + 1..], few - 1, part, left, call);
            part.pop();
        }
    }
    go(list, few, &mut vec![], &mut { most }, call);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_replaced_exactly_should_stand_side_by_side() {
        let sizes = [3, 4, 5, 7, 5, 9, 2];
        let size = |i: u32| sizes[i as usize];
        // 3 and 4 make room for 7; 5 for 5 needs no wish.
        assert_eq!(wishes(&[0, 1, 2], &[3, 4], &size), [(vec![0, 1], 1.0)]);
        // Nothing fits 9.
        assert_eq!(wishes(&[0, 1], &[5], &size), [(vec![0, 1], ROUGH)]);
        assert_eq!(wishes(&[0, 1], &[], &size), []);
        assert_eq!(wishes(&[0], &[0], &size), []);
    }

    #[test]
    fn one_request_can_take_the_place_of_all_gaps() {
        let sizes = [20, 6, 5, 4, 3, 2];
        let (ways, _) = ways(&[0], &Gaps { fresh: vec![1], old: vec![2, 3, 4, 5] }, &sizes);
        assert!(ways.iter().any(|w| w.gaps.len() == 5 && w.takes == [0]));
        assert!(ways.iter().all(|w| w.gaps.iter().map(|g| sizes[*g as usize]).sum::<u64>() >= 20));
    }
}
