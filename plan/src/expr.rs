//! Size and count expressions over the symbols of a plan.
//!
//! Every operator is monotone: a larger symbol never gives a smaller value. So what is planned at capacity holds for any
//! smaller counts. Evaluation is checked; recursion is bounded by [`MAX_DEPTH`].

use serde::{Deserialize, Serialize};
use std::fmt;

/// Deepest nesting of an expression that has a value.
pub const MAX_DEPTH: usize = 24;

/// A value in `u64` computed from symbols.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Expr {
    /// A number.
    Const(u64),
    /// The symbol of that index in [`crate::Plan::symbols`].
    Sym(u32),
    /// Sum; empty is 0.
    Add(Vec<Expr>),
    /// Product; empty is 1.
    Mul(Vec<Expr>),
    /// Quotient rounded up.
    CeilDiv(Box<Expr>, u64),
    /// Smallest; at least one operand.
    Min(Vec<Expr>),
    /// Largest; at least one operand.
    Max(Vec<Expr>),
}

/// Why an expression has no value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExprError {
    /// The value does not fit.
    #[error("a size exceeds 64 bits; lower the capacities")]
    Overflow,
    /// No value was given for this symbol.
    #[error("symbol number {0} has no value")]
    NoSymbol(u32),
    /// Division by zero or an empty minimum or maximum.
    #[error("an expression has no value (division by zero, or the minimum of nothing)")]
    Undefined,
    /// Nested deeper than [`MAX_DEPTH`].
    #[error("an expression is nested deeper than {MAX_DEPTH}")]
    Deep,
}

impl Expr {
    /// The value where `env[i]` is the value of symbol `i`.
    ///
    /// # Errors
    /// [`ExprError`] for an unknown symbol, a value past `u64`, division by zero or excessive nesting.
    pub fn eval(&self, env: &[u64]) -> Result<u64, ExprError> {
        self.eval_at(env, 0)
    }

    fn eval_at(&self, env: &[u64], depth: usize) -> Result<u64, ExprError> {
        if depth > MAX_DEPTH {
            return Err(ExprError::Deep);
        }
        let sub = |e: &Expr| e.eval_at(env, depth + 1);
        match self {
            Expr::Const(n) => Ok(*n),
            Expr::Sym(i) => env.get(*i as usize).copied().ok_or(ExprError::NoSymbol(*i)),
            Expr::Add(v) => v.iter().try_fold(0u64, |a, e| a.checked_add(sub(e)?).ok_or(ExprError::Overflow)),
            Expr::Mul(v) => v.iter().try_fold(1u64, |a, e| a.checked_mul(sub(e)?).ok_or(ExprError::Overflow)),
            Expr::CeilDiv(e, n) => {
                let x = sub(e)?;
                if *n == 0 { Err(ExprError::Undefined) } else { Ok(x.div_ceil(*n)) }
            }
            Expr::Min(v) | Expr::Max(v) => {
                let mut best = None;
                for e in v {
                    let x = sub(e)?;
                    best = Some(match best {
                        None => x,
                        Some(b) if matches!(self, Expr::Min(_)) => x.min(b),
                        Some(b) => x.max(b),
                    });
                }
                best.ok_or(ExprError::Undefined)
            }
        }
    }

    /// The number, for a constant.
    pub fn known(&self) -> Option<u64> {
        if let Expr::Const(n) = self { Some(*n) } else { None }
    }

    /// Sum; constants are folded, nested sums flattened.
    #[allow(clippy::should_implement_trait, reason = "a constructor, not an operator on values")]
    pub fn add(self, other: impl Into<Expr>) -> Expr {
        let (mut v, mut c) = (vec![], Some(0u64));
        for e in [self, other.into()] {
            for t in if let Expr::Add(t) = e { t } else { vec![e] } {
                match t.known().and_then(|n| c?.checked_add(n)) {
                    Some(n) => c = Some(n),
                    None => v.push(t),
                }
            }
        }
        finish(v, c, 0, Expr::Add)
    }

    /// Product; constants are folded, nested products flattened.
    #[allow(clippy::should_implement_trait, reason = "a constructor, not an operator on values")]
    pub fn mul(self, other: impl Into<Expr>) -> Expr {
        let (mut v, mut c) = (vec![], Some(1u64));
        for e in [self, other.into()] {
            for t in if let Expr::Mul(t) = e { t } else { vec![e] } {
                match t.known().and_then(|n| c?.checked_mul(n)) {
                    Some(n) => c = Some(n),
                    None => v.push(t),
                }
            }
        }
        if c == Some(0) { Expr::Const(0) } else { finish(v, c, 1, Expr::Mul) }
    }

    /// Product of any number of factors.
    pub fn product<E: Into<Expr>>(factors: impl IntoIterator<Item = E>) -> Expr {
        factors.into_iter().fold(Expr::Const(1), |a, e| a.mul(e))
    }

    /// Quotient by `n > 0`, rounded up.
    pub fn ceil_div(self, n: u64) -> Expr {
        match self {
            Expr::Const(x) if n > 0 => Expr::Const(x.div_ceil(n)),
            e if n == 1 => e,
            e => Expr::CeilDiv(Box::new(e), n),
        }
    }

    /// The smaller of two.
    pub fn min(self, other: impl Into<Expr>) -> Expr {
        match (self, other.into()) {
            (Expr::Const(a), Expr::Const(b)) => Expr::Const(a.min(b)),
            (a, b) if a == b => a,
            (a, b) => Expr::Min(vec![a, b]),
        }
    }

    /// The larger of two.
    pub fn max(self, other: impl Into<Expr>) -> Expr {
        match (self, other.into()) {
            (Expr::Const(a), Expr::Const(b)) => Expr::Const(a.max(b)),
            (a, b) if a == b => a,
            (a, b) => Expr::Max(vec![a, b]),
        }
    }

    /// The symbols that occur, sorted, each once. Expressions past [`MAX_DEPTH`] are cut off there.
    pub fn symbols(&self) -> Vec<u32> {
        fn walk(e: &Expr, depth: usize, out: &mut Vec<u32>) {
            match e {
                _ if depth > MAX_DEPTH => {}
                Expr::Const(_) => {}
                Expr::Sym(i) => out.push(*i),
                Expr::Add(v) | Expr::Mul(v) | Expr::Min(v) | Expr::Max(v) => {
                    v.iter().for_each(|e| walk(e, depth + 1, out));
                }
                Expr::CeilDiv(e, _) => walk(e, depth + 1, out),
            }
        }
        let mut out = vec![];
        walk(self, 0, &mut out);
        out.sort_unstable();
        out.dedup();
        out
    }

    /// For people: `T*576*4`, with the symbols' names.
    pub fn display<'a>(&'a self, names: &'a [crate::Symbol]) -> impl fmt::Display + 'a {
        Shown { e: self, names, depth: 0 }
    }
}

fn finish(mut v: Vec<Expr>, c: Option<u64>, unit: u64, make: fn(Vec<Expr>) -> Expr) -> Expr {
    match c {
        Some(n) if v.is_empty() => return Expr::Const(n),
        Some(n) if n != unit => v.push(Expr::Const(n)),
        _ => {}
    }
    if v.len() == 1 { v.remove(0) } else { make(v) }
}

struct Shown<'a> {
    e: &'a Expr,
    names: &'a [crate::Symbol],
    depth: usize,
}

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.depth > MAX_DEPTH {
            return f.write_str("…");
        }
        let list = |f: &mut fmt::Formatter<'_>, v: &[Expr], open: &str, sep: &str| {
            f.write_str(open)?;
            for (i, e) in v.iter().enumerate() {
                f.write_str(if i > 0 { sep } else { "" })?;
                Shown { e, names: self.names, depth: self.depth + 1 }.fmt(f)?;
            }
            f.write_str(if open.is_empty() { "" } else { ")" })
        };
        match self.e {
            Expr::Const(n) => write!(f, "{n}"),
            Expr::Sym(i) => match self.names.get(*i as usize) {
                Some(s) => f.write_str(&s.name),
                None => write!(f, "?{i}"),
            },
            Expr::Add(v) => list(f, v, if self.depth > 0 { "(" } else { "" }, " + "),
            Expr::Mul(v) => list(f, v, "", "*"),
            Expr::CeilDiv(e, n) => {
                f.write_str("ceil(")?;
                Shown { e, names: self.names, depth: self.depth + 1 }.fmt(f)?;
                write!(f, " / {n})")
            }
            Expr::Min(v) => list(f, v, "min(", ", "),
            Expr::Max(v) => list(f, v, "max(", ", "),
        }
    }
}

impl From<u64> for Expr {
    fn from(n: u64) -> Expr {
        Expr::Const(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Symbol;

    #[test]
    fn evaluates_and_folds() {
        let e = Expr::Sym(0).mul(576).mul(4).add(64);
        assert_eq!(e, Expr::Add(vec![Expr::Mul(vec![Expr::Sym(0), Expr::Const(2304)]), Expr::Const(64)]));
        assert_eq!(e.eval(&[3]), Ok(3 * 576 * 4 + 64));
        assert_eq!(Expr::Sym(0).ceil_div(16).max(1).eval(&[33]), Ok(3));
        assert_eq!(Expr::Sym(0).min(7).eval(&[33]), Ok(7));
        assert_eq!(Expr::product([2u64, 3, 4]), Expr::Const(24));
        assert_eq!(Expr::Sym(0).mul(0), Expr::Const(0));
        assert_eq!(Expr::Sym(0).mul(1), Expr::Sym(0));
        assert_eq!(Expr::Const(0).add(Expr::Sym(1)), Expr::Sym(1));
    }

    #[test]
    fn has_no_value_where_it_must_not() {
        assert_eq!(Expr::Sym(0).mul(3).eval(&[u64::MAX / 2]), Err(ExprError::Overflow));
        assert_eq!(Expr::Sym(0).add(1).eval(&[u64::MAX]), Err(ExprError::Overflow));
        assert_eq!(Expr::Sym(2).eval(&[1, 2]), Err(ExprError::NoSymbol(2)));
        assert_eq!(Expr::CeilDiv(Box::new(Expr::Const(1)), 0).eval(&[]), Err(ExprError::Undefined));
        assert_eq!(Expr::Min(vec![]).eval(&[]), Err(ExprError::Undefined));
        let deep = (0..100).fold(Expr::Sym(0), |e, _| Expr::CeilDiv(Box::new(e), 2));
        assert_eq!(deep.eval(&[5]), Err(ExprError::Deep));
    }

    #[test]
    fn prints_for_people() {
        let names = Symbol::list(["T", "S"]);
        let e = Expr::Sym(0).add(Expr::Sym(1)).ceil_div(8).mul(4);
        assert_eq!(e.display(&names).to_string(), "ceil((T + S) / 8)*4");
        assert_eq!(Expr::Sym(0).mul(576).display(&names).to_string(), "T*576");
    }
}
