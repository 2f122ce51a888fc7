//! What an adapter would change: rank, scale and the norm of each branch's delta, from its values.

use super::adapter::{Adapter, LoraSite};
use crate::error::Result;

/// One branch of the report.
#[derive(Debug, Clone, PartialEq)]
pub struct SiteReport {
    /// Path of the linear layer.
    pub module: String,
    /// r.
    pub rank: u64,
    /// The factor of the branch.
    pub scale: f64,
    /// Values in A and B.
    pub parameters: u64,
    /// Frobenius norm of scale · B · A.
    pub delta_norm: f64,
}

/// What `pleach adapter check` prints.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterReport {
    /// All branches, in module order.
    pub sites: Vec<SiteReport>,
    /// Tensors matched; all of the file's.
    pub tensors: usize,
    /// Values in all branches.
    pub parameters: u64,
    /// Whether every delta is zero: the adapter then changes nothing.
    pub all_zero: bool,
    /// Whether a value is infinite or not a number.
    pub not_finite: bool,
}

/// Reads the values of a matched adapter, branch by branch, and reports.
///
/// # Errors
/// A file that can no longer be read.
pub fn check_adapter(adapter: &Adapter) -> Result<AdapterReport> {
    let sites = adapter.sites.iter().map(report).collect::<Result<Vec<_>>>()?;
    Ok(AdapterReport {
        tensors: 2 * sites.len(),
        parameters: adapter.parameters(),
        all_zero: sites.iter().all(|s| s.delta_norm == 0.0),
        not_finite: sites.iter().any(|s| !s.delta_norm.is_finite()),
        sites,
    })
}

fn report(site: &LoraSite) -> Result<SiteReport> {
    let (a, b) = (site.a.read_f32()?, site.b.read_f32()?);
    let rank = site.rank as usize;
    // |BA|² = Σ (BᵀB) ∘ (AAᵀ): r × r products instead of out × in.
    let mut left = vec![0.0f64; rank * rank];
    for row in b.chunks_exact(rank) {
        for i in 0..rank {
            for j in 0..rank {
                left[i * rank + j] += f64::from(row[i]) * f64::from(row[j]);
            }
        }
    }
    let width = site.input as usize;
    let mut square = 0.0;
    for i in 0..rank {
        for j in 0..rank {
            let (x, y) = (&a[i * width..][..width], &a[j * width..][..width]);
            let dot: f64 = x.iter().zip(y).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum();
            square += left[i * rank + j] * dot;
        }
    }
    let delta_norm = if square.is_nan() { f64::NAN } else { square.max(0.0).sqrt() * site.scale.abs() };
    let parameters = site.a.elements() + site.b.elements();
    Ok(SiteReport { module: site.module.clone(), rank: site.rank, scale: site.scale, parameters, delta_norm })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::safetensors::Writer;
    use crate::tensors::{Dtype, TensorTable};
    use crate::testing::folder;

    #[test]
    fn norm_is_that_of_the_product() {
        let dir = folder("check");
        let path = dir.join("a.safetensors");
        let list = [("a".to_owned(), Dtype::F32, vec![2, 3]), ("b".to_owned(), Dtype::F32, vec![2, 2])];
        let mut writer = Writer::create(&path, &list).unwrap();
        writer.write_f32(&[1.0, 2.0, 0.0, 0.0, 1.0, -1.0]).unwrap();
        writer.write_f32(&[1.0, 0.0, 2.0, 3.0]).unwrap();
        writer.finish().unwrap();
        let table = TensorTable::open_file(&path).unwrap();
        let (a, b) = (table.get("a").unwrap().clone(), table.get("b").unwrap().clone());
        let site = LoraSite { module: "m".into(), embedding: false, rank: 2, scale: -2.0, input: 3, output: 2, a, b };
        // BA = [[1, 2, 0], [2, 7, -3]], squares sum to 67.
        let report = report(&site).unwrap();
        assert!((report.delta_norm - 2.0 * 67f64.sqrt()).abs() < 1e-12);
        assert_eq!(report.parameters, 10);
    }
}
