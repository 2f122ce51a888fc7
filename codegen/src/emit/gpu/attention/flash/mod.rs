//! Attention of bf16 through tensor cores, without ever holding all scores: flash attention (Dao et al., 2022, arXiv:2205.14135)
//! forward with the log-sum-exp, and its gradients (Dao, 2023, arXiv:2307.08691) without atomics. sm_80 and later.
//!
//! A block of four warps takes 64 rows of one head: queries for the result and their gradient, keys for the gradients of keys
//! and values. Tiles of the other side go through two stages of shared memory. Rows of several sequences may share a block,
//! which then takes one sequence after the other and masks the rest. Scores, weights and their gradients stay in the
//! registers they are computed in, whose layout is that of the next product's left operand. [`warpgroup`] does the same on
//! chips that have products of warpgroups, 128 rows to a block.
//!
//! The gradients need rowsum(d_out · out) of every query: a launch of its own puts them into scratch memory.

mod forward;
mod keys;
mod queries;
mod softmax;
mod tile;
mod warpgroup;

use super::{Config, plain};
use crate::emit::attention::view::{RowView, row_view};
use crate::emit::dim_expr;
use crate::emit::func::{Func, Val};
use crate::emit::gpu::pull::Pull;
use crate::emit::gpu::{GpuChip, Parts, special};
use crate::error::CodegenError;
use pleach_ir::{DType, Dim, Kernel, Sym, ValueId};
use pleach_plan::Expr;
use tile::Source;

const WARPS: i64 = 4;
const THREADS: i64 = 32 * WARPS;
/// Rows of a block, 16 for each warp.
const ROWS: i64 = 16 * WARPS;
/// Widest head: of the forward pass, of gradients.
const WIDEST: [i64; 2] = [256, 128];
/// With fewer queries for a sequence on average, a warp for each query is better.
const MANY: i64 = 16;

/// A kernel that has this form.
struct Flash<'a> {
    k: &'a Kernel,
    c: &'a Config,
    /// Where q, k, v, out and d_out lie; the log-sum-exp is pulled.
    views: [Option<RowView>; 6],
    /// Width of a head.
    d: i64,
    /// Rows of queries and of keys.
    rows: [Dim; 2],
    /// Whether few queries have a launch of their own.
    split: bool,
}

impl<'a> Flash<'a> {
    fn of(k: &'a Kernel, c: &'a Config) -> Option<Flash<'a>> {
        let d = i64::from(c.at.head_dim);
        let gradient = c.grads.iter().any(Option::is_some);
        if d % 16 != 0 || d > WIDEST[usize::from(gradient)] || f32::from_bits(c.at.scale) <= 0.0 {
            return None;
        }
        let mut views = [None; 6];
        for (i, v) in c.inputs.iter().enumerate().filter(|(i, _)| *i != 4) {
            views[i] = Some(aligned(k, *v).filter(|x| x.width % d == 0)?);
        }
        let rows = [0, 1].map(|i| k.body.ty(c.inputs[i]).shape[0]);
        Some(Flash { k, c, views, d, rows, split: !gradient && rows[0] != rows[1] })
    }

    /// Rows of input `i` in memory.
    fn source(&self, f: &mut Func, i: usize) -> Option<Source> {
        self.views[i].map(|v| Source::new(f, &v, self.d))
    }

    /// Runs `body` unless there are few queries only and another launch takes them.
    fn guarded(&self, f: &mut Func, p: &mut Pull<'_>, body: impl FnOnce(&mut Func, &mut Pull<'_>)) {
        if self.split {
            let many = many(f, p, self.c);
            f.if_(&many, |f| body(f, p));
        } else {
            body(f, p);
        }
    }

    /// Blocks for rows of queries (0) or keys (1).
    fn blocks(&self, side: usize, symbols: &[Sym]) -> Result<[Expr; 3], CodegenError> {
        let heads = if side == 0 { self.c.at.heads } else { self.c.at.kv_heads };
        let rows = dim_expr(self.k, self.rows[side], symbols)?.ceil_div(ROWS as u64);
        Ok([rows, Expr::Const(u64::from(heads)), Expr::Const(1)])
    }
}

/// Rows of 16-byte pieces of bf16.
fn aligned(k: &Kernel, v: ValueId) -> Option<RowView> {
    let x = row_view(k, v)?;
    let bf16 = k.body.ty(v).dtype == DType::BF16 && !k.aliases.contains(&Some(x.operand as u32));
    (bf16 && x.stride % 8 == 0 && x.offset % 8 == 0).then_some(x)
}

/// Whether sequences have many queries on average.
pub(super) fn many(f: &mut Func, p: &mut Pull<'_>, c: &Config) -> Val {
    let (queries, sequences) = (p.k.body.ty(c.inputs[0]).shape[0], p.k.body.ty(c.bounds[1]).shape[0]);
    let (queries, sequences) = (p.dim(f, queries), p.dim(f, sequences));
    let least = f.mulc(&sequences, MANY);
    f.cmp("sge", &queries, &least)
}

/// Emits the kernel, if it has this form.
pub(super) fn emit(k: &Kernel, symbols: &[Sym], c: &Config, chip: GpuChip) -> Result<Option<Parts>, CodegenError> {
    let Some(x) = Flash::of(k, c) else { return Ok(None) };
    let limits = chip.limits();
    let (mut text, mut launches, mut scratch) = (String::new(), vec![], Expr::Const(0));
    let mut add = |part: (String, pleach_plan::Launch)| {
        text += &part.0;
        launches.push(part.1);
    };
    if x.c.grads.iter().any(Option::is_some) {
        let rows = dim_expr(k, x.rows[0], symbols)?;
        scratch = rows.mul(u64::from(c.at.heads) * 4);
        add(queries::sums(&x, symbols)?);
        if c.grads[0].is_some() {
            add(match warpgroup::queries(&x, symbols, &limits)? {
                Some(part) => part,
                None => queries::emit(&x, symbols)?,
            });
        }
        if c.grads[1..].iter().any(Option::is_some) {
            add(match warpgroup::keys(&x, symbols, &limits)? {
                Some(part) => part,
                None => keys::emit(&x, symbols)?,
            });
        }
    } else {
        add(match warpgroup::forward(&x, symbols, &limits)? {
            Some(part) => part,
            None => forward::emit(&x, symbols)?,
        });
        if x.split {
            let (more, few, _) = plain::emit(k, symbols, c, true)?;
            text += &more;
            launches.extend(few);
        }
    }
    Ok(Some((text, launches, scratch)))
}

/// Where a thread stands in its block.
struct Thread {
    tid: Val,
    warp: Val,
    lane: Val,
    /// Row of an accumulator (and 8 further on), first column of a pair.
    row: Val,
    pair: Val,
    /// First row of the block, head.
    block: Val,
    head: Val,
    smem: Val,
}

impl Thread {
    fn new(f: &mut Func) -> Thread {
        let smem = f.op("llvm.mlir.addressof @smem : !llvm.ptr<3>");
        let (tid, block, head) = (special(f, "tid.x"), special(f, "ctaid.x"), special(f, "ctaid.y"));
        let (warp, lane) = (f.divc(&tid, 32), f.remc(&tid, 32));
        let (row, pair) = (f.divc(&lane, 4), f.remc(&lane, 4));
        let pair = f.mulc(&pair, 2);
        let block = f.mulc(&block, ROWS);
        Thread { tid, warp, lane, row, pair, block, head, smem }
    }

    /// First row of the warp within the block.
    fn warp_row(&self, f: &mut Func) -> Val {
        f.mulc(&self.warp, 16)
    }
}
