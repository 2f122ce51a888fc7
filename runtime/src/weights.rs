//! Where the values of parameters come from: mapped safetensors files, or anything else that implements
//! [`TensorSource`].
//!
//! Files are mapped read-only and never written. A file that another program shortens while it is mapped ends this one
//! (the system's SIGBUS), as with every mapped file.
#![allow(unsafe_code)]

use crate::blocks::{BlockFile, Blocks, expand};
use crate::cast;
use crate::error::{Result, RuntimeError};
use memmap2::{Mmap, UncheckedAdvice};
use pleach_plan::random::Philox;
use pleach_plan::{BlockFormat, DType, Layout, Plan, Source};
use safetensors::SafeTensors;
use safetensors::tensor::Metadata;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

/// A tensor as bytes, little endian, row-major.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    /// Element type.
    pub dtype: DType,
    /// Dimensions.
    pub shape: &'a [u64],
    /// Elements.
    pub bytes: &'a [u8],
}

/// Tensors by name.
pub trait TensorSource: Send + Sync {
    /// All names, sorted.
    fn names(&self) -> Vec<&str>;
    /// The tensor of that name.
    fn tensor(&self, name: &str) -> Option<Tensor<'_>>;
    /// Hint: this tensor is not read for a while, its pages may go.
    fn release(&self, _name: &str) {}
    /// The tensor of that name as blocks of codes, for sources that have it so too.
    ///
    /// # Errors
    /// Why there are none.
    fn blocks(&self, _name: &str) -> std::result::Result<Blocks<'_>, String> {
        Err("these weights are not in blocks".into())
    }
    /// As [`TensorSource::release`], of its blocks.
    fn release_blocks(&self, _name: &str) {}
    /// Bytes from which on a tensor is worth being read where it lies: one read of a mapped file may bring in more than a small
    /// tensor around it.
    fn worth_in_place(&self) -> usize {
        0
    }
}

/// The weights of a session. They stay mapped as long as a session uses them.
pub type Weights = Arc<dyn TensorSource>;

struct Place {
    file: usize,
    dtype: Option<DType>,
    type_name: String,
    shape: Vec<u64>,
    bytes: Range<usize>,
}

/// Mapped safetensors files.
pub struct Files {
    files: Vec<(PathBuf, Mmap)>,
    tensors: BTreeMap<String, Place>,
    /// The file with blocks: opened when somebody asks, or why it is not.
    blocks: OnceLock<std::result::Result<BlockFile, String>>,
    blocks_path: PathBuf,
}

/// Maps a safetensors file: the map, where its data starts, and its header.
///
/// # Errors
/// [`RuntimeError::Io`], and [`RuntimeError::File`] for a damaged header.
pub(crate) fn map(path: &Path) -> Result<(Mmap, usize, Metadata)> {
    let shown = path.display().to_string();
    let bad = |why: String| RuntimeError::File { file: shown.clone(), why };
    let file = File::open(path).map_err(RuntimeError::io(shown.clone()))?;
    if file.metadata().map_err(RuntimeError::io(shown.clone()))?.len() < 8 {
        return Err(bad("is too short to be a safetensors file; fetch it again".into()));
    }
    // SAFETY: the mapping is read-only and private to whom it is given; the module text says what a foreign write does.
    let map = unsafe { Mmap::map(&file) }.map_err(RuntimeError::io(shown.clone()))?;
    let (header, meta) = SafeTensors::read_metadata(&map)
        .map_err(|e| bad(format!("is no usable safetensors file ({e}); it may be cut off, fetch it again")))?;
    Ok((map, header + 8, meta))
}

/// Gives back the whole pages of a range: a neighbour may be in use.
pub(crate) fn give_back(map: &Mmap, bytes: &Range<usize>) {
    const PAGE: usize = 4096;
    let (a, b) = (bytes.start.next_multiple_of(PAGE), bytes.end / PAGE * PAGE);
    if a < b {
        // SAFETY: for a read-only mapping of a file, dropped pages are read from the file again when touched.
        let _ = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, a, b - a) };
    }
}

/// Opens a folder with `model.safetensors`, or with `model.safetensors.index.json` and its shards, or one file.
///
/// # Errors
/// [`RuntimeError::Io`] and [`RuntimeError::File`].
pub fn open_weights(path: &Path) -> Result<Weights> {
    Ok(Arc::new(Files::open(path)?))
}

impl Files {
    /// As [`open_weights`].
    ///
    /// # Errors
    /// [`RuntimeError::Io`] and [`RuntimeError::File`].
    pub fn open(path: &Path) -> Result<Files> {
        let folder = if path.is_dir() { Some(path) } else { path.parent() };
        let blocks_path = BlockFile::path(folder.unwrap_or(Path::new(".")));
        let mut out = Files { files: vec![], tensors: BTreeMap::new(), blocks: OnceLock::new(), blocks_path };
        if !path.is_dir() {
            out.add(path.to_path_buf(), None)?;
            return Ok(out);
        }
        let (single, index) = (path.join("model.safetensors"), path.join("model.safetensors.index.json"));
        if index.is_file() {
            let text = fs::read(&index).map_err(RuntimeError::io(index.display().to_string()))?;
            let bad = |why: String| RuntimeError::File { file: index.display().to_string(), why };
            let v: serde_json::Value = serde_json::from_slice(&text).map_err(|e| bad(format!("is no JSON: {e}")))?;
            let map =
                v.get("weight_map").and_then(|m| m.as_object()).ok_or_else(|| bad("has no `weight_map`".into()))?;
            let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
            for (tensor, file) in map {
                let file = file.as_str().ok_or_else(|| bad(format!("names no file for `{tensor}`")))?;
                if file.is_empty() || file.contains(['/', '\\', '\0']) || file.starts_with('.') {
                    return Err(bad(format!("names `{file}`, which is no file of its folder")));
                }
                shards.entry(file).or_default().push(tensor);
            }
            for (file, names) in shards {
                out.add(path.join(file), Some(&names))?;
            }
        } else if single.is_file() {
            out.add(single, None)?;
        } else {
            return Err(RuntimeError::File {
                file: path.display().to_string(),
                why: "has neither `model.safetensors` nor `model.safetensors.index.json`; give the model's folder"
                    .into(),
            });
        }
        Ok(out)
    }

    /// Adds a file: of a shard, exactly the tensors the index promises must be there.
    fn add(&mut self, path: PathBuf, names: Option<&[&str]>) -> Result<()> {
        let shown = path.display().to_string();
        let bad = |why: String| RuntimeError::File { file: shown.clone(), why };
        let (map, start, meta) = map(&path)?;
        for name in meta.offset_keys() {
            let Some(info) = meta.info(&name) else { continue };
            let bytes = start + info.data_offsets.0..start + info.data_offsets.1;
            if map.get(bytes.clone()).is_none() {
                return Err(bad(format!("tensor `{name}` lies outside the file; it may be cut off, fetch it again")));
            }
            let place = Place {
                file: self.files.len(),
                dtype: cast::from_file(info.dtype),
                type_name: format!("{:?}", info.dtype),
                shape: info.shape.iter().map(|n| *n as u64).collect(),
                bytes,
            };
            if self.tensors.insert(name.clone(), place).is_some() {
                return Err(bad(format!("tensor `{name}` is in another shard too; keep one of them")));
            }
        }
        for name in names.unwrap_or(&[]) {
            if meta.info(name).is_none() {
                return Err(bad(format!("lacks tensor `{name}`, which the index says is here; fetch it again")));
            }
        }
        self.files.push((path, map));
        Ok(())
    }

    /// The file's own name of a tensor's element type, for messages about types no plan reads.
    pub fn type_name(&self, name: &str) -> Option<&str> {
        self.tensors.get(name).map(|p| p.type_name.as_str())
    }

    /// The files, in the order they were opened.
    pub fn paths(&self) -> Vec<&Path> {
        self.files.iter().map(|f| f.0.as_path()).collect()
    }

    /// The file that has the weights in blocks, if it is there.
    pub fn blocks_path(&self) -> &Path {
        &self.blocks_path
    }

    fn block_file(&self) -> &std::result::Result<BlockFile, String> {
        self.blocks.get_or_init(|| match self.blocks_path.exists() {
            true => BlockFile::open(&self.blocks_path).map_err(|e| e.to_string()),
            false => Err(format!("there is no {}", self.blocks_path.display())),
        })
    }
}

impl TensorSource for Files {
    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn tensor(&self, name: &str) -> Option<Tensor<'_>> {
        let p = self.tensors.get(name)?;
        let bytes = self.files.get(p.file)?.1.get(p.bytes.clone())?;
        Some(Tensor { dtype: p.dtype?, shape: &p.shape, bytes })
    }

    fn release(&self, name: &str) {
        let Some(p) = self.tensors.get(name) else { return };
        if let Some((_, map)) = self.files.get(p.file) {
            give_back(map, &p.bytes);
        }
    }

    fn worth_in_place(&self) -> usize {
        64 << 10
    }

    fn blocks(&self, name: &str) -> std::result::Result<Blocks<'_>, String> {
        let file = self.block_file().as_ref().map_err(String::clone)?;
        file.get(name).ok_or_else(|| format!("{} has no tensor `{name}`", self.blocks_path.display()))
    }

    fn release_blocks(&self, name: &str) {
        // One that nobody opened has no pages.
        if let Some(Ok(file)) = self.blocks.get() {
            file.release(name);
        }
    }
}

/// Tensors in memory: tests, programs that make their own, adapters being handed over.
#[derive(Default)]
pub struct InMemory {
    tensors: BTreeMap<String, (DType, Vec<u64>, Vec<u8>)>,
    blocks: BTreeMap<String, (BlockFormat, [u64; 2], Vec<u8>)>,
}

impl InMemory {
    /// Nothing yet.
    pub fn new() -> InMemory {
        InMemory::default()
    }

    /// Adds an f32 tensor, or replaces the one of that name.
    pub fn f32(mut self, name: impl Into<String>, shape: &[u64], values: &[f32]) -> InMemory {
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.insert(name, DType::F32, shape, bytes);
        self
    }

    /// Adds a tensor as bytes, or replaces the one of that name.
    pub fn insert(&mut self, name: impl Into<String>, dtype: DType, shape: &[u64], bytes: Vec<u8>) {
        self.tensors.insert(name.into(), (dtype, shape.to_vec(), bytes));
    }

    /// Adds a matrix of this many rows in blocks, and the f32 tensor that they stand for, or replaces those of that name.
    pub fn insert_blocks(&mut self, name: impl Into<String>, format: BlockFormat, rows: u64, bytes: Vec<u8>) {
        let name = name.into();
        let size = format.bytes() as usize;
        let mut values = [0.0; BlockFormat::VALUES as usize];
        let mut elements = Vec::with_capacity(bytes.len() / size * 128);
        for block in bytes.chunks_exact(size) {
            expand(format, block, &mut values);
            elements.extend(values.iter().flat_map(|x| x.to_le_bytes()));
        }
        let columns = elements.len() as u64 / 4 / rows.max(1);
        self.insert(name.clone(), DType::F32, &[rows, columns], elements);
        self.blocks.insert(name, (format, [rows, bytes.len() as u64 / rows.max(1)], bytes));
    }
}

impl TensorSource for InMemory {
    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn tensor(&self, name: &str) -> Option<Tensor<'_>> {
        let (dtype, shape, bytes) = self.tensors.get(name)?;
        Some(Tensor { dtype: *dtype, shape, bytes })
    }

    fn blocks(&self, name: &str) -> std::result::Result<Blocks<'_>, String> {
        let (format, shape, bytes) =
            self.blocks.get(name).ok_or_else(|| format!("tensor `{name}` is in memory as numbers alone"))?;
        Ok(Blocks { format: *format, shape: *shape, bytes })
    }
}

/// Random weights for every checkpoint parameter of a plan, for benchmarks without a model: vectors are near 1,
/// matrices uniform with variance 1 / columns. What a plan asks for in blocks is so, and the tensor what they stand for.
/// The same seed gives the same bytes everywhere.
///
/// # Errors
/// [`RuntimeError::Size`] when a shape has no value.
pub fn random_weights(plan: &Plan, seed: u64) -> Result<Weights> {
    let mut out = InMemory::new();
    for (number, p) in plan.params.iter().enumerate() {
        let Source::Checkpoint(name) = &p.source else { continue };
        let shape = p.shape.iter().map(|d| d.eval(&[])).collect::<std::result::Result<Vec<u64>, _>>()?;
        if let (Layout::Blocks(format), [rows, columns]) = (p.layout, &shape[..]) {
            out.insert_blocks(name.clone(), format, *rows, random_blocks(format, *rows, *columns, (seed, number)));
            continue;
        }
        if out.blocks.contains_key(name) {
            continue;
        }
        let n = shape.iter().product::<u64>();
        let (mean, half) = match shape.as_slice() {
            [.., rows, cols] if *rows > 0 => (0.0, (3.0 / (*cols).max(1) as f32).sqrt()),
            _ => (1.0, 0.1),
        };
        let mut bytes = Vec::with_capacity(n as usize * p.dtype.size() as usize);
        for block in 0..n.div_ceil(4) {
            let words = Philox::new(seed).at([block as u32, (block >> 32) as u32, number as u32, 0x7765_6967]);
            for w in words.into_iter().take((n - block * 4).min(4) as usize) {
                let x = mean + half * ((w >> 8) as f32 / (1 << 23) as f32 - 1.0);
                match p.dtype.size() {
                    4 if p.dtype == DType::F32 => bytes.extend_from_slice(&x.to_le_bytes()),
                    2 if p.dtype == DType::BF16 => bytes.extend_from_slice(&((x.to_bits() >> 16) as u16).to_le_bytes()),
                    size => bytes.extend(std::iter::repeat_n(0, size as usize)),
                }
            }
        }
        out.insert(name.clone(), p.dtype, &shape, bytes);
    }
    Ok(Arc::new(out))
}

/// Blocks of a matrix whose values are uniform with variance 1 / columns, to the precision of codes.
fn random_blocks(format: BlockFormat, rows: u64, columns: u64, (seed, number): (u64, usize)) -> Vec<u8> {
    let half = (3.0 / columns.max(1) as f32).sqrt();
    let (scale, low) = match format {
        BlockFormat::Q4_0 => (half / 8.0, None),
        BlockFormat::Q4_1 => (half / 8.0, Some(-half * 15.0 / 16.0)),
        BlockFormat::Q8_0 => (half / 128.0, None),
    };
    let mut out = Vec::new();
    for block in 0..rows * (columns / BlockFormat::VALUES) {
        out.extend(to_half(scale).to_le_bytes());
        out.extend(low.into_iter().flat_map(|x| to_half(x).to_le_bytes()));
        for part in 0..(format.bytes() / 16) as u32 {
            let words = Philox::new(seed).at([block as u32, (block >> 32) as u32, number as u32, 0x7765_6968 + part]);
            out.extend(words.iter().flat_map(|w| w.to_le_bytes()));
        }
    }
    out
}

/// A number of magnitude 2⁻¹⁴ to 65504 as binary16, towards zero; smaller ones as 2⁻¹⁴.
fn to_half(x: f32) -> u16 {
    let bits = x.abs().max(1.0 / 16384.0).to_bits();
    ((bits >> 13) as u16 & 0x3ff) | (((bits >> 23) as u16 - 112) << 10) | (u16::from(x < 0.0) << 15)
}

/// A name that differs little from the one looked for, for messages.
pub(crate) fn nearest<'a>(names: impl IntoIterator<Item = &'a str>, name: &str) -> Option<&'a str> {
    names
        .into_iter()
        .map(|n| (distance(n.as_bytes(), name.as_bytes()), n))
        .min()
        .filter(|(d, _)| *d <= name.len() / 3 + 1)
        .map(|(_, n)| n)
}

fn distance(a: &[u8], b: &[u8]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut corner = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let next = (corner + usize::from(x != y)).min(row[j] + 1).min(row[j + 1] + 1);
            corner = row[j + 1];
            row[j + 1] = next;
        }
    }
    row[b.len()]
}
