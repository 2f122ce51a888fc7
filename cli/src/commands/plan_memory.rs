//! `pleach plan-memory`: the memory planner on files of buffers.
//!
//! A file has the columns `id,lower,upper,size` (in any order, others are kept): a buffer of `size` bytes, alive from
//! `lower` until before `upper`. A number before `.csv` in a file's name is the capacity that is to be met, as the public
//! sets of such files write it. A column `alignment` is kept to: all offsets are multiples of the alignments' least common
//! multiple. Every placement is checked by the independent checker before it is reported.

use crate::args::PlanMemoryArgs;
use crate::failure::{Failure, Result};
use crate::files::{self, Begun};
use crate::report::{self, Ui};
use pleach_plan::memory::{Placement, Request, check, lower_bound, place_within};
use serde_json::json;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A first placement of thousands of buffers is improved no longer than this, on a machine that is busy.
const TIME: Duration = Duration::from_millis(160);

/// Plans every file, prints one line each.
///
/// # Errors
/// A file that cannot be read or holds something else, with the line; an output that is there already.
pub(crate) fn plan_memory(ui: &Ui, args: &PlanMemoryArgs) -> Result<()> {
    let out = args.out.as_deref().map(|d| targets(d, &args.files, args.overwrite)).transpose()?;
    let mut rows = vec![];
    if !args.json {
        report::line("file,lower_bound,achieved,ms,optimal");
    }
    let begun = args.out.as_deref().map(Begun::new).transpose()?;
    for (k, path) in args.files.iter().enumerate() {
        let text = std::fs::read_to_string(path).map_err(Failure::io("read", path))?;
        let table = Table::read(&text).map_err(|e| e.within(&path.display().to_string()))?;
        let capacity = capacity(path);
        let start = Instant::now();
        let mut placed = place_within(&table.requests, table.align, capacity, TIME);
        let ms = start.elapsed().as_secs_f64() * 1e3;
        let achieved = verified(&table, &placed).map_err(|e| e.within(&path.display().to_string()))?;
        if table.align > 1 {
            // One alignment stands for all, so only what needs no more than is alive is known to be best.
            placed.lower_bound = lower_bound(&table.requests);
            placed.optimal = achieved == placed.lower_bound;
        }
        if let Some(c) = capacity.filter(|c| *c < achieved) {
            ui.note(&match c < placed.lower_bound {
                true => format!(
                    "{}: nothing fits into {c} bytes, the capacity in the file's name: {} are alive at one time",
                    path.display(),
                    placed.lower_bound
                ),
                false => format!(
                    "{}: needs {achieved} bytes here, more than the capacity of {c} in the file's name; whether it fits is open",
                    path.display()
                ),
            });
        }
        if let Some(out) = &out {
            files::write(&out[k], &table.with_offsets(&placed.offsets))?;
        }
        if args.json {
            rows.push(json!({
                "file": report::path(path), "lower_bound": placed.lower_bound, "achieved": achieved, "ms": ms,
                "optimal": placed.optimal, "buffers": table.requests.len(), "capacity": capacity,
            }));
        } else {
            let optimal = if placed.optimal { "yes" } else { "no" };
            let file = report::cell(&path.display().to_string());
            report::line(&format!("{file},{},{achieved},{ms:.1},{optimal}", placed.lower_bound));
        }
    }
    drop(begun);
    if args.json {
        report::json(&json!(rows));
    }
    Ok(())
}

/// The bytes needed, as the checker sees it.
fn verified(table: &Table<'_>, placed: &Placement) -> Result<u64> {
    if let Some(k) = placed.offsets.iter().position(|o| !o.is_multiple_of(table.align)) {
        let (line, offset) = (table.lines[k].0, placed.offsets[k]);
        return Err(Failure::new(format!("the offset {offset} of line {line} is no multiple of {}", table.align)));
    }
    check(&table.requests, &placed.offsets).map_err(|(a, b)| {
        let (a, b) = (table.lines[a].0, table.lines[b].0);
        Failure::new(format!("the buffers of lines {a} and {b} are together too large for 64-bit offsets"))
    })
}

/// The number before `.csv` in a file's name.
fn capacity(path: &Path) -> Option<u64> {
    let name = path.file_name()?.to_str()?.strip_suffix(".csv")?;
    name.rsplit_once('.')?.1.parse().ok()
}

/// Where the results go: one file each in a folder, under the same name.
pub(super) fn targets(folder: &Path, files: &[PathBuf], overwrite: bool) -> Result<Vec<PathBuf>> {
    let mut seen = BTreeSet::new();
    let mut out = vec![];
    for f in files {
        let name = f.file_name().ok_or_else(|| Failure::usage(format!("{}: is no file", f.display())))?;
        let to = folder.join(name);
        if !seen.insert(name) {
            return Err(Failure::usage(format!(
                "{}: two files have this name, and --out has room for one; run them apart",
                to.display()
            )));
        }
        if files::same(&to, f) {
            return Err(Failure::usage(format!("{}: is the file itself; --out names another folder", to.display())));
        }
        if to.exists() && !overwrite {
            return Err(Failure::new(format!("{}: is there already; --overwrite replaces it", to.display())));
        }
        out.push(to);
    }
    Ok(out)
}

/// The least common multiple, where 2^48 holds it.
fn common(a: u64, b: u64) -> Option<u64> {
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    (a / x).checked_mul(b).filter(|m| *m <= 1 << 48)
}

/// A file of buffers.
struct Table<'a> {
    head: &'a str,
    /// What every offset is a multiple of: all alignments of the file divide it.
    align: u64,
    /// Number and text of each line of a buffer.
    lines: Vec<(usize, &'a str)>,
    requests: Vec<Request>,
}

impl<'a> Table<'a> {
    fn read(text: &'a str) -> Result<Table<'a>> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let mut lines = text.lines().enumerate().map(|(n, l)| (n + 1, l.trim_end())).filter(|l| !l.1.is_empty());
        let (at, head) =
            lines.next().ok_or_else(|| Failure::new("is empty; expected the columns id,lower,upper,size"))?;
        let columns: Vec<&str> = head.split(',').map(str::trim).collect();
        let column = |name: &str| {
            columns.iter().position(|c| *c == name).ok_or_else(|| {
                Failure::new(format!(
                    "line {at}: no column `{name}`; the first line names the columns id,lower,upper,size"
                ))
            })
        };
        let (_, lower, upper, size) = (column("id")?, column("lower")?, column("upper")?, column("size")?);
        let alignment = columns.iter().position(|c| *c == "alignment");
        let mut table = Table { head, align: 1, lines: vec![], requests: vec![] };
        for (n, line) in lines {
            let cells: Vec<&str> = line.split(',').map(str::trim).collect();
            if cells.len() != columns.len() {
                let (has, wants) = (cells.len(), columns.len());
                return Err(Failure::new(format!("line {n}: {has} values for {wants} columns")));
            }
            let number = |c: usize| {
                cells[c].parse::<u64>().map_err(|_| {
                    let what = "is no whole number from 0 to 18446744073709551615";
                    Failure::new(format!("line {n}: {} `{}` {what}", columns[c], cells[c]))
                })
            };
            let r = Request { first: number(lower)?, last: number(upper)?, size: number(size)? };
            if r.last < r.first {
                return Err(Failure::new(format!(
                    "line {n}: upper {} is before lower {}; a buffer is alive from lower until before upper",
                    r.last, r.first
                )));
            }
            if let Some(c) = alignment {
                let a = number(c)?.max(1);
                table.align = common(table.align, a).ok_or_else(|| {
                    Failure::new(format!("line {n}: alignment {a} has no common multiple with the others"))
                })?;
            }
            table.lines.push((n, line));
            table.requests.push(r);
        }
        Ok(table)
    }

    /// The same with a column `offset`; one that is there is replaced.
    fn with_offsets(&self, offsets: &[u64]) -> String {
        let old = self.head.split(',').position(|c| c.trim() == "offset");
        let mut out = String::new();
        let mut row = |line: &str, last: &str| {
            for (c, cell) in line.split(',').enumerate().filter(|(c, _)| Some(*c) != old) {
                if c > 0 && !(old == Some(0) && c == 1) {
                    out.push(',');
                }
                out.push_str(cell);
            }
            out.push(',');
            out.push_str(last);
            out.push('\n');
        };
        row(self.head, "offset");
        for ((_, line), offset) in self.lines.iter().zip(offsets) {
            row(line, &offset.to_string());
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> String {
        Table::read(text).err().map(|e| e.message).unwrap_or_default()
    }

    #[test]
    fn alignments_are_kept_to() {
        let t = Table::read("id,lower,upper,size,alignment\n0,0,3,5,4\n1,1,2,6,8\n2,0,2,7,0\n").unwrap();
        assert_eq!(t.align, 8);
        let placed = place_within(&t.requests, t.align, None, TIME);
        assert!(placed.offsets.iter().all(|o| o % 8 == 0) && verified(&t, &placed).is_ok());
        let e = Table::read("id,lower,upper,size,alignment\n0,0,3,5,x\n").err().unwrap().message;
        assert!(e.starts_with("line 2: alignment `x` is no whole number"), "{e}");
        let e = Table::read("id,lower,upper,size,alignment\n0,0,3,5,18446744073709551557\n").err().unwrap().message;
        assert!(e.contains("no common multiple"), "{e}");
    }

    #[test]
    fn columns_go_by_name_and_others_stay() {
        let t = Table::read("size,id,note,lower,upper\r\n8,a,x,0,3\r\n\r\n4,b,y,2,5\r\n").unwrap();
        assert_eq!(t.requests[1], Request { first: 2, last: 5, size: 4 });
        assert_eq!(t.with_offsets(&[0, 8]), "size,id,note,lower,upper,offset\n8,a,x,0,3,0\n4,b,y,2,5,8\n");
        let t = Table::read("offset,id,lower,upper,size\n9,a,0,3,8\n").unwrap();
        assert_eq!(t.with_offsets(&[0]), "id,lower,upper,size,offset\na,0,3,8,0\n");
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        assert!(refused("").contains("is empty"));
        assert!(refused("id,lower,upper\n").starts_with("line 1: no column `size`"));
        assert!(refused("id,lower,upper,size\n0,1,2,3\n\n1,1,2\n").starts_with("line 4: 3 values for 4 columns"));
        assert!(refused("id,lower,upper,size\n0,1,-2,3\n").starts_with("line 2: upper `-2` is no whole number"));
        assert!(refused("id,lower,upper,size\n0,7,2,3\n").starts_with("line 2: upper 2 is before lower 7"));
    }

    #[test]
    fn a_capacity_is_read_from_the_name() {
        let c = |p: &str| capacity(Path::new(p));
        assert_eq!((c("x/A.1048576.csv"), c("G_1.csv"), c("a.b.csv"), c("12.csv")), (Some(1048576), None, None, None));
    }
}
