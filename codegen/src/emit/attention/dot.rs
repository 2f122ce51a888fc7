//! Attention of few lanes (decoding): elements of a head along vectors, keys and values streamed once for a group of lanes.
//!
//! Scores lie as `[lane][key]` in the score area, with rows of `stride` keys. Results accumulate by lane in the result area.

use super::lanes::{lane_at, tail_mask};
use super::{Config, HIDDEN, Task};
use crate::emit::elementwise::load;
use crate::emit::func::{Func, Val};
use crate::emit::vmath::Math;

pub(super) fn write(f: &mut Func, c: &Config, t: &Task) {
    let padded = (c.few + c.at_once - 1) / c.at_once * c.at_once;
    let stride = (c.lanes * c.block / padded).min(512) / c.w as i64 * c.w as i64;
    let d = Dot { c, t, stride };
    let groups = f.ceil_divc(&t.lanes, c.at_once);
    let lanes = f.mulc(&groups, c.at_once);
    let zero = f.i64(0);
    let (hidden, none, z) = (f.f32(HIDDEN, 1), f.f32(0.0, 1), f.f32(0.0, c.w));
    f.loop_(&zero, &lanes, 1, |f, lane| {
        f.store_at(&hidden, &t.top, lane, "f32", 1);
        f.store_at(&none, &t.sum, lane, "f32", 1);
        let dp = f.i64(c.dp);
        f.loop_(&zero, &dp, c.w as i64, |f, e| {
            let p = lane_at(f, c, &t.result, lane, e);
            f.store(&z, &p, &c.vf());
        });
    });
    f.loop_(&t.first, &t.last, stride, |f, at| {
        let end = f.addc(at, stride);
        let end = f.min(&end, &t.last);
        let n = f.sub(&end, at);
        f.loop_(&zero, &lanes, c.at_once, |f, lane| d.scores(f, at, &n, lane));
        f.loop_(&zero, &lanes, 1, |f, lane| d.weights(f, at, &n, lane));
        f.loop_(&zero, &lanes, c.at_once, |f, lane| d.values(f, at, &n, lane));
    });
    // The caller takes results by lane.
    f.loop_(&zero, &lanes, 1, |f, lane| {
        let dp = f.i64(c.dp);
        f.loop_(&zero, &dp, c.w as i64, |f, e| {
            let p = lane_at(f, c, &t.result, lane, e);
            let x = f.load(&p, &c.vf());
            let p = lane_at(f, c, &t.by_lane, lane, e);
            f.store(&x, &p, &c.vf());
        });
    });
}

struct Dot<'a> {
    c: &'a Config,
    t: &'a Task,
    stride: i64,
}

impl Dot<'_> {
    /// The vectors of one head at `p`; what lies past the head is zero and not read.
    fn head(&self, f: &mut Func, p: &Val) -> Vec<Val> {
        let c = self.c;
        (0..c.dp)
            .step_by(c.w)
            .map(|e| {
                let at = f.i64(e);
                let p = f.gep(p, &at, c.elem());
                let mask = (e + c.w as i64 > c.d).then(|| tail_mask(f, c));
                load(f, c.dtype, &p, mask.as_ref(), c.w)
            })
            .collect()
    }

    /// The vectors of lanes `lane..` of an area by lane.
    fn group(&self, f: &mut Func, area: &Val, lane: &Val) -> Vec<Vec<Val>> {
        let c = self.c;
        let zero = f.i64(0);
        let base = lane_at(f, c, area, lane, &zero);
        (0..c.at_once)
            .map(|l| {
                (0..c.dp)
                    .step_by(c.w)
                    .map(|e| {
                        let at = f.i64(l * c.dp + e);
                        f.gep(&base, &at, "f32")
                    })
                    .collect()
            })
            .collect()
    }

    fn score_row(&self, f: &mut Func, lane: &Val) -> Val {
        let at = f.mulc(lane, self.stride);
        f.gep(&self.t.scores, &at, "f32")
    }

    fn scores(&self, f: &mut Func, at: &Val, n: &Val, lane: &Val) {
        let (c, vf) = (self.c, self.c.vf());
        let qs: Vec<Vec<Val>> =
            self.group(f, &self.t.by_lane, lane).iter().map(|ps| ps.iter().map(|p| f.load(p, &vf)).collect()).collect();
        let to = self.score_row(f, lane);
        let off = f.mulc(at, c.k.stride);
        let keys = f.gep(&self.t.key, &off, c.elem());
        let zero = f.i64(0);
        f.loop_(&zero, n, 1, |f, j| {
            let off = f.mulc(j, c.k.stride);
            let p = f.gep(&keys, &off, c.elem());
            let ks = self.head(f, &p);
            let to = f.gep(&to, j, "f32");
            for (l, q) in qs.iter().enumerate() {
                let mut m = Math { f, lanes: c.w };
                let mut acc = m.bin("mulf", &q[0], &ks[0]);
                for (x, y) in q.iter().zip(&ks).skip(1) {
                    acc = m.fma(x, y, &acc);
                }
                let s = sum_of(f, c, &acc);
                let at = f.i64(l as i64 * self.stride);
                f.store_at(&s, &to, &at, "f32", 1);
            }
        });
    }

    /// Scores into weights, and the running maximum, sum and correction of one lane.
    fn weights(&self, f: &mut Func, at: &Val, n: &Val, lane: &Val) {
        let (c, t, vf) = (self.c, self.t, self.c.vf());
        let row = self.score_row(f, lane);
        let (zero, hidden, none) = (f.i64(0), f.f32(HIDDEN, c.w), f.f32(0.0, c.w));
        let mut limits = vec![("slt", n.clone())];
        for (pred, area, used) in [("slt", &t.hi, c.at.causal), ("sge", &t.lo, c.at.window.is_some())] {
            if used {
                let x = super::load_i32(f, area, lane);
                limits.push((pred, f.sub(&x, at)));
            }
        }
        let limits: Vec<(&str, Val)> = limits
            .into_iter()
            .map(|(pred, x)| {
                let x = f.op(format!("arith.trunci {x} : i64 to i32"));
                (pred, f.splat(&x, "i32", c.w))
            })
            .collect();
        let ids = (0..c.w).map(|i| i.to_string()).collect::<Vec<_>>().join(", ");
        let iota = f.konst(&format!("dense<[{ids}]> : {}", c.vi()));
        let top = f.for_(&zero, n, c.w as i64, &[(hidden.clone(), vf.clone())], |f, j, top| {
            let p = f.gep(&row, j, "f32");
            let mut x = f.load(&p, &vf);
            let j = f.op(format!("arith.trunci {j} : i64 to i32"));
            let j = f.splat(&j, "i32", c.w);
            let j = f.op(format!("arith.addi {j}, {iota} : {}", c.vi()));
            for (pred, limit) in &limits {
                let seen = f.op(format!("arith.cmpi {pred}, {j}, {limit} : {}", c.vi()));
                x = f.op(format!("arith.select {seen}, {x}, {hidden} : vector<{}xi1>, {vf}", c.w));
            }
            f.store(&x, &p, &vf);
            vec![Math { f, lanes: c.w }.choose("ugt", &x, &top[0], &x, &top[0])]
        });
        let best = f.op(format!("vector.reduction <maximumf>, {} : {vf} into f32", top[0]));
        let old = f.load_at(&t.top, lane, "f32", 1);
        let mut m = Math { f, lanes: 1 };
        let new = m.bin("maximumf", &old, &best);
        let gap = m.bin("subf", &old, &new);
        let fix = m.exp(&gap);
        f.store_at(&new, &t.top, lane, "f32", 1);
        f.store_at(&fix, &t.fix, lane, "f32", 1);
        let new = f.splat(&new, "f32", c.w);
        let limit = f.f32(HIDDEN / 2.0, c.w);
        let sum = f.for_(&zero, n, c.w as i64, &[(none.clone(), vf.clone())], |f, j, sum| {
            let p = f.gep(&row, j, "f32");
            let x = f.load(&p, &vf);
            let mut m = Math { f, lanes: c.w };
            let gap = m.bin("subf", &x, &new);
            let e = m.exp(&gap);
            let e = m.choose("olt", &x, &limit, &none, &e);
            m.f.store(&e, &p, &vf);
            vec![m.bin("addf", &sum[0], &e)]
        });
        let sum = sum_of(f, c, &sum[0]);
        let old = f.load_at(&t.sum, lane, "f32", 1);
        let sum = Math { f, lanes: 1 }.fma(&old, &fix, &sum);
        f.store_at(&sum, &t.sum, lane, "f32", 1);
    }

    fn values(&self, f: &mut Func, at: &Val, n: &Val, lane: &Val) {
        let (c, t, vf) = (self.c, self.t, self.c.vf());
        let places = self.group(f, &t.result, lane);
        let mut inits = vec![];
        for (l, ps) in places.iter().enumerate() {
            let lane = f.addc(lane, l as i64);
            let fix = f.load_at(&t.fix, &lane, "f32", 1);
            let fix = f.splat(&fix, "f32", c.w);
            for p in ps {
                let x = f.load(p, &vf);
                inits.push((Math { f, lanes: c.w }.bin("mulf", &x, &fix), vf.clone()));
            }
        }
        let weights = self.score_row(f, lane);
        let off = f.mulc(at, c.v.stride);
        let values = f.gep(&t.value, &off, c.elem());
        let zero = f.i64(0);
        let out = f.for_(&zero, n, 1, &inits, |f, j, acc| {
            let off = f.mulc(j, c.v.stride);
            let p = f.gep(&values, &off, c.elem());
            let vs = self.head(f, &p);
            let weights = f.gep(&weights, j, "f32");
            let mut out = vec![];
            for l in 0..c.at_once {
                let at = f.i64(l * self.stride);
                let x = f.load_at(&weights, &at, "f32", 1);
                let x = f.splat(&x, "f32", c.w);
                for (i, v) in vs.iter().enumerate() {
                    let acc = &acc[l as usize * vs.len() + i];
                    out.push(Math { f, lanes: c.w }.fma(&x, v, acc));
                }
            }
            out
        });
        for (x, p) in out.iter().zip(places.iter().flatten()) {
            f.store(x, p, &vf);
        }
    }
}

/// Sum of the lanes of a vector, as a tree.
pub(super) fn sum_of(f: &mut Func, c: &Config, x: &Val) -> Val {
    f.op(format!("vector.reduction <add>, {x} fastmath<reassoc> : {} into f32", c.vf()))
}
