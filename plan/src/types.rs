//! What a plan holds: symbols, parameters, kernels, entries, and blobs of code.
//!
//! A plan is data. It holds no weights: parameters are named, and a session finds their values. Nothing here runs or
//! reads anything; [`crate::validate`] says what every consumer may rely on.

use crate::expr::{Expr, ExprError};
use crate::layout::Layout;
use crate::library::ByLibrary;
use serde::{Deserialize, Serialize};

/// Element type.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "each name is the type")]
pub enum DType {
    F32,
    BF16,
    F16,
    I32,
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

    /// The name: `f32`, `bf16`, `f16`, `i32`, `bool`.
    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::BF16 => "bf16",
            DType::F16 => "f16",
            DType::I32 => "i32",
            DType::Bool => "bool",
        }
    }
}

/// A count known when the plan runs.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Symbol {
    /// `T`, `S`, `S1`, `C`, `P`, …
    pub name: String,
    /// For a symbol that follows from earlier ones: its value. `S1` is `S + 1`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<Expr>,
}

impl Symbol {
    /// Symbols in the order given, each name once. `S1` becomes `S + 1`, and `S` is put before it when missing.
    pub fn list<'a>(names: impl IntoIterator<Item = &'a str>) -> Vec<Symbol> {
        let mut out: Vec<Symbol> = vec![];
        let mut names: Vec<&str> = names.into_iter().collect();
        // A defined symbol comes after the one it is defined by.
        names.sort_by_key(|n| *n == "S1");
        for n in names {
            if n == "S1" && !out.iter().any(|s| s.name == "S") {
                out.push(Symbol { name: "S".into(), value: None });
            }
            if out.iter().any(|s| s.name == n) {
                continue;
            }
            let s = out.iter().position(|s| s.name == "S").unwrap_or(0) as u32;
            let value = (n == "S1").then(|| Expr::Sym(s).add(1));
            out.push(Symbol { name: n.to_string(), value });
        }
        out
    }
}

/// What the code was compiled for.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Target {
    /// `x86_64`, or a GPU: `sm_80`.
    pub arch: String,
    /// Processor features the code uses, as Rust names them: `avx2`, `fma`, `avx512f`, …
    pub features: Vec<String>,
}

/// What a parameter is for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "each name is the role")]
pub enum Role {
    Frozen,
    Train,
    Index,
    Gate,
    Stat,
    State,
    Teacher,
}

/// Where a parameter's values come from.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// A tensor of the base checkpoint, by its name there.
    Checkpoint(String),
    /// A tensor of the adapter in a slot.
    Adapter {
        /// Slot number.
        slot: u32,
        /// Key in the slot, as the frontend's key map gives it: `model.layers.0.self_attn.q_proj.lora_A`.
        key: String,
    },
    /// Filled by a `prepare` entry.
    Derived,
    /// Starts as zeros (caches, optimizer state).
    Zeros,
}

/// What stays in memory of a parameter.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Residency {
    /// Read in place from the mapped file (or from a cast copy, when the file holds another type).
    Mapped,
    /// Read by `prepare` entries only; its pages are given back after each of them.
    PrepareOnly,
    /// In memory of the session, writable.
    Owned,
}

/// A named buffer that outlives a run.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Param {
    /// Unique name.
    pub name: String,
    /// Element type in memory.
    pub dtype: DType,
    /// Dimensions, outermost first. Symbols in it are fixed when a session is opened.
    pub shape: Vec<Expr>,
    /// How it lies in memory.
    pub layout: Layout,
    /// Size in its layout, bytes.
    pub bytes: Expr,
    /// What it is for.
    pub role: Role,
    /// Where its values come from.
    pub source: Source,
    /// What stays in memory.
    pub residency: Residency,
}

impl Param {
    /// A parameter with the size its layout gives, and [`Residency::Mapped`] for a checkpoint tensor, else owned.
    /// [`Plan::settle_residency`] refines that from use.
    pub fn new(
        name: impl Into<String>,
        dtype: DType,
        shape: Vec<Expr>,
        layout: Layout,
        role: Role,
        source: Source,
    ) -> Param {
        let bytes = layout.bytes(dtype, &shape).unwrap_or(Expr::Const(0));
        let residency = if matches!(source, Source::Checkpoint(_)) { Residency::Mapped } else { Residency::Owned };
        Param { name: name.into(), dtype, shape, layout, bytes, role, source, residency }
    }
}

/// Compiled code for one kernel signature.
///
/// Host ABI: `extern "C" fn(buffers: *const *mut u8, dims: *const i64, first: i64, last: i64, scratch: *mut u8)`.
/// `buffers` holds operands, then results; `dims` the values of all the plan's symbols; the call computes the tasks
/// `first..last` of `0..tasks`. Tasks are independent, so any split over workers gives the same bytes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Kernel {
    /// Symbol in the blob.
    pub symbol: String,
    /// Index of the blob that has the code.
    pub blob: u32,
    /// `row`, `contraction`, `attention`, `scatter`.
    pub class: String,
    /// Number of tasks.
    pub tasks: Expr,
    /// Memory each worker needs while it runs tasks, bytes, 64-byte aligned.
    pub scratch_bytes: Expr,
    /// Sizes of the operands in bytes: what the code may read.
    pub operands: Vec<Expr>,
    /// Sizes of the results in bytes: what the code may write.
    pub results: Vec<Expr>,
    /// `aliases[i] = Some(j)`: result `i` may be the same buffer as operand `j`, and is updated in place.
    pub aliases: Vec<Option<u32>>,
    /// Floating-point operations, for reports.
    pub flops: Expr,
    /// Bytes moved at least, for reports.
    pub bytes: Expr,
    /// For a GPU: the launches that are one run of the kernel, in order on one stream. Empty for host code.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub launches: Vec<Launch>,
    /// For a GPU: another way to run it, which is taken where the machine has the library.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub library: Option<ByLibrary>,
}

/// One launch of a GPU kernel. In a GPU plan a [`Kernel`]'s `tasks` are the blocks of all its launches, and `scratch_bytes` is
/// needed once for a run.
///
/// The grid may be evaluated at larger counts than those behind [`LaunchParam::Dims`]: blocks past the end leave early.
/// Buffers start at multiples of 256 bytes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Launch {
    /// Entry of the PTX text.
    pub function: String,
    /// Blocks in x, y, z; each at least 1.
    pub grid: [Expr; 3],
    /// Threads of a block, in x: a multiple of 32, at most 1024.
    pub block: u32,
    /// Dynamic shared memory of a block, bytes.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub shared_bytes: u32,
    /// What each parameter of the entry is.
    pub params: Vec<LaunchParam>,
    /// Counts for which it runs, where another launch of the kernel takes the others; `None`: it always runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub when: Option<When>,
}

impl Launch {
    /// Whether it runs at these counts: those that its grid is evaluated at, which smaller counts may follow.
    ///
    /// # Errors
    /// As [`Expr::eval`].
    pub fn runs(&self, env: &[u64]) -> Result<bool, ExprError> {
        self.when.as_ref().map_or(Ok(true), |w| w.holds(env))
    }
}

/// A range of a count: `above < count <= most`. A launch chosen at a count is right for every smaller one.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct When {
    /// What is counted.
    pub count: Expr,
    /// The count is larger than this.
    pub above: u64,
    /// And not larger than this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub most: Option<u64>,
}

impl When {
    /// Whether the count is in the range.
    ///
    /// # Errors
    /// As [`Expr::eval`].
    pub fn holds(&self, env: &[u64]) -> Result<bool, ExprError> {
        let n = self.count.eval(env)?;
        Ok(n > self.above && self.most.is_none_or(|m| n <= m))
    }
}

fn is_zero(n: &u32) -> bool {
    *n == 0
}

/// A parameter of a GPU entry.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LaunchParam {
    /// Pointer to the buffer of that number: operands, then results.
    Buffer(u32),
    /// Pointer to a table of pointers, one to each of these buffers, in memory of the device.
    Table(Vec<u32>),
    /// Pointer to the kernel's scratch memory, whose contents last from launch to launch of one run.
    Scratch,
    /// Pointer to the i64 values of all the plan's symbols.
    Dims,
    /// A tensor map (`CUtensorMap`) by value: 128 bytes, aligned to 64.
    TensorMap(TensorMap),
}

/// How a GPU copies tiles of a buffer: no interleaving, unit element strides, zeros outside.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TensorMap {
    /// Buffer of the kernel where element 0 lies.
    pub buffer: u32,
    /// Element type.
    pub dtype: DType,
    /// Elements of each dimension, innermost first.
    pub sizes: Vec<Expr>,
    /// Bytes from one element to the next of every dimension but the innermost.
    pub strides: Vec<Expr>,
    /// Elements of the tile, innermost first.
    pub boxes: Vec<u32>,
    /// Swizzle of the tile in shared memory, bytes: 0, 32, 64 or 128.
    pub swizzle: u32,
}

/// What the values of an integer input must satisfy, so that no index leaves its table.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Check {
    /// `0 <= v < upper`.
    Range(Expr),
    /// No value occurs twice; goes with [`Check::Range`], whose bound also bounds the work.
    Distinct,
    /// Starts at 0, never falls, ends at this value.
    Segments(Expr),
    /// A length `>= 0` with `start[i] + v[i] <= total`.
    Span {
        /// Name of the input with the starts.
        start: String,
        /// Size of what is indexed.
        total: Expr,
    },
    /// At least as long as the segment of the same number: `v[i] >= segments[i+1] - segments[i]`.
    Covers(String),
}

/// A tensor the caller gives.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Input {
    /// Name.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Dimensions; a dimension that is a single symbol gives that symbol its value.
    pub shape: Vec<Expr>,
    /// What integer values must satisfy.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub checks: Vec<Check>,
}

/// A tensor the caller gets.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Output {
    /// Name.
    pub name: String,
    /// Buffer of the entry that holds it: of kind [`BufferKind::Output`] or a parameter.
    pub buffer: u32,
    /// Element type.
    pub dtype: DType,
    /// Dimensions.
    pub shape: Vec<Expr>,
}

/// Where a buffer's bytes live.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BufferKind {
    /// The input of that index.
    Input(u32),
    /// The parameter of that index.
    Param(u32),
    /// Between steps, in the arena.
    Arena,
    /// In the arena until the entry ends.
    Output,
}

/// Bytes that steps read and write.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Buffer {
    /// Where.
    pub kind: BufferKind,
    /// How many.
    pub bytes: Expr,
    /// For reports: what it holds and where that stems from.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
}

/// One launch.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Step {
    /// Index of the kernel.
    pub kernel: u32,
    /// Buffers of the entry: operands, then results. A result updated in place names its operand's buffer.
    pub buffers: Vec<u32>,
    /// Module path or pass this launch stems from.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub origin: String,
}

/// A runnable function.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Entry {
    /// `infer`, `generate`, `prepare(base)`, `prepare(slot0)`, …
    pub name: String,
    /// What the caller gives.
    pub inputs: Vec<Input>,
    /// What the caller gets.
    pub outputs: Vec<Output>,
    /// Buffers.
    pub buffers: Vec<Buffer>,
    /// Launches in order.
    pub steps: Vec<Step>,
    /// Loops over windows of rows, in the order of their steps.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub loops: Vec<Loop>,
}

/// A buffer that a loop moves through.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Window {
    /// Buffer of the entry.
    pub buffer: u32,
    /// Bytes of a row: a window that starts at row `i` is seen from `i * row_bytes` on.
    pub row_bytes: Expr,
}

/// Steps that run once for every window of rows. In a window the symbol stands for the rows of the window: `chunk`, in the
/// last one the rest. What lies between its steps holds one window.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Loop {
    /// First step.
    pub first: u64,
    /// One past the last step.
    pub last: u64,
    /// Index of the symbol that is cut into windows.
    pub symbol: u32,
    /// Rows of a window.
    pub chunk: u64,
    /// Buffers seen at the rows of the window; all others are seen from their start.
    pub windows: Vec<Window>,
}

impl Entry {
    /// For `prepare(base)` and `prepare(slotN)`: `Some(None)` and `Some(Some(N))`.
    pub fn prepares(&self) -> Option<Option<u32>> {
        match self.name.strip_prefix("prepare(")?.strip_suffix(')')? {
            "base" => Some(None),
            s => s.strip_prefix("slot")?.parse().ok().map(Some),
        }
    }
}

/// Facts about the model that loops and reports need.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Meta {
    /// `decoder`, `encoder`, or empty for a bare graph.
    pub kind: String,
    /// Vocabulary size.
    pub vocab: u64,
    /// Width of the hidden state.
    pub hidden: u64,
    /// Number of layers.
    pub layers: u64,
    /// Positions the model was made for.
    pub max_positions: u64,
    /// Token types of an encoder.
    pub type_vocab: u64,
    /// End-of-sequence ids.
    pub eos: Vec<i32>,
    /// Begin-of-sequence id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bos: Option<i32>,
    /// Anything else a caller wants to keep with the plan, in a fixed order.
    pub extra: serde_json::Map<String, serde_json::Value>,
}

/// What a blob is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlobKind {
    /// A shared object for the host.
    HostObject,
    /// PTX text.
    Ptx,
    /// Anything else, for tools.
    Other,
}

/// A section of bytes beside the manifest.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Blob {
    /// Name, for reports.
    pub name: String,
    /// What it is.
    pub kind: BlobKind,
    /// The bytes; not part of the manifest.
    #[serde(skip)]
    pub bytes: Vec<u8>,
}

/// The form that was chosen for a kernel where there are several, by measuring. Compiling again takes it where a kernel has
/// the same signature.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct Choice {
    /// What the kernel computes.
    pub signature: String,
    /// The form, as the code generator names it.
    pub form: String,
}

/// A compiled model: everything but the weights.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Plan {
    /// What the code was compiled for.
    pub target: Target,
    /// Symbols, in the order of the kernels' `dims`.
    pub symbols: Vec<Symbol>,
    /// Parameters.
    pub params: Vec<Param>,
    /// Kernels, each signature once.
    pub kernels: Vec<Kernel>,
    /// Entries.
    pub entries: Vec<Entry>,
    /// Facts about the model.
    pub meta: Meta,
    /// Code.
    pub blobs: Vec<Blob>,
    /// Forms of kernels that were measured and chosen.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub choices: Vec<Choice>,
}
