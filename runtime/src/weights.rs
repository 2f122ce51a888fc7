//! Where the values of parameters come from: mapped safetensors files, or anything else that implements
//! [`TensorSource`].
//!
//! Files are mapped read-only and never written. A file that another program shortens while it is mapped ends this one
//! (the system's SIGBUS), as with every mapped file.
#![allow(unsafe_code)]

use crate::cast;
use crate::error::{Result, RuntimeError};
use memmap2::{Mmap, UncheckedAdvice};
use pleach_plan::random::Philox;
use pleach_plan::{DType, Plan, Source};
use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

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
        let mut out = Files { files: vec![], tensors: BTreeMap::new() };
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
        let file = File::open(&path).map_err(RuntimeError::io(shown.clone()))?;
        if file.metadata().map_err(RuntimeError::io(shown.clone()))?.len() < 8 {
            return Err(bad("is too short to be a safetensors file; fetch it again".into()));
        }
        // SAFETY: the mapping is read-only and private to this value; the module text says what a foreign write does.
        let map = unsafe { Mmap::map(&file) }.map_err(RuntimeError::io(shown.clone()))?;
        let (header, meta) = SafeTensors::read_metadata(&map)
            .map_err(|e| bad(format!("is no usable safetensors file ({e}); it may be cut off, fetch it again")))?;
        let start = header + 8;
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
        const PAGE: usize = 4096;
        let Some(p) = self.tensors.get(name) else { return };
        // Whole pages of this tensor only: a neighbour may be in use.
        let (a, b) = (p.bytes.start.next_multiple_of(PAGE), p.bytes.end / PAGE * PAGE);
        if let (true, Some((_, map))) = (a < b, self.files.get(p.file)) {
            // SAFETY: for a read-only mapping of a file, dropped pages are read from the file again when touched.
            let _ = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, a, b - a) };
        }
    }
}

/// Tensors in memory: tests, programs that make their own, adapters being handed over.
#[derive(Default)]
pub struct InMemory {
    tensors: BTreeMap<String, (DType, Vec<u64>, Vec<u8>)>,
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
}

impl TensorSource for InMemory {
    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn tensor(&self, name: &str) -> Option<Tensor<'_>> {
        let (dtype, shape, bytes) = self.tensors.get(name)?;
        Some(Tensor { dtype: *dtype, shape, bytes })
    }
}

/// Random weights for every checkpoint parameter of a plan, for benchmarks without a model: vectors are near 1,
/// matrices uniform with variance 1 / columns. The same seed gives the same bytes everywhere.
///
/// # Errors
/// [`RuntimeError::Size`] when a shape has no value.
pub fn random_weights(plan: &Plan, seed: u64) -> Result<Weights> {
    let mut out = InMemory::new();
    for (number, p) in plan.params.iter().enumerate() {
        let Source::Checkpoint(name) = &p.source else { continue };
        let shape = p.shape.iter().map(|d| d.eval(&[])).collect::<std::result::Result<Vec<u64>, _>>()?;
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
