//! The file: header, section table, manifest, blobs.
//!
//! ```text
//! magic      8 bytes  "PLEACHPL"
//! version    u32      little endian, as all numbers
//! sections   u32      1 + number of blobs
//! table      per section: length u64, SHA-256 of the bytes (32)
//! digest     SHA-256 of everything before it (32)
//! sections   one after another, nothing between or after them; the first is the manifest, JSON
//! ```
//!
//! The same plan gives the same bytes. Digests find damage, not malice: [`crate::validate`] is what makes a foreign
//! manifest safe, and code sections are trusted like an executable.

use crate::error::PlanError;
use crate::types::Plan;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

/// First bytes of a plan.
pub const MAGIC: &[u8; 8] = b"PLEACHPL";
/// What this crate reads and writes. It counts up whenever a manifest is spelled otherwise or its words, or what kernels are handed,
/// mean something else; a plan of another version is refused as such.
pub const FORMAT_VERSION: u32 = 2;

const MAX_SECTIONS: u32 = 4096;

impl Plan {
    /// The bytes of the file.
    ///
    /// # Errors
    /// [`PlanError::Invalid`] when the plan does not validate: what is written can be read.
    pub fn to_bytes(&self) -> Result<Vec<u8>, PlanError> {
        crate::validate(self)?;
        let manifest = serde_json::to_vec(self).map_err(|e| PlanError::Damaged(e.to_string()))?;
        let sections: Vec<&[u8]> =
            std::iter::once(manifest.as_slice()).chain(self.blobs.iter().map(|b| b.bytes.as_slice())).collect();
        let mut out = vec![];
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        out.extend_from_slice(&(sections.len() as u32).to_le_bytes());
        for s in &sections {
            out.extend_from_slice(&(s.len() as u64).to_le_bytes());
            out.extend_from_slice(&Sha256::digest(s));
        }
        let d = Sha256::digest(&out);
        out.extend_from_slice(&d);
        for s in sections {
            out.extend_from_slice(s);
        }
        Ok(out)
    }

    /// Reads the bytes of a file: every digest, then [`crate::validate`].
    ///
    /// # Errors
    /// [`PlanError::Damaged`], [`PlanError::Version`] or [`PlanError::Invalid`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Plan, PlanError> {
        let bad = |s: &str| PlanError::Damaged(s.to_string());
        let mut at = 0usize;
        let mut take = |n: u64| -> Result<&[u8], PlanError> {
            let n = usize::try_from(n).map_err(|_| bad("a section is longer than the file"))?;
            let end = at.checked_add(n).filter(|e| *e <= bytes.len()).ok_or_else(|| bad("the file is cut off"))?;
            let s = &bytes[at..end];
            at = end;
            Ok(s)
        };
        let u32_of = |s: &[u8]| u32::from_le_bytes([s[0], s[1], s[2], s[3]]);
        if take(8)? != MAGIC {
            return Err(bad("it does not start with the mark of a plan file"));
        }
        let version = u32_of(take(4)?);
        if version != FORMAT_VERSION {
            return Err(PlanError::Version { found: version, expected: FORMAT_VERSION });
        }
        let n = u32_of(take(4)?);
        if n == 0 || n > MAX_SECTIONS {
            return Err(bad("its section table has no sensible length"));
        }
        let mut table = vec![];
        for _ in 0..n {
            let len = take(8)?;
            let len = u64::from_le_bytes([len[0], len[1], len[2], len[3], len[4], len[5], len[6], len[7]]);
            table.push((len, take(32)?));
        }
        let head = 16 + 40 * n as usize;
        if take(32)? != Sha256::digest(&bytes[..head]).as_slice() {
            return Err(bad("the digest of its header does not fit"));
        }
        let mut sections = vec![];
        for (i, (len, digest)) in table.into_iter().enumerate() {
            let s = take(len)?;
            if Sha256::digest(s).as_slice() != digest {
                return Err(PlanError::Damaged(format!("the digest of section {i} does not fit")));
            }
            sections.push(s);
        }
        if at != bytes.len() {
            return Err(bad("bytes follow its last section"));
        }
        let blobs: Vec<Vec<u8>> = sections[1..].iter().map(|s| s.to_vec()).collect();
        Plan::from_manifest(sections[0], blobs)
    }

    /// A plan from a manifest and its blobs, validated. This is what lies behind the digests.
    ///
    /// # Errors
    /// [`PlanError::Damaged`] or [`PlanError::Invalid`].
    pub fn from_manifest(manifest: &[u8], blobs: Vec<Vec<u8>>) -> Result<Plan, PlanError> {
        let mut plan: Plan =
            serde_json::from_slice(manifest).map_err(|e| PlanError::Damaged(format!("its manifest: {e}")))?;
        if plan.blobs.len() != blobs.len() {
            return Err(PlanError::Damaged(format!(
                "its manifest names {} blobs, the file has {}",
                plan.blobs.len(),
                blobs.len()
            )));
        }
        for (b, bytes) in plan.blobs.iter_mut().zip(blobs) {
            b.bytes = bytes;
        }
        crate::validate(&plan)?;
        Ok(plan)
    }

    /// Writes the file under a temporary name, syncs it and renames it, so that a reader sees all or nothing.
    ///
    /// # Errors
    /// [`PlanError::Io`] or [`PlanError::Invalid`].
    pub fn write(&self, path: &Path) -> Result<(), PlanError> {
        let bytes = self.to_bytes()?;
        let io = |source| PlanError::Io { path: path.display().to_string(), source };
        let mut tmp = path.as_os_str().to_owned();
        tmp.push(format!(".{}.tmp", std::process::id()));
        let tmp = Path::new(&tmp);
        let done = (|| {
            let mut f = File::create(tmp)?;
            f.write_all(&bytes)?;
            f.sync_all()?;
            fs::rename(tmp, path)
        })();
        if done.is_err() {
            let _ = fs::remove_file(tmp);
        }
        done.map_err(io)
    }

    /// Reads a file.
    ///
    /// # Errors
    /// [`PlanError::Io`], and those of [`Plan::from_bytes`].
    pub fn read(path: &Path) -> Result<Plan, PlanError> {
        let bytes = fs::read(path).map_err(|source| PlanError::Io { path: path.display().to_string(), source })?;
        Plan::from_bytes(&bytes)
    }
}
