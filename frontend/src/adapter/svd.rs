//! Singular value decompositions of the matrices that methods prepare and combine. On one thread, so that results do not depend on
//! how many there are.

use faer::Mat;

/// A row-major matrix.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Matrix {
    rows: usize,
    columns: usize,
    pub(super) values: Vec<f64>,
}

impl Matrix {
    /// From f32 values.
    pub(super) fn new(rows: usize, columns: usize, values: &[f32]) -> Matrix {
        Matrix { rows, columns, values: values.iter().map(|x| f64::from(*x)).collect() }
    }

    pub(super) fn at(&self, row: usize, column: usize) -> f64 {
        self.values[row * self.columns + column]
    }

    pub(super) fn row_mut(&mut self, row: usize) -> &mut [f64] {
        &mut self.values[row * self.columns..(row + 1) * self.columns]
    }

    fn row(&self, row: usize) -> &[f64] {
        &self.values[row * self.columns..(row + 1) * self.columns]
    }

    pub(super) fn transposed(&self) -> Matrix {
        let values = (0..self.columns).flat_map(|j| (0..self.rows).map(move |i| self.at(i, j))).collect();
        Matrix { rows: self.columns, columns: self.rows, values }
    }

    /// self · other.
    pub(super) fn times(&self, other: &Matrix) -> Matrix {
        let mut out = Matrix { rows: self.rows, columns: other.columns, values: vec![0.0; self.rows * other.columns] };
        for i in 0..self.rows {
            for (k, x) in self.row(i).iter().enumerate() {
                out.row_mut(i).iter_mut().zip(other.row(k)).for_each(|(y, z)| *y += x * z);
            }
        }
        out
    }
}

/// U [m, k], the singular values from the largest down, V [n, k], k = min(m, n): x = U · diag(s) · Vᵀ. `None` for a matrix with
/// values that are no numbers.
pub(super) fn svd(x: &Matrix) -> Option<(Matrix, Vec<f64>, Matrix)> {
    let found = Mat::from_fn(x.rows, x.columns, |i, j| x.at(i, j)).thin_svd().ok()?;
    let take = |m: faer::MatRef<'_, f64>| Matrix {
        rows: m.nrows(),
        columns: m.ncols(),
        values: (0..m.nrows()).flat_map(|i| (0..m.ncols()).map(move |j| m[(i, j)])).collect(),
    };
    let values = found.S().column_vector().iter().copied().collect();
    Some((take(found.U()), values, take(found.V())))
}

/// Which singular vectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// Those of the columns, U.
    Left,
    /// Those of the rows, V.
    Right,
}

/// The first `rank` singular vectors of x [m, n] on a side, [rank, m] or [rank, n], each with the sign that makes its largest value
/// positive (the first of equals decides). `None` for a matrix with values that are no numbers.
pub(super) fn leading(x: &[f32], m: usize, n: usize, rank: usize, side: Side) -> Option<Vec<f32>> {
    if x.iter().any(|v| !v.is_finite()) {
        return None;
    }
    let (rows, columns) = if side == Side::Left { (m, n) } else { (n, m) };
    let x = match side {
        Side::Left => Mat::from_fn(m, n, |i, j| f64::from(x[i * n + j])),
        Side::Right => Mat::from_fn(n, m, |i, j| f64::from(x[j * n + i])),
    };
    // Of the smaller side they are the eigenvectors of a small square matrix, which come from the smallest value up.
    let (u, last) = if rows <= columns {
        ((&x * x.transpose()).self_adjoint_eigen(faer::Side::Lower).ok()?.U().to_owned(), rows - 1)
    } else {
        (x.thin_svd().ok()?.U().to_owned(), 0)
    };
    let vector = |k: usize| {
        let column = u.col(k.abs_diff(last));
        let largest = (0..rows).fold(0, |best, i| if column[i].abs() > column[best].abs() { i } else { best });
        let sign = if column[largest] < 0.0 { -1.0 } else { 1.0 };
        (0..rows).map(move |i| (sign * column[i]) as f32)
    };
    Some((0..rank.min(rows).min(columns)).flat_map(vector).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_have_the_same_leading_vectors_as_the_decomposition() {
        for (m, n) in [(7, 4), (4, 7)] {
            let x: Vec<f32> = (0..m * n).map(|i| ((i * 37 + 3) % 19) as f32 / 7.0 - 1.0).collect();
            let (u, _, v) = svd(&Matrix::new(m, n, &x)).unwrap();
            for (side, of, length) in [(Side::Left, &u, m), (Side::Right, &v, n)] {
                let got = leading(&x, m, n, 3, side).unwrap();
                assert_eq!(got.len(), 3 * length);
                for (k, got) in got.chunks(length).enumerate() {
                    let dot: f64 = got.iter().enumerate().map(|(i, g)| f64::from(*g) * of.at(i, k)).sum();
                    assert!((dot.abs() - 1.0).abs() < 1e-6, "{m} x {n}, {side:?}, {k}: {dot}");
                    assert!(got.iter().copied().fold(0f32, |a, b| if b.abs() > a.abs() { b } else { a }) > 0.0);
                }
            }
        }
        assert_eq!(leading(&[f32::NAN; 4], 2, 2, 1, Side::Left), None);
    }

    #[test]
    fn a_decomposition_gives_the_matrix_again() {
        for (m, n) in [(7, 5), (5, 7), (1, 3), (4, 4)] {
            // Of rank 3 at most.
            let f =
                |salt: usize| (0..m.max(n) * 3).map(|i| ((i * 37 + salt) % 19) as f32 / 7.0 - 1.0).collect::<Vec<_>>();
            let x = Matrix::new(m, 3, &f(1)[..m * 3]).times(&Matrix::new(3, n, &f(5)[..n * 3]));
            let (u, s, v) = svd(&x).unwrap();
            assert!(s.windows(2).all(|w| w[0] >= w[1]) && s.iter().skip(3).all(|x| *x < 1e-9), "{s:?}");
            let mut us = u;
            let k = s.len();
            us.values.iter_mut().enumerate().for_each(|(i, x)| *x *= s[i % k]);
            let again = us.times(&v.transposed());
            assert!(again.values.iter().zip(&x.values).all(|(a, b)| (a - b).abs() < 1e-12), "{m} {n}");
        }
    }
}
