//! Weights in blocks of codes: whether those of a model folder still stand for its weights.
//!
//! Blocks are read in place of f32 weights only when they expand to the same bits. Comparing reads all weights once; the
//! answer is kept in the cache's folder under what tells one state of the files from another (device, inode, length, times
//! of writing and of change), so that a later start asks the file system alone.

use crate::cache;
use crate::failure::{Failure, Result};
use crate::model::Model;
use crate::report::Ui;
use pleach_frontend::blocks;
use pleach_ir::BlockFormat;
use pleach_plan::{Layout, Plan};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Once;
use std::time::{Duration, SystemTime};

/// A file that was written less than this before it was looked at may be written again without a change of its times: clocks of
/// file systems tick in some milliseconds.
const SETTLED: Duration = Duration::from_millis(200);

/// How much of the blocks is looked at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Compare {
    /// All: weights are about to be read.
    All,
    /// Some rows of every tensor, where a plan is made and nothing is read yet: who reads the weights compares them whole.
    Sample,
}

impl Compare {
    /// Of how many rows one is looked at.
    fn every(self) -> usize {
        match self {
            Compare::All => 1,
            Compare::Sample => 256,
        }
    }
}

/// The tensors of a model that may be read as blocks: all that its folder has so, when they stand for its weights. When
/// they do not, none, and a remark says what to do.
///
/// # Errors
/// A file with blocks that is damaged, or that does not fit the weights' names and shapes.
pub(crate) fn usable(ui: &Ui, model: &Model, keep: bool, compare: Compare) -> Result<BTreeMap<String, BlockFormat>> {
    let formats = blocks::formats(&model.checkpoint)?;
    if formats.is_empty() {
        return Ok(formats);
    }
    let Some(tensor) = difference(ui, model, &formats, keep, compare)? else { return Ok(formats) };
    static SAID: Once = Once::new();
    SAID.call_once(|| {
        let (dir, folder) = (model.dir().display(), model.dir().join(blocks::FOLDER));
        ui.note(&format!(
            "{dir}: the weights have changed since they were imported (tensor `{tensor}`), so their blocks are not used; import \
             the model again, or delete {}",
            folder.display()
        ));
    });
    Ok(BTreeMap::new())
}

/// Whether the blocks that a compiled plan reads have been compared with the weights of this model. False for a plan that reads
/// none, and where there are none to compare.
///
/// # Errors
/// Blocks that do not stand for the weights, or do not fit them.
pub(crate) fn compared(ui: &Ui, model: &Model, plan: &Plan, keep: bool) -> Result<bool> {
    if !plan.params.iter().any(|p| matches!(p.layout, Layout::Blocks(_))) {
        return Ok(false);
    }
    let formats = blocks::formats(&model.checkpoint)?;
    if formats.is_empty() {
        return Ok(false);
    }
    match difference(ui, model, &formats, keep, Compare::All)? {
        None => Ok(true),
        Some(tensor) => Err(Failure::new(format!(
            "{}: the plan reads the weights in blocks, and these do not stand for the weights, which have changed since they were \
             imported (tensor `{tensor}`); import the model again, or compile the plan again with --no-blocks",
            model.dir().display()
        ))),
    }
}

/// The first tensor whose blocks give other values; from the cache's folder if the same files have been compared before.
fn difference(
    ui: &Ui,
    model: &Model,
    formats: &BTreeMap<String, BlockFormat>,
    keep: bool,
    compare: Compare,
) -> Result<Option<String>> {
    let file = blocks::file(model.dir());
    let paths: Vec<&Path> = model.files().into_iter().chain([file.as_path()]).collect();
    let (facts, settled) = state(&paths)?;
    let place = cache::folder().filter(|f| keep && std::fs::create_dir_all(f).is_ok());
    let place = place.map(|f| f.join(format!("{}.blocks", cache::key(&["blocks", &facts]))));
    if let Some(known) = place.as_deref().and_then(recall) {
        return Ok(known);
    }
    let names: Vec<&str> = formats.keys().map(String::as_str).collect();
    let found = pleach_runtime::first_difference(&*model.weights()?, &names, ui.threads, compare.every());
    let sure = compare == Compare::All || found.is_some();
    if let Some(place) = place.filter(|_| settled && sure) {
        remember(&place, found.as_deref());
    }
    Ok(found)
}

/// What distinguishes this state of the files from any other, and whether a later change would show.
fn state(paths: &[&Path]) -> Result<(String, bool)> {
    let now = SystemTime::now();
    let (mut facts, mut settled) = (String::new(), true);
    for path in paths {
        let m = std::fs::metadata(path).map_err(Failure::io("read", path))?;
        let _ = write!(facts, "{} {} {} ", m.dev(), m.ino(), m.len());
        for (seconds, nanos) in [(m.mtime(), m.mtime_nsec()), (m.ctime(), m.ctime_nsec())] {
            let _ = write!(facts, "{seconds}.{nanos:09} ");
            let at = Duration::new(u64::try_from(seconds).unwrap_or(0), u32::try_from(nanos).unwrap_or(0));
            settled &= now.duration_since(SystemTime::UNIX_EPOCH + at).is_ok_and(|age| age > SETTLED);
        }
    }
    Ok((facts, settled))
}

const SAME: &str = "same";
const DIFFERS: &str = "differs ";

/// An answer that is kept: none where the blocks stand for the weights, else the tensor that differs.
fn recall(place: &Path) -> Option<Option<String>> {
    match std::fs::read_to_string(place).ok()?.strip_suffix('\n')? {
        SAME => Some(None),
        other => Some(Some(other.strip_prefix(DIFFERS)?.to_string())),
    }
}

/// Keeps an answer. One that cannot be kept is found again.
fn remember(place: &Path, found: Option<&str>) {
    let text = found.map_or(format!("{SAME}\n"), |tensor| format!("{DIFFERS}{tensor}\n"));
    let _ = crate::files::write(place, &text);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_kept_whole_or_not_at_all() {
        let place = std::env::temp_dir().join(format!("pleach-answer-{}.blocks", std::process::id()));
        for found in [None, Some("a.weight")] {
            remember(&place, found);
            assert_eq!(recall(&place), Some(found.map(String::from)));
            let whole = std::fs::read(&place).unwrap();
            for cut in 0..whole.len() {
                std::fs::write(&place, &whole[..cut]).unwrap();
                assert_eq!(recall(&place), None, "cut at {cut}");
            }
        }
        std::fs::remove_file(&place).unwrap();
        assert_eq!(recall(&place), None);
    }

    #[test]
    fn a_change_of_a_file_shows() {
        let path = std::env::temp_dir().join(format!("pleach-state-{}", std::process::id()));
        std::fs::write(&path, "a").unwrap();
        let (first, settled) = state(&[&path]).unwrap();
        assert!(!settled, "just written");
        std::thread::sleep(SETTLED + Duration::from_millis(50));
        assert_eq!(state(&[&path]).unwrap(), (first.clone(), true));
        std::fs::write(&path, "b").unwrap();
        assert_ne!(state(&[&path]).unwrap().0, first);
        std::fs::remove_file(&path).unwrap();
        assert!(state(&[&path]).is_err());
    }
}
