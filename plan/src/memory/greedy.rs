//! First fit in several orders, and a local search over orders.

use super::Request;

/// Work of one search: visits of a placed neighbour.
const BUDGET: u64 = 20_000_000;

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
        order.sort_by_key(|i| requests[*i as usize].first);
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

    /// The greedy orders worth trying.
    pub(super) fn orders(&self) -> Vec<Vec<u32>> {
        let r = |i: &u32| self.requests[*i as usize];
        let all: Vec<u32> =
            (0..self.requests.len() as u32).filter(|i| r(i).first < r(i).last && r(i).size > 0).collect();
        let life = |i: &u32| u128::from(r(i).last - r(i).first);
        // How much is alive while a request is: crowded ones first.
        let crowd: Vec<u128> = (0..self.requests.len())
            .map(|i| self.near[i].iter().map(|j| u128::from(self.requests[*j as usize].size)).sum::<u128>())
            .collect();
        type Key<'k> = &'k dyn Fn(&u32) -> (u128, u128, u32);
        let keys: [Key<'_>; 6] = [
            &|i| (u128::MAX - u128::from(r(i).size), u128::MAX - life(i), *i),
            &|i| (u128::MAX - u128::from(r(i).size) * life(i), u128::from(r(i).first), *i),
            &|i| (u128::MAX - life(i), u128::MAX - u128::from(r(i).size), *i),
            &|i| (u128::from(r(i).first), u128::MAX - life(i), *i),
            &|i| (u128::MAX - u128::from(r(i).last), u128::MAX - life(i), *i),
            &|i| (u128::MAX - crowd[*i as usize], u128::MAX - u128::from(r(i).size), *i),
        ];
        keys.iter()
            .map(|k| {
                let mut v = all.clone();
                v.sort_by_key(|i| k(i));
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
        let mut random = 0x9E37_79B9_7F4A_7C15u64;
        let mut next = move |n: usize| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            (random % n.max(1) as u64) as usize
        };
        let mut stale = 0u32;
        while self.spent < BUDGET.saturating_mul(effort) && best > bound {
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
