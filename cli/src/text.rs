//! Text ↔ ids, where this build can read tokenizers. `folder` is the model's.

use crate::failure::{Failure, Result};
#[cfg(feature = "models")]
use pleach_frontend::{ChatInput, ChatTemplate, TextTokenizer};
use std::path::Path;

/// Ids of prompts, with the special tokens the tokenizer's file adds.
///
/// # Errors
/// No tokenizer, or a text that cannot be encoded.
#[cfg(feature = "models")]
pub(crate) fn encode(folder: &Path, prompts: &[String]) -> Result<Vec<Vec<i32>>> {
    let tokenizer = TextTokenizer::open(folder)?;
    prompts.iter().map(|p| Ok(signed(&tokenizer.encode(p, true)?))).collect()
}

/// Ids of a conversation, up to where the assistant begins to speak.
///
/// # Errors
/// A file that is no conversation, a model without a template, a template that fails.
#[cfg(feature = "models")]
pub(crate) fn encode_chat(folder: &Path, file: &Path) -> Result<Vec<i32>> {
    let text = std::fs::read(file).map_err(Failure::io("read", file))?;
    let bad = |why: String| Failure::new(format!("{}: {why}", file.display()));
    let messages: serde_json::Value = serde_json::from_slice(&text).map_err(|e| bad(format!("is no JSON: {e}")))?;
    let list = messages.as_array().filter(|l| !l.is_empty()).ok_or_else(|| bad("is no list of messages".into()))?;
    if let Some(i) = list.iter().position(|m| m.get("role").is_none_or(|r| !r.is_string())) {
        return Err(bad(format!("message {} has no `role`; each is {{\"role\": …, \"content\": …}}", i + 1)));
    }
    let template = ChatTemplate::open(folder)?.ok_or_else(|| {
        Failure::new(format!("{}: has no chat template; give the text with --prompt", folder.display()))
    })?;
    let now = Some(std::time::SystemTime::now());
    let input = ChatInput { messages, add_generation_prompt: true, now, ..ChatInput::default() };
    // The template writes special tokens itself.
    Ok(signed(&TextTokenizer::open(folder)?.encode(&template.render(&input)?, false)?))
}

#[cfg(feature = "models")]
fn signed(ids: &[u32]) -> Vec<i32> {
    ids.iter().map(|i| i32::try_from(*i).unwrap_or(i32::MAX)).collect()
}

#[cfg(not(feature = "models"))]
fn no_text() -> Failure {
    Failure::usage("this build reads no text: give token ids with --ids, or build it with the feature `models`")
}

/// Refuses: this build reads no text.
///
/// # Errors
/// Always.
#[cfg(not(feature = "models"))]
pub(crate) fn encode(_: &Path, _: &[String]) -> Result<Vec<Vec<i32>>> {
    Err(no_text())
}

/// Refuses: this build reads no text.
///
/// # Errors
/// Always.
#[cfg(not(feature = "models"))]
pub(crate) fn encode_chat(_: &Path, _: &Path) -> Result<Vec<i32>> {
    Err(no_text())
}

/// What each id stands for, or nothing where there is no tokenizer.
pub(crate) fn names(folder: &Path, ids: &[i32]) -> Vec<Option<String>> {
    #[cfg(feature = "models")]
    if let Ok(t) = TextTokenizer::open(folder) {
        let one = |i: &i32| t.decode(&[*i as u32], false).ok();
        return ids.iter().map(one).collect();
    }
    #[cfg(not(feature = "models"))]
    let _ = folder;
    vec![None; ids.len()]
}
