//! Matrices in blocks of codes as a checkpoint stores them ([`Layout::Blocks`]): what half a block stands for, and rows that indices pick.
//!
//! The kernel reads the rows that are asked for and nothing else, so that a table of embeddings need not be in memory as numbers.

use super::attention::view::{operand_index, strip_reshape};
use super::elementwise::{memory_elem, round_to, store};
use super::func::{Func, Val, vty};
use super::{Emitted, bytes_expr, dim_expr, dim_val, unsupported};
use crate::error::CodegenError;
use crate::mlir::HostTarget;
use pleach_ir::{BlockFormat, DType, Kernel, Layout, Op, Sym};
use pleach_plan::Expr;

/// Values that are decoded at a time.
const LANES: usize = 16;
/// Values of a block.
const VALUES: i64 = BlockFormat::VALUES as i64;
/// Rows of a task.
const ROWS: u64 = 8;

/// A matrix in blocks.
pub(super) struct Matrix {
    base: Val,
    format: BlockFormat,
    /// Bytes of a row.
    pub(super) pitch: i64,
    /// Rows, and elements of a row.
    pub(super) rows: i64,
    pub(super) width: i64,
}

impl Matrix {
    pub(super) fn new(base: Val, format: BlockFormat, [rows, width]: [u64; 2]) -> Matrix {
        let pitch = (width / BlockFormat::VALUES * format.bytes()) as i64;
        Matrix { base, format, pitch, rows: rows as i64, width: width as i64 }
    }

    /// 16 values as f32: half a block. `row`: the row's address; `element`: the first of them, a multiple of 16.
    pub(super) fn half(&self, f: &mut Func, row: &Val, element: &Val) -> Val {
        let lanes = LANES as i64;
        let (block, inside) = (f.divc(element, VALUES), f.remc(element, VALUES));
        let at = f.mulc(&block, self.format.bytes() as i64);
        let block = f.gep(row, &at, "i8");
        let number = |f: &mut Func, i: i64| {
            let i = f.i64(2 * i);
            let p = f.gep(&block, &i, "i8");
            let x = f.op(format!("llvm.load {p} {{alignment = 1 : i64}} : !llvm.ptr -> f16"));
            let x = f.op(format!("arith.extf {x} : f16 to f32"));
            f.splat(&x, "f32", LANES)
        };
        let scale = number(f, 0);
        let minimum = self.format.has_minimum().then(|| number(f, 1));
        let head = f.i64(self.format.head() as i64);
        let codes = f.gep(&block, &head, "i8");
        let codes = if self.format.code_bits() == 4 {
            // Low halves of the bytes are the first 16 values.
            let x = f.load(&codes, "vector<16xi8>");
            let x = f.op(format!("arith.extui {x} : vector<16xi8> to vector<16xi32>"));
            let shift = f.divc(&inside, lanes / 4);
            let shift = f.op(format!("arith.trunci {shift} : i64 to i32"));
            let shift = f.splat(&shift, "i32", LANES);
            let x = f.op(format!("arith.shrui {x}, {shift} : vector<16xi32>"));
            let low = f.i32(15, LANES);
            let x = f.op(format!("arith.andi {x}, {low} : vector<16xi32>"));
            if self.format == BlockFormat::Q4_0 {
                // Before it is multiplied: a zero keeps its sign.
                let eight = f.i32(8, LANES);
                f.op(format!("arith.subi {x}, {eight} : vector<16xi32>"))
            } else {
                x
            }
        } else {
            let x = f.load_at(&codes, &inside, "i8", LANES);
            f.op(format!("arith.extsi {x} : vector<16xi8> to vector<16xi32>"))
        };
        value(f, &codes, &scale, minimum.as_ref())
    }

    /// Address of a row.
    pub(super) fn row(&self, f: &mut Func, r: &Val) -> Val {
        let at = f.mulc(r, self.pitch);
        f.gep(&self.base, &at, "i8")
    }
}

/// What codes (vector of i32) stand for.
pub(super) fn value(f: &mut Func, codes: &Val, scale: &Val, minimum: Option<&Val>) -> Val {
    let x = f.op(format!("arith.sitofp {codes} : vector<16xi32> to {}", vty(LANES, "f32")));
    match minimum {
        Some(m) => f.op(format!("math.fma {x}, {scale}, {m} : {}", vty(LANES, "f32"))),
        None => f.op(format!("arith.mulf {x}, {scale} : {}", vty(LANES, "f32"))),
    }
}

/// Whether a kernel picks rows of blocks.
pub fn picks_rows(k: &Kernel) -> bool {
    k.results == [Layout::RowMajor] && k.operands.iter().any(|l| matches!(l, Layout::Blocks(_)))
}

/// What a kernel picks.
struct Rows {
    /// Operands: the matrix, the indices.
    matrix: usize,
    index: usize,
    format: BlockFormat,
    shape: [u64; 2],
    dtype: DType,
}

impl Rows {
    fn new(k: &Kernel) -> Result<Rows, String> {
        let body = &k.body;
        let [root] = &body.roots[..] else { return Err("rows of blocks are one result".into()) };
        let node = body.node(strip_reshape(body, root.value));
        let (Op::Gather { axis: 0 }, [None]) = (&node.op, &k.aliases[..]) else {
            return Err("of blocks, a row kernel picks rows and does nothing else".into());
        };
        let (Some(matrix), Some(index)) =
            (operand_index(body, node.inputs[0]), operand_index(body, strip_reshape(body, node.inputs[1])))
        else {
            return Err("rows of blocks are picked from an operand by an operand".into());
        };
        let Some(Layout::Blocks(format)) = k.operands.get(matrix) else { return Err("blocks are no indices".into()) };
        let ty = body.ty(node.inputs[0]);
        let shape = ty.shape.iter().map(|d| d.known()).collect::<Option<Vec<_>>>();
        match shape.as_deref() {
            Some([n, width]) if *n > 0 && width.is_multiple_of(BlockFormat::VALUES) => {
                Ok(Rows { matrix, index, format: *format, shape: [*n, *width], dtype: ty.dtype })
            }
            _ => Err("blocks need a static matrix and whole blocks".into()),
        }
    }
}

/// Whether a kernel can be compiled: exactly what [`emit`] accepts.
///
/// # Errors
/// The reason why not.
pub fn supported(k: &Kernel) -> Result<(), String> {
    Rows::new(k).map(|_| ())
}

/// Text of a kernel that picks rows. An index out of range picks the nearest row.
///
/// # Errors
/// [`CodegenError::Unsupported`] with the reason.
pub fn emit(k: &Kernel, symbols: &[Sym], target: &HostTarget) -> Result<Emitted, CodegenError> {
    let rows = Rows::new(k).map_err(|why| unsupported(k, why))?;
    let mut f = Func::host_kernel(&k.name);
    f.round_bf16 = target.bf16;
    f.is_for(k, &[]);
    let m = Matrix::new(f.buffer(rows.matrix), rows.format, rows.shape);
    let (index, result) = (f.buffer(rows.index), f.buffer(k.operands.len()));
    let result_type = k.body.ty(k.body.roots[0].value);
    let index_type = k.body.ty(k.body.inputs()[rows.index].0);
    let mut count = Expr::Const(1);
    let mut n = f.i64(1);
    for d in &index_type.shape {
        count = count.mul(dim_expr(k, *d, symbols)?);
        let d = dim_val(&mut f, k, *d, symbols)?;
        n = f.mul(&n, &d);
    }
    let (first, last) = (f.arg("first"), f.arg("last"));
    let (low, high) = (f.mulc(&first, ROWS as i64), f.mulc(&last, ROWS as i64));
    let high = f.min(&high, &n);
    let (zero, width, end) = (f.i64(0), f.i64(m.width), f.i64(m.rows - 1));
    f.loop_(&low, &high, 1, |f, r| {
        let i = f.load_at(&index, r, "i32", 1);
        let i = f.op(format!("arith.extsi {i} : i32 to i64"));
        let i = f.max(&i, &zero);
        let i = f.min(&i, &end);
        let from = m.row(f, &i);
        let at = f.mulc(r, m.width);
        let to = f.gep(&result, &at, memory_elem(rows.dtype));
        f.loop_(&zero, &width, LANES as i64, |f, e| {
            let x = m.half(f, &from, e);
            let x = round_to(f, rows.dtype, &x, LANES);
            let p = f.gep(&to, e, memory_elem(rows.dtype));
            store(f, rows.dtype, &x, &p, None, LANES);
        });
    });
    let read = count.clone().mul(m.pitch as u64);
    let bytes = read.add(bytes_expr(k, index_type, symbols)?).add(bytes_expr(k, result_type, symbols)?);
    let tasks = count.ceil_div(ROWS);
    Ok(Emitted { text: f.text(), tasks, scratch_bytes: Expr::Const(0), flops: Expr::Const(0), bytes })
}
