//! Text ↔ token ids: `tokenizer.json` through the tokenizers library, and decoding as ids arrive.

use std::panic::catch_unwind;
use std::path::Path;

use serde::de::IgnoredAny;
use serde_json::Value;
use tokenizers::Tokenizer;

use crate::error::{Error, Result};
use crate::json::{Fields, read_bytes, read_object};

/// The tokenizer of a model folder.
#[derive(Debug, Clone)]
pub struct TextTokenizer {
    inner: Tokenizer,
}

impl TextTokenizer {
    /// Opens `dir/tokenizer.json`. Truncation and padding that the file may ask for are switched off: a forward pass
    /// here takes sequences of any length, unpadded.
    pub fn open(dir: &Path) -> Result<TextTokenizer> {
        if !dir.is_dir() {
            return Err(Error::format(
                dir,
                "is no folder; give a Hugging Face folder (`pleach import` makes one from GGUF)",
            ));
        }
        let path = dir.join("tokenizer.json");
        if !path.is_file() {
            return Err(Error::format(dir, "holds no tokenizer.json; pass token ids instead of text"));
        }
        let bytes = read_bytes(&path)?;
        // The library unwraps in places where the file is at fault: JSON is checked first, the rest is caught.
        serde_json::from_slice::<IgnoredAny>(&bytes)
            .map_err(|e| Error::format(&path, format!("not valid JSON: {e}")))?;
        let mut inner = catch_unwind(|| Tokenizer::from_bytes(&bytes))
            .map_err(|_| Error::format(&path, "is not a tokenizer that can be read"))?
            .map_err(|e| Error::format(&path, e.to_string()))?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| Error::format(&path, e.to_string()))?;
        Ok(TextTokenizer { inner })
    }

    /// Ids of a text; `special` adds what the file's post-processor puts around it ([CLS] … [SEP], a begin token).
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, special).map_err(|e| Error::Text(format!("encoding: {e}")))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of ids; `skip_special` leaves special tokens out.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.inner.decode(ids, skip_special).map_err(|e| Error::Text(format!("decoding: {e}")))
    }

    /// The id of a token, special tokens included.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The text of one token as the vocabulary spells it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Number of ids, added tokens included.
    pub fn size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Starts decoding as ids arrive; special tokens are left out.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream { tokenizer: self, ids: Vec::new(), start: 0, shown: 0 }
    }
}

/// Text as ids arrive. A character whose bytes are spread over several tokens is held back until it is whole.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a TextTokenizer,
    ids: Vec<u32>,
    /// First id of the window that is decoded again: decoders treat the first token of a text differently, so new
    /// text is the difference of two decodings of one window.
    start: usize,
    /// Ids before this one have been shown.
    shown: usize,
}

impl TextStream<'_> {
    /// Takes one id and gives the text that is complete with it, possibly none.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let before = self.tokenizer.decode(&self.ids[self.start..self.shown], true)?;
        let now = self.tokenizer.decode(&self.ids[self.start..], true)?;
        if now.ends_with('\u{FFFD}') || now.len() <= before.len() {
            return Ok(String::new());
        }
        let text = now.get(before.len()..).unwrap_or_default().to_owned();
        self.start = self.shown;
        self.shown = self.ids.len();
        Ok(text)
    }

    /// What was held back, with replacement characters for bytes that never became whole.
    pub fn finish(self) -> Result<String> {
        let before = self.tokenizer.decode(&self.ids[self.start..self.shown], true)?;
        let now = self.tokenizer.decode(&self.ids[self.start..], true)?;
        Ok(now.get(before.len()..).unwrap_or_default().to_owned())
    }

    /// All ids so far.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }
}

/// Ids that end generation: those of `generation_config.json`, else those of `config.json`.
pub fn eos_ids(dir: &Path) -> Result<Vec<u32>> {
    for file in ["generation_config.json", "config.json"] {
        let path = dir.join(file);
        if path.is_file() {
            let map = read_object(&path)?;
            if let Some(ids) = Fields::new(&path, "", &map).ids("eos_token_id")? {
                return Ok(ids);
            }
        }
    }
    Ok(Vec::new())
}

/// Special tokens by name (`bos_token`, `eos_token`, …) from `tokenizer_config.json`, for chat templates.
pub(crate) fn special_tokens(config: &serde_json::Map<String, Value>) -> Vec<(String, String)> {
    const NAMES: [&str; 7] =
        ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
    let text = |value: &Value| match value {
        Value::String(s) => Some(s.clone()),
        Value::Object(o) => o.get("content").and_then(Value::as_str).map(str::to_owned),
        _ => None,
    };
    NAMES.iter().filter_map(|name| Some(((*name).to_owned(), text(config.get(*name)?)?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Folder, folder};
    use serde_json::json;

    /// Byte-level BPE without merges: every byte is a token.
    fn bytes_tokenizer() -> (TextTokenizer, Folder) {
        let mut alphabet: Vec<char> =
            tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
        alphabet.sort_unstable();
        let mut vocab: serde_json::Map<_, _> =
            alphabet.iter().enumerate().map(|(i, c)| (c.to_string(), json!(i + 1))).collect();
        vocab.insert("<|end|>".into(), json!(0));
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        let file = json!({
            "version": "1.0", "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
            "padding": null, "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
            "added_tokens": [{"id": 0, "content": "<|end|>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []}
        });
        let dir = folder("tokenizer");
        std::fs::write(dir.join("tokenizer.json"), file.to_string()).unwrap();
        (TextTokenizer::open(&dir).unwrap(), dir)
    }

    #[test]
    fn round_trip_without_truncation() {
        let (tokenizer, _dir) = bytes_tokenizer();
        let ids = tokenizer.encode("häßlich 🌳<|end|>", true).unwrap();
        assert_eq!((ids.len(), ids[14]), (15, 0));
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), "häßlich 🌳");
        assert_eq!(tokenizer.id("<|end|>"), Some(0));
    }

    #[test]
    fn characters_are_held_back_until_whole() {
        let (tokenizer, _dir) = bytes_tokenizer();
        let ids = tokenizer.encode("aé🌳 b", false).unwrap();
        let mut stream = tokenizer.stream();
        let pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        assert_eq!(pieces, ["a", "", "é", "", "", "", "🌳", " ", "b"]);
        assert_eq!(stream.finish().unwrap(), "");
        let mut cut = tokenizer.stream();
        ids[..2].iter().for_each(|&id| drop(cut.push(id).unwrap()));
        assert_eq!(cut.finish().unwrap(), "\u{FFFD}");
    }

    #[test]
    fn generation_config_decides_the_end() {
        let dir = folder("eos");
        std::fs::write(dir.join("config.json"), r#"{"eos_token_id": 2}"#).unwrap();
        assert_eq!(eos_ids(&dir).unwrap(), [2]);
        std::fs::write(dir.join("generation_config.json"), r#"{"eos_token_id": [0, 2]}"#).unwrap();
        assert_eq!(eos_ids(&dir).unwrap(), [0, 2]);
    }
}
