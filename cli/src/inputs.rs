//! Sequences of token ids: from the command line, from text, from a safetensors file.

use crate::failure::{Failure, Result};
use pleach_runtime::Values;
use pleach_runtime::files::{self, Saved};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use std::borrow::Cow;
use std::path::Path;

/// Packed sequences.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Sequences {
    /// All ids, one sequence after another.
    pub ids: Vec<i32>,
    /// Where each sequence starts, and the end.
    pub segments: Vec<i32>,
}

impl Sequences {
    /// Packs sequences.
    ///
    /// # Errors
    /// None at all, or an empty one.
    pub(crate) fn pack(list: &[Vec<i32>]) -> Result<Sequences> {
        let mut out = Sequences { ids: vec![], segments: vec![0] };
        for (i, s) in list.iter().enumerate() {
            if s.is_empty() {
                return Err(Failure::new(format!("sequence {} has no token; give at least one", i + 1)));
            }
            out.ids.extend_from_slice(s);
            out.segments.push(i32::try_from(out.ids.len()).map_err(|_| Failure::new("too many tokens"))?);
        }
        if list.is_empty() {
            return Err(Failure::usage("nothing to run: give --ids, --prompt or --input"));
        }
        Ok(out)
    }

    /// Number of sequences.
    pub(crate) fn len(&self) -> usize {
        self.segments.len() - 1
    }

    /// Tokens of each sequence.
    pub(crate) fn each(&self) -> impl Iterator<Item = &[i32]> {
        self.segments.windows(2).map(|w| &self.ids[w[0] as usize..w[1] as usize])
    }

    /// Length of the longest sequence.
    pub(crate) fn longest(&self) -> u64 {
        self.each().map(|s| s.len() as u64).max().unwrap_or(0)
    }
}

/// The inputs of the entry `infer`.
#[derive(Debug)]
pub(crate) struct InferInputs {
    ids: Vec<i32>,
    segments: Vec<i32>,
    positions: Vec<i32>,
    lengths: Vec<i32>,
    types: Option<Vec<i32>>,
}

impl InferInputs {
    /// Positions restart with every sequence; keys and values are the run's own; an encoder's tokens are of type 0.
    pub(crate) fn new(s: &Sequences, encoder: bool) -> InferInputs {
        InferInputs {
            positions: s.each().flat_map(|x| 0..x.len() as i32).collect(),
            lengths: s.each().map(|x| x.len() as i32).collect(),
            types: encoder.then(|| vec![0; s.ids.len()]),
            ids: s.ids.clone(),
            segments: s.segments.clone(),
        }
    }

    /// As a session takes them.
    pub(crate) fn values(&self) -> Vec<(&str, Values<'_>)> {
        let mut v: Vec<(&str, Values<'_>)> = vec![
            ("input_ids", Values::I32(&self.ids)),
            ("positions", Values::I32(&self.positions)),
            ("q_segments", Values::I32(&self.segments)),
            ("kv_start", Values::I32(&self.segments[..self.lengths.len()])),
            ("kv_len", Values::I32(&self.lengths)),
        ];
        v.extend(self.types.iter().map(|t| ("token_type_ids", Values::I32(t.as_slice()))));
        v
    }
}

/// `1,2,3` as ids.
///
/// # Errors
/// What is no id, by its place.
pub(crate) fn parse_ids(text: &str) -> Result<Vec<i32>> {
    let one = |(i, s): (usize, &str)| {
        let id = s.trim().parse::<i32>().ok().filter(|x| *x >= 0);
        id.ok_or_else(|| Failure::usage(format!("--ids: `{}` at place {} is no token id", s.trim(), i + 1)))
    };
    text.split(',').enumerate().map(one).collect()
}

/// Reads `input_ids` [T] and `segments` [S+1] (one sequence without them), of any integer type.
///
/// # Errors
/// A damaged file, a tensor that is missing, of another type or shape, or values that make no sequences.
pub(crate) fn read_sequences(path: &Path) -> Result<Sequences> {
    let bytes = std::fs::read(path).map_err(Failure::io("read", path))?;
    let bad = |why: String| Failure::new(format!("{}: {why}", path.display()));
    let file = SafeTensors::deserialize(&bytes).map_err(|e| bad(format!("is no usable safetensors file ({e})")))?;
    let get = |name: &str| -> Result<Option<Vec<i32>>> {
        match file.tensor(name) {
            Ok(t) => integers(&t).map(Some).map_err(|why| bad(format!("tensor `{name}` {why}"))),
            Err(_) => Ok(None),
        }
    };
    let Some(ids) = get("input_ids")? else {
        let have = file.names().join(", ");
        return Err(bad(format!("has no tensor `input_ids` [T]; it has: {have}")));
    };
    let segments = get("segments")?.unwrap_or_else(|| vec![0, ids.len() as i32]);
    let rising = segments.windows(2).all(|w| w[0] < w[1]);
    if segments.len() < 2 || segments[0] != 0 || !rising || segments.last().copied() != i32::try_from(ids.len()).ok() {
        return Err(bad(format!("`segments` must start at 0, rise, and end at {} (the number of ids)", ids.len())));
    }
    if let Some(i) = ids.iter().position(|x| *x < 0) {
        return Err(bad(format!("`input_ids` holds {} at place {i}; ids are not negative", ids[i])));
    }
    Ok(Sequences { ids, segments })
}

/// A rank-1 tensor of any integer type as i32.
fn integers(t: &TensorView<'_>) -> std::result::Result<Vec<i32>, String> {
    use safetensors::Dtype as D;
    if t.shape().len() != 1 {
        return Err(format!("has shape {:?}, expected one axis", t.shape()));
    }
    let size = match t.dtype() {
        D::U8 | D::I8 => 1,
        D::U16 | D::I16 => 2,
        D::U32 | D::I32 => 4,
        D::U64 | D::I64 => 8,
        other => return Err(format!("is {other:?}, expected integers")),
    };
    let signed = matches!(t.dtype(), D::I8 | D::I16 | D::I32 | D::I64);
    let value = |c: &[u8]| {
        let mut wide = [if signed && c[size - 1] & 0x80 != 0 { 0xff } else { 0 }; 8];
        wide[..size].copy_from_slice(c);
        let x = if signed { i128::from(i64::from_le_bytes(wide)) } else { i128::from(u64::from_le_bytes(wide)) };
        i32::try_from(x).map_err(|_| format!("holds {x}, which is no id"))
    };
    t.data().chunks_exact(size).map(value).collect()
}

/// Writes f32 tensors (name, shape, bytes) to a safetensors file that is whole or not there.
///
/// # Errors
/// What the system refuses.
pub(crate) fn write_tensors(path: &Path, tensors: &[(&str, Vec<u64>, &[u8])]) -> Result<()> {
    if path.is_dir() {
        return Err(Failure::usage(format!("{}: is a folder; --out names a file", path.display())));
    }
    let tensors: Vec<Saved<'_>> = tensors
        .iter()
        .map(|(name, shape, bytes)| (name.to_string(), Dtype::F32, shape.clone(), Cow::Borrowed(*bytes)))
        .collect();
    crate::files::put(path, |temporary| Ok(files::write_tensors(temporary, &tensors)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_packed_and_positions_restart() {
        let s = Sequences::pack(&[parse_ids("5, 6,7").unwrap(), vec![8]]).unwrap();
        assert_eq!(s, Sequences { ids: vec![5, 6, 7, 8], segments: vec![0, 3, 4] });
        assert_eq!((s.len(), s.longest()), (2, 3));
        let i = InferInputs::new(&s, true);
        assert_eq!((&i.positions[..], &i.lengths[..]), (&[0, 1, 2, 0][..], &[3, 1][..]));
        assert!(parse_ids("1,x").is_err() && parse_ids("-1").is_err() && parse_ids("").is_err());
        assert!(Sequences::pack(&[]).is_err() && Sequences::pack(&[vec![]]).is_err());
    }

    #[test]
    fn any_integer_type_is_read() {
        let i64s: Vec<u8> = [3i64, -1].iter().flat_map(|x| x.to_le_bytes()).collect();
        let view = |d, n, b| TensorView::new(d, vec![n], b).unwrap();
        assert_eq!(integers(&view(safetensors::Dtype::I64, 2, &i64s)), Ok(vec![3, -1]));
        assert_eq!(integers(&view(safetensors::Dtype::U8, 2, &[200, 1])), Ok(vec![200, 1]));
        assert_eq!(integers(&view(safetensors::Dtype::I8, 1, &[0xff])), Ok(vec![-1]));
        assert!(integers(&view(safetensors::Dtype::F32, 1, &[0; 4])).is_err());
        assert!(integers(&view(safetensors::Dtype::U64, 1, &[0xff; 8])).is_err());
    }
}
