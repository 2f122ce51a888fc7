//! Rows or columns of a matrix in blocks that have values of their own, laid over a tile of what the codes stand for.
//!
//! They are few, so most tiles have none: every thread looks at all indices, which are the same for all, and where one lies in the tile the
//! threads that decoded it meet and write its values over what is there. Equal indices are taken in their order, and a thread has the same
//! elements of each: the last one wins.

use crate::emit::contraction::analyze::Laid;
use crate::emit::elementwise;
use crate::emit::func::{Func, Val};
use crate::emit::gpu::launch::shared_store;
use crate::emit::gpu::wgmma;
use pleach_ir::DType;

/// What is laid over a matrix.
#[derive(Clone)]
pub(super) struct Over {
    indices: Val,
    values: Val,
    count: i64,
    /// Lines of the result are set; else steps of the sum.
    pub(super) lines: bool,
    /// From an element to the next along the other axis, and from one that is set to the next.
    strides: [i64; 2],
    /// Types of the values and of the product.
    dtypes: [DType; 2],
}

impl Over {
    /// Over a matrix of so many columns whose rows lie along the sum (`along`) or across it.
    pub(super) fn new(f: &Func, laid: &Laid, along: bool, width: i64, dtypes: [DType; 2]) -> Over {
        let [indices, values] = [laid.index, laid.values].map(|i| f.arg(&format!("p{i}")));
        let count = laid.count as i64;
        let (lines, strides) = if laid.axis == 0 { (along, [1, width]) } else { (!along, [count, 1]) };
        Over { indices, values, count, lines, strides, dtypes }
    }

    /// Calls `put` for every one that lies among `span` places from `first` on, with its place there and its number: all threads of a block do.
    pub(super) fn each(&self, f: &mut Func, first: &Val, span: i64, put: impl FnOnce(&mut Func, &Val, &Val)) {
        // Hidden from LLVM, which would write out the loop.
        let end = f.i64(self.count);
        let (zero, end) = (f.i64(0), wgmma::settled(f, &[end], "i64", "l").remove(0));
        f.for_(&zero, &end, 1, &[], |f, j, _| {
            let at = f.gep(&self.indices, j, "i32");
            let i = f.op(format!("llvm.load {at} {{alignment = 4 : i64}} : !llvm.ptr -> i32"));
            let i = f.op(format!("arith.extsi {i} : i32 to i64"));
            let (place, none, end) = (f.sub(&i, first), f.i64(0), f.i64(span));
            let (a, b) = (f.cmp("sge", &place, &none), f.cmp("slt", &place, &end));
            let here = f.op(format!("arith.andi {a}, {b} : i1"));
            f.if_(&here, |f| put(f, &place, j));
            vec![]
        });
    }

    /// The value of number `j` at a place of the other axis, as the product takes it: f32.
    pub(super) fn value(&self, f: &mut Func, j: &Val, other: &Val) -> Val {
        let (a, b) = (f.mulc(other, self.strides[0]), f.mulc(j, self.strides[1]));
        let at = f.add(&a, &b);
        let [dtype, to] = self.dtypes;
        let from = f.gep(&self.values, &at, elementwise::memory_elem(dtype));
        let x = elementwise::load_aligned(f, dtype, &from, dtype.size() as i64);
        elementwise::round_to(f, to, &x, 1)
    }

    /// Stores the value as bf16 at a place in shared memory.
    pub(super) fn store(&self, f: &mut Func, j: &Val, other: &Val, to: &Val) {
        let x = self.value(f, j, other);
        let x = f.op(format!("arith.truncf {x} : f32 to bf16"));
        shared_store(f, &x, to, "bf16", 2);
    }
}
