//! The safetensors format: a strict header reader and a streaming writer.
//!
//! Layout (huggingface/safetensors, "Format"): `u64` little-endian header length, a JSON header
//! `{name: {dtype, shape, data_offsets: [begin, end]}}` with an optional `__metadata__` object, then the data. Only the
//! header is read here. The header is untrusted: lengths, products, ranges, overlaps and holes are all checked, so a
//! range handed out can be read without further thought.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::json::UniqueMap;
use crate::tensors::{Dtype, TensorRef};

/// Longest header accepted, the limit of the reference implementation.
const MAX_HEADER: u64 = 100_000_000;

#[derive(Deserialize)]
#[serde(untagged)]
enum Entry {
    Tensor(Info),
    Metadata(Map<String, Value>),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Info {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// Tensors in the order of their data, and metadata strings.
pub type Header = (Vec<TensorRef>, Vec<(String, String)>);

/// Reads the header of one file: its tensors in the order of their data, and its metadata strings.
pub fn read_header(path: &Path) -> Result<Header> {
    let mut file = File::open(path).map_err(Error::io("open", path))?;
    let size = file.metadata().map_err(Error::io("read", path))?.len();
    let mut length = [0; 8];
    if size < 8 {
        return Err(Error::format(path, format!("{size} bytes is too short for a safetensors file; is it truncated?")));
    }
    file.read_exact(&mut length).map_err(Error::io("read", path))?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER || length > size - 8 {
        return Err(Error::format(
            path,
            format!("the header claims {length} bytes but the file has {size}; it is truncated or not safetensors"),
        ));
    }
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header).map_err(Error::io("read", path))?;
    parse_header(path, &header, size - 8 - length)
}

/// Checks a header against the number of data bytes that follow it.
fn parse_header(path: &Path, header: &[u8], data_bytes: u64) -> Result<Header> {
    let entries: UniqueMap<Entry> = serde_json::from_slice(header)
        .map_err(|e| Error::format(path, format!("the safetensors header is not valid: {e}")))?;
    let data_start = 8 + header.len() as u64;
    let shared: Arc<Path> = Arc::from(path);
    let (mut tensors, mut metadata) = (Vec::new(), Vec::new());
    for (name, entry) in entries.0 {
        match entry {
            Entry::Metadata(map) if name == "__metadata__" => {
                for (key, value) in map {
                    let text = value.as_str().ok_or_else(|| Error::format(path, "`__metadata__` must hold strings"))?;
                    metadata.push((key, text.to_owned()));
                }
            }
            Entry::Tensor(info) if name != "__metadata__" => {
                let fault = |what: String| Error::tensor(path, &name, what);
                let dtype = Dtype::from_safetensors(&info.dtype)
                    .ok_or_else(|| fault(format!("has the unknown dtype `{}`", info.dtype)))?;
                let elements = info.shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
                let bytes = elements
                    .and_then(|n| n.checked_mul(dtype.size()))
                    .ok_or_else(|| fault(format!("has an impossible shape {:?}", info.shape)))?;
                let [begin, end] = info.data_offsets;
                if begin > end || end > data_bytes {
                    return Err(fault(format!(
                        "lies at bytes {begin}..{end} but the file holds {data_bytes} data bytes; it is truncated or damaged"
                    )));
                }
                if end - begin != bytes {
                    return Err(fault(format!(
                        "of shape {:?} and dtype {dtype} needs {bytes} bytes, its range has {}",
                        info.shape,
                        end - begin
                    )));
                }
                let (file, offset) = (shared.clone(), data_start + begin);
                tensors.push(TensorRef { name, dtype, shape: info.shape, file, offset, bytes });
            }
            _ => return Err(Error::tensor(path, name, "needs exactly `dtype`, `shape` and `data_offsets`")),
        }
    }
    tensors.sort_by(|a, b| (a.offset, a.bytes, &a.name).cmp(&(b.offset, b.bytes, &b.name)));
    let mut covered = data_start;
    for tensor in &tensors {
        if tensor.offset != covered {
            let what =
                if tensor.offset < covered { "overlaps the tensor before it" } else { "leaves a hole before it" };
            return Err(Error::tensor(path, &tensor.name, what));
        }
        covered += tensor.bytes;
    }
    if covered - data_start != data_bytes {
        let extra = data_bytes - (covered - data_start);
        return Err(Error::format(path, format!("{extra} bytes after the last tensor belong to nothing")));
    }
    Ok((tensors, metadata))
}

/// Writes one safetensors file tensor by tensor, so that memory use stays that of one chunk.
///
/// Shapes are declared first; data must then come in the declared order and amount.
pub struct Writer {
    out: BufWriter<File>,
    path: std::path::PathBuf,
    remaining: u64,
}

impl Writer {
    /// Creates `path` with a header for `tensors` (name, dtype, shape) and `metadata {"format": "pt"}`.
    pub fn create(path: &Path, tensors: &[(String, Dtype, Vec<u64>)]) -> Result<Writer> {
        Writer::create_with(path, tensors, json!({"format": "pt"}))
    }

    /// As [`Writer::create`], with this object of strings as metadata.
    pub fn create_with(path: &Path, tensors: &[(String, Dtype, Vec<u64>)], metadata: Value) -> Result<Writer> {
        let mut header = Map::new();
        header.insert("__metadata__".into(), metadata);
        let mut at = 0u64;
        for (name, dtype, shape) in tensors {
            let end = shape
                .iter()
                .try_fold(dtype.size(), |n, &d| n.checked_mul(d))
                .and_then(|bytes| at.checked_add(bytes))
                .ok_or_else(|| Error::tensor(path, name, format!("has an impossible shape {shape:?}")))?;
            header.insert(name.clone(), json!({"dtype": dtype.to_string(), "shape": shape, "data_offsets": [at, end]}));
            at = end;
        }
        let mut text = Value::Object(header).to_string().into_bytes();
        text.resize(text.len().next_multiple_of(8), b' ');
        let file = File::create(path).map_err(Error::io("create", path))?;
        let mut writer = Writer { out: BufWriter::with_capacity(1 << 20, file), path: path.to_owned(), remaining: at };
        writer.raw(&(text.len() as u64).to_le_bytes())?;
        writer.raw(&text)?;
        Ok(writer)
    }

    fn raw(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(Error::io("write", &self.path))
    }

    /// Appends data bytes (little-endian).
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.remaining = self
            .remaining
            .checked_sub(bytes.len() as u64)
            .ok_or_else(|| Error::format(&self.path, "more data than the header declares"))?;
        self.raw(bytes)
    }

    /// Appends f32 values.
    pub fn write_f32(&mut self, values: &[f32]) -> Result<()> {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.write(&bytes)
    }

    /// Flushes and syncs; fails if data is missing.
    pub fn finish(self) -> Result<()> {
        if self.remaining != 0 {
            return Err(Error::format(&self.path, format!("{} data bytes were never written", self.remaining)));
        }
        let file = self.out.into_inner().map_err(|e| Error::io("write", &self.path)(e.into_error()))?;
        file.sync_all().map_err(Error::io("sync", &self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(header: &str, data: u64) -> Result<Vec<TensorRef>> {
        parse_header(Path::new("m.safetensors"), header.as_bytes(), data).map(|(tensors, _)| tensors)
    }

    #[test]
    fn accepts_a_good_header() {
        let tensors = parse(
            r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[3],"data_offsets":[8,14]},"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]}}"#,
            14,
        )
        .unwrap();
        assert_eq!(tensors.iter().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!((tensors[1].dtype, tensors[1].bytes), (Dtype::Bf16, 6));
    }

    #[test]
    fn refuses_hostile_headers() {
        let cases = [
            (
                r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#,
                12,
                "overlaps",
            ),
            (
                r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}"#,
                16,
                "occurs twice",
            ),
            (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 4, "truncated"),
            (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#, 8, "8..0"),
            (r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#, 8, "needs 12 bytes"),
            (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 9, "belong to nothing"),
            (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#, 12, "hole"),
            (r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}}"#, 8, "impossible shape"),
            (r#"{"a":{"dtype":"F31","shape":[2],"data_offsets":[0,8]}}"#, 8, "unknown dtype"),
            (r#"{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}"#, 8, "needs exactly"),
            (r#"{"a":3}"#, 8, "not valid"),
            (r#"[1]"#, 0, "not valid"),
        ];
        for (header, data, expected) in cases {
            let message = parse(header, data).unwrap_err().to_string();
            assert!(message.contains(expected), "{header}: {message}");
        }
    }

    #[test]
    fn every_truncation_of_a_file_is_an_error() {
        let dir = crate::testing::folder("safetensors-truncated");
        let path = dir.join("m.safetensors");
        let mut writer = Writer::create(&path, &[("w".into(), Dtype::F32, vec![2, 3])]).unwrap();
        writer.write_f32(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
        writer.finish().unwrap();
        let whole = std::fs::read(&path).unwrap();
        let crate_view = ::safetensors::SafeTensors::deserialize(&whole).unwrap();
        assert_eq!(crate_view.tensor("w").unwrap().shape(), [2, 3]);
        let (tensors, metadata) = read_header(&path).unwrap();
        assert_eq!(tensors[0].read_f32().unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(metadata, [("format".to_owned(), "pt".to_owned())]);
        for cut in 0..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            assert!(read_header(&path).is_err(), "cut at {cut}");
        }
    }
}
