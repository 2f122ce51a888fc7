//! A checkpoint folder as a table: tensor name → dtype, shape, file and byte range.
//!
//! Only headers are read. `model.safetensors` wins over `model.safetensors.index.json` + shards, as in transformers; a
//! folder with exactly one other `.safetensors` file is accepted too. Values can be read through [`TensorRef`], tensor
//! by tensor; compilation never does.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::{bf16, f16};
use serde::Deserialize;

use crate::error::{Error, Result};
use crate::json::{UniqueMap, read_bytes};
use crate::nearest::nearest_hint;
use crate::safetensors::read_header;

/// Element types that checkpoints hold; printed as safetensors spells them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Dtype {
    F64,
    F32,
    F16,
    Bf16,
    F8E4m3,
    F8E5m2,
    I64,
    I32,
    I16,
    I8,
    U64,
    U32,
    U16,
    U8,
    Bool,
}

const DTYPES: [(Dtype, &str, u64); 15] = [
    (Dtype::F64, "F64", 8),
    (Dtype::F32, "F32", 4),
    (Dtype::F16, "F16", 2),
    (Dtype::Bf16, "BF16", 2),
    (Dtype::F8E4m3, "F8_E4M3", 1),
    (Dtype::F8E5m2, "F8_E5M2", 1),
    (Dtype::I64, "I64", 8),
    (Dtype::I32, "I32", 4),
    (Dtype::I16, "I16", 2),
    (Dtype::I8, "I8", 1),
    (Dtype::U64, "U64", 8),
    (Dtype::U32, "U32", 4),
    (Dtype::U16, "U16", 2),
    (Dtype::U8, "U8", 1),
    (Dtype::Bool, "BOOL", 1),
];

impl Dtype {
    /// The type that safetensors calls `name`.
    pub fn from_safetensors(name: &str) -> Option<Dtype> {
        DTYPES.iter().find(|entry| entry.1 == name).map(|entry| entry.0)
    }

    /// Bytes of one element.
    pub fn size(self) -> u64 {
        self.entry().2
    }

    /// Whether weights may be of this type: f32, f16 or bf16.
    pub fn is_weight(self) -> bool {
        matches!(self, Dtype::F32 | Dtype::F16 | Dtype::Bf16)
    }

    fn entry(self) -> &'static (Dtype, &'static str, u64) {
        DTYPES.iter().find(|entry| entry.0 == self).unwrap_or(&DTYPES[0])
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.entry().1)
    }
}

/// Where one tensor lies. The range has been checked against the file's size when the header was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorRef {
    /// Name in the file.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Row-major shape.
    pub shape: Vec<u64>,
    /// The file that holds it.
    pub file: Arc<Path>,
    /// First byte, from the start of the file.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

impl TensorRef {
    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.bytes / self.dtype.size()
    }

    /// Reads the raw little-endian bytes.
    pub fn read_bytes(&self) -> Result<Vec<u8>> {
        let file = File::open(&self.file).map_err(Error::io("open", &self.file))?;
        let mut bytes = vec![0; self.bytes as usize];
        file.read_exact_at(&mut bytes, self.offset).map_err(Error::io("read", &self.file))?;
        Ok(bytes)
    }

    /// Reads the values as f32; f16 and bf16 are widened exactly, f64 is rounded.
    pub fn read_f32(&self) -> Result<Vec<f32>> {
        let bytes = self.read_bytes()?;
        Ok(match self.dtype {
            Dtype::F32 => bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
            Dtype::F16 => bytes.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).to_f32()).collect(),
            Dtype::Bf16 => bytes.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32()).collect(),
            Dtype::F64 => bytes.as_chunks().0.iter().map(|&b| f64::from_le_bytes(b) as f32).collect(),
            other => return Err(Error::tensor(&self.file, &self.name, format!("is {other}, not a float tensor"))),
        })
    }
}

/// All tensors of a checkpoint or of one file, by name.
#[derive(Debug, Clone, Default)]
pub struct TensorTable {
    tensors: BTreeMap<String, TensorRef>,
    files: Vec<PathBuf>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: UniqueMap<String>,
}

impl TensorTable {
    /// Reads the headers of a model folder.
    ///
    /// # Errors
    /// No checkpoint in the folder, several without an index, a damaged header, an index that names a missing shard or
    /// tensor, a tensor of a shard that the index does not name or places elsewhere.
    pub fn open_folder(dir: &Path) -> Result<TensorTable> {
        let single = dir.join("model.safetensors");
        if single.is_file() {
            return TensorTable::open_file(&single);
        }
        let index = dir.join("model.safetensors.index.json");
        if index.is_file() {
            return TensorTable::open_sharded(dir, &index);
        }
        let mut others = Vec::new();
        for entry in std::fs::read_dir(dir).map_err(Error::io("open", dir))? {
            let path = entry.map_err(Error::io("read", dir))?.path();
            if path.extension().is_some_and(|e| e == "safetensors") && path.is_file() {
                others.push(path);
            }
        }
        others.sort();
        match others.as_slice() {
            [one] => TensorTable::open_file(one),
            [] if dir.join("pytorch_model.bin").exists() => Err(Error::format(
                dir,
                "holds a pickled pytorch_model.bin, which is never loaded; save the model as safetensors first",
            )),
            [] => Err(Error::format(dir, "holds no model.safetensors and no model.safetensors.index.json")),
            several => Err(Error::format(
                dir,
                format!("holds {} safetensors files but no model.safetensors.index.json", several.len()),
            )),
        }
    }

    /// Reads the header of one file.
    pub fn open_file(path: &Path) -> Result<TensorTable> {
        let (tensors, _) = read_header(path)?;
        let tensors = tensors.into_iter().map(|t| (t.name.clone(), t)).collect();
        Ok(TensorTable { tensors, files: vec![path.to_owned()] })
    }

    fn open_sharded(dir: &Path, index_path: &Path) -> Result<TensorTable> {
        let index: Index = serde_json::from_slice(&read_bytes(index_path)?)
            .map_err(|e| Error::format(index_path, format!("not a valid index: {e}")))?;
        let weight_map: BTreeMap<String, String> = index.weight_map.0.into_iter().collect();
        let shards: BTreeSet<&str> = weight_map.values().map(String::as_str).collect();
        if shards.is_empty() {
            return Err(Error::format(index_path, "`weight_map` names no tensor"));
        }
        let mut table = TensorTable::default();
        for shard in shards {
            if shard.contains(['/', '\\', '\0']) || shard.starts_with('.') || shard.is_empty() {
                return Err(Error::format(index_path, format!("shard `{shard}` is not a plain file name")));
            }
            let path = dir.join(shard);
            if !path.is_file() {
                return Err(Error::format(index_path, format!("shard `{shard}` is missing from the folder")));
            }
            for tensor in read_header(&path)?.0 {
                match weight_map.get(&tensor.name) {
                    Some(listed) if listed == shard => {}
                    Some(listed) => {
                        let what = format!("is in `{shard}` but the index places it in `{listed}`");
                        return Err(Error::tensor(index_path, tensor.name, what));
                    }
                    None => {
                        let hint = nearest_hint(&tensor.name, weight_map.keys().map(String::as_str));
                        let what = format!("is in `{shard}` but not in the index{hint}");
                        return Err(Error::tensor(index_path, tensor.name, what));
                    }
                }
                table.tensors.insert(tensor.name.clone(), tensor);
            }
            table.files.push(path);
        }
        if let Some((name, shard)) = weight_map.iter().find(|(name, _)| !table.tensors.contains_key(*name)) {
            let hint = nearest_hint(name, table.tensors.keys().map(String::as_str));
            return Err(Error::tensor(index_path, name, format!("is listed in `{shard}` but not there{hint}")));
        }
        Ok(table)
    }

    /// The tensor of that name.
    pub fn get(&self, name: &str) -> Option<&TensorRef> {
        self.tensors.get(name)
    }

    /// All tensors by name.
    pub fn iter(&self) -> impl Iterator<Item = &TensorRef> {
        self.tensors.values()
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The files read, sorted.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there is no tensor at all.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{folder, write_tensors};

    fn sharded(index: &str) -> Result<TensorTable> {
        let dir = folder("shards");
        write_tensors(&dir.join("a.safetensors"), &[("x".into(), vec![2])], 0);
        write_tensors(&dir.join("b.safetensors"), &[("y".into(), vec![3]), ("z".into(), vec![1])], 0);
        std::fs::write(dir.join("model.safetensors.index.json"), index).unwrap();
        TensorTable::open_folder(&dir)
    }

    #[test]
    fn shards_are_joined() {
        let good = r#"{"metadata":{"total_size":24},"weight_map":{"x":"a.safetensors","y":"b.safetensors","z":"b.safetensors"}}"#;
        let table = sharded(good).unwrap();
        assert_eq!(table.names().collect::<Vec<_>>(), ["x", "y", "z"]);
        assert!(table.get("z").unwrap().file.ends_with("b.safetensors"));
    }

    #[test]
    fn broken_indexes_are_refused() {
        let cases = [
            (r#"{"weight_map":{"x":"a.safetensors","y":"b.safetensors"}}"#, "not in the index"),
            (r#"{"weight_map":{"x":"a.safetensors","y":"a.safetensors","z":"b.safetensors"}}"#, "places it in"),
            (r#"{"weight_map":{"x":"a.safetensors","w":"a.safetensors"}}"#, "listed in `a.safetensors` but not there"),
            (r#"{"weight_map":{"x":"c.safetensors"}}"#, "missing from the folder"),
            (r#"{"weight_map":{"x":"../a.safetensors"}}"#, "not a plain file name"),
            (r#"{"weight_map":{"x":"a.safetensors","x":"b.safetensors"}}"#, "occurs twice"),
            (r#"{"weight_map":{}}"#, "names no tensor"),
            (r#"{}"#, "not a valid index"),
        ];
        for (index, expected) in cases {
            let message = sharded(index).unwrap_err().to_string();
            assert!(message.contains(expected), "{index}: {message}");
        }
    }
}
