//! One instruction's text to its [`Op`]. Every modifier has to be accounted for: one that is left over is an error.

mod alu;
mod memory;
mod tensor;
mod warp;

use crate::SimError;
use crate::isa::{Addr, Op, PSrc, Pred, Reg, Special, Src, Ty};
use crate::parse::{Arg, Names};

/// An opcode's parts and its operands while they are used up.
pub(crate) struct Cx<'a, 'b> {
    op: &'b str,
    parts: Vec<&'b str>,
    args: &'b [Arg<'a>],
    names: &'b Names<'b>,
}

type Res<T> = Result<T, SimError>;

pub(crate) fn decode<'a>(op: &str, args: &[Arg<'a>], names: &Names<'_>) -> Res<Op> {
    let mut parts: Vec<&str> = op.split('.').collect();
    let head = parts.remove(0);
    let mut cx = Cx { op, parts, args, names };
    let out = match head {
        "add" | "sub" | "mul" | "mad" | "fma" | "div" | "rem" | "min" | "max" | "neg" | "abs" | "and" | "or"
        | "xor" | "not" | "cnot" | "shl" | "shr" | "bfe" | "bfi" | "prmt" | "shf" | "lop3" | "popc" | "clz"
        | "brev" | "bfind" | "setp" | "selp" | "cvt" | "mov" | "ex2" | "lg2" | "rcp" | "rsqrt" | "sqrt" | "tanh"
        | "sin" | "cos" | "copysign" | "dp4a" => alu::decode(head, &mut cx)?,
        "ld" | "st" | "atom" | "red" | "cvta" | "prefetch" | "prefetchu" => memory::decode(head, &mut cx)?,
        "cp" => tensor::copy(&mut cx)?,
        "mbarrier" => tensor::mbarrier(&mut cx)?,
        "wgmma" => tensor::wgmma(&mut cx)?,
        "mma" | "ldmatrix" | "stmatrix" => tensor::warp_matrix(head, &mut cx)?,
        _ => warp::decode(head, &mut cx)?,
    };
    match cx.parts.first() {
        None => Ok(out),
        Some(m) => Err(cx.err(format!("modifier `.{m}` of `{op}` is not known"))),
    }
}

impl<'a> Cx<'a, '_> {
    fn err(&self, what: impl AsRef<str>) -> SimError {
        self.names.err(what)
    }

    fn unknown(&self) -> SimError {
        self.err(format!("instruction `{}` is not known", self.op))
    }

    /// Uses up one modifier, wherever it stands.
    fn take(&mut self, m: &str) -> bool {
        match self.parts.iter().position(|p| *p == m) {
            Some(i) => {
                self.parts.remove(i);
                true
            }
            None => false,
        }
    }

    /// Uses up modifiers that have no meaning here.
    fn ignore(&mut self, known: &[&str]) {
        self.parts.retain(|p| !known.contains(p));
    }

    fn choose<T: Copy>(&mut self, table: &[(&str, T)]) -> Option<T> {
        table.iter().find(|(m, _)| self.take(m)).map(|(_, t)| *t)
    }

    /// The last modifier is the type.
    fn ty(&mut self) -> Res<Ty> {
        let last = self.parts.pop().ok_or_else(|| self.unknown())?;
        Ty::parse(last).ok_or_else(|| self.err(format!("type `.{last}` of `{}` is not known", self.op)))
    }

    fn count(&self, n: usize) -> Res<()> {
        self.counts(n, n)
    }

    fn counts(&self, from: usize, to: usize) -> Res<()> {
        if (from..=to).contains(&self.args.len()) {
            return Ok(());
        }
        Err(self.err(format!("`{}` has {} operands", self.op, self.args.len())))
    }

    fn arg(&self, i: usize) -> Res<&Arg<'a>> {
        self.args.get(i).ok_or_else(|| self.err(format!("`{}` lacks an operand", self.op)))
    }

    fn d(&self) -> Res<Reg> {
        self.reg(0)
    }

    fn reg(&self, i: usize) -> Res<Reg> {
        match self.arg(i)? {
            Arg::Name(n) => self.names.reg(n),
            _ => Err(self.err("a register is wanted")),
        }
    }

    fn pred(&self, i: usize) -> Res<Pred> {
        match self.arg(i)? {
            Arg::Name(n) => self.names.pred(n),
            _ => Err(self.err("a predicate is wanted")),
        }
    }

    fn src(&self, i: usize) -> Res<Src> {
        self.names.src(self.arg(i)?)
    }

    fn psrc(&self, i: usize) -> Res<PSrc> {
        self.names.psrc(self.arg(i)?)
    }

    fn addr(&self, i: usize) -> Res<Addr> {
        self.names.addr(self.arg(i)?)
    }

    fn int(&self, i: usize) -> Res<u64> {
        match self.arg(i)? {
            Arg::Int(v) => Ok(*v),
            _ => Err(self.err(format!("`{}` wants a number here", self.op))),
        }
    }

    /// A register list; a single register is a list of one.
    fn srcs(&self, i: usize) -> Res<Box<[Src]>> {
        match self.arg(i)? {
            Arg::List(v) => v.iter().map(|a| self.names.src(a)).collect(),
            a => Ok(Box::new([self.names.src(a)?])),
        }
    }

    fn dst(&self, a: &Arg) -> Res<Option<Reg>> {
        match a {
            Arg::Name("_") => Ok(None),
            Arg::Name(n) => Ok(Some(self.names.reg(n)?)),
            _ => Err(self.err("a register is wanted")),
        }
    }

    /// A list of results, `_` for one that is not wanted.
    fn dsts(&self, i: usize) -> Res<Box<[Option<Reg>]>> {
        match self.arg(i)? {
            Arg::List(v) => v.iter().map(|a| self.dst(a)).collect(),
            a => Ok(Box::new([self.dst(a)?])),
        }
    }

    fn regs(&self, i: usize, n: usize) -> Res<Box<[Reg]>> {
        let all: Option<Box<[Reg]>> = self.dsts(i)?.iter().copied().collect();
        all.filter(|r| r.len() == n).ok_or_else(|| self.err(format!("`{}` wants {n} registers here", self.op)))
    }

    fn srcs_of(&self, i: usize, n: usize) -> Res<Box<[Src]>> {
        let v = self.srcs(i)?;
        if v.len() == n { Ok(v) } else { Err(self.err(format!("`{}` wants {n} registers here", self.op))) }
    }

    /// `%d` or `%d|%p`, each possibly `_`.
    fn pair(&self, i: usize) -> Res<(Option<Reg>, Option<Pred>)> {
        let d = |n: &str| if n == "_" { Ok(None) } else { self.names.reg(n).map(Some) };
        match self.arg(i)? {
            Arg::Name(n) => Ok((d(n)?, None)),
            Arg::Pair(n, p) => Ok((d(n)?, if *p == "_" { None } else { Some(self.names.pred(p)?) })),
            _ => Err(self.err("a register is wanted")),
        }
    }

    fn special(&self, i: usize) -> Res<Option<Special>> {
        use crate::isa::Cmp;
        let Arg::Name(n) = self.arg(i)? else { return Ok(None) };
        let Some(n) = n.strip_prefix('%') else { return Ok(None) };
        let (base, dim) = n.split_once('.').unwrap_or((n, "x"));
        let Some(dim) = ["x", "y", "z"].iter().position(|d| *d == dim) else { return Ok(None) };
        Ok(Some(match base {
            "tid" => Special::Tid(dim),
            "ntid" => Special::Ntid(dim),
            "ctaid" => Special::Ctaid(dim),
            "nctaid" => Special::Nctaid(dim),
            "laneid" => Special::Lane,
            "warpid" => Special::Warp,
            "nwarpid" => Special::Nwarp,
            "lanemask_eq" => Special::LaneMask(Cmp::Eq),
            "lanemask_lt" => Special::LaneMask(Cmp::Lt),
            "lanemask_le" => Special::LaneMask(Cmp::Le),
            "lanemask_gt" => Special::LaneMask(Cmp::Gt),
            "lanemask_ge" => Special::LaneMask(Cmp::Ge),
            "clock" | "clock64" | "globaltimer" => Special::Clock,
            "dynamic_smem_size" => Special::DynSmemSize,
            _ => return Ok(None),
        }))
    }
}
