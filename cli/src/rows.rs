//! Rows of training data: text, conversations or ids, one JSON object a line, to ids with labels.
//!
//! | row | counted targets |
//! | --- | --- |
//! | `{"text"}` | every token; the end-of-sequence token is appended |
//! | `{"prompt", "completion"}` | the completion, to which the end-of-sequence token is appended |
//! | `{"messages"}`, or prompt and completion as lists of messages | what the assistant says |
//! | `{"input_ids", "labels"}` | labels other than -100; without labels every token |
//!
//! A row has one of these forms; ids may have beside them the text that they were made of. `attention_mask` beside ids says which of
//! them are padding: that is left out, at the beginning and at the end, as rows are packed without padding. A mask with a gap is refused.
//!
//! Conventions are those of TRL's supervised trainer: prompt and completion are encoded together, and the prompt's own
//! encoding says where the completion begins. The assistant's words are found by rendering the conversation up to each
//! of its turns; where a template rewrites earlier turns, only the last one counts. Errors name the line.

use crate::failure::{Failure, Result};
use pleach_frontend::{ChatInput, ChatTemplate, TextTokenizer};
use pleach_runtime::train::{IGNORED, Rows};
use serde_json::{Map, Value};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::path::Path;

/// Rows of a file, and what is worth saying about them.
#[derive(Debug, Default)]
pub(crate) struct Read {
    /// The rows.
    pub rows: Rows,
    /// Prompts whose encoding is no beginning of the whole row's: the border may lie a token off.
    pub uneven: u64,
    /// Conversations of which only the last turn is counted.
    pub last_turn_only: u64,
    /// Tokens that an attention mask calls padding.
    pub masked: u64,
}

impl Read {
    /// Remarks for people.
    pub(crate) fn notes(&self) -> Vec<String> {
        let r = self.rows.report();
        let mut out = vec![format!("{} rows, {} tokens, {} counted targets", r.rows, r.tokens, r.targets)];
        let mut say = |n: u64, what: String| out.extend((n > 0).then_some(what));
        say(r.cut, format!("{} rows were cut at --max-length ({} tokens lost)", r.cut, r.cut_tokens));
        say(r.dropped, format!("{} rows without any token were dropped", r.dropped));
        say(r.uncounted, format!("{} rows have no counted target and teach nothing", r.uncounted));
        say(self.uneven, format!("{} prompts are encoded otherwise when their completion follows", self.uneven));
        say(self.masked, format!("{} tokens that `attention_mask` leaves out were dropped", self.masked));
        let n = self.last_turn_only;
        say(n, format!("{n} conversations: the template rewrites earlier turns, only the last answer is counted"));
        out
    }
}

/// Reads a file of rows. `folder` is the model's; its tokenizer is opened when a row needs it.
///
/// # Errors
/// A file that cannot be read, and the first row that is none, with its line.
pub(crate) fn read(path: &Path, folder: &Path, vocab: u64, max_length: u64) -> Result<Read> {
    let mut reader = Reader { folder, vocab, text: None, template: None, max_length: max_length as usize };
    let mut out = Read::default();
    let file = File::open(path).map_err(Failure::io("read", path))?;
    let mut lines = BufReader::new(file);
    let within = |what: String| move |e: Failure| e.within(&what);
    let (first, before) = first_byte(&mut lines).map_err(Failure::io("read", path))?;
    if first == Some(b'[') {
        let list: Vec<Value> = serde_json::from_reader(lines)
            .map_err(|e| Failure::new(format!("{}: is no JSON list of rows: {e}", path.display())))?;
        for (i, v) in list.iter().enumerate() {
            reader.row(v, &mut out).map_err(within(format!("{}: row {}", path.display(), i + 1)))?;
        }
    } else {
        for (i, line) in lines.lines().enumerate() {
            let at = || format!("{}: line {}", path.display(), before + i + 1);
            let line = line.map_err(|e| Failure::new(format!("{}: {e}", at())))?;
            if line.trim().is_empty() {
                continue;
            }
            let v = serde_json::from_str(&line).map_err(|e| Failure::new(format!("{}: is no JSON: {e}", at())))?;
            reader.row(&v, &mut out).map_err(within(at()))?;
        }
    }
    if out.rows.is_empty() {
        return Err(Failure::new(format!("{}: holds no row with a token", path.display())));
    }
    if out.rows.report().targets == 0 {
        return Err(Failure::new(format!(
            "{}: no row has a counted target; every label is -100, or every row was cut before its completion \
             (raise --max-length)",
            path.display()
        )));
    }
    Ok(out)
}

/// The first byte that is no white space, which is left in place, and the number of lines that end before it.
fn first_byte(r: &mut impl BufRead) -> std::io::Result<(Option<u8>, usize)> {
    let mut lines = 0;
    let ends = |part: &[u8]| part.iter().filter(|b| **b == b'\n').count();
    loop {
        let buffer = r.fill_buf()?;
        match buffer.iter().position(|b| !b.is_ascii_whitespace() && *b != 0xef && *b != 0xbb && *b != 0xbf) {
            Some(i) => {
                let b = buffer[i];
                lines += ends(&buffer[..i]);
                r.consume(i);
                return Ok((Some(b), lines));
            }
            None if buffer.is_empty() => return Ok((None, lines)),
            None => {
                let n = buffer.len();
                lines += ends(buffer);
                r.consume(n);
            }
        }
    }
}

struct Reader<'f> {
    folder: &'f Path,
    vocab: u64,
    max_length: usize,
    text: Option<Text>,
    template: Option<ChatTemplate>,
}

/// What turns text into ids.
struct Text {
    tokenizer: TextTokenizer,
    /// The token that ends a sequence, as text.
    eos: Option<String>,
}

impl Text {
    fn open(folder: &Path) -> Result<Text> {
        let tokenizer = TextTokenizer::open(folder)?;
        let from_config = |file: &str| {
            let v: Value = serde_json::from_slice(&std::fs::read(folder.join(file)).ok()?).ok()?;
            let eos = v.get("eos_token")?;
            eos.as_str().or_else(|| eos.get("content")?.as_str()).map(str::to_owned)
        };
        let eos = from_config("tokenizer_config.json").or_else(|| from_config("special_tokens_map.json"));
        let eos = match eos {
            Some(e) => Some(e),
            None => pleach_frontend::eos_ids(folder)?.first().and_then(|i| tokenizer.token(*i)),
        };
        Ok(Text { tokenizer, eos })
    }

    fn encode(&self, text: &str, special: bool) -> Result<Vec<i32>> {
        let ids = self.tokenizer.encode(text, special)?;
        Ok(ids.into_iter().map(|i| i32::try_from(i).unwrap_or(i32::MAX)).collect())
    }

    fn ended(&self, text: &str) -> String {
        match &self.eos {
            Some(e) if !text.ends_with(e.as_str()) => format!("{text}{e}"),
            _ => text.to_owned(),
        }
    }
}

impl Reader<'_> {
    fn text(&mut self) -> Result<&Text> {
        if self.text.is_none() {
            self.text = Some(Text::open(self.folder)?);
        }
        self.text.as_ref().ok_or_else(|| Failure::new("no tokenizer"))
    }

    fn row(&mut self, v: &Value, out: &mut Read) -> Result<()> {
        let map = v.as_object().ok_or_else(|| Failure::new("is no JSON object"))?;
        let max = self.max_length;
        // A key that tables fill with null where a row has none is not there.
        let get = |key: &str| map.get(key).filter(|v| !v.is_null());
        if let Some(ids) = get("input_ids") {
            let (ids, labels) = self.ids(ids, get("labels"))?;
            let kept = match get("attention_mask") {
                Some(m) => attended(m, ids.len())?,
                None => 0..ids.len(),
            };
            out.masked += (ids.len() - kept.len()) as u64;
            out.rows.push(&ids[kept.clone()], labels.as_ref().map(|l| &l[kept]), max);
            return Ok(());
        }
        one_form(|key| get(key).is_some())?;
        let (ids, counted) = if let Some(m) = get("messages") {
            let n = messages(m, "messages")?.len();
            self.conversation(m, 0..n, out)?
        } else if let (Some(p), Some(c)) = (get("prompt"), get("completion")) {
            match (p, c) {
                (Value::String(p), Value::String(c)) => self.completion(p, c, out)?,
                (Value::Array(p), Value::Array(c)) => {
                    let all = Value::Array(p.iter().chain(c).cloned().collect());
                    messages(&all, "prompt and completion")?;
                    self.conversation(&all, p.len()..p.len() + c.len(), out)?
                }
                _ => {
                    return Err(Failure::new(
                        "`prompt` and `completion` must both be texts, or both lists of messages",
                    ));
                }
            }
        } else if let Some(t) = get("text") {
            let t = t.as_str().ok_or_else(|| Failure::new("`text` is no text"))?;
            let text = self.text()?;
            out.rows.push(&text.encode(&text.ended(t), true)?, None, max);
            return Ok(());
        } else {
            return Err(Failure::new(unknown(map)));
        };
        self.check(&ids)?;
        let mut labels = vec![IGNORED; ids.len()];
        for r in counted {
            let r = r.start.min(ids.len())..r.end.min(ids.len());
            labels[r.clone()].copy_from_slice(&ids[r]);
        }
        out.rows.push(&ids, Some(&labels), max);
        Ok(())
    }

    /// Ids that a model without these rows in its table would refuse.
    fn check(&self, ids: &[i32]) -> Result<()> {
        match ids.iter().find(|i| **i < 0 || i64::from(**i) >= self.vocab as i64) {
            Some(i) => Err(Failure::new(format!("holds the id {i}; the model has {} ids", self.vocab))),
            None => Ok(()),
        }
    }

    fn ids(&self, ids: &Value, labels: Option<&Value>) -> Result<(Vec<i32>, Option<Vec<i32>>)> {
        let ids = integers(ids, "input_ids")?;
        self.check(&ids)?;
        let labels = match labels {
            None | Some(Value::Null) => None,
            Some(l) => Some(integers(l, "labels")?),
        };
        if let Some(l) = &labels {
            if l.len() != ids.len() {
                return Err(Failure::new(format!("has {} ids and {} labels; give one for each", ids.len(), l.len())));
            }
            if let Some(x) = l.iter().find(|x| **x != IGNORED && (**x < 0 || i64::from(**x) >= self.vocab as i64)) {
                return Err(Failure::new(format!("holds the label {x}; labels are ids, or -100 for no loss")));
            }
        }
        Ok((ids, labels))
    }

    /// Prompt and completion as texts.
    fn completion(&mut self, prompt: &str, completion: &str, out: &mut Read) -> Result<(Vec<i32>, Vec<Range<usize>>)> {
        let text = self.text()?;
        let before = text.encode(prompt, true)?;
        let all = text.encode(&format!("{prompt}{}", text.ended(completion)), true)?;
        out.uneven += u64::from(!all.starts_with(&before));
        let end = all.len();
        Ok((all, std::iter::once(before.len()..end).collect()))
    }

    /// A conversation, with the assistant's turns among `turns` counted.
    fn conversation(
        &mut self,
        all: &Value,
        turns: Range<usize>,
        out: &mut Read,
    ) -> Result<(Vec<i32>, Vec<Range<usize>>)> {
        if self.template.is_none() {
            self.template = ChatTemplate::open(self.folder)?;
        }
        let Some(template) = self.template.clone() else {
            let why = "the model has no chat template; give rows of {\"prompt\", \"completion\"} or {\"text\"}";
            return Err(Failure::new(why));
        };
        let list = all.as_array().map(Vec::as_slice).unwrap_or_default();
        let render = |n: usize, begin: bool| {
            let input = ChatInput {
                messages: Value::Array(list[..n].to_vec()),
                add_generation_prompt: begin,
                now: Some(std::time::SystemTime::UNIX_EPOCH),
                ..ChatInput::default()
            };
            template.render(&input)
        };
        let whole = render(list.len(), false)?;
        let assistant = |i: &usize| list[*i].get("role").and_then(Value::as_str) == Some("assistant");
        let answers: Vec<usize> = turns.filter(assistant).collect();
        if answers.is_empty() {
            return Err(Failure::new("no message is the assistant's; there is nothing to learn from"));
        }
        let text = self.text()?;
        let ids = text.encode(&whole, false)?;
        let mut spans = vec![];
        let mut rewritten = false;
        for i in &answers {
            // A template may refuse a conversation that stops here; then only what it accepts is counted.
            let (Ok(before), Ok(after)) = (render(*i, true), render(i + 1, false)) else {
                rewritten = true;
                continue;
            };
            if !(whole.starts_with(&after) && after.starts_with(&before)) {
                rewritten = true;
                continue;
            }
            // White space behind the end of a turn belongs to the template.
            let start = text.encode(&before, false)?.len();
            spans.push(start..text.encode(after.trim_end(), false)?.len());
        }
        if spans.is_empty() {
            let why = "the chat template writes earlier turns anew, so the assistant's words cannot be found; give rows \
                       of {\"prompt\", \"completion\"}";
            return Err(Failure::new(why));
        }
        out.last_turn_only += u64::from(rewritten);
        Ok((ids, spans))
    }
}

/// A list of messages with roles.
fn messages<'v>(v: &'v Value, name: &str) -> Result<&'v [Value]> {
    let list = v.as_array().filter(|l| !l.is_empty());
    let list = list.ok_or_else(|| Failure::new(format!("`{name}` is no list of messages")))?;
    match list.iter().position(|m| m.get("role").is_none_or(|r| !r.is_string())) {
        Some(i) => Err(Failure::new(format!("message {} of `{name}` has no `role`", i + 1))),
        None => Ok(list),
    }
}

fn integers(v: &Value, name: &str) -> Result<Vec<i32>> {
    let list = v.as_array().ok_or_else(|| Failure::new(format!("`{name}` is no list")))?;
    let one = |x: &Value| x.as_i64().and_then(|x| i32::try_from(x).ok());
    let all: Option<Vec<i32>> = list.iter().map(one).collect();
    all.ok_or_else(|| Failure::new(format!("`{name}` holds something that is no id")))
}

/// Which of `n` ids an attention mask keeps: all between padding before and behind.
fn attended(mask: &Value, n: usize) -> Result<Range<usize>> {
    let mask = integers(mask, "attention_mask")?;
    if mask.len() != n {
        let what = format!("has {n} ids and {} values of `attention_mask`; give one for each", mask.len());
        return Err(Failure::new(what));
    }
    if let Some(x) = mask.iter().find(|x| !matches!(x, 0 | 1)) {
        return Err(Failure::new(format!("holds {x} in `attention_mask`; 1 is a token, 0 is padding")));
    }
    let first = mask.iter().position(|x| *x == 1).unwrap_or(0);
    let end = mask.iter().rposition(|x| *x == 1).map_or(first, |i| i + 1);
    match mask[first..end].iter().position(|x| *x == 0) {
        Some(i) => Err(Failure::new(format!(
            "`attention_mask` leaves out token {} amid others; only padding at the ends can be left out (-100 in \
             `labels` keeps a token from being counted)",
            first + i + 1
        ))),
        None => Ok(first..end),
    }
}

/// Refuses a row of two forms: which one is meant decides what is counted.
fn one_form(has: impl Fn(&str) -> bool) -> Result<()> {
    let pair = ["prompt", "completion"];
    let two = if has("text") {
        pair.into_iter().chain(["messages"]).find(|k| has(k)).map(|k| ("text", k))
    } else {
        (has("messages") && pair.into_iter().all(&has)).then_some(("messages", "completion"))
    };
    match two {
        Some((a, b)) => Err(Failure::new(format!("has both `{a}` and `{b}`; a row has one form, leave the other out"))),
        None => Ok(()),
    }
}

fn unknown(map: &Map<String, Value>) -> String {
    let have: Vec<&str> = map.keys().map(String::as_str).collect();
    format!(
        "has the keys {}; a row is {{\"text\"}}, {{\"prompt\", \"completion\"}}, {{\"messages\"}} or {{\"input_ids\", \"labels\"}}",
        if have.is_empty() { "none".into() } else { have.join(", ") }
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn folder() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/llama-tiny")
    }

    fn rows(text: &str, max: u64) -> Result<Read> {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let n = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("pleach-rows-{}-{n}.jsonl", std::process::id()));
        std::fs::write(&path, text).unwrap();
        let out = read(&path, &folder(), 512, max);
        let _ = std::fs::remove_file(&path);
        out
    }

    fn decode(ids: &[i32]) -> String {
        let ids: Vec<u32> = ids.iter().map(|i| *i as u32).collect();
        TextTokenizer::open(&folder()).unwrap().decode(&ids, false).unwrap()
    }

    /// The text of the counted labels.
    fn counted(r: &Read, row: usize) -> String {
        let labels: Vec<i32> = r.rows.row(row).1.iter().copied().filter(|l| *l != IGNORED).collect();
        decode(&labels)
    }

    #[test]
    fn ids_are_taken_as_they_are() {
        let r = rows("{\"input_ids\":[1,2,3],\"labels\":[-100,2,3]}\n\n{\"input_ids\":[4,5,6,7]}\n", 3).unwrap();
        assert_eq!(r.rows.row(0), (&[1, 2, 3][..], &[IGNORED, 2, 3][..]));
        assert_eq!(r.rows.row(1), (&[4, 5, 6][..], &[4, 5, 6][..]));
        assert_eq!(r.rows.report().cut, 1);
        assert!(r.notes().iter().any(|n| n.contains("1 rows were cut")), "{:?}", r.notes());
        // A list does as well.
        assert_eq!(rows("[{\"input_ids\":[1,2,3]}]", 8).unwrap().rows.len(), 1);
    }

    #[test]
    fn padding_that_a_mask_names_is_left_out() {
        let text = r#"{"input_ids":[5,6,7],"attention_mask":[1,1,0]}
{"input_ids":[0,0,8,9],"labels":[0,0,-100,9],"attention_mask":[0,0,1,1]}
{"input_ids":[1,2],"attention_mask":[1,1],"text":"ab","labels":null}
{"input_ids":[1,2],"attention_mask":[0,0]}
"#;
        let r = rows(text, 3).unwrap();
        assert_eq!(r.rows.row(0), (&[5, 6][..], &[5, 6][..]));
        assert_eq!(r.rows.row(1), (&[8, 9][..], &[IGNORED, 9][..]));
        assert_eq!(r.rows.row(2), (&[1, 2][..], &[1, 2][..]));
        let report = r.rows.report();
        assert_eq!((report.tokens, report.targets, report.cut, report.dropped), (6, 3, 0, 1));
        assert!(r.notes().contains(&"5 tokens that `attention_mask` leaves out were dropped".to_string()));
    }

    #[test]
    fn text_ends_and_completions_are_counted_alone() {
        let r = rows("{\"text\":\"a hedge\"}\n{\"prompt\":\"a hedge is\",\"completion\":\" a fence\"}\n", 99).unwrap();
        let (ids, labels) = r.rows.row(0);
        assert_eq!(ids, labels);
        let whole = decode(ids);
        let eos = whole.strip_prefix("a hedge").expect("the text comes first").to_string();
        assert!(!eos.is_empty());
        assert_eq!(decode(r.rows.row(1).0), format!("a hedge is a fence{eos}"));
        assert_eq!(counted(&r, 1), format!(" a fence{eos}"));
    }

    #[test]
    fn of_conversations_the_assistant_is_counted() {
        let chat = r#"{"messages":[{"role":"user","content":"one"},{"role":"assistant","content":"two"},{"role":"user","content":"three"},{"role":"assistant","content":"four"}]}"#;
        let r = rows(chat, 999).unwrap();
        let said = counted(&r, 0);
        assert!(said.contains("two") && said.contains("four"), "{said}");
        assert!(!said.contains("one") && !said.contains("three") && !said.contains("user"), "{said}");
        let split = r#"{"prompt":[{"role":"user","content":"one"},{"role":"assistant","content":"two"},{"role":"user","content":"three"}],"completion":[{"role":"assistant","content":"four"}]}"#;
        let s = rows(split, 999).unwrap();
        assert_eq!(s.rows.row(0).0, r.rows.row(0).0);
        assert!(counted(&s, 0).contains("four") && !counted(&s, 0).contains("two"));
    }

    #[test]
    fn faults_name_their_line() {
        let cases = [
            ("{\"text\":\"a\"}\n{\"txt\":1}", "line 2: has the keys txt"),
            ("{\"text\":\"a\"}\n\nno", "line 3: is no JSON"),
            ("{\"input_ids\":[1,2],\"labels\":[1]}", "line 1: has 2 ids and 1 labels"),
            ("\n\n{\"input_ids\":[1,2,3]}\n\n{\"foo\":1}\n", "line 5: has the keys foo"),
            ("\n \u{feff}\n{", "line 3: is no JSON"),
            ("{\"input_ids\":[1,2],\"attention_mask\":[1]}", "line 1: has 2 ids and 1 values of `attention_mask`"),
            ("{\"input_ids\":[1,2,3],\"attention_mask\":[1,0,1]}", "line 1: `attention_mask` leaves out token 2"),
            ("{\"input_ids\":[1,2],\"attention_mask\":[1,2]}", "line 1: holds 2 in `attention_mask`"),
            ("\n{\"text\":\"a\",\"prompt\":\"a\",\"completion\":\"b\"}", "line 2: has both `text` and `prompt`"),
            ("{\"text\":\"a\",\"completion\":\"b\"}", "line 1: has both `text` and `completion`"),
            ("{\"text\":\"a\",\"messages\":[]}", "line 1: has both `text` and `messages`"),
            ("{\"messages\":[],\"prompt\":\"a\",\"completion\":\"b\"}", "line 1: has both `messages` and `completion`"),
            ("{\"input_ids\":[1,600]}", "line 1: holds the id 600"),
            ("{\"input_ids\":[1,2],\"labels\":[1,-7]}", "holds the label -7"),
            ("{\"prompt\":\"a\",\"completion\":[]}", "must both be"),
            ("{\"messages\":[{\"content\":\"a\"}]}", "message 1 of `messages` has no `role`"),
            ("{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}]}", "no message is the assistant's"),
            ("[1]", "row 1: is no JSON object"),
            ("", "holds no row"),
            ("{\"input_ids\":[1,2],\"labels\":[-100,-100]}", "no row has a counted target"),
        ];
        for (text, why) in cases {
            let e = rows(text, 9).map(|_| ()).unwrap_err().message;
            assert!(e.contains(why), "{e}");
        }
    }
}
