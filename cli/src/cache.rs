//! The compile cache: plans by what they were compiled from.
//!
//! A key is the digest of the imported graph's text, the facts that go into the plan, target, options and this
//! program; never of weight values. A plan is written under a temporary name and renamed, so that several programs may
//! share a cache. A file that does not read is compiled again.

use crate::failure::{Failure, Result};
use crate::pipeline::Row;
use pleach_plan::Plan;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// Where plans are kept: `PLEACH_CACHE_DIR`, else `pleach` in `XDG_CACHE_HOME` or `~/.cache`.
pub(crate) fn folder() -> Option<PathBuf> {
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    var("PLEACH_CACHE_DIR")
        .or_else(|| var("XDG_CACHE_HOME").map(|p| p.join("pleach")))
        .or_else(|| var("HOME").map(|p| p.join(".cache").join("pleach")))
}

/// Number of plans in the cache and their bytes.
pub(crate) fn usage(folder: &Path) -> (usize, u64) {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let plans = entries.filter(|e| e.path().extension().is_some_and(|x| x == "pleach"));
    plans.fold((0, 0), |(n, b), e| (n + 1, b + e.metadata().map_or(0, |m| m.len())))
}

/// What distinguishes one build of this program from another: version, size and time of the executable.
pub(crate) fn program() -> String {
    let facts = std::env::current_exe().and_then(std::fs::metadata).map(|m| {
        let time = m.modified().ok().and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
        format!("{} {}", m.len(), time.map_or(0, |t| t.as_nanos()))
    });
    format!("{} {}", env!("CARGO_PKG_VERSION"), facts.unwrap_or_default())
}

/// A key from parts; the boundaries between parts count.
pub(crate) fn key(parts: &[&str]) -> String {
    let mut h = Sha256::new();
    for p in parts {
        h.update((p.len() as u64).to_le_bytes());
        h.update(p.as_bytes());
    }
    h.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// The place of a key.
#[derive(Debug)]
pub(crate) struct Slot {
    /// The plan.
    pub plan: PathBuf,
    rows: PathBuf,
    /// Taken away when dropped: the caller wants nothing kept.
    temporary: Option<PathBuf>,
}

impl Slot {
    /// The place in the cache, whose folder is made; a place for this run alone when `keep` is false or the folder can neither be
    /// found nor made.
    ///
    /// # Errors
    /// No folder can be made anywhere.
    pub(crate) fn new(key: &str, keep: bool) -> Result<Slot> {
        let kept = folder().filter(|f| keep && std::fs::create_dir_all(f).is_ok());
        let (dir, temporary) = match kept {
            Some(dir) => (dir, None),
            None => {
                let dir =
                    std::env::temp_dir().join(format!("pleach-{}-{}", std::process::id(), &key[..key.len().min(16)]));
                std::fs::create_dir_all(&dir).map_err(Failure::io("create", &dir))?;
                (dir.clone(), Some(dir))
            }
        };
        let path = |ending: &str| dir.join(format!("{key}.{ending}"));
        Ok(Slot { plan: path("pleach"), rows: path("json"), temporary })
    }

    /// The place of the same key that a plan can be written to: one for this run alone where the cache's folder can only be read.
    ///
    /// # Errors
    /// No folder can be made anywhere.
    pub(crate) fn writable(self) -> Result<Slot> {
        let probe = self.plan.with_extension(format!("{}.probe", std::process::id()));
        let made = std::fs::File::create(&probe).is_ok();
        let _ = std::fs::remove_file(&probe);
        match self.plan.file_stem() {
            Some(key) if !made && self.temporary.is_none() => Slot::new(&key.to_string_lossy(), false),
            _ => Ok(self),
        }
    }

    /// The plan that is there, with the report of its compilation.
    pub(crate) fn find(&self) -> Option<(Plan, Vec<Row>)> {
        let plan = Plan::read(&self.plan).ok()?;
        let rows = std::fs::read(&self.rows).ok().and_then(|b| serde_json::from_slice(&b).ok());
        Some((plan, rows.unwrap_or_default()))
    }

    /// Says what can be done where the plan could not be written.
    pub(crate) fn explain(&self, mut e: Failure) -> Failure {
        if self.temporary.is_none() && e.message.contains(&*self.plan.to_string_lossy()) {
            e.message += "; PLEACH_CACHE_DIR names another folder for the cache, --no-cache keeps nothing";
        }
        e
    }

    /// Keeps the report of a compilation beside its plan. A report that cannot be kept is not missed.
    pub(crate) fn keep_rows(&self, rows: &[Row]) {
        let _ = crate::files::write(&self.rows, &serde_json::to_string(rows).unwrap_or_default());
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(dir) = &self.temporary {
            let _ = std::fs::remove_dir_all(dir);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_depend_on_every_part_and_its_boundary() {
        assert_ne!(key(&["ab", "c"]), key(&["a", "bc"]));
        assert_ne!(key(&["a"]), key(&["a", ""]));
        assert_eq!(key(&["a", "b"]).len(), 64);
        assert_eq!(key(&["a", "b"]), key(&["a", "b"]));
    }
}
