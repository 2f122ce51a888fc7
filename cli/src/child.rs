//! Compiling in a child process of this program: an abort of the code generator becomes an error, and the process that
//! runs the model never carries it.
//!
//! The request goes to the child's stdin as JSON; the child writes the plan file itself and answers on stdout with the
//! report. What it says on stderr is shown only when it fails.

use crate::failure::{Failure, Result};
use crate::pipeline::{Request, Row};
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

/// Last lines of a failed child's stderr that are worth showing.
const TAIL: usize = 12;

/// Compiles in a child and gives its report; the plan lies at `request.out`.
///
/// # Errors
/// What the child refused, or how it ended.
pub(crate) fn compile(request: &Request) -> Result<Vec<Row>> {
    let program = std::env::current_exe().map_err(|e| Failure::new(format!("cannot find this program: {e}")))?;
    let text = serde_json::to_vec(request)?;
    let mut child = Command::new(&program)
        .args(["compile-here", "--quiet"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(Failure::io("start", &program))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A child that ended early says why on stderr.
        let _ = stdin.write_all(&text);
    }
    let done = child.wait_with_output().map_err(Failure::io("wait for", &program))?;
    if done.status.success() {
        return Ok(serde_json::from_slice(&done.stdout)?);
    }
    let said = String::from_utf8_lossy(&done.stderr);
    if done.status.code() == Some(1) {
        return Err(Failure::new(said.trim().trim_start_matches("error: ").to_string()));
    }
    let how = match (done.status.signal(), done.status.code()) {
        (Some(9), _) => "was killed (signal 9): is there enough memory?".to_string(),
        (Some(n), _) => format!("was ended by signal {n}"),
        (None, code) => format!("ended with code {}", code.unwrap_or(-1)),
    };
    let lines: Vec<&str> = said.lines().filter(|l| !l.trim().is_empty()).collect();
    let tail = lines[lines.len().saturating_sub(TAIL)..].join("\n  ");
    let tail = if tail.is_empty() { "it said nothing".into() } else { format!("it said last:\n  {tail}") };
    if said.contains("out of memory") || said.contains("memory allocation of") {
        return Err(Failure::new(format!("the compiler ran out of memory and {how}; {tail}")));
    }
    Err(Failure::new(format!(
        "the compiler {how}; this is a fault of pleach, please report it with `pleach doctor`; {tail}"
    )))
}

/// The child's side: reads the request, compiles, answers.
///
/// # Errors
/// Whatever compiling refuses.
pub(crate) fn serve() -> Result<()> {
    let request: Request = serde_json::from_reader(std::io::stdin().lock())?;
    let rows = crate::pipeline::compile_here(&request)?;
    crate::report::line(&serde_json::to_string(&rows)?);
    Ok(())
}
