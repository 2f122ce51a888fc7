//! The GGUF header: metadata and tensor table.
//!
//! All numbers are little-endian. Layout: magic "GGUF", version, tensor count, key count, then keys with typed values,
//! then tensors (name, dimensions fastest first, type, offset), then data aligned to `general.alignment`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::quants::GgmlType;
use crate::error::{Error, Result};

/// A metadata value. Integers are widened; arrays hold one kind of value.
#[derive(Debug, Clone, PartialEq)]
pub enum Metadata {
    /// Unsigned integers.
    Unsigned(u64),
    /// Signed integers.
    Signed(i64),
    /// Floats; an f32 keeps its value.
    Float(f64),
    /// Booleans.
    Bool(bool),
    /// UTF-8 strings.
    Text(String),
    /// Arrays.
    Array(Vec<Metadata>),
}

impl Metadata {
    /// The value as a non-negative integer.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Metadata::Unsigned(n) => Some(*n),
            Metadata::Signed(n) => u64::try_from(*n).ok(),
            _ => None,
        }
    }

    /// The value as a string.
    pub fn as_str(&self) -> Option<&str> {
        if let Metadata::Text(s) = self { Some(s) } else { None }
    }

    /// The value as an array.
    pub fn as_array(&self) -> Option<&[Metadata]> {
        if let Metadata::Array(list) = self { Some(list) } else { None }
    }
}

/// One tensor of the file; the range has been checked against the file's size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufTensor {
    /// Name.
    pub name: String,
    /// Row-major shape (the reverse of ggml's order).
    pub shape: Vec<u64>,
    /// Element or block type.
    pub kind: GgmlType,
    /// First byte, from the start of the file.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// An opened GGUF file: metadata in name order and tensors in file order.
#[derive(Debug)]
pub struct Gguf {
    /// The file.
    pub path: PathBuf,
    /// Metadata by key.
    pub metadata: BTreeMap<String, Metadata>,
    /// All tensors.
    pub tensors: Vec<GgufTensor>,
    file: File,
}

impl Gguf {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// Not a GGUF file, an unsupported version or type, a truncated or inconsistent header, overlapping or
    /// out-of-bounds tensors.
    pub fn open(path: &Path) -> Result<Gguf> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let data = file.metadata().map_err(Error::io("read", path))?;
        if data.is_dir() {
            let what = match path.join("config.json").is_file() {
                true => {
                    "is a model folder already, which every command takes as it is; only a GGUF file needs an import"
                }
                false => "is a folder; give the GGUF file",
            };
            return Err(Error::format(path, what));
        }
        let size = data.len();
        let handle = file.try_clone().map_err(Error::io("open", path))?;
        let mut cursor = Cursor { input: BufReader::with_capacity(1 << 18, handle), path, at: 0, size };
        let (metadata, tensors) = cursor.header()?;
        Ok(Gguf { path: path.to_owned(), metadata, tensors, file })
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<&GgufTensor> {
        self.tensors.iter().find(|t| t.name == name)
    }

    /// Reads `bytes.len()` bytes of a tensor, starting `from` bytes into it.
    pub fn read(&self, tensor: &GgufTensor, from: u64, bytes: &mut [u8]) -> Result<()> {
        if from.checked_add(bytes.len() as u64).is_none_or(|end| end > tensor.bytes) {
            return Err(Error::tensor(&self.path, &tensor.name, "was read past its end"));
        }
        self.file.read_exact_at(bytes, tensor.offset + from).map_err(Error::io("read", &self.path))
    }
}

struct Cursor<'a> {
    input: BufReader<File>,
    path: &'a Path,
    at: u64,
    size: u64,
}

type Header = (BTreeMap<String, Metadata>, Vec<GgufTensor>);

impl Cursor<'_> {
    fn fault(&self, what: impl Into<String>) -> Error {
        Error::format(self.path, what)
    }

    fn left(&self) -> u64 {
        self.size - self.at
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        if self.left() < N as u64 {
            return Err(self.fault(format!("the header ends early at byte {}; is the file truncated?", self.size)));
        }
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes).map_err(Error::io("read", self.path))?;
        self.at += N as u64;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    /// A count of items that take at least `each` bytes of the file.
    fn count(&mut self, each: u64, what: &str) -> Result<usize> {
        let n = self.u64()?;
        if n.checked_mul(each).is_none_or(|bytes| bytes > self.left()) {
            return Err(
                self.fault(format!("claims {n} {what}, more than the file can hold; it is truncated or damaged"))
            );
        }
        Ok(n as usize)
    }

    fn text(&mut self) -> Result<String> {
        let length = self.count(1, "bytes of a string")?;
        let mut bytes = vec![0; length];
        self.input.read_exact(&mut bytes).map_err(Error::io("read", self.path))?;
        self.at += length as u64;
        String::from_utf8(bytes).map_err(|_| self.fault("holds a string that is not UTF-8"))
    }

    fn value(&mut self, kind: u32, depth: u32) -> Result<Metadata> {
        Ok(match kind {
            0 => Metadata::Unsigned(u64::from(self.bytes::<1>()?[0])),
            1 => Metadata::Signed(i64::from(i8::from_le_bytes(self.bytes()?))),
            2 => Metadata::Unsigned(u64::from(u16::from_le_bytes(self.bytes()?))),
            3 => Metadata::Signed(i64::from(i16::from_le_bytes(self.bytes()?))),
            4 => Metadata::Unsigned(u64::from(self.u32()?)),
            5 => Metadata::Signed(i64::from(i32::from_le_bytes(self.bytes()?))),
            6 => Metadata::Float(f64::from(f32::from_le_bytes(self.bytes()?))),
            7 => Metadata::Bool(self.bytes::<1>()?[0] != 0),
            8 => Metadata::Text(self.text()?),
            9 if depth < 3 => {
                let kind = self.u32()?;
                let each = match kind {
                    0 | 1 | 7 => 1,
                    2 | 3 => 2,
                    4..=6 => 4,
                    9 => 12,
                    _ => 8,
                };
                let count = self.count(each, "array elements")?;
                let mut list = Vec::new();
                for _ in 0..count {
                    list.push(self.value(kind, depth + 1)?);
                }
                Metadata::Array(list)
            }
            9 => return Err(self.fault("nests arrays too deeply")),
            10 => Metadata::Unsigned(self.u64()?),
            11 => Metadata::Signed(i64::from_le_bytes(self.bytes()?)),
            12 => Metadata::Float(f64::from_le_bytes(self.bytes()?)),
            other => return Err(self.fault(format!("holds metadata of the unknown type {other}"))),
        })
    }

    fn header(&mut self) -> Result<Header> {
        if self.left() < 4 || &self.bytes::<4>()? != b"GGUF" {
            return Err(self.fault("does not start with `GGUF`; this is not a GGUF file"));
        }
        match self.u32()? {
            2 | 3 => {}
            v if (2..=3).contains(&v.swap_bytes()) => {
                return Err(self.fault("is a big-endian GGUF, which is not supported"));
            }
            v => return Err(self.fault(format!("is GGUF version {v}; 2 and 3 are supported"))),
        }
        let tensor_count = self.count(24, "tensors")?;
        let key_count = self.count(13, "metadata keys")?;
        let mut metadata = BTreeMap::new();
        for _ in 0..key_count {
            let key = self.text()?;
            let kind = self.u32()?;
            let value = self.value(kind, 0)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(self.fault(format!("holds the metadata key `{key}` twice")));
            }
        }
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(value) => value
                .as_u64()
                .filter(|a| a.is_power_of_two() && *a <= 1 << 20)
                .ok_or_else(|| self.fault("has an impossible `general.alignment`"))?,
        };
        let mut tensors = Vec::new();
        for _ in 0..tensor_count {
            tensors.push(self.tensor()?);
        }
        let start = self.at.next_multiple_of(alignment);
        self.place(&mut tensors, start, alignment)?;
        Ok((metadata, tensors))
    }

    fn tensor(&mut self) -> Result<GgufTensor> {
        let name = self.text()?;
        let rank = self.u32()?;
        if rank > 4 {
            return Err(Error::tensor(self.path, name, format!("has {rank} dimensions; at most 4 are possible")));
        }
        let mut shape = Vec::new();
        for _ in 0..rank {
            shape.push(self.u64()?);
        }
        shape.reverse();
        let code = self.u32()?;
        let kind = GgmlType::from_code(code).ok_or_else(|| {
            let type_name = GgmlType::name_of(code);
            let what = format!("has the type {type_name}; supported are F32, F16, BF16, Q4_0, Q4_1, Q8_0 and Q6_K");
            Error::tensor(self.path, &name, what)
        })?;
        let offset = self.u64()?;
        let row = shape.last().copied().unwrap_or(1);
        let elements = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
        let bytes = elements
            .filter(|_| row % kind.block_elements() == 0)
            .and_then(|n| (n / kind.block_elements()).checked_mul(kind.block_bytes()))
            .ok_or_else(|| {
                Error::tensor(self.path, &name, format!("has a shape {shape:?} that {kind:?} cannot have"))
            })?;
        Ok(GgufTensor { name, shape, kind, offset, bytes })
    }

    /// Turns offsets into file positions and checks that tensors neither overlap nor leave the file.
    fn place(&self, tensors: &mut [GgufTensor], start: u64, alignment: u64) -> Result<()> {
        let mut ranges = Vec::new();
        for tensor in tensors.iter_mut() {
            let end = start.checked_add(tensor.offset).and_then(|at| at.checked_add(tensor.bytes));
            if end.is_none_or(|end| end > self.size) {
                let what = format!("ends beyond the file's {} bytes; the file is truncated or damaged", self.size);
                return Err(Error::tensor(self.path, &tensor.name, what));
            }
            if tensor.offset % alignment != 0 {
                return Err(Error::tensor(self.path, &tensor.name, "is not aligned"));
            }
            tensor.offset += start;
            ranges.push((tensor.offset, tensor.offset + tensor.bytes, tensor.name.as_str()));
        }
        ranges.sort();
        if let Some(pair) = ranges.windows(2).find(|pair| pair[0].1 > pair[1].0) {
            return Err(Error::tensor(self.path, pair[1].2, format!("overlaps `{}`", pair[0].2)));
        }
        let mut names: Vec<_> = ranges.iter().map(|r| r.2).collect();
        names.sort();
        match names.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(Error::tensor(self.path, pair[0], "occurs twice")),
            None => Ok(()),
        }
    }
}
