//! The operators. Equality, order and hash come from `derive`, so an operator is an e-graph label as it stands.
//!
//! Numbers that a rewrite must bind (an adapter's scale) are operands; attributes only shape the result.
//! Norms, softmax, losses, rotary embeddings and activations are compositions of these.

use crate::graph::ParamId;
use crate::types::{DType, Dim};

/// Elementwise functions of one operand.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[allow(missing_docs, reason = "each name is the function")]
pub enum UnaryOp {
    Neg,
    Abs,
    Exp,
    Log,
    Sqrt,
    /// 1 / sqrt(x)
    Rsqrt,
    /// 1 / x
    Recip,
    Sin,
    Cos,
    Tanh,
    Erf,
    /// 1 / (1 + exp(-x))
    Sigmoid,
    Floor,
    /// Logical negation of a bool.
    Not,
}

impl UnaryOp {
    /// Every variant with its mnemonic.
    pub const ALL: [(UnaryOp, &'static str); 14] = [
        (UnaryOp::Neg, "neg"),
        (UnaryOp::Abs, "abs"),
        (UnaryOp::Exp, "exp"),
        (UnaryOp::Log, "log"),
        (UnaryOp::Sqrt, "sqrt"),
        (UnaryOp::Rsqrt, "rsqrt"),
        (UnaryOp::Recip, "recip"),
        (UnaryOp::Sin, "sin"),
        (UnaryOp::Cos, "cos"),
        (UnaryOp::Tanh, "tanh"),
        (UnaryOp::Erf, "erf"),
        (UnaryOp::Sigmoid, "sigmoid"),
        (UnaryOp::Floor, "floor"),
        (UnaryOp::Not, "not"),
    ];
}

/// Elementwise functions of two operands of one shape; a rank-0 operand stands for its value everywhere.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[allow(missing_docs, reason = "each name is the function")]
pub enum BinaryOp {
    Sub,
    Mul,
    Div,
    Max,
    Min,
    /// a < b, a bool
    Lt,
    /// a <= b, a bool
    Le,
    /// a == b, a bool
    Eq,
    /// Logical, on bools.
    And,
    /// Logical, on bools.
    Or,
}

impl BinaryOp {
    /// Every variant with its mnemonic.
    pub const ALL: [(BinaryOp, &'static str); 10] = [
        (BinaryOp::Sub, "sub"),
        (BinaryOp::Mul, "mul"),
        (BinaryOp::Div, "div"),
        (BinaryOp::Max, "max"),
        (BinaryOp::Min, "min"),
        (BinaryOp::Lt, "lt"),
        (BinaryOp::Le, "le"),
        (BinaryOp::Eq, "eq"),
        (BinaryOp::And, "and"),
        (BinaryOp::Or, "or"),
    ];

    /// True for comparisons, whose result is a bool.
    pub fn is_compare(self) -> bool {
        matches!(self, BinaryOp::Lt | BinaryOp::Le | BinaryOp::Eq)
    }
}

/// How a reduction combines.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[allow(missing_docs, reason = "each name is the function")]
pub enum ReduceOp {
    Sum,
    Max,
    Min,
}

impl ReduceOp {
    /// Every variant with its mnemonic.
    pub const ALL: [(ReduceOp, &'static str); 3] =
        [(ReduceOp::Sum, "reduce_sum"), (ReduceOp::Max, "reduce_max"), (ReduceOp::Min, "reduce_min")];
}

/// What a scatter does where an index points.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum ScatterMode {
    /// Replace; where an index repeats, the last one wins.
    Set,
    /// Add; repeated indices all count.
    Add,
}

/// Attributes of attention over packed sequences.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct AttentionAttrs {
    /// Query heads.
    pub heads: u32,
    /// Key/value heads; divides `heads`. Query head `h` reads key/value head `h / (heads / kv_heads)`.
    pub kv_heads: u32,
    /// Width of one head.
    pub head_dim: u32,
    /// Bits of the f32 factor on the scores, usually 1/sqrt(head_dim).
    pub scale: u32,
    /// A query sees no key after its own position.
    pub causal: bool,
    /// A query sees at most this many keys, its own included.
    pub window: Option<u32>,
}

/// Which operand of an attention a gradient is for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[allow(missing_docs, reason = "each name is the operand")]
pub enum AttentionWrt {
    Q,
    K,
    V,
}

impl AttentionWrt {
    /// Every variant with the mnemonic of its gradient.
    pub const ALL: [(AttentionWrt, &'static str); 3] = [
        (AttentionWrt::Q, "attention_grad_q"),
        (AttentionWrt::K, "attention_grad_k"),
        (AttentionWrt::V, "attention_grad_v"),
    ];
}

/// An operator. In the comments `x`, `a`, `b` are operands in order.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Op {
    // ---- leaves ----
    /// A value given when the entry runs. Carries its own type.
    Input {
        /// Name, unique in the entry.
        name: String,
        /// Element type.
        dtype: DType,
        /// Shape.
        shape: Vec<Dim>,
    },
    /// A parameter's value at entry.
    Param(ParamId),
    /// A small constant tensor, row-major; each element as the bits of its type (bool: 0 or 1) in the low end of a u32.
    Const {
        /// Element type.
        dtype: DType,
        /// Static shape; empty for a scalar.
        shape: Vec<u64>,
        /// Element bits, as many as the shape says.
        bits: Vec<u32>,
    },
    /// i32 tensor whose element is its index along `axis`.
    Iota {
        /// Shape.
        shape: Vec<Dim>,
        /// Axis that counts.
        axis: u8,
    },

    // ---- elementwise ----
    /// f(x).
    Unary(UnaryOp),
    /// f(a, b).
    Binary(BinaryOp),
    /// n-ary sum of at least two operands of one shape (rank-0 operands stand for their value everywhere).
    Add,
    /// `c ? a : b` with `c` a bool of the same shape.
    Select,
    /// x as another element type; floats round to nearest even, float to int truncates.
    Cast(DType),

    // ---- contraction ----
    /// a·b over the last two axes, leading axes are batch and must agree. Float operands of one type;
    /// the result is f32, the type of the accumulator.
    MatMul {
        /// Use aᵀ (last two axes).
        ta: bool,
        /// Use bᵀ (last two axes).
        tb: bool,
    },

    // ---- reduction ----
    /// Combines along one axis and removes it. f32 in, f32 out (or i32).
    Reduce {
        /// How.
        op: ReduceOp,
        /// Which axis.
        axis: u8,
    },

    /// The `k` largest elements of every row of an f32 tensor, the last axis being the row: `[…, n]` → `[…, k]`, from the largest down, of
    /// equals the one with the smaller index first. An element's place is the number of elements that are larger, or equal with a smaller
    /// index; so rows with a NaN, which is neither, have places that none or several take, and give 0 or the sum there.
    TopK {
        /// How many.
        k: u64,
        /// Their indices, i32, in place of their values.
        indices: bool,
    },

    // ---- movement ----
    /// The same elements in row-major order under another shape.
    Reshape(Vec<Dim>),
    /// Axis `i` of the result is axis `perm[i]` of x.
    Transpose(Vec<u8>),
    /// x into a larger shape: axis `i` of x becomes axis `axes[i]` of the result (ascending), the others repeat.
    Broadcast {
        /// Result shape.
        shape: Vec<Dim>,
        /// Where x's axes go.
        axes: Vec<u8>,
    },
    /// Elements `start..end` of a static axis.
    Slice {
        /// Axis.
        axis: u8,
        /// First element.
        start: u64,
        /// One past the last element.
        end: u64,
    },
    /// Zeros before and after a static axis.
    Pad {
        /// Axis.
        axis: u8,
        /// Zeros before.
        lo: u64,
        /// Zeros after.
        hi: u64,
    },
    /// Operands one after another along a static axis.
    Concat {
        /// Axis.
        axis: u8,
    },
    /// `(x, i)`: elements of `axis` picked by i32 indices of rank 1. An index out of range is an error of the caller.
    Gather {
        /// Axis.
        axis: u8,
    },
    /// `(x, i, u)`: x with `u` set or added along `axis` at i32 indices of rank 1.
    Scatter {
        /// Axis.
        axis: u8,
        /// Set or add.
        mode: ScatterMode,
    },

    // ---- attention ----
    /// `(q [T, heads*head_dim], k [N, kv_heads*head_dim], v [N, …], q_segments i32 [S1], kv_start i32 [S],
    /// kv_len i32 [S])`: sequence `s` has queries `q_segments[s]..q_segments[s+1]` and keys
    /// `kv_start[s]..kv_start[s]+kv_len[s]`; its last query stands at its last key. Result like q.
    Attention(AttentionAttrs),
    /// `(q, k, q_segments, kv_start, kv_len)` as for [`Op::Attention`]: f32 `[T, heads]`, the logarithm of the sum of
    /// exp(scaled score) over the keys that a query sees.
    AttentionLse(AttentionAttrs),
    /// `(q, k, v, out, lse, d_out, q_segments, kv_start, kv_len)`: the gradient of an attention with result `out` and
    /// log-sum-exp `lse`, for the cotangent `d_out` of its result. `out` and `d_out` are like q; the result is like the
    /// operand it is for, zero where no query sees a key. Gradients of one attention have equal operands and are one
    /// kernel.
    AttentionGrad {
        /// Attributes of the attention.
        attrs: AttentionAttrs,
        /// Which gradient.
        wrt: AttentionWrt,
    },

    // ---- order ----
    /// `(x, token)`: x, to be computed only after `token` exists. The token's elements are never read and may have any
    /// type. It keeps what is computed a second time apart from the first.
    After,

    /// x, but no gradient flows through it.
    StopGradient,
}

impl Op {
    /// A scalar f32 constant.
    pub fn f32(x: f32) -> Op {
        Op::Const { dtype: DType::F32, shape: vec![], bits: vec![x.to_bits()] }
    }

    /// A scalar i32 constant.
    pub fn i32(x: i32) -> Op {
        Op::Const { dtype: DType::I32, shape: vec![], bits: vec![x as u32] }
    }

    /// A rank-1 f32 constant.
    pub fn f32s(xs: &[f32]) -> Op {
        Op::Const { dtype: DType::F32, shape: vec![xs.len() as u64], bits: xs.iter().map(|x| x.to_bits()).collect() }
    }

    /// The mnemonic of the text form.
    pub fn name(&self) -> &'static str {
        match self {
            Op::Input { .. } => "input",
            Op::Param(_) => "param",
            Op::Const { .. } => "const",
            Op::Iota { .. } => "iota",
            Op::Unary(u) => UnaryOp::ALL.iter().find(|(v, _)| v == u).map_or("unary", |x| x.1),
            Op::Binary(b) => BinaryOp::ALL.iter().find(|(v, _)| v == b).map_or("binary", |x| x.1),
            Op::Add => "add",
            Op::Select => "select",
            Op::Cast(_) => "cast",
            Op::MatMul { .. } => "matmul",
            Op::Reduce { op, .. } => ReduceOp::ALL.iter().find(|(v, _)| v == op).map_or("reduce", |x| x.1),
            Op::TopK { indices: false, .. } => "top_k_values",
            Op::TopK { indices: true, .. } => "top_k_indices",
            Op::Reshape(_) => "reshape",
            Op::Transpose(_) => "transpose",
            Op::Broadcast { .. } => "broadcast",
            Op::Slice { .. } => "slice",
            Op::Pad { .. } => "pad",
            Op::Concat { .. } => "concat",
            Op::Gather { .. } => "gather",
            Op::Scatter { mode: ScatterMode::Set, .. } => "scatter_set",
            Op::Scatter { mode: ScatterMode::Add, .. } => "scatter_add",
            Op::Attention(_) => "attention",
            Op::AttentionLse(_) => "attention_lse",
            Op::AttentionGrad { wrt, .. } => {
                AttentionWrt::ALL.iter().find(|(w, _)| w == wrt).map_or("attention_grad", |x| x.1)
            }
            Op::After => "after",
            Op::StopGradient => "stop_gradient",
        }
    }

    /// True for operators without operands.
    pub fn is_leaf(&self) -> bool {
        matches!(self, Op::Input { .. } | Op::Param(_) | Op::Const { .. } | Op::Iota { .. })
    }

    /// True when element `i` of the result depends on element `i` of the operands alone.
    pub fn is_elementwise(&self) -> bool {
        matches!(self, Op::Unary(_) | Op::Binary(_) | Op::Add | Op::Select | Op::Cast(_) | Op::StopGradient)
    }

    /// True for attention, its log-sum-exp and its gradients.
    pub fn is_attention(&self) -> bool {
        matches!(self, Op::Attention(_) | Op::AttentionLse(_) | Op::AttentionGrad { .. })
    }

    /// True for operators that only move elements (no arithmetic).
    pub fn is_movement(&self) -> bool {
        matches!(
            self,
            Op::Reshape(_)
                | Op::Transpose(_)
                | Op::Broadcast { .. }
                | Op::Slice { .. }
                | Op::Pad { .. }
                | Op::Concat { .. }
                | Op::Gather { .. }
                | Op::Scatter { mode: ScatterMode::Set, .. }
        )
    }
}
