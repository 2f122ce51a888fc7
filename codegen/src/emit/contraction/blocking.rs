//! Tile shapes and task sizes. All follow from shapes and the vector set, never from a thread count.

use super::analyze::{Analysis, Blocks, Group, Product, Right};
use super::view::Stride;
use crate::emit::HostIsa;
use pleach_ir::{DType, Dim, Layout};

/// Lanes of the vectors that tiles are made of; a narrower target splits them.
pub(super) const LANES: usize = 16;
/// Bytes of right operand that a task works on at a time: half of a 1 MiB second-level cache.
const BLOCK_BYTES: u64 = 512 << 10;
/// Rows that read codes as they are. Four fit the registers too, but each height of a tile takes time to compile.
pub(super) const FEW: u64 = 2;
/// The longest sum that runs in registers from end to end.
pub(super) const WHOLE_K: u64 = 2048;
/// Length of a part of a longer sum.
const PART_K: u64 = 1024;
/// The same in bytes where operands are packed, or read at one line a step: a tile's lines stay in the first cache.
const PART_BYTES: u64 = 2048;
/// A sum so long that its right operand comes from memory: tasks take wider pieces of its rows.
const STREAMED_K: u64 = 8192;
/// Rows of a task, about.
const TASK_ROWS: u64 = 64;
/// The same where the task packs its left operand: the packed block and the right operand share a cache.
const TASK_ROWS_LEFT: u64 = 128;
/// The same where the task packs its right operand only: packing must be little beside the products.
const TASK_ROWS_RIGHT: u64 = 512;
/// Tasks that rows are split into, at least, where columns give one or two.
const ROW_TASKS: u64 = 8;
/// Tasks that columns are split into, about, where few rows are left to split.
const COLUMN_TASKS: u64 = 16;

/// How the loops of a kernel are cut.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Blocking {
    /// Columns of a tile.
    pub(super) width: u64,
    /// Vectors of a tile's row.
    pub(super) vectors: usize,
    /// Registers that one vector takes.
    pub(super) registers: usize,
    /// Rows of a packed left operand that lie together; tiles never cross a block.
    pub(super) left_block: u64,
    /// Rows of the tiles, largest first; the last is 1.
    pub(super) rows: Vec<u64>,
    /// Rows of a task where rows are split.
    pub(super) task_rows: u64,
    /// Tiles side by side in a task where rows are split.
    pub(super) task_tiles: u64,
    /// Tiles side by side in a task where only columns are split (few rows).
    pub(super) narrow_tiles: u64,
    /// Of these, how many are worked on at a time.
    pub(super) narrow_chunk: u64,
    /// Length of a part of the sum, even; `None`: the whole sum in registers.
    pub(super) part: Option<u64>,
    /// The remainder runs on registers, unrolled; otherwise row by row from scratch memory.
    pub(super) direct: bool,
    /// Operands packed into scratch memory.
    pub(super) packs: Vec<Pack>,
}

/// Which operand of a product is packed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Side {
    /// Rows of the task, `[blocks][steps][rows of a block]`, for a group.
    Left(usize),
    /// Columns of the tiles at work, `[tile][steps][width]`, for a group.
    Right(usize),
}

/// An operand that each task packs: a step is an element of f32 or a pair of bf16.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Pack {
    pub(super) side: Side,
    pub(super) product: usize,
    /// Elements along the sum that are packed at a time.
    pub(super) depth: Dim,
    /// Elements more, for whole stores at the end.
    pub(super) slack: u64,
    /// Bytes for every element of the depth.
    pub(super) width_bytes: u64,
}

/// A packed depth is rounded up to this, so that squares of 16 steps may be stored whole.
pub(super) const DEPTH_STEP: u64 = 32;

/// Whether a right operand whose columns lie side by side is packed.
pub(super) fn packs_rows(dtype: DType, m: Dim, k: Dim) -> bool {
    dtype == DType::BF16 || (m.known().is_none_or(|m| m > 64) && k.known().is_some_and(|k| k > WHOLE_K))
}

impl Blocking {
    pub(super) fn new(a: &Analysis, isa: HostIsa, dot: bool) -> Result<Blocking, String> {
        let panels = || {
            a.groups.iter().flat_map(|g| g.products.iter().map(move |p| (g, &a.products[p.0]))).filter_map(|(g, p)| {
                match p.right {
                    Right::Panels { nr, .. } | Right::Coded { nr, .. } => Some((nr, g.offset)),
                    _ => None,
                }
            })
        };
        let blocks = |p: &Product| matches!(p.right, Right::Blocks(_));
        let sliced =
            |g: &Group| !g.offset.is_multiple_of(LANES as u64) && g.products.iter().any(|p| blocks(&a.products[p.0]));
        if a.groups.iter().any(sliced) {
            return Err("blocks are sliced at columns that are no multiple of 16".into());
        }
        let widths = panel_widths(isa);
        let width = if panels().next().is_some() {
            let fits = |w: &&u64| panels().all(|(nr, offset)| nr % **w == 0 && offset % **w == 0);
            *widths.iter().find(fits).ok_or("packed operands are sliced at columns that no tile divides")?
        } else {
            let n = a.n.known().unwrap_or(1 << 20);
            u64::from(choose_panel(n, &[], isa))
        };
        let vectors = (width / LANES as u64) as usize;
        // Pairs without dot products are split in registers, which takes more of them.
        let split = !dot && a.products.iter().any(Product::pairs);
        let rows = match (isa, vectors, split) {
            (HostIsa::Avx2, _, false) => vec![6, 2, 1],
            (HostIsa::Avx2, _, true) => vec![4, 2, 1],
            (HostIsa::Avx512, 1, _) => vec![16, 4, 2, 1],
            (HostIsa::Avx512, 2, false) => vec![12, 4, 2, 1],
            (HostIsa::Avx512, 2, true) => vec![10, 4, 2, 1],
            (HostIsa::Avx512, _, false) => vec![8, 4, 2, 1],
            (HostIsa::Avx512, _, true) => vec![6, 2, 1],
        };
        let longest = a.products.iter().map(|p| p.k.known()).try_fold(0, |n, k| Some(n.max(k?)));
        let left = a.products.iter().any(|p| p.packs_left);
        let packs = left || a.products.iter().any(|p| p.packs_right);
        let size = a.products.iter().map(|p| p.dtype.size()).max().unwrap_or(4);
        let across = |p: &Product| p.left.strides.last().and_then(Stride::known) != Some(1);
        // Codes are decoded into what plain panels, or rows of numbers, are: parts as long, so that both give the same bits.
        let as_numbers = |p: &Product| match p.right {
            Right::Coded { .. } => false,
            Right::Blocks(Blocks { along: false, .. }) => packs_rows(p.dtype, a.m, p.k),
            _ => p.packs_right,
        };
        let copied = left || a.products.iter().any(as_numbers);
        let part_k = if copied || a.products.iter().any(across) { PART_BYTES / size } else { PART_K };
        let part = match longest {
            Some(k) if k <= WHOLE_K => None,
            Some(k) => Some(k.div_ceil(k.div_ceil(part_k)).next_multiple_of(DEPTH_STEP)),
            None => Some(part_k),
        };
        let depth = |p: &Product| p.k.known().unwrap_or(part_k).min(part.unwrap_or(u64::MAX)).max(1) * p.dtype.size();
        let tile_bytes: u64 =
            a.groups.iter().flat_map(|g| &g.products).map(|p| depth(&a.products[p.0]) * width).sum::<u64>().max(1);
        let count = a.n.known().map(|n| n.div_ceil(width));
        let most = (BLOCK_BYTES / tile_bytes).clamp(1, 8).min(count.unwrap_or(8).max(1));
        let task_rows = match (left, packs) {
            (true, _) => TASK_ROWS_LEFT,
            // Few columns give few tasks unless rows are split too.
            (_, true) => (TASK_ROWS_RIGHT / 8 * count.unwrap_or(8)).clamp(TASK_ROWS_LEFT, TASK_ROWS_RIGHT),
            _ => TASK_ROWS,
        };
        // Blocks of equal height.
        let task_rows = match a.m {
            // Rows alone make the tasks where there are hardly any columns.
            Dim::Known(m) if count.is_some_and(|c| c <= 2) => task_rows.min(m.div_ceil(ROW_TASKS)),
            Dim::Known(m) if packs && m > task_rows => m.div_ceil(m.div_ceil(task_rows)),
            _ => task_rows,
        };
        let left_block = if (LANES as u64).is_multiple_of(rows[0]) { LANES as u64 } else { rows[0] };
        let task_rows = task_rows.next_multiple_of(if left { left_block } else { rows[0] });
        let (narrow_tiles, narrow_chunk, task_tiles) = if packs {
            let tasks = if longest.is_some_and(|k| k > STREAMED_K) { COLUMN_TASKS / 4 } else { COLUMN_TASKS };
            let n = count.unwrap_or(tasks).div_ceil(tasks).clamp(1, most);
            let blocks = a.m.known().unwrap_or(1).div_ceil(task_rows).max(1);
            let wide = count.unwrap_or(COLUMN_TASKS).div_ceil(COLUMN_TASKS.div_ceil(blocks)).clamp(1, most);
            (n, n, wide)
        } else {
            (count.unwrap_or(64).div_ceil(128).clamp(1, most), 1, most)
        };
        let mut b = Blocking {
            width,
            vectors,
            registers: LANES / isa.lanes(),
            left_block,
            task_rows,
            rows,
            task_tiles: task_tiles.max(narrow_chunk),
            narrow_tiles,
            narrow_chunk,
            part,
            direct: part.is_none() && a.groups.len() == 1 && a.cost <= 6,
            packs: vec![],
        };
        b.packs = b.packed(a);
        Ok(b)
    }

    /// The same for at most [`FEW`] rows.
    pub(super) fn for_few(mut self) -> Blocking {
        self.rows.retain(|r| *r <= FEW);
        self
    }

    /// Rows of a packed left operand.
    fn left_width(&self, m: Dim) -> u64 {
        m.known().unwrap_or(u64::MAX).min(self.task_rows).max(1).next_multiple_of(self.left_block)
    }

    fn packed(&self, a: &Analysis) -> Vec<Pack> {
        let mut packs = vec![];
        for (g, group) in a.groups.iter().enumerate() {
            for (i, (p, _)) in group.products.iter().enumerate() {
                let product = &a.products[*p];
                let long = i + 1 == group.products.len();
                let depth = match (self.part, product.k) {
                    (Some(part), Dim::Known(k)) if long => Dim::Known(part.min(k)),
                    (Some(part), _) if long => Dim::Known(part),
                    (_, k) => k,
                };
                if product.packs_right {
                    let width_bytes = self.task_tiles * self.width * product.dtype.size();
                    packs.push(Pack { side: Side::Right(g), product: *p, depth, slack: 0, width_bytes });
                }
                if product.packs_left {
                    let width_bytes = self.left_width(a.m) * product.dtype.size();
                    packs.push(Pack { side: Side::Left(g), product: *p, depth, slack: 8, width_bytes });
                }
            }
        }
        packs
    }
}

/// Widths of panels that suit a vector set, widest first.
pub fn panel_widths(isa: HostIsa) -> &'static [u64] {
    match isa {
        HostIsa::Avx512 => &[48, 32, 16],
        HostIsa::Avx2 => &[16],
    }
}

/// Columns of a packed panel for a product with `n` columns whose slices start (and whose results end) at `cuts`: the
/// width with the least padding, then the widest. Every cut but the last must be a multiple of the width chosen; where
/// 16 does not divide one, 16 is returned and such a kernel is refused.
pub fn choose_panel(n: u64, cuts: &[u64], isa: HostIsa) -> u32 {
    Layout::panel_width(n, cuts, panel_widths(isa))
}
