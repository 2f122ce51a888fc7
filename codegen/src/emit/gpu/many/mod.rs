//! Many element-wise kernels as one launch, whatever their sizes, such as the steps of all trained tensors.
//!
//! `join` puts them side by side; here they are told apart again ([`pattern`]). The code of each pattern is there once. A block takes a
//! stretch of one part: which one follows from its number, by sizes that the code has as constants, and the addresses are in a table in
//! memory, but for what all parts have in common. Elements are taken 16 bytes at a time, those past the last 16 bytes one by one.

mod pattern;

use super::at::At;
use super::launch::Unit;
use super::pull::Pull;
use super::{Parts, special};
use crate::emit::func::{Func, Val};
use crate::error::CodegenError;
use pattern::{Part, Pattern, patterns};
use pleach_ir::{Kernel, Sym};
use pleach_plan::Expr;

const THREADS: i64 = 256;
/// How often a thread takes elements at most, and blocks that there should be before it takes some a second time.
const TURNS: i64 = 8;
const BLOCKS: u64 = 1024;

/// Emits a kernel that is several flat kernels side by side; `None` for any other.
pub(super) fn emit(k: &Kernel, symbols: &[Sym]) -> Result<Option<Parts>, CodegenError> {
    let Some(list) = patterns(k) else { return Ok(None) };
    let turns = turns(&list);
    let (mut places, mut table) = (vec![], vec![]);
    let mut blocks = 0;
    for p in &list {
        let columns = row(k, p, &p.parts[0]).len();
        places.push(Place { block: blocks, entry: table.len(), columns, turns });
        blocks += p.parts.iter().map(|x| stretches(x.elements, p, turns)).sum::<u64>();
        table.extend(p.parts.iter().flat_map(|x| row(k, p, x)));
    }
    let mut shared: Vec<u32> = list.iter().flat_map(|p| p.shared.iter().flatten().copied()).collect();
    shared.sort_unstable();
    shared.dedup();
    let mut unit = Unit::of_many(k, &shared, table);
    let f = &mut unit.f;
    let (block, lane) = (special(f, "ctaid.x"), special(f, "tid.x"));
    for (p, at) in list.iter().zip(&places) {
        write(f, p, at, [&block, &lane], symbols)?;
    }
    let (text, launch) = unit.finish([blocks, 1, 1].map(Expr::Const), THREADS as u32, 0, 2);
    Ok(Some((text, vec![launch], Expr::Const(0))))
}

/// Of every value of a kernel's body, the one that its code is written for, where the kernel is one of these.
pub(super) fn written(k: &Kernel) -> Option<Vec<u32>> {
    let list = patterns(k)?;
    let mut out: Vec<u32> = (0..k.body.nodes.len() as u32).collect();
    for p in &list {
        for x in &p.parts {
            x.values.iter().zip(&p.parts[0].values).for_each(|(v, first)| out[v.index()] = first.0);
        }
    }
    Some(out)
}

/// Where a pattern begins.
struct Place {
    /// Its first block.
    block: u64,
    /// Its first entry of the table, and entries of a part.
    entry: usize,
    columns: usize,
    turns: i64,
}

/// Elements that a thread takes side by side: 16 bytes of the narrowest type, or of f32 where that is written. Two stores of 16 bytes for 8
/// elements would each fill half a sector of what neighbouring threads write.
fn width(p: &Pattern) -> i64 {
    let narrow = p.one.operand_types().iter().chain(&p.one.result_types()).any(|t| t.rank() > 0 && t.dtype.size() <= 2);
    let wide = p.one.result_types().iter().any(|t| t.rank() > 0 && t.dtype.size() == 4);
    if narrow && !wide { 8 } else { 4 }
}

/// Stretches of a part: one for every block.
fn stretches(elements: u64, p: &Pattern, turns: i64) -> u64 {
    elements.div_ceil((THREADS * width(p) * turns) as u64)
}

/// As many turns as leave enough blocks.
fn turns(list: &[Pattern]) -> i64 {
    let blocks =
        |t: i64| list.iter().flat_map(|p| p.parts.iter().map(move |x| stretches(x.elements, p, t))).sum::<u64>();
    let halves = std::iter::successors(Some(TURNS), |t| Some(t / 2)).take_while(|t| *t > 1);
    halves.into_iter().find(|t| blocks(*t) >= BLOCKS).unwrap_or(1)
}

/// What the table has of a part: operands that are not in common, then results in memory of their own, as buffers of the kernel.
fn row(k: &Kernel, p: &Pattern, x: &Part) -> Vec<u32> {
    let operands = x.operands.iter().zip(&p.shared).filter(|(_, s)| s.is_none()).map(|(o, _)| *o);
    let results = x.results.iter().zip(&p.one.aliases).filter(|(_, over)| over.is_none());
    operands.chain(results.map(|(r, _)| k.operands.len() as u32 + r)).collect()
}

/// Parts of one size.
struct Run {
    /// First block, and first part, counted from those of the pattern.
    block: i64,
    part: i64,
    /// Blocks of a part.
    each: i64,
    elements: i64,
}

/// The parts of a pattern by size.
fn runs(p: &Pattern, turns: i64) -> Vec<Run> {
    let (mut out, mut block, mut part) = (vec![], 0, 0);
    for same in p.parts.chunk_by(|a, b| a.elements == b.elements) {
        let elements = same[0].elements;
        let each = stretches(elements, p, turns) as i64;
        out.push(Run { block, part, each, elements: elements as i64 });
        block += each * same.len() as i64;
        part += same.len() as i64;
    }
    out
}

/// The code of a pattern, for the blocks that are its own.
fn write(f: &mut Func, p: &Pattern, at: &Place, [block, lane]: [&Val; 2], symbols: &[Sym]) -> Result<(), CodegenError> {
    let runs = runs(p, at.turns);
    let count: u64 = p.parts.iter().map(|x| stretches(x.elements, p, at.turns)).sum();
    let block = f.addc(block, -(at.block as i64));
    let end = f.i64(count as i64);
    // Blocks before the first one have large numbers.
    let own = f.cmp("ult", &block, &end);
    let mut done = Ok(());
    f.if_(&own, |f| done = body(f, p, at, &runs, [&block, lane], symbols));
    done
}

/// One of two numbers.
fn either(f: &mut Func, which: &Val, a: &Val, b: &Val) -> Val {
    if a == b { a.clone() } else { f.op(format!("arith.select {which}, {a}, {b} : i64")) }
}

fn body(
    f: &mut Func,
    p: &Pattern,
    at: &Place,
    runs: &[Run],
    [block, lane]: [&Val; 2],
    symbols: &[Sym],
) -> Result<(), CodegenError> {
    let v = width(p);
    let whole = |n: i64| n / v * v;
    let numbers = |f: &mut Func, r: &Run| [r.block, r.part, r.each, r.elements, whole(r.elements)].map(|n| f.i64(n));
    let mut now = numbers(f, &runs[0]);
    for r in &runs[1..] {
        let first = f.i64(r.block);
        let reached = f.cmp("sge", block, &first);
        let next = numbers(f, r);
        now = [0, 1, 2, 3, 4].map(|i| either(f, &reached, &next[i], &now[i]));
    }
    let [first, part, each, elements, whole] = now;
    let inside = f.sub(block, &first);
    // Numbers of blocks fit into 32 bits, of which a division takes a third of the time.
    let [a, b] = [&inside, &each].map(|x| f.op(format!("arith.trunci {x} : i64 to i32")));
    let q = f.op(format!("arith.divui {a}, {b} : i32"));
    let q = f.op(format!("arith.extui {q} : i32 to i64"));
    let skipped = f.mul(&q, &each);
    let stretch = f.sub(&inside, &skipped);
    let part = f.add(&part, &q);
    addresses(f, p, at, &part);

    f.is_for(&p.one, &[]);
    f.instead_of(&p.parts[0].values);
    let mut pull = Pull::new(f, &p.one, symbols);
    let length = THREADS * v * at.turns;
    let from = f.mulc(&stretch, length);
    let end = f.addc(&from, length);
    let stop = f.min(&end, &whole);
    let own = f.mulc(lane, v);
    let own = f.add(&from, &own);
    let results = p.one.results.len();
    let stores = |f: &mut Func, pull: &mut Pull<'_>, at: &Val, v: i64| {
        pull.together = v;
        pull.scope(|pull| {
            let places =
                |i: usize, f: &mut Func| (0..v).map(|j| (i, vec![At::of(f, at, v).addc(j)])).collect::<Vec<_>>();
            let all: Vec<_> = (0..results).flat_map(|i| places(i, f)).collect();
            pull.store(f, &all);
        });
    };
    f.loop_(&own, &stop, THREADS * v, |f, at| stores(f, &mut pull, at, v));
    if runs.iter().any(|r| r.elements % v != 0) {
        pull.apart();
        let at = f.add(&whole, lane);
        let exists = f.cmp("slt", &at, &elements);
        let last = f.cmp("sge", &end, &elements);
        let some = f.op(format!("arith.andi {exists}, {last} : i1"));
        f.if_(&some, |f| stores(f, &mut pull, &at, 1));
    }
    f.instead_of(&[]);
    pull.finish()
}

/// Names the buffers of a part as those of the pattern.
fn addresses(f: &mut Func, p: &Pattern, at: &Place, part: &Val) {
    let first = f.mulc(part, at.columns as i64);
    let mut next = f.addc(&first, at.entry as i64);
    let operands = p.one.operands.len();
    let global =
        |f: &mut Func, generic: &Val| f.op(format!("llvm.addrspacecast {generic} : !llvm.ptr to !llvm.ptr<1>"));
    let mut found: Vec<Val> = vec![];
    let over = p.one.aliases.iter().map(|a| a.map(|a| a as usize));
    let places = p.shared.iter().map(|s| (*s, None)).chain(over.map(|o| (None, o)));
    for (i, (shared, over)) in places.enumerate() {
        let here = match (shared, over) {
            (Some(n), _) => {
                let arg = f.arg(&format!("s{n}"));
                global(f, &arg)
            }
            (_, Some(o)) => found[o].clone(),
            (None, None) => {
                let table = f.arg("table");
                let entry = f.gep(&table, &next, "i64");
                next = f.addc(&next, 1);
                let x = f.op(format!("llvm.load {entry} : !llvm.ptr -> !llvm.ptr"));
                // Said to be global, so that accesses need not find out.
                global(f, &x)
            }
        };
        f.name(&format!("p{i}"), &format!("llvm.addrspacecast {here} : !llvm.ptr<1> to !llvm.ptr"));
        if i < operands {
            found.push(here);
        }
    }
}
