//! Tile shapes and task sizes. All follow from shapes and the vector set, never from a thread count.

use super::analyze::{Analysis, Right};
use crate::emit::HostIsa;
use pleach_ir::Layout;

/// Lanes of the vectors that tiles are made of; a narrower target splits them.
pub(super) const LANES: usize = 16;
/// Bytes of right operand that a task works on at a time: half of a 1 MiB second-level cache.
const BLOCK_BYTES: u64 = 512 << 10;
/// The longest sum that runs in registers from end to end.
const WHOLE_K: u64 = 2048;
/// Length of a part of a longer sum.
const PART_K: u64 = 1024;
/// Rows of a task, about.
const TASK_ROWS: u64 = 64;

/// How the loops of a kernel are cut.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Blocking {
    /// Columns of a tile.
    pub(super) width: u64,
    /// Vectors of a tile's row.
    pub(super) vectors: usize,
    /// Registers that one vector takes.
    pub(super) registers: usize,
    /// Rows of the tiles, largest first; the last is 1.
    pub(super) rows: Vec<u64>,
    /// Rows of a task where rows are split.
    pub(super) task_rows: u64,
    /// Tiles side by side in a task where rows are split.
    pub(super) task_tiles: u64,
    /// Tiles side by side in a task where only columns are split (few rows).
    pub(super) narrow_tiles: u64,
    /// Length of a part of the sum; `None`: the whole sum in registers.
    pub(super) part: Option<u64>,
    /// The remainder runs on registers, unrolled; otherwise row by row from scratch memory.
    pub(super) direct: bool,
}

impl Blocking {
    pub(super) fn new(a: &Analysis, isa: HostIsa) -> Result<Blocking, String> {
        let panels = || {
            a.groups.iter().flat_map(|g| g.products.iter().map(move |p| (g, &a.products[*p]))).filter_map(|(g, p)| {
                match p.right {
                    Right::Panels { nr, .. } => Some((nr, g.offset)),
                    _ => None,
                }
            })
        };
        let widths = tile_widths(isa);
        let width = if panels().next().is_some() {
            let fits = |w: &&u64| panels().all(|(nr, offset)| nr % **w == 0 && offset % **w == 0);
            *widths.iter().find(fits).ok_or("packed operands are sliced at columns that no tile divides")?
        } else {
            let n = a.n.known().unwrap_or(1 << 20);
            u64::from(choose_panel(n, &[], isa))
        };
        let vectors = (width / LANES as u64) as usize;
        let rows = match (isa, vectors) {
            (HostIsa::Avx2, _) => vec![6, 2, 1],
            (HostIsa::Avx512, 1) => vec![16, 4, 2, 1],
            (HostIsa::Avx512, 2) => vec![12, 4, 2, 1],
            (HostIsa::Avx512, _) => vec![8, 4, 2, 1],
        };
        let longest = a.products.iter().map(|p| p.k.known()).try_fold(0, |n, k| Some(n.max(k?)));
        let part = match longest {
            Some(k) if k <= WHOLE_K => None,
            Some(k) => Some(k.div_ceil(k.div_ceil(PART_K)).next_multiple_of(16)),
            None => Some(PART_K),
        };
        let depth = longest.unwrap_or(PART_K).min(part.unwrap_or(u64::MAX)).max(1);
        let tile_bytes = depth * width * 4 * a.groups.len() as u64;
        let count = a.n.known().map(|n| n.div_ceil(width));
        let task_tiles = (BLOCK_BYTES / tile_bytes).clamp(1, 8).min(count.unwrap_or(8).max(1));
        let narrow_tiles = count.unwrap_or(64).div_ceil(128).clamp(1, task_tiles);
        Ok(Blocking {
            width,
            vectors,
            registers: LANES / isa.lanes(),
            task_rows: TASK_ROWS.next_multiple_of(rows[0]),
            rows,
            task_tiles,
            narrow_tiles,
            part,
            direct: part.is_none() && a.groups.len() == 1 && a.cost <= 6,
        })
    }
}

fn tile_widths(isa: HostIsa) -> &'static [u64] {
    match isa {
        HostIsa::Avx512 => &[48, 32, 16],
        HostIsa::Avx2 => &[16],
    }
}

/// Columns of a packed panel for a product with `n` columns whose slices start (and whose results end) at `cuts`: the
/// width with the least padding, then the widest. Every cut but the last must be a multiple of the width chosen; where
/// 16 does not divide one, 16 is returned and such a kernel is refused.
pub fn choose_panel(n: u64, cuts: &[u64], isa: HostIsa) -> u32 {
    Layout::panel_width(n, cuts, tile_widths(isa))
}
