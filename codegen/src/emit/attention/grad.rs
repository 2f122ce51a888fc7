//! Gradients of attention with respect to queries, keys and values, as one kernel.
//!
//! One task is a key/value head of a sequence, so that the gradients of keys and values are summed inside one task, in the
//! order of the queries. A task takes blocks of query rows with the heads that share the key/value head (*lanes*, as
//! in the forward pass); per block it goes through the keys it sees. Weights come back from the log-sum-exp:
//! P = exp(q·k - lse), dS = P ∘ (d_out·v - rowsum(d_out ∘ out)); then dv += Pᵀ·d_out, dk += scale·dSᵀ·q, dq += scale·dS·k.
//!
//! Gradients of keys and values are summed in the results themselves where those are f32 and heads are whole vectors,
//! else in scratch memory that grows with the number of keys. Assumes what the forward pass assumes, and that key
//! ranges of different sequences do not overlap; rows of k and v in no range are not written.

use super::dot::sum_of;
use super::lanes::{copy_row, each_lane, each_vector, head_at, lane_at, note_keys, widen_rows};
use super::view::{RowView, operand_index, row_view, strip_reshape};
use super::{Config, load_i32, products, transpose};
use crate::emit::elementwise::{load, round_to, store};
use crate::emit::func::{Func, Val};
use crate::emit::vmath::Math;
use crate::emit::{Emitted, anchors, bytes_expr, dim_expr, unsupported};
use crate::error::CodegenError;
use crate::mlir::HostTarget;
use pleach_ir::{AttentionWrt, DType, Dim, Kernel, Op, Sym, ValueId};
use pleach_plan::Expr;

/// What is known when the code is written.
pub(super) struct Grad {
    pub(super) c: Config,
    out: RowView,
    d_out: RowView,
    /// Operand that holds the log-sum-exp.
    lse: usize,
    /// Buffers of the gradients of q, k and v.
    to: [Option<usize>; 3],
    /// Sums of keys and values lie in the results.
    in_place: bool,
}

/// Areas of a task. By lane: `[lane][element]`; by element: `[element][lane]`.
pub(super) struct Areas {
    /// Scaled queries (later gradients of queries) by lane and by element.
    q: Val,
    pub(super) qt: Val,
    /// Cotangents by lane and by element.
    o: Val,
    pub(super) ot: Val,
    /// Gradients of queries by element.
    pub(super) dq: Val,
    /// P and dS of a block, `[key][lane]`.
    pub(super) p: Val,
    pub(super) ds: Val,
    /// A block of keys and one of values, widened.
    keys: Val,
    values: Val,
    /// Per lane: log-sum-exp, rowsum(d_out ∘ out), first key and key after the last.
    pub(super) lse: Val,
    pub(super) mean: Val,
    pub(super) lo: Val,
    pub(super) hi: Val,
}

/// Rows of a head: first element, and elements from one row to the next.
type Rows<'a> = (&'a Val, i64);

/// Emits gradients of one attention.
pub(super) fn emit(
    k: &Kernel,
    roots: &[ValueId],
    symbols: &[Sym],
    target: &HostTarget,
) -> Result<Emitted, CodegenError> {
    let g = Grad::new(k, roots, target)?;
    let c = &g.c;
    let dim = |i: usize| k.body.ty(c.inputs[i]).shape.first().copied().unwrap_or(Dim::Known(0));
    let (tokens, keys, sequences) =
        (dim_expr(k, dim(0), symbols)?, dim_expr(k, dim(1), symbols)?, dim_expr(k, dim(4), symbols)?);
    let mut f = Func::host_kernel(&k.name);
    f.is_for(k, &anchors(k));
    f.round_bf16 = target.bf16;
    let n_keys = super::dim_val(&mut f, k, dim(1), symbols)?;
    let (first, last) = (f.arg("first"), f.arg("last"));
    f.loop_(&first, &last, 1, |f, t| {
        let s = f.divc(t, i64::from(c.at.kv_heads));
        let kv = f.remc(t, i64::from(c.at.kv_heads));
        g.task(f, &s, &kv, &n_keys);
    });
    let mut bytes = Expr::Const(0);
    for v in roots.iter().chain(&k.body.node(roots[0]).inputs[..6]) {
        bytes = bytes.add(bytes_expr(k, k.body.ty(*v), symbols)?);
    }
    let sums = if g.in_place { Expr::Const(0) } else { keys.clone().mul(2 * 4 * c.dp as u64) };
    Ok(Emitted {
        text: f.text(),
        tasks: sequences.mul(u64::from(c.at.kv_heads)),
        scratch_bytes: sums.add(4 * g.scratch() as u64),
        flops: tokens.mul(keys).mul(10 * u64::from(c.at.heads) * u64::from(c.at.head_dim)),
        bytes,
    })
}

impl Grad {
    fn new(k: &Kernel, roots: &[ValueId], target: &HostTarget) -> Result<Grad, CodegenError> {
        let inputs = k.body.node(roots[0]).inputs.clone();
        let mut to = [None; 3];
        let mut first = None;
        for (i, v) in roots.iter().enumerate() {
            let n = k.body.node(*v);
            let Op::AttentionGrad { attrs, wrt } = n.op else {
                return Err(unsupported(k, "an attention and its gradient are two kernels"));
            };
            let slot = &mut to[match wrt {
                AttentionWrt::Q => 0,
                AttentionWrt::K => 1,
                AttentionWrt::V => 2,
            }];
            let twice = slot.replace(k.operands.len() + i).is_some();
            if twice || n.inputs != inputs || *first.get_or_insert(attrs) != attrs {
                return Err(unsupported(k, "the results must be different gradients of one attention"));
            }
        }
        let at = first.ok_or_else(|| unsupported(k, "a gradient kernel needs a result"))?;
        let [q, key, v, out, lse, d_out, segments, start, len] = inputs[..] else {
            return Err(unsupported(k, "a gradient of attention takes nine operands"));
        };
        let c = Config::new(k, at, vec![q, key, v, segments, start, len], target.isa)?;
        let rows = |v: ValueId| match row_view(k, v) {
            Some(x) if k.body.ty(v).dtype == c.dtype => Ok(x),
            _ => Err(unsupported(k, "out and d_out must be rows of operands, of the type of q")),
        };
        let lse = operand_index(&k.body, strip_reshape(&k.body, lse))
            .ok_or_else(|| unsupported(k, "the log-sum-exp must be an operand"))?;
        let in_place = c.dtype == DType::F32 && c.d == c.dp;
        Ok(Grad { out: rows(out)?, d_out: rows(d_out)?, lse, to, in_place, c })
    }

    /// Elements of scratch memory, but for sums.
    fn scratch(&self) -> i64 {
        let c = &self.c;
        c.lanes * (5 * c.dp + 2 * c.block + 4) + 2 * c.staged()
    }

    pub(super) fn wants(&self, wrt: AttentionWrt) -> bool {
        self.to[wrt as usize].is_some()
    }

    /// One key/value head of one sequence.
    fn task(&self, f: &mut Func, s: &Val, kv: &Val, n_keys: &Val) {
        let c = &self.c;
        let [segments, start, len] = c.bounds.map(|b| f.buffer(b));
        let next = f.addc(s, 1);
        let (begin, end) = (load_i32(f, &segments, s), load_i32(f, &segments, &next));
        let (start, len) = (load_i32(f, &start, s), load_i32(f, &len, s));
        let [key, value] = [&c.k, &c.v].map(|x| c.head(f, x, &start, kv));
        let scratch = f.arg("scratch");
        let mut used = 0;
        let mut area = |f: &mut Func, n: i64| {
            let at = f.i64(used);
            used += n;
            f.gep(&scratch, &at, "f32")
        };
        let by_lane = c.lanes * c.dp;
        let a = Areas {
            q: area(f, by_lane),
            qt: area(f, by_lane),
            o: area(f, by_lane),
            ot: area(f, by_lane),
            dq: area(f, by_lane),
            p: area(f, c.lanes * c.block),
            ds: area(f, c.lanes * c.block),
            keys: area(f, c.staged()),
            values: area(f, c.staged()),
            lse: area(f, c.lanes),
            mean: area(f, c.lanes),
            lo: area(f, c.lanes),
            hi: area(f, c.lanes),
        };
        let spare = area(f, 0);
        debug_assert_eq!(used, self.scratch());
        // Sums of keys and values, zero at first.
        let width = i64::from(c.at.kv_heads) * c.d;
        let result = |f: &mut Func, buffer: usize| {
            let base = f.buffer(buffer);
            let row = f.mulc(&start, width);
            let col = f.mulc(kv, c.d);
            let at = f.add(&row, &col);
            f.gep(&base, &at, c.elem())
        };
        let half = f.mulc(n_keys, c.dp);
        let mut sums: [Option<(Val, i64)>; 2] = [None, None];
        for (i, sum) in sums.iter_mut().enumerate() {
            let Some(buffer) = self.to[1 + i] else { continue };
            let (base, stride) = if self.in_place {
                (result(f, buffer), width)
            } else {
                let at = if i == 0 { f.i64(0) } else { half.clone() };
                (f.gep(&spare, &at, "f32"), c.dp)
            };
            let (zero, z, dp) = (f.i64(0), f.f32(0.0, c.w), f.i64(c.dp));
            f.loop_(&zero, &len, 1, |f, j| {
                let row = f.mulc(j, stride);
                let row = f.gep(&base, &row, "f32");
                f.loop_(&zero, &dp, c.w as i64, |f, e| f.store_at(&z, &row, e, "f32", c.w));
            });
            *sum = Some((base, stride));
        }
        let group = i64::from(c.at.heads / c.at.kv_heads);
        let (zero, chunks) = (f.i64(0), f.i64(c.chunks));
        let first = f.mulc(kv, group);
        f.loop_(&zero, &chunks, 1, |f, chunk| {
            let skipped = f.mulc(chunk, c.heads);
            let h0 = f.add(&first, &skipped);
            let (all, most) = (f.i64(group), f.i64(c.heads));
            let rest = f.sub(&all, &skipped);
            let heads = f.min(&most, &rest);
            f.loop_(&begin, &end, c.rows, |f, r0| {
                let r1 = f.addc(r0, c.rows);
                let r1 = f.min(&r1, &end);
                let n = f.sub(&r1, r0);
                let queries = f.sub(&end, &begin);
                let before = f.sub(&len, &queries);
                let at = f.sub(r0, &begin);
                let pos = f.add(&before, &at);
                let last = if c.at.causal { f.add(&pos, &n) } else { len.clone() };
                let low = match c.at.window {
                    Some(w) => {
                        let x = f.addc(&pos, 1 - i64::from(w));
                        f.max(&x, &zero)
                    }
                    None => zero.clone(),
                };
                self.rows(f, &a, [r0, &h0, &pos, &n, &heads], [&low, &last], [&key, &value], &sums);
            });
        });
        if self.in_place {
            return;
        }
        for (i, sum) in sums.iter().enumerate() {
            let (Some(buffer), Some((base, _))) = (self.to[1 + i], sum) else { continue };
            let to = result(f, buffer);
            f.loop_(&zero, &len, 1, |f, j| {
                let at = f.mulc(j, width);
                let to = f.gep(&to, &at, c.elem());
                self.put(f, base, j, &to, 1.0);
            });
        }
    }

    /// Row `lane` of an area of padded rows as a head of a result, times `scale`.
    fn put(&self, f: &mut Func, area: &Val, lane: &Val, to: &Val, scale: f32) {
        let c = &self.c;
        each_vector(f, c, |f, e, mask| {
            let p = lane_at(f, c, area, lane, e);
            let mut x = f.load(&p, &c.vf());
            if scale != 1.0 {
                let scale = f.f32(scale, c.w);
                x = Math { f, lanes: c.w }.bin("mulf", &x, &scale);
            }
            let x = round_to(f, c.dtype, &x, c.w);
            let p = f.gep(to, e, c.elem());
            store(f, c.dtype, &x, &p, mask, c.w);
        });
    }

    /// One block of query rows: first row, first head, position, rows, heads; keys that any of them sees.
    fn rows(
        &self,
        f: &mut Func,
        a: &Areas,
        [r0, h0, pos, n, heads]: [&Val; 5],
        seen: [&Val; 2],
        sources: [&Val; 2],
        sums: &[Option<(Val, i64)>; 2],
    ) {
        let c = &self.c;
        let lanes = f.mul(n, heads);
        each_lane(f, n, heads, |f, r, h, lane| {
            copy_row(f, c, &c.q, [r0, h0], [r, h, lane], &a.q, f32::from_bits(c.at.scale));
            copy_row(f, c, &self.d_out, [r0, h0], [r, h, lane], &a.o, 1.0);
            note_keys(f, c, [&a.lo, &a.hi], pos, [r, lane]);
            self.note_row(f, a, [r0, h0], [r, h, lane]);
        });
        self.pad(f, a, &lanes);
        let narrow = f.i64(c.w as i64);
        let narrow = f.cmp("sle", &lanes, &narrow);
        let code = |nv: usize| {
            let lanes = &lanes;
            move |f: &mut Func| {
                self.block(f, a, nv, lanes, seen, sources, sums);
                vec![]
            }
        };
        f.if_else(&narrow, &[], code(1), code(3));
        let Some(dq) = self.to[0] else { return };
        let dq = f.buffer(dq);
        each_lane(f, n, heads, |f, r, h, lane| {
            let at = head_at(f, c, [r0, h0], [r, h], i64::from(c.at.heads) * c.d);
            let to = f.gep(&dq, &at, c.elem());
            self.put(f, &a.q, lane, &to, f32::from_bits(c.at.scale));
        });
    }

    /// Log-sum-exp and rowsum(d_out ∘ out) of a lane.
    fn note_row(&self, f: &mut Func, a: &Areas, [r0, h0]: [&Val; 2], [r, h, lane]: [&Val; 3]) {
        let c = &self.c;
        let (row, head) = (f.add(r0, r), f.add(h0, h));
        let at = f.mulc(&row, i64::from(c.at.heads));
        let at = f.add(&at, &head);
        let lse = f.buffer(self.lse);
        let x = f.load_at(&lse, &at, "f32", 1);
        f.store_at(&x, &a.lse, lane, "f32", 1);
        let out = f.buffer(self.out.operand);
        let at = head_at(f, c, [r0, h0], [r, h], self.out.stride);
        let at = f.addc(&at, self.out.offset);
        let from = f.gep(&out, &at, c.elem());
        let mut sum = f.f32(0.0, c.w);
        for e in (0..c.d).step_by(c.w) {
            let mask = (e + c.w as i64 > c.d).then(|| super::lanes::tail_mask(f, c));
            let e = f.i64(e);
            let p = f.gep(&from, &e, c.elem());
            let x = load(f, c.dtype, &p, mask.as_ref(), c.w);
            let p = lane_at(f, c, &a.o, lane, &e);
            let y = f.load(&p, &c.vf());
            sum = Math { f, lanes: c.w }.fma(&x, &y, &sum);
        }
        let x = sum_of(f, c, &sum);
        f.store_at(&x, &a.mean, lane, "f32", 1);
    }

    /// Lanes beyond those in use add nothing: their queries and cotangents are zero.
    fn pad(&self, f: &mut Func, a: &Areas, lanes: &Val) {
        let c = &self.c;
        let (zero, end, dp) = (f.i64(0), f.i64(c.lanes), f.i64(c.dp));
        let (none, x, z) = (f.i32(0, 1), f.f32(0.0, 1), f.f32(0.0, c.w));
        f.loop_(lanes, &end, 1, |f, lane| {
            f.loop_(&zero, &dp, c.w as i64, |f, e| {
                for area in [&a.q, &a.o] {
                    let to = lane_at(f, c, area, lane, e);
                    f.store(&z, &to, &c.vf());
                }
            });
            f.store_at(&x, &a.lse, lane, "f32", 1);
            f.store_at(&x, &a.mean, lane, "f32", 1);
            f.store_at(&none, &a.lo, lane, "i32", 1);
            f.store_at(&none, &a.hi, lane, "i32", 1);
        });
    }

    /// All keys for one block of rows, with `nv` vectors of lanes.
    #[allow(clippy::too_many_arguments, reason = "the parts of a task")]
    fn block(
        &self,
        f: &mut Func,
        a: &Areas,
        nv: usize,
        lanes: &Val,
        [low, last]: [&Val; 2],
        sources: [&Val; 2],
        sums: &[Option<(Val, i64)>; 2],
    ) {
        let c = &self.c;
        let (width, dp, zero) = (f.i64((nv * c.w) as i64), f.i64(c.dp), f.i64(0));
        transpose::write(f, c.w, (&a.q, &dp), (&a.qt, &width), &width, &dp);
        transpose::write(f, c.w, (&a.o, &dp), (&a.ot, &width), &width, &dp);
        let (z, all) = (f.f32(0.0, c.w), f.mulc(&width, c.dp));
        f.loop_(&zero, &all, c.w as i64, |f, i| f.store_at(&z, &a.dq, i, "f32", c.w));
        f.loop_(low, last, c.block, |f, at| {
            let end = f.addc(at, c.block);
            let end = f.min(&end, last);
            let n = f.sub(&end, at);
            let source = |f: &mut Func, base: &Val, x: &RowView, area: &Val| {
                let off = f.mulc(at, x.stride);
                let from = f.gep(base, &off, c.elem());
                if c.dtype == DType::F32 {
                    return (from, x.stride);
                }
                widen_rows(f, c, (&from, x.stride), area, &n);
                (area.clone(), c.dp)
            };
            let keys = source(f, sources[0], &c.k, &a.keys);
            let values = source(f, sources[1], &c.v, &a.values);
            let (keys, values): (Rows, Rows) = ((&keys.0, keys.1), (&values.0, values.1));
            products::weights(f, self, a, nv, [keys, values], [at, &n]);
            for (sum, (weights, rows)) in sums.iter().zip([(&a.ds, &a.q), (&a.p, &a.o)]) {
                let Some((base, stride)) = sum else { continue };
                let off = f.mulc(at, *stride);
                let base = f.gep(base, &off, "f32");
                products::add_rows(f, c, nv, [weights, rows], (&base, *stride), [&n, lanes]);
            }
            if self.wants(AttentionWrt::Q) {
                products::add_lanes(f, c, nv, (&a.ds, &a.dq), keys, &n);
            }
        });
        if self.wants(AttentionWrt::Q) {
            transpose::write(f, c.w, (&a.dq, &width), (&a.q, &dp), &dp, &width);
        }
    }
}
