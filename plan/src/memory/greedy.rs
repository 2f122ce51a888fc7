//! First fit in several orders, and a local search over orders.

use super::Request;

/// Work of the local search: visits of a placed neighbour.
const BUDGET: u64 = 20_000_000;
/// Work of the greedy orders beyond the first ones.
const DRAWS: u64 = 6_000_000;

/// A logarithm to base 2, straight between powers of two: the same on every machine.
pub(super) fn lg(x: u64) -> f64 {
    let e = x.max(1).ilog2();
    f64::from(e) + (x.max(1) as f64 / (1u64 << e) as f64 - 1.0)
}

/// A fixed sequence of numbers.
pub(super) struct Draw(u64);

impl Draw {
    pub(super) fn new() -> Draw {
        Draw::number(0)
    }

    /// One of several.
    pub(super) fn number(n: u64) -> Draw {
        Draw(0x2545_F491_4F6C_DD1D ^ n << 32)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 11
    }

    /// A number below `n`.
    pub(super) fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    /// A number from 0 to 1.
    pub(super) fn unit(&mut self) -> f64 {
        self.next() as f64 / (1u64 << 53) as f64
    }
}

/// Pairs of requests alive at one time, up to which lists of them are kept.
const PAIRS: u64 = 8_000_000;

/// Whether too many requests are alive at one time for what looks at each pair.
pub(super) fn crowded(requests: &[Request]) -> bool {
    let mut events: Vec<(u64, bool)> = vec![];
    for r in requests.iter().filter(|r| r.first < r.last && r.size > 0) {
        events.extend([(r.first, true), (r.last, false)]);
    }
    events.sort_unstable();
    let (mut live, mut pairs) = (0u64, 0u64);
    for (_, begins) in events {
        if begins {
            pairs += live;
            live += 1;
        } else {
            live -= 1;
        }
    }
    pairs > PAIRS
}

pub(super) struct Search<'a> {
    requests: &'a [Request],
    /// Indices of the requests alive at some time of each request.
    near: Vec<Vec<u32>>,
    pub(super) offsets: Vec<u64>,
    placed: Vec<bool>,
    spent: u64,
}

impl<'a> Search<'a> {
    pub(super) fn new(requests: &'a [Request]) -> Search<'a> {
        let mut order: Vec<u32> = (0..requests.len() as u32).collect();
        order.retain(|i| {
            let r = &requests[*i as usize];
            r.first < r.last && r.size > 0
        });
        super::sort::by_key(&mut order, &|i| (u128::from(requests[i as usize].first), 0));
        let mut near = vec![vec![]; requests.len()];
        let mut live: Vec<u32> = vec![];
        for i in order {
            live.retain(|j| requests[*j as usize].last > requests[i as usize].first);
            for &j in &live {
                near[i as usize].push(j);
                near[j as usize].push(i);
            }
            live.push(i);
        }
        Search { requests, near, offsets: vec![0; requests.len()], placed: vec![false; requests.len()], spent: 0 }
    }

    /// The best of several greedy orders, and its total; stops at `bound`.
    pub(super) fn greedy(&mut self, bound: u64) -> (u64, Vec<u32>) {
        let mut best = (u64::MAX, vec![]);
        for order in self.orders() {
            let total = self.fit(&order, best.0);
            if total < best.0 || best.1.is_empty() {
                best = (total, order);
            }
            if best.0 <= bound {
                return best;
            }
        }
        let live: Vec<u32> = best.1.clone();
        let crowd = self.crowds();
        let mut draw = Draw::new();
        let limit = self.spent + DRAWS;
        while self.spent < limit && best.0 > bound && !live.is_empty() {
            let alpha = [0.0, 1.0, 100.0][draw.below(3)];
            let (beta, gamma) = (2.0 * draw.unit(), 1.5 * draw.unit());
            let noise = [0.0, 0.1, 0.5][draw.below(3)];
            let mut keys: Vec<(f64, u32)> = live
                .iter()
                .map(|i| {
                    let r = self.requests[*i as usize];
                    let score = alpha * lg(crowd[*i as usize]) + beta * lg(r.last - r.first) + gamma * lg(r.size);
                    (score + noise * draw.unit(), *i)
                })
                .collect();
            super::sort::falling(&mut keys);
            let order: Vec<u32> = keys.into_iter().map(|k| k.1).collect();
            let total = self.fit(&order, best.0);
            if total < best.0 {
                best = (total, order);
            }
        }
        best
    }

    /// For each request, the largest sum of sizes alive at one of its times.
    fn crowds(&self) -> Vec<u64> {
        let live = |r: &&Request| r.first < r.last && r.size > 0;
        let mut times: Vec<u64> = self.requests.iter().filter(live).flat_map(|r| [r.first, r.last]).collect();
        times.sort_unstable();
        times.dedup();
        let at = |t: u64| times.partition_point(|x| *x < t);
        let mut change = vec![0i128; times.len() + 1];
        for r in self.requests.iter().filter(live) {
            change[at(r.first)] += i128::from(r.size);
            change[at(r.last)] -= i128::from(r.size);
        }
        let mut sum = 0i128;
        let load: Vec<u64> = change
            .iter()
            .map(|c| {
                sum += c;
                u64::try_from(sum).unwrap_or(u64::MAX)
            })
            .collect();
        let most = |r: &Request| load[at(r.first)..at(r.last).max(at(r.first))].iter().copied().max().unwrap_or(0);
        self.requests.iter().map(|r| if live(&r) { most(r) } else { 0 }).collect()
    }

    /// The offsets that an order gives.
    pub(super) fn offsets_of(&mut self, order: &[u32]) -> Vec<u64> {
        self.fit(order, u64::MAX);
        self.offsets.clone()
    }

    /// The greedy orders worth trying.
    fn orders(&self) -> Vec<Vec<u32>> {
        let r = |i: u32| self.requests[i as usize];
        let all: Vec<u32> =
            (0..self.requests.len() as u32).filter(|i| r(*i).first < r(*i).last && r(*i).size > 0).collect();
        let life = |i: u32| u128::from(r(i).last - r(i).first);
        // How much is alive while a request is: crowded ones first.
        let crowd: Vec<u128> = (0..self.requests.len())
            .map(|i| self.near[i].iter().map(|j| u128::from(self.requests[*j as usize].size)).sum::<u128>())
            .collect();
        type Key<'k> = &'k dyn Fn(u32) -> (u128, u128);
        let keys: [Key<'_>; 6] = [
            &|i| (u128::MAX - u128::from(r(i).size), u128::MAX - life(i)),
            &|i| (u128::MAX - u128::from(r(i).size) * life(i), u128::from(r(i).first)),
            &|i| (u128::MAX - life(i), u128::MAX - u128::from(r(i).size)),
            &|i| (u128::from(r(i).first), u128::MAX - life(i)),
            &|i| (u128::MAX - u128::from(r(i).last), u128::MAX - life(i)),
            &|i| (u128::MAX - crowd[i as usize], u128::MAX - u128::from(r(i).size)),
        ];
        keys.iter()
            .map(|k| {
                let mut v = all.clone();
                super::sort::by_key(&mut v, *k);
                v
            })
            .collect()
    }

    /// Puts every request, in order, at the lowest place that is free. Returns the total, or `u64::MAX` as soon as it
    /// is at least `limit`.
    pub(super) fn fit(&mut self, order: &[u32], limit: u64) -> u64 {
        self.placed.fill(false);
        let mut total = 0;
        let mut busy: Vec<(u64, u64)> = vec![];
        for &i in order {
            busy.clear();
            for &j in &self.near[i as usize] {
                if self.placed[j as usize] {
                    let a = self.offsets[j as usize];
                    busy.push((a, a.saturating_add(self.requests[j as usize].size)));
                }
            }
            self.spent += 8 + self.near[i as usize].len() as u64 + 2 * busy.len() as u64;
            busy.sort_unstable();
            let size = self.requests[i as usize].size;
            let mut at = 0u64;
            for &(a, b) in &busy {
                if a >= at && a - at >= size {
                    break;
                }
                at = at.max(b);
            }
            self.offsets[i as usize] = at;
            self.placed[i as usize] = true;
            total = total.max(at.saturating_add(size));
            if total >= limit {
                return u64::MAX;
            }
        }
        total
    }

    /// Moves requests that lie at the top forward in the order as long as the budget lasts.
    pub(super) fn improve(&mut self, total: u64, order: Vec<u32>, bound: u64, effort: u64) -> (u64, Vec<u32>) {
        let (mut best, mut best_order) = (total, order.clone());
        let (mut now, mut current) = (total, order);
        let mut draw = Draw::new();
        let mut next = move |n: usize| draw.below(n);
        let limit = self.spent.saturating_add(BUDGET.saturating_mul(effort));
        let mut stale = 0u32;
        while self.spent < limit && best > bound {
            self.fit(&current, u64::MAX);
            let mut top: Vec<usize> = vec![];
            for (k, &i) in current.iter().enumerate() {
                if self.offsets[i as usize] + self.requests[i as usize].size >= now {
                    top.push(k);
                }
            }
            let mut tried = current.clone();
            let k = top[next(top.len())];
            // Either the request at the top itself goes forward, or one alive beside it changes its turn.
            let k = if next(3) == 0 && !self.near[current[k] as usize].is_empty() {
                let beside = &self.near[current[k] as usize];
                let j = beside[next(beside.len())];
                current.iter().position(|x| *x == j).unwrap_or(k)
            } else {
                k
            };
            let i = tried.remove(k);
            let to = if next(4) == 0 { next(tried.len() + 1) } else { next(k + 1) };
            tried.insert(to, i);
            // A little worse is accepted now and then, to leave a local minimum.
            let slack = if stale > 50 && next(40) == 0 { now / 50 } else { 0 };
            let total = self.fit(&tried, now.saturating_add(slack).saturating_add(1));
            if total != u64::MAX {
                (now, current) = (total, tried);
                if now < best {
                    (best, best_order, stale) = (now, current.clone(), 0);
                }
            }
            stale += 1;
            if stale > 2000 {
                (now, current, stale) = (best, best_order.clone(), 0);
            }
        }
        (best, best_order)
    }
}
