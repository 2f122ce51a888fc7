//! Transposes square blocks of f32 in registers, log2(width) rounds of two-operand shuffles.

use crate::emit::func::{Func, Val, transpose, vty};

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
            let out = transpose(f, loaded, "f32");
            let col = f.mul(c, to.1);
            let target = f.gep(&target, &col, "f32");
            for (i, x) in out.iter().enumerate() {
                let p = line(f, &target, to.1, i);
                f.store(x, &p, &ty);
            }
        });
    });
}
