//! Paths in JSON: a text, or a list of bytes where the path is none.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Saved {
    Text(String),
    Bytes(Vec<u8>),
}

impl From<&Path> for Saved {
    fn from(path: &Path) -> Saved {
        match path.to_str() {
            Some(text) => Saved::Text(text.to_owned()),
            None => Saved::Bytes(path.as_os_str().as_bytes().to_vec()),
        }
    }
}

impl From<Saved> for PathBuf {
    fn from(saved: Saved) -> PathBuf {
        match saved {
            Saved::Text(text) => text.into(),
            Saved::Bytes(bytes) => OsString::from_vec(bytes).into(),
        }
    }
}

pub(super) fn serialize<S: Serializer>(path: &Path, to: S) -> Result<S::Ok, S::Error> {
    Saved::from(path).serialize(to)
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
    Ok(Saved::deserialize(from)?.into())
}

/// Paths with names.
pub(super) mod named {
    use super::Saved;
    use serde::{Deserialize, Deserializer, Serializer};
    use std::path::PathBuf;

    pub(in crate::pipeline) fn serialize<S: Serializer>(
        list: &[(Option<String>, PathBuf)],
        to: S,
    ) -> Result<S::Ok, S::Error> {
        to.collect_seq(list.iter().map(|(name, path)| (name, Saved::from(path.as_path()))))
    }

    pub(in crate::pipeline) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Vec<(Option<String>, PathBuf)>, D::Error> {
        let list = Vec::<(Option<String>, Saved)>::deserialize(from)?;
        Ok(list.into_iter().map(|(name, path)| (name, path.into())).collect())
    }
}
