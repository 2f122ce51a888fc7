//! Decompositions of the matrices from which methods prepare their first values, in f64 on one thread: sites are prepared side by
//! side, so results depend neither on the number of threads nor on the order of sites.
//!
//! Signs and, within equal singular values, bases of singular vectors are whatever the algorithm gives: only products of factors
//! mean anything.

use faer::{Mat, MatRef, Side};

use crate::error::{Error, Result};

/// Values below this part of the largest singular value count as zero.
const ZERO: f64 = 1e-13;

/// A matrix from row-major values.
pub(super) fn matrix(rows: u64, columns: u64, x: &[f32]) -> Mat<f64> {
    let n = columns as usize;
    Mat::from_fn(rows as usize, n, |i, j| f64::from(x[i * n + j]))
}

/// Row-major values of a matrix.
pub(super) fn values(x: MatRef<'_, f64>) -> Vec<f32> {
    (0..x.nrows()).flat_map(|i| (0..x.ncols()).map(move |j| x[(i, j)] as f32)).collect()
}

/// Some singular values with their vectors: x = Σ s_k · u_k · v_kᵀ over all of them.
#[derive(Debug, Clone)]
pub(super) struct Svd {
    /// Left vectors as columns, [m, k].
    pub u: Mat<f64>,
    /// Values, from the largest down, [k].
    pub s: Vec<f64>,
    /// Right vectors as columns, [n, k].
    pub v: Mat<f64>,
}

impl Svd {
    /// Those at these places.
    pub(super) fn at(&self, places: impl IntoIterator<Item = usize>) -> Svd {
        let places: Vec<usize> = places.into_iter().collect();
        Svd {
            u: Mat::from_fn(self.u.nrows(), places.len(), |i, j| self.u[(i, places[j])]),
            s: places.iter().map(|k| self.s[*k]).collect(),
            v: Mat::from_fn(self.v.nrows(), places.len(), |i, j| self.v[(i, places[j])]),
        }
    }

    /// The factors A [k, n] and B [m, k] with B · A = Σ c_k · s_k · u_k · v_kᵀ, where A has the part √(c · s) of the product.
    pub(super) fn split(&self, c: f64) -> (Mat<f64>, Mat<f64>) {
        let root: Vec<f64> = self.s.iter().map(|s| (s * c).max(0.0).sqrt()).collect();
        let a = Mat::from_fn(root.len(), self.v.nrows(), |k, j| root[k] * self.v[(j, k)]);
        let b = Mat::from_fn(self.u.nrows(), root.len(), |i, k| root[k] * self.u[(i, k)]);
        (a, b)
    }
}

fn no_numbers() -> Error {
    Error::Graph("a matrix holds values that are no numbers, so it cannot be decomposed".into())
}

fn finite(x: MatRef<'_, f64>) -> Result<()> {
    let all = (0..x.ncols()).all(|j| (0..x.nrows()).all(|i| x[(i, j)].is_finite()));
    if all { Ok(()) } else { Err(no_numbers()) }
}

/// The `count` largest singular values, from the eigenvectors of the smaller of x · xᵀ and xᵀ · x. Vectors of a value σ are accurate
/// to (σ₁/σ)² · 10⁻¹⁶, which is far below f32 for what stands out, and not for the smallest of an ill-conditioned matrix.
///
/// # Errors
/// Values that are no numbers.
pub(super) fn leading(x: MatRef<'_, f64>, count: usize) -> Result<Svd> {
    finite(x)?;
    if x.nrows() > x.ncols() {
        let turned = leading(x.transpose(), count)?;
        return Ok(Svd { u: turned.v, s: turned.s, v: turned.u });
    }
    let eigen = (x * x.transpose()).self_adjoint_eigen(Side::Lower).map_err(|_| no_numbers())?;
    // They come from the smallest value up.
    let (m, count) = (x.nrows(), count.min(x.nrows()));
    let u = Mat::from_fn(m, count, |i, k| eigen.U()[(i, m - 1 - k)]);
    let mut v = x.transpose() * &u;
    let mut s = vec![0.0; count];
    for k in 0..count {
        s[k] = v.col(k).norm_l2();
        let inverse = if s[k] > ZERO * s[0] { s[k].recip() } else { 0.0 };
        (0..v.nrows()).for_each(|i| v[(i, k)] *= inverse);
    }
    Ok(Svd { u, s, v })
}

/// The `count` smallest singular values, from the largest of them down. Where the matrix is too ill-conditioned for the eigenvectors of
/// x · xᵀ, all are computed.
///
/// # Errors
/// Values that are no numbers.
pub(super) fn smallest(x: MatRef<'_, f64>, count: usize) -> Result<Svd> {
    let all = x.nrows().min(x.ncols());
    let mut found = leading(x, all)?;
    if found.s.last().is_some_and(|s| *s < 1e-5 * found.s[0]) {
        found = whole(x)?;
    }
    Ok(found.at(all.saturating_sub(count)..all))
}

/// All singular values with their vectors.
///
/// # Errors
/// Values that are no numbers.
pub(super) fn whole(x: MatRef<'_, f64>) -> Result<Svd> {
    finite(x)?;
    let found = x.thin_svd().map_err(|_| no_numbers())?;
    let s = found.S().column_vector().iter().copied().collect();
    Ok(Svd { u: found.U().to_owned(), s, v: found.V().to_owned() })
}

/// About the `count` largest singular values by `rounds` rounds of subspace iteration from a random start (Halko et al. 2011,
/// "Finding Structure with Randomness", algorithms 4.4 and 5.1), as `torch.svd_lowrank` does it. `draw` gives a normal number for a place.
///
/// # Errors
/// Values that are no numbers.
pub(super) fn randomised(x: MatRef<'_, f64>, count: usize, rounds: u64, draw: impl Fn(usize) -> f64) -> Result<Svd> {
    finite(x)?;
    if x.nrows() < x.ncols() {
        let turned = randomised(x.transpose(), count, rounds, draw)?;
        return Ok(Svd { u: turned.v, s: turned.s, v: turned.u });
    }
    let (n, q) = (x.ncols(), count.min(x.ncols()));
    let start = Mat::from_fn(n, q, |i, j| draw(i * q + j));
    let basis = |y: Mat<f64>| y.qr().compute_thin_Q();
    let mut found = basis(x * start);
    for _ in 0..rounds {
        let back = basis(x.transpose() * &found);
        found = basis(x * back);
    }
    let small = whole((found.transpose() * x).as_ref())?;
    Ok(Svd { u: &found * small.u, ..small })
}

/// The first `count` columns of Q [m, count] and rows of R [count, n] of x = Q · R.
///
/// # Errors
/// Values that are no numbers.
pub(super) fn first_of_qr(x: MatRef<'_, f64>, count: usize) -> Result<(Mat<f64>, Mat<f64>)> {
    finite(x)?;
    // The first columns of Q come from the first columns of x alone.
    let q = x.subcols(0, count.min(x.ncols())).qr().compute_thin_Q();
    let r = q.transpose() * x;
    Ok((q, r))
}

/// The first `count` columns of P · L [m, count], pivots and rows of U [count, n], whose diagonal is one, of x = P · L · D · U with rows
/// exchanged for the largest pivot.
///
/// # Errors
/// Values that are no numbers, a pivot of zero.
pub(super) fn first_of_lu(x: MatRef<'_, f64>, count: usize) -> Result<(Mat<f64>, Vec<f64>, Mat<f64>)> {
    finite(x)?;
    let (m, n) = (x.nrows(), x.ncols());
    let mut rest = x.to_owned();
    let mut free: Vec<bool> = vec![true; m];
    let (mut l, mut d, mut u) = (Mat::zeros(m, count), vec![], Mat::zeros(count, n));
    for k in 0..count {
        // Rows stay where they are: a row that was a pivot is no longer free.
        let rows = (0..m).filter(|i| free[*i]);
        let at = rows.fold(None, |best: Option<usize>, i| match best {
            Some(b) if rest[(b, k)].abs() >= rest[(i, k)].abs() => Some(b),
            _ => Some(i),
        });
        let (Some(at), true) = (at, at.is_some_and(|at| rest[(at, k)] != 0.0)) else {
            return Err(Error::Graph(format!("the matrix has only {k} pivots, {count} are needed: lower r")));
        };
        let pivot = rest[(at, k)];
        free[at] = false;
        d.push(pivot);
        (k..n).for_each(|j| u[(k, j)] = rest[(at, j)] / pivot);
        l[(at, k)] = 1.0;
        for i in (0..m).filter(|i| free[*i]) {
            let factor = rest[(i, k)] / pivot;
            l[(i, k)] = factor;
            (k..n).for_each(|j| rest[(i, j)] -= factor * rest[(at, j)]);
        }
    }
    Ok((l, d, u))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(m: usize, n: usize) -> Mat<f64> {
        Mat::from_fn(m, n, |i, j| ((i * 37 + j * 11 + i * j * 5 + 3) % 19) as f64 / 7.0 - 1.0)
    }

    fn product(f: &Svd) -> Mat<f64> {
        let (a, b) = f.split(1.0);
        b * a
    }

    fn largest(x: Mat<f64>) -> f64 {
        x.norm_max()
    }

    #[test]
    fn all_ways_give_the_same_best_approximation() {
        for (m, n) in [(9, 6), (6, 9), (7, 7)] {
            let x = example(m, n);
            let all = whole(x.as_ref()).unwrap();
            assert!(largest(product(&all) - &x) < 1e-12);
            let want = product(&all.at(0..3));
            assert!(largest(product(&leading(x.as_ref(), 3).unwrap()) - &want) < 1e-10, "{m} {n}");
            let draw = |i: usize| ((i * 29 + 7) % 13) as f64 - 6.0;
            let found = randomised(x.as_ref(), 3, 300, draw).unwrap();
            assert!(largest(product(&found) - &want) < 1e-8, "{m} {n}");
            let few = randomised(x.as_ref(), 3, 0, draw).unwrap();
            assert!(largest(product(&few) - &want) > 1e-3, "without rounds it is not exact");
        }
    }

    #[test]
    fn factors_of_a_matrix_without_full_rank_are_numbers() {
        let x = Mat::from_fn(5, 4, |i, j| (i + 1) as f64 * (j as f64 - 1.5));
        let found = leading(x.as_ref(), 3).unwrap();
        assert!(largest(product(&found) - &x) < 1e-10);
        assert!(leading(Mat::from_fn(2, 2, |_, _| f64::NAN).as_ref(), 1).is_err());
    }

    #[test]
    fn the_smallest_parts_and_all_others_give_the_matrix() {
        for x in [example(9, 6), example(6, 9), Mat::from_fn(5, 4, |i, j| (i + 1) as f64 * (j as f64 - 1.5))] {
            let few = smallest(x.as_ref(), 2).unwrap();
            let rest = whole(x.as_ref()).unwrap().at(0..x.nrows().min(x.ncols()) - 2);
            assert_eq!(few.s.len(), 2);
            assert!(largest(product(&few) + product(&rest) - &x) < 1e-10);
        }
    }

    #[test]
    fn pivots_of_all_steps_give_the_matrix() {
        for (m, n) in [(5, 5), (7, 5), (5, 7)] {
            let x = Mat::from_fn(m, n, |i, j| ((i * i * 7 + j * 11 + i * j * 5 + 3) % 17) as f64 / 7.0 - 1.0);
            let k = m.min(n);
            let (l, d, u) = first_of_lu(x.as_ref(), k).unwrap();
            let scaled = Mat::from_fn(k, n, |i, j| d[i] * u[(i, j)]);
            assert!(largest(&l * scaled - &x) < 1e-12, "{m} {n}");
            assert!(l.norm_max() <= 1.0 && (0..k).all(|i| u[(i, i)] == 1.0));
            let (l2, d2, u2) = first_of_lu(x.as_ref(), 2).unwrap();
            assert_eq!(d2, d[..2]);
            assert!(largest(l2 - l.subcols(0, 2)) == 0.0 && largest(u2 - u.subrows(0, 2)) == 0.0);
        }
        assert!(first_of_lu(Mat::<f64>::zeros(3, 3).as_ref(), 1).is_err());
    }

    #[test]
    fn first_columns_of_q_are_those_of_the_whole() {
        let x = example(8, 6);
        let (q, r) = first_of_qr(x.as_ref(), 3).unwrap();
        let whole = x.qr();
        let (all, rest) = (whole.compute_thin_Q(), whole.thin_R().to_owned());
        let want = all.subcols(0, 3) * rest.subrows(0, 3);
        assert!(largest(&q * &r - want) < 1e-12);
    }
}
