//! Printing: results on stdout, remarks and progress on stderr, tables, sizes.
//!
//! The only module that writes to the terminal. A closed pipe ends the program quietly; any other failure to write is an error. `--quiet` silences stderr but
//! for errors; `NO_COLOR` and a stderr that is no terminal switch colour off.

#[cfg(feature = "models")]
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{IsTerminal, Write};

/// How to talk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ui {
    /// No remarks and no progress.
    pub quiet: bool,
    /// Workers asked for; 0 means one per core.
    pub threads: usize,
}

/// Writes to stdout; ends the program when that cannot be done: quietly when nobody reads any more, else with an error.
pub(crate) fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    if let Err(e) = out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        std::process::exit(lost(&e));
    }
}

/// What a program ends with whose output cannot be written.
fn lost(why: &std::io::Error) -> i32 {
    if why.kind() == std::io::ErrorKind::BrokenPipe {
        return 0;
    }
    error(&format!("cannot write to stdout: {why}; what was printed is not whole"));
    1
}

/// What the argument parser has to say: help on stdout, errors on stderr; the code to end with.
pub(crate) fn parser(said: &clap::Error) -> i32 {
    match said.print().and_then(|()| std::io::stdout().flush()) {
        Err(e) if !said.use_stderr() => lost(&e),
        _ => said.exit_code(),
    }
}

/// A line on stdout.
pub(crate) fn line(text: &str) {
    print(&format!("{text}\n"));
}

/// A JSON value on stdout.
pub(crate) fn json(value: &serde_json::Value) {
    line(&value.to_string());
}

/// A value of a line of comma-separated ones, quoted where it must be.
pub(crate) fn cell(text: &str) -> String {
    if text.contains([',', '"', '\n']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text.to_string() }
}

/// The error that ends the program.
pub(crate) fn error(message: &str) {
    let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    let head = if colour { "\x1b[1;31merror:\x1b[0m" } else { "error:" };
    let _ = writeln!(std::io::stderr(), "{head} {message}");
}

impl Ui {
    /// A remark on stderr.
    pub(crate) fn note(&self, text: &str) {
        if !self.quiet {
            let _ = writeln!(std::io::stderr(), "{text}");
        }
    }

    #[cfg(feature = "models")]
    /// A progress bar on stderr, invisible when quiet or when stderr is no terminal.
    pub(crate) fn progress(&self, total: u64, what: &str) -> ProgressBar {
        let bar = ProgressBar::new(total);
        if self.quiet || !std::io::stderr().is_terminal() {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        if let Ok(style) = ProgressStyle::with_template("{msg} {bar:40} {pos}/{len}") {
            bar.set_style(style);
        }
        bar.set_message(what.to_string());
        bar
    }

    #[cfg(feature = "models")]
    /// Number of workers: what was asked for, else one per core.
    pub(crate) fn workers(&self) -> usize {
        match self.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            n => n,
        }
    }
}

/// A table whose columns are as wide as their widest cell. The first column and those marked `<` go left.
pub(crate) struct Table {
    left: Vec<bool>,
    rows: Vec<Vec<String>>,
}

/// A path for JSON: bytes that are no UTF-8 are replaced.
pub(crate) fn path(p: &std::path::Path) -> serde_json::Value {
    p.to_string_lossy().into()
}

/// A module path with `*` for the number of its layer.
#[cfg(feature = "compiler")]
pub(crate) fn layerless(name: &str) -> String {
    let part = |p: &str| {
        let rest = p.trim_start_matches(|c: char| c.is_ascii_digit());
        if rest.len() < p.len() && (rest.is_empty() || rest.starts_with(' ')) {
            format!("*{rest}")
        } else {
            p.to_owned()
        }
    };
    name.split('.').map(part).collect::<Vec<_>>().join(".")
}

impl Table {
    /// A table with these headings; a heading that begins with `<` makes a column of text.
    pub(crate) fn new(head: &[&str]) -> Table {
        let left = head.iter().enumerate().map(|(i, h)| i == 0 || h.starts_with('<')).collect();
        Table { left, rows: vec![head.iter().map(|h| h.trim_start_matches('<').to_string()).collect()] }
    }

    /// Adds a row.
    pub(crate) fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) {
        self.rows.push(cells.into_iter().map(Into::into).collect());
    }

    /// The lines, each ended.
    pub(crate) fn text(&self) -> String {
        let columns = self.left.len();
        let width = |c: usize| self.rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut out = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (c, cell) in row.iter().enumerate() {
                if c > 0 {
                    line.push_str("  ");
                }
                let pad = " ".repeat(widths[c] - cell.chars().count());
                line.push_str(&if self.left[c] { format!("{cell}{pad}") } else { format!("{pad}{cell}") });
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }
}

/// A size for people: `96.5 MiB`.
pub(crate) fn bytes(n: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if n < 1024 {
        return format!("{n} B");
    }
    let mut x = n as f64 / 1024.0;
    let mut unit = 0;
    while x >= 1024.0 && unit + 1 < UNITS.len() {
        x /= 1024.0;
        unit += 1;
    }
    format!("{x:.1} {}", UNITS[unit])
}

/// A count for people: `134.5 M`.
pub(crate) fn count(n: u64) -> String {
    match n {
        0..10_000 => n.to_string(),
        10_000..1_000_000 => format!("{:.1} k", n as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} M", n as f64 / 1e6),
        _ => format!("{:.2} G", n as f64 / 1e9),
    }
}

/// The largest resident set of this process so far, bytes; 0 when the system does not say.
#[cfg(feature = "compiler")]
pub(crate) fn peak_rss() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib = status.lines().find_map(|l| l.strip_prefix("VmHWM:")?.trim().strip_suffix("kB")?.trim().parse().ok());
    kib.map_or(0, |k: u64| k * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_align_and_sizes_read_well() {
        let mut t = Table::new(&["pass", "nodes", "<note"]);
        t.row(["a", "12", "x"]);
        t.row(["longer", "3", ""]);
        assert_eq!(t.text(), "pass    nodes  note\na          12  x\nlonger      3\n");
        assert_eq!([bytes(12), bytes(2048), bytes(101 << 20)], ["12 B", "2.0 KiB", "101.0 MiB"]);
        assert_eq!([count(999), count(134_515_008)], ["999", "134.5 M"]);
    }
}
