//! Text files that are whole or not there, and which files are the same.

use crate::failure::{Failure, Result};
use std::path::{Path, PathBuf};

/// Writes a file under a temporary name that is renamed.
///
/// # Errors
/// What the system refuses; what was there before stays.
pub(crate) fn write(to: &Path, text: &str) -> Result<()> {
    let mut temporary = to.as_os_str().to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    let temporary = PathBuf::from(temporary);
    let done = std::fs::write(&temporary, text).and_then(|()| std::fs::rename(&temporary, to));
    done.map_err(|e| {
        let _ = std::fs::remove_file(&temporary);
        Failure::io("write", to)(e)
    })
}

/// Whether two paths that are there name one file or folder.
pub(crate) fn same(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(x), Ok(y)) if x == y)
}
