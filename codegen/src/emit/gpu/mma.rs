//! Matrix instructions of a warp (`mma.sync` m16n8k16 of bf16 with f32 accumulators, `ldmatrix`): sm_80 and later.

use crate::emit::func::{Func, Val};

/// c + a · b for 16 rows and 8 columns, over 16 steps. Operands are pairs of bf16 in i32: four registers of `a`, two of `b`.
pub(super) fn multiply(f: &mut Func, a: [&Val; 4], b: [&Val; 2], c: &mut [Val]) {
    let ty = "!llvm.struct<(f32, f32, f32, f32)>";
    let d = f.op(format!(
        "nvvm.mma.sync A[{}, {}, {}, {}] B[{}, {}] C[{}, {}, {}, {}] {{layoutA = #nvvm.mma_layout<row>, layoutB = \
         #nvvm.mma_layout<col>, multiplicandAPtxType = #nvvm.mma_type<bf16>, multiplicandBPtxType = #nvvm.mma_type<bf16>, \
         shape = #nvvm.shape<m = 16, n = 8, k = 16>}} : (i32, i32, f32) -> {ty}",
        a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], c[2], c[3]
    ));
    for (e, c) in c.iter_mut().enumerate() {
        *c = f.op(format!("llvm.extractvalue {d}[{e}] : {ty}"));
    }
}

/// Four 8 by 8 matrices of 16-bit elements from the lane's row in shared memory; transposed if `turned`.
pub(super) fn load(f: &mut Func, at: &Val, turned: bool) -> [Val; 4] {
    let (layout, ty) = (if turned { "col" } else { "row" }, "!llvm.struct<(i32, i32, i32, i32)>");
    let q = f.op(format!(
        "nvvm.ldmatrix {at} {{num = 4 : i32, layout = #nvvm.mma_layout<{layout}>, shape = #nvvm.ld_st_matrix_shape<m = 8, n = \
         8>, eltType = #nvvm.ld_st_matrix_elt_type<b16>}} : (!llvm.ptr<3>) -> {ty}"
    ));
    [0, 1, 2, 3].map(|i| f.op(format!("llvm.extractvalue {q}[{i}] : {ty}")))
}
