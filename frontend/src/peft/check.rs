//! What an adapter would change: rank, scale and the norm of each site's delta, from its values.

use super::adapter::Adapter;
use crate::adapter::{Site, SlotValue, merged, obstacle};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};

/// One module of the report.
#[derive(Debug, Clone, PartialEq)]
pub struct SiteReport {
    /// Path of the module.
    pub module: String,
    /// r; `None` for a module that is replaced as a whole.
    pub rank: Option<u64>,
    /// The factor of the update.
    pub scale: f64,
    /// Trained values.
    pub parameters: u64,
    /// Frobenius norm of W' − W; `None` where no single weight takes the place of base and adapter.
    pub delta_norm: Option<f64>,
}

/// What `pleach adapter check` prints.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterReport {
    /// All sites, then all replaced parameters, in module order.
    pub sites: Vec<SiteReport>,
    /// Tensors matched; all of the file's.
    pub tensors: usize,
    /// Trained values.
    pub parameters: u64,
    /// Whether every delta is zero: the adapter then changes nothing.
    pub all_zero: bool,
    /// Whether a value is infinite or not a number.
    pub not_finite: bool,
}

/// Reads the values of a matched adapter, site by site, and reports.
///
/// # Errors
/// A file that can no longer be read, indices that do not fit.
pub fn check_adapter(adapter: &Adapter, base: &Checkpoint) -> Result<AdapterReport> {
    let mut sites = vec![];
    let (merges, mut finite) = (obstacle(adapter, base)?.is_none(), true);
    for s in &adapter.sites {
        let delta_norm = match adapter.config.method.name() {
            "lora" | "rslora" => Some(low_rank_norm(s)?),
            _ if !merges => {
                for t in s.values.values().filter_map(SlotValue::tensor).filter(|t| t.dtype.is_weight()) {
                    finite &= t.read_f32()?.iter().all(|x| x.is_finite());
                }
                None
            }
            _ => {
                let old = values(base, &format!("{}.weight", s.module))?;
                Some(distance(&merged(adapter, s, base, &old)?, &old))
            }
        };
        let parameters = adapter.site_parameters(s);
        sites.push(SiteReport { module: s.module.clone(), rank: Some(s.rank), scale: s.scale, parameters, delta_norm });
    }
    for r in &adapter.replaced {
        let new = r.value.tensor().ok_or_else(|| Error::Graph(format!("no value for `{}`", r.path)))?;
        let delta_norm = Some(distance(&new.read_f32()?, &values(base, &r.path)?));
        let parameters = r.shape.iter().product();
        sites.push(SiteReport { module: r.path.clone(), rank: None, scale: 1.0, parameters, delta_norm });
    }
    Ok(AdapterReport {
        tensors: adapter.tensors,
        parameters: adapter.parameters(),
        all_zero: sites.iter().all(|s| s.delta_norm == Some(0.0)),
        not_finite: !finite || sites.iter().any(|s| s.delta_norm.is_some_and(|n| !n.is_finite())),
        sites,
    })
}

fn values(base: &Checkpoint, path: &str) -> Result<Vec<f32>> {
    base.param(path).ok_or_else(|| Error::tensor(&base.dir, path, "is missing"))?.read_f32()
}

fn distance(new: &[f32], old: &[f32]) -> f64 {
    new.iter().zip(old).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum::<f64>().sqrt()
}

/// |scale · B · A| without the product: |BA|² = Σ (BᵀB) ∘ (AAᵀ), r × r products instead of out × in.
fn low_rank_norm(site: &Site) -> Result<f64> {
    let read = |part: &str| -> Result<Vec<f32>> {
        let tensor = site.values.get(part).and_then(|v| v.tensor());
        tensor.ok_or_else(|| Error::Graph(format!("no value for `{part}`")))?.read_f32()
    };
    let (a, b) = (read("lora_A")?, read("lora_B")?);
    let rank = site.rank as usize;
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
    Ok(if square.is_nan() { f64::NAN } else { square.max(0.0).sqrt() * site.scale.abs() })
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
        let values = [("lora_A", SlotValue::Tensor(a)), ("lora_B", SlotValue::Tensor(b))].into();
        let (module, embedding) = ("m".into(), false);
        let site = Site {
            module,
            embedding,
            rank: 2,
            alpha: -4.0,
            scale: -2.0,
            input: 3,
            output: 2,
            widest: (3, 2),
            member: None,
            order: None,
            values,
        };
        // BA = [[1, 2, 0], [2, 7, -3]], squares sum to 67.
        assert!((low_rank_norm(&site).unwrap() - 2.0 * 67f64.sqrt()).abs() < 1e-12);
    }
}
