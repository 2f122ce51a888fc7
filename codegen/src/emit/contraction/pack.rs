//! Right operands without unit step along the columns, copied into panels in scratch memory.
//!
//! A task packs the block of columns it works on: `[tile][K][width]`, columns past the end as zeros.

use super::analyze::Right;
use super::context::{Context, repacked};
use crate::emit::func::{Func, Val};

/// Elements of scratch before the panels of a product.
fn start(f: &mut Func, cx: &Context, group: usize, product: usize) -> Val {
    let mut sum = f.i64(super::partial_elements(cx.an, cx.bl) as i64);
    for (g, p) in repacked(cx.an) {
        if (g, p) == (group, product) {
            break;
        }
        let k = cx.dim(f, cx.an.products[p].k);
        let n = f.mulc(&k, (cx.bl.task_tiles * cx.bl.width) as i64);
        sum = f.add(&sum, &n);
    }
    sum
}

/// Where in scratch the panel of a tile begins, in elements.
pub(super) fn place(f: &mut Func, cx: &Context, group: usize, product: usize, slot: &Val) -> Val {
    let s = start(f, cx, group, product);
    let k = cx.dim(f, cx.an.products[product].k);
    let size = f.mulc(&k, cx.bl.width as i64);
    let t = f.mul(slot, &size);
    f.add(&s, &t)
}

/// Packs the columns of tiles `first..last` for every product that needs it.
pub(super) fn pack(f: &mut Func, cx: &Context, batch: &[Val], first: &Val, last: &Val) {
    for (g, p) in cx.repacked() {
        let product = &cx.an.products[p];
        let Right::Strided(v) = &product.right else { continue };
        let rank = v.strides.len();
        let (down, across) = (cx.stride(f, &v.strides[rank - 2]), cx.stride(f, &v.strides[rank - 1]));
        let base = cx.base(f, v, batch);
        let (k, n) = (cx.dim(f, product.k), cx.dim(f, cx.an.n));
        let offset = cx.an.groups[g].offset as i64;
        let width = cx.bl.width as i64;
        f.loop_(first, last, 1, |f, tile| {
            let slot = f.sub(tile, first);
            let to = place(f, cx, g, p, &slot);
            let to = f.gep(&cx.scratch, &to, "f32");
            let (zero, wide) = (f.i64(0), f.i64(width));
            let column = f.mulc(tile, width);
            let left = f.sub(&n, &column);
            let real = f.min(&left, &wide);
            f.loop_(&zero, &real, 1, |f, c| {
                let at = f.add(&column, c);
                let at = f.addc(&at, offset);
                let at = f.mul(&at, &across);
                let from = f.gep(&base, &at, "f32");
                let to = f.gep(&to, c, "f32");
                f.loop_(&zero, &k, 1, |f, i| {
                    let s = f.mul(i, &down);
                    let x = f.load_at(&from, &s, "f32", 1);
                    let d = f.mulc(i, width);
                    f.store_at(&x, &to, &d, "f32", 1);
                });
            });
            f.loop_(&real, &wide, 1, |f, c| {
                let to = f.gep(&to, c, "f32");
                let x = f.f32(0.0, 1);
                f.loop_(&zero, &k, 1, |f, i| {
                    let d = f.mulc(i, width);
                    f.store_at(&x, &to, &d, "f32", 1);
                });
            });
        });
    }
}
