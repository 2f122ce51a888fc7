//! The products inside a block of attention's gradient: lanes along vectors, or elements of a head along vectors.

use super::Config;
use super::grad::{Areas, Grad};
use crate::emit::func::{Func, Val};
use crate::emit::vmath::Math;

/// Keys of a register tile whose vectors run along lanes, for one and for three vectors; with 16 lanes to a vector and
/// with fewer.
const TILE: [[i64; 2]; 2] = [[8, 8], [8, 4]];
/// Keys of a register tile whose vectors run along a head.
const KEYS: i64 = 4;

fn tile(c: &Config, nv: usize) -> i64 {
    TILE[usize::from(c.w < 16)][usize::from(nv > 1)]
}

/// Pointers of `n` vectors from `p` on.
fn vectors(f: &mut Func, c: &Config, p: &Val, n: usize) -> Vec<Val> {
    (0..n)
        .map(|v| {
            let at = f.i64((v * c.w) as i64);
            f.gep(p, &at, "f32")
        })
        .collect()
}

fn load_all(f: &mut Func, ps: &[Val], ty: &str) -> Vec<Val> {
    ps.iter().map(|p| f.load(p, ty)).collect()
}

/// `acc[i][v] += p[i * stride] * x[v]`.
fn outer(f: &mut Func, c: &Config, rows: i64, (p, stride): (&Val, i64), x: &[Val], acc: &[Val]) -> Vec<Val> {
    let mut out = vec![];
    for i in 0..rows {
        let at = f.i64(i * stride);
        let a = f.load_at(p, &at, "f32", 1);
        let a = f.splat(&a, "f32", c.w);
        for (v, x) in x.iter().enumerate() {
            out.push(Math { f, lanes: c.w }.fma(&a, x, &acc[i as usize * x_len(acc, rows) + v]));
        }
    }
    out
}

/// Vectors of each row of a tile.
fn x_len(acc: &[Val], rows: i64) -> usize {
    acc.len() / rows as usize
}

/// P and dS of the `n` keys from `at` on, `[key][lane]`.
pub(super) fn weights(f: &mut Func, g: &Grad, a: &Areas, nv: usize, sources: [(&Val, i64); 2], [at, n]: [&Val; 2]) {
    let rows = tile(&g.c, nv);
    let (zero, many) = (f.i64(0), f.i64(rows));
    let many = f.cmp("sge", n, &many);
    // The last tile is moved back to end at the last key: what it computes twice is the same twice.
    f.if_else(
        &many,
        &[],
        |f| {
            let last = f.addc(n, -rows);
            f.loop_(&zero, n, rows, |f, j| {
                let j = f.min(j, &last);
                weight_tile(f, g, a, nv, rows, sources, [at, &j]);
            });
            vec![]
        },
        |f| {
            f.loop_(&zero, n, 1, |f, j| weight_tile(f, g, a, nv, 1, sources, [at, j]));
            vec![]
        },
    );
}

fn weight_tile(
    f: &mut Func,
    g: &Grad,
    a: &Areas,
    nv: usize,
    rows: i64,
    [keys, values]: [(&Val, i64); 2],
    [at, j]: [&Val; 2],
) {
    let (c, ty, vi) = (&g.c, g.c.vf(), g.c.vi());
    let width = (nv * c.w) as i64;
    let dot = |f: &mut Func, (rows_at, stride): (&Val, i64), by_element: &Val| {
        let off = f.mulc(j, stride);
        let base = f.gep(rows_at, &off, "f32");
        let (zero, d, none) = (f.i64(0), f.i64(c.d), f.f32(0.0, c.w));
        f.for_(&zero, &d, 1, &vec![(none, ty.clone()); rows as usize * nv], |f, e, acc| {
            let at = f.mulc(e, width);
            let x = f.gep(by_element, &at, "f32");
            let x = vectors(f, c, &x, nv);
            let x = load_all(f, &x, &ty);
            let p = f.gep(&base, e, "f32");
            outer(f, c, rows, (&p, stride), &x, acc)
        })
    };
    let row = |f: &mut Func, area: &Val, i: i64| {
        let at = f.addc(j, i);
        let at = f.mulc(&at, width);
        let p = f.gep(area, &at, "f32");
        vectors(f, c, &p, nv)
    };
    let per_lane = |f: &mut Func, area: &Val, ty: &str| {
        let ps = vectors(f, c, area, nv);
        load_all(f, &ps, ty)
    };
    let scores = dot(f, keys, &a.qt);
    let lse = per_lane(f, &a.lse, &ty);
    let hi = if c.at.causal { per_lane(f, &a.hi, &vi) } else { vec![] };
    let lo = if c.at.window.is_some() { per_lane(f, &a.lo, &vi) } else { vec![] };
    let none = f.f32(0.0, c.w);
    for i in 0..rows {
        let key = f.add(at, j);
        let key = f.addc(&key, i);
        let key = f.op(format!("arith.trunci {key} : i64 to i32"));
        let key = f.splat(&key, "i32", c.w);
        let to = row(f, &a.p, i);
        for v in 0..nv {
            let mut m = Math { f, lanes: c.w };
            let x = m.bin("subf", &scores[i as usize * nv + v], &lse[v]);
            let mut x = m.exp(&x);
            for (pred, limit) in [("slt", hi.get(v)), ("sge", lo.get(v))] {
                if let Some(limit) = limit {
                    let seen = f.op(format!("arith.cmpi {pred}, {key}, {limit} : {vi}"));
                    x = f.op(format!("arith.select {seen}, {x}, {none} : vector<{}xi1>, {ty}", c.w));
                }
            }
            f.store(&x, &to[v], &ty);
        }
    }
    let along = dot(f, values, &a.ot);
    let mean = per_lane(f, &a.mean, &ty);
    for i in 0..rows {
        let from = row(f, &a.p, i);
        let to = row(f, &a.ds, i);
        for v in 0..nv {
            let p = f.load(&from[v], &ty);
            let mut m = Math { f, lanes: c.w };
            let x = m.bin("subf", &along[i as usize * nv + v], &mean[v]);
            let x = m.bin("mulf", &p, &x);
            f.store(&x, &to[v], &ty);
        }
    }
}

/// `sum[key][e] += weights[key][lane] · rows[lane][e]` for `n` keys and the lanes in use.
pub(super) fn add_rows(
    f: &mut Func,
    c: &Config,
    nv: usize,
    [weights, rows]: [&Val; 2],
    (sum, stride): (&Val, i64),
    [n, lanes]: [&Val; 2],
) {
    let (w, ty) = (c.w as i64, c.vf());
    let most = if c.w < 16 { 2 } else { 4 };
    let width = nv as i64 * w;
    let zero = f.i64(0);
    let whole = f.divc(n, KEYS);
    let whole = f.mulc(&whole, KEYS);
    let mut e = 0;
    while e < c.dp {
        let ev = ((c.dp - e) / w).min(most);
        for (lo, hi, keys) in [(&zero, &whole, KEYS), (&whole, n, 1)] {
            f.loop_(lo, hi, keys, |f, j| {
                let mut places = vec![];
                for i in 0..keys {
                    let at = f.addc(j, i);
                    let at = f.mulc(&at, stride);
                    let at = f.addc(&at, e);
                    let p = f.gep(sum, &at, "f32");
                    places.extend(vectors(f, c, &p, ev as usize));
                }
                let inits: Vec<(Val, String)> =
                    load_all(f, &places, &ty).into_iter().map(|x| (x, ty.clone())).collect();
                let at = f.mulc(j, width);
                let weights = f.gep(weights, &at, "f32");
                let out = f.for_(&zero, lanes, 1, &inits, |f, lane, acc| {
                    let at = f.mulc(lane, c.dp);
                    let at = f.addc(&at, e);
                    let p = f.gep(rows, &at, "f32");
                    let x = vectors(f, c, &p, ev as usize);
                    let x = load_all(f, &x, &ty);
                    let p = f.gep(&weights, lane, "f32");
                    outer(f, c, keys, (&p, width), &x, acc)
                });
                for (x, p) in out.iter().zip(&places) {
                    f.store(x, p, &ty);
                }
            });
        }
        e += ev * w;
    }
}

/// `sum[e][lane] += keys[key][e] · weights[key][lane]` over `n` keys.
pub(super) fn add_lanes(
    f: &mut Func,
    c: &Config,
    nv: usize,
    (weights, sum): (&Val, &Val),
    (keys, stride): (&Val, i64),
    n: &Val,
) {
    let (ty, width) = (c.vf(), (nv * c.w) as i64);
    let rows = tile(c, nv);
    let part = |f: &mut Func, rows: i64, e: &Val| {
        let mut places = vec![];
        for i in 0..rows {
            let at = f.addc(e, i);
            let at = f.mulc(&at, width);
            let p = f.gep(sum, &at, "f32");
            places.extend(vectors(f, c, &p, nv));
        }
        let inits: Vec<(Val, String)> = load_all(f, &places, &ty).into_iter().map(|x| (x, ty.clone())).collect();
        let from = f.gep(keys, e, "f32");
        let zero = f.i64(0);
        let out = f.for_(&zero, n, 1, &inits, |f, j, acc| {
            let at = f.mulc(j, width);
            let p = f.gep(weights, &at, "f32");
            let x = vectors(f, c, &p, nv);
            let x = load_all(f, &x, &ty);
            let off = f.mulc(j, stride);
            let p = f.gep(&from, &off, "f32");
            outer(f, c, rows, (&p, 1), &x, acc)
        });
        for (x, p) in out.iter().zip(&places) {
            f.store(x, p, &ty);
        }
    };
    let (zero, whole) = (f.i64(0), f.i64(c.d / rows * rows));
    f.loop_(&zero, &whole, rows, |f, e| part(f, rows, e));
    if c.d % rows != 0 {
        part(f, c.d % rows, &whole);
    }
}
