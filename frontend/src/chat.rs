//! Chat templates: messages → the text a model was trained on.
//!
//! Templates are Jinja as transformers runs it: blocks trimmed, loop controls, Python's string methods, `tojson` as
//! Python's `json.dumps` prints, `raise_exception`, `strftime_now`. Source: `chat_template_utils.py` of transformers.
//! The clock is the caller's: `strftime_now` formats the moment that is passed in.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, ErrorKind, Value as Jinja};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::json::read_object;
use crate::tokenizer::special_tokens;

/// What goes into a template.
#[derive(Debug, Clone, Default)]
pub struct ChatInput {
    /// List of `{"role", "content", …}`.
    pub messages: Value,
    /// Tools offered to the model; null for none.
    pub tools: Value,
    /// Whether the text ends where the assistant begins to speak.
    pub add_generation_prompt: bool,
    /// What `strftime_now` formats, in UTC; `None` refuses templates that ask for it.
    pub now: Option<SystemTime>,
}

/// The chat template of a model folder.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    templates: Vec<(String, String)>,
    special: Vec<(String, String)>,
    path: PathBuf,
}

impl ChatTemplate {
    /// Reads `chat_template.jinja`, else the `chat_template` of `tokenizer_config.json`; `None` if there is neither.
    pub fn open(dir: &Path) -> Result<Option<ChatTemplate>> {
        let config_path = dir.join("tokenizer_config.json");
        let config = if config_path.is_file() { read_object(&config_path)? } else { Map::new() };
        let special = special_tokens(&config);
        let file = dir.join("chat_template.jinja");
        if file.is_file() {
            let text = std::fs::read_to_string(&file).map_err(Error::io("read", &file))?;
            return Ok(Some(ChatTemplate { templates: vec![("default".into(), text)], special, path: file }));
        }
        let templates = match config.get("chat_template") {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::String(text)) => vec![("default".into(), text.clone())],
            Some(Value::Array(list)) => {
                let part = |entry: &Value, key: &str| entry.get(key).and_then(Value::as_str).map(str::to_owned);
                let pairs = list.iter().map(|e| Some((part(e, "name")?, part(e, "template")?)));
                pairs.collect::<Option<Vec<_>>>().ok_or_else(|| {
                    Error::key(&config_path, "chat_template", "is a list whose entries lack `name` or `template`")
                })?
            }
            Some(_) => return Err(Error::key(&config_path, "chat_template", "is neither a string nor a list")),
        };
        Ok(Some(ChatTemplate { templates, special, path: config_path }))
    }

    /// Renders a conversation. Encode the result without adding special tokens: the template writes them itself.
    ///
    /// # Errors
    /// A template that does not parse, that fails, or that calls `raise_exception`.
    pub fn render(&self, input: &ChatInput) -> Result<String> {
        let fault = |e: minijinja::Error| {
            let mut text = format!("{}: chat template: {e}", self.path.display());
            let mut cause = std::error::Error::source(&e);
            while let Some(inner) = cause {
                text.push_str(&format!(": {inner}"));
                cause = inner.source();
            }
            Error::Text(text)
        };
        let named = |name: &str| self.templates.iter().find(|t| t.0 == name);
        let with_tools = (!input.tools.is_null()).then(|| named("tool_use")).flatten();
        let Some((_, source)) = with_tools.or_else(|| named("default")).or(self.templates.first()) else {
            return Err(Error::key(&self.path, "chat_template", "is an empty list"));
        };
        // `{% generation %}` only marks the assistant's words for training.
        let source = source_without_generation_marks(source)?;
        let mut env = environment(input.now).map_err(fault)?;
        env.add_template("chat", &source).map_err(fault)?;
        let mut context = Map::new();
        for (name, token) in &self.special {
            context.insert(name.clone(), json!(token));
        }
        context.insert("messages".into(), input.messages.clone());
        context.insert("tools".into(), input.tools.clone());
        context.insert("documents".into(), Value::Null);
        context.insert("add_generation_prompt".into(), json!(input.add_generation_prompt));
        let template = env.get_template("chat").map_err(fault)?;
        template.render(Jinja::from(Serde(&context))).map_err(fault)
    }
}

fn source_without_generation_marks(source: &str) -> Result<String> {
    let mark = |pattern: &str| {
        regex::Regex::new(pattern).map_err(|e| Error::Pattern { pattern: pattern.into(), what: e.to_string() })
    };
    let opened = mark(r"\{%(?<l>[-+]?)\s*generation\s*(?<r>[-+]?)%\}")?.replace_all(source, "{%$l if true $r%}");
    Ok(mark(r"\{%(?<l>[-+]?)\s*endgeneration\s*(?<r>[-+]?)%\}")?.replace_all(&opened, "{%$l endif $r%}").into_owned())
}

fn environment(now: Option<SystemTime>) -> std::result::Result<Environment<'static>, minijinja::Error> {
    let mut env = Environment::new();
    env.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    env.set_unknown_method_callback(unknown_method_callback);
    env.add_function("raise_exception", |message: String| -> std::result::Result<Jinja, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    env.add_function("strftime_now", move |format: String| -> std::result::Result<String, minijinja::Error> {
        let now = now.ok_or_else(|| invalid("the template asks for the date but none was given"))?;
        strftime(&format, now)
    });
    env.add_filter("tojson", tojson);
    Ok(env)
}

fn invalid(message: impl Into<String>) -> minijinja::Error {
    minijinja::Error::new(ErrorKind::InvalidOperation, message.into())
}

/// `json.dumps(value, ensure_ascii=False, indent=indent, …)`.
fn tojson(value: Jinja, kwargs: Kwargs) -> std::result::Result<Jinja, minijinja::Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let sort_keys: Option<bool> = kwargs.get("sort_keys")?;
    let ensure_ascii: Option<bool> = kwargs.get("ensure_ascii")?;
    kwargs.assert_all_used()?;
    let value = serde_json::to_value(&value).map_err(|e| invalid(e.to_string()))?;
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(invalid("tojson: separators must be a pair")),
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let style = Dumps { indent, item, key, sort: sort_keys.unwrap_or(false), ascii: ensure_ascii.unwrap_or(false) };
    let mut out = String::new();
    style.write(&value, 0, &mut out);
    Ok(Jinja::from_safe_string(out))
}

struct Dumps {
    indent: Option<usize>,
    item: String,
    key: String,
    sort: bool,
    ascii: bool,
}

impl Dumps {
    fn line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = self.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn text(&self, text: &str, out: &mut String) {
        let quoted = Value::from(text).to_string();
        if !self.ascii {
            // Python writes DEL and the C1 controls as they are, as does the JSON printer here.
            out.push_str(&quoted);
            return;
        }
        for c in quoted.chars() {
            if c.is_ascii() {
                out.push(c);
            } else {
                let mut units = [0; 2];
                c.encode_utf16(&mut units).iter().for_each(|u| out.push_str(&format!("\\u{u:04x}")));
            }
        }
    }

    fn write(&self, value: &Value, depth: usize, out: &mut String) {
        match value {
            Value::String(s) => self.text(s, out),
            Value::Number(n) if n.is_f64() => out.push_str(&python_float(n.as_f64().unwrap_or_default())),
            Value::Array(list) if !list.is_empty() => {
                out.push('[');
                for (i, item) in list.iter().enumerate() {
                    out.push_str(if i > 0 { &self.item } else { "" });
                    self.line(depth + 1, out);
                    self.write(item, depth + 1, out);
                }
                self.line(depth, out);
                out.push(']');
            }
            Value::Object(map) if !map.is_empty() => {
                let mut entries: Vec<_> = map.iter().collect();
                if self.sort {
                    entries.sort_by_key(|entry| entry.0);
                }
                out.push('{');
                for (i, (key, item)) in entries.into_iter().enumerate() {
                    out.push_str(if i > 0 { &self.item } else { "" });
                    self.line(depth + 1, out);
                    self.text(key, out);
                    out.push_str(&self.key);
                    self.write(item, depth + 1, out);
                }
                self.line(depth, out);
                out.push('}');
            }
            other => out.push_str(&other.to_string()),
        }
    }
}

/// `repr(float)`: the shortest digits, with an exponent below 1e-4 and from 1e16.
fn python_float(x: f64) -> String {
    let magnitude = x.abs();
    if magnitude != 0.0 && !(1e-4..1e16).contains(&magnitude) {
        let text = format!("{x:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, number) = exponent.strip_prefix('-').map_or(('+', exponent), |n| ('-', n));
        return format!("{digits}e{sign}{number:0>2}");
    }
    format!("{x:?}")
}

/// The directives of `strftime` that templates use, in UTC and English.
fn strftime(format: &str, now: SystemTime) -> std::result::Result<String, minijinja::Error> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let seconds = now.duration_since(UNIX_EPOCH).map_err(|_| invalid("the date lies before 1970"))?.as_secs();
    let (days, rest) = (seconds / 86400, seconds % 86400);
    let (year, month, day, of_year) = civil(days);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[(days % 7) as usize]);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let directive = chars.next();
        let (plain, directive) = if directive == Some('-') { (true, chars.next()) } else { (false, directive) };
        let two = |n: u64| if plain { n.to_string() } else { format!("{n:02}") };
        let twelve = if hour % 12 == 0 { 12 } else { hour % 12 };
        out.push_str(&match directive {
            Some('Y') => year.to_string(),
            Some('y') => two(year % 100),
            Some('m') => two(month),
            Some('d') => two(day),
            Some('e') => format!("{day:2}"),
            Some('j') => format!("{of_year:03}"),
            Some('B') => month_name.into(),
            Some('b' | 'h') => month_name[..3].into(),
            Some('A') => day_name.into(),
            Some('a') => day_name[..3].into(),
            Some('H') => two(hour),
            Some('I') => two(twelve),
            Some('M') => two(minute),
            Some('S') => two(second),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.into(),
            Some('Z') => "UTC".into(),
            Some('z') => "+0000".into(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('%') => "%".into(),
            other => return Err(invalid(format!("strftime_now: `%{}` is not supported", other.unwrap_or(' ')))),
        });
    }
    Ok(out)
}

/// Year, month, day and day of the year of a day number since 1970.
fn civil(days: u64) -> (u64, u64, u64, u64) {
    let leap = |y: u64| y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400));
    let (mut year, mut rest) = (1970, days);
    while rest >= 365 + u64::from(leap(year)) {
        rest -= 365 + u64::from(leap(year));
        year += 1;
    }
    let (of_year, mut month) = (rest + 1, 1);
    for (i, length) in [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31].into_iter().enumerate() {
        let length = length + u64::from(i == 1 && leap(year));
        if rest < length {
            month = i as u64 + 1;
            break;
        }
        rest -= length;
    }
    (year, month, rest + 1, of_year)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::folder;
    use std::time::Duration;

    fn render(template: Value, messages: Value) -> Result<String> {
        let dir = folder("chat");
        let config = json!({"chat_template": template, "bos_token": "<s>", "eos_token": {"content": "</s>"}});
        std::fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
        let now = Some(UNIX_EPOCH + Duration::from_secs(1_709_210_096));
        let input = ChatInput { messages, add_generation_prompt: true, now, ..ChatInput::default() };
        ChatTemplate::open(&dir)?.unwrap().render(&input)
    }

    #[test]
    fn a_real_template_is_rendered() {
        let template = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
        let text = render(template.into(), json!([{"role": "user", "content": "Hi"}])).unwrap();
        assert!(text.starts_with("<|im_start|>system\nYou are"));
        assert!(text.ends_with("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"));
    }

    #[test]
    fn python_is_imitated() {
        let messages = json!([{"role": "user", "content": " x ", "args": {"b": 1.0, "a": ["ä", 1e-5, null, true]}}]);
        let out = |t: &str| render(t.into(), messages.clone()).unwrap();
        assert_eq!(out("{{ messages[0].content.strip() }}{{ bos_token }}{{ eos_token }}"), "x<s></s>");
        assert_eq!(out("{{ messages[0]['args'] | tojson }}"), r#"{"b": 1.0, "a": ["ä", 1e-05, null, true]}"#);
        assert_eq!(out("{{ {'a': [1], 'b': {}} | tojson(indent=2) }}"), "{\n  \"a\": [\n    1\n  ],\n  \"b\": {}\n}");
        assert_eq!(out("{{ strftime_now('%d %b %Y, %A %H:%M:%S') }}"), "29 Feb 2024, Thursday 12:34:56");
        assert_eq!(out("{% generation %}\na\n{% endgeneration %}\nb"), "a\nb");
        assert_eq!(
            out(
                "{%- for m in messages %}\n    {%- if m.role == 'x' %}{% continue %}{% endif %}\n{{ m.role.upper() }}\n{%- endfor %}"
            ),
            "USER"
        );
        assert_eq!(
            [1e16, 1.5e-7, 123.25, 0.0, -1e22].map(python_float),
            ["1e+16", "1.5e-07", "123.25", "0.0", "-1e+22"]
        );
    }

    #[test]
    fn named_templates_and_faults() {
        let named = json!([{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]);
        assert_eq!(render(named, json!([])).unwrap(), "D");
        let raised = render("{{ raise_exception('roles must alternate') }}".into(), json!([])).unwrap_err();
        assert!(raised.to_string().contains("roles must alternate"));
        assert!(render("{% if %}".into(), json!([])).is_err());
        assert!(render(json!(3), json!([])).is_err());
    }
}
