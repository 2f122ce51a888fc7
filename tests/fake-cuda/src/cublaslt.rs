//! A stand-in for cuBLASLt: descriptions are kept, and a product is a node of work like a launch, computed by plain loops.
//!
//! Known are matrices of bf16 with f32 or bf16 results, column-major, factors on the device. Addresses and strides that tensor cores
//! would not take are refused, and so is an algorithm that was not asked for with these very descriptions.
#![allow(clippy::missing_safety_doc, reason = "each function is the library's of that name")]
#![allow(non_snake_case, reason = "the names are the library's")]

use crate::api::{UNKNOWN, give};
use crate::graphs::Node;
use crate::state::*;
use pleach_ptx_sim::{Memory, Ptr, SimError};
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};

const INVALID: u32 = 7;
const UNSUPPORTED: u32 = 15;

const F32: u32 = 0;
const BF16: u32 = 14;

/// A matrix, column-major.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    dtype: u32,
    rows: u64,
    columns: u64,
    stride: u64,
}

impl Layout {
    fn size(&self) -> u64 {
        if self.dtype == F32 { 4 } else { 2 }
    }

    fn at(&self, base: u64, row: u64, column: u64) -> Ptr {
        Ptr(base + (column * self.stride + row) * self.size())
    }
}

/// What a product is to be: attributes by their numbers.
type Attributes = BTreeMap<u32, u64>;

#[derive(Debug, Default)]
pub(crate) struct Descriptions {
    layouts: BTreeMap<usize, Layout>,
    products: BTreeMap<usize, Attributes>,
    preferences: BTreeMap<usize, Attributes>,
    handles: usize,
}

/// A product with its addresses: `d = alpha · a · b + beta · d`.
#[derive(Clone, Debug)]
pub(crate) struct Product {
    turned: [bool; 2],
    layouts: [Layout; 3],
    at: [u64; 3],
    factors: [u64; 2],
}

impl Product {
    /// Rows, columns and terms; `None` where the matrices do not fit together.
    fn sizes(&self) -> Option<[u64; 3]> {
        let [a, b, d] = &self.layouts;
        let of = |x: &Layout, turned: bool| if turned { (x.columns, x.rows) } else { (x.rows, x.columns) };
        let ((m, k), (k2, n)) = (of(a, self.turned[0]), of(b, self.turned[1]));
        (k == k2 && (m, n) == (d.rows, d.columns)).then_some([m, n, k])
    }

    /// Computes it. What depends on bytes that nobody wrote counts as not written.
    pub(crate) fn run(&self, memory: &mut Memory) -> Result<(), SimError> {
        let Some([m, n, k]) = self.sizes() else { return Err(SimError::Host("matrices do not fit".into())) };
        let [a, b, d] = &self.layouts;
        let float = |memory: &Memory, at: Ptr, dtype: u32| -> Result<(f32, bool), SimError> {
            let bytes = if dtype == F32 { 4 } else { 2 };
            let written = memory.read(at, bytes).is_ok();
            let raw = memory.read_raw(at, bytes)?;
            let word = match *raw {
                [x, y, z, w] => u32::from_le_bytes([x, y, z, w]),
                [x, y] => u32::from_le_bytes([0, 0, x, y]),
                _ => 0,
            };
            Ok((f32::from_bits(word), written))
        };
        let [(alpha, _), (beta, _)] =
            [float(memory, Ptr(self.factors[0]), F32)?, float(memory, Ptr(self.factors[1]), F32)?];
        let matrix = |memory: &Memory, x: &Layout, at: u64| -> Result<Vec<(f32, bool)>, SimError> {
            let all = (0..x.columns).flat_map(|c| (0..x.rows).map(move |r| (r, c)));
            all.map(|(r, c)| float(memory, x.at(at, r, c), x.dtype)).collect()
        };
        let (left, right) = (matrix(memory, a, self.at[0])?, matrix(memory, b, self.at[1])?);
        let pick = |x: &Layout, turned: bool, i: u64, j: u64| {
            let (r, c) = if turned { (j, i) } else { (i, j) };
            (c * x.rows + r) as usize
        };
        for j in 0..n {
            for i in 0..m {
                let (mut sum, mut written) = (0.0, true);
                for s in 0..k {
                    let (x, y) = (left[pick(a, self.turned[0], i, s)], right[pick(b, self.turned[1], s, j)]);
                    sum += x.0 * y.0;
                    written &= x.1 && y.1;
                }
                let at = d.at(self.at[2], i, j);
                sum *= alpha;
                if beta != 0.0 {
                    let (old, was) = float(memory, at, d.dtype)?;
                    sum += beta * old;
                    written &= was;
                }
                if !written {
                    memory.forget(at, d.size() as usize)?;
                } else if d.dtype == F32 {
                    memory.write(at, &sum.to_le_bytes())?;
                } else {
                    memory.write(at, &pleach_ptx_sim::f32_to_bf16(sum).to_le_bytes())?;
                }
            }
        }
        Ok(())
    }
}

impl Descriptions {
    /// The product of these descriptions, without addresses.
    fn product(&self, desc: usize, layouts: [usize; 3]) -> Result<Product, u32> {
        let told = self.products.get(&desc).ok_or(INVALID)?;
        let [a, b, d] = layouts.map(|l| self.layouts.get(&l).copied());
        let layouts = [a.ok_or(INVALID)?, b.ok_or(INVALID)?, d.ok_or(INVALID)?];
        // Attributes: 2 is where the factors lie, 3 and 4 whether operands are turned.
        if told.get(&2) != Some(&1) {
            return Err(UNSUPPORTED);
        }
        let turned = [3, 4].map(|n| told.get(&n) == Some(&1));
        let p = Product { turned, layouts, at: [0; 3], factors: [0; 2] };
        let strides = layouts.iter().all(|l| l.stride >= l.rows && l.stride * l.size() % 16 == 0);
        if layouts[0].dtype != BF16 || layouts[1].dtype != BF16 || !strides || p.sizes().is_none() {
            return Err(UNSUPPORTED);
        }
        Ok(p)
    }
}

/// What an algorithm's numbers are: of these descriptions, and no others.
fn stamp(p: &Product) -> [u64; 8] {
    let mut out = [0x626c_6173, 0, 0, 0, 0, 0, 0, 0];
    for (i, l) in p.layouts.iter().enumerate() {
        out[1 + 2 * i] = l.rows << 32 | l.columns;
        out[2 + 2 * i] = l.stride << 32 | u64::from(l.dtype) << 1 | u64::from(i < 2 && p.turned[i]);
    }
    out
}

/// An attribute of 4 or 8 bytes.
unsafe fn attribute(buffer: *const c_void, bytes: usize) -> Result<u64, u32> {
    // SAFETY: the caller gives so many bytes.
    unsafe {
        match bytes {
            4 => Ok(u64::from(buffer.cast::<u32>().read_unaligned())),
            8 => Ok(buffer.cast::<u64>().read_unaligned()),
            _ => Err(INVALID),
        }
    }
}

export! {
    within fn cublasLtCreate(s | out: *mut usize) {
        s.told.handles += 1;
        let h = s.handle();
        // SAFETY: see `give`.
        unsafe { give(out, h) }
    }

    within fn cublasLtDestroy(s | _handle: usize) {
        s.told.handles = s.told.handles.checked_sub(1).ok_or(INVALID)?;
        Ok(())
    }

    without fn cublasLtMatmulDescCreate(s | out: *mut usize, compute: u32, scale: u32) {
        if compute != 68 || scale != F32 {
            return Err(UNSUPPORTED);
        }
        let h = s.handle();
        s.told.products.insert(h, Attributes::new());
        // SAFETY: see `give`.
        unsafe { give(out, h) }
    }

    without fn cublasLtMatmulDescSetAttribute(s | desc: usize, number: u32, buffer: *const c_void, bytes: usize) {
        if !(2..=4).contains(&number) || bytes != 4 {
            return Err(UNSUPPORTED);
        }
        // SAFETY: see `attribute`.
        let value = unsafe { attribute(buffer, bytes)? };
        s.told.products.get_mut(&desc).ok_or(INVALID)?.insert(number, value);
        Ok(())
    }

    without fn cublasLtMatmulDescDestroy(s | desc: usize) {
        s.told.products.remove(&desc).map(|_| ()).ok_or(INVALID)
    }

    without fn cublasLtMatrixLayoutCreate(s | out: *mut usize, dtype: u32, rows: u64, columns: u64, stride: i64) {
        if ![F32, BF16].contains(&dtype) || rows == 0 || columns == 0 || stride <= 0 {
            return Err(INVALID);
        }
        let h = s.handle();
        s.told.layouts.insert(h, Layout { dtype, rows, columns, stride: stride as u64 });
        // SAFETY: see `give`.
        unsafe { give(out, h) }
    }

    without fn cublasLtMatrixLayoutDestroy(s | layout: usize) {
        s.told.layouts.remove(&layout).map(|_| ()).ok_or(INVALID)
    }

    without fn cublasLtMatmulPreferenceCreate(s | out: *mut usize) {
        let h = s.handle();
        s.told.preferences.insert(h, Attributes::new());
        // SAFETY: see `give`.
        unsafe { give(out, h) }
    }

    without fn cublasLtMatmulPreferenceSetAttribute(s | wish: usize, number: u32, buffer: *const c_void, bytes: usize) {
        let wide = number == 1;
        if ![1, 3, 5, 6, 7, 8].contains(&number) || bytes != if wide { 8 } else { 4 } {
            return Err(UNSUPPORTED);
        }
        // SAFETY: see `attribute`.
        let value = unsafe { attribute(buffer, bytes)? };
        s.told.preferences.get_mut(&wish).ok_or(INVALID)?.insert(number, value);
        Ok(())
    }

    without fn cublasLtMatmulPreferenceDestroy(s | wish: usize) {
        s.told.preferences.remove(&wish).map(|_| ()).ok_or(INVALID)
    }

    within fn cublasLtMatmulAlgoGetHeuristic(
        s | _handle: usize, desc: usize, a: usize, b: usize, c: usize, d: usize, wish: usize, asked: i32,
        out: *mut [u64; 12], found: *mut i32,
    ) {
        // Usual alignment is 256 bytes, and sums in the result's own type depend on the order of blocks.
        let wish = s.told.preferences.get(&wish).ok_or(INVALID)?;
        let modest = [5, 6, 7, 8].iter().all(|n| wish.get(n).is_some_and(|v| *v <= 16));
        if asked != 1 || c != d || !modest || wish.get(&3) != Some(&2) {
            return Err(UNSUPPORTED);
        }
        let p = s.told.product(desc, [a, b, d])?;
        // The algorithm, the workspace, the state; waves and what is reserved stay zero.
        let mut answer = [0; 12];
        answer[..8].copy_from_slice(&stamp(&p));
        // SAFETY: see `give`.
        unsafe {
            give(out, answer)?;
            give(found, 1)
        }
    }

    within fn cublasLtMatmul(
        s | _handle: usize, desc: usize, alpha: u64, a: u64, a_layout: usize, b: u64, b_layout: usize, beta: u64, c: u64,
        c_layout: usize, d: u64, d_layout: usize, algorithm: *const [u64; 8], _workspace: u64, _bytes: usize, stream: usize,
    ) {
        let p = s.told.product(desc, [a_layout, b_layout, d_layout])?;
        // SAFETY: the caller gives an algorithm.
        let asked = !algorithm.is_null() && unsafe { algorithm.read() } == stamp(&p);
        if !asked || (c, c_layout) != (d, d_layout) || [a, b, d].iter().any(|x| x % 16 != 0) {
            return Err(INVALID);
        }
        s.log("product");
        let p = Product { at: [a, b, d], factors: [alpha, beta], ..p };
        s.push(stream, Work::Run(Box::new(Node::Product(Box::new(p)))))
    }
}
