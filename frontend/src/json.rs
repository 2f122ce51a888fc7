//! JSON files: bounded reading, objects that refuse duplicate keys, and typed fields that remember what was looked at.

use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Configuration files above this size are refused; the largest real ones (tokenizers) stay far below.
const MAX_JSON_BYTES: u64 = 256 << 20;

/// Reads a whole JSON file as bytes, refusing absurd sizes.
pub(crate) fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    let size = std::fs::metadata(path).map_err(Error::io("read", path))?.len();
    if size > MAX_JSON_BYTES {
        return Err(Error::format(path, format!("{size} bytes is too large for a JSON file")));
    }
    std::fs::read(path).map_err(Error::io("read", path))
}

/// Reads a JSON file whose top level is an object.
pub(crate) fn read_object(path: &Path) -> Result<Map<String, Value>> {
    match serde_json::from_slice(&read_bytes(path)?) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(Error::format(path, "the top level must be a JSON object")),
        Err(e) => Err(Error::format(path, format!("not valid JSON: {e}"))),
    }
}

/// A JSON object in file order in which no key may occur twice.
#[derive(Debug)]
pub(crate) struct UniqueMap<V>(pub(crate) Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for UniqueMap<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Seen<V>(PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for Seen<V> {
            type Value = UniqueMap<V>;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self::Value, A::Error> {
                let (mut entries, mut names) = (Vec::new(), HashSet::new());
                while let Some((key, value)) = map.next_entry::<String, V>()? {
                    if !names.insert(key.clone()) {
                        return Err(serde::de::Error::custom(format!("`{key}` occurs twice")));
                    }
                    entries.push((key, value));
                }
                Ok(UniqueMap(entries))
            }
        }
        deserializer.deserialize_map(Seen(PhantomData))
    }
}

/// Typed access to the keys of one object; remembers which keys were read, so that the rest can be refused.
#[derive(Debug)]
pub(crate) struct Fields<'a> {
    path: PathBuf,
    prefix: String,
    map: &'a Map<String, Value>,
    seen: BTreeSet<String>,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(path: &Path, prefix: &str, map: &'a Map<String, Value>) -> Self {
        Fields { path: path.to_owned(), prefix: prefix.to_owned(), map, seen: BTreeSet::new() }
    }

    /// An error about `key`.
    pub(crate) fn fault(&self, key: &str, what: impl Into<String>) -> Error {
        Error::key(&self.path, format!("{}{key}", self.prefix), what)
    }

    /// The file, for messages.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the key occurs at all, null included.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// The raw value; null counts as absent.
    pub(crate) fn raw(&mut self, key: &str) -> Option<&'a Value> {
        self.seen.insert(key.to_owned());
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// A non-negative integer within `1..=max`.
    pub(crate) fn count(&mut self, key: &str, max: u64) -> Result<Option<u64>> {
        let Some(value) = self.raw(key) else { return Ok(None) };
        match value.as_u64() {
            Some(n) if (1..=max).contains(&n) => Ok(Some(n)),
            _ => Err(self.fault(key, format!("is {value}; expected an integer from 1 to {max}"))),
        }
    }

    /// A non-negative integer.
    pub(crate) fn whole(&mut self, key: &str) -> Result<Option<u64>> {
        let Some(value) = self.raw(key) else { return Ok(None) };
        value.as_u64().map(Some).ok_or_else(|| self.fault(key, format!("is {value}; expected an integer from 0")))
    }

    /// Like [`Fields::count`], and the key must be there.
    pub(crate) fn required_count(&mut self, key: &str, max: u64) -> Result<u64> {
        self.count(key, max)?.ok_or_else(|| self.fault(key, "is missing"))
    }

    /// A finite number.
    pub(crate) fn number(&mut self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.raw(key) else { return Ok(None) };
        match value.as_f64().filter(|x| x.is_finite()) {
            Some(x) => Ok(Some(x)),
            None => Err(self.fault(key, format!("is {value}; expected a number"))),
        }
    }

    /// A finite number above zero.
    pub(crate) fn positive(&mut self, key: &str) -> Result<Option<f64>> {
        match self.number(key)? {
            Some(x) if x <= 0.0 => Err(self.fault(key, format!("is {x}; expected a number above 0"))),
            other => Ok(other),
        }
    }

    pub(crate) fn flag(&mut self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.raw(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.fault(key, format!("is {value}; expected true or false")))
    }

    pub(crate) fn text(&mut self, key: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.raw(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.fault(key, format!("is {value}; expected a string")))
    }

    pub(crate) fn object(&mut self, key: &str) -> Result<Option<&'a Map<String, Value>>> {
        let Some(value) = self.raw(key) else { return Ok(None) };
        value.as_object().map(Some).ok_or_else(|| self.fault(key, format!("is {value}; expected an object")))
    }

    /// A string or a list of strings; `Ok(None)` when absent.
    pub(crate) fn strings(&mut self, key: &str) -> Result<Option<Vec<String>>> {
        match self.raw(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(vec![s.clone()])),
            Some(Value::Array(items)) => items
                .iter()
                .map(|v| v.as_str().map(str::to_owned))
                .collect::<Option<Vec<_>>>()
                .map(Some)
                .ok_or_else(|| self.fault(key, "must hold strings only")),
            Some(value) => Err(self.fault(key, format!("is {value}; expected a string or a list of strings"))),
        }
    }

    /// One token id or a list of them.
    pub(crate) fn ids(&mut self, key: &str) -> Result<Option<Vec<u32>>> {
        let Some(value) = self.raw(key) else { return Ok(None) };
        let one = std::slice::from_ref(value);
        let list = value.as_array().map_or(one, Vec::as_slice);
        // A negative id is how some configurations say "none".
        list.iter()
            .filter(|v| v.as_i64().is_none_or(|n| n >= 0))
            .map(|v| v.as_u64().and_then(|n| u32::try_from(n).ok()))
            .collect::<Option<Vec<_>>>()
            .map(Some)
            .ok_or_else(|| self.fault(key, format!("is {value}; expected a token id or a list of ids")))
    }

    /// Refuses `key` unless it is absent or "off" (see [`is_off`]).
    pub(crate) fn must_be_off(&mut self, key: &str, why: &str) -> Result<()> {
        match self.raw(key) {
            Some(value) if !is_off(value) => Err(self.fault(key, format!("is {}: {why}", brief(value)))),
            _ => Ok(()),
        }
    }

    /// Keys that were never read, with their values, in file order.
    pub(crate) fn unread(&self) -> impl Iterator<Item = (&'a String, &'a Value)> + '_ {
        self.map.iter().filter(|(key, _)| !self.seen.contains(*key))
    }
}

/// Whether a value switches nothing on: null, false, and empty strings, lists and objects.
pub(crate) fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(s) => s.is_empty(),
        Value::Array(a) => a.is_empty(),
        Value::Object(o) => o.is_empty(),
        _ => false,
    }
}

/// A value in at most 60 characters, for messages.
pub(crate) fn brief(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn duplicate_keys_are_refused() {
        let twice = serde_json::from_str::<UniqueMap<u32>>(r#"{"a": 1, "a": 2}"#);
        assert!(twice.unwrap_err().to_string().contains("`a` occurs twice"));
        let once = serde_json::from_str::<UniqueMap<u32>>(r#"{"b": 1, "a": 2}"#).unwrap();
        assert_eq!(once.0, [("b".to_owned(), 1), ("a".to_owned(), 2)]);
    }

    #[test]
    fn fields_check_types_and_remember() {
        let map = serde_json::json!({"n": 3, "x": null, "e": [2, 7], "m": -1, "left": 1});
        let mut fields = Fields::new(Path::new("c.json"), "", map.as_object().unwrap());
        assert_eq!(fields.count("n", 10).unwrap(), Some(3));
        assert!(fields.count("n", 2).unwrap_err().to_string().contains("from 1 to 2"));
        assert_eq!(fields.count("x", 2).unwrap(), None);
        assert_eq!(fields.ids("e").unwrap(), Some(vec![2, 7]));
        assert_eq!(fields.ids("m").unwrap(), Some(vec![]));
        assert_eq!(fields.unread().map(|(k, _)| k.as_str()).collect::<Vec<_>>(), ["left"]);
    }
}
