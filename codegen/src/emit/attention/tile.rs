//! Attention of many lanes: lanes along vectors, keys and values broadcast from where they lie.
//!
//! A block of scores is `[key][lane]`. Its register tile is `TILE` keys by one to three vectors of lanes; the tile of the
//! weighted values is `TILE` elements of a head by the same lanes. The last tile of keys is moved back to end at the last
//! key, so that nothing is read past it; what it computes twice is the same twice.

use super::lanes::{pair, pair_rows, widen_rows};
use super::{Config, HIDDEN, Task, transpose};
use crate::emit::elementwise::round_to;
use crate::emit::func::{Func, Val};
use crate::emit::vmath::Math;
use pleach_ir::DType;

/// Rows of a register tile for one, two and three vectors of lanes, with 16 lanes to a vector and with fewer.
const TILE: [[i64; 3]; 2] = [[8, 8, 8], [8, 4, 4]];

pub(super) fn write(f: &mut Func, c: &Config, t: &Task) {
    let w = c.w as i64;
    let vectors = f.ceil_divc(&t.lanes, w);
    let width = f.mulc(&vectors, w);
    let dp = f.i64(c.dp);
    transpose::write(f, c.w, (&t.by_lane, &dp), (&t.query, &width), &width, &dp);
    if c.pairs {
        pair_queries(f, c, t, &width);
    }
    let (zero, z) = (f.i64(0), f.f32(0.0, c.w));
    let all = f.mulc(&width, c.dp);
    f.loop_(&zero, &all, w, |f, i| f.store_at(&z, &t.result, i, "f32", c.w));
    let (one, two) = (f.i64(1), f.i64(2));
    let is_one = f.cmp("eq", &vectors, &one);
    let is_two = f.cmp("eq", &vectors, &two);
    let code = |nv: usize| {
        move |f: &mut Func| {
            Lanes { c, t, nv }.write(f);
            vec![]
        }
    };
    f.if_else(&is_one, &[], code(1), |f| f.if_else(&is_two, &[], code(2), code(3)));
    transpose::write(f, c.w, (&t.result, &width), (&t.by_lane, &dp), &dp, &width);
}

/// Queries from `[element][lane]` to `[pair of elements][lane]`, in place.
fn pair_queries(f: &mut Func, c: &Config, t: &Task, width: &Val) {
    let (zero, half) = (f.i64(0), f.i64(c.dp / 2));
    f.loop_(&zero, &half, 1, |f, e| {
        let (to, first) = (f.mul(e, width), f.mulc(e, 2));
        let first = f.mul(&first, width);
        let second = f.add(&first, width);
        f.loop_(&zero, width, c.w as i64, |f, lane| {
            let at = f.add(&first, lane);
            let x = f.load_at(&t.query, &at, "f32", c.w);
            let at = f.add(&second, lane);
            let y = f.load_at(&t.query, &at, "f32", c.w);
            let both = pair(f, c, &x, &y);
            let at = f.add(&to, lane);
            let p = f.gep(&t.query, &at, "f32");
            f.store(&both, &p, &c.vi());
        });
    });
}

/// The code for a fixed number of vectors of lanes.
struct Lanes<'a> {
    c: &'a Config,
    t: &'a Task,
    nv: usize,
}

impl Lanes<'_> {
    /// Lanes, padded.
    fn width(&self) -> i64 {
        (self.nv * self.c.w) as i64
    }

    fn tile(&self) -> i64 {
        TILE[usize::from(self.c.w < 16)][self.nv - 1]
    }

    /// The pointers of the vectors of lanes at `base + row * width`.
    fn row(&self, f: &mut Func, base: &Val, row: &Val) -> Vec<Val> {
        let at = f.mulc(row, self.width());
        let p = f.gep(base, &at, "f32");
        self.vectors(f, &p)
    }

    fn vectors(&self, f: &mut Func, p: &Val) -> Vec<Val> {
        (0..self.nv)
            .map(|v| {
                let at = f.i64((v * self.c.w) as i64);
                f.gep(p, &at, "f32")
            })
            .collect()
    }

    fn load(&self, f: &mut Func, ps: &[Val]) -> Vec<Val> {
        let ty = self.c.vf();
        ps.iter().map(|p| f.load(p, &ty)).collect()
    }

    fn math<'f>(&self, f: &'f mut Func) -> Math<'f> {
        Math { f, lanes: self.c.w }
    }

    fn write(&self, f: &mut Func) {
        let (c, t, ty) = (self.c, self.t, self.c.vf());
        let (hidden, none) = (f.f32(HIDDEN, c.w), f.f32(0.0, c.w));
        let mut state: Vec<(Val, String)> = vec![];
        state.extend((0..self.nv).map(|_| (hidden.clone(), ty.clone())));
        state.extend((0..self.nv).map(|_| (none.clone(), ty.clone())));
        let out = f.for_(&t.first, &t.last, c.block, &state, |f, at, state| {
            let (top, sum) = state.split_at(self.nv);
            let end = f.addc(at, c.block);
            let end = f.min(&end, &t.last);
            let n = f.sub(&end, at);
            let keys = self.block(f, &t.key, c.k.stride, &t.keys, at, &n, false);
            let values = self.block(f, &t.value, c.v.stride, &t.values, at, &n, true);
            let new = self.scores(f, (&keys.0, keys.1), at, &n, top);
            let fix: Vec<Val> = (0..self.nv)
                .map(|v| {
                    let mut m = self.math(f);
                    let x = m.bin("subf", &top[v], &new[v]);
                    m.exp(&x)
                })
                .collect();
            let kept: Vec<Val> = (0..self.nv).map(|v| self.math(f).bin("mulf", &sum[v], &fix[v])).collect();
            let sum = self.weights(f, &n, &new, &kept);
            self.values(f, (&values.0, values.1), &n, &fix);
            new.into_iter().chain(sum).collect()
        });
        let ps = self.vectors(f, &t.sum);
        let tops = self.vectors(f, &t.top);
        for (x, p) in out.iter().zip(tops.iter().chain(&ps)) {
            f.store(x, p, &ty);
        }
    }

    /// Rows `at..at + n` of keys or values as f32, and the elements from one to the next: where they lie, or widened
    /// in scratch memory. For dot products of pairs: as they lie, or pairs of rows in scratch memory.
    #[allow(clippy::too_many_arguments, reason = "the block's frame")]
    fn block(&self, f: &mut Func, rows: &Val, stride: i64, area: &Val, at: &Val, n: &Val, by_rows: bool) -> (Val, i64) {
        let off = f.mulc(at, stride);
        let from = f.gep(rows, &off, self.c.elem());
        if self.c.dtype == DType::F32 || (self.c.pairs && !by_rows) {
            return (from, stride);
        }
        if self.c.pairs {
            pair_rows(f, self.c, (&from, stride), area, n);
            return (area.clone(), self.c.dp);
        }
        widen_rows(f, self.c, (&from, stride), area, n);
        (area.clone(), self.c.dp)
    }

    /// Scores of the `n` keys from `at` on, at `keys`; the new running maximum.
    fn scores(&self, f: &mut Func, keys: (&Val, i64), at: &Val, n: &Val, top: &[Val]) -> Vec<Val> {
        let ty = self.c.vf();
        let rows = self.tile();
        let state: Vec<(Val, String)> = top.iter().map(|x| (x.clone(), ty.clone())).collect();
        let types: Vec<String> = state.iter().map(|x| x.1.clone()).collect();
        let (zero, tile) = (f.i64(0), f.i64(rows));
        let many = f.cmp("sge", n, &tile);
        f.if_else(
            &many,
            &types,
            |f| {
                let last = f.addc(n, -rows);
                f.for_(&zero, n, rows, &state, |f, j, top| {
                    let j = f.min(j, &last);
                    self.score_tile(f, rows, keys, at, &j, top)
                })
            },
            |f| f.for_(&zero, n, 1, &state, |f, j, top| self.score_tile(f, 1, keys, at, j, top)),
        )
    }

    fn score_tile(
        &self,
        f: &mut Func,
        rows: i64,
        (keys, stride): (&Val, i64),
        at: &Val,
        j: &Val,
        top: &[Val],
    ) -> Vec<Val> {
        let (c, t, ty) = (self.c, self.t, self.c.vf());
        let index = f.add(at, j);
        let off = f.mulc(j, stride);
        // An element of f32, or a pair of bf16.
        let (elem, step) = if c.pairs { (c.elem(), 2) } else { ("f32", 1) };
        let keys = f.gep(keys, &off, elem);
        let (zero, d, none) = (f.i64(0), f.i64(c.d / step), f.f32(0.0, c.w));
        let inits = vec![(none, ty.clone()); rows as usize * self.nv];
        let mut acc = f.for_(&zero, &d, 1, &inits, |f, e, acc| {
            let q = self.row(f, &t.query, e);
            let q = self.load(f, &q);
            let e = f.mulc(e, step);
            let p = f.gep(&keys, &e, elem);
            self.outer(f, rows, (&p, elem), stride, &q, acc)
        });
        if c.pairs {
            let scale = f.f32(f32::from_bits(c.at.scale), c.w);
            acc.iter_mut().for_each(|x| *x = self.math(f).bin("mulf", x, &scale));
        }
        let mut top = top.to_vec();
        let bounds = |f: &mut Func, area: &Val| {
            let ps = self.vectors(f, area);
            ps.iter().map(|p| f.load(p, &c.vi())).collect::<Vec<_>>()
        };
        let hi = if c.at.causal { bounds(f, &t.hi) } else { vec![] };
        let lo = if c.at.window.is_some() { bounds(f, &t.lo) } else { vec![] };
        let hidden = f.f32(HIDDEN, c.w);
        for i in 0..rows {
            let key = f.addc(&index, i);
            let key = f.op(format!("arith.trunci {key} : i64 to i32"));
            let key = f.splat(&key, "i32", c.w);
            let row = f.addc(j, i);
            let ps = self.row(f, &t.scores, &row);
            for v in 0..self.nv {
                let mut x = acc[i as usize * self.nv + v].clone();
                for (pred, limit) in [("slt", hi.get(v)), ("sge", lo.get(v))] {
                    if let Some(limit) = limit {
                        let seen = f.op(format!("arith.cmpi {pred}, {key}, {limit} : {}", c.vi()));
                        x = f.op(format!("arith.select {seen}, {x}, {hidden} : vector<{}xi1>, {ty}", c.w));
                    }
                }
                f.store(&x, &ps[v], &ty);
                top[v] = self.math(f).choose("ogt", &x, &top[v], &x, &top[v]);
            }
        }
        top
    }

    /// `acc[i][v] += p[i * stride] * x[v]`; for pairs both products of a pair.
    fn outer(&self, f: &mut Func, rows: i64, (p, elem): (&Val, &str), stride: i64, x: &[Val], acc: &[Val]) -> Vec<Val> {
        let mut out = vec![];
        for i in 0..rows {
            let at = f.i64(i * stride);
            if self.c.pairs {
                let q = f.gep(p, &at, elem);
                let a = f.op(format!("llvm.load {q} {{alignment = 2 : i64}} : !llvm.ptr -> i32"));
                let a = f.splat(&a, "i32", self.c.w);
                let a = f.op(format!("llvm.bitcast {a} : vector<16xi32> to vector<32xbf16>"));
                for v in 0..self.nv {
                    let b = f.op(format!("llvm.bitcast {} : vector<16xf32> to vector<32xbf16>", x[v]));
                    out.push(f.op(format!(
                        "llvm.call_intrinsic \"llvm.x86.avx512bf16.dpbf16ps.512\"({}, {a}, {b}) : (vector<16xf32>, \
                         vector<32xbf16>, vector<32xbf16>) -> vector<16xf32>",
                        acc[i as usize * self.nv + v]
                    )));
                }
                continue;
            }
            let a = f.load_at(p, &at, "f32", 1);
            let a = f.splat(&a, "f32", self.c.w);
            for v in 0..self.nv {
                out.push(self.math(f).fma(&a, &x[v], &acc[i as usize * self.nv + v]));
            }
        }
        out
    }

    /// Scores into weights as bf16, `[pair of keys][lane]` in the place of the scores; the new sum, of weights before rounding.
    fn paired_weights(&self, f: &mut Func, n: &Val, top: &[Val], sum: &[Val]) -> Vec<Val> {
        let (ty, c) = (self.c.vf(), self.c);
        let weight = |f: &mut Func, j: &Val, v: usize| {
            let ps = self.row(f, &self.t.scores, j);
            let x = f.load(&ps[v], &ty);
            let mut m = self.math(f);
            let x = m.bin("subf", &x, &top[v]);
            m.exp(&x)
        };
        let mut sums = sum.to_vec();
        let (zero, whole, all) = (f.i64(0), f.divc(n, 2), f.ceil_divc(n, 2));
        for (low, high, both) in [(&zero, &whole, true), (&whole, &all, false)] {
            let state: Vec<(Val, String)> = sums.iter().map(|x| (x.clone(), ty.clone())).collect();
            sums = f.for_(low, high, 1, &state, |f, r, sum| {
                let first = f.mulc(r, 2);
                let second = f.addc(&first, 1);
                let to = self.row(f, &self.t.scores, r);
                // All are read before one is written: the first pair lies where its scores do.
                let mut pairs = vec![];
                let mut out = vec![];
                for (v, before) in sum.iter().enumerate() {
                    let x = weight(f, &first, v);
                    let y = if both { weight(f, &second, v) } else { f.f32(0.0, c.w) };
                    let mut m = self.math(f);
                    let two = m.bin("addf", &x, &y);
                    out.push(m.bin("addf", before, &two));
                    let (x, y) = (round_to(f, c.dtype, &x, c.w), round_to(f, c.dtype, &y, c.w));
                    pairs.push(pair(f, c, &x, &y));
                }
                pairs.iter().zip(&to).for_each(|(x, p)| f.store(x, p, &c.vi()));
                out
            });
        }
        sums
    }

    /// Scores into weights; the new sum.
    fn weights(&self, f: &mut Func, n: &Val, top: &[Val], sum: &[Val]) -> Vec<Val> {
        if self.c.pairs {
            return self.paired_weights(f, n, top, sum);
        }
        let ty = self.c.vf();
        let zero = f.i64(0);
        let state: Vec<(Val, String)> = sum.iter().map(|x| (x.clone(), ty.clone())).collect();
        f.for_(&zero, n, 1, &state, |f, j, sum| {
            let ps = self.row(f, &self.t.scores, j);
            let xs = self.load(f, &ps);
            (0..self.nv)
                .map(|v| {
                    let mut m = self.math(f);
                    let x = m.bin("subf", &xs[v], &top[v]);
                    let e = m.exp(&x);
                    m.f.store(&e, &ps[v], &ty);
                    m.bin("addf", &sum[v], &e)
                })
                .collect()
        })
    }

    /// `result = result * fix + value · weights` over `n` values.
    fn values(&self, f: &mut Func, values: (&Val, i64), n: &Val, fix: &[Val]) {
        let c = self.c;
        let tile = self.tile();
        let (zero, whole) = (f.i64(0), f.i64(c.d / tile * tile));
        f.loop_(&zero, &whole, tile, |f, e| self.value_tile(f, tile, values, e, n, fix));
        if c.d % tile != 0 {
            self.value_tile(f, c.d % tile, values, &whole, n, fix);
        }
    }

    fn value_tile(&self, f: &mut Func, rows: i64, (values, stride): (&Val, i64), e: &Val, n: &Val, fix: &[Val]) {
        let (t, ty) = (self.t, self.c.vf());
        let at: Vec<Vec<Val>> = (0..rows)
            .map(|i| {
                let row = f.addc(e, i);
                self.row(f, &t.result, &row)
            })
            .collect();
        let mut inits = vec![];
        for ps in &at {
            let old = self.load(f, ps);
            for v in 0..self.nv {
                inits.push((self.math(f).bin("mulf", &old[v], &fix[v]), ty.clone()));
            }
        }
        let values = f.gep(values, e, "f32");
        let zero = f.i64(0);
        let steps = if self.c.pairs { f.ceil_divc(n, 2) } else { n.clone() };
        let out = f.for_(&zero, &steps, 1, &inits, |f, j, acc| {
            let ws = self.row(f, &t.scores, j);
            let ws = self.load(f, &ws);
            let off = f.mulc(j, stride);
            let p = f.gep(&values, &off, "f32");
            self.outer(f, rows, (&p, "f32"), 1, &ws, acc)
        });
        for (x, p) in out.iter().zip(at.iter().flatten()) {
            f.store(x, p, &ty);
        }
    }
}
