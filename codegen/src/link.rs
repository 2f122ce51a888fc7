//! Objects to one shared object.
//!
//! The linker runs at compile time only. The bytes depend on the objects and their order alone: no build id, no
//! directory, no time.

use crate::error::CodegenError;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// A directory that goes away with its value.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> std::io::Result<Scratch> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("pleach-link-{}-{n}", std::process::id()));
        // Not `create_dir_all`: a directory of that name must not exist, whoever made it.
        std::fs::create_dir(&path)?;
        Ok(Scratch(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn fault(why: impl Into<String>) -> CodegenError {
    CodegenError::Link { why: why.into() }
}

/// Links relocatable objects into a shared object. Undefined symbols are taken from the mathematics library.
///
/// Uses the `cc` of the search path, or what the environment variable `CC` names.
///
/// # Errors
/// [`CodegenError::Link`] when there is no linker, the directory for temporary files cannot be written, or a symbol is
/// missing.
pub fn link(objects: &[Vec<u8>]) -> Result<Vec<u8>, CodegenError> {
    if objects.is_empty() {
        return Err(fault("there is no object to link"));
    }
    let dir = Scratch::new().map_err(|e| fault(format!("the directory for temporary files: {e}")))?;
    let mut names = vec![];
    for (i, bytes) in objects.iter().enumerate() {
        let name = format!("k{i}.o");
        std::fs::write(dir.0.join(&name), bytes).map_err(|e| fault(format!("{name}: {e}")))?;
        names.push(name);
    }
    run(&dir.0, &names)?;
    std::fs::read(dir.0.join("kernels.so")).map_err(|e| fault(format!("kernels.so: {e}")))
}

fn run(dir: &Path, names: &[String]) -> Result<(), CodegenError> {
    let cc = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
    // No C runtime files and no libc: the kernels call nothing but libm, if that. Relative names keep the directory out.
    let out = Command::new(&cc)
        .current_dir(dir)
        .args(["-shared", "-nostdlib", "-Wl,--build-id=none", "-Wl,-soname,kernels.so", "-Wl,-z,noexecstack"])
        .args(["-Wl,--no-undefined", "-s", "-o", "kernels.so"])
        .args(names)
        .args(["-Wl,--as-needed", "-lm", "-lc"])
        .output()
        .map_err(|e| fault(format!("{} cannot be run: {e}; on Debian: apt install gcc", cc.to_string_lossy())))?;
    if out.status.success() { Ok(()) } else { Err(fault(String::from_utf8_lossy(&out.stderr).trim().to_string())) }
}
