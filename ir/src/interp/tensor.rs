//! A tensor with its values: what the interpreter computes on.
//!
//! Row-major and dense. bf16 and f16 are held as their bits. Nothing here knows operators.

use super::half::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use crate::error::IrError;
use crate::types::DType;
use std::borrow::Cow;

/// The elements of a tensor by element type.
#[derive(Clone, PartialEq, Debug)]
pub enum Data {
    /// IEEE binary32.
    F32(Vec<f32>),
    /// Bits of bf16 values.
    BF16(Vec<u16>),
    /// Bits of IEEE binary16 values.
    F16(Vec<u16>),
    /// Signed integers.
    I32(Vec<i32>),
    /// 0 or 1.
    Bool(Vec<u8>),
}

impl Data {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Data::F32(v) => v.len(),
            Data::BF16(v) | Data::F16(v) => v.len(),
            Data::I32(v) => v.len(),
            Data::Bool(v) => v.len(),
        }
    }

    /// True without elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A tensor with its values, row-major. The number of elements is checked where a tensor is used, not where it is made.
#[derive(Clone, PartialEq, Debug)]
pub struct Tensor {
    /// Dimensions, outermost first.
    pub shape: Vec<u64>,
    /// Elements.
    pub data: Data,
}

impl Tensor {
    /// An f32 tensor.
    pub fn f32(shape: impl Into<Vec<u64>>, values: Vec<f32>) -> Tensor {
        Tensor { shape: shape.into(), data: Data::F32(values) }
    }

    /// An i32 tensor.
    pub fn i32(shape: impl Into<Vec<u64>>, values: Vec<i32>) -> Tensor {
        Tensor { shape: shape.into(), data: Data::I32(values) }
    }

    /// A bool tensor.
    pub fn bool(shape: impl Into<Vec<u64>>, values: &[bool]) -> Tensor {
        Tensor { shape: shape.into(), data: Data::Bool(values.iter().map(|b| u8::from(*b)).collect()) }
    }

    /// A float tensor of any float type, the values rounded to it. Other types are cast as [`crate::Op::Cast`] does.
    pub fn from_floats(dtype: DType, shape: impl Into<Vec<u64>>, values: Vec<f32>) -> Tensor {
        let data = match dtype {
            DType::F32 => Data::F32(values),
            DType::BF16 => Data::BF16(values.into_iter().map(f32_to_bf16).collect()),
            DType::F16 => Data::F16(values.into_iter().map(f32_to_f16).collect()),
            DType::I32 => Data::I32(values.into_iter().map(|x| x as i32).collect()),
            DType::Bool => Data::Bool(values.into_iter().map(|x| u8::from(x != 0.0)).collect()),
        };
        Tensor { shape: shape.into(), data }
    }

    /// Zeros (false).
    pub fn zeros(dtype: DType, shape: impl Into<Vec<u64>>) -> Tensor {
        let shape = shape.into();
        let n = shape.iter().product::<u64>() as usize;
        let data = match dtype {
            DType::F32 => Data::F32(vec![0.0; n]),
            DType::BF16 => Data::BF16(vec![0; n]),
            DType::F16 => Data::F16(vec![0; n]),
            DType::I32 => Data::I32(vec![0; n]),
            DType::Bool => Data::Bool(vec![0; n]),
        };
        Tensor { shape, data }
    }

    /// A tensor from little-endian bytes, as checkpoints and buffers hold them.
    ///
    /// # Errors
    /// [`IrError::Interpret`] when the number of bytes is not what the shape says.
    pub fn from_bytes(dtype: DType, shape: impl Into<Vec<u64>>, bytes: &[u8]) -> Result<Tensor, IrError> {
        let shape = shape.into();
        let want = shape.iter().try_fold(dtype.size(), |n, d| n.checked_mul(*d));
        if want != Some(bytes.len() as u64) {
            return Err(IrError::Interpret(format!("{} bytes for a tensor {dtype}{shape:?}", bytes.len())));
        }
        let (four, _) = bytes.as_chunks::<4>();
        let (two, _) = bytes.as_chunks::<2>();
        let data = match dtype {
            DType::F32 => Data::F32(four.iter().map(|b| f32::from_le_bytes(*b)).collect()),
            DType::I32 => Data::I32(four.iter().map(|b| i32::from_le_bytes(*b)).collect()),
            DType::BF16 => Data::BF16(two.iter().map(|b| u16::from_le_bytes(*b)).collect()),
            DType::F16 => Data::F16(two.iter().map(|b| u16::from_le_bytes(*b)).collect()),
            DType::Bool => Data::Bool(bytes.iter().map(|b| u8::from(*b != 0)).collect()),
        };
        Ok(Tensor { shape, data })
    }

    /// The elements as little-endian bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        match &self.data {
            Data::F32(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Data::BF16(v) | Data::F16(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Data::I32(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Data::Bool(v) => v.clone(),
        }
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        match self.data {
            Data::F32(_) => DType::F32,
            Data::BF16(_) => DType::BF16,
            Data::F16(_) => DType::F16,
            Data::I32(_) => DType::I32,
            Data::Bool(_) => DType::Bool,
        }
    }

    /// The elements of an f32 tensor.
    pub fn as_f32(&self) -> Option<&[f32]> {
        if let Data::F32(v) = &self.data { Some(v) } else { None }
    }

    /// The elements of an i32 tensor.
    pub fn as_i32(&self) -> Option<&[i32]> {
        if let Data::I32(v) = &self.data { Some(v) } else { None }
    }

    /// The elements of any tensor as f32 (exact for floats; large integers round).
    pub fn floats(&self) -> Cow<'_, [f32]> {
        match &self.data {
            Data::F32(v) => Cow::Borrowed(v),
            Data::BF16(v) => v.iter().map(|h| bf16_to_f32(*h)).collect(),
            Data::F16(v) => v.iter().map(|h| f16_to_f32(*h)).collect(),
            Data::I32(v) => v.iter().map(|x| *x as f32).collect(),
            Data::Bool(v) => v.iter().map(|x| f32::from(*x)).collect(),
        }
    }

    /// How far this tensor is from a reference: the largest absolute difference over the largest absolute value of the
    /// reference. Infinite when types or shapes differ, or where only one of two elements is NaN.
    pub fn relative_error(&self, reference: &Tensor) -> f64 {
        if self.dtype() != reference.dtype() || self.shape != reference.shape || self.data.len() != reference.data.len()
        {
            return f64::INFINITY;
        }
        let (mut diff, mut size) = (0f64, 0f64);
        for (a, b) in self.floats().iter().zip(reference.floats().iter()) {
            if a == b || a.is_nan() && b.is_nan() {
                size = size.max(if b.is_finite() { f64::from(b.abs()) } else { 0.0 });
                continue;
            }
            let d = (f64::from(*a) - f64::from(*b)).abs();
            diff = diff.max(if d.is_nan() { f64::INFINITY } else { d });
            size = size.max(f64::from(b.abs()));
        }
        if diff == 0.0 { 0.0 } else { diff / size.max(f64::from(f32::MIN_POSITIVE)) }
    }

    /// The type in words, for messages: `f32[2,3]`.
    pub(super) fn describe(&self) -> String {
        let dims: Vec<String> = self.shape.iter().map(u64::to_string).collect();
        format!("{}[{}]", self.dtype(), dims.join(","))
    }

    /// The number of elements is what the shape says.
    pub(super) fn check(&self) -> Result<(), String> {
        if super::small(&self.shape) && self.shape.iter().product::<u64>() == self.data.len() as u64 {
            return Ok(());
        }
        Err(format!("has {} elements, but its shape says {}", self.data.len(), self.describe()))
    }
}
