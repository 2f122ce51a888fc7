//! Attention with a warp to a row: f32 arithmetic, any head width. Lanes lie along the elements of a head.
//!
//! Forward and the gradient of the queries: a warp takes a query row of one head and runs over the keys it sees, with a
//! running maximum and sum. Gradients of keys and values: a warp takes a key row of one key/value head and runs over the
//! queries that see it, head by head. Every sum has one order.

use super::Config;
use super::packed::Sequence;
use crate::emit::dim_expr;
use crate::emit::func::{Func, Val};
use crate::emit::gpu::at::At;
use crate::emit::gpu::launch::Unit;
use crate::emit::gpu::pull::Pull;
use crate::emit::gpu::{Parts, reduce, special};
use crate::emit::vmath::Math;
use crate::error::CodegenError;
use pleach_ir::{DType, Dim, Kernel, ReduceOp, Sym, ValueId};
use pleach_plan::Expr;

const THREADS: i64 = 128;
const WARPS: i64 = THREADS / 32;

/// Emits the launches of a kernel. `few`: they do nothing where sequences have many queries on average.
pub(super) fn emit(k: &Kernel, symbols: &[Sym], c: &Config, few: bool) -> Result<Parts, CodegenError> {
    let (mut text, mut launches) = (String::new(), vec![]);
    let by_query = c.out.is_some() || c.lse.is_some() || c.grads[0].is_some();
    let by_key = c.grads[1].is_some() || c.grads[2].is_some();
    for (wanted, suffix, side) in [(by_query, "", 0), (by_key, "_kv", 1)] {
        if !wanted {
            continue;
        }
        let heads = if side == 0 { c.at.heads } else { c.at.kv_heads };
        let rows = k.body.ty(c.inputs[side]).shape[0];
        let mut unit = Unit::new(k, &format!("{suffix}{}", if few { "_few" } else { "" }), false);
        let f = &mut unit.f;
        let mut p = Pull::new(f, k, symbols);
        let (tid, block, head) = (special(f, "tid.x"), special(f, "ctaid.x"), special(f, "ctaid.y"));
        let (warp, lane) = (f.divc(&tid, 32), f.remc(&tid, 32));
        let first = f.mulc(&block, WARPS);
        let row = f.add(&first, &warp);
        let mut w = Warp::new(f, c, lane);
        let end = p.dim(f, rows);
        let mut inside = f.cmp("slt", &row, &end);
        if few {
            let many = super::flash::many(f, &mut p, c);
            let yes = f.konst("true");
            let not = f.op(format!("arith.xori {many}, {yes} : i1"));
            inside = f.op(format!("arith.andi {inside}, {not} : i1"));
        }
        f.if_(&inside, |f| match side {
            0 if c.grads[0].is_some() => w.query_gradient(f, &mut p, &row, &head),
            0 => w.forward(f, &mut p, &row, &head),
            _ => w.key_gradients(f, &mut p, &row, &head),
        });
        p.finish()?;
        let grid = dim_expr(k, rows, symbols)?.ceil_div(WARPS as u64);
        let (t, l) = unit.finish([grid, Expr::Const(u64::from(heads)), Expr::Const(1)], THREADS as u32, 0, 1);
        text += &t;
        launches.push(l);
    }
    Ok((text, launches, Expr::Const(0)))
}

/// A warp at work. A vector of a head is a list of values, one for every 32 elements.
struct Warp<'a> {
    c: &'a Config,
    /// Elements of a head that this lane has, and whether each exists.
    places: Vec<(Val, Option<Val>)>,
    lane: Val,
    scale: Val,
}

impl Warp<'_> {
    fn new<'a>(f: &mut Func, c: &'a Config, lane: Val) -> Warp<'a> {
        let d = i64::from(c.at.head_dim);
        let places = (0..d.div_euclid(32) + i64::from(d % 32 > 0))
            .map(|i| {
                let e = f.addc(&lane, 32 * i);
                if (i + 1) * 32 <= d {
                    return (e, None);
                }
                let (end, last) = (f.i64(d), f.i64(d - 1));
                let inside = f.cmp("slt", &e, &end);
                (f.min(&e, &last), Some(inside))
            })
            .collect();
        let scale = f.f32(f32::from_bits(c.at.scale), 1);
        Warp { c, places, lane, scale }
    }

    fn at(&self, f: &mut Func, row: &Val, head: &Val) -> Vec<Vec<At>> {
        let first = f.mulc(head, i64::from(self.c.at.head_dim));
        let places = self.places.iter();
        places
            .map(|(e, _)| {
                let e = f.add(&first, e);
                vec![At::of(f, row, 1), At::of(f, &e, 1)]
            })
            .collect()
    }

    /// A head of a row, zeros past its end.
    fn load(&self, f: &mut Func, p: &mut Pull<'_>, v: ValueId, row: &Val, head: &Val) -> Vec<Val> {
        let zero = f.f32(0.0, 1);
        let at = self.at(f, row, head);
        let xs: Vec<Val> = at.iter().map(|at| p.scope(|p| p.eval(f, v, at))).collect();
        xs.into_iter()
            .zip(&self.places)
            .map(|(x, (_, inside))| match inside {
                Some(c) => f.op(format!("arith.select {c}, {x}, {zero} : f32")),
                None => x,
            })
            .collect()
    }

    /// Writes a head of a row of result `r`.
    fn store(&self, f: &mut Func, p: &mut Pull<'_>, r: usize, row: &Val, head: &Val, x: &[Val]) {
        let at = self.at(f, row, head);
        let root = p.k.body.roots[r].value;
        let v = crate::emit::attention::view::strip_reshape(&p.k.body, root);
        let ty = p.k.body.ty(v).clone();
        for ((at, x), (_, inside)) in at.iter().zip(x).zip(&self.places) {
            let write = |f: &mut Func, p: &mut Pull<'_>| {
                let x = crate::emit::elementwise::round_to(f, ty.dtype, x, 1);
                let (to, align) = p.address(f, p.k.operands.len() + r, &ty, at);
                crate::emit::elementwise::store_aligned(f, ty.dtype, &x, &to, align);
            };
            match inside {
                Some(c) => f.if_(c, |f| write(f, p)),
                None => write(f, p),
            }
        }
    }

    /// The scalar product of two heads; all lanes have it.
    fn dot(&self, f: &mut Func, a: &[Val], b: &[Val]) -> Val {
        let mut s = f.f32(0.0, 1);
        for (a, b) in a.iter().zip(b) {
            s = f.op(format!("math.fma {a}, {b}, {s} : f32"));
        }
        reduce::warp(f, ReduceOp::Sum, DType::F32, &s)
    }

    fn exp(&self, f: &mut Func, a: &Val, b: &Val) -> Val {
        let d = f.op(format!("arith.subf {a}, {b} : f32"));
        Math { f, lanes: 1 }.exp(&d)
    }

    /// a + w·x, element by element.
    fn add(&self, f: &mut Func, a: &[Val], w: &Val, x: &[Val]) -> Vec<Val> {
        a.iter().zip(x).map(|(a, x)| f.op(format!("math.fma {w}, {x}, {a} : f32"))).collect()
    }

    fn zeros(&self, f: &mut Func) -> Vec<(Val, String)> {
        let zero = f.f32(0.0, 1);
        vec![(zero, "f32".into()); self.places.len()]
    }

    /// The key/value head of a query head.
    fn kv_head(&self, f: &mut Func, head: &Val) -> Val {
        f.divc(head, i64::from(self.c.at.heads / self.c.at.kv_heads))
    }

    fn score(&self, f: &mut Func, q: &[Val], k: &[Val]) -> Val {
        let s = self.dot(f, q, k);
        f.op(format!("arith.mulf {s}, {} : f32", self.scale))
    }

    fn forward(&mut self, f: &mut Func, p: &mut Pull<'_>, row: &Val, head: &Val) {
        let c = self.c;
        let s = Sequence::find(f, p, c, row);
        let s = Sequence::of(f, p, c, &s);
        let i = f.sub(row, &s.q0);
        let (lo, hi) = s.sees(f, c, &i);
        let q = self.load(f, p, c.inputs[0], row, head);
        let kv = self.kv_head(f, head);
        let (low, zero) = (f.f32(f32::NEG_INFINITY, 1), f.f32(0.0, 1));
        let mut init = vec![(low, "f32".to_string()), (zero, "f32".to_string())];
        init.extend(self.zeros(f));
        let out = f.for_(&lo, &hi, 1, &init, |f, j, now| {
            let key = f.add(&s.k0, j);
            let k = self.load(f, p, c.inputs[1], &key, &kv);
            let x = self.score(f, &q, &k);
            let top = f.op(format!("arith.maximumf {}, {x} : f32", now[0]));
            let (w, keep) = (self.exp(f, &x, &top), self.exp(f, &now[0], &top));
            let sum = f.op(format!("math.fma {}, {keep}, {w} : f32", now[1]));
            let mut next = vec![top, sum];
            if c.out.is_some() {
                let v = self.load(f, p, c.inputs[2], &key, &kv);
                for (a, v) in now[2..].iter().zip(&v) {
                    let a = f.op(format!("arith.mulf {a}, {keep} : f32"));
                    next.push(f.op(format!("math.fma {w}, {v}, {a} : f32")));
                }
            } else {
                next.extend(now[2..].iter().cloned());
            }
            next
        });
        if let Some(r) = c.out {
            let one = f.f32(1.0, 1);
            let inverse = f.op(format!("arith.divf {one}, {} : f32", out[1]));
            let x: Vec<Val> = out[2..].iter().map(|a| f.op(format!("arith.mulf {a}, {inverse} : f32"))).collect();
            self.store(f, p, r, row, head, &x);
        }
        if let Some(r) = c.lse {
            let log = Math { f, lanes: 1 }.log(&out[1]);
            let x = f.op(format!("arith.addf {}, {log} : f32", out[0]));
            let zero = f.i64(0);
            let leads = f.cmp("eq", &self.lane, &zero);
            f.if_(&leads, |f| {
                let ty = p.k.body.ty(p.k.body.roots[r].value).clone();
                let at = [At::of(f, row, 1), At::of(f, head, 1)];
                let (to, align) = p.address(f, p.k.operands.len() + r, &ty, &at);
                crate::emit::elementwise::store_aligned(f, DType::F32, &x, &to, align);
            });
        }
    }

    /// P and dS of a pair: the weight of the key, and the gradient of the scaled score.
    fn pair(&self, f: &mut Func, [q, k, v, d_out]: [&[Val]; 4], lse: &Val, mean: &Val) -> (Val, Val) {
        let x = self.score(f, q, k);
        let w = self.exp(f, &x, lse);
        let dp = self.dot(f, d_out, v);
        let dp = f.op(format!("arith.subf {dp}, {mean} : f32"));
        let ds = f.op(format!("arith.mulf {w}, {dp} : f32"));
        (w, f.op(format!("arith.mulf {ds}, {} : f32", self.scale)))
    }

    /// d_out, its product with out, and the log-sum-exp of a query.
    fn query(&self, f: &mut Func, p: &mut Pull<'_>, row: &Val, head: &Val) -> (Vec<Val>, Val, Val) {
        let c = self.c;
        let d_out = self.load(f, p, c.inputs[5], row, head);
        let out = self.load(f, p, c.inputs[3], row, head);
        let mean = self.dot(f, &d_out, &out);
        let at = [At::of(f, row, 1), At::of(f, head, 1)];
        let lse = p.scope(|p| p.eval(f, c.inputs[4], &at));
        (d_out, mean, lse)
    }

    fn query_gradient(&mut self, f: &mut Func, p: &mut Pull<'_>, row: &Val, head: &Val) {
        let c = self.c;
        let s = Sequence::find(f, p, c, row);
        let s = Sequence::of(f, p, c, &s);
        let i = f.sub(row, &s.q0);
        let (lo, hi) = s.sees(f, c, &i);
        let q = self.load(f, p, c.inputs[0], row, head);
        let (d_out, mean, lse) = self.query(f, p, row, head);
        let kv = self.kv_head(f, head);
        let init = self.zeros(f);
        let out = f.for_(&lo, &hi, 1, &init, |f, j, acc| {
            let key = f.add(&s.k0, j);
            let k = self.load(f, p, c.inputs[1], &key, &kv);
            let v = self.load(f, p, c.inputs[2], &key, &kv);
            let (_, ds) = self.pair(f, [&q, &k, &v, &d_out], &lse, &mean);
            self.add(f, acc, &ds, &k)
        });
        if let Some(r) = c.grads[0] {
            self.store(f, p, r, row, head, &out);
        }
    }

    fn key_gradients(&mut self, f: &mut Func, p: &mut Pull<'_>, row: &Val, kv: &Val) {
        let c = self.c;
        let k = self.load(f, p, c.inputs[1], row, kv);
        let v = self.load(f, p, c.inputs[2], row, kv);
        let group = i64::from(c.at.heads / c.at.kv_heads);
        let count: Dim = p.k.body.ty(c.bounds[1]).shape[0];
        let (zero, count) = (f.i64(0), p.dim(f, count));
        let n = self.places.len();
        let init: Vec<(Val, String)> = [self.zeros(f), self.zeros(f)].concat();
        let out = f.for_(&zero, &count, 1, &init, |f, s, acc| {
            let s = Sequence::of(f, p, c, s);
            let j = f.sub(row, &s.k0);
            let (lo, hi) = s.seen(f, c, &j);
            // A key outside of the sequence is seen by none.
            let inside = f.cmp("ult", &j, &s.keys);
            let hi = f.op(format!("arith.select {inside}, {hi}, {lo} : i64"));
            let heads = f.i64(group);
            let init: Vec<(Val, String)> = acc.iter().map(|x| (x.clone(), "f32".into())).collect();
            f.for_(&zero, &heads, 1, &init, |f, h, acc| {
                let first = f.mulc(kv, group);
                let head = f.add(&first, h);
                let init: Vec<(Val, String)> = acc.iter().map(|x| (x.clone(), "f32".into())).collect();
                f.for_(&lo, &hi, 1, &init, |f, i, acc| {
                    let at = f.add(&s.q0, i);
                    let q = self.load(f, p, c.inputs[0], &at, &head);
                    let (d_out, mean, lse) = self.query(f, p, &at, &head);
                    let (w, ds) = self.pair(f, [&q, &k, &v, &d_out], &lse, &mean);
                    let mut next = self.add(f, &acc[..n], &ds, &q);
                    next.extend(self.add(f, &acc[n..], &w, &d_out));
                    next
                })
            })
        });
        if let Some(r) = c.grads[1] {
            self.store(f, p, r, row, kv, &out[..n]);
        }
        if let Some(r) = c.grads[2] {
            self.store(f, p, r, row, kv, &out[n..]);
        }
    }
}
