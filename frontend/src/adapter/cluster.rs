//! Ranks of several low-rank adapters grouped by likeness, each group becoming one rank (Zhao et al. 2024, "Merging LoRAs like Playing
//! LEGO", ICLR 2025).
//!
//! A unit is a row of A with its column of B. Units are grouped by k-means on both together, from centres that lie far apart; a group's
//! mean takes its place. With `reweight`, a mean is scaled to the mean length of its units, since averaging shortens, and everything
//! by √(r / k), r being the adapters' mean rank.

/// Rounds of k-means at most; it stops when nothing moves.
const ROUNDS: usize = 100;

/// Units of one site: a row of A [in] with a column of B [out] behind it.
pub(super) type Unit = Vec<f64>;

/// At most `k` units in place of all, in order of their first members.
pub(super) fn cluster(units: &[Unit], k: usize, mean_rank: f64, reweight: bool) -> Vec<Unit> {
    let k = k.min(units.len());
    let group = groups(units, k);
    let scale = if reweight { (mean_rank / k.max(1) as f64).sqrt() } else { 1.0 };
    let mut out: Vec<(usize, Unit)> = vec![];
    for g in 0..k {
        let members: Vec<usize> = (0..units.len()).filter(|i| group[*i] == g).collect();
        let Some(first) = members.first() else { continue };
        let mut mean = centre(units, &members);
        let lengths = members.iter().map(|i| length(&units[*i])).sum::<f64>() / members.len() as f64;
        let stretch = if reweight && length(&mean) > 0.0 { lengths / length(&mean) } else { 1.0 };
        // A and B both carry the factor of the output, so each gets its root.
        mean.iter_mut().for_each(|x| *x *= stretch * scale.sqrt());
        out.push((*first, mean));
    }
    out.sort_by_key(|(first, _)| *first);
    out.into_iter().map(|(_, unit)| unit).collect()
}

/// The group of every unit.
fn groups(units: &[Unit], k: usize) -> Vec<usize> {
    let mut centres = spread(units, k);
    let mut group = vec![usize::MAX; units.len()];
    for _ in 0..ROUNDS {
        let nearest: Vec<usize> = units.iter().map(|u| least(centres.iter().map(|c| distance(u, c)))).collect();
        if nearest == group {
            break;
        }
        group = nearest;
        for (g, c) in centres.iter_mut().enumerate() {
            let members: Vec<usize> = (0..units.len()).filter(|i| group[*i] == g).collect();
            if !members.is_empty() {
                *c = centre(units, &members);
            }
        }
    }
    group
}

/// `k` units far from each other (Gonzalez 1985): the longest, then always the one that is farthest from all chosen.
fn spread(units: &[Unit], k: usize) -> Vec<Unit> {
    let mut far: Vec<f64> = units.iter().map(|u| length(u)).collect();
    let mut chosen = vec![];
    for _ in 0..k {
        let next = least(far.iter().map(|x| -x));
        let unit = units[next].clone();
        for (x, u) in far.iter_mut().zip(units) {
            let d = distance(u, &unit);
            *x = if chosen.is_empty() { d } else { x.min(d) };
        }
        chosen.push(unit);
    }
    chosen
}

/// Where the least value is; the first of equals.
fn least(values: impl Iterator<Item = f64>) -> usize {
    values.enumerate().min_by(|a, b| a.1.total_cmp(&b.1)).map_or(0, |(i, _)| i)
}

fn centre(units: &[Unit], members: &[usize]) -> Unit {
    let mut sum = vec![0.0; members.first().map_or(0, |i| units[*i].len())];
    for i in members {
        sum.iter_mut().zip(&units[*i]).for_each(|(s, x)| *s += x);
    }
    sum.iter_mut().for_each(|s| *s /= members.len() as f64);
    sum
}

fn length(x: &[f64]) -> f64 {
    x.iter().map(|v| v * v).sum::<f64>().sqrt()
}

fn distance(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(a, b)| (a - b).powi(2)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_units_become_one_and_far_ones_stay() {
        let units = vec![vec![1.0, 0.0], vec![0.0, 3.0], vec![0.8, 0.0], vec![0.0, 2.0]];
        let plain = cluster(&units, 2, 2.0, false);
        assert_eq!(plain, [vec![0.9, 0.0], vec![0.0, 2.5]]);
        assert_eq!(cluster(&units, 9, 2.0, false), units, "as many groups as units");
        // Opposite units of length 1 and √2 / 2 apart from their mean: the mean gets their length again.
        let bent = vec![vec![1.0, 0.0], vec![0.0, 1.0]];
        let one = cluster(&bent, 1, 4.0, true);
        // √(4 / 1) for the product, its root for either side.
        assert!((length(&one[0]) - 2f64.sqrt()).abs() < 1e-12, "{one:?}");
    }
}
