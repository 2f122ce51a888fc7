//! Files that outlive a crash of the system: written, and synced before they are named.

use crate::error::{Result, RuntimeError};
use safetensors::tensor::{Dtype, TensorView};
use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

/// A tensor for a file: name, type, shape, bytes.
pub type Saved<'a> = (String, Dtype, Vec<u64>, Cow<'a, [u8]>);

/// Writes a safetensors file and syncs it. Its metadata say `format: pt`, without which transformers does not read it.
///
/// # Errors
/// What the system refuses, and bytes that are not what their type and shape take.
pub fn write_tensors(path: &Path, tensors: &[Saved<'_>]) -> Result<()> {
    let what = || path.display().to_string();
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| {
            let shape = shape.iter().map(|d| *d as usize).collect();
            Ok((name.as_str(), TensorView::new(*dtype, shape, bytes)?))
        })
        .collect::<std::result::Result<Vec<_>, safetensors::SafeTensorError>>();
    let meta = HashMap::from([("format".to_string(), "pt".to_string())]);
    // The crate renames a file that only its owner may read; whoever shares the folder may read the others.
    let mode = File::create(path).and_then(|f| f.metadata()).map_err(RuntimeError::io(what()))?.permissions();
    views
        .and_then(|v| safetensors::serialize_to_file(v, Some(meta), path))
        .map_err(|e| RuntimeError::File { file: what(), why: format!("cannot be written: {e}") })?;
    fs::set_permissions(path, mode).map_err(RuntimeError::io(what()))?;
    sync(path)
}

/// Writes a file and syncs it.
///
/// # Errors
/// What the system refuses.
pub fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || {
        let mut f = File::create(path)?;
        f.write_all(bytes)?;
        f.sync_all()
    };
    write().map_err(RuntimeError::io(path.display().to_string()))
}

/// Makes the bytes of a file, or the names in a folder, outlive a crash of the system.
///
/// # Errors
/// What the system refuses.
pub fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|f| f.sync_all()).map_err(RuntimeError::io(path.display().to_string()))
}
