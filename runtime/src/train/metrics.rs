//! `metrics.jsonl` and `eval.jsonl`: one object a line, each with its `step`. Resuming cuts them back to the step of the
//! checkpoint.

use super::step::Stepped;
use crate::error::{Result, RuntimeError};
use serde_json::{Value, json};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// What is known after a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Metrics {
    /// Numbers that are the same for any number of threads.
    pub stepped: Stepped,
    /// Wall time of the step, milliseconds.
    pub step_ms: f64,
    /// Bytes planned for weights, adapter, optimizer, arena and scratch.
    pub planned_peak_bytes: u64,
    /// Largest resident set of the process so far.
    pub peak_rss_bytes: u64,
}

impl Metrics {
    /// Tokens run through the model per second.
    pub fn tokens_per_s(&self) -> f64 {
        self.stepped.tokens as f64 / (self.step_ms * 1e-3).max(1e-9)
    }

    /// The line of `metrics.jsonl`.
    pub fn json(&self) -> Value {
        let s = &self.stepped;
        json!({
            "step": s.step, "loss": s.loss, "lr": s.lr, "grad_norm": s.grad_norm, "tokens": s.tokens,
            "step_ms": self.step_ms, "tokens_per_s": self.tokens_per_s(),
            "planned_peak_bytes": self.planned_peak_bytes, "peak_rss_bytes": self.peak_rss_bytes,
            "targets": s.targets,
        })
    }
}

/// A file of one object a line, open at its end.
#[derive(Debug)]
pub struct Lines {
    path: PathBuf,
    file: File,
}

impl Lines {
    /// Opens a file and keeps the whole lines up to `step`, or none at all without; a new file when there is none. Lines of
    /// a later step, and a line cut off in the middle, go.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn open(path: &Path, step: Option<u64>) -> Result<Lines> {
        let what = || RuntimeError::io(path.display().to_string());
        let old = match fs::read(path) {
            Ok(b) => b,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => vec![],
            Err(e) => return Err(what()(e)),
        };
        let file = OpenOptions::new().create(true).append(true).open(path).map_err(what())?;
        let keep = step.map_or(0, |s| kept(&old, s));
        if keep < old.len() {
            file.set_len(keep as u64).and_then(|()| file.sync_all()).map_err(what())?;
        }
        Ok(Lines { path: path.to_owned(), file })
    }

    /// Appends a line.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn add(&mut self, value: &Value) -> Result<()> {
        self.file.write_all(format!("{value}\n").as_bytes()).map_err(RuntimeError::io(self.path.display().to_string()))
    }

    /// Makes all lines so far outlive a crash of the system.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(RuntimeError::io(self.path.display().to_string()))
    }
}

/// Bytes of the whole lines whose step is at most `step`.
fn kept(text: &[u8], step: u64) -> usize {
    let mut end = 0;
    for line in text.split_inclusive(|b| *b == b'\n') {
        let at = serde_json::from_slice::<Value>(line).ok().and_then(|v| v.get("step")?.as_u64());
        if !line.ends_with(b"\n") || at.is_none_or(|s| s > step) {
            break;
        }
        end += line.len();
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_cut_at_a_step_and_at_a_torn_end() {
        let text = b"{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n{\"ste";
        assert_eq!((kept(text, 0), kept(text, 2), kept(text, 9)), (0, 22, 33));
        assert_eq!(kept(b"{\"step\":1}", 1), 0);
        assert_eq!(kept(b"no\n{\"step\":1}\n", 1), 0);
    }
}
