//! Python regular expressions, as far as adapter configurations use them.
//!
//! The linear-time engine is tried first; patterns with look-around or back-references go to the backtracking one,
//! which gives up after a bounded number of steps. Constructs that mean one thing to Python and another here are
//! refused.

use crate::error::{Error, Result};

#[derive(Debug, Clone)]
enum Engine {
    Linear(regex::Regex),
    Backtracking(fancy_regex::Regex),
}

/// A compiled pattern with the text it came from.
#[derive(Debug, Clone)]
pub struct Pattern {
    engine: Engine,
    source: String,
}

impl Pattern {
    /// A pattern that must match a whole string, as Python's `re.fullmatch`.
    pub fn full(source: &str) -> Result<Pattern> {
        Pattern::compile(source, &format!(r"\A(?:{source})\z"))
    }

    /// A pattern that must match at the start, as Python's `re.match`.
    pub fn prefix(source: &str) -> Result<Pattern> {
        Pattern::compile(source, &format!(r"\A(?:{source})"))
    }

    fn compile(source: &str, anchored: &str) -> Result<Pattern> {
        let fault = |what: String| Error::Pattern { pattern: source.to_owned(), what };
        if let Some(set) = ["&&", "--", "~~", "[["].iter().find(|set| source.contains(**set)) {
            return Err(fault(format!("`{set}` means something else outside Python; write it without")));
        }
        // Python's spellings that the engines here do not know.
        let anchored = anchored.replace(r"\Z", r"\z");
        let engine = match regex::Regex::new(&anchored) {
            Ok(regex) => Engine::Linear(regex),
            Err(_) => Engine::Backtracking(
                fancy_regex::Regex::new(&anchored)
                    .map_err(|e| fault(format!("is not a valid regular expression: {e}")))?,
            ),
        };
        Ok(Pattern { engine, source: source.to_owned() })
    }

    /// Whether `text` matches.
    ///
    /// # Errors
    /// A pattern that needs too many steps.
    pub fn is_match(&self, text: &str) -> Result<bool> {
        match &self.engine {
            Engine::Linear(regex) => Ok(regex.is_match(text)),
            Engine::Backtracking(regex) => regex.is_match(text).map_err(|e| self.too_hard(&e)),
        }
    }

    /// The text of the named group of a match.
    pub fn group<'t>(&self, text: &'t str, name: &str) -> Result<Option<&'t str>> {
        match &self.engine {
            Engine::Linear(regex) => Ok(regex.captures(text).and_then(|c| c.name(name)).map(|m| m.as_str())),
            Engine::Backtracking(regex) => {
                let captures = regex.captures(text).map_err(|e| self.too_hard(&e))?;
                Ok(captures.and_then(|c| c.name(name)).map(|m| m.as_str()))
            }
        }
    }

    fn too_hard(&self, error: &fancy_regex::Error) -> Error {
        Error::Pattern { pattern: self.source.clone(), what: format!("could not be decided: {error}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anchoring_follows_python() {
        assert!(Pattern::full("a|ab").unwrap().is_match("ab").unwrap());
        assert!(!Pattern::full("q_proj").unwrap().is_match("self_attn.q_proj").unwrap());
        assert!(Pattern::prefix("self").unwrap().is_match("self_attn").unwrap());
        assert!(!Pattern::prefix("attn").unwrap().is_match("self_attn").unwrap());
    }

    #[test]
    fn look_around_is_understood() {
        let p = Pattern::full(r".*\.(?!k_proj)[qkv]_proj").unwrap();
        assert!(p.is_match("layers.0.q_proj").unwrap());
        assert!(!p.is_match("layers.0.k_proj").unwrap());
    }

    #[test]
    fn faults_are_errors() {
        assert!(Pattern::full("(").is_err());
        assert!(Pattern::full("[a-z&&b]").is_err());
        assert!(Pattern::full(r"(a*)*(?=b)\1c").unwrap().is_match(&"a".repeat(64)).is_err());
    }
}
