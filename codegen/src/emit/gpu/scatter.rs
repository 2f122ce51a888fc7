//! Scatter on the GPU: writes rows (or columns) of a buffer in place, only where indices point.
//!
//! Where an index repeats, the last one wins (set) or all count in their order (add). So that one thread can own what an
//! index selects, a first launch links equal indices: each knows whether it is the first of its kind and which is the next.
//! The second launch gives every element that a first index selects to a thread, which follows the links. Few indices need no links:
//! every thread looks at all of them. Scatters of one form, side by side, are one launch over a table of buffers ([`super::repeat`]).

use super::at::At;
use super::launch::Unit;
use super::pull::Pull;
use super::repeat::repeated;
use super::{Parts, special};
use crate::emit::attention::view::{operand_index, strip_reshape};
use crate::emit::elementwise;
use crate::emit::func::{Func, Val};
use crate::emit::{dim_expr, unsupported};
use crate::error::CodegenError;
use pleach_ir::{Class, DType, Dim, Kernel, Op, ScatterMode, Sym};
use pleach_plan::Expr;

const THREADS: i64 = 256;
/// Indices that every thread looks at, at most.
const FEW: u64 = 64;

/// Emits a scatter kernel.
pub(super) fn emit(k: &Kernel, symbols: &[Sym]) -> Result<Parts, CodegenError> {
    let (one, copies) = repeated(k).unwrap_or_else(|| (k.clone(), 1));
    let (k, body) = (&one, &one.body);
    let [root] = &body.roots[..] else {
        return Err(unsupported(k, "a scatter kernel has one result"));
    };
    let node = body.node(strip_reshape(body, root.value));
    let (Op::Scatter { axis, mode }, Class::Scatter) = (&node.op, k.class) else {
        return Err(unsupported(k, "the result of a scatter kernel must be the scatter itself"));
    };
    let (axis, dtype) = (usize::from(*axis), node.ty.dtype);
    let target = operand_index(body, strip_reshape(body, node.inputs[0]));
    if target.is_none() || k.aliases.first().copied().flatten().map(|a| a as usize) != target {
        return Err(unsupported(k, "the target of a scatter must be the operand that the result is written over"));
    }
    if *mode == ScatterMode::Add && !matches!(dtype, DType::F32 | DType::I32) {
        return Err(unsupported(k, format!("scatter_add on the GPU takes f32 or i32, not {dtype}")));
    }
    let update = node.inputs[2];
    let shape = body.ty(update).shape.clone();
    let count = shape[axis];
    if count.known().is_some_and(|n| n <= FEW) {
        return few(k, copies, symbols, (axis, *mode));
    }

    let links = dim_expr(k, count, symbols)?.mul(8);
    let unit = |suffix: &str| match (copies, links.known()) {
        (1, _) => Ok(Unit::new(k, suffix, true)),
        (_, Some(bytes)) => Ok(Unit::repeated(k, copies, suffix, Some(bytes))),
        (_, None) => Err(unsupported(k, "scatters of unknown numbers of rows have launches of their own")),
    };
    let mut link = unit("_link")?;
    {
        let f = &mut link.f;
        let mut p = Pull::new(f, k, symbols);
        let j = thread(f);
        let n = p.dim(f, count);
        let inside = f.cmp("slt", &j, &n);
        f.if_(&inside, |f| {
            let own = At::of(f, &j, 1);
            let me = p.eval(f, node.inputs[1], &[own]);
            let (zero, none, yes, no) = (f.i64(0), f.i32(-1, 1), f.i32(1, 1), f.i32(0, 1));
            let init = [(yes, "i32".to_string()), (none.clone(), "i32".to_string())];
            let out = f.for_(&zero, &n, 1, &init, |f, i, now| {
                let at = At::of(f, i, 1);
                let other = p.scope(|p| p.eval(f, node.inputs[1], &[at]));
                let same = f.op(format!("arith.cmpi eq, {me}, {other} : i32"));
                let before = f.cmp("slt", i, &j);
                let after = f.cmp("sgt", i, &j);
                let earlier = f.op(format!("arith.andi {same}, {before} : i1"));
                let first = f.op(format!("arith.select {earlier}, {no}, {} : i32", now[0]));
                let later = f.op(format!("arith.andi {same}, {after} : i1"));
                let unset = f.op(format!("arith.cmpi eq, {}, {none} : i32", now[1]));
                let later = f.op(format!("arith.andi {later}, {unset} : i1"));
                let i = f.op(format!("arith.trunci {i} : i64 to i32"));
                vec![first, f.op(format!("arith.select {later}, {i}, {} : i32", now[1]))]
            });
            let to = f.arg("scratch");
            let at = f.mulc(&j, 2);
            f.store_at(&out[0], &to, &at, "i32", 1);
            let at = f.addc(&at, 1);
            f.store_at(&out[1], &to, &at, "i32", 1);
        });
        p.finish()?;
    }
    let mut write = unit("")?;
    {
        let f = &mut write.f;
        let mut p = Pull::new(f, k, symbols);
        let e = thread(f);
        let total = p.product(f, &shape);
        let inside = f.cmp("slt", &e, &total);
        f.if_(&inside, |f| {
            let at = At::of(f, &e, 1);
            let index = p.index(f, &shape, &at);
            let j = index[axis].val(f);
            let links = f.arg("scratch");
            let here = f.mulc(&j, 2);
            let first = f.load_at(&links, &here, "i32", 1);
            let (yes, none) = (f.i32(1, 1), f.i32(-1, 1));
            let owns = f.op(format!("arith.cmpi eq, {first}, {yes} : i32"));
            f.if_(&owns, |f| {
                p.scope(|p| {
                    let i = p.eval(f, node.inputs[1], &[index[axis].clone()]);
                    let i = f.op(format!("arith.extsi {i} : i32 to i64"));
                    let size = p.dim(f, node.ty.shape[axis]);
                    let to = At::of(f, &i, 1).clamp(f, &size, 1);
                    let mut at = index.clone();
                    at[axis] = to;
                    let (to, align) = p.address(f, k.operands.len(), &node.ty, &at);
                    let ty = elementwise::register_type(dtype, 1);
                    let x = p.scope(|p| p.eval(f, update, &index));
                    let x = match mode {
                        ScatterMode::Set => x,
                        ScatterMode::Add => {
                            let old = elementwise::load_aligned(f, dtype, &to, align);
                            sum(f, dtype, &old, &x)
                        }
                    };
                    let next = f.addc(&here, 1);
                    let next = f.load_at(&links, &next, "i32", 1);
                    let x = follow(f, &next, &none, &x, &ty, |f, j, x| {
                        let j = f.op(format!("arith.extsi {j} : i32 to i64"));
                        let mut index = index.clone();
                        index[axis] = At::of(f, &j, 1);
                        let y = p.scope(|p| p.eval(f, update, &index));
                        let x = match mode {
                            ScatterMode::Set => y,
                            ScatterMode::Add => sum(f, dtype, x, &y),
                        };
                        let at = f.mulc(&j, 2);
                        let at = f.addc(&at, 1);
                        (f.load_at(&links, &at, "i32", 1), x)
                    });
                    elementwise::store_aligned(f, dtype, &x, &to, align);
                });
            });
        });
        p.finish()?;
    }
    let elements = |dims: &[Dim]| -> Result<Expr, CodegenError> {
        dims.iter().try_fold(Expr::Const(1), |e, d| Ok(e.mul(dim_expr(k, *d, symbols)?)))
    };
    let grid = |e: Expr| [e.ceil_div(THREADS as u64), Expr::Const(copies as u64), Expr::Const(1)];
    let (one, first) = link.finish(grid(elements(&[count])?), THREADS as u32, 0, 1);
    let (two, second) = write.finish(grid(elements(&shape)?), THREADS as u32, 0, 1);
    Ok((one + &two, vec![first, second], links.mul(copies as u64)))
}

/// What a scatter that adds makes of two elements.
fn sum(f: &mut Func, dtype: DType, a: &Val, b: &Val) -> Val {
    let add = if dtype == DType::I32 { "arith.addi" } else { "arith.addf" };
    f.op(format!("{add} {a}, {b} : {}", elementwise::register_type(dtype, 1)))
}

/// The kernel as one launch. An index is its own where it is the last of its kind (set) or the first (add), which takes in the others.
fn few(k: &Kernel, copies: usize, symbols: &[Sym], (axis, mode): (usize, ScatterMode)) -> Result<Parts, CodegenError> {
    let body = &k.body;
    let node = body.node(strip_reshape(body, body.roots[0].value));
    let (update, dtype) = (node.inputs[2], node.ty.dtype);
    let shape = body.ty(update).shape.clone();
    let mut unit = if copies > 1 { Unit::repeated(k, copies, "", None) } else { Unit::new(k, "", false) };
    let f = &mut unit.f;
    let mut p = Pull::new(f, k, symbols);
    let e = thread(f);
    let total = p.product(f, &shape);
    let inside = f.cmp("slt", &e, &total);
    f.if_(&inside, |f| {
        let at = At::of(f, &e, 1);
        let index = p.index(f, &shape, &at);
        let j = index[axis].val(f);
        let me = p.eval(f, node.inputs[1], &[index[axis].clone()]);
        let n = p.dim(f, shape[axis]);
        let same = |f: &mut Func, p: &mut Pull<'_>, i: &Val| {
            let at = At::of(f, i, 1);
            let other = p.scope(|p| p.eval(f, node.inputs[1], &[at]));
            f.op(format!("arith.cmpi eq, {me}, {other} : i32"))
        };
        // Another of the kind after it, or before it.
        let zero = f.i64(0);
        let (from, to) = match mode {
            ScatterMode::Set => (f.addc(&j, 1), n.clone()),
            ScatterMode::Add => (zero, j.clone()),
        };
        let (yes, no) = (f.i32(1, 1), f.i32(0, 1));
        let out = f.for_(&from, &to, 1, &[(yes.clone(), "i32".to_string())], |f, i, now| {
            let same = same(f, &mut p, i);
            vec![f.op(format!("arith.select {same}, {no}, {} : i32", now[0]))]
        });
        let owns = f.op(format!("arith.cmpi eq, {}, {yes} : i32", out[0]));
        f.if_(&owns, |f| {
            p.scope(|p| {
                let i = f.op(format!("arith.extsi {me} : i32 to i64"));
                let size = p.dim(f, node.ty.shape[axis]);
                let mut at = index.clone();
                at[axis] = At::of(f, &i, 1).clamp(f, &size, 1);
                let (to, align) = p.address(f, k.operands.len(), &node.ty, &at);
                let x = p.scope(|p| p.eval(f, update, &index));
                let x = match mode {
                    ScatterMode::Set => x,
                    ScatterMode::Add => {
                        let ty = elementwise::register_type(dtype, 1);
                        let old = elementwise::load_aligned(f, dtype, &to, align);
                        let x = sum(f, dtype, &old, &x);
                        let next = f.addc(&j, 1);
                        let all = f.for_(&next, &n, 1, &[(x, ty.clone())], |f, i, now| {
                            let same = same(f, p, i);
                            let mut index = index.clone();
                            index[axis] = At::of(f, i, 1);
                            let sum = f.if_else(
                                &same,
                                std::slice::from_ref(&ty),
                                |f| {
                                    let y = p.scope(|p| p.eval(f, update, &index));
                                    vec![sum(f, dtype, &now[0], &y)]
                                },
                                |_| vec![now[0].clone()],
                            );
                            vec![sum[0].clone()]
                        });
                        all[0].clone()
                    }
                };
                elementwise::store_aligned(f, dtype, &x, &to, align);
            });
        });
    });
    p.finish()?;
    let mut elements = Expr::Const(1);
    for d in &shape {
        elements = elements.mul(dim_expr(k, *d, symbols)?);
    }
    let grid = [elements.ceil_div(THREADS as u64), Expr::Const(copies as u64), Expr::Const(1)];
    let (text, launch) = unit.finish(grid, THREADS as u32, 0, 1);
    Ok((text, vec![launch], Expr::Const(0)))
}

/// The number of a thread in the grid.
fn thread(f: &mut Func) -> Val {
    let (block, lane) = (special(f, "ctaid.x"), special(f, "tid.x"));
    let first = f.mulc(&block, THREADS);
    f.add(&first, &lane)
}

/// `while next != none { (next, x) = step(next, x) }`; returns x.
fn follow(
    f: &mut Func,
    next: &Val,
    none: &Val,
    x: &Val,
    ty: &str,
    step: impl FnOnce(&mut Func, &Val, &Val) -> (Val, Val),
) -> Val {
    let inits = [(next.clone(), "i32".to_string()), (x.clone(), ty.to_string())];
    let out = f.while_(
        &inits,
        |f, now| f.op(format!("arith.cmpi ne, {}, {none} : i32", now[0])),
        |f, now| {
            let (n, x) = step(f, &now[0], &now[1]);
            vec![n, x]
        },
    );
    out[1].clone()
}
