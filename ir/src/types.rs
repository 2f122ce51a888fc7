//! Element types, dimensions and tensor types.
//!
//! Feature dimensions are static; only counts (tokens `T`, sequences `S`, cache length `C`, table length `P`, counted rows of the
//! loss `L`) are symbolic. A symbol becomes an i64 loop bound of the kernels, so one compiled plan serves any count.

use std::fmt;

/// Element type of a tensor.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// The upper half of a binary32.
    BF16,
    /// IEEE binary16.
    F16,
    /// Signed 32-bit integer: ids, positions, segment bounds, indices.
    I32,
    /// One byte, 0 or 1: the result of comparisons.
    Bool,
}

impl DType {
    /// Size of one element in bytes.
    pub fn size(self) -> u64 {
        match self {
            DType::F32 | DType::I32 => 4,
            DType::BF16 | DType::F16 => 2,
            DType::Bool => 1,
        }
    }

    /// True for the floating-point types.
    pub fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::BF16 | DType::F16)
    }

    /// The name in the text form.
    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::BF16 => "bf16",
            DType::F16 => "f16",
            DType::I32 => "i32",
            DType::Bool => "bool",
        }
    }

    /// The inverse of [`DType::name`].
    pub fn from_name(s: &str) -> Option<DType> {
        Some(match s {
            "f32" => DType::F32,
            "bf16" => DType::BF16,
            "f16" => DType::F16,
            "i32" => DType::I32,
            "bool" => DType::Bool,
            _ => return None,
        })
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The name of a symbolic count: one to seven ASCII letters, digits or `_`, not starting with a digit.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sym([u8; 7]);

impl Sym {
    /// Makes a symbol, or `None` when the name has a form that the text could not carry.
    pub fn new(name: &str) -> Option<Sym> {
        let b = name.as_bytes();
        let ok = !b.is_empty()
            && b.len() <= 7
            && !b[0].is_ascii_digit()
            && b.iter().all(|c| c.is_ascii_alphanumeric() || *c == b'_');
        let mut s = [0; 7];
        if ok {
            s[..b.len()].copy_from_slice(b);
        }
        ok.then_some(Sym(s))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        let n = self.0.iter().position(|c| *c == 0).unwrap_or(7);
        std::str::from_utf8(&self.0[..n]).unwrap_or("")
    }

    /// Tokens of the packed batch.
    pub const T: Sym = Sym(*b"T\0\0\0\0\0\0");
    /// Sequences of the packed batch.
    pub const S: Sym = Sym(*b"S\0\0\0\0\0\0");
    /// Sequences plus one: the length of segment bounds.
    pub const S1: Sym = Sym(*b"S1\0\0\0\0\0");
    /// Slots of the key/value cache.
    pub const C: Sym = Sym(*b"C\0\0\0\0\0\0");
    /// Counted rows of the loss: token positions whose next token is a target. At most `T`.
    pub const L: Sym = Sym(*b"L\0\0\0\0\0\0");
    /// Rows of position tables.
    pub const P: Sym = Sym(*b"P\0\0\0\0\0\0");
}

impl fmt::Debug for Sym {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for Sym {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One dimension of a tensor.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Dim {
    /// A number known at compile time.
    Known(u64),
    /// A count known when the plan runs.
    Symbol(Sym),
}

impl Dim {
    /// The value under an assignment of the symbols; `None` for an unassigned symbol.
    pub fn eval(self, env: &dyn Fn(Sym) -> Option<u64>) -> Option<u64> {
        match self {
            Dim::Known(n) => Some(n),
            Dim::Symbol(s) => env(s),
        }
    }

    /// The number, if the dimension is static.
    pub fn known(self) -> Option<u64> {
        match self {
            Dim::Known(n) => Some(n),
            Dim::Symbol(_) => None,
        }
    }
}

impl From<u64> for Dim {
    fn from(n: u64) -> Dim {
        Dim::Known(n)
    }
}

impl From<Sym> for Dim {
    fn from(s: Sym) -> Dim {
        Dim::Symbol(s)
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Dim::Known(n) => write!(f, "{n}"),
            Dim::Symbol(s) => write!(f, "{s}"),
        }
    }
}

/// Element type and shape, row-major. Printed as `f32[T,576]`; rank 0 is `f32[]`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct TensorType {
    /// Element type.
    pub dtype: DType,
    /// Dimensions, outermost first.
    pub shape: Vec<Dim>,
}

impl TensorType {
    /// A tensor type from anything that converts to dimensions.
    pub fn new<D: Into<Dim>>(dtype: DType, shape: impl IntoIterator<Item = D>) -> TensorType {
        TensorType { dtype, shape: shape.into_iter().map(Into::into).collect() }
    }

    /// A rank-0 tensor type.
    pub fn scalar(dtype: DType) -> TensorType {
        TensorType { dtype, shape: vec![] }
    }

    /// Number of dimensions.
    pub fn rank(&self) -> usize {
        self.shape.len()
    }

    /// Number of elements under an assignment of the symbols; `None` for an unassigned symbol or past `u64`.
    pub fn elements(&self, env: &dyn Fn(Sym) -> Option<u64>) -> Option<u64> {
        self.shape.iter().try_fold(1u64, |n, d| n.checked_mul(d.eval(env)?))
    }

    /// Number of elements when every dimension is static.
    pub fn static_elements(&self) -> Option<u64> {
        self.elements(&|_| None)
    }

    /// Size in bytes under an assignment of the symbols.
    pub fn bytes(&self, env: &dyn Fn(Sym) -> Option<u64>) -> Option<u64> {
        self.elements(env)?.checked_mul(self.dtype.size())
    }

    /// The symbols that occur, sorted, each once.
    pub fn symbols(&self) -> Vec<Sym> {
        let mut v: Vec<Sym> =
            self.shape.iter().filter_map(|d| if let Dim::Symbol(s) = d { Some(*s) } else { None }).collect();
        v.sort_unstable();
        v.dedup();
        v
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[", self.dtype)?;
        for (i, d) in self.shape.iter().enumerate() {
            write!(f, "{}{d}", if i > 0 { "," } else { "" })?;
        }
        f.write_str("]")
    }
}
