//! Files and folders that are whole or not there, and which files are the same.

use crate::failure::{Failure, Result};
use pleach_runtime::files::sync;
use std::path::{Path, PathBuf};

/// Makes a file under a temporary name, syncs and renames it. Where the name is a link, what it leads to is replaced; where it is a
/// device or a pipe, that gets the bytes.
///
/// # Errors
/// Those of `make`, and what the system refuses; what was there before stays.
pub(crate) fn put<T>(to: &Path, make: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    if to.metadata().is_ok_and(|m| !m.is_file() && !m.is_dir()) {
        return pour(to, make);
    }
    let place = to.canonicalize().unwrap_or_else(|_| to.to_owned());
    let mut temporary = place.as_os_str().to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    let temporary = PathBuf::from(temporary);
    let done = make(&temporary).and_then(|made| {
        sync(&temporary)?;
        std::fs::rename(&temporary, &place).map_err(Failure::io("write", to))?;
        sync(above(&place))?;
        Ok(made)
    });
    if done.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    done
}

/// Makes a file elsewhere and writes its bytes into what is no file.
fn pour<T>(to: &Path, make: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    let folder = std::env::temp_dir().join(format!("pleach-{}.out", std::process::id()));
    std::fs::create_dir(&folder).map_err(Failure::io("create", &folder))?;
    let file = folder.join("out");
    let done = make(&file).and_then(|made| {
        let copied = std::fs::File::open(&file).and_then(|mut from| {
            let mut into = std::fs::OpenOptions::new().write(true).open(to)?;
            std::io::copy(&mut from, &mut into)
        });
        copied.map_err(Failure::io("write", to))?;
        Ok(made)
    });
    let _ = std::fs::remove_dir_all(&folder);
    done
}

/// Writes a text as [`put`] does.
///
/// # Errors
/// What the system refuses; what was there before stays.
pub(crate) fn write(to: &Path, text: &str) -> Result<()> {
    put(to, |temporary| std::fs::write(temporary, text).map_err(Failure::io("write", to)))
}

/// A folder for results, with what was made for it: whatever of that is still empty at the end goes away again.
pub(crate) struct Begun(Vec<PathBuf>);

impl Begun {
    /// Makes the folder and those above it.
    ///
    /// # Errors
    /// What the system refuses; nothing is left of what was made.
    pub(crate) fn new(folder: &Path) -> Result<Begun> {
        let missing = |p: &&Path| !p.as_os_str().is_empty() && !p.exists();
        let begun = Begun(folder.ancestors().take_while(missing).map(Path::to_owned).collect());
        std::fs::create_dir_all(folder).map_err(Failure::io("create", folder))?;
        Ok(begun)
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        // From the inside out; a folder with something in it stays.
        self.0.iter().for_each(|p| drop(std::fs::remove_dir(p)));
    }
}

/// Syncs a finished folder and renames it to its place, where nothing is or an empty folder.
///
/// # Errors
/// What the system refuses.
#[cfg(feature = "models")]
pub(crate) fn put_folder(temporary: &Path, to: &Path) -> Result<()> {
    sync_all(temporary)?;
    let _ = std::fs::remove_dir(to);
    std::fs::rename(temporary, to).map_err(Failure::io("write", to))?;
    Ok(sync(above(to))?)
}

/// Syncs the files of a folder, and the folder.
///
/// # Errors
/// What the system refuses.
#[cfg(feature = "models")]
pub(crate) fn sync_all(folder: &Path) -> Result<()> {
    for e in std::fs::read_dir(folder).map_err(Failure::io("read", folder))? {
        let path = e.map_err(Failure::io("read", folder))?.path();
        if path.is_dir() { sync_all(&path)? } else { sync(&path)? }
    }
    Ok(sync(folder)?)
}

/// The folder that a name is in.
pub(crate) fn above(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Whether two paths that are there name one file or folder.
pub(crate) fn same(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(x), Ok(y)) if x == y)
}
