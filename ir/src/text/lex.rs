//! Tokens of the text form, read one at a time. Positions are byte offsets; [`Lexer::fault`] turns one into line and
//! column.

use crate::error::IrError;

/// A token. Numbers stay text until their type is known.
#[derive(Clone, PartialEq, Debug)]
pub(super) enum Token<'a> {
    Word(&'a str),
    Number(&'a str),
    Text(String),
    /// `%7`
    Value(u32),
    /// `@7`
    Param(u32),
    Punct(char),
    End,
}

impl Token<'_> {
    /// In words, for messages.
    pub(super) fn describe(&self) -> String {
        match self {
            Token::Word(w) => format!("'{}'", clip(w)),
            Token::Number(n) => format!("'{}'", clip(n)),
            Token::Text(t) => format!("\"{}\"", clip(t)),
            Token::Value(v) => format!("%{v}"),
            Token::Param(p) => format!("@{p}"),
            Token::Punct(c) => format!("'{c}'"),
            Token::End => "the end of the text".into(),
        }
    }
}

/// The first 40 characters.
fn clip(s: &str) -> &str {
    s.char_indices().nth(40).map_or(s, |(i, _)| &s[..i])
}

pub(super) struct Lexer<'a> {
    src: &'a str,
    /// Offset of the next character to read.
    at: usize,
    /// Offset of the token last returned.
    pub(super) start: usize,
    peeked: Option<(Token<'a>, usize)>,
}

impl<'a> Lexer<'a> {
    pub(super) fn new(src: &'a str) -> Lexer<'a> {
        Lexer { src, at: 0, start: 0, peeked: None }
    }

    /// An error at a byte offset.
    pub(super) fn fault(&self, at: usize, why: impl Into<String>) -> IrError {
        let before = self.src.get(..at).unwrap_or(self.src);
        let line = before.matches('\n').count() + 1;
        let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
        IrError::Parse { line, column, why: why.into() }
    }

    /// The next token, left in place.
    pub(super) fn peek(&mut self) -> Result<&Token<'a>, IrError> {
        if self.peeked.is_none() {
            self.peeked = Some(self.read()?);
        }
        Ok(self.peeked.as_ref().map_or(&Token::End, |p| &p.0))
    }

    /// The next token.
    pub(super) fn next(&mut self) -> Result<Token<'a>, IrError> {
        let (t, start) = match self.peeked.take() {
            Some(p) => p,
            None => self.read()?,
        };
        self.start = start;
        Ok(t)
    }

    fn take_while(&mut self, f: impl Fn(char) -> bool) -> &'a str {
        let rest = &self.src[self.at..];
        let n = rest.find(|c| !f(c)).unwrap_or(rest.len());
        self.at += n;
        &rest[..n]
    }

    fn read(&mut self) -> Result<(Token<'a>, usize), IrError> {
        loop {
            self.take_while(char::is_whitespace);
            if !self.src[self.at..].starts_with("//") {
                break;
            }
            self.take_while(|c| c != '\n');
        }
        let start = self.at;
        let Some(c) = self.src[start..].chars().next() else { return Ok((Token::End, start)) };
        let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let token = match c {
            '"' => Token::Text(self.text()?),
            '%' | '@' => {
                self.at += 1;
                let digits = self.take_while(|c| c.is_ascii_digit());
                let id =
                    digits.parse::<u32>().map_err(|_| self.fault(start, format!("expected a number after '{c}'")))?;
                if c == '%' { Token::Value(id) } else { Token::Param(id) }
            }
            c if c.is_ascii_digit() || c == '-' => Token::Number(self.number()),
            c if word(c) => Token::Word(self.take_while(word)),
            c => {
                self.at += c.len_utf8();
                Token::Punct(c)
            }
        };
        Ok((token, start))
    }

    /// Sign, then letters, digits and dots, with a sign after an exponent's `e`.
    fn number(&mut self) -> &'a str {
        let from = self.at;
        self.at += 1;
        loop {
            self.take_while(|c| c.is_ascii_alphanumeric() || c == '.');
            let text = &self.src[from..self.at];
            let sign = self.src[self.at..].starts_with(['-', '+']);
            if !(sign && text.ends_with(['e', 'E']) && !text.contains('x')) {
                return text;
            }
            self.at += 1;
        }
    }

    fn text(&mut self) -> Result<String, IrError> {
        let from = self.at;
        let mut out = String::new();
        let mut chars = self.src[from..].char_indices().skip(1);
        while let Some((i, c)) = chars.next() {
            match c {
                '"' => {
                    self.at = from + i + 1;
                    return Ok(out);
                }
                '\n' => break,
                '\\' => match chars.next() {
                    Some((_, c @ ('"' | '\\'))) => out.push(c),
                    Some((_, 'n')) => out.push('\n'),
                    Some((_, 'u')) => {
                        let hex: String = chars.by_ref().map(|(_, c)| c).take(8).take_while(|c| *c != '}').collect();
                        let code = hex.strip_prefix('{').and_then(|h| u32::from_str_radix(h, 16).ok());
                        let c = code.and_then(char::from_u32);
                        out.push(c.ok_or_else(|| self.fault(from + i, "expected an escape like \\u{7f}"))?);
                    }
                    _ => return Err(self.fault(from + i, "expected \\\", \\\\, \\n or \\u{…}")),
                },
                c => out.push(c),
            }
        }
        Err(self.fault(from, "the string has no closing quote on its line"))
    }
}
