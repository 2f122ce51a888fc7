//! The tokenizer of a GGUF file, rebuilt as Hugging Face files.
//!
//! Handles ggml's `gpt2` model (byte-level BPE) with the pre-tokenizers named in [`pre_tokenizer`]; other models and
//! names are refused. Sources: ggml's `llama-vocab.cpp` for the meaning of names and token types, the tokenizers
//! library for the file format.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::reader::{Gguf, Metadata};
use crate::error::{Error, Result};

/// ggml's token types.
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;
const UNUSED: u64 = 5;

/// The files that make up a tokenizer, as JSON values, and the ids that generation needs.
pub(super) struct TokenizerFiles {
    pub(super) tokenizer: Value,
    pub(super) tokenizer_config: Value,
    pub(super) special_tokens_map: Value,
    pub(super) tokens: usize,
    pub(super) bos: Option<u64>,
    pub(super) eos: Vec<u64>,
    pub(super) pad: Option<u64>,
}

/// Rebuilds the tokenizer; `context` becomes `model_max_length`.
pub(super) fn rebuild(gguf: &Gguf, context: u64) -> Result<TokenizerFiles> {
    let source = Source { gguf };
    match source.text("tokenizer.ggml.model")? {
        "gpt2" => {}
        other => {
            return Err(
                source.fault(format!("holds a tokenizer of the kind `{other}`; supported is gpt2 (byte-level BPE)"))
            );
        }
    }
    let pre_name = match gguf.metadata.get("tokenizer.ggml.pre") {
        Some(_) => source.text("tokenizer.ggml.pre")?,
        None => "default",
    };
    let (normalizer, pre, ignore_merges) = pre_tokenizer(pre_name)
        .ok_or_else(|| source.fault(format!("uses the pre-tokenizer `{pre_name}`, which is not known here")))?;

    let tokens = source.strings("tokenizer.ggml.tokens")?;
    let kinds = source.array("tokenizer.ggml.token_type")?;
    if kinds.len() != tokens.len() {
        return Err(source.fault(format!("has {} tokens but {} token types", tokens.len(), kinds.len())));
    }
    let mut vocab = Map::new();
    let mut added = Vec::new();
    let mut decoder = Map::new();
    for (id, (&token, kind)) in tokens.iter().zip(kinds).enumerate() {
        let kind = kind.as_u64().unwrap_or_default();
        if kind == UNUSED {
            continue;
        }
        if vocab.insert(token.to_owned(), json!(id)).is_some() {
            return Err(source.fault(format!("holds the token `{token}` twice")));
        }
        if kind == CONTROL || kind == USER_DEFINED {
            let flags = json!({
                "content": token, "lstrip": false, "normalized": false, "rstrip": false, "single_word": false,
                "special": kind == CONTROL
            });
            let mut entry = json!({"id": id}).as_object().cloned().unwrap_or_default();
            entry.extend(flags.as_object().cloned().unwrap_or_default());
            added.push(Value::Object(entry));
            decoder.insert(id.to_string(), flags);
        }
    }
    let merges = source.strings("tokenizer.ggml.merges")?;
    for merge in &merges {
        let known = merge
            .split_once(' ')
            .is_some_and(|(a, b)| [a, b, &format!("{a}{b}")].iter().all(|part| vocab.contains_key(*part)));
        if !known {
            return Err(source.fault(format!("holds the merge `{merge}` of tokens that are not in its vocabulary")));
        }
    }

    let id = |key: &str| source.id(key, &tokens);
    let (bos, eos) = (id("bos_token_id")?, id("eos_token_id")?);
    let (pad, unk) = (id("padding_token_id")?, id("unknown_token_id")?);
    let mut ends: Vec<u64> = eos.into_iter().collect();
    for key in ["eot_token_id", "eom_token_id"] {
        ends.extend(id(key)?.filter(|more| !ends.contains(more)).into_iter().collect::<Vec<_>>());
    }
    let (add_bos, add_eos) = (source.flag("add_bos_token"), source.flag("add_eos_token"));
    let special = |id: Option<u64>| id.map(|i| tokens[i as usize]);
    let post_processor = template(add_bos.then_some(bos).flatten(), add_eos.then_some(eos).flatten(), &tokens);

    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre,
        "post_processor": post_processor,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": ignore_merges,
            "vocab": vocab, "merges": merges
        }
    });

    let mut names: BTreeMap<&str, &str> = BTreeMap::new();
    for (name, id) in [("bos_token", bos), ("eos_token", eos), ("pad_token", pad), ("unk_token", unk)] {
        names.extend(special(id).map(|token| (name, token)));
    }
    let mut config = Map::new();
    config.insert("add_prefix_space".into(), json!(false));
    config.insert("added_tokens_decoder".into(), Value::Object(decoder));
    config.insert("clean_up_tokenization_spaces".into(), json!(false));
    config.insert("model_max_length".into(), json!(context));
    // A generic class: the named ones replace the pre-tokenizer of the file by their own.
    config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
    for (name, token) in &names {
        config.insert((*name).into(), json!(token));
    }
    if let Some(template) = gguf.metadata.get("tokenizer.chat_template").and_then(Metadata::as_str) {
        config.insert("chat_template".into(), json!(template));
    }
    Ok(TokenizerFiles {
        tokenizer,
        tokenizer_config: Value::Object(config),
        special_tokens_map: json!(names),
        tokens: tokens.len(),
        bos,
        eos: ends,
        pad,
    })
}

/// Normalizer, pre-tokenizer and `ignore_merges` behind ggml's name.
fn pre_tokenizer(name: &str) -> Option<(Value, Value, bool)> {
    let byte_level =
        |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
    let split = |pattern: &str| {
        json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
            byte_level(false)
        ]})
    };
    Some(match name {
        "gpt-2" | "default" => (Value::Null, byte_level(true), false),
        "smollm" | "starcoder" | "refact" | "command-r" => {
            let digits = json!({"type": "Digits", "individual_digits": true});
            (Value::Null, json!({"type": "Sequence", "pretokenizers": [digits, byte_level(true)]}), false)
        }
        "llama-bpe" | "llama3" | "llama-v3" => {
            let pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
            (Value::Null, split(pattern), true)
        }
        "qwen2" => {
            let pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
            (json!({"type": "NFC"}), split(pattern), false)
        }
        _ => return None,
    })
}

/// A template that puts special tokens around a text; null where there are none.
fn template(bos: Option<u64>, eos: Option<u64>, tokens: &[&str]) -> Value {
    if bos.is_none() && eos.is_none() {
        return Value::Null;
    }
    let piece = |id: u64, kind: u64| json!({"SpecialToken": {"id": tokens[id as usize], "type_id": kind}});
    let around = |name: &str, kind: u64| {
        let text = json!({"Sequence": {"id": name, "type_id": kind}});
        bos.map(|b| piece(b, kind)).into_iter().chain([text]).chain(eos.map(|e| piece(e, kind))).collect::<Vec<_>>()
    };
    let mut special = Map::new();
    for id in bos.into_iter().chain(eos) {
        let token = tokens[id as usize];
        special.insert(token.into(), json!({"id": token, "ids": [id], "tokens": [token]}));
    }
    let pair: Vec<Value> = around("A", 0).into_iter().chain(around("B", 1)).collect();
    json!({"type": "TemplateProcessing", "single": around("A", 0), "pair": pair, "special_tokens": special})
}

struct Source<'a> {
    gguf: &'a Gguf,
}

impl<'a> Source<'a> {
    fn fault(&self, what: impl Into<String>) -> Error {
        Error::format(&self.gguf.path, what)
    }

    fn text(&self, key: &str) -> Result<&'a str> {
        let value = self.gguf.metadata.get(key).and_then(Metadata::as_str);
        value.ok_or_else(|| self.fault(format!("has no string `{key}`")))
    }

    fn array(&self, key: &str) -> Result<&'a [Metadata]> {
        let value = self.gguf.metadata.get(key).and_then(Metadata::as_array);
        value.ok_or_else(|| self.fault(format!("has no list `{key}`")))
    }

    fn strings(&self, key: &str) -> Result<Vec<&'a str>> {
        let list = self.array(key)?.iter().map(Metadata::as_str).collect::<Option<Vec<_>>>();
        list.ok_or_else(|| self.fault(format!("has a `{key}` that does not hold strings")))
    }

    fn flag(&self, key: &str) -> bool {
        self.gguf.metadata.get(&format!("tokenizer.ggml.{key}")) == Some(&Metadata::Bool(true))
    }

    /// The token id under a key; absent is fine, out of range is not.
    fn id(&self, key: &str, tokens: &[&str]) -> Result<Option<u64>> {
        let key = format!("tokenizer.ggml.{key}");
        match self.gguf.metadata.get(&key) {
            None => Ok(None),
            Some(value) => match value.as_u64().filter(|&id| id < tokens.len() as u64) {
                Some(id) => Ok(Some(id)),
                None => Err(self.fault(format!("has a `{key}` outside its vocabulary"))),
            },
        }
    }
}
