//! Reductions by the threads of a warp or a block, in a fixed order.

use super::barrier;
use super::launch::{shared_at, shared_load, shared_store};
use super::pull::combine;
use crate::emit::elementwise::register_type;
use crate::emit::func::{Func, Val};
use pleach_ir::{DType, ReduceOp};

/// Combines one value of each of the 32 lanes of a warp by a butterfly; all lanes have the result.
pub(super) fn warp(f: &mut Func, op: ReduceOp, d: DType, x: &Val) -> Val {
    lanes(f, op, d, x, 32)
}

/// The same within groups of `n` neighbouring lanes.
pub(super) fn lanes(f: &mut Func, op: ReduceOp, d: DType, x: &Val, n: i32) -> Val {
    let ty = register_type(d, 1);
    let (all, last) = (f.i32(-1, 1), f.i32(31, 1));
    let mut x = x.clone();
    let mut step = n / 2;
    while step > 0 {
        let s = f.i32(step, 1);
        let other = f.op(format!("nvvm.shfl.sync bfly {all}, {x}, {s}, {last} : {ty} -> {ty}"));
        x = combine(f, op, d, &x, &other);
        step /= 2;
    }
    x
}

/// Combines values over all threads of a block; each list element is a reduction of its own with a place in shared memory of
/// `warps` words from `first` on. `lane` is the thread's number.
pub(super) fn block(
    f: &mut Func,
    list: &[(ReduceOp, DType, Val)],
    lane: &Val,
    warps: i64,
    base: &Val,
    first: i64,
) -> Vec<Val> {
    let parts: Vec<Val> = list.iter().map(|(op, d, x)| warp(f, *op, *d, x)).collect();
    let (own, in_warp, zero) = (f.divc(lane, 32), f.remc(lane, 32), f.i64(0));
    let leads = f.cmp("eq", &in_warp, &zero);
    f.if_(&leads, |f| {
        for (i, ((_, d, _), x)) in list.iter().zip(&parts).enumerate() {
            let at = f.addc(&own, first + i as i64 * warps);
            let to = shared_at(f, base, &at, "f32");
            shared_store(f, x, &to, &register_type(*d, 1), 4);
        }
    });
    barrier(f);
    list.iter()
        .enumerate()
        .map(|(i, (op, d, _))| {
            let mut total: Option<Val> = None;
            for w in 0..warps {
                let at = f.i64(first + i as i64 * warps + w);
                let from = shared_at(f, base, &at, "f32");
                let x = shared_load(f, &from, &register_type(*d, 1), 4);
                total = Some(match total {
                    None => x,
                    Some(t) => combine(f, *op, *d, &t, &x),
                });
            }
            total.unwrap_or_else(|| parts[i].clone())
        })
        .collect()
}
