//! Attention over packed sequences, on the host: f32 or bf16 operands and result, f32 arithmetic.
//!
//! One task is a block of query rows of one sequence with the query heads that share one key/value head; their (row, head)
//! pairs are the *lanes*. Tasks are numbered by shapes alone; the sequence of a task is found by bisection in the segment
//! bounds, so ragged batches cost what their tokens cost. Later rows come first: they see more keys.
//!
//! Keys are taken in blocks with a running maximum and sum (online softmax), so scratch memory does not depend on the number
//! of keys. Two codes compute a task:
//! * `tile`: lanes lie along vectors. Queries are transposed once; keys and values are read in place and broadcast, scores
//!   come out as `[key][lane]` and softmax is lane-wise, without horizontal steps. Where the target has dot products of bf16
//!   pairs, bf16 products take them: keys are read in place, weights are rounded to bf16.
//! * `dot`, for few lanes (decoding): elements of a head lie along vectors, keys and values are streamed once for all
//!   lanes.
//!
//! Every output element is computed in one order that depends on its sequence alone. Nothing outside the segments' rows and
//! key ranges is read. The caller has checked that segments ascend from 0 to `T`, that key ranges lie in the operands, and
//! that a causal sequence has at least as many keys as queries.

mod dot;
mod grad;
mod lanes;
mod products;
mod tile;
mod transpose;
pub(crate) mod view;

use super::elementwise::memory_elem;
use super::func::{Func, Val, vty};
use super::{Emitted, HostIsa, anchors, bytes_expr, dim_expr, dim_val, unsupported};
use crate::error::CodegenError;
use crate::mlir::HostTarget;
use lanes::{each_lane, gather_query, pad_lanes, put_result, scale_lanes};
use pleach_ir::{AttentionAttrs, Class, DType, Dim, Kernel, Op, Sym, ValueId};
use pleach_plan::Expr;
use view::{RowView, operand_index, row_view, strip_reshape};

/// Score of a key that a query does not see.
const HIDDEN: f32 = -1e30;

/// What is known when the code is written. Sizes in elements.
struct Config {
    at: AttentionAttrs,
    q: RowView,
    k: RowView,
    v: RowView,
    /// Operands that hold `q_segments`, `kv_start`, `kv_len`.
    bounds: [usize; 3],
    /// Buffers of the result and of the log-sum-exp.
    out: Option<usize>,
    lse: Option<usize>,
    /// Element type of q, k, v and the result.
    dtype: DType,
    /// bf16 products go by dot products of pairs: of elements of a head for the scores, of keys for the result.
    pairs: bool,
    /// f32 lanes of a vector.
    w: usize,
    /// Width of a head, and rounded up to whole vectors.
    d: i64,
    dp: i64,
    /// Query heads of a task, tasks per key/value head, rows of a task.
    heads: i64,
    chunks: i64,
    rows: i64,
    /// Most lanes of a task, padded.
    lanes: i64,
    /// Lanes up to which `dot` is used, and how many it takes at a time.
    few: i64,
    at_once: i64,
    /// Keys of a block.
    block: i64,
    /// q, k, v, segments, first keys, numbers of keys.
    inputs: Vec<ValueId>,
}

/// Addresses and bounds of one task.
struct Task {
    /// Scratch areas: queries by lane (and, at the end, results by lane); queries and results by element; scores.
    by_lane: Val,
    query: Val,
    result: Val,
    scores: Val,
    /// A block of keys and one of values, widened.
    keys: Val,
    values: Val,
    /// Per lane: running maximum, sum, correction (f32), first key and key after the last (i32).
    top: Val,
    sum: Val,
    fix: Val,
    lo: Val,
    hi: Val,
    /// First key and value of the sequence's key range.
    key: Val,
    value: Val,
    /// Keys that any lane sees.
    first: Val,
    last: Val,
    /// Lanes in use.
    lanes: Val,
}

/// Emits a kernel of class attention. `symbols` are the plan's, in the order of `dims`.
///
/// # Errors
/// [`CodegenError::Unsupported`] when the body is not one attention on rows of operands: its result, its log-sum-exp or
/// both; or gradients of one attention.
pub fn emit(k: &Kernel, symbols: &[Sym], target: &HostTarget) -> Result<Emitted, CodegenError> {
    let roots = roots(k)?;
    if roots.iter().any(|v| matches!(k.body.node(*v).op, Op::AttentionGrad { .. })) {
        return grad::emit(k, &roots, symbols, target);
    }
    let mut c = config(k, &roots, target.isa)?;
    c.pairs = c.dtype == DType::BF16 && target.bf16 && c.w == 16 && c.d % 2 == 0;
    let shape = |v: ValueId, axis: usize| k.body.ty(v).shape.get(axis).copied().unwrap_or(Dim::Known(0));
    let (tokens, keys, sequences) = (shape(c.inputs[0], 0), shape(c.inputs[1], 0), shape(c.inputs[4], 0));

    let mut f = Func::host_kernel(&k.name);
    f.is_for(k, &anchors(k));
    f.round_bf16 = target.bf16;
    let t = dim_val(&mut f, k, tokens, symbols)?;
    let s = dim_val(&mut f, k, sequences, symbols)?;
    write_tasks(&mut f, &c, &t, &s);

    let (te, ke, se) = (dim_expr(k, tokens, symbols)?, dim_expr(k, keys, symbols)?, dim_expr(k, sequences, symbols)?);
    let mut bytes = Expr::Const(0);
    for v in roots.iter().chain(&c.inputs[..3]) {
        bytes = bytes.add(bytes_expr(k, k.body.ty(*v), symbols)?);
    }
    Ok(Emitted {
        text: f.text(),
        tasks: te.clone().ceil_div(c.rows as u64).add(se).mul(u64::from(c.at.kv_heads) * c.chunks as u64),
        scratch_bytes: Expr::Const(4 * c.scratch() as u64),
        flops: te.mul(ke).mul(4 * u64::from(c.at.heads) * u64::from(c.at.head_dim)),
        bytes,
    })
}

/// Whether a kernel of class attention can be compiled.
///
/// # Errors
/// The reason why not.
pub fn supported(k: &Kernel) -> Result<(), String> {
    let mut symbols: Vec<Sym> = k.body.nodes.iter().flat_map(|n| n.ty.symbols()).collect();
    symbols.sort_unstable();
    symbols.dedup();
    emit(k, &symbols, &HostTarget::avx512()).map(|_| ()).map_err(|e| e.to_string())
}

/// The attention nodes that the results are.
fn roots(k: &Kernel) -> Result<Vec<ValueId>, CodegenError> {
    let all: Vec<ValueId> = k.body.roots.iter().map(|r| strip_reshape(&k.body, r.value)).collect();
    if k.class != Class::Attention || all.is_empty() || all.iter().any(|v| !k.body.node(*v).op.is_attention()) {
        return Err(unsupported(k, "the results of an attention kernel must be one attention and nothing else"));
    }
    Ok(all)
}

fn config(k: &Kernel, roots: &[ValueId], isa: HostIsa) -> Result<Config, CodegenError> {
    let (mut out, mut lse, mut found) = (None, None, vec![]);
    for (i, v) in roots.iter().enumerate() {
        let n = k.body.node(*v);
        let mut inputs = n.inputs.clone();
        let (at, to) = match n.op {
            Op::Attention(at) => (at, &mut out),
            Op::AttentionLse(at) => {
                // Values are not asked for; keys stand in.
                inputs.insert(2, inputs[1]);
                (at, &mut lse)
            }
            _ => return Err(unsupported(k, "an attention and its gradient are two kernels")),
        };
        if to.replace(k.operands.len() + i).is_some() {
            return Err(unsupported(k, "one attention has each result once"));
        }
        found.push((at, inputs));
    }
    let same = |x: &(AttentionAttrs, Vec<ValueId>), y: &(AttentionAttrs, Vec<ValueId>)| {
        x.0 == y.0 && x.1[..2] == y.1[..2] && x.1[3..] == y.1[3..]
    };
    if found.iter().any(|x| !same(x, &found[0])) {
        return Err(unsupported(k, "the results of an attention kernel must be of one attention"));
    }
    let (at, inputs) = found.swap_remove(usize::from(found.len() > 1 && lse < out));
    Config::new(k, at, inputs, isa).map(|c| Config { out, lse, ..c })
}

impl Config {
    /// Sizes and places for an attention on q, k, v, segments, first keys and numbers of keys.
    fn new(k: &Kernel, at: AttentionAttrs, inputs: Vec<ValueId>, isa: HostIsa) -> Result<Config, CodegenError> {
        let dtype = k.body.ty(inputs[0]).dtype;
        if !matches!(dtype, DType::F32 | DType::BF16) || inputs[..3].iter().any(|v| k.body.ty(*v).dtype != dtype) {
            return Err(unsupported(k, "attention on the host takes q, k and v in f32 or in bf16; cast them first"));
        }
        let rows = |i: usize| {
            row_view(k, inputs[i]).ok_or_else(|| unsupported(k, "q, k and v must be operands or slices of their rows"))
        };
        let bound = |i: usize| {
            operand_index(&k.body, strip_reshape(&k.body, inputs[i]))
                .ok_or_else(|| unsupported(k, "segment bounds must be operands"))
        };
        if at.window.is_some() && !at.causal {
            return Err(unsupported(k, "a window needs causal attention"));
        }
        let w = isa.lanes();
        let full = 3 * w as i64;
        let d = i64::from(at.head_dim);
        let dp = (d + w as i64 - 1) / w as i64 * w as i64;
        let group = i64::from(at.heads / at.kv_heads);
        let chunks = (group + full - 1) / full;
        let heads = (group + chunks - 1) / chunks;
        let at_once = heads.min((w as i64 * w as i64 / dp).max(1)).min(4);
        let few = w as i64 / 2;
        Ok(Config {
            at,
            q: rows(0)?,
            k: rows(1)?,
            v: rows(2)?,
            bounds: [bound(3)?, bound(4)?, bound(5)?],
            out: None,
            lse: None,
            dtype,
            pairs: false,
            w,
            d,
            dp,
            heads,
            chunks,
            rows: full / heads,
            lanes: full,
            few,
            at_once,
            block: 64,
            inputs,
        })
    }

    fn vf(&self) -> String {
        vty(self.w, "f32")
    }

    fn vi(&self) -> String {
        vty(self.w, "i32")
    }

    /// Elements of scratch memory.
    fn scratch(&self) -> i64 {
        self.lanes * (3 * self.dp + self.block + 5) + 2 * self.staged()
    }

    /// Elements of a block of keys or values that is widened first.
    fn staged(&self) -> i64 {
        if self.dtype == DType::F32 { 0 } else { self.block * self.dp }
    }

    /// The element type in memory.
    fn elem(&self) -> &'static str {
        memory_elem(self.dtype)
    }

    /// The address of key/value head `kv` of row `row` of keys or values.
    fn head(&self, f: &mut Func, x: &RowView, row: &Val, kv: &Val) -> Val {
        let base = f.buffer(x.operand);
        let row = f.mulc(row, x.stride);
        let col = f.mulc(kv, self.d);
        let at = f.add(&row, &col);
        let at = f.addc(&at, x.offset);
        f.gep(&base, &at, self.elem())
    }
}

/// `base[index]` of an i32 array, as i64.
fn load_i32(f: &mut Func, base: &Val, index: &Val) -> Val {
    let x = f.load_at(base, index, "i32", 1);
    f.op(format!("arith.extsi {x} : i32 to i64"))
}

/// The loop over tasks.
fn write_tasks(f: &mut Func, c: &Config, tokens: &Val, sequences: &Val) {
    let seg = f.buffer(c.bounds[0]);
    let slots = f.ceil_divc(tokens, c.rows);
    let slots = f.add(&slots, sequences);
    let per_slot = i64::from(c.at.kv_heads) * c.chunks;
    let (first, last) = (f.arg("first"), f.arg("last"));
    f.loop_(&first, &last, 1, |f, t| {
        // Slot `bounds[s] / rows + s` and those after it belong to sequence s: at least as many as it has row blocks.
        let turn = f.divc(t, per_slot);
        let top = f.addc(&slots, -1);
        let slot = f.sub(&top, &turn);
        let head = f.remc(t, per_slot);
        let s = find_sequence(f, c, &seg, &slot, sequences);
        let begin = load_i32(f, &seg, &s);
        let next = f.addc(&s, 1);
        let end = load_i32(f, &seg, &next);
        let base = f.divc(&begin, c.rows);
        let base = f.add(&base, &s);
        let nth = f.sub(&slot, &base);
        let nth = f.mulc(&nth, c.rows);
        let r0 = f.add(&begin, &nth);
        let r1 = f.addc(&r0, c.rows);
        let r1 = f.min(&r1, &end);
        let some = f.cmp("slt", &r0, &r1);
        f.if_(&some, |f| write_task(f, c, &s, [&begin, &end, &r0, &r1], &head));
    });
}

/// The sequence that owns a slot.
fn find_sequence(f: &mut Func, c: &Config, seg: &Val, slot: &Val, sequences: &Val) -> Val {
    let zeros = f.op(format!("math.ctlz {sequences} : i64"));
    let sixty_four = f.i64(64);
    let bits = f.sub(&sixty_four, &zeros);
    let (zero, one) = (f.i64(0), f.i64(1));
    let end = f.addc(sequences, -1);
    let r = f.for_(&zero, &bits, 1, &[(zero.clone(), "i64".into())], |f, i, s| {
        let e = f.sub(&bits, i);
        let e = f.addc(&e, -1);
        let step = f.op(format!("arith.shli {one}, {e} : i64"));
        let cand = f.add(&s[0], &step);
        let safe = f.min(&cand, &end);
        let b = load_i32(f, seg, &safe);
        let b = f.divc(&b, c.rows);
        let b = f.add(&b, &safe);
        let inside = f.cmp("sle", &cand, &end);
        let before = f.cmp("sle", &b, slot);
        let take = f.op(format!("arith.andi {inside}, {before} : i1"));
        vec![f.op(format!("arith.select {take}, {cand}, {} : i64", s[0]))]
    });
    r[0].clone()
}

/// One block of rows of one sequence; `rows` are the sequence's first and end row, the block's first and end row.
fn write_task(f: &mut Func, c: &Config, s: &Val, rows: [&Val; 4], head: &Val) {
    let [begin, end, r0, r1] = rows;
    let (start, len) = (f.buffer(c.bounds[1]), f.buffer(c.bounds[2]));
    let start = load_i32(f, &start, s);
    let len = load_i32(f, &len, s);
    let kv = f.divc(head, c.chunks);
    let chunk = f.remc(head, c.chunks);
    let group = i64::from(c.at.heads / c.at.kv_heads);
    let skipped = f.mulc(&chunk, c.heads);
    let h0 = f.mulc(&kv, group);
    let h0 = f.add(&h0, &skipped);
    let heads = if c.chunks == 1 {
        f.i64(c.heads)
    } else {
        let (g, n) = (f.i64(group), f.i64(c.heads));
        let rest = f.sub(&g, &skipped);
        f.min(&n, &rest)
    };
    let n = f.sub(r1, r0);
    let lanes = f.mul(&n, &heads);
    // Keys that the block's first and last row see.
    let queries = f.sub(end, begin);
    let before = f.sub(&len, &queries);
    let at = f.sub(r0, begin);
    let pos = f.add(&before, &at);
    let zero = f.i64(0);
    let last = if c.at.causal { f.add(&pos, &n) } else { len };
    let first = match c.at.window {
        Some(w) => {
            let x = f.addc(&pos, 1 - i64::from(w));
            f.max(&x, &zero)
        }
        None => zero.clone(),
    };
    let [key, value] = [&c.k, &c.v].map(|x| c.head(f, x, &start, &kv));
    let scratch = f.arg("scratch");
    let mut used = 0;
    let mut area = |f: &mut Func, n: i64| {
        let at = f.i64(used);
        used += n;
        f.gep(&scratch, &at, "f32")
    };
    let task = Task {
        by_lane: area(f, c.lanes * c.dp),
        query: area(f, c.lanes * c.dp),
        result: area(f, c.lanes * c.dp),
        scores: area(f, c.lanes * c.block),
        top: area(f, c.lanes),
        sum: area(f, c.lanes),
        fix: area(f, c.lanes),
        lo: area(f, c.lanes),
        hi: area(f, c.lanes),
        keys: area(f, c.staged()),
        values: area(f, c.staged()),
        key,
        value,
        first,
        last,
        lanes,
    };
    debug_assert_eq!(used, c.scratch());
    // Pairs want queries as they are: scores are scaled instead.
    let scale = if c.pairs { 1.0 } else { f32::from_bits(c.at.scale) };
    each_lane(f, &n, &heads, |f, r, h, lane| gather_query(f, c, &task, [r0, &h0, &pos], [r, h, lane], scale));
    pad_lanes(f, c, &task);
    let few = f.i64(c.few);
    let few = f.cmp("sle", &task.lanes, &few);
    f.if_else(
        &few,
        &[],
        |f| {
            if c.pairs {
                scale_lanes(f, c, &task);
            }
            dot::write(f, c, &task);
            vec![]
        },
        |f| {
            tile::write(f, c, &task);
            vec![]
        },
    );
    each_lane(f, &n, &heads, |f, r, h, lane| put_result(f, c, &task, [r0, &h0], [r, h, lane]));
}
