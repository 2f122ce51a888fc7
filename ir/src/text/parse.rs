//! Reads graphs. Every error says at which line and column, and what was expected there.

use super::lex::{Lexer, Token};
use super::ops::{Attrs, read_op};
use crate::error::IrError;
use crate::graph::{Entry, Graph, Param, ParamId, Phase, Role, Source, ValueId};
use crate::types::{DType, Dim, Sym, TensorType};

/// Reads a graph.
///
/// # Errors
/// [`IrError::Parse`].
pub fn parse(text: &str) -> Result<Graph, IrError> {
    let mut p = Parser { lex: Lexer::new(text) };
    let mut g = Graph::default();
    p.keyword("graph")?;
    g.phase = match p.word("'imported' or 'core'")? {
        "imported" => Phase::Imported,
        "core" => Phase::Core,
        _ => return Err(p.expected("'imported' or 'core'")),
    };
    loop {
        match p.lex.next()? {
            Token::End => return Ok(g),
            Token::Word("param") => p.param(&mut g)?,
            Token::Word("entry") => {
                let e = p.entry(&g.params)?;
                g.entries.push(e);
            }
            t => return Err(p.found("'param' or 'entry'", &t)),
        }
    }
}

pub(super) struct Parser<'a> {
    pub(super) lex: Lexer<'a>,
}

impl<'a> Parser<'a> {
    /// An error at the token last read.
    pub(super) fn fault(&self, why: impl Into<String>) -> IrError {
        self.lex.fault(self.lex.start, why)
    }

    fn expected(&self, what: &str) -> IrError {
        self.fault(format!("expected {what}"))
    }

    fn found(&self, what: &str, t: &Token) -> IrError {
        self.fault(format!("expected {what}, found {}", t.describe()))
    }

    pub(super) fn word(&mut self, what: &str) -> Result<&'a str, IrError> {
        match self.lex.next()? {
            Token::Word(w) => Ok(w),
            t => Err(self.found(what, &t)),
        }
    }

    fn keyword(&mut self, k: &str) -> Result<(), IrError> {
        if self.word(&format!("'{k}'"))? == k { Ok(()) } else { Err(self.expected(&format!("'{k}'"))) }
    }

    pub(super) fn punct(&mut self, c: char) -> Result<(), IrError> {
        match self.lex.next()? {
            Token::Punct(p) if p == c => Ok(()),
            t => Err(self.found(&format!("'{c}'"), &t)),
        }
    }

    /// Takes the token if it comes next.
    pub(super) fn maybe(&mut self, t: &Token) -> Result<bool, IrError> {
        let yes = self.lex.peek()? == t;
        if yes {
            self.lex.next()?;
        }
        Ok(yes)
    }

    pub(super) fn text(&mut self, what: &str) -> Result<String, IrError> {
        match self.lex.next()? {
            Token::Text(s) => Ok(s),
            t => Err(self.found(what, &t)),
        }
    }

    pub(super) fn number(&mut self, what: &str) -> Result<&'a str, IrError> {
        match self.lex.next()? {
            Token::Number(n) => Ok(n),
            t => Err(self.found(what, &t)),
        }
    }

    /// A whole number that fits.
    pub(super) fn whole<T: std::str::FromStr>(&mut self, what: &str) -> Result<T, IrError> {
        let n = self.number(what)?;
        n.parse().map_err(|_| self.found(what, &Token::Number(n)))
    }

    pub(super) fn param_id(&mut self) -> Result<ParamId, IrError> {
        match self.lex.next()? {
            Token::Param(p) => Ok(ParamId(p)),
            t => Err(self.found("a parameter like @0", &t)),
        }
    }

    fn value(&mut self) -> Result<ValueId, IrError> {
        match self.lex.next()? {
            Token::Value(v) => Ok(ValueId(v)),
            t => Err(self.found("a value like %0", &t)),
        }
    }

    /// Items up to `end`, with commas between.
    pub(super) fn list(
        &mut self,
        end: char,
        mut item: impl FnMut(&mut Parser<'a>) -> Result<(), IrError>,
    ) -> Result<(), IrError> {
        if self.maybe(&Token::Punct(end))? {
            return Ok(());
        }
        loop {
            item(self)?;
            match self.lex.next()? {
                Token::Punct(',') => {}
                Token::Punct(c) if c == end => return Ok(()),
                t => return Err(self.found(&format!("',' or '{end}'"), &t)),
            }
        }
    }

    fn ty(&mut self) -> Result<TensorType, IrError> {
        let what = "an element type (f32, bf16, f16, i32, bool)";
        let name = self.word(what)?;
        let dtype = DType::from_name(name).ok_or_else(|| self.found(what, &Token::Word(name)))?;
        self.punct('[')?;
        let mut shape = vec![];
        self.list(']', |p| {
            let d = match p.lex.next()? {
                Token::Number(n) => n.parse().ok().map(Dim::Known),
                Token::Word(w) => Sym::new(w).map(Dim::Symbol),
                t => return Err(p.found("a dimension", &t)),
            };
            shape.push(d.ok_or_else(|| p.expected("a dimension: a 64-bit number or a symbol of at most 7 letters"))?);
            if shape.len() > 255 {
                return Err(p.fault("a tensor has at most 255 axes"));
            }
            Ok(())
        })?;
        Ok(TensorType { dtype, shape })
    }

    fn param(&mut self, g: &mut Graph) -> Result<(), IrError> {
        let id = self.param_id()?;
        if id.index() != g.params.len() {
            return Err(self.fault(format!("expected @{}: parameters are numbered in order", g.params.len())));
        }
        let name = self.text("the parameter's name in quotes")?;
        let ty = self.ty()?;
        let word = self.word("a role")?;
        let role = Role::ALL.iter().find(|(_, n)| *n == word).map(|x| x.0).ok_or_else(|| {
            let all: Vec<&str> = Role::ALL.iter().map(|x| x.1).collect();
            self.found(&format!("a role ({})", all.join(", ")), &Token::Word(word))
        })?;
        let what = "a source (checkpoint(\"…\"), adapter(0, \"…\"), derived, zeros)";
        let source = match self.word(what)? {
            "derived" => Source::Derived,
            "zeros" => Source::Zeros,
            "checkpoint" => {
                self.punct('(')?;
                let name = self.text("a tensor's name in quotes")?;
                self.punct(')')?;
                Source::Checkpoint(name)
            }
            "adapter" => {
                self.punct('(')?;
                let slot = self.whole("a slot number")?;
                self.punct(',')?;
                let key = self.text("a key in quotes")?;
                self.punct(')')?;
                Source::Adapter { slot, key }
            }
            w => return Err(self.found(what, &Token::Word(w))),
        };
        g.params.push(Param { name, ty, role, source });
        Ok(())
    }

    fn entry(&mut self, params: &[Param]) -> Result<Entry, IrError> {
        let mut e = Entry::new(self.text("the entry's name in quotes")?);
        self.punct('{')?;
        loop {
            match self.lex.next()? {
                Token::Punct('}') => return Ok(e),
                Token::Value(v) => self.node(params, &mut e, v)?,
                Token::Word("output") => {
                    let name = self.text("the output's name in quotes")?;
                    let v = self.defined(&e)?;
                    e.output(name, v);
                }
                Token::Word("assign") => {
                    let p = self.param_id()?;
                    if p.index() >= params.len() {
                        return Err(self.fault(format!("there is no parameter {p}")));
                    }
                    let v = self.defined(&e)?;
                    e.assign(p, v);
                }
                t => return Err(self.found("a node like '%0 = …', 'output', 'assign' or '}'", &t)),
            }
        }
    }

    /// A value that the entry has already.
    fn defined(&mut self, e: &Entry) -> Result<ValueId, IrError> {
        let v = self.value()?;
        if v.index() < e.nodes.len() { Ok(v) } else { Err(self.fault(format!("{v} is not defined before this"))) }
    }

    fn node(&mut self, params: &[Param], e: &mut Entry, v: u32) -> Result<(), IrError> {
        if v as usize != e.nodes.len() {
            return Err(self.fault(format!("expected %{}: values are numbered in order", e.nodes.len())));
        }
        self.punct('=')?;
        let mnemonic = self.word("an operator")?;
        let at = self.lex.start;
        let mut inputs = vec![];
        if self.maybe(&Token::Punct('('))? {
            self.list(')', |p| {
                inputs.push(p.defined(e)?);
                Ok(())
            })?;
        }
        let mut attrs = Attrs::read(self, mnemonic)?;
        self.punct(':')?;
        let ty = self.ty()?;
        let op = read_op(mnemonic, &mut attrs, &ty).map_err(|why| self.lex.fault(at, why))?;
        let v = e.push(params, op, &inputs).map_err(|err| self.lex.fault(at, err.to_string()))?;
        if *e.ty(v) != ty {
            return Err(self.lex.fault(at, format!("{mnemonic} gives {}, but {ty} is written", e.ty(v))));
        }
        if self.maybe(&Token::Word("from"))? {
            e.nodes[v.index()].origin = Some(self.text("an origin in quotes")?.into());
        }
        Ok(())
    }
}
