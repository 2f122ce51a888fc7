//! Blocks of codes rearranged as panels: what `prepare` makes of weights that stay coded ([`Layout::CodedPanels`]).
//!
//! The kernel moves scales, minima and codes; no value is computed, so what the panels stand for is what the blocks stand
//! for, bit for bit. A task makes one panel, column by column: a column of the panel is a row of blocks.

use super::func::{Func, Val};
use super::{Emitted, unsupported};
use crate::error::CodegenError;
use pleach_ir::{BlockFormat, DType, Kernel, Layout, Op};
use pleach_plan::Expr;

/// Steps of the sum that share a scale.
const STEPS: i64 = BlockFormat::VALUES as i64;
/// Columns whose codes lie together.
const LANES: i64 = 16;

/// What a kernel rearranges.
struct Form {
    format: BlockFormat,
    /// Columns of a panel.
    nr: i64,
    /// Blocks of a row.
    blocks: i64,
    /// Rows of each operand, one below the other.
    rows: Vec<i64>,
}

/// Whether a kernel reads or writes codes as they are.
pub fn is_coded(k: &Kernel) -> bool {
    let coded = |l: &Layout| matches!(l, Layout::Blocks(_) | Layout::CodedPanels { .. });
    k.results.iter().any(coded) || k.operands.iter().any(|l| matches!(l, Layout::Blocks(_)))
}

impl Form {
    fn new(k: &Kernel) -> Result<Form, String> {
        let ([Layout::CodedPanels { nr, format }], [root]) = (&k.results[..], &k.body.roots[..]) else {
            return Err("codes are rearranged into one result in coded panels".into());
        };
        if k.operands.iter().any(|l| *l != Layout::Blocks(*format)) {
            return Err("coded panels are made of blocks of their own format".into());
        }
        let body = &k.body;
        let mut v = root.value;
        if let Op::Cast(DType::BF16 | DType::F32) = body.node(v).op {
            v = body.node(v).inputs[0];
        }
        let parts = match body.node(v).op {
            Op::Concat { axis: 0 } => body.node(v).inputs.clone(),
            _ => vec![v],
        };
        let inputs: Vec<_> = body.inputs().iter().map(|x| x.0).collect();
        if parts != inputs || k.aliases.iter().any(Option::is_some) {
            return Err("coded panels are made of whole operands, one below the other".into());
        }
        let shape = body.ty(root.value).shape.iter().map(|d| d.known()).collect::<Option<Vec<_>>>();
        let (Some([_, depth]), 0, true) = (shape.as_deref(), nr % LANES as u32, *nr > 0) else {
            return Err("coded panels need a static matrix, and a multiple of 16 columns each".into());
        };
        if !depth.is_multiple_of(BlockFormat::VALUES) {
            return Err(format!("blocks of {} do not divide {depth} values", BlockFormat::VALUES));
        }
        let rows = parts.iter().filter_map(|p| body.ty(*p).shape[0].known()).map(|n| n as i64).collect();
        Ok(Form { format: *format, nr: i64::from(*nr), blocks: *depth as i64 / STEPS, rows })
    }

    fn block_bytes(&self) -> i64 {
        self.format.bytes() as i64
    }

    fn piece(&self) -> Piece {
        Piece { nr: self.nr, format: self.format }
    }
}

/// Where things lie in a piece of a coded panel: 32 steps of all its columns. Distances in bytes.
#[derive(Clone, Copy)]
pub(super) struct Piece {
    pub(super) nr: i64,
    pub(super) format: BlockFormat,
}

impl Piece {
    pub(super) fn bytes(self) -> i64 {
        self.nr * self.format.bytes() as i64
    }

    /// Where the codes begin; the scales begin at 0.
    pub(super) fn codes(self) -> i64 {
        self.nr * self.format.head() as i64
    }

    /// Where the minima begin.
    pub(super) fn minima(self) -> i64 {
        2 * self.nr
    }

    /// Bytes of the codes of two steps and 16 columns.
    pub(super) fn unit(self) -> i64 {
        LANES * 2 * self.format.code_bits() as i64 / 8
    }

    /// From a pair of steps to the next.
    pub(super) fn pair(self) -> i64 {
        self.nr / LANES * self.unit()
    }
}

/// Whether a kernel can be compiled: exactly what [`emit`] accepts.
///
/// # Errors
/// The reason why not.
pub fn supported(k: &Kernel) -> Result<(), String> {
    Form::new(k).map(|_| ())
}

/// Text of a kernel that rearranges codes.
///
/// # Errors
/// [`CodegenError::Unsupported`] with the reason.
pub fn emit(k: &Kernel) -> Result<Emitted, CodegenError> {
    let form = Form::new(k).map_err(|why| unsupported(k, why))?;
    let mut f = Func::host_kernel(&k.name);
    f.is_for(k, &[]);
    let sources: Vec<Val> = (0..form.rows.len()).map(|i| f.buffer(i)).collect();
    let result = f.buffer(form.rows.len());
    let (first, last) = (f.arg("first"), f.arg("last"));
    let rows: i64 = form.rows.iter().sum();
    f.loop_(&first, &last, 1, |f, panel| {
        let at = f.mulc(panel, form.blocks * form.piece().bytes());
        let panel_at = f.gep(&result, &at, "i8");
        let low = f.mulc(panel, form.nr);
        let (zero, width, all) = (f.i64(0), f.i64(form.nr), f.i64(rows));
        let left = f.sub(&all, &low);
        let real = f.min(&left, &width);
        f.loop_(&zero, &real, 1, |f, c| {
            let row = f.add(&low, c);
            let from = source(f, &form, &sources, &row);
            column(f, &form, Some(&from), &panel_at, c);
        });
        f.loop_(&real, &width, 1, |f, c| column(f, &form, None, &panel_at, c));
    });
    let tasks = Expr::Const((rows as u64).div_ceil(form.nr as u64));
    let bytes = (rows * form.blocks * form.block_bytes()) as u64;
    Ok(Emitted {
        text: f.text(),
        tasks,
        scratch_bytes: Expr::Const(0),
        flops: Expr::Const(0),
        bytes: Expr::Const(2 * bytes),
    })
}

/// Address of a row's blocks among the operands.
fn source(f: &mut Func, form: &Form, sources: &[Val], row: &Val) -> Val {
    let (mut base, mut from) = (sources[0].clone(), f.i64(0));
    let mut start = 0;
    for (s, rows) in sources.iter().zip(&form.rows) {
        if start > 0 {
            let low = f.i64(start);
            let here = f.cmp("sge", row, &low);
            base = f.op(format!("arith.select {here}, {s}, {base} : !llvm.ptr"));
            from = f.op(format!("arith.select {here}, {low}, {from} : i64"));
        }
        start += rows;
    }
    let row = f.sub(row, &from);
    let at = f.mulc(&row, form.blocks * form.block_bytes());
    f.gep(&base, &at, "i8")
}

/// One column of a panel; `None`: zeros.
fn column(f: &mut Func, form: &Form, from: Option<&Val>, panel: &Val, c: &Val) {
    let piece = form.piece();
    let (zero, blocks) = (f.i64(0), f.i64(form.blocks));
    // The column's own place in a unit.
    let (group, lane) = (f.divc(c, LANES), f.remc(c, LANES));
    let group = f.mulc(&group, piece.unit());
    let place = f.add(&group, &lane);
    f.loop_(&zero, &blocks, 1, |f, b| {
        let at = f.mulc(b, piece.bytes());
        let to = f.gep(panel, &at, "i8");
        let block = from.map(|p| {
            let at = f.mulc(b, form.block_bytes());
            f.gep(p, &at, "i8")
        });
        let heads = [Some(0), form.format.has_minimum().then_some(piece.minima())];
        for (i, start) in heads.into_iter().flatten().enumerate() {
            let x = match &block {
                Some(p) => {
                    let i = f.i64(2 * i as i64);
                    let p = f.gep(p, &i, "i8");
                    f.op(format!("llvm.load {p} {{alignment = 1 : i64}} : !llvm.ptr -> i16"))
                }
                None => f.konst("0 : i16"),
            };
            let start = f.i64(start);
            let p = f.gep(&to, &start, "i8");
            let p = f.gep(&p, c, "i16");
            f.store(&x, &p, "i16");
        }
        let start = f.addc(&place, piece.codes());
        let to = f.gep(&to, &start, "i8");
        for pair in 0..STEPS / 2 {
            let unit = f.i64(pair * piece.pair());
            let to = f.gep(&to, &unit, "i8");
            let bytes = match (&block, form.format.code_bits()) {
                (None, _) => vec![f.konst("0 : i8")],
                (Some(p), 4) => vec![two_nibbles(f, form, p, 2 * pair)],
                (Some(p), _) => (0..2).map(|i| byte(f, form, p, 2 * pair + i)).collect(),
            };
            for i in 0..piece.unit() / LANES {
                let at = f.i64(i * LANES);
                let x = bytes.get(i as usize).unwrap_or(&bytes[0]).clone();
                f.store_at(&x, &to, &at, "i8", 1);
            }
        }
    });
}

/// Byte `i` of the codes of a block.
fn byte(f: &mut Func, form: &Form, block: &Val, i: i64) -> Val {
    let at = f.i64(form.format.head() as i64 + i);
    f.load_at(block, &at, "i8", 1)
}

/// The codes of steps `k` and `k + 1` in one byte. In a block, the first 16 steps are the low halves of its bytes.
fn two_nibbles(f: &mut Func, form: &Form, block: &Val, k: i64) -> Val {
    let (low, high) = (f.konst("15 : i8"), f.konst("-16 : i8"));
    let four = f.konst("4 : i8");
    let (a, b) = (byte(f, form, block, k % 16), byte(f, form, block, k % 16 + 1));
    let (a, b) = if k < 16 {
        (f.op(format!("arith.andi {a}, {low} : i8")), f.op(format!("arith.shli {b}, {four} : i8")))
    } else {
        (f.op(format!("arith.shrui {a}, {four} : i8")), f.op(format!("arith.andi {b}, {high} : i8")))
    };
    f.op(format!("arith.ori {a}, {b} : i8"))
}
