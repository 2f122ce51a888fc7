//! Products that a library of the machine may compute in place of a kernel's own code: cuBLASLt on NVIDIA GPUs.

use crate::expr::{Expr, ExprError};
use crate::types::{DType, Launch, When};
use serde::{Deserialize, Serialize};

/// A run of a GPU kernel by a library: the products in order, then the launches. Where the machine has no such library, or the
/// library has no code for a product, the kernel's own launches run.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ByLibrary {
    /// Products, each after the one before.
    pub products: Vec<Product>,
    /// What is computed from them, and what runs in their place for few rows.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub launches: Vec<Launch>,
}

/// `to = scale · left · right`, or that added to what is there. Operands are bf16, sums f32.
///
/// The rows may be evaluated at a larger count than a run has: rows past the end are written and never read.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Product {
    /// Rows of the result. Each is at least 1.
    pub rows: Expr,
    /// Columns of the result.
    pub columns: u64,
    /// Length of the sum.
    pub depth: u64,
    /// The left operand: its lines are rows of the result.
    pub left: Matrix,
    /// The right operand: its lines are columns of the result.
    pub right: Matrix,
    /// Buffer of one f32 that multiplies the product.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<u32>,
    /// It is added to what is there.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub adds: bool,
    /// Where the result lies.
    pub to: Target,
    /// Counts for which it runs; `None`: always.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub when: Option<When>,
}

/// An operand of a [`Product`], bf16: a line of it meets a line of the other operand in an element of the result.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Matrix {
    /// Buffer of the kernel: operands, then results.
    pub buffer: u32,
    /// Bytes before its first element, a multiple of 16.
    #[serde(default)]
    pub offset: u64,
    /// Elements from one line to the next; from one step of the sum to the next where lines lie across. A multiple of 8.
    pub stride: u64,
    /// Lines lie across the sum: neighbours in memory belong to neighbouring lines.
    #[serde(default)]
    pub across: bool,
}

/// Where the result of a [`Product`] lies, row-major.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Target {
    /// Buffer of the kernel; `None`: its scratch memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub buffer: Option<u32>,
    /// f32, or bf16, to which the sum is rounded.
    pub dtype: DType,
    /// Bytes before its first element, a multiple of 16.
    #[serde(default)]
    pub offset: u64,
    /// Elements from one row to the next, a multiple of 16 bytes.
    pub stride: u64,
}

impl Product {
    /// Whether it runs at these counts.
    ///
    /// # Errors
    /// As [`Expr::eval`].
    pub fn runs(&self, env: &[u64]) -> Result<bool, ExprError> {
        self.when.as_ref().map_or(Ok(true), |w| w.holds(env))
    }

    /// Bytes of the left operand's buffer, of the right one's, and of the result's that it touches, from their start on, for so
    /// many rows; `None` where they are no number.
    pub fn touches(&self, rows: u64) -> Option<[u64; 3]> {
        let operand = |m: &Matrix, lines: u64| {
            let (far, near) = if m.across { (self.depth, lines) } else { (lines, self.depth) };
            end(m.offset, far, m.stride, near, DType::BF16)
        };
        let to = &self.to;
        Some([
            operand(&self.left, rows)?,
            operand(&self.right, self.columns)?,
            end(to.offset, rows, to.stride, self.columns, to.dtype)?,
        ])
    }

    /// Whether strides and offsets are such that a library takes them, and lines do not overlap.
    pub(crate) fn is_aligned(&self) -> bool {
        let operand = |m: &Matrix, lines: Option<u64>| {
            let near = if m.across { lines } else { Some(self.depth) };
            m.offset.is_multiple_of(16) && m.stride.is_multiple_of(8) && near.is_none_or(|n| n <= m.stride)
        };
        let to = &self.to;
        let result = matches!(to.dtype, DType::F32 | DType::BF16)
            && to.offset.is_multiple_of(16)
            && to.stride.is_multiple_of(16 / to.dtype.size())
            && to.stride >= self.columns;
        self.columns > 0
            && self.depth > 0
            && operand(&self.left, self.rows.known())
            && operand(&self.right, Some(self.columns))
            && result
    }
}

/// The end of a matrix: `far` lines of `near` elements.
fn end(offset: u64, far: u64, stride: u64, near: u64, dtype: DType) -> Option<u64> {
    let elements = far.checked_sub(1)?.checked_mul(stride)?.checked_add(near)?;
    elements.checked_mul(dtype.size())?.checked_add(offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_touches_what_its_strides_say() {
        let matrix = |stride, across| Matrix { buffer: 0, offset: 16, stride, across };
        let p = Product {
            rows: Expr::Sym(0),
            columns: 8,
            depth: 24,
            left: matrix(32, false),
            right: matrix(16, true),
            scale: None,
            adds: false,
            to: Target { buffer: None, dtype: DType::F32, offset: 0, stride: 12 },
            when: None,
        };
        assert!(p.is_aligned());
        // 5 rows: 4 strides and a line of 24; 23 strides and 8 columns; 4 strides and 8 columns of 4 bytes.
        assert_eq!(p.touches(5), Some([16 + (4 * 32 + 24) * 2, 16 + (23 * 16 + 8) * 2, (4 * 12 + 8) * 4]));
        assert_eq!(p.touches(0), None);
        assert_eq!(p.touches(u64::MAX), None);
        let bad = [
            Product { left: matrix(16, false), ..p.clone() },
            Product { right: matrix(12, true), ..p.clone() },
            Product { columns: 0, ..p.clone() },
            Product { to: Target { stride: 10, ..p.to.clone() }, ..p.clone() },
            Product { to: Target { dtype: DType::I32, ..p.to.clone() }, ..p.clone() },
        ];
        assert!(bad.iter().all(|p| !p.is_aligned()));
    }
}
