//! Sequences that lie one after another: which one a row belongs to, and which keys it sees.

use super::Config;
use crate::emit::func::{Func, Val};
use crate::emit::gpu::at::At;
use crate::emit::gpu::pull::Pull;
use pleach_ir::ValueId;

/// A sequence.
pub(super) struct Sequence {
    /// First query row, number of queries.
    pub(super) q0: Val,
    pub(super) queries: Val,
    /// First key row, number of keys.
    pub(super) k0: Val,
    pub(super) keys: Val,
}

fn bound(f: &mut Func, p: &mut Pull<'_>, v: ValueId, at: &Val) -> Val {
    let at = At::of(f, at, 1);
    let x = p.scope(|p| p.eval(f, v, &[at]));
    f.op(format!("arith.extsi {x} : i32 to i64"))
}

impl Sequence {
    /// Sequence number `s`.
    pub(super) fn of(f: &mut Func, p: &mut Pull<'_>, c: &Config, s: &Val) -> Sequence {
        let q0 = bound(f, p, c.bounds[0], s);
        let next = f.addc(s, 1);
        let end = bound(f, p, c.bounds[0], &next);
        let queries = f.sub(&end, &q0);
        let k0 = bound(f, p, c.bounds[1], s);
        let keys = bound(f, p, c.bounds[2], s);
        Sequence { q0, queries, k0, keys }
    }

    /// The number of the sequence that a query row belongs to: the last one that starts at or before it.
    pub(super) fn find(f: &mut Func, p: &mut Pull<'_>, c: &Config, row: &Val) -> Val {
        let count = p.k.body.ty(c.bounds[1]).shape[0];
        let count = p.dim(f, count);
        let (zero, one) = (f.i64(0), f.i64(1));
        f.for_(&one, &count, 1, &[(zero, "i64".into())], |f, s, found| {
            let start = bound(f, p, c.bounds[0], s);
            let here = f.cmp("sle", &start, row);
            vec![f.op(format!("arith.select {here}, {s}, {} : i64", found[0]))]
        })
        .remove(0)
    }

    /// First and one past the last number of the sequences that have one of `rows` rows from `block` on, of `all` rows.
    pub(super) fn of_rows(
        f: &mut Func,
        p: &mut Pull<'_>,
        c: &Config,
        (block, rows): (&Val, i64),
        all: &Val,
    ) -> (Val, Val) {
        let (last, end) = (f.addc(block, rows - 1), f.addc(all, -1));
        let last = f.min(&last, &end);
        let (first, last) = (Sequence::find(f, p, c, block), Sequence::find(f, p, c, &last));
        let past = f.addc(&last, 1);
        (first, past)
    }

    /// First and one past the last key that query `i` of the sequence sees.
    pub(super) fn sees(&self, f: &mut Func, c: &Config, i: &Val) -> (Val, Val) {
        let zero = f.i64(0);
        if !c.at.causal {
            return (zero, self.keys.clone());
        }
        let before = f.sub(&self.keys, &self.queries);
        let hi = f.add(&before, i);
        let hi = f.addc(&hi, 1);
        let lo = match c.at.window {
            Some(w) => {
                let x = f.addc(&hi, -i64::from(w));
                f.max(&x, &zero)
            }
            None => zero,
        };
        (lo, hi)
    }

    /// First and one past the last query that sees key `j` of the sequence.
    pub(super) fn seen(&self, f: &mut Func, c: &Config, j: &Val) -> (Val, Val) {
        let zero = f.i64(0);
        if !c.at.causal {
            return (zero, self.queries.clone());
        }
        let before = f.sub(&self.keys, &self.queries);
        let first = f.sub(j, &before);
        let lo = f.max(&first, &zero);
        let hi = match c.at.window {
            Some(w) => {
                let x = f.addc(&first, i64::from(w));
                f.min(&x, &self.queries)
            }
            None => self.queries.clone(),
        };
        (lo, hi)
    }
}
