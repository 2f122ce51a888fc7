//! Event files as TensorBoard reads them: records with masked CRC-32C (Castagnoli) around `tensorflow.Event` messages.
//!
//! Source of the form: TensorFlow's `record_writer.h` and `event.proto`. Only scalars are written, and the mark of a
//! session's start, after which TensorBoard drops what an earlier session wrote for later steps.

use crate::failure::{Failure, Result};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Folder of the event files in a run's folder.
pub(crate) const FOLDER: &str = "tensorboard";

/// What the names of event files begin with, and what those of this program hold.
const NAME: [&str; 2] = ["events.out.tfevents.", ".pleach."];

/// Removes the event files of earlier runs in a run's folder, and their folder if nothing else is in it.
///
/// # Errors
/// What the system refuses.
pub(crate) fn remove(dir: &Path) -> Result<()> {
    let folder = dir.join(FOLDER);
    if !folder.is_dir() {
        return Ok(());
    }
    for entry in std::fs::read_dir(&folder).map_err(Failure::io("read", &folder))? {
        let path = entry.map_err(Failure::io("read", &folder))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(NAME[0]) && name.contains(NAME[1]) {
            std::fs::remove_file(&path).map_err(Failure::io("remove", &path))?;
        }
    }
    // Fails where there is something else, which stays.
    let _ = std::fs::remove_dir(&folder);
    Ok(())
}

/// An event file that is written.
#[derive(Debug)]
pub(crate) struct Events {
    path: PathBuf,
    file: File,
}

impl Events {
    /// A new file in `dir/tensorboard`, for a session whose first step comes after `done`.
    ///
    /// # Errors
    /// What the system refuses.
    pub(crate) fn new(dir: &Path, done: u64) -> Result<Events> {
        let folder = dir.join(FOLDER);
        std::fs::create_dir_all(&folder).map_err(Failure::io("create", &folder))?;
        let now = now();
        let mut n = 0;
        loop {
            let name = format!("{}{:010}{}{}.{n}", NAME[0], now as u64, NAME[1], std::process::id());
            let path = folder.join(name);
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => {
                    let mut out = Events { path, file };
                    out.record(&event(now, 0, 3, b"brain.Event:2"))?;
                    // SessionLog { status: START }.
                    out.record(&event(now, done + 1, 7, &[0x08, 1]))?;
                    return Ok(out);
                }
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => n += 1,
                Err(e) => return Err(Failure::io("create", &path)(e)),
            }
        }
    }

    /// Writes numbers of a step under their names.
    ///
    /// # Errors
    /// What the system refuses.
    pub(crate) fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let mut summary = vec![];
        for (tag, value) in values {
            // Summary.Value { tag, simple_value }.
            let mut v = vec![];
            field(&mut v, 1, tag.as_bytes());
            v.push(0x15);
            v.extend((*value as f32).to_le_bytes());
            field(&mut summary, 1, &v);
        }
        self.record(&event(now(), step, 5, &summary))
    }

    fn record(&mut self, data: &[u8]) -> Result<()> {
        let length = (data.len() as u64).to_le_bytes();
        let mut out = length.to_vec();
        out.extend(masked(&length).to_le_bytes());
        out.extend(data);
        out.extend(masked(data).to_le_bytes());
        self.file.write_all(&out).map_err(Failure::io("write", &self.path))
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// Event { wall_time, step, and one field of bytes }.
fn event(time: f64, step: u64, number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![0x09];
    out.extend(time.to_le_bytes());
    out.push(0x10);
    varint(&mut out, step);
    field(&mut out, number, bytes);
    out
}

/// A field of bytes with its length.
fn field(out: &mut Vec<u8>, number: u8, bytes: &[u8]) {
    out.push(number << 3 | 2);
    varint(out, bytes.len() as u64);
    out.extend(bytes);
}

fn varint(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

/// The checksum of a record's parts.
fn masked(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C, bit by bit: records are short.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut c = !0u32;
    for b in bytes {
        c ^= u32::from(*b);
        for _ in 0..8 {
            c = (c >> 1) ^ (0x82f6_3b78 & (c & 1).wrapping_neg());
        }
    }
    !c
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_the_published_ones() {
        // RFC 3720, B.4, and the usual check value.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    }

    #[test]
    fn a_file_holds_records_that_can_be_walked() {
        let dir = std::env::temp_dir().join(format!("pleach-events-{}", std::process::id()));
        let mut e = Events::new(&dir, 4).unwrap();
        e.scalars(300, &[("train/loss", 1.5), ("train/learning_rate", 2e-4)]).unwrap();
        let bytes = std::fs::read(&e.path).unwrap();
        let _ = std::fs::remove_dir_all(&dir);
        let mut at = 0;
        let mut records = vec![];
        while at < bytes.len() {
            let n = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
            let sum = |i: usize| u32::from_le_bytes(bytes[i..i + 4].try_into().unwrap());
            assert_eq!(sum(at + 8), masked(&bytes[at..at + 8]));
            let data = &bytes[at + 12..at + 12 + n];
            assert_eq!(sum(at + 12 + n), masked(data));
            records.push(data.to_vec());
            at += n + 16;
        }
        assert_eq!(records.len(), 3);
        assert!(records[0].ends_with(b"\x1a\x0dbrain.Event:2"));
        assert_eq!(records[1][9..], [0x10, 5, 0x3a, 2, 8, 1]);
        assert_eq!(records[2][9..12], [0x10, 0xac, 0x02]);
        let tag = b"\x0a\x0atrain/loss\x15\x00\x00\xc0\x3f";
        assert!(records[2].windows(tag.len()).any(|w| w == tag));
    }
}
