//! Values of a slot's parameters: where they come from, and reading them.
//!
//! Reading checks what a kernel relies on: indices lie inside the weight and none occurs twice.

use std::sync::Arc;

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::tensors::{Dtype, TensorRef};

use super::{Init, Lazy};

/// Where the value of one slot parameter comes from.
#[derive(Debug, Clone, PartialEq)]
pub enum SlotValue {
    /// A tensor of the adapter's file, read as f32.
    Tensor(TensorRef),
    /// Places below a bound, read as i32; none occurs twice.
    Indices {
        /// i32 or i64 [r], or [axes, r] for places in a tensor of several axes.
        tensor: TensorRef,
        /// One past the largest index, per axis.
        below: Vec<u64>,
    },
    /// Columns given as they are, over the scale: read as their difference from the base's columns over the scale.
    Columns {
        /// The columns over the scale, [out, r].
        tensor: TensorRef,
        /// Which columns, [r].
        indices: TensorRef,
        /// Path of the base's weight [out, in].
        weight: String,
        /// The scale.
        scale: f64,
    },
    /// One number everywhere.
    Filled {
        /// Row-major shape.
        shape: Vec<u64>,
        /// The number.
        value: f32,
    },
    /// What was made for a new adapter, or from the base's weights.
    Made(Arc<SlotTensor>),
    /// A new buffer, to be made from its recipe.
    New(Init),
    /// What the base's weights give and the folder does not hold.
    Prepared(Arc<Lazy>, &'static str),
}

/// The elements of a slot tensor.
#[derive(Debug, Clone, PartialEq)]
pub enum SlotData {
    /// Floats.
    F32(Vec<f32>),
    /// Indices.
    I32(Vec<i32>),
}

/// The value of one slot parameter.
#[derive(Debug, Clone, PartialEq)]
pub struct SlotTensor {
    /// Row-major shape.
    pub shape: Vec<u64>,
    /// Elements.
    pub data: SlotData,
}

impl SlotValue {
    /// The tensor of the file, if it is one.
    pub fn tensor(&self) -> Option<&TensorRef> {
        match self {
            SlotValue::Tensor(t) | SlotValue::Indices { tensor: t, .. } | SlotValue::Columns { tensor: t, .. } => {
                Some(t)
            }
            SlotValue::Filled { .. } | SlotValue::Made(_) | SlotValue::New(_) | SlotValue::Prepared(..) => None,
        }
    }

    /// Reads the value. `base` is the model that the adapter belongs to.
    ///
    /// # Errors
    /// A file that can no longer be read, indices out of range or twice, a recipe that only training follows.
    pub fn read(&self, base: &Checkpoint) -> Result<SlotTensor> {
        match self {
            SlotValue::Tensor(t) => Ok(SlotTensor { shape: t.shape.clone(), data: SlotData::F32(t.read_f32()?) }),
            SlotValue::Indices { tensor, below } => {
                Ok(SlotTensor { shape: tensor.shape.clone(), data: SlotData::I32(read_indices(tensor, below)?) })
            }
            SlotValue::Columns { tensor, indices, weight, scale } => {
                let w = base.param(weight).ok_or_else(|| Error::tensor(&base.dir, weight, "is missing"))?;
                let width = w.shape.get(1).copied().unwrap_or(1);
                let columns = read_indices(indices, &[width])?;
                let (mut values, w) = (tensor.read_f32()?, w.read_f32()?);
                for (row, old) in values.chunks_mut(columns.len().max(1)).zip(w.chunks(width as usize)) {
                    for (value, column) in row.iter_mut().zip(&columns) {
                        *value = (f64::from(*value) - f64::from(old[*column as usize]) / scale) as f32;
                    }
                }
                Ok(SlotTensor { shape: tensor.shape.clone(), data: SlotData::F32(values) })
            }
            SlotValue::Filled { shape, value } => {
                let n = shape.iter().product::<u64>() as usize;
                Ok(SlotTensor { shape: shape.clone(), data: SlotData::F32(vec![*value; n]) })
            }
            SlotValue::Made(t) => Ok((**t).clone()),
            SlotValue::Prepared(lazy, part) => lazy.get(base, part),
            SlotValue::New(Init::Constant { value }) => {
                Ok(SlotTensor { shape: vec![], data: SlotData::F32(vec![*value]) })
            }
            SlotValue::New(_) => Err(Error::Graph("a new adapter has no values before training".into())),
        }
    }
}

/// Distinct places below a bound per axis.
fn read_indices(tensor: &TensorRef, below: &[u64]) -> Result<Vec<i32>> {
    let bytes = tensor.read_bytes()?;
    let wide: Vec<i64> = match tensor.dtype {
        Dtype::I64 => bytes.as_chunks().0.iter().map(|&b| i64::from_le_bytes(b)).collect(),
        Dtype::I32 => bytes.as_chunks().0.iter().map(|&b| i64::from(i32::from_le_bytes(b))).collect(),
        other => return Err(Error::tensor(&tensor.file, &tensor.name, format!("is {other}; indices are I64 or I32"))),
    };
    let count = wide.len() / below.len().max(1);
    for (row, below) in wide.chunks(count.max(1)).zip(below) {
        let below = i64::try_from(*below).unwrap_or(i64::MAX).min(i64::from(i32::MAX));
        if let Some(index) = row.iter().find(|i| !(0..below).contains(*i)) {
            let what = format!("holds the index {index}; the weight has {below} columns or rows there");
            return Err(Error::tensor(&tensor.file, &tensor.name, what));
        }
    }
    let mut seen = std::collections::BTreeSet::new();
    for at in 0..count {
        let place: Vec<i64> = wide.iter().skip(at).step_by(count).copied().collect();
        if !seen.insert(place.clone()) {
            let place: Vec<String> = place.iter().map(i64::to_string).collect();
            let what = format!("holds the index {} twice", place.join(", "));
            return Err(Error::tensor(&tensor.file, &tensor.name, what));
        }
    }
    Ok(wide.into_iter().map(|i| i as i32).collect())
}
