//! The singular value decomposition of small matrices, by one-sided Jacobi rotations (Hestenes 1958), in f64.
//!
//! Exact to rounding and deterministic; its time grows with the square of the smaller side, so it is for factors and layers of moderate
//! width.

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

/// U [m, k], the singular values from the largest down, V [n, k], k = min(m, n): x = U · diag(s) · Vᵀ. Where a value is zero its
/// column of one side is zero.
pub(super) fn svd(x: Matrix) -> (Matrix, Vec<f64>, Matrix) {
    if x.columns > x.rows {
        let (u, s, v) = svd(x.transposed());
        return (v, s, u);
    }
    // Columns as rows, so that a rotation runs over neighbours.
    let n = x.columns;
    let mut w = x.transposed();
    let mut v = Matrix { rows: n, columns: n, values: vec![0.0; n * n] };
    (0..n).for_each(|i| v.values[i * n + i] = 1.0);
    for _sweep in 0..60 {
        let mut turned = false;
        for i in 0..n {
            for j in i + 1..n {
                let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
                let (p, q, c) = (dot(w.row(i), w.row(i)), dot(w.row(j), w.row(j)), dot(w.row(i), w.row(j)));
                if c.abs() <= 1e-15 * (p * q).sqrt() || c == 0.0 {
                    continue;
                }
                turned = true;
                let zeta = (q - p) / (2.0 * c);
                let t = zeta.signum() / (zeta.abs() + (1.0 + zeta * zeta).sqrt());
                let cos = (1.0 + t * t).sqrt().recip();
                rotate(&mut w, i, j, cos, cos * t);
                rotate(&mut v, i, j, cos, cos * t);
            }
        }
        if !turned {
            break;
        }
    }
    let norms: Vec<f64> = (0..n).map(|i| w.row(i).iter().map(|x| x * x).sum::<f64>().sqrt()).collect();
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|a, b| norms[*b].total_cmp(&norms[*a]).then(a.cmp(b)));
    let pick = |from: &Matrix, unit: bool| {
        let row = |i: &usize| {
            let factor = if !unit {
                1.0
            } else if norms[*i] > 0.0 {
                norms[*i].recip()
            } else {
                0.0
            };
            from.row(*i).iter().map(move |x| x * factor)
        };
        let values = order.iter().flat_map(row).collect();
        Matrix { rows: n, columns: from.columns, values }.transposed()
    };
    (pick(&w, true), order.iter().map(|i| norms[*i]).collect(), pick(&v, false))
}

/// Rows i < j become cos · i − sin · j and sin · i + cos · j.
fn rotate(m: &mut Matrix, i: usize, j: usize, cos: f64, sin: f64) {
    let (head, tail) = m.values.split_at_mut(j * m.columns);
    let (a, b) = (&mut head[i * m.columns..(i + 1) * m.columns], &mut tail[..m.columns]);
    for (x, y) in a.iter_mut().zip(b) {
        (*x, *y) = (cos * *x - sin * *y, sin * *x + cos * *y);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_decomposition_gives_the_matrix_again() {
        for (m, n) in [(7, 5), (5, 7), (1, 3), (4, 4)] {
            // Of rank 3 at most.
            let f =
                |salt: usize| (0..m.max(n) * 3).map(|i| ((i * 37 + salt) % 19) as f32 / 7.0 - 1.0).collect::<Vec<_>>();
            let x = Matrix::new(m, 3, &f(1)[..m * 3]).times(&Matrix::new(3, n, &f(5)[..n * 3]));
            let (u, s, v) = svd(x.clone());
            assert!(s.windows(2).all(|w| w[0] >= w[1]) && s.iter().skip(3).all(|x| *x < 1e-9), "{s:?}");
            let mut us = u;
            let k = s.len();
            us.values.iter_mut().enumerate().for_each(|(i, x)| *x *= s[i % k]);
            let again = us.times(&v.transposed());
            assert!(again.values.iter().zip(&x.values).all(|(a, b)| (a - b).abs() < 1e-12), "{m} {n}");
        }
    }
}
