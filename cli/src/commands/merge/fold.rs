//! One weight with its adapter in it, and how much of the change survives the rounding.

use crate::failure::{Failure, Result};
use pleach_frontend::adapter::{self, Replaced, Site, SlotData};
use pleach_frontend::{Adapter, Checkpoint, Dtype, TensorRef};
use serde_json::{Value, json};

/// How a weight changed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Change {
    /// Largest change of an element.
    pub(super) largest: f64,
    /// Sums of squares: of the weight, of its change, of the delta, and of what rounding took from the delta.
    weight: f64,
    change: f64,
    delta: f64,
    rest: f64,
}

impl Change {
    /// Norm of the change over the norm of the weight.
    pub(super) fn relative(&self) -> f64 {
        (self.change / self.weight.max(f64::MIN_POSITIVE)).sqrt()
    }

    /// Share of the delta's norm that rounding to the checkpoint's type took.
    pub(super) fn lost(&self) -> f64 {
        if self.delta == 0.0 { 0.0 } else { (self.rest / self.delta).sqrt() }
    }

    pub(super) fn json(&self, module: &str) -> Value {
        json!({"module": module, "max_abs_change": self.largest, "relative_change": self.relative(),
               "lost_to_rounding": self.lost()})
    }

    fn add(&mut self, old: f32, delta: f32, new: f32) {
        let (old, delta, new) = (f64::from(old), f64::from(delta), f64::from(new));
        let change = new - old;
        self.largest = self.largest.max(change.abs());
        self.weight += old * old;
        self.change += change * change;
        self.delta += delta * delta;
        self.rest += (change - delta) * (change - delta);
    }
}

/// What takes the place of a tensor.
#[derive(Clone, Copy)]
pub(super) enum New<'a> {
    /// The weight of a site with the adapter in it.
    Site(&'a Site),
    /// A parameter that the adapter replaces as a whole.
    Replaced(&'a Replaced),
    /// The bias of a site that the adapter changes, and what it becomes.
    Bias(&'a str, &'a [f32]),
}

impl New<'_> {
    /// What the report calls it.
    pub(super) fn name(&self) -> &str {
        match self {
            New::Site(s) => &s.module,
            New::Replaced(r) => &r.path,
            New::Bias(path, _) => path,
        }
    }
}

/// The bytes of the new tensor in the type of the old one, and how much it changed.
///
/// # Errors
/// A file that can no longer be read, or a result that is no finite number in that type.
pub(super) fn merged(base: &Checkpoint, adapter: &Adapter, tensor: &TensorRef, new: New) -> Result<(Vec<u8>, Change)> {
    let old = tensor.read_f32()?;
    let new = match new {
        New::Site(site) if matches!(adapter.config.method.name(), "lora" | "rslora") => {
            return low_rank(tensor, &old, site);
        }
        New::Site(site) => adapter::merged(adapter, site, base, &old)?,
        New::Replaced(r) => replacement(base, r)?,
        New::Bias(_, values) => values.to_vec(),
    };
    let mut sum = Sum::new(tensor);
    for (old, new) in old.iter().zip(&new) {
        sum.push(*old, new - old, *new)?;
    }
    Ok((sum.out, sum.change))
}

/// What an adapter puts in place of a parameter.
fn replacement(base: &Checkpoint, r: &Replaced) -> Result<Vec<f32>> {
    match r.value.read(base)?.data {
        SlotData::F32(values) => Ok(values),
        SlotData::I32(_) => Err(Failure::new(format!("`{}` is no float tensor", r.path))),
    }
}

/// The biases of sites that the adapter changes, by path.
///
/// # Errors
/// Values that cannot be read.
pub(super) fn biases(base: &Checkpoint, adapter: &Adapter) -> Result<Vec<(String, Vec<f32>)>> {
    let mut out = vec![];
    for site in adapter.sites.iter().filter(|s| !s.embedding) {
        let path = format!("{}.bias", site.module);
        let Some(tensor) = base.param(&path) else { continue };
        let old = match adapter.replaced.iter().find(|r| r.path == path) {
            Some(r) => replacement(base, r)?,
            None => tensor.read_f32()?,
        };
        out.extend(adapter::merged_bias(adapter, site, base, &old)?.map(|new| (path, new)));
    }
    Ok(out)
}

/// W + scale · B · A, row by row, without the whole product.
fn low_rank(tensor: &TensorRef, w: &[f32], site: &Site) -> Result<(Vec<u8>, Change)> {
    let read = |part: &str| -> Result<Vec<f32>> {
        let t = site.values.get(part).and_then(|v| v.tensor());
        Ok(t.ok_or_else(|| Failure::new(format!("`{}` has no {part}", site.module)))?.read_f32()?)
    };
    let (a, b) = (read("lora_A")?, read("lora_B")?);
    let (rank, input, output) = (site.rank as usize, site.input as usize, site.output as usize);
    // Of an embedding [rows, width], a row of the delta is a column of A times B transposed: both factors turned round.
    let (a, b, input) = match site.embedding {
        true => (turned(&b, output, rank), turned(&a, rank, input), output),
        false => (a, b, input),
    };
    let scale = site.scale as f32;
    let mut sum = Sum::new(tensor);
    let mut delta = vec![0.0f32; input];
    for (row, up) in w.chunks_exact(input).zip(b.chunks_exact(rank)) {
        delta.fill(0.0);
        for (k, y) in up.iter().enumerate() {
            for (d, x) in delta.iter_mut().zip(&a[k * input..(k + 1) * input]) {
                *d += y * x;
            }
        }
        for (old, d) in row.iter().zip(&delta) {
            sum.push(*old, scale * d, old + scale * d)?;
        }
    }
    Ok((sum.out, sum.change))
}

/// A tensor being written.
struct Sum<'a> {
    tensor: &'a TensorRef,
    out: Vec<u8>,
    change: Change,
}

impl<'a> Sum<'a> {
    fn new(tensor: &'a TensorRef) -> Sum<'a> {
        Sum { tensor, out: Vec::with_capacity(tensor.bytes as usize), change: Change::default() }
    }

    fn push(&mut self, old: f32, delta: f32, exact: f32) -> Result<()> {
        let new = round(exact, self.tensor.dtype, &mut self.out);
        if !new.is_finite() {
            if !old.is_finite() {
                return Err(Failure::new(format!(
                    "`{}` of the model holds {old}; check its weights",
                    self.tensor.name
                )));
            }
            let why = format!("{exact} of `{}` does not fit into {}", self.tensor.name, self.tensor.dtype);
            return Err(Failure::new(format!("{why}; check the adapter with `pleach adapter check`")));
        }
        self.change.add(old, delta, new);
        Ok(())
    }
}

/// A matrix [rows, columns] as [columns, rows].
fn turned(x: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|c| (0..rows).map(move |r| x[r * columns + c])).collect()
}

/// Appends a value in a type, rounded to nearest even, and gives what it became.
fn round(x: f32, dtype: Dtype, out: &mut Vec<u8>) -> f32 {
    match dtype {
        Dtype::F16 => {
            let h = half::f16::from_f32(x);
            out.extend_from_slice(&h.to_le_bytes());
            h.to_f32()
        }
        Dtype::Bf16 => {
            let h = half::bf16::from_f32(x);
            out.extend_from_slice(&h.to_le_bytes());
            h.to_f32()
        }
        _ => {
            out.extend_from_slice(&x.to_le_bytes());
            x
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_measures_what_rounding_takes() {
        let mut out = vec![];
        let mut c = Change::default();
        // 1 + 2^-9 is halfway between two bf16 numbers and rounds to the even one: the delta is lost.
        let delta = 1.0 / 512.0;
        let new = round(1.0 + delta, Dtype::Bf16, &mut out);
        c.add(1.0, delta, new);
        assert_eq!((new, c.lost(), c.largest), (1.0, 1.0, 0.0));
        let mut c = Change::default();
        c.add(1.0, 0.5, round(1.5, Dtype::F16, &mut out));
        assert_eq!((c.lost(), c.relative(), c.largest), (0.0, 0.5, 0.5));
        assert_eq!(out.len(), 4);
        assert_eq!(turned(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2, 3), [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
        assert!(!round(1e6, Dtype::F16, &mut out).is_finite());
    }
}
