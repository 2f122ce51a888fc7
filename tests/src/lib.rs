//! What the project's tests share: golden files, seeded values, random graphs, comparison of graphs by running them.
//!
//! The tests themselves are in `tests/`: `golden` (one trial per file of `golden/`), `tidy` (the house rules),
//! `properties` (random graphs through passes and schedules), `corpus` (stored inputs of the fuzz targets). Tests of
//! compiled code need the feature `llvm`.

pub mod compare;
#[cfg(feature = "llvm")]
pub mod compiled;
pub mod fixtures;
pub mod golden;
#[cfg(feature = "llvm")]
pub mod gpu;
pub mod matrix;
pub mod methods;
pub mod random;
pub mod readers;
#[cfg(feature = "llvm")]
pub mod renewed;
pub mod shaped;
pub mod training;
pub mod values;

use std::path::{Path, PathBuf};

/// The root folder of the project.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// Every file below a folder, sorted by path; a missing folder has none.
pub fn files(dir: &Path) -> Vec<PathBuf> {
    let mut out = vec![];
    let mut stack = vec![dir.to_path_buf()];
    while let Some(d) = stack.pop() {
        for e in std::fs::read_dir(&d).into_iter().flatten().flatten() {
            match e.file_type() {
                Ok(t) if t.is_dir() => stack.push(e.path()),
                Ok(t) if t.is_file() => out.push(e.path()),
                _ => {}
            }
        }
    }
    out.sort();
    out
}
