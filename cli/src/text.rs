//! Text ↔ ids, where this build can read tokenizers.

use crate::failure::{Failure, Result};
use crate::ready::Ready;

/// Ids of prompts, with the special tokens the tokenizer's file adds.
///
/// # Errors
/// No tokenizer, or a text that cannot be encoded.
#[cfg(feature = "models")]
pub(crate) fn encode(ready: &Ready, prompts: &[String]) -> Result<Vec<Vec<i32>>> {
    let tokenizer = ready.model.tokenizer()?;
    prompts.iter().map(|p| Ok(signed(&tokenizer.encode(p, true)?))).collect()
}

/// Ids of a conversation, up to where the assistant begins to speak.
///
/// # Errors
/// A file that is no conversation, a model without a template, a template that fails.
#[cfg(feature = "models")]
pub(crate) fn encode_chat(ready: &Ready, file: &std::path::Path) -> Result<Vec<i32>> {
    use pleach_frontend::{ChatInput, ChatTemplate};
    let text = std::fs::read(file).map_err(Failure::io("read", file))?;
    let bad = |why: String| Failure::new(format!("{}: {why}", file.display()));
    let messages: serde_json::Value = serde_json::from_slice(&text).map_err(|e| bad(format!("is no JSON: {e}")))?;
    let list = messages.as_array().filter(|l| !l.is_empty()).ok_or_else(|| bad("is no list of messages".into()))?;
    if let Some(i) = list.iter().position(|m| m.get("role").is_none_or(|r| !r.is_string())) {
        return Err(bad(format!("message {} has no `role`; each is {{\"role\": …, \"content\": …}}", i + 1)));
    }
    let template = ChatTemplate::open(ready.model.dir())?.ok_or_else(|| {
        Failure::new(format!("{}: has no chat template; give the text with --prompt", ready.model.dir().display()))
    })?;
    let now = Some(std::time::SystemTime::now());
    let input = ChatInput { messages, add_generation_prompt: true, now, ..ChatInput::default() };
    // The template writes special tokens itself.
    Ok(signed(&ready.model.tokenizer()?.encode(&template.render(&input)?, false)?))
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
pub(crate) fn encode(_: &Ready, _: &[String]) -> Result<Vec<Vec<i32>>> {
    Err(no_text())
}

/// Refuses: this build reads no text.
///
/// # Errors
/// Always.
#[cfg(not(feature = "models"))]
pub(crate) fn encode_chat(_: &Ready, _: &std::path::Path) -> Result<Vec<i32>> {
    Err(no_text())
}

/// What each id stands for, quoted, or nothing where there is no tokenizer.
pub(crate) fn names(ready: &Ready, ids: &[i32]) -> Vec<Option<String>> {
    #[cfg(feature = "models")]
    if let Ok(t) = ready.model.tokenizer() {
        let one = |i: &i32| t.decode(&[*i as u32], false).ok();
        return ids.iter().map(one).collect();
    }
    #[cfg(not(feature = "models"))]
    let _ = ready;
    vec![None; ids.len()]
}
