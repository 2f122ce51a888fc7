//! Weights in blocks of codes beside the same weights as numbers: `blocks/model.safetensors` of a model folder.
//!
//! A plan may ask for a matrix as its blocks ([`Layout::Blocks`]): the same values in a fraction of the bytes. What the
//! numbers are is said by the model's own files alone; blocks are used only when they expand to exactly these, which
//! [`first_difference`] tells, bit by bit. The expansion is ggml's (`dequantize_row_*`).
#![allow(unsafe_code)]

use crate::cast::f16_to_f32;
use crate::error::{Result, RuntimeError};
use crate::weights::{Tensor, TensorSource, give_back, map};
use memmap2::Mmap;
use pleach_plan::{BlockFormat, DType, Layout, Param, Source};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Values of a block.
const VALUES: usize = BlockFormat::VALUES as usize;

/// A matrix in blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks<'a> {
    /// What a block is.
    pub format: BlockFormat,
    /// Rows, and bytes of a row.
    pub shape: [u64; 2],
    /// Block after block, row after row.
    pub bytes: &'a [u8],
}

impl Blocks<'_> {
    /// Rows and columns of the matrix that they stand for.
    pub fn matrix(&self) -> [u64; 2] {
        [self.shape[0], self.shape[1] / self.format.bytes() * BlockFormat::VALUES]
    }
}

/// The file with the blocks of a model folder.
#[derive(Debug)]
pub(crate) struct BlockFile {
    map: Mmap,
    tensors: BTreeMap<String, (BlockFormat, [u64; 2], Range<usize>)>,
}

impl BlockFile {
    /// Where it is.
    pub(crate) fn path(folder: &Path) -> PathBuf {
        folder.join("blocks").join("model.safetensors")
    }

    /// Maps it and checks that every tensor consists of whole blocks of a known format.
    ///
    /// # Errors
    /// [`RuntimeError::Io`] and [`RuntimeError::File`].
    pub(crate) fn open(path: &Path) -> Result<BlockFile> {
        let (map, start, meta) = map(path)?;
        let formats = meta.metadata().clone().unwrap_or_default();
        let mut tensors = BTreeMap::new();
        for name in meta.offset_keys() {
            let Some(info) = meta.info(&name) else { continue };
            let format = formats.get(&name).and_then(|f| BlockFormat::from_name(f));
            let bytes = start + info.data_offsets.0..start + info.data_offsets.1;
            let matrix = match (info.dtype, &info.shape[..], format) {
                (safetensors::Dtype::U8, [n, row], Some(f)) if (*row as u64).is_multiple_of(f.bytes()) => {
                    Some((f, [*n as u64, *row as u64]))
                }
                _ => None,
            };
            let Some((format, shape)) = matrix.filter(|_| map.get(bytes.clone()).is_some()) else {
                return Err(RuntimeError::File {
                    file: path.display().to_string(),
                    why: format!("tensor `{name}` is no matrix in blocks; import the model again"),
                });
            };
            tensors.insert(name, (format, shape, bytes));
        }
        Ok(BlockFile { map, tensors })
    }

    /// The blocks of a tensor.
    pub(crate) fn get(&self, name: &str) -> Option<Blocks<'_>> {
        let (format, shape, bytes) = self.tensors.get(name)?;
        Some(Blocks { format: *format, shape: *shape, bytes: self.map.get(bytes.clone())? })
    }

    /// Gives back the pages of a tensor.
    pub(crate) fn release(&self, name: &str) {
        if let Some((.., bytes)) = self.tensors.get(name) {
            give_back(&self.map, bytes);
        }
    }
}

/// The bytes of a checkpoint parameter as a source has them: its elements, or its blocks where the plan asks for these. A
/// tensor of blocks has the parameter's type and no shape.
pub(crate) fn stored<'w>(weights: &'w dyn TensorSource, p: &Param, name: &str) -> Option<Tensor<'w>> {
    match p.layout {
        Layout::Blocks(_) => {
            let b = weights.blocks(name).ok()?;
            misfit(p, &b).is_none().then_some(Tensor { dtype: p.dtype, shape: &[], bytes: b.bytes })
        }
        _ => weights.tensor(name),
    }
}

/// Gives back the pages that [`stored`] is in.
pub(crate) fn release(weights: &dyn TensorSource, p: &Param, name: &str) {
    match p.layout {
        Layout::Blocks(_) => weights.release_blocks(name),
        _ => weights.release(name),
    }
}

/// Why blocks cannot be given for a parameter.
fn misfit(p: &Param, b: &Blocks<'_>) -> Option<String> {
    let Layout::Blocks(format) = p.layout else { return Some("are not asked for".into()) };
    let want: Option<Vec<u64>> = p.shape.iter().map(|d| d.eval(&[]).ok()).collect();
    let bytes = b.shape[0].checked_mul(b.shape[1]);
    if b.format == format && want.as_deref() == Some(&b.matrix()) && bytes == Some(b.bytes.len() as u64) {
        return None;
    }
    let (has, asked) = (b.format.name(), format.name());
    Some(format!("are {has} {:?}, the plan expects {asked} {:?}", b.matrix(), want.unwrap_or_default()))
}

/// Checks that a source has the blocks that a parameter needs.
pub(crate) fn fits(weights: &dyn TensorSource, p: &Param, name: &str) -> std::result::Result<(), String> {
    let advice = "import the model again, or compile the plan again with --no-blocks";
    let b = weights
        .blocks(name)
        .map_err(|why| format!("the plan was compiled for weights in blocks, which cannot be had ({why}); {advice}"))?;
    misfit(p, &b).map_or(Ok(()), |why| Err(format!("the blocks of tensor `{name}` {why}; {advice}")))
}

/// Checks that the blocks of all parameters that are asked for so stand for the tensors of the source.
///
/// # Errors
/// [`RuntimeError::Weights`] with the first tensor whose blocks do not.
pub(crate) fn stand(weights: &dyn TensorSource, params: &[Param], threads: usize) -> Result<()> {
    let name = |p: &'_ Param| match (&p.source, p.layout) {
        (Source::Checkpoint(name), Layout::Blocks(_)) => Some(name.clone()),
        _ => None,
    };
    let names: Vec<String> = params.iter().filter_map(name).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    match first_difference(weights, &names, threads, 1) {
        None => Ok(()),
        Some(name) => Err(RuntimeError::Weights(format!(
            "the blocks of tensor `{name}` do not stand for its values, which have changed since; import the model again, \
             or compile the plan again with --no-blocks"
        ))),
    }
}

/// Bytes of elements that are compared before pages are given back.
const PART: usize = 4 << 20;

/// The first of these tensors, by name, whose blocks do not expand to exactly its elements: other bits, another shape or
/// type, no blocks or no tensor. Pages that are read are given back, tensor by tensor. Every `every`-th row is looked at: 1
/// proves that all are the same.
pub fn first_difference(weights: &dyn TensorSource, names: &[&str], threads: usize, every: usize) -> Option<String> {
    // The largest first, so that no thread is left alone with one at the end.
    let mut order: Vec<&str> = names.to_vec();
    order.sort_by_key(|n| (std::cmp::Reverse(weights.tensor(n).map_or(0, |t| t.bytes.len())), *n));
    order.dedup();
    let (next, found) = (AtomicUsize::new(0), Mutex::new(None::<String>));
    let work = || {
        while let Some(name) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
            if !same(weights, name, every) {
                let mut found = found.lock().unwrap_or_else(|e| e.into_inner());
                if found.as_deref().is_none_or(|f| *name < f) {
                    *found = Some((*name).to_string());
                }
            }
            weights.release(name);
            weights.release_blocks(name);
        }
    };
    let wish = if threads == 0 { std::thread::available_parallelism().map_or(1, usize::from) } else { threads };
    std::thread::scope(|s| {
        for _ in 1..wish.min(order.len()) {
            s.spawn(work);
        }
        work();
    });
    found.into_inner().unwrap_or_else(|e| e.into_inner())
}

fn same(weights: &dyn TensorSource, name: &str, every: usize) -> bool {
    let (Some(t), Ok(b)) = (weights.tensor(name), weights.blocks(name)) else { return false };
    let size = b.format.bytes() as usize;
    let count = b.bytes.len() / size;
    let fits = t.dtype == DType::F32 && t.shape == b.matrix() && t.bytes.len() == count * VALUES * 4;
    let mut values = [0.0; VALUES];
    let mut row = |blocks: &[u8], elements: &[u8]| {
        blocks.chunks_exact(size).zip(elements.chunks_exact(VALUES * 4)).all(|(block, want)| {
            expand(b.format, block, &mut values);
            let want = want.as_chunks().0.iter().map(|w| u32::from_le_bytes(*w));
            // Without a branch per value.
            values.iter().zip(want).fold(0, |d, (x, w)| d | (x.to_bits() ^ w)) == 0
        })
    };
    let width = b.shape[1].max(1) as usize;
    let rows = b.bytes.chunks_exact(width).zip(t.bytes.chunks_exact(width / size * VALUES * 4));
    // A large tensor goes part by part: whoever compares may have a session's memory already.
    let mut read = 0;
    fits && rows.step_by(every.max(1)).all(|(blocks, elements)| {
        read += elements.len();
        if read > PART {
            read = 0;
            weights.release(name);
            weights.release_blocks(name);
        }
        row(blocks, elements)
    })
}

/// The values of a block of [`BlockFormat::bytes`] bytes.
pub fn expand(format: BlockFormat, block: &[u8], to: &mut [f32; VALUES]) {
    let half = |i: usize| f16_to_f32(u16::from_le_bytes([block[2 * i], block[2 * i + 1]]));
    let d = half(0);
    // Low halves are the first sixteen values, high halves the others.
    let nibbles = |codes: &[u8], to: &mut [f32; VALUES], value: &dyn Fn(f32) -> f32| {
        let (low, high) = to.split_at_mut(VALUES / 2);
        for ((c, x), y) in codes.iter().zip(low).zip(high) {
            (*x, *y) = (value(f32::from(c & 15)), value(f32::from(c >> 4)));
        }
    };
    match format {
        BlockFormat::Q4_0 => nibbles(&block[2..], to, &|q| (q - 8.0) * d),
        BlockFormat::Q4_1 => {
            let m = half(1);
            nibbles(&block[4..], to, &|q| q * d + m);
        }
        BlockFormat::Q8_0 => {
            for (c, x) in block[2..].iter().zip(to) {
                *x = f32::from(*c as i8) * d;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_expand_as_ggml_defines_them() {
        let mut values = [0.0; VALUES];
        // Scale 0.5, minimum -2, codes 0x21: low 1, high 2.
        let halves = [0x00, 0x38, 0x00, 0xc0];
        expand(BlockFormat::Q4_0, &[&halves[..2], &[0x21; 16]].concat(), &mut values);
        assert_eq!((values[0], values[15], values[16], values[31]), (-3.5, -3.5, -3.0, -3.0));
        expand(BlockFormat::Q4_1, &[&halves[..], &[0x21; 16]].concat(), &mut values);
        assert_eq!((values[0], values[15], values[16], values[31]), (-1.5, -1.5, -1.0, -1.0));
        let codes: Vec<u8> = (0..32).map(|i| (i * 8) as u8).collect();
        expand(BlockFormat::Q8_0, &[&halves[..2], &codes[..]].concat(), &mut values);
        assert_eq!((values[1], values[15], values[16], values[31]), (4.0, 60.0, -64.0, -4.0));
    }
}
