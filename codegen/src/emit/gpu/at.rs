//! Positions as a base and a constant: what neighbouring elements share, and how far they are aligned.
//!
//! An index is `base + off` where the base is a multiple of `mult`. Elements that a thread takes side by side have one base
//! and offsets 0, 1, …; addresses built from them differ by constants, so that loads and stores join into 16 bytes.

use crate::emit::func::{Func, Val};

/// `base + off`, the base a multiple of `mult` (0: of everything, as 0 is).
#[derive(Clone, Debug)]
pub(super) struct At {
    pub(super) base: Val,
    pub(super) off: i64,
    pub(super) mult: i64,
}

pub(super) fn gcd(a: i64, b: i64) -> i64 {
    let (mut a, mut b) = (a.abs(), b.abs());
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

impl At {
    /// A constant.
    pub(super) fn known(f: &mut Func, n: i64) -> At {
        At { base: f.i64(0), off: n, mult: 0 }
    }

    /// A value that is a multiple of `mult`.
    pub(super) fn of(f: &mut Func, v: &Val, mult: i64) -> At {
        match v.known() {
            Some(n) => At::known(f, n),
            None => At { base: v.clone(), off: 0, mult },
        }
    }

    pub(super) fn constant(&self) -> Option<i64> {
        self.base.known().map(|b| b + self.off)
    }

    /// Names the position: equal keys, equal positions.
    pub(super) fn key(&self) -> String {
        format!("{}+{}", self.base, self.off)
    }

    /// The position as one value.
    pub(super) fn val(&self, f: &mut Func) -> Val {
        f.addc(&self.base, self.off)
    }

    pub(super) fn addc(&self, n: i64) -> At {
        At { off: self.off + n, ..self.clone() }
    }

    pub(super) fn add(&self, f: &mut Func, b: &At) -> At {
        At { base: f.add(&self.base, &b.base), off: self.off + b.off, mult: gcd(self.mult, b.mult) }
    }

    /// Times a dimension.
    pub(super) fn mul(&self, f: &mut Func, n: &Val) -> At {
        match n.known() {
            Some(c) => At { base: f.mulc(&self.base, c), off: self.off * c, mult: self.mult * c },
            None => {
                let whole = self.val(f);
                let base = f.mul(&whole, n);
                At::of(f, &base, 1)
            }
        }
    }

    /// Quotient and remainder by a dimension, for a position that is not negative.
    pub(super) fn div_rem(&self, f: &mut Func, n: &Val) -> (At, At) {
        if let Some(c) = n.known() {
            if self.mult % c == 0 && self.off >= 0 {
                let q = f.divc(&self.base, c);
                let quotient = At { off: self.off / c, ..At::of(f, &q, self.mult / c) };
                return (quotient, At::known(f, self.off % c));
            }
            if self.mult > 0 && c % self.mult == 0 && (0..self.mult).contains(&self.off) {
                let (q, r) = (f.divc(&self.base, c), f.remc(&self.base, c));
                let rest = At { off: self.off, ..At::of(f, &r, self.mult) };
                return (At::of(f, &q, 1), rest);
            }
        }
        let whole = self.val(f);
        let (q, r) = (f.div(&whole, n), f.rem(&whole, n));
        (At::of(f, &q, 1), At::of(f, &r, 1))
    }

    /// The position moved into `0..n` by the same distance for all neighbours that share the base, where their number
    /// `together` divides what it has to; else each for itself.
    pub(super) fn clamp(&self, f: &mut Func, n: &Val, together: i64) -> At {
        if let (Some(x), Some(c)) = (self.constant(), n.known()) {
            return At::known(f, x.clamp(0, (c - 1).max(0)));
        }
        let zero = f.i64(0);
        // Offsets of a group of neighbours: `first..first + together`.
        let first = self.off - self.off.rem_euclid(together.max(1));
        let fits = together > 1 && self.mult % together == 0 && n.known().is_some_and(|c| c % together == 0);
        if fits {
            let start = f.addc(&self.base, first);
            let low = f.max(&start, &zero);
            let last = f.addc(n, -together);
            let base = f.min(&low, &last);
            return At { off: self.off - first, ..At::of(f, &base, together) };
        }
        let whole = self.val(f);
        let low = f.max(&whole, &zero);
        let last = f.addc(n, -1);
        let base = f.min(&low, &last);
        At::of(f, &base, 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_keep_one_base() {
        let mut f = Func::new("k", &[("x", "i64")]);
        let x = f.arg("x");
        let at = At::of(&mut f, &x, 8).addc(3);
        let n = f.i64(64);
        let (q, r) = at.div_rem(&mut f, &n);
        assert_eq!((q.off, r.off, r.mult), (0, 3, 8));
        let four = f.i64(4);
        let (q, r) = at.div_rem(&mut f, &four);
        assert_eq!((q.off, q.mult, r.constant()), (0, 2, Some(3)));
        let row = at.mul(&mut f, &n);
        assert_eq!((row.off, row.mult), (192, 512));
        let c = at.addc(-32).clamp(&mut f, &n, 8);
        assert_eq!((c.off, c.mult), (3, 8));
    }
}
