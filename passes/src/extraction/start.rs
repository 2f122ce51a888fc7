//! Starting choices, a lower bound and the strongly connected parts.

use super::Problem;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Visits of one greedy start at most.
const WORK: u64 = 60_000_000;

/// What each node costs more than it does, so that of choices that cost the same the smaller one is taken.
fn floor(p: &Problem) -> f64 {
    let (sum, count) = p.cost.iter().filter(|c| **c > 0.0).fold((0.0, 0.0), |a, c| (a.0 + c, a.1 + 1.0));
    if count > 0.0 { sum / count * 1e-7 } else { 1.0 }
}

/// A cost that orders as the number does (it is never negative).
fn key(x: f64) -> u64 {
    x.to_bits()
}

/// The choice that is cheapest when every use pays for all of a class, and those costs. Classes are settled in the
/// order of their costs, each node after what it needs, so the choice has no cycle.
pub(super) fn tree(p: &Problem) -> (Vec<u32>, Vec<f64>) {
    let more = floor(p);
    let mut total = vec![f64::INFINITY; p.nodes.len()];
    let mut choice = vec![u32::MAX; p.nodes.len()];
    let mut missing: Vec<usize> = (0..p.class.len()).map(|n| p.needs(n as u32).len()).collect();
    let mut heap = BinaryHeap::new();
    for n in 0..p.class.len() as u32 {
        if missing[n as usize] == 0 {
            heap.push(Reverse((key(p.cost[n as usize] + more), n)));
        }
    }
    while let Some(Reverse((t, n))) = heap.pop() {
        let c = p.class[n as usize] as usize;
        if choice[c] != u32::MAX {
            continue;
        }
        choice[c] = n;
        total[c] = f64::from_bits(t);
        for &u in &p.users[c] {
            missing[u as usize] -= 1;
            if missing[u as usize] == 0 {
                let t = more + p.cost[u as usize] + p.needs(u).iter().map(|d| total[*d as usize]).sum::<f64>();
                heap.push(Reverse((key(t.min(1e200)), u)));
            }
        }
    }
    (choice, total)
}

/// The same with costs that count each class once: a node's is that of all it reaches by what was settled before.
/// `None` when that takes too long.
pub(super) fn greedy(p: &Problem) -> Option<Vec<u32>> {
    let more = floor(p);
    let mut choice = vec![u32::MAX; p.nodes.len()];
    let mut missing: Vec<usize> = (0..p.class.len()).map(|n| p.needs(n as u32).len()).collect();
    let mut heap = BinaryHeap::new();
    let mut seen = vec![0u32; p.nodes.len()];
    let (mut stamp, mut work) = (0u32, 0u64);
    let mut stack: Vec<u32> = vec![];
    for n in 0..p.class.len() as u32 {
        if missing[n as usize] == 0 {
            heap.push(Reverse((key(p.cost[n as usize] + more), n)));
        }
    }
    while let Some(Reverse((_, n))) = heap.pop() {
        let c = p.class[n as usize] as usize;
        if choice[c] != u32::MAX {
            continue;
        }
        choice[c] = n;
        for &u in &p.users[c] {
            missing[u as usize] -= 1;
            if missing[u as usize] > 0 || choice[p.class[u as usize] as usize] != u32::MAX {
                continue;
            }
            stamp += 1;
            let mut sum = more + p.cost[u as usize];
            stack.extend(p.needs(u));
            while let Some(d) = stack.pop() {
                if std::mem::replace(&mut seen[d as usize], stamp) != stamp {
                    work += 1;
                    sum += more + p.cost[choice[d as usize] as usize];
                    stack.extend(p.needs(choice[d as usize]));
                }
            }
            heap.push(Reverse((key(sum), u)));
        }
        if work > WORK {
            return None;
        }
    }
    Some(choice)
}

/// No choice costs less: classes that every choice reaches, each at its cheapest node.
pub(super) fn bound(p: &Problem) -> f64 {
    let mut sure = vec![false; p.nodes.len()];
    let mut stack = p.roots.clone();
    let mut sum = 0.0;
    while let Some(c) = stack.pop() {
        if std::mem::replace(&mut sure[c as usize], true) {
            continue;
        }
        let list = &p.nodes[c as usize];
        sum += list.iter().map(|n| p.cost[*n as usize]).fold(f64::INFINITY, f64::min);
        if let Some((first, rest)) = list.split_first() {
            stack.extend(p.needs(*first).iter().filter(|d| rest.iter().all(|n| p.needs(*n).contains(d))));
        }
    }
    sum
}

/// The strongly connected part of each class (Tarjan's algorithm, without recursion).
pub(super) fn parts(p: &Problem) -> Vec<u32> {
    let n = p.nodes.len();
    let below: Vec<Vec<u32>> = (0..n)
        .map(|c| {
            let mut v: Vec<u32> = p.nodes[c].iter().flat_map(|i| p.needs(*i).iter().copied()).collect();
            v.sort_unstable();
            v.dedup();
            v
        })
        .collect();
    let (mut index, mut low) = (vec![u32::MAX; n], vec![0u32; n]);
    let (mut part, mut open, mut next, mut parts) = (vec![u32::MAX; n], vec![], 0, 0);
    for root in 0..n {
        if index[root] != u32::MAX {
            continue;
        }
        let mut stack = vec![(root, 0)];
        while let Some((c, k)) = stack.pop() {
            if k == 0 {
                (index[c], low[c]) = (next, next);
                next += 1;
                open.push(c);
            } else {
                let d = below[c][k - 1] as usize;
                if part[d] == u32::MAX {
                    low[c] = low[c].min(low[d]);
                }
            }
            if let Some(&d) = below[c].get(k) {
                stack.push((c, k + 1));
                if index[d as usize] == u32::MAX {
                    stack.push((d as usize, 0));
                }
            } else if low[c] == index[c] {
                while let Some(d) = open.pop() {
                    part[d] = parts;
                    if d == c {
                        break;
                    }
                }
                parts += 1;
            }
        }
    }
    part
}
