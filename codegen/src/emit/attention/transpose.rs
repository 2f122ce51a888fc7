//! Transposes square blocks of f32 in registers, log2(width) rounds of two-operand shuffles.

use crate::emit::func::{Func, Val, vty};

/// The rows of a `w` by `w` block, transposed.
fn transposed(f: &mut Func, mut rows: Vec<Val>) -> Vec<Val> {
    let w = rows.len();
    let ty = vty(w, "f32");
    let mut h = w / 2;
    while h > 0 {
        for i in (0..w).filter(|i| i & h == 0) {
            let (a, b) = (rows[i].clone(), rows[i + h].clone());
            let pick = |upper: usize| {
                let one = |x: usize| if x & h == 0 { x + upper } else { w + x - h + upper };
                (0..w).map(|x| one(x).to_string()).collect::<Vec<_>>().join(", ")
            };
            rows[i] = f.op(format!("vector.shuffle {a}, {b} [{}] : {ty}, {ty}", pick(0)));
            rows[i + h] = f.op(format!("vector.shuffle {a}, {b} [{}] : {ty}, {ty}", pick(h)));
        }
        h /= 2;
    }
    rows
}

/// `to[c * to_stride + r] = from[r * from_stride + c]` for `rows` by `cols` elements, both multiples of `w`.
pub(super) fn write(f: &mut Func, w: usize, from: (&Val, &Val), to: (&Val, &Val), rows: &Val, cols: &Val) {
    let (zero, ty) = (f.i64(0), vty(w, "f32"));
    let step = w as i64;
    f.loop_(&zero, rows, step, |f, r| {
        let row = f.mul(r, from.1);
        let source = f.gep(from.0, &row, "f32");
        let target = f.gep(to.0, r, "f32");
        f.loop_(&zero, cols, step, |f, c| {
            let line = |f: &mut Func, base: &Val, stride: &Val, i: usize| {
                let at = f.mulc(stride, i as i64);
                f.gep(base, &at, "f32")
            };
            let source = f.gep(&source, c, "f32");
            let loaded = (0..w)
                .map(|i| {
                    let p = line(f, &source, from.1, i);
                    f.load(&p, &ty)
                })
                .collect();
            let out = transposed(f, loaded);
            let col = f.mul(c, to.1);
            let target = f.gep(&target, &col, "f32");
            for (i, x) in out.iter().enumerate() {
                let p = line(f, &target, to.1, i);
                f.store(x, &p, &ty);
            }
        });
    });
}
