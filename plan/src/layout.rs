//! How the tensor of a parameter lies in memory.

use crate::expr::Expr;
use crate::types::DType;
use serde::{Deserialize, Serialize};

/// How a tensor lies in memory.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// Row-major, dense.
    #[default]
    RowMajor,
    /// Panels of `nr` columns, `[ceil(N/nr)][K][nr]`, the last one padded with zeros; 16-bit elements in pairs along
    /// `K`, `[ceil(N/nr)][ceil(K/2)][nr][2]`.
    Panels {
        /// Columns of a panel, a multiple of 16.
        nr: u32,
        /// False: the tensor is `[K, N]`. True: `[N, K]`.
        transposed: bool,
    },
    /// `[N, K]` in blocks along `K` as a checkpoint stores them, row after row.
    Blocks(BlockFormat),
    /// `[N, K]` in panels of `nr` columns of a product, `[ceil(N/nr)][K/32]`, as codes: each piece holds the scales, the
    /// minima if there are any, and the codes of 32 steps.
    CodedPanels {
        /// Columns of a panel, a multiple of 16.
        nr: u32,
        /// What a code and its scale stand for.
        format: BlockFormat,
    },
}

/// Blocks of 32 values with a common f16 scale, and an f16 minimum where the format has one: ggml's types.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[allow(non_camel_case_types, reason = "ggml's own names")]
pub enum BlockFormat {
    /// 4-bit codes minus 8; 18 bytes.
    #[serde(rename = "q4_0")]
    Q4_0,
    /// 4-bit codes and a minimum; 20 bytes.
    #[serde(rename = "q4_1")]
    Q4_1,
    /// 8-bit signed codes; 34 bytes.
    #[serde(rename = "q8_0")]
    Q8_0,
}

impl BlockFormat {
    /// Values in a block.
    pub const VALUES: u64 = 32;

    /// Every format.
    pub const ALL: [BlockFormat; 3] = [BlockFormat::Q4_0, BlockFormat::Q4_1, BlockFormat::Q8_0];

    /// The format of that name.
    pub fn from_name(name: &str) -> Option<BlockFormat> {
        BlockFormat::ALL.into_iter().find(|f| f.name() == name)
    }

    /// Bytes of a block.
    pub fn bytes(self) -> u64 {
        match self {
            BlockFormat::Q4_0 => 18,
            BlockFormat::Q4_1 => 20,
            BlockFormat::Q8_0 => 34,
        }
    }

    /// Its name, in lower case.
    pub fn name(self) -> &'static str {
        match self {
            BlockFormat::Q4_0 => "q4_0",
            BlockFormat::Q4_1 => "q4_1",
            BlockFormat::Q8_0 => "q8_0",
        }
    }
}

impl Layout {
    /// Bytes a tensor takes in this layout. All but row-major need rank 2.
    pub fn bytes(&self, dtype: DType, shape: &[Expr]) -> Option<Expr> {
        let panels = |n: &Expr, nr: u32| n.clone().ceil_div(u64::from(nr)).mul(u64::from(nr));
        Some(match (self, shape) {
            (Layout::RowMajor, _) => Expr::product(shape.iter().cloned()).mul(dtype.size()),
            (Layout::Panels { nr, transposed }, [r, c]) => {
                let (k, n) = if *transposed { (c, r) } else { (r, c) };
                let k = if dtype.size() == 2 { k.clone().ceil_div(2).mul(2) } else { k.clone() };
                panels(n, *nr).mul(k).mul(dtype.size())
            }
            (Layout::Blocks(format), [n, k]) => {
                n.clone().mul(k.clone().ceil_div(BlockFormat::VALUES)).mul(format.bytes())
            }
            (Layout::CodedPanels { nr, format }, [n, k]) => {
                panels(n, *nr).mul(k.clone().ceil_div(BlockFormat::VALUES)).mul(format.bytes())
            }
            _ => return None,
        })
    }
}
