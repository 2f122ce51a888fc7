//! PTX text to tokens with line numbers. Comments disappear; words keep their dots and double colons, so that an opcode
//! with its modifiers is one token.

use crate::SimError;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Token<'a> {
    pub(crate) text: &'a str,
    pub(crate) line: u32,
}

fn in_word(c: u8) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, b'_' | b'$' | b'%' | b'.')
}

/// Splits a text. A string literal is one token with its quotes.
pub(crate) fn tokens(text: &str) -> Result<Vec<Token<'_>>, SimError> {
    let b = text.as_bytes();
    let (mut out, mut i, mut line) = (vec![], 0, 1);
    while i < b.len() {
        let start = i;
        match b[i] {
            b'\n' => {
                line += 1;
                i += 1;
                continue;
            }
            c if c.is_ascii_whitespace() => {
                i += 1;
                continue;
            }
            b'/' if b.get(i + 1) == Some(&b'/') => {
                while i < b.len() && b[i] != b'\n' {
                    i += 1;
                }
                continue;
            }
            b'/' if b.get(i + 1) == Some(&b'*') => {
                let n = text[i..].find("*/").ok_or_else(|| error(line, "a comment does not end"))?;
                line += text[i..i + n].matches('\n').count() as u32;
                i += n + 2;
                continue;
            }
            b'"' => {
                let n = text[i + 1..].find('"').ok_or_else(|| error(line, "a string does not end"))?;
                i += n + 2;
            }
            c if in_word(c) => {
                while i < b.len() && (in_word(b[i]) || double_colon(b, i)) {
                    i += if b[i] == b':' { 2 } else { 1 };
                }
            }
            c if b",;:{}[]()+-@!|=<>".contains(&c) => i += 1,
            _ => {
                let c = text[i..].chars().next().unwrap_or(' ');
                return Err(error(line, &format!("unexpected character {c:?}")));
            }
        }
        out.push(Token { text: &text[start..i], line });
    }
    Ok(out)
}

/// `::` inside a word, as in `shared::cluster`.
fn double_colon(b: &[u8], i: usize) -> bool {
    b[i] == b':' && b.get(i + 1) == Some(&b':') && b.get(i + 2).is_some_and(|c| in_word(*c))
}

pub(crate) fn error(line: u32, what: &str) -> SimError {
    SimError::Parse { line, what: what.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_keep_dots_and_colons() {
        let t = tokens("@!%p1 bra.uni $L1; // x\nA::b: [%rd1+-4], {_, %tid.x} /* a\nb */ ;").unwrap();
        let words: Vec<&str> = t.iter().map(|t| t.text).collect();
        let want = "@ ! %p1 bra.uni $L1 ; A::b : [ %rd1 + - 4 ] , { _ , %tid.x } ;";
        assert_eq!(words.join(" "), want);
        assert_eq!((t[5].line, t[6].line, t.last().unwrap().line), (1, 2, 3));
    }

    #[test]
    fn strange_characters_are_named() {
        assert_eq!(tokens("a\n #").unwrap_err().to_string(), "line 2: unexpected character '#'");
    }
}
