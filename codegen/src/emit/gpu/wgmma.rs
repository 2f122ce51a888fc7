//! Products of a warpgroup (`wgmma`, bf16 with f32 accumulators): 64 rows that four warps take together.
//!
//! Accumulators are one value, a structure of f32: register `4 j + q` of a thread is in row `16 · warp + lane / 4 + 8 (q / 2)`,
//! column `8 j + 2 (lane % 4) + q % 2`, as those of `mma.sync` are. Operands lie in shared memory in lines of 128 bytes whose
//! pieces of 16 bytes are permuted (128-byte swizzle), or, the left one, in registers.
//!
//! Products run on their own until a wait. What they read or write in registers has to be there before the fence that precedes
//! them, and may not be read before the wait: [`settled`] says so to LLVM, which sees no more than values.

use crate::emit::func::{Func, Val};

/// Rows of a product.
pub(super) const ROWS: i64 = 64;
/// Bytes of a line of an operand: 64 elements.
pub(super) const LINE: i64 = 128;
/// A matrix descriptor's mode (128-byte swizzle) and distance of groups of 8 lines (1024 bytes).
const DESCRIPTOR: i64 = 1 << 62 | ((8 * LINE) >> 4) << 32;

/// The left operand of a product.
pub(super) enum Left<'a> {
    /// A descriptor, and whether lines lie along the sum.
    Shared(&'a Val, bool),
    /// Pairs of bf16: the layout of accumulators of 16 columns.
    Registers(&'a [Val; 4]),
}

/// Accumulators of 64 rows.
#[derive(Clone)]
pub(super) struct Sums {
    columns: i64,
    /// Their type.
    pub(super) ty: String,
}

impl Sums {
    pub(super) fn new(columns: i64) -> Sums {
        Sums { columns, ty: structure("f32", columns as usize / 2) }
    }

    /// Nothing summed yet.
    pub(super) fn none(&self, f: &mut Func) -> Val {
        f.op(format!("llvm.mlir.zero : {}", self.ty))
    }

    pub(super) fn elements(&self, f: &mut Func, x: &Val) -> Vec<Val> {
        (0..self.columns / 2).map(|i| f.op(format!("llvm.extractvalue {x}[{i}] : {}", self.ty))).collect()
    }

    /// Accumulators of these elements.
    pub(super) fn of(&self, f: &mut Func, list: &[Val]) -> Val {
        let mut x = f.op(format!("llvm.mlir.undef : {}", self.ty));
        for (i, e) in list.iter().enumerate() {
            x = f.op(format!("llvm.insertvalue {e}, {x}[{i}] : {}", self.ty));
        }
        x
    }

    /// [`settled`] accumulators.
    pub(super) fn settled(&self, f: &mut Func, x: &Val) -> Val {
        let list = self.elements(f, x);
        asm(f, "", ("f32", "f"), &list, &[])
    }

    /// Adds a product over 16 steps to accumulators; to nothing if there are none.
    pub(super) fn multiply(&self, f: &mut Func, left: &Left<'_>, right: (&Val, bool), sum: Option<&Val>) -> Val {
        let (n, ty) = (self.columns, &self.ty);
        let begin = sum.cloned().unwrap_or_else(|| f.op(format!("llvm.mlir.undef : {ty}")));
        let layout = |along: bool, yes: &'static str, no: &'static str| if along { yes } else { no };
        let (y, b_along) = right;
        match left {
            Left::Shared(x, along) => f.op(format!(
                "nvvm.wgmma.mma_async {x}, {y}, {begin}, #nvvm.shape<m = 64, n = {n}, k = 16>, D [<f32>, \
                 #nvvm.wgmma_scale_out<{}>], A [<bf16>, #nvvm.wgmma_scale_in<one>, <{}>], B [<bf16>, \
                 #nvvm.wgmma_scale_in<one>, <{}>] : {ty} -> {ty}",
                if sum.is_some() { "one" } else { "zero" },
                layout(*along, "row", "col"),
                layout(b_along, "col", "row"),
            )),
            Left::Registers(a) => {
                // The operator of the dialect has no form for it.
                let r = n / 2;
                let sums = (0..r).map(|i| format!("${i}")).collect::<Vec<_>>().join(", ");
                let first = 2 * r;
                let text = format!(
                    "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{{sums}}}, {{${}, ${}, ${}, ${}}}, ${}, {}, 1, 1, {};",
                    first,
                    first + 1,
                    first + 2,
                    first + 3,
                    first + 4,
                    i32::from(sum.is_some()),
                    i32::from(!b_along)
                );
                let list = self.elements(f, &begin);
                let more: Vec<(&Val, &str, &str)> =
                    a.iter().map(|a| (a, "i32", "r")).chain([(y, "i64", "l")]).collect();
                asm(f, &text, ("f32", "f"), &list, &more)
            }
        }
    }
}

/// A structure of `n` elements.
fn structure(elem: &str, n: usize) -> String {
    format!("!llvm.struct<({})>", vec![elem; n].join(", "))
}

/// An instruction that changes registers of one type (and their constraint) in place, and reads more.
fn asm(f: &mut Func, text: &str, (elem, kind): (&str, &str), list: &[Val], more: &[(&Val, &str, &str)]) -> Val {
    let n = list.len();
    let out = (0..n).map(|_| format!("={kind}"));
    let tied = out.chain((0..n).map(|i| i.to_string())).chain(more.iter().map(|m| m.2.to_string()));
    let tied = tied.collect::<Vec<_>>().join(",");
    let names = list.iter().chain(more.iter().map(|m| m.0)).map(Val::to_string).collect::<Vec<_>>().join(", ");
    let types = list.iter().map(|_| elem).chain(more.iter().map(|m| m.1)).collect::<Vec<_>>().join(", ");
    f.op(format!(
        "llvm.inline_asm has_side_effects asm_dialect = att \"{text}\", \"{tied}\" {names} : ({types}) -> {}",
        structure(elem, n)
    ))
}

/// Registers at this place: nothing that makes them may move behind it, nothing that uses them before it.
pub(super) fn settled(f: &mut Func, list: &[Val], elem: &str, kind: &str) -> Vec<Val> {
    let x = asm(f, "", (elem, kind), list, &[]);
    let ty = structure(elem, list.len());
    (0..list.len()).map(|i| f.op(format!("llvm.extractvalue {x}[{i}] : {ty}"))).collect()
}

/// The descriptor of a matrix at an address of shared memory (i32), whose lines lie along the sum; or across it, in blocks of
/// 64 rows or columns that are so many bytes apart.
pub(super) fn descriptor(f: &mut Func, at: &Val, across: Option<i64>) -> Val {
    let (four, mask) = (f.i32(4, 1), f.i32(0x3fff, 1));
    let low = f.op(format!("arith.shrui {at}, {four} : i32"));
    let low = f.op(format!("arith.andi {low}, {mask} : i32"));
    let low = f.op(format!("arith.extui {low} : i32 to i64"));
    // Along the sum that field is not used.
    let lead = across.map_or(1, |bytes| bytes >> 4);
    let high = f.i64(DESCRIPTOR | lead << 16);
    f.op(format!("arith.ori {low}, {high} : i64"))
}

/// What a descriptor, which counts in 16 bytes, grows by for 16 steps of the sum: within a line, or 16 lines on.
pub(super) fn step(along: bool) -> i64 {
    if along { 2 } else { LINE }
}

/// What products read and write in registers is there.
pub(super) fn fence(f: &mut Func) {
    f.stmt("nvvm.wgmma.fence.aligned");
}

/// The products since the last call are one group.
pub(super) fn commit(f: &mut Func) {
    f.stmt("nvvm.wgmma.commit.group.sync.aligned");
}

/// Waits until at most `under_way` groups run.
pub(super) fn wait(f: &mut Func, under_way: u32) {
    f.stmt(&format!("nvvm.wgmma.wait.group.sync.aligned {under_way}"));
}
