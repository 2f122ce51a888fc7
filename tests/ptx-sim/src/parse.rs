//! PTX text to kernels: directives, declarations, scopes and labels. Single instructions are decoded in [`crate::decode`].
//!
//! Names are resolved here, once: registers to numbers, shared and local variables and parameters to addresses, labels to
//! positions. What is not known is an error with its line, never skipped.

use crate::decode;
use crate::isa::{Addr, Inst, Op, PSrc, Pred, Reg, Src};
use crate::lex::{Token, error, tokens};
use crate::{Kernel, LOCAL_BASE, Module, PARAM_BASE, ParamDecl, SHARED_BASE, SimError};
use std::collections::HashMap;

/// One operand as written.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Arg<'a> {
    Name(&'a str),
    /// `!%p`
    Not(&'a str),
    Int(u64),
    List(Vec<Arg<'a>>),
    /// `%a|%b`
    Pair(&'a str, &'a str),
    /// `[base + offset, {coordinates}]`
    Mem {
        base: Box<Arg<'a>>,
        offset: i64,
        at: Vec<Arg<'a>>,
    },
}

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Symbol {
    Data(Reg),
    Pred(Pred),
    Address(u64),
}

#[derive(Default)]
struct Scope {
    parent: Option<usize>,
    names: HashMap<String, Symbol>,
    labels: HashMap<String, u32>,
    tables: HashMap<String, Vec<String>>,
}

/// A shared variable of the module: name, alignment, bytes (none: dynamic).
type SharedVar = (String, u64, Option<u64>);

pub(crate) fn parse(text: &str) -> Result<Module, SimError> {
    let toks = tokens(text)?;
    let mut p = Parser { toks: &toks, at: 0 };
    let mut module = Module { target: String::new(), kernels: vec![] };
    let mut shared: Vec<SharedVar> = vec![];
    while let Some(t) = p.peek() {
        match t.text {
            ".version" => {
                p.next()?;
                p.next()?;
            }
            ".target" => {
                p.next()?;
                module.target = p.next()?.text.to_string();
                while p.take(",") {
                    p.next()?;
                }
            }
            ".address_size" => {
                p.next()?;
                let n = p.next()?;
                if n.text != "64" {
                    return Err(error(n.line, "only 64-bit addresses are known"));
                }
            }
            ".extern" | ".shared" | ".visible" | ".weak" => {
                p.next()?;
                let next = p.peek().map_or("", |t| t.text);
                match (t.text, next) {
                    (".extern", ".shared") | (".visible", ".shared") => {
                        p.next()?;
                        shared.push(p.variable()?);
                    }
                    (".shared", _) => shared.push(p.variable()?),
                    (".visible" | ".weak", ".entry") => {
                        p.next()?;
                        module.kernels.push(p.entry(&module.target, &shared)?);
                    }
                    _ => return Err(error(t.line, &format!("`{} {next}` is not known", t.text))),
                }
            }
            ".entry" => {
                p.next()?;
                module.kernels.push(p.entry(&module.target, &shared)?);
            }
            other => return Err(error(t.line, &format!("`{other}` is not known here"))),
        }
    }
    Ok(module)
}

struct Parser<'a, 'b> {
    toks: &'b [Token<'a>],
    at: usize,
}

impl<'a> Parser<'a, '_> {
    fn peek(&self) -> Option<Token<'a>> {
        self.toks.get(self.at).copied()
    }

    fn line(&self) -> u32 {
        self.toks.get(self.at).or(self.toks.last()).map_or(0, |t| t.line)
    }

    fn next(&mut self) -> Result<Token<'a>, SimError> {
        let t = self.peek().ok_or_else(|| error(self.line(), "the text ends in the middle of a statement"))?;
        self.at += 1;
        Ok(t)
    }

    fn take(&mut self, s: &str) -> bool {
        let found = self.peek().is_some_and(|t| t.text == s);
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, s: &str) -> Result<(), SimError> {
        let t = self.next()?;
        if t.text == s { Ok(()) } else { Err(error(t.line, &format!("expected `{s}`, found `{}`", t.text))) }
    }

    fn number(&mut self) -> Result<u64, SimError> {
        let t = self.next()?;
        int(t.text).ok_or_else(|| error(t.line, &format!("expected a number, found `{}`", t.text)))
    }

    /// `.align 16 .b8 name[128];` after `.shared` or `.local`
    fn variable(&mut self) -> Result<SharedVar, SimError> {
        let (mut align, mut elem) = (None, None);
        loop {
            let t = self.next()?;
            if t.text == ".align" {
                align = Some(self.number()?);
            } else if let Some(ty) = t.text.strip_prefix('.') {
                let ty =
                    crate::isa::Ty::parse(ty).ok_or_else(|| error(t.line, &format!("type `.{ty}` is not known")))?;
                elem = Some(u64::from(ty.bits() / 8));
            } else {
                let elem = elem.ok_or_else(|| error(t.line, "a variable without a type"))?;
                let mut bytes = Some(elem);
                while self.take("[") {
                    if self.take("]") {
                        bytes = None;
                        continue;
                    }
                    let n = self.number()?;
                    bytes = bytes.map(|b| b * n);
                    self.expect("]")?;
                }
                self.expect(";")?;
                return Ok((t.text.to_string(), align.unwrap_or(elem), bytes));
            }
        }
    }

    fn entry(&mut self, target: &str, shared: &[SharedVar]) -> Result<Kernel, SimError> {
        let name = self.next()?;
        let mut f = Func { scopes: vec![Scope::default()], ..Func::new(name.text, target) };
        if self.take("(") {
            while !self.take(")") {
                self.param(&mut f)?;
                self.take(",");
            }
        }
        while !self.take("{") {
            let t = self.next()?;
            match t.text {
                ".maxntid" | ".reqntid" => {
                    let mut v = [1; 3];
                    for (i, slot) in v.iter_mut().enumerate() {
                        if i == 0 || self.take(",") {
                            *slot = self.number()? as u32;
                        }
                    }
                    if t.text == ".maxntid" {
                        f.k.max_threads = Some(v);
                    } else {
                        f.k.required_threads = Some(v);
                    }
                }
                ".minnctapersm" => f.k.blocks_at_once = self.number()? as u32,
                ".maxnreg" => f.k.max_registers = Some(self.number()? as u32),
                ".maxnctapersm" => {
                    self.number()?;
                }
                ".noreturn" => {}
                other => return Err(error(t.line, &format!("directive `{other}` is not known"))),
            }
        }
        let mut dynamic = None;
        for (name, align, bytes) in shared {
            match bytes {
                Some(n) => f.shared(name, *align, *n),
                None => dynamic = Some((name, *align)),
            }
        }
        self.body(&mut f)?;
        if let Some((name, align)) = dynamic {
            f.k.dynamic_align = align;
            let base = f.k.shared_top.next_multiple_of(align);
            f.scopes[0].names.insert(name.clone(), Symbol::Address(base));
            f.k.dynamic_base = base;
        } else {
            f.k.dynamic_base = f.k.shared_top;
        }
        f.finish()
    }

    fn param(&mut self, f: &mut Func<'a>) -> Result<(), SimError> {
        self.expect(".param")?;
        let (mut align, mut size) = (None, None);
        loop {
            let t = self.next()?;
            match t.text {
                ".align" => align = Some(self.number()?),
                ".ptr" => {
                    // `.ptr .global .align 1` describes what the pointer points to.
                    while self.peek().is_some_and(|t| t.text.starts_with('.')) {
                        if self.next()?.text == ".align" {
                            self.number()?;
                        }
                    }
                }
                s if s.starts_with('.') => {
                    let ty = crate::isa::Ty::parse(&s[1..]);
                    let ty = ty.ok_or_else(|| error(t.line, &format!("type `{s}` is not known")))?;
                    size = Some(u64::from(ty.bits() / 8));
                }
                name => {
                    let elem = size.ok_or_else(|| error(t.line, "a parameter without a type"))?;
                    let mut bytes = elem;
                    if self.take("[") {
                        bytes *= self.number()?;
                        self.expect("]")?;
                    }
                    let align = align.unwrap_or(elem).max(1);
                    let offset = f.k.param_bytes.next_multiple_of(align);
                    f.k.param_bytes = offset + bytes;
                    f.k.params.push(ParamDecl { name: name.to_string(), offset, bytes });
                    f.scopes[0].names.insert(name.to_string(), Symbol::Address(PARAM_BASE + offset));
                    return Ok(());
                }
            }
        }
    }

    fn body(&mut self, f: &mut Func<'a>) -> Result<(), SimError> {
        loop {
            let t = self.next()?;
            match t.text {
                "{" => {
                    f.scopes.push(Scope { parent: Some(f.scope), ..Scope::default() });
                    f.scope = f.scopes.len() - 1;
                }
                "}" => match f.scopes[f.scope].parent {
                    Some(p) => f.scope = p,
                    None => return Ok(()),
                },
                ";" => {}
                ".reg" => self.registers(f)?,
                ".shared" => {
                    let (name, align, bytes) = self.variable()?;
                    let n = bytes.ok_or_else(|| error(t.line, "a shared variable in a kernel needs a size"))?;
                    f.shared(&name, align, n);
                }
                ".local" => {
                    let (name, align, bytes) = self.variable()?;
                    let n = bytes.ok_or_else(|| error(t.line, "a local variable needs a size"))?;
                    let at = f.k.local_bytes.next_multiple_of(align);
                    f.k.local_bytes = at + n;
                    f.declare(&name, Symbol::Address(LOCAL_BASE + at));
                }
                ".pragma" => while self.next()?.text != ";" {},
                s if s.starts_with('.') => return Err(error(t.line, &format!("directive `{s}` is not known"))),
                s if self.peek().is_some_and(|n| n.text == ":") => {
                    self.next()?;
                    if self.take(".branchtargets") {
                        let mut names = vec![];
                        while !self.take(";") {
                            names.push(self.next()?.text.to_string());
                            self.take(",");
                        }
                        f.scopes[f.scope].tables.insert(s.to_string(), names);
                    } else {
                        let pc = f.raw.len() as u32;
                        if f.scopes[f.scope].labels.insert(s.to_string(), pc).is_some() {
                            return Err(error(t.line, &format!("label `{s}` stands twice in one scope")));
                        }
                    }
                }
                _ => {
                    self.at -= 1;
                    self.instruction(f)?;
                }
            }
        }
    }

    fn registers(&mut self, f: &mut Func<'a>) -> Result<(), SimError> {
        let ty = self.next()?;
        let pred = ty.text == ".pred";
        let bits = crate::isa::Ty::parse(&ty.text[1..]).map_or(0, |t| t.bits());
        if !pred && !(8..=64).contains(&bits) {
            return Err(error(ty.line, &format!("register type `{}` is not known", ty.text)));
        }
        while !self.take(";") {
            let name = self.next()?.text;
            let count = if self.take("<") {
                let n = self.number()?;
                self.expect(">")?;
                Some(n)
            } else {
                None
            };
            let names: Vec<String> = match count {
                Some(n) => (0..n).map(|i| format!("{name}{i}")).collect(),
                None => vec![name.to_string()],
            };
            for n in names {
                let s = if pred { Symbol::Pred(f.k.preds) } else { Symbol::Data(f.k.regs) };
                if pred {
                    f.k.preds += 1
                } else {
                    f.k.regs += 1
                }
                f.declare(&n, s);
            }
            self.take(",");
        }
        Ok(())
    }

    fn instruction(&mut self, f: &mut Func<'a>) -> Result<(), SimError> {
        let line = self.line();
        let mut guard = None;
        if self.take("@") {
            let not = self.take("!");
            guard = Some((self.next()?.text, not));
        }
        let op = self.next()?.text;
        let mut args = vec![];
        while !self.take(";") {
            args.push(self.arg()?);
            if !self.take(",") && self.peek().is_none_or(|t| t.text != ";") {
                let t = self.next()?;
                return Err(error(t.line, &format!("expected `,` or `;`, found `{}`", t.text)));
            }
        }
        f.raw.push(Raw { line, guard, op, args, scope: f.scope });
        Ok(())
    }

    fn arg(&mut self) -> Result<Arg<'a>, SimError> {
        let t = self.next()?;
        match t.text {
            "{" => {
                let mut v = vec![];
                while !self.take("}") {
                    v.push(self.arg()?);
                    self.take(",");
                }
                Ok(Arg::List(v))
            }
            "[" => {
                let base = self.arg()?;
                let (mut offset, mut at) = (0i64, vec![]);
                if self.take("+") {
                    let neg = self.take("-");
                    let n = self.number()? as i64;
                    offset = if neg { -n } else { n };
                } else if self.take("-") {
                    offset = -(self.number()? as i64);
                }
                if self.take(",") {
                    match self.arg()? {
                        Arg::List(v) => at = v,
                        one => at = vec![one],
                    }
                }
                self.expect("]")?;
                Ok(Arg::Mem { base: Box::new(base), offset, at })
            }
            "!" => Ok(Arg::Not(self.next()?.text)),
            "-" => Ok(Arg::Int(self.number()?.wrapping_neg())),
            s if s.starts_with(|c: char| c.is_ascii_digit()) => {
                let v = int(s).or_else(|| float(s));
                Ok(Arg::Int(v.ok_or_else(|| error(t.line, &format!("`{s}` is no number")))?))
            }
            s if s.starts_with(|c: char| c.is_alphabetic() || "_$%".contains(c)) => {
                if self.take("|") {
                    return Ok(Arg::Pair(s, self.next()?.text));
                }
                Ok(Arg::Name(s))
            }
            s => Err(error(t.line, &format!("`{s}` is no operand"))),
        }
    }
}

/// Decimal or hexadecimal.
fn int(s: &str) -> Option<u64> {
    let s = s.strip_suffix('U').unwrap_or(s);
    match s.strip_prefix("0x").or(s.strip_prefix("0X")) {
        Some(h) => u64::from_str_radix(h, 16).ok(),
        None => s.parse().ok(),
    }
}

/// `0f3F800000` and `0d3FF0000000000000`: the bits of a float.
fn float(s: &str) -> Option<u64> {
    let (kind, digits) = s.split_at_checked(2)?;
    match (kind, digits.len()) {
        ("0f" | "0F", 8) | ("0d" | "0D", 16) => u64::from_str_radix(digits, 16).ok(),
        _ => None,
    }
}

struct Raw<'a> {
    line: u32,
    guard: Option<(&'a str, bool)>,
    op: &'a str,
    args: Vec<Arg<'a>>,
    scope: usize,
}

/// A kernel while it is read. Instructions are decoded at the end, when all names are known.
struct Func<'a> {
    k: Kernel,
    scopes: Vec<Scope>,
    scope: usize,
    raw: Vec<Raw<'a>>,
}

impl<'a> Func<'a> {
    fn new(name: &str, target: &str) -> Self {
        let k = Kernel { name: name.into(), target: target.into(), shared_top: SHARED_BASE, ..Kernel::default() };
        Func { k, scopes: vec![], scope: 0, raw: vec![] }
    }

    fn declare(&mut self, name: &str, s: Symbol) {
        self.scopes[self.scope].names.insert(name.to_string(), s);
    }

    fn shared(&mut self, name: &str, align: u64, bytes: u64) {
        let at = self.k.shared_top.next_multiple_of(align.max(1));
        self.k.shared_top = at + bytes;
        self.declare(name, Symbol::Address(at));
    }

    fn finish(mut self) -> Result<Kernel, SimError> {
        let mut names: HashMap<&str, u32> = HashMap::new();
        let raw = std::mem::take(&mut self.raw);
        let mut code = Vec::with_capacity(raw.len());
        for r in &raw {
            let cx = Names { scopes: &self.scopes, scope: r.scope, line: r.line };
            let guard = match r.guard {
                None => None,
                Some((p, false)) => Some(PSrc::Is(cx.pred(p)?)),
                Some((p, true)) => Some(PSrc::Not(cx.pred(p)?)),
            };
            let op = decode::decode(r.op, &r.args, &cx)?;
            let next = names.len() as u32;
            let name = *names.entry(r.op).or_insert(next);
            if name == next {
                self.k.opcodes.push(r.op.to_string());
            }
            let collective = op.collective();
            code.push(Inst { guard, op, line: r.line, name, collective });
        }
        let line = code.last().map_or(0, |i| i.line);
        if !matches!(code.last(), Some(Inst { op: Op::Ret | Op::Trap | Op::Bra { .. }, guard: None, .. })) {
            return Err(error(line, "the kernel's last instruction is no `ret`"));
        }
        self.k.code = code;
        Ok(self.k)
    }
}

/// Names as one instruction sees them.
pub(crate) struct Names<'a> {
    scopes: &'a [Scope],
    scope: usize,
    pub(crate) line: u32,
}

impl Names<'_> {
    pub(crate) fn err(&self, what: impl AsRef<str>) -> SimError {
        error(self.line, what.as_ref())
    }

    fn up<T>(&self, f: impl Fn(&Scope) -> Option<T>) -> Option<T> {
        let mut at = Some(self.scope);
        while let Some(i) = at {
            if let Some(x) = f(&self.scopes[i]) {
                return Some(x);
            }
            at = self.scopes[i].parent;
        }
        None
    }

    fn symbol(&self, name: &str) -> Result<Symbol, SimError> {
        self.up(|s| s.names.get(name).copied()).ok_or_else(|| self.err(format!("`{name}` is not declared")))
    }

    pub(crate) fn pred(&self, name: &str) -> Result<Pred, SimError> {
        match self.symbol(name)? {
            Symbol::Pred(p) => Ok(p),
            _ => Err(self.err(format!("`{name}` is no predicate"))),
        }
    }

    pub(crate) fn reg(&self, name: &str) -> Result<Reg, SimError> {
        match self.symbol(name)? {
            Symbol::Data(r) => Ok(r),
            _ => Err(self.err(format!("`{name}` is no data register"))),
        }
    }

    pub(crate) fn src(&self, a: &Arg) -> Result<Src, SimError> {
        match a {
            Arg::Int(v) => Ok(Src::Imm(*v)),
            Arg::Name(n) => match self.symbol(n)? {
                Symbol::Data(r) => Ok(Src::Reg(r)),
                Symbol::Address(x) => Ok(Src::Imm(x)),
                Symbol::Pred(_) => Err(self.err(format!("`{n}` is a predicate, a number is wanted"))),
            },
            _ => Err(self.err("a register or a number is wanted")),
        }
    }

    pub(crate) fn psrc(&self, a: &Arg) -> Result<PSrc, SimError> {
        match a {
            Arg::Name(n) => Ok(PSrc::Is(self.pred(n)?)),
            Arg::Not(n) => Ok(PSrc::Not(self.pred(n)?)),
            Arg::Int(v) => Ok(PSrc::Const(*v != 0)),
            _ => Err(self.err("a predicate is wanted")),
        }
    }

    pub(crate) fn addr(&self, a: &Arg) -> Result<Addr, SimError> {
        match a {
            Arg::Mem { base, offset, at } if at.is_empty() => Ok(Addr { base: self.src(base)?, offset: *offset }),
            _ => Err(self.err("an address in brackets is wanted")),
        }
    }

    pub(crate) fn label(&self, name: &str) -> Result<u32, SimError> {
        self.up(|s| s.labels.get(name).copied()).ok_or_else(|| self.err(format!("label `{name}` is not defined")))
    }

    pub(crate) fn table(&self, name: &str) -> Result<Box<[u32]>, SimError> {
        let names = self.up(|s| s.tables.get(name).cloned());
        let names = names.ok_or_else(|| self.err(format!("`{name}` is no list of branch targets")))?;
        names.iter().map(|n| self.label(n)).collect()
    }
}
